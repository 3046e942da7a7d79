"""The gradients are cleared after backward and before the step. The warm-up is sound, but was suspected.

Source: GitHub Tony-Y/pytorch_warmup, issue #12."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader, mlp

KIND = "zero_before_step"
CAUSE = "The gradients are cleared between backward and step, so the step has nothing to apply."


def setup(broken: bool = True):
    batches = loader(*digits())
    model = mlp(64, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=100)

    def step(batch):
        value = cross_entropy(model, batch)
        if not broken:
            optimizer.zero_grad()
        value.backward()
        if broken:
            optimizer.zero_grad()
        optimizer.step()
        warmup.step()
        return value

    return model, cross_entropy, batches, optimizer, step


if __name__ == "__main__":
    compare(setup, steps=1140)
