import csv

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from augment import to_pixels
from harness.log import Log
from harness.pictures import draw_confusion, draw_mixtures, draw_reliability, draw_sheet
from tasks import MixupTransform, guess


@pytest.fixture
def question(batch):
    return MixupTransform(3)(batch, torch.Generator().manual_seed(0))


def drawn(question, predicted, **options):
    views = to_pixels(question.mixtures), to_pixels(question.asked)[question.candidates]
    return draw_mixtures(*views, question.weights, predicted, **options)


def test_history_and_curves_hold_what_was_logged(tmp_path):
    log = Log(tmp_path)
    log.scalars("val", 0, {"loss": 2.0})
    for epoch in (1, 2, 3):
        log.scalars("train", epoch, {"loss": 1 / epoch, "optimiser/learning_rate": 0.1})
        log.scalars("val", epoch, {"loss": 2 / epoch})
        log.row({"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 2 / epoch, "learning_rate": 0.1})
    log.close()
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [(row["epoch"], float(row["val_loss"])) for row in rows] == [("1", 2.0), ("2", 1.0), ("3", 2 / 3)]
    train, val = (EventAccumulator(str(tmp_path / subrun)).Reload() for subrun in ("train", "val"))
    assert set(train.Tags()["scalars"]) == {"loss", "optimiser/learning_rate"}
    assert [(e.step, round(e.value, 4)) for e in val.Scalars("loss")] == [(0, 2.0), (1, 2.0), (2, 1.0), (3, 0.6667)]
    assert [e.step for e in train.Scalars("loss")] == [1, 2, 3]


def test_pictures_reach_tensorboard(tmp_path, question):
    log = Log(tmp_path)
    picture = drawn(question, guess(question))
    log.picture("val", "mixtures/validation", picture, 7)
    log.close()
    (image,) = EventAccumulator(str(tmp_path / "val")).Reload().Images("mixtures/validation")
    assert (image.step, image.width, image.height) == (7, picture.width, picture.height)


def test_the_table_of_runs_has_the_settings_of_the_last_time(tmp_path):
    """TensorBoard shows the first settings that it finds in a run's folder, for ever."""
    for epochs, loss in (1, 1.0), (3, 0.5):
        log = Log(tmp_path, [{"epoch": 1}] if epochs > 1 else None)
        log.scalars(None, epochs, {"kept": 1.0})
        log.settings({"epochs": epochs, "lr": 0.1}, {"val_loss": loss}, epochs)
        log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    started = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert started.session_start_info.hparams["epochs"].number_value == 3
    assert [(event.step, event.value) for event in events.Scalars("summary/val_loss")] == [(3, 0.5)]
    assert [event.step for event in events.Scalars("kept")] == [1, 3]


def test_the_picture_shows_mixtures_candidates_and_both_weights(question):
    right, wrong = (drawn(question, weights, examples=2) for weights in (question.weights, guess(question)))
    assert isinstance(right, Image.Image) and right.size == wrong.size
    assert np.abs(np.asarray(right, int) - np.asarray(wrong, int)).max() > 100  # other bars, other numbers
    one, twelve = drawn(question, question.weights, examples=1), drawn(question, question.weights, examples=12)
    assert one.width < twelve.width and 1.2 < twelve.width / twelve.height < 2.2  # landscape


def test_more_examples_than_there_are(question):
    assert drawn(question, question.weights, examples=1000).height > 0


def test_reliability_shows_how_far_predictions_are_from_the_truth():
    true = torch.linspace(0, 1, 101)
    right, flat = (draw_reliability(true, predicted) for predicted in (true, torch.full((101,), 0.5)))
    assert right.size == flat.size and 1.2 < right.width / right.height < 2
    assert np.abs(np.asarray(right, int) - np.asarray(flat, int)).mean() > 1


def test_pictures_do_not_grow_with_the_number_of_classes():
    classes = [f"class {i}" for i in range(2000)]
    labels = torch.arange(2000).repeat(3)
    predicted = labels.clone()
    predicted[labels == 7] = 1999  # the two that are confused most
    small = draw_confusion(predicted, labels, classes)
    assert max(small.size) < 2000
    red = np.asarray(small).astype(int)
    assert ((red[:, :, 2] - red[:, :, 0]) > 100).sum() > 500  # a dark cell
    few = draw_confusion(labels[:30], labels[:30], classes[:40])
    assert few.size[0] > few.size[1]
    images = np.zeros((3000, 3, 8, 8), np.uint8)
    assert max(draw_sheet(images, [("a", "b")] * 3000).size) < 8000
