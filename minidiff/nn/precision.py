"""Mixed precision: the network computes in half precision, and learns in float32 (Micikevicius et al. 2018).

    w                  float32: the master weights, their moments and their average       section 3.1
    w~ = half(w)       what the network computes with; dL/dw = float32(dL/dw~)
    S L                the loss, float32, grows by S before its way back                  section 3.2
    g = dL/dw = (d(S L)/dw) / S

float16 ends at 65504 and rounds what is below 6e-8 to 0, where many gradients are: hence S, as large as does no
harm.  A step whose gradient overflows is left out, and S halved; after 2000 good steps it is doubled.  bfloat16 has
float32's range and needs no S, but only 8 bits: 1 + 1/256 is 1.  Sums, norms, softmax and the loss are float32's.
"""

from __future__ import annotations

import copy

import numpy as np

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.module import Module

PRECISIONS = ("float32", "float16", "bfloat16")


def dtype_of(precision: str) -> np.dtype:
    """The dtype that a network of this precision computes in; UserError where it is not to be had."""
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if precision != "bfloat16":
        return np.dtype(precision)
    try:
        import ml_dtypes  # NumPy's and CuPy's bfloat16
    except ImportError:
        raise UserError("precision bfloat16 needs the package ml_dtypes, which is not installed: "
                        "pip install ml_dtypes, or use float16") from None
    return np.dtype(ml_dtypes.bfloat16)


def in_precision(module: Module, dtype) -> Module:
    """The module, computing in dtype: a copy whose parameters are casts of its own, which gradients pass through."""
    if all(p.dtype == dtype for p in module.parameters().values()):
        return module

    def twin_of(part):
        if isinstance(part, Tensor):
            return ops.cast(part, dtype)
        if isinstance(part, (list, tuple)):
            return type(part)(map(twin_of, part))
        if not isinstance(part, Module):
            return part
        twin = copy.copy(part)
        vars(twin).update({name: twin_of(value) for name, value in vars(part).items()})
        return twin
    return twin_of(module)


class LossScale:
    """S, found while training: halved by a gradient that overflows, doubled by `patience` steps without one.

    With start 1 it stays 1: a gradient that is not finite then is no overflow to be cured.
    """

    def __init__(self, start: float = 2.0**15, patience: int = 2000):
        self.scale, self.patience, self.fixed = start, patience, start == 1
        self.good = 0                                       # steps since S last changed
        self.skipped = 0                                    # steps left out, in all

    @classmethod
    def of(cls, precision: str) -> LossScale:
        return cls() if precision == "float16" else cls(1.0)

    def bears(self, finite: bool) -> bool:
        """Whether training can go on from a step whose gradient was finite, or not."""
        return finite or self.scale > 1

    def update(self, finite: bool) -> None:
        if self.fixed:
            return
        if not finite:
            self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
        elif self.good + 1 == self.patience:
            self.scale, self.good = self.scale * 2, 0
        else:
            self.good += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        """Nothing, where S stays 1."""
        return {} if self.fixed else {"scale": np.array(self.scale), "good": np.array(self.good, dtype=np.int64),
                                      "skipped": np.array(self.skipped, dtype=np.int64)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        if not self.fixed:
            self.scale = float(state["scale"])
            self.good, self.skipped = int(state["good"]), int(state["skipped"])
