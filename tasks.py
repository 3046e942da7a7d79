"""Pretext tasks: each turns a batch of images into a question with its answer, on the device.

    task(images, rng)            -> question: what the network is shown, and the answer; in two steps:
    task.draw(images, rng)       -> all that is random, drawn on the CPU
    task.ask(images, drawn)      -> the question, computed on the device of the images without a wait
    model(*question.inputs)      -> logits
    task.score(logits, question) -> {"loss": ..., ...}: scalars, still on the device
    task.validation()            -> the task that a run is validated with, whatever it trained with
    task.baselines()             -> {name: question -> scores}: what needs no network

TASKS, at the end, has them by name. docs/runs.md shows how to add one."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Distribution, Uniform

from augment import draw_boxes, draw_views, make_views, send
from harness.errors import UsageError, ValueProblem

ACTIVATIONS = ("softmax", "sigmoid")
LOSSES = ("kl", "mse")
SMALLEST_WEIGHT = 1e-3
SHARES = Uniform(0.1, 0.9)  # a source's share of what those before it left, in training and in the validation question
FEW = (2, 3, 8, 32)  # candidates of the second question, about a few: the sizes of its blocks


class Question(NamedTuple):
    """How much of each candidate is in each mixture? And the answer."""

    mixtures: torch.Tensor  # B 3 S S
    asked: torch.Tensor  # A 3 S S  the views that candidates refer to
    candidates: torch.Tensor | tuple  # B n int64  rows of asked, all different; or (n, m) of blocks, see Decoder
    weights: torch.Tensor | tuple  # B n  the answer, each row sums to one; or a tuple, M n for each (n, m)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The model's inputs."""
        return self.mixtures, self.asked, self.candidates


class LabelQuestion(NamedTuple):
    """Which class does each view belong to? And the answer."""

    views: torch.Tensor  # B 3 S S
    labels: torch.Tensor  # B int64

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The model's inputs."""
        return (self.views,)


class Task:
    """The base of all tasks. A task has `draw`, `ask` and `score`, see above."""

    classes = None  # None: an `Unmixer` answers; a number: a linear head on the encoder, with as many logits

    def __call__(self, images: torch.Tensor, rng: torch.Generator, labels: torch.Tensor | None = None):
        """images B 3 H H uint8, and the labels B int64 for a task that uses them -> a question."""
        return self.ask(images, send(self.draw(images, rng), images.device), labels)

    def validation(self) -> "Task":
        """The task that a run is validated with: itself."""
        return self


class WeightTask(Task):
    """The base of tasks that ask for weights.

    size        side of a view, px
    activation  "softmax": the weights as a distribution; "sigmoid": each weight by itself
    loss        "kl": cross-entropy less the entropy of the truth; "mse": squared error"""

    symmetric = False  # whether the loss asks the other way round too, see MixupTransform

    def __init__(self, size: int, activation: str, loss: str):
        for name, value, known in ("activation", activation, ACTIVATIONS), ("loss", loss, LOSSES):
            if value not in known:
                raise UsageError(f"{name} {value!r} is unknown: use one of {', '.join(known)}")
        self.size, self.activation, self.loss = size, activation, loss

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """logits B n -> predicted weights B n."""
        return logits.softmax(dim=1) if self.activation == "softmax" else logits.sigmoid()

    def logits_of(self, weights: torch.Tensor) -> torch.Tensor:
        """Inverse of `predict`: weights B n -> logits B n."""
        return weights.log() if self.activation == "softmax" else weights.logit()

    def score(self, logits: torch.Tensor | tuple, question: Question) -> dict[str, torch.Tensor]:
        """Logits B n, or a tuple, one for each of the weights -> means over the mixtures: loss, 0 when perfect;
        source_accuracy and weight_mae, in [0, 1]. Losses of several are added; the others are of the last."""
        several = isinstance(logits, tuple)
        tables = list(zip(logits, question.weights, strict=True)) if several else [(logits, question.weights)]
        mse = self.loss == "mse"
        errors = [(self.predict(t) - w).square() if mse else divergence(t, w, self.activation) for t, w in tables]
        losses = [error.mean() for error in errors]
        if self.symmetric:  # the first table, B B: row i is a mixture, column j is image j
            table, weights = tables[0]
            shares = weights.T / weights.sum(dim=0)[:, None]  # B B  of an image, over the mixtures
            losses[0] = (losses[0] + divergence(table.T, shares, "softmax").mean()) / 2
        table, weights = tables[-1]
        return {"loss": sum(losses), **compare(self.predict(table.detach()), weights)}

    def baselines(self) -> dict[str, Callable[[Question], dict[str, torch.Tensor]]]:
        """The uninformed guess, and least squares on the pixels."""
        return {
            "chance": lambda q: self.score(self.logits_of(guess(q)), q) | {"source_accuracy": chance(q)},
            "least squares on pixels": lambda q: compare(least_squares(q), q.weights),
        }


class MixupTransform(WeightTask):
    """Mix every image of a batch with others of it, and ask how much of each candidate is in the mixture.

    candidates  n >= 2: the k sources among n - k distractors in shuffled order; "batch": two questions about the same
                mixtures, one with every image of the batch as candidates, one with a few, so that the answers fit any
                number of them. Sources then stand one after another in the batch, which the loader shuffles.
    few         "batch": how many candidates the second question may have. One number is drawn for each batch, which
                is cut into blocks of as many images. Mixtures whose sources are all in one block are asked about that
                block. (): no second question
    sources     k >= 1 images in a mixture, the first the example itself; k = 1: the mixture is one of the candidates
    dist        the mixing distribution, any torch.distributions object with values in [0, 1]; uniform from 0.1 to 0.9.
                k = 2: weights w and 1 - w, w from dist; k > 2: stick-breaking, each source takes a share from dist of
                what the ones before it left, the last takes the rest. Shares stay within [1e-3, 1 - 1e-3].
                Mixing two images with a Beta weight: mixup (Zhang et al. 2018, section 2).
    views       the candidates show another view than the one that was mixed; else the very same pixels
    size        side of a view, px
    With "batch", softmax and kl it is asked the other way round, too: which share of this image is in each mixture?"""

    def __init__(
        self, candidates: int | str = "batch", sources: int = 2, dist: Distribution = SHARES, views: bool = True,
        size: int = 32, activation: str = "softmax", loss: str = "kl", few: tuple[int, ...] = FEW,
    ):  # fmt: skip
        super().__init__(size, activation, loss)
        if sources < 1:
            raise UsageError(f"sources is {sources}: a mixture holds at least 1 image")
        least = max(2, sources)
        if candidates != "batch" and candidates < least:
            problem = f"the {sources} sources are among them, so use {least} or more"
            raise UsageError(f"candidates is {candidates}: {problem}")
        self.symmetric = (candidates, activation, loss) == ("batch", "softmax", "kl")
        self.candidates, self.sources, self.views, self.dist, self.few = candidates, sources, views, dist, few

    def draw(self, images: torch.Tensor, rng: torch.Generator) -> list[torch.Tensor]:
        """Sources B k, weights B k, the answer, views; and unless the whole batch is asked about, candidates B n. The
        answer is B n, of blocks M n. Raises UsageError if the batch is too small."""
        B, k, n = len(images), self.sources, self.candidates
        if batch := n == "batch":  # the second question has n candidates
            fitting = [few for few in self.few if k <= few <= B] or [k]
            n = fitting[int(torch.randint(len(fitting), (), generator=rng))]
        if n > B:
            raise UsageError(f"{n} candidates need as many images in a batch, and this one has {B}")
        rows, inside, places = _inside(B, k, n) if batch else (self.draw_candidates(B, n, rng), None, None)
        shares = sample(self.dist, (k - 1, B), rng).clamp(SMALLEST_WEIGHT, 1 - SMALLEST_WEIGHT).numpy()
        weights = np.ones((B, k), np.float32)  # NumPy is faster with few numbers
        for source, share in enumerate(shares):  # B  of what the sources before it left
            weights[:, source] *= share
            weights[:, source + 1 :] *= 1 - share[:, None]
        views = draw_views(B * (2 if self.views else 1), rng)
        if batch:
            answer = np.zeros((len(inside), n), np.float32)
            answer[places] = weights[inside]
            return [rows, torch.from_numpy(weights), torch.from_numpy(answer), views]
        weights, order = torch.from_numpy(weights), torch.rand(B, n, generator=rng).argsort(dim=1)
        return [rows[:, :k], weights, F.pad(weights, (0, n - k)).gather(1, order), views, rows.gather(1, order)]

    def ask(self, images: torch.Tensor, drawn: list[torch.Tensor], labels: torch.Tensor | None = None) -> Question:
        """images B 3 H H uint8 and what `draw` returned, on one device -> Question."""
        B = len(images)
        sources, weights, answer, views, *candidates = drawn
        seen, *others = make_views(images, self.size, views)  # B 3 S S  the view that is mixed
        asked = others[0] if others else seen  # B 3 S S  the view asked about
        parts = seen.flatten(1)[sources]  # B k 3*S*S
        mixtures = (weights[:, None].to(parts.dtype) @ parts).view_as(seen)
        if candidates:
            return Question(mixtures, asked, *candidates, answer)
        every, n = weights.new_zeros(B, B).scatter_(1, sources, weights), answer.shape[1]
        questions = [((B, B), every), ((n, n - self.sources + 1), answer)]
        return Question(mixtures, asked, *zip(*questions[: 2 if self.few else 1], strict=True))

    def draw_candidates(self, B: int, n: int, rng: torch.Generator) -> torch.Tensor:
        """Rows of the batch, B n: the k sources, then n - k distractors. The images stand in a circle in random order,
        and all mixtures' candidates at the same n distances from their own image. So every image is in k mixtures."""
        circle = torch.randperm(B, generator=rng)
        steps = F.pad(1 + torch.randperm(B - 1, generator=rng)[: n - 1], (1, 0))  # n  the example itself comes first
        return circle[(torch.arange(B)[:, None] + steps) % B][circle.argsort()]

    def validation(self, n: int = 3) -> "MixupTransform":
        """The fixed question: n candidates (3 in a run), two sources (one if `sources` is 1), weights of 0.1 to 0.9."""
        return MixupTransform(n, min(2, self.sources), SHARES, self.views, self.size, self.activation, self.loss)


@functools.cache
def _inside(B: int, k: int, n: int) -> tuple[torch.Tensor, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The sources of B mixtures, neighbours in a batch, B k; which mixtures have all of them in one block of n, M; and
    where in the answer, M n, these are."""
    sources = (np.arange(B)[:, None] + np.arange(k)) % B
    inside = np.arange(B - B % n).reshape(-1, n)[:, : n - k + 1].ravel()
    return torch.from_numpy(sources), inside, (np.arange(len(inside))[:, None], sources[inside] % n)


class Duplicate(MixupTransform):
    """Mixtures of one image: which candidate is it?"""

    def __init__(self, candidates="batch", views=True, size=32, activation="softmax", loss="kl"):
        super().__init__(candidates, 1, views=views, size=size, activation=activation, loss=loss)


class Scale(WeightTask):
    """The easiest question about weights: the candidates are the image itself, scaled by the weights. It takes no
    recognition, only an eye for contrast. A network that fails it is broken."""

    def __init__(self, candidates: int = 3, size: int = 32, activation: str = "softmax", loss: str = "kl"):
        super().__init__(size, activation, loss)
        if candidates == "batch":
            raise ValueProblem("candidates", "batch", "is not for scale, which makes its own; give a number, such as 3")
        self.candidates = candidates

    def draw(self, images: torch.Tensor, rng: torch.Generator) -> list[torch.Tensor]:
        """The weights B n, the views, rows of the candidates B n."""
        B, n = len(images), self.candidates
        weights = torch.rand(B, n, generator=rng)
        return [weights / weights.sum(dim=1, keepdim=True), draw_views(B, rng), torch.arange(B * n).view(B, n)]

    def ask(self, images: torch.Tensor, drawn: list[torch.Tensor], labels: torch.Tensor | None = None) -> Question:
        """images B 3 H H uint8 and what `draw` returned -> Question with B * n views that candidates refer to."""
        weights, views, candidates = drawn
        seen = make_views(images, self.size, views)[0]  # B 3 S S
        asked = (weights[:, :, None, None, None] * seen[:, None]).flatten(0, 1)  # B*n 3 S S
        return Question(seen, asked, candidates, weights)


class LabelTask(Task):
    """The base of classification tasks."""

    classes = 4

    def __init__(self, size: int = 32):
        self.size = size

    def score(self, logits: torch.Tensor, question: LabelQuestion) -> dict[str, torch.Tensor]:
        """Means over the batch: loss (cross-entropy, nats) and accuracy."""
        right = logits.detach().argmax(dim=1) == question.labels
        return {"loss": F.cross_entropy(logits, question.labels), "accuracy": right.float().mean()}

    def baselines(self) -> dict[str, Callable[[LabelQuestion], dict[str, torch.Tensor]]]:
        """Chance."""
        n = self.classes
        return {"chance": lambda q: {"loss": torch.tensor(math.log(n)), "accuracy": torch.tensor(1 / n)}}

    def draw_labels(self, images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Random labels of a batch: B int64, on the CPU."""
        return torch.randint(self.classes, (len(images),), generator=rng)


class Quadrant(LabelTask):
    """Which quarter of the image is this? 0 top left, 1 top right, 2 bottom left, 3 bottom right."""

    def draw(self, images: torch.Tensor, rng: torch.Generator) -> list[torch.Tensor]:
        """The quarters B, and views of them."""
        quarters = self.draw_labels(images, rng)
        half = torch.full((len(images),), 0.5)
        return [quarters, draw_boxes(quarters % 2 * half, half, quarters // 2 * half, half)]

    def ask(self, images: torch.Tensor, drawn: list[torch.Tensor], labels: torch.Tensor | None = None) -> LabelQuestion:
        """images B 3 H H uint8 and what `draw` returned -> LabelQuestion."""
        quarters, views = drawn
        return LabelQuestion(make_views(images, self.size, views)[0], quarters)


class Rotate(LabelTask):
    """By how many quarter turns, counter-clockwise, is the view rotated? (Gidaris et al. 2018)"""

    def draw(self, images: torch.Tensor, rng: torch.Generator) -> list[torch.Tensor]:
        """The turns B, the views, and the numbers of the images."""
        return [self.draw_labels(images, rng), draw_views(len(images), rng), torch.arange(len(images))]

    def ask(self, images: torch.Tensor, drawn: list[torch.Tensor], labels: torch.Tensor | None = None) -> LabelQuestion:
        """images B 3 H H uint8 and what `draw` returned -> LabelQuestion."""
        turns, views, rows = drawn
        views = make_views(images, self.size, views)[0]
        turned = torch.stack([views.rot90(count, (2, 3)) for count in range(self.classes)])  # 4 B 3 S S
        return LabelQuestion(turned[turns, rows], turns)


class Classify(LabelTask):
    """Which class is the image labelled with? The downstream task.

    Trained with the logits shifted by the log of the class prior, and answered without the shift, so that rare classes
    count as much as frequent ones: logit adjustment (Menon et al. 2021, equation 10).

    counts  images of each class in the training set, C
    size    side of a view, px; None if features come in place of images"""

    def __init__(self, counts: torch.Tensor, size: int | None):
        self.classes, self.size = len(counts), size
        self.log_prior = (counts / counts.sum()).log()  # C

    def draw(self, images: torch.Tensor, rng: torch.Generator) -> list[torch.Tensor]:
        """The views, if any."""
        return [draw_views(len(images), rng)] if self.size else []

    def ask(self, images: torch.Tensor, drawn: list[torch.Tensor], labels: torch.Tensor | None = None) -> LabelQuestion:
        """images B 3 H H uint8 (or features B D), labels B int64 -> LabelQuestion."""
        return LabelQuestion(make_views(images, self.size, *drawn)[0] if self.size else images, labels)

    def score(self, logits: torch.Tensor, question: LabelQuestion) -> dict[str, torch.Tensor]:
        """Means over the batch: loss (cross-entropy of the shifted logits, nats) and accuracy."""
        self.log_prior = self.log_prior.to(logits.device)  # is copied once
        return super().score(logits + self.log_prior, question)


def sample(dist: Distribution, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Draw from a torch distribution, which takes no generator, as if it took `rng`. The global state stays."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        return dist.sample(shape).float().cpu()
    finally:
        torch.set_rng_state(state)


def divergence(logits: torch.Tensor, weights: torch.Tensor, activation: str) -> torch.Tensor:
    """Cross-entropy of the predicted weights, less the entropy of the true ones: B, in nats, 0 when perfect. That is
    the Kullback-Leibler divergence; with "sigmoid", the sum over the candidates, each a yes or no."""
    if activation == "softmax":
        return F.kl_div(logits.log_softmax(dim=1), weights, reduction="none").sum(dim=1)
    cross = F.binary_cross_entropy_with_logits(logits, weights, reduction="none").sum(dim=1)
    return cross + (torch.xlogy(weights, weights) + torch.xlogy(1 - weights, 1 - weights)).sum(dim=1)


def compare(predicted: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Predicted against true weights, B n each.

    source_accuracy  share of mixtures whose heaviest predicted candidates are exactly the sources
    weight_mae       mean absolute error over all candidates"""
    source = weights > 0
    lightest_source = predicted.masked_fill(~source, float("inf")).amin(dim=1)
    heaviest_other = predicted.masked_fill(source, float("-inf")).amax(dim=1)
    right = (lightest_source > heaviest_other).mean(dtype=torch.float32)
    return {"source_accuracy": right, "weight_mae": (predicted - weights).abs().mean()}


def least_squares(question: Question) -> torch.Tensor:
    """The weights, B n, with which the candidates' pixels come closest to the mixture's: what needs no learning."""
    mixtures = question.mixtures.flatten(1)[:, :, None]  # B P 1
    candidates = question.asked.flatten(1)[question.candidates].transpose(1, 2)  # B P n
    # On the CPU, whose solver takes candidates that are equal, or multiples of each other.
    return torch.linalg.lstsq(candidates.cpu(), mixtures.cpu()).solution[:, :, 0].to(candidates.device)


def guess(question: Question) -> torch.Tensor:
    """The uninformed guess of the weights, B n: the same for every candidate."""
    return torch.full_like(question.weights, 1 / question.weights.shape[1])


def chance(question: Question) -> torch.Tensor:
    """The share of mixtures whose sources are named right by picking as many candidates at random."""
    n = question.weights.shape[1]
    shares = torch.tensor([1 / math.comb(n, k) for k in range(n + 1)], device=question.weights.device)
    return shares[(question.weights > 0).sum(dim=1)].mean()


TASKS = {"mixup": MixupTransform, "scale": Scale, "duplicate": Duplicate, "quadrant": Quadrant, "rotate": Rotate}


def settings_of(task: str) -> set[str]:
    """The names of the settings that the task of this name takes."""
    return set(inspect.signature(TASKS[task]).parameters)
