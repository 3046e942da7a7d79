"""The ladder of checks, from the cheapest to the whole task, that finds out why this project's networks do not learn.

Each check looks at a `Subject`, the pieces of a training run, and yields what `checks.climb` expects."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import checks
from augment import generator
from checks import OK, WARNING, matrices
from data import Images
from engine import Trainer
from harness.log import Log
from own import Own
from tasks import LabelTask, Question, WeightTask, chance, divergence

STEPS = 300  # optimiser steps to overfit with, at most
LOOK_EVERY = 10  # steps between two looks at the answers
WEIGHT_MAE = 0.02  # mean weight error of an overfit network, at most
EASY_WEIGHT_MAE = 0.05  # the same for the easy tasks, one of which (scale) gives ridge collinear candidates
LOW_STD, HIGH_STD = 0.1, 2.5  # standard deviation of normalised views: black and white halves have about 2.3
CLOSE = 1e-3  # two answers that should be the same may differ by this share of their largest
WIDE = 10.0  # standard deviation of the logits at the start from which a softmax over them is saturated
DEAD = 1e-3  # an example is dead when its gradient is below this share of that at an uninformed guess
MOVES = (1e-4, 0.5)  # share of its size that a matrix moves by in one step
NOISE_STEPS, NOISE_EXAMPLES = 60, 512


@dataclass
class Subject:
    """What is under test: the pieces of a training run. A test plants a bug by replacing one of them."""

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
    log: Log | None = None  # set before the ladder is climbed

    def question(self, task: WeightTask | LabelTask):
        """The task's question about the examples, the same at every call."""
        return task(self.pixels, generator(self.seed))

    def own(self) -> Own:
        """Questions about mixtures, each with views of its own, as a setup for the checks that suit every network."""
        q = self.question(task := self.make_task("mixup"))

        def setup():
            trainer = self.make_trainer(self.make_model(None), task, 1)

            def loss(model, batch):
                mixtures, views, weights = batch
                rows = torch.arange(weights.numel(), device=weights.device).view_as(weights)
                question = Question(mixtures, views.flatten(0, 1), rows, weights)
                return task.score(trainer.logits(question), question)["loss"]

            return trainer.model, loss, [(q.mixtures, q.asked[q.candidates], q.weights)], trainer.optimizer

        return Own(setup)


def check_data(s: Subject) -> Iterator[tuple]:
    """Lengths, shapes, dtypes and ranges are what the loop expects; labels are right; hardly any image is in both."""
    for split, loader, rows in (("training", s.train_loader, s.train), ("validation", s.val_loader, s.val)):
        bad, found = len(loader.dataset) != len(rows), f"length {len(loader.dataset)}, usable images {len(rows)}"
        why = "The data set's length is wrong. Likely: an off-by-one in __len__. Return the number of rows."
        yield bad, f"{split}: {found}", why
    batch, side = next(iter(s.train_loader)), s.images.pixels.shape[2]
    bad = not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(map(torch.is_tensor, batch))
    why = "The loop expects another batch. Likely: the collate yields ((x, ...), y) where (x, ..., y) is expected."
    yield bad, f"a batch is ({', '.join(type(part).__name__ for part in batch)})", why
    images, labels = batch
    bad = images.dtype != torch.uint8 or images.shape[1:] != (3, side, side) or labels.shape != (len(images),)
    why = f"A batch should be uint8 images B 3 {side} {side} and B labels. Likely: channels last, or floats."
    yield bad, f"images {tuple(images.shape)} {images.dtype}, labels {tuple(labels.shape)}", why
    std, bounds = s.make_task("mixup")(images, generator(s.seed)).asked.std().item(), f"({LOW_STD} to {HIGH_STD})"
    why = "Views are out of range. Likely: normalised twice, or not at all, or pixels of 0 to 255 taken for 0 to 1."
    yield not LOW_STD < std < HIGH_STD, f"views have standard deviation {std:.2f} {bounds}", why
    for (path, split, _), label in zip(s.images.listing.entries, s.images.labels.tolist(), strict=True):
        bad = split != "unsup" and (name := s.images.listing.classes[label]) != path.split("/")[1]
        why = f"Labels of {split}/ are not the class indices of train/. Likely: renumbered from 0. Number by name."
        yield bad, f"{path} has the label of {name!r}" if bad else "", why
    trained, held_out = set(s.train), {*s.val, *s.images.rows("val")}
    shared = len(held_out & trained.union(*(rows for rows in s.images.same if not trained.isdisjoint(rows))))
    why = "Validation measures how well the network remembers. Likely: files in two folders. Remove the copies."
    found = f"{shared} of {len(held_out)} validation images are in training too (at most 1%)"
    yield shared > 0.01 * len(held_out), found, why
    found = f"{len(s.train)} + {len(s.val)} images, views' std {std:.2f} {bounds}, {shared} shared"
    yield WARNING if shared else OK, found, ""


def check_weights(s: Subject) -> Iterator[tuple]:
    """k weights are not zero, they sum to one, and the mixture is the weighted sum of the pixels of its sources."""
    task = s.make_task("mixup", views=False)
    q = s.question(task)
    counts, sums = (q.weights > 0).sum(dim=1), q.weights.sum(dim=1)
    found = f"{counts.min()} to {counts.max()} weights ({task.sources}), sums {sums.min():.3f} to {sums.max():.3f} (1)"
    why = "The answer is not a set of weights of the sources that sums to one."
    yield (counts != task.sources).any() or (sums - 1).abs().max() > 1e-4, found, why
    mix = lambda weights: torch.einsum("bn,bnchw->bchw", weights, q.asked[q.candidates])  # noqa: E731
    off = (mix(q.weights) - q.mixtures).abs().max()
    places = q.weights.argsort(dim=1, descending=True)[:, : task.sources]
    swapped = q.weights.clone().scatter_(1, places, q.weights.gather(1, places.flip(1)))
    why = "The answers do not belong to the questions. Likely: labels shuffled, or sorted, apart from the images."
    if (mix(swapped) - q.mixtures).abs().max() < CLOSE:
        why = "The sources stand in another order than their weights: with the weights swapped, the mixture fits."
    yield off >= CLOSE, f"{task.sources} weights, sum 1, mixture off by {off:.0e} (below {CLOSE:.0e})", why


def check_alignment(s: Subject) -> Iterator[tuple]:
    """Permuting the candidates permutes the predictions in the same way."""
    model, q = s.make_model(None).eval(), s.question(s.make_task("mixup"))
    order = torch.arange(q.candidates.shape[1], device=q.candidates.device).roll(1)
    with torch.no_grad():
        straight = model(*q.inputs)[:, order]
        permuted = model(q.mixtures, q.asked, q.candidates[:, order])
    why = "Prediction i is not about candidate i. Likely: (B * n, ...) read as (n, B, ...), or a layer that sees order."
    off = ((straight - permuted).abs().max() / straight.abs().max().clamp(min=1e-12)).item()
    yield off >= CLOSE, f"off by {off:.0e} of the largest logit (below {CLOSE:.0e})", why


def check_start(s: Subject) -> Iterator[tuple]:
    """The loss has the right value for known answers, and the first logits are not saturated with no gradient."""
    task = s.make_task("mixup")
    q = s.question(task)
    w, n = q.weights, q.weights.shape[1]
    loss = lambda logits, question=q: task.score(logits, question)["loss"]  # noqa: E731
    perfect = loss(task.logits_of(w.clamp(1e-6, 1 - 1e-6))).item()
    uninformed = task.logits_of(torch.full_like(w, 1 / n))
    formula = (w - 1 / n).square() if task.loss == "mse" else divergence(uninformed, w, task.activation)
    formula, guessed = formula.mean().item(), loss(uninformed).item()
    logits = task.logits_of((w + 0.3) / (1 + 0.3 * n))
    rows = zip(logits.split(1), q.candidates.split(1), w.split(1), strict=True)
    alone = sum(loss(row, q._replace(candidates=c, weights=own)).item() for row, c, own in rows) / len(w)
    together = loss(logits).item()
    why = "An example's loss depends on the others. Likely: a softmax over the batch (dim=0), not the candidates."
    found = f"loss {together:.3f} of a batch, {alone:.3f} of its examples one by one (the same)"
    yield abs(alone - together) > 0.01 * formula, found, why
    found = f"loss {perfect:.3f} for the right answer (0), {guessed:.3g} for a guess ({formula:.3g})"
    why = "Even the right answer has a loss. Likely: the activation applied twice, in the model and in the loss."
    yield abs(perfect) > 0.05 * formula, found, why
    why = "The loss is not on its scale, nor is its gradient. Likely: averaged more than once. "
    yield abs(guessed - formula) > 0.05 * formula, found, f"{why}Sum over the candidates, average over the batch."
    logits = s.make_model(None).train()(*q.inputs)
    first, spread = loss(logits).item(), logits.std().item()
    predicted = task.predict(logits.detach())
    saturated = ((predicted > 0.99) | (predicted < 0.01)).float().mean().item()
    (gradient,) = torch.autograd.grad(loss(logits), logits, retain_graph=True)
    blank = uninformed.clone().requires_grad_()
    (reference,) = torch.autograd.grad(loss(blank), blank)
    dead = (gradient.norm(dim=1) < DEAD * reference.norm(dim=1)).float().mean().item()
    found = f"loss {first:.3g} (guess {guessed:.3g}), logits' std {spread:.2g} (below {WIDE:g})"
    found += f", {saturated:.0%} saturated"
    why = "The network is dead on arrival: its first logits saturate the activation. Likely: an unscaled dot product "
    why += "and a squared error. Use --decoder cosine or ridge, or at least --loss kl, whose gradient survives."
    yield dead >= 0.5, f"{found}, {dead:.0%} of the examples pass back no gradient (below 50%)", why
    yield WARNING if spread > WIDE or first > 10 * guessed else OK, found, ""


def check_step(s: Subject) -> Iterator[tuple]:
    """Every matrix or kernel moves in one optimiser step, by a sane share of its size."""
    task, model = s.make_task("mixup"), s.make_model(None)
    trainer = s.make_trainer(model, task, 1)
    before = {name: p.detach().clone() for name, p in matrices(model).items() if p.any()}
    model.train()
    trainer.step(s.question(task), 0)
    after = matrices(model)
    moved = {name: ((after[name] - p).norm() / p.norm()).item() for name, p in before.items()}
    low, high = min(moved, key=moved.get), max(moved, key=moved.get)
    still = [name for name, share in moved.items() if share == 0]
    why = "A part of the network is not optimised. Likely: the optimiser was given the decoder's parameters alone."
    yield still, f"{len(still)} of {len(moved)} matrices do not move, {[*still, low][0]} the first", why
    figure = f"matrices move by {moved[low]:.1e} to {moved[high]:.1e} of their size ({MOVES[0]:.0e} to {MOVES[1]})"
    why = f"The steps are too small to get anywhere. Raise --lr (it is {trainer.lr:g})."
    yield moved[low] < MOVES[0], figure, why
    yield moved[high] > MOVES[1], figure, f"One step overwrites what was there. Lower --lr (it is {trainer.lr:g})."


def overfit(s: Subject, name: str, task: WeightTask | LabelTask, bound: float) -> tuple[bool, str, int]:
    """Overfit one question, until all is named right with a mean weight error below `bound`. Returns whether it was
    learnt (in eval mode), the figures in words, and the steps it took."""
    question = s.question(task)
    model = s.make_model(task.classes)
    trainer = s.make_trainer(model, task, STEPS)
    for step in range(1, STEPS + 1):
        model.train()
        trainer.step(question, step - 1)
        if step % LOOK_EVERY == 0:
            scores = {n: v.item() for n, v in task.score(trainer.answer(question), question).items()}
            s.log.scalars(None, step, {f"{name}/{score}": value for score, value in scores.items()})
            right, error = scores.get("accuracy", scores.get("source_accuracy")), scores.get("weight_mae", 0)
            if right == 1 and error < bound:
                break
    weights = f", weight error {error:.3f} (below {bound})" if "weight_mae" in scores else ""
    return right == 1 and error < bound, f"{right:.0%} right (100%){weights} after {step} steps", step


def check_easy(s: Subject) -> Iterator[tuple]:
    """Scale, duplicate and quadrant are overfit: one needs an eye for contrast, one for sameness, one for content."""
    taken = []
    for name in ("scale", "duplicate", "quadrant"):
        learnt, figures, steps = overfit(s, name, s.make_task(name), EASY_WEIGHT_MAE)
        taken.append(f"{name} {steps}")
        why = f"The network cannot overfit even the {name} task. Likely: a learning rate that is off by a factor of "
        yield not learnt, f"{name}: {figures}", f"{why}ten, or an encoder that throws away what the task needs."
    yield OK, f"overfit after {', '.join(taken)} steps (at most {STEPS})", ""


def check_task(s: Subject) -> Iterator[tuple]:
    """The user's own task is overfit."""
    learnt, figures, _ = overfit(s, "overfit", s.make_task(s.task), WEIGHT_MAE)
    why = "Every part works, and the task is not overfit. Likely: a decoder that cannot express the answer (try "
    why += "--decoder ridge), a learning rate that is off (try a third, and thrice), or too many examples."
    yield not learnt, figures, why


def check_control(s: Subject) -> Iterator[tuple]:
    """With noise in place of the images, drawn anew each step, fresh noise is answered no better than by chance."""
    task = s.make_task(s.task)
    model = s.make_model(task.classes)
    trainer = s.make_trainer(model, task, NOISE_STEPS)
    rng = generator(s.seed, 10)
    draw = lambda views: torch.randn(views.shape, generator=rng).to(views.device)  # noqa: E731
    right, chances, rounds = [], [], max(1, NOISE_EXAMPLES // len(s.pixels))
    for step in range(NOISE_STEPS + rounds):
        parts = task(s.pixels, rng)
        question = type(parts)(*(draw(part) if part.ndim == 4 else part for part in parts))
        if step < NOISE_STEPS:
            model.train()
            scores = trainer.step(question, step)
            s.log.scalars(None, step + 1, {"control/loss": scores["loss"].item()})
            continue
        scores = task.score(trainer.answer(question), question)
        right.append(scores.get("accuracy", scores.get("source_accuracy")))
        chances.append(1 / task.classes if task.classes else chance(question))
    accuracy, expected = torch.stack(right).mean().item(), sum(map(float, chances)) / len(chances)
    margin = 4 * math.sqrt(expected * (1 - expected) / (rounds * len(s.pixels)))
    figure = f"{accuracy:.1%} right on fresh noise (chance {expected:.1%} ± {margin:.1%})"
    why = "The answer leaks: it can be told without the images. Likely: candidates that are not shuffled."
    yield abs(accuracy - expected) > margin, figure, why


CHECKS: dict[str, Callable[[Subject], Iterator[tuple]]] = {
    "data": check_data, "weights": check_weights, "alignment": check_alignment,  # the question
    "leak": lambda s: checks.check_examples(s.own()), "batch of one": lambda s: checks.check_examples(s.own(), True),
    "start": check_start, "gradient": lambda s: checks.check_gradient(s.own()), "step": check_step,
    "easy tasks": check_easy, "the task": check_task, "control": check_control,  # learning
}  # fmt: skip
