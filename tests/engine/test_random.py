"""Random numbers: one stream for each use, and one for each sample, on the CPU.

Those made on a GPU are in tests/kernels/test_random_kernels.py.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.engine.random import SampleStreams, generator, sample_streams

few = settings(deadline=None, max_examples=25)


# --- one stream for each use --------------------------------------------------------------------------------

def test_every_use_has_a_stream_of_its_own():
    """Also seeds, words and numbers that are equal when joined or padded, and seeds of more than 64 bits."""
    uses = [(1, "batch"), (1, "batch", 0), (1, "batch", 0, 0), (1, "batch", 1), (11, "batch"), (1, "weights"),
            (2**70, "batch"), (2**70 + 1, "batch"), (0, "batch", 1), (1, "batch", 11), (1, "batch", 1, 1)]
    assert len({generator(*use).random() for use in uses}) == len(uses)
    assert generator(3, "batch", 5).random() == generator(np.int64(3), "batch", np.int32(5)).random()


# --- one stream for each sample -----------------------------------------------------------------------------

@pytest.mark.law(
    28, "the numbers of a stream depend on its seed and place only, not on how many there are nor on how they are cut",
    source="the same streams alone", tolerance="exact, to the last bit")
@few
@given(st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_a_sample_depends_on_its_own_seed_only(seed, count, more, calls):
    """Law 28: it does not depend on the number of samples or on how the batch is divided."""
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
    (0, 0, "count must be a whole number of at least 1, not 0"), (0, 2.0, "count must be a whole number .* not 2.0"),
])
def test_bad_seeds_and_counts_are_refused(seed, count, message):
    with pytest.raises(ValueError, match=message):
        SampleStreams(seed, count)


def test_uniform_numbers_are_each_samples_own():
    streams = SampleStreams(3, 4)
    u = streams.uniform((2, 5))
    assert u.shape == (4, 2, 5) and u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    assert np.array_equal(SampleStreams(3, 2).uniform((2, 5)), u[:2])
    assert streams.uniform().shape == (4,) and not np.array_equal(streams.uniform((2, 5)), u)


def test_streams_of_the_cpu():
    assert np.array_equal(sample_streams("cpu", 3, 2).normal((4,)), SampleStreams(3, 2).normal((4,)))


def test_streams_are_numpys_own_generators():
    """Row i is drawn by default_rng([seed, i]) in the requested dtype; half precision is rounded from float32."""
    rows = {dtype: np.stack([np.random.default_rng([7, i]).standard_normal((5,), dtype=dtype) for i in range(3)])
            for dtype in (np.float32, np.float64)}
    assert (SampleStreams(7, 3).normal((5,)) == rows[np.float32]).all()
    assert (SampleStreams(7, 3).normal((5,), np.float64) == rows[np.float64]).all()
    half = SampleStreams(7, 3).normal((5,), np.float16)
    assert half.dtype == np.float16 and (half == rows[np.float32].astype(np.float16)).all()
