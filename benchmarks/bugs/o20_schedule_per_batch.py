"""A decay that is meant for every epoch is applied after every batch.

Source: GitHub ivadomed/ivadomed, pull request #55."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader, mlp

KIND = "schedule_per_batch"
CAUSE = "The scheduler steps after every batch and not after every epoch, so the learning rate is soon close to zero."


def setup(broken: bool = True):
    batches = loader(*digits(), batch_size=16)
    model = mlp(64, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    count = 0

    def step(batch):
        nonlocal count
        optimizer.zero_grad()
        value = cross_entropy(model, batch)
        value.backward()
        optimizer.step()
        count += 1
        if broken or count % len(batches) == 0:
            scheduler.step()
        return value

    return model, cross_entropy, batches, optimizer, step


if __name__ == "__main__":
    compare(setup, steps=1130)
