"""Which pretext recipe transfers best? Pretrain with each, judge the encoders, write tables into RESULTS.md.

    python benchmarks/search.py                                       every recipe that has no result yet, 30 epochs
    python benchmarks/search.py unmix simclr --seeds 0 1 2 --epochs 100
    python benchmarks/search.py --widths 16 32 64 128                 a narrow encoder, which is faster
    python benchmarks/search.py unmix simclr --time                   seconds of an epoch; nothing else should run
    python benchmarks/search.py --table                               write the tables, and README.md's, run nothing

Encoders are pretrained on tinywang. They are judged by probes on probe40, 40 other classes, and on tinywang. Every
judged encoder is a file in benchmarks/results/search/, with what it got right, and is not judged again; beside those of
an earlier version, with the same encoder and epochs, nothing is run. Encoders lie in --runs, so that the search can be
stopped and continued, and a new way to judge needs no new training. Recipes are chosen with seed 0 on one half of the
images, the files whose name has an even MD5, and compared on the other half.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scipy.stats

from harness import command
from harness.errors import RunError, UsageError
from harness.files import write_json
from harness.folder import FORMAT
from models import WIDTHS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "search"
TIMED, EPOCHS = ROOT / "benchmarks" / "results" / "seconds.json", 4  # of a timed run, so that views grow once
HALVES = {"choose": 0, "report": 1}  # the parity of the MD5 of a file's name
OURS = "unmix"  # the default of train_pretext.py
FINETUNE = "--mode finetune --epochs 5 --runs 2"
FIGURES = {  # column: the data, the row of train_transfer.py, its figure
    "linear": ("probe", "ridge", "accuracy"),
    "kNN": ("probe", "knn", "accuracy"),
    "25 labels": ("probe", "25 labels", "accuracy"),
    "tinywang, linear": ("data", "ridge", "accuracy_val_classes"),
    "tinywang, fine-tuned": ("finetune", "finetune", "accuracy_val_classes"),
    "among all 20": ("finetune", "finetune", "accuracy"),
    "uncorrected": ("finetune", "finetune", "accuracy_uncorrected"),
}
BRIEF = {  # in the README
    "scratch": "none", "unmix": "Unmix", "simclr": "SimCLR", "swav": "SwAV", "byol": "BYOL", "vicreg": "VICReg",
}  # fmt: skip


class Recipe(NamedTuple):
    """A way to pretrain."""

    encodes: float  # an image and epoch; one without a gradient counts a third
    command: str | None  # None: no pretext
    lesson: str


PRETEXT, PEERS = "train_pretext.py", "benchmarks/peers.py"
RECIPES = {
    "scratch": Recipe(0, None, "what an untrained encoder is worth"),
    "rotation": Recipe(1, f"{PRETEXT} --task rotate", "four turns are soon told apart, and teach little"),
    "unmix": Recipe(2, PRETEXT, "the default"),
    "simclr": Recipe(2, f"{PEERS} simclr --lr 6e-3", "the best of three temperatures and three learning rates"),
    "simclr-0.1": Recipe(2, f"{PEERS} simclr --temperature 0.1", "level"),
    "simclr-0.5": Recipe(2, f"{PEERS} simclr --temperature 0.5", "worse"),
    "swav": Recipe(2, f"{PEERS} swav", "the best of three learning rates"),
    "byol": Recipe(2 + 2 / 3, f"{PEERS} byol --lr 6e-3", "the best of three learning rates and two momenta"),
    "vicreg": Recipe(2, f"{PEERS} vicreg", "lightly's weights of the three terms"),
}


def main() -> None:
    """Run what is left to do, and write the tables."""
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)")
    add(
        "--data",
        type=command.place,
        default="tinywang",
        help="to pretrain on: name, or folder with train/, val/, unsup/",
    )
    add("--probe", type=command.place, default="probe40", help="to judge by: name, or folder with train/ and val/")
    add("--data-dir", type=command.place, default="data", help="folder for data sets by name, and for decoded images")
    add("--epochs", type=command.integer(1), default=30, help="of pretraining")
    add("--seeds", type=command.integer(0, 2**31 - 1), nargs="+", default=[0], help="of pretraining")
    add("--widths", type=command.integer(1), nargs="+", default=list(WIDTHS), help="of the encoder")
    add("--finetune", action="store_true", help=f"judge by `{FINETUNE}` on --data, too")
    add("--workers", type=command.integer(1), default=os.cpu_count(), help="runs at once, one thread each")
    add("--runs", type=Path, default=Path("runs", "search"), help="folder for the encoders")
    add("--time", action="store_true", help=f"time {EPOCHS} epochs, each recipe alone on one thread, judge nothing")
    add("--table", action="store_true", help="write the tables, run nothing")
    args = parser.parse_args()
    args.encoder = "-".join(map(str, args.widths))
    for name in args.names:
        if name not in RECIPES:
            raise UsageError(f"{name} is no recipe: use {', '.join(RECIPES)}")
    beside = [file for epochs in (0, args.epochs) for file in RESULTS.glob(f"*-{args.encoder}-{epochs}-*.json")]
    for file in [] if args.table else [TIMED] * TIMED.exists() if args.time else sorted(beside):
        refuse_earlier(file)
    if args.time:
        for name in args.names or RECIPES:
            if RECIPES[name].command:  # scratch takes no time
                clock(args, name)
    elif not args.table:
        jobs = [(name, seed) for seed in args.seeds for name in args.names or RECIPES]
        with ThreadPoolExecutor(args.workers) as pool:
            try:
                for done in [pool.submit(experiment, args, *job) for job in jobs]:
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those that have not begun
                raise
    write_tables()


def experiment(args: argparse.Namespace, name: str, seed: int) -> None:
    """Pretrain with one recipe and one seed, and judge the encoder, as far as there is no result of it."""
    encodes, recipe, _ = RECIPES[name]
    epochs = args.epochs if recipe else 0
    file = RESULTS / f"{name}-{args.encoder}-{epochs}-{seed}.json"
    result = {"name": name, "widths": args.widths, "epochs": epochs, "seed": seed, "encodes": encodes, "right": {}}
    result |= {"format": FORMAT}
    if file.exists():
        result = json.loads(file.read_text("utf-8"))
    judges = {"probe": (args.probe, "--mode probe"), "data": (args.data, "--mode probe")}
    judges |= {"finetune": (args.data, f"{FINETUNE} --seed {2 * seed}")} if args.finetune else {}
    missing = [judge for judge in judges if judge not in result["right"]]
    folder, common = args.runs / file.stem, ["--data-dir", args.data_dir, "--overwrite"]
    start = folder / "pretext" if recipe else "scratch"
    if recipe and missing and not (start / "summary.json").exists():
        pretrain(args, f"{recipe} --epochs {epochs} --seed {seed}", start, folder / "pretext.log")
    if recipe and missing:
        summary = json.loads((start / "summary.json").read_text("utf-8"))
        widths = "" if args.widths == list(WIDTHS) else f" --widths {' '.join(map(str, args.widths))}"
        result |= {"command": f"python {recipe} --epochs {epochs} --seed {seed}{widths}", "device": summary["device"]}
    for judge in missing:
        data, options = judges[judge]
        out = folder / judge
        words = [*(["--seed", seed] if "--seed" not in options else []), "--data", data, "--out", out, *common]
        words += [] if recipe else ["--encoder", "conv"]
        call(["train_transfer.py", start, *options.split(), *words], folder / f"{judge}.log")
        result["right"][judge] = read_right(out / "predictions.csv", judge)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(result, file)
    if missing:
        figures = [f"{title} {figure(result, title, 'choose'):.1%}" for title in FIGURES if has(result, title)]
        print(f"{file.stem}: {', '.join(figures)}", flush=True)


def refuse_earlier(file: Path) -> None:
    """Raises UsageError if results in a file are of an earlier version, whose encoder and recipes are others."""
    results = json.loads(file.read_text("utf-8"))
    if any(result.get("format") != FORMAT for result in (results if isinstance(results, list) else [results])):
        raise UsageError(f"{file} is of an earlier version; move all results of its encoder and epochs elsewhere")


def pretrain(args: argparse.Namespace, recipe: str, out: Path, log: Path) -> None:
    """Run a recipe, or go on with it where `out` has a checkpoint."""
    script, *words = recipe.split()
    words += ["--widths", *args.widths, "--data", args.data, "--data-dir", args.data_dir, "--out", out, "--overwrite"]
    call([script, *(["--resume", out] if (out / "checkpoint.pt").exists() else words)], log)


def clock(args: argparse.Namespace, name: str) -> None:
    """Note the seconds of an epoch, the mean of a short run's, without validation."""
    timed = json.loads(TIMED.read_text("utf-8")) if TIMED.exists() else []
    start, recipe = args.runs / "timed", f"{RECIPES[name].command} --epochs {EPOCHS}"
    shutil.rmtree(start, ignore_errors=True)  # always from the first epoch
    pretrain(args, recipe, start, args.runs / "timed.log")
    summary = json.loads((start / "summary.json").read_text("utf-8"))
    seconds = summary["seconds"]
    if recipe.startswith(PRETEXT):  # which validates, too
        with open(start / "history.csv", newline="", encoding="utf-8") as stream:
            speeds = [float(row["training_images_per_second"]) for row in csv.DictReader(stream)]
        seconds = sum(summary["train_images"] / speed for speed in speeds)
    found = {"name": name, "encoder": args.encoder, "seconds": seconds / EPOCHS, "device": summary["device"]}
    timed.append(found | {"format": FORMAT})
    write_json(timed, TIMED)
    print(f"{name}: {seconds / EPOCHS:.1f} s an epoch, {summary['device']}", flush=True)


def call(words: list, log: Path) -> None:
    """Run a script of the project with one thread, its output to `log`. Raises RunError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, *map(str, [ROOT / words[0], *words[1:]])]
    with open(log, "w") as stream:
        done = subprocess.run(line, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        why = (log.read_text("utf-8").strip().splitlines() or ["it was killed"])[-1]
        raise RunError(f"{shlex.join(line)} failed: {why} (see {log})")


def read_right(file: Path, judge: str) -> dict:
    """predictions.csv -> {row of its table: {figure: {half: [for each run, which images are right]}}}, as far as a
    column needs it; the images in the order of their paths, as `pack` packs them."""
    wanted, found = {(way, name) for of, way, name in FIGURES.values() if of == judge}, {}
    with open(file, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            parity = int(hashlib.md5(Path(row["path"]).name.encode(), usedforsecurity=False).hexdigest(), 16) % 2
            half = next(half for half, remainder in HALVES.items() if remainder == parity)
            way = judge if judge == "finetune" else row["start"].rpartition(", ")[2]
            for name in (name for other, name in wanted if other == way):
                runs = found.setdefault(way, {}).setdefault(name, {}).setdefault(half, {})
                runs.setdefault(row["seed"], []).append(row[name] == row["class"])
    for halves in (halves for figures in found.values() for halves in figures.values()):
        halves |= {half: [pack(run) for run in runs.values()] for half, runs in halves.items()}
    return found


def pack(right: list[bool]) -> str:
    """Booleans -> their number, a colon, and hexadecimal digits of their bits."""
    bits = "".join("01"[bit] for bit in right)
    return f"{len(bits)}:{int(bits, 2):x}"


def unpack(text: str) -> list[bool]:
    """The booleans that `pack` packed."""
    count, digits = text.split(":")
    return [bit == "1" for bit in format(int(digits, 16), f"0{count}b")]


def has(result: dict, title: str) -> bool:
    """Whether a result has this figure, a title of FIGURES."""
    judge, way, _ = FIGURES[title]
    return way in result["right"].get(judge, {})


def rights(result: dict, title: str, half: str) -> list[float]:
    """For every image of a half the share of runs that classified it right."""
    judge, way, name = FIGURES[title]
    runs = map(unpack, result["right"][judge][way][name][half])
    return [statistics.fmean(image) for image in zip(*runs, strict=True)]


def figure(result: dict, title: str, half: str) -> float:
    """Accuracy on a half, in [0, 1]: mean over the runs of one pretext seed."""
    return statistics.fmean(rights(result, title, half))


def difference(ours: list[dict], theirs: list[dict], title: str, half: str) -> tuple[float, float]:
    """Mean paired difference of the accuracies, ours - theirs, and half of its 95 % interval.

    Paired by image and by pretext seed. Images and seeds both vary, so their variances add up (which counts the noise
    of single runs twice); Student's t with the degrees of freedom of Welch and Satterthwaite, since seeds are few. With
    one seed the interval is that of the images alone.
    """
    pairs = list(zip(ours, theirs, strict=True))
    # For each seed the differences of the images.
    rows = [[a - b for a, b in zip(*(rights(r, title, half) for r in pair), strict=True)] for pair in pairs]
    images = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    parts = [(statistics.variance(images) / len(images), len(images) - 1)]  # variance, degrees of freedom
    if len(rows) > 1:
        parts.append((statistics.variance(map(statistics.fmean, rows)) / len(rows), len(rows) - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / free for part, free in parts) if variance else 1
    return statistics.fmean(images), float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(variance)


def load() -> dict[tuple[str, int, str], list[dict]]:
    """(encoder, epochs, recipe): its results in the order of their seeds."""
    found = {}
    results = [json.loads(file.read_text("utf-8")) for file in RESULTS.glob("*.json")]
    for result in sorted(results, key=lambda result: result["seed"]):
        encoder = "-".join(map(str, result["widths"]))
        found.setdefault((encoder, result["epochs"], result["name"]), []).append(result)
    order = list(RECIPES)
    return dict(sorted(found.items(), key=lambda item: (*item[0][:2], order.index(item[0][2]))))


def table(results: dict[tuple[str, int, str], list[dict]], half: str, seeds: range) -> str:
    """Markdown: a row for each recipe, encoder and number of epochs, with its figures on one half of the images, in per
    cent: mean ± standard deviation over pretext seeds, and how far the default after as many epochs is ahead."""
    titles = ["recipe", "command", "encoder", "epochs", "seeds", "encodes an image", *FIGURES, "lesson"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (encoder, epochs, name), runs in results.items():
        runs = [run for run in runs if run["seed"] in seeds]
        ours = [run for run in results.get((encoder, epochs, OURS), []) if run["seed"] in seeds and name != OURS]
        if not runs:
            continue
        encodes, recipe, lesson = RECIPES[name]
        words = f"`{recipe.removeprefix('benchmarks/')}`" if recipe else "no pretext"
        start = [name, words, encoder, str(epochs), str(len(runs)), f"{encodes:.3g}"]
        lines.append(f"| {' | '.join([*start, *(cell(runs, ours, title, half) for title in FIGURES), lesson])} |")
    return "\n".join(lines)


def cell(runs: list[dict], ours: list[dict], title: str, half: str) -> str:
    """One figure of some runs, mean ± standard deviation, and in brackets that of `ours` less it; "" if none has it."""
    done = [run for run in runs if has(run, title)]
    if not done:
        return ""
    values = [100 * figure(run, title, half) for run in done]
    text = f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(done) > 1 else "")
    text += f" of {len(done)}" if len(done) < len(runs) else ""
    pairs = [(a, b) for a in ours for b in done if a["seed"] == b["seed"] and has(a, title)]
    if pairs:
        mean, half_width = difference(*map(list, zip(*pairs, strict=True)), title, half)
        text += f" ({round(100 * mean, 1) + 0:+.1f} ± {100 * half_width:.1f})"
    return text


def brief(results: dict[tuple[str, int, str], list[dict]]) -> str:
    """Markdown: three figures of the default encoder, on the half of the images that no choice was made on."""
    lines = ["| pretraining | epochs | seeds | linear | kNN | 25 labels |", "|---" * 6 + "|"]
    for (encoder, epochs, name), runs in results.items():
        if name in BRIEF and runs[0]["widths"] == list(WIDTHS):
            ours = results.get((encoder, epochs, OURS), []) if name != OURS else []
            cells = [cell(runs, ours, title, "report") for title in list(FIGURES)[:3]]
            lines.append(f"| {' | '.join([BRIEF[name], str(epochs), str(len(runs)), *cells])} |")
    return "\n".join(lines)


def race(results: dict[tuple[str, int, str], list[dict]]) -> str:
    """Markdown: epochs and seconds until a recipe is where SimCLR is after 100 epochs, on the half that no choice was
    made on. Between finished runs, figures are taken as linear in the logarithm of the epochs."""
    titles, timed = list(FIGURES)[:3], {}
    for run in json.loads(TIMED.read_text("utf-8")) if TIMED.exists() else []:
        timed.setdefault((run["name"], run["encoder"]), []).append(run["seconds"])
    lines = ["| recipe | encoder | seconds an epoch | " + " | ".join(titles) + " |", "|---" * (3 + len(titles)) + "|"]
    for (name, encoder), seconds in timed.items():
        own = {epochs: runs for (e, epochs, n), runs in results.items() if (e, n) == (encoder, name)}  # in order
        if not own or (encoder, 100, "simclr") not in results:
            continue
        cells = []
        for title in titles:
            mean = lambda runs, title=title: statistics.fmean(figure(run, title, "report") for run in runs)  # noqa: E731
            done, goal = [(epochs, mean(runs)) for epochs, runs in own.items()], mean(results[encoder, 100, "simclr"])
            needed = [
                first * (last / first) ** max(0, (goal - low) / (high - low))
                for (first, low), (last, high) in itertools.pairwise(done)
                if high >= goal
            ]
            text = [f"{epochs:.0f} epochs, {epochs * statistics.fmean(seconds):.0f} s" for epochs in needed[:1]]
            cells += text or ["not reached"]
        epoch = f"{statistics.fmean(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        lines.append(f"| {' | '.join([name, encoder, epoch, *cells])} |")
    return "\n".join(lines)


def write_tables() -> None:
    """Replace what stands between the markers of RESULTS.md and README.md."""
    results = load()
    parts = {"search": table(results, "choose", range(1)), "comparison": table(results, "report", range(2**31))}
    parts["race"] = race(results)
    for name, marks in {"RESULTS.md": parts, "README.md": {"results": brief(results)}}.items():
        file = ROOT / name
        text = file.read_text("utf-8")
        for mark, part in marks.items():
            start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
            text = text[: text.index(start) + len(start)] + part + "\n" + text[text.index(end) :]
        file.write_text(text, "utf-8")


if __name__ == "__main__":
    command.run(main)
