"""Editing: what a shortened list keeps, and how far in-painting by replacement is from conditioning.

On Gaussians a run of `inpaint` is linear in what is known and in each number drawn, so that its mean and variance are
read off from its answers to unit inputs, without sampling error.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from support.diffusion_strategies import any_schedule, seeds
from support.law_tools import Noise, covariance, quickly

from minidiff.diffusion.editing import KnownPart, inpaint, shortened
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.multistep import edm_heun
from minidiff.diffusion.samplers import ddim, sample, times
from minidiff.diffusion.schedules import cosine, linear, log_snr_linear
from minidiff.engine.random import SampleStreams
from minidiff.systems.latent import LatentDiffusion

MASK = np.array([True, False])


def gain_and_variance(schedule, rho: float, path, repeats: int = 1) -> tuple[float, float]:
    """Of the second number, given the first: what a known 1 adds to its mean, and its variance.

    One row for the known number, and one for each place of each draw: a 1 there, and 0 in all others.
    """
    denoiser = GaussianDenoiser(schedule, np.zeros(2), np.array([[1, rho], [rho, 1]]))
    silent = Noise(1, given=np.zeros((1, 2)))
    gain = sample(inpaint(denoiser, np.zeros((1, 2)), path, np.array([[1.0, 0]]), MASK, streams=silent,
                          repeats=repeats))[0, 1]
    draws = silent.calls
    unit = np.eye(2 * draws).reshape(draws, 2, 2 * draws).transpose(0, 2, 1)        # (draw, row, number)
    rows = 2 + 2 * draws                                            # the first two: of x_T
    noise = Noise(rows, given=lambda n: np.concatenate([np.zeros((2, 2)), unit[n - 1]]))
    x_T = np.zeros((rows, 2))
    x_T[:2] = np.eye(2)
    answers = sample(inpaint(denoiser, x_T, path, np.zeros((rows, 2)), MASK, streams=noise, repeats=repeats))[:, 1]
    return gain, (answers**2).sum()


@pytest.mark.parametrize("factory, rho", [
    (lambda N: cosine(N, allow_signal=True), 0.3), (lambda N: cosine(N, allow_signal=True), 0.95),
    (lambda N: linear(N, 0.1 / N, 20 / N), -0.8), (lambda N: log_snr_linear(N, 12, -12), 0.8),
], ids=["cosine", "cosine, close", "linear", "log_snr"])
def test_in_painting_by_replacement_has_a_known_bias_with_every_schedule(factory, rho):
    """The limits of N -> infinity that editing.py derives, from N and 2N steps by Richardson's extrapolation."""
    gains, variances = zip(*(gain_and_variance(s, rho, range(s.T - 1, -1, -1)) for s in map(factory, (120, 240))),
                           strict=True)
    limit = [2 * b - a for a, b in (gains, variances)]
    expected = (1 - math.sqrt(1 - rho**2)) / rho, (1 - rho**2) * math.atanh(rho) / rho
    np.testing.assert_allclose(limit, expected, atol=0.01)
    assert abs(expected[0]) < 0.8 * abs(rho) and expected[1] > 1 - rho**2           # far from conditioning


@pytest.mark.parametrize("rho", [0.3, 0.95, -0.8])
def test_in_painting_with_one_noise_by_ddim_has_a_known_bias(rho):
    """The mean in editing.py's limit of N -> infinity, from N and 2N steps; the integral is by another program."""
    def gain(N):
        schedule = log_snr_linear(N, 12, -12)
        denoiser = GaussianDenoiser(schedule, np.zeros(2), np.array([[1, rho], [rho, 1]]))
        known, silent = np.array([[1.0, 0]]), np.zeros((1, 2))
        part = KnownPart(denoiser, known, MASK, silent)
        *_, state = part.states(ddim(part, silent, range(N - 1, -1, -1)))
        assert state.x_t[0, 0] == 1
        return state.x_t[0, 1]
    integral = quad(lambda w: (w**2 - rho**2) ** -1.25, 1, np.inf)[0]
    expected = rho / 2 * (1 - rho**2) ** 0.25 * integral
    assert 2 * gain(400) - gain(200) == pytest.approx(expected, abs=0.003)
    assert abs(rho) / 3 < abs(expected) < abs(rho)


def test_any_sampler_sees_the_known_part_with_its_one_noise_at_every_time():
    schedule, seen = cosine(20, allow_signal=True), []
    known, eps, x_T = (np.random.default_rng(i).normal(size=(2, 3)) for i in range(3))
    mask = np.array([True, False, False])

    class Watched(GaussianDenoiser):
        def __call__(self, x_t, t, cond=None):
            seen.append((int(t[0]), x_t))
            return super().__call__(x_t, t, cond)
    part = KnownPart(Watched(schedule, np.zeros(3), np.eye(3)), known, mask, eps, 19)
    states = list(part.states(edm_heun(part, x_T, [19, 12, 5])))
    assert [t for t, _ in seen] == [19, 12, 12, 5, 5] and part.predicts == "x0"
    assert np.array_equal(seen[0][1], x_T)                  # x_T is noise alone
    for t, x_t in (*seen[1:], *((state.t, state.x_t) for state in states)):
        alpha, sigma = (schedule.alpha(t), schedule.sigma(t)) if t >= 0 else (1, 0)
        assert np.allclose(x_t[:, 0], alpha * known[:, 0] + sigma * eps[:, 0]) and (x_t[:, 1:] != known[:, 1:]).all()
    with pytest.raises(ValueError, match="known must be of eps's shape"):
        KnownPart(part.denoiser, known, mask, eps[:1])


def test_repeated_steps_bring_the_mean_closer_to_conditioning_and_lower_the_variance():
    schedule, rho = cosine(40, allow_signal=True), 0.8
    gains, variances = zip(*(gain_and_variance(schedule, rho, range(39, -1, -1), r) for r in (1, 2, 6)), strict=True)
    assert gains[0] < gains[1] < gains[2] < rho and rho - gains[2] < 0.25 * (rho - gains[0])
    # beta~ of 40 steps is too small a variance each time: at last too little is left of it
    assert variances[0] > 1.2 * (1 - rho**2) and variances[0] > variances[1] > variances[2]


def test_independent_numbers_are_not_misled():
    """rho = 0: what is known says nothing, and replacement leaves the rest as an unconditional run does."""
    schedule = cosine(40, allow_signal=True)
    gain, variance = gain_and_variance(schedule, 0.0, range(39, -1, -1))
    assert gain == 0
    _, alone = gain_and_variance(schedule, 0.0, range(39, -1, -1))
    assert variance == alone and 0.5 < variance <= 1 + 1e-12


@quickly
@given(any_schedule(min_T=2, ends_at_zero=None), st.integers(1, 3), seeds)
def test_the_known_part_comes_back_exactly_and_each_sample_is_its_own(schedule, repeats, seed):
    rng = np.random.default_rng(seed)
    D, B = 4, 3
    denoiser = GaussianDenoiser(schedule, rng.normal(size=D), covariance(rng, D))
    x_T, known, mask = rng.normal(size=(B, D)), rng.normal(size=(B, D)), rng.random((B, D)) < 0.5
    path = sorted(rng.choice(schedule.T, size=min(5, schedule.T), replace=False), reverse=True)
    states = list(inpaint(denoiser, x_T, path, known, mask, streams=SampleStreams(seed, B), repeats=repeats))
    assert [s.t for s in states] == [*path[1:], -1] and np.array_equal(states[-1].x_t[mask], known[mask])
    for i in range(B):
        i = slice(i, i + 1)
        alone = sample(inpaint(denoiser, x_T[i], path, known[i], mask[i], streams=SampleStreams(seed, B)[i],
                               repeats=repeats))
        np.testing.assert_allclose(alone, states[-1].x_t[i], rtol=1e-9, atol=1e-9)


def test_the_known_part_has_the_marginal_of_its_time():
    """On the way it stands at alpha_s x_0 + sigma_s eps, with fresh eps, not at x_0."""
    schedule = cosine(50, allow_signal=True)
    denoiser = GaussianDenoiser(schedule, np.zeros(2), np.eye(2))
    ones = Noise(1, given=np.ones((1, 2)))
    for state in inpaint(denoiser, np.zeros((1, 2)), [49, 30, 10], np.array([[3.0, 0]]), MASK, streams=ones):
        abar = 1.0 if state.t == -1 else schedule.alpha_bar[state.t]
        assert state.x_t[0, 0] == pytest.approx(math.sqrt(abar) * 3 + math.sqrt(1 - abar))


def test_a_repeated_step_goes_up_again_by_the_step_that_it_came_down():
    """What the denoiser is asked the second time: alpha_ts x_s + sigma_ts z, by hand from the table."""
    schedule, asked = cosine(50, allow_signal=True), []

    class Listening(GaussianDenoiser):
        def __call__(self, x_t, t, cond=None):
            asked.append((int(t[0]), x_t[0, 0]))
            return super().__call__(x_t, t, cond)

    denoiser, ones = Listening(schedule, np.zeros(1), np.ones(1)), Noise(1, given=np.ones((1, 1)))
    sample(inpaint(denoiser, np.zeros((1, 1)), [30, 10], np.full((1, 1), 3.0), np.array([True]), streams=ones,
                   repeats=2))
    abar_s, abar_t = schedule.alpha_bar[[10, 30]]
    x_s = math.sqrt(abar_s) * 3 + math.sqrt(1 - abar_s)
    x_t = math.sqrt(abar_t / abar_s) * x_s + math.sqrt(1 - abar_t / abar_s)
    assert asked == [(30, 0), (30, pytest.approx(x_t)), (10, pytest.approx(x_s))]


@given(st.integers(1, 60), st.floats(0, 1))
def test_a_shortened_list_is_the_end_of_the_whole(steps, strength):
    whole = times(cosine(100, allow_signal=True), steps).tolist()
    part = shortened(whole, strength)
    assert len(part) == round(strength * steps) and whole[steps - len(part):] == part
    assert shortened(whole, 0.0) == [] and shortened(whole, 1.0) == whole


def test_image_to_image_on_a_gaussian_keeps_less_the_more_it_is_noised():
    """SDEdit by DDIM on N(0, I): the noised image itself is carried down, alpha_t of the original is left."""
    schedule = cosine(1000)
    denoiser = GaussianDenoiser(schedule, np.zeros(1), np.ones(1))
    kept = []
    for strength in (0.2, 0.5, 0.8):
        path = shortened(times(schedule, 500), strength)
        # with no noise drawn, the image's own share: the exact flow of N(0, I) is the identity on x_t
        kept.append(sample(ddim(denoiser, schedule.alpha(path[0]) * np.ones((1, 1)), path))[0, 0])
        assert kept[-1] == pytest.approx(float(schedule.alpha(path[0])), rel=0.01)  # DDIM's own error, 1/N
    assert kept[0] > kept[1] > kept[2]


class Noise64(Noise):
    """Noise in float64, unless a dtype is given."""

    def normal(self, shape, dtype=np.float64):
        return super().normal(shape, dtype)


class Varied(LatentDiffusion):
    """`vary` with an exact denoiser of Gaussian data for its network, and images for latents."""

    device, _latent_shape = "cpu", ()                       # properties in LatentDiffusion

    def __init__(self, denoiser):
        self.exact, self.schedule, self._latent_shape = denoiser, denoiser.schedule, denoiser.shape
        self.clip = SimpleNamespace(text_states=lambda captions: None)

    encode = decode = staticmethod(lambda x: x)

    def denoiser(self, scale):
        return self.exact


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_a_varied_image_on_correlated_data_is_a_known_linear_map_of_image_and_noise(strength):
    """x_0 ~ N(mu, S).  Along S's eigenvectors the exact flow from t down multiplies x_t - alpha mu by sqrt(S_k / V_k),
    V_k = alpha^2 S_k + sigma^2; and x_t is alpha image + sigma eps.  So, with R = sqrt(S / V), the mean is
    mu + alpha R (image - mu), and the covariance sigma^2 R^2.  1000 steps of DPM++2M, of second order."""
    rng, D = np.random.default_rng(1), 4
    mu, S, image = rng.normal(size=D), covariance(rng, D) / D + 0.05 * np.eye(D), 2 * rng.normal(size=D)
    schedule = cosine(1000)
    model = Varied(GaussianDenoiser(schedule, mu, S))
    # row 0 without noise, row k with 1 in its place k - 1
    eps = Noise64(1 + D, given=np.concatenate([np.zeros((1, D)), np.eye(D)]))
    out = model.vary(np.tile(image, (1 + D, 1)), [""] * (1 + D), strength=strength, steps=1000, streams=eps)
    abar = schedule.alpha_bar[round(strength * 1000) - 1]
    values, U = np.linalg.eigh(S)
    ratio = np.sqrt(values / (abar * values + 1 - abar))
    mean = mu + math.sqrt(abar) * (U * ratio) @ U.T @ (image - mu)
    np.testing.assert_allclose(out[0], mean, atol=3e-4)
    columns = (out[1:] - out[0]).T
    np.testing.assert_allclose(columns @ columns.T, (1 - abar) * (U * ratio**2) @ U.T, atol=1e-4)


def test_refusals():
    schedule = cosine(10, allow_signal=True)
    denoiser, x = GaussianDenoiser(schedule, np.zeros(2), np.eye(2)), np.zeros((1, 2))
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="strength must lie within 0 .* and 1"):
            shortened([3, 2], strength)
    for repeats in (0, True, 1.5):
        with pytest.raises(ValueError, match="repeats must be a whole number of at least 1, not"):
            next(inpaint(denoiser, x, [3], x, MASK, streams=SampleStreams(0, 1), repeats=repeats))
    with pytest.raises(ValueError, match=r"known must be of x_T's shape \(1, 2\)"):
        next(inpaint(denoiser, x, [3], x[:, :1], MASK, streams=SampleStreams(0, 1)))
    with pytest.raises(ValueError, match="mask of booleans, not .* int64"):
        next(inpaint(denoiser, x, [3], x, np.ones(2, int), streams=SampleStreams(0, 1)))
    with pytest.raises(ValueError, match="times must be integers that fall strictly"):
        next(inpaint(denoiser, x, [3, 5], x, MASK, streams=SampleStreams(0, 1)))
