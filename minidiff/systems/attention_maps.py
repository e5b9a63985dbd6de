"""Which pixels attend to which word?  The cross-attention maps of a text-to-image model.

In a cross-attention layer, pixel n has a query q_n, and token m of the caption has a key k_m:

    P[n, m] = softmax_m(q_n . k_m / sqrt(d))       the share of pixel n's attention that token m gets
    maps[m] = mean of P[:, m] over heads and layers, as a picture

Hertz et al. 2022 edit pictures by these maps; Tang et al. 2023 add them up over the steps of a sampler, and show where
each word acts.  A map says where a word is read, and not what it changes there: the model also reads the whole caption
through its norms (nn/unet.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from minidiff.diffusion.samplers import State
from minidiff.engine.attention import attention_weights
from minidiff.engine.backend import to_device
from minidiff.nn.transformer import watching_attention
from minidiff.nn.unet import SpatialAttention
from minidiff.systems.text_to_image import TextToImage
from minidiff.text.tokenizer import BOS, EOS, Tokenizer

START, END = "<start>", "<end>"


def attention_maps(model: TextToImage, x_t, t: int, caption: str) -> tuple[list[str], np.ndarray]:
    """The caption's M tokens as texts, and their maps (M, H, W), for one noised picture x_t (H, W, C) at time t.

    The maps of a pixel sum to 1 over the tokens.  A token that begins a word begins with a space; the first token is
    START and the last is END.  A layer that works on a coarser grid has one number for each square of pixels.
    """
    _check(model, x_t, t, caption)
    ids, mask = model.tokens([caption])                                             # (1, N)
    layers = {id(part.cross_attention) for _, part in model.unet.modules() if isinstance(part, SpatialAttention)}
    found = []

    def watch(layer, q, k, padding, causal) -> None:
        if id(layer) in layers:
            P = attention_weights(q, k, padding)                                    # (1, h, n, N)
            found.append(_on_pixels(P[0].mean(axis=0).T, *x_t.shape[:2]))           # (N, H, W)
    cond = model.encode([caption])
    with watching_attention(watch):
        model.predict(to_device(x_t, model.device)[None], np.array([t]), cond)
    return [_text(model.tokenizer, i) for i in ids[mask]], np.mean(found, axis=0)[mask[0]]


def trajectory_maps(model: TextToImage, states: Iterable[State], caption: str,
                    sample: int = 0) -> tuple[list[str], np.ndarray]:
    """The mean of the maps over a trajectory, for one of its samples: `attention_maps` of each state but the last.

    states: of `model.trajectory`, the noise x_T first.  The network runs once more for each state.
    """
    found = [attention_maps(model, state.x_t[sample], state.t, caption) for state in states if state.t >= 0]
    if not found:
        raise ValueError("states must hold at least one state of a trajectory that is not its last")
    return found[0][0], np.mean([maps for _, maps in found], axis=0)


def _on_pixels(columns: np.ndarray, H: int, W: int) -> np.ndarray:
    """(N, n), a number for each of n squares, row after row -> (N, H, W)."""
    side = math.isqrt(H * W // columns.shape[1])                                    # pixels along a square
    grid = columns.reshape(-1, H // side, W // side)
    return grid.repeat(side, axis=1).repeat(side, axis=2)


def _text(tokenizer: Tokenizer, token: int) -> str:
    return {BOS: START, EOS: END}.get(int(token)) or tokenizer.decode([token])


def _check(model: TextToImage, x_t, t: int, caption: str) -> None:
    if x_t.shape != model.config.shape:
        raise ValueError(f"x_t must be one picture of shape {model.config.shape}, got {x_t.shape}")
    if not 0 <= t < model.schedule.T:
        raise ValueError(f"t must be a time within 0..{model.schedule.T - 1}, got {t}")
    if not isinstance(caption, str):
        raise TypeError(f"caption must be a str, got {type(caption).__name__}")
