"""A step's random numbers, reproducible and different from those of any other step; and the images that it shows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from support.fake_cupy import install

from minidiff.engine.cuda.random import DeviceSampleStreams
from minidiff.systems.stage import DRAWS, Step


def test_a_step_is_reproducible_and_differs_from_every_other():
    """In seed, stage and number, through the noise and through the generator."""
    others = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (0, 2, 1), (1, 0, 1)]
    for draw in (lambda step: step.normal((5,)), lambda step: step.rng.random(5)):
        drawn = {draw(Step(*place, 10, 4)).tobytes() for place in others}
        assert len(drawn) == len(others)
        assert draw(Step(0, 1, 0, 10, 4)).tobytes() in drawn


def test_progress_is_the_share_of_the_steps_made():
    assert [Step(0, 1, n, 4, 2).progress for n in range(4)] == [0, 0.25, 0.5, 0.75]


def test_noise_on_the_host_is_float32_and_new_at_each_request():
    step = Step(0, 1, 0, 10, 4)
    a, b = step.normal((4, 3, 3, 1)), step.normal((4, 3, 3, 1))
    assert a.shape == (4, 3, 3, 1) and a.dtype == np.float32 and not np.array_equal(a, b)
    assert len(np.unique(a)) == a.size


def test_noise_is_standard_normal():
    """By Dvoretzky, Kiefer and Wolfowitz's bound, P(sup |F_n - F| > d) <= 2 exp(-2 n d^2), at a false alarm of 1e-7."""
    x = np.sort(Step(0, 1, 0, 10, 4).normal((20_000,)))
    assert np.abs(np.arange(1, x.size + 1) / x.size - special.ndtr(x)).max() < (np.log(2e7) / (2 * x.size)) ** 0.5


def test_noise_on_a_device_is_new_at_each_request_and_step_and_never_a_samples(monkeypatch):
    """DRAWS requests of two successive steps of two stages, and the streams of 40 samples: all numbers differ."""
    cupy = install(monkeypatch)
    drawn = []
    for place in ((0, 1, 0), (0, 1, 1), (0, 2, 0)):
        step = Step(*place, 10, 2, "cuda")
        drawn += [step.normal((2, 2)) for _ in range(DRAWS)]
    assert all(isinstance(a, cupy.ndarray) and a.shape == (2, 2) and a.dtype == np.float32 for a in drawn)
    samples = [DeviceSampleStreams(0, 40).at(n).normal((2, 2)).get() for n in range(4)]
    numbers = np.concatenate([*(a.get().ravel() for a in drawn), *(a.ravel() for a in samples)])
    assert len(np.unique(numbers)) == numbers.size
    again = Step(0, 1, 1, 10, 2, "cuda")
    assert np.array_equal(again.normal((2, 2)).get(), drawn[DRAWS].get())


def test_a_step_on_a_device_refuses_more_requests_than_have_places(monkeypatch):
    install(monkeypatch)
    step = Step(0, 1, 0, 10, 2, "cuda")
    for _ in range(DRAWS):
        step.normal((1,))
    with pytest.raises(RuntimeError, match="may ask for noise 16 times"):
        step.normal((1,))


# --- which images -----------------------------------------------------------------------------------------

class Numbers:
    """Image i is one pixel with the value i; it remembers which images were read."""

    name, shape = "numbers", (1, 1, 1)

    def __init__(self, count: int):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def images(self, indices):
        self.read += list(indices)
        return np.asarray(indices, np.float32).reshape(-1, 1, 1, 1)


@given(count=st.integers(1, 40), size=st.integers(1, 30), each=st.sampled_from([None, 1, 2, 3]),
       seed=st.integers(0, 2**63))
def test_each_epoch_shows_every_image_once(count, size, each, seed):
    """Whatever the sizes: the indices of successive steps are one permutation of all images after another."""
    data, epochs = Numbers(count), 3
    steps = -(-epochs * count // (size * (each or 1)))
    drawn = [Step(seed, 1, n, steps, size).choose(data, each) for n in range(steps)]
    assert {a.shape for a in drawn} == {(size,) if each is None else (size, each)}
    order = np.concatenate([a.ravel() for a in drawn])[:epochs * count].reshape(epochs, count)
    assert (np.sort(order, axis=1) == np.arange(count)).all()


def test_the_orders_of_epochs_differ_and_favour_no_image():
    """In epoch, stage and seed.  Which of 5 images comes first, of 5,000 epochs: Pearson's test at a false alarm of
    1e-8."""
    data = Numbers(50)
    orders = [Step(seed, stage, n, 9, 50).choose(data)
              for seed, stage, n in [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]]
    assert len({tuple(order) for order in orders}) == 4
    first = [Step(0, 1, n, 5000, 5).choose(Numbers(5))[0] for n in range(5000)]
    assert stats.chisquare(np.bincount(first, minlength=5)).pvalue > 1e-8


@given(count=st.integers(1, 20), size=st.integers(1, 12), ranks=st.integers(1, 4), each=st.sampled_from([None, 2]))
def test_a_rank_reads_its_own_images_and_together_they_read_the_batch(count, size, ranks, each):
    whole = Step(3, 1, 5, 10, size)
    expected = whole.images(Numbers(count), whole.choose(Numbers(count), each))
    read = []
    for rank in range(ranks):
        shard = slice(size * rank // ranks, size * (rank + 1) // ranks)
        data, step = Numbers(count), Step(3, 1, 5, 10, size, shard=shard)
        x = step.images(data, step.choose(data, each))
        assert x.shape == expected.shape and x.dtype == np.float32
        np.testing.assert_array_equal(x[shard], expected[shard])
        assert not np.delete(x, np.r_[shard], axis=0).any()
        read += data.read
    assert read == expected.ravel().tolist()


def test_a_data_set_without_images_has_no_batch():
    with pytest.raises(ValueError, match="'numbers' has no images"):
        Step(0, 1, 0, 1, 4).choose(Numbers(0))
