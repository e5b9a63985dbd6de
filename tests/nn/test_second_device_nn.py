"""Floors II and IV on a second device: layers, losses and the optimiser compute the same there, up to rounding."""

import threading

import numpy as np
import pytest
from support.every_network import NETWORKS, TEXT, T, X
from support.fake_cupy import assert_same, install, one_sentence
from support.second_device import run

from minidiff.engine.backend import to_device
from minidiff.engine.parallel import parallel_map
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn import layers
from minidiff.nn.gumbel import gumbel_softmax
from minidiff.nn.optim import EMA, AdamW, clip_by_norm
from minidiff.nn.precision import as_input
from minidiff.nn.quantise import Codebook, usage
from minidiff.nn.transformer import TransformerBlock
from minidiff.text.clip import clip_loss
from minidiff.text.encoder import TextEncoder


@pytest.fixture
def cupy(monkeypatch):
    return install(monkeypatch)


# --- layers -------------------------------------------------------------------------------------------------

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


def test_text_encoder_takes_tokens_of_either_device(cupy):
    encoder = TextEncoder(TEXT, np.random.default_rng(0))
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


# --- whole networks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_the_loss_of_every_network_and_its_gradients(cupy, network):
    results = []
    for device in ("cuda", "cpu"):
        module = network.new().to(device)
        loss = network.loss(module)
        assert isinstance(loss.data, cupy.ndarray) == (device == "cuda")
        results.append([loss.data, *gradients(loss, list(module.parameters().values()))])
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


def test_what_classifiers_say(cupy):
    """The answers and the guiding gradient of the noisy one; features and classes of the other, as host arrays."""
    noisy, clean = NETWORKS["noisy classifier"].new(), NETWORKS["image classifier"].new()
    y, results = np.array([[2, 1], [0, 0]]), []
    for device in ("cuda", "cpu"):
        noisy.to(device)
        x_t = to_device(X, device)
        results.append([*noisy.read(x_t, T), noisy.grad_log_prob(x_t, T, y)])
    for found, expected in zip(*results, strict=True):
        assert isinstance(found, cupy.ndarray)
        assert_same(found, expected)
    images = X.clip(-1, 1)
    expected, found = clean.read(images), clean.to("cuda").read(images)
    assert all(isinstance(a, np.ndarray) for a in found)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


def test_codes_are_revived_and_counted(cupy):
    z, results = np.random.default_rng(1).standard_normal((6, 3)).astype(np.float32), []
    for device in ("cuda", "cpu"):
        codebook = Codebook(4, 3, np.random.default_rng(0))
        codebook.codes.data[1:] += 100                      # which no vector chooses
        codebook.to(device)
        there = to_device(z, device)
        revived = codebook.revive(there, np.random.default_rng(2))
        results.append((revived, usage(codebook.nearest(there), 4), codebook.state_dict()["codes"]))
    (revived, used, codes), (host_revived, host_used, host_codes) = results
    assert revived == host_revived == 3 and used == pytest.approx(host_used)
    np.testing.assert_allclose(codes, host_codes, rtol=1e-6)


def test_a_temperature_for_each_sample(cupy):
    logits, g = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    tau = np.array([[0.5], [1], [2]])
    expected = gumbel_softmax(Tensor(logits), g, tau).data
    for where in (np, cupy):
        assert_same(gumbel_softmax(Tensor(cupy.asarray(logits)), cupy.asarray(g), where.asarray(tau)).data, expected)


def test_an_array_is_moved_to_the_modules_device(cupy):
    layer, x = layers.Linear(3, 2, np.random.default_rng(0)).to("cuda"), np.ones((4, 3), np.float32)
    assert layer.device == "cuda" and isinstance(as_input(layer, x).data, cupy.ndarray)
    assert_same(layer(as_input(layer, x)).data, layer.to("cpu")(Tensor(x)).data)


def test_threads_compute_on_the_device(cupy, monkeypatch):
    monkeypatch.setattr("minidiff.engine.parallel.cores", lambda: 2)
    names, x = set(), cupy.ones(3)

    def f(i):
        names.add(threading.current_thread().name)
        return x * i
    assert [float(y.sum()) for y in parallel_map(f, [1, 2, 3])] == [3, 6, 9]
    assert all(name.startswith("minidiff") for name in names)
