"""The sum of two task losses is logged, but only its first term is returned for backward.

Source: GitHub tom-roddick/oft, issue #6."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare

KIND = "only_one_term"
CAUSE = "The loss that is returned is the class term alone, so the head for the place is never trained."


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.kind, self.place = nn.Linear(16, 64), nn.Linear(64, 3), nn.Linear(64, 2)

    def forward(self, x):
        x = torch.relu(self.trunk(x))
        return self.kind(x), self.place(x)


def setup(broken: bool = True):
    x = torch.randn(1024, 16)
    kind = x[:, :3].argmax(1)
    place = 10 * x[:, :2] + torch.randn(1024, 2)
    batches = [{"x": x[i : i + 32], "kind": kind[i : i + 32], "place": place[i : i + 32]} for i in range(0, 1024, 32)]
    model = Detector()

    def loss(model, batch):
        kind, place = model(batch["x"])
        terms = [nn.functional.cross_entropy(kind, batch["kind"]), nn.functional.mse_loss(place, batch["place"])]
        model.logged = sum(terms).item()
        return terms[0] if broken else sum(terms)

    return model, loss, batches, torch.optim.Adam(model.parameters(), lr=1e-2)


if __name__ == "__main__":
    compare(setup, steps=960, measure=lambda model, batches: f"logged total {model.logged:.2f}")
