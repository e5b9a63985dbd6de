"""k-diffusion's samplers under our laws, and against ours, in float64 over random schedules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.diffusion_strategies import any_schedule

pytest.importorskip("torch", reason="parity with k-diffusion needs PyTorch: pip install torch")
from parity.samplers_of_others import k_diffusion, of_k_diffusion  # noqa: E402

try:
    k_diffusion()
except ImportError as error:
    pytest.skip(f"parity with k-diffusion needs it: pip install k-diffusion ({error})", allow_module_level=True)

from minidiff.diffusion import samplers, schedules  # noqa: E402
from minidiff.diffusion.exact import MixtureDenoiser  # noqa: E402
from minidiff.verify.scheduler import report  # noqa: E402
from minidiff.verify.scheduler.replay import GivenNoise  # noqa: E402

LINEAR = schedules.linear(1000)
quickly = settings(deadline=None, max_examples=20)


def trailing(n):
    return samplers.times(LINEAR, n)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "euler_ancestral"])
def test_they_keep_the_laws(name):
    rows = report(of_k_diffusion(name, LINEAR, trailing), [3, 7])
    assert not [row for row in rows if row.verdict == "BROKEN"]
    assert sum(row.verdict == "kept" for row in rows) >= 12


@quickly
@given(any_schedule(min_T=2, max_T=15), st.data(), st.integers(0, 2**32 - 1))
def test_they_agree_with_ours(schedule, data, seed):
    """Euler is our DDIM, its ancestral form DDIM at eta = 1, which is DDPM; DPM-Solver++(2M) is ours."""
    n = data.draw(st.integers(1, schedule.T))
    times, rng = samplers.times(schedule, n), np.random.default_rng(seed)
    denoiser = MixtureDenoiser(schedule, [0.3, 0.7], rng.normal(size=(2, 3)), [0.1, 0.5])
    u, z = rng.normal(size=(4, 3)), rng.normal(size=(n, 4, 3))
    for name, sampler in {"euler": samplers.ddim, "dpmpp_2m": samplers.dpm_solver_pp_2m,
                          "euler_ancestral": samplers.ddpm}.items():
        draws = iter(z)
        ours = samplers.sample(sampler(denoiser, u, times, **(
            {"streams": GivenNoise(4, lambda draws=draws: next(draws))} if name == "euler_ancestral" else {})))
        scheduler = of_k_diffusion(name, schedule, lambda n: times)
        scheduler.set_steps(n)
        x_t = u / schedule.alpha(times[0])
        for i, t in enumerate(scheduler.timesteps):
            v = scheduler.scale_input(x_t, t)
            x0_hat = denoiser(v, np.full(4, t))
            x_t = scheduler.step((v - schedule.alpha(t) * x0_hat) / schedule.sigma(t), t, x_t, z[i])
        np.testing.assert_allclose(x_t, ours, rtol=1e-6, atol=1e-6)
