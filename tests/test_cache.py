"""The file of decoded images: where it cannot be written, and what its index knows."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from data import list_data, open_images


def opened(root, tmp_path, size=32):
    return open_images(list_data(str(root)), size, tmp_path / "data")


class Refusing:
    """A file of which a write fails."""

    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def write(self, content):
        raise OSError(self.number, os.strerror(self.number))

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()


@pytest.mark.parametrize("where, number", [
    ("open", errno.EACCES), ("open", errno.EROFS), ("replace", errno.EPERM), ("write", errno.EIO),
])  # fmt: skip
def test_a_cache_that_cannot_be_written(script, folder, monkeypatch, where, number):
    import builtins

    real = builtins.open

    def refuse(name, *args, **options):
        if not str(name).endswith(".part") or ".cache" not in str(name):
            return real(name, *args, **options)
        if where == "write":
            return Refusing(real(name, *args, **options), number)
        raise OSError(number, os.strerror(number), str(name))

    def refuse_to_rename(name, *args):
        raise OSError(number, os.strerror(number), str(name))

    if where == "replace":
        monkeypatch.setattr(os, "replace", refuse_to_rename)
    else:
        monkeypatch.setattr(builtins, "open", refuse)
    end = script("train_pretext.py", "--data", folder, "--batch-size", 8, "--data-dir", "here", "--out", "run")
    assert end.status == 2 and end.err.count("\n") == 1
    assert f"--data-dir here cannot be used ({os.strerror(number)}); give another folder" in end.err
    assert not list(Path("here/cache").iterdir()) and not Path("run").exists()


def test_an_image_on_a_failing_drive_is_named(script, folder, monkeypatch):
    """Also if the system's error has no name; the folder of the cache is not to blame."""
    read = Path.read_bytes

    def lost(file):
        if file.name == "07.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", lost)
    end = script("train_pretext.py", "--data", folder, "--batch-size", 8, "--data-dir", "here", "--out", "run")
    assert end.status == 1 and end.err.count("\n") == 1 and "07.png: Input/output error" in end.err


def test_equal_images_are_counted(labelled, tmp_path):
    assert "copies" not in opened(labelled, tmp_path).describe()
    bee, cow = sorted((labelled / "train/bee").iterdir()), sorted((labelled / "val/cow").iterdir())
    shutil.copy(bee[0], labelled / "val/cow/copy.jpg")
    for name in ("again", "and again"):
        shutil.copy(cow[1], labelled / "val/cow" / f"{name}.jpg")
    for _ in range(2):  # from the cache too
        images = opened(labelled, tmp_path)
        note = "note: copies by their pixels: 3; images in more than one split: 1"
        assert note in images.describe().splitlines()
        groups = [[images.listing.entries[row].path for row in rows] for rows in images.same]
        assert sorted(map(len, groups)) == [2, 3] and [f"train/bee/{bee[0].name}", "val/cow/copy.jpg"] in groups


def test_what_another_process_leaves(labelled, tmp_path):
    """What is left of a build by another process may go away while it is looked at."""
    (tmp_path / "data" / "cache").mkdir(parents=True)
    file = next(iter(opened(labelled, tmp_path).skipped_file.parent.glob("*.cache")))
    file.unlink()
    (file.parent / f"{file.name}.123.part").symlink_to("nowhere")
    assert len(opened(labelled, tmp_path).labels) == 48
