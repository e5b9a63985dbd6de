"""Files of strangers: read, or refused by a UserError in one line, in one second and 200 MB."""

import io
import json
import os
import struct
import warnings
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image
from support import budget, hostile, small_systems, tiny
from support.command_line import call

from minidiff import checkpoint, systems
from minidiff.data import image_file
from minidiff.errors import UserError
from minidiff.pretrained.weights import entries
from minidiff.systems.dpm import DPM, DPMConfig
from minidiff.training.run import TrainOptions, run
from minidiff.verify.user_schedule import from_file


@pytest.mark.parametrize("kind", hostile.CLASSES, ids=lambda kind: kind.__name__)
def test_hostile_files_are_read_or_refused_within_the_budget(tmp_path, kind):
    _try(kind, range(12 if kind is hostile.states else 30), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", hostile.CLASSES, ids=lambda kind: kind.__name__)
def test_thousands_of_hostile_files_are(tmp_path, kind):
    _try(kind, range(1000, 2000), tmp_path)


def _try(kind, seeds, folder):
    for seed in seeds:
        _, wrong = hostile.tried(kind, seed, folder)
        assert not wrong, f"{kind.__name__}, seed {seed}: {wrong}"


def refused(call, match: str) -> budget.Measured:
    result = budget.measured_again(lambda: call)
    assert isinstance(result.result, UserError), result
    assert match in str(result.result) and len(str(result.result).splitlines()) == 1
    assert result.seconds < budget.SECONDS and result.megabytes < budget.MEGABYTES, result
    return result


def test_a_refusal_is_one_line_whatever_the_file_says():
    error = UserError("a \x1b[2J\nminidiff: all is well\r\u2028 \ud800 \u4e03")
    assert str(error) == r"a \x1b[2J\nminidiff: all is well\r\u2028 \ud800 " + "\u4e03"


# --- checkpoints --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field", ["system", "config", "tokenizer", "notes", "stage"])
@pytest.mark.parametrize("value", [None, 3, True, 1.5, "x", ["dpm"], {"a": []}], ids=str)
def test_a_field_of_another_type_is_no_traceback(tmp_path, capsys, field, value):
    system, path = small_systems.small("dpm"), tmp_path / "m.safetensors"
    checkpoint.save(path, system.state_dict(), system.describe() | {field: value})
    status = call("info", "--model", path)
    said = capsys.readouterr().err
    assert status in (0, 2) and said.count("\n") == (status == 2) and "Traceback" not in said
    assert (status == 0) == (field == "notes" or field == "tokenizer" and value is None)


def with_hole(path, name: str, shape, size: int):
    """The checkpoint with one more array of `size` zeros at its end, which take no room on the disk."""
    header, arrays = hostile.split(path.read_bytes())
    header[name] = {"dtype": "I8", "shape": shape, "data_offsets": [len(arrays), len(arrays) + size]}
    path.write_bytes(hostile.joined(header, arrays))
    os.truncate(path, path.stat().st_size + size)


def test_three_gigabytes_of_zeros_are_refused_by_the_header(tmp_path):
    path = tmp_path / "m.safetensors"
    small_systems.small("dpm").save(path)
    data = path.read_bytes()
    os.truncate(path, 3 << 30)
    refused(lambda: DPM.load(path), "cut short or damaged")
    path.write_bytes(data)
    with_hole(path, "more", [3 << 30], 3 << 30)             # as the header says
    refused(lambda: DPM.load(path), "'more' of shape (3221225472,) that this model does not have")


def test_a_state_is_refused_by_its_header(tmp_path):
    trainer, kept = tiny.trainer(), checkpoint.CheckpointFolder(tmp_path)
    trainer.step()
    path = kept.save(1, *trainer.state())
    with_hole(path, "more", [3 << 30], 3 << 30)
    refused(lambda: kept.latest(tiny.trainer().check_header), "'more' of shape (3221225472,)")
    refused(lambda: kept.prepare(0), "of an earlier run")


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_configuration_larger_than_its_file_takes_no_memory(tmp_path, name):
    """Each whole number in turn as large as it may be, in a file with the weights of the small model."""
    header, arrays = hostile.split(hostile.bytes_of(name))
    inner, tried, path = json.loads(header["__metadata__"]["minidiff"]), 0, tmp_path / "m.safetensors"
    for place, key in list(hostile.places(inner["meta"]["config"])):
        if type(place[key]) is int:
            before, place[key] = place[key], 4096
            path.write_bytes(hostile.joined(header | {"__metadata__": {"minidiff": json.dumps(inner)}}, arrays))
            result = budget.measured(lambda: systems.SYSTEMS[name].load(path))
            assert not result.raised or isinstance(result.result, UserError), result
            assert result.seconds < budget.SECONDS and result.megabytes < budget.MEGABYTES, (key, result)
            place[key], tried = before, tried + 1
    assert tried


def test_a_run_whose_network_is_too_large_is_refused_before_memory_is_taken(tmp_path):
    large = DPMConfig(T=4096, hidden=4096)
    refused(lambda: run(tmp_path, DPM, small_systems.data(), config=large, quiet=True), "more than 33,554,432 weights")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run.json").write_text(json.dumps({
        "system": "dpm", "config": asdict(large), "data": small_systems.data().fingerprint, "needed": {},
        "options": asdict(TrainOptions().resolved())}))
    refused(lambda: run(tmp_path, DPM, small_systems.data(), resume=True, quiet=True), "more than 33,554,432 weights")


def test_what_is_saved_can_be_loaded(tmp_path):
    with pytest.raises(TypeError, match="more than 2097152 bytes, the most that `load` reads"):
        checkpoint.save(tmp_path / "x", {}, {"text": "x" * (3 << 20)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300, True, "3", None, [1.0]], ids=str)
def test_seconds_that_are_none_are_refused(tmp_path, seconds):
    trainer = tiny.trainer()
    tensors, meta = trainer.state()
    meta = json.loads(json.dumps(meta))                     # as a file has it
    saved = checkpoint.Checkpoint(tensors, meta | {"seconds": seconds}, tmp_path / "s")
    refused(lambda: trainer.restore(saved), "is no training state of this version")
    path = tmp_path / "step-000000.safetensors"
    checkpoint.save(path, tensors, meta | {"seconds": 7.25})
    path.write_bytes(path.read_bytes().replace(b"7.25", b" NaN"))                   # which JSON does not have
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert checkpoint.CheckpointFolder(tmp_path).latest() is None
    assert "configuration is not JSON" in str(caught[0].message)


@pytest.mark.parametrize("name, value", [
    ("optimiser.n", -1), ("optimiser.n", 10**10), ("ema.n", -1), ("optimiser.v.", -1e-9), ("losses", [1.0] * 30),
])
def test_a_number_of_a_state_out_of_its_range_is_refused(tmp_path, name, value):
    trainer = tiny.trainer()
    tensors, meta = trainer.state()
    place = next(n for n in tensors if n.startswith(name))
    right = tensors[place]
    tensors[place] = np.array(value, right.dtype) if name == "losses" else np.full_like(right, value)
    saved = checkpoint.Checkpoint(tensors, json.loads(json.dumps(meta)), tmp_path / "s")
    with pytest.raises(UserError, match="no training state|holds the tensor 'losses' in shape"):
        trainer.restore(saved)


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path.name), lambda path: os.mkfifo(path),
    lambda path: path.mkdir(),
], ids=["dangling link", "circular link", "pipe", "folder"])
def test_a_state_that_is_no_file_is_skipped(tmp_path, make):
    kept = checkpoint.CheckpointFolder(tmp_path)
    kept.save(1, {"w": np.ones(3)}, {})
    make(tmp_path / "step-000002.safetensors")
    with pytest.warns(UserWarning, match="Skipped a broken checkpoint: .*step-000002"):
        assert kept.latest().meta["step"] == 1
    if (tmp_path / "step-000002.safetensors").is_dir():
        with pytest.raises(UserError, match="step-000002.safetensors in it is no file"):
            kept.prepare(1)
    else:
        with pytest.warns(UserWarning, match="Removed a broken checkpoint"):
            kept.save(1, {"w": np.ones(3)}, {})


def test_a_terabyte_of_zeros_is_not_read(tmp_path):
    (tmp_path / "t.json").touch()
    os.truncate(tmp_path / "t.json", 1 << 40)
    refused(lambda: from_file(tmp_path / "t.json", "betas"), "is larger than 4 MiB")


# --- tables, pictures, archives -----------------------------------------------------------------------------

def test_a_table_with_a_negative_length_is_refused(tmp_path):
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (-5,), }"
    (tmp_path / "t.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + bytes(40))
    refused(lambda: from_file(tmp_path / "t.npy", "betas"), "its header promises -5 numbers")


def test_a_scheduler_of_100_million_times_is_refused():
    from minidiff.verify.scheduler import load
    refused(lambda: load("minidiff:ddim", {"T": 100_000_000}), "T takes numbers from -100,000 to 100,000")
    refused(lambda: load("diffusers:DDIMScheduler", {"num_train_timesteps": 10**8}), "num_train_timesteps takes")
    refused(lambda: load("diffusers:DDIMScheduler", {"trained_betas": [0.1, 1e9]}), "trained_betas takes")


def test_a_jpeg_of_many_scans_is_refused_in_time(tmp_path):
    file = io.BytesIO()
    Image.new("L", (4000, 4000), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda"):-2]
    (tmp_path / "p.png").write_bytes(data[:-2] + scan * 2000 + data[-2:])
    refused(lambda: image_file.open_image(tmp_path / "p.png"), "takes longer than")


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "PCX", "ICO", "PPM"])
def test_only_named_formats_are_opened(tmp_path, kind, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    Image.new("RGB", (40, 40)).save(tmp_path / "p.png", kind)
    refused(lambda: image_file.open_image(tmp_path / "p.png"), "PNG, JPEG, GIF, BMP and WEBP are read")


def test_no_other_file_opens_pictures_or_reads_without_a_bound():
    """All reading of what a user names goes through input_files.py and data/image_file.py."""
    package = systems.Path(systems.__file__).parents[1]
    free = {"input_files.py", "image_file.py"}
    free |= {"launch.py", "parallel.py", "ranks.py", "files.py", "terminal.py", "locks.py",          # no user's files
             "picture_cache.py", "learner.py"}
    for path in package.rglob("*.py"):
        if path.name not in free:
            text = path.read_text(encoding="utf-8")
            for forbidden in ("Image.open(", ".read_bytes()", "np.load(", " open(", "LOAD_TRUNCATED", "read_text("):
                assert forbidden not in text, f"{path.name} has {forbidden}"


@pytest.mark.parametrize("key", ["betas", "alpha_bar"])
def test_a_signalling_nan_is_refused_without_a_warning(tmp_path, key):
    """Its conversion to float64 raises the processor's flag for an invalid operation."""
    table = np.full(20, 0x7f800001, np.uint32).view(np.float32)
    np.save(tmp_path / "t.npy", table)
    refused(lambda: from_file(tmp_path / "t.npy", key), "nan")


def test_a_tensor_s_type_may_be_anything(tmp_path):
    """A list cannot be looked up in a table of names."""
    header = json.dumps({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(lambda: entries(tmp_path / "m.safetensors"), "a type that minidiff does not read")
