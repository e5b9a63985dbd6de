"""The cost of a step in latents and in pixels, in training and in sampling, side by side on one core.

    python benchmarks/latent_against_pixels.py          prints a table, in about a minute

Both systems have their shipped weights and networks: 49 tokens against 784 pixels.  Times are CPU seconds of this
process, which depend less on other work than the wall clock does; each is the median over several steps.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import statistics
import time

import numpy as np

from minidiff.data import mnist
from minidiff.data.digits import Digits
from minidiff.systems import load_needed
from minidiff.systems.latent import LatentDiffusion
from minidiff.systems.text_to_image import TextToImage
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import Trainer

BATCH = 32


def seconds(step, repeats: int) -> float:
    """The median CPU seconds of a call, without the first."""
    found = []
    for _ in range(repeats + 1):
        started = time.process_time()
        step()
        found.append(time.process_time() - started)
    return statistics.median(found[1:])


def main(model: str | None = None, repeats: int = 5, steps: int = 20) -> dict[str, float]:
    packed = mnist.packed()
    data = Digits.of(mnist.Images(packed.images[:500], packed.labels[:500], packed.source))
    latent, pixels, prompts = LatentDiffusion.load(model), TextToImage.load(), ["a bold seven"] * BATCH
    latent.autoencoder.take(load_needed(LatentDiffusion))

    def trainer(stage, number: int = 1, batch: int | None = None) -> Trainer:
        return Trainer(stage, TrainOptions(batch=batch).for_stage(stage), number=number)
    found = {
        "sampling, latents": seconds(lambda: latent.sample(prompts, steps=steps), max(1, repeats // 3)),
        "  of which decoding": seconds(lambda: latent.decode(np.zeros((BATCH, 7, 7, 3), np.float32)), repeats),
        "sampling, pixels": seconds(lambda: pixels.sample(prompts, steps=steps), max(1, repeats // 3)),
        "training step, pixels": seconds(trainer(next(pixels.stages(data)), batch=BATCH).step, repeats)}
    for number, stage in enumerate(latent.stages(data), start=1):
        found[f"training step, {stage.name}"] = seconds(trainer(stage, number).step, repeats)

    print(f"| {BATCH} pictures | CPU seconds |\n|---|---|")
    for what, cost in found.items():
        print(f"| {what} | {cost:.3f} |")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="weights of the latent system (default: the shipped ones)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of sampling")
    main(**vars(parser.parse_args()))
