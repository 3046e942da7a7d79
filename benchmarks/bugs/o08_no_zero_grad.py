"""The gradients are never cleared, so every step uses the sum of all gradients so far.

Source: Stack Overflow 60335387; GitHub OrderLab/TrainCheck-Evaluation-Workloads, stackoverflow-60335387."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader, mlp

KIND = "no_zero_grad"
CAUSE = "Nothing clears the gradients between two steps, so they add up."


def setup(broken: bool = True):
    batches = loader(*digits(), batch_size=30)
    model = mlp(64, 128, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(batch):
        if not broken:
            optimizer.zero_grad()
        value = cross_entropy(model, batch)
        value.backward()
        optimizer.step()
        return value

    return model, cross_entropy, batches, optimizer, step


if __name__ == "__main__":
    compare(setup, steps=1200)
