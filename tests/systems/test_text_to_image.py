"""Text to image, the whole system: its batches, its prediction, its guidance, and files that it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.gradcheck import check_loss_gradient
from support.law_tools import normal_share

from minidiff import checkpoint
from minidiff.cli.main import main
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import UserError
from minidiff.nn.unet import SpatialAttention
from minidiff.systems import load_system
from minidiff.systems.text_to_image import TextToImage
from minidiff.text.encoder import TextEncoder


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return tiny.trained_a_little()


@pytest.mark.parametrize("predicts", ["v", "eps", "x0"])
def test_an_untrained_model_predicts_zero_and_its_loss_is_the_mean_square_of_the_target(predicts):
    model = TextToImage(replace(tiny.CONFIG, predicts=predicts), tiny.tokenizer(), np.random.default_rng(0))
    x_0, ids, mask, times, eps = tiny.trainer().batch()
    alpha, sigma = (f(times).reshape(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
    target = {"v": alpha * eps - sigma * x_0, "eps": eps, "x0": x_0}[predicts]
    assert model.loss(x_0, ids, mask, times, eps).item() == pytest.approx((target**2).mean(), rel=1e-5)


def test_an_untrained_mixture_takes_black_white_and_between_for_equally_likely():
    """x0_hat is the mean of x_0 under x_t's density, on a fine grid: masses 1/3 at -1 and 1, and N(0, 1/2)."""
    model, grid = tiny.trainer().stage.module, np.linspace(-6, 6, 4801)
    rng, t = np.random.default_rng(0), np.array([20, 35, 49])
    x_t = rng.standard_normal((3, 28, 28, 1), dtype=np.float32)
    got = model.unguided()(x_t, t, model.encode(["3", "a seven", ""]))
    for i, time in enumerate(t):
        alpha, sigma = model.schedule.alpha(time), model.schedule.sigma(time)
        x_0, mass = np.append(grid, [-1, 1]), np.append(np.exp(-grid**2) / np.sqrt(np.pi) * (grid[1] - grid[0]), [1, 1])
        seen = x_t[i].reshape(-1, 1)[:40]
        w = mass * np.exp(-((seen - alpha * x_0) / sigma) ** 2 / 2)
        np.testing.assert_allclose(got[i].reshape(-1)[:40], (w * x_0).sum(1) / w.sum(1), rtol=1e-4, atol=1e-5)


def test_noisy_times_are_trained_more_often():
    """log-SNR ~ N(-1, 2^2); of B stratified draws the count below n is within 1 of B times its share."""
    t = tiny.trainer(batch=60).batch()[3]
    assert (np.abs((t[:, None] < np.arange(51)).sum(0) - 60 * normal_share(50)) <= 1 + 1e-9).all()
    assert np.median(t) > 25


def test_the_loss_is_the_squared_error_of_the_prediction_at_x_t(model):
    x_0, ids, mask, times, eps = tiny.trainer().batch()
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in (model.schedule.alpha(times), model.schedule.sigma(times)))
    x_t, v = (alpha * x_0 + sigma * eps).astype(np.float32), alpha * eps - sigma * x_0
    with no_grad():
        text = model.text(ids, mask)
    predicted = model.predict(x_t, times, (text.tokens.data, text.pooled.data, text.mask))
    # x_t is rounded differently here, by 1e-7, and the network magnifies the difference
    assert model.loss(x_0, ids, mask, times, eps).item() == pytest.approx(((predicted - v) ** 2).mean(), rel=1e-4)


def test_each_sample_is_differentiated_at_its_own_time_and_caption(model):
    """`predict_vjp` of a batch, computed shard by shard, is that of each sample alone, and its y is `predict`'s."""
    rng, t = np.random.default_rng(0), np.array([3, 20, 45, 31])
    x_t, dy = rng.standard_normal((2, 4, 28, 28, 1), dtype=np.float32)
    cond = model.encode(["3", "a bold seven", "", "a thin 1"])
    y, dx = model.predict_vjp(x_t, t, dy, cond)
    np.testing.assert_allclose(y, model.predict(x_t, t, cond), rtol=1e-4, atol=1e-5)    # float32 through a UNet
    for i in range(4):
        i = slice(i, i + 1)
        with no_grad():                                     # one sample is computed in this thread, under no_grad
            _, alone = model.predict_vjp(x_t[i], t[i], dy[i], tuple(a[i] for a in cond))
        np.testing.assert_allclose(dx[i], alone, rtol=1e-3, atol=1e-4 * np.abs(alone).max())


def test_the_gradient_of_the_loss_in_random_directions():
    """Central differences in float64 of the whole system, caption encoder included."""
    t = tiny.trainer(batch=3)
    model = tiny.trained_a_little().astype(np.float64)
    x_0, ids, mask, times, eps = t.batch()
    x_0, eps = x_0.astype(np.float64), eps.astype(np.float64)
    check_loss_gradient(lambda: model.loss(x_0, ids, mask, times, eps), list(model.parameters().values()), 5)


@pytest.mark.law(
    28, "a picture depends on its own seed and caption only, through the whole system",
    source="the same picture made alone", tolerance="2e-4: float32 through a UNet, four times")
def test_a_sample_depends_on_its_own_seed_only(model):
    """Law 28: sample i of a batch is the sample made alone, and the batch's size changes nothing but rounding."""
    prompts = ["3", "a bold seven", "", "a thin 1", "8"]
    together = model.sample(prompts, steps=4, seed=5)
    for i, prompt in enumerate(prompts):
        alone = model.sample([prompt], steps=4, streams=SampleStreams(5, 5)[i:i + 1])
        np.testing.assert_allclose(alone[0], together[i], atol=2e-4)
    assert np.abs(model.sample(prompts, steps=4, seed=6) - together).max() > 0.01


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_sampler_ends_in_an_image(model, sampler):
    states = list(model.trajectory(["3", "4"], steps=5, sampler=sampler))
    assert len(states) == 6 and states[0].t == 49 and states[-1].t == -1
    x_0 = states[-1].x_t
    assert x_0.shape == (2, 28, 28, 1) and x_0.dtype == np.float32 and np.abs(x_0).max() <= 1


def test_a_sampler_of_consistency_models_is_refused(model, capsys):
    with pytest.raises(UserError, match="lcm is for consistency models.* text-to-image is none"):
        model.check_sampler("lcm")
    assert main(["sample", "3", "--sampler", "lcm", "-o", "x.png"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.law(
    30, "the system's guided x0_hat is x0_hat(0) + scale (x0_hat(1) - x0_hat(0))",
    source="two calls of the network, by hand", tolerance="1e-4 (1 + scale): float32 through a UNet")
@settings(max_examples=10)
@given(scale=st.floats(-3, 8), seed=st.integers(0, 100))
def test_guidance_is_the_line_through_the_two_predictions(model, scale, seed):
    """x0_hat(scale), before clipping, = x0_hat(0) + scale (x0_hat(1) - x0_hat(0)): law 30."""
    x_t = np.random.default_rng(seed).standard_normal((2, 28, 28, 1), dtype=np.float32)
    t, cond = np.array([20, 40]), model.encode(["a bold seven", "3"])
    null = model.encode(["", ""])

    schedule = model.schedule

    def x0_hat(v):
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1).astype(np.float32) for f in (schedule.alpha, schedule.sigma))
        return alpha * x_t - sigma * v
    u, c = x0_hat(model.predict(x_t, t, null)), x0_hat(model.predict(x_t, t, cond))
    guided = replace(model.denoiser(scale), clip=None)(x_t, t, cond)
    np.testing.assert_allclose(guided, u + scale * (c - u), atol=1e-4 * (1 + abs(scale)))


LEVELS = {49: 1015.0, 39: 3.10, 29: 1.39, 19: 0.738, 9: 0.336}                      # sigma_t/alpha_t of five steps


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_a_loss_moves_to_a_gpu_is_known_ahead(model, dtype):
    """alpha_t, sigma_t, each token's share of its caption's mean, and the sinusoids of t, small arrays all."""
    t = np.array([0, 7, 49])
    ids, mask = model.tokens(["3", "a bold seven", ""])
    alpha, sigma, share, embedded = model.ahead(dtype, None, ids, mask, t, None)
    abar = model.schedule.alpha_bar[t]
    np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=1e-6)
    np.testing.assert_allclose(share, mask / mask.sum(axis=1, keepdims=True), rtol=1e-3)
    half = model.config.unet.embedding // 2
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / half)
    np.testing.assert_allclose(embedded, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-3)
    assert alpha.dtype == sigma.dtype == np.float32 and share.dtype == embedded.dtype == dtype


@pytest.mark.parametrize("low, high, guided", [
    (0.0, None, {49, 39, 29, 19, 9}), (0.5, 2.0, {29, 19}), (1.0, None, {49, 39, 29}), (0.0, 1.0, {19, 9}),
    (None, 1.0, {19, 9}), (2, 2, set()), (0.0, 0.0, set()), (None, 0, set())])
def test_guidance_acts_between_the_two_noise_levels(model, monkeypatch, low, high, guided):
    """There the network answers with and without the caption, elsewhere with it alone."""
    called, inner = {}, model.predict

    def counted(x_t, t, cond):
        called[int(t[0])] = len(x_t)
        return inner(x_t, t, cond)
    monkeypatch.setattr(model, "predict", counted)
    t = np.array(list(LEVELS))
    np.testing.assert_allclose(np.sqrt(1 / model.schedule.alpha_bar[t] - 1), list(LEVELS.values()), rtol=0.01)
    model.sample(["3", "a bold seven"], steps=5, scale=3.0, interval_low=low, interval_high=high)
    assert called == {t: 4 if t in guided else 2 for t in LEVELS}


def test_outside_the_interval_the_picture_is_the_one_at_scale_1(model):
    plain, never, everywhere = (model.sample(["3"], steps=3, scale=scale, **interval) for scale, interval in (
        (1.0, {}), (3.0, {"interval_low": 0.1, "interval_high": 0.1}), (3.0, {"interval_high": 1e9})))
    np.testing.assert_array_equal(never, plain)
    np.testing.assert_array_equal(everywhere, model.sample(["3"], steps=3, scale=3.0))
    assert not np.array_equal(everywhere, plain)


@pytest.mark.parametrize("options, sentence", [
    (["interval_low=3", "interval_high=0.5"], "the guidance interval's low and high must be noise levels sigma / alpha "
                                              "with 0 <= low <= high, got 3 and 0.5"),
    (["interval_low=-1"], "got -1 and inf"), (["interval_high=-1"], "got 0.0 and -1"),
    (["interval_high=much"], "interval_high takes a number, not 'much'"),
    (["interval_high=true"], "interval_high takes a number, not True"),
    (["interval_low=NaN"], "interval_low takes a number from -1000 to 1000, not nan"),
    (["interval_low=[1,2]"], "interval_low takes a number"),
])
def test_an_interval_that_is_none_is_refused_in_a_sentence(model, tmp_path, capsys, options, sentence):
    model.save(tmp_path / "m.safetensors")
    arguments = [word for option in options for word in ("--set", option)]
    out = str(tmp_path / "x.png")
    assert main(["sample", "3", "--model", str(tmp_path / "m.safetensors"), "--steps", "2", "-o", out, *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert sentence in said and not (tmp_path / "x.png").exists()


def test_the_empty_prompt_is_the_null_caption(model):
    guided = model.denoiser(3.0)
    x_t, t = np.random.default_rng(0).standard_normal((2, 28, 28, 1), dtype=np.float32), np.array([10, 30])
    null = model.encode(["", ""])
    np.testing.assert_allclose(guided(x_t, t, null), model.denoiser(0.0)(x_t, t, null), atol=1e-4)


def test_a_word_is_the_same_token_at_any_place_and_in_any_case(model):
    ids, mask = model.tokens(["Seven", "a seven", "  SEVEN "])
    alone, within, loud = (row[seen].tolist() for row, seen in zip(ids, mask, strict=True))
    assert alone[1:] == within[-len(alone) + 1:] and loud == alone


def test_the_caption_matters(model):
    x_t, t = np.random.default_rng(0).standard_normal((1, 28, 28, 1), dtype=np.float32), np.array([30])
    a, b = (model.predict(x_t, t, model.encode([c])) for c in ("a bold seven", "a thin three"))
    assert np.abs(a - b).max() > 1e-3


def test_keys_and_values_that_are_known_change_nothing(model):
    """To the last bit, and each cross-attention reads its own; and they follow the caption."""
    rng, t = np.random.default_rng(0), np.array([5, 10, 49])
    x_t, cond = rng.standard_normal((3, 28, 28, 1), dtype=np.float32), model.encode(["1", "a bold seven", ""])
    read = model.read(cond)
    assert len(read) == 3 + 3                               # attention is on the way down, in the middle and up
    np.testing.assert_array_equal(model.predict(x_t, t, read), model.predict(x_t, t, cond))
    denoiser, swapped = model.unguided(), tuple(a[::-1] for a in cond)
    for c in (cond, swapped, cond):                         # what is remembered is of this condition
        np.testing.assert_array_equal(denoiser(x_t, t, c), model.unguided()(x_t, t, c))
    assert np.abs(denoiser(x_t, t, cond) - denoiser(x_t, t, swapped)).max() > 1e-3


@pytest.mark.parametrize("scale, rows", [(1.0, 3), (2.0, 6)])
def test_what_is_remembered_of_captions_takes_8_B_N_sum_C_bytes(model, monkeypatch, scale, rows):
    """As the docstring of Remembering says; with guidance there are two rows for each picture."""
    results, read = [], model.read
    monkeypatch.setattr(model, "read", lambda cond: results.append(read(cond)) or results[-1])
    cond = model.encode(["1", "a bold seven", ""])
    model.denoiser(scale)(np.zeros((3, 28, 28, 1), np.float32), np.array([5, 10, 49]), cond)
    (kept,), N, C = results, cond[0].shape[1], model.config.unet.widths[-1]
    assert sum(a.nbytes for a in kept[3:]) == 8 * rows * N * 3 * C      # on the way down, in the middle and up


def test_a_sampler_reads_its_captions_once(model, monkeypatch):
    """The text encoder runs for the captions and for '', each cross-attention's keys and values for both together."""
    calls = []
    for kind, name in ((TextEncoder, "forward"), (SpatialAttention, "keys_values")):
        plain = getattr(kind, name)

        def counted(*args, plain=plain, name=name):
            calls.append(name)
            return plain(*args)
        monkeypatch.setattr(kind, name, counted)
    for _ in range(2):
        model.sample(["a bold seven"], steps=4)
        assert calls.count("forward") == 2 and calls.count("keys_values") == 3 * 2      # of two shards
        calls.clear()


def test_padding_changes_nothing(model):
    """The loss does not depend on how many columns of padding follow a caption."""
    t = tiny.trainer(batch=4)
    x_0, ids, mask, times, eps = t.batch()
    wide = np.pad(ids, ((0, 0), (0, 3))), np.pad(mask, ((0, 0), (0, 3)))
    with no_grad():
        a, b = model.loss(x_0, ids, mask, times, eps).item(), model.loss(x_0, *wide, times, eps).item()
    assert a == pytest.approx(b, rel=1e-5)


def test_permuting_a_batch_permutes_the_predictions(model):
    x_t = np.random.default_rng(0).standard_normal((4, 28, 28, 1), dtype=np.float32)
    t, order = np.array([5, 10, 20, 30]), np.array([2, 0, 3, 1])
    cond = model.encode(["1", "2", "", "a bold 4"])
    y = model.predict(x_t, t, cond)
    permuted = model.predict(x_t[order], t[order], tuple(a[order] for a in cond))
    np.testing.assert_allclose(permuted, y[order], atol=1e-4)


# --- files ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, atol", [(np.float32, 0), (np.float16, 1e-3)])
def test_save_and_load(model, tmp_path, dtype, atol):
    model.save(tmp_path / "m.safetensors", dtype=dtype, notes={"by": "a test"})
    loaded = TextToImage.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config and loaded.notes == {"by": "a test"}
    for name, w in model.state_dict().items():
        np.testing.assert_allclose(loaded.state_dict()[name], w, atol=atol, rtol=atol)
        assert loaded.state_dict()[name].dtype == np.float32
    assert loaded.tokenizer.state() == model.tokenizer.state()
    if not atol:
        assert np.array_equal(model.sample(["3"], steps=2), loaded.sample(["3"], steps=2))


HOSTILE = {
    "another system": lambda m: m.update(system="imagen"),
    "no system": lambda m: m.pop("system"),
    "no configuration": lambda m: m.pop("config"),
    "a number of another type": lambda m: m["config"].update(T="1000"),
    "a true for a number": lambda m: m["config"].update(T=True),
    "a huge number": lambda m: m["config"]["unet"].update(embedding=10**9),
    "a missing field": lambda m: m["config"]["unet"].pop("widths"),
    "an unknown schedule": lambda m: m["config"].update(schedule="quartic"),
    "widths that the groups do not divide": lambda m: m["config"]["unet"].update(widths=[9, 16]),
    "a height that the levels do not divide": lambda m: m["config"].update(shape=[30, 28, 1]),
    "a width that the levels do not divide": lambda m: m["config"].update(shape=[28, 30, 1]),
    "images without pixels": lambda m: m["config"].update(shape=[0, 28, 1]),
    "images without channels": lambda m: m["config"].update(shape=[28, 28]),
    "a size for a shape": lambda m: m["config"].update(image_size=28),
    "an unknown prediction": lambda m: m["config"].update(predicts="noise"),
    "no tokenizer": lambda m: m.pop("tokenizer"),
    "merges that are no pairs": lambda m: m["tokenizer"].update(merges=[[1, 2, 3]]),
    "no channels of time": lambda m: m["config"]["unet"].update(embedding=0),
    "no heads": lambda m: m["config"]["text"].update(heads=0),
    "more weights than the file holds": lambda m: m["config"]["unet"].update(widths=[4096] * 2, blocks=4096,
                                                                              attention=[True] * 2),
    "a width that fits no weights": lambda m: m["config"]["unet"].update(widths=[16, 16]),
}


@pytest.mark.parametrize("plant", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_or_foreign_file_is_refused_in_a_sentence(model, tmp_path, plant):
    meta = json.loads(json.dumps(model.describe()))
    plant(meta)
    checkpoint.save(tmp_path / "bad.safetensors", model.state_dict(), meta)
    with pytest.raises(ValueError, match=r"bad\.safetensors") as error:
        TextToImage.load(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def test_no_input_requires_a_gradient_in_sampling(model):
    with no_grad():
        y = model.unet(Tensor(np.zeros((1, 28, 28, 1), np.float32)), np.array([3]),
                       model.text(*model.tokens(["3"])))
    assert not y.requires_grad


@pytest.mark.parametrize("shape, patch, batch", [((28, 28, 1), 2, 32), ((32, 32, 1), 2, 32), ((32, 32, 3), 4, 64),
                                                 ((64, 48, 3), 4, 64), ((28, 28, 3), 2, 32), ((32, 36, 3), 2, 32)])
def test_pictures_in_colour_have_sizes_of_their_own_where_they_fit(shape, patch, batch):
    """A UNet of two levels with patches of 4 takes sides that are multiples of 8; others are treated as grey ones."""
    config = TextToImage.config_for(shape)
    assert config.shape == shape and (config.unet.channels, config.unet.patch, config.batch) == (shape[2], patch, batch)
    assert config.unet.text == config.text.width


def test_the_batch_of_the_configuration_is_that_of_the_stage(data):
    model = tiny.trained_a_little()
    config = replace(model.config, batch=7)
    stage = next(TextToImage(config, model.tokenizer, np.random.default_rng(0)).stages(data))
    assert stage.batch_size == 7
    with pytest.raises(ValueError, match="steps and batch at least 1"):
        replace(model.config, batch=0)


def test_the_weights_that_come_with_minidiff_say_what_they_were_trained_with():
    digits, emoji = (load_system("text-to-image", model).config for model in (None, "emoji"))
    assert (digits.predicts, digits.times) == ("mixture", "normal:mean=-1,std=2")
    assert (emoji.predicts, emoji.times) == ("v", "power")


@pytest.mark.parametrize("shape, predicts", [((28, 28, 1), "mixture"), ((28, 28, 3), "v"), ((32, 32, 3), "v")])
def test_only_grey_images_are_mixtures_by_default(shape, predicts):
    config = TextToImage.config_for(shape)
    assert (config.shape, config.unet.channels, config.predicts) == (shape, shape[2], predicts)


def test_what_a_network_may_predict():
    with pytest.raises(ValueError, match="predicts must be one of eps, x0, v, mixture, not 'foo'"):
        replace(tiny.CONFIG, predicts="foo")
