"""DDPM (Ho et al. 2020, arXiv 2006.11239) and Improved DDPM (Nichol & Dhariwal 2021, arXiv 2102.09672).

    DDPM algorithm 1, training                          DDPM algorithm 2, sampling
    1  repeat                                           1  x_T ~ N(0, I)
    2    x_0 ~ q(x_0)                                   2  for t = T, ..., 1
    3    t ~ uniform(1, ..., T)                         3    z ~ N(0, I) if t > 1, else z = 0
    4    eps ~ N(0, I)                                  4    x_{t-1} = (x_t - w_t eps_theta(x_t, t))
    5    step on || eps - eps_theta(x_t, t) ||^2                        / sqrt(1 - beta_t) + sd_t z
    6  until converged                                  5  end for;  6  return x_0

    x_t        = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   w_t = beta_t / sqrt(1 - alpha_bar_t)
    L_simple   = E || eps - eps_theta(x_t, t) ||^2                                                  DDPM eq. 14
    variance   sd_t^2 = beta_t, right if x_0 ~ N(0, I), or beta~_t, right if x_0 is one point       DDPM section 3.2

The second paper learns a variance between these two, and takes fewer steps:

    variance   exp(mix log beta_t + (1 - mix) log beta~_t),   mix a second output of the network  Improved DDPM eq. 15
    L_hybrid   = L_simple + 0.001 L_vlb, no gradient of L_vlb reaching eps_theta               Improved DDPM eq. 16
    schedule   cosine: alpha_bar_t = f(t)/f(0),   f(t) = cos((t/T + 0.008)/1.008 pi/2)^2       Improved DDPM eq. 17
    strided    the betas of a few long steps:   beta = 1 - alpha_bar_t / alpha_bar_s           Improved DDPM eq. 19

`mix` is the paper's v, which is the velocity elsewhere in minidiff.  The model is unconditional: each caption must be
''.  (The code counts t = 0..T-1, and alpha_bar is 1 at t = -1.)

The default training takes 3200 steps of 32 images: 13.4 minutes on 1 shared core of an AMD EPYC (Zen 4), 2026-11-23.

Differences from the papers:
    - eps_theta = sigma_t x_t + alpha_t F(x_t, t) with a network F.  At noisy times eps is nearly x_t, and F does not
      have to learn to copy it.  The papers' eps_theta is the network itself.  After 200 steps of 32 images, the mean
      squared error of x0_hat at t = 990 (200, 600) is 0.52 (0.014, 0.098) with F, and 1.63 (0.015, 0.123) without.
    - The UNet has 0.7 million weights at 14 x 14 and 7 x 7 and no dropout; theirs have 36 million and more.
    - Times are stratified over a batch.  L_vlb is in bits per pixel (the paper does not give its unit) and its times
      are uniform.  The paper's importance sampling of times, used where L_vlb is trained alone, is left out.
    - Sampling takes 100 of the 1000 times.  x0_hat is clipped to [-1, 1] at each, as in Ho's program.
    - There is no guidance: systems/adm.py adds a classifier.  In-painting without training: diffusion/posterior.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from minidiff import pictures
from minidiff.checks import one_of, whole
from minidiff.data.dataset import Dataset
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
from minidiff.diffusion.samplers import State, beta, beta_tilde, checked_times, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import Schedule, check_schedule, schedule_from
from minidiff.diffusion.times import training_times
from minidiff.engine import ops
from minidiff.engine.backend import to_device, to_numpy, xp_of
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, record, recording
from minidiff.errors import UserError
from minidiff.nn.images import clean_images
from minidiff.nn.kl import kl
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.unet import UNet, UNetConfig
from minidiff.systems.config import check_shape
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, check_finite

VARIANCES = {"learned": None, "beta": 1.0, "beta_tilde": 0.0}                         # mix of each; None: the network's


@dataclass(frozen=True)
class DDPMConfig:
    """Everything that makes one model; it is saved in the model's file."""

    shape: tuple[int, int, int] = (28, 28, 1)               # (H, W, C) of the images
    schedule: str = "cosine"                # NAME[:key=value,...] of schedules.SCHEDULES
    T: int = 1000                           # training times
    steps: int = 3200                       # of training
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(widths=(40, 80), embedding=96, out=2))  # F and mix

    def __post_init__(self):
        check_schedule(self.schedule)
        check_shape(self.shape, self.unet.multiple)
        self.unet.check_image(*self.shape[:2])
        C = self.shape[2]
        if self.T < 2 or self.steps < 1:
            raise ValueError(f"T must be at least 2 and steps at least 1, not {self.T} and {self.steps}")
        if (self.unet.channels, self.unet.out, self.unet.text) != (C, 2 * C, 0):
            raise ValueError(f"unet must have channels = {C}, out = {2 * C}, for eps and the variance, and text = 0, "
                             f"not {self.unet.channels}, {self.unet.out} and {self.unet.text}")


class DDPM(System):
    """A UNet that predicts eps and a variance, and the schedule that it was trained with."""

    name, Config, example = "ddpm", DDPMConfig, "02_ddpm.py"
    reads_captions = False

    def __init__(self, config: DDPMConfig, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        self.schedule = schedule_from(config.schedule, config.T)
        self.log_beta, self.log_beta_tilde = log_variances(self.schedule)             # (T,) each
        self.unet = UNet(config.unet, rng)

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> DDPMConfig:
        default = DDPMConfig()
        return replace(default, shape=shape, unet=replace(default.unet, channels=shape[2], out=2 * shape[2]))

    def outputs(self, unet: UNet, x_t, t) -> tuple[Tensor, Tensor]:
        """eps_theta and mix, each (B, H, W, C) float32, for x_t (B, H, W, C) and times t (B,)."""
        x = x_t if isinstance(x_t, Tensor) else Tensor(x_t)
        out, C = as_float32(unet(as_input(unet, x), t)), self.config.unet.channels
        alpha, sigma = (per_sample(f(t), out.data) for f in (self.schedule.alpha, self.schedule.sigma))
        # eps_theta = sigma_t x_t + alpha_t F(x_t, t)
        return sigma * ops.cast(x, out.dtype) + alpha * out[..., :C], out[..., C:]

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        T = self.config.T

        def batch(step: Step) -> tuple:
            # 2, 3, 4: x_0 ~ q(x_0),  t ~ uniform,  eps ~ N(0, I)                              DDPM algorithm 1
            x_0 = step.images(data, step.choose(data))
            t = training_times(step.rng, step.size, T, power=1)
            return x_0, t, step.normal(x_0.shape)

        yield Stage("diffusion", self.unet, batch, self.loss, self.config.steps,
                    picture=lambda: pictures.sheet(self.sample([""] * 16, steps=min(25, T)), columns=8))

    def loss(self, unet: UNet, x_0, t, eps) -> Tensor:
        """L_hybrid, a Tensor of shape ().  x_0, eps (B, H, W, C) float32; t (B,) int of 0..T-1, uniform."""
        # 5: step on || eps - eps_theta(sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t) ||^2  DDPM algorithm 1
        x_t = q_sample(self.schedule, x_0, t, eps)
        eps_theta, mix = self.outputs(unet, x_t, t)
        error = eps_theta - eps
        # L_hybrid = L_simple + 0.001 L_vlb; `.data` has no history, so that L_vlb does not move the mean
        return ops.mean(error * error) + 0.001 * ops.mean(self.vlb(x_0, x_t, t, eps_theta.data, mix))

    def vlb(self, x_0, x_t, t, eps_theta, mix: Tensor) -> Tensor:
        """T L_t for each pixel, (B, H, W, C), in bits: its mean over uniform t is L_vlb without the prior's term."""
        schedule = self.schedule
        x0_hat = static_threshold(to_x0(schedule, "eps", x_t, t, eps_theta))
        mean_q, _ = q_posterior_mean_variance(schedule, x_0, x_t, t)
        mean_p, _ = q_posterior_mean_variance(schedule, x0_hat, x_t, t)
        log_beta, log_beta_tilde = per_sample(self.log_beta[t], x_0), per_sample(self.log_beta_tilde[t], x_0)
        # log variance = mix log beta_t + (1 - mix) log beta~_t
        log_variance = mix * log_beta + (1 - mix) * log_beta_tilde
        # L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the decoder's -log p(x_0 | x_{t=0})
        decoder = -log_probability(x_0, mean_p, log_variance)
        L_t = ops.where(per_sample(t, x_0) == 0, decoder, kl(mean_q, log_beta_tilde, mean_p, log_variance))
        return self.config.T / math.log(2) * L_t

    # --- the network as a denoiser --------------------------------------------------------------------------

    def predict_both(self, x_t, t) -> tuple:
        """eps_theta and mix as arrays (B, H, W, C), on all cores, or the GPU."""
        return map_batch(lambda x_t, t: self.outputs(self.unet, x_t, t), x_t, t, device=self.device)

    def predict(self, x_t, t, cond=None):
        """eps_theta for arrays x_t (B, H, W, C), t (B,); it does not depend on cond."""
        return self.predict_both(x_t, t)[0]

    def predict_vjp(self, x_t, t, dy, cond=None) -> tuple:
        """What `predict` gives, and dy^T d predict / d x_t, of x_t's shape."""
        def network(x_t, t, dy):
            x = Tensor(x_t, requires_grad=True)
            with recording():
                eps, _ = self.outputs(self.unet, x, t)
            return eps.data, gradients(eps, [x], dy)[0]
        return map_batch(network, x_t, t, dy, device=self.device)

    def unguided(self) -> NetworkDenoiser:
        """(x_t, t) -> x0_hat as the network predicts it, unclipped, with its derivative."""
        return NetworkDenoiser(self.schedule, "eps", self.predict, network_vjp=self.predict_vjp)

    def likelihood_denoiser(self) -> tuple[NetworkDenoiser, tuple]:
        return self.unguided(), ()

    # --- sampling -----------------------------------------------------------------------------------------

    def sample(self, captions: Sequence[str], *, steps: int = 100, variance: str = "learned", seed: int = 0,
               streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption, which must be ''; sample i from stream (seed, i).

        steps: how many of the T times, evenly spaced.  variance: "learned", "beta" or "beta_tilde".
        """
        return to_numpy(last(self.trajectory(captions, seed=seed, streams=streams, steps=steps, variance=variance)))

    def trajectory(self, captions: Sequence[str], *, steps: int = 100, variance: str = "learned", seed: int = 0,
                   streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state from x_T to x_0, each with its x0_hat (progressive generation, DDPM section 4.3)."""
        streams = self.streams_for(captions, seed, streams)
        if any(caption.strip() for caption in captions):
            raise UserError("ddpm draws without captions: give '' for a caption (minidiff sample --system ddpm ''), "
                            "or let a classifier guide it toward a caption's digit (the system adm).")
        # 1: x_T ~ N(0, I)                                                                     DDPM algorithm 2
        x_T, path = self.noise(streams, self.config.shape), times(self.schedule, steps)
        yield State(0, int(path[0]), x_T, None)
        yield from self.reverse(x_T, path, streams=streams, variance=variance)

    def reverse(self, x_t, path: Sequence[int], *, streams: SampleStreams,
                variance: str = "learned") -> Iterator[State]:
        """DDPM algorithm 2 from x_t (B, H, W, C) at time path[0] down a strictly falling list of times, and to -1."""
        schedule = self.schedule
        fixed = _fixed_mix(variance)
        path = checked_times(path, range(schedule.T), f"within {schedule.T - 1}..0")
        # 2: for t = T, ..., 1; here, for t and the time s that comes after it in the list
        for step, (t, s) in enumerate(pairwise([*path, -1]), start=1):
            eps_theta, mix = self.predict_both(x_t, np.full(len(x_t), t))
            x0_hat = static_threshold(to_x0(schedule, "eps", x_t, t, eps_theta))
            eps_theta = eps_from_x0(schedule, x_t, t, x0_hat)                         # as x0_hat was clipped
            # beta of this step, however long:  1 - alpha_bar_t / alpha_bar_s                  Improved DDPM eq. 19
            root, beta_t = (float(a) for a in q_step(schedule, s, t))                 # root = sqrt(1 - beta)
            # 4: x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps_theta) / sqrt(1 - beta_t) + sd_t z
            x_t = (x_t - beta_t / float(schedule.sigma(t)) * eps_theta) / root
            # 3: z ~ N(0, I) if t > 1, else z = 0
            if s >= 0:
                xp = xp_of(x_t)
                mix = mix if fixed is None else xp.full_like(mix, fixed)
                # sd^2 = exp(mix log beta + (1 - mix) log beta~)                               Improved DDPM eq. 15
                log_beta, log_beta_tilde = math.log(beta(schedule, t, s)), math.log(beta_tilde(schedule, t, s))
                sd = xp.exp(0.5 * (mix * log_beta + (1 - mix) * log_beta_tilde))
                x_t = x_t + sd * to_device(streams.normal(x_t.shape[1:], x_t.dtype), self.device)
            else:
                x_t = static_threshold(check_finite(x_t))   # rounding may have left [-1, 1]
            yield State(step, s, x_t, x0_hat)

    def interpolate(self, x_0, x_0_other, lambdas: Sequence[float], *, t: int = 500, steps: int = 50,
                    seed: int = 0, variance: str = "learned") -> np.ndarray:
        """Images (L, H, W, C) between two (H, W, C), mixed as noised images at time t (DDPM section 4.4, figure 8).

            x_t, x_t' ~ q(x_t | x_0), q(x_t | x_0'),   x-_t = (1 - lambda) x_t + lambda x_t',   x-_0 ~ p(x_0 | x-_t)

        The noise is the same for all lambdas in [0, 1]: that of x_t and x_t', and that of the steps.
        """
        lambdas = np.asarray(lambdas, np.float32)
        if lambdas.ndim != 1 or not len(lambdas) or not ((0 <= lambdas) & (lambdas <= 1)).all():
            raise ValueError(f"lambdas must be numbers of 0..1, such as [0, 0.5, 1], not {lambdas}")
        t = whole("t", t, 0, self.config.T - 1)
        steps = whole("steps", steps, 1, t + 1)             # of the times up to t
        ends = clean_images(np.stack([x_0, x_0_other])).astype(np.float32)
        eps = SampleStreams(seed, 2, "ends of an interpolation").normal(ends.shape[1:])
        x_t, other = q_sample(self.schedule, ends, t, eps)
        weight = lambdas[:, None, None, None]
        x_t = (1 - weight) * x_t + weight * other                                     # (L, H, W, C)
        path = np.round(np.linspace(t, 0, steps)).astype(int) if steps > 1 else [t]
        streams = SampleStreams.from_seeds([seed] * len(lambdas), "steps of an interpolation")
        return to_numpy(last(self.reverse(to_device(x_t, self.device), path, streams=streams, variance=variance)))

    # --- what it is worth ---------------------------------------------------------------------------------

    def bits_per_dim(self, x_0, *, seed: int = 0, terms: int = 1000, variance: str = "learned") -> np.ndarray:
        """L_vlb of images x_0 (B, H, W, C) of 8-bit values, (B,): with `terms` of T a noisier, unbiased estimate."""
        x_0 = clean_images(x_0).astype(np.float32)
        T, B, fixed = self.config.T, len(x_0), _fixed_mix(variance)
        terms = whole("terms", terms, 1, T)
        streams = SampleStreams(seed, B, "noise of bits per dim")
        total = prior_kl(self.schedule, x_0.astype(np.float64)).reshape(B, -1).mean(1) / math.log(2)
        for k in range(terms):
            t = np.minimum((T * (k + streams.uniform()) / terms).astype(np.int64), T - 1)
            eps = streams.normal(x_0.shape[1:])
            x_t = q_sample(self.schedule, x_0, t, eps)
            eps_theta, mix = self.predict_both(x_t, t)
            mix = mix if fixed is None else np.full_like(mix, fixed)
            total += self.vlb(x_0, x_t, t, eps_theta, Tensor(mix)).data.reshape(B, -1).mean(1) / terms
        return total


def _fixed_mix(variance: str) -> float | None:
    one_of("variance", variance, VARIANCES)
    return VARIANCES[variance]


# --- the numbers of algorithm 2 ---------------------------------------------------------------------------------

def log_variances(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """log beta_t and log beta~_t, (T,) each; beta~_1 replaces beta~_0, which is 0 (Improved DDPM's program)."""
    t = np.maximum(np.arange(schedule.T), 1)
    return np.log(schedule.betas), np.log([beta_tilde(schedule, int(i), int(i) - 1) for i in t])


def step_weights(schedule: Schedule, path: Sequence[int]) -> np.ndarray:
    """Why algorithm 2 removes noise and then adds some: for each time in a sampler's list a row of

        1 / sqrt(1 - beta)      the factor of x_t
        removed                 the factor of eps_theta, with that:  beta / (sqrt(1 - alpha_bar_t) sqrt(1 - beta))
        added                   the factor of z:  sqrt(beta), and sqrt(beta~)

    (N, 4) float64.  Noise of size sigma_t, scaled, less `removed`, and the added noise of variance beta~ have together
    the size sigma_s if eps_theta is right:  (sigma_t / sqrt(1 - beta) - removed)^2 + beta~ = sigma_s^2.
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
    xp = xp_of(x_0)
    x_0, mean, log_var = (to_numpy(a) for a in (x_0, mean, log_variance.data))        # its error function is SciPy's
    decoder = DiscretisedGaussian(np.exp(0.5 * log_var.astype(np.float64)))
    # d log P / d log variance = 1/2 d log P / d log sigma
    slope = xp.asarray(0.5 * decoder.slope(x_0, mean))
    return record(xp.asarray(decoder(x_0, mean).astype(x_0.dtype)), (log_variance,),
                  lambda dy: ((dy * slope).astype(dy.dtype),))
