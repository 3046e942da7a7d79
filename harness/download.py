"""Data sets by name: download once, verify, unpack safely. From then on no network is needed.

    fetch("imagewang-160", data_dir) -> the folder with train/, val/ and unsup/

Archives (`FILE.part`) get their names when complete, folders (`NAME.unpacking`) when unpacked from verified ones."""

import contextlib
import errno
import gzip
import hashlib
import http.client
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from harness.errors import RunError, UsageError
from harness.files import FULL, lock, unusable

HEAD = 2**20  # bytes at the start of an archive, whose MD5 fastai publishes
TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before another attempt
CHUNK = 2**18  # bytes
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, ValueError, RecursionError)
GROWTH = 4  # JPEGs do not compress: an archive that unpacks to more than this many times its size is refused


class Archive(NamedTuple):
    """A published archive."""

    url: str
    size: int  # bytes
    md5: str  # of the first 2^20 bytes, or with `head` false of the whole file
    head: bool = True


FASTAI = "https://s3.amazonaws.com/fast-ai-imageclas/"
ARCHIVES = {
    "imagewang-160": Archive(f"{FASTAI}imagewang-160.tgz", 191498213, "dab9b1d97b95574ac64122a19bc74ca1"),
    "imagewang-320": Archive(f"{FASTAI}imagewang-320.tgz", 669826647, "fff8ac034d60e14fcf7789845e625263"),
    "imagewang": Archive(f"{FASTAI}imagewang.tgz", 2900347689, "2b7776bac0fc95db72ac8a3b091a3e30"),
    "imagenette2-160": Archive(f"{FASTAI}imagenette2-160.tgz", 99003388, "c475f8f7617a200ba35b9facc48443c3"),
    "imagewoof2-160": Archive(f"{FASTAI}imagewoof2-160.tgz", 92612825, "3559b194123981a540b87132dbda412f"),
}
TINY = Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248100043, "90528d7ca1a48142e341f4ef8d21d0de", False)
ARCHIVES |= {"tinywang": TINY, "probe40": TINY}

EASY = ("n01443537", "n02988304", "n03796401", "n03854065", "n03837869",
        "n04507155", "n04146614", "n04398044", "n04285008", "n02802426")  # fmt: skip
HARD = ("n02085620", "n02094433", "n02099601", "n02099712", "n02106662",  # dogs
        "n02113799", "n02123045", "n02123394", "n02124075", "n02125311")  # another, three cats, a cougar  # fmt: skip
# The 40 of probe40.
OTHERS = ("n01629819", "n01641577", "n01698640", "n01774750", "n01984695", "n02058221", "n02233338",
          "n02364673", "n02480495", "n02486410", "n02669723", "n02843684", "n02892201", "n02909870",
          "n02950826", "n03042490", "n03085013", "n03201208", "n03255030", "n03388043", "n03733131",
          "n03838899", "n03930313", "n03970156", "n03976657", "n03980874", "n03983396", "n04008634",
          "n04070727", "n04259630", "n04366367", "n04456115", "n04486054", "n04532670", "n04597913",
          "n07711569", "n07715103", "n07720875", "n09246464", "n10148035")  # fmt: skip


def fetch(name: str, data_dir: str | Path) -> Path:
    """The folder of the data set `name`, one of ARCHIVES, in `data_dir`; fetched if it is not there. Raises UsageError
    if `data_dir` cannot be used, RunError if the data set cannot be fetched."""
    archive, folder = ARCHIVES[name], Path(data_dir, name)
    if folder.is_dir():
        return folder
    if os.path.lexists(folder):
        raise UsageError(f"{folder} is a file or a broken link; remove it, or mount what it leads to")
    file = folder.parent / archive.url.rsplit("/", 1)[1]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.parent / f".{file.name}.lock", wait=True) or contextlib.nullcontext():
            if not folder.is_dir():  # else another run has fetched it meanwhile
                if not file.exists():
                    download(archive, file)
                verify(archive, file)
                unpack(name, file, folder)
    except OSError as error:
        needs = f", and {name} needs about {3 * archive.size / 1e6:.0f} MB"
        raise unusable("data_dir", data_dir, error, needs) from error
    return folder


def download(archive: Archive, file: Path) -> None:
    """Download into `file`, from where an earlier attempt stopped if the server supports that, else from the start.
    Raises RunError if the server does not deliver; the part that arrived stays for the next time."""
    part, failures = file.with_name(f"{file.name}.part"), 0
    by_hand = f"download it yourself and put it at {file}"
    with tqdm(total=archive.size, desc=file.name, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        while (have := part.stat().st_size if part.exists() else 0) != archive.size:
            if have > archive.size:
                part.unlink()
                raise RunError(f"{archive.url} is longer than {archive.size} bytes, so it is another file; {by_hand}")
            try:
                why = _receive(archive, part, have, bar)
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in FULL:
                    part.unlink(missing_ok=True)  # it would only fill the disk
                    raise
                why = str(getattr(error, "reason", None) or error or type(error).__name__)
                if isinstance(error, urllib.error.HTTPError):
                    why = f"the server says {error.code} {error.reason}"
                    failures = ATTEMPTS if error.code < 500 and error.code != 429 else failures
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > have else failures + 1
            if failures >= ATTEMPTS:
                kept = f"; {now / 1e6:.0f} MB are kept, and the next time goes on from there" if now else ""
                photos = "or use the bundled images with `--data photos`"
                raise RunError(f"{archive.url} cannot be downloaded ({why}){kept}; {by_hand}, {photos}")
            if now < archive.size and failures:
                time.sleep(PAUSE)
    part.replace(file)


def _receive(archive: Archive, part: Path, have: int, bar: tqdm) -> str:
    """One connection's worth of bytes, appended to `part`. Returns why it ended."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(archive.url, headers={"User-Agent": "unmix", **headers})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and not goes_on:  # the server starts again
            have = 0
        bar.n = have
        bar.refresh()
        with open(part, "ab" if have else "wb") as stream:
            while have <= archive.size and (data := answer.read(CHUNK)):
                stream.write(data)
                have += len(data)
                bar.update(len(data))
    return f"the connection ended after {have} of {archive.size} bytes"


def verify(archive: Archive, file: Path) -> None:
    """Check size and MD5. Raises RunError if they are not the published ones; the file stays."""
    size = file.stat().st_size
    if size != archive.size:
        raise RunError(f"{file} has {size} bytes and should have {archive.size}; remove it and run again")
    digest = hashlib.md5(usedforsecurity=False)
    with open(file, "rb") as stream:
        for chunk in [stream.read(HEAD)] if archive.head else iter(lambda: stream.read(HEAD), b""):
            digest.update(chunk)
    if digest.hexdigest() != archive.md5:
        md5s = f"the MD5 is {digest.hexdigest()} and should be {archive.md5}"
        raise RunError(f"{file} is not the published file: {md5s}; remove it and run again")


def unpack(name: str, file: Path, folder: Path) -> None:
    """Unpack the archive `file` beside `folder`, then rename. Raises RunError if it is damaged, hostile or another."""
    beside = folder.with_name(f"{folder.name}.unpacking")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        with tqdm(desc=f"unpacking {file.name}", unit="file", leave=False, disable=None) as bar:
            if file.suffix == ".zip":
                unpack_tiny_imagenet(name, file, beside, bar)
            else:
                unpack_tar(file, beside, bar)
        if not all((beside / name / split).is_dir() for split in ("train", "val")):
            raise RunError(f"{file} has no {name}/train and {name}/val, so it is no such data set; remove it")
        (beside / name).rename(folder)
    except getattr(tarfile, "FilterError", ()) as error:  # before TarError, its base; an old Python has none
        raise RunError(f"{file} is refused: {error}; remove it") from error
    except DAMAGED as error:
        raise RunError(f"{file} is damaged ({error}); remove it and run again") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        path = Path(error.filename).relative_to(beside)
        raise RunError(f"{file} is refused: it holds {str(path)!r} twice; remove it") from error
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise RunError(f"{file} is refused: it holds a name that is too long; remove it") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class _Limited:
    """A stream that raises RunError once more than so many bytes were read."""

    def __init__(self, stream: BinaryIO, file: Path):
        self.stream, self.file, self.left = stream, file, GROWTH * file.stat().st_size + 2**20

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise _bomb(self.file)
        return data


def _bomb(file: Path) -> RunError:
    return RunError(f"{file} is refused: it unpacks to over {GROWTH} times its size, which images do not; remove it")


def unpack_tar(file: Path, folder: Path, bar: tqdm) -> None:
    """Unpack a .tgz below `folder`, with tarfile's `data` filter against hostile members, and check gzip's checksum."""
    if not hasattr(tarfile, "data_filter"):
        raise RunError("this Python's tarfile has no safe filter; use at least Python 3.10.12, 3.11.4 or 3.12")

    def members(tar):
        for member in tar:
            bar.update()
            yield member

    with gzip.open(file) as unzipped:
        limited = _Limited(unzipped, file)
        with tarfile.open(fileobj=limited, mode="r|") as tar:
            tar.extractall(folder, members(tar), filter="data")
        while limited.read(CHUNK):  # to the end, where the checksum is
            pass


def unpack_tiny_imagenet(name: str, file: Path, folder: Path, bar: tqdm) -> None:
    """Unpack tinywang or probe40, of the images of tiny-imagenet-200.zip, below `folder`.

    A class's images are sorted by the MD5 of the file's name, as hex. tinywang is Image网's protocol on 20 classes, of
    which it takes the images of `train` and `val` (500 + 50): those of the ten EASY classes go to train/CLASS/; of the
    ten HARD ones the first tenth (55) goes to train/CLASS/, the next three tenths (165) to val/CLASS/, the rest (330)
    to unsup/. probe40 takes the images of `train` of 40 OTHERS, which go to train/CLASS/ and val/CLASS/ in turn."""
    with zipfile.ZipFile(file) as archive:
        chosen = []  # (target, member)
        for label, members in _tiny_imagenet_classes(archive, file, name).items():
            ranked = sorted(members, key=lambda image: hashlib.md5(image.encode(), usedforsecurity=False).hexdigest())
            train, val = round(0.1 * len(ranked)), round(0.4 * len(ranked))
            for rank, image in enumerate(ranked):
                if name == "probe40":
                    split = ("train", "val")[rank % 2]
                else:
                    split = "train" if label in EASY or rank < train else "val" if rank < val else "unsup"
                place = folder / name / split / ("" if split == "unsup" else label)
                chosen.append((place / image, members[image]))
        if sum(member.file_size for _, member in chosen) > GROWTH * file.stat().st_size:
            raise _bomb(file)
        for target, member in chosen:
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as stream, open(target, "xb") as out:
                shutil.copyfileobj(stream, out, CHUNK)
            bar.update()


def _tiny_imagenet_classes(archive: zipfile.ZipFile, file: Path, name: str) -> dict[str, dict[str, zipfile.ZipInfo]]:
    """{class: {file's name: member}} of tinywang or probe40: the images of `train`, and for tinywang those of `val`."""
    classes, val = {label: {} for label in (OTHERS if name == "probe40" else EASY + HARD)}, {}
    try:
        with archive.open("tiny-imagenet-200/val/val_annotations.txt") as lines:
            val = dict(line.decode().split("\t")[:2] for line in lines)
    except (KeyError, ValueError) as error:
        raise RunError(f"{file} has no val/val_annotations.txt as Tiny ImageNet has; remove it") from error
    for member in archive.infolist():
        if found := re.fullmatch(r"[^/]+/(?:train/(\w+)/images|val/images)/([^/\\]+\.JPEG)", member.filename):
            label = found[1] or (val.get(found[2]) if name == "tinywang" else None)
            if label in classes:
                classes[label][found[2]] = member
    for label, members in classes.items():
        if not members:
            raise RunError(f"{file} has no image of the class {label}, so it is not Tiny ImageNet; remove it")
    return classes
