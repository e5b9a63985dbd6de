"""Devices, what is said if one is unavailable, and the C library's setting for freed memory."""

import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
from support import fake_cupy

from minidiff.engine import backend
from minidiff.engine.backend import check_device, device_of, moved, moved_together, to_device, to_numpy, xp_of
from minidiff.errors import UserError

# --- where arrays live --------------------------------------------------------------------------------------

def test_on_the_cpu():
    a = np.ones(3)
    assert xp_of(a, 1.0) is np and to_numpy(a) is a and to_device(a, "cpu") is a and device_of(a) == "cpu"
    assert to_numpy([1, 2]).tolist() == [1, 2]
    check_device("cpu")


def test_arrays_move_and_say_where_they_are(monkeypatch):
    fake_cupy.install(monkeypatch)
    host = np.arange(3.0, dtype=np.float32)
    x = to_device(host, "cuda")
    fake_cupy.assert_same(x, host)
    assert device_of(x) == "cuda" and device_of(host) == device_of(host.sum()) == "cpu"
    assert to_device(x, "cuda") is x
    back = to_device(x, "cpu")
    assert isinstance(back, np.ndarray) and back.tolist() == [0, 1, 2] and to_numpy(x).dtype == np.float32


def test_xp_of_is_the_library_of_all_the_arrays(monkeypatch):
    cupy = fake_cupy.install(monkeypatch)
    host, x = np.ones(2), cupy.ones(2)
    assert xp_of(x) is cupy and xp_of(1.0, x, x) is cupy and xp_of(host, 2) is np and xp_of(1.0) is np
    assert xp_of(x, np.float64(1)) is cupy and xp_of(np.float32(1), host) is np     # NumPy's scalars are numbers
    for arrays in ((x, host), (host, x), (1.0, x, host)):
        with pytest.raises(TypeError, match="arrays on two devices in one op") as error:
            xp_of(*arrays)
        fake_cupy.one_sentence(error)


# --- copies to a GPU ----------------------------------------------------------------------------------------

@pytest.fixture
def copies(monkeypatch) -> list:
    """What is copied to the stand-in from now on, nothing of which is remembered."""
    cupy, copied = fake_cupy.install(monkeypatch), []
    plain = cupy.asarray
    monkeypatch.setattr(cupy, "asarray", lambda a, dtype=None: (
        copied.append(a) if isinstance(a, np.ndarray) else None, plain(a, dtype))[1])
    monkeypatch.setattr(backend, "_remembered", OrderedDict())
    return copied


MANY = [np.arange(5.0, dtype=np.float32).reshape(1, 5), np.array([True, False, True]), np.array(7), np.zeros((0, 3)),
        np.arange(6).reshape(2, 3).T, np.arange(3, dtype=np.float16)]


@fake_cupy.of_the_stand_in
def test_many_arrays_take_one_copy_and_keep_their_values(copies):
    there = to_device(np.ones(2), "cuda")
    copies.clear()
    found = moved_together([MANY[0], there, *MANY[1:]], "cuda")
    assert len(copies) == 1 and found[1] is there
    for a, expected in zip([found[0], *found[2:]], MANY, strict=True):
        fake_cupy.assert_same(a, expected)
        assert a.flags.c_contiguous
    assert moved_together([], "cuda") == []
    assert all(a is b for a, b in zip(moved_together(MANY, "cpu"), MANY, strict=True))


@fake_cupy.of_the_stand_in
def test_what_was_moved_lately_is_not_moved_again(copies):
    x, alpha = to_device(np.ones(2, np.float32), "cuda"), np.array([0.5, 0.25], np.float32)
    copies.clear()
    moved_together([alpha, np.arange(4)], "cuda")
    fake_cupy.assert_same(moved(alpha.copy(), x), alpha)
    fake_cupy.assert_same(moved(alpha.reshape(2, 1), x), alpha.reshape(2, 1))
    assert len(copies) == 1
    for other in (alpha[::-1], -alpha, alpha.view(np.int32), alpha.astype(np.float64), alpha[:1]):
        fake_cupy.assert_same(moved(other, x), np.ascontiguousarray(other))         # other numbers, or another dtype
    assert len(copies) == 6
    alpha[0] = 9                                            # the host may write into what is its own
    fake_cupy.assert_same(moved(alpha, x), np.array([9, 0.25], np.float32))
    assert moved(x, x) is x and moved(alpha, np.ones(1)) is alpha


@fake_cupy.of_the_stand_in
def test_only_so_many_small_arrays_are_remembered(copies):
    x, large = to_device(np.ones(2), "cuda"), np.zeros(backend.SMALL + 1, np.uint8)
    copies.clear()
    moved(large, x), moved(large, x)
    assert len(copies) == 2 and not backend._remembered
    for i in range(backend.REMEMBERED + 1):
        moved(np.array([i]), x)
    assert len(backend._remembered) == backend.REMEMBERED
    copies.clear()
    moved(np.array([1]), x), moved(np.array([0]), x)
    assert len(copies) == 1                                 # the first one is forgotten


@fake_cupy.of_the_stand_in
def test_a_small_array_does_not_keep_the_large_ones_beside_it(copies):
    large, small = np.zeros(backend.SMALL + 1, np.uint8), [np.arange(3), np.ones(2)]
    found = moved_together([small[0], large, small[1]], "cuda")
    for a, expected in zip(found, (small[0], large, small[1]), strict=True):
        fake_cupy.assert_same(a, expected)
    assert sorted(len(copy.reshape(-1).view(np.uint8)) for copy in copies) == [2 * backend.ALIGNED, len(large)]


@fake_cupy.of_the_stand_in
def test_an_array_of_the_gpu_is_no_array_of_the_host(copies):
    with pytest.raises(TypeError):
        moved_together([to_device(np.ones(2), "cuda")], "cpu")


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="device must be one of cpu, cuda, not 'tpu'"):
        to_device(np.ones(3), "tpu")


@fake_cupy.of_the_stand_in
def test_a_gpu_that_is_unavailable(monkeypatch):
    def sentence():
        with pytest.raises(UserError) as raised:
            check_device("cuda")
        return str(raised.value)

    monkeypatch.setitem(sys.modules, "cupy", None)
    assert sentence() == ("device 'cuda' needs CuPy, which is not installed: pip install 'cupy-cuda13x[ctk]', or "
                          "cupy-cuda12x, or use --device cpu")

    class Broken:                                           # CuPy is installed, and one of its libraries is missing
        def find_spec(self, name, *_):
            if name == "cupy":
                raise ImportError("libcublas.so.13: cannot open shared object file")
    monkeypatch.delitem(sys.modules, "cupy")
    with monkeypatch.context() as broken:
        broken.setattr(sys, "meta_path", [Broken()])
        assert sentence() == ("device 'cuda' needs CuPy, which is installed and cannot be loaded (libcublas.so.13: "
                              "cannot open shared object file): use --device cpu")
    cupy = fake_cupy.install(monkeypatch, gpus=0)
    assert sentence() == "device 'cuda' needs an NVIDIA GPU, and none was found: use --device cpu"

    def no_driver():
        raise cupy.cuda.runtime.CUDARuntimeError("no driver")

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", no_driver)
    assert sentence() == "device 'cuda' needs an NVIDIA GPU and its driver (no driver): use --device cpu"
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 12040)
    assert sentence() == ("device 'cuda' needs an NVIDIA driver for CUDA 13.0, for which CuPy was built, and this one "
                          "is for CUDA 12.4: update the driver, or use --device cpu")
    fake_cupy.install(monkeypatch, gpus=1)
    check_device("cuda")
    monkeypatch.setattr(fake_cupy.Device, "compute_capability", "61")
    assert sentence() == ("device 'cuda' needs a GPU of compute capability sm_75 or later, and this one is sm_61: use "
                          "--device cpu")


@fake_cupy.of_the_stand_in
@pytest.mark.parametrize("init, reason", [
    ("raise OSError('libcudart.so:\\n  invalid ELF header')", "invalid ELF header"),
    ("raise AttributeError('module numpy has no attribute bool8')", "module numpy has no attribute bool8"),
    ("import numpy.no_such_part", "No module named 'numpy.no_such_part'"),
    ("def f(:", "invalid syntax"),
    ("", "has no attribute 'cuda'"),
], ids=["a damaged library", "of another NumPy", "an incomplete package", "a damaged file", "removed in part"])
def test_a_cupy_that_is_there_but_broken(monkeypatch, tmp_path, init, reason):
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(init, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(UserError) as raised:
            check_device("cuda")
    finally:
        sys.modules.pop("cupy", None)
    said = str(raised.value)
    assert said.startswith("device 'cuda' needs CuPy, which is installed and cannot be loaded (") and reason in said
    assert said.endswith("): use --device cpu") and "\n" not in said


# --- freed memory -------------------------------------------------------------------------------------------

def test_keep_freed_memory_says_whether_it_could():
    """In a new process, since the setting cannot be undone."""
    code = "from minidiff.engine.backend import keep_freed_memory; print(keep_freed_memory())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() in ("True", "False")


class Libc:
    """A C library whose mallopt returns the given values in turn; it records its calls."""

    def __init__(self, *grants):
        self.grants, self.calls = list(grants), []

    def mallopt(self, *call):
        self.calls.append(call)
        return self.grants.pop(0)


@pytest.mark.parametrize("grants, kept", [((1, 1, 1), True), ((1, 1, 0, 1), True), ((1, 1, 0, 0), False),
                                          ((1, 0), False), ((0,), False)])
def test_keep_freed_memory_asks_glibc(monkeypatch, grants, kept):
    """In malloc.h M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3 and M_ARENA_MAX is -8.

    glibc before 2.35 accepts at most 32 MiB for the second.
    """
    libc, opened = Libc(*grants), []
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: opened.append(name) or libc)
    assert backend.keep_freed_memory() is kept and opened == [None]
    assert libc.calls == [(-1, 2**31 - 1), (-8, 1), (-3, 2**31 - 1), (-3, 32 * 2**20)][:len(grants)]


def test_keep_freed_memory_where_there_is_no_mallopt(monkeypatch):
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: object())
    assert backend.keep_freed_memory() is False
