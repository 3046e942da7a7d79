"""The network ends in a softmax, and the cross entropy applies another one.

Source: GitHub shaoxiongji/federated-learning, issue #9."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, digits, loader

KIND = "softmax_ce"
CAUSE = "The model returns probabilities where the cross entropy expects raw scores, so softmax is applied twice."


class Net(nn.Module):
    def __init__(self, softmax):
        super().__init__()
        self.hidden = nn.Linear(64, 64)
        self.output = nn.Linear(64, 10)
        self.softmax = nn.Softmax(dim=1) if softmax else nn.Identity()

    def forward(self, x):
        x = F.relu(self.hidden(x))
        return self.softmax(self.output(x))


def loss(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def setup(broken: bool = True):
    model = Net(softmax=broken)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, loss, loader(*digits()), optimizer


if __name__ == "__main__":
    compare(setup, steps=1140)
