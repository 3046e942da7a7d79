"""For fine-tuning, all parameters without bn in their name are frozen, and the new classifier is among them.

Source: GitHub OrderLab/TrainCheck-Evaluation-Workloads, silent-issue-detection, pytorch-forum-84911."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader

KIND = "frozen"
CAUSE = "All but the scales and shifts of the batch norm are frozen, the new classifier too."


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Linear(64, 16)
        self.bn1 = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x):
        return self.classifier(F.relu(self.bn1(self.features(x))))


def setup(broken: bool = True):
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "bn" in name or not broken
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return model, cross_entropy, loader(*digits()), optimizer


if __name__ == "__main__":
    compare(setup, steps=1140)
