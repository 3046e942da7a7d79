"""Image files -> pixels: every kind of file, as a person sees it."""

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from harness.decode import Damaged, decode


def save_16_bit(file, grey):
    Image.fromarray(np.asarray(grey, np.uint16) * 257).save(file)


def save_float(file, grey):
    Image.fromarray(np.asarray(grey, np.float32) / 255).save(file)


def save_turned(file, patch):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees counter-clockwise
    patch.rotate(90, expand=True).save(file, exif=exif, quality=95)


def save_animated(file, patch):
    patch.save(file, save_all=True, append_images=[Image.new("RGB", patch.size)])


FORMATS = {
    "grey.png": lambda file, patch: patch.convert("L").save(file),
    "palette.png": lambda file, patch: patch.quantize(256).save(file),
    "transparent.png": lambda file, patch: patch.convert("RGBA").save(file),
    "cmyk.jpg": lambda file, patch: patch.convert("CMYK").save(file, quality=95),
    "deep.png": lambda file, patch: save_16_bit(file, patch.convert("L")),
    "float.tif": lambda file, patch: save_float(file, patch.convert("L")),
    "turned.jpg": save_turned,
    "animated.gif": save_animated,
    "jpeg_by_another_name.png": lambda file, patch: patch.save(file, "JPEG", quality=95),
    "bitmap.bmp": lambda file, patch: patch.save(file),
    "web.webp": lambda file, patch: patch.save(file, quality=95),
}


@pytest.mark.parametrize("name", FORMATS)
def test_any_image_that_pillow_opens(name, tmp_path, patches):
    FORMATS[name](tmp_path / name, patches[12])
    pixels = decode(tmp_path / name, 64)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    expected = patches[12].convert("L") if name in ("grey.png", "deep.png", "float.tif") else patches[12]
    difference = np.abs(pixels.astype(int) - np.asarray(expected.convert("RGB"), int)).mean()
    assert difference < 6, f"{name} is off by {difference} grey levels"


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "empty.png")
    assert (decode(tmp_path / "empty.png", 32) == 255).all()


def test_resized_by_the_shortest_side_and_cropped_to_the_centre(tmp_path):
    image = Image.new("RGB", (300, 100), "black")
    image.paste("red", (100, 0, 200, 100))
    image.save(tmp_path / "wide.png")
    assert (decode(tmp_path / "wide.png", 50)[:, 2:-2] == (255, 0, 0)).all()


def test_good_pictures_in_odd_files(tmp_path, patches):
    text, plain = PngInfo(), patches[0].resize((256, 192))
    for i in range(4):
        text.add_text(f"settings {i}", "x" * 2**20, zip=True)
    plain.save(tmp_path / "text.png", pnginfo=text)
    assert (decode(tmp_path / "text.png", 64) == decode_image(plain, tmp_path)).all()
    for options in ({}, {"progressive": True}):
        plain.save(tmp_path / "whole.jpg", quality=95, **options)
        content = (tmp_path / "whole.jpg").read_bytes()
        (tmp_path / "no-end.jpg").write_bytes(content[:-2])
        assert (decode(tmp_path / "no-end.jpg", 64) == decode(tmp_path / "whole.jpg", 64)).all()
        for share in (0.5, 0.9, 0.99):
            (tmp_path / "cut.jpg").write_bytes(content[: int(share * len(content))])
            with pytest.raises(Damaged, match="truncated"):
                decode(tmp_path / "cut.jpg", 64)


def decode_image(image, folder):
    image.save(folder / "plain.png")
    return decode(folder / "plain.png", 64)
