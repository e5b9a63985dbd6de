"""Exercise 18: the moving average of the weights, judged by the closed sum that many steps are."""

import math

import numpy as np

from minidiff.course.compare import differs, misshapen, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.engine.tensor import Tensor
from minidiff.nn import optim


def solution(average, weights, n, decay):
    ema = optim.EMA({"w": Tensor(weights)}, decay)
    ema.load_state_dict({"w": average, "n": np.array(n)})
    ema.step()
    return ema.average["w"]


# ---- laws --------------------------------------------------------------------------------------------------

def _shares(got, average, weights, where):
    """None if `got` is an array of its own; else one sentence."""
    for name, array in (("average", average), ("weights", weights)):
        if np.shares_memory(got, array):
            return f"the result is not a new array, and shares its numbers with the argument {name}, {where}: a " \
                   "change of one would change the other"
    return None


def closed_sum(ema_step):
    """after N steps it is the sum of all weights w_n, each times (1 - d_n) and all later d, and of the start times all
    d"""
    rng = stream(18, 1)
    for decay, N in ((0.0, 3), (0.05, 4), (0.5, 12), (0.9, 200)):
        average = start = rng.standard_normal((2, 3))
        weights = rng.standard_normal((N, 2, 3))
        d = [min(decay, (1 + n) / (10 + n)) for n in range(N)]
        expected = math.prod(d) * start + sum((1 - d[n]) * math.prod(d[n + 1:]) * weights[n] for n in range(N))
        for n in range(N):
            before, where = average, f"after {n + 1} steps with decay = {decay}"
            average = ema_step(before, weights[n], n, decay)
            if (said := misshapen("the average", average, start.shape, where)
                    or _shares(average, before, weights[n], where)):
                return said
        if (said := differs("the average", average, expected, f"after {N} steps with decay = {decay}")):
            return said


def first_steps(ema_step):
    """from 0, with weights 1, the first step gives 0.9, the second 0.9818, and a step at n = 10^6 gives 1 - decay"""
    zero, one = np.zeros(2), np.ones(2)
    for n, decay, expected in ((0, 0.999, 0.9), (1, 0.999, 9 / 11), (10**6, 0.999, 0.001), (10**6, 0.25, 0.75)):
        if (said := differs("the average", ema_step(zero, one, n, decay), expected * one,
                            f"from 0 with weights 1, n = {n}, decay = {decay}")):
            return said
    first = np.asarray(ema_step(zero, one, 0, 0.999))
    second = ema_step(first, one, 1, 0.999)
    return differs("the average", second, (1 - 0.1 * 2 / 11) * one, "after two steps from 0 with weights 1")


def constant_weights(ema_step):
    """weights that do not change are their own average"""
    w = stream(18, 3).standard_normal(5)
    for n in (0, 3, 1000):
        same, where = w.copy(), f"of constant weights at n = {n}"
        got = ema_step(w, same, n, 0.99)
        if (said := differs("the average", got, w, where) or _shares(got, w, same, where)):
            return said


def keeps_the_dtype(ema_step):
    """the average has the dtype of the weights"""
    average, weights = stream(18, 4).standard_normal((2, 3, 2)).astype(np.float32)
    expected = 0.1 * average.astype(float) + 0.9 * weights
    return differs("the average", ema_step(average, weights, 0, 0.999), expected, "for n = 0", dtype=np.float32,
                   like="weights")


# ---- known wrong answers -----------------------------------------------------------------------------------

def _d(n, decay):
    return min(decay, (1 + n) / (10 + n))


def _swapped(average, weights, n, decay):
    d = _d(n, decay)
    return (1 - d) * average + d * weights


def _no_warmup(average, weights, n, decay):
    return decay * average + (1 - decay) * weights


def _brackets(average, weights, n, decay):
    d = min(decay, (1 + n) / 10 + n)
    return d * average + (1 - d) * weights


def _larger(average, weights, n, decay):
    d = max(decay, (1 + n) / (10 + n))
    return d * average + (1 - d) * weights


def _no_limit(average, weights, n, decay):
    d = (1 + n) / (10 + n)
    return d * average + (1 - d) * weights


def _counts_from_one(average, weights, n, decay):
    d = _d(n + 1, decay)
    return d * average + (1 - d) * weights


def _starts_at_zero(average, weights, n, decay):
    d = min(decay, n / (10 + n))
    return d * average + (1 - d) * weights


def _product(average, weights, n, decay):
    d = decay * (1 + n) / (10 + n)
    return d * average + (1 - d) * weights


def _sum(average, weights, n, decay):
    return _d(n, decay) * average + weights


def _mean(average, weights, n, decay):
    return average + (weights - average) / (n + 1)


def _unchanged(average, weights, n, decay):
    return np.array(average)


def _no_average(average, weights, n, decay):
    return np.array(weights)


def probe(ema_step):
    average, weights = stream(18).standard_normal((2, 3))
    return [ema_step(average, weights, n, decay) for n, decay in ((0, 0.99), (1, 0.05), (5, 0.99), (90, 0.5))]


EXERCISE = Exercise(
    title="The average of the weights", answer="ema_step", minutes=10, chapter="03_denoiser",
    hint="Two lines: d as a Python float, by min, and the weighted mean of both arrays.",
    solution=solution, place="minidiff/nn/optim.py EMA",
    laws=(closed_sum, first_steps, constant_weights, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_swapped, "d and 1 - d have changed places: d is the share of the old average"),
        Wrong(_no_warmup, "d is always `decay`, so that the random weights of the beginning stay in the average for "
                          "long (is the minimum missing, or are the brackets of (1 + n) / (10 + n)?)"),
        Wrong(_brackets, "brackets are missing: (1 + n) / 10 + n is not (1 + n) / (10 + n)"),
        Wrong(_larger, "it takes the larger of decay and (1 + n) / (10 + n): take the smaller, and d is small at "
                       "first"),
        Wrong(_no_limit, "decay is not used: d goes on to 1, and the average stops following the weights"),
        Wrong(_counts_from_one, "it counts from 1: n = 0 in the first step, where d is 0.1"),
        Wrong(_starts_at_zero, "it has n / (10 + n) in place of (1 + n) / (10 + n)"),
        Wrong(_product, "it multiplies decay by (1 + n) / (10 + n): take the smaller of the two"),
        Wrong(_sum, "the weights lack the factor 1 - d, so that the average grows"),
        Wrong(_mean, "it is the plain mean of all weights so far: old ones should fade away"),
        Wrong(_unchanged, "it returns the old average"),
        Wrong(_no_average, "it returns the weights themselves"),
    ))
