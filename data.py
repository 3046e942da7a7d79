"""Where images come from, their splits and classes, and the loaders.

    list_data(name or folder, data_dir)    -> Listing: what there is; nothing is decoded yet
    open_images(listing, size, data_dir)   -> Images: the pixels, from the cache where it is still true
    pretext_split(entries, ...)            -> rows to train on, rows to validate on
    get_dataloaders(images, ...)           -> training loader, validation loader

`python data.py DATA` says what is in a data set; see inspection.py.

Every image is decoded once, ever: its pixels go into a memory-mapped cache of unsigned bytes, and a batch is a gather
of its rows.
"""

import errno
import glob
import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import photos
from augment import generator
from download import ARCHIVES, fetch
from errors import RunError, UsageError

UNLABELLED = -1
CACHE_VERSION = 2  # another one whenever decoding changes, so that no older cache is believed
LARGEST_IMAGE = 2**26  # px; a larger one is not decoded, so that no header can fill the memory
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # it is named as a file that is left out
VALIDATION_BLOCK = 256  # images in a validation batch, at most; part of the fixed question, so not an option
SMALLEST_VALIDATION = 3  # images; a validation mixture has three candidates


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


@dataclass
class Images:
    """A decoded data set of N images, rows of one array that stays on disk."""

    listing: Listing  # its entries are those that could be decoded, one a row
    pixels: np.ndarray  # N 3 H H uint8, memory-mapped
    labels: torch.Tensor  # N int64

    def rows(self, *splits: str) -> list[int]:
        """The rows of these splits, in the order of their paths."""
        return [row for row, entry in enumerate(self.listing.entries) if entry.split in splits]

    def identity(self) -> dict[str, object]:
        """What two data sets have in common only if they hold the same images, as far as their names tell."""
        return {
            "number of images": len(self.listing.entries),
            "side": self.pixels.shape[2],
            "classes": self.listing.classes,
            "list of images": hashlib.sha256(json.dumps(self.listing.entries).encode()).hexdigest(),
        }

    def describe(self) -> str:
        """What there is, split by split, and what had to be left out, a line each."""
        counts = Counter(entry.split for entry in self.listing.entries)
        splits = ", ".join(f"{count} {split}" for split, count in sorted(counts.items()))
        classes = f", {len(self.listing.classes)} classes" if self.listing.classes else ", no labels"
        lines = [f"{self.listing.where}: {len(self.labels)} images ({splits}{classes}), {self.pixels.shape[2]} px"]
        lines += [f"skipped {path}: {why}" for path, why in self.listing.skipped]
        if self.listing.skipped:
            lines.append(f"{len(self.listing.skipped)} files skipped")
        return "\n".join(lines)


def list_data(data: str, data_dir: str | Path = "data") -> Listing:
    """`photos`, the name of a data set (see download.py), which is fetched into `data_dir`, or a folder -> Listing.

    Raises UsageError where there is nothing to list, RunError where a data set cannot be had.
    """
    if data == "photos":
        listing = _list_photos()
    else:
        listing = _list_folder(fetch(data, data_dir) if data in ARCHIVES else Path(data))
    _require_every_split(listing)
    return listing


def _require_every_split(listing: Listing) -> None:
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
        raise UsageError(f"--data {root}: no such folder; give a folder of images, or leave --data out for `photos`")
    if not root.is_dir():
        raise UsageError(f"--data {root} is a file; give the folder that holds the images")
    classes, val_classes = _folders(root / "train"), _folders(root / "val")
    labelled = bool(classes and val_classes)
    for name, folders, other in (("train", classes, val_classes), ("val", val_classes, classes)):
        if (root / name).is_dir() and other and not folders:
            raise UsageError(
                f"--data {root}: no usable image for {name}: expected {name}/CLASS/IMAGE, and there is no class"
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
    for path in sorted(_files_below(root)):
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
        fingerprint=_hash(str(root.resolve()), stamps),
        root=root,
    )


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else []


def _files_below(root: Path) -> Iterator[str]:
    """Relative paths of every file that is not hidden, through links too, each folder once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
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


# ----------------------------------------------------------------------------------------------------------- the cache
#
# One file: the pixels of every image, then a JSON index, then the length of the index in 8 bytes.


def open_images(listing: Listing, size: int, data_dir: str | Path) -> Images:
    """The pixels of a data set, decoded unless a cache of the very same files and side is there.

    They are stored at twice the side of a view (`size`, px), so that a crop is sharp too, or at their own if smaller.
    Raises UsageError where nothing of a split could be decoded.
    """
    side = min(2 * size, listing.native or 2 * size)
    where = hashlib.sha256(os.fsencode(listing.where)).hexdigest()[:8]
    file = Path(data_dir, "cache", f"{listing.name}-{where}-{side}px.cache")
    index = _read_index(file)
    if index is None or index["fingerprint"] != listing.fingerprint:
        index = _build_cache(listing, side, file)
    listing.entries = [Entry(*entry) for entry in index["entries"]]
    listing.skipped = [tuple(s) for s in index["skipped"]]
    pixels = np.memmap(file, np.uint8, "r", shape=(len(listing.entries), 3, side, side))
    return Images(listing, pixels, torch.tensor([entry.label for entry in listing.entries]))


def _read_index(file: Path) -> dict | None:
    """The index of a complete cache, else None."""
    try:
        with open(file, "rb") as cache:
            cache.seek(-8, os.SEEK_END)
            length = int.from_bytes(cache.read(8), "little")
            cache.seek(-8 - length, os.SEEK_END)
            return json.loads(cache.read(length))
    except (OSError, ValueError):
        return None


def _build_cache(listing: Listing, side: int, file: Path, block: int = 1024) -> dict:
    """Decode everything on all cores into `file`, by way of a temporary one: only a complete cache has the name."""

    def load(entry):
        try:
            return listing.load(entry.path, side).transpose(2, 0, 1)
        except Exception as error:  # noqa: BLE001  whatever a damaged file raises, it is named and left out
            return f"{type(error).__name__}: {error}".splitlines()[0]

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = file.parent.parent
        raise UsageError(f"--data-dir {where} cannot be used ({error.strerror}); give another folder") from error
    for left in file.parent.glob(f"{glob.escape(file.name)}.*.part"):
        if time.time() - left.stat().st_mtime > 3600:  # by a killed run: one that lives writes all the time
            left.unlink(missing_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    kept, skipped = [], list(listing.skipped)
    bar = tqdm(total=len(listing.entries), desc=f"decoding {listing.name}", unit="image", leave=False, disable=None)
    try:
        with open(part, "wb") as cache, ThreadPoolExecutor(workers()) as pool, bar:
            for start in range(0, len(listing.entries), block):
                entries = listing.entries[start : start + block]
                for entry, pixels in zip(entries, pool.map(load, entries), strict=True):
                    if isinstance(pixels, str):
                        skipped.append((entry.path, pixels))
                    else:
                        kept.append(entry)
                        cache.write(np.ascontiguousarray(pixels))
                    bar.update()
            listing.entries, listing.skipped = kept, skipped
            _require_every_split(listing)
            index = {"fingerprint": listing.fingerprint, "entries": kept, "skipped": skipped}
            text = json.dumps(index).encode()
            cache.write(text + len(text).to_bytes(8, "little"))
            cache.flush()
            os.fsync(cache.fileno())
        os.replace(part, file)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = len(listing.entries) * 3 * side**2 / 1e6
        raise RunError(
            f"the disk of --data-dir {file.parent.parent} is full, and the decoded images need {needed:.0f} MB; "
            "free some, or give another folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return index


def workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _hash(*parts) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- the loaders


def pretext_split(entries: Sequence[Entry], batch_size: int, flag: str = "--batch-size") -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on, from train/ and unsup/ together; val/ is never seen.

    The validation rows are the tenth (at least 3) whose path has the lowest MD5.
    Raises UsageError where less than a batch is left to train on.
    """
    rows = [row for row, entry in enumerate(entries) if entry.split != "val"]
    ranked = sorted(rows, key=lambda row: hashlib.md5(os.fsencode(entries[row].path)).hexdigest())
    held_out = max(SMALLEST_VALIDATION, round(len(rows) / 10))
    train, val = sorted(ranked[held_out:]), sorted(ranked[:held_out])
    if len(train) < 2:
        raise UsageError(
            f"--data holds {len(rows)} image{'s' * (len(rows) != 1)} to train on; unmixing needs at least "
            f"{SMALLEST_VALIDATION + 2} ({SMALLEST_VALIDATION} of them to validate on), and hundreds to learn much"
        )
    if len(train) < batch_size:
        raise UsageError(
            f"{flag} {batch_size} is more than the {len(train)} images to train on; use {len(train)} or less"
        )
    return train, val


def open_pretext(
    data: str, size: int, data_dir: str | Path, batch_size: int, flag: str = "--batch-size"
) -> tuple[Images, list[int], list[int]]:
    """The images of `data`, the rows to train on and those to validate on. Raises UsageError as its parts do."""
    listing = list_data(data, data_dir)
    pretext_split(listing.entries, batch_size, flag)  # too few to train on is said before anything is decoded
    images = open_images(listing, size, data_dir)
    return images, *pretext_split(listing.entries, batch_size, flag)


class ImageDataset(Dataset):
    """Some rows of a data set. An item is just the number of its row: `collate` gathers a whole batch at once."""

    def __init__(self, images: Images, rows: Sequence[int]):
        self.images, self.rows = images, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def collate(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers -> images B 3 H W uint8, labels B int64."""
        return torch.from_numpy(self.images.pixels[rows]), self.images.labels[rows]


class EpochOrder(Sampler):
    """Full batches in an order that depends on the seed and on `epoch` alone; the loop sets `epoch`, and with `first`
    the batch to begin with."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self.count, self.batch_size, self.seed, self.epoch, self.first = count, batch_size, seed, 0, 0

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = torch.randperm(self.count, generator=generator(self.seed, self.epoch)).tolist()
        for start in range(self.first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def get_dataloaders(
    images: Images, train: Sequence[int], val: Sequence[int], batch_size: int, seed: int, pin_memory: bool = False
) -> tuple[DataLoader, DataLoader]:
    """Loaders of (images B 3 H W uint8, labels B int64) over rows to train on and rows to validate on.

    The training loader yields a fresh order every epoch (set `loader.batch_sampler.epoch`), and full batches only.
    The validation loader yields every row, in order, in even blocks that depend on their number alone.
    """
    train, val = ImageDataset(images, train), ImageDataset(images, val)
    blocks = np.array_split(np.arange(len(val)), -(-len(val) // VALIDATION_BLOCK))
    order = EpochOrder(len(train), batch_size, seed)
    return (
        DataLoader(train, batch_sampler=order, collate_fn=train.collate, pin_memory=pin_memory),
        DataLoader(val, batch_sampler=[b.tolist() for b in blocks], collate_fn=val.collate, pin_memory=pin_memory),
    )


if __name__ == "__main__":
    import cli
    import inspection

    cli.run(inspection.main)
