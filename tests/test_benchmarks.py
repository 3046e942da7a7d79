import argparse
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import search  # noqa: E402

from harness.errors import RunError, UsageError  # noqa: E402


def result(name, seed, right, epochs=100, titles=tuple(search.FIGURES)):
    """A result whose every figure is `right`, strings of 0 and 1, one for each run, on both halves."""
    found = {}
    for judge, way, name_of in (search.FIGURES[title] for title in titles):
        halves = {half: [search.pack([bit == "1" for bit in run]) for run in right] for half in search.HALVES}
        found.setdefault(judge, {}).setdefault(way, {})[name_of] = halves
    return {"name": name, "widths": [8, 16], "epochs": epochs, "seed": seed, "encodes": 2, "right": found}


@pytest.mark.parametrize("bits", ["1", "0", "0010", "0000000000001", "1" * 99])
def test_what_is_packed_is_unpacked(bits):
    right = [bit == "1" for bit in bits]
    assert search.unpack(search.pack(right)) == right and len(search.pack(right)) < len(bits) / 4 + 6


def test_halves_runs_and_rows_are_told_apart(tmp_path):
    file = tmp_path / "predictions.csv"
    # MD5 of "a.JPEG" is odd, of "c.JPEG" even
    rows = ["val/x/a.JPEG,x,0,x,x,y", "val/x/c.JPEG,x,0,y,x,x", "val/x/a.JPEG,x,1,y,y,y", "val/x/c.JPEG,x,1,x,x,x"]
    titles = "start,path,class,seed,accuracy,accuracy_val_classes,accuracy_uncorrected"
    file.write_text(
        "\n".join([titles, *(f'"a, b, knn",{row}' for row in rows), *(f'"a, b, ridge",{row}' for row in rows)])
    )
    found = search.read_right(file, "probe")
    assert set(found) == {"knn", "ridge"} and set(found["knn"]) == {"accuracy"}  # as far as a column needs it
    assert found["ridge"]["accuracy"] == {"report": ["1:1", "1:0"], "choose": ["1:0", "1:1"]}
    found = search.read_right(file, "finetune")
    assert set(found["finetune"]) == {"accuracy", "accuracy_val_classes", "accuracy_uncorrected"}


def test_figures_are_means_over_runs_and_images():
    assert search.figure(result("scratch", 0, ["1100", "1000"]), "kNN", "report") == 0.375


def test_paired_differences():
    ours, theirs = result("unmix", 0, ["1111"]), result("scratch", 0, ["1100"])
    over = ("linear", "report")
    assert search.difference([ours], [ours], *over) == (0.0, 0.0)
    mean, half_width = search.difference([ours], [theirs], *over)
    # Student's t for four images, whose differences 0, 0, 1, 1 have a variance of 1/3
    assert mean == 0.5 and half_width == pytest.approx(3.1824 * (1 / 3 / 4) ** 0.5, rel=1e-4)
    # Seeds that disagree widen the interval. The variance of the images' mean, which are -.5, -.5, 1 and 1 over the
    # seeds, is .75 / 4 with 3 degrees of freedom, and that of the seeds', .5 and 0, is .125 / 2 with 1.
    again = result("unmix", 1, ["0011"])
    mean, half_width = search.difference([ours, again], [theirs, theirs], *over)
    images, seeds = 0.75 / 4, 0.125 / 2
    freedom = (images + seeds) ** 2 / (images**2 / 3 + seeds**2 / 1)
    assert mean == 0.25 and freedom == pytest.approx(4)
    assert half_width == pytest.approx(2.7764 * (images + seeds) ** 0.5, rel=1e-4)


def test_tables_are_rewritten_between_their_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "ROOT", tmp_path)
    monkeypatch.setattr(search, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(search, "TIMED", tmp_path / "seconds.json")
    monkeypatch.setattr(search, "WIDTHS", (8, 16))  # as if this was the default encoder
    monkeypatch.setattr(sys, "argv", ["search.py", "--table"])
    marks = (
        "before\n<!-- search -->\nold\n<!-- /search -->\nbetween\n<!-- comparison -->\n<!-- /comparison -->\n"
        "<!-- race -->\n<!-- /race -->\nafter\n"
    )
    (tmp_path / "RESULTS.md").write_text(marks)
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    search.RESULTS.mkdir()
    rows = [("unmix", "1110", 30, 3), ("unmix", "1110", 100, 3), ("scratch", "1000", 0, 1), ("swav", "0000", 30, 2)]
    for name, right, epochs, seeds in rows:
        for seed in range(seeds):
            found = result(name, seed, [right], epochs, list(search.FIGURES)[: 2 if name == "swav" and seed else 4])
            (search.RESULTS / f"{name}-16-{epochs}-{seed}.json").write_text(json.dumps(found))
    search.main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("before") and "between" in text and text.endswith("after\n") and "old" not in text
    tables = {}
    for name in ("search", "comparison"):
        lines = text.split(f"<!-- {name} -->\n")[1].split("\n<!-- /")[0].splitlines()
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        tables[name] = {(row[0], row[3]): dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
        assert list(tables[name]) == [("scratch", "0"), ("unmix", "30"), ("swav", "30"), ("unmix", "100")]
    assert tables["search"]["unmix", "30"]["seeds"] == "1" and tables["search"]["unmix", "30"]["linear"] == "75.0"
    compared = tables["comparison"]
    assert compared["unmix", "30"]["linear"] == "75.0 ± 0.0" and compared["unmix", "30"]["encoder"] == "8-16"
    assert compared["swav", "30"]["linear"].startswith("0.0 ± 0.0 (+75.0 ± ")  # how far the default is ahead
    assert compared["swav", "30"]["25 labels"].startswith("0.0 of 1 (+75.0")  # where one of two seeds has it
    assert compared["scratch", "0"]["linear"] == "25.0" and compared["unmix", "30"]["uncorrected"] == ""
    lines = (tmp_path / "README.md").read_text().splitlines()[3:-1]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| none", "0"], ["| Unmix", "30"], ["| SwAV", "30"], ["| Unmix", "100"]
    ]  # fmt: skip
    monkeypatch.setattr(search, "WIDTHS", (4,))
    search.main()
    assert (tmp_path / "RESULTS.md").read_text() == text
    assert len((tmp_path / "README.md").read_text().splitlines()) == 4  # no row of another encoder


def test_seconds_until_a_recipe_is_where_simclr_is_after_100_epochs(tmp_path, monkeypatch):
    """unmix has 50 % after 10 epochs and 100 % after 1000; SimCLR has 75 % after 100, half-way in logarithms."""
    monkeypatch.setattr(search, "TIMED", tmp_path / "seconds.json")
    timed = [("unmix", 2), ("simclr", 1), ("unmix", 4), ("byol", 1)]
    search.TIMED.write_text(
        json.dumps([{"name": name, "encoder": "8-16", "seconds": seconds} for name, seconds in timed])
    )
    runs = [("unmix", "1100", 10), ("unmix", "1111", 1000), ("simclr", "1100", 30), ("simclr", "1110", 100)]
    results = {}
    for name, right, epochs in [*runs, ("byol", "1000", 30), ("byol", "1100", 100)]:
        results["8-16", epochs, name] = [result(name, 0, [right], epochs, list(search.FIGURES)[:4])]
    rows = [line.split(" | ") for line in search.race(results).splitlines()[2:]]
    assert [row[3] for row in rows] == ["100 epochs, 300 s", "100 epochs, 100 s", "not reached"]
    assert rows[0][:3] == ["| unmix", "8-16", "3.0 (2.0 to 4.0)"]


def test_an_epoch_is_timed(tmp_path, labelled, monkeypatch):
    monkeypatch.setattr(search, "TIMED", tmp_path / "seconds.json")
    monkeypatch.setattr(search, "write_tables", lambda: None)
    monkeypatch.setitem(search.RECIPES, "unmix", search.Recipe(2, "train_pretext.py --size 8 --batch-size 8", ""))
    monkeypatch.setattr(
        sys, "argv", ["search.py", "scratch", "unmix", "--time", "--widths", "4", "8", "--data", str(labelled)]
    )
    monkeypatch.chdir(tmp_path)
    search.main()
    (run,) = json.loads(search.TIMED.read_text())
    assert (run["name"], run["encoder"], run["device"]) == ("unmix", "4-8", "cpu (1 threads)") and 0 < run[
        "seconds"
    ] < 60


def test_the_tables_are_those_of_the_results(tmp_path, monkeypatch):
    for name in ("RESULTS.md", "README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text().replace("| Unmix |", "||").replace("| unmix |", "||"))
    monkeypatch.setattr(search, "ROOT", tmp_path)
    search.write_tables()
    for name in ("RESULTS.md", "README.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def test_what_cannot_be_run_is_one_line(script):
    end = script("benchmarks/search.py", "three")
    assert end.status == 2 and "three is no recipe: use scratch, rotation, unmix" in end.err
    assert end.err.count("\n") == 1


def test_a_row_is_done_once_and_what_it_lacks_later(tmp_path, labelled, monkeypatch):
    monkeypatch.setattr(search, "RESULTS", tmp_path / "results")
    places = {"data": labelled, "probe": labelled, "data_dir": tmp_path / "decoded", "runs": tmp_path / "runs"}
    args = argparse.Namespace(**places, epochs=1, widths=[4, 8], encoder="4-8", finetune=False)
    recipe = search.Recipe(1, "train_pretext.py --task rotate --size 16 --batch-size 8", "")
    monkeypatch.setitem(search.RECIPES, "rotation", recipe)
    search.experiment(args, "rotation", 3)
    file = tmp_path / "results" / "rotation-4-8-1-3.json"
    first = json.loads(file.read_text())
    command = "python train_pretext.py --task rotate --size 16 --batch-size 8 --epochs 1 --seed 3 --widths 4 8"
    assert first["command"] == command and set(first["right"]) == {"probe", "data"}
    assert (tmp_path / "decoded" / "cache").is_dir()  # --data-dir
    assert sorted(path.name for path in args.runs.iterdir()) == ["rotation-4-8-1-3"]
    assert 0 <= search.figure(first, "linear", "choose") <= 1
    time = file.stat().st_mtime_ns
    search.experiment(args, "rotation", 3)
    assert file.stat().st_mtime_ns == time
    monkeypatch.setattr(search, "FINETUNE", "--mode finetune --epochs 1 --freeze 0 --batch-size 8")
    args.finetune = True
    trained = (args.runs / "rotation-4-8-1-3" / "pretext" / "encoder.pt").stat().st_mtime_ns
    search.experiment(args, "rotation", 3)
    second = json.loads(file.read_text())
    assert second["right"]["probe"] == first["right"]["probe"] and "finetune" in second["right"]
    assert (args.runs / "rotation-4-8-1-3" / "pretext" / "encoder.pt").stat().st_mtime_ns == trained  # not again


def test_a_failed_run_is_one_line(tmp_path):
    with pytest.raises(
        RunError, match=r"--size 2 failed: train_pretext.py: .*'2' is not a whole number.* \(see .*log\)"
    ):
        search.call(["train_pretext.py", "--size", 2], tmp_path / "log")


@pytest.mark.parametrize("options", [["rotation", "--widths", "8", "16", "--epochs", "1"], ["unmix", "--time"]])
def test_results_of_an_earlier_version_are_not_mixed_with_those_of_this(tmp_path, monkeypatch, options):
    """Said before anything is run; `--table` shows them."""
    monkeypatch.setattr(search, "RESULTS", tmp_path)
    monkeypatch.setattr(search, "TIMED", tmp_path / "timed" / "seconds.json")
    earlier = result("rotation", 3, ["10"], 1)
    (tmp_path / "rotation-8-16-1-3.json").write_text(json.dumps(earlier))
    search.TIMED.parent.mkdir()
    search.TIMED.write_text(json.dumps([earlier]))
    monkeypatch.setattr(search, "call", lambda *words: pytest.fail("something was run"))
    monkeypatch.setattr(sys, "argv", ["search.py", *options])
    with pytest.raises(UsageError, match=r"\.json is of an earlier version"):
        search.main()


def test_encoders_that_differ_only_in_their_first_widths_have_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "RESULTS", tmp_path)
    for first in (4, 8):
        one = result("unmix", 0, ["10"]) | {"widths": [first, 16]}
        (tmp_path / f"{first}.json").write_text(json.dumps(one))
    assert list(search.load()) == [("4-16", 100, "unmix"), ("8-16", 100, "unmix")]
