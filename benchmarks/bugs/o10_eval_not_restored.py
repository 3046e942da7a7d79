"""Validation switches to eval mode, and training goes on in that mode.

Source: GitHub wkentaro/pytorch-fcn, issue #57."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader

KIND = "eval_not_restored"
CAUSE = "Validation leaves the model in eval mode, so nearly all of the training runs in eval mode."


def setup(broken: bool = True):
    images, labels = digits()
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(10)]
    model = nn.Sequential(*blocks, nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iteration, validation = 0, []

    def step(batch):
        nonlocal iteration
        if iteration % 50 == 0:
            model.eval()
            with torch.no_grad():
                validation.append(cross_entropy(model, (images[1500:], labels[1500:])).item())
            if not broken:
                model.train()
        iteration += 1
        optimizer.zero_grad()
        value = cross_entropy(model, batch)
        value.backward()
        optimizer.step()
        return value

    model.train()
    return model, cross_entropy, loader(images[:1500], labels[:1500]), optimizer, step


if __name__ == "__main__":
    compare(setup, steps=470)
