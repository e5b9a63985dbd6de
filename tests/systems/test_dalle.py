"""DALL-E: the density of its pixels, the loss of each stage, what each token sees, and how tokens are drawn."""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from support import examples
from support.gradcheck import check_gradients
from support.small_systems import CONFIGS, moved

from minidiff import systems
from minidiff.data.digit_captions import parse
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.nn.decoding import next_tokens
from minidiff.systems import dalle
from minidiff.systems.dalle import DALLE, DALLEConfig, DiscreteVAE, Prior
from minidiff.systems.stage import Step
from minidiff.text.tokenizer import PAD
from minidiff.training import run
from minidiff.training.trainer import TrainConfig, Trainer

CONFIG = CONFIGS["dalle"]
CAPTIONS = ["a bold 7", "", "the digit three, leaning left", "0"]


@pytest.fixture(scope="module")
def system(data) -> DALLE:
    return moved(DALLE.new(data, 0, CONFIG), by=0.3)


@pytest.fixture(scope="module")
def exact(data) -> DALLE:
    """In float64: rounding errors of 1e-12 change none of the few thousand tokens that tests draw."""
    system = moved(DALLE.new(data, 0, CONFIG), by=0.3)
    system.prior.astype(np.float64)
    system.vae.astype(np.float64)
    return system


# --- stage one --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mu, b", [(0.0, 0.3), (-2.2, 0.25), (1.5, 0.8)])
def test_the_logit_laplace_density(mu, b):
    """The density of eq. 2 is that of sigmoid(Laplace(mu, b)): it integrates to 1, half of it below sigmoid(mu)."""
    def f(x):
        return np.exp(dalle.log_density(np.float64(x), mu, b))
    middle = scipy.special.expit(mu)
    below, above = (scipy.integrate.quad(f, *ends, limit=200)[0] for ends in ((0, middle), (middle, 1)))
    assert below == pytest.approx(0.5, rel=1e-6) and above == pytest.approx(0.5, rel=1e-6)
    for x in (0.1, 0.4, 0.9):
        expected = scipy.stats.laplace.pdf(scipy.special.logit(x), mu, b) / (x * (1 - x))
        assert f(x) == pytest.approx(expected, rel=1e-10)


def test_grey_levels_are_moved_away_from_0_and_1_and_back():
    x = np.linspace(-1, 1, 256)
    squeezed = dalle.squeeze(x)
    np.testing.assert_allclose(squeezed, np.linspace(0.1, 0.9, 256), rtol=1e-12)
    np.testing.assert_allclose(dalle.unsqueeze(dalle.logit(squeezed)), x, atol=1e-12)
    assert np.array_equal(dalle.unsqueeze(np.array([-50.0, 50.0])), [-1, 1])


def stage_one_arrays(B=3, dtype=np.float64, tau=0.7, beta=0.4):
    rng = np.random.default_rng(0)
    x, g = rng.uniform(-1, 1, (B, 28, 28, 1)).astype(dtype), rng.gumbel(size=(B, 7, 7, 5)).astype(dtype)
    return x, g, np.full(B, tau), np.full(B, beta)


def test_the_loss_of_stage_one_is_the_bound():
    vae = moved(DiscreteVAE(CONFIG, np.random.default_rng(0)).astype(np.float64))
    x, g, tau, beta = stage_one_arrays()
    logits = vae.encoder(Tensor(x)).data
    mu = vae.decode(Tensor(scipy.special.softmax((logits + g) / 0.7, axis=-1))).data
    grey = 0.4 * (x + 1) + 0.1
    log_f = scipy.stats.laplace.logpdf(scipy.special.logit(grey), mu, CONFIG.b) - np.log(grey * (1 - grey))
    kl = np.log(5) - scipy.stats.entropy(scipy.special.softmax(logits, axis=-1), axis=-1)
    constant = np.log(2 * CONFIG.b * grey * (1 - grey)).sum()                       # that no parameter changes
    expected = (-log_f.sum() - constant + 0.4 * kl.sum()) / (3 * 784)
    assert vae.loss(x, g, tau, beta).item() == pytest.approx(expected, rel=1e-9)


def test_the_gradient_of_stage_one():
    vae = moved(DiscreteVAE(CONFIG, np.random.default_rng(0)).astype(np.float64))
    arrays, leaves = stage_one_arrays(B=2), vae.parameters()
    chosen = [leaves[name] for name in ("encoder.conv_in.w", "encoder.conv_out.w", "codebook.w", "decoder.conv_out.b")]
    check_gradients(lambda *_: vae.loss(*arrays), *chosen, directions=2, rtol=1e-5)


def test_the_temperature_falls_and_the_weight_of_the_kl_rises(data, system):
    stage = next(system.stages(data))
    seen = [stage.batch(Step(0, 1, number, 1000, size=4)) for number in (0, 50, 100, 375, 750, 1000)]
    x, g, tau, beta = (np.stack(a) for a in zip(*seen, strict=True))
    assert x.shape[1:] == (4, 28, 28, 1) and g.shape[1:] == (4, 7, 7, 5) and g.dtype == np.float32
    assert (tau == tau[:, :1]).all() and (beta == beta[:, :1]).all()
    np.testing.assert_allclose(tau[[0, 3, 4, 5], 0], [1, (1 + 1 / 16) / 2, 1 / 16, 1 / 16])
    np.testing.assert_allclose(beta[:4, 0], np.array([0, 0.5, 1, 1]) * CONFIG.beta)
    assert (np.diff(tau[:, 0]) <= 0).all()


def test_the_trainer_tells_the_stage_its_progress(data, system):
    trainer = Trainer(next(system.stages(data)), TrainConfig(steps=24, batch=2))
    for n, share in ((0, 0), (12, 0.5), (23, 23 / 24)):
        trainer.n = n
        expected = 1 / 16 + (1 - 1 / 16) * np.cos(np.pi / 2 * min(share / 0.75, 1)) ** 2
        np.testing.assert_allclose(trainer.batch()[2], expected)


def test_each_image_has_gumbel_noise_of_its_own(data, system):
    """All numbers of a step together: Kolmogorov-Smirnov against Gumbel(0, 1); false alarms: 1e-7."""
    _, g, _, _ = next(system.stages(data)).batch(Step(0, 1, 0, 10, size=20))
    assert len(np.unique(g)) > 0.99 * g.size
    assert scipy.stats.kstest(g.ravel(), "gumbel_r").pvalue > 1e-7


def test_tokens_are_the_likeliest_codes_and_images_depend_on_them_only(exact, data):
    x, vae = data.images(range(5)).astype(np.float64), exact.vae
    z = vae.tokens(x)
    assert z.shape == (5, 49)
    assert np.array_equal(z, vae.encoder(Tensor(x)).data.reshape(5, 49, 5).argmax(axis=2))
    one_hot = np.zeros((5, 49, 5))
    for (i, n), k in np.ndenumerate(z):
        one_hot[i, n, k] = 1
    mu = vae.decode(Tensor(one_hot.reshape(5, 7, 7, 5))).data
    expected = 2 * ((scipy.special.expit(mu.astype(float)) - 0.1) / 0.8).clip(0, 1) - 1
    np.testing.assert_allclose(vae.images(z), expected, atol=1e-5)


# --- stage two --------------------------------------------------------------------------------------------

def a_sequence(system, B=4, seed=0):
    return system.ids(CAPTIONS[:B]), np.random.default_rng(seed).integers(0, 5, (B, 49))


def test_an_untrained_priors_loss_is_the_logarithm_of_each_vocabulary(data):
    ids, weight, z = stage_two(DALLE.new(data, 0, CONFIG), data).batch(Step(0, 2, 0, 10, size=6))
    prior = Prior(CONFIG, np.random.default_rng(0))
    assert prior.loss(ids, weight, z).item() == pytest.approx(np.log(CONFIG.vocab) / 8 + 7 * np.log(5) / 8, rel=1e-6)


def stage_two(system, data):
    return list(system.stages(data))[1]


def test_the_loss_of_stage_two_is_the_mean_over_tokens_of_each_kind(system, data):
    """Token by token over the batch; the mean over its shards, with unequal numbers of words, is the same."""
    ids, weight, z = stage_two(system, data).batch(Step(3, 2, 0, 10, size=6))
    assert ids.shape == (6, 20) and z.shape == (6, 49)
    text, image = (scipy.special.log_softmax(a.data.astype(float), axis=-1) for a in system.prior(ids, z[:, :48]))
    of_text = [-text[i, n - 1, ids[i, n]] for i in range(6) for n in range(1, 20) if ids[i, n] != PAD]
    of_image = [-image[i, n, z[i, n]] for i in range(6) for n in range(49)]
    expected = np.mean(of_text) / 8 + 7 * np.mean(of_image) / 8
    assert system.prior.loss(ids, weight, z).item() == pytest.approx(expected, rel=1e-5)
    halves = [system.prior.loss(ids[p], weight[p], z[p]).item() for p in (slice(0, 3), slice(3, 6))]
    assert np.mean(halves) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_stage_two(exact):
    ids, z = a_sequence(exact)
    weight = (ids != PAD) / 5.0
    leaves = exact.prior.parameters()
    chosen = [leaves[name] for name in ("text.table", "image.table", "padding", "place", "row", "column", "to_image.w")]
    def loss(*_):
        return exact.prior.loss(ids, weight, z)
    check_gradients(loss, *chosen, directions=1, rtol=1e-5)


def test_the_tokens_and_the_caption_of_a_sequence_are_of_one_image(data):
    """The tokens are set to the image's digit, and each caption that is not dropped names that digit."""
    marked = DALLE.new(data, 0, CONFIG)
    marked.vae.tokens = lambda x, device: digits_of(data, x)[:, None].repeat(49, axis=1)
    ids, _, z = stage_two(marked, data).batch(Step(0, 2, 0, 10, size=60))
    captions = [marked.tokenizer.decode(row) for row in ids]
    named = [(parse(caption)[0], digit) for caption, digit in zip(captions, z[:, 0], strict=True) if caption.strip()]
    assert len(named) > 40 and all(asked is None or asked == digit for asked, digit in named)


def digits_of(data, images) -> np.ndarray:
    """The digits of images of the data set, found by their pixels."""
    known = {x.tobytes(): label for x, label in zip(data.images(range(len(data))), data.labels, strict=True)}
    return np.array([known[x.tobytes()] for x in images])


def test_a_tenth_of_the_captions_is_dropped(system, data):
    """A tenth of 2,000: within 6 standard deviations, 80 of 2,000; false alarms below 1e-8."""
    ids, _, _ = stage_two(system, data).batch(Step(1, 2, 0, 10, size=2000))
    dropped = int((ids == system.ids([""])).all(axis=1).sum())
    assert abs(dropped - 200) < 6 * np.sqrt(2000 * 0.09)


@pytest.mark.parametrize("n", [0, 1, 5, 6, 20, 47])
def test_no_output_depends_on_a_later_image_token(exact, n):
    ids, z = a_sequence(exact)
    text, image = exact.prior(ids, z[:, :48])
    z[:, n:] = (z[:, n:] + 1) % 5
    text_again, image_again = exact.prior(ids, z[:, :48])
    assert np.array_equal(text_again.data, text.data)
    assert np.array_equal(image_again.data[:, :n + 1], image.data[:, :n + 1])
    assert (image_again.data[:, n + 1:] != image.data[:, n + 1:]).any(axis=(0, 2)).all()    # and all later ones do


def test_text_attends_to_earlier_text_and_images_attend_to_all_text(exact):
    ids, z = a_sequence(exact)
    text, image = exact.prior(ids, z[:, :48])
    for n in range(20):
        other = ids.copy()
        other[:, n] = 300
        text_again, image_again = exact.prior(other, z[:, :48])
        assert np.array_equal(text_again.data[:, :n], text.data[:, :n])
        assert (image_again.data != image.data).any(axis=2).all()


def test_the_position_of_a_token_is_its_row_plus_its_column(exact):
    h = exact.prior._embed_image(np.zeros((1, 49), int), 0).data[0]
    assert len(np.unique(h.round(9), axis=0)) == 49
    np.testing.assert_allclose(h[8] - h[1], h[12] - h[5], atol=1e-12)               # a row down, in two columns
    np.testing.assert_allclose(h[9] - h[8], h[2] - h[1], atol=1e-12)                # a column on, in two rows
    late = exact.prior._embed_image(np.zeros((1, 3), int), 20).data[0]
    assert np.array_equal(late, h[20:23])


def test_each_text_position_has_its_own_padding(exact):
    h = exact.prior._embed_text(exact.ids([""])).data[0]
    expected = exact.prior.padding.data + exact.prior.place.data
    assert np.array_equal(h[2:], expected[2:]) and not np.array_equal(h[:2], expected[:2])


# --- drawing ----------------------------------------------------------------------------------------------

def without_cache(system, captions, u, temperature=1.0, top_k=0, scale=1.0):
    """Every token from the whole sequence before it."""
    ids, null = system.ids(captions), system.ids([""]).repeat(len(captions), axis=0)
    z = np.zeros((len(captions), 0), int)
    for n in range(49):
        with_caption, without = (system.prior(text, z)[1].data[:, n] for text in (ids, null))
        logits = without + scale * (with_caption - without)
        z = np.concatenate([z, next_tokens(logits, u[:, n], temperature, top_k)[:, None]], axis=1)
    return z


@pytest.mark.parametrize("choices", [{}, {"scale": 2.5}, {"temperature": 0.6, "top_k": 3}, {"scale": 0.0}])
def test_the_cache_draws_the_same_tokens(exact, choices):
    u = np.random.default_rng(2).random((4, 49))
    drawn = exact.draw_tokens(CAPTIONS, u, **choices)
    assert np.array_equal(drawn, without_cache(exact, CAPTIONS, u, **choices))
    assert len(np.unique(drawn)) > 1


def test_logits_through_the_cache_are_those_of_the_whole_sequence(exact):
    ids, z = a_sequence(exact)
    expected = exact.prior(ids, z[:, :48])[1].data                                  # (4, 49, K)
    logits, caches = exact.prior.start(ids)
    np.testing.assert_allclose(logits, expected[:, 0], rtol=1e-10, atol=1e-12)
    for n in range(48):
        np.testing.assert_allclose(exact.prior.step(z[:, n], n, caches), expected[:, n + 1], rtol=1e-10, atol=1e-12)


def test_the_first_two_tokens_have_the_priors_joint_distribution(exact):
    """p(z_1) p(z_2 | z_1), all 25 of them enumerated.  Chi-square with 24 degrees of freedom; false alarms: 1e-7."""
    n, ids = 1000, exact.ids(["3"])
    drawn = exact.draw_tokens(["3"] * n, np.random.default_rng(5).random((n, 49)))
    p = np.empty((5, 5))
    for a, b in itertools.product(range(5), repeat=2):
        logits = exact.prior(ids, np.array([[a]]))[1].data[0]
        p[a, b] = scipy.special.softmax(logits[0])[a] * scipy.special.softmax(logits[1])[b]
    seen = np.bincount(5 * drawn[:, 0] + drawn[:, 1], minlength=25)
    assert p.min() * n > 2 and scipy.stats.chisquare(seen, n * p.ravel()).pvalue > 1e-7


def test_guidance_at_scales_0_and_1(exact):
    """Scale 1 is the caption's own, 0 the null caption's."""
    u = np.random.default_rng(6).random((4, 49))
    assert np.array_equal(exact.draw_tokens(CAPTIONS, u, scale=0), exact.draw_tokens([""] * 4, u))
    assert np.array_equal(exact.draw_tokens(CAPTIONS, u, scale=1 + 1e-14), exact.draw_tokens(CAPTIONS, u))
    assert not np.array_equal(exact.draw_tokens(CAPTIONS, u, scale=3), exact.draw_tokens(CAPTIONS, u))


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
def test_the_scale_of_a_sample_is_the_configurations_unless_another_is_asked_for(exact, monkeypatch, scale):
    with_scale = [exact.sample(CAPTIONS[:2], seed=1, scale=asked) for asked in (scale, 3.0)]
    np.testing.assert_array_equal(exact.sample(CAPTIONS[:2], seed=1), with_scale[1])
    monkeypatch.setattr(exact, "config", dataclasses.replace(exact.config, scale=scale))
    np.testing.assert_array_equal(exact.sample(CAPTIONS[:2], seed=1), with_scale[0])
    np.testing.assert_array_equal(exact.sample(CAPTIONS[:2], seed=1, scale=3.0), with_scale[1])


def test_pictures_in_colour_are_drawn_without_guidance():
    assert DALLE.config_for((28, 28, 1)).scale == 3 and DALLE.config_for((32, 32, 3)).scale == 1


def test_greedy_draws_do_not_depend_on_the_random_numbers(exact):
    a, b = np.random.default_rng(7).random((2, 4, 49))
    greedy = exact.draw_tokens(CAPTIONS, a, temperature=0)
    assert np.array_equal(greedy, exact.draw_tokens(CAPTIONS, b, top_k=1))
    assert np.array_equal(exact.draw_tokens(CAPTIONS, a, top_k=5), exact.draw_tokens(CAPTIONS, a))


def test_a_sample_does_not_depend_on_its_batch(exact):
    captions = [CAPTIONS[i % 4] for i in range(40)]                                 # two shards
    together = exact.sample(captions, seed=3)
    assert together.shape == (40, 28, 28, 1) and together.dtype == np.float64 and np.abs(together).max() <= 1
    for i in (0, 23, 39):
        alone = exact.sample(captions[i:i + 1], streams=SampleStreams(3, 40)[i:i + 1])
        np.testing.assert_allclose(alone[0], together[i], atol=1e-5)
    assert np.array_equal(exact.sample(captions[:4], seed=3), exact.sample(captions[:4], seed=3))
    assert not np.array_equal(exact.sample(["3", "3"])[0], exact.sample(["3", "3"])[1])


class Inky:
    """In CLIP's place: it prefers bright images for captions with "bold", and dark images for others."""

    def embed_images(self, images):
        angle = images.mean(axis=(1, 2, 3))
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    def embed_captions(self, captions):
        angle = np.where(["bold" in c for c in captions], 1.0, -1.0)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_reranking_keeps_the_best_and_its_first_candidate_is_the_plain_draw(exact, monkeypatch):
    monkeypatch.setattr(systems, "load_system", lambda name: {"clip": Inky()}[name])
    captions = ["a bold 7", "1", "a bold three"]
    plain = {"scale": 1.0, "temperature": 1.0}
    best = exact.sample(captions, seed=4, rerank=6, **plain)
    u = SampleStreams(4, 3).uniform((6, 49))                                              # (3, 6, 49)
    candidates = np.stack([exact.vae.images(exact.draw_tokens(captions, u[:, j])) for j in range(6)], axis=1)
    np.testing.assert_allclose(exact.sample(captions, seed=4, **plain), candidates[:, 0], atol=1e-5)
    ink = candidates.mean(axis=(2, 3, 4))                                           # (3, 6)
    chosen = [ink[0].argmax(), ink[1].argmin(), ink[2].argmax()]
    assert len({*chosen}) > 1
    for i, j in enumerate(chosen):
        np.testing.assert_allclose(best[i], candidates[i, j], atol=1e-5)


BAD = [
    ({"temperature": -1}, "temperature must be a finite number of at least 0"),
    ({"temperature": float("nan")}, "temperature must be a finite number of at least 0"),
    ({"top_k": -2}, "top_k must be a whole number"),
    ({"scale": float("inf")}, "scale must be a finite number"),
    ({"rerank": 0}, "rerank must be a whole number from 1 to 512"),
    ({"rerank": 2.0}, "rerank must be a whole number from 1 to 512"),
    ({"rerank": 10**6}, "rerank must be a whole number from 1 to 512"),
    ({"streams": SampleStreams(0, 3)}, "streams must be one for each of the 1 captions"),
]


@pytest.mark.parametrize("choices, says", BAD)
def test_invalid_options_are_refused_in_one_line(system, choices, says):
    with pytest.raises(ValueError, match=says) as error:
        system.sample(["3"], **choices)
    assert "\n" not in str(error.value)


def test_damaged_weights_draw_no_picture(data):
    damaged = DALLE.new(data, 0, CONFIG)
    damaged.prior.to_image.b.data[1] = np.nan
    with pytest.raises(ValueError, match="the model's weights are damaged"):
        damaged.sample(["3"])


@pytest.mark.parametrize("fields", [{"codes": 1}, {"b": 0.0}, {"beta": -1.0}, {"b": float("nan")}, {"heads": 0},
                                    {"scale": float("inf")}])
def test_invalid_configurations_are_refused(fields):
    with pytest.raises(ValueError, match="DALLEConfig"):
        DALLEConfig(**fields)


# --- the run ----------------------------------------------------------------------------------------------

def test_it_trains_in_two_stages_and_its_file_comes_back(tmp_path, data, monkeypatch):
    trained = run.run(tmp_path, DALLE, data, run.TrainOptions(effort=0.001), config=CONFIG, quiet=True).system
    assert (tmp_path / "1-dvae" / "samples.png").exists() and (tmp_path / "2-prior" / "samples.png").exists()
    loaded = DALLE.load(tmp_path / "model.safetensors")
    assert loaded.config == CONFIG
    assert np.array_equal(loaded.sample(CAPTIONS, seed=1), trained.sample(CAPTIONS, seed=1))

    # and the example runs
    monkeypatch.setattr(systems, "load_system", lambda name: {"clip": Inky()}[name])
    options = {"weights": str(tmp_path / "model.safetensors"), "rerank": 2, "out": str(tmp_path / "d.png")}
    examples.load("07_dalle").main(**options)
    assert (tmp_path / "d.png").stat().st_size > 1000
