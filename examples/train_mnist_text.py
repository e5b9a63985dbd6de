"""Text-to-image diffusion on MNIST, from the data to the pictures, in one file.

    python examples/train_mnist_text.py            trains for some minutes, writes samples.png

    1  noise an image     x_t = alpha_t x_0 + sigma_t eps
    2  ask the network    v_theta(x_t, t, caption)  for  v = alpha_t eps - sigma_t x_0  (x_t and v give x_0 and eps)
    3  train it           minimise || v - v_theta ||^2
    4  sample             start from pure noise; compute x_0 and eps from v_theta; mix them with less noise; repeat

`minidiff train` takes the same steps; it also saves, resumes and evaluates.  Its network says of each pixel whether it
is black, white or between, and Bayes' rule makes v of that, which removes the grain (nn/pixel_mixture.py).  It draws
times from another density (diffusion/densities.py).  It samples with DPM-Solver++(2M), and scale 2.
"""

import argparse

import numpy as np
from tqdm import tqdm

from minidiff import load_dataset, pictures
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.gaussian import q_sample, v_from_x0_eps
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.samplers import ddim, sample, times
from minidiff.diffusion.schedules import cosine
from minidiff.diffusion.times import training_times
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.random import SampleStreams, generator
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import run_main
from minidiff.nn.module import Module
from minidiff.nn.optim import EMA, AdamW, WarmupCosine, clip_by_norm
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer

PROMPTS = ["a bold seven leaning left", "a thin, upright three", "a wide zero", "5", "a narrow eight", "a heavy four"]
LENGTH = 24                                                 # tokens of a caption
schedule = cosine(T=1000)                                   # alpha_t and sigma_t for t = 0 .. 999


class Model(Module):
    """A caption encoder and a UNet, trained together: v_theta(x_t, t, caption)."""

    def __init__(self, rng: np.random.Generator):
        self.text = TextEncoder(TextEncoderConfig(length=LENGTH, width=64), rng)
        self.unet = UNet(UNetConfig(text=64), rng)

    def loss(self, x_t, t, ids, mask, v) -> Tensor:
        # L = || v - v_theta(x_t, t, caption) ||^2
        error = self.unet(Tensor(x_t), t, self.text(ids, mask)) - v
        return ops.mean(error * error)

    def encode(self, ids, mask) -> tuple:                   # captions as a condition of the UNet: arrays
        with no_grad():
            states = self.text(ids, mask)
        return states.tokens.data, states.pooled.data, states.mask

    def predict(self, x_t, t, cond):                        # v_theta, without gradients
        tokens, pooled, mask = cond
        with no_grad():
            return self.unet(Tensor(x_t), t, TextStates(Tensor(tokens), Tensor(pooled), mask)).data


def main(steps: int = 2200, batch: int = 32, data: str | None = None, out: str = "samples.png", seed: int = 0) -> None:
    pictures.check_writable(out)                            # before the work, not after
    rng = generator(seed, "the whole training")
    digits = load_dataset(data)                             # images in [-1, 1], with captions

    def caption(i: int) -> str:                             # a space first: "seven" is then the same token anywhere
        return " " + digits.caption(i, rng)

    tokenizer = Tokenizer.train([caption(i) for i in rng.integers(0, len(digits), 5_000)], vocab_size=512)
    model = Model(rng)
    parameters, leaves = model.parameters(), list(model.parameters().values())
    optimiser, average, lr = AdamW(parameters), EMA(parameters, 0.998), WarmupCosine(2e-3, steps)

    def draw_batch() -> tuple:
        chosen = rng.integers(0, len(digits), batch)
        x_0 = digits.images(chosen)                                                 # (B, 28, 28, 1)
        # one caption in ten is dropped, so that the network also learns to draw without one
        ids, mask = tokenizer.batch([caption(i) if rng.random() > 0.1 else "" for i in chosen], LENGTH)
        t = training_times(rng, batch, schedule.T)          # noisy times are more frequent: there the digit is decided
        eps = rng.standard_normal(x_0.shape, dtype=np.float32)
        return q_sample(schedule, x_0, t, eps), t, ids, mask, v_from_x0_eps(schedule, x_0, t, eps)

    def gradients_of(arrays: tuple) -> tuple:               # each thread takes a shard (a slice) of the batch
        return parallel_gradients(lambda shard: model.loss(*(a[shard] for a in arrays)), leaves, batch)

    # --- training ---
    bar = tqdm(range(steps), unit="step", dynamic_ncols=True)
    for step in bar:
        loss, gradients = gradients_of(draw_batch())
        clip_by_norm(gradients, 1.0)
        optimiser.step(gradients, lr(step))
        average.step()
        bar.set_postfix(loss=f"{loss:.4f}")

    # --- sampling: the averaged weights, guided by the captions ---
    model.load_state_dict(average.average)
    prompts = [prompt for prompt in PROMPTS for _ in range(6)]
    cond = model.encode(*tokenizer.batch([" " + prompt for prompt in prompts], LENGTH))
    no_caption = model.encode(*tokenizer.batch([""], LENGTH))
    denoiser = NetworkDenoiser(schedule, "v", model.predict)                        # (x_t, t, cond) -> x0_hat
    guided = ClassifierFree(denoiser, 3.0, no_caption, clip=static_threshold)
    x_T = SampleStreams(seed, len(prompts)).normal(digits.shape)                    # (B, 28, 28, 1)
    x_0 = sample(ddim(guided, x_T, times(schedule, 20), cond))
    pictures.save(pictures.sheet(x_0, prompts, columns=6), out)
    print(f"loss {loss:.4f}, samples in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data", help="folder with MNIST's four files")
    parser.add_argument("--out", default="samples.png")
    parser.add_argument("--seed", type=int, default=0)
    run_main(main, **vars(parser.parse_args()))
