"""Everything that only a GPU can tell, in one JSON.

    python benchmarks/gpu_check.py                          all parts, ten minutes at most
    python benchmarks/gpu_check.py --only losses speed      some of them
    python benchmarks/gpu_check.py --device cpu --quick     the same parts, small, on a CPU: to try this script

  env       the GPU, and its ceilings: matrix products, copies, launches
  tests     the tests that need a GPU
  losses    twenty steps on the CPU, on the GPU, and recorded as CUDA graphs, from the same seeds
  waits     where the CPU waits for the GPU in an epoch
  command   train_pretext.py and train_transfer.py with many options
  profile   kernels of a step and of the limit's, the share in which the GPU is idle, and how long the CPU takes
  speed     training against its limit, a step on a question that is already there; with graphs and without
  compile   speed with --compile

Each part runs in a process of its own with a time limit, and the JSON is rewritten after each.
"""

import argparse
import collections
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from augment import generator
from benchmarks.speed import as_images, timed
from data import get_dataloaders
from engine import Trainer
from harness import command
from harness.files import write_json
from models import build_model
from tasks import MixupTransform

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"env": 60, "tests": 280, "losses": 90, "waits": 60, "command": 280, "profile": 60, "speed": 120}  # s
LIMITS |= {"compile": 150}
CASES = [("conv", 32, 64), ("resnet18", 128, 64), ("conv", 32, 256), ("resnet18", 128, 256)]  # encoder, px, batch
QUICK = [("conv", 16, 16)]
OPTIONS = [  # of train_pretext.py, besides the defaults
    "--images stream", "--decoder cosine", "--decoder mlp --candidates 5", "--task rotate", "--no-views",
    "--task scale", "--amp off", "--encoder resnet18 --size 64", "--sources 3", "--compile",
]  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line -> settings."""
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where to compute")
    add("--only", nargs="+", choices=LIMITS, default=list(LIMITS), help="parts")
    add("--quick", action="store_true", help="small sizes and few options")
    add("--seconds", type=command.integer(1), default=560, help="for all parts, at most")
    add("--out", type=command.place, default="gpu.json", help="file for what was found")
    add("--part", choices=LIMITS, help=argparse.SUPPRESS)  # one part, in a process of its own
    return parser.parse_args()


def main() -> int:
    """Run the parts. Returns 1 if one of them failed or found something wrong."""
    args = parse()
    if args.part:
        tell(PARTS[args.part](args))
        return 0
    found, end = {}, time.monotonic() + args.seconds
    for part in [name for name in LIMITS if name in args.only]:
        clock = time.monotonic()
        limit = max(1, min(LIMITS[part], end - clock))
        words = [sys.executable, __file__, "--part", part, "--device", args.device, *["--quick"] * args.quick]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=limit)
            found[part] = told(done.stdout)
            if done.returncode:
                found[part] |= {"good": False, "why": done.stderr[-3000:]}
        except subprocess.TimeoutExpired as error:
            found[part] = told((error.stdout or b"").decode(errors="replace"))
            found[part] |= {"good": False, "why": f"stopped after {limit:.0f} s"}
        found[part]["seconds"] = round(time.monotonic() - clock, 1)
        write_json(found, args.out)
        said = {name: value for name, value in found[part].items() if not isinstance(value, dict | list)}
        print(f"{part:10}{json.dumps(said)[:1500]}", flush=True)
    print(f"results    {args.out}")
    return int(not all(result.get("good", True) for result in found.values()))


def tell(found: dict) -> None:
    """Hand on what a part has found so far. The last word counts, also where the part is stopped."""
    print("\n@@" + json.dumps(found, default=float), flush=True)


def told(text: str) -> dict:
    """The last that `tell` said in a process's output."""
    lines = [line for line in text.splitlines() if line.startswith("@@")]
    return json.loads(lines[-1][2:]) if lines else {}


# -------------------------------------------------------------------------------------------------- what the parts use


def wait(device: torch.device) -> None:
    """Until the GPU has done all."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_trainer(device: str, encoder: str, size: int, graphs=True, amp=True, decoder="ridge") -> Trainer:
    """As train_pretext.py makes it."""
    torch.manual_seed(0)
    model = build_model(encoder, decoder, size)
    options = {"device": torch.device(device), "amp": amp, "graphs": graphs}
    trainer = Trainer(model, MixupTransform(size=size), lr=1e-3, steps=10_000, **options)
    model.train()
    return trainer


def make_loader(device: str, batch: int, size: int, batches: int, place: str, folder: str):
    """A loader of images with some structure, which lie in a file as decoded ones do; of 512 different ones."""
    count, side = 512, 2 * size
    file = Path(folder, f"images-{side}")
    small = np.random.default_rng(0).integers(0, 255, (count, 3, 8, 8), dtype=np.uint8)
    file.write_bytes(small.repeat(side // 8, axis=2).repeat(side // 8, axis=3).tobytes())
    images = as_images(np.memmap(file, np.uint8, "r", shape=(count, 3, side, side)))
    rows = np.arange(batch * batches) % count
    return get_dataloaders(images, rows, range(3), batch, 0, torch.device(device), place)[0]


def warm_up(trainer: Trainer, loader) -> int:
    """Train until kernels are chosen and graphs are recorded. Returns the number of epochs."""
    epoch = 0
    while epoch < 2 or (trainer.recorded and trainer.recorded.works and not all(trainer.recorded.calls.values())):
        trainer.train_epoch(loader, epoch, tqdm(disable=True))
        epoch += 1
    return epoch


def fixed_step(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> Callable:
    """A step on a question that is there, and nothing else: as fast as the network can be."""
    question = trainer.ask(trainer.task, images, labels, generator(0), learn=True)
    if not trainer.recorded:
        return lambda _: trainer._learn(question, torch.tensor(1e-3))
    rate = torch.full((), 1e-3, device=trainer.device)
    return lambda _: trainer.recorded("limit", lambda lr: trainer._learn(question, lr), rate)


def milliseconds(step, seconds: float, device: torch.device) -> float:
    """Milliseconds a call of `step(number)`."""
    return 1e3 / timed(step, 1, seconds, device)


# --------------------------------------------------------------------------------------------------------------- parts


def env(args: argparse.Namespace) -> dict:
    """What the machine is, and its ceilings."""
    device = torch.device(args.device)
    found = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found |= {"cudnn": torch.backends.cudnn.version(), "free_gb": torch.cuda.mem_get_info()[0] / 1e9}
    n = 512 if args.quick else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["matmul_tflops"] = 2 * n**3 / milliseconds(lambda _: a @ b, 0.3, device) / 1e9
    x, y = torch.empty(2, 2 ** (22 if args.quick else 30), dtype=torch.uint8, device=device)
    found["copy_gb_s"] = 2 * x.numel() / milliseconds(lambda _: y.copy_(x), 0.3, device) / 1e6
    one = torch.zeros(64, device=device)
    found["launch_us"] = 1e3 * milliseconds(lambda _: [one.add_(1) for _ in range(200)], 0.3, device) / 200
    return found


def tests(args: argparse.Namespace) -> dict:
    """The tests that are marked gpu. Without a GPU they are skipped."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rA", "--tb=short"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    return {"good": done.returncode == 0, "last": last, "output": [done.stdout[-6000:]]}


def losses(args: argparse.Namespace) -> dict:
    """The losses of twenty steps: CPU, GPU (float32 without TF32), the same recorded, and bf16."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    batch, size = (16, 16) if args.quick else (64, 32)
    ways = {"cpu": ("cpu", False, False), "eager": (args.device, False, False), "recorded": (args.device, True, False)}
    ways["bf16"] = (args.device, True, True)
    found, good = {}, True
    with tempfile.TemporaryDirectory() as folder:
        for decoder in ("ridge", "cosine"):
            curves, views = {}, {}
            for name, (device, graphs, amp) in ways.items():
                trainer = make_trainer(device, "conv", size, graphs, amp, decoder)
                loader = make_loader(device, batch, size, 20, "device", folder)
                images, labels = next(iter(loader))
                views[name] = trainer.ask(trainer.task, images, labels, generator(1), learn=True).mixtures.cpu()
                scores = []
                for step in range(20):
                    seen = trainer.learn(images, labels, step, generator(0, 0, step))
                    scores.append(torch.stack([seen["loss"], seen["gradient_norm"]]))  # no wait between steps
                curves[name] = torch.stack(scores).T.tolist()  # loss, gradient norm
            off = {}
            for name in list(ways)[1:]:
                pairs = [
                    [abs(b / a - 1) for a, b in zip(curves["cpu"][i], curves[name][i], strict=True)] for i in range(2)
                ]
                off[name] = {"first": pairs[0][0], "worst": max(pairs[0]), "first_gradient": pairs[1][0]}
                off[name]["views"] = (views[name] - views["cpu"]).abs().max().item()
            good &= all(off[name]["first"] < 1e-3 and off[name]["views"] < 1e-4 for name in ("eager", "recorded"))
            found[decoder] = {"off": off, "losses": {name: curve[0] for name, curve in curves.items()}}
    return {"good": good, **found}


def waits(args: argparse.Namespace) -> dict:
    """Every line that makes the CPU wait for the GPU in an epoch, loader and figures included. One is allowed: the
    figures are read at the end of an epoch."""
    found, device = {}, torch.device(args.device)
    size, batch, batches = (16, 16, 8) if args.quick else (32, 64, 45)
    with tempfile.TemporaryDirectory() as folder:
        for place, graphs in (("device", True), ("device", False), ("stream", True)):
            trainer = make_trainer(args.device, "conv", size, graphs)
            loader = make_loader(args.device, batch, size, batches, place, folder)
            epochs = warm_up(trainer, loader)
            seen = collections.Counter()

            def note(message, category, filename, lineno, file=None, line=None, seen=seen):
                if "called a synchronizing" in str(message):
                    stack = [frame for frame in traceback.extract_stack() if str(ROOT) in frame.filename]
                    outer = (Path(__file__).name, "command.py")
                    inner = [f for f in stack if Path(f.filename).name not in outer] or stack
                    seen[f"{Path(inner[-1].filename).name}:{inner[-1].lineno} {inner[-1].line}"] += 1

            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = note
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("warn")
                trainer.train_epoch(loader, epochs, tqdm(disable=True))
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            found[f"{place}{', graphs' * graphs}"] = dict(seen)
    return {"good": all(sum(seen.values()) <= 1 for seen in found.values()), **found}


def commands(args: argparse.Namespace) -> dict:
    """The commands as a user types them: two epochs, gone on with; other recipes; transfer in three of its modes."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(words: str):
            clock = time.perf_counter()
            line = [sys.executable, *(str(ROOT / word) if word.endswith(".py") else word for word in words.split())]
            done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
            found[words] = {"status": done.returncode, "seconds": time.perf_counter() - clock}
            found[words]["said"] = (done.stderr if done.returncode else done.stdout)[-1500:]
            tell({"good": not any(one["status"] for one in found.values()), "runs": found})

        few = " --size 16 --batch-size 256" if args.quick else ""
        run(f"train_pretext.py --epochs 2 --device {args.device}{few} --out a")
        run("train_pretext.py --resume a --epochs 3")
        with open(Path(folder, "a", "history.csv"), encoding="utf-8") as file:
            history = list(csv.DictReader(file))
        pretext = f"train_pretext.py --epochs 1 --device {args.device}{few} --out b"
        words = [f"{pretext}{i} {options}" for i, options in enumerate(OPTIONS[: 1 if args.quick else None])]
        for mode in ("knn", "linear --epochs 1", "finetune --epochs 1 --freeze 1")[: 1 if args.quick else None]:
            out = f"c-{mode.split()[0]}"
            words.append(f"train_transfer.py a scratch --device {args.device} --out {out} --mode {mode}")
        with ThreadPoolExecutor(1 if args.quick else 5) as pool:  # a GPU takes several at once; they are not timed
            list(pool.map(run, words))
    bad = [words for words, one in found.items() if one["status"]]
    return {"good": not bad, "failed": bad, "history": history, "runs": found}


def profile(args: argparse.Namespace) -> dict:
    """Kernels a step, the share in which the GPU is idle, and who takes the time: of a step launched one by one, of a
    recorded one, and of the limit's. On a CPU its own operations."""
    from torch.profiler import ProfilerActivity

    found, device, steps = {}, torch.device(args.device), 5
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with tempfile.TemporaryDirectory() as folder:
        for encoder, size, batch in QUICK if args.quick else CASES[:3]:
            for way in ("", ", graphs", ", limit"):
                trainer = make_trainer(args.device, encoder, size, bool(way))
                images, labels = next(iter(make_loader(args.device, batch, size, 2, "device", folder)))
                step = lambda n, t=trainer, x=images, y=labels: t.learn(x, y, n, generator(0, n % 7))  # noqa: E731
                step = fixed_step(trainer, images, labels) if way == ", limit" else step
                for number in range(40):
                    step(number)
                wait(device)
                clock = time.perf_counter()
                for number in range(steps):
                    step(number)
                queued = time.perf_counter() - clock  # the CPU's own time on a GPU, which computes meanwhile
                wait(device)
                with torch.profiler.profile(activities={ProfilerActivity.CPU, kind}) as seen:
                    clock = time.perf_counter()
                    for number in range(steps):
                        step(number)
                    wait(device)
                    wall = time.perf_counter() - clock
                events = [e for e in seen.events() if str(e.device_type).endswith(kind.name)]
                if device.type == "cuda":
                    events = [e for e in events if not e.name.startswith(("Optimizer.", "ProfilerStep"))]
                spans = sorted((e.time_range.start, e.time_range.end) for e in events)
                busy, end = 0.0, float("-inf")
                for a, b in spans:  # us
                    busy, end = busy + max(0.0, b - max(a, end)), max(end, b)
                times = collections.Counter()
                for event in events:
                    times[event.name[:80]] += event.time_range.elapsed_us() / steps
                waited = [e.name for e in seen.events() if "ynchronize" in e.name]
                found[f"{encoder} {size} px, {batch}{way}"] = {
                    "kernels_a_step": len(events) / steps, "busy_ms_a_step": busy / 1e3 / steps,
                    "queued_ms_a_step": 1e3 * queued / steps, "wall_ms_a_step": 1e3 * wall / steps,
                    "idle": 1 - busy / max(1e-9, end - spans[0][0]),
                    "waits": dict(collections.Counter(waited)), "longest_us": dict(times.most_common(20)),
                }  # fmt: skip
                tell(found)
    return found


def speed(args: argparse.Namespace, compiled: bool = False) -> dict:
    """Images a second: of the limit, a step on a fixed question; of whole epochs, resident and streamed. An epoch has
    20,000 images, or where kernels are launched one by one 20 batches."""
    found, device = {}, torch.device(args.device)
    seconds = 0.2 if args.quick else 0.7
    with tempfile.TemporaryDirectory() as folder:
        for encoder, size, batch in QUICK if args.quick else CASES[1:3] if compiled else CASES:
            make = lambda n, place, b=batch, s=size: make_loader(args.device, b, s, n, place, folder)  # noqa: E731
            loaders = {place: make(20, place) for place in ("device", "stream")}
            row = {}
            for graphs in (False, True):
                trainer = make_trainer(args.device, encoder, size, graphs)
                if compiled:
                    trainer.model.encoder.compile()
                images, labels = next(iter(loaders["device"]))
                if graphs and not trainer.recorded:
                    continue
                name = "recorded" if graphs else "eager"
                row[f"{name}_limit"] = 1e3 * batch / milliseconds(fixed_step(trainer, images, labels), seconds, device)
                for place, loader in loaders.items() if graphs else [("device", loaders["device"])]:
                    trainer.taken, rates = 0, []
                    warm_up(trainer, loader)
                    whole = loader if args.quick or not graphs else make(20_000 // batch, place)
                    trainer.taken = 0
                    for epoch in range(3):
                        clock = time.perf_counter()
                        trainer.train_epoch(whole, epoch, tqdm(disable=True))
                        rates.append(len(whole) * batch / (time.perf_counter() - clock))
                    row[f"{name}_{place}"] = statistics.median(rates)
                row[f"{name}_ratio"] = row[f"{name}_device"] / row[f"{name}_limit"]
                row[f"{name}_seconds_for_20000"] = 20_000 / row[f"{name}_device"]
            found[f"{encoder} {size} px, {batch}"] = row
            if device.type == "cuda":
                row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                torch.cuda.reset_peak_memory_stats()
            tell(found)
    return found


def compile_(args: argparse.Namespace) -> dict:
    """The same with --compile."""
    return {"why": "not on a CPU"} if args.device == "cpu" else speed(args, compiled=True)


PARTS = {"env": env, "tests": tests, "losses": losses, "waits": waits, "command": commands, "profile": profile}
PARTS |= {"speed": speed, "compile": compile_}

if __name__ == "__main__":
    command.run(main)
