"""A device's streams: the cipher's published words, the distributions of the numbers, one stream for each sample."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from support import cuda_on_cpu, fake_cupy
from support.fake_cupy import install

from minidiff.engine.cuda import launch as cuda
from minidiff.engine.cuda.random import DeviceSampleStreams
from minidiff.engine.random import sample_streams

needs_compiler = fake_cupy.needs_compiler
pytestmark = fake_cupy.needs_device
few = settings(deadline=None, max_examples=15)


@pytest.fixture(scope="module")
def cupy():
    with pytest.MonkeyPatch.context() as patch:
        yield install(patch)


def philox(counters, keys) -> np.ndarray:
    """Philox4x32-10 in NumPy, of (n, 4) counters and (n, 2) keys (Salmon et al. 2011)."""
    c, k = np.array(counters, np.uint64), np.array(keys, np.uint64)
    for _ in range(10):
        products = c[:, [0, 2]] * np.array([0xD2511F53, 0xCD9E8D57], np.uint64)     # 64 bits
        high, low = products >> np.uint64(32), products & np.uint64(0xFFFFFFFF)
        c = np.stack([high[:, 1] ^ c[:, 1] ^ k[:, 0], low[:, 1], high[:, 0] ^ c[:, 3] ^ k[:, 1], low[:, 0]], axis=1)
        k = (k + np.array([0x9E3779B9, 0xBB67AE85], np.uint64)) & np.uint64(0xFFFFFFFF)
    return c.astype(np.uint32)


def words(cupy, counters, keys) -> np.ndarray:
    kernel = cuda.kernel(cuda.pick("normal", "float32"), "philox_words", "float32")
    counters, keys = np.array(counters, np.uint32), np.array(keys, np.uint32)
    found = cupy.zeros(counters.shape, np.uint32)
    kernel(-(-len(counters) // 256), 256, cupy.asarray(counters), cupy.asarray(keys), found, len(counters))
    return found.get()


# --- the cipher -------------------------------------------------------------------------------------------

ONES = 0xFFFFFFFF
KNOWN = [                                                   # Random123's kat_vectors: counter, key, words
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(cupy, counter, key, expected):
    assert words(cupy, [counter], [key])[0].tolist() == philox([counter], [key])[0].tolist() == expected


def test_the_cipher_is_numpys(cupy):
    """1000 random counters by the kernel and by the loop above."""
    rng = np.random.default_rng(0)
    counters, keys = rng.integers(0, 2**32, (1000, 4)), rng.integers(0, 2**32, (1000, 2))
    assert np.array_equal(words(cupy, counters, keys), philox(counters, keys))


# --- the numbers ------------------------------------------------------------------------------------------

def expected_normals(seed: int, place: int, call: int, n: int) -> np.ndarray:
    """The same numbers from the loop above, in float64."""
    quads = -(-n // 4)
    counters = [[q, call, place % 2**32, place >> 32] for q in range(quads)]
    u = (philox(counters, [[seed % 2**32, seed >> 32]] * quads) + 0.5) / 2**32      # (quads, 4)
    radius, angle = np.sqrt(-2 * np.log(u[:, ::2])), 2 * np.pi * u[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(-1)[:n]


@few
@given(seed=st.integers(0, 2**64 - 1), count=st.integers(1, 5), n=st.integers(1, 9), call=st.integers(0, 2**32 - 1),
       first=st.sampled_from([0, 2**32, 2**32 - 1]), dtype=st.sampled_from(["float16", "float32", "float64"]))
def test_every_number_is_the_formulas(cupy, seed, count, n, call, first, dtype):
    z = DeviceSampleStreams(seed, count, first).at(call).normal((n,), dtype)
    assert isinstance(z, cupy.ndarray) and z.dtype == dtype and z.shape == (count, n)
    expected = [expected_normals(seed, first + i, call, n) for i in range(count)]
    # float32 knows u_0 to 2^-25, and next to 1 the radius is sqrt(2 (1 - u_0)): an absolute error of up to 2.4e-4
    np.testing.assert_allclose(z.get(), expected, rtol=10 * np.finfo(dtype).eps,
                               atol=1e-12 if dtype == "float64" else 5e-4)


@pytest.mark.law(
    28, "numbers made on the device depend on the stream's seed, place and call only, not on the batch",
    source="the same streams alone", tolerance="exact, to the last bit")
@few
@given(st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_a_sample_depends_on_its_own_seed_only(cupy, seed, count, more, calls):
    alone, crowd, cut = (DeviceSampleStreams(seed, n) for n in (count, count + more, count))
    for _ in range(calls):
        expected = alone.normal((2, 3)).get()
        assert expected.shape == (count, 2, 3) and expected.dtype == np.float32
        assert np.array_equal(crowd.normal((2, 3)).get()[:count], expected)
        parts = [cut[i:i + 2].normal((2, 3)).get() for i in range(0, count, 2)]
        assert np.array_equal(np.concatenate(parts), expected)


def test_samples_calls_seeds_and_places_differ(cupy):
    streams = DeviceSampleStreams(0, 3)
    drawn = [*streams.normal((4,)).get(), *streams.normal((4,)).get(), *DeviceSampleStreams(1, 3).normal((4,)).get(),
             *DeviceSampleStreams(0, 3, first=2**32).normal((4,)).get()]
    assert len({a.tobytes() for a in drawn}) == 12


@pytest.mark.parametrize("count", [160, 161])
def test_more_samples_than_a_table_holds(cupy, monkeypatch, count):
    launched = fake_cupy.watch_launches(monkeypatch)
    drawn = DeviceSampleStreams(3, count).normal((2,)).get()
    assert fake_cupy.REAL or launched == ["normal"] * (count - 159)
    last = DeviceSampleStreams(3, 1, first=count - 1).normal((2,)).get()
    assert np.array_equal(drawn[-1:], last) and len(np.unique(drawn)) == 2 * count


def test_streams_from_seeds(cupy):
    drawn = DeviceSampleStreams.from_seeds([7, 3, 7]).normal((5,)).get()
    assert np.array_equal(drawn[0], drawn[2]) and not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(DeviceSampleStreams(3, 2).normal((5,)).get()[0], drawn[1])
    with pytest.raises(ValueError, match="seed must be"):
        DeviceSampleStreams(-1, 2)


def test_a_call_number_is_the_whole_state(cupy):
    streams = DeviceSampleStreams(5, 4)
    drawn = [streams.normal((3,)).get() for _ in range(3)]
    assert np.array_equal(DeviceSampleStreams(5, 4).at(2).normal((3,)).get(), drawn[2])


def test_uniform_numbers_are_philoxs_of_seed_place_and_call(cupy):
    """Compared with NumPy's generator; the numbers are on the host, and do not depend on the batch."""
    seed, first, shape = 2**64 - 1, 2**32, (3, 2)
    streams = DeviceSampleStreams(seed, 3, first).at(7)
    u = streams.uniform(shape)
    assert isinstance(u, np.ndarray) and u.shape == (3, *shape) and u.dtype == np.float64
    for i, row in enumerate(u):
        counter = 7 << 192
        assert np.array_equal(np.random.Generator(np.random.Philox(key=seed + ((first + i) << 64), counter=counter))
                              .random(shape), row)
    assert np.array_equal(DeviceSampleStreams(seed, 5, first + 1).at(7)[:2].uniform(shape), u[1:])
    assert np.array_equal(streams.uniform(), DeviceSampleStreams(seed, 3, first).at(8).uniform()), "the next call"


def test_normal_and_uniform_numbers_count_their_calls_together(cupy):
    streams = DeviceSampleStreams(5, 2)
    first, z, second = streams.uniform((4,)), streams.normal((4,)).get(), streams.uniform((4,))
    assert np.array_equal(DeviceSampleStreams(5, 2).at(1).normal((4,)).get(), z)
    assert np.array_equal(DeviceSampleStreams(5, 2).at(2).uniform((4,)), second)
    assert len({row.tobytes() for row in (*first, *second)}) == 4


def test_uniform_numbers_are_uniform(cupy):
    """100 streams of 1000 numbers; false alarms: 1e-7 by Dvoretzky, Kiefer and Wolfowitz's bound, 1e-8 the rest."""
    drawn = DeviceSampleStreams(0, 100).uniform((1000,))
    u = np.sort(drawn, axis=None)
    assert u[0] >= 0 and u[-1] < 1
    assert np.abs(np.arange(1, u.size + 1) / u.size - u).max() < math.sqrt(math.log(2e7) / (2 * u.size))
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(100, 1)]).max() < 7 / np.sqrt(1000)


def test_both_devices_streams_have_the_same_interface(cupy):
    for device, kind in (("cpu", np.ndarray), ("cuda", cupy.ndarray)):
        streams = sample_streams(device, 3, 4)
        assert isinstance(streams.normal((2,)), kind) and streams.normal((2,), np.float64).dtype == np.float64
        assert streams.uniform((2,)).shape == (4, 2) and streams.uniform().shape == (4,)
        assert len(streams) == 4 and len(streams[1:3]) == 2 and len(type(streams).from_seeds([1, 2, 3])) == 3


def test_seeds_and_calls_that_would_be_taken_for_others_are_refused(cupy):
    for seed in (-1, 2**64, 0.5, "3"):
        for make in (lambda seed: DeviceSampleStreams(seed, 2), lambda seed: DeviceSampleStreams.from_seeds([0, seed])):
            with pytest.raises(ValueError, match="seed must be a whole number") as error:
                make(seed)
            assert "\n" not in str(error.value)
    streams = DeviceSampleStreams(2**64 - 1, 1).at(2**32 - 1)
    assert streams.normal((2,)).shape == (1, 2)
    for call in (-1, 2**32, 0.5):
        with pytest.raises(ValueError, match="call must be a whole number"):
            streams.at(call)
    with pytest.raises(ValueError, match="no calls left"):
        streams.normal((2,))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_are_standard_normal(cupy, dtype):
    """100 streams of 1000 numbers.  Mean and variance at 5.5 standard errors, false alarm 8e-8 each; the distribution
    by Dvoretzky, Kiefer and Wolfowitz's bound, 1e-7; the correlation of two streams beyond 7/sqrt(n), 1e-8 in all."""
    drawn = DeviceSampleStreams(0, 100).normal((1000,), dtype).get().astype(float)
    x = np.sort(drawn, axis=None)
    assert abs(x.mean()) < 5.5 / np.sqrt(x.size) and abs(x.var() - 1) < 5.5 * np.sqrt(2 / x.size)
    # P(sup |F_n - F| > d) <= 2 e^{-2 n d^2};  float16 itself moves F by up to 2^-11
    d = math.sqrt(math.log(2e7) / (2 * x.size)) + (2**-11 if dtype == "float16" else 0)
    assert np.abs(np.arange(1, x.size + 1) / x.size - special.ndtr(x)).max() < d
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(100, 1)]).max() < 7 / np.sqrt(1000)
    # neighbours in one stream: the pairs of Box and Muller, and words of one counter
    for lag in (1, 2, 3, 4):
        assert abs((drawn[:, lag:] * drawn[:, :-lag]).mean()) < 5.5 / np.sqrt(100 * (1000 - lag))


@needs_compiler
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_nothing_is_written_beyond_the_last_number(n):
    """If n is not a multiple of four, the last thread of a sample discards words."""
    z, source = np.full(2 * n + 8, 7, np.float32), cuda.versions("normal")[1]
    streams = cuda.table(np.zeros((2, 3), np.uint64), source.constants["MOST"], (np.uint64, 3))
    program = cuda_on_cpu.Program(source.text, {"ELEMENT": "float"})
    program["normal"](1, 256, [streams[()], z[4:], np.int32(2), np.int32(n)])
    assert (z[:4] == 7).all() and (z[2 * n + 4:] == 7).all() and (z[4:2 * n + 4] != 7).all()
