"""A system on a second device: its loss, its samples and its likelihood are the same there, to float32's rounding."""

import numpy as np
import pytest
from support import tiny
from support.fake_cupy import assert_same, install, one_sentence
from support.second_device import SMALL, run
from support.tiny import digits, trained_a_little

from minidiff.engine.backend import to_device
from minidiff.engine.cuda.random import DeviceSampleStreams
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.evaluation import likelihood as bits
from minidiff.nn.unet import TextStates
from minidiff.systems.text_to_image import TextToImage


@pytest.fixture
def cupy(monkeypatch):
    return install(monkeypatch)


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


def test_loss_and_its_gradients(cupy):
    """Shard by shard in threads on the host, the whole batch at once on the device; the loss stays there."""
    x_0, ids, mask, t, eps = tiny.trainer(batch=6).batch()
    results = []
    for device in ("cuda", "cpu"):
        model = trained_a_little().to(device)
        assert model.device == device
        arrays = to_device(x_0, device), ids, mask, t, to_device(eps, device)
        results.append(parallel_gradients(lambda shard, m=model, arrays=arrays: m.loss(*(a[shard] for a in arrays)),
                                          list(model.parameters().values()), 6))
    (loss, grads), (host_loss, host_grads) = results
    assert isinstance(host_loss, float) and isinstance(loss, cupy.ndarray)
    assert loss.get() == pytest.approx(host_loss, rel=1e-5)
    for found, expected in zip(grads, host_grads, strict=True):
        assert_same(found, expected)


def test_without_streams_a_device_makes_its_own_noise(cupy):
    """It depends on the seed and a sample's place only, and differs from the host's."""
    model = TextToImage(SMALL, tiny.tokenizer(), np.random.default_rng(0))
    (host, *_) = model.trajectory(["3"], steps=1)
    model.to("cuda")
    (three, *_), (one, *_) = (model.trajectory(["3"] * n, steps=1, seed=5) for n in (3, 1))
    (ours, *_) = model.trajectory(["3"], steps=1, streams=SampleStreams(0, 1))
    assert isinstance(three.x_t, cupy.ndarray) and np.array_equal(three.x_t[:1].get(), one.x_t.get())
    assert np.array_equal(DeviceSampleStreams(5, 1).normal((28, 28, 1)).get(), one.x_t.get())
    assert np.array_equal(ours.x_t.get(), host.x_t)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm"])
def test_samples(cupy, sampler):
    model, captions = trained_a_little(), ["a bold seven", "", "3"]
    expected = model.sample(captions, steps=3, sampler=sampler, streams=SampleStreams(1, 3))
    states = list(model.to("cuda").trajectory(captions, steps=3, sampler=sampler, streams=SampleStreams(1, 3)))
    for state in states:
        assert isinstance(state.x_t, cupy.ndarray) and state.x_t.dtype == np.float32
    found = model.sample(captions, steps=3, sampler=sampler, streams=SampleStreams(1, 3))
    assert isinstance(found, np.ndarray)
    # three steps of float32 through a network whose output changes by about as much as its input
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


@pytest.mark.slow
def test_bits_per_dim(cupy, monkeypatch):
    monkeypatch.setattr(bits, "TERMS", 2)
    monkeypatch.setattr(bits, "FLOW_STEPS", 2)
    host, there = (bits.likelihood(trained_a_little().to(device), digits(4), count=2) for device in ("cpu", "cuda"))
    assert there.bound == pytest.approx(host.bound, rel=1e-4) and there.flow == pytest.approx(host.flow, rel=1e-4)
