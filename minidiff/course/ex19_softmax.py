"""Exercise 19: softmax and its pullback, judged by sums in plain Python and by central differences."""

import math

import numpy as np

from minidiff.course.compare import differs, numbers, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.course.pullbacks import not_y_and_pullback, results, wrong_pullback
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients


def solution(x):
    leaf = Tensor(x, requires_grad=True)
    return ops.softmax(leaf).data, lambda dy: gradients(ops.softmax(leaf), [leaf], dy)[0]


# ---- laws --------------------------------------------------------------------------------------------------

def _weights(row):
    """y_i = 1 / sum_k e^{x_k - x_i}, one number after the other."""
    return [1 / math.fsum(math.exp(min(other - x, 700.0)) for other in row) for x in row]


def _expected(x):
    return np.array([_weights(row) for row in x.reshape(-1, x.shape[-1]).tolist()]).reshape(x.shape)


def weights_of_rows(softmax):
    """y_i is 1 / sum_k e^{x_k - x_i}, over the row of its own"""
    rng = stream(19, 1)
    for shape in ((5,), (3, 4), (2, 3, 6), (4, 1)):
        x = 2 * rng.standard_normal(shape)
        got = softmax(x.copy())
        where = f"for x of shape {shape}"
        if (said := not_y_and_pullback(got, shape, where)) or (said := differs("y", got[0], _expected(x), where)):
            return said


def huge_numbers(softmax):
    """numbers of any size give the same weights: only differences within the row count"""
    for x in ([[1000.0, 999.0, 997.0]], [[-1000.0, -1001.0, -1003.0]], [[0.0, 1e5, 1e5 + 1]],
              [[900.0, 902.0], [-900.0, -901.0]], [[0.0, 1500.0]]):
        got = softmax(np.array(x))
        where = f"for x = {x}"
        if (said := not_y_and_pullback(got, np.shape(x), where)) \
                or (said := differs("y", got[0], _expected(np.array(x)), where)):
            return said


def pullback_by_differences(softmax):
    """pullback(dy) is the derivative of sum(y dy) by x"""
    rng = stream(19, 3)
    for shape in ((4,), (3, 5), (2, 2, 3)):
        x = rng.standard_normal(shape)
        where = f"for x = {numbers(x)}" if x.size < 6 else f"for x of shape {shape}"
        if (said := wrong_pullback(softmax, {"x": x}, shape, rng, where)):
            return said


def keeps_the_dtype(softmax):
    """y and dx have the dtype of x"""
    x, dy = stream(19, 4).standard_normal((2, 3, 4))
    y, pullback = softmax(x)
    got = softmax(x.astype(np.float32))
    where = "for a float32 x of shape (3, 4)"
    return not_y_and_pullback(got, x.shape, where, np.float32, like="x") \
        or differs("y", got[0], y, where, dtype=np.float32, like="x") \
        or differs("dx", got[1](dy.astype(np.float32)), pullback(dy), where, dtype=np.float32, like="x")


# ---- known wrong answers -----------------------------------------------------------------------------------

def _shifted(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _right_pullback(y):
    return lambda dy: y * (dy - (y * dy).sum(-1, keepdims=True))


def _with(y):
    return y, _right_pullback(y)


def _no_shift(x):
    e = np.exp(x)
    return _with(e / e.sum(-1, keepdims=True))


def _shift_of_all(x):
    e = np.exp(x - x.max())
    return _with(e / e.sum(-1, keepdims=True))


def _shift_by_the_mean(x):
    e = np.exp(x - x.mean(-1, keepdims=True))
    return _with(e / e.sum(-1, keepdims=True))


def _all_together(x):
    e = np.exp(x - x.max())
    y = e / e.sum()
    return y, lambda dy: y * (dy - (y * dy).sum())


def _first_axis(x):
    e = np.exp(x - x.max(0, keepdims=True))
    y = e / e.sum(0, keepdims=True)
    return y, lambda dy: y * (dy - (y * dy).sum(0, keepdims=True))


def _diagonal(x):
    y = _shifted(x)
    return y, lambda dy: y * (1 - y) * dy


def _no_sum(x):
    y = _shifted(x)
    return y, lambda dy: y * dy


def _unweighted_sum(x):
    y = _shifted(x)
    return y, lambda dy: y * (dy - dy.sum(-1, keepdims=True))


def _mean_for_sum(x):
    y = _shifted(x)
    return y, lambda dy: y * (dy - (y * dy).mean(-1, keepdims=True))


def _sum_of_all_rows(x):
    y = _shifted(x)
    return y, lambda dy: y * (dy - (y * dy).sum())


def _second_term_without_y(x):
    y = _shifted(x)
    return y, lambda dy: y * dy - (y * dy).sum(-1, keepdims=True)


def _sign(x):
    y = _shifted(x)
    return y, lambda dy: y * (dy + (y * dy).sum(-1, keepdims=True))


def _negated(x):
    y = _shifted(x)
    return y, lambda dy: y * ((y * dy).sum(-1, keepdims=True) - dy)


def _without_the_factor_y(x):
    y = _shifted(x)
    return y, lambda dy: dy - (y * dy).sum(-1, keepdims=True)


def _divided_by_the_sum_of_all(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return _with(e / e.sum())


def _of_log_softmax(x):
    y = _shifted(x)
    return y, lambda dy: dy - y * dy.sum(-1, keepdims=True)


def probe(softmax):
    x = stream(19).standard_normal((3, 4))
    far, apart = np.array([[800.0, 799.0, 2.0], [-800.0, -801.0, -800.5]]), np.array([[0.0, 0.5, 1500.0]])
    with np.errstate(all="ignore"):
        return [*results(softmax, x), *results(softmax, far), softmax(apart)[0]]


EXERCISE = Exercise(
    title="Softmax and its pullback", answer="softmax", minutes=15, chapter="10_engine",
    hint="Subtract x.max(-1, keepdims=True) before np.exp. The derivative of y_i by x_j is y_i (1 if i = j, else 0) - "
         "y_i y_j; multiply it by dy_i and sum over i.",
    solution=solution, place="minidiff/engine/ops.py softmax",
    laws=(weights_of_rows, huge_numbers, pullback_by_differences, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_no_shift, "exp overflows where x is large: subtract each row's largest number first, which changes no "
                         "weight"),
        Wrong(_shift_of_all, "it subtracts the largest number of the whole array: a row far below it becomes 0/0, so "
                             "each row needs its own"),
        Wrong(_shift_by_the_mean, "it subtracts the mean, above which a number may still be far: subtract the "
                                  "largest one, so that no exponent is above 0"),
        Wrong(_all_together, "the weights of the whole array sum to 1: those of each row should"),
        Wrong(_first_axis, "the weights sum to 1 along the first axis in place of the last"),
        Wrong(_diagonal, "the pullback has the derivatives of y_i by x_i only, y (1 - y), as for a sigmoid: each x_j "
                         "also changes all other y_i"),
        Wrong(_no_sum, "the pullback keeps the denominator constant: it depends on every x_j"),
        Wrong(_unweighted_sum, "the pullback subtracts the sum of dy in place of the sum of y dy"),
        Wrong(_mean_for_sum, "the pullback subtracts a mean of y dy in place of their sum"),
        Wrong(_sum_of_all_rows, "the pullback sums y dy over all rows: each row is a softmax of its own"),
        Wrong(_second_term_without_y, "the second term of the pullback lacks its factor y: it is y_j sum(y dy)"),
        Wrong(_sign, "the sum has the wrong sign: more weight for one number is less for the others"),
        Wrong(_negated, "the pullback has the wrong sign: it is y (dy - sum(y dy))"),
        Wrong(_without_the_factor_y, "the pullback lacks the factor y in front: it is y (dy - sum(y dy))"),
        Wrong(_divided_by_the_sum_of_all, "it divides by the sum of the whole array: each row has a sum of its own, "
                                          "sum(-1, keepdims=True)"),
        Wrong(_of_log_softmax, "this is the pullback of log(softmax)"),
    ))
