"""What the programs of this folder share: the digits, a loader, a plain network, the usual loop and what is printed."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def digits(scale=16.0):
    """Return the pixels (1797 x 64, from 0 to 16, divided by the scale) and the labels of scikit-learn's digits."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / scale, torch.tensor(data.target)


def cross_entropy(model, batch):
    """The loss of a batch (inputs, labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def loader(*tensors, batch_size=32):
    """Shuffled batches of these tensors."""
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True)


def mlp(*sizes):
    """Linear layers of these sizes with a ReLU between them."""
    layers = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(model, loss, batches, optimizer, step=None, steps=1000):
    """Take this many steps, with the program's own step if it has one, and return the loss of each."""
    losses = []
    model.train()
    while len(losses) < steps:
        for batch in batches:
            if step:
                value = step(batch)
            else:
                optimizer.zero_grad()
                value = loss(model, batch)
                value.backward()
                optimizer.step()
            losses.append(value.item())
            if len(losses) == steps:
                break
    return losses


@torch.no_grad()
def accuracy(model, batches):
    """Say which share of these (inputs, labels) batches the model names right in eval mode."""
    model.eval()
    pairs = [(model(inputs).argmax(1), labels) for inputs, labels in batches]
    named, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    return f"accuracy {(named == labels).float().mean():.1%}, {len(named.unique())} classes named"


def compare(setup, steps, measure=accuracy):
    """Train the broken and the mended program, and print a line about each."""
    torch.set_num_threads(1)
    for broken in (True, False):
        torch.manual_seed(0)
        parts = setup(broken)
        losses = train(*parts, steps=steps)
        last = sum(losses[-50:]) / len(losses[-50:])
        result = measure(parts[0], parts[2])
        print(f"{'broken' if broken else 'mended'}: loss {losses[0]:.3f} at first, {last:.3f} at last; {result}")
