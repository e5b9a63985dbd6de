"""Text-to-image diffusion on MNIST, from the data to the pictures, in one file.

    python examples/train_mnist_text.py            trains for some minutes, writes samples.png

The idea of `minidiff train` with nothing hidden. What that does besides: it saves and resumes, spreads the times of a
batch evenly, reads captions in any case, samples with DPM-Solver++ in place of DDIM, and evaluates.

    1  noise an image     x_t = alpha_t x_0 + sigma_t eps
    2  ask the network    v_theta(x_t, t, caption)  for  v = alpha_t eps - sigma_t x_0
    3  step down          || v - v_theta ||^2
    4  sample             from pure noise, step by step toward what the network says was there before the noise
"""

import argparse

import numpy as np
from tqdm import tqdm

from minidiff import pictures
from minidiff.data import attributes, mnist
from minidiff.data import digit_captions as captions
from minidiff.data.pixels import to_float
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.gaussian import q_sample, v_from_x0_eps
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.samplers import ddim, sample, times
from minidiff.diffusion.schedules import cosine
from minidiff.engine import ops
from minidiff.engine.backend import keep_freed_memory
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import run_main
from minidiff.nn.optim import EMA, AdamW, WarmupCosine, clip_by_norm
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer

PROMPTS = ["a bold seven leaning left", "a thin, upright three", "a wide zero", "5", "a narrow eight", "a heavy four"]
LENGTH = 24                                                 # tokens of a caption


def main(steps: int = 2200, batch: int = 32, data: str | None = None, out: str = "samples.png", seed: int = 0) -> None:
    keep_freed_memory()
    pictures.check_writable(out)                            # before the work, not after
    rng = np.random.default_rng(seed)

    # --- data: images in [-1, 1], and what can be said of each ---
    digits = mnist.load(data)
    x_all = to_float(digits.images)[..., None]                                      # (N, 28, 28, 1)
    words = attributes.name(attributes.measure(digits.images))
    seen = np.flatnonzero(~attributes.held_out(digits.labels, words))               # some combinations are kept back

    def caption(i: int) -> str:
        return captions.caption(rng, int(digits.labels[i]), words[i])

    def spaced(texts: list[str]) -> list[str]:              # a space before the first word, too: it is then the same
        return [f" {text}" if text else "" for text in texts]               # token wherever in a caption it stands

    tokenizer = Tokenizer.train(spaced([caption(i) for i in rng.choice(seen, 5_000)]), vocab_size=512)

    # --- model: a caption encoder and a UNet, trained together ---
    text = TextEncoder(TextEncoderConfig(length=LENGTH, width=64), rng)
    unet = UNet(UNetConfig(text=64), rng)
    schedule = cosine(T=1000)
    parameters = {**{f"text.{name}": p for name, p in text.parameters().items()},
                  **{f"unet.{name}": p for name, p in unet.parameters().items()}}
    optimiser, ema, lr = AdamW(parameters), EMA(parameters, 0.998), WarmupCosine(2e-3, steps)

    # --- training ---
    bar = tqdm(range(steps), unit="step", dynamic_ncols=True)
    for step in bar:
        chosen = rng.choice(seen, batch)
        x_0 = x_all[chosen]                                                         # (B, 28, 28, 1)
        # one caption in ten is dropped, so that the network also learns to draw without one
        ids, mask = tokenizer.batch(spaced([caption(i) if rng.random() > 0.1 else "" for i in chosen]), LENGTH)
        t = (schedule.T * np.cbrt(rng.random(batch))).astype(int)                   # more of the noisier times
        eps = rng.standard_normal(x_0.shape, dtype=np.float32)
        x_t = q_sample(schedule, x_0, t, eps)
        v = v_from_x0_eps(schedule, x_0, t, eps)

        def loss(part, x_t=x_t, v=v, t=t, ids=ids, mask=mask) -> Tensor:
            # L = || v - v_theta(x_t, t, caption) ||^2     on a part of the batch, one for each thread
            error = unet(Tensor(x_t[part]), t[part], text(ids[part], mask[part])) - v[part]
            return ops.mean(error * error)

        value, grads = parallel_gradients(loss, list(parameters.values()), batch)
        clip_by_norm(grads, 1.0)
        optimiser.step(grads, lr(step))
        ema.step()
        bar.set_postfix(loss=f"{value:.4f}")

    # --- sampling: the averaged weights, guided by the captions ---
    for name, p in parameters.items():
        p.data = ema.average[name]

    def encode(prompts: list[str]) -> tuple:
        with no_grad():
            states = text(*tokenizer.batch(spaced(prompts), LENGTH))
        return states.tokens.data, states.pooled.data, states.mask

    def network(x_t, t, cond):
        tokens, pooled, mask = cond
        with no_grad():
            return unet(Tensor(x_t), t, TextStates(Tensor(tokens), Tensor(pooled), mask)).data

    guided = ClassifierFree(NetworkDenoiser(schedule, "v", network), 3.0, encode([""]), clip=static_threshold)
    prompts = [prompt for prompt in PROMPTS for _ in range(6)]
    x_T = SampleStreams(seed, len(prompts)).normal((28, 28, 1))                           # (B, 28, 28, 1)
    x_0 = sample(ddim(guided, x_T, times(schedule, min(20, schedule.T)), encode(prompts)))
    pictures.save(pictures.sheet(x_0, prompts, columns=6), out)
    print(f"loss {value:.4f}, samples in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data", help="folder with MNIST's four files")
    parser.add_argument("--out", default="samples.png")
    parser.add_argument("--seed", type=int, default=0)
    run_main(main, **vars(parser.parse_args()))
