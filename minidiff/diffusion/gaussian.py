"""The Gaussian algebra of diffusion: q, its posterior, and four forms of the same prediction.

    q(x_t | x_0)      = N(alpha_t x_0, sigma_t^2 I)                                          DDPM eq. 4
    q(x_t | x_s)      = N(alpha_ts x_s, sigma2_ts I)         for any -1 <= s < t             VDM appendix A
        alpha_ts      = alpha_t / alpha_s
        sigma2_ts     = sigma_t^2 - alpha_ts^2 sigma_s^2  (beta_t, if s = t-1)
    q(x_s | x_t, x_0) = N(c_t x_t + c_0 x_0, sigma2_ts sigma_s^2 / sigma_t^2 I)              DDPM eq. 6, 7
        c_t           = alpha_ts sigma_s^2 / sigma_t^2
        c_0           = alpha_s sigma2_ts / sigma_t^2

    eps               = (x_t - alpha_t x_0) / sigma_t        the noise that was added        DDPM section 3.2
    v                 = alpha_t eps - sigma_t x_0            the velocity                    Salimans & Ho 2022
    score             = -eps / sigma_t                       grad log q(x_t | x_0)

The last three also hold for conditional means: with E[x_0 | x_t] in place of x_0 they give E[eps | x_t], E[v | x_t]
and the score of q(x_t). (The last is Tweedie's formula: the score determines the mean of x_0, and vice versa.)

(x_t, v) is (x_0, eps) rotated by the angle -arctan(sigma_t/alpha_t), so x_0 = alpha_t x_t - sigma_t v needs no
division, and holds from the clean image (t = -1) to pure noise (SNR 0). eps and the score do not: where alpha_t is 0
they do not determine x_0, and where sigma_t is 0 they are undefined. Both cases raise ValueError.

Arrays have any shape (B, ...), on the host or the GPU, float16 to float64. t is one integer for all samples, or an
array (B,). Coefficients are computed in float64 and rounded once, to x's dtype, which is also the result's.
"""

import numpy as np

from minidiff.checks import one_of
from minidiff.diffusion.schedules import Schedule
from minidiff.engine.backend import device_of, moved_together, plain, to_numpy, xp_of

Array = np.ndarray  # or cupy.ndarray
Times = int | np.ndarray

PREDICTIONS = ("eps", "x0", "v")


def per_sample(a: np.ndarray | float, x: Array) -> Array:
    """A coefficient that broadcasts with x: (B,) -> (B, 1, ..., 1), a number -> (); x's dtype and device."""
    return _per_sample(x, a)[0]


def _per_sample(x: Array, *coefficients: np.ndarray | float) -> list[Array]:
    """`per_sample` of several, which go to a GPU in one copy."""
    if plain(x) is not x:
        raise TypeError(f"x must be a plain array in the machine's byte order, got a {type(x).__name__} of {x.dtype}")
    if x.dtype.kind != "f":
        raise TypeError(f"x must be a floating-point array, got dtype {x.dtype}")
    coefficients = [np.asarray(a, x.dtype) for a in coefficients]
    for i, a in enumerate(coefficients):
        if a.ndim and a.shape != x.shape[:1]:
            raise ValueError(f"t must be one integer, or one per sample of x {x.shape}, got an array {a.shape}")
        if a.ndim:
            coefficients[i] = a.reshape(-1, *(1,) * (x.ndim - 1))  # (B, 1, ..., 1)
    return moved_together(coefficients, device_of(x))


# ---- forward ---------------------------------------------------------------------------------------------


def q_sample(schedule: Schedule, x_0: Array, t: Times, eps: Array) -> Array:
    """x_t ~ q(x_t | x_0), from standard normal eps of x_0's shape and dtype."""
    _check_alike("eps", eps, "x_0", x_0)
    alpha, sigma = _alpha_sigma(schedule, t, x_0)
    # x_t = alpha_t x_0 + sigma_t eps                                                              DDPM eq. 4
    return alpha * x_0 + sigma * eps


def q_mean_variance(schedule: Schedule, x_0: Array, t: Times) -> tuple[Array, Array]:
    """Mean (B, ...) and variance (B, 1, ..., 1) of q(x_t | x_0)."""
    return per_sample(schedule.alpha(t), x_0) * x_0, per_sample(1.0 - schedule.abar(t), x_0)


def q_step(schedule: Schedule, s: Times, t: Times) -> tuple[np.ndarray, np.ndarray]:
    """alpha_ts and sigma2_ts of q(x_t | x_s), float64, for any -1 <= s < t; ValueError where s >= t."""
    abar_s, abar_t = schedule.abar(s), schedule.abar(t)
    if not np.all(abar_s > abar_t):  # alpha_bar strictly falls, so this is s < t
        raise ValueError(f"s must be earlier than t, got s = {s} and t = {t}")
    # alpha_ts^2 = abar_t / abar_s,   sigma2_ts = sigma_t^2 - alpha_ts^2 sigma_s^2 = 1 - alpha_ts^2
    ratio = abar_t / abar_s
    return np.sqrt(ratio), 1.0 - ratio


def q_posterior_mean_variance(
    schedule: Schedule, x_0: Array, x_t: Array, t: Times, s: Times | None = None
) -> tuple[Array, Array]:
    """Mean (B, ...) and variance (B, 1, ..., 1) of q(x_s | x_t, x_0), for any -1 <= s < t (t-1 by default).

    At s = -1 the mean is x_0 and the variance 0, exactly. The variance at s = t-1 is DDPM's beta~_t.
    """
    _check_alike("x_t", x_t, "x_0", x_0)
    if s is None:
        s = to_numpy(t).astype(np.int64) - 1  # signed, so that 0 - 1 is -1
    alpha_ts, sigma2_ts = q_step(schedule, s, t)
    alpha_s, sigma2_s, sigma2_t = schedule.alpha(s), 1.0 - schedule.abar(s), 1.0 - schedule.abar(t)
    # mean = c_t x_t + c_0 x_0,   variance = sigma2_ts sigma_s^2 / sigma_t^2                    DDPM eq. 6, 7
    c_t = alpha_ts * sigma2_s / sigma2_t
    c_0 = alpha_s * (sigma2_ts / sigma2_t)  # the quotient is exactly 1 at s = -1
    variance = sigma2_ts * sigma2_s / sigma2_t
    return per_sample(c_t, x_t) * x_t + per_sample(c_0, x_0) * x_0, per_sample(variance, x_t)


# ---- divergences, in nats --------------------------------------------------------------------------------


def kl_gaussian(mean1: Array, var1: Array, mean2: Array, var2: Array) -> Array:
    """KL(N(mean1, var1) || N(mean2, var2)), in nats, elementwise; arguments broadcast, variances are > 0."""
    xp = xp_of(mean1, var1, mean2, var2)
    dtype = xp.result_type(mean1, var1, mean2, var2, 1.0)  # plain numbers do not widen float32 arrays
    mean1, var1, mean2, var2 = (xp.asarray(a, dtype=dtype) for a in (mean1, var1, mean2, var2))
    if not (xp.all(var1 > 0) and xp.all(var2 > 0)):
        raise ValueError("var1 and var2 must be positive; a Gaussian of variance 0 has no finite divergence")
    # KL = (var1/var2 - 1 - log(var1/var2) + (mean1 - mean2)^2 / var2) / 2
    log_ratio = xp.log(var1) - xp.log(var2)  # the ratio itself, and the square, may be out of range
    return 0.5 * (xp.expm1(log_ratio) - log_ratio + ((mean1 - mean2) / xp.sqrt(var2)) ** 2)


def prior_kl(schedule: Schedule, x_0: Array) -> Array:
    """L_T = KL(q(x_{T-1} | x_0) || N(0, I)), in nats, elementwise: the cost of starting from pure noise."""
    abar = schedule.abar(schedule.T - 1)
    # L_T = (abar x_0^2 - abar - log(1 - abar)) / 2                                       a term of DDPM eq. 5
    return per_sample(0.5 * abar, x_0) * x_0**2 + per_sample(0.5 * (-abar - np.log1p(-abar)), x_0)


# ---- four forms of one prediction ------------------------------------------------------------------------


def x0_from_eps(schedule: Schedule, x_t: Array, t: Times, eps: Array) -> Array:
    """Raises ValueError at SNR 0, where x_t = eps for every x_0."""
    _check_alike("eps", eps, "x_t", x_t)
    _refuse_no_signal(schedule, t, x_t)
    alpha, sigma = _alpha_sigma(schedule, t, x_t)
    # x_0 = (x_t - sigma_t eps) / alpha_t                                                         DDPM eq. 15
    return (x_t - sigma * eps) / alpha


def x0_from_v(schedule: Schedule, x_t: Array, t: Times, v: Array) -> Array:
    _check_alike("v", v, "x_t", x_t)
    alpha, sigma = _alpha_sigma(schedule, t, x_t)
    # x_0 = alpha_t x_t - sigma_t v
    return alpha * x_t - sigma * v


def x0_from_score(schedule: Schedule, x_t: Array, t: Times, score: Array) -> Array:
    """Tweedie's formula. Raises ValueError at SNR 0."""
    return x0_from_eps(schedule, x_t, t, eps_from_score(schedule, x_t, t, score))


def eps_from_x0(schedule: Schedule, x_t: Array, t: Times, x_0: Array) -> Array:
    """Raises ValueError at t = -1, where there is no noise."""
    _check_alike("x_0", x_0, "x_t", x_t)
    _refuse_no_noise(schedule, t, x_t)
    alpha, sigma = _alpha_sigma(schedule, t, x_t)
    # eps = (x_t - alpha_t x_0) / sigma_t
    return (x_t - alpha * x_0) / sigma


def eps_from_v(schedule: Schedule, x_t: Array, t: Times, v: Array) -> Array:
    _check_alike("v", v, "x_t", x_t)
    alpha, sigma = _alpha_sigma(schedule, t, x_t)
    # eps = sigma_t x_t + alpha_t v
    return sigma * x_t + alpha * v


def eps_from_score(schedule: Schedule, x_t: Array, t: Times, score: Array) -> Array:
    _check_alike("score", score, "x_t", x_t)
    # eps = -sigma_t score
    return -per_sample(schedule.sigma(t), x_t) * score


def v_from_x0(schedule: Schedule, x_t: Array, t: Times, x_0: Array) -> Array:
    """Raises ValueError at t = -1, where there is no eps."""
    _check_alike("x_0", x_0, "x_t", x_t)
    _refuse_no_noise(schedule, t, x_t)
    alpha, sigma = _alpha_sigma(schedule, t, x_t)
    # v = (alpha_t x_t - x_0) / sigma_t
    return (alpha * x_t - x_0) / sigma


def v_from_x0_eps(schedule: Schedule, x_0: Array, t: Times, eps: Array) -> Array:
    _check_alike("eps", eps, "x_0", x_0)
    alpha, sigma = _alpha_sigma(schedule, t, x_0)
    # v = alpha_t eps - sigma_t x_0                                            Salimans & Ho 2022, section 4
    return alpha * eps - sigma * x_0


def score_from_eps(schedule: Schedule, x_t: Array, t: Times, eps: Array) -> Array:
    """Raises ValueError at t = -1, where the density is a spike."""
    _check_alike("eps", eps, "x_t", x_t)
    _refuse_no_noise(schedule, t, x_t)
    # score = -eps / sigma_t
    return -eps / per_sample(schedule.sigma(t), x_t)


def score_from_x0(schedule: Schedule, x_t: Array, t: Times, x_0: Array) -> Array:
    """Raises ValueError at t = -1, where the density is a spike."""
    return score_from_eps(schedule, x_t, t, eps_from_x0(schedule, x_t, t, x_0))


# ---- a network's target, and the x_0 that its output stands for ------------------------------------------


def target(schedule: Schedule, predicts: str, x_0: Array, eps: Array, t: Times) -> Array:
    """The target of a network that predicts "eps", "x0" or "v", at x_t = q_sample(schedule, x_0, t, eps).

    Raises ValueError for "eps" at SNR 0: the loss would be small there, but eps does not determine x_0.
    """
    check_predicts(predicts)
    _check_alike("eps", eps, "x_0", x_0)
    if predicts == "x0":
        return x_0
    if predicts == "v":
        return v_from_x0_eps(schedule, x_0, t, eps)
    _refuse_no_signal(schedule, t, x_0)
    return eps


def to_x0(schedule: Schedule, predicts: str, x_t: Array, t: Times, out: Array) -> Array:
    """The estimate of x_0 that a network's output `out` stands for; the inverse of `target`."""
    check_predicts(predicts)
    _check_alike("out", out, "x_t", x_t)
    if predicts == "x0":
        return out
    if predicts == "v":
        return x0_from_v(schedule, x_t, t, out)
    return x0_from_eps(schedule, x_t, t, out)


# ---- checks ----------------------------------------------------------------------------------------------


def check_predicts(predicts: str) -> None:
    one_of("predicts", predicts, PREDICTIONS)


def _alpha_sigma(schedule: Schedule, t: Times, x: Array) -> tuple[Array, Array]:
    alpha, sigma = _per_sample(x, schedule.alpha(t), schedule.sigma(t))
    return alpha, sigma


def _check_alike(name: str, a: Array, like: str, x: Array) -> None:
    if device_of(a) != device_of(x):
        raise TypeError(f"{name} must be on {device_of(x)!r} like {like}, got one on {device_of(a)!r}")
    if a.shape != x.shape or a.dtype != x.dtype:
        raise ValueError(f"{name} must be {x.dtype} {x.shape} like {like}, got {a.dtype} {a.shape}")


def _refuse_no_signal(schedule: Schedule, t: Times, x: Array) -> None:
    if np.any(schedule.alpha(t).astype(x.dtype) == 0):
        raise ValueError(f"eps does not determine x_0 at SNR 0 (t = {t} in {x.dtype}): predict v or x0 there")


def _refuse_no_noise(schedule: Schedule, t: Times, x: Array) -> None:
    if np.any(schedule.sigma(t).astype(x.dtype) == 0):
        raise ValueError(f"t must be a time with noise, 0 or more, got {t} (in {x.dtype})")
