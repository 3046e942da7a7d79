"""A run that was stopped goes on as if it never was; what stops it loses nothing."""

import contextlib
import csv
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import checkpoint

CLOCKS = ("training_images_per_second", "training_memory_mb", "logging_seconds")  # what no run repeats
QUICK = ("--epochs", 3, "--size", 8, "--batch-size", 256)


def weights(folder):
    return torch.load(Path(folder, "encoder.pt"), weights_only=True)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(folder):
    return list(csv.DictReader(Path(folder, "history.csv").read_text().splitlines()))


def no_step_twice(folder, epochs):
    rows = history(folder)
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, epochs + 1)]
    for subrun in ("train", "val", "chance"):
        events = EventAccumulator(str(folder / subrun), size_guidance={"scalars": 0, "images": 0}).Reload()
        for curve in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars(curve) if event.step > 0]
            assert steps == list(range(1, epochs + 1)), (subrun, curve)
        if subrun == "val":
            assert [event.step for event in events.Images("mixtures/validation")] == list(range(1, epochs + 1))


def command(*args, cache=None):
    words = [sys.executable, ROOT / "train_pretext.py", *(QUICK if cache else ()), *args]
    return [str(word) for word in [*words, *(("--data-dir", cache) if cache else ())]]


@pytest.fixture
def before_step(monkeypatch):
    """Make something happen before a step of a run in this process, steps counted from 0. Returns how to end that."""
    from engine import Trainer

    def arm(number, action):
        step = Trainer.step

        def watched(self, question, at):
            if at == number:
                action()
            return step(self, question, at)

        monkeypatch.setattr(Trainer, "step", watched)
        return lambda: monkeypatch.setattr(Trainer, "step", step)

    return arm


@pytest.fixture
def stop_after(before_step):
    """Make a run in this process behave as if it got a signal in the last of so many steps."""

    def arm(steps, number=signal.SIGTERM):
        return before_step(steps - 1, lambda: os.kill(os.getpid(), number))

    return arm


@pytest.mark.parametrize("steps, number", [(3, signal.SIGTERM), (7, signal.SIGINT), (10, signal.SIGTERM)])
def test_stopped_and_resumed_is_bit_for_bit_the_same(script, cache, short_run, stop_after, steps, number):
    """In the first epoch (7 steps each), in the last step of an epoch, and in the second."""
    disarm = stop_after(steps, number)
    end = script("train_pretext.py", *QUICK, "--data-dir", cache, "--out", "run")
    disarm()
    assert end.status == 128 + number and end.err.count("\n") == 1
    assert f"stopped after {steps} of 21 steps; go on with: python train_pretext.py --resume run" in end.err
    end = script("train_pretext.py", "--resume", "run")
    assert end.status == 0, end.err
    assert same(weights("run"), weights(short_run))
    no_step_twice(Path("run"), 3)
    mine, theirs = (history(folder) for folder in ("run", short_run))
    for row, other in zip(mine, theirs, strict=True):
        assert {k: v for k, v in row.items() if k not in CLOCKS} == {k: v for k, v in other.items() if k not in CLOCKS}


def test_a_killed_run_goes_on_from_its_last_checkpoint(script, cache, short_run, tmp_path):
    run = subprocess.Popen(
        command("--out", tmp_path / "run", "--checkpoint-every", 2, cache=cache), stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "run" / "checkpoint.previous.pt").exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.wait()
    end = script("train_pretext.py", "--resume", tmp_path / "run")
    assert end.status == 0, end.err
    assert same(weights(tmp_path / "run"), weights(short_run))
    no_step_twice(tmp_path / "run", 3)


@pytest.mark.slow
def test_killed_at_twenty_moments(cache, tmp_path):
    """While it trains and saves after every step, not while it starts."""
    rng, epochs = random.Random(0), 20
    run, last = command("--out", tmp_path / "run", "--epochs", epochs, cache=cache), tmp_path / "run" / "checkpoint.pt"
    taken = []  # steps, before each kill
    for _ in range(20):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = subprocess.Popen([*run, "--checkpoint-every", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (last.exists() and last.stat().st_mtime_ns > before) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        message = process.communicate()[1].decode()
        assert process.returncode == -9, message
        taken.append(checkpoint.load_last(tmp_path / "run")["schedule"]["taken"])
        run = command("--resume", tmp_path / "run")
    # The end of an epoch is saved once more, after the validation; so a step may stand there twice.
    assert taken == sorted(taken) and len(set(taken)) > 10 and taken[-1] < 7 * epochs, taken
    subprocess.run(run, check=True, capture_output=True)
    subprocess.run(
        command("--out", tmp_path / "never", "--epochs", epochs, cache=cache), check=True, capture_output=True
    )
    assert same(weights(tmp_path / "run"), weights(tmp_path / "never"))
    no_step_twice(tmp_path / "run", epochs)


def test_what_shows_the_untrained_network_stays(script, stopped):
    before = (stopped / "validation.before.png").read_bytes()
    for epochs in (3, 4):
        end = script("train_pretext.py", "--resume", stopped, "--epochs", epochs)
        assert end.status == 0, end.err
    for subrun, epoch in (("before", 0), ("after", 4)):
        shown = (stopped / subrun / "projector_config.pbtxt").read_text()
        assert shown.count("tensor_path") == 1 and f"0000{epoch}/features/tensors.tsv" in shown
        assert [folder.name for folder in (stopped / subrun).glob("0*")] == [f"0000{epoch}"]
    assert (stopped / "validation.before.png").read_bytes() == before != (stopped / "validation.png").read_bytes()


def test_more_epochs_go_on_from_a_complete_run(script, cache):
    """Even if the longer run is killed before its summary is written."""
    assert script("train_pretext.py", *QUICK, "--data-dir", cache, "--out", "run", "--epochs", 1).status == 0
    summary = Path("run/summary.json").read_text()
    end = script("train_pretext.py", "--resume", "run")
    assert end.status == 2 and "has all of its 1 epochs" in end.err
    for older in (None, summary):
        if older:
            Path("run/summary.json").write_text(older)
        end = script("train_pretext.py", "--resume", "run", "--epochs", 2)
        assert end.status == 0 and '"epochs": 2' in Path("run/summary.json").read_text(), end.err
        no_step_twice(Path("run"), 2)
    assert Path("run/settings.json").exists() and Path("run/settings.resumed-1.json").exists()


STREAMED = """
import data, torch, train_pretext
from harness import command

def streamed(*args):  # as on a GPU whose memory the images do not fit into: other processes gather the batches
    return data.get_dataloaders(*args[:5], torch.device("cuda"), "stream")

train_pretext.get_dataloaders = streamed
command.run(train_pretext.main, several=True)
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="not on this system")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_stops_it_saved(cache, tmp_path, number):
    """As of a terminal that closes, of `timeout`, and of SLURM. It ended the processes that gather batches first."""
    words = [sys.executable, "-c", STREAMED, *command("--out", "run", "--epochs", 500, cache=cache)[2:]]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    options = {"env": env, "cwd": tmp_path, "start_new_session": True, "text": True}
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        while "epoch " not in (line := run.stdout.readline()):
            assert line, run.stderr.read()
        os.killpg(run.pid, number)
        error = run.communicate(timeout=60)[1]
        assert run.returncode == 128 + number and "stopped after" in error and "Traceback" not in error, error
        with pytest.raises(ProcessLookupError):  # no process is left
            os.killpg(run.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["schedule"]["taken"] > 7


def test_a_state_that_was_rescued_after_the_last_epoch_has_its_history(script, short_run):
    Path("rescued").mkdir()
    shutil.copy(short_run / "checkpoint.pt", "rescued")
    end = script("train_pretext.py", "--resume", "rescued")
    assert end.status == 0, end.err
    assert history("rescued") == history(short_run) and same(weights("rescued"), weights(short_run))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the run lies that `stopped` copies, once it has run."""
    return tmp_path_factory.mktemp("stopped") / "run"


@pytest.fixture
def stopped(script, cache, stop_after, kept):
    """A folder of a run that was stopped in its second epoch."""
    if not kept.exists():
        disarm = stop_after(9)
        assert script("train_pretext.py", *QUICK, "--data-dir", cache, "--out", "run").status == 143
        disarm()
        shutil.copytree("run", kept)
    shutil.copytree(kept, "run", dirs_exist_ok=True)
    return Path("run")


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(script, stopped, short_run):
    file = stopped / "checkpoint.pt"
    with zipfile.ZipFile(file) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    file.write_bytes(content)
    end = script("train_pretext.py", "--resume", stopped)
    assert end.status == 0, end.err
    assert "run/checkpoint.pt is damaged" in end.err and "going on from the one before" in end.err
    assert same(weights(stopped), weights(short_run))


def test_nothing_that_can_be_used(script, stopped):
    for file in stopped.glob("checkpoint*"):
        file.write_bytes(file.read_bytes()[:5000])
    end = script("train_pretext.py", "--resume", stopped)
    assert end.status == 2 and "there is no other" in end.err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--lr", "1e-4"), "--lr cannot be given with --resume"),
        (("--no-views",), "--views cannot be given"),
        (("--size", 16), "--size cannot be given"),
        (("--out", "other"), "--out cannot be given"),
    ],
)
def test_what_would_change_the_run_is_refused_by_name(script, stopped, options, message):
    before = sorted((p.name, p.read_bytes()) for p in stopped.iterdir() if p.is_file())
    end = script("train_pretext.py", "--resume", stopped, *options)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1
    assert sorted((p.name, p.read_bytes()) for p in stopped.iterdir() if p.is_file()) == before


def test_other_data(script, folder):
    options = ("--epochs", 2, "--size", 8, "--batch-size", 8, "--data-dir", "decoded")
    assert script("train_pretext.py", *options, "--data", folder, "--out", "run", "--epochs", 1).status == 0
    (folder / "00.png").unlink()
    end = script("train_pretext.py", "--resume", "run", "--epochs", 2)
    assert end.status == 2
    assert "number of images is not as it was: it was 40, and is 39 now; give the same images" in end.err


def test_another_network(script, stopped):
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    state["model"]["encoder.extra"] = state["model"].pop("encoder.stages.0.0.weight")
    checkpoint.save(state, stopped / "checkpoint.pt")
    end = script("train_pretext.py", "--resume", stopped)
    assert end.status == 2 and end.err.count("\n") == 1
    assert "missing: encoder.stages.0.0.weight; unknown: encoder.extra" in end.err


def test_a_run_of_an_older_version_is_refused_with_its_commit(script, stopped):
    state = checkpoint.load(stopped / "checkpoint.pt")
    del state["format"]
    checkpoint.save(state, stopped / "checkpoint.pt")
    settings = json.loads((stopped / "settings.json").read_text()) | {"revision": "0123456789abcdef"}
    (stopped / "settings.json").write_text(json.dumps(settings))
    end = script("train_pretext.py", "--resume", stopped)
    assert end.status == 2 and end.err.count("\n") == 1
    assert "an older version made this run (commit 0123456789ab); resume it with that one" in end.err


@pytest.mark.parametrize(
    "case, message",
    [("nowhere", "no such folder"), ("empty", "nothing can be resumed; start again, in another folder")],
)
def test_nothing_to_resume(script, case, message):
    Path("empty").mkdir()
    end = script("train_pretext.py", "--resume", case)
    assert end.status == 2 and message in end.err


def test_code_in_a_checkpoint_is_refused(script, stopped, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        torch.save(Trap(), stopped / name)
    end = script("train_pretext.py", "--resume", stopped)
    assert end.status == 2 and "is refused: it holds more than tensors" in end.err
    assert not (tmp_path / "sprung").exists()


def test_two_runs_in_one_folder(script, cache, tmp_path):
    first = subprocess.Popen(
        command("--out", tmp_path / "run", "--epochs", 50, cache=cache), stdout=subprocess.DEVNULL, stderr=-3
    )
    try:
        while not (tmp_path / "run" / "checkpoint.pt").exists():
            assert first.poll() is None
            time.sleep(0.01)
        new = (*QUICK, "--data-dir", cache, "--out", tmp_path / "run", "--overwrite")
        for second in (new, ("--resume", tmp_path / "run")):
            end = script("train_pretext.py", *second)
            assert end.status == 2 and "another run is writing there" in end.err
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_a_run_folder_that_is_removed(script, cache, short_run, before_step):
    # In one go: a checkpoint may be under way, and would fill the folder that is being emptied.
    disarm = before_step(9, lambda: Path("run").rename("gone"))
    end = script("train_pretext.py", *QUICK, "--data-dir", cache, "--out", "run", "--checkpoint-every", 1)
    disarm()
    assert end.status == 1 and end.err.count("\n") == 1
    assert "run cannot be written to (No such file or directory); the training state is in" in end.err
    rescued = end.err.split("--resume ")[1].strip()
    end = script("train_pretext.py", "--resume", rescued)
    assert end.status == 0, end.err
    assert same(weights(rescued), weights(short_run))


def test_data_that_cannot_be_read_is_not_taken_for_a_folder_that_cannot_be_written_to(script, cache, monkeypatch):
    from data import ImageDataset

    def lost(self, rows):
        raise OSError(errno.EIO, "Input/output error", "photos.cache")

    monkeypatch.setattr(ImageDataset, "collate", lost)
    end = script("train_pretext.py", *QUICK, "--data-dir", cache, "--out", "run")
    assert end.status == 1 and end.err.count("\n") == 1
    assert "photos.cache: Input/output error" in end.err and "cannot be written to" not in end.err
    assert not list(Path().glob("unmix-rescue-*"))


def test_a_cache_that_is_removed_during_the_run(script, cache, short_run, before_step):
    """The open file lives on."""
    shutil.copytree(cache, "decoded", copy_function=shutil.copy2)
    before_step(9, lambda: shutil.rmtree("decoded"))
    end = script("train_pretext.py", *QUICK, "--data-dir", "decoded", "--out", "run")
    assert end.status == 0, end.err
    assert same(weights("run"), weights(short_run))


def test_fewer_epochs_than_are_done_are_refused(script, stopped):
    end = script("train_pretext.py", "--resume", stopped, "--epochs", 1)
    assert end.status == 2 and "the run has more than 1 epochs already; give more --epochs" in end.err


def test_no_checkpoint_is_written_after_a_broken_step(script, cache, monkeypatch):
    from engine import Trainer

    ask = Trainer.ask

    def poison(self, task, images, labels, rng, **options):
        question = ask(self, task, images, labels, rng, **options)
        broken = torch.is_grad_enabled() and self.taken == 9
        return question._replace(mixtures=question.mixtures * float("nan")) if broken else question

    monkeypatch.setattr(Trainer, "ask", poison)
    end = script("train_pretext.py", *QUICK, "--data-dir", cache, "--out", "run", "--checkpoint-every", 1)
    assert end.status == 1 and "step 3 of epoch 2" in end.err and end.err.count("\n") == 1
    state = checkpoint.load_last(Path("run"))
    assert state["schedule"]["taken"] == 9
    assert all(value.isfinite().all() for value in state["model"].values())
