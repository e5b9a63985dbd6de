"""The draw of a token: the inverse of the CDF, temperature, top-k, and their limits."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.errors import UserError
from minidiff.nn.decoding import check_logits, next_tokens

LOGITS = np.array([0.5, -1.0, 2.0, 0.0, 1.0, -3.0])


def shares(temperature=1.0, top_k=0, n=60_000, logits=LOGITS):
    """The share of [0, 1) that gives each token, to 1/n: u runs over the midpoints of n equal parts."""
    u = (np.arange(n) + 0.5) / n
    drawn = next_tokens(np.broadcast_to(logits, (n, len(logits))), u, temperature, top_k)
    assert (np.diff(drawn) >= 0).all()                      # the CDF rises
    return np.bincount(drawn, minlength=len(logits)) / n


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_every_token_has_a_share_of_the_unit_interval_equal_to_its_probability(temperature):
    np.testing.assert_allclose(shares(temperature), scipy.special.softmax(LOGITS / temperature), atol=2 / 60_000)


@pytest.mark.parametrize("top_k", [1, 2, 5, 6, 7])
def test_top_k_keeps_the_largest_in_proportion(top_k):
    p = scipy.special.softmax(LOGITS)
    p[np.argsort(p)[:max(0, 6 - top_k)]] = 0
    np.testing.assert_allclose(shares(top_k=top_k), p / p.sum(), atol=2 / 60_000)


def test_uniform_numbers_draw_from_the_softmax():
    """Chi-square with 5 degrees of freedom over 50,000 draws; false alarms: 1e-7."""
    u = np.random.default_rng(0).random(50_000)
    seen = np.bincount(next_tokens(np.broadcast_to(LOGITS, (len(u), 6)), u), minlength=6)
    assert scipy.stats.chisquare(seen, len(u) * scipy.special.softmax(LOGITS)).pvalue > 1e-7


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=9), st.floats(0, 1, exclude_max=True))
def test_the_limits(logits, u):
    l, u = np.array([logits]), np.array([u])  # noqa: E741
    greedy = int(l.argmax())
    assert next_tokens(l, u, 0) == next_tokens(l, u, top_k=1) == greedy
    assert l[0, next_tokens(l, u, 1e-12)] == pytest.approx(l.max(), abs=1e-9)    # at T = 1e-12 near ties are drawn too
    assert next_tokens(l, u, 1.0, len(logits)) == next_tokens(l, u, 1.0, 0) == next_tokens(l, u)


def test_of_equal_logits_top_k_keeps_the_first():
    assert shares(top_k=2, logits=np.zeros(4)).tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("u", [0.0, np.nextafter(1.0, 0.0)])
def test_at_the_ends_no_token_of_probability_zero_is_drawn(u):
    for logits in ([-np.inf, 0.0, 0.0, -np.inf], [-1e30, 3.0, 1e30, -1e30], [-2000.0, 0.0, -2000.0, -2000.0]):
        drawn = int(next_tokens(np.array([logits]), np.array([u]))[0])
        assert scipy.special.softmax(logits)[drawn] > 0
    assert next_tokens(np.zeros((1, 7)), np.array([u]))[0] == (0 if u == 0 else 6)
    # sums of every rounding: the last token of any probability is the last
    for logits in np.random.default_rng(0).normal(size=(200, 1, 9)):
        logits[:, -1] = -np.inf
        assert next_tokens(logits, np.array([u]))[0] == (0 if u == 0 else 7)


def test_float32_is_not_too_coarse_for_the_sum():
    """Each of 500 equally likely tokens gets its share of the values of u, up to one value."""
    np.testing.assert_allclose(shares(logits=np.zeros(500, np.float32), n=2_000), 1 / 500, atol=1.01 / 2_000)


def test_wrong_arguments_are_refused():
    l, u = np.zeros((2, 3)), np.zeros(2)  # noqa: E741
    for temperature in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be a finite number of at least 0"):
            next_tokens(l, u, temperature)
    for bad in (1.0, -1e-9, float("nan")):
        with pytest.raises(ValueError, match=r"u must be within \[0, 1\)"):
            next_tokens(l, np.array([0.5, bad]))
    for top_k in (-1, 1.5, True):
        with pytest.raises(ValueError, match="top_k must be a whole number"):
            next_tokens(l, u, 1.0, top_k)
    with pytest.raises(ValueError, match=r"logits \(B, K\), K at least 1, and u \(B,\), not \(2, 3\) and \(3,\)"):
        next_tokens(l, np.zeros(3))


@pytest.mark.parametrize("row, refused", [
    ([0.0, np.nan, 1.0], True), ([0.0, np.inf, 1.0], True), ([-np.inf, -np.inf, -np.inf], True),
    ([0.0, -np.inf, 1.0], False), ([1e300, -1e300, 0.0], False)])
def test_logits_that_leave_no_choice_are_refused(row, refused):
    logits = np.array([[0.0, 1.0, 2.0], row])
    if not refused:
        return check_logits(logits)
    with pytest.raises(UserError, match="^the logits to choose from are not finite: the model's weights are damaged, "
                                        "or the scale is too large$"):
        check_logits(logits)
