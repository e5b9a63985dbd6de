"""Which pixels attend to which word: the cross-attention maps of one drawn picture, as pictures to lay over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minidiff.errors import UserError
from minidiff.play.drawing import Drawn, png, refused
from minidiff.play.offer import Offer, within
from minidiff.systems.attention_maps import attention_maps
from minidiff.systems.text_to_image import TextToImage

COLOUR = (213, 94, 0)                                       # Okabe and Ito's vermilion
MOST_OPAQUE = 0.85
MOST_TIMES = 40                                             # of a trajectory, for the mean over its steps


def maps(offer: Offer, drawn: Drawn, picture: int, index: int | None) -> Iterator[dict]:
    """The events: progress, and then one map for each word.  index: the state; None for the mean over all of them."""
    run = drawn.run
    if not issubclass(run.offered.kind, TextToImage):
        raise UserError(f"{run.offered.kind.name} has no maps: they are of the cross-attention of text-to-image")
    within("the picture", picture, 0, run.count - 1)
    noisy = [i for i, t in enumerate(drawn.t) if t >= 0]
    if index is None:
        chosen = noisy[::-(-len(noisy) // MOST_TIMES)]
    else:
        # the clean picture is at no time of the network: the state before it stands for it
        chosen = [min(within("the state", index, 0, len(drawn.t) - 1), noisy[-1])]
    found, texts = [], []
    with refused(run.offered.kind.name):
        model = offer.load(run.offered)
        for done, i in enumerate(chosen, start=1):
            texts, one = attention_maps(model, drawn.x_t[i][picture], drawn.t[i], run.prompt)
            found.append(one)
            yield {"event": "progress", "done": done, "of": len(chosen)}
    mean = np.mean(found, axis=0)                                                   # (N, H, W)
    words = [{"text": text, "share": float(one.mean()), "map": overlay(one)} for text, one in by_word(texts, mean)]
    yield {"event": "maps", "times": [drawn.t[i] for i in chosen], "words": words}


def by_word(texts: Sequence[str], maps: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The maps of tokens (N, H, W), added up within each word: a token that begins with a space begins a word."""
    words: list[tuple[str, np.ndarray]] = []
    for text, one in zip(texts, maps, strict=True):
        if text.startswith((" ", "<")) or not words or words[-1][0].startswith("<"):
            words.append((text.strip(), one))
        else:
            words[-1] = (words[-1][0] + text, words[-1][1] + one)
    return words


def overlay(one: np.ndarray) -> str:
    """A map (H, W) as a coloured PNG, the more opaque the larger the share; its largest value is the most opaque."""
    share = one / max(float(one.max()), 1e-12)
    pixels = np.empty((*one.shape, 4), np.uint8)
    pixels[..., :3] = COLOUR
    pixels[..., 3] = (255 * MOST_OPAQUE * share).round()
    return png(pixels)
