"""Image files -> pixels, with Pillow."""

import contextlib
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features

with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()

LARGEST_IMAGE = 2**26  # px; a larger one is not decoded, so that no header can fill the memory
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # bytes; programs store their settings there
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such a file is skipped and named


class Damaged(ValueError):
    """What is wrong with the bytes of an image, in a line."""


def decoders() -> list[str]:
    """What decides which images can be decoded: libraries and their versions."""
    heif = sys.modules.get("pillow_heif")
    return [f"Pillow {PIL.__version__}", f"AVIF {features.check('avif')}", f"HEIF {heif and heif.__version__}"]


def decode(file: Path, side: int) -> np.ndarray:
    """Any image that Pillow opens, as a person sees it -> side side 3 uint8. Resized by the shortest side and cropped
    to the central square. An animation shows its first frame; EXIF's turn is applied; transparent pixels lie on white;
    16-bit and floating-point greys are scaled to 8 bits; of a JPEG the end marker may be missing, but no pixel. Raises
    OSError if the file cannot be read, and Damaged if its bytes are no such image."""
    content = file.read_bytes()
    try:
        return _decode(content, side)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds
        if content.startswith(b"\xff\xd8"):
            with contextlib.suppress(Exception):
                # What stands before the end changes the picture only where pixels are missing.
                one, other = (_decode(content + more + b"\xff\xd9", side) for more in (b"", b"\x55" * 256))
                if (one == other).all():
                    return one
        raise Damaged(_reason(content, error)) from error


def _decode(content, side):
    with Image.open(io.BytesIO(content)) as image:
        image.draft(None, (side, side))  # large JPEGs are decoded at a reduced scale, never below this
        if image.width * image.height > LARGEST_IMAGE:
            size = f"{image.width} x {image.height} px"
            raise ValueError(f"it claims {size}; at most {LARGEST_IMAGE / 1e6:.0f} million fit")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = _to_8_bits(image)
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


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Deep greys (modes I, I;16, F) by the smallest usual range that holds them: [0, 1] of floats, 8 bits, 16 bits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32)).clip(0)
    ranges = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    top = next((r for r in ranges if values.max() <= r), values.max())
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))


def typical_side(files: Sequence[Path], sample: int = 64) -> int:
    """Median of the shortest sides of up to `sample` images spread over `files`, px; 0 if none of them opens."""
    sides = []
    for file in files[:: max(1, -(-len(files) // sample))]:
        try:
            with Image.open(file) as image:
                sides.append(min(image.size))
        except Exception:  # noqa: BLE001  damaged files raise many kinds; decoding will name this one
            continue
    return int(np.median(sides)) if sides else 0
