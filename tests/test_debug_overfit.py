import json
from pathlib import Path

import pytest
import torch
from planted import FAULTS

import checks
import ladder
import models
from augment import generator
from engine import Trainer
from ladder import CHECKS
from models import build_model
from tasks import MixupTransform

CAUGHT = {  # fault: the check that catches it first, and what its explanation says
    "dot_mse": ("start", "dead on arrival"),
    "double_activation": ("start", "the activation applied twice"),
    "softmax_over_batch": ("start", "softmax over the batch"),
    "reshape_swap": ("alignment", "(B * n, ...) read as (n, B, ...)"),
    "squeeze_batch": ("batch of one", "squeeze() without an axis"),
    "source_order": ("weights", "sources stand in another order than their weights"),
    "encoder_not_optimised": ("step", "the optimiser was given the decoder's parameters alone"),
    "encoder_frozen": ("gradient", "A part of the network is frozen"),
    "stale_module": ("gradient", "the forward pass uses another copy"),
    "lr_too_small": ("step", "Raise --lr"),
    "lr_too_large": ("step", "Lower --lr"),
    "bn_over_candidates": ("leak", "normalisation with the batch's own statistics"),
    "vanishing_loss": ("start", "averaged more than once"),
    "labels_shuffled": ("weights", "labels shuffled"),
    "val_renumbered": ("data", "renumbered from 0"),
    "normalised_twice": ("data", "normalised twice"),
    "length_off": ("data", "an off-by-one in __len__"),
    "nested_batch": ("data", "((x, ...), y) where (x, ..., y) is expected"),
}
QUICK = ("labels_shuffled", "squeeze_batch", "encoder_not_optimised")


@pytest.fixture
def debug(script, cache):
    return lambda *args: script("debug_overfit.py", "--data-dir", cache, "--out", "debug", "--overwrite", *args)


def first_failing(end):
    checks = json.loads(Path("debug/summary.json").read_text())["checks"]
    assert [check["status"] for check in checks[:-1]].count("failed") == 0
    assert end.out.count("✗") == (checks[-1]["status"] == "failed")
    return checks[-1]["check"] if checks[-1]["status"] == "failed" else None


@pytest.fixture
def plant(monkeypatch):
    """Plant a bug in the subject that the next ladder climbs."""
    climb = checks.climb

    def arm(fault):
        def planted(names, subject):
            FAULTS[fault](subject)
            yield from climb(names, subject)

        monkeypatch.setattr(checks, "climb", planted)

    return arm


def assert_caught(debug, plant, fault):
    plant(fault)
    end = debug()
    name, phrase = CAUGHT[fault]
    assert end.status == 1 and first_failing(end) == name, end.out
    assert phrase in " ".join(end.out.split()), end.out


def test_every_fault_has_its_check():
    assert CAUGHT.keys() == FAULTS.keys() and {name for name, _ in CAUGHT.values()} <= CHECKS.keys()


def test_the_clean_ladder_passes(debug):
    end = debug("--n", 8)
    assert end.status == 0 and first_failing(end) is None, end.out
    lines = [line for line in end.out.splitlines() if line.startswith(("✓", "!", "✗"))]
    assert len(lines) == len(CHECKS) == 11 and all(name in line for name, line in zip(CHECKS, lines, strict=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = EventAccumulator("debug").Reload().Tags()["scalars"]
    assert {"scale/loss", "duplicate/loss", "quadrant/loss", "overfit/source_accuracy", "control/loss"} <= set(curves)


@pytest.mark.parametrize("fault", QUICK)
def test_planted_faults_are_caught(debug, plant, fault):
    assert_caught(debug, plant, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(set(FAULTS) - set(QUICK)))
def test_every_planted_fault_is_caught(debug, plant, fault):
    assert_caught(debug, plant, fault)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm(debug, seed):
    end = debug("--seed", seed)
    assert end.status == 0 and "✗" not in end.out, end.out


VERSIONS = [("dot", "softmax", "mse"), ("dot", "sigmoid", "mse")]  # decoder, activation, loss
VERSIONS += [(decoder, "softmax", "kl") for decoder in ("dot", "cosine", "mlp", "ridge")]


@pytest.mark.slow
def test_the_obvious_version_never_learns(batch, capsys):
    """The table of docs/debugging.md, printed by `pytest -m slow -k obvious`: the same eight examples, 300 steps."""
    print("\n| decoder, activation, loss | logits at the start: std, max | gradient of the first layer", end="")
    print(" | weight error | sources named right |\n|---|---|---|---|---|")
    errors = {}
    for decoder, activation, loss in VERSIONS:
        task = MixupTransform(3, activation=activation, loss=loss)
        question = task(batch[:8], generator(0))
        torch.manual_seed(0)
        trainer = Trainer(build_model("conv", decoder, 32), task, lr=1e-3, steps=300)
        logits = trainer.logits(question)
        task.score(logits, question)["loss"].backward()
        first = next(trainer.model.encoder.parameters()).grad.norm()
        for step in range(300):
            trainer.model.train()
            trainer.step(question, step)
        scores = task.score(trainer.answer(question), question)
        errors[decoder, activation, loss] = scores["weight_mae"].item()
        start = f"{logits.std():.2g}, {logits.abs().max():.2g} | {first:.2g}"
        print(f"| {decoder}, {activation}, {loss} | {start} | {scores['weight_mae']:.3f} | ", end="")
        print(f"{scores['source_accuracy']:.0%} |")
    with capsys.disabled():
        print(capsys.readouterr().out)
    assert all(errors["dot", activation, "mse"] > 0.2 for activation in ("softmax", "sigmoid"))
    assert all(errors[decoder, "softmax", "kl"] < 0.02 for decoder in ("cosine", "mlp", "ridge"))


def test_the_users_own_choice_of_parts_is_debugged(debug):
    end = debug("--decoder", "dot", "--loss", "mse")
    assert end.status == 1 and first_failing(end) == "start"
    assert "--decoder cosine or ridge" in " ".join(end.out.split())


@pytest.mark.parametrize(
    "args",
    [
        ("--candidates", "batch", "--n", 4),
        ("--task", "rotate"),
        ("--encoder", "convnext_tiny"),
        ("--decoder", "mlp", "--seed", 2),  # its last bias moves all logits alike, so has no gradient
    ],
)
def test_healthy_choices_pass_the_checks_before_learning(debug, monkeypatch, args):
    monkeypatch.setattr(ladder, "CHECKS", dict(list(CHECKS.items())[:8]))
    end = debug(*args)
    assert end.status == 0 and end.out.count("✗") == 0, end.out


def test_a_matrix_that_is_zero_at_first_may_move_as_it_likes(debug, monkeypatch):
    """As the class token of a vision transformer."""

    def forward(self, images):
        return plain(self, images) * (1 + self.token.sum())

    def start(self, *args):
        build(self, *args)
        self.token = torch.nn.Parameter(torch.zeros(2, 2))

    plain, build = models.ConvEncoder.forward, models.ConvEncoder.__init__
    monkeypatch.setattr(models.ConvEncoder, "forward", forward)
    monkeypatch.setattr(models.ConvEncoder, "__init__", start)
    monkeypatch.setattr(ladder, "CHECKS", {"step": CHECKS["step"]})
    end = debug()
    assert end.status == 0 and "✓" in end.out, end.out


def test_a_folder_with_copies_in_val_fails_the_data_check(debug, labelled):
    for i, file in enumerate((labelled / "train" / "bee").iterdir()):
        (labelled / "val" / "bee" / f"copy{i}.jpg").write_bytes(file.read_bytes())
    end = debug("--data", labelled)
    assert end.status == 1 and first_failing(end) == "data" and "are in training too" in end.out


@pytest.mark.parametrize(("args", "message"), [
    (("--n", 1), "'1' is not a whole number"),
    (("--n", 4, "--candidates", 5), "--candidates 5 is more than --n 4 has"),
    (("--task", "scale", "--candidates", 20), "--candidates 20 is more than --n 8 has"),
    (("--task", "quadrant", "--sources", 4), "so use 4 or more"),
    (("--data", "nowhere"), "no such folder"),
    (("--n", 2000), "'2000' is not a whole number of 3 to 1024"),
])  # fmt: skip
def test_bad_input(script, args, message):
    end = script("debug_overfit.py", *args)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1 and not list(Path().iterdir())


@pytest.mark.parametrize("code, message", [
    ("def setup(): pass\n{}['lr']\n", "gives no setup(): KeyError: 'lr' (mine.py, line 2: `{}['lr']`)"),
    ("x = 1\n", "gives no setup(): it has none"),
])  # fmt: skip
def test_a_file_without_a_setup(script, code, message):
    Path("mine.py").write_text(code)
    end = script("debug_overfit.py", "--own", "mine.py")
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1, end.err
