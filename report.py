"""What a run leaves to look at: TensorBoard's curves, pictures and tables, history.csv, and how figures are said."""

import contextlib
import csv
import io
import math
import sys
from pathlib import Path

import torch
from google.protobuf import text_format
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import nn
from torch.utils.tensorboard import SummaryWriter

HISTOGRAM = 10_000  # values of a layer in a histogram, about
PHASES = ("train", "val", "uninformed", "floor")
WORDS = {  # how a figure is called
    "loss": "loss",
    "source_accuracy": "sources named right",
    "weight_mae": "weight error",
    "accuracy": "accuracy",
}
FORMATS = {"loss": ".3f", "source_accuracy": ".1%", "weight_mae": ".3f", "accuracy": ".1%"}


class Log:
    """A run's history: one row an epoch in `history.csv`, the same figures as curves in TensorBoard.

    Figures are named `train_loss`, `val_loss`, …; in TensorBoard `loss/train` and `loss/val`, so that they group; what
    has no phase, such as the learning rate, is under `training/`.

    folder   of the run
    history  the rows of the epochs before, where a run is resumed; later ones that may be there are withdrawn
    """

    def __init__(self, folder: Path, history: list[dict] | None = None):
        self.folder, self.history = folder, []
        self.writer = SummaryWriter(folder, purge_step=None if history is None else len(history) + 1)
        self.file = None
        for row in history or []:
            self._row(row)
        if history is not None:
            self._keep_projector(len(history))

    def _keep_projector(self, epochs):
        """What the projector shows of the first `epochs`; the writer would only list what it adds itself."""
        config = ProjectorConfig()
        with contextlib.suppress(OSError, text_format.ParseError):
            text_format.Parse((self.folder / "projector_config.pbtxt").read_text(), config)
        for shown in [shown for shown in config.embeddings if int(shown.tensor_path.split("/")[0]) > epochs]:
            config.embeddings.remove(shown)
        self.writer._projector_config = config

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
            self.writer.add_scalar(_tag(name), value, epoch)

    def picture(self, tag: str, picture: Image.Image, epoch: int) -> None:
        """A picture in TensorBoard; as a JPEG, which takes a tenth of the time that a PNG does."""
        content = io.BytesIO()
        picture.convert("RGB").save(content, "JPEG", quality=92)
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=content.getvalue()
        )
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), epoch)

    def text(self, tag: str, text: str) -> None:
        """Text in TensorBoard, shown as it is."""
        self.writer.add_text(tag, "    " + text.replace("\n", "\n    "))

    def layout(self, charts: dict[str, list[str]]) -> None:
        """Bring the main charts to the front, on TensorBoard's page of custom scalars: {title: names of figures}."""
        multiline = {title: ["Multiline", [_tag(name) for name in names]] for title, names in charts.items()}
        self.writer.add_custom_scalars({"run": multiline})

    def histograms(self, model: nn.Module, epoch: int) -> None:
        """Weights and last gradients of every layer, or about ten thousand of them, evenly spread."""
        for name, parameter in model.named_parameters():
            for kind, values in (("weights", parameter.detach()), ("gradients", parameter.grad)):
                if values is not None:
                    some = values.flatten()[:: max(1, values.numel() // HISTOGRAM)].float()
                    self.writer.add_histogram(f"{kind}/{name}", some, epoch)

    def projector(self, features: torch.Tensor, names: list[str], thumbnails: torch.Tensor, epoch: int) -> None:
        """Features N D with the names N of their classes and thumbnails N 3 h w uint8, as points that can be turned."""
        names = [_plain(name) for name in names]
        self.writer.add_embedding(features, names, thumbnails.float() / 255, epoch, f"features-{epoch}")

    def settings(self, settings: dict, final: dict[str, float], epoch: int) -> None:
        """A line of TensorBoard's table of runs: settings and final figures."""
        said = {name: v if isinstance(v, bool | int | float) else _plain(str(v)) for name, v in settings.items()}
        figures = {f"summary/{name}": value for name, value in final.items()}
        self.writer.add_hparams(said, figures, run_name=".", global_step=epoch)

    def close(self) -> None:
        """Everything written is on disk afterwards, if the disk takes it; an error that is under way goes first."""
        another = sys.exc_info()[0] is not None
        for file in (self.writer, self.file):
            try:
                if file:
                    file.close()
            except OSError:
                if not another:
                    raise


def _plain(name):
    """A name as UTF-8 can say it: bytes of a file's name that are no text come out as backslash and number."""
    return name.encode("utf-8", "backslashreplace").decode()


def _tag(name):
    """train_loss -> loss/train; what has no phase stands together under training/."""
    phase, _, rest = name.partition("_")
    return f"{rest}/{phase}" if phase in PHASES else name if "/" in name else f"training/{name}"


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
    def layout(self, charts): ...
    def histograms(self, model, epoch): ...
    def projector(self, features, names, thumbnails, epoch): ...
    def settings(self, settings, final, epoch): ...
    def close(self): ...


def charts(names: list[str], other: bool, own: bool) -> dict[str, list[str]]:
    """{title: figures that belong on one chart}; with `other`, the run trains on another question than the fixed one,
    and with `own` it is validated on that, too."""
    found = {}
    for name in names:
        train = [f"train_{name}"]
        if other:
            found[WORDS[name]] = train + ([f"val_own_{name}", f"uninformed_own_{name}"] if own else [])
            train = []
        found[WORDS[name] + " on the fixed question" * other] = [*train, f"val_{name}", f"uninformed_{name}"]
    for title, figures in found.items():
        if title.startswith("loss"):
            figures.append("floor_loss")
    return found


def compared(summary: dict) -> dict[str, dict[str, str]]:
    """The result beside what it has to be compared with, {row: {name: figure}}; shares with one standard error."""
    rows = {**summary["references"], "trained": {n: summary[f"val_{n}"] for n in WORDS if f"val_{n}" in summary}}
    if "calibrated" in summary:
        rows[f"trained, logits / {summary['temperature']:.1f}"] = summary["calibrated"]

    def said(row: str, name: str, value: float) -> str:
        error = math.sqrt(max(0, value * (1 - value)) / summary["val_images"])  # of a binomial
        sampled = FORMATS[name].endswith("%") and row != "chance"  # which is exact
        return f"{value:{FORMATS[name]}}" + f" ± {100 * error:.1f}" * sampled

    return {
        row: {name: said(row, name, scores[name]) for name in WORDS if name in scores} for row, scores in rows.items()
    }
