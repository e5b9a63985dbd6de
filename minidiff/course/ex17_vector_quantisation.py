"""Exercise 17: vector quantisation, judged by a search over all pairs and by central differences of each loss term."""

import numpy as np

from minidiff.course.compare import differs, misshapen, not_tuple, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.layers import Unfilled
from minidiff.nn.quantise import Codebook


def solution(z, codes, beta):
    z, book = Tensor(z, requires_grad=True), Codebook(*codes.shape, Unfilled(1, codes.size))
    book.codes.data = np.array(codes)
    q = book(z)

    def pullback(dz_q, dL):
        q = book(z)                                         # again, since a graph is walked once
        total = ops.sum(q.z_q * dz_q) + float(dL) * (q.codebook + beta * q.commitment)
        return tuple(gradients(total, [z, book.codes]))
    return q.z_q.data, (q.codebook + beta * q.commitment).item(), pullback


# ---- laws --------------------------------------------------------------------------------------------------

def _cases(law: int):
    rng = stream(17, law)
    for N, K, D in ((1, 1, 1), (5, 3, 2), (9, 4, 3)):
        yield rng.standard_normal((N, D)), rng.standard_normal((K, D)), float(rng.uniform(0.1, 0.6)), rng, \
            f"for z of shape {(N, D)} and {K} codes"


def _chosen(z, codes):
    """The number of each row's code: the squares of the differences themselves, pair by pair."""
    return np.array([[((row - code) ** 2).sum() for code in codes] for row in z]).argmin(1)


def _three(quantise, z, codes, beta, where):
    """The results, and a sentence if they are not three."""
    got = quantise(z, codes, beta)
    said = not_tuple("z_q, loss, pullback", got, 3, where)
    if said is None and not callable(got[2]):
        said = f"the third result should be a function (dz_q, dL) -> (dz, dcodes), {where}"
    return got, said


def nearest(quantise):
    """each row of z_q is the code at the smallest distance"""
    for z, codes, beta, _, where in _cases(1):
        got, said = _three(quantise, z, codes, beta, where)
        if (said := said or differs("z_q", got[0], codes[_chosen(z, codes)], where)):
            return said


def nearest_far_away(quantise):
    """the same far from 0, where the squares of the coordinates drown the differences"""
    for z, codes, beta, _, where in _cases(2):
        z, codes = z.round(3) + 2.0**30, codes.round(3) + 2.0**30
        got, said = _three(quantise, z, codes, beta, where)
        said = said or misshapen("z_q", got[0], z.shape, where)
        if (said := said or differs("z_q - 2^30", got[0] - 2.0**30, codes[_chosen(z, codes)] - 2.0**30,
                                    f"{where} around 2^30", tolerance=1e-6)):
            return said


def value_of_the_loss(quantise):
    """the loss is 1 + beta times the mean square distance of a number from its code's"""
    for z, codes, beta, _, where in _cases(3):
        got, said = _three(quantise, z, codes, beta, where)
        nearest_squares = [min(((row - code) ** 2).sum() for code in codes) for row in z]
        expected = (1 + beta) * sum(nearest_squares) / z.size
        if (said := said or differs("the loss", got[1], expected, f"{where}, beta = {beta:.4g}")):
            return said


def pull_on_the_vectors(quantise):
    """dz is dz_q, unchanged, and the slope of dL beta mean (z - e_k)^2 with the codes held still"""
    for z, codes, beta, rng, where in _cases(4):
        got, said = _three(quantise, z, codes, beta, where)
        if said:
            return said
        dz_q, dL, held = rng.standard_normal(z.shape), float(rng.uniform(0.5, 2)), codes[_chosen(z, codes)]
        pulled = got[2](dz_q, dL)
        expected = dz_q + _slope(lambda z, held=held, dL=dL, beta=beta: dL * beta * ((z - held) ** 2).mean(), z)
        if (said := not_tuple("dz, dcodes", pulled, 2, where)
                or differs("dz", pulled[0], expected, where, tolerance=1e-6)):
            return said


def pull_on_the_codes(quantise):
    """dcodes is the slope of dL mean (z - e_k)^2 with z held still, and no gradient of z_q reaches the codes"""
    for z, codes, beta, rng, where in _cases(5):
        got, said = _three(quantise, z, codes, beta, where)
        if said:
            return said
        dz_q, dL, k = rng.standard_normal(z.shape), float(rng.uniform(0.5, 2)), _chosen(z, codes)
        pulled = got[2](dz_q, dL)
        expected = _slope(lambda codes, z=z, k=k, dL=dL: dL * ((z - codes[k]) ** 2).mean(), codes)
        if (said := not_tuple("dz, dcodes", pulled, 2, where)
                or differs("dcodes", pulled[1], expected, f"{where}, which chose {k.tolist()}", tolerance=1e-6)):
            return said


def _slope(f, x, h=1e-5):
    """df/dx by central differences, of x's shape."""
    slope = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        slope[index] = (f(x + step) - f(x - step)) / (2 * h)
    return slope


# ---- known wrong answers -----------------------------------------------------------------------------------

def _quantise(z, codes, beta, *, choose=None, dz=None, dcodes=None, loss=None):
    """The right answer, or one with a part in another way: functions of (dz_q, d, beta), d = z - e_k as in the loss."""
    k = _chosen(z, codes) if choose is None else choose(z, codes)
    d, size = z - codes[k], z.size

    def pullback(dz_q, dL):
        slope = 2 * dL * d / size
        scattered = np.zeros_like(codes)
        np.add.at(scattered, k, -slope)
        return (dz_q + beta * slope if dz is None else dz(dz_q, slope),
                scattered if dcodes is None else dcodes(dz_q, slope, k, scattered))
    return codes[k], float((1 + beta) * (d**2).mean() if loss is None else loss(d)), pullback


def _no_gradient_through(z, codes, beta):
    return _quantise(z, codes, beta, dz=lambda dz_q, slope: beta * slope)


def _no_commitment(z, codes, beta):
    return _quantise(z, codes, beta, dz=lambda dz_q, slope: dz_q + 0 * slope)


def _gradient_to_the_codes(z, codes, beta):
    def dcodes(dz_q, slope, k, scattered):
        scattered = scattered.copy()
        np.add.at(scattered, k, dz_q)
        return scattered
    return _quantise(z, codes, beta, dcodes=dcodes)


def _lost_codes(z, codes, beta):
    def dcodes(dz_q, slope, k, scattered):
        result = np.zeros_like(codes)
        result[k] += -slope
        return result
    return _quantise(z, codes, beta, dcodes=dcodes)


def _sign_of_dcodes(z, codes, beta):
    return _quantise(z, codes, beta, dcodes=lambda dz_q, slope, k, scattered: -scattered)


def _beta_on_both(z, codes, beta):
    return _quantise(z, codes, beta, dcodes=lambda dz_q, slope, k, scattered: beta * scattered)


def _no_stop(z, codes, beta):
    return _quantise(z, codes, beta, dz=lambda dz_q, slope: dz_q + (1 + beta) * slope,
                     dcodes=lambda dz_q, slope, k, scattered: (1 + beta) * scattered)


def _beta_on_the_codes(z, codes, beta):
    return _quantise(z, codes, beta, dz=lambda dz_q, slope: dz_q + slope,
                     dcodes=lambda dz_q, slope, k, scattered: beta * scattered)


def _farthest(z, codes, beta):
    return _quantise(z, codes, beta, choose=lambda z, codes: ((z[:, None] - codes) ** 2).sum(-1).argmax(1))


def _largest_product(z, codes, beta):
    return _quantise(z, codes, beta, choose=lambda z, codes: (z @ codes.T).argmax(1))


def _expanded_squares(z, codes, beta):
    def choose(z, codes):
        return ((z**2).sum(1)[:, None] - 2 * z @ codes.T + (codes**2).sum(1)).argmin(1)
    return _quantise(z, codes, beta, choose=choose)


def _sum_over_dimensions(z, codes, beta):
    D = z.shape[1]
    return _quantise(z, codes, beta, loss=lambda d: (1 + beta) * (d**2).sum(1).mean(),
                     dz=lambda dz_q, slope: dz_q + beta * D * slope,
                     dcodes=lambda dz_q, slope, k, scattered: D * scattered)


def probe(quantise):
    rng, results = stream(17), []
    for offset in (0.0, 2.0**30):
        z, codes = (rng.standard_normal(shape).round(3) for shape in ((8, 2), (3, 2)))
        z_q, loss, pullback = quantise(z + offset, codes + offset, 0.3)
        results += [z_q - offset, loss, *pullback(rng.standard_normal(z.shape), 1.7)]
    return results


EXERCISE = Exercise(
    title="Vector quantisation, with a gradient straight through", answer="quantise", minutes=45, chapter="08_latents",
    hint="For the distances use the differences themselves, z[:, None] - codes. Several rows may choose one code: "
         "`a[k] += b` counts each index once, and np.add.at(a, k, b) counts it as often as it comes.",
    solution=solution, place="minidiff/nn/quantise.py Codebook",
    laws=(nearest, nearest_far_away, value_of_the_loss, pull_on_the_vectors, pull_on_the_codes), probe=probe,
    wrong=(
        Wrong(_no_gradient_through, "dz lacks dz_q: the gradient passes straight through, from z_q to z"),
        Wrong(_no_commitment, "dz lacks the part of the commitment loss, beta mean (z - sg[e_k])^2"),
        Wrong(_gradient_to_the_codes, "dz_q reaches the codes: straight through means that it goes to z instead"),
        Wrong(_lost_codes, "where several rows chose one code, only the last of them counts: a[k] += b takes each "
                           "index once, and np.add.at(a, k, b) as often as it comes"),
        Wrong(_sign_of_dcodes, "dcodes has the wrong sign, and would push the codes away"),
        Wrong(_beta_on_both, "dcodes has the factor beta, which belongs to the commitment of z only"),
        Wrong(_no_stop, "both terms move both z and the codes: sg stops z in the first term and the codes in the "
                        "second"),
        Wrong(_beta_on_the_codes, "the two terms have changed places: the codes follow with weight 1, and z with "
                                  "beta"),
        Wrong(_farthest, "it chooses the farthest code"),
        Wrong(_largest_product, "it chooses the code with the largest product with z, which is not the nearest "
                                "unless all codes have one length"),
        Wrong(_expanded_squares, "it expands the square, ||z||^2 - 2 z e + ||e||^2, and far from 0 the small "
                                 "differences are lost in rounding"),
        Wrong(_sum_over_dimensions, "it sums over the D numbers of a vector: the means are over all N D numbers"),
    ))
