"""A network that says of each pixel whether it is black, white, or something between.

Most pixels of drawings are exactly black or exactly white.  A network that gives v as one number rarely gives the v
whose x0_hat is exactly -1.  Here the network gives a distribution of x_0 for each pixel: what the other pixels say of
this one.  Bayes' rule adds what the pixel itself says:

    p(x_0) = pi_1 d(x_0 + 1) + pi_2 d(x_0 - 1) + pi_3 N(x_0; m, s^2)        d: all mass at 0; black is -1, white 1
    x_t    = alpha x_0 + sigma eps

    V_k    = alpha^2 s_k^2 + sigma^2                                        the variance of x_t where k is true
    w_k    = p(k | x_t)  =  softmax_k( log pi_k + log N(x_t; alpha m_k, V_k) )                          Bayes
    x0_k   = E[x_0 | x_t, k]  =  m_k + g_k (x_t - alpha m_k),   g_k = alpha s_k^2 / V_k     a product of two Gaussians
    x0_hat = sum_k w_k x0_k,   and   v_hat = (alpha x_t - x0_hat) / sigma,   for alpha^2 + sigma^2 = 1
                                                                                            Salimans & Ho 2022

with m_1 = -1, m_2 = 1 and s_1 = s_2 = 0.  Where the noise is fine (sigma much below s), a pixel close to black is taken
for black unless pi_1 is tiny, and a grey pixel keeps its value, x0_3 = x_t / alpha: the network has to learn neither.
The loss compares v_hat alone, so the pi_k are a form of the answer, and need not be true shares.  (The same idea with
256 grey levels: nn/grey_levels.py.)

The derivatives, of which the loss needs the first three:

    d x0_hat / d log pi_k = w_k (x0_k - x0_hat)
    d x0_hat / d m   = w_3 ((x0_3 - x0_hat) alpha e / V + sigma^2 / V),                             e = x_t - alpha m
    d x0_hat / d s^2 = w_3 ((x0_3 - x0_hat) (e^2 / V - 1) alpha^2 / 2V + alpha sigma^2 e / V^2)     V = V_3
    d x0_hat / d x_t = alpha Var[x_0 | x_t] / sigma^2                       Tweedie's formula, differentiated
"""

from __future__ import annotations

import numpy as np
from scipy import special

from minidiff.engine.backend import device_of, moved_together, xp_of
from minidiff.engine.cuda import pixel_mixture as pixel_mixture_cuda
from minidiff.engine.tensor import Tensor, record

NUMBERS = 4                                                 # of the network, for each number of x_t


def v_of_mixture(out: Tensor, x_t: Tensor, alpha: np.ndarray, sigma: np.ndarray) -> Tensor:
    """v_hat (B, H, W, C), from a network's output (B, H, W, 4 C) and x_t (B, H, W, C) of one dtype, float32 or wider.

    alpha, sigma (B,) float64, on the host; sigma is positive.  The four numbers of each pixel are the log pi of black
    and of white, relative to "between", then what gives m = tanh(.) and s^2 = sigmoid(.): numbers in [-1, 1] have a
    mean in [-1, 1] and a variance of at most 1.
    """
    _check(out, x_t, sigma)
    xp, dtype = xp_of(out.data), out.dtype
    a, s = moved_together([np.asarray(c, dtype) for c in (alpha, sigma)], device_of(out.data))         # (B,)
    if xp is not np:
        return _by_kernel(out, x_t, a, s)
    a, s = (c.reshape(-1, *[1] * (x_t.ndim - 1)) for c in (a, s))                   # (B, 1, 1, 1)
    x, numbers = x_t.data, out.data.reshape(*x_t.shape, NUMBERS)                    # (B, H, W, C, 4)
    m, s2 = np.tanh(numbers[..., 2]), special.expit(numbers[..., 3])                # (B, H, W, C)
    V, e = a * a * s2 + s * s, x - a * m

    # w_k = softmax_k(log pi_k - log(V_k) / 2 - (x_t - alpha m_k)^2 / 2 V_k)
    w = np.stack([numbers[..., 0] - np.log(s) - 0.5 * ((x + a) / s) ** 2,
                  numbers[..., 1] - np.log(s) - 0.5 * ((x - a) / s) ** 2,
                  -0.5 * np.log(V) - 0.5 * e * e / V])                              # (3, B, H, W, C)
    w = np.exp(w - w.max(0))
    w /= w.sum(0)
    # x0_hat = sum_k w_k (m_k + g_k (x_t - alpha m_k))
    x0 = [-1.0, 1.0, m + a * s2 / V * e]
    x0_hat = w[1] - w[0] + w[2] * x0[2]
    # v_hat = (alpha x_t - x0_hat) / sigma
    y = (a * x - x0_hat) / s

    def pullback(dy):
        dx0, dout, dx = -dy / s, None, None
        if out.requires_grad:
            d_m = w[2] * ((x0[2] - x0_hat) * a * e / V + s * s / V)
            d_s2 = w[2] * ((x0[2] - x0_hat) * (e * e / V - 1) * a * a / (2 * V) + a * s * s * e / (V * V))
            dout = np.stack([w[0] * (x0[0] - x0_hat) * dx0, w[1] * (x0[1] - x0_hat) * dx0,
                             d_m * (1 - m * m) * dx0, d_s2 * s2 * (1 - s2) * dx0], axis=-1).reshape(out.shape)
        if x_t.requires_grad:
            # Var[x_0 | x_t] = sum_k w_k ((x0_k - x0_hat)^2 + Var[x_0 | x_t, k]),   Var[x_0 | x_t, 3] = s^2 sigma^2 / V
            variance = sum(w[k] * (x0[k] - x0_hat) ** 2 for k in range(3)) + w[2] * s2 * s * s / V
            dx = (a / s) * dy + dx0 * a * variance / (s * s)
        return dout, dx
    return record(y, (out, x_t), pullback)


def _by_kernel(out: Tensor, x_t: Tensor, alpha, sigma) -> Tensor:
    arrays = out.data, x_t.data, alpha, sigma
    return record(pixel_mixture_cuda.forward(*arrays), (out, x_t), lambda dy: tuple(
        dx if of.requires_grad else None
        for dx, of in zip(pixel_mixture_cuda.backward(*arrays, dy), (out, x_t), strict=True)))


def _check(out: Tensor, x_t: Tensor, sigma: np.ndarray) -> None:
    if not (np.asarray(sigma) > 0).all():
        raise ValueError(f"sigma must be positive, for v_hat is divided by it, not {np.min(sigma):g}")
    if x_t.ndim < 2 or out.shape != (*x_t.shape[:-1], NUMBERS * x_t.shape[-1]) or out.dtype != x_t.dtype \
            or out.dtype not in (np.float32, np.float64):
        raise ValueError(f"out must have {NUMBERS} numbers for each number of x_t, in its dtype, float32 or float64: "
                         f"x_t is {x_t.shape} {x_t.dtype}, out {out.shape} {out.dtype}")
