"""Images of more than 8 bits: one scale for all of a data set, kept with the run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import list_data, open_images
from harness import cache
from harness import decode as decode_module
from harness.decode import Damaged, decode
from models import build_encoder


def save(file, values, kind):
    """Values H W as a 16-bit, 32-bit or floating-point image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"16-bit": np.uint16, "32-bit": np.int32, "floating-point": np.float32}
    Image.fromarray(np.asarray(values).astype(kinds[kind])).save(file)
    return file


@pytest.fixture
def greys(patches):
    """Pictures H W from 0 to 255."""
    greys = [np.asarray(patch.convert("L"), float) for patch in patches]
    ends = [np.percentile(grey, (1, 99)) for grey in greys]
    return [((grey - low) * 255 / (high - low)).clip(0, 255) for grey, (low, high) in zip(greys, ends, strict=True)]


def off(pixels, grey):
    """Mean difference of an image H H 3 from a grey one in [0, 255]."""
    expected = np.asarray(
        Image.fromarray(np.asarray(grey, np.uint8)).resize(pixels.shape[:2], Image.Resampling.BICUBIC)
    )
    return np.abs(pixels.astype(float) - expected[..., None]).mean()


SCALES = {  # how 8-bit greys are stored: (ending, kind, values)
    "0 to 1": (".tif", "floating-point", lambda grey: grey / 255),
    "0 to 3000": (".tif", "floating-point", lambda grey: grey / 255 * 3000),
    "below zero": (".tif", "floating-point", lambda grey: grey - 1000),
    "12 bits, PNG": (".png", "16-bit", lambda grey: grey * 16),
    "12 bits, TIFF": (".tif", "16-bit", lambda grey: grey * 16),
    "16 bits, PNG": (".png", "16-bit", lambda grey: grey * 257),
    "16 bits, TIFF": (".tif", "16-bit", lambda grey: grey * 257),
    "signed": (".tif", "32-bit", lambda grey: grey * 100 - 10_000),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("outliers", [0, 1])
def test_the_picture_at_any_scale_with_or_without_an_outlier(tmp_path, greys, scale, outliers):
    ending, kind, values = SCALES[scale]
    values = values(greys[0])
    for place, factor in ((0, 1.004), (1, 3), (2, 1000))[: 3 * outliers]:
        values[place, place] = np.minimum(values.max() * factor, 65535 if kind == "16-bit" else 1e9)
    assert off(decode(save(tmp_path / f"image{ending}", values, kind), 64), greys[0]) < 6


def test_one_scale_for_all_images_of_a_kind(tmp_path, greys, patches):
    """Half as bright stays half as bright, and neither a hot pixel nor an odd image makes the others black."""
    for i, grey in enumerate(greys[:40]):
        values = grey * 16 / (2 if i % 2 else 1)
        values[i, i] = 65535
        save(tmp_path / "images" / f"{i:02d}.png", values, "16-bit")
    save(tmp_path / "images" / "odd.png", greys[0] * 257, "16-bit")
    patches[0].save(tmp_path / "images" / "plain.png")
    images = open_images(list_data(str(tmp_path / "images")), 32, tmp_path / "data")
    for i in range(40):
        assert off(images.pixels[i].transpose(1, 2, 0), greys[i] / (2 if i % 2 else 1)) < 6, i
    ((low, high),) = images.listing.ranges["16-bit"]
    assert 0 <= low < 300 and 3500 < high < 4096
    assert f"16-bit images: {low:,.0f} to {high:,.0f} shown as black to white" in images.describe().splitlines()
    assert (images.pixels[41].transpose(1, 2, 0) == np.asarray(patches[0])).all()


def test_scales_that_many_images_share_are_kept_apart(tmp_path, greys):
    """As a folder of 12 bits and 16 bits, or of floats up to 1 and up to 3000."""
    for name, (ending, kind, values) in SCALES.items():
        if name.startswith(("12", "16", "0")):
            for i in range(3):
                save(tmp_path / "images" / f"{name} {i}{ending}", values(greys[i]), kind)
    images = open_images(list_data(str(tmp_path / "images")), 32, tmp_path / "data")
    for entry, pixels in zip(images.listing.entries, images.pixels, strict=True):
        assert off(pixels.transpose(1, 2, 0), greys[int(entry.path[-5])]) < 6, entry.path
    assert sum("shown as black" in line and " or " in line for line in images.describe().splitlines()) == 2


def test_what_was_not_measured(tmp_path, greys):
    values = greys[0] / 255
    values[:20], values[0, 0], values[0, 1] = np.nan, np.inf, -3.4e38
    pixels = decode(save(tmp_path / "some.tif", values, "floating-point"), 64)
    assert off(pixels[24:64, :40], greys[0][24:64, :40]) < 8 and (pixels[4:16] == 0).all()
    with pytest.raises(Damaged, match="no pixel has a value"):
        decode(save(tmp_path / "none.tif", np.full((64, 64), np.nan), "floating-point"), 64)
    assert (decode(save(tmp_path / "zero.tif", np.zeros((64, 64)), "floating-point"), 64) == 0).all()


def test_plain_images_cost_nothing_and_a_scale_is_found_once(folder, tmp_path, monkeypatch, greys):
    find, asked = decode_module._find_ranges, []
    monkeypatch.setattr(decode_module, "_find_ranges", lambda files, kind: asked.append(kind) or find(files, kind))
    plain = open_images(list_data(str(folder)), 32, tmp_path / "data")
    assert not asked and "shown as black" not in plain.describe() and "scale beyond 8 bits" not in plain.identity()
    for i in range(30):
        save(folder / f"deep{i}.png", greys[i] * 16, "16-bit")
    found = [open_images(list_data(str(folder)), 32, tmp_path / "data") for _ in range(2)]
    assert asked == ["16-bit"] and found[0].describe() == found[1].describe()
    assert found[0].listing.ranges == found[1].listing.ranges


@pytest.fixture
def deep(tmp_path, greys):
    """Two labelled folders of the same pictures, of which the second is three times as bright."""
    for name, factor in ("first", 16), ("second", 48):
        for i, grey in enumerate(greys[:48]):
            split = ("train/ant", "train/bee", "val/bee")[i % 3]
            save(tmp_path / name / split / f"{i:02d}.png", grey * factor, "16-bit")
    return tmp_path / "first", tmp_path / "second"


def test_transfer_and_unmix_show_what_pretraining_saw(script, deep, greys, monkeypatch):
    end = script("train_pretext.py", "--data", deep[0], "--batch-size", 8, "--size", 16, "--epochs", 1, "--out", "run")
    assert end.status == 0 and "16-bit images: 0 to 4,095 shown as black to white" in end.out.splitlines(), end.err
    assert json.loads(Path("run/settings.json").read_text())["settings"]["ranges"] == {"16-bit": [[0.0, 4095.0]]}
    build, built = cache.build, []
    monkeypatch.setattr(cache, "build", lambda file, *rest: built.append(file) or build(file, *rest))
    for data in (deep[0], deep[1], deep[1]):
        words = ("run", "scratch", "--mode", "knn", "--data", data, "--out", "knn", "--overwrite")
        end = script("train_transfer.py", *words)
        assert end.status == 0 and not end.err, end.err
        assert "16-bit images: 0 to 4,095 shown as black to white" in end.out.splitlines()
    assert len(built) == 2  # both are of the second folder: with its own scale, and with that of the run
    pixels = np.memmap(built[1], np.uint8, "r", shape=(48, 3, 32, 32))
    bright = np.minimum(greys[0] * 3, 255)  # three times as bright, as it would have looked in pretraining
    assert off(pixels[0].transpose(1, 2, 0), bright) < 12

    seen, blank = [], Image.new("L", (1, 1))
    monkeypatch.setattr("harness.pictures.draw_mixtures", lambda mixtures, asked, *rest: seen.append(asked) or blank)
    end = script("unmix.py", "run", *sorted(deep[1].rglob("*.png"))[:2])
    assert end.status == 0 and "16-bit images: 0 to 4,095 shown as black to white" in end.out.splitlines(), end.err
    assert off(seen[0][0, 0].permute(1, 2, 0).numpy(), bright) < 12


def test_a_start_of_another_scale_is_named(script, deep):
    """And one that saw no such images, or comes from an older version, which did not say."""
    torch.manual_seed(0)
    for name, ranges in ("same", {"16-bit": [[0.0, 4095.0]]}), ("other", {"16-bit": [[0.0, 1023.0]]}), ("old", None):
        Path(name).mkdir()
        torch.save(build_encoder("conv").state_dict(), f"{name}/encoder.pt")
        settings = {"encoder": "conv", "size": 16, "data": str(deep[0])} | (
            {} if ranges is None else {"ranges": ranges}
        )
        Path(name, "settings.json").write_text(json.dumps({"settings": settings}))
    end = script("train_transfer.py", "same", "other", "old", "scratch", "--mode", "knn", "--out", "knn")
    note = "note: {} learnt from 16-bit images at another scale, or from none\n"
    assert end.status == 0 and end.err == note.format("other") + note.format("old")


def test_a_run_keeps_its_scale_and_an_older_one_is_told(script, deep):
    words = ("--data", deep[0], "--batch-size", 8, "--size", 16)
    assert script("train_pretext.py", *words, "--epochs", 1, "--out", "run").status == 0
    shutil.copytree("run", "old")
    for i, file in enumerate(deep[1].rglob("*.png")):  # moved, and some of it was made brighter on the way
        if i % 2:
            shutil.copy(deep[0] / file.relative_to(deep[1]), file)
    before = torch.load("run/checkpoint.pt", weights_only=True)["data"]
    end = script("train_pretext.py", "--resume", "run", "--epochs", 2, "--data", deep[1])
    assert end.status == 0, end.err
    assert torch.load("run/checkpoint.pt", weights_only=True)["data"] == before
    state = torch.load("old/checkpoint.pt", weights_only=True)
    del state["settings"]["ranges"], state["data"]["scale beyond 8 bits"]
    torch.save(state, "old/checkpoint.pt")
    end = script("train_pretext.py", "--resume", "old", "--epochs", 2)
    assert end.status == 2 and end.err.count("\n") == 1
    assert "scale beyond 8 bits is not as it was: it was None, and is {'16-bit': " in end.err
