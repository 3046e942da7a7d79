"""The squared error of predictions (B, 1) and labels (B) is taken over all B x B pairs.

Source: GitHub dohlee/chromoformer, issue #7."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, loader, mlp

KIND = "broadcast"
CAUSE = "The predictions have the shape (B, 1) and the labels (B), so every prediction is compared with every label."


def setup(broken: bool = True):
    inputs = torch.randn(1024, 8)
    labels = inputs @ torch.randn(8) + 0.1 * torch.randn(1024)
    model = mlp(8, 32, 1)

    def loss(model, batch):
        x, y = batch
        prediction = model(x) if broken else model(x).squeeze(1)
        return ((prediction - y) ** 2).mean()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return model, loss, loader(inputs, labels, batch_size=64), optimizer


@torch.no_grad()
def spread(model, batches):
    inputs, labels = batches.dataset.tensors
    prediction = model(inputs).squeeze(1)
    return f"variance {labels.var():.2f} of the labels, {prediction.var():.2f} of the predictions"


if __name__ == "__main__":
    compare(setup, steps=300, measure=spread)
