"""What a scheduler_config.json asks for becomes the right run: methods with noise, and consistency models.

Runs by other configurations are compared with golden outputs in test_golden.py, and these with diffusers, where it is
installed (tests/parity/test_parity_checkpoint_samplers.py).  Here they draw from a Gaussian, whose moments are known.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from support.law_tools import Noise

from minidiff.diffusion.multistep import dpm_solver_pp_2m_sde
from minidiff.diffusion.samplers import dpm_solver_pp_2m
from minidiff.errors import UserError
from minidiff.pretrained.config import Config
from minidiff.pretrained.scheduler_classes import CHOICES, NOT_HERE, OF_SCHEDULE
from minidiff.pretrained.scheduler_config import SchedulerConfig

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
S = 0.8


def scheduler(name="DPMSolverMultistepScheduler", **options) -> SchedulerConfig:
    return SchedulerConfig(Config(SD | options | {"_class_name": name}, Path("scheduler_config.json")))


def variance_of_the_end(plan, answer) -> float:
    """From x_T ~ N(0, V) of the plan's first row. answer: (x_t, row) -> x0_hat, linear in x_t."""
    class Denoiser:
        schedule, predicts = plan.schedule, "x0"

        def __call__(self, x_t, rows, cond=None):
            return answer(x_t, int(rows[0]))
    first, count = plan.steps[0][0], len(plan.steps) + 1
    x_T = np.zeros((count, 1))
    x_T[0] = math.sqrt(plan.schedule.abar(first) * S**2 + 1 - plan.schedule.abar(first))
    draws = Noise(count, given=lambda i: np.eye(count)[i][:, None])
    *_, state = plan.run(Denoiser(), x_T, None, draws)
    return float((state.x_t**2).sum())


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{}, {"original_inference_steps": 20, "timestep_scaling": 0.01}])
def test_lcm_draws_from_the_data_with_the_network_of_the_exact_flow(options, steps):
    """F = (f - c_skip x_t) / c_out, f = S / sqrt(V) x_t, c_skip = 1 / (1 + (2 k t)^2), t the training time."""
    plan = scheduler("LCMScheduler", **options).plan(steps)

    def F(x_t, row):
        abar, kt2 = plan.schedule.abar(row), (2 * options.get("timestep_scaling", 10.0) * plan.t[row]) ** 2
        f = S / math.sqrt(abar * S**2 + 1 - abar) * x_t
        return (f - x_t / (1 + kt2)) / math.sqrt(kt2 / (1 + kt2))
    assert variance_of_the_end(plan, F) == pytest.approx(S**2, rel=1e-9)


@pytest.mark.parametrize("K, steps, times", [
    (50, 1, [999]), (50, 4, [999, 759, 499, 259]), (50, 3, [999, 679, 339]), (20, 4, [999, 749, 499, 249]),
    (7, 7, [993, 851, 709, 567, 425, 283, 141])])
def test_lcm_visits_times_of_the_distillation(K, steps, times):
    """As diffusers' set_timesteps says: of k (T // K) - 1, those with indices floor(i K / N) from the largest."""
    plan = scheduler("LCMScheduler", original_inference_steps=K).plan(steps)
    assert [int(plan.t[row]) for row, _ in plan.steps] == times and plan.steps[-1][1] == -1
    assert plan.first_std == 1


def test_more_steps_than_the_distillation_had_are_refused():
    for options in ({}, {"original_inference_steps": 20}):
        with pytest.raises(UserError, match="51 steps do not fit: take fewer"):
            scheduler("LCMScheduler", **options).plan(51)
    with pytest.raises(UserError, match="at most num_train_timesteps"):
        scheduler("LCMScheduler", original_inference_steps=1001).plan(2)


@pytest.mark.parametrize("options, choice, function", [
    ({"algorithm_type": "sde-dpmsolver++"}, None, dpm_solver_pp_2m_sde), ({}, None, dpm_solver_pp_2m),
    ({"algorithm_type": "dpmsolver++"}, None, dpm_solver_pp_2m), ({}, "dpm++2m-sde", dpm_solver_pp_2m_sde),
    ({"algorithm_type": "sde-dpmsolver++"}, "dpm++2m", dpm_solver_pp_2m),
    ({}, "dpm++2m-sde-karras", dpm_solver_pp_2m_sde)])
def test_the_algorithm_type_or_the_user_chooses_the_sde(options, choice, function):
    assert scheduler(**options).plan(5, choice).sampler.function is function


def test_other_algorithms_are_refused():
    with pytest.raises(UserError, match="algorithm_type is 'sde-dpmsolver'"):
        scheduler(algorithm_type="sde-dpmsolver").plan(4)
    with pytest.raises(UserError, match="algorithm_type"):
        scheduler("UniPCMultistepScheduler", algorithm_type="sde-dpmsolver++").plan(4)


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}])
def test_the_sde_draws_from_a_gaussian_with_weak_order_two(options):
    """The variance of its samples tends to S^2: within 8 % in 20 steps, 1 % in 80 (ddpm needs hundreds)."""
    sde = scheduler(algorithm_type="sde-dpmsolver++", **options)

    def error(steps):
        plan = sde.plan(steps)
        abar = plan.schedule.alpha_bar
        return abs(variance_of_the_end(plan, lambda x_t, row: math.sqrt(abar[row]) * S**2
                                       / (abar[row] * S**2 + 1 - abar[row]) * x_t) / S**2 - 1)
    errors = error(20), error(40), error(80)
    assert errors[0] < 0.08 and errors[2] < 0.01


# --- what a class has where its configuration says nothing (as diffusers' classes have) ---------------------------

def bare(name: str, **values) -> SchedulerConfig:
    return SchedulerConfig(Config({"_class_name": name} | values, Path("scheduler_config.json")))


def test_defaults_of_the_classes():
    """Heun's and LCM's betas are those of latents, and PNDM ends at time 0, unlike the other classes."""
    of_latents, plain = np.linspace(0.00085, 0.012, 1000), np.linspace(1e-4, 0.02, 1000)
    scaled = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    for name, betas in (("HeunDiscreteScheduler", of_latents), ("LCMScheduler", scaled),
                        ("EulerDiscreteScheduler", plain)):
        assert np.allclose(bare(name).alpha_bar, np.cumprod(1 - betas), rtol=1e-4), name
    assert bare("PNDMScheduler", skip_prk_steps=True).plan(4).steps[-1][1] == 0
    assert bare("PNDMScheduler", skip_prk_steps=True, set_alpha_to_one=True).plan(4).steps[-1][1] == -1
    assert bare("DDIMScheduler", clip_sample=False).plan(4).steps[-1][1] == -1


@pytest.mark.parametrize("name, values, words", [
    ("DDIMScheduler", {}, "clip_sample is True"), ("PNDMScheduler", {}, "skip_prk_steps is False"),
    ("HeunDiscreteScheduler", {"sigma_min": 0.1}, "sigma_min is 0.1, and HeunDiscreteScheduler has no such setting"),
    ("EulerDiscreteScheduler", {"sigma_min": 9.0, "sigma_max": 8.0}, "sigma_min is at most sigma_max, not 9 and 8"),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -2.0}, "lambda_min_clipped is -2.0"),
    ("UniPCMultistepScheduler", {"disable_corrector": [0, 1]}, r"disable_corrector is \[0, 1\]")])
def test_settings_that_are_not_here_are_refused(name, values, words):
    with pytest.raises(UserError, match=words):
        bare(name, **values).plan(4)


# settings with which each of them is here
RIGHT = {"solver_order": 2, "clip_sample": False, "use_karras_sigmas": False, "algorithm_type": "dpmsolver++"}


@pytest.mark.parametrize("name, values, own, other, named", [
    ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc", "dpm++2m", "dpm++2m"),
    ("DDIMScheduler", {}, "ddim", "euler", "dpm++2m"),
    ("EulerAncestralDiscreteScheduler", {"use_karras_sigmas": True}, "euler-a", "euler", "dpm++2m"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "dpm++2m", "unipc", "euler")])
def test_settings_of_its_own_sampler_do_not_count_for_one_that_is_chosen(name, values, own, other, named):
    config = bare(name, **values)
    """Nor where its own one is chosen by its name, which says what it is."""
    with pytest.raises(UserError, match=rf"\. Choose another sampler, such as --sampler {re.escape(named)}\.$"):
        config.plan(4)
    assert config.refusal().endswith(f"--sampler {named}.") and bare(name, **RIGHT).refusal() == ""
    for choice in (own, other):
        found, like = config.plan(4, choice), bare(CHOICES[choice].name, **RIGHT).plan(4)
        assert found.steps == like.steps and np.array_equal(found.t, like.t)
        assert found.sampler is like.sampler and np.array_equal(found.schedule.alpha_bar, like.schedule.alpha_bar)


@pytest.mark.parametrize("choice", [None, "euler", "unipc"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_a_network_that_reads_the_noise_level_is_refused_whatever_the_sampler(name, choice):
    with pytest.raises(UserError, match="timestep_type is 'continuous'"):
        bare(name, timestep_type="continuous").plan(4, choice)


@pytest.mark.parametrize("name", NOT_HERE)
def test_a_checkpoint_whose_sampler_is_not_here_is_drawn_with_one_that_is_chosen(name):
    """Its schedule, its spacing and what its network predicts count; settings of its method do not."""
    own = {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1, "solver_order": 3,
           "algorithm_type": "deis", "solver_type": "logrho", "clip_sample": True, "variance_type": "fixed_small",
           "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    config, near = scheduler(name, **own), NOT_HERE[name]
    with pytest.raises(UserError, match=f"its sampler {name} is not here: choose another, such as --sampler") as caught:
        config.plan(4)
    assert str(caught.value).endswith(near)
    expected = scheduler(CHOICES[near].name, **{key: own[key] for key in OF_SCHEDULE if key in own}, clip_sample=False)
    found, like = config.plan(4, near), expected.plan(4, near)
    assert config.predicts == "v" and found.steps == like.steps and np.array_equal(found.t, like.t)
    assert np.array_equal(config.alpha_bar, expected.alpha_bar)
