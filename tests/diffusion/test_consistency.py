"""Consistency sampling on Gaussian data, whose consistency function is known, the two scalings of its networks, and the
pairs of points that they are distilled from.

The flow of x_0 ~ N(mu, S^2) from t to the clean image is f(x_t, t) = mu + S / sqrt(V_t) (x_t - alpha_t mu),
V = alpha^2 S^2 + sigma^2 (law 25 with V_s = S^2).  If x_t ~ N(alpha_t mu, V_t), then f ~ N(mu, S^2).
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from support.diffusion_strategies import any_schedule, seeds
from support.law_tools import Noise, alpha_sigma, alphas_sigmas, quickly, schedule_and_list

from minidiff.diffusion.consistency import BoundaryCondition, ddim_step, lcm, neighbours
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.samplers import sample, times
from minidiff.diffusion.schedules import cosine

MU = 0.7


class Flow:
    """f of N(MU, S^2); divided: as the network F whose f it is under these two scalings."""

    predicts = "x0"

    def __init__(self, schedule, S, c_skip=None, c_out=None):
        self.schedule, self.S, self.c_skip, self.c_out = schedule, S, c_skip, c_out

    def __call__(self, x_t, t, cond=None):
        alpha, sigma = alpha_sigma(self.schedule, int(t[0]))
        f = MU + self.S / math.hypot(alpha * self.S, sigma) * (x_t - alpha * MU)
        return f if self.c_skip is None else (f - self.c_skip(t[0]) * x_t) / self.c_out(t[0])


def moments(denoiser, ts, S):
    """Mean and variance of each state from N(alpha MU, V) at ts[0], without a random number.

    Every step is linear in x_T and in its noise: sample 0 has neither, sample 1 starts one deviation higher, and
    sample 1 + i alone gets noise i.
    """
    alpha, sigma = alpha_sigma(denoiser.schedule, ts[0])
    x_T = np.full((len(ts) + 1, 1), alpha * MU)
    x_T[1] += math.hypot(alpha * S, sigma)
    draws = Noise(len(x_T), given=lambda i: np.eye(len(x_T))[i + 1][:, None])
    for state in lcm(denoiser, x_T, ts, streams=draws):
        yield state.t, state.x_t[0, 0], ((state.x_t[1:] - state.x_t[0]) ** 2).sum()


@pytest.mark.law(41, "with the exact f every state of consistency sampling is N(alpha mu, V), the last N(mu, S^2): in "
                     "any number of steps, from any x_T ~ N(alpha mu, V)",
                 source="f is affine on Gaussian data; its moments without chance", tolerance="1e-9: rounding / sigma")
@quickly
@given(schedule_and_list(ends_at_zero=None), st.floats(0.1, 3), st.booleans())
def test_samples_have_the_law_of_the_data(schedule_and_list, S, scaled):
    """Bugs: noise at the last step, or of t's level; scalings that are not those of the network."""
    schedule, ts = schedule_and_list
    denoiser = Flow(schedule, S)
    if scaled:                                              # by EDM's identity c_skip + c_out^2 = 1, at times 1 ... T
        c_skip = lambda t: 0.25 / ((3 * (t + 1)) ** 2 + 0.25)  # noqa: E731
        denoiser = BoundaryCondition(Flow(schedule, S, c_skip, lambda t: math.sqrt(1 - c_skip(t))),
                                     np.arange(1, schedule.T + 1), 3.0)
    for t, mean, variance in moments(denoiser, ts, S):
        alpha, sigma = alpha_sigma(schedule, t)
        np.testing.assert_allclose([mean, variance], [alpha * MU, alpha**2 * S**2 + sigma**2], rtol=1e-9, atol=1e-12)


@pytest.mark.law(41, "f is where the flow ends, and is constant along it: f(x_s, s) = f(x_t, t)",
                 source="the probability-flow ODE dx/dlambda = alpha sigma^2 x0_hat - alpha^2 sigma eps_hat, by DOP853",
                 tolerance="1e-3: sigma = 3e-4 is left at the end of the flow; 1e-7 on the way")
@pytest.mark.parametrize("S", [0.3, 2.0])
def test_the_flow_ends_at_f(S):
    def alpha_sigma_at(lam):
        return 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam))

    def f(x, lam):
        alpha, sigma = alpha_sigma_at(lam)
        return MU + S / math.hypot(alpha * S, sigma) * (x - alpha * MU)

    def slope(lam, x):
        # x = alpha x_0 + sigma eps with both held fixed: d alpha = sigma^2 alpha, d sigma = -alpha^2 sigma
        alpha, sigma = alpha_sigma_at(lam)
        x0_hat = MU + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x - alpha * MU)
        return sigma**2 * alpha * x0_hat - alpha**2 * (x - alpha * x0_hat)
    flow = solve_ivp(slope, (-4, 8), [1.3], method="DOP853", rtol=1e-10, atol=1e-12, t_eval=[-4, -1, 0, 2, 8])
    ends = [f(x, lam) for lam, x in zip(flow.t, flow.y[0], strict=True)]
    np.testing.assert_allclose(ends, ends[0], rtol=1e-7)
    np.testing.assert_allclose(ends[0], flow.y[0, -1], rtol=1e-3)       # sigma = 3e-4 is left


@quickly
@given(schedule_and_list(), st.floats(0.1, 3))
def test_another_denoiser_gives_too_little_variance(schedule_and_list, S):
    """With E[x_0 | x_t] in place of f: alpha^2 S^4 / V after one step, and less than S^2 after more."""
    schedule, ts = schedule_and_list
    mean_of = GaussianDenoiser(schedule, np.array([MU]), np.array([S**2]))
    *_, (_, _, variance) = moments(mean_of, ts, S)
    alpha, sigma = alpha_sigma(schedule, ts[-1])
    assert variance < S**2 * (1 - 1e-9)
    if len(ts) == 1:
        assert variance == pytest.approx(alpha**2 * S**4 / (alpha**2 * S**2 + sigma**2))


@pytest.mark.law(41, "f(x, 0) = x, whatever the network says; c_skip + c_out^2 = 1",
                 source="Luo et al. 2023, section 4.1; Karras et al. 2022, table 1 over sigma_data", tolerance="1e-12")
@given(st.integers(0, 999), st.floats(0.01, 20))
def test_the_boundary_condition(t, scaling):
    class Constant:
        schedule, predicts = None, "x0"

        def __init__(self, value):
            self.value = value

        def __call__(self, x_t, t, cond=None):
            return np.full_like(x_t, self.value)

    def f_of(value):                                        # at x_t = 1
        f = BoundaryCondition(Constant(value), np.arange(1000.0), scaling)
        return float(f(np.ones((1, 1)), np.array([t]))[0, 0])
    c_skip, c_skip_and_c_out = f_of(0.0), f_of(1.0)
    assert c_skip + (c_skip_and_c_out - c_skip) ** 2 == pytest.approx(1, abs=1e-12)
    if t == 0:
        assert (c_skip, c_skip_and_c_out) == (1, 1)
    else:
        assert c_skip == pytest.approx(1 / (1 + (2 * scaling * t) ** 2), rel=1e-12)


def test_the_samples_of_a_mixture_of_points_are_its_points():
    """Far from every other point the flow ends at the nearest: with f of two points, samples are the points, half each.

    f = sign(x) holds for +1 and -1 by symmetry."""
    schedule, rng = cosine(100), np.random.default_rng(0)
    f = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: np.sign(x_t))
    x = sample(lcm(f, rng.standard_normal((4000, 1)), times(schedule, 4), streams=Noise(4000, rng)))
    assert set(np.unique(x)) == {-1.0, 1.0} and abs((x > 0).mean() - 0.5) < 5.5 * 0.5 / math.sqrt(4000)    # 4e-8


# ---- pairs of points -----------------------------------------------------------------------------------------

def flow(schedule, x_t, t, s, S):
    """Where the exact flow of N(MU, S^2) carries x_t: law 25."""
    (alpha, sigma), (alpha_s, sigma_s) = alphas_sigmas(schedule, t, x_t), alphas_sigmas(schedule, s, x_t)
    return alpha_s * MU + np.hypot(alpha_s * S, sigma_s) / np.hypot(alpha * S, sigma) * (x_t - alpha * MU)


@pytest.mark.law(41, "a step of the teacher, each sample between times of its own: x_s - alpha_s mu = (alpha_s "
                     "alpha_t S^2 + sigma_s sigma_t) / V_t (x_t - alpha_t mu); on a point, S = 0, it is the flow",
                 source="law 24, with the alphas and sigmas of the table", tolerance="1e-9: rounding / sigma")
@quickly
@given(any_schedule(), seeds, st.sampled_from([0.0, 0.4, 2.0]))
def test_a_pair_is_one_ddim_step(schedule, seed, S):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, schedule.T, 5)
    s, x_t = rng.integers(-1, t), rng.normal(size=(5, 2))
    (alpha, sigma), (alpha_s, sigma_s) = alphas_sigmas(schedule, t, x_t), alphas_sigmas(schedule, s, x_t)
    exact = GaussianDenoiser(schedule, np.full(2, MU), np.full(2, S**2))
    factor = (alpha_s * alpha * S**2 + sigma_s * sigma) / (alpha**2 * S**2 + sigma**2)
    x_s = ddim_step(exact, x_t, t, s)
    np.testing.assert_allclose(x_s, alpha_s * MU + factor * (x_t - alpha * MU), rtol=1e-9, atol=1e-9)
    if S == 0:
        np.testing.assert_allclose(x_s, flow(schedule, x_t, t, s, S), rtol=1e-9, atol=1e-9)
    clean = ddim_step(exact, x_t, t, np.full(5, -1))
    np.testing.assert_array_equal(clean, exact(x_t, t))


@pytest.mark.law(41, "both points of a pair lie on one path of the flow, but for the local error of a method of first "
                     "order: h^2 for a stride h",
                 source="the exact flow of a Gaussian, law 25", tolerance=".1 of the order: the error's next term")
@pytest.mark.parametrize("S", [0.3, 2.0])
def test_a_pair_lies_on_one_path_to_second_order_in_its_stride(S):
    schedule = cosine(4096)                                 # equal strides of t are nearly equal angles
    exact = GaussianDenoiser(schedule, np.array([MU]), np.array([S**2]))
    strides, t = np.array([256, 128, 64, 32]), np.full(4, 2500)
    x_t = np.full((4, 1), 1.3)
    error = np.abs(ddim_step(exact, x_t, t, t - strides) - flow(schedule, x_t, t, t - strides, S))[:, 0]
    assert np.polyfit(np.log(strides), np.log(error), 1)[0] == pytest.approx(2, abs=0.1)


@quickly
@given(any_schedule(), st.data())
def test_the_intervals_lie_end_to_end_from_noise_to_the_clean_image(schedule, data):
    N = data.draw(st.integers(1, schedule.T))
    t, s = neighbours(schedule, N, np.arange(N))
    assert t[0] == schedule.T - 1 and s[-1] == -1 and (t[1:] == s[:-1]).all() and (s < t).all()
    some = data.draw(st.lists(st.integers(0, N - 1), min_size=1))
    for whole, part in zip((t, s), neighbours(schedule, N, np.array(some)), strict=True):
        assert part.tolist() == whole[some].tolist()


@pytest.mark.parametrize("make, sentence", [
    (lambda exact: ddim_step(exact, np.zeros((2, 1)), np.array([3, 5]), np.array([2, 5])), "s must be earlier than t"),
    (lambda exact: ddim_step(exact, np.zeros((2, 1)), np.array([3, 5]), np.array([2])), "s must be earlier than t"),
    *((lambda exact, n=n: neighbours(exact.schedule, 4, np.array([0, n])), "n must be of 0..3") for n in (-1, 4)),
    (lambda exact: neighbours(exact.schedule, 11, np.array([0])), "steps must be a whole number from 1 to 10"),
])
def test_refusals_name_the_argument(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(GaussianDenoiser(cosine(10, allow_signal=True), np.zeros(1), np.ones(1)))
