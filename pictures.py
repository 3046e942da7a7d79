"""Pictures of what the network sees, says and has learnt, drawn with Pillow."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from augment import to_pixels

VIEW = 96  # px, side of a view in a picture
GAP = 8
LINE = 24  # characters of a caption, at most
CAPTION = 46  # px below a view: two bars with their numbers
INK, PAPER, TRUE, PREDICTED = (30, 30, 30), (255, 255, 255), (120, 120, 120), (31, 119, 180)


def draw_mixtures(question, predicted: torch.Tensor | None = None, rows: int = 8) -> Image.Image:
    """The first mixtures of a question, each beside its candidates with their true and predicted weights as bars.

    question   see tasks.Question
    predicted  B n  the weights that the network answered; None: the question alone
    """
    rows, n = min(rows, len(question.weights)), question.weights.shape[1]
    views = to_pixels(torch.cat([question.mixtures[:rows], question.asked[question.candidates[:rows]].flatten(0, 1)]))
    tiles = [_tile(view) for view in views.cpu().permute(0, 2, 3, 1).numpy()]
    weights = question.weights[:rows].tolist()
    answers = None if predicted is None else predicted[:rows].tolist()
    width, height = VIEW + GAP, VIEW + CAPTION
    sheet = Image.new("RGB", (GAP + (n + 1) * width + GAP, GAP + rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = GAP + row * height
        sheet.paste(tiles[row], (GAP, top))
        draw.text((GAP, top + VIEW + 2), "mixture", INK, _font())
        if answers:
            k = sum(weight > 0 for weight in weights[row])
            named = sorted(range(n), key=lambda i: -answers[row][i])[:k]
            right = all(weights[row][i] > 0 for i in named)
            said = "sources found" if right else "WRONG sources"
            draw.text((GAP, top + VIEW + 16), said, INK, _font(bold=not right))
            if not right:
                draw.rectangle((GAP - 3, top - 3, GAP + VIEW + 2, top + VIEW + 2), outline=INK, width=4)
        for i in range(n):
            left = GAP + (i + 1) * width + GAP
            sheet.paste(tiles[rows + row * n + i], (left, top))
            _bar(draw, left, top + VIEW + 3, "true", weights[row][i], TRUE)
            if answers:
                _bar(draw, left, top + VIEW + 19, "said", answers[row][i], PREDICTED)
    return sheet


def draw_confusion(said: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> Image.Image:
    """What images of each class were taken for: a row for each class that occurs, a column for each that is answered.

    said, labels  M int64, indices into `classes`. A cell has the per cent of its row's images; right ones are framed.
    """
    counts = torch.zeros(len(classes), len(classes)).index_put_((labels, said), torch.ones(()), accumulate=True)
    rows, names = labels.unique().tolist(), [name[:16] for name in classes]
    cell, margin = 34, 8 + round(max(_font().getlength(name) for name in names))
    sheet = Image.new("RGB", (2 * margin + len(classes) * cell, margin + len(rows) * cell + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        slip = Image.new("RGB", (margin, 16), PAPER)
        ImageDraw.Draw(slip).text((4, 0), name, INK, _font())
        sheet.paste(slip.rotate(90, expand=True), (margin + column * cell + 9, 0))
    for line, label in enumerate(rows):
        top = margin + line * cell
        draw.text((4, top + 10), names[label], INK, _font())
        for column, count in enumerate(counts[label].tolist()):
            share = count / counts[label].sum().item()
            shade = tuple(round(255 + share * (dark - 255)) for dark in PREDICTED)
            left = margin + column * cell
            right = column == label
            draw.rectangle(
                (left, top, left + cell - 2, top + cell - 2), shade, INK if right else TRUE, 2 if right else 1
            )
            if count:
                text = f"{100 * share:.0f}"
                place = (left + (cell - 2 - _font().getlength(text)) / 2, top + 10)
                draw.text(place, text, PAPER if share > 0.5 else INK, _font(bold=right))
    return sheet


def draw_sheet(images: np.ndarray, captions: list[tuple[str, str] | None], columns: int = 6) -> Image.Image:
    """A contact sheet: images M 3 H W uint8, each above two lines of text, the second one bold; None: a gap."""
    fits = max((_font(bold=True).getlength(line[:LINE]) for pair in captions if pair for line in pair), default=0)
    width, height = max(VIEW, math.ceil(fits)) + GAP, VIEW + 46
    lines = max(1, -(-len(captions) // columns))
    sheet = Image.new("RGB", (GAP + columns * width, GAP + lines * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, pair in enumerate(captions):
        if pair is None:
            continue
        first, second = pair
        left, top = GAP + i % columns * width, GAP + i // columns * height
        sheet.paste(_tile(images[i].transpose(1, 2, 0)), (left, top))
        draw.text((left, top + VIEW + 2), first[:LINE], INK, _font())
        draw.text((left, top + VIEW + 17), second[:LINE], INK, _font(bold=True))
    return sheet


def draw_filters(kernels: torch.Tensor, columns: int = 16) -> Image.Image:
    """The first layer's kernels, F 3 h w, as colours: grey is zero, the strongest weight of a kernel is full."""
    kernels = kernels.detach().float().cpu()
    strongest = kernels.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    tiles = ((kernels / strongest + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    side, lines = VIEW // 2, -(-len(tiles) // columns)
    sheet = Image.new("RGB", (GAP + columns * (side + GAP), GAP + lines * (side + GAP)), PAPER)
    for i, tile in enumerate(tiles):
        place = GAP + i % columns * (side + GAP), GAP + i // columns * (side + GAP)
        sheet.paste(Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST), place)
    return sheet


def draw_neighbours(images: np.ndarray, features: torch.Tensor, names: list[str], rows: int = 8) -> Image.Image:
    """For a few images, spread over the rows, the five that the encoder finds most alike, by cosine.

    images N 3 H W uint8, features N D, names N (of their classes, or of nothing)
    """
    features = torch.nn.functional.normalize(features, dim=1)
    asked = torch.linspace(0, len(features) - 1, min(rows, len(features))).round().long().unique()
    similarity = features[asked] @ features.T  # R N
    similarity[torch.arange(len(asked)), asked] = -2.0
    near = similarity.topk(min(5, len(features) - 1), dim=1).indices
    shown, captions = [], []
    for i, others in zip(asked.tolist(), near.tolist(), strict=True):
        shown += [i, *others]
        captions.append(("image", names[i]))
        captions += [("same class" if names[i] and names[j] == names[i] else "nearest", names[j]) for j in others]
    return draw_sheet(images[shown], captions, columns=1 + near.shape[1])


def _tile(view):
    return Image.fromarray(view).resize((VIEW, VIEW), Image.Resampling.BICUBIC)


def _bar(draw, left, top, word, weight, colour):
    draw.text((left, top), f"{word} {weight:.2f}", INK, _font())
    start = left + 50
    draw.rectangle((start, top + 2, start + 44, top + 11), outline=colour)
    draw.rectangle((start, top + 2, start + round(44 * min(1, max(0, weight))), top + 11), fill=colour)


def _font(bold: bool = False):
    return ImageFont.load_default(12 if bold else 11)
