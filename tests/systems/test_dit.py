"""The diffusion transformer as a system: its loss, its times, its denoiser, guidance, sizes and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support import small_systems, tiny
from support.gradcheck import check_loss_gradient

from minidiff import checkpoint
from minidiff.diffusion.rectified_flow import path_time
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import no_grad
from minidiff.evaluation.judge import load_judge
from minidiff.evaluation.likelihood import likelihood
from minidiff.systems.dit import DiffusionTransformer, DiTConfig
from minidiff.systems.stage import Step

CONFIG = small_systems.CONFIGS["dit"]


@pytest.fixture(scope="module")
def model() -> DiffusionTransformer:
    return small_systems.small("dit")


def untrained(**changes) -> DiffusionTransformer:
    """With the tokenizer of the small system, and a configuration that may differ in some numbers."""
    return DiffusionTransformer(replace(CONFIG, **changes), small_systems.small("dit").tokenizer,
                                np.random.default_rng(0))


def batch_of(system, size: int = 6, seed: int = 0):
    return next(system.stages(tiny.digits())).batch(Step(seed, 1, 0, 10, size))


def on_path(system, x_0, t, eps):
    """u and (1 - u) x_0 + u eps, from t alone: u = (t + 1)/T, moved by the shift."""
    u = (t + 1) / system.config.T
    u = (system.config.shift * u / (1 + (system.config.shift - 1) * u)).reshape(-1, 1, 1, 1)
    return u.ravel(), ((1 - u) * x_0 + u * eps).astype(np.float32)


# ---- training --------------------------------------------------------------------------------------------------

def test_an_untrained_model_predicts_zero_and_its_loss_is_the_mean_square_of_the_flow():
    system = untrained()
    x_0, ids, mask, t, eps = batch_of(system)
    assert system.loss(x_0, ids, mask, t, eps).item() == pytest.approx(((eps - x_0) ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_loss_is_the_squared_error_of_the_flow_on_the_path(model, shift):
    system = untrained(shift=shift)
    system.load_state_dict(model.state_dict())
    x_0, ids, mask, t, eps = batch_of(system)
    with no_grad():
        text = system.text(ids, mask)
    u, x_u = on_path(system, x_0, t, eps)
    flow = system.predict(x_u, u, (text.tokens.data, text.pooled.data, text.mask))
    assert system.loss(x_0, ids, mask, t, eps).item() == pytest.approx(((eps - x_0 - flow) ** 2).mean(), rel=1e-4)


def test_the_gradient_of_the_loss_in_random_directions():
    """Central differences in float64 of the whole system, caption encoder included."""
    system = small_systems.moved(untrained()).astype(np.float64)
    x_0, ids, mask, t, eps = batch_of(system, 3)
    x_0, eps = x_0.astype(np.float64), eps.astype(np.float64)
    check_loss_gradient(lambda: system.loss(x_0, ids, mask, t, eps), list(system.parameters().values()), 3)


def test_the_density_of_the_times_is_that_of_the_configuration():
    """Of 400 stratified times, those of u up to 1/2 are P(logit u < 1/2 log 26/24) of all, to one: half-way to the next
    time.  The default has logit u ~ N(0, 1); logit u ~ N(1.6, 0.8^2) is log-SNR ~ N(-3.2, 1.6^2)."""
    half_way = math.log(26 / 24) / 2
    for times, mean, std in (({}, 0.0, 1.0), ({"times": "normal:mean=-3.2,std=1.6"}, 1.6, 0.8),
                             ({"times": "normal:mean=3.2,std=1.6"}, -1.6, 0.8)):
        t = batch_of(untrained(**times), 400)[3]
        assert abs((t < CONFIG.T // 2).sum() - 400 * stats.norm.cdf(half_way, mean, std)) < 1.3


def test_times_are_drawn_before_the_shift():
    """The shift moves them, so that each place in the list is as likely as without it."""
    plain, shifted = untrained(), untrained(shift=3.0)
    np.testing.assert_array_equal(batch_of(shifted)[3], batch_of(plain)[3])
    assert (path_time(shifted.schedule, np.arange(49)) > path_time(plain.schedule, np.arange(49))).all()


def test_the_share_of_dropped_captions_is_the_one_configured():
    system = untrained(drop_caption=0.4)
    mask = batch_of(system, 1000)[2]
    dropped = (mask.sum(axis=1) == 2).sum()                 # BOS and EOS alone
    assert abs(dropped - 400) < 6 * np.sqrt(240)            # false alarm 2e-9


def test_padding_changes_nothing(model):
    x_0, ids, mask, t, eps = batch_of(model)
    wide = np.pad(ids, ((0, 0), (0, 3))), np.pad(mask, ((0, 0), (0, 3)))
    with no_grad():
        a, b = model.loss(x_0, ids, mask, t, eps).item(), model.loss(x_0, *wide, t, eps).item()
    assert a == pytest.approx(b, rel=1e-5)


def test_steps_batch_and_preview_are_those_of_the_configuration(data):
    system = untrained(batch=7, steps=5)
    stage, = system.stages(data)
    assert (stage.batch_size, stage.steps, stage.module) == (7, 5, system) and stage.picture is not None


# ---- the network as a denoiser ---------------------------------------------------------------------------------

def test_x0_hat_is_where_the_flow_points_to(model):
    """x0_hat = x_u - u flow, with x_t = x_u / sqrt((1 - u)^2 + u^2), at a time in the middle and at pure noise."""
    rng, cond = np.random.default_rng(0), model.encode(["a bold seven", "3"])
    for t in (19, CONFIG.T - 1):
        u = (t + 1) / CONFIG.T
        x_u, us = rng.standard_normal((2, 28, 28, 1), dtype=np.float32), np.full(2, u)
        x_t = (x_u / np.sqrt((1 - u) ** 2 + u**2)).astype(np.float32)
        expected = x_u - u * model.predict(x_u, us, cond)
        np.testing.assert_allclose(model.unguided()(x_t, np.full(2, t), cond), expected, atol=1e-4)
    every = path_time(model.schedule, np.arange(-1, CONFIG.T))
    np.testing.assert_allclose(every, np.linspace(0, 1, CONFIG.T + 1), atol=1e-12)


def test_the_derivative_of_the_denoiser_is_each_samples_own():
    """Central differences along a random direction, at each sample's own time and caption."""
    system = small_systems.moved(untrained()).astype(np.float64)
    rng, t = np.random.default_rng(0), np.array([3, 20, 49])
    x_t, dy, along = rng.standard_normal((3, 3, 28, 28, 1))
    cond = tuple(a.astype(np.float64) if a.dtype.kind == "f" else a for a in system.encode(["3", "a bold seven", ""]))
    x0_hat, dx = system.unguided().vjp(x_t, t, dy, cond)
    np.testing.assert_allclose(x0_hat, system.unguided()(x_t, t, cond), rtol=1e-9)
    h = 1e-5
    slope = (system.unguided()(x_t + h * along, t, cond) - system.unguided()(x_t - h * along, t, cond)) / (2 * h)
    for i in range(3):
        assert (dx[i] * along[i]).sum() == pytest.approx((dy[i] * slope[i]).sum(), rel=1e-6)


@pytest.mark.law(
    30, "the diffusion transformer's guided x0_hat is x0_hat(0) + scale (x0_hat(1) - x0_hat(0))",
    source="two calls of the network, by hand", tolerance="1e-4 (1 + scale): float32 through a network")
def test_guidance_is_the_line_through_the_two_predictions(model):
    x_t, t = np.random.default_rng(0).standard_normal((2, 28, 28, 1), dtype=np.float32), np.array([20, 49])
    cond, null = model.encode(["a bold seven", "3"]), model.encode(["", ""])
    uncond, one = (model.unguided()(x_t, t, c) for c in (null, cond))
    for scale in (0.0, 1.0, 2.5, -1.0):
        guided = replace(model.denoiser(scale), clip=None)(x_t, t, cond)
        np.testing.assert_allclose(guided, uncond + scale * (one - uncond), atol=1e-4 * (1 + abs(scale)))
    assert np.abs(one - uncond).max() > 1e-3                # the caption matters


@pytest.mark.parametrize("sampler", sorted(name for name, entry in SAMPLERS.items() if not entry.consistency))
def test_every_sampler_ends_in_an_image(model, sampler):
    states = list(model.trajectory(["3", "4"], steps=5, sampler=sampler))
    assert len(states) == 6 and states[0].t == CONFIG.T - 1 and states[-1].t == -1
    x_0 = states[-1].x_t
    assert x_0.shape == (2, 28, 28, 1) and x_0.dtype == np.float32 and np.abs(x_0).max() <= 1
    np.testing.assert_array_equal(model.sample(["3", "4"], steps=5, sampler=sampler), x_0)


def test_the_default_sampler_is_eulers_method(model):
    """x_s = x_u + (s - u) flow, with the guided flow (x_u - x0_hat)/u, over equal steps of u; u = 1 is the noise."""
    steps, denoiser, cond = 5, model.denoiser(2.0), model.encode(["3", "a bold seven"])
    x_u, u = SampleStreams(4, 2).normal((28, 28, 1)), 1.0
    for k in range(steps):
        s = 1 - (k + 1) / steps
        size = np.float32(np.sqrt((1 - u) ** 2 + u**2))
        flow = (x_u - denoiser(x_u / size, np.full(2, round(u * CONFIG.T) - 1), cond)) / np.float32(u)
        x_u, u = x_u + np.float32(s - u) * flow, s
    drawn = model.sample(["3", "a bold seven"], steps=steps, streams=SampleStreams(4, 2))
    np.testing.assert_allclose(drawn, x_u, atol=1e-3)


def test_it_has_a_likelihood(model, monkeypatch):
    monkeypatch.setattr("minidiff.evaluation.likelihood.TERMS", 2)
    monkeypatch.setattr("minidiff.evaluation.likelihood.FLOW_STEPS", 2)
    result = likelihood(model, tiny.digits(30), count=4)
    assert np.isfinite([value for value in vars(result).values() if isinstance(value, float)]).all()


# ---- configurations --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, shift, tokens", [((28, 28, 1), 1.0, 49), ((32, 32, 1), 1.143, 64),
                                                  ((32, 32, 3), 1.143, 64), ((56, 56, 3), 2.0, 196)])
def test_every_size_has_its_shift(shape, shift, tokens):
    """sqrt(H W / 784): four times the pixels, twice the shift."""
    config = DiffusionTransformer.config_for(shape)
    assert config.shape == shape and config.shift == shift and config.network.channels == shape[2]
    assert shape[0] * shape[1] // config.network.patch**2 == tokens and config.network.text == config.text.width


@pytest.mark.parametrize("changes, sentence", [
    ({"shape": (30, 28, 1)}, "multiples of 4"), ({"shape": (28, 28, 3)}, "network.channels .1. the channels of shape"),
    ({"shift": 0.0}, "shift must be positive"), ({"shift": 1e9}, "at most 100"),
    ({"times": "normal:sd=1"}, "the parameters of normal are"), ({"times": "even"}, "no density of times 'even'"),
    ({"drop_caption": 1.5}, "drop_caption must be within 0 and 1"), ({"T": 0}, "T, steps and batch at least 1"),
    ({"batch": 0}, "T, steps and batch at least 1"), ({"shape": (256, 256, 1)}, "would take .* numbers for an image"),
])
def test_a_configuration_that_makes_no_system(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(DiTConfig(), **changes)


HOSTILE = {
    "no tokenizer": lambda m: m.pop("tokenizer"),
    "a width that the file has not": lambda m: m["config"]["network"].update(width=16),
    "more blocks than the file holds": lambda m: m["config"]["network"].update(blocks=4096),
    "heads that do not divide": lambda m: m["config"]["network"].update(heads=3),
    "a text of other channels": lambda m: m["config"]["text"].update(width=16),
    "a shift of another type": lambda m: m["config"].update(shift="3"),
    "no deviation": lambda m: m["config"].update(times="normal:std=0"),
    "times of no density": lambda m: m["config"].update(times="x"),
    "sides that the patches do not divide": lambda m: m["config"].update(shape=[30, 28, 1]),
}


@pytest.mark.parametrize("plant", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_in_a_sentence(model, tmp_path, plant):
    meta = json.loads(json.dumps(model.describe()))
    plant(meta)
    checkpoint.save(tmp_path / "bad.safetensors", model.state_dict(), meta)
    with pytest.raises(ValueError, match=r"bad\.safetensors") as error:
        DiffusionTransformer.load(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


# ---- the weights that come with minidiff -------------------------------------------------------------------

def test_the_shipped_weights_draw_the_digit_that_is_asked_for():
    """With one fixed seed, 10 steps and the digit alone as the caption: 20 of 20 are right, and 16 are enough.

    Of seeds 0 to 3, 77 of 80 pictures are right.  If each is right with this chance, 0.96, fewer than 16 of 20 are
    with a chance of 8e-4: the false-alarm rate of another machine's rounding is smaller, since the seed is fixed.
    """
    asked = np.arange(20) % 10
    x = DiffusionTransformer.load().sample([str(digit) for digit in asked], steps=10, seed=0)
    _, read = load_judge().read(x)
    assert (read == asked).mean() >= 0.8
