"""The command lines' options, and the task that they describe."""

import argparse
import copy
import math
from collections.abc import Callable

from augment import CROP
from download import ARCHIVES
from engine import AMP, DEVICES
from errors import UsageError
from models import DECODERS, ENCODERS
from tasks import ACTIVATIONS, LOSSES, TASKS, LabelTask, MixupTransform, WeightTask, build_task

MIXING = ("pure", "symmetric", "regions", "contrast", "beta", "crop")
CANDIDATES, DECODER = "batch", "ridge"  # of the default recipe
SCALES = 3  # candidates of --task scale


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help shows every default."""

    def __init__(self, description: str, examples: str = ""):
        super().__init__(
            description=description, epilog=examples, formatter_class=_Help, allow_abbrev=False, add_help=True
        )

    def error(self, message):
        """One line, in place of argparse's usage."""
        raise UsageError(f"{message} (see --help)")

    def given(self) -> set[str]:
        """The options that are really on the command line."""
        parser = copy.copy(self)
        parser._actions = [copy.copy(action) for action in self._actions]
        parser._defaults = {}
        for action in parser._actions:
            action.default = argparse.SUPPRESS
        return set(vars(parser.parse_args()))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if "(default:" in action.help else super()._get_help_string(action)


def whole(at_least: int, at_most: int = 10**9) -> Callable[[str], int]:
    """An option's type: a whole number in a range."""

    def parse(text):
        if not text.lstrip("+-").isdecimal() or not at_least <= int(text) <= at_most:
            upper = f" to {at_most}" if at_most < 10**9 else " or more"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {at_least}{upper}")
        return int(text)

    return parse


def _number(what: str, fits: Callable[[float], bool], hint: str) -> Callable[[str], float]:
    """An option's type: a number that fits."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}: give {hint}")
        return value

    return parse


def place(text: str) -> str:
    """An option's type: a file, a folder or a name, which an unset variable of the shell is not."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


rate = _number("a learning rate", lambda value: 0 < value < 1e3, "a number above 0, such as 1e-3")
positive = _number("above 0", lambda value: 0 < value < 1e3, "a number such as 0.5")
crop = _number("a share", lambda value: 0.01 <= value <= 1, "a number from 0.01 to 1")
share = _number("a share", lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _candidates(text: str) -> int | str:
    """An option's type: a number of candidates, or `batch`."""
    if text == "batch":
        return text
    try:
        return whole(2)(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of candidates: give 2 or more, or `batch` for every image of the batch"
        ) from None


def add_data_options(parser: Parser) -> None:
    """--data, --data-dir, --size."""
    group = parser.add_argument_group("images")
    names = ", ".join(ARCHIVES)
    group.add_argument(
        "--data", type=place, default="photos", help=f"`photos` (bundled), a folder of images, or {names}: fetched"
    )
    add_data_dir(group)
    group.add_argument("--size", type=whole(8, 1024), default=32, help="side of a view, px")


def add_data_dir(group: argparse._ArgumentGroup) -> None:
    """--data-dir."""
    group.add_argument(
        "--data-dir", type=place, default="data", help="folder for data sets by name, and for decoded images"
    )


def add_task_options(parser: Parser, candidates: int | None = None) -> None:
    """--task, --candidates, --sources, --views, --activation, --loss."""
    group = parser.add_argument_group("question")
    group.add_argument(
        "--task",
        choices=TASKS,
        default="mixup",
        help="how much of each image is in the mixture; or easier ones, and `rotate`, to compare with",
    )
    said = "" if candidates else f" (default: {CANDIDATES}; `--task scale`: {SCALES})"
    group.add_argument(
        "--candidates",
        type=_candidates,
        default=candidates,
        help=f"images to choose from; `batch`: all of the batch{said}",
    )
    group.add_argument("--sources", type=whole(2), default=2, help="images in a mixture")
    group.add_argument(
        "--views",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask about another view (crop, flip, colour) than the one that was mixed",
    )
    group.add_argument(
        "--activation", choices=ACTIVATIONS, default="softmax", help="weights as a distribution, or each by itself"
    )
    group.add_argument("--loss", choices=LOSSES, default="kl", help="cross-entropy less its floor, or squared error")


def add_recipe_options(parser: Parser) -> None:
    """--symmetric, --contrast, --pure, --regions, --beta, --hidden, --temperature, --crop."""
    group = parser.add_argument_group("recipe", "what benchmarks/search.py varies; see RESULTS.md")
    batch = "with `--candidates batch`: "
    group.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        help=f"{batch}ask also how much of each mixture comes from a candidate (default: it does)",
    )
    group.add_argument("--contrast", action="store_true", help=f"{batch}ask about every view unmixed as well")
    group.add_argument("--pure", type=share, default=0.0, help="share of the mixtures that hold one image alone")
    group.add_argument("--regions", type=share, default=0.0, help="share of the mixtures that are pasted, not blended")
    group.add_argument("--beta", type=positive, help="weights from Beta(b, b) (default: uniform)")
    group.add_argument("--hidden", type=whole(0), default=0, help="width of the projection's hidden layer; 0: linear")
    group.add_argument("--temperature", type=positive, help="of `--decoder cosine` (default: learned)")
    group.add_argument(
        "--momentum", type=share, default=0.0, help="what is asked about is encoded by the encoder's moving average"
    )
    add_crop(group)


def add_crop(group: argparse._ArgumentGroup) -> None:
    """--crop."""
    group.add_argument(
        "--crop", type=crop, default=CROP, help="smallest share of an image in a view, give or take its aspect"
    )


def make_task(args: argparse.Namespace, batch: int, batch_name: str) -> WeightTask | LabelTask:
    """The task that the options describe; writes the number of candidates into them where it is the default.

    Raises UsageError where a batch of `batch` images is too small for it.
    """
    if args.candidates is None:
        args.candidates = SCALES if args.task == "scale" else CANDIDATES
    mixing = {name: vars(args)[name] for name in MIXING if name in vars(args)}
    task = build_task(
        args.task, args.candidates, args.sources, args.views, args.size, args.activation, args.loss, **mixing
    )
    if isinstance(task, MixupTransform):
        name, needed = ("sources", task.sources) if task.candidates == "batch" else ("candidates", task.candidates)
        if needed > batch:
            raise UsageError(f"--{name} {needed} is more than {batch_name} {batch} has; change one of them")
    return task


def refuse_unused(parser: Parser, task: str) -> None:
    """Raises UsageError where an option is given that this task has no use for."""
    unmixing = {"candidates", "sources", "views", "activation", "loss", "decoder", "hidden", "temperature", "momentum"}
    unused = {
        "duplicate": {"sources", "pure", "beta"},
        "scale": {"sources", "views", *MIXING},
        "quadrant": {*unmixing, *MIXING},
        "rotate": {*unmixing, *MIXING} - {"crop"},
    }
    refuse(parser, unused.get(task, set()), f"is given, and --task {task} has no use for it; leave one of them out")


def refuse(parser: Parser, names: set[str], why: str) -> None:
    """Raises UsageError where one of these options is really on the command line."""
    for name in sorted(parser.given() & names):
        raise UsageError(f"--{name.replace('_', '-')} {why}")


def add_model_options(parser: Parser) -> argparse._ArgumentGroup:
    """--encoder, --decoder. Returns their group."""
    group = parser.add_argument_group("network")
    group.add_argument("--encoder", choices=ENCODERS, default="conv", help="what is kept")
    group.add_argument("--decoder", choices=DECODERS, default=DECODER, help="what compares mixture and candidate")
    return group


def add_loop_options(parser: Parser) -> argparse._ArgumentGroup:
    """--lr, --seed, --device, --amp. Returns their group, for what only one script has."""
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=rate, default=1e-3, help="peak learning rate of AdamW")
    group.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="fixes all that is random")
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute")
    group.add_argument(
        "--amp", choices=AMP, default="auto", help="bf16; auto: where the device has instructions for it"
    )
    return group


def add_run_options(parser: Parser) -> argparse._ArgumentGroup:
    """--out, --overwrite. Returns their group."""
    group = parser.add_argument_group("results")
    group.add_argument("--out", type=place, help="the run's folder (default: runs/SCRIPT-DATA-ENCODER-TIME)")
    group.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    return group


def add_resume_options(group: argparse._ArgumentGroup) -> None:
    """--resume."""
    group.add_argument(
        "--resume",
        type=place,
        metavar="FOLDER",
        help="go on with the run that this folder holds, as it was set (default: a new run)",
    )
