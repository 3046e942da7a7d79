"""Training on a pretended GPU, see pretended.py: nothing waits for it, nothing mixes devices, a step is few kernels.

It does not see waits inside of libraries such as cuSOLVER, kernels that a GPU lacks, CUDA graphs, and threads.
"""

import copy

import numpy as np
import pytest
import torch

import augment
import engine
import tasks
from augment import generator
from data import Entry, Images, Listing, get_dataloaders
from engine import Trainer, encode_images
from models import Classifier, build_encoder, build_model
from tasks import TASKS, Classify, Duplicate, MixupTransform, Quadrant, Rotate, Scale

pretended = pytest.importorskip("pretended", reason="this release of torch has other internals", exc_type=ImportError)
GPU = pretended.GPU
SIZE, BATCH = 16, 8  # px, images


def images(count=24):
    pixels = np.random.default_rng(0).integers(0, 255, (count, 3, 2 * SIZE, 2 * SIZE), dtype=np.uint8)
    entries = [Entry(f"{i}", "train", i % 2) for i in range(count)]
    listing = Listing("x", "x", {}, ["a", "b"], entries, [], None, 2 * SIZE, "")
    return Images(listing, pixels, torch.arange(count) % 2)


def prepare(task, decoder="ridge", encoder="conv", amp=True):
    """Trainer and loaders on the pretended GPU."""
    torch.manual_seed(0)
    model = build_model(encoder, decoder, SIZE, task.classes)
    trainer = Trainer(model, copy.copy(task), lr=1e-3, steps=100, device=GPU, amp=amp, graphs=False)
    loaders = get_dataloaders(images(), range(24), range(8), BATCH, 0, GPU, "device")
    model.train()
    return trainer, *loaders


def second_step(task, decoder="ridge", encoder="conv", amp=True):
    """The pretended GPU after the second step of an epoch, loader and running means included."""
    with pretended.PretendedGPU(strict=False) as gpu:
        trainer, loader, _ = prepare(task, decoder, encoder, amp)
        batches = iter(loader)
        trainer.learn(*next(batches), 0, generator(0))  # makes what is made once
        gpu.strict = True
        gpu.kernels.clear(), gpu.copies.clear(), gpu.lines.clear()
        trainer.running.add(trainer.learn(*next(batches), 1, generator(1)))
        trainer.running.peek()
    return gpu


def kernels(gpu):
    """Kernels of a step. A GPU clips all gradients in a handful of kernels, where the pretended one counts two each."""
    clipping = sum(count for line, count in gpu.lines.items() if "clip_grad_norm_" in line)
    return sum(gpu.kernels.values()) - clipping + 8


CASES = {  # task, decoder, encoder
    "the default": (MixupTransform(size=SIZE), "ridge", "conv"),
    "one question": (MixupTransform(size=SIZE, few=()), "ridge", "conv"),
    "five candidates": (MixupTransform(5, size=SIZE), "ridge", "conv"),
    "cosine": (MixupTransform(size=SIZE), "cosine", "conv"),
    "mlp, three sources": (MixupTransform(5, 3, torch.distributions.Beta(0.4, 0.4), size=SIZE), "mlp", "conv"),
    "dot, no views": (MixupTransform(3, size=SIZE, views=False, loss="mse"), "dot", "conv"),
    "sigmoid": (MixupTransform(3, size=SIZE, activation="sigmoid"), "ridge", "conv"),
    "duplicate": (Duplicate(size=SIZE), "ridge", "conv"),
    "scale": (Scale(size=SIZE), "ridge", "conv"),
    "rotate": (Rotate(SIZE), "ridge", "resnet18"),
    "quadrant": (Quadrant(SIZE), "ridge", "conv"),
    "classify": (Classify(torch.tensor([4, 5]), SIZE), "ridge", "conv"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_never_waits_and_copies_once(name):
    gpu = second_step(*CASES[name])
    # down goes what the progress bar shows
    assert gpu.copies["to the GPU"] == 1 and gpu.copies["to the CPU"] == 1


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_bf16(name):
    """On the CPU: the pretended GPU knows no autocast, which refuses some operations on several dtypes. With conv:
    resnet18 has maps of 1 px here, and of their convolution with stride 2 torch 2.14 has wrong gradients in bf16."""
    task, decoder, _ = CASES[name]
    model = build_model("conv", decoder, SIZE, task.classes)
    trainer = Trainer(model, copy.copy(task), lr=1e-3, steps=100, amp=True)
    loader, _ = get_dataloaders(images(), range(24), range(8), BATCH, 0)
    assert trainer.learn(*next(iter(loader)), 0, generator(0))["loss"].isfinite() and not trainer.broken


@pytest.mark.parametrize("encoder,few,most", [("conv", (), 240), ("conv", (4,), 262), ("resnet18", (), 330)])
def test_kernels_of_a_step(encoder, few, most):
    """Only from above: a release of torch may need fewer. In float32: autocast's casts are not pretended."""
    assert 100 < kernels(second_step(MixupTransform(size=SIZE, few=few), "ridge", encoder, amp=False)) <= most


def test_a_head_on_features():
    features, labels = torch.rand(BATCH, 1216), torch.arange(BATCH) % 2
    with pretended.PretendedGPU(strict=False) as gpu:
        model = Classifier(build_encoder("conv"), 2)
        trainer = Trainer(
            model.head, Classify(torch.tensor([4, 5]), None), lr=1e-3, steps=100, device=GPU, graphs=False
        )
        batch = features.to(GPU), labels.to(GPU)
        trainer.learn(*batch, 0, generator(0))
        gpu.strict = True
        trainer.learn(*batch, 1, generator(1))


def test_means_are_shown_once_they_have_arrived(monkeypatch):
    """Twenty steps may be queued while the GPU is in the first of them."""
    arrived = []
    event = type("Event", (), {"record": lambda self: None, "query": lambda self: bool(arrived)})
    with pretended.PretendedGPU(strict=False):
        monkeypatch.setattr(torch.cuda, "Event", event)
        running = engine.Running(GPU)
        running.add({"loss": torch.ones((), device=GPU)})
        assert running.peek() == {} == running.peek()
        arrived.append(True)
        assert list(running.peek()) == ["loss"]


@pytest.mark.parametrize("name", TASKS)
def test_every_baseline_of_a_task_is_a_figure(name):
    """Those of labels are constants, on the CPU."""
    task = TASKS[name](size=SIZE)
    with pretended.PretendedGPU(strict=False):
        trainer, _, loader = prepare(task)
        for score in task.validation().baselines().values():
            assert {"accuracy", "source_accuracy"} & trainer.evaluate(loader, task.validation(), score).keys()


def test_evaluation_reads_once():
    with pretended.PretendedGPU(strict=False) as gpu:
        trainer, _, loader = prepare(MixupTransform(size=SIZE))
        fixed = trainer.task.validation()
        trainer.evaluate(loader, fixed)
        gpu.waits.clear()
        trainer.evaluate(loader, fixed)
        assert gpu.waits and all("engine.py" in wait and "self.sums / self.count" in wait for wait in gpu.waits)
        features = encode_images(trainer.model.encoder, images().pixels, range(8), SIZE, GPU, True)
    assert features.shape == (8, 1216) and features.device.type == "cpu"


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_from_elsewhere_goes_on(fused):
    """Its optimiser may not have been fused, its step counters on the CPU."""
    with pretended.PretendedGPU(strict=False) as gpu:
        trainer, loader, _ = prepare(MixupTransform(size=SIZE))
        other, *_ = prepare(trainer.task)
        trainer.learn(*next(iter(loader)), 0, generator(0))
        state = trainer.state()
        for group in state["optimizer"]["param_groups"]:
            group |= {"fused": fused, "capturable": False}
        for saved in state["optimizer"]["state"].values():
            saved["step"] = torch.tensor(5.0)
        state["running"]["count"] = 0
        other.restore(copy.copy(state))
        batch = next(iter(loader))
        gpu.strict = True
        other.learn(*batch, 1, generator(1))
    assert {saved["step"].device for saved in other.optimizer.state.values()} == {GPU}
    assert all(group["fused"] and group["capturable"] for group in other.optimizer.param_groups)


def replace(where, name, make):
    return lambda patch: patch.setattr(where, name, make(getattr(where, name)))


PLANTED = {
    "a number is read": replace(
        tasks, "compare", lambda old: lambda *a: {k: torch.as_tensor(v.item()) for k, v in old(*a).items()}
    ),
    "rows of a mask": replace(tasks, "divergence", lambda old: lambda *a: (lambda d: d[d > 0])(old(*a))),
    "a copy that waits": replace(tasks, "send", lambda old: lambda tensors, to: [t.to(to) for t in tensors]),
    "a copy that is not pinned": replace(augment, "pack", lambda old: lambda tensors, pinned: old(tensors)),
    "mixed devices": replace(augment, "_centres", lambda old: lambda count, device: old(count, torch.device("cpu"))),
    "one number of the CPU": replace(
        tasks, "divergence", lambda old: lambda *a: torch.stack([old(*a).mean(), torch.tensor(0.0)])
    ),
    "an if": replace(
        Trainer, "step", lambda old: lambda self, question, step: old(self, question, step) if not self.broken else None
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_what_would_wait_is_caught(bug, monkeypatch):
    PLANTED[bug](monkeypatch)
    with pytest.raises(pretended.Wait):
        second_step(MixupTransform(size=SIZE))


def test_the_engine_asks_for_pinned_memory(monkeypatch):
    """The very buffer that goes to the GPU is pinned, not a copy of it."""
    asked = []
    pack = augment.pack
    monkeypatch.setattr(augment, "pack", lambda tensors, pinned=False: asked.append(pinned) or pack(tensors, pinned))
    second_step(MixupTransform(size=SIZE))
    assert asked and all(asked) and engine.pack is pack
