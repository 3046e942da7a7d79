"""The scores come from an embedding that keeps its standard normal values.

Source: GitHub jsboige/CoursIA, issue #13279, and pytorch-tpu/transformers, pull request #26.
With the recipe's one possible next token both learn fast; with four the scores have to become small first."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare

KIND = "head_init_too_large"
CAUSE = "The tied output weights start with variance one, so the first scores are far too large."


class LanguageModel(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.embedding = nn.Embedding(50, 256)
        if not broken:
            nn.init.normal_(self.embedding.weight, std=256**-0.5)
        self.hidden = nn.Sequential(nn.Linear(256, 256), nn.LayerNorm(256))

    def forward(self, tokens):
        return self.hidden(self.embedding(tokens)) @ self.embedding.weight.T


def loss(model, sequences):
    return nn.functional.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())


def setup(broken: bool = True):
    tokens = [torch.randint(50, (1024,))]
    for _ in range(4):
        tokens.append((3 * tokens[-1] + torch.randint(1, 5, (1024,))) % 50)
    batches = torch.stack(tokens, dim=1).split(16)
    model = LanguageModel(broken)
    return model, loss, batches, torch.optim.SGD(model.parameters(), lr=0.01)


if __name__ == "__main__":
    compare(setup, steps=640, measure=lambda model, batches: "1.386 is the lowest possible")
