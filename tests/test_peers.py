import json
import math
from pathlib import Path

import pytest
import torch

from engine import Trainer
from models import build_encoder

SMALL = ("--epochs", 2, "--size", 8, "--batch-size", 512, "--width", 64)


@pytest.mark.parametrize("method", ["simclr", "swav", "byol", "vicreg"])
def test_a_peer_learns_can_be_stopped_and_is_a_start(script, cache, monkeypatch, method):
    options = (method, *SMALL, "--data-dir", cache, "--out")
    end = script("benchmarks/peers.py", *options, "whole")
    assert end.status == 0, end.err
    state = torch.load("whole/encoder.pt", weights_only=True)
    build_encoder("conv").load_state_dict(state)
    # Guessing: all of a batch's other views, or all prototypes, are equally likely; predictions at right angles to what
    # they predict; all projections equal.
    guess = {"simclr": math.log(1023), "swav": math.log(512), "byol": 0.0, "vicreg": 25.0}[method]
    least = -1.0 if method == "byol" else 0.0
    summary = json.loads(Path("whole/summary.json").read_text())
    assert least < summary["loss"] < guess and summary["method"] == method

    train_epoch = Trainer.train_epoch

    def stop(self, loader, epoch, *rest):
        if epoch:
            raise KeyboardInterrupt
        return train_epoch(self, loader, epoch, *rest)

    monkeypatch.setattr(Trainer, "train_epoch", stop)
    assert script("benchmarks/peers.py", *options, "stopped").status == 130
    monkeypatch.setattr(Trainer, "train_epoch", train_epoch)
    end = script("benchmarks/peers.py", "--resume", "stopped")
    assert end.status == 0, end.err
    resumed = torch.load("stopped/encoder.pt", weights_only=True)
    assert all(torch.equal(state[name], resumed[name]) for name in state)

    end = script("train_transfer.py", "stopped", "--mode", "knn", "--data-dir", cache, "--out", "transfer")
    assert end.status == 0, end.err


@pytest.mark.parametrize(
    "args, message",
    [
        ((), "give a method: simclr or swav or byol or vicreg"),
        (("dino",), "give a method: simclr or swav or byol or vicreg"),
        (("simclr", "--prototypes", 64), "--prototypes is of swav"),
        (("byol", "--temperature", 0.2), "--temperature is of simclr and swav"),
        (("swav", "--encoder", "convnext_tiny", "--size", 8), "--size 8 is too small"),
        (("swav", "--encoder", "convnext_tiny", "--grow"), "--grow starts with views of 16 px, which convnext_tiny"),
    ],
)
def test_wrong_use_is_one_line(script, cache, args, message):
    end = script("benchmarks/peers.py", *args, "--data-dir", cache)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1
    assert not Path("runs").exists()
