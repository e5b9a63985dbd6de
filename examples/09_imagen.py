"""Imagen (Saharia et al. 2022): 7 x 7, 14 x 14, 28 x 28 from one caption, and guidance under two thresholds.

    python examples/09_imagen.py                               the cascade with the shipped weights: imagen.png
    python examples/09_imagen.py --train runs/imagen           trains first (--effort 0.1 for a quick look)
    python examples/09_imagen.py --images 400                  the numbers of docs/imagen.md, imagen_thresholding.png

    x_hat = x_hat_uncond + scale (x_hat_cond - x_hat_uncond)   leaves [-1, 1] where scale is large
    static     clip(x_hat, -1, 1)                              everything outside becomes white or black
    dynamic    clip(x_hat, -q, q) / q                          q = max(1, the 99.5th percentile of |x_hat|)
"""

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minidiff import pictures, systems
from minidiff.data import digit_captions as captions
from minidiff.data.attributes import Words
from minidiff.data.dataset import load_dataset
from minidiff.data.digits import Digits
from minidiff.data.mnist import packed
from minidiff.diffusion.cascade import resized
from minidiff.engine.random import SampleStreams, generator
from minidiff.errors import run_main
from minidiff.evaluation.judge import fid, load_judge
from minidiff.systems.imagen import Imagen
from minidiff.training.run import TrainOptions, run

PROMPTS = ("a bold seven leaning left", "the digit three", "a wide zero", "5", "a thin eight leaning right")
SCALES = (1.0, 2.0, 4.0, 8.0, 15.0)
THRESHOLDS = ("static", "dynamic")
LEVELS = (0.1, 0.3, 0.6)                                    # of augmentation, besides 0, at scale 4
BATCH = 250


def main(weights: str | None = None, train: str | None = None, effort: float = 1.0, images: int = 0, out: str = ".",
         seed: int = 0, steps: int = 20, scales=SCALES) -> list[tuple]:
    """Draws imagen.png in the folder `out`, and with `images` imagen_thresholding.png; returns the table's rows."""
    if train:
        model = run(train, Imagen, load_dataset(), TrainOptions(seed=seed, effort=effort)).system
    else:
        model = systems.load_system("imagen", weights)
    sizes, prompts = model.config.resolutions, PROMPTS
    pace = dict(steps=steps, super_steps=max(steps // 2, 1))
    drawn = model.cascade(prompts, seed=seed, **pace)
    same_size = np.stack([resized(x, sizes[-1]) for x in drawn])                    # (3, N, 28, 28, 1)
    pictures.save(pictures.strip(same_size, prompts, labels=[f"{n} x {n}" for n in sizes]), Path(out) / "imagen.png")
    if not images:
        return []

    rows, columns = table(model, images, scales, seed, pace), []
    for scale in scales:
        both = [model.sample(prompts[:3], scale=scale, super_scale=scale, threshold=threshold, seed=seed, **pace)
                for threshold in THRESHOLDS]
        columns.append(np.stack(both, axis=1).reshape(6, 28, 28, 1))                # each prompt, static and dynamic
    asked = [f"{threshold}: {prompt}" for prompt in prompts[:3] for threshold in THRESHOLDS]
    picture = pictures.strip(np.stack(columns), asked, labels=[f"scale {scale:g}" for scale in scales])
    pictures.save(picture, Path(out) / "imagen_thresholding.png")
    fresh = Imagen(model.config, model.tokenizer, generator(seed, "weights of an untrained encoder"))
    print(f"a linear map trained on figures (7) reads words (seven) in {100 * probe(model, seed):.0f} % of captions; "
          f"with an untrained encoder in {100 * probe(fresh, seed):.0f} %")
    return rows


def probe(model: Imagen, seed: int, count: int = 1000) -> float:
    """Does the frozen encoder represent "seven" like "7"?  A linear map learns digits from the states of captions with
    figures; the result is its accuracy on captions with words (by chance a tenth)."""
    rng = generator(seed, "captions for a probe")
    digits = rng.integers(0, 10, count)
    texts = [captions.caption(rng, int(k), Words()) for k in digits]
    tokens, mask = model.encode(texts)
    states = (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)                # (N, D)
    x = np.c_[(states - states.mean(0)) / states.std(0), np.ones(count)]
    figures = np.array([any(c.isdigit() for c in text) for text in texts])
    learned, answers = x[figures], np.eye(10)[digits[figures]]
    # ridge regression
    w = np.linalg.solve(learned.T @ learned + 10 * np.eye(x.shape[1]), learned.T @ answers)
    return float(((x[~figures] @ w).argmax(1) == digits[~figures]).mean())


def table(model: Imagen, count: int, scales, seed: int, pace: dict) -> list[tuple]:
    """Accuracy, FID, white pixels and median pixel for captions of real images, by scale, threshold and level."""
    judge, real = load_judge(), Digits.of(packed(), held_out=True)
    rng, rows = generator(seed, "captions for a table"), []
    chosen = rng.permutation(len(real))[:count]
    prompts = [real.caption(i, rng) for i in chosen]

    def add(scale: str, threshold: str, aug_level: str, x: np.ndarray) -> None:
        features, digits = judge.read(x)
        rows.append((scale, threshold, aug_level, f"{100 * (digits == real.labels[chosen]).mean():.1f} %",
                     f"{fid(judge, features):.1f}", f"{100 * (x > 0.98).mean():.1f} %", f"{np.median(x):.2f}"))
        print("| " + " | ".join(rows[-1]) + " |", flush=True)
    print("| scale | threshold | aug_level | digit | FID | white | median pixel |\n|---|---|---|---|---|---|---|")
    add("MNIST", "", "", real.images(chosen))
    settings = [(scale, threshold, 0.0) for scale in scales for threshold in THRESHOLDS]
    settings += [(4.0, "static", aug_level) for aug_level in LEVELS]
    for scale, threshold, aug_level in tqdm(settings, unit="row"):
        streams = SampleStreams(seed, count)
        x = [model.sample(prompts[i:i + BATCH], scale=scale, super_scale=scale, threshold=threshold,
                          aug_level=aug_level, streams=streams[i:i + BATCH], **pace) for i in range(0, count, BATCH)]
        add(f"{scale:g}", threshold, f"{aug_level:g}", np.concatenate(x))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a file of minidiff train --system imagen (default: the shipped one)")
    parser.add_argument("--train", metavar="FOLDER", help="train a new model in this folder")
    parser.add_argument("--effort", type=float, default=1.0, help="the share of the training steps to take")
    parser.add_argument("--images", type=int, default=0, help="pictures for each row of the table; 0: no table")
    parser.add_argument("--out", default=".", help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=20, help="steps of the base; the larger models take half as many")
    parser.add_argument("--seed", type=int, default=0)
    run_main(main, **vars(parser.parse_args()))
