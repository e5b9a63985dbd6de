"""How much memory a configuration asks for besides its weights: the intermediate results that a gradient needs.

    numbers = sum over blocks of  16 n C + heads n^2        n positions, C channels; n^2 with attention only

16 is about how many arrays of its input's size a residual block keeps.  Weights are as few for an image of 256 x 256 as
for one of 28 x 28, so that a small file can ask for any amount.
"""

from collections.abc import Iterable

MOST = 1 << 25                                              # for one image; 128 MiB in float32


def check_activations(what: str, levels: Iterable[tuple[int, int, int, int]]) -> None:
    """ValueError where one image takes more than MOST numbers.

    levels: (blocks, n, C, heads) for each resolution, heads 0 without attention.
    """
    numbers = sum(blocks * (16 * n * C + heads * n * n) for blocks, n, C, heads in levels)
    if numbers > MOST:
        raise ValueError(f"{what} would take {numbers:,} numbers for an image, and at most {MOST:,} are allowed: use "
                         "fewer pixels, channels or blocks, or attention at lower resolutions only")
