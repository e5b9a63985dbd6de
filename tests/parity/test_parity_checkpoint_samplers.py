"""The samplers with noise that a scheduler_config.json names, step by step as diffusers runs them, with given noise.

In diffusers the configuration decides; here minidiff reads the file that diffusers writes.  The network is a formula.
"""

import numpy as np
import pytest

from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.pretrained.config import Config
from minidiff.pretrained.scheduler_config import SchedulerConfig

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

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


def network(x, t):
    return np.tanh(0.7 * x + 0.3) * (0.5 + t / 2000)


def theirs(scheduler, steps, x_T, noise):
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(x_T) * scheduler.init_noise_sigma
    drawn = iter(noise)

    def randn_tensor(shape, **_):
        return torch.from_numpy(next(drawn))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("scheduling_lcm", "scheduling_dpmsolver_multistep"):
            patch.setattr(f"diffusers.schedulers.{module}.randn_tensor", randn_tensor)
        for t in scheduler.timesteps:
            predicted = network(scheduler.scale_model_input(x, t).numpy(), float(t)).astype(np.float32)
            x = scheduler.step(torch.from_numpy(predicted), t, x).prev_sample
    return x.numpy()


class Given:
    def __init__(self, noise):
        self.noise = iter(noise)

    def __len__(self):
        return SHAPE[0]

    def normal(self, shape, dtype=np.float32):
        return next(self.noise)


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
    *_, state = plan.run(denoiser, np.float32(plan.first_std) * x_T, None, Given(noise))
    expected = theirs(scheduler, steps, x_T, noise)
    assert np.abs(state.x_t - expected).max() <= 1e-4 * np.abs(expected).max()
