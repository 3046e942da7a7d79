"""Image files -> pixels, with Pillow."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

LARGEST_IMAGE = 2**26  # px; a larger one is not decoded, so that no header can fill the memory
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such a file is skipped and named


def decode(file: Path, side: int) -> np.ndarray:
    """Any image that Pillow opens, as a person sees it -> side side 3 uint8. Resized by the shortest side and cropped
    to the central square. An animation shows its first frame; EXIF's turn is applied; transparent pixels lie on white;
    16-bit and floating-point greys are scaled to 8 bits. Raises what Pillow raises, and ValueError for an image that
    claims more than 2^26 pixels."""
    with Image.open(file) as image:
        if image.width * image.height > LARGEST_IMAGE:
            size = f"{image.width} x {image.height} px"
            raise ValueError(f"it claims {size}; at most {LARGEST_IMAGE / 1e6:.0f} million fit")
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
