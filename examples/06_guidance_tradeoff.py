"""Classifier-free guidance: the effects of dropping captions in training and of the scale (Ho & Salimans 2022).

    python examples/06_guidance_tradeoff.py                 trains four small models, writes cfg_tradeoff.png

    training    the caption is replaced by '' with probability p_uncond                        (algorithm 1)
    sampling    eps = eps_uncond + scale (eps_cond - eps_uncond),   scale = 1 + w              (algorithm 2, eq. 6)

With a larger scale the pictures follow their captions more often and vary less: digit accuracy and precision rise,
recall falls, and FID, which depends on both, is best in between. The four models differ in p_uncond only. A model that
never dropped a caption has no unconditional branch: it never saw the caption '' in training, so its output for it is
arbitrary.
"""

import argparse
from pathlib import Path

import numpy as np
from minidiff.training.main_job import TrainConfig, Trainer, new_model
from tqdm import tqdm

from minidiff import pictures
from minidiff.data import attributes, mnist
from minidiff.data import digit_captions as captions
from minidiff.data.digits import CaptionedDigits
from minidiff.data.pixels import to_float
from minidiff.errors import run_main
from minidiff.evaluation.judge import Judge
from minidiff.evaluation.metrics import Fidelity, measure
from minidiff.nn.unet import UNetConfig
from minidiff.pictures import plots
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.text.encoder import TextEncoderConfig

CONFIG = TextToImageConfig(text=TextEncoderConfig(width=48), unet=UNetConfig(widths=(32, 64), embedding=128, text=48))


def trained(drop: float, data: CaptionedDigits, steps: int, batch: int, folder: Path, config: TextToImageConfig
            ) -> TextToImage:
    """The model trained with this share of its captions dropped; trains it unless the folder has it."""
    path = folder / f"drop-{100 * drop:g}.safetensors"
    if path.exists():
        return TextToImage.load(path)
    trainer = Trainer(new_model(data, config, seed=0), data, TrainConfig(steps=steps, batch=batch, drop_caption=drop))
    for _ in tqdm(range(steps), desc=f"drop {100 * drop:g} %", unit="step", dynamic_ncols=True):
        trainer.step()
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.averaged()
    model.save(path)
    return model


def main(drops=(0.0, 0.1, 0.2, 0.5), scales=(0.0, 1.0, 2.0, 3.0, 5.0, 8.0), *, steps: int = 900, batch: int = 32,
         count: int = 300, sample_steps: int = 10, data: str | None = None, runs: str = "runs/guidance-tradeoff",
         out: str = "cfg_tradeoff.png", config: TextToImageConfig = CONFIG) -> dict[tuple[float, float], Fidelity]:
    pictures.check_writable(out)                            # fails now, not after the work
    judge, train = Judge.load(), CaptionedDigits.of(mnist.load(data))

    # --- captions of `count` real images, the same at every point, and as many other real images ---
    rng, real = np.random.default_rng(0), mnist.packed()
    chosen, others = np.split(rng.permutation(len(real))[:2 * count], 2)
    words = attributes.name(attributes.measure(real.images[chosen]))
    prompts = [captions.caption(rng, int(real.labels[i]), seen) for i, seen in zip(chosen, words, strict=True)]
    features, _ = judge.classifier.read(to_float(real.images[others])[..., None])

    # --- every model at every scale ---
    measured = {}
    for drop in drops:
        model = trained(drop, train, steps, batch, Path(runs), config)
        for scale in tqdm(scales, desc=f"drop {100 * drop:g} %, scales", dynamic_ncols=True):
            images = model.sample(prompts, scale=scale, steps=sample_steps, seed=1)
            measured[drop, scale] = measure(images, prompts, features, judge)
    limit = measure(to_float(real.images[chosen])[..., None], prompts, features, judge)     # the figures of real images

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
