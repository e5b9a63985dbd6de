"""Laws that need no step of a scheduler: of its table, of add_noise, and of its lists of times."""

from __future__ import annotations

import numpy as np

from minidiff.diffusion.schedules import MOST_SIGNAL_AT_THE_END
from minidiff.verify.rows import Row, compare, count, skipped
from minidiff.verify.scheduler.law import BOTH, Named, compare_noise, law, worst
from minidiff.verify.scheduler.protocol import Scheduler, levels, rounding
from minidiff.verify.scheduler.runs import PIXEL, X_0, last_spread, refusal

LONGEST = 200                                               # the lists of 1 to LONGEST times are checked, and of T


# ---- the table and the noise -------------------------------------------------------------------------------

@law("1 q(x_t | x_0)", "add_noise at all times of training")
def training_noise(named: Named, scheduler: Scheduler, steps) -> Row:
    """If the scheduler has `scale_input`, its samples may have any scale; otherwise the scale is 1."""
    abar = np.asarray(scheduler.alpha_bar, np.float64)
    t = np.arange(len(abar))

    def noised(x_0, eps):
        x_0, eps = (np.full((len(t), *PIXEL), a) for a in (x_0, eps))
        return np.asarray(scheduler.add_noise(x_0, eps, t)).reshape(-1)

    of_x0, of_eps, of_both = noised(1.0, 0.0), noised(0.0, 1.0), noised(*BOTH)                # (T,)
    scale = np.hypot(of_x0, of_eps) if hasattr(scheduler, "scale_input") else 1.0
    return compare_noise(named, scheduler, t, np.sqrt(abar), np.sqrt(1 - abar),
                    np.stack([of_x0, of_eps, of_both]) / scale, "before any run")


@law("3 SNR falls", "times at which alpha_bar does not")
def snr_falls(named: Named, scheduler: Scheduler, steps) -> Row:
    abar = np.concatenate([[1.0], scheduler.alpha_bar])
    return count(*named, ~((np.diff(abar) < 0) & (abar[1:] >= 0)),
                 "1 > alpha_bar_0 > alpha_bar_1 > ... >= 0", lambda i: f"t = {i}")


@law("4 ends in noise", "alpha_bar of the last time")
def ends_in_noise(named: Named, scheduler: Scheduler, steps) -> Row:
    return compare(*named, 0.0, float(scheduler.alpha_bar[-1]), MOST_SIGNAL_AT_THE_END,
                   "alpha_bar_{T-1} = 0, where sampling starts from N(0, I)", f"T = {len(scheduler.alpha_bar)}")


@law("5 zero terminal SNR", "runs on eps that should be refused")
def no_eps_without_signal(named: Named, scheduler: Scheduler, steps) -> Row:
    n, abar = steps[-1], scheduler.alpha_bar[-1]
    if not abar == 0:
        return skipped(*named, f"alpha_bar ends at {abar:.2g}, above 0")
    if scheduler.predicts != "eps":
        return skipped(*named, f"it predicts {scheduler.predicts}, which determines x_0 even at SNR 0")
    scheduler.set_steps(n)
    if not (levels(scheduler)[:, 0] == 0).any():
        return skipped(*named, f"alpha_bar ends at 0, but no run of {n} steps calls the network there")
    if message := refusal(scheduler, n):
        return Row(*named, 0.0, 0.0, 0.0, 0.0, where=message)
    return Row(*named, 0.0, 1.0, 1.0, 0.0, "x_t = eps at SNR 0 does not depend on x_0",
               f"N = {n}: it ends at {last_spread(scheduler, n)[2]:.3g} for x_0 = {X_0}")


# ---- the list of times -------------------------------------------------------------------------------------

@law("26 starts at T-1", "the first time of a list")
def first_time(named: Named, scheduler: Scheduler, steps) -> Row:
    return _first(named, scheduler, steps[-1])


@law("26 starts at T-1", "the only time where N = 1")
def only_time(named: Named, scheduler: Scheduler, steps) -> Row:
    return _first(named, scheduler, 1)


def _first(named: Named, scheduler: Scheduler, n: int) -> Row:
    scheduler.set_steps(n)
    return compare(*named, len(scheduler.alpha_bar) - 1, float(scheduler.timesteps[0]), 1e-3,
                   "t_1 = T - 1: the first input is pure noise, and its time must say so", f"N = {n}")


@law("26 N falling times", "lists without them, N = 1 to 200, T")
def lists(named: Named, scheduler: Scheduler, steps) -> Row:
    T, faults = len(scheduler.alpha_bar), {}
    for n in sorted({*range(1, min(T, LONGEST) + 1), T}):
        scheduler.set_steps(n)
        t = np.asarray(scheduler.timesteps, np.float64)
        more = getattr(scheduler, "first_evaluations", 0)
        if more and len(t) > 1 + more and (t[1:1 + more] == t[1 + more]).all():
            t = np.delete(t, slice(1, 1 + more))            # the first step's further calls, at the second time
        t = np.concatenate([t[:1], t[1::getattr(scheduler, "evaluations", 1)]])
        wrong = {f"{len(t)} times": len(t) != n, "a time that does not fall": (np.diff(t) >= 0).any(),
                 f"t = {t.min():g}": t.min() < 0, f"t = {t.max():g}": t.max() > T - 1}
        faults[n] = ", ".join(what for what, is_so in wrong.items() if is_so)
    first = next((f"first at N = {n}: {fault}" for n, fault in faults.items() if fault), "")
    return count(*named, [bool(fault) for fault in faults.values()], "T - 1 >= t_1 > ... > t_N >= 0", first)


@law("26 network and sample agree on the time", "log(sigma / alpha) of a run, at its t")
def level_of_each_time(named: Named, scheduler: Scheduler, steps) -> Row:
    abar, rows = np.asarray(scheduler.alpha_bar, np.float64), []
    table = 0.5 * (np.log1p(-abar) - np.log(abar))          # log(sigma / alpha) at 0 .. T-1, rising
    for n in steps:
        scheduler.set_steps(n)
        t, (alpha, sigma) = np.asarray(scheduler.timesteps, np.float64), levels(scheduler).T
        inside = np.clip(t, 0, len(abar) - 1)
        low, high = table[np.floor(inside).astype(int)], table[np.ceil(inside).astype(int)]
        level = np.log(sigma) - np.log(alpha)
        # a fractional t may have any level between those of its neighbours
        expected = np.clip(level, low, high)
        same = np.isinf(level) & (level == expected)
        rows.append(compare(*named, np.where(same, 0, expected), np.where(same, 0, level),
                            100 * rounding(scheduler), "sigma / alpha of the network's input at t = the table's at t",
                            lambda i, t=t, n=n: f"t = {t[i]:g}, N = {n}"))
    return worst(rows)


LISTS = (first_time, lists)                                 # these depend on the list of times alone
TABLE = (training_noise, snr_falls, ends_in_noise, no_eps_without_signal, first_time, only_time, lists,
         level_of_each_time)
