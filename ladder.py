"""A ladder of checks, from the cheapest to the whole task, that ends the search for why a network does not learn.

Each check looks at a `Subject`, the pieces of a training run, and returns a `Result`: a verdict, the figure it rests on
with its bound, and, where it fails, what that means in plain words, the likely causes in order and what to change.
"""

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from augment import generator
from data import Images
from engine import Trainer, is_matrix
from errors import UsageError
from report import Log
from tasks import LabelTask, Question, WeightTask, chance

OK, WARNING, FAILED = "ok", "warning", "failed"
STEPS = 300  # optimiser steps to overfit with, at most
LOOK_EVERY = 10  # steps between two looks at the answers
WEIGHT_MAE = 0.02  # mean weight error of an overfit network, at most
EASY_WEIGHT_MAE = 0.05  # the same for the easy tasks, one of which (scale) gives ridge collinear candidates
STD = (0.1, 2.5)  # standard deviation of normalised views: black and white halves have about 2.3
CLOSE = 1e-3  # two answers that ought to be the same may differ by this share of their largest
WIDE = 10.0  # standard deviation of the logits at the start from which a softmax over them is saturated
DEAD = 1e-3  # an example is dead when its gradient is below this share of that at an uninformed guess
MOVES = (1e-4, 0.5)  # share of its size that a matrix moves by in one step
NOISE_STEPS, NOISE_EXAMPLES = 60, 512


class Result(NamedTuple):
    """What a check found."""

    status: str  # OK, WARNING or FAILED
    figure: str  # the measured value against its bound
    why: str = ""  # on failure: in plain words, then causes, then what to change


@dataclass
class Subject:
    """What is under test: the pieces of a training run. Whoever wants to see a bug caught replaces one of them."""

    images: Images
    train: list[int]  # rows
    val: list[int]
    train_loader: object  # of (images B 3 H W uint8, labels B int64)
    val_loader: object
    pixels: torch.Tensor  # n 3 H W uint8, the examples to overfit
    task: str  # the name of the user's own
    make_task: Callable[..., WeightTask | LabelTask]  # (name, views=None)
    make_model: Callable[[int | None], nn.Module]  # (classes): fresh, the same at every call
    make_trainer: Callable[[nn.Module, object, int], Trainer]  # (model, task, steps)
    seed: int
    log: Log

    def question(self, task: WeightTask | LabelTask):
        """The task's question about the examples, always the same."""
        return task(self.pixels, generator(self.seed))

    def warmed_up(self, question) -> nn.Module:
        """A fresh network in eval mode whose statistics of normalisation have met the question."""
        model = self.make_model(None)
        model.train()
        with torch.no_grad():
            for _ in range(30):
                model(*question.inputs)
        return model.eval()


def climb(subject: Subject) -> Iterator[tuple[int, str, Result, float]]:
    """Run the checks in order, up to the first that fails: (number, name, result, seconds) as each ends."""
    for number, (name, check) in enumerate(CHECKS.items()):
        started = time.perf_counter()
        try:
            result = check(subject)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  whatever the code under test raises is what the check found
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            result = Result(FAILED, what, f"The code under test stopped with an error: {what}")
        yield number, name, result, time.perf_counter() - started
        if result.status == FAILED:
            return


# ------------------------------------------------------------------------------------------------ what goes in


def check_data(s: Subject) -> Result:
    """Length, shapes, dtypes and ranges are the contract's; classes are those of train/; nothing is in two splits."""
    for split, loader, rows in (("training", s.train_loader, s.train), ("validation", s.val_loader, s.val)):
        if len(loader.dataset) != len(rows):
            return Result(
                FAILED,
                f"{split}: length {len(loader.dataset)}, usable images {len(rows)}",
                "The data set's length is not the number of its images, so some are never seen or an index is out of "
                "range. Likely: an off-by-one in __len__. Return the number of rows.",
            )
    batch = next(iter(s.train_loader))
    side = s.images.pixels.shape[2]
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(map(torch.is_tensor, batch))):
        shape = f"({', '.join(type(part).__name__ for part in batch)})"
        return Result(
            FAILED,
            f"a batch is {shape}, not (images, labels)",
            "The loader's batch is nested in another way than the loop expects. Likely: the collate yields ((x, ...), "
            "y) where (x, ..., y) is expected. Make the collate return exactly (images, labels), two tensors.",
        )
    images, labels = batch
    if images.dtype != torch.uint8 or images.shape[1:] != (3, side, side) or labels.shape != (len(images),):
        return Result(
            FAILED,
            f"images {tuple(images.shape)} {images.dtype}, labels {tuple(labels.shape)}",
            f"A batch ought to be uint8 images B 3 {side} {side} and B labels. Likely: channels last, or floats.",
        )
    views = s.make_task("mixup")(images, generator(s.seed)).asked
    std = views.std().item()
    if not STD[0] < std < STD[1]:
        return Result(
            FAILED,
            f"views have standard deviation {std:.2f} ({STD[0]} to {STD[1]})",
            "Views are not in the range that normalisation gives. Likely: normalised twice, or not at all, or pixels "
            "of 0 to 255 taken for 0 to 1. Normalise once, in augment.py.",
        )
    classes = s.images.listing.classes
    for row, entry in enumerate(s.images.listing.entries):
        if entry.split != "unsup" and classes[int(s.images.labels[row])] != entry.path.split("/")[1]:
            return Result(
                FAILED,
                f"{entry.path} has the label of {classes[int(s.images.labels[row])]!r}",
                f"Labels of {entry.split}/ are not the class indices of train/. Likely: a split that holds a subset of "
                "the classes was renumbered from 0. Take the indices from train/ by name, in every split.",
            )
    digests = [hashlib.blake2b(image).digest() for image in s.images.pixels]
    seen = {digests[row] for row in s.train}
    shared = sum(digests[row] in seen for row in [*s.val, *s.images.rows("val")])
    total = len(s.val) + len(s.images.rows("val"))
    if shared > 0.01 * total:
        return Result(
            FAILED,
            f"{shared} of {total} validation images are in training too (at most 1%)",
            "Validation says how well the network remembers, not how well it has learnt. Likely: files that are in two "
            "folders. Remove the copies.",
        )
    found = f"{len(s.train)} + {len(s.val)} images, views' std {std:.2f} ({STD[0]} to {STD[1]}), {shared} shared"
    return Result(WARNING if shared else OK, found)


def check_weights(s: Subject) -> Result:
    """k weights are not zero, they sum to one, and the mixture is the weighted sum of the pixels that were seen."""
    task = s.make_task("mixup", views=False)
    q = s.question(task)
    counts, sums = (q.weights > 0).sum(dim=1), q.weights.sum(dim=1)
    if (counts != task.sources).any() or (sums - 1).abs().max() > 1e-4:
        return Result(
            FAILED,
            f"{counts.min()} to {counts.max()} weights ({task.sources}), sums {sums.min():.3f} to {sums.max():.3f} (1)",
            "The answer is not a set of weights of the sources that sums to one.",
        )
    off = (_mix(q, q.weights) - q.mixtures).abs().amax(dim=(1, 2, 3))
    if off.max() < CLOSE:
        return Result(OK, f"{task.sources} weights, sum 1, mixture off by {off.max():.0e} (below {CLOSE:.0e})")
    figure = f"mixture off by {off.max():.2f} from the weighted sum (below {CLOSE})"
    places = q.weights.argsort(dim=1, descending=True)[:, : task.sources]
    turned = q.weights.clone().scatter_(1, places, q.weights.gather(1, places.flip(1)))
    if (_mix(q, turned) - q.mixtures).abs().max() < CLOSE:
        why = "The sources stand in another order than their weights: the mixture fits with the weights swapped. Keep "
        return Result(FAILED, figure, why + "sources and weights in one order from the draw to the answer.")
    why = "The answers do not belong to the questions. Likely: labels shuffled, or sorted, apart from the images. "
    return Result(FAILED, figure, why + "Permute both with the same indices.")


def _mix(q: Question, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bn,bnchw->bchw", weights, q.asked[q.candidates])


# -------------------------------------------------------------------------------------------- what is computed


def check_alignment(s: Subject) -> Result:
    """Permuting the candidates permutes the predictions, in the same order."""
    q = s.question(s.make_task("mixup"))
    model = s.warmed_up(q)
    order = torch.arange(q.candidates.shape[1], device=q.candidates.device).roll(1)
    with torch.no_grad():
        straight = model(*q.inputs)
        permuted = model(q.mixtures, q.asked, q.candidates[:, order])
    off = _difference(straight[:, order], permuted)
    if off < CLOSE:
        return Result(OK, f"off by {off:.0e} of the largest logit (below {CLOSE:.0e})")
    return Result(
        FAILED,
        f"off by {off:.2f} of the largest logit (below {CLOSE})",
        "Prediction i is not about candidate i. Likely: (B * n, ...) read as (n, B, ...), so that examples swap "
        "candidates; or a layer that knows a candidate's place. Reshape to (B, n, ...), examples first.",
    )


def check_leak(s: Subject) -> Result:
    """An example's prediction has no gradient with respect to what it was not shown (eval mode)."""
    q = s.question(s.make_task("mixup"))
    model = s.warmed_up(q)
    mixtures, asked = q.mixtures.clone().requires_grad_(), q.asked.clone().requires_grad_()
    logits = model(mixtures, asked, q.candidates)
    # Different factors, since some decoders' logits have a sum that never changes.
    (logits[0] * torch.arange(1.0, logits.shape[1] + 1, device=logits.device)).sum().backward()
    own = max(mixtures.grad[0].abs().max(), asked.grad[q.candidates[0]].abs().max()).item()
    other_views = torch.ones(len(asked), dtype=torch.bool, device=asked.device)
    other_views[q.candidates[0]] = False
    rest = [mixtures.grad[1:], asked.grad[other_views]]
    leak = max(part.abs().max().item() for part in rest if len(part)) / max(own, 1e-30)
    if leak < 1e-5:
        return Result(OK, f"gradient from other examples {leak:.0e} of its own (below 1e-05)")
    return Result(
        FAILED,
        f"gradient from other examples {leak:.1e} of its own (below 1e-05)",
        "The answer to one example depends on others. Likely: normalisation with the batch's own statistics in eval "
        "mode, for example over the candidates; or a reshape that mixes examples. Use running statistics in eval mode.",
    )


def check_single(s: Subject) -> Result:
    """A batch of one gets the same answer as the same example in a batch (eval mode)."""
    q = s.question(s.make_task("mixup"))
    model = s.warmed_up(q)
    with torch.no_grad():
        together = model(*q.inputs)
        some = range(min(8, len(q.mixtures)))
        alone = [model(q.mixtures[i : i + 1], q.asked, q.candidates[i : i + 1]) for i in some]
    if alone[0].shape != (1, together.shape[1]):
        return Result(
            FAILED,
            f"logits of shape {tuple(alone[0].shape)}, not {(1, together.shape[1])}",
            "A batch of one loses an axis. Likely: squeeze() without an axis. Name the axis: squeeze(2).",
        )
    off = _difference(together[: len(alone)], torch.cat(alone))
    if off < CLOSE:
        return Result(OK, f"off by {off:.0e} of the largest logit (below {CLOSE:.0e})")
    why = "One example alone gets another answer than in a batch. Likely: statistics of the batch in eval mode."
    return Result(FAILED, f"off by {off:.2f} of the largest logit (below {CLOSE})", why)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item()


# --------------------------------------------------------------------------------------------- how learning starts


def check_start(s: Subject) -> Result:
    """The loss is what it ought to be for known answers, and the first answers are not saturated with no gradient."""
    task = s.make_task("mixup")
    q = s.question(task)
    w, n = q.weights, q.weights.shape[1]
    inverse = torch.log if task.activation == "softmax" else torch.logit
    loss = lambda logits, question=q: task.score(logits, question)["loss"]  # noqa: E731
    perfect = loss(inverse(w.clamp(1e-6, 1 - 1e-6))).item()
    uninformed = inverse(torch.full_like(w, 1 / n))
    guessed, formula = loss(uninformed).item(), _loss_of_a_guess(task, w)
    logits = inverse((w + 0.3) / (1 + 0.3 * n))
    one_by_one = sum(
        loss(logits[i : i + 1], q._replace(candidates=q.candidates[i : i + 1], weights=w[i : i + 1])).item()
        for i in range(len(w))
    ) / len(w)
    figure = f"loss {perfect:.3f} for the right answer (0), {guessed:.3g} for a guess ({formula:.3g})"
    if abs(one_by_one - loss(logits).item()) > 0.01 * formula:
        return Result(
            FAILED,
            f"loss {loss(logits).item():.3f} of a batch, {one_by_one:.3f} of its examples one by one (the same)",
            "The loss of an example depends on the other examples. Likely: a softmax over the batch (dim=0) where the "
            "candidates (dim=1) are meant.",
        )
    if abs(perfect) > 0.05 * formula:
        why = (
            "Even the right answer has a loss. Likely: the activation applied twice, in the model and in the loss. Let "
        )
        return Result(FAILED, figure, why + "the model return logits.")
    if abs(guessed - formula) > 0.05 * formula:
        return Result(
            FAILED,
            figure,
            "The loss is not on its scale. Likely: averaged more than once (over candidates, pixels, batch) until "
            "nothing is left of it and of its gradient. Sum over the candidates, average over the batch, once.",
        )

    model = s.make_model(None).train()
    logits = model(*q.inputs)
    first = loss(logits).item()
    spread = logits.std().item()
    predicted = task.predict(logits.detach())
    saturated = ((predicted > 0.99) | (predicted < 0.01)).float().mean().item()
    (gradient,) = torch.autograd.grad(loss(logits), logits, retain_graph=True)
    blank = uninformed.clone().requires_grad_()
    (reference,) = torch.autograd.grad(loss(blank), blank)
    dead = (gradient.norm(dim=1) < DEAD * reference.norm(dim=1)).float().mean().item()
    figure = (
        f"loss {first:.3g} (guess {guessed:.3g}), logits' std {spread:.2g} (below {WIDE:g}), {saturated:.0%} saturated"
    )
    if dead >= 0.5:
        return Result(
            FAILED,
            f"{figure}, {dead:.0%} of the examples pass back no gradient (below 50%)",
            "The network is dead on arrival: its first logits are so far apart that the activation is saturated, and "
            "the squared error passes nothing back through that. Likely: an unscaled dot product. Use --decoder "
            "cosine or ridge, or at least --loss kl, whose gradient survives.",
        )
    return Result(WARNING if spread > WIDE or first > 10 * guessed else OK, figure)


def _loss_of_a_guess(task: WeightTask, w: torch.Tensor) -> float:
    """The loss of answering 1/n for every candidate, from its definition."""
    n = w.shape[1]
    if task.loss == "mse":
        return (w - 1 / n).square().mean().item()
    divergence = torch.xlogy(w, w * n)
    if task.activation == "sigmoid":
        divergence = divergence + torch.xlogy(1 - w, (1 - w) * n / (n - 1))
    return divergence.sum(dim=1).mean().item()


def check_gradient(s: Subject) -> Result:
    """Every parameter gets a finite gradient, and no matrix's or kernel's is all zero (a bias's may well be)."""
    task = s.make_task("mixup")
    model = s.make_model(None)
    trainer = s.make_trainer(model, task, 1)
    model.train()
    task.score(trainer.logits(s.question(task)), s.question(task))["loss"].backward()
    named = dict(model.named_parameters())
    frozen = [name for name, p in named.items() if not p.requires_grad]
    if frozen:
        return Result(
            FAILED,
            f"{len(frozen)} of {len(named)} parameters do not ask for a gradient (0), {frozen[0]} the first",
            "A part of the network is frozen. Likely: requires_grad_(False), or a forward pass under no_grad.",
        )
    ids = {id(p) for p in named.values()}
    stale = sum(id(p) not in ids for group in trainer.optimizer.param_groups for p in group["params"])
    if stale:
        return Result(
            FAILED,
            f"{stale} of the optimiser's parameters are not the network's (0)",
            "The optimiser moves a stale copy: the forward pass uses another copy of a module than the one that is "
            "optimised. Likely: a module replaced or copied after the optimiser was made. Make the optimiser last.",
        )
    for name, p in named.items():
        bad = "none" if p.grad is None else "not finite" if not p.grad.isfinite().all() else None
        if bad or (is_matrix(p) and not p.grad.any()):
            return Result(
                FAILED,
                f"gradient of {name}: {bad or 'all zero'}",
                "A layer gets no usable gradient. Likely: it is not used in the forward pass, it is detached from it, "
                "or what comes before it is saturated or switched off by a ReLU.",
            )
    smallest = min(p.grad.norm().item() for p in named.values() if is_matrix(p))
    return Result(OK, f"{len(named)} gradients, finite, the smallest {smallest:.0e} (above 0)")


def check_step(s: Subject) -> Result:
    """Every matrix or kernel moves in one optimiser step, by a sane share of its size."""
    task = s.make_task("mixup")
    model = s.make_model(None)
    trainer = s.make_trainer(model, task, 1)
    before = copy.deepcopy({name: p.detach() for name, p in model.named_parameters() if is_matrix(p)})
    model.train()
    trainer.step(s.question(task), 0)
    moved = {
        name: ((p.detach() - before[name]).norm() / before[name].norm()).item()
        for name, p in model.named_parameters()
        if name in before
    }
    low, high = min(moved, key=moved.get), max(moved, key=moved.get)
    figure = f"matrices move by {moved[low]:.1e} to {moved[high]:.1e} of their size ({MOVES[0]:.0e} to {MOVES[1]})"
    if moved[low] == 0:
        still = [name for name, share in moved.items() if share == 0]
        return Result(
            FAILED,
            f"{len(still)} of {len(moved)} matrices do not move, {still[0]} the first",
            "A part of the network gets gradients and is not optimised. Likely: the optimiser was given the decoder's "
            "parameters alone. Give it those of the whole model.",
        )
    if moved[low] < MOVES[0]:
        return Result(FAILED, figure, f"The steps are too small to get anywhere. Raise --lr (it is {trainer.lr:g}).")
    if moved[high] > MOVES[1]:
        return Result(FAILED, figure, f"One step overwrites what was there. Lower --lr (it is {trainer.lr:g}).")
    return Result(OK, figure)


# --------------------------------------------------------------------------------------------------- what is learnt


def overfit(s: Subject, name: str, task: WeightTask | LabelTask, bound: float) -> tuple[bool, str, int]:
    """Learn one question by heart, until everything is named right with a mean weight error below `bound`.

    Returns whether it was learnt (in eval mode), the figures in words, and the steps it took.
    """
    question = s.question(task)
    model = s.make_model(task.classes)
    trainer = s.make_trainer(model, task, STEPS)
    for step in range(1, STEPS + 1):
        model.train()
        trainer.step(question, step - 1)
        if step % LOOK_EVERY == 0:
            scores = {n: v.item() for n, v in task.score(trainer.answer(question), question).items()}
            s.log.scalars(step, {f"{name}/{score}": value for score, value in scores.items()})
            named = _named_right(scores)
            if named == 1 and scores.get("weight_mae", 0) < bound:
                break
    error = f", weight error {scores['weight_mae']:.3f} (below {bound})" if "weight_mae" in scores else ""
    said = f"{named:.0%} right (100%){error} after {step} steps"
    return named == 1 and scores.get("weight_mae", 0) < bound, said, step


def _named_right(scores: dict) -> float:
    return scores["accuracy"] if "accuracy" in scores else scores["source_accuracy"]


def check_easy(s: Subject) -> Result:
    """Scale, duplicate and quadrant are overfit: one needs an eye for contrast, one for sameness, one for content."""
    found = []
    for name in ("scale", "duplicate", "quadrant"):
        learnt, said, steps = overfit(s, name, s.make_task(name), EASY_WEIGHT_MAE)
        found.append(f"{name} {steps}")
        if not learnt:
            return Result(
                FAILED,
                f"{name}: {said}",
                f"The network cannot learn even the {name} task by heart, so unmixing is out of reach. Likely: a "
                "learning rate that is off by a factor of ten, or an encoder that throws away what the task needs.",
            )
    return Result(OK, f"learnt by heart after {', '.join(found)} steps (at most {STEPS})")


def check_task(s: Subject) -> Result:
    """The user's own task is overfit."""
    learnt, said, _ = overfit(s, "overfit", s.make_task(s.task), WEIGHT_MAE)
    if learnt:
        return Result(OK, said)
    return Result(
        FAILED,
        said,
        "Every part works, and the task itself is not learnt by heart. Likely: a decoder that cannot express the "
        "answer (try --decoder ridge), a learning rate that is off (try a third, and thrice), or too many examples.",
    )


def check_control(s: Subject) -> Result:
    """With noise in place of the images, drawn anew each step, fresh noise is answered no better than by chance."""
    task = s.make_task(s.task)
    model = s.make_model(task.classes)
    trainer = s.make_trainer(model, task, NOISE_STEPS)
    rng = generator(s.seed, 10)
    draw = lambda views: torch.randn(views.shape, generator=rng).to(views.device)  # noqa: E731
    right, chances, rounds = [], [], max(1, NOISE_EXAMPLES // len(s.pixels))
    for step in range(NOISE_STEPS + rounds):
        question = task(s.pixels, rng)
        question = type(question)(
            *(draw(part) if part.is_floating_point() and part.ndim == 4 else part for part in question)
        )
        if step < NOISE_STEPS:
            model.train()
            scores = trainer.step(question, step)
            s.log.scalars(step + 1, {"control/loss": scores["loss"].item()})
            continue
        scores = task.score(trainer.answer(question), question)
        right.append(_named_right(scores))
        chances.append(1 / task.classes if task.classes else chance(question))
    accuracy, expected = torch.stack(right).mean().item(), sum(map(float, chances)) / len(chances)
    margin = 4 * math.sqrt(expected * (1 - expected) / (rounds * len(s.pixels)))
    figure = f"{accuracy:.1%} right on fresh noise (chance {expected:.1%} ± {margin:.1%})"
    if abs(accuracy - expected) <= margin:
        return Result(OK, figure)
    return Result(
        FAILED,
        figure,
        "The answer leaks: it can be told without looking at the images. Likely: candidates that are not shuffled, or "
        "features of the answer among the inputs.",
    )


CHECKS: dict[str, Callable[[Subject], Result]] = {
    "data": check_data,
    "weights": check_weights,
    "alignment": check_alignment,
    "leak": check_leak,
    "batch of one": check_single,
    "start": check_start,
    "gradient": check_gradient,
    "step": check_step,
    "easy tasks": check_easy,
    "the task": check_task,
    "control": check_control,
}
