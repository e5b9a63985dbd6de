"""Training beside the same arithmetic by hand, in float64: all that a trainer holds, after each step; what a preview
sees and leaves; and how the options of a run become each stage's configuration and the run's own numbers."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from support import tiny
from support.toy import Toy

from minidiff import checkpoint
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.layers import Linear
from minidiff.systems.stage import Stage, Step
from minidiff.training import loop, run
from minidiff.training.trainer import TrainConfig, Trainer

TRUE = np.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25]])    # what the network is to learn
CONFIG = TrainConfig(steps=9, batch=5, lr=0.07, warmup=3, ema=0.35, clip=2.5, seed=4)


def stage(**changes) -> Stage:
    """A linear map and its mean squared error; the batch is x (B, 3) and y (B, 2)."""
    def batch(step):
        x = step.normal((step.size, 3))
        return x, (x @ TRUE + 0.1 * step.rng.standard_normal((step.size, 2))).astype(np.float32)

    def loss(module, x, y):
        d = module(Tensor(x)) - y
        return ops.mean(d * d)
    return replace(Stage("linear", Linear(3, 2, np.random.default_rng(0)), batch, loss, 9), **changes)


def by_hand(w, b, batches, c: TrainConfig):
    """The weights, moments, average and loss after each step, from the formulas of optim.py and trainer.py."""
    w, b = w.astype(np.float64), b.astype(np.float64)
    held = {name: {"w": np.zeros_like(w), "b": np.zeros_like(b)} for name in ("m", "v")}
    average = {"w": w.copy(), "b": b.copy()}
    for n, (x, y) in enumerate(batches):
        d = x.astype(np.float64) @ w + b - y                                        # (B, 2)
        loss, grads = (d * d).mean(), {"w": 2 * x.T @ d / d.size, "b": 2 * d.sum(axis=0) / d.size}
        norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
        grads = {name: g * min(1, c.clip / norm) for name, g in grads.items()}
        lr = (c.lr * (n + 1) / c.warmup if n < c.warmup else
              c.lr * (1 + math.cos(math.pi * (n - c.warmup + 1) / (c.steps - c.warmup + 1))) / 2)
        weights = {"w": w, "b": b}
        for name, g in grads.items():
            m, v = held["m"][name], held["v"][name]
            m[...] = 0.9 * m + 0.1 * g
            v[...] = 0.99 * v + 0.01 * g * g
            decay = 0.01 * weights[name] if name == "w" else 0
            weights[name] = weights[name] - lr * (m / (1 - 0.9 ** (n + 1)) / (np.sqrt(v / (1 - 0.99 ** (n + 1))) + 1e-8)
                                                  + decay)
        w, b = weights["w"], weights["b"]
        keep = min(c.ema, (1 + n) / (10 + n))
        average = {name: keep * a + (1 - keep) * weights[name] for name, a in average.items()}      # of the new weights
        yield {"weights": weights, "m": held["m"], "v": held["v"], "average": average}, loss, norm


def test_all_that_a_trainer_holds_after_each_step():
    """Five samples in two unequal shards, three steps of warm-up, gradients that are clipped and some that are not."""
    t, norms = Trainer(stage(), CONFIG, number=2), []
    module = t.stage.module
    batches = [t.stage.batch(Step(CONFIG.seed, 2, n, CONFIG.steps, CONFIG.batch)) for n in range(CONFIG.steps)]
    expected = by_hand(module.w.data, module.b.data, batches, CONFIG)
    for n, (state, loss, norm) in enumerate(expected):
        returned = t.step()
        norms.append(norm)
        held = {"weights": {name: p.data for name, p in module.parameters().items()}, "m": t.optimiser.m,
                "v": t.optimiser.v, "average": t.ema.average}
        for part, arrays in state.items():
            for name, a in arrays.items():
                np.testing.assert_allclose(held[part][name], a, rtol=2e-4, atol=1e-6, err_msg=f"{part} {name}, {n}")
        assert returned == t.losses[-1] == pytest.approx(loss, rel=1e-4)
        assert t.n == t.optimiser.n == t.ema.n == len(t.losses) == n + 1
    assert min(norms) < CONFIG.clip < max(norms)


def test_the_mean_gradient_does_not_depend_on_the_shards(monkeypatch):
    """Seven samples at once, and in shards of 2, 2 and 3: the same step."""
    states = []
    for size in (7, 3):
        monkeypatch.setattr("minidiff.engine.parallel.shards", lambda count, size=size: [
            slice(i, min(i + size, count)) for i in range(0, count, size)])
        t = Trainer(stage(), replace(CONFIG, batch=7, clip=1e6))
        t.step()
        states.append((t.losses[0], t.optimiser.m["w"].copy(), t.stage.module.b.data.copy()))
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_step_that_overflows_leaves_all_but_its_count_its_loss_and_the_scale(monkeypatch):
    t = Trainer(stage(loss=lambda module, x, y: ops.mean(module(Tensor(x.astype(module.dtype))) * 1.0)),
                replace(CONFIG, precision="float16"))
    t.step()
    before = {name: a.copy() for name, a in t.state()[0].items()}
    t.scaling.scale = 2.0**40
    t.step()
    after = t.state()[0]
    assert t.n == 2 and len(t.losses) == 2 and t.scaling.scale == 2.0**39
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"losses", "scaling.scale", "scaling.good", "scaling.skipped"}
    assert (t.optimiser.n, t.ema.n) == (1, 1)
    rates = []
    monkeypatch.setattr(t.optimiser, "step", lambda grads, lr: rates.append(lr))
    t.scaling.scale = 1.0
    t.step()
    assert rates == [t.lr(2)]                               # of the run's third step, though it is the second to change


# ---- the averaged weights ----------------------------------------------------------------------------------------

def trained(steps: int = 3) -> Trainer:
    t = Trainer(stage(), CONFIG)
    for _ in range(steps):
        t.step()
    return t


@pytest.mark.parametrize("fails", [False, True])
def test_within_averaged_weights_all_are_the_average_and_after_it_all_are_as_before(fails):
    """The same arrays with the same numbers, of every parameter, and the average too, also when what is drawn fails."""
    t = trained()
    parameters = t.stage.module.parameters()
    own = {name: (p.data, p.data.copy()) for name, p in parameters.items()}
    average = {name: a.copy() for name, a in t.ema.average.items()}
    try:
        with t.with_averaged_weights():
            assert all(np.array_equal(p.data, average[name]) for name, p in parameters.items())
            assert all(not np.array_equal(p.data, own[name][1]) for name, p in parameters.items())
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    for name, p in parameters.items():
        assert p.data is own[name][0] and np.array_equal(p.data, own[name][1])
        assert np.array_equal(t.ema.average[name], average[name])


def test_a_run_with_previews_makes_the_same_steps_as_one_without():
    plain, drawn = trained(6), trained(0)
    for _ in range(6):
        with drawn.with_averaged_weights():
            pass
        drawn.step()
    a, b = plain.state()[0], drawn.state()[0]
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_trained_stage_has_a_copy_of_the_average():
    t = trained()
    t.use_averaged_weights()
    module = t.stage.module
    assert all(np.array_equal(p.data, t.ema.average[name]) for name, p in module.parameters().items())
    module.w.data += 1
    assert not np.array_equal(module.w.data, t.ema.average["w"])


def test_a_preview_is_drawn_with_the_average_and_the_losses_so_far(tmp_path, monkeypatch):
    seen, curves, saved = [], [], []
    t = Trainer(stage(picture=lambda: seen.append(t.stage.module.w.data.copy())), CONFIG)
    for _ in range(4):
        t.step()
    monkeypatch.setattr(loop.pictures, "save", lambda picture, path: saved.append(path.name))
    monkeypatch.setattr(loop.pictures, "loss_curve", lambda steps, losses, title: curves.append(
        (list(steps), list(losses), title)))
    loop.draw_preview(t, tmp_path)
    assert np.array_equal(seen[0], t.ema.average["w"]) and not np.array_equal(seen[0], t.stage.module.w.data)
    assert curves == [([1, 2, 3, 4], t.losses, "linear: training loss")] and saved == ["loss.png", "samples.png"]


def test_ranks_that_do_not_start_alike_make_no_step(tmp_path, monkeypatch):
    t, asked = Trainer(stage(), CONFIG), []

    def refused(fingerprint):
        asked.append(fingerprint())
        raise UserError("the ranks do not start alike")
    monkeypatch.setattr(t.ranks, "check_alike", refused)
    with pytest.raises(UserError, match="do not start alike"):
        loop.train_stage(t, checkpoint.CheckpointFolder(tmp_path), quiet=True)
    assert asked == [t.fingerprint()] and t.n == 0


def test_the_bar_tells_the_loss_and_the_speed_of_the_last_steps(tmp_path, monkeypatch):
    """Steps of 1/100 s: the speed is 100 batches a second, from the first step on, and after slow ones in the past."""
    now, shown, step = [0.0], [], Trainer.step

    class Bar(nullcontext):
        def set_postfix_str(self, words, refresh):
            shown.append(words)

        def update(self):
            pass

    def timed(self):
        now[0] += 0.01 if self.n > 0 else 5.0
        return step(self)
    monkeypatch.setattr(Trainer, "step", timed)
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop, "FETCH_EVERY", 3)
    monkeypatch.setattr(loop, "progress", lambda **options: Bar())
    t = Trainer(stage(), replace(CONFIG, steps=6))
    folder = checkpoint.CheckpointFolder(tmp_path)
    folder.prepare(0)
    loop.train_stage(t, folder, quiet=True)
    batch = t.config.batch
    speeds = [batch / 5, 2 * batch / 5.01, 3 * batch / 5.02, 100 * batch, 100 * batch, 100 * batch]
    losses = [np.mean(t.losses[:n]) for n in range(1, 7)]
    assert shown == [f"loss {loss:.4f}, {speed:.0f} samples/s" for loss, speed in zip(losses, speeds, strict=True)]


@pytest.mark.parametrize("steps", [4, 9, 20])
def test_progress_is_the_share_of_the_run_s_steps_whatever_the_stage_s_own(steps):
    """So that what falls or rises with it is where it should be at the end of a shorter run, too."""
    shares, made = [], stage()                              # of 9 steps
    t = Trainer(replace(made, batch=lambda step: shares.append(step.progress) or made.batch(step)),
                replace(CONFIG, steps=steps))
    for _ in range(steps):
        t.step()
    assert shares == [n / steps for n in range(steps)]


# ---- a stage on disk -----------------------------------------------------------------------------------------------

def test_a_stage_is_saved_when_it_is_time_and_at_its_end_as_it_is_then(tmp_path, monkeypatch):
    """Steps of 50 seconds: a state after the first step beyond 120 seconds since the last, a preview beyond 60."""
    now, previews, step = [0.0], [], Trainer.step

    def slow(self):
        now[0] += 50.0
        return step(self)
    monkeypatch.setattr(Trainer, "step", slow)
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop, "FETCH_EVERY", 3)             # the bar's speed is of the last steps, the time of all

    def draw(trainer, folder):
        previews.append((trainer.n, folder))
        now[0] += 1.0                                       # is no time of training
    monkeypatch.setattr(loop, "draw_preview", draw)
    t = Trainer(stage(), replace(CONFIG, steps=8))
    folder = checkpoint.CheckpointFolder(tmp_path, keep=99)
    folder.prepare(0)
    loop.train_stage(t, folder, quiet=True)
    states = {saved.meta["step"]: saved for saved in map(checkpoint.load, tmp_path.glob("step-*.safetensors"))}
    assert sorted(states) == [3, 6, 8] and previews == [(n, tmp_path) for n in (2, 4, 6, 8)]
    again = Trainer(stage(), replace(CONFIG, steps=8))
    for n in range(1, 9):
        again.step()
        if n in states:                                     # the state of step n, not of the one before or after
            held = again.state()[0]
            assert all(np.array_equal(states[n].tensors[name], a) for name, a in held.items())
    assert t.seconds == 8 * 50


# ---- a run -----------------------------------------------------------------------------------------------------------

GIVEN = stage(steps=200, batch_size=7, lr=0.004, ema=0.97)


@pytest.mark.parametrize("options, expected", [
    ({}, TrainConfig(steps=200, batch=7, lr=0.004, warmup=50, ema=0.97, clip=1.0, seed=0, precision="float32")),
    ({"effort": 0.1}, TrainConfig(steps=20, batch=7, lr=0.004, warmup=20, ema=0.97)),
    ({"effort": 0.001}, TrainConfig(steps=1, batch=7, lr=0.004, warmup=1, ema=0.97)),
    ({"effort": 1.5, "seed": 9}, TrainConfig(steps=300, batch=7, lr=0.004, warmup=50, ema=0.97, seed=9)),
    ({"steps": 60, "effort": 0.5}, TrainConfig(steps=60, batch=7, lr=0.004, warmup=50, ema=0.97)),
    ({"batch": 3, "lr": 0.5, "precision": "float16"},
     TrainConfig(steps=200, batch=3, lr=0.5, warmup=50, ema=0.97, precision="float16")),
], ids=str)
def test_options_take_the_place_of_what_the_stage_says(options, expected):
    assert run.TrainOptions(**options).for_stage(GIVEN) == expected


def test_each_stage_of_a_run_is_trained_by_its_own_number_and_configuration(tmp_path, monkeypatch):
    made, weights, straight = [], [], Trainer.__init__

    def recording(self, stage, config, **options):
        straight(self, stage, config, **options)
        made.append(self)
        weights.append(stage.module.state_dict())
    monkeypatch.setattr(Trainer, "__init__", recording)
    monkeypatch.setattr(run, "draw_preview", lambda trainer, folder: None)
    trained = run.run(tmp_path, Toy, tiny.digits(50), run.TrainOptions(seed=3, lr=0.01), quiet=True)
    first, second = made
    assert [(t.number, t.stage.name, t.config.steps, t.config.batch, t.config.lr, t.config.seed) for t in made] == \
        [(1, "first", 4, 6, 0.01, 3), (2, "second", 5, 6, 0.01, 3)]
    untrained = Toy.new(tiny.digits(50), 3)
    assert all(np.array_equal(w, weights[0][name]) for name, w in untrained.a.state_dict().items())
    assert all(np.array_equal(w, weights[1][name]) for name, w in untrained.b.state_dict().items())
    assert not np.array_equal(Toy.new(tiny.digits(50), 4).a.w.data, weights[0]["w"])
    for t in made:
        assert t.description == untrained.describe() | {"data": tiny.digits(50).fingerprint, "needed": {},
                                                        "stage": t.stage.name}
    assert trained.losses == {t.stage.name: pytest.approx(np.mean(t.losses)) for t in made}
    assert trained.seconds == {t.stage.name: t.seconds for t in made}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_trains_on_the_device_that_is_asked_for(device, tmp_path, monkeypatch):
    class Stop(Exception):
        """Raised in place of the training, with the trainer's device."""

    def stop(self, stage, config, *, device="none", **options):
        raise Stop(device)
    moved = []
    monkeypatch.setattr(Toy, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr(Trainer, "__init__", stop)
    with pytest.raises(Stop, match=f"^{device}$"):
        run.run(tmp_path, Toy, tiny.digits(50), quiet=True, device=device)
    assert moved == [device]


def test_the_loss_of_a_run_is_the_mean_of_its_last_hundred(tmp_path, monkeypatch):
    def fast(trainer, folder, quiet, title):
        trainer.losses, trainer.n = [float(i) for i in range(150)], trainer.config.steps
    monkeypatch.setattr(run, "_train", fast)
    found = run.run(tmp_path, Toy, tiny.digits(50), quiet=True).losses
    assert found == {"first": np.mean(range(50, 150)), "second": np.mean(range(50, 150))}
