"""What a run leaves to look at: TensorBoard, history.csv, pictures."""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

from augment import to_pixels

VIEW = 96  # px, side of a view in a picture
GAP = 8
LINE = 24  # characters of a caption, at most
CAPTION = 46  # px below a view: two bars with their numbers
INK, PAPER, TRUE, PREDICTED = (30, 30, 30), (255, 255, 255), (120, 120, 120), (31, 119, 180)


class Log:
    """A run's history: one row an epoch in `history.csv`, the same figures as curves in TensorBoard.

    Figures are named `train_loss`, `val_loss`, …; in TensorBoard `loss/train` and `loss/val`, so that they group.

    folder   of the run
    history  the rows of the epochs before, where a run is resumed; later ones that may be there are withdrawn
    """

    def __init__(self, folder: Path, history: list[dict] | None = None):
        self.folder, self.history = folder, []
        self.writer = SummaryWriter(folder, purge_step=None if history is None else len(history) + 1)
        self.file = None
        for row in history or []:
            self._row(row)

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        """Write one epoch's figures, epochs counted from 1. Every epoch has the same ones."""
        self._row({"epoch": epoch, **figures})
        self.scalars(epoch, figures)

    def _row(self, row):
        if self.file is None:
            self.file = open(self.folder / "history.csv", "w", newline="", encoding="utf-8")  # noqa: SIM115
            csv.DictWriter(self.file, row).writeheader()
        csv.DictWriter(self.file, row).writerow(row)
        self.file.flush()
        self.history.append(row)

    def scalars(self, epoch: int, figures: dict[str, float]) -> None:
        """Curves only: what stands before the first epoch is epoch 0."""
        for name, value in figures.items():
            phase, _, rest = name.partition("_")
            self.writer.add_scalar(f"{rest}/{phase}" if phase in ("train", "val") else name, value, epoch)

    def picture(self, tag: str, picture: Image.Image, epoch: int) -> None:
        """A picture in TensorBoard."""
        pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        self.writer.add_image(tag, pixels.view(picture.height, picture.width, 3), epoch, dataformats="HWC")

    def text(self, tag: str, text: str) -> None:
        """Text in TensorBoard, shown as it is."""
        self.writer.add_text(tag, "    " + text.replace("\n", "\n    "))

    def close(self) -> None:
        """Everything written is on disk afterwards."""
        self.writer.close()
        if self.file:
            self.file.close()


class Silent(Log):
    """The log of a rank that leaves the writing to the first one."""

    def __init__(self, folder: Path, history: list[dict] | None = None):
        self.folder, self.history = folder, list(history or [])

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        """Remember the row."""
        self.history.append({"epoch": epoch, **figures})

    def scalars(self, epoch, figures): ...
    def picture(self, tag, picture, epoch): ...
    def text(self, tag, text): ...
    def close(self): ...


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


def _tile(view):
    return Image.fromarray(view).resize((VIEW, VIEW), Image.Resampling.BICUBIC)


def _bar(draw, left, top, word, weight, colour):
    draw.text((left, top), f"{word} {weight:.2f}", INK, _font())
    start = left + 50
    draw.rectangle((start, top + 2, start + 44, top + 11), outline=colour)
    draw.rectangle((start, top + 2, start + round(44 * min(1, max(0, weight))), top + 11), fill=colour)


def _font(bold: bool = False):
    return ImageFont.load_default(12 if bold else 11)
