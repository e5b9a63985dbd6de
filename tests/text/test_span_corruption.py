"""Span corruption: nothing is lost; the number of dropped tokens and runs is right; all choices are equally likely."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from minidiff.text.span_corruption import corrupt, random_spans, restore

SENTINELS = [99, 98, 97, 96, 95]


def runs_of(dropped) -> list[int]:
    """The lengths of the runs of True."""
    return [len(list(run)) for drop, run in groupby(dropped) if drop]


@st.composite
def texts_with_gaps(draw):
    """Any tokens, and any choice of them in at most four runs."""
    ids = draw(st.lists(st.integers(0, 20), max_size=30))
    lengths = draw(st.lists(st.integers(0, 6), max_size=9))
    dropped = np.resize(np.repeat(np.arange(len(lengths)) % 2 == 1, lengths), len(ids)) if sum(lengths) else \
        np.zeros(len(ids), bool)
    cut = np.cumsum(np.diff(np.concatenate([[False], dropped]).astype(int)) == 1) > 4     # from the fifth run on
    return ids, dropped & ~cut


@given(texts_with_gaps())
def test_input_and_target_give_the_text_back(case):
    ids, dropped = case
    left, target = corrupt(ids, dropped, SENTINELS)
    assert restore(left, target, SENTINELS) == ids
    gaps = len(runs_of(dropped))
    assert [t for t in left if t in SENTINELS] == SENTINELS[:gaps]              # in order, each once
    assert [t for t in target if t in SENTINELS] == SENTINELS[:gaps + 1]        # and one more as the end
    assert target[-1] == SENTINELS[gaps]
    assert len(left) + len(target) == len(ids) + 2 * gaps + 1                   # no token twice, none lost


def test_the_papers_example():
    """Raffel et al. 2020, figure 2, in numbers: Thank you for inviting me to your party last week."""
    ids, dropped = list(range(1, 11)), np.isin(np.arange(1, 11), (3, 4, 9))
    assert corrupt(ids, dropped, SENTINELS) == ([1, 2, 99, 5, 6, 7, 8, 98, 10], [99, 3, 4, 98, 9, 97])


@given(st.integers(2, 600), st.floats(0.05, 0.9), st.floats(1, 6), st.integers(0, 2**32))
def test_the_share_and_the_runs(count, share, mean_span, seed):
    dropped = random_spans(count, np.random.default_rng(seed), share=share, mean_span=mean_span)
    total = min(max(round(share * count), 1), count - 1)
    assert dropped.shape == (count,) and dropped.sum() == total
    assert len(runs_of(dropped)) == min(max(round(total / mean_span), 1), count - total + 1)


@pytest.mark.parametrize("count", [200, 1000])
def test_the_papers_share_and_mean(count):
    """15 % in runs of 3 on average, exactly so where the numbers divide."""
    dropped = random_spans(count, np.random.default_rng(0))
    assert dropped.mean() == 0.15 and np.mean(runs_of(dropped)) == 3


def test_every_choice_of_runs_is_equally_likely():
    """Two runs of one among five: 6 choices.  7 tokens, 4 dropped in two runs: 3 splits of the 4, and 6 places for
    the 3 that are kept.  Chi-square over all choices; false alarm 1e-6."""
    rng = np.random.default_rng(0)
    for count, share, mean_span, choices in ((5, 0.4, 1, 6), (7, 0.57, 2, 18)):
        n = 200 * choices
        seen = Counter(tuple(random_spans(count, rng, share=share, mean_span=mean_span)) for _ in range(n))
        assert len(seen) == choices
        assert sum((k - 200) ** 2 / 200 for k in seen.values()) < chi2.isf(1e-6, choices - 1)


@pytest.mark.parametrize("call, says", [
    (lambda rng: random_spans(1, rng), "count"), (lambda rng: random_spans(9, rng, share=0), "share"),
    (lambda rng: random_spans(9, rng, share=1.0), "share"),
    (lambda rng: random_spans(9, rng, mean_span=0.5), "mean_span"),
    (lambda rng: corrupt([1, 2], np.array([True]), SENTINELS), "dropped"),
    (lambda rng: corrupt([1, 99], np.array([True, False]), SENTINELS), "ids"),
    (lambda rng: corrupt([1, 2, 3], np.array([True, False, True]), SENTINELS[:2]), "sentinels"),
    (lambda rng: restore([1, 99], [98], SENTINELS), "target"), (lambda rng: restore([1, 99], [1], SENTINELS), "target"),
])
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(np.random.default_rng(0))
