"""Data sets: a folder or a name -> its list of files -> pixels, decoded once -> rows -> loaders.

    list_data(name or folder, data_dir)   -> Listing: files, splits, classes; nothing is decoded yet
    open_images(listing, size, data_dir)  -> Images: the pixels, from a memory-mapped cache
    pretext_split(entries, batch_size)    -> rows to train on, rows to validate on
    get_dataloaders(images, ...)          -> training loader, validation loader

Every file is decoded once for each side that is asked for. A batch is then a gather of rows of the cache."""

import hashlib
import json
import math
import mimetypes
import os
import signal
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from augment import generator, send
from harness import bundled, cache
from harness.cache import SKIPPED_SHOWN, workers
from harness.decode import Ranges, decode, decoders, shortest_sides
from harness.download import ARCHIVES, fetch
from harness.errors import ValueProblem
from harness.files import files_below, ignored, refuse_inside

UNLABELLED = -1
CACHE_VERSION = 4  # change it whenever decoding changes, so that older caches are rebuilt
TRAINED, HELD_OUT = ("train", "training"), ("val", "valid", "validation", "test", "testing")  # usual names of folders
VALIDATION_BLOCK = 256  # images in a validation batch, at most; part of the fixed question, so not an option
SMALLEST_VALIDATION = 3  # images; a validation mixture has three candidates
PLACES = ("auto", "device", "stream")
RESIDENT_SHARE = 0.5  # of the device's free memory, for images that live there
STREAMERS = 4  # worker processes that gather batches for a GPU, at most
UNLABELLED_PLACES = "images at any depth, or train/CLASS/IMAGE, val/CLASS/IMAGE and optionally unsup/IMAGE"


class Entry(NamedTuple):
    """One image of a data set."""

    path: str  # relative to the data set, with "/"; names the image
    split: str  # "train", "val" or "unsup"
    label: int  # index into the classes, or UNLABELLED


@dataclass
class Listing:
    """The files of a data set."""

    name: str
    place: str  # the folder, or "photos", for messages
    required: tuple[str, ...]  # splits that need images
    classes: list[str]
    entries: list[Entry]
    skipped: list[tuple[str, str]]  # (path, why) of files that cannot be used
    load: Callable[[str, int], np.ndarray]  # (path, side) -> side side 3 uint8; raises if there is no image
    native: int  # shortest side of a typical image, px
    fingerprint: str  # changes whenever a file changes
    root: Path | None = None  # the folder of the paths; None for the bundled photographs
    ranges: Ranges = field(default_factory=Ranges)  # what is black and what is white beyond 8 bits
    sides: list[int] = field(default_factory=list)  # shortest sides of a sample, px
    notes: list[str] = field(default_factory=list)  # what a person may not expect

    def require_every_split(self) -> None:
        """Raises UsageError if a split has no image."""
        for split in self.required:
            if not any(entry.split == split for entry in self.entries):
                why = "".join(f"; {path} was left out: {reason}" for path, reason in self.skipped[:1])
                expected = UNLABELLED_PLACES if split == "unsup" else f"{split}/CLASS/IMAGE"
                raise ValueProblem("data", self.place, f": no usable image for {split}: expected {expected}{why}")


def list_data(data: str, data_dir: str | Path = "data") -> Listing:
    """The files of `photos`, of a data set by name (see harness/download.py; fetched into `data_dir`), or of a folder.
    Raises UsageError if there is nothing to list, RunError if a data set cannot be fetched."""
    if data not in ("photos", *ARCHIVES):
        refuse_inside(data, "data_dir", data_dir)
    folder = fetch(data, data_dir) if data in ARCHIVES else Path(data)
    listing = _list_photos() if data == "photos" else _list_folder(folder)
    listing.require_every_split()
    return listing


def _list_photos() -> Listing:
    """The photographs in scikit-image's wheel, one class each, split as fast.ai's Image网."""
    classes, patches = sorted(bundled.PHOTOS), bundled.list_patches()
    entries = [Entry(path, split, classes.index(name) if name else UNLABELLED) for path, split, name in patches]
    stamp, splits = _hash(entries, bundled.PHOTOS), ("train", "val", "unsup")
    return Listing("photos", "photos", splits, classes, entries, [], bundled.load_patch, bundled.PATCH, stamp)


def _list_folder(root: Path) -> Listing:
    """A folder with `train/CLASS/`, `val/CLASS/` and optionally `unsup/` has these splits; the class indices are those
    of `train/` by name, in every split. Any other folder holds unlabelled images, at any depth: all "unsup"."""

    def refuse(problem):
        raise ValueProblem("data", root, problem)

    if not root.exists():
        refuse(": no such folder; give a folder of images, or `photos`")
    if not root.is_dir():
        refuse("is a file; give the folder that holds the images")
    folders = {split: _folders(root / split) for split in ("train", "val")}
    labelled = all(folders.values())
    for split, names in folders.items():
        if (root / split).is_dir() and any(folders.values()) and not names:
            refuse(f": no usable image for {split}: expected {split}/CLASS/IMAGE, and there is no class")
    if (root / "val").is_dir() and not labelled:
        problem = "what is in val/ is never trained on, but without train/CLASS/ and val/CLASS/ all images would be"
        refuse(f": {problem}; make these folders, or give the folder of those to train on")
    usual = {name.lower(): name for name in _folders(root)}
    trained, held = ([usual[name] for name in names if name in usual] for names in (TRAINED, HELD_OUT))
    if trained and held and not labelled:
        problem = f"{held[0]}/ beside {trained[0]}/ looks like images that are not for training"
        refuse(f": {problem}; name them train/CLASS/ and val/CLASS/, or give the folder of those to train on")
    nfc = lambda name: unicodedata.normalize("NFC", name)  # noqa: E731  é is one character, or e and an accent
    if labelled and (unknown := sorted(set(folders["val"]) - set(folders["train"]))):
        alike = [name for name in folders["train"] if nfc(name) == nfc(unknown[0])]
        more = "".join(f" (it looks like one, but is {unknown[0]!a}, and not {name!a})" for name in alike)
        refuse(f": val/{unknown[0]}/ is a class that train/ does not have; rename it to one, or remove it{more}")

    found, skipped, stamps, seen, nested = [], [], [], set(), {}
    for path in sorted(files_below(root, skipped)):
        split, *inner = path.split("/") if labelled else ("unsup", path)
        name = "".join(inner[:1]) if split != "unsup" else ""
        seen.add(f"{split}/{name}".strip("/"))
        if not (root / path).is_file():
            skipped.append((path, "a broken link, or no regular file"))
        elif len(inner) < {"train": 2, "val": 2, "unsup": 1}.get(split, math.inf):
            skipped.append((path, "in no class folder of train/ or val/, nor in unsup/"))
        else:
            found.append((path, split, name))
            stat = (root / path).stat()
            stamps.append((path, stat.st_size, stat.st_mtime_ns))
            if name and len(inner) > 2:
                nested.setdefault(name, f"{split}/{name}/{inner[1]}/")
    seen.update(path for path, _ in skipped)  # such as a folder that cannot be read
    folders["unsup"] = [""] * (root / "unsup").is_dir()
    places = [f"{split}/{name}".strip("/") for split in folders for name in folders[split]]
    empty = [place for place in places if labelled and place not in seen]
    classes = [name for name in folders["train"] if labelled and {f"train/{name}", f"val/{name}"} & seen]
    twins = [names for _, group in groupby(sorted(classes, key=nfc), nfc) if len(names := list(group)) > 1]
    notes = [f"nothing is in {'/, '.join(empty[:5])}/" + f" and {len(empty) - 5} more" * (len(empty) > 5)] * bool(empty)
    notes += [f"{name} is the only class, with no other to tell it from" for name in classes * (len(classes) == 1)]
    notes += [f"the classes {' and '.join(map(ascii, names))} look the same, and are two" for names in twins]
    notes += [f"{list(nested.values())[0]} is none of the classes, but part of one"] if nested else []

    numbers = {name: number for number, name in enumerate(classes)}
    entries = [Entry(path, split, numbers.get(name, UNLABELLED)) for path, split, name in found]
    required = dict.fromkeys(["train", "val"] * labelled + [split for _, split, _ in found] or ["unsup"])
    ranges = Ranges([root / path for path, _, _ in found])
    load, sides = lambda path, side: decode(root / path, side, ranges), shortest_sides(ranges.files)
    native, stamp = int(np.median(sides or [0])), _hash(str(root.resolve()), classes, entries, stamps)
    files = tuple(required), classes, entries, skipped, load, native, stamp
    return Listing(root.resolve().name, str(root), *files, root, ranges, sides, notes)


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not ignored(p.name)) if root.is_dir() else []


def _hash(*parts) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts]).encode()).hexdigest()


@dataclass
class Images:
    """A decoded data set of N images."""

    listing: Listing  # its entries are those that could be decoded, one a row
    pixels: np.ndarray  # N 3 H H uint8, memory-mapped
    labels: torch.Tensor  # N int64
    skipped_file: Path | None = None  # has the names of all files that were skipped, if they are many
    same: list[list[int]] = field(default_factory=list)  # groups of rows with equal pixels

    def rows(self, *splits: str) -> list[int]:
        """The rows of these splits, in the order of their paths."""
        return [row for row, entry in enumerate(self.listing.entries) if entry.split in splits]

    def identity(self) -> dict[str, object]:
        """Fingerprint used to refuse resuming on different data: plain values by name."""
        scale = {"scale beyond 8 bits": dict(self.listing.ranges)} if self.listing.ranges else {}
        known = {"number of images": len(self.labels), "side": self.pixels.shape[2], "classes": self.listing.classes}
        entries = hashlib.sha256(json.dumps(self.listing.entries).encode()).hexdigest()
        return scale | known | {"list of images": entries}

    def warn_of_skipped(self, allowed: bool = True) -> dict[str, str]:
        """{"warning": text} if a tenth of the images or more were skipped, of the files that are named as images; else
        {}. Raises UsageError from half on, unless that is `allowed`."""
        named = lambda path: (mimetypes.guess_type(path, strict=False)[0] or "").startswith("image/")  # noqa: E731
        lost = [f"{path} ({why})" for path, why in self.listing.skipped if named(path)]
        text = f"{len(lost)} of {len(lost) + len(self.labels)} images cannot be used, such as {''.join(lost[:1])}"
        if len(lost) >= len(self.labels) and not allowed:
            raise ValueProblem("data", self.listing.place, f": {text}; mend them, or go on with --allow-skipped")
        return {"warning": text} if 9 * len(lost) >= len(self.labels) else {}

    def describe(self, skipped: bool = True) -> str:
        """A line with the numbers of images, and lines about what a person may not expect; the last of them about files
        that were `skipped`, a line for each, up to ten."""
        counts = Counter(entry.split for entry in self.listing.entries)
        splits = ", ".join(f"{count} {split}" for split, count in sorted(counts.items()))
        classes = f", {len(self.listing.classes)} classes" if self.listing.classes else ", no labels"
        title = f"{self.listing.place}: {len(self.labels)} images ({splits}{classes}), {self.pixels.shape[2]} px"
        lines = [title, *str(self.listing.ranges).splitlines(), *(f"note: {note}" for note in self.listing.notes)]
        copies = sum(len(rows) - 1 for rows in self.same)
        across = sum(len({self.listing.entries[row].split for row in rows}) > 1 for rows in self.same)
        lines += [f"note: copies by their pixels: {copies}; images in more than one split: {across}"] * bool(copies)
        lost = self.listing.skipped if skipped else []
        lines += [f"skipped {path}: {why}" for path, why in lost[:SKIPPED_SHOWN]]
        more = f", these and more; all are named in {self.skipped_file}" if len(lost) > SKIPPED_SHOWN else ""
        lines += [f"{len(lost)} files skipped{more}"] if lost else []
        return "\n".join(lines)


def open_images(listing: Listing, size: int, data_dir: str | Path, ranges: dict[str, list] | None = None) -> Images:
    """The pixels of a data set, from the cache in `data_dir`; decoded if no cache of the very same files is there. They
    are stored at twice the side of a view (`size`, px), so that a crop is sharp too, or at their own if smaller. If
    `ranges`, another run's, are not what these images have, a second cache is made. Raises UsageError if nothing of a
    split could be decoded or the cache cannot be written, RunError if the disk is full."""
    side = min(2 * size, listing.native or 2 * size)
    if side <= size and (larger := sum(other >= 2 * side for other in listing.sides)):
        share = f"{larger} of {len(listing.sides)} in a sample are larger, and lose detail"
        listing.notes.append(f"all images are stored at {side} px, since most are that small; {share}")
    place = listing.root.resolve() if listing.root else listing.place  # one cache however the path was typed

    def decoded(index):
        kept, skipped = [listing.entries[place] for place in index["kept"]], [tuple(s) for s in index["skipped"]]
        return replace(listing, entries=kept, skipped=skipped)

    for given in ({}, ranges or {}):
        file = Path(data_dir, "cache", f"{listing.name[:50]}-{_hash(os.fsdecode(place), given)[:8]}-{side}px.cache")
        listing.ranges.clear()
        listing.ranges.given = given
        index = cache.read_index(file)
        # What was skipped is tried again by other versions of what decodes.
        stale = index and index["skipped"] and index["decoders"] != decoders()
        if index is None or index["fingerprint"] != listing.fingerprint or stale:
            index = {"fingerprint": listing.fingerprint, "side": side, "decoders": decoders()}
            index |= {"skipped": list(listing.skipped), "ranges": listing.ranges}
            paths, load = [entry.path for entry in listing.entries], lambda path: listing.load(path, side)
            cache.build(file, paths, load, index, lambda index: decoded(index).require_every_split())
        if all((ranges or {}).get(kind, own) == own for kind, own in index["ranges"].items()):
            break
    listing.ranges.update(index["ranges"])
    listing = decoded(index)
    pixels = np.memmap(file, np.uint8, "r", shape=(len(listing.entries), 3, side, side))
    labels, skipped_file = torch.tensor([entry.label for entry in listing.entries]), file.with_suffix(".skipped.txt")
    return Images(listing, pixels, labels, skipped_file, index["same"])


def pretext_split(entries: Sequence[Entry], batch_size: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on, from train/ and unsup/ together; val/ is left out. The validation rows
    are the tenth (at least 3) whose path has the lowest MD5, in that order, so that a validation batch shows images
    from all over the data, not of one class. Raises UsageError if less than a batch is left to train on."""
    rows = [row for row, entry in enumerate(entries) if entry.split != "val"]
    digest = lambda row: hashlib.md5(os.fsencode(entries[row].path), usedforsecurity=False).hexdigest()  # noqa: E731
    ranked = sorted(rows, key=digest)
    held_out = max(SMALLEST_VALIDATION, round(len(rows) / 10))
    train, val = sorted(ranked[held_out:]), ranked[:held_out]
    if len(train) < 2:
        least = f"{SMALLEST_VALIDATION + 2} ({SMALLEST_VALIDATION} of them to validate on), and hundreds to learn much"
        problem = f"holds {len(rows)} image{'s' * (len(rows) != 1)} to train on; unmixing needs at least {least}"
        raise ValueProblem("data", None, problem)
    if len(train) < batch_size:
        problem = f"is more than the {len(train)} images to train on; use {len(train)} or less"
        raise ValueProblem("batch_size", batch_size, problem)
    return train, val


def open_pretext(
    data: str, size: int, data_dir: str | Path, batch_size: int, ranges: dict[str, list] | None = None
) -> tuple[Images, list[int], list[int]]:
    """The images of `data`, the rows to train on and those to validate on. Raises UsageError and RunError."""
    listing = list_data(data, data_dir)
    pretext_split(listing.entries, batch_size)  # too few images are refused before anything is decoded
    images = open_images(listing, size, data_dir, ranges)
    return images, *pretext_split(images.listing.entries, batch_size)


def spread(rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of the rows, evenly spread over all of them."""
    return [rows[i * len(rows) // count] for i in range(count)] if count < len(rows) else list(rows)


def choose_place(name: str, images: Images, device: torch.device) -> str:
    """Where batches are gathered: "device", where all images live, or "stream", from the memory-mapped cache. `auto`
    takes the GPU if the images fill at most half of its free memory. On a CPU it streams: the system keeps the cache's
    pages in memory as long as there is room."""
    if name != "auto":
        return name
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return "device" if images.pixels.nbytes <= RESIDENT_SHARE * free else "stream"


class ImageDataset(Dataset):
    """Some rows of a data set. A batch is gathered at once, by `collate`: from `resident`, all images N 3 H H uint8 (or
    features N D) and labels N on a device, where nothing is copied in a step, or if that is None from the cache."""

    def __init__(self, images: Images, rows: Sequence[int], resident: tuple[torch.Tensor, torch.Tensor] | None = None):
        self.images, self.rows, self.resident = images, np.asarray(rows, dtype=np.int64), resident
        if resident is not None:
            self.resident_rows = torch.from_numpy(self.rows).to(resident[0].device)

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, places):
        return places

    def collate(self, places: np.ndarray | torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of B images among the rows -> images B 3 H H uint8 (or features B D), labels B int64."""
        if self.resident is None:
            rows = self.rows[places]
            return torch.from_numpy(self.images.pixels[rows]), self.images.labels[rows]
        (pixels, labels), rows = self.resident, self.resident_rows[places]
        return pixels[rows], labels[rows]


class EpochOrder(Sampler):
    """Full batches in an order that depends on the seed and on `epoch` alone. The loop sets `epoch`, and `first`, the
    batch to begin with. With a `device` the order of a whole epoch is copied there at once."""

    def __init__(self, count: int, batch_size: int, seed: int, device: torch.device | None = None):
        self.count, self.batch_size, self.seed, self.device = count, batch_size, seed, device
        self.epoch, self.first = 0, 0

    def __len__(self):
        return self.count // self.batch_size

    def __iter__(self):
        order = torch.randperm(self.count, generator=generator(self.seed, self.epoch))
        order = order.numpy() if self.device is None else send([order], self.device)[0]
        for start in range(self.first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


def _obey_the_run(worker):
    """In a process that gathers batches. Signals to stop are for the main one, which saves and ends the others."""
    asked = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, asked)

    def wait():
        while signal.sigwaitinfo(asked).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def get_dataloaders(
    images: Images, train: Sequence[int], val: Sequence[int], batch_size: int, seed: int,
    device: torch.device | None = None, place: str = "auto",
) -> tuple[DataLoader, DataLoader]:  # fmt: skip
    """Loaders of (images B 3 H W uint8, labels B int64) over rows to train on and rows to validate on. `place` is where
    the images live, see `choose_place`; the batches are the same. Without a `device` (torch's) it is the CPU.

    The training loader yields a fresh order every epoch (set `loader.batch_sampler.epoch`), and full batches only. The
    validation loader yields every row, in order, in even blocks that depend on their number alone."""
    device = device or torch.device("cpu")
    resident, options = None, {}
    if choose_place(place, images, device) == "device":
        resident = torch.from_numpy(np.array(images.pixels)).to(device), images.labels.to(device)
    elif device.type == "cuda":
        options = {"pin_memory": True}
        if hasattr(os, "fork"):  # workers gather the next batches while the GPU computes
            options |= {"persistent_workers": True, "multiprocessing_context": "fork"}
            options |= {"num_workers": max(1, min(STREAMERS, workers() - 1)), "worker_init_fn": _obey_the_run}
    train, val = ImageDataset(images, train, resident), ImageDataset(images, val, resident)
    blocks = np.array_split(np.arange(len(val)), -(-len(val) // VALIDATION_BLOCK))
    blocks = [slice(int(block[0]), int(block[-1]) + 1) for block in blocks]
    order = EpochOrder(len(train), batch_size, seed, device if resident else None)
    train_loader = DataLoader(train, batch_sampler=order, collate_fn=train.collate, **options)
    return train_loader, DataLoader(val, batch_sampler=blocks, collate_fn=val.collate, **options)
