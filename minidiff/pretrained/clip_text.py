"""CLIP's text encoder, by which Stable Diffusion reads its prompts (Radford et al. 2021, arXiv 2103.00020, 2.4).

    h_0    = embedding[ids] + position                          (B, 77, D)
    h_l    = h + attention(norm1(h));  h + mlp(norm2(h))        causal: a token attends to itself and those before it
    last   = norm(h_L)                                          what Stable Diffusion 1 and 2 read
    h_L-1                                                       what SDXL reads, without the last norm
    pooled = last at the first end-of-text token;  embedding = pooled w, of the whole prompt (SDXL)

Padding needs no mask: it comes after the end of the text, and attention is causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import to_device
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.pretrained.config import Config
from minidiff.pretrained.layers import Attention, LayerNorm, Linear, numbered, tried
from minidiff.pretrained.weights import Weights


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with."""
    return x * ops.sigmoid(x * 1.702)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": ops.gelu_exact}


@dataclass(frozen=True)
class ClipTextStates:
    """last, penultimate (B, N, D): states after the last layer and its norm, and before the last layer.

    pooled (B, D): the last state of the end of the text; embedding (B, P): its projection, None without one.
    """

    last: Tensor
    penultimate: Tensor
    pooled: Tensor
    embedding: Tensor | None


class ClipTextEncoder(Module):
    """ids (B, N) -> ClipTextStates."""

    def __init__(self, config: Config, weights: Weights):
        check(config)
        self.end = config.whole("eos_token_id", 49407)
        body = weights.part("text_model") if "text_model" in weights else weights   # transformers 5 leaves it out
        embeddings = body.part("embeddings")
        self.embedding = embeddings.tensor("token_embedding.weight", 0, 1)          # (vocab, D)
        self.known = len(self.embedding)                    # ids from here on are those of textual inversion
        self.position = embeddings.tensor("position_embedding.weight", 0, 1)        # (77, D)
        self.layers = [Layer(part, config) for part in
                       numbered(body, "encoder.layers", config.whole("num_hidden_layers", 12))]
        self.norm = LayerNorm(body.part("final_layer_norm"), config.number("layer_norm_eps", 1e-5))
        self.project = Linear(weights.part("text_projection")) if "text_projection" in weights else None
        weights.check_all_used(lambda name: name.endswith("position_ids"))
        tried(weights, "text encoder", lambda: self.forward(np.zeros((1, 1), np.int64)))

    def add(self, vectors: np.ndarray) -> range:
        """The new ids of vectors (n, D): textual inversion."""
        table = np.concatenate([self.embedding.data, vectors.astype(self.embedding.dtype)])
        first, self.embedding = len(self.embedding), Tensor(table)
        return range(first, len(table))

    def forward(self, ids: np.ndarray) -> ClipTextStates:
        self._check(ids)
        ids_there = to_device(ids, self.device)
        h = ops.embedding(self.embedding, ids_there) + self.position[:ids.shape[1]]         # (B, N, D)
        penultimate = h
        for layer in self.layers:
            penultimate, h = h, layer(h)
        last = self.norm(h)
        pooled = last[np.arange(len(ids)), end_of_text(ids, self.end, self.known)]              # (B, D)
        return ClipTextStates(last, penultimate, pooled, None if self.project is None else self.project(pooled))

    def _check(self, ids: np.ndarray) -> None:
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= len(self.position):
            raise ValueError(f"ids must be (B, N) with N within 1..{len(self.position)}, not {ids.shape}")


class Layer(Module):
    """(B, N, D) -> (B, N, D)."""

    def __init__(self, weights: Weights, config: Config):
        eps = config.number("layer_norm_eps", 1e-5)
        self.norm1 = LayerNorm(weights.part("layer_norm1"), eps)
        self.norm2 = LayerNorm(weights.part("layer_norm2"), eps)
        self.attention = Attention(weights.part("self_attn"), config.whole("num_attention_heads", 8),
                                   ("q_proj", "k_proj", "v_proj", "out_proj"))
        self.mlp_in, self.mlp_out = Linear(weights.part("mlp.fc1")), Linear(weights.part("mlp.fc2"))
        self.activation = ACTIVATIONS[config.text("hidden_act", "quick_gelu")]

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.norm1(h), None, True)
        return h + self.mlp_out(self.activation(self.mlp_in(self.norm2(h))))


def end_of_text(ids: np.ndarray, end: int, known: int) -> np.ndarray:
    """The position of each row's first end-of-text token, (B,).

    The first configurations of CLIP say 2, which is wrong: their end has the largest id of the `known` ones, and so it
    is found.
    """
    return np.where(ids < known, ids, -1).argmax(axis=1) if end == 2 else (ids == end).argmax(axis=1)


def check(config: Config) -> None:
    """UserError where the configuration names another kind of network."""
    config.require(model_type="clip_text_model", use_attention_mask=False)
    act = config.text("hidden_act", "quick_gelu")
    if act not in ACTIVATIONS:
        raise UserError(f"{config.path}: hidden_act {act[:40]!r} is unknown; it is one of {', '.join(ACTIVATIONS)}.")
