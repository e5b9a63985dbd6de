"""The samplers with noise that a scheduler_config.json names, step by step as diffusers runs them, with given noise.

In diffusers the configuration decides; here minidiff reads the file that diffusers writes.  The network is a formula.
"""

import numpy as np
import pytest
from support.given_noise import GivenNoise
from support.scheduler_settings import network

from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.pretrained.config import Config
from minidiff.pretrained.scheduler_config import SchedulerConfig

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from parity.diffusers_runs import end_of_run  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
SHAPE = (2, 4, 4, 4)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SDE = SD | {"algorithm_type": "sde-dpmsolver++"}
SOLVER, LCM = "DPMSolverMultistepScheduler", "LCMScheduler"
RUNS = [(SOLVER, SDE | options, steps) for steps in (1, 2, 7, 20) for options in (
    {}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1},
    {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"})]
RUNS += [(SOLVER, SDE | {"final_sigmas_type": "sigma_min"}, 20)]
RUNS += [(LCM, SD | options, steps) for steps in (1, 4, 7) for options in (
    {}, {"original_inference_steps": 20}, {"prediction_type": "v_prediction"}, {"timestep_scaling": 0.001})]


@pytest.mark.parametrize("name, options, steps", RUNS, ids=lambda value: str(value)[-40:])
def test_a_run_with_noise(name, options, steps, tmp_path):
    scheduler = getattr(diffusers, name)(**options)
    (tmp_path / "scheduler_config.json").write_text(scheduler.to_json_string(), encoding="utf-8")
    config = SchedulerConfig(Config.load(tmp_path / "scheduler_config.json"))
    rng = np.random.default_rng(steps)
    x_T, noise = rng.standard_normal(SHAPE, np.float32), rng.standard_normal((steps, *SHAPE), np.float32)
    plan = config.plan(steps)
    denoiser = NetworkDenoiser(plan.schedule, config.predicts,
                               lambda x_t, rows, cond: network(x_t, plan.t[rows[0]]).astype(np.float32))
    *_, state = plan.run(denoiser, np.float32(plan.first_std) * x_T, None, GivenNoise(noise, SHAPE[0]))
    expected = end_of_run(scheduler, steps, x_T, noise, network)
    assert np.abs(state.x_t - expected).max() <= 1e-4 * np.abs(expected).max()
