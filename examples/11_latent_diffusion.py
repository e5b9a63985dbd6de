"""Latent diffusion (Rombach et al. 2022): text to image, image to image and in-painting with one model.

    python examples/11_latent_diffusion.py                  with the shipped weights; writes latent.png
    python examples/11_latent_diffusion.py --train runs/x   trains first, in that folder

    1  encode      z = scale E(x)                               7 x 7 x 3 numbers for 28 x 28 pixels
    2  noise       z_t = alpha_t z + sigma_t eps                up to pure noise for a new picture; halfway for one that
                                                                resembles the given picture ("image to image")
    3  denoise     20 steps of 49 tokens, each of which attends to every word of the caption
    4  decode      x = D(z / scale), once
"""

import argparse
from pathlib import Path

import numpy as np

from minidiff import pictures, systems
from minidiff.data.dataset import load_dataset
from minidiff.data.mnist import packed
from minidiff.data.pixels import to_float
from minidiff.errors import run_main
from minidiff.systems.latent import LatentDiffusion
from minidiff.training.run import TrainOptions, run

PROMPTS = ["a bold seven leaning left", "a thin, upright three", "a wide zero", "5", "a narrow eight", "a heavy four"]
STRENGTHS = (0.0, 0.4, 0.6, 0.8)


def main(model: str | None = None, train: str | None = None, effort: float = 1.0, data: str | None = None,
         steps: int = 20, seed: int = 0, out: str = "latent.png", config=None) -> np.ndarray:
    pictures.check_writable(out)                            # fails now, not after the training
    if train:
        begun = (Path(train) / "run.json").exists()
        system = run(train, LatentDiffusion, load_dataset(data), TrainOptions(seed=seed, effort=effort), config=config,
                     resume=begun).system
    else:
        system = systems.load_system("latent", model)
    columns = len(PROMPTS)

    # --- text to image ---
    drawn = [system.sample(PROMPTS, steps=steps, seed=seed + n) for n in range(2)]
    rows, titles = drawn, [*PROMPTS, *[""] * columns]

    # --- image to image: six real digits, changed more and more towards the prompts ---
    real = packed()
    given = to_float(real.images[:columns])[..., None]                              # (B, 28, 28, 1)
    rows.append(given)
    titles += [f"given: {digit}" for digit in real.labels[:columns]]
    for strength in STRENGTHS:
        rows.append(system.vary(given, PROMPTS, strength=strength, steps=steps, seed=seed))
        titles += [f"strength {strength:g}"] + [""] * (columns - 1)

    # --- in-painting: the upper part is known (16 rows of pixels, 4 of the code), the lower part is drawn ---
    mask = np.zeros(given.shape, bool)
    mask[:, :16] = True
    asked = [str(digit) for digit in real.labels[:columns]]
    rows.append(np.where(mask, given, 0.0).astype(np.float32))
    titles += [f"in-paint: {digit}" for digit in asked]
    for repeats in (1, 5):
        rows.append(system.inpaint(given, mask, asked, steps=2 * steps, seed=seed, repeats=repeats))
        titles += [f"repeats {repeats}"] + [""] * (columns - 1)

    pictures.save(pictures.sheet(np.concatenate(rows), titles, columns=columns), out)
    print(f"{len(rows)} rows of {columns} in {out}")
    return np.concatenate(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="weights (default: the shipped ones)")
    parser.add_argument("--train", help="train first, in this folder; resumes a run that it holds")
    parser.add_argument("--effort", type=float, default=1.0, help="the share of the training steps to take")
    parser.add_argument("--data", help="folder with MNIST's files")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="latent.png")
    run_main(main, **vars(parser.parse_args()))
