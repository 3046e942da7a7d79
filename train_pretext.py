"""Pretrain an encoder by unmixing: show it mixtures of photographs and ask how much of each candidate is in them.

    python train_pretext.py --epochs 50                         the bundled photographs
    python train_pretext.py --epochs 50 --data FOLDER           any folder of images
    python train_pretext.py --epochs 50 --no-views              candidates show the very pixels that were mixed
    tensorboard --logdir runs                                   watch it

The run's folder gets settings.json, history.csv, summary.json, validation.png, checkpoint.pt, encoder.pt and
TensorBoard's curves.
"""

import argparse
import contextlib
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import cli
from data import get_dataloaders, open_pretext
from engine import Trainer, choose_amp, choose_device, device_name
from models import build_model
from report import Log, draw_mixtures
from tasks import Question

WORDS = {
    "loss": "loss",
    "source_accuracy": "sources named right",
    "weight_mae": "weight error",
    "accuracy": "accuracy",
}
FORMATS = {"loss": ".3f", "source_accuracy": ".1%", "weight_mae": ".3f", "accuracy": ".1%"}


def parse() -> argparse.Namespace:
    """The command line -> settings."""
    parser = cli.Parser(*__doc__.split("\n\n", 1))
    cli.add_data_options(parser)
    cli.add_task_options(parser, candidates=8)
    cli.add_model_options(parser)
    group = cli.add_loop_options(parser, lr=1e-3)
    group.add_argument("--epochs", type=cli.whole(1), default=50, help="passes over the images")
    group.add_argument("--batch-size", type=cli.whole(2), default=64, help="images in a step")
    group.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    cli.add_run_options(parser)
    return parser.parse_args()


def main() -> None:
    """Assemble, train, report."""
    args = parse()
    started = time.perf_counter()
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    task = cli.make_task(args, args.batch_size, "--batch-size")
    torch.manual_seed(args.seed)
    import models

    models.Projection.hidden = args.hidden
    model = build_model(args.encoder, args.decoder, args.size, task.classes)
    folder = cli.choose_folder(args, "pretext")

    images, train, val = open_pretext(args.data, args.size, args.data_dir, args.batch_size)
    loaders = get_dataloaders(images, train, val, args.batch_size, args.seed, device.type == "cuda")
    steps = args.epochs * len(loaders[0])
    trainer = Trainer(model, task, lr=args.lr, steps=steps, seed=args.seed, device=device, amp=amp)
    if args.compile:
        model.encoder.compile()
    cli.make_folder(folder, args, device_name(device))
    print(images.describe())
    print(f"training on {len(train)} images, validating on {len(val)}; {device_name(device)}{', bf16' if amp else ''}")
    with contextlib.closing(Log(folder)) as log:
        log.text("settings", (folder / "settings.json").read_text())
        results = fit(args, trainer, *loaders, log)
    checkpoint.save(model.encoder.state_dict(), folder / "encoder.pt")
    summary = {
        "data": args.data,
        "task": args.task,
        "epochs": args.epochs,
        "train_images": len(train),
        "val_images": len(val),
        **results,
        "seconds": time.perf_counter() - started,
        "device": device_name(device),
        "amp": "bf16" if amp else "off",
        "seed": args.seed,
    }
    checkpoint.save_json(summary, folder / "summary.json")
    print_summary(summary, folder)


def fit(args: argparse.Namespace, trainer: Trainer, train_loader, val_loader, log: Log) -> dict:
    """Every epoch: train, validate, log, save. Returns the last validation figures, references and speed."""
    task, exam = trainer.task, trainer.task.validation()
    trainer.settle(train_loader)
    references = {name: trainer.evaluate(val_loader, exam, score) for name, score in exam.baselines().items()}
    references["untrained"] = trainer.evaluate(val_loader, exam)
    log.scalars(0, {f"val_{name}": value for name, value in references["untrained"].items()})
    # A run on another question than the fixed one is validated on its own as well.
    own = args.task == "mixup" and (task.candidates, task.sources) != (exam.candidates, exam.sources)
    smallest = min(map(len, val_loader.batch_sampler))
    if own and max(task.sources, 0 if task.candidates == "batch" else task.candidates) > smallest:
        print(f"no val_own figures: {task.candidates} candidates, and {smallest} validation images to take them from")
        own = False
    shown = next(trainer.questions(val_loader, exam))

    training = 0.0
    seen = len(train_loader) * args.batch_size  # images an epoch
    with tqdm(total=args.epochs * seen, unit="image", unit_scale=True, disable=None) as bar:
        for epoch in range(1, args.epochs + 1):
            bar.set_description(f"epoch {epoch}/{args.epochs}")
            clock = time.perf_counter()
            means = trainer.train_epoch(train_loader, epoch - 1, bar)
            seconds = time.perf_counter() - clock
            training += seconds
            scores = trainer.evaluate(val_loader, exam)
            figures = {f"train_{name}" if name in scores else name: value for name, value in means.items()}
            figures |= {"images_per_second": seen / seconds}
            figures |= {f"val_{name}": value for name, value in scores.items()}
            if own:
                figures |= {f"val_own_{name}": value for name, value in trainer.evaluate(val_loader, task).items()}
            log.epoch(epoch, figures)
            if isinstance(shown, Question):
                picture = draw_mixtures(shown, exam.predict(trainer.answer(shown)))
                log.picture("validation", picture, epoch)
                picture.save(log.folder / "validation.png")
            state = {**trainer.state(), "epoch": epoch, "settings": vars(args)}
            checkpoint.save(state, log.folder / "checkpoint.pt")
            said = ", ".join(f"{WORDS[name]} {value:{FORMATS[name]}}" for name, value in scores.items())
            tqdm.write(
                f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}: training loss {means['loss']:.3f}; "
                f"validation {said}; {figures['images_per_second']:.0f} images/s"
            )
    return {
        **{name: value for name, value in figures.items() if name.startswith("val_")},
        "references": references,
        "images_per_second": args.epochs * seen / training,
    }


def print_summary(summary: dict, folder: Path) -> None:
    """The result beside what it has to be compared with, and what to do next."""
    speed = f"{summary['images_per_second']:.0f} images/s"
    print(f"\n{summary['epochs']} epochs in {cli.duration(summary['seconds'])}, {speed} on {summary['device']}")
    names = [name for name in WORDS if f"val_{name}" in summary and name != "loss"]
    print(f"{'on ' + str(summary['val_images']) + ' validation images':28}" + "".join(f"{WORDS[n]:>22}" for n in names))
    trained = {name: summary[f"val_{name}"] for name in names}
    for row, scores in {**summary["references"], "trained": trained}.items():
        print(f"  {row:26}" + "".join(f"{scores[name]:>22{FORMATS[name]}}" for name in names))
    print(f"\nlook at it   tensorboard --logdir {folder.parent}")
    if (folder / "validation.png").exists():
        print(f"or           {folder}/validation.png")
    print(f"results      {folder}/summary.json, history.csv, encoder.pt")


if __name__ == "__main__":
    cli.run(main)
