"""Laws 20 and 21 in continuous time: the bound is the same along every path, and tight for exact denoisers."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats
from support.diffusion_strategies import seeds
from support.law_tools import LEVELS, quickly

from minidiff.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.diffusion.variational import (
    LevelDecoder,
    PiecewiseLinear,
    alpha_of,
    bits_by_noise,
    continuous_bound,
    diffusion_draws,
    noised,
    prior_nats,
    sigma_of,
)
from minidiff.engine.random import SampleStreams

getcontext().prec = 40


class Grid:
    """In the place of SampleStreams: the middle of each part of [0, 1], and given noise."""

    def __init__(self, eps: np.ndarray):
        self.eps = eps

    def __len__(self):
        return len(self.eps)

    def uniform(self):
        return np.full(len(self.eps), 0.5)

    def normal(self, shape, dtype):
        return self.eps.reshape(-1, *shape).astype(dtype)


def exact(denoiser_at):
    """eps_hat of an exact denoiser: denoiser_at(schedule) is one of diffusion/exact.py."""
    def predict(x_t, gamma):
        assert (gamma == gamma[0]).all()
        denoiser = denoiser_at(Schedule(special.expit(-gamma[:1])))
        x0_hat = denoiser(x_t, np.zeros(len(x_t), int))
        return (x_t - math.sqrt(special.expit(-gamma[0])) * x0_hat) / math.sqrt(special.expit(gamma[0]))
    return predict


def random_path(rng, parts: int, gamma_0: float, gamma_1: float, K: int = 5) -> PiecewiseLinear:
    """A path whose pieces end at multiples of 1/parts, so that the middles of the parts integrate each by itself."""
    fewest = parts // (4 * K)
    counts = fewest + rng.multinomial(parts - fewest * K, rng.dirichlet(np.full(K, 2.0)))
    return PiecewiseLinear(gamma_0, gamma_1, tuple(counts / parts))


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(20)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


# ---- the path ------------------------------------------------------------------------------------------------

@pytest.mark.law("20b", "gamma(t) rises strictly from gamma_0 to gamma_1, and slope(t) is its derivative",
                 source="VDM section 3.2; central differences within a piece",
                 tolerance="1e-6: differences over 1e-7 of numbers of up to 20, rounded at 1e-16")
@quickly
@given(seeds, st.integers(1, 12), st.floats(-15, -5), st.floats(0.5, 20))
def test_a_path_rises_from_end_to_end(seed, K, gamma_0, width):
    rng = np.random.default_rng(seed)
    path = PiecewiseLinear(gamma_0, gamma_0 + width, tuple(rng.dirichlet(np.full(K, 1.0)) * 0.9 + 0.1 / K))
    t = np.sort(rng.uniform(0, 1, 50))
    assert (np.diff(path(np.unique(t))) > 0).all() and (path.slope(t) > 0).all()
    assert path(0.0) == gamma_0 and path(1.0) == pytest.approx(gamma_0 + width, rel=1e-12)
    h = 1e-7
    inside = np.abs(t[:, None] - path.knots).min(1) > 2 * h
    np.testing.assert_allclose(((path(t + h) - path(t - h)) / (2 * h))[inside], path.slope(t)[inside], rtol=1e-6)
    # a uniform time has gamma below the k-th knot with probability t_k
    np.testing.assert_allclose(path(path.knots), np.linspace(gamma_0, gamma_0 + width, K + 1), rtol=1e-9, atol=1e-9)
    table = path.table(9)
    assert table.name == "a path in log-SNR"
    np.testing.assert_allclose(-table.log_snr(np.arange(9)), path(np.arange(9) / 8), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("wrong, message", [
    ((0.0, 1.0, (0.5, 0.4)), "shares must be positive numbers of sum 1"), ((0.0, 1.0, (1.5, -0.5)), "shares"),
    ((0.0, 1.0, ()), "shares"), ((1.0, 1.0), "gamma_0 must be less than gamma_1"),
    ((-math.inf, 1.0), "gamma_0 must be less"), ((0.0, math.nan), "gamma_0 must be less")])
def test_other_paths_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PiecewiseLinear(*wrong)


@pytest.mark.law("20b", "alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma), each to full precision, at gamma = -13 "
                        "too", source="VDM section 3.2; 40-digit decimals",
                 tolerance="1e-15, and 2e-7 in float32: rounding")
@pytest.mark.parametrize("gamma", [-30.0, -13.3, -1.0, 0.0, 6.0, 30.0])
def test_alpha_and_sigma_lose_no_digits(gamma):
    grown = Decimal(gamma).exp()
    for got, expected in ((sigma_of(gamma), grown / (1 + grown)), (alpha_of(gamma), 1 / (1 + grown))):
        assert abs(Decimal(float(got)) / expected.sqrt() - 1) < Decimal("1e-15")
    eps = np.random.default_rng(0).standard_normal((3, 5), dtype=np.float32)
    x_t = noised(np.zeros((3, 5), np.float32), np.full(3, gamma), eps)              # in float32, sigma is still right
    assert x_t.dtype == np.float32
    np.testing.assert_allclose(x_t, float((grown / (1 + grown)).sqrt()) * eps.astype(np.float64), rtol=2e-7)


# ---- the bound is the same along every path --------------------------------------------------------------------

@pytest.mark.law(20, "1/2 E[gamma'(t) ||eps - eps_hat||^2] is the same along every path: int m d gamma (mixtures)",
                 source="VDM section 5.1; scipy's quadrature over gamma of the mixture's mmse, by its own posterior",
                 tolerance="2e-4: the midpoint rule with 100 parts, at most 4 times as wide as even ones")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_bound_does_not_depend_on_the_path(seed):
    rng = np.random.default_rng(seed)
    w, mu, s2 = rng.dirichlet([3.0, 3.0]), rng.normal(size=2), rng.uniform(0.2, 1.0, 2)
    a, b, parts = -4.0, 3.0, 100
    # x_0 of both components and eps, with weights: E over data and noise
    k, x, e = (v.ravel() for v in np.meshgrid([0, 1], NODES, NODES, indexing="ij"))
    weight = (w[:, None, None] * WEIGHTS[:, None] * WEIGHTS).ravel()
    x_0 = (mu[k.astype(int)] + np.sqrt(s2[k.astype(int)]) * x)[:, None]
    predict = exact(lambda schedule: MixtureDenoiser(schedule, w, mu[:, None], s2[:, None]))

    def along(path):
        draws = diffusion_draws(predict, path, x_0, streams=Grid(e), terms=parts)
        return sum(weight @ nats for _, nats in draws) / parts
    straight, other = (along(path) for path in (PiecewiseLinear(a, b), random_path(rng, parts, a, b)))

    def m(gamma):                                           # 1/2 E[(eps - eps_hat)^2] = SNR/2 E Var[x_0 | x_t]
        snr = math.exp(-gamma)
        y = x_0[:, 0] + e / math.sqrt(snr)                  # x_t / alpha
        V = s2 + 1 / snr
        log_r = np.log(w) + stats.norm.logpdf(y[:, None], mu, np.sqrt(V))
        r = np.exp(log_r - special.logsumexp(log_r, axis=1, keepdims=True))
        means = mu + s2 / V * (y[:, None] - mu)
        variance = (r * (s2 / snr / V + means**2)).sum(1) - (r * means).sum(1) ** 2
        return snr / 2 * (weight @ variance)
    expected, _ = integrate.quad(m, a, b, epsrel=1e-6)
    assert straight == pytest.approx(expected, rel=2e-4) and other == pytest.approx(expected, rel=2e-4)


@pytest.mark.law(20, "an error of e in every number costs e^2 (gamma_1 - gamma_0)/2, with times spread over the path",
                 source="VDM section 5", tolerance="1e-9: x_t over sigma, rounded at 1e-16")
def test_a_constant_error_costs_half_its_square_times_the_width():
    path, x_0 = PiecewiseLinear(-6.0, 4.0), np.zeros((3, 2, 2, 1))
    seen = []

    def predict(x_t, gamma):
        seen.append(gamma)
        return x_t / sigma_of(gamma)[:, None, None, None] + 0.3                       # eps + 0.3, since x_0 is 0
    draws = diffusion_draws(predict, path, x_0, streams=SampleStreams(0, 3), terms=5)
    np.testing.assert_allclose(sum(nats for _, nats in draws) / 5, 0.5 * 10 * 4 * 0.09, rtol=1e-9)
    # each sample has one time in each fifth of the path, its own
    place = (np.array(seen) + 6) / 10
    assert (np.floor(place * 5) == np.arange(5)[:, None]).all() and len(np.unique(place)) == 15


# ---- tight where the denoiser is exact -------------------------------------------------------------------------

@pytest.mark.law(20, "Gaussian data: -log p(x_0) = diffusion - E log p(x_0 | x_t) at gamma_0 + KL(q || p) of x_t at "
                     "gamma_1, for every x_0: no gap in the limit",
                 source="VDM section 5; each Gaussian in closed form, eps by 3 nodes, exact for a square",
                 tolerance="1e-3: the midpoint rule with 500 parts")
@pytest.mark.parametrize("mu, s2", [(0.0, 1.0), (0.4, 0.3), (-1.0, 2.5)])
def test_the_bound_of_gaussian_data_has_no_gap(mu, s2):
    a, b, parts = -6.0, 5.0, 500
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    points = np.array([-1.3, 0.2, 1.7])
    x_0, e = (v.reshape(-1, 1) for v in np.meshgrid(points, nodes, indexing="ij"))
    predict = exact(lambda schedule: GaussianDenoiser(schedule, np.array([mu]), np.array([s2])))
    path = random_path(np.random.default_rng(0), parts, a, b)
    draws = diffusion_draws(predict, path, x_0, streams=Grid(e), terms=parts)
    diffusion = (sum(nats for _, nats in draws) / parts).reshape(3, 3) @ (weights / weights.sum())
    for x, got in zip(points, diffusion, strict=True):
        # p(x_0 | x_t) at gamma_0 = N(mean, v), by Bayes; the mean over eps of its logarithm
        alpha2, sigma2 = special.expit(-a), special.expit(a)
        v = 1 / (1 / s2 + alpha2 / sigma2)
        bias = v * (x - mu) / s2                            # of x - mean; its noise has variance v^2 alpha^2/sigma^2
        decoder = 0.5 * math.log(2 * math.pi * v) + 0.5 * (bias**2 + v * v * alpha2 / sigma2) / v
        alpha2, sigma2 = special.expit(-b), special.expit(b)
        V = alpha2 * s2 + sigma2
        kl = 0.5 * (sigma2 / V - 1 - math.log(sigma2 / V) + alpha2 * (x - mu) ** 2 / V)
        assert got + decoder + kl == pytest.approx(-stats.norm.logpdf(x, mu, math.sqrt(s2)), abs=1e-3)
        if (mu, s2) == (0.0, 1.0):                          # then p is N(0, 1) at gamma_1, as the bound has it
            assert kl == pytest.approx(float(prior_nats(np.array([[x]]), b)[0, 0]), rel=1e-9)


def levels_denoiser(log_w):
    """eps_hat for one pixel with these log probabilities of the levels: the posterior, written out."""
    def predict(x_t, gamma):
        alpha, sigma = math.sqrt(special.expit(-gamma[0])), math.sqrt(special.expit(gamma[0]))
        p = special.softmax(log_w - (x_t - alpha * LEVELS) ** 2 / (2 * sigma**2), axis=-1)
        return (x_t - alpha * (p * LEVELS).sum(-1, keepdims=True)) / sigma
    return predict


@pytest.mark.law(21, "8-bit data whose pixels are independent: the bound is -log2 of the level's probability, "
                     "discretisation included; 8 bits of uniform levels",
                 source="VDM section 3.5; the probabilities themselves, eps by the trapezoidal rule",
                 tolerance="0.01 bits: gamma_1 = 9, and 200 parts; at gamma_0 = -15 no two levels are confused")
@pytest.mark.parametrize("black", [1 / 256, 0.8])
def test_the_bound_of_known_levels_is_their_probability(black):
    w = np.full(256, (1 - black) / 255)
    w[0] = black
    u = np.array([0, 1, 100, 255])
    e = np.linspace(-5, 5, 31)
    weight = stats.norm.pdf(e) / stats.norm.pdf(e).sum()
    x_0, eps = (v.reshape(-1, 1) for v in np.meshgrid(LEVELS[u], e, indexing="ij"))
    path = PiecewiseLinear(-15.0, 9.0)
    bound = continuous_bound(levels_denoiser(np.log(w)), path, x_0, streams=Grid(eps), terms=200)
    got = bound.total.reshape(4, -1) @ weight / math.log(2)
    np.testing.assert_allclose(got, -np.log2(w[u]), atol=0.01)


def test_the_rows_by_noise_sum_to_the_second_term():
    rng = np.random.default_rng(0)
    x_0, path = LEVELS[rng.integers(0, 256, (6, 1))], random_path(rng, 40, -13.3, 6.0)
    predict = levels_denoiser(np.zeros(256))

    def one_by_one(x_t, gamma):
        return np.concatenate([predict(x_t[i:i + 1], gamma[i:i + 1]) for i in range(len(x_t))])
    rows = bits_by_noise(one_by_one, path, x_0, [-13.3, -8.0, 0.0, 6.0], streams=SampleStreams(1, 6), terms=30)
    whole = continuous_bound(one_by_one, path, x_0, streams=SampleStreams(1, 6), terms=30).steps.mean() / math.log(2)
    assert [(row.start, row.stop) for row in rows] == [(-13.3, -8.0), (-8.0, 0.0), (0.0, 6.0)]
    assert sum(row.bits for row in rows) == pytest.approx(whole, rel=1e-12)
    # noise of less than a sixth of a level costs nothing
    fine, = bits_by_noise(one_by_one, PiecewiseLinear(-20.0, -15.0), x_0, [-20.0, -15.0], streams=SampleStreams(1, 6))
    assert fine.bits < 1e-6 < rows[0].bits and all(row.error > 0 for row in rows)
    middle = [rows[i].bits for i in range(3)]
    assert middle[1] > middle[2]
    # other noise levels are in no row
    alone, = bits_by_noise(one_by_one, path, x_0, [-8.0, 0.0], streams=SampleStreams(1, 6), terms=30)
    assert alone == rows[1]
    # a draw at the last edge belongs to the last row
    drawn = []
    bits_by_noise(lambda x_t, gamma: drawn.extend(gamma) or one_by_one(x_t, gamma), path, x_0, [-13.3, 6.0],
                  streams=SampleStreams(1, 6), terms=30)
    to_the_last, = bits_by_noise(one_by_one, path, x_0, [-13.3, max(drawn)], streams=SampleStreams(1, 6), terms=30)
    assert to_the_last.bits == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match="the number of samples must be a whole number of at least 2, not 1"):
        bits_by_noise(one_by_one, path, x_0[:1], [-8.0, 0.0], streams=SampleStreams(1, 1))
    with pytest.raises(ValueError, match="edges must be two or more gammas that rise"):
        bits_by_noise(one_by_one, path, x_0, [0.0, 0.0], streams=SampleStreams(1, 6))


# ---- the decoder ------------------------------------------------------------------------------------------------

@pytest.mark.law(21, "p(x_0 = level u | x_t) = q(x_t | u) / sum_k q(x_t | k): they sum to 1, and become certain as "
                     "gamma falls", source="VDM section 3.3; scipy's normal densities", tolerance="1e-9: logarithms")
@quickly
@given(st.integers(0, 255), st.floats(-9, 5), st.floats(-2, 2))
def test_the_decoder_over_levels(u, gamma, eps):
    alpha, sigma = math.sqrt(1 / (1 + math.exp(gamma))), math.sqrt(1 / (1 + math.exp(-gamma)))
    x_t = np.array([alpha * LEVELS[u] + sigma * eps])
    decode = LevelDecoder(gamma)
    density = stats.norm.logpdf(x_t, alpha * LEVELS, sigma)
    np.testing.assert_allclose(decode(LEVELS[[u]], x_t), density[u] - special.logsumexp(density), rtol=1e-9, atol=1e-9)
    assert np.exp(decode.log_probabilities(x_t)).sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose([decode(LEVELS[[k]], x_t)[0] for k in (0, 7, 255)],
                               decode.log_probabilities(x_t)[0, [0, 7, 255]], rtol=1e-9)
    # one noise may cost less where more levels compete; far below a level's width, none costs anything
    costs = [-float(LevelDecoder(g)(LEVELS[[u]], noised(LEVELS[[u]], np.array([g]), np.array([eps])))[0])
             for g in (-16.0, -30.0)]
    assert costs[0] < 1e-9 and costs[1] == 0


@pytest.mark.slow
def test_less_noise_tells_more_of_the_level():
    """H(level | x_t), the mean over levels and noise, falls with gamma from log 256 nats to 0: data processing."""
    eps = np.linspace(-6, 6, 49)
    weight = stats.norm.pdf(eps) / stats.norm.pdf(eps).sum()
    entropy = []
    for gamma in (16.0, 0.0, -4.0, -8.0, -9.0, -10.0, -11.0, -12.0, -13.3, -16.0):
        x_0 = np.repeat(LEVELS, len(eps))[:, None]
        x_t = noised(x_0, np.full(len(x_0), gamma), np.tile(eps, 256)[:, None])
        entropy.append(-LevelDecoder(gamma)(x_0, x_t)[:, 0].reshape(256, -1).mean(0) @ weight)
    assert entropy[0] == pytest.approx(math.log(256), abs=1e-6) and entropy[-1] < 1e-9
    assert (np.diff(entropy) < 0).all()


@pytest.mark.parametrize("gamma, black, grey", [
    (-10.1, 0.949, 1.756), (-13.3, 0.0050, 0.0101), (-14.0, 3.7e-5, 7.3e-5)])
def test_what_the_decoder_costs(gamma, black, grey):
    """In bits, of a black pixel, which has one neighbour, and of a grey one; sigma is .0064, .0013 and .0009."""
    eps = np.linspace(-7, 7, 141)
    weight = stats.norm.pdf(eps) / stats.norm.pdf(eps).sum()
    for u, bits in ((0, black), (100, grey)):
        x_0 = np.full((141, 1), LEVELS[u])
        nats = -LevelDecoder(gamma)(x_0, noised(x_0, np.full(141, gamma), eps[:, None]))[:, 0]
        assert weight @ nats / math.log(2) == pytest.approx(bits, rel=0.02)


@quickly
@given(seeds, st.floats(-14, 4))
def test_the_decoders_slope_by_gamma(seed, gamma):
    rng = np.random.default_rng(seed)
    x_0, eps, h = LEVELS[rng.integers(0, 256, (3, 2, 2))], rng.normal(size=(3, 2, 2)), 1e-5

    def at(g):
        return LevelDecoder(g)(x_0, noised(x_0, np.full(3, g), eps))
    numeric = (at(gamma + h) - at(gamma - h)) / (2 * h)
    np.testing.assert_allclose(LevelDecoder(gamma).slope(x_0, eps), numeric, rtol=1e-6, atol=1e-8)


def test_other_values_than_levels_are_refused():
    with pytest.raises(ValueError, match="x_0 must be 8-bit values"):
        LevelDecoder(-13.0)(np.array([0.001]), np.array([0.0]))
