"""The benchmarks' rivals: they compute, and learn, what minidiff does, so that the times compare the same work."""

import numpy as np
import pytest
from small_cases import SMALL, host_inputs, name_of

torch = pytest.importorskip("torch", reason="the rivals are PyTorch's: pip install torch")

import train_step  # noqa: E402
import train_step_cuda as step  # noqa: E402

import kernels  # noqa: E402
from minidiff.data import mnist  # noqa: E402
from minidiff.systems.text_to_image import TextToImage  # noqa: E402
from minidiff.train import CaptionedDigits  # noqa: E402


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_rivals_compute_the_same(case, monkeypatch):
    inputs = host_inputs(case, monkeypatch)
    for who in case.rivals if case.family != "attention" else ("math",):    # the others' need a GPU
        found = case.in_our_layout(case.theirs(who, *inputs)())
        assert all(isinstance(a, torch.Tensor) for a in found)
        found = tuple(a.detach().numpy() for a in found)
        found = tuple(map(case.seen, found)) if hasattr(case, "seen") else found
        assert kernels.relative_error(found, case.expected(*inputs)) < 1e-12


@pytest.mark.slow
def test_the_contestants_learn_the_same():
    """On the CPU: the same losses of one batch, and batches of their own from the same images and captions."""
    state, fixed = train_step.same_start(4)
    digits = mnist.load(download=False, quiet=True)
    data = CaptionedDigits.of(mnist.Images(digits.images[:200], digits.labels[:200], ""))
    shared = state, data, TextToImage.load().tokenizer, 4
    us = step.Minidiff(*shared, "float32", "cpu")
    us.repeat(fixed)
    losses = [us.step() for _ in range(3)]
    us.repeat(None)
    for mode, last, many in (("float32", False, 3), ("float32", True, 3), ("float16", True, 1)):
        them = step.PyTorch(*shared, mode, "cpu", channels_last=last)
        them.repeat(fixed)
        np.testing.assert_allclose([float(them.step()) for _ in range(many)], losses[:many], rtol=step.AGREEMENT[mode])
        them.repeat(None)
        us.trainer.n = them.feeder.n + 1                    # the batch that comes next there
        ours, theirs = us.trainer.batch(), them._draw()
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert np.array_equal(a, b.numpy())
        assert ours[4].shape == tuple(theirs[4].shape)      # the noise is each one's own
        assert np.isfinite(float(them.step()))
