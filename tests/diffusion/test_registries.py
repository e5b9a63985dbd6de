"""Samplers and schedules by name: entries, the text NAME[:key=value,...], and entries from outside the package."""

import math

import numpy as np
import pytest
from support.law_tools import Noise

from minidiff.diffusion import schedules
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.gaussian import eps_from_x0
from minidiff.diffusion.samplers import SAMPLERS, Sampler, State, beta_tilde, checked_times, ddim, ddpm, sample, times
from minidiff.diffusion.schedules import (
    SCHEDULES,
    Schedule,
    check_schedule,
    parse_schedule,
    schedule_from,
    schedule_parameters,
)
from minidiff.errors import UserError


def euler_ancestral(denoiser, x_T, times, cond=None, *, streams):
    """Euler's method with fresh noise, as a user would write it: ddim with eta = 1."""
    schedule, x_t = denoiser.schedule, x_T
    times = [*checked_times(times, range(schedule.T), "to 0"), -1]
    for step, (t, s) in enumerate(zip(times, times[1:], strict=False), start=1):
        x0_hat = denoiser(x_t, np.full(len(x_t), t), cond)
        noise = beta_tilde(schedule, t, s) if s >= 0 else 0.0
        rest = math.sqrt(max(float(1 - schedule.abar(s)) - noise, 0))
        x_t = float(schedule.alpha(s)) * x0_hat + rest * eps_from_x0(schedule, x_t, t, x0_hat)
        if s >= 0:
            x_t = x_t + math.sqrt(noise) * streams.normal(x_t.shape[1:], x_t.dtype)
        yield State(step, s, x_t, x0_hat)


def sigmoid(T=1000, k=3.0, bend=1):
    """log-SNR falls from k to -k, to the power `bend`; ends in noise if k is at least 4."""
    u = np.arange(1, T + 1) / T
    return Schedule(1 / (1 + np.exp(k * (2 * u**bend - 1))))


@pytest.fixture
def euler():
    yield SAMPLERS.register("euler", Sampler(euler_ancestral, order=1, noise=True))
    SAMPLERS.unregister("euler")


@pytest.fixture
def sigmoids():
    yield SCHEDULES.register("sigmoid", sigmoid)
    SCHEDULES.unregister("sigmoid")


# ---- samplers ------------------------------------------------------------------------------------------------

def test_a_registered_sampler_is_found_and_run_by_name(euler):
    own = ["ddpm", "ddim", "heun", "dpm++2m", "dpm++2m-sde", "unipc", "plms", "lms", "lcm", "euler"]
    assert [name for name in SAMPLERS if name in own] == own
    assert SAMPLERS["euler"] is euler
    denoiser = GaussianDenoiser(schedules.cosine(50), np.zeros(2), np.ones(2))
    x_T, z = np.ones((2, 2)), Noise(2, given=np.full((2, 2), 0.3))
    x_0 = sample(SAMPLERS["euler"](denoiser, x_T, times(denoiser.schedule, 5), streams=z))
    np.testing.assert_allclose(x_0, sample(ddpm(denoiser, x_T, times(denoiser.schedule, 5), streams=z)), rtol=1e-9)
    with pytest.raises(ValueError, match="there is already a sampler 'euler'"):
        SAMPLERS.register("euler", euler)


def test_an_unregistered_sampler_is_unknown():
    with pytest.raises(UserError, match=r"there is no sampler 'euler': it is one of ddpm, ddim, heun, dpm\+\+2m"):
        SAMPLERS["euler"]


def test_streams_reach_only_a_sampler_that_draws_noise():
    denoiser = GaussianDenoiser(schedules.cosine(50), np.zeros(1), np.ones(1))
    streams = Noise(1, given=np.zeros((1, 1)))
    for name, sampler in SAMPLERS.items():
        before = streams.calls
        sample(sampler(denoiser, np.ones((1, 1)), [49, 20, 3], streams=streams))
        assert streams.calls - before == (2 if sampler.noise else 0), name


@pytest.mark.parametrize("error, sentence, make", [
    (TypeError, "function must be a sampler", lambda: Sampler("ddim", order=1)),
    *((ValueError, "order must be a positive number", lambda order=order: Sampler(ddim, order))
      for order in (0, -1, math.inf, math.nan, True, "2")),
    *((ValueError, "calls must be a whole number of at least 1", lambda calls=calls: Sampler(ddim, 1, calls))
      for calls in (0, 1.5, True)),
    (ValueError, "history must be a whole number of at least 0", lambda: Sampler(ddim, 1, history=-1)),
    (ValueError, "first_calls must be a whole number of at least 0", lambda: Sampler(ddim, 1, first_calls=0.5)),
])
def test_a_broken_entry_is_refused(error, sentence, make):
    with pytest.raises(error, match=sentence):
        make()


# ---- schedules -----------------------------------------------------------------------------------------------

def test_a_schedule_is_named_with_its_parameters():
    schedule = schedule_from("cosine:offset=0.01,beta_max=0.99", 50)
    np.testing.assert_array_equal(schedule.alpha_bar, schedules.cosine(50, 0.01, 0.99).alpha_bar)
    assert schedule.name == "cosine:offset=0.01,beta_max=0.99"
    assert parse_schedule("cosine:offset=1e-2") == ("cosine", {"offset": 0.01})
    assert parse_schedule("linear") == ("linear", {})
    assert schedule_parameters("cosine") == {"offset": 0.008, "beta_max": 0.999}
    assert schedule_parameters("even_loss") == {} and schedule_parameters("flow_matching") == {"shift": 1.0}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_made_from_its_name(name):
    schedule = schedule_from(name)
    assert schedule.name == name and schedule.T == 1000
    parameters = ",".join(f"{key}={value!r}" for key, value in schedule_parameters(name).items())
    assert (schedule_from(f"{name}:{parameters}" if parameters else name, 1000).alpha_bar == schedule.alpha_bar).all()


def test_a_registered_schedule_is_made_from_a_text(sigmoids):
    assert "sigmoid" in SCHEDULES and schedule_parameters("sigmoid") == {"k": 3.0, "bend": 1}
    check_schedule("sigmoid:k=5,bend=2")
    schedule = schedule_from("sigmoid:k=5,bend=2", 20)
    assert (schedule.alpha_bar == sigmoid(20, 5.0, 2).alpha_bar).all() and schedule.name == "sigmoid:k=5,bend=2"
    with pytest.raises(UserError, match="schedule 'sigmoid': .* must end in noise"):
        schedule_from("sigmoid")
    assert schedule_from("sigmoid", allow_signal=True).T == 1000
    with pytest.raises(UserError, match="bend must be an integer, such as 1, got '2.5'"):
        check_schedule("sigmoid:bend=2.5")


def test_a_function_that_is_no_schedule_is_refused():
    SCHEDULES.register("table", lambda T=10: np.linspace(0.9, 0.01, T))
    SCHEDULES.register("named", lambda T=10, kind="even": None)
    try:
        with pytest.raises(UserError, match="schedule 'table': its function must return a Schedule, got ndarray"):
            schedule_from("table")
        with pytest.raises(UserError, match="'named' must be a function .* its parameter kind has no number"):
            check_schedule("named")
    finally:
        SCHEDULES.unregister("table")
        SCHEDULES.unregister("named")


@pytest.mark.parametrize("text, sentence", [
    ("sine", "there is no schedule 'sine': it is one of linear, scaled_linear, cosine"),
    ("", "there is no schedule ''"),
    ("cosine:", "'' is not a parameter; the parameters of cosine are: offset=0.008, beta_max=0.999"),
    ("cosine:s=0.01", "'s' is not a parameter; the parameters of cosine are: offset=0.008, beta_max=0.999"),
    ("cosine:T=5", "'T' is not a parameter"),
    ("linear:allow_signal=1", "'allow_signal' is not a parameter"),
    ("even_loss:k=1", "'k' is not a parameter; the parameters of even_loss are: none"),
    ("cosine:offset=1,offset=2", "'offset' is given twice"),
    ("cosine:offset", "offset must be a finite number, such as 0.008, got ''"),
    *((f"cosine:offset={v}", "offset must be a finite number") for v in ("inf", "nan", "1e999", "a", "0x1", "1=1")),
    ("cosine:" + "a" * 300, "must be a short text, .* got 307 characters"),
    (3, "must be a short text, .* got 3"), (None, "got None"), (["cosine"], "got .'cosine'."),
])
def test_a_wrong_text_is_refused_in_one_sentence(text, sentence):
    for refuse in (check_schedule, schedule_from):
        with pytest.raises(UserError, match=sentence) as refused:
            refuse(text)
        assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", [
    "linear:beta_min=-1", "linear:beta_max=1e308", "scaled_linear:beta_min=-0.1", "scaled_linear:beta_max=1e308",
    "cosine:offset=-1", "cosine:beta_max=0", "cosine:offset=1e308", "vp_sde:beta_max=-1", "vp_sde:beta_max=1e308",
    "log_snr_linear:log_snr_max=-20", "log_snr_linear:log_snr_min=-1e308", "vp_sde:beta_min=0,beta_max=0",
])
def test_numbers_that_make_no_schedule_are_refused_in_one_sentence(text):
    check_schedule(text)
    with pytest.raises(UserError, match="^schedule '" + text.split(":")[0]):
        schedule_from(text)
