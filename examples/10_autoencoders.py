"""Autoencoders: bits for a digit, and its reconstruction (Kingma & Welling 2014; van den Oord et al. 2017).

    python examples/10_autoencoders.py          trains both kinds, prints a table, writes autoencoders.png

    KL    z ~ N(mu, sigma^2), at each of 7 x 7 places     rate  KL(q(z|x) || N(0, I)) / log 2 bits
    VQ    one of K codes, at each of 7 x 7 places         rate  49 log2 K bits

Each picture of the test set is encoded to 49 places and decoded again. The judge, a classifier trained on MNIST, says
whether the digit is still the same. The last two rows of the picture show the mean of two digits: of their pixels,
which is a double exposure, and of their codes in the KL autoencoder, which decodes to one picture.
"""

import argparse
from pathlib import Path

import numpy as np

from minidiff import pictures
from minidiff.data import mnist
from minidiff.data.dataset import Dataset, load_dataset
from minidiff.data.digits import Digits
from minidiff.errors import run_main
from minidiff.evaluation.judge import load_judge
from minidiff.evaluation.reconstruction import Reconstruction, measure
from minidiff.systems.autoencoder import Autoencoder, KLAutoencoder, VQAutoencoder
from minidiff.training.run import TrainOptions, run


def trained(kind: type[Autoencoder], runs: str, data: Dataset, effort: float, config=None) -> Autoencoder:
    """The autoencoder of this kind in its folder; trains it, or resumes its training, if the folder has none."""
    folder = Path(runs) / kind.name
    if (folder / "model.safetensors").exists():
        return kind.load(folder / "model.safetensors")
    begun = (folder / "run.json").exists()
    return run(folder, kind, data, TrainOptions(effort=effort), config=config, resume=begun).system


def row(name: str, r: Reconstruction) -> str:
    book = f"{r.perplexity:.0f} | {100 * r.alive:.0f} %" if r.alive == r.alive else "- | -"
    return f"| {name} | {r.mse:.4f} | {r.psnr:.1f} dB | {100 * r.accuracy:.1f} % | {r.bits:.0f} | {book} |"


def main(count: int = 2000, effort: float = 1.0, data: str | None = None, runs: str = "runs",
         out: str = "autoencoders.png", configs=(None, None)) -> dict[str, Reconstruction]:
    pictures.check_writable(out)                            # fails now, not after the training
    train, judge = load_dataset(data), load_judge()
    kl, vq = (trained(kind, runs, train, effort, config)
              for kind, config in zip((KLAutoencoder, VQAutoencoder), configs, strict=True))
    test = load_dataset(data, "test") if data else Digits.of(mnist.packed(), held_out=True)
    x, digits = test.images(range(min(count, len(test)))), test.labels[:count]      # (N, 28, 28, 1)

    found = {model.name: measure(model, x, digits, judge) for model in (kl, vq)}
    print("| | MSE | PSNR | judge reads the digit | bits a picture | perplexity | codes alive |\n"
          "|---|---|---|---|---|---|---|")
    for name, r in found.items():
        print(row(name, r))

    # --- ten digits, both reconstructions, and halfway to the next one ---
    shown = x[[int(np.flatnonzero(digits == k)[0]) for k in range(10)]]
    z = kl.encode(shown)
    between = kl.decode((z + np.roll(z, -1, axis=0)) / 2)
    rows = [shown, kl.reconstruct(shown), vq.reconstruct(shown), (shown + np.roll(shown, -1, axis=0)) / 2, between]
    titles = ["image", "KL", "VQ", "half of each", "halfway in z"]
    captions = [title if k == 0 else "" for title in titles for k in range(10)]
    pictures.save(pictures.sheet(np.concatenate(rows), captions, columns=10), out)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="number of pictures to measure")
    parser.add_argument("--effort", type=float, default=1.0, help="the share of the training steps to take")
    parser.add_argument("--data", help="folder with MNIST's four files; without it, the packed training images")
    parser.add_argument("--runs", default="runs", help="folder for the trained autoencoders")
    parser.add_argument("--out", default="autoencoders.png")
    run_main(main, **vars(parser.parse_args()))
