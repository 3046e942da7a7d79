"""Pretrain the same encoder with the methods that people use instead: heads and losses of the package lightly.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py simclr --epochs 100 --data FOLDER --out runs/simclr
    python benchmarks/peers.py swav --epochs 100 --data FOLDER --out runs/swav
    python benchmarks/peers.py --resume runs/swav
    python train_transfer.py runs/simclr runs/swav scratch

Everything else is this project's own: data, split, views, encoder, loop, optimiser, schedule and seeds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import cli
import distributed
import options
from augment import CROP, augment
from data import check_same, get_dataloaders, open_pretext
from engine import Trainer, choose_amp, choose_device, device_name
from errors import UsageError
from models import ENCODERS, build_encoder

try:
    from lightly.loss import NTXentLoss, SwaVLoss
    from lightly.models.modules.heads import SimCLRProjectionHead, SwaVProjectionHead, SwaVPrototypes
except ImportError:
    NTXentLoss = None

METHODS = ("simclr", "swav")
PROJECTION = 128


class TwoViews(NamedTuple):
    """Two views of every image of a batch."""

    views: torch.Tensor  # 2B 3 S S  first views, then second ones

    @property
    def inputs(self) -> tuple[torch.Tensor]:
        """What the network is shown."""
        return (self.views,)


class Agree:
    """The peers' task: what the network says of two views of an image should agree."""

    takes_labels = False

    def __init__(self, size: int, loss, crop: float = CROP):
        self.size, self.loss, self.crop = size, loss, crop

    def __call__(self, images: torch.Tensor, rng: torch.Generator) -> TwoViews:
        """images B 3 H W uint8 -> TwoViews."""
        return TwoViews(torch.cat([augment(images, self.size, rng, self.crop) for _ in range(2)]))

    def score(self, outputs: torch.Tensor, question: TwoViews) -> dict[str, torch.Tensor]:
        """Outputs 2B P -> the loss."""
        return {"loss": self.loss(*outputs.chunk(2))}


class SimCLR(nn.Module):
    """Encoder and projection head (Chen et al. 2020): 2B 3 S S -> 2B P."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder, self.head = encoder, SimCLRProjectionHead(encoder.out_features, width, PROJECTION)

    def forward(self, views):
        features = self.encoder(views)
        with torch.autocast(views.device.type, enabled=False):
            return self.head(features.float())


class SwAV(nn.Module):
    """Encoder, projection head and prototypes (Caron et al. 2020): 2B 3 S S -> similarities 2B prototypes."""

    def __init__(self, encoder: nn.Module, width: int, prototypes: int):
        super().__init__()
        self.encoder, self.head = encoder, SwaVProjectionHead(encoder.out_features, width, PROJECTION)
        self.prototypes = SwaVPrototypes(PROJECTION, prototypes)

    def forward(self, views):
        self.prototypes.normalize()
        features = self.encoder(views)
        with torch.autocast(views.device.type, enabled=False):
            return self.prototypes(nn.functional.normalize(self.head(features.float()), dim=1))


def main() -> None:
    """Assemble, train, save."""
    parser = options.Parser(*__doc__.split("\n\n", 1))
    parser.add_argument("method", nargs="?", help=" or ".join(METHODS))
    options.add_data_options(parser)
    group = parser.add_argument_group("network")
    group.add_argument("--encoder", choices=ENCODERS, default="conv", help="what is kept")
    group.add_argument("--width", type=options.whole(1), default=512, help="hidden width of the head")
    group.add_argument("--temperature", type=options.positive, help="of the loss (default: simclr 0.5, swav 0.1)")
    group.add_argument("--prototypes", type=options.whole(2), default=512, help="swav: how many")
    group = options.add_loop_options(parser)
    group.add_argument("--epochs", type=options.whole(1), default=50, help="passes over the images")
    group.add_argument("--batch-size", type=options.whole(2), default=64, help="images in a step")
    options.add_crop(group)
    options.add_resume_options(options.add_run_options(parser))
    args = parser.parse_args()
    if NTXentLoss is None:
        raise UsageError("the package lightly is missing: pip install -r benchmarks/requirements.txt")
    saved = cli.resume(parser, args, {"device"})
    if args.method not in METHODS:
        raise UsageError(f"give a method: {' or '.join(METHODS)}")
    if args.method != "swav":
        options.refuse(parser, {"prototypes"}, f"is of swav; {args.method} has no use for it")
    distributed.alone()
    train(args, saved)


def train(args: argparse.Namespace, saved: dict | None) -> None:
    """One run, or the rest of it."""
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    folder = Path(args.resume) if args.resume else cli.choose_folder(args, args.method)
    images, rows, val = open_pretext(args.data, args.size, args.data_dir, args.batch_size)
    torch.manual_seed(args.seed)
    encoder = build_encoder(args.encoder, size=args.size)
    if args.method == "simclr":
        model, loss = SimCLR(encoder, args.width), NTXentLoss(args.temperature or 0.5)
    else:
        swav = SwaVLoss(args.temperature or 0.1)
        model, loss = SwAV(encoder, args.width, args.prototypes), lambda a, b: swav([a, b], []).squeeze()
    loader, _ = get_dataloaders(images, rows, val, args.batch_size, args.seed, device)
    steps = args.epochs * len(loader)
    task = Agree(args.size, loss, args.crop)
    trainer = Trainer(model, task, lr=args.lr, steps=steps, seed=args.seed, device=device, amp=amp)
    identity, speeds, means = images.identity(), [], {}  # images/s of every epoch, figures of the last one
    if saved:
        check_same(saved["data"], identity, args.resume)
        checkpoint.fit(model, saved["model"], f"the checkpoint in {folder}")
        trainer.restore(saved)
        speeds, means = saved["speeds"], saved["means"]
    cli.make_folder(folder, args, device_name(device))
    print(images.describe())
    print(f"{args.method}: training on {len(rows)} images; {device_name(device)}{', bf16' if amp else ''}")
    seen = len(loader) * args.batch_size  # images an epoch
    bar = tqdm(total=args.epochs * seen, initial=len(speeds) * seen, unit="image", unit_scale=True, disable=None)
    with bar:
        for epoch in range(len(speeds), args.epochs):
            clock = time.perf_counter()
            means = trainer.train_epoch(loader, epoch, bar)
            speeds.append(seen / (time.perf_counter() - clock))
            kept = {"data": identity, "speeds": speeds, "means": means}
            checkpoint.save_last({**trainer.state(), **kept, "script": "peers", "settings": vars(args)}, folder)
            tqdm.write(f"epoch {epoch + 1}/{args.epochs}: training loss {means['loss']:.3f}; {speeds[-1]:.0f} images/s")
    checkpoint.save(encoder.state_dict(), folder / "encoder.pt")
    summary = {
        "data": args.data,
        "method": args.method,
        "epochs": args.epochs,
        "train_images": len(rows),
        "loss": means["loss"],
        "images_per_second": statistics.median(speeds),
        "seconds": sum(seen / speed for speed in speeds),
        "device": device_name(device),
        "amp": "bf16" if amp else "off",
        "seed": args.seed,
    }
    checkpoint.save_json(summary, folder / "summary.json")
    print(f"results      {folder}/summary.json, encoder.pt\nnext         python train_transfer.py {folder} scratch")


if __name__ == "__main__":
    cli.run(main)
