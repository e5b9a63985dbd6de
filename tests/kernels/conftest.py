"""What the tests of the kernels share: CuPy, or its stand-in, for one test."""

import pytest
from support import fake_cupy


@pytest.fixture
def cupy(monkeypatch):
    return fake_cupy.install(monkeypatch)
