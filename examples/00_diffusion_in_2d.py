"""The first lesson: a diffusion model of points in the plane, and beside what it learned the exact answer.

    python examples/00_diffusion_in_2d.py       trains for about a minute, draws docs/diffusion_in_2d.png

    x_t  = alpha_t x_0 + sigma_t eps,   eps ~ N(0, I)       a point with noise; at t = T-1 almost nothing but noise
    loss = E ||eps - network(x_t, t)||^2                    the network estimates the noise (DDPM eq. 14)
    x_s  ~ q(x_s | x_t, x0_hat),   s = t-1                  from noise back to a point, step by step (DDPM algorithm 2)

An estimate of the noise is one of the point, x0_hat; the best, E[x_0 | x_t], can be computed for a list of points.
Arrows: a third of alpha_t x0_hat - x_t = sigma_t^2 score (Tweedie).  The moons appear from about 2,000 steps on.
"""
import argparse

import numpy as np
from tqdm import tqdm

from minidiff import pictures
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import DatasetDenoiser
from minidiff.diffusion.gaussian import q_posterior_mean_variance, q_sample
from minidiff.diffusion.schedules import linear
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients
from minidiff.errors import run_main
from minidiff.nn.layers import Linear, sinusoidal_embedding
from minidiff.nn.optim import AdamW, WarmupCosine

SCHEDULE = linear(T=100, beta_min=1e-3, beta_max=0.2)       # DDPM's, in 100 steps, each with ten times as much noise


def two_moons(rng: np.random.Generator, count: int) -> np.ndarray:
    """Two half circles that reach into each other, with a little noise: (count, 2) float32."""
    angle = np.pi * rng.random(count)
    moon = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], axis=1)              # (count, 2)
    side = rng.choice([-1, 1], (count, 1))                  # the second moon is the first, turned by half a circle
    return (side * moon + 0.05 * rng.standard_normal((count, 2))).astype(np.float32)


def network(layers: list[Linear], x_t: np.ndarray, t: np.ndarray) -> Tensor:
    """eps_hat (B, 2), from points x_t (B, 2) and their times t (B,)."""
    h = Tensor(np.concatenate([x_t, sinusoidal_embedding(t, 32)], axis=1))            # (B, 2 + 32)
    for layer in layers[:-1]:
        h = ops.relu(layer(h))                                                        # (B, 128)
    return layers[-1](h)


def train(layers: list[Linear], data: np.ndarray, steps: int, rng: np.random.Generator) -> None:
    weights = {f"{i}.{name}": w for i, layer in enumerate(layers) for name, w in layer.parameters().items()}
    optimiser, lr = AdamW(weights), WarmupCosine(3e-3, steps)
    for step in tqdm(range(steps), desc="training", unit="step", dynamic_ncols=True):
        x_0, t = data[rng.integers(0, len(data), 256)], rng.integers(0, SCHEDULE.T, 256)     # (256, 2), (256,)
        eps = rng.standard_normal(x_0.shape, np.float32)
        loss = ops.mean((network(layers, q_sample(SCHEDULE, x_0, t, eps), t) - Tensor(eps)) ** 2)
        optimiser.step(gradients(loss, list(weights.values())), lr(step))


def sample(denoiser, x_t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """From noise (B, 2) to points; minidiff/diffusion/samplers.py has the same as `ddpm`, on any list of times."""
    for t in range(SCHEDULE.T - 1, -1, -1):
        x0_hat = denoiser(x_t, np.full(len(x_t), t))
        mean, variance = q_posterior_mean_variance(SCHEDULE, x0_hat, x_t, t)          # of q(x_s | x_t, x0_hat)
        x_t = mean + np.sqrt(variance) * rng.standard_normal(x_t.shape, np.float32)   # the variance is 0 at t = 0
    return x_t


def draw(axes, points, colour: str, title: str, x_t=None, arrows=None) -> None:
    axes.plot(*points.T, ".", color=colour, markersize=2)
    axes.set(title=title, xlim=(-2.4, 2.4), ylim=(-1.6, 1.6), xticks=[], yticks=[], aspect="equal")
    if arrows is not None:
        axes.quiver(*x_t.T, *arrows.T, color="#0072b2", angles="xy", scale_units="xy", scale=3)


def main(steps: int = 12000, out: str = "docs/diffusion_in_2d.png", times=(40, 20, 10), seed: int = 0) -> None:
    from matplotlib.figure import Figure
    pictures.check_writable(out)                            # fails now, not after the training
    rng = np.random.default_rng(seed)
    data = two_moons(rng, 1000)
    layers = [Linear(C, D, rng) for C, D in ((2 + 32, 128), (128, 128), (128, 128), (128, 2))]
    train(layers, data, steps, rng)
    exact = DatasetDenoiser(SCHEDULE, data)
    learned = NetworkDenoiser(SCHEDULE, "eps", lambda x_t, t, cond: network(layers, x_t, t).data)
    figure = Figure((12, 4.6), layout="constrained")
    (*above, data_axes), (*below, sample_axes) = figure.subplots(2, len(times) + 1)
    for upper, lower, t in zip(above, below, times, strict=True):
        x_t, at = q_sample(SCHEDULE, data, t, rng.standard_normal(data.shape, np.float32)), np.full(len(data), t)
        best, found = (SCHEDULE.alpha(t) * denoiser(x_t, at) - x_t for denoiser in (exact, learned))
        off = np.sqrt(((found - best) ** 2).mean() / (best ** 2).mean())
        draw(upper, data, "0.8", f"exact, t = {t}, sigma = {SCHEDULE.sigma(t):.2f}", x_t[:200], best[:200])
        draw(lower, data, "0.8", f"learned, off by {off:.1%}", x_t[:200], found[:200])
    draw(data_axes, data, "#d55e00", "data")
    draw(sample_axes, sample(learned, rng.standard_normal(data.shape, np.float32), rng), "#d55e00", "samples")
    figure.savefig(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12000, help="default 12000; 4000 give most of the moons")
    parser.add_argument("--out", default="docs/diffusion_in_2d.png")
    run_main(main, **vars(parser.parse_args()))
