"""Stable Diffusion from a checkpoint on disk, from prompt to pixel (Rombach et al. 2022), with the shapes on the way.

    python examples/12_stable_diffusion.py FOLDER "an astronaut riding a horse"     writes stable_diffusion.png
    python examples/12_stable_diffusion.py                                           a tiny one with random weights

    1  read       the prompt as 77 tokens, and CLIP's state of each
    2  noise      z_T ~ N(0, I), an eighth as high and wide as the picture
    3  denoise    20 steps, each with the prompt and without it: the difference is guidance
    4  decode     x = D(z / factor), once
"""

import argparse
from pathlib import Path

import numpy as np

from minidiff import pictures
from minidiff.errors import run_main
from minidiff.systems.stable_diffusion import StableDiffusion

TINY = Path(__file__).parents[1] / "tests" / "pretrained" / "checkpoints" / "eps"
SHOWN = 6                                                   # states in the picture


def main(model: str | None = None, prompt: str = "a red cube on a blue sphere", negative: str = "", scale: float = 7.5,
         steps: int = 20, size: str | None = None, seed: int = 0, out: str = "stable_diffusion.png") -> np.ndarray:
    pictures.check_writable(out)                            # fails now, not after the work
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
    return x[-1]


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
