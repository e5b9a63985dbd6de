"""Devices: what is refused where there is none, and what the C library is asked."""

import subprocess
import sys

import numpy as np
import pytest

from minidiff.engine import backend
from minidiff.errors import UserError


def test_on_the_cpu():
    a = np.ones(3)
    assert backend.xp_of(a, 1.0) is np and backend.to_numpy(a) is a and backend.to_device(a, "cpu") is a
    assert backend.to_numpy([1, 2]).tolist() == [1, 2]
    backend.check_device("cpu")


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="device must be one of cpu, cuda, not 'tpu'"):
        backend.to_device(np.ones(3), "tpu")


def test_a_gpu_asked_for_where_cupy_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)          # an import of it fails
    with pytest.raises(UserError, match="needs CuPy, which is not installed.*--device cpu"):
        backend.check_device("cuda")


def test_keep_freed_memory_says_whether_it_could():
    """In a process of its own, for it is not to be undone."""
    code = "from minidiff.engine.backend import keep_freed_memory; print(keep_freed_memory())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() in ("True", "False")
