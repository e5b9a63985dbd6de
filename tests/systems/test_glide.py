"""GLIDE: the gradient of CLIP guidance, its effect on known densities, and the noised tower."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_systems
from support.diffusion_strategies import any_schedule
from support.examples import load
from support.law_tools import Noise, covariance, gradient
from support.small_systems import CONFIGS, moved, small

from minidiff import systems
from minidiff.diffusion import schedules
from minidiff.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.gaussian import score_from_x0
from minidiff.diffusion.guidance import ClassifierGuidance
from minidiff.diffusion.samplers import ddpm
from minidiff.engine import ops
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import UserError
from minidiff.systems.glide import GLIDE, GLIDEConfig, similarity_gradient
from minidiff.systems.stage import Step
from minidiff.systems.text_to_image import TextToImage

CONFIG = CONFIGS["glide"]
CAPTIONS = ["7", "a bold seven leaning left", "the thin number 3"]


def perturbed() -> GLIDE:
    """One that has not learned, but in which no weight is 0."""
    return moved(small_systems.new("glide"))


@pytest.fixture(scope="module")
def model() -> GLIDE:
    return perturbed()


@pytest.fixture(scope="module")
def denoiser() -> TextToImage:
    """The system that the model guides, of the same schedule."""
    return small("text-to-image")


# ---- the guided density ------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=25)
@given(any_schedule(ends_at_zero=False), st.floats(-3, 3), st.integers(0, 2**32))
def test_a_linear_clip_shifts_the_mean_of_a_gaussian_and_nothing_else(schedule, scale, seed):
    """p_t(x) exp(scale g . W x) for p_t = N(alpha mu, V) is N(alpha mu + scale V W^T g, V)."""
    rng = np.random.default_rng(seed)
    D, E, B = 3, 2, 4
    mu, S, W, g = rng.normal(size=D), covariance(rng, D), rng.normal(size=(D, E)), rng.normal(size=(B, E))
    t, x_t = rng.integers(0, schedule.T, B), rng.normal(size=(B, D))
    gradient_of = similarity_gradient(lambda x, t: x @ Tensor(W))
    guided = ClassifierGuidance(GaussianDenoiser(schedule, mu, S), gradient_of, scale)
    score = score_from_x0(schedule, x_t, t, guided(x_t, t, g))
    for i in range(B):
        abar = schedule.alpha_bar[t[i]]
        V = abar * S + (1 - abar) * np.eye(D)
        mean = math.sqrt(abar) * mu + scale * V @ W @ g[i]
        expected = np.linalg.solve(V, mean - x_t[i])
        # the way from the score to x0_hat and back costs digits where alpha or sigma is small
        lost = 1e-13 / (1 - abar) / math.sqrt(abar)
        np.testing.assert_allclose(score[i], expected, rtol=1e-6, atol=1e-7 + 100 * lost)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 999))
def test_with_the_best_critic_scale_1_is_the_conditional_model(seed, t):
    """With f . g = log p(x_t | c) - log p(x_t) + a constant, x0_hat is E[x_0 | x_t, c], that of component c."""
    rng, schedule, K, B = np.random.default_rng(seed), schedules.linear(), 3, 4
    weights, means, variances = rng.dirichlet(np.full(K, 3.0)), rng.normal(size=(K, 2)), rng.uniform(0.1, 1, (K, 2))
    exact, abar = MixtureDenoiser(schedule, weights, means, variances), schedule.alpha_bar[t]
    V = abar * variances + 1 - abar                                                 # (K, 2)

    def critic(x, t):
        d = x.reshape(len(x.data), 1, 2) - Tensor(math.sqrt(abar) * means)          # (B, K, 2)
        log_p = ops.sum(d * d * Tensor(-1 / (2 * V)), axis=2) - Tensor(np.log(V).sum(1) / 2)        # (B, K)
        # log p(x_t) = log sum_k w_k p(x_t | k); both leave out the same constant
        return log_p - ops.log(ops.sum(ops.exp(log_p) * Tensor(weights), axis=1, keepdims=True)) + 0.7
    x_t, c, times = rng.normal(size=(B, 2)), rng.integers(0, K, B), np.full(B, t)
    guided = ClassifierGuidance(exact, similarity_gradient(critic), 1.0)(x_t, times, np.eye(K)[c])
    expected = exact(x_t, times, (np.arange(K) == c[:, None],))
    np.testing.assert_allclose(guided, expected, rtol=1e-6, atol=1e-6)      # sigma^2 / alpha is up to 157 at t = 999


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.floats(-3, 3), st.sampled_from([(999, 998), (999, 400), (600, 599), (60, 9), (3, 0)]))
def test_an_ancestral_step_moves_its_mean_by_scale_Sigma_grad(seed, scale, step):
    """GLIDE section 2.4: mu + scale Sigma grad (f . g), Sigma = beta / sqrt(1 - beta), beta = 1 - abar_t / abar_s."""
    (t, s), rng, schedule = step, np.random.default_rng(seed), schedules.linear()
    schedule = schedules.Schedule(schedule.alpha_bar[:t + 1])                       # t is its last time
    W, g, x_t = rng.normal(size=(3, 2)), rng.normal(size=(4, 2)), rng.normal(size=(4, 3))
    alone = GaussianDenoiser(schedule, rng.normal(size=3), covariance(rng, 3))
    guided = ClassifierGuidance(alone, similarity_gradient(lambda x, t: x @ Tensor(W)), scale)
    x_s = [next(ddpm(d, x_t, [t, s], g, streams=Noise(4, given=np.zeros(3)))).x_t for d in (guided, alone)]
    beta = 1 - schedule.alpha_bar[t] / schedule.alpha_bar[s]
    # x0_hat moves by up to 157, sigma^2 / alpha, and is rounded accordingly
    np.testing.assert_allclose(x_s[0] - x_s[1], scale * beta / math.sqrt(1 - beta) * g @ W.T, rtol=1e-8, atol=1e-10)


# ---- the gradient ------------------------------------------------------------------------------------------

def test_the_gradient_of_the_towers_product_against_central_differences():
    model = perturbed().astype(np.float64)
    rng, t, B = np.random.default_rng(0), np.array([0, 20, 41]), 3
    x_t, g = rng.normal(size=(B, 28, 28, 1)), rng.normal(size=(B, 8))
    found = model.grad_log_prob(x_t, t, g)
    assert found.shape == x_t.shape
    pixels = rng.normal(size=(5, 28, 28, 1))                # five directions; each sample has its own derivative

    def f(along):                                           # (B, 5) -> (B,)
        x = x_t + np.einsum("bk,khwc->bhwc", along, pixels)
        return (model.features(Tensor(x), t).data * g).sum(axis=1)
    expected = gradient(f, np.zeros((B, 5)), h=1e-4)                                # (B, 5)
    np.testing.assert_allclose(np.einsum("bhwc,khwc->bk", found, pixels), expected, rtol=1e-6, atol=1e-9)


def test_features_have_the_length_of_the_scale_and_their_product_is_the_logit(model, data):
    x_0, ids, mask, t, eps = next(model.stages(data)).batch(Step(0, 1, 0, 10, 1))
    alpha, sigma = (a[0].reshape(-1, 1, 1, 1) for a in (model.schedule.alpha(t), model.schedule.sigma(t)))
    x_t = (alpha * x_0[0] + sigma * eps[0]).astype(np.float32)
    f = model.features(Tensor(x_t), t[0]).data                                      # (N, D)
    g = model.text(ids[0], mask[0]).data
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(f, axis=1), np.exp(model.log_scale.data), rtol=1e-5)
    logits = (f @ g.T).astype(np.float64)
    loss = -(logits.diagonal() - np.logaddexp.reduce(logits, 1)).mean() / 2
    loss -= (logits.diagonal() - np.logaddexp.reduce(logits, 0)).mean() / 2
    assert model.loss(x_0, ids, mask, t, eps).item() == pytest.approx(loss, rel=1e-4)       # float32


def test_without_signal_every_picture_has_the_same_features_and_the_gradient_falls_with_alpha(model):
    model = moved(GLIDE(replace(CONFIG, T=1000), model.tokenizer, np.random.default_rng(0)))
    rng, g = np.random.default_rng(0), model.embed_captions(["7", "7"])
    x_t = rng.standard_normal((2, 28, 28, 1), dtype=np.float32)
    last = np.array([999, 999])
    alpha = model.schedule.alpha(999)
    assert alpha < 1e-4
    f = model.features(Tensor(x_t), last).data
    np.testing.assert_allclose(f[0], f[1], atol=20 * alpha * np.abs(f).max())
    # the derivative of unit(b + alpha h W) is of order alpha, so that sigma^2 / alpha times it stays of order 1
    assert np.abs(model.grad_log_prob(x_t, last, g)).max() < 10 * alpha


def test_each_sample_is_guided_at_its_own_time_and_caption(model):
    rng, t = np.random.default_rng(0), np.array([3, 20, 45])
    x_t, g = rng.standard_normal((3, 28, 28, 1), dtype=np.float32), model.embed_captions(CAPTIONS)
    together = model.grad_log_prob(x_t, t, g)
    for i in range(3):
        i = slice(i, i + 1)
        with no_grad():                                     # one sample is computed in this thread, under no_grad
            alone = model.grad_log_prob(x_t[i], t[i], g[i])
        np.testing.assert_allclose(together[i], alone, rtol=1e-3, atol=1e-4 * np.abs(alone).max())


# ---- training and sampling ---------------------------------------------------------------------------------

def test_the_times_of_a_batch_have_a_density_that_grows(model, data):
    stage = next(model.stages(data))
    x_0, ids, mask, t, eps = stage.batch(Step(0, 1, 0, 10, 200))
    assert x_0.shape == eps.shape == (200, 4, 28, 28, 1) and t.shape == (200, 4)
    assert t.min() < 15 and t.max() == 49                   # missed by 800 draws with (1 - .09)^800 < 1e-32
    # ((t + 1/2) / T)^2 is uniform but for rounding; a mean of 800 has a deviation of .0102, and 5.5 of them are 4e-8
    assert (((t + 0.5) / 50) ** 2).mean() == pytest.approx(0.5, abs=5.5 * 0.0102)
    assert np.isfinite(stage.loss(stage.module, *(a[:1] for a in (x_0, ids, mask, t, eps))).item())


def test_the_loss_noises_each_picture_at_its_own_time_and_averages_the_batches(model, data):
    """x_t = alpha_t x_0 + sigma_t eps, in closed form; two batches of four pairs, each a loss of its own."""
    stage = next(model.stages(data))
    x_0, ids, mask, t, eps = stage.batch(Step(1, 1, 0, 10, 2))
    schedule = model.schedule
    alpha, sigma = (f(t).astype(np.float32)[..., None, None, None] for f in (schedule.alpha, schedule.sigma))
    x_t, losses = alpha * x_0 + sigma * eps, []
    for b in range(2):
        f, g = model.features(Tensor(x_t[b]), t[b]).data, model.text(ids[b], mask[b]).data
        logits = (f @ (g / np.linalg.norm(g, axis=1, keepdims=True)).T).astype(np.float64)
        losses += [np.logaddexp.reduce(logits, axis).mean() - logits.diagonal().mean() for axis in (0, 1)]
    assert stage.loss(stage.module, x_0, ids, mask, t, eps).item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_scale_0_is_the_unconditional_model(model, denoiser):
    drawn = model.sample(CAPTIONS, scale=0, steps=3)
    np.testing.assert_allclose(drawn, denoiser.sample([""] * 3, scale=1, steps=3), atol=1e-4)
    np.testing.assert_allclose(drawn, denoiser.sample(CAPTIONS, scale=0, steps=3), atol=1e-4)


def test_the_guided_system_is_found_when_it_was_not_given_and_is_not_saved(model, denoiser, tmp_path, monkeypatch):
    model.save(tmp_path / "glide.safetensors")
    loaded = GLIDE.load(tmp_path / "glide.safetensors")
    assert loaded.parameters().keys() == model.parameters().keys()
    small_systems.ship(monkeypatch)
    assert loaded.unconditional() is denoiser
    np.testing.assert_array_equal(loaded.sample(CAPTIONS, steps=2), model.sample(CAPTIONS, steps=2))


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm"])
def test_a_picture_does_not_depend_on_its_batch(model, sampler):
    drawn = model.sample(CAPTIONS, scale=2.0, steps=3, sampler=sampler)
    assert drawn.shape == (3, 28, 28, 1) and drawn.dtype == np.float32 and np.abs(drawn).max() <= 1
    alone = model.sample(CAPTIONS[1:2], scale=2.0, steps=3, sampler=sampler, streams=SampleStreams(0, 3)[1:2])
    np.testing.assert_allclose(drawn[1:2], alone, atol=1e-3)
    assert np.abs(drawn - model.sample(CAPTIONS, scale=0, steps=3, sampler=sampler)).max() > 1e-3


def test_guidance_raises_the_product_f_g(model):
    """f . g of the final pictures is greater than without guidance."""
    g, t = model.embed_captions(CAPTIONS), np.zeros(3, int)

    def product(scale):
        x = model.sample(CAPTIONS, scale=scale, steps=10)
        return (model.features(Tensor(x), t).data * g).sum(axis=1)
    assert (product(20.0) > product(0.0)).all()


# ---- refusals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda m: GLIDEConfig(schedule="sine"), "there is no schedule 'sine': it is one of linear"),
    (lambda m: GLIDEConfig(pairs=1), "pairs must be at least 2"),
    (lambda m: GLIDEConfig(embedding=7), "embedding must be even"),
    (lambda m: m.sample(CAPTIONS, sampler="euler"), "there is no sampler 'euler': it is one of ddpm, ddim"),
    (lambda m: m.sample(CAPTIONS, scale=math.nan), "scale must be a finite number"),
    (lambda m: m.sample(CAPTIONS, steps=0), "steps must be a whole number from 1 to 50"),
    (lambda m: m.sample(CAPTIONS, streams=SampleStreams(0, 2)), "streams must be one for each of the 3 captions"),
    (lambda m: m.features(Tensor(np.zeros((1, 8, 8, 1), np.float32)), np.zeros(1, int)), "images must be"),
])
def test_refusals_name_the_argument(model, make, message):
    with pytest.raises(ValueError, match=message):
        make(model)


def test_another_schedule_than_the_denoisers_is_refused(model, denoiser, monkeypatch):
    message = "schedule must be that of the model that is guided, cosine with T = 50"
    with pytest.raises(ValueError, match=message):
        small_systems.new("glide", replace(CONFIG, T=51))
    small_systems.ship(monkeypatch)
    with pytest.raises(ValueError, match=message):
        GLIDE(replace(CONFIG, T=51), model.tokenizer, np.random.default_rng(0)).sample(["7"])


def test_a_denoiser_of_another_shape_is_refused_with_its_file(model, denoiser, monkeypatch):
    config = replace(denoiser.config, shape=(28, 28, 3), unet=replace(denoiser.config.unet, channels=3))
    other = TextToImage(config, denoiser.tokenizer, np.random.default_rng(0))
    other.file = "runs/text-to-image/model.safetensors"
    monkeypatch.setattr(systems, "load_system", lambda name: other)
    with pytest.raises(UserError, match=r"runs/text-to-image/model.safetensors\) draws \(28, 28, 3\).*--needs"):
        GLIDE(CONFIG, model.tokenizer, np.random.default_rng(0)).sample(["7"])


@pytest.mark.slow
def test_the_example(monkeypatch, tmp_path, capsys):
    shipped = systems.load_system
    monkeypatch.setattr(systems, "load_system",             # the judge is the shipped one
                        lambda name, *path: shipped(name, *path) if name == "digit-classifier" else small(name))
    example = load("05_glide")
    lines = example.main(count=4, each=1, calls=4, clip_scales=(2.0,), free_scales=(), out=str(tmp_path / "g.png"))
    assert len(lines) == 3 and lines[2].startswith("| CLIP guidance | 2 | 4 |")
    assert (tmp_path / "g.png").stat().st_size > 1000 and "CLIP guidance, 4" in capsys.readouterr().out
    rows = [(what, scale, steps) for what, _, scale, steps in example.settings(40, (3.0,), (1.0, 2.0))]
    assert rows == [("CLIP guidance", 3.0, 40), ("classifier-free", 1.0, 40), ("classifier-free", 2.0, 20)]
