"""Stable Diffusion from a checkpoint on disk, from prompt to pixel (Rombach et al. 2022), with the shapes on the way.

    python examples/12_stable_diffusion.py FOLDER "an astronaut riding a horse"
    python examples/12_stable_diffusion.py                                           a tiny one with random weights

    1  read       the prompt as 77 tokens, and CLIP's state of each
    2  noise      z_T ~ N(0, I), an eighth as high and wide as the picture
    3  denoise    20 steps, each with the prompt and without it: the difference is guidance
    4  decode     x = D(z / factor), once

It writes stable_diffusion.png, six states of the way, and stable_diffusion_parts.png: what each part does at one step.
"""

import argparse
from pathlib import Path

import numpy as np

from minidiff import pictures
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import run_main
from minidiff.systems.stable_diffusion import StableDiffusion

TINY = Path(__file__).parents[1] / "tests" / "pretrained" / "checkpoints" / "eps"
SHOWN = 6                                                   # states in the picture
WORDS = 4                                                   # tokens whose attention is shown, and channels of latents


def main(model: str | None = None, prompt: str = "a red cube on a blue sphere", negative: str = "", scale: float = 7.5,
         steps: int = 20, size: str | None = None, seed: int = 0, out: str = "stable_diffusion.png") -> np.ndarray:
    of_parts = Path(out).with_stem(Path(out).stem + "_parts")
    for path in (out, of_parts):
        pictures.check_writable(path)                       # fails now, not after the work
    if model is None:
        print("No checkpoint is named: a tiny one with random weights shows the way, and no picture.")
    system = StableDiffusion.load(model or TINY)
    for name, value in system.about(model or TINY):
        print(f"{name}: {value}")

    # --- 1. read ---
    ids, lost = system.tokenizers[0].ids([prompt])
    print(f"tokens: {ids[0, :12].tolist()} ..., {lost[0]} too many")
    tau = system.encode_text([prompt], (system.config.size, system.config.size))[0]
    print(f"states of the prompt: {tau.shape}")             # (1, 77, D)

    # --- 2. and 3. noise, denoise: each state is decoded where it is shown ---
    options = {"negative": negative, "scale": scale, "steps": steps, "size": size, "seed": seed}
    states = list(system.trajectory([prompt], **options))
    print(f"latents: {states[-1].z_t.shape}, {len(states)} steps")                  # (1, h, w, 4)

    # --- 4. decode ---
    chosen = sorted({round(i) for i in np.linspace(0, len(states) - 1, SHOWN)})
    x = np.concatenate([states[i].x_t for i in chosen])                             # (S, H, W, 3)
    pictures.save(pictures.sheet(x, [f"step {states[i].step}" for i in chosen], columns=SHOWN, title=prompt), out)
    print(f"pictures: {x.shape} in {out}")

    # --- what each part does, half way ---
    half = states[max(0, len(states) // 2 - 1)]
    draw_parts(system, prompt, negative, half.z_t, max(half.t, 0), states[-1].z_t, of_parts)
    print(f"what each part does: {of_parts}")
    return x[-1]


def draw_parts(system: StableDiffusion, prompt: str, negative: str, z_t: np.ndarray, t: float, z_0: np.ndarray,
               path: Path) -> None:
    """Rows of four: z_t, the answers of the network and their difference, where words are attended to, z_0."""
    _, h, w, _ = z_t.shape
    size = (h * system.vae.factor, w * system.vae.factor)
    attention = watch(system)
    answers = [predict(system, z_t, t, system.encode_text([text], size)) for text in (negative, prompt)]
    maps = attention.weights.mean(axis=(0, 1))                                      # (N, 77), of the prompt
    shrunk = round((h * w / len(maps)) ** 0.5)              # the block's resolution is h / shrunk x w / shrunk
    maps = maps.reshape(-(-h // shrunk), -(-w // shrunk), -1).repeat(shrunk, 0).repeat(shrunk, 1)[:h, :w]
    words = tokens(system, prompt)
    predicts = system.scheduler.predicts                    # eps or v
    rows = {f"z_t, t = {t:.0f}": z_t[0], f"{predicts} without prompt": answers[0], f"{predicts} with it": answers[1],
            "difference": answers[1] - answers[0], "z_0": z_0[0]}
    panels = [(f"{name}: {i + 1}", a[..., i]) for name, a in rows.items() for i in range(WORDS)]        # a channel each
    panels += [(f"attention to {word!r}", maps[..., i + 1]) for i, word in enumerate(words[:WORDS])]    # 0 is the start
    images = np.stack([spread(a) for _, a in panels])[..., None]                    # (S, h, w, 1)
    pictures.save(pictures.sheet(images, [name for name, _ in panels], columns=WORDS, scale=max(1, 96 // h),
                                 title=f"What each part does: {prompt}"), path)


class Watched:
    """An attention layer that keeps the weights softmax(q k^T / sqrt(d)) of its last call, (B, heads, N, M)."""

    def __init__(self, layer):
        self.layer, self.weights = layer, None

    def __call__(self, x: Tensor, text: Tensor) -> Tensor:
        q, k = self.layer._heads(self.layer.q(x)), self.layer._heads(self.layer.k(text))
        self.weights = ops.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) * q.shape[-1] ** -0.5).data
        return self.layer(x, text)


def watch(system: StableDiffusion) -> Watched:
    """Watches how the positions of the finest level that reads the prompt attend to it."""
    level = next(level for level in system.unet.down_blocks if hasattr(level.attentions[-1], "blocks"))
    block = level.attentions[-1].blocks[-1]
    block.cross_attention = Watched(block.cross_attention)
    return block.cross_attention


def predict(system: StableDiffusion, z_t: np.ndarray, t: float, cond: tuple) -> np.ndarray:
    """What the network predicts (eps or v) from z_t (1, h, w, 4) -> (h, w, 4)."""
    tau, pooled, sizes = (*cond, None, None)[:3]
    with no_grad():
        pooled = None if pooled is None else Tensor(pooled)
        return system.unet(Tensor(z_t), np.array([t]), Tensor(tau), pooled, sizes).data[0]


def tokens(system: StableDiffusion, prompt: str) -> list[str]:
    """The first tokens of the prompt: a word, or a piece of one."""
    tokenizer = system.tokenizers[0]
    names = {i: name.removesuffix("</w>") for name, i in tokenizer.vocab.items()}   # </w>: the end of a word
    return [names[i] for i in tokenizer.encode(prompt)[:WORDS]]


def spread(a: np.ndarray) -> np.ndarray:
    """From its least value to its largest, as black to white: [-1, 1]."""
    return 2 * (a - a.min()) / max(np.ptp(a), 1e-12) - 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a folder in diffusers' layout, or a .safetensors file")
    parser.add_argument("prompt", nargs="?", default="a red cube on a blue sphere")
    parser.add_argument("--negative", default="", help="what the picture should not be like")
    parser.add_argument("--scale", type=float, default=7.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", help="WIDTHxHEIGHT (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="stable_diffusion.png")
    run_main(main, **vars(parser.parse_args()))
