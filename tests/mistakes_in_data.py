"""More small programs with one mistake each, see mistakes.py: in the layout of tensors, the data and the learning."""

import math

import torch
import torch.nn.functional as F
from pieces import (
    Parts,
    Recurrent,
    blobs,
    classifier,
    classify,
    curve,
    language,
    loader,
    mistake,
    mlp,
    regressor,
    waves,
)
from torch import nn
from torch.utils.data import DataLoader

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


@mistake("examples")
def softmax_over_examples_that_the_loss_mixes(broken):
    model = nn.Sequential(*mlp(), nn.Softmax(dim=0)) if broken else mlp()

    def loss(model, batch):
        order = torch.randperm(len(batch[0]))
        scores = model(0.7 * batch[0] + 0.3 * batch[0][order])
        return sum(
            share * F.nll_loss(scores.log_softmax(1), y) for share, y in ((0.7, batch[1]), (0.3, batch[1][order]))
        )

    return classifier(model, loss)


@mistake("loss")
def view_of_places_for_permute(broken):
    """One axis is a multiple of the other, so that the parts fit."""
    model = nn.Conv1d(3, 4, 3, padding=1)

    def loss(model, batch):
        scores = model(batch[0])  # B 4 T
        scores = scores.view(-1, 4) if broken else scores.transpose(1, 2).reshape(-1, 4)
        return F.cross_entropy(scores, batch[1].view(-1))

    x = torch.randn(128, 3, 16)
    return model, loss, loader(x, x.argmax(1)), torch.optim.Adam(model.parameters(), 1e-2)


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
