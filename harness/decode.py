"""Image files -> pixels, with Pillow."""

import contextlib
import io
import random
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features

with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

KINDS = {"I": "32-bit", "F": "floating-point"} | {f"I;16{order}": "16-bit" for order in ("", "B", "L", "N")}  # by mode
RANGE_SAMPLE, SCALES = 64, 12  # images to find a range in; times as bright as the next that make another scale
TOPS = {"floating-point": (1, 255, 65535), "16-bit": (255, 1023, 4095, 16383, 65535)}  # of usual ranges
MISSING = 1e30  # of floats: larger ones, infinite ones and NaN stand for what was not measured
LARGEST_IMAGE = 2**26  # px; a larger one is not decoded, so that no header can fill the memory
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # bytes; programs store their settings there
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such a file is skipped and named


class Damaged(ValueError):
    """What is wrong with the bytes of an image, in a line."""


class Ranges(dict):
    """What is black and what is white in images of more than 8 bits: {"16-bit", "32-bit" or "floating-point": [[low,
    high]]}; several pairs where images have several scales, as 12 bits among 16. A kind is looked up when it is first
    asked for: in `given`, or in a sample of `files`. So all images of a data set are scaled alike."""

    def __init__(self, files: Sequence[Path] = (), given: dict[str, list] | None = None):
        self.files, self.given, self.lock = files, given or {}, threading.Lock()

    def __missing__(self, kind):
        with self.lock:
            if kind not in self:
                self[kind] = self.given.get(kind) or _find_ranges(self.files, kind)
        return self[kind]

    def __str__(self):
        number = lambda value: f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: E731
        spans = lambda kind: " or ".join(f"{number(low)} to {number(high)}" for low, high in self[kind])  # noqa: E731
        return "".join(f"{kind} images: {spans(kind)} shown as black to white\n" for kind in self)


def _find_ranges(files: Sequence[Path], kind: str) -> list[list[float]]:
    """A range for each scale that a quarter of the images has: a usual one that holds the values, if they reach its
    half and fill a quarter of it; else from the lowest values to the highest, but those of odd images."""
    spans, ranges = [], []
    for file in random.Random(0).sample(files, len(files)):
        with contextlib.suppress(Exception), Image.open(file) as image:
            if KINDS.get(image.mode) == kind and image.width * image.height <= LARGEST_IMAGE:
                spans.append(_span(np.asarray(image)))
        if len(spans) == RANGE_SAMPLE:
            break
    spans = np.array(sorted(spans, key=lambda span: span[1]) or [(0, 1)])  # M 2
    cuts = [i for i, (_, high) in enumerate(spans) if i and high > SCALES * spans[i - 1, 1] > 0]
    for group in [group for group in np.split(spans, cuts) if 4 * len(group) >= len(spans)] or [spans]:
        low, high = (np.quantile(group[:, i], q, method="nearest").item() for i, q in ((0, 0.05), (1, 0.95)))
        top = next((top for top in TOPS.get(kind, TOPS["16-bit"]) if high <= 1.02 * top), 0)
        if low >= 0 and min(high, 2 * (high - low)) > top / 2 > 0:
            low, high = 0.0, float(top)
        ranges.append([low, high] if low < high else [min(low, 0.0), max(high, 1.0)])
    return ranges


def _span(values: np.ndarray) -> np.ndarray:
    """The lowest and highest value of an image H W, without the outer thousandths of its pixels."""
    values = values[:: 1 + values.shape[0] // 256, :: 1 + values.shape[1] // 256]
    return np.percentile(values[np.abs(values) < MISSING], (0.1, 99.9))


def decoders() -> list[str]:
    """What decides which images can be decoded: libraries and their versions."""
    heif = sys.modules.get("pillow_heif")
    return [f"Pillow {PIL.__version__}", f"AVIF {features.check('avif')}", f"HEIF {heif and heif.__version__}"]


def decode(file: Path, side: int, ranges: Ranges | None = None) -> np.ndarray:
    """Any image that Pillow opens, as a person sees it -> side side 3 uint8. Resized by the shortest side and cropped
    to the central square. An animation shows its first frame; EXIF's turn is applied; transparent pixels lie on white;
    greys of more than 8 bits are scaled by `ranges` (None: the image's own); of a JPEG the end marker may be missing,
    but no pixel. Raises OSError if the file cannot be read, and Damaged if its bytes are no such image."""
    content, ranges = file.read_bytes(), Ranges([file]) if ranges is None else ranges
    try:
        return _decode(content, side, ranges)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds
        if content.startswith(b"\xff\xd8"):
            with contextlib.suppress(Exception):
                # What stands before the end changes the picture only where pixels are missing.
                one, other = (_decode(content + more + b"\xff\xd9", side, ranges) for more in (b"", b"\x55" * 256))
                if (one == other).all():
                    return one
        raise Damaged(_reason(content, error)) from error


def _decode(content, side, ranges):
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (side, side))  # large JPEGs are decoded at a reduced scale, never below this
        if image.width * image.height > LARGEST_IMAGE:
            size = f"{image.width} x {image.height} px"
            raise ValueError(f"it claims {size}; at most {LARGEST_IMAGE / 1e6:.0f} million fit")
        image = ImageOps.exif_transpose(image)
        if kind := KINDS.get(image.mode):
            image = _to_8_bits(image, ranges[kind])
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC))


def _reason(content, error):
    start = content[:64].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the picture; `git lfs pull` fetches it"
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page, not a picture; fetch it again"
    if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheif"):
        return "HEIC; it is read once pillow-heif is installed"
    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow knows"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _to_8_bits(image: Image.Image, ranges: list[list[float]]) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    if not (np.abs(values) < MISSING).any():
        raise ValueError("no pixel has a value")
    scale = np.log(max(_span(values)[1], 1e-30)) if len(ranges) > 1 else 0
    low, high = min(ranges, key=lambda ends: abs(scale - np.log(max(ends[1], 1e-30))))
    values = (np.nan_to_num(values, nan=low).clip(low, high) - low) * (255 / (high - low))
    return Image.fromarray(values.round().astype(np.uint8))


def shortest_sides(files: Sequence[Path], sample: int = 64) -> list[int]:
    """The shortest sides of up to `sample` images spread over `files`, px, without those that do not open."""
    sides = []
    for file in files[:: max(1, -(-len(files) // sample))]:
        with contextlib.suppress(Exception), Image.open(file) as image:  # decoding will name a damaged file
            sides.append(min(image.size))
    return sides
