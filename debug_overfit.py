"""Why does the network not learn? A ladder of checks, from the cheapest to the whole task overfit on a few examples.

    python debug_overfit.py --own my_setup.py              a network of your own: docs/debugging.md
    python debug_overfit.py --n 8                          the ladder of this project's networks
    python debug_overfit.py --decoder dot --loss mse       with other parts: a pair that never learns
    python debug_overfit.py --encoder resnet18             with a network of torchvision

Exit status 0 if no check fails, 1 if one does: it is explained, and the ladder ends there. 2 is wrong use."""

import argparse
import contextlib
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from augment import generator
from checks import FAILED, LIBRARY, climb, diagnose, report
from data import get_dataloaders, open_pretext
from engine import DEVICES, Trainer, choose_device, device_name
from harness import command, folder
from harness.download import ARCHIVES
from harness.errors import UsageError, ValueProblem, describe
from harness.files import write_json
from harness.log import Log
from ladder import CHECKS, Subject
from models import DECODERS, build_model
from tasks import ACTIVATIONS, LOSSES, TASKS, MixupTransform, settings_of


def parse() -> argparse.Namespace:
    """The command line -> settings. Raises UsageError if they make no sense."""
    integer, switch = command.integer, argparse.BooleanOptionalAction
    parser = command.Parser(__doc__)
    parser.add_argument("--n", type=integer(3, 1024), default=8, help="examples to overfit")
    parser.add_argument("--own", metavar="FILE", type=command.place, help="your own setup() (default: this project's)")
    add = parser.add_argument_group("images").add_argument
    names = ", ".join(ARCHIVES)
    add("--data", type=command.place, default="photos", help=f"`photos` (bundled), a folder, or {names}: fetched")
    add("--data-dir", type=command.place, default="data", help="folder for data sets by name, and for decoded images")
    add("--size", type=integer(8, 1024), default=32, help="side of a view, px")
    add = parser.add_argument_group("question").add_argument
    add("--task", choices=TASKS, default="mixup", help="`mixup`: how much of each image is in it? others: see tasks.py")
    add("--candidates", type=integer(2, word="batch"), default=3, help="how many, or `batch`: all examples")
    add("--sources", type=integer(2), default=2, help="images in a mixture")
    add("--views", action=switch, default=True, help="candidates show another crop, flip and colour than was mixed")
    add("--activation", choices=ACTIVATIONS, default="softmax", help="weights as a distribution, or each by itself")
    add("--loss", choices=LOSSES, default="kl", help="cross-entropy less the truth's own entropy, or squared error")
    add = parser.add_argument_group("network").add_argument
    add("--encoder", default="conv", help="conv, or a classification network of torchvision by name")
    add("--decoder", choices=DECODERS, default="ridge", help="what compares mixture and candidates")
    add = parser.add_argument_group("training").add_argument
    add("--lr", type=command.rate, default=1e-3, help="peak learning rate of AdamW")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="fixes all that is random")
    add("--device", choices=DEVICES, default="auto", help="where to compute; auto: a CUDA GPU, or where --own puts it")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=command.place, help="the run's folder (default: runs/debug-DATA-ENCODER-TIME)")
    add("--overwrite", action="store_true", help="replace the run that --out holds")
    args = parser.parse_args()
    if args.own:
        parser.refuse(vars(args).keys() - {"own", "n", "seed", "device"}, "is not for --own; use --n, --seed, --device")
    if args.candidates == "batch":
        args.candidates = args.n  # the examples are the batch
    return args


def assemble(args: argparse.Namespace) -> Subject:
    """The pieces of a training run on the first n of the shuffled images, with the parts that the options choose."""
    device = choose_device(args.device)

    def make_task(name, views=None):
        settings = vars(args) | ({} if views is None else {"views": views})
        return TASKS[name](**{setting: settings[setting] for setting in settings_of(name) & settings.keys()})

    for name in ("mixup", args.task):  # most of the checks ask about mixtures, whatever the task
        if isinstance(make_task(name), MixupTransform) and args.candidates > args.n:
            raise UsageError(f"--candidates {args.candidates} is more than --n {args.n} has; change one of them")

    def make_model(classes=None):
        torch.manual_seed(args.seed)
        return build_model(args.encoder, args.decoder, args.size, classes).to(device)

    def make_trainer(model, task, steps):
        return Trainer(model, task, lr=args.lr, steps=steps, seed=args.seed, device=device)

    make_model()  # an impossible encoder is refused before anything is decoded
    images, train, val = open_pretext(args.data, args.size, args.data_dir, 2)
    for warning in images.warn_of_skipped().values():
        print(f"warning: {warning}")
    if len(train) < args.n:
        raise ValueProblem("n", args.n, f"is more than the {len(train)} images to train on; use {len(train)} or less")
    loaders = get_dataloaders(images, train, val, min(max(64, args.n), len(train)), args.seed)
    rows = [train[i] for i in torch.randperm(len(train), generator=generator(args.seed))[: args.n]]
    pixels = torch.from_numpy(images.pixels[rows]).to(device)
    return Subject(images, train, val, *loaders, pixels, args.task, make_task, make_model, make_trainer, args.seed)


def own_setup(file: str) -> Callable:
    """The function setup() of somebody's file. Raises UsageError if there is none."""
    sys.dont_write_bytecode = True  # nothing is left beside the file
    sys.path.insert(0, str(Path(file).resolve().parent))
    if not Path(file).is_file():
        raise UsageError(f"--own {file}: no such file")
    for name in {f.stem for f in Path(__file__).parent.glob("*.py")} & {f.stem for f in Path(sys.path[0]).iterdir()}:
        sys.modules.pop(name, None)  # somebody has a models.py, too
    try:
        found = runpy.run_path(file)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--own {file} gives no setup(): {describe(error, (*LIBRARY, __file__))}") from error
    if "setup" not in found:
        raise UsageError(f"--own {file} gives no setup(): it has none")
    return found["setup"]


def main() -> int:
    """Climb the ladder. Returns the exit status: 0 if no check fails, else 1."""
    args = parse()
    if args.own:
        device = None if args.device == "auto" else choose_device(args.device)  # where setup() puts it
        results = diagnose(own_setup(args.own), args.n, args.seed, device)
        return int(any(result.status == FAILED for result in results.values()))
    place = folder.choose(args, "debug")
    subject = assemble(args)
    folder.make(place, args, device_name(choose_device(args.device)))
    found = []
    with contextlib.closing(Log(place)) as subject.log:
        report((found.append(step) or step for step in climb(CHECKS, subject)), list(CHECKS))
    rows = [{"check": n, "status": r.status, "figure": r.figure, "seconds": seconds} for _, n, r, seconds in found]
    write_json({"checks": rows, "seconds": sum(row["seconds"] for row in rows)}, place / "summary.json")
    print(f"curves   tensorboard --logdir {shlex.quote(str(place.parent))}")
    return int(any(row["status"] == FAILED for row in rows))


if __name__ == "__main__":
    command.run(main)
