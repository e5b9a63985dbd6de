"""The laws of schedulers: a correct one keeps them all, and each planted bug breaks its law."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
from support.toy_schedulers import (
    Ancestral,
    BatchMean,
    BetaOfTheFullChain,
    ClaimsOrderTwo,
    ClipsTooFarOut,
    DoesNotExtrapolate,
    EndsAtTheFirstTime,
    EpsAtSnrZero,
    ExtrapolatesTooFar,
    FixedStride,
    GetsAnotherTime,
    NeverRuns,
    NoiseAtTheLastStep,
    NoisePowerForgotten,
    NoRoot,
    RInverted,
    SignalInTheEnd,
    SignalOfTheOtherSign,
    SignReversed,
    SnrRises,
    StartsAt980,
    StepsBeyondTheTable,
    Stretches,
    TableReversed,
    ThreeTimesTooLarge,
    ThreeTimesTooLargeAsShown,
    Toy,
    TwoM,
    Velocity,
    broken,
)

from minidiff import verify
from minidiff.diffusion.schedules import cosine
from minidiff.verify.scheduler import report
from minidiff.verify.scheduler.laws import LAWS
from minidiff.verify.scheduler.runs import spreads


@pytest.mark.parametrize("right", [Toy, Ancestral, TwoM, Velocity])
def test_a_correct_scheduler_keeps_every_law(right):
    rows = report(right())
    assert not [row for row in rows if row.verdict == "BROKEN"]
    # a law that does not apply gives a reason, and does not count as kept
    about = {row.law: row.reason for row in rows if row.verdict == "skipped"}
    others = {Ancestral: {"24 one step", "25 order", "25 second order"}, TwoM: {"24 one step"}}
    assert about.keys() == {"5 zero terminal SNR", "32 thresholding"} | others.get(right, {"25 second order"})
    assert all(about.values())


BUGS = {
    FixedStride: {"23 marginals", "24 one step", "25 order"},
    StartsAt980: {"26 starts at T-1"},
    StepsBeyondTheTable: {"26 N falling times"},
    EndsAtTheFirstTime: {"26 no noise is left", "24 a point is reached"},
    NoiseAtTheLastStep: {"26 no noise is left"},
    NoRoot: {"1 q(x_t | x_0)"},
    SignalOfTheOtherSign: {"1 q(x_t | x_0)"},
    ThreeTimesTooLarge: {"1 q(x_t | x_0)"},
    ThreeTimesTooLargeAsShown: {"1 q(x_t | x_0)"},
    TableReversed: {"1 q(x_t | x_0)"},
    NoisePowerForgotten: {"23 marginals"},
    SignReversed: {"24 one step", "25 order"},             # the marginals of -eps are those of eps
    BetaOfTheFullChain: {"23 marginals"},
    SignalInTheEnd: {"4 ends in noise"},
    SnrRises: {"3 SNR falls"},
    EpsAtSnrZero: {"5 zero terminal SNR"},
    NeverRuns: {"5 zero terminal SNR", "23 marginals", "24 a point is reached"},
    RInverted: {"25 second order"},
    DoesNotExtrapolate: {"25 second order", "25 order"},
    ExtrapolatesTooFar: {"25 second order", "25 order"},
    ClaimsOrderTwo: {"25 order"},
    GetsAnotherTime: {"26 network and sample agree on the time"},
    BatchMean: {"28 batches"},
    Stretches: {"32 thresholding"},
    ClipsTooFarOut: {"32 thresholding"},
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_breaks_its_law(bug):
    assert BUGS[bug] <= broken(bug(), steps=[7])


def test_r_upside_down_breaks_no_other_law():
    """Its errors cancel along a list."""
    assert broken(RInverted()) == {"25 second order"}


def test_a_wrong_scale_of_the_samples_is_found_in_a_run():
    """Before a run the scale of the samples is unknown; for a scheduler without scale_input both rows are broken."""
    in_a_run = "the network's input from add_noise in a run"
    for bug, found in {ThreeTimesTooLargeAsShown: [in_a_run],
                       ThreeTimesTooLarge: ["add_noise at all times of training", in_a_run]}.items():
        assert [row.computed for row in report(bug(), steps=[7]) if row.verdict == "BROKEN"] == found


def test_the_tables_of_laws_use_the_same_names():
    shared = {"3 SNR falls", "4 ends in noise", "5 zero terminal SNR", "23 marginals", "24 a point is reached",
              "24 one step", "25 order", "25 second order", "26 no noise is left", "26 starts at T-1",
              "26 N falling times", "28 batches"}
    assert shared == {law.name for law in LAWS} & {row.law for row in verify.report(cosine(10))}


def test_a_law_that_cannot_be_computed_is_broken():
    class Fails(Toy):
        def step(self, *args):
            raise IndexError("index 5 is out of bounds")

    rows = report(Fails(), steps=[7])
    failed = [row for row in rows if "IndexError: index 5" in row.where]
    assert len(failed) == 8 and all(row.verdict == "BROKEN" for row in failed)


def test_nan_keeps_no_law():
    class Nans(Toy):
        def x0_hat(self, *args):
            return super().x0_hat(*args) * np.nan

    kept = {row.law for row in report(Nans(), steps=[7]) if row.verdict == "kept"}
    assert kept == {"1 q(x_t | x_0)", "3 SNR falls", "4 ends in noise", "26 starts at T-1", "26 N falling times",
                    "26 network and sample agree on the time"}


def test_the_noise_may_have_the_variance_for_normal_data():
    """DDPM section 3.2: beta keeps the marginals of N(0, I), and beta~ those of a point. The law must accept
    both."""
    class Beta(Toy):
        def step(self, prediction, t, x_t, z):
            s = self.previous(t)
            a, b = self.abar(t), self.abar(s)
            beta, x_0 = 1 - a / b, self.x0_hat(prediction, a, x_t)
            mean = (b**0.5 * beta * x_0 + (a / b) ** 0.5 * (1 - b) * x_t) / (1 - a)
            return mean + math.sqrt(beta) * z * (s >= 0)

    assert "23 marginals" not in broken(Beta(), steps=[7])
    spread = [row[3] for row in spreads(Beta(), 7, s2=1.0)]
    np.testing.assert_allclose(spread[:-1], 1, rtol=1e-12)


def test_a_refusal_counts_if_the_rest_of_the_list_runs():
    class Refuses(EpsAtSnrZero):
        def step(self, prediction, t, x_t, z):
            if self.abar(t) == 0:
                raise ValueError("no x_0 at SNR 0")
            return super().step(prediction, t, x_t, z)

    rows = report(Refuses(), steps=[7])
    assert not [row for row in rows if row.verdict == "BROKEN"]
    assert [row.where for row in rows if row.law == "5 zero terminal SNR"] == ["no x_0 at SNR 0"]
    assert sum("it refuses to run: no x_0 at SNR 0" == row.reason for row in rows) == 9


def test_thresholding_applies_only_to_schedulers_that_clip():
    """A run that ends at alpha_bar_0 multiplies x_0 by alpha_0 < 1, which breaks laws 24 and 26, but clips nothing."""
    class Clips(Toy):
        def x0_hat(self, eps, abar, x_t):
            return np.clip(super().x0_hat(eps, abar, x_t), -1, 1)

    class ClipsBelow(Toy):
        def x0_hat(self, eps, abar, x_t):
            return np.clip(super().x0_hat(eps, abar, x_t), -0.5, 0.5)

    def row(scheduler):
        (found,) = [row for row in report(scheduler, steps=[7]) if row.law == "32 thresholding"]
        return found.verdict

    both = type("Both", (Clips, EndsAtTheFirstTime), {})
    assert {cls: row(cls()) for cls in (Toy, Clips, ClipsBelow, EndsAtTheFirstTime, both)} == {
        Toy: "skipped", Clips: "kept", ClipsBelow: "BROKEN", EndsAtTheFirstTime: "skipped", both: "kept"}


def test_a_wrong_last_step_is_found_for_every_prediction():
    """The large rounding of eps at the first time does not reach the end, so it must not widen the tolerance there."""
    class Off(Toy):
        rounding = 2.0**-24                                 # 100 / alpha_1 of it are 9e-4

        def step(self, prediction, t, x_t, z):
            return super().step(prediction, t, x_t, z) + 1e-4 * (self.previous(t) < 0)

    class OffOfV(Off):
        predicts = "v"

        def step(self, prediction, t, x_t, z):
            a = self.abar(t)
            return super().step(a**0.5 * prediction + (1 - a) ** 0.5 * x_t, t, x_t, z)

    for scheduler in (Off(), OffOfV()):
        assert "24 a point is reached" in broken(scheduler, steps=[7])


def test_an_order_is_a_bound():
    (row,) = [row for row in report(Toy(), steps=[7]) if row.law == "25 order"]
    assert row.side == ">=" and row.expected == 1 and row.error == max(0.0, 1 - row.measured)


def test_the_laws_need_no_docstrings():
    """`python -OO` removes them."""
    code = "from minidiff.verify import scheduler as s; print(len(s.report(s.load('minidiff:ddim'), [3])))"
    ran = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"})
    assert ran.stdout.split() == [str(len(LAWS))], ran.stderr
