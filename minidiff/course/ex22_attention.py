"""Exercise 22: attention and its pullback, judged by single sums, by Bayes' rule and by central differences."""

import math

import numpy as np

from minidiff.course.compare import differs, not_tuple, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.course.pullbacks import not_y_and_pullback, results, wrong_pullback
from minidiff.engine.attention import scaled_dot_product_attention
from minidiff.engine.tensor import Tensor, gradients

SIZES = [(3, 4, 2, 3), (1, 5, 4, 2), (4, 1, 3, 1), (2, 3, 5, 4)]                      # N, M, d, e


def solution(q, k, v, mask):
    leaves = [Tensor(a[None, None], requires_grad=True) for a in (q, k, v)]

    def y():
        return scaled_dot_product_attention(*leaves, mask)
    return y().data[0, 0], lambda dy: tuple(dx[0, 0] for dx in gradients(y(), leaves, dy[None, None]))


# ---- laws --------------------------------------------------------------------------------------------------

def _cases(law: int):
    rng = stream(22, law)
    for N, M, d, e in SIZES:
        q, k, v = rng.standard_normal((N, d)), rng.standard_normal((M, d)), rng.standard_normal((M, e))
        mask = rng.random((N, M)) < 0.6
        mask[np.arange(N), rng.integers(0, M, N)] = True
        yield q, k, v, mask, rng, f"for N, M, d, e = {N}, {M}, {d}, {e}"


def _expected(q, k, v, mask):
    """y_n = sum_m v_m / sum_j e^{s_j - s_m}, one number after the other, over the keys that are seen."""
    y = np.zeros((len(q), v.shape[1]))
    for n, row in enumerate(q.tolist()):
        seen = [m for m in range(len(k)) if mask is None or mask[n, m]]
        s = {m: math.fsum(a * b for a, b in zip(row, k[m].tolist(), strict=True)) / len(row) ** 0.5 for m in seen}
        for m in seen:
            y[n] += v[m] / math.fsum(math.exp(min(s[j] - s[m], 700.0)) for j in seen)
    return y


def weighted_means(attention):
    """y is the mean of the values, with weights in proportion to e^{q k / sqrt(d)}"""
    for q, k, v, _, _, where in _cases(1):
        got = attention(q, k, v, None)
        if (said := not_y_and_pullback(got, (len(q), v.shape[1]), where)) \
                or (said := differs("y", got[0], _expected(q, k, v, None), where)):
            return said


def denoiser_of_points(attention):
    """with the right keys it is the exact denoiser of a list of points: E[x_0 | x_t] by Bayes' rule"""
    rng = stream(22, 2)
    for alpha, sigma in ((0.8, 0.6), (0.3, 0.954)):
        points, x_t = rng.standard_normal((6, 2)), rng.standard_normal((4, 2))
        density = np.exp(-((x_t[:, None] - alpha * points) ** 2).sum(-1) / (2 * sigma**2))    # of x_t, from each point
        expected = density @ points / density.sum(1, keepdims=True)
        # -||x_t - alpha x_i||^2 / 2 sigma^2 = alpha x_t x_i / sigma^2 - alpha^2 ||x_i||^2 / 2 sigma^2 + a constant
        q = np.concatenate([alpha / sigma**2 * x_t, np.ones((4, 1))], axis=1) * math.sqrt(3)
        k = np.concatenate([points, -alpha**2 / (2 * sigma**2) * (points**2).sum(1, keepdims=True)], axis=1)
        if (said := differs("y", attention(q, k, points, None)[0], expected,
                            f"for 6 points, alpha = {alpha}, sigma = {sigma}", tolerance=1e-7)):
            return said


def masked_keys(attention):
    """a query takes its mean over the keys that it sees, whatever the other keys and values are"""
    for q, k, v, mask, _, where in _cases(3):
        where = f"{where} with the mask {mask.astype(int).tolist()}"
        expected = _expected(q, k, v, mask)
        if (said := differs("y", attention(q, k, v, mask)[0], expected, where)):
            return said
        for n in range(len(q)):                             # one query, and what it does not see is huge
            huge = np.where(mask[n], 1, 1e6)[:, None]
            got = attention(q[n:n + 1], huge * k, huge * v, mask[n:n + 1])[0]
            if (said := differs("y", got, expected[n:n + 1], f"{where}, for query {n} alone, where the keys and values "
                                                             "that it does not see are a million times larger")):
                return said


def huge_scores(attention):
    """scores of any size give finite weights"""
    for q, k, v, mask, _, where in _cases(4):
        q = 600 * q
        for m in (None, mask):
            if (said := differs("y", attention(q, k, v, m)[0], _expected(q, k, v, m),
                                f"{where}, q times 600{', with a mask' if m is not None else ''}")):
                return said


def pullback_by_differences(attention):
    """pullback(dy) is the derivative of sum(y dy) by q, k and v"""
    for q, k, v, mask, rng, where in _cases(5):
        for m in (None, mask):
            def op(q, k, v, m=m):
                return attention(q, k, v, m)
            at = where if m is None else f"{where} with a mask"
            if (said := wrong_pullback(op, {"q": q, "k": k, "v": v}, (len(q), v.shape[1]), rng, at)):
                return said


def keeps_the_dtype(attention):
    """y, dq, dk and dv have the dtype of q"""
    for q, k, v, mask, rng, where in _cases(6):
        dy = rng.standard_normal((len(q), v.shape[1]))
        y, pullback = attention(q, k, v, mask)
        got = attention(*(a.astype(np.float32) for a in (q, k, v)), mask)
        dxs = got[1](dy.astype(np.float32))
        if (said := not_tuple("dq, dk, dv", dxs, 3, where)):
            return said
        for what, a, b in zip(("y", "dq", "dk", "dv"), (got[0], *dxs), (y, *pullback(dy)), strict=True):
            if (said := differs(what, a, b, f"{where} in float32", dtype=np.float32, like="q")):
                return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _softmax(S):
    P = np.exp(S - S.max(-1, keepdims=True))
    return P / P.sum(-1, keepdims=True)


def _answer(q, k, v, mask, *, scale=None, weights=None, dS=None, scale_back=None):
    """The right answer, or one with a part in another way."""
    scale = q.shape[1] ** -0.5 if scale is None else scale
    S, mask = scale * (q @ k.T), np.ones((len(q), len(k)), bool) if mask is None else mask
    P = _softmax(np.where(mask, S, -np.inf)) if weights is None else weights(S, mask)
    back = scale if scale_back is None else scale_back

    def pullback(dy):
        dP = dy @ v.T
        d = P * (dP - (P * dP).sum(-1, keepdims=True)) if dS is None else dS(P, dP)
        return back * (d @ k), back * (d.T @ q), P.T @ dy
    return P @ v, pullback


def _no_scale(q, k, v, mask):
    return _answer(q, k, v, mask, scale=1.0)


def _by_d(q, k, v, mask):
    return _answer(q, k, v, mask, scale=1 / q.shape[1])


def _by_the_keys(q, k, v, mask):
    return _answer(q, k, v, mask, scale=len(k) ** -0.5)


def _over_queries(q, k, v, mask):
    return _answer(q, k, v, mask, weights=lambda S, mask: _softmax(np.where(mask, S, -1e300).T).T)


def _mask_reversed(q, k, v, mask):
    return _answer(q, k, v, mask, weights=lambda S, mask: _softmax(np.where(mask if mask.all() else ~mask, S, -1e300)))


def _score_0(q, k, v, mask):
    return _answer(q, k, v, mask, weights=lambda S, mask: _softmax(np.where(mask, S, 0)))


def _masked_after_the_softmax(q, k, v, mask):
    return _answer(q, k, v, mask, weights=lambda S, mask: _softmax(S) * mask)


def _no_mask(q, k, v, mask):
    return _answer(q, k, v, None)


def _no_shift(q, k, v, mask):
    def weights(S, mask):
        P = np.exp(np.where(mask, S, -np.inf))
        return P / P.sum(-1, keepdims=True)
    return _answer(q, k, v, mask, weights=weights)


def _small_penalty(q, k, v, mask):
    return _answer(q, k, v, mask, weights=lambda S, mask: _softmax(np.where(mask, S, S - 10)))


def _constant_weights(q, k, v, mask):
    return _answer(q, k, v, mask, dS=lambda P, dP: 0 * dP)


def _no_softmax_backward(q, k, v, mask):
    return _answer(q, k, v, mask, dS=lambda P, dP: dP)


def _diagonal(q, k, v, mask):
    return _answer(q, k, v, mask, dS=lambda P, dP: P * (1 - P) * dP)


def _no_sum(q, k, v, mask):
    return _answer(q, k, v, mask, dS=lambda P, dP: P * dP)


def _sum_over_queries(q, k, v, mask):
    return _answer(q, k, v, mask, dS=lambda P, dP: P * (dP - (P * dP).sum(0, keepdims=True)))


def _no_scale_back(q, k, v, mask):
    return _answer(q, k, v, mask, scale_back=1.0)


def _scale_twice(q, k, v, mask):
    return _answer(q, k, v, mask, scale_back=1 / q.shape[1])


def probe(attention):
    rng = stream(22)
    q, k, v = (rng.standard_normal(shape) for shape in ((3, 3), (4, 3), (4, 2)))
    mask = np.array([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]], bool)

    def masked(q, k, v):
        return attention(q, k, v, mask)
    with np.errstate(all="ignore"):
        return [*results(masked, q, k, v), *results(lambda q, k, v: attention(q, k, v, None), q, k, v),
                *(attention(factor * q, k, v, mask)[0] for factor in (2000, -2000))]


EXERCISE = Exercise(
    title="Attention and its pullback", answer="attention", minutes=45, chapter="10_engine",
    hint="Set S to -inf where mask is False, and subtract each row's largest score before np.exp. Backward: dv = P^T "
         "dy, dP = dy v^T, dS = P (dP - sum(P dP)) by rows, dq = dS k / sqrt(d), dk = dS^T q / sqrt(d).",
    solution=solution, place="minidiff/engine/attention.py scaled_dot_product_attention",
    laws=(weighted_means, denoiser_of_points, masked_keys, huge_scores, pullback_by_differences, keeps_the_dtype),
    probe=probe,
    wrong=(
        Wrong(_no_scale, "the scores are not divided by sqrt(d)"),
        Wrong(_by_d, "the scores are divided by d in place of sqrt(d)"),
        Wrong(_by_the_keys, "the scores are divided by the root of the number of keys: d is the length of a key"),
        Wrong(_over_queries, "the softmax goes over the queries: the weights of each query, over the keys, sum to 1"),
        Wrong(_mask_reversed, "the mask is reversed: True is where a query sees a key"),
        Wrong(_score_0, "a masked score is 0, and e^0 is 1: it should be -inf, whose weight is 0"),
        Wrong(_masked_after_the_softmax, "the mask is applied after the softmax, so that the weights no longer sum "
                                         "to 1"),
        Wrong(_no_mask, "mask is not used"),
        Wrong(_no_shift, "exp overflows where scores are large: subtract each row's largest score first"),
        Wrong(_small_penalty, "masked scores are lowered by 10 only, so that their keys still count: use -inf"),
        Wrong(_constant_weights, "the pullback treats the weights as constants: dq and dk are not 0"),
        Wrong(_no_softmax_backward, "the pullback passes dP on as dS: the softmax lies between them"),
        Wrong(_diagonal, "the softmax's pullback has P (1 - P), as for a sigmoid: each score also changes all other "
                         "weights of its row"),
        Wrong(_no_sum, "the softmax's pullback lacks its sum: dS = P (dP - sum(P dP))"),
        Wrong(_sum_over_queries, "in the softmax's pullback the sum goes over the queries: it goes over the keys of "
                                 "a row"),
        Wrong(_no_scale_back, "dq and dk lack the factor 1 / sqrt(d)"),
        Wrong(_scale_twice, "dq and dk have the factor 1 / sqrt(d) twice"),
    ))
