"""What a step costs in latents and in pixels: training, and sampling, side by side on one core.

    python benchmarks/latent_against_pixels.py          prints a table, in about a minute

Both systems as they come along, each with its own network: 49 tokens against 784 pixels.  Times are of this process's
CPU, which others on the machine disturb less than the clock; the median of the steps.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import statistics
import time

import numpy as np
from minidiff.training.main_job import TrainConfig, Trainer

from minidiff.data import mnist
from minidiff.data.digits import CaptionedDigits
from minidiff.systems.latent import LatentDiffusion
from minidiff.systems.text_to_image import TextToImage
from minidiff.training import run as stages

BATCH = 32


def seconds(step, repeats: int) -> float:
    """CPU seconds of a call, the median; the first call is not counted."""
    found = []
    for _ in range(repeats + 1):
        started = time.process_time()
        step()
        found.append(time.process_time() - started)
    return statistics.median(found[1:])


def main(model: str | None = None, repeats: int = 5, steps: int = 20) -> dict[str, float]:
    packed = mnist.packed()
    data = CaptionedDigits.of(mnist.Images(packed.images[:500], packed.labels[:500], packed.source))
    latent, pixels, prompts = LatentDiffusion.load(model), TextToImage.load(), ["a bold seven"] * BATCH
    found = {
        "sampling, latents": seconds(lambda: latent.sample(prompts, steps=steps), max(1, repeats // 3)),
        "  of which decoding": seconds(lambda: latent.decode(np.zeros((BATCH, 7, 7, 3), np.float32)), repeats),
        "sampling, pixels": seconds(lambda: pixels.sample(prompts, steps=steps), max(1, repeats // 3)),
        "training step, pixels": seconds(Trainer(pixels, data, TrainConfig(batch=BATCH)).step, repeats)}
    for number, stage in enumerate(latent.stages(data), start=1):
        found[f"training step, {stage.name}"] = seconds(stages.StageFit(stage, number, 0, 1.0, {}).step, repeats)

    print(f"| {BATCH} pictures | CPU seconds |\n|---|---|")
    for what, cost in found.items():
        print(f"| {what} | {cost:.3f} |")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="weights of the latent system, in place of those that come along")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of sampling")
    main(**vars(parser.parse_args()))
