"""The attention weights are normalised over the batch and not over the tokens.

Source: GitHub motokimura/capsnet_pytorch, pull request #1, and perone/euclidesdb, issue #2."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import accuracy, compare, cross_entropy, loader

KIND = "softmax_axis"
CAUSE = "The softmax runs over axis 0, the batch, so the examples of a batch compete with each other."


class Attention(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.score = nn.Linear(8, 1)
        self.output = nn.Linear(8, 3)
        self.axis = 0 if broken else 1

    def forward(self, tokens):
        weights = F.softmax(self.score(tokens), dim=self.axis)
        return self.output((weights * tokens).sum(dim=1))


def setup(broken: bool = True):
    labels = torch.randint(3, (2048,))
    tokens = torch.randn(2048, 10, 8)
    tokens[torch.arange(2048), torch.randint(10, (2048,))] += 3 * torch.eye(8)[labels] + 3 * torch.eye(8)[7]
    model = Attention(broken)
    return model, cross_entropy, loader(tokens, labels, batch_size=64), torch.optim.Adam(model.parameters(), lr=1e-2)


def by_size(model, batches):
    single = loader(*batches.dataset.tensors, batch_size=1)
    return f"in batches of 64 {accuracy(model, batches)}, one by one {accuracy(model, single)}"


if __name__ == "__main__":
    compare(setup, steps=960, measure=by_size)
