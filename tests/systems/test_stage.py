"""A step's random numbers: reproducible, different from those of any other step, on the host and on a device."""

import numpy as np
import pytest
from scipy import special
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
