"""A law: its name, what is computed, and what makes its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minidiff.verify.rows import Row, compare, skipped
from minidiff.verify.scheduler.protocol import Scheduler, rounding

BOTH = (0.6, -0.8)                                          # x_0 and eps of a sample that has of both
Named = tuple[str, str]                                     # a law's name, and what is computed


@dataclass(frozen=True)
class Law:
    """name: number and name, those of `minidiff verify` where it has the same law. computed: what its row compares.

    row: (name, computed), scheduler and lengths of runs to the row of the worst of them.
    """

    name: str
    computed: str
    row: Callable[[Named, Scheduler, Sequence[int]], Row]

    def rows(self, scheduler: Scheduler, steps: Sequence[int], refused: str) -> Iterator[Row]:
        """The one row. refused: why the scheduler does not run, "" if it does."""
        named = self.name, self.computed
        yield skipped(*named, f"it refuses to run: {refused}") if refused else self.row(named, scheduler, steps)


def worst(rows: Sequence[Row]) -> Row:
    """The one furthest beyond what it is allowed; what is not finite is worse than any number."""
    return max(rows, key=lambda r: r.error / r.tolerance if math.isfinite(r.error) else math.inf)


def compare_noise(named: Named, scheduler: Scheduler, t, alpha, sigma, noised, when: str) -> Row:
    """noised: (3, n), of (x_0, eps) = (1, 0), (0, 1), which are alpha and sigma, and BOTH, their sum."""
    of_x0, of_eps, _ = noised
    expected = np.stack([alpha, sigma, of_x0 * BOTH[0] + of_eps * BOTH[1]])                   # (3, n)
    cases = ("x_0 = 1, eps = 0", "x_0 = 0, eps = 1", "x_0 = {}, eps = {}".format(*BOTH))
    return compare(*named, expected, noised, 100 * rounding(scheduler), "x_t = alpha_t x_0 + sigma_t eps",
                   lambda i: f"t = {t[i % len(t)]:g}, {cases[i // len(t)]}, {when}")
