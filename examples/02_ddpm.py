"""DDPM (Ho et al. 2020): what each step of algorithm 2 removes and adds, and what a model without captions can do.

    python examples/02_ddpm.py                  prints the weights of each step, draws three pictures into docs/
    python examples/02_ddpm.py --bits 200       also measures bits/dim under each choice of the variance

    ddpm_progressive.png     x0_hat on the way from noise to image: first the coarse shape, then the strokes
    ddpm_interpolation.png   two images, mixed at the time when they are half noise: the mixtures become digits, too
    inpainting.png           half of an image is known, or all of it under noise: the same model, multiplied by r(x)

The table of weights depends on the schedule alone (--steps 250).  At t = 555 a step multiplies x_t by 1.0075, subtracts
0.0194 eps_theta and adds 0.1218 z.  It adds six times as much noise as it removes, yet the noise falls: the removed
parts of successive steps point in the same direction, the added parts do not (`step_weights` explains the balance).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from minidiff import pictures, systems
from minidiff.data.dataset import load_dataset
from minidiff.data.mnist import packed
from minidiff.data.pixels import to_float
from minidiff.diffusion.denoiser import static_threshold
from minidiff.diffusion.posterior import Observed, posterior, reconstruction
from minidiff.diffusion.samplers import sample, times
from minidiff.engine.random import SampleStreams
from minidiff.errors import run_main
from minidiff.systems.ddpm import DDPM, VARIANCES, step_weights

SHOWN = (7, 2, 13, 15, 17, 4)                               # of the packed training images


def weights(model: DDPM, steps: int) -> None:
    """x_s = (x_t by `factor`) - removed eps_theta + added z, at ten of the times."""
    path = [int(t) for t in times(model.schedule, steps)]
    print(f"{'t':>5} {'factor':>8} {'removed':>8} {'added: beta':>12} {'beta~':>8}")
    for i in np.unique(np.linspace(0, len(path) - 1, 10).round().astype(int)):
        factor, removed, added, added_tilde = step_weights(model.schedule, path)[i]
        print(f"{path[i]:>5} {factor:8.4f} {removed:8.4f} {added:12.4f} {added_tilde:8.4f}")


def progressive(model: DDPM, steps: int, count: int, seed: int):
    _, *states = model.trajectory([""] * count, seed=seed, steps=steps)             # the first state is the noise
    labels = [f"t = {state.t}" if state.t >= 0 else "x_0" for state in states]
    return pictures.strip(np.stack([state.x0_hat for state in states]), labels=labels)


def interpolation(model: DDPM, x_0: np.ndarray, steps: int, seed: int):
    lambdas = np.linspace(0, 1, 8)
    half = model.config.T // 2
    mixed = [model.interpolate(a, b, lambdas, t=half, steps=min(steps, half), seed=seed)
             for a, b in zip(x_0[::2], x_0[1::2], strict=True)]
    states = np.concatenate([x_0[::2][None], np.stack(mixed, axis=1), x_0[1::2][None]])
    labels = ["image", *(f"{part:.2f}" for part in lambdas), "image"]
    return pictures.strip(states, labels=labels)


def inpainting(model: DDPM, x_0: np.ndarray, steps: int, seed: int):
    """Every column is drawn by the same reverse process, multiplied by a different r."""
    B, width, path = len(x_0), model.config.shape[1], times(model.schedule, steps)
    unclipped = model.unguided()
    denoiser = replace(unclipped, clip=static_threshold)
    left, everywhere = np.zeros(x_0.shape[1:], bool), np.ones(x_0.shape[1:], bool)
    left[:, :width // 2] = True
    noise = 0.5
    noisy = x_0 + noise**0.5 * SampleStreams(seed, B, "noise on an image").normal(x_0.shape[1:])

    def draw(factor, which: int = 0):
        streams = SampleStreams(seed, B, f"in-painting {which}")
        return sample(posterior(denoiser, streams.normal(x_0.shape[1:]), path, factor, streams=streams))

    seen = Observed(model.schedule, x_0, left)
    columns = {"image": x_0, "seen": np.where(left, x_0, 0), "in-painted": draw(seen), "another": draw(seen, 1),
               "a third": draw(seen, 2), "by x0_hat": draw(reconstruction(unclipped, x_0, left)), "under noise": noisy,
               "de-noised": draw(Observed(model.schedule, noisy, everywhere, noise))}
    return pictures.strip(np.stack(list(columns.values())), labels=list(columns))


def main(model: str | None = None, steps: int = 250, count: int = 6, bits: int = 0, out: str = "docs",
         seed: int = 0, data: str | None = None) -> None:
    ddpm, folder = systems.load_system("ddpm", model), Path(out)
    pictures.check_writable(folder / "inpainting.png")      # fails now, not after the work
    weights(ddpm, steps)
    x_0 = to_float(packed().images[list(SHOWN)])[..., None]
    for name, picture in (("ddpm_progressive", lambda: progressive(ddpm, steps, count, seed)),
                          ("ddpm_interpolation", lambda: interpolation(ddpm, x_0, steps, seed)),
                          ("inpainting", lambda: inpainting(ddpm, x_0, steps, seed))):
        pictures.save(picture(), folder / f"{name}.png")
        print(f"drew {folder / name}.png")
    if bits:
        test = load_dataset(data, "test").images(np.arange(bits))
        for variance in VARIANCES:
            cost = ddpm.bits_per_dim(test, variance=variance, terms=min(200, ddpm.config.T), seed=seed)
            print(f"{variance}: {cost.mean():.3f} bits/dim, standard error {cost.std() / bits**0.5:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="the model's file (default: the shipped one, or runs/ddpm)")
    parser.add_argument("--steps", type=int, default=250, help="sampling steps (default: 250)")
    parser.add_argument("--count", type=int, default=6, help="number of progressive samples (default: 6)")
    parser.add_argument("--bits", type=int, default=0, help="number of test images to measure bits/dim on (default: 0)")
    parser.add_argument("--out", default="docs", help="folder for the pictures (default: docs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default=None, help="folder of MNIST's files, for --bits")
    run_main(main, **vars(parser.parse_args()))
