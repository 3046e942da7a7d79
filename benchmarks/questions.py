"""How well does a pretext run answer questions with other numbers of candidates?

    python benchmarks/questions.py runs/NAME            sources named right, weight error, loss; beside a guess's loss

The run's validation question (two sources, weights from 0.1 to 0.9, in another view unless it has --no-views) with
2 to 64 candidates: means over ten draws of the question about the run's validation images.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import get_dataloaders, open_pretext
from engine import Trainer, choose_device, device_name
from harness import command
from harness.errors import UsageError
from tasks import MixupTransform
from unmix import open_run

NUMBERS = (2, 3, 5, 8, 16, 64)
DRAWS = 10


def main() -> None:
    """Ask, and print a table in Markdown."""
    parser = command.Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="the folder of a pretext run")
    args = parser.parse_args()
    model, settings = open_run(args.run)
    device = choose_device()
    images, train, val = open_pretext(settings["data"], settings["size"], settings["data_dir"], settings["batch_size"])
    if len(val) < NUMBERS[1]:
        raise UsageError(f"{args.run} has {len(val)} validation images, too few for {NUMBERS[1]} candidates")
    _, loader = get_dataloaders(images, train, val, settings["batch_size"], 0, device)
    trainer = Trainer(model, None, lr=1.0, steps=1, device=device)
    like_the_run = MixupTransform(**{name: settings[name] for name in ("views", "size", "activation")})
    print(f"{DRAWS} draws of the question about {len(val)} images, {device_name(device)}, torch {torch.__version__}\n")
    print("| candidates | sources named right | weight error | loss | loss of a guess |\n|---|---|---|---|---|")
    for n in [n for n in NUMBERS if n <= min(block.stop - block.start for block in loader.batch_sampler)]:
        task = like_the_run.validation(n)
        draws = range(DRAWS)
        scores = [trainer.evaluate(loader, task, draw=draw) for draw in draws]
        guesses = [trainer.evaluate(loader, task, task.baselines()["chance"], draw=draw)["loss"] for draw in draws]
        mean = {name: statistics.mean(score[name] for score in scores) for name in scores[0]}
        spread = statistics.stdev(score["source_accuracy"] for score in scores)
        right = f"{mean['source_accuracy']:.1%} ± {100 * spread:.1f}"
        print(f"| {n} | {right} | {mean['weight_mae']:.3f} | {mean['loss']:.3f} | {statistics.mean(guesses):.3f} |")


if __name__ == "__main__":
    command.run(main)
