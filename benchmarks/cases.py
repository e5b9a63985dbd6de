"""What benchmarks/kernels.py measures: a class for each family of kernels, and the shapes.

Each class defines the inputs, our computation, the rivals' computation, the expected result in float64, and the amount
of work. Arrays are CuPy's. A mode is a precision; tf32 is float32 in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from minidiff.engine.backend import xp_of
from minidiff.engine.cuda import launch as cuda
from minidiff.nn.precision import dtype_of

MODES = ("float32", "tf32", "float16", "bfloat16")
OURS, SD = "minidiff's", "Stable Diffusion 1.5's"
EPS = 1e-5                                                  # of the group norms


# --- the families -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Conv:
    """One of the three sums of a convolution, x (B, H, H, C), w (k, k, C, D); or y with its bias and SiLU."""

    of: str                                                 # whose network has this layer
    op: str                                                 # forward, dx, dw or fused
    B: int
    H: int
    C: int
    D: int
    k: int = 3
    stride: int = 1

    family, unit, kernels, modes = "conv", "TFLOP/s", "conv", MODES
    compiled_for = 0                                        # kernels are compiled for each type only
    rivals = ("cuDNN",)

    @property
    def shape(self) -> str:
        step = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.B} x {self.H}x{self.H}, {self.k}x{self.k}{step}, {self.C} to {self.D}"

    @property
    def work(self) -> float:
        """Operations of the plain sum."""
        return 2 * self.B * (self.H // self.stride)**2 * self.k**2 * self.C * self.D

    def inputs(self, mode: str) -> tuple:
        B, H, C, D, k, out = self.B, self.H, self.C, self.D, self.k, self.H // self.stride
        return random_arrays(mode, (B, H, H, C), (k, k, C, D), (D,), (B, out, out, D))

    def ours(self, version: int, x, w, bias, dy) -> Callable:
        from minidiff.engine.cuda import conv as conv_cuda
        s, p = self.stride, self.k // 2
        return {"forward": lambda: conv_cuda.correlate(x, w, s, p, version=version),
                "fused": lambda: conv_cuda.correlate(x, w, s, p, bias, True, version=version),
                "dx": lambda: conv_cuda.correlate_dx(dy, w, x.shape, s, p, version=version),
                "dw": lambda: conv_cuda.correlate_dw(x, dy, w.shape, s, p, version=version)}[self.op]

    def expected(self, x, w, bias, dy) -> tuple:
        """Tap by tap: each tap is a matrix product with the pixels that it reads."""
        xp, s, p, out = xp_of(x), self.stride, self.k // 2, self.H // self.stride
        x, w, bias, dy = (a.astype("float64") for a in (x, w, bias, dy))
        padded = xp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
        y, dx, dw = xp.zeros_like(dy), xp.zeros_like(padded), xp.zeros_like(w)
        for m in range(self.k):
            for n in range(self.k):
                seen = (slice(None), slice(m, m + s * out, s), slice(n, n + s * out, s))    # (B, out, out, C)
                if self.op in ("forward", "fused"):
                    y += padded[seen] @ w[m, n]
                elif self.op == "dx":
                    dx[seen] += dy @ w[m, n].T
                else:
                    dw[m, n] = padded[seen].reshape(-1, self.C).T @ dy.reshape(-1, self.D)
        if self.op == "fused":
            y = (y + bias) / (1 + xp.exp(-(y + bias)))
        return {"forward": y, "fused": y, "dx": dx[:, p:p + self.H, p:p + self.H], "dw": dw}[self.op],

    def theirs(self, name: str, x, w, bias, dy) -> Callable:
        import torch
        F = torch.nn.functional
        x, dy = (as_torch(a).permute(0, 3, 1, 2) for a in (x, dy))                  # (B, C, H, W), channels last
        w = as_torch(w).permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        s, p, bias = [self.stride] * 2, [self.k // 2] * 2, as_torch(bias)
        if self.op == "forward":
            return lambda: F.conv2d(x, w, None, s, p)
        if self.op == "fused":
            return lambda: F.silu(F.conv2d(x, w, bias, s, p))
        back, wanted = torch.ops.aten.convolution_backward, [self.op == "dx", self.op == "dw", False]
        return lambda: back(dy, x, w, None, s, p, [1, 1], False, [0, 0], 1, wanted)

    def in_our_layout(self, result) -> tuple:
        if self.op == "dw":
            return result[1].permute(2, 3, 1, 0),
        return (result[0] if self.op == "dx" else result).permute(0, 2, 3, 1),


@dataclass(frozen=True)
class Attention:
    """y = softmax(q k^T / sqrt(d)) v or its gradients, each (B, N or M, h, d) seen as (B, h, N or M, d)."""

    of: str
    op: str                                                 # forward or backward
    B: int
    h: int
    N: int
    M: int
    d: int

    family, unit, modes = "attention", "TFLOP/s", MODES
    rivals = ("flash", "efficient", "cudnn", "math")

    @property
    def kernels(self) -> str:
        return f"attention_{self.op}"

    @property
    def compiled_for(self) -> int:
        return -(-self.d // 16) * 16

    @property
    def shape(self) -> str:
        return f"{self.B} x {self.h} heads, {self.N} x {self.M} tokens of {self.d}"

    @property
    def work(self) -> float:
        """Operations of two matrix products forward and five backward, as usual."""
        return (4 if self.op == "forward" else 10) * self.B * self.h * self.N * self.M * self.d

    def inputs(self, mode: str) -> tuple:
        B, h, N, M, d = self.B, self.h, self.N, self.M, self.d
        arrays = random_arrays(mode, (B, N, h, d), (B, M, h, d), (B, M, h, d), (B, N, h, d))
        return tuple(a.swapaxes(1, 2) for a in arrays)

    def ours(self, version: int, q, k, v, dy) -> Callable:
        from minidiff.engine.cuda import attention as attention_cuda
        scale = 1 / math.sqrt(self.d)
        if self.op == "forward":
            return lambda: attention_cuda.forward(q, k, v, None, False, scale, version=version)[0]
        y, lse = attention_cuda.forward(q, k, v, None, False, scale)
        return lambda: attention_cuda.backward(q, k, v, None, False, scale, y, lse, dy, version=version)

    def expected(self, q, k, v, dy) -> tuple:
        """For the images that `seen` selects, with all scores in memory."""
        xp, scale = xp_of(q), 1 / math.sqrt(self.d)
        q, k, v, dy = (self.seen(a).astype("float64") for a in (q, k, v, dy))
        P = xp.exp((q @ k.swapaxes(2, 3)) * scale)          # inputs have size 1: the scores do not overflow
        P /= P.sum(axis=3, keepdims=True)                                           # (2, h, N, M)
        if self.op == "forward":
            return P @ v,
        dv = P.swapaxes(2, 3) @ dy
        dP = dy @ v.swapaxes(2, 3)
        dS = P * (dP - (dP * P).sum(axis=3, keepdims=True)) * scale
        return dS @ k, dS.swapaxes(2, 3) @ q, dv

    def theirs(self, name: str, q, k, v, dy) -> Callable:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        attend = torch.nn.functional.scaled_dot_product_attention
        backend = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
                   "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}[name]
        q, k, v, dy = map(as_torch, (q, k, v, dy))
        if self.op == "forward":
            def run():
                with torch.no_grad(), sdpa_kernel(backend):
                    return attend(q, k, v)
            return run
        leaves = [a.requires_grad_() for a in (q, k, v)]
        with sdpa_kernel(backend):
            y = attend(*leaves)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def in_our_layout(self, result) -> tuple:
        return (result,) if self.op == "forward" else tuple(result)

    @staticmethod
    def seen(a):
        """The first and the last image, since the scores of all images may not fit into memory."""
        return a[::max(1, len(a) - 1)]


@dataclass(frozen=True)
class GroupNorm:
    """y = silu(group_norm(x)) or its gradients, x (B, N, C)."""

    of: str
    op: str                                                 # forward or backward
    B: int
    N: int
    C: int
    groups: int

    family, unit, kernels, modes = "group_norm", "GB/s", "group_norm", ("float32", "float16", "bfloat16")
    compiled_for = 0
    rivals = ("channels last", "channels first")

    @property
    def shape(self) -> str:
        return f"{self.B} x {self.N} pixels, {self.C} channels, {self.groups} groups"

    @property
    def work(self) -> float:
        """Numbers that are read or written, each array once: x and y; x, dy and dx."""
        return (2 if self.op == "forward" else 3) * self.B * self.N * self.C

    def inputs(self, mode: str) -> tuple:
        B, N, C = self.B, self.N, self.C
        return random_arrays(mode, (B, N, C), (C,), (C,), (B, N, C))

    def ours(self, version: int, x, gamma, beta, dy) -> Callable:
        from minidiff.engine.cuda import norm as norm_cuda
        G = self.groups
        if self.op == "forward":
            return lambda: norm_cuda.group_norm(x, G, gamma, beta, EPS, True, version=version)[0]
        _, mean, rstd = norm_cuda.group_norm(x, G, gamma, beta, EPS, True, version=version)
        return lambda: norm_cuda.group_norm_backward(x, dy, G, gamma, beta, mean, rstd, True, version=version)

    def expected(self, x, gamma, beta, dy) -> tuple:
        xp, grouped = xp_of(x), (self.B, self.N, self.groups, self.C // self.groups)
        gamma, beta = (a.astype("float64").reshape(grouped[2:]) for a in (gamma, beta))
        x, dy = (a.astype("float64").reshape(grouped) for a in (x, dy))

        def mean(a):
            return a.mean(axis=(1, 3), keepdims=True)                               # (B, 1, G, 1)
        centred = x - mean(x)
        rstd = 1 / xp.sqrt(mean(centred * centred) + EPS)
        x_hat = centred * rstd
        z = gamma * x_hat + beta
        s = 1 / (1 + xp.exp(-z))
        if self.op == "forward":
            return (z * s).reshape(self.B, self.N, self.C),
        dz = dy * s * (1 + z * (1 - s))                     # silu'(z) = s (1 + z (1 - s))
        dx_hat = gamma * dz
        dx = rstd * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat))
        return (dx.reshape(self.B, self.N, self.C), (dz * x_hat).sum(axis=(0, 1)).reshape(-1),
                dz.sum(axis=(0, 1)).reshape(-1))

    def theirs(self, name: str, x, gamma, beta, dy) -> Callable:
        import torch
        F, H, G = torch.nn.functional, math.isqrt(self.N), self.groups
        x, dy = (as_torch(a).reshape(self.B, H, -1, self.C).permute(0, 3, 1, 2) for a in (x, dy))
        if name == "channels first":
            x, dy = x.contiguous(), dy.contiguous()
        gamma, beta = as_torch(gamma), as_torch(beta)
        if self.op == "forward":
            def run():
                with torch.no_grad():
                    return F.silu(F.group_norm(x, G, gamma, beta, EPS))
            return run
        leaves = [a.requires_grad_() for a in (x, gamma, beta)]
        y = F.silu(F.group_norm(*leaves[:1], G, *leaves[1:], EPS))
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def in_our_layout(self, result) -> tuple:
        x, *others = (result,) if self.op == "forward" else result
        return x.permute(0, 2, 3, 1).reshape(self.B, self.N, self.C), *others


@dataclass(frozen=True)
class LayerNorm:
    """y = layer_norm(x) or its gradients, x (M, C)."""

    of: str
    op: str                                                 # forward or backward
    M: int
    C: int

    family, unit, kernels, modes = "layer_norm", "GB/s", "layer_norm", ("float32", "float16", "bfloat16")
    compiled_for = 0
    rivals = ("PyTorch",)

    @property
    def shape(self) -> str:
        return f"{self.M} tokens, {self.C} channels"

    @property
    def work(self) -> float:
        """Numbers that are read or written, each array once: x and y; x, dy and dx."""
        return (2 if self.op == "forward" else 3) * self.M * self.C

    def inputs(self, mode: str) -> tuple:
        return random_arrays(mode, (self.M, self.C), (self.C,), (self.C,), (self.M, self.C))

    def ours(self, version: int, x, gamma, beta, dy) -> Callable:
        from minidiff.engine.cuda import norm as norm_cuda
        if self.op == "forward":
            return lambda: norm_cuda.layer_norm(x, gamma, beta, EPS, version=version)[0]
        _, mean, rstd = norm_cuda.layer_norm(x, gamma, beta, EPS, version=version)
        return lambda: norm_cuda.layer_norm_backward(x, dy, gamma, mean, rstd, version=version)

    def expected(self, x, gamma, beta, dy) -> tuple:
        x, gamma, beta, dy = (a.astype("float64") for a in (x, gamma, beta, dy))

        def mean(a):
            return a.mean(axis=1, keepdims=True)                                    # (M, 1)
        centred = x - mean(x)
        rstd = (mean(centred * centred) + EPS) ** -0.5
        x_hat = centred * rstd
        if self.op == "forward":
            return gamma * x_hat + beta,
        dx_hat = gamma * dy
        return rstd * (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat)), (dy * x_hat).sum(axis=0), dy.sum(axis=0)

    def theirs(self, name: str, x, gamma, beta, dy) -> Callable:
        import torch
        norm, (x, gamma, beta, dy) = torch.nn.functional.layer_norm, map(as_torch, (x, gamma, beta, dy))
        if self.op == "forward":
            return lambda: norm(x, (self.C,), gamma, beta, EPS)
        leaves = [a.requires_grad_() for a in (x, gamma, beta)]
        y = norm(x, (self.C,), gamma, beta, EPS)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)

    def in_our_layout(self, result) -> tuple:
        return (result,) if self.op == "forward" else tuple(result)


Case = Conv | Attention | GroupNorm | LayerNorm


# --- the shapes -------------------------------------------------------------------------------------------

def cases() -> list[Case]:
    """Everything that is measured.

    In each family Stable Diffusion's shapes come first: a run that its time limit ends has measured the large ones,
    which say most about a kernel.
    """
    convs = [(SD, 4, 64, 320, 320), (SD, 4, 32, 640, 640), (SD, 4, 16, 1280, 1280), (SD, 4, 8, 1280, 1280),
             (SD, 4, 64, 320, 320, 1), (SD, 4, 64, 320, 320, 3, 2),
             (OURS, 128, 14, 64, 64), (OURS, 128, 7, 128, 128), (OURS, 128, 7, 256, 128), (OURS, 128, 14, 128, 64),
             (OURS, 128, 28, 64, 64), (OURS, 128, 28, 128, 64)]
    attentions = [(SD, 4, 8, 4096, 4096, 40), (SD, 4, 8, 1024, 1024, 80), (SD, 4, 8, 256, 256, 160),
                  (SD, 4, 8, 64, 64, 160), (SD, 4, 8, 4096, 77, 40),
                  (OURS, 128, 4, 49, 49, 32), (OURS, 128, 4, 49, 16, 32), (OURS, 128, 4, 196, 196, 32),
                  (OURS, 32, 4, 784, 784, 32), (OURS, 128, 4, 49, 49, 64), (OURS, 128, 4, 196, 196, 64),
                  (OURS, 32, 4, 784, 784, 64)]
    norms = [(SD, 4, 4096, 320, 32), (SD, 4, 1024, 640, 32), (SD, 4, 256, 1280, 32), (SD, 4, 64, 1280, 32),
             (OURS, 128, 196, 64, 8), (OURS, 128, 49, 128, 8), (OURS, 128, 49, 256, 8), (OURS, 128, 784, 64, 8)]
    rows = [(SD, 4 * 4096, 320), (SD, 4 * 1024, 640), (SD, 4 * 77, 768), (OURS, 128 * 16, 64)]
    found = [Conv(of, "fused", *sizes) for of, *sizes in (convs[0], convs[6])]
    found += [Conv(of, op, *sizes) for of, *sizes in convs for op in ("forward", "dx", "dw")]
    found += [Attention(of, op, *sizes) for of, *sizes in attentions for op in ("forward", "backward")]
    found += [GroupNorm(of, op, *sizes) for of, *sizes in norms for op in ("forward", "backward")]
    return found + [LayerNorm(of, op, *sizes) for of, *sizes in rows for op in ("forward", "backward")]


def versions_for(case: Case, mode: str, capability: str) -> list[int]:
    """The versions that support this mode on this GPU; the plainest only where it is not too slow."""
    patience = 40e9 if case.unit == "TFLOP/s" else math.inf
    return [number for number, source in cuda.versions(case.kernels).items()
            if mode in source.takes and source.runs_on(capability) and (number > 1 or case.work < patience)]


# --- arrays -----------------------------------------------------------------------------------------------

def random_arrays(mode: str, *shapes: tuple[int, ...]) -> tuple:
    """Numbers of mean 0, in which errors are visible."""
    import cupy
    rng, dtype = cupy.random.default_rng(0), dtype_of("float32" if mode == "tf32" else mode)
    return tuple(rng.standard_normal(shape, dtype=cupy.float32).astype(dtype) for shape in shapes)


def as_torch(a):
    """The same memory as a tensor.  bfloat16 passes as 16-bit integers, which PyTorch reinterprets."""
    import torch
    if a.dtype.name == "bfloat16":
        return torch.from_dlpack(a.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(a)


def copies(inputs: tuple, cache_bytes: int, most: int = 48) -> list[tuple]:
    """The inputs and enough copies that a call, taken in turn, finds none of its inputs in the cache."""
    size = sum(a.nbytes for a in inputs)
    return [inputs] + [tuple(map(_copy, inputs)) for _ in range(min(most, 2 * cache_bytes // size + 2) - 1)]


def _copy(a):
    """The same array in other memory, with the same strides."""
    return a.swapaxes(1, 2).copy().swapaxes(1, 2) if a.ndim == 4 and not a.flags.c_contiguous else a.copy()
