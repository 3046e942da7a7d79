import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import speed  # noqa: E402


def without_lightly(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: find(name, *rest) if name != "lightly" else None
    )


def test_a_table_of_medians_and_a_file_of_all(script, monkeypatch):
    without_lightly(monkeypatch)  # which does not matter if it was not asked for
    end = script("benchmarks/speed.py", "limit", "limit", "--repeat", 2, "--seconds", 1, "--size", 16)
    assert end.status == 0 and "lightly" not in end.out, end.err
    found = json.loads(Path("speed.json").read_text())["found"]
    assert list(found) == ["limit"] and len(found["limit"]) == 2
    row = next(line for line in end.out.splitlines() if line.startswith("limit"))
    speeds = sorted(run["images_per_second"] for run in found["limit"])
    assert float(row.split()[1]) == pytest.approx(sum(speeds) / 2, abs=0.1)
    assert row.split()[3:] == ["2", "images/s"]


def test_every_row_has_its_unit():
    found = {kind: [{"images_per_second": 50.0}] * 2 for kind in ("limit", "obvious", "lightly")}
    found["ours"] = [{"images_per_second": 40.0, "logging": 0.03}] * 2
    found["decode"] = [{"images_per_second": 30.0, "pillow": 20.0}] * 2
    for count in speed.GROWTH:
        run = {"seconds_per_image": count / 1e6, "loading": 2e-6, "anonymous_mb": count / 1e3}
        found[f"growth-{count}"] = [run] * 2
    lines = speed.table({"device": "cpu", "cores": 2, "found": found}).splitlines()
    assert "images" not in lines[1] and lines[1].split() == ["median", "spread", "runs", "unit"]
    rows = {name.strip(): rest.split() for name, rest in ((line[:40], line[40:]) for line in lines[2:])}
    assert rows["ours (decoding not counted)"] == ["40.0", "0.0", "2", "images/s"]
    assert rows["logging"] == ["3.0", "0.0", "2", "%", "of", "an", "epoch", "of", "ours"]
    assert rows["1,000 images: training"] == ["1000.0", "0.0", "2", "µs/image"]
    assert rows["1,000 images: loading alone"] == ["2.0", "0.0", "2", "µs/image"]
    assert rows["1,000 images: memory"] == ["1.0", "0.0", "2", "MB"]
    assert rows["ours / limit"] == ["0.80", "0.00", "2", "ratio"]
    assert rows["decode / pillow"] == ["1.50", "0.00", "2", "ratio"]
    assert rows["training: 100,000 images / 1,000 images"] == ["100.00", "0.00", "2", "ratio"]
    assert rows["memory: 100,000 images - 1,000 images"] == ["99.0", "0.0", "2", "MB"]
    assert len(rows) == 7 + 9 + 6 and all(len(row) > 3 for row in rows.values())


def test_the_spread_is_half_of_the_interquartile_range():
    found = {"limit": [{"images_per_second": float(value)} for value in (1, 2, 3, 4, 9)]}
    row = speed.table({"device": "cpu", "cores": 2, "found": found}).splitlines()[2]
    assert row.split()[:4] == ["limit", "3.0", "1.0", "5"]


def test_memory_is_told_in_units_of_10_6_bytes():
    assert speed.own_memory("VmRSS:\t 9000 kB\nRssAnon:\t    1000 kB\nRssFile:\t 5 kB\n") == 1.024


def test_ours_trains_on_the_folder_and_leaves_nothing(script, folder, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up again
    small = ("--repeat", 1, "--seconds", 1, "--size", 16, "--batch-size", 8)
    end = script("benchmarks/speed.py", "ours", "--data", folder, *small)
    assert end.status == 0 and "ours (decoding not counted)" in end.out, end.err
    assert json.loads(Path("speed.json").read_text())["found"]["ours"][0]["train_images"] == 36  # a tenth validates
    assert sorted(path.name for path in scratch.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "scratch", "speed.json"]


def test_what_is_no_image_is_left_out(script, folder):
    (folder / "notes.txt").write_text("x")
    end = script("benchmarks/speed.py", "decode", "--data", folder, "--repeat", 1, "--batch-size", 8)
    assert end.status == 0 and "decode / pillow" in end.out, end.err


@pytest.mark.parametrize(
    "args, message",
    [
        (("speed",), "speed is not measured here"),
        (("limit", "--out", "nowhere/speed.json"), "--out nowhere/speed.json: no such folder"),
        (("limit", "--encoder", "cnov"), "--encoder cnov is unknown"),
        (("obvious", "--data", "images"), "--batch-size 64 is more than the 40 images of images"),
        (("decode", "--data", "photos"), "--data is a folder here"),
        (("ours", "--data", "imagewang-160"), "--data is a folder here"),
        (("decode", "--data", "nowhere"), "no such folder"),
        (("ours", "--data", "nowhere"), "no such folder"),
        (("growth", "--batch-size", 2048), "--batch-size 2048 is more than the 1000 images that growth begins with"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(script, folder, args, message):
    end = script("benchmarks/speed.py", *args)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1 and not Path("speed.json").exists()


def test_lightly_that_is_asked_for_and_missing_is_said(script, monkeypatch):
    without_lightly(monkeypatch)
    end = script("benchmarks/speed.py", "lightly")
    assert end.status == 2 and "lightly is not installed: pip install" in end.err and end.err.count("\n") == 1


def test_what_training_says_is_handed_on(script):
    end = script("benchmarks/speed.py", "ours", "--batch-size", 4096, "--repeat", 1)
    assert end.status == 1 and "--batch-size 4096 is more than the" in end.err and end.err.count("\n") == 1


def test_the_check_for_gpus_tells_of_parts_that_had_no_time(tmp_path):
    words = ("--device", "cpu", "--quick", "--only", "env", "speed", "--seconds", 1, "--out", tmp_path / "gpu.json")
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu_check.py", *map(str, words)], capture_output=True)
    assert done.returncode == 1
    assert [part["good"] for part in json.loads((tmp_path / "gpu.json").read_text()).values()] == [False, False]


@pytest.mark.slow
def test_the_check_for_gpus_runs_on_a_cpu(tmp_path):
    """All of its parts, small: a GPU is at hand seldom, and its minutes are few."""
    words = ("--device", "cpu", "--quick", "--out", tmp_path / "gpu.json")
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu_check.py", *map(str, words)], capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    assert list(found) == ["env", "tests", "losses", "waits", "command", "profile", "speed", "compile"]
    assert all(part.get("good", True) for part in found.values())
    assert found["losses"]["ridge"]["off"]["eager"]["worst"] == 0
    assert found["speed"]["conv 16 px, 16"]["eager_device"] > 0
