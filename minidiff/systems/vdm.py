"""Variational diffusion models (VDM; Kingma et al. 2021, arXiv 2107.00630): trained on the likelihood.

    sigma_t^2 = sigmoid(gamma(t)),  alpha_t^2 = sigmoid(-gamma(t)),  t in [0, 1],  gamma learned   VDM section 3.2
    x_t       = alpha_t x_0 + sigma_t eps                                              the paper's z_t and x
    -log p(x_0) <= prior + diffusion + decoder                                                     VDM section 3.5
        prior     = KL(q(x_t | x_0) || N(0, I)) at t = 1
        diffusion = 1/2 E_{t, eps}[ gamma'(t) ||eps - eps_hat(x_t, gamma(t))||^2 ]                 VDM section 5
        decoder   = -E log p(x_0 | x_t) at t = 0,  p(x_0 | x_t) ~ q(x_t | x_0)                     VDM section 3.3
    input      x_t with sin(2^n pi x_t) and cos(2^n pi x_t)                                        VDM section 3.4
    times      u_i = u_0 + i/B mod 1 for a batch of B                                              VDM appendix I.1

The loss is this sum, in bits/dim, and nothing else: no weight is chosen.  diffusion/variational.py says why it does not
depend on gamma between its ends, and systems/learned_path.py how gamma learns: its ends by the bound, its pieces by the
variance of the loss.  The bound of the untrained model is 8 bits/dim: all levels are equally likely.

Where the chain of our ddpm.py ends (the cosine schedule), at gamma = -10.1, sigma = .0064, noise is nearly one level of
grey (.0078).  There this decoder alone costs .95 bits for a black pixel and 1.76 for a grey one; at the paper's -13.3
.005 and .010; at -14, where ours begins, less than .0001 (`test_what_the_decoder_costs`).  The bits are then
spent where a network can save them.

Four fifths of MNIST's pixels are exactly black, and cost little only if eps_hat is right at fine noise, where
eps = (x_t - alpha x_0) / sigma is x_t magnified 1097 times.  Our network does not learn that division:

    logits  = UNet([x_t, waves], gamma)                      a preference for each of 256 levels, for each pixel
    p_k     = softmax_k( logit_k - e_k^2 / 2 ),   e_k = (x_t - alpha x_k) / sigma
    eps_hat = sum_k p_k e_k                                  nn/grey_levels.py: Bayes' rule

It is the paper's decoder at every t, with a learned prior for each pixel in the place of equal levels.

Different from the paper:
    - eps_hat is computed from logits, as above.  The paper's eps_hat is x_t plus the network's output.
    - gamma is made of 20 straight pieces, whose shares of the times are learned without a gradient through the network.
      The paper's is a monotone network of 1024 units (VDM appendix H).
    - The waves are n = 2 ... 8 and fade with the noise (nn/fourier.py); the paper's are n = 7 and 8.
    - The UNet works at 14 x 14 and 7 x 7, on squares of 2 x 2 pixels, with 2 million weights; the paper's keeps the
      full resolution at all depths.  For equal multiplications, squares allow twice the channels.
    - Sampling takes its times from a table of the path, so that every sampler can be used.

The model is unconditional: each caption must be ''.

The shipped weights took 20,000 steps, 86 minutes on two cores of an AMD EPYC (Zen 5) beside other work.  They need
.918 +- .009 bits/dim by this bound (1,000 test images, `python examples/14_vdm.py --data DIR`, 2026-12-01).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minidiff import pictures
from minidiff.data.dataset import Dataset
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.likelihood import bits_per_dim
from minidiff.diffusion.samplers import SAMPLERS, State, times
from minidiff.diffusion.samplers import sample as last
from minidiff.diffusion.schedules import Schedule
from minidiff.diffusion.times import stratified_uniform
from minidiff.diffusion.variational import (
    NoiseLevel,
    alpha_of,
    bits_by_noise,
    continuous_bound,
    noised,
    sigma_of,
)
from minidiff.engine import ops
from minidiff.engine.backend import to_numpy, xp_of
from minidiff.engine.parallel import map_batch
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, recording
from minidiff.errors import UserError
from minidiff.nn.activations import check_activations
from minidiff.nn.fourier import FINEST, fourier_features
from minidiff.nn.grey_levels import eps_of_levels
from minidiff.nn.images import clean_images
from minidiff.nn.layers import Linear
from minidiff.nn.precision import as_float32, as_input
from minidiff.nn.unet import UNet, UNetConfig
from minidiff.systems.config import check_shape
from minidiff.systems.learned_path import INSIDE, LearnedPath, with_ends
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, finite_states

LEVELS = 256


@dataclass(frozen=True)
class VDMConfig:
    """Everything that makes one model; it is saved in the model's file."""

    shape: tuple[int, int, int] = (28, 28, 1)               # (H, W, C) of the images
    gamma_0: float = -14.0                  # where the path's ends begin; both are learned
    gamma_1: float = 6.0
    pieces: int = 20                        # of the path
    waves: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)          # n of the Fourier features
    T: int = 1000                           # times of the samplers' table
    steps: int = 20_000                     # of training
    batch: int = 64
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(channels=15, widths=(96, 128), embedding=128, out=32))

    def __post_init__(self):
        check_shape(self.shape, self.unet.multiple)
        self.unet.check_image(*self.shape[:2])
        H, W, C = self.shape
        check_activations("VDMConfig", [(1, H * W * C, LEVELS // 8, 0)])            # p and e of each level
        if not -30 <= self.gamma_0 < self.gamma_1 <= 30:
            raise ValueError(f"gamma_0 and gamma_1 must rise within -30 and 30, not {self.gamma_0} and {self.gamma_1}")
        if min(self.pieces, self.steps, self.batch) < 1 or self.T < 2:
            raise ValueError(f"pieces, steps and batch must be at least 1, and T at least 2, not {self.pieces}, "
                             f"{self.steps}, {self.batch} and {self.T}")
        if not all(0 <= n <= FINEST for n in self.waves):
            raise ValueError(f"waves must be numbers of 0..{FINEST}, not {self.waves}")
        channels = C * (1 + 2 * len(self.waves))
        if (self.unet.channels, self.unet.text) != (channels, 0) or self.unet.out < 1:
            raise ValueError(f"unet must have channels = {channels}, for x_t and its waves, text = 0 and out of at "
                             f"least 1, not {self.unet.channels}, {self.unet.text} and {self.unet.out}")


class VDM(System):
    """A UNet that prefers levels of grey, and the path in log-SNR that it was trained along."""

    name, Config, example = "vdm", VDMConfig, "14_vdm.py"
    reads_captions = False

    def __init__(self, config: VDMConfig, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        self.unet = UNet(config.unet, rng)
        self.logits = Linear(config.unet.out, config.shape[2] * LEVELS, rng)
        self.path = LearnedPath(config.gamma_0, config.gamma_1, config.pieces, rng)

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]) -> VDMConfig:
        default = VDMConfig()
        channels = shape[2] * (1 + 2 * len(default.waves))
        return replace(default, shape=shape, unet=replace(default.unet, channels=channels))

    @property
    def schedule(self) -> Schedule:
        """The path as learned so far, as a table of T times."""
        return self.path.path().table(self.config.T)

    def eps_hat(self, x_t, gamma: np.ndarray) -> Tensor:
        """eps_hat (B, H, W, C), for x_t (B, H, W, C) and gamma (B,) float64, on the host."""
        c, x = self.config, x_t if isinstance(x_t, Tensor) else Tensor(x_t)
        alpha, sigma = alpha_of(gamma), sigma_of(gamma)
        # gamma in the place of a time of 0..1000
        t = 1000 * (gamma - c.gamma_0) / (c.gamma_1 - c.gamma_0)
        h = self.unet(as_input(self.unet, fourier_features(x, sigma, c.waves)), t)     # (B, H, W, out)
        logits = as_float32(self.logits(h)).reshape(*x.shape, LEVELS)                  # (B, H, W, C, 256)
        # p_k = softmax_k(logit_k - e_k^2 / 2),   eps_hat = sum_k p_k e_k
        return eps_of_levels(logits, ops.cast(x, logits.dtype), alpha, sigma)

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        def batch(step: Step) -> tuple:
            x_0 = step.images(data, step.choose(data))
            return x_0, with_ends(stratified_uniform(step.rng, step.size)), step.normal(x_0.shape)

        def picture():
            return pictures.sheet(self.sample([""] * 16, steps=min(50, self.config.T)), columns=8)
        yield Stage("diffusion", self, batch, VDM.loss, self.config.steps, self.config.batch, lr=2e-3, ema=0.999,
                    picture=picture)

    def loss(self, x_0, t, eps) -> Tensor:
        """The bound, in bits/dim, (), without bias.  x_0, eps (B, H, W, C) float32; t (B,) of `with_ends`."""
        t, path = to_numpy(t), self.path.path()
        at = t.clip(0, 1)
        gamma = path(at)
        error = self.eps_hat(noised(x_0, gamma, eps), gamma) - eps
        m = 0.5 * ops.mean(error * error, axis=(1, 2, 3))                              # (B,)
        slope = path.slope(at)
        # 1/2 gamma'(t) ||eps - eps_hat||^2, of the times from 0 to 1
        weight = np.where((t >= 0) & (t < 1), INSIDE * slope, 0)
        diffusion = ops.mean(Tensor(xp_of(m.data).asarray(weight, dtype=m.dtype)) * m)
        bound = self.path.prior(x_0) + diffusion + self.path.decoder(x_0, t, eps)
        # of value 0, with the gradients of the path
        fixed = to_numpy(m.data).astype(np.float64)
        path_learns = self.path.at_the_ends(t, fixed) + self.path.pieces(t, slope * fixed)
        return (bound + path_learns) / math.log(2)

    # --- the network as a denoiser --------------------------------------------------------------------------

    def predict_at(self, x_t, gamma: np.ndarray):
        """eps_hat as an array (B, H, W, C), on all cores, or the GPU."""
        return map_batch(self.eps_hat, x_t, gamma, device=self.device)

    def denoiser(self, clip=None) -> NetworkDenoiser:
        """(x_t, t) -> x0_hat at the times of the table, with its derivative; gamma is that of the table."""
        schedule = self.schedule
        gamma = -schedule.log_snr(np.arange(schedule.T))                               # (T,)

        def predict(x_t, t, cond):
            return self.predict_at(x_t, gamma[t])

        def vjp(x_t, t, dy, cond):
            def network(x_t, gamma, dy):
                x = Tensor(x_t, requires_grad=True)
                with recording():
                    eps_hat = self.eps_hat(x, gamma)
                return eps_hat.data, gradients(eps_hat, [x], dy)[0]
            return map_batch(network, x_t, gamma[t], dy, device=self.device)
        return NetworkDenoiser(schedule, "eps", predict, clip=clip, network_vjp=vjp)

    def likelihood_denoiser(self) -> tuple[NetworkDenoiser, tuple]:
        return self.denoiser(), ()

    # --- what it is worth ---------------------------------------------------------------------------------

    def bits_per_dim(self, x_0, *, seed: int = 0, terms: int = 32) -> np.ndarray:
        """The bound of images x_0 (B, H, W, C) of 8-bit values, (B,): an unbiased estimate from `terms` times each."""
        x_0 = clean_images(x_0, self.config.shape).astype(np.float32)
        bound = continuous_bound(self.predict_at, self.path.path(), x_0,
                                 streams=SampleStreams(seed, len(x_0), "noise of a continuous bound"), terms=terms)
        return bits_per_dim(bound.total, math.prod(self.config.shape))

    def bits_by_noise(self, x_0, *, rows: int = 10, seed: int = 0, terms: int = 32) -> list[NoiseLevel]:
        """Where the bits go: the bound's second term, divided among `rows` equal parts of gamma; means over images."""
        x_0, path = clean_images(x_0, self.config.shape).astype(np.float32), self.path.path()
        edges = np.linspace(path.gamma_0, path.gamma_1, rows + 1)
        return bits_by_noise(self.predict_at, path, x_0, edges, terms=terms,
                             streams=SampleStreams(seed, len(x_0), "noise of the bits by noise"))

    # --- sampling -----------------------------------------------------------------------------------------

    def trajectory(self, captions: Sequence[str], *, steps: int = 100, sampler: str = "ddpm", seed: int = 0,
                   streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state from x_T to x_0, sample i from its own stream (seed, i).

        captions: each must be ''.  steps: of the T times, evenly spaced in t.  sampler: a name in samplers.SAMPLERS;
        "ddpm" is ancestral sampling, the paper's.
        """
        streams, sampler = self.streams_for(captions, seed, streams), SAMPLERS[sampler]
        if any(caption.strip() for caption in captions):
            raise UserError("vdm draws without captions: give '' for a caption (minidiff sample --system vdm '')")
        denoiser = self.denoiser(clip=static_threshold)
        x_T, path = self.noise(streams, self.config.shape), times(denoiser.schedule, steps)
        yield State(0, int(path[0]), x_T, None)
        yield from finite_states(sampler(denoiser, x_T, path, streams=streams))

    def sample(self, captions: Sequence[str], *, steps: int = 100, sampler: str = "ddpm", seed: int = 0,
               streams: SampleStreams | None = None) -> np.ndarray:
        """Images (B, H, W, C) in [-1, 1], one for each caption, which must be '': the end of `trajectory`."""
        return to_numpy(last(self.trajectory(captions, steps=steps, sampler=sampler, seed=seed, streams=streams)))
