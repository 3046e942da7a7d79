"""Folders as they are: some of it damaged, empty, nested, or named in other scripts."""

import json
import shutil
from pathlib import Path

import pytest

from data import list_data, open_images

TINY = ("--size", 8, "--data-dir", "decoded")


def opened(root, tmp_path, size=16):
    return open_images(list_data(str(root)), size, tmp_path / "data")


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
    settings = json.loads(Path("run/settings.json").read_text())["settings"]
    assert settings["allow_skipped"] is True  # so that the run can be resumed
    assert script("train_pretext.py", "--resume", "run", "--epochs", 2).status == 0


def test_images_that_lie_elsewhere_count_as_skipped(labelled, tmp_path):
    (labelled / "unlabelled").mkdir()
    for i in range(6):
        shutil.copy(next((labelled / "unsup").iterdir()), labelled / "unlabelled" / f"{i}.jpg")
    (warning,) = opened(labelled, tmp_path).skipped().values()
    assert warning.startswith("6 of 54 images") and "unlabelled/0.jpg (in no class folder" in warning
