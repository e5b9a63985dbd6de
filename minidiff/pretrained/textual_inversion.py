"""Textual inversion: a word of the user's own, as vectors that were trained for it (Gal et al. 2022, section 3).

    "a photo of <cat-toy>"  -->  a, photo, of, v_1, ..., v_n                    v_i: rows of the file's tensor

The word is a placeholder: it becomes n new ids, and the text encoder's table n new rows.  A file holds one tensor, (D,)
or (n, D), of any name; SDXL, which has two text encoders, takes the two tensors clip_l and clip_g.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minidiff.errors import UserError
from minidiff.pretrained.clip_text import ClipTextEncoder
from minidiff.pretrained.clip_tokenizer import ClipTokenizer
from minidiff.pretrained.weights import FLOATS, Entry, entries

NAMES = ("clip_l", "clip_g")                                # SDXL's encoders, in the order of their states
MOST = 75                                                   # vectors: as many tokens as a prompt has


def add(embeddings: Mapping[str, str | Path], tokenizers: Sequence[ClipTokenizer],
        encoders: Sequence[ClipTextEncoder]) -> None:
    """Teaches tokenizers and text encoders the words, each from its file."""
    read = {word: vectors(Path(path), [encoder.embedding.shape[1] for encoder in encoders])
            for word, path in embeddings.items()}
    for word, of_each in read.items():
        for tokenizer, encoder, rows in zip(tokenizers, encoders, of_each, strict=True):
            tokenizer.add(word, encoder.add(rows))


def vectors(path: Path, widths: Sequence[int]) -> list[np.ndarray]:
    """The vectors (n, D) of a file for each text encoder, which have the given widths D."""
    tensors = entries(path)
    names = list(tensors) if len(widths) == 1 else list(NAMES)
    if tensors.keys() != set(names) or len(names) != len(widths):
        takes = "one tensor" if len(widths) == 1 else " and ".join(NAMES)
        raise UserError(f"{path} is no embedding for this model: it holds {', '.join(tensors)[:80] or 'nothing'}, and "
                        f"the model takes {takes}.")
    return [checked(path, name, tensors[name], D) for name, D in zip(names, widths, strict=True)]


def checked(path: Path, name: str, entry: Entry, D: int) -> np.ndarray:
    n = 1 if len(entry.shape) == 1 else entry.shape[0] if entry.shape else 0
    if not 1 <= n <= MOST or entry.shape not in ((D,), (n, D)) or entry.dtype not in FLOATS:
        raise UserError(f"{path} is no embedding for this model: its {name[:80]!r} is {entry.dtype} {entry.shape}, and "
                        f"the model takes 1 to {MOST} vectors of {D} numbers.")
    rows = entry.read().reshape(n, D)
    if not np.isfinite(rows).all():
        raise UserError(f"{path} is damaged: its {name[:80]!r} holds NaN or infinity.")
    return rows                                                                     # (n, D)
