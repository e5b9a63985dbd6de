"""Mixed precision: a network computes in half precision and learns in float32 (Micikevicius et al. 2018).

    w                  float32: the master weights, their moments and their average       section 3.1
    w~ = half(w)       the weights that the network computes with; dL/dw = float32(dL/dw~)
    S L                the loss, in float32, is multiplied by S before the backward pass  section 3.2
    g = dL/dw = (d(S L)/dw) / S

float16 ends at 65504 and rounds numbers below 6e-8 to 0, and many gradients are that small.  S lifts them, as far as
no gradient overflows: a step whose gradient overflows is skipped and S is halved; after 2000 good steps in a row S is
doubled.  bfloat16 has float32's range and needs no S, but it has only 8 significant bits: 1 + 1/256 rounds to 1.
Sums, norms and softmax are computed in float32, and so is the loss:

    y = as_float32(network(as_input(network, x)))           the network in its own dtype, the loss in float32
"""

from __future__ import annotations

import copy

import numpy as np

from minidiff.checks import one_of
from minidiff.engine import ops
from minidiff.engine.backend import is_half, to_device
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.module import Module

PRECISIONS = ("float32", "float16", "bfloat16")


def dtype_of(precision: str) -> np.dtype:
    """The dtype that a network of this precision computes in; UserError if it is unknown or unavailable."""
    one_of("precision", precision, PRECISIONS, UserError)
    if precision != "bfloat16":
        return np.dtype(precision)
    try:
        import ml_dtypes  # NumPy's and CuPy's bfloat16
    except ImportError:
        raise UserError("precision bfloat16 needs the package ml_dtypes, which is not installed: "
                        "pip install ml_dtypes, or use float16") from None
    return np.dtype(ml_dtypes.bfloat16)


def in_precision(module: Module, dtype) -> Module:
    """A copy of the module that computes in dtype: its parameters are casts of the module's own.

    A gradient passes through the casts, so that it reaches the module's own parameters, in their dtype.  On a GPU one
    launch casts them all.
    """
    parameters = list(module.parameters().values())
    if all(p.dtype == dtype for p in parameters):
        return module
    casts = ops.casts_on_gpu(parameters, dtype)

    def twin_of(part):
        if isinstance(part, Tensor):
            return casts[id(part)] if id(part) in casts else ops.cast(part, dtype)
        if isinstance(part, (list, tuple)):
            return type(part)(map(twin_of, part))
        if not isinstance(part, Module):
            return part
        twin = copy.copy(part)
        vars(twin).update({name: twin_of(value) for name, value in vars(part).items()})
        return twin
    return twin_of(module)


def as_input(module: Module, x) -> Tensor:
    """x, an array or a Tensor of a floating dtype, as a Tensor of the module's dtype, for the module to compute with.

    An array is also moved to the module's device.  A Tensor keeps its gradient.
    """
    x = x if isinstance(x, Tensor) else Tensor(to_device(x, module.device))
    return ops.cast(x, module.dtype)


def as_float32(y: Tensor) -> Tensor:
    """A half-precision result as float32, for a loss to compute with; float32 and float64 stay as they are."""
    return ops.cast(y, np.float32) if is_half(y.dtype) else y


class LossScale:
    """The factor S.  A gradient that overflows halves it; `patience` steps in a row without overflow double it.

    With start 1 it stays 1.  A gradient that is not finite then has another cause than overflow.
    """

    MOST = 2.0**60                                          # where gradients are 0, S would grow without end

    def __init__(self, start: float = 2.0**15, patience: int = 2000):
        self.scale, self.patience, self.fixed = start, patience, start == 1
        self.good = 0                                       # steps since S last changed
        self.skipped = 0                                    # steps skipped, in all

    @classmethod
    def of(cls, precision: str) -> LossScale:
        return cls() if precision == "float16" else cls(1.0)

    def can_continue(self, finite: bool) -> bool:
        """Whether training can continue after a step whose gradient was, or was not, finite."""
        return finite or self.scale > 1

    def update(self, finite: bool) -> None:
        if self.fixed:
            return
        if not finite:
            self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
        elif self.good + 1 == self.patience:
            self.scale, self.good = min(self.scale * 2, self.MOST), 0
        else:
            self.good += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        """Empty if S stays 1."""
        return {} if self.fixed else {"scale": np.array(self.scale), "good": np.array(self.good, dtype=np.int64),
                                      "skipped": np.array(self.skipped, dtype=np.int64)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if not self.fixed:
            scale, good, skipped = float(state["scale"]), int(state["good"]), int(state["skipped"])
            self.scale, self.good, self.skipped = scale, good, skipped
