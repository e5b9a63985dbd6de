"""Guidance (laws 29, 30, 32): against exact conditional mixtures, the papers' eps formulas, finite differences."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.diffusion_strategies import any_schedule, seeds
from support.law_tools import alpha_sigma, alphas_sigmas, quickly

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser, dynamic_threshold, static_threshold
from minidiff.diffusion.exact import MixtureDenoiser
from minidiff.diffusion.gaussian import to_x0
from minidiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, GuidanceInterval
from minidiff.diffusion.samplers import ddim, ddpm, heun, sample, times
from minidiff.engine.random import SampleStreams

scales = st.floats(-2, 10)
K = 3


def mixture(schedule, rng):
    return MixtureDenoiser(schedule, rng.dirichlet(np.full(K, 3.0)), rng.normal(size=(K, 2)),
                           rng.uniform(0.1, 1, size=(K, 2)))


def is_class(y):
    """The condition "the component is y", y: (B,)."""
    return (np.arange(K) == y[:, None],)


ANY_CLASS = (np.ones((1, K), bool),)


class Counting:
    """A denoiser that records the size of each batch it gets."""

    def __init__(self, denoiser):
        self.denoiser, self.calls = denoiser, []

    schedule = property(lambda self: self.denoiser.schedule)
    predicts = property(lambda self: self.denoiser.predicts)

    def __call__(self, x_t, t, cond=None):
        self.calls.append(len(x_t))
        return self.denoiser(x_t, t, cond)


def draw(schedule, seed, B=4):
    rng = np.random.default_rng(seed)
    x, t, y = rng.normal(size=(B, 2)) * 1.5, rng.integers(0, schedule.T, B), rng.integers(0, K, B)
    return mixture(schedule, rng), x, t, y


def responsibility_gradient(exact):
    """grad log p(y | x_t), of the exact classifier of noised data, written out here.

    log p(y|x) = log w_y N_y(x) - log sum_k w_k N_k(x), and grad log N_k = -(x - alpha mu_k)/V_k.
    """
    def grad(x_t, t, y):
        alpha, sigma = alphas_sigmas(exact.schedule, t, x_t)
        d = x_t[:, None] - alpha[:, None] * exact.means                               # (B, K, D)
        V = alpha[:, None] ** 2 * exact.variances + sigma[:, None] ** 2
        log_p = exact.log_weights - 0.5 * (d**2 / V + np.log(V)).sum(-1)              # (B, K)
        r = np.exp(log_p - log_p.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
        slopes = -d / V
        return slopes[np.arange(len(y)), y] - (r[..., None] * slopes).sum(1)
    return grad


def grad_log_posterior(exact):
    """The same, by central differences of fourth order of the code's own posterior."""
    def grad(x_t, t, y):
        h = 1e-3 * np.sqrt(1 - exact.schedule.alpha_bar[t])
        rows = np.arange(len(y))
        g = np.empty_like(x_t)
        for i in range(x_t.shape[1]):
            def log_p(k, i=i):
                shifted = x_t.copy()
                shifted[:, i] += k * h
                return np.log(exact.posterior(shifted, t)[rows, y])
            g[:, i] = (8 * (log_p(1) - log_p(-1)) - (log_p(2) - log_p(-2))) / (12 * h)
        return g
    return grad


# ---- law 29: a classifier ------------------------------------------------------------------------------------

@pytest.mark.law(
    29, "score + grad log p_t(y|x_t) = score of p_t(x_t|y): scale 1, with the exact classifier of noised data, gives "
        "E[x_0|x_t, y]",
    source="Dhariwal & Nichol 2021, section 4; Bayes; gradients by differences, the conditional from its own mixture",
    tolerance="1e-6 of alpha x0_hat: differences of fourth order over .001 sigma")
@quickly
@given(any_schedule(), seeds)
def test_the_exact_classifier_at_scale_1_makes_the_conditional_denoiser(schedule, seed):
    exact, x, t, y = draw(schedule, seed)
    guided = ClassifierGuidance(exact, grad_log_posterior(exact), 1.0)(x, t, y)
    alpha, sigma = alphas_sigmas(schedule, t, x)
    np.testing.assert_allclose(alpha * guided, alpha * exact(x, t, is_class(y)), atol=1e-6)
    np.testing.assert_allclose(alpha * guided - x, sigma**2 * exact.score(x, t, is_class(y)), atol=1e-6)


@pytest.mark.law(
    29, "the gradient is taken at x_t, at time t, and shifts the ancestral mean by scale beta g/sqrt(1 - beta)",
    source="mu = (x_t + beta score)/sqrt(1 - beta), DDPM eq. 11 with Tweedie",
    tolerance="1e-7: the shift is a difference of two means rounded at 1e-16 over powers of 6e-6")
@quickly
@given(any_schedule(min_T=3), seeds, st.floats(-3, 3))
def test_the_gradient_at_x_t_shifts_the_ancestral_mean_by_its_share(schedule, seed, scale):
    """Bug: the gradient taken at x_t but applied as if at the mean, or with the variance beta~ for beta."""
    exact, x, _, y = draw(schedule, seed)
    t, s = schedule.T - 1, schedule.T - 3 if schedule.T > 3 else 0
    g, seen = responsibility_gradient(exact), []

    def first_step(scale):
        guided = ClassifierGuidance(exact, lambda *a: seen.append(a) or g(*a), scale)
        return next(ddpm(guided, x, [t, s], y, streams=SampleStreams(seed, 4))).x_t

    one_minus_beta = schedule.alpha_bar[t] / schedule.alpha_bar[s]
    shift = scale * (1 - one_minus_beta) / math.sqrt(one_minus_beta) * g(x, np.full(4, t), y)
    np.testing.assert_allclose(first_step(scale) - first_step(0), shift, rtol=1e-7, atol=1e-9)
    for x_seen, t_seen, y_seen in seen:
        assert np.array_equal(x_seen, x) and (t_seen == t).all() and y_seen is y


@pytest.mark.law(
    "29a", "in DDIM: eps_hat = eps - scale sqrt(1 - abar_t) grad log p(y|x_t), in both its places",
    source="Dhariwal & Nichol 2021, algorithm 2", tolerance="1e-8/alpha: x0_hat is x_t, rounded at 1e-16, over alpha")
@quickly
@given(any_schedule(min_T=3), seeds, st.floats(-3, 3))
def test_guided_ddim_is_algorithm_2(schedule, seed, scale):
    exact, x, _, y = draw(schedule, seed)
    t, s = schedule.T - 1, schedule.T - 3 if schedule.T > 3 else 0
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(schedule, t), alpha_sigma(schedule, s)
    g, ts = responsibility_gradient(exact), np.full(4, t)
    eps = -sigma_t * exact.score(x, ts) - scale * sigma_t * g(x, ts, y)
    expected = alpha_s * (x - sigma_t * eps) / alpha_t + sigma_s * eps
    guided = ClassifierGuidance(exact, g, scale)
    np.testing.assert_allclose(next(ddim(guided, x, [t, s], y)).x_t, expected, rtol=1e-8, atol=1e-8 / alpha_t)


# ---- law 30: classifier-free ---------------------------------------------------------------------------------

@pytest.mark.law(
    30, "scale 0 is unconditional, 1 conditional, and each costs one branch", source="Ho & Salimans 2022",
    tolerance="exact")
@quickly
@given(any_schedule(ends_at_zero=None), seeds)
def test_scale_0_is_unconditional_and_1_conditional_and_each_costs_one_branch(schedule, seed):
    """Bug: a mask with its sign reversed would swap the two."""
    exact, x, t, y = draw(schedule, seed)
    for scale, alone, calls in [(0, exact(x, t), [4]), (1, exact(x, t, is_class(y)), [4]), (2.5, None, [8])]:
        counted = Counting(exact)
        x0_hat = ClassifierFree(counted, scale, ANY_CLASS)(x, t, is_class(y))
        assert counted.calls == calls
        if alone is not None:
            np.testing.assert_array_equal(x0_hat, alone)
    np.testing.assert_array_equal(ClassifierFree(exact, 0, ANY_CLASS)(x, t), exact(x, t))


@pytest.mark.law(
    30, "eps = (1 + w) eps_cond - w eps_uncond, w = scale - 1",
    source="Ho & Salimans 2022, eq. 6; each eps read off its own exact score",
    tolerance="1e-9: a sum of terms of up to 1e3")
@quickly
@given(any_schedule(), seeds, scales)
def test_guided_eps_is_the_papers_with_scale_1_plus_w(schedule, seed, scale):
    exact, x, t, y = draw(schedule, seed)
    alpha, sigma = alphas_sigmas(schedule, t, x)
    eps_cond, eps_uncond = -sigma * exact.score(x, t, is_class(y)), -sigma * exact.score(x, t)
    x0_hat = ClassifierFree(exact, scale, ANY_CLASS)(x, t, is_class(y))
    w = scale - 1
    np.testing.assert_allclose(alpha * x0_hat + sigma * ((1 + w) * eps_cond - w * eps_uncond), x,
                               rtol=1e-9, atol=1e-9)


@pytest.mark.law(
    30, "guiding x_0 is guiding eps, x0 or v, whichever the network predicts",
    source="x0_hat is affine in each at a given x_t", tolerance="1e-8: the same sum in another order, over alpha")
@quickly
@given(any_schedule(), st.sampled_from(["eps", "x0", "v"]), seeds, scales)
def test_guiding_x_0_is_guiding_what_the_network_predicts(schedule, predicts, seed, scale):
    """Here the network's own outputs are extrapolated, then turned into x_0; the wrapper does the reverse."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(2, 3))                                # its outputs for the conditions 0 and 1
    denoiser = NetworkDenoiser(schedule, predicts, lambda x_t, t, cond: np.tanh(x_t) + table[cond[0]])
    x, t, cond = rng.normal(size=(4, 3)), rng.integers(0, schedule.T, 4), (np.ones(4, int),)
    guided = ClassifierFree(denoiser, scale, (np.zeros(1, int),))(x, t, cond)
    out = np.tanh(x) + table[0] + scale * (table[1] - table[0])
    np.testing.assert_allclose(guided, to_x0(schedule, predicts, x, t, out), rtol=1e-8,
                               atol=1e-11 / math.sqrt(schedule.alpha_bar[-1]))


@pytest.mark.law(
    30, "where both predictions agree the scale does not matter", source="their difference is 0",
    tolerance="1e-12: the batch is doubled, and sums may be taken in another order")
@quickly
@given(any_schedule(ends_at_zero=None), seeds, scales)
def test_scale_does_not_matter_where_both_predictions_agree(schedule, seed, scale):
    exact, x, t, _ = draw(schedule, seed)
    everything = (np.ones((4, K), bool),)
    np.testing.assert_allclose(ClassifierFree(exact, scale, ANY_CLASS)(x, t, everything), exact(x, t),
                               rtol=1e-12, atol=1e-12)


@pytest.mark.law(
    "30a", "exact classifier-free guidance is exact classifier guidance, at every scale: both have the score of "
           "p_t(x_t) p_t(y|x_t)^scale",
    source="derived: grad log p(x|y) - grad log p(x) = grad log p(y|x); the classifier's gradient written out",
    tolerance="1e-9 of terms of alpha x0_hat, of up to 1e3")
@quickly
@given(any_schedule(), seeds, scales)
def test_both_guidances_agree_where_both_are_exact(schedule, seed, scale):
    exact, x, t, y = draw(schedule, seed)
    free = ClassifierFree(exact, scale, ANY_CLASS)(x, t, is_class(y))
    classifier = ClassifierGuidance(exact, responsibility_gradient(exact), scale)(x, t, y)
    alpha, _ = alphas_sigmas(schedule, t, x)
    np.testing.assert_allclose(alpha * free, alpha * classifier, rtol=1e-9, atol=1e-9)


@pytest.mark.law(
    30, "guidance works sample by sample: in any order, alone, and with a null condition for each",
    source="nothing mixes samples", tolerance="1e-12: sums may be taken in another order")
@quickly
@given(any_schedule(ends_at_zero=None), seeds, scales, st.permutations(range(4)))
def test_guidance_works_sample_by_sample(schedule, seed, scale, order):
    exact, x, t, y = draw(schedule, seed)
    guided = ClassifierFree(exact, scale, ANY_CLASS)
    whole = guided(x, t, is_class(y))
    order = np.array(order)
    np.testing.assert_allclose(guided(x[order], t[order], is_class(y[order])), whole[order], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(guided(x[:1], t[:1], is_class(y[:1])), whole[:1], rtol=1e-12, atol=1e-13)
    each_its_own = ClassifierFree(exact, scale, (np.ones((4, K), bool),))
    np.testing.assert_array_equal(each_its_own(x, t, is_class(y)), whole)


@pytest.mark.law(
    30, "guided samples belong to the class of their condition, several classes in one batch",
    source="three components 50 deviations apart", tolerance="exact: the nearest mean is the right one")
@pytest.mark.parametrize("seed", [0])
def test_guided_sampling_reaches_the_class_from_its_own_prompt_only(seed):
    schedule = schedules.zero_terminal_snr(schedules.cosine(200))
    means = np.array([[-4.0, 0], [4, 0], [0, 4]])
    exact = MixtureDenoiser(schedule, np.full(K, 1 / K), means, np.full(K, 0.01))
    y = np.arange(12) % K
    for scale in (1, 4.0):
        guided = ClassifierFree(exact, scale, ANY_CLASS)
        x_T = np.random.default_rng(seed).normal(size=(12, 2))
        for sampler in (ddim, heun):
            x_0 = sample(sampler(guided, x_T, times(schedule, 100), is_class(y)))
            assert (np.linalg.norm(x_0[:, None] - means, axis=-1).argmin(1) == y).all()


@pytest.mark.law(
    "30b", "guidance in an interval: guided where low < sigma_t / alpha_t <= high, the conditional model elsewhere, "
           "each sample at its own time",
    source="Kynkaanniemi et al. 2024, section 3; the levels from the table, each sample alone",
    tolerance="1e-12: sums may be taken in another order")
@quickly
@given(any_schedule(ends_at_zero=None), seeds, scales, st.data())
def test_guidance_acts_within_its_interval_only(schedule, seed, scale, data):
    """The ends are levels of the schedule, so that both of them are met: the lower is outside, the upper inside."""
    exact, x, t, y = draw(schedule, seed)
    levels = [math.inf if abar == 0 else math.sqrt((1 - abar) / abar) for abar in schedule.alpha_bar]
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, schedule.T - 1)] * 2)))
    # the level of a time is computed in two ways: the ends are moved by more than they differ
    low, high = levels[a] * (1 + 1e-9), levels[b] * (1 + 1e-9)
    guided = ClassifierFree(exact, scale, ANY_CLASS)
    found = GuidanceInterval(guided, low, high)(x, t, is_class(y))
    for i in range(len(x)):
        row = slice(i, i + 1)
        one = guided if a < t[i] <= b else exact
        np.testing.assert_allclose(found[row], one(x[row], t[row], is_class(y[row])), rtol=1e-12, atol=1e-12)
    whole = GuidanceInterval(guided)
    np.testing.assert_array_equal(whole(x, t, is_class(y)), guided(x, t, is_class(y)))


@pytest.mark.law(
    "30b", "outside the interval a step costs one branch, within it two; thresholds hold in both",
    source="the sizes of the batches that a denoiser gets", tolerance="exact")
def test_outside_its_interval_guidance_costs_one_branch():
    schedule = schedules.cosine(100)
    exact = mixture(schedule, np.random.default_rng(0))
    x, y, counted = np.random.default_rng(1).normal(size=(4, 2)), np.zeros(4, int), Counting(exact)
    guided = GuidanceInterval(ClassifierFree(counted, 3.0, ANY_CLASS, clip=lambda x0_hat: x0_hat.clip(-0.1, 0.1)),
                              low=0.5, high=2.0)
    drawn = sample(ddim(guided, x, times(schedule, 10), is_class(y)))
    assert set(counted.calls) == {4, 8} and len(counted.calls) == 10 and np.abs(drawn).max() <= 0.1
    inside = [0.5 < float(schedule.sigma(t) / schedule.alpha(t)) <= 2 for t in times(schedule, 10).tolist()]
    assert [n == 8 for n in counted.calls] == inside


# ---- law 32: thresholds --------------------------------------------------------------------------------------

@pytest.mark.law(
    32, "dynamic thresholding: s = max(1, percentile of |x0_hat|), clip to [-s, s], divide by s; the identity on "
        "[-1, 1], bounded by 1, each sample by its own s",
    source="Imagen section 2.3; each sample's own sorted values",
    tolerance="1e-5: float32 and the interpolation between two values; the identity and the bound exact")
@quickly
@given(seeds, st.floats(0.1, 1.0), st.floats(0.01, 20.0))
def test_dynamic_threshold_is_bounded_and_the_identity_inside(seed, percentile, scale):
    rng = np.random.default_rng(seed)
    inside = rng.uniform(-1, 1, size=(3, 4, 4, 1)).astype(np.float32) * np.float32(rng.uniform(0.01, 1))
    np.testing.assert_array_equal(dynamic_threshold(inside, percentile), inside)
    wild = (scale * rng.normal(size=(3, 4, 4, 1))).astype(np.float32)
    out = dynamic_threshold(wild, percentile)
    assert out.dtype == np.float32 and abs(out).max() <= 1
    for b in range(3):
        ranked = np.sort(abs(wild[b].ravel()).astype(np.float64))
        s = max(1, np.interp(percentile * 15, np.arange(16), ranked))
        np.testing.assert_allclose(out[b], np.maximum(-s, np.minimum(wild[b], s)) / s, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(dynamic_threshold(wild[b:b + 1], percentile)[0], out[b])


@pytest.mark.law(
    32, "no threshold stands between a latent network and its answer; a static one clips pixels to [-1, 1]",
    source="latents live on no such interval; of a network wrapped with clip=None", tolerance="exact")
def test_static_threshold_clips_and_latents_are_not_clipped():
    x = np.array([[-3.0, -0.5, 0.25, 2.0]])
    np.testing.assert_array_equal(static_threshold(x), [[-1, -0.5, 0.25, 1]])
    latent = NetworkDenoiser(schedules.linear(), "x0", lambda x_t, t, cond: x_t)
    np.testing.assert_array_equal(latent(x, np.array([0])), x)


@pytest.mark.law(
    32, "the threshold comes after guidance, not before: at scale 3, .5 to .9 gives 1.7, cut to 1; 2 to 1.5 gives .5",
    source="Imagen section 2.3; by hand", tolerance="1e-7: three roundings")
@pytest.mark.parametrize("clip", [static_threshold, dynamic_threshold])
def test_the_threshold_comes_after_guidance(clip):
    schedule = schedules.linear()
    answers = np.array([[0.5, 2.0], [0.9, 1.5]])                   # unconditional, conditional
    denoiser = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: answers[cond[0]])
    guided = ClassifierFree(denoiser, 3.0, (np.zeros(1, int),), clip=clip)
    x0_hat = guided(np.zeros((1, 2)), np.array([0]), (np.ones(1, int),))
    np.testing.assert_allclose(x0_hat, clip(np.array([[1.7, 0.5]])))
    clipped = NetworkDenoiser(schedule, "x0", lambda x_t, t, cond: x_t, clip=clip)
    with pytest.raises(ValueError, match="clip=None"):
        ClassifierFree(clipped, 2.0, ANY_CLASS)
    with pytest.raises(ValueError, match="clip=None"):
        ClassifierGuidance(clipped, lambda x_t, t, y: x_t)
