"""The samplers' contracts: lists of times, dtypes, refusals. Where they lead is proved in tests/laws."""

import math

import numpy as np
import pytest
from support.law_tools import Noise, start

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    heun,
    sample,
    times,
)
from minidiff.engine.random import SampleStreams


def gaussian_1d(schedule, s2, mean=0.0):
    return GaussianDenoiser(schedule, np.array([mean]), np.array([s2]))


# ---- lists of times ----------------------------------------------------------------------------------------

def test_times_as_one_would_write_them():
    schedule = schedules.linear()
    assert list(times(schedule, 10)) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert list(times(schedule, 5, "leading")) == [999, 600, 400, 200, 0]
    assert list(times(schedule, 4, "linspace")) == [999, 666, 333, 0]
    for spacing in SPACINGS:
        assert list(times(schedule, 1000, spacing)) == list(range(999, -1, -1))
    even = schedules.log_snr_linear(901, 9.0, -9.0)
    assert list(times(even, 4, "log_snr")) == [900, 600, 300, 0]
    steps = np.diff(schedule.log_snr(times(schedule, 20, "log_snr")))
    assert 0.7 < steps.min() and steps.max() < 1.3                 # 19 steps from -10 to 9.2, of whole times
    zero = schedules.zero_terminal_snr(schedule)
    assert (np.diff(zero.log_snr(times(zero, 20, "log_snr")))[1:] < 1.3).all()


# ---- the contract ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("terminal", [lambda s: s, schedules.zero_terminal_snr])
def test_float32_stays_float32_and_agrees_with_float64(name, terminal):
    schedule = terminal(schedules.linear())
    rng = np.random.default_rng(3)
    denoiser = MixtureDenoiser(schedule, [0.4, 0.6], rng.normal(size=(2, 3, 3, 1)), [0.1, 0.3])
    x_T, z = rng.normal(size=(2, 3, 3, 1)), Noise(2, given=rng.normal(size=(2, 3, 3, 1)))
    double, single = (sample(start(SAMPLERS[name], denoiser, x_T.astype(dtype), times(schedule, 20), z))
                      for dtype in (np.float64, np.float32))
    assert double.dtype == np.float64 and single.dtype == np.float32
    np.testing.assert_allclose(single, double, atol=2e-4)


def test_a_sampler_does_not_change_x_T_and_passes_cond_on():
    schedule, seen = schedules.linear(), []
    denoiser = NetworkDenoiser(schedule, "v", lambda x_t, t, cond: seen.append(cond) or x_t)
    x_T, cond = np.ones((2, 3), np.float32), (np.arange(2),)
    for sampler in (ddim, heun, dpm_solver_pp_2m):
        sample(sampler(denoiser, x_T, times(schedule, 3), cond))
    sample(ddpm(denoiser, x_T, times(schedule, 3), cond, streams=SampleStreams(0, 2)))
    assert all(c is cond for c in seen) and (x_T == 1).all()


def refused(sampler=ddim, ts=(3, 1), **options):
    schedule = schedules.linear(10, beta_max=0.9)
    sample(sampler(gaussian_1d(schedule, 1.0), np.zeros((2, 1)), ts, **options))


@pytest.mark.parametrize("make, sentence", [
    (lambda: refused(ts=[]), "times must be integers that fall"),
    (lambda: refused(ts=[10, 3]), "times must be integers that fall"),
    (lambda: refused(ts=[3, 3]), "times must be integers that fall"),
    (lambda: refused(ts=[1, 3]), "times must be integers that fall"),
    (lambda: refused(ts=[3, -1]), "times must be integers that fall"),
    (lambda: refused(eta=1.5), "eta, from deterministic to ancestral, must be"),
    (lambda: refused(eta=math.nan), "eta, from deterministic to ancestral, must be"),
    (lambda: refused(eta=0.5), "streams must be SampleStreams, one for each of the 2 samples, got None"),
    (lambda: refused(ddpm, streams=SampleStreams(0, 3)), "streams must be .* got 3"),
    (lambda: times(schedules.linear(), 0), "steps must be"),
    (lambda: times(schedules.linear(), 1001), "steps must be a whole number from 1 to 1000"),
    (lambda: times(schedules.linear(), 10.0), "steps must be"),
    (lambda: times(schedules.linear(), 10, "karras"), "spacing must be one of trailing"),
])
def test_refusals_name_the_argument(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
