"""Gradient clipping, AdamW and the moving average of all parameters in three launches, without waiting for the host.

    square_sums  ->  decide  ->  adamw                      kernels/adamw_*.cu

The state is kept on the device: the loss scale, the good steps since its last change, the skipped steps, and whether a
step failed.  More parameters than one launch takes are divided into parts, each with its own first and last launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from minidiff.engine.cuda import launch as cuda

SCALE, GOOD, SKIPPED, FAILED, NORM = range(5)               # the places of the state's numbers, as in the kernel


class FusedAdamW:
    """The update of parameters of given shapes.  The caller keeps the arrays of parameters and moments."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype=np.float32, *, patience: int = 0,
                 most: float = math.inf, version: int | None = None):
        """patience: the number of good steps after which the loss scale is doubled, up to `most`; 0: never."""
        import cupy
        dtype = np.dtype(dtype)
        source = cuda.pick("adamw", dtype.name, version)
        self._square_sums, self._decide, self._adamw = (
            cuda.kernel(source, name, dtype.name) for name in ("square_sums", "decide", "adamw"))
        self._threads, self._shapes, self._dtype = source.constants["THREADS"], tuple(shapes), dtype
        self._patience, self._most = patience, most
        at_once, chunk = source.constants["MOST"], source.constants["CHUNK"]
        self._parts = [Part(shapes[i:i + at_once], slice(i, i + at_once), chunk, at_once)
                       for i in range(0, len(shapes), at_once)]
        self._partial = cupy.empty(sum(part.blocks for part in self._parts), dtype)
        self._step = cupy.empty(5, dtype)
        self.set_state()

    def set_state(self, scale: float = 1.0, good: int = 0, skipped: int = 0) -> None:
        import cupy
        self.state = cupy.asarray(np.array([scale, good, skipped, 0, 0], self._dtype))

    @property
    def scale(self):
        """The loss scale, on the device: the factor of the loss whose gradients are computed."""
        return self.state[SCALE]

    def __call__(self, w: Sequence, g: Sequence, m: Sequence, v: Sequence, average: Sequence, loss, *, number: int,
                 lr: float, clip: float, b1: float, b2: float, eps: float, decay: float, ema: float) -> None:
        """Step `number` of the run, counted from 1.

        w, g, m, v, average: lists of arrays; g are the gradients of the scaled loss.  loss: an array of shape ().
        """
        import cupy
        g = [a if a.flags.c_contiguous else cupy.ascontiguousarray(a) for a in g]
        for arrays in (w, g, m, v, average):
            self._check(arrays)
        tables = [(part.gradients(g), part.table(w, m, v, average)) for part in self._parts]
        first = 0
        for part, (gradients, _) in zip(self._parts, tables, strict=True):
            self._square_sums(part.blocks, self._threads, gradients, part.lengths, part.chunks,
                              self._partial[first:first + part.blocks])
            first += part.blocks
        self._decide(1, self._threads, loss, self._partial, self.state, self._step, len(self._partial), number,
                     self._patience, self._most, clip, lr, b1, b2, ema)
        for part, (gradients, table) in zip(self._parts, tables, strict=True):
            self._adamw(part.blocks, self._threads, gradients, table, part.lengths, part.chunks, part.decays,
                        self._step, part.count, b1, 1 - b1, b2, 1 - b2, eps, 1 - lr * decay)

    def _check(self, arrays: Sequence) -> None:
        """Checks the arrays behind the pointers, which the check of the signature does not see."""
        for a, shape in zip(arrays, self._shapes, strict=True):
            if a.shape != shape or a.dtype != self._dtype or not a.flags.c_contiguous:
                raise TypeError(f"the update takes contiguous arrays of {self._dtype}, here of shape {shape}, "
                                f"not {a.dtype} {a.shape}")


class Part:
    """The parameters of one launch, and what the kernels read of them: lengths, chunks, tables of pointers."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], which: slice, chunk: int, most: int):
        """which: of all parameters.  chunk: numbers of a block.  most: parameters that a launch takes."""
        import cupy
        lengths = [math.prod(shape) for shape in shapes]
        chunks = np.array([(p, first) for p, n in enumerate(lengths) for first in range(0, n, chunk)], np.int32)
        self.which, self.most, self.count, self.blocks = which, most, len(shapes), len(chunks)
        self.lengths, self.chunks = cupy.asarray(np.array(lengths, np.int32)), cupy.asarray(chunks.reshape(-1, 2))
        self.decays = cupy.asarray(np.array([len(shape) > 1 for shape in shapes], np.uint8))
        self._pointers, self._table = None, None

    def gradients(self, g: Sequence) -> np.ndarray:
        """Their pointers, for an argument by value: each step's gradients are new arrays."""
        return cuda.table([a.data.ptr for a in g[self.which]], self.most)

    def table(self, *lists: Sequence):
        """The pointers of the other arrays, on the device.  They are copied there only if an array was replaced."""
        import cupy
        pointers = [a.data.ptr for arrays in lists for a in arrays[self.which]]
        if pointers != self._pointers:
            self._pointers, self._table = pointers, cupy.asarray(np.array(pointers, np.uint64))
        return self._table
