"""Batches of views: random crop, flip and colour.

Crop, flip and resize are separable, so a view is two matrix products, `rows @ image @ columns.T`, with a triangle
filter that is as wide as the reduction asks for (no aliasing, whatever the crop). Colour is linear in the pixel, so
brightness, contrast, saturation, hue and the normalisation are one 3 x 3 matrix and an offset per image.

    draw_views(count, rng)           -> what varies between views, drawn on the CPU
    make_views(images, size, table)  -> all views of a batch at once, on the device that the images are on"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

MEAN = torch.tensor([0.485, 0.456, 0.406])  # of ImageNet
STD = torch.tensor([0.229, 0.224, 0.225])
GREY = torch.tensor([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
# A colour matrix is luma, plus chroma times the cosine of its turn, plus turned chroma times the sine: 3 9.
CHROMA = np.zeros((3, 3, 3), np.float32)
CHROMA[0, 0, 0] = CHROMA[1, 1, 1] = CHROMA[1, 2, 2] = CHROMA[2, 2, 1] = 1
CHROMA[2, 1, 2] = -1
CHROMA = (np.linalg.inv(TO_YIQ) @ CHROMA @ TO_YIQ).reshape(3, 9)
WHITE = 255 * STD.numpy()[:, None]  # what a pixel's colours are divided by: 3 1
MEAN_GREY, BLACK = GREY.numpy() / WHITE, (-MEAN / STD).numpy()  # 3 3, 3

CROP = 0.3  # smallest share of the image that a view shows
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height of the crop
BRIGHTNESS = CONTRAST = SATURATION = 0.4  # factors drawn from 1 ± this
HUE = 0.1  # turn of the hue circle, ±
GREY_SHARE = 0.1  # share of views without colour
LOW, HIGH = np.array([  # the ends of what `draw_views` draws: 10
    (CROP, 1), tuple(map(math.log, CROP_ASPECT)), (0, 1), (0, 1), (0, 1),  # area, aspect, left, top, flip
    *((1 - spread, 1 + spread) for spread in (BRIGHTNESS, CONTRAST, SATURATION)),
    (-2 * math.pi * HUE, 2 * math.pi * HUE), (0, 1),  # hue, grey
], np.float32).T  # fmt: skip


def seed_of(*key: int) -> int:
    """A 64-bit seed that depends on `key` alone, such as (seed, epoch, step)."""
    words = [len(key), *map(abs, key)]  # with the length, since a SeedSequence cannot tell trailing zeros apart
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator(*key: int) -> torch.Generator:
    """A CPU random generator that depends on `key` alone: numbers are drawn on the CPU, the same for every device."""
    return torch.Generator().manual_seed(seed_of(*key))


def send(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy CPU tensors to `device`. To a GPU they go as one pinned copy, for which the CPU does not wait."""
    if device.type != "cuda" or not tensors:
        return [tensor.to(device) for tensor in tensors]
    return unpack(pack(tensors, pinned=True).to(device, non_blocking=True), tensors)


def pack(tensors: Sequence[torch.Tensor], pinned: bool = False) -> torch.Tensor:
    """The bytes of several CPU tensors, not bfloat16, in one buffer, each begins at a multiple of 8: uint8."""
    data = b"".join(tensor.numpy().tobytes() + bytes(-tensor.nbytes % 8) for tensor in tensors)
    buffer = torch.empty(len(data), dtype=torch.uint8, pin_memory=pinned)
    buffer.numpy()[:] = np.frombuffer(data, np.uint8)
    return buffer


def unpack(buffer: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of a buffer that `pack` made, with the shapes and dtypes of `like`. Nothing is copied."""
    parts = buffer.split([t.nbytes + -t.nbytes % 8 for t in like])
    return [part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in zip(parts, like, strict=True)]


@functools.cache
def _centres(count: int, device: torch.device) -> torch.Tensor:
    """The middles of `count` equal parts of [0, 1]: count. Cached: a copy in each step would make the CPU wait."""
    return ((torch.arange(count) + 0.5) / count).to(device)


def augment(images: torch.Tensor, size: int, rng: torch.Generator) -> torch.Tensor:
    """Random views of a batch, crop, flip, colour, drawn per image; normalised: B 3 H H uint8 -> B 3 S S, S = size."""
    return make_views(images, size, send([draw_views(len(images), rng)], images.device)[0])[0]


def draw_views(count: int, rng: torch.Generator) -> torch.Tensor:
    """Draw what `augment` varies, for `count` views, on the CPU: a table for `make_views`."""
    draws = LOW + (HIGH - LOW) * torch.rand(count, 10, generator=rng).numpy()  # NumPy is faster with few numbers
    area, aspect, left, top, flip, brightness, contrast, saturation, turn, grey = draws.T
    aspect = np.exp(aspect)
    width, height = np.minimum(np.sqrt((area * aspect, area / aspect)), 1)
    left, top = left * (1 - width), top * (1 - height)
    left, width = left + width * (flip < 0.5), np.where(flip < 0.5, -width, width)
    chroma = np.ones((count, 3), np.float32)
    np.multiply((np.cos(turn), np.sin(turn)), saturation * (grey >= GREY_SHARE), out=chroma.T[1:])
    colour = ((brightness * contrast)[:, None] * chroma @ CHROMA).reshape(count, 3, 3)
    return draw_boxes(left, width, top, height, colour, brightness * (1 - contrast))


def draw_boxes(left, width, top, height, colour=((1, 0, 0), (0, 1, 0), (0, 0, 1)), tint=0.0) -> torch.Tensor:
    """A table for `make_views` of N views, on the CPU, from arrays or tensors there. Left, width, top and height, N
    each, are shares of the image; a negative width mirrors. `colour`, N 3 3, takes pixels to colours (default: as they
    are); `tint`, N, times the view's mean grey is added. The table is flat: left, top, width, height, N each, then 9
    numbers of colour for each view, 9 of tint for each, and 3 of black for each: 25 * N."""
    N, table = len(left), np.empty(25 * len(left), np.float32)
    table[: 4 * N].reshape(4, N)[:] = left, top, width, height
    np.divide(colour, WHITE, out=table[4 * N : 13 * N].reshape(N, 3, 3))
    np.multiply(np.reshape(tint, (-1, 1, 1)), MEAN_GREY, out=table[13 * N : 22 * N].reshape(N, 3, 3))
    table[22 * N :].reshape(N, 3)[:] = BLACK
    return torch.from_numpy(table)


def make_views(images: torch.Tensor, size: int, table: torch.Tensor) -> torch.Tensor:
    """Views of a batch, normalised, from a table for V of each image, on its device: one of every image first, then
    the second ones, and so on: B 3 H H uint8 -> V B 3 S S, S = size. In autocast's precision, if it is on."""
    B, _, H, W = images.shape
    N, kind = len(table) // 25, images.device.type
    V, precision = N // B, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    boxes, colours = table.split([4 * N, 21 * N])
    # Matrices that resample H pixels to S, along both axes; the filter is a triangle, and zero beyond a few pixels.
    start, length = (H * boxes).view(2, 2 * N, 1)  # px
    centre = torch.addcmul(start, length, _centres(size, images.device))  # 2N S
    support = length.abs().clamp_(min=size)  # 2N 1  S times half of the filter's width
    count = min(H, math.ceil(2 * max(H / size, 1)))  # pixels below a filter
    first = torch.sub(centre, support, alpha=1 / size).round_().clamp_(0, H - count)  # 2N S
    pixels = torch.add(first[:, :, None], _centres(count, images.device), alpha=count)  # 2N S count  their middles
    weights = torch.sub(support[:, :, None], (pixels - centre[:, :, None]).abs_(), alpha=size).clamp_(min=0)
    shares = torch.div(weights, weights.sum(dim=2, keepdim=True), out=torch.empty_like(weights, dtype=precision))
    filled = (part.view(2, V, B, size, count).transpose(1, 2) for part in (pixels.long(), shares))
    columns, rows = shares.new_zeros(2, B, V, size, H).scatter_(4, *filled)
    pixels = images.transpose(1, 2).to(precision, memory_format=torch.contiguous_format)  # B H 3 W
    views = (rows.view(B, V * size, H) @ pixels.view(B, H, 3 * W)).view(B, V, size * 3, W)
    views = (views @ columns.transpose(2, 3)).view(B, V, size, 3, size)  # B V S 3 S, in [0, 255]
    views = views.permute(1, 0, 3, 2, 4).reshape(N, 3, size * size)
    colour, tint, black = (part.view(N, 3, -1) for part in colours.to(precision).split([9 * N, 9 * N, 3 * N]))
    offset = torch.baddbmm(black, tint, views.mean(dim=2, keepdim=True))  # N 3 1
    return torch.baddbmm(offset, colour, views).view(V, B, 3, size, size)


def whole_view(images: torch.Tensor, size: int) -> torch.Tensor:
    """The view that evaluation uses: the whole image, resized and normalised: B 3 H H uint8 -> B 3 S S."""
    zeros, ones = torch.zeros(len(images)), torch.ones(len(images))
    return make_views(images, size, *send([draw_boxes(zeros, ones, zeros, ones)], images.device))[0]


def to_pixels(views: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation, for pictures: B 3 S S float -> B 3 S S uint8."""
    mean, std = (part[:, None, None].to(views.device) for part in (MEAN, STD))
    pixels = views * std + mean
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
