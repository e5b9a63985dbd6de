"""Floors II, IV and V on a second device: networks, training and sampling are the same there, to float32's rounding."""

import threading

import numpy as np
import pytest
from fake_cupy import assert_same, install, one_sentence
from tiny import images, trained_a_little, trainer

from minidiff import bits, checkpoint
from minidiff.engine.backend import Streams, to_device
from minidiff.engine.parallel import parallel_gradients, parallel_map
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn import layers
from minidiff.nn.optim import EMA, AdamW, clip_by_norm
from minidiff.nn.transformer import TransformerBlock
from minidiff.nn.unet import TextStates
from minidiff.systems.text_to_image import TextToImage
from minidiff.text.clip import clip_loss
from minidiff.text.encoder import TextEncoder, TextEncoderConfig


@pytest.fixture
def cupy(monkeypatch):
    return install(monkeypatch)


# --- networks -----------------------------------------------------------------------------------------------

def run(f, module, device: str, x: np.ndarray) -> list:
    """f(module, Tensor x) on a device: the result and its gradients, by x and by every parameter."""
    module.to(device)
    x = Tensor(to_device(x, device), requires_grad=True)
    y = f(module, x)
    dy = np.random.default_rng(2).standard_normal(y.shape).astype(y.dtype)
    return [y.data, *gradients(y, [x, *module.parameters().values()], to_device(dy, device))]


LAYERS = {
    "Linear": (lambda rng: layers.Linear(4, 6, rng), (3, 4)),
    "Conv2d": (lambda rng: layers.Conv2d(4, 6, rng, stride=2), (2, 5, 6, 4)),
    "GroupNorm": (lambda rng: layers.GroupNorm(4, 2), (2, 3, 3, 4)),
    "LayerNorm": (lambda rng: layers.LayerNorm(4), (2, 3, 4)),
    "TransformerBlock": (lambda rng: TransformerBlock(4, 2, rng), (2, 3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(cupy, name):
    make, shape = LAYERS[name]
    rng = np.random.default_rng(0)
    layer, x = make(rng), rng.standard_normal(shape, dtype=np.float32)
    for p in layer.parameters().values():
        p.data = p.data + rng.standard_normal(p.shape, dtype=np.float32)
    for found, expected in zip(*(run(lambda m, x: m(x), layer, device, x) for device in ("cuda", "cpu")), strict=True):
        assert_same(found, expected)


def test_embeddings_and_dropout(cupy):
    rng, ids, t = np.random.default_rng(0), np.array([[2, 0], [1, 2]]), np.array([0, 3, 49])
    table = layers.Embedding(3, 4, rng)
    expected = table(ids).data
    for where in (np, cupy):
        assert_same(table.to("cuda")(where.asarray(ids)).data, expected)
    assert_same(layers.sinusoidal_embedding(cupy.asarray(t), 6), layers.sinusoidal_embedding(t, 6))
    drop, x = layers.Dropout(0.5).train(), rng.standard_normal((3, 4))
    assert_same(drop(Tensor(cupy.asarray(x)), np.random.default_rng(1)).data,
                drop(Tensor(x), np.random.default_rng(1)).data)


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


def test_text_encoder_takes_tokens_of_either_device(cupy):
    encoder = TextEncoder(TextEncoderConfig(vocab=9, length=4, width=4, heads=2), np.random.default_rng(0))
    ids, mask = np.array([[1, 3, 2], [1, 2, 0]]), np.array([[True, True, True], [True, True, False]])
    expected = encoder(ids, mask)
    encoder.to("cuda")
    for where in (np, cupy):
        states = encoder(where.asarray(ids), where.asarray(mask))
        assert_same(states.tokens.data, expected.tokens.data)
        assert_same(states.pooled.data, expected.pooled.data)
        assert_same(states.mask, mask)


def test_clip_loss(cupy):
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((3, 4)), rng.standard_normal((3, 4)), np.array(0.5)]
    results = []
    for device in ("cuda", "cpu"):
        leaves = [Tensor(to_device(x, device), requires_grad=True) for x in inputs]
        loss = clip_loss(*leaves)
        results.append([loss.data, *gradients(loss, leaves)])
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)
    for i in range(2):
        with pytest.raises(TypeError) as error:
            clip_loss(*(Tensor(x if i == j else cupy.asarray(x)) for j, x in enumerate(inputs)))
        one_sentence(error)
    with pytest.raises(ValueError, match="row 1 is 0"):
        clip_loss(Tensor(cupy.asarray(inputs[0] * [[1], [0], [1]])), *map(Tensor, map(cupy.asarray, inputs[1:])))


def test_optimiser_clipping_average_and_state(cupy):
    """Three steps on both; the states are on the host, and taken up again where the parameters are."""
    def after(device):
        rng = np.random.default_rng(0)
        p = {"w": Tensor(to_device(rng.standard_normal((2, 3)), device), requires_grad=True),
             "b": Tensor(to_device(rng.standard_normal(3), device), requires_grad=True)}
        optimiser, ema = AdamW(p), EMA(p, 0.9)
        for _ in range(3):
            grads = [to_device(rng.standard_normal(q.shape), device) for q in p.values()]
            norm = clip_by_norm(grads, 0.5)
            assert isinstance(norm, float)
            optimiser.step(grads, 0.1)
            ema.step()
        return p, optimiser, ema
    (p, optimiser, ema), (q, host_optimiser, host_ema) = after("cuda"), after("cpu")
    for name in p:
        assert_same(p[name].data, q[name].data)
        assert_same(ema.average[name], host_ema.average[name])
        assert_same(optimiser.v[name], host_optimiser.v[name])
    fresh, fresh_ema = AdamW(p), EMA(p)
    for moved, kept, expected in ((fresh, optimiser, host_optimiser), (fresh_ema, ema, host_ema)):
        state = kept.state_dict()
        assert all(isinstance(a, np.ndarray) for a in state.values())
        moved.load_state_dict(state)
        for name, a in expected.state_dict().items():
            np.testing.assert_allclose(moved.state_dict()[name], a, rtol=0, atol=1e-12)
    assert_same(fresh.m["w"], host_optimiser.m["w"])
    assert_same(fresh_ema.average["w"], host_ema.average["w"])


# --- the system ---------------------------------------------------------------------------------------------

def test_loss_and_its_gradients(cupy):
    """Shard by shard in threads, as the trainer computes them."""
    x_0, ids, mask, t, eps = trainer(batch=6).batch()
    results = []
    for device in ("cuda", "cpu"):
        model = trained_a_little().to(device)
        assert model.device == device
        results.append(parallel_gradients(
            lambda part, m=model: m.loss(x_0[part], ids[part], mask[part], t[part], eps[part]),
            list(model.parameters().values()), 6))
    (loss, grads), (host_loss, host_grads) = results
    assert isinstance(loss, float) and loss == pytest.approx(host_loss, rel=1e-5)
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


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm"])
def test_samples(cupy, sampler):
    model, captions = trained_a_little(), ["a bold seven", "", "3"]
    expected = model.sample(captions, steps=3, sampler=sampler, streams=Streams(1, 3))
    states = list(model.to("cuda").trajectory(captions, steps=3, sampler=sampler, streams=Streams(1, 3)))
    for state in states:
        assert isinstance(state.x_t, cupy.ndarray) and state.x_t.dtype == np.float32
    found = model.sample(captions, steps=3, sampler=sampler, streams=Streams(1, 3))
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


def test_training_saving_and_going_on(cupy, tmp_path):
    """A step on the device, its state to a file and back, and the next step the same, bit for bit; the model too."""
    def on_device():
        t = trainer()
        t.__init__(t.model.to("cuda"), t.data, t.config)    # the optimiser and the average start beside the weights
        return t
    first = on_device()
    losses = [first.step(), first.step()]
    host = trainer()
    assert losses[:1] == [pytest.approx(host.step(), rel=1e-5)]
    assert all(isinstance(p.data, cupy.ndarray) for p in first.parameters.values())

    tensors, meta = first.state()
    checkpoint.save(tmp_path / "state.safetensors", tensors, meta)
    second = on_device()
    second.restore(checkpoint.load(tmp_path / "state.safetensors"))
    assert all(isinstance(a, cupy.ndarray) for a in (*second.ema.average.values(), *second.optimiser.m.values()))
    assert second.model.device == "cuda" and second.step() == first.step()
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
