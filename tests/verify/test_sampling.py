"""Samplers: planted bugs are found, and a user's own sampler is judged by its entry."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support.verifying import broken

from minidiff import verify
from minidiff.diffusion import consistency, gaussian, multistep, samplers, schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.gaussian import v_from_x0
from minidiff.engine.random import SampleStreams
from minidiff.verify.scheduler.laws import report
from minidiff.verify.scheduler.replay import of_sampler

# Each bug changes one formula; the report must break the law of this formula.
DDPM, DDIM, HEUN, TWO_M = samplers.ddpm, samplers.ddim, samplers.heun, samplers.dpm_solver_pp_2m


def ddim_without_root(denoiser, x_T, times, cond=None, *, eta=0.0, streams=None):
    """The direction with sigma_s in place of sqrt(sigma_s^2 - sigma^2)."""
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in samplers.steps_along(schedule, times):
        alpha_s, sigma_s = samplers.alpha_sigma(schedule, s)
        x0_hat = samplers.denoise(denoiser, x_t, t, cond)
        eps_hat = gaussian.eps_from_x0(schedule, x_t, t, x0_hat)
        sigma = eta * math.sqrt(samplers.beta_tilde(schedule, t, s))
        x_t = alpha_s * x0_hat + sigma_s * eps_hat + (sigma * samplers.standard_normal(streams, x_t) if sigma else 0)
        yield samplers.State(step, s, x_t, x0_hat)


def euler(denoiser, x_T, times, cond=None):
    """Heun without its second slope."""
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in samplers.steps_along(schedule, times):
        x0_hat = samplers.denoise(denoiser, x_t, t, cond)
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
        for step, t, s in samplers.steps_along(denoiser.schedule, times):
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
    """Its states have the right times, but the network gets other times."""
    def network(x_t, t, cond):
        return denoiser(x_t, np.maximum(t - 1, 0), cond)
    return DDIM(NetworkDenoiser(denoiser.schedule, "x0", network), x_T, times, cond, **options)


def ddpm_with(power):
    """ddpm whose noise is multiplied by `power` of the variance in place of its root."""
    def wrong(denoiser, x_T, times, cond=None, *, streams, variance=samplers.beta_tilde):
        return DDPM(denoiser, x_T, times, cond, streams=streams,
                             variance=lambda schedule, t, s: power(variance(schedule, t, s)) ** 2)
    return wrong


def two_m(D_of, power=0.0, noise=0.0):
    """DPM-Solver++(2M), or its SDE, with another D, of (x0_hat, x0_before, h, h_before).

    x_s = sigma_s / sigma_t e^{-power h} x_t + alpha_s (1 - e^{-(1 + power) h}) D, and noise times that of the SDE.
    """
    def wrong(denoiser, x_T, times, cond=None, *, streams=None):
        schedule, x_t, before, h_before = denoiser.schedule, x_T, None, None
        for step, t, s in samplers.steps_along(schedule, times):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = (samplers.alpha_sigma(schedule, u) for u in (t, s))
            e_h = sigma_s * alpha_t / (alpha_s * sigma_t)
            h = -math.log(e_h) if e_h > 0 else math.inf
            x0_hat = samplers.denoise(denoiser, x_t, t, cond)
            D = x0_hat if step == 1 or s == -1 else D_of(x0_hat, before, h, h_before)
            x_t = sigma_s / sigma_t * e_h**power * x_t + alpha_s * (1 - e_h ** (1 + power)) * D
            if noise and s >= 0:
                x_t = x_t + noise * sigma_s * math.sqrt(1 - e_h**2) * samplers.standard_normal(streams, x_t)
            before, h_before = x0_hat, h
            yield samplers.State(step, s, x_t, x0_hat)
    return wrong


def two_m_sde(D_of, power=1.0, noise=1.0):
    return two_m(D_of, power, noise)


def lcm_with(x_s_of):
    """Consistency sampling with another x_s, of (x0_hat, z, (alpha_t, sigma_t), (alpha_s, sigma_s))."""
    def wrong(denoiser, x_T, times, cond=None, *, streams):
        schedule, x_t = denoiser.schedule, x_T
        for step, t, s in samplers.steps_along(schedule, times):
            x0_hat, z = samplers.denoise(denoiser, x_t, t, cond), samplers.standard_normal(streams, x_t)
            x_t = x_s_of(x0_hat, z, *(samplers.alpha_sigma(schedule, u) for u in (t, s))) if s >= 0 else x0_hat
            yield samplers.State(step, s, x_t, x0_hat)
    return wrong


def with_weights(sampler, shares):
    """lms or plms with other weights for the slopes, by how many there are."""
    def wrong(denoiser, x_T, times, cond=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(multistep, "mean_of_polynomial", lambda nodes, low, high: shares(len(nodes)))
            patch.setattr(multistep, "ADAMS_BASHFORTH", {n: shares(n) for n in (1, 2, 3, 4)})
            yield from sampler(denoiser, x_T, times, cond)
    return wrong


def right_D(x0_hat, before, h, h_before):
    return x0_hat + h / (2 * h_before) * (x0_hat - before)


def euler_with_noise_on_top(denoiser, x_T, times, cond=None, *, streams, variance=None):
    """A step of Euler's to s, and only then noise: exact on N(0, 1), where v = 0, and wrong on all other data."""
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in samplers.steps_along(schedule, times):
        x0_hat = samplers.denoise(denoiser, x_t, t, cond)
        if s >= 0:
            up = samplers.beta_tilde(schedule, t, s) / 4
            v = v_from_x0(schedule, x_t, t, x0_hat)
            x_s = x_t + (samplers.angle(schedule, s) - samplers.angle(schedule, t)) * v
            x_t = math.sqrt(1 - up) * x_s + math.sqrt(up) * samplers.standard_normal(streams, x_t)
        else:
            x_t = x0_hat
        yield samplers.State(step, s, x_t, x0_hat)


def from_x0_hat_anew(denoiser, x_T, times, cond=None, *, streams, variance=None):
    """x_s is drawn from q(x_s | x0_hat), as a consistency model's: exact on a point, and wrong on all other data."""
    return lcm_with(lambda x0_hat, z, at_t, at_s: at_s[0] * x0_hat + at_s[1] * z)(
        denoiser, x_T, times, cond, streams=streams)


# The rows that must be broken, by `computed`.
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
    "noise on top of a step to s": ("23 marginals", (MARGINALS + "ddpm",), "ddpm", euler_with_noise_on_top),
    "noise in place of a step": ("23 marginals", (MARGINALS + "ddpm",), "ddpm", from_x0_hat_anew),
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
    "2M SDE without noise": ("26 the end", (ENTRY,), "dpm++2m-sde",
                             lambda d, x, ts, cond=None, *, streams: TWO_M(d, x, ts, cond)),
    "2M SDE with half the noise": ("23 marginals", (MARGINALS + "dpm++2m-sde",), "dpm++2m-sde",
                                   two_m_sde(right_D, noise=0.5)),
    "2M SDE with the steps of the ODE": ("23 marginals", (MARGINALS + "dpm++2m-sde",), "dpm++2m-sde",
                                         two_m_sde(right_D, power=0.0)),
    "2M SDE with r upside down": ("25 second order", (MIDDLE + "-sde",), "dpm++2m-sde",
                                  two_m_sde(lambda x, before, h, h_before: right_D(x, before, h_before, h))),
    "2M SDE of first order": ("25 second order", (MIDDLE + "-sde",), "dpm++2m-sde",
                              two_m_sde(lambda x, before, h, h_before: x)),
    "UniPC of first order": ("25 order", (ORDER + "unipc",), "unipc", lambda d, x, ts, cond=None: DDIM(d, x, ts, cond)),
    "LMS of first order": ("25 order", (ORDER + "lms",), "lms",
                           with_weights(multistep.lms, lambda n: [1, *[0] * (n - 1)])),
    "LMS whose weights do not sum to 1": ("23 marginals", (MARGINALS + "lms",), "lms",
                                          with_weights(multistep.lms, lambda n: [1, *[0.1] * (n - 1)])),
    "PLMS whose weights do not sum to 1": ("23 marginals", (MARGINALS + "plms",), "plms",
                                           with_weights(multistep.plms, lambda n: [1, *[0.1] * (n - 1)])),
    "PLMS with a third call": ("26 the end", (ENTRY,), "plms", lambda d, x, ts, cond=None: HEUN(d, x, ts, cond)),
    "LCM with the noise of time t": ("23 marginals", (MARGINALS + "lcm",), "lcm", lcm_with(
        lambda x0_hat, z, at_t, at_s: at_s[0] * x0_hat + at_t[1] * z)),
    "LCM with the variance for its root": ("23 marginals", (MARGINALS + "lcm",), "lcm", lcm_with(
        lambda x0_hat, z, at_t, at_s: at_s[0] * x0_hat + at_s[1] ** 2 * z)),
    "noise at the end": ("26 the end", (LEFT,), "dpm++2m", residual_noise),
    "noise at the end, called x0_hat": ("26 the end", (LEFT,), "ddpm", residual_noise_denied),
    "an x0_hat that is not the answer": ("26 the end", ("samplers that show an x0_hat of their own",), "heun",
                                   x0_hat_of_its_own),
    "states that name other times": ("26 the end", (ASTRAY,), "dpm++2m", one_time_late),
    "a network that gets other times": ("26 the end", (ASTRAY,), "ddim", asks_one_time_late),
}


def plant(monkeypatch, name, bug):
    """Replaces a sampler's function in the module and in its entry; the rest of the entry stays."""
    entry = samplers.SAMPLERS[name]
    module = next(m for m in (samplers, multistep, consistency) if hasattr(m, entry.function.__name__))
    monkeypatch.setattr(module, entry.function.__name__, bug)
    monkeypatch.setitem(samplers.SAMPLERS._entries, name, replace(entry, function=bug))


@pytest.mark.slow
@pytest.mark.parametrize("law, words, name, bug", PLANTED_SAMPLERS.values(), ids=PLANTED_SAMPLERS.keys())
def test_a_planted_sampler_breaks_its_law(law, words, name, bug, monkeypatch):
    plant(monkeypatch, name, bug)
    report = verify.report(schedules.cosine(60))
    found = {row.computed for row in report if row.law == law and row.verdict == verify.BROKEN}
    assert set(words) <= found and "could not be computed" not in verify.table(report), verify.table(report)


def test_the_copies_of_2m_without_a_bug_keep_every_law(monkeypatch):
    plant(monkeypatch, "dpm++2m", two_m(right_D))
    plant(monkeypatch, "dpm++2m-sde", two_m_sde(right_D))
    assert broken(verify.report(schedules.cosine(60))) == set()


def test_a_sampler_that_cannot_be_loaded_is_broken_and_hides_no_other(monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS._entries, "dpm++2m", None)
    rows_of = [row for row in verify.report(schedules.cosine(20)) if row.law == "26 no noise is left"]
    assert [(row.verdict, row.computed) for row in rows_of] == [
        ("kept", "spread at the end, on a point: ddpm, ddim, heun, dpm++2m-sde, unipc, plms, lms, lcm"),
        ("BROKEN", "spread at the end, on a point: dpm++2m")]


@pytest.mark.slow
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("name", ["cosine", "linear", "scaled_linear", "even_loss", "vp_sde"])
def test_right_noise_keeps_its_law_whatever_the_schedule_and_the_list(name, spacing):
    schedule = schedules.SCHEDULES[name](1000)
    for sampler in ("ddpm", "dpm++2m-sde", "lcm"):
        scheduler = of_sampler(samplers.SAMPLERS[sampler], schedule, "x0", spacing)
        row, = [row for row in report(scheduler) if row.law == "23 marginals"]
        assert row.verdict == verify.KEPT, (sampler, row)


@pytest.mark.parametrize("bug", [euler_with_noise_on_top, from_x0_hat_anew])
def test_wrong_noise_is_not_kept_on_a_short_schedule(bug, registered):
    """Where T has no room to measure an order, the long table judges a sampler that is registered."""
    name = registered(bug, order=1, noise=True)
    report = verify.report(schedules.cosine(60))
    assert {row.law for row in report if row.verdict == verify.BROKEN and name in row.computed} == {"23 marginals"}


def test_a_sampler_that_ends_with_an_error_is_named(registered):
    def dividing(denoiser, x_T, times, cond=None):
        yield samplers.State(1, times[0], x_T, 1 / 0)
    name = registered(dividing, order=1)
    row, = [row for row in verify.report(schedules.cosine(20)) if row.law == "26 the end"]
    assert row.verdict == verify.BROKEN and f"the sampler '{name}' ended with an error" in verify.table([row])


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
    """Second order; the second call is at the table's time in the middle of the step."""
    schedule, x_t = denoiser.schedule, x_T
    for step, t, s in samplers.steps_along(schedule, times):
        x0_hat = samplers.denoise(denoiser, x_t, t, cond)
        if s >= 0:
            m = (s + t) // 2
            (phi_t, phi_m, phi_s) = (samplers.angle(schedule, u) for u in (t, m, s))
            x_m = x_t + (phi_m - phi_t) * gaussian.v_from_x0(schedule, x_t, t, x0_hat)
            v_m = gaussian.v_from_x0(schedule, x_m, m, samplers.denoise(denoiser, x_m, m, cond))
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


@pytest.mark.slow
@pytest.mark.parametrize("function, entry", RIGHT.values(), ids=RIGHT.keys())
def test_a_correct_sampler_of_the_user_keeps_every_law(function, entry, registered):
    name = registered(function, **entry)
    for schedule in (schedules.cosine(60), schedules.linear(1000)):
        report = verify.report(schedule)
        assert broken(report) == set(), verify.table(report)
        assert sum(name in row.computed for row in report) >= 4


def test_a_method_that_calls_between_the_times_of_its_list_keeps_every_law(registered):
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


@pytest.mark.slow
@pytest.mark.parametrize("law, function, entry", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_sampler_of_the_user_breaks_its_law(law, function, entry, registered):
    name = registered(function, **{"order": 1} | entry)
    report = verify.report(schedules.cosine(60))
    rows_of = [row for row in report if row.law == law and row.verdict == verify.BROKEN]
    assert any(name in row.computed + row.where for row in rows_of), verify.table(report)
