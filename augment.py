"""Batches of views: random crop, flip and colour, computed on the device that the images are on.

Crop, flip and resize are separable, so a view is two matrix products, `rows @ image @ columns.T`, with a triangle
filter that is as wide as the reduction asks for (no aliasing, whatever the crop). Colour is linear in the pixel, so
brightness, contrast, saturation, hue and the normalisation are one 3 x 3 matrix and an offset per image.
"""

import functools
import math

import numpy as np
import torch

MEAN = torch.tensor([0.485, 0.456, 0.406])  # of ImageNet, which pretrained encoders expect
STD = torch.tensor([0.229, 0.224, 0.225])
GREY = torch.tensor([0.299, 0.587, 0.114])  # luma, ITU-R BT.601
TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
FROM_YIQ = torch.linalg.inv(TO_YIQ)

CROP = 0.3  # smallest share of the image that a view shows
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height of the crop
BRIGHTNESS = CONTRAST = SATURATION = 0.4  # factors drawn from 1 ± this
HUE = 0.1  # turn of the hue circle, ±
GREY_SHARE = 0.1  # share of views without colour


def seed_of(*key: int) -> int:
    """A 64-bit seed that depends on `key` alone, such as (seed, epoch, step)."""
    words = [len(key), *map(abs, key)]  # with the length, since a SeedSequence cannot tell trailing zeros apart
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator(*key: int) -> torch.Generator:
    """A CPU random generator that depends on `key` alone. Numbers are always drawn on the CPU, so that every device
    gets the same ones."""
    return torch.Generator().manual_seed(seed_of(*key))


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device` without making the CPU wait for a GPU."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@functools.cache
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MEAN, STD and GREY on a device, moved there once: a copy in every step would make the CPU wait for a GPU."""
    return MEAN.to(device), STD.to(device), GREY.to(device)


def augment(images: torch.Tensor, size: int, rng: torch.Generator, crop: float = CROP) -> torch.Tensor:
    """Random views of a batch, crop, flip, colour, drawn per image; normalised: B 3 H W uint8 -> B 3 S S, S = size.
    `crop` is the smallest share of the image that a view shows, in (0, 1]."""
    B = len(images)
    draws = torch.rand(B, 10, generator=rng).unbind(1)

    area = _between(draws[0], crop, 1.0)
    aspect = _between(draws[1], *map(math.log, CROP_ASPECT)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    left, top = draws[2] * (1 - width), draws[3] * (1 - height)
    flip = draws[4] < 0.5
    left, width = torch.where(flip, left + width, left), torch.where(flip, -width, width)

    brightness = _between(draws[5], 1 - BRIGHTNESS, 1 + BRIGHTNESS)
    contrast = _between(draws[6], 1 - CONTRAST, 1 + CONTRAST)
    saturation = _between(draws[7], 1 - SATURATION, 1 + SATURATION)
    saturation = saturation * (draws[9] >= GREY_SHARE)
    turn = _between(draws[8], -HUE, HUE) * 2 * math.pi
    rotate = torch.zeros(B, 3, 3)  # of the chroma plane of YIQ
    rotate[:, 0, 0] = 1
    rotate[:, 1, 1] = rotate[:, 2, 2] = turn.cos() * saturation
    rotate[:, 2, 1] = turn.sin() * saturation
    rotate[:, 1, 2] = -rotate[:, 2, 1]
    colour = FROM_YIQ @ rotate @ TO_YIQ  # B 3 3

    # One transfer for everything that was drawn.
    table = torch.cat([t.reshape(B, -1) for t in (left, width, top, height, brightness, contrast, colour)], dim=1)
    left, width, top, height, brightness, contrast, *colour = send(table, images.device).unbind(1)
    colour = torch.stack(colour, dim=1).view(B, 3, 3)

    views = _crop(images, left, width, top, height, size)  # B 3 S S in [0, 1]
    grey = views.mean(dim=(2, 3)) @ _constants(views.device)[2]  # B
    matrix = (brightness * contrast)[:, None, None] * colour
    offset = (brightness * (1 - contrast) * grey)[:, None].expand(B, 3)
    return _affine(views, matrix, offset)


def whole_view(images: torch.Tensor, size: int) -> torch.Tensor:
    """The view that evaluation uses: the whole image, resized and normalised: B 3 H W uint8 -> B 3 S S."""
    zeros, ones = torch.zeros(len(images), device=images.device), torch.ones(len(images), device=images.device)
    return box_view(images, zeros, ones, zeros, ones, size)


def box_view(images, left, width, top, height, size: int) -> torch.Tensor:
    """Views of one box per image, normalised: B 3 H W uint8 -> B 3 S S. Left, width, top and height, B each, are shares
    of the image; a negative width mirrors."""
    B = len(images)
    matrix = torch.eye(3, device=images.device).expand(B, 3, 3)
    return _affine(_crop(images, left, width, top, height, size), matrix, torch.zeros(B, 3, device=images.device))


def to_pixels(views: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation, for pictures: B 3 S S float -> B 3 S S uint8."""
    mean, std, _ = _constants(views.device)
    pixels = views * std[:, None, None] + mean[:, None, None]
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _between(uniform: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * uniform


def _crop(images, left, width, top, height, size):
    """As `box_view`, but B 3 S S float in [0, 1]."""
    columns = _resampling(left, width, images.shape[3], size)  # B S W
    rows = _resampling(top, height, images.shape[2], size)  # B S H
    pixels = images.float() / 255
    return rows[:, None] @ pixels @ columns[:, None].transpose(2, 3)


def _resampling(start, length, pixels, size):
    """Matrices that resample `pixels` to `size` along an axis, from `start` on for `length`: B S P; rows sum to one."""
    device = start.device
    output = (torch.arange(size, device=device) + 0.5) / size  # S
    centre = (start[:, None] + length[:, None] * output) * pixels  # B S
    support = (length.abs() * pixels / size).clamp(min=1)  # B
    taps = torch.arange(pixels, device=device) + 0.5  # P
    weights = (1 - (centre[:, :, None] - taps).abs() / support[:, None, None]).clamp(min=0)  # B S P
    return weights / weights.sum(dim=2, keepdim=True)


def _affine(views, matrix, offset):
    """Colour matrix and offset per image, then the normalisation: one product over the pixels."""
    mean, std, _ = _constants(views.device)
    matrix = matrix / std[:, None]
    offset = (offset - mean) / std
    return torch.baddbmm(offset[:, :, None], matrix, views.flatten(2)).view_as(views)
