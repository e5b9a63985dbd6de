"""A law of schedulers is a function that returns one row: the worst of several cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from minidiff.verify.rows import Law, Row, compare
from minidiff.verify.scheduler.protocol import Scheduler, rounding

BOTH = (0.6, -0.8)                                          # x_0 and eps of a sample in which neither is 0
Named = tuple[str, str]                                     # a law's name, and the quantity that its row compares


def law(name: str, compared: str) -> Callable[[Callable[[Named, Scheduler, Sequence[int]], Row]], Law]:
    """A decorator that turns a function into a Law with this name, which compares this quantity.

    name: number and name; a law shared with schedules has the same in both reports. The function takes
    ((name, compared), scheduler, steps) and returns the row of the worst of the runs of these lengths.
    """
    def decorate(row: Callable[[Named, Scheduler, Sequence[int]], Row]) -> Law:
        return Law(name, lambda scheduler, steps: [row((name, compared), scheduler, steps)], compared)
    return decorate


def excess(row: Row) -> float:
    """The ratio of error to tolerance; infinite if the error is not finite."""
    return row.error / row.tolerance if math.isfinite(row.error) else math.inf


def worst(rows: Sequence[Row]) -> Row:
    """The row whose error exceeds its tolerance by the largest factor."""
    return max(rows, key=excess)


def compare_noise(named: Named, scheduler: Scheduler, t, alpha, sigma, noised, when: str) -> Row:
    """Compares noised (3, n), the samples of (x_0, eps) = (1, 0), (0, 1) and BOTH, with alpha x_0 + sigma eps.

    t, alpha, sigma: (n,). when: says in `where` at what point of a run add_noise was called.
    """
    of_x0, of_eps, _ = noised
    expected = np.stack([alpha, sigma, of_x0 * BOTH[0] + of_eps * BOTH[1]])                   # (3, n)
    cases = ("x_0 = 1, eps = 0", "x_0 = 0, eps = 1", "x_0 = {}, eps = {}".format(*BOTH))
    return compare(*named, expected, noised, 100 * rounding(scheduler), "x_t = alpha_t x_0 + sigma_t eps",
                   lambda i: f"t = {t[i % len(t)]:g}, {cases[i // len(t)]}, {when}")
