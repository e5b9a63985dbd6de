"""Pretrained networks, tokenizers and schedulers give what diffusers and transformers compute.

checkpoints/ holds tiny random checkpoints and their golden outputs, made by tests/parity/make_stable_diffusion.py with
diffusers 0.42.1 and transformers 5.24.0 in float32.  Arrays there are in PyTorch's layout, (B, C, H, W).

golden64.npz beside them holds every 7th number of the networks' outputs in float64 (tests/parity/make_float64.py).
golden.npz is 4e-6 away from ours in float64, and what is off is theirs alone: float32, in which diffusers also computes
the waves of the time and of SDXL's sizes in a float64 network.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.pretrained.config import Config
from minidiff.pretrained.scheduler_config import SchedulerConfig
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent / "checkpoints"
KINDS = ("eps", "v", "sdxl", "inpaint")
PROMPTS = ["a red cube on a blue sphere", "", "It's naïve — 3.14 日本 \U0001f642!", "a thin seven " * 40]
SCALE, STEPS = 5.0, 5
CLOSE = {np.float32: 1e-4, np.float64: 1e-11}               # of the largest value


@cache
def model(kind: str, dtype=np.float32) -> StableDiffusion:
    return StableDiffusion.load(HERE / kind, dtype=dtype)


@cache
def golden(kind: str):
    return np.load(HERE / kind / "golden.npz")


@cache
def golden64(kind: str):
    return np.load(HERE / kind / "golden64.npz")


def ours(a: np.ndarray, dtype=np.float32) -> np.ndarray:
    return np.ascontiguousarray(a.transpose(0, 2, 3, 1).astype(dtype))


def theirs(a: np.ndarray) -> np.ndarray:
    return a.transpose(0, 3, 1, 2)


def assert_golden(found, kind: str, name: str, dtype) -> None:
    """Near golden.npz's array in float32, and near golden64.npz's part of it in float64."""
    assert found.shape == golden(kind)[name].shape
    if dtype == np.float64:
        assert_close(found.ravel()[::7], golden64(kind)[name], dtype)
    else:
        assert_close(found, golden(kind)[name], dtype)


def assert_close(found, expected, dtype) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= CLOSE[dtype] * np.abs(expected).max()


def text_states(kind: str, rows, dtype=np.float32) -> tuple:
    """The golden text states of some prompts as the network takes them, without our text encoder."""
    g, m = golden(kind), model(kind, dtype)
    if m.unet.extra is None:
        return (g["last"][rows].astype(dtype),)
    tau = np.concatenate([g["penultimate"], g["penultimate_2"]], axis=-1)[rows]
    return tau.astype(dtype), g["embedding_2"][rows].astype(dtype), np.tile([[48.0, 64, 0, 0, 48, 64]], (len(rows), 1))


def own_text_states(kind: str, rows) -> tuple:
    """The same in float64, by our text encoder: golden.npz has them in float32."""
    with no_grad():
        states = [encoder(golden(kind)["ids"][rows]) for encoder in model(kind, np.float64).encoders]
    if kind != "sdxl":
        return (states[0].last.data,)
    tau = np.concatenate([state.penultimate.data for state in states], axis=-1)
    return tau, states[1].embedding.data, np.tile([[48.0, 64, 0, 0, 48, 64]], (len(rows), 1))


def unet(kind: str, z, t, text, dtype):
    tau, *rest = text
    with no_grad():
        return theirs(model(kind, dtype).unet(Tensor(z), t, Tensor(tau), *(
            Tensor(a) if i == 0 else a for i, a in enumerate(rest))).data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_pads_and_truncates(kind):
    ids, lost = model(kind).tokenizers[0].ids([*PROMPTS, "blurry"])
    assert np.array_equal(ids, golden(kind)["ids"])
    assert lost[:3] == [0, 0, 0] and lost[3] > 0


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders(kind, dtype):
    g = golden(kind)
    with no_grad():
        states = [encoder(g["ids"]) for encoder in model(kind, dtype).encoders]
    assert_golden(states[0].last.data, kind, "last", dtype)
    assert_golden(states[0].penultimate.data, kind, "penultimate", dtype)
    assert_golden(states[0].pooled.data, kind, "pooled", dtype)
    if kind == "sdxl":
        assert_golden(states[1].penultimate.data, kind, "penultimate_2", dtype)
        assert_golden(states[1].embedding.data, kind, "embedding_2", dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", KINDS)
def test_unet_on_an_odd_size(kind, dtype):
    """6 x 5 latents: the lower level has 3 x 3, of which 5 columns are made again."""
    g = golden(kind)
    states = text_states(kind, [0, 2], dtype) if dtype == np.float32 else own_text_states(kind, [0, 2])
    found = unet(kind, ours(g["z"], dtype), g["t"], states, dtype)
    assert_golden(found, kind, "unet", dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", KINDS)
def test_autoencoder(kind, dtype):
    g, vae = golden(kind), model(kind, dtype).vae
    with no_grad():
        mean, log_variance = vae.encode(Tensor(ours(g["image"], dtype)))
        decoded = vae.decode(Tensor(ours(g["z"][:1, :4], dtype) / 0.18215))
    assert_golden(theirs(mean.data), kind, "mean", dtype)
    assert_golden(theirs(log_variance.data), kind, "logvar", dtype)
    assert_golden(theirs(decoded.data), kind, "decoded", dtype)


@pytest.mark.parametrize("kind, name", [(kind, path.stem) for kind in KINDS
                                        for path in sorted((HERE / kind / "schedulers").glob("*.json"))])
def test_sampling_by_each_scheduler_configuration(kind, name):
    g = golden(kind)
    scheduler = SchedulerConfig(Config.load(HERE / kind / "schedulers" / f"{name}.json"))
    plan = scheduler.plan(STEPS)
    seen = ours(g["seen"]) if kind == "inpaint" else None

    def network(z_t, rows, cond):
        z = z_t if seen is None else np.concatenate([z_t, np.repeat(seen, len(z_t), axis=0)], axis=-1)
        return ours(unet(kind, z, plan.t[rows], cond, np.float32))
    denoiser = ClassifierFree(NetworkDenoiser(plan.schedule, scheduler.predicts, network), SCALE,
                              text_states(kind, [4, 4]))
    z_T = np.float32(plan.first_std) * ours(g["noise"])
    *_, state = plan.run(denoiser, z_T, text_states(kind, [0, 2]))
    assert_close(theirs(state.x_t), g[f"out_{name}"], np.float32)


def test_the_comparison_sees_a_part_that_is_left_out(monkeypatch):
    m = StableDiffusion.load(HERE / "eps")
    m.unet.middle_attention.blocks[0].cross_attention.out.b.data[:] = 0
    g = golden("eps")
    with no_grad():
        found = theirs(m.unet(Tensor(ours(g["z"])), g["t"], Tensor(text_states("eps", [0, 2])[0])).data)
    assert np.abs(found - g["unet"]).max() > 1e-3 * np.abs(g["unet"]).max()
