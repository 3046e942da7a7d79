import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torchvision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import transfer as transfer_code
from harness import bundled
from models import build_encoder
from transfer import MODES

FIGURES = ("accuracy", "accuracy_val_classes", "accuracy_uncorrected")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """What a pretext run leaves, as far as transfer reads it."""
    folder = tmp_path_factory.mktemp("pretext") / "run"
    folder.mkdir()
    torch.manual_seed(7)
    torch.save(build_encoder("conv").state_dict(), folder / "encoder.pt")
    settings = {"settings": {"encoder": "conv", "size": 8, "data": "photos"}}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def transfer(script, cache):
    """Run train_transfer.py; returns how it ended and its folder."""

    def run(*args, out="out"):
        return script("train_transfer.py", "--data-dir", cache, "--out", out, *args), Path(out)

    return run


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_leaves_what_is_promised(transfer, pretrained, mode):
    options = {"finetune": ("--epochs", 1, "--batch-size", 256), "linear": ("--epochs", 2)}.get(mode, ())
    end, folder = transfer(pretrained, "scratch", "--mode", mode, "--runs", 2, *options)
    assert end.status == 0, end.err
    summary = json.loads((folder / "summary.json").read_text())
    ways = [f", {way}" for way in ("ridge", "knn", "25 labels")] if mode == "probe" else [""]
    assert list(summary) == [f"{start}{way}" for start in (pretrained, "scratch") for way in ways]
    for row in summary.values():
        assert (row["data"], row["mode"], row["runs"]) == ("photos", mode, 2)
        assert row["seconds"] > 0 and row["device"].startswith("cpu") and ("epochs" in row) == bool(options)
        for name in FIGURES:
            values = torch.tensor(row[name.replace("accuracy", "accuracies")], dtype=torch.float64)
            assert len(values) == 2 and ((values >= 0) & (values <= 1)).all()
            assert row[f"{name}_mean"] == pytest.approx(values.mean().item())
            assert row[f"{name}_std"] == pytest.approx(values.std().item(), abs=1e-9)

    rows = list(csv.DictReader((folder / "predictions.csv").open()))
    held = {name for _, split, name in bundled.list_patches() if split == "val"}
    for start, row in summary.items():
        for seed in (0, 1):
            mine = [r for r in rows if r["start"] == start and r["seed"] == str(seed)]
            assert {r["class"] for r in mine} == held and all(r["path"].split("/")[1] == r["class"] for r in mine)
            assert {r["accuracy_val_classes"] for r in mine} <= held
            for name in FIGURES:
                share = sum(r[name] == r["class"] for r in mine) / len(mine)
                assert share == pytest.approx(row[name.replace("accuracy", "accuracies")][seed])

    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    for start in summary:
        for picture in ("confusion", "mistakes"):
            assert [event.step for event in events.Images(f"{picture}/{start}")] == [0, 1]
        if options:
            assert len(events.Scalars(f"{start}/seed 1 loss")) == summary[start]["epochs"]
    table = end.out.split("\nSTART", 1)[1]
    assert "16 classes" in table and "the 8 of val/" in table and "±" in table


def test_one_run_has_no_spread(transfer):
    end, folder = transfer("scratch", "--mode", "knn", "--size", 8)
    assert end.status == 0 and "±" not in end.out
    assert json.loads((folder / "summary.json").read_text())["scratch"]["accuracy_std"] is None


def test_a_start_is_a_folder_or_its_encoder(transfer, pretrained):
    end, folder = transfer(pretrained, pretrained / "encoder.pt", "--mode", "knn")
    assert end.status == 0, end.err
    folders, file = json.loads((folder / "summary.json").read_text()).values()
    assert folders["accuracies"] == file["accuracies"]
    settings = json.loads((folder / "settings.json").read_text())["settings"]
    assert (settings["data"], settings["size"], settings["encoder"]) == ("photos", 8, "conv")  # as it was pretrained


def test_other_widths_are_read_from_the_weights(script, cache):
    """A narrow encoder goes through pretraining, a resume, transfer beside scratch, and unmix.py."""
    narrow = ("--widths", 4, 8, "--size", 8, "--batch-size", 512, "--data-dir", cache)
    end = script("train_pretext.py", *narrow, "--epochs", 1, "--out", "run")
    assert end.status == 0, end.err
    assert torch.load("run/encoder.pt")["stages.1.0.weight"].shape == (8, 4, 3, 3)
    assert script("train_pretext.py", "--resume", "run", "--epochs", 2).status == 0
    end = script("train_transfer.py", "run", "scratch", "--mode", "knn", "--data-dir", cache, "--out", "out")
    assert end.status == 0, end.err
    files = sorted(map(str, Path(bundled.__file__).parent.rglob("*.png")))[:2] or ["run/validation.png"] * 2
    end = script("unmix.py", "run", *files, "--out", "picture.png")
    assert end.status == 0, end.err
    end = script("train_pretext.py", *narrow, "--encoder", "resnet18", "--out", "other")
    assert end.status == 2 and "--widths is of the encoder conv" in end.err and not Path("other").exists()


def test_a_start_that_was_resumed(transfer, pretrained, labelled):
    """Its images are where the last resume found them. Until it has ended, its encoder is that of before."""
    run = Path(shutil.copytree(pretrained, "run"))
    settings = json.loads((run / "settings.json").read_text())
    for name, data in ("settings", "nowhere"), ("settings.resumed-2", "nowhere"), ("settings.resumed-10", labelled):
        settings["settings"]["data"] = str(Path(data).absolute())
        (run / f"{name}.json").write_text(json.dumps(settings))
    end, _ = transfer("run", "--mode", "knn")
    assert end.status == 0, end.err
    (run / "checkpoint.pt").touch()
    end, _ = transfer("run", "--mode", "knn", out="again")
    assert end.status == 2 and "go on with its run, or give run/encoder.pt, of before that" in end.err
    end, _ = transfer("run/encoder.pt", "--mode", "knn", out="again")
    assert end.status == 0, end.err


def test_what_is_not_said_is_as_the_start_was_pretrained(transfer, labelled):
    Path("run").mkdir()
    torch.save(build_encoder("resnet18").to(torch.bfloat16).state_dict(), "run/encoder.pt")
    settings = {"settings": {"encoder": "resnet18", "size": 24, "data": str(labelled)}}
    Path("run/settings.json").write_text(json.dumps(settings))
    end, folder = transfer("run", "scratch", "--mode", "knn")
    assert end.status == 0, end.err
    said = json.loads((folder / "settings.json").read_text())["settings"]
    assert (said["data"], said["size"], said["encoder"]) == (str(labelled), 24, "resnet18")
    shutil.rmtree(labelled)
    end, _ = transfer("run", "--mode", "knn", out="again")
    missing = f"--data {labelled}: no such folder; give a folder of images, or `photos`"
    assert end.status == 2 and end.err.count("\n") == 1 and not Path("again").exists()
    assert f"the images that run learnt from are not there: {missing}" in end.err
    end, _ = transfer("run", "--mode", "knn", "--data", labelled, out="again")
    assert end.status == 2 and end.err == f"train_transfer.py: {missing}\n"


def test_names_that_are_no_text(transfer, labelled):
    for split in ("train", "val"):
        (labelled / split / "bee").rename(labelled / split / os.fsdecode(b"b\xe9e"))
    file = next((labelled / "val" / "cow").iterdir())
    file.rename(file.with_name(os.fsdecode(b"caf\xe9.jpg")))
    end, folder = transfer("scratch", "--data", labelled, "--mode", "knn", "--size", 8)
    assert end.status == 0, end.err
    rows = list(csv.DictReader((folder / "predictions.csv").open(encoding="utf-8")))
    assert {row["class"] for row in rows} == {r"b\udce9e", "cow"}
    assert any(row["path"].endswith(r"caf\udce9.jpg") for row in rows)


def test_full_memory_is_one_line(transfer, monkeypatch):
    from engine import Trainer

    def full(self, question, at):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …")

    monkeypatch.setattr(Trainer, "step", full)
    end, _ = transfer("scratch", "--mode", "linear", "--size", 8)
    assert end.status == 1 and end.err == "train_transfer.py: the memory is full; lower --batch-size or --size\n"


def test_a_torchvision_encoder_loads_without_this_project(script, cache):
    end = script(
        "train_pretext.py", "--epochs", 1, "--encoder", "resnet18", "--batch-size", 512, "--data-dir", cache,
        "--out", "pretext",
    )  # fmt: skip
    assert end.status == 0, end.err
    state = torch.load("pretext/encoder.pt", weights_only=True)
    plain = torchvision.models.resnet18()
    report = plain.load_state_dict(state, strict=False)
    assert report.missing_keys == ["fc.weight", "fc.bias"] and not report.unexpected_keys
    encoder = build_encoder("resnet18").eval()
    encoder.load_state_dict(state)
    plain.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), encoder(images))


@pytest.mark.parametrize(
    "case, message",
    [
        ("nowhere", "nowhere is not there"),
        ("empty", "empty holds no encoder.pt"),
        ("alone", "settings.json does not say"),
        ("damaged", "damaged/encoder.pt is damaged"),
        (
            "other",
            "is of another network: missing: conv1.weight, bn1.weight, bn1.bias and 117 more; unknown: stages.0.0",
        ),
        ("list", "holds no weights"),
        ("earlier", "is of another network: missing: stages.0.0"),
        ("nothing", "no START is given"),
        ("text", "settings.json does not say how encoder.pt was trained (TypeError"),
        ("unlabelled", "has no labels"),
        ("classless", "no usable image in train/bee/; add some, or remove the class"),
        ("too small", "--size 8 is too small for the encoder convnext_tiny"),
        ("no scratch", "--encoder is of `scratch`, which is none of the STARTs"),
        ("unused", "--freeze has no use in --mode knn; leave one of them out"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(transfer, pretrained, folder, labelled, case, message):
    starts = Path("starts")
    for name in ("empty", "alone", "damaged", "other", "text", "list", "earlier"):
        (starts / name).mkdir(parents=True)
    state, settings = (pretrained / "encoder.pt").read_bytes(), (pretrained / "settings.json").read_text()
    for name in ("alone", "other", "text"):
        (starts / name / "encoder.pt").write_bytes(state)
    torch.save([1, 2], starts / "list" / "encoder.pt")
    torch.save({"convs.0.0.weight": torch.zeros(32, 3, 3, 3)}, starts / "earlier" / "encoder.pt")
    for name in ("list", "earlier"):
        (starts / name / "settings.json").write_text(settings)
    (starts / "damaged" / "encoder.pt").write_bytes(state[:1000])
    (starts / "damaged" / "settings.json").write_text(settings)
    (starts / "other" / "settings.json").write_text(settings.replace("conv", "resnet18"))
    (starts / "text" / "settings.json").write_text(settings.replace("8", '"8"'))
    for file in (labelled / "train" / "bee").iterdir():
        file.write_bytes(b"no image")
    args = {
        "unlabelled": (pretrained, "--data", folder),
        "classless": ("scratch", "--data", labelled),
        "too small": ("scratch", "--encoder", "convnext_tiny", "--size", 8),
        "no scratch": (pretrained, "--encoder", "resnet18"),
        "unused": ("scratch", "--mode", "knn", "--freeze", 3),
        "nothing": (),
    }.get(case, (starts / case,))
    end, out = transfer(*args)
    assert end.status == 2
    assert re.search(re.escape(message), end.err) and end.err.count("\n") == 1, end.err
    assert not out.exists()


def test_stopped_and_resumed_is_as_if_never_stopped(transfer, script, pretrained, monkeypatch):
    from engine import Trainer

    options = (pretrained, "scratch", "--mode", "linear", "--runs", 2, "--epochs", 2)
    end, whole = transfer(*options, out="whole")
    assert end.status == 0, end.err
    step, steps = Trainer.step, []

    def counted(self, question, at):
        steps.append(at)
        if len(steps) == 100:  # 22 an epoch, 44 a run: in the third run
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, question, at)

    monkeypatch.setattr(Trainer, "step", counted)
    end, folder = transfer(*options, out="stopped")
    assert end.status == 143 and "train_transfer.py --resume stopped" in end.err and end.err.count("\n") == 1
    monkeypatch.setattr(Trainer, "step", step)
    end = script("train_transfer.py", "--resume", "stopped", "--lr", 1)
    assert end.status == 2 and "--lr cannot be given with --resume" in end.err
    end = script("train_transfer.py", "--resume", "stopped")
    assert end.status == 0, end.err
    assert (folder / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    for curve in events.Tags()["scalars"]:
        assert [event.step for event in events.Scalars(curve)] == [1, 2], curve
    assert [event.step for event in events.Images("mistakes/scratch")] == [0, 1]


def test_stopped_after_its_last_run(transfer, script, monkeypatch):
    """Nearest neighbours have no steps, so that a signal is looked at when a run is done and saved."""
    classify = transfer_code.classify

    def stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return classify(*args)

    monkeypatch.setattr(transfer_code, "classify", stop)
    end, _ = transfer("scratch", "--mode", "knn", "--size", 8)
    assert end.status == 143 and "stopped; runs that are not finished will begin anew; go on with" in end.err
    monkeypatch.setattr(transfer_code, "classify", lambda *args: pytest.fail("it was finished"))
    assert script("train_transfer.py", "--resume", "out").status == 0


def test_stopped_in_its_first_run(transfer, script, monkeypatch):
    from engine import Trainer

    step = Trainer.step

    def stop(self, question, at):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, question, at)

    monkeypatch.setattr(Trainer, "step", stop)
    end, _ = transfer("scratch", "--mode", "linear", "--size", 8)
    assert end.status == 130 and "--resume out" in end.err
    monkeypatch.setattr(Trainer, "step", step)
    assert script("train_transfer.py", "--resume", "out").status == 0


def test_another_start_than_it_was(transfer, script, pretrained, tmp_path):
    shutil.copytree(pretrained, "mine")
    end, _ = transfer("mine", "--mode", "knn")
    assert end.status == 0, end.err
    torch.manual_seed(8)
    torch.save(build_encoder("conv").state_dict(), "mine/encoder.pt")
    end = script("train_transfer.py", "--resume", "out")
    assert end.status == 2 and "mine is not as it was; give the same images and encoder" in end.err


def test_a_picture_that_fails_costs_no_result(script, cache, short_run, monkeypatch):
    def fail(*args):
        raise ValueError("too large")

    monkeypatch.setattr("harness.pictures.draw_confusion", fail)
    end = script("train_transfer.py", short_run, "--mode", "knn", "--data-dir", cache, "--out", "run")
    assert end.status == 0 and end.err.count("\n") == 1 and "no picture of" in end.err and "too large" in end.err
    assert Path("run/summary.json").exists() and Path("run/predictions.csv").exists()
    assert "top-1 on" in end.out
