"""CLIP (Radford et al. 2021, arXiv 2103.00020): pictures and captions in one space, learned from pairs alone.

    I_e    = f(x) / ||f(x)||,   T_e = g(c) / ||g(c)||       image and text tower                       figure 3
    logits = exp(t) I_e T_e^t                               t learned, from log(1/.07), at most log 100  section 2.5
    L      = (CE(logits, rows) + CE(logits^T, rows)) / 2    of N pairs; text/clip.py
    class  = argmax_k  I_e . mean over phrasings of T_e("the digit k", ...)      zero-shot               section 3.1

No label is given.  CLIP learns from captions, drawn again each time a picture is seen: a caption names the digit in one
of many phrasings, and often says less than can be seen.  (Captions of the web say less still.)

Duplicates.  Among N pictures of ten digits many captions are equal ("a 7" for two sevens), and the loss calls one of
two equally good answers wrong.  This does not change what is learned: the best logits are those of
log p(x, c) / p(x) p(c) whatever the duplicates are (law 31).  Duplicates only raise the least possible loss, by about
log m where m pictures of the batch share a caption.  A batch without duplicates, or a loss that counts equal captions
as equally right, would learn another ratio, in which frequent captions count as rarer than they are.

Scaled down or left out: 28 x 28 pictures of digits for 400 million pairs from the web, N = 128 for 32,768; a
convolutional network of two blocks for a ResNet or a ViT, whose attention pooling is one linear layer here; the mean
over a caption's states for the state at its last token; no random crops.  On several cores or ranks a batch is several
batches of N, each with its own loss.  At the cap t has no gradient; the paper clips t after each step instead.
The cap is never reached here (exp t ends at 21.5).

The shipped weights took 1,000 steps of 2 x 128 pairs in 10 minutes on a shared core of an AMD EPYC (Zen 4), 2026-11-23.
`python examples/03_clip.py`: zero-shot 99.05 % of MNIST's test set, over 8 phrasings.  CLIP's own "a photo of the digit
..." gets 98.1 % where "a picture of the digit ..." gets 99.0 %: no caption here says "photo".  The loss ends at 1.65
nats (docs/glossary.md).  Pictures and captions of the training set therefore share at least log 128 - 1.65 = 3.2 nats
of information; the digit alone is log 10 = 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minidiff.data.dataset import Dataset
from minidiff.engine import ops
from minidiff.engine.backend import to_device, to_numpy
from minidiff.engine.parallel import map_batch, shards
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.nn.image_tower import ImageTower, ImageTowerConfig
from minidiff.nn.images import clean_images
from minidiff.nn.precision import as_float32, as_input
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, as_read, caption_tokenizer, check_captions
from minidiff.systems.training_batches import random_captions
from minidiff.text.clip import TextTower, capped, clip_loss, first_log_scale, unit
from minidiff.text.encoder import TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer

SHARD = 128                                                 # pictures or captions at a time


@dataclass(frozen=True)
class CLIPConfig:
    """Everything that makes one model; it is saved in the model's file."""

    pairs: int = 128                        # N, the pairs that a loss classifies among
    image: ImageTowerConfig = field(default_factory=ImageTowerConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    def __post_init__(self):
        if self.pairs < 2:
            raise ValueError(f"pairs must be at least 2, since one pair cannot be told from another, not {self.pairs}")

    @property
    def width(self) -> int:
        """Channels of a token's state, and D of the space of both towers."""
        return self.text.width


class Contrastive(System):
    """The text side of a CLIP, its tokenizer and its temperature; a subclass adds the image tower."""

    def __init__(self, config, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        if tokenizer.vocab_size > config.text.vocab:
            raise ValueError(f"config: text.vocab ({config.text.vocab}) must be at least the tokenizer's "
                             f"{tokenizer.vocab_size}")
        self.text = TextTower(config.text, config.width, rng)
        self.log_scale = first_log_scale()

    @classmethod
    def config_for(cls, shape: tuple[int, int, int]):
        default = cls.Config()
        return replace(default, image=replace(default.image, shape=shape))

    @classmethod
    def tokenizer_for(cls, data: Dataset, config, rng: np.random.Generator, needed) -> Tokenizer:
        return caption_tokenizer(data, config.text.vocab, rng)

    def tokens(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Captions as ids and mask, (B, N).  A caption of white space only is the null caption."""
        check_captions(captions)
        return self.tokenizer.batch([as_read(c) for c in captions], self.config.text.length)

    def random_pairs(self, data: Dataset, step: Step) -> tuple:
        """x_0 (B, N, H, W, C), ids and mask (B, N, tokens): B batches of N pairs."""
        chosen = step.choose(data, self.config.pairs)
        ids, mask = without_padding(*self.tokens(random_captions(data, chosen.ravel(), step.rng)))
        x_0 = step.images(data, chosen)
        return x_0, ids.reshape(*chosen.shape, -1), mask.reshape(*chosen.shape, -1)

    def loss(self, *arrays) -> Tensor:
        """The mean of the losses of B batches of N pairs, (): arrays (B, N, ...), of which `contrast` takes one."""
        losses = [self.contrast(*batch) for batch in zip(*arrays, strict=True)]
        return sum(losses[1:], losses[0]) / len(losses)

    def embed_captions(self, captions: Sequence[str]) -> np.ndarray:
        """Unit rows (B, D) float32, on the system's device."""
        def rows(ids, mask):
            return unit("captions", as_float32(self.text(ids, mask)))
        return map_batch(rows, *without_padding(*self.tokens(captions)), device=self.device, size=SHARD)


class CLIP(Contrastive):
    """Two towers and a temperature, with the tokenizer that they were trained with."""

    name, Config, example = "clip", CLIPConfig, "03_clip.py"

    def __init__(self, config: CLIPConfig, tokenizer: Tokenizer, rng: np.random.Generator):
        super().__init__(config, tokenizer, rng)
        self.image = ImageTower(config.image, config.width, rng)

    def copy_from(self, clip: CLIP) -> None:
        """The weights of the CLIP that another system is built on; UserError if its pictures have another shape."""
        theirs, own = clip.config.image.shape, self.config.image.shape
        if theirs != own:
            raise UserError(f"the CLIP in {getattr(clip, 'file', 'memory')} reads pictures of the shape {theirs}, and "
                            f"these are {own}: train one by minidiff train --system clip with the same --data, and "
                            "name it with --needs clip=FILE")
        self.load_state_dict(clip.state_dict())

    # --- training -----------------------------------------------------------------------------------------

    def stages(self, data: Dataset) -> Iterator[Stage]:
        yield Stage("contrast", self, lambda step: self.random_pairs(data, step), CLIP.loss, steps=1000, batch_size=2,
                    ema=0.995)

    def contrast(self, x_0, ids, mask) -> Tensor:
        """The loss of one batch of N pairs, (): x_0 (N, H, W, C); ids, mask (N, tokens)."""
        image = by_shards(lambda part: as_float32(self.image(as_input(self.image, x_0[part]))), len(x_0))     # (N, D)
        text = by_shards(lambda part: as_float32(self.text(ids[part], mask[part])), len(x_0))               # (N, D)
        return clip_loss(image, text, capped(as_float32(self.log_scale)))

    # --- the trained model, as other systems use it -------------------------------------------------------

    def image_features(self, x: Tensor) -> Tensor:
        """Unit rows (B, D) of pictures (B, H, W, C) in [-1, 1], float32 at least; differentiable."""
        return unit("images", as_float32(self.image(as_input(self.image, x))))

    def embed_images(self, images: np.ndarray) -> np.ndarray:
        """Unit rows (B, D) float32 of pictures (B, H, W, C) in [-1, 1], on the system's device."""
        images = to_device(clean_images(images, self.config.image.shape), self.device)
        return map_batch(lambda x: self.image_features(Tensor(x)), images, device=self.device, size=SHARD)

    def text_states(self, captions: Sequence[str]) -> tuple:
        """The text tower's states before its projection: tokens (B, N, W), pooled (B, W), mask (B, N).

        N is the whole context, whatever the captions are.
        """
        def states(ids, mask):
            text = self.text.encoder(ids, mask)
            return text.tokens, text.pooled, text.mask
        return map_batch(states, *self.tokens(captions), device=self.device)

    def zero_shot(self, images: np.ndarray, phrasings: Sequence[Sequence[str]]) -> np.ndarray:
        """The class (B,) of pictures (B, H, W, C) whose phrasings are nearest; no label was ever learned."""
        return to_numpy(self.embed_images(images) @ self.embed_classes(phrasings).T).argmax(axis=1)

    def embed_classes(self, phrasings: Sequence[Sequence[str]]) -> np.ndarray:
        """Unit rows (K, D) float32, for each class the direction of the mean over its phrasings (section 3.1.4)."""
        if not phrasings or not phrasings[0] or len({len(captions) for captions in phrasings}) != 1:
            raise ValueError("phrasings must be lists of equally many captions, at least one, a list for each class")
        texts = [caption for captions in phrasings for caption in captions]
        means = self.embed_captions(texts).reshape(len(phrasings), len(phrasings[0]), -1).mean(axis=1)      # (K, D)
        return means / (means**2).sum(axis=1, keepdims=True) ** 0.5


def without_padding(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask without the columns that hold nothing but padding."""
    longest = int(mask.sum(axis=1).max(initial=0))
    return ids[:, :longest], mask[:, :longest]


def by_shards(f, count: int) -> Tensor:
    """f of each slice of `count` samples, one after the other, so that a shard's arrays stay in the cache."""
    return ops.concat([f(shard) for shard in shards(count)], axis=0)
