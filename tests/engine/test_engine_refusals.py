"""Every refusal of floor I, whole, and the corners of its ops: kinks, zeros, and what is not computed."""

import os
import re
import sys

import numpy as np
import pytest
from support import fake_cupy
from support.gradcheck import check_gradients

from minidiff.engine import attention, backend, blas, conv, norm, ops, parallel
from minidiff.engine.backend import check_device, device_of, to_numpy
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, no_grad
from minidiff.errors import UserError


def T(*shape, dtype=np.float32):
    return Tensor(np.zeros(shape, dtype), requires_grad=True)


def f32(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("error, sentence, call", [
    # tensors
    (TypeError, "data is a Tensor already: use it, or its .data, or .detach()", lambda: Tensor(T(2))),
    (TypeError, "requires_grad needs a floating dtype, and data is int64",
     lambda: Tensor(np.zeros(2, np.int64), requires_grad=True)),
    (TypeError, "a Tensor has no truth value: compare its .data", lambda: bool(T(1))),
    (TypeError, "a Tensor is not converted to an array implicitly, which would lose its history: use .data",
     lambda: np.asarray(T(1))),
    (RuntimeError, "backward: y depends on nothing that requires a gradient (or it was computed in no_grad)",
     lambda: Tensor(f32(1)).backward()),
    (ValueError, "backward: dy is required if y has more than one element; y is (2,)",
     lambda: ops.exp(T(2)).backward()),
    (ValueError, "backward: dy must have y's shape (2,), not (3,)", lambda: ops.exp(T(2)).backward(f32(3))),
    # ops
    (TypeError, "power takes a constant exponent; write exp(y * log(x)) for a Tensor y", lambda: T(2) ** T(2)),
    (ValueError, "matmul takes x (..., M, K) and y (..., K, N), not (2, 3) and (2, 3)", lambda: T(2, 3) @ T(2, 3)),
    (ValueError, "matmul takes x (..., M, K) and y (..., K, N), not (3,) and (3, 2)", lambda: T(3) @ T(3, 2)),
    (ValueError, "matmul takes x (..., M, K) and y (..., K, N), not (2, 3) and (3,)", lambda: T(2, 3) @ T(3)),
    (TypeError, "an op takes one dtype, not float32 and float64: convert one of them",
     lambda: T(2) + T(2, dtype=np.float64)),
    (TypeError, "a Tensor of int64 does not take the number 0.5: convert it to a floating dtype",
     lambda: Tensor(np.zeros(2, np.int64)) * 0.5),
    (ValueError, "cross_entropy takes logits (B, K) and labels (B,), not (2, 3) and (3,)",
     lambda: ops.cross_entropy(T(2, 3), np.zeros(3, int))),
    (ValueError, "cross_entropy takes logits (B, K) and labels (B,), not (2, 3, 1) and (2,)",
     lambda: ops.cross_entropy(T(2, 3, 1), np.zeros(2, int))),
    (TypeError, "cross_entropy takes labels that are whole numbers, not float64",
     lambda: ops.cross_entropy(T(2, 3), np.zeros(2))),
    (IndexError, "cross_entropy takes labels of 0..2, not 0..3", lambda: ops.cross_entropy(T(2, 3), np.array([0, 3]))),
    (IndexError, "cross_entropy takes labels of 0..2, not -1..2",
     lambda: ops.cross_entropy(T(2, 3), np.array([-1, 2]))),
    (ValueError, "p must be in [0, 1), not 1", lambda: ops.dropout(T(2), 1, np.random.default_rng(0))),
    (ValueError, "p must be in [0, 1), not -0.1", lambda: ops.dropout(T(2), -0.1, np.random.default_rng(0))),
    # convolution
    (ValueError, "convolution takes x (B, H, W, C) and w (kh, kw, C_in, C_out), not (1, 4, 4) and (3, 3, 2, 2)",
     lambda: conv.conv2d(T(1, 4, 4), T(3, 3, 2, 2))),
    (ValueError, "convolution takes x (B, H, W, C) and w (kh, kw, C_in, C_out), not (1, 4, 4, 2) and (3, 3, 2)",
     lambda: conv.conv_transpose2d(T(1, 4, 4, 2), T(3, 3, 2))),
    (ValueError, "convolution takes whole numbers stride >= 1 and padding >= 0, not 0 and 1",
     lambda: conv.conv2d(T(1, 4, 4, 2), T(3, 3, 2, 2), stride=0, padding=1)),
    (ValueError, "convolution takes whole numbers stride >= 1 and padding >= 0, not 1 and -1",
     lambda: conv.conv2d(T(1, 4, 4, 2), T(3, 3, 2, 2), padding=-1)),
    (ValueError, "convolution takes whole numbers stride >= 1 and padding >= 0, not 1.5 and 0",
     lambda: conv.conv2d(T(1, 4, 4, 2), T(3, 3, 2, 2), stride=1.5)),
    (ValueError, "convolution takes whole numbers stride >= 1 and padding >= 0, not 1 and 0.5",
     lambda: conv.conv2d(T(1, 4, 4, 2), T(3, 3, 2, 2), padding=0.5)),
    (ValueError, "convolution: bias must have shape (5,), not (2,)",
     lambda: conv.conv2d(T(1, 4, 4, 2), T(3, 3, 2, 5), T(2))),
    (ValueError, "convolution: bias must have shape (5,), not (2,)",
     lambda: conv.conv_transpose2d(T(1, 4, 4, 2), T(3, 3, 5, 2), T(2))),
    (TypeError, "an op takes one dtype, not float32 and float32 and float64: convert one of them",
     lambda: conv.conv2d(T(1, 4, 4, 2), T(3, 3, 2, 5), T(5, dtype=np.float64))),
    (ValueError, "conv2d: x has 2 channels and w (3, 3, 3, 2), (kh, kw, C_in, C_out), takes 3",
     lambda: conv.conv2d(T(1, 4, 4, 2), T(3, 3, 3, 2))),
    (ValueError, "conv2d: the kernel (3, 1) is larger than the padded image of x (1, 2, 4, 2)",
     lambda: conv.conv2d(T(1, 2, 4, 2), T(3, 1, 2, 2))),
    (ValueError, "conv2d: the kernel (1, 5) is larger than the padded image of x (1, 2, 4, 2)",
     lambda: conv.conv2d(T(1, 2, 4, 2), T(1, 5, 2, 2))),
    (ValueError, "conv2d: the kernel (5, 1) is larger than the padded image of x (1, 2, 4, 2)",
     lambda: conv.conv2d(T(1, 2, 4, 2), T(5, 1, 2, 2), padding=1)),
    (ValueError, "conv2d: the kernel (1, 5) is larger than the padded image of x (1, 4, 2, 2)",
     lambda: conv.conv2d(T(1, 4, 2, 2), T(1, 5, 2, 2), padding=1)),
    (ValueError, "conv_transpose2d: x has 2 channels and w (kh, kw, C_out, C_in) (3, 3, 2, 3) takes 3",
     lambda: conv.conv_transpose2d(T(1, 4, 4, 2), T(3, 3, 2, 3))),
    (ValueError, "conv_transpose2d: padding 2 leaves no pixel of x (1, 2, 5, 1)",
     lambda: conv.conv_transpose2d(T(1, 2, 5, 1), T(3, 3, 1, 1), padding=2)),
    (ValueError, "conv_transpose2d: padding 2 leaves no pixel of x (1, 5, 2, 1)",
     lambda: conv.conv_transpose2d(T(1, 5, 2, 1), T(3, 3, 1, 1), padding=2)),
    (ValueError, "depth_to_space: 6 channels are no multiple of 2 x 2", lambda: conv.depth_to_space(T(1, 2, 2, 6), 2)),
    (ValueError, "space_to_depth takes x (B, H, W, C) with H and W multiples of 2, not (1, 3, 4, 1)",
     lambda: conv.space_to_depth(T(1, 3, 4, 1), 2)),
    (ValueError, "average_pool takes x (B, H, W, C) with H and W multiples of 2, not (1, 4, 3, 1)",
     lambda: conv.average_pool(T(1, 4, 3, 1), 2)),
    *((ValueError, f"{f.__name__} takes x (B, H, W, C), not (4, 4)", lambda f=f: f(T(4, 4), 2))
      for f in (conv.upsample_nearest, conv.average_pool, conv.space_to_depth, conv.depth_to_space)),
    (ValueError, "upsample_nearest takes a whole number of at least 1 as factor, not 0",
     lambda: conv.upsample_nearest(T(1, 4, 4, 1), 0)),
    (ValueError, "upsample_nearest takes a whole number of at least 1 as factor, not 1.5",
     lambda: conv.upsample_nearest(T(1, 4, 4, 1), 1.5)),
    # norms, attention
    (ValueError, "group_norm: 6 channels do not divide into 4 groups",
     lambda: norm.group_norm(T(1, 2, 2, 6), 4, T(6), T(6))),
    (ValueError, "group_norm: gamma and beta must both be (6,) or (2, 6), not (6,), (2, 6)",
     lambda: norm.group_norm(T(2, 2, 2, 6), 3, T(6), T(2, 6))),
    (ValueError, "group_norm: gamma and beta must both be (6,) or (2, 6), not (5,), (5,)",
     lambda: norm.group_norm(T(2, 2, 2, 6), 3, T(5), T(5))),
    (ValueError, "layer_norm: gamma and beta must be (6,), not (6,) and (5,)",
     lambda: norm.layer_norm(T(2, 6), T(6), T(5))),
    (ValueError, "layer_norm: gamma and beta must be (6,), not (5,) and (6,)",
     lambda: norm.layer_norm(T(2, 6), T(5), T(6))),
    *((TypeError, f"an op takes one dtype, not {' and '.join(dtypes)}: convert one of them",
       lambda f=f, dtypes=dtypes: f(T(1, 2, 2, 4, dtype=dtypes[0]), *(T(4, dtype=d) for d in dtypes[1:])))
      for f in (lambda x, g, b: norm.group_norm(x, 2, g, b), norm.layer_norm)
      for dtypes in (["float64", "float32", "float32"], ["float32", "float64", "float32"],
                     ["float32", "float32", "float64"])),
    (ValueError, "attention takes q (B, h, N, d), k (B, h, M, d) and v (B, h, M, e), not (1, 1, 2, 3), (1, 1, 2, 4) "
                 "and (1, 1, 2, 3)",
     lambda: attention.scaled_dot_product_attention(T(1, 1, 2, 3), T(1, 1, 2, 4), T(1, 1, 2, 3))),
    (TypeError, "attention: mask must be boolean, True where a query may look, not float32",
     lambda: attention.scaled_dot_product_attention(T(1, 1, 2, 3), T(1, 1, 2, 3), T(1, 1, 2, 3), f32(1, 1, 1, 2))),
    *((TypeError, f"an op takes one dtype, not {' and '.join(dtypes)}: convert one of them",
       lambda dtypes=dtypes: attention.scaled_dot_product_attention(*(T(1, 1, 2, 3, dtype=d) for d in dtypes)))
      for dtypes in (["float64", "float32", "float32"], ["float32", "float64", "float32"],
                     ["float32", "float32", "float64"])),
    # arrays and devices
    (UserError, "device must be one of cpu, cuda, not 'gpu'", lambda: check_device("gpu")),
    (ValueError, "seed must be a whole number of at least 0, not -1", lambda: SampleStreams(-1, 2)),
    (ValueError, "seed must be a whole number of at least 0, not 0.5", lambda: SampleStreams(0.5, 2)),
    (ValueError, "count must be a whole number of at least 1, not 0", lambda: SampleStreams(0, 0)),
    (ValueError, "count must be a whole number of at least 1, not 1.5", lambda: SampleStreams(0, 1.5)),
    (TypeError, "add_product: x, w and y must all be float32 or float64, not float32, float64, float32",
     lambda: blas.add_product(f32(2, 4), f32(2, 3), np.zeros((3, 4)), first=True)),
    (ValueError, "add_product: x (2, 3) @ w (2, 4) does not fit y (2, 4)",
     lambda: blas.add_product(f32(2, 4), f32(2, 3), f32(2, 4), first=True)),
    (ValueError, "add_product: x (2, 3) @ w (3, 4) does not fit y (2, 3)",
     lambda: blas.add_product(f32(2, 3), f32(2, 3), f32(3, 4), first=True)),
    *((ValueError, "add_product: each row of x, w and y must be contiguous, and the rows must be in order",
       lambda x=x: blas.add_product(f32(len(x), 4), x, f32(x.shape[1], 4), first=True))
      for x in (f32(2, 6)[:, ::2], f32(2, 4)[:, ::2], f32(6, 2).T[:, :2], f32(2, 3)[::-1], f32(2, 2)[:, ::-1],
                np.broadcast_to(f32(1, 3), (2, 3)), np.broadcast_to(f32(1, 2), (2, 2)),
                np.lib.stride_tricks.sliding_window_view(f32(6), 4))),
])
def test_sentence(error, sentence, call):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()


def test_a_graph_is_walked_once_unless_it_is_kept():
    y = ops.exp(T(1))
    y.backward()
    with pytest.raises(RuntimeError, match=re.escape("backward: this graph was freed by an earlier backward; pass "
                                                     "keep_graph=True to the first") + "$"):
        y.backward()


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_add_product_takes_rows_of_any_distance(rows, columns):
    """Also of length 1, of which strides say nothing, and rows that are cut from longer ones."""
    rng = np.random.default_rng([rows, columns])
    wide = rng.normal(size=(rows, columns + 2)).astype(np.float32)
    one = np.broadcast_to(wide[0, :columns], (1, columns))          # whose row has a stride of 0
    for x in (wide[:, :columns], wide[:, :columns].copy(), wide[::2, :columns], wide[:1, :columns], one):
        w, y = rng.normal(size=(columns, 4)).astype(np.float32), np.ones((len(x), 4), np.float32)
        blas.add_product(y, x, w, first=False)
        np.testing.assert_allclose(y, 1 + x.astype(float) @ w, rtol=1e-5, atol=1e-5)
        blas.add_product(y, x, w)                                   # it adds where nothing is said
        np.testing.assert_allclose(y, 1 + 2 * (x.astype(float) @ w), rtol=1e-5, atol=1e-5)


def test_the_kinks():
    """At 0 relu and |x| take the slope 0, and x**0 has none, whatever comes back."""
    zero = T(3)
    for f in (ops.relu, ops.absolute, lambda x: x ** 0):
        assert gradients(f(zero), [zero], np.array([0, 1, -2], np.float32))[0].tolist() == [0, 0, 0]


def test_each_query_has_its_own_largest_score():
    """Scores of 10,000 for one query and of -9,000 for another: neither overflows, and neither is lost."""
    q, k = (Tensor(np.array(rows).reshape(1, 1, 2, 1)) for rows in ([100.0, -100.0], [100.0, 90.0]))
    v = Tensor(np.array([1.0, 2.0]).reshape(1, 1, 2, 1))
    assert attention.scaled_dot_product_attention(q, k, v).data.ravel().tolist() == [1.0, 2.0]


def test_what_needs_no_gradient_is_not_computed():
    """Only the parents that ask for one are handed a cotangent."""
    x, w, b = T(1, 4, 4, 2), T(3, 3, 2, 5), T(5)
    for i, frozen in enumerate((x, w)):
        frozen.requires_grad = False
        for y in (conv.conv2d(x, w, b), conv.conv_transpose2d(x, Tensor(w.data.swapaxes(2, 3), i == 0), T(5))):
            assert [dx is None for dx in y._pullback(np.ones_like(y.data))] == [i == 0, i == 1, False]
        frozen.requires_grad = True
    for f in (ops.mul, ops.div, ops.matmul):
        for i in range(2):
            pair = [Tensor(np.ones((2, 2), np.float32), requires_grad=i == j) for j in range(2)]
            y = f(*pair)
            assert [dx is None for dx in y._pullback(y.data)] == [i == 1, i == 0]


def test_defaults_are_the_plainest():
    """Stride 1, no padding, no bias, a factor of 2, sums without the axis: as said where they are left out."""
    rng = np.random.default_rng(5)
    x, w = (Tensor(rng.normal(size=shape), requires_grad=True) for shape in ((1, 4, 4, 2), (3, 3, 2, 2)))
    for f in (conv.conv2d, conv.conv_transpose2d):
        plain, said = f(x, w), f(x, w, None, 1, 0)
        assert (plain.data == said.data).all() and plain.shape[1] == (2 if f is conv.conv2d else 6)
        for a, b in zip(gradients(plain, [x, w], said.data), gradients(said, [x, w], said.data), strict=True):
            assert (a == b).all() and a.any()
    assert conv.upsample_nearest(x).shape == (1, 8, 8, 2) and conv.average_pool(x).shape == (1, 2, 2, 2)
    assert conv.space_to_depth(x).shape == (1, 2, 2, 8)
    for f in (ops.sum, ops.mean):
        assert f(x).shape == () and f(x, 3).shape == (1, 4, 4) and f(x, 3, True).shape == (1, 4, 4, 1)


def test_a_transposed_convolution_of_single_pixels_changes_the_channels():
    x, w = T(1, 2, 3, 5), T(1, 1, 4, 5)
    assert conv.conv_transpose2d(x, w).shape == (1, 2, 3, 4)


@pytest.mark.parametrize("stride, padding", [(2, 0), (1, 1), (3, 2)])
def test_single_pixel_kernels_with_strides_and_padding(stride, padding):
    """Their shortcut is for stride 1 without padding; elsewhere they are convolutions like any other."""
    rng = np.random.default_rng([stride, padding])
    x, w = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(1, 1, 3, 2))
    check_gradients(lambda x, w: conv.conv2d(x, w, None, stride, padding), x, w)
    check_gradients(lambda x, w: conv.conv_transpose2d(x, w, None, stride, padding), x, rng.normal(size=(1, 1, 2, 3)))


def test_every_sample_is_in_one_shard(monkeypatch):
    """parallel_gradients hands out slices that cover the batch once: a mean alone would not tell."""
    asked, leaf = [], T(3)

    def loss(part):
        asked.append((part.start, part.stop))
        return ops.sum(leaf)

    parallel.parallel_gradients(loss, [leaf], 70)
    assert sorted(asked) == [(s.start, s.stop) for s in parallel.shards(70)]


def test_streams_are_numpys_own_generators():
    """Row i is default_rng([seed, i]) drawn in the asked-for dtype; half precision is rounded from single."""
    rows = {dtype: np.stack([np.random.default_rng([7, i]).standard_normal((5,), dtype=dtype) for i in range(3)])
            for dtype in (np.float32, np.float64)}
    assert (SampleStreams(7, 3).normal((5,)) == rows[np.float32]).all()
    assert (SampleStreams(7, 3).normal((5,), np.float64) == rows[np.float64]).all()
    half = SampleStreams(7, 3).normal((5,), np.float16)
    assert half.dtype == np.float16 and (half == rows[np.float32].astype(np.float16)).all()


def test_dropout_draws_single_precision():
    x, p = Tensor(np.ones((4, 5))), 0.4
    kept = np.random.default_rng(3).random((4, 5), dtype=np.float32) >= p
    assert np.allclose(ops.dropout(x, p, np.random.default_rng(3)).data, kept / 0.6)
    assert ops.dropout(x, 0, np.random.default_rng(3)) is x and ops.dropout(x, p, None) is x


def test_what_is_no_array_yet():
    assert to_numpy([1, 2]).tolist() == [1, 2] and device_of(np.zeros(1)) == "cpu"
    a = np.zeros(2)
    assert to_numpy(a) is a


def test_a_tensor_shows_what_it_is():
    assert repr(Tensor([1.0])) == "Tensor(array([1.], dtype=float32))"
    assert repr(Tensor([1.0], requires_grad=True)) == "Tensor(array([1.], dtype=float32), requires_grad=True)"
    assert len(T(3, 2)) == 3 and T(3, 2).ndim == 2 and T(3, 2).size == 6


def test_no_grad_ends_with_its_block():
    x = T(1)
    with no_grad():
        with no_grad():
            pass
        assert not ops.exp(x).requires_grad
    assert ops.exp(x).requires_grad


# ---- the machine -------------------------------------------------------------------------------------------

def test_a_gpu_that_is_not_to_be_had(monkeypatch):
    def sentence():
        with pytest.raises(UserError) as raised:
            check_device("cuda")
        return str(raised.value)

    monkeypatch.setitem(sys.modules, "cupy", None)
    assert sentence() == ("device 'cuda' needs CuPy, which is not installed: pip install 'cupy-cuda13x[ctk]', or "
                          "cupy-cuda12x, or use --device cpu")

    class Broken:                                           # CuPy is there, a library that it loads is not
        def find_spec(self, name, *_):
            if name == "cupy":
                raise ImportError("libcublas.so.13: cannot open shared object file")
    monkeypatch.delitem(sys.modules, "cupy")
    with monkeypatch.context() as broken:
        broken.setattr(sys, "meta_path", [Broken()])
        assert sentence() == ("device 'cuda' needs CuPy, which is installed and cannot be loaded (libcublas.so.13: "
                              "cannot open shared object file): use --device cpu")
    cupy = fake_cupy.install(monkeypatch, gpus=0)
    assert sentence() == "device 'cuda' needs an NVIDIA GPU, and none was found: use --device cpu"

    def no_driver():
        raise cupy.cuda.runtime.CUDARuntimeError("no driver")

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", no_driver)
    assert sentence() == "device 'cuda' needs an NVIDIA GPU and its driver (no driver): use --device cpu"
    fake_cupy.install(monkeypatch, gpus=1)
    check_device("cuda")


class Libc:
    """A C library that grants so many of the calls to mallopt, and writes down all of them."""

    def __init__(self, *grants):
        self.grants, self.calls = list(grants), []

    def mallopt(self, *call):
        self.calls.append(call)
        return self.grants.pop(0)


@pytest.mark.parametrize("grants, kept", [((1, 1, 1), True), ((1, 1, 0, 1), True), ((1, 1, 0, 0), False),
                                          ((1, 0), False), ((0,), False)])
def test_keep_freed_memory_asks_glibc(monkeypatch, grants, kept):
    """In malloc.h M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD -3 and M_ARENA_MAX -8.

    Before 2.35 glibc takes 32 MiB at most for the second.
    """
    libc, opened = Libc(*grants), []
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: opened.append(name) or libc)
    assert backend.keep_freed_memory() is kept and opened == [None]
    assert libc.calls == [(-1, 2**31 - 1), (-8, 1), (-3, 2**31 - 1), (-3, 32 * 2**20)][:len(grants)]


def test_keep_freed_memory_where_there_is_no_mallopt(monkeypatch):
    monkeypatch.setattr(backend.ctypes, "CDLL", lambda name: object())
    assert backend.keep_freed_memory() is False


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7} if process == 0 else {1}, raising=False)
    assert parallel.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert parallel.cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert parallel.cores() == 1
