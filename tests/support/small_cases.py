"""The benchmarks' cases, small enough for a CPU."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cases  # noqa: E402

SMALL = [cases.Conv("", op, 2, 6, 5, 3, k, stride) for op in ("forward", "fused", "dx", "dw")
         for k, stride in ((3, 1), (1, 1), (3, 2))]
SMALL += [cases.Attention("", op, 3, 2, 5, 4, 8) for op in ("forward", "backward")]
SMALL += [cases.GroupNorm("", op, 3, 9, 8, 2) for op in ("forward", "backward")]
SMALL += [cases.LayerNorm("", op, 5, 7) for op in ("forward", "backward")]


def name_of(case) -> str:
    return f"{case.family} {case.op} {case.shape}"


def host_inputs(case, monkeypatch, dtype=np.float64) -> tuple:
    """A case's inputs as NumPy's arrays."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(cases, "random_arrays",
                        lambda mode, *shapes: tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes))
    return case.inputs("float32")
