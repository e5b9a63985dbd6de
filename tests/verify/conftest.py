"""Fixtures of the tests of verify."""

import sys

import numpy as np
import pytest
from PIL import Image

from minidiff.verify import forward, sampling


@pytest.fixture(autouse=True)
def _few_chains(monkeypatch):
    monkeypatch.setattr(forward, "chains", lambda T: 2000)  # for speed; the bounds hold for any number


@pytest.fixture(autouse=True)
def _no_rows_of_another_test():
    """A row that is cached while a bug is planted must not reach the next test."""
    sampling.on_long_table.cache_clear()
    yield
    sampling.on_long_table.cache_clear()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("own_")]:
        del sys.modules[name]


@pytest.fixture
def image(tmp_path):
    x = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    Image.fromarray(x).save(tmp_path / "x0.png")
    return tmp_path / "x0.png"
