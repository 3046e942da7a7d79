"""How fast is it, and how fast could it be? Every figure beside the one to compare it with.

    python benchmarks/speed.py                         everything, on the bundled photographs (15 minutes on 2 cores)
    python benchmarks/speed.py limit ours              some of it
    python benchmarks/speed.py --data FOLDER           ours, obvious, lightly and decode on your own photographs

  limit     forward, backward and step of the same network on random views that are already there
  ours      training epochs of train_pretext.py: views and logging are counted, evaluation and decoding are not
  obvious   a data set that decodes three images an example with Pillow in workers, and encodes four
  lightly   SimCLR's two views by lightly's transform and a DataLoader (benchmarks/requirements.txt)
  decode    building the cache of decoded images; `pillow` decodes and resizes the same files with as many threads, at
            full scale (the cache decodes large JPEGs at a reduced scale)
  growth    time an image and memory with 1,000, 10,000 and 100,000 images that are streamed (needs Linux)

Every figure is measured --repeat times, in turn with the others, each time in a process of its own. The table has
medians; the spread is half of the interquartile range. MB are 10^6 bytes.
"""

import argparse
import contextlib
import csv
import functools
import importlib.util
import itertools
import json
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from augment import MEAN, STD, generator
from data import Entry, Images, Listing, get_dataloaders, list_data, open_images, workers
from engine import AMP, DEVICES, Trainer, choose_amp, choose_device, device_name
from harness import bundled, command
from harness.download import ARCHIVES
from harness.errors import RunError, UsageError
from harness.files import write_json
from models import build_encoder, build_model
from tasks import MixupTransform, Question

KINDS = ("limit", "ours", "obvious", "lightly", "decode", "growth")
READ_FILES = {"obvious", "lightly", "decode"}  # kinds
WORKERS = {"num_workers": workers(), "persistent_workers": True}  # of the DataLoaders
WARM_UP = 5  # steps before the clock starts
OURS = "ours (decoding not counted)"  # in the table
GROWTH = (1_000, 10_000, 100_000)  # images


def parse() -> argparse.Namespace:
    """The command line -> settings. Raises UsageError if they make no sense."""
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    add("--data", type=command.place, help="folder of photographs (default: bundled ones; as files, JPEGs of 160 px)")
    add("--encoder", default="conv", help="conv, or a classification network of torchvision by name")
    add("--size", type=command.integer(8, 1024), default=32, help="side of a view, px")
    add("--batch-size", type=command.integer(2), default=64, help="images in a step")
    add("--device", choices=DEVICES, default="auto", help="where to compute; auto: a CUDA GPU if there is one")
    add("--amp", choices=AMP, default="auto", help="bf16; auto: on GPUs that have it, not on CPUs")
    add("--compile", action="store_true", help="torch.compile the encoder")
    add("--repeat", type=command.integer(1), default=5, help="measurements of each figure")
    add("--seconds", type=command.integer(1), default=10, help="length of a measurement, about, s")
    add("--out", type=command.place, default="speed.json", help="file for the figures")
    add("--measure", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    add("--scratch", help=argparse.SUPPRESS)  # a folder for it, which is removed at the end
    args = parser.parse_args()
    if args.measure:
        return args
    unknown = sorted(set(args.kinds) - set(KINDS))
    if unknown:
        raise UsageError(f"{unknown[0]} is not measured here; use {', '.join(KINDS)}")
    found = [kind for kind in KINDS if kind != "lightly" or importlib.util.find_spec("lightly")]
    if "lightly" in set(args.kinds) - set(found):
        raise UsageError("lightly is not installed: pip install -r benchmarks/requirements.txt")
    if not args.kinds and "lightly" not in found:
        print("lightly is not installed (benchmarks/requirements.txt), and is left out")
    args.kinds = list(dict.fromkeys(args.kinds)) or found
    if args.data == "photos" or args.data in ARCHIVES:
        raise UsageError("--data is a folder here; leave it out for the bundled photographs")
    if not Path(args.out).parent.is_dir():
        raise UsageError(f"--out {args.out}: no such folder; make it, or give a file elsewhere")
    if "growth" in args.kinds and args.batch_size > GROWTH[0]:
        raise UsageError(f"--batch-size {args.batch_size} is more than the {GROWTH[0]} images that growth begins with")
    build_encoder(args.encoder, size=args.size)  # a wrong name or size is refused before anything is measured
    return args


def main() -> None:
    """Measure everything in turn, and print the table."""
    args = parse()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args)))
        return
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        reads_files = READ_FILES & set(args.kinds)
        folder = args.data or (write_photos(Path(scratch, "photos")) if reads_files else None)
        count = len(list_files(folder, scratch)) if folder else 0
        if reads_files and args.batch_size > count:
            raise UsageError(f"--batch-size {args.batch_size} is more than the {count} images of {folder}")
        kinds = [k for kind in args.kinds for k in (MEASURES if kind == "growth" else [kind]) if k.startswith(kind)]
        found = {kind: [] for kind in kinds}
        for turn in range(args.repeat):
            for kind in kinds:
                print(f"{turn + 1}/{args.repeat} {kind} …", end="\r", flush=True)
                data = args.data if kind == "ours" else folder
                found[kind].append(measure(kind, args, data or "photos", scratch))
    machine = {"device": device_name(device), "cores": workers(), "torch": torch.__version__}
    results = {**machine, "python": sys.version.split()[0], "settings": vars(args), "found": found}
    print(table(results))
    write_json(results, args.out)
    print(f"\nresults      {args.out}")


def measure(kind: str, args: argparse.Namespace, data: str, scratch: str) -> dict:
    """One measurement, in a process of its own. `scratch` is a folder that the measurements share."""
    words = ["--measure", kind, "--scratch", scratch, *common_options(args, data), "--seconds", args.seconds]
    return json.loads(call(f"measuring {kind}", __file__, *words).splitlines()[-1])


def call(what: str, *words: object) -> str:
    """Run a Python script in a new process. Returns its output; raises RunError with the last line of its error."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{what} failed: {(done.stderr.strip().splitlines() or ['it was killed'])[-1]}")
    return done.stdout


def common_options(args: argparse.Namespace, data: str) -> list[str]:
    """The options that this command shares with train_pretext.py, as words of a command line."""
    words = ["--data", data, *["--compile"] * args.compile]
    for name in ("encoder", "size", "batch_size", "device", "amp"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return words


def write_photos(folder: Path, count: int = 1000) -> str:
    """Write JPEGs of 160 px, cut from the bundled photographs, to a new folder. Returns its path."""
    folder.mkdir()
    listed = [path for path, _, _ in bundled.list_patches()]
    for i in range(count):
        patch = bundled.load_patch(listed[i * len(listed) // count], 160)
        Image.fromarray(patch).save(folder / f"{i}.jpg", quality=90)
    return str(folder)


def list_files(folder: str, scratch: str) -> list[Path]:
    """The image files below a folder that Pillow opens. Raises UsageError if there is no such folder."""
    listing = list_data(folder, scratch)
    found = []
    for entry in listing.entries:
        with contextlib.suppress(OSError), Image.open(listing.root / entry.path):
            found.append(listing.root / entry.path)
    return found


# ------------------------------------------------------------------------------------------- what is measured, and how


def build(args: argparse.Namespace, task, make_model: Callable | None = None) -> tuple[Trainer, torch.device]:
    """A trainer on a new network, made by `make_model()`, or as train_pretext.py does by default."""
    device = choose_device(args.device)
    torch.manual_seed(0)
    model = make_model() if make_model else build_model(args.encoder, "ridge", args.size)
    trainer = Trainer(model, task, lr=1e-3, steps=10**6, device=device, amp=choose_amp(args.amp, device))
    if args.compile:
        model.encoder.compile()
    model.train()
    return trainer, device


def timed(step: Callable[[int], object], batch: int, seconds: float, device: torch.device) -> float:
    """Images a second of `step(number)`, which takes `batch` images."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for number in range(WARM_UP):
        step(number)
    wait()
    start, number = time.perf_counter(), WARM_UP
    while time.perf_counter() - start < seconds:
        step(number)
        number += 1
        if number % 20 == 0:
            wait()
    wait()
    return (number - WARM_UP) * batch / (time.perf_counter() - start)


def timed_loading(loader: Iterable, step: Callable, args: argparse.Namespace, device: torch.device) -> float:
    """Images a second of a loader and `step(batch, number)`. The start of the loader's workers is not counted."""
    stream = itertools.chain.from_iterable(itertools.repeat(loader))
    return timed(lambda number: step(next(stream), number), args.batch_size, args.seconds, device)


def limit(args: argparse.Namespace) -> dict:
    """The network alone: two encodes an image, decoder and loss included."""
    task = MixupTransform(size=args.size)
    trainer, device = build(args, task)
    B, S = args.batch_size, args.size
    images = torch.randint(0, 255, (B, 3, S, S), dtype=torch.uint8)
    question = task(images.to(device), generator(0))
    question = question._replace(mixtures=torch.randn_like(question.mixtures), asked=torch.randn_like(question.asked))
    return {"images_per_second": timed(lambda number: trainer.step(question, number), B, args.seconds, device)}


def ours(args: argparse.Namespace) -> dict:
    """Epochs of train_pretext.py on `args.data`, without the first one, and the share of logging in them."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        words = [*common_options(args, args.data), "--data-dir", Path(args.scratch, "data"), "--out", folder]
        words += ["--no-grow", "--epochs", 2 + max(1, args.seconds // 4)]
        call("training", Path(__file__).resolve().parents[1] / "train_pretext.py", *words)
        with open(Path(folder, "history.csv"), newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)][1:]
        train_images = json.loads(Path(folder, "summary.json").read_text())["train_images"]
    images = train_images // args.batch_size * args.batch_size  # an epoch has full batches only
    epoch = statistics.median(images / row["training_images_per_second"] for row in rows)  # s
    every = statistics.median(row["logging_seconds"] for row in rows[:-1])
    tenth = (rows[-1]["logging_seconds"] - every) / 10  # what --inspect-every 10 adds once in ten epochs
    whole = epoch + every + tenth
    return {"images_per_second": images / whole, "logging": (every + tenth) / whole, "train_images": train_images}


class ObviousDataset(Dataset):
    """What one writes first: every example decodes three images, and makes a mixture and three candidates of them."""

    def __init__(self, files: list[Path], size: int):
        self.files = files
        steps = [transforms.RandomResizedCrop(size, (0.3, 1.0)), transforms.RandomHorizontalFlip()]
        steps += [transforms.ColorJitter(0.4, 0.4, 0.4, 0.1), transforms.ToTensor()]
        self.view = transforms.Compose([*steps, transforms.Normalize(MEAN.tolist(), STD.tolist())])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        others = torch.randint(len(self.files), (2,)).tolist()
        images = [Image.open(self.files[j]).convert("RGB") for j in (i, *others)]
        weight = torch.rand(())
        mixture = weight * self.view(images[0]) + (1 - weight) * self.view(images[1])  # 3 S S
        candidates = torch.stack([self.view(image) for image in images])  # 3 3 S S
        return mixture, candidates, torch.stack([weight, 1 - weight, weight * 0])


def obvious(args: argparse.Namespace) -> dict:
    """Examples a second of the obvious data set: four encodes each."""
    trainer, device = build(args, MixupTransform(3, size=args.size))
    files = list_files(args.data, args.scratch)
    loader = DataLoader(ObviousDataset(files, args.size), args.batch_size, shuffle=True, drop_last=True, **WORKERS)
    candidates = torch.arange(3 * args.batch_size, device=device).view(-1, 3)  # B 3

    def step(batch, number):
        mixtures, asked, weights = (t.to(device, non_blocking=True) for t in batch)
        trainer.step(Question(mixtures, asked.flatten(0, 1), candidates, weights), number)

    return {"images_per_second": timed_loading(loader, step, args, device)}


def lightly(args: argparse.Namespace) -> dict:
    """Images a second of lightly's SimCLR: two encodes each."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    from benchmarks.peers import Agree, Headed, NTXentLoss, TwoViews, heads

    task = Agree(args.size, NTXentLoss(0.5))
    make = lambda net: Headed(net, heads.SimCLRProjectionHead(net.out_features, 512, 128))  # noqa: E731
    trainer, device = build(args, task, lambda: make(build_encoder(args.encoder)))
    data = LightlyDataset(args.data, transform=SimCLRTransform(args.size))
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True, **WORKERS)

    def step(batch, number):
        trainer.step(TwoViews(torch.cat(batch[0]).to(device, non_blocking=True)), number)

    return {"images_per_second": timed_loading(loader, step, args, device)}


def decode(args: argparse.Namespace) -> dict:
    """Images a second of building the cache, and of Pillow alone in as many threads."""
    side = 2 * args.size
    files = list_files(args.data, args.scratch)

    def plain(file):
        with Image.open(file) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC))

    for file in files:
        file.read_bytes()  # so that both read from memory
    start = time.perf_counter()
    with ThreadPoolExecutor(workers()) as pool:
        for _ in pool.map(plain, files):
            pass
    alone = time.perf_counter() - start
    with tempfile.TemporaryDirectory(dir=args.scratch) as data_dir:
        start = time.perf_counter()
        images = open_images(list_data(args.data, data_dir), args.size, data_dir)
        cached = time.perf_counter() - start
    return {"images_per_second": len(images.labels) / cached, "pillow": len(files) / alone}


def as_images(pixels: np.ndarray) -> Images:
    """Pixels N 3 H H uint8, as a data set without labels."""
    entries = [Entry(f"{i}", "unsup", -1) for i in range(len(pixels))]
    return Images(
        Listing("pixels", "pixels", (), [], entries, [], None, pixels.shape[2], ""),
        pixels,
        torch.full((len(pixels),), -1),
    )


def growth(args: argparse.Namespace, count: int) -> dict:
    """Training that streams from `count` images: seconds an image, those of loading alone, and memory in MB."""
    side = 2 * args.size
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        file = Path(folder, "images")
        block = np.random.default_rng(0).integers(0, 255, (1000, 3, side, side), dtype=np.uint8).tobytes()
        with open(file, "wb") as stream:
            for _ in range(count // 1000):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())  # otherwise the system writes it out while the clock runs
        del block
        images = as_images(np.memmap(file, np.uint8, "r", shape=(count, 3, side, side)))
        trainer, device = build(args, MixupTransform(size=args.size))
        loader, _ = get_dataloaders(images, range(count), range(3), args.batch_size, 0, device, "stream")

        def step(batch, number):
            trainer.learn(*batch, number, generator(0, number))

        speed = timed_loading(loader, step, args, device)
        alone = timed_loading(loader, lambda batch, number: None, args, device)
    memory = own_memory(Path("/proc/self/status").read_text())
    return {"seconds_per_image": 1 / speed, "loading": 1 / alone, "anonymous_mb": memory}


def own_memory(status: str) -> float:
    """Text of /proc/PID/status, in units of 1024 bytes -> the memory of a process without mapped files, MB."""
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


MEASURES = {"limit": limit, "ours": ours, "obvious": obvious, "lightly": lightly, "decode": decode}
MEASURES |= {f"growth-{count}": functools.partial(growth, count=count) for count in GROWTH}


def rows_of(found: dict[str, list[dict]]) -> dict[str, tuple[str, list[float]]]:
    """The measurements of each kind -> the rows of the table, {name: (unit, values)}, as far as they were measured.

    First every figure, then the ratios and differences of two figures of the same turn.
    """
    rows = {}

    def add(name, unit, kind, figure, scale=1.0):
        rows[name] = unit, [scale * run[figure] for run in found.get(kind, [])]

    def compare(name, unit, operation, ours, theirs):
        rows[name] = unit, [operation(a, b) for a, b in zip(rows[ours][1], rows[theirs][1], strict=False)]

    for kind in ("limit", "ours", "obvious", "lightly", "decode"):
        add(OURS if kind == "ours" else kind, "images/s", kind, "images_per_second")
    add("pillow", "images/s", "decode", "pillow")
    add("logging", "% of an epoch of ours", "ours", "logging", 100)
    for count in GROWTH:
        add(f"{count:,} images: training", "µs/image", f"growth-{count}", "seconds_per_image", 1e6)
        add(f"{count:,} images: loading alone", "µs/image", f"growth-{count}", "loading", 1e6)
        add(f"{count:,} images: memory", "MB", f"growth-{count}", "anonymous_mb")
    for ours, theirs in ((OURS, "limit"), (OURS, "obvious"), (OURS, "lightly"), ("decode", "pillow")):
        compare(f"{ours.split()[0]} / {theirs}", "ratio", operator.truediv, ours, theirs)
    most, least = (f"{count:,} images" for count in (GROWTH[-1], GROWTH[0]))
    training, memory = ([f"{images}: {what}" for images in (most, least)] for what in ("training", "memory"))
    compare(f"training: {most} / {least}", "ratio", operator.truediv, *training)
    compare(f"memory: {most} - {least}", "MB", operator.sub, *memory)
    return {name: (unit, values) for name, (unit, values) in rows.items() if values}


def table(results: dict) -> str:
    """The median of every figure, its spread (half of the interquartile range), the number of runs, and its unit."""
    lines = [f"{results['device']}, {results['cores']} cores", f"{'':40}{'median':>10}{'spread':>10}{'runs':>6}  unit"]
    for name, (unit, values) in rows_of(results["found"]).items():
        digits = 2 if unit == "ratio" else 1
        spread = np.subtract(*np.percentile(values, (75, 25))) / 2
        figures = f"{statistics.median(values):>10.{digits}f}{spread:>10.{digits}f}{len(values):>6}"
        lines.append(f"{name:40}{figures}  {unit}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
