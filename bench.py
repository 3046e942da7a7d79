"""How fast is it, and how fast could it be? Each figure beside the one that it has to be compared with.

    python bench.py                           everything, on the bundled photographs (about 15 minutes on two CPU cores)
    python bench.py limit ours                some of it
    python bench.py --data FOLDER             obvious, lightly and decode on real photographs

  limit     forward, backward and step of the same network on random views that are there already
  ours      training epochs of train_pretext.py with views, logging included, validation not; the share of logging
  obvious   a data set that decodes three images an example with Pillow in workers, and encodes four
  lightly   SimCLR's two views by lightly's transform and a DataLoader (benchmarks/requirements.txt)
  decode    building the cache, and a pool of as many threads that decodes and resizes the same files with Pillow
            (whole: without the reduced scale that a JPEG can be decoded at)
  growth    time an image and memory with 1,000, 10,000 and 100,000 images, streamed

Every figure is measured --repeat times, in turn with the others, each time in a process of its own.
"""

import argparse
import contextlib
import csv
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import checkpoint
import cli
import options
import photos
from augment import MEAN, STD, generator
from data import Images, get_dataloaders, open_images, workers
from engine import Trainer, choose_amp, choose_device, device_name
from errors import RunError, UsageError
from listing import Entry, Listing, list_data
from models import ENCODERS, build_encoder, build_model
from tasks import Question, build_task

KINDS = ("limit", "ours", "obvious", "lightly", "decode", "growth")
WORKERS = {"num_workers": workers(), "persistent_workers": True}  # of the DataLoaders
WARM_UP = 5  # steps before the clock starts
GROWTH = (1_000, 10_000, 100_000)  # images


def parse() -> argparse.Namespace:
    """The command line -> settings."""
    parser = options.Parser(*__doc__.split("\n\n", 1))
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--data", help="folder of photographs to decode (default: the bundled ones, as 160 px JPEGs)")
    parser.add_argument("--encoder", choices=ENCODERS, default="conv", help="of all of them")
    parser.add_argument("--size", type=options.whole(8, 1024), default=32, help="side of a view, px")
    parser.add_argument("--batch-size", type=options.whole(2), default=64, help="images in a step")
    parser.add_argument("--device", default="auto", help="where to compute")
    parser.add_argument("--amp", choices=("auto", "bf16", "off"), default="auto", help="as in train_pretext.py")
    parser.add_argument("--compile", action="store_true", help="torch.compile the encoder")
    parser.add_argument("--repeat", type=options.whole(1), default=5, help="measurements of each figure")
    parser.add_argument("--seconds", type=options.whole(1), default=10, help="of one measurement, about")
    parser.add_argument("--out", default="bench.json", help="file for the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    args = parser.parse_args()
    if args.measure:
        return args
    unknown = sorted(set(args.kinds) - set(KINDS))
    if unknown:
        raise UsageError(f"{unknown[0]} is not measured here; use {', '.join(KINDS)}")
    missing = set() if importlib.util.find_spec("lightly") else {"lightly"}
    if missing & set(args.kinds):
        raise UsageError("lightly is not installed: pip install -r benchmarks/requirements.txt")
    if missing and not args.kinds:
        print("lightly is not installed (benchmarks/requirements.txt), and left out")
    args.kinds = list(dict.fromkeys(args.kinds)) or [kind for kind in KINDS if kind not in missing]
    if not Path(args.out).parent.is_dir():
        raise UsageError(f"--out {args.out}: no such folder; make it, or give a file elsewhere")
    if "growth" in args.kinds and args.batch_size > GROWTH[0]:
        raise UsageError(f"--batch-size {args.batch_size} is more than the {GROWTH[0]} images that growth begins with")
    return args


def main() -> None:
    """Measure everything in turn, and print the table."""
    args = parse()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if args.data is None:
            args.data = write_photos(Path(scratch, "photos"))
        if {"obvious", "lightly", "decode"} & set(args.kinds):
            count = len(_files(args.data))
            if args.batch_size > count:
                raise UsageError(f"--batch-size {args.batch_size} is more than the {count} images of {args.data}")
        kinds = [k for kind in args.kinds for k in (MEASURES if kind == "growth" else [kind]) if k.startswith(kind)]
        found = {kind: [] for kind in kinds}
        for turn in range(args.repeat):
            for kind in kinds:
                print(f"{turn + 1}/{args.repeat} {kind} …", end="\r", flush=True)
                found[kind].append(measure(kind, args))
    results = {
        "device": device_name(choose_device(args.device)),
        "cores": workers(),
        "settings": vars(args),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "found": found,
    }
    print(table(results))
    checkpoint.save_json(results, args.out)
    print(f"\nresults      {args.out}")


def measure(kind: str, args: argparse.Namespace) -> dict:
    """One measurement in a process of its own."""
    words = ["--measure", kind]
    for name in ("data", "encoder", "size", "batch_size", "device", "amp", "seconds"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--compile"] if args.compile else []
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"measuring {kind} failed: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_photos(folder: Path, count: int = 1000) -> str:
    """JPEGs of 160 px cut from the bundled photographs."""
    folder.mkdir()
    listed = [path for path, _, _ in photos.list_patches()]
    for i in range(count):
        Image.fromarray(photos.load_patch(listed[i * len(listed) // count], 160)).save(folder / f"{i}.jpg", quality=90)
    return str(folder)


# ------------------------------------------------------------------------------------------- what is measured, and how


def build(args: argparse.Namespace, task) -> tuple[Trainer, torch.device]:
    """A trainer on a new network, as train_pretext.py makes it."""
    device = choose_device(args.device)
    torch.manual_seed(0)
    model = build_model(args.encoder, options.DECODER, args.size)
    trainer = Trainer(model, task, lr=1e-3, steps=10**6, device=device, amp=choose_amp(args.amp, device))
    if args.compile:
        model.encoder.compile()
    model.train()
    return trainer, device


def timed(step, batch: int, seconds: float, device: torch.device) -> float:
    """Images a second of `step(number)`, which takes `batch` of them."""
    for number in range(WARM_UP):
        step(number)
    _wait(device)
    start, number = time.perf_counter(), WARM_UP
    while time.perf_counter() - start < seconds:
        step(number)
        number += 1
        if number % 20 == 0:
            _wait(device)
    _wait(device)
    return (number - WARM_UP) * batch / (time.perf_counter() - start)


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def limit(args: argparse.Namespace) -> dict:
    """The network alone: two encodes an image, decoder and loss included."""
    task = build_task("mixup", options.CANDIDATES, size=args.size)
    trainer, device = build(args, task)
    B, S = args.batch_size, args.size
    images = torch.randint(0, 255, (B, 3, S, S), dtype=torch.uint8)
    question = task(images.to(device), generator(0))
    question = question._replace(mixtures=torch.randn_like(question.mixtures), asked=torch.randn_like(question.asked))
    return {"images_per_second": timed(lambda number: trainer.step(question, number), B, args.seconds, device)}


def ours(args: argparse.Namespace) -> dict:
    """Epochs of train_pretext.py on the bundled photographs, but the first one; and the share of logging."""
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = Path(tempfile.gettempdir(), "unmix-bench-data")
        words = ["--epochs", 2 + max(1, args.seconds // 4), "--out", Path(scratch, "run"), "--data-dir", data_dir]
        for name in ("encoder", "size", "batch_size", "device", "amp"):
            words += [f"--{name.replace('_', '-')}", getattr(args, name)]
        words += ["--compile"] if args.compile else []
        script = Path(__file__).with_name("train_pretext.py")
        done = subprocess.run([sys.executable, str(script), *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            raise RunError((done.stderr.strip().splitlines() or ["train_pretext.py was killed"])[-1])
        with open(Path(scratch, "run", "history.csv"), newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)][1:]
        images = json.loads(Path(scratch, "run", "summary.json").read_text())["train_images"]
    images = images // args.batch_size * args.batch_size
    training = [images / row["images_per_second"] for row in rows]
    every = statistics.median(row["logging_seconds"] for row in rows[:-1])
    seldom = (rows[-1]["logging_seconds"] - every) / 10  # what --inspect-every 10 does once in ten epochs
    epoch = statistics.median(training)
    return {
        "images_per_second": images / (epoch + every + seldom),
        "logging": (every + seldom) / (epoch + every + seldom),
    }


class ObviousDataset(Dataset):
    """What one writes first: every example decodes three images, and makes a mixture and three candidates of them."""

    def __init__(self, files: list[Path], size: int):
        self.files = files
        self.view = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, (0.3, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
                transforms.ToTensor(),
                transforms.Normalize(MEAN.tolist(), STD.tolist()),
            ]
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        others = torch.randint(len(self.files), (2,)).tolist()
        images = [Image.open(self.files[j]).convert("RGB") for j in (i, *others)]
        weight = torch.rand(())
        mixture = weight * self.view(images[0]) + (1 - weight) * self.view(images[1])
        return (
            mixture,
            torch.stack([self.view(image) for image in images]),
            torch.stack([weight, 1 - weight, weight * 0]),
        )


def obvious(args: argparse.Namespace) -> dict:
    """Examples a second of the obvious data set: four encodes each."""
    trainer, device = build(args, build_task("mixup", 3, size=args.size))
    files = _files(args.data)
    loader = DataLoader(ObviousDataset(files, args.size), args.batch_size, shuffle=True, drop_last=True, **WORKERS)
    candidates = torch.arange(3 * args.batch_size, device=device).view(-1, 3)

    def step(batch, number):
        mixtures, asked, weights = (t.to(device, non_blocking=True) for t in batch)
        trainer.step(Question(mixtures, asked.flatten(0, 1), candidates, weights), number)

    return {"images_per_second": _loaded(loader, step, args, device)}


def lightly(args: argparse.Namespace) -> dict:
    """Images a second of lightly's SimCLR: two encodes each."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    from benchmarks.peers import Agree, NTXentLoss, SimCLR, TwoViews

    device = choose_device(args.device)
    torch.manual_seed(0)
    model = SimCLR(build_encoder(args.encoder), 512)
    amp = choose_amp(args.amp, device)
    trainer = Trainer(model, Agree(args.size, NTXentLoss(0.5)), lr=1e-3, steps=10**6, device=device, amp=amp)
    if args.compile:
        model.encoder.compile()
    model.train()
    data = LightlyDataset(args.data, transform=SimCLRTransform(args.size))
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True, **WORKERS)

    def step(batch, number):
        trainer.step(TwoViews(torch.cat(batch[0]).to(device, non_blocking=True)), number)

    return {"images_per_second": _loaded(loader, step, args, device)}


def _loaded(loader, step, args, device):
    """Images a second of a loader's steps, its workers' start not counted."""

    def batches():
        while True:
            yield from loader

    stream = batches()
    return timed(lambda number: step(next(stream), number), args.batch_size, args.seconds, device)


def _files(folder):
    """The images of a folder that open."""
    listing = list_data(folder)
    if listing.root is None:
        raise UsageError("--data is a folder here; leave it out for the bundled photographs")
    found = []
    for entry in listing.entries:
        with contextlib.suppress(OSError), Image.open(listing.root / entry.path):
            found.append(listing.root / entry.path)
    return found


def decode(args: argparse.Namespace) -> dict:
    """Images a second of building the cache, and of Pillow alone in as many threads."""
    side = 2 * args.size
    files = _files(args.data)

    def plain(file):
        with Image.open(file) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC))

    for file in files:
        file.read_bytes()  # from memory, both
    start = time.perf_counter()
    with ThreadPoolExecutor(workers()) as pool:
        for _ in pool.map(plain, files):
            pass
    alone = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        images = open_images(list_data(args.data), args.size, scratch)
        ours = time.perf_counter() - start
    return {"images_per_second": len(images.labels) / ours, "pillow": len(files) / alone}


def growth(args: argparse.Namespace, count: int) -> dict:
    """Seconds an image, those of loading alone, and memory of its own (MB), of training that streams from `count`
    images."""
    side = 2 * args.size
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "images")
        block = np.random.default_rng(0).integers(0, 255, (1000, 3, side, side), dtype=np.uint8).tobytes()
        with open(file, "wb") as stream:
            for _ in range(count // 1000):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())  # or the system would write it out while the clock runs
        del block
        pixels = np.memmap(file, np.uint8, "r", shape=(count, 3, side, side))
        entries = [Entry(f"{i}", "unsup", -1) for i in range(count)]
        listing = Listing("growth", "growth", {}, [], entries, [], None, side, "")
        images = Images(listing, pixels, torch.full((count,), -1))
        trainer, device = build(args, build_task("mixup", options.CANDIDATES, size=args.size))
        loader, _ = get_dataloaders(images, range(count), range(3), args.batch_size, 0, device, "stream")

        def step(batch, number):
            trainer.step(trainer.ask(trainer.task, *batch, generator(0, number)), number)

        speed = _loaded(loader, step, args, device)
        alone = _loaded(loader, lambda batch, number: None, args, device)
    anonymous = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return {"seconds_per_image": 1 / speed, "loading": 1 / alone, "anonymous_mb": int(anonymous.split()[1]) / 1e3}


MEASURES = {"limit": limit, "ours": ours, "obvious": obvious, "lightly": lightly, "decode": decode}
MEASURES |= {f"growth-{count}": functools.partial(growth, count=count) for count in GROWTH}


# ----------------------------------------------------------------------------------------------------------- the table


def table(results: dict) -> str:
    """Medians, their spread (half of the range between the quartiles), and the ratios that count."""
    found = results["found"]
    speeds = {
        kind: [run["images_per_second"] for run in runs]
        for kind, runs in found.items()
        if _has(runs, "images_per_second")
    }
    if "decode" in speeds:
        speeds["pillow"] = [run["pillow"] for run in found["decode"]]
    if _has(found.get("ours"), "logging"):
        speeds["logging, % of an epoch"] = [100 * run["logging"] for run in found["ours"]]
    for count in GROWTH:
        if runs := found.get(f"growth-{count}"):
            speeds[f"{count} images, us an image"] = [1e6 * run["seconds_per_image"] for run in runs]
            speeds[f"{count} images, us to load one"] = [1e6 * run["loading"] for run in runs]
            speeds[f"{count} images, MB of its own"] = [run["anonymous_mb"] for run in runs]
    lines = [
        f"{results['device']}, {results['cores']} cores",
        f"{'images a second':34}{'median':>10}{'spread':>10}{'runs':>6}",
    ]
    lines += [
        f"{name:34}{statistics.median(values):>10.1f}{_spread(values):>10.1f}{len(values):>6}"
        for name, values in speeds.items()
    ]
    lines += ["", f"{'ratio, or difference':34}{'median':>10}{'spread':>10}"]
    pairs = [("ours", "limit"), ("ours", "obvious"), ("ours", "lightly"), ("decode", "pillow")]
    pairs += [(f"{GROWTH[-1]} images, us an image", f"{GROWTH[0]} images, us an image")]
    for ours, theirs in pairs:
        if ours in speeds and theirs in speeds:
            ratios = [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]  # of the same turn
            lines.append(f"{ours + ' / ' + theirs:34}{statistics.median(ratios):>10.2f}{_spread(ratios):>10.2f}")
    few, many = (f"{count} images, MB of its own" for count in (GROWTH[0], GROWTH[-1]))
    if few in speeds and many in speeds:
        more = [a - b for a, b in zip(speeds[many], speeds[few], strict=True)]
        lines.append(f"{f'MB more with {GROWTH[-1]} images':34}{statistics.median(more):>10.1f}{_spread(more):>10.1f}")
    return "\n".join(lines)


def _has(runs, name):
    return bool(runs) and all(name in run for run in runs)


def _spread(values):
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


if __name__ == "__main__":
    cli.run(main)
