"""Every refusal of floor III, whole: which exception, and the sentence to the last letter.

A sentence is what a user has when things go wrong, so that it is held like a number: the argument's name, what it
got, and what it takes.
"""

import re

import numpy as np
import pytest

from minidiff.diffusion import denoiser, gaussian, guidance, likelihood, losses, samplers, schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.guidance import ClassifierFree, ClassifierGuidance
from minidiff.diffusion.variational import diffusion_draws
from minidiff.engine.random import SampleStreams

SCHEDULE = schedules.linear(10, beta_max=0.9)
ZERO = schedules.zero_terminal_snr(SCHEDULE)
X, WRONG, HALF = np.zeros((4, 2)), np.zeros((4, 1)), np.zeros((4, 2), np.float32)
ONE_D = GaussianDenoiser(SCHEDULE, np.zeros(2), np.ones(2))
TWO = MixtureDenoiser(SCHEDULE, [0.5, 0.5], [[0.0], [1.0]], [1.0, 1.0])
NETWORK = NetworkDenoiser(SCHEDULE, "x0", lambda x, t, cond: x)
CLIPPING = NetworkDenoiser(SCHEDULE, "x0", lambda x, t, cond: x, clip=denoiser.static_threshold)
T3 = np.full(4, 3)


def raises(error, sentence: str):
    return pytest.raises(error, match=f"^{re.escape(sentence)}$")


# ---- an array that is not like its fellow --------------------------------------------------------------------

@pytest.mark.parametrize("function, name, like", [
    (lambda a: gaussian.q_sample(SCHEDULE, X, 3, a), "eps", "x_0"),
    (lambda a: gaussian.q_posterior_mean_variance(SCHEDULE, X, a, 3), "x_t", "x_0"),
    (lambda a: gaussian.x0_from_eps(SCHEDULE, X, 3, a), "eps", "x_t"),
    (lambda a: gaussian.x0_from_v(SCHEDULE, X, 3, a), "v", "x_t"),
    (lambda a: gaussian.x0_from_score(SCHEDULE, X, 3, a), "score", "x_t"),
    (lambda a: gaussian.eps_from_x0(SCHEDULE, X, 3, a), "x_0", "x_t"),
    (lambda a: gaussian.eps_from_v(SCHEDULE, X, 3, a), "v", "x_t"),
    (lambda a: gaussian.eps_from_score(SCHEDULE, X, 3, a), "score", "x_t"),
    (lambda a: gaussian.v_from_x0(SCHEDULE, X, 3, a), "x_0", "x_t"),
    (lambda a: gaussian.v_from_x0_eps(SCHEDULE, X, 3, a), "eps", "x_0"),
    (lambda a: gaussian.score_from_eps(SCHEDULE, X, 3, a), "eps", "x_t"),
    (lambda a: gaussian.score_from_x0(SCHEDULE, X, 3, a), "x_0", "x_t"),
    (lambda a: gaussian.target(SCHEDULE, "x0", X, a, 3), "eps", "x_0"),
    (lambda a: gaussian.to_x0(SCHEDULE, "x0", X, 3, a), "out", "x_t"),
])
def test_arrays_that_are_not_alike(function, name, like):
    with raises(ValueError, f"{name} must be float64 (4, 2) like {like}, got float64 (4, 1)"):
        function(WRONG)
    with raises(ValueError, f"{name} must be float64 (4, 2) like {like}, got float32 (4, 2)"):
        function(HALF)


# ---- all other sentences -------------------------------------------------------------------------------------

STEEP = "the linear schedule with T = 10 must end in noise, at an alpha_bar of at most 0.02, but ends at 0.904: use " \
        "more steps, or larger betas (in proportion to 1000/T), or allow_signal=True"


@pytest.mark.parametrize("error, sentence, call", [
    # schedules
    (ValueError, "alpha_bar must be a non-empty (T,) array, got shape (2, 2)",
     lambda: schedules.Schedule([[0.5, 0.1]] * 2)),
    (ValueError, "alpha_bar must be a non-empty (T,) array, got shape (0,)", lambda: schedules.Schedule([])),
    (ValueError, "alpha_bar must lie in [0, 1), got alpha_bar[1] = nan", lambda: schedules.Schedule([0.5, np.nan])),
    (ValueError, "alpha_bar must lie in [0, 1), got alpha_bar[0] = 1.0", lambda: schedules.Schedule([1.0, 0.5])),
    (ValueError, "alpha_bar must lie in [0, 1), got alpha_bar[1] = -0.1", lambda: schedules.Schedule([0.5, -0.1])),
    (ValueError, "alpha_bar must strictly decrease, got alpha_bar[1] = 0.25 and alpha_bar[2] = 0.25",
     lambda: schedules.Schedule([0.5, 0.25, 0.25])),
    (ValueError, "alpha_bar must decrease by more than rounding, got alpha_bar[0] = 0.5 and alpha_bar[1] = "
     "0.49999999999999994", lambda: schedules.Schedule([0.5, np.nextafter(0.5, 0), 0.25])),
    (ValueError, "alpha_bar must decrease by more than rounding, got alpha_bar[0] = 0.75 and alpha_bar[1] = "
     "0.749999999999984", lambda: schedules.Schedule([0.75, 0.75 - 1.6e-14, 0.01])),
    (ValueError, "betas must change alpha_bar by more than rounding, got betas[1] = 1e-15",
     lambda: schedules.from_betas([0.5, 1e-15, 0.99])),
    (ValueError, "betas must be a non-empty (T,) array, got shape (0,)", lambda: schedules.from_betas([])),
    (ValueError, "betas must be a non-empty (T,) array, got shape (1, 2)", lambda: schedules.from_betas([[0.5, 0.9]])),
    (ValueError, "betas must lie in (0, 1), where only the last may be 1, got betas[0] = 1.0",
     lambda: schedules.from_betas([1.0, 0.5])),
    (ValueError, "betas must lie in (0, 1), where only the last may be 1, got betas[1] = 0.0",
     lambda: schedules.from_betas([0.5, 0.0])),
    (ValueError, "betas must lie in (0, 1), where only the last may be 1, got betas[1] = inf",
     lambda: schedules.from_betas([0.5, np.inf])),
    (ValueError, "betas must change alpha_bar: betas[1] = 1e-20 is lost in rounding, since 1 - beta is 1",
     lambda: schedules.from_betas([0.5, 1e-20])),
    (ValueError, "betas must leave signal until the last time, but are so large that alpha_bar underflows at t = 323 "
                 "(if they are alphas, pass 1 - alpha)", lambda: schedules.from_betas([0.9] * 400)),
    (ValueError, STEEP, lambda: schedules.linear(10)),
    (ValueError, "T must be a whole number of at least 1, not 10.0", lambda: schedules.cosine(10.0)),
    (ValueError, "T must be a whole number of at least 1, not True", lambda: schedules.scaled_linear(True)),
    (ValueError, "T must be a whole number of at least 1, not 0", lambda: schedules.linear(0)),
    (ValueError, "beta_min must be at least 0, got -0.5", lambda: schedules.scaled_linear(10, -0.5)),
    (ValueError, "betas must lie in (0, 1), where only the last may be 1, got betas[0] = 0.0",
     lambda: schedules.scaled_linear(10, 0, 0.5)),
    (ValueError, "beta_max must be at least 0, got nan", lambda: schedules.scaled_linear(10, 0.5, float("nan"))),
    (ValueError, "T must be a whole number of at least 1, not 0", lambda: schedules.scaled_linear(0)),
    (ValueError, "T must be a whole number of at least 1, not 0", lambda: schedules.cosine(0)),
    (ValueError, "T must be a whole number of at least 1, not 0", lambda: schedules.vp_sde(0)),
    (ValueError, "T must be a whole number of at least 2, not 1", lambda: schedules.log_snr_linear(1)),
    (ValueError, "schedule.T must be a whole number of at least 2, not 1",
     lambda: schedules.zero_terminal_snr(schedules.Schedule([0.01]))),
    (ValueError, "log_snr must map an array (5,) to an array (5,), got shape (4,)",
     lambda: schedules.from_log_snr(lambda u: u[1:], 5)),
    (ValueError, "times must be a non-empty list of distinct integers, got [3 3 4]",
     lambda: schedules.respaced(SCHEDULE, [4, 3, 3])),
    (ValueError, "times must be a non-empty list of distinct integers, got [0 0 1 ... 7 8 9]",
     lambda: schedules.respaced(SCHEDULE, [0, *range(10)])),
    (ValueError, "times must be a non-empty list of distinct integers, got [0 0 1 2 3 4 5 6]",
     lambda: schedules.respaced(SCHEDULE, [0, *range(7)])),
    (ValueError, "times must be a non-empty list of distinct integers, got [[3 4]]",
     lambda: schedules.respaced(SCHEDULE, np.array([[4, 3]]))),
    (ValueError, "times must be a non-empty list of distinct integers, got []",
     lambda: schedules.respaced(SCHEDULE, np.array([], int))),
    (TypeError, "t must be an integer or an integer array, got dtype float64", lambda: SCHEDULE.abar(1.0)),
    (IndexError, "t must lie in -1..9, got 10", lambda: SCHEDULE.abar(np.array([3, 10]))),
    (IndexError, "t must lie in -1..9, got -2", lambda: SCHEDULE.alpha(-2)),
    (IndexError, "t must lie in 0..9, got -1", lambda: schedules.respaced(SCHEDULE, [-1, 3])),
    # gaussian
    (TypeError, "x must be a floating-point array, got dtype int64",
     lambda: gaussian.q_sample(SCHEDULE, np.zeros(3, int), 3, np.zeros(3, int))),
    (ValueError, "t must be one integer, or one per sample of x (4, 2), got an array (2,)",
     lambda: gaussian.q_sample(SCHEDULE, X, np.array([1, 2]), X)),
    (ValueError, "s must be earlier than t, got s = 3 and t = 3", lambda: gaussian.q_step(SCHEDULE, 3, 3)),
    (ValueError, "var1 and var2 must be positive; a Gaussian of variance 0 has no finite divergence",
     lambda: gaussian.kl_gaussian(0.0, 1.0, 0.0, 0.0)),
    (ValueError, "eps does not determine x_0 at SNR 0 (t = 9 in float64): predict v or x0 there",
     lambda: gaussian.x0_from_eps(ZERO, X, 9, X)),
    (ValueError, "eps does not determine x_0 at SNR 0 (t = 9 in float64): predict v or x0 there",
     lambda: gaussian.target(ZERO, "eps", X, X, 9)),
    (ValueError, "t must be a time with noise, 0 or more, got -1 (in float64)",
     lambda: gaussian.eps_from_x0(SCHEDULE, X, -1, X)),
    (ValueError, "t must be a time with noise, 0 or more, got -1 (in float64)",
     lambda: gaussian.v_from_x0(SCHEDULE, X, -1, X)),
    (ValueError, "t must be a time with noise, 0 or more, got -1 (in float64)",
     lambda: gaussian.score_from_eps(SCHEDULE, X, -1, X)),
    (ValueError, "predicts must be one of eps, x0, v, not 'epsilon'",
     lambda: gaussian.target(SCHEDULE, "epsilon", X, X, 3)),
    # denoisers
    (ValueError, "percentile must be a fraction in (0, 1], such as 0.995, got 0",
     lambda: denoiser.dynamic_threshold(X, 0)),
    (ValueError, "percentile must be a fraction in (0, 1], such as 0.995, got 1.5",
     lambda: denoiser.dynamic_threshold(X, 1.5)),
    (ValueError, "predicts='eps' does not determine x_0 at the zero SNR where this schedule ends: use 'v' or 'x0', "
                 "or a "
                 "schedule with alpha_bar[-1] > 0", lambda: NetworkDenoiser(ZERO, "eps", None)),
    (TypeError, "denoiser must have a network_vjp, and no clip, to be differentiated",
     lambda: NETWORK.vjp(X, T3, X)),
    (TypeError, "denoiser must have a network_vjp, and no clip, to be differentiated",
     lambda: NetworkDenoiser(SCHEDULE, "x0", None, denoiser.static_threshold, lambda *_: None).vjp(X, T3, X)),
    (ValueError, "cov must have mean's shape (3,), or be symmetric of shape (3, 3), got shape (2,)",
     lambda: GaussianDenoiser(SCHEDULE, np.zeros(3), np.ones(2))),
    (ValueError, "cov must be finite and have no negative variance, got -1",
     lambda: GaussianDenoiser(SCHEDULE, np.zeros(2), np.array([1.0, -1.0]))),
    (ValueError, "weights must be 2 positive numbers of sum 1, one per mean, got [0.5 0.4]",
     lambda: MixtureDenoiser(SCHEDULE, [0.5, 0.4], [[0.0], [1.0]], [1.0, 1.0])),
    (ValueError, "weights must be 2 positive numbers of sum 1, one per mean, got [1. 0.]",
     lambda: MixtureDenoiser(SCHEDULE, [1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0])),
    (ValueError, "variances must be at least 0 and of shape (2,) or (2, 1), got shape (3,)",
     lambda: MixtureDenoiser(SCHEDULE, [0.5, 0.5], [[0.0], [1.0]], [1.0, 1.0, 1.0])),
    (ValueError, "cond must be (allowed,), booleans (1, 2) with a True in every row, got array([[False, False]])",
     lambda: TWO(np.zeros((1, 1)), np.array([3]), (np.array([[False, False]]),))),
    (ValueError, "cond must be (allowed,), booleans (2, 2) with a True in every row, got array([[ True, False],\n"
                 "       [False, False]])",
     lambda: TWO(np.zeros((2, 1)), np.array([3, 3]), (np.array([[True, False], [False, False]]),))),
    (ValueError, "data must be samples along axis 0, (N, ...) with N >= 1, got (3,)",
     lambda: DatasetDenoiser(SCHEDULE, np.zeros(3))),
    (ValueError, "data must be samples along axis 0, (N, ...) with N >= 1, got (0, 2)",
     lambda: DatasetDenoiser(SCHEDULE, np.zeros((0, 2)))),
    (ValueError, "x_t must be samples of the data's shape (2,) along axis 0, got (4, 1)", lambda: ONE_D(WRONG, T3)),
    (ValueError, "t must be 4 times in 0..T-1, one for each sample of x_t, got [3]", lambda: ONE_D(X, np.array([3]))),
    (ValueError, "t must be 4 times in 0..T-1, one for each sample of x_t, got [ 3  3  3 -1]",
     lambda: ONE_D(X, np.array([3, 3, 3, -1]))),
    # losses
    (ValueError, "t must be at least 1 for a loss of this kind, got 0", lambda: losses.bound_weight(SCHEDULE, 0, "x0")),
    (ValueError, "t must be at least 0 for a loss of this kind, got -1",
     lambda: losses.simple_weight(SCHEDULE, -1, "x0")),
    (ValueError, "t must be at least 0 for a loss of this kind, got -1",
     lambda: losses.min_snr_weight(SCHEDULE, -1, "x0")),
    (ValueError, "gamma must be positive, got 0.0", lambda: losses.min_snr_weight(SCHEDULE, 3, "x0", 0.0)),
    (ValueError, "kind must be one of simple, bound, min_snr, not 'vlb'",
     lambda: losses.weight(SCHEDULE, 3, "x0", "vlb")),
    (ValueError, "eps does not determine x_0 at SNR 0: predict v or x0 there",
     lambda: losses.bound_weight(ZERO, np.array([3, 9]), "eps")),
    (ValueError, "predicts must be one of eps, x0, v, not 'noise'", lambda: losses.simple_weight(SCHEDULE, 3, "noise")),
    # samplers
    (ValueError, "eta, from deterministic to ancestral, must be a finite number from 0 to 1, not 1.5",
     lambda: samplers.sample(samplers.ddim(ONE_D, X, [3], eta=1.5))),
    (ValueError, "steps must be a whole number from 1 to 10, not 0", lambda: samplers.times(SCHEDULE, 0)),
    (ValueError, "steps must be a whole number from 1 to 10, not 11",
     lambda: samplers.times(SCHEDULE, 11)),
    (ValueError, "steps must be a whole number from 1 to 10, not True",
     lambda: samplers.times(SCHEDULE, True)),
    (ValueError, "spacing must be one of trailing, leading, linspace, log_snr, not 'karras'",
     lambda: samplers.times(SCHEDULE, 3, "karras")),
    (ValueError, "times must be integers that fall strictly within 9..0, got [3, 3]",
     lambda: samplers.sample(samplers.heun(ONE_D, X, [3, 3]))),
    (ValueError, "times must be integers that fall strictly within 9..0, got []",
     lambda: samplers.sample(samplers.ddim_inverse(ONE_D, X, []))),
    (ValueError, "times must be integers that fall strictly within 9..0, got [9.9, 4.7, 0.9]",
     lambda: samplers.sample(samplers.ddim(ONE_D, X, [9.9, 4.7, 0.9]))),
    (ValueError, "times must be integers that fall strictly within 9..0, got [9.0, 4.0]",
     lambda: samplers.sample(samplers.dpm_solver_pp_2m(ONE_D, X, np.array([9.0, 4.0])))),
    (ValueError, "times must be integers that fall strictly within 9..0, got [9, True, False]",
     lambda: samplers.sample(samplers.ddpm(ONE_D, X, [9, True, False], streams=SampleStreams(0, 4)))),
    (ValueError, "times must be integers that fall strictly within 9..0, got [True, False]",
     lambda: samplers.sample(samplers.ddim_inverse(ONE_D, X, np.array([True, False])))),
    (ValueError, "times must be integers that fall strictly within 9..0, got [10, 4]",
     lambda: samplers.sample(samplers.ddim(ONE_D, X, np.array([10, 4])))),
    (ValueError, "times must be integers that fall strictly within 9..0, got ['9', None]",
     lambda: samplers.sample(samplers.ddim(ONE_D, X, ["9", None]))),
    (ValueError, "streams must be SampleStreams, one for each of the 4 samples, got None",
     lambda: samplers.sample(samplers.ddpm(ONE_D, X, [3, 1], streams=None))),
    (ValueError, "streams must be SampleStreams, one for each of the 4 samples, got 3 streams",
     lambda: samplers.sample(samplers.ddim(ONE_D, X, [3, 1], eta=1, streams=SampleStreams(0, 3)))),
    # guidance
    (ValueError, "cond must be a tuple of arrays unless scale is 0, not None: there is nothing to guide toward",
     lambda: ClassifierFree(NETWORK, 2.0, ())(X, T3)),
    (ValueError, "denoiser must not have zero terminal SNR, where the classifier's share of x_0 is 0/0: use a schedule "
                 "with alpha_bar[-1] > 0",
     lambda: ClassifierGuidance(NetworkDenoiser(ZERO, "x0", None), lambda x, t, y: x)),
    (ValueError, "conditions must be tuples of as many arrays that differ along axis 0 only, got samples of shapes "
                 "[(2,)] and [(1,)]", lambda: guidance.stack_conditions((X,), (WRONG,))),
    (ValueError, "uncond must have 1 row or 4, one for each sample, got 2",
     lambda: ClassifierFree(NETWORK, 2.0, (X[:2],))(X, T3, (X,))),
    (ValueError, "scale must be a finite number, not nan", lambda: ClassifierFree(NETWORK, np.nan, ())),
    (ValueError, "scale must be a finite number, not inf",
     lambda: ClassifierGuidance(NETWORK, lambda x, t, y: x, float("inf"))),
    (ValueError, "denoiser must not clip before guidance: build it with clip=None and pass clip here",
     lambda: ClassifierFree(CLIPPING, 2.0, ())),
    (ValueError, "denoiser must not clip before guidance: build it with clip=None and pass clip here",
     lambda: ClassifierGuidance(CLIPPING, lambda x, t, y: x)),
    # likelihood
    (ValueError, "terms must be None, for all, or at least 1, got 0",
     lambda: likelihood.variational_bound(ONE_D, X, streams=SampleStreams(0, 4), decoder=None, terms=0)),
    (ValueError, "terms must be a whole number of at least 1, not 0",
     lambda: next(diffusion_draws(None, None, X, streams=SampleStreams(0, 4), terms=0))),
    (ValueError, "streams must be SampleStreams, one for each of the 4 samples, got 3",
     lambda: likelihood.variational_bound(ONE_D, X, streams=SampleStreams(0, 3), decoder=None)),
    (ValueError, "t must be at least 1, got [0 1 1 1]: the term at 0 is the decoder's",
     lambda: likelihood.reverse_kl(ONE_D, X, np.array([0, 1, 1, 1]), X)),
    (ValueError, "x_0 must be 8-bit values as floats, u / 127.5 - 1 with u = 0..255, got float64 from -2 to 0",
     lambda: likelihood.DiscretisedGaussian(1.0)(np.array([0.0, -2.0]), np.zeros(2))),
    (ValueError, "times must be integers that fall strictly from 9, where all is noise, to 0 or more, got [10, 0]",
     lambda: likelihood.log_prob(ONE_D, X, [10, 0])),
    (ValueError, "times must be integers that fall strictly from 9, where all is noise, to 0 or more, got [8, 0]",
     lambda: likelihood.log_prob(ONE_D, X, [8, 0])),
    (ValueError, "times must be integers that fall strictly from 9, where all is noise, to 0 or more, got [9, 3, -1]",
     lambda: likelihood.log_prob(ONE_D, X, [9, 3, -1])),
    (ValueError, "times must be integers that fall strictly from 9, where all is noise, to 0 or more, got [9.0, 3.5]",
     lambda: likelihood.log_prob(ONE_D, X, np.array([9, 3.5]))),
    (ValueError, "times must be integers that fall strictly from 9, where all is noise, to 0 or more, got [9, True]",
     lambda: likelihood.flow_bound(ONE_D, X, [9, True], eps=X, decoder=None)),
    (TypeError, "denoiser must have a method vjp(x_t, t, dy, cond), the derivative that the flow's density depends on, "
                "but ClassifierFree has none",
     lambda: likelihood.exact_trace(ClassifierFree(NETWORK, 2.0, ()), X, T3)),
    (ValueError, "sigma must be positive and finite, got 0.0", lambda: likelihood.DiscretisedGaussian(0.0)),
    (ValueError, "variance must be positive and finite, got nan", lambda: likelihood.GaussianDensity(np.nan)),
    (ValueError, "variance must be one number, or one for each pixel of a sample (2,), got an array (4, 1)",
     lambda: likelihood.GaussianDensity(np.ones((4, 1)))(X, X)),
    (ValueError, "variance must be one number, or one for each pixel of a sample (2, 4), got an array (4,)",
     lambda: likelihood.GaussianDensity(np.ones(4))(np.zeros((4, 2, 4)), np.zeros((4, 2, 4)))),
])
def test_sentence(error, sentence, call):
    with raises(error, sentence):
        call()
