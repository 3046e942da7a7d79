"""Pretrain an encoder by unmixing: show it mixtures of photographs and ask how much of each candidate is in them.

    python train_pretext.py --epochs 50                         the bundled photographs
    python train_pretext.py --epochs 50 --data FOLDER           any folder of images
    python train_pretext.py --epochs 50 --no-views              candidates show the very pixels that were mixed
    tensorboard --logdir runs                                   watch it

The run's folder gets settings.json, history.csv, summary.json, checkpoint.pt, encoder.pt and TensorBoard's curves.
"""

import argparse
import time

import torch
from tqdm import tqdm

import checkpoint
import cli
from data import get_dataloaders, open_pretext
from engine import Trainer, choose_amp, choose_device, device_name
from errors import UsageError
from models import build_unmixer
from report import Log, draw_mixtures
from tasks import MixupTransform, compare, guess, least_squares, predict, validation_task


def parse() -> argparse.Namespace:
    """The command line -> settings. Raises UsageError where they do not go together."""
    parser = cli.Parser(*__doc__.split("\n\n", 1))
    cli.add_data_options(parser)
    cli.add_task_options(parser, candidates=8)
    cli.add_model_options(parser)
    group = cli.add_loop_options(parser, lr=1e-3)
    group.add_argument("--epochs", type=cli.whole(1), default=50, help="passes over the images")
    group.add_argument("--batch-size", type=cli.whole(2), default=64, help="images in a step")
    group.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    cli.add_run_options(parser)
    args = parser.parse_args()
    name, needed = ("sources", args.sources) if args.candidates == "batch" else ("candidates", args.candidates)
    if needed > args.batch_size:
        raise UsageError(f"--{name} {needed} is more than --batch-size {args.batch_size} has; change one of them")
    return args


def main() -> None:
    """Assemble, train, report."""
    args = parse()
    started = time.perf_counter()
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    task = MixupTransform(args.candidates, args.sources, None, args.views, args.size, args.activation)
    exam = validation_task(args.views, args.size, args.activation)
    torch.manual_seed(args.seed)
    model = build_unmixer(args.encoder, args.decoder, args.size)
    folder = cli.choose_folder(args, "pretext")

    images, train, val = open_pretext(args.data, args.size, args.data_dir, args.batch_size)
    train_loader, val_loader = get_dataloaders(images, train, val, args.batch_size, args.seed, device.type == "cuda")
    cli.make_folder(folder, args, device_name(device))
    log = Log(folder)
    log.text("settings", (folder / "settings.json").read_text())
    print(images.describe())
    print(f"training on {len(train)} images, validating on {len(val)}; {device_name(device)}{', bf16' if amp else ''}")

    steps = args.epochs * len(train_loader)
    trainer = Trainer(model, task, lr=args.lr, steps=steps, seed=args.seed, device=device, amp=amp)
    if args.compile:
        model.encoder.compile()
    trainer.settle(train_loader)
    references = {
        "chance": trainer.evaluate(val_loader, exam, lambda q: compare(guess(q), q.weights))
        | {"source_accuracy": 1 / 3},
        "least squares on pixels": trainer.evaluate(val_loader, exam, lambda q: compare(least_squares(q), q.weights)),
        "untrained": trainer.evaluate(val_loader, exam),
    }
    log.scalars(0, {f"val_{name}": value for name, value in references["untrained"].items()})
    own = (args.candidates, args.sources) != (exam.candidates, exam.sources)  # figures of the run's own question too
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
            figures = {f"train_{name}": means.pop(name) for name in ("loss", "source_accuracy", "weight_mae")}
            figures |= {**means, "images_per_second": seen / seconds}
            figures |= {f"val_{name}": value for name, value in trainer.evaluate(val_loader, exam).items()}
            if own:
                figures |= {f"val_own_{name}": value for name, value in trainer.evaluate(val_loader, task).items()}
            log.epoch(epoch, figures)
            predicted = predict(trainer.answer(shown), args.activation)
            log.picture("validation", draw_mixtures(shown, predicted), epoch)
            state = {**trainer.state(), "epoch": epoch, "settings": vars(args)}
            checkpoint.save(state, folder / "checkpoint.pt")
            tqdm.write(
                f"epoch {epoch:{len(str(args.epochs))}}/{args.epochs}: train loss {figures['train_loss']:.3f}; "
                f"validation loss {figures['val_loss']:.3f}, sources named right {figures['val_source_accuracy']:.1%}, "
                f"weight error {figures['val_weight_mae']:.3f}; {figures['images_per_second']:.0f} images/s"
            )
    log.close()
    checkpoint.save(model.encoder.state_dict(), folder / "encoder.pt")
    summary = {
        "data": args.data,
        "task": "mixup",
        "epochs": args.epochs,
        "train_images": len(train),
        "val_images": len(val),
        **{name: value for name, value in figures.items() if name.startswith("val_")},
        "references": references,
        "images_per_second": args.epochs * seen / training,
        "seconds": time.perf_counter() - started,
        "device": device_name(device),
        "amp": "bf16" if amp else "off",
        "seed": args.seed,
    }
    checkpoint.save_json(summary, folder / "summary.json")
    print_summary(summary, folder)


def print_summary(summary: dict, folder) -> None:
    """The result beside what it has to be compared with, and what to do next."""
    speed = f"{summary['images_per_second']:.0f} images/s"
    print(f"\n{summary['epochs']} epochs in {cli.duration(summary['seconds'])}, {speed} on {summary['device']}")
    print(f"{'on ' + str(summary['val_images']) + ' validation mixtures':28} sources named right   weight error")
    rows = {**summary["references"], "trained": {n[4:]: v for n, v in summary.items() if n.startswith("val_")}}
    for name, row in rows.items():
        print(f"  {name:26} {row['source_accuracy']:>19.1%} {row['weight_mae']:>14.3f}")
    print(f"\nlook at it   tensorboard --logdir {folder.parent}")
    print(f"results      {folder}/summary.json, history.csv, encoder.pt")


if __name__ == "__main__":
    cli.run(main)
