"""Which pretext recipe transfers best? Pretrain with each, transfer, keep every result, write the tables of RESULTS.md.

    python benchmarks/search.py --data tinywang                        every recipe that has no result yet, 30 epochs
    python benchmarks/search.py NAME... --data tinywang --seeds 0 1 2  some recipes, with three pretext seeds each
    python benchmarks/search.py --table                                write the tables, run nothing

Every finished run is a file in benchmarks/results/. It is not run again, so the search can be stopped and continued.
Recipes are chosen on one half of val/, the files whose name has an even MD5, and compared on the other half.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shlex
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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HALVES = {"choose": 0, "report": 1}  # the parity of the MD5 of a file's name
PRECISION = "--amp bf16"  # of every run, as the results that are there were computed
OURS = "ridge-batch"  # the default of train_pretext.py until it asked about few candidates, too
COMPARED = (OURS, "scratch", "rotation", "first", "contrast", "simclr", "swav")  # recipes of the comparison
COMPARED_EPOCHS = (0, 30, 100)  # 0: no pretext
MODES = {  # title: options of train_transfer.py
    "linear": "--mode linear",
    "knn": "--mode knn",
    "finetune": "--mode finetune --epochs 5 --runs 2",
    "finetune-x4": "--mode finetune --epochs 20",  # of OURS and scratch: is five epochs too few for scratch?
}
WAYS = ("accuracy_val_classes", "accuracy", "accuracy_uncorrected")  # figures of train_transfer.py
REMOVED = {"--pure", "--regions", "--momentum"}  # options that train_pretext.py had until LAST
LAST = "2309333"  # the last commit with them


class Recipe(NamedTuple):
    """A way to pretrain."""

    encodes: int  # an image and epoch
    command: str | None  # None: no pretext
    lesson: str = ""

    @property
    def runnable(self) -> bool:
        """Whether train_pretext.py still has the options."""
        return not REMOVED & set((self.command or "").split())

    @property
    def options(self) -> str:
        """The command as far as it differs from that of OURS, in Markdown."""
        if self.command in (None, RIDGE):
            return "no pretext" if self.command is None else "`--no-few`, the default then"
        script, *options = self.command.split(" --")
        words = [f"--{option}" for option in options if option not in RIDGE.split(" --")]
        if script != "train_pretext.py":
            words.insert(0, Path(script).name)
        return f"`{' '.join(words)}`" + ("" if self.runnable else f" at {LAST}")


RIDGE = "train_pretext.py --decoder ridge --candidates batch --symmetric --no-few"
COSINE = "train_pretext.py --decoder cosine --candidates batch --symmetric --no-few"
SAME = "no different within the noise"
PEERS = "benchmarks/peers.py"
RECIPES = {
    "scratch": Recipe(0, None, "what an untrained encoder is worth"),
    "rotation": Recipe(1, "train_pretext.py --task rotate", "hardly better than no pretext"),
    "first": Recipe(2, "train_pretext.py --no-views --candidates 3", "solved by the pixels; teaches nothing"),
    "ridge-batch": Recipe(2, RIDGE, "least squares on features, the whole batch as candidates"),
    "symmetric": Recipe(2, COSINE, "cosine instead of ridge: level but for kNN"),
    "pure-50": Recipe(2, f"{COSINE} --pure 0.5", "half of the mixtures hold one image: no gain"),
    "hidden": Recipe(2, f"{COSINE} --hidden 512", f"an MLP as projection, as in SimCLR: {SAME}"),
    "hidden-pure-50": Recipe(2, f"{COSINE} --hidden 512 --pure 0.5", f"both: {SAME}"),
    "contrast": Recipe(3, f"{COSINE} --contrast", "unmixed views too: ahead after 30 epochs, level after 100"),
    "regions": Recipe(2, f"{RIDGE} --regions 0.5", f"half of the mixtures are pasted, not blended: {SAME}"),
    "ridge-pure-50": Recipe(2, f"{RIDGE} --pure 0.5", f"half of the mixtures hold one image: {SAME}"),
    "ridge-hidden": Recipe(2, f"{RIDGE} --hidden 512", "an MLP as projection: no better after 100 epochs"),
    "ridge-hidden-pure-50": Recipe(2, f"{RIDGE} --hidden 512 --pure 0.5", "both: no better after 100 epochs"),
    "ridge-contrast": Recipe(3, f"{RIDGE} --contrast", "may help the linear probe, with a third encode"),
    "ridge-pure-50-crop-15": Recipe(2, f"{RIDGE} --pure 0.5 --crop 0.15", "crops of 15 % or more: no different"),
    "simclr-crop-15": Recipe(2, f"{PEERS} simclr --crop 0.15", "the same for SimCLR: no different"),
    "momentum": Recipe(3, f"{RIDGE} --contrast --momentum 0.99", "candidates from a moving average: no better"),
    "cosine-momentum": Recipe(3, f"{COSINE} --contrast --momentum 0.99", "the same with the cosine: no better"),
    "t-0.5": Recipe(2, f"{COSINE} --temperature 0.5", "a fixed temperature, not a learned one: no better"),
    "t-0.2": Recipe(2, f"{COSINE} --temperature 0.2", "the same: no better"),
    "beta-0.4": Recipe(2, f"{RIDGE} --beta 0.4", f"weights nearer to 0 and 1: {SAME}"),
    "sources-3": Recipe(2, f"{RIDGE} --sources 3", f"three images in a mixture: {SAME}"),
    "batch-128": Recipe(2, f"{RIDGE} --batch-size 128", f"half as many steps, same learning rate: {SAME}"),
    "swav-64": Recipe(2, f"{PEERS} swav --prototypes 64", "as many prototypes as images in a batch"),
    "simclr": Recipe(2, f"{PEERS} simclr", "the one to beat"),
    "swav": Recipe(2, f"{PEERS} swav", "512 prototypes: no different from 64 within the noise"),
}


def main() -> None:
    """Run what is left to do, and write the tables."""
    runnable = [name for name, recipe in RECIPES.items() if recipe.runnable]
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(runnable)} (default: all)")
    add("--data", type=command.place, help="name, or folder with train/CLASS, val/CLASS and unsup/ (default: none)")
    add("--data-dir", type=command.place, default="data", help="folder for data sets by name, and for decoded images")
    add("--epochs", type=command.integer(1), default=30, help="of pretraining")
    add("--seeds", type=command.integer(0, 2**31 - 1), nargs="+", default=[0], help="of pretraining")
    add("--workers", type=command.integer(1), default=os.cpu_count(), help="runs at once, one thread each")
    add("--runs", type=Path, default=Path("runs", "search"), help="folder for the runs")
    add("--table", action="store_true", help="write the tables, run nothing")
    args = parser.parse_args()
    for name in args.names:
        if name not in RECIPES:
            raise UsageError(f"{name} is no recipe: use {', '.join(runnable)}")
        if name not in runnable:
            gone = " ".join(sorted(REMOVED & set(RECIPES[name].command.split())))
            raise UsageError(f"{name} cannot be run any more: {gone} is gone; commit {LAST} is the last that has it")
    if not args.table:
        if not args.data:
            raise UsageError("--data FOLDER is needed")
        jobs = [(name, seed) for seed in args.seeds for name in args.names or runnable]
        with ThreadPoolExecutor(args.workers) as pool:
            try:
                for done in [pool.submit(experiment, args, *job) for job in jobs]:
                    done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those that have not begun
                raise
    if load():
        write_tables()


def experiment(args: argparse.Namespace, name: str, seed: int) -> None:
    """Pretrain and transfer one recipe with one seed, as far as there is no result of it."""
    encodes, recipe, _ = RECIPES[name]
    epochs = args.epochs if recipe else 0
    file = RESULTS / f"{name}-{epochs}-{seed}.json"
    folder = args.runs / file.stem
    result = {"name": name, "epochs": epochs, "seed": seed, "encodes": encodes, "seconds": 0.0, "modes": {}}
    if file.exists():
        result |= json.loads(file.read_text("utf-8"))
    missing = [mode for mode in modes_of(name) if mode not in result["modes"]]
    if not missing:
        return
    common = ["--data", args.data, "--data-dir", args.data_dir]
    start = "scratch"
    if recipe:
        start, options = folder / "pretext", f"--epochs {epochs} --seed {seed} {PRECISION}"
        script, *words = f"{recipe} {options}".split()
        if not (start / "summary.json").exists():
            missing = modes_of(name)  # one encoder for the whole row
            resume = (start / "checkpoint.pt").exists()
            new = [*words, *common, "--out", start, "--overwrite"]
            call([script, *(["--resume", start] if resume else new)], folder / "pretext.log")
        result["command"] = f"python {recipe} {options}"
        summary = json.loads((start / "summary.json").read_text("utf-8"))
        # From the median epoch, so that what else the machine did for a while does not count.
        result["seconds"] = epochs * summary["train_images"] / summary["images_per_second"]
    for mode in missing:
        out = folder / mode
        # Fine-tuning runs twice, with this seed and the next one: no two pretext seeds share one.
        options = f"{MODES[mode]} --seed {2 * seed if mode == 'finetune' else seed} {PRECISION}"
        words = ["train_transfer.py", start, *options.split(), *common, "--out", out, "--overwrite"]
        call(words, folder / f"{mode}.log")
        summary = next(iter(json.loads((out / "summary.json").read_text("utf-8")).values()))
        result["device"] = summary["device"]
        line = f"python train_transfer.py {'RUN' if recipe else 'scratch'} {options}"
        found = read_right(out / "predictions.csv")
        result["modes"][mode] = {"command": line, "seconds": summary["seconds"], **found}
    RESULTS.mkdir(exist_ok=True)
    write_json(result, file)
    figures = [f"{mode} {figure(result, mode, 'choose', WAYS[0]):.1%}" for mode in missing]
    print(f"{file.stem}: {', '.join(figures)}", flush=True)


def modes_of(name: str) -> list[str]:
    """How a recipe's encoder is transferred: titles of MODES."""
    return [mode for mode in MODES if mode != "finetune-x4" or name in (OURS, "scratch")]


def call(words: list, log: Path) -> None:
    """Run a script of the project with one thread, its output to `log`. Raises RunError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, *map(str, [ROOT / words[0], *words[1:]])]
    with open(log, "w") as stream:
        done = subprocess.run(line, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        why = (log.read_text("utf-8").strip().splitlines() or ["it was killed"])[-1]
        raise RunError(f"{shlex.join(line)} failed: {why} (see {log})")


def read_right(file: Path) -> dict:
    """predictions.csv -> {half: {way: [for each run, "1" or "0" of every image in the order of their paths]}}."""
    found = {half: {way: {} for way in WAYS} for half in HALVES}
    with open(file, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            parity = int(hashlib.md5(Path(row["path"]).name.encode(), usedforsecurity=False).hexdigest(), 16) % 2
            half = next(half for half, remainder in HALVES.items() if remainder == parity)
            for way in WAYS:
                found[half][way].setdefault(row["seed"], []).append(str(int(row[way] == row["class"])))
    return {half: {way: ["".join(r) for r in runs.values()] for way, runs in f.items()} for half, f in found.items()}


def rights(result: dict, mode: str, half: str, way: str) -> list[float]:
    """For every image of a half the share of runs that classified it right."""
    runs = result["modes"][mode][half][way]
    return [statistics.fmean(map(int, image)) for image in zip(*runs, strict=True)]


def figure(result: dict, mode: str, half: str, way: str) -> float:
    """Accuracy on a half, in [0, 1]: mean over the runs of one pretext seed."""
    return statistics.fmean(rights(result, mode, half, way))


def difference(ours: list[dict], theirs: list[dict], mode: str, half: str, way: str) -> tuple[float, float]:
    """Mean paired difference of the accuracies, ours - theirs, and half of its 95 % interval.

    Paired by image and by pretext seed. Images and seeds both vary, so their variances add up (which counts the noise
    of single runs twice); Student's t with the degrees of freedom of Welch and Satterthwaite, since seeds are few. With
    one seed the interval is that of the images alone.
    """
    pairs = list(zip(ours, theirs, strict=True))
    # For each seed the differences of the images.
    rows = [[a - b for a, b in zip(*(rights(r, mode, half, way) for r in pair), strict=True)] for pair in pairs]
    images = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    parts = [(statistics.variance(images) / len(images), len(images) - 1)]  # variance, degrees of freedom
    if len(rows) > 1:
        parts.append((statistics.variance(map(statistics.fmean, rows)) / len(rows), len(rows) - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / free for part, free in parts) if variance else 1
    return statistics.fmean(images), float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(variance)


def load() -> dict[tuple[str, int], list[dict]]:
    """(recipe, epochs): its results in the order of their seeds."""
    found = {}
    results = [json.loads(file.read_text("utf-8")) for file in RESULTS.glob("*.json")]
    for result in sorted(results, key=lambda result: result["seed"]):
        found.setdefault((result["name"], result["epochs"]), []).append(result)
    return found


def table(results: dict[tuple[str, int], list[dict]], half: str, brief: bool = False) -> str:
    """Markdown: a row for each recipe and number of epochs, with its figures on one half of val/ in per cent.

    A cell has the three figures, each with its standard deviation over the pretext seeds and, in brackets, its
    difference from the default after as many epochs. `brief`: these of the first figure alone; and what was learnt.
    """
    titles = ["recipe", "options", "epochs", "seeds", "encodes an image", "pretraining, s", *MODES, *["lesson"] * brief]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    order = list(RECIPES)
    for (name, epochs), runs in sorted(results.items(), key=lambda item: (item[0][1], order.index(item[0][0]))):
        # What needs no pretext is compared with the default after every number of epochs.
        others = {n: results[OURS, n] for other, n in sorted(results) if other == OURS != name and epochs in (0, n)}
        cells = []
        for mode in MODES:
            parts = [cell(runs, others, mode, half, way, plain=brief and way != WAYS[0]) for way in WAYS]
            cells.append((", " if brief else "<br>").join(filter(None, parts)))
        recipe = RECIPES[name]
        options = recipe.options
        if not epochs and others:
            options += f"; differences from {' / '.join(map(str, others))} epochs"
        seconds = f"{min(run['seconds'] for run in runs):.0f}"  # of the run that was disturbed least
        start = [name, options, str(epochs), str(len(runs)), str(recipe.encodes), seconds]
        lines.append(f"| {' | '.join([*start, *cells, *[recipe.lesson] * brief])} |")
    return "\n".join(lines)


def cell(runs: list[dict], others: dict[int, list[dict]], mode: str, half: str, way: str, plain: bool) -> str:
    """One figure of some runs, mean ± standard deviation, and its differences from `others`; `plain`: the mean alone.

    Where not all pretext seeds of the row have it, it says how many have. Empty if none has.
    """

    def seeds(part):
        return f" of {len(part)} seed{'s' * (len(part) > 1)}" if len(part) < len(runs) else ""

    done = [run for run in runs if mode in run["modes"]]
    values = [100 * figure(run, mode, half, way) for run in done]
    if plain or not done:
        return f"{statistics.fmean(values):.1f}" if done else ""
    text = f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(done) > 1 else "")
    differences = []
    for ours in others.values():
        pairs = [(a, b) for a in done for b in ours if a["seed"] == b["seed"] and mode in b["modes"]]
        if pairs:
            mean, half_width = difference(*map(list, zip(*pairs, strict=True)), mode, half, way)
            differences.append(f"{round(100 * mean, 1) + 0:+.1f} ± {100 * half_width:.1f}{seeds(pairs)}")
        else:
            differences.append("none")
    return text + seeds(done) + (f" ({' / '.join(differences)})" if differences else "")


def write_tables() -> None:
    """Replace what stands between the markers of RESULTS.md."""
    results = load()
    compared = {(name, n): runs for (name, n), runs in results.items() if name in COMPARED and n in COMPARED_EPOCHS}
    file = ROOT / "RESULTS.md"
    text = file.read_text("utf-8")
    for name, part in {"search": table(results, "choose", brief=True), "comparison": table(compared, "report")}.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        text = text[: text.index(start) + len(start)] + part + "\n" + text[text.index(end) :]
    file.write_text(text, "utf-8")


if __name__ == "__main__":
    command.run(main)
