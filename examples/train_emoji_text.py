"""Text-to-image diffusion on emoji: colour pictures from their names, and names that were never seen.

    python examples/train_emoji_text.py            trains for half an hour, writes emoji.png

The four steps are those of train_mnist_text.py.  Three things differ: pixels have three channels; a patch of 4 x 4
pixels is one position of the network, so that it sees more pictures in a second; and the names in the last rows were
never trained on: "snowboarder: medium skin tone" combines a thing and a tone that were seen with others.  Below each
row of drawings stand the true pictures.  The numbers at the end say for how many drawings the true picture is the
nearest of all 3,786 emoji, or one of the nearest five.
"""

import argparse

import numpy as np
from tqdm import tqdm

from minidiff import load_dataset, pictures
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.gaussian import q_sample, v_from_x0_eps
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.samplers import dpm_solver_pp_2m, sample, times
from minidiff.diffusion.schedules import cosine
from minidiff.diffusion.times import training_times
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.random import SampleStreams, generator
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import run_main
from minidiff.evaluation.emoji import rank_of
from minidiff.nn.module import Module
from minidiff.nn.optim import EMA, AdamW, WarmupCosine, clip_by_norm
from minidiff.nn.unet import TextStates, UNet, UNetConfig
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer

SEEN = ["grinning face", "red apple", "flag: Italy", "robot", "woman astronaut: medium-dark skin tone", "snowman"]
WIDTH, LENGTH = 128, 24                                     # channels of a token's state; tokens of a name
schedule = cosine(T=1000)                                   # alpha_t and sigma_t for t = 0 .. 999


class Model(Module):
    """An encoder of names and a UNet, trained together: v_theta(x_t, t, name)."""

    def __init__(self, rng: np.random.Generator):
        self.text = TextEncoder(TextEncoderConfig(vocab=1024, length=LENGTH, width=WIDTH), rng)
        self.unet = UNet(UNetConfig(channels=3, patch=4, widths=(128, 256), text=WIDTH), rng)

    def loss(self, x_t, t, ids, mask, v) -> Tensor:
        # L = || v - v_theta(x_t, t, name) ||^2
        error = self.unet(Tensor(x_t), t, self.text(ids, mask)) - v
        return ops.mean(error * error)

    def encode(self, ids, mask) -> tuple:                   # names as a condition of the UNet: arrays
        with no_grad():
            states = self.text(ids, mask)
        return states.tokens.data, states.pooled.data, states.mask

    def predict(self, x_t, t, cond):                        # v_theta, without gradients
        tokens, pooled, mask = cond
        with no_grad():
            return self.unet(Tensor(x_t), t, TextStates(Tensor(tokens), Tensor(pooled), mask)).data


def main(steps: int = 9000, batch: int = 64, out: str = "emoji.png", seed: int = 0, judged: int = 188) -> None:
    pictures.check_writable(out)                            # before the work, not after
    rng, emoji = generator(seed, "a training on emoji"), load_dataset("emoji")      # images in [-1, 1], with names
    unseen = emoji.test()                                   # those that are never trained on
    names = [" " + emoji.caption(i) for i in range(len(emoji))]
    tokenizer, model = Tokenizer.train(names, vocab_size=1024), Model(rng)
    parameters, leaves = model.parameters(), list(model.parameters().values())
    optimiser, average, lr = AdamW(parameters), EMA(parameters, 0.998), WarmupCosine(2e-3, steps)

    def draw_batch() -> tuple:
        chosen = rng.integers(0, len(emoji), batch)
        x_0 = emoji.images(chosen)                                                  # (B, 32, 32, 3)
        # one name in ten is dropped, so that the network also learns to draw without one
        ids, mask = tokenizer.batch([names[i] if rng.random() > 0.1 else "" for i in chosen], LENGTH)
        t = training_times(rng, batch, schedule.T)          # noisy times are more frequent: there the thing is decided
        eps = rng.standard_normal(x_0.shape, dtype=np.float32)
        return q_sample(schedule, x_0, t, eps), t, ids, mask, v_from_x0_eps(schedule, x_0, t, eps)

    for step in (bar := tqdm(range(steps), unit="step", dynamic_ncols=True)):
        a = draw_batch()
        loss, gradients = parallel_gradients(lambda shard, a=a: model.loss(*(x[shard] for x in a)), leaves, batch)
        clip_by_norm(gradients, 1.0)
        optimiser.step(gradients, lr(step))
        average.step()
        bar.set_postfix(loss=f"{loss:.4f}")

    # --- sampling: the averaged weights, guided by the names ---
    model.load_state_dict(average.average)
    no_name = model.encode(*tokenizer.batch([""], LENGTH))
    guided = ClassifierFree(NetworkDenoiser(schedule, "v", model.predict), 2.0, no_name, clip=static_threshold)

    def drawn(asked: list[str]) -> np.ndarray:
        x_T = SampleStreams(seed, len(asked)).normal(emoji.shape)                   # (B, 32, 32, 3)
        cond = model.encode(*tokenizer.batch([" " + name for name in asked], LENGTH))
        return sample(dpm_solver_pp_2m(guided, x_T, times(schedule, 20), cond))

    # --- the true pictures are known, also of the names that were never seen ---
    true = {data.caption(i): data.images([i])[0] for data in (emoji, unseen) for i in range(len(data))}
    all_names, real = list(true), np.stack(list(true.values()))
    for what, data in (("seen", emoji), ("never seen", unseen)):
        asked = [data.caption(i) for i in rng.permutation(len(data))[:judged]]
        ranks = rank_of(drawn(asked), real, np.array([all_names.index(name) for name in asked]))
        print(f"{len(asked)} names {what}: the true picture is the nearest for {(ranks < 1).mean():.1%}, one of the "
              f"nearest five for {(ranks < 5).mean():.1%}")
    rows = [SEEN, [unseen.caption(i) for i in range(0, len(unseen), 32)][:6]]
    shown = np.concatenate([np.concatenate([drawn(row), [true[name] for name in row]]) for row in rows])
    pictures.save(pictures.sheet(shown, [name for row in rows for name in row + ["(true)"] * len(row)], columns=6), out)
    print(f"loss {loss:.4f}, pictures in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", default="emoji.png")
    parser.add_argument("--seed", type=int, default=0)
    run_main(main, **vars(parser.parse_args()))
