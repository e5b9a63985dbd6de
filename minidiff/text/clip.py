"""CLIP's text tower and loss: images and captions in one space, where the cosine of a pair measures how well they
match (nn/image_tower.py has the image tower, systems/clip.py the whole system).

    I, T   = image tower(x), text tower(caption)            (N, D), each row divided by its length
    logits = exp(log_scale) I T^t                           log_scale = -log temperature, learned; at most log 100
    L      = (CE(logits, rows) + CE(logits^T, rows)) / 2    Radford et al. 2021, arXiv 2103.00020, figure 3

T_i is the caption of image i, so the right class of row i is i, and that of column j is j: two classifications among
the N pairs of the batch. The logits that minimise the loss over all batches are the pointwise mutual information
log p(I, T) / p(I) p(T) plus any constant, and log N - L is at most the mutual information (van den Oord et al. 2018,
arXiv 1807.03748).
"""

import math

import numpy as np

from minidiff.engine import ops
from minidiff.engine.backend import xp_of
from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Linear
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32
from minidiff.text.encoder import TextEncoder, TextEncoderConfig

FIRST_LOG_SCALE = math.log(1 / 0.07)                        # the initial value (section 2.5)
MAX_LOG_SCALE = math.log(100)                               # the largest value


class TextTower(Module):
    """ids (B, N), mask (B, N) -> embeddings (B, D), not normalised: the pooled state, projected."""

    def __init__(self, config: TextEncoderConfig, D: int, rng: np.random.Generator):
        self.encoder = TextEncoder(config, rng)
        self.project = Linear(config.width, D, rng)

    def forward(self, ids, mask) -> Tensor:
        return self.project(self.encoder(ids, mask).pooled)


def first_log_scale() -> Tensor:
    """The parameter log_scale at the start of training, (): log(1 / 0.07)."""
    return Tensor(np.array(FIRST_LOG_SCALE, np.float32), requires_grad=True)


def capped(log_scale: Tensor) -> Tensor:
    """min(log_scale, log 100); its gradient is 0 beyond log 100."""
    return ops.clip(log_scale, -math.inf, MAX_LOG_SCALE)


# --- the loss ---------------------------------------------------------------------------------------------

def clip_loss(image_embeddings: Tensor, text_embeddings: Tensor, log_scale: Tensor) -> Tensor:
    """The symmetric InfoNCE loss in nats (docs/glossary.md), (), float32 at least.

    It is log N if all logits are equal, and 0 at best.
    image_embeddings, text_embeddings (N, D): row i of one belongs to row i of the other; they need not be normalised.
    log_scale (): minus the log of the temperature. The paper starts at log(1/.07) and keeps the scale at most 100; the
    caller does that, with `capped`. Raises ValueError if shapes do not match, or if an embedding is 0 or not finite.
    """
    if image_embeddings.ndim != 2 or image_embeddings.shape != text_embeddings.shape or 0 in image_embeddings.shape:
        raise ValueError("clip_loss takes image_embeddings and text_embeddings (N, D), row for row and not empty, "
                         f"not {image_embeddings.shape} and {text_embeddings.shape}")
    if log_scale.shape != () or not xp_of(log_scale.data).isfinite(log_scale.data):
        got = log_scale.item() if log_scale.shape == () else f"shape {log_scale.shape}"
        raise ValueError(f"log_scale must be one finite number, of shape (), not {got}")
    image = unit("image_embeddings", as_float32(image_embeddings))                    # (N, D)
    text = unit("text_embeddings", as_float32(text_embeddings))                       # (N, D)
    # logits = exp(log_scale) I T^t
    logits = ops.exp(as_float32(log_scale)) * (image @ text.transpose(1, 0))                # (N, N)
    rows = np.arange(len(logits.data))                      # on the host, where they are checked without waiting
    # L = (CE(logits, rows) + CE(logits^T, rows)) / 2
    return (ops.cross_entropy(logits, rows) + ops.cross_entropy(logits.transpose(1, 0), rows)) / 2


def unit(name: str, x: Tensor) -> Tensor:
    """Each row divided by its length, (N, D). ValueError, which names `name`, if a row is 0 or not finite."""
    xp = xp_of(x.data)
    largest = xp.abs(x.data).max(axis=1, keepdims=True)                               # (N, 1)
    valid = (largest > 0) & xp.isfinite(largest)
    if not valid.all():
        raise ValueError(f"{name} must have a direction, and row {int(valid.argmin())} is 0 or not finite")
    x = x / largest                                         # a constant, so that x^2 stays finite; it cancels below
    return x / ops.sqrt((x * x).sum(axis=1, keepdims=True))


# --- retrieval --------------------------------------------------------------------------------------------

def recall_at(k: int, similarity: np.ndarray) -> float:
    """The share of rows i whose column i is among the k largest of the row; an equal entry does not count as larger.

    similarity (N, M), N <= M: of N queries with M candidates. Raises ValueError unless 1 <= k <= M.
    """
    if similarity.ndim != 2 or not 0 < len(similarity) <= similarity.shape[1]:
        raise ValueError(f"similarity must be (N, M) with N at most M, and not empty, not {similarity.shape}")
    if np.isnan(similarity).any():
        raise ValueError("similarity must be numbers, and holds NaN")
    if not 1 <= k <= similarity.shape[1]:
        raise ValueError(f"k must be within 1 and {similarity.shape[1]}, not {k}")
    own = similarity.diagonal()[:, None]                                              # (N, 1)
    return float(((similarity > own).sum(axis=1) < k).mean())
