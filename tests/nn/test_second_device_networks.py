"""A system on a second device: training and sampling are the same there, to float32's rounding."""

import threading
from types import MethodType

import numpy as np
import pytest
from minidiff.training.main_job import TrainConfig, Trainer
from support.fake_cupy import assert_same, install, of_the_double, one_sentence
from support.tiny import images, trained_a_little, trainer

from minidiff import checkpoint
from minidiff.engine.backend import to_device
from minidiff.engine.cuda.random import DeviceSampleStreams
from minidiff.engine.parallel import parallel_gradients, parallel_map
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients
from minidiff.errors import UserError
from minidiff.evaluation import likelihood as bits
from minidiff.nn.unet import TextStates, UNetConfig
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.text.encoder import TextEncoderConfig
from minidiff.training import main_job as train


@pytest.fixture
def cupy(monkeypatch):
    return install(monkeypatch)


# --- the text encoder and the UNet of a system ----------------------------------------------------------------

def run(f, module, device: str, x: np.ndarray) -> list:
    """f(module, Tensor x) on a device: the result and its gradients, by x and by every parameter."""
    module.to(device)
    x = Tensor(to_device(x, device), requires_grad=True)
    y = f(module, x)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(y.dtype)
    return [y.data, *gradients(y, [x, *module.parameters().values()], to_device(dy, device))]


def test_text_encoder_and_unet(cupy):
    model = trained_a_little()
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((2, 28, 28, 1), dtype=np.float32), np.array([3, 40])
    ids, mask = model.tokens(["a bold seven", ""])

    def predict(model, x):
        return model.unet(x, t, model.text(ids, mask))
    results = [run(predict, model, device, x) for device in ("cuda", "cpu")]
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


# --- the system ---------------------------------------------------------------------------------------------

def test_loss_and_its_gradients(cupy):
    """Shard by shard in threads on the host, the whole batch at once on the device; the loss stays there."""
    x_0, ids, mask, t, eps = trainer(batch=6).batch()
    results = []
    for device in ("cuda", "cpu"):
        model = trained_a_little().to(device)
        assert model.device == device
        results.append(parallel_gradients(
            lambda part, m=model: m.loss(x_0[part], ids[part], mask[part], t[part], eps[part]),
            list(model.parameters().values()), 6))
    (loss, grads), (host_loss, host_grads) = results
    assert isinstance(host_loss, float) and isinstance(loss, cupy.ndarray)
    assert loss.get() == pytest.approx(host_loss, rel=1e-5)
    for found, expected in zip(grads, host_grads, strict=True):
        assert_same(found, expected)


def test_threads_compute_on_the_device(cupy, monkeypatch):
    monkeypatch.setattr("minidiff.engine.parallel.cores", lambda: 2)
    names, x = set(), cupy.ones(3)

    def f(i):
        names.add(threading.current_thread().name)
        return x * i
    assert [float(y.sum()) for y in parallel_map(f, [1, 2, 3])] == [3, 6, 9]
    assert all(name.startswith("minidiff") for name in names)


def test_without_streams_a_device_makes_its_own_noise(cupy):
    """From the seed and a sample's place, whatever else is drawn; other numbers than the host's."""
    model = TextToImage(SMALL, trainer().model.tokenizer, np.random.default_rng(0))
    (host, *_) = model.trajectory(["3"], steps=1)
    model.to("cuda")
    (three, *_), (one, *_) = (model.trajectory(["3"] * n, steps=1, seed=5) for n in (3, 1))
    (ours, *_) = model.trajectory(["3"], steps=1, streams=SampleStreams(0, 1))
    assert isinstance(three.x_t, cupy.ndarray) and np.array_equal(three.x_t[:1].get(), one.x_t.get())
    assert np.array_equal(DeviceSampleStreams(5, 1).normal((28, 28, 1)).get(), one.x_t.get())
    assert np.array_equal(ours.x_t.get(), host.x_t)


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm"])
def test_samples(cupy, sampler):
    model, captions = trained_a_little(), ["a bold seven", "", "3"]
    expected = model.sample(captions, steps=3, sampler=sampler, streams=SampleStreams(1, 3))
    states = list(model.to("cuda").trajectory(captions, steps=3, sampler=sampler, streams=SampleStreams(1, 3)))
    for state in states:
        assert isinstance(state.x_t, cupy.ndarray) and state.x_t.dtype == np.float32
    found = model.sample(captions, steps=3, sampler=sampler, streams=SampleStreams(1, 3))
    assert isinstance(found, np.ndarray)
    # three steps of float32 through a network whose output moves by about as much as its input
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert_same(states[-1].x_t, found)


def test_the_networks_derivative(cupy):
    model, rng = trained_a_little(), np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 2, 28, 28, 1), dtype=np.float32)
    t, results = np.array([4, 30]), []
    for device in ("cuda", "cpu"):
        cond = model.to(device).encode(["a bold seven", ""])
        results.append(model.unguided().vjp(to_device(x, device), t, to_device(dy, device), cond))
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


def test_two_devices_are_refused_by_the_network(cupy):
    model, rng = trained_a_little().to("cuda"), np.random.default_rng(0)
    x, t = rng.standard_normal((1, 28, 28, 1), dtype=np.float32), np.array([3])
    tokens, pooled, mask = model.encode(["3"])
    states = TextStates(Tensor(tokens), Tensor(pooled), mask)
    for wrong in (lambda: model.unet(Tensor(x), t, states),
                  lambda: model.predict(x, t, (tokens, pooled, mask)),
                  lambda: model.predict(cupy.asarray(x), t, (tokens.get(), pooled, mask)),
                  lambda: model.predict(cupy.asarray(x), t, (tokens, pooled.get(), mask)),
                  lambda: model.predict(cupy.asarray(x), t, (tokens, pooled, mask.get()))):
        with pytest.raises(TypeError) as error:
            wrong()
        one_sentence(error)


SMALL = TextToImageConfig(T=50, text=TextEncoderConfig(width=8, layers=1, heads=2),
                          unet=UNetConfig(patch=4, widths=(8,), attention=(True,), heads=2, groups=4, embedding=8,
                                          text=8))


def small(device: str, **options) -> Trainer:
    """A trainer of a model so small that kernels on a CPU can train it."""
    t = trainer(**{"batch": 2} | options)
    model = TextToImage(SMALL, t.model.tokenizer, np.random.default_rng(0)).to(device)
    return Trainer(model, t.data, t.config)                 # the optimiser and the average start beside the weights


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
    ours, theirs = (np.concatenate([w.ravel() for w in t.model.state_dict().values()]) for t in (host, device))
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


@of_the_double
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


def test_losses_are_fetched_now_and_then(cupy, monkeypatch):
    monkeypatch.setattr("minidiff.training.trainer.FETCH_EVERY", 2)
    t, known = small("cuda"), []
    for _ in range(3):
        t.step()
        known.append(len(t.losses))
    assert known == [0, 2, 2]
    assert t.state()[0]["losses"].shape == (3,) and t.losses == t.state()[0]["losses"].tolist()


def test_a_loss_that_is_not_finite_is_told_at_the_next_fetch(cupy):
    """With the step's number, and all as it was before that step, however many were made since."""
    t = small("cuda")
    t.step()
    before = {name: a.copy() for name, a in t.state()[0].items()}
    x_0, t.x_0 = t.x_0, t.x_0 * np.nan
    t.step()
    t.x_0 = x_0
    t.step()
    with pytest.raises(FloatingPointError, match="step 2 is nan"):
        t.fetch()
    assert t.n == 1 and t.optimiser.n == t.ema.n == 1
    after = t.state()[0]
    assert all(np.array_equal(after[name], a) for name, a in before.items())
    t.step()
    t.fetch()
    assert t.n == 2 and np.isfinite(t.losses).all()


@pytest.mark.law(
    37, "N + M steps are N steps, save, load, M steps, on a second device too: weights, EMA, optimiser, loss scale, "
        "random streams and losses",
    source="the same run without the break", tolerance="exact, to the last bit")
@pytest.mark.parametrize("precision, scale", [("float32", 1), ("float16", 2.0**21), ("bfloat16", 1)])
def test_n_plus_m_steps_on_the_device(cupy, tmp_path, precision, scale):
    """At 2^21 the first steps of float16 overflow and are left out, before the break and after it."""
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
        assert second.scaling.scale == 2.0 ** (21 - second.scaling.skipped)
    assert second.optimiser.n == second.ema.n == 3 - second.scaling.skipped


def test_a_run_on_the_device_that_ends_in_nan_says_where_to_go_on(cupy, tmp_path, monkeypatch):
    """In its last step, which no later fetch follows: a sentence for the user, with the state before it."""
    monkeypatch.setattr("minidiff.training.trainer.SAVE_EVERY", 0.0)   # a state after every step
    own = Trainer.batch

    def batch(self):
        x_0, *others = own(self)
        return x_0 * np.nan if self.n == 2 else x_0, *others
    monkeypatch.setattr(Trainer, "batch", batch)
    with pytest.raises(UserError, match=r"the loss of step 3 is nan.*last good state is .*step-000002\.safetensors"):
        train.run(tmp_path, images(), TrainConfig(steps=3, batch=2), model_config=SMALL, device="cuda", quiet=True)
    assert checkpoint.CheckpointFolder(tmp_path).latest().meta["step"] == 2
    assert not (tmp_path / "model.safetensors").exists()


def test_trainings_noise_is_no_samplers(cupy):
    """SampleStreams of one seed: what is sampled was not trained on, and no step's noise is another's."""
    t = small("cuda", seed=5)
    drawn = [*t.batch()[4].get(), *DeviceSampleStreams(5, 4).normal((28, 28, 1)).get()]
    t.n += 1
    drawn += [*t.batch()[4].get()]
    assert len({z.tobytes() for z in drawn}) == 8


def test_training_saving_and_going_on(cupy, tmp_path):
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
    assert second.model.device == "cuda" and float(second.step()) == float(first.step())
    for name, w in first.state()[0].items():
        assert np.array_equal(w, second.state()[0][name]), name

    averaged = first.averaged()
    assert averaged.device == "cuda"
    averaged.save(tmp_path / "model.safetensors")
    loaded = TextToImage.load(tmp_path / "model.safetensors")
    assert loaded.device == "cpu"
    for name, p in averaged.parameters().items():
        assert_same(p.data, loaded.parameters()[name].data)


def test_bits_per_dim(cupy, monkeypatch):
    monkeypatch.setattr(bits, "TERMS", 2)
    monkeypatch.setattr(bits, "FLOW_STEPS", 2)
    host, there = (bits.likelihood(trained_a_little().to(device), images(4), count=2) for device in ("cpu", "cuda"))
    assert there.bound == pytest.approx(host.bound, rel=1e-4) and there.flow == pytest.approx(host.flow, rel=1e-4)
