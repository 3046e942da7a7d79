"""Hostile and damaged input, full disks, long runs."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image
from test_download import small_disk  # noqa: F401
from test_resume import same, weights

import data
from data import open_images
from harness import checkpoint
from harness.decode import decode
from models import ConvEncoder


def png_that_claims(width, height):
    """A PNG whose header claims a size that its content does not have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def damaged(i, patches):
    """The i-th of many damaged files: its ending and its content."""
    good = io.BytesIO()
    patches[i % len(patches)].save(good, "PNG" if i % 2 else "JPEG")
    good = good.getvalue()
    kinds = (
        lambda: good[: len(good) // 3],  # truncated
        lambda: b"GIF89b" + good[6:],  # wrong magic
        lambda: b"",  # zero bytes
        lambda: png_that_claims(50_000, 40_000 + i),  # two gigapixels
        lambda: png_that_claims(12_000, 11_000 + i),  # what Pillow would only warn of
        lambda: b"not an image at all\n" * (i + 1),  # wrong extension
        lambda: good[:40] + bytes(len(good) - 40),  # zeroed behind the header
    )
    return (".jpg", ".png", ".gif", ".webp", ".tiff")[i % 5], kinds[i % len(kinds)]()


def test_damaged_images_among_good_ones(tmp_path, patches):
    """None crashes or hangs, memory stays bounded, each is named."""
    root = tmp_path / "images"
    root.mkdir()
    for i, patch in enumerate(patches[:40]):
        patch.save(root / f"good-{i}.png")
    names = []
    for i in range(500):
        ending, content = damaged(i, patches)
        names.append(f"bad-{i}{ending}")
        (root / names[-1]).write_bytes(content)
    words = [ROOT / "inspect_data.py", root, "--data-dir", tmp_path / "data", "--out", tmp_path / "out"]
    program = (
        "import resource, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "import torch, PIL.Image, torch.utils.tensorboard\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import atexit\n"
        "atexit.register(lambda: print('grown', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 'kB'))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    end = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert end.returncode == 0, end.stderr
    assert "40 images" in end.stdout and "500 unreadable" in end.stdout
    assert int(end.stdout.split("grown ")[1].split()[0]) < 300_000

    images = open_images(data.list_data(str(root)), 16, tmp_path / "other")
    assert {path for path, _ in images.listing.skipped} == set(names)
    assert all(why and "\n" not in why for _, why in images.listing.skipped)


def test_a_large_image_is_decoded_at_a_reduced_scale_and_an_absurd_one_is_refused(tmp_path):
    Image.new("RGB", (4000, 3000), "red").save(tmp_path / "large.jpg")
    assert decode(tmp_path / "large.jpg", 32).shape == (32, 32, 3)
    (tmp_path / "absurd.png").write_bytes(png_that_claims(12_000, 11_000))
    with pytest.raises(ValueError, match="12000 x 11000 px; at most 67 million"):
        decode(tmp_path / "absurd.png", 32)


def test_a_disk_that_fills_up_during_the_run(script, cache, short_run, small_disk, monkeypatch):  # noqa: F811
    """A run's folder on a disk too small for its checkpoints: what was trained is saved elsewhere."""
    end = script(
        "train_pretext.py", "--epochs", 3, "--size", 8, "--batch-size", 256, "--data-dir", cache,
        "--out", small_disk / "run",
    )  # fmt: skip
    assert end.status == 1 and end.err.count("\n") == 1
    assert "cannot be written to (No space left on device); the training state is in" in end.err
    assert not list((small_disk / "run").glob("checkpoint*"))  # no debris
    rescued = Path(end.err.split("--resume ")[1].strip())
    assert not rescued.is_relative_to(small_disk)
    end = script("train_pretext.py", "--resume", rescued)
    assert end.status == 0, end.err
    assert same(weights(rescued), weights(short_run))


def test_an_encoder_of_another_shape(script, tmp_path, cache):
    (tmp_path / "start").mkdir()
    state = ConvEncoder().state_dict()
    state["stages.1.0.weight"] = state["stages.1.0.weight"][:3]
    checkpoint.save(state, tmp_path / "start" / "encoder.pt")
    settings = {"settings": {"encoder": "conv", "size": 16, "data": "photos"}}
    (tmp_path / "start" / "settings.json").write_text(json.dumps(settings))
    end = script("train_transfer.py", tmp_path / "start", "--data-dir", cache, "--out", "out")
    assert end.status == 2 and end.err.count("\n") == 1
    assert "of another shape: stages.1.1.weight 64 for 3" in end.err


@pytest.mark.slow
def test_two_hundred_epochs_need_no_more_memory_than_ten(cache, tmp_path):
    """The most resident memory in the last ten epochs within 2 % of that after the first ten, and no more open files.

    Within one step the memory goes up and down by more than that, so every look counts, not one for each epoch.
    """
    words = ["--epochs", 200, "--size", 16, "--batch-size", 512, "--data-dir", cache, "--out", tmp_path / "run"]
    run = subprocess.Popen(
        [sys.executable, ROOT / "train_pretext.py", *map(str, words)], stdout=subprocess.DEVNULL, stderr=-3
    )
    seen, history = {}, tmp_path / "run" / "history.csv"
    while run.poll() is None:
        try:
            epochs = len(history.read_text().splitlines()) - 1
            pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{run.pid}/fd"))
            seen.setdefault(epochs, []).append((pages * resource.getpagesize(), files))
        except OSError:
            pass
        try:
            run.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    assert run.returncode == 0
    early, late = ([look for epoch in epochs for look in seen[epoch]] for epochs in (range(10, 20), range(190, 200)))
    memory = [max(resident for resident, _ in looks) for looks in (early, late)]
    files = [min(count for _, count in looks) for looks in (early, late)]  # without those that are being written
    assert abs(memory[1] / memory[0] - 1) < 0.02, memory
    assert files[1] <= files[0], files
