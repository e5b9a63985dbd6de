"""CLIP (Radford et al. 2021, arXiv 2103.00020): pictures and captions in one space, learned from pairs alone.

    I_e    = f(x) / ||f(x)||,   T_e = g(c) / ||g(c)||       image and text tower                         fig. 3
    logits = exp(t) I_e T_e^t                               t learned, from log(1/.07), at most log 100  section 2.5
    L      = (CE(logits, rows) + CE(logits^T, rows)) / 2    of N pairs; text/clip.py
    digit  = argmax_k  I_e . mean over phrasings of T_e("the digit k", ...)      zero-shot               section 3.1

No label is ever shown as one: what is learned from is a caption, drawn anew at each sight of a picture, which names the
digit in one of many phrasings and often says less than can be seen. (Captions of the web name less.)

Duplicates. Among N pictures of ten digits many captions are the same ("a 7" for two sevens), and the loss calls one
of two equally good answers wrong. It is left so, for it does no harm that lasts: the best logits are those of
log p(x, c) / p(x) p(c) whatever the duplicates are (law 31), and they only raise the least loss there is, by about
log m where m pictures of the batch share a caption. To draw a batch without duplicates, or to count equal captions as
equally right, would be to learn another ratio, of captions that are rarer than they are.

Scaled down or left out: 28 x 28 pictures of digits for 400 million pairs from the web, N = 128 for 32,768; a
convolutional network of two blocks for a ResNet or a ViT, whose attention pooling is one linear layer here; the mean
over a caption's states for the state at its last token; no random crops. A batch across the cores is several batches
of N, each with its own loss. At the cap t gets no gradient, where the paper moves it back after each step; it is
never reached here (exp t ends at 21.5).

The shipped weights, 1,000 steps of 2 x 128 pairs in 10 minutes on a shared core of an AMD EPYC (Zen 4), 2026-11-23,
`python examples/03_clip.py`: zero-shot 99.05 % of MNIST's test set, over 8 phrasings. CLIP's own "a photo of the digit
..." gets 98.1 % where "a picture of the digit ..." gets 99.0 %: no caption here says "photo". The loss ends at 1.65
nats, so that pictures and captions of the training set share at least log 128 - 1.65 = 3.2 nats, of which a digit is
log 10 = 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from minidiff.data import digit_captions as captions
from minidiff.data.digits import CaptionedDigits
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_map, shards
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.nn.image_tower import ImageTower, ImageTowerConfig
from minidiff.systems.system import Stage, System, as_read, caption_tokenizer, check_captions
from minidiff.text.clip import TextTower, capped, clip_loss, first_log_scale, unit
from minidiff.text.encoder import TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer

# phrasings of the grammar of data/captions.py; {word} is "seven", {figure} is "7"
PROMPTS = ("the digit {word}", "the digit {figure}", "the number {word}", "the number {figure}",
           "a picture of the digit {word}", "an image of the number {figure}", "{word}", "{figure}")


@dataclass(frozen=True)
class CLIPConfig:
    """Everything that makes one model; it travels in its file."""

    pairs: int = 128                        # N, among which a loss classifies
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    def __post_init__(self):
        if self.pairs < 2:
            raise ValueError(f"pairs must be at least 2, or there is nothing to tell apart, not {self.pairs}")

    @property
    def width(self) -> int:
        """Channels of a token's state, and D of the space that both towers end in."""
        return self.text.width


class Contrastive(System):
    """The text's side of a CLIP, its tokenizer and its temperature; the tower of the pictures is the subclass's."""

    def __init__(self, config, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        if tokenizer.vocab_size > config.text.vocab:
            raise ValueError(f"config: text.vocab ({config.text.vocab}) must be at least the tokenizer's "
                             f"{tokenizer.vocab_size}")
        self.text = TextTower(config.text, config.width, rng)
        self.log_scale = first_log_scale()

    @classmethod
    def tokenizer_for(cls, data: CaptionedDigits, config, rng: np.random.Generator) -> Tokenizer:
        return caption_tokenizer(data, config.text.vocab, rng)

    def tokens(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions as ids and mask, (B, N).  Nothing but white space is the null caption."""
        check_captions(captions)
        return self.tokenizer.batch([as_read(c) for c in captions], self.config.text.length)

    def draw_pairs(self, data: CaptionedDigits, B: int, rng: np.random.Generator) -> tuple:
        """x_0 (B, N, H, W, 1), ids and mask (B, N, tokens): B batches of N pairs, each caption drawn anew."""
        chosen = rng.integers(0, len(data.digits), (B, self.config.pairs))
        ids, mask = without_padding(*self.tokens([data.caption(int(i), rng) for i in chosen.flat]))
        return data.x_0[chosen], ids.reshape(*chosen.shape, -1), mask.reshape(*chosen.shape, -1)

    def loss(self, *arrays) -> Tensor:
        """The mean of the losses of B batches of N pairs, (): arrays (B, N, ...), of which `contrast` takes one."""
        losses = [self.contrast(*batch) for batch in zip(*arrays, strict=True)]
        return sum(losses[1:], losses[0]) / len(losses)

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Unit rows (B, D) float32."""
        ids, mask = without_padding(*self.tokens(captions))
        return mapped(lambda part: unit("captions", self.text(ids[part], mask[part])).data, len(ids))


class CLIP(Contrastive):
    """Two towers and a temperature, with the tokenizer that they were trained with."""

    name, Config = "clip", CLIPConfig

    def __init__(self, config: CLIPConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        self.image = ImageTower(config.image, config.width, rng)

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: CaptionedDigits) -> Iterator[Stage]:
        def batch(rng: np.random.Generator, B: int) -> tuple:
            return self.draw_pairs(data, B, rng)
        yield Stage("contrast", self, batch, self.loss, steps=1000, size=2, lr=2e-3, ema=0.995)

    def contrast(self, x_0, ids, mask) -> Tensor:
        """The loss of one batch of N pairs, (): x_0 (N, H, W, 1); ids, mask (N, tokens)."""
        image = by_shards(lambda part: self.image(Tensor(x_0[part])), len(x_0))     # (N, D)
        text = by_shards(lambda part: self.text(ids[part], mask[part]), len(x_0))   # (N, D)
        return clip_loss(image, text, capped(self.log_scale))

    # --- the frozen model: what others ask it -------------------------------------------------------------

    def image_features(self, x: Tensor) -> Tensor:
        """Unit rows (B, D) of pictures (B, 28, 28, 1) in [-1, 1]; differentiable."""
        return unit("images", self.image(x))

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Unit rows (B, D) float32 of pictures (B, 28, 28, 1) in [-1, 1]."""
        return mapped(lambda part: self.image_features(Tensor(images[part])).data, len(images))

    def text_states(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the text tower makes of captions before it projects them: tokens (B, N, W), pooled (B, W), mask (B, N).

        N is the whole context, whatever the captions are.
        """
        ids, mask = self.tokens(captions)
        with no_grad():
            states = self.text.encoder(ids, mask)
        return states.tokens.data, states.pooled.data, states.mask

    def zero_shot(self, images: np.ndarray, prompts: Sequence[str] = PROMPTS) -> np.ndarray:
        """The digits (B,) whose phrasings are nearest to pictures (B, 28, 28, 1), without having learned a label."""
        return (self.embed_images(images) @ self.embed_digits(prompts).T).argmax(axis=1)

    def embed_digits(self, prompts: Sequence[str] = PROMPTS) -> np.ndarray:
        """Unit rows (10, D) float32, each digit's the direction of the mean over its phrasings (section 3.1.4).

        prompts: phrasings with {word} or {figure}.
        """
        check_captions(prompts)
        if not all("{word}" in p or "{figure}" in p for p in prompts):
            raise ValueError(f"prompts must each hold {{word}} or {{figure}}, not {list(prompts)}")
        texts = [p.format(word=word, figure=k) for k, word in enumerate(captions.DIGITS) for p in prompts]
        means = self.embed_captions(texts).reshape(len(captions.DIGITS), len(prompts), -1).mean(axis=1)     # (10, D)
        return means / np.linalg.norm(means, axis=1, keepdims=True)


def without_padding(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask without the columns of nothing but padding."""
    longest = int(mask.sum(axis=1).max())
    return ids[:, :longest], mask[:, :longest]


def by_shards(f, count: int) -> Tensor:
    """f of each slice of `count` samples, one after the other: what a shard leaves behind stays in the cache."""
    return ops.concat([f(part) for part in shards(count)], axis=0)


def mapped(f, count: int) -> np.ndarray:
    """f of each slice of `count` samples, on all cores, without gradients."""
    def one(part: slice) -> np.ndarray:
        with no_grad():
            return f(part)
    return np.concatenate(list(parallel_map(one, shards(count, 128))))
