"""DALL-E: pictures as 49 tokens, drawn one after another behind the words; CLIP chooses among candidates.

    python examples/07_dalle.py            draws docs/dalle.png with the weights that come with minidiff

Row 1   digits of MNIST
Row 2   the same after the discrete VAE: what 7 x 7 codes, one of 64 each, keep of them
Row 3   a picture for each caption, as the transformer draws it: the paper's way, temperature 1 and no guidance
Row 4   the paper's remedy: of --rerank such candidates, the first of them row 3's, the one that CLIP finds nearest
Row 5   a later remedy: one candidate, drawn with classifier-free guidance

What the remedies buy, by `evaluate(DALLE.load(), count=N, options=...)` of minidiff/evaluate.py, with the standard
error of N captions (2026-11-23, the shipped weights; times of 1 core of an AMD EPYC (Zen 4), which others shared):

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
    pictures.check_writable(out)                            # before the work, not after
    system = DALLE.load(weights)

    # a picture, its 49 tokens, and the picture again
    real = to_float(mnist.packed().images[:len(CAPTIONS)])[..., None]               # (N, 28, 28, 1)
    z = system.vae.tokens(real)                                                     # (N, 49)
    again = system.vae.images(z)
    print(f"the tokens of the first picture:\n{z[0].reshape(7, 7)}")
    print(f"mean |x - x_hat| of {len(real)} pictures: {np.abs(real - again).mean() / 2:.3f} of the way from black "
          "to white")

    # a caption, 49 tokens drawn behind it, and the picture that they are
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
    parser.add_argument("--weights", help="a file of minidiff train --system dalle, if not the shipped one")
    parser.add_argument("--rerank", type=int, default=16, help="candidates for each caption, of which CLIP keeps one")
    parser.add_argument("--out", default="docs/dalle.png")
    parser.add_argument("--seed", type=int, default=0)
    run_main(main, **vars(parser.parse_args()))
