"""Pretrain an encoder by unmixing: show it mixtures of photographs and ask how much of each candidate is in them.

    python train_pretext.py --epochs 50                         the bundled photographs
    python train_pretext.py --epochs 50 --data FOLDER           any folder of images
    python train_pretext.py --epochs 50 --no-views              candidates show the very pixels that were mixed
    python train_pretext.py --resume runs/NAME                  go on with a run that was stopped
    torchrun --nproc_per_node=8 train_pretext.py …              on several devices
    tensorboard --logdir runs                                   watch it

The run's folder gets settings.json, history.csv, summary.json, validation.png, checkpoint.pt, encoder.pt and logs."""

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import engine
from augment import generator, to_pixels
from data import PLACES, ImageDataset, Images, get_dataloaders, open_pretext, spread
from engine import AMP, DEVICES, Trainer, choose_amp, choose_device, device_name, encode_images, memory, warm_up_norms
from harness import checkpoint, command, folder, ranks
from harness.download import ARCHIVES
from harness.errors import RunError, UsageError, ValueProblem
from harness.files import write_json
from harness.log import Log
from harness.pictures import draw_mixtures, draw_neighbours, draw_reliability, legible
from harness.ranks import RANK, RANKS
from models import DECODERS, build_model, check_size
from tasks import ACTIVATIONS, LOSSES, TASKS, LabelTask, MixupTransform, Question, WeightTask, settings_of

QUESTION = {"candidates", "sources", "views", "activation", "loss"}  # options
OFTEN = {"checkpoint_every", "inspect_every"}
PLUMBING = {"out", "overwrite", "resume", "data_dir", "device", "images", "compile", "ranges", "allow_skipped"} | OFTEN
FIGURES = {  # name: (what it is called, its format)
    "loss": ("loss", ".3f"),
    "source_accuracy": ("sources named right", ".1%"),
    "weight_mae": ("weight error", ".3f"),
    "accuracy": ("accuracy", ".1%"),
}
HOLD = 0.75  # share of the steps: if views grow, the learning rate stays at its peak until they have their full size
PROJECTED = 400  # validation images in TensorBoard's projector, at most
THUMBNAIL = 32  # px
EXAMPLES = 8  # mixtures in a picture
CARD = {"examples": 6, "tile": 40}  # of a picture that is legible in TensorBoard's cards


def parse() -> tuple[argparse.Namespace, dict | None]:
    """The command line -> settings, and the checkpoint to go on from, if any."""
    integer, switch = command.integer, argparse.BooleanOptionalAction
    parser = command.Parser(__doc__)
    add = parser.add_argument_group("images").add_argument
    names = ", ".join(ARCHIVES)
    add("--data", type=command.place, default="photos", help=f"`photos` (bundled), a folder, or {names}: fetched")
    add("--data-dir", type=command.place, default="data", help="folder for data sets by name, and for decoded images")
    add("--size", type=integer(8, 1024), default=32, help="side of a view, px")
    add("--grow", action=switch, help="views of half of --size at first, see docs/speed.md (default: with conv)")
    add("--allow-skipped", action="store_true", help="go on if half of the images or more cannot be used")
    add = parser.add_argument_group("question").add_argument
    add("--task", choices=TASKS, default="mixup", help="`mixup`: how much of each image is in it? others: see tasks.py")
    add("--candidates", type=integer(2, word="batch"), help="how many; `batch`: all images (default: batch; scale: 3)")
    add("--sources", type=integer(2), default=2, help="images in a mixture")
    add("--views", action=switch, default=True, help="candidates show another crop, flip and colour than was mixed")
    add("--activation", choices=ACTIVATIONS, default="softmax", help="weights as a distribution, or each by itself")
    add("--loss", choices=LOSSES, default="kl", help="cross-entropy less the truth's own entropy, or squared error")
    add = parser.add_argument_group("network").add_argument
    add("--encoder", default="conv", help="what is kept: conv, or a classification network of torchvision by name")
    add("--widths", type=integer(1), nargs="+", help="channels of conv's convolutions (default: 16 64 128 256)")
    add("--decoder", choices=DECODERS, default="ridge", help="what compares mixture and candidates")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=integer(1), default=50, help="passes over the images")
    add("--batch-size", type=integer(2), default=64, help="images in a step")
    add("--lr", type=command.rate, default=3e-3, help="peak learning rate of AdamW")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="fixes all that is random")
    add("--device", choices=DEVICES, default="auto", help="where to compute; auto: a CUDA GPU if there is one")
    add("--amp", choices=AMP, default="auto", help="bf16; auto: on GPUs that have it, not on CPUs")
    add("--images", choices=PLACES, default="auto", help="all on the device, or streamed from the cache")
    add("--compile", action="store_true", help="torch.compile the encoder")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=command.place, help="the run's folder (default: runs/pretext-DATA-ENCODER-TIME)")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--checkpoint-every", type=integer(0), default=0, help="steps between checkpoints; 0: one an epoch")
    add("--inspect-every", type=integer(0), default=10, help="epochs between histograms and neighbours; 0: never")
    add("--resume", type=command.place, metavar="FOLDER", help="go on with the run in this folder (default: a new run)")
    parser.set_defaults(ranges={})  # what is black and white beyond 8 bits: found in the images, kept for what follows
    args = parser.parse_args()
    unused = {"decoder"} if issubclass(TASKS[args.task], LabelTask) else set()
    unused |= QUESTION - settings_of(args.task)
    parser.refuse(unused, f"is given, and --task {args.task} has no use for it; leave one of them out")
    args.grow = args.encoder == "conv" if args.grow is None else args.grow
    saved = folder.resume(parser, args, {"epochs", "device", "data", "data_dir", "allow_skipped", *OFTEN})
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"))):
        raise ValueProblem("compile", None, "needs a C++ compiler, such as g++, and there is none; leave it out")
    return args, saved


def make_task(args: argparse.Namespace) -> WeightTask | LabelTask:
    """The task; its number of candidates is noted in `args`. Raises UsageError if the batch is too small for it."""
    given = {name: value for name, value in vars(args).items() if value is not None}  # --candidates may be the task's
    task = TASKS[args.task](**{name: given[name] for name in settings_of(args.task) & given.keys()})
    args.candidates = getattr(task, "candidates", None)
    if isinstance(task, MixupTransform):
        name, needed = ("sources", task.sources) if task.candidates == "batch" else ("candidates", task.candidates)
        if needed > args.batch_size:
            raise UsageError(f"--{name} {needed} is more than --batch-size {args.batch_size} has; change one of them")
    return task


def main() -> None:
    """Assemble, train, report."""
    args, saved = parse()
    device = ranks.start(choose_device(args.device))
    amp = choose_amp(args.amp, device)
    task = make_task(args)
    torch.manual_seed(args.seed)
    model = build_model(args.encoder, args.decoder, args.size, task.classes, args.widths)
    if args.grow:
        check_size(model.encoder, args.encoder, view_size(1, args.epochs, args.size), growing=True)
    if args.batch_size % RANKS:
        raise UsageError(f"--batch-size {args.batch_size} is not a multiple of the {RANKS} processes; change one")
    place = folder.choose(args, "pretext")
    with ranks.first_rank_first():  # it downloads and decodes
        images, train, val = open_pretext(args.data, args.size, args.data_dir, args.batch_size, args.ranges)
    warned, args.ranges = images.warn_of_skipped(args.allow_skipped), dict(images.listing.ranges)
    loaders = get_dataloaders(images, train, val, args.batch_size, args.seed, device, args.images)
    steps, hold = args.epochs * len(loaders[0]), HOLD if args.grow else None
    trainer = Trainer(model, task, lr=args.lr, steps=steps, hold=hold, seed=args.seed, device=device, amp=amp)
    progress = Progress(args, trainer, images)
    if saved:
        progress.restore(saved)
    if args.compile:
        model.encoder.compile()
    place = folder.make(place, args, device_name(device))
    print(images.describe())
    where = "streamed" if loaders[0].dataset.resident is None else "on the device"
    on = device_name(device) + ", bf16" * amp
    print(f"training on {len(train)} images, {where}, validating on {len(val)}; {on}")
    with contextlib.closing(Log(place, progress.history if saved else None)) as log:
        fit(progress, *loaders, log)
        settings = {name: value for name, value in vars(args).items() if name not in PLUMBING}
        final = {name: value for name, value in progress.history[-1].items() if name.startswith("val_")}
        with folder.rescued(place, progress.state):
            log.settings(settings, final, args.epochs)
    if RANK:
        return
    checkpoint.save(model.encoder.cpu().state_dict(), place / "encoder.pt")  # for machines without a GPU, too
    summary = {name: vars(args)[name] for name in ("data", "task", "epochs", "seed")}
    summary |= {"train_images": len(train), "val_images": len(val), **final, "references": progress.references}
    summary |= {"images_per_second": statistics.median(progress.speeds or [0.0]), "seconds": progress.seconds}
    summary |= {"device": device_name(device), "amp": "bf16" if amp else "off", **warned}
    write_json(summary, place / "summary.json")  # the last file: where it is, the run is complete
    print_summary(summary, place, "" if images.listing.classes else " --data LABELLED_FOLDER")


class Progress:
    """All state that a checkpoint saves."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer, images: Images):
        self.args, self.trainer, self.data = args, trainer, images.identity()
        self.history, self.references = [], {}  # a row an epoch; scores of what has not learnt, by name
        self.speeds, self.seconds = [], 0.0  # images/s of the epochs; of the whole run
        self.clock, self.writer = time.perf_counter(), checkpoint.Writer()

    def state(self) -> dict:
        """For a checkpoint: tensors and plain values only."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        kept = {name: getattr(self, name) for name in ("data", "history", "references", "speeds", "seconds")}
        run = {"script": "train_pretext", "format": folder.FORMAT, "settings": vars(self.args)}
        return {**self.trainer.state(), **kept, **run}

    def save(self, place: Path) -> None:
        """Begin to write the folder's last checkpoint; the first rank does this for all."""
        if not RANK:
            with folder.rescued(place, self.state):
                self.writer.save_last(self.state(), place)

    def saved(self, place: Path) -> None:
        """Wait until it is written."""
        with folder.rescued(place, self.state):
            self.writer.wait()

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint. Raises UsageError if it is of other data or another network, or complete."""
        place, epochs = self.args.resume, self.args.epochs
        folder.check_same(state["data"], self.data, place)
        checkpoint.load_weights(self.trainer.model, state["model"], f"the checkpoint in {place}")
        self.trainer.restore(state)
        for name in ("history", "references", "speeds", "seconds"):
            setattr(self, name, state[name])
        if self.trainer.taken > self.trainer.steps:
            raise UsageError(f"--resume {place}: the run has more than {epochs} epochs already; give more --epochs")
        finished = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            finished = json.loads(Path(place, "summary.json").read_text())["epochs"]
        if len(self.history) == epochs == finished:
            raise UsageError(f"--resume {place}: the run has all of its {epochs} epochs; --epochs gives more")


def fit(progress: Progress, train_loader: DataLoader, val_loader: DataLoader, log: Log) -> None:
    """Every epoch: train, validate, log, save. As many training images get the validation question, to compare."""
    args, trainer = progress.args, progress.trainer
    task = trainer.task
    fixed = task.validation()  # the question that all runs share; of some tasks the task itself
    pictured = isinstance(fixed, WeightTask) and not RANK
    trained_loader = training_sample(train_loader.dataset, val_loader)
    if not progress.references:
        batches = enumerate(itertools.islice(train_loader, 10))
        first = (trainer.ask(task, *batch, generator(args.seed, 0, number)) for number, batch in batches)
        warm_up_norms(trainer.model, (question.inputs for question in first), trainer.amp)
        progress.references = {n: trainer.evaluate(val_loader, fixed, score) for n, score in fixed.baselines().items()}
        answers = Answers(fixed) if pictured else None
        progress.references["untrained"] = trainer.evaluate(val_loader, fixed, look=answers)
        with folder.rescued(log.folder, progress.state):
            log.scalars("val", 0, curves(progress.references["untrained"]))
            if args.inspect_every:
                look_inside(trainer, val_loader, log, fixed.size, 0, "before")
            if answers:
                draw_mixtures(*answers.first).save(log.folder / "validation.before.png")
        progress.save(log.folder)

    total, done = trainer.steps * args.batch_size, trainer.taken * args.batch_size
    bar = tqdm(total=total, initial=done, unit="image", unit_scale=True, disable=RANK > 0 or None)
    with bar, command.Interrupts() as interrupts:

        def after_step():
            due = args.checkpoint_every and trainer.taken % args.checkpoint_every == 0
            asked = RANKS == 1 or trainer.taken % engine.PEEK_EVERY == 0 or trainer.taken % len(train_loader) == 0
            stop = asked and ranks.any_rank(interrupts.signal is not None)
            if due or stop:
                trainer.check(train_loader)
                progress.save(log.folder)
            if stop:
                progress.saved(log.folder)
                ranks.any_rank(False)  # wait: torchrun ends the first rank soon after another has left
                steps = f"stopped after {trainer.taken} of {trainer.steps} steps"
                go_on = f"go on with: python train_pretext.py --resume {shlex.quote(str(log.folder))}"
                raise RunError(steps if RANK else f"{steps}; {go_on}", interrupts.signal or signal.SIGTERM)

        for epoch in range(len(progress.history) + 1, args.epochs + 1):
            bar.set_description(f"epoch {epoch}/{args.epochs}")
            if args.grow:
                trainer.task = copy.copy(task)  # so that the size of the validation question stays
                trainer.task.size = view_size(epoch, args.epochs, args.size)
            clock, before = time.perf_counter(), trainer.taken
            means = trainer.train_epoch(train_loader, epoch - 1, bar, after_step)
            steps, seconds = trainer.taken - before, time.perf_counter() - clock
            if steps:  # none is left if the run was stopped after the last one
                progress.speeds.append(steps * args.batch_size / seconds)
            speed = progress.speeds[-1] if progress.speeds else 0.0
            answers = Answers(fixed) if pictured else None
            val = trainer.evaluate(val_loader, fixed, look=answers)
            train = trainer.evaluate(trained_loader, fixed) if trained_loader else {}
            training = {name: means[name] for name in ("loss", "learning_rate", "gradient_norm")}
            training |= {"images_per_second": speed, "memory_mb": memory(trainer.device)}
            clock = time.perf_counter()
            with folder.rescued(log.folder, progress.state):
                for subrun, scores in ("train", train), ("val", val), ("chance", progress.references["chance"]):
                    log.scalars(subrun, epoch, curves(scores))
                log.scalars("train", epoch, {f"training/{name}": value for name, value in training.items()})
                seldom = args.inspect_every and (epoch % args.inspect_every == 0 or epoch == args.epochs)
                if answers:
                    log.picture("val", "mixtures/validation", draw_mixtures(*answers.first, **CARD), epoch)
                    log.picture("val", "mixtures/weights", draw_reliability(*torch.cat(answers.weights, dim=1)), epoch)
                    if seldom or epoch == args.epochs:
                        draw_mixtures(*answers.first).save(log.folder / "validation.png")
                if seldom:
                    look_inside(trainer, val_loader, log, fixed.size, epoch, "after" if epoch == args.epochs else None)
                figures = {"training": training, "train": train, "val": val}
                row = {f"{of}_{name}": value for of, scores in figures.items() for name, value in scores.items()}
                log.row({"epoch": epoch, **row, "logging_seconds": time.perf_counter() - clock})
            progress.history = log.history
            progress.save(log.folder)
            scores = ", ".join(f"{FIGURES[name][0]} {value:{FIGURES[name][1]}}" for name, value in val.items())
            number = f"{epoch:{len(str(args.epochs))}}/{args.epochs}"
            tqdm.write(f"epoch {number}: training loss {means['loss']:.3f}; validation {scores}; {speed:.0f} images/s")
    progress.saved(log.folder)


def view_size(epoch: int, epochs: int, size: int) -> int:
    """The side of the views in an epoch, px, if they grow: half of `size` in the first half of the epochs, three
    quarters of it in the third quarter, then `size`; 16 px at least. Small views are faster. Epochs count from 1.
    Images that grow during training: progressive learning (Tan & Le 2021, section 4)."""
    quarter = math.ceil(4 * epoch / epochs)
    return min(size, max(16, round((0.5, 0.5, 0.75, 1)[quarter - 1] * size)))


def training_sample(dataset: ImageDataset, val_loader: DataLoader) -> DataLoader | None:
    """As many training images as there are validation images, in blocks of the same sizes; None if there are fewer."""
    if len(dataset) < (count := len(val_loader.dataset)):
        return None
    rows = dataset.rows[torch.randperm(len(dataset), generator=generator(0))[:count].numpy()]  # of all classes
    sample = ImageDataset(dataset.images, rows, dataset.resident)
    return DataLoader(sample, batch_sampler=val_loader.batch_sampler, collate_fn=sample.collate)


def curves(scores: dict[str, float]) -> dict[str, float]:
    """Scores by the tags of their curves in TensorBoard."""
    return {f"curves/{FIGURES[name][0]}": value for name, value in scores.items()}


class Answers:
    """Collects the first validation answers to a task, and all weights, for pictures."""

    def __init__(self, task: WeightTask):
        self.task, self.first, self.weights = task, None, []

    def __call__(self, question: Question, logits: torch.Tensor) -> None:
        """Look at the answers to a question: logits B n."""
        predicted = self.task.predict(logits)
        if not self.first:
            mixtures, asked = to_pixels(question.mixtures[:EXAMPLES]), to_pixels(question.asked)
            candidates, weights = asked[question.candidates[:EXAMPLES]], question.weights[:EXAMPLES]
            self.first = mixtures, candidates, weights, predicted[:EXAMPLES]
        self.weights.append(torch.stack([question.weights.flatten(), predicted.flatten()]))


def look_inside(trainer: Trainer, val_loader: DataLoader, log: Log, size: int, epoch: int, subrun: str | None) -> None:
    """Log histograms, nearest neighbours and, in `subrun`, features of views of `size` px as points."""
    if RANK:
        return
    images, rows = val_loader.dataset.images, spread(val_loader.dataset.rows, PROJECTED)
    both, labels = (images.listing.classes, legible(images.listing.classes)), images.labels[rows].tolist()
    names, drawn = ([classes[label] if label >= 0 else "" for label in labels] for classes in both)
    encoder = trainer.model.encoder
    features = encode_images(encoder, images.pixels, rows, size, trainer.device, trainer.amp)
    log.histograms(trainer.model, epoch)
    log.picture("val", "neighbours/validation", draw_neighbours(images.pixels[rows], features, drawn), epoch)
    if subrun:
        thumbnails = torch.nn.functional.interpolate(torch.from_numpy(images.pixels[rows]).float(), THUMBNAIL)
        log.projector(subrun, features, [name or "no label" for name in names], thumbnails, epoch)


def print_summary(summary: dict, place: Path, data: str) -> None:
    """The result beside what has not learnt, with one standard error of the shares, and what to do next, on `data`."""
    speed = f"{summary['images_per_second']:.0f} images/s on {summary['device']}"
    print(f"\n{summary['epochs']} epochs in {timedelta(seconds=round(summary['seconds']))}, {speed}")
    names = [name for name in FIGURES if f"val_{name}" in summary and name != "loss"]
    title = f"on {summary['val_images']} validation images"
    print(f"{title:28}" + "".join(f"{FIGURES[name][0]:>22}" for name in names))
    for row, scores in {**summary["references"], "trained": {name: summary[f"val_{name}"] for name in names}}.items():
        cells = []
        for name in names:
            value, style = scores[name], FIGURES[name][1]
            error = 100 * math.sqrt(max(0, value * (1 - value)) / summary["val_images"])  # of a binomial
            cells.append(f"{value:{style}}" + f" ± {error:.1f}" * (style.endswith("%") and row != "chance"))
        print(f"  {row:26}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"\nlook at it   tensorboard --logdir {shlex.quote(str(place.parent))}")
    if (place / "validation.png").exists():
        print(f"or           {place}/validation.before.png, validation.png")
    print(f"results      {place}/summary.json, history.csv, encoder.pt")
    print(f"next         python train_transfer.py {shlex.quote(str(place))} scratch{data}")
    if "warning" in summary:
        print(f"warning      {summary['warning']}")


if __name__ == "__main__":
    command.run(main, several=True)
