"""Imagen: the frozen encoder, small images that look alike in training and in sampling, and thresholds.

tests/diffusion/test_cascade.py shows that cascades of exact models are exact, and tests/text/test_span_corruption.py
that span corruption loses nothing.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import small_systems, tiny
from support.examples import load
from support.law_tools import quickly
from support.small_systems import CONFIGS, FINER

from minidiff.data import digit_captions as captions
from minidiff.diffusion import cascade as cascades
from minidiff.diffusion.cascade import augmented, resized
from minidiff.diffusion.denoiser import dynamic_threshold, static_threshold
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, no_grad
from minidiff.systems import imagen
from minidiff.systems.imagen import Imagen
from minidiff.systems.stage import Step
from minidiff.systems.system import as_read

CONFIG = CONFIGS["imagen"]


@pytest.fixture(scope="module")
def model() -> Imagen:
    return small_systems.small("imagen")


FAST = dict(steps=3, super_steps=2)


# ---- training ------------------------------------------------------------------------------------------------

def test_after_the_first_stage_the_encoder_is_frozen(data):
    """The cascade's stages leave its weights as they are, bit by bit, their losses have no gradient for it, and the
    cascade's networks do change.  The stages of the trained system are the same."""
    model = small_systems.new("imagen")
    drawn, frozen = model.text.state_dict(), None
    for stage in model.stages(data):
        parameters = stage.module.parameters()
        before = {name: p.data.copy() for name, p in parameters.items()}
        arrays = stage.batch(Step(1, 1, 0, 10, 4))
        assert all(len(a) == 4 for a in arrays)
        grads = gradients(stage.loss(stage.module, *arrays), list(parameters.values()))
        for p, g in zip(parameters.values(), grads, strict=True):
            p.data = p.data - 0.1 * np.sign(g)
        assert any(not np.array_equal(p.data, before[name]) for name, p in parameters.items())
        if stage.name == "text":
            frozen = model.text.state_dict()
            assert any(not np.array_equal(frozen[name], w) for name, w in drawn.items())
        else:
            mine = {id(p) for p in parameters.values()}
            assert not mine & {id(p) for p in model.text.parameters().values()}
            assert all(np.array_equal(w, frozen[name]) for name, w in model.text.state_dict().items())
            text = list(model.text.parameters().values())
            assert all(not g.any() for g in gradients(stage.loss(stage.module, *arrays), text))
    assert [stage.name for stage in model.stages(data)] == ["text", "pixels-7", "pixels-14", "pixels-28"]


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_loss_is_the_squared_error_of_v(model, data, k):
    """And (1/sigma_t^2) || x_hat - x_0 ||^2, eq. 1 of the paper."""
    x_0, t, eps, *condition = model.batch(data, k, Step(2, 1, 0, 10, 5))
    assert x_0.shape == (5, *[CONFIG.resolutions[k]] * 2, 1)
    alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (model.schedule.alpha, model.schedule.sigma))
    x_t = (alpha * x_0 + sigma * eps).astype(np.float32)
    with no_grad():
        v = model.networks[k](Tensor(x_t), t, *condition).data
    loss = model.loss(model.networks[k], x_0, t, eps, *condition).item()
    assert loss == pytest.approx(((v - (alpha * eps - sigma * x_0)) ** 2).mean(), rel=1e-4)
    x_hat = alpha * x_t - sigma * v
    assert loss == pytest.approx(((x_hat - x_0) ** 2 / sigma**2).mean(), rel=1e-3)


def test_the_gradient_of_the_loss_in_random_directions(data):
    """Central differences in float64, of a super-resolution network with its pooling and its level."""
    model, rng, h = small_systems.new("imagen"), np.random.default_rng(0), 1e-6
    batch = model.batch(data, 1, Step(0, 1, 0, 10, 3))
    arrays = [a.astype(np.float64) if a.dtype == np.float32 else a for a in batch]
    model.astype(np.float64)
    parameters = list(model.super1.parameters().values())
    start = [p.data + 0.1 * rng.standard_normal(p.shape) for p in parameters]
    for p, x in zip(parameters, start, strict=True):
        p.data = x
    grads = gradients(model.loss(model.super1, *arrays), parameters)
    for _ in range(3):
        directions, values = [rng.standard_normal(p.shape) for p in parameters], []
        for sign in (1, -1):
            for p, x, d in zip(parameters, start, directions, strict=True):
                p.data = x + sign * h * d
            with no_grad():
                values.append(model.loss(model.super1, *arrays).item())
        expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(expected, rel=1e-5)


def test_the_text_is_the_data_sets_own_with_a_paragraph_for_each_digit(model, data):
    rng, digits = np.random.default_rng(0), set()
    for _ in range(200):
        text = data.text(rng)
        named = {captions.parse(caption)[0] for caption in text.split(". ")}
        assert len(named) == 1 and len(text.split(". ")) == 5
        digits |= named
        assert model.tokenizer.decode(model.tokenizer.encode(as_read(text))) == f" {text}"
    assert digits == set(range(10))


def test_the_text_stage_sees_no_image_and_no_caption_of_one(model, data):
    """It asks the data set for text only."""
    class TextOnly:
        prompts = data.prompts

        def text(self, rng):
            return "a thin seven. 7"
    stage = next(model.stages(TextOnly()))
    arrays = stage.batch(Step(0, 1, 0, 10, 3))
    assert all(len(a) == 3 for a in arrays)


@pytest.mark.parametrize("k, power", [(0, 3), (1, 1), (2, 1)])
def test_the_base_is_trained_at_noisy_times_more_often_and_the_others_evenly(model, data, k, power):
    """P(t < n) = (n/T)^3 or n/T; of B stratified draws the count below n is within 1 of B times that."""
    t = model.batch(data, k, Step(0, 1, 0, 10, 40))[1]
    for n in range(21):
        assert abs((t < n).sum() - 40 * (n / 20) ** power) <= 1 + 1e-9


def test_each_image_comes_with_its_own_caption_which_is_dropped_now_and_then(model, data, monkeypatch):
    """400 captions, each dropped with p = 0.1: 40 +- 6, beyond six sigmas with probability 2e-9."""
    asked = []
    monkeypatch.setattr(model, "encode", lambda captions: asked.extend(captions) or (np.zeros((len(captions), 1)),) * 2)
    x_0, *_ = model.batch(data, 2, Step(0, 1, 0, 10, 400))
    images = data.images(np.arange(len(data)))
    digit_of = {image.tobytes(): int(d) for image, d in zip(images, data.labels, strict=True)}
    assert abs(asked.count("") - 40) < 36
    assert all(not caption or captions.parse(caption)[0] == digit_of[image.tobytes()]
               for caption, image in zip(asked, x_0, strict=True))


def test_what_is_loaded_from_a_file_draws_the_same(model, tmp_path):
    model.save(tmp_path / "imagen.safetensors")
    loaded = Imagen.load(tmp_path / "imagen.safetensors")
    assert loaded.config == CONFIG and not any(name.startswith("t5") for name in loaded.parameters())
    for a, b in zip(model.cascade(["a 3"], **FAST), loaded.cascade(["a 3"], **FAST), strict=True):
        assert np.array_equal(a, b)


# ---- the small image in training and in sampling ---------------------------------------------------------------

class RecordingStep(Step):
    """Records its normal numbers."""

    drawn: list

    def normal(self, shape):
        self.drawn = [*getattr(self, "drawn", []), super().normal(shape)]
        return self.drawn[-1]


class Constant:
    """A denoiser whose x0_hat is always x."""

    predicts = "x0"

    def __init__(self, schedule, x):
        self.schedule, self.x = schedule, x

    def __call__(self, x_t, t, cond=None):
        return self.x


class Noise:
    """One stream; its second draw, the noise of the first small image, is given."""

    def __init__(self, eps):
        self.eps, self.calls = eps, 0

    def __len__(self):
        return 1

    def normal(self, shape, dtype):
        self.calls += 1
        return self.eps if self.calls == 2 else np.zeros((1, *shape), dtype)


def assert_shown_alike(model, data, monkeypatch):
    """Of one small image, level and noise, the second network gets the same y_s and s in training and in sampling."""
    step = RecordingStep(3, 1, 0, 10, 6)
    x_0, *_, y_s, s = model.batch(data, 1, step)
    shown, denoiser, forward = [], model.denoiser, model.super1.forward
    for i in range(6):
        small = Constant(model.schedule, resized(x_0[i:i + 1], 7))
        with monkeypatch.context() as patch:
            patch.setattr(model, "denoiser", lambda k, *a, x=small: denoiser(k, *a) if k else x)
            patch.setattr(model.super1, "forward", lambda *a: shown.append(a[4:]) or forward(*a))
            model.cascade(["a 3"], steps=1, super_steps=1, aug_level=(s[i] + 1) / model.schedule.T, until=14,
                          streams=Noise(step.drawn[-1][i:i + 1]))
        np.testing.assert_allclose(shown[-1][0], y_s[i:i + 1], atol=1e-6)
        assert shown[-1][1].tolist() == [s[i]]


@pytest.mark.law(
    "27d", "y_s = alpha_s U x + sigma_s eps of the same x, s and eps is the same in training and in sampling",
    source="the other of the two; the known bug in either one is seen", tolerance="1e-6: rounding to float32")
def test_the_small_image_is_shown_alike_in_training_and_in_sampling(model, data, monkeypatch):
    assert_shown_alike(model, data, monkeypatch)


@pytest.mark.parametrize("where", [imagen, cascades], ids=["training", "sampling"])
def test_the_check_sees_noise_before_normalising(model, data, monkeypatch, where):
    """The known bug (imagen-pytorch #160): noised in [0, 1], then scaled to [-1, 1], in one of the two places."""
    def wrong(schedule, small, size, s, eps):
        return 2 * augmented(schedule, (small + 1) / 2, size, s, eps) - 1
    monkeypatch.setattr(where, "augmented", wrong)
    with pytest.raises(AssertionError, match="Mismatch"):
        assert_shown_alike(model, data, monkeypatch)


def test_every_level_occurs_in_training(model):
    """-1 ... T-1 and no other: in 960 draws one of 21 is missing with probability 1e-19."""
    few = tiny.digits(8)
    levels = np.concatenate([model.batch(few, 1, Step(5, 1, n, 10, 96))[-1] for n in range(10)])
    assert set(levels.tolist()) == set(range(-1, 20))


# ---- sampling ------------------------------------------------------------------------------------------------

def test_the_cascade_is_the_image_at_every_resolution(model):
    small, middle, large = model.cascade(["a bold 3", ""], **FAST)
    assert (small.shape, middle.shape, large.shape) == ((2, 7, 7, 1), (2, 14, 14, 1), (2, 28, 28, 1))
    assert large.dtype == np.float32 and max(np.abs(x).max() for x in (small, middle, large)) <= 1
    assert np.array_equal(model.sample(["a bold 3", ""], **FAST), large)
    np.testing.assert_allclose(model.cascade(["a bold 3", ""], until=14, **FAST)[-1], middle, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_picture_depends_on_its_own_caption_and_stream_only(model, scale):
    prompts, options = ["a bold 3", "seven", "", "a thin, upright 1"], dict(scale=scale, super_scale=scale, **FAST)
    together = model.sample(prompts, seed=4, **options)
    for i in range(4):
        alone = model.sample(prompts[i:i + 1], streams=SampleStreams(4, 4)[i:i + 1], **options)
        np.testing.assert_allclose(alone[0], together[i], atol=1e-3)            # float32 through three UNets
    assert np.abs(together[0] - model.sample(prompts, seed=5, **options)[0]).max() > 1e-3


def test_each_network_is_guided_at_its_own_scale_and_all_by_the_same_threshold(model, monkeypatch):
    asked, denoiser = [], model.denoiser
    monkeypatch.setattr(model, "denoiser", lambda k, cond, *rest: asked.append((k, *rest)) or denoiser(k, cond, *rest))
    model.sample(["a 3"], scale=1.5, super_scale=2.5, threshold="dynamic", **FAST)
    assert asked == [(0, 1.5, "dynamic"), (1, 2.5, "dynamic"), (2, 2.5, "dynamic")]


def test_what_padding_holds_does_not_matter(model):
    """Neither to the pooling nor to the attention of any network; the caption's tokens do matter."""
    tokens, mask = model.encode(["a bold 3", "a thin, upright 1"])
    other = np.where(mask[:, :, None], tokens, 9.0).astype(np.float32)
    rng, t = np.random.default_rng(0), np.array([3, 9])
    for k, size in enumerate(CONFIG.resolutions):
        x = rng.standard_normal((2, size, size, 1), dtype=np.float32)
        more = () if k == 0 else (x, np.array([2, -1]))
        with no_grad():
            v = model.networks[k](Tensor(x), t, tokens, mask, *more).data
            np.testing.assert_allclose(model.networks[k](Tensor(x), t, other, mask, *more).data, v, atol=1e-5)
            changed = model.networks[k](Tensor(x), t, tokens[::-1].copy(), mask[::-1].copy(), *more).data
        assert np.abs(changed - v).max() > 1e-3


def test_scale_0_ignores_the_caption_and_1_is_the_network_itself(model):
    alike = dict(scale=0.0, super_scale=0.0, **FAST)
    np.testing.assert_allclose(model.sample(["a bold 3"], **alike), model.sample(["seven"], **alike), atol=1e-5)
    assert np.abs(model.sample(["a bold 3"], **FAST) - model.sample(["seven"], **FAST)).max() > 1e-3
    text, x, t = model.encode(["a bold 3"]), np.full((1, 7, 7, 1), 0.2, np.float32), np.array([4])
    with no_grad():
        v = model.base(Tensor(x), t, *text).data
    x_hat = static_threshold(model.schedule.alpha(4) * x - model.schedule.sigma(4) * v)
    np.testing.assert_allclose(model.denoiser(0, text, 1.0, "static")(x, t), x_hat, atol=1e-5)


def test_the_level_and_the_small_image_matter(model):
    tokens, mask = model.encode(["a bold 3"])
    x, t = np.full((1, 14, 14, 1), 0.2, np.float32), np.array([4])

    def v(y_s, s):
        with no_grad():
            return model.super1(Tensor(x), t, tokens, mask, y_s, np.array([s])).data
    assert np.abs(v(x, 3) - v(x, 15)).max() > 1e-3
    assert np.abs(v(x, 3) - v(-x, 3)).max() > 1e-3


@pytest.mark.law(
    "32a", "saturated pixels, |x| = 1: static, all with |x0_hat| >= 1; dynamic, where s > 1, at most 1 in 200, and one",
    source="Imagen section 2.3; the definition of a percentile", tolerance="exact; the order of pixels is kept")
@quickly
@given(st.integers(0, 2**32), st.floats(1, 10))
def test_saturation(seed, size):
    """Static thresholding saturates every pixel beyond the range.  Dynamic thresholding saturates at most 1 in 200
    pixels, and one: it brings the others inside, in the same order."""
    x = (size * np.random.default_rng(seed).standard_normal((1, 28, 28, 1))).astype(np.float32)
    static, dynamic = static_threshold(x), dynamic_threshold(x)
    assert (np.abs(static) == 1).mean() == (np.abs(x) >= 1).mean()
    if np.quantile(np.abs(x), 0.995) > 1:
        assert (np.abs(dynamic) == 1).mean() <= 0.005 + 1 / x.size
        order = np.argsort(x, axis=None)
        assert (np.diff(dynamic.reshape(-1)[order]) >= 0).all()


# ---- what is refused -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("option, value", [
    ("threshold", "clip"), ("aug_level", -0.1), ("aug_level", 1.5), ("steps", 0), ("super_steps", 21), ("until", 8),
    ("scale", float("nan")), ("super_scale", float("inf")), ("seed", -1), ("streams", SampleStreams(0, 3))])
def test_wrong_options_are_named(model, option, value):
    with pytest.raises(ValueError, match=option.removeprefix("super_")):
        model.cascade(["a 3"], **FAST | {option: value})


@pytest.mark.parametrize("changes, says", [
    (dict(resolutions=(7, 14, 27)), "resolutions"), (dict(resolutions=(3, 6, 12)), "resolutions"),
    (dict(length=1), "length"), (dict(length=61), "length"), (dict(base=FINER), "UNet of 7 x 7"),
    (dict(super1=CONFIG.base), "UNet of 14 x 14"), (dict(super2=replace(FINER, text=6)), "UNet of 28 x 28"),
    (dict(base=replace(CONFIG.base, patch=2)), "UNet of 7 x 7")])
def test_wrong_configurations_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **changes)


def test_a_tokenizer_that_leaves_no_room_for_sentinels_is_refused(model):
    with pytest.raises(ValueError, match="sentinels"):
        Imagen(replace(CONFIG, text=replace(CONFIG.text, vocab=model.tokenizer.vocab_size + 15)), model.tokenizer,
               np.random.default_rng(0))


def test_a_cascade_to_56(data):
    """The cascade can end at 56 x 56, trained on data of 28 with every pixel four times; `sample` still gives 28."""
    config = replace(CONFIG, resolutions=(14, 28, 56))
    model = small_systems.new("imagen", config)
    x_0, *_, y_s, s = model.batch(data, 2, Step(0, 1, 0, 10, 3))
    assert x_0.shape == y_s.shape == (3, 56, 56, 1) and np.array_equal(x_0[:, ::2, ::2], x_0[:, 1::2, 1::2])
    assert [x.shape[1] for x in model.cascade(["a 3"], **FAST)] == [14, 28, 56]
    assert model.sample(["a 3"], **FAST).shape == (1, 28, 28, 1)


@pytest.mark.slow
def test_the_example_runs_tiny(model, tmp_path):
    model.save(tmp_path / "tiny.safetensors")
    example = load("09_imagen")
    assert 0 <= example.probe(model, 0, count=60) < 0.5                         # untrained: a tenth by chance
    rows = example.main(str(tmp_path / "tiny.safetensors"), images=6, out=str(tmp_path), steps=2,
                        scales=(1.0, 4.0))
    assert [row[:2] for row in rows] == [("MNIST", ""), ("1", "static"), ("1", "dynamic"), ("4", "static"),
                                         ("4", "dynamic"), *[("4", "static")] * 3]
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("imagen", "imagen_thresholding"))
