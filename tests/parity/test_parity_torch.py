"""Every op, the optimiser and the whole model against PyTorch in float64: results and all gradients.

The gradient checks elsewhere compare an op's gradient with its own forward.  These tests compare the forward with
PyTorch's op of that name.  Only tests use PyTorch: without it they are skipped.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PyTorch needs PyTorch: pip install torch")
F = torch.nn.functional
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch_model  # noqa: E402

from minidiff.engine import conv, norm, ops  # noqa: E402
from minidiff.engine.attention import scaled_dot_product_attention  # noqa: E402
from minidiff.engine.tensor import Tensor, gradients  # noqa: E402
from minidiff.nn import optim  # noqa: E402
from minidiff.nn.unet import UNetConfig  # noqa: E402
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig  # noqa: E402
from minidiff.text.encoder import TextEncoderConfig  # noqa: E402
from minidiff.text.tokenizer import Tokenizer  # noqa: E402

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def normal(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def agree(ours, theirs, *arrays):
    """ours(*Tensors) equals theirs(*torch tensors), and so do the pullbacks of one random cotangent."""
    x = [Tensor(a.copy(), requires_grad=True) for a in arrays]
    x_torch = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, y_torch = ours(*x), theirs(*x_torch)
    assert y.shape == tuple(y_torch.shape)
    np.testing.assert_allclose(y.data, y_torch.detach().numpy(), **TOLERANCE)
    (dy,) = normal(y.shape, seed=1)
    dx_torch = torch.autograd.grad(y_torch, x_torch, torch.tensor(dy))
    for i, (dx, expected) in enumerate(zip(gradients(y, x, dy), dx_torch, strict=True)):
        np.testing.assert_allclose(dx, expected.numpy(), **TOLERANCE, err_msg=f"gradient of argument {i}")


def first(x):
    """(B, H, W, C) -> (B, C, H, W)"""
    return x.permute(0, 3, 1, 2)


def last(x):
    """(B, C, H, W) -> (B, H, W, C)"""
    return x.permute(0, 2, 3, 1)


# --- convolution ------------------------------------------------------------------------------------------

# few pixels take the plain form of convolution, many at stride 1 the form by shifts, many channels Winograd's
SIZES = [(5, 7), (1, 1), (11, 13), (14, 14)]
KERNELS = [(1, 1, 0), (3, 1, 1), (3, 1, 0), (3, 1, 2), (3, 2, 1), (5, 1, 2), (2, 2, 0), (1, 2, 0), (5, 3, 1)]
CASES = [(size, k, s, p) for size in SIZES for k, s, p in KERNELS
         if min(size) + 2 * p >= k and (min(size) - 1) * s + k - 2 * p >= 1]


@pytest.mark.parametrize("size, kernel, stride, padding", CASES)
def test_conv2d(size, kernel, stride, padding):
    agree(lambda x, w, b: conv.conv2d(x, w, b, stride, padding),
          lambda x, w, b: last(F.conv2d(first(x), w.permute(3, 2, 0, 1), b, stride, padding)),
          *normal((3, *size, 4), (kernel, kernel, 4, 5), (5,)))


@pytest.mark.parametrize("size", [(5, 7), (14, 14), (11, 13)], ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_conv2d_of_many_channels(size, padding):
    agree(lambda x, w, b: conv.conv2d(x, w, b, 1, padding),
          lambda x, w, b: last(F.conv2d(first(x), w.permute(3, 2, 0, 1), b, 1, padding)),
          *normal((2, *size, 66), (3, 3, 66, 65), (65,)))


@pytest.mark.parametrize("size, kernel, stride, padding", CASES)
def test_conv_transpose2d(size, kernel, stride, padding):
    # w is (kh, kw, C_out, C_in) for the transposed one, whose input has conv2d's output channels
    agree(lambda x, w, b: conv.conv_transpose2d(x, w, b, stride, padding),
          lambda x, w, b: last(F.conv_transpose2d(first(x), w.permute(3, 2, 0, 1), b, stride, padding)),
          *normal((3, *size, 5), (kernel, kernel, 4, 5), (4,)))


@pytest.mark.parametrize("kernel", [(3, 1), (1, 3), (2, 5)], ids=str)
def test_conv2d_of_an_oblong_kernel_without_bias(kernel):
    agree(lambda x, w: conv.conv2d(x, w, None, 1, 1),
          lambda x, w: last(F.conv2d(first(x), w.permute(3, 2, 0, 1), None, 1, 1)),
          *normal((2, 12, 11, 3), (*kernel, 3, 4)))


def test_resolution():
    x = normal((2, 6, 4, 8))
    agree(lambda x: conv.upsample_nearest(x, 3), lambda x: last(F.interpolate(first(x), scale_factor=3)), *x)
    agree(conv.average_pool, lambda x: last(F.avg_pool2d(first(x), 2)), *x)
    # PyTorch folds a square into channels as (C, f, f), minidiff as (f, f, C)
    agree(conv.space_to_depth, lambda x: last(swapped(F.pixel_unshuffle(first(x), 2), 8, 4)), *x)
    agree(conv.depth_to_space, lambda x: last(F.pixel_shuffle(swapped(first(x), 4, 2), 2)), *x)


def swapped(x, m, n):
    """Channels in the order (m, n), put in the order (n, m)."""
    return x.unflatten(1, (m, n)).transpose(1, 2).flatten(1, 2)


# --- norms, attention -------------------------------------------------------------------------------------

@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm(groups):
    agree(lambda x, gamma, beta: norm.group_norm(x, groups, gamma, beta),
          lambda x, gamma, beta: last(F.group_norm(first(x), groups, gamma, beta)),
          *normal((3, 4, 5, 6), (6,), (6,)))


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_adaptive_group_norm(groups):
    def theirs(x, gamma, beta):
        return gamma[:, None, None] * last(F.group_norm(first(x), groups)) + beta[:, None, None]

    agree(lambda x, gamma, beta: norm.group_norm(x, groups, gamma, beta), theirs,
          *normal((3, 4, 5, 6), (3, 6), (3, 6)))


def test_group_norm_of_tokens():
    agree(lambda x, gamma, beta: norm.group_norm(x, 2, gamma, beta),
          lambda x, gamma, beta: F.group_norm(x.transpose(1, 2), 2, gamma, beta).transpose(1, 2),
          *normal((3, 7, 6), (6,), (6,)))


def test_layer_norm():
    agree(norm.layer_norm, lambda x, gamma, beta: F.layer_norm(x, (6,), gamma, beta),
          *normal((3, 4, 6), (6,), (6,)))


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 1, 7), (2, 1, 5, 7), (5, 7)], ids=str)
def test_attention(mask_shape):
    mask = mask_torch = None
    if mask_shape:
        mask = np.random.default_rng(2).random(mask_shape) < 0.5
        mask[..., 0] = True                                 # every query attends to at least one key
        mask_torch = torch.from_numpy(mask)
    agree(lambda q, k, v: scaled_dot_product_attention(q, k, v, mask),
          lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask_torch),
          *normal((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)))


# --- elementary ops ---------------------------------------------------------------------------------------

ONE = {
    "exp": (ops.exp, torch.exp), "tanh": (ops.tanh, torch.tanh), "sigmoid": (ops.sigmoid, torch.sigmoid),
    "relu": (ops.relu, torch.relu), "silu": (ops.silu, F.silu),
    "gelu": (ops.gelu, lambda x: F.gelu(x, approximate="tanh")), "abs": (ops.absolute, torch.abs),
    "log": (lambda x: ops.log(x * x + 1), lambda x: torch.log(x * x + 1)),
    "sqrt": (lambda x: ops.sqrt(x * x + 1), lambda x: torch.sqrt(x * x + 1)),
    "power": (lambda x: x**3, lambda x: x**3),
    "clip": (lambda x: ops.clip(x, -1, 0.5), lambda x: x.clamp(-1, 0.5)),
    "softmax": (ops.softmax, lambda x: x.softmax(-1)),
    "softmax of axis 1": (lambda x: ops.softmax(x, 1), lambda x: x.softmax(1)),
    "log_softmax": (ops.log_softmax, lambda x: x.log_softmax(-1)),
    "sum": (ops.sum, torch.sum), "sum of axes": (lambda x: ops.sum(x, (0, 2)), lambda x: x.sum((0, 2))),
    "mean": (ops.mean, torch.mean),
    "mean of an axis": (lambda x: ops.mean(x, 1, keepdims=True), lambda x: x.mean(1, keepdim=True)),
    "max": (lambda x: ops.maximum_of(x, 1), lambda x: x.amax(1)),
    "reshape": (lambda x: x.reshape(5, 12), lambda x: x.reshape(5, 12)),
    "transpose": (lambda x: x.transpose(2, 0, 1), lambda x: x.permute(2, 0, 1)),
    "slices": (lambda x: x[1:, ::2, None, -1], lambda x: x[1:, ::2, None, -1]),
    "repeated index": (lambda x: x[:, [0, 0, 2]], lambda x: x[:, [0, 0, 2]]),
}


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_tensor(name):
    for scale in (1.0, 30.0) if name not in ("exp", "power") else (1.0,):   # also far from 0, where tails saturate
        (x,) = normal((3, 4, 5))
        agree(*ONE[name], scale * x)


def test_functions_of_two_tensors():
    x, y = normal((3, 4, 5), (4, 1))
    for f in (lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: y / (x * x + 1)):
        agree(f, f, x, y)
    agree(lambda x, y: ops.where(x.data > 0, x, y), lambda x, y: torch.where(x > 0, x, y), x, y)
    agree(lambda x, y: ops.concat([x, y], axis=0), lambda x, y: torch.cat([x, y]), *normal((3, 4), (2, 4)))
    for shapes in [((3, 4, 5), (5, 6)), ((2, 3, 4), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2))]:
        agree(lambda x, y: x @ y, lambda x, y: x @ y, *normal(*shapes))


def test_embedding_and_cross_entropy():
    ids = np.random.default_rng(3).integers(0, 6, (4, 5))
    agree(lambda table: ops.embedding(table, ids), lambda table: F.embedding(torch.from_numpy(ids), table),
          *normal((6, 3)))
    for scale in (1, 100):
        agree(lambda x: ops.cross_entropy(x, ids[0]), lambda x: F.cross_entropy(x, torch.from_numpy(ids[0])),
              scale * normal((5, 6))[0])


# --- optimiser --------------------------------------------------------------------------------------------

def test_adamw_and_clipping():
    """30 steps with random gradients, some of them long enough to be clipped."""
    arrays, rng = normal((4, 5), (5,), (3, 3, 2, 2)), np.random.default_rng(4)
    config = optim.AdamWConfig(b1=0.8, b2=0.95, eps=1e-6, decay=0.1)
    ours = {str(i): Tensor(a.copy(), requires_grad=True) for i, a in enumerate(arrays)}
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    adamw = optim.AdamW(ours, config)
    adamw_torch = torch.optim.AdamW([
        {"params": [p for p in theirs if p.ndim > 1], "weight_decay": config.decay},
        {"params": [p for p in theirs if p.ndim <= 1], "weight_decay": 0.0},
    ], betas=(config.b1, config.b2), eps=config.eps)
    for n in range(30):
        lr = 0.01 * (n + 1) / 30
        grads = [rng.standard_normal(a.shape) * 10.0 ** rng.uniform(-3, 1) for a in arrays]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = torch.tensor(g)
        for group in adamw_torch.param_groups:
            group["lr"] = lr
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert optim.clip_by_norm(grads, 1.0) == pytest.approx(expected.item(), rel=1e-12)
        for p, g in zip(theirs, grads, strict=True):        # PyTorch clips to max_norm/(norm + 1e-6)
            np.testing.assert_allclose(g, p.grad.numpy(), rtol=2e-6)
            p.grad = torch.tensor(g)
        adamw.step(grads, lr)
        adamw_torch.step()
    for p, expected in zip(ours.values(), theirs, strict=True):
        np.testing.assert_allclose(p.data, expected.detach().numpy(), **TOLERANCE)


# --- the whole model --------------------------------------------------------------------------------------

MODELS = {
    "the default": (TextToImageConfig(), 28, 28),
    # colours and an image that is not square reveal swapped axes; two blocks a level
    "colour, three levels": (TextToImageConfig(shape=(24, 32, 3),
        unet=UNetConfig(channels=3, patch=2, widths=(8, 12, 16), blocks=2, attention=(False, True, True),
                        heads=2, groups=4, embedding=20, text=8),
        text=TextEncoderConfig(vocab=270, length=9, width=8, layers=2, heads=2)), 24, 32),
    "one level, no patch, v": (TextToImageConfig(shape=(28, 28, 3), predicts="v",
        unet=UNetConfig(channels=3, patch=1, widths=(8,), blocks=1, attention=(True,), heads=4, groups=2,
                        embedding=16, text=6),
        text=TextEncoderConfig(vocab=270, length=9, width=6, layers=1, heads=3)), 5, 11),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_and_all_its_gradients(name):
    config, H, W = MODELS[name]
    rng, B = np.random.default_rng(5), 3
    model = TextToImage(config, Tokenizer(), rng).astype(np.float64)
    for p in model.parameters().values():                   # at initialisation half the model is multiplied by 0
        p.data = p.data + 0.1 * rng.standard_normal(p.shape)
    rival = torch_model.TextToImage(config).double()
    torch_model.load(rival, model.state_dict())

    x_0, eps = rng.standard_normal((2, B, H, W, config.unet.channels))
    t = rng.integers(0, config.T, B)
    mask = np.arange(8) < np.array([[2], [8], [5]])
    ids = np.where(mask, rng.integers(0, config.text.vocab, mask.shape), 0)
    loss = model.loss(x_0, ids, mask, t, eps)
    loss_torch = rival(*(first(torch.from_numpy(x_0)), torch.from_numpy(ids), torch.from_numpy(mask),
                         torch.from_numpy(t), first(torch.from_numpy(eps))))
    assert loss.item() == pytest.approx(loss_torch.item(), rel=1e-10)

    loss_torch.backward()
    parameters = model.parameters()
    expected = torch_model.in_minidiff_layout(rival, of=lambda p: p.grad)
    assert expected.keys() == parameters.keys()
    for path, dp in zip(parameters, gradients(loss, list(parameters.values())), strict=True):
        assert np.abs(dp).max() > 0, path
        np.testing.assert_allclose(dp, expected[path].reshape(dp.shape).numpy(), rtol=1e-7,
                                   atol=1e-10 * np.abs(dp).max() + 1e-13, err_msg=path)
