"""The pixels of a data set, decoded once, and the loaders.

    list_data(name or folder, data_dir)    -> Listing: what there is; see listing.py
    open_images(listing, size, data_dir)   -> Images: the pixels, from the cache where it is still true
    pretext_split(entries, ...)            -> rows to train on, rows to validate on
    get_dataloaders(images, ...)           -> training loader, validation loader

Every image is decoded once, ever: its pixels go into a memory-mapped cache of unsigned bytes, and a batch is a gather
of its rows.

`python data.py DATA` says what is in a data set; see inspection.py.
"""

import errno
import glob
import hashlib
import json
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from augment import generator, send
from errors import RunError, UsageError
from listing import Entry, Listing, list_data, require_every_split

VALIDATION_BLOCK = 256  # images in a validation batch, at most; part of the fixed question, so not an option
PLACES = ("auto", "device", "stream")
MACHINE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE}  # not the file's fault: ends the run
RESIDENT_SHARE = 0.5  # of the device's free memory, for images that live there
PREFETCH = 2  # batches gathered ahead
SMALLEST_VALIDATION = 3  # images; a validation mixture has three candidates


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
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE:
                raise
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
            require_every_split(listing)
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


# --------------------------------------------------------------------------------------------------------- the loaders


def pretext_split(entries: Sequence[Entry], batch_size: int, flag: str = "--batch-size") -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on, from train/ and unsup/ together; val/ is never seen.

    The validation rows are the tenth (at least 3) whose path has the lowest MD5, in the order of it: so the images that
    are asked about together come from all over the data, not from one class.
    Raises UsageError where less than a batch is left to train on.
    """
    rows = [row for row, entry in enumerate(entries) if entry.split != "val"]
    ranked = sorted(rows, key=lambda row: hashlib.md5(os.fsencode(entries[row].path)).hexdigest())
    held_out = max(SMALLEST_VALIDATION, round(len(rows) / 10))
    train, val = sorted(ranked[held_out:]), ranked[:held_out]
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


def choose_place(name: str, images: Images, device: torch.device) -> str:
    """Where batches are gathered: "device", where all images live, or "stream", from the memory-mapped cache.

    `auto` takes the GPU where the images fill at most half of its free memory. On a CPU it streams: the system keeps
    the cache's pages in memory as long as there is room.
    """
    if name != "auto":
        return name
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return "device" if images.pixels.nbytes <= RESIDENT_SHARE * free else "stream"


class ImageDataset(Dataset):
    """Some rows of a data set. An item is just the number of its row: `collate` gathers a whole batch at once.

    resident  the pixels of all images on a device, N 3 H H uint8; None: gather from the cache
    """

    def __init__(self, images: Images, rows: Sequence[int], resident: torch.Tensor | None = None):
        self.images, self.rows, self.resident = images, rows, resident

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def collate(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Row numbers -> images B 3 H W uint8, labels B int64."""
        labels = self.images.labels[rows]
        if self.resident is None:
            return torch.from_numpy(self.images.pixels[rows]), labels
        return self.resident[send(torch.tensor(rows), self.resident.device)], labels


class Prefetched(DataLoader):
    """A loader whose next batches are gathered by a thread while the device computes."""

    def __iter__(self):
        batches, stop = queue.Queue(PREFETCH), threading.Event()

        def offer(item):
            while not stop.is_set():
                try:
                    return batches.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def gather():
            try:
                for batch in super(Prefetched, self).__iter__():
                    offer((batch, None))
                    if stop.is_set():
                        return
                offer((None, None))
            except BaseException as error:  # noqa: BLE001  it is raised where the batch was wanted
                offer((None, error))

        thread = threading.Thread(target=gather, daemon=True)
        thread.start()
        try:
            while True:
                batch, error = batches.get()
                if error:
                    raise error
                if batch is None:
                    return
                yield batch
        finally:
            stop.set()
            thread.join()


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


class FullBatches:
    """What a loader yields, put together and cut into batches of exactly `size`; what is left over is dropped."""

    def __init__(self, loader: Iterable, size: int):
        self.loader, self.size = loader, size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rest = None
        for batch in self.loader:
            images, labels = batch if rest is None else map(torch.cat, zip(rest, batch, strict=True))
            end = len(images) // self.size * self.size
            yield from zip(images[:end].split(self.size), labels[:end].split(self.size), strict=True) if end else ()
            rest = images[end:], labels[end:]


def check_same(then: dict[str, object], now: dict[str, object], folder: str) -> None:
    """Raises UsageError where the run in `folder`, to be resumed, had images of another `identity` than those now."""
    for name, was in then.items():
        if was != now[name]:
            raise UsageError(f"--resume {folder}: the data is another: {name} was {was}, and is {now[name]} now")


def get_dataloaders(
    images: Images,
    train: Sequence[int],
    val: Sequence[int],
    batch_size: int,
    seed: int,
    device: torch.device | None = None,
    place: str = "auto",
) -> tuple[DataLoader, DataLoader]:
    """Loaders of (images B 3 H W uint8, labels B int64) over rows to train on and rows to validate on.

    place  where the images live, see `choose_place`; the batches are the same

    The training loader yields a fresh order every epoch (set `loader.batch_sampler.epoch`), and full batches only.
    The validation loader yields every row, in order, in even blocks that depend on their number alone.
    """
    device = device or torch.device("cpu")
    resident, options = None, {}
    if choose_place(place, images, device) == "device":
        resident = torch.from_numpy(np.array(images.pixels)).to(device)
    else:
        options["pin_memory"] = device.type == "cuda"
    kind = Prefetched if resident is None else DataLoader
    train, val = ImageDataset(images, train, resident), ImageDataset(images, val, resident)
    blocks = np.array_split(np.arange(len(val)), -(-len(val) // VALIDATION_BLOCK))
    order = EpochOrder(len(train), batch_size, seed)
    return (
        kind(train, batch_sampler=order, collate_fn=train.collate, **options),
        kind(val, batch_sampler=[b.tolist() for b in blocks], collate_fn=val.collate, **options),
    )


if __name__ == "__main__":
    import cli
    import inspection

    cli.run(inspection.main)
