"""What scheduler_config.json may say, for each class of schedulers: each setting is honoured or refused.

SETTINGS has for each class and values one of these:

    EQUAL      the run is diffusers', to 1e-4 (tests/pretrained/scheduler_settings.npz, made with diffusers 0.42.1)
    "..."      UserError with these words
    OURS       another run than diffusers', whose own is off the mathematics (docs/stable_diffusion.md)

What makes no difference to diffusers, either, such as set_alpha_to_one of Euler's class, is in no row.
"""

from enum import Enum
from pathlib import Path

import numpy as np
from support.given_noise import GivenNoise

from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.pretrained.config import Config
from minidiff.pretrained.scheduler_config import SchedulerConfig

EQUAL, OURS = Enum("Verdict", ["EQUAL", "OURS"])
SHAPE = (1, 3, 3, 4)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM, PNDM, EULER, ANCESTRAL, HEUN, LMS, SOLVER, UNIPC, LCM = CLASSES = (
    "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler",
    "LCMScheduler")
OF_LATENTS = {DDIM: {"clip_sample": False}, PNDM: {"skip_prk_steps": True}}
V, LEADING, TRAILING = {"prediction_type": "v_prediction"}, {"timestep_spacing": "leading", "steps_offset": 1}, {
    "timestep_spacing": "trailing"}
KARRAS, EXPONENTIAL, BETA = ({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))
ZERO_SNR, TO_TIME_0 = {"rescale_betas_zero_snr": True}, {"final_sigmas_type": "sigma_min"}
SPREADING = (EULER, HEUN, LMS, SOLVER, UNIPC)               # spread times by a formula
RESCALING = (DDIM, EULER, ANCESTRAL, SOLVER, UNIPC, LCM)
BOUNDS = {"sigma_min": 0.1, "sigma_max": 8.0}

SETTINGS: list[tuple[str, dict, object]] = [
    *((name, options, EQUAL) for name in CLASSES for options in (
        {}, LEADING, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 500}, {"trained_betas": [0.01] * 1000})),
    *((name, options, OURS if name == PNDM else EQUAL) for name in CLASSES if name != LCM for options in (
        V, {"timestep_spacing": "linspace"}, TRAILING)),
    (LCM, V, EQUAL), (LCM, {"original_inference_steps": 20}, EQUAL), (LCM, {"timestep_scaling": 3.0}, EQUAL),
    *((name, options, EQUAL if name in SPREADING else "has no such setting") for name in CLASSES for options in (
        KARRAS, EXPONENTIAL, BETA, KARRAS | TRAILING, EXPONENTIAL | LEADING, BETA | TRAILING)),
    *((name, KARRAS | EXPONENTIAL, "are both true") for name in SPREADING),
    *((name, V | ZERO_SNR | more, EQUAL if name in RESCALING else "has no such setting") for name in CLASSES
      for more in ({}, TRAILING)),
    *((name, ZERO_SNR | TRAILING, EQUAL) for name in (EULER, ANCESTRAL, SOLVER, UNIPC)),
    *((name, ZERO_SNR, "takes a network that predicts v") for name in (DDIM, LCM)),
    *((name, V | ZERO_SNR | KARRAS, EQUAL) for name in (EULER, SOLVER, UNIPC)),
    *((name, options, EQUAL) for name in (DDIM, PNDM, LCM) for options in (
        {"set_alpha_to_one": False}, {"set_alpha_to_one": True})),
    *((name, TO_TIME_0 | more, EQUAL) for name in (EULER, SOLVER) for more in ({}, LEADING, TRAILING, KARRAS)),
    *((name, TO_TIME_0, "has no such setting") for name in (DDIM, PNDM, ANCESTRAL, HEUN, LMS, LCM)),
    *((SOLVER, TO_TIME_0 | more, EQUAL) for more in (
        {"lower_order_final": False}, {"euler_at_final": True}, {"algorithm_type": "sde-dpmsolver++"})),
    (UNIPC, TO_TIME_0, "final_sigmas_type is 'sigma_min'"),
    *((name, BOUNDS | more, EQUAL) for name in (EULER, UNIPC) for more in ({}, KARRAS, EXPONENTIAL, BETA)),
    *((name, BOUNDS, "has no such setting") for name in CLASSES if name not in (EULER, UNIPC)),
    (EULER, BOUNDS | TO_TIME_0 | KARRAS, EQUAL),
    (EULER, {"sigma_min": 0.001} | TO_TIME_0 | KARRAS, "less noise than it ends with"),
    (EULER, {"interpolation_type": "log_linear"}, "interpolation_type is 'log_linear'"),
    (EULER, {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
    *((name, {"lower_order_final": False}, verdict) for name, verdict in (
        (SOLVER, EQUAL), (UNIPC, "lower_order_final is False"))),
    (SOLVER, {"euler_at_final": True}, EQUAL), (UNIPC, {"euler_at_final": True}, "has no such setting"),
    (SOLVER, {"solver_type": "heun"}, "solver_type is 'heun'"), (SOLVER, {"solver_type": "logrho"}, EQUAL),
    (UNIPC, {"solver_type": "bh1"}, "solver_type is 'bh1'"), (UNIPC, {"solver_type": "midpoint"}, EQUAL),
    *((name, {"solver_order": order}, f"solver_order is {order}") for name in (SOLVER, UNIPC) for order in (1, 3)),
    (SOLVER, {"algorithm_type": "sde-dpmsolver++"}, EQUAL), (SOLVER, {"algorithm_type": "deis"} | TO_TIME_0, EQUAL),
    *((SOLVER, {"algorithm_type": kind}, "algorithm_type is") for kind in ("dpmsolver", "sde-dpmsolver")),
    *((name, {"thresholding": True}, "thresholding is True") for name in (DDIM, SOLVER, UNIPC, LCM)),
    *((name, {"clip_sample": True}, "clip_sample is True") for name in (DDIM, HEUN, LCM)),
    (UNIPC, {"predict_x0": False}, "predict_x0 is False"), (UNIPC, {"disable_corrector": [0]}, "disable_corrector"),
    (SOLVER, {"use_lu_lambdas": True}, "use_lu_lambdas is True"),
    (SOLVER, {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
    (SOLVER, {"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
    *((name, {"use_flow_sigmas": True}, "use_flow_sigmas is True") for name in (SOLVER, UNIPC)),
    *((name, {"use_dynamic_shifting": True}, "use_dynamic_shifting") for name in (SOLVER, UNIPC)),
    *((name, {"beta_schedule": "exp"}, "beta_schedule 'exp' is unknown") for name in CLASSES),
    (PNDM, {"skip_prk_steps": False}, "skip_prk_steps is False"),
]


def close(name: str, options: dict) -> float:
    """How near diffusers' end ours must be, of its largest value.

    These classes compute with x / alpha in float32.  Where it starts with thousands of times the noise, at zero SNR or
    in the cosine schedule, the rounding of the first step is up to a thousandth of the end.
    """
    noisy = "rescale_betas_zero_snr" in options or options.get("beta_schedule") == "squaredcos_cap_v2"
    return 2e-3 if noisy and name in (EULER, ANCESTRAL, HEUN, LMS) else 1e-4


def named(name: str, options: dict) -> str:
    """A row's name."""
    return name + "".join(f" {key}={str(value)[:16]}" for key, value in options.items())


def network(x_t, t):
    return np.tanh(0.7 * x_t + 0.3) * (0.5 + t / 2000)


def numbers(steps):
    """x_T and the noise of each step."""
    rng = np.random.default_rng(steps)
    return rng.standard_normal(SHAPE, np.float32), rng.standard_normal((steps + 1, *SHAPE), np.float32)


def ours(name: str, options: dict, steps: int) -> np.ndarray:
    """The end of a run; UserError where the settings are refused."""
    values = SD | OF_LATENTS.get(name, {}) | options | {"_class_name": name}
    config = SchedulerConfig(Config(values, Path("scheduler_config.json")))
    plan, (x_T, noise) = config.plan(steps), numbers(steps)
    denoiser = NetworkDenoiser(plan.schedule, config.predicts,
                               lambda x_t, rows, cond: network(x_t, plan.t[rows[0]]).astype(np.float32))
    *_, state = plan.run(denoiser, np.float32(plan.first_std) * x_T, None, GivenNoise(noise, SHAPE[0]))
    return state.x_t
