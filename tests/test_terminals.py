"""Where a run was started: terminals that close, shells that ignore signals, logs, folders with spaces."""

import argparse
import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_resume import CLOCKS, history, same, weights

from harness import folder
from harness.errors import UsageError

QUICK = ("--epochs", 3, "--size", 8, "--batch-size", 256)
fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))  # of Unix


@pytest.fixture
def start(cache, tmp_path, monkeypatch):
    """Start a pretext run in a process of its own; `out` takes what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*words, out=subprocess.PIPE, before=None, options=QUICK):
        line = [sys.executable, ROOT / "train_pretext.py", *options, "--data-dir", cache, "--out", "a run", *words]
        return subprocess.Popen([*map(str, line)], stdout=out, stderr=subprocess.PIPE, text=True, preexec_fn=before)

    return run


def summary(folder="a run"):
    return json.loads(Path(folder, "summary.json").read_text())


def test_a_terminal_that_closes_ends_no_run(start):
    run = start()
    run.stdout.readline()
    run.stdout.close()
    run.stderr.close()
    assert run.wait(120) == 0
    assert summary()["epochs"] == 3 and not list(Path().glob("unmix-rescue-*"))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_run_that_is_asked_to_end_is_saved_and_says_how_to_go_on(start, number):
    run = start("--checkpoint-every", 1, options=("--epochs", 60, *QUICK[2:]))
    while "epoch" not in run.stdout.readline():
        pass
    run.send_signal(number)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 128 + number
    said = err.strip().splitlines()[-1]
    words = shlex.split(said.split("go on with: python ")[1])  # as a shell reads it
    assert words == ["train_pretext.py", "--resume", "a run"]
    assert Path("a run", "checkpoint.pt").exists()


def test_what_the_shell_ignores_stays_ignored_and_a_log_can_be_read_meanwhile(start):
    """As in a script's background jobs, to which Ctrl-C goes as well."""
    with open("log", "w") as log:
        run = start(out=log, before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
        end = time.monotonic() + 120
        while "epoch 1/3" not in Path("log").read_text():
            assert time.monotonic() < end and run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 0
    run.stderr.close()
    assert summary()["epochs"] == 3


def test_a_rank_that_is_left_over_from_something_else(script, cache, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    line = [sys.executable, ROOT / "train_pretext.py", *QUICK, "--data-dir", cache, "--out", "run"]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True)
    assert done.returncode == 0 and "3 epochs in" in done.stdout and summary("run")


def test_runs_that_start_in_one_second(script, cache, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *a: "261126-120000")
    for _ in range(3):
        end = script("train_pretext.py", "--epochs", 1, *QUICK[2:], "--data-dir", cache)
        assert end.status == 0, end.err
    assert sorted(path.name.split("261126-120000")[1] for path in Path("runs").iterdir()) == ["", "-2", "-3"]


def test_a_resume_of_a_file_or_through_a_link(script, short_run, cache):
    shutil.copytree(short_run, "run")
    end = script("train_pretext.py", "--resume", "run/checkpoint.pt", "--epochs", 4)
    assert end.status == 2 and "run/checkpoint.pt is a file; give the folder that it is in" in end.err
    os.symlink(ROOT / "train_pretext.py", "train.py")
    done = subprocess.run(
        [sys.executable, "train.py", "--resume", "run", "--epochs", "4"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert summary("run")["epochs"] == 4


def test_overwrite_replaces_runs_alone(script, cache):
    Path("mine").mkdir()
    Path("mine", "summary.json").write_text("{}")
    end = script("train_pretext.py", *QUICK, "--data-dir", cache, "--out", "mine", "--overwrite")
    assert end.status == 2 and "summary.json there is not of a run of this project" in end.err
    assert Path("mine", "summary.json").read_text() == "{}"


def test_a_run_that_ends_while_another_one_decodes_is_not_replaced(short_run, tmp_path):
    """Both were told the same folder, which held no run then."""
    words = {"out": str(tmp_path / "run"), "data": "photos", "data_dir": "data", "encoder": "conv", "overwrite": False}
    args = argparse.Namespace(**words)
    place = folder.choose(args, "pretext")
    shutil.copytree(short_run, place)
    with pytest.raises(UsageError, match="holds a run by now"):
        folder.make(place, args, "cpu")
    assert summary(place) == summary(short_run)


def test_compiling_without_a_compiler(script, cache, short_run, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name, *rest: None)
    end = script("train_pretext.py", *QUICK, "--data-dir", cache, "--compile")
    assert end.status == 2 and "--compile needs a C++ compiler" in end.err and end.err.count("\n") == 1
    assert not Path("runs").exists()
    shutil.copytree(short_run, "run")  # as if it had been compiled, on another machine
    state = torch.load("run/checkpoint.pt", weights_only=True)
    state["settings"]["compile"] = True
    torch.save(state, "run/checkpoint.pt")
    end = script("train_pretext.py", "--resume", "run", "--epochs", 4)
    assert end.status == 2 and "--compile needs a C++ compiler" in end.err and end.err.count("\n") == 1


def test_a_run_goes_on_from_another_directory_with_its_data_moved(script, labelled, tmp_path, monkeypatch):
    small = ("--batch-size", 8, "--size", 8)
    for data in (labelled.name, "moved"):
        end = script("train_pretext.py", "--data", "labelled", "--epochs", 1, *small, "--out", "run", "--overwrite")
        assert end.status == 0, end.err
        Path("elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir("elsewhere")
        words = []
        if data == "moved":
            labelled.rename(tmp_path / "moved")
            end = script("train_pretext.py", "--resume", "../run", "--epochs", 2)
            assert end.status == 2 and "labelled: no such folder" in end.err
            words = ["--data", "../moved", "--data-dir", "other"]
        end = script("train_pretext.py", "--resume", "../run", "--epochs", 2, *words)
        assert end.status == 0, end.err
        end = script("train_transfer.py", "../run", "--mode", "knn", "--out", "knn", "--overwrite", *words)
        assert end.status == 0, end.err
        monkeypatch.chdir("..")
        assert summary("run")["epochs"] == 2
    shutil.copytree("moved", "smaller")
    next(Path("smaller").rglob("*.jpg")).unlink()
    end = script("train_pretext.py", "--resume", "run", "--epochs", 3, "--data", "smaller")
    assert end.status == 2 and "number of images is not as it was: it was 48, and is 47 now" in end.err


@contextlib.contextmanager
def in_a_terminal(words, place):
    """A command that runs in `place`, in a terminal of its own, which closes at the end of the block."""
    ours, theirs = pty.openpty()

    def take_it():
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    def show():
        while not closing.wait(0.02):
            if select.select([ours], [], [], 0)[0]:
                os.read(ours, 4096)

    run = subprocess.Popen(words, cwd=place, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_it)
    os.close(theirs)
    closing = threading.Event()
    shown = threading.Thread(target=show)
    shown.start()
    yield run
    closing.set()
    shown.join()
    os.close(ours)


@pytest.mark.slow
def test_a_week_of_habits_changes_no_bit(folder, tmp_path):
    """Started here, its terminal closed; resumed elsewhere with the images moved; a notice of SLURM's; resumed; killed;
    resumed: the weights are those of a run that nothing happened to."""
    places = [tmp_path / name for name in ("here", "else where", "third")]
    for place in places:
        place.mkdir()
    folder.rename(places[0] / "images")
    script, epochs = [sys.executable, str(ROOT / "train_pretext.py")], 40
    options = ["--epochs", str(epochs), "--batch-size", "8", "--size", "8", "--inspect-every", "0"]
    new = [*script, "--data", "images", *options, "--out"]
    subprocess.run([*new, "undisturbed"], cwd=places[0], check=True, capture_output=True)

    def epochs_done():
        try:
            return len((places[0] / "run" / "history.csv").read_text().splitlines()) - 1
        except OSError:
            return 0

    def after(epoch, run):
        end = time.monotonic() + 120
        while epochs_done() < epoch:
            assert time.monotonic() < end and run.poll() is None
            time.sleep(0.01)
        assert epochs_done() < epochs - 5

    with in_a_terminal([*new, "run", "--checkpoint-every", "3"], places[0]) as run:
        after(3, run)
    assert run.wait(60) == 128 + signal.SIGHUP

    (places[0] / "images").rename(places[1] / "moved images")
    resume = [*script, "--resume", "../here/run"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen([*resume, "--data", "moved images", "--data-dir", "decoded"], cwd=places[1], **quiet)
    after(9, run)
    run.send_signal(signal.SIGUSR1)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGUSR1 and "go on with: python train_pretext.py --resume" in said

    run = subprocess.Popen(resume, cwd=places[2], **quiet)  # it knows where the images are now
    after(15, run)
    run.kill()
    run.communicate()
    done = subprocess.run(resume, cwd=places[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = [places[0] / name for name in ("run", "undisturbed")]
    assert same(*map(weights, runs))
    rows = [[{k: v for k, v in row.items() if k not in CLOCKS} for row in history(run)] for run in runs]
    assert rows[0] == rows[1] and summary(runs[0])["val_loss"] == summary(runs[1])["val_loss"]
