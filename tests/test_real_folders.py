"""Folders as they are: some of it damaged, empty, nested, or named in other scripts."""

import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from data import list_data, open_images
from harness.errors import UsageError
from harness.pictures import draw_confusion, draw_sheet, legible

TINY = ("--size", 8, "--data-dir", "decoded")


def opened(root, tmp_path, size=16):
    return open_images(list_data(str(root)), size, tmp_path / "data")


def notes(images):
    return [line for line in images.describe().splitlines() if line.startswith("note: ")]


# ------------------------------------------------------------------------------------------------------ skipped images


def damage(folder, count):
    for file in sorted(folder.rglob("*.*"))[-count:]:
        file.write_bytes(b"damaged")


@pytest.mark.parametrize("count", [3, 4])
def test_a_warning_from_a_tenth_on(script, folder, count):
    for i in range(100):
        (folder / f"{i:02d}.txt").write_text("a caption, which is no image")
    for file in sorted(folder.glob("*.png"))[-count:]:
        file.write_bytes(b"damaged")
    end = script("train_pretext.py", "--data", folder, "--epochs", 1, "--batch-size", 8, *TINY, "--out", "run")
    assert end.status == 0, end.err
    text = f"{count} of 40 images cannot be used, such as {40 - count}.png (no image that Pillow knows)"
    looked = script("inspect_data.py", folder, "--data-dir", "decoded", "--size", 8)
    summary = json.loads(Path("run/summary.json").read_text())
    if count == 4:
        assert end.out.splitlines()[-1] == f"warning      {text}" and summary["warning"] == text
        assert looked.out.splitlines()[-1] == f"warning: {text}"
    else:
        assert "warning" not in summary and "cannot be used" not in end.out + looked.out


def test_half_is_too_much_unless_it_is_allowed(script, folder, labelled):
    damage(folder, 20)
    for file in sorted(labelled.rglob("*.jpg"))[::2]:
        file.write_bytes(b"damaged")
    pretext = ("train_pretext.py", "--data", folder, "--epochs", 1, "--batch-size", 8, *TINY, "--out", "run")
    transfer = ("train_transfer.py", "scratch", "--mode", "knn", "--data", labelled, *TINY, "--out", "knn")
    for words, place in (pretext, folder), (transfer, labelled):
        end = script(*words)
        assert end.status == 2 and end.err.count("\n") == 1 and not Path(words[-1]).exists(), end.err
        half = f"{len(list_data(str(place)).entries) // 2} of {len(list_data(str(place)).entries)} images"
        assert f"--data {place}: {half} cannot be used, such as" in end.err
        assert end.err.endswith("mend them, or go on with --allow-skipped\n")
        end = script(*words, "--allow-skipped")
        assert end.status == 0 and f"warning      {half} cannot be used" in end.out, end.err
    (row,) = json.loads(Path("knn/summary.json").read_text()).values()
    assert row["warning"].startswith("24 of 48 images")
    end = script("inspect_data.py", folder, *TINY)
    assert end.status == 0 and "warning: 20 of 40 images" in end.out
    end = script("debug_overfit.py", "--data", folder, "--n", 4, "--decoder", "dot", "--loss", "mse", *TINY)
    assert "warning: 20 of 40 images" in end.out, end.err
    settings = json.loads(Path("run/settings.json").read_text())["settings"]
    assert settings["allow_skipped"] is True  # so that the run can be resumed
    assert script("train_pretext.py", "--resume", "run", "--epochs", 2).status == 0


def test_photographs_of_a_telephone_count_as_images(folder, tmp_path):
    for i in range(50):
        (folder / f"IMG_{i:04d}.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    with pytest.raises(
        UsageError, match=r"50 of 90 images cannot be used, such as IMG_0000.HEIC \(HEIC; it is read once"
    ):
        opened(folder, tmp_path).warn_of_skipped(allowed=False)


def test_images_that_lie_elsewhere_count_as_skipped(labelled, tmp_path):
    (labelled / "unlabelled").mkdir()
    for i in range(6):
        shutil.copy(next((labelled / "unsup").iterdir()), labelled / "unlabelled" / f"{i}.jpg")
    (warning,) = opened(labelled, tmp_path).warn_of_skipped().values()
    assert warning.startswith("6 of 54 images") and "unlabelled/0.jpg (in no class folder" in warning


# --------------------------------------------------------------------------------------------------------------- sides


def test_icons_among_photographs(folder, tmp_path, patches):
    for i, patch in enumerate(patches[:40]):
        patch.resize((16, 16) if i > 4 else (200, 150)).save(folder / f"{i:02d}.png")
    images = opened(folder, tmp_path, 32)
    (note,) = notes(images)
    assert "all images are stored at 16 px" in note and "5 of 40 in a sample are larger" in note
    assert notes(opened(folder, tmp_path, 32)) == [note]  # from the cache too
    assert not notes(opened(folder, tmp_path, 8))  # nothing is lost at this size
    for i, patch in enumerate(patches[:40]):
        patch.resize((300, 200 + i)).save(folder / f"{i:02d}.png")
    assert not notes(opened(folder, tmp_path, 32))


# ------------------------------------------------------------------------------------------------------------- classes


def test_empty_folders_are_named_and_left_out(script, labelled):
    shutil.rmtree(labelled / "unsup")
    for name in ("unsup", "train/aaa", "train/.hidden", "val/ant"):
        (labelled / name).mkdir()
    note = "note: nothing is in train/aaa/, val/ant/, unsup/"
    words = ("--data", labelled, *TINY)
    end = script("train_pretext.py", *words, "--epochs", 1, "--batch-size", 8, "--out", "run")
    assert end.status == 0 and note in end.out.splitlines() and "3 classes" in end.out, end.err
    end = script("train_transfer.py", "run", "--mode", "knn", "--out", "knn")
    assert end.status == 0 and note in end.out.splitlines(), end.err
    end = script("inspect_data.py", labelled, *TINY)
    assert end.status == 0 and note in end.out.splitlines(), end.err
    for file in (labelled / "train" / "bee").iterdir():  # with images to test on, and none to train on
        file.unlink()
    end = script("train_transfer.py", "scratch", "--mode", "knn", *words, "--out", "other")
    assert end.status == 2 and "no usable image in train/bee/; add some, or remove the class" in end.err


def test_many_empty_folders_are_one_line(labelled, tmp_path):
    for i in range(30):
        (labelled / "train" / f"x{i:02d}").mkdir()
    (note,) = notes(opened(labelled, tmp_path))
    assert note == "note: nothing is in train/x00/, train/x01/, train/x02/, train/x03/, train/x04/ and 25 more"


def test_a_single_class_is_said(script, labelled):
    for split in ("train", "val"):
        for name in ("ant", "cow"):
            shutil.rmtree(labelled / split / name, ignore_errors=True)
    end = script("train_transfer.py", "scratch", "--mode", "knn", "--data", labelled, *TINY, "--out", "knn")
    assert end.status == 0 and "note: bee is the only class, with no other to tell it from" in end.out, end.err
    assert "100.0%" in end.out


def test_nested_classes_are_said(labelled, tmp_path):
    for name in ("cat", "dog"):
        (labelled / "train" / "ant" / name).mkdir()
        shutil.copy(next((labelled / "train/bee").iterdir()), labelled / "train" / "ant" / name / "x.jpg")
    images = opened(labelled, tmp_path)
    assert images.listing.classes == ["ant", "bee", "cow"]
    assert any("train/ant/cat/ is none" in note for note in notes(images))


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_names_that_look_the_same(labelled, tmp_path):
    (labelled / "train" / "bee").rename(labelled / "train" / COMPOSED)
    (labelled / "val" / "bee").rename(labelled / "val" / DECOMPOSED)
    with pytest.raises(UsageError, match="is a class that train/ does not have") as error:
        list_data(str(labelled))
    assert r"it looks like one, but is 'cafe\u0301', and not 'caf\xe9'" in str(error.value)
    (labelled / "train" / "cow").rename(labelled / "train" / DECOMPOSED)
    (labelled / "val" / "cow").rename(labelled / "val" / COMPOSED)
    assert r"note: the classes 'cafe\u0301' and 'caf\xe9' look the same, and are two" in notes(
        opened(labelled, tmp_path)
    )


def test_names_that_the_font_lacks_are_drawn_as_numbers(script, labelled, monkeypatch):
    assert legible(["ant", "网", "Kühe", "قطة", "ねこ cat"]) == ["ant", "class 1", "Kuhe 2", "class 3", "cat 4"]
    labels = torch.arange(3)
    pictures = [
        np.asarray(draw_confusion(labels, labels, names)) for names in (list("网马鱼"), legible(list("网马鱼")))
    ]
    assert (pictures[0] == pictures[1]).all()

    drawn = []
    sheet = lambda images, captions, *rest, **options: drawn.extend(captions) or draw_sheet(images, captions)  # noqa: E731
    monkeypatch.setattr("harness.pictures.draw_sheet", sheet)
    for split in ("train", "val"):
        (labelled / split / "bee").rename(labelled / split / "网")
    words = ("--data", labelled, *TINY)
    for command in (
        ("inspect_data.py", labelled, *TINY),
        ("train_pretext.py", *words, "--epochs", 1, "--batch-size", 8, "--out", "run"),
        ("train_transfer.py", "scratch", "--mode", "knn", *words, "--out", "knn"),
    ):
        drawn.clear()
        end = script(*command)
        text = " ".join(line for caption in drawn for line in caption)
        assert end.status == 0 and text.isascii() and "class 2" in text, (end.err, text)
    assert "网" in Path("knn/predictions.csv").read_text(encoding="utf-8")
    assert "网" in Path("run/before/00000/features/metadata.tsv").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------- a thousand classes


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """ImageNet's shape: 1,000 classes, each with five images to train on and one to test on."""
    root, rng = tmp_path_factory.mktemp("thousand") / "images", np.random.default_rng(0)
    for number in range(1000):
        tint = rng.integers(0, 256, (4, 4, 3), np.uint8)
        for i in range(6):
            file = root / ("val" if i == 5 else "train") / f"n{number:08d}" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(-20, 20, tint.shape)
            Image.fromarray((tint + noise).clip(0, 255).astype(np.uint8)).resize((64, 64)).save(file)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["knn", "linear", "probe"])
def test_a_thousand_classes_in_two_gigabytes_and_two_minutes(thousand, tmp_path, mode):
    words = ["scratch", "--mode", mode, "--data", thousand, "--data-dir", tmp_path / "data", "--out", tmp_path / "run"]
    words = [sys.executable, ROOT / "train_transfer.py", *words]
    with open(tmp_path / "log", "w") as log:
        clock = time.monotonic()
        run = subprocess.Popen([*map(str, words)], stdout=log, stderr=log)
        _, status, used = os.wait4(run.pid, 0)
        seconds = time.monotonic() - clock
    text = (tmp_path / "log").read_text()
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert used.ru_maxrss < 2e6 and seconds < 120, (used.ru_maxrss, seconds)  # kB
    for row in json.loads((tmp_path / "run" / "summary.json").read_text()).values():
        assert row["accuracy_mean"] > 0.1, text  # a hundred times as often as by chance
    assert len((tmp_path / "run" / "predictions.csv").read_text().splitlines()) > 1000
    print(mode, round(used.ru_maxrss / 1e3), "MB", round(seconds), "s")
