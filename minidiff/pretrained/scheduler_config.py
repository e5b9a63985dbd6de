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
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from minidiff.checks import one_of, whole
from minidiff.diffusion.samplers import Sampler
from minidiff.diffusion.schedules import Schedule, from_betas, zero_terminal_snr
from minidiff.errors import UserError
from minidiff.pretrained.config import Config
from minidiff.pretrained.plan import Plan
from minidiff.pretrained.scheduler_classes import (
    CHOICES,
    FAMILIES,
    NOT_HERE,
    SDE,
    TINY,
    Choice,
    Family,
    check_choice,
    check_method,
    with_defaults,
)
from minidiff.pretrained.spreads import SPREADS

SPACINGS = ("leading", "linspace", "trailing")
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
FEW = 15                                                    # below, other programs' DPM-Solver++ takes more care


class SchedulerConfig:
    """What a scheduler_config.json says, checked."""

    def __init__(self, config: Config):
        self.config = config = with_defaults(config)
        check(config)
        self.name, self.predicts = config.text("_class_name"), PREDICTS[config.text("prediction_type", "epsilon")]
        self.T = config.whole("num_train_timesteps", 1000)
        self.alpha_bar = self._table()                                              # (T,)
        self.spread = next(iter(spreads_of(config)), None)

    def changed(self, spacing: str | None = None, predicts: str | None = None) -> SchedulerConfig:
        """The same with another spacing of times, or for a network that predicts something else."""
        kinds = {ours: theirs for theirs, ours in PREDICTS.items()}
        for name, value, known in (("spacing", spacing, SPACINGS), ("predicts", predicts, kinds)):
            if value is not None:
                one_of(name, value, known, UserError)
        given = {"timestep_spacing": spacing, "prediction_type": kinds.get(predicts)}
        changes = {key: value for key, value in given.items() if value is not None}
        return SchedulerConfig(Config(self.config.values | changes, self.config.path)) if changes else self

    def distilled(self, choice: str | None = None) -> bool:
        """Whether its own sampler, or this one of CHOICES, visits times of a consistency model's distillation."""
        return FAMILIES[self._chosen(choice).name].distilled

    def refusal(self) -> str:
        """Why its own sampler cannot run here; '' where it can."""
        try:
            self._chosen(None)
        except UserError as error:
            return str(error)
        return ""

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
        """One of CHOICES, or its own sampler.

        UserError where its own one, or a setting of it, is not here.  The settings of its own do not count for one that
        is chosen by name.
        """
        if choice is not None:
            check_choice(choice)
            return CHOICES[choice]
        if self.name in NOT_HERE:
            raise UserError(f"{self.config.path}: its sampler {self.name} is not here: choose another, such as "
                            f"--sampler {NOT_HERE[self.name]}")
        check_method(self.config)
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


def float32_line(low: float, high: float, count: int) -> np.ndarray:
    """np.linspace as PyTorch computes it in float32, from both ends.

    These roundings move a time that Karras's spacing places between two training times by up to 4e-4, which a network
    sees.  So other programs' pictures come out the same only with the same roundings.
    """
    low, high = np.float32(low), np.float32(high)
    step, i = (high - low) / np.float32(count - 1), np.arange(count, dtype=np.float32)
    return np.where(i < count // 2, low + step * i, high - step * (count - 1 - i))


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


def spreads_of(config: Config) -> list[str]:
    """Those of SPREADS that a configuration asks for."""
    return [kind for kind in SPREADS if config.flag(f"use_{kind}_sigmas", False)]


def check(config: Config) -> None:
    """UserError where minidiff has no sampler that does what the configuration says."""
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
    spreads = spreads_of(config)
    if len(spreads) > 1:
        raise UserError(f"{config.path}: use_{spreads[0]}_sigmas and use_{spreads[1]}_sigmas are both true; a run has "
                        "one of them.")
    low, high = config.positive("sigma_min", 1e-30), config.positive("sigma_max", 1e30)
    if low > high:
        raise UserError(f"{config.path}: sigma_min is at most sigma_max, not {low:g} and {high:g}")
    # what the network reads as the time does not depend on the sampler
    config.require(use_flow_sigmas=False, thresholding=False, timestep_type="discrete")
