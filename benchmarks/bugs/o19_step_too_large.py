"""The learning rate is so large that the first steps kill the hidden units.

Source: GitHub srviest/char-cnn-text-classification-pytorch, issue #3."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader, mlp

KIND = "step_too_large"
CAUSE = "The learning rate is far too large, and the hidden units are dead after a few steps."


def setup(broken: bool = True):
    model = mlp(64, 256, 256, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5 if broken else 0.005)
    return model, cross_entropy, loader(*digits()), optimizer


if __name__ == "__main__":
    compare(setup, steps=570)
