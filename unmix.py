"""Put a pretrained network to use: how much of each photograph is in a mixture?

    python unmix.py runs/NAME a.jpg b.jpg c.jpg                        mix the first two, and ask about all three
    python unmix.py runs/NAME a.jpg b.jpg c.jpg --weights 0.3 0.7      with these weights
    python unmix.py runs/NAME a.jpg b.jpg c.jpg --mixture m.png        a mixture that is there already

RUN is the folder of a run of train_pretext.py. The mixture shows another crop, flip and colour of its sources than the
candidates do, unless the run trained without other views. Beside the network's answer stands that of least squares on
the pixels, which has learnt nothing."""

import argparse
from pathlib import Path

import torch

from augment import augment, generator, to_pixels, whole_view
from engine import DEVICES, choose_device
from harness import checkpoint, command, folder
from harness.decode import Damaged, Ranges, decode
from harness.errors import UsageError, ValueProblem
from harness.files import unusable
from harness.pictures import draw_mixtures
from models import Unmixer, build_model
from tasks import MixupTransform, Question, least_squares

BAR = 30  # characters


def parse() -> argparse.Namespace:
    """The command line -> settings. Raises UsageError if they make no sense."""
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("run", type=command.place, metavar="RUN", help="the folder of a pretext run")
    add("images", type=command.place, nargs="+", metavar="IMAGE", help="the candidates: two or more image files")
    add("--weights", type=float, nargs="+", default=[0.3, 0.7], help="of the first images, sum 1 (default: 0.3 0.7)")
    add("--mixture", type=command.place, metavar="FILE", help="a mixture to ask about (default: mix the first images)")
    add("--seed", type=command.integer(0, 2**32 - 1), default=0, help="of the views that are mixed")
    add("--device", choices=DEVICES, default="auto", help="where to compute; auto: a CUDA GPU if there is one")
    add("--out", type=command.place, default="unmix.png", help="file for the picture")
    args = parser.parse_args()
    if Path(args.out).resolve() in [Path(file).resolve() for file in (*args.images, args.mixture) if file]:
        raise UsageError(f"--out {args.out} is one of the images that are given; name another file")
    if len(args.images) < 2:
        raise UsageError("one image is given; give two or more candidates")
    if args.mixture:
        parser.refuse({"weights", "seed"}, "is of mixtures that are made here; with --mixture none is: leave one out")
    elif len(args.weights) > len(args.images):
        raise UsageError(f"--weights has {len(args.weights)} numbers for {len(args.images)} images; give fewer")
    elif not all(0 < weight < 1 for weight in args.weights) or abs(sum(args.weights) - 1) > 1e-3:
        given = " ".join(f"{weight:g}" for weight in args.weights)
        raise UsageError(f"--weights {given}: give two or more numbers between 0 and 1 that sum to 1")
    return args


def main() -> None:
    """Mix, ask, print, draw."""
    args = parse()
    device = choose_device(args.device)
    model, settings = open_run(args.run)
    size = settings["size"]
    files = [Path(file) for file in (*args.images, args.mixture) if file]
    ranges = Ranges(files, settings.get("ranges"))  # what the run saw as black and white beyond 8 bits
    images = torch.stack([read(file, 2 * size, ranges) for file in args.images])  # n 3 2S 2S
    print(ranges, end="")
    asked = whole_view(images, size)  # n 3 S S
    weights = None
    if args.mixture:
        mixture = whole_view(read(args.mixture, 2 * size, ranges)[None], size)  # 1 3 S S
    else:
        weights = torch.tensor(args.weights)
        sources = images[: len(weights)]
        seen = augment(sources, size, generator(args.seed)) if settings["views"] else whole_view(sources, size)
        mixture = (weights[:, None, None, None] * seen).sum(dim=0, keepdim=True)  # 1 3 S S
    question = Question(mixture, asked, torch.arange(len(images))[None], torch.zeros(1, len(images)))
    with torch.no_grad():
        logits = model.to(device).eval()(*(part.to(device) for part in question.inputs)).float().cpu()  # 1 n
    predicted = MixupTransform(activation=settings["activation"]).predict(logits)
    truth = None if weights is None else torch.nn.functional.pad(weights, (0, len(images) - len(weights)))[None]
    report(args.images, predicted[0].tolist(), least_squares(question)[0].tolist(), truth)
    picture = draw_mixtures(to_pixels(mixture), to_pixels(asked)[None], truth, predicted)
    try:
        picture.save(args.out)
    except OSError as error:
        raise unusable("out", args.out, error) from error
    except ValueError as error:
        raise ValueProblem("out", args.out, "has no ending of a picture; use .png or .jpg") from error
    print(f"\npicture   {args.out}")


def open_run(run: str) -> tuple[Unmixer, dict]:
    """The network of a pretext run, and its settings. Raises UsageError if there is none."""
    if not Path(run).is_dir():
        raise UsageError(f"{run} is no folder; give that of a run of train_pretext.py")
    file = Path(run, checkpoint.LAST)
    if not file.is_file():
        raise UsageError(f"{run} holds no {checkpoint.LAST}; give the folder of a run of train_pretext.py")
    state = checkpoint.load(file)
    if not isinstance(state, dict) or state.get("script") != "train_pretext":
        raise UsageError(f"{run} was no run of train_pretext.py, whose network answers here")
    if state.get("format") != folder.FORMAT:
        raise UsageError(f"an older version made the run {run}; use that version, or train again")
    settings = state["settings"]
    if settings["candidates"] is None or settings["task"] == "scale":
        raise UsageError(f"{run} learnt --task {settings['task']}, so it cannot tell weights; give a run on mixtures")
    model = build_model(**{name: settings[name] for name in ("encoder", "decoder", "size", "widths")})
    checkpoint.load_weights(model, state["model"], f"the checkpoint in {run}")
    return model, settings


def read(file: str, side: int, ranges: Ranges) -> torch.Tensor:
    """An image file -> 3 side side uint8. Raises UsageError if it is no image."""
    try:
        return torch.tensor(decode(Path(file), side, ranges)).permute(2, 0, 1)
    except (OSError, Damaged) as error:
        raise UsageError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def report(names: list[str], predicted: list[float], pixels: list[float], truth: torch.Tensor | None) -> None:
    """A line for each candidate: a bar, the network's weight, the true one if it is known, and that of the pixels."""
    width = max(map(len, names))
    print(f"{'':{width}}  {'':{BAR}}  network" + "  true" * (truth is not None) + "  least squares on pixels")
    for i, name in enumerate(names):
        bar = "#" * round(BAR * min(1, predicted[i]))
        true = f"  {truth[0, i]:4.2f}" if truth is not None else ""
        print(f"{name:{width}}  {bar:{BAR}}  {predicted[i]:7.2f}{true}  {pixels[i]:23.2f}")


if __name__ == "__main__":
    command.run(main)
