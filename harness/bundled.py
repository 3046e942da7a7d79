"""The bundled data set: patches of the photographs in scikit-image's wheel, one class each, split as fast.ai's Image网.

Patches of one split may overlap; those of different splits never share a pixel. docs/data.md describes it."""

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from harness.errors import ValueProblem

PHOTOS = {  # class: file and SHA-256, as in scikit-image's wheel
    # Easy, all of it in train/.
    "astronaut": ("astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
    "cameraman": ("camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
    "cat": ("chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
    "cell": ("cell.png", "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515"),
    "clock": ("clock_motion.png", "f029226b28b642e80113d86622e9b215ee067a0966feaf5e60604a1e05733955"),
    "coffee": ("coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
    "coins": ("coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba"),
    "rocket": ("rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
    # Hard: a tenth in train/, three in val/, six in unsup/.
    "brick": ("brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
    "grass": ("grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"),
    "gravel": ("gravel.png", "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12"),
    "hubble": ("hubble_deep_field.jpg", "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4"),
    "moon": ("moon.png", "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577"),
    "motorcycle": ("motorcycle_left.png", "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
    "retina": ("retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6"),
    "tissue": ("ihc.png", "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"),
}
EASY_COUNT = 8  # the first so many of PHOTOS
PATCHES = 160  # of a class
PATCH = 64  # px, what each is resized to
PATCH_SCALES = (64, 96, 128, 192, 256)  # px of the photograph that a patch shows
FAINTEST = 10.0  # standard deviation of a patch's greys, of 255; with less a person sees an even field
# Regions of a hard photograph, in shares of its width and height, and their shares of the patches; they share no pixel.
REGIONS = {"unsup": ((0, 0.4, 1, 1), 0.6), "val": ((0.25, 0, 1, 0.4), 0.3), "train": ((0, 0, 0.25, 0.4), 0.1)}
WHOLE = {"train": ((0, 0, 1, 1), 1.0)}


def list_patches() -> list[tuple[str, str, str | None]]:
    """(path, split, class or None) of every patch, sorted by path; `load_patch` takes the path. Raises UsageError if
    scikit-image is not installed or ships other files."""
    patches = []
    for number, name in enumerate(PHOTOS):
        for split, (region, share) in (WHOLE if number < EASY_COUNT else REGIONS).items():
            folder, label = ("unsup", None) if split == "unsup" else (f"{split}/{name}", name)
            for left, top, side in _boxes(name, region, round(share * PATCHES)):
                patches.append((f"{folder}/{name}-{left}-{top}-{side}", split, label))
    return sorted(patches)


def load_patch(path: str, side: int) -> np.ndarray:
    """The patch of that path -> side side 3 uint8."""
    name, left, top, scale = path.rsplit("/", 1)[1].split("-")
    left, top, scale = int(left), int(top), int(scale)
    # Cropped first: resizing a box of the photograph would look at pixels around it, which may be another split's.
    patch = _photo(name).crop((left, top, left + scale, top + scale)).resize((PATCH, PATCH), Image.Resampling.BICUBIC)
    return np.asarray(patch if side == PATCH else patch.resize((side, side), Image.Resampling.BICUBIC))


def _boxes(name: str, region: tuple[float, float, float, float], count: int) -> list[tuple[int, int, int]]:
    """`count` squares (left, top, side) in a region, px, spread evenly by the R2 sequence (Roberts 2018)."""
    photo = _photo(name)
    grey = np.asarray(photo.convert("L"), dtype=np.float32)
    x0, y0, x1, y1 = (round(edge * length) for edge, length in zip(region, photo.size * 2, strict=True))
    scales = [scale for scale in PATCH_SCALES if scale <= min(x1 - x0, y1 - y0)]
    boxes, i = [], 0
    while len(boxes) < count:
        side = scales[i % len(scales)]
        left = x0 + int(i * 0.7548776662466927 % 1 * (x1 - x0 - side + 1))
        top = y0 + int(i * 0.5698402909980532 % 1 * (y1 - y0 - side + 1))
        if grey[top : top + side, left : left + side].std() >= FAINTEST:
            boxes.append((left, top, side))
        i += 1
    return boxes


@functools.cache
def _photo(name: str) -> Image.Image:
    file, sha256 = PHOTOS[name]
    package = importlib.util.find_spec("skimage")
    if package is None:
        problem = "needs scikit-image: pip install -r requirements.txt, or give a folder of images"
        raise ValueProblem("data", "photos", problem)
    path = Path(package.submodule_search_locations[0], "data", file)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        problem = f": {path} is missing or not the known file; install another release of scikit-image (0.22 to 0.26 "
        problem += "are known to work), or give a folder of images"
        raise ValueProblem("data", "photos", problem)
    with Image.open(path) as image:
        return image.convert("RGB")
