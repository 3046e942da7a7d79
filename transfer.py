"""Classifiers from encoders: where they start from, fine-tuning, and probes, for which the encoder is frozen."""

import argparse
import hashlib
import json
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import generator, whole_view
from data import EpochOrder, ImageDataset, Images, get_dataloaders, list_data, open_images
from engine import BLOCK, VALIDATION_SEED, Trainer, encode_images, warm_up_norms
from harness import checkpoint
from harness.errors import UsageError, ValueProblem
from models import Classifier, build_encoder, widths_of
from tasks import Classify

NEIGHBOURS = 20
FEW_LABELS = 25  # of each class
RIDGES = [10.0**exponent for exponent in (-4, -3, -2.5, -2, -1.5, -1, -0.5, 0, 1)]  # relative to the number of images
WARM_UP_IMAGES = 256  # in a batch that warms up the statistics of a network from scratch
FIGURES = {  # name: (which of Answer's classes, title)
    "accuracy": ("all_classes", "all {classes} classes"),
    "accuracy_val_classes": ("val_classes", "the {held} of val/"),
    "accuracy_uncorrected": ("uncorrected", "uncorrected"),
}


@dataclass
class Start:
    """Where a classifier starts from."""

    name: str  # as it was given
    encoder: str  # one of models.ENCODERS
    size: int  # side of a view, px
    data: str  # what it was pretrained on
    state: dict | None = None  # the encoder's weights; None: random ones
    digest: str = ""  # of the file that holds the weights
    widths: list[int] = field(default_factory=list)  # of the encoder conv; [] of others
    ranges: dict = field(default_factory=dict)  # what it saw as black and as white beyond 8 bits

    def build(self, seed: int) -> nn.Module:
        """The encoder, with `out_features`; from scratch its weights depend on the seed."""
        torch.manual_seed(seed)
        encoder = build_encoder(self.encoder, widths=self.widths)
        if self.state is not None:
            encoder.load_state_dict(self.state)
        return encoder


def open_start(word: str) -> Start:
    """A pretext run's folder, or an `encoder.pt` with its `settings.json` beside it -> Start. Raises UsageError."""
    file = Path(word, "encoder.pt") if Path(word).is_dir() else Path(word)
    if not file.is_file():
        what = "holds no encoder.pt; did its run end?" if Path(word).is_dir() else "is not there"
        raise UsageError(f"{word} {what} (a start is a pretext run's folder, an encoder.pt, or `scratch`)")
    if Path(word, checkpoint.LAST).exists() and not Path(word, "summary.json").exists():
        raise UsageError(f"{word} was resumed and has not ended; go on with its run, or give {file}, of before that")
    written = file.parent.glob("settings*.json")  # one more each time that the run was resumed
    settings_file = max(written, key=lambda f: (len(f.name), f.name), default=file.parent / "settings.json")
    try:
        settings = json.loads(settings_file.read_text())["settings"]
        start = Start(word, settings["encoder"], operator.index(settings["size"]), os.fspath(settings["data"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"does not say how {file.name} was trained ({type(error).__name__}: {error})"
        raise UsageError(f"{settings_file} {problem}; keep the two files of a run together") from error
    start.state, start.digest = checkpoint.load(file), hashlib.sha256(file.read_bytes()).hexdigest()
    start.widths, start.ranges = widths_of(start.state) if start.encoder == "conv" else [], settings.get("ranges", {})
    encoder = build_encoder(start.encoder, widths=start.widths)
    checkpoint.load_weights(encoder, start.state, f"{file}, an encoder {start.encoder!r} by its settings,")
    return start


def open_starts(args: argparse.Namespace) -> list[Start]:
    """The starts. What follows from them, data, encoder and size, is noted in `args`."""
    pretrained = {word: open_start(word) for word in args.starts if word != "scratch"}
    first = next(iter(pretrained.values()), Start("scratch", "conv", 32, "photos"))
    if not args.data and os.path.isabs(first.data) and not os.path.isdir(first.data):
        problem = f"--data {first.data}: no such folder; give a folder of images, or `photos`"
        raise UsageError(f"the images that {first.name} learnt from are not there: {problem}")
    args.data, args.encoder, args.size = args.data or first.data, args.encoder or first.encoder, args.size or first.size
    widths = first.widths if args.encoder == first.encoder else []
    scratch = Start("scratch", args.encoder, args.size, args.data, widths=widths, ranges=first.ranges)
    starts = [pretrained.get(word, scratch) for word in dict.fromkeys(args.starts)]
    for encoder in {start.encoder for start in starts}:
        build_encoder(encoder, size=args.size)  # a wrong size is refused before anything is decoded
    return starts


@dataclass
class Labelled:
    """A labelled data set and its rows to train on and to validate on."""

    images: Images
    train: list[int]
    val: list[int]

    @property
    def counts(self) -> torch.Tensor:
        """Training images of each class: C."""
        return self.images.labels[self.train].bincount(minlength=len(self.images.listing.classes))

    @property
    def held(self) -> torch.Tensor:
        """The classes of the validation images, sorted: H."""
        return self.images.labels[self.val].unique()


def open_labelled(data: str, size: int, data_dir: str, ranges: dict | None = None) -> Labelled:
    """The labelled images. Raises UsageError if there are none, too few, or none of a class."""
    listing = list_data(data, data_dir)
    if not listing.classes:
        problem = "has no labels; transfer needs train/CLASS/ and val/CLASS/ in it, or use photos"
        raise ValueProblem("data", data, problem)
    images = open_images(listing, size, data_dir, ranges)
    labelled = Labelled(images, images.rows("train"), images.rows("val"))
    for name, count in zip(listing.classes, labelled.counts.tolist(), strict=True):
        if not count:
            raise ValueProblem("data", data, f": no usable image in train/{name}/; add some, or remove the class")
    if len(labelled.train) < 2:
        raise ValueProblem("data", data, ": one image in train/ is too few; give two or more")
    return labelled


@dataclass
class Answer:
    """The predicted class of each of M validation images, M int64, in three ways, and the confidence."""

    all_classes: torch.Tensor  # among all classes, corrected for the class prior
    uncorrected: torch.Tensor  # among all classes, not corrected
    val_classes: torch.Tensor  # among the classes of the validation images
    confidence: torch.Tensor  # M float  of the first, in [0, 1]

    def accuracies(self, labels: torch.Tensor) -> dict[str, float]:
        """The shares of right predictions by name: labels M."""
        return {name: (vars(self)[way] == labels).float().mean().item() for name, (way, _) in FIGURES.items()}


def classify(
    start: Start, data: Labelled, recipe: argparse.Namespace, seed: int, report: Callable, after_step=None
) -> dict[str, Answer]:
    """One run -> the answers of each of the mode's ways, see MODES. `report(epoch, means)` is called after every epoch
    of training, counted from 1, and `after_step()` after every step. `recipe` holds the options mode, size, epochs,
    batch_size, lr, encoder_rate, freeze; a torch device; amp, whether in bf16."""
    pixels, labels = data.images.pixels, data.images.labels
    encoder = start.build(seed).to(recipe.device, memory_format=torch.channels_last)
    if start.state is None:
        batches = min(10, max(1, len(data.train) // 2))  # of two images at least
        parts = (torch.from_numpy(pixels[data.train[i::batches][:WARM_UP_IMAGES]]) for i in range(batches))
        warm_up_norms(encoder, ((whole_view(p.to(recipe.device), recipe.size),) for p in parts), recipe.amp)
    look = recipe.size, recipe.device, recipe.amp
    if recipe.mode != "finetune" or recipe.freeze:
        train = encode_images(encoder, pixels, data.train, *look)  # N D
    if recipe.mode in ("knn", "probe"):
        val = encode_images(encoder, pixels, data.val, *look)  # M D
        std, mean = torch.std_mean(train, dim=0)
        train, val = ((part - mean) / (std + 1e-6) for part in (train, val))
        parts = train, labels[data.train], val, len(data.counts), data.held
        return {way: PROBES[way](*parts) for way in MODES[recipe.mode]}
    model = Classifier(encoder, len(data.counts)).to(recipe.device)
    linear = recipe.mode == "linear"
    if linear or recipe.freeze:
        features = train.to(recipe.device), labels[data.train].to(recipe.device)
        model.head[0].running_var, model.head[0].running_mean = torch.var_mean(features[0], dim=0)
        features = ImageDataset(data.images, range(len(train)), features)
        order = EpochOrder(len(train), min(recipe.batch_size, len(train)), seed, recipe.device)
        loader = DataLoader(features, batch_sampler=order, collate_fn=features.collate)
        epochs, heard = (recipe.epochs, report) if linear else (recipe.freeze, lambda epoch, means: None)
        fit(model.head, Classify(data.counts, None), loader, recipe, epochs, seed, False, heard, after_step)
    if not linear:
        batch_size = min(recipe.batch_size, len(data.train))
        loader, _ = get_dataloaders(data.images, data.train, data.val, batch_size, seed, recipe.device)
        task = Classify(data.counts, recipe.size)
        fit(model, task, loader, recipe, recipe.epochs, seed, recipe.amp, report, after_step)
    logits = encode_images(model, pixels, data.val, *look)  # M C  learnt with the prior's shift, see Classify
    shifted = logits + Classify(data.counts, None).log_prior
    return {recipe.mode: answer_of(logits, shifted, data.held, logits.softmax(dim=1).amax(dim=1))}


def fit(model, task, loader, recipe: argparse.Namespace, epochs: int, seed: int, amp: bool, report, after_step) -> None:
    """Train a Classifier on images, or a linear head on features."""
    rates = {"lr": recipe.lr, "encoder_rate": recipe.encoder_rate}
    trainer = Trainer(model, task, steps=epochs * len(loader), seed=seed, device=recipe.device, amp=amp, **rates)
    total = epochs * len(loader) * loader.batch_sampler.batch_size
    with tqdm(total=total, unit="image", unit_scale=True, leave=False, disable=None) as bar:
        for epoch in range(epochs):
            report(epoch + 1, trainer.train_epoch(loader, epoch, bar, after_step))


def answer_of(corrected: torch.Tensor, plain: torch.Tensor, held: torch.Tensor, confidence: torch.Tensor) -> Answer:
    """The classes with the highest scores, M C each, `corrected` for the class prior and not."""
    within = held[corrected[:, held].argmax(dim=1)]
    return Answer(corrected.argmax(dim=1), plain.argmax(dim=1), within, confidence)


# The probes. Each maps standardised features of N training images, N D, their labels N, features of M validation
# images, M D, the number of classes C, and the validation images' classes H to an Answer. Nothing in them is random.


def ridge_probe(train: torch.Tensor, labels: torch.Tensor, val: torch.Tensor, C: int, held: torch.Tensor) -> Answer:
    """A linear classifier: ridge regression of one-hot labels, in closed form. Of several ridges the one is taken that
    classifies a fifth of the training images best, which are held out for that; then all images count. For the
    corrected answers each class counts as much as every other, for the uncorrected ones each image."""
    counts = labels.bincount(minlength=C).clamp(min=1)
    order = torch.randperm(len(train), generator=generator(VALIDATION_SEED))
    out, rest = order.tensor_split([max(1, len(train) // 5)])
    scores = []
    for share in (len(train) / C / counts, torch.ones(C)):  # the weight of an image of each class
        weights = share[labels]
        held_out, others = (_moments(train[rows], labels[rows], weights[rows], C) for rows in (out, rest))
        right = [_score(train[out], others, ridge).argmax(dim=1) == labels[out] for ridge in RIDGES]
        ridge = RIDGES[int(torch.stack([weights[out][hits].sum() for hits in right]).argmax())]
        scores.append(_score(val, [a + b for a, b in zip(held_out, others, strict=True)], ridge))
    corrected, plain = scores
    return answer_of(corrected, plain, held, corrected.amax(dim=1).clamp(0, 1))


def _moments(x, labels, weights, C):
    """Sums over weighted images: of their products D D, of their features in each class C D, and of ones in each, C."""
    x, weights = x.double(), weights.double()
    weighted = weights[:, None] * x
    of_class = torch.zeros(C, x.shape[1], dtype=x.dtype).index_add_(0, labels, weighted)
    return x.T @ weighted, of_class, torch.zeros(C, dtype=x.dtype).index_add_(0, labels, weights)


def _score(x, moments, ridge):
    """M C  the scores that ridge regression with an intercept gives; `ridge` is relative to the number of images."""
    products, of_class, of_ones = moments
    total = of_ones.sum()
    mean = of_class.sum(dim=0) / total
    system = products - total * torch.outer(mean, mean) + ridge * total * torch.eye(len(mean), dtype=mean.dtype)
    slopes = torch.linalg.solve(system, (of_class - torch.outer(of_ones, mean)).T)  # D C
    return (x.double() - mean) @ slopes + of_ones / total


def few_probe(train: torch.Tensor, labels: torch.Tensor, val: torch.Tensor, C: int, held: torch.Tensor) -> Answer:
    """`ridge_probe` on the first 25 images of each class."""
    rows = torch.cat([(labels == c).nonzero().squeeze(1)[:FEW_LABELS] for c in range(C)])
    return ridge_probe(train[rows], labels[rows], val, C, held)


def knn(train: torch.Tensor, labels: torch.Tensor, val: torch.Tensor, C: int, held: torch.Tensor) -> Answer:
    """The classes of most of the 20 nearest training images, by the cosine of their features. A vote counts by the
    inverse of its class's frequency in training. For val_classes, neighbours are those of these classes alone."""
    frequency = labels.bincount(minlength=C).clamp(min=1)
    votes = _votes(train, labels, val, C)  # M C
    corrected = votes / frequency
    among = torch.isin(labels, held)
    within = _votes(train[among], labels[among], val, C) / frequency
    confidence = (corrected / corrected.sum(dim=1, keepdim=True)).amax(dim=1)
    return Answer(corrected.argmax(dim=1), votes.argmax(dim=1), within.argmax(dim=1), confidence)


def _votes(train, labels, queries, classes):
    """M C  the votes that each class gets; a vote weighs a little less the farther away it is, which settles ties."""
    train, votes = F.normalize(train, dim=1).T, []
    for part in F.normalize(queries, dim=1).split(BLOCK):
        near = (part @ train).topk(min(NEIGHBOURS, train.shape[1]), dim=1).indices  # M k
        weight = 1 - 1e-3 * torch.arange(near.shape[1])
        votes.append(torch.zeros(len(part), classes).scatter_add_(1, labels[near], weight.expand(near.shape)))
    return torch.cat(votes)


PROBES = {"ridge": ridge_probe, "knn": knn, "25 labels": few_probe}
MODES = {"finetune": ("finetune",), "linear": ("linear",), "knn": ("knn",), "probe": tuple(PROBES)}
