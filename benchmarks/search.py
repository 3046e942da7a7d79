"""Find the pretext recipe that transfers best: pretrain, transfer, keep every result, tabulate.

    python benchmarks/search.py --data FOLDER                        what is left to do, one run of 30 epochs each
    python benchmarks/search.py --data FOLDER --epochs 100 --seeds 0 1 2 NAME...
    python benchmarks/search.py --table                              rewrite the tables of RESULTS.md

A finished run leaves one file in benchmarks/results/; what is there is not done again, so this can be stopped and
continued. Recipes are chosen on one half of val/, the files whose name's MD5 is even, and reported on the other.
"""

import argparse
import csv
import hashlib
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

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HALVES = {"choose": 0, "report": 1}  # the parity of the MD5 of a file's name
MODES = {"linear": "", "knn": "", "finetune": "--epochs 5 --runs 2"}
WAYS = ("accuracy", "accuracy_val_classes", "accuracy_uncorrected")

BATCH = "train_pretext.py --decoder cosine --candidates batch"
RECIPES = {  # name: (encodes an image, command; None: from scratch)
    "scratch": (0, None),
    "rotation": (1, "train_pretext.py --task rotate"),
    "first": (2, "train_pretext.py --no-views --candidates 3"),
    "ridge-8": (2, "train_pretext.py --decoder ridge --candidates 8"),
    "cosine-batch": (2, BATCH),
    "ridge-batch": (2, "train_pretext.py --decoder ridge --candidates batch --symmetric"),
    "symmetric": (2, f"{BATCH} --symmetric"),
    "pure-50": (2, f"{BATCH} --symmetric --pure 0.5"),
    "hidden": (2, f"{BATCH} --symmetric --hidden 512"),
    "hidden-pure-50": (2, f"{BATCH} --symmetric --hidden 512 --pure 0.5"),
    "contrast": (3, f"{BATCH} --symmetric --contrast"),
    "regions": (2, f"{BATCH} --symmetric --regions 0.5"),
    "crop-15": (2, f"UNMIX_CROP=0.15 {BATCH} --symmetric"),
    "crop-50": (2, f"UNMIX_CROP=0.5 {BATCH} --symmetric"),
    "t-0.2": (2, f"UNMIX_T=0.2 {BATCH} --symmetric"),
    "t-0.1": (2, f"UNMIX_T=0.1 {BATCH} --symmetric"),
    "beta-0.4": (2, f"{BATCH} --symmetric --beta 0.4"),
    "sources-3": (2, f"{BATCH} --symmetric --sources 3"),
    "batch-128": (2, f"{BATCH} --symmetric --batch-size 128"),
    "simclr-t0.2": (2, "benchmarks/peers.py simclr --temperature 0.2"),
    "swav-64": (2, "benchmarks/peers.py swav --prototypes 64"),
    "simclr": (2, "benchmarks/peers.py simclr"),
    "swav": (2, "benchmarks/peers.py swav"),
}


def main() -> None:
    """Parse, then run what is left to do or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--data", help="folder with train/CLASS, val/CLASS and unsup/")
    parser.add_argument("--epochs", type=int, default=30, help="of pretraining")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs", "search"), help="folder for the runs")
    parser.add_argument("--table", action="store_true", help="write the tables, run nothing")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(RECIPES))
    if unknown:
        parser.error(f"{unknown[0]} is no recipe: use {', '.join(RECIPES)}")
    if not args.table:
        if not args.data:
            parser.error("--data FOLDER is needed")
        todo = [(name, seed) for seed in args.seeds for name in args.names or RECIPES]
        with ThreadPoolExecutor(args.workers) as pool:
            for done in [pool.submit(experiment, args, *job) for job in todo]:
                done.result()
    print(table())


def experiment(args: argparse.Namespace, name: str, seed: int) -> None:
    """Pretrain and transfer one recipe with one seed, unless its result is there."""
    file = RESULTS / f"{name}-{args.epochs}-{seed}.json"
    if file.exists():
        return
    folder, common = args.runs / file.stem, ["--seed", seed, "--data-dir", args.runs]
    encodes, recipe = RECIPES[name]
    result = {"name": name, "epochs": args.epochs, "seed": seed, "encodes": encodes, "commands": [], "modes": {}}
    if recipe is None:
        start, result["seconds"] = "scratch", 0.0
    else:
        start = folder / "pretext"
        pretext = [*recipe.split(), "--epochs", args.epochs, "--data", args.data, *common, "--out", start]
        if not (start / "summary.json").exists():
            call([*pretext, "--overwrite"], folder / "pretext.log")
        result["commands"].append(f"python {recipe} --epochs {args.epochs} --seed {seed}")
        result["seconds"] = json.loads((start / "summary.json").read_text())["seconds"]
    for mode, options in MODES.items():
        out = folder / mode
        words = ["train_transfer.py", start, "--mode", mode, *options.split()]
        call([*words, "--data", args.data, *common, "--out", out, "--overwrite"], folder / f"{mode}.log")
        result["commands"].append(
            f"python train_transfer.py RUN --mode {mode} {options} --seed {seed}".replace("  ", " ")
        )
        summary = next(iter(json.loads((out / "summary.json").read_text()).values()))
        result["device"] = summary["device"]
        result["modes"][mode] = {"seconds": summary["seconds"], **read_right(out / "predictions.csv")}
    RESULTS.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, file)
    shutil.rmtree(folder / "finetune", ignore_errors=True)
    print(f"{file.stem}: " + ", ".join(f"{m} {figure(result, m, 'choose', WAYS[1]):.1%}" for m in MODES), flush=True)


def call(words: list, log: Path) -> None:
    """Run a script of the project with one thread, its output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = [w for w in map(str, words) if w.startswith("UNMIX_")]
    words = [w for w in words if w not in env]
    command = [sys.executable, ROOT / words[0], *words[1:]]
    with open(log, "w") as stream:
        done = subprocess.run(
            list(map(str, command)),
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1", **dict(e.split("=") for e in env)},
        )
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))} failed:\n{log.read_text()[-2000:]}")


def read_right(file: Path) -> dict:
    """predictions.csv -> {half: {way: [for each run, "1" or "0" of every image in the order of their paths]}}."""
    found = {half: {way: {} for way in WAYS} for half in HALVES}
    with open(file, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            parity = int(hashlib.md5(Path(row["path"]).name.encode()).hexdigest(), 16) % 2
            half = next(half for half, remainder in HALVES.items() if remainder == parity)
            for way in WAYS:
                found[half][way].setdefault(row["seed"], []).append(str(int(row[way] == row["class"])))
    return {half: {way: ["".join(r) for r in runs.values()] for way, runs in f.items()} for half, f in found.items()}


def rights(result: dict, mode: str, half: str, way: str) -> list[float]:
    """For every image of a half the share of runs that classified it right."""
    runs = result["modes"][mode][half][way]
    return [statistics.mean(map(int, image)) for image in zip(*runs, strict=True)]


def figure(result: dict, mode: str, half: str, way: str) -> float:
    """Accuracy on a half, mean over the runs of one pretext seed."""
    return statistics.mean(rights(result, mode, half, way))


def difference(ours: list[dict], theirs: list[dict], mode: str, half: str) -> tuple[float, float]:
    """Mean paired difference of the accuracies over the classes of val/, and half of its 95 % interval.

    Paired by image and by pretext seed. Images and seeds both vary, so their variances add up (a normal approximation
    that counts the noise of single runs twice, so it is on the wide side).
    """
    pairs = list(zip(ours, theirs, strict=True))
    rows = [
        [a - b for a, b in zip(*(rights(r, mode, half, WAYS[1]) for r in pair), strict=True)] for pair in pairs
    ]  # seeds, images
    images = [statistics.mean(column) for column in zip(*rows, strict=True)]
    variance = statistics.variance(images) / len(images)
    if len(rows) > 1:
        variance += statistics.variance(map(statistics.mean, rows)) / len(rows)
    return statistics.mean(images), 1.96 * math.sqrt(variance)


def load() -> dict[tuple[str, int], list[dict]]:
    """(recipe, epochs): its results in the order of their seeds."""
    found = {}
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        found.setdefault((result["name"], result["epochs"]), []).append(result)
    return found


def table(half: str = "choose") -> str:
    """All results on one half, in per cent: over the classes of val/ and, in brackets, over all classes."""
    lines = [f"{'recipe':24} epochs seeds encodes  seconds" + "".join(f"{m:>22}" for m in MODES)]
    for (name, epochs), results in sorted(
        load().items(), key=lambda item: (item[0][1], list(RECIPES).index(item[0][0]))
    ):
        cells = []
        for mode in MODES:
            within, over = ([figure(r, mode, half, way) for r in results] for way in WAYS[1::-1])
            spread = f" ± {100 * statistics.stdev(within):.1f}" if len(results) > 1 else ""
            cells.append(f"{100 * statistics.mean(within):.1f}{spread} ({100 * statistics.mean(over):.1f})")
        seconds = statistics.mean(r["seconds"] for r in results)
        lines.append(
            f"{name:24} {epochs:6} {len(results):5} {results[0]['encodes']:7} {seconds:8.0f}"
            + "".join(f"{cell:>22}" for cell in cells)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
