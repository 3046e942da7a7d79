import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness import download
from harness.download import EASY, HARD, OTHERS, Archive, fetch
from harness.errors import RunError, UsageError

NAME = "imagewang-160"


def make_tar(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return stream.getvalue()


@pytest.fixture
def good(patches):
    """An archive in the shape of Image网: (its bytes, its files)."""
    files = {}
    for i, patch in enumerate(patches[:40]):
        stream = io.BytesIO()
        patch.save(stream, "JPEG")
        folder = ("train/ant", "train/bee", "val/bee", "unsup")[i % 4]
        files[f"{NAME}/{folder}/{i}.JPEG"] = stream.getvalue()
    return make_tar(files), files


class Server(ThreadingHTTPServer):
    """Serves `content`; `behaviour` is one of "good", "no ranges", "drops", "error", "missing"."""

    content, behaviour, asked = b"", "good", ()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, start = self.server, 0
        wanted = self.headers.get("Range")
        server.asked = (*server.asked, wanted)
        if server.behaviour in ("error", "missing"):
            return self.send_error({"error": 503, "missing": 404}[server.behaviour])
        if wanted and server.behaviour != "no ranges":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2 + 1] if server.behaviour == "drops" else body)


@pytest.fixture
def server(monkeypatch, good):
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(download, "PAUSE", 0)
        server.offer = lambda content, name=NAME: _offer(server, monkeypatch, content, name)
        server.offer(good[0])
        yield server
        server.shutdown()


def _offer(server, monkeypatch, content, name):
    """Serve `content` as the archive of that name, as its publisher made it."""
    server.content = content
    whole = name in ("tinywang", "probe40")
    md5 = hashlib.md5(content if whole else content[: 2**20]).hexdigest()
    ending = "zip" if whole else "tgz"
    url = f"http://127.0.0.1:{server.server_port}/{name}.{ending}"
    monkeypatch.setitem(download.ARCHIVES, name, Archive(url, len(content), md5, head=not whole))


def tree(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def unpacked(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix(f"{NAME}/"): content for name, content in files.items()}


def test_a_good_download_is_found_without_network_afterwards(server, good, tmp_path):
    folder = fetch(NAME, tmp_path / "data")
    assert folder == tmp_path / "data" / NAME and tree(folder) == unpacked(good[1])
    server.behaviour = "error"
    assert fetch(NAME, tmp_path / "data") == folder
    assert server.asked == (None,)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [f".{NAME}.tgz.lock", NAME, f"{NAME}.tgz"]


def test_a_connection_that_drops_is_taken_up_where_it_ended(server, good, tmp_path):
    server.behaviour = "drops"
    assert tree(fetch(NAME, tmp_path)) == unpacked(good[1])
    assert len(server.asked) > 3 and server.asked[1] == f"bytes={len(good[0]) // 2 + 1}-"


@pytest.mark.parametrize("behaviour", ["good", "no ranges"])
def test_the_next_run_goes_on_or_starts_again(server, good, tmp_path, behaviour):
    server.behaviour = behaviour
    (tmp_path / f"{NAME}.tgz.part").write_bytes(good[0][:1000])
    assert tree(fetch(NAME, tmp_path)) == unpacked(good[1])
    assert server.asked == ("bytes=1000-",)


@pytest.mark.parametrize("behaviour, attempts, word", [("error", 5, "503"), ("missing", 1, "404")])
def test_a_server_error_says_what_to_do_and_keeps_what_arrived(server, good, tmp_path, behaviour, attempts, word):
    server.behaviour = behaviour
    (tmp_path / f"{NAME}.tgz.part").write_bytes(good[0][:1000])
    with pytest.raises(RunError, match=f"{word}.*put it at {tmp_path}/{NAME}.tgz.*--data photos"):
        fetch(NAME, tmp_path)
    assert len(server.asked) == attempts
    assert tree(tmp_path) == {f"{NAME}.tgz.part": good[0][:1000]}


def test_no_network_is_one_line_and_offers_the_photos(server, tmp_path, script):
    server.shutdown()
    server.server_close()
    end = script("train_pretext.py", "--data", NAME, "--data-dir", tmp_path / "data", "--out", "run")
    assert end.status == 1 and end.err.count("\n") == 1
    assert "refused" in end.err and "--data photos" in end.err and f"{NAME}.tgz" in end.err
    assert tree(tmp_path) == {} and not Path("run").exists()


def test_a_truncated_archive_placed_by_hand(server, good, tmp_path):
    (tmp_path / f"{NAME}.tgz").write_bytes(good[0][:-10])
    with pytest.raises(RunError, match=f"{NAME}.tgz has {len(good[0]) - 10} bytes.*should have {len(good[0])}"):
        fetch(NAME, tmp_path)
    assert server.asked == () and not (tmp_path / NAME).exists()


def test_a_wrong_checksum(server, good, tmp_path):
    server.content = bytes([good[0][0] ^ 1]) + good[0][1:]
    with pytest.raises(RunError, match="the MD5 is"):
        fetch(NAME, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_damage_behind_the_published_checksum_is_found_by_gzips(server, good, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "HEAD", 100)
    monkeypatch.setitem(
        download.ARCHIVES, NAME, download.ARCHIVES[NAME]._replace(md5=hashlib.md5(good[0][:100]).hexdigest())
    )
    server.content = good[0][:-6] + bytes([good[0][-6] ^ 1]) + good[0][-5:]
    with pytest.raises(RunError, match="damaged"):
        fetch(NAME, tmp_path)
    assert not (tmp_path / NAME).exists() and not list(tmp_path.glob("*.unpacking"))


def test_a_python_whose_tarfile_has_no_filter(server, good, tmp_path, monkeypatch):
    for name in ("data_filter", "FilterError"):
        monkeypatch.delattr(tarfile, name)
    with pytest.raises(RunError, match="this Python's tarfile has no safe filter; use at least Python 3.10.12"):
        fetch(NAME, tmp_path)


def test_another_file_than_was_announced(server, good, tmp_path):
    server.content = good[0] + b"more"
    with pytest.raises(RunError, match="longer than"):
        fetch(NAME, tmp_path)
    assert tree(tmp_path) == {}


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def pax(name, **headers):
    info = tarfile.TarInfo(name)
    info.pax_headers = headers
    return info


def device(name):
    info = tarfile.TarInfo(name)
    info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, 3
    return info


FILE = {f"{NAME}/train/ant/1.JPEG": b"x"}
HOSTILE = {
    "climbs": (make_tar({**FILE, f"{NAME}/../../evil": b"x"}), "outside the destination"),
    "climbs at once": (make_tar({**FILE, "../evil": b"x"}), "outside the destination"),
    "absolute": (make_tar({**FILE, "/tmp/unmix-evil": b"x"}), "no such data set"),
    "symbolic link": (make_tar(FILE, link(f"{NAME}/train/out", "/tmp")), "is refused: .*absolute path"),
    "hard link": (
        make_tar(FILE, link(f"{NAME}/train/out", "/etc/passwd", tarfile.LNKTYPE)),
        "is refused: .*absolute path",
    ),
    "device": (make_tar(FILE, device(f"{NAME}/train/null")), "is refused: .*special file"),
    "pipe": (make_tar(FILE, link(f"{NAME}/train/pipe", "", tarfile.FIFOTYPE)), "is refused: .*special file"),
    "bomb": (make_tar({**FILE, f"{NAME}/train/ant/2.JPEG": bytes(2**23)}), "unpacks to over"),
    "bomb behind the end": (make_tar(FILE) + gzip.compress(bytes(2**23)), "unpacks to over"),
    "twice": (make_tar({**FILE, f"{NAME}/train/ant/1.JPEG/x": b"y"}), "twice"),
    "name with a zero": (make_tar(FILE, pax(f"{NAME}/train/ant/2.JPEG", path=f"{NAME}/train/\0")), "damaged"),
    "sparse by hand": (make_tar(FILE, pax(f"{NAME}/train/ant/2.JPEG", **{"GNU.sparse.size": "abc"})), "damaged"),
    "deep": (make_tar({**FILE, f"{NAME}/train/" + "a/" * 1500 + "2.JPEG": b"x"}), "damaged|too long"),
    "long name": (make_tar({**FILE, f"{NAME}/train/" + "a" * 300: b"x"}), "a name that is too long"),
    "no archive": (b"<html>not found</html>" * 9, "damaged"),
    "other content": (make_tar({"other/1.JPEG": b"x"}), "no such data set"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives_are_refused_and_write_nothing_outside(server, tmp_path, case):
    content, message = HOSTILE[case]
    server.offer(content)
    data = tmp_path / "deep" / "data"
    with pytest.raises(RunError, match=message) as error:
        fetch(NAME, data)
    assert f"{NAME}.tgz" in str(error.value) and "remove it" in str(error.value) and "\n" not in str(error.value)
    assert tree(tmp_path) == {f"deep/data/{NAME}.tgz": content}
    assert [p for p in data.iterdir() if p.is_dir()] == [] and not Path("/tmp/unmix-evil").exists()


def test_a_half_unpacked_folder_is_never_taken_for_the_data_set(server, good, tmp_path, monkeypatch):
    written = []
    copy = tarfile.copyfileobj

    def killed(*args):
        if len(written) == 5:
            os._exit(9)
        written.append(copy(*args))

    child = os.fork()
    if not child:
        monkeypatch.setattr(tarfile, "copyfileobj", killed)
        try:
            fetch(NAME, tmp_path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / NAME).exists() and (tmp_path / f"{NAME}.unpacking").exists()
    assert tree(fetch(NAME, tmp_path)) == unpacked(good[1])
    assert not (tmp_path / f"{NAME}.unpacking").exists()


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_stands_where_the_data_set_belongs(server, good, tmp_path, what):
    server.offer(good[0])
    (tmp_path / NAME).write_text("x") if what == "file" else (tmp_path / NAME).symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=f"{NAME} is a file or a broken link; remove it"):
        fetch(NAME, tmp_path)


def test_a_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("x")
    with pytest.raises(UsageError, match="data_dir .* cannot be used"):
        fetch(NAME, tmp_path / "data")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("room", [0.5, 1.5])  # times the archive: full while downloading, while unpacking
def test_a_full_disk(server, small_disk, room):
    noise = {f"{NAME}/{split}/{i}.JPEG": os.urandom(1000) for split in ("train/a", "val/a") for i in range(40)}
    content = make_tar(noise)
    server.offer(content)
    (small_disk / "ballast").write_bytes(bytes(200 * 1024 - int(room * len(content)) - 8192))
    with pytest.raises(RunError, match="is full.*free some"):
        fetch(NAME, small_disk)
    assert {p.name for p in small_disk.iterdir() if p.suffix != ".lock"} == {"ballast"} | (
        {f"{NAME}.tgz"} if room > 1 else set()
    )


def make_zip(images: int) -> bytes:
    """A small Tiny ImageNet: every tenth image of a class is one of its `val`, and there is a class too many."""
    stream = io.BytesIO()
    lines = []
    with zipfile.ZipFile(stream, "w") as archive:
        for c, name in enumerate((*EASY, *HARD, *OTHERS, "n09999999")):
            for i in range(images):
                if i % 10 == 0:
                    image = f"val_{100 * c + i}.JPEG"
                    lines.append(f"{image}\t{name}\t0\t0\t62\t62\n")
                    archive.writestr(f"tiny-imagenet-200/val/images/{image}", f"{name} {i}")
                else:
                    image = f"{name}_{i}.JPEG"
                    archive.writestr(f"tiny-imagenet-200/train/{name}/images/{image}", f"{name} {i}")
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "".join(lines))
        archive.writestr("tiny-imagenet-200/test/images/test_0.JPEG", "test")
    return stream.getvalue()


def test_tinywang_follows_its_rule(server, tmp_path):
    server.offer(make_zip(30), "tinywang")
    folder = fetch("tinywang", tmp_path)
    found = tree(folder)
    assert len(found) == 20 * 30
    for name in (*EASY, *HARD):
        mine = {Path(path).name: path for path, content in found.items() if content.split()[0].decode() == name}
        ranked = sorted(mine, key=lambda image: hashlib.md5(image.encode()).hexdigest())
        assert len(ranked) == 30 and sum(image.startswith("val_") for image in ranked) == 3
        for rank, image in enumerate(ranked):
            easy = name in EASY
            where = f"train/{name}" if easy or rank < 3 else f"val/{name}" if rank < 12 else "unsup"
            assert mine[image] == f"{where}/{image}"


def test_probe40_follows_its_rule(server, tmp_path):
    """Its classes are none of tinywang's, and it takes the images of Tiny ImageNet's train/ alone."""
    server.offer(make_zip(30), "probe40")
    found = tree(fetch("probe40", tmp_path))
    assert len(found) == 40 * 27 and len(set(OTHERS) - {*EASY, *HARD}) == 40
    for name in OTHERS:
        mine = {Path(path).name: path for path, content in found.items() if content.split()[0].decode() == name}
        for rank, image in enumerate(sorted(mine, key=lambda image: hashlib.md5(image.encode()).hexdigest())):
            assert mine[image] == f"{('train', 'val')[rank % 2]}/{name}/{image}"


def test_another_zip_than_tiny_imagenet(server, tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn1\t0\n")
    server.offer(stream.getvalue(), "tinywang")
    with pytest.raises(RunError, match="no image of the class"):
        fetch("tinywang", tmp_path)


def test_the_published_figures_are_those_of_fastai():
    assert download.ARCHIVES["imagewang-160"].size == 191498213
    assert all(len(archive.md5) == 32 for archive in download.ARCHIVES.values())


def test_a_disk_that_is_full_of_decoded_images(small_disk, folder, script):
    end = script("train_pretext.py", "--data", folder, "--data-dir", small_disk, "--batch-size", 8, "--out", "run")
    assert end.status == 1 and "is full" in end.err and "free some" in end.err and end.err.count("\n") == 1
    assert tree(small_disk) == {} and not Path("run").exists()


def test_a_network_that_fails_for_a_moment(server, good, tmp_path, monkeypatch):
    opened, calls = download.urllib.request.urlopen, []

    def flaky(*args, **options):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(101, "Network is unreachable")
        return opened(*args, **options)

    monkeypatch.setattr(download.urllib.request, "urlopen", flaky)
    assert tree(fetch(NAME, tmp_path)) == unpacked(good[1])


def test_the_lock_stays_the_same_file(server, tmp_path):
    """If the first run removed it, a third one would lock a new file while the second still holds the old one."""
    lock = tmp_path / f".{NAME}.tgz.lock"
    lock.touch()
    before = lock.stat().st_ino
    fetch(NAME, tmp_path)
    assert lock.stat().st_ino == before


def test_two_runs_that_fetch_at_once(server, good, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(tree(fetch(NAME, tmp_path)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [unpacked(good[1])] * 3 and server.asked == (None,)
