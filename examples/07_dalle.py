"""DALL-E (Ramesh et al. 2021): pictures as 49 tokens, drawn one by one after those of the words; CLIP picks the best.

    python examples/07_dalle.py            draws docs/dalle.png with the weights that come with minidiff

Row 1   digits of MNIST
Row 2   the same digits, reconstructed by the discrete VAE from 7 x 7 codes of 64 values each
Row 3   a picture for each caption, as the paper samples it: temperature 1 and no guidance
Row 4   the paper's improvement: CLIP chooses the best of --rerank such candidates, of which row 3's is the first
Row 5   a later improvement: one candidate, drawn with classifier-free guidance (Gafni et al. 2022)

The effect of both improvements, measured by `evaluate(DALLE.load(), count=N, options=...)` of
minidiff/evaluation, with the standard error of N captions (2026-11-23, the shipped weights; times on 1 core of
an AMD EPYC (Zen 4), shared with other work):

    options                                      N    digit read right   attributes   seconds an image
    scale 1, temperature 1, rerank 1           400    79.5 % +- 2.0         65.5 %         .010
    scale 1, temperature 1, rerank 4           150    96.7 % +- 1.5         92.8 %         .045
    scale 1, temperature 1, rerank 16           70    98.6 % +- 1.4         96.8 %         .166
    scale 3, temperature 0.9 (the default)     400    98.2 % +- 0.7         85.9 %         .014
"""

import argparse

import numpy as np

from minidiff import pictures
from minidiff.data import mnist
from minidiff.data.pixels import to_float
from minidiff.errors import run_main
from minidiff.systems.dalle import DALLE

CAPTIONS = ("a bold seven leaning left", "a thin, upright three", "a wide zero", "5", "a narrow eight",
            "a heavy four", "the digit 2, slanted to the right", "a light nine")


def main(weights: str | None = None, rerank: int = 16, out: str = "docs/dalle.png", seed: int = 0) -> None:
    pictures.check_writable(out)                            # fails now, not after the work
    system = DALLE.load(weights)

    # a picture, its 49 tokens, and its reconstruction
    real = to_float(mnist.packed().images[:len(CAPTIONS)])[..., None]               # (N, 28, 28, 1)
    z = system.vae.tokens(real)                                                     # (N, 49)
    again = system.vae.images(z)
    print(f"the tokens of the first picture:\n{z[0].reshape(7, 7)}")
    print(f"mean |x - x_hat| of {len(real)} pictures: {np.abs(real - again).mean() / 2:.3f} of the way from black "
          "to white")

    # a caption, 49 tokens drawn after it, and the picture decoded from them
    first = system.sample(CAPTIONS, scale=1.0, temperature=1.0, seed=seed)
    best = system.sample(CAPTIONS, scale=1.0, temperature=1.0, rerank=rerank, seed=seed)
    guided = system.sample(CAPTIONS, seed=seed)

    rows = {"MNIST": real, "of 49 tokens": again, "": first, f"best of {rerank}": best, "guided": guided}
    below = [label or caption for label in rows for caption in CAPTIONS]
    sheet = pictures.sheet(np.concatenate(list(rows.values())), below, columns=len(CAPTIONS))
    pictures.save(sheet, out)
    print(f"pictures in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a file of minidiff train --system dalle (default: the shipped one)")
    parser.add_argument("--rerank", type=int, default=16, help="candidates for each caption, of which CLIP keeps one")
    parser.add_argument("--out", default="docs/dalle.png")
    parser.add_argument("--seed", type=int, default=0)
    run_main(main, **vars(parser.parse_args()))
