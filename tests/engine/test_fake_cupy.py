"""The stand-in for CuPy, tests/support/fake_cupy.py, is as strict as CuPy and computes the same."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.fake_cupy import OutOfRange, install, of_the_stand_in

pytestmark = of_the_stand_in


@pytest.fixture
def cupy(monkeypatch):
    return install(monkeypatch)


def test_the_fake_is_as_strict_as_cupy(cupy):
    """CuPy raises TypeError or AttributeError for each of these, too."""
    host, x = np.ones((2, 3)), cupy.ones((2, 3))
    forbidden = [lambda: x + host, lambda: host * x, lambda: x @ host.T, lambda: x == host, lambda: x.__iadd__(host),
                 lambda: cupy.exp(host), lambda: cupy.where(host > 0, x, 0), lambda: cupy.concatenate([x, host]),
                 lambda: x + [1, 2, 3], lambda: x.__iadd__([1, 2, 3]), lambda: cupy.exp([1.0]),
                 lambda: cupy.where(x > 0, [1, 2, 3], 0), lambda: cupy.asarray([x.sum(), 1.0]),
                 lambda: cupy.array([1.0, x.sum()]), lambda: cupy.exp(x, out=host), lambda: cupy.vdot(x, host),
                 lambda: np.exp(x), lambda: np.concatenate([x, x]), lambda: np.asarray(x), lambda: np.array([x]),
                 lambda: np.add(host, x), lambda: np.all(x), lambda: x * np.array(2.0), lambda: hash(x),
                 lambda: x.sum(where=True), lambda: x.max(initial=0), lambda: cupy.sum(x, where=True)]
    for f in forbidden:
        with pytest.raises(TypeError):
            f()
    for value in (host[0], [1.0, 2.0, 3.0], (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="cannot be used for fill"):
            x[0] = value
    for f in (lambda: cupy.geomspace, lambda: cupy.errstate, lambda: x.itemset, lambda: x.ctypes, lambda: x.setflags):
        with pytest.raises(AttributeError):
            f()


def test_an_index_out_of_range_is_a_mistake(cupy):
    """CuPy raises IndexError for a number alone.  In an array of indices it silently takes another element."""
    x = cupy.arange(6.0).reshape(2, 3)
    with pytest.raises(IndexError):
        x[2]
    for index in (np.array([2]), cupy.asarray([2]), [0, 2], (slice(None), np.array([-4]))):
        with pytest.raises(OutOfRange):
            x[index]
        with pytest.raises(OutOfRange):
            x[index] = 0.0
    with pytest.raises(OutOfRange):
        x.take(cupy.asarray([6]))
    with pytest.raises(OutOfRange):
        cupy.add.at(x, cupy.asarray([2]), cupy.ones((1, 3)))
    assert x[[1, 0]].shape == (2, 3) and x.take(cupy.asarray([5])).get().tolist() == [5.0]


def test_what_lists_may_hold(cupy):
    x = cupy.ones(())
    assert cupy.asarray([x, x]).get().tolist() == [1, 1] and cupy.asarray([np.float32(2), 1.0]).get().tolist() == [2, 1]
    assert cupy.stack([x, x]).shape == (2,)


def test_the_fake_computes(cupy):
    host = np.arange(6.0).reshape(2, 3)
    x = cupy.asarray(host)
    host[0, 0] = 9                                          # the device has its own memory
    assert x[0, 0].item() == 0 and isinstance(x.sum(), cupy.ndarray) and x.sum().shape == ()
    x[0] += 1
    x -= 2 * np.float64(0.5)
    assert x.get().tolist() == [[0, 1, 2], [2, 3, 4]] and float(x[1, 2]) == 4 and bool((x >= 0).all())
    assert (1 - x).dtype == np.float64 and len(x) == 2 and [row.shape for row in x] == [(3,), (3,)]
    assert x[np.array([1, 0])].get().tolist() == [[2, 3, 4], [0, 1, 2]]


KERNELS = [path.name for path in (Path(__file__).parents[1] / "kernels").glob("test_*_kernels.py")]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_tested_on_a_card_without_a_compiler(name):
    """With MINIDIFF_TEST_DEVICE=cuda these files run on the card, and need no g++."""
    text = (Path(__file__).parents[1] / "kernels" / name).read_text(encoding="utf-8")
    assert re.search(r"^pytestmark = fake_cupy.needs_device$", text, re.MULTILINE)
