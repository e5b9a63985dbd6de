"""smalldiffusion's sampler under our laws, and against ours, in float64 over random schedules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.diffusion_strategies import any_schedule

pytest.importorskip("torch", reason="parity with smalldiffusion needs PyTorch: pip install torch")
from parity.samplers_of_others import of_smalldiffusion, smalldiffusion  # noqa: E402

try:
    smalldiffusion()
except ImportError as error:
    pytest.skip(f"parity with smalldiffusion needs it: pip install smalldiffusion ({error})", allow_module_level=True)

from minidiff.diffusion import samplers, schedules  # noqa: E402
from minidiff.diffusion.exact import MixtureDenoiser  # noqa: E402
from minidiff.verify.scheduler import report  # noqa: E402
from minidiff.verify.scheduler.replay import GivenNoise  # noqa: E402

LINEAR = schedules.linear(1000)
quickly = settings(deadline=None, max_examples=20)


def trailing(n):
    return samplers.times(LINEAR, n)


DDIM, DDPM = 0.0, 0.5                                       # its mu


@pytest.mark.parametrize("mu", [DDIM, DDPM])
def test_it_keeps_the_laws(mu):
    rows = report(of_smalldiffusion(LINEAR, trailing, mu=mu), [3, 7])
    assert not [row for row in rows if row.verdict == "BROKEN"]
    assert sum(row.verdict == "kept" for row in rows) >= 12


def test_its_lists_end_at_the_first_noise():
    """sample_sigmas has n + 1 entries, of which the last is sigma_0 and not 0: called as in its
    examples, a run leaves the first noise of the table, sqrt(beta_0) in all."""
    diffusion, _ = smalldiffusion()
    sigmas = diffusion.ScheduleDDPM(1000).sample_sigmas(20)
    assert len(sigmas) == 21
    np.testing.assert_allclose(sigmas[[0, -1]], [LINEAR.sigma(t) / LINEAR.alpha(t) for t in (999, 0)], rtol=1e-4)


@quickly
@given(any_schedule(min_T=2, max_T=15), st.data(), st.integers(0, 2**32 - 1))
def test_it_agrees_with_ours(schedule, data, seed):
    """mu = 0 is our DDIM, mu = 1/2 our DDPM."""
    n = data.draw(st.integers(1, schedule.T))
    times, rng = samplers.times(schedule, n), np.random.default_rng(seed)
    denoiser = MixtureDenoiser(schedule, [0.3, 0.7], rng.normal(size=(2, 3)), [0.1, 0.5])
    u, z = rng.normal(size=(4, 3)), rng.normal(size=(n, 4, 3))
    for mu, sampler in {DDIM: samplers.ddim, DDPM: samplers.ddpm}.items():
        draws = iter(z)
        ours = samplers.sample(sampler(denoiser, u, times, **(
            {"streams": GivenNoise(4, lambda draws=draws: next(draws))} if mu else {})))
        scheduler = of_smalldiffusion(schedule, lambda n: times, mu=mu)
        scheduler.set_steps(n)
        x_t = u / schedule.alpha(times[0])
        for i, t in enumerate(scheduler.timesteps):
            v = scheduler.scale_input(x_t, t)
            x0_hat = denoiser(v, np.full(4, t))
            x_t = scheduler.step((v - schedule.alpha(t) * x0_hat) / schedule.sigma(t), t, x_t, z[i])
        np.testing.assert_allclose(x_t, ours, rtol=1e-6, atol=1e-6)
