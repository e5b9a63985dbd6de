"""Exercise 14: the sinusoidal embedding, judged by the rotations that a shift of time is, and by its rank."""

import cmath

import numpy as np

from minidiff.course.compare import differs, misshapen, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.nn import layers


def solution(t, dim, max_period):
    return layers.sinusoidal_embedding(t, dim, max_period, dtype=np.float64)


# ---- laws --------------------------------------------------------------------------------------------------

def turns(sinusoidal_embedding):
    """column k and column dim/2 + k are the real and the imaginary part of exp(i t / max_period^(2k/dim))"""
    rng = stream(14, 1)
    for dim, max_period in ((2, 10_000.0), (8, 10_000.0), (6, 100.0), (32, 3.0)):
        t = np.concatenate([[0.0, 1.0], rng.uniform(0, 1000, 3)])
        expected = np.empty((len(t), dim))
        for i, time in enumerate(t):
            for k in range(dim // 2):
                z = cmath.exp(1j * time / max_period ** (2 * k / dim))
                expected[i, k], expected[i, dim // 2 + k] = z.real, z.imag
        got = sinusoidal_embedding(t, dim, max_period)
        if (said := differs("the embedding", got, expected, f"for dim = {dim}, max_period = {max_period:g}, "
                                                            f"t = {t.round(2).tolist()}")):
            return said


def shift_of_time(sinusoidal_embedding):
    """a shift of time by 1 turns every hand by the angle that it has at t = 1, wherever it stood"""
    dim, t = 8, np.arange(20)
    got = [sinusoidal_embedding(t + shift, dim, 50.0) for shift in (0, 1)]
    step = sinusoidal_embedding(np.array([1]), dim, 50.0)
    for what, a in (("the embedding of 0 ... 19", got[0]), ("the embedding of 1 ... 20", got[1])):
        if (said := misshapen(what, a, (20, dim), "for dim = 8")):
            return said
    (c, s), (C, S) = (np.split(a, 2, axis=1) for a in (got[0], step))
    expected = np.concatenate([c * C - s * S, s * C + c * S], axis=1)
    return differs("the embedding of 1 ... 20", got[1], expected, "for dim = 8, max_period = 50")


def tells_times_apart(sinusoidal_embedding):
    """the rows of 64 times have the rank dim: no column can be made of the others"""
    for dim in (4, 16):
        got = sinusoidal_embedding(np.arange(64), dim, 20.0)
        if (said := misshapen("the embedding", got, (64, dim), f"for dim = {dim}")):
            return said
        rank = int(np.linalg.matrix_rank(got, tol=1e-8)) if np.isfinite(got).all() else 0
        if rank != dim:
            return f"the rank of the embedding of t = 0 ... 63 is {rank} and should be {dim}, for dim = {dim} and " \
                   "max_period = 20"


def row_of_its_own(sinusoidal_embedding):
    """a row depends on its own time, and not on its place in the batch"""
    t = np.array([5, 900, 17, 5])
    got, again = sinusoidal_embedding(t, 6, 1e4), sinusoidal_embedding(t[::-1].copy(), 6, 1e4)
    return misshapen("the embedding", got, (4, 6), "for t = [5, 900, 17, 5]") \
        or differs("the embedding", again, got[::-1], "for t = [5, 17, 900, 5], against the rows of [5, 900, 17, 5]")


# ---- known wrong answers -----------------------------------------------------------------------------------

def _rows(t, freq):
    angle = np.asarray(t, float)[:, None] * freq
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def _freq(dim, max_period):
    return max_period ** (-np.arange(dim // 2) / (dim // 2))


def _sum(t, dim, max_period):
    angle = np.asarray(t, float)[:, None] + _freq(dim, max_period)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def _sines_first(t, dim, max_period):
    return np.roll(_rows(t, _freq(dim, max_period)), dim // 2, axis=1)


def _interleaved(t, dim, max_period):
    return _rows(t, _freq(dim, max_period)).reshape(len(t), 2, -1).transpose(0, 2, 1).reshape(len(t), dim)


def _by_the_batch(t, dim, max_period):
    return _rows(np.arange(len(t)), _freq(dim, max_period))


def _both_ends(t, dim, max_period):
    half = dim // 2
    return _rows(t, max_period ** (-np.arange(half) / max(half - 1, 1)))


def _half_the_exponent(t, dim, max_period):
    return _rows(t, max_period ** (-np.arange(dim // 2) / dim))


def _growing(t, dim, max_period):
    return _rows(t, 1 / _freq(dim, max_period))


def _natural(t, dim, max_period):
    return _rows(t, np.exp(-np.arange(dim // 2) / (dim // 2)))


def _even_frequencies(t, dim, max_period):
    return _rows(t, 1 - np.arange(dim // 2) / (dim // 2))


def _whole_turns(t, dim, max_period):
    return _rows(t, 2 * np.pi * _freq(dim, max_period))


def probe(sinusoidal_embedding):
    return [sinusoidal_embedding(np.array([3.0, 0.5, 40.0]), dim, 100.0) for dim in (8, 6)]


EXERCISE = Exercise(
    title="Telling a network the time", answer="sinusoidal_embedding", minutes=10, chapter="06_text",
    hint="t[:, None] * freq has the shape (B, dim/2), by broadcasting. Then concatenate its cosine and its sine "
         "along the last axis.",
    solution=solution, place="minidiff/nn/layers.py sinusoidal_embedding",
    laws=(turns, shift_of_time, tells_times_apart, row_of_its_own), probe=probe,
    wrong=(
        Wrong(_sum, "it adds t and freq in place of multiplying them: all hands then turn at one speed, and the rank "
                    "is 2"),
        Wrong(_sines_first, "the sines come first: here the cosines do"),
        Wrong(_interleaved, "cosines and sines alternate: here all cosines come first"),
        Wrong(_by_the_batch, "it embeds the place in the batch in place of the time t"),
        Wrong(_both_ends, "it divides k by dim/2 - 1, so that the last period is max_period itself: here k is "
                          "divided by dim/2"),
        Wrong(_half_the_exponent, "it divides k by dim: there are dim/2 frequencies, and k is divided by dim/2"),
        Wrong(_growing, "the minus in the exponent is missing: frequencies fall from 1 to about 1/max_period"),
        Wrong(_natural, "max_period is not used: the frequencies are powers of e"),
        Wrong(_even_frequencies, "the frequencies fall in equal strides: they fall by equal factors"),
        Wrong(_whole_turns, "the angles have a factor 2 pi too many"),
    ))
