"""Our schedules, q, posterior and samplers against those of diffusers, in float64 over random configurations; and the
laws that its schedulers break, as installed, each against a number worked out by hand.

diffusers keeps its tables in float32, whatever the dtype of the samples. To separate formulas from rounding, the tests
of agreement run its own source with the name float32 meaning float64 (`in_float64`); no line of it is replaced. The
tests of broken laws, and the published matrix, use it as installed.
"""

import functools
import importlib
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="parity with diffusers needs PyTorch: pip install torch")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers: pip install diffusers")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from minidiff.cli.main import main  # noqa: E402
from minidiff.diffusion import gaussian, samplers, schedules  # noqa: E402
from minidiff.diffusion.denoiser import NetworkDenoiser  # noqa: E402
from minidiff.verify.scheduler import load, report  # noqa: E402
from minidiff.verify.scheduler.from_diffusers import Diffusers  # noqa: E402
from minidiff.verify.scheduler.replay import GivenNoise  # noqa: E402
from minidiff.verify.scheduler.runs import last_spread  # noqa: E402

CLASSES = (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler)
PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
TO_ROUNDING = {"rtol": 1e-9, "atol": 1e-9}                  # the project requires 1e-6
# NumPy 2 warns about how diffusers reads its tensors
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
quickly = settings(deadline=None, max_examples=40)


class Widened:
    """A library in which float32 means float64."""

    def __init__(self, library):
        self.library, self.float32 = library, library.float64

    def __getattr__(self, name):
        return getattr(self.library, name)


def in_float64(test):
    """A test during which diffusers' schedulers compute in float64."""
    @functools.wraps(test)
    def widened():
        with pytest.MonkeyPatch.context() as patch:
            for cls in CLASSES:
                patch.setattr(importlib.import_module(cls.__module__), "torch", Widened(torch))
                patch.setattr(importlib.import_module(cls.__module__), "np", Widened(np))
            test()
    return widened


# ---- random configurations ---------------------------------------------------------------------------------

@st.composite
def tables(draw, min_T=2):
    """The same table twice: the options of diffusers, and our schedule."""
    T = draw(st.integers(min_T, 1000))
    # from 1e-4 .. 0.02 to a strong schedule, so that alpha_bar stays far above underflow
    low, high = draw(st.floats(1e-4, 1e-3)), draw(st.floats(2e-3, 0.03))
    kind = draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]))
    ours = {"linear": lambda: schedules.linear(T, low, high, allow_signal=True),
            "scaled_linear": lambda: schedules.scaled_linear(T, low, high, allow_signal=True),
            "squaredcos_cap_v2": lambda: schedules.cosine(T, allow_signal=True)}[kind]()
    return {"num_train_timesteps": T, "beta_start": low, "beta_end": high, "beta_schedule": kind}, ours


seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
predictions = st.sampled_from(list(PREDICTION))


def tensor(a):
    return torch.from_numpy(np.ascontiguousarray(a))


def network(schedule):
    """Any nonlinear function: the test compares what the samplers compute from its outputs."""
    def answer(u, t):
        t = np.asarray(t, np.float64).reshape(-1, *[1] * (u.ndim - 1))
        return np.sin(2 * u) + t / schedule.T
    return answer


def their_run(scheduler: Diffusers, n, u, z, answer):
    """From u, the network's first input, to the end."""
    scheduler.set_steps(n)
    x_t = None
    for i, t in enumerate(scheduler.timesteps):
        if x_t is None:
            x_t = u / scheduler.scale_input(np.ones_like(u), t)
        x_t = scheduler.step(answer(scheduler.scale_input(x_t, t), np.full(len(u), t)), t, x_t, z[i])
    return x_t


def our_run(sampler, schedule, predicts, times, u, z, answer, **options):
    denoiser = NetworkDenoiser(schedule, predicts, lambda x_t, t, cond: answer(x_t, t))
    if z is not None:
        draws = iter(z)
        options["streams"] = GivenNoise(len(u), lambda: next(draws))
    whole = np.asarray(times).astype(int)                   # theirs are whole numbers, and some of them floats
    assert (whole == times).all()
    return samplers.sample(sampler(denoiser, u, whole, **options))


def agree(theirs, ours):
    """Within 1e-9 of the largest number, which may be large with a nonlinear network."""
    np.testing.assert_allclose(theirs, ours, rtol=1e-9, atol=1e-9 * max(1, abs(ours).max()))


# ---- agreement ---------------------------------------------------------------------------------------------

@in_float64
@quickly
@given(tables(), st.sampled_from(CLASSES))
def test_schedules_agree(table, cls):
    """Laws 1, 3: alpha_bar. Bug: 'scaled_linear' without the square."""
    config, schedule = table
    theirs = cls(**config).alphas_cumprod
    assert theirs.dtype == torch.float64
    np.testing.assert_allclose(theirs.numpy(), schedule.alpha_bar, rtol=1e-10)


@in_float64
@quickly
@given(tables(), st.sampled_from([DDPMScheduler, DDIMScheduler]))
def test_zero_terminal_snr_agrees(table, cls):
    """Law 5. diffusers recomputes alpha_bar from betas; the last alphas, small differences, magnify their rounding."""
    config, schedule = table
    theirs = cls(**config, rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    np.testing.assert_allclose(theirs, schedules.zero_terminal_snr(schedule).alpha_bar, rtol=1e-9, atol=1e-12)
    assert theirs[-1] == 0


@in_float64
@quickly
@given(tables(), shapes, seeds)
def test_q_agrees(table, shape, seed):
    """Law 1 and the velocity, at one time for each sample, for those who keep x_t = alpha x_0 + sigma eps."""
    config, schedule = table
    rng = np.random.default_rng(seed)
    (x_0, eps), t = rng.normal(size=(2, *shape)), rng.integers(0, schedule.T, shape[0])
    for cls in (DDPMScheduler, DDIMScheduler):
        scheduler = cls(**config)
        theirs = scheduler.add_noise(tensor(x_0), tensor(eps), tensor(t)).numpy()
        np.testing.assert_allclose(theirs, gaussian.q_sample(schedule, x_0, t, eps), **TO_ROUNDING)
        v = scheduler.get_velocity(tensor(x_0), tensor(eps), tensor(t)).numpy()
        np.testing.assert_allclose(v, gaussian.v_from_x0_eps(schedule, x_0, t, eps), **TO_ROUNDING)
    # Euler and Heun keep x_t / alpha
    alpha = schedule.alpha(t).reshape(-1, 1, 1, 1)
    for cls in (EulerDiscreteScheduler, HeunDiscreteScheduler):
        theirs = cls(**config).add_noise(tensor(x_0), tensor(eps), tensor(t).double()).numpy()
        np.testing.assert_allclose(theirs * alpha, gaussian.q_sample(schedule, x_0, t, eps), **TO_ROUNDING)


@in_float64
@quickly
@given(tables(), shapes, seeds, st.data())
def test_the_posterior_agrees(table, shape, seed, data):
    """Laws 9, 16: mean and variance of q(x_s | x_t, x_0), for the neighbours in any list; bug #3006, a respaced chain
    with the betas of the full one."""
    config, schedule = table
    n = data.draw(st.integers(1, schedule.T))
    spacing = data.draw(st.sampled_from(["leading", "linspace"]))
    rng = np.random.default_rng(seed)
    x_0, x_t = rng.normal(size=(2, *shape))
    for kind, variance_of in {"fixed_small": samplers.beta_tilde, "fixed_large": samplers.beta}.items():
        scheduler = Diffusers(lambda kind=kind: DDPMScheduler(
            **config, variance_type=kind, clip_sample=False, prediction_type="sample", timestep_spacing=spacing))
        scheduler.set_steps(n)
        times = [*scheduler.timesteps.astype(int), -1]
        scheduler.count = i = data.draw(st.integers(0, n - 1))
        mean = scheduler.step(x_0, times[i], x_t, np.zeros(shape))
        scheduler.count = i
        spread = scheduler.step(x_0, times[i], x_t, np.ones(shape)) - mean
        ours, _ = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, times[i], times[i + 1])
        np.testing.assert_allclose(mean, ours, **TO_ROUNDING)
        if times[i + 1] >= 0:
            np.testing.assert_allclose(spread**2, variance_of(schedule, times[i], times[i + 1]), rtol=1e-7, atol=1e-11)


@in_float64
@quickly
@given(tables(min_T=10), shapes, seeds, predictions, st.floats(0, 1), st.data())
def test_ddim_agrees(table, shape, seed, prediction, eta, data):
    """Laws 23, 24: whole runs, where its fixed stride is that of its own list: 'leading', for every N and eta."""
    config, schedule = table
    n = data.draw(st.integers(1, min(schedule.T, 30)))
    rng = np.random.default_rng(seed)
    u, z, answer = rng.normal(size=shape), rng.normal(size=(n, *shape)), network(schedule)
    scheduler = Diffusers(lambda: DDIMScheduler(**config, prediction_type=prediction, clip_sample=False), eta=eta)
    theirs = their_run(scheduler, n, u, z, answer)
    ours = our_run(samplers.ddim, schedule, PREDICTION[prediction], scheduler.timesteps, u, z, answer, eta=eta)
    agree(theirs, ours)


@in_float64
@quickly
@given(tables(min_T=10), shapes, seeds, predictions, st.sampled_from(["leading", "linspace"]),
       st.sampled_from(["fixed_small", "fixed_large"]), st.data())
def test_ddpm_agrees(table, shape, seed, prediction, spacing, kind, data):
    """Laws 9, 16: whole runs. fixed_small is our beta_tilde, fixed_large our beta."""
    config, schedule = table
    n = data.draw(st.integers(1, min(schedule.T, 30)))
    rng = np.random.default_rng(seed)
    u, z, answer = rng.normal(size=shape), rng.normal(size=(n, *shape)), network(schedule)
    scheduler = Diffusers(lambda: DDPMScheduler(**config, prediction_type=prediction, clip_sample=False,
                                                timestep_spacing=spacing, variance_type=kind))
    theirs = their_run(scheduler, n, u, z, answer)
    variance = {"fixed_small": samplers.beta_tilde, "fixed_large": samplers.beta}[kind]
    agree(theirs, our_run(samplers.ddpm, schedule, PREDICTION[prediction], scheduler.timesteps, u, z, answer,
                          variance=variance))


@in_float64
@quickly
@given(tables(min_T=40), shapes, seeds, predictions, st.sampled_from(["leading", "linspace", "trailing"]), st.data())
def test_dpm_solver_agrees(table, shape, seed, prediction, spacing, data):
    """Law 25: DPM-Solver++(2M), the midpoint form, its last step of first order, as ours."""
    config, schedule = table
    n = data.draw(st.integers(2, 18))
    rng = np.random.default_rng(seed)
    u, answer = rng.normal(size=shape), network(schedule)
    scheduler = Diffusers(lambda: DPMSolverMultistepScheduler(**config, prediction_type=prediction,
                                                              timestep_spacing=spacing))
    theirs = their_run(scheduler, n, u, np.zeros((n + 1, *shape)), answer)
    agree(theirs, our_run(samplers.dpm_solver_pp_2m, schedule, PREDICTION[prediction], scheduler.timesteps, u, None,
                          answer))


@in_float64
@quickly
@given(tables(min_T=40), shapes, seeds, predictions, st.data())
def test_euler_is_our_ddim(table, shape, seed, prediction, data):
    """Euler's method in sigma / alpha is DDIM: x / alpha moves straight along eps_hat (DDIM eq. 13)."""
    config, schedule = table
    n = data.draw(st.integers(1, 20))
    rng = np.random.default_rng(seed)
    u, answer = rng.normal(size=shape), network(schedule)
    scheduler = Diffusers(lambda: EulerDiscreteScheduler(**config, prediction_type=prediction,
                                                         timestep_spacing="leading"))
    theirs = their_run(scheduler, n, u, np.zeros((n, *shape)), answer)
    agree(theirs, our_run(samplers.ddim, schedule, PREDICTION[prediction], scheduler.timesteps, u, None, answer))


@in_float64
@quickly
@given(tables(min_T=40), shapes, seeds, predictions, st.data())
def test_heun_is_algorithm_1(table, shape, seed, prediction, data):
    """Theirs steps in sigma / alpha and ours in its angle: two methods of second order, which agree in the limit only.
    So theirs is compared with Karras et al. 2022, algorithm 1, written here from the paper."""
    config, schedule = table
    n = data.draw(st.integers(1, 15))
    rng = np.random.default_rng(seed)
    u, answer = rng.normal(size=shape), network(schedule)
    scheduler = Diffusers(lambda: HeunDiscreteScheduler(**config, prediction_type=prediction,
                                                        timestep_spacing="leading"))
    theirs = their_run(scheduler, n, u, np.zeros((2 * n, *shape)), answer)

    def D(x, t):
        x_t = schedule.alpha(t) * x
        out = answer(x_t, np.full(len(x), t))
        return gaussian.to_x0(schedule, PREDICTION[prediction], x_t, t, out)

    times = sorted({int(t) for t in scheduler.timesteps}, reverse=True)
    sigma = [float(schedule.sigma(t) / schedule.alpha(t)) for t in times] + [0.0]
    x = u / schedule.alpha(times[0])
    for i, t in enumerate(times):
        d = (x - D(x, t)) / sigma[i]
        euler = x + (sigma[i + 1] - sigma[i]) * d
        if sigma[i + 1] > 0:
            d_next = (euler - D(euler, times[i + 1])) / sigma[i + 1]
            euler = x + (sigma[i + 1] - sigma[i]) * (d + d_next) / 2
        x = euler
    agree(theirs, x)


@pytest.mark.parametrize("kind, ours", [("linear", schedules.linear(1000)), ("squaredcos_cap_v2", schedules.cosine()),
                                        ("scaled_linear", schedules.scaled_linear(1000, 1e-4, 0.02))])
def test_as_installed_a_table_agrees_to_float32(kind, ours):
    theirs = DDIMScheduler(beta_schedule=kind).alphas_cumprod
    assert theirs.dtype == torch.float32
    assert abs(theirs.double().numpy() - ours.alpha_bar).max() < 1e-6


# ---- the laws, of diffusers as installed ---------------------------------------------------------------------
# If a new version fixes a broken law, a test fails here, and docs/schedulers.md must be written again.

def rows_of(name, **config):
    return {(r.law, r.computed): r for r in report(load(f"diffusers:{name}", config))}


def broken(rows):
    return {law for (law, _), row in rows.items() if row.verdict == "BROKEN"}


LINEAR = schedules.linear(1000)


def test_euler_and_heun_break_nothing_but_the_list_of_one():
    """np.linspace(0, 999, 1) is [0]."""
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        rows = rows_of(name)
        assert broken(rows) == {"26 starts at T-1"}
        assert rows["26 starts at T-1", "the first time of a list"].verdict == "kept"
        assert rows["26 starts at T-1", "the only time where N = 1"].measured == 0


def test_leading_starts_at_980():
    """#2585: 999 // 50 * 49; the network gets t = 980 for a sample that is all noise. Nothing else is broken."""
    for name in ("DDIMScheduler", "DDPMScheduler"):
        rows = rows_of(name)
        assert broken(rows) == {"26 starts at T-1"}
        assert rows["26 starts at T-1", "the first time of a list"].measured == 980


@pytest.mark.parametrize("spacing, n, t, stride_to, listed", [("trailing", 7, 285, 143, 142),
                                                              ("linspace", 10, 888, 788, 777)])
def test_ddim_steps_by_a_fixed_stride(spacing, n, t, stride_to, listed):
    """#12633, #11347, #9261: the step from t goes to t - T // N, where the list has another next time."""
    scheduler = load("diffusers:DDIMScheduler", {"timestep_spacing": spacing})
    scheduler.set_steps(n)
    i = list(scheduler.timesteps).index(t)
    assert scheduler.timesteps[i + 1] == listed
    scheduler.count = i
    one = np.ones((1, 1, 1, 1))
    # all noise, eps = x_t / sigma_t and x0_hat = 0: the result is sigma at the time to which the step goes
    x_s = scheduler.step(one, t, LINEAR.sigma(t) * one, 0 * one).item()
    assert abs(x_s - LINEAR.sigma(stride_to)) < 1e-6 < abs(x_s - LINEAR.sigma(listed))
    assert {"23 marginals", "24 one step", "25 order"} <= broken(rows_of("DDIMScheduler", timestep_spacing=spacing))


def test_ddim_trailing_leaves_noise_where_n_does_not_divide():
    """N = 7: the last time is 142, and 142 - 1000 // 7 = 0 is not the end but the first noise, sigma_0 = 0.01. Earlier
    steps ended one time too early, and eps_hat has grown by the ratio of the two deviations."""
    row = rows_of("DDIMScheduler", timestep_spacing="trailing")["26 no noise is left", "spread at the end, on a point"]
    assert row.verdict == "BROKEN"
    scheduler = load("diffusers:DDIMScheduler", {"timestep_spacing": "trailing"})
    times = [999, 856, 713, 570, 428, 285, 142]
    too_much = math.prod(LINEAR.sigma(t - 142) / LINEAR.sigma(s) for t, s in pairwise(times))
    assert abs(last_spread(scheduler, 7)[3] - LINEAR.sigma(0) * too_much) < 1e-6


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_trailing_lists_may_go_below_0(cls):
    """np.arange(1000, 0, -1000 / 61) has 62 entries, the last -6e-13; it is rounded to 0, and less 1 it is -1."""
    assert len(np.arange(1000, 0, -1000 / 61)) == 62
    scheduler = cls(timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1
    row = rows_of(cls.__name__, timestep_spacing="trailing")["26 N falling times",
                                                             "lists without them, N = 1 to 200, T"]
    assert row.measured == 4 and "first at N = 61: 62 times, t = -1" in row.where


def test_dpm_solver_has_its_noise_in_reverse_order_before_a_run():
    """Its sigmas are in rising order until set_timesteps, its timesteps in falling order: t = 999 gets the noise of
    t = 0. This matters to code that trains with a new scheduler."""
    rows = rows_of("DPMSolverMultistepScheduler")
    row = rows["1 q(x_t | x_0)", "add_noise at all times of training"]
    assert broken(rows) == {"1 q(x_t | x_0)", "26 N falling times"}
    one = torch.ones(1, 1, 1, 1)
    fresh = DPMSolverMultistepScheduler()
    noised = fresh.add_noise(0 * one, one, torch.tensor([999])).item()
    assert abs(noised - LINEAR.sigma(0)) < 1e-6 and abs(row.measured - LINEAR.alpha(999)) < 1e-6
    assert row.where.startswith("t = 0, x_0 = 1, eps = 0") and abs(row.expected - LINEAR.alpha(0)) < 1e-6
    fresh.set_timesteps(50)
    assert abs(fresh.add_noise(0 * one, one, torch.tensor([999])).item() - LINEAR.sigma(999)) < 1e-6


@pytest.mark.parametrize("name, config, sigma", [
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "beta_start": 0.00085,
                       "beta_end": 0.012, "beta_schedule": "scaled_linear"}, math.sqrt(0.00085)),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, math.sqrt(1e-4 / (1 - 1e-4))),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, 0.01),
])
def test_noise_that_is_left_by_configuration(name, config, sigma):
    """#5689: the first noise of the table stays: sqrt(beta_0) in all."""
    assert "26 no noise is left" in broken(rows_of(name, **config))
    assert abs(last_spread(load(f"diffusers:{name}", config), 50)[3] - sigma) < 2e-5


def test_ddpm_draws_noise_at_the_last_of_trailing():
    """It draws where t > 0, and the last of trailing times is 19: with fixed_large the draw is beta = 1 - abar_19."""
    config = {"timestep_spacing": "trailing", "variance_type": "fixed_large"}
    assert abs(last_spread(load("diffusers:DDPMScheduler", config), 50)[3] - LINEAR.sigma(19)) < 1e-5
    assert "26 no noise is left" in broken(rows_of("DDPMScheduler", **config))


def test_eps_at_snr_0_is_accepted():
    """#3851: DDIM divides by alpha = 0."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    rows = rows_of("DDIMScheduler", **config)
    assert rows["5 zero terminal SNR", "runs on eps that should be refused"].verdict == "BROKEN"
    assert math.isnan(last_spread(load("diffusers:DDIMScheduler", config), 50)[2])


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_last_alpha_bar_of_2_to_the_minus_24_is_above_the_one_before(name):
    """They put 2^-24 in place of the 0 of zero terminal SNR; the rescaled table has less signal one time before."""
    before = schedules.zero_terminal_snr(LINEAR).alpha_bar[-2]
    assert before < 2**-24
    rows = rows_of(name, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    assert rows["3 SNR falls", "times at which alpha_bar does not"].where == "t = 999"


def test_karras_sigmas_repeat_times_and_raise_an_index_error():
    """#12771: the multistep solver looks up its position by a time that occurs twice, and goes past its list's end."""
    rows = rows_of("DPMSolverMultistepScheduler", use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2")
    assert "IndexError" in rows["24 a point is reached", "the end of a run without noise"].where


# ---- the adapter -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, config, sentence", [
    ("DDIMScheduler", {"size": 3}, "has no option size"),
    ("DDIMScheduler", {"prediction_type": "flow"}, "prediction_type must be one of epsilon, sample, v_prediction"),
    ("EulerDiscreteScheduler", {"eta": 1.0}, "takes no eta"),
    ("DDIMScheduler", {"beta_schedule": "sine"}, "refuses its configuration: NotImplementedError: sine"),
])
def test_a_wrong_configuration_gives_a_one_sentence_error(name, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(f"diffusers:{name}", config)


def test_the_command(capsys):
    assert main(["verify", "--scheduler", "diffusers:DDIMScheduler", "--steps", "10"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN  26 starts at T-1" in out and "expected 999, measured 900" in out


def test_the_noise_is_given_back_to_diffusers():
    scheduler = load("diffusers:DDPMScheduler")
    module = importlib.import_module(DDPMScheduler.__module__)
    before = module.randn_tensor
    report(scheduler, [3])
    assert module.randn_tensor is before
