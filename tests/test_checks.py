"""The checks for networks of any kind, and `debug_overfit.py --own`."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

import mistakes  # noqa: F401  the three put their programs into MISTAKES
import mistakes_in_data  # noqa: F401
import mistakes_in_training  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from pieces import MISTAKES
from sound import SOUND
from torch import nn

from checks import FAILED, OK, SKIPPED, WARNING, diagnose

NAMED = {  # mistake: what a student reads
    "broadcast_by_hand": "use squeeze(1)",
    "softmax_twice": "leave out the softmax before it",
    "relu_before_negative_targets": "scale these",
    "detached": "reaches detach (mistakes.py, line",
    "under_no_grad": "reaches no_grad (mistakes.py, line",
    "list_of_layers": "A plain list (use nn.ModuleList)",
    "layer_added_later": "`between.weight` does not move: it is not among the optimiser's parameters",
    "gradients_not_cleared": "zero_grad() is missing before backward",
    "trained_in_eval_mode": "Call model.train() before each step",
    "batch_norm_momentum": "momentum that of the new batch",
    "pixels_of_255": "Normalise the inputs",
    "softmax_over_examples": "softmax mixes examples",
    "view_for_transpose": "cuts across axes and mixes them: use permute or transpose",
    "view_of_places_for_permute": "cuts across axes and mixes them: use permute or transpose",
    "targets_not_shifted": "Shift once",
    "attention_dim": "the causal mask",
    "first_batch_for_ever": "The loader repeats itself",
}


def first(setup):
    """The name and the result of the check that fails, or ("", None)."""
    return next(((name, r) for name, r in diagnose(setup).items() if r.status == FAILED), ("", None))


@pytest.mark.parametrize("name", NAMED)
def test_a_mistake_is_named_in_words_that_help(name):
    setup, check = MISTAKES[name]
    found, result = first(functools.partial(setup, True))
    assert found == check and NAMED[name] in result.why
    assert not first(functools.partial(setup, False))[0]


@pytest.mark.slow
def test_every_mistake_is_found_or_known_to_be_missed_and_none_where_there_is_none():
    for name, (setup, check) in MISTAKES.items():
        assert first(functools.partial(setup, True))[0] == (check or ""), name
        assert first(functools.partial(setup, False))[0] == "", name
    assert sum(check is None for _, check in MISTAKES.values()) <= 13


@pytest.mark.parametrize("name", SOUND)
def test_nothing_is_wrong_with_a_sound_setup_of_an_unusual_kind(name):
    found, result = first(SOUND[name])
    assert not found, result


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 32), nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 20)

    def forward(self, tokens):
        h = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.layers(h, nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])))


def healthy(kind):
    """A sound network of that kind with its data."""
    labels = torch.randint(3, (128,))
    if kind == "language":
        tokens = (torch.randint(20, (128, 1)) + torch.arange(16) * torch.randint(1, 4, (128, 1))) % 20
        loss = lambda model, b: F.cross_entropy(model(b[0][:, :-1]).flatten(0, 1), b[0][:, 1:].flatten())  # noqa: E731
        model, data, rate = Language(), [tokens], 1e-3
    elif kind == "autoencoder":
        model = nn.Sequential(
            nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 8), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 30)
        )
        loss = lambda model, b: F.mse_loss(model(b[0]), b[0])  # noqa: E731
        data, rate = [torch.randn(128, 8) @ torch.randn(8, 30) / 3], 1e-3
    else:
        shape = {"mlp": (20,), "resnet": (3, 32, 32), "lstm": (12, 4)}[kind]
        data = [torch.randn(128, *shape) + torch.randn(3, *shape)[labels], labels]
        loss, rate = lambda model, b: F.cross_entropy(model(b[0]), b[1]), 1e-3
        mlp = [nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 3)]
        models = {"mlp": lambda: nn.Sequential(*mlp), "lstm": Sequence}
        model = models.get(kind, lambda: torchvision.models.resnet18(num_classes=3))()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 32, shuffle=True)
    return model, loss, batches, torch.optim.AdamW(model.parameters(), rate)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["mlp", "resnet", "language", "lstm", "autoencoder"])
def test_a_healthy_network_passes(kind, seed):
    results = diagnose(functools.partial(healthy, kind), seed=seed)
    assert not [(name, r) for name, r in results.items() if r.status == FAILED]


@pytest.mark.slow
def test_real_bugs_are_found_and_their_mended_versions_pass():
    """As docs/debugging.md says, from benchmarks/results/diagnose.json."""
    pytest.importorskip("sklearn")
    promised = json.loads((ROOT / "benchmarks" / "results" / "diagnose.json").read_text())["last"]
    for file in sorted((ROOT / "benchmarks" / "bugs").glob("o*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        for state in ("broken", "mended"):
            found = first(functools.partial(program.setup, state == "broken"))[0]
            assert found == promised[file.stem][state]["check"], (file.stem, state)


def test_warnings_are_the_first_suspects_and_results_say_what_was_looked_at():
    setup, _ = MISTAKES["scaled_twice"]
    assert diagnose(functools.partial(setup, True))["start"].status == WARNING
    results = diagnose(functools.partial(setup, False))
    assert results["steps"].status == OK and "give step" in results["steps"].figure


def test_a_network_on_a_gpu_that_is_not_the_only_one_and_knows_no_double_precision(monkeypatch):
    """The CPU stands in for it: double precision only right after a copy to the CPU, as on Apple's GPUs, and of
    several other GPUs the random state is not asked for, which would occupy them."""

    def moved(x):
        x = x.clone()
        x.moved = True
        return x

    def doubled(x):
        if not hasattr(x, "moved"):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return x.to(torch.float64)

    monkeypatch.setattr(torch.Tensor, "cpu", moved)
    monkeypatch.setattr(torch.Tensor, "double", doubled)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("another GPU is occupied"))
    assert {result.status for result in diagnose(lambda: healthy("mlp")).values()} <= {OK, SKIPPED, WARNING}


def test_a_network_whose_loss_takes_longer_than_there_is_time(monkeypatch):
    monkeypatch.setattr("checks.SECONDS", 0.0)
    results = diagnose(SOUND["zeros_at_first"])
    assert results["steps"].status == OK and results["overfit"].status == SKIPPED


def test_an_optimiser_with_a_closure_whose_steps_are_too_small():
    _, result = first(functools.partial(SOUND["a_closure"], 1e-6))
    assert result and "TypeError" not in result.figure + result.why


GOOD = """
import torch
from torch import nn

def setup():
    model = nn.Linear(3, 2)
    inputs = torch.randn(64, 3)
    batches = list(zip(inputs.split(16), (inputs[:, 0] > 0).long().split(16)))
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
    return model, loss, batches, torch.optim.Adam(model.parameters(), 1e-2)
"""


def test_a_file_of_ones_own(script):
    Path("mine.py").write_text(GOOD)
    end = script("debug_overfit.py", "--own", "mine.py")
    assert end.status == 0, end.err + end.out
    assert "No check failed" in end.out and sorted(path.name for path in Path().iterdir()) == ["mine.py"]
    Path("mine.py").write_text(GOOD.replace("model.parameters(), 1e-2", "nn.Linear(3, 2).parameters(), 1e-2"))
    end = script("debug_overfit.py", "--own", "mine.py", "--n", 4, "--seed", 3)
    assert end.status == 1 and "the optimiser's parameters are not the network's" in end.out


def test_a_file_beside_modules_that_are_named_as_this_projects(script, monkeypatch):
    for name in ("models", "data"):
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name))  # comes back
    Path("models.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 2)\n")
    Path("data.py").write_text("SIZE = 16\n")
    mine = GOOD.replace("nn.Linear(3, 2)", "make()").replace("split(16)", "split(SIZE)")
    Path("mine.py").write_text(
        mine.replace("def setup():\n", "from models import make\ndef setup():\n    from data import SIZE\n")
    )
    end = script("debug_overfit.py", "--own", "mine.py")
    assert end.status == 0, end.err + end.out


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("x = 1", "setup"),
        ("def setup(:", "SyntaxError"),
        ("def setup():\n    raise ValueError('no data here')", "no data here"),
        ("def setup():\n    return 1, 2", "has to return (model, loss, batches, optimizer)"),
        (GOOD.replace("nn.Linear(3, 2)", "nn.Identity()"), "optimizer got an empty parameter list"),
        (GOOD.replace("nn.Linear(3, 2)", "nn.Identity()").replace("torch.optim.Adam(model.parameters(), 1e-2)", "None"),
         "the model has no parameters"),
        (GOOD.replace("list(zip(", "[] and list(zip("), "batches is empty"),
        (GOOD.replace("model(batch[0]), batch[1])", "model(batch[0]), batch[1], reduction='none')"), "one number"),
        (GOOD.replace("loss, batches", "nn.CrossEntropyLoss(), batches"), "CrossEntropyLoss() as loss, which"),
        (GOOD.replace("Adam(model.parameters(), 1e-2)", "Adam"), "as optimizer, which it cannot be"),
        (GOOD.replace("1e-2)", "1e-2), 3"), "setup() gives 3 as step, which it cannot be"),
        (GOOD.replace("nn.Linear(3, 2)", "torch.jit.script(nn.Linear(3, 2))"), "as model, which it cannot be"),
        (GOOD.replace("setup():", "setup():\n    nn.Linear(3, 2).load_state_dict({})"), 'state_dict: "weight"'),
        ("folder", "no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(script, content, message):
    if content == "folder":
        Path("mine.py").mkdir()
    elif content is not None:
        Path("mine.py").write_text(content)
    end = script("debug_overfit.py", "--own", "mine.py")
    assert end.status == 2 and message in end.err.replace("No such file", "no such file"), end.err
    assert end.err.count("\n") == 1


def test_options_of_the_projects_own_networks_are_refused(script):
    Path("mine.py").write_text(GOOD)
    end = script("debug_overfit.py", "--own", "mine.py", "--decoder", "dot")
    assert end.status == 2 and "--decoder is not for --own" in end.err and end.err.count("\n") == 1
