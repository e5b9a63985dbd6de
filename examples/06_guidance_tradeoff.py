"""Classifier-free guidance: the effects of dropping captions in training and of the scale (Ho & Salimans 2022).

    python examples/06_guidance_tradeoff.py                 trains four small models, writes cfg_tradeoff.png

    training    the caption is replaced by '' with probability p_uncond                        algorithm 1
    sampling    eps = eps_uncond + scale (eps_cond - eps_uncond),   scale = 1 + w              algorithm 2, eq. 6

With a larger scale the pictures follow their captions more often and vary less: digit accuracy and precision rise,
recall falls, and FID, which depends on both, is best in between. The four models differ in p_uncond only. A model that
never dropped a caption has no unconditional branch: it never saw the caption '' in training, so its output for it is
arbitrary.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minidiff import pictures
from minidiff.data import mnist
from minidiff.data.dataset import Dataset, load_dataset
from minidiff.data.digits import Digits
from minidiff.errors import run_main
from minidiff.evaluation.fidelity import Fidelity, measure
from minidiff.evaluation.judge import load_judge
from minidiff.nn.unet import UNetConfig
from minidiff.pictures import plots
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.text.encoder import TextEncoderConfig
from minidiff.training.run import TrainOptions, run

CONFIG = TextToImageConfig(text=TextEncoderConfig(width=48), unet=UNetConfig(widths=(32, 64), embedding=128, text=48))


def trained(drop: float, data: Dataset, options: TrainOptions, runs: Path, config: TextToImageConfig) -> TextToImage:
    """The model trained with this share of its captions dropped; it is trained, or resumed, if it is not there yet."""
    folder = runs / f"drop-{100 * drop:g}"
    if (folder / "model.safetensors").exists():
        return TextToImage.load(folder / "model.safetensors")
    begun = (folder / "run.json").exists()
    return run(folder, TextToImage, data, options, config=replace(config, drop_caption=drop), resume=begun).system


def main(drops=(0.0, 0.1, 0.2, 0.5), scales=(0.0, 1.0, 2.0, 3.0, 5.0, 8.0), *, steps: int = 900, batch: int = 32,
         count: int = 300, sample_steps: int = 10, data: str | None = None, runs: str = "runs/guidance-tradeoff",
         out: str = "cfg_tradeoff.png", config: TextToImageConfig = CONFIG) -> dict[tuple[float, float], Fidelity]:
    pictures.check_writable(out)                            # fails now, not after the work
    judge, train = load_judge(), load_dataset(data)
    options = TrainOptions(steps=steps, batch=batch)

    # --- captions of `count` real images, the same at every point, and as many other real images ---
    rng, real = np.random.default_rng(0), Digits.of(mnist.packed(), held_out=True)
    chosen, others = np.split(rng.permutation(len(real))[:2 * count], 2)
    prompts = [real.caption(i, rng) for i in chosen]
    features, _ = judge.read(real.images(others))

    # --- every model at every scale ---
    measured = {}
    for drop in drops:
        model = trained(drop, train, options, Path(runs), config)
        for scale in tqdm(scales, desc=f"drop {100 * drop:g} %, scales", dynamic_ncols=True):
            images = model.sample(prompts, scale=scale, steps=sample_steps, seed=1)
            measured[drop, scale] = measure(images, prompts, features, judge)
    limit = measure(real.images(chosen), prompts, features, judge)                  # the figures of real images

    print("| captions dropped | scale | digit | attributes | FID | precision | recall |\n|---|---|---|---|---|---|---|")
    for (drop, scale), m in measured.items():
        print(f"| {100 * drop:g} % | {scale:g} | {m.row()} |")
    print(f"| real images | | {limit.row()} |")
    pictures.save(draw(measured, drops, scales), out)
    return measured


def draw(measured: dict[tuple[float, float], Fidelity], drops, scales):
    """Digit accuracy, precision and FID over recall: a line for each model, a dot for each scale above 0."""
    panels = []
    for what, title, label in (("digit", "follows the caption", "digit accuracy"),
                               ("precision", "looks real", "precision"), ("fid", "both in one number", "FID")):
        series = []
        for drop in drops:
            points = [measured[drop, scale] for scale in scales if scale]
            series.append((f"{100 * drop:g} % dropped", [p.recall for p in points],
                           [getattr(p, what) for p in points], "o-"))
        panels.append(plots.Panel(title, "recall: share of the data covered", label, series))
    return plots.panels(panels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--count", type=int, default=300, help="pictures at each point")
    parser.add_argument("--data", help="folder with MNIST's four files")
    parser.add_argument("--runs", default="runs/guidance-tradeoff", help="folder for the models")
    parser.add_argument("--out", default="cfg_tradeoff.png")
    run_main(main, **vars(parser.parse_args()))
