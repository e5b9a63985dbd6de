"""Exercise 24: a diffusion model of points in the plane, judged by the exact denoiser of the mixture they come from.

The points are drawn from five Gaussians on a circle.  So E[eps | x_t] is known, and what a training with a known bug
learns is known, too: the minimiser of its loss.  A network has that bug if it is close to that minimiser.
"""

from functools import lru_cache

import numpy as np

from minidiff.course.compare import differs, misshapen, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.schedules import linear
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.layers import Linear, sinusoidal_embedding
from minidiff.nn.optim import AdamW, WarmupCosine

SCHEDULE = linear(T=100, beta_min=1e-3, beta_max=0.2)
WEIGHTS = np.array([0.1, 0.15, 0.2, 0.25, 0.3])
CENTRES = 1.2 * np.stack([np.cos(2 * np.pi * np.arange(5) / 5), np.sin(2 * np.pi * np.arange(5) / 5)], axis=1)  # (5, 2)
SPREAD = 0.15
EXACT = MixtureDenoiser(SCHEDULE, WEIGHTS, CENTRES, np.full(5, SPREAD**2))


def points(rng: np.random.Generator, count: int) -> np.ndarray:
    """Data (count, 2) float32."""
    k = rng.choice(5, count, p=WEIGHTS)
    return (CENTRES[k] + SPREAD * rng.standard_normal((count, 2))).astype(np.float32)


def solution(points, alpha_bar, rng):
    layers = [Linear(C, D, rng) for C, D in ((2 + 32, 128), (128, 128), (128, 128), (128, 2))]
    weights = {f"{i}.{name}": w for i, layer in enumerate(layers) for name, w in layer.parameters().items()}
    optimiser, steps = AdamW(weights), 3000
    lr = WarmupCosine(3e-3, steps)

    def network(x_t, t):
        h = Tensor(np.concatenate([x_t, sinusoidal_embedding(t, 32)], axis=1))        # (B, 2 + 32)
        for layer in layers[:-1]:
            h = ops.silu(layer(h))                                                    # (B, 128)
        return layers[-1](h)

    for step in range(steps):
        x_0, t = points[rng.integers(0, len(points), 256)], rng.integers(0, len(alpha_bar), 256)
        eps = rng.standard_normal(x_0.shape, np.float32)
        abar = alpha_bar[t, None].astype(np.float32)
        # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   loss = mean ||eps - eps_hat||^2     DDPM eq. 14
        loss = ops.mean((network(np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps, t) - eps) ** 2)
        optimiser.step(gradients(loss, list(weights.values())), lr(step))
    return lambda x_t, t: network(x_t.astype(np.float32), np.asarray(t)).data


# ---- laws --------------------------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def _trained(train):
    """What the answer learns from 4000 points: once for all laws."""
    rng = stream(24, 1)
    return train(points(rng, 4000), np.array(SCHEDULE.alpha_bar), rng)


def _noised(rng, count):
    """x_t (count, 2) float32 at random times t, and E[eps | x_t], as t and x_t say."""
    t = rng.integers(0, SCHEDULE.T, count)
    x_t = (SCHEDULE.alpha(t)[:, None] * points(rng, count)
           + SCHEDULE.sigma(t)[:, None] * rng.standard_normal((count, 2))).astype(np.float32)
    return x_t, t, _eps(EXACT, x_t, t)


def _eps(denoiser, x_t, t):
    """E[eps | x_t] = (x_t - alpha E[x_0 | x_t]) / sigma."""
    x = np.asarray(x_t, np.float64)
    return (x - SCHEDULE.alpha(t)[:, None] * denoiser(x, t)) / SCHEDULE.sigma(t)[:, None]


def gives_a_function(train):
    """eps_hat gives finite numbers of x_t's shape, and each row depends on itself alone"""
    eps_hat = _trained(train)
    if not callable(eps_hat):
        return "train should return a function (x_t, t) -> eps_hat, and does not"
    x_t, t, _ = _noised(stream(24, 2), 40)
    got = eps_hat(x_t, t)
    if (said := misshapen("eps_hat", got, (40, 2), "for x_t of shape (40, 2)")):
        return said
    return differs("eps_hat of the first three rows", eps_hat(x_t[:3], t[:3]), got[:3], "against the batch of 40",
                   tolerance=1e-3)


def close_to_the_exact_noise(train):
    """the mean squared distance from the exact E[eps | x_t] is at most a tenth of the best linear denoiser's"""
    x_t, t, exact = _noised(stream(24, 3), 2000)
    got, most = _trained(train)(x_t, t), ((_linear_eps(x_t, t) - exact) ** 2).mean() / 10
    if (said := misshapen("eps_hat", got, exact.shape, "for x_t of shape (2000, 2)")):
        return said
    distance = ((got - exact) ** 2).mean()
    if not distance <= most:
        worst = max(((float(((got - exact)[part] ** 2).mean()), first) for first in range(0, 100, 20)
                     if (part := (t >= first) & (t < first + 20)).any()), default=(distance, 0))
        return f"the distance is {distance:.4g} and should be at most {most:.4g}; it is largest, " \
               f"{worst[0]:.4g}, at the times {worst[1]} to {worst[1] + 19}"


def samples_the_data(train):
    """of 1000 samples by 50 steps of DDIM, nine in ten lie within 3 spreads of a centre, and each centre's share is
    right within 0.07, which is 4.8 standard deviations or more of such a share"""
    eps_hat, x = _trained(train), stream(24, 4).standard_normal((1000, 2)).astype(np.float32)
    times = list(range(SCHEDULE.T - 1, -1, -2))
    for t, s in zip(times, [*times[1:], -1], strict=True):
        e = np.asarray(eps_hat(x, np.full(len(x), t)))
        x_0 = (x - float(SCHEDULE.sigma(t)) * e) / float(SCHEDULE.alpha(t))
        x = (float(SCHEDULE.alpha(s)) * x_0 + float(SCHEDULE.sigma(s)) * e).astype(np.float32)
    distance = np.sqrt(((x[:, None] - CENTRES) ** 2).sum(-1))                         # (1000, 5)
    near = (distance.min(1) < 3 * SPREAD).mean()
    if not near >= 0.9:
        return f"{near:.1%} of the samples lie within 3 spreads of a centre, and should be at least 90%"
    shares = np.bincount(distance.argmin(1), minlength=5) / len(x)
    if (np.abs(shares - WEIGHTS) > 0.07).any():
        return f"the shares of the centres are {shares.round(3).tolist()} and should be {WEIGHTS.tolist()}"


# ---- known wrong answers: what a training with a bug learns ------------------------------------------------

def _learns(eps):
    """The answer that learns this function of (x_t, t)."""
    return lambda x_t, t: eps(np.asarray(x_t, np.float64), np.asarray(t)).astype(np.float32)


def _linear_eps(x_t, t):
    mean = WEIGHTS @ CENTRES
    cov = (CENTRES - mean).T @ np.diag(WEIGHTS) @ (CENTRES - mean) + SPREAD**2 * np.eye(2)
    return _eps(GaussianDenoiser(SCHEDULE, mean, cov), x_t, t)


def _ideal(points, alpha_bar, rng):
    return _learns(lambda x_t, t: _eps(EXACT, x_t, t))


def _linear(points, alpha_bar, rng):
    return _learns(_linear_eps)


def _x0(points, alpha_bar, rng):
    return _learns(lambda x_t, t: EXACT(x_t, t))


def _velocity(points, alpha_bar, rng):
    return _learns(lambda x_t, t: SCHEDULE.alpha(t)[:, None] * _eps(EXACT, x_t, t)
                   - SCHEDULE.sigma(t)[:, None] * EXACT(x_t, t))


def _minus_eps(points, alpha_bar, rng):
    return _learns(lambda x_t, t: -_eps(EXACT, x_t, t))


def _nothing(points, alpha_bar, rng):
    return _learns(lambda x_t, t: 0 * x_t)


def _mixture(x_t, alpha, sigma):
    """log p(x_t), but for a constant, and E[eps | x_t] of x_t = alpha x_0 + sigma eps.  alpha, sigma: (B,) or (T,) with
    x_t (B, 1, 2); the results have the shape that they have with x_t's rows."""
    V = (alpha * SPREAD) ** 2 + sigma**2
    d = x_t[..., None, :] - alpha[..., None, None] * CENTRES                          # (..., 5, 2)
    log_r = np.log(WEIGHTS) - (d**2).sum(-1) / (2 * V[..., None])                     # (..., 5)
    top = log_r.max(-1, keepdims=True)
    r = np.exp(log_r - top)
    total = r.sum(-1, keepdims=True)
    # E[eps | x_t, k] = sigma (x_t - alpha mu_k) / V
    return (top + np.log(total))[..., 0] - np.log(V), ((r / total)[..., None] * d).sum(-2) * (sigma / V)[..., None]


def _trained_on(alpha, sigma):
    """What is learned from x_t = alpha x_0 + sigma eps with other alpha and sigma (T,): E[eps | x_t] of that."""
    return _learns(lambda x_t, t: _mixture(x_t, alpha[t], sigma[t])[1])


def _blind_to_t(points, alpha_bar, rng):
    def eps(x_t, t):
        log_p, at_all = _mixture(x_t[:, None], np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))       # (B, T), (B, T, 2)
        share = np.exp(log_p - log_p.max(1, keepdims=True))                           # p(t | x_t), but for a factor
        return (share[..., None] * at_all).sum(1) / share.sum(1, keepdims=True)
    return _learns(eps)


def _variance_for_deviation(points, alpha_bar, rng):
    return _trained_on(np.sqrt(alpha_bar), 1 - alpha_bar)


def _no_root_of_the_signal(points, alpha_bar, rng):
    return _trained_on(alpha_bar, np.sqrt(1 - alpha_bar))


def _one_step(points, alpha_bar, rng):
    step = alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])
    return _trained_on(np.sqrt(step), np.sqrt(1 - step))


def _times_reversed(points, alpha_bar, rng):
    return _learns(lambda x_t, t: _eps(EXACT, x_t, SCHEDULE.T - 1 - t))


def probe(train):
    x_t, t, _ = _noised(stream(24), 1000)
    return np.asarray(_trained(train)(x_t, t), np.float64)


def same(a, b) -> bool:
    """Whether two trainings learned one thing, to the accuracy of a network."""
    return np.shape(a) == np.shape(b) and bool(((a - b) ** 2).mean() < 0.008)


EXERCISE = Exercise(
    title="Train a diffusion model of points in the plane", answer="train", minutes=180, chapter="03_denoiser",
    hint="Give the network t as sinusoidal_embedding(t, 32) beside x_t. Draw a new t and a new eps for every point "
         "of every batch. Print the loss: it should fall to about 0.18, and a linear function would reach 0.24. If "
         "it stays near 1, the network learns nothing.",
    solution=solution, place="minidiff/course/ex24_diffusion_in_2d.py solution", seconds=600,
    laws=(gives_a_function, close_to_the_exact_noise, samples_the_data), probe=probe, same=same, ideal=_ideal,
    wrong=(
        Wrong(_linear, "it learned the best linear function of x_t: a network needs a nonlinearity between its "
                       "layers"),
        Wrong(_x0, "it learned to predict x_0: the target of the loss is eps"),
        Wrong(_velocity, "it learned to predict v: the target of the loss is eps"),
        Wrong(_minus_eps, "it learned -eps: look for a minus in x_t or in the target"),
        Wrong(_nothing, "it gives 0 everywhere, so it learned nothing: do the updates reach the weights?"),
        Wrong(_blind_to_t, "it learned the mean over all times: the network does not see t"),
        Wrong(_variance_for_deviation, "it was trained with noise of the size 1 - alpha_bar_t: the size is sqrt(1 - "
                                       "alpha_bar_t)"),
        Wrong(_no_root_of_the_signal, "it was trained with alpha_bar_t x_0 in place of sqrt(alpha_bar_t) x_0"),
        Wrong(_one_step, "it was trained with the noise of a single step: x_t has that of all the steps up to t"),
        Wrong(_times_reversed, "it learned the times in reverse: t = 0 has the least noise"),
    ))
