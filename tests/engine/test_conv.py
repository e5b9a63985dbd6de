"""Convolution compared with SciPy and with loops, the fast algorithms with the plain one, and changes of resolution."""

import tracemalloc

import numpy as np
import pytest
import scipy.signal
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.gradcheck import check_gradients
from support.refusals import check_message, zeros

from minidiff.engine import conv, conv_blocks, conv_shift, conv_winograd
from minidiff.engine.tensor import Tensor, gradients, no_grad, recording

few = settings(deadline=None, max_examples=25)
small = st.integers(1, 3)
kernels = st.sampled_from([1, 2, 3, 5])


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(found, expected, rtol=1e-12):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert np.abs(found - expected).max() <= rtol * max(np.abs(expected).max(), 1e-3)


def by_scipy(x, w, stride, padding):
    """One image and one pair of channels at a time: every shift, then every stride-th row and column."""
    p = padding
    x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    return np.array([[sum(scipy.signal.correlate(image[..., c], w[..., c, d], mode="valid", method="direct")
                          for c in range(w.shape[2]))[::stride, ::stride] for d in range(w.shape[3])]
                     for image in x]).transpose(0, 2, 3, 1)


def transposed_by_loops(x, w, stride, padding, shape):
    """Each pixel adds the kernel, times its value, to the result; then the padding is removed."""
    (B, H, W, _), (kh, kw, _, _), p = x.shape, w.shape, padding
    y = np.zeros((B, (H - 1) * stride + kh, (W - 1) * stride + kw, w.shape[2]))
    for b, i, j in np.ndindex(B, H, W):
        y[b, i * stride:i * stride + kh, j * stride:j * stride + kw] += w @ x[b, i, j]
    return y[:, p:p + shape[1], p:p + shape[2]]


@st.composite
def convolutions(draw, most=7):
    """x, w, stride, padding that fit together, on images of all shapes, square and not."""
    kh, kw, stride, padding = draw(kernels), draw(kernels), draw(small), draw(st.integers(0, 3))
    H, W = (draw(st.integers(max(1, k - 2 * padding), max(most, k))) for k in (kh, kw))
    C, D = draw(small), draw(small)
    return normal(draw(st.integers(1, 2)), H, W, C), normal(kh, kw, C, D, seed=1), stride, padding


# ---- against independent calculations --------------------------------------------------------------------


@settings(few, max_examples=60)
@given(convolutions(most=13))
def test_conv2d_is_scipys_correlation(drawn):
    x, w, stride, padding = drawn
    bias = normal(w.shape[3], seed=2)
    y = conv.conv2d(Tensor(x), Tensor(w), Tensor(bias), stride, padding)
    close(y.data, by_scipy(x, w, stride, padding) + bias)


@settings(few, max_examples=40)
@given(convolutions())
def test_conv_transpose2d_stamps_the_kernel(drawn):
    x, w, stride, padding = drawn
    w, bias = np.ascontiguousarray(w.swapaxes(2, 3)), normal(w.shape[3], seed=2)        # (kh, kw, C_out, C_in)
    size = [(n - 1) * stride + k - 2 * padding for n, k in zip(x.shape[1:3], w.shape[:2], strict=True)]
    assume(min(size) >= 1)
    y = conv.conv_transpose2d(Tensor(x), Tensor(w), Tensor(bias), stride, padding)
    close(y.data, transposed_by_loops(x, w, stride, padding, y.shape) + bias)
    assert y.shape[1:3] == tuple(size)


# ---- gradients -------------------------------------------------------------------------------------------


@settings(few, max_examples=20)
@given(convolutions(most=5))
def test_gradients_of_conv2d(drawn):
    x, w, stride, padding = drawn
    check_gradients(lambda x, w, b: conv.conv2d(x, w, b, stride, padding), x[:1], w, normal(w.shape[3], seed=2))


@settings(few, max_examples=20)
@given(convolutions(most=4))
def test_gradients_of_conv_transpose2d(drawn):
    x, w, stride, padding = drawn
    size = [(n - 1) * stride + k - 2 * padding for n, k in zip(x.shape[1:3], w.shape[:2], strict=True)]
    assume(min(size) >= 1)
    check_gradients(lambda x, w, b: conv.conv_transpose2d(x, w, b, stride, padding),
                    x[:1], w.swapaxes(2, 3).copy(), normal(w.shape[3], seed=2))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(7, 7), (9, 11), (10, 10), (12, 9), (1, 100), (101, 1), (13, 8), (3, 40), (41, 3)])
def test_gradients_where_one_form_takes_over_from_another(size, k):
    """Just below and above the sizes at which conv changes its algorithm, with every padding that has a result."""
    for padding in range(k + 1):
        if min(size) + 2 * padding >= k:
            check_gradients(lambda x, w, b, p=padding: conv.conv2d(x, w, b, 1, p),
                            normal(2, *size, 3), normal(k, k, 3, 2, seed=1), normal(2, seed=2), directions=2)


@pytest.mark.parametrize("op", [conv.conv2d, conv.conv_transpose2d])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_gradient_to_one_alone_is_that_to_all(op, k):
    arrays = normal(2, 11, 12, 4), normal(k, k, 4, 4, seed=1), normal(4, seed=2)
    wanted = [Tensor(a, requires_grad=True) for a in arrays]
    y = op(*wanted)
    dy = normal(*y.shape, seed=3)
    for i, dx in enumerate(gradients(y, wanted, dy)):
        leaves = [Tensor(a, requires_grad=i == j) for j, a in enumerate(arrays)]
        alone, = gradients(op(*leaves), [leaves[i]], dy)
        assert dx.any() and np.array_equal(alone, dx)


@pytest.mark.parametrize("size, C, D", [((7, 7), 32, 33), ((9, 11), 33, 32), ((10, 10), 64, 65), ((12, 9), 100, 32)])
def test_gradients_with_many_channels(size, C, D):
    check_gradients(lambda x, w, b: conv.conv2d(x, w, b, padding=1),
                    normal(1, *size, C), normal(3, 3, C, D, seed=1), normal(D, seed=2), directions=2)


# ---- the fast forms against the plain one ----------------------------------------------------------------


@st.composite
def stride_1(draw, k=None):
    k = k or draw(st.sampled_from([2, 3, 4, 5]))
    padding = draw(st.integers(0, k - 1))
    H, W = (draw(st.integers(max(1, k - 2 * padding), 14)) for _ in range(2))
    C, D, B = draw(small), draw(small), draw(small)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    x, w = normal(B, H, W, C, dtype=dtype), normal(k, k, C, D, seed=1, dtype=dtype)
    dy = normal(B, H + 2 * padding - k + 1, W + 2 * padding - k + 1, D, seed=2, dtype=dtype)
    return x, w, dy, padding


@settings(few, max_examples=60)
@given(stride_1())
def test_shifts_are_the_plain_form(drawn):
    x, w, dy, padding = drawn
    rtol = 1e-5 if x.dtype == np.float32 else 1e-13
    close(conv_shift.correlate(x, w, padding), conv.plain_correlate(x, w, 1, padding), rtol)
    close(conv_shift.correlate_dw(x, dy, w.shape, padding), conv.plain_correlate_dw(x, dy, w.shape, 1, padding), rtol)


@settings(few, max_examples=60)
@given(stride_1(k=3))
def test_winograd_is_the_plain_form(drawn):
    """To 1e-4 in float32, since its transforms cost a digit."""
    x, w, dy, padding = drawn
    rtol = 1e-4 if x.dtype == np.float32 else 1e-12
    close(conv_winograd.correlate(x, w, padding), conv.plain_correlate(x, w, 1, padding), rtol)
    close(conv_winograd.correlate_dw(x, dy, w.shape, padding),
          conv.plain_correlate_dw(x, dy, w.shape, 1, padding), rtol)


@settings(few, max_examples=60)
@given(stride_1(k=3), st.integers(1, 6), st.integers(1, 5), st.booleans(), st.booleans())
def test_blocks_are_the_plain_form(drawn, block, group, whole, biased):
    """Blocks of all sizes, whole and cut off at the edges, in groups that begin in one image and end in the next."""
    x, w, dy, padding = drawn
    rtol = 1e-4 if x.dtype == np.float32 else 1e-12
    bias = normal(w.shape[3], seed=5, dtype=x.dtype) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        in_blocks(patch, block, group, whole)
        y = conv_blocks.correlate(x, w, padding, bias)
    close(y, conv.plain_correlate(x, w, 1, padding) + (bias if biased else 0), rtol)
    close(conv_blocks.correlate_dw(x, dy, w.shape, padding), conv.plain_correlate_dw(x, dy, w.shape, 1, padding),
          1e-5 if x.dtype == np.float32 else 1e-13)


def in_blocks(patch, block: int, group: int, whole: bool) -> None:
    """Blocks of this size, groups of so many, or all of an image at once."""
    for name, value in (("BLOCK", block), ("BLOCK_OF_LONG", block), ("GROUP", group), ("WHOLE", 2**23 if whole else 0)):
        patch.setattr(conv_blocks, name, value)


@settings(few, max_examples=60)
@given(st.tuples(st.integers(1, 2), st.integers(2, 9), st.integers(2, 9)), st.integers(1, 8), st.integers(1, 5),
       st.booleans(), st.sampled_from([np.float32, np.float64]))
def test_an_upsampled_image_by_blocks_is_the_plain_form_of_its_copies(shape, block, group, whole, dtype):
    """Blocks that begin and end anywhere, in images of odd sizes too."""
    x, w = normal(*shape, 3, dtype=dtype), normal(3, 3, 3, 2, seed=1, dtype=dtype)
    bias = normal(2, seed=2, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        in_blocks(patch, block, group, whole)
        y = conv_blocks.correlate_upsampled(x, w, bias)
    copies = x.repeat(2, axis=1).repeat(2, axis=2)
    close(y, conv.plain_correlate(copies, w, 1, 1) + bias, 1e-4 if dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("H, W, C, bias", [(25, 21, 16, True), (25, 21, 16, False), (4, 5, 8, True)])
def test_upsampled_conv2d_is_upsampling_and_then_convolution(H, W, C, bias):
    """Large images go by blocks, small ones as two ops; and where a gradient is asked for, both do."""
    x, w = Tensor(normal(2, H, W, C)), Tensor(normal(3, 3, C, 5, seed=1))
    b = Tensor(normal(5, seed=2)) if bias else None
    expected = conv.conv2d(conv.upsample_nearest(x), w, b, padding=1)
    close(conv.upsampled_conv2d(x, w, b).data, expected.data, 1e-12)
    with recording():
        leaf, dy = Tensor(x.data, requires_grad=True), normal(*expected.shape, seed=3)
        (dx,) = gradients(conv.upsampled_conv2d(leaf, w, b), [leaf], dy)
        (plain,) = gradients(conv.conv2d(conv.upsample_nearest(leaf), w, b, padding=1), [leaf], dy)
    close(dx, plain, 1e-12)


def test_upsampled_conv2d_makes_no_copies_of_pixels_where_it_can(monkeypatch):
    monkeypatch.setattr(conv, "upsample_nearest", lambda x: pytest.fail("copies are made"))
    assert conv.upsampled_conv2d(Tensor(normal(1, 25, 25, 16)), Tensor(normal(3, 3, 16, 4))).shape == (1, 50, 50, 4)


def test_upsampled_conv2d_refuses_what_conv2d_refuses():
    x = Tensor(normal(1, 25, 25, 16))
    for w, says in ((normal(3, 3, 8, 4), "x has 16 channels"), (normal(3, 16, 4), "takes x \\(B, H, W, C\\) and w")):
        with pytest.raises(ValueError, match=says):
            conv.upsampled_conv2d(x, Tensor(w))
    with pytest.raises(ValueError, match="bias must have shape"):
        conv.upsampled_conv2d(x, Tensor(normal(3, 3, 16, 4)), Tensor(normal(3)))
    with pytest.raises(ValueError, match="upsampled_conv2d takes x \\(B, H, W, C\\)"):
        conv.upsampled_conv2d(Tensor(normal(25, 25, 16)), Tensor(normal(3, 3, 16, 4)))


@pytest.mark.parametrize("shape, C, D, alone, with_gradient", [
    ((1, 50, 41), 16, 17, conv_blocks, conv_blocks), ((2, 50, 41), 363, 362, conv_blocks, conv_blocks),
    ((1, 8, 9), 370, 360, None, None), ((1, 31, 33), 370, 360, None, None),
    ((1, 32, 32), 370, 360, conv_blocks, conv_winograd), ((16, 8, 8), 370, 360, conv_blocks, conv_winograd),
    ((1, 20, 30), 4, 320, conv_winograd, conv_winograd), ((1, 32, 32), 362, 362, conv_winograd, conv_winograd)])
def test_wide_layers_and_large_images(shape, C, D, alone, with_gradient):
    """In float32, whichever form is chosen: large images by blocks, few pixels of wide layers by patches.

    The error of a sum of 9 * 363 products is about 60 roundings of 6e-8, and Winograd's transforms make it ten times
    as large; it differs with the order in which BLAS adds (2.0e-5 of the largest value seen).
    """
    x, w = normal(*shape, C, dtype=np.float32), normal(3, 3, C, D, seed=1, dtype=np.float32)
    assert conv._fastest(x.shape, w.shape, 1, 1, y_alone=True) is alone
    assert conv._fastest(x.shape, w.shape, 1, 1) is with_gradient
    exact = conv.plain_correlate(x.astype(float), w.astype(float), 1, 1).astype(np.float32)
    for requires_grad in (False, True):
        close(conv.conv2d(Tensor(x, requires_grad=requires_grad), Tensor(w), padding=1).data, exact, 5e-5)


@settings(few, max_examples=40)
@given(stride_1(), st.sampled_from([conv_shift, conv_winograd, conv_blocks, None]))
def test_the_three_sums_agree_whichever_form_computes_them(drawn, form):
    x, w, dy, padding = drawn
    assume(form not in (conv_winograd, conv_blocks) or w.shape[0] == 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "_fastest", lambda *_, **__: form)
        y, dx = conv.correlate(x, w, 1, padding), conv.correlate_dx(dy, w, x.shape, 1, padding)
        dw = conv.correlate_dw(x, dy, w.shape, 1, padding)
    # each is the transpose of the others:  <y, dy> = <x, dx> = <w, dw>
    products = [np.vdot(a.astype(float), b.astype(float)) for a, b in [(y, dy), (x, dx), (w, dw)]]
    scale = np.linalg.norm(y.astype(float)) * np.linalg.norm(dy.astype(float))
    assert np.ptp(products) <= (1e-4 if x.dtype == np.float32 else 1e-12) * scale


def test_every_form_is_chosen_for_some_shape():
    """So the tests above compare what users get: each algorithm is used, and only for shapes that it can compute."""
    def chosen(size, k, C, D, stride=1, padding=1):
        return conv._fastest((1, *size, C), (k, k, C, D), stride, padding)
    assert {chosen((H, H), k, C, C) for H in (7, 14, 28) for k in (2, 3, 5) for C in (1, 32, 128)} \
        >= {None, conv_shift, conv_winograd}
    assert chosen((28, 28), 3, 64, 64, stride=2) is None
    assert chosen((28, 28), 3, 64, 64, padding=3) is None
    assert chosen((28, 28), 5, 128, 128) is not conv_winograd


@pytest.mark.parametrize("size", [(7, 7), (9, 11), (10, 10), (14, 14)])
@pytest.mark.parametrize("C, D", [(3, 5), (64, 96)])
def test_float32_is_near_float64(size, C, D):
    """All outputs and all gradients within 2e-5 of float64, relative to the largest element."""
    inputs = normal(2, *size, C), normal(3, 3, C, D, seed=1), normal(D, seed=2)
    inputs = [a.astype(np.float32) for a in inputs]
    results = []
    for dtype in (np.float64, np.float32):
        leaves = [Tensor(a.astype(dtype), requires_grad=True) for a in inputs]
        y = conv.conv2d(*leaves, padding=1)
        results.append([y.data, *gradients(y, leaves, normal(*y.shape, seed=3, dtype=np.float32))])
    for exact, found in zip(*results, strict=True):
        close(found.astype(float), exact, 2e-5)


@pytest.mark.parametrize("form", [conv_shift, conv_winograd, conv_blocks])
def test_a_fast_form_takes_any_layout_in_memory(form):
    x, w, dy = normal(2, 9, 7, 4), normal(3, 3, 4, 5, seed=1), normal(2, 9, 7, 5, seed=2)
    y, dw = form.correlate(x, w, 1), form.correlate_dw(x, dy, w.shape, 1)
    for odd in (lambda a: np.asfortranarray(a), lambda a: np.repeat(a, 2, axis=3)[..., ::2],
                lambda a: a[:, :, ::-1].copy()[:, :, ::-1], lambda a: a[..., ::-1].copy()[..., ::-1]):
        close(form.correlate(odd(x), odd(w), 1), y)
        close(form.correlate_dw(odd(x), odd(dy), w.shape, 1), dw)


def test_one_kernel_of_one_pixel_is_a_matrix_product():
    x, w = normal(2, 3, 4, 5), normal(1, 1, 5, 6, seed=1)
    close(conv.conv2d(Tensor(x), Tensor(w)).data, np.einsum("bhwc,cd->bhwd", x, w[0, 0]))


@pytest.mark.parametrize("k", [3, 5])
def test_images_do_not_meet(k):
    """Each image of a batch has the same result as alone, to rounding: nothing leaks from one image to another."""
    x, w = normal(5, 12, 11, 3), normal(k, k, 3, 2, seed=1)
    x[[1, 3]] = np.nan
    with no_grad():
        together = conv.conv2d(Tensor(x), Tensor(w), padding=k // 2).data
        alone = conv.conv2d(Tensor(x[2:3]), Tensor(w), padding=k // 2).data
    assert np.isfinite(alone).all()
    close(together[2:3], alone)


# ---- resolution ------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 3), small, small, small, st.integers(1, 3))
def test_changes_of_resolution(f, H, W, C, B):
    x, big = normal(B, H, W, C), normal(B, H * f, W * f, C)
    deep = normal(B, H, W, C * f * f)
    close(conv.upsample_nearest(Tensor(x), f).data, x.repeat(f, axis=1).repeat(f, axis=2))
    pooled, folded = conv.average_pool(Tensor(big), f).data, conv.space_to_depth(Tensor(big), f).data
    unfolded = conv.depth_to_space(Tensor(deep), f).data
    for b, i, j in np.ndindex(B, H, W):
        square = np.s_[b, i * f:(i + 1) * f, j * f:(j + 1) * f]
        np.testing.assert_allclose(pooled[b, i, j], big[square].mean(axis=(0, 1)), rtol=1e-12, atol=1e-14)
        assert np.array_equal(folded[b, i, j], big[square].ravel())             # row by row, then the channels
        assert np.array_equal(unfolded[square].ravel(), deep[b, i, j])
    check_gradients(lambda x: conv.upsample_nearest(x, f), x)
    check_gradients(lambda x: conv.depth_to_space(x, f), deep)
    check_gradients(lambda x: conv.average_pool(x, f), big)
    check_gradients(lambda x: conv.space_to_depth(x, f), big)
    assert np.array_equal(conv.depth_to_space(conv.space_to_depth(Tensor(big), f), f).data, big)


# ---- what is refused -------------------------------------------------------------------------------------


IMAGE, KERNEL = zeros(1, 5, 5, 2), zeros(3, 3, 2, 4)


def test_two_dtypes_are_refused():
    with pytest.raises(TypeError, match="one dtype, not float32 and float64"):
        conv.conv2d(IMAGE, zeros(3, 3, 2, 4, dtype=np.float64))


@pytest.mark.parametrize("k, size", [(1, 8), (3, 8), (3, 50), (5, 8), (5, 12)])         # of each algorithm
def test_an_empty_batch_goes_through(k, size):
    for op in (conv.conv2d, conv.conv_transpose2d):
        x, w = Tensor(np.zeros((0, size, size, 4)), requires_grad=True), Tensor(normal(k, k, 4, 4), requires_grad=True)
        y = op(x, w, padding=k // 2)
        dx, dw = gradients(y, [x, w], np.zeros(y.shape))
        assert y.shape == (0, size, size, 4) and dx.shape == x.shape and not dw.any()


def test_what_is_kept_for_the_backward_pass_of_frozen_weights():
    """Only the gradient of the weights needs V, which is several times as large as x."""
    x = normal(4, 14, 14, 16)
    held = []
    for w in (Tensor(normal(3, 3, 16, 16)), Tensor(normal(3, 3, 16, 16), requires_grad=True)):
        tracemalloc.start()
        y = conv.conv2d(Tensor(x, requires_grad=True), w, padding=1)
        held.append((tracemalloc.get_traced_memory()[0] - y.data.nbytes) / x.nbytes)
        tracemalloc.stop()
    assert held[0] < 1.5 < held[1]                          # U alone: 49 numbers for each 9 of w


def test_a_cotangent_that_nobody_needs_is_not_computed():
    x, w, b = zeros(1, 4, 4, 2), zeros(3, 3, 2, 5), zeros(5)
    for i, frozen in enumerate((x, w)):
        frozen.requires_grad = False
        for y in (conv.conv2d(x, w, b), conv.conv_transpose2d(x, Tensor(w.data.swapaxes(2, 3), i == 0), zeros(5))):
            assert [dx is None for dx in y._pullback(np.ones_like(y.data))] == [i == 0, i == 1, False]
        frozen.requires_grad = True


def test_defaults():
    """Stride 1, no padding, no bias, a factor of 2."""
    rng = np.random.default_rng(5)
    x, w = (Tensor(rng.normal(size=shape), requires_grad=True) for shape in ((1, 4, 4, 2), (3, 3, 2, 2)))
    for f in (conv.conv2d, conv.conv_transpose2d):
        plain, explicit = f(x, w), f(x, w, None, 1, 0)
        assert (plain.data == explicit.data).all() and plain.shape[1] == (2 if f is conv.conv2d else 6)
        dy = explicit.data
        for a, b in zip(gradients(plain, [x, w], dy), gradients(explicit, [x, w], dy), strict=True):
            assert (a == b).all() and a.any()
    assert conv.upsample_nearest(x).shape == (1, 8, 8, 2) and conv.average_pool(x).shape == (1, 2, 2, 2)
    assert conv.space_to_depth(x).shape == (1, 2, 2, 8)


def test_a_transposed_convolution_of_single_pixels_changes_the_channels():
    x, w = zeros(1, 2, 3, 5), zeros(1, 1, 4, 5)
    assert conv.conv_transpose2d(x, w).shape == (1, 2, 3, 4)


@pytest.mark.parametrize("stride, padding", [(2, 0), (1, 1), (3, 2)])
def test_single_pixel_kernels_with_strides_and_padding(stride, padding):
    """The shortcut for them requires stride 1 and no padding; otherwise they are computed like any convolution."""
    rng = np.random.default_rng([stride, padding])
    x, w = rng.normal(size=(2, 5, 4, 3)), rng.normal(size=(1, 1, 3, 2))
    check_gradients(lambda x, w: conv.conv2d(x, w, None, stride, padding), x, w)
    check_gradients(lambda x, w: conv.conv_transpose2d(x, w, None, stride, padding), x, rng.normal(size=(1, 1, 2, 3)))


@pytest.mark.parametrize("error, message, call", [
    (ValueError, "convolution takes x (B, H, W, C) and w (kh, kw, C_in, C_out), not (1, 4, 4) and (3, 3, 2, 2)",
     lambda: conv.conv2d(zeros(1, 4, 4), zeros(3, 3, 2, 2))),
    (ValueError, "convolution takes x (B, H, W, C) and w (kh, kw, C_in, C_out), not (1, 4, 4, 2) and (3, 3, 2)",
     lambda: conv.conv_transpose2d(zeros(1, 4, 4, 2), zeros(3, 3, 2))),
    (ValueError, "stride must be a whole number of at least 1, not 0",
     lambda: conv.conv2d(zeros(1, 4, 4, 2), zeros(3, 3, 2, 2), stride=0, padding=1)),
    (ValueError, "padding must be a whole number of at least 0, not -1",
     lambda: conv.conv2d(zeros(1, 4, 4, 2), zeros(3, 3, 2, 2), padding=-1)),
    (ValueError, "stride must be a whole number of at least 1, not 1.5",
     lambda: conv.conv2d(zeros(1, 4, 4, 2), zeros(3, 3, 2, 2), stride=1.5)),
    (ValueError, "padding must be a whole number of at least 0, not 0.5",
     lambda: conv.conv2d(zeros(1, 4, 4, 2), zeros(3, 3, 2, 2), padding=0.5)),
    (ValueError, "convolution: bias must have shape (5,), not (2,)",
     lambda: conv.conv2d(zeros(1, 4, 4, 2), zeros(3, 3, 2, 5), zeros(2))),
    (ValueError, "convolution: bias must have shape (5,), not (2,)",
     lambda: conv.conv_transpose2d(zeros(1, 4, 4, 2), zeros(3, 3, 5, 2), zeros(2))),
    (TypeError, "an op takes one dtype, not float32 and float32 and float64: convert one of them",
     lambda: conv.conv2d(zeros(1, 4, 4, 2), zeros(3, 3, 2, 5), zeros(5, dtype=np.float64))),
    (ValueError, "conv2d: x has 2 channels and w (3, 3, 3, 2), (kh, kw, C_in, C_out), takes 3",
     lambda: conv.conv2d(zeros(1, 4, 4, 2), zeros(3, 3, 3, 2))),
    (ValueError, "conv2d: the kernel (3, 1) is larger than the padded image of x (1, 2, 4, 2)",
     lambda: conv.conv2d(zeros(1, 2, 4, 2), zeros(3, 1, 2, 2))),
    (ValueError, "conv2d: the kernel (1, 5) is larger than the padded image of x (1, 2, 4, 2)",
     lambda: conv.conv2d(zeros(1, 2, 4, 2), zeros(1, 5, 2, 2))),
    (ValueError, "conv2d: the kernel (5, 1) is larger than the padded image of x (1, 2, 4, 2)",
     lambda: conv.conv2d(zeros(1, 2, 4, 2), zeros(5, 1, 2, 2), padding=1)),
    (ValueError, "conv2d: the kernel (1, 5) is larger than the padded image of x (1, 4, 2, 2)",
     lambda: conv.conv2d(zeros(1, 4, 2, 2), zeros(1, 5, 2, 2), padding=1)),
    (ValueError, "conv_transpose2d: x has 2 channels and w (kh, kw, C_out, C_in) (3, 3, 2, 3) takes 3",
     lambda: conv.conv_transpose2d(zeros(1, 4, 4, 2), zeros(3, 3, 2, 3))),
    (ValueError, "conv_transpose2d: padding 2 leaves no pixel of x (1, 2, 5, 1)",
     lambda: conv.conv_transpose2d(zeros(1, 2, 5, 1), zeros(3, 3, 1, 1), padding=2)),
    (ValueError, "conv_transpose2d: padding 2 leaves no pixel of x (1, 5, 2, 1)",
     lambda: conv.conv_transpose2d(zeros(1, 5, 2, 1), zeros(3, 3, 1, 1), padding=2)),
    (ValueError, "depth_to_space: 6 channels are not a multiple of 2 x 2",
     lambda: conv.depth_to_space(zeros(1, 2, 2, 6), 2)),
    (ValueError, "space_to_depth takes x (B, H, W, C) with H and W multiples of 2, not (1, 3, 4, 1)",
     lambda: conv.space_to_depth(zeros(1, 3, 4, 1), 2)),
    (ValueError, "average_pool takes x (B, H, W, C) with H and W multiples of 2, not (1, 4, 3, 1)",
     lambda: conv.average_pool(zeros(1, 4, 3, 1), 2)),
    *((ValueError, f"{f.__name__} takes x (B, H, W, C), not (4, 4)", lambda f=f: f(zeros(4, 4), 2))
      for f in (conv.upsample_nearest, conv.average_pool, conv.space_to_depth, conv.depth_to_space)),
    (ValueError, "upsample_nearest: factor must be a whole number of at least 1, not 0",
     lambda: conv.upsample_nearest(zeros(1, 4, 4, 1), 0)),
    (ValueError, "upsample_nearest: factor must be a whole number of at least 1, not 1.5",
     lambda: conv.upsample_nearest(zeros(1, 4, 4, 1), 1.5)),
])
def test_messages_of_refusals(error, message, call):
    check_message(error, message, call)
