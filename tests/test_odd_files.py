"""Odd images, each made here from one photograph: alone, and all of them in one folder among ordinary ones."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from data import list_data, open_images
from harness import bundled
from harness.decode import Damaged, decode

SIDE = 64
SIZE = 200, 150  # px


@pytest.fixture(scope="module")
def photo():
    """A colour photograph, from black to white."""
    photo = Image.fromarray(bundled.load_patch(next(p for p, _, _ in bundled.list_patches() if "coffee" in p), SIDE))
    values = np.asarray(photo.resize(SIZE, Image.Resampling.BICUBIC), float)
    low, high = np.percentile(values, (1, 99))
    return Image.fromarray(((values - low) * 255 / (high - low)).clip(0, 255).astype(np.uint8))


def luma(photo):
    return np.asarray(photo.convert("L"), float)


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def deep(values, dtype, kind="TIFF"):
    return saved(Image.fromarray(np.asarray(values).round(6).astype(dtype)), kind)


def big_endian(values):
    """A 16-bit TIFF in the byte order of a Macintosh: I;16B."""
    return tiff(np.asarray(values).astype(">u2").tobytes(), ">", 1, 16)


def tiff(pixels, order, channels, bits):
    """A plain TIFF of these bytes, written by hand: header, pixels, bits of the channels, directory."""
    width, height = SIZE
    after = 8 + len(pixels)
    short, long = (lambda n: ("HHIHH", 3, 1, n, 0)), (lambda n: ("HHII", 4, 1, n))
    entries = {256: long(width), 257: long(height), 258: short(bits), 259: short(1), 262: short(1 + (channels == 3))}
    entries |= {273: long(8), 277: short(channels), 278: long(height), 279: long(len(pixels))}
    if channels == 3:
        entries[258] = ("HHII", 3, 3, after)
    directory = struct.pack(f"{order}H", len(entries))
    for tag, (form, *values) in entries.items():
        directory += struct.pack(order + form, tag, *values)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", after + 6)
    return start + pixels + struct.pack(f"{order}3H", bits, bits, bits) + directory + bytes(4)


def turned(photo, entries):
    """A JPEG that EXIF turns upright. entries: of its directory, after the orientation"""
    directory = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + entries
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(directory) // 12) + directory + bytes(4 + 8)
    return saved(photo.rotate(90, expand=True), "JPEG", quality=95, exif=exif)


def with_text(photo):
    text = PngInfo()
    for i in range(2):
        text.add_text(f"settings {i}", "x" * 2**20, zip=True)
    return saved(photo, "PNG", pnginfo=text)


def half_transparent(photo):
    image = photo.convert("RGBA")
    image.putalpha(128)
    return saved(image, "PNG")


def one_outlier(photo):
    values = luma(photo) / 255
    values[40, 60] = 1.004
    return deep(values, np.float32)


# The name of the file: how to make it of the photograph, and what is right: the photograph, its luma, what is expected
# of both on white, or why the file is skipped.
COLOUR, GREY, HALF, BLANK, ANY = "colour", "grey", "half", "blank", "any"
ODD = {
    "a.avif": (lambda p: saved(p, "AVIF", quality=90), COLOUR),
    "anim.gif": (lambda p: saved(p, "GIF", save_all=True, append_images=[Image.new("RGB", SIZE)]), COLOUR),
    "apng_first_blank.png": (
        lambda p: saved(Image.new("RGBA", SIZE), "PNG", save_all=True, append_images=[p.convert("RGBA")]),
        BLANK,
    ),
    "jpeg_named.png": (lambda p: saved(p, "JPEG", quality=95), COLOUR),
    "la.png": (lambda p: saved(p.convert("LA"), "PNG"), GREY),
    "p_trns_index.png": (lambda p: saved(p.quantize(255), "PNG", transparency=255), COLOUR),
    "phone_mpo.jpg": (lambda p: saved(p, "MPO", save_all=True, quality=95, append_images=[p.resize((50, 40))]), COLOUR),
    "rgba_half.png": (half_transparent, HALF),
    "multi.tif": (lambda p: saved(p, "TIFF", save_all=True, append_images=[Image.new("RGB", SIZE)]), COLOUR),
    "cmyk_photoshop_bytes.jpg": (lambda p: saved(p.convert("CMYK"), "JPEG", quality=95), COLOUR),
    "i16_full.png": (lambda p: deep(luma(p) * 257, np.uint16, "PNG"), GREY),
    "i16B_full.tif": (lambda p: big_endian(luma(p) * 257), GREY),
    "u16_three_channels_satellite.tif": (
        lambda p: tiff((np.asarray(p).astype("<u2") * 257).tobytes(), "<", 3, 16),
        COLOUR,
    ),
    "exif_orient6.jpg": (lambda p: turned(p, b""), COLOUR),
    "exif_zero_rational_orient6.jpg": (lambda p: turned(p, struct.pack("<HHII", 0x011A, 5, 1, 8 + 2 + 24 + 4)), COLOUR),
    "float_01.tif": (lambda p: deep(luma(p) / 255, np.float32), GREY),
    "float_0_3000.tif": (lambda p: deep(luma(p) / 255 * 3000, np.float32), GREY),
    "float_overshoot_1.004.tif": (one_outlier, GREY),
    "i16_12bit.png": (lambda p: deep(luma(p) * 16, np.uint16, "PNG"), GREY),
    "i16_12bit_microscope.tif": (lambda p: deep(luma(p) * 16, np.uint16), GREY),
    "png_text_2MB.png": (with_text, COLOUR),
    "trunc_no_eoi.jpg": (lambda p: saved(p, "JPEG", quality=95)[:-2], COLOUR),
    "trunc_90.jpg": (lambda p: (lambda whole: whole[: len(whole) * 9 // 10])(saved(p, "JPEG")), "truncated"),
    "png_trunc_80.png": (lambda p: (lambda whole: whole[: len(whole) * 8 // 10])(saved(p, "PNG")), "truncated"),
    "pointer_lfs.png": (
        lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "saved_page.jpg": (lambda p: b"<!DOCTYPE html><html><body>not found</body></html>", "a web page"),
    "IMG_0001.HEIC": (lambda p: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400), "pillow-heif"),
    "one_pixel.png": (lambda p: saved(p.resize((1, 1)), "PNG"), ANY),
    "panorama_10000x20.png": (lambda p: saved(p.resize((10000, 20)), "PNG"), ANY),
}


def check(pixels, right, photo):
    """pixels side side 3 uint8"""
    assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
    if right == BLANK:
        assert (pixels == 255).all()
    elif right != ANY:
        whole = photo.convert("L").convert("RGB") if right == GREY else photo
        expected = decode_image(whole)
        expected = expected / 2 + 127.5 if right == HALF else expected
        assert np.abs(pixels - expected).mean() < 5


def decode_image(image):
    """What an ordinary picture looks like, as floats."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(square, float)


def needs_avif(name):
    return name.endswith(".avif") and not features.check("avif")


@pytest.mark.parametrize("name", ODD)
def test_alone(name, photo, tmp_path):
    if needs_avif(name):
        pytest.skip("this Pillow has no AVIF")
    make, right = ODD[name]
    (tmp_path / name).write_bytes(make(photo))
    if right in (COLOUR, GREY, HALF, BLANK, ANY):
        check(decode(tmp_path / name, SIDE), right, photo)
    else:
        with pytest.raises(Damaged, match=right):
            decode(tmp_path / name, SIDE)


def test_all_in_one_folder_among_ordinary_photographs(photo, folder, tmp_path):
    names = [name for name in ODD if not needs_avif(name)]
    for file in folder.iterdir():
        Image.open(file).resize(SIZE).save(file.with_suffix(".bmp"))
        file.unlink()
    for name in names:
        (folder / name).write_bytes(ODD[name][0](photo))
    images = open_images(list_data(str(folder)), SIDE // 2, tmp_path / "data")
    rows = {entry.path: row for row, entry in enumerate(images.listing.entries)}
    skipped = dict(images.listing.skipped)
    assert len(rows) + len(skipped) == 40 + len(names)
    for name in names:
        right = ODD[name][1]
        if name in rows:
            check(images.pixels[rows[name]].transpose(1, 2, 0), right, photo)
        else:
            assert right in skipped[name], name
    assert {name for name in names if name in skipped} == {
        name for name in names if ODD[name][1] not in (COLOUR, GREY, HALF, BLANK, ANY)
    }
