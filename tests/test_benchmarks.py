import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import search  # noqa: E402

from harness.errors import RunError  # noqa: E402


def result(name, seed, right, epochs=100):
    """A result whose every mode got `right`, one string of 0 and 1 for each run, on both halves."""
    found = {half: {way: right for way in search.WAYS} for half in search.HALVES}
    modes = {mode: {"seconds": 1.0, **found} for mode in search.MODES}
    return {"name": name, "epochs": epochs, "seed": seed, "encodes": 2, "seconds": 9.0, "modes": modes}


def test_halves_and_runs_are_told_apart(tmp_path):
    file = tmp_path / "predictions.csv"
    # MD5 of "a.JPEG" is odd, of "c.JPEG" even
    rows = ["val/x/a.JPEG,x,0,x,x,y", "val/x/c.JPEG,x,0,y,x,x", "val/x/a.JPEG,x,1,y,y,y", "val/x/c.JPEG,x,1,x,x,x"]
    file.write_text("\n".join(["path,class,seed,accuracy,accuracy_val_classes,accuracy_uncorrected", *rows]))
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
    shutil.copy(ROOT / "RESULTS.md", tmp_path)
    readme = "<!-- search -->\nnothing\n<!-- /search -->\n<!-- comparison -->\nnothing\n<!-- /comparison -->\n"
    (tmp_path / "README.md").write_text(readme)
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
    tables = [
        text.split(f"<!-- {name} -->\n")[1].split("\n<!-- /")[0].splitlines() for name in ("comparison", "search")
    ]
    compared, searched = ([[cell.strip() for cell in line.split("|")[1:-1]] for line in table] for table in tables)
    titles = compared[0]
    assert searched[0] == [*titles, "lesson"]
    for table, figures in ((compared, 3), (searched, 1)):  # with a spread and a difference
        rows = {(row[0], row[2]): dict(zip(titles, row, strict=False)) for row in table[2:]}
        swav = [("swav", "30")] if table is compared else [("swav", "30"), ("swav", "45")]  # 45: not compared
        assert list(rows) == [("scratch", "0"), (search.OURS, "30"), *swav, (search.OURS, "100")]
        plain = "<br>".join(["75.0 ± 0.0"] * 3) if table is compared else "75.0 ± 0.0, 75.0, 75.0"
        assert rows[search.OURS, "30"]["knn"] == rows[search.OURS, "100"]["knn"] == plain
        # What needs no pretext is compared with every number of epochs, and the others with as many.
        scratch = rows["scratch", "0"]
        assert "differences from 30 / 100 epochs" in scratch["options"]
        assert scratch["knn"].count("(-50.0 ± ") == scratch["knn"].count(" / -50.0 ± ") == figures
        assert rows["swav", "30"]["seeds"] == "1" and rows["swav", "30"]["knn"].count("0.0 (-75.0 ± ") == figures
        assert scratch["finetune-x4"].count(" of 2 seeds") == 3 * figures  # a figure and two differences
        assert sum(" of 2 seeds" in cell for row in table for cell in row) == 1
    assert "(" not in rows["swav", "45"]["knn"]
    assert (tmp_path / "README.md").read_text() == readme
    search.main()
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_the_tables_are_those_of_the_results(tmp_path, monkeypatch):
    text = (ROOT / "RESULTS.md").read_text()
    (tmp_path / "RESULTS.md").write_text(text.replace("| first |", "| last |"))
    monkeypatch.setattr(search, "ROOT", tmp_path)
    search.write_tables()
    assert (tmp_path / "RESULTS.md").read_text() == text


def test_every_recipe_has_a_result():
    assert {file.name.rsplit("-", 2)[0] for file in search.RESULTS.glob("*.json")} == set(search.RECIPES)


def test_options_are_those_that_differ_from_the_default():
    options = {name: recipe.options for name, recipe in search.RECIPES.items()}
    assert options["scratch"] == "no pretext" and options[search.OURS] == "`--no-few`, the default then"
    assert options["contrast"] == "`--decoder cosine --contrast`"
    assert options["simclr-crop-15"] == "`peers.py simclr --crop 0.15`"
    assert options["ridge-pure-50"] == "`--pure 0.5` at 2309333"


@pytest.mark.parametrize(
    "args, message",
    [
        (("ridge-pure-50", "--data", "x"), "ridge-pure-50 cannot be run any more: --pure is gone; commit 2309333"),
        (("first", "momentum", "--data", "x"), "momentum cannot be run any more: --momentum is gone"),
        (("regions", "--data", "x"), "regions cannot be run any more: --regions is gone"),
        (("three", "--data", "x"), "three is no recipe: use scratch, rotation, first, ridge-batch"),
        (("first",), "--data FOLDER is needed"),
    ],
)
def test_what_cannot_be_run_is_one_line(script, args, message):
    end = script("benchmarks/search.py", *args)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_by_default_every_recipe_is_run_that_can_be(monkeypatch):
    called = []
    monkeypatch.setattr(search, "experiment", lambda args, name, seed: called.append((args.data_dir, name, seed)))
    monkeypatch.setattr(search, "write_tables", lambda: None)
    monkeypatch.setattr(sys, "argv", ["search.py", "--data", "x", "--workers", "1", "--seeds", "3", "4"])
    search.main()
    names = [name for name, recipe in search.RECIPES.items() if recipe.runnable]
    assert called == [("data", name, seed) for seed in (3, 4) for name in names]
    assert "first" in names and "momentum" not in names


def test_a_row_is_done_once_and_what_it_lacks_later(tmp_path, labelled, monkeypatch):
    monkeypatch.setattr(search, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(search, "MODES", {"linear": "--mode linear --batch-size 8"})
    args = argparse.Namespace(data=labelled, data_dir=tmp_path / "decoded", epochs=1, runs=tmp_path / "runs")
    recipe = search.Recipe(1, "train_pretext.py --task rotate --size 16 --batch-size 8")
    monkeypatch.setitem(search.RECIPES, "rotation", recipe)
    search.experiment(args, "rotation", 3)
    file = tmp_path / "results" / "rotation-1-3.json"
    first = json.loads(file.read_text())
    command = "python train_pretext.py --task rotate --size 16 --batch-size 8 --epochs 1 --seed 3 --amp bf16"
    assert first["command"] == command
    command = "python train_transfer.py RUN --mode linear --batch-size 8 --seed 3 --amp bf16"
    assert first["modes"]["linear"]["command"] == command
    assert (tmp_path / "decoded" / "cache").is_dir()  # --data-dir
    assert sorted(path.name for path in args.runs.iterdir()) == ["rotation-1-3"]
    assert search.figure(first, "linear", "choose", "accuracy") <= 1
    time = file.stat().st_mtime_ns
    search.experiment(args, "rotation", 3)
    assert file.stat().st_mtime_ns == time
    monkeypatch.setattr(search, "MODES", {"linear": "another", "knn": "--mode knn"})
    search.experiment(args, "rotation", 3)
    second = json.loads(file.read_text())
    assert second["modes"]["linear"] == first["modes"]["linear"] and "knn" in second["modes"]


def test_a_failed_run_is_one_line(tmp_path):
    with pytest.raises(
        RunError, match=r"--size 2 failed: train_pretext.py: .*'2' is not a whole number.* \(see .*log\)"
    ):
        search.call(["train_pretext.py", "--size", 2], tmp_path / "log")
