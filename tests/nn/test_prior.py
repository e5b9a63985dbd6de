"""The causal transformers of the priors: which inputs each state depends on."""

import numpy as np
import pytest
from support.gradcheck import check_gradients

from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.prior import AutoregressivePrior, DiffusionPrior, Prefixed, PriorConfig

CONFIG, B, M, W, D = PriorConfig(width=8, layers=2, heads=2), 3, 5, 6, 4


def moved(module, seed: int = 0):
    """Changes every parameter: residual branches start at 0, and no state would depend on another."""
    rng = np.random.default_rng(seed)
    for p in module.parameters().values():
        p.data = p.data + 0.3 * rng.standard_normal(p.shape, dtype=np.float32)
    return module


def captions(seed: int = 0):
    mask = np.arange(M) < np.array([[5], [2], [3]])
    return np.random.default_rng(seed).standard_normal((B, M, W), dtype=np.float32), mask


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def codes_prior():
    return moved(AutoregressivePrior(CONFIG, D, W, M, codes=4, values=7, dots=2, rng=np.random.default_rng(0)))


@pytest.fixture
def diffusion_prior():
    return moved(DiffusionPrior(CONFIG, D, W, M, np.random.default_rng(0)))


@pytest.mark.parametrize("j", range(4))
def test_a_state_never_depends_on_a_later_token_and_always_on_the_earlier_ones(j):
    model, (tokens, mask), rest = moved(Prefixed(CONFIG, W, M, 4, np.random.default_rng(0))), captions(), \
        normal(1, B, 4, 8)
    other = rest.copy()
    other[:, j] += normal(2, B, 8)                         # a constant would be lost in the norms
    with no_grad():
        before, after = (model(Tensor(tokens), mask, Tensor(r)).data for r in (rest, other))
    changed = np.abs(after - before).max(axis=(0, 2))
    assert (changed[:j] == 0).all() and (changed[j:] > 1e-4).all()


def test_the_logits_of_a_code_depend_on_the_codes_before_it_only(codes_prior):
    (tokens, mask), codes = captions(), np.random.default_rng(2).integers(0, 7, (B, 3))
    ask = [Tensor(normal(3, B, D)), Tensor(tokens), mask]
    with no_grad():
        logits = codes_prior(codes, np.array([0, 1, 2]), *ask).data
        assert logits.shape == (B, 4, 7)
        for k in range(3):
            other = codes.copy()
            other[:, k] = (other[:, k] + 1) % 7
            changed = np.abs(codes_prior(other, np.array([0, 1, 2]), *ask).data - logits).max(axis=(0, 2))
            assert (changed[:k + 1] == 0).all() and (changed[k + 1:] > 1e-4).all()
            # fewer codes give the same logits, as many as they can
            np.testing.assert_allclose(codes_prior(codes[:, :k], np.array([0, 1, 2]), *ask).data, logits[:, :k + 1],
                                       atol=1e-5)
        assert np.abs(codes_prior(codes, np.array([1, 2, 0]), *ask).data - logits).max(axis=2).min() > 1e-4


def test_the_query_depends_on_everything_but_padding(diffusion_prior):
    (tokens, mask), t = captions(), np.array([3, 50, 900])
    given = {"z_i_t": normal(1, B, D), "t": t, "z_t": normal(2, B, D), "tokens": tokens}

    def answer(**changed):
        a = given | changed
        with no_grad():
            return diffusion_prior(Tensor(a["z_i_t"]), a["t"], Tensor(a["z_t"]), Tensor(a["tokens"]), mask).data
    before = answer()
    assert before.shape == (B, D)
    padded = tokens + 9 * ~mask[:, :, None]
    np.testing.assert_array_equal(answer(tokens=padded.astype(np.float32)), before)
    for changed in ({"z_i_t": given["z_i_t"] + 1}, {"t": t + 40}, {"z_t": given["z_t"] + 1}, {"tokens": tokens + 1}):
        assert np.abs(answer(**changed) - before).max(axis=1).min() > 1e-4, changed.keys()
    # and it is the query's own state that answers
    diffusion_prior.query.data = normal(4, 8)
    assert np.abs(answer() - before).max(axis=1).min() > 1e-4


def test_columns_of_padding_may_be_omitted(diffusion_prior):
    (tokens, mask), z = captions(), Tensor(normal(1, 2, D))
    with no_grad():
        long, short = (diffusion_prior(z, np.array([5, 6]), z, Tensor(tokens[1:, :n]), mask[1:, :n]).data
                       for n in (M, 3))
    np.testing.assert_allclose(short, long, atol=1e-5)


def test_gradients(diffusion_prior, codes_prior):
    (tokens, mask), z = captions(), normal(1, B, D).astype(np.float64)
    model = diffusion_prior.astype(np.float64)
    check_gradients(lambda z_i, z_t, tokens, *_: model(z_i, np.array([3, 50, 900]), z_t, tokens, mask),
                    z, z + 1, tokens.astype(np.float64), *model.parameters().values(), directions=1)
    other, codes = codes_prior.astype(np.float64), np.array([[1, 2], [0, 6], [3, 3]])
    check_gradients(lambda z_t, tokens, *_: other(codes, np.array([0, 1, 2]), z_t, tokens, mask),
                    z, tokens.astype(np.float64), *other.parameters().values(), directions=1)


@pytest.mark.parametrize("values", [{"width": 0}, {"width": 10, "heads": 4}, {"width": 9, "heads": 3}, {"layers": 0}])
def test_configurations_that_are_refused(values):
    with pytest.raises(ValueError, match="width"):
        PriorConfig(**values)


def test_too_long_a_caption_is_refused(diffusion_prior):
    z = Tensor(normal(1, 1, D))
    with pytest.raises(ValueError, match="at most 5 tokens"):
        diffusion_prior(z, np.array([1]), z, Tensor(normal(2, 1, 6, W)), np.ones((1, 6), bool))
