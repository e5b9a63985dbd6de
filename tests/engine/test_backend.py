"""Devices that are not there, and one random stream per sample."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.engine import backend
from minidiff.engine.random import SampleStreams
from minidiff.errors import UserError

few = settings(deadline=None, max_examples=25)


@pytest.mark.law(
    28, "the numbers of a stream depend on its seed and place only, not on how many there are nor on how they are cut",
    source="the same streams alone", tolerance="exact, to the last bit")
@few
@given(st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_a_sample_depends_on_its_own_seed_only(seed, count, more, calls):
    """Law 28: not on how many others there are, nor on how the batch was cut."""
    alone, crowd, cut = SampleStreams(seed, count), SampleStreams(seed, count + more), SampleStreams(seed, count)
    for _ in range(calls):
        expected = alone.normal((2, 3))
        assert expected.shape == (count, 2, 3) and expected.dtype == np.float32
        assert np.array_equal(crowd.normal((2, 3))[:count], expected)
        parts = [cut[i:i + 2].normal((2, 3)) for i in range(0, count, 2)]
        assert np.array_equal(np.concatenate(parts), expected)


def test_samples_calls_and_seeds_differ():
    streams = SampleStreams(0, 3)
    drawn = [*streams.normal((4,)), *streams.normal((4,)), *SampleStreams(1, 3).normal((4,))]
    assert len({a.tobytes() for a in drawn}) == 9


def test_a_slice_shares_the_state():
    streams, copy = SampleStreams(5, 4), SampleStreams(5, 4)
    first = streams[1:3].normal((2,))
    assert np.array_equal(first, copy.normal((2,))[1:3])
    assert np.array_equal(streams[1:3].normal((2,)), copy.normal((2,))[1:3])
    assert len(streams[1:3]) == 2


def test_streams_from_seeds():
    seeds = [7, 3, 7, 12]
    drawn = SampleStreams.from_seeds(seeds).normal((5,))
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])
    for seed, row in zip(seeds, drawn, strict=True):
        assert np.array_equal(SampleStreams(seed, 3).normal((5,))[0], row)
    generator = np.random.default_rng(1)
    assert np.array_equal(SampleStreams.of([generator]).normal((3,), np.float64)[0],
                          np.random.default_rng(1).standard_normal(3))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_are_standard_normal(dtype):
    """200,000 numbers of 100 streams: mean and variance at 5.5 standard errors: false alarm 8e-8 each."""
    x = SampleStreams(0, 100).normal((2000,), dtype)
    assert x.dtype == dtype
    x = x.astype(float)
    assert abs(x.mean()) < 5.5 / np.sqrt(x.size) and abs(x.var() - 1) < 5.5 * np.sqrt(2 / x.size)
    # two samples' numbers have a correlation of 0 +- 1/sqrt(n), 4950 pairs: P(|z| > 7) 4950 = 1e-8
    correlation = np.corrcoef(x)[np.triu_indices(100, 1)]
    assert np.abs(correlation).max() < 7 / np.sqrt(2000)


@pytest.mark.parametrize("seed, count, message", [
    (-1, 2, "seed must be a whole number of at least 0, not -1"), (1.5, 2, "seed must be .* not 1.5"),
    (0, 0, "count must be a whole number of at least 1, not 0"), (0, 2.0, "count must be .* not 2.0"),
])
def test_bad_seeds_and_counts_are_refused(seed, count, message):
    with pytest.raises(ValueError, match=message):
        SampleStreams(seed, count)


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
