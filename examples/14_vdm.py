"""Variational diffusion (Kingma et al. 2021): how many bits a test image takes, and at which noise they are spent.

    python examples/14_vdm.py --data DIR                  prints the bound and a table, and draws vdm.png
    python examples/14_vdm.py --data DIR --train runs/x   trains the model first, in that folder

DIR holds MNIST's four files; without it they are fetched.  It prints

    the bound     prior + diffusion + decoder, in bits for each pixel of 8 bits, with its standard error
    two paths     the same network along the learned path and along a straight line with the same ends: the bounds
                  agree, since only the ends count (VDM section 5.1), and the learned path's estimate varies less
    the bits      of ten equal parts of gamma, from fine noise to coarse: sigma^2 = sigmoid(gamma)

and it draws the bits over the noise, both paths, and a row of digits.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from minidiff import pictures, systems
from minidiff.data.dataset import load_dataset
from minidiff.diffusion.likelihood import bits_per_dim
from minidiff.diffusion.variational import PiecewiseLinear, continuous_bound, sigma_of
from minidiff.engine.random import SampleStreams, generator
from minidiff.errors import UserError, run_main
from minidiff.pictures import plots
from minidiff.systems.vdm import VDM
from minidiff.terminal import progress
from minidiff.training.run import TrainOptions, run

BATCH = 50                                                  # images at a time


def bits_of(model: VDM, path: PiecewiseLinear, x_0, seed: int, terms: int, title: str) -> np.ndarray:
    """Bits/dim of the three terms along a path, (3, N): prior, diffusion, decoder."""
    streams, parts = SampleStreams(seed, len(x_0), "noise of a bound along a path"), []
    for i in progress(range(0, len(x_0), BATCH), title):
        bound = continuous_bound(model.predict_at, path, x_0[i:i + BATCH], streams=streams[i:i + BATCH], terms=terms)
        parts.append((bound.prior, bound.steps, bound.decoder))
    return bits_per_dim(np.concatenate(parts, axis=1), math.prod(x_0.shape[1:]))


def main(model: str | None = None, train: str | None = None, effort: float = 1.0, data: str | None = None,
         images: int = 1000, terms: int = 32, seed: int = 0, out: str = "vdm.png", config=None) -> list:
    """The rows of the table of bits, of `images` test images."""
    pictures.check_writable(out)                            # fails now, not after the work
    if train:
        begun = (Path(train) / "run.json").exists()
        vdm = run(train, VDM, load_dataset(data), TrainOptions(seed=seed, effort=effort), config=config,
                  resume=begun).system
    else:
        vdm = systems.load_system("vdm", model)
    test = load_dataset(data, "test", shape=vdm.config.shape)
    if not 2 <= images <= len(test):
        raise UserError(f"--images must be from 2 to {len(test)}, the test images, not {images}")
    chosen = generator(seed, "images of a bound along two paths").permutation(len(test))[:images]
    x_0 = test.images(chosen)                                                       # (N, H, W, C)

    # --- the bound, along two paths with the same ends ---
    learned = vdm.path.path()
    straight = replace(learned, shares=(1.0,))
    print(f"gamma from {learned.gamma_0:.2f} to {learned.gamma_1:.2f}, {terms} times for each of "
          f"{images} test images of {test.source}\n")
    print("| path | prior | diffusion | decoder | bits/dim | estimated by one time: standard deviation |\n"
          + "|---" * 6 + "|")
    for name, path in (("learned", learned), ("a straight line", straight)):
        bits = bits_of(vdm, path, x_0, seed, terms, name)                           # (3, N)
        once = bits_of(vdm, path, x_0, seed + 1, 1, f"{name}, one time")            # (3, N)
        total, spread = bits.sum(axis=0), (once[1] - bits[1]).std(ddof=1)
        print(f"| {name} | {' | '.join(f'{term:.4f}' for term in bits.mean(axis=1))} | {total.mean():.4f} ± "
              f"{total.std(ddof=1) / len(total) ** 0.5:.4f} | {spread:.3f} |")

    # --- where the bits go ---
    rows = vdm.bits_by_noise(x_0, seed=seed, terms=terms)
    print("\n| gamma | sigma, in levels of grey | bits/dim |\n" + "|---" * 3 + "|")
    for row in rows:
        fine, coarse = 127.5 * sigma_of(np.array([row.start, row.stop]))
        print(f"| {row.start:.2f} to {row.stop:.2f} | {fine:.2f} to {coarse:.2f} | {row.bits:.4f} ± {row.error:.4f} |")
    print(f"| all | | {sum(row.bits for row in rows):.4f} |")

    gammas, t = [(row.start + row.stop) / 2 for row in rows], np.linspace(0, 1, 201)
    picture = plots.panels([
        plots.Panel("Where the bits go", "gamma = log(sigma^2 / alpha^2)", "bits/dim for each unit of gamma",
                    [("", gammas, [row.bits / (row.stop - row.start) for row in rows], "o-")]),
        plots.Panel("The path", "t", "gamma",
                    [("learned", t, learned(t), "-"), ("a straight line", t, straight(t), "--")])])
    pictures.save(picture, out)
    digits = Path(out).with_name(f"{Path(out).stem}_digits.png")
    pictures.save(pictures.sheet(vdm.sample([""] * 24, seed=seed, steps=min(100, vdm.config.T)), columns=12), digits)
    print(f"{out}, {digits}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="weights (default: those of runs/vdm, else those of the package)")
    parser.add_argument("--train", help="train first, in this folder; resumes a run that it holds")
    parser.add_argument("--effort", type=float, default=1.0, help="the share of the training steps to take")
    parser.add_argument("--data", help="folder with MNIST's files")
    parser.add_argument("--images", type=int, default=1000, help="test images (1000)")
    parser.add_argument("--terms", type=int, default=32, help="times for each image (32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="vdm.png")
    run_main(main, **vars(parser.parse_args()))
