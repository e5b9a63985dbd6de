"""What another package may add to minidiff: a sampler, a schedule, a data set and a system.

It imports nothing private, and no file of minidiff/ imports it.  tests/test_extending.py uses each part through
the command line.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from minidiff.data.dataset import Dataset, DatasetEntry
from minidiff.data.pixels import to_float, to_uint8
from minidiff.diffusion.gaussian import q_posterior_mean_variance
from minidiff.diffusion.samplers import Sampler, State
from minidiff.diffusion.schedules import Schedule
from minidiff.engine import ops
from minidiff.engine.backend import to_numpy, xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input
from minidiff.systems.stage import Stage
from minidiff.systems.system import System


def euler_ancestral(denoiser, x_T, times, cond=None, *, streams):
    """k-diffusion's Euler ancestral: a step of Euler in sigma/alpha to less noise than wanted, then fresh noise.

        d = (x/alpha - x0_hat) / u,   x/alpha <- x/alpha + d (u_down - u) + u_up z,   u = sigma/alpha
        u_up^2 = u_s^2 (u_t^2 - u_s^2) / u_t^2,   u_down^2 = u_s^2 - u_up^2
    """
    schedule, x_t = denoiser.schedule, x_T
    for step, (t, s) in enumerate(pairwise([*times, -1]), start=1):
        x0_hat = denoiser(x_t, np.full(len(x_t), t), cond)
        if s >= 0:
            alpha_t, sigma_t, alpha_s, sigma_s = (float(f(u)) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
            u_s = sigma_s / alpha_s
            ratio = u_s * alpha_t / sigma_t                                         # u_s / u_t; u_t may be infinite
            up = u_s * np.sqrt(1 - ratio**2)
            down = u_s * ratio
            # x/alpha + d (u_down - u_t) = x0_hat + (x/alpha - x0_hat) u_down/u_t,   (x - alpha x0_hat)/sigma = eps_hat
            eps_hat = (x_t - alpha_t * x0_hat) / sigma_t
            z = xp_of(x_t).asarray(streams.normal(x_t.shape[1:], x_t.dtype))
            x_t = alpha_s * (x0_hat + float(down) * eps_hat + float(up) * z)
        else:
            x_t = x0_hat
        yield State(step, s, x_t, x0_hat)


def ancestral_without_noise(denoiser, x_T, times, cond=None, *, streams):
    """A wrong sampler: the posterior's mean without its noise."""
    x_t = x_T
    for step, (t, s) in enumerate(pairwise([*times, -1]), start=1):
        x0_hat = denoiser(x_t, np.full(len(x_t), t), cond)
        x_t = q_posterior_mean_variance(denoiser.schedule, x0_hat, x_t, t, s)[0] if s >= 0 else x0_hat
        yield State(step, s, x_t, x0_hat)


def sigmoid(T=1000, start=-3.0, end=3.0, tau=1.0):
    """alpha_bar falls as a sigmoid (Jabri et al. 2022, arXiv 2212.11972)."""
    u = np.arange(T + 1) / T
    f = 1 / (1 + np.exp((u * (end - start) + start) / tau))
    return Schedule(np.maximum((f[1:] - f[-1]) / (f[0] - f[-1]), 1e-9), "sigmoid")


class Stripes(Dataset):
    """Coloured stripes, across or down: images that are neither square nor grey."""

    name, shape, source, fingerprint = "stripes", (16, 12, 3), "computed", "stripes-1"

    def __len__(self):
        return 64

    def images(self, indices):
        i = np.asarray(indices)[:, None, None]
        row, column = np.arange(16)[None, :, None], np.arange(12)[None, None]
        wave = np.sin(np.where(i % 2 == 0, row, column) * (1 + i % 3)).astype(np.float32)             # (B, 16, 12)
        return to_float(to_uint8(np.stack([wave, -wave, 0 * wave], axis=-1)))

    def caption(self, i, rng):
        return ("stripes across", "stripes down")[i % 2]


@dataclass(frozen=True)
class IndependentConfig:
    shape: tuple[int, int, int] = (28, 28, 1)


class Pixels(Module):
    """The mean and the log of the standard deviation of each pixel."""

    def __init__(self, shape):
        self.mean, self.log_sd = (Tensor(np.zeros(shape, np.float32), requires_grad=True) for _ in range(2))


class Independent(System):
    """p(x) = prod_i N(x_i; mean_i, sd_i^2): the pixels are independent."""

    name, Config = "independent", IndependentConfig
    no_likelihood = "it is no diffusion model"

    def __init__(self, config, tokenizer, rng):
        super().__init__(config, tokenizer, rng)
        self.pixels = Pixels(config.shape)

    @classmethod
    def config_for(cls, shape):
        return replace(IndependentConfig(), shape=shape)

    def stages(self, data):
        def batch(step):
            return (step.images(data, step.choose(data)),)

        def loss(pixels, x):
            z = (as_input(pixels, x) - pixels.mean) * ops.exp(-pixels.log_sd)
            return ops.mean(as_float32(z * z * 0.5 + pixels.log_sd))
        yield Stage("pixels", self.pixels, batch, loss, steps=20)

    def sample(self, captions, *, temperature=1.0, seed=0, streams=None):
        z = to_numpy(self.noise(self.streams_for(captions, seed, streams), self.config.shape))
        mean, log_sd = (to_numpy(p.data) for p in (self.pixels.mean, self.pixels.log_sd))
        return (mean + np.float32(temperature) * np.exp(log_sd) * z).clip(-1, 1)


def load_stripes(folder, split):
    return Stripes()


EULER_ANCESTRAL = Sampler(euler_ancestral, order=1, noise=True)                     # for entry points
STRIPES = DatasetEntry(load_stripes)
