"""A law of schedulers: a function that makes one row. And how the worst of several cases is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from minidiff.verify.rows import Law, Row, compare
from minidiff.verify.scheduler.protocol import Scheduler, rounding

BOTH = (0.6, -0.8)                                          # x_0 and eps of a sample that has both
Named = tuple[str, str]                                     # a law's name, and what its row compares


def law(name: str, compared: str) -> Callable[[Callable[[Named, Scheduler, Sequence[int]], Row]], Law]:
    """Makes a Law of a function that returns one row, which has this name and compares this.

    name: number and name, the same as in `minidiff verify` if the law is the same. The function takes
    ((name, compared), scheduler, steps) and returns the row of the worst among runs of these lengths.
    """
    def decorate(row: Callable[[Named, Scheduler, Sequence[int]], Row]) -> Law:
        return Law(name, lambda scheduler, steps: [row((name, compared), scheduler, steps)], compared)
    return decorate


def excess(row: Row) -> float:
    """The error in units of the tolerance; infinite if it is not finite."""
    return row.error / row.tolerance if math.isfinite(row.error) else math.inf


def worst(rows: Sequence[Row]) -> Row:
    """The row whose error exceeds its tolerance by the largest factor."""
    return max(rows, key=excess)


def compare_noise(named: Named, scheduler: Scheduler, t, alpha, sigma, noised, when: str) -> Row:
    """noised: (3, n), of (x_0, eps) = (1, 0), (0, 1), which are alpha and sigma, and BOTH, their sum."""
    of_x0, of_eps, _ = noised
    expected = np.stack([alpha, sigma, of_x0 * BOTH[0] + of_eps * BOTH[1]])                   # (3, n)
    cases = ("x_0 = 1, eps = 0", "x_0 = 0, eps = 1", "x_0 = {}, eps = {}".format(*BOTH))
    return compare(*named, expected, noised, 100 * rounding(scheduler), "x_t = alpha_t x_0 + sigma_t eps",
                   lambda i: f"t = {t[i % len(t)]:g}, {cases[i // len(t)]}, {when}")
