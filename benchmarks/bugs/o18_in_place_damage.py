"""Reading an item normalises it in place, so every epoch changes the stored data again.

Source: GitHub facebookresearch/pycls, pull request #21."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, mlp

KIND = "in_place_damage"
CAUSE = "The item is a view of the stored array, and normalising it in place changes the data set for good."


class Digits(Dataset):
    def __init__(self, broken):
        self.broken = broken
        self.images, self.labels = digits(scale=1.0)
        self.mean, self.std = self.images.mean(), self.images.std()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index] if self.broken else self.images[index].clone()
        image -= self.mean
        image /= self.std
        return image, self.labels[index]


def setup(broken: bool = True):
    model = mlp(64, 32, 10)
    batches = DataLoader(Digits(broken), batch_size=32, shuffle=True)
    return model, cross_entropy, batches, torch.optim.SGD(model.parameters(), lr=0.1)


if __name__ == "__main__":
    compare(setup, steps=456)
