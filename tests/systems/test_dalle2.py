"""unCLIP: two stages make p(x | y), and the prior is what gives it its spread."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2, norm, qmc
from support import examples as test_examples
from support.small_systems import moved

from minidiff.data.digit_captions import parse
from minidiff.data.digits import Digits
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.samplers import times
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.image_tower import ImageTowerConfig
from minidiff.nn.module import Module
from minidiff.nn.prior import PriorConfig
from minidiff.nn.unet import UNetConfig
from minidiff.systems import dalle2
from minidiff.systems.clip import CLIP, CLIPConfig
from minidiff.systems.dalle2 import PRIORS, UnCLIP, UnCLIPConfig, best_of
from minidiff.systems.stage import Step
from minidiff.text.encoder import TextEncoderConfig
from minidiff.training import run

D = 8
SMALL_CLIP = CLIPConfig(image=ImageTowerConfig(widths=(8, 16), groups=4, last=2),
                        text=TextEncoderConfig(width=D, layers=1, heads=2))
CONFIG = UnCLIPConfig(clip=SMALL_CLIP, prior=PriorConfig(width=8, layers=1, heads=2), components=3, buckets=3, dots=2,
                      unet=UNetConfig(widths=(8, 16), heads=2, groups=4, embedding=16, text=D))


@pytest.fixture(scope="module")
def clip(data) -> CLIP:
    return CLIP.new(data, config=SMALL_CLIP)


@pytest.fixture(scope="module")
def model(data, clip) -> UnCLIP:
    return stirred(UnCLIP(CONFIG, clip.tokenizer, np.random.default_rng(1)), data)


def stirred(model: UnCLIP, data: Digits) -> UnCLIP:
    """A system in which no weight is 0, and whose codes are fitted."""
    moved(model)
    z_i = model.clip.embed_images(data.images(range(len(data))))
    model.pca.fit(z_i)
    model.buckets.fit(model.pca.reduce(z_i))
    model.dots.fit(z_i[:, 0])
    return model


# ---- p(x | y) = integral of p(x | z, y) p(z | y) -------------------------------------------------------------

class LinearGaussian(UnCLIP):
    """z | y ~ N(A y, S),  x | z, y ~ N(B z + C y, s^2 I): exact denoisers replace the networks.

    So  x | y ~ N((B A + C) y, B S B^T + s^2 I).  y is the caption's z_t to the prior; to the decoder, its pooled state.
    """

    def made_of(self, rng):
        root = rng.normal(size=(D, D)) / D
        self.A, self.S = rng.normal(size=(D, D)), root @ root.T
        self.B, self.C, self.s = rng.normal(size=(784, D)), rng.normal(size=(784, D)), 0.3
        return self

    def prior_denoiser(self, scale, null):
        return Shifted(GaussianDenoiser(self.schedule, np.zeros(D), D * self.S),        # of sqrt(D) z
                       lambda cond: np.sqrt(D) * cond[0] @ self.A.T)

    def decoder_denoiser(self, scale, null):
        spread = GaussianDenoiser(self.schedule, np.zeros((28, 28, 1)), np.full((28, 28, 1), self.s**2))
        return Shifted(spread, lambda cond: (cond[0] @ self.B.T + cond[2] @ self.C.T).reshape(-1, 28, 28, 1))


class Shifted:
    """The denoiser of x_0 = shift + r, from that of r."""

    predicts = "x0"

    def __init__(self, of_r, shift):
        self.schedule, self.of_r, self.shift = of_r.schedule, of_r, shift

    def __call__(self, x_t, t, cond=None):
        m = self.shift(cond).astype(x_t.dtype)
        alpha = self.schedule.alpha(t).reshape(-1, *[1] * (x_t.ndim - 1)).astype(x_t.dtype)
        return m + self.of_r(x_t - alpha * m, t)


class GivenNoise:
    """Stands in for SampleStreams: sample i's noise is a unit vector, so that a linear map shows its columns.

    Sample 0 has no noise at all; samples 1 ... D one entry of the prior's, the others one entry of the decoder's.
    """

    def __init__(self, pixels: int):
        self.pixels = pixels

    def __len__(self):
        return 1 + D + self.pixels

    def normal(self, shape):
        noise = np.zeros((len(self), int(np.prod(shape))), np.float32)
        first, columns = (1, D) if shape == (1, D) else (1 + D, self.pixels)
        noise[first + np.arange(columns), np.arange(columns)] = 1
        return noise.reshape(len(self), *shape)


@pytest.fixture(scope="module")
def linear(clip) -> LinearGaussian:
    return LinearGaussian(CONFIG, clip.tokenizer, np.random.default_rng(0)).made_of(np.random.default_rng(3))


def test_the_two_stages_compose_to_the_exact_conditional(linear):
    """DDIM on Gaussians is linear in the noise: mean and covariance come without sampling error.  What is left is the
    discretisation of 250 steps."""
    noise = GivenNoise(40)
    x = linear.sample(["a bold seven"] * len(noise), candidates=1, steps=250, prior_steps=250, streams=noise)
    x = x.reshape(len(noise), 784).astype(np.float64)
    z_t, _, pooled, _ = (a.astype(np.float64) for a in linear.encode_text(["a bold seven"]))
    mean = (linear.B @ linear.A @ z_t[0]) + linear.C @ pooled[0]
    np.testing.assert_allclose(x[0], mean, atol=1e-3 * np.abs(mean).max())
    J = (x[1:] - x[0]).T                                    # (784, D + 40)
    exact = linear.B @ linear.S @ linear.B.T
    np.testing.assert_allclose(J[:, :D] @ J[:, :D].T, exact, atol=0.03 * exact.max())
    # the decoder's own spread is s^2 I; of 784 columns the first 40 are looked at
    np.testing.assert_allclose(J[:, D:], linear.s * np.eye(784)[:, :40], atol=0.02 * linear.s)
    # another caption has another mean
    other = linear.sample(["3"] * len(noise), candidates=1, steps=50, prior_steps=50, streams=noise)
    assert np.abs(other[0].reshape(-1) - mean).max() > 0.1


def test_without_a_draw_from_the_prior_the_covariance_is_lost(linear):
    """With E[z | y] in place of z ~ p(z | y) the mean is the same, but the covariance is only s^2 I."""
    noise = GivenNoise(40)
    z_t, _, pooled, _ = linear.encode_text(["a bold seven"] * len(noise))
    x = linear.decode(z_t @ linear.A.T, ["a bold seven"] * len(noise), steps=250, streams=noise).reshape(-1, 784)
    mean = linear.B @ linear.A @ z_t[0] + linear.C @ pooled[0]
    np.testing.assert_allclose(x[0], mean, atol=1e-3 * np.abs(mean).max())
    np.testing.assert_allclose((x[1 + D:] - x[0]).T, linear.s * np.eye(784)[:, :40], atol=0.02 * linear.s)
    assert np.abs(x[1:1 + D] - x[0]).max() == 0             # the prior's noise does not come in
    assert np.trace(linear.B @ linear.S @ linear.B.T) > 5 * 784 * linear.s**2       # so much is lost


# ---- the same by way of codes ---------------------------------------------------------------------------------

class CodedGaussian(LinearGaussian):
    """LinearGaussian whose code prior knows p(z | y): p(c_k | c_<k, y) is a Gaussian's mass in each bucket.

    In PCA's basis y_k given y_<k is N(mean_k + b . (y_<k - mean_<k), variance), y_<k the middles that c_<k stand for.
    """

    def fitted(self, z_t, rng):
        # the components are those of z under all captions: S is not diagonal in their basis
        others = rng.normal(size=(4000, D)) / np.sqrt(D)
        others[::2] = z_t
        z = others @ self.A.T + rng.normal(size=(4000, D)) @ np.linalg.cholesky(self.S).T
        self.pca.fit(z)
        self.buckets.fit(self.pca.reduce(z))
        return self

    def code_logits(self, codes, dot, cond):
        B, k = codes.shape
        U = self.pca.axes.data.astype(np.float64)
        S, mean = U.T @ self.S @ U, self.pca.reduce(cond[0] @ self.A.T)             # (K, K), (B, K)
        low, width = (a.astype(np.float64) for a in (self.buckets.low.data, self.buckets.width))
        seen = low[:k] + (codes + 0.5) * width[:k]                                  # (B, k)
        b = np.linalg.solve(S[:k, :k], S[:k, k]) if k else np.zeros(0)
        m, std = mean[:, k] + (seen - mean[:, :k]) @ b, np.sqrt(S[k, k] - S[k, :k] @ b)
        edges = low[k] + width[k] * np.arange(1, self.buckets.count)
        cdf = norm.cdf((edges - m[:, None]) / std)                                  # what lies outside: the end buckets
        p = np.diff(cdf, axis=1, prepend=0, append=1)
        return np.log(np.maximum(p, 1e-300))


class EvenUniforms:
    """Stands in for SampleStreams: uniforms spread evenly over the cube (Sobol), and a decoder without noise."""

    def __init__(self, log2_count: int):
        self.u = qmc.Sobol(D, scramble=True, seed=0).random_base2(log2_count)

    def __len__(self):
        return len(self.u)

    def uniform(self, shape=()):
        return self.u if shape else self.u[:, 0]

    def normal(self, shape):
        return np.zeros((len(self), *shape), np.float32)


def test_with_the_code_prior_the_two_stages_compose_to_the_exact_conditional_too(clip):
    """A decoder without noise gives E[x | z, y] = B z + C y: over 1024 codes its mean is E[x | y] = (B A + C) y, its
    covariance B S B^T, to within 1/20 of what a bucket's width makes in x, and 3 %."""
    config = replace(CONFIG, components=D, buckets=64)
    system = CodedGaussian(config, clip.tokenizer, np.random.default_rng(0)).made_of(np.random.default_rng(3))
    system.clip.load_state_dict(clip.state_dict())
    caption, streams = ["a bold seven"], EvenUniforms(10)
    z_t, _, pooled, _ = (a.astype(np.float64) for a in system.encode_text(caption))
    system.fitted(z_t[0], np.random.default_rng(5))
    x = system.sample(caption * len(streams), prior="autoregressive", prior_scale=1.0, steps=10, streams=streams)
    x = x.reshape(-1, 784).astype(np.float64)
    # every code a whole width too high, and x would be off by B U width
    one_width = np.abs(system.B @ (system.pca.axes.data * system.buckets.width)).sum(axis=1)       # (784,)
    exact = system.B @ system.A @ z_t[0] + system.C @ pooled[0]
    assert (np.abs(x.mean(axis=0) - exact) < 0.05 * one_width).all()
    covariance = system.B @ system.S @ system.B.T
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.03 * covariance.max())


# ---- the diffusion prior -------------------------------------------------------------------------------------

def prior_batch(model, data, captions):
    rng = np.random.default_rng(0)
    z_i = model.clip.embed_images(data.images(range(len(captions))))
    z_t, tokens, _, mask = model.encode_text(captions)
    return z_i, z_t, tokens, mask, rng.integers(0, 1000, len(z_i)), rng.standard_normal(z_i.shape, dtype=np.float32)


class Answer(Module):
    """In a network's place: it answers with a given function."""

    def __init__(self, answer):
        self.answer, self.weight = answer, Tensor(np.zeros(1, np.float32), requires_grad=True)

    def forward(self, *args):
        return self.answer(*args)


def test_the_priors_loss_is_0_for_an_oracle_and_1_for_the_answer_0(model, data):
    z_i, *rest = prior_batch(model, data, ["7", "a bold 3", "", "one"])
    seen = {}

    def oracle(z_i_t, t, z_t, tokens, mask):
        seen.update(z_i_t=z_i_t.data, z_t=z_t.data)
        return 0 * z_i_t + np.float32(np.sqrt(D)) * z_i
    assert model.prior_loss(Answer(oracle), z_i, *rest).item() == 0
    # its input was alpha z_i + sigma eps, in units where an entry is about 1
    abar = model.schedule.alpha_bar[rest[3]][:, None]
    np.testing.assert_allclose(seen["z_i_t"], np.sqrt(abar * D) * z_i + np.sqrt(1 - abar) * rest[4], atol=1e-5)
    np.testing.assert_allclose((seen["z_t"] ** 2).mean(axis=1), 1, rtol=1e-5)
    assert model.prior_loss(Answer(lambda z_i_t, *a: 0 * z_i_t), z_i, *rest).item() == pytest.approx(1, rel=1e-5)


def test_the_better_of_two_has_a_larger_dot_product_by_one_over_root_pi():
    """Of two N(m, 1) the larger is m + 1/sqrt(pi) on average, with variance 1 - 1/pi.
    Orthogonal to z_t nothing changes.  False alarm: 5.5 standard errors, three times: 1.2e-7."""
    n, rng = 40000, np.random.default_rng(0)
    z_t = np.zeros((n, 3))
    z_t[:, 0] = 1
    m = np.array([0.3, -1.0, 2.0])
    best = best_of(m + rng.normal(size=(n, 2, 3)), z_t)
    assert abs(best[:, 0].mean() - (m[0] + 1 / np.sqrt(np.pi))) < 5.5 * np.sqrt((1 - 1 / np.pi) / n)
    assert (np.abs(best[:, 1:].mean(axis=0) - m[1:]) < 5.5 / np.sqrt(n)).all()


def test_each_caption_keeps_the_candidate_that_fits_it_best(model):
    captions = ["7", "a bold 3", "one"]
    z_t = model.encode_text(captions)[0]
    # candidates=1 takes the first of a stream's draws
    one, two = (model.embed(captions, candidates=n, steps=4, seed=5) for n in (1, 2))
    gain = ((two - one) * z_t).sum(axis=1)
    assert (gain >= -1e-6).all()
    np.testing.assert_allclose(two[gain < 1e-6], one[gain < 1e-6], atol=1e-5)       # else it is the same draw


def test_each_candidate_has_a_noise_of_its_own(model):
    """Of four candidates of twelve captions the first is the best of all twelve with probability 4^-12."""
    captions = ["7", "a bold 3", "one"] * 4
    z_t = model.encode_text(captions)[0]
    one, four = (model.embed(captions, candidates=n, steps=4, seed=5) for n in (1, 4))
    assert (((four - one) * z_t).sum(axis=1) > 1e-4).any()


# ---- the code prior ------------------------------------------------------------------------------------------

def likelihoods(model: UnCLIP, caption: str) -> dict:
    """p(c) of all 27 codes, as the training loss scores them."""
    z_t, tokens, _, mask = model.encode_text([caption])
    dot = np.array([1])                                     # the upper half of two
    with no_grad():
        return {c: np.exp(-3 * model.codes_loss(model.codes, np.array([c]), dot, z_t, tokens, mask).item())
                for c in itertools.product(range(3), repeat=3)}


def test_the_code_prior_is_a_distribution(model):
    """The probabilities of all codes add up to 1; they would not if a prediction depended on the code it predicts."""
    p = likelihoods(model, "a bold seven")
    assert sum(p.values()) == pytest.approx(1, abs=1e-5)
    assert max(p.values()) > 2 * min(p.values())            # and it is not uniform


def test_codes_are_drawn_as_often_as_the_loss_says(model):
    """Chi-squared over 27 codes, false alarm 1e-7; z_i has its codes again, since PCA's axes are orthonormal."""
    n, p = 4000, likelihoods(model, "a bold seven")
    z_i = model.embed(["a bold seven"] * n, prior="autoregressive", scale=1.0, seed=3)
    codes = model.encode(z_i)
    np.testing.assert_allclose(z_i, model.pca.restore(model.buckets.dequantise(codes)), atol=1e-5)
    found = np.bincount(codes @ [9, 3, 1], minlength=27)
    expected = n * np.array([p[c] for c in itertools.product(range(3), repeat=3)])
    assert ((found - expected) ** 2 / expected).sum() < chi2.isf(1e-7, 26)


def test_a_sample_has_a_dot_product_of_the_upper_half_and_the_unconditional_branch_has_any(model, monkeypatch):
    asked = []
    logits = model.code_logits
    monkeypatch.setattr(model, "code_logits", lambda codes, dot, cond: asked.append(dot) or logits(codes, dot, cond))
    model.embed(["7"] * 5, prior="autoregressive", scale=2.0)
    assert [set(dot.tolist()) for dot in asked] == [{1}, {2}] * 3       # two values, 0 and 1; 2 is "any"


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guided_codes_follow_a_product_of_powers(model, monkeypatch, scale):
    """p(c | y)^scale p(c)^(1 - scale), normalised; chi-squared over each of three codes, false alarm 3e-8."""
    n, cond, uncond = 3000, np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.4, 0.4])
    monkeypatch.setattr(model, "code_logits", lambda codes, dot, asked: np.log(
        np.where(dot[:, None] == 2, uncond, cond)).astype(np.float32))
    codes = model.encode(model.embed(["7"] * n, prior="autoregressive", scale=scale))
    p = cond**scale * uncond**(1 - scale)
    for code in codes.T:
        expected = n * p / p.sum()
        assert ((np.bincount(code, minlength=3) - expected) ** 2 / expected).sum() < chi2.isf(1e-8, 2)


# ---- the decoder ---------------------------------------------------------------------------------------------

def test_the_decoder_uses_the_embedding_in_both_ways(model):
    """Without one of its two inputs z_i still changes the output; without both it does not."""
    captions, t = ["7", ""], np.array([500, 900])
    x_t, z = np.random.default_rng(0).standard_normal((2, 28, 28, 1), dtype=np.float32), np.eye(2, D, dtype=np.float32)
    ways = [model.decoder.to_time.w, model.decoder.to_tokens.w]
    kept = [w.data for w in ways]

    def difference() -> float:
        a, b = (model.conditioned(e, captions, 1.0) for e in (z, -z))
        return float(np.abs(a[0](x_t, t, a[1]) - b[0](x_t, t, b[1])).max())
    found = {}
    try:
        for cut in itertools.product((True, False), repeat=2):
            for w, whole, gone in zip(ways, kept, cut, strict=True):
                w.data = np.zeros_like(whole) if gone else whole
            found[cut] = difference()
    finally:
        for w, whole in zip(ways, kept, strict=True):
            w.data = whole
    assert found.pop((True, True)) == 0 and min(found.values()) > 1e-5


def test_the_decoders_loss_is_the_squared_error_of_v(model, data):
    rng, captions = np.random.default_rng(0), ["7", ""]
    x_0, t, eps = data.images([0, 1]), np.array([100, 700]), rng.standard_normal((2, 28, 28, 1), dtype=np.float32)
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in (model.schedule.alpha(t), model.schedule.sigma(t)))
    v = (alpha * eps - sigma * x_0).astype(np.float32)
    args = (x_0, np.zeros((2, D), np.float32), *model.encode_text(captions)[1:], t, eps)
    assert model.decoder_loss(Answer(lambda x_t, *a: 0 * x_t + v), *args).item() == pytest.approx(0, abs=1e-12)
    assert model.decoder_loss(Answer(lambda x_t, *a: 0 * x_t), *args).item() == pytest.approx((v**2).mean(), rel=1e-5)


# ---- variations, interpolations, text diffs ------------------------------------------------------------------

class Watched(LinearGaussian):
    """Records the z_i that its decoder receives."""

    def decode(self, z_i, captions, **options):
        self.received = z_i
        return super().decode(z_i, captions, **options)


@pytest.fixture
def watched(clip) -> Watched:
    system = Watched(CONFIG, clip.tokenizer, np.random.default_rng(0)).made_of(np.random.default_rng(3))
    system.clip.load_state_dict(clip.state_dict())
    return system


def test_variations_keep_the_embedding_and_change_with_the_noise(watched, data):
    images = data.images(range(3))
    a, b = (watched.variations(images, seed=seed, steps=10) for seed in (0, 1))
    np.testing.assert_array_equal(watched.received, watched.clip.embed_images(images))
    assert np.abs(a - b).max() > 0.1


def test_without_new_noise_a_variation_is_the_image_itself(watched, data):
    """Inverse DDIM and DDIM undo each other, up to their order, 1 / steps.  To the decoder x is N(m, s^2 I): each step
    multiplies x - m, up to 11 here, by a number, and all of them by `factor`, from the table alone."""
    images, schedule = data.images(range(3)), watched.schedule
    z_i, pooled = watched.clip.embed_images(images), watched.encode_text([""] * 3)[2]
    m = (z_i @ watched.B.T + pooled @ watched.C.T).reshape(images.shape)
    found, gs = {}, []
    for n in (50, 200, 400):
        path, factor = [*times(schedule, n), -1], 1.0
        abar = {-1: 1.0} | {int(t): float(schedule.alpha_bar[t]) for t in path[:-1]}
        for t, s in itertools.pairwise(path):
            # down: x0_hat and eps_hat as seen at t; up: eps_hat as seen at s, or at t where s is the clean image
            V_t = abar[t] * watched.s**2 + 1 - abar[t]
            factor *= (np.sqrt(abar[s] * abar[t]) * watched.s**2 + np.sqrt((1 - abar[s]) * (1 - abar[t]))) / V_t
            r = s if s >= 0 else t
            eps = np.sqrt(1 - abar[r]) / (abar[r] * watched.s**2 + 1 - abar[r])
            factor *= np.sqrt(abar[t] / abar[s]) * (1 - np.sqrt(1 - abar[s]) * eps) + np.sqrt(1 - abar[t]) * eps
        found[n] = watched.variations(images, eta=0.0, steps=n)
        np.testing.assert_allclose(found[n] - images, (factor - 1) * (images - m), atol=2e-4)
        gs.append(abs(factor - 1))
    assert gs[1] < 0.022 and gs[0] / gs[1] == pytest.approx(3.5, rel=0.05)
    # and without the term in 1 / steps the image itself, in [-1, 1], is left
    np.testing.assert_allclose(2 * found[400] - found[200], images, atol=0.025)


def test_an_interpolation_begins_and_ends_at_the_images_embeddings(watched, data):
    thetas = [0.0, 0.25, 0.5, 0.75, 1.0]
    watched.interpolations(*data.images([0, 1]), thetas, steps=5)
    z_i = watched.clip.embed_images(data.images([0, 1]))
    np.testing.assert_allclose(watched.received[[0, -1]], z_i, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(watched.received, axis=1), 1, atol=1e-5)
    cosines = (watched.received[1:] * watched.received[:-1]).sum(axis=1)
    np.testing.assert_allclose(cosines, np.cos(np.arccos(z_i[0] @ z_i[1]) / 4), atol=1e-5)


@pytest.mark.parametrize("act", [
    lambda m, x, **o: m.variations(x, **o), lambda m, x, **o: m.interpolations(*x, [0.5], **o),
    lambda m, x, **o: m.text_diff(x[0], "a thin 7", "a bold 7", [0.5], **o)],
    ids=["variations", "interpolations", "text_diff"])
def test_an_image_is_taken_apart_and_drawn_again_at_one_scale_and_in_as_many_steps(model, data, monkeypatch, act):
    scales, path = [], []
    conditioned = model.conditioned
    monkeypatch.setattr(model, "conditioned",
                        lambda z, captions, scale: scales.append(scale) or conditioned(z, captions, scale))
    monkeypatch.setattr(dalle2, "times", lambda schedule, steps: path.append(steps) or times(schedule, steps))
    act(model, data.images([0, 1]), scale=0.7, steps=3)
    assert scales == [0.7, 0.7] and path == [3, 3]


def test_a_text_diff_begins_at_the_image_and_moves_along_the_difference_of_two_captions(watched, data):
    watched.text_diff(data.images([0])[0], "a thin 7", "a bold 7", [0.0, 0.3, 1.0], steps=5)
    before, after = watched.clip.embed_captions(["a thin 7", "a bold 7"])
    z_i, z_d = watched.clip.embed_images(data.images([0]))[0], (after - before) / np.linalg.norm(after - before)
    np.testing.assert_allclose(watched.received[[0, -1]], [z_i, z_d], atol=1e-5)
    assert z_i @ z_d < watched.received[1] @ z_d < 1


# ---- the whole -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prior", PRIORS)
def test_an_image_does_not_depend_on_its_batch(model, prior):
    captions = ["a bold seven leaning left, narrow", "3", "one"]
    options = {"prior": prior, "steps": 3, "prior_steps": 3, "prior_scale": 1.5}
    together = model.sample(captions, seed=4, **options)
    assert together.shape == (3, 28, 28, 1) and together.dtype == np.float32 and np.abs(together).max() <= 1
    for i in range(3):
        alone = model.sample(captions[i:i + 1], streams=SampleStreams(4, 3)[i:i + 1], **options)
        np.testing.assert_allclose(alone[0], together[i], atol=5e-4)                # float32 through two networks


def test_each_prior_gives_its_embedding(model):
    z_t = model.clip.embed_captions(["7", "a bold 3"])
    np.testing.assert_allclose(model.embed(["7", "a bold 3"], prior="text"), z_t, atol=1e-6)
    assert not model.embed(["7"], prior="none").any()
    drawn = [model.embed(["7"], prior=p, seed=s) for p in ("diffusion", "autoregressive") for s in (0, 1, 2)]
    assert len({a.tobytes() for a in drawn}) > 3            # these two draw


@pytest.mark.slow
def test_training_puts_the_trained_clip_in_place_and_a_file_gives_the_same_pictures(tmp_path, data, clip):
    clip.save(tmp_path / "clip.safetensors")
    trained = run.run(tmp_path / "run", UnCLIP, data, run.TrainOptions(effort=0.001), config=CONFIG,
                      needed={"clip": tmp_path / "clip.safetensors"}, quiet=True)
    assert list(trained.seconds) == ["decoder", "prior", "codes"]
    for name, w in clip.state_dict().items():
        np.testing.assert_array_equal(trained.system.clip.state_dict()[name], w)
    loaded = UnCLIP.load(tmp_path / "run" / "model.safetensors")
    for prior in ("diffusion", "autoregressive"):
        a, b = (m.sample(["7"], steps=2, prior_steps=2, prior=prior) for m in (trained.system, loaded))
        np.testing.assert_array_equal(a, b)


# ---- training ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def batches(data, clip) -> tuple[UnCLIP, dict, dict]:
    """A new system, 2000 examples of each of its stages, and their captions."""
    system, of, captions = UnCLIP.new(data, config=CONFIG, needed={"clip": clip}), {}, {}
    encode_text = system.encode_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "encode_text", lambda asked: captions.update({stage.name: asked}) or encode_text(asked),
                      raising=False)
        for n, stage in enumerate(system.stages(data), start=1):
            of[stage.name] = stage.batch(Step(0, n, 0, 10, size=2000))
    return system, of, captions


def test_each_stage_learns_from_what_the_paper_drops(batches):
    """Binomial shares of 2000 examples; false alarm: 6 standard errors, 2e-9 each.  The decoder's two conditions are
    dropped independently: both in one of 20 examples."""
    system, of, _ = batches
    null_z_t, _, null_pooled, _ = system.encode_text([""])
    embedding = ~of["decoder"][1].any(axis=1)
    caption = np.abs(of["decoder"][3] - null_pooled).max(axis=1) < 1e-5
    codes = of["codes"][1] == system.config.dots
    np.testing.assert_array_equal(codes, np.abs(of["codes"][2] - null_z_t).max(axis=1) < 1e-5)
    text = np.abs(of["prior"][1] - null_z_t).max(axis=1) < 1e-5
    shares = {"embedding": (embedding, 0.1), "caption": (caption, 0.5), "both": (embedding & caption, 0.05),
              "text": (text, 0.1), "codes' text": (codes, 0.1)}
    for what, (dropped, p) in shares.items():
        assert abs(dropped.mean() - p) < 6 * np.sqrt(p * (1 - p) / 2000), what


def test_the_buckets_reach_from_the_data_s_least_component_to_its_greatest(batches, data):
    """By the singular vectors of the centred embeddings, whose signs are free: so are the ends, but not their distance.
    Both end buckets hold an image, and a code's middle is at most half a bucket away from the component."""
    system, *_ = batches
    z = system.clip.embed_images(data.images(range(len(data)))).astype(np.float64)
    _, _, axes = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
    ends = np.ptp((z - z.mean(axis=0)) @ axes[:CONFIG.components].T, axis=0)
    low, width = system.buckets.low.data, system.buckets.width
    np.testing.assert_allclose(width * CONFIG.buckets, ends, rtol=1e-3)
    codes, y = system.encode(z.astype(np.float32)), system.pca.reduce(z)
    assert (codes.min(axis=0) == 0).all() and (codes.max(axis=0) == CONFIG.buckets - 1).all()
    assert (np.abs(low + (codes + 0.5) * width - y) <= 0.501 * width).all()


def test_an_example_is_of_one_image(batches, data):
    """In each stage the caption names the digit of the image that z_i embeds; the decoder draws that very image."""
    system, of, captions = batches
    images = data.images(range(len(data)))
    z = system.clip.embed_images(images)                    # (N, D)

    def names_its_digit(stage: str, image) -> bool:
        asked = [(parse(caption)[0], data.labels[i]) for caption, i in zip(captions[stage], image, strict=True)]
        return sum(a is not None for a, _ in asked) > 500 and all(a is None or a == label for a, label in asked)
    x_0, z_i = of["decoder"][:2]
    index = {x.tobytes(): i for i, x in enumerate(images)}
    image = np.array([index[x.tobytes()] for x in x_0])
    kept = z_i.any(axis=1)
    np.testing.assert_allclose(z_i[kept], z[image[kept]], atol=1e-6)
    assert names_its_digit("decoder", image)

    image = (of["prior"][0] @ z.T).argmax(axis=1)
    np.testing.assert_allclose(of["prior"][0], z[image], atol=1e-6)
    assert names_its_digit("prior", image)

    # the codes alone do not tell images apart, so the code prior's are those of the same draw of indices
    image = Step(0, 3, 0, 10, size=2000).choose(data)
    codes, dot, z_t, *_ = of["codes"]
    np.testing.assert_array_equal(codes, system.encode(z[image]))
    assert names_its_digit("codes", image)
    known = dot != system.config.dots
    np.testing.assert_array_equal(dot[known], system.dots.quantise((z[image] * z_t).sum(axis=1))[known])


def test_times_and_noise_of_a_batch(batches):
    """Times, spread evenly: log-SNR ~ N(-1, 2^2) for the decoder, t = T u for the prior; each example has its noise."""
    _, of, _ = batches
    alpha_bar = np.cos((np.sort(of["decoder"][5]) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    from_noise = norm.cdf((-1 - np.log(alpha_bar / (1 - alpha_bar))) / 2)               # the share of larger log-SNR
    for u in (from_noise, np.sort(of["prior"][4]) / 1000):
        np.testing.assert_allclose(u, (np.arange(2000) + 0.5) / 2000, atol=4e-3)
    for eps in (of["decoder"][6], of["prior"][5]):
        assert eps.dtype == np.float32 and len(np.unique(eps)) > 0.9 * eps.size
        assert abs(eps.mean()) < 6 / np.sqrt(eps.size) and abs(eps.var() - 1) < 6 * np.sqrt(2 / eps.size)


@pytest.mark.slow
def test_the_example_runs(model, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors")
    test_examples.load("08_dalle2").main(str(tmp_path / "m.safetensors"), count=4, steps=2, out=str(tmp_path / "s.png"))
    assert (tmp_path / "s.png").stat().st_size > 1000
    said = capsys.readouterr().out
    assert all(f"\n{name}" in said for name in (*PRIORS, "(real images)"))


@pytest.mark.parametrize("options, says", [
    ({"prior": "posterior"}, "prior must be one of"), ({"candidates": 0}, "candidates"), ({"steps": 0}, "steps"),
    ({"prior_steps": 2000}, "steps"), ({"scale": float("nan")}, "scale"), ({"prior_scale": float("inf")}, "scale"),
    ({"prior": "autoregressive", "temperature": -1.0}, "temperature"),
    ({"prior": "autoregressive", "prior_scale": float("nan")}, "scale")])
def test_refusals(model, options, says):
    with pytest.raises(ValueError, match=says):
        model.sample(["7"], **options)


def test_more_refusals(model, data):
    with pytest.raises(TypeError, match="captions"):
        model.sample("7")
    with pytest.raises(ValueError, match="z_i must be"):
        model.decode(np.zeros((2, D)), ["7"])
    with pytest.raises(ValueError, match="images must be"):
        model.variations(data.images([0, 1])[:, :14])
    for wrong, says in (({"schedule": "none"}, "there is no schedule 'none'"),
                        ({"dots": 3, "unet": CONFIG.unet}, "dots must be even"),
                        ({"unet": UNetConfig(text=16)}, "unet.text"), ({"shape": (30, 28, 1)}, "shape must be")):
        with pytest.raises(ValueError, match=says):
            UnCLIPConfig(**({"clip": SMALL_CLIP} | wrong))
