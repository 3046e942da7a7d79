import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from augment import generator
from data import get_dataloaders, open_pretext
from engine import Trainer, choose_amp, choose_device, learning_rate, make_optimizer, memory, warm_up_norms
from harness.errors import RunError, UsageError
from models import build_model
from tasks import MixupTransform


@pytest.fixture
def loaders(cache):
    images, train, val = open_pretext("photos", 16, cache, 64)
    return get_dataloaders(images, train[:320], val[:40], 64, seed=0)


def trainer(lr=1e-3, steps=10, **options):
    torch.manual_seed(0)
    task = MixupTransform("batch", size=16)
    return Trainer(build_model("conv", "cosine", 16), task, lr=lr, steps=steps, **options)


class Bar:
    """Stands in for a progress bar and keeps what it was told."""

    def __init__(self):
        self.images, self.postfix = 0, {}

    def update(self, images):
        self.images += images

    def set_postfix(self, figures, refresh):
        self.postfix = figures


def test_schedule_rises_then_falls_to_nothing():
    rates = [learning_rate(step, 1000, 2.0) for step in range(1001)]
    assert 0 < rates[0] < 0.1 and max(rates) == 2.0 == rates[50]
    assert rates[:51] == sorted(rates[:51]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[1000] < 1e-9
    assert learning_rate(0, 1, 2.0) == 2.0  # a run of one step does learn
    held = [learning_rate(step, 1000, 2.0, hold=0.5) for step in range(1001)]
    assert held[:51] == rates[:51] and set(held[50:501]) == {2.0}
    assert held[500:] == pytest.approx([2.0 * (1000 - step) / 500 for step in range(500, 1001)])


def test_an_epoch_trains_and_reports(loaders):
    t, bar = trainer(), Bar()
    before = copy.deepcopy(t.model.state_dict())
    means = t.train_epoch(loaders[0], 0, bar)
    assert bar.images == 320 and set(bar.postfix) == {"loss", "source_accuracy"}
    assert set(means) == {"loss", "source_accuracy", "weight_mae", "gradient_norm", "learning_rate"}
    assert means["gradient_norm"] > 0
    moved = [not torch.equal(before[name], value) for name, value in t.model.state_dict().items()]
    assert all(moved)


def test_evaluation_changes_nothing(loaders):
    t = trainer()
    before = copy.deepcopy(t.model.state_dict())
    exam = MixupTransform(size=16).validation()
    assert t.evaluate(loaders[1], exam) == t.evaluate(loaders[1], exam)
    assert all(torch.equal(before[name], value) for name, value in t.model.state_dict().items())


def test_evaluation_weighs_batches_by_their_size(loaders):
    ((images, labels),) = loaders[1]
    batches = [(images[:30], labels[:30]), (images[30:], labels[30:])]
    size = trainer().evaluate(
        batches, MixupTransform(size=16).validation(), lambda q: {"size": torch.tensor(len(q.mixtures))}
    )
    assert size == {"size": (30 * 30 + 10 * 10) / 40}


def test_warming_up_the_statistics_and_learns_nothing(loaders):
    t = trainer()
    weights = copy.deepcopy(dict(t.model.named_parameters()))
    questions = (t.ask(t.task, *batch, generator(0, 0, number)) for number, batch in enumerate(loaders[0]))
    warm_up_norms(t.model, (question.inputs for question in questions))
    assert all(torch.equal(weights[name], p) for name, p in t.model.named_parameters())
    norm = next(m for m in t.model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 5 and norm.running_mean.abs().max() > 0


def test_the_same_seed_gives_the_same_weights(loaders):
    states = []
    for _ in range(2):
        t = trainer()
        t.train_epoch(loaders[0], 0, Bar())
        states.append(t.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_non_finite_loss_stops_the_run_and_says_what_to_try(loaders):
    t = trainer(lr=0.1)
    with torch.no_grad():
        t.model.decoder.scalars.start.fill_(float("nan"))
    message = (
        "not finite in step 1 of epoch 1, at a learning rate of 0.1: the output of decoder.* is the first.*lower --lr"
    )
    with pytest.raises(RunError, match=message):
        t.train_epoch(loaders[0], 0, Bar())


def unfused(t):
    """An optimiser as on Apple's GPUs: it takes no word of a broken step, so that such a step has to be left out."""
    groups = [{name: group[name] for name in ("params", "rate", "weight_decay")} for group in t.optimizer.param_groups]
    t.optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=False)
    return t


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("where", ["output", "gradient"])
def test_divergence_harms_no_weight_and_is_traced(loaders, where, fused):
    """From the third step on, numbers are not finite; the weights are those after the second."""
    t = trainer() if fused else unfused(trainer())
    kept = []

    def poison(module, inputs, output):
        if t.taken == 2 and not kept:
            kept.append({name: p.clone() for name, p in t.model.named_parameters()})
        if t.taken >= 2 and where == "output":
            return output * float("inf")
        if t.taken >= 2 and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    t.model.encoder.stages[1].register_forward_hook(poison)
    message = (
        r"step 3 of epoch 1, .*"
        + {
            "output": r"the output of encoder\.stages\.1",
            "gradient": r"the gradient of encoder\.stages\.1",
        }[where]
    )
    with pytest.raises(RunError, match=message):
        t.train_epoch(loaders[0], 0, Bar())
    assert all(torch.equal(p, kept[0][name]) for name, p in t.model.named_parameters())


def test_a_step_that_breaks_after_a_resume_is_counted_from_the_start_of_the_run(loaders):
    t, new = trainer(), trainer()
    t.train_epoch(loaders[0], 0, Bar())
    new.restore(copy.deepcopy(t.state()))
    with pytest.raises(RunError, match="not finite in step 2 of epoch 2"):
        new.train_epoch(loaders[0], 1, Bar(), lambda: new.model.decoder.scalars.start.data.fill_(float("nan")))


def test_the_step_that_broke_is_traced_with_the_same_units_dropped(loaders):
    """In dropout's mask, too, a step depends on seed, epoch and number alone."""
    t = trainer(lr=1e-3)
    masks = {}

    def drop(module, inputs, output):
        mask = torch.rand(output.shape[1:]) < 0.5
        masks.setdefault(t.taken, []).append(mask)
        return output * mask * (float("inf") if t.taken >= 2 else 1)

    t.model.encoder.stages[1].register_forward_hook(drop)
    with pytest.raises(RunError, match="step 3 of epoch 1"):
        t.train_epoch(loaders[0], 0, Bar())
    assert torch.equal(masks[2][0], masks[t.taken][-1])


def test_bf16(loaders):
    t, seen = trainer(amp=True), set()
    t.model.encoder.stages[0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    means = t.train_epoch(loaders[0], 0, Bar())
    assert means["loss"] < 10 and seen == {torch.bfloat16}


def test_weight_decay_leaves_biases_and_normalisation_alone():
    t = trainer()
    scalars = set(t.model.decoder.scalars.parameters())
    for group in t.optimizer.param_groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
        assert {p in scalars for p in group["params"]} == {group["rate"] > 1}


def test_a_scale_per_channel_is_no_matrix():
    """ConvNeXt's scales have shape C 1 1 and start at 1e-6: a step is a thousand times their size."""
    shapes = [(8, 1, 1), (8,), (), (8, 4), (8, 1, 3, 3)]
    model = torch.nn.ParameterList(torch.ones(shape) for shape in shapes)
    groups = make_optimizer(model, 1.0, torch.device("cpu")).param_groups
    decay = {p.shape: group["weight_decay"] for group in groups for p in group["params"]}
    assert [decay[shape] > 0 for shape in shapes] == [False, False, False, True, True]


def test_the_state_holds_tensors_and_plain_values(loaders, tmp_path):
    t = trainer()
    t.train_epoch(loaders[0], 0, Bar())
    torch.save(t.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(state) == {"model", "optimizer", "running", "schedule"}
    assert state["schedule"] == {"lr": 1e-3, "steps": 10, "taken": 5}


def test_amp_is_float32_on_a_cpu_unless_asked_and_bf16_on_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True}, raising=False)
    assert choose_amp("auto", torch.device("cpu")) is False
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **options: has)
        assert choose_amp("auto", torch.device("cuda")) is has


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells")
def test_memory_is_in_millions_of_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))  # KiB
    assert memory(torch.device("cpu")) == pytest.approx(peak * 1024 / 1e6, rel=0.005)


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_amp("bf16", torch.device("cpu")) and not choose_amp("off", torch.device("cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="device cuda: this machine has none.*cpu is used"):
            choose_device("cuda")


def test_apples_gpus_are_used_if_they_are_asked_for(monkeypatch):
    """Nothing was run on one yet."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose_device("auto").type, choose_device("mps").type) == ("cpu", "mps")


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def gpu_loader(cache, place="device"):
    images, train, val = open_pretext("photos", 16, cache, 64)
    return get_dataloaders(images, train[:640], val[:40], 64, 0, torch.device("cuda"), place)[0]


def gpu_trainer(decoder="ridge", amp=True, steps=1000, **options):
    torch.manual_seed(0)
    task = MixupTransform("batch", size=16)
    model = build_model("conv", decoder, 16)
    return Trainer(model, task, lr=1e-3, steps=steps, device=torch.device("cuda"), amp=amp, **options)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("place", ["device", "stream"])
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("decoder", ["cosine", "ridge"])
def test_no_wait_inside_an_epoch(cache, decoder, graphs, place):
    loader, t = gpu_loader(cache, place), gpu_trainer(decoder, graphs=graphs)
    epoch = 0
    while epoch < 3 or (graphs and t.recorded.works and not all(t.recorded.calls.values())):
        t.train_epoch(loader, epoch, Bar())  # kernels are chosen and graphs are recorded
        epoch += 1

    def watch():
        torch.cuda.set_sync_debug_mode("error" if t.taken % len(loader) else "default")

    try:
        t.train_epoch(loader, epoch, Bar(), watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not t.broken and (t.recorded is None or t.recorded.works)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("decoder", ["cosine", "ridge", "mlp"])
def test_steps_that_are_recorded_are_those_that_are_not(cache, decoder):
    def run(graphs):
        loader, t, losses = gpu_loader(cache), gpu_trainer(decoder, amp=False, graphs=graphs), []
        for epoch in range(3):
            means = t.train_epoch(loader, epoch, Bar(), lambda: losses.append(t.running.sums[0].clone()))  # no wait
        assert (t.recorded is not None) == graphs and (not graphs or any(t.recorded.calls.values()))
        assert means["learning_rate"] == learning_rate(29, 1000, 1e-3)
        return torch.stack(losses).cpu(), torch.cat([p.detach().flatten() for p in t.model.parameters()]).cpu()

    (losses, weights), (plain_losses, plain_weights) = run(True), run(False)
    assert torch.allclose(losses[:10], plain_losses[:10], rtol=1e-3)
    assert (weights - plain_weights).norm() < 0.05 * plain_weights.norm()


@pytest.mark.gpu
@on_a_gpu
def test_an_encoder_that_a_gpu_learnt_loads_without_one(script, cache):
    words = ("--epochs", 1, "--size", 8, "--batch-size", 512, "--data-dir", cache, "--out", "run")
    end = script("train_pretext.py", *words, "--device", "cuda")
    assert end.status == 0, end.err
    state = torch.load("run/encoder.pt", weights_only=True)
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_a_run_of_a_cpu_goes_on_on_a_gpu(cache, loaders, graphs):
    old = trainer(steps=1000)
    old.task = MixupTransform("batch", size=16)
    old.train_epoch(loaders[0], 0, Bar())
    new = gpu_trainer("cosine", graphs=graphs)
    new.restore(copy.deepcopy(old.state()))
    new.taken = 0  # its loader is longer
    new.train_epoch(gpu_loader(cache), 0, Bar())
    assert not new.broken and {state["step"].device.type for state in new.optimizer.state.values()} == {"cuda"}
    assert {int(state["step"]) for state in new.optimizer.state.values()} == {15}
    back = trainer(steps=1000)
    back.restore(copy.deepcopy(new.state()))
    back.taken = 0
    back.train_epoch(loaders[0], 0, Bar())
    assert {state["step"].device.type for state in back.optimizer.state.values()} == {"cpu"}


@pytest.mark.gpu
@on_a_gpu
def test_a_step_that_cannot_be_recorded_is_taken_as_it_is(cache, capsys):
    class Reads(MixupTransform):
        def score(self, logits, question):
            scores = super().score(logits, question)
            return scores | {"read": scores["loss"] * float(scores["loss"].detach() > 0)}

    t = gpu_trainer()
    t.task = Reads("batch", size=16)
    for epoch in range(2):
        means = t.train_epoch(gpu_loader(cache), epoch, Bar())
    assert not t.broken and means["read"] == pytest.approx(means["loss"]) and not t.recorded.works
    assert capsys.readouterr().out.count("cannot be recorded") == 1
    assert {int(state["step"]) for state in t.optimizer.state.values()} == {20}


def test_a_run_with_an_optimiser_that_is_not_fused_goes_on_with_one_that_is(loaders):
    t = unfused(trainer())
    before = {name: p.clone() for name, p in t.model.named_parameters()}
    t.train_epoch(loaders[0], 0, Bar())
    assert not all(torch.equal(p, before[name]) for name, p in t.model.named_parameters())
    state = t.state()
    other = trainer()
    other.restore(state)
    assert all(group["fused"] for group in other.optimizer.param_groups)
    other.train_epoch(loaders[0], 1, Bar())
