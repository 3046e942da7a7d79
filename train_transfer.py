"""Transfer: classify with few labels, starting from pretrained encoders, and compare them with starting from scratch.

    python train_transfer.py runs/NAME scratch --epochs 15 --runs 5         fine-tune both, five runs each
    python train_transfer.py runs/NAME scratch --mode linear                the encoder frozen, a linear classifier
    python train_transfer.py runs/NAME scratch --mode knn                   no training at all

A START is a pretext run's folder, an encoder.pt, or the word `scratch` (the same network with random weights). Trained
on every class of train/, validated on val/ at the last epoch. The folder gets settings.json, summary.json,
predictions.csv and TensorBoard's curves, confusion matrices and most confident mistakes.
"""

import argparse
import contextlib
import csv
import dataclasses
import statistics
import time
from pathlib import Path

import torch

import checkpoint
import cli
import transfer
from data import list_data, open_images
from engine import choose_amp, choose_device, device_name
from errors import UsageError
from models import build_encoder
from report import Log, draw_confusion, draw_sheet

RATES = {"finetune": 2e-3, "linear": transfer.LINEAR_RATE}
COLUMNS = {
    "accuracy": "all {classes} classes",
    "accuracy_val_classes": "the {held} of val/",
    "accuracy_uncorrected": "uncorrected",
}


def parse() -> argparse.Namespace:
    """The command line -> settings."""
    parser = cli.Parser(*__doc__.split("\n\n", 1))
    parser.add_argument(
        "starts", nargs="+", metavar="START", help="a pretext run's folder, an encoder.pt, or `scratch`"
    )
    group = parser.add_argument_group("images")
    group.add_argument("--data", help="as in train_pretext.py (default: what the first START was pretrained on)")
    cli.add_data_dir(group)
    group.add_argument("--encoder", help="of `scratch` (default: that of the first START, else conv)")
    group.add_argument("--size", type=cli.whole(8, 1024), help="side of a view, px (default: that of the first START)")
    rates = ", ".join(f"{mode} {rate:g}" for mode, rate in RATES.items())
    group = cli.add_loop_options(parser, lr=None, lr_help=f" (default: {rates})")
    group.add_argument("--mode", choices=transfer.MODES, default="finetune", help="what is trained")
    group.add_argument("--epochs", type=cli.whole(1), default=5, help="passes over the labelled images")
    group.add_argument("--runs", type=cli.whole(1), default=1, help="repetitions, with seeds --seed, --seed + 1, …")
    group.add_argument("--batch-size", type=cli.whole(2), default=64, help="images in a step")
    group.add_argument(
        "--encoder-rate", type=cli.share, default=0.5, help="finetune: learning rate of the encoder, as a share of --lr"
    )
    group.add_argument(
        "--freeze", type=cli.whole(0), default=5, help="finetune: epochs for the head alone before the others"
    )
    cli.add_run_options(parser)
    args = parser.parse_args()
    args.lr = args.lr or RATES.get(args.mode)
    return args


def main() -> None:
    """Assemble, train, report."""
    args = parse()
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    starts = open_starts(args)
    folder = cli.choose_folder(args, f"transfer-{args.mode}")
    data = open_labelled(args)
    cli.make_folder(folder, args, device_name(device))
    print(data.images.describe())
    print(
        f"{args.mode}: training on {len(data.train)} images of {len(data.counts)} classes, validating on "
        f"{len(data.val)} of {len(data.held)}; {device_name(device)}{', bf16' if amp else ''}"
    )
    names = {field.name for field in dataclasses.fields(transfer.Recipe)}
    recipe = transfer.Recipe(**{k: v for k, v in vars(args).items() if k in names} | {"device": device, "amp": amp})
    summary = {}
    with contextlib.closing(Log(folder)) as log:
        log.text("settings", (folder / "settings.json").read_text())
        with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
            predictions = csv.writer(file)
            predictions.writerow(["start", "run", "path", "class", *COLUMNS])
            for start in starts:
                summary[start.name] = evaluate(args, start, data, recipe, log, predictions)
    checkpoint.save_json(summary, folder / "summary.json")
    print_summary(args, summary, data, folder)


def open_starts(args: argparse.Namespace) -> list[transfer.Start]:
    """The starts, and in `args` what follows from them: data, encoder and size."""
    pretrained = {word: transfer.open_start(word) for word in args.starts if word != "scratch"}
    first = next(iter(pretrained.values()), transfer.Start("scratch", "conv", 32, "photos", None))
    args.data, args.encoder, args.size = args.data or first.data, args.encoder or first.encoder, args.size or first.size
    build_encoder(args.encoder)  # an unknown name is said before anything is decoded
    scratch = transfer.Start("scratch", args.encoder, args.size, args.data, None)
    return [pretrained.get(word, scratch) for word in dict.fromkeys(args.starts)]


def open_labelled(args: argparse.Namespace) -> transfer.Labelled:
    """The labelled images. Raises UsageError where there are none."""
    listing = list_data(args.data, args.data_dir)
    if not listing.classes:
        raise UsageError(
            f"--data {args.data} has no labels; transfer needs train/CLASS/ and val/CLASS/ in it, or `--data photos`"
        )
    images = open_images(listing, args.size, args.data_dir)
    return transfer.Labelled(images, images.rows("train"), images.rows("val"))


def evaluate(args, start: transfer.Start, data: transfer.Labelled, recipe, log: Log, predictions) -> dict:
    """All runs of one start: log, pictures, predictions. Returns its part of the summary."""
    images, classes = data.images, data.images.listing.classes
    labels = images.labels[data.val]
    scores, clock = [], time.perf_counter()
    for run in range(args.runs):

        def report(epoch, means, run=run):
            log.scalars(epoch, {f"{start.name}/run {run + 1} {name}": value for name, value in means.items()})

        answer = transfer.classify(start, data, recipe, args.seed + run, report)
        scores.append(answer.accuracies(labels))
        for i, row in enumerate(data.val):
            said = [classes[getattr(answer, way)[i]] for way in ("all_classes", "val_classes", "uncorrected")]
            predictions.writerow([start.name, run + 1, images.listing.entries[row].path, classes[labels[i]], *said])
        if run == 0:
            log.picture(f"confusion/{start.name}", draw_confusion(answer.all_classes, labels, classes), args.epochs)
            log.picture(f"mistakes/{start.name}", _mistakes(answer, labels, data), args.epochs)
        print(f"{start.name}, run {run + 1}/{args.runs}: " + ", ".join(f"{k} {v:.1%}" for k, v in scores[-1].items()))
    seconds = time.perf_counter() - clock
    summary = {"data": args.data, "mode": args.mode, "epochs": args.epochs, "runs": args.runs}
    for name in COLUMNS:
        values = [score[name] for score in scores]
        summary[f"{name}_mean"] = statistics.mean(values)
        summary[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        summary[name.replace("accuracy", "accuracies")] = values
    return summary | {"seconds": seconds, "device": device_name(recipe.device)}


def _mistakes(answer: transfer.Answer, labels: torch.Tensor, data: transfer.Labelled, most: int = 24):
    """The picture of the mistakes that the classifier is most sure of."""
    wrong = (answer.all_classes != labels).nonzero().squeeze(1)
    wrong = wrong[answer.confidence[wrong].argsort(descending=True)][:most]
    classes = data.images.listing.classes
    pixels = data.images.pixels[[data.val[i] for i in wrong]]
    captions = [
        (f"said {classes[answer.all_classes[i]]} {answer.confidence[i]:.0%}", f"is {classes[labels[i]]}") for i in wrong
    ]
    return draw_sheet(pixels, captions)


def print_summary(args: argparse.Namespace, summary: dict, data: transfer.Labelled, folder: Path) -> None:
    """The table, and where to look."""
    titles = [title.format(classes=len(data.counts), held=len(data.held)) for title in COLUMNS.values()]
    width = max(len("START"), *map(len, summary)) + 2
    print(f"\n{'START':{width}}" + "".join(f"{title:>20}" for title in titles) + f"{'time':>14}")
    for name, row in summary.items():
        cells = []
        for column in COLUMNS:
            spread = row[f"{column}_std"]
            cells.append(f"{row[f'{column}_mean']:.1%}" + ("" if spread is None else f" ± {spread:.1%}"))
        print(f"{name:{width}}" + "".join(f"{cell:>20}" for cell in cells) + f"{cli.duration(row['seconds']):>14}")
    print(f"top-1 on {len(data.val)} images of val/" + (f", mean ± std of {args.runs} runs" if args.runs > 1 else ""))
    print(f"\nlook at it   tensorboard --logdir {folder.parent}")
    print(f"results      {folder}/summary.json, predictions.csv")
    if "scratch" not in summary:
        print("compare      add the word `scratch` to the starts")


if __name__ == "__main__":
    cli.run(main)
