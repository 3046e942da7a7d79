"""Pretext tasks: each turns a batch of images into a question with its answer, on the device.

task(images, rng)           -> question         what the network is shown, and the answer
model(*question.inputs)     -> logits
task.score(logits, question) -> {"loss": ..., ...}  scalars, still on the device
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.distributions import Distribution, Uniform

from augment import augment, send
from errors import UsageError

ACTIVATIONS = ("softmax", "sigmoid")
SMALLEST_WEIGHT = 1e-3


class Question(NamedTuple):
    """What an unmixing network is asked, and the answer."""

    mixtures: torch.Tensor  # B 3 S S
    asked: torch.Tensor  # A 3 S S  the views that candidates refer to
    candidates: torch.Tensor  # B n int64  rows of asked
    weights: torch.Tensor  # B n  the answer; each row sums to one

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.mixtures, self.asked, self.candidates


class MixupTransform:
    """Mix every image of a batch with others of it, and ask how much of each candidate is in the mixture.

    candidates  n >= 2, the k sources among n - k distractors in shuffled order; or "batch": every image of the batch
    sources     k >= 2, images in a mixture; the first is the example itself
    dist        the mixing distribution, any torch.distributions object with values in [0, 1].
                k = 2: weights w and 1 - w, w from dist; k > 2: stick-breaking, each source takes a share from dist of
                what the ones before it left, the last takes the rest. Weights stay within [1e-3, 1 - 1e-3].
                Mixing two images with a Beta weight: mixup (Zhang et al. 2018, section 2).
    views       the candidates show another view than the one that was mixed; else the very same pixels
    size        side of a view, px
    activation  "softmax": the weights as a distribution; "sigmoid": each weight by itself
    """

    def __init__(
        self,
        candidates: int | str = "batch",
        sources: int = 2,
        dist: Distribution | None = None,
        views: bool = True,
        size: int = 32,
        activation: str = "softmax",
    ):
        if sources < 2:
            raise UsageError(f"sources is {sources}: a mixture needs at least 2 images")
        if candidates != "batch" and candidates < max(2, sources):
            raise UsageError(
                f"candidates is {candidates}: the {sources} sources are among them, so use {max(2, sources)} or more"
            )
        if activation not in ACTIVATIONS:
            raise UsageError(f"activation {activation!r} is unknown: use one of {', '.join(ACTIVATIONS)}")
        self.candidates, self.sources = candidates, sources
        self.dist = dist if dist is not None else Uniform(0.0, 1.0)
        self.views, self.size, self.activation = views, size, activation

    def __call__(self, images: torch.Tensor, rng: torch.Generator) -> Question:
        """images B 3 H W uint8 -> Question; raises UsageError where the batch is smaller than the candidates."""
        B, device = len(images), images.device
        n = B if self.candidates == "batch" else self.candidates
        if max(n, self.sources) > B:
            raise UsageError(f"{max(n, self.sources)} candidates need as many images in a batch, and this one has {B}")
        rows, weights = self._draw(B, n, rng)
        rows, weights = send(rows, device), send(weights, device)

        seen = augment(images, self.size, rng)  # B 3 S S  the view that is mixed
        asked = augment(images, self.size, rng) if self.views else seen  # B 3 S S  the view that is asked about
        k = self.sources
        mixtures = sum(weights[:, j, None, None, None] * seen[rows[:, j]] for j in range(k))

        if self.candidates == "batch":
            candidates = torch.arange(B, device=device).expand(B, B)
            answer = torch.zeros(B, B, device=device).scatter_(1, rows[:, :k], weights)
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
        return rows, torch.stack([*weights, left], dim=1)

    def score(self, logits: torch.Tensor, question: Question) -> dict[str, torch.Tensor]:
        """Means over the batch: loss (0 when perfect), source_accuracy and weight_mae, both in [0, 1]."""
        loss = unmixing_loss(logits, question.weights, self.activation)
        predicted = predict(logits.detach(), self.activation)
        return {"loss": loss, **compare(predicted, question.weights)}


def sample(dist: Distribution, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Draw from a torch distribution, which takes no generator, as if it took `rng`. The global state stays."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        return dist.sample(shape).float().cpu()
    finally:
        torch.set_rng_state(state)


def predict(logits: torch.Tensor, activation: str) -> torch.Tensor:
    """logits B n -> predicted weights B n."""
    return logits.softmax(dim=1) if activation == "softmax" else logits.sigmoid()


def unmixing_loss(logits: torch.Tensor, weights: torch.Tensor, activation: str) -> torch.Tensor:
    """Cross-entropy of the predicted weights, less the entropy of the true ones: a scalar in nats, 0 when perfect.

    That is the Kullback-Leibler divergence from the prediction to the truth; with "sigmoid", the sum of those of the
    candidates, each a yes or no.
    """
    if activation == "softmax":
        cross = -(weights * logits.log_softmax(dim=1)).sum(dim=1)  # B
        entropy = -torch.xlogy(weights, weights).sum(dim=1)
    else:
        cross = F.binary_cross_entropy_with_logits(logits, weights, reduction="none").sum(dim=1)
        entropy = -(torch.xlogy(weights, weights) + torch.xlogy(1 - weights, 1 - weights)).sum(dim=1)
    return (cross - entropy).mean()


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


def validation_task(views: bool, size: int, activation: str) -> MixupTransform:
    """The question that every run is validated with, whatever it trained with, so that figures compare."""
    return MixupTransform(3, 2, Uniform(0.1, 0.9), views, size, activation)
