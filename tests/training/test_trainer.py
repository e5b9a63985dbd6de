"""The trainer: it learns, it is reproducible to the bit, and its state is complete.  The batches of text-to-image."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from support import tiny
from support.law_tools import normal_share

from minidiff import checkpoint
from minidiff.data import attributes
from minidiff.data import digit_captions as captions
from minidiff.errors import UserError
from minidiff.nn.optim import AdamW, WarmupCosine
from minidiff.systems.stage import Stage
from minidiff.systems.text_to_image import TextToImage
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import TrainConfig


def equal(a, b) -> bool:
    """Bit for bit, NaN included."""
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and x.tobytes() == b[k].tobytes() for k, x in a.items())


def test_it_learns():
    t = tiny.trainer(steps=60, batch=16, lr=5e-3)
    while t.n < 60:
        t.step()
    # x_0 of norm about 1 a pixel and v's variance near 1: a network that answers 0 has a loss near 1
    assert 0.7 < np.mean(t.losses[:3]) < 1.3
    assert np.mean(t.losses[-10:]) < 0.75 * np.mean(t.losses[:3])


@pytest.mark.law(
    37, "N + M steps are N steps, save, load, M steps: weights, EMA, optimiser, random streams and losses of a "
        "training run",
    source="the same run without the break", tolerance="exact, to the last bit")
@settings(max_examples=6)
@given(n=st.integers(1, 4), m=st.integers(1, 4), seed=st.integers(0, 1000))
def test_n_plus_m_steps_equal_n_steps_saved_loaded_and_m_more(tmp_path_factory, n, m, seed):
    path = tmp_path_factory.mktemp("run") / "state.safetensors"
    straight = tiny.trainer(seed)
    for _ in range(n + m):
        straight.step()

    first = tiny.trainer(seed)
    for _ in range(n):
        first.step()
    checkpoint.save(path, *first.state())
    second = tiny.trainer(seed)
    second.restore(checkpoint.load(path))
    for _ in range(m):
        second.step()

    assert second.n == n + m and second.losses == straight.losses
    assert equal(straight.state()[0], second.state()[0])
    # the next data and noise are the same, too
    assert all(np.array_equal(a, b) for a, b in zip(straight.batch(), second.batch(), strict=True))


def test_the_state_holds_all_that_the_next_step_depends_on():
    names = tiny.trainer().state()[0].keys()
    parameters = tiny.trainer().parameters
    for part in ("model.", "ema.", "optimiser.m.", "optimiser.v."):
        assert {part + name for name in parameters} <= names


@pytest.mark.parametrize("lost", ["ema.", "optimiser.m.", "model."])
def test_a_state_that_lost_something_is_refused(tmp_path, lost):
    t = tiny.trainer()
    tensors, meta = t.state()
    name = next(name for name in tensors if name.startswith(lost))
    checkpoint.save(tmp_path / "state.safetensors", {k: v for k, v in tensors.items() if k != name}, meta)
    with pytest.raises(ValueError, match=f"state.safetensors.*{name}"):
        t.restore(checkpoint.load(tmp_path / "state.safetensors"))


def test_steps_differ_and_seeds_differ():
    t, other = tiny.trainer(0), tiny.trainer(1)
    a, b = t.batch(), other.batch()
    t.n += 1
    c = t.batch()
    assert not np.array_equal(a[4], b[4]) and not np.array_equal(a[4], c[4])


def test_times_are_spread_evenly_over_their_distribution():
    """log-SNR ~ N(-1, 2^2); of B stratified draws the count below any k is within 1 of B times its share."""
    t, share = tiny.trainer(batch=100), normal_share(50)
    for n in range(5):
        t.n = n
        drawn = t.batch()[3]
        assert drawn.min() >= 0 and drawn.max() <= 49
        for k in range(51):
            assert abs((drawn < k).sum() - 100 * share[k]) <= 1 + 1e-9


@pytest.mark.parametrize("drop, expected", [(0.0, False), (1.0, True)])
def test_captions_are_dropped_to_the_null_caption(drop, expected):
    t = tiny.trainer(batch=16, drop=drop)
    _, ids, mask, _, _ = t.batch()
    assert ((mask.sum(axis=1) == 2) == expected).all()      # BOS and EOS alone


def test_the_share_of_dropped_captions():
    """64 captions of 40 steps, dropped with p = .25: 640 +- 22; six sigmas, false alarm 2e-9."""
    t, dropped = tiny.trainer(batch=64, drop=0.25), 0
    for n in range(40):
        t.n = n
        dropped += int((t.batch()[2].sum(axis=1) == 2).sum())
    assert abs(dropped - 640) < 6 * math.sqrt(2560 * 0.25 * 0.75)


def test_every_image_comes_with_its_own_caption():
    t = tiny.trainer(batch=64, drop=0.0)
    data = tiny.digits()
    images = data.images(np.arange(len(data)))
    digit_of = {x_0.tobytes(): int(d) for x_0, d in zip(images, data.labels, strict=True)}
    x_0, ids, _, _, _ = t.batch()
    said = [captions.parse(t.stage.module.tokenizer.decode(row))[0] for row in ids]
    assert said == [digit_of[x.tobytes()] for x in x_0]


def test_the_noise_is_standard_normal_and_each_images_own():
    """The distribution by Dvoretzky, Kiefer and Wolfowitz's bound, and the correlation between two images of a batch,
    which is 1/sqrt(784) = .036 by chance: 150 pairs, each beyond 7 sigmas with probability 3e-12. False alarm 1e-7."""
    t, drawn = tiny.trainer(batch=6), []
    for t.n in range(10):
        eps = t.batch()[4].reshape(6, -1)
        correlation = np.corrcoef(eps) - np.eye(6)
        assert np.abs(correlation).max() < 7 / math.sqrt(784)
        drawn.append(eps)
    x = np.sort(np.concatenate(drawn), axis=None)
    # P(sup |F_n - F| > d) <= 2 e^{-2 n d^2}
    assert np.abs(np.arange(1, x.size + 1) / x.size - special.ndtr(x)).max() < math.sqrt(math.log(2e7) / (2 * x.size))


def test_gradients_are_clipped_to_a_common_norm(monkeypatch):
    norms = []
    monkeypatch.setattr(AdamW, "step", lambda self, grads, lr: norms.append(
        math.sqrt(sum(float((g * g).sum()) for g in grads))))
    for clip in (1e-3, 1e3):
        tiny.trainer(clip=clip).step()
    assert norms[0] == pytest.approx(1e-3, rel=1e-4) and 1e-2 < norms[1] < 1e3      # float32, and never lengthened


def test_held_out_combinations_are_never_trained_on():
    data = tiny.digits(2000)
    combinations = {(int(d), w.thickness, w.slant) for d, w in zip(data.labels, data.words, strict=True)}
    assert not combinations & attributes.HELD_OUT
    assert len(data) < 2000                                 # and there were some to leave out
    rng = np.random.default_rng(0)
    for i in range(300):
        digit, words = captions.parse(data.caption(i, rng))
        assert (digit, words.thickness, words.slant) not in attributes.HELD_OUT


def test_a_batch_that_cannot_be_made_names_its_step():
    t = tiny.trainer()
    t.step()

    def broken(step):
        raise OSError("no such picture")
    t.stage = replace(t.stage, batch=broken)
    with pytest.raises(UserError, match="^the batch of step 2 cannot be made: .*no such picture"):
        t.step()


def test_a_loss_that_is_not_finite_stops_the_step_and_changes_nothing():
    t = tiny.trainer()
    t.step()
    before = t.state()[0]
    before = {k: v.copy() for k, v in before.items()}
    batch = t.batch
    t.batch = lambda: (np.nan * batch()[0], *batch()[1:])
    with pytest.raises(FloatingPointError, match="step 2"):
        t.step()
    assert equal(before, t.state()[0]) and t.n == 1


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"lr": math.nan}, {"lr": 0.0}, {"ema": 1.0}])
def test_a_configuration_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


@pytest.mark.parametrize("kind", [TrainConfig, TrainOptions])
def test_numpys_numbers_are_written_as_pythons(kind):
    given = kind(steps=np.int64(5), batch=np.int8(4), lr=np.float32(0.5), seed=np.uint64(3))
    assert given == kind(steps=5, batch=4, lr=0.5, seed=3) and json.loads(json.dumps(asdict(given))) == asdict(given)
    for name, least, most in (("steps", 1, 10**9), ("batch", 1, 10**6), ("warmup", 0, 10**9), ("seed", 0, 2**63)):
        assert [getattr(TrainConfig(**{name: value}), name) for value in (least, most)] == [least, most]
        for wrong in (least - 1, most + 1):
            with pytest.raises(UserError, match=f"{name} must be a whole number from {least} to {most}, not {wrong}"):
                TrainConfig(**{name: wrong})
    assert TrainOptions(steps=np.int64(5)).for_stage(Stage("a", None, None, None, np.int64(7))).steps == 5
    for wrong in ({"steps": 5.0}, {"steps": np.float64(5)}, {"steps": np.True_}, {"seed": True}, {"lr": True}):
        with pytest.raises(UserError, match="must be"):
            TrainConfig(**wrong)


@pytest.mark.law(
    36, "training leaves the schedule alone, and samples come from the average",
    source="a copy taken before", tolerance="exact")
def test_the_average_is_sampled_from_and_the_schedule_is_left_alone():
    t = tiny.trainer()
    model = t.stage.module
    table = model.schedule.alpha_bar.copy()
    for _ in range(3):
        t.step()
    assert np.array_equal(model.schedule.alpha_bar, table)
    own = model.state_dict()
    with t.with_averaged_weights():
        assert equal(model.state_dict(), t.ema.average) and not equal(model.state_dict(), own)
    assert equal(model.state_dict(), own)                   # back to the weights that are trained
    t.use_averaged_weights()
    assert equal(model.state_dict(), t.ema.average)


def test_the_learning_rate_used_is_that_of_the_step(monkeypatch):
    rates, step = [], AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self, grads, lr: (rates.append(lr), step(self, grads, lr)))
    t = tiny.trainer(steps=4)
    for _ in range(4):
        t.step()
    course = WarmupCosine(t.config.lr, 4, t.config.warmup)
    assert rates == [course(n) for n in range(4)]


def test_another_seed_makes_another_model():
    a, b, c = (tiny.trainer(seed).stage.module.state_dict() for seed in (0, 1, 0))
    assert not equal(a, b) and equal(a, c)


@pytest.mark.parametrize("break_it", [
    lambda tensors, meta: tensors.update({"optimiser.n": np.array(-1)}),
    lambda tensors, meta: tensors.update({"optimiser.n": np.array([1, 2])}),
    lambda tensors, meta: tensors.update({"ema.n": np.array(7)}),
    lambda tensors, meta: tensors.update(losses=np.zeros((1, 1))),
    lambda tensors, meta: tensors.update(losses=np.zeros(5)),
    lambda tensors, meta: tensors.update({k: v.astype(np.int64) for k, v in tensors.items() if k.startswith("ema.")}),
    lambda tensors, meta: meta.update(data="of other images"),
    lambda tensors, meta: meta.update(step=2),              # CheckpointFolder writes it
], ids=["negative step", "two steps", "two counts", "losses of two axes", "too many losses", "whole numbers",
        "other data", "another step"])
def test_a_state_that_is_not_one_is_refused(tmp_path, break_it):
    t = tiny.trainer()
    t.step()
    tensors, meta = t.state()
    break_it(tensors, meta)
    checkpoint.save(tmp_path / "state.safetensors", tensors, meta)
    with pytest.raises(ValueError, match="state.safetensors") as error:
        tiny.trainer().restore(checkpoint.load(tmp_path / "state.safetensors"))
    assert "\n" not in str(error.value)


def test_a_training_state_can_be_sampled_from(tmp_path):
    t = tiny.trainer()
    for _ in range(3):
        t.step()
    checkpoint.save(tmp_path / "step-000003.safetensors", *t.state())
    assert equal(TextToImage.load(tmp_path / "step-000003.safetensors").state_dict(), t.ema.average)
