"""How many bits does a model need for an image?  Bits/dim of test images, in two ways that bound the same number.

    bound      the chain of all T Gaussian steps: L_T + sum L_{t-1} + decoder             DDPM eq. 5
    flow       the probability-flow ODE, whose noise at t = 0 the same decoder removes    Score SDE section 4.3

diffusion/likelihood.py explains both.  The data are 8-bit values, and no noise is added to them but the chain's:
the decoder gives the probability of each value, so that no correction for continuous data is due.  The model is
unconditional: one that reads captions gets the null caption.  As in DDPM, the chain's variances are beta_t, the
decoder's sigma_0^2 too, and x0_hat is clipped to [-1, 1]; the flow's x0_hat is not clipped, since it must be
differentiable.

Heun's error falls as 1/N^2 with N steps.  So a path f_80 of 80 times and the path f_40 of every second of them give
f_80 + (f_80 - f_40) / 3, nearly without error (Richardson's extrapolation).  The shipped weights of text-to-image have
1.721 bits/dim along 40 steps, 1.757 along 80, 1.766 along 160, and 1.777 extrapolated; those of vdm .787, .874, .895,
.902 along 640, and .905 extrapolated (100 test images, 2026-12-01).  Text-to-image's path cannot come nearer: its times
are whole numbers, and the steps from t = 5 to 0 are as fine as they can be from 80 steps on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from minidiff.data.dataset import Dataset
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
from minidiff.engine.random import SampleStreams, generator
from minidiff.errors import UserError

BATCH = 50                                                  # images at a time
TERMS = 10                                                  # of the T-1 L_{t-1}, for each image
FLOW_STEPS = 80                                             # of the ODE, and half of them
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
            ("model of", "all images: no caption (the null caption where it reads captions), no guidance"),
            ("data", "8-bit values as they are; each has a probability, so no offset is owed"),
            ("bound", f"{self.terms} of the L_{{t-1}} an image, drawn without bias; variances beta_t; x0_hat "
                      "clipped to [-1, 1]"),
            ("flow", f"Heun, extrapolated from {self.flow_steps} steps and from half as many; Hutchinson's trace, one "
                     "probe an image; the noise of t = 0 as dequantisation"),
            ("decoder", f"a Gaussian of sigma {self.sigma:.5f} over bins of 2/255, the outer ones open"),
            ("seconds", f"{self.seconds:.0f}"),
        ]

    def as_dict(self) -> dict:
        return asdict(self)


def likelihood(model, test: Dataset, *, count: int = 1000, seed: int = 0,
               progress: Progress = lambda items, what: items) -> Likelihood:
    """The bound of `count` random test images, and the flow of a tenth of them, at least two.

    model: a system with `likelihood_denoiser`.  test: images of 8-bit values, of the model's shape.  UserError where
    the model has no likelihood or makes images of another shape, or where its outputs are not finite.
    """
    network, null = model.likelihood_denoiser()
    _check(model, test, count)
    started, flow_count = time.monotonic(), max(2, count // 10)
    clipped = replace(network, clip=static_threshold)
    decoder = DiscretisedGaussian(beta(network.schedule, 0, -1) ** 0.5)             # sigma_0

    # a random part of the test images, not the first ones: MNIST's later test images are harder
    chosen = generator(seed, "images of a likelihood").permutation(len(test))[:count]

    def with_condition(part: slice) -> tuple:
        x_0 = to_device(test.images(chosen[part]), model.device)                    # (B, H, W, C)
        return x_0, tuple(a.repeat(len(x_0), axis=0) for a in null)

    streams, bounds, flows = SampleStreams(seed, count, "noise of a likelihood"), [], []
    for part in progress(_parts(count), "bound"):
        x_0, cond = with_condition(part)
        b = variational_bound(clipped, x_0, cond, streams=streams[part], decoder=decoder, variance=beta, terms=TERMS)
        bounds.append((b.prior, b.steps, b.decoder))
    steps = min(FLOW_STEPS, network.schedule.T - 1)
    fine = times(network.schedule, max(steps - steps % 2, 1) + 1, "log_snr")
    coarse = fine[::2] if steps > 1 else fine               # every second time, with both ends
    for part in progress(_parts(flow_count), "flow"):
        x_0, cond = with_condition(part)
        eps = to_device(streams[part].normal(x_0.shape[1:]), model.device)
        probes = Hutchinson.draw(streams[part], x_0)
        f, c = (flow_bound(network, x_0, path, cond, eps=eps, decoder=decoder, divergence=probes)
                for path in (fine, coarse))
        # f_N + (f_N - f_{N/2}) / 3 = f + O(1/N^3)
        flows.append((f.flow + (f.flow - c.flow) / 3, f.decoder))

    D = math.prod(test.shape)
    bound = bits_per_dim(np.concatenate(bounds, axis=1), D)                         # (3, count)
    flow = bits_per_dim(np.concatenate(flows, axis=1), D)                           # (2, flow_count)
    if not (np.isfinite(bound).all() and np.isfinite(flow).all()):
        raise UserError("the likelihood is not finite: the model's weights are damaged")
    return Likelihood(
        count, *map(float, bound.mean(axis=1)), *_mean_error(bound.sum(axis=0)),
        flow_count, *map(float, flow.mean(axis=1)), *_mean_error(flow.sum(axis=0)),
        terms=TERMS, flow_steps=len(fine) - 1, sigma=decoder.sigma, seed=seed, seconds=time.monotonic() - started,
        source=f"the {len(test)} test images of {test.source}")


def _parts(count: int) -> list[slice]:
    return [slice(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]


def _mean_error(x: np.ndarray) -> tuple[float, float]:
    """The mean of x and its standard error."""
    return float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)


def _check(model, test: Dataset, count: int) -> None:
    """UserError unless the test images have the model's shape, and there are at least `count`."""
    if tuple(model.config.shape) != tuple(test.shape):
        raise UserError(f"the test images of {test.source} have the shape {tuple(test.shape)}, and the model makes "
                        f"images of the shape {tuple(model.config.shape)}")
    if not 2 <= count <= len(test):
        raise UserError(f"--images must be from 2 to {len(test)}, the test images of {test.source}, not {count}")
