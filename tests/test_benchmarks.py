import argparse
import json
import shutil
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import search  # noqa: E402


def result(name, seed, right, epochs=100):
    """A result whose every mode got `right`, one string of 0 and 1 for each run, on both halves."""
    found = {half: {way: right for way in search.WAYS} for half in search.HALVES}
    modes = {mode: {"seconds": 1.0, **found} for mode in search.MODES}
    return {"name": name, "epochs": epochs, "seed": seed, "encodes": 2, "seconds": 9.0, "modes": modes}


def test_halves_and_runs_are_told_apart(tmp_path):
    file = tmp_path / "predictions.csv"
    # MD5 of "a.JPEG" is odd, of "c.JPEG" even
    rows = ["val/x/a.JPEG,x,0,x,x,y", "val/x/c.JPEG,x,0,y,x,x", "val/x/a.JPEG,x,1,y,y,y", "val/x/c.JPEG,x,1,x,x,x"]
    file.write_text("\n".join(["path,class,seed," + ",".join(search.WAYS), *rows]))
    found = search.read_right(file)
    assert found["report"]["accuracy"] == ["1", "0"] and found["choose"]["accuracy"] == ["0", "1"]
    assert found["choose"]["accuracy_val_classes"] == ["1", "1"]


def test_figures_are_means_over_runs_and_images():
    assert search.figure(result("scratch", 0, ["1100", "1000"]), "knn", "report", "accuracy") == 0.375


def test_paired_differences():
    ours, theirs = result("symmetric", 0, ["1111"]), result("scratch", 0, ["1100"])
    over = ("linear", "report", "accuracy_val_classes")
    assert search.difference([ours], [ours], *over) == (0.0, 0.0)
    mean, half_width = search.difference([ours], [theirs], *over)
    # Student's t for four images, whose differences 0, 0, 1, 1 have a variance of 1/3
    assert mean == 0.5 and half_width == pytest.approx(3.1824 * (1 / 3 / 4) ** 0.5, rel=1e-4)
    # Seeds that disagree widen the interval. The variance of the images' mean, which are -.5, -.5, 1 and 1 over the
    # seeds, is .75 / 4 with 3 degrees of freedom, and that of the seeds', .5 and 0, is .125 / 2 with 1.
    again = result("symmetric", 1, ["0011"])
    mean, half_width = search.difference([ours, again], [theirs, theirs], *over)
    images, seeds = 0.75 / 4, 0.125 / 2
    freedom = (images + seeds) ** 2 / (images**2 / 3 + seeds**2 / 1)
    assert mean == 0.25 and freedom == pytest.approx(4)
    assert half_width == pytest.approx(2.7764 * (images + seeds) ** 0.5, rel=1e-4)


def test_tables_are_rewritten_between_their_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "ROOT", tmp_path)
    monkeypatch.setattr(search, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["search.py", "--table"])
    for name in ("RESULTS.md", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    search.RESULTS.mkdir()
    for seed in range(3):
        rows = [(search.OURS, "1110", 30), (search.OURS, "1110", 100), ("scratch", "1000", 0), ("swav", "0000", 45)]
        for name, right, epochs in rows:
            file = search.RESULTS / f"{name}-{epochs}-{seed}.json"
            file.write_text(json.dumps(result(name, seed, [right], epochs)))
    del (partly := result("scratch", 0, ["1000"], 0))["modes"]["finetune-x4"]
    (search.RESULTS / "scratch-0-0.json").write_text(json.dumps(partly))
    (search.RESULTS / "swav-30-0.json").write_text(json.dumps(result("swav", 0, ["0000"], 30)))
    search.main()
    text = (tmp_path / "RESULTS.md").read_text()
    searched, compared = text.split("## The comparison")
    for part, tables in ((searched, 1), (compared, 3)):  # of differences: the comparison has all three figures
        assert part.count(f"| {search.OURS}: `") == 2 and "75.0 ± 0.0 (75.0, 75.0)" in part
        # What needs no pretext is compared with every number of epochs, and the others with as many.
        assert "| scratch | 30 | 3 | +50.0 ±" in part and "| scratch | 100 | 3 | +50.0 ±" in part
        assert "| swav | 30 | 1 | +75.0 ±" in part and part.count("| swav | ") == tables
        assert part.count(", 2 of the seeds |") == 1 + 2 * tables  # a figure and two differences a table
    assert searched.count("| swav: `") == 2 and compared.count("| swav: `") == 1  # 45 epochs are not of the comparison
    search.main()
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_a_row_is_done_once_and_what_it_lacks_later(tmp_path, labelled, monkeypatch):
    monkeypatch.setattr(search, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(search, "MODES", {"linear": "--mode linear --batch-size 8"})
    args = argparse.Namespace(data=labelled, epochs=1, runs=tmp_path / "runs")
    monkeypatch.setitem(search.RECIPES, "rotation", (1, "train_pretext.py --task rotate --size 16 --batch-size 8", ""))
    search.experiment(args, "rotation", 3)
    file = tmp_path / "results" / "rotation-1-3.json"
    first = json.loads(file.read_text())
    assert first["command"] == "python train_pretext.py --task rotate --size 16 --batch-size 8 --epochs 1 --seed 3"
    assert first["modes"]["linear"]["command"] == "python train_transfer.py RUN --mode linear --batch-size 8 --seed 3"
    assert search.figure(first, "linear", "choose", "accuracy") <= 1
    time = file.stat().st_mtime_ns
    search.experiment(args, "rotation", 3)
    assert file.stat().st_mtime_ns == time
    monkeypatch.setattr(search, "MODES", {"linear": "another", "knn": "--mode knn"})
    search.experiment(args, "rotation", 3)
    second = json.loads(file.read_text())
    assert second["modes"]["linear"] == first["modes"]["linear"] and "knn" in second["modes"]
