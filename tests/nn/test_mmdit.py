"""The multimodal diffusion transformer: its block as its equations, gradients, adaLN-Zero, permutations and padding."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import special
from support.gradcheck import check_gradients, moved

from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.mmdit import (
    JointBlock,
    LastBlock,
    MMDiT,
    MMDiTConfig,
    Stream,
    grid_embedding,
    join_heads,
    modulated,
    parts,
    split_heads,
)
from minidiff.nn.unet import TextStates

TINY = MMDiTConfig(channels=2, patch=2, width=8, blocks=3, heads=2, text=3)
U = np.array([0.3, 0.9])
MASK = np.array([[True, True, False, False], [True] * 4])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def network(**changes) -> MMDiT:
    return moved(MMDiT(replace(TINY, **changes), np.random.default_rng(0)))


def states(tokens=None, mask=MASK, B=2) -> TextStates:
    tokens = normal(B, mask.shape[1], 3, seed=1) if tokens is None else tokens
    return TextStates(Tensor(tokens), Tensor(normal(B, 3, seed=2)), mask)


def every(N: int, mask=MASK):
    """The mask of N patches and the words."""
    return np.concatenate([np.ones((len(mask), N), bool), mask], axis=1)[:, None, None]


# ---- a block is its equations ----------------------------------------------------------------------------------

def by_hand(stream: Stream, x, y, emb):
    """What a stream gives to the attention (q, k, v), or with y = what it read, the tokens after it."""
    p = {name: parameter.data for name, parameter in stream.parameters().items()}
    shift, scale, gate, shift2, scale2, gate2 = np.split(emb @ p["modulation.w"] + p["modulation.b"], 6, axis=-1)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    if y is None:
        return np.split(((1 + scale) * norm(x) + shift) @ p["qkv.w"] + p["qkv.b"], 3, axis=-1)
    x = x + gate * (y @ p["out.w"] + p["out.b"])
    h = ((1 + scale2) * norm(x) + shift2) @ p["mlp_in.w"] + p["mlp_in.b"]
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return x + gate2 * (gelu @ p["mlp_out.w"] + p["mlp_out.b"])


def test_a_joint_block_is_its_equations():
    """One sample, each head by itself: softmax([q_x; q_c] [k_x; k_c]^T / sqrt(d)) [v_x; v_c]."""
    block, x, c, emb = moved(JointBlock(8, 2, np.random.default_rng(0))), normal(3, 8), normal(2, 8, seed=1), normal(8)
    q, k, v = (np.concatenate(pair) for pair in zip(by_hand(block.image, x, None, emb),
                                                    by_hand(block.text, c, None, emb), strict=True))     # (5, 8)
    y = np.concatenate([special.softmax(q[:, h] @ k[:, h].T / 2, axis=1) @ v[:, h]
                        for h in (slice(0, 4), slice(4, 8))], axis=1)
    found_x, found_c = block(*(Tensor(a[None]) for a in (x, c, emb)), np.ones((1, 1, 1, 5), bool))
    np.testing.assert_allclose(found_x.data[0], by_hand(block.image, x, y[:3], emb), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found_c.data[0], by_hand(block.text, c, y[3:], emb), rtol=1e-9, atol=1e-11)


def test_the_last_block_is_a_joint_block_whose_text_ends():
    """With the same weights, its image tokens are those of a joint block; queries of the text have no part in them."""
    joint, last = moved(JointBlock(8, 2, np.random.default_rng(0))), moved(LastBlock(8, 2, np.random.default_rng(1)))
    last.image = joint.image
    for mine, its in ((last.modulation, joint.text.modulation), (last.text_kv, joint.text.qkv)):
        for name in ("w", "b"):
            a = getattr(its, name).data
            getattr(mine, name).data = a[..., :16] if mine is last.modulation else a[..., 8:]
    x, c, emb = Tensor(normal(2, 3, 8)), Tensor(normal(2, 4, 8, seed=1)), Tensor(normal(2, 8, seed=2))
    np.testing.assert_allclose(last(x, c, emb, every(3)).data, joint(x, c, emb, every(3))[0].data, rtol=1e-12)


def test_modulation_scales_and_shifts_what_is_normalised():
    x, shift, scale = normal(2, 3, 8), normal(2, 1, 8, seed=1), normal(2, 1, 8, seed=2)
    y = modulated(*(Tensor(a) for a in (x, shift, scale))).data
    x_hat = (y - shift) / (1 + scale)
    np.testing.assert_allclose(x_hat.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(x_hat.var(-1), x.var(-1) / (x.var(-1) + 1e-5), rtol=1e-9)


def test_heads_and_parts_are_cut_in_order():
    y = np.arange(2 * 3 * 24.0).reshape(2, 3, 24)
    cut = split_heads(Tensor(y), 3, 2)                      # (3, 2, 2, 3, 4)
    for i in range(3):
        for h in range(2):
            np.testing.assert_array_equal(cut.data[i][:, h], y[:, :, 8 * i + 4 * h:8 * i + 4 * h + 4])
        np.testing.assert_array_equal(join_heads(cut[i]).data, y[:, :, 8 * i:8 * i + 8])
    for i, part in enumerate(parts(Tensor(y[:, 0]), 6)):
        np.testing.assert_array_equal(part.data, y[:, :1, 4 * i:4 * i + 4])


# ---- gradients -------------------------------------------------------------------------------------------------

def test_gradients_of_the_whole_network():
    """To the image, the caption's states, and every parameter by name, along random directions."""
    net = network()
    x, tokens, pooled = (Tensor(normal(*shape), True) for shape in [(2, 4, 6, 2), (2, 4, 3), (2, 3)])
    check_gradients(lambda *_: net(x, U, TextStates(tokens, pooled, MASK)), x, tokens, pooled,
                    *net.parameters().values(), directions=1)


def test_every_parameter_is_used():
    net = network()
    net(Tensor(normal(2, 4, 4, 2)), U, states()).backward(normal(2, 4, 4, 2, seed=4))
    for name, p in net.parameters().items():
        assert p.grad is not None and p.grad.any(), name


# ---- adaLN-Zero ------------------------------------------------------------------------------------------------

@pytest.mark.law(
    39, "adaLN-Zero: an untrained MM-DiT's blocks are the identity, whatever time and caption, and its output is 0",
    source="their input", tolerance="exact")
def test_it_starts_as_the_identity_and_with_output_zero():
    rng = np.random.default_rng(0)
    x, c, emb = (Tensor(normal(*shape).astype(np.float32)) for shape in [(2, 3, 8), (2, 4, 8), (2, 8)])
    new_x, new_c = JointBlock(8, 2, rng)(x, c, emb, every(3))
    assert (new_x.data == x.data).all() and (new_c.data == c.data).all()
    assert (LastBlock(8, 2, rng)(x, c, emb, every(3)).data == x.data).all()
    untrained = MMDiT(TINY, rng).astype(np.float64)
    assert not untrained(Tensor(normal(2, 4, 4, 2)), U, states()).data.any()


def test_an_untrained_block_has_a_gradient_at_its_gates():
    """Bug: the branches' last layers start at 0 as well as the gates, and neither ever moves."""
    block = JointBlock(8, 2, np.random.default_rng(0)).astype(np.float64)
    x, c, emb = Tensor(normal(2, 3, 8)), Tensor(normal(2, 4, 8, seed=1)), Tensor(normal(2, 8, seed=2))
    for stream, out in ((block.image, 0), (block.text, 1)):
        y = block(x, c, emb, every(3))[out]
        dw, = gradients(y, [stream.modulation.w], normal(*y.shape, seed=3))
        shift, scale, gate, shift2, scale2, gate2 = np.split(dw, 6, axis=1)
        assert np.abs(gate).max() > 1e-3 and np.abs(gate2).max() > 1e-3
        assert not any(a.any() for a in (shift, scale, shift2, scale2))


# ---- tokens, streams and padding -------------------------------------------------------------------------------

@pytest.mark.law(
    39, "in joint attention, permuting the tokens of one stream permutes its results and changes nothing in the other",
    source="the same tokens in another order", tolerance="1e-10: sums in another order")
def test_permuting_tokens_permutes_the_results():
    block, x, c = moved(JointBlock(8, 2, np.random.default_rng(0))), normal(2, 5, 8), normal(2, 4, 8, seed=1)
    emb, pixels, words = Tensor(normal(2, 8, seed=2)), [3, 0, 4, 1, 2], [2, 0, 3, 1]
    y, d = (a.data for a in block(Tensor(x), Tensor(c), emb, every(5)))
    for pi, wi in ((pixels, [0, 1, 2, 3]), ([0, 1, 2, 3, 4], words)):
        found_y, found_d = block(Tensor(x[:, pi]), Tensor(c[:, wi]), emb, every(5, MASK[:, wi]))
        np.testing.assert_allclose(found_y.data, y[:, pi], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found_d.data, d[:, wi], rtol=1e-10, atol=1e-12)


def test_the_streams_differ_in_their_weights_alone():
    """Streams that are exchanged, weights and tokens, give exchanged results."""
    block, x, c = moved(JointBlock(8, 2, np.random.default_rng(0))), normal(2, 5, 8), normal(2, 4, 8, seed=1)
    emb, mask = Tensor(normal(2, 8, seed=2)), np.ones((2, 1, 1, 9), bool)
    y, d = block(Tensor(x), Tensor(c), emb, mask)
    block.image, block.text = block.text, block.image
    exchanged_d, exchanged_y = block(Tensor(c), Tensor(x), emb, mask)
    np.testing.assert_allclose(exchanged_y.data, y.data, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(exchanged_d.data, d.data, rtol=1e-10, atol=1e-12)


def test_each_stream_reads_the_other():
    block, x, c = moved(JointBlock(8, 2, np.random.default_rng(0))), normal(1, 3, 8), normal(1, 2, 8, seed=1)
    emb, mask = Tensor(normal(1, 8, seed=2)), np.ones((1, 1, 1, 5), bool)
    y, d = (a.data for a in block(Tensor(x), Tensor(c), emb, mask))
    other_y, _ = block(Tensor(x), Tensor(c + normal(1, 2, 8, seed=3)), emb, mask)
    _, other_d = block(Tensor(x + normal(1, 3, 8, seed=3)), Tensor(c), emb, mask)
    assert np.abs(other_y.data - y).max() > 1e-3 and np.abs(other_d.data - d).max() > 1e-3


@pytest.mark.law(
    39, "an MM-DiT's output does not depend on a caption's padding, even where it is NaN, nor on its length",
    source="other padding, and more of it", tolerance="1e-12: sums of other lengths")
def test_padding_has_no_influence():
    net, x, tokens = network(), Tensor(normal(2, 4, 4, 2)), normal(2, 4, 3, seed=1)
    y = net(x, U, states(tokens)).data
    for value in (100.0, np.nan):
        other = np.where(MASK[..., None], tokens, value)
        np.testing.assert_allclose(net(x, U, states(other)).data, y, rtol=1e-12, atol=1e-12)
    longer = np.concatenate([tokens, normal(2, 3, 3)], axis=1), np.concatenate([MASK, np.zeros((2, 3), bool)], axis=1)
    np.testing.assert_allclose(net(x, U, states(*longer)).data, y, rtol=1e-12, atol=1e-12)
    tokens[0, 1] += 1                                       # a word of the first caption
    changed = net(x, U, states(tokens)).data
    assert np.abs(changed[0] - y[0]).max() > 1e-3 and np.array_equal(changed[1], y[1])


def test_permuting_the_batch_permutes_the_outputs():
    net, x, order = network(), normal(4, 4, 4, 2), np.array([2, 0, 3, 1])
    u, mask = np.array([0.1, 0.4, 0.7, 1.0]), MASK[[0, 1, 1, 0]]
    text = states(mask=mask, B=4)
    moved_text = TextStates(Tensor(text.tokens.data[order]), Tensor(text.pooled.data[order]), mask[order])
    y = net(Tensor(x), u, text).data
    np.testing.assert_allclose(net(Tensor(x[order]), u[order], moved_text).data, y[order], rtol=1e-10, atol=1e-12)
    assert np.abs(net(Tensor(x), u[::-1].copy(), text).data - y).max() > 1e-3       # the time counts


def test_the_place_of_a_patch_counts():
    """An image shifted by one patch does not give the shifted output; each place of a grid has its own embedding."""
    net, x = network(), normal(1, 4, 4, 2)
    text = states(mask=MASK[:1], B=1)
    y, shifted = (net(Tensor(a), U[:1], text).data for a in (x, np.roll(x, 2, axis=2)))
    assert np.abs(np.roll(y, 2, axis=2) - shifted).max() > 1e-3
    places = grid_embedding(3, 5, 8, np.float64).reshape(3, 5, 8)
    assert len({tuple(row) for row in places.reshape(15, 8).round(9)}) == 15
    assert (places[:, :, :4] == places[:, :1, :4]).all() and (places[:, :, 4:] == places[:1, :, 4:]).all()


def test_every_patch_reads_all_patches_of_its_own_image():
    net, x, text = network(), normal(2, 4, 6, 2), states()
    other = x.copy()
    other[0, 2:, 4:] += 1                                   # the last of six patches
    moved_by = np.abs(net(Tensor(other), U, text).data - net(Tensor(x), U, text).data)
    assert (moved_by[0].reshape(2, 2, 3, 2, 2).max(axis=(1, 3, 4)) > 1e-4).all() and not moved_by[1].any()


def test_patches_come_back_to_their_places():
    """With blocks that are the identity, a patch of the output depends on the same patch of the image only."""
    net = MMDiT(TINY, np.random.default_rng(0)).astype(np.float64)
    net.out.w.data = normal(*net.out.w.shape)
    x = normal(1, 4, 6, 2)
    text, changed = states(mask=MASK[:1], B=1), x.copy()
    changed[0, 2:4, 4:6] += normal(2, 2, 2, seed=5)
    differs = net(Tensor(changed), U[:1], text).data != net(Tensor(x), U[:1], text).data
    assert differs[0, 2:4, 4:6].all() and differs.sum() == 8


# ---- what is refused -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, sentence", [
    ({"width": 6}, "width must be a multiple of 4 and of heads"),
    ({"heads": 3}, "width must be a multiple of 4 and of heads"),
    ({"blocks": 0}, "must be at least 1"), ({"patch": 0}, "must be at least 1"), ({"text": 0}, "must be at least 1"),
])
def test_a_configuration_that_makes_no_network(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(TINY, **changes)


@pytest.mark.parametrize("shape, u, channels, sentence", [
    ((2, 5, 4, 2), U, 3, "x must be .* multiples of 2, not"), ((2, 4, 3, 2), U, 3, "x must be .* multiples of 2, not"),
    ((2, 4, 4, 1), U, 3, r"x must be \(B, H, W, 2\)"), ((4, 4, 2), U, 3, "x must be"),
    ((2, 4, 4, 2), U[:1], 3, "u must have one time for each image"),
    ((2, 4, 4, 2), U, 4, "text.tokens must have 3 channels, not 4"),
])
def test_inputs_that_do_not_fit(shape, u, channels, sentence):
    text = TextStates(Tensor(normal(2, 4, channels)), Tensor(normal(2, 3)), MASK)
    with pytest.raises(ValueError, match=sentence):
        network()(Tensor(normal(*shape)), u, text)


def test_images_that_the_network_cannot_take():
    TINY.check_image(4, 6, 24)
    for H, W in ((5, 4), (4, 5)):
        with pytest.raises(ValueError, match="an image's sides must be multiples of 2"):
            TINY.check_image(H, W, 24)
    with pytest.raises(ValueError, match="would take .* numbers for an image"):
        MMDiTConfig(patch=1, width=128).check_image(128, 128, 24)
