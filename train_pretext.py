"""Pretrain an encoder by unmixing: show it mixtures of photographs and ask how much of each candidate is in them.

    python train_pretext.py --epochs 50                         the bundled photographs
    python train_pretext.py --epochs 50 --data FOLDER           any folder of images
    python train_pretext.py --epochs 50 --no-views              candidates show the very pixels that were mixed
    python train_pretext.py --resume runs/NAME                  go on with a run that was stopped
    tensorboard --logdir runs                                   watch it

The run's folder gets settings.json, history.csv, summary.json, report.html, validation.png, checkpoint.pt, encoder.pt
and what TensorBoard shows.
"""

import argparse
import contextlib
import itertools
import json
import signal
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import cli
import distributed
import options
import webpage
from data import PLACES, FullBatches, Images, check_same, get_dataloaders, open_pretext
from distributed import RANK, RANKS
from engine import Trainer, choose_amp, choose_device, device_name, features, memory
from errors import Stopped, UsageError
from models import build_model
from pictures import draw_filters, draw_mixtures, draw_neighbours
from report import FORMATS, WORDS, Log, Silent, charts, compared
from tasks import MixupTransform, Question, divergence

SPEED = ("learning_rate", "gradient_norm", "images_per_second", "memory_mb")
PLUMBING = {
    "out",
    "overwrite",
    "resume",
    "data_dir",
    "device",
    "images",
    "compile",
    "checkpoint_every",
    "inspect_every",
}
PROJECTED = 400  # validation images in TensorBoard's projector, at most
THUMBNAIL = 32  # px
ASKED = ("candidates", "sources", "pure", "regions")  # what makes a question another one
CALIBRATION = 10  # training batches that tell how confident the network may be


def parse() -> tuple[argparse.Namespace, dict | None]:
    """The command line -> settings, and the checkpoint to go on from, if any."""
    parser = options.Parser(*__doc__.split("\n\n", 1))
    options.add_data_options(parser)
    options.add_task_options(parser)
    options.add_model_options(parser)
    options.add_recipe_options(parser)
    group = options.add_loop_options(parser)
    group.add_argument("--epochs", type=options.whole(1), default=50, help="passes over the images")
    group.add_argument("--batch-size", type=options.whole(2), default=64, help="images in a step")
    group.add_argument(
        "--images", choices=PLACES, default="auto", help="where they live: all on the device, or streamed"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    group = options.add_run_options(parser)
    group.add_argument(
        "--checkpoint-every", type=options.whole(0), default=0, help="steps between checkpoints; 0: one an epoch"
    )
    group.add_argument(
        "--inspect-every", type=options.whole(0), default=10, help="epochs between histograms and neighbours; 0: never"
    )
    options.add_resume_options(group)
    args = parser.parse_args()
    options.refuse_unused(parser, args.task)
    return args, cli.resume(parser, args, {"epochs", "device", "checkpoint_every", "inspect_every"})


def main() -> None:
    """Assemble, train, report."""
    args, saved = parse()
    device = distributed.start(choose_device(args.device))
    amp = choose_amp(args.amp, device)
    task = options.make_task(args, args.batch_size, "--batch-size")
    torch.manual_seed(args.seed)
    network = {name: vars(args)[name] for name in ("hidden", "temperature", "momentum")}
    model = build_model(args.encoder, args.decoder, args.size, task.classes, **network)
    if args.batch_size % RANKS:
        raise UsageError(
            f"--batch-size {args.batch_size} is not a multiple of the {RANKS} processes; change one of them"
        )
    folder = Path(args.resume) if args.resume else cli.choose_folder(args, "pretext")

    with distributed.first_rank_first():  # one of them downloads and decodes
        images, train, val = open_pretext(args.data, args.size, args.data_dir, args.batch_size)
    loaders = get_dataloaders(images, train, val, args.batch_size, args.seed, device, args.images)
    trainer = Trainer(
        model, task, lr=args.lr, steps=args.epochs * len(loaders[0]), seed=args.seed, device=device, amp=amp
    )
    progress = Progress(args, trainer, images)
    if saved:
        progress.restore(saved)
    if args.compile:
        model.encoder.compile()
    cli.make_folder(folder, args, device_name(device))
    print(images.describe())
    place = "streamed" if loaders[0].dataset.resident is None else "on the device"
    print(
        f"training on {len(train)} images, {place}, validating on {len(val)}; "
        f"{device_name(device)}{', bf16' if amp else ''}"
    )
    with contextlib.closing((Silent if RANK else Log)(folder, progress.history if saved else None)) as log:
        if not saved and not RANK:
            log.text("settings", (folder / "settings.json").read_text())
        try:
            results = fit(progress, *loaders, log)
            final = {name: value for name, value in results.items() if name.startswith("val_") and "own" not in name}
            log.settings(
                {name: value for name, value in vars(args).items() if name not in PLUMBING}, final, args.epochs
            )
        except BrokenPipeError:  # who reads what is printed has gone
            raise
        except OSError as error:
            raise cli.rescue(progress.state(), folder, error) from error
    if RANK:
        return
    checkpoint.save(model.encoder.state_dict(), folder / "encoder.pt")
    summary = {
        "data": args.data,
        "task": args.task,
        "epochs": args.epochs,
        "train_images": len(train),
        "val_images": len(val),
        **results,
        "seconds": progress.seconds,
        "device": device_name(device),
        "amp": "bf16" if amp else "off",
        "seed": args.seed,
    }
    write_page(summary, progress.history, folder)
    checkpoint.save_json(summary, folder / "summary.json")  # the last file: where it is, the run is complete
    print_summary(summary, folder)


class Progress:
    """How far a run has come: all that a checkpoint holds, and nothing else changes from epoch to epoch."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer, images: Images):
        self.args, self.trainer = args, trainer
        self.data = images.identity()
        self.history, self.references = [], {}  # a row an epoch; what the last one is compared with
        self.speeds, self.seconds = [], 0.0  # images/s of whole epochs; of the whole run
        self.clock = time.perf_counter()

    def state(self) -> dict:
        """For a checkpoint: tensors and plain values."""
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        kept = {name: getattr(self, name) for name in ("data", "history", "references", "speeds", "seconds")}
        return {**self.trainer.state(), **kept, "script": "train_pretext", "settings": vars(self.args)}

    def _summarised(self) -> int | None:
        """The epochs that the folder's summary speaks of."""
        try:
            return json.loads(Path(self.args.resume, "summary.json").read_text())["epochs"]
        except (OSError, ValueError, KeyError):
            return None

    def save(self, folder: Path) -> None:
        """Write the folder's last checkpoint; the first rank does it for all."""
        if not RANK:
            checkpoint.save_last(self.state(), folder)

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint. Raises UsageError where it is of other data or another network, or complete."""
        check_same(state["data"], self.data, self.args.resume)
        checkpoint.fit(self.trainer.model, state["model"], f"the checkpoint in {self.args.resume}")
        self.trainer.restore(state)
        for name in ("history", "references", "speeds", "seconds"):
            setattr(self, name, state[name])
        if self.trainer.taken > self.trainer.steps:
            raise UsageError(
                f"--resume {self.args.resume}: the run is in epoch {len(self.history) + 1} already; "
                f"{self.args.epochs} --epochs are too few"
            )
        if len(self.history) == self.args.epochs == self._summarised():
            raise UsageError(
                f"--resume {self.args.resume}: the run has all of its {self.args.epochs} epochs; --epochs gives more"
            )


def fit(progress: Progress, train_loader, val_loader, log: Log) -> dict:
    """Every epoch: train, validate, log, save. Returns the last validation figures, references and speed."""
    args, trainer = progress.args, progress.trainer
    task, exam = trainer.task, trainer.task.validation()
    shown = next(trainer.questions(val_loader, exam))
    if not progress.references:
        trainer.settle(train_loader)
        progress.references = {n: trainer.evaluate(val_loader, exam, score) for n, score in exam.baselines().items()}
        progress.references["untrained"] = untrained = trainer.evaluate(val_loader, exam)
        log.scalars(0, {f"val_{name}": value for name, value in untrained.items()})
        inspect(trainer, val_loader, log, 0)
        if isinstance(shown, Question) and not RANK:
            draw(exam, shown, trainer.answer(shown)).save(log.folder / "validation.before.png")
        progress.save(log.folder)
    # A run on another question than the fixed one is validated on its own as well, where the images suffice.
    other = isinstance(task, MixupTransform) and any(vars(task)[name] != vars(exam)[name] for name in ASKED)
    own = own_batches(task, val_loader, args.batch_size) if other else None
    constant = {"floor_loss": 0.0}
    constant |= {f"uninformed_{name}": value for name, value in progress.references["chance"].items()}
    if own is not None:
        chance = trainer.evaluate(own, task, task.baselines()["chance"])
        constant |= {f"uninformed_own_{name}": value for name, value in chance.items()}
    if not progress.history:
        log.layout(
            {
                **charts(list(progress.references["untrained"]), other, own is not None),
                **{name.replace("_", " "): [name] for name in SPEED},
            }
        )

    seen = len(train_loader) * args.batch_size  # images an epoch
    speed = 0.0
    done = trainer.taken * args.batch_size
    bar = tqdm(total=args.epochs * seen, initial=done, unit="image", unit_scale=True, disable=RANK > 0 or None)
    with bar, cli.Interrupts() as interrupts:

        def after_step():
            due = args.checkpoint_every and trainer.taken % args.checkpoint_every == 0
            stop = distributed.any_rank(interrupts.signal is not None)
            if due or stop:
                trainer.check(train_loader)
                progress.save(log.folder)
            if stop:
                raise Stopped(
                    f"stopped after {trainer.taken} of {trainer.steps} steps; "
                    f"go on with: python train_pretext.py --resume {log.folder}",
                    interrupts.signal or signal.SIGTERM,
                )

        for epoch in range(len(progress.history) + 1, args.epochs + 1):
            bar.set_description(f"epoch {epoch}/{args.epochs}")
            clock, before = time.perf_counter(), trainer.taken
            means = trainer.train_epoch(train_loader, epoch - 1, bar, after_step)
            speed = (trainer.taken - before) * args.batch_size / (time.perf_counter() - clock)
            if trainer.taken - before == len(train_loader):  # a whole epoch, not the rest of one
                progress.speeds.append(speed)
            answers = Answers()
            scores = trainer.evaluate(val_loader, exam, look=answers if isinstance(shown, Question) else None)
            figures = {f"train_{name}" if name in scores else name: value for name, value in means.items()}
            figures |= {"images_per_second": speed}
            figures |= {"memory_mb": memory(trainer.device)}
            figures |= {f"val_{name}": value for name, value in scores.items()}
            if own is not None:
                figures |= {f"val_own_{name}": value for name, value in trainer.evaluate(own, task).items()}
            clock = time.perf_counter()
            seldom = args.inspect_every and (epoch % args.inspect_every == 0 or epoch == args.epochs)
            if answers.first and not RANK:
                picture = draw(exam, *answers.first)
                log.picture("1 validation", picture, epoch)
                log.picture("2 hardest of validation", draw(exam, *answers.hardest()), epoch)
                if seldom or epoch == args.epochs:
                    picture.save(log.folder / "validation.png")
            if seldom:
                inspect(trainer, val_loader, log, epoch, projector=epoch == args.epochs)
            log.epoch(epoch, {**figures, "logging_seconds": time.perf_counter() - clock, **constant})
            progress.history = log.history
            progress.save(log.folder)
            scored = ", ".join(f"{WORDS[name]} {value:{FORMATS[name]}}" for name, value in scores.items())
            tqdm.write(
                f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}: training loss {means['loss']:.3f}; "
                f"validation {scored}; {figures['images_per_second']:.0f} images/s"
            )
    results = {
        **{name: value for name, value in progress.history[-1].items() if name.startswith("val_")},
        "references": progress.references,
        "own_question": other,  # whether the run trains on another one than all are validated with
        "images_per_second": statistics.median(progress.speeds or [speed]),
    }
    if other and args.batch_size >= exam.candidates:
        # Learnt from many candidates, the logits are too far apart among three; how far, training images tell.
        train_loader.batch_sampler.epoch = train_loader.batch_sampler.first = 0
        results["temperature"] = t = trainer.temperature(itertools.islice(train_loader, CALIBRATION), exam)
        score = lambda question: exam.score(trainer.answer(question) / t, question)  # noqa: E731
        results["calibrated"] = trainer.evaluate(val_loader, exam, score)
    return results


def own_batches(task, val_loader, batch_size: int) -> Iterable | None:
    """The validation batches for a run's own question; None, which is said, where the images are too few for it."""
    if task.candidates == "batch":  # the loss grows with the candidates, so as many as in training
        candidates, enough = batch_size, len(val_loader.dataset.rows)
        batches = FullBatches(val_loader, batch_size)
    else:
        candidates, enough = max(task.candidates, task.sources), min(map(len, val_loader.batch_sampler))
        batches = val_loader
    if candidates <= enough:
        return batches
    print(f"no val_own figures: {candidates} candidates, and {enough} validation images to take them from")
    return None


def draw(task, question: Question, logits: torch.Tensor):
    """The picture of some mixtures and what the network said of them."""
    return draw_mixtures(question, task.predict(logits))


class Answers:
    """Looks over the network's shoulder at validation: its answers to the first question, and its worst ones."""

    def __init__(self, most: int = 8):
        self.most, self.rows, self.first = most, [], None

    def __call__(self, question: Question, logits: torch.Tensor) -> None:
        """Look at the answers to a question: logits B n."""
        self.first = self.first or (question, logits)
        wrong, rows = divergence(logits, question.weights, "softmax").topk(min(self.most, len(logits)))
        views = question.asked[question.candidates[rows]]  # m n 3 S S
        self.rows += zip(
            wrong.tolist(), question.mixtures[rows], views, question.weights[rows], logits[rows], strict=True
        )

    def hardest(self) -> tuple[Question, torch.Tensor]:
        """The mixtures that it is most wrong about, as a question, the worst first, and its logits."""
        worst = sorted(self.rows, key=lambda row: -row[0])[: self.most]
        mixtures, views, weights, logits = (torch.stack(column) for column in list(zip(*worst, strict=True))[1:])
        m, n = weights.shape
        candidates = torch.arange(m * n, device=weights.device).view(m, n)
        return Question(mixtures, views.flatten(0, 1), candidates, weights), logits


def inspect(trainer: Trainer, val_loader, log: Log, epoch: int, projector: bool = True) -> None:
    """The costlier looks: layers as histograms, first filters, and where validation images lie in feature space."""
    if RANK:
        return
    images, rows = val_loader.dataset.images, val_loader.dataset.rows
    rows = rows[:: max(1, len(rows) // PROJECTED)][:PROJECTED]
    names = [images.listing.classes[label] if label >= 0 else "" for label in images.labels[rows].tolist()]
    found = features(trainer.model.encoder, images.pixels, rows, trainer.task.size, trainer.device, trainer.amp)
    log.histograms(trainer.model, epoch)
    log.picture("3 nearest neighbours", draw_neighbours(images.pixels[rows], found, names), epoch)
    kernels = next(p for p in trainer.model.encoder.parameters() if p.ndim == 4)
    log.picture("4 first layer", draw_filters(kernels), epoch)
    if projector:
        thumbnails = torch.nn.functional.interpolate(torch.from_numpy(images.pixels[rows]).float(), THUMBNAIL)
        log.projector(found, [name or "no label" for name in names], thumbnails, epoch)


def write_page(summary: dict, history: list[dict], folder: Path) -> None:
    """report.html."""
    names = {name: word for name, word in WORDS.items() if f"val_{name}" in summary}
    rows = [[row, *(scores.get(name, "") for name in names)] for row, scores in compared(summary).items()]
    before_after = {
        word: folder / name
        for word, name in (("before training", "validation.before.png"), ("after", "validation.png"))
        if (folder / name).exists()
    }
    settings = json.loads((folder / "settings.json").read_text())
    own = f"val_own_{next(iter(names))}" in history[0]
    parts = [
        (f"On {summary['val_images']} validation images", webpage.table(["", *names.values()], rows)),
        ("Epoch by epoch", webpage.charts(history, charts(list(names), summary["own_question"], own))),
        ("The same mixtures before and after", webpage.pictures(before_after)),
        ("Command", webpage.preformatted(settings["command"])),
        ("Settings", webpage.preformatted(json.dumps(settings, indent=1))),
    ]
    took = f"{summary['epochs']} epochs in {cli.duration(summary['seconds'])}"
    webpage.write_report(folder / "report.html", f"{folder.resolve().name}: {took}", [p for p in parts if p[1]])


def print_summary(summary: dict, folder: Path) -> None:
    """The result, and what to do next."""
    speed = f"{summary['images_per_second']:.0f} images/s"
    print(f"\n{summary['epochs']} epochs in {cli.duration(summary['seconds'])}, {speed} on {summary['device']}")
    names = [name for name in WORDS if f"val_{name}" in summary and name != "loss"]
    print(f"{'on ' + str(summary['val_images']) + ' validation images':28}" + "".join(f"{WORDS[n]:>22}" for n in names))
    for row, scores in compared(summary).items():
        print(f"  {row:26}" + "".join(f"{scores[name]:>22}" for name in names))
    print(f"\nlook at it   tensorboard --logdir {folder.parent}")
    if (folder / "validation.png").exists():
        print(f"or           {folder}/report.html, validation.png")
    print(f"results      {folder}/summary.json, history.csv, encoder.pt")


if __name__ == "__main__":
    cli.run(main)
