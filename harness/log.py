"""TensorBoard and CSV logging of a run.

Curves with the same name lie in sub-runs (`train`, `val`, `chance`), so that TensorBoard draws them on one chart."""

import contextlib
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from harness.files import write_csv
from harness.ranks import RANK

SUBRUNS = ("train", "val", "chance", "before", "after")
HISTOGRAM = 10_000  # values of a layer in a histogram, about


class Log:
    """The history of a run in its `folder`: a row an epoch in `history.csv`, curves and pictures in TensorBoard. Only
    the first rank writes. A sub-run is a sub-folder with event files of its own; None is the run's folder itself. If
    the run is resumed, `history` has the rows of earlier epochs, and what was logged after them is withdrawn."""

    def __init__(self, folder: Path, history: list[dict] | None = None):
        self.folder, self.history = folder, list(history or [])
        self.purge_step = None if history is None else len(history) + 1
        self.writers = {}

    def writer(self, subrun: str | None = None) -> SummaryWriter:
        """The TensorBoard writer of a sub-run."""
        if subrun not in self.writers:
            place = self.folder / subrun if subrun else self.folder
            self.writers[subrun] = _NoWriter() if RANK else SummaryWriter(place, purge_step=self.purge_step)
        return self.writers[subrun]

    def row(self, row: dict[str, float]) -> None:
        """Add an epoch's row to the history. Every row has the same columns, `epoch` the first."""
        self.history.append(row)
        self.write_history()

    def write_history(self) -> None:
        """Write `history.csv`."""
        if self.history and not RANK:
            write_csv([self.history[0], *(row.values() for row in self.history)], self.folder / "history.csv")

    def scalars(self, subrun: str | None, epoch: int, figures: dict[str, float]) -> None:
        """A point of each curve. Epoch 0 is the untrained network."""
        for tag, value in figures.items():
            self.writer(subrun).add_scalar(tag, value, epoch)

    def picture(self, subrun: str | None, tag: str, picture: Image.Image, epoch: int) -> None:
        """A picture."""
        self.writer(subrun).add_image(tag, np.asarray(picture.convert("RGB")), epoch, dataformats="HWC")

    def histograms(self, model: nn.Module, epoch: int) -> None:
        """Weights of every layer, or about ten thousand of them, evenly spread."""
        for name, parameter in model.named_parameters():
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // HISTOGRAM)].float()
            self.writer("train").add_histogram(f"weights/{name}", some, epoch)

    def projector(self, subrun: str, features: torch.Tensor, names: list[str], thumbnails: torch.Tensor, epoch: int):
        """Points to turn and zoom in TensorBoard's projector; they replace the sub-run's points of earlier epochs.
        features N D, names of their classes N, thumbnails N 3 h w uint8"""
        for older in self.folder.glob(f"{subrun}/[0-9][0-9][0-9][0-9][0-9]/features"):
            shutil.rmtree(older.parent)
        names = [as_utf8(name) for name in names]
        self.writer(subrun).add_embedding(features, names, thumbnails.float() / 255, epoch, "features")

    def settings(self, settings: dict, final: dict[str, float], epoch: int) -> None:
        """A line in TensorBoard's table of runs: settings and final figures."""
        for file in self.folder.glob("events.out.tfevents.*") if not RANK else ():
            if b"_hparams_/" in file.read_bytes():  # of the run before it was resumed: TensorBoard shows the first
                file.unlink()
        self.write_history()  # of a run that was rescued after its last epoch, too
        values = {name: v if isinstance(v, bool | int | float) else as_utf8(str(v)) for name, v in settings.items()}
        figures = {f"summary/{name}": value for name, value in final.items()}
        self.writer().add_hparams(values, figures, run_name=".", global_step=epoch)

    def close(self) -> None:
        """Bring everything to the disk. An error that is being raised already is not replaced by one of closing."""
        ignored = [OSError] if sys.exc_info()[0] else []
        for writer in self.writers.values():
            with contextlib.suppress(*ignored):
                writer.close()


class _NoWriter:
    """A writer that writes nothing."""

    def __getattr__(self, name):
        return lambda *args, **options: None


def as_utf8(name: str) -> str:
    """Bytes of a file's name that are not text become a backslash and a number."""
    return name.encode("utf-8", "backslashreplace").decode()
