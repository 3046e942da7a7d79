"""A mean picture from 0 to 255 is subtracted from pictures from 0 to 1.

Source: GitHub CSAILVision/GazeCapture, issue #32."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import compare, cross_entropy, digits, loader, mlp

KIND = "inputs_off_scale"
CAUSE = "The mean picture is not divided by the same factor as the pictures, so it drowns them."


def setup(broken: bool = True):
    pixels, labels = digits(scale=16 / 255)
    mean = pixels.mean(dim=0)
    inputs = pixels / 255 - (mean if broken else mean / 255)
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return model, cross_entropy, loader(inputs, labels), optimizer


if __name__ == "__main__":
    compare(setup, steps=1140)
