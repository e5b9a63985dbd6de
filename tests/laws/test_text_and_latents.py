"""Text and latents (laws 31, 33): CLIP's loss, diffusion in rotated coordinates, and the linear autoencoder.

Against closed forms, exact expectations over every possible batch, ratios of probabilities, and the eigenvectors of a
covariance. FID (law 34), the networks and training (35 to 39) are checked in other files.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.diffusion_strategies import any_schedule, schedule_and_times, seeds
from support.gradcheck import check_gradients
from support.law_tools import Noise, alphas_sigmas, covariance, quickly, rotation, start

from minidiff.diffusion import gaussian
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients
from minidiff.text.clip import clip_loss


def loss_of(image, text, log_scale, dtype=np.float64):
    return clip_loss(*(Tensor(np.asarray(a, dtype)) for a in (image, text, log_scale))).item()


# ---- law 31: CLIP --------------------------------------------------------------------------------------------

@pytest.mark.law(
    31, "N pairs in orthogonal directions have the loss log(1 + (N - 1) e^{-exp(log_scale)}), whatever their lengths",
    source="Radford et al. 2021, figure 3: logits exp(log_scale) on the diagonal and 0 beside it",
    tolerance="1e-9: cosines rounded at 1e-15, times exp(log_scale) of up to 50, over losses of up to log 8")
@quickly
@given(st.integers(1, 8), st.integers(0, 4), st.floats(-3, math.log(50)), seeds)
def test_orthonormal_pairs(N, more, log_scale, seed):
    rng = np.random.default_rng(seed)
    directions = rotation(rng, N + more)[:N]                       # (N, D)
    image, text = directions * rng.uniform(0.1, 10, (N, 1)), directions * rng.uniform(0.1, 10, (N, 1))
    expected = math.log1p((N - 1) * math.exp(-math.exp(log_scale)))
    assert loss_of(image, text, log_scale) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.law(
    31, "embeddings without information have the loss log N: all equal, or images orthogonal to captions",
    source="all logits are equal", tolerance="1e-12: logits of up to 100, equal to 1e-14")
@quickly
@given(st.integers(1, 8), st.floats(-3, math.log(100)), seeds)
def test_uninformative_embeddings(N, log_scale, seed):
    rng = np.random.default_rng(seed)
    alike = rng.normal(size=5) * rng.uniform(0.1, 10, (N, 1))
    assert loss_of(alike, alike, log_scale) == pytest.approx(math.log(N), abs=1e-12)
    image, text, none = rng.normal(size=(N, 3)), rng.normal(size=(N, 2)), np.zeros
    apart = np.hstack([image, none((N, 2))]), np.hstack([none((N, 3)), text])
    assert loss_of(*apart, log_scale) == pytest.approx(math.log(N), abs=1e-12)


@pytest.mark.law(
    31, "the loss is the mean of -log p(text i|image i) and -log p(image i|text i); it is symmetric in its arguments, "
        "and unmoved by lengths, a common rotation, and the order of pairs",
    source="Radford et al. 2021, figure 3, pair by pair in plain loops",
    tolerance="1e-10: logits of up to 100 rounded at 1e-14")
@quickly
@given(st.integers(1, 6), st.integers(1, 5), st.floats(-3, math.log(100)), seeds)
def test_clip_loss_pair_by_pair(N, D, log_scale, seed):
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(2, N, D))

    def logit(i, j):
        cosine = sum(image[i] * text[j]) / math.sqrt(sum(image[i] ** 2) * sum(text[j] ** 2))
        return math.exp(log_scale) * cosine

    total = 0.0
    for i in range(N):
        total -= logit(i, i) - np.logaddexp.reduce([logit(i, j) for j in range(N)])
        total -= logit(i, i) - np.logaddexp.reduce([logit(j, i) for j in range(N)])
    loss = loss_of(image, text, log_scale)
    assert loss == pytest.approx(total / (2 * N), rel=1e-10, abs=1e-10)
    R, order, lengths = rotation(rng, D), rng.permutation(N), rng.uniform(0.01, 100, (N, 1))
    for other in [(text, image), (image @ R, text @ R), (image[order], text[order]), (image * lengths, text / lengths)]:
        assert loss_of(*other, log_scale) == pytest.approx(loss, rel=1e-10, abs=1e-10)


@pytest.mark.law(
    31, "the derivatives to both embeddings and to log_scale; none along an embedding, whose length does not count",
    source="central differences with a random cotangent", tolerance="1e-6: steps of 1e-5 in float64")
@pytest.mark.parametrize("N, D, seed", [(1, 1, 0), (2, 3, 1), (5, 4, 2)])
def test_gradients_of_clip_loss(N, D, seed):
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(2, N, D))
    check_gradients(clip_loss, image, text, np.array(0.7))
    leaves = [Tensor(a, requires_grad=True) for a in (image, text, np.array(0.7))]
    for x, dx in zip((image, text), gradients(clip_loss(*leaves), leaves)[:2], strict=True):
        np.testing.assert_allclose((x * dx).sum(axis=1), 0, atol=1e-14)


@pytest.mark.law(
    38, "clip_loss and its gradients are finite at a scale of 100, at lengths of 1e4 and 1e-4, in half precision too",
    source="no overflow, in the forward pass or back",
    tolerance="2e-2: in half precision log 100 is off by 1e-3, and exp(log_scale) by .1 %, times 100")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
def test_clip_loss_is_finite_at_extremes(dtype, length):
    text = np.repeat(np.eye(4), 4, axis=1)                         # orthogonal, 16 coordinates
    log_scale = math.log(100)
    for image, expected in [(text, 4.0 * math.exp(-100)), (-text, 100 + math.log(3)), (np.roll(text, 1, 0), 100.0)]:
        arrays = (np.asarray(a, dtype) for a in (length * image, length * text, log_scale))
        leaves = [Tensor(a, requires_grad=True) for a in arrays]
        loss = clip_loss(*leaves)
        assert loss.dtype == np.float32 and loss.item() == pytest.approx(expected, rel=2e-2, abs=1e-2)
        assert all(np.isfinite(dx).all() for dx in gradients(loss, leaves))


@pytest.mark.parametrize("image, text, log_scale, message", [
    ((2, 3), (3, 3), (), r"row for row and not empty, not \(2, 3\) and \(3, 3\)"), ((2, 3), (2, 4), (), "row for row"),
    ((2, 3, 1), (2, 3, 1), (), "row for row"), ((2, 3), (2, 3), (1,), r"of shape \(\), not shape \(1,\)"),
])
def test_arguments_that_clip_loss_refuses(image, text, log_scale, message):
    with pytest.raises(ValueError, match=message):
        clip_loss(*(Tensor(np.ones(shape)) for shape in (image, text, log_scale)))
    text = np.ones((2, 3))
    for bad in (0, np.inf, np.nan):
        text[1] = bad
        with pytest.raises(ValueError, match="^text_embeddings must have a direction, and row 1 is 0 or not finite$"):
            clip_loss(Tensor(np.ones((2, 3))), Tensor(text), Tensor(np.array(0.0)))
        with pytest.raises(ValueError, match="^image_embeddings must have a direction, and row 1 is 0 or not finite$"):
            clip_loss(Tensor(text), Tensor(np.ones((2, 3))), Tensor(np.array(0.0)))
    for shape in ((0, 3), (2, 0)):
        with pytest.raises(ValueError, match="row for row and not empty, not "):
            clip_loss(*(Tensor(np.ones(s)) for s in (shape, shape, ())))
    for bad in (np.inf, -np.inf, np.nan):
        with pytest.raises(ValueError, match=f"^log_scale must be one finite number, of shape \\(\\), not {bad}$"):
            clip_loss(Tensor(np.ones((2, 3))), Tensor(np.ones((2, 3))), Tensor(np.array(bad)))


SCALE = 60.0                                                       # of cosines: longer than any row of the tables below


def expected_loss(table, joint, N):
    """E clip_loss over every batch of N independent pairs (a, b) ~ joint, where the logit of (a, b) is table[a, b].

    Any table is possible. Captions are orthogonal unit vectors. An image has the cosines table/SCALE with them, and
    the rest of its unit length along a direction of its own.
    """
    A, B = joint.shape
    cosines = table / SCALE                                        # (A, B)
    rest = ops.sqrt(1 - (cosines * cosines).sum(axis=1, keepdims=True))
    image = ops.concat([cosines, rest * np.eye(A)], axis=1)        # (A, B + A)
    text = Tensor(np.eye(B, B + A))                                # (B, B + A)
    log_scale, total = Tensor(np.array(math.log(SCALE))), 0.0
    for pairs in itertools.combinations_with_replacement(itertools.product(range(A), range(B)), N):
        repeats = math.prod(math.factorial(pairs.count(pair)) for pair in set(pairs))
        p = math.factorial(N) / repeats * math.prod(joint[pair] for pair in pairs)         # in any order
        a, b = (np.array(index) for index in zip(*pairs, strict=True))
        total = total + p * clip_loss(image[a], text[b], log_scale)
    return total


@pytest.mark.law(
    31, "the best critic is pointwise mutual information: over all batches the loss is minimal at "
        "log p(a,b)/p(a)p(b) plus any constant",
    source="van den Oord et al. 2018, section 2.3; the exact expectation over every batch of a discrete joint",
    tolerance="1e-12: sums of up to 56 terms below log N, gradients rounded at 1e-15 SCALE")
@pytest.mark.law(
    "31a", "log N - L is at most the mutual information of pictures and captions",
    source="van den Oord et al. 2018, appendix A.1; the sum p log p/pp", tolerance="exact: an inequality")
@settings(deadline=None, max_examples=6)
@given(st.sampled_from([(2, 3, 2), (3, 2, 3), (2, 2, 3)]), seeds)
def test_the_best_critic_is_pointwise_mutual_information(sizes, seed):
    A, B, N = sizes
    rng = np.random.default_rng(seed)
    joint = rng.uniform(0.05, 1, size=(A, B))
    joint /= joint.sum()
    pmi = np.log(joint / joint.sum(1, keepdims=True) / joint.sum(0))
    table = Tensor(pmi, requires_grad=True)
    best = expected_loss(table, joint, N)
    np.testing.assert_allclose(gradients(best, [table])[0], 0, atol=1e-12)
    assert expected_loss(Tensor(pmi + 1.5), joint, N).item() == pytest.approx(best.item(), rel=1e-12)
    assert math.log(N) - best.item() <= (joint * pmi).sum()
    for size in (0.1, 1.0, 5.0):
        moved = rng.normal(size=(A, B))
        moved *= size / np.std(moved)                              # so it is not a constant
        assert expected_loss(Tensor(pmi + moved), joint, N).item() > best.item() + 1e-6 * size**2


# ---- law 33: latents -----------------------------------------------------------------------------------------

def encoded(E, x):
    """E x for every sample x of a batch (B, ...), kept in its shape."""
    return (x.reshape(len(x), -1) @ E.T).reshape(x.shape)


latent_shapes = st.sampled_from([(2,), (5,), (2, 3), (2, 2, 3)])


@pytest.mark.law(
    33, "an orthogonal encoder E commutes with diffusion: noising, posterior, eps, x_0, v and score of E x are E of "
        "those of x",
    source="derived: all of them are isotropic and linear",
    tolerance="1e-11, 1e-12/sigma^2 for score: E rounds at 1e-15, and the score divides by sigma twice")
@quickly
@given(schedule_and_times(first=0, ends_at_zero=None), latent_shapes, seeds)
def test_an_orthogonal_encoder_commutes_with_noising_and_denoising(drawn, shape, seed):
    schedule, s, t = drawn
    rng = np.random.default_rng(seed)
    D = math.prod(shape)
    E = stats.ortho_group.rvs(D, random_state=rng)
    x_0, eps = rng.normal(size=(2, 3, *shape))
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    z_0, z_t = encoded(E, x_0), gaussian.q_sample(schedule, encoded(E, x_0), t, encoded(E, eps))
    np.testing.assert_allclose(z_t, encoded(E, x_t), rtol=0, atol=1e-12)
    (mean, variance), (z_mean, z_variance) = (
        gaussian.q_posterior_mean_variance(schedule, a_0, a_t, t, s) for a_0, a_t in ((x_0, x_t), (z_0, z_t)))
    np.testing.assert_allclose(z_mean, encoded(E, mean), rtol=0, atol=1e-11)
    assert z_variance == variance
    rounding = 1e-12 / (1 - schedule.alpha_bar[t])
    for name in ("eps_from_x0", "v_from_x0", "score_from_x0"):
        convert = getattr(gaussian, name)
        np.testing.assert_allclose(convert(schedule, z_t, t, z_0), encoded(E, convert(schedule, x_t, t, x_0)),
                                   rtol=0, atol=rounding)


@pytest.mark.law(
    33, "encode, diffuse and sample is diffuse, sample and encode: exact denoisers of encoded data, and every state "
        "of every sampler from encoded noise",
    source="derived from law 12a; E from scipy",
    tolerance="1e-8/sigma: two eigendecompositions, of E S E^T and of S, in up to 10 steps")
@quickly
@given(any_schedule(ends_at_zero=None), st.sampled_from(sorted(SAMPLERS)), latent_shapes, seeds)
def test_an_orthogonal_encoder_commutes_with_sampling(schedule, name, shape, seed):
    rng = np.random.default_rng(seed)
    D = math.prod(shape)
    E, S = stats.ortho_group.rvs(D, random_state=rng), covariance(rng, D)
    data = rng.normal(size=(4, *shape))
    pixels, latents = (GaussianDenoiser(schedule, data[0], S),
                       GaussianDenoiser(schedule, encoded(E, data)[0], E @ S @ E.T))
    x, t = rng.normal(size=(3, *shape)), rng.integers(0, schedule.T, 3)
    _, sigma = alphas_sigmas(schedule, t, x)
    for before, after in [(pixels, latents),
                          (DatasetDenoiser(schedule, data), DatasetDenoiser(schedule, encoded(E, data)))]:
        error = abs(after(encoded(E, x), t) - encoded(E, before(x, t)))
        assert (error <= 1e-9 / sigma**2).all()
    ts = sorted(rng.choice(schedule.T, size=min(10, schedule.T), replace=False), reverse=True)
    noise = rng.normal(size=(3, *shape))
    runs = zip(start(SAMPLERS[name], pixels, x, ts, Noise(3, given=noise)),
               start(SAMPLERS[name], latents, encoded(E, x), ts, Noise(3, given=encoded(E, noise))), strict=True)
    rounding = 1e-8 / math.sqrt(1 - schedule.alpha_bar[ts[-1]])
    for pixel_state, latent_state in runs:
        np.testing.assert_allclose(latent_state.x_t, encoded(E, pixel_state.x_t), rtol=0, atol=rounding)


def linear_vae_elbo(x, W, V, log_D, mu, log_s2):
    """The bound on mean log p(x) of x = W z + mu + s eps, z ~ N(0, I), with q(z|x) = N(V (x - mu), diag D): ().

    E_q log p(x|z) = -(||x - mu - W V (x - mu)||^2 + tr(W diag(D) W^T)) / 2 s^2 - (d/2) log 2 pi s^2
    KL(q || p(z))  = (||V (x - mu)||^2 + sum D - k - sum log D) / 2
    """
    n, d = x.shape
    k = W.shape[1]
    centred = x - mu                                               # (n, d)
    z = centred @ V.transpose(1, 0)                                # (n, k)
    error = centred - z @ W.transpose(1, 0)                        # (n, d)
    D, s2 = ops.exp(log_D), ops.exp(log_s2)
    missed = (error * error).sum() / n + (W * W * D).sum()
    reconstruction = -0.5 * missed / s2 - 0.5 * d * (math.log(2 * math.pi) + log_s2)
    kl = 0.5 * ((z * z).sum() / n + D.sum() - k - log_D.sum())
    return reconstruction - kl


@pytest.mark.law(
    33, "a linear autoencoder's bound is greatest at probabilistic PCA, W = U (L - s^2 I)^{1/2}, s^2 the mean of the "
        "eigenvalues left out; there it is stationary, and equals the exact log-likelihood",
    source="through our autograd, with a bound of the test's own; Tipping & Bishop 1999, eq. 7, 8; Lucas et al. 2019, "
           "section 4; scipy's Gaussian log-density",
    tolerance="1e-9: gradients of sums over 40 samples, of terms below 1e3 (eigenvalues over s^2)")
@quickly
@given(st.integers(2, 6), st.data(), seeds)
def test_a_linear_vae_is_probabilistic_pca(d, data, seed):
    """The bound is the engine's; its gradient is backward's."""
    k = data.draw(st.integers(1, d - 1))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(40, d)) @ (rotation(rng, d) * rng.uniform(0.5, 2, d)) + rng.normal(size=d)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    s2, L, U = values[:-k].mean(), values[-k:], vectors[:, -k:]    # W^T W + s^2 I = L, the posterior's precision s^2
    W = U * np.sqrt(L - s2)
    at = [W, W.T / L[:, None], np.log(s2 / L), x.mean(0), np.array(math.log(s2))]
    leaves = [Tensor(a, requires_grad=True) for a in at]
    elbo = linear_vae_elbo(Tensor(x), *leaves)
    for gradient in gradients(elbo, leaves):
        np.testing.assert_allclose(gradient, 0, atol=1e-9)
    exact = stats.multivariate_normal(x.mean(0), W @ W.T + s2 * np.eye(d)).logpdf(x).mean()
    assert elbo.item() == pytest.approx(exact, rel=1e-9)
    for size in (0.01, 0.1, 1.0):
        moved = [a + size * rng.normal(size=a.shape) for a in at]
        assert linear_vae_elbo(Tensor(x), *(Tensor(np.asarray(a)) for a in moved)).item() < elbo.item()
