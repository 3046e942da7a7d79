import importlib.util
import json
from pathlib import Path

import pytest


def without_lightly(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: find(name, *rest) if name != "lightly" else None
    )


def test_a_table_of_medians_and_a_file_of_all(script, monkeypatch):
    without_lightly(monkeypatch)  # which is no matter, where it was not asked for
    end = script("bench.py", "limit", "limit", "--repeat", 2, "--seconds", 1, "--size", 16)
    assert end.status == 0 and "lightly" not in end.out, end.err
    found = json.loads(Path("bench.json").read_text())["found"]
    assert list(found) == ["limit"] and len(found["limit"]) == 2
    row = next(line for line in end.out.splitlines() if line.startswith("limit"))
    speeds = sorted(run["images_per_second"] for run in found["limit"])
    assert float(row.split()[1]) == pytest.approx(sum(speeds) / 2, abs=0.1) and row.split()[3] == "2"


def test_what_is_no_image_is_left_out(script, folder):
    (folder / "notes.txt").write_text("x")
    end = script("bench.py", "decode", "--data", folder, "--repeat", 1, "--batch-size", 8)
    assert end.status == 0 and "decode / pillow" in end.out, end.err


@pytest.mark.parametrize(
    "args, message",
    [
        (("speed",), "speed is not measured here"),
        (("limit", "--out", "nowhere/bench.json"), "--out nowhere/bench.json: no such folder"),
        (("obvious", "--data", "images"), "--batch-size 64 is more than the 40 images of images"),
        (("decode", "--data", "photos"), "--data is a folder here"),
        (("decode", "--data", "nowhere"), "no such folder"),
        (("growth", "--batch-size", 2048), "--batch-size 2048 is more than the 1000 images that growth begins with"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(script, folder, args, message):
    end = script("bench.py", *args)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1 and not Path("bench.json").exists()


def test_lightly_that_is_asked_for_and_missing_is_said(script, monkeypatch):
    without_lightly(monkeypatch)
    end = script("bench.py", "lightly")
    assert end.status == 2 and "lightly is not installed: pip install" in end.err and end.err.count("\n") == 1


def test_what_training_says_is_handed_on(script):
    end = script("bench.py", "ours", "--batch-size", 4096, "--repeat", 1)
    assert end.status == 1 and "--batch-size 4096 is more than the" in end.err and end.err.count("\n") == 1
