"""How much memory a picture takes, estimated from shapes, so that a size is refused before the weights are read.

    all = weights + the largest of what a run needs at one time

    weights     all parameters in the dtype that they are loaded in; with low_memory, in that of the files
    unet        arrays of its first layer's size (rows, h, w, C): it holds about 60 of them at one time, in skips,
                transformers and buffers; 2 rows with guidance
    decoder     arrays of its widest layer at the picture's full resolution: it holds seven of them at one time

The scores of attention are no part of it, since engine/attention.py computes large ones by blocks.  Everything else is
small beside these.  At 512 x 512 the measured peaks of Stable Diffusion 1.5 are 1.0 of the estimates (2 cores,
2026-11-29, `python benchmarks/stable_diffusion.py --memory`).  It knows nothing of other programs, nor of swap.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minidiff.errors import UserError
from minidiff.input_files import read_file
from minidiff.pretrained.weights import Weights

IN_DECODER, IN_UNET = 7, 60                                 # arrays at one time
CGROUP = Path("/sys/fs/cgroup/memory.max")                  # a container's limit on Linux
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part of the sum above."""

    weights: int
    unet: int
    decoder: int

    @property
    def all(self) -> int:
        return self.weights + max(self.unet, self.decoder)


def estimate(parts: Mapping[str, Weights], factor: int, height: int, width: int, rows: int = 2) -> Estimate:
    """Of a picture of height x width pixels.  factor: pixels a latent, each way; rows: 2 with guidance."""
    itemsize = parts["unet"].dtype.itemsize
    latents, first = (height // factor) * (width // factor), parts["unet"].shape("conv_in.weight")[0]
    return Estimate(sum(weights.bytes_in_memory() for weights in parts.values()),
                    itemsize * IN_UNET * rows * latents * first,
                    itemsize * IN_DECODER * height * width * last_width(parts["vae"]))


def last_width(vae: Weights) -> int:
    """The most channels of the decoder at full resolution."""
    widths: dict[int, int] = {}
    for name, entry in vae.tensors.items():
        match = re.match(r"decoder\.up_blocks\.(\d{1,3})\.resnets\.", name)
        if match and len(entry.shape) == 4:
            level = int(match[1])
            widths[level] = max(widths.get(level, 0), *entry.shape[:2])
    return widths[max(widths)] if widths else 3


def check(needed: Estimate, height: int, width: int) -> None:
    """UserError where the machine has less memory than the estimate."""
    there = available()
    if there is None or needed.all <= there:
        return
    if needed.weights > there:
        raise UserError(f"the model's weights alone take {needed.weights / GIB:.1f} GiB, and this machine has "
                        f"{there / GIB:.1f}: take a smaller model, or another machine")
    raise UserError(f"a picture of {width}x{height} takes about {needed.all / GIB:.1f} GiB, of which the weights are "
                    f"{needed.weights / GIB:.1f}, and this machine has {there / GIB:.1f}: ask for a smaller --size")


def available() -> int | None:
    """Bytes of the machine's memory, or of the container's; None where the system does not tell."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):           # Windows; a system without these names
        return None
    try:
        limit = read_file(CGROUP, 100).strip()
    except UserError:                                       # no container, or another system
        return there
    return min(there, int(limit)) if limit.isdigit() else there             # or "max"
