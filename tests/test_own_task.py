"""The task of one's own in docs/runs.md: the very text there."""

import json
import re
from pathlib import Path

from conftest import ROOT

import tasks


def test_the_task_of_the_docs_trains(script, cache, monkeypatch):
    (code,) = re.findall(r"```python\n(class Flip.*?)```", (ROOT / "docs" / "runs.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 25
    exec(code, place := vars(tasks).copy())
    monkeypatch.setitem(tasks.TASKS, "flip", place["Flip"])
    options = ("--task", "flip", "--epochs", 1, "--size", 8, "--batch-size", 256, "--data-dir", cache, "--out", "run")
    end = script("train_pretext.py", *options)
    assert end.status == 0, end.err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["task"] == "flip" and summary["references"]["chance"]["accuracy"] == 0.5
    assert 0 <= summary["val_accuracy"] <= 1
    end = script("train_pretext.py", *options, "--overwrite", "--candidates", 3)
    assert end.status == 2 and "--candidates is given, and --task flip has no use for it" in end.err
