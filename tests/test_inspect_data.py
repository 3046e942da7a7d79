import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def inspect(script):
    def run(*args):
        return script("inspect_data.py", "--data-dir", "decoded", *args)

    return run


def test_it_says_what_is_in_a_folder(inspect, labelled, patches):
    bee, cow = sorted((labelled / "train/bee").iterdir()), sorted((labelled / "val/cow").iterdir())
    (labelled / "val/cow" / "copy.jpg").write_bytes(bee[0].read_bytes())  # in two splits
    (labelled / "unsup" / "copy.jpg").write_bytes(bee[0].read_bytes())
    (labelled / "val/cow" / "again.jpg").write_bytes(cow[0].read_bytes())  # twice in one
    (labelled / "train/ant" / "broken.jpg").write_bytes(b"nothing")
    patches[50].resize((90, 70)).convert("L").save(labelled / "train/ant" / "grey.png")
    end = inspect(labelled, "--out", "pictures")
    assert end.status == 0, end.err
    lines = {tuple(line.split()[:2]): line for line in end.out.splitlines()}
    assert lines["train", "ant"].split()[2] == "9" and "8 RGB, 1 L" in lines["train", "ant"]
    assert "64 x 64 to 90 x 70, median 64 x 64" in lines["train", "ant"]
    assert lines["val", "cow"].split()[2] == "10" and lines["unsup", "-"].split()[2] == "9"
    assert "train  all 3" in end.out and "val    all 2" in end.out
    assert "1 unreadable" in end.out and "train/ant/broken.jpg: " in end.out
    assert "1 image in more than one split" in end.out and "copies by their pixels: 3;" in end.out
    names = ("train/bee/" + bee[0].name, "unsup/copy.jpg", "val/cow/copy.jpg")
    assert f"  {' = '.join(names)}" in end.out

    contact, mixtures = (np.asarray(Image.open(Path("pictures", f"{name}.png"))) for name in ("contact", "mixtures"))
    assert contact.std() > 20 and mixtures.std() > 20


def test_two_images_are_too_few_for_mixtures(inspect, tmp_path, patches):
    (tmp_path / "images").mkdir()
    for i in range(2):
        patches[i].save(tmp_path / "images" / f"{i}.png")
    end = inspect("images", "--out", "pictures")
    assert end.status == 0 and not Path("pictures/mixtures.png").exists()


def test_two_images_to_train_on_are_too_few_for_mixtures(inspect, labelled):
    shutil.rmtree(labelled / "unsup")
    for file in list((labelled / "train").rglob("*.jpg"))[2:]:
        file.unlink()
    end = inspect(labelled, "--out", "pictures")
    assert end.status == 0 and not Path("pictures/mixtures.png").exists(), end.err


def test_its_own_pictures_are_no_images(inspect, folder):
    for flag in ("--out", "--data-dir"):
        end = inspect(folder, flag, folder / "here")
        assert end.status == 2 and f"{flag} {folder}/here is inside {folder}, whose images" in end.err


def test_the_bundled_photographs(script, cache):
    end = script("inspect_data.py", "photos", "--data-dir", cache)
    assert end.status == 0 and Path("runs/data-photos/contact.png").exists()
    assert "no images in more than one split" in end.out


@pytest.mark.parametrize("name, message", [("nowhere", "no such folder"), ("", "argument DATA: it is empty")])
def test_no_such_folder(inspect, name, message):
    end = inspect(name)
    assert end.status == 2 and message in end.err and end.err.count("\n") == 1
