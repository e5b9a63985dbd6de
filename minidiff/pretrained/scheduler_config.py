"""A checkpoint's scheduler_config.json: its noise schedule, what its network predicts, and how it is to be sampled.

    betas            linear, or linear in sqrt(beta) (Stable Diffusion), or the cosine schedule
    spacing          which of the T training times a run of N steps visits: leading, linspace or trailing
    spread           times such that rho^(1/7) (Karras et al. 2022, eq. 5), log rho (exponential) or the quantiles of
                     rho in a beta distribution are equally spaced, rho = sigma / alpha
    ends             at the clean image, or at the noise of time 0 (final_sigmas_type sigma_min, set_alpha_to_one false)
    zero SNR         the schedule rescaled to end in pure noise (Lin et al. 2024)
    SDE              DPM-Solver++(2M) with fresh noise in each step (algorithm_type sde-dpmsolver++)
    LCM              some of the original_inference_steps times that a latent consistency model was distilled on

A run of N steps becomes a `Plan` (plan.py): a schedule of its own that has one row for each time of the run.  Our
samplers run on its rows, and see nothing of the spacing.  The times may be fractions: then the network is asked at a
fraction, with the noise level in between.

The configuration decides, also where it is off the mathematics: `leading` starts at 981 of 1000, where x_T has less
noise than the run starts from; the last step of Stable Diffusion 1 ends at time 0, and not at the clean image; in
DDIM's trailing spacing a step ends at t - T // N, which is not quite the next time; and Euler's last latents are
x / alpha where they keep the noise of time 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from minidiff.checks import whole
from minidiff.diffusion import multistep
from minidiff.diffusion.samplers import SAMPLERS, Sampler
from minidiff.diffusion.schedules import Schedule, from_betas, zero_terminal_snr
from minidiff.errors import UserError
from minidiff.pretrained.config import Config
from minidiff.pretrained.plan import LmsPlan, Plan, PndmPlan

SPACINGS = ("leading", "linspace", "trailing")
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
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
               "thresholding", "use_flow_sigmas")
SDE = "sde-dpmsolver++"
FEW = 15                                                    # below, other programs' DPM-Solver++ takes more care


class SchedulerConfig:
    """What a scheduler_config.json says, checked."""

    def __init__(self, config: Config):
        name = config.text("_class_name")
        if name not in FAMILIES and name not in NOT_HERE:
            raise UserError(f"{config.path}: the scheduler {name[:60]!r} is unknown; known are {', '.join(FAMILIES)}.")
        given = {key: value for key, value in config.values.items()
                 if value is not None and value not in SAME.get(name, {}).get(key, ())
                 and (name in FAMILIES or key in OF_SCHEDULE)}
        self.config = config = Config(DEFAULTS.get(name, {}) | given, config.path)
        check(config)
        self.name, self.predicts = name, PREDICTS[config.text("prediction_type", "epsilon")]
        self.T = config.whole("num_train_timesteps", 1000)
        self.alpha_bar = self._table()                                              # (T,)
        self.spread = next((kind for kind in SPREADS if config.flag(f"use_{kind}_sigmas", False)), None)

    def changed(self, spacing: str | None = None, predicts: str | None = None) -> SchedulerConfig:
        """The same with another spacing of times, or for a network that predicts something else."""
        if spacing is not None and spacing not in SPACINGS:
            raise UserError(f"spacing must be one of {', '.join(SPACINGS)}, not {str(spacing)[:40]!r}")
        kinds = {ours: theirs for theirs, ours in PREDICTS.items()}
        if predicts is not None and predicts not in kinds:
            raise UserError(f"predicts must be one of {', '.join(kinds)}, not {str(predicts)[:40]!r}")
        given = {"timestep_spacing": spacing, "prediction_type": kinds.get(predicts)}
        changes = {key: value for key, value in given.items() if value is not None}
        return SchedulerConfig(Config(self.config.values | changes, self.config.path)) if changes else self

    def distilled(self, choice: str | None = None) -> bool:
        """Whether its own sampler, or this one of CHOICES, visits times of a consistency model's distillation."""
        return FAMILIES[self._chosen(choice).name].distilled

    def plan(self, steps: int, choice: str | None = None, share: float = 1.0) -> Plan:
        """The run of `steps` steps by the configuration's own sampler, or by one of CHOICES.

        share: of the times of a consistency model's distillation, from 0 on, over which the steps are spread.
        """
        name, spread, sde = self._chosen(choice)
        family = FAMILIES[name]
        if self.predicts == "eps" and self.alpha_bar[-1] == 0 and family.least == TINY:
            raise UserError(f"{self.config.path}: with rescale_betas_zero_snr {name} takes a network that predicts v, "
                            "not eps, which says nothing of the picture where there is noise alone")
        steps = whole("steps", steps, 1, self.T - family.one_more)
        spacing = self.config.text("timestep_spacing", family.spacing)
        t = self._times(family, spacing, steps, share)                              # (steps,) falling
        if t[0] >= self.T:
            raise UserError(f"{self.config.path}: with its steps_offset, a run of {steps} steps would start at time "
                            f"{t[0]:.0f}, and the last time is {self.T - 1}: take fewer steps")
        rho_of = self._rho(family)                                                  # (T,)
        rho = np.interp(t, np.arange(self.T), rho_of)
        if spread is not None:
            rho, t = self._spread(family, spread, rho_of, rho)
        first = rho[0] if family.scaled and spacing != "leading" else None
        last = self._last(family, rho_of)
        if rho[-1] < last * (1 - 1e-6):
            raise UserError(f"{self.config.path}: a run of {steps} steps would come to less noise than it ends with by "
                            "final_sigmas_type: take fewer steps")
        # a step from time 0 to the noise of time 0 would go nowhere
        pairs = [(a, b) for a, b in pairwise([*rho, last]) if a > b * (1 + 1e-6)]
        if family.own_stride:
            pairs = list(self._strides(t.astype(int), rho_of, steps, last))
        if not pairs:
            raise UserError(f"{self.config.path}: a run of {steps} steps would start at time {t[0]:.0f}, where it "
                            "ends: take more steps")
        plan = _plan(pairs, dict(zip(rho, t, strict=True)), first, family.sde if sde else family.sampler, family.plan)
        boundary = self.config.number("timestep_scaling", 10.0) if family.distilled else None
        return replace(plan, boundary=boundary, unscaled=family.scaled,
                       last_alone=family.one_more and last > 0 and len(pairs) == steps and self._euler_at_end(steps))

    def _chosen(self, choice: str | None) -> Choice:
        """One of CHOICES, or its own sampler; UserError where this is not here."""
        if choice is not None:
            check_choice(choice)
            return CHOICES[choice]
        if self.name in NOT_HERE:
            raise UserError(f"{self.config.path}: its sampler {self.name} is not here: choose another, such as "
                            f"--sampler {NOT_HERE[self.name]}")
        return Choice(self.name, self.spread, self.config.text("algorithm_type", "") == SDE)

    def _rho(self, family: Family) -> np.ndarray:
        """(T,) sigma / alpha of each training time, which is finite also where the schedule ends in pure noise."""
        alpha_bar = np.where(self.alpha_bar > 0, self.alpha_bar, family.least)
        return np.sqrt((1 - alpha_bar) / np.maximum(alpha_bar, TINY))

    def _spread(self, family: Family, spread: str, rho_of, rho) -> tuple[np.ndarray, np.ndarray]:
        """(rho, t), (steps,) each, falling: spread over the whole table, or over the run's own times."""
        if family.one_more:                                 # they count whole times, so float32's rounding matters
            rho_of = rho_of.astype(np.float32)
        high, low = map(float, (rho_of[-1], rho_of[0]) if family.one_more else (rho[0], rho[-1]))
        if family.bounds:
            high, low = self.config.positive("sigma_max", high), self.config.positive("sigma_min", low)
        if not low <= high:
            raise UserError(f"{self.config.path}: sigma_min is at most sigma_max, not {low:g} and {high:g}")
        rho = SPREADS[spread](high, low, len(rho))
        t = np.interp(np.log(rho), np.log(rho_of), np.arange(self.T))
        if family.one_more:                                 # rounded for Karras, else truncated: 998.99998 is 998
            t = np.round(t) if spread == "karras" else np.floor(t)
        return rho, t

    def _euler_at_end(self, steps: int) -> bool:
        """Whether DPM-Solver++'s last step to the noise of time 0 is of first order."""
        c = self.config
        return c.flag("euler_at_final", False) or c.flag("lower_order_final", True) and steps < FEW

    def _times(self, family: Family, spacing: str, steps: int, share: float) -> np.ndarray:
        """The training times of a run, falling; whole numbers unless the family takes fractions."""
        T, n = self.T, steps + family.one_more
        if family.distilled:
            return self._distilled(steps, share)
        if spacing == "trailing":
            return np.round(np.arange(T, 0, -T / steps))[:steps] - 1
        if spacing == "linspace":
            t = np.linspace(0, T - 1, n)
            t = t if family.fractions else np.round(t)
        else:
            t = np.arange(n) * (T // n) + self.config.whole("steps_offset", 0)
        return t[::-1][:steps].astype(float)

    def _distilled(self, steps: int, share: float) -> np.ndarray:
        """Of the first K share times k T // K - 1 of a model's distillation, those that are spread evenly."""
        K = self.config.whole("original_inference_steps", min(50, self.T))
        if K > self.T:
            raise UserError(f"{self.config.path}: original_inference_steps is at most num_train_timesteps, which is "
                            f"{self.T}, not {K}")
        count = int(K * share)
        if steps > count:
            left = "" if share == 1 else f", of which strength {share:g} leaves {count}"
            more = "" if share == 1 else ", or a larger strength"
            raise UserError(f"{self.config.path}: lcm visits some of the {K} times of this model's distillation "
                            f"(original_inference_steps){left}; {steps} steps do not fit: take fewer{more}")
        t = np.arange(count, 0, -1) * (self.T // K) - 1                             # (count,)
        return t[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)].astype(float)

    def _last(self, family: Family, rho_of: np.ndarray) -> float:
        """rho at the end of the run: 0, or that of time 0."""
        to_clean = self.config.flag("set_alpha_to_one", True) if family.stops else \
            self.config.text("final_sigmas_type", "zero") == "zero"
        return 0.0 if to_clean else float(rho_of[0])

    def _strides(self, t: np.ndarray, rho_of: np.ndarray, steps: int, last: float) -> Iterator[tuple[float, float]]:
        """(rho at t, rho at t - T // steps) of each step."""
        for now in t:
            after = now - self.T // steps
            if after >= 0 or rho_of[now] > last:            # else the step would go nowhere
                yield rho_of[now], rho_of[after] if after >= 0 else last

    def _table(self) -> np.ndarray:
        c, T = self.config, self.T
        low, high = c.number("beta_start", 0.0001), c.number("beta_end", 0.02)
        if T < 2:
            raise UserError(f"{c.path}: num_train_timesteps takes a whole number of at least 2, not {T}")
        if not 0 < low <= high < 1:
            raise UserError(f"{c.path}: beta_start and beta_end take numbers above 0 and below 1, of which beta_end is "
                            f"not the smaller one, not {low:g} and {high:g}")
        kind = c.text("beta_schedule", "linear")
        try:
            if c.values.get("trained_betas") is not None:
                betas = np.asarray(c.values["trained_betas"], np.float64)
                if betas.shape != (T,):
                    raise UserError(f"{c.path}: trained_betas takes num_train_timesteps numbers, which are {T}, not "
                                    f"{betas.shape[0] if betas.ndim == 1 else 'other values'}")
            elif kind == "linear":
                betas = float32_line(low, high, T)
            elif kind == "scaled_linear":
                betas = float32_line(math.sqrt(low), math.sqrt(high), T) ** 2
            else:
                alpha_bar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
                betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
            # 1 - beta in float32, too; their product in float64
            schedule = from_betas(1 - (1 - betas).astype(np.float64), allow_signal=True)
            if c.flag("rescale_betas_zero_snr", False):
                schedule = zero_terminal_snr(schedule)
        except UserError:
            raise
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{c.path}: its betas make no schedule ({error})") from None
        return schedule.alpha_bar


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


def float32_line(low: float, high: float, count: int) -> np.ndarray:
    """np.linspace as PyTorch computes it in float32, from both ends.

    These roundings move a time that Karras's spacing places between two training times by up to 4e-4, which a network
    sees.  So other programs' pictures come out the same only with the same roundings.
    """
    low, high = np.float32(low), np.float32(high)
    step, i = (high - low) / np.float32(count - 1), np.arange(count, dtype=np.float32)
    return np.where(i < count // 2, low + step * i, high - step * (count - 1 - i))


def karras_spacing(high: float, low: float, steps: int, power: float = 7.0) -> np.ndarray:
    """(steps,) falling from high to low, with equal strides of rho^(1/power) (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    return (high ** (1 / power) + ramp * (low ** (1 / power) - high ** (1 / power))) ** power


def exponential_spacing(high: float, low: float, steps: int) -> np.ndarray:
    """(steps,) falling from high to low, with equal strides of log rho."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def beta_spacing(high: float, low: float, steps: int) -> np.ndarray:
    """(steps,) falling from high to low: quantiles of the beta distribution with alpha = beta = 0.6."""
    from scipy.special import betaincinv
    return low + (high - low) * betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps))


SPREADS: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "karras": karras_spacing, "exponential": exponential_spacing, "beta": beta_spacing}


def _plan(pairs: list[tuple[float, float]], t_of: dict[float, float], first: float | None, sampler: Sampler,
          kind: type[Plan]) -> Plan:
    """The plan whose steps go from rho to rho."""
    rhos = sorted({rho for pair in pairs for rho in pair if rho > 0})               # rising, as rows
    rows = {rho: row for row, rho in enumerate(rhos)} | {0.0: -1}
    # alpha_bar = 1 / (1 + rho^2)
    alpha_bar = 1 / (1 + np.square(rhos))
    alpha_bar[alpha_bar < 2 * TINY] = 0
    # sigma of the first row; Python's float, which leaves noise in float32
    first_std = 1.0 if first is None else float(first / math.hypot(1, first))
    return kind(Schedule(alpha_bar, "a run's own"), np.array([t_of.get(rho, 0.0) for rho in rhos]),
                tuple((rows[a], rows[b]) for a, b in pairs), first_std, sampler)


def check_choice(name: str) -> None:
    """UserError, which says what is meant most likely, where there is no sampler of this name."""
    if name not in CHOICES:
        spelled = str(name)[:40].lower().replace("_", "-").replace(" ", "-")
        near = NEAREST.get(spelled) or next(iter(get_close_matches(spelled, CHOICES, 1)), None)
        raise UserError(f"sampler must be one of {', '.join(CHOICES)}, not {str(name)[:40]!r}"
                        + (f": the nearest is {near}" if near else ""))


def check(config: Config) -> None:
    """UserError where the configuration asks for what minidiff does not have."""
    T = config.whole("num_train_timesteps", 1000)
    if config.whole("steps_offset", 0) >= T:
        raise UserError(f"{config.path}: steps_offset takes a whole number below num_train_timesteps, which is {T}, "
                        f"not {config.whole('steps_offset')}")
    predicts = config.text("prediction_type", "epsilon")
    if predicts not in PREDICTS:
        raise UserError(f"{config.path}: prediction_type {predicts[:40]!r} is unknown; it is one of "
                        f"{', '.join(PREDICTS)}.")
    spacing = config.text("timestep_spacing", "leading")
    if spacing not in SPACINGS:
        raise UserError(f"{config.path}: timestep_spacing {spacing[:40]!r} is unknown; it is leading, linspace or "
                        "trailing.")
    last = config.text("final_sigmas_type", "zero")
    if last not in ("zero", "sigma_min"):
        raise UserError(f"{config.path}: final_sigmas_type {last[:40]!r} is unknown; it is zero or sigma_min.")
    kind = config.text("beta_schedule", "linear")
    if kind not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        raise UserError(f"{config.path}: beta_schedule {kind[:40]!r} is unknown.")
    name = config.text("_class_name")
    if name != SOLVER or config.text("algorithm_type", SDE) != SDE:
        config.require(algorithm_type="dpmsolver++")
    spreads = [kind for kind in SPREADS if config.flag(f"use_{kind}_sigmas", False)]
    if len(spreads) > 1:
        raise UserError(f"{config.path}: use_{spreads[0]}_sigmas and use_{spreads[1]}_sigmas are both true; a run has "
                        "one of them.")
    for key, (default, classes) in ONLY_OF.items():
        value = config.values.get(key)
        if value is not None and value != default and name not in classes:
            raise UserError(f"{config.path}: {key} is {repr(value)[:60]}, and {name} has no such setting.")
    low, high = config.positive("sigma_min", 1e-30), config.positive("sigma_max", 1e30)
    if low > high:
        raise UserError(f"{config.path}: sigma_min is at most sigma_max, not {low:g} and {high:g}")
    if name == "UniPCMultistepScheduler":
        config.require(final_sigmas_type="zero", lower_order_final=True)
    config.require(use_lu_lambdas=False, use_flow_sigmas=False,
                   thresholding=False, clip_sample=False, solver_order=2,
                   solver_type={"UniPCMultistepScheduler": "bh2"}.get(name, "midpoint"),
                   skip_prk_steps=True, predict_x0=True, interpolation_type="linear", timestep_type="discrete",
                   use_dynamic_shifting=False, lambda_min_clipped=-math.inf, disable_corrector=[], solver_p=None,
                   variance_type=None)
