"""Exercise 20: group norm and its pullback, judged by Python's own statistics and by central differences."""

import math
import statistics

import numpy as np

from minidiff.course.compare import differs, not_tuple, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.course.pullbacks import not_y_and_pullback, results, wrong_pullback
from minidiff.engine import norm
from minidiff.engine.tensor import Tensor, gradients

CASES = [((2, 3, 2, 4), 2), ((1, 2, 2, 6), 3), ((3, 1, 3, 4), 1), ((2, 2, 3, 3), 3)]      # x's shape, groups


def solution(x, groups, gamma, beta, eps):
    leaves = [Tensor(a, requires_grad=True) for a in (x, gamma, beta)]

    def y():
        return norm.group_norm(leaves[0], groups, *leaves[1:], eps)
    return y().data, lambda dy: tuple(gradients(y(), leaves, dy))


# ---- laws --------------------------------------------------------------------------------------------------

def _normalised(x, groups, eps):
    """x_hat, one group of one image after the other."""
    x_hat, each = np.empty(x.shape), x.shape[-1] // groups
    for b in range(len(x)):
        for g in range(groups):
            part = x[b, :, :, g * each:(g + 1) * each]
            mean, variance = statistics.fmean(part.ravel()), statistics.pvariance(part.ravel().tolist())
            x_hat[b, :, :, g * each:(g + 1) * each] = (part - mean) / math.sqrt(variance + eps)
    return x_hat


def _cases(law: int):
    rng = stream(20, law)
    for shape, groups in CASES:
        C = shape[-1]
        yield (2 * rng.standard_normal(shape) + 0.5, groups, rng.standard_normal(C), rng.standard_normal(C), rng,
               f"for x of shape {shape} with groups = {groups}")


def statistics_of_groups(group_norm):
    """with gamma = 1 and beta = 0, y is (x - mean) / sqrt(variance + eps) of each group of each image"""
    for x, groups, gamma, _, _, where in _cases(1):
        for eps in (1e-5, 0.5):
            got = group_norm(x, groups, np.ones_like(gamma), np.zeros_like(gamma), eps)
            at = f"{where} and eps = {eps:g}"
            if (said := not_y_and_pullback(got, x.shape, at)) \
                    or (said := differs("y", got[0], _normalised(x, groups, eps), at)):
                return said


def gamma_and_beta(group_norm):
    """each channel is then scaled by its gamma and shifted by its beta"""
    for x, groups, gamma, beta, _, where in _cases(2):
        plain = group_norm(x, groups, np.ones_like(gamma), np.zeros_like(beta), 1e-5)[0]
        got = group_norm(x, groups, gamma, beta, 1e-5)[0]
        expected = np.stack([plain[..., c] * gamma[c] + beta[c] for c in range(len(gamma))], axis=-1)
        if (said := differs("y", got, expected, where)):
            return said


def large_mean(group_norm):
    """a mean of 10^8 costs no more digits than x itself has lost"""
    rng = stream(20, 3)
    x = rng.standard_normal((1, 4, 4, 2))
    shifted = x + 1e8
    got = group_norm(shifted, 1, np.ones(2), np.zeros(2), 1e-5)[0]
    return differs("y", got, _normalised(x, 1, 1e-5), "for x of shape (1, 4, 4, 2) with the mean 10^8", tolerance=1e-6)


def pullback_by_differences(group_norm):
    """pullback(dy) is the derivative of sum(y dy) by x, gamma and beta"""
    for x, groups, gamma, beta, rng, where in _cases(4):
        for eps in (1e-5, 0.5):
            def op(x, gamma, beta, groups=groups, eps=eps):
                return group_norm(x, groups, gamma, beta, eps)
            if (said := wrong_pullback(op, {"x": x, "gamma": gamma, "beta": beta}, x.shape, rng,
                                       f"{where} and eps = {eps:g}")):
                return said


def keeps_the_dtype(group_norm):
    """y, dx, dgamma and dbeta have the dtype of x"""
    for x, groups, gamma, beta, rng, where in _cases(5):
        dy = rng.standard_normal(x.shape)
        y, pullback = group_norm(x, groups, gamma, beta, 1e-5)
        small = [a.astype(np.float32) for a in (x, gamma, beta, dy)]
        got = group_norm(small[0], groups, small[1], small[2], 1e-5)
        dxs = got[1](small[3])
        if (said := not_tuple("dx, dgamma, dbeta", dxs, 3, where)):
            return said
        for what, a, b in zip(("y", "dx", "dgamma", "dbeta"), (got[0], *dxs), (y, *pullback(dy)), strict=True):
            if (said := differs(what, a, b, f"{where} in float32", dtype=np.float32, like="x")):
                return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _grouped(x, groups):
    return x.reshape(*x.shape[:3], groups, -1)                                        # (B, H, W, G, C/G)


def _answer(x, groups, gamma, beta, eps, *, over=(1, 2, 4), split=_grouped, std=None, dx=None, dgamma=None, dbeta=None):
    """The right answer, or one with a part in another way."""
    g = split(x, groups)
    m = g.mean(over, keepdims=True)
    v = ((g - m) ** 2).mean(over, keepdims=True)
    s = np.sqrt(v + eps) if std is None else std(g, m, v)
    hat = (g - m) / s

    def channels(a):
        return a.reshape(x.shape) if split is _grouped else a.swapaxes(3, 4).reshape(x.shape)

    def pullback(dy):
        dhat = split(dy * gamma, groups)
        m0, m1 = dhat.mean(over, keepdims=True), (dhat * hat).mean(over, keepdims=True)
        d = (dhat - m0 - hat * m1) / s if dx is None else dx(split(dy, groups), dhat, m0, m1, hat, s)
        x_hat = channels(hat)
        return (channels(d), (dy * x_hat).sum((0, 1, 2)) if dgamma is None else dgamma(dy, x_hat),
                dy.sum((0, 1, 2)) if dbeta is None else dbeta(dy))
    return channels(hat) * gamma + beta, pullback


def _every_group_of_the_batch(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, over=(0, 1, 2, 4))


def _pixel_by_pixel(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, over=(4,))


def _all_channels(x, groups, gamma, beta, eps):
    return _answer(x, 1, gamma, beta, eps)


def _each_channel(x, groups, gamma, beta, eps):
    return _answer(x, x.shape[-1], gamma, beta, eps)


def _size_for_count(x, groups, gamma, beta, eps):
    return _answer(x, x.shape[-1] // groups, gamma, beta, eps)


def _alternating(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps,
                   split=lambda x, groups: x.reshape(*x.shape[:3], -1, groups).swapaxes(3, 4))


def _eps_outside(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, std=lambda g, m, v: np.sqrt(v) + eps)


def _no_eps(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, std=lambda g, m, v: np.sqrt(v))


def _no_root(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, std=lambda g, m, v: v + eps)


def _n_minus_1(x, groups, gamma, beta, eps):
    def std(g, m, v):
        n = g.shape[1] * g.shape[2] * g.shape[4]
        return np.sqrt(v * n / (n - 1) + eps)
    return _answer(x, groups, gamma, beta, eps, std=std)


def _one_pass(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps,
                   std=lambda g, m, v: np.sqrt((g * g).mean((1, 2, 4), keepdims=True) - m * m + eps))


def _beta_before_gamma(x, groups, gamma, beta, eps):
    y, pullback = _answer(x, groups, gamma, beta, eps)
    return y - beta + beta * gamma, pullback


def _constant_statistics(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, dx=lambda dy, dhat, m0, m1, hat, s: dhat / s)


def _constant_variance(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, dx=lambda dy, dhat, m0, m1, hat, s: (dhat - m0) / s)


def _constant_mean(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, dx=lambda dy, dhat, m0, m1, hat, s: (dhat - hat * m1) / s)


def _no_gamma_in_dx(x, groups, gamma, beta, eps):
    def dx(dy, dhat, m0, m1, hat, s):
        over = (1, 2, 4)
        return (dy - dy.mean(over, keepdims=True) - hat * (dy * hat).mean(over, keepdims=True)) / s
    return _answer(x, groups, gamma, beta, eps, dx=dx)


def _gamma_outside_the_means(x, groups, gamma, beta, eps):
    y, _ = _answer(x, groups, gamma, beta, eps)

    def pullback(dy):
        dx, dgamma, dbeta = _no_gamma_in_dx(x, groups, gamma, beta, eps)[1](dy)
        return dx * gamma, dgamma, dbeta
    return y, pullback


def _dgamma_of_x(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, dgamma=lambda dy, x_hat: (dy * x).sum((0, 1, 2)))


def _means_for_sums(x, groups, gamma, beta, eps):
    return _answer(x, groups, gamma, beta, eps, dgamma=lambda dy, x_hat: (dy * x_hat).mean((0, 1, 2)),
                   dbeta=lambda dy: dy.mean((0, 1, 2)))


def probe(group_norm):
    rng = stream(20)
    x, gamma, beta = 1.5 * rng.standard_normal((2, 3, 2, 6)) + 1, rng.uniform(0.5, 2, 6), rng.standard_normal(6)

    def op(x, gamma, beta):
        return group_norm(x, 3, gamma, beta, 0.1)
    return [*results(op, x, gamma, beta), group_norm(x + 1e8, 3, gamma, beta, 1e-3)[0]]


EXERCISE = Exercise(
    title="Group norm and its pullback", answer="group_norm", minutes=30, chapter="10_engine",
    hint="x.reshape(B, H, W, groups, C // groups), then means over the axes (1, 2, 4) with keepdims=True. With dx_hat "
         "= gamma dy: dx = (dx_hat - mean(dx_hat) - x_hat mean(dx_hat x_hat)) / sqrt(variance + eps).",
    solution=solution, place="minidiff/engine/norm.py group_norm",
    laws=(statistics_of_groups, gamma_and_beta, large_mean, pullback_by_differences, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_every_group_of_the_batch, "mean and variance are taken over the batch, too: each image has its own, "
                                         "or a sample depends on its neighbours"),
        Wrong(_pixel_by_pixel, "mean and variance are taken for each pixel by itself: they are taken over all pixels"),
        Wrong(_all_channels, "groups is not used: mean and variance are those of all channels"),
        Wrong(_each_channel, "each channel has its own mean and variance: a group has C/groups channels"),
        Wrong(_size_for_count, "it makes groups of `groups` channels: groups is how many groups there are"),
        Wrong(_alternating, "channel c is put in group c mod groups: a group is C/groups neighbours"),
        Wrong(_eps_outside, "eps is added to the standard deviation: it is added to the variance, below the root"),
        Wrong(_no_eps, "eps is not used"),
        Wrong(_no_root, "it divides by the variance in place of its root"),
        Wrong(_n_minus_1, "the variance is divided by n - 1: here it is divided by n"),
        Wrong(_one_pass, "the variance is computed as mean(x^2) - mean^2, whose digits cancel where the mean is "
                         "large: take the mean of (x - mean)^2"),
        Wrong(_beta_before_gamma, "beta is multiplied by gamma, too"),
        Wrong(_constant_statistics, "the pullback treats mean and variance as constants: both depend on x"),
        Wrong(_constant_variance, "the pullback treats the variance as a constant: the term x_hat mean(dx_hat x_hat) "
                                  "is missing"),
        Wrong(_constant_mean, "the pullback treats the mean as a constant: the term mean(dx_hat) is missing"),
        Wrong(_no_gamma_in_dx, "dx lacks gamma: it starts from dx_hat = gamma dy"),
        Wrong(_gamma_outside_the_means, "in dx, gamma multiplies at the end: it differs between the channels of a "
                                        "group, so it belongs inside the means"),
        Wrong(_dgamma_of_x, "dgamma is the sum of dy x in place of dy x_hat"),
        Wrong(_means_for_sums, "dgamma and dbeta are means over the pixels and the batch: gamma is used once for "
                               "each, and the cotangents of all uses add up"),
    ))
