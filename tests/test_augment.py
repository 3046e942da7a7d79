import pytest
import torch
import torch.nn.functional as F

from augment import MEAN, STD, augment, draw_boxes, generator, make_views, pack, to_pixels, unpack, whole_view


def test_views_depend_on_the_key_alone(batch):
    one, two, other = (augment(batch, 32, generator(*key)) for key in ((1, 2, 3), (1, 2, 3), (1, 2, 4)))
    assert one.shape == (24, 3, 32, 32) and one.dtype == torch.float32
    assert torch.equal(one, two) and not torch.allclose(one, other)


def test_each_image_is_drawn_by_its_position_and_seen_alone(batch):
    views = augment(batch, 32, generator(0))
    changed = batch.clone()
    changed[5] = 0
    assert torch.equal(augment(changed, 32, generator(0))[6:], views[6:])
    same = augment(batch[:1].expand(24, -1, -1, -1), 32, generator(0))
    assert (same[1:] - same[:1]).abs().mean(dim=(1, 2, 3)).min() > 0.05  # every copy gets another view


def test_crop_flip_and_colour_all_happen(batch):
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, 0] = torch.arange(64, dtype=torch.uint8) * 4  # red rises from left to right
    views = augment(image.expand(400, -1, -1, -1), 32, generator(0))
    slope = views[:, 0, :, -1].mean(dim=1) - views[:, 0, :, 0].mean(dim=1)
    assert 0.4 < (slope > 0).float().mean() < 0.6  # half of them mirrored
    assert slope.abs().std() > 0.1  # crops of several widths, contrasts of several strengths
    grey = (to_pixels(views).float().std(dim=1).mean(dim=(1, 2)) < 2).float().mean()
    assert 0.05 < grey < 0.15


def test_a_view_stays_within_the_image(batch):
    """No padding shows: a bright image has no dark border in any view."""
    white = torch.full((200, 3, 64, 64), 255, dtype=torch.uint8)
    views = augment(white, 32, generator(0))
    assert (views.amax(dim=(2, 3)) - views.amin(dim=(2, 3))).max() < 1e-4


def test_resizing_does_not_alias():
    """The finest checkerboard is grey at half the size, not black or white."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255
    view = whole_view(board.to(torch.uint8).expand(1, 3, 64, 64), 32) * STD[:, None, None] + MEAN[:, None, None]
    assert (view - 0.5).abs().max() < 0.02


@pytest.mark.parametrize(
    "side,size", [(64, 32), (33, 31), (20, 32), (256, 8), (9, 9), (7, 2), (2, 8), (2, 1), (1, 8), (1, 1)]
)
def test_resizing_is_that_of_torch(side, size):
    """Every pixel that the filter covers counts, at the borders too."""
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=generator(0))
    resized = F.interpolate(images.float() / 255, size, mode="bilinear", antialias=True)
    views = whole_view(images, size) * STD[:, None, None] + MEAN[:, None, None]
    assert (views - resized).abs().max() < 1e-4


@pytest.mark.parametrize("left,top", [(0.0, 0.0), (0.5, 0.25), (0.5, 0.5)])
def test_a_crop_is_a_part_of_the_whole(batch, left, top):
    box = [torch.full((24,), value) for value in (left, 0.5, top, 0.5)]
    whole, size = whole_view(batch, 48), 24
    x, y = round(48 * left), round(48 * top)
    crop = make_views(batch, size, draw_boxes(*box))[0]
    assert (crop - whole[:, :, y : y + size, x : x + size]).abs().max() < 1e-4
    box[0], box[1] = box[0] + 0.5, -box[1]  # mirrored
    assert (make_views(batch, size, draw_boxes(*box))[0] - crop.flip(3)).abs().max() < 1e-4


def test_in_bf16_views_are_off_by_less_than_a_step_of_their_8_bits(batch):
    views = augment(batch, 32, generator(0))
    with torch.autocast("cpu", torch.bfloat16):
        coarse = augment(batch, 32, generator(0))
    off = (coarse - views).abs() * 255 * STD[:, None, None]
    assert coarse.dtype == torch.bfloat16 and off.mean() < 0.5 and off.max() < 5


def test_whole_is_the_image_and_to_pixels_undoes_the_normalisation(batch):
    assert torch.equal(to_pixels(whole_view(batch, 64)), batch)


def test_what_is_packed_is_unpacked():
    """Only GPUs use it. Shapes that are no multiple of eight bytes, parts of others, a number, several dtypes."""
    table = torch.randint(0, 256, (5, 7), generator=generator(0))
    kinds = torch.float64, torch.float16, torch.uint8, torch.bool
    drawn = [torch.tensor(3e-3), table, table[:, :3], table[0, ::2].float(), table[:0], *(table.to(k) for k in kinds)]
    for part, sent in zip(drawn, unpack(pack(drawn), drawn), strict=True):
        assert sent.dtype == part.dtype and torch.equal(sent, part)
