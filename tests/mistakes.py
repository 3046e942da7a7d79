"""Small programs with one mistake each: `MISTAKES[name] = (setup, check)`. `setup(broken)` returns the pieces with the
mistake or without it; `check` is the first check that fails with it, None where no check finds it yet. These are in
the loss and in the path of the gradient; others in mistakes_in_training.py and mistakes_in_data.py."""

import torch
import torch.nn.functional as F
from pieces import Parts, blobs, classifier, classify, curve, mistake, mlp, regressor
from torch import nn

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
