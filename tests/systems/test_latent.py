"""Latent diffusion: an orthogonal autoencoder changes nothing; the scale of latents, their training and editing."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_systems
from support.examples import load
from support.law_tools import rotation
from support.small_systems import CONFIGS, moved, small

from minidiff.data import digit_captions
from minidiff.diffusion import editing
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.gaussian import q_sample
from minidiff.diffusion.samplers import ddim, sample, times
from minidiff.engine import conv
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.nn.module import Module
from minidiff.systems.clip import CLIP
from minidiff.systems.latent import LatentDiffusion
from minidiff.systems.stage import Step

CONFIG = CONFIGS["latent"]
CAPTIONS = ["3", "a bold seven", "", "a thin 1"]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    """The CLIP that the systems here are built on."""
    return small("clip")


@pytest.fixture()
def model(clip) -> LatentDiffusion:
    """One that has not learned, but in which no weight is 0."""
    system = moved(LatentDiffusion(CONFIG, clip.tokenizer, np.random.default_rng(0)))
    system.scale.data = np.array(0.7, np.float32)
    return system


def pictures(B: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (B, 28, 28, 1)).astype(np.float32)


# ---- law 33: an orthogonal autoencoder -------------------------------------------------------------------

class Rotated(Module):
    """An encoder that rotates each square of 4 x 4 pixels in its 16 dimensions, with next to no variance."""

    def __init__(self, E):
        self.E, self.unused = E, Tensor(np.zeros((), np.float32))   # a module's dtype is that of its parameters

    def forward(self, x: Tensor) -> Tensor:
        h = conv.space_to_depth(x, 4)                               # (B, 7, 7, 16), a permutation
        z = h.data @ self.E.T.astype(h.dtype)
        return Tensor(np.concatenate([z, np.full_like(z, -30)], axis=-1))


class RotatedBack(Module):
    def __init__(self, E):
        self.E = E

    def forward(self, z: Tensor) -> Tensor:
        return conv.depth_to_space(Tensor(z.data @ self.E.astype(z.dtype)), 4)


@pytest.mark.law(
    33, "with an orthogonal autoencoder, noising and DDIM in latents, decoded, is noising and DDIM in pixels: the "
        "system itself, from encoded noise and with the denoiser of encoded data",
    source="derived: an orthogonal map commutes with all of it; the rotation from QR, the squares as a permutation",
    tolerance="2e-5: the system's latents are float32, ten steps")
@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32 - 1), st.integers(1, 10))
def test_an_orthogonal_autoencoder_commutes_with_diffusion(clip, seed, steps):
    rng = np.random.default_rng(seed)
    config = replace(CONFIG, autoencoder=replace(CONFIG.autoencoder, latent=16), unet=replace(CONFIG.unet, channels=16))
    system, E = LatentDiffusion(config, clip.tokenizer, rng), rotation(rng, 16)
    system.autoencoder.encoder, system.autoencoder.decoder = Rotated(E), RotatedBack(E)

    def encoded(x):                                                 # by hand, in float64
        return np.einsum("bicjd,kcd->bijk", x.reshape(len(x), 7, 4, 7, 4), E.reshape(16, 4, 4))

    x_0, eps = rng.uniform(-1, 1, (2, 3, 28, 28, 1))
    np.testing.assert_allclose(system.encode(x_0), encoded(x_0), atol=1e-5)
    np.testing.assert_allclose(system.decode(system.encode(x_0)), x_0, atol=1e-5)
    # noising in latents, decoded
    t = int(rng.integers(0, 50))
    z_t = q_sample(system.schedule, system.encode(x_0), t, encoded(eps).astype(np.float32))
    x_t = q_sample(system.schedule, x_0, t, eps)
    np.testing.assert_allclose(system.autoencoder.decoder(Tensor(z_t)).data, x_t, atol=2e-5)
    # DDIM: independent pixels of unequal variance, small enough to stay within [-1, 1], where decode clips
    mean, variance = 0.2 * rng.normal(size=(28, 28, 1)).clip(-1, 1), 0.02 * rng.uniform(0, 1, (28, 28, 1))
    path = times(system.schedule, steps)
    in_pixels = sample(ddim(GaussianDenoiser(system.schedule, mean, variance), eps, path))
    V = np.zeros((784, 784))                                        # E S E^T, square by square
    squares = np.arange(784).reshape(7, 4, 7, 4).transpose(0, 2, 1, 3).reshape(49, 16)
    for n, square in enumerate(squares):
        V[16 * n:16 * n + 16, 16 * n:16 * n + 16] = E @ np.diag(variance.ravel()[square]) @ E.T
    system.denoiser = lambda scale: GaussianDenoiser(system.schedule, encoded(mean[None])[0], V)
    z_T = encoded(eps).astype(np.float32)
    in_latents = system._drawn(CAPTIONS[:3], z_T, path, 1.0, "ddim", SampleStreams(0, 3))
    assert np.abs(in_pixels).max() < 1
    np.testing.assert_allclose(in_latents, in_pixels, atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------

def test_the_stages_train_the_autoencoder_then_the_unet_and_nothing_else(data, clip):
    system = small_systems.new("latent")
    seen = []
    for stage in system.stages(data):
        seen.append((stage.name, stage.module))
        loss = stage.loss(stage.module, *stage.batch(Step(0, 1, 0, 10, 5)))
        assert loss.shape == () and math.isfinite(loss.item())
    assert [name for name, _ in seen] == ["autoencoder", "diffusion"]
    assert seen[0][1] is system.autoencoder and seen[1][1] is system.unet
    assert system.tokenizer is clip.tokenizer
    assert all(np.array_equal(p.data, clip.parameters()[name].data) for name, p in system.clip.parameters().items())


def test_scaled_latents_have_unit_variance_over_the_data(data):
    """And so have those of a batch: the standard error of 500 pictures is .007."""
    system = small_systems.new("latent")
    for stage in system.stages(data):
        if stage.name == "autoencoder":
            moved(system.autoencoder, by=0.3)                       # in place of its training
    mean, std = system.autoencoder.posterior(data.images(np.arange(len(data))))
    every = system.scale.data * mean.astype(np.float64)
    assert every.var() + np.mean((system.scale.data * std.astype(np.float64))**2) == pytest.approx(1, rel=1e-5)
    z_0 = stage.batch(Step(0, 2, 0, 10, 500))[0]
    assert z_0.dtype == np.float32 and z_0.var() == pytest.approx(1, abs=0.1)


def test_the_scale_is_of_the_data_and_of_the_posterior():
    system = LatentDiffusion.__new__(LatentDiffusion)
    system.scale = Tensor(np.ones((), np.float32))
    # the variance of the means is 4, that of the posterior 5
    system.measure_scale(np.array([[1.0, 5.0], [1.0, 5.0]]), np.full((2, 2), math.sqrt(5)))
    assert system.scale.data == pytest.approx(1 / 3) and system.scale.data.dtype == np.float32


def test_the_loss_is_the_squared_error_of_v_at_z_t(model, data):
    rng = np.random.default_rng(0)
    z_0, eps = rng.standard_normal((2, 4, 7, 7, 2), dtype=np.float32)
    t, cond = np.array([0, 20, 35, 49]), model.clip.text_states(CAPTIONS)
    alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
    v = alpha * eps - sigma * z_0
    predicted = model.predict((alpha * z_0 + sigma * eps).astype(np.float32), t, cond)
    assert model.loss(model.unet, z_0, *cond, t, eps).item() == pytest.approx(((predicted - v)**2).mean(), rel=1e-4)


def test_noisy_times_are_trained_more_often(data):
    """P(t < n) = (n/T)^3; of B stratified draws the count below n is within 1 of B times that."""
    *_, stage = small_systems.new("latent").stages(data)
    t = stage.batch(Step(0, 2, 0, 10, 60))[4]
    for n in range(51):
        assert abs((t < n).sum() - 60 * (n / 50) ** 3) <= 1 + 1e-9


def test_each_latent_comes_with_its_own_caption_which_is_dropped_now_and_then(data, monkeypatch):
    """300 captions, each dropped with p = 0.1: outside 6..75 with probability 4e-8.

    The decoder stands for what a latent is of: with the identity in place of the noise, z_0 is scale (mean + std 0).
    """
    system = small_systems.new("latent")
    *_, stage = system.stages(data)
    asked, text_states = [], system.clip.text_states
    monkeypatch.setattr(system.clip, "text_states", lambda captions: asked.extend(captions) or text_states(captions))
    monkeypatch.setattr(Step, "normal", lambda self, shape: np.zeros(shape, np.float32))
    z_0, tokens, *_ = stage.batch(Step(0, 2, 0, 10, 300))
    mean = system.encode(data.images(np.arange(len(data))))
    nearest = [int(np.abs(mean - z).max(axis=(1, 2, 3)).argmin()) for z in z_0]
    assert max(np.abs(mean[i] - z).max() for i, z in zip(nearest, z_0, strict=True)) < 1e-5
    assert all(not caption or digit_captions.parse(caption)[0] == data.labels[i]
               for caption, i in zip(asked, nearest, strict=True))
    null = system.clip.text_states([""])[0]
    dropped = np.abs(tokens - null).max(axis=(1, 2)) < 1e-6
    assert 6 < dropped.sum() < 75 and dropped.tolist() == [caption == "" for caption in asked[:300]]


# ---- sampling --------------------------------------------------------------------------------------------

class Counting:
    def __init__(self, module):
        self.module, self.seen = module, 0

    def __call__(self, z):
        self.seen += len(z.data)
        return self.module(z)


def test_the_decoder_is_called_once_for_each_picture_whatever_the_steps(model):
    model.autoencoder.decoder = counting = Counting(model.autoencoder.decoder)
    for n, draw in enumerate((lambda: model.sample(CAPTIONS, steps=7), lambda: model.sample(CAPTIONS, steps=2),
                              lambda: model.vary(pictures(), CAPTIONS, steps=4),
                              lambda: model.inpaint(pictures(), pictures() > 0, CAPTIONS, steps=4)), start=1):
        assert draw().shape == (4, 28, 28, 1) and counting.seen == 4 * n


@pytest.mark.law(
    32, "no threshold stands between the latent system's network and its answer", source="at v = 0 the answer is "
    "alpha z_t, here far beyond 1", tolerance="1e-6: float32")
def test_latents_are_not_clipped(model):
    """With v = 0, z0_hat is alpha z_t, far beyond 1."""
    assert model.denoiser(3.0).clip is None and model.denoiser(3.0).denoiser.clip is None
    model.unet.conv_out.w.data[:] = 0
    model.unet.conv_out.b.data[:] = 0
    z_t = np.full((1, 7, 7, 2), 10, np.float32)
    np.testing.assert_allclose(model.denoiser(3.0)(z_t, np.array([0]), model.clip.text_states(["3"])),
                               model.schedule.alpha(0) * z_t, rtol=1e-6)


def test_the_decoder_undoes_the_scale(model):
    x = pictures()
    np.testing.assert_allclose(model.decode(model.encode(x)), model.autoencoder.reconstruct(x), atol=1e-5)
    np.testing.assert_allclose(model.encode(x), 0.7 * model.autoencoder.encode(x), rtol=1e-6)


def test_a_sample_depends_on_its_own_seed_and_caption_only(model):
    together = model.sample(CAPTIONS, steps=3, seed=5)
    x, mask = pictures(), np.broadcast_to(np.arange(28)[:, None] < 12, (4, 28, 28))[..., None]
    varied, painted = (model.vary(x, CAPTIONS, steps=5, seed=5),
                       model.inpaint(x, mask, CAPTIONS, steps=3, repeats=2, seed=5))
    assert together.dtype == np.float32 and np.abs(together).max() <= 1
    for i, caption in enumerate(CAPTIONS):
        own = slice(i, i + 1)
        np.testing.assert_allclose(model.sample([caption], steps=3, streams=SampleStreams(5, 4)[own]), together[own],
                                   atol=1e-3)
        np.testing.assert_allclose(model.vary(x[own], [caption], steps=5, streams=SampleStreams(5, 4)[own]),
                                   varied[own], atol=1e-3)
        np.testing.assert_allclose(model.inpaint(x[own], mask[own], [caption], steps=3, repeats=2,
                                                 streams=SampleStreams(5, 4)[own]), painted[own], atol=1e-3)
    assert np.abs(model.sample(CAPTIONS, steps=3, seed=6) - together).max() > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m", "heun"])
def test_every_sampler(model, sampler):
    assert np.isfinite(model.sample(CAPTIONS, steps=3, sampler=sampler)).all()


def test_guidance_is_the_line_through_both_predictions(model):
    z_t, t = np.random.default_rng(0).standard_normal((2, 7, 7, 2), dtype=np.float32), np.array([20, 40])
    cond = model.clip.text_states(["a bold seven", "3"])
    u, c, g = (model.denoiser(scale)(z_t, t, cond) for scale in (0.0, 1.0, 2.5))
    np.testing.assert_allclose(g, u + 2.5 * (c - u), atol=1e-4)
    assert np.abs(c - u).max() > 1e-4                               # the caption matters


# ---- image to image, and in-painting ---------------------------------------------------------------------

def test_strength_0_is_the_reconstruction_and_strength_1_a_picture_from_the_last_time(model):
    x = pictures()
    np.testing.assert_allclose(model.vary(x, CAPTIONS, strength=0.0), model.autoencoder.reconstruct(x), atol=1e-5)
    z_T = q_sample(model.schedule, model.encode(x), 49, SampleStreams(3, 4).normal((7, 7, 2)))
    expected = model._drawn(CAPTIONS, z_T, times(model.schedule, 6), 2.0, "dpm++2m", SampleStreams(3, 4))
    np.testing.assert_allclose(model.vary(x, CAPTIONS, strength=1.0, steps=6, seed=3), expected, atol=1e-5)


def test_known_pixels_stay_and_the_others_are_drawn(model):
    x, mask = pictures(), np.zeros((4, 28, 28, 1), bool)
    mask[:, :14] = True
    drawn = model.inpaint(x, mask, CAPTIONS, steps=4)
    assert np.array_equal(drawn[mask], x[mask]) and np.abs(drawn - x)[~mask].max() > 0.01
    everything = np.ones_like(mask)
    assert np.array_equal(model.inpaint(x, everything, CAPTIONS, steps=4), x)


def test_hidden_pixels_do_not_matter(model):
    x, mask = pictures(), np.zeros((4, 28, 28, 1), bool)
    mask[:, :18] = True
    others = np.where(mask, x, pictures(seed=7))
    assert not np.array_equal(x, others)
    assert np.array_equal(model.inpaint(x, mask, CAPTIONS, steps=3), np.where(
        mask, x, model.inpaint(others, mask, CAPTIONS, steps=3)))


def test_a_position_of_the_code_is_known_where_all_its_pixels_and_those_of_its_neighbours_are(model, monkeypatch):
    seen, inner = [], editing.inpaint

    def spy(denoiser, x_T, path, known, mask, cond, **rest):
        seen.append(mask)
        return inner(denoiser, x_T, path, known, mask, cond, **rest)
    monkeypatch.setattr(editing, "inpaint", spy)
    mask = np.ones((1, 28, 28, 1), bool)
    mask[0, 5, 10] = False
    model.inpaint(pictures(1), mask, ["3"], steps=2)
    around = [[0, i, j, 0] for i in (0, 1, 2) for j in (1, 2, 3)]                   # of the position (1, 2)
    assert seen[0].shape == (1, 7, 7, 1) and np.argwhere(~seen[0]).tolist() == around


# ---- files and refusals ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, atol", [(np.float32, 0), (np.float16, 2e-3)])
def test_the_scale_is_in_the_file(model, tmp_path, dtype, atol):
    model.save(tmp_path / "m.safetensors", dtype=dtype)
    loaded = LatentDiffusion.load(tmp_path / "m.safetensors")
    assert loaded.config == CONFIG and loaded.scale.data == pytest.approx(0.7, abs=1e-3) and loaded.scale.shape == ()
    for name, w in model.state_dict().items():
        np.testing.assert_allclose(loaded.state_dict()[name], w, atol=atol, rtol=atol)
    if not atol:
        assert np.array_equal(model.sample(["3"], steps=2), loaded.sample(["3"], steps=2))


REFUSED = {
    "an unknown sampler": (lambda m: m.sample(["3"], sampler="euler"), "there is no sampler 'euler': it is one of"),
    "too many steps": (lambda m: m.sample(["3"], steps=51), "steps must be a whole number from 1 to 50"),
    "a scale that is no number": (lambda m: m.sample(["3"], scale=math.nan), "scale must be a finite number"),
    "a caption that is no list": (lambda m: m.sample("3"), "captions must be a list"),
    "a strength beyond 1": (lambda m: m.vary(pictures(1), ["3"], strength=1.5), "strength must lie within"),
    "more pictures than captions": (lambda m: m.vary(pictures(2), ["3"]), "images must be one for each of the 1"),
    "pictures of another size": (lambda m: m.vary(pictures(1)[:, :20], ["3"]), r"images must be \(B, 28, 28, 1\)"),
    "a mask of numbers": (lambda m: m.inpaint(pictures(1), pictures(1), ["3"]), "mask must be booleans"),
    "no repeats": (lambda m: m.inpaint(pictures(1), pictures(1) > 0, ["3"], repeats=0), "repeats must be a whole"),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(model, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(model)


@pytest.mark.parametrize("changes, message", [
    ({"unet": replace(CONFIG.unet, channels=3)}, "unet.channels .3. and unet.out .0. must be autoencoder.latent .2."),
    ({"unet": replace(CONFIG.unet, text=16)}, "unet.text .16. clip.width .8."),
    ({"shape": (30, 28, 1)}, r"shape must be \(H, W, C\), with sides that are multiples of 4"),
    ({"shape": (28, 28, 3)}, r"autoencoder.network.channels .1. must be the channels of shape \(28, 28, 3\)"),
])
def test_configurations_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_damaged_weights_are_reported(model):
    model.unet.conv_out.b.data[:] = np.nan
    with pytest.raises(ValueError, match="the pictures are not finite"):
        model.sample(["3"], steps=2)


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch):
    small_systems.ship(monkeypatch)
    example = load("11_latent_diffusion")
    monkeypatch.setattr(example, "load_dataset", lambda folder: small_systems.data())
    rows = example.main(train=str(tmp_path / "run"), steps=2, config=CONFIG, out=str(tmp_path / "l.png"))
    assert rows.shape == (60, 28, 28, 1) and (tmp_path / "l.png").stat().st_size > 1000
    monkeypatch.undo()                                      # the real `load_system`
    again = example.main(model=str(tmp_path / "run" / "model.safetensors"), steps=2, out=str(tmp_path / "l.png"))
    assert np.array_equal(rows, again)
