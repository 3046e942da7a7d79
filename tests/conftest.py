"""What the tests share: small folders of real images, and the scripts run as a user runs them."""

import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data import open_pretext
from harness import bundled

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal():
    """Tests may run under nohup or in the background, where signals are ignored, by the processes they start too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def patches():
    """64 real patches of the bundled photographs, 64 px, as Pillow images: four of each class."""
    listed = [path for path, split, _ in bundled.list_patches() if split == "train"]
    chosen = [path for name in sorted(bundled.PHOTOS) for path in [p for p in listed if f"/{name}/" in p][:4]]
    return [Image.fromarray(bundled.load_patch(path, 64)) for path in chosen]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder for --data-dir in which the bundled photographs are decoded already."""
    folder = tmp_path_factory.mktemp("data")
    open_pretext("photos", 32, folder, 128)
    return folder


@pytest.fixture(scope="session")
def short_run(tmp_path_factory, cache):
    """The folder of a short pretext run on the bundled photographs, which was never stopped."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    words = ["--epochs", 3, "--size", 8, "--batch-size", 256, "--data-dir", cache, "--out", folder]
    subprocess.run([sys.executable, ROOT / "train_pretext.py", *map(str, words)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def batch(cache):
    """24 images of the bundled photographs: 24 3 64 64 uint8."""
    images, train, _ = open_pretext("photos", 32, cache, 128)
    return torch.from_numpy(images.pixels[train[:: len(train) // 24][:24]])


@pytest.fixture
def folder(tmp_path, patches):
    """A flat folder of 40 images."""
    root = tmp_path / "images"
    root.mkdir()
    for i, patch in enumerate(patches[:40]):
        patch.save(root / f"{i:02d}.png")
    return root


@pytest.fixture
def labelled(tmp_path, patches):
    """A folder in Image网's shape: classes ant, bee, cow in train/, only bee and cow in val/, unlabelled in unsup/."""
    root = tmp_path / "labelled"
    for i, patch in enumerate(patches[:48]):
        split, name = [
            ("train", "ant"),
            ("train", "bee"),
            ("train", "cow"),
            ("val", "bee"),
            ("val", "cow"),
            ("unsup", ""),
        ][i % 6]
        file = root / split / name / f"{i:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        patch.save(file, quality=95)
    return root


class Finished:
    """How a script ended."""

    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """Run a script of the project in this process, in an empty folder, as `python NAME ARG...` does."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: object) -> Finished:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return Finished(end.value.code, *capsys.readouterr())

    return run
