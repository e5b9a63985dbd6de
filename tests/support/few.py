"""For the tests of nothing and one: small arrays, and what a call gives or how it refuses."""

import warnings

import numpy as np
import pytest

from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients

NO_TIMES = np.zeros(0, int)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def tensor(*shape):
    return Tensor(zeros(*shape), requires_grad=True)


def rng():
    return np.random.default_rng(0)


def streams(count):
    return SampleStreams(0, 1)[:count]


def back(f, *arrays):
    """y, and the gradients of its sum."""
    leaves = [Tensor(a, requires_grad=True) for a in arrays]
    y = f(*leaves)
    return y, *gradients(y, leaves, np.ones_like(y.data))


def shapes(result):
    """The shape and dtype of each array in a result; what is no array stays as it is."""
    if isinstance(result, (list, tuple)):
        return tuple(map(shapes, result))
    if isinstance(result, Tensor):
        result = result.data
    return (result.shape, str(result.dtype)) if hasattr(result, "dtype") else result


def check_gives(call, expected):
    """The call gives arrays of these shapes and dtypes, without a warning of NumPy's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shapes(call()) == expected


def check_refuses(call, says):
    """The call refuses in one sentence of ours, before NumPy warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, TypeError), match=says) as error:
            call()
    assert "\n" not in str(error.value)
