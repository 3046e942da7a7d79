"""Decoded images in one file: the pixels of every image, then a JSON index, then the length of the index in 8 bytes."""

import contextlib
import glob
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from harness.decode import Damaged
from harness.files import unusable, write

SKIPPED_SHOWN = 10  # names of skipped files in print, at most; if there are more, a file beside the cache has them all
BLOCK = 1024  # images whose decoding is under way


def workers() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def read_index(file: Path) -> dict | None:
    """The index of a complete cache, else None."""
    with contextlib.suppress(OSError, ValueError), open(file, "rb") as cache:
        cache.seek(-8, os.SEEK_END)
        length = int.from_bytes(cache.read(8), "little")
        cache.seek(-8 - length, os.SEEK_END)
        return json.loads(cache.read(length))


def build(file: Path, paths: Sequence[str], load: Callable[[str], np.ndarray], index: dict, check: Callable) -> dict:
    """Decode everything on all cores, write the cache to `file`, and return its index, which gets "kept", the places in
    `paths` of the rows; "skipped", [path, why] of the others; "same", groups of rows with equal pixels. Before the file
    is complete, `check(index)` may raise. Raises UsageError or RunError about --data-dir if it cannot be written.

    load  path -> H H 3 uint8; raises Damaged, and OSError if a drive is lost: that leaves no cache"""
    data_dir, kept, same = file.parent.parent, [], defaultdict(list)

    def row(path):
        try:
            pixels = np.ascontiguousarray(load(path).transpose(2, 0, 1))
            return pixels, hashlib.blake2b(pixels, digest_size=8).digest()
        except Damaged as error:
            return None, str(error)
        except OSError as error:
            error.filename, error.of_image = error.filename or path, True
            raise

    def fill(cache):
        name = file.name.rsplit("-", 2)[0]
        bar = tqdm(total=len(paths), desc=f"decoding {name}", unit="image", leave=False, disable=None)
        with ThreadPoolExecutor(workers()) as pool, bar:
            for start in range(0, len(paths), BLOCK):
                for place, (pixels, said) in enumerate(pool.map(row, paths[start : start + BLOCK]), start):
                    if pixels is None:
                        index["skipped"].append([paths[place], said])
                    else:
                        same[said].append(len(kept))
                        kept.append(place)
                        cache.write(pixels)
                    bar.update()
        index.update(kept=kept, same=[rows for rows in same.values() if len(rows) > 1])
        check(index)
        text = json.dumps(index).encode()
        cache.write(text + len(text).to_bytes(8, "little"))

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(f"{glob.escape(file.name)}.*.part"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:  # of a killed run: a living one writes all the time
                    left.unlink()
        write(file, fill, f".{os.getpid()}.part")
        file.with_suffix(".skipped.txt").unlink(missing_ok=True)
        if len(index["skipped"]) > SKIPPED_SHOWN:
            names = "".join(f"{path}: {why}\n" for path, why in index["skipped"])
            file.with_suffix(".skipped.txt").write_bytes(names.encode("utf-8", "backslashreplace"))
    except OSError as error:
        if hasattr(error, "of_image"):
            raise
        needs = f", and the decoded images need {len(paths) * 3 * index['side'] ** 2 / 1e6:.0f} MB"
        raise unusable("data_dir", data_dir, error, needs) from error
    return index
