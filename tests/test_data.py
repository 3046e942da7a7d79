import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import data
from data import (
    UNLABELLED,
    choose_place,
    get_dataloaders,
    list_data,
    open_images,
    open_pretext,
    pretext_split,
    spread,
)
from harness.errors import UsageError


def opened(root, tmp_path, size=32):
    return open_images(list_data(str(root)), size, tmp_path / "data")


def test_classes_are_those_of_train_by_name_in_every_split(labelled, tmp_path):
    images = opened(labelled, tmp_path)
    assert images.listing.classes == ["ant", "bee", "cow"]
    for entry, label in zip(images.listing.entries, images.labels.tolist(), strict=True):
        split, name = entry.path.split("/")[:2]
        assert entry.split == split
        assert label == (UNLABELLED if split == "unsup" else ["ant", "bee", "cow"].index(name))
    # val/ holds bee and cow alone: they are 1 and 2, not 0 and 1
    assert set(images.labels[images.rows("val")].tolist()) == {1, 2}


def test_a_class_that_only_val_has_is_refused(labelled):
    (labelled / "val" / "bee").rename(labelled / "val" / "wasp")
    with pytest.raises(UsageError, match="val/wasp/ is a class that train/ does not have"):
        list_data(str(labelled))


def test_a_val_without_classes_is_not_taken_for_training(labelled):
    for file in list((labelled / "val").rglob("*.jpg")):
        file.rename(labelled / "val" / f"{file.parent.name}-{file.name}")
    for name in ("bee", "cow"):
        (labelled / "val" / name).rmdir()
    with pytest.raises(UsageError, match="no usable image for val: expected val/CLASS/IMAGE"):
        list_data(str(labelled))


def test_any_other_folder_is_unlabelled_at_any_depth(folder, tmp_path):
    deep = folder / "a" / "b"
    deep.mkdir(parents=True)
    (folder / "00.png").rename(deep / "00.png")
    images = opened(folder, tmp_path)
    assert len(images.labels) == 40
    assert set(images.labels.tolist()) == {UNLABELLED}
    assert images.listing.entries[-1].path == "a/b/00.png"


def test_what_cannot_be_decoded_is_skipped_named_and_counted(folder, tmp_path):
    (folder / "00.png").write_bytes((folder / "00.png").read_bytes()[:200])
    (folder / "notes.txt").write_text("no image")
    (folder / "empty.jpg").touch()
    images = opened(folder, tmp_path)
    assert len(images.labels) == 39
    assert sorted(path for path, _ in images.listing.skipped) == ["00.png", "empty.jpg", "notes.txt"]
    text = images.describe()
    assert "skipped 00.png: " in text and text.endswith("3 files skipped")
    assert opened(folder, tmp_path).describe() == text  # from the cache too


@pytest.fixture
def unlisted(monkeypatch):
    """Make the system refuse to list the folders of a name."""

    def refuse(name, number):
        scandir = os.scandir

        def refusing(path="."):
            if Path(path).name == name:
                raise OSError(number, os.strerror(number), str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)

    return refuse


def test_a_folder_that_cannot_be_read_is_named(labelled, unlisted):
    unlisted("ant", errno.EACCES)
    assert ("train/ant", "a folder that cannot be read: Permission denied") in list_data(str(labelled)).skipped


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT])
def test_a_drive_that_is_lost_is_not_taken_for_damaged_images(folder, tmp_path, monkeypatch, number):
    read = Path.read_bytes

    def lost(file):
        if file.suffix == ".png" and int(file.stem) > 20:
            raise OSError(number, os.strerror(number), str(file))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", lost)
    with pytest.raises(OSError, match=os.strerror(number)):
        opened(folder, tmp_path)
    assert not list(tmp_path.rglob("*.cache"))
    monkeypatch.setattr(Path, "read_bytes", read)
    images = opened(folder, tmp_path)
    assert len(images.labels) == 40 and not images.listing.skipped


def test_what_was_skipped_is_tried_again_by_other_decoders(folder, tmp_path, monkeypatch):
    good = (folder / "00.png").read_bytes()
    stat = (folder / "00.png").stat()
    (folder / "00.png").write_bytes(bytes(len(good)))
    os.utime(folder / "00.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(opened(folder, tmp_path).labels) == 39
    (folder / "00.png").write_bytes(good)  # as if it could be decoded now: same size, same time
    os.utime(folder / "00.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(opened(folder, tmp_path).labels) == 39
    monkeypatch.setattr(data, "decoders", lambda: ["Pillow 99"])
    assert len(opened(folder, tmp_path).labels) == 40


def test_what_a_person_can_mend_is_said(tmp_path, patches):
    folder = tmp_path / "images"
    folder.mkdir()
    patches[0].save(folder / "good.png")
    (folder / "pointer.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    (folder / "page.jpg").write_bytes(b"\n<!DOCTYPE html><html><body>404</body></html>")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    said = dict(opened(folder, tmp_path).listing.skipped)
    assert "git lfs pull" in said["pointer.jpg"] and "a web page" in said["page.jpg"]
    assert "pillow-heif" in said["phone.heic"]


def test_names_of_many_skipped_files_go_to_a_file(folder, tmp_path):
    for i in range(300):
        (folder / f"{i}.txt").write_text("a caption")
    images = opened(folder, tmp_path)
    lines = images.describe().splitlines()
    assert len(lines) == 12 and lines[-1].startswith("300 files skipped") and str(images.skipped_file) in lines[-1]
    assert len(images.skipped_file.read_text().splitlines()) == 300


def test_a_val_beside_images_without_classes_is_not_trained_on(labelled):
    for split in ("train", "val"):
        for file in (labelled / split).rglob("*.jpg"):
            file.rename(labelled / split / file.name)
        for name in (labelled / split).iterdir():
            if name.is_dir():
                name.rmdir()
    with pytest.raises(UsageError, match="what is in val/ is never trained on"):
        list_data(str(labelled))


def test_what_is_written_is_not_read_as_images(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="data_dir data is inside ., whose images"):
        list_data(".")
    monkeypatch.chdir(tmp_path)
    assert len(list_data("images").entries) == 40


def test_links_and_pipes(folder, tmp_path):
    """A link to a folder is followed, one that leads back is not; what is no file is skipped, not waited for."""
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "00.png").rename(elsewhere / "00.png")
    (folder / "linked").symlink_to(elsewhere)
    images = opened(folder, tmp_path)
    assert len(images.labels) == 40 and images.listing.entries[-1].path == "linked/00.png"
    assert [path for path, _ in images.listing.skipped] == ["broken.png", "pipe.png"]


def test_a_link_does_not_take_the_name_of_what_it_leads_to(labelled):
    before = list_data(str(labelled))
    (labelled / "all").symlink_to("train")
    for split in ("train", "val"):
        (labelled / split / "aaa").symlink_to("bee")
    after = list_data(str(labelled))
    assert (after.entries, after.classes) == (before.entries, before.classes)


@pytest.mark.parametrize("name", ["x" * 230, os.fsdecode(b"caf\xe9"), "a\u7f51" * 60])
def test_names_that_are_long_or_no_text(script, folder, name):
    folder.rename(name)
    words = ("--data", name, "--size", 8, "--batch-size", 8, "--epochs", 1, "--data-dir", "d")
    end = script("train_pretext.py", *words)
    assert end.status == 0, end.err
    assert (next(Path("runs").iterdir()) / "summary.json").exists()
    end = script("train_pretext.py", *words, "--out", os.fsdecode(b"o\xff"))
    assert end.status == 2 and "is no text in UTF-8; give a folder" in end.err and end.err.count("\n") == 1


def test_a_split_without_a_usable_image_says_what_was_expected_where(labelled, tmp_path):
    for file in (labelled / "val").rglob("*.jpg"):
        file.write_bytes(b"damaged")
    with pytest.raises(
        UsageError, match=r"labelled: no usable image for val: expected val/CLASS/IMAGE; val/bee/03.jpg"
    ):
        opened(labelled, tmp_path)
    assert not list((tmp_path / "data" / "cache").iterdir())


def test_decoded_once(folder, tmp_path, monkeypatch):
    first = opened(folder, tmp_path)
    monkeypatch.setattr(data, "decode", lambda *_: pytest.fail("decoded again"))
    assert (opened(folder, tmp_path).pixels == first.pixels).all()


def test_decoded_once_however_the_path_is_typed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to(folder)
    for typed in (folder, "images", "./images/../images", "linked"):
        open_images(list_data(str(typed)), 32, "decoded")
        monkeypatch.setattr(data, "decode", lambda *_: pytest.fail("decoded again"))
    assert len(list(Path("decoded/cache").iterdir())) == 1


@pytest.mark.parametrize("change", ["new file", "changed file", "removed file", "size"])
def test_the_cache_is_rebuilt_when_something_changes(change, folder, tmp_path, patches):
    opened(folder, tmp_path)
    if change == "removed file":
        (folder / "00.png").unlink()
    elif change != "size":
        patches[-1].save(folder / ("new.png" if change == "new file" else "00.png"))
        os.utime(folder / "00.png", ns=(1, 1))
    images = opened(folder, tmp_path, size=16 if change == "size" else 32)
    assert len(images.labels) == {"new file": 41, "removed file": 39}.get(change, 40)
    assert images.pixels.shape[2] == (32 if change == "size" else 64)
    if change == "changed file":
        assert (images.pixels[0] == np.asarray(patches[-1]).transpose(2, 0, 1)).all()


def test_a_cut_off_cache_is_not_believed(folder, tmp_path):
    first = opened(folder, tmp_path)
    (file,) = (tmp_path / "data" / "cache").iterdir()
    pixels = np.array(first.pixels)
    for keep in (0, 5, file.stat().st_size // 2, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:keep])
        assert (opened(folder, tmp_path).pixels == pixels).all()


def test_a_failing_build_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        opened(folder, tmp_path)
    assert not list((tmp_path / "data" / "cache").iterdir())


def test_pixels_are_kept_at_twice_the_view_or_at_their_own_size(folder, tmp_path):
    assert [opened(folder, tmp_path, size).pixels.shape[2] for size in (16, 32, 48)] == [32, 64, 64]


@pytest.mark.parametrize("rows, count", [(11, 6), (1957, 218), (7, 7), (3, 8), (5, 1)])
def test_a_sample_is_spread_over_all_rows(rows, count):
    """The last rows are those of the last classes."""
    sample = spread(range(rows), count)
    gaps = np.diff([*sample, rows])
    assert len(sample) == min(rows, count) and sample[0] == 0 and gaps.min() >= 1 and np.ptp(gaps) <= 1


def test_pretext_split_is_the_tenth_of_lowest_md5_and_never_val(labelled):
    entries = list_data(str(labelled)).entries
    train, val = pretext_split(entries, 2)
    usable = [row for row, entry in enumerate(entries) if entry.split != "val"]
    assert sorted(train + val) == usable
    digest = lambda row: hashlib.md5(entries[row].path.encode()).hexdigest()  # noqa: E731
    assert max(map(digest, val)) < min(map(digest, train))
    assert sorted(val, key=digest) == val  # a validation batch shows images of every class, not of one after the other
    assert len(val) == max(3, round(len(usable) / 10))


def test_md5_is_no_matter_of_security(labelled, monkeypatch):
    """Some systems refuse it otherwise."""
    md5 = hashlib.md5

    def strict(*args, usedforsecurity=True):
        assert not usedforsecurity
        return md5(*args, usedforsecurity=False)

    monkeypatch.setattr(hashlib, "md5", strict)
    pretext_split(list_data(str(labelled)).entries, 2)


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_images(count, folder, tmp_path):
    for file in sorted(folder.iterdir())[count:]:
        file.unlink()
    with pytest.raises(UsageError, match=f"holds {count} images? to train on"):
        open_pretext(str(folder), 32, tmp_path / "data", 2)
    assert not (tmp_path / "data").exists()


def test_loaders(cache):
    images, train, val = open_pretext("photos", 32, cache, 100)
    train_loader, val_loader = get_dataloaders(images, train, val, 100, seed=0)
    epochs = []
    for epoch in (0, 1, 0):
        train_loader.batch_sampler.epoch = epoch
        batches = [pixels for pixels, _ in train_loader]
        assert len(batches) == len(train) // 100 == len(train_loader)
        assert all(pixels.shape == (100, 3, 64, 64) and pixels.dtype == torch.uint8 for pixels in batches)
        epochs.append(torch.cat(batches))
    assert not torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[0], epochs[2])
    pixels, labels = map(torch.cat, zip(*val_loader, strict=True))
    assert torch.equal(pixels, torch.from_numpy(images.pixels[val])) and torch.equal(labels, images.labels[val])


def test_every_training_image_once_an_epoch(folder, tmp_path):
    images, train, val = open_pretext(str(folder), 32, tmp_path / "data", 6)
    loader, _ = get_dataloaders(images, train, val, 6, seed=1)
    rows = [row for batch in loader.batch_sampler for row in batch]
    assert len(set(rows)) == len(rows) == 36


def test_images_on_the_device_give_the_same_batches_as_streamed_ones(cache):
    images, train, val = open_pretext("photos", 32, cache, 128)
    loaders = [get_dataloaders(images, train, val, 128, 3, place=place) for place in ("device", "stream")]
    assert (loaders[0][0].dataset.resident is None, loaders[1][0].dataset.resident is None) == (False, True)
    for resident, streamed in zip(*loaders, strict=True):
        if resident.batch_sampler is loaders[0][0].batch_sampler:
            resident.batch_sampler.epoch = streamed.batch_sampler.epoch = 2
            resident.batch_sampler.first = streamed.batch_sampler.first = 5
        count = 0
        for (pixels, labels), (others, other_labels) in zip(resident, streamed, strict=True):
            assert torch.equal(pixels, others) and torch.equal(labels, other_labels)
            count += 1
        assert count == len(resident) - (5 if count > 2 else 0)


def test_where_images_live_follows_the_free_memory(cache, monkeypatch):
    images, _, _ = open_pretext("photos", 32, cache, 128)
    gpu = torch.device("cuda")
    for free, expected in ((images.pixels.nbytes * 3, "device"), (images.pixels.nbytes, "stream")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert choose_place("auto", images, gpu) == expected
    assert choose_place("auto", images, torch.device("cpu")) == "stream"
    assert choose_place("device", images, torch.device("cpu")) == "device"


def test_a_class_that_is_added_moves_no_label(labelled, tmp_path):
    """An empty folder changes the numbers of the classes behind it, and no file."""
    before = open_images(list_data(str(labelled)), 16, tmp_path)
    (labelled / "train" / "aaa").mkdir()
    after = open_images(list_data(str(labelled)), 16, tmp_path)
    for images in (before, after):
        names = images.listing.classes
        for entry, label in zip(images.listing.entries, images.labels.tolist(), strict=True):
            if entry.split != "unsup":
                assert names[label] == entry.path.split("/")[1]


def test_two_processes_that_build_the_same_cache_at_once(folder, tmp_path):
    program = (
        "import sys\n"
        "from data import list_data, open_images\n"
        "print(open_images(list_data(sys.argv[1]), 16, sys.argv[2]).pixels[:].sum())\n"
    )
    words = [sys.executable, "-c", program, str(folder), str(tmp_path / "shared")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [process.communicate(timeout=120)[0] for process in both]
    alone = open_images(list_data(str(folder)), 16, tmp_path / "alone").pixels[:].sum()
    assert [int(found) for found in sums] == [alone, alone]
    assert len(list((tmp_path / "shared" / "cache").iterdir())) == 1


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("Train", "Val"), ("training", "testing")])
def test_what_looks_like_images_held_out_is_never_trained_on(tmp_path, patches, names):
    for number, name in enumerate(names):
        for cls in ("ant", "bee"):
            (tmp_path / "data" / name / cls).mkdir(parents=True)
            patches[number].save(tmp_path / "data" / name / cls / "0.png")
    with pytest.raises(UsageError, match=rf"{names[1]}/ beside {names[0]}/ .*train/CLASS/ and val/CLASS/"):
        list_data(str(tmp_path / "data"))
    assert len(list_data(str(tmp_path / "data" / names[0])).entries) == 2


def test_folders_that_tools_leave_behind_are_no_classes(labelled, patches):
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "lost+found"):
        for split in ("train", "val", "unsup"):
            (labelled / split / name).mkdir()
            patches[0].save(labelled / split / name / "0.png")
    listing = list_data(str(labelled))
    assert listing.classes == ["ant", "bee", "cow"] and len(listing.entries) == 48 and not listing.skipped


def test_a_drive_that_is_lost_while_it_is_listed(labelled, unlisted):
    unlisted("bee", errno.ENOTCONN)
    with pytest.raises(OSError, match="not connected"):
        list_data(str(labelled))
