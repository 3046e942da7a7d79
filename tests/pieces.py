"""What small programs are made of, see mistakes.py: data, networks and loops, and MISTAKES, where all are kept."""

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


class Parts(nn.Module):
    """An encoder and a head with something between."""

    def __init__(self, between=lambda h: h):
        super().__init__()
        self.encoder, self.head, self.between = nn.Sequential(nn.Linear(10, 32), nn.ReLU()), nn.Linear(32, 4), between

    def forward(self, x):
        return self.head(self.between(self.encoder(x)))
