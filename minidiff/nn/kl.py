"""The KL divergence between Gaussians whose means and variances are learned, as in a variational bound
(docs/glossary.md).

    KL(N(mean1, var1) || N(mean2, var2)) = (var1/var2 - 1 - log(var1/var2) + (mean1 - mean2)^2 / var2) / 2

Variances are given as logarithms, which may be any number, so that a network can output them.  Kingma & Welling 2014,
appendix B, derive it for N(0, I).  This is the form with gradients; diffusion/gaussian.py has the same formula for
plain arrays.
"""

from __future__ import annotations

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor
from minidiff.nn.precision import as_float32


def kl(mean1, log_var1, mean2, log_var2) -> Tensor:
    """The divergence in nats (docs/glossary.md), elementwise.

    Each argument is a Tensor or an array; they have one dtype, and shapes that broadcast.  Half precision is computed
    in float32, and so is the result.
    """
    mean1, log_var1, mean2, log_var2 = map(_tensor, (mean1, log_var1, mean2, log_var2))
    # e^x - 1 - x by expm1, which keeps its digits near 0; the square last, so that a small variance is not infinite
    log_ratio, d = log_var1 - log_var2, (mean1 - mean2) * ops.exp(-0.5 * log_var2)
    return 0.5 * (ops.expm1(log_ratio) - log_ratio + d * d)


def _tensor(a) -> Tensor:
    return as_float32(a if isinstance(a, Tensor) else Tensor(a))
