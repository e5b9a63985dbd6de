"""The UNet: sizes, gradients of the whole, and law 39 on batches, captions and initial values."""

import gc
import itertools
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from support.gradcheck import check_gradients, moved

from minidiff.engine.tensor import Tensor, gradients, no_grad
from minidiff.nn.unet import ResidualBlock, SpatialAttention, TextStates, UNet, UNetBlock, UNetConfig

TINY = UNetConfig(widths=(4, 8), attention=(False, True), heads=2, groups=2, embedding=6)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def unet(**changes) -> UNet:
    return moved(UNet(replace(TINY, **changes), np.random.default_rng(0)), by=0.2)


def text_states(B, M=5, D=3, seed=3) -> TextStates:
    mask = np.arange(M) < np.resize([3, 2, 4, 1], B)[:, None]
    return TextStates(Tensor(normal(B, M, D, seed=seed)), Tensor(normal(B, D, seed=seed + 1)), mask)


# ---- gradients -------------------------------------------------------------------------------------------


def test_gradients_of_a_whole_unet_with_text():
    """To the image, the caption's states, and every parameter by name, along random directions."""
    net, t = unet(text=3), np.array([7, 900])
    x, tokens, pooled = (Tensor(normal(*shape), True) for shape in [(2, 4, 8, 1), (2, 4, 3), (2, 3)])
    mask = np.array([[True, True, False, False], [True] * 4])
    check_gradients(lambda *_: net(x, t, TextStates(tokens, pooled, mask)), x, tokens, pooled,
                    *net.parameters().values(), directions=1)


@pytest.mark.parametrize("changes", [{"widths": (4,), "attention": (False,), "blocks": 2},
                                     {"widths": (4, 4), "attention": (False, False), "patch": 1, "channels": 3},
                                     {"widths": (4, 6, 4), "attention": (False, False, True)}])
def test_gradients_of_other_forms(changes):
    net = unet(**changes)
    x = Tensor(normal(1, net.config.multiple, 2 * net.config.multiple, net.config.channels), True)
    check_gradients(lambda *_: net(x, np.array([50])), x, *net.parameters().values(), directions=1)


def test_every_parameter_is_used():
    net = unet(text=3, blocks=2)
    net(Tensor(normal(2, 8, 8, 1)), np.array([1, 900]), text_states(2)).backward(normal(2, 8, 8, 1, seed=4))
    for name, p in net.parameters().items():
        assert p.grad is not None and p.grad.any(), name


def test_the_middle_block_counts_once_among_the_activations():
    """Its attention alone takes 16 heads of 1024 x 1024 here: once is allowed, and twice would not be."""
    config = UNetConfig(widths=(32,), attention=(False,), patch=1, heads=16)
    config.check_image(32, 32)
    # 3 blocks of 16 x 1444 x 32 numbers, and 16 heads of 1444^2
    with pytest.raises(ValueError, match="would take 35,580,160 numbers for an image"):
        config.check_image(38, 38)


def test_keys_and_values_that_are_known_change_nothing():
    """A sampler computes them once for all its steps; each layer must get its own.  The exact same products: exact."""
    net, x, t, states = unet(text=3, blocks=2), Tensor(normal(2, 8, 8, 1)), np.array([1, 900]), text_states(2)
    known = net.with_keys_values(states, net.keys_values(states.tokens))
    assert len(known.keys_values) > 1 and states.keys_values == {}
    np.testing.assert_array_equal(net(x, t, known).data, net(x, t, states).data)
    assert net.with_keys_values(states, []).keys_values == {}


def test_a_residual_block_is_its_equation():
    """y = x + conv(silu((1 + scale) norm(conv(silu(norm(x)))) + shift)), on one pixel: a kernel is its middle there."""
    block = moved(ResidualBlock(4, 4, 6, 2, np.random.default_rng(0)), by=0.2)
    x, emb = normal(3, 4), normal(3, 6, seed=1)
    p = {name: parameter.data for name, parameter in block.parameters().items()}

    def silu(x):
        return x / (1 + np.exp(-x))

    def x_hat(x):                                           # two groups of two channels
        x = x.reshape(3, 2, 2)
        return ((x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + 1e-5)).reshape(3, 4)
    h = silu(p["norm1.gamma"] * x_hat(x) + p["norm1.beta"]) @ p["conv1.w"][1, 1] + p["conv1.b"]
    scale, shift = np.split(emb @ p["modulation.w"] + p["modulation.b"], 2, axis=1)
    expected = x + silu((1 + scale) * x_hat(h) + shift) @ p["conv2.w"][1, 1] + p["conv2.b"]
    y = block(Tensor(x.reshape(3, 1, 1, 4)), Tensor(emb)).data.reshape(3, 4)
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-11)      # the norm magnifies rounding, by 1/eps at most


def test_skips_carry_the_image_past_the_low_resolutions():
    """With the output of the lower levels set to 0, the output still depends on the image."""
    net, t = unet(), np.array([7])
    for p in net.upsample[0].parameters().values():
        p.data[...] = 0
    x = normal(1, 8, 8, 1)
    assert np.abs(net(Tensor(x), t).data - net(Tensor(x + 0.1), t).data).max() > 1e-3


def test_no_cycle_is_left_for_the_garbage_collector():
    """After a whole training step, with or without its backward pass, all memory is freed at once."""
    net, x, t, text = unet(text=3), Tensor(normal(2, 8, 8, 1)), np.array([7, 900]), text_states(2)
    net(x, t, text)                                         # what is made once is made
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            gradients(net(x, t, text).mean(), list(net.parameters().values()))
            net(x, t, text)
        assert gc.collect() == 0
    finally:
        gc.enable()


# ---- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch, levels", [*itertools.product([1, 2, 4], [1, 2, 3, 4])])
def test_any_size_that_its_levels_can_halve(patch, levels):
    """A valid size gives an output of the same size; one pixel more or less is refused."""
    net = unet(patch=patch, widths=(4, 2, 4, 6)[:levels], attention=(False,) * levels, channels=2)
    m = net.config.multiple
    assert m == patch * 2 ** (levels - 1)
    t = np.array([3])
    for H, W in [(m, m), (2 * m, m), (m, 3 * m)]:
        assert net(Tensor(normal(1, H, W, 2)), t).shape == (1, H, W, 2)
    for H, W in [(m + 1, m), (m, m - 1), (2 * m + 1, 3 * m)]:
        if H % m or W % m:
            with pytest.raises(ValueError, match=f"x must be .* H and W multiples of {m} ") as error:
                net(Tensor(normal(1, H, W, 2)), t)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("H, W", [(8, 8), (12, 20), (28, 28)])
def test_sizes_of_the_default_shape_in_float32(H, W):
    net = UNet(replace(UNetConfig(), widths=(8, 16), groups=4, embedding=16), np.random.default_rng(0))
    y = net(Tensor(normal(2, H, W, 1).astype(np.float32)), np.array([0, 999]))
    assert y.shape == (2, H, W, 1) and y.dtype == np.float32


# ---- law 39 ----------------------------------------------------------------------------------------------


@pytest.mark.law(39, "an untrained UNet answers 0", source="its last layer begins at 0", tolerance="exact")
def test_the_untrained_output_is_zero():
    net = UNet(replace(TINY, text=3), np.random.default_rng(0)).astype(np.float64)
    assert not net(Tensor(normal(2, 8, 8, 1)), np.array([1, 2]), text_states(2)).data.any()


@pytest.mark.law(
    39, "residual blocks, and attention to pixels and words, begin as the identity",
    source="their input", tolerance="exact")
def test_blocks_start_as_the_identity():
    """Law 39: a residual block, attention to pixels and words, and the two of them together."""
    config, rng = replace(TINY, text=3), np.random.default_rng(0)
    x, emb, text = normal(2, 4, 4, 8).astype(np.float32), Tensor(normal(2, 6).astype(np.float32)), text_states(2)
    text = TextStates(Tensor(text.tokens.data.astype(np.float32)), text.pooled, text.mask)
    assert np.array_equal(ResidualBlock(8, 8, 6, 2, rng)(Tensor(x), emb).data, x)
    assert np.array_equal(SpatialAttention(8, config, rng)(Tensor(x), text).data, x)
    assert np.array_equal(UNetBlock(config, 8, 8, True, rng)(Tensor(x), emb, text).data, x)
    assert not np.array_equal(moved(ResidualBlock(8, 8, 6, 2, rng), by=0.2)(Tensor(x.astype(float)),
                                                                    Tensor(emb.data.astype(float))).data, x)


@pytest.mark.law(
    39, "permuting a batch permutes the UNet's outputs",
    source="each image alone, in another order, or among others", tolerance="1e-10: sums in another order")
def test_permuting_the_batch_permutes_the_outputs():
    """Law 39, and law 28: each image alone, in another order, or among others."""
    net, x, t, text = unet(text=3), normal(4, 8, 12, 1), np.array([0, 999, 3, 500]), text_states(4)

    def run(rows):
        part = TextStates(Tensor(text.tokens.data[rows]), Tensor(text.pooled.data[rows]), text.mask[rows])
        with no_grad():
            return net(Tensor(x[rows]), t[rows], part).data
    together = run([0, 1, 2, 3])
    for rows in ([3, 1, 0, 2], [2], [1, 1]):
        np.testing.assert_allclose(run(rows), together[rows], rtol=1e-10, atol=1e-12)


@pytest.mark.law(
    39, "a picture depends on its caption, and not on the caption's padding",
    source="other padding, more of it, other words",
    tolerance="exact; 1e-10 with more padding, for sums of another length")
def test_what_is_masked_in_a_caption_has_no_influence_and_what_is_not_has():
    """Law 39: other padding, or more of it, gives the same picture; another word, time or pooled state does not."""
    net, x, t, text = unet(text=3), Tensor(normal(2, 8, 8, 1)), np.array([10, 700]), text_states(2)
    tokens, pooled, mask = text.tokens.data, text.pooled.data, text.mask
    y = net(x, t, text).data

    def changed(tokens=tokens, pooled=pooled, mask=mask, t=t):
        return net(x, t, TextStates(Tensor(tokens), Tensor(pooled), mask)).data
    padding = np.where(mask[..., None], tokens, 50.0)
    assert np.array_equal(changed(padding), y)
    longer = changed(np.concatenate([tokens, normal(2, 4, 3)], axis=1), mask=np.pad(mask, ((0, 0), (0, 4))))
    np.testing.assert_allclose(longer, y, rtol=1e-10, atol=1e-12)
    words = np.where(mask[..., None], tokens[:, ::-1] + 1, tokens)
    for other in (changed(words), changed(pooled=pooled + 1), changed(mask=~mask), changed(t=t + 1)):
        assert np.abs(other - y).max() > 1e-6


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("x, t, text, message", [
    ((2, 8, 8), (2,), None, r"x must be \(B, H, W, 1\)"), ((2, 8, 8, 3), (2,), None, r"x must be \(B, H, W, 1\)"),
    ((2, 8, 8, 1), (3,), None, r"t must have one time for each image, shape \(2,\), not \(3,\)"),
    ((2, 8, 8, 1), (2, 1), None, "t must have one time for each image"),
    ((2, 8, 8, 1), (2,), text_states(2), r"made without captions \(text=0\), and was called with them"),
])
def test_inputs_of_a_wrong_shape_are_refused(x, t, text, message):
    with pytest.raises(ValueError, match=message):
        unet()(Tensor(np.zeros(x)), np.zeros(t, int), text)


def test_a_unet_with_captions_requires_them():
    with pytest.raises(ValueError, match=r"made with captions \(text=3\), and was called without them"):
        unet(text=3)(Tensor(np.zeros((1, 8, 8, 1))), np.zeros(1, int))


@pytest.mark.parametrize("changes, message", [
    ({"attention": (True,)}, "attention takes one entry for each of the 2 widths"),
    ({"widths": (), "attention": ()}, "must be at least 1"), ({"blocks": 0}, "must be at least 1"),
    ({"widths": (4, 0)}, "must be at least 1"), ({"patch": 0}, "must be at least 1"),
])
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_widths_must_divide_into_groups_and_heads():
    for changes, message in [({"groups": 3}, "4 channels do not divide into 3 groups"),
                             ({"heads": 3}, "8 channels do not divide into 3 heads")]:
        with pytest.raises(ValueError, match=message):
            UNet(replace(TINY, **changes), np.random.default_rng(0))


def test_the_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        TINY.patch = 4


# ---- which blocks attend ---------------------------------------------------------------------------------

def test_blocks_attend_at_the_levels_that_say_so_and_in_the_middle():
    net = unet(widths=(4, 8, 8), attention=(True, False, True), blocks=2)

    def attends(blocks):
        return [block.attention is not None for block in blocks]
    assert attends(net.down_blocks) == [True, True, False, False, True, True]
    assert attends(net.up_blocks) == [True, True, False, False, True, True]
    assert net.middle.attention is not None
    assert unet(attention=(False, False)).middle.attention is not None
