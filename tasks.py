"""Pretext tasks: each turns a batch of images into a question with its answer, on the device.

task(images, rng)            -> question: what the network is shown, and the answer
model(*question.inputs)      -> logits
task.score(logits, question) -> {"loss": ..., ...}: scalars, still on the device
task.validation()            -> the task that a run is validated with, whatever it trained with
task.baselines()             -> {name: question -> scores}: what needs no network
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributions import Beta, Distribution, Uniform

from augment import CROP, augment, box, send
from errors import UsageError

TASKS = ("mixup", "scale", "duplicate", "quadrant", "rotate")
ACTIVATIONS = ("softmax", "sigmoid")
LOSSES = ("kl", "mse")
SMALLEST_WEIGHT = 1e-3


class Question(NamedTuple):
    """How much of each candidate is in the mixture? And the answer."""

    mixtures: torch.Tensor  # B 3 S S
    asked: torch.Tensor  # A 3 S S  the views that candidates refer to
    candidates: torch.Tensor  # B n int64  rows of asked
    weights: torch.Tensor  # B n  the answer; each row sums to one

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the network is shown."""
        return self.mixtures, self.asked, self.candidates


class LabelQuestion(NamedTuple):
    """Which class does the view belong to? And the answer."""

    views: torch.Tensor  # B 3 S S
    labels: torch.Tensor  # B int64

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the network is shown."""
        return (self.views,)


class WeightTask:
    """What tasks that ask for weights share: how an answer is scored. `classes` is None: an `Unmixer` answers.

    activation  "softmax": the weights as a distribution; "sigmoid": each weight by itself
    loss        "kl": cross-entropy less the entropy of the truth; "mse": squared error
    """

    classes = None
    takes_labels = False

    def __init__(self, size: int, activation: str, loss: str):
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation {activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}")
        if loss not in LOSSES:
            raise UsageError(f"loss {loss!r} is unknown: use one of {', '.join(LOSSES)}")
        self.size, self.activation, self.loss = size, activation, loss

    def predict(self, logits: torch.Tensor) -> torch.Tensor:
        """logits B n -> predicted weights B n."""
        return logits.softmax(dim=1) if self.activation == "softmax" else logits.sigmoid()

    def _logits(self, weights):
        """Those that predict these weights."""
        return weights.log() if self.activation == "softmax" else weights.logit()

    def score(self, logits: torch.Tensor, question: Question) -> dict[str, torch.Tensor]:
        """Means over the batch: loss (0 when perfect), source_accuracy and weight_mae, both in [0, 1]."""
        if self.loss == "mse":
            loss = (self.predict(logits) - question.weights).square().mean()
        else:
            loss = unmixing_loss(logits, question.weights, self.activation)
        return {"loss": loss, **compare(self.predict(logits.detach()), question.weights)}

    def validation(self) -> "WeightTask":
        """The task itself."""
        return self

    def baselines(self) -> dict[str, Callable[[Question], dict[str, torch.Tensor]]]:
        """The uninformed guess, and least squares on the pixels."""
        return {
            "chance": lambda q: self.score(self._logits(guess(q)), q) | {"source_accuracy": chance(q)},
            "least squares on pixels": lambda q: compare(least_squares(q), q.weights),
        }


class MixupTransform(WeightTask):
    """Mix every image of a batch with others of it, and ask how much of each candidate is in the mixture.

    candidates  n >= 2, the k sources among n - k distractors in shuffled order; or "batch": every image of the batch
    sources     k >= 1, images in a mixture, the first the example itself; k = 1: the mixture is one of the candidates
    dist        the mixing distribution, any torch.distributions object with values in [0, 1].
                k = 2: weights w and 1 - w, w from dist; k > 2: stick-breaking, each source takes a share from dist of
                what the ones before it left, the last takes the rest. Shares stay within [1e-3, 1 - 1e-3].
                Mixing two images with a Beta weight: mixup (Zhang et al. 2018, section 2).
    views       the candidates show another view than the one that was mixed; else the very same pixels
    size        side of a view, px
    pure        share of mixtures that hold the example alone, in [0, 1]
    symmetric   ask the other way round too: how much of each mixture comes from this candidate? ("batch" only; there it
                is the default with softmax and kl)
    regions     share of the mixtures in which a box of one image is pasted into the other (CutMix, Yun et al. 2019),
                its area being the weight; k = 2 only
    contrast    ask about the seen views themselves as well, B more rows with a weight of one ("batch" only)
    crop        smallest share of an image that a view shows, in (0, 1]
    """

    def __init__(
        self,
        candidates: int | str = "batch",
        sources: int = 2,
        dist: Distribution | None = None,
        views: bool = True,
        size: int = 32,
        activation: str = "softmax",
        loss: str = "kl",
        pure: float = 0.0,
        symmetric: bool | None = None,
        regions: float = 0.0,
        contrast: bool = False,
        crop: float = CROP,
    ):
        super().__init__(size, activation, loss)
        if sources < 1:
            raise UsageError(f"sources is {sources}: a mixture holds at least 1 image")
        if candidates != "batch" and candidates < max(2, sources):
            raise UsageError(
                f"candidates is {candidates}: the {sources} sources are among them, so use {max(2, sources)} or more"
            )
        if (symmetric or contrast) and candidates != "batch":
            name = "symmetric" if symmetric else "contrast"
            raise UsageError(f"--{name} needs every image of the batch among the candidates: add --candidates batch")
        if regions and sources != 2:
            raise UsageError(f"--regions pastes one image into another: it takes 2 --sources, not {sources}")
        if symmetric and (activation, loss) != ("softmax", "kl"):
            raise UsageError(
                "--symmetric asks the other way round with softmax and kl alone; leave it out, or use those"
            )
        self.candidates, self.sources, self.views = candidates, sources, views
        usual = candidates == "batch" and (activation, loss) == ("softmax", "kl")
        self.symmetric = usual if symmetric is None else symmetric
        self.pure, self.regions, self.contrast, self.crop = pure, regions, contrast, crop
        self.dist = dist if dist is not None else Uniform(0.0, 1.0)

    def __call__(self, images: torch.Tensor, rng: torch.Generator) -> Question:
        """images B 3 H W uint8 -> Question; raises UsageError where the batch is smaller than the candidates."""
        B, device = len(images), images.device
        n = B if self.candidates == "batch" else self.candidates
        if max(n, self.sources) > B:
            raise UsageError(f"{max(n, self.sources)} candidates need as many images in a batch, and this one has {B}")
        rows, drawn = self._draw(B, n, rng)
        rows, weights = send(rows, device), send(drawn, device)

        seen = augment(images, self.size, rng, self.crop)  # B 3 S S  the view that is mixed
        asked = augment(images, self.size, rng, self.crop) if self.views else seen  # B 3 S S  what is asked about
        k = self.sources
        mixtures = sum(weights[:, j, None, None, None] * seen[rows[:, j]] for j in range(k))
        if self.regions:
            masks, areas = self._boxes(drawn[:, 1], rng)
            pasted = (torch.rand(B, generator=rng) < self.regions) & (drawn[:, 1] > 0)
            masks, areas, pasted = (send(t, device) for t in (masks, areas, pasted))
            boxed = torch.where(masks[:, None], seen[rows[:, 1]], seen)
            mixtures = torch.where(pasted[:, None, None, None], boxed, mixtures)
            weights = torch.where(pasted[:, None], torch.stack([1 - areas, areas], dim=1), weights)

        if self.candidates == "batch":
            candidates = torch.arange(B, device=device).expand(B, B)
            answer = torch.zeros(B, B, device=device).scatter_(1, rows[:, :k], weights)
            if self.contrast:
                mixtures, candidates = torch.cat([mixtures, seen]), candidates[:1].expand(2 * B, B)
                answer = torch.cat([answer, torch.eye(B, device=device)])
        else:
            order = send(torch.rand(B, n, generator=rng).argsort(dim=1), device)
            candidates = rows.gather(1, order)
            answer = F.pad(weights, (0, n - k)).gather(1, order)
        return Question(mixtures, asked, candidates, answer)

    def _draw(self, B: int, n: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the batch, B n: the k sources, then the distractors ("batch": B k); the sources' weights, B k."""
        width = self.sources if self.candidates == "batch" else n
        keys = torch.rand(B, B, generator=rng).fill_diagonal_(-1)  # the example itself comes first
        rows = keys.topk(width, dim=1, largest=False).indices
        left = torch.ones(B)
        weights = []
        for share in sample(self.dist, (self.sources - 1, B), rng):
            weights.append(left * share.clamp(SMALLEST_WEIGHT, 1 - SMALLEST_WEIGHT))
            left = left - weights[-1]
        weights = torch.stack([*weights, left], dim=1)  # B k
        if self.pure:
            alone = torch.rand(B, generator=rng) < self.pure
            weights[alone] = torch.eye(self.sources)[0]
        return rows, weights

    def _boxes(self, areas, rng):
        """Boxes of these shares of a view, as masks B S S, and the shares that they really have, B, less than all."""
        S = self.size
        aspect = (torch.rand(len(areas), generator=rng) * 2 - 1).mul(math.log(2)).exp().sqrt()
        height = (areas.sqrt() * aspect * S).round().clamp(1, S)
        width = (areas.sqrt() / aspect * S).round().clamp(1, S - 1)
        top = (torch.rand(len(areas), generator=rng) * (S - height + 1)).floor()
        left = (torch.rand(len(areas), generator=rng) * (S - width + 1)).floor()
        line = torch.arange(S)
        rows = (line >= top[:, None]) & (line < (top + height)[:, None])
        columns = (line >= left[:, None]) & (line < (left + width)[:, None])
        masks = rows[:, :, None] & columns[:, None]
        return masks, masks.float().mean(dim=(1, 2))

    def score(self, logits: torch.Tensor, question: Question) -> dict[str, torch.Tensor]:
        """As of any weight task; `symmetric`: the loss is the mean of both directions'."""
        scores = super().score(logits, question)
        if self.symmetric:  # B B: row i, a mixture; column j, image j
            shares = question.weights.T / question.weights.sum(dim=0)[:, None]
            scores["loss"] = (scores["loss"] + unmixing_loss(logits.T, shares, "softmax")) / 2
        return scores

    def validation(self) -> "MixupTransform":
        """The question that is the same for every run, so that figures compare: two of three candidates, weights from
        0.1 to 0.9. (A run on mixtures of one image is asked for that one among three.)"""
        sources = min(2, self.sources)
        return MixupTransform(3, sources, Uniform(0.1, 0.9), self.views, self.size, self.activation, self.loss)


class Scale(WeightTask):
    """The easiest question about weights: the candidates are the image itself, scaled by the weights.

    It takes no recognition at all, only an eye for contrast; a network that fails it is broken.
    """

    def __init__(self, candidates: int = 3, size: int = 32, activation: str = "softmax", loss: str = "kl"):
        super().__init__(size, activation, loss)
        self.candidates = candidates

    def __call__(self, images: torch.Tensor, rng: torch.Generator) -> Question:
        """images B 3 H W uint8 -> Question with B * n rows to ask about."""
        B, n = len(images), self.candidates
        weights = send(torch.rand(B, n, generator=rng), images.device)
        weights = weights / weights.sum(dim=1, keepdim=True)
        seen = augment(images, self.size, rng)  # B 3 S S
        asked = (weights[:, :, None, None, None] * seen[:, None]).flatten(0, 1)  # B*n 3 S S
        return Question(seen, asked, torch.arange(B * n, device=images.device).view(B, n), weights)


class LabelTask:
    """What classification tasks share: a linear head on the encoder answers, with `classes` logits."""

    classes = 4
    takes_labels = False

    def __init__(self, size: int = 32):
        self.size = size

    def score(self, logits: torch.Tensor, question: LabelQuestion) -> dict[str, torch.Tensor]:
        """Means over the batch: loss (cross-entropy, nats) and accuracy."""
        right = logits.detach().argmax(dim=1) == question.labels
        return {"loss": F.cross_entropy(logits, question.labels), "accuracy": right.float().mean()}

    def validation(self) -> "LabelTask":
        """The task itself."""
        return self

    def baselines(self) -> dict[str, Callable[[LabelQuestion], dict[str, torch.Tensor]]]:
        """Chance."""
        n = self.classes
        return {"chance": lambda q: {"loss": torch.tensor(math.log(n)), "accuracy": torch.tensor(1 / n)}}

    def _labels(self, images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        return send(torch.randint(self.classes, (len(images),), generator=rng), images.device)


class Quadrant(LabelTask):
    """Which quarter of the image is this? 0 top left, 1 top right, 2 bottom left, 3 bottom right."""

    def __call__(self, images: torch.Tensor, rng: torch.Generator) -> LabelQuestion:
        """images B 3 H W uint8 -> LabelQuestion."""
        labels = self._labels(images, rng)
        half = torch.full((len(images),), 0.5, device=images.device)
        return LabelQuestion(box(images, labels % 2 * half, half, labels // 2 * half, half, self.size), labels)


class Rotate(LabelTask):
    """By how many quarter turns, counter-clockwise, is the view rotated? (Gidaris et al. 2018)"""

    def __init__(self, size: int = 32, crop: float = CROP):
        super().__init__(size)
        self.crop = crop

    def __call__(self, images: torch.Tensor, rng: torch.Generator) -> LabelQuestion:
        """images B 3 H W uint8 -> LabelQuestion."""
        labels = self._labels(images, rng)
        views = augment(images, self.size, rng, self.crop)
        turned = torch.stack([views.rot90(turns, (2, 3)) for turns in range(self.classes)])  # 4 B 3 S S
        return LabelQuestion(turned[labels, torch.arange(len(images), device=images.device)], labels)


class Classify(LabelTask):
    """Which class is the image labelled with? The downstream task.

    Trained with the logits shifted by the log of the class prior, and answered without the shift, so that rare classes
    count as much as frequent ones: logit adjustment (Menon et al. 2021, equation 10).

    counts  images of each class in the training set
    size    side of a view, px; None where the encoder's features come in place of the images
    """

    takes_labels = True

    def __init__(self, counts: torch.Tensor, size: int | None):
        self.classes, self.size = len(counts), size
        self.log_prior = (counts / counts.sum()).log()  # C

    def __call__(self, images: torch.Tensor, rng: torch.Generator, labels: torch.Tensor) -> LabelQuestion:
        """images B 3 H W uint8 (or features B D), labels B int64 -> LabelQuestion."""
        return LabelQuestion(augment(images, self.size, rng) if self.size else images, labels)

    def score(self, logits: torch.Tensor, question: LabelQuestion) -> dict[str, torch.Tensor]:
        """Means over the batch: loss (cross-entropy of the shifted logits, nats) and accuracy."""
        return super().score(logits + send(self.log_prior, logits.device), question)


def build_task(
    name: str,
    candidates: int | str = "batch",
    sources: int = 2,
    views: bool = True,
    size: int = 32,
    activation: str = "softmax",
    loss: str = "kl",
    **mixing,
) -> WeightTask | LabelTask:
    """The task of that name, one of TASKS. Raises UsageError where the settings make no sense."""
    beta = mixing.pop("beta", None)
    if name in ("mixup", "duplicate"):
        dist = Beta(beta, beta) if beta else None
        return MixupTransform(
            candidates, 1 if name == "duplicate" else sources, dist, views, size, activation, loss, **mixing
        )
    if name == "scale":
        if candidates == "batch":
            raise UsageError("--task scale makes its own candidates: give their number, such as --candidates 3")
        return Scale(candidates, size, activation, loss)
    if name not in TASKS:
        raise UsageError(f"task {name!r} is unknown: use one of {', '.join(TASKS)}")
    return Rotate(size, mixing.get("crop", CROP)) if name == "rotate" else Quadrant(size)


def sample(dist: Distribution, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Draw from a torch distribution, which takes no generator, as if it took `rng`. The global state stays."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        return dist.sample(shape).float().cpu()
    finally:
        torch.set_rng_state(state)


def unmixing_loss(logits: torch.Tensor, weights: torch.Tensor, activation: str) -> torch.Tensor:
    """Mean of the divergence over the batch: a scalar in nats, 0 when perfect."""
    return divergence(logits, weights, activation).mean()


def divergence(logits: torch.Tensor, weights: torch.Tensor, activation: str) -> torch.Tensor:
    """Cross-entropy of the predicted weights, less the entropy of the true ones: B, in nats, 0 when perfect.

    That is the Kullback-Leibler divergence from the prediction to the truth; with "sigmoid", the sum of those of the
    candidates, each a yes or no.
    """
    if activation == "softmax":
        cross = -(weights * logits.log_softmax(dim=1)).sum(dim=1)  # B
        entropy = -torch.xlogy(weights, weights).sum(dim=1)
    else:
        cross = F.binary_cross_entropy_with_logits(logits, weights, reduction="none").sum(dim=1)
        entropy = -(torch.xlogy(weights, weights) + torch.xlogy(1 - weights, 1 - weights)).sum(dim=1)
    return cross - entropy


def compare(predicted: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Predicted against true weights, B n each.

    source_accuracy  share of mixtures whose heaviest predicted candidates are exactly the sources
    weight_mae       mean absolute error over all candidates
    """
    source = weights > 0
    lightest_source = predicted.masked_fill(~source, float("inf")).amin(dim=1)
    heaviest_other = predicted.masked_fill(source, float("-inf")).amax(dim=1)
    return {
        "source_accuracy": (lightest_source > heaviest_other).float().mean(),
        "weight_mae": (predicted - weights).abs().mean(),
    }


def least_squares(question: Question) -> torch.Tensor:
    """The weights, B n, with which the candidates' pixels come closest to the mixture's: what needs no learning."""
    mixtures = question.mixtures.flatten(1)[:, :, None]  # B P 1
    candidates = question.asked.flatten(1)[question.candidates].transpose(1, 2)  # B P n
    return torch.linalg.lstsq(candidates, mixtures).solution[:, :, 0]


def guess(question: Question) -> torch.Tensor:
    """The uninformed guess of the weights, B n: the same for every candidate."""
    return torch.full_like(question.weights, 1 / question.weights.shape[1])


def chance(question: Question) -> torch.Tensor:
    """The share of mixtures whose sources are named right by picking as many candidates at random."""
    n = question.weights.shape[1]
    shares = torch.tensor([1 / math.comb(n, k) for k in range(n + 1)], device=question.weights.device)
    return shares[(question.weights > 0).sum(dim=1)].mean()
