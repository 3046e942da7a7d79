"""What is in a data set, and what the network will see of it.

    python inspect_data.py DATA

DATA is a folder of images, the name of a data set, or `photos`. Prints for each split and class how many images there
are, how large, in which modes; which files cannot be read; which images are in two splits. Draws a contact sheet, and
mixtures as the network sees them, with their weights."""

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from augment import generator, to_pixels
from data import UNLABELLED, Images, list_data, open_images, spread, workers
from harness import command
from harness.files import refuse_inside, unusable
from harness.pictures import draw_mixtures, draw_sheet, legible
from tasks import MixupTransform

EACH = 6  # images of each class and split on the contact sheet
LISTED = 10  # unreadable files and duplicates that are named
MIXED = 64  # images that the mixtures are made of


def main() -> None:
    """Parse, look, print, draw."""
    parser = command.Parser(__doc__)
    add = parser.add_argument
    add("data", type=command.place, metavar="DATA", help="a folder of images, the name of a data set, or `photos`")
    add("--data-dir", type=command.place, default="data", help="folder for data sets by name, and for decoded images")
    add("--size", type=command.integer(8, 1024), default=32, help="side of a view, px")
    add("--seed", type=command.integer(0, 2**32 - 1), default=0, help="of the mixtures that are drawn")
    add("--out", type=command.place, help="folder for the pictures (default: runs/data-DATA)")
    args = parser.parse_args()
    images = open_images(list_data(args.data, args.data_dir), args.size, args.data_dir)
    out = Path(args.out or Path("runs", f"data-{images.listing.name}"))
    refuse_inside(args.data, "out", out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable("out", out, error) from error
    title, *notes = images.describe(skipped=False).splitlines()
    print(f"{title} in the cache", *notes, table(images), sep="\n")
    skipped = [f"{path}: {why}" for path, why in images.listing.skipped]
    print(_listed(f"{len(skipped) or 'no'} unreadable or misplaced file{'s' * (len(skipped) != 1)}", skipped))
    print(duplicates(images))
    contact_sheet(images).save(out / "contact.png")
    print(f"\n{out}/contact.png     images of every class and split")
    if len(images.rows("train", "unsup")) > 2:
        mixtures(images, args.size, args.seed).save(out / "mixtures.png")
        print(f"{out}/mixtures.png    mixtures as the network sees them, and their weights")
    for warning in images.warn_of_skipped().values():
        print(f"warning: {warning}")


def groups(images: Images) -> dict[tuple[str, str], list[int]]:
    """(split, class): its rows; the class of an unlabelled image is "-"."""
    rows = defaultdict(list)
    for row, (_, split, label) in enumerate(images.listing.entries):
        rows[split, "-" if label == UNLABELLED else images.listing.classes[label]].append(row)
    return dict(sorted(rows.items(), key=lambda group: (("train", "val", "unsup").index(group[0][0]), group[0][1])))


def table(images: Images) -> str:
    """A line for each split and class, and one for each split."""
    described = _originals(images)
    lines = [("split", "class", "images", "width x height, px", "modes")]
    parts = groups(images)
    for split in dict.fromkeys(split for split, _ in parts):
        mine = {name: rows for (s, name), rows in parts.items() if s == split}
        if len(mine) > 1:
            mine[f"all {len(mine)}"] = sum(mine.values(), [])
        for name, rows in mine.items():
            sizes, modes = zip(*(described[row] for row in rows), strict=True)
            counts = ", ".join(f"{count} {mode}" for mode, count in Counter(modes).most_common())
            lines.append((split, name, str(len(rows)), _range(sizes), counts))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _originals(images: Images) -> list[tuple[tuple[int, int], str]]:
    """Size and mode of every image as it is stored."""
    root, entries = images.listing.root, images.listing.entries
    if root is None:
        return [((images.listing.native, images.listing.native), "RGB")] * len(entries)

    def look(entry):
        with Image.open(root / entry.path) as image:
            return image.size, image.mode

    with ThreadPoolExecutor(workers()) as pool:
        return list(pool.map(look, entries))


def _range(sizes: list[tuple[int, int]]) -> str:
    """Sizes in a word: "64 x 64", or "240 x 160 to 500 x 375, median 213 x 160" by area."""
    ranked = sorted(sizes, key=lambda size: size[0] * size[1])
    small, middle, large = (f"{w} x {h}" for w, h in (ranked[0], ranked[len(ranked) // 2], ranked[-1]))
    return small if small == large else f"{small} to {large}, median {middle}"


def duplicates(images: Images) -> str:
    """The images that are in more than one split, by the pixels that are trained on."""
    same = [[images.listing.entries[row] for row in rows] for rows in images.same]
    across = [entries for entries in same if len({entry.split for entry in entries}) > 1]
    title = f"{len(across) or 'no'} image{'s' * (len(across) != 1)} in more than one split"
    return _listed(title, [" = ".join(entry.path for entry in entries) for entries in across])


def _listed(title: str, lines: list[str]) -> str:
    more = [f"  … and {len(lines) - LISTED} more"] * (len(lines) > LISTED)
    return "\n".join([title, *(f"  {line}" for line in lines[:LISTED]), *more])


def contact_sheet(images: Images) -> Image.Image:
    """A few images of every class and split, spread over their paths."""
    parts = groups(images)
    each = EACH if len(parts) > 1 else EACH * 8
    chosen = [(caption, row) for caption, rows in parts.items() for row in spread(rows, each)]
    drawn = dict(zip(images.listing.classes, legible(images.listing.classes), strict=True))
    captions = [(split, drawn.get(name, name)) for (split, name), _ in chosen]
    return draw_sheet(images.pixels[[row for _, row in chosen]], captions, columns=EACH)


def mixtures(images: Images, size: int, seed: int) -> Image.Image:
    """Mixtures of images that pretraining may use, with two of three candidates as their sources."""
    rows = spread(images.rows("train", "unsup"), MIXED)
    question = MixupTransform(3, size=size)(torch.from_numpy(images.pixels[rows]), generator(seed))
    asked = to_pixels(question.asked)[question.candidates]
    return draw_mixtures(to_pixels(question.mixtures), asked, question.weights)


if __name__ == "__main__":
    command.run(main)
