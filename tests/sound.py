"""Sound setups of unusual kinds, each a function that returns what `setup()` does. None may fail a check."""

import copy
from collections import UserDict

import numpy as np
import torch
import torch.nn.functional as F
from pieces import classify, loader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

SOUND = {}


def sound(make):
    """Register a setup."""
    SOUND[make.__name__] = make
    return make


def mlp(inputs: int = 20, outputs: int = 3) -> nn.Sequential:
    """A small network."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, outputs))


def data(*more):
    """Random inputs and labels, with further tensors, in a loader."""
    return loader(torch.randn(128, 20), torch.randint(3, (128,)), *more, size=16)


def adam(model, rate=3e-3):
    """An optimiser."""
    return torch.optim.Adam(model.parameters(), rate)


def in_a_loop(model, loss, batches, optimizer, clip=None):
    """The pieces with the step of a loop."""

    def step(batch):
        optimizer.zero_grad()
        loss(model.train(), batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    return model, loss, batches, optimizer, step


class Inside(nn.Module):
    """A network that computes its loss itself."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, labels=None):
        out = self.net(x)
        return out if labels is None else (out, F.cross_entropy(out, labels))

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


@sound
def inputs_by_keyword():
    return (m := Inside()), lambda m, b: F.cross_entropy(m(x=b[0]), b[1]), data(), adam(m)


@sound
def loss_inside_the_model():
    return (m := Inside()), lambda m, b: m(*b)[1], data(), adam(m)


@sound
def training_step():
    return (m := Inside()), lambda m, b: m.training_step(b), data(), adam(m)


@sound
def batches_of_mappings():
    batches = [UserDict(x=torch.randn(16, 20), y=torch.randint(3, (16,))) for _ in range(6)]
    return (m := mlp()), lambda m, b: F.cross_entropy(m(b["x"]), b["y"]), batches, adam(m)


@sound
def batches_of_arrays():
    batches = [(np.random.randn(16, 20).astype("f"), np.random.randint(3, size=16)) for _ in range(6)]
    return (m := mlp()), lambda m, b: classify(m, list(map(torch.from_numpy, b))), batches, adam(m)


@sound
def a_stream():
    class Stream(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(20), torch.randint(3, ())

    return (m := mlp()), classify, DataLoader(Stream(), 16), adam(m)


@sound
def a_mask_of_ones():
    loss = lambda m, b: F.cross_entropy(m(b[0] * b[2]), b[1])  # noqa: E731
    return (m := mlp()), loss, data(torch.ones(128, 20)), adam(m)


@sound
def a_mask_to_add():
    mask = torch.zeros(128, 20).masked_fill(torch.rand(128, 20) < 0.2, -torch.inf)
    return (m := mlp()), lambda m, b: F.cross_entropy(m(b[0] * b[2].exp()), b[1]), data(mask), adam(m)


@sound
def negative_loss():
    loss = lambda m, b: -F.cosine_similarity(m(b[0]), b[2]).mean()  # noqa: E731
    return (m := mlp()), loss, data(torch.randn(128, 3)), adam(m)


@sound
def real_and_fake():
    def loss(m, b):
        real, fake = m(b[0] + 1), m(b[2])
        ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
        return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)

    return (m := mlp(outputs=1)), loss, data(torch.randn(128, 20)), adam(m)


@sound
def two_views():
    def loss(m, b):
        z = F.normalize(m(torch.cat([b[0], b[0] + 0.1 * torch.randn_like(b[0])])), dim=1)
        likeness = (z @ z.T / 0.2).fill_diagonal_(-1e4)
        return F.cross_entropy(likeness, torch.arange(len(z)).roll(len(b[0])))

    return (m := mlp(outputs=16)), loss, data(), adam(m)


@sound
def pairs_of_scores():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = mlp(outputs=16), mlp(outputs=16)

        def forward(self, x, y):
            return 5 * F.normalize(self.one(x), dim=1) @ F.normalize(self.other(y), dim=1).T

    loss = lambda m, b: F.cross_entropy(m(b[0], b[2]), torch.arange(len(b[0])))  # noqa: E731
    return (m := Pairs()), loss, data(torch.randn(128, 20)), adam(m)


@sound
def a_teacher():
    teacher = mlp()

    def loss(m, b):
        with torch.no_grad():
            aim = teacher(b[0]).softmax(1)
        return F.kl_div(m(b[0]).log_softmax(1), aim, reduction="batchmean")

    return (m := mlp()), loss, data(), adam(m)


@sound
def a_copy_that_follows():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = mlp(outputs=16), nn.Linear(16, 16)
            self.slow = copy.deepcopy(self.one).requires_grad_(False)

        def forward(self, x):
            return self.head(self.one(x)), self.slow(x)

    return (m := Two()), lambda m, b: F.mse_loss(*m(b[0])), data(), torch.optim.Adam(m.parameters(), 3e-3)


@sound
def a_head_on_features():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = mlp(outputs=64), nn.Linear(64, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    return (m := Features()), classify, data(), adam(m.head, 1e-1)


@sound
def spectral_norm():
    norm = nn.utils.parametrizations.spectral_norm
    m = nn.Sequential(norm(nn.Linear(20, 64)), nn.ReLU(), norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 3))
    return m, classify, data(), adam(m)


@sound
def batch_norm_first():
    m = nn.Sequential(nn.BatchNorm1d(20), mlp())
    return m, lambda m, b: classify(m, (5e4 + 3e4 * b[0], b[1])), data(), adam(m)


@sound
def a_head_of_zeros():
    m = mlp()
    nn.init.zeros_(m[2].weight)
    return m, classify, data(), adam(m)


@sound
def frames_in_channels():
    m = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 3))
    loss = lambda m, b: F.cross_entropy(m(b[0].view(-1, 3, 16, 16)).view(-1, 4, 3).mean(1), b[1])  # noqa: E731
    return m, loss, loader(torch.randn(64, 12, 16, 16), torch.randint(3, (64,)), size=16), adam(m)


@sound
def a_graph(sparse=False):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(20, 64), nn.Linear(64, 3)

        def forward(self, x, near):
            return near @ self.two(torch.relu(near @ self.one(x)))

    near = torch.eye(50) + (torch.rand(50, 50) < 0.05)
    near = near / near.sum(1, keepdim=True)
    batch = torch.randn(50, 20), near.to_sparse() if sparse else near, torch.randint(3, (50,))
    return (m := Graph()), lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]), [batch], adam(m, 1e-2)


@sound
def loss_in_training_mode_alone():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x, labels=None):
            return {"loss": F.cross_entropy(self.net(x), labels)} if self.training else [{"class": self.net(x)}]

    return (m := Detector()), lambda m, b: sum(m(*b).values()), data(), adam(m)


@sound
def gradients_in_the_loss():
    def loss(m, b):
        x = b[0].clone().requires_grad_()
        out = m(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(slope, 0.1 * b[2]) + out.mean().square()

    m = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
    return m, loss, data(torch.randn(128, 20)), adam(m, 1e-2)


@sound
def a_closure(rate=0.1):
    m = mlp()
    optimizer = torch.optim.LBFGS(m.parameters(), lr=rate)

    def step(batch):
        def closure():
            optimizer.zero_grad()
            loss = classify(m, batch)
            loss.backward()
            return loss

        optimizer.step(closure)

    return m, classify, data(), optimizer, step


@sound
def zeros_at_first():
    m = nn.Linear(20, 3)
    nn.init.zeros_(m.weight)
    return m, classify, data(), adam(m)


@sound
def a_number_beside_each_batch():
    m = mlp()
    return m, classify, [(*batch, torch.tensor(1.0)) for batch in data()], adam(m)


@sound
def noise_of_ones_own():
    class Noisy(Dataset):
        x, y, rng = torch.randn(128, 20), torch.randint(3, (128,)), np.random.default_rng()

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return self.x[i] + 0.01 * float(self.rng.normal()), self.y[i]

    return (m := mlp()), classify, DataLoader(Noisy(), 16, shuffle=True), adam(m)


@sound
def a_first_bump():
    m = mlp()
    return m, classify, data(), torch.optim.SGD(m.parameters(), 0.2, momentum=0.9)


@sound
def examples_by_name():
    class Named(Dataset):
        data = {f"a{i}": (torch.randn(20), torch.randint(3, ())) for i in range(64)}

        def __len__(self):
            return len(self.data)

        def __getitem__(self, name):
            return self.data[name]

    return (m := mlp()), classify, DataLoader(Named(), 16, sampler=list(Named.data)), adam(m)


@sound
def words():
    batches = [([chr(97 + k) for k in row], (row > 12).long()) for row in torch.randint(26, (6, 16))]
    letters = lambda b: torch.tensor([[ord(word) / 10 - 11] for word in b[0]])  # noqa: E731
    return (m := mlp(1, 2)), lambda m, b: F.cross_entropy(m(letters(b)), b[1]), batches, adam(m, 1e-2)


@sound
def a_margin_that_all_reach():  # so that the loss is zero
    near, far = torch.randn(128, 20) + 3, torch.randn(128, 20) - 3
    return (m := mlp(outputs=1)), lambda m, b: F.relu(1 - m(b[0]) + m(b[1])).mean(), loader(near, far), adam(m)


@sound
def frozen_features_in_a_loop_of_ones_own():
    return in_a_loop(*a_head_on_features())


@sound
def a_sum_whose_gradient_is_clipped():
    inputs = torch.randn(128, 20)
    targets, m = 30 + 10 * inputs[:, :3].sum(1, keepdim=True), mlp(outputs=1)
    loss = lambda m, b: F.mse_loss(m(b[0]), b[1], reduction="sum")  # noqa: E731
    return in_a_loop(m, loss, loader(inputs, targets, size=16), adam(m, 1e-2), clip=1.0)


@sound
def examples_mixed_in_the_loss():
    def loss(m, b):
        order = torch.randperm(len(b[0]))
        out = m(0.7 * b[0] + 0.3 * b[0][order])
        return 0.7 * F.cross_entropy(out, b[1]) + 0.3 * F.cross_entropy(out, b[1][order])

    return (m := mlp()), loss, data(), adam(m)


@sound
def a_loss_below_zero():  # of an actor and a critic
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.policy, self.value = nn.Linear(4, 64), nn.Linear(64, 2), nn.Linear(64, 1)

        def forward(self, x):
            return self.policy(hidden := self.body(x).tanh()), self.value(hidden)[:, 0]

    def loss(m, b):
        logits, value = m(b[0])
        chosen, advantage = logits.log_softmax(1).gather(1, b[1][:, None])[:, 0], (b[2] - value).detach()
        return F.mse_loss(value, b[2]) / 2 - (chosen * advantage).mean()

    states, actions = torch.randn(256, 4), torch.randint(2, (256,))
    returns = torch.where(actions == (states[:, 0] > 0).long(), 1.0, -1.0) + 5 * states[:, 1]
    return (m := Both()), loss, loader(states, actions, returns, size=16), adam(m)


@sound
def a_graph_with_a_sparse_matrix():
    return a_graph(sparse=True)


@sound
def sparse_gradients():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Embedding(100, 16, sparse=True), nn.Embedding(100, 16, sparse=True)

        def forward(self, x, y):
            return (self.one(x) * self.other(y)).sum(1)

    x, y = torch.randint(100, (2, 256))
    loss = lambda m, b: F.binary_cross_entropy_with_logits(m(*b[:2]), b[2])  # noqa: E731
    batches = loader(x, y, ((x + y) % 2).float(), size=16)
    return in_a_loop(m := Pairs(), loss, batches, torch.optim.SparseAdam(m.parameters(), 1e-2))


@sound
def a_norm_of_each_head():  # the last axis is cut into heads, which join the batch
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inward, self.outward = nn.Linear(20, 32), nn.Linear(32, 3)

        def forward(self, x):  # B T 20
            heads = F.normalize(self.inward(x).reshape(-1, 8), dim=1)  # B*T*4 8
            return self.outward(heads.reshape(len(x), -1, 32).mean(1))

    return (m := Heads()), classify, loader(torch.randn(128, 6, 20), torch.randint(3, (128,)), size=16), adam(m)


@sound
def a_loss_with_an_axis():
    return (m := mlp()), lambda m, b: classify(m, b)[None], data(), adam(m)
