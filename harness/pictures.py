"""Pictures of mixtures, answers and classes, drawn with Pillow."""

import functools
import math
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

VIEW = 96  # px, side of a view on a contact sheet
BAR = 14  # px, height of a weight's bar
GAP = 8
LINE = 24  # characters of a caption, at most
CLASSES, MOST_CONFUSED = 40, 30  # in a confusion matrix at most; so many of them if there are more
SHEET_LINES = 40  # of a contact sheet, at most
INK, PAPER, FAINT, TRUE, PREDICTED = (30, 30, 30), (255, 255, 255), (225, 225, 225), (150, 150, 150), (125, 180, 225)
WRONG = (200, 40, 30)


def legible(classes: Sequence[str]) -> list[str]:
    """Class names that the font, ASCII alone, can draw: of another name what is ASCII, and its index in `classes`."""
    plain = [unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip() for name in classes]
    return [name if name.isascii() else f"{plain[i] or 'class'} {i}" for i, name in enumerate(classes)]


def draw_mixtures(
    mixtures: torch.Tensor, candidates: torch.Tensor, weights: torch.Tensor | None,
    predicted: torch.Tensor | None = None, examples: int = 8, tile: int = 72,
) -> Image.Image:  # fmt: skip
    """Mixtures, each beside its candidates with their true and predicted weights as bars, on a sheet of about 3:2.

    mixtures B 3 S S uint8, candidates B n 3 S S uint8, weights and predicted B n, None if they are not known
    examples  mixtures on the sheet, at most
    tile      side of a view on the sheet, px"""
    examples, n, gap = min(examples, len(mixtures)), candidates.shape[1], tile // 9
    bars = [(w, colour) for w, colour in ((weights, TRUE), (predicted, PREDICTED)) if w is not None]
    width, height = (n + 1) * (tile + gap) + 2 * gap, tile + len(bars) * BAR + 2 * gap
    shape = lambda columns: columns * width / (-(-examples // columns) * height)  # noqa: E731
    columns = min(range(1, examples + 1), key=lambda columns: abs(math.log(shape(columns) / 1.5)))
    legend = [("true", TRUE)] * (weights is not None) + [("predicted", PREDICTED)] * (predicted is not None)
    legend += [("wrong sources", WRONG)] * (len(bars) == 2)
    sheet = Image.new("RGB", (columns * width, 20 + -(-examples // columns) * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for place, (words, colour) in enumerate(legend):
        left = gap + place * 85
        draw.rectangle((left, 5, left + 10, 15), fill=colour)
        draw.text((left + 14, 2), words, INK, _font(12))
    for i in range(examples):
        left, top = i % columns * width + gap, 20 + i // columns * height
        sheet.paste(_tile(mixtures[i], tile), (left, top))
        if tile > 60:  # else it would not fit
            draw.text((left, top + tile + 1), "mixture", INK, _font(12))
        if len(bars) == 2:
            true, answer = weights[i].tolist(), predicted[i].tolist()
            heaviest = sorted(range(n), key=lambda j: -answer[j])[: sum(w > 0 for w in true)]
            if not all(true[j] > 0 for j in heaviest):
                draw.rectangle((left - 3, top - 3, left + tile + 2, top + tile + 2), outline=WRONG, width=3)
        for j in range(n):
            place = left + (j + 1) * (tile + gap) + gap
            sheet.paste(_tile(candidates[i, j], tile), (place, top))
            for line, (w, colour) in enumerate(bars):
                _bar(draw, place, top + tile + 2 + line * BAR, tile, w[i, j].item(), colour)
    return sheet


def draw_reliability(weights: torch.Tensor, predicted: torch.Tensor, bins: int = 10) -> Image.Image:
    """Predicted against true weights, M each in [0, 1], in bins of the true weight: mean, central 80 %, mean error."""
    side, left = 200, 82
    sheet = Image.new("RGB", (368, side + 48), PAPER)
    draw = ImageDraw.Draw(sheet)
    step = (sheet.width - left - GAP) / (bins + 1)
    y = lambda weight: GAP + side * (1 - min(1, max(0, weight)))  # noqa: E731
    for weight in (0, 0.5, 1):
        draw.line((left, y(weight), sheet.width - GAP, y(weight)), FAINT)
        text = f"{weight:g}"
        draw.text((left - 6 - _font(12).getlength(text), y(weight) - 8), text, INK, _font(12))
    for text, top in ("predicted", 0), ("true weight", side + 14), ("mean error", side + 30):
        draw.text((2, top), text, INK, _font(12))
    number = (weights * bins).ceil().long().clamp(max=bins)  # 0: those that are zero
    for i in range(bins + 1):
        x, middle, half = left + (i + 0.5) * step, max(0, i - 0.5) / bins, (i > 0) / 2 / bins
        draw.line((x - step / 2, y(middle - half), x + step / 2, y(middle + half)), TRUE)
        draw.text((x - 9, side + 14), f"{middle:.2f}"[1:], INK, _font(12))
        here = number == i
        if here.any():
            low, high = predicted[here].quantile(torch.tensor([0.1, 0.9], device=predicted.device)).tolist()
            draw.line((x, y(low), x, y(high)), PREDICTED, 5)
            mean, error = predicted[here].mean().item(), (predicted - weights)[here].abs().mean().item()
            draw.ellipse((x - 4, y(mean) - 4, x + 4, y(mean) + 4), INK)
            draw.text((x - 9, side + 30), f"{error:.2f}"[1:], INK, _font(12))
    return sheet


def draw_confusion(predicted: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> Image.Image:
    """A confusion matrix: a row for each class that occurs, a column for each class. Of more than 40 classes, the 30
    that are taken for others, or others for them, most often.

    predicted, labels  M int64, indices into `classes`. A cell has the per cent of its row; right ones are framed."""
    shown, wrong, classes = torch.arange(len(classes)), predicted != labels, legible(classes)
    if len(classes) > CLASSES:
        confused = torch.cat([labels[wrong], predicted[wrong]]).bincount(minlength=len(classes))
        shown = confused.topk(MOST_CONFUSED).indices.sort().values
    of_all = labels.bincount(minlength=len(classes))[shown].tolist()
    both = torch.isin(labels, shown) & torch.isin(predicted, shown)
    pairs = (torch.searchsorted(shown, part[both]) for part in (labels, predicted))
    counts = torch.zeros(len(shown), len(shown)).index_put_(tuple(pairs), torch.ones(()), accumulate=True)
    rows, names = [i for i, count in enumerate(of_all) if count], [classes[i][:16] for i in shown.tolist()]
    cell, margin = 34, 8 + round(max(_font().getlength(name) for name in names))
    sheet = Image.new("RGB", (2 * margin + len(names) * cell, margin + len(rows) * cell + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        slip = Image.new("RGB", (margin, 16), PAPER)
        ImageDraw.Draw(slip).text((4, 0), name, INK, _font())
        sheet.paste(slip.rotate(90, expand=True), (margin + column * cell + 9, 0))
    for line, label in enumerate(rows):
        top = margin + line * cell
        draw.text((4, top + 10), names[label], INK, _font())
        for column, count in enumerate(counts[label].tolist()):
            share = count / of_all[label]
            shade = tuple(round(255 + share * (dark - 255)) for dark in (31, 119, 180))
            left, right = margin + column * cell, column == label
            box = (left, top, left + cell - 2, top + cell - 2)
            draw.rectangle(box, shade, INK if right else TRUE, 2 if right else 1)
            if count:
                text = f"{100 * share:.0f}"
                place = (left + (cell - 2 - _font().getlength(text)) / 2, top + 10)
                draw.text(place, text, PAPER if share > 0.5 else INK, _font(12 if right else 11))
    return sheet


def draw_sheet(images: np.ndarray, captions: Sequence[tuple[str, str]], columns: int = 6) -> Image.Image:
    """A contact sheet: images M 3 H W uint8, each above two lines of text; the first 40 lines of it."""
    images, captions = images[: SHEET_LINES * columns], captions[: SHEET_LINES * columns]
    fits = max((_font(12).getlength(line[:LINE]) for pair in captions for line in pair), default=0)
    width, height = max(VIEW, math.ceil(fits)) + GAP, VIEW + 46
    lines = max(1, -(-len(captions) // columns))
    sheet = Image.new("RGB", (GAP + columns * width, GAP + lines * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (first, second) in enumerate(captions):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        sheet.paste(_tile(torch.from_numpy(images[i]), VIEW), (left, top))
        draw.text((left, top + VIEW + 2), first[:LINE], INK, _font())
        draw.text((left, top + VIEW + 17), second[:LINE], INK, _font(12))
    return sheet


def draw_neighbours(images: np.ndarray, features: torch.Tensor, names: list[str], rows: int = 4) -> Image.Image:
    """For a few images, spread over the rows, the five that are most alike by the cosine of their features. images N 3
    H W uint8, features N D, names N of their classes ("" without one)"""
    features = torch.nn.functional.normalize(features, dim=1)
    queries = torch.linspace(0, len(features) - 1, min(rows, len(features))).round().long().unique()
    similarity = features[queries] @ features.T  # R N
    similarity[torch.arange(len(queries)), queries] = -2.0
    near = similarity.topk(min(5, len(features) - 1), dim=1).indices
    shown, captions = [], []
    for i, others in zip(queries.tolist(), near.tolist(), strict=True):
        shown += [i, *others]
        captions.append(("image", names[i]))
        captions += [("same class" if names[i] and names[j] == names[i] else "nearest", names[j]) for j in others]
    return draw_sheet(images[shown], captions, columns=1 + near.shape[1])


def _tile(image: torch.Tensor, side: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _bar(draw, left, top, width, weight, colour):
    draw.rectangle((left, top, left + width - 1, top + BAR - 3), fill=FAINT)
    if weight > 0:
        draw.rectangle((left, top, left + max(1, round((width - 1) * min(1, weight))), top + BAR - 3), fill=colour)
    draw.text((left + 2, top - 2), f"{weight:.2f}", INK, _font(12))


_font = functools.cache(lambda size=11: ImageFont.load_default(size))
