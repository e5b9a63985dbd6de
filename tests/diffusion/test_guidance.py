"""Guidance against the exact conditional mixture, the papers' eps formulas, and finite differences."""

import math

import numpy as np
import pytest
from diffusion_strategies import any_schedule
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import MixtureDenoiser, NetworkDenoiser, dynamic_threshold, static_threshold
from minidiff.diffusion.gaussian import to_x0
from minidiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, stack_conditions
from minidiff.diffusion.samplers import ddim, ddpm, heun, sample, times
from minidiff.engine.backend import Streams

seeds = st.integers(0, 2**32 - 1)
scales = st.floats(-2, 10)
quickly = settings(deadline=None, max_examples=30)
K = 3


def mixture(schedule, rng):
    return MixtureDenoiser(schedule, rng.dirichlet(np.full(K, 3.0)), rng.normal(size=(K, 2)),
                           rng.uniform(0.1, 1, size=(K, 2)))


def is_class(y):
    """The condition "the component is y", y: (B,)."""
    return (np.arange(K) == y[:, None],)


ANY_CLASS = (np.ones((1, K), bool),)


class Counting:
    """A denoiser that notes the size of each batch it is asked for."""

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


# ---- classifier-free ---------------------------------------------------------------------------------------

@quickly
@given(any_schedule(ends_at_zero=None), seeds)
def test_scale_0_is_unconditional_and_1_conditional_and_each_costs_one_branch(schedule, seed):
    """Law 30; bug: a mask with its sign reversed would swap the two."""
    exact, x, t, y = draw(schedule, seed)
    for scale, alone, calls in [(0, exact(x, t), [4]), (1, exact(x, t, is_class(y)), [4]), (2.5, None, [8])]:
        counted = Counting(exact)
        x0_hat = ClassifierFree(counted, scale, ANY_CLASS)(x, t, is_class(y))
        assert counted.calls == calls
        if alone is not None:
            np.testing.assert_array_equal(x0_hat, alone)
    np.testing.assert_array_equal(ClassifierFree(exact, 0, ANY_CLASS)(x, t), exact(x, t))


@quickly
@given(any_schedule(), seeds, scales)
def test_guided_eps_is_the_papers_with_scale_1_plus_w(schedule, seed, scale):
    """Law 30: eps = (1 + w) eps_cond - w eps_uncond, w = scale - 1, each eps read off its own exact score."""
    exact, x, t, y = draw(schedule, seed)
    sigma, alpha = np.sqrt(1 - schedule.alpha_bar[t])[:, None], np.sqrt(schedule.alpha_bar[t])[:, None]
    eps_cond, eps_uncond = -sigma * exact.score(x, t, is_class(y)), -sigma * exact.score(x, t)
    x0_hat = ClassifierFree(exact, scale, ANY_CLASS)(x, t, is_class(y))
    w = scale - 1
    np.testing.assert_allclose(alpha * x0_hat + sigma * ((1 + w) * eps_cond - w * eps_uncond), x,
                               rtol=1e-9, atol=1e-9)


@quickly
@given(any_schedule(), st.sampled_from(["eps", "x0", "v"]), seeds, scales)
def test_guiding_x_0_is_guiding_what_the_network_predicts(schedule, predicts, seed, scale):
    """Here the network's own outputs are extrapolated, then turned into x_0; the wrapper does the reverse."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(2, 3))                                # its answers to the conditions 0 and 1
    denoiser = NetworkDenoiser(schedule, predicts, lambda x_t, t, cond: np.tanh(x_t) + table[cond[0]])
    x, t, cond = rng.normal(size=(4, 3)), rng.integers(0, schedule.T, 4), (np.ones(4, int),)
    guided = ClassifierFree(denoiser, scale, (np.zeros(1, int),))(x, t, cond)
    out = np.tanh(x) + table[0] + scale * (table[1] - table[0])
    np.testing.assert_allclose(guided, to_x0(schedule, predicts, x, t, out), rtol=1e-8,
                               atol=1e-11 / math.sqrt(schedule.alpha_bar[-1]))


@quickly
@given(any_schedule(ends_at_zero=None), seeds, scales)
def test_scale_does_not_matter_where_both_predictions_agree(schedule, seed, scale):
    """Law 30."""
    exact, x, t, _ = draw(schedule, seed)
    everything = (np.ones((4, K), bool),)
    np.testing.assert_allclose(ClassifierFree(exact, scale, ANY_CLASS)(x, t, everything), exact(x, t),
                               rtol=1e-12, atol=1e-12)


@quickly
@given(any_schedule(ends_at_zero=None), seeds, scales, st.permutations(range(4)))
def test_guidance_works_sample_by_sample(schedule, seed, scale, order):
    exact, x, t, y = draw(schedule, seed)
    guided = ClassifierFree(exact, scale, ANY_CLASS)
    whole = guided(x, t, is_class(y))
    order = np.array(order)
    np.testing.assert_allclose(guided(x[order], t[order], is_class(y[order])), whole[order], rtol=1e-12)
    np.testing.assert_allclose(guided(x[:1], t[:1], is_class(y[:1])), whole[:1], rtol=1e-12)
    each_its_own = ClassifierFree(exact, scale, (np.ones((4, K), bool),))
    np.testing.assert_array_equal(each_its_own(x, t, is_class(y)), whole)


@pytest.mark.parametrize("clip", [static_threshold, dynamic_threshold])
def test_the_threshold_comes_after_guidance(clip):
    """At scale 3, .5 to .9 gives 1.7, cut to 1; 2 to 1.5 gives .5, as neither is cut before."""
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


def test_guided_sampling_reaches_the_class_from_its_own_prompt_only():
    """At scale 1, DDIM from far-apart components ends beside the one asked for, with both in one batch."""
    schedule = schedules.zero_terminal_snr(schedules.cosine(200))
    means = np.array([[-4.0, 0], [4, 0], [0, 4]])
    exact = MixtureDenoiser(schedule, np.full(K, 1 / K), means, np.full(K, 0.01))
    y = np.arange(12) % K
    for scale in (1, 4.0):
        guided = ClassifierFree(exact, scale, ANY_CLASS)
        x_T = np.random.default_rng(0).normal(size=(12, 2))
        for sampler in (ddim, heun):
            x_0 = sample(sampler(guided, x_T, times(schedule, 100), is_class(y)))
            assert (np.linalg.norm(x_0[:, None] - means, axis=-1).argmin(1) == y).all()


# ---- classifier guidance -----------------------------------------------------------------------------------

def grad_log_posterior(exact):
    """grad log p(y | x_t) of the exact classifier of noised data, by central differences of fourth order."""
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


@quickly
@given(any_schedule(), seeds)
def test_the_exact_classifier_at_scale_1_makes_the_conditional_denoiser(schedule, seed):
    """Law 29: score + grad log p_t(y | x_t) = score of p_t(x_t | y), read as E[x_0 | x_t, y]."""
    exact, x, t, y = draw(schedule, seed)
    guided = ClassifierGuidance(exact, grad_log_posterior(exact), 1.0)(x, t, y)
    alpha, sigma2 = np.sqrt(schedule.alpha_bar[t])[:, None], 1 - schedule.alpha_bar[t][:, None]
    np.testing.assert_allclose(alpha * guided, alpha * exact(x, t, is_class(y)), atol=1e-6)
    np.testing.assert_allclose(alpha * guided - x, sigma2 * exact.score(x, t, is_class(y)), atol=1e-6)


@quickly
@given(any_schedule(min_T=3), seeds, st.floats(-3, 3))
def test_the_gradient_at_x_t_shifts_the_ancestral_mean_by_its_share(schedule, seed, scale):
    """Law 29: mu = (x_t + beta score) / sqrt(1 - beta), so the shift is scale beta g / sqrt(1 - beta)."""
    exact, x, _, y = draw(schedule, seed)
    t, s = schedule.T - 1, schedule.T - 3 if schedule.T > 3 else 0
    g = grad_log_posterior(exact)
    def first_step(scale):
        guided = ClassifierGuidance(exact, g, scale)
        return next(ddpm(guided, x, [t, s], y, streams=Streams(seed, 4))).x_t
    one_minus_beta = schedule.alpha_bar[t] / schedule.alpha_bar[s]
    shift = scale * (1 - one_minus_beta) / math.sqrt(one_minus_beta) * g(x, np.full(4, t), y)
    np.testing.assert_allclose(first_step(scale) - first_step(0), shift, rtol=1e-7, atol=1e-9)


def test_a_wrapper_is_a_denoiser():
    schedule = schedules.linear()
    inner = NetworkDenoiser(schedule, "v", lambda x_t, t, cond: x_t)
    for guided in (ClassifierFree(inner, 2.0, ANY_CLASS), ClassifierGuidance(inner, lambda x_t, t, y: x_t)):
        assert guided.schedule is schedule and guided.predicts == "v"
    x = np.ones((2, 3), np.float32)
    t = np.zeros(2, int)
    three = np.float64(3)
    assert ClassifierFree(inner, three, (np.zeros((1, 1)),))(x, t, (np.zeros((2, 1)),)).dtype == np.float32
    assert ClassifierGuidance(inner, lambda x_t, t, y: x_t, three)(x, t).dtype == np.float32


# ---- conditions --------------------------------------------------------------------------------------------

def test_stacked_conditions_keep_their_order():
    first, second = (np.zeros((2, 3)), np.zeros(2)), (np.ones((1, 3)), np.ones(1))
    tokens, mask = stack_conditions(first, second)
    np.testing.assert_array_equal(tokens, [[0] * 3, [0] * 3, [1] * 3])
    np.testing.assert_array_equal(mask, [0, 0, 1])


CLASS_0 = is_class(np.zeros(2, int))


def classifier_free(scale=2.0, uncond=ANY_CLASS, cond=CLASS_0):
    exact = mixture(schedules.linear(), np.random.default_rng(0))
    return ClassifierFree(exact, scale, uncond)(np.zeros((2, 2)), np.zeros(2, int), cond)


@pytest.mark.parametrize("make, sentence", [
    (lambda: classifier_free(scale=math.nan), "scale must be a finite number"),
    (lambda: classifier_free(scale=math.inf), "scale must be a finite number"),
    (lambda: classifier_free(cond=None), "cond must be a tuple of arrays"),
    (lambda: classifier_free(uncond=(np.ones((3, K), bool),)), "uncond must have 1 row or 2"),
    (lambda: classifier_free(uncond=(np.ones((1, K), bool),) * 2), "conditions must be tuples"),
    (lambda: stack_conditions((np.ones((1, 3)),), (np.ones((1, 4)),)), "conditions must be tuples"),
    (lambda: ClassifierGuidance(draw(schedules.flow_matching(), 0)[0], lambda x_t, t, y: x_t),
     "zero terminal SNR"),
])
def test_refusals_name_the_argument(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
