"""Contracts of diffusion/ besides its formulas: dtypes, names, states, defaults, and the calls of a denoiser."""

import numpy as np
import pytest

from minidiff.diffusion import gaussian, guidance, likelihood, samplers, schedules
from minidiff.diffusion.denoiser import NetworkDenoiser, dynamic_threshold, static_threshold
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.random import SampleStreams

SCHEDULE = schedules.linear(10, beta_max=0.9)


class Recorder:
    """A denoiser that records its calls, and returns the number of the call."""

    predicts, schedule = "x0", SCHEDULE

    def __init__(self):
        self.asked = []

    def __call__(self, x_t, t, cond=None):
        self.asked.append((t.tolist(), cond))
        return np.full_like(x_t, len(self.asked))


@pytest.mark.parametrize("at", range(4))
def test_kl_has_the_dtype_of_its_widest_argument(at):
    """One float64 among float32, one float32 among plain numbers, and integers alone."""
    narrow, plain = [np.ones(3, np.float32)] * 4, [1.0] * 4
    wide = [*narrow[:at], np.ones(3), *narrow[at + 1:]]
    assert gaussian.kl_gaussian(*wide).dtype == np.float64
    assert gaussian.kl_gaussian(*plain[:at], narrow[at], *plain[at + 1:]).dtype == np.float32
    assert gaussian.kl_gaussian(*[1] * 4).dtype == np.float64


def test_kl_of_whole_numbers_does_not_wrap_around():
    one, two = np.ones(1, np.uint8), np.full(1, 2, np.uint8)
    assert gaussian.kl_gaussian(one, one, two, one).tolist() == [0.5]


@pytest.mark.parametrize("make, name", [
    (lambda: Schedule([0.5, 0.01]), "custom"),
    (lambda: schedules.from_betas([0.5, 0.99]), "custom"),
    (lambda: schedules.from_betas([0.5, 0.99], "mine"), "mine"),
    (lambda: schedules.from_log_snr(lambda u: 5 - 10 * u, 5), "log_snr"),
    (lambda: schedules.from_log_snr(lambda u: 5 - 10 * u, 5, "mine"), "mine"),
    *((lambda name=name: schedules.SCHEDULES[name](1000), name) for name in schedules.SCHEDULES),
    (lambda: schedules.zero_terminal_snr(SCHEDULE), "linear, zero terminal SNR"),
    (lambda: schedules.respaced(SCHEDULE, [1, 4, 9]), "linear, 3 of 10 times"),
])
def test_the_name_of_a_schedule(make, name):
    assert make().name == name


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_default_is_a_thousand_times(name):
    assert (schedules.schedule_from(name).alpha_bar == schedules.SCHEDULES[name](1000).alpha_bar).all()


def test_the_default_ranges():
    """VDM's +-10 in log-SNR; Score SDE's .1 and 20, whose integral over the whole of time is 10.05."""
    linear, sde = schedules.log_snr_linear(), schedules.vp_sde()
    assert np.allclose(linear.log_snr(np.array([0, 999])), [10, -10], atol=1e-9)
    assert np.isclose(sde.alpha_bar[-1], np.exp(-10.05), rtol=1e-12)


def test_tables_are_computed_in_float64_from_any_dtype():
    betas = np.linspace(0.1, 0.9, 5).astype(np.float32)
    assert (schedules.from_betas(betas).alpha_bar == schedules.from_betas(betas.astype(float)).alpha_bar).all()
    table = np.linspace(3, -8, 5).astype(np.float32)
    single, double = (schedules.from_log_snr(lambda u, a=a: a, 5) for a in (table, table.astype(float)))
    assert (single.alpha_bar == double.alpha_bar).all()


def test_a_schedule_is_float64_from_any_dtype():
    assert Schedule(np.array([0.5, 0.25], np.float32)).alpha_bar.dtype == np.float64
    assert Schedule([0.5, 0]).alpha_bar.tolist() == [0.5, 0.0]


def test_noise_too_small_for_the_dtype_counts_as_none():
    x = np.ones(2, np.float16)
    with pytest.raises(ValueError, match=r"a time with noise, 0 or more, got 0 \(in float16\)$"):
        gaussian.eps_from_x0(Schedule([1 - 1e-16, 0.01]), x, 0, x)


def test_the_smallest_and_the_largest_beta():
    """A beta of 1e-13 keeps three digits in 1 - beta; and the last beta may be 1."""
    assert schedules.from_betas([1e-13, 0.99]).alpha_bar[0] == pytest.approx(1 - 1e-13, abs=2e-16)
    assert schedules.from_betas([0.5, 1.0]).alpha_bar[-1] == 0


def test_a_list_of_lists_is_no_list_of_times():
    with pytest.raises(ValueError, match="times must be integers"):
        samplers.sample(samplers.ddim(Recorder(), np.ones((3, 2)), np.array([[8], [5]])))


@pytest.mark.parametrize("make", [
    lambda **said: schedules.from_betas([0.1, 0.2], **said),
    lambda **said: schedules.linear(10, **said),
    lambda **said: schedules.scaled_linear(10, **said),
    lambda **said: schedules.cosine(10, beta_max=0.1, **said),
    lambda **said: schedules.from_log_snr(lambda u: 5 - u, 5, **said),
    lambda **said: schedules.log_snr_linear(10, 10.0, 0.0, **said),
    lambda **said: schedules.vp_sde(10, 0.1, 0.2, **said),
])
def test_signal_at_the_end_must_be_allowed(make):
    for said in ({}, {"allow_signal": False}):
        with pytest.raises(ValueError, match="must end in noise"):
            make(**said)
    assert not make(allow_signal=True).reaches_noise


def test_percentile_may_be_anything_up_to_the_maximum():
    x = np.array([[0.0, -4.0, 2.0]])
    assert np.abs(dynamic_threshold(x, 1)).max() == 1 and dynamic_threshold(x, 1)[0, 2] == 0.5
    assert dynamic_threshold(x, 1e-9)[0].tolist() == [0.0, -1.0, 1.0]


def test_nine_times_are_too_many_to_be_named():
    with pytest.raises(ValueError, match=r"got \[0 0 1 \.\.\. 5 6 7\]$"):
        schedules.respaced(SCHEDULE, [0, *range(8)])


# ---- denoisers and likelihood --------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("denoiser", [
    GaussianDenoiser(SCHEDULE, np.zeros(2), np.ones(2)),
    MixtureDenoiser(SCHEDULE, [0.4, 0.6], [[0.0, 1.0], [1.0, 0.0]], [0.1, 0.3]),
    DatasetDenoiser(SCHEDULE, [[0.0, 1.0], [1.0, 0.0]]),
], ids=lambda d: type(d).__name__)
def test_exact_denoisers_return_the_dtype_of_x_t(denoiser, dtype):
    x_t, t = np.full((3, 2), 0.5, dtype), np.array([1, 4, 9])
    x0_hat, dx_t = denoiser.vjp(x_t, t, x_t)
    assert denoiser(x_t, t).dtype == x0_hat.dtype == dx_t.dtype == dtype
    if isinstance(denoiser, MixtureDenoiser):
        assert denoiser.score(x_t, t).dtype == dtype


def test_exact_denoisers_compute_in_float64_from_any_dtype():
    """Quarters and halves are the same numbers in both dtypes; their logarithms and squares are not."""
    x_t, t = np.array([[0.3, -0.2]]), np.array([4])
    weights, means, variances = np.array([0.25, 0.75]), np.array([[0.125, 1.5], [-0.75, 0.625]]), np.array([0.5, 0.25])
    data = 1 + means / 4096                                 # whose squares need 26 bits
    for make, *given in ((MixtureDenoiser, weights, means, variances), (DatasetDenoiser, data)):
        single = make(SCHEDULE, *(a.astype(np.float32) for a in given))
        assert (single(x_t, t) == make(SCHEDULE, *given)(x_t, t)).all()


def test_a_covariance_is_decomposed_in_float64():
    cov, mean, x_t = np.array([[0.5, 0.125], [0.125, 0.75]]), np.array([0.25, 0.5]), np.array([[0.3, -0.2]])
    single, double = (GaussianDenoiser(SCHEDULE, mean.astype(d), cov.astype(d)) for d in (np.float32, np.float64))
    assert (single(x_t, np.array([4])) == double(x_t, np.array([4]))).all()


def test_the_bound_is_drawn_in_the_dtype_of_the_images():
    denoiser = GaussianDenoiser(SCHEDULE, np.zeros(2), np.ones(2))
    bound = likelihood.variational_bound(denoiser, np.zeros((3, 2), np.float32), streams=SampleStreams(0, 3),
                                         decoder=likelihood.GaussianDensity(0.1))
    assert bound.total.dtype == np.float64 and np.isfinite(bound.total).all()


@pytest.mark.parametrize("divergence", [likelihood.exact_trace, likelihood.Hutchinson(np.ones((1, 2, 3)))])
def test_the_flow_passes_the_condition_to_the_denoiser(divergence):
    seen = []

    class Flat(Recorder):
        def vjp(self, x_t, t, dy, cond=None):
            seen.append(cond)
            return x_t, dy

    x0_hat, trace = divergence(Flat(), np.ones((2, 3)), np.array([4, 4]), "a seven")
    assert set(seen) == {"a seven"} and trace.tolist() == [3.0, 3.0]


# ---- guidance ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clip", [None, static_threshold])
def test_classifier_guidance_clips_its_result_and_passes_the_label_on(clip):
    seen = []
    x_t, t = np.full((2, 3), 5.0), np.array([3, 7])

    def pull(x, times, y):
        seen.append((x, times, y))
        return np.full_like(x, 2.0)

    plain = NetworkDenoiser(SCHEDULE, "x0", lambda x, t, cond: np.zeros_like(x))
    guided = guidance.ClassifierGuidance(plain, pull, 3.0, clip)(x_t, t, "seven")
    # x0_hat' = x0_hat + sigma^2 / alpha scale grad
    expected = 6.0 * SCHEDULE.sigma(t) ** 2 / SCHEDULE.alpha(t)
    assert np.allclose(guided, np.clip(expected, -1, 1)[:, None] if clip else expected[:, None], rtol=1e-14)
    assert seen[0][0] is x_t and seen[0][1] is t and seen[0][2] == "seven"


# ---- samplers ------------------------------------------------------------------------------------------------

def test_the_states_and_calls_of_inverse_ddim():
    """The first call is at the lowest time of the list, not at -1; then at the lower end of each step."""
    recorder, x_0 = Recorder(), np.ones((3, 2))
    states = list(samplers.ddim_inverse(recorder, x_0, [8, 5, 0], "a seven"))
    assert [(s.step, s.t) for s in states] == [(1, 0), (2, 5), (3, 8)]
    assert recorder.asked == [([t] * len(x_0), "a seven") for t in (0, 0, 5)]
    assert [np.unique(s.x0_hat).tolist() for s in states] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_states_and_calls_of_every_sampler(name):
    recorder, x_T = Recorder(), np.ones((3, 2))
    sampler = samplers.SAMPLERS[name]
    states = list(sampler(recorder, x_T, [8, 5, 0], "a seven", streams=SampleStreams(0, len(x_T))))
    assert [(s.step, s.t) for s in states] == [(1, 5), (2, 0), (3, -1)]
    # the first call of a step is at t, further ones are at s; the last step is one call
    asked = [8] + [5] * sampler.first_calls + [t for t in (5, 0) for _ in range(sampler.calls)]
    assert recorder.asked == [([t] * len(x_T), "a seven") for t in asked]
    # x0_hat is the answer to the first call
    assert [np.unique(s.x0_hat).tolist() for s in states] == [
        [1 + k * sampler.calls + (k > 0) * sampler.first_calls] for k in range(3)]


def test_leading_strides_are_whole_where_the_steps_do_not_divide_T():
    """Improved DDPM's floor: 10 // 4 = 2, from 0, and the top moved to T-1."""
    assert samplers.times(SCHEDULE, 4, "leading").tolist() == [9, 4, 2, 0]
    assert samplers.times(schedules.linear(), 600, "leading").tolist() == [999, *range(598, -1, -1)]


def test_log_snr_spacing_takes_everything_below_minus_10_in_one_stride():
    """log SNR of t is 10 - t/2: from 10 at t = 0 to -10 at t = 40, and what lies beyond counts as that."""
    schedule = schedules.from_log_snr(lambda u: 10.5 - 50 * u, 100)
    assert np.allclose(schedule.log_snr(np.arange(50)), 10 - np.arange(50) / 2, atol=1e-9)
    assert samplers.times(schedule, 5, "log_snr").tolist() == [99, 30, 20, 10, 0]
