"""Half precision widened: every number of both formats, and tensors that stay in it until they are used."""

import copy
from pathlib import Path

import numpy as np
import pytest

from minidiff.cli.main import main
from minidiff.engine import ops, parallel
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.pretrained import memory
from minidiff.pretrained.checkpoints import open_checkpoint
from minidiff.pretrained.half import Stored, finite, widened
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent / "checkpoints"
EVERY = np.arange(2 ** 16, dtype=np.uint16)


@pytest.mark.parametrize("piece", [1, 100, 2 ** 18])
def test_every_float16(piece, monkeypatch):
    """Signs, zeros and subnormal numbers too, to the bit, against NumPy's own conversion."""
    monkeypatch.setattr(parallel, "PIECE", piece)
    bits = EVERY[np.isfinite(EVERY.view(np.float16))]
    for part in (bits, bits[:-1], bits[:0], bits[:64].reshape(4, 2, 8)):
        found = widened(part, False)
        assert found.dtype == np.float32 and found.shape == part.shape
        assert np.array_equal(found.view(np.uint32), part.view(np.float16).astype(np.float32).view(np.uint32))


def test_every_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    found, wanted = widened(EVERY, True), EVERY.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("bfloat", [False, True])
def test_finite(bfloat):
    numbers = (EVERY.astype(np.uint32) << 16).view(np.float32) if bfloat else EVERY.view(np.float16)
    assert [finite(EVERY[i:i + 1], bfloat) for i in range(0, 2 ** 16, 7)] == np.isfinite(numbers[::7]).tolist()
    assert finite(EVERY[:8], bfloat) and not finite(EVERY, bfloat)


def test_a_stored_tensor_is_a_tensor():
    """It has the numbers, shape and dtype of the wide one, in every op; its data may be set; copies are equal."""
    a = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)
    wide, stored = Tensor(a.astype(np.float32)), Stored(a.view(np.uint16), False)
    assert (stored.shape, stored.dtype, stored.ndim, stored.size, len(stored)) == ((3, 4), np.float32, 2, 12, 3)
    assert np.array_equal(stored.data, wide.data) and stored.data is not stored.data
    x = Tensor(np.ones((2, 3), np.float32))
    assert np.array_equal(ops.matmul(x, stored).data, ops.matmul(x, wide).data)
    assert np.array_equal(copy.deepcopy(stored).data, wide.data)
    stored.data = np.zeros((2, 2), np.float32)
    assert stored.shape == (2, 2) and not stored.data.any() and not copy.deepcopy(stored).data.any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eps", "v", "sdxl", "inpaint"])
def test_low_memory_draws_the_same_picture(kind):
    """To the bit; and every matrix is stored in half precision."""
    plain, small = StableDiffusion.load(HERE / kind), StableDiffusion.load(HERE / kind, low_memory=True)
    parameters = [p for part in (small.unet, small.vae, *small.encoders) for p in part.parameters().values()]
    small.to("cpu")                                         # as the command does: they must not be widened by it
    assert all(isinstance(p, Stored) and p.wide is None for p in parameters)
    options = {"steps": 2, "seed": 3, "size": "48x40"}
    if kind == "inpaint":
        options |= {"image": np.zeros((40, 48, 3), np.float32), "mask": np.ones((40, 48), bool)}
        del options["size"]
    with no_grad():
        assert np.array_equal(plain.sample(["a thin seven"], **options), small.sample(["a thin seven"], **options))


@pytest.mark.slow
def test_the_command_and_the_estimate(tmp_path, monkeypatch, capsys):
    """Half of the bytes of the weights; other systems take no --low-memory."""
    words = ["sample", "a", "--model", str(HERE / "eps"), "--steps", "1", "--size", "48x40"]
    assert main([*words, "--low-memory", "-o", str(tmp_path / "low.png")]) == 0
    assert main([*words, "-o", str(tmp_path / "plain.png")]) == 0
    assert (tmp_path / "low.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    saved = open_checkpoint(HERE / "eps")
    for part in ("unet", "vae", "text_encoder"):
        low, wide = (saved.weights(part, np.float32, low_memory).bytes_in_memory() for low_memory in (True, False))
        assert 2 * low == wide
    plain = memory.estimate({p: saved.weights(p, np.float32) for p in ("unet", "vae")}, 8, 64, 64).weights
    monkeypatch.setattr(memory, "available", lambda: plain)
    assert main([*words, "--size", "8x8", "--low-memory", "-o", str(tmp_path / "low.png")]) == 0
    capsys.readouterr()
    assert main(["sample", "7", "--low-memory", "-o", str(tmp_path / "a.png")]) == 2
    assert "takes no --low-memory" in capsys.readouterr().err
