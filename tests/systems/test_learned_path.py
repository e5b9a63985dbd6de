"""The learned path: its gradients are those of the bound and of the variance, by quadrature and central differences."""

import numpy as np
import pytest
from scipy import integrate, special, stats
from support.gradcheck import check_gradients
from support.law_tools import LEVELS

from minidiff.diffusion.times import stratified_uniform
from minidiff.diffusion.variational import PiecewiseLinear
from minidiff.engine.tensor import gradients
from minidiff.systems.learned_path import AT_END, FLOOR, INSIDE, MARGIN, SMALL, UNIT, LearnedPath, with_ends

B = 34 * 100                                                # the probability of each end is 1/34


def made(K: int = 4, seed: int = 0) -> LearnedPath:
    rng = np.random.default_rng(seed)
    path = LearnedPath(-9.0, 3.0, K, rng).astype(np.float64)
    path.ends.data, path.w.data = rng.normal(size=2), rng.normal(size=K)
    return path


def spread() -> np.ndarray:
    return with_ends((np.arange(B) + 0.5) / B)


def m(gamma):
    """A mean squared error that depends on gamma."""
    return 0.2 + np.exp(-((gamma + 2) / 3) ** 2)


def test_times_are_at_each_end_as_often_as_its_weight_says():
    t = with_ends(stratified_uniform(np.random.default_rng(0), B))
    assert (t < 0).sum() == (t >= 1).sum() == B / AT_END == 100
    assert ((t >= 0) & (t < 1)).sum() == pytest.approx(B / INSIDE, abs=1e-9)
    inside = np.sort(t[(t >= 0) & (t < 1)])
    np.testing.assert_allclose(inside, (np.arange(len(inside)) + 0.5) / len(inside), atol=1 / len(inside))
    assert t.min() >= -MARGIN and t.max() < 1 + MARGIN


@pytest.mark.parametrize("seed", range(5))
def test_the_path_is_the_one_of_its_parameters_and_rises(seed):
    learned = made(7, seed)
    learned.w.data *= 30                                    # far apart: each piece keeps its floor
    path = learned.path()
    gamma_0, gamma_1 = (float(g.data) for g in learned.gammas())
    assert (path.gamma_0, path.gamma_1) == (gamma_0, gamma_1) == tuple([-9.0, 3.0] + UNIT * learned.ends.data)
    assert min(path.shares) >= FLOOR / 7 and sum(path.shares) == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(np.exp(learned.log_shares().data), path.shares, rtol=1e-12)
    assert (np.diff(path(np.linspace(0, 1, 200))) > 0).all()
    fresh = LearnedPath(-9.0, 3.0, 5, np.random.default_rng(0)).path()
    np.testing.assert_allclose(fresh(np.array([0, 0.3, 1])), [-9, -5.4, 3])         # a straight line at first


@pytest.mark.law("20b", "d/d gamma_1 int m d gamma = m(gamma_1), d/d gamma_0 = -m(gamma_0)",
                 source="Leibniz; central differences of scipy's quadrature", tolerance="1e-6: differences over 1e-4")
def test_the_ends_follow_the_derivative_of_the_bound():
    learned, t = made(), spread()
    path = learned.path()
    loss = learned.at_the_ends(t, m(path(t.clip(0, 1))))
    assert loss.data == 0
    d0, d1 = gradients(loss, [learned.ends])[0]

    def diffusion(gamma_0, gamma_1):
        return integrate.quad(m, gamma_0, gamma_1, epsrel=1e-11)[0]
    a, b, h = path.gamma_0, path.gamma_1, 1e-4
    assert d0 == pytest.approx(UNIT * (diffusion(a + h, b) - diffusion(a - h, b)) / (2 * h), rel=1e-6)
    assert d1 == pytest.approx(UNIT * (diffusion(a, b + h) - diffusion(a, b - h)) / (2 * h), rel=1e-6)


@pytest.mark.law("20b", "d/dw E[(gamma' m)^2] = -E[(gamma' m)^2 d log shares[k]]",
                 source="int m^2 gamma' d gamma of each piece, by scipy's quadrature; central differences",
                 tolerance="1e-3: a sum over 3200 times")
def test_the_pieces_follow_the_derivative_of_the_variance():
    learned, t = made(), spread()
    path = learned.path()
    L = path.slope(t.clip(0, 1)) * m(path(t.clip(0, 1)))
    loss = learned.pieces(t, L)
    assert loss.data == 0
    dw = gradients(loss, [learned.w])[0] / SMALL
    knots = path.gamma_0 + (path.gamma_1 - path.gamma_0) * np.arange(5) / 4
    squares = [integrate.quad(lambda gamma: m(gamma) ** 2, *pair)[0] for pair in zip(knots, knots[1:], strict=False)]

    def second_moment(w):
        shares = (1 - FLOOR) * np.exp(w) / np.exp(w).sum() + FLOOR / 4
        return ((path.gamma_1 - path.gamma_0) / (4 * shares) * squares).sum()
    h, w = 1e-5, learned.w.data
    numeric = [(second_moment(w + h * e) - second_moment(w - h * e)) / (2 * h) for e in np.eye(4)]
    np.testing.assert_allclose(dw, numeric, rtol=1e-3, atol=1e-3 * np.abs(numeric).max())
    # what descends it lowers the variance, and the mean stays
    better = PiecewiseLinear(path.gamma_0, path.gamma_1, tuple(np.sqrt(squares) / np.sqrt(squares).sum()))
    u = (np.arange(B) + 0.5) / B
    of = [p.slope(u) * m(p(u)) for p in (path, better)]
    assert of[1].var() < of[0].var() and of[1].mean() == pytest.approx(of[0].mean(), rel=1e-3)


def test_the_gradients_of_prior_and_decoder():
    """By central differences through the whole term, the noise being the same."""
    rng, learned = np.random.default_rng(1), made()
    x_0, eps = LEVELS[rng.integers(0, 256, (5, 2, 2, 1))], rng.normal(size=(5, 2, 2, 1))
    t = np.array([-0.01, 0.4, 1.01, -0.02, 0.9])
    check_gradients(lambda ends: learned.prior(x_0), learned.ends)
    check_gradients(lambda ends: learned.decoder(x_0, t, eps), learned.ends)
    assert learned.decoder(x_0, np.full(5, 0.5), eps).data == 0


def test_a_batch_s_decoder_term_is_unbiased_whatever_it_drew():
    """Each sample at the start, which one in 34 is, stands for 34.  Bug: the mean over those that were drawn."""
    rng, learned = np.random.default_rng(1), made()
    x_0, eps = LEVELS[rng.integers(0, 256, (5, 2, 2, 1))], rng.normal(size=(5, 2, 2, 1))
    gamma = learned.path().gamma_0
    alpha, sigma = 1 / np.sqrt(1 + np.exp(gamma)), 1 / np.sqrt(1 + np.exp(-gamma))

    def cost(i):
        density = stats.norm.logpdf((alpha * x_0[i] + sigma * eps[i]).reshape(-1, 1), alpha * LEVELS, sigma)
        own = stats.norm.logpdf(sigma * eps[i], 0, sigma).reshape(-1)
        return -(own - special.logsumexp(density, axis=1)).mean()
    many, noise = (np.repeat(a[:1], 34, axis=0) for a in (x_0, eps))
    times = with_ends((np.arange(34) + 0.5) / 34)           # one of them is at the start
    assert float(learned.decoder(many, times, noise).data) == pytest.approx(cost(0), rel=1e-9)
    for t, drawn in (([-0.01, 0.4, 1.01, -0.02, 0.9], (0, 3)), ([0.1, 0.2, -0.01, 1.01, 0.9], (2,))):
        expected = 34 * sum(map(cost, drawn)) / 5
        assert float(learned.decoder(x_0, np.array(t), eps).data) == pytest.approx(expected, rel=1e-9)


def test_the_prior_is_the_divergence_from_noise():
    """KL(N(alpha x_0, sigma^2) || N(0, 1)), by 3-node Gauss-Hermite, exact for a quadratic."""
    learned, x_0 = made(), LEVELS[[3, 200, 255]].reshape(1, 3, 1, 1)
    gamma = learned.path().gamma_1
    alpha, sigma = 1 / np.sqrt(1 + np.exp(gamma)), 1 / np.sqrt(1 + np.exp(-gamma))
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    z = alpha * x_0.reshape(-1, 1) + sigma * nodes
    kl = (0.5 * z**2 - 0.5 * nodes**2 - np.log(sigma)) @ weights / weights.sum()
    assert float(learned.prior(x_0).data) == pytest.approx(kl.mean(), rel=1e-9)
