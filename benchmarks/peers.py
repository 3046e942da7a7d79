"""Pretrain the same encoder with SimCLR, SwAV, BYOL or VICReg: heads and losses of the package lightly.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py simclr --epochs 100 --data FOLDER --out runs/simclr
    python benchmarks/peers.py --resume runs/simclr
    python train_transfer.py runs/simclr scratch

Everything else is as in train_pretext.py: data, split, views and how they grow, encoder, loop, optimiser, schedule and
seeds.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from augment import draw_views, make_views
from data import get_dataloaders, open_pretext
from engine import AMP, DEVICES, Trainer, choose_amp, choose_device, device_name
from harness import checkpoint, command, folder
from harness.download import ARCHIVES
from harness.errors import UsageError
from harness.files import write_json
from models import build_encoder, check_size
from tasks import Task
from train_pretext import HOLD, view_size

try:
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
    from lightly.models.modules import heads
except ImportError:
    NTXentLoss = None

METHODS = ("simclr", "swav", "byol", "vicreg")
PROJECTION = 128


class TwoViews(NamedTuple):
    """Two views of every image of a batch."""

    views: torch.Tensor  # 2B 3 S S  first views, then second ones

    @property
    def inputs(self) -> tuple[torch.Tensor]:
        """What the network is shown."""
        return (self.views,)


class Agree(Task):
    """The task of all methods: the outputs for two views of an image, P each, should agree. `loss(first, second)`."""

    def __init__(self, size: int, loss):
        self.size, self.loss = size, loss

    def draw(self, images: torch.Tensor, rng: torch.Generator) -> list[torch.Tensor]:
        """The views."""
        return [draw_views(2 * len(images), rng)]

    def ask(self, images: torch.Tensor, drawn: list[torch.Tensor], labels: torch.Tensor | None = None) -> TwoViews:
        """images B 3 H H uint8 and what `draw` returned -> TwoViews."""
        return TwoViews(make_views(images, self.size, *drawn).flatten(0, 1))

    def score(self, outputs: torch.Tensor, question: TwoViews) -> dict[str, torch.Tensor]:
        """Outputs 2B P -> the loss."""
        return {"loss": self.loss(*outputs.float().chunk(2))}


class Headed(nn.Module):
    """Encoder and projection head, as of SimCLR (Chen et al. 2020) and VICReg (Bardes et al. 2022):
    2B 3 S S -> 2B P."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, views):
        features = self.encoder(views)
        with torch.autocast(views.device.type, enabled=False):
            return self.head(features.float())


class BYOL(nn.Module):
    """Encoder, projection, prediction, and a slow copy of the first two (Grill et al. 2020): 2B 3 S S -> 2B 2P, the
    predictions and the copy's projections of the other views."""

    def __init__(self, encoder: nn.Module, width: int, momentum: float):
        super().__init__()
        self.momentum, self.encoder = momentum, encoder
        self.head = heads.BYOLProjectionHead(encoder.out_features, width, PROJECTION)
        self.predict = heads.BYOLPredictionHead(PROJECTION, width, PROJECTION)
        self.slow = nn.ModuleList(copy.deepcopy(part).requires_grad_(False) for part in (self.encoder, self.head))

    def forward(self, views):
        online = [*self.encoder.parameters(), *self.head.parameters()]
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), online, strict=True):
                slow.lerp_(fast, 1 - self.momentum)
            slow = self.slow[0](views)
        features = self.encoder(views)
        with torch.autocast(views.device.type, enabled=False):
            with torch.no_grad():
                first, second = self.slow[1](slow.float()).chunk(2)
            return torch.cat([self.predict(self.head(features.float())), torch.cat([second, first])], dim=1)


class SwAV(nn.Module):
    """Encoder, projection head and prototypes (Caron et al. 2020): 2B 3 S S -> similarities 2B prototypes."""

    def __init__(self, encoder: nn.Module, width: int, prototypes: int):
        super().__init__()
        self.encoder, self.head = encoder, heads.SwaVProjectionHead(encoder.out_features, width, PROJECTION)
        self.prototypes = heads.SwaVPrototypes(PROJECTION, prototypes)

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
    grow = "views of half of --size at first, see docs/speed.md (default: with conv)"
    add("--grow", action=argparse.BooleanOptionalAction, help=grow)
    add = parser.add_argument_group("network").add_argument
    add("--encoder", default="conv", help="what is kept: conv, or a classification network of torchvision by name")
    add("--widths", type=command.integer(1), nargs="+", help="channels of conv's convolutions (default: 16 64 128 256)")
    add("--width", type=command.integer(1), default=512, help="width of the head's hidden layer")
    add("--temperature", type=command.positive, help="of the loss (default: simclr 0.2, swav 0.1)")
    add("--momentum", type=command.share, default=0.99, help="byol: of the slow copy")
    add("--prototypes", type=command.integer(2), default=512, help="swav: how many")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=command.integer(1), default=50, help="passes over the images")
    add("--batch-size", type=command.integer(2), default=64, help="images in a step")
    add("--lr", type=command.rate, default=3e-3, help="peak learning rate of AdamW")
    add("--seed", type=command.integer(0, 2**32 - 1), default=0, help="fixes all that is random")
    add("--device", choices=DEVICES, default="auto", help="where to compute; auto: a CUDA GPU if there is one")
    add("--amp", choices=AMP, default="auto", help="bf16; auto: on GPUs that have it, not on CPUs")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=command.place, help="the run's folder (default: runs/METHOD-DATA-ENCODER-TIME)")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    add("--resume", type=command.place, metavar="FOLDER", help="go on with the run in this folder (default: a new run)")
    parser.set_defaults(ranges={})
    args = parser.parse_args()
    if NTXentLoss is None:
        raise UsageError("lightly is not installed: pip install -r benchmarks/requirements.txt")
    saved = folder.resume(parser, args, {"device", "data", "data_dir"})
    args.grow = args.encoder == "conv" if args.grow is None else args.grow
    if args.method not in METHODS:
        raise UsageError(f"give a method: {' or '.join(METHODS)}")
    of = {"prototypes": {"swav"}, "momentum": {"byol"}, "temperature": {"simclr", "swav"}}
    for name, methods in of.items():
        if args.method not in methods:
            parser.refuse({name}, f"is of {' and '.join(sorted(methods))}; {args.method} has no use for it")
    return args, saved


def make_model(args: argparse.Namespace) -> tuple[nn.Module, Agree]:
    """The network and its task. Raises UsageError if there is no such encoder, or if the views are too small for it."""
    encoder = build_encoder(args.encoder, args.size, args.widths or ())
    if args.grow:
        check_size(encoder, args.encoder, view_size(1, args.epochs, args.size), growing=True)
    D, width = encoder.out_features, args.width
    if args.method == "simclr":
        model = Headed(encoder, heads.SimCLRProjectionHead(D, width, PROJECTION))
        loss = NTXentLoss(args.temperature or 0.2)
    elif args.method == "swav":
        model, swav = SwAV(encoder, width, args.prototypes), SwaVLoss(args.temperature or 0.1)
        loss = lambda first, second: swav([first, second], []).squeeze()  # noqa: E731
    elif args.method == "byol":
        model, distance = BYOL(encoder, width, args.momentum), NegativeCosineSimilarity()
        loss = lambda *both: sum(distance(*part.chunk(2, dim=1)) for part in both) / 2  # noqa: E731
    else:
        model, loss = Headed(encoder, heads.VICRegProjectionHead(D, width, width, num_layers=2)), VICRegLoss()
    return model, Agree(args.size, loss)


def main() -> None:
    """Assemble, train, save."""
    args, saved = parse()
    device = choose_device(args.device)
    amp = choose_amp(args.amp, device)
    torch.manual_seed(args.seed)
    model, task = make_model(args)
    place = folder.choose(args, args.method)
    images, rows, val = open_pretext(args.data, args.size, args.data_dir, args.batch_size, args.ranges)
    args.ranges = dict(images.listing.ranges)
    loader, _ = get_dataloaders(images, rows, val, args.batch_size, args.seed, device)
    steps, hold = args.epochs * len(loader), HOLD if args.grow else None
    trainer = Trainer(model, task, lr=args.lr, steps=steps, hold=hold, seed=args.seed, device=device, amp=amp)
    run = {"script": "peers", "format": folder.FORMAT, "settings": vars(args), "data": images.identity()}
    speeds, means = [], {}  # images/s of every epoch, figures of the last one
    if saved:
        folder.check_same(saved["data"], run["data"], args.resume)
        checkpoint.load_weights(model, saved["model"], f"the checkpoint in {place}")
        trainer.restore(saved)
        speeds, means = saved["speeds"], saved["means"]
    place = folder.make(place, args, device_name(device))
    print(images.describe())
    print(f"{args.method}: training on {len(rows)} images; {device_name(device)}{', bf16' if amp else ''}")
    epoch_images = len(loader) * args.batch_size
    total, done = args.epochs * epoch_images, len(speeds) * epoch_images
    with tqdm(total=total, initial=done, unit="image", unit_scale=True, disable=None) as bar:
        for epoch in range(len(speeds), args.epochs):
            clock = time.perf_counter()
            task.size = view_size(epoch + 1, args.epochs, args.size) if args.grow else args.size
            means = trainer.train_epoch(loader, epoch, bar)
            speeds.append(epoch_images / (time.perf_counter() - clock))
            checkpoint.save_last({**trainer.state(), **run, "speeds": speeds, "means": means}, place)
            tqdm.write(f"epoch {epoch + 1}/{args.epochs}: training loss {means['loss']:.3f}; {speeds[-1]:.0f} images/s")
    checkpoint.save(model.encoder.cpu().state_dict(), place / "encoder.pt")
    summary = {name: getattr(args, name) for name in ("data", "method", "epochs", "seed")}
    summary |= {"device": device_name(device), "amp": "bf16" if amp else "off", "train_images": len(rows)}
    summary |= {"images_per_second": statistics.median(speeds), "loss": means["loss"]}
    summary["seconds"] = sum(epoch_images / speed for speed in speeds)
    write_json(summary, place / "summary.json")
    print(f"results      {place}/summary.json, encoder.pt\nnext         python train_transfer.py {place} scratch")


if __name__ == "__main__":
    command.run(main)
