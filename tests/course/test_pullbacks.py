"""Right answers in other forms than minidiff's are kept, wrong pullbacks are found, and the emulator counts."""

import numpy as np
import pytest
from support import fake_cupy

from minidiff.course.emulator import launch
from minidiff.course.exercise import exercise
from minidiff.course.judge import BROKEN, Fault, judge
from minidiff.course.pullbacks import wrong_pullback

RNG = np.random.default_rng(0)


# --- right answers in another form --------------------------------------------------------------------------

def softmax(x):
    log_y = x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
    y = np.exp(log_y)

    def pullback(dy):
        diagonal = np.einsum("...i,ij->...ij", y, np.eye(x.shape[-1], dtype=y.dtype))
        jacobian = diagonal - y[..., :, None] * y[..., None, :]
        return np.einsum("...i,...ij->...j", dy, jacobian)
    return y, pullback


def group_norm(x, groups, gamma, beta, eps):
    B, H, W, C = x.shape
    y, n = np.empty_like(x), C // groups
    parts = [(b, slice(None), slice(None), slice(g * n, (g + 1) * n)) for b in range(B) for g in range(groups)]
    hats, r = {}, {}
    for i, at in enumerate(parts):
        r[i] = 1 / np.sqrt(x[at].var() + x.dtype.type(eps))
        hats[i] = (x[at] - x[at].mean()) * r[i]
        y[at] = hats[i] * gamma[at[3]] + beta[at[3]]

    def pullback(dy):
        dx, dgamma, dbeta = np.empty_like(x), np.zeros_like(gamma), np.zeros_like(beta)
        for i, at in enumerate(parts):
            d = dy[at] * gamma[at[3]]
            d = d - d.mean()                                # a projection: off the constants, then off x
            hat = hats[i]
            dx[at] = r[i] * (d - hat * (hat * d).sum() / d.size)
            dgamma[at[3]] += (dy[at] * hat).sum((0, 1))
            dbeta[at[3]] += dy[at].sum((0, 1))
        return dx, dgamma, dbeta
    return y, pullback


def conv_backward(x, w, dy, stride, padding):
    (H, W), (kh, kw) = x.shape[1:3], w.shape[:2]
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for b, i, j in np.ndindex(dy.shape[:3]):
        for m, n in np.ndindex(kh, kw):
            u, v = i * stride + m - padding, j * stride + n - padding
            if 0 <= u < H and 0 <= v < W:
                dx[b, u, v] += w[m, n] @ dy[b, i, j]
                dw[m, n] += np.outer(x[b, u, v], dy[b, i, j])
    return dx, dw


def attention(q, k, v, mask):
    scale = np.sqrt(q.dtype.type(q.shape[1]))
    S = np.einsum("nd,md->nm", q, k) / scale
    if mask is not None:
        S = np.where(mask, S, q.dtype.type(-1e30))
    P, back = softmax(S)

    def pullback(dy):
        dS = back(np.einsum("ne,me->nm", dy, v)) / scale
        return dS @ k, (q.T @ dS).T, (dy.T @ P).T
    return P @ v, pullback


def matmul_kernel():
    """Tiles in one dimension, a's turned, and no product with the zeros behind K."""
    return """
extern "C" __global__ void matmul(In a, In b, Out c, int M, int K, int N) {
    __shared__ float shared_a[256], shared_b[256];
    const int r = threadIdx.y, q = threadIdx.x, i = blockIdx.y * 16 + r, j = blockIdx.x * 16 + q;
    double sum = 0;
    for (int piece = 0; piece < (K + 15) / 16; piece++) {
        const int k = piece * 16;
        shared_a[16 * q + r] = 0;
        shared_b[16 * r + q] = 0;
        if (i < M && k + q < K) shared_a[16 * q + r] = a[i * K + k + q];
        if (j < N && k + r < K) shared_b[16 * r + q] = b[(k + r) * N + j];
        __syncthreads();
        for (int n = 0; n < 16 && k + n < K; n++) sum += shared_a[16 * n + r] * shared_b[16 * n + q];
        __syncthreads();
    }
    if (i < M && j < N) c[i * N + j] = float(sum);
}
"""


@pytest.mark.parametrize("name, answer", [
    ("ex19_softmax", softmax), ("ex20_group_norm", group_norm), ("ex21_conv_backward", conv_backward),
    ("ex22_attention", attention), pytest.param("ex23_tiled_matmul", matmul_kernel, marks=fake_cupy.needs_compiler)])
def test_a_right_answer_in_another_form_is_right(name, answer):
    verdict = judge(exercise(name), answer)
    assert verdict.right, verdict.sentence


# --- pullbacks ----------------------------------------------------------------------------------------------

def check(op, **inputs):
    return wrong_pullback(op, inputs, (3,), np.random.default_rng(1), "here")


def test_a_right_pullback_passes():
    x, y = RNG.standard_normal((2, 3))
    assert check(lambda x: (np.sin(x), lambda dy: np.cos(x) * dy), x=x) is None
    assert check(lambda x, y: (x * y, lambda dz: (y * dz, x * dz)), x=x, y=y) is None


@pytest.mark.parametrize("op, said", [
    (lambda x, y: (x * y, lambda dz: (y * dz, y * dz)), "dy["),
    (lambda x, y: (x * y, lambda dz: (y * dz * 1.00001, x * dz)), "dx["),
    (lambda x, y: (x * y, lambda dz: (y * dz, (x * dz)[:2])), "dy has shape (2,) and should have shape (3,)"),
    (lambda x, y: (x * y, lambda dz: y * dz), "(dx, dy)"),
    (lambda x, y: x * y, "the result should be 2 values, (y, pullback)"),
    (lambda x, y: (x * y, x), "the second result should be a function"),
    (lambda x, y: ((x * y)[:2], lambda dz: (dz, dz)), "y has shape (2,)"),
])
def test_a_wrong_pullback_is_found(op, said):
    x, y = RNG.standard_normal((2, 3))
    assert said in check(op, x=x, y=y)


def test_a_wrong_pullback_without_a_name_is_told_by_its_numbers():
    def nearly(x):
        y, pullback = softmax(x)
        return y, lambda dy: pullback(dy) + 0.001
    verdict = judge(exercise("ex19_softmax"), nearly)
    assert verdict.kind == BROKEN and "is the derivative of sum(y dy)" in verdict.sentence
    assert "should be" in verdict.sentence and "by central differences" in verdict.sentence


# --- the emulator -------------------------------------------------------------------------------------------

COPY = """
extern "C" __global__ void copy(In x, Out y, int shift) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = x[i + shift] + x[i + shift];
}
"""


def copied(source: str = COPY, kernel: str = "copy", shift: int = 0):
    x = np.arange(8.0)
    return launch(source, kernel, (2,), (4,), [x], (8,), [shift])


@fake_cupy.needs_compiler
def test_reads_are_counted_and_an_index_outside_does_no_harm():
    done = copied()
    np.testing.assert_array_equal(done.result, 2 * np.arange(8))
    assert (done.reads, done.outside) == (16, 0)
    done = copied(shift=3)
    np.testing.assert_array_equal(done.result, [6, 8, 10, 12, 14, np.nan, np.nan, np.nan])
    assert (done.reads, done.outside) == (10, 6)
    done = copied(COPY.replace("y[i]", "y[i - 5]"))
    np.testing.assert_array_equal(done.result, [10, 12, 14, *[np.nan] * 5])
    assert (done.reads, done.outside) == (16, 5)


@fake_cupy.needs_compiler
@pytest.mark.parametrize("source, said", [
    (COPY.replace(";\n}", "\n}"), "the kernel does not compile: line 4: expected"),
    (COPY.replace("copy", "Copy"), "the source has no kernel copy: it takes extern"),
    ("", "the source has no kernel copy"),
    (COPY.replace("y[i] =", "if (i % 2) __syncthreads(); else for (;;) __shfl_sync(0xffffffffu, i, 0);\n    y[i] ="),
     "the kernel does not come to its end"),
])
def test_a_kernel_that_cannot_run_is_one_sentence(source, said):
    with pytest.raises(Fault) as fault:
        copied(source)
    assert said in str(fault.value) and "\n" not in str(fault.value)


def test_without_a_checkout_it_says_so(monkeypatch, tmp_path):
    from minidiff.course import emulator
    monkeypatch.setattr(emulator, "FILE", tmp_path / "gone.py")
    emulator._cuda_on_cpu.cache_clear()
    try:
        with pytest.raises(Fault, match="only in a checkout of minidiff"):
            copied()
    finally:
        emulator._cuda_on_cpu.cache_clear()
