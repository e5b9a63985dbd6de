"""Span corruption: text teaches itself, by filling the gaps that were torn into it.

    text      a picture of a bold seven leaning left . the 7 tilted left
    input     a picture of <0> seven leaning left . the <1> left
    target    <0> a bold <1> 7 tilted <2>

Runs of tokens are dropped, and each is replaced by one sentinel, a token that says which gap this is.  The target
holds what was dropped, each run behind the sentinel of its gap, and one more sentinel as its end (Raffel et al. 2020,
arXiv 1910.10683, section 3.1.4 and figure 2): 15 % of the tokens, in runs of 3 on average (sections 3.3.3 and 3.3.4).
Input and target together hold the text: `restore` gives it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_spans(count: int, rng: np.random.Generator, *, share: float = 0.15, mean_span: float = 3.0) -> np.ndarray:
    """Which of `count` tokens are dropped, (count,) bool: round(share count) of them, but 1 at least, and not all.

    They lie in round(dropped / mean_span) runs, 1 at least, which do not touch.  The lengths of the runs, and of what
    is kept between them, are uniform among all that have these sums.  ValueError for numbers out of range.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, a token to drop and one to keep, not {count}")
    if not 0 < share < 1 or mean_span < 1:
        raise ValueError(f"share must be within 0 and 1 and mean_span at least 1, not {share!r} and {mean_span!r}")
    dropped = min(max(round(share * count), 1), count - 1)
    kept = count - dropped
    runs = min(max(round(dropped / mean_span), 1), kept + 1)
    gaps = _composition(dropped, runs, rng)
    # what is kept before, between and after the runs: at least 1 between, and at either end perhaps nothing
    between = _composition(kept + 2, runs + 1, rng)
    between[[0, -1]] -= 1
    lengths = np.empty(2 * runs + 1, dtype=np.int64)
    lengths[0::2], lengths[1::2] = between, gaps
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def corrupt(ids: Sequence[int], dropped: np.ndarray, sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The text with gaps, and what was in them: (input, target), lists of ids.

    ids: N tokens, none of them a sentinel.  dropped (N,) bool.  sentinels: more ids than there are gaps, in the order
    of use.  ValueError where that does not hold.
    """
    if len(dropped) != len(ids):
        raise ValueError(f"dropped must say of each of the {len(ids)} tokens whether it is, not of {len(dropped)}")
    if not set(ids).isdisjoint(sentinels):
        raise ValueError("ids must hold no sentinel")
    left, target, gap = [], [], -1
    for i, (token, drop) in enumerate(zip(ids, dropped, strict=True)):
        if not drop:
            left.append(token)
            continue
        if i == 0 or not dropped[i - 1]:                    # a gap begins
            gap += 1
            if gap + 1 >= len(sentinels):
                raise ValueError(f"sentinels must be more than the gaps, and are {len(sentinels)}")
            left.append(sentinels[gap])
            target.append(sentinels[gap])
        target.append(token)
    return left, [*target, sentinels[gap + 1]]


def restore(left: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The text, from its input and its target; ValueError where they do not fit together."""
    content: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            content[token] = current = []
        elif content:
            current.append(token)
        else:
            raise ValueError("target must begin with a sentinel")
    text = [t for token in left for t in (content.get(token, [token]) if token in sentinels else [token])]
    if set(text) & set(sentinels):
        raise ValueError("target must hold what stood in each gap")
    return text


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Positive whole numbers of that sum, (parts,), uniform among all of them: cuts at distinct places."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
