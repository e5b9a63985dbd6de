"""How much memory a picture takes, estimated from shapes, so that a size is refused before the weights are read.

    all = weights + the largest of what a run needs at one time

    weights     all parameters in the dtype that they are loaded in
    attention   the scores of the UNet's largest layer, (rows, heads, N, N), N = h w / 4^level; 2 rows with guidance
    middle      the scores of the autoencoder's attention over all latents, (1, N, N) with N = h w
    decoder     arrays of its widest layer at the picture's full resolution: it holds seven of them at one time

Everything else is small beside these.  Measured peaks were 1.0 to 1.2 of the estimate (tests/pretrained/
test_memory.py); it knows nothing of other programs, nor of swap.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minidiff.errors import UserError
from minidiff.input_files import read_file
from minidiff.pretrained.config import Config
from minidiff.pretrained.unet import BLOCKS, heads_of
from minidiff.pretrained.weights import Weights

AT_ONE_TIME = 7                                             # arrays of the decoder's last layers
CGROUP = Path("/sys/fs/cgroup/memory.max")                  # a container's limit on Linux
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes of each part of the sum above."""

    weights: int
    attention: int
    middle: int
    decoder: int

    @property
    def all(self) -> int:
        return self.weights + max(self.attention, self.middle, self.decoder)


def estimate(unet: Config, parts: Mapping[str, Weights], factor: int, height: int, width: int, rows: int = 2
             ) -> Estimate:
    """Of a picture of height x width pixels.  factor: pixels a latent, each way; rows: 2 with guidance."""
    itemsize = parts["unet"].dtype.itemsize
    kinds = unet.texts("down_block_types")
    heads = heads_of(unet, len(kinds))
    N = (height // factor) * (width // factor)
    levels = [level for level, kind in enumerate(kinds) if BLOCKS.get(kind)] or [len(kinds) - 1]
    scores = max(heads[level] * (N // 4**level)**2 for level in levels)
    wide = last_width(parts["vae"])
    return Estimate(itemsize * sum(entry.size for weights in parts.values() for entry in weights.tensors.values()),
                    itemsize * rows * scores, itemsize * N**2, itemsize * AT_ONE_TIME * height * width * wide)


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
