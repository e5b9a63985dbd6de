"""Classifier guidance: a classifier guides a model trained without captions (Dhariwal & Nichol 2021).

    python examples/04_classifier_guidance.py               a table of scales, and classifier_guidance.png

    algorithm 1    x_s ~ N(mu + scale Sigma g, Sigma)                               g = grad log p(y | x_t)
    algorithm 2    eps_hat = eps - scale sqrt(1 - alpha_bar_t) g, then DDIM

It uses the weights of the system adm: a DDPM and a classifier of noised images (minidiff/systems/adm.py).
"""

import argparse

import numpy as np
from tqdm import tqdm

from minidiff import pictures, systems
from minidiff.data import mnist
from minidiff.data.digits import Digits
from minidiff.diffusion.gaussian import q_sample
from minidiff.errors import run_main
from minidiff.evaluation.fidelity import Fidelity, measure
from minidiff.evaluation.judge import load_judge

PROMPTS = ("a bold seven leaning left", "a thin, upright three", "a wide zero", "a narrow, right-leaning five",
           "a heavy four", "8")


def main(scales=(0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0), algorithms=(1, 2), *, count: int = 300, steps: int = 30,
         model: str | None = None, out: str = "classifier_guidance.png") -> dict[tuple[int, float], Fidelity]:
    pictures.check_writable(out)                            # fails now, not after the work
    adm, judge = systems.load_system("adm", model), load_judge()

    # --- captions of `count` real images, the same at every scale, and as many other real images ---
    rng, real = np.random.default_rng(0), Digits.of(mnist.packed(), held_out=True)
    chosen, others = np.split(rng.permutation(len(real))[:2 * count], 2)
    prompts = [real.caption(i, rng) for i in chosen]
    features, _ = judge.read(real.images(others))

    # --- the classifier's accuracy at time t ---
    x_0, y = real.images(chosen), adm.questions.labels(real, chosen)
    print("| t | digit | thickness | slant | width |\n|---|---|---|---|---|")
    for t in adm.ddpm.schedule.T * np.arange(0, 10, 2) // 10:
        x_t = q_sample(adm.ddpm.schedule, x_0, t, rng.standard_normal(x_0.shape, dtype=np.float32))
        p = adm.classifier.read(x_t, np.full(count, t))
        right = [(head.argmax(axis=1) == answer).mean() for head, answer in zip(p, y.T, strict=True)]
        print(f"| {t} | {' | '.join(f'{100 * share:.1f} %' for share in right)} |")

    # --- the same noise at every scale ---
    measured = {}
    for algorithm in algorithms:
        for scale in tqdm(scales, desc=f"algorithm {algorithm}", dynamic_ncols=True):
            images = adm.sample(prompts, scale=scale, steps=steps, algorithm=algorithm, seed=1)
            measured[algorithm, scale] = measure(images, prompts, features, judge)
    limit = measure(x_0, prompts, features, judge)          # the figures of real images

    print("| algorithm | scale | digit | attributes | FID | precision | recall |\n|---|---|---|---|---|---|---|")
    for (algorithm, scale), m in measured.items():
        print(f"| {algorithm} | {scale:g} | {m.row()} |")
    print(f"| real images | | {limit.row()} |")

    # --- each row is one sample: unconditional at the left, most strongly guided at the right ---
    prompts = [p for p in PROMPTS for _ in range(2)]
    states = np.stack([adm.sample(prompts, scale=scale, steps=steps, seed=2) for scale in scales])  # (S, N, 28, 28, 1)
    labels = [f"scale {scale:g}" for scale in scales]
    pictures.save(pictures.strip(states, prompts, labels=labels, columns=max(2, len(scales))), out)
    return measured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="pictures at each scale")
    parser.add_argument("--steps", type=int, default=30, help="sampling steps")
    parser.add_argument("--model", help="weights of adm (default: those that come with minidiff)")
    parser.add_argument("--out", default="classifier_guidance.png")
    run_main(main, **vars(parser.parse_args()))
