"""The laws on schedulers whose faults are known: a right one keeps them all, each planted bug breaks its own law."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from minidiff import verify
from minidiff.cli.main import main
from minidiff.diffusion.schedules import cosine
from minidiff.errors import UserError
from minidiff.verify.scheduler import load, report
from minidiff.verify.scheduler.by_name import ours
from minidiff.verify.scheduler.laws import LAWS
from minidiff.verify.scheduler.protocol import NEEDED
from minidiff.verify.scheduler.runs import spreads


class Toy:
    """DDIM (eq. 12), written from the paper alone, in the form of the protocol and no more."""

    predicts = "eps"
    eta = 0.0

    def __init__(self, T=1000):
        self.alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
        self.timesteps = np.arange(T)[::-1]

    def set_steps(self, n):
        T = len(self.alpha_bar)
        self.n, self.timesteps = n, np.array([T * (n - i) // n - 1 for i in range(n)])

    def add_noise(self, x_0, eps, t):
        abar = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        return abar**0.5 * x_0 + (1 - abar) ** 0.5 * eps

    def abar(self, t):
        return 1.0 if t < 0 else self.alpha_bar[t]

    def previous(self, t):
        later = self.timesteps[self.timesteps < t]
        return later[0] if len(later) else -1

    def x0_hat(self, eps, abar, x_t):
        return (x_t - (1 - abar) ** 0.5 * eps) / abar**0.5

    def spread(self, t, s):
        abar_t, abar_s = self.abar(t), self.abar(s)
        return self.eta * math.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))

    def direction(self, abar_s, sigma):
        return math.sqrt(1 - abar_s - sigma**2)

    def step(self, prediction, t, x_t, z):
        s = self.previous(t)
        abar_t, abar_s, sigma = self.abar(t), self.abar(s), self.spread(t, s)
        x0_hat = self.x0_hat(prediction, abar_t, x_t)
        return abar_s**0.5 * x0_hat + self.direction(abar_s, sigma) * prediction + sigma * z


class Ancestral(Toy):
    eta = 1.0


class TwoM(Toy):
    """DPM-Solver++ (2M), its algorithm 2, on a list that need not be even."""

    order = 2
    extrapolates = True

    def set_steps(self, n):
        super().set_steps(n)
        self.before = None

    def half_log_snr(self, t):
        return 0.5 * math.log(self.abar(t) / (1 - self.abar(t))) if t >= 0 else math.inf

    def r(self, h_before, h):
        return h_before / h

    def extrapolated(self, x_0, x_0_before, r):
        return (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before

    def step(self, prediction, t, x_t, z):
        s = self.previous(t)
        a, b, h = self.abar(t), self.abar(s), self.half_log_snr(s) - self.half_log_snr(t)
        D = x_0 = self.x0_hat(prediction, a, x_t)
        if self.before and s >= 0:
            x_0_before, h_before = self.before
            D = self.extrapolated(x_0, x_0_before, self.r(h_before, h))
        self.before = x_0, h
        return ((1 - b) / (1 - a)) ** 0.5 * x_t - b**0.5 * math.expm1(-h) * D


class Velocity(Toy):
    """In the scale x_0 + (sigma / alpha) eps, told v."""

    predicts = "v"

    def scale_input(self, x_t, t):
        return self.abar(t) ** 0.5 * x_t

    def add_noise(self, x_0, eps, t):
        return x_0 + (1 / self.alpha_bar[t].reshape(-1, 1, 1, 1) - 1) ** 0.5 * eps

    def step(self, prediction, t, x_t, z):
        a, u, s = self.abar(t), self.scale_input(x_t, t), self.previous(t)
        eps = a**0.5 * prediction + (1 - a) ** 0.5 * u
        return x_t + ((1 / self.abar(s) - 1) ** 0.5 - (1 / a - 1) ** 0.5) * eps


def broken(scheduler, **options):
    return {row.law for row in report(scheduler, **options) if row.verdict == "BROKEN"}


@pytest.mark.parametrize("right", [Toy, Ancestral, TwoM, Velocity])
def test_a_right_scheduler_keeps_all(right):
    rows = report(right())
    assert not [row for row in rows if row.verdict == "BROKEN"]
    # what does not apply says why, and is not called kept
    about = {row.law: row.reason for row in rows if row.verdict == "skipped"}
    others = {Ancestral: {"24 one step", "25 order", "25 second order"}, TwoM: {"24 one step"}}
    assert about.keys() == {"5 zero terminal SNR", "32 thresholding"} | others.get(right, {"25 second order"})
    assert all(about.values())


# ---- planted bugs: the law that each breaks ----------------------------------------------------------------

class FixedStride(Toy):
    def previous(self, t):
        return t - len(self.alpha_bar) // self.n


class StartsAt980(Toy):
    def set_steps(self, n):
        self.n, self.timesteps = n, len(self.alpha_bar) // n * np.arange(n)[::-1]


class StepsBeyondTheTable(Toy):
    """A float stride: for N = 61 and T = 1000 the list gets one time more, -1."""

    def set_steps(self, n):
        T = len(self.alpha_bar)
        self.n, self.timesteps = n, np.round(np.arange(T, 0, -T / n)).astype(int) - 1


class EndsAtTheFirstTime(Toy):
    def abar(self, t):
        return self.alpha_bar[max(t, 0)]


class NoiseAtTheLastStep(Ancestral):
    def spread(self, t, s):
        return super().spread(t, s) if s >= 0 else 0.0

    def step(self, prediction, t, x_t, z):
        return super().step(prediction, t, x_t, z) + (0.01 * z if self.previous(t) < 0 else 0)


class NoRoot(Toy):
    def add_noise(self, x_0, eps, t):
        abar = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        return abar**0.5 * x_0 + (1 - abar) * eps


class SignalOfTheOtherSign(Toy):
    def add_noise(self, x_0, eps, t):
        return super().add_noise(-x_0, eps, t)


class ThreeTimesTooLarge(Toy):
    def add_noise(self, x_0, eps, t):
        return 3 * super().add_noise(x_0, eps, t)


class ThreeTimesTooLargeAsShown(Velocity):
    """Keeps a scale of its own, and is off it."""

    def add_noise(self, x_0, eps, t):
        return 3 * super().add_noise(x_0, eps, t)


class TableUpsideDown(Toy):
    def __init__(self):
        super().__init__()
        self.of_training = True

    def set_steps(self, n):
        super().set_steps(n)
        self.of_training = False

    def add_noise(self, x_0, eps, t):
        return super().add_noise(x_0, eps, len(self.alpha_bar) - 1 - t if self.of_training else t)


class NoisePowerForgotten(Ancestral):
    def direction(self, abar_s, sigma):
        return math.sqrt(1 - abar_s)


class SignReversed(Toy):
    def direction(self, abar_s, sigma):
        return -super().direction(abar_s, sigma)


class BetaOfTheFullChain(Ancestral):
    """The draw has the variance of a single step of training, and the direction that of the jump."""

    def step(self, prediction, t, x_t, z):
        beta = 1 - self.abar(t) / self.abar(t - 1)
        return super().step(prediction, t, x_t, 0 * z) + (math.sqrt(beta) * z if self.previous(t) >= 0 else 0)


class SignalInTheEnd(Toy):
    def __init__(self):
        super().__init__(200)


class SnrRises(Toy):
    def __init__(self):
        super().__init__()
        self.alpha_bar[500] = self.alpha_bar[498]


class EpsAtSnrZero(Toy):
    def __init__(self):
        super().__init__()
        self.alpha_bar[-1] = 0.0


class NeverRuns(EpsAtSnrZero):
    """What it says at SNR 0 it says everywhere: no refusal."""

    def step(self, *args):
        raise ValueError("operands could not be broadcast")


class RUpsideDown(TwoM):
    def r(self, h_before, h):
        return h / h_before


class DoesNotExtrapolate(TwoM):
    def extrapolated(self, x_0, x_0_before, r):
        return x_0


class ExtrapolatesTooFar(TwoM):
    def extrapolated(self, x_0, x_0_before, r):
        return (1 + 1 / r) * x_0 - 1 / r * x_0_before


class ClaimsOrderTwo(Toy):
    order = 2


class ToldAnotherTime(Toy):
    """The network hears of less noise than it is shown."""

    def set_steps(self, n):
        super().set_steps(n)
        self.true = self.timesteps
        abar = self.alpha_bar[self.true]
        self.levels = np.stack([abar**0.5, (1 - abar) ** 0.5], axis=-1)
        self.timesteps = np.maximum(self.true - 3, np.arange(n)[::-1])

    def add_noise(self, x_0, eps, t):
        told = len(t) < len(self.alpha_bar)
        return super().add_noise(x_0, eps, self.true[[list(self.timesteps).index(a) for a in t]] if told else t)

    def step(self, prediction, t, x_t, z):
        i = int(np.flatnonzero(self.timesteps == t)[0])
        a, b = self.abar(self.true[i]), self.abar([*self.true, -1][i + 1])
        return b**0.5 * self.x0_hat(prediction, a, x_t) + (1 - b) ** 0.5 * prediction


class BatchMean(Toy):
    def x0_hat(self, eps, abar, x_t):
        x_0 = super().x0_hat(eps, abar, x_t)
        return x_0 - 1e-3 * x_0.mean() + 1e-3 * x_0.mean((1, 2, 3), keepdims=True)


class Stretches(Toy):
    """Dynamic thresholding whose threshold may fall below 1."""

    def x0_hat(self, eps, abar, x_t):
        x_0 = super().x0_hat(eps, abar, x_t)
        s = np.quantile(abs(x_0), 0.5, axis=(1, 2, 3), keepdims=True)
        return np.clip(x_0, -s, s) / np.maximum(s, 1e-9)


class ClipsTooFarOut(Toy):
    def x0_hat(self, eps, abar, x_t):
        return np.clip(super().x0_hat(eps, abar, x_t), -1.5, 1.5)


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
    TableUpsideDown: {"1 q(x_t | x_0)"},
    NoisePowerForgotten: {"23 marginals"},
    SignReversed: {"24 one step", "25 order"},             # the marginals of -eps are those of eps
    BetaOfTheFullChain: {"23 marginals"},
    SignalInTheEnd: {"4 ends in noise"},
    SnrRises: {"3 SNR falls"},
    EpsAtSnrZero: {"5 zero terminal SNR"},
    NeverRuns: {"5 zero terminal SNR", "23 marginals", "24 a point is reached"},
    RUpsideDown: {"25 second order"},
    DoesNotExtrapolate: {"25 second order", "25 order"},
    ExtrapolatesTooFar: {"25 second order", "25 order"},
    ClaimsOrderTwo: {"25 order"},
    ToldAnotherTime: {"26 told what is shown"},
    BatchMean: {"28 batches"},
    Stretches: {"32 thresholding"},
    ClipsTooFarOut: {"32 thresholding"},
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_breaks_its_law(bug):
    assert BUGS[bug] <= broken(bug(), steps=[7])


def test_r_upside_down_is_told_by_no_other_law():
    """Its errors cancel along a list."""
    assert broken(RUpsideDown()) == {"25 second order"}


def test_a_wrong_scale_is_told_in_a_run_where_the_sample_has_its_own():
    """Before a run nothing shows what scale that is; without one, both rows see it."""
    in_a_run = "what is shown of add_noise in a run"
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


def test_nothing_but_numbers_is_kept():
    class Nans(Toy):
        def x0_hat(self, *args):
            return super().x0_hat(*args) * np.nan

    kept = {row.law for row in report(Nans(), steps=[7]) if row.verdict == "kept"}
    assert kept == {"1 q(x_t | x_0)", "3 SNR falls", "4 ends in noise", "26 starts at T-1", "26 N falling times",
                    "26 told what is shown"}


def test_the_variance_of_a_draw_may_be_that_of_normal_data():
    """DDPM section 3.2: beta keeps the marginals of N(0, I), beta~ those of a point; a law that knew one would call
    the other broken."""
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


# ---- our own samplers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, config", [
    ("ddim", {}), ("ddim", {"eta": 0.7}), ("ddpm", {}), ("dpm++2m", {"spacing": "linspace"}), ("heun", {}),
    ("ddim", {"schedule": "flow_matching", "predicts": "v"}), ("dpm++2m", {"schedule": "cosine", "predicts": "x0"}),
], ids=str)
def test_our_samplers_keep_all(name, config):
    rows = report(load(f"minidiff:{name}", config), steps=[7])
    assert not [row for row in rows if row.verdict == "BROKEN"]
    assert sum(row.verdict == "kept" for row in rows) >= 12


def test_our_samplers_refuse_eps_at_snr_0():
    rows = report(load("minidiff:ddim", {"schedule": "flow_matching"}), steps=[7])
    (refused,) = [row for row in rows if row.law == "5 zero terminal SNR"]
    assert refused.verdict == "kept" and "zero SNR" in refused.where
    assert all(row.verdict == "skipped" for row in rows if row.computed.startswith(("its factor", "spread at the end")))


def test_a_refusal_counts_where_the_rest_of_the_list_runs():
    class Refuses(EpsAtSnrZero):
        def step(self, prediction, t, x_t, z):
            if self.abar(t) == 0:
                raise ValueError("no x_0 at SNR 0")
            return super().step(prediction, t, x_t, z)

    rows = report(Refuses(), steps=[7])
    assert not [row for row in rows if row.verdict == "BROKEN"]
    assert [row.where for row in rows if row.law == "5 zero terminal SNR"] == ["no x_0 at SNR 0"]
    assert sum("it refuses to run: no x_0 at SNR 0" == row.reason for row in rows) == 9


# ---- what users get wrong ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_method_is_said_in_a_sentence(name):
    class Lacks:
        def __getattribute__(self, wanted):
            if wanted == name:
                raise AttributeError(wanted)
            return getattr(toy, wanted) if wanted in NEEDED else object.__getattribute__(self, wanted)

    toy = Toy()
    with pytest.raises(UserError, match=f"the scheduler Lacks has no {name}, which (is|takes) "):
        report(Lacks())


@pytest.mark.parametrize("name, config, sentence", [
    ("ddim", {}, "LIBRARY:NAME"),
    ("minidiff:euler", {}, "is one of ddpm, ddim, heun"),
    ("minidiff:ddim", {"schedule": "sine"}, "one of linear"),
    ("minidiff:heun", {"eta": 1.0}, "the sampler heun takes no eta"),
    ("minidiff:ddim", {"size": 3}, "refuses its configuration.*size"),
    ("no_such_library:Scheduler", {}, "pip install no_such_library"),
    ("math:Scheduler", {}, "math has no Scheduler"),
    ("numpy.nothing:Scheduler", {}, "numpy.nothing cannot be imported: ModuleNotFoundError"),
    ("my scheduler:make", {}, "--scheduler takes MODULE:NAME"),
    ("diffusers:Scheduler", {}, "DDIMScheduler"),
    ("math:sqrt", {}, "math:sqrt makes no scheduler: TypeError"),
    ("math:sqrt", {"x": 2}, "math:sqrt refuses its configuration: TypeError"),
    ("random:seed", {}, "random:seed returned None, where it must return a scheduler"),
    ("minidiff:ddim", {"eta": "x"}, "eta must be a number from 0 to 1, not 'x'"),
    ("minidiff:ddim", {"eta": -1}, "eta must be a number from 0 to 1, not -1"),
    ("minidiff:ddim", {"eta": math.nan}, "eta must be a number from 0 to 1, not nan"),
    ("minidiff:ddpm", {"eta": 5}, "eta must be a number from 0 to 1, not 5"),
])
def test_a_wrong_name_is_said_in_a_sentence(name, config, sentence):
    with pytest.raises(UserError, match=sentence):
        load(name, config)


@pytest.mark.parametrize("wrong, sentence", [
    ({"predicts": "noise"}, "predicts must be one of eps, x0, v"),
    ({"predicts": ["eps"]}, "predicts must be one of eps, x0, v"),
    ({"alpha_bar": np.zeros(1)}, r"alpha_bar must be an array \(T,\).*not float64 \(1,\)"),
    ({"alpha_bar": np.array(0.5)}, r"alpha_bar must be an array \(T,\)"),
    ({"alpha_bar": [[0.9], [0.8, 0.7]]}, r"alpha_bar must be an array \(T,\).*lists of several lengths"),
    ({"step": None}, "step must be a method, not NoneType"),
    ({"step": lambda prediction, t, x_t: x_t}, "step does not take the 4 arguments that it is given: too many"),
    ({"scale_input": 3}, "scale_input must be a method, not int"),
    ({"step": lambda *args: 3}, r"step must return an array of its sample's shape \(2, 1, 1, 1\), not int"),
    ({"step": lambda prediction, t, x_t, z: x_t[0]}, r"step must return .*not float64 \(1, 1, 1\)"),
    ({"add_noise": lambda x_0, eps, t: None}, r"add_noise must return an array"),
    ({"timesteps": None, "set_steps": lambda n: None}, "set_steps.3. must set timesteps to an array .*not None"),
    ({"timesteps": np.zeros(0), "set_steps": lambda n: None}, r"must set timesteps .*not float64 \(0,\)"),
    ({"timesteps": np.zeros((2, 2)), "set_steps": lambda n: None}, r"must set timesteps .*not float64 \(2, 2\)"),
    ({"timesteps": np.full(3, np.nan), "set_steps": lambda n: None}, "must set timesteps .*with NaN or inf"),
    ({"levels": np.zeros((5, 3))}, r"levels must be an array \(3, 2\)"),
    ({"order": "two"}, "order must be a number of at least 1, not 'two'"),
    ({"evaluations": 0}, "evaluations must be a number of at least 1, not 0"),
])
def test_wrong_values_are_said_in_a_sentence(wrong, sentence):
    toy = Toy()
    vars(toy).update(wrong)
    with pytest.raises(UserError, match=sentence):
        report(toy)


def test_timesteps_that_are_never_set_are_said_in_a_sentence():
    class NeverSet(Toy):
        def __init__(self):
            super().__init__()
            del self.timesteps

        def set_steps(self, n):
            pass

    with pytest.raises(UserError, match=r"set_steps\(3\) must set timesteps to an array"):
        report(NeverSet())


@pytest.mark.parametrize("raised", [RuntimeError("not yet"), SystemExit(0)], ids=repr)
def test_what_a_scheduler_raises_as_it_is_asked_is_said_in_a_sentence(raised):
    def fails(self, *n):
        raise raised

    for name, method, said in [("alpha_bar", property(fails, lambda self, a: None), "alpha_bar cannot be read: "),
                               ("set_steps", fails, r"set_steps\(3\) raises "),
                               ("levels", property(fails), "levels cannot be read: ")]:
        with pytest.raises(UserError, match=f"the scheduler's {said}{type(raised).__name__}"):
            report(type("Fails", (Toy,), {name: method, "__init__": Toy.__init__})())


def test_a_step_that_exits_is_broken():
    """sys.exit(0) ends no report, and makes none that passes."""
    class Exits(EpsAtSnrZero):
        def step(self, *args):
            raise SystemExit(0)

    rows = report(Exits(), steps=[7])
    assert sum("SystemExit: 0" in row.where for row in rows if row.verdict == "BROKEN") == 9


def test_the_dry_run_comes_after_what_is_asked_before_any_run():
    """Else a table upside down until then would be set right unseen."""
    assert "1 q(x_t | x_0)" in broken(TableUpsideDown())


def test_runs_must_fit_in_the_table():
    with pytest.raises(UserError, match="no run of 1, 1001 steps fits .* T = 1000 times, which has runs of 2 to 1000"):
        report(Toy(), steps=[1, 1001])
    toy = Toy()
    toy.alpha_bar = np.array([0.9, 0.1])
    with pytest.raises(UserError, match="no run of 3, 7, 10, 20, 50 steps fits .* T = 2 times, which has runs of 2 st"):
        report(toy)


# ---- what is blamed, and what is not -----------------------------------------------------------------------

def test_thresholding_is_asked_of_those_who_clip():
    """Ending at alpha_bar_0 multiplies x_0 by alpha_0 < 1, of which laws 24 and 26 tell, and clips nothing."""
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


def test_a_point_is_missed_by_the_same_in_every_prediction():
    """What eps rounds at alpha_1 no longer stands at the end: it does not excuse a defect there."""
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


# ---- the command -------------------------------------------------------------------------------------------

def test_the_command_takes_a_scheduler(capsys, tmp_path):
    out = tmp_path / "rows.json"
    assert main(["verify", "--scheduler", "minidiff:ddim", "--scheduler-config", "eta=0.5", "--scheduler-config",
                 "spacing=linspace", "--steps", "7", "--json", str(out)]) == 0
    assert "0 broken" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["config"] == {"eta": 0.5, "spacing": "linspace"}
    assert [row["expected"] for row in written["rows"] if row["verdict"] == "skipped"] == [None] * 5


def test_the_command_takes_a_file_of_the_users(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_scheduler.py").write_text(
        "import sys\nfrom test_scheduler import FixedStride, Toy\n\n\ndef make(stride=False):\n"
        "    return FixedStride() if stride else Toy()\n\n\ndef half():\n    return object()\n")
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--scheduler", "my_scheduler:make", "--steps", "7"]) == 0
    assert main(["verify", "--scheduler", "my_scheduler:make", "--scheduler-config", "stride=true"]) == 1
    assert "BROKEN  23 marginals" in capsys.readouterr().out
    assert main(["verify", "--scheduler", "my_scheduler:half"]) == 2
    assert "has no predicts" in capsys.readouterr().err


@pytest.mark.parametrize("text, sentence", [
    ("raise RuntimeError('no such\\nday')", "module boom cannot be imported: RuntimeError: no such day"),
    ("raise SystemExit(3)", "module boom cannot be imported: SystemExit: 3"),
    ("def make(:", "module boom cannot be imported: SyntaxError"),
    ("def make():\n    return {}['stride']", "boom:make makes no scheduler: KeyError: 'stride'"),
    ("make = 3", "boom:make makes no scheduler: TypeError"),
])
def test_whatever_a_file_of_the_users_raises_is_said_in_a_sentence(text, sentence, capsys, tmp_path, monkeypatch):
    (tmp_path / "boom.py").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "boom", raising=False)
    try:
        assert main(["verify", "--scheduler", "boom:make"]) == 2
    finally:
        sys.modules.pop("boom", None)
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said and said.count("\n") == 1


def test_the_laws_need_no_docstrings():
    """python -OO takes them away."""
    code = "from minidiff.verify import scheduler as s; print(len(s.report(s.load('minidiff:ddim'), [3])))"
    ran = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"})
    assert ran.stdout.split() == [str(len(LAWS))], ran.stderr


@pytest.mark.parametrize("options", [["--steps", "7"], ["--scheduler", "minidiff:ddim", "-T", "10"],
                                     ["--scheduler", "minidiff:ddim", "--plot", "x.png"]])
def test_options_that_would_be_ignored_are_refused(options, capsys):
    assert main(["verify", *options]) == 2
    assert "--scheduler" in capsys.readouterr().err


def test_a_replayed_sampler_takes_no_other_way():
    """Asked step by step, our DDIM gives what it gives in one go."""
    from minidiff.diffusion.denoiser import NetworkDenoiser
    from minidiff.diffusion.samplers import ddim, sample, times
    from minidiff.diffusion.schedules import linear

    scheduler, schedule, x = ours("ddim"), linear(), np.random.default_rng(0).normal(size=(2, 3))

    def network(x_t, t, cond=None):
        return np.tanh(x_t) + t[:, None] / 1000

    whole = sample(ddim(NetworkDenoiser(schedule, "eps", network), x, times(schedule, 9)))
    scheduler.set_steps(9)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, np.full(2, t)), t, x, np.zeros_like(x))
    np.testing.assert_array_equal(x, whole)
