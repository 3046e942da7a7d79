"""Find the pretext recipe that transfers best: pretrain, transfer, keep every result, tabulate.

    python benchmarks/search.py --data FOLDER                        what is left to do, one run of 30 epochs each
    python benchmarks/search.py NAME... --data FOLDER --seeds 0 1 2  the default and what it is compared with
    python benchmarks/search.py --table                              rewrite the tables of RESULTS.md and README.md

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
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import scipy.stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
HALVES = {"choose": 0, "report": 1}  # the parity of the MD5 of a file's name
EPOCHS = 30  # of the search
OURS = "ridge-batch"
COMPARED = (OURS, "scratch", "rotation", "first", "contrast", "simclr", "swav")  # in the final table
COMPARED_EPOCHS = (0, 30, 100)  # 0: no pretext
MODES = {  # title: options of train_transfer.py
    "linear": "--mode linear",
    "knn": "--mode knn",
    "finetune": "--mode finetune --epochs 5 --runs 2",
    "finetune-x4": "--mode finetune --epochs 20",  # so that nobody calls scratch starved; of OURS and scratch
}
WAYS = ("accuracy", "accuracy_val_classes", "accuracy_uncorrected")

BATCH = "train_pretext.py --decoder cosine --candidates batch"
RIDGE = "train_pretext.py --decoder ridge --candidates batch --symmetric"
RECIPES = {  # name: (encodes an image, command; None: from scratch, what it taught)
    "scratch": (0, None, "what an untrained encoder is worth"),
    "rotation": (1, "train_pretext.py --task rotate", "hardly more than no pretext at all"),
    "first": (
        2,
        "train_pretext.py --no-views --candidates 3",
        "the pixels give the answer away: solved perfectly, and worth nothing",
    ),
    "no-views": (2, "train_pretext.py --no-views", ""),
    "three": (2, "train_pretext.py --candidates 3", ""),
    "ridge-8": (2, "train_pretext.py --decoder ridge --candidates 8", ""),
    "cosine-batch": (2, f"{BATCH} --no-symmetric", ""),
    "ridge-batch": (2, RIDGE, "the default; 45 epochs cost as many encodes as 30 of contrast"),
    "symmetric": (
        2,
        f"{BATCH} --symmetric",
        "the cosine in place of ridge: level, at the same two encodes",
    ),
    "pure-50": (2, f"{BATCH} --symmetric --pure 0.5", "half of the mixtures pure: nothing gained under the cosine"),
    "hidden": (
        2,
        f"{BATCH} --symmetric --hidden 512",
        "an MLP as projection, as SimCLR has: no different within the noise",
    ),
    "hidden-pure-50": (
        2,
        f"{BATCH} --symmetric --hidden 512 --pure 0.5",
        "half of the mixtures pure: no different within the noise",
    ),
    "contrast": (
        3,
        f"{BATCH} --symmetric --contrast",
        "every view unmixed as well, at three encodes: ahead after 30 epochs, within the noise after 100",
    ),
    "regions": (2, f"{RIDGE} --regions 0.5", "half of the mixtures pasted, not blended: no different within the noise"),
    "ridge-pure-50": (2, f"{RIDGE} --pure 0.5", "half of the mixtures pure: no different within the noise"),
    "ridge-hidden": (2, f"{RIDGE} --hidden 512", "an MLP as projection: no better after 100 epochs either"),
    "ridge-hidden-pure-50": (2, f"{RIDGE} --hidden 512 --pure 0.5", "half of the mixtures pure with it: no better"),
    "ridge-contrast": (
        3,
        f"{RIDGE} --contrast",
        "under the ridge, every view unmixed as well may help the linear probe, at three encodes",
    ),
    "ridge-pure-50-crop-15": (
        2,
        f"{RIDGE} --pure 0.5 --crop 0.15",
        "crops down to 15 % in place of 30 %: no different",
    ),
    "simclr-crop-15": (
        2,
        "benchmarks/peers.py simclr --crop 0.15",
        "no different for SimCLR either, so the views stay as they are",
    ),
    "momentum": (
        3,
        f"{RIDGE} --contrast --momentum 0.99",
        "candidates encoded by a moving average, without gradient: no better",
    ),
    "cosine-momentum": (
        3,
        f"{BATCH} --symmetric --contrast --momentum 0.99",
        "the same under the cosine: no better",
    ),
    "t-0.5": (2, f"{BATCH} --symmetric --temperature 0.5", "a fixed temperature, not the learned one: no better"),
    "t-0.2": (2, f"{BATCH} --symmetric --temperature 0.2", "the same: no better"),
    "t-0.1": (2, f"{BATCH} --symmetric --temperature 0.1", ""),
    "beta-0.4": (2, f"{RIDGE} --beta 0.4", "weights nearer to 0 and 1: no different within the noise"),
    "sources-3": (2, f"{RIDGE} --sources 3", "three images in a mixture: no different within the noise"),
    "batch-128": (
        2,
        f"{RIDGE} --batch-size 128",
        "twice the batch, in half as many steps, at the same learning rate: no different within the noise",
    ),
    "simclr-t0.2": (2, "benchmarks/peers.py simclr --temperature 0.2", ""),
    "swav-64": (
        2,
        "benchmarks/peers.py swav --prototypes 64",
        "64 prototypes, as many as images in a batch",
    ),
    "simclr": (2, "benchmarks/peers.py simclr", "what there is to beat"),
    "swav": (2, "benchmarks/peers.py swav", "512 prototypes: no different from 64 within the noise"),
}


def main() -> None:
    """Parse, then run what is left to do or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--data", help="folder with train/CLASS, val/CLASS and unsup/")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of pretraining")
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
        jobs = [(name, seed) for seed in args.seeds for name in args.names or RECIPES]
        with ThreadPoolExecutor(args.workers) as pool:
            try:
                for done in [pool.submit(experiment, args, *job) for job in jobs]:
                    done.result()
            except BaseException:  # what has not begun need not
                pool.shutdown(cancel_futures=True)
                raise
    if load():
        write_tables()


def experiment(args: argparse.Namespace, name: str, seed: int) -> None:
    """Pretrain and transfer one recipe with one seed, as far as its results are not there."""
    encodes, recipe, _ = RECIPES[name]
    epochs = args.epochs if recipe else 0
    file = RESULTS / f"{name}-{epochs}-{seed}.json"
    folder = args.runs / file.stem
    result = {"name": name, "epochs": epochs, "seed": seed, "encodes": encodes, "seconds": 0.0, "modes": {}}
    if file.exists():
        result |= json.loads(file.read_text())
    missing = [mode for mode in modes_of(name) if mode not in result["modes"]]
    if not missing:
        return
    common = ["--data", args.data, "--data-dir", args.runs]
    start = "scratch"
    if recipe:
        start, words = folder / "pretext", [*recipe.split(), "--epochs", epochs]
        if not (start / "summary.json").exists():
            missing = modes_of(name)  # all of a row is of one encoder
            stopped = (start / "checkpoint.pt").exists()
            new = [*words[1:], *common, "--seed", seed, "--out", start, "--overwrite"]
            rest = ["--resume", start] if stopped else new
            call([words[0], *rest], folder / "pretext.log")
        result["command"] = f"python {recipe} --epochs {epochs} --seed {seed}"
        summary = json.loads((start / "summary.json").read_text())
        # From the median epoch, so that what else the machine did for a while does not count.
        result["seconds"] = epochs * summary["train_images"] / summary["images_per_second"]
    for mode in missing:
        out = folder / mode
        # The runs of fine-tuning have seeds of their own: from scratch, those of two pretext seeds would be the same.
        options = [*MODES[mode].split(), "--seed", str(2 * seed if mode == "finetune" else seed)]
        call(["train_transfer.py", start, *options, *common, "--out", out, "--overwrite"], folder / f"{mode}.log")
        summary = next(iter(json.loads((out / "summary.json").read_text()).values()))
        result["device"] = summary["device"]
        command = f"python train_transfer.py {'RUN' if recipe else 'scratch'} {' '.join(options)}"
        found = read_right(out / "predictions.csv")
        result["modes"][mode] = {"command": command, "seconds": summary["seconds"], **found}
    RESULTS.mkdir(exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, file)
    said = [f"{mode} {figure(result, mode, 'choose', WAYS[1]):.1%}" for mode in missing]
    print(f"{file.stem}: {', '.join(said)}", flush=True)


def modes_of(name: str) -> list[str]:
    """How a recipe's encoder is transferred."""
    return [mode for mode in MODES if mode != "finetune-x4" or name in (OURS, "scratch")]


def call(words: list, log: Path) -> None:
    """Run a script of the project with one thread, its output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / words[0], *words[1:]]
    with open(log, "w") as stream:
        done = subprocess.run(
            list(map(str, command)),
            stdout=stream,
            stderr=stream,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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


def difference(ours: list[dict], theirs: list[dict], mode: str, half: str, way: str) -> tuple[float, float]:
    """Mean paired difference of the accuracies, and half of its 95 % interval.

    Paired by image and by pretext seed. Images and seeds both vary, so their variances add up (which counts the noise
    of single runs twice); Student's t with the degrees of freedom of Welch and Satterthwaite, since seeds are few. With
    one seed the interval is that of the images alone.
    """
    pairs = list(zip(ours, theirs, strict=True))
    rows = [
        [a - b for a, b in zip(*(rights(r, mode, half, way) for r in pair), strict=True)] for pair in pairs
    ]  # seeds, images
    images = [statistics.mean(column) for column in zip(*rows, strict=True)]
    parts = [(statistics.variance(images) / len(images), len(images) - 1)]  # variance, degrees of freedom
    if len(rows) > 1:
        parts.append((statistics.variance(map(statistics.mean, rows)) / len(rows), len(rows) - 1))
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / free for part, free in parts) if variance else 1
    return statistics.mean(images), float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(variance)


def load() -> dict[tuple[str, int], list[dict]]:
    """(recipe, epochs): its results in the order of their seeds."""
    found = {}
    results = [json.loads(file.read_text()) for file in RESULTS.glob("*.json")]
    for result in sorted(results, key=lambda result: result["seed"]):
        found.setdefault((result["name"], result["epochs"]), []).append(result)
    return found


def table(results: dict[tuple[str, int], list[dict]], half: str, lessons: bool = False) -> str:
    """Markdown: per cent right on one half of val/, over its classes and, in brackets, over all, corrected and not."""
    titles = ["recipe", "epochs", "pretext seeds", "encodes an image", "seconds", *MODES]
    titles += ["what it taught"] * lessons
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (name, epochs), runs in ordered(results):
        cells = []
        for mode in MODES:
            done = [run for run in runs if mode in run["modes"]]
            over, within, plain = ([100 * figure(run, mode, half, way) for run in done] for way in WAYS)
            spread = f" ± {statistics.stdev(within):.1f}" if len(done) > 1 else ""
            others = ", ".join(f"{statistics.mean(values):.1f}" for values in (over, plain)) if done else ""
            cells.append(f"{statistics.mean(within):.1f}{spread} ({others}){of(done, runs)}" if done else "")
        encodes, command, lesson = RECIPES[name]
        said = f"{name}: `{command}`" if command else f"{name}: no pretext"
        seconds = f"{min(run['seconds'] for run in runs):.0f}"  # of the run that was disturbed least
        cells = [said, str(epochs), str(len(runs)), str(encodes), seconds, *cells, *[lesson] * lessons]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(results: dict[tuple[str, int], list[dict]], half: str, way: str = "accuracy_val_classes") -> str:
    """Markdown: how far OURS is ahead of the others in one figure, with 95 % intervals."""
    titles = [f"{OURS} ahead of", "epochs", "pretext seeds", *MODES]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    trials = ordered(results)
    for epochs, ours in [(epochs, runs) for (name, epochs), runs in trials if name == OURS]:
        for name, theirs in [(name, runs) for (name, trained), runs in trials if trained in (0, epochs)]:
            pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"]]
            if name == OURS or not pairs:
                continue
            cells = []
            for mode in MODES:
                done = [pair for pair in pairs if all(mode in result["modes"] for result in pair)]
                if done:
                    mean, half_width = difference(*map(list, zip(*done, strict=True)), mode, half, way)
                cells.append(f"{100 * mean:+.1f} ± {100 * half_width:.1f}{of(done, pairs)}" if done else "")
            lines.append(f"| {name} | {epochs} | {len(pairs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of(done: list, runs: list) -> str:
    """What a cell says where not every pretext seed has it."""
    return f", {len(done)} of the seeds" if len(done) < len(runs) else ""


def ordered(results: dict[tuple[str, int], list[dict]]) -> list[tuple[tuple[str, int], list[dict]]]:
    """By epochs, then in the order of RECIPES."""
    order = list(RECIPES)
    return sorted(results.items(), key=lambda item: (item[0][1], order.index(item[0][0])))


def write_tables() -> None:
    """Replace what stands between the markers of RESULTS.md and README.md."""
    results = load()
    final = {(name, n): runs for (name, n), runs in results.items() if name in COMPARED and n in COMPARED_EPOCHS}
    parts = {
        "search": table(results, "choose", lessons=True),
        "final": table(final, "report"),
        "search differences": differences(results, "choose"),
        "differences": differences(final, "report"),
        "differences over all": differences(final, "report", "accuracy"),
        "differences uncorrected": differences(final, "report", "accuracy_uncorrected"),
    }
    for file in (ROOT / "RESULTS.md", ROOT / "README.md"):
        text = file.read_text()
        for name, part in parts.items():
            start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            if start in text:
                text = text[: text.index(start) + len(start)] + part + "\n" + text[text.index(end) :]
        file.write_text(text)


if __name__ == "__main__":
    main()
