"""Every refusal of the data floor, whole: which exception, and the sentence to the last letter; and what lies just
within the limits is taken."""

import gzip
import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data.test_layouts import put, tar
from PIL import Image
from support.refusals import check_message

from minidiff.data import (
    attributes,
    digit_captions,
    digits,
    download,
    emoji,
    fitting,
    idx,
    image_file,
    layouts,
    mnist,
    own_pictures,
    pixels,
    swiss_roll,
)
from minidiff.data.dataset import load_dataset
from minidiff.data.own_pictures import PictureOptions
from minidiff.errors import UserError
from minidiff.input_files import parse_json


def png(*size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size or (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def written(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises 40,000 x 40,000 pixels, at which Pillow itself raises an error."""
    data = bytearray(png())
    data[16:24] = struct.pack(">II", 40_000, 40_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def reason_of(call) -> str:
    with pytest.raises(Exception) as caught:                # noqa: B017 - whatever the library says
        call()
    return str(caught.value)


# --- functions of arrays and texts --------------------------------------------------------------------------------

MEASURED = ", but measure takes (N, H, W) or (N, H, W, 1) with sides of 2 pixels or more"
GZIP = gzip.compress(bytes(300), mtime=0)
REFUSALS = [
    *[(ValueError, f"images has shape {shape}{MEASURED}", lambda shape=shape: attributes.measure(np.zeros(shape, "u1")))
      for shape in ((4, 4), (1, 4, 4, 3), (1, 1, 4), (1, 4, 1), (1, 4, 4, 1, 1), (1, 1, 4, 1))],
    *[(ValueError, f"digit is {digit}, but caption takes 0 to 9",
       lambda digit=digit: digit_captions.caption(np.random.default_rng(0), digit, attributes.Words()))
      for digit in (-1, 10)],
    (ValueError, "patterns must each hold {word} or {figure}, not ['a']", lambda: digit_captions.phrasings(["a"])),
    (ValueError, "patterns must each hold {word} or {figure}, not []", lambda: digit_captions.phrasings([])),
    (TypeError, "images has dtype float64, but to_float takes uint8", lambda: pixels.to_float(np.zeros(1))),
    (TypeError, "images has dtype int64, but to_uint8 takes uint8, or floats in [-1, 1]",
     lambda: pixels.to_uint8(np.zeros(1, np.int64))),
    *[(ValueError, "images holds NaN or infinity, but to_uint8 takes finite floats in [-1, 1]",
       lambda x=x: pixels.to_uint8(np.array([0, x]))) for x in (np.nan, np.inf, -np.inf)],
    (ValueError, "count must be at least 0, not -1", lambda: swiss_roll.points(np.random.default_rng(0), -1)),
    *[(ValueError, f"noise must lie between 0 and 1, such as 0.05, not {noise}",
       lambda noise=noise: swiss_roll.points(np.random.default_rng(0), 2, noise)) for noise in (0, 1, -0.5, np.nan)],
    (ValueError, "noise must lie between 0 and 1, such as 0.05, not 0",
     lambda: swiss_roll.log_prob(np.ones((1, 2)), 0)),
    *[(ValueError, f"x must be points (B, 2), not {shape}", lambda shape=shape: swiss_roll.log_prob(np.ones(shape)))
      for shape in ((2,), (1, 3), (1, 2, 2))],
    *[(UserError, f"a colour is white, black, grey or #rrggbb, such as #ff8000, not {text!r}",
       lambda text=text: fitting.colour(text)) for text in ("red", "#12345", "#1234567", "#12345g", "", "##12345")],
    (UserError, f"a colour is white, black, grey or #rrggbb, such as #ff8000, not {'x' * 40!r}",
     lambda: fitting.colour("x" * 50)),
    (TypeError, "array has dtype float32, but IDX files here hold uint8", lambda: idx.encode(np.zeros(2, "f4"))),
    *[(ValueError, f"array has shape {shape}, but IDX files here hold 1 to 4 axes, none empty",
       lambda shape=shape: idx.encode(np.zeros(shape, "u1"))) for shape in ((), (1, 1, 1, 1, 1), (2, 0))],
    (UserError, "f is not an IDX file: it begins with nothing, not with 00 00 08", lambda: idx.parse(b"", "f")),
    (UserError, "f is not an IDX file: it begins with 00 00 08, not with 00 00 08",
     lambda: idx.parse(b"\0\0\x08", "f")),
    *[(UserError, f"f is not an IDX file: it begins with {shown}, not with 00 00 08",
       lambda data=data: idx.parse(data, "f"))
      for data, shown in ((b"\1\0\x08\1abcd", "01 00 08 01"), (b"\0\1\x08\1abcd", "00 01 08 01"))],
    *[(UserError, f"f is IDX of type {kind:#04x}, but only 0x08, unsigned bytes, is read",
       lambda kind=kind: idx.parse(bytes([0, 0, kind, 1, 0, 0, 0, 1, 5]), "f")) for kind in (0x9, 0x7, 0x0d, 0)],
    *[(UserError, f"f has {axes} axes, but 1 to 4 are read", lambda axes=axes: idx.parse(bytes([0, 0, 8, axes]), "f"))
      for axes in (0, 5)],
    (UserError, "f is incomplete: it ends within its header, after 7 bytes",
     lambda: idx.parse(bytes([0, 0, 8, 1, 0, 0, 0]), "f")),
    (UserError, "f is empty: its header promises an array of shape (1, 0)",
     lambda: idx.parse(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 0]), "f")),
    *[(UserError, f"f has the wrong size: its header promises 1 x 2 bytes, and {n} follow",
       lambda n=n: idx.parse(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 2, *range(n)]), "f")) for n in (1, 3)],
    (UserError, "f is damaged or incomplete (it ends before its data do)", lambda: idx.unpack(GZIP[:-9], "f")),
    (UserError, "f is damaged or incomplete (Error -3 while decompressing data: incorrect data check)",
     lambda: idx.unpack(GZIP[:-8] + bytes(8), "f")),
    (UserError, "f holds more than one compressed file: only one is read", lambda: idx.unpack(GZIP + GZIP, "f")),
    (UserError, "f holds more than 64 MiB, the most that is read", lambda: idx.unpack(bytes((1 << 26) + 1), "f")),
    (UserError, "f holds more than 64 MiB, the most that is read",
     lambda: idx.unpack(gzip.compress(bytes((1 << 26) + 1), 1), "f")),
    (ValueError, "split is 'valid', but load takes 'train' or 'test'", lambda: mnist.load(split="valid")),
    (UserError, "a.gz is not the official file (its SHA-256 differs)", lambda: mnist._check_sha256(b"", "x", "a.gz")),
    *[(UserError, f"size must be a width and a height of 1 to 256 pixels, not {size}",
       lambda size=size: PictureOptions(size=size))
      for size in ((0, 4), (4, 0), (257, 4), (4, 257), (4,), (4, 4, 4), (4.0, 4))],
    (UserError, "fit must be one of crop, pad, not 'squeeze'", lambda: PictureOptions(fit="squeeze")),
    (UserError, "p is not a readable picture: PNG, JPEG, GIF, BMP and WEBP are read",
     lambda: image_file.decode(b"%!PS-Adobe", "p")),
    (UserError, "p is not a readable picture: PNG, JPEG, GIF, BMP and WEBP are read",
     lambda: image_file.decode(written("TIFF"), "p")),
    (UserError, "p has too many pixels: at most 25 million are read", lambda: image_file.decode(bomb(), "p")),
    (UserError, "p cannot be read as a picture (OSError)", lambda: image_file.decode(png(50, 50)[:-30], "p")),
    (UserError, "p has too many pixels: at most 25 million are read", lambda: image_file.decode(png(5001, 5000), "p")),
]


@pytest.mark.parametrize("error, message, call", REFUSALS,
                         ids=[f"{i} {message[:60]}" for i, (_, message, _) in enumerate(REFUSALS)])
def test_a_refusal_to_the_last_letter(error, message, call):
    check_message(error, message, call)


def test_what_lies_just_within_the_limits_is_taken():
    assert attributes.measure(np.zeros((1, 2, 2, 1), np.uint8)).width.shape == (1,)
    assert attributes.measure(np.zeros((0, 2, 2), np.uint8)).width.shape == (0,)
    assert digit_captions.caption(np.random.default_rng(0), 0, attributes.Words())
    assert digit_captions.caption(np.random.default_rng(0), 9, attributes.Words())
    assert swiss_roll.points(np.random.default_rng(0), 0).shape == (0, 2)
    assert swiss_roll.points(np.random.default_rng(0), 1, 1e-9).shape == (1, 2)
    assert swiss_roll.points(np.random.default_rng(0), 1, 1 - 1e-9).shape == (1, 2)
    assert [fitting.colour(c) for c in ("#fF8000", "aabbCC", "WHITE", "gray")] == [
        (255, 128, 0), (170, 187, 204), (255, 255, 255), (128, 128, 128)]
    assert idx.parse(bytes([0, 0, 8, 4, *[0, 0, 0, 1] * 4, 7]), "f").tolist() == [[[[7]]]]
    assert len(idx.unpack(bytes(1 << 26), "f")) == len(idx.unpack(gzip.compress(bytes(1 << 26), 1), "f")) == 1 << 26
    assert idx.unpack(GZIP + bytes(5), "f") == bytes(300)   # some programs pad a file with zeros
    assert PictureOptions(size=(1, 256)).size == (1, 256) and PictureOptions(size=(256, 1)).size == (256, 1)
    assert image_file.decode(png(5000, 5000), "p").size == (5000, 5000)


def test_a_compressed_file_of_the_largest_size_may_end_too_soon(monkeypatch):
    monkeypatch.setattr(idx, "LARGEST", 300)
    assert idx.unpack(GZIP, "f") == bytes(300)
    check_message(UserError, "f is damaged or incomplete (it ends before its data do)",
                  lambda: idx.unpack(GZIP[:-4], "f"))


# --- files and folders ----------------------------------------------------------------------------------------------

NO_CAPTIONS = (" has no captions: put a.txt beside a.png, a metadata.csv with the columns file_name and text into the "
               "folder, or pictures into folders that are named by what they show")
NONE = " holds no pictures (.png, .jpg, .jpeg, .jfif, .webp, .gif, .bmp), and no .tar with some"
FIRST_LINE = " names no columns file_name and text in its first line"
CELLS = " has more cells than there are columns: put a text that holds a comma between quotation marks"
TAKES = "; it takes a folder, or a file of .tar, .npz, .csv, .jsonl"
CSV = "; a text is between two quotation marks, and one within it is written \"\""


def bad_json(text: str) -> str:
    return reason_of(lambda: parse_json(text))


# the files below a folder -> what is named and what is said of it
FOLDERS = [
    ({"a.txt": "a"}, "{here}" + NONE),
    ({"a.png": png()}, "{here}" + NO_CAPTIONS),
    ({"a.png": png(), "b.txt": "b"}, "{here}" + NO_CAPTIONS),
    ({"metadata.csv": "file_name,text\n", "metadata.jsonl": ""},
     "{here} has a metadata.csv and a metadata.jsonl in one folder: remove one of them"),
    ({"metadata.jsonl": "\n{"}, "{here}/metadata.jsonl: line 2 is no JSON (" + bad_json("{") + ")"),
    ({"metadata.jsonl": '{"file_name": "a.png", "text": "a"}\r\n{'},
     "{here}/metadata.jsonl: line 2 is no JSON (" + bad_json("{") + ")"),
    ({"metadata.jsonl": '{"file_name": NaN}'},
     "{here}/metadata.jsonl: line 1 is no JSON (" + bad_json("NaN") + ")"),
    ({"metadata.jsonl": "[1]"},
     "{here}/metadata.jsonl: line 1 is no object such as {\"file_name\": \"a.png\", \"text\": \"a red apple\"}"),
    ({"metadata.jsonl": '{"file_name": "a.png", "text": "a"}\n{"text": "b"}'},
     "{here}/metadata.jsonl: row 2 names no picture; it takes a column file_name"),
    ({"metadata.jsonl": '{"file_name": 5, "text": "a"}'},
     "{here}/metadata.jsonl: row 1 names no picture; it takes a column file_name"),
    ({"metadata.csv": "name,words\n"}, "{here}/metadata.csv" + FIRST_LINE),
    ({"metadata.csv": "a.png\n"}, "{here}/metadata.csv" + FIRST_LINE),
    ({"metadata.csv": "file,text\na.png,one, two\n"}, "{here}/metadata.csv: line 2" + CELLS),
    ({"metadata.csv": 'file,text\na.png,"one" two\n'},
     "{here}/metadata.csv: line 2 is no line of a .csv (',' expected after '\"')" + CSV),
    ({"metadata.csv": "a.png,a red apple, shiny\n"}, "{here}/metadata.csv: line 1" + CELLS),
    ({"metadata.csv": 'file,text\na.png,"one\nb.png,two\n'},
     "{here}/metadata.csv: line 3 is no line of a .csv (unexpected end of data)" + CSV),
    ({"metadata.csv": "file,text\na.png," + "x" * 200_000},
     "{here}/metadata.csv: line 2 is no line of a .csv (field larger than field limit (131072))" + CSV),
    ({"metadata.csv": b"file,text\na.png,na\xefve\n"},
     "{here}/metadata.csv is not text in UTF-8 (byte 18): save it as UTF-8"),
]
# a file's name and its bytes -> the same
FILES = [
    *[(f"a{suffix}", b"", "{here} is no data set: unpack it first")
      for suffix in (".tar.gz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz", ".rar", ".7z", ".ZIP", ".XZ")],
    *[(name, b"", "{here} is no data set" + TAKES) for name in ("a.txt", "a", "a.zipx", "a.npy")],
    ("a.tar", b"x" * 600, "{here} is no .tar that can be read (invalid header)"),
    ("a.npz", b"x", "{here} is no .npz with the arrays images and captions (File is not a zip file)"),
    ("a.csv", b"", "{here}" + FIRST_LINE),
    ("a.jsonl", b"\xff", "{here} is not text in UTF-8 (byte 0): save it as UTF-8"),
]
ARRAYS = [
    *[({"images": np.zeros(shape, kind), "captions": ["a", "b"]},
       "{here}: images must be (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8, not " + f"{shape} {np.dtype(kind)}")
      for shape, kind in (((2, 4), "u1"), ((2, 4, 4, 2), "u1"), ((2, 4, 4), "u2"), ((2, 0, 4), "u1"),
                          ((2, 4, 4, 3, 1), "u1"))],
    *[({"images": np.zeros((2, 4, 4), "u1"), "captions": np.array(captions)},
       "{here}: captions must be 2 texts, one for each image, not " + shown)
      for captions, shown in ((["a"], "(1,) <U1"), ([["a"], ["b"]], "(2, 1) <U1"),
                              (np.zeros(2, "u1"), "(2,) uint8"))],
    ({"images": np.zeros((2, 4, 4)), "captions": ["a", "b"]}, "{here}: images.npy must hold uint8, not float64"),
    ({"images": np.zeros((2, 4, 4), "u1"), "captions": [1.5, 2]}, "{here}: captions.npy must hold texts, not float64"),
    ({"images": np.zeros((2, 4, 4), "u1"), "captions": np.array(["a", None], object)},
     "{here}: captions.npy must hold texts, not object"),
    ({"images": np.zeros((2, 4, 4), "u1")}, "{here} is no .npz with the arrays images and captions "
     "(\"There is no item named 'captions.npy' in the archive\")"),
]


def named(message: str, path: Path) -> str:
    """The message with the path in quotation marks where {here} stands, and what follows it up to a space or colon."""
    begins, _, rest = message.partition("{here}")
    inner = rest[:len(rest) - len(rest.lstrip("/abcdefghijklmnopqrstuvwxyz."))] if rest.startswith("/") else ""
    return begins + repr(str(path) + inner) + rest[len(inner):]


@pytest.mark.parametrize("files, message", FOLDERS)
def test_a_folder_is_refused_to_the_last_letter(tmp_path, files, message):
    put(tmp_path, files)
    check_message(UserError, named(message, tmp_path), lambda: layouts.listing(tmp_path))


@pytest.mark.parametrize("name, content, message", FILES)
def test_a_file_is_refused_to_the_last_letter(tmp_path, name, content, message):
    put(tmp_path, {name: content})
    check_message(UserError, named(message, tmp_path / name), lambda: layouts.listing(tmp_path / name))


@pytest.mark.parametrize("arrays, message", ARRAYS)
def test_arrays_are_refused_to_the_last_letter(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    check_message(UserError, named(message, tmp_path / "a.npz"), lambda: layouts.listing(tmp_path / "a.npz"))


@pytest.mark.parametrize("shape, size", [((10, 20, 30), "6,000"), ((1 << 32, 1 << 32, 1), f"{1 << 64:,}")])
def test_an_array_larger_than_its_file_is_refused_to_the_last_letter(tmp_path, shape, size):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(5999 - len(header.getvalue())))
    check_message(UserError, f"'{tmp_path}/a.npz': images.npy says it has {size} bytes, more than the file or 8 GiB",
                  lambda: layouts.listing(tmp_path / "a.npz"))


def test_the_largest_array_is_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=np.ones((1, 4, 4), np.uint8), captions=["a"])
    monkeypatch.setattr(layouts, "LARGEST_ARRAY", 16)
    assert len(layouts.listing(tmp_path / "a.npz").items) == 1


def test_a_text_in_a_tar_has_a_limit_of_its_own(tmp_path):
    largest = layouts.LARGEST_TEXT
    tar(tmp_path / "a.tar", {"0.png": png(), "0.txt": b"x" * largest, "1.png": png(), "1.txt": b"x" * (largest + 1)})
    found = layouts.listing(tmp_path / "a.tar")
    assert [item.name for item in found.items] == ["a.tar/0"] and found.cut == 1
    assert found.skipped == [("a.tar/1.txt", f"'{tmp_path}/a.tar' holds a file of more than 1 MiB, the most that is "
                              "read")]


def test_a_picture_that_takes_too_long_or_is_too_large_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(image_file, "SECONDS", -1)
    check_message(UserError, "p takes longer than -1 s to decode: save the picture again, in a smaller size",
                  lambda: image_file.decode(png(), "p"))
    put(tmp_path, {"a/1.png": png()})
    monkeypatch.setattr(layouts, "LARGEST_FILE", 20)
    (item,) = layouts.listing(tmp_path).items
    with pytest.raises(UserError, match=f"^{tmp_path}/a/1.png .*: save the picture in a smaller size$"):
        item.read()


def test_a_folder_that_may_not_be_read_says_what_to_do(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr("os.scandir", refuse)
    check_message(UserError, f"the folder '{tmp_path}' cannot be read (Permission denied): allow yourself to read it, "
                  "or move it away", lambda: layouts.listing(tmp_path))


@pytest.mark.parametrize("error, reason", [
    (OSError(5, "Input/output error"), "Input/output error"), (OSError("odd"), "odd"), (OSError(), "OSError"),
    (UserError("not the file"), "not the file")])
def test_why_a_mirror_failed(error, reason):
    assert download._reason(error) == reason
    outer = OSError("outer")
    outer.__cause__ = error
    assert download._reason(outer) == (reason if not isinstance(error, UserError) else "not the file")
    answer = OSError("x")
    answer.response = SimpleNamespace(status_code=404, reason="Not Found")
    assert download._reason(answer) == "status 404 Not Found"
    answer.response = None
    assert download._reason(answer) == "x"


def test_own_pictures_are_refused_to_the_last_letter(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = tmp_path / "mine"
    put(here, {f"{i}/{i}.png": b"x" for i in range(3)})
    unreadable = "PNG, JPEG, GIF, BMP and WEBP are read"
    check_message(UserError, f"3 of the 3 pictures in '{here}' cannot be read: '0/0.png' is not a readable picture: "
                  f"{unreadable}", lambda: own_pictures.load(here))
    check_message(UserError, f"'{here}' has no test pictures: put them into a folder test beside the folder train",
                  lambda: own_pictures.load(here, "test"))
    put(tmp_path / "table", {"t.csv": "file,text\n" + "".join(f"{i}.png,\n" for i in range(4)) + "x.png,a\n"} | {
        f"{i}.png": png() for i in range(4)})
    check_message(UserError, f"'{tmp_path}/table/t.csv' holds no picture that has a caption, such as 0.png, 1.png, "
                  "2.png, ...; captions without a picture: x.png", lambda: own_pictures.load(tmp_path / "table/t.csv"))
    check_message(UserError, "'nowhere' is neither a folder or file, nor a data set: the data sets are digits, emoji",
                  lambda: load_dataset("nowhere"))
    check_message(UserError, "'digits' takes no option size: its options are none",
                  lambda: load_dataset("digits", options={"size": (4, 4)}))


def test_a_cache_that_fails_is_refused_to_the_last_letter(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    put(tmp_path, {"file": "", "in/a/1.png": png()})
    there = tmp_path / "file" / "minidiff" / "pictures"
    with pytest.raises(UserError) as caught:
        own_pictures.load(tmp_path / "in")
    begins, _, rest = str(caught.value).partition(" could not be written ")
    assert begins.startswith(f"the cache {there}")
    assert rest == "(Not a directory): set XDG_CACHE_HOME to another folder"


def test_mnist_is_refused_to_the_last_letter(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIDIFF_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there, (images, labels) = tmp_path / "minidiff" / "mnist", mnist.FILES["test"]
    check_message(mnist.NotThere, f"MNIST is not in {there}, and downloading is switched off, and minidiff contains no "
                  "test images: put MNIST's four files into a folder and name it with --data or MINIDIFF_DATA",
                  lambda: mnist.load(split="test", download=False))
    check_message(mnist.NotThere, f"{tmp_path} has neither {images} nor {images}.gz, the test files of MNIST",
                  lambda: mnist.load(tmp_path, "test"))
    put(there, {f"{images}.gz": b"x", f"{labels}.gz": b"x"})
    check_message(UserError, f"{there}/{images}.gz is not the official file (its SHA-256 differs); delete it, and it "
                  "will be downloaded again", lambda: mnist.load(split="test"))
    for shapes, message in [
            (((3, 28, 27), (3,)), f"{tmp_path}/{images} holds an array of shape (3, 28, 27), not images of 28 x 28"),
            (((3, 28, 28), (2,)), f"{tmp_path}/{labels} has the shape (2,), but there are 3 images"),
            (((3, 28, 28), (3,)), f"{tmp_path}/{labels} holds the label 10, but digits are 0 to 9")]:
        put(tmp_path, {name: idx.encode(np.full(shape, 10, np.uint8))
                       for name, shape in zip((images, labels), shapes, strict=True)})
        check_message(UserError, message, lambda: mnist.load(tmp_path, "test"))


def test_digits_of_held_out_combinations_alone_are_refused_to_the_last_letter(tmp_path, monkeypatch):
    monkeypatch.setattr(attributes, "held_out", lambda labels, words: np.ones(len(labels), bool))
    put(tmp_path, {name: idx.encode(np.zeros((2, *shape), np.uint8))
                   for name, shape in zip(mnist.FILES["train"], ((28, 28), ()), strict=True)})
    check_message(UserError, f"all 2 images of MNIST in {tmp_path} are of combinations that training leaves out, such "
                  "as a thin 0 leaning right: add other images", lambda: digits.load(tmp_path))


def test_nothing_is_downloaded_offline_nor_more_than_there_may_be(tmp_path, monkeypatch):
    def fetched():
        download.fetch(["http://localhost/a"], tmp_path / "a", lambda data: None, largest=1000, quiet=True)
    with download.offline():
        check_message(UserError, "a is not on this machine, and nothing is downloaded now", fetched)
    sent = bytes(1000)
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", lambda self, url, out, _: [out.write(sent[:600]),
                                                                                   out.write(sent[600:])])
    fetched()
    assert (tmp_path / "a").read_bytes() == sent            # as many as may be are taken
    sent = bytes(1001)
    check_message(UserError, "a could not be downloaded (the server sent more than the 1,000 bytes that a may have)",
                  fetched)
    put(tmp_path, {"file": ""})
    check_message(UserError, f"the folder {tmp_path}/file/x cannot be made for a: Not a directory",
                  lambda: download.fetch([], tmp_path / "file/x/a", lambda data: None, largest=1))


def test_emoji_are_refused_to_the_last_letter(tmp_path):
    put(tmp_path, {"names.csv": "code,base,name,category\n1,1,a,x\n", "held_out.txt": ""})
    check_message(UserError, f"'{tmp_path}' has names.csv, and none of noto-32.npz, twemoji-32.npz",
                  lambda: emoji.read(tmp_path))
    np.savez(tmp_path / "noto-32.npz", rgba=np.zeros((1, 1, 1, 4), np.uint8))
    assert len(emoji.read(tmp_path)) == 1
    put(tmp_path, {"names.csv": "code,base,name,category\n1,1,a,x\n2,2,b,x\n"})
    np.savez(tmp_path / "noto-32.npz", rgba=np.zeros((2, 2, 2, 4)))
    check_message(UserError, f"'{tmp_path}/noto-32.npz': rgba.npy must hold uint8, not float64",
                  lambda: emoji.read(tmp_path))
    for shape, kind in (((2, 2, 2, 3), "u1"), ((1, 2, 2, 4), "u1"), ((2, 0, 2, 4), "u1"), ((2, 2, 2, 4), "u2"),
                        ((2, 2, 4), "u1")):
        np.savez(tmp_path / "noto-32.npz", rgba=np.zeros(shape, kind))
        check_message(UserError, f"'{tmp_path}/noto-32.npz': rgba must be (2, H, W, 4) uint8, a row for each of "
                      f"names.csv, not {shape} {np.dtype(kind)}", lambda: emoji.read(tmp_path))
    put(tmp_path, {"names.csv": "code,base,name\n1,1,a\n"})
    check_message(UserError, f"'{tmp_path}/names.csv' must have the columns code, base, name and category ('category')",
                  lambda: emoji.read(tmp_path))


# --- sources, which people read -------------------------------------------------------------------------------------

def test_sources_name_the_folder_and_the_number(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    put(tmp_path, {"names.csv": "code,base,name,category\n1,1,a,x\n2,2,b,x\n", "held_out.txt": "2"})
    put(tmp_path, {"in/a/1.png": png()})
    np.savez(tmp_path / "noto-32.npz", rgba=np.zeros((2, 2, 2, 4), np.uint8))
    assert emoji.load(tmp_path).source == f"2 emoji of {tmp_path}"
    assert emoji.load(None).source == "3786 emoji of minidiff (Noto, Apache 2.0)"
    put(tmp_path, {"two/a/1.png": png(), "two/a/2.png": png(3, 3)})
    assert own_pictures.load(tmp_path / "two").source == f"2 pictures of {tmp_path}/two"
    mine = own_pictures.load(tmp_path / "in")
    assert mine.source == f"1 picture of {tmp_path}/in" and mine.title == f"the data set of {mine.source}"
    assert mnist.packed().source == "the first 10,000 training images of MNIST, part of minidiff"
    put(tmp_path, {name: idx.encode(np.zeros((2, *shape), np.uint8))
                   for name, shape in zip(mnist.FILES["train"], ((28, 28), ()), strict=True)})
    assert mnist.load(tmp_path).source == f"MNIST in {tmp_path}"


def test_what_is_left_out_is_said_to_the_last_letter(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = tmp_path / "mine"
    put(here, {f"{i}.png": png() for i in range(20)} | {f"{i}.txt": "a" for i in range(12)} | {
        "0.png": b"x", "1.txt": "y" * 1001, "gone.txt": "gone"})
    own_pictures.load(here, options=PictureOptions(size=(3, 4)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minidiff: ")]
    assert lines == [
        "minidiff: skipped pictures that cannot be read: 1, 0.png ('0.png' is not a readable picture: PNG, JPEG, GIF, "
        "BMP and WEBP are read)",
        "minidiff: skipped pictures without a caption: 8, 12.png, 13.png, 14.png, ...",
        "minidiff: skipped captions without a picture: 1, gone.txt",
        "minidiff: shortened captions to 1,000 characters: those of 1 of the 12 pictures",
        "minidiff: enlarged smaller pictures to 3x4: 11 of 12"]
    put(tmp_path, {f"three/{i}.png": png() for i in range(4)} | {"three/3.txt": "a"})
    own_pictures.load(tmp_path / "three")
    assert "minidiff: skipped pictures without a caption: 3, 0.png, 1.png, 2.png\n" in capsys.readouterr().err
    put(tmp_path, {"one/a/1.png": png(9, 9), "one/metadata.jsonl": json.dumps({"file": "a/1.png", "text": "a"})})
    own_pictures.load(tmp_path / "one", options=PictureOptions(size=(3, 4)))
    assert capsys.readouterr().err.endswith("minidiff: there is one picture: a model can only learn to repeat it\n")
