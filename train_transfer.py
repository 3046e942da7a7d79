"""Transfer: classify with few labels, starting from pretrained encoders, and compare them with starting from scratch.

    python train_transfer.py runs/NAME scratch --runs 5                     fine-tune both, five runs each
    python train_transfer.py runs/NAME scratch --mode linear                the encoder frozen, a linear classifier
    python train_transfer.py runs/NAME scratch --mode probe --data probe40  three probes in seconds, on other classes
    python train_transfer.py --resume runs/NAME                             go on with a command that was stopped

A START is a pretext run's folder, an encoder.pt, or the word `scratch`: the same network with random weights. The
protocol is fast.ai's Image网: train on every class of train/, and after the last epoch test on val/, which holds only
some of them. These have few labels (a tenth), so figures are corrected for the class prior; those without
the correction stand beside them. The folder gets settings.json, summary.json, predictions.csv and what TensorBoard
shows: curves, confusion matrices and the most confident mistakes.

`--mode linear` trains a linear classifier on the frozen encoder. `--mode knn` asks the 20 nearest training images.
`--mode probe` trains nothing: a linear classifier in closed form, kNN, and the first again with 25 labels a class."""

import argparse
import contextlib
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch

from engine import AMP, DEVICES, choose_amp, choose_device, device_name
from harness import checkpoint, command, files, folder
from harness.errors import RunError, UsageError
from harness.log import Log
from harness.pictures import draw_confusion, draw_sheet, legible
from transfer import FIGURES, MODES, Answer, Labelled, Start, classify, open_labelled, open_starts

MISTAKES = 24  # on the contact sheet
FINETUNING, TRAINING = {"encoder_rate", "freeze"}, {"epochs", "batch_size", "lr"}  # options


def parse() -> tuple[argparse.Namespace, dict | None]:
    """The command line -> settings, and the checkpoint to go on from, if any."""
    integer = command.integer
    parser = command.Parser(__doc__)
    start = "a pretext run's folder, an encoder.pt, or `scratch`"
    parser.add_argument("starts", type=command.place, nargs="*", metavar="START", help=f"{start} (default: --resume's)")
    add = parser.add_argument_group("images").add_argument
    add("--data", type=command.place, help="as in train_pretext.py (default: that of the first START)")
    add("--data-dir", type=command.place, default="data", help="folder for data sets by name, and for decoded images")
    add("--encoder", help="that of `scratch` (default: that of the first START, else conv)")
    add("--size", type=integer(8, 1024), help="side of a view, px (default: that of the first START)")
    add("--allow-skipped", action="store_true", help="go on if half of the images or more cannot be used")
    add = parser.add_argument_group("training").add_argument
    add("--mode", choices=MODES, default="finetune", help="what is trained")
    add("--epochs", type=integer(1), default=5, help="passes over the labelled images")
    add("--runs", type=integer(1), default=1, help="repetitions, with seeds --seed, --seed + 1, …")
    add("--batch-size", type=integer(2), default=64, help="images in a step")
    add("--lr", type=command.rate, default=1e-3, help="peak learning rate of AdamW")
    add("--encoder-rate", type=command.share, default=0.5, help="finetune: the encoder's rate, as a share of --lr")
    add("--freeze", type=integer(0), default=5, help="finetune: epochs for the head alone before the others")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="fixes all that is random")
    add("--device", choices=DEVICES, default="auto", help="where to compute; auto: a CUDA GPU if there is one")
    add("--amp", choices=AMP, default="auto", help="bf16; auto: on GPUs that have it, not on CPUs")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=command.place, help="the run's folder (default: runs/transfer-MODE-DATA-ENCODER-TIME)")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", type=command.place, metavar="FOLDER", help="go on with the run in this folder (default: a new run)")
    args = parser.parse_args()
    saved = folder.resume(parser, args, {"device", "data", "data_dir", "allow_skipped"})
    unused = {"finetune": set(), "linear": FINETUNING}.get(args.mode, FINETUNING | TRAINING)
    parser.refuse(unused, f"has no use in --mode {args.mode}; leave one of them out")
    if not args.starts:
        raise UsageError(f"no START is given: name {start}")
    if "scratch" not in args.starts:
        parser.refuse({"encoder"}, "is of `scratch`, which is none of the STARTs; leave it out, or add that one")
    return args, saved


def main() -> None:
    """Assemble, train, report."""
    args, saved = parse()
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    starts = open_starts(args)
    place = folder.choose(args, f"transfer-{args.mode}")
    data = open_labelled(args.data, args.size, args.data_dir, starts[0].ranges)
    warned = data.images.warn_of_skipped(args.allow_skipped)
    for start, (kind, own) in itertools.product(starts, data.images.listing.ranges.items()):
        if start.state is not None and start.ranges.get(kind) != own:
            print(f"note: {start.name} learnt from {kind} images at another scale, or from none", file=sys.stderr)
    runs = saved["runs"] if saved else []
    state = {"script": "train_transfer", "format": folder.FORMAT, "settings": vars(args)}
    state |= {"data": data.images.identity(), "starts": {start.name: start.digest for start in starts}}
    if saved:
        folder.check_same(*({**of["data"], **of["starts"]} for of in (saved, state)), args.resume)
    place = folder.make(place, args, device_name(device))
    print(data.images.describe())
    counts = f"training on {len(data.train)} images of {len(data.counts)} classes, validating on {len(data.val)}"
    print(f"{args.mode}: {counts} of {len(data.held)}; {device_name(device)}{', bf16' if amp else ''}")
    recipe = argparse.Namespace(**vars(args) | {"device": device, "amp": amp})
    for file in place.glob("events.out.tfevents.*"):
        file.unlink()  # finished runs are logged again
    checkpoint.save_last({**state, "runs": runs}, place)
    with contextlib.closing(Log(place)) as log, command.Interrupts() as interrupts:
        for run in runs:
            log_curves(run, log)

        def after_step():
            if interrupts.signal:
                go_on = f"go on with: python train_transfer.py --resume {shlex.quote(str(place))}"
                raise RunError(f"stopped; runs that are not finished will begin anew; {go_on}", interrupts.signal)

        for seed, start in itertools.product(range(args.seed, args.seed + args.runs), starts):
            if not any((run["start"], run["seed"]) == (names_of(start, args.mode)[0], seed) for run in runs):
                runs += run_once(start, data, recipe, seed, after_step)
                log_curves(runs[-1], log)
                checkpoint.save_last({**state, "runs": runs}, place)
                after_step()
        names = [name for start in starts for name in names_of(start, args.mode)]
        rows = {name: [run for run in runs if run["start"] == name] for name in names}
        summary = {name: summarise(args, of_start, device) | warned for name, of_start in rows.items()}
        files.write_csv(predictions(runs, data), place / "predictions.csv")
        files.write_json(summary, place / "summary.json")
        print_summary(args, summary, data, place)
        for warning in warned.values():
            print(f"warning      {warning}")
        for run in runs:  # last: nothing but pictures is lost if one fails
            try:
                draw(run, data, log)
            except Exception as error:  # noqa: BLE001
                print(f"note: no picture of {run['start']}, seed {run['seed']}: {error}", file=sys.stderr)


def names_of(start: Start, mode: str) -> list[str]:
    """The rows of a start in the table."""
    ways = MODES[mode]
    return [start.name if len(ways) == 1 else f"{start.name}, {way}" for way in ways]


def run_once(start: Start, data: Labelled, recipe: argparse.Namespace, seed: int, after_step: Callable) -> list[dict]:
    """One run of one start, as a checkpoint keeps it: a dict for each of its rows. `after_step()` follows each step."""
    clock, curve, runs = time.perf_counter(), [], []
    answers = classify(start, data, recipe, seed, lambda *epoch: curve.append(epoch), after_step)
    seconds = time.perf_counter() - clock
    for name, answer in zip(names_of(start, recipe.mode), answers.values(), strict=True):
        accuracies = answer.accuracies(data.images.labels[data.val])
        figures = ", ".join(f"{title(figure, data)} {value:.1%}" for figure, value in accuracies.items())
        print(f"{name}, seed {seed}: {figures}")
        run = {"start": name, "seed": seed, "seconds": seconds, "answer": vars(answer)}
        runs.append({**run, "curve": curve, "accuracies": accuracies})
    return runs


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
    classes, said, step = legible(data.images.listing.classes), answer.all_classes, run["seed"]
    log.picture(None, f"confusion/{run['start']}", draw_confusion(said, labels, classes), step)
    wrong = (said != labels).nonzero().squeeze(1)
    wrong = wrong[answer.confidence[wrong].argsort(descending=True)][:MISTAKES]
    captions = [(f"said {classes[said[i]]} {answer.confidence[i]:.0%}", f"is {classes[labels[i]]}") for i in wrong]
    pixels = data.images.pixels[[data.val[i] for i in wrong]]
    log.picture(None, f"mistakes/{run['start']}", draw_sheet(pixels, captions), step)


def summarise(args: argparse.Namespace, runs: list[dict], device: torch.device) -> dict:
    """The runs of one start, in figures."""
    summary = {"data": args.data, "mode": args.mode, "runs": args.runs}
    summary |= {"epochs": args.epochs} if args.mode in ("finetune", "linear") else {}
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
    if not any(name.startswith("scratch") for name in summary):
        print("compare      add the word `scratch` to the starts")


if __name__ == "__main__":
    command.run(main)
