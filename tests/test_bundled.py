import hashlib
from collections import Counter

import numpy as np
import pytest
from PIL import ImageOps

from harness import bundled
from harness.errors import UsageError


def test_shape_of_imagewang():
    patches = bundled.list_patches()
    assert 2000 <= len(patches) <= 3000
    classes = Counter(path.rsplit("/")[-1].split("-")[0] for path, _, _ in patches)
    assert set(classes) == set(bundled.PHOTOS)
    assert set(classes.values()) == {bundled.PATCHES}
    per_split = {
        split: Counter(path.rsplit("/")[-1].split("-")[0] for path, s, _ in patches if s == split)
        for split in ("train", "val", "unsup")
    }
    easy, hard = list(bundled.PHOTOS)[: bundled.EASY_COUNT], list(bundled.PHOTOS)[bundled.EASY_COUNT :]
    assert len(easy) == len(hard)
    assert all(per_split["train"][name] == bundled.PATCHES for name in easy)
    for name in hard:
        assert [per_split[s][name] / bundled.PATCHES for s in ("train", "val", "unsup")] == [0.1, 0.3, 0.6]
    assert all(label == path.split("/")[1] for path, split, label in patches if split != "unsup")
    assert all(label is None for _, split, label in patches if split == "unsup")


def test_patches_of_different_splits_never_share_a_pixel():
    for name in bundled.PHOTOS:
        seen = {}
        width, height = bundled._photo(name).size
        for path, split, _ in bundled.list_patches():
            patch, left, top, side = path.rsplit("/")[-1].split("-")
            if patch == name:
                left, top, side = int(left), int(top), int(side)
                assert left >= 0 and top >= 0 and left + side <= width and top + side <= height
                seen.setdefault(split, np.zeros((height, width), bool))[top : top + side, left : left + side] = True
        assert sum(mask.astype(int) for mask in seen.values()).max() == 1


def test_a_patch_depends_on_its_own_pixels_alone(monkeypatch):
    path = next(path for path, split, _ in bundled.list_patches() if split == "val" and path.endswith("-192"))
    name, left, top, side = path.rsplit("/")[-1].split("-")
    box = (int(left), int(top), int(left) + int(side), int(top) + int(side))
    inverted = ImageOps.invert(bundled._photo(name))
    inverted.paste(bundled._photo(name).crop(box), box)
    before = bundled.load_patch(path, 64)
    monkeypatch.setattr(bundled, "_photo", lambda _: inverted)
    assert (bundled.load_patch(path, 64) == before).all()


def test_several_scales_and_something_in_every_patch():
    patches = bundled.list_patches()
    assert len({path.rsplit("-", 1)[1] for path, _, _ in patches}) == len(bundled.PATCH_SCALES)
    faint = [path for path, _, _ in patches if bundled.load_patch(path, 64).std() < 8]  # resizing takes a little
    assert not faint


def test_the_same_on_every_machine():
    """The boxes to the pixel; the pixels of a PNG, whose decoding leaves no choice, to the bit."""
    paths = "\n".join(path for path, _, _ in bundled.list_patches())
    assert (
        hashlib.sha256(paths.encode()).hexdigest() == "fc31e14fcf2b0d375b622defcd8301985a01d3f3f4684eba309c143f8516768b"
    )
    cat = b"".join(bundled.load_patch(path, 64).tobytes() for path in sorted(paths.split("\n")) if "/cat-" in path)
    assert hashlib.sha256(cat).hexdigest() == "95097e83996b117fe682682485db74e45ddb2b9bff354618daf031724ddd1a06"


def test_a_changed_wheel_is_noticed(monkeypatch):
    monkeypatch.setitem(bundled.PHOTOS, "cat", ("chelsea.png", "0" * 64))
    bundled._photo.cache_clear()
    with pytest.raises(UsageError, match="chelsea.png is missing or not the known file"):
        bundled.list_patches()
