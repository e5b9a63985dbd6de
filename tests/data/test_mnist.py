"""MNIST from a folder, the cache, mirrors (a small local server, with its faults) and the package."""

import contextlib
import gzip
import hashlib
import http.server
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.data import download, idx, mnist
from minidiff.errors import UserError

NAMES = [name for names in mnist.FILES.values() for name in names]


def tiny(split: str) -> dict[str, bytes]:
    """The unpacked files of a split of 30 random images."""
    rng = np.random.default_rng(len(split))
    images = rng.integers(0, 256, (30, 28, 28)).astype(np.uint8)
    labels = rng.integers(0, 10, 30).astype(np.uint8)
    return dict(zip(mnist.FILES[split], (idx.encode(images), idx.encode(labels)), strict=True))


TINY = tiny("train") | tiny("test")
PACKED = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in TINY.items()}
IMAGES, LABELS = NAMES[:2]


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves PACKED; the first part of the path says with which fault."""

    asked: list[str] = []                                   # the path of every request

    def do_GET(self) -> None:
        fault, name = self.path.strip("/").split("/")
        self.asked.append(self.path)
        if fault == "missing":
            return self.send_error(404)
        if fault == "hangs":
            time.sleep(3)
            return None
        body = PACKED[name]
        if fault == "wrong":
            body = body[:20] + bytes(len(body) - 20)
        if fault == "other":
            body = gzip.compress(TINY[name.removesuffix(".gz")][::-1])
        if fault == "endless":
            body = bytes(1 << 18)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("half", "stalls"):
            body = body[: len(body) // 2]
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            self.wfile.flush()
            if fault == "stalls":
                time.sleep(3)
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def mirrors(server, monkeypatch, tmp_path):
    """A function that sets the mirrors by their faults ("good": none); the cache is empty, the data tiny."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MINIDIFF_DATA", raising=False)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in TINY.items()}
    monkeypatch.setattr(mnist, "SHA256", digests)
    monkeypatch.setattr(
        mnist, "fetch", lambda *args, **options: download.fetch(*args, timeout=0.4, **options)
    )
    Mirror.asked.clear()

    def use(*faults: str) -> None:
        monkeypatch.setattr(mnist, "MIRRORS", tuple(f"{server}/{fault}/" for fault in faults))

    return use


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def cached() -> list[str]:
    return sorted(path.name for path in mnist.cache_dir().glob("*"))


def check(loaded: mnist.Images, split: str) -> None:
    images, labels = mnist.FILES[split]
    assert loaded.images.tobytes() == TINY[images][16:] and loaded.images.shape == (30, 28, 28)
    assert loaded.labels.tobytes() == TINY[labels][8:] and len(loaded) == 30


# Folders


@pytest.mark.parametrize("files", [TINY, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_is_read(tmp_path, files, split):
    check(mnist.load(write(tmp_path, files), split), split)


@pytest.mark.parametrize("named", [
    lambda name: name.replace("-idx", ".idx"),                                      # as many copies have it
    lambda name: name.replace("-idx", ".idx") + ".gz",
    str.upper,
    lambda name: f"{name}.GZ",
    lambda name: name.replace("-", "_") + ".gz",
])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_files_other_common_names(tmp_path, split, named):
    """A folder beside them that has a file's own name, as some archives unpack, is passed over."""
    files = {named(name): gzip.compress(data) if named(name).lower().endswith(".gz") else data
             for name, data in TINY.items()}
    (tmp_path / mnist.FILES[split][0]).mkdir()
    check(mnist.load(write(tmp_path, files), split), split)


def test_the_official_name_is_taken_before_others(tmp_path):
    write(tmp_path, TINY | {name.replace("-idx", ".idx"): b"damaged" for name in TINY})
    check(mnist.load(tmp_path), "train")


def test_the_environment_names_a_folder_but_the_argument_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIDIFF_DATA", str(write(tmp_path / "a", TINY)))
    check(mnist.load(), "train")
    with pytest.raises(UserError, match="nowhere has neither train-images-idx3-ubyte nor"):
        mnist.load(tmp_path / "nowhere")


def test_a_named_folder_is_never_ignored(tmp_path, mirrors):
    mirrors("good")
    folder = write(tmp_path / "data", {k: v for k, v in TINY.items() if k != LABELS})
    with pytest.raises(UserError, match=f"has neither {LABELS} nor {LABELS}.gz"):
        mnist.load(folder)
    assert Mirror.asked == []


def images_of(*shape: int, value: int = 0) -> bytes:
    return idx.encode(np.full(shape, value, np.uint8))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (IMAGES, b"", "not an IDX file: it begins with nothing"),
        (IMAGES, b"<html>sorry</html>", "not an IDX file: it begins with 3c 68 74 6d, not with 00 00 08"),
        (IMAGES, TINY[IMAGES][:10], "incomplete: it ends within its header, after 10 bytes"),
        (IMAGES, TINY[IMAGES][:-1], "wrong size: its header promises 30 x 28 x 28 bytes, and 23519 follow"),
        (IMAGES, TINY[IMAGES] + b"\0", "wrong size.* 23521 follow"),
        (IMAGES, PACKED[f"{IMAGES}.gz"][:-9], "damaged or incomplete"),
        (
            IMAGES,
            PACKED[f"{IMAGES}.gz"][:500] + bytes(9) + PACKED[f"{IMAGES}.gz"][509:],
            "damaged or incomplete",
        ),
        (IMAGES, b"\0\0\x0d\x01\0\0\0\0", "type 0x0d, but only 0x08"),
        (IMAGES, b"\0\0\x08\0", "0 axes"),
        (IMAGES, b"\0\0\x08\xff" + b"\1" * 2000, "255 axes"),
        (IMAGES, b"\0\0\x08\4" + struct.pack(">4I", 0, *[2**32 - 1] * 3), "is empty"),
        (IMAGES, b"\0\0\x08\3" + struct.pack(">3I", *[2**32 - 1] * 3), "wrong size"),
        (IMAGES, images_of(30, 32, 32), r"shape \(30, 32, 32\), not images of 28 x 28"),
        (IMAGES, images_of(30), r"shape \(30,\), not images"),
        (IMAGES, images_of(29, 28, 28), r"labels-idx1-ubyte has the shape \(30,\), but there are 29 images"),
        (LABELS, images_of(30, 1), r"shape \(30, 1\), but there are 30 images"),
        (LABELS, images_of(30, value=10), "label 10, but digits are 0 to 9"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence_that_names_it(tmp_path, name, data, message):
    folder = write(tmp_path, TINY | {name: data})
    with pytest.raises(UserError, match=message) as caught:
        mnist.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = write(tmp_path, {LABELS: TINY[LABELS]})
    (folder / IMAGES).mkdir()
    with pytest.raises(UserError, match=f"{IMAGES} is a folder"):
        mnist.load(folder)


def test_a_small_file_cannot_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(idx, "LARGEST", 1 << 20)
    bomb = gzip.compress(bytes(1 << 24))
    assert len(bomb) < 1 << 15
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="more than 1 MiB"):
            mnist.load(write(tmp_path, TINY | {IMAGES: bomb}))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'valid', but load takes 'train' or 'test'"):
        mnist.load(split="valid")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 99))
def test_idx_round_trip(shape, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(idx.parse(idx.encode(array), "it"), array)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=40) | st.binary(max_size=30).map(lambda tail: b"\0\0\x08" + tail))
def test_idx_reads_or_refuses_any_bytes(data):
    with contextlib.suppress(UserError):
        assert idx.encode(idx.parse(data, "it")) == data


# Mirrors and the cache


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_download_fills_the_cache_and_is_not_repeated(mirrors, monkeypatch, split, capsys):
    monkeypatch.setattr(download, "DELAY", 0)
    mirrors("good")
    check(mnist.load(split=split), split)
    assert cached() == sorted(f"{name}.gz" for name in mnist.FILES[split])
    assert f"{mnist.FILES[split][0]}.gz" in capsys.readouterr().err                 # the bar
    assert len(Mirror.asked) == 2
    check(mnist.load(split=split, download=False, quiet=True), split)
    assert len(Mirror.asked) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("fault", ["missing", "half", "wrong", "other", "hangs", "stalls"])
def test_the_next_mirror_takes_over(mirrors, fault, capsys):
    mirrors(fault, "good")
    began = time.monotonic()
    check(mnist.load(quiet=True), "train")
    assert time.monotonic() - began < 2.5  # of the two files, each waits for one timeout at most
    assert not [line for line in capsys.readouterr().err.splitlines() if IMAGES in line]  # quiet: no bar
    assert cached() == sorted(f"{name}.gz" for name in mnist.FILES["train"])


def test_an_interrupted_download_leaves_nothing(mirrors):
    mirrors("half", "half")
    assert mnist.load(quiet=True).source == "the first 10,000 training images of MNIST, part of minidiff"
    assert cached() == []
    mirrors("good")
    check(mnist.load(quiet=True), "train")


def test_the_error_says_what_went_wrong_at_each_mirror(mirrors, monkeypatch):
    mirrors("missing", "wrong")
    monkeypatch.setattr(mnist, "MIRRORS", (mnist.MIRRORS[0], mnist.MIRRORS[1].replace("127.0.0.1", "localhost")))
    with pytest.raises(UserError, match="127.0.0.1:[0-9]+: status 404 Not Found; localhost:[0-9]+: the file sent is"):
        mnist.load(split="test", quiet=True)


@pytest.mark.parametrize(("fault", "reason"), [("hangs", "timed out"), ("stalls", "timed out"),
                                               ("half", "[0-9]+ bytes read, [0-9]+ more expected")])
def test_a_broken_connection_is_named(mirrors, fault, reason):
    mirrors(fault)
    with pytest.raises(UserError, match=rf"could not be downloaded \([a-zA-Z]*\(?{reason}"):
        mnist.load(split="test", quiet=True)


def test_a_mirror_cannot_send_more_than_the_file_may_have(mirrors, monkeypatch):
    monkeypatch.setattr(mnist, "LARGEST_DOWNLOAD", 1 << 17)
    mirrors("endless")
    with pytest.raises(UserError, match="sent more than the 131,072 bytes that t10k-images-idx3-ubyte.gz may have"):
        mnist.load(split="test")
    assert cached() == []


@pytest.mark.parametrize("fault", ["wrong", "other"])
def test_wrong_bytes_are_never_kept(mirrors, fault):
    mirrors(fault)
    with pytest.raises(UserError, match="the file sent is"):
        mnist.load(split="test")
    assert cached() == []


def test_a_damaged_cache_is_reported_and_left_alone(mirrors):
    mirrors("good")
    mnist.load(quiet=True)
    path = mnist.cache_dir() / f"{LABELS}.gz"
    for damage in (path.read_bytes()[:-10], gzip.compress(TINY[LABELS][::-1])):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=f"{LABELS}.gz is .*; delete it, and it will be downloaded again"):
            mnist.load(quiet=True)
        assert path.read_bytes() == damage
    path.unlink()
    check(mnist.load(quiet=True), "train")


# Without a network


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_without_a_network_the_packed_images_are_used_with_a_message(mirrors, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{closed_port()}/",) * 3)
    loaded = mnist.load()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Connection refused" in said
    assert said.endswith("); using the 10,000 training images that minidiff contains\n")
    assert loaded.images.shape == (10_000, 28, 28) and "10,000" in loaded.source
    mnist.load(quiet=True)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="Connection refused.*no test images.*MINIDIFF_DATA"):
        mnist.load(split="test")


def test_importing_mnist_loads_neither_pooch_nor_requests():
    code = "import sys, minidiff.data.mnist; sys.exit(bool({'pooch', 'requests', 'tqdm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_download_means_no_request(mirrors, capsys):
    mirrors("good")
    assert len(mnist.load(download=False)) == 10_000
    assert "downloading is switched off" in capsys.readouterr().err
    assert Mirror.asked == []


def test_without_a_cache_folder_the_packed_images_are_used(mirrors, monkeypatch, tmp_path, capsys):
    write(tmp_path, {"file": b""})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    mirrors("good")
    assert len(mnist.load()) == 10_000
    assert "minidiff/mnist cannot be made for train-images-idx3-ubyte.gz: Not a directory" in capsys.readouterr().err


def test_a_full_disk_is_reported(mirrors, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    mirrors("good")
    with pytest.raises(UserError, match="No space left on device"):
        mnist.load(split="test", quiet=True)
    assert not (mnist.cache_dir() / f"{NAMES[2]}.gz").exists()


# The packed subset


def test_the_packed_subset_is_the_beginning_of_the_training_set():
    """Hashes of the first 10,000 images and labels, taken from the official files."""
    digests = [hashlib.sha256(idx.read_bytes(mnist.PACKED / f"{name}.gz")).hexdigest() for name in NAMES[:2]]
    assert digests == [
        "2889698e6bc3614913e76901316712919d1998fc2b44512451bfe65bc1e668b1",
        "651e38e2ac0632f5113ec18f1df4977117f953197819034009971a6675a0df78",
    ]
    licence = (mnist.PACKED / "LICENSE.txt").read_text()
    assert "CC BY-SA 3.0" in licence and "Burges" in licence and "10,000" in licence


def test_packing_keeps_the_images_and_gives_the_same_bytes_again(tmp_path):
    first, second = (write(tmp_path / name, {}) for name in ("a", "b"))
    packed = mnist.load(mnist.PACKED)
    mnist.pack(packed, first, 100)
    again = mnist.load(first)
    np.testing.assert_array_equal(again.images, packed.images[:100])
    np.testing.assert_array_equal(again.labels, packed.labels[:100])
    mnist.pack(again, second)
    for name in NAMES[:2]:
        assert (first / f"{name}.gz").read_bytes() == (second / f"{name}.gz").read_bytes()
        assert (first / f"{name}.gz").read_bytes()[4:8] == bytes(4)  # no time of making
    mnist.pack(mnist.Images(np.zeros((10_001, 28, 28), np.uint8), np.zeros(10_001, np.uint8), "x"), second)
    assert len(mnist.load(second)) == 10_000


def test_arrays_are_read_only():
    loaded = mnist.load(mnist.PACKED)
    assert not loaded.images.flags.writeable and not loaded.labels.flags.writeable


def test_test_images_that_are_damaged_are_not_taken_for_missing():
    from minidiff.data.digits import Digits

    def test_of(error):
        def load_test():
            raise error
        return Digits(np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8), [], "", "", load_test).test()
    assert test_of(mnist.NotThere("none")) is None
    with pytest.raises(UserError, match="damaged"):
        test_of(UserError("damaged"))
