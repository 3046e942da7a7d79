import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def photos(tmp_path, patches):
    """Files of images of five classes."""
    files = []
    for i in range(5):
        files.append(tmp_path / f"photo{i}.png")
        patches[4 * i].save(files[-1])
    return files


def lines_of(end, names):
    """{name: the numbers of its line}."""
    found = [line.split() for line in end.out.splitlines() if line.split() and line.split()[0] in map(str, names)]
    return {words[0]: [float(word) for word in words[1:] if "#" not in word] for words in found}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_it_says_how_much_of_each_candidate_is_in_the_mixture(script, short_run, photos, count):
    end = script("unmix.py", short_run, *photos[:count], "--weights", 0.2, 0.8)
    assert end.status == 0, end.err
    table = lines_of(end, photos)
    assert len(table) == count
    network, true, _ = zip(*table.values(), strict=True)
    assert sum(network) == pytest.approx(1, abs=0.02) and true == (0.2, 0.8, *[0.0] * (count - 2))
    assert np.asarray(Image.open("unmix.png")).std() > 20


def test_a_mixture_as_it_is(script, short_run, photos):
    views = [np.asarray(Image.open(file).convert("RGB"), float) for file in photos]
    Image.fromarray((0.3 * views[0] + 0.7 * views[1]).astype(np.uint8)).save("mixed.png")
    end = script("unmix.py", short_run, *photos[:3], "--mixture", "mixed.png", "--out", "answer.jpg")
    assert end.status == 0, end.err
    table = lines_of(end, photos)
    assert all(len(row) == 2 for row in table.values()) and Path("answer.jpg").exists()  # the truth is not known
    pixels = [row[1] for row in table.values()]
    assert pixels == pytest.approx([0.3, 0.7, 0.0], abs=0.03)  # the very pixels: least squares solves it


def test_the_same_seed_mixes_the_same_views(script, short_run, photos):
    outs = [script("unmix.py", short_run, *photos[:3], "--seed", seed).out for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    "case, message",
    [
        ("one image", "one image is given; give two or more"),
        ("no file", "nowhere.jpg cannot be read: No such file"),
        ("no image", "notes.txt cannot be read: no image"),
        ("sum", "--weights 0.3 0.3: give two or more numbers between 0 and 1 that sum to 1"),
        ("one weight", "--weights 1: give two or more"),
        ("too many", "--weights has 3 numbers for 2 images"),
        ("both", "--weights is of mixtures that are made here"),
        ("no run", "is no folder; give that of a run"),
        ("no checkpoint", "holds no checkpoint.pt"),
        ("a list", "was no run of train_pretext.py"),
        ("an unset variable", "argument RUN: it is empty"),
        ("rotate", "learnt --task rotate, so it cannot tell weights"),
        ("scale", "learnt --task scale, so it cannot tell weights"),
        ("ending", "has no ending of a picture"),
        ("nowhere to write", "--out nowhere/x.png cannot be used"),
        ("over an image", "is one of the images that are given; name another file"),
        ("over the mixture", "--out ./mixed.png is one of the images"),
    ],
)
def test_bad_input_is_one_line(script, short_run, photos, tmp_path, case, message):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    torch.save([], tmp_path / "list" / "checkpoint.pt")
    two = photos[:2]
    if case in ("rotate", "scale"):
        state = torch.load(short_run / "checkpoint.pt", weights_only=True)
        state["settings"] |= {"task": case, "candidates": {"rotate": None, "scale": 3}[case]}
        (tmp_path / case).mkdir()
        torch.save(state, tmp_path / case / "checkpoint.pt")
    args = {
        "one image": (short_run, two[0]),
        "no file": (short_run, two[0], "nowhere.jpg"),
        "no image": (short_run, two[0], "notes.txt"),
        "sum": (short_run, *two, "--weights", 0.3, 0.3),
        "one weight": (short_run, *two, "--weights", 1),
        "too many": (short_run, *two, "--weights", 0.3, 0.3, 0.4),
        "both": (short_run, *two, "--mixture", two[0], "--weights", 0.5, 0.5),
        "no run": ("nowhere", *two),
        "no checkpoint": ("empty", *two),
        "a list": ("list", *two),
        "an unset variable": ("", *two),
        "rotate": ("rotate", *two),
        "scale": ("scale", *two),
        "ending": (short_run, *two, "--out", "picture"),
        "nowhere to write": (short_run, *two, "--out", "nowhere/x.png"),
        "over an image": (short_run, *two, "--out", two[1]),
        "over the mixture": (short_run, *two, "--mixture", "mixed.png", "--out", "./mixed.png"),
    }[case]
    end = script("unmix.py", *args)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1, end.err
    assert not Path("unmix.png").exists()


def test_the_answer_is_that_of_the_runs_settings(script, short_run, photos, tmp_path):
    """Such as the activation, and the very pixels without views."""
    end = script("unmix.py", short_run, *photos[:3])
    state = torch.load(short_run / "checkpoint.pt", weights_only=True)
    state["settings"] |= {"activation": "sigmoid", "views": False}
    (tmp_path / "other").mkdir()
    torch.save(state, tmp_path / "other" / "checkpoint.pt")
    other = script("unmix.py", "other", *photos[:3])
    assert end.status == other.status == 0, other.err
    assert lines_of(end, photos) != lines_of(other, photos)
    pixels = [row[2] for row in lines_of(other, photos).values()]
    assert pixels == pytest.approx([0.3, 0.7, 0.0], abs=0.01)
    assert json.loads((short_run / "settings.json").read_text())["settings"]["views"] is True
