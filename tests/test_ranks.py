"""Two processes on one machine do what one does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import harness.ranks
from harness.errors import UsageError

WORKER = """
import json, sys
import torch
from torch import nn
from harness import command, ranks
from augment import generator
from engine import Trainer
from models import Classifier, Unmixer, DECODERS
from tasks import TASKS

class Encoder(nn.Module):  # without batch normalisation
    out_features = 24
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 24, 3, 2), nn.ReLU())
    def forward(self, x):
        return self.net(x).mean(dim=(2, 3))

def learn(name, decoder="ridge", **options):
    torch.manual_seed(0)
    task = TASKS[name](size=16, **options)
    model = Classifier(Encoder(), 4) if task.classes else Unmixer(Encoder(), DECODERS[decoder](24))
    trainer = Trainer(model, task, lr=1e-3, steps=10, seed=0)
    images = torch.randint(0, 255, (16, 3, 24, 24), dtype=torch.uint8, generator=generator(1))
    model.train()
    scores = trainer.step(task(images, generator(0, 0, 0)), 0)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": scores["loss"].detach(), "gradients": gradients}

def main():
    ranks.start(torch.device("cpu"))
    answers = [learn(**options) for options in json.loads(sys.argv[2])]
    if ranks.RANK == 0:
        torch.save(answers, sys.argv[1])

command.run(main, several=True)
"""
CASES = [
    {"name": "mixup", "candidates": "batch"},
    {"name": "mixup", "candidates": "batch", "decoder": "cosine"},
    {"name": "mixup", "candidates": 5, "decoder": "mlp"},
    {"name": "rotate"},
]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(ranks, *args, port=None, **options):
    """Start `ranks` processes as torchrun does."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    common |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen([sys.executable, *map(str, args)], env={**common, "RANK": str(rank)}, **options)
        for rank in range(ranks)
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What one rank and two ranks compute, for each of CASES."""
    found = []
    for ranks in (1, 2):
        file = tmp_path_factory.mktemp("ranks") / "answers.pt"
        processes = launch(ranks, "-c", WORKER, file, json.dumps(CASES), stderr=subprocess.PIPE, text=True)
        errors = [process.communicate(timeout=120)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * ranks, errors
        found.append(torch.load(file))
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: "-".join(map(str, CASES[case].values())))
def test_two_ranks_compute_the_loss_and_the_gradients_of_one(answers, case):
    one, two = answers[case]
    assert abs(one["loss"] - two["loss"]) < 1e-5
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert torch.allclose(gradient, two["gradients"][name], atol=1e-5), name


@pytest.mark.parametrize("error, status", [("''", 0), ("RunError('full')", 1), ("RunError('stopped', 15)", 143)])
def test_a_rank_ends_without_taking_its_interpreter_apart(error, status):
    worker = (
        "import atexit, os; from harness import command; from harness.errors import RunError\n"
        "atexit.register(os.abort)\n"
        f"def main():\n    print('done')\n    if error := {error}: raise error\n"
        "command.run(main, several=True)"
    )
    processes = launch(2, "-c", worker, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert [process.communicate(timeout=120)[0] for process in processes] == ["done\n", ""]
    assert [process.returncode for process in processes] == [status, status]


@pytest.mark.parametrize("script", ["train_transfer.py", "benchmarks/questions.py"])
def test_commands_of_one_process_are_refused_under_torchrun(script):
    for process in launch(2, ROOT / script, "run", stderr=subprocess.PIPE, text=True):
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and "this command uses one process; start it without torchrun" in error
        assert error.count("\n") == 1


def test_more_processes_than_gpus(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(harness.ranks, "RANKS", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UsageError, match="more than the 4 GPUs of this machine; give 4 or less"):
        harness.ranks.start(torch.device("cuda"))


def torchrun(*args, ranks=2, **options):
    words = [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        f"--master_port={free_port()}",
        "--max_restarts=0",
    ]
    command = [sys.executable, *words, ROOT / "train_pretext.py", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=240, **options)


QUICK = ("--size", 8, "--batch-size", 512, "--amp", "off")


def test_as_a_command_and_resumed_with_another_number_of_ranks(cache, tmp_path, script):
    end = torchrun(*QUICK, "--epochs", 1, "--data-dir", cache, "--out", tmp_path / "run")
    assert end.returncode == 0, end.stderr
    assert end.stdout.count("epoch 1/1") == 1
    names = {file.name.split(".")[0] for file in (tmp_path / "run").iterdir()}
    assert {"encoder", "summary", "history", "validation"} <= names
    events = {file.name.split(".")[-2] for file in (tmp_path / "run").rglob("events*")}
    assert len(events) == 1  # of one process
    end = script("train_pretext.py", "--resume", tmp_path / "run", "--epochs", 2)
    assert end.status == 0, end.err
    assert len(Path(tmp_path, "run", "history.csv").read_text().splitlines()) == 3


def test_a_signal_to_one_rank_stops_all_in_the_same_step(cache, tmp_path):
    words = (ROOT / "train_pretext.py", *QUICK, "--epochs", 500, "--data-dir", cache, "--out", tmp_path / "run")
    processes = launch(2, *words, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoint.previous.pt").exists():
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    first, other = (process.communicate(timeout=120)[1].splitlines()[-1] for process in processes)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    stopped = re.fullmatch(r"train_pretext.py: (stopped after \d+ of 1500 steps); go on with: .* --resume .*", first)
    assert stopped and other == f"train_pretext.py (rank 1): {stopped[1]}"


def test_a_rank_that_dies_ends_the_run_with_its_error(cache, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch\n"
        "    def dead(*args, **options):\n"
        "        raise RuntimeError('this rank is dead')\n"
        "    torch.nn.utils.clip_grad_norm_ = dead\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    end = torchrun(*QUICK, "--epochs", 50, "--data-dir", cache, "--out", tmp_path / "run")
    assert end.returncode != 0 and "this rank is dead" in end.stderr


def test_a_batch_that_cannot_be_shared(cache, tmp_path):
    end = torchrun("--batch-size", 63, "--epochs", 1, "--data-dir", cache, "--out", tmp_path / "run")
    assert end.returncode != 0 and "--batch-size 63 is not a multiple of the 2 processes" in end.stderr
    assert not (tmp_path / "run").exists()
