"""A hook keeps a detached copy of the encoder's output, and the head is trained on that copy.

Source: GitHub lucidrains/CoCa-pytorch, issue #6.
With the recipe's 4 features the mended program reached 32 % with one seed of three; with 8 it learns."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader

KIND = "detached_features"
CAUSE = "The hook detaches the features it keeps, so no gradient reaches the encoder."


class Classifier(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.broken = broken
        self.encoder = nn.Sequential(nn.Linear(64, 8), nn.ReLU())
        self.encoder.register_forward_hook(self.keep)
        self.head = nn.Linear(8, 10)

    def keep(self, module, inputs, output):
        self.features = output.clone().detach() if self.broken else output.clone()

    def forward(self, x):
        self.encoder(x)
        return self.head(self.features)


def setup(broken: bool = True):
    model = Classifier(broken)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return model, cross_entropy, loader(*digits()), optimizer


if __name__ == "__main__":
    compare(setup, steps=1140)
