"""Transfer: what an encoder is worth when there are few labels.

    open_start(word)                       -> Start: a pretrained encoder
    classify(start, data, recipe, ...)     -> Answer: what each validation image was taken for
    answer.accuracies(labels)              -> the three figures that are reported

The protocol is fast.ai's Image网: train on every class of `train/`, validate on `val/`, which holds some of them only,
at the last epoch, without test-time tricks. The classes of `val/` have a tenth of the labels that the others have, so
what is reported is corrected for the class prior; the figure without the correction stands beside it.
"""

import hashlib
import json
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoint
from augment import whole
from data import Images, get_dataloaders
from engine import BLOCK, Trainer, features
from errors import UsageError
from models import ENCODERS, Classifier, build_encoder
from tasks import Classify, LabelQuestion

MODES = ("finetune", "linear", "knn")
NEIGHBOURS = 20


@dataclass
class Start:
    """Where a classifier starts from."""

    name: str  # as it was asked for
    encoder: str  # one of models.ENCODERS
    size: int  # side of a view, px
    data: str  # what it was pretrained on
    state: dict | None  # the encoder's weights; None: random ones

    def fingerprint(self) -> str:
        """Another one for other weights."""
        digest = hashlib.sha256(self.encoder.encode())
        for name, value in (self.state or {}).items():
            digest.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def build(self, seed: int) -> nn.Module:
        """The encoder, with `out_features`; from scratch its weights depend on the seed."""
        torch.manual_seed(seed)
        encoder = build_encoder(self.encoder)
        if self.state is not None:
            encoder.load_state_dict(self.state)
        return encoder


@dataclass
class Labelled:
    """A labelled data set, and what of it is trained on and validated on."""

    images: Images
    train: list[int]  # rows
    val: list[int]  # rows

    @property
    def counts(self) -> torch.Tensor:
        """Training images of each class: C."""
        return self.images.labels[self.train].bincount(minlength=len(self.images.listing.classes))

    @property
    def held(self) -> torch.Tensor:
        """The classes that the validation images belong to, sorted: H."""
        return self.images.labels[self.val].unique()


@dataclass
class Answer:
    """What each of M validation images was taken for: a class, M int64, in three ways, and how sure."""

    all_classes: torch.Tensor  # among all classes, corrected for the class prior
    uncorrected: torch.Tensor  # among all classes, not corrected
    val_classes: torch.Tensor  # among the classes of the validation images
    confidence: torch.Tensor  # M float  share of the first in [0, 1]

    def accuracies(self, labels: torch.Tensor) -> dict[str, float]:
        """Shares of the images that were taken for what they are: labels M."""
        ways = {
            "accuracy": self.all_classes,
            "accuracy_val_classes": self.val_classes,
            "accuracy_uncorrected": self.uncorrected,
        }
        return {name: (classes == labels).float().mean().item() for name, classes in ways.items()}


def open_start(word: str) -> Start:
    """A pretext run's folder, or an `encoder.pt` with the run's `settings.json` beside it -> Start.

    Raises UsageError where there is none, or where the weights do not fit the encoder that the settings name.
    """
    file = Path(word, "encoder.pt") if Path(word).is_dir() else Path(word)
    if not file.is_file():
        what = "holds no encoder.pt; did its run end?" if Path(word).is_dir() else "is not there"
        raise UsageError(f"{word} {what} (a start is a pretext run's folder, an encoder.pt, or `scratch`)")
    settings = file.parent / "settings.json"
    try:
        said = json.loads(settings.read_text())["settings"]
        start = Start(word, said["encoder"], operator.index(said["size"]), os.fspath(said["data"]), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{settings} does not say how {file.name} was trained ({type(error).__name__}: {error}); "
            "keep the two files of a run together"
        ) from error
    if start.encoder not in ENCODERS:
        raise UsageError(f"{settings} names the encoder {start.encoder!r}; use one of {', '.join(ENCODERS)}")
    start.state = checkpoint.load(file)
    checkpoint.fit(build_encoder(start.encoder), start.state, f"{file}, an encoder {start.encoder!r} by its settings,")
    return start


@dataclass
class Recipe:
    """How a start is turned into a classifier, and where."""

    mode: str  # one of MODES
    size: int  # side of a view, px
    device: torch.device
    amp: bool  # compute in bf16
    epochs: int
    batch_size: int
    lr: float  # of the head
    encoder_rate: float  # finetune: the encoder's learning rate as a share of the head's
    freeze: int  # finetune: epochs in which the head learns first, on the features of the encoder as it is


def classify(
    start: Start, data: Labelled, recipe: Recipe, seed: int, report: Callable, after_step: Callable | None = None
) -> Answer:
    """One run. `report(epoch, means)` is called after every epoch of training, counted from 1."""
    encoder = start.build(seed)
    if start.state is None:
        _settle(encoder, data, recipe)
    model = Classifier(encoder, len(data.counts))
    if recipe.mode == "finetune" and not recipe.freeze:
        return _train(model, data, recipe, seed, report, after_step)
    train, val = (
        features(encoder, data.images.pixels, rows, recipe.size, recipe.device, recipe.amp)
        for rows in (data.train, data.val)
    )
    if recipe.mode == "knn":
        return knn(train, data.images.labels[data.train], val, data.counts, data.held)

    table = torch.empty(len(data.images.labels), train.shape[1])
    table[data.train], table[data.val] = train, val
    featured = replace(data, images=replace(data.images, pixels=table.numpy()))  # features take the pixels' place
    if recipe.mode == "linear":
        return _train(model.head, featured, recipe, seed, report, after_step)
    _train(model.head, featured, replace(recipe, epochs=recipe.freeze), seed, lambda epoch, means: None, after_step)
    return _train(model, data, recipe, seed, report, after_step)


def knn(
    train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, counts: torch.Tensor, held: torch.Tensor
) -> Answer:
    """The classes that most of the 20 nearest training images belong to, by the cosine of their features.

    Corrected: a vote counts by the inverse of how frequent its class is in training. Among the classes of the
    validation images: corrected as well, and the neighbours are searched among the training images of these classes.

    train N D with labels N, queries M D, counts C (training images of each class), held H (classes of the queries)
    """
    frequency = counts.clamp(min=1)
    votes = _votes(train, labels, queries, len(counts))  # M C
    corrected = votes / frequency
    among = torch.isin(labels, held)
    within = _votes(train[among], labels[among], queries, len(counts)) / frequency
    confidence = (corrected / corrected.sum(dim=1, keepdim=True)).amax(dim=1)
    return Answer(corrected.argmax(dim=1), votes.argmax(dim=1), within.argmax(dim=1), confidence)


def _votes(train, labels, queries, classes):
    """M C  the votes that each class gets; a vote weighs a little less the farther away it is, which settles ties."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(train, dim=1).T  # M N
    near = similarity.topk(min(NEIGHBOURS, len(train)), dim=1).indices  # M k
    weight = 1 - 1e-3 * torch.arange(near.shape[1])
    return torch.zeros(len(queries), classes).scatter_add_(1, labels[near], weight.expand(near.shape))


@torch.no_grad()
def _settle(encoder, data, recipe, batches=10):
    """Let the statistics of batch normalisation meet some images, without which eval mode means nothing."""
    encoder.to(recipe.device, memory_format=torch.channels_last).train()
    batches = min(batches, max(1, len(data.train) // 2))  # of two images at least
    for batch in range(batches):
        rows = data.train[batch::batches][:BLOCK]
        with torch.autocast(recipe.device.type, torch.bfloat16, enabled=recipe.amp):
            encoder(whole(torch.from_numpy(data.images.pixels[rows]).to(recipe.device), recipe.size))


def _train(model, data, recipe, seed, report, after_step) -> Answer:
    """A Classifier on images, or a linear head on features, trained on random views or features as they are."""
    on_images = isinstance(model, Classifier)
    task = Classify(data.counts, recipe.size if on_images else None)
    batch_size = min(recipe.batch_size, len(data.train))
    loader, val_loader = get_dataloaders(data.images, data.train, data.val, batch_size, seed, recipe.device)
    trainer = Trainer(
        model,
        task,
        lr=recipe.lr,
        steps=recipe.epochs * len(loader),
        seed=seed,
        device=recipe.device,
        amp=recipe.amp and on_images,
        encoder_rate=recipe.encoder_rate,
    )
    total = recipe.epochs * len(loader) * batch_size
    with tqdm(total=total, unit="image", unit_scale=True, leave=False, disable=None) as bar:
        for epoch in range(recipe.epochs):
            report(epoch + 1, trainer.train_epoch(loader, epoch, bar, after_step))
    logits = []
    for images, _ in val_loader:
        images = images.to(recipe.device)
        views = whole(images, recipe.size) if on_images else images
        logits.append(trainer.answer(LabelQuestion(views, None)).cpu())
    logits = torch.cat(logits)  # M C
    within = data.held[logits[:, data.held].argmax(dim=1)]
    confidence = logits.softmax(dim=1).amax(dim=1)
    return Answer(logits.argmax(dim=1), (logits + task.log_prior).argmax(dim=1), within, confidence)
