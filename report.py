"""What a run leaves to look at: TensorBoard, history.csv, pictures."""

import csv
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

from augment import to_pixels

VIEW = 96  # px, side of a view in a picture
GAP = 8
CAPTION = 46  # px below a view: two bars with their numbers
INK, PAPER, TRUE, PREDICTED = (30, 30, 30), (255, 255, 255), (120, 120, 120), (31, 119, 180)


class Log:
    """A run's history: one row an epoch in `history.csv`, the same figures as curves in TensorBoard.

    Figures are named `train_loss`, `val_loss`, …; in TensorBoard `loss/train` and `loss/val`, so that they group.
    """

    def __init__(self, folder: Path):
        self.folder, self.writer = folder, SummaryWriter(folder)
        self.file = self.rows = None

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        """Write one epoch's figures, epochs counted from 1. Every epoch has the same ones."""
        if self.rows is None:
            self.file = open(self.folder / "history.csv", "w", newline="", encoding="utf-8")  # noqa: SIM115
            self.rows = csv.DictWriter(self.file, ["epoch", *figures])
            self.rows.writeheader()
        self.rows.writerow({"epoch": epoch, **figures})
        self.file.flush()
        self.scalars(epoch, figures)

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


def draw_mixtures(question, predicted: torch.Tensor, rows: int = 8) -> Image.Image:
    """The first mixtures of a question, each beside its candidates with their true and predicted weights as bars.

    question   see tasks.Question
    predicted  B n  the weights that the network answered
    """
    rows, n = min(rows, len(predicted)), predicted.shape[1]
    views = to_pixels(torch.cat([question.mixtures[:rows], question.asked[question.candidates[:rows]].flatten(0, 1)]))
    tiles = [_tile(view) for view in views.cpu().permute(0, 2, 3, 1).numpy()]
    predicted, weights = predicted[:rows].tolist(), question.weights[:rows].tolist()
    width, height = VIEW + GAP, VIEW + CAPTION
    sheet = Image.new("RGB", (GAP + (n + 1) * width + GAP, GAP + rows * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = GAP + row * height
        sheet.paste(tiles[row], (GAP, top))
        k = sum(weight > 0 for weight in weights[row])
        named = sorted(range(n), key=lambda i: -predicted[row][i])[:k]
        right = all(weights[row][i] > 0 for i in named)
        draw.text((GAP, top + VIEW + 2), "mixture", INK, _font())
        draw.text((GAP, top + VIEW + 16), "sources found" if right else "WRONG sources", INK, _font(bold=not right))
        for i in range(n):
            left = GAP + (i + 1) * width + GAP
            sheet.paste(tiles[rows + row * n + i], (left, top))
            _bar(draw, left, top + VIEW + 3, "true", weights[row][i], TRUE)
            _bar(draw, left, top + VIEW + 19, "said", predicted[row][i], PREDICTED)
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
