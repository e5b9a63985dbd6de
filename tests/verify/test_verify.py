"""verify: right schedules keep every law, planted bugs break the law they should, and bad input is one sentence."""

import json
import math
import sys
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from support.diffusion_strategies import any_schedule

from minidiff import verify
from minidiff.cli import main as cli
from minidiff.diffusion import gaussian, losses, samplers, schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.schedules import SCHEDULES, Schedule
from minidiff.engine.random import SampleStreams
from minidiff.errors import UserError
from minidiff.verify import forward, rows, watch
from minidiff.verify import user_schedule as own
from minidiff.verify.loading import load_named

NOISE = "4 ends in noise"


def broken(report) -> set[str]:
    return {row.law for row in report if row.verdict == verify.BROKEN}


@pytest.fixture(autouse=True)
def _few_chains(monkeypatch):
    monkeypatch.setattr(forward, "chains", lambda T: 2000)  # for speed; the bounds hold for any number


# ---- right schedules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_our_schedules_keep_every_law(name):
    """False alarm 6e-7 each, from the simulated chains; nothing else is left to chance but where to look."""
    schedule = schedules.schedule_from(name, 200, allow_signal=True)
    assert broken(verify.report(schedule)) == (set() if schedule.reaches_noise else {NOISE})
    assert broken(verify.report(schedules.zero_terminal_snr(schedule))) == set()


@settings(max_examples=25)
@given(any_schedule(ends_at_zero=None))
def test_any_schedule_keeps_every_law(schedule):
    """The tolerances are those of rounding for every table, not for the ones that were tried first."""
    report = verify.report(schedule)
    assert broken(report) == (set() if schedule.reaches_noise else {NOISE})
    assert all(not row.passed for row in report if row.reason)


def test_tables_of_extreme_steps_keep_every_law():
    tables = [[1 - 1e-12, 1e-12], [1 - 1e-15, 0.5, 1e-300], [0.5, 1e-320], [0.019999]]
    for table in tables:
        assert broken(verify.report(Schedule(table))) == set(), table


def test_what_is_allowed_is_rounding():
    """No tolerance hides a formula that is wrong in its ninth digit, but for chance."""
    schedule = schedules.cosine(60)
    for row in verify.report(schedule, betas=schedule.betas):
        # an order is a bound, and the first time of a list an integer
        if row.law not in ("1 simulation", "26 starts at T-1") and not row.reason and row.side != ">=":
            assert row.tolerance < 1e-9 * (1 + abs(row.expected)), row


def test_the_full_length_takes_seconds_and_keeps_every_law(monkeypatch):
    monkeypatch.setattr(forward, "chains", lambda T: 1000)
    report = verify.report(schedules.cosine())
    assert broken(report) == set() and sum(row.passed for row in report) >= 35


def test_one_time_skips_aloud_what_needs_two():
    report = verify.report(Schedule([0.01]))
    skipped = {row.law for row in report if row.reason}
    assert {"3 SNR falls", "8 Bayes pointwise", "16 reverse variance", "18 bound weights", "24 one step",
            "25 second order"} <= skipped
    assert broken(report) == set()
    text = verify.table(report)
    assert "skipped   8 Bayes pointwise: needs two times, T >= 2" in text
    assert text.endswith(f"0 broken, {sum(row.verdict == verify.SKIPPED for row in report)} skipped")


def test_the_same_seed_gives_the_same_report_and_another_one_does_not():
    a, b, c = (verify.report(schedules.cosine(20), seed=seed) for seed in (1, 1, 2))
    numbers = [[(r.expected, r.measured) for r in report if not r.reason] for report in (a, b, c)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert any("seed 2" in row.where for row in c)


def test_a_schedule_that_keeps_signal_breaks_the_noise_law_alone():
    report = verify.report(schedules.linear(200, allow_signal=True))
    assert broken(report) == {NOISE}
    row = next(row for row in report if row.law == NOISE)
    assert (row.side, row.expected) == ("<=", 0.02) and row.measured == pytest.approx(0.132, abs=1e-3)
    text = verify.table(report)
    assert "alpha_bar[199] <= 0.02;" in text and "  <= 0.02  " in text and "numbers   expected <= 0.02" in text
    assert "alpha_bar[199] = 0.132" in text and "take more steps, or larger betas" in text


# ---- the table ---------------------------------------------------------------------------------------------


def test_the_table_is_aligned_and_no_wider_than_a_terminal():
    report = verify.report(schedules.linear(7, allow_signal=True))
    report += [verify.Row("a law with a long name " * 4, "words " * 40, -1.23456789e-200, 1.5, 1.5, 1e-300,
                          "x = y " * 60, "somewhere " * 30)]
    lines = verify.table(report).splitlines()
    assert max(map(len, lines)) <= 120
    words = ("kept", "BROKEN", "skipped")
    ends = {line.rindex(word) for line in lines for word in words if line.endswith("  " + word)}
    assert len(ends) == 1                                   # one column of verdicts
    assert sum(line.endswith("  kept") for line in lines) == sum(row.passed for row in report)
    assert lines[-1] == f"{sum(row.passed for row in report)} kept, 2 broken, 1 skipped"


def test_a_failing_row_tells_its_formula_its_numbers_and_its_seed(monkeypatch):
    monkeypatch.setattr(gaussian, "q_step", lambda schedule, s, t: (schedule.alpha(t), 1 - schedule.abar(t)))
    text = verify.table(verify.report(schedules.cosine(50), seed=17))
    told = text[text.index("BROKEN  2 any two times: sigma2_ts"):]
    told = told[: told.index("\n\n")]
    for word in ("sigma2_ts = sigma_t^2 - alpha_ts^2 sigma_s^2", "expected 0.", "measured 0.", "allowed", "s = ",
                 "seed 17"):
        assert word in told


def test_every_law_is_filed_under_its_name():
    """A law that raises is told by it; the name is that of the law's first row."""
    rng = np.random.default_rng(0)
    for law in verify.LAWS:
        assert next(iter(law.rows(schedules.cosine(20), rng))).law == law.name


@pytest.mark.parametrize("expected, measured, tolerance, passed", [
    (1.0, 1.0, 0.0, True), (1.0, 1.0 + 1e-15, 1e-14, True), (1.0, 1.1, 0.09, False), (0.0, 1e-300, 0.0, False),
    (1.0, math.nan, 1.0, False), (1.0, math.inf, math.inf, False), (-math.inf, -math.inf, 0.0, True),
    (math.nan, math.nan, 1.0, False), (1.0, 2.0, math.nan, False),
])
def test_a_row_passes_only_within_its_tolerance(expected, measured, tolerance, passed):
    assert rows.compare("law", "it", expected, measured, tolerance, "").passed is passed
    many = rows.compare("law", "it", [1.0, expected], [1.0, measured], tolerance, "", "case {}".format)
    assert many.passed is (passed and not math.isnan(tolerance))
    assert passed or many.where in ("case 1", "case 0" if math.isnan(tolerance) else "")


# ---- planted bugs ------------------------------------------------------------------------------------------
# Each is a formula gone wrong in one place; the report must break the law that is about it.
DDPM, DDIM, HEUN, TWO_M = samplers.ddpm, samplers.ddim, samplers.heun, samplers.dpm_solver_pp_2m

def q_sample_without_root(schedule, x_0, t, eps):
    abar = gaussian.per_sample(schedule.abar(t), x_0)
    return np.sqrt(abar) * x_0 + (1 - abar) * eps           # labml #152


def mean_of_the_time_before(schedule, x_0, t):
    before = np.maximum(np.asarray(t) - 1, 0)
    return gaussian.per_sample(schedule.alpha(before), x_0) * x_0, gaussian.per_sample(1 - schedule.abar(t), x_0)


def variance_of_the_time_before(schedule, x_0, t):
    before = np.maximum(np.asarray(t) - 1, 0)
    return gaussian.per_sample(schedule.alpha(t), x_0) * x_0, gaussian.per_sample(1 - schedule.abar(before), x_0)


def posterior_with_beta(original):
    def wrong(schedule, x_0, x_t, t, s=None):               # beta for beta~: noise at the first step, too
        mean, _ = original(schedule, x_0, x_t, t, s)
        return mean, gaussian.per_sample(schedule.betas[t], x_t)
    return wrong


def posterior_with_swapped_coefficients(original):
    return lambda schedule, x_0, x_t, t, s=None: (original(schedule, x_t, x_0, t, s)[0],
                                                  original(schedule, x_0, x_t, t, s)[1])


def ddim_without_root(denoiser, x_T, times, cond=None, *, eta=0.0, streams=None):
    """The direction with sigma_s in place of sqrt(sigma_s^2 - sigma^2)."""
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in samplers._steps(schedule, times):
        alpha_s, sigma_s = samplers._alpha_sigma(schedule, s)
        x0_hat = samplers._denoise(denoiser, x_t, t, cond)
        eps_hat = gaussian.eps_from_x0(schedule, x_t, t, x0_hat)
        sigma = eta * math.sqrt(samplers.beta_tilde(schedule, t, s))
        x_t = alpha_s * x0_hat + sigma_s * eps_hat + (sigma * samplers._normal(streams, x_t) if sigma else 0)
        yield samplers.State(step, s, x_t, x0_hat)


def euler(denoiser, x_T, times, cond=None):
    """Heun without its second slope."""
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in samplers._steps(schedule, times):
        x0_hat = samplers._denoise(denoiser, x_t, t, cond)
        h = samplers.angle(schedule, s) - samplers.angle(schedule, t)
        x_t = x_t + h * gaussian.v_from_x0(schedule, x_t, t, x0_hat) if s >= 0 else x0_hat
        yield samplers.State(step, s, x_t, x0_hat)


def residual_noise(denoiser, x_T, times, cond=None):
    for state in TWO_M(denoiser, x_T, times, cond):
        x_t = state.x_t + (1e-3 if state.t == -1 else 0)
        yield samplers.State(state.step, state.t, x_t, state.x0_hat)


def residual_noise_denied(denoiser, x_T, times, cond=None, **options):
    """Leaves noise at the end, and calls the result x0_hat."""
    for state in DDPM(denoiser, x_T, times, cond, **options):
        x_t = state.x_t + (0.3 if state.t == -1 else 0)
        yield samplers.State(state.step, state.t, x_t, x_t if state.t == -1 else state.x0_hat)


def off_in_the_ninth_digit(sampler):
    """A sampler without memory, whose every step but the last is off."""
    def wrong(denoiser, x_T, times, cond=None, **options):
        x_t = x_T
        for step, t, s in samplers._steps(denoiser.schedule, times):
            state = next(sampler(denoiser, x_t, [t, s] if s >= 0 else [t], cond, **options))
            x_t = state.x_t * (1 + 1e-9 * (s >= 0))
            yield samplers.State(step, s, x_t, state.x0_hat)
    return wrong


def x0_hat_of_its_own(denoiser, x_T, times, cond=None):
    for state in HEUN(denoiser, x_T, times, cond):
        yield samplers.State(state.step, state.t, state.x_t, state.x0_hat if state.t == -1 else 0.9 * state.x0_hat)


def one_time_late(denoiser, x_T, times, cond=None):
    for state in TWO_M(denoiser, x_T, times, cond):
        yield samplers.State(state.step, max(state.t - 1, -1), state.x_t, state.x0_hat)


def asks_one_time_late(denoiser, x_T, times, cond=None, **options):
    """Names the right times, and tells the network others."""
    def network(x_t, t, cond):
        return denoiser(x_t, np.maximum(t - 1, 0), cond)
    return DDIM(NetworkDenoiser(denoiser.schedule, "x0", network), x_T, times, cond, **options)


def ddpm_with(power):
    """ddpm whose noise is multiplied by `power` of the variance in place of its root."""
    def wrong(denoiser, x_T, times, cond=None, *, streams, variance=samplers.beta_tilde):
        return DDPM(denoiser, x_T, times, cond, streams=streams,
                             variance=lambda schedule, t, s: power(variance(schedule, t, s)) ** 2)
    return wrong


def two_m(D_of):
    """DPM-Solver++(2M) with another D, of (x0_hat, x0_before, h, h_before)."""
    def wrong(denoiser, x_T, times, cond=None):
        schedule, x_t, before, h_before = denoiser.schedule, x_T, None, None
        for step, t, s in samplers._steps(schedule, times):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = (samplers._alpha_sigma(schedule, u) for u in (t, s))
            e_h = sigma_s * alpha_t / (alpha_s * sigma_t)
            h = -math.log(e_h) if e_h > 0 else math.inf
            x0_hat = samplers._denoise(denoiser, x_t, t, cond)
            D = x0_hat if step == 1 or s == -1 else D_of(x0_hat, before, h, h_before)
            x_t = sigma_s / sigma_t * x_t - alpha_s * (e_h - 1) * D
            before, h_before = x0_hat, h
            yield samplers.State(step, s, x_t, x0_hat)
    return wrong


def right_D(x0_hat, before, h, h_before):
    return x0_hat + h / (2 * h_before) * (x0_hat - before)


def with_factor(module, name, factor):
    original = getattr(module, name)
    return lambda *a, **k: factor * original(*a, **k)


PLANTED = {
    "q_sample with 1 - abar for its root": ("1 composition", gaussian, "q_sample", q_sample_without_root),
    "the mean one step late": ("1 composition", gaussian, "q_mean_variance", mean_of_the_time_before),
    "the variance one step late": ("1 simulation", gaussian, "q_mean_variance", variance_of_the_time_before),
    "a mean of the wrong sign": ("1 composition", gaussian, "q_mean_variance",
                                 lambda s, x, t, original=gaussian.q_mean_variance: (-original(s, x, t)[0],
                                                                                     original(s, x, t)[1])),
    "a jump that forgets where it starts": ("2 any two times", gaussian, "q_step",
                                            lambda schedule, s, t: (schedule.alpha(t), 1 - schedule.abar(t))),
    "a log of base 10": ("3 SNR falls", Schedule, "log_snr", with_factor(Schedule, "log_snr", 1 / math.log(10))),
    "an SNR that is squared": ("3 SNR falls", Schedule, "snr",
                               lambda self, t, original=Schedule.snr: original(self, t) ** 2),
    "an SNR that rises": ("3 SNR falls", Schedule, "snr", with_factor(Schedule, "snr", -1)),
    "a prior KL in bits": ("4 prior KL", gaussian, "prior_kl", with_factor(gaussian, "prior_kl", 1 / math.log(2))),
    "a posterior of variance beta": ("9 first step", gaussian, "q_posterior_mean_variance", posterior_with_beta),
    "beta for beta~, seen by its precision": ("9 posterior", gaussian, "q_posterior_mean_variance",
                                              posterior_with_beta),
    "beta for beta~, seen by Bayes": ("8 Bayes pointwise", gaussian, "q_posterior_mean_variance",
                                      posterior_with_swapped_coefficients),
    "beta for beta~, seen by the reverse variance": ("16 reverse variance", gaussian, "q_posterior_mean_variance",
                                                     posterior_with_swapped_coefficients),
    "x0_from_eps that forgets alpha": ("10 round trips", gaussian, "x0_from_eps",
                                       lambda s, x_t, t, eps: x_t - gaussian.per_sample(s.sigma(t), x_t) * eps),
    "v with its sign reversed": ("10 round trips", gaussian, "v_from_x0_eps",
                                 with_factor(gaussian, "v_from_x0_eps", -1)),
    "a score without its minus": ("11 Tweedie", gaussian, "x0_from_score",
                                  lambda s, x, t, score, original=gaussian.x0_from_score: original(s, x, t, -score)),
    "a denoiser that shrinks too much": ("12 best denoiser", GaussianDenoiser, "__call__",
                                         with_factor(GaussianDenoiser, "__call__", 0.999)),
    "a v-target without alpha": ("15 loss floors", gaussian, "target",
                                 lambda s, predicts, x_0, eps, t, original=gaussian.target:
                                 eps - x_0 if predicts == "v" else original(s, predicts, x_0, eps, t)),
    "a bound without its half": ("18 bound weights", losses, "bound_weight", with_factor(losses, "bound_weight", 2)),
    "a KL the wrong way round": ("19 tight bound", gaussian, "kl_gaussian",
                                 lambda m1, v1, m2, v2, original=gaussian.kl_gaussian: original(m2, v2, m1, v1)),
}


@pytest.mark.parametrize("law, module, name, bug", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_bug_breaks_its_law(law, module, name, bug, monkeypatch):
    if bug in (posterior_with_beta, posterior_with_swapped_coefficients):
        bug = bug(getattr(module, name))
    monkeypatch.setattr(module, name, bug)
    report = verify.report(schedules.cosine(60))
    assert law in broken(report), verify.table(report)


# What the report must say of a sampler, in the words of the row.
NOISE_OF_DDPM = "power of the noise, beta~ on x_0 = 0.7", "variance of x_s, beta on N(0, 1)"
MARGINALS, ORDER = "mean, spread at the list's next time: ", "of convergence to the exact flow: "
MIDDLE = "x0_hat in the middle of each stride: dpm++2m"
LEFT, ASTRAY = "noise left: |x - x0_hat| at the end", "samplers that leave their list of times"
ENTRY = "samplers whose entry is wrong"
PLANTED_SAMPLERS = {
    "DDIM's direction with sigma_s": ("23 DDIM marginals", ("variance of x_s, eta = 0, 0.5, 1",), "ddim",
                                      ddim_without_root),
    "ddpm without noise": ("23 ddpm marginals", NOISE_OF_DDPM, "ddpm", ddpm_with(lambda v: 0.0)),
    "ddpm without noise, by its entry": ("23 marginals", (MARGINALS + "ddpm",), "ddpm", ddpm_with(lambda v: 0.0)),
    "ddpm with the variance for its root": ("23 ddpm marginals", NOISE_OF_DDPM, "ddpm", ddpm_with(lambda v: v)),
    "ddpm with the variance for its root, by its entry": ("23 marginals", (MARGINALS + "ddpm",), "ddpm",
                                                          ddpm_with(lambda v: v)),
    "ddpm that draws beta for beta~": (
        "23 ddpm marginals", NOISE_OF_DDPM[:1], "ddpm",
        lambda d, x, ts, cond=None, *, streams, variance=None: DDPM(
            d, x, ts, cond, streams=streams, variance=samplers.beta)),
    "ddim for ddpm": ("26 the end", (ENTRY,), "ddpm",
                      lambda d, x, ts, cond=None, *, streams, variance=None: DDIM(d, x, ts, cond)),
    "Heun for ddim": ("26 the end", (ENTRY,), "ddim",
                      lambda d, x, ts, cond=None, **options: HEUN(d, x, ts, cond)),
    "Euler for 2M": ("25 second order", (MIDDLE,), "dpm++2m", euler),
    "Heun one denoiser call short": ("25 Heun", ("factor of one step of heun",), "heun", euler),
    "Heun one denoiser call short, by its entry": ("25 order", (ORDER + "heun",), "heun", euler),
    "Heun that is off in the ninth digit": (
        "25 Heun", ("factor of one step of heun",), "heun", off_in_the_ninth_digit(HEUN)),
    "DDIM that is off in the ninth digit": (
        "23 marginals", (MARGINALS + "ddim",), "ddim", off_in_the_ninth_digit(DDIM)),
    "2M with r upside down": ("25 second order", (MIDDLE,), "dpm++2m",
                              two_m(lambda x, before, h, h_before: right_D(x, before, h_before, h))),
    "2M of first order": ("25 second order", (MIDDLE,), "dpm++2m", two_m(lambda x, before, h, h_before: x)),
    "2M of first order, by its order": ("25 order", (ORDER + "dpm++2m",), "dpm++2m",
                                        two_m(lambda x, before, h, h_before: x)),
    "2M that extrapolates to the end of the stride": (
        "25 second order", (MIDDLE,), "dpm++2m",
        two_m(lambda x, before, h, h_before: right_D(x, before, 2 * h, h_before))),
    "noise at the end": ("26 the end", (LEFT,), "dpm++2m", residual_noise),
    "noise at the end, called x0_hat": ("26 the end", (LEFT,), "ddpm", residual_noise_denied),
    "an x0_hat that nobody said": ("26 the end", ("samplers that show an x0_hat of their own",), "heun",
                                   x0_hat_of_its_own),
    "states that name other times": ("26 the end", (ASTRAY,), "dpm++2m", one_time_late),
    "a network that is told other times": ("26 the end", (ASTRAY,), "ddim", asks_one_time_late),
}


def plant(monkeypatch, name, bug):
    """Puts a function in the place of a sampler's, in the module and in its entry, and leaves the rest of the entry."""
    entry = samplers.SAMPLERS[name]
    monkeypatch.setattr(samplers, entry.function.__name__, bug)
    monkeypatch.setitem(samplers.SAMPLERS._entries, name, replace(entry, function=bug))


@pytest.mark.parametrize("law, words, name, bug", PLANTED_SAMPLERS.values(), ids=PLANTED_SAMPLERS.keys())
def test_a_planted_sampler_breaks_its_law(law, words, name, bug, monkeypatch):
    plant(monkeypatch, name, bug)
    report = verify.report(schedules.cosine(60))
    found = {row.computed for row in report if row.law == law and row.verdict == verify.BROKEN}
    assert set(words) <= found and "could not be computed" not in verify.table(report), verify.table(report)


# ---- samplers that a user registers ------------------------------------------------------------------------


def euler_ancestral(drawn=lambda sigma_up: sigma_up):
    """k-diffusion's: sigma is sigma_t / alpha_t, and x is x_t / alpha_t. drawn: what the noise is multiplied by."""
    def sampler(denoiser, x_T, times, cond=None, *, streams):
        schedule, x_t = denoiser.schedule, x_T
        for step, (t, s) in enumerate(zip(times, [*times[1:], -1], strict=True), start=1):
            alpha_t, alpha_s = float(schedule.alpha(t)), float(schedule.alpha(s))
            sigma_t, sigma_s = float(schedule.sigma(t)) / alpha_t, float(schedule.sigma(s)) / alpha_s
            sigma_up = sigma_s * math.sqrt(1 - sigma_s**2 / sigma_t**2)
            sigma_down = sigma_s**2 / sigma_t
            x0_hat = denoiser(x_t, np.full(len(x_t), t), cond)
            x = x0_hat + (x_t / alpha_t - x0_hat) * sigma_down / sigma_t
            z = streams.normal(x_t.shape[1:], x_t.dtype) if s >= 0 else 0
            x_t = alpha_s * (x + drawn(sigma_up) * z)
            yield samplers.State(step, s, x_t, x0_hat)
    return sampler


def midpoint(denoiser, x_T, times, cond=None):
    """Second order, with its second call between two times of the list, as far as the table has one there."""
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in samplers._steps(schedule, times):
        x0_hat = samplers._denoise(denoiser, x_t, t, cond)
        if s >= 0:
            m = (s + t) // 2
            (phi_t, phi_m, phi_s) = (samplers.angle(schedule, u) for u in (t, m, s))
            x_m = x_t + (phi_m - phi_t) * gaussian.v_from_x0(schedule, x_t, t, x0_hat)
            v_m = gaussian.v_from_x0(schedule, x_m, m, samplers._denoise(denoiser, x_m, m, cond))
            x_t = x_t + (phi_s - phi_t) * v_m
        else:
            x_t = x0_hat
        yield samplers.State(step, s, x_t, x0_hat)


@pytest.fixture
def registered():
    """Registers samplers for the length of a test."""
    names = []

    def register(function, **entry):
        names.append(f"user-{len(names)}")
        samplers.SAMPLERS.register(names[-1], samplers.Sampler(function, **entry))
        return names[-1]

    yield register
    for name in names:
        samplers.SAMPLERS.unregister(name)


RIGHT = {"Euler ancestral": (euler_ancestral(), {"order": 1, "noise": True}),
         "Euler in the angle": (euler, {"order": 1}),
         "Heun": (samplers.heun, {"order": 2, "calls": 2}),
         "a second order that is not claimed": (samplers.dpm_solver_pp_2m, {"order": 1})}


@pytest.mark.parametrize("function, entry", RIGHT.values(), ids=RIGHT.keys())
def test_a_right_sampler_of_the_users_is_kept(function, entry, registered):
    name = registered(function, **entry)
    for schedule in (schedules.cosine(60), schedules.linear(1000)):
        report = verify.report(schedule)
        assert broken(report) == set(), verify.table(report)
        assert sum(name in row.computed for row in report) >= 4


def test_a_method_that_asks_between_the_times_of_its_list_is_kept(registered):
    name = registered(midpoint, order=1, calls=2)           # the table's middle is rounded: no second order of it
    report = verify.report(schedules.cosine(60))
    assert broken(report) == set(), verify.table(report)
    assert any(row.law == "25 order" and name in row.computed for row in report)


WRONG = {
    "Euler ancestral with twice the noise": ("23 marginals", euler_ancestral(lambda up: 2 * up), {"noise": True}),
    "Euler ancestral with the variance for its root": ("23 marginals", euler_ancestral(lambda up: up**2),
                                                       {"noise": True}),
    "Euler ancestral with a thousandth less noise": ("23 marginals", euler_ancestral(lambda up: 0.999 * up),
                                                     {"noise": True}),
    "Euler that claims second order": ("25 order", euler, {"order": 2}),
    "Heun that claims a single call": ("26 the end", samplers.heun, {"order": 2}),
    "DDIM that claims to extrapolate": ("25 second order", samplers.ddim, {"order": 1, "extrapolates": True}),
    "ddpm that claims no noise": ("23 marginals", lambda d, x, ts, cond=None: samplers.ddpm(
        d, x, ts, cond, streams=SampleStreams(0, len(x))), {}),
}


@pytest.mark.parametrize("law, function, entry", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_sampler_of_the_users_breaks_a_law(law, function, entry, registered):
    name = registered(function, **{"order": 1} | entry)
    report = verify.report(schedules.cosine(60))
    rows_of = [row for row in report if row.law == law and row.verdict == verify.BROKEN]
    assert any(name in row.computed + row.where for row in rows_of), verify.table(report)


def test_the_copy_of_2m_that_bugs_are_planted_in_is_right(monkeypatch):
    plant(monkeypatch, "dpm++2m", two_m(right_D))
    assert broken(verify.report(schedules.cosine(60))) == set()


def test_a_table_is_held_to_the_betas_that_it_was_made_from(here, monkeypatch, capsys):
    """Betas read back off a wrong table multiply to it, and every other law is kept."""
    right, betas = own.from_betas, np.linspace(1e-3, 0.3, 60)
    np.save("b.npy", betas)
    (here / "own_betas.py").write_text("import numpy as np\ndef f(): return np.linspace(1e-3, 0.3, 60)\n")
    for arguments in (["--betas", "b.npy"], ["--python", "own_betas:f"]):
        assert call(*arguments) == 0
        assert "1 given betas" in capsys.readouterr().out
    monkeypatch.setattr(own, "from_betas", lambda *a, **k: Schedule(right(*a, **k).alpha_bar**2))
    for arguments in (["--betas", "b.npy"], ["--python", "own_betas:f"]):
        assert call(*arguments) == 1
        printed = capsys.readouterr().out
        assert "BROKEN  1 given betas: alpha_bar, product of 1 - beta as given" in printed and "1 broken" in printed


@settings(max_examples=25)
@given(st.lists(st.floats(1e-8, 1 - 1e-6), min_size=1, max_size=30), st.booleans())
def test_any_betas_give_the_table_of_their_product(betas, to_the_end):
    all_betas = [*betas, 1.0] if to_the_end else betas
    schedule = schedules.from_betas(all_betas, allow_signal=True)
    assert broken(verify.report(schedule, betas=all_betas)) <= {NOISE}
    # the last that is not 0, however small, is off by 1e-9 of itself
    wrong = schedule.alpha_bar * (1 - 1e-9 * (np.arange(schedule.T) == len(betas) - 1))
    assert "1 given betas" in broken(verify.report(Schedule(wrong), betas=all_betas))
    with pytest.raises(ValueError, match=rf"betas must be \({schedule.T},\) numbers"):
        verify.report(schedule, betas=[*all_betas, 0.5])


def test_eps_accepted_at_snr_0_breaks_law_5(monkeypatch):
    monkeypatch.setattr(gaussian, "_refuse_no_signal", lambda *a: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # of the division by zero that this lets through
        assert "5 zero terminal SNR" in broken(verify.report(schedules.flow_matching(50)))


def test_wrong_rows_and_wrong_betas_break_the_simulation(monkeypatch):
    """A table whose betas are not those of its alpha_bar."""
    monkeypatch.setattr(Schedule, "betas", property(lambda self: np.full(self.T, 0.05)))
    assert {"1 composition", "1 simulation", "2 any two times"} <= broken(verify.report(schedules.cosine(60)))


def test_a_law_that_raises_is_broken_and_hides_no_other(monkeypatch):
    def raises(*a, **k):
        raise ZeroDivisionError("float division by zero")
    monkeypatch.setattr(losses, "bound_weight", raises)
    report = verify.report(schedules.cosine(20))
    assert broken(report) == {"18 bound weights"}
    assert "ZeroDivisionError: float division by zero" in verify.table(report)


@pytest.mark.parametrize("status", [0, None, 3])
def test_code_that_asks_to_exit_breaks_its_law_and_ends_no_report(status, monkeypatch):
    def leaves(*a, **k):
        raise SystemExit(status)
    monkeypatch.setattr(losses, "bound_weight", leaves)
    assert broken(verify.report(schedules.cosine(20))) == {"18 bound weights"}
    row, = rows.computed(rows.Law("law", lambda: (leaves() for _ in range(1))))
    assert not row.passed and row.where == f"SystemExit: {status}"


def test_a_schedule_whose_table_asks_to_exit_has_status_2(here, capsys):
    (here / "own_exit.py").write_text(
        "from minidiff.diffusion.schedules import Schedule\n"
        "class S(Schedule):\n    betas = property(lambda self: (_ for _ in ()).throw(SystemExit(0)))\n"
        "def f(): return S([0.5, 0.01])\n")
    assert call("--python", "own_exit:f") == 2
    said = capsys.readouterr().err
    assert said == "minidiff: code that was run asked to exit, with status 0\n"


@pytest.mark.parametrize("wrong", [[0.1, 0.9], None, schedules.cosine, np.array([0.5])])
def test_a_report_of_no_schedule_is_refused(wrong):
    with pytest.raises(TypeError, match=r"^schedule must be a Schedule, such as schedules.from_betas\(\[...\]\), got "
                                        rf"{type(wrong).__name__}$"):
        verify.report(wrong)


def test_a_law_that_raises_keeps_the_rows_that_it_had():
    def rows_of():
        yield rows.compare("law", "first", 1.0, 1.0, 0.0, "")
        raise ZeroDivisionError
    assert [row.verdict for row in rows.computed(rows.Law("law", rows_of))] == ["kept", "BROKEN"]


def test_a_sampler_that_cannot_be_loaded_is_broken_and_hides_no_other(monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS._entries, "dpm++2m", None)
    rows_of = [row for row in verify.report(schedules.cosine(20)) if row.law == "26 no noise is left"]
    assert [(row.verdict, row.computed) for row in rows_of] == [
        ("kept", "spread at the end, on a point: ddpm, ddim, heun"),
        ("BROKEN", "spread at the end, on a point: dpm++2m")]


def test_docstrings_are_no_data(monkeypatch):
    """`python -OO` has none."""
    for law in verify.LAWS:
        monkeypatch.setattr(law.rows, "__doc__", None)
    monkeypatch.setattr(losses, "bound_weight", None)
    assert broken(verify.report(schedules.cosine(20))) == {"18 bound weights"}


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, signal, noise", [(3, 0.0, 1.0), (50, 2.0, 0.5), (2000, 0.0, 0.3), (10_000, 0.7, 1.0)])
def test_the_bound_on_a_variance_holds_and_is_not_wide(n, signal, noise):
    """Against scipy's noncentral chi squared: at most e^-17.4 on each side, and at most 2.5 times as wide as needed."""
    k, shift = n - 1, (n - 1) * signal / noise
    X = stats.ncx2(k, shift) if shift else stats.chi2(k)
    bound = forward.variance_bound(signal, noise, n)
    above, below = (signal + noise + bound) * k / noise, (signal + noise - bound) * k / noise
    assert X.sf(above) <= math.exp(-17.4) and X.cdf(below) <= math.exp(-17.4)
    needed = X.isf(math.exp(-17.4)) * noise / k - signal - noise
    assert bound < 2.5 * needed
    assert 2 * stats.norm.sf(forward.MEAN_SIGMAS) < 2.2e-8


def test_the_default_seed_draws_no_rare_number(monkeypatch):
    """Of the report and of the plot that the README shows first: no mean or variance beyond 3 standard errors."""
    schedule, drawn = schedules.cosine(), []
    def noted(schedule, x_0, count, t, rng, original=forward.simulate):
        mean, variance = original(schedule, x_0, count, t, rng)
        expected, v = gaussian.q_mean_variance(schedule, np.full(len(t), x_0), np.asarray(t))
        drawn.append(np.abs([(mean - expected) / np.sqrt(v / count), (variance / v - 1) / math.sqrt(2 / (count - 1))]))
        return mean, variance
    monkeypatch.setattr(forward, "chains", lambda T: 20_000)
    monkeypatch.setattr(watch, "chains", lambda T: 20_000)
    monkeypatch.setattr(forward, "simulate", noted)
    monkeypatch.setattr(watch, "simulate", noted)
    monkeypatch.setattr(verify, "LAWS", [law if law.name == "1 simulation" else rows.Law(law.name, lambda *_: [])
                                         for law in verify.LAWS])
    assert len(verify.report(schedule)) == 2
    watch.plot(schedule)
    assert [a.shape for a in drawn] == [(2, 8), (2, 25)] and max(a.max() for a in drawn) < 3


def test_no_number_is_minus_nothing():
    assert [watch._fixed(a, 4) for a in (-1e-9, -0.0, 0.0, 1e-9, -0.00006, -1.5, 0.99999)] == \
        ["0.0000", "0.0000", "0.0000", "0.0000", "-0.0001", "-1.5000", "1.0000"]
    schedule, x_0 = schedules.flow_matching(3), np.array([[[-1e-9], [0.0]]])
    assert "-0.00000" not in watch.table(watch.watch(schedule, x_0, 2)[:1])


def test_watched_errors_are_the_standard_errors():
    """Over 1500 walks of a small image: spread and mean of the measured statistics, within 6 of their own errors."""
    x_0 = np.random.default_rng(0).uniform(-1, 1, (4, 5, 1))
    schedule, n = schedules.cosine(10), 1500
    walks = [watch.watch(schedule, x_0, 3, seed=seed) for seed in range(n)]
    for i in (1, 2):
        states = [walk[i] for walk in walks]
        for measured, expected, error in (("mean", "expected_mean", "mean_error"),
                                          ("variance", "expected_variance", "variance_error")):
            a = np.array([getattr(w, measured) for w in states])
            said = getattr(states[0], error)
            assert abs(a.mean() - getattr(states[0], expected)) < 6 * said / math.sqrt(n)
            # a chi squared of 19 degrees has kurtosis below 1: its deviation errs by less than .9 / sqrt(n)
            assert abs(a.std() / said - 1) < 6 * 0.9 / math.sqrt(n)
    assert walks[0][0].mean == x_0.mean() and walks[0][0].variance_bound == 0
    assert all(row.passed for row in watch.rows(walks[0], 0))


# ---- the command -------------------------------------------------------------------------------------------


def call(*arguments) -> int:
    try:
        return cli.main(["verify", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("own_")]:
        del sys.modules[name]


BETAS = np.linspace(1e-3, 0.2, 60)


def test_the_default_is_cosine_with_1000_times(monkeypatch, capsys):
    monkeypatch.setattr(forward, "chains", lambda T: 500)
    assert call() == 0
    printed = capsys.readouterr().out
    assert "the cosine schedule; T = 1000" in printed and "0 broken" in printed


def test_help_names_every_option(capsys):
    assert call("--help") == 0
    printed = capsys.readouterr().out
    for option in ("--schedule", "-T", "--betas", "--alpha-bar", "--python", "--seed", "--plot", "--watch", "--json"):
        assert option in printed


def test_a_schedule_that_keeps_signal_has_exit_status_1(capsys):
    assert call("--schedule", "linear", "-T", 50) == 1
    printed = capsys.readouterr().out
    assert "BROKEN  4 ends in noise" in printed and "alpha_bar[49]" in printed


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_shortest_schedules_are_verified_or_refused(name, T, capsys):
    status = call("--schedule", name, "-T", T)
    said = capsys.readouterr()
    if name == "log_snr_linear" and T == 1:
        assert status == 2 and "T must be at least 2, got 1" in said.err
    else:
        assert status == (1 if "BROKEN  4 ends in noise" in said.out else 0)
        assert ("needs two times, T >= 2" in said.out) == (T == 1)


def test_betas_from_every_kind_of_file_are_the_same(here, capsys):
    np.save("b.npy", BETAS)
    (here / "lines.csv").write_text("beta\n" + "\n".join(map(repr, BETAS.tolist())) + "\n")
    (here / "row.csv").write_text(", ".join(map(repr, BETAS.tolist())))
    (here / "bom.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(repr, BETAS.tolist())).encode())
    (here / "list.json").write_text(json.dumps(BETAS.tolist()))
    (here / "object.json").write_text(json.dumps({"T": 60, "betas": BETAS.tolist()}))
    expected = schedules.from_betas(BETAS).alpha_bar
    for name, how in [("b.npy", "60 numbers of dtype float64"),
                      ("lines.csv", "60 numbers, one a line, after the header 'beta'"),
                      ("row.csv", "60 numbers, in one line"), ("bom.txt", "60 numbers, one a line"),
                      ("list.json", "a list of 60 numbers"), ("object.json", 'the list "betas" of 60 numbers')]:
        schedule, said, betas = own.from_file(here / name, "betas")
        np.testing.assert_array_equal(schedule.alpha_bar, expected)
        np.testing.assert_array_equal(betas, BETAS)
        assert said.endswith(how)
    assert call("--betas", "lines.csv") == 0
    assert "one a line, after the header" in capsys.readouterr().out
    np.save("a.npy", expected.astype(np.float32))
    assert call("--alpha-bar", "a.npy") == 0
    assert own.from_file("a.npy", "alpha_bar").betas is None


def test_a_function_may_return_betas_or_a_schedule(here, capsys):
    (here / "own_good.py").write_text(
        "import numpy as np\nfrom minidiff.diffusion import schedules\n"
        "def listed(): return [0.1, 0.3, 0.99]\ndef array(): return np.linspace(.01, .3, 40)\n"
        "def schedule(): return schedules.zero_terminal_snr(schedules.cosine(30))\n")
    before = list(sys.path)
    for name in ("listed", "array", "schedule"):
        assert call("--python", f"own_good:{name}") == 0, name
    assert "the schedule 'cosine, zero terminal SNR' from own_good:schedule()" in capsys.readouterr().out
    assert sys.path == before


@pytest.mark.parametrize("option", ["--betas", "--alpha-bar", "--python"])
def test_a_table_of_ones_own_that_keeps_signal_is_verified_and_fails_by_that_law(here, option, capsys):
    (here / "b.csv").write_text("0.3\n0.2\n")
    (here / "own_signal.py").write_text("def f(): return [0.3, 0.2]\n")
    assert call(option, "own_signal:f" if option == "--python" else "b.csv") == 1
    printed = capsys.readouterr().out
    assert printed.count("\nBROKEN  ") == 1 and "BROKEN  4 ends in noise: alpha_bar[1]" in printed


def test_falling_betas_are_noted_and_no_failure(here, capsys):
    (here / "b.json").write_text(json.dumps([0.5, 0.4, 0.9, 0.8]))
    assert call("--betas", "b.json") == 0
    assert "note: betas fall at t = 1, from 0.5 to 0.4, and at 1 more times" in capsys.readouterr().out
    assert own.notes(schedules.linear()) == [] and own.notes(schedules.flow_matching()) == []


def test_modules_are_loaded_from_the_current_folder_first_and_the_path_is_left_alone(here, monkeypatch):
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(sys, "path", [str(elsewhere), *sys.path])
    before = list(sys.path)
    for folder, said in ((elsewhere, "there"), (here, "here")):
        (folder / "own_twice.py").write_text(f"where = {said!r}\n")
    (here / "own_package").mkdir()
    (here / "own_package" / "inner.py").write_text("value = 5\n")
    (here / "own_tidy.py").write_text("import os, sys\nsys.path.remove(os.getcwd())\nvalue = 6\n")
    assert load_named("own_twice:where", "--x") == "here"
    assert load_named("own_package.inner:value", "--x") == 5 and load_named("own_tidy:value", "--x") == 6
    assert load_named("numpy.random:default_rng", "--x") is np.random.default_rng
    assert sys.path == before


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def write_files(folder):
    (folder / "empty.csv").write_text("")
    (folder / "blank.json").write_text(" \n")
    (folder / "header.csv").write_text("beta\n")
    (folder / "nothing.json").write_text("[]")
    np.save(folder / "zero.npy", np.zeros(0))
    np.save(folder / "pickle.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.save(folder / "square.npy", np.full((3, 3), 0.1))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "complex.npy", np.array([0.1j]))
    whole = (folder / "square.npy").read_bytes()
    (folder / "cut.npy").write_bytes(b"\x93NUMPY" + whole[6:40])
    header = np.lib.format.header_data_from_array_1_0(np.zeros(1)) | {"shape": (10**5,)}
    with open(folder / "promise.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with open(folder / "huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (10**15,)})
    (folder / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(99))
    (folder / "noise.npy").write_bytes(bytes(range(256)))
    for name, value in {"nan": math.nan, "inf": math.inf, "zero": 0.0, "one": 1.0, "minus": -0.1, "more": 1.5,
                        "tiny": 1e-18}.items():
        b = BETAS.copy()
        b[17] = value
        (folder / f"{name}.csv").write_text("\n".join(map(str, b)))
    (folder / "nan.json").write_text("[0.1, NaN]")
    (folder / "word.csv").write_text("0.1\n0.2\nlots\n")
    (folder / "columns.csv").write_text("t,beta\n0,0.1\n1,0.2\n")
    (folder / "comma.csv").write_text("beta\n0,0001\n0,02\n,5\n")
    (folder / "string.json").write_text('"0.1"')
    (folder / "null.json").write_text("null")
    (folder / "digits.json").write_text("[0.1, 1" + "0" * 5000 + "]")
    (folder / "alphas.csv").write_text("0.999\n" * 200)
    (folder / "latin.csv").write_bytes(b"0.1\n\xff\xfe\n")
    (folder / "word.json").write_text('[0.1, "0.2"]')
    (folder / "bool.json").write_text("[0.1, true]")
    (folder / "integer.json").write_text("[0.1, 1" + "0" * 400 + "]")
    (folder / "other.json").write_text('{"beta": [0.1]}')
    (folder / "number.json").write_text("0.1")
    (folder / "broken.json").write_text("[0.1,")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "long.csv").write_text("1e-9\n" * 100_001)
    (folder / "large.csv").write_bytes(b"0" * (9 << 20))
    (folder / "rising.csv").write_text("0.9\n0.5\n0.6\n0.1\n")
    (folder / "betas.mat").write_text("0.1")
    (folder / "folder.csv").mkdir()
    (folder / "own_bad.py").write_text(
        "import sys\nnumber = 3\n"
        "def raises(): raise RuntimeError('no\\nluck')\ndef leaves(): sys.exit(7)\ndef none(): pass\n"
        "def words(): return ['a']\ndef ragged(): return [[1], [1, 2]]\ndef square(): return [[0.1]]\n"
        "def empty(): return []\ndef nan(): return [0.1, float('nan')]\ndef one(x): return x\n")
    (folder / "own_syntax.py").write_text("def f(:\n")
    (folder / "own_raising.py").write_text("1 / 0\n")
    (folder / "own_importing.py").write_text("import own_nowhere\n")
    (folder / "own_leaving.py").write_text("raise SystemExit(3)\n")
    (folder / "own_lazy.py").write_text("def __getattr__(name): raise RuntimeError('not now')\n")


BAD = {
    "T of 0": (["-T", "0"], "takes a whole number from 1 to 100000, not '0'"),
    "T of letters": (["-T", "many"], "takes a whole number"),
    "a negative T": (["-T", "-5"], "takes a whole number"),
    "a T beyond reason": (["-T", "1000000000"], "takes a whole number"),
    "T with a table": (["-T", "5", "--betas", "nan.csv"], "-T is read only with --schedule"),
    "an unknown schedule": (["--schedule", "sigmoid"], "there is no schedule 'sigmoid'"),
    "two schedules": (["--schedule", "linear", "--betas", "nan.csv"], "not allowed with"),
    "a negative seed": (["--seed", "-1"], "takes a whole number"),
    "no such file": (["--betas", "nowhere.csv"], "'nowhere.csv' cannot be read: No such file"),
    "a folder": (["--betas", "folder.csv"], "an ordinary file is taken"),
    "an unknown ending": (["--betas", "betas.mat"], "takes one of the endings .npy, .csv, .txt, .json"),
    "an empty file": (["--betas", "empty.csv"], "the file is empty"),
    "a blank file": (["--betas", "blank.json"], "the file is empty"),
    "a header alone": (["--betas", "header.csv"], "holds no number"),
    "an empty list": (["--betas", "nothing.json"], "T = 0 is no schedule"),
    "an empty array": (["--betas", "zero.npy"], "T = 0 is no schedule"),
    "a pickle": (["--betas", "pickle.npy"], "it holds pickled objects"),
    "a square": (["--betas", "square.npy"], "an array of float64, shape (3, 3)"),
    "an array of words": (["--betas", "words.npy"], "numbers of shape (T,) are taken"),
    "complex betas": (["--betas", "complex.npy"], "an array of complex128"),
    "a cut header": (["--betas", "cut.npy"], "no .npy file that numpy.save wrote"),
    "a cut array": (["--betas", "promise.npy"], "ends before the 100000 numbers"),
    "a header of 10^15 numbers": (["--betas", "huge.npy"], "1,000,000,000,000,000 numbers, and at most 100,000"),
    "an archive": (["--betas", "zip.npy"], "no .npy file"),
    "bytes": (["--betas", "noise.npy"], "no .npy file"),
    "NaN": (["--betas", "nan.csv"], "betas[17] = nan"),
    "infinity": (["--betas", "inf.csv"], "betas[17] = inf"),
    "a beta of 0": (["--betas", "zero.csv"], "must lie in (0, 1), where only the last may be 1, got betas[17] = 0.0"),
    "a beta of 1 before the last": (["--betas", "one.csv"], "betas[17] = 1.0"),
    "a negative beta": (["--betas", "minus.csv"], "betas[17] = -0.1"),
    "a beta above 1": (["--betas", "more.csv"], "betas[17] = 1.5"),
    "a beta lost in rounding": (["--betas", "tiny.csv"], "betas[17] = 1e-18 is lost in rounding"),
    "NaN in JSON": (["--betas", "nan.json"], "betas[1] = nan"),
    "a word": (["--betas", "word.csv"], "line 3 holds 'lots', which is no number"),
    "columns": (["--betas", "columns.csv"], "line 2 holds 2 values: one column of betas is taken"),
    "decimal commas": (["--betas", "comma.csv"], "line 2 holds '0,0001': is that a decimal comma? A point is taken"),
    "alphas for betas": (["--betas", "alphas.csv"], "so large that alpha_bar underflows at t = 107 (if they are "
                                                    "alphas, pass 1 - alpha)"),
    "an integer of 5000 digits": (["--betas", "digits.json"], "'digits.json': it holds an integer too large for"),
    "a string in JSON": (["--betas", "string.json"], "it holds a string"),
    "null in JSON": (["--betas", "null.json"], "it holds null: [numbers] is taken"),
    "-T with a scheduler": (["--scheduler", "minidiff:ddim", "-T", "5"],
                            "-T is not read with --scheduler, which brings its own times"),
    "a plot of a scheduler": (["--scheduler", "minidiff:ddim", "--plot", "p.png"],
                              "--plot is not read with --scheduler: it plots the marginals of a schedule"),
    "a picture for a scheduler": (["--scheduler", "minidiff:ddim", "--watch", "p.png"],
                                  "--watch is not read with --scheduler: it adds noise by a schedule"),
    "-o for a scheduler": (["--scheduler", "minidiff:ddim", "-o", "p.png"],
                           "--out is not read with --scheduler: it names the picture of --watch"),
    "no UTF-8": (["--betas", "latin.csv"], "no text in UTF-8"),
    "a word in JSON": (["--betas", "word.json"], "betas[1] is '0.2', which is no number"),
    "true in JSON": (["--betas", "bool.json"], "betas[1] is True, which is no number"),
    "a huge integer in JSON": (["--betas", "integer.json"], "too large for a float"),
    "an object without betas": (["--betas", "other.json"], 'without "betas"'),
    "a number in JSON": (["--betas", "number.json"], "it holds a number"),
    "broken JSON": (["--betas", "broken.json"], "it is no JSON"),
    "deep JSON": (["--betas", "deep.json"], "it is no JSON"),
    "too many numbers": (["--betas", "long.csv"], "100,001 numbers, and at most 100,000"),
    "too large a file": (["--betas", "large.csv"], "larger than 8 MB"),
    "an alpha_bar that rises": (["--alpha-bar", "rising.csv"], "got alpha_bar[1] = 0.5 and alpha_bar[2] = 0.6"),
    "no function": (["--python", "own_bad"], "--python takes MODULE:NAME"),
    "an odd name": (["--python", "own_bad:f()"], "--python takes MODULE:NAME"),
    "no such module": (["--python", "own_nowhere:f"], "own_nowhere is not installed, and there is no own_nowhere.py"),
    "no such part of a module": (["--python", "numpy.nothing:f"], "cannot be imported: ModuleNotFoundError"),
    "a module that imports one that is not there": (["--python", "own_importing:f"], "No module named 'own_nowhere'"),
    "a module that exits": (["--python", "own_leaving:f"], "module own_leaving cannot be imported: SystemExit: 3"),
    "a name that fails when it is asked for": (["--python", "own_lazy:f"], "own_lazy cannot be imported: RuntimeError"),
    "no such function": (["--python", "own_bad:f"], "module own_bad has no f"),
    "no function but a number": (["--python", "own_bad:number"], "own_bad:number is of the type int"),
    "a syntax error": (["--python", "own_syntax:f"], "cannot be imported: SyntaxError"),
    "a module that raises": (["--python", "own_raising:f"], "cannot be imported: ZeroDivisionError: division by zero"),
    "a function that raises": (["--python", "own_bad:raises"], "own_bad:raises() raised RuntimeError: no luck"),
    "a function that exits": (["--python", "own_bad:leaves"], "raised SystemExit: 7"),
    "a function of one argument": (["--python", "own_bad:one"], "raised TypeError"),
    "a function that returns nothing": (["--python", "own_bad:none"], "returned a NoneType"),
    "a function that returns words": (["--python", "own_bad:words"], "returned an array of <U1"),
    "a ragged list": (["--python", "own_bad:ragged"], "returned a list that is not all numbers"),
    "a function that returns a square": (["--python", "own_bad:square"], "shape (1, 1)"),
    "a function that returns an empty list": (["--python", "own_bad:empty"], "T = 0 is no schedule"),
    "a function that returns NaN": (["--python", "own_bad:nan"], "betas[1] = nan"),
    "a plot that cannot be written": (["--plot", "nowhere/p.png"], "a folder that does not exist"),
    "a plot of unknown kind": (["--plot", "p.svg"], "takes one of the endings"),
    "JSON of unknown kind": (["--json", "r.txt"], "takes one of the endings .json"),
    "-o without --watch": (["-o", "w.png"], "-o is read only with --watch"),
    "one file for two pictures": (["--plot", "watch.png", "--watch", "nan.csv"], "name two files"),
    "a picture that is not there": (["--watch", "nowhere.png"], "'nowhere.png' is not there"),
    "a picture that is none": (["--watch", "nan.csv"], "is no picture that can be read"),
    "a folder for a picture": (["--watch", "folder.csv"], "is a folder or device"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_files(folder)
    return folder


@pytest.mark.parametrize("arguments, sentence", BAD.values(), ids=BAD.keys())
def test_a_mistake_is_one_sentence_and_status_2(arguments, sentence, here, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = sorted(bad_files.iterdir())
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("minidiff: ") and said.err.count("\n") == 1, said.err
    assert sentence in said.err and "Traceback" not in said.err
    assert sorted(bad_files.iterdir()) == before


# ---- pictures ----------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path):
    x = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    Image.fromarray(x).save(tmp_path / "x0.png")
    return tmp_path / "x0.png"


def test_plot_and_watch_write_pictures_and_json(here, image, capsys):
    assert call("--schedule", "cosine", "-T", 40, "--plot", "out.png", "--watch", image, "--json", "r.json",
                "--seed", 5) == 0
    with Image.open("out.png") as plot, Image.open("watch.png") as watched:
        assert plot.width > 1000 and len(plot.getcolors(1 << 20)) > 20
        assert watched.width > 700 and len(watched.getcolors(1 << 20)) > 100
    printed = capsys.readouterr().out
    for word in ("closed form", "watch.png", "out.png", "mean over the pixels", "+-"):
        assert word in printed
    saved = json.loads((here / "r.json").read_text())
    assert saved["schedule"] == "cosine" and saved["T"] == 40
    assert {row["verdict"] for row in saved["rows"]} == {"kept", "skipped"}
    assert sorted(p.name for p in here.iterdir()) == ["out.png", "r.json", "watch.png", "x0.png"]


CLASHES = [
    (["--betas", "b.json", "--json", "b.json"], "--betas and --json are both 'b.json'"),
    (["--betas", "b.json", "--json", "link.json"], "--betas and --json are both 'link.json'"),
    (["--betas", "b.json", "--json", "../{}/b.json"], "--betas and --json are both '../"),
    (["--alpha-bar", "b.json", "--json", "b.json"], "--alpha-bar and --json are both"),
    (["-T", "50", "--watch", "x0.png", "-o", "x0.png"], "--watch and --out are both 'x0.png'"),
    (["-T", "50", "--watch", "watch.png"], "--watch and --out are both 'watch.png'"),
    (["-T", "50", "--watch", "x0.png", "--plot", "x0.png"], "--watch and --plot are both 'x0.png'"),
    (["-T", "50", "--watch", "x0.png", "-o", "p.png", "--plot", "./p.png"], "--plot and --out are both 'p.png'"),
]


@pytest.mark.parametrize("arguments, sentence", CLASHES)
def test_no_output_is_written_over_an_input_or_another_output(arguments, sentence, here, image, capsys):
    (here / "b.json").write_text("[0.5, 0.99]")
    (here / "link.json").symlink_to("b.json")
    (here / "watch.png").write_bytes(image.read_bytes())
    before = {path: path.read_bytes() for path in here.iterdir()}
    assert call(*(a.format(here.name) for a in arguments)) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.endswith(": name two files\n") and said.err.count("\n") == 1
    assert not said.out and {path: path.read_bytes() for path in here.iterdir()} == before


def test_a_function_that_changes_folder_moves_no_output(here, image):
    (here / "away").mkdir()
    (here / "own_mover.py").write_text("import os\ndef f():\n    os.chdir('away')\n    return [0.5, 0.99]\n")
    assert call("--python", "own_mover:f", "--plot", "p.png", "--watch", "x0.png", "--json", "r.json") == 0
    assert not list((here / "away").iterdir()) and all((here / n).is_file() for n in ("p.png", "watch.png", "r.json"))


def test_json_says_the_seed_and_where_the_numbers_came_from(here):
    (here / "b.json").write_text("[0.5, 0.99]")
    for arguments, source in ((["--betas", "b.json"], "betas from 'b.json': a list of 2 numbers"),
                              (["-T", 20], "the cosine schedule")):
        assert call(*arguments, "--seed", 9, "--json", "r.json") == 0
        saved = json.loads((here / "r.json").read_text())
        assert (saved["source"], saved["seed"]) == (source, 9)
        assert {row["side"] for row in saved["rows"] if row["law"] == NOISE} == {"<="}
    assert verify.as_dict(schedules.cosine(5), [])["source"] is None


def test_watch_draws_an_animation(here, image):
    assert call("--schedule", "cosine", "-T", 60, "--watch", image, "-o", "w.gif") == 0
    with Image.open("w.gif") as animation:
        assert animation.format == "GIF" and animation.n_frames == 37


@pytest.mark.parametrize("name", [*SCHEDULES, "one"])
def test_every_schedule_can_be_drawn(name):
    T = 1 if name == "one" else 3
    schedule = schedules.schedule_from("flow_matching" if name == "one" else name, T, allow_signal=True)
    assert watch.plot(schedule).height > 100
    states = watch.watch(schedule, np.zeros((1, 2, 1)))
    assert [w.t for w in states] == list(range(-1, T)) and watch.picture(schedule, states).width > 100


def test_a_wrong_step_breaks_the_watch(here, image, monkeypatch, capsys):
    right = gaussian.q_step
    monkeypatch.setattr(gaussian, "q_step", lambda *a: (right(*a)[0], 0.8 * right(*a)[1]))
    assert call("-T", 40, "--watch", image) == 1
    assert "BROKEN  watch: variance over the pixels" in capsys.readouterr().out


@pytest.mark.parametrize("mode, channels", [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3),
                                            ("CMYK", 3), ("I;16", 1)])
def test_pictures_of_every_kind_are_read(tmp_path, mode, channels):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        Image.fromarray(np.array([[0, 65535], [32768, 257]], np.uint16)).save(path)
        np.testing.assert_array_equal(watch.load_image(path)[..., 0] > 0, [[False, True], [True, False]])
    else:
        Image.new("L", (300, 200), 255).convert(mode).save(path)
        x = watch.load_image(path)
        assert x.shape == (85, 128, channels) and (x == 1).all()


@pytest.mark.parametrize("damage, sentence", [
    (lambda path: Image.new("L", (1, 1)).save(path), "a single grey pixel"),
    (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read as a picture"),
    (lambda path: path.write_bytes(b""), "no picture that can be read"),
    (lambda path: Image.new("1", (9000, 9000)).save(path), "at most 50 million"),
    (lambda path: path.write_bytes(path.read_bytes()[:16] + b"\x00\x00\x90\x00" * 2 + path.read_bytes()[24:29]
                                   + zlib.crc32(b"IHDR" + b"\x00\x00\x90\x00" * 2 + path.read_bytes()[24:29])
                                   .to_bytes(4, "big") + path.read_bytes()[33:]), "too many pixels"),
    (lambda path: Image.new("I", (4, 4)).save(path.with_suffix(".tif")) or path.with_suffix(".tif").rename(path),
     "32-bit pixels"),
])
def test_pictures_that_cannot_be_watched(image, damage, sentence):
    damage(image)
    with pytest.raises(UserError, match=sentence) as caught:
        watch.load_image(image)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_plot(here, monkeypatch, capsys):
    (here / "out.png").write_bytes(b"the old picture")
    monkeypatch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert call("-T", 20, "--schedule", "cosine", "--plot", "out.png") == 2
    assert "No space left" in capsys.readouterr().err and (here / "out.png").read_bytes() == b"the old picture"
