"""How many bits does a model need for an image?  Bits/dim on MNIST's test set, in two ways that bound the same number.

    bound      the chain of all T Gaussian steps: L_T + sum L_{t-1} + decoder             (Ho et al. 2020, eq. 5)
    flow       the probability-flow ODE, whose noise at t = 0 the same decoder takes away (Song et al. 2021)

diffusion/likelihood.py explains both.  The data are the 8-bit files, and no noise is added to them but the chain's own:
the decoder gives each level's probability, so that no offset is owed.  The caption is the null caption.  As in DDPM,
the chain's variances are beta_t, the decoder's among them (sigma_0^2), and x0_hat is clipped to [-1, 1]; the flow's is
not, since it must be differentiable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from minidiff.data import mnist
from minidiff.data.pixels import to_float
from minidiff.diffusion.denoiser import static_threshold
from minidiff.diffusion.likelihood import (
    DiscretisedGaussian,
    Hutchinson,
    bits_per_dim,
    flow_bound,
    variational_bound,
)
from minidiff.diffusion.samplers import beta, times
from minidiff.engine.backend import to_device
from minidiff.engine.random import SampleStreams
from minidiff.errors import UserError

BATCH = 50                                                  # images at a time
TERMS = 10                                                  # of the T-1 L_{t-1}, for each image
FLOW_STEPS = 40                                             # of the ODE; 80 give the same to 0.001 bits/dim
Progress = Callable[[Iterable, str], Iterable]              # (items, what they are) -> the same items


@dataclass(frozen=True)
class Likelihood:
    """Bits/dim of the test images: means over them, and the standard errors of those means."""

    images: int
    prior: float                            # L_T
    steps: float                            # sum of L_{t-1}
    decoder: float
    bound: float                            # the three together
    bound_error: float
    flow_images: int
    flow_density: float                     # log q(x_t | x_0) - log p_t(x_t) at t = 0
    flow_decoder: float
    flow: float                             # the two together
    flow_error: float
    terms: int
    flow_steps: int
    sigma: float                            # the decoder's
    source: str
    seed: int
    seconds: float

    def rows(self) -> list[tuple[str, str]]:
        """The table for people: (what, value)."""
        return [
            ("bits/dim, bound", f"{self.bound:.3f} +- {self.bound_error:.3f}  (an estimate, +- one standard error)"),
            ("  L_T", f"{self.prior:.3g}"),
            ("  sum of L_{t-1}", f"{self.steps:.3f}"),
            ("  decoder", f"{self.decoder:.3f}"),
            ("bits/dim, flow", f"{self.flow:.3f} +- {self.flow_error:.3f}"),
            ("  density at t = 0", f"{self.flow_density:.3f}"),
            ("  decoder", f"{self.flow_decoder:.3f}"),
            ("images", f"{self.images} of {self.source}, {self.flow_images} of them for the flow; seed {self.seed}"),
            ("model of", "all images: the null caption, no guidance"),
            ("data", "8-bit values as they are; each has a probability, so no offset is owed"),
            ("bound", f"{self.terms} of the L_{{t-1}} an image, drawn without bias; variances beta_t; x0_hat "
                      "clipped to [-1, 1]"),
            ("flow", f"Heun, {self.flow_steps} steps; Hutchinson's trace, one probe an image; the noise of t = 0 as "
                     "dequantisation"),
            ("decoder", f"a Gaussian of sigma {self.sigma:.5f} over bins of 2/255, the outer ones open"),
            ("seconds", f"{self.seconds:.0f}"),
        ]

    def as_dict(self) -> dict:
        return asdict(self)


def likelihood(model, test: mnist.Images, *, count: int = 1000, seed: int = 0,
               progress: Progress = lambda items, what: items) -> Likelihood:
    """The bound of `count` random test images, and the flow of a tenth of them.  model: a TextToImage of digits.

    UserError where the model is of other images, or where its answers are not finite.
    """
    c = model.config
    if (c.image_size, c.unet.channels) != (28, 1):
        raise UserError("the likelihood is measured on MNIST's 28 x 28 grey images, and this model makes "
                        f"{c.image_size} x {c.image_size} images of {c.unet.channels} channel(s)")
    if not 2 <= count <= len(test):
        raise UserError(f"--images must be from 2 to {len(test)}, the test images of {test.source}, not {count}")
    started, flow_count, null = time.monotonic(), max(2, count // 10), model.encode([""])

    def with_caption(images: np.ndarray):
        x_0 = to_device(to_float(images)[..., None], model.device)                  # (B, 28, 28, 1)
        return x_0, tuple(a.repeat(len(images), axis=0) for a in null)

    network = model.unguided()
    clipped = replace(network, clip=static_threshold)
    decoder = DiscretisedGaussian(beta(model.schedule, 0, -1) ** 0.5)               # sigma_0

    # MNIST's later test images are harder than its first ones: a random part of them, not the beginning
    chosen = test.images[np.random.default_rng([seed, 4]).permutation(len(test))[:count]]
    streams, bounds, flows = SampleStreams(seed, count), [], []
    for part in progress(_parts(count), "bound"):
        x_0, cond = with_caption(chosen[part])
        b = variational_bound(clipped, x_0, cond, streams=streams[part], decoder=decoder, variance=beta, terms=TERMS)
        bounds.append((b.prior, b.steps, b.decoder))
    path = times(model.schedule, min(FLOW_STEPS + 1, model.schedule.T), "log_snr")
    for part in progress(_parts(flow_count), "flow"):
        x_0, cond = with_caption(chosen[part])
        eps = to_device(streams[part].normal(x_0.shape[1:]), model.device)
        b = flow_bound(network, x_0, path, cond, eps=eps, decoder=decoder,
                       divergence=Hutchinson.draw(streams[part], x_0))
        flows.append((b.flow, b.decoder))

    bound = bits_per_dim(np.concatenate(bounds, axis=1), chosen[0].size)            # (3, count)
    flow = bits_per_dim(np.concatenate(flows, axis=1), chosen[0].size)              # (2, flow_count)
    if not (np.isfinite(bound).all() and np.isfinite(flow).all()):
        raise UserError("the likelihood is not finite: the model's weights are damaged")
    return Likelihood(
        count, *map(float, bound.mean(axis=1)), *_mean_error(bound.sum(axis=0)),
        flow_count, *map(float, flow.mean(axis=1)), *_mean_error(flow.sum(axis=0)),
        terms=TERMS, flow_steps=len(path) - 1, sigma=decoder.sigma, seed=seed, seconds=time.monotonic() - started,
        source=f"the {len(test)} test images of {test.source}")


def _parts(count: int) -> list[slice]:
    return [slice(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]


def _mean_error(x: np.ndarray) -> tuple[float, float]:
    """The mean of x and its standard error."""
    return float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)
