"""Transfer: classify with few labels, starting from pretrained encoders, and compare them with starting from scratch.

    python train_transfer.py runs/NAME scratch --epochs 15 --runs 5         fine-tune both, five runs each
    python train_transfer.py runs/NAME scratch --mode linear                the encoder frozen, a linear classifier
    python train_transfer.py runs/NAME scratch --mode knn                   no training at all
    python train_transfer.py --resume runs/NAME                             do what a stopped command left to do

A START is a pretext run's folder, an encoder.pt, or the word `scratch` (the same network with random weights). Trained
on every class of train/, validated on val/ at the last epoch. The folder gets settings.json, summary.json,
predictions.csv and TensorBoard's curves, confusion matrices and most confident mistakes.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import itertools
import statistics
import time
from pathlib import Path
from typing import BinaryIO

import torch

import checkpoint
import cli
import distributed
import options
import transfer
from data import open_images
from engine import choose_amp, choose_device, device_name
from errors import Stopped, UsageError
from listing import list_data
from models import build_encoder
from pictures import draw_confusion, draw_sheet
from report import Log

MISTAKES = 24  # on the contact sheet
COLUMNS = {
    "accuracy": "all {classes} classes",
    "accuracy_val_classes": "the {held} of val/",
    "accuracy_uncorrected": "uncorrected",
}


def parse() -> tuple[argparse.Namespace, dict | None]:
    """The command line -> settings, and the checkpoint to go on from, if any."""
    parser = options.Parser(*__doc__.split("\n\n", 1))
    parser.add_argument(
        "starts", nargs="*", metavar="START", help="a pretext run's folder, an encoder.pt, or `scratch`"
    )
    group = parser.add_argument_group("images")
    group.add_argument(
        "--data", type=options.place, help="as in train_pretext.py (default: what the first START was pretrained on)"
    )
    options.add_data_dir(group)
    group.add_argument("--encoder", help="of `scratch` (default: that of the first START, else conv)")
    group.add_argument(
        "--size", type=options.whole(8, 1024), help="side of a view, px (default: that of the first START)"
    )
    group = options.add_loop_options(parser)
    group.add_argument("--mode", choices=transfer.MODES, default="finetune", help="what is trained")
    group.add_argument("--epochs", type=options.whole(1), default=5, help="passes over the labelled images")
    group.add_argument("--runs", type=options.whole(1), default=1, help="repetitions, with seeds --seed, --seed + 1, …")
    group.add_argument("--batch-size", type=options.whole(2), default=64, help="images in a step")
    group.add_argument(
        "--encoder-rate",
        type=options.share,
        default=0.5,
        help="finetune: learning rate of the encoder, as a share of --lr",
    )
    group.add_argument(
        "--freeze", type=options.whole(0), default=5, help="finetune: epochs for the head alone before the others"
    )
    options.add_resume_options(options.add_run_options(parser))
    args = parser.parse_args()
    saved = cli.resume(parser, args, {"device"})
    if args.mode != "finetune":
        why = f"is of --mode finetune; --mode {args.mode} has no use for it"
        options.refuse(parser, {"encoder_rate", "freeze"}, why)
    if not args.starts:
        raise UsageError("no START is given: name a pretext run's folder, an encoder.pt, or `scratch`")
    if "scratch" not in args.starts:
        options.refuse(
            parser, {"encoder"}, "is of `scratch`, which is none of the STARTs; leave it out, or add that one"
        )
    return args, saved


def main() -> None:
    """Assemble, train, report."""
    args, saved = parse()
    distributed.alone()
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    starts = open_starts(args)
    folder = Path(args.resume) if args.resume else cli.choose_folder(args, f"transfer-{args.mode}")
    data = open_labelled(args)
    runs = saved["runs"] if saved else []
    state = {
        "script": "train_transfer",
        "settings": vars(args),
        "data": data.images.identity(),
        "starts": {start.name: start.fingerprint() for start in starts},
    }
    if saved and any(saved[name] != state[name] for name in ("data", "starts")):
        what = "the data" if saved["data"] != state["data"] else "a START"
        raise UsageError(f"--resume {args.resume}: {what} is another than it was; start a new run")
    cli.make_folder(folder, args, device_name(device))
    print(data.images.describe())
    print(
        f"{args.mode}: training on {len(data.train)} images of {len(data.counts)} classes, validating on "
        f"{len(data.val)} of {len(data.held)}; {device_name(device)}{', bf16' if amp else ''}"
    )
    names = {field.name for field in dataclasses.fields(transfer.Recipe)}
    recipe = transfer.Recipe(**{k: v for k, v in vars(args).items() if k in names} | {"device": device, "amp": amp})
    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()  # what is done is shown again
    checkpoint.save_last({**state, "runs": runs}, folder)
    with contextlib.closing(Log(folder)) as log, cli.Interrupts() as interrupts:
        log.text("settings", (folder / "settings.json").read_text())
        for done in runs:
            show(done, data, log)

        def after_step():
            if interrupts.signal:
                raise Stopped(
                    "stopped; the run that was under way will be done again; "
                    f"go on with: python train_transfer.py --resume {folder}",
                    interrupts.signal,
                )

        for seed, start in itertools.product(range(args.seed, args.seed + args.runs), starts):
            if not any((done["start"], done["seed"]) == (start.name, seed) for done in runs):
                runs.append(run(start, data, recipe, seed, after_step))
                show(runs[-1], data, log)
                checkpoint.save_last({**state, "runs": runs}, folder)
                after_step()
    of = {start.name: [done for done in runs if done["start"] == start.name] for start in starts}
    summary = {name: summarise(args, mine, device) for name, mine in of.items()}
    checkpoint.write(folder / "predictions.csv", lambda stream: write_predictions(stream, runs, data))
    checkpoint.save_json(summary, folder / "summary.json")
    print_summary(args, summary, data, folder)


def open_starts(args: argparse.Namespace) -> list[transfer.Start]:
    """The starts, and in `args` what follows from them: data, encoder and size."""
    pretrained = {word: transfer.open_start(word) for word in args.starts if word != "scratch"}
    first = next(iter(pretrained.values()), transfer.Start("scratch", "conv", 32, "photos", None))
    args.data, args.encoder, args.size = args.data or first.data, args.encoder or first.encoder, args.size or first.size
    scratch = transfer.Start("scratch", args.encoder, args.size, args.data, None)
    starts = [pretrained.get(word, scratch) for word in dict.fromkeys(args.starts)]
    for encoder in {start.encoder for start in starts}:
        build_encoder(encoder, size=args.size)  # what does not fit is said before anything is decoded
    return starts


def open_labelled(args: argparse.Namespace) -> transfer.Labelled:
    """The labelled images. Raises UsageError where there are none, too few, or none of a class."""
    listing = list_data(args.data, args.data_dir)
    if not listing.classes:
        raise UsageError(
            f"--data {args.data} has no labels; transfer needs train/CLASS/ and val/CLASS/ in it, or `--data photos`"
        )
    images = open_images(listing, args.size, args.data_dir)
    data = transfer.Labelled(images, images.rows("train"), images.rows("val"))
    for name, count in zip(listing.classes, data.counts.tolist(), strict=True):
        if not count:
            raise UsageError(f"--data {args.data}: no usable image in train/{name}/; add some, or remove the class")
    if len(data.train) < 2:
        raise UsageError(f"--data {args.data}: one image in train/ is too few; give two or more")
    return data


def run(start: transfer.Start, data: transfer.Labelled, recipe: transfer.Recipe, seed: int, after_step) -> dict:
    """One run of one start -> what a checkpoint keeps of it. `after_step()` is called after every step."""
    clock, curve = time.perf_counter(), []
    answer = transfer.classify(start, data, recipe, seed, lambda *epoch: curve.append(epoch), after_step)
    accuracies = answer.accuracies(data.images.labels[data.val])
    said = ", ".join(f"{title(name, data)} {value:.1%}" for name, value in accuracies.items())
    print(f"{start.name}, seed {seed}: {said}")
    return {
        "start": start.name,
        "seed": seed,
        "seconds": time.perf_counter() - clock,
        "answer": vars(answer),
        "curve": curve,
        "accuracies": accuracies,
    }


def title(name: str, data: transfer.Labelled) -> str:
    """What a figure is called in print."""
    return COLUMNS[name].format(classes=len(data.counts), held=len(data.held))


def show(done: dict, data: transfer.Labelled, log: Log) -> None:
    """The curves and pictures of a run, in TensorBoard."""
    for epoch, means in done["curve"]:
        log.scalars(epoch, {f"{done['start']}/seed {done['seed']} {name}": value for name, value in means.items()})
    answer, labels = transfer.Answer(**done["answer"]), data.images.labels[data.val]
    classes, step = data.images.listing.classes, done["seed"]
    log.picture(f"confusion/{done['start']}", draw_confusion(answer.all_classes, labels, classes), step)
    wrong = (answer.all_classes != labels).nonzero().squeeze(1)
    wrong = wrong[answer.confidence[wrong].argsort(descending=True)][:MISTAKES]
    captions = [
        (f"said {classes[answer.all_classes[i]]} {answer.confidence[i]:.0%}", f"is {classes[labels[i]]}") for i in wrong
    ]
    pixels = data.images.pixels[[data.val[i] for i in wrong]]
    log.picture(f"mistakes/{done['start']}", draw_sheet(pixels, captions), step)


def summarise(args: argparse.Namespace, runs: list[dict], device: torch.device) -> dict:
    """The runs of one start, in figures."""
    summary = {"data": args.data, "mode": args.mode, "epochs": args.epochs, "runs": args.runs}
    for name in COLUMNS:
        values = [run["accuracies"][name] for run in runs]
        summary[f"{name}_mean"] = statistics.mean(values)
        summary[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        summary[name.replace("accuracy", "accuracies")] = values
    return {**summary, "seconds": sum(run["seconds"] for run in runs), "device": device_name(device)}


def write_predictions(stream: BinaryIO, runs: list[dict], data: transfer.Labelled) -> None:
    """What every validation image was taken for, a line for each run and image."""
    classes, labels = data.images.listing.classes, data.images.labels[data.val]
    text = io.TextIOWrapper(stream, "utf-8", errors="backslashreplace", newline="", write_through=True)
    rows = csv.writer(text)
    rows.writerow(["start", "seed", "path", "class", *COLUMNS])
    for run in runs:
        ways = [run["answer"][way].tolist() for way in ("all_classes", "val_classes", "uncorrected")]
        for row, label, *said in zip(data.val, labels.tolist(), *ways, strict=True):
            path = data.images.listing.entries[row].path
            rows.writerow([run["start"], run["seed"], path, classes[label], *(classes[c] for c in said)])
    text.detach()


def print_summary(args: argparse.Namespace, summary: dict, data: transfer.Labelled, folder: Path) -> None:
    """The table, and where to look."""
    titles = [title(name, data) for name in COLUMNS]
    width = max(len("START"), *map(len, summary)) + 2
    print(f"\n{'START':{width}}" + "".join(f"{words:>20}" for words in titles) + f"{'time':>14}")
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
