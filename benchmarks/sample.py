"""Sampling with guidance, minidiff beside PyTorch, in one run.

    python benchmarks/sample.py                          64 images of the default network: time, ratio to PyTorch's best
    python benchmarks/sample.py --network large          images of 32x32x3, a UNet of four times the parameters
    python benchmarks/sample.py --memory                 peak memory, each contestant in a process of its own
    python benchmarks/sample.py --all                    both networks, time and memory: one table

A run encodes the captions and takes 25 steps of DPM-Solver++(2M) from x_T at guidance scale 2, with both branches in
one batch of twice the images and x0_hat clipped. All contestants have the same weights, captions and noise. Before any
timing, their images are compared with minidiff's, pixel by pixel. Then they take turns.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from side_by_side import (
    COMPILED,
    COMPILED_LAST,
    FIRST,
    LAST,
    MINIDIFF,
    NETWORKS,
    Run,
    Work,
    compiled,
    minidiff_network,
    parser_of,
    run,
    torch_network,
)

from minidiff.data import attributes
from minidiff.data import digit_captions as captions
from minidiff.engine.random import SampleStreams
from minidiff.systems.system import as_read
from minidiff.systems.text_to_image import TextToImage

STEPS, SCALE, SEED = 25, 2.0, 0


def prompts(count: int) -> list[str]:
    """Captions like those of training, with random words."""
    rng = np.random.default_rng(0)
    words = attributes.Words("bold", "left", "narrow")
    return [captions.caption(rng, int(digit), words) for digit in rng.integers(0, 10, count)]


def tokenizer():
    """The tokenizer of the shipped model."""
    return TextToImage.load().tokenizer


def minidiff_sample(network: str, count: int) -> Run:
    model, asked = minidiff_network(network, tokenizer()), prompts(count)
    return lambda: model.sample(asked, scale=SCALE, steps=STEPS, streams=SampleStreams(SEED, count))


def torch_sample(network: str, count: int, *, channels_last: bool = False, compile: bool = False) -> Run:
    import torch
    import torch_model
    model, layout = torch_network(network, channels_last)
    config = NETWORKS[network]
    shape = config.shape                                    # (H, W, C)
    texts = [as_read(prompt) for prompt in [*prompts(count), ""]]
    ids, mask = map(torch.from_numpy, tokenizer().batch(texts, config.text.length))
    if compile:
        model.unet = compiled(model.unet)

    def once() -> np.ndarray:
        x_T = torch.from_numpy(SampleStreams(SEED, count).normal(shape)).permute(0, 3, 1, 2)
        x_0 = torch_model.sample(model, x_T.contiguous(memory_format=layout), ids[:-1], mask[:-1], ids[-1:], mask[-1:],
                                 scale=SCALE, steps=STEPS)
        return x_0.permute(0, 2, 3, 1).numpy()
    return once


WORK = Work(f"sampling of {STEPS} steps", {
    MINIDIFF: minidiff_sample,
    FIRST: torch_sample,
    LAST: partial(torch_sample, channels_last=True),
    COMPILED: partial(torch_sample, compile=True),
    COMPILED_LAST: partial(torch_sample, compile=True, channels_last=True),
}, batches=(64,), checked=1, rtol=0.0, atol=1e-3)


if __name__ == "__main__":
    run(WORK, parser_of(__doc__, batch=64, rounds=5, turn=2).parse_args())
