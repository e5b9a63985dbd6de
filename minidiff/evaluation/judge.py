"""How good are the pictures?  Judged by a frozen classifier and by the measurements that the captions use.

    prompt accuracy     the share of pictures that the classifier reads as the digit that was asked for
    agreement           the share of the asked-for attributes (thin, leaning left, ...) that measure as asked
    FID                 ||mu_1 - mu_2||^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))           (Heusel et al. 2017, eq. 6)

FID compares the mean and covariance of the classifier's 64 features over generated pictures with those over
MNIST's 10,000 test images.  Beside it stand a floor, as many real training images in the pictures' place,
and a ceiling, as many draws from one Gaussian fitted to the pixels: FID depends on the number of images and on
the classifier, and means nothing without them.  Precision and recall (fidelity.py) tell apart what FID mixes: pictures
that are no digits, and digits that are never drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minidiff import checkpoint
from minidiff.data import attributes, mnist
from minidiff.data import digit_captions as captions
from minidiff.data.attributes import Words
from minidiff.data.pixels import to_float
from minidiff.engine import ops
from minidiff.engine.parallel import parallel_gradients
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.evaluation.metrics import precision_recall
from minidiff.files import check_writable
from minidiff.nn.digit_classifier import SHIPPED, classifier_in
from minidiff.nn.image_classifier import ImageClassifier, ImageClassifierConfig
from minidiff.nn.optim import AdamW, WarmupCosine

BATCH = 256                                                 # images sampled at a time


def train_classifier(images: np.ndarray, labels: np.ndarray, *, epochs: int = 6, batch: int = 128, seed: int = 0,
                     progress: Callable = lambda steps: steps) -> ImageClassifier:
    """Learns from uint8 images (N, 28, 28), each shifted by up to two pixels at every sight of it."""
    rng = np.random.default_rng(seed)
    model = ImageClassifier(ImageClassifierConfig(), rng)
    parameters = model.parameters()
    optimiser, leaves = AdamW(parameters), list(parameters.values())
    steps = epochs * (len(images) // batch)
    lr = WarmupCosine(2e-3, steps)
    x = np.pad(to_float(images)[..., None], ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    order = np.concatenate([rng.permutation(len(x))[:len(x) // batch * batch] for _ in range(epochs)])
    for step in progress(range(steps)):
        chosen = order[step * batch:(step + 1) * batch]
        shifts = rng.integers(0, 5, (batch, 2))
        seen = np.stack([x[n, i:i + 28, j:j + 28] for n, (i, j) in zip(chosen, shifts, strict=True)])
        asked = labels[chosen].astype(np.int64)
        _, grads = parallel_gradients(lambda p: ops.cross_entropy(model(Tensor(seen[p])), asked[p]),  # noqa: B023
                                      leaves, batch)
        optimiser.step(grads, lr(step))
    return model


# --- the judge --------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Judge:
    """A frozen classifier, its accuracy on MNIST's test set, and what FID compares with."""

    classifier: ImageClassifier
    accuracy: float                         # on the 10,000 test images
    mean: np.ndarray                        # (64,) of the test images' features
    cov: np.ndarray                         # (64, 64)

    @classmethod
    def train(cls, train: mnist.Images, test: mnist.Images, *, seed: int = 0, epochs: int = 6,
              progress: Callable = lambda steps: steps) -> Judge:
        """Learns from the one and measures itself on the other, with weights rounded to float16 as in its file."""
        classifier = train_classifier(train.images, train.labels, epochs=epochs, seed=seed, progress=progress)
        classifier.astype(np.float16).astype(np.float32)
        features, digits = classifier.read(to_float(test.images)[..., None])
        return cls(classifier, float((digits == test.labels).mean()), *_mean_cov(features))

    def save(self, path: str | Path) -> None:
        tensors = {f"classifier.{name}": w.astype(np.float16) for name, w in self.classifier.state_dict().items()}
        checkpoint.save(path, tensors | {"mean": self.mean, "cov": self.cov},
                        {"system": "digit-classifier", "config": {}, "notes": {"accuracy": self.accuracy}})

    @classmethod
    def load(cls, path: str | Path = SHIPPED) -> Judge:
        """The judge that comes with minidiff, or another's file; UserError if it is none."""
        saved = checkpoint.load(path)
        notes = saved.meta.get("notes")
        if saved.meta.get("system") != "digit-classifier" or not isinstance(notes, dict) \
                or not isinstance(notes.get("accuracy"), float):
            raise UserError(f"{path} holds {str(saved.meta.get('system'))[:40]!r}, and a judge was asked for.")
        classifier = classifier_in(saved)
        others = {name: a for name, a in saved.tensors.items() if not name.startswith("classifier.")}
        checkpoint.check_shapes({"mean": (64,), "cov": (64, 64)}, others, path)
        return cls(classifier, notes["accuracy"], others["mean"], others["cov"])

    def fid(self, features: np.ndarray) -> float:
        """FID between features (N, 64) and those of the test images."""
        return frechet_distance(*_mean_cov(features), self.mean, self.cov)


def cached_judge(data_dir: str | Path | None = None, *, train: bool = False) -> Judge:
    """The shipped judge; with train=True one trained on this machine from all of MNIST, once, and then cached."""
    if not train:
        return Judge.load()
    path = mnist.cache_dir().parent / "judge.safetensors"
    if path.exists():
        return Judge.load(path)
    from tqdm import tqdm
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    images = mnist.load(data_dir)
    if len(images) < 60_000:
        raise UserError(f"a judge is trained on all 60,000 images of MNIST, and {images.source} has {len(images)}: "
                        "name their folder with --data, or leave out --train-judge")
    judge = Judge.train(images, mnist.load(data_dir, "test"),
                        progress=lambda steps: tqdm(steps, desc="training the judge", dynamic_ncols=True))
    judge.save(path)
    return judge


def frechet_distance(mu1, S1, mu2, S2) -> float:
    """||mu1 - mu2||^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), between Gaussians; means (D,), covariances (D, D)."""
    # (S1 S2)^(1/2) has the eigenvalues of (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric
    values, vectors = np.linalg.eigh(S1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T                            # S1^(1/2)
    trace = np.sqrt(np.linalg.eigvalsh(root @ S2 @ root).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * trace)


def _mean_cov(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = features.astype(np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


# --- the report -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Report:
    """What `evaluate` measured; rates are shares of 1."""

    images: int                             # over which all but the held_out rates are taken
    digit_accuracy: float
    agreement: float                        # over all attributes asked for
    agreement_thickness: float
    agreement_slant: float
    agreement_width: float
    held_out_images: int
    held_out_digit_accuracy: float
    held_out_agreement: float
    held_out_all_right: float               # the digit and every attribute asked for
    fid: float
    fid_floor: float                        # as many real training images
    fid_ceiling: float                      # as many draws from a Gaussian fitted to the pixels
    judge_accuracy: float
    precision: float                        # improved precision and recall, among as many real training images
    recall: float
    seconds_per_image: float
    options: dict                           # of sampling: scale, steps, ...
    seed: int

    def rows(self) -> list[tuple[str, str]]:
        """The table for people: (what, value), rates with their standard error."""
        def rate(p: float, n: int) -> str:
            return f"{100 * p:.1f} % +- {100 * (max(p * (1 - p), 0) / max(n, 1)) ** 0.5:.1f}"
        return [
            ("prompt accuracy (digit)", rate(self.digit_accuracy, self.images)),
            ("attribute agreement", f"{100 * self.agreement:.1f} %  (thickness {100 * self.agreement_thickness:.1f}, "
                                    f"slant {100 * self.agreement_slant:.1f}, width {100 * self.agreement_width:.1f})"),
            ("held-out: digit", rate(self.held_out_digit_accuracy, self.held_out_images)),
            ("held-out: attributes", f"{100 * self.held_out_agreement:.1f} %"),
            ("held-out: all right", rate(self.held_out_all_right, self.held_out_images)),
            ("FID", f"{self.fid:.2f}  (floor {self.fid_floor:.2f}, ceiling {self.fid_ceiling:.1f})"),
            ("precision, recall", f"{self.precision:.3f}, {self.recall:.3f}"),
            ("images", f"{self.images} + {self.held_out_images} held-out, {told(self.options)}seed {self.seed}"),
            ("seconds per image", f"{self.seconds_per_image:.3f}"),
            ("judge's own accuracy", f"{100 * self.judge_accuracy:.2f} % of MNIST's test set"),
        ]

    def as_dict(self) -> dict:
        return asdict(self)


def told(options: Mapping) -> str:
    """{"scale": 2.0, "steps": 15} as "scale 2, steps 15, "."""
    return "".join(f"{name} {value:g}, " if isinstance(value, (int, float)) else f"{name} {value}, "
                   for name, value in options.items())


def prompts_like(real: mnist.Images, count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions of real images, and then a fifth as many of held-out combinations.

    The captions are drawn for images among `real`, so that the digits and words asked for are as frequent as in the
    data; 4.9 % of them are of held-out combinations, too.
    """
    if not 2 <= count <= len(real.labels):
        raise UserError(f"images must be 2 to {len(real.labels)}, the number of real ones beside them, not {count}")
    chosen = rng.permutation(len(real.labels))[:count]
    words = attributes.name(attributes.measure(real.images[chosen]))
    prompts = [captions.caption(rng, int(real.labels[i]), seen) for i, seen in zip(chosen, words, strict=True)]
    combinations = sorted(attributes.HELD_OUT)
    unseen = [combinations[i % len(combinations)] for i in range(max(count // 5, len(combinations)))]
    return prompts + [captions.caption(rng, digit, Words(thickness, slant), keep=1.0)
                      for digit, thickness, slant in unseen]


def evaluate(model, *, count: int = 1000, options: Mapping | None = None, seed: int = 0,
             judge: Judge | None = None, progress: Callable = lambda batches: batches) -> Report:
    """Samples `count` captions of real images, and a fifth as many of held-out combinations, and judges them.

    model: any system that draws captions: model.sample(captions, streams=..., **options).  The captions come from the
    first 10,000 training images.
    """
    judge = judge or Judge.load()
    options = {"scale": 2.0, "steps": 20} if options is None else dict(options)
    real = mnist.packed()
    rng = np.random.default_rng([seed, 3])
    prompts = prompts_like(real, count, rng)

    started = time.perf_counter()
    batches = [range(i, min(i + BATCH, len(prompts))) for i in range(0, len(prompts), BATCH)]
    streams = SampleStreams(seed, len(prompts))
    images = np.concatenate([
        model.sample(prompts[batch.start:batch.stop], streams=streams[batch.start:batch.stop], **options)
        for batch in progress(batches)])
    seconds = (time.perf_counter() - started) / len(prompts)

    features, digits = judge.classifier.read(images)
    found = attributes.name(attributes.measure(images[..., 0]))
    asked = [captions.parse(prompt) for prompt in prompts]
    right = np.array([digit == a for digit, (a, _) in zip(digits, asked, strict=True)])
    matches = np.array([[a and a == f for a, f in zip(wanted, words, strict=True)]
                        for (_, wanted), words in zip(asked, found, strict=True)], dtype=bool)      # (N, 3)
    wanted = np.array([[bool(a) for a in wanted] for _, wanted in asked])                           # (N, 3)
    thickness, slant, width = matches[:count].sum(axis=0) / np.maximum(wanted[:count].sum(axis=0), 1)
    return Report(
        images=count, digit_accuracy=float(right[:count].mean()),
        agreement=float(matches[:count].sum() / max(wanted[:count].sum(), 1)),
        agreement_thickness=float(thickness), agreement_slant=float(slant), agreement_width=float(width),
        held_out_images=len(prompts) - count, held_out_digit_accuracy=float(right[count:].mean()),
        held_out_agreement=float(matches[count:].sum() / wanted[count:].sum()),
        held_out_all_right=float((right & (matches == wanted).all(axis=1))[count:].mean()),
        **fidelity(judge, features[:count], real, rng), judge_accuracy=judge.accuracy, seconds_per_image=seconds,
        options=options, seed=seed)


def fidelity(judge: Judge, features: np.ndarray, real: mnist.Images, rng: np.random.Generator) -> dict[str, float]:
    """FID, its floor and ceiling, precision and recall of pictures' features (N, 64), beside N real images."""
    beside, _ = judge.classifier.read(to_float(real.images[:len(features)])[..., None])
    ceiling, _ = judge.classifier.read(gaussian_pixels(real.images, len(features), rng))
    precision, recall = precision_recall(beside, features)
    return {"fid": judge.fid(features), "fid_floor": judge.fid(beside), "fid_ceiling": judge.fid(ceiling),
            "precision": precision, "recall": recall}


def gaussian_pixels(images: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The naive generator: (count, 28, 28, 1) draws from the Gaussian with the pixels' mean and covariance."""
    x = to_float(images).reshape(len(images), -1).astype(np.float64)
    mean, cov = _mean_cov(x)
    values, vectors = np.linalg.eigh(cov)
    draws = mean + rng.standard_normal((count, len(mean))) * np.sqrt(values.clip(0)) @ vectors.T
    return draws.clip(-1, 1).reshape(count, *images.shape[1:], 1).astype(np.float32)
