"""Exercise 19: softmax and its pullback.  15 minutes, chapter docs/course/10_engine.md.

Softmax turns the numbers of a row into weights: positive, of sum 1, and larger where the number is larger.

    y_i = e^{x_i} / sum_k e^{x_k}

Its pullback takes the cotangent of y, dy = dL/dy, to that of x.  By the chain rule, dx_j is the sum over i of dy_i
times the derivative of y_i by x_j.  (The chapter derives it.  Try it first on paper.)

In float64, e^710 is too large a number.  A row that is shifted by a constant has the same softmax: use that.

    minidiff check ex19
"""

from collections.abc import Callable

import numpy as np


def softmax(x: np.ndarray) -> tuple[np.ndarray, Callable]:
    """The softmax of each row, and its pullback.

    x: (..., n), any finite numbers.  A row is what lies along the last axis.
    Returns (y, pullback).  y: of x's shape and dtype.  pullback: a function dy -> dx, both of that shape and dtype.
    """
    raise NotImplementedError("your code here")
