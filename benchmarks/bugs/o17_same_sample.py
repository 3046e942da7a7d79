"""The data set sends the index into a generator, which goes on serving item 0.

Source: GitHub NVIDIA-Genomics-Research/AtacWorks, issue #195."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import accuracy, compare, cross_entropy, digits, loader, mlp

KIND = "same_sample"
CAUSE = "The generator drops the index that is sent to it, so the data set returns item 0 for every index."


class Digits(Dataset):
    def __init__(self, broken):
        self.broken = broken
        self.images, self.labels = digits()
        self.reader = self.read()
        next(self.reader)

    def read(self):
        index = 0
        while True:
            sent = yield self.images[index], self.labels[index]
            index = index if self.broken else sent

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.reader.send(index)


def setup(broken: bool = True):
    model = mlp(64, 32, 10)
    batches = DataLoader(Digits(broken), batch_size=32, shuffle=True)
    return model, cross_entropy, batches, torch.optim.SGD(model.parameters(), lr=0.1)


if __name__ == "__main__":
    compare(setup, steps=570, measure=lambda model, batches: accuracy(model, loader(*digits())))
