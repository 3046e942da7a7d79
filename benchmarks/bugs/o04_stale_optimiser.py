"""The optimizer is made from a first model, and then the model is made a second time.

Source: GitHub spro/practical-pytorch, issue #9."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader, mlp

KIND = "stale_optimiser"
CAUSE = "The optimizer holds the parameters of an earlier model, so its steps do not change the one that runs."


def setup(broken: bool = True):
    batches = loader(*digits())
    model = mlp(64, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if broken:
        model = mlp(64, 32, 10)
    return model, cross_entropy, batches, optimizer


if __name__ == "__main__":
    compare(setup, steps=1140)
