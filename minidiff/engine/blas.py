"""A routine of BLAS that NumPy does not offer: a matrix product added in place, y += x w.

SciPy exports the functions of its BLAS (scipy.linalg.cython_blas), and ctypes calls them.  `scipy.linalg.blas.sgemm`
computes the same, but it holds Python's global lock meanwhile, so two threads could not convolve at the same time; a
call through ctypes releases the lock.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np

_INT = ctypes.c_int
_REAL = {np.dtype(np.float32): (ctypes.c_float, "sgemm"), np.dtype(np.float64): (ctypes.c_double, "dgemm")}


def add_product(y, x, w, *, first: bool = False) -> None:
    """y += x @ w in place; y = x @ w if first.

    x (M, K), w (K, N), y (M, N): one dtype, float32 or float64.  The numbers of each row lie side by side in memory.
    """
    (M, K), N = x.shape, w.shape[1]
    if y.dtype not in _REAL or x.dtype != y.dtype or w.dtype != y.dtype:
        raise TypeError(f"add_product: x, w and y must all be float32 or float64, not {x.dtype}, {w.dtype}, {y.dtype}")
    if not all(map(_has_contiguous_rows, (x, w, y))):
        raise ValueError("add_product: each row of x, w and y must be contiguous, and the rows must be in order")
    if w.shape[0] != K or y.shape != (M, N):
        raise ValueError(f"add_product: x {x.shape} @ w {w.shape} does not fit y {y.shape}")
    real, gemm = _REAL[y.dtype][0], _gemm(y.dtype)
    # BLAS expects Fortran's order, in which it reads a row-major matrix as the transpose:  y^T <- w^T x^T + beta y^T
    no, M, N, K = b"N", _INT(M), _INT(N), _INT(K)           # "N": not transposed
    gemm(no, no, N, M, K, real(1), w.ctypes.data, _row(w), x.ctypes.data, _row(x), real(0 if first else 1),
         y.ctypes.data, _row(y))


def _has_contiguous_rows(a) -> bool:
    (rows, columns), (row, element) = a.shape, a.strides    # a stride along an axis of length 1 means nothing
    return (columns <= 1 or element == a.itemsize) and (rows <= 1 or row >= columns * a.itemsize)


def _row(a):
    """The distance from one row to the next, in elements."""
    return _INT(max(a.strides[0] // a.itemsize if len(a) > 1 else a.shape[1], 1))


@cache
def _gemm(dtype):
    """gemm(transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc), all by reference."""
    from scipy.linalg import cython_blas
    real, name = _REAL[dtype]
    capsule = cython_blas.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    if b"int *" not in api.PyCapsule_GetName(capsule):
        raise ImportError("this SciPy's BLAS does not take C ints as sizes; minidiff needs a SciPy from PyPI or conda")
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    P, text, array = ctypes.POINTER, ctypes.c_char_p, ctypes.c_void_p
    return ctypes.CFUNCTYPE(None, text, text, P(_INT), P(_INT), P(_INT), P(real), array, P(_INT), array,
                            P(_INT), P(real), array, P(_INT))(address)
