"""Transfer: classify with few labels, starting from pretrained encoders, and compare them with starting from scratch.

    python train_transfer.py runs/NAME scratch --runs 5                     fine-tune both, five runs each
    python train_transfer.py runs/NAME scratch --mode linear                the encoder frozen, a linear classifier
    python train_transfer.py runs/NAME scratch --mode knn                   no training at all
    python train_transfer.py --resume runs/NAME                             go on with a command that was stopped

A START is a pretext run's folder, an encoder.pt, or the word `scratch`: the same network with random weights. The
protocol is fast.ai's Image网: train on every class of train/, validate on val/, which holds some of them only, at the
last epoch. The classes of val/ have a tenth of the labels, so figures are corrected for the class prior; those without
the correction stand beside them. The folder gets settings.json, summary.json, predictions.csv and what TensorBoard
shows: curves, confusion matrices and the most confident mistakes.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import operator
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from augment import whole_view
from data import EpochOrder, Images, get_dataloaders, list_data, open_images
from engine import AMP, DEVICES, Trainer, choose_amp, choose_device, device_name, encode_images, warm_up_norms
from harness import checkpoint, command, files, folder, ranks
from harness.errors import RunError, UsageError, ValueProblem
from harness.log import Log
from harness.pictures import draw_confusion, draw_sheet
from models import Classifier, blocks_of, build_encoder
from tasks import Classify

MODES = ("finetune", "linear", "knn")
NEIGHBOURS = 20
WARM_UP_IMAGES = 256  # in a batch that warms up the statistics of a network from scratch
MISTAKES = 24  # on the contact sheet
FIGURES = {  # name: (which of Answer's classes, title)
    "accuracy": ("all_classes", "all {classes} classes"),
    "accuracy_val_classes": ("val_classes", "the {held} of val/"),
    "accuracy_uncorrected": ("uncorrected", "uncorrected"),
}


def parse() -> tuple[argparse.Namespace, dict | None]:
    """The command line -> settings, and the checkpoint to go on from, if any."""
    integer = command.integer
    parser = command.Parser(__doc__)
    start = "a pretext run's folder, an encoder.pt, or `scratch`"
    parser.add_argument("starts", nargs="*", metavar="START", help=start)
    add = parser.add_argument_group("images").add_argument
    add("--data", type=command.place, help="as in train_pretext.py (default: that of the first START)")
    add("--data-dir", type=command.place, default="data", help="folder for data sets by name, and for decoded images")
    add("--encoder", help="of `scratch` (default: that of the first START, else conv)")
    add("--size", type=integer(8, 1024), help="side of a view, px (default: that of the first START)")
    add = parser.add_argument_group("training").add_argument
    add("--mode", choices=MODES, default="finetune", help="what is trained")
    add("--epochs", type=integer(1), default=5, help="passes over the labelled images")
    add("--runs", type=integer(1), default=1, help="repetitions, with seeds --seed, --seed + 1, …")
    add("--batch-size", type=integer(2), default=64, help="images in a step")
    add("--lr", type=command.rate, default=1e-3, help="peak learning rate of AdamW")
    add("--encoder-rate", type=command.share, default=0.5, help="finetune: the encoder's, as a share of --lr")
    add("--freeze", type=integer(0), default=5, help="finetune: epochs for the head alone before the others")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="fixes all that is random")
    add("--device", choices=DEVICES, default="auto", help="where to compute; auto: a GPU if there is one")
    add("--amp", choices=AMP, default="auto", help="bf16; auto: on GPUs that have it, not on CPUs")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=command.place, help="the run's folder (default: runs/transfer-MODE-DATA-ENCODER-TIME)")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", type=command.place, metavar="FOLDER", help="go on with the run in this folder (default: a new run)")
    args = parser.parse_args()
    saved = folder.resume(parser, args, {"device", "data", "data_dir"})
    if args.mode != "finetune":
        parser.refuse({"encoder_rate", "freeze"}, f"is of --mode finetune; --mode {args.mode} has no use for it")
    if not args.starts:
        raise UsageError(f"no START is given: name {start}")
    if "scratch" not in args.starts:
        parser.refuse({"encoder"}, "is of `scratch`, which is none of the STARTs; leave it out, or add that one")
    return args, saved


def main() -> None:
    """Assemble, train, report."""
    args, saved = parse()
    ranks.refuse_several()
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    starts = open_starts(args)
    place = folder.choose(args, f"transfer-{args.mode}")
    data = open_labelled(args.data, args.size, args.data_dir)
    runs = saved["runs"] if saved else []
    state = {"script": "train_transfer", "format": folder.FORMAT, "settings": vars(args)}
    state |= {"data": data.images.identity(), "starts": {start.name: start.digest for start in starts}}
    for name, what in ("data", "the data"), ("starts", "a START"):
        if saved and saved[name] != state[name]:
            raise UsageError(f"--resume {args.resume}: {what} is another than it was; start a new run")
    place = folder.make(place, args, device_name(device))
    print(data.images.describe())
    counts = f"training on {len(data.train)} images of {len(data.counts)} classes, validating on {len(data.val)}"
    print(f"{args.mode}: {counts} of {len(data.held)}; {device_name(device)}{', bf16' if amp else ''}")
    recipe = argparse.Namespace(**vars(args) | {"device": device, "amp": amp})
    for file in place.glob("events.out.tfevents.*"):
        file.unlink()  # finished runs are logged again
    checkpoint.save_last({**state, "runs": runs}, place)
    with contextlib.closing(Log(place)) as log, command.Interrupts() as interrupts:
        log.text("settings", (place / "settings.json").read_text())
        for run in runs:
            log_curves(run, log)

        def after_step():
            if interrupts.signal:
                go_on = f"go on with: python train_transfer.py --resume {shlex.quote(str(place))}"
                raise RunError(f"stopped; the run that was under way will be done again; {go_on}", interrupts.signal)

        for seed, start in itertools.product(range(args.seed, args.seed + args.runs), starts):
            if not any((run["start"], run["seed"]) == (start.name, seed) for run in runs):
                runs.append(run_once(start, data, recipe, seed, after_step))
                log_curves(runs[-1], log)
                checkpoint.save_last({**state, "runs": runs}, place)
                after_step()
        rows = {start.name: [run for run in runs if run["start"] == start.name] for start in starts}
        summary = {name: summarise(args, of_start, device) for name, of_start in rows.items()}
        files.write_csv(predictions(runs, data), place / "predictions.csv")
        files.write_json(summary, place / "summary.json")
        print_summary(args, summary, data, place)
        for run in runs:  # last: nothing but pictures is lost if one fails
            try:
                draw(run, data, log)
            except Exception as error:  # noqa: BLE001
                print(f"note: no picture of {run['start']}, seed {run['seed']}: {error}", file=sys.stderr)


@dataclass
class Start:
    """Where a classifier starts from."""

    name: str  # as it was given
    encoder: str  # one of models.ENCODERS
    size: int  # side of a view, px
    data: str  # what it was pretrained on
    state: dict | None = None  # the encoder's weights; None: random ones
    digest: str = ""  # of the file that holds the weights
    blocks: int = 1  # of conv

    def build(self, seed: int) -> nn.Module:
        """The encoder, with `out_features`; from scratch its weights depend on the seed."""
        torch.manual_seed(seed)
        encoder = build_encoder(self.encoder, blocks=self.blocks)
        if self.state is not None:
            encoder.load_state_dict(self.state)
        return encoder


def open_start(word: str) -> Start:
    """A pretext run's folder, or an `encoder.pt` with its `settings.json` beside it -> Start. Raises UsageError."""
    file = Path(word, "encoder.pt") if Path(word).is_dir() else Path(word)
    if not file.is_file():
        what = "holds no encoder.pt; did its run end?" if Path(word).is_dir() else "is not there"
        raise UsageError(f"{word} {what} (a start is a pretext run's folder, an encoder.pt, or `scratch`)")
    settings_file = file.parent / "settings.json"
    try:
        settings = json.loads(settings_file.read_text())["settings"]
        start = Start(word, settings["encoder"], operator.index(settings["size"]), os.fspath(settings["data"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"does not say how {file.name} was trained ({type(error).__name__}: {error})"
        raise UsageError(f"{settings_file} {problem}; keep the two files of a run together") from error
    start.state, start.digest = checkpoint.load(file), hashlib.sha256(file.read_bytes()).hexdigest()
    start.blocks = blocks_of(start.state)
    encoder = build_encoder(start.encoder, blocks=start.blocks)
    checkpoint.load_weights(encoder, start.state, f"{file}, an encoder {start.encoder!r} by its settings,")
    return start


def open_starts(args: argparse.Namespace) -> list[Start]:
    """The starts. What follows from them, data, encoder and size, is noted in `args`."""
    pretrained = {word: open_start(word) for word in args.starts if word != "scratch"}
    first = next(iter(pretrained.values()), Start("scratch", "conv", 32, "photos"))
    args.data, args.encoder, args.size = args.data or first.data, args.encoder or first.encoder, args.size or first.size
    scratch = Start("scratch", args.encoder, args.size, args.data, blocks=first.blocks)
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


def open_labelled(data: str, size: int, data_dir: str) -> Labelled:
    """The labelled images. Raises UsageError if there are none, too few, or none of a class."""
    listing = list_data(data, data_dir)
    if not listing.classes:
        problem = "has no labels; transfer needs train/CLASS/ and val/CLASS/ in it, or use photos"
        raise ValueProblem("data", data, problem)
    images = open_images(listing, size, data_dir)
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


class Features(TensorDataset):
    """Features and labels on a device; a batch is gathered at once."""

    def __getitems__(self, places):
        return self[places]


def classify(
    start: Start, data: Labelled, recipe: argparse.Namespace, seed: int, report: Callable, after_step=None
) -> Answer:
    """One run. `report(epoch, means)` is called after every epoch of training, counted from 1, and `after_step()` after
    every step. `recipe` holds the options mode, size, epochs, batch_size, lr, encoder_rate, freeze; a torch device;
    amp, whether in bf16."""
    pixels, labels = data.images.pixels, data.images.labels
    encoder = start.build(seed).to(recipe.device, memory_format=torch.channels_last)
    if start.state is None:
        batches = min(10, max(1, len(data.train) // 2))  # of two images at least
        parts = (torch.from_numpy(pixels[data.train[i::batches][:WARM_UP_IMAGES]]) for i in range(batches))
        warm_up_norms(encoder, ((whole_view(p.to(recipe.device), recipe.size),) for p in parts), recipe.amp)
    model = Classifier(encoder, len(data.counts)).to(recipe.device)
    look = recipe.size, recipe.device, recipe.amp
    if recipe.mode != "finetune" or recipe.freeze:
        train, val = (encode_images(encoder, pixels, rows, *look) for rows in (data.train, data.val))  # N D, M D
        if recipe.mode == "knn":
            return knn(train, labels[data.train], val, data.counts, data.held)
        features = Features(train.to(recipe.device), labels[data.train].to(recipe.device))
        order = EpochOrder(len(train), min(recipe.batch_size, len(train)), seed, recipe.device)
        loader = DataLoader(features, batch_sampler=order, collate_fn=tuple)
        linear = recipe.mode == "linear"
        epochs, heard = (recipe.epochs, report) if linear else (recipe.freeze, lambda epoch, means: None)
        fit(model.head, Classify(data.counts, None), loader, recipe, epochs, seed, False, heard, after_step)
        if linear:
            with torch.no_grad():
                logits = model.head.eval()(val.to(recipe.device)).cpu()
            return answer_of(logits, data)
    batch_size = min(recipe.batch_size, len(data.train))
    loader, _ = get_dataloaders(data.images, data.train, data.val, batch_size, seed, recipe.device)
    task = Classify(data.counts, recipe.size)
    fit(model, task, loader, recipe, recipe.epochs, seed, recipe.amp, report, after_step)
    return answer_of(encode_images(model, pixels, data.val, *look), data)


def fit(model, task, loader, recipe: argparse.Namespace, epochs: int, seed: int, amp: bool, report, after_step) -> None:
    """Train a Classifier on images, or a linear head on features."""
    rates = {"lr": recipe.lr, "encoder_rate": recipe.encoder_rate}
    trainer = Trainer(model, task, steps=epochs * len(loader), seed=seed, device=recipe.device, amp=amp, **rates)
    total = epochs * len(loader) * loader.batch_sampler.batch_size
    with tqdm(total=total, unit="image", unit_scale=True, leave=False, disable=None) as bar:
        for epoch in range(epochs):
            report(epoch + 1, trainer.train_epoch(loader, epoch, bar, after_step))


def answer_of(logits: torch.Tensor, data: Labelled) -> Answer:
    """The answers of a classifier that was trained with the prior's shift: logits M C."""
    shifted = logits + (data.counts / data.counts.sum()).log()
    within = data.held[logits[:, data.held].argmax(dim=1)]
    return Answer(logits.argmax(dim=1), shifted.argmax(dim=1), within, logits.softmax(dim=1).amax(dim=1))


def knn(
    train: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor, counts: torch.Tensor, held: torch.Tensor
) -> Answer:
    """The classes of most of the 20 nearest training images, by the cosine of their features. A vote counts by the
    inverse of how frequent its class is in training. For the classes of the validation images, neighbours are searched
    among the training images of these classes. Shapes: train N D with labels N, queries M D, counts C (training images
    of each class), held H (classes of the queries)."""
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


def run_once(start: Start, data: Labelled, recipe: argparse.Namespace, seed: int, after_step: Callable) -> dict:
    """One run of one start, as a checkpoint keeps it. `after_step()` is called after every step."""
    clock, curve = time.perf_counter(), []
    answer = classify(start, data, recipe, seed, lambda *epoch: curve.append(epoch), after_step)
    accuracies = answer.accuracies(data.images.labels[data.val])
    figures = ", ".join(f"{title(name, data)} {value:.1%}" for name, value in accuracies.items())
    print(f"{start.name}, seed {seed}: {figures}")
    run = {"start": start.name, "seed": seed, "seconds": time.perf_counter() - clock}
    return {**run, "answer": vars(answer), "curve": curve, "accuracies": accuracies}


def title(name: str, data: Labelled) -> str:
    """What a figure is called in print."""
    return FIGURES[name][1].format(classes=len(data.counts), held=len(data.held))


def log_curves(run: dict, log: Log) -> None:
    """The curves of a run, in TensorBoard."""
    for epoch, means in run["curve"]:
        log.scalars(None, epoch, {f"{run['start']}/seed {run['seed']} {name}": v for name, v in means.items()})


def draw(run: dict, data: Labelled, log: Log) -> None:
    """The pictures of a run, in TensorBoard."""
    answer, labels = Answer(**run["answer"]), data.images.labels[data.val]
    classes, said, step = data.images.listing.classes, answer.all_classes, run["seed"]
    log.picture(None, f"confusion/{run['start']}", draw_confusion(said, labels, classes), step)
    wrong = (said != labels).nonzero().squeeze(1)
    wrong = wrong[answer.confidence[wrong].argsort(descending=True)][:MISTAKES]
    captions = [(f"said {classes[said[i]]} {answer.confidence[i]:.0%}", f"is {classes[labels[i]]}") for i in wrong]
    pixels = data.images.pixels[[data.val[i] for i in wrong]]
    log.picture(None, f"mistakes/{run['start']}", draw_sheet(pixels, captions), step)


def summarise(args: argparse.Namespace, runs: list[dict], device: torch.device) -> dict:
    """The runs of one start, in figures."""
    summary = {"data": args.data, "mode": args.mode, "epochs": args.epochs, "runs": args.runs}
    for name in FIGURES:
        values = [run["accuracies"][name] for run in runs]
        summary[f"{name}_mean"] = statistics.mean(values)
        summary[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        summary[name.replace("accuracy", "accuracies")] = values
    return {**summary, "seconds": sum(run["seconds"] for run in runs), "device": device_name(device)}


def predictions(runs: list[dict], data: Labelled) -> Iterator[list]:
    """The rows of predictions.csv: a header, then what every run took each validation image for."""
    classes, labels = data.images.listing.classes, data.images.labels[data.val]
    yield ["start", "seed", "path", "class", *FIGURES]
    for run in runs:
        ways = [run["answer"][way].tolist() for way, _ in FIGURES.values()]
        for row, label, *predicted in zip(data.val, labels.tolist(), *ways, strict=True):
            path = data.images.listing.entries[row].path
            yield [run["start"], run["seed"], path, classes[label], *(classes[c] for c in predicted)]


def print_summary(args: argparse.Namespace, summary: dict, data: Labelled, place: Path) -> None:
    """The table, and where to look."""
    width = max(len("START"), *map(len, summary)) + 2
    print(f"\n{'START':{width}}" + "".join(f"{title(name, data):>20}" for name in FIGURES) + f"{'time':>14}")
    for start, row in summary.items():
        figures = ((row[f"{name}_mean"], row[f"{name}_std"]) for name in FIGURES)
        cells = [f"{mean:.1%}" + ("" if std is None else f" ± {std:.1%}") for mean, std in figures]
        took = timedelta(seconds=round(row["seconds"]))
        print(f"{start:{width}}" + "".join(f"{cell:>20}" for cell in cells) + f"{took!s:>14}")
    print(f"top-1 on {len(data.val)} images of val/" + (f", mean ± std of {args.runs} runs" if args.runs > 1 else ""))
    print(f"\nlook at it   tensorboard --logdir {shlex.quote(str(place.parent))}")
    print(f"results      {place}/summary.json, predictions.csv")
    if "scratch" not in summary:
        print("compare      add the word `scratch` to the starts")


if __name__ == "__main__":
    command.run(main)
