"""CLIP guidance beside classifier-free guidance: two ways to make one denoiser follow a caption (Nichol et al. 2021).

    python examples/05_glide.py                     draws docs/glide.png
    python examples/05_glide.py --measure 500       also prints the tables of docs/glide.md

Both use the UNet of the text-to-image system.  CLIP guidance calls it once a step, with the null caption, and follows
the gradient of f(x_t) . g(c), where f and g are the towers of a CLIP trained on noised pictures.  Classifier-free
guidance calls the UNet twice a step, with the caption and without.  So 20 steps of the first and 10 of the second cost
equally many calls.
"""

import argparse

import numpy as np

from minidiff import pictures, systems
from minidiff.data import digit_captions as captions
from minidiff.data.digits import Digits
from minidiff.data.mnist import packed
from minidiff.diffusion.gaussian import q_sample, score_from_x0
from minidiff.engine.random import generator
from minidiff.errors import run_main
from minidiff.evaluation import evaluate
from minidiff.systems.glide import GLIDE
from minidiff.systems.text_to_image import TextToImage

PROMPTS = ("a bold seven leaning left", "a thin, upright three", "a wide zero", "a narrow, right-leaning 5",
           "a heavy four", "a fine 8 leaning right")
CALLS = 20                                                  # of the UNet for each picture
CLIP_SCALES, FREE_SCALES = (2.0, 4.0, 6.0), (1.0, 2.0)


def settings(calls: int, clip_scales, free_scales) -> list[tuple]:
    """(guidance, system, scale, steps) of each row; each picture costs `calls` calls of the UNet."""
    glide, free = systems.load_system("glide"), systems.load_system("text-to-image")
    rows = [("CLIP guidance", glide, scale, calls) for scale in clip_scales]
    # at scale 1 only the branch with the caption is computed
    return rows + [("classifier-free", free, scale, calls if scale == 1 else calls // 2) for scale in free_scales]


def table(rows: list[tuple], count: int) -> list[str]:
    """Measures the rows; returns them as Markdown."""
    lines = [f"| guidance | scale | steps | digit | attributes | FID of {count} | s a picture |", "|---" * 7 + "|"]
    print("\n".join(lines))
    for what, system, scale, steps in rows:
        r = evaluate(system, count=count, options={"scale": scale, "steps": steps})
        lines.append(f"| {what} | {scale:g} | {steps} | {100 * r.digit_accuracy:.1f} % | {100 * r.agreement:.1f} % "
                     f"| {r.fid:.1f} | {r.seconds_per_image:.2f} |")
        print(lines[-1], f"floor {r.fid_floor:.1f}, ceiling {r.fid_ceiling:.1f}", flush=True)
    return lines


def slopes(glide: GLIDE, base: TextToImage, count: int = 64) -> list[str]:
    """Both gradients of log p(c | x_t), at noised real images with the captions of other images, as Markdown."""
    real, rng = Digits.of(packed(), held_out=True), generator(0, "slopes")
    x_0 = real.images(np.arange(count))                                             # (B, 28, 28, 1)
    asked = [f"the digit {captions.DIGITS[k]}" for k in rng.permutation(real.labels[:count])]
    lines = ["| t | alpha | length, CLIP | length, classifier-free | cosine |", "|---" * 5 + "|"]
    for t in base.schedule.T * np.arange(5, 10) // 10:
        times = np.full(count, t)
        x_t = q_sample(base.schedule, x_0, times, rng.standard_normal(x_0.shape, dtype=np.float32))
        by_clip = glide.grad_log_prob(x_t, times, glide.embed_captions(asked))
        # grad log p(c | x_t) = score(x_t | c) - score(x_t)
        free = [score_from_x0(base.schedule, x_t, times, base.unguided()(x_t, times, base.encode(texts)))
                for texts in (asked, [""] * count)]
        u, v = (a.reshape(count, -1) for a in (by_clip, free[0] - free[1]))
        lengths = [np.linalg.norm(a, axis=1) for a in (u, v)]
        cosine = ((u * v).sum(axis=1) / lengths[0] / lengths[1]).mean()
        lines.append(f"| {t} | {base.schedule.alpha(t):.2f} | {lengths[0].mean():.2f} | {lengths[1].mean():.2f} "
                     f"| {cosine:.2f} |")
    return lines


def main(count: int = 0, each: int = 4, calls: int = CALLS, clip_scales=CLIP_SCALES, free_scales=FREE_SCALES,
         shown: tuple[float, float] = (4.0, 2.0), out: str = "docs/glide.png") -> list[str]:
    """Draws `each` pictures of each prompt at the two scales `shown`; returns the table's lines."""
    prompts = [p for p in PROMPTS for _ in range(each)]
    both = []
    for what, system, scale, steps in settings(calls, shown[:1], shown[1:]):
        x = system.sample(prompts, scale=scale, steps=steps, seed=1)                # (B, 28, 28, 1)
        both.append((f"{what}, {scale:g}", x.reshape(len(PROMPTS), each, *x.shape[1:])))
    # a row for each prompt; CLIP's pictures are its left half
    states = np.concatenate([x.swapaxes(0, 1) for _, x in both])                    # (2 each, prompts, 28, 28, 1)
    labels = [label for what, _ in both for label in (what.split(" ")[0].rstrip(","), *[""] * (each - 1))]
    pictures.save(pictures.strip(states, PROMPTS, labels=labels, columns=len(states)), out)
    print("; ".join(what for what, _ in both), f"-> {out}")
    if not count:
        return []
    glide = systems.load_system("glide")
    print("\n".join(slopes(glide, glide.unconditional(), min(64, count))))
    return table(settings(calls, clip_scales, free_scales), count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, default=0, dest="count", help="pictures in each row of the table")
    parser.add_argument("--out", default="docs/glide.png")
    run_main(main, **vars(parser.parse_args()))
