import errno
import os
import pickle
import threading

import pytest
import torch

from harness import checkpoint, files
from harness.errors import UsageError


def test_what_is_saved_is_loaded_without_executing_anything(tmp_path):
    state = {"model": {"weight": torch.randn(3)}, "epoch": 4, "settings": {"lr": 1e-3, "data": "photos", "views": True}}
    checkpoint.save(state, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(loaded["model"]["weight"], state["model"]["weight"]) and loaded["settings"] == state["settings"]
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epoch"] == 4


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save(Trap(), tmp_path / "evil.pt")
    with pytest.raises(UsageError, match="evil.pt is refused: it holds more than tensors"):
        checkpoint.load(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UsageError, match="plain.pt is damaged"):
        checkpoint.load(tmp_path / "plain.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_bit_that_flips_is_harmless_or_said(tmp_path):
    """Whatever zipfile, pickle or torch make of a damaged file."""
    file = tmp_path / "checkpoint.pt"
    checkpoint.save({"weight": torch.arange(3.0), "epoch": 4}, file)
    content, harmless = file.read_bytes(), 0
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            state = checkpoint.load(file)
        except UsageError:
            continue
        assert torch.equal(state["weight"], torch.arange(3.0)) and state["epoch"] == 4
        harmless += 1
    assert 0 < harmless < len(content)


def test_a_failing_write_keeps_the_old_file_and_leaves_no_debris(tmp_path, monkeypatch):
    checkpoint.save({"epoch": 1}, tmp_path / "checkpoint.pt")

    def full(stream):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"epoch": 2}, tmp_path / "checkpoint.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert checkpoint.load(tmp_path / "checkpoint.pt") == {"epoch": 1}


def test_what_differs_is_listed():
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)).state_dict()
    state["2.weight"] = state.pop("1.weight")
    message = "this is of another network: missing: 1.weight; unknown: 2.weight; of another shape: 0.weight 3x2 for 5x2"
    with pytest.raises(UsageError, match=message):
        checkpoint.load_weights(torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Linear(5, 4)), state, "this")
    with pytest.raises(UsageError, match="this holds no weights"):
        checkpoint.load_weights(torch.nn.Linear(2, 5), {"epoch": 1}, "this")


def test_killed_between_two_renames(tmp_path):
    for epoch in (1, 2):
        checkpoint.save_last({"epoch": epoch}, tmp_path)
    (tmp_path / checkpoint.LAST).rename(tmp_path / checkpoint.BEFORE)
    checkpoint.save({"epoch": 3}, tmp_path / checkpoint.NEW)
    assert checkpoint.load_last(tmp_path) == {"epoch": 3}


def test_a_damaged_checkpoint_does_not_replace_the_good_one(tmp_path):
    for epoch in (1, 2):
        checkpoint.save_last({"epoch": epoch}, tmp_path)
    (tmp_path / checkpoint.LAST).write_bytes(b"damaged")
    said = []
    assert checkpoint.load_last(tmp_path, said.append) == {"epoch": 1}
    assert "checkpoint.pt is damaged" in said[0]
    assert (tmp_path / "checkpoint.pt.damaged").read_bytes() == b"damaged"
    checkpoint.save_last({"epoch": 3}, tmp_path)
    (tmp_path / checkpoint.LAST).write_bytes(b"damaged")
    assert checkpoint.load_last(tmp_path, said.append) == {"epoch": 1}


def test_another_rank_renames_what_is_damaged(tmp_path, monkeypatch):
    for epoch in (1, 2):
        checkpoint.save_last({"epoch": epoch}, tmp_path)
    (tmp_path / checkpoint.LAST).write_bytes(b"damaged")
    load = checkpoint.load

    def late(file):
        (tmp_path / checkpoint.LAST).unlink(missing_ok=True)
        return load(file)

    monkeypatch.setattr(checkpoint, "load", late)
    assert checkpoint.load_last(tmp_path, lambda warning: None) == {"epoch": 1}


def test_a_lock_is_held_by_one(tmp_path):
    held = files.lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        files.lock(tmp_path / "lock")
    held.close()
    files.lock(tmp_path / "lock").close()


def test_nothing_is_thrown_away_where_no_checkpoint_can_be_used(tmp_path):
    """A torch that cannot read them, say, must not cost the run."""
    for name in (checkpoint.LAST, checkpoint.BEFORE):
        (tmp_path / name).write_bytes(b"not for this torch")
    with pytest.raises(UsageError, match="there is no other"):
        checkpoint.load_last(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        name: b"not for this torch" for name in (checkpoint.LAST, checkpoint.BEFORE)
    }


def test_a_slow_disk_holds_nobody_up_and_what_it_says_is_heard(tmp_path, monkeypatch):
    free, write, state = threading.Event(), checkpoint.write, {"weight": torch.zeros(3)}
    monkeypatch.setattr(checkpoint, "write", lambda file, fill: free.wait(60) and write(file, fill))
    writer = checkpoint.Writer()
    writer.save_last(state, tmp_path)  # returns although the disk does not
    state["weight"].fill_(1.0)
    assert not (tmp_path / checkpoint.LAST).exists()
    free.set()
    writer.wait()
    assert torch.equal(checkpoint.load_last(tmp_path)["weight"], torch.zeros(3))  # as it was when it was saved

    def full(file, fill):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    writer.save_last(state, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        writer.save_last(state, tmp_path)
    writer.wait()  # told once
