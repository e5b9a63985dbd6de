"""Vector quantisation: the nearest code, the gradient of each loss, and the revival of unused codes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.quantise import Codebook, straight_through, usage

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5))        # N, K, D


def codebook(K: int, D: int, rng) -> Codebook:
    return Codebook(K, D, rng).astype(np.float64)


@settings(deadline=None)
@given(sizes, seeds)
def test_the_nearest_code_by_brute_force(size, seed):
    N, K, D = size
    rng = np.random.default_rng(seed)
    book, z = codebook(K, D, rng), rng.normal(size=(N, 1, D))
    for row, k in zip(z.reshape(N, D), book.nearest(z).reshape(N), strict=True):
        distances = [math.dist(row, e) for e in book.codes.data]
        assert distances[k] <= min(distances) + 1e-12               # two codes may be as near to 1e-16
    assert np.array_equal(book.look_up(book.nearest(z)), book.codes.data[book.nearest(z)])


def test_the_nearest_code_where_a_square_is_no_float16():
    """300^2 is inf in float16: distances and losses are computed in float32."""
    codebook = Codebook(3, 2, np.random.default_rng(0))
    codebook.codes.data = np.array([[300, 0], [0, 300], [310, 0]], np.float16)
    q = codebook(Tensor(np.array([[309, 0], [301, 0], [0, 400]], np.float16)))
    assert q.ids.tolist() == [2, 0, 1] and q.z_q.dtype == np.float16
    assert q.codebook.dtype == q.commitment.dtype == np.float32
    assert q.codebook.item() == q.commitment.item() == pytest.approx((1 + 1 + 100**2) / 6, rel=1e-6)


@given(sizes, seeds)
def test_straight_through_is_the_code_and_the_gradient_of_z_to_the_bit(size, seed):
    N, K, D = size
    rng = np.random.default_rng(seed)
    book, z = Codebook(K, D, rng), Tensor(rng.normal(size=(N, D)).astype(np.float32), True)
    dy = rng.normal(size=(N, D)).astype(np.float32)
    q = book(z)
    assert np.array_equal(q.z_q.data, book.codes.data[q.ids])
    dz, de = gradients(q.z_q, [z, book.codes], dy)
    assert np.array_equal(dz, dy) and not de.any()                  # the decoder does not move the codes


@settings(deadline=None)
@given(sizes, seeds)
def test_commitment_moves_the_encoder_only_and_the_codebook_loss_the_codes_only(size, seed):
    """The two terms of eq. 3 (van den Oord et al. 2017), and their derivatives by hand."""
    N, K, D = size
    rng = np.random.default_rng(seed)
    book, z = codebook(K, D, rng), Tensor(rng.normal(size=(N, D)), True)
    q, leaves = book(z), [z, book.codes]
    d = z.data - book.codes.data[q.ids]                             # (N, D)
    assert q.codebook.item() == pytest.approx((d**2).mean()) == q.commitment.item()
    dz, de = gradients(q.commitment, leaves)
    np.testing.assert_allclose(dz, 2 * d / d.size, rtol=1e-12)
    assert not de.any()
    dz, de = gradients(book(z).codebook, leaves)
    assert not dz.any()
    for k in range(K):
        np.testing.assert_allclose(de[k], -2 * d[q.ids == k].sum(axis=0) / d.size, rtol=1e-9, atol=1e-12)


def test_the_loss_of_a_code_is_stationary_at_the_mean_of_its_vectors():
    """As in a step of k-means."""
    rng = np.random.default_rng(0)
    z, book = rng.normal(size=(200, 2)), codebook(5, 2, rng)
    for _ in range(100):
        ids = book.nearest(z)
        book.codes.data = np.stack([z[ids == k].mean(axis=0) if (ids == k).any() else book.codes.data[k]
                                    for k in range(5)])
    np.testing.assert_allclose(gradients(book(Tensor(z)).codebook, [book.codes])[0], 0, atol=1e-15)


def test_training_through_it_brings_encoder_and_codes_together():
    """Plain gradient descent on both terms shrinks the distance between vectors and their codes."""
    rng = np.random.default_rng(1)
    book, z = codebook(4, 3, rng), Tensor(rng.normal(size=(50, 3)), True)
    first = book(z).codebook.item()
    for _ in range(60):
        q = book(z)
        dz, de = gradients(q.codebook + 0.25 * q.commitment, [z, book.codes])
        z.data, book.codes.data = z.data - 10 * dz, book.codes.data - 10 * de
    assert book(z).codebook.item() < 0.2 * first


# ---- dead codes ------------------------------------------------------------------------------------------

def test_unused_codes_move_to_vectors_and_used_ones_stay():
    rng = np.random.default_rng(0)
    book, z = codebook(6, 2, rng), rng.normal(size=(100, 2))
    book.codes.data[2:] += 100                                      # no vector's choice
    living = book.codes.data[:2].copy()
    assert book.revive(z, rng) == 4
    assert np.array_equal(book.codes.data[:2], living)
    assert all((z == e).all(axis=1).any() for e in book.codes.data[2:])             # each on another vector
    assert len(np.unique(book.codes.data, axis=0)) == 6
    assert usage(book.nearest(z), 6)[1] == 1.0                      # all are chosen now: none is dead any more
    assert book.revive(z, rng) == 0


def test_revival_counts_the_vectors_that_chose_a_code():
    book = codebook(3, 1, np.random.default_rng(0))
    book.codes.data = np.array([[0.0], [1.0], [9.0]])
    z = np.array([[0.1], [0.2], [0.9], [5.0]])                      # 0 is chosen twice, 1 once or more, 9 by 5 or none
    ids = book.nearest(z)
    assert np.bincount(ids, minlength=3).tolist() == [2, 2, 0]
    assert book.revive(z, np.random.default_rng(0), fewest=2) == 1 and book.codes.data[2, 0] in z


def test_a_revived_code_moves_to_where_the_error_is():
    """A thousand vectors on a code and one far off: the far one gets the dead code, with probability 1."""
    book = codebook(2, 1, np.random.default_rng(0))
    book.codes.data = np.array([[0.0], [1e6]])
    z = np.zeros((1001, 1))
    z[700] = 3
    assert book.revive(z, np.random.default_rng(0)) == 1 and book.codes.data[1, 0] == 3
    assert book.revive(np.zeros((5, 1)), np.random.default_rng(0)) == 0             # all are codes already


def test_a_revived_code_is_drawn_in_proportion_to_the_squared_error():
    """Errors of 1 and 9: the second is drawn 9 times in 10.  Of 400 draws, 360 +- 6; below 330 once in 1e6."""
    rng, second = np.random.default_rng(0), 0
    for _ in range(400):
        book = codebook(2, 1, rng)
        book.codes.data = np.array([[0.0], [1e6]])
        assert book.revive(np.array([[1.0], [3.0]]), rng) == 1
        second += book.codes.data[1, 0] == 3
    assert 330 < second < 390


# ---- how a codebook is used ------------------------------------------------------------------------------

@given(st.integers(1, 20), st.integers(1, 50))
def test_the_perplexity_of_even_use_is_the_number_in_use(used, times):
    perplexity, alive = usage(np.repeat(np.arange(used), times), 20)
    assert perplexity == pytest.approx(used) and alive == pytest.approx(used / 20)


def test_the_perplexity_of_uneven_use():
    """p = 1/2, 1/4, 1/4: an entropy of 3/2 bits."""
    assert usage(np.array([[3, 3], [0, 1]]), 4) == (pytest.approx(2**1.5), 0.75)


@pytest.mark.parametrize("ids, K", [([], 3), ([3], 3)])
def test_ids_that_are_empty_or_beyond_the_codebook(ids, K):
    with pytest.raises(ValueError, match="^usage: ids must be some of 0..2"):
        usage(np.array(ids, int), K)


def test_what_a_codebook_refuses():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="K and D must be at least 1, not 0 and 2"):
        Codebook(0, 2, rng)
    with pytest.raises(ValueError, match=r"z must be \(..., 2\), not \(5, 3\)"):
        Codebook(4, 2, rng).nearest(np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"z_q must have z's shape \(2, 3\), not \(2,\)"):
        straight_through(Tensor(np.zeros((2, 3))), np.zeros(2))
    with pytest.raises(IndexError, match="ids"):
        Codebook(4, 2, rng).look_up(np.array([4]))


def test_the_gradient_reaches_what_made_z():
    """Through the bottleneck to an encoder's weight: d loss / d w is x^T d loss / d z_q."""
    rng = np.random.default_rng(0)
    book, x = codebook(4, 3, rng), rng.normal(size=(6, 2))
    w, target = Tensor(rng.normal(size=(2, 3)), True), rng.normal(size=(6, 3))
    d = book(Tensor(x) @ w).z_q - target
    np.testing.assert_allclose(gradients(ops.sum(d * d), [w])[0], x.T @ (2 * d.data), rtol=1e-12)
