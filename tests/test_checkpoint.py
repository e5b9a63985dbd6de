"""Checkpoints: exact round trips, complete after any kill, and checks of untrusted files."""

import errno
import json
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minidiff.checkpoint import CheckpointFolder, check_shapes, load, save
from minidiff.errors import UserError
from minidiff.files import check_writable, write_whole

META = {
    "step": 7,
    "config": {"levels": [1, 2], "name": "ünï \ud800 🙂", "rate": 1e-3, "ema": None},
}


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((3, 3, 2, 4)).astype(np.float32),
        "b": rng.standard_normal(4),
        "n": np.array(5),
    }


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- there and back ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(
        st.sampled_from(
            [np.float64, np.float32, np.float16, np.int64, np.int8, np.uint32, np.uint8, np.bool_, ">f4"]
        ),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)
def test_arrays_come_back_bitwise(tmp_path_factory, a):
    path = tmp_path_factory.mktemp("c") / "a.safetensors"
    save(path, {"a": a, "transposed": a.T, "every other": a[::2] if a.ndim else a}, {})
    back = load(path).tensors
    for name, want in {"a": a, "transposed": a.T, "every other": a[::2] if a.ndim else a}.items():
        assert back[name].shape == want.shape
        assert back[name].dtype == want.dtype.newbyteorder("=")
        assert back[name].tobytes() == want.astype(want.dtype.newbyteorder("=")).tobytes()
        assert back[name].flags.writeable


def test_meta_comes_back_and_is_json_in_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, tensors(), META)
    checkpoint = load(path)
    assert checkpoint.meta == META and checkpoint.path == path
    assert json.loads(header_of(path)["__metadata__"]["minidiff"]) == {"version": 1, "meta": META}


# names and meta as a caller may give them: some cannot be held, and then nothing is written
TEXTS = st.text(max_size=20) | st.text(st.characters(), max_size=5) | st.sampled_from(
    ["__metadata__", "", "a\0b", "\ud800", "minidiff", "a.b/c", "\u2028", "__metadata__ "])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
KEYS = TEXTS | st.integers() | st.booleans() | st.none()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner)
                    | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8)
ARRAYS = st.sampled_from([np.float32(2), np.array(2), np.zeros((0, 3)), np.array(True), np.ones((2, 3)).T, [1, 2], 1.5,
                          np.ones(2, ">f4"), np.array([[1, 2]]).view(np.matrix), np.ma.array([1, 2], mask=[0, 1]),
                          np.ones(2, np.uint64), np.broadcast_to(1.0, (3,)), np.array([np.nan]), "x", None, 1j])


def as_json(value):
    """What a value becomes in JSON: tuples are lists; everything else stays, of its own type."""
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, list | tuple) else value


@settings(deadline=None, max_examples=80)
@given(st.dictionaries(TEXTS | st.integers(), ARRAYS, max_size=3), st.dictionaries(KEYS, JSON, max_size=3))
def test_what_is_saved_comes_back_equal_or_is_refused(tmp_path_factory, arrays, meta):
    path = tmp_path_factory.mktemp("c") / "a.safetensors"
    try:
        save(path, arrays, meta)
    except (TypeError, ValueError):
        assert not path.exists()
        return
    back = load(path)
    assert repr(back.meta) == repr(as_json(meta))           # repr: 1, 1.0 and True are equal, -0.0 and 0.0 too
    assert back.tensors.keys() == arrays.keys()
    for name, a in arrays.items():
        assert not np.ma.isMaskedArray(a) and np.array_equal(back.tensors[name], np.asarray(a))
        assert back.tensors[name].dtype == np.asarray(a).dtype.newbyteorder("=")
        assert back.tensors[name].shape == np.shape(a)


def test_names_and_keys_that_would_come_back_as_others_are_refused(tmp_path):
    path, a = tmp_path / "a.safetensors", np.ones(2)
    for name in ("__metadata__", 3, None, b"x"):
        with pytest.raises(TypeError, match="a tensor's name must be a str other than '__metadata__'"):
            save(path, {name: a}, {})
    with pytest.raises(ValueError, match="surrogates not allowed"):
        save(path, {"\ud800": a}, {})
    with pytest.raises(TypeError, match=r"tensors\['a'\] is a masked array"):
        save(path, {"a": np.ma.array(a, mask=[0, 1])}, {})
    for meta in ({1: 2}, {"x": {None: 1}}, {"x": [{True: 1}]}, {"x": ({1.5: 1},)}):
        with pytest.raises(TypeError, match="a key must be a str"):
            save(path, {}, meta)
    deep = {}
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(TypeError, match="meta takes what JSON can hold"):
        save(path, {}, deep)
    with pytest.raises(TypeError, match="meta and the arrays. names take more than .* bytes"):
        save(path, {}, {"x": "y" * (17 << 20)})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_whole_steps(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert load(folder.save(np.int64(3), {}, {})).meta == {"step": 3}
    for step in (-1, 2.0, True, "4"):
        with pytest.raises(ValueError, match="step must be a whole number of at least 0"):
            folder.save(step, {}, {})


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in "abcdefghijkl":
        save(tmp_path / name, tensors(), META)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_unsupported_values_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    for meta in ({"x": np.float32(1)}, {"x": float("nan")}, {"x": {1, 2}}):
        with pytest.raises(TypeError, match="meta takes what JSON can hold"):
            save(path, {}, meta)
    for a in (np.array([object()]), np.array(["x"]), np.zeros(1, np.complex64), np.zeros(1, np.longdouble)):
        with pytest.raises(TypeError, match=r"tensors\['a'\] is"):
            save(path, {"a": a}, {})
    assert list(tmp_path.iterdir()) == []


def test_nan_is_never_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, tensors(), META)
    for bad in (np.nan, np.inf):
        with pytest.raises(UserError, match="a.safetensors was not written: the tensor 'w' holds NaN"):
            save(path, {"n": np.ones(2), "w": np.array([1, bad])}, META)
    assert load(path).meta == META
    header = {
        "__metadata__": header_of(path)["__metadata__"],
        "w": dict(dtype="F32", shape=[1], data_offsets=[0, 4]),
    }
    write_raw(path, header, struct.pack("<f", np.nan))
    with pytest.raises(UserError, match="the tensor 'w' holds NaN"):
        load(path)


# --- whole or not at all ----------------------------------------------------------------------------------


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle):
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else os.fstat(handle).st_size
        calls.append(("fsync", kind))
        fsync(handle)

    def record_replace(a, b):
        assert path.read_bytes() == b"old" and os.path.dirname(a) == os.path.dirname(b)
        calls.append(("replace", b == path))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_whole(path, b"newer")
    assert calls == [("fsync", 5), ("replace", True), ("fsync", "folder")]
    assert path.read_bytes() == b"newer" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "a.safetensors"
    save(path, tensors(), META)
    before = path.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        save(path, tensors(1), {"step": 8})
    if isinstance(error, OSError):
        assert (
            str(caught.value)
            == f"{path} could not be written (No space left on device); nothing was changed there."
        )
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_is_reported_in_one_sentence(tmp_path):
    """The operating system refuses to write more, half-way through the file."""
    path = tmp_path / "a.safetensors"
    save(path, tensors(), META)
    code = (
        "import resource, sys, numpy as np; from minidiff.checkpoint import save\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: save(sys.argv[1], {'w': np.zeros(100_000)}, {})\n"
        "except ValueError as e: print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.startswith(f"UserError {path} could not be written (File too large)"), done
    assert load(path).meta == META and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")
    write_whole(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_bytes() == b"x"


def test_paths_that_cannot_be_written_are_found_before_the_work(tmp_path):
    (tmp_path / "file.png").write_bytes(b"old")
    os.mkfifo(tmp_path / "pipe.png")
    suffixes = (".png", ".gif")
    for path, sentence in [
        (tmp_path, "takes one of the endings .png, .gif"),
        (tmp_path / "a.bmp", "takes one of the endings .png, .gif"),
        ("", "takes one of the endings"),
        (tmp_path / "none" / "a.png", "in a folder that does not exist"),
        (tmp_path / "file.png" / "a.png", "in a folder that does not exist"),
        (tmp_path / "pipe.png", "a device or pipe"),
        (tmp_path / ("x" * 300 + ".png"), "File name too long"),
        ("a\0b.png", "cannot be written"),
        ("a\ud800b.png", "cannot be written"),
    ]:
        with pytest.raises(UserError, match=sentence) as caught:
            check_writable(path, suffixes)
        assert str(caught.value).isprintable()
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        check_writable(tmp_path)
    assert check_writable(tmp_path / "file.png", suffixes) == tmp_path / "file.png"
    check_writable(tmp_path / "A.PNG", suffixes)
    assert sorted(os.listdir(tmp_path)) == ["file.png", "pipe.png"]
    assert (tmp_path / "file.png").read_bytes() == b"old"


@pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="the administrator may write anywhere"
)
def test_a_folder_without_permission_is_found_before_the_work(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(tmp_path / "a.png")


def test_a_read_only_place_is_found_before_the_work():
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable("/proc/self/a.png")


# --- hostile files ----------------------------------------------------------------------------------------

DAMAGED = "cut short or damaged"
GOOD = {"minidiff": json.dumps({"version": 1, "meta": {}})}
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "sentence"),
    [
        (b"", b"", "its header is not JSON"),
        (b"\xff\xfe", b"", "its header is not JSON"),
        (b"[" * 100_000, b"", "its header is not JSON"),
        (b"1" * 10_000, b"", "its header is not JSON"),
        (b"[]", b"", "its header is a JSON list, not a dict"),
        ({}, b"", "its header has no 'minidiff' configuration"),
        ({"a": ENTRY}, b"0000", "its header has no 'minidiff' configuration"),
        ({"__metadata__": {"format": "pt"}}, b"", "its header has no 'minidiff' configuration"),
        ({"__metadata__": "minidiff"}, b"", "its header has no 'minidiff' configuration"),
        ({"__metadata__": {"minidiff": {"version": 1}}}, b"", "its header has no 'minidiff' configuration"),
        ({"__metadata__": {"minidiff": "{"}}, b"", "its configuration is not JSON"),
        ({"__metadata__": {"minidiff": "[" * 100_000}}, b"", "its configuration is not JSON"),
        ({"__metadata__": {"minidiff": "3"}}, b"", "its configuration is a JSON int, not a dict"),
        ({"__metadata__": {"minidiff": "{}"}}, b"", "has no version number"),
        ({"__metadata__": {"minidiff": '{"version": true, "meta": {}}'}}, b"", "has no version number"),
        ({"__metadata__": {"minidiff": '{"version": 2, "meta": {}}'}}, b"", "format version 2; this"),
        ({"__metadata__": {"minidiff": '{"version": 1}'}}, b"", "no 'meta' dict"),
        ({"__metadata__": {"minidiff": '{"version": 1, "meta": [1]}'}}, b"", "no 'meta' dict"),
        ({"__metadata__": GOOD, "a": ENTRY}, b"000", DAMAGED),
        ({"__metadata__": GOOD, "a": ENTRY}, b"00000", DAMAGED),
        ({"__metadata__": GOOD, "a": 3}, b"", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "shape": [2]}}, b"0000", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "shape": [-1]}}, b"0000", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "shape": [2**40, 2**40]}}, b"0000", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "shape": [1] * 100}}, b"0000", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "shape": [0, 2**62], "data_offsets": [0, 0]}}, b"", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "data_offsets": [4, 0]}}, b"0000", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "data_offsets": [0, 2**70]}}, b"0000", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "data_offsets": [4, 8]}}, b"00000000", DAMAGED),  # a gap
        ({"__metadata__": GOOD, "a": ENTRY, "b": ENTRY}, b"0000", DAMAGED),  # overlapping
        ({"__metadata__": GOOD, "a\x1b[2J": ENTRY, "b": ENTRY}, b"0000", DAMAGED),
        ({"__metadata__": GOOD, "a": {**ENTRY, "dtype": "BF16", "shape": [2]}}, b"0000", "as 'BF16', a"),
        ({"__metadata__": GOOD, "a": {**ENTRY, "dtype": "F8_E4M3", "shape": [4]}}, b"0000", "'F8_E4M3'"),
        ({"__metadata__": GOOD, "a": {**ENTRY, "dtype": ["F32"]}}, b"0000", "the tensor 'a' as"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused_in_a_sentence(tmp_path, header, data, sentence):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(UserError, match=sentence) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < len(str(path)) + 300


def test_foreign_files_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "foreign"
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    for data in (
        b"",
        b"1234567",
        b"\x89PNG\r\n\x1a\n" * 9,
        pickle.dumps(Evil()),
        b"PK\x03\x04" * 99,
        b"\0" * 8,
    ):
        path.write_bytes(data)
        with pytest.raises(
            UserError, match="foreign is (cut short or not a safetensors file|not a checkpoint)"
        ):
            load(path)
    assert not ran.exists()
    with open(path, "wb") as file:  # a header that fits its (sparse) file and is absurd
        file.write(struct.pack("<Q", 1 << 33))
        file.truncate(1 << 34)
    with pytest.raises(UserError, match="has a header of 8589934592 bytes; at most"):
        load(path)
    path.unlink()
    with pytest.raises(UserError, match="foreign does not exist"):
        load(path)
    path.mkdir()
    with pytest.raises(UserError, match="foreign is a folder"):
        load(path)


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a"
    save(path, tensors(), META)
    data = path.read_bytes()
    for size in [*range(0, len(data), 5), *range(len(data) - 9, len(data))]:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="cut short"):
            load(path)


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_damage_is_refused_or_harmless_but_never_a_crash(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("c") / "a"
    save(path, tensors(), META)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        checkpoint = load(path)
    except UserError as error:
        assert str(error).startswith(str(path))
    else:
        assert all(np.isfinite(a).all() for a in checkpoint.tensors.values())


def test_shapes_are_compared_by_name(tmp_path):
    have = {"a": np.zeros((2, 3)), "b": np.zeros(())}
    check_shapes({"b": (), "a": (2, 3)}, have, "x.safetensors")
    with pytest.raises(UserError, match=r"x.safetensors lacks the tensor 'c' of shape \(4,\)"):
        check_shapes({"a": (2, 3), "b": (), "c": (4,)}, have, "x.safetensors")
    with pytest.raises(UserError, match=r"holds the tensor 'a' in shape \(2, 3\); this model takes \(3, 2\)"):
        check_shapes({"a": (3, 2), "b": ()}, have, "x.safetensors")
    with pytest.raises(UserError, match=r"holds the tensor 'b' of shape \(\) that this model does not have"):
        check_shapes({"a": (2, 3)}, have, "x.safetensors")


# --- the folder of a run -----------------------------------------------------------------------------------


def names(folder):
    return sorted(os.listdir(folder))


def test_the_last_few_are_kept(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "runs" / "a", keep=2)
    assert checkpoints.latest() is None
    for step in (1, 2, 10, 999_999, 1_000_000):
        path = checkpoints.save(step, {"w": np.full(3, step)}, {"loss": 0.5})
        assert load(path).meta == {"loss": 0.5, "step": step}
        assert checkpoints.latest().path == path
    assert names(checkpoints.folder) == ["step-1000000.safetensors", "step-999999.safetensors"]
    checkpoints.save(1_000_000, {"w": np.zeros(3)}, {})  # the same step again
    assert checkpoints.latest().tensors["w"].tolist() == [0, 0, 0] and len(names(checkpoints.folder)) == 2


def test_other_files_are_not_touched(tmp_path):
    others = [
        "notes.txt",
        "step-1.safetensors",
        "step-000009.safetensors.bak",
        "step-٠٠٠٠٠٩.safetensors",
        ".x.tmp",
    ]
    for name in others:
        (tmp_path / name).write_text("x")
    checkpoints = CheckpointFolder(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, tensors(), {})
    assert names(tmp_path) == sorted([*others, "step-000002.safetensors"])


def test_broken_ones_are_skipped_with_a_warning(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, tensors(step), {})
    for name, cut in (("step-000003.safetensors", 100), ("step-000002.safetensors", 0)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:cut])
    with pytest.warns(
        UserWarning, match="Skipped a broken checkpoint: .*step-00000[23].* cut short"
    ) as caught:
        assert checkpoints.latest().meta == {"step": 1}
    assert len(caught) == 2
    assert len(names(tmp_path)) == 3  # looking changes nothing
    with pytest.warns(UserWarning, match="Removed a broken checkpoint"):
        checkpoints.save(2, tensors(2), {})  # as a run does that went on from step 1
    assert names(tmp_path) == ["step-000001.safetensors", "step-000002.safetensors"]
    assert checkpoints.latest().meta == {"step": 2}


def test_another_run_is_not_mixed_in(tmp_path):
    CheckpointFolder(tmp_path).save(500, tensors(), {})
    for act in (lambda k: k.prepare(), lambda k: k.prepare(499), lambda k: k.save(1, tensors(), {})):
        with pytest.raises(UserError, match="holds step-000500.safetensors of an earlier run, beyond step"):
            act(CheckpointFolder(tmp_path))
    CheckpointFolder(tmp_path).prepare(500)
    assert names(tmp_path) == ["step-000500.safetensors"]


def test_only_the_writer_removes_leftovers_of_killed_runs(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save(1, tensors(), {})
    left = tmp_path / ".step-000002.safetensors.0123abcd.tmp"
    left.write_bytes(b"half")
    checkpoints.latest()  # a reader, beside a writer that may be at work
    assert left.exists()
    checkpoints.prepare(1)
    assert names(tmp_path) == ["step-000001.safetensors"]


def test_a_folder_that_cannot_be_used_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="The folder .*file cannot take checkpoints"):
        CheckpointFolder(tmp_path / "file").prepare()
    with pytest.raises(ValueError, match="keep must be a whole number of at least 1, not 0"):
        CheckpointFolder(tmp_path, keep=0)


def test_a_reader_looks_again_if_a_file_is_removed_meanwhile(tmp_path, monkeypatch):
    import minidiff.checkpoint as module

    checkpoints = CheckpointFolder(tmp_path, keep=1)
    checkpoints.save(1, tensors(1), {})

    def load_late(path, load=module.load):
        if path.name == "step-000001.safetensors" and path.exists():
            monkeypatch.setattr(module, "load", load)
            checkpoints.save(2, tensors(2), {})  # which removes step 1
        return load(path)

    monkeypatch.setattr(module, "load", load_late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest().meta == {"step": 2}


WRITER = """
import sys, numpy as np
from minidiff.checkpoint import CheckpointFolder
checkpoints = CheckpointFolder(sys.argv[1], keep=3)
last = checkpoints.latest()
step = last.meta["step"] if last else 0
print("ready", flush=True)
while True:
    step += 1
    checkpoints.save(step, {"w": np.arange(200_000.0) * step, "b": np.full(1000, step)}, {"twice": 2 * step})
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs kill -9")
def test_killed_at_any_instant_the_newest_checkpoint_is_whole(tmp_path):
    """15 kills -9 of a process that does nothing but save. No file with a checkpoint's name is ever broken.

    False alarm: `cut` stays 0, though a save is under way at least half of the time, once in 30,000 runs.
    """
    rng = random.Random()  # on purpose without a seed: the law holds at every instant
    step, cut = 0, 0
    for _ in range(15):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
        try:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.15))
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
        cut += any(name.endswith(".tmp") for name in names(tmp_path))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for path in tmp_path.glob("step-*"):
                load(path)
            newest = CheckpointFolder(tmp_path).latest()
        if newest is not None:
            assert newest.meta["step"] >= step
            step = newest.meta["step"]
            assert newest.meta == {"twice": 2 * step, "step": step}
            assert np.array_equal(newest.tensors["w"], np.arange(200_000.0) * step)
            assert np.array_equal(newest.tensors["b"], np.full(1000, step))
    assert step > 0 and cut > 0  # it did get on, and some kills did fall inside a save
    CheckpointFolder(tmp_path).save(step + 1, tensors(), {})  # sweeps up what the kills left
    assert len(names(tmp_path)) <= 3 and not any(name.endswith(".tmp") for name in names(tmp_path))
