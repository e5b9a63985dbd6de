"""Files as a hostile hand makes them, by seed: each class of them writes one and reads it as minidiff does.

    python -m tests.support.hostile 1000        tries so many of each class, and prints the counts

A try is in order if the file is read, or refused by a UserError within the budget (budget.py): one line that names the
file.  Any other exception, and a refusal over the budget, is a failure.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import random
import socket
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin
from support import budget, small_systems, tiny

from minidiff import checkpoint, systems
from minidiff.data import emoji, layouts, mnist
from minidiff.data.image_file import open_image
from minidiff.data.picture_cache import Fit, pixels_of
from minidiff.errors import UserError
from minidiff.systems.dpm import DPM
from minidiff.training.run import TrainOptions, check_run
from minidiff.verify.scheduler import load as load_scheduler
from minidiff.verify.user_schedule import from_file

Rng = random.Random
ODD = [None, True, False, -1, 0, 1, 2, 7, 4096, 2**31, 2**63, -2**63, 10**30, 10**4000, 0.0, -1.5, 1e308, 1e-320,
       float("nan"), float("inf"), "", "x", "x" * 300, "\x1b[2J\nminidiff: done", "\ud800", [], {}, [1], [[]], {"a": 1},
       [0] * 1000, [28, 28, 1], json.loads("[" * 300 + "]" * 300)]


def _odd(rng: Rng):
    return copy.deepcopy(rng.choice(ODD))


# --- changing what is right ---------------------------------------------------------------------------------

def damaged(data: bytes, rng: Rng) -> bytes:
    """The bytes with a few of them changed, cut, repeated or put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(out) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            out[i:i + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del out[i:]
        elif kind == 2:
            out[i:i] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            out[i:i] = out[i:i + rng.randint(1, 400)]
        else:
            out[i:i + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
    return bytes(out)


def with_odd(value, rng: Rng, changes: int = 1):
    """A copy of a JSON value in which some places hold something odd, are gone, or are new."""
    value = json.loads(json.dumps(value))
    for _ in range(changes):
        found = list(places(value))
        if not found:
            return _odd(rng)
        inside, key = rng.choice(found)
        kind = rng.randrange(8)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[rng.choice(["x", "", "config", "__metadata__", "\n"])] = _odd(rng)
        elif kind == 2 and isinstance(inside[key], int | float) and abs(inside[key]) < 1e9:
            inside[key] = inside[key] * rng.choice([-1, 2, 10, 0.5]) + rng.choice([-1, 0, 1])
        else:
            inside[key] = _odd(rng)
    return value


def places(value):
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from places(inner)


def _json(value) -> bytes:
    old = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)                           # as another program may write it
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    finally:
        sys.set_int_max_str_digits(old)


def split(data: bytes) -> tuple[dict, bytes]:
    """A checkpoint's header and what follows it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + length]), data[8 + length:]


def joined(header, data: bytes) -> bytes:
    text = _json(header)
    return struct.pack("<Q", len(text)) + text + data


def changed_checkpoint(data: bytes, rng: Rng) -> bytes:
    """A checkpoint in which the configuration, an array's entry or the file's size is odd."""
    header, arrays = split(data)
    kind = rng.randrange(4)
    if kind == 0:
        return joined(with_odd(header, rng, rng.randint(1, 3)), arrays)
    if kind == 1:
        entry = rng.choice([name for name in header if name != "__metadata__"])
        header[entry] = with_odd(header[entry], rng)
        return joined(header, arrays)
    inner = json.loads(header["__metadata__"]["minidiff"])
    deep, changes = rng.randrange(3), rng.randint(1, 3)
    if deep == 0:
        inner = with_odd(inner, rng, changes)
    elif deep == 1:
        inner["meta"] = with_odd(inner["meta"], rng, changes)
    else:
        inner["meta"]["config"] = with_odd(inner["meta"]["config"], rng, changes)
    header["__metadata__"]["minidiff"] = _json(inner).decode("utf-8", "surrogatepass")
    return joined(header, arrays + bytes(rng.choice([0, 0, 0, 1, 400])))


# --- the classes: each writes a file into a folder, and returns the call that reads it --------------------------

@cache
def bytes_of(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        small_systems.small(name).save(path)
        return path.read_bytes()


@cache
def _state() -> bytes:
    trainer = tiny.trainer()
    for _ in range(2):
        trainer.step()
    with tempfile.TemporaryDirectory() as folder:
        return checkpoint.CheckpointFolder(folder).save(trainer.n, *trainer.state()).read_bytes()


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _info(path: Path) -> Callable:
    def info():
        from minidiff.cli.info import _model
        return _model(path)
    return info


def models(rng: Rng, folder: Path) -> Callable:
    """Checkpoints of all systems, changed in their header."""
    data = bytes_of(rng.choice(list(systems.SYSTEMS)))
    return _info(_written(folder / "m.safetensors", changed_checkpoint(data, rng)))


def damaged_models(rng: Rng, folder: Path) -> Callable:
    """Checkpoints of all systems with random damage, or a large hole at the end."""
    data = bytes_of(rng.choice(list(systems.SYSTEMS)))
    path = _written(folder / "m.safetensors", data if rng.random() < 0.1 else damaged(data, rng))
    if rng.random() < 0.2:
        os.truncate(path, rng.choice([1 << 30, 3 << 30, 1 << 40]))
    return _info(path)


def states(rng: Rng, folder: Path) -> Callable:
    """States of a run: what is restored must also make a step and be saved again."""
    data = _state()
    if rng.random() < 0.3:
        data = damaged(data, rng)
    else:
        header, arrays = split(data)
        inner = json.loads(header["__metadata__"]["minidiff"])
        if rng.random() < 0.5:
            inner["meta"][rng.choice(["seconds", "step", "train", "stage", "data", "config"])] = _odd(rng)
        else:
            inner["meta"] = with_odd(inner["meta"], rng)
        header["__metadata__"]["minidiff"] = _json(inner).decode("utf-8", "surrogatepass")
        out = bytearray(arrays)
        for name in rng.sample(["optimiser.n", "ema.n", "losses"], rng.randint(0, 2)):
            start = header[name]["data_offsets"][0]
            out[start:start + 8] = struct.pack(rng.choice(["<q", "<d"]), rng.choice([-1, 0, 1, 3, 10**9, 2**53]))
        data = joined(header, bytes(out))
    (folder / "states").mkdir(exist_ok=True)
    _written(folder / "states" / "step-000002.safetensors", data)

    def resume():
        trainer, kept = tiny.trainer(), checkpoint.CheckpointFolder(folder / "states")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = kept.latest(trainer.check_header)
            if saved:
                trainer.restore(saved)
                with contextlib.suppress(FloatingPointError):                       # which the loop reports
                    trainer.step()
                kept.save(trainer.n, *trainer.state())
    return resume


def starts(rng: Rng, folder: Path) -> Callable:
    """run.json, which says how a run was started."""
    start = {"system": "dpm", "config": {"T": 6, "hidden": 5}, "data": "x",
             "options": {"seed": 0, "effort": 1.0, "steps": None, "batch": 4, "lr": 0.01, "precision": "float32"},
             "needed": {}}
    data = _json(start)
    data = damaged(data, rng) if rng.random() < 0.4 else _json(with_odd(start, rng, rng.randint(1, 3)))
    if rng.random() < 0.05:
        data = b"[" * (1 << 20)
    _written(folder / "run.json", data)
    return lambda: check_run(folder, DPM, True, TrainOptions())


def tables(rng: Rng, folder: Path) -> Callable:
    """Tables of betas or alpha_bar as .npy, .csv, .txt and .json."""
    betas = np.linspace(1e-4, 0.02, rng.choice([1, 2, 50]))
    suffix = rng.choice([".npy", ".csv", ".txt", ".json"])
    if suffix == ".npy":
        file = io.BytesIO()
        array = rng.choice([betas, betas.astype(np.float16), betas[None], betas.astype(">f8"), betas > 0,
                            np.array([None, {}], object), betas * np.nan, np.array("x"), betas[:0]])
        np.save(file, array, allow_pickle=True)
        data = file.getvalue()
        if rng.random() < 0.5:
            shape = rng.choice(["(-5,)", "(10**9,)", "(99999999,)", "(2,", "()", "(True,)", "(1,)*9", "(" * 400, "[2]"])
            text = f"{{'descr': '{rng.choice(['<f8', '|O', '<f16', '<U9', '<m8', '?'])}', 'fortran_order': " \
                   f"{rng.choice(['True', 'False', '0'])}, 'shape': {shape}, }}".encode()
            data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + betas.tobytes()
    elif suffix == ".json":
        data = _json(with_odd(rng.choice([betas.tolist(), {"betas": betas.tolist()}]), rng))
        data = rng.choice([data, data, b"[" * (4 << 20), b"[" + b"{}," * (1 << 20) + b"{}]", b"9" * 5000])
    else:
        lines = [str(b) for b in betas]
        lines[rng.randrange(len(lines))] = rng.choice(["", "0.01", "x", "nan", "inf", "1e999", "0,02", "1;2", "\0",
                                                       "9" * 5000, "1" * 100, "١"])
        data = "\n".join(lines).encode()
        data = rng.choice([data, data, b"\n" * (4 << 20), b"1\n" * (2 << 20), b"1 " * (2 << 20), b"x" * (4 << 20)])
    path = _written(folder / f"t{suffix}", damaged(data, rng) if rng.random() < 0.3 else data)
    return lambda: from_file(path, rng.choice(["betas", "alpha_bar"]))


def many_scans(rng: Rng) -> bytes:
    """A progressive JPEG with its last scan many times: small, and slow to decode."""
    file = io.BytesIO()
    Image.new("L", (rng.choice([2000, 4000]),) * 2, 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda"):-2]
    return data[:-2] + scan * rng.choice([100, 1000, 3000]) + data[-2:]


def many_chunks(rng: Rng) -> bytes:
    """A PNG with a million empty chunks, or with much compressed text."""
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if rng.random() < 0.5:
        info.add_text("a", "x" * (1 << 20), zip=True)
    Image.new("L", (9, 9)).save(file, "PNG", pnginfo=info)
    data = file.getvalue()
    chunk = rng.choice([struct.pack(">I4sI", 0, b"abCd", zlib.crc32(b"abCd")), data[33:-60]])
    return data[:33] + chunk * rng.choice([10, 100_000]) + data[33:]


@cache
def _picture(kind: str, mode: str) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).convert(mode)
    image.save(file, kind)
    return file.getvalue()


def pictures(rng: Rng, folder: Path) -> Callable:
    """Pictures: damaged, in other formats, with many scans, chunks or pixels."""
    kind = rng.random()
    if kind < 0.04:
        data = many_scans(rng)
    elif kind < 0.08:
        data = many_chunks(rng)
    elif kind < 0.12:
        file = io.BytesIO()
        Image.new("1", (rng.choice([5000, 9000]),) * 2).save(file, "PNG")
        data = file.getvalue()
    elif kind < 0.2:
        data = _picture(rng.choice(["EPS", "TIFF", "PCX", "ICO", "PPM"]), "RGB")
    else:
        modes = {"PNG": ["1", "L", "LA", "P", "RGB", "RGBA"], "JPEG": ["L", "RGB", "CMYK"], "GIF": ["L", "RGB"],
                 "BMP": ["1", "L", "P", "RGB"]}
        form = rng.choice(list(modes))
        data = damaged(_picture(form, rng.choice(modes[form])), rng)
    path = _written(folder / "p.png", data)
    return lambda: open_image(path)


@cache
def _idx(images: bool, packed: bool) -> bytes:
    few = tiny.images(20)
    from minidiff.data.idx import encode
    data = encode(few.images if images else few.labels)
    return gzip.compress(data, mtime=0) if packed else data


def idx_files(rng: Rng, folder: Path) -> Callable:
    """MNIST's files, compressed and not: damaged, bombs, long names, several members."""
    where = folder / "mnist"
    where.mkdir(exist_ok=True)
    for old in where.iterdir():
        old.unlink()
    for name, images in zip(mnist.FILES["train"], (True, False), strict=True):
        packed = rng.random() < 0.6
        data = _idx(images, packed)
        kind = rng.randrange(12)
        if kind == 0 and packed:
            data = data[:3] + b"\x08" + data[4:10] + b"x" * rng.choice([10, 60 << 20]) + b"\0" + data[10:]
        elif kind == 1 and packed:
            data = data * rng.choice([2, 1000])
        elif kind == 2 and packed:
            data = _bomb()
        elif kind < 9:
            data = damaged(data, rng)
        _written(where / (name + ".gz" * packed), data)
    return lambda: mnist.load(where, quiet=True)


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(200 << 20), 1)


def scheduler_options(rng: Rng, folder: Path) -> Callable:
    """--scheduler-config of the registered samplers."""
    options = {key: rng.choice([*ODD, 10, 50, 100_000_000, "linear", "cosine:offset=1e300", "eps", "trailing"])
               for key in rng.sample(["schedule", "T", "spacing", "predicts", "eta", "x"], rng.randint(1, 3))}
    return lambda: load_scheduler(f"minidiff:{rng.choice(['ddpm', 'ddim', 'heun', 'dpm++2m', 'x', ''])}", options)


def special_files(rng: Rng, folder: Path) -> Callable:
    """A pipe, a folder, a socket, a device, or a broken link in the place of a file of each kind."""
    path = folder / f"special{rng.choice(['.png', '.npy', '.csv', '.json', '.safetensors'])}"
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    made = rng.randrange(6)
    if made == 0:
        os.mkfifo(path)
    elif made == 1:
        path.mkdir()
    elif made == 2:
        with socket.socket(socket.AF_UNIX) as s:
            here = os.getcwd()
            os.chdir(folder)                                # a socket's path is short
            try:
                s.bind(path.name)
            finally:
                os.chdir(here)
    else:
        path.symlink_to(rng.choice(["/dev/zero", "/dev/tty", "nowhere", path.name, "/proc/self/mem"]))
    readers = [_info(path), lambda: open_image(path), lambda: from_file(path, "betas"),
               lambda: mnist.idx.read_bytes(path)]

    def as_state():
        where = folder / "s"
        where.mkdir(exist_ok=True)
        for old in where.iterdir():
            old.rmdir() if old.is_dir() and not old.is_symlink() else old.unlink()
        os.rename(path, where / "step-000009.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = checkpoint.CheckpointFolder(where)
            assert kept.latest() is None
            kept.prepare(3)

    def as_start():
        where = folder / "r"
        where.mkdir(exist_ok=True)
        target = where / "run.json"
        target.rmdir() if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
        os.rename(path, target)
        check_run(where, DPM, True)
    return rng.choice([*readers, as_state, as_start])


# --- captioned pictures: what layouts.py and emoji.py read ------------------------------------------------------

NAMES = ["a.png", "a.txt", "a.json", "b.png", "b.txt", "../../up.png", "/etc/absolute.png", "x" * 90 + ".png", ".png",
         "a.b.c.txt", "a.gif", "\u4e03.png", "metadata.csv", "inside.tar"]


def _listed(path: Path) -> Callable:
    """Lists what is captioned, and decodes a few of the pictures."""
    def read():
        found = layouts.listing(path)
        return [pixels_of(item, Fit(8, 8)) for item in found.items[:5]]
    return read


def _content(name: str, rng: Rng) -> bytes:
    if name.endswith((".png", ".gif")):
        return rng.choice([_picture("PNG", "RGBA"), damaged(_picture("GIF", "RGB"), rng), b""])
    return rng.choice([b"a red apple\n", b"\xff\xfe", b"\0" * 5, b"x" * 20_000, _json({"text": _odd(rng)}),
                       _json(with_odd({"caption": ["a", "b"]}, rng)), "\u4e03".encode("utf-16")])


def captioned_tars(rng: Rng, folder: Path) -> Callable:
    """Webdataset's .tar: links, devices, absolute names, sizes that lie, damage."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
        for name in rng.choices(NAMES, k=rng.randint(0, 8)):
            data, member = _content(name, rng), tarfile.TarInfo(name)
            member.size = len(data)
            if rng.random() < 0.2:
                member.type = rng.choice([b"1", b"2", b"3", b"6", b"S", b"Z"])        # links, devices, holes
                member.linkname = rng.choice(["/dev/zero", "a.png", "../x", ""])
            tar.addfile(member, io.BytesIO(data))
    data = bytearray(file.getvalue())
    if rng.random() < 0.3:
        data[124:136] = rng.choice([b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"x" * 12])    # a size
    path = _written(folder / "p.tar", damaged(bytes(data), rng) if rng.random() < 0.5 else bytes(data))
    if rng.random() < 0.05:
        os.truncate(path, 1 << 40)
    return _listed(path)


def _packed(arrays: dict[str, bytes], rng: Rng) -> bytes:
    """An .npz of these .npy files, perhaps damaged."""
    file = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in arrays.items():
            archive.writestr(name, data)
    data = file.getvalue()
    return damaged(data, rng) if rng.random() < 0.3 else data


def _npy(array: np.ndarray, rng: Rng) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    data = file.getvalue()
    if rng.random() < 0.15:                                 # a shape or a type that lies
        shape = rng.choice(["(-5,)", "(10**9,)", "(99999999, 9, 9, 3)", "(2,", "()", "(0, 4, 4)", "(3, 4, 4, 3, 1)"])
        text = f"{{'descr': '{rng.choice(['|u1', '|O', '<U9', '<U99999999', '|V4'])}', 'fortran_order': " \
               f"{rng.choice(['True', 'False'])}, 'shape': {shape}, }}".encode()
        data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + array.tobytes()[:100]
    return data


def captioned_npz(rng: Rng, folder: Path) -> Callable:
    """.npz of images and captions: other types and shapes, pickles, sizes that lie, bombs, damage."""
    images = np.zeros(rng.choice([*[(3, 4, 4, 3), (3, 4, 4)] * 3, (3, 4), (0, 4, 4, 3), (3, 4, 4, 7), (2, 400, 1, 1)]),
                      rng.choice([*[np.uint8] * 5, np.float32, bool]))
    captions = rng.choice([*[np.array(["a", "b", "c"])] * 6, np.array([b"a", b"\xff", b"c"]), np.array([1, 2, 3]),
                           np.array([None, {}, 3], object), np.array("x"), np.array(["a"] * 4),
                           np.array(["", " ", "\n"])])
    arrays = {"images.npy": _npy(images, rng), "captions.npy": _npy(captions, rng)}
    if rng.random() < 0.1:
        arrays["images.npy"] = _bomb_array()
    if rng.random() < 0.1:
        del arrays[rng.choice(list(arrays))]
    return _listed(_written(folder / "p.npz", _packed(arrays, rng)))


@cache
def _bomb_array() -> bytes:
    """The header of an array of 60 GiB, and a few bytes."""
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (20000000, 32, 32, 3), }"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + bytes(1 << 20)


def captioned_tables(rng: Rng, folder: Path) -> Callable:
    """Tables of pictures and captions: odd values, names that lead elsewhere, other encodings, damage."""
    where = folder / "table"
    where.mkdir(exist_ok=True)
    for old in where.iterdir():
        old.unlink()
    _written(where / "a.png", _picture("PNG", "RGB"))
    names = ["a.png", "b.png", "../a.png", "/dev/zero", "/etc/passwd", "", ".", "a.png\0", "x" * 5000, "\u4e03.png"]
    rows = [{"file_name": rng.choice(names), "text": rng.choice(["an apple", "", "x" * 20_000, "a\nb"])}
            for _ in range(rng.randint(0, 4))]
    if rng.random() < 0.5:
        path, text = where / "metadata.jsonl", b"\n".join(_json(with_odd(row, rng) if rng.random() < 0.5 else row)
                                                        for row in rows)
    else:
        lines = [rng.choice(["file_name,text", "path,caption", "x,y", "", '"'])]
        lines += [f'{row["file_name"]},"{row["text"]}"' for row in rows]
        path, text = where / "metadata.csv", "\n".join(lines).encode(rng.choice(["utf-8", "utf-16", "utf-32"]))
    text = rng.choice([text, text, damaged(text, rng), b"[" * (1 << 20), b'"' + b"x" * (1 << 20)])
    _written(path, text)
    return _listed(rng.choice([where, path]))


def emoji_folders(rng: Rng, folder: Path) -> Callable:
    """A folder of emoji: its names, its list of held-out ones, and its pictures."""
    where = folder / "emoji"
    where.mkdir(exist_ok=True)
    names = b"code,base,name,category\nA,A,red apple,Food\nB,B,robot,Smileys\n"
    rgba = np.zeros(rng.choice([*[(2, 4, 4, 4)] * 6, (2, 4, 4, 3), (3, 4, 4, 4), (0, 4, 4, 4)]),
                    rng.choice([*[np.uint8] * 5, np.float32]))
    _written(where / "names.csv", rng.choice([*[names] * 6, damaged(names, rng), b"", b"\0" * 9, b"code\nA\n"]))
    _written(where / "held_out.txt", rng.choice([*[b"B\n"] * 4, b"", b"\xff\xfe\0", b"nowhere\n" * 1000]))
    _written(where / "noto-32.npz", _packed({"rgba.npy": _npy(rgba, rng)}, rng))
    return lambda: emoji.load(where)


CLASSES = [models, damaged_models, states, starts, tables, pictures, idx_files, scheduler_options, special_files,
           captioned_tars, captioned_npz, captioned_tables, emoji_folders]


# --- tries --------------------------------------------------------------------------------------------------

def tried(kind: Callable, seed: int, folder: Path) -> tuple[budget.Measured, str]:
    """One try, and what is wrong with it: '' where it is in order."""
    result = budget.measured_again(lambda: kind(Rng(seed), folder))
    error = result.result
    if not result.raised:
        return result, ""
    if not isinstance(error, UserError):
        return result, f"{type(error).__name__}: {str(error)[:200]}"
    if len(str(error).splitlines()) != 1:
        return result, f"a refusal of several lines: {error}"
    if kind is not scheduler_options and str(folder) not in str(error):
        return result, f"a refusal that does not name the file: {error}"
    if result.seconds > budget.SECONDS or result.megabytes > budget.MEGABYTES:
        return result, f"a refusal in {result.seconds:.1f} s and {result.megabytes:.0f} MB: {error}"
    return result, ""


def main(count: int) -> int:
    """Prints a row for each class; the number of failures."""
    print(f"{'class':<18} {'tried':>6} {'read':>6} {'refused':>7} {'failed':>6} {'slowest':>8} {'largest':>8}")
    failures = 0
    for kind in CLASSES:
        results = []
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(count):
                result, wrong = tried(kind, seed, Path(folder))
                results.append((result, wrong))
                if wrong:
                    print(f"  {kind.__name__}, seed {seed}: {wrong}", flush=True)
        refused = [r for r, wrong in results if r.raised and not wrong]
        failed = sum(bool(wrong) for _, wrong in results)
        slowest, largest = max([r.seconds for r in refused] or [0]), max([r.megabytes for r in refused] or [0])
        print(f"{kind.__name__:<18} {count:>6} {count - len(refused) - failed:>6} {len(refused):>7} {failed:>6} "
              f"{slowest:>6.2f} s {largest:>5.0f} MB", flush=True)
        failures += failed
    return failures


if __name__ == "__main__":
    sys.exit(min(1, main(int(sys.argv[1]))))
