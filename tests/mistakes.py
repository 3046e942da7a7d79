"""Small programs with one mistake each: `MISTAKES[name] = (setup, check)`. `setup(broken)` returns the pieces with the
mistake or without it; `check` is the first check that fails with it, None where no check finds it yet."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

MISTAKES = {}


def mistake(check):
    def keep(setup):
        MISTAKES[setup.__name__] = (setup, check)
        return setup

    return keep


def blobs(count=256, features=10, classes=4, scale=1.0, seed=1):
    """Clouds of points, one a class."""
    rng = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(classes, features, generator=rng)
    labels = torch.randint(classes, (count,), generator=rng)
    return scale * (centres[labels] + torch.randn(count, features, generator=rng)) / 2.2, labels


def curve(count=256, features=6):
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(count, features, generator=rng)
    return x, torch.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2]


def loader(*tensors, size=32, shuffle=True):
    return DataLoader(TensorDataset(*tensors), size, shuffle=shuffle)


def mlp(features=10, hidden=32, out=4):
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
    )


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def classifier(model=None, loss=classify, data=None, lr=1e-2, optimizer=None):
    model = model or mlp()
    return model, loss, loader(*(data or blobs())), optimizer or torch.optim.Adam(model.parameters(), lr)


def regressor(model=None, loss=None, data=None, lr=1e-2):
    model = model or mlp(6, 32, 1)
    loss = loss or (lambda model, batch: F.mse_loss(model(batch[0])[:, 0], batch[1]))
    return model, loss, loader(*(data or curve())), torch.optim.Adam(model.parameters(), lr)


def tokens(count=128, length=13, vocabulary=11, seed=3):
    """Sequences that count on from a random number in random steps: the next follows from the two before."""
    rng = torch.Generator().manual_seed(seed)
    start, step = (torch.randint(vocabulary, (count, 1), generator=rng) for _ in range(2))
    return (start + step * torch.arange(length)) % vocabulary


class Attention(nn.Module):
    def __init__(self, width=16, heads=2, mode="good"):
        super().__init__()
        self.heads, self.mode = heads, mode
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        if self.mode == "heads":
            q, k, v = (part.view(B, self.heads, T, D // self.heads) for part in self.qkv(x).split(D, 2))
        else:
            q, k, v = (part.view(B, T, self.heads, D // self.heads).transpose(1, 2) for part in self.qkv(x).split(D, 2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(D // self.heads)
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if self.mode == "inverted":
            seen = torch.ones(T, T, dtype=torch.bool).triu()
        if self.mode != "open":
            scores = scores.masked_fill(~seen, -math.inf)
        mix = scores.softmax(-2 if self.mode == "dim" else -1)
        return self.out((mix @ v).transpose(1, 2).reshape(B, T, D))


class Transformer(nn.Module):
    def __init__(self, mode="good", vocabulary=11, width=16, length=13):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, mode=mode)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x):
        h = self.embed(x) + self.place(torch.arange(x.shape[1]))
        h = h + self.attention(self.norm(h))
        return self.head(h + self.mlp(self.norm2(h)))


def foretell(model, batch):
    out = model(batch[0][:, :-1])
    return F.cross_entropy(out.reshape(-1, out.shape[-1]), batch[0][:, 1:].reshape(-1))


def language(mode="good", loss=foretell):
    model = Transformer(mode)
    return model, loss, loader(tokens()), torch.optim.AdamW(model.parameters(), 3e-3)


class Recurrent(nn.Module):
    def __init__(self, batch_first=True, pick=-1):
        super().__init__()
        self.rnn, self.head, self.pick = nn.LSTM(3, 16, batch_first=batch_first), nn.Linear(16, 2), pick

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, self.pick])


def waves(count=128, length=9):
    rng = torch.Generator().manual_seed(4)
    labels = torch.randint(2, (count,), generator=rng)
    x = torch.randn(count, length, 3, generator=rng)
    x[:, :, 0] += labels[:, None].float()
    return x, labels


def pictures(count=96, size=8, classes=3):
    rng = torch.Generator().manual_seed(5)
    labels = torch.randint(classes, (count,), generator=rng)
    patterns = torch.randn(classes, 1, size, size, generator=rng)
    return patterns[labels] + 0.5 * torch.randn(count, 1, size, size, generator=rng), labels


class Convolutional(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, dropout=None):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = (
            nn.Conv2d(1, 8, 3, padding=1),
            norm(8),
            nn.Conv2d(8, 16, 3, 2, 1),
            norm(16),
        )
        self.head, self.dropout = nn.Linear(16, 3), dropout

    def forward(self, x):
        h = F.relu(self.norm1(self.conv1(x)))
        if self.dropout:
            h = self.dropout(h)
        return self.head(F.relu(self.norm2(self.conv2(h))).mean((2, 3)))


def convolutional(model=None, lr=1e-2, size=32):
    model = model or Convolutional()
    return model, classify, loader(*pictures(), size=size), torch.optim.Adam(model.parameters(), lr)


def loop(pieces, *, zero="before", clip=None, schedule=None, mode=None, order="good", backward=True):
    """The pieces with a training loop of one's own."""
    model, loss, batches, optimizer = pieces
    scheduler = schedule(optimizer) if schedule else None

    def step(batch):
        if mode == "eval":
            model.eval()
        elif mode == "train":
            model.train()
        if zero == "before":
            optimizer.zero_grad()
        value = loss(model, batch)
        if backward:
            value.backward()
        if zero == "between":
            optimizer.zero_grad()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if order == "good":
            optimizer.step()
        if scheduler:
            scheduler.step()

    return *pieces, step


# The loss and what it gets


@mistake("loss")
def broadcast_mse(broken):
    return regressor(loss=lambda model, b: F.mse_loss(model(b[0]), b[1] if broken else b[1][:, None]))


@mistake("loss")
def broadcast_by_hand(broken):
    return regressor(loss=lambda model, b: (model(b[0]) - (b[1] if broken else b[1][:, None])).square().mean())


@mistake("loss")
def softmax_twice(broken):
    model = nn.Sequential(*mlp(), nn.Softmax(dim=1)) if broken else mlp()
    return classifier(model)


@mistake("loss")
def sigmoid_twice(broken):
    x, y = blobs(classes=2)
    model = nn.Sequential(*mlp(out=1), nn.Sigmoid()) if broken else mlp(out=1)
    return classifier(model, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1].float()), (x, y))


@mistake("loss")
def log_softmax_missing(broken):
    return classifier(loss=lambda m, b: F.nll_loss(m(b[0]) if broken else m(b[0]).log_softmax(1), b[1]))


@mistake("loss")
def log_missing(broken):
    return classifier(loss=lambda m, b: F.nll_loss(m(b[0]).softmax(1) if broken else m(b[0]).log_softmax(1), b[1]))


@mistake("loss")
def log_softmax_dim(broken):
    return classifier(loss=lambda m, b: F.nll_loss(m(b[0]).log_softmax(0 if broken else 1), b[1]))


@mistake("loss")
def sign_of_cross_entropy(broken):
    return classifier(loss=lambda m, b: (-1 if broken else 1) * classify(m, b))


@mistake("loss")
def minus_forgotten(broken):
    def loss(model, b):
        logs = model(b[0]).log_softmax(1)[torch.arange(len(b[1])), b[1]].mean()
        return logs if broken else -logs

    return classifier(loss=loss)


@mistake(None)
def targets_rolled_in_loss(broken):
    return classifier(loss=lambda m, b: F.cross_entropy(m(b[0]), b[1].roll(1) if broken else b[1]))


@mistake("steps")
def one_class_softmax(broken):
    x, y = blobs(classes=2)
    if broken:
        return classifier(mlp(out=1), lambda m, b: F.cross_entropy(m(b[0]), b[1][:, None].float()), (x, y))
    return classifier(
        mlp(out=1), lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1][:, None].float()), (x, y)
    )


@mistake("loss")
def labels_plus_minus_one(broken):
    x, y = blobs(classes=2)
    y = 2 * y.float() - 1 if broken else y.float()
    return classifier(mlp(out=1), lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1]), (x, y))


@mistake(None)
def several_classes_in_softmax(broken):
    x, y = blobs()
    y = F.one_hot(y, 4).float() + F.one_hot((y + 1) % 4, 4).float()
    loss = F.cross_entropy if broken else F.binary_cross_entropy_with_logits
    return classifier(loss=lambda m, b: loss(m(b[0]), b[1]), data=(x, y))


@mistake("loss")
def relu_before_negative_targets(broken):
    return regressor(nn.Sequential(*mlp(6, 32, 1), nn.ReLU()) if broken else None)


@mistake("loss")
def sigmoid_before_wide_targets(broken):
    return regressor(nn.Sequential(*mlp(6, 32, 1), nn.Sigmoid()) if broken else None)


@mistake("loss")
def relu_on_logits(broken):
    return classifier(nn.Sequential(*mlp(), nn.ReLU()) if broken else None)


@mistake("overfit")
def targets_not_normalised(broken):
    x, y = curve()
    return regressor(data=(x, 2e5 + 1e5 * y if broken else y), lr=1e-3)


@mistake("overfit")
def targets_scaled_away(broken):
    x, y = curve()
    return regressor(data=(x, 1e-4 * y if broken else y))


@mistake("loss")
def all_ignored(broken):
    return classifier(
        loss=lambda m, b: F.cross_entropy(
            m(b[0]), torch.where(b[1] > 0, b[1], 0) * (0 if broken else 1), ignore_index=0
        )
    )


@mistake("loss")
def kl_without_log(broken):
    def loss(model, b):
        out = model(b[0])
        return F.kl_div(
            out.softmax(1) if broken else out.log_softmax(1), F.one_hot(b[1], 4).float(), reduction="batchmean"
        )

    return classifier(loss=loss)


@mistake("loss")
def log_of_zero(broken):
    return regressor(loss=lambda m, b: (m(b[0])[:, 0] - (b[1].relu() + (0 if broken else 1)).log()).square().mean())


@mistake("loss")
def labels_from_one(broken):
    x, y = blobs()
    return classifier(data=(x, y + 1 if broken else y))


@mistake("loss")
def sigmoid_missing(broken):
    x, y = blobs(classes=2)
    return classifier(
        mlp(out=1),
        lambda m, b: F.binary_cross_entropy(m(b[0])[:, 0] if broken else m(b[0])[:, 0].sigmoid(), b[1].float()),
        (x, y),
    )


# The path of the gradient


class Parts(nn.Module):
    """An encoder and a head with something between."""

    def __init__(self, between=lambda h: h):
        super().__init__()
        self.encoder, self.head, self.between = nn.Sequential(nn.Linear(10, 32), nn.ReLU()), nn.Linear(32, 4), between

    def forward(self, x):
        return self.head(self.between(self.encoder(x)))


@mistake("gradient")
def detached(broken):
    return classifier(Parts((lambda h: h.detach()) if broken else (lambda h: h)))


@mistake("gradient")
def data_attribute(broken):
    return classifier(Parts((lambda h: torch.relu(h.data)) if broken else torch.relu))


@mistake("gradient")
def under_no_grad(broken):
    class Model(Parts):
        def forward(self, x):
            with torch.set_grad_enabled(not broken):
                h = self.encoder(x)
            return self.head(h)

    return classifier(Model())


@mistake("gradient")
def through_numpy(broken):
    return classifier(Parts((lambda h: torch.from_numpy(h.detach().numpy())) if broken else (lambda h: h)))


@mistake("gradient")
def through_argmax(broken):
    return classifier(
        Parts((lambda h: F.one_hot(h.argmax(1), 32).float()) if broken else (lambda h: h.softmax(1) * 10))
    )


@mistake("steps")
def rounded(broken):
    return classifier(Parts((lambda h: (4 * h).round() / 4) if broken else (lambda h: h)))


@mistake("gradient")
def list_of_layers(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(10, 10) for _ in range(3)]
            self.layers, self.head = layers if broken else nn.ModuleList(layers), nn.Linear(10, 4)

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.head(x)

    return classifier(Model())


@mistake("gradient")
def tensor_for_a_parameter(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.randn(10, 16) / 3
            self.weight, self.head = weight.requires_grad_() if broken else nn.Parameter(weight), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(torch.relu(x @ self.weight))

    return classifier(Model())


@mistake("gradient")
def layer_in_forward(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(10, 16), nn.Linear(16, 4)

        def forward(self, x):
            first = nn.Linear(10, 16) if broken else self.first
            return self.head(torch.relu(first(x)))

    return classifier(Model())


@mistake("gradient")
def layer_not_called(broken):
    class Model(Parts):
        def __init__(self):
            super().__init__()
            self.middle = nn.Linear(32, 32)

        def forward(self, x):
            h = self.encoder(x)
            return self.head(h if broken else torch.relu(self.middle(h)))

    return classifier(Model())


@mistake("gradient")
def frozen(broken):
    model = Parts()
    model.encoder.requires_grad_(not broken)
    return classifier(model)


@mistake("gradient")
def optimiser_of_another_model(broken):
    old = mlp()
    model = mlp() if broken else old
    return classifier(model, optimizer=torch.optim.Adam(old.parameters(), 1e-2))


@mistake(None)
def constant_weights(broken):
    model = mlp()
    if broken:
        for p in model.parameters():
            nn.init.constant_(p, 0.1)
    return classifier(model)


@mistake("start")
def zero_weights(broken):
    model = mlp()
    if broken:
        for p in model.parameters():
            nn.init.zeros_(p)
    return classifier(model)


@mistake("gradient")
def root_of_zero(broken):
    def loss(model, b):
        off = model(b[0])[:, 0] - b[1]
        return ((off - off.detach()).square() + (0 if broken else 1e-6)).sqrt().mean() + off.square().mean()

    return regressor(loss=loss)


# The optimiser


@mistake("steps")
def layer_added_later(broken):
    model = Parts()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    if broken:
        model.between = nn.Linear(32, 32)
    return classifier(model, optimizer=optimizer)


@mistake("steps")
def head_only(broken):
    model = Parts()
    return classifier(model, optimizer=torch.optim.Adam((model.head if broken else model).parameters(), 1e-2))


@mistake("steps")
def rate_zero(broken):
    return classifier(lr=0.0 if broken else 1e-2)


@mistake("steps")
def maximise(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.1, maximize=broken))


@mistake(None)
def momentum_one(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.05, momentum=1.0 if broken else 0.9))


@mistake(None)
def decay_of_sgd(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5 if broken else 1e-4))


@mistake("steps")
def decay_of_adamw(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=50 if broken else 0.01))


@mistake("overfit")
def betas_swapped(broken):
    model = mlp()
    return classifier(
        model, optimizer=torch.optim.Adam(model.parameters(), 1e-2, betas=(0.999, 0.9) if broken else (0.9, 0.999))
    )


@mistake("steps")
def adam_rate_too_high(broken):
    return classifier(lr=1.0 if broken else 1e-2)


@mistake("steps")
def sgd_rate_too_high(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 50.0 if broken else 0.1))


@mistake("overfit")
def adam_rate_too_low(broken):
    return classifier(lr=1e-5 if broken else 1e-2)


@mistake("overfit")
def sgd_rate_too_low(broken):
    model = mlp()
    return classifier(model, optimizer=torch.optim.SGD(model.parameters(), 1e-4 if broken else 0.1, momentum=0.9))


@mistake("steps")
def sum_with_the_rate_of_a_mean(broken):
    model = mlp(6, 32, 1)
    loss = lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1], reduction="sum" if broken else "mean")  # noqa: E731
    return model, loss, loader(*curve()), torch.optim.SGD(model.parameters(), 0.3)


# The loop


@mistake("steps")
def gradients_not_cleared(broken):
    return loop(classifier(), zero=None if broken else "before")


@mistake("steps")
def cleared_too_late(broken):
    return loop(classifier(), zero="between" if broken else "before")


@mistake("steps")
def optimiser_never_steps(broken):
    return loop(classifier(), order="none" if broken else "good")


@mistake("steps")
def no_backward(broken):
    return loop(classifier(), backward=not broken)


@mistake("steps")
def clipped_to_nothing(broken):
    model = mlp()
    return loop(classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.1)), clip=1e-6 if broken else 1.0)


@mistake("steps")
def trained_in_eval_mode(broken):
    return loop(convolutional(), mode="eval" if broken else "train")


@mistake("overfit")
def schedule_per_batch(broken):
    model = mlp()
    pieces = classifier(model, optimizer=torch.optim.SGD(model.parameters(), 0.05))
    return loop(pieces, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 3 if broken else 1000, 0.1))


@mistake("overfit")
def endless_warm_up(broken):
    length = 100_000 if broken else 20
    return loop(
        classifier(lr=3e-3), schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: min(1, (k + 1) / length))
    )


# Training and eval mode


@mistake("examples")
def dropout_always(broken):
    return classifier(Parts(lambda h: F.dropout(h, 0.5)) if broken else Parts())


@mistake("overfit")
def dropout_of_nearly_all(broken):
    return classifier(
        nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Dropout(0.95 if broken else 0.1), nn.Linear(128, 4))
    )


@mistake("overfit")
def batch_norm_momentum(broken):
    return convolutional(Convolutional(lambda c: nn.BatchNorm2d(c, momentum=0.99 if broken else 0.1)))


@mistake(None)
def batch_norm_lags(broken):
    return convolutional(Convolutional(lambda c: nn.BatchNorm2d(c, momentum=2e-4 if broken else 0.1)))


@mistake("examples")
def batch_norm_untracked(broken):
    return convolutional(Convolutional(lambda c: nn.BatchNorm2d(c, track_running_stats=not broken)))


@mistake(None)
def loss_switches_to_eval(broken):
    def loss(model, b):
        if broken:
            model.eval()
        return classify(model, b)

    model, _, batches, optimizer = convolutional()
    return model, loss, batches, optimizer


# The start


@mistake("start")
def pixels_of_255(broken):
    x, y = pictures()
    x = (x - x.min()) / (x.max() - x.min())
    model = Convolutional(nn.Identity)
    model.norm1 = model.norm2 = nn.Identity()
    return model, classify, loader(255 * x if broken else 4 * x - 2, y), torch.optim.Adam(model.parameters(), 1e-2)


@mistake(None)
def scaled_twice(broken):
    x, y = blobs()
    return classifier(data=(x / 255 / 2 if broken else x, y))


@mistake("start")
def dead_relu(broken):
    model = mlp()
    if broken:
        nn.init.constant_(model[2].bias, -20)
    return classifier(model)


@mistake("start")
def saturated_tanh(broken):
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 4))
    if broken:
        nn.init.normal_(model[0].weight, std=5)
    return classifier(model)


@mistake("start")
def weights_too_large(broken):
    model = mlp()
    if broken:
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p)
    return classifier(model)


@mistake("steps")
def weights_too_small(broken):
    model = nn.Sequential(*[part for _ in range(6) for part in (nn.Linear(10, 10), nn.Tanh())], nn.Linear(10, 4))
    for p in model.parameters() if broken else ():
        if p.ndim > 1:
            nn.init.normal_(p, std=1e-3)
    return classifier(model)


@mistake("start")
def attention_without_scale(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.k, self.head = nn.Linear(3, 256), nn.Linear(3, 2)
            self.q = nn.Parameter(torch.randn(256))

        def forward(self, x):
            scores = self.k(x) @ self.q / (1 if broken else 16)
            return self.head((scores.softmax(1)[..., None] * x).sum(1))

    model = Model()
    return model, classify, loader(*waves()), torch.optim.Adam(model.parameters(), 1e-2)


@mistake(None)
def no_activation(broken):
    layers = [part for _ in range(3) for part in (nn.Linear(10, 10), nn.Identity() if broken else nn.ReLU())]
    return classifier(nn.Sequential(*layers, nn.Linear(10, 4)))


# The layout of tensors


@mistake("examples")
def batch_first_missing(broken):
    model = Recurrent(batch_first=not broken)
    return model, classify, loader(*waves()), torch.optim.Adam(model.parameters(), 1e-2)


@mistake("examples")
def softmax_over_examples(broken):
    class Model(Parts):
        def forward(self, x):
            h = self.encoder(x)
            return self.head(h * (5 * h).softmax(0 if broken else 1))

    return classifier(Model())


@mistake("examples")
def statistics_of_the_batch(broken):
    return classifier(Parts(lambda h: h - h.mean(0 if broken else 1, keepdim=True)))


@mistake("loss")
def view_for_transpose(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv1d(3, 16, 3), nn.Linear(16, 2)

        def forward(self, x):  # B T 3
            x = x.view(x.shape[0], 3, x.shape[1]) if broken else x.transpose(1, 2)
            return self.head(torch.relu(self.conv(x)).mean(2))

    model = Model()
    return model, classify, loader(*waves()), torch.optim.Adam(model.parameters(), 1e-2)


@mistake("loss")
def heads_by_view(broken):
    return language("heads" if broken else "good")


@mistake("future")
def attention_dim(broken):
    return language("dim" if broken else "good")


@mistake("batch of one")
def squeezed(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(6, 32, 1)

        def forward(self, x):
            return self.net(x).squeeze() if broken else self.net(x).squeeze(1)

    return regressor(Model(), lambda m, b: F.mse_loss(m(b[0]), b[1]))


@mistake("future")
def no_mask(broken):
    return language("open" if broken else "good")


@mistake("future")
def mask_inverted(broken):
    return language("inverted" if broken else "good")


@mistake("future")
def targets_not_shifted(broken):
    def loss(model, b):
        x = b[0]
        out, target = (model(x), x) if broken else (model(x[:, :-1]), x[:, 1:])
        return F.cross_entropy(out.flatten(0, 1), target.flatten())

    return language(loss=loss)


@mistake("future")
def targets_shifted_twice(broken):
    def loss(model, b):
        x, y = b[0][:, :-1], b[0][:, 1:]
        out = model(x)
        if broken:
            out, y = out[:, :-1], y[:, 1:]
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    return language(loss=loss)


# The data


@mistake("batches")
def gaps_in_a_table(broken):
    x, y = blobs()
    x[5::9, 3] = math.nan if broken else 0.0
    return classifier(data=(x, y))


@mistake("batches")
def sorted_by_class(broken):
    x, y = blobs()
    order = y.argsort() if broken else torch.arange(len(y))
    model = mlp()
    return model, classify, loader(x[order], y[order], shuffle=False), torch.optim.Adam(model.parameters(), 1e-2)


@mistake("batches")
def first_batch_for_ever(broken):
    def batches():
        every = loader(*blobs())
        for _ in range(10):
            torch.manual_seed(0) if broken else None
            yield next(iter(every))

    model = mlp()
    return model, classify, list(batches()), torch.optim.Adam(model.parameters(), 1e-2)


@mistake("batches")
def index_ignored(broken):
    class Data(torch.utils.data.Dataset):
        x, y = blobs()

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return self.x[0 if broken else i], self.y[i]

    model = mlp()
    return model, classify, DataLoader(Data(), 32, shuffle=True), torch.optim.Adam(model.parameters(), 1e-2)


@mistake("overfit")
def labels_lost(broken):
    x, y = curve()
    return regressor(data=(x, (y / 10).long().float() if broken else y))


@mistake(None)
def answer_among_the_inputs(broken):
    x, y = blobs()
    x[:, 4] = y if broken else x[:, 4]
    return classifier(data=(x, y))


@mistake("examples")
def seed_in_forward(broken):
    class Model(Parts):
        def forward(self, x):
            if broken:
                torch.manual_seed(0)
            return self.head(self.encoder(x + 0.1 * torch.randn_like(x)))

    return classifier(Model())


@mistake(None)
def changed_in_place(broken):
    def loss(model, b):
        x = b[0].mul_(0.9) if broken else b[0] * 0.9
        return F.cross_entropy(model(x), b[1])

    return classifier(loss=loss)


@mistake("examples")
def state_kept(broken):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head, self.h = nn.GRUCell(3, 16), nn.Linear(16, 2), None

        def forward(self, x):
            h = self.h if broken and self.h is not None and len(self.h) == len(x) else torch.zeros(len(x), 16)
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
            self.h = h.detach()
            return self.head(h)

    model = Model()
    return model, classify, loader(*waves()), torch.optim.Adam(model.parameters(), 1e-2)


@mistake("overfit")
def batch_not_used(broken):
    x, y = blobs()
    return classifier(loss=lambda m, b: F.cross_entropy(m(x), y) if broken else classify(m, b))


@mistake(None)
def labels_shuffled(broken):
    x, y = blobs()
    return classifier(data=(x, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(9))] if broken else y))


# Learning


@mistake(None)
def too_narrow(broken):
    return classifier(
        nn.Sequential(nn.Linear(10, 1 if broken else 16), nn.Sigmoid(), nn.Linear(1 if broken else 16, 4))
    )
