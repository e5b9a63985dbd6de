"""A checkpoint's scheduler_config.json: its noise schedule, what its network predicts, and how it is to be sampled.

    betas            linear, or linear in sqrt(beta) (Stable Diffusion), or the cosine schedule
    spacing          which of the T training times a run of N steps visits: leading, linspace or trailing
    Karras           times spaced so that sigma^(1/7) is equally spaced (Karras et al. 2022, eq. 5)
    zero SNR         the schedule rescaled to end in pure noise (Lin et al. 2024)
    SDE              DPM-Solver++(2M) with fresh noise in each step (algorithm_type sde-dpmsolver++)
    LCM              some of the original_inference_steps times that a latent consistency model was distilled on

A run of N steps becomes a `Plan`: a schedule of its own that has one row for each time of the run.  Our samplers run on
its rows, and see nothing of the spacing.  The times may be fractions: then the network is asked at a fraction, with the
noise level in between.

The configuration decides, also where it is off the mathematics: `leading` starts at 981 of 1000, where x_T has less
noise than the run starts from; the last step of Stable Diffusion 1 ends at time 0, and not at the clean image; and in
DDIM's trailing spacing a step ends at t - T // N, which is not quite the next time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from minidiff.checks import whole
from minidiff.diffusion import multistep
from minidiff.diffusion.consistency import BoundaryCondition
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.samplers import SAMPLERS, Sampler, State
from minidiff.diffusion.schedules import Schedule, from_betas, zero_terminal_snr
from minidiff.errors import UserError
from minidiff.pretrained.config import Config

SPACINGS = ("leading", "linspace", "trailing")
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@dataclass(frozen=True)
class Family:
    """How one class of schedulers lays out its times; sampler: its method."""

    sampler: Sampler
    spacing: str                    # if the configuration names none
    one_more: bool = False          # lays out N + 1 times and leaves out the last, except where trailing
    fractions: bool = False         # times of `linspace` are not rounded
    scaled: bool = False            # x_T is sigma times the noise, for every spacing but leading
    stops: bool = False             # may end at alpha_bar_0 and not at the clean image (set_alpha_to_one)
    own_stride: bool = False        # a step ends at t - T // N, whatever the next time
    sde: Sampler | None = None      # its method where algorithm_type is sde-dpmsolver++
    distilled: bool = False         # visits times of a consistency model's distillation, and scales its answers


# other programs' LMS and PLMS extrapolate in the last step, too
LMS, PLMS = (replace(entry, function=partial(entry.function, ends_at_x0_hat=False))
             for entry in (SAMPLERS["lms"], SAMPLERS["plms"]))
FAMILIES = {
    "DDIMScheduler": Family(SAMPLERS["ddim"], "leading", stops=True, own_stride=True),
    "PNDMScheduler": Family(PLMS, "leading", stops=True),
    "EulerDiscreteScheduler": Family(SAMPLERS["ddim"], "linspace", fractions=True, scaled=True),
    "EulerAncestralDiscreteScheduler": Family(SAMPLERS["ddpm"], "linspace", fractions=True, scaled=True),
    "HeunDiscreteScheduler": Family(Sampler(multistep.edm_heun, order=2, calls=2), "linspace", fractions=True,
                                    scaled=True),
    "LMSDiscreteScheduler": Family(LMS, "linspace", fractions=True, scaled=True),
    "DPMSolverMultistepScheduler": Family(SAMPLERS["dpm++2m"], "linspace", one_more=True, sde=SAMPLERS["dpm++2m-sde"]),
    "UniPCMultistepScheduler": Family(SAMPLERS["unipc"], "linspace", one_more=True),
    "LCMScheduler": Family(SAMPLERS["lcm"], "leading", distilled=True),
}


class Choice(NamedTuple):
    """The class whose layout of times a run has, whether they are Karras's, and whether its method is the SDE's."""

    name: str
    karras: bool = False
    sde: bool = False


# the names by which people choose a sampler
CHOICES = {"ddim": Choice("DDIMScheduler"), "plms": Choice("PNDMScheduler"),
           "euler": Choice("EulerDiscreteScheduler"), "euler-karras": Choice("EulerDiscreteScheduler", karras=True),
           "euler-a": Choice("EulerAncestralDiscreteScheduler"),
           "heun": Choice("HeunDiscreteScheduler"), "lms": Choice("LMSDiscreteScheduler"),
           "dpm++2m": Choice("DPMSolverMultistepScheduler"),
           "dpm++2m-karras": Choice("DPMSolverMultistepScheduler", karras=True),
           "dpm++2m-sde": Choice("DPMSolverMultistepScheduler", sde=True),
           "dpm++2m-sde-karras": Choice("DPMSolverMultistepScheduler", karras=True, sde=True),
           "unipc": Choice("UniPCMultistepScheduler"), "lcm": Choice("LCMScheduler")}
# names of other programs, and of samplers that are not here -> the nearest of CHOICES
NEAREST = {"pndm": "plms", "ddpm": "euler-a", "euler-ancestral": "euler-a", "dpmpp-2m": "dpm++2m",
           "dpm++-2m": "dpm++2m", "dpm-solver-pp-2m": "dpm++2m", "dpm++-2m-karras": "dpm++2m-karras",
           "dpmpp-2m-karras": "dpm++2m-karras", "dpmpp-2m-sde": "dpm++2m-sde", "dpm++-2m-sde": "dpm++2m-sde"}
SDE = "sde-dpmsolver++"


@dataclass(frozen=True)
class Plan:
    """One run: row k of `schedule` is its k-th smallest noise, for which the network is asked at time t[k].

    steps       (from row, to row) of each step; -1 is the clean image
    first_std   of x_T: the run starts at first_std times standard normal noise
    boundary    the scaling of a consistency model's times (`BoundaryCondition`); None for other models
    """

    schedule: Schedule
    t: np.ndarray                           # (rows,) training times, maybe fractions
    steps: tuple[tuple[int, int], ...]
    first_std: float
    sampler: Sampler
    boundary: float | None = None

    def run(self, denoiser: Denoiser, x_T, cond=None, streams=None) -> Iterator[State]:
        """The states of the sampler; denoiser.schedule is this plan's."""
        if self.boundary is not None:
            denoiser = BoundaryCondition(denoiser, self.t, self.boundary)
        if all(s == t for (_, s), (t, _) in pairwise(self.steps)):
            rows = [t for t, _ in self.steps] + [s for _, s in self.steps[-1:] if s >= 0]
            # a run that ends above the clean image stops before the sampler's own last step
            yield from islice(self.sampler(denoiser, x_T, rows, cond, streams=streams), len(self.steps))
            return
        for step, (t, s) in enumerate(self.steps, start=1):                         # each step a run of its own
            rows = [t] if s < 0 else [t, s]
            state = next(self.sampler(denoiser, x_T, rows, cond, streams=streams))
            x_T = state.x_t
            yield State(step, s, x_T, state.x0_hat)


class SchedulerConfig:
    """What a scheduler_config.json says, checked."""

    def __init__(self, config: Config):
        name = config.text("_class_name")
        if name not in FAMILIES:
            raise UserError(f"{config.path}: the scheduler {name[:60]!r} is unknown; known are {', '.join(FAMILIES)}.")
        given = {key: value for key, value in config.values.items() if value is not None}
        self.config = config = Config(DEFAULTS.get(name, {}) | given, config.path)
        check(config)
        self.name, self.predicts = name, PREDICTS[config.text("prediction_type", "epsilon")]
        self.T = config.whole("num_train_timesteps", 1000)
        self.alpha_bar = self._table()                                              # (T,)

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

    def plan(self, steps: int, choice: str | None = None) -> Plan:
        """The run of `steps` steps by the configuration's own sampler, or by one of CHOICES."""
        if choice is not None:
            check_choice(choice)
        name, karras, sde = CHOICES[choice] if choice else Choice(
            self.name, self.config.flag("use_karras_sigmas", False), self.config.text("algorithm_type", "") == SDE)
        family = FAMILIES[name]
        steps = whole("steps", steps, 1, self.T - family.one_more)
        spacing = self.config.text("timestep_spacing", family.spacing)
        t = self._times(family, spacing, steps)                                     # (steps,) falling
        rho_of = np.sqrt((1 - self.alpha_bar) / np.maximum(self.alpha_bar, TINY))   # (T,) sigma / alpha
        if t[0] >= self.T:
            raise UserError(f"{self.config.path}: with its steps_offset, a run of {steps} steps would start at time "
                            f"{t[0]:.0f}, and the last time is {self.T - 1}: take fewer steps")
        rho = np.interp(t, np.arange(self.T), rho_of)
        if karras:
            rho = karras_spacing(*((rho_of[-1], rho_of[0]) if family.one_more else (rho[0], rho[-1])), steps)
            t = np.interp(np.log(rho), np.log(rho_of), np.arange(self.T))
            t = np.round(t) if family.one_more else t
        first = rho[0] if family.scaled and spacing != "leading" else None
        # a step from time 0 to the noise of time 0 would go nowhere
        pairs = [(a, b) for a, b in pairwise([*rho, self._last(family)]) if a > b]
        if family.own_stride:
            pairs = list(self._strides(t.astype(int), rho_of, steps, self._last(family)))
        if not pairs:
            raise UserError(f"{self.config.path}: a run of {steps} steps would start at time {t[0]:.0f}, where it "
                            "ends: take more steps")
        plan = _plan(pairs, dict(zip(rho, t, strict=True)), first, family.sde if sde else family.sampler)
        return replace(plan, boundary=self.config.number("timestep_scaling", 10.0)) if family.distilled else plan

    def _times(self, family: Family, spacing: str, steps: int) -> np.ndarray:
        """The training times of a run, falling; whole numbers unless the family takes fractions."""
        T, n = self.T, steps + family.one_more
        if family.distilled:
            return self._distilled(steps)
        if spacing == "trailing":
            return np.round(np.arange(T, 0, -T / steps))[:steps] - 1
        if spacing == "linspace":
            t = np.linspace(0, T - 1, n)
            t = t if family.fractions else np.round(t)
        else:
            t = np.arange(n) * (T // n) + self.config.whole("steps_offset", 0)
        return t[::-1][:steps].astype(float)

    def _distilled(self, steps: int) -> np.ndarray:
        """Those of the K times k T // K - 1 of a consistency model's distillation that are spread evenly."""
        K = self.config.whole("original_inference_steps", min(50, self.T))
        if K > self.T:
            raise UserError(f"{self.config.path}: original_inference_steps is at most num_train_timesteps, which is "
                            f"{self.T}, not {K}")
        if steps > K:
            raise UserError(f"{self.config.path}: lcm visits some of the {K} times of a model's distillation "
                            f"(original_inference_steps), and cannot take {steps}: take fewer steps")
        t = np.arange(K, 0, -1) * (self.T // K) - 1                                 # (K,)
        return t[np.floor(np.linspace(0, K, steps, endpoint=False)).astype(int)].astype(float)

    def _last(self, family: Family) -> float:
        """rho at the end of the run: 0, or that of time 0."""
        to_clean = self.config.flag("set_alpha_to_one", True) if family.stops else \
            self.config.text("final_sigmas_type", "zero") == "zero"
        return 0.0 if to_clean else math.sqrt((1 - self.alpha_bar[0]) / self.alpha_bar[0])

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


# what a class has where its configuration says nothing, if this is not what most classes have
OF_LATENTS = {"beta_start": 0.00085, "beta_end": 0.012}
DEFAULTS = {"DDIMScheduler": {"clip_sample": True}, "HeunDiscreteScheduler": OF_LATENTS,
            "PNDMScheduler": {"set_alpha_to_one": False, "skip_prk_steps": False},
            "LCMScheduler": OF_LATENTS | {"beta_schedule": "scaled_linear"}}
TINY = 2.0**-48                                             # keeps rho finite at SNR 0: its root is below float32's eps


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


def _plan(pairs: list[tuple[float, float]], t_of: dict[float, float], first: float | None, sampler: Sampler) -> Plan:
    """The plan whose steps go from rho to rho."""
    rhos = sorted({rho for pair in pairs for rho in pair if rho > 0})               # rising, as rows
    rows = {rho: row for row, rho in enumerate(rhos)} | {0.0: -1}
    # alpha_bar = 1 / (1 + rho^2)
    alpha_bar = 1 / (1 + np.square(rhos))
    alpha_bar[alpha_bar < 2 * TINY] = 0
    # sigma of the first row; Python's float, which leaves noise in float32
    first_std = 1.0 if first is None else float(first / math.hypot(1, first))
    return Plan(Schedule(alpha_bar, "a run's own"), np.array([t_of.get(rho, 0.0) for rho in rhos]),
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
    if config.text("_class_name") != "DPMSolverMultistepScheduler" or config.text("algorithm_type", SDE) != SDE:
        config.require(algorithm_type="dpmsolver++")
    config.require(use_exponential_sigmas=False, use_beta_sigmas=False, use_lu_lambdas=False, use_flow_sigmas=False,
                   thresholding=False, clip_sample=False, solver_order=2,
                   solver_type={"UniPCMultistepScheduler": "bh2"}.get(config.text("_class_name"), "midpoint"),
                   skip_prk_steps=True, predict_x0=True, interpolation_type="linear", timestep_type="discrete",
                   euler_at_final=False, use_dynamic_shifting=False, sigma_min=None, sigma_max=None,
                   lambda_min_clipped=-math.inf, disable_corrector=[])
