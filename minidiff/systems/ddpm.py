"""DDPM (Ho, Jain and Abbeel 2020, arXiv 2006.11239) and Improved DDPM (Nichol and Dhariwal 2021, arXiv 2102.09672).

    Algorithm 1, training                               Algorithm 2, sampling
    1  repeat                                           1  x_T ~ N(0, I)
    2    x_0 ~ q(x_0)                                   2  for t = T, ..., 1
    3    t ~ uniform(1, ..., T)                         3    z ~ N(0, I) if t > 1, else z = 0
    4    eps ~ N(0, I)                                  4    x_{t-1} = (x_t - w_t eps_theta(x_t, t))
    5    step on || eps - eps_theta(x_t, t) ||^2                        / sqrt(1 - beta_t) + sd_t z
    6  until converged                                  5  end for;  6  return x_0

    x_t        = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   w_t = beta_t / sqrt(1 - alpha_bar_t)
    L_simple   = E || eps - eps_theta(x_t, t) ||^2                                                  DDPM eq. 14
    variance   sd_t^2 = beta_t, right if x_0 ~ N(0, I), or beta~_t, right if x_0 is one point       DDPM section 3.2

The second paper learns where between the two it lies, and shortens the way:

    variance   exp(v log beta_t + (1 - v) log beta~_t),   v a second output of the network          Improved eq. 15
    L_hybrid   = L_simple + 0.001 L_vlb, no gradient of L_vlb reaching eps_theta                    Improved eq. 16
    schedule   cosine: alpha_bar_t = f(t)/f(0),   f(t) = cos((t/T + 0.008)/1.008 pi/2)^2            Improved eq. 17
    strided    the betas of a few long steps:   beta = 1 - alpha_bar_t / alpha_bar_s                Improved eq. 19

Unconditional: it hears no captions, and each must be ''.  (The code counts t = 0..T-1, and alpha_bar is 1 at -1.)

Its default training takes 3200 steps of 32 images: 13.4 minutes on 1 shared core of an AMD EPYC (Zen 4), 2026-11-23.

Not as in the papers:
    - eps_theta = sigma_t x_t + alpha_t F(x_t, t) with a network F, so that at noisy times, where eps is nearly x_t, it
      need not learn to copy.  The papers' eps_theta is the network itself.  After 200 steps of 32 images, the mean
      squared error of x0_hat at t = 990 (200, 600) is 0.52 (0.014, 0.098) so, and 1.63 (0.015, 0.123) as in theirs.
    - The UNet has 0.7 million weights at 14 x 14 and 7 x 7 and no dropout; theirs have 36 million and more.
    - Times are spread evenly over a batch.  L_vlb is in bits a pixel (the paper does not tell its unit), its times
      uniform; theirs are drawn by importance where L_vlb is trained on alone, which is left out.
    - Sampling takes 100 of the 1000 times.  x0_hat is clipped to [-1, 1] at each, as in Ho's program.
    - No guidance: systems/adm.py puts a classifier to it.  In-painting without training: diffusion/posterior.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from minidiff import pictures
from minidiff.data.digits import CaptionedDigits
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.gaussian import (
    eps_from_x0,
    per_sample,
    prior_kl,
    q_posterior_mean_variance,
    q_sample,
    q_step,
    to_x0,
)
from minidiff.diffusion.likelihood import DiscretisedGaussian
from minidiff.diffusion.losses import stratified_uniform
from minidiff.diffusion.samplers import State, beta, beta_tilde, checked_times, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import Schedule, check_schedule, schedule_from
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, no_grad, record, recording
from minidiff.errors import UserError
from minidiff.nn.kl import kl
from minidiff.nn.unet import UNet, UNetConfig
from minidiff.systems.system import Stage, System, check_finite, streams_for

VARIANCES = {"learned": None, "beta": 1.0, "beta_tilde": 0.0}                         # v of each; None: the network's


@dataclass(frozen=True)
class DDPMConfig:
    """Everything that makes one model; it travels in the checkpoint."""

    image_size: int = 28
    schedule: str = "cosine"                # NAME[:key=value,...] of schedules.SCHEDULES
    T: int = 1000                           # training times
    steps: int = 3200                       # of training
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(widths=(40, 80), embedding=96, out=2))  # F and v

    def __post_init__(self):
        check_schedule(self.schedule)
        if not 1 <= self.image_size <= 256 or self.image_size % self.unet.multiple:
            raise ValueError(f"image_size must be a multiple of {self.unet.multiple} of at most 256, "
                             f"not {self.image_size}")
        if self.T < 2 or self.steps < 1:
            raise ValueError(f"T must be at least 2 and steps at least 1, not {self.T} and {self.steps}")
        if self.unet.out != 2 * self.unet.channels or self.unet.text:
            raise ValueError(f"unet must have out = {2 * self.unet.channels}, for eps and v, and text = 0, not "
                             f" {self.unet.out} and {self.unet.text}")


class DDPM(System):
    """A UNet that says eps and v, and the schedule that it was trained with."""

    name, Config = "ddpm", DDPMConfig

    def __init__(self, config: DDPMConfig, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        self.schedule = schedule_from(config.schedule, config.T)
        self.log_beta, self.log_beta_tilde = log_variances(self.schedule)             # (T,) each
        self.unet = UNet(config.unet, rng)

    def forward(self, x_t: Tensor, t) -> tuple[Tensor, Tensor]:
        """eps_theta and v, each (B, H, W, C), for x_t (B, H, W, C) and times t (B,)."""
        out, C = self.unet(x_t, t), self.config.unet.channels
        alpha, sigma = (per_sample(f(t), x_t.data) for f in (self.schedule.alpha, self.schedule.sigma))
        # eps_theta = sigma_t x_t + alpha_t F(x_t, t)
        return sigma * x_t + alpha * out[..., :C], out[..., C:]

    # --- training -----------------------------------------------------------------------------------------

    def loss(self, x_0, t, eps) -> Tensor:
        """L_hybrid, a Tensor of shape ().  x_0, eps (B, H, W, C) float32; t (B,) int of 0..T-1, uniform."""
        # 5: step on || eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2   Algorithm 1
        x_t = q_sample(self.schedule, x_0, t, eps)
        eps_theta, v = self(Tensor(x_t), t)
        error = eps_theta - eps
        # L_hybrid = L_simple + 0.001 L_vlb; `.data` has no history: the mean is not L_vlb's to move
        return ops.mean(error * error) + 0.001 * ops.mean(self.vlb(x_0, x_t, t, eps_theta.data, v))

    def vlb(self, x_0, x_t, t, eps_theta, v: Tensor) -> Tensor:
        """T L_t for each pixel, (B, H, W, C), in bits: its mean over uniform t is L_vlb, but for the prior's term."""
        s = self.schedule
        x0_hat = static_threshold(to_x0(s, "eps", x_t, t, eps_theta))
        mean_q, _ = q_posterior_mean_variance(s, x_0, x_t, t)
        mean_p, _ = q_posterior_mean_variance(s, x0_hat, x_t, t)
        log_beta, log_beta_tilde = per_sample(self.log_beta[t], x_0), per_sample(self.log_beta_tilde[t], x_0)
        # log variance = v log beta_t + (1 - v) log beta~_t
        log_variance = v * log_beta + (1 - v) * log_beta_tilde
        # L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the decoder's -log p(x_0 | x_{t=0})
        decoder = -log_probability(x_0, mean_p, log_variance)
        L_t = ops.where(per_sample(t, x_0) == 0, decoder, kl(mean_q, log_beta_tilde, mean_p, log_variance))
        return self.config.T / math.log(2) * L_t

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        T = self.config.T

        def batch(rng: np.random.Generator, B: int) -> tuple:
            # 2, 3, 4: x_0 ~ q(x_0),  t ~ uniform,  eps ~ N(0, I)                                   Algorithm 1
            x_0 = data.x_0[rng.integers(0, len(data.x_0), B)]
            t = np.minimum((T * stratified_uniform(rng, B)).astype(np.int64), T - 1)
            return x_0, t, rng.standard_normal(x_0.shape, dtype=np.float32)

        yield Stage("diffusion", self.unet, batch, self.loss, self.config.steps, size=32,
                    draw=lambda: pictures.sheet(self.sample([""] * 16, steps=min(25, T)), columns=8))

    # --- the network as a denoiser --------------------------------------------------------------------------

    def both(self, x_t, t) -> tuple[np.ndarray, np.ndarray]:
        """eps_theta and v as arrays (B, H, W, C), on all cores."""
        def one(part: slice):
            with no_grad():
                return [a.data for a in self(Tensor(x_t[part]), t[part])]
        eps, v = zip(*parallel_map(one, shards(len(x_t))), strict=True)
        return np.concatenate(eps), np.concatenate(v)

    def predict(self, x_t, t, cond=None) -> np.ndarray:
        """eps_theta for arrays x_t (B, H, W, C), t (B,); cond is not heard."""
        return self.both(x_t, t)[0]

    def predict_vjp(self, x_t, t, dy, cond=None) -> tuple[np.ndarray, np.ndarray]:
        """What `predict` gives, and dy^T d predict / d x_t, of x_t's shape."""
        def one(part: slice):
            x = Tensor(x_t[part], requires_grad=True)
            with recording():
                eps, _ = self(x, t[part])
            return eps.data, gradients(eps, [x], dy[part])[0]
        ys, dxs = zip(*parallel_map(one, shards(len(x_t))), strict=True)
        return np.concatenate(ys), np.concatenate(dxs)

    def unguided(self) -> NetworkDenoiser:
        """(x_t, t) -> x0_hat as the network says it, unclipped, with its derivative."""
        return NetworkDenoiser(self.schedule, "eps", self.predict, network_vjp=self.predict_vjp)

    # --- sampling -----------------------------------------------------------------------------------------

    def sample(self, captions: Sequence[str], *, seed: int = 0, streams: SampleStreams | None = None, steps: int = 100,
               variance: str = "learned") -> np.ndarray:
        """Images (B, 28, 28, 1) in [-1, 1], one for each caption, which must be ''; sample i from stream (seed, i).

        steps: how many of the T times, evenly spread.  variance: "learned", "beta" or "beta_tilde".
        """
        return last(self.trajectory(captions, seed=seed, streams=streams, steps=steps, variance=variance))

    def trajectory(self, captions: Sequence[str], *, seed: int = 0, streams: SampleStreams | None = None, steps: int = 100,
                   variance: str = "learned") -> Iterator[State]:
        """Every state from x_T to x_0, each with its x0_hat (progressive generation, DDPM section 4.3)."""
        streams, size = streams_for(captions, seed, streams), self.config.image_size
        if any(caption.strip() for caption in captions):
            raise UserError("ddpm draws whatever it likes: give '' for a caption (minidiff sample --system ddpm ''), "
                            "or let a classifier guide it toward a caption's digit (the system adm).")
        # 1: x_T ~ N(0, I)                                                                          Algorithm 2
        x_T = streams.normal((size, size, self.config.unet.channels))
        yield from self.reverse(x_T, times(self.schedule, steps), streams=streams, variance=variance)

    def reverse(self, x_t, path: Sequence[int], *, streams: SampleStreams, variance: str = "learned") -> Iterator[State]:
        """Algorithm 2 from x_t (B, H, W, C) at the time path[0] down a strictly falling list of times, and to -1."""
        s = self.schedule
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, not {variance!r}")
        path = checked_times(path, range(s.T), f"within {s.T - 1}..0")
        # 2: for t = T, ..., 1; here, for t and the time r that comes after it in the list
        for step, (t, r) in enumerate(pairwise([*path, -1]), start=1):
            eps_theta, v = self.both(x_t, np.full(len(x_t), t))
            x0_hat = static_threshold(to_x0(s, "eps", x_t, t, eps_theta))
            eps_theta = eps_from_x0(s, x_t, t, x0_hat)      # as x0_hat was clipped
            # beta of this step, however long:  1 - alpha_bar_t / alpha_bar_r                       Improved eq. 19
            root, beta_t = (float(a) for a in q_step(s, r, t))                        # root = sqrt(1 - beta)
            # 4: x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(1 - beta_t) + sd_t z
            x_t = (x_t - beta_t / float(s.sigma(t)) * eps_theta) / root
            # 3: z ~ N(0, I) if t > 1, else z = 0
            if r >= 0:
                v = v if variance == "learned" else np.full_like(v, VARIANCES[variance])
                # sd^2 = exp(v log beta + (1 - v) log beta~)                                        Improved eq. 15
                sd = np.exp(0.5 * (v * math.log(beta(s, t, r)) + (1 - v) * math.log(beta_tilde(s, t, r))))
                x_t = x_t + sd * streams.normal(x_t.shape[1:], x_t.dtype)
            else:
                x_t = static_threshold(check_finite(x_t))   # rounding may have left [-1, 1]
            yield State(step, r, x_t, x0_hat)

    def interpolate(self, x_0, x_0_other, lambdas: Sequence[float], *, t: int = 500, steps: int = 50,
                    seed: int = 0, variance: str = "learned") -> np.ndarray:
        """Images (L, H, W, C) between two (H, W, C), mixed as noised images at time t (DDPM section 4.3, figure 8).

            x_t, x_t' ~ q(x_t | x_0), q(x_t | x_0'),   x-_t = (1 - lambda) x_t + lambda x_t',   x-_0 ~ p(x_0 | x-_t)

        The noise is the same for all lambdas of 0..1, that of x_t and x_t' and that of the steps.
        """
        lambdas = np.asarray(lambdas, np.float32)
        if lambdas.ndim != 1 or not len(lambdas) or not ((0 <= lambdas) & (lambdas <= 1)).all():
            raise ValueError(f"lambdas must be numbers of 0..1, such as [0, 0.5, 1], not {lambdas}")
        ends = np.stack([x_0, x_0_other])
        x_t, other = q_sample(self.schedule, ends, t, SampleStreams(seed, 2).normal(ends.shape[1:]))
        mix = lambdas[:, None, None, None]
        x_t = (1 - mix) * x_t + mix * other                                           # (L, H, W, C)
        if not 1 <= steps <= t + 1:
            raise ValueError(f"steps must be within 1..{t + 1}, the times up to t, not {steps}")
        path = np.round(np.linspace(t, 0, steps)).astype(int) if steps > 1 else [t]
        streams = SampleStreams.from_seeds([seed + 1] * len(lambdas))
        return last(self.reverse(x_t, path, streams=streams, variance=variance))

    # --- what it is worth ---------------------------------------------------------------------------------

    def bits_per_dim(self, x_0, *, seed: int = 0, terms: int = 1000, variance: str = "learned") -> np.ndarray:
        """L_vlb of images x_0 (B, H, W, C) of 8-bit values, (B,): with `terms` of T a noisier, unbiased estimate."""
        T, B = self.config.T, len(x_0)
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, not {variance!r}")
        if not 1 <= terms <= T:
            raise ValueError(f"terms must be within 1..{T}, the number of times, not {terms}")
        streams = SampleStreams(seed, B)
        total = prior_kl(self.schedule, x_0.astype(np.float64)).reshape(B, -1).mean(1) / math.log(2)
        for k in range(terms):
            t = np.minimum((T * (k + streams.uniform()) / terms).astype(np.int64), T - 1)
            eps = streams.normal(x_0.shape[1:])
            x_t = q_sample(self.schedule, x_0, t, eps)
            eps_theta, v = self.both(x_t, t)
            v = v if variance == "learned" else np.full_like(v, VARIANCES[variance])
            total += self.vlb(x_0, x_t, t, eps_theta, Tensor(v)).data.reshape(B, -1).mean(1) / terms
        return total


# --- Algorithm 2's numbers --------------------------------------------------------------------------------------

def log_variances(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """log beta_t and log beta~_t, (T,) each; beta~_0 is 0, and reads as beta~_1 (Improved DDPM's program)."""
    t = np.maximum(np.arange(schedule.T), 1)
    return np.log(schedule.betas), np.log([beta_tilde(schedule, int(i), int(i) - 1) for i in t])


def step_weights(schedule: Schedule, path: Sequence[int]) -> np.ndarray:
    """Why Algorithm 2 takes noise away and then adds some: for each time in a sampler's list a row of

        1 / sqrt(1 - beta)      by which x_t grows
        removed                 the factor of eps_theta, with that:  beta / (sqrt(1 - alpha_bar_t) sqrt(1 - beta))
        added                   the factor of z:  sqrt(beta), and sqrt(beta~)

    (N, 4) float64.  From noise of size sigma_t, scaled and less `removed`, what is left and what is added, of variance
    beta~, have the size sigma_s together if eps_theta is right:
    (sigma_t / sqrt(1 - beta) - removed)^2 + beta~ = sigma_s^2.
    """
    path = checked_times(path, range(schedule.T), f"within {schedule.T - 1}..0")
    rows = []
    for t, s in pairwise([*path, -1]):
        b = beta(schedule, t, s)
        rows.append((1 / math.sqrt(1 - b), b / (float(schedule.sigma(t)) * math.sqrt(1 - b)),
                     math.sqrt(b) if s >= 0 else 0, math.sqrt(beta_tilde(schedule, t, s))))
    return np.array(rows)


def log_probability(x_0, mean, log_variance: Tensor) -> Tensor:
    """log P of 8-bit values x_0 under N(mean, variance), pixel by pixel, with a gradient for the variance alone."""
    decoder = DiscretisedGaussian(np.exp(0.5 * log_variance.data.astype(np.float64)))
    # d log P / d log variance = 1/2 d log P / d log sigma
    slope = 0.5 * decoder.slope(x_0, mean)
    return record(decoder(x_0, mean).astype(x_0.dtype), (log_variance,), lambda dy: ((dy * slope).astype(dy.dtype),))
