import csv

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pictures import draw_mixtures
from report import Log
from tasks import MixupTransform, guess


@pytest.fixture
def question(batch):
    return MixupTransform(3)(batch, torch.Generator().manual_seed(0))


def test_history_and_curves_hold_what_was_logged(tmp_path):
    log = Log(tmp_path)
    log.scalars(0, {"val_loss": 2.0})
    for epoch in (1, 2, 3):
        log.epoch(epoch, {"train_loss": 1 / epoch, "val_loss": 2 / epoch, "learning_rate": 0.1})
    log.close()
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [(row["epoch"], float(row["val_loss"])) for row in rows] == [("1", 2.0), ("2", 1.0), ("3", 2 / 3)]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"loss/train", "loss/val", "training/learning_rate"}
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss/val")] == [
        (0, 2.0),
        (1, 2.0),
        (2, 1.0),
        (3, 0.6667),
    ]
    assert [e.step for e in events.Scalars("loss/train")] == [1, 2, 3]


def test_pictures_and_text_reach_tensorboard(tmp_path, question):
    log = Log(tmp_path)
    picture = draw_mixtures(question, guess(question))
    log.picture("validation", picture, 7)
    log.text("settings", "python train.py\n--lr 1")
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("validation")
    assert (image.step, image.width, image.height) == (7, picture.width, picture.height)
    assert b"--lr 1" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_the_picture_shows_mixtures_candidates_and_both_weights(question):
    right, wrong = draw_mixtures(question, question.weights, rows=2), draw_mixtures(question, guess(question), rows=2)
    assert isinstance(right, Image.Image) and right.size == wrong.size
    assert np.abs(np.asarray(right, int) - np.asarray(wrong, int)).max() > 100  # other bars, other numbers
    one = draw_mixtures(question, question.weights, rows=1)
    assert one.height < right.height and one.width == right.width


def test_more_rows_than_examples(question):
    assert draw_mixtures(question, question.weights, rows=1000).height > 0
