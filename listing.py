"""What a data set holds: its images, their splits and classes. Nothing is decoded yet.

list_data(name or folder, data_dir) -> Listing
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

import photos
from download import ARCHIVES, fetch
from errors import UsageError

UNLABELLED = -1
CACHE_VERSION = 2  # another one whenever decoding changes, so that no older cache is believed
LARGEST_IMAGE = 2**26  # px; a larger one is not decoded, so that no header can fill the memory
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is named as a file that is left out


class Entry(NamedTuple):
    """One image of a data set."""

    path: str  # relative to the data set, with "/"; names the image
    split: str  # "train", "val" or "unsup"
    label: int  # index into the classes, or UNLABELLED


@dataclass
class Listing:
    """What a data set holds, before anything is decoded."""

    name: str
    where: str  # the folder looked at, for messages
    expected: dict[str, str]  # split: what its images should have been called
    classes: list[str]
    entries: list[Entry]
    skipped: list[tuple[str, str]]  # (path, why) of what cannot be used
    load: Callable[[str, int], np.ndarray]  # (path, side) -> side side 3 uint8; raises where there is no image
    native: int  # shortest side of a typical image, px
    fingerprint: str  # another one whenever a file changes
    root: Path | None = None  # the folder of the paths; None for the bundled photographs


def list_data(data: str, data_dir: str | Path = "data") -> Listing:
    """`photos`, the name of a data set (see download.py), which is fetched into `data_dir`, or a folder -> Listing.

    Raises UsageError where there is nothing to list, RunError where a data set cannot be had.
    """
    if data == "photos":
        listing = _list_photos()
    else:
        refuse_inside(data, "--data-dir", data_dir)
        listing = _list_folder(fetch(data, data_dir) if data in ARCHIVES else Path(data))
    require_every_split(listing)
    return listing


def refuse_inside(data: str, flag: str, place: str | Path) -> None:
    """Raises UsageError where what is written to `place` would be taken for images of the folder `data`."""
    named = data == "photos" or data in ARCHIVES
    if not named and Path(place).resolve().is_relative_to(Path(data).resolve()) and Path(data).is_dir():
        raise UsageError(
            f"{flag} {place} is inside --data {data}, whose images it would be taken for; give a folder elsewhere"
        )


def require_every_split(listing: Listing) -> None:
    """Raises UsageError where nothing is left of a split."""
    for split, expected in listing.expected.items():
        if not any(entry.split == split for entry in listing.entries):
            why = "".join(f"; {path} was left out: {reason}" for path, reason in listing.skipped[:1])
            raise UsageError(f"--data {listing.where}: no usable image for {split}: expected {expected}{why}")


def _list_photos() -> Listing:
    """The photographs in scikit-image's wheel, one class each, in Image网's shape."""
    classes, patches = sorted(photos.PHOTOS), photos.list_patches()
    entries = [Entry(path, split, classes.index(name) if name else UNLABELLED) for path, split, name in patches]
    expected = {"train": "train/CLASS", "val": "val/CLASS", "unsup": "unsup"}
    stamp = _hash(entries, photos.PHOTOS)
    return Listing("photos", "photos", expected, classes, entries, [], photos.load_patch, photos.PATCH, stamp)


# ----------------------------------------------------------------------------------------------- a folder of images


def _list_folder(root: Path) -> Listing:
    """With `train/CLASS/`, `val/CLASS/` and optionally `unsup/`, these are the splits, and the class indices are those
    of `train/` by name, in every split. Any other folder is unlabelled images, at any depth: all "unsup"."""
    if not root.exists():
        raise UsageError(f"--data {root}: no such folder; give a folder of images, or `photos`")
    if not root.is_dir():
        raise UsageError(f"--data {root} is a file; give the folder that holds the images")
    classes, val_classes = _folders(root / "train"), _folders(root / "val")
    labelled = bool(classes and val_classes)
    for name, folders, other in (("train", classes, val_classes), ("val", val_classes, classes)):
        if (root / name).is_dir() and other and not folders:
            raise UsageError(
                f"--data {root}: no usable image for {name}: expected {name}/CLASS/IMAGE, and there is no class"
            )
    if (root / "val").is_dir() and not labelled:
        raise UsageError(
            f"--data {root}: what is in val/ is never trained on, and without train/CLASS/ and val/CLASS/ all images "
            "are; make these folders, or give the folder of those to train on"
        )
    unknown = sorted(set(val_classes) - set(classes))
    if labelled and unknown:
        raise UsageError(
            f"--data {root}: val/{unknown[0]}/ is a class that train/ does not have; rename it to one, or remove it"
        )
    expected = {"unsup": "images at any depth, or train/CLASS/IMAGE, val/CLASS/IMAGE and optionally unsup/IMAGE"}
    if labelled:
        expected = {"train": "train/CLASS/IMAGE", "val": "val/CLASS/IMAGE"}
        if (root / "unsup").is_dir():
            expected["unsup"] = "unsup/IMAGE"

    entries, skipped, stamps = [], [], []
    for path in sorted(_files_below(root, skipped)):
        split, *inner = path.split("/")
        if not (root / path).is_file():
            skipped.append((path, "a broken link, or no regular file"))
            continue
        if not labelled or (split == "unsup" and inner):
            entries.append(Entry(path, "unsup", UNLABELLED))
        elif split in ("train", "val") and len(inner) > 1:
            entries.append(Entry(path, split, classes.index(inner[0])))
        else:
            skipped.append((path, "in no class folder of train/ or val/, nor in unsup/"))
            continue
        stat = (root / path).stat()
        stamps.append((path, stat.st_size, stat.st_mtime_ns))
    return Listing(
        name=root.resolve().name,
        where=str(root),
        expected=expected,
        classes=classes if labelled else [],
        entries=entries,
        skipped=skipped,
        load=lambda path, side: decode(root / path, side),
        native=_typical_side([root / entry.path for entry in entries]),
        fingerprint=_hash(str(root.resolve()), classes if labelled else [], entries, stamps),
        root=root,
    )


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else []


def _files_below(root: Path, skipped: list[tuple[str, str]]) -> Iterator[str]:
    """Relative paths of every file that is not hidden, through links too, each folder once. Folders that cannot be
    read go to `skipped`."""
    seen = set()

    def note(error):
        skipped.append((os.path.relpath(error.filename, root), f"a folder that cannot be read: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=note, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for file in files:
            if not file.startswith("."):
                yield Path(folder, file).relative_to(root).as_posix()


def _typical_side(files: list[Path], sample: int = 64) -> int:
    """Median of the shortest sides of up to `sample` images spread over `files`, px; 0 if none of them opens."""
    sides = []
    for file in files[:: max(1, -(-len(files) // sample))]:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except Exception:  # noqa: BLE001  whatever a damaged file raises: decoding will name it
            continue
    return int(np.median(sides)) if sides else 0


def decode(file: Path, side: int) -> np.ndarray:
    """Any image that Pillow opens, as a person would see it -> side side 3 uint8.

    Resized by the shortest side and cropped to the central square. The first frame of an animation; turned as its EXIF
    says; a transparent one on white; 16-bit and floating-point greys scaled to 8 bits. Raises what Pillow raises.
    """
    with Image.open(file) as image:
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(
                f"it claims {image.width} x {image.height} px; at most {LARGEST_IMAGE / 1e6:.0f} million fit"
            )
        image.draft(None, (side, side))  # large JPEGs are decoded at a reduced scale, never below this
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = _to_8_bits(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Deep greys (modes I, I;16, F) by the smallest usual range that holds them: [0, 1] of floats, 8 bits, 16 bits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32)).clip(0)
    ranges = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    top = next((r for r in ranges if values.max() <= r), values.max())
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))


def _hash(*parts) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()
