"""The classes of schedulers that a checkpoint may name: how each lays out its times, its method, and its settings.

FAMILIES holds those that are here, CHOICES the names by which people choose one, and NOT_HERE those whose noise
schedule is known and whose method is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

from minidiff.diffusion import multistep
from minidiff.diffusion.samplers import SAMPLERS, Sampler
from minidiff.errors import UserError
from minidiff.pretrained.config import Config
from minidiff.pretrained.plan import LmsPlan, Plan, PndmPlan

TINY = 2.0**-48                                             # keeps rho finite at SNR 0: its root is below float32's eps
NEARLY_ZERO = 2.0**-24                                      # alpha_bar at SNR 0, in classes that need a finite rho


@dataclass(frozen=True)
class Family:
    """How one class of schedulers lays out its times; sampler: its method."""

    sampler: Sampler
    spacing: str                    # if the configuration names none
    bounds: bool = False            # sigma_min and sigma_max bound the times that are spread
    one_more: bool = False          # lays out N + 1 times and leaves out the last, except where trailing
    fractions: bool = False         # times of `linspace` are not rounded
    scaled: bool = False            # x_T is sigma times the noise, for every spacing but leading
    stops: bool = False             # may end at alpha_bar_0 and not at the clean image (set_alpha_to_one)
    own_stride: bool = False        # a step ends at t - T // N, whatever the next time
    sde: Sampler | None = None      # its method where algorithm_type is sde-dpmsolver++
    distilled: bool = False         # visits times of a consistency model's distillation, and scales its answers
    least: float = TINY             # alpha_bar at the end of a schedule that ends in pure noise
    plan: type[Plan] = Plan


# other programs' LMS and PLMS extrapolate in the last step, too
LMS, PLMS = (replace(entry, function=partial(entry.function, ends_at_x0_hat=False))
             for entry in (SAMPLERS["lms"], SAMPLERS["plms"]))
FAMILIES = {
    "DDIMScheduler": Family(SAMPLERS["ddim"], "leading", stops=True, own_stride=True),
    "PNDMScheduler": Family(PLMS, "leading", stops=True, plan=PndmPlan),
    "EulerDiscreteScheduler": Family(SAMPLERS["ddim"], "linspace", fractions=True, scaled=True, bounds=True,
                                     least=NEARLY_ZERO),
    "EulerAncestralDiscreteScheduler": Family(SAMPLERS["ddpm"], "linspace", fractions=True, scaled=True,
                                              least=NEARLY_ZERO),
    "HeunDiscreteScheduler": Family(Sampler(multistep.edm_heun, order=2, calls=2), "linspace", fractions=True,
                                    scaled=True),
    "LMSDiscreteScheduler": Family(LMS, "linspace", fractions=True, scaled=True, plan=LmsPlan),
    "DPMSolverMultistepScheduler": Family(SAMPLERS["dpm++2m"], "linspace", one_more=True, sde=SAMPLERS["dpm++2m-sde"],
                                          least=NEARLY_ZERO),
    "UniPCMultistepScheduler": Family(SAMPLERS["unipc"], "linspace", one_more=True, bounds=True, least=NEARLY_ZERO),
    "LCMScheduler": Family(SAMPLERS["lcm"], "leading", distilled=True),
}


class Choice(NamedTuple):
    """The class whose layout of times a run has, how they are spread, and whether its method is the SDE's."""

    name: str
    spread: str | None = None               # a name in SPREADS; None for the training times of the spacing
    sde: bool = False


# the names by which people choose a sampler
CHOICES = {"ddim": Choice("DDIMScheduler"), "plms": Choice("PNDMScheduler"),
           "euler": Choice("EulerDiscreteScheduler"), "euler-karras": Choice("EulerDiscreteScheduler", spread="karras"),
           "euler-a": Choice("EulerAncestralDiscreteScheduler"),
           "heun": Choice("HeunDiscreteScheduler"), "lms": Choice("LMSDiscreteScheduler"),
           "dpm++2m": Choice("DPMSolverMultistepScheduler"),
           "dpm++2m-karras": Choice("DPMSolverMultistepScheduler", spread="karras"),
           "dpm++2m-sde": Choice("DPMSolverMultistepScheduler", sde=True),
           "dpm++2m-sde-karras": Choice("DPMSolverMultistepScheduler", spread="karras", sde=True),
           "unipc": Choice("UniPCMultistepScheduler"), "lcm": Choice("LCMScheduler")}
# names of other programs, and of samplers that are not here -> the nearest of CHOICES
NEAREST = {"pndm": "plms", "ddpm": "euler-a", "euler-ancestral": "euler-a", "dpmpp-2m": "dpm++2m",
           "dpm++-2m": "dpm++2m", "dpm-solver-pp-2m": "dpm++2m", "dpm++-2m-karras": "dpm++2m-karras",
           "dpmpp-2m-karras": "dpm++2m-karras", "dpmpp-2m-sde": "dpm++2m-sde", "dpm++-2m-sde": "dpm++2m-sde"}
# classes whose method is not here -> the nearest of CHOICES.  Their noise schedules are like those of FAMILIES, so a
# checkpoint with one is drawn with a sampler that the user chooses
NOT_HERE = {"DEISMultistepScheduler": "dpm++2m", "DPMSolverSinglestepScheduler": "dpm++2m", "DDPMScheduler": "euler-a",
            "KDPM2DiscreteScheduler": "heun", "KDPM2AncestralDiscreteScheduler": "euler-a",
            "DPMSolverSDEScheduler": "dpm++2m-sde", "SASolverScheduler": "dpm++2m-sde", "TCDScheduler": "ddim"}
# what counts of their settings
OF_SCHEDULE = ("_class_name", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas",
               "prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "steps_offset", "set_alpha_to_one",
               "thresholding", "use_flow_sigmas", "timestep_type")


# --- settings ----------------------------------------------------------------------------------------------

SDE = "sde-dpmsolver++"
SOLVER = "DPMSolverMultistepScheduler"
SPREADING = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", SOLVER,
             "UniPCMultistepScheduler")
# settings of some classes, which other programs pass over in the others: (what is no change, the classes)
ONLY_OF = {"use_karras_sigmas": (False, SPREADING), "use_exponential_sigmas": (False, SPREADING),
           "use_beta_sigmas": (False, SPREADING),
           "sigma_min": (None, ("EulerDiscreteScheduler", "UniPCMultistepScheduler")),
           "sigma_max": (None, ("EulerDiscreteScheduler", "UniPCMultistepScheduler")),
           "final_sigmas_type": ("zero", ("EulerDiscreteScheduler", SOLVER, "UniPCMultistepScheduler")),
           "euler_at_final": (False, (SOLVER,)),
           "rescale_betas_zero_snr": (False, ("DDIMScheduler", "EulerDiscreteScheduler", SOLVER,
                                              "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler",
                                              "LCMScheduler", "DDPMScheduler", "TCDScheduler"))}
# other programs' names of the same method
SAME = {SOLVER: {"solver_type": ("logrho", "bh1", "bh2"), "algorithm_type": ("deis",)},
        "UniPCMultistepScheduler": {"solver_type": ("midpoint", "heun", "logrho")}}
# what a class has where its configuration says nothing, if this is not what most classes have
OF_LATENTS = {"beta_start": 0.00085, "beta_end": 0.012}
DEFAULTS = {"DDIMScheduler": {"clip_sample": True}, "HeunDiscreteScheduler": OF_LATENTS,
            "PNDMScheduler": {"set_alpha_to_one": False, "skip_prk_steps": False},
            "LCMScheduler": OF_LATENTS | {"beta_schedule": "scaled_linear"},
            "TCDScheduler": OF_LATENTS | {"beta_schedule": "scaled_linear"},
            **{name: OF_LATENTS for name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
                                             "DPMSolverSDEScheduler")}}


def check_choice(name: str) -> None:
    """UserError, which says what is meant most likely, where there is no sampler of this name."""
    if not isinstance(name, str) or name not in CHOICES:
        spelled = str(name)[:40].lower().replace("_", "-").replace(" ", "-")
        near = NEAREST.get(spelled) or next(iter(get_close_matches(spelled, CHOICES, 1)), None)
        raise UserError(f"sampler must be one of {', '.join(CHOICES)}, not {str(name)[:40]!r}"
                        + (f": the nearest is {near}" if near else ""))


def with_defaults(config: Config) -> Config:
    """The settings that count, and the class's own where the file has none; UserError for a class that is unknown."""
    name = config.text("_class_name")
    if name not in FAMILIES and name not in NOT_HERE:
        raise UserError(f"{config.path}: the scheduler {name[:60]!r} is unknown; known are {', '.join(FAMILIES)}.")
    given = {key: value for key, value in config.values.items()
             if value is not None and value not in SAME.get(name, {}).get(key, ())
             and (name in FAMILIES or key in OF_SCHEDULE)}
    return Config(DEFAULTS.get(name, {}) | given, config.path)


def check_method(config: Config) -> None:
    """UserError where the configuration gives its own sampler a setting that minidiff does not have."""
    name = config.text("_class_name")
    try:
        if name != SOLVER or config.text("algorithm_type", SDE) != SDE:
            config.require(algorithm_type="dpmsolver++")
        for key, (default, classes) in ONLY_OF.items():
            value = config.values.get(key)
            if value is not None and value != default and name not in classes:
                raise UserError(f"{config.path}: {key} is {repr(value)[:60]}, and {name} has no such setting.")
        if name == "UniPCMultistepScheduler":
            config.require(final_sigmas_type="zero", lower_order_final=True)
        config.require(use_lu_lambdas=False, clip_sample=False, solver_order=2,
                       solver_type={"UniPCMultistepScheduler": "bh2"}.get(name, "midpoint"),
                       skip_prk_steps=True, predict_x0=True, interpolation_type="linear", use_dynamic_shifting=False,
                       lambda_min_clipped=-math.inf, disable_corrector=[], solver_p=None, variance_type=None)
    except UserError as error:
        other = "euler" if name == SOLVER else "dpm++2m"
        raise UserError(f"{error} Choose another sampler, such as --sampler {other}.") from None
