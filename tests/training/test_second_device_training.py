"""Training on a second device: the same steps as on the host, without waiting for the device, and exact resuming."""

from collections import OrderedDict
from types import MethodType

import numpy as np
import pytest
from support import tiny
from support.fake_cupy import assert_same, install, of_the_stand_in
from support.second_device import SMALL

from minidiff import checkpoint
from minidiff.engine import backend, ops
from minidiff.engine.cuda.random import DeviceSampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.systems.stage import Stage
from minidiff.systems.text_to_image import TextToImage
from minidiff.training.loop import train_stage
from minidiff.training.trainer import TrainConfig, Trainer


@pytest.fixture
def cupy(monkeypatch):
    return install(monkeypatch)


def small(device: str, **options) -> Trainer:
    """A trainer of a model so small that kernels on a CPU can train it."""
    model = TextToImage(SMALL, tiny.tokenizer(), np.random.default_rng(0)).to(device)
    config = TrainConfig(**{"steps": 20, "batch": 2, "warmup": 2} | options)
    return Trainer(next(model.stages(tiny.digits())), config, device=device, description=model.describe())


def with_noise_of(host, device) -> None:
    """The host's trainer draws the device's noise."""
    batch = type(host).batch

    def same(self):
        device.n = self.n
        return *batch(self)[:4], device.batch()[4].get()
    host.batch = MethodType(same, host)


def needs(precision: str) -> None:
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs the package ml_dtypes")


AGREEMENT = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}        # of two losses


@pytest.mark.slow
@pytest.mark.parametrize("precision", AGREEMENT)
def test_steps_on_the_device_are_the_hosts(cupy, precision):
    """Two steps from the same weights, data and noise."""
    needs(precision)
    host, device = small("cpu", precision=precision), small("cuda", precision=precision)
    with_noise_of(host, small("cuda"))
    for n in range(2):
        assert float(device.step()) == pytest.approx(host.step(), rel=AGREEMENT[precision]), n
    device.fetch()
    assert len(device.losses) == 2 and device.n == 2 and device.optimiser.n == device.ema.n == 2
    ours, theirs = (np.concatenate([w.ravel() for w in t.stage.module.state_dict().values()]) for t in (host, device))
    # a step is as long as its learning rate in each coordinate, and where a gradient is next to 0, it may turn around
    assert np.abs(theirs - ours).max() <= 4 * host.config.lr
    assert np.abs(theirs - ours).mean() < {"float32": 0.01, "float16": 0.2}.get(precision, 0.5) * host.config.lr


SYNCHRONISING = "get item __float__ __int__ __bool__ __index__ __repr__ __format__ tolist nonzero".split()


def watch(cupy, monkeypatch) -> list[str]:
    """The calls by which the host waits for the device, from now on."""
    calls = []
    def watched(name, own):
        def waits(self, *args):
            calls.append(name)
            return own(self, *args) if own else getattr(self._a, name)(*args)
        return waits
    for name in SYNCHRONISING:
        monkeypatch.setattr(cupy.ndarray, name, watched(name, getattr(cupy.ndarray, name, None)), raising=False)
    return calls


@pytest.mark.slow
@of_the_stand_in
@pytest.mark.parametrize("precision", AGREEMENT)
def test_no_step_waits_for_the_device(cupy, monkeypatch, precision):
    """Steps 2 and 3 read nothing back; then the losses of all are fetched at once."""
    needs(precision)
    t = small("cuda", precision=precision)
    t.step()
    calls = watch(cupy, monkeypatch)
    for _ in range(2):
        t.step()
    assert calls == [] and t.losses == [] and t.n == 3
    t.fetch()
    assert calls == ["get", "get"] and len(t.losses) == 3
    t.fetch()
    assert len(calls) == 2, "there was nothing to fetch"
    assert float(cupy.ones(())) == 1 and calls[2:] == ["__float__"], "the watch sees"


@of_the_stand_in
@pytest.mark.parametrize("precision", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_step_has_one_copy_to_the_device(cupy, monkeypatch, precision):
    """The batch, and with it what the loss computes of it on the host.  Tables that stay were copied before."""
    t, copied, plain = small("cuda", precision=precision), [], cupy.asarray
    t.step()
    monkeypatch.setattr(backend, "_remembered", OrderedDict())
    monkeypatch.setattr(cupy, "asarray", lambda a, dtype=None: (
        copied.append(a) if isinstance(a, np.ndarray) else None, plain(a, dtype))[1])
    t.step()
    assert len(copied) == 1


class One(Module):
    """A network of one number, which needs no kernel."""

    def __init__(self):
        self.w = Tensor(np.ones(1, np.float32), requires_grad=True)


class NoUpdate:
    """In place of the update on the device: it changes no weight, and no step fails."""

    scale = 1.0

    def __init__(self, *_):
        pass

    def step(self, *_) -> None:
        pass

    def fetch(self, steps: int) -> None:
        pass


def test_losses_are_fetched_now_and_then(cupy, monkeypatch):
    """Every two steps, in order, and where the state is asked for."""
    monkeypatch.setattr("minidiff.training.trainer.FETCH_EVERY", 2)
    monkeypatch.setattr("minidiff.training.trainer.UpdateOnDevice", NoUpdate)
    stage = Stage("one", One().to("cuda"), lambda step: (np.full((2, 1), step.progress, np.float32),),
                  lambda one, x: ops.mean(one.w * Tensor(x)), steps=4)
    t, known = Trainer(stage, TrainConfig(steps=4, batch=2, warmup=0), device="cuda"), []
    for _ in range(3):
        t.step()
        known.append(list(t.losses))
    assert known == [[], [0, 0.25], [0, 0.25]]
    assert t.state()[0]["losses"].tolist() == t.losses == [0, 0.25, 0.5]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_raises_at_the_next_fetch(cupy):
    """With the step's number, and all as it was before that step, however many were made since."""
    t = small("cuda")
    t.step()
    before = {name: a.copy() for name, a in t.state()[0].items()}
    own = t.batch
    t.batch = lambda: (own()[0] * np.nan, *own()[1:])
    t.step()
    t.batch = own
    t.step()
    with pytest.raises(FloatingPointError, match="step 2 is nan"):
        t.fetch()
    assert t.n == 1 and t.optimiser.n == t.ema.n == 1
    after = t.state()[0]
    assert all(np.array_equal(after[name], a) for name, a in before.items())
    t.step()
    t.fetch()
    assert t.n == 2 and np.isfinite(t.losses).all()


@pytest.mark.slow
@pytest.mark.law(
    37, "N + M steps are N steps, save, load, M steps, on a second device too: weights, EMA, optimiser, loss scale, "
        "random streams and losses",
    source="the same run without the break", tolerance="exact, to the last bit")
@pytest.mark.parametrize("precision, scale", [("float32", 1), ("float16", 2.0**22), ("bfloat16", 1)])
def test_n_plus_m_steps_on_the_device(cupy, tmp_path, precision, scale):
    """At 2^22 the first steps of float16 overflow and are left out, before the break and after it."""
    needs(precision)
    def fresh():
        t = small("cuda", precision=precision)
        t.scaling.scale = scale
        t.on_device.push()
        return t

    def steps(t, count):
        with np.errstate(all="ignore"):                     # an overflow is what the double's NumPy warns of
            for _ in range(count):
                t.step()
        return t
    straight, first = steps(fresh(), 3), steps(fresh(), 1)
    checkpoint.save(tmp_path / "state.safetensors", *first.state())
    second = small("cuda", precision=precision)
    second.restore(checkpoint.load(tmp_path / "state.safetensors"))
    steps(second, 2)
    ours, theirs = straight.state()[0], second.state()[0]
    assert ours.keys() == theirs.keys() and all(np.array_equal(a, theirs[name]) for name, a in ours.items())
    assert straight.losses == second.losses and second.n == len(second.losses) == 3
    if precision == "float16":
        assert 0 < first.scaling.skipped < second.scaling.skipped < 3
        assert second.scaling.scale == 2.0 ** (22 - second.scaling.skipped)
    assert second.optimiser.n == second.ema.n == 3 - second.scaling.skipped


@pytest.mark.slow
def test_a_run_on_the_device_that_ends_in_nan_names_the_last_good_state(cupy, tmp_path, monkeypatch):
    """In its last step, which no later fetch follows: a sentence for the user, with the state before it."""
    monkeypatch.setattr("minidiff.training.loop.SAVE_EVERY", 0.0)      # a state after every step
    own = Trainer.batch

    def batch(self):
        x_0, *others = own(self)
        return x_0 * np.nan if self.n == 2 else x_0, *others
    monkeypatch.setattr(Trainer, "batch", batch)
    folder = checkpoint.CheckpointFolder(tmp_path)
    folder.prepare()
    with pytest.raises(UserError, match=r"the loss of step 3 is nan.*last good state is .*step-000002\.safetensors"):
        train_stage(small("cuda", steps=3), folder, quiet=True)
    assert folder.latest().meta["step"] == 2


def test_the_noise_of_training_is_not_that_of_samplers(cupy):
    """SampleStreams of one seed: what is sampled was not trained on, and no step's noise is another's."""
    t = small("cuda", seed=5)
    drawn = [*t.batch()[4].get(), *DeviceSampleStreams(5, 4).normal((28, 28, 1)).get()]
    t.n += 1
    drawn += [*t.batch()[4].get()]
    assert len({z.tobytes() for z in drawn}) == 8


@pytest.mark.slow
def test_training_saving_and_resuming(cupy, tmp_path):
    """A step on the device, its state to a file and back, and the next step the same, bit for bit; the model too."""
    first = small("cuda")
    first.step()
    first.step()
    assert all(isinstance(p.data, cupy.ndarray) for p in first.parameters.values())

    tensors, meta = first.state()
    checkpoint.save(tmp_path / "state.safetensors", tensors, meta)
    second = small("cuda")
    second.restore(checkpoint.load(tmp_path / "state.safetensors"))
    assert all(isinstance(a, cupy.ndarray) for a in (*second.ema.average.values(), *second.optimiser.m.values()))
    assert second.stage.module.device == "cuda" and float(second.step()) == float(first.step())
    for name, w in first.state()[0].items():
        assert np.array_equal(w, second.state()[0][name]), name

    with first.with_averaged_weights():
        assert first.stage.module.device == "cuda"
        first.stage.module.save(tmp_path / "model.safetensors")
    loaded = TextToImage.load(tmp_path / "model.safetensors")
    assert loaded.device == "cpu"
    for name, average in first.ema.average.items():
        assert_same(average, loaded.parameters()[name].data)
