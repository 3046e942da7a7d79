"""Pretrain the same encoder with SimCLR or SwAV: heads and losses of the package lightly.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py simclr --epochs 100 --data FOLDER --out runs/simclr
    python benchmarks/peers.py swav --epochs 100 --data FOLDER --out runs/swav
    python benchmarks/peers.py --resume runs/swav
    python train_transfer.py runs/simclr runs/swav scratch

Everything else is as in train_pretext.py with --no-grow --lr 1e-3: data, split, views, encoder, loop, optimiser,
schedule and seeds.
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

from augment import CROP, augment
from data import get_dataloaders, open_pretext
from engine import AMP, DEVICES, Trainer, choose_amp, choose_device, device_name
from harness import checkpoint, command, folder, ranks
from harness.download import ARCHIVES
from harness.errors import UsageError
from harness.files import write_json
from models import build_encoder

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
    """The task of both methods: the outputs for two views of an image, P each, should agree. `loss(first, second)`."""

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


def parse() -> tuple[argparse.Namespace, dict | None]:
    """The command line -> settings, and the checkpoint to go on from, if any."""
    parser = command.Parser(__doc__)
    which = f"{' or '.join(METHODS)} (default: that of --resume)"
    parser.add_argument("method", nargs="?", default=[], help=which)  # [] is "not given" for the parser
    add = parser.add_argument_group("images").add_argument
    names = ", ".join(ARCHIVES)
    add("--data", type=command.place, default="photos", help=f"`photos` (bundled), a folder, or {names}: fetched")
    add("--data-dir", type=command.place, default="data", help="folder for data sets by name, and for decoded images")
    add("--size", type=command.integer(8, 1024), default=32, help="side of a view, px")
    add("--crop", type=command.crop, default=CROP, help="smallest share of an image in a view, give or take its aspect")
    add = parser.add_argument_group("network").add_argument
    add("--encoder", default="conv", help="what is kept: conv, or a classification network of torchvision by name")
    add("--width", type=command.integer(1), default=512, help="width of the head's hidden layer")
    add("--temperature", type=command.positive, help="of the loss (default: simclr 0.5, swav 0.1)")
    add("--prototypes", type=command.integer(2), default=512, help="swav: how many")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=command.integer(1), default=50, help="passes over the images")
    add("--batch-size", type=command.integer(2), default=64, help="images in a step")
    add("--lr", type=command.rate, default=1e-3, help="peak learning rate of AdamW")
    add("--seed", type=command.integer(0, 2**32 - 1), default=0, help="fixes all that is random")
    add("--device", choices=DEVICES, default="auto", help="where to compute; auto: a GPU if there is one")
    add("--amp", choices=AMP, default="auto", help="bf16; auto: on GPUs that have it, not on CPUs")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=command.place, help="the run's folder (default: runs/METHOD-DATA-ENCODER-TIME)")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", type=command.place, metavar="FOLDER", help="go on with the run in this folder (default: a new run)")
    args = parser.parse_args()
    if NTXentLoss is None:
        raise UsageError("lightly is not installed: pip install -r benchmarks/requirements.txt")
    saved = folder.resume(parser, args, {"device"})
    if args.method not in METHODS:
        raise UsageError(f"give a method: {' or '.join(METHODS)}")
    if args.method != "swav":
        parser.refuse({"prototypes"}, f"is of swav; {args.method} has no use for it")
    return args, saved


def make_model(args: argparse.Namespace) -> tuple[nn.Module, Agree]:
    """The network and its task. Raises UsageError if there is no such encoder, or if the views are too small for it."""
    encoder = build_encoder(args.encoder, size=args.size)
    if args.method == "simclr":
        return SimCLR(encoder, args.width), Agree(args.size, NTXentLoss(args.temperature or 0.5), args.crop)
    swav = SwaVLoss(args.temperature or 0.1)
    model = SwAV(encoder, args.width, args.prototypes)
    return model, Agree(args.size, lambda first, second: swav([first, second], []).squeeze(), args.crop)


def main() -> None:
    """Assemble, train, save."""
    args, saved = parse()
    ranks.refuse_several()
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    torch.manual_seed(args.seed)
    model, task = make_model(args)
    place = folder.choose(args, args.method)
    images, rows, val = open_pretext(args.data, args.size, args.data_dir, args.batch_size)
    loader, _ = get_dataloaders(images, rows, val, args.batch_size, args.seed, device)
    steps = args.epochs * len(loader)
    trainer = Trainer(model, task, lr=args.lr, steps=steps, seed=args.seed, device=device, amp=amp)
    run = {"script": "peers", "format": folder.FORMAT, "settings": vars(args), "data": images.identity()}
    speeds, means = [], {}  # images/s of every epoch, figures of the last one
    if saved:
        folder.check_same(saved["data"], run["data"], args.resume)
        checkpoint.load_weights(model, saved["model"], f"the checkpoint in {place}")
        trainer.restore(saved)
        speeds, means = saved["speeds"], saved["means"]
    folder.make(place, args, device_name(device))
    print(images.describe())
    print(f"{args.method}: training on {len(rows)} images; {device_name(device)}{', bf16' if amp else ''}")
    epoch_images = len(loader) * args.batch_size
    total, done = args.epochs * epoch_images, len(speeds) * epoch_images
    with tqdm(total=total, initial=done, unit="image", unit_scale=True, disable=None) as bar:
        for epoch in range(len(speeds), args.epochs):
            clock = time.perf_counter()
            means = trainer.train_epoch(loader, epoch, bar)
            speeds.append(epoch_images / (time.perf_counter() - clock))
            checkpoint.save_last({**trainer.state(), **run, "speeds": speeds, "means": means}, place)
            tqdm.write(f"epoch {epoch + 1}/{args.epochs}: training loss {means['loss']:.3f}; {speeds[-1]:.0f} images/s")
    checkpoint.save(model.encoder.state_dict(), place / "encoder.pt")
    summary = {name: getattr(args, name) for name in ("data", "method", "epochs", "seed")}
    summary |= {"device": device_name(device), "amp": "bf16" if amp else "off", "train_images": len(rows)}
    summary |= {"images_per_second": statistics.median(speeds), "loss": means["loss"]}
    summary["seconds"] = sum(epoch_images / speed for speed in speeds)
    write_json(summary, place / "summary.json")
    print(f"results      {place}/summary.json, encoder.pt\nnext         python train_transfer.py {place} scratch")


if __name__ == "__main__":
    command.run(main)
