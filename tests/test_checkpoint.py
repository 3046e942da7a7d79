import pickle

import pytest
import torch

import checkpoint


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
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_failing_write_keeps_the_old_file_and_leaves_no_debris(tmp_path, monkeypatch):
    checkpoint.save({"epoch": 1}, tmp_path / "checkpoint.pt")

    def half(state, stream):
        stream.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"epoch": 2}, tmp_path / "checkpoint.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert checkpoint.load(tmp_path / "checkpoint.pt") == {"epoch": 1}
