"""The divergence of Gaussians whose means and variances are learned: the term that variational bounds are made of.

    KL(N(mean1, var1) || N(mean2, var2)) = (var1/var2 - 1 - log(var1/var2) + (mean1 - mean2)^2 / var2) / 2

Variances come as logarithms, which a network may give freely. diffusion/gaussian.py has the same of plain arrays.
"""

from __future__ import annotations

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor


def kl(mean1, log_var1, mean2, log_var2) -> Tensor:
    """In nats, elementwise; Tensors or arrays of one dtype, whose shapes broadcast; at least one is a Tensor."""
    d, log_ratio = _tensor(mean1) - mean2, _tensor(log_var1) - log_var2
    return 0.5 * (ops.exp(log_ratio) - 1 - log_ratio + d * d * ops.exp(-_tensor(log_var2)))


def _tensor(a) -> Tensor:
    return a if isinstance(a, Tensor) else Tensor(a)
