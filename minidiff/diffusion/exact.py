"""Exact denoisers: E[x_0 | x_t] in closed form, for three kinds of data. Models without training error, for tests.

    x_0 ~ N(mu, S)                  x0_hat = mu + alpha S V^-1 (x_t - alpha mu),   V = alpha^2 S + sigma^2 I
    x_0 ~ sum_k w_k N(mu_k, S_k)    x0_hat = sum_k r_k x0_hat_k,                   r_k = p(k | x_t)
    x_0 uniform on x_1 ... x_N      x0_hat = sum_i softmax_i(-||x_t - alpha x_i||^2 / 2 sigma^2) x_i

x0_hat_k is the first line for component k. Each also has `vjp`, the product of a vector with J = d x0_hat / d x_t; here
J = alpha/sigma^2 Cov[x_0 | x_t] (Tweedie's formula, differentiated), which is symmetric.
"""

from __future__ import annotations

import math

import numpy as np

from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import to_numpy, xp_of


class GaussianDenoiser:
    """Exact for x_0 ~ N(mean, cov).

    mean: the shape of one sample, D numbers in all. cov: a variance for each dimension, of mean's shape; or
    (D, D), symmetric and with no negative eigenvalue. Computed in float64, returned in x_t's dtype.
    """

    predicts = "x0"

    def __init__(self, schedule: Schedule, mean, cov):
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
        D = mean.size
        self.schedule = schedule
        self.shape = mean.shape                             # of one sample
        self.mean = mean.reshape(D)                         # (D,)
        _check_covariance(mean, cov)
        if cov.shape == mean.shape:
            self.variance, self.basis = cov.reshape(D), None
        else:
            # S = basis diag(variance) basis^T: one eigendecomposition serves every t
            self.variance, self.basis = np.linalg.eigh(cov)                           # (D,), (D, D)
            self.variance[abs(self.variance) < 1e-12 * abs(self.variance).max(initial=0)] = 0
        _check_no_negative(self.variance)

    def __call__(self, x_t, t, cond=None):
        x, alpha, sigma = _rows(self.schedule, x_t, t, self.shape)                    # (B, D), (B, 1) twice
        mean = xp_of(x_t).asarray(self.mean)
        # x0_hat = mu + alpha S V^-1 (x_t - alpha mu),  V = alpha^2 S + sigma^2 I
        return (mean + self._gain(x - alpha * mean, alpha, sigma)).reshape(x_t.shape).astype(x_t.dtype)

    def vjp(self, x_t, t, dy, cond=None):
        """(x0_hat, J dy), as `Differentiable` says."""
        xp_of(x_t, dy)                                      # refuses two devices; no operation below has both
        # J = alpha S V^-1, the same at every x_t
        J_dy = self._gain(*_rows(self.schedule, dy, t, self.shape))
        return self(x_t, t), J_dy.reshape(x_t.shape).astype(x_t.dtype)

    def _gain(self, d, alpha, sigma):
        """alpha S V^-1 d, for rows d (B, D)."""
        xp = xp_of(d)
        variance = xp.asarray(self.variance)
        d = d if self.basis is None else d @ xp.asarray(self.basis)
        d = alpha * variance / (alpha**2 * variance + sigma**2) * d
        return d if self.basis is None else d @ xp.asarray(self.basis).T


class MixtureDenoiser:
    """Exact for x_0 ~ sum_k w_k N(mu_k, S_k), S_k diagonal.

    weights: (K,), positive, of sum 1. means: (K, ...). variances: (K,), one for all dimensions of a component, or
    (K, ...). The condition is None, or `(allowed,)` with booleans (B, K): the components that a sample may come from.
    "y is 3" is a row with one True, and the null condition a row of True. Memory is proportional to B x K x D.
    Computed in float64; x0_hat and score are returned in x_t's dtype.
    """

    predicts = "x0"

    def __init__(self, schedule: Schedule, weights, means, variances):
        weights, means, variances = (np.asarray(a, np.float64) for a in (weights, means, variances))
        K = len(means)
        _check_mixture(weights, means, variances)
        self.schedule = schedule
        self.shape = means.shape[1:]
        self.log_weights = np.log(weights)                                            # (K,)
        self.means = means.reshape(K, -1)                                             # (K, D)
        self.variances = variances.reshape(K, -1) + np.zeros_like(self.means)         # (K, D)

    def __call__(self, x_t, t, cond=None):
        x0_hat_k, _, r = self._means(x_t, t, cond)
        # x0_hat = sum_k r_k x0_hat_k
        return (r * x0_hat_k).sum(1).reshape(x_t.shape).astype(x_t.dtype)

    def vjp(self, x_t, t, dy, cond=None):
        """(x0_hat, J dy), as `Differentiable` says."""
        x0_hat_k, gain_k, r = self._means(x_t, t, cond)                               # (B, K, D) twice, (B, K, 1)
        dy, alpha, sigma = _rows(self.schedule, dy, t, self.shape)                    # (B, D), (B, 1) twice
        x0_hat = (r * x0_hat_k).sum(1)                                                # (B, D)
        # J dy = sum_k r_k (J_k dy + alpha/sigma^2 (m_k - m) (m_k - m)^T dy),   m_k = x0_hat_k,  m = x0_hat:
        # the covariance within components, and that between them
        d_k = x0_hat_k - x0_hat[:, None]                                              # (B, K, D)
        between = (r * d_k * (d_k * dy[:, None]).sum(-1, keepdims=True)).sum(1)       # (B, D)
        J_dy = (r * gain_k).sum(1) * dy + alpha / sigma**2 * between
        return x0_hat.reshape(x_t.shape).astype(x_t.dtype), J_dy.reshape(x_t.shape).astype(x_t.dtype)

    def _means(self, x_t, t, cond):
        """x0_hat_k (B, K, D), J_k = alpha S_k V_k^-1 (B, K, D) and r_k (B, K, 1)."""
        xp = xp_of(x_t)
        d, V, alpha, r = self._components(x_t, t, cond)
        # x0_hat_k = mu_k + alpha S_k V_k^-1 (x_t - alpha mu_k)
        gain = alpha * xp.asarray(self.variances) / V
        return xp.asarray(self.means) + gain * d, gain, r[..., None]

    def score(self, x_t, t, cond=None):
        """grad log p_t(x_t), of x_t's shape."""
        d, V, _, r = self._components(x_t, t, cond)
        # grad log p_t = sum_k r_k grad log N(x_t; alpha mu_k, V_k)
        return (r[..., None] * -d / V).sum(1).reshape(x_t.shape).astype(x_t.dtype)

    def posterior(self, x_t, t, cond=None):
        """r_k = p(k | x_t), the responsibilities: (B, K), rows of sum 1."""
        return self._components(x_t, t, cond)[-1]

    def log_prob(self, x_t, t, cond=None):
        """log p_t(x_t), in nats: (B,)."""
        xp = xp_of(x_t)
        joint, log_w = self._log_joint(x_t, t, cond)[-2:]
        return _logsumexp(xp, joint) - _logsumexp(xp, log_w)

    def _components(self, x_t, t, cond):
        """x_t - alpha mu_k (B, K, D), V_k (B, K, D), alpha (B, 1, 1), and the responsibilities r (B, K)."""
        xp = xp_of(x_t)
        d, V, alpha, joint, _ = self._log_joint(x_t, t, cond)
        # r_k = w_k N(x_t; alpha mu_k, V_k) / sum_j w_j N(x_t; alpha mu_j, V_j)
        return d, V, alpha, xp.exp(joint - _logsumexp(xp, joint)[:, None])

    def _log_joint(self, x_t, t, cond):
        xp = xp_of(x_t)
        x, alpha, sigma = (a[:, None, :] for a in _rows(self.schedule, x_t, t, self.shape))  # (B, 1, D or 1)
        d = x - alpha * xp.asarray(self.means)                                        # (B, K, D)
        V = alpha**2 * xp.asarray(self.variances) + sigma**2                          # (B, K, D)
        # log w_k + log N(x_t; alpha mu_k, V_k)
        log_w = self._log_weights(xp, len(x), cond)                                   # (B, K)
        return d, V, alpha, log_w - 0.5 * (d * d / V + xp.log(2 * math.pi * V)).sum(-1), log_w

    def _log_weights(self, xp, B: int, cond):
        log_w = xp.asarray(self.log_weights) + xp.zeros((B, 1))
        if cond is None:
            return log_w
        allowed, = cond
        _check_allowed(allowed, log_w.shape)
        return xp.where(allowed, log_w, -math.inf)


class DatasetDenoiser:
    """Exact for x_0 uniform on the rows of data (N, ...): the limit of a network that memorises them.

    It is attention, with the part of -||x_t - alpha x_i||^2 / 2 sigma^2 that depends on i:

        x0_hat = softmax(Q K^T + b) V
        Q = alpha x_t / sigma^2,   K = V = data,   b_i = -alpha^2 ||x_i||^2 / 2 sigma^2

    Karras et al. 2022, appendix B.3, derive it. Computed in float64 (the logits reach 10^7 at small sigma), returned in
    x_t's dtype.
    """

    predicts = "x0"

    def __init__(self, schedule: Schedule, data):
        data = np.asarray(data, np.float64)
        _check_data(data)
        self.schedule = schedule
        self.shape = data.shape[1:]
        self.data = data.reshape(len(data), -1)                                       # (N, D)
        self.centre = self.data.mean(0)                     # far from 0, the logits would lose their digits
        self.half_norm2 = ((self.data - self.centre)**2).sum(1) / 2                   # (N,)

    def __call__(self, x_t, t, cond=None):
        # x0_hat = softmax(Q K^T + b) V
        return (self._weights(x_t, t) @ xp_of(x_t).asarray(self.data)).reshape(x_t.shape).astype(x_t.dtype)

    def vjp(self, x_t, t, dy, cond=None):
        """(x0_hat, J dy), as `Differentiable` says."""
        data, w = xp_of(x_t).asarray(self.data), self._weights(x_t, t)                # (N, D), (B, N)
        dy, alpha, sigma = _rows(self.schedule, dy, t, self.shape)                    # (B, D), (B, 1) twice
        x0_hat = w @ data                                                             # (B, D)
        # J dy = alpha/sigma^2 sum_i w_i x_i (x_i - x0_hat)^T dy
        along = dy @ data.T - (x0_hat * dy).sum(1, keepdims=True)                     # (B, N)
        J_dy = alpha / sigma**2 * ((w * along) @ data)
        return x0_hat.reshape(x_t.shape).astype(x_t.dtype), J_dy.reshape(x_t.shape).astype(x_t.dtype)

    def _weights(self, x_t, t):
        """softmax(Q K^T + b) = p(row i of data | x_t), (B, N)."""
        xp = xp_of(x_t)
        x, alpha, sigma = _rows(self.schedule, x_t, t, self.shape)                    # (B, D), (B, 1) twice
        centre = xp.asarray(self.centre)
        x, K = x - alpha * centre, xp.asarray(self.data) - centre
        # Q = alpha x_t / sigma^2,  b_i = -alpha^2 ||x_i||^2 / 2 sigma^2
        Q, b = alpha / sigma**2 * x, -(alpha / sigma) ** 2 * xp.asarray(self.half_norm2)    # (B, D), (B, N)
        logits = Q @ K.T + b                                                          # (B, N)
        return xp.exp(logits - _logsumexp(xp, logits)[:, None])


def _rows(schedule: Schedule, x_t, t, shape: tuple[int, ...]):
    """x_t as float64 rows (B, D), with alpha and sigma as columns (B, 1) on the same device."""
    xp, t = xp_of(x_t), to_numpy(t)
    _check_samples(x_t, t, shape)
    alpha, sigma = xp.asarray(schedule.alpha(t)), xp.asarray(schedule.sigma(t))
    return x_t.reshape(len(x_t), math.prod(shape)).astype(xp.float64), alpha[:, None], sigma[:, None]


def _logsumexp(xp, a):
    """log sum_k e^{a_k} over the last axis; every row has a finite entry."""
    top = a.max(-1)
    return top + xp.log(xp.exp(a - top[..., None]).sum(-1))


# ---- checks ------------------------------------------------------------------------------------------------

def _check_covariance(mean: np.ndarray, cov: np.ndarray) -> None:
    D = mean.size
    if cov.shape != mean.shape and not (cov.shape == (D, D) and np.allclose(cov, cov.T)):
        raise ValueError(f"cov must have mean's shape {mean.shape}, or be symmetric of shape {(D, D)}, "
                         f"got shape {cov.shape}")


def _check_no_negative(variance: np.ndarray) -> None:
    if not ((variance >= 0) & (variance < np.inf)).all():
        raise ValueError(f"cov must be finite and have no negative variance, got {variance.min():g}")


def _check_mixture(weights: np.ndarray, means: np.ndarray, variances: np.ndarray) -> None:
    K = len(means)
    if weights.shape != (K,) or not (weights > 0).all() or not math.isclose(weights.sum(), 1):
        raise ValueError(f"weights must be {K} positive numbers of sum 1, one per mean, got {weights}")
    if variances.shape not in ((K,), means.shape) or not (variances >= 0).all():
        raise ValueError(f"variances must be at least 0 and of shape {(K,)} or {means.shape}, "
                         f"got shape {variances.shape}")


def _check_allowed(allowed, shape: tuple[int, int]) -> None:
    if allowed.shape != shape or not allowed.any(axis=1).all():
        raise ValueError(f"cond must be (allowed,), booleans {shape} with a True in every row, got {allowed!r}")


def _check_data(data: np.ndarray) -> None:
    if data.ndim < 2 or len(data) == 0:
        raise ValueError(f"data must be samples along axis 0, (N, ...) with N >= 1, got {data.shape}")


def _check_samples(x_t, t: np.ndarray, shape: tuple[int, ...]) -> None:
    if x_t.shape[1:] != shape:
        raise ValueError(f"x_t must be samples of the data's shape {shape} along axis 0, got {x_t.shape}")
    if t.shape != x_t.shape[:1] or (t < 0).any():
        raise ValueError(f"t must be {len(x_t)} times in 0..T-1, one for each sample of x_t, got {t}")
