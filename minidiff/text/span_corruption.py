"""Span corruption: a model learns from text alone, by writing the words that were removed from it.

    text      a picture of a bold seven leaning left . the 7 tilted left
    input     a picture of <0> seven leaning left . the <1> left
    target    <0> a bold <1> 7 tilted <2>

Runs of tokens (spans) are dropped.  Each is replaced by one sentinel, a token with the number of the gap.  The target
holds the dropped runs, each after the sentinel of its gap, and one more sentinel at the end (Raffel et al. 2020,
arXiv 1910.10683, section 3.1.4 and figure 2).  15 % of the tokens are dropped, in runs of 3 on average (sections 3.3.3
and 3.3.4).  Input and target together contain the text, which `restore` recovers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def random_spans(count: int, rng: np.random.Generator, *, share: float = 0.15, mean_span: float = 3.0) -> np.ndarray:
    """(count,) bool: which of `count` tokens are dropped.  They are round(share count), at least 1 and not all.

    They form round(dropped / mean_span) runs, at least 1, which do not touch.  The lengths of the runs, and of the kept
    parts between them, are uniform among all with the same sum.  ValueError for numbers out of range.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, a token to drop and one to keep, not {count}")
    if not 0 < share < 1 or mean_span < 1:
        raise ValueError(f"share must be within 0 and 1 and mean_span at least 1, not {share!r} and {mean_span!r}")
    dropped = min(max(round(share * count), 1), count - 1)
    kept = count - dropped
    runs = min(max(round(dropped / mean_span), 1), kept + 1)
    gaps = _composition(dropped, runs, rng)
    # the kept parts before, between and after the runs: at least 1 token between two runs, at the ends perhaps none
    between = _composition(kept + 2, runs + 1, rng)
    between[[0, -1]] -= 1
    lengths = np.empty(2 * runs + 1, dtype=np.int64)
    lengths[0::2], lengths[1::2] = between, gaps
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def corrupt(ids: Sequence[int], dropped: np.ndarray, sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The text with gaps, and the dropped tokens: (input, target), lists of ids.

    ids: N tokens, none of them a sentinel.  dropped (N,) bool.  sentinels: more ids than there are gaps, in the order
    of use.  ValueError otherwise.
    """
    if len(dropped) != len(ids):
        raise ValueError(f"dropped must have one entry for each of the {len(ids)} tokens, not {len(dropped)}")
    if not set(ids).isdisjoint(sentinels):
        raise ValueError("ids must not contain a sentinel")
    corrupted, target, gap = [], [], -1
    for i, (token, drop) in enumerate(zip(ids, dropped, strict=True)):
        if not drop:
            corrupted.append(token)
            continue
        if i == 0 or not dropped[i - 1]:                    # a gap begins
            gap += 1
            if gap + 1 >= len(sentinels):
                raise ValueError(f"sentinels must be more than the gaps, not {len(sentinels)}")
            corrupted.append(sentinels[gap])
            target.append(sentinels[gap])
        target.append(token)
    return corrupted, [*target, sentinels[gap + 1]]


def restore(corrupted: Sequence[int], target: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The text, from its input and its target; ValueError if they do not belong together."""
    content: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            content[token] = current = []
        elif content:
            current.append(token)
        else:
            raise ValueError("target must begin with a sentinel")
    text = [t for token in corrupted for t in (content.get(token, [token]) if token in sentinels else [token])]
    if set(text) & set(sentinels):
        raise ValueError("target must contain the tokens of each gap")
    return text


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """(parts,) positive whole numbers with the sum `total`, uniform among all such, from cuts at distinct positions."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
