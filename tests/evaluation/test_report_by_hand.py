"""A small evaluation whose every number is computed here by hand: what each row of the report is a count of, and over
which pictures."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import linalg

from minidiff.data import attributes, digit_captions, mnist
from minidiff.data.pixels import to_float
from minidiff.engine.random import generator
from minidiff.engine.tensor import Tensor
from minidiff.evaluation import fidelity, likelihood, report
from minidiff.evaluation.emoji import EmojiReport
from minidiff.evaluation.likelihood import Likelihood
from minidiff.evaluation.pictures import PicturesReport
from minidiff.evaluation.report import Report, evaluate_digits, prompts_like

N, COUNT, SEED = 600, 48, 2


class Judge:
    """It reads from an image what `reads` says of its bytes, and else 0; its features are four sums of its pixels."""

    def __init__(self, reads: dict[bytes, int]):
        self.reads, self.notes = reads, {"accuracy": 0.875}
        rng = np.random.default_rng(3)
        self.weights = rng.standard_normal((784, 4)) / 28
        root = rng.standard_normal((4, 4))
        self.mean, self.cov = Tensor(rng.standard_normal(4)), Tensor(root @ root.T)

    def read(self, images):
        features = images.reshape(len(images), -1).astype(np.float64) @ self.weights
        return features, np.array([self.reads.get(image.tobytes(), 0) for image in images])


class Model:
    """It draws the real images `order`, whatever it is asked."""

    def __init__(self, images, order):
        self.images, self.order, self.made = images, order, 0

    def options(self):
        return {"scale": 2.0}

    def sample(self, prompts, *, streams, scale):
        self.made += len(prompts)
        return self.images[self.order[self.made - len(prompts):self.made]]


@pytest.fixture(scope="module")
def made():
    """The real images, the pictures, what was asked of them, the judge, and its report."""
    packed = mnist.packed()
    real = mnist.Images(packed.images[:N], packed.labels[:N], "some of MNIST's images")
    images, words = to_float(real.images)[..., None], attributes.name(attributes.measure(real.images))
    prompts = prompts_like(real, COUNT, generator(SEED, "captions of an evaluation"))
    asked = [digit_captions.parse(prompt) for prompt in prompts]

    def fitting(k: int) -> int:
        """An image that fits prompt k in as much as its place says: in all, digit, words, or by chance."""
        digit, wanted = asked[k]
        def right(i):
            fits = all(a in ("", b) for a, b in zip(wanted, words[i], strict=True))
            in_digit = real.labels[i] == digit
            return [2 * in_digit + fits, in_digit + 2 * fits, in_digit, fits, 0][k % 5] * N + (i * 37 + k * 11) % N
        return max(range(N), key=right)
    order = np.array([fitting(k) for k in range(len(prompts))])
    judge = Judge({image.tobytes(): int(label if i % 7 else (label + 1) % 10)       # it misreads every seventh
                   for i, (image, label) in enumerate(zip(images, real.labels, strict=True))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "packed", lambda: real)
        patch.setattr(report, "BATCH", 10)
        drawn, gaussian = [], report.gaussian_pixels
        sets, read = [], report.real_features
        patch.setattr(report, "real_features", lambda *a: sets.append(read(*a)) or sets[-1])
        patch.setattr(report, "gaussian_pixels", lambda *a: drawn.append((*a, gaussian(*a))) or drawn[-1][-1])
        clock = iter([100.0, 100.0 + 0.25 * len(prompts)])  # before the first picture, and after the last
        patch.setattr(report.time, "perf_counter", lambda: next(clock))
        found = evaluate_digits(Model(images, order), count=COUNT, seed=SEED, judge=judge)
    (compared,) = sets
    return real, images, words, order, asked, judge, found, drawn, compared


def by_hand_fid(judge, features) -> float:
    """With N - 1 in the covariance."""
    centred = features - features.mean(axis=0)
    cov, mean = centred.T @ centred / (len(features) - 1), judge.mean.data
    root = linalg.sqrtm(cov @ judge.cov.data).real
    return ((features.mean(axis=0) - mean) ** 2).sum() + np.trace(cov + judge.cov.data - 2 * root)


def by_hand_share(points, centres, k: int = 3) -> float:
    """The share of the points within reach of a centre, whose reach is the distance to its k-th other centre."""
    reach = [sorted(math.dist(c, other) for j, other in enumerate(centres) if j != i)[k - 1]
             for i, c in enumerate(centres)]
    return float(np.mean([any(math.dist(p, c) <= r for c, r in zip(centres, reach, strict=True)) for p in points]))


def by_hand_dark(images) -> dict:
    levels = [round(127.5 * (float(x) + 1)) for x in np.ravel(images)]
    return {"0": levels.count(0) / len(levels), "1-4": sum(1 <= v <= 4 for v in levels) / len(levels),
            "5-20": sum(5 <= v <= 20 for v in levels) / len(levels)}


def test_every_number_of_the_report(made):
    real, images, words, order, asked, judge, found, _, sets = made
    read = [judge.reads[images[i].tobytes()] for i in order]
    right = [digit == seen for (digit, _), seen in zip(asked, read, strict=True)]
    # (wanted, has) of each attribute that each prompt names
    named = [[(a, b) if a else None for a, b in zip(wanted, words[i], strict=True)]
             for (_, wanted), i in zip(asked, order, strict=True)]

    def agreement(rows, kinds=(0, 1, 2)) -> float:
        pairs = [row[k] for row in rows for k in kinds if row[k]]
        return sum(a == b for a, b in pairs) / len(pairs)
    all_right = [ok and all(pair is None or pair[0] == pair[1] for pair in row)
                 for ok, row in zip(right, named, strict=True)]
    features, _ = judge.read(images[order[:COUNT]])
    compared, floors = sets[0], [by_hand_fid(judge, chosen) for chosen in sets]
    mean = sum(floors) / len(floors)
    spread = math.sqrt(sum((floor - mean)**2 for floor in floors) / (len(floors) - 1))
    expected = {
        "seconds_per_image": 0.25, "images": COUNT, "held_out_images": len(asked) - COUNT, "seed": SEED,
        "options": {"scale": 2.0},
        "digit_accuracy": np.mean(right[:COUNT]), "held_out_digit_accuracy": np.mean(right[COUNT:]),
        "agreement": agreement(named[:COUNT]), "held_out_agreement": agreement(named[COUNT:]),
        "agreement_thickness": agreement(named[:COUNT], [0]), "agreement_slant": agreement(named[:COUNT], [1]),
        "agreement_width": agreement(named[:COUNT], [2]), "held_out_all_right": np.mean(all_right[COUNT:]),
        "fid": by_hand_fid(judge, features), "fid_floor": mean, "fid_floor_spread": spread, "judge_accuracy": 0.875,
        "precision": by_hand_share(features, compared), "recall": by_hand_share(compared, features),
        "dark_pixels": by_hand_dark(images[order[:COUNT]]), "dark_pixels_real": by_hand_dark(to_float(real.images)),
    }
    values = dataclasses.asdict(found)
    for name, value in expected.items():
        assert values.pop(name) == pytest.approx(value, rel=1e-6), name
    assert values.keys() == {"fid_ceiling"}
    # the rates tell one another apart, so that no two can be exchanged
    rates = [expected[name] for name in ("digit_accuracy", "held_out_digit_accuracy", "agreement", "held_out_agreement",
                                         "agreement_thickness", "agreement_slant", "agreement_width",
                                         "held_out_all_right", "precision", "recall")]
    assert len({round(rate, 9) for rate in rates}) == len(rates), rates
    assert 0 < expected["held_out_all_right"] < min(expected["held_out_digit_accuracy"], 1)


def test_the_ceiling_is_of_as_many_draws_from_the_pixels_gaussian(made):
    real, *_, judge, found, drawn, _ = made
    (images, count, _, draws), = drawn
    assert images is real.images and (count, len(draws)) == (COUNT, COUNT)
    assert found.fid_ceiling == pytest.approx(by_hand_fid(judge, judge.read(draws)[0]), rel=1e-6)


def test_the_floor_draws_real_images_at_random(made):
    """Each set has as many different real images as there are pictures, and no set is the first of them, or another.

    Two random sets of 60 of 200 images are equal with probability 1e-51.
    """
    real, images, *_, judge, _, _, sets = made
    features, _ = judge.read(images)
    # equal to rounding, which depends on how many images a product takes at once
    near = [(abs(features[:, None] - one) < 1e-9).all(axis=2) for one in sets]      # each (real images, COUNT)
    assert all((found.sum(axis=0) == 1).all() for found in near)        # each is one real image, and no other
    chosen = [found.argmax(axis=0).tolist() for found in near]
    assert sets.shape == (report.DRAWS, COUNT, 4) and all(len(set(one)) == COUNT for one in chosen)
    assert len({frozenset(one) for one in [*chosen, range(COUNT)]}) == report.DRAWS + 1


def test_every_real_image_is_drawn_equally_often():
    """2,000 sets of 3 of 10: each image is in 600 of them, sigma sqrt(2,000 0.3 0.7); 5 sigmas, false alarm 6e-6."""
    real = mnist.Images(np.arange(10, dtype=np.uint8).reshape(10, 1, 1), np.arange(10), "ten grey levels")

    class Reader:
        def read(self, images):
            return images.reshape(len(images), -1), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DRAWS", 2000)
        drawn = report.real_features(Reader(), real, 3, np.random.default_rng(0))
    levels, often = np.unique(drawn, return_counts=True)
    np.testing.assert_allclose(levels, to_float(real.images).ravel())
    assert (abs(often - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7)).all()


def test_fidelity_is_the_same_numbers(made):
    """`measure` of pictures, captions and real features: the report's, over all of its pictures."""
    real, images, words, order, asked, judge, found, _, sets = made
    prompts = prompts_like(real, COUNT, generator(SEED, "captions of an evaluation"))[:COUNT]
    small = fidelity.measure(images[order[:COUNT]], prompts, sets[0], judge)
    assert dataclasses.astuple(small) == pytest.approx((found.digit_accuracy, found.agreement, found.fid,
                                                        found.precision, found.recall), rel=1e-9)


def test_pictures_are_those_of_their_prompts_in_order(made):
    """Batches that are not full included."""
    class Numbers:
        def sample(self, prompts, *, streams):
            return np.array([[float(p)] for p in prompts])
    for batch in (1, 3, 10, 256):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "BATCH", batch)
            drawn = report.draw(Numbers(), [str(i) for i in range(10)], {}, 0)
        assert drawn.ravel().tolist() == list(range(10))


def test_each_prompt_is_of_one_real_image_in_digit_and_words():
    """Of 40 images, each once; those of held-out combinations come last, and name both of their words."""
    packed = mnist.packed()
    real = mnist.Images(packed.images[:40], packed.labels[:40], "40 of MNIST's images")
    words = attributes.name(attributes.measure(real.images))
    asked = [digit_captions.parse(p) for p in prompts_like(real, 40, np.random.default_rng(1))]

    def fits(digit, wanted, i) -> bool:
        return digit == real.labels[i] and all(a in ("", b) for a, b in zip(wanted, words[i], strict=True))
    assert sorted(digit for digit, _ in asked[:40]) == sorted(real.labels.tolist())
    assert all(any(fits(*a, i) for i in range(40)) for a in asked[:40])
    assert [digit for digit, _ in asked[:40]] != real.labels.tolist()               # and in another order
    held_out = [(digit, w.thickness, w.slant) for digit, w in asked[40:]]
    assert len(held_out) == len(attributes.HELD_OUT) and set(held_out) == attributes.HELD_OUT


def test_the_gaussian_of_the_pixels_has_their_covariance():
    """Of three pixels that are never clipped, each correlated with the next.  The deviation of a covariance of 20,000
    draws is at most sqrt(2 / n) times the largest variance, 0.04; six of them."""
    rng = np.random.default_rng(0)
    cov = np.array([[0.01, 0.01, 0.0], [0.01, 0.04, -0.015], [0.0, -0.015, 0.02]])
    x = rng.multivariate_normal([0, 0.1, -0.1], cov, 5000)
    images = np.rint(127.5 * (x.clip(-1, 1) + 1)).astype(np.uint8).reshape(-1, 1, 3)
    draws = report.gaussian_pixels(images, 20_000, rng).reshape(-1, 3)
    values = to_float(images).reshape(-1, 3)
    np.testing.assert_allclose(draws.mean(axis=0), values.mean(axis=0), atol=6 * 0.2 / math.sqrt(20_000))
    np.testing.assert_allclose(np.cov(draws.T), np.cov(values.T), atol=6 * 0.06 / math.sqrt(20_000))


# ---- the tables for people -----------------------------------------------------------------------------------------

REPORT = Report(images=400, digit_accuracy=0.9, agreement=0.81, agreement_thickness=0.72, agreement_slant=0.63,
                agreement_width=0.54, held_out_images=100, held_out_digit_accuracy=0.8, held_out_agreement=0.45,
                held_out_all_right=0.36, fid=12.345, fid_floor=1.234, fid_floor_spread=0.321, fid_ceiling=98.76,
                dark_pixels={"0": 0.321, "1-4": 0.25, "5-20": 0.1234},
                dark_pixels_real={"0": 0.8, "1-4": 0.001, "5-20": 0.01}, judge_accuracy=0.9912, precision=0.777,
                recall=0.666, seconds_per_image=0.0123,
                options={"scale": 2.0, "sampler": "ddim"}, seed=7)


def test_the_rows_of_a_report():
    """Each rate with its own standard error, sqrt(p (1 - p) / n) over its own pictures."""
    assert REPORT.rows() == [
        ("prompt accuracy (digit)", "90.0 % +- 1.5"),       # sqrt(.9 .1 / 400)
        ("attribute agreement", "81.0 %  (thickness 72.0, slant 63.0, width 54.0)"),
        ("held-out: digit", "80.0 % +- 4.0"),               # sqrt(.8 .2 / 100)
        ("held-out: attributes", "45.0 %"),
        ("held-out: all right", "36.0 % +- 4.8"),           # sqrt(.36 .64 / 100)
        ("FID", "12.35  (floor 1.23 +- 0.32, ceiling 98.8)"),
        ("precision, recall", "0.777, 0.666"),
        ("pixels at 0, 1-4, 5-20", "32.1, 25.0, 12.3 %  (real images 80.0, 0.1, 1.0)"),
        ("images", "400 + 100 held-out, scale 2, sampler ddim, seed 7"),
        ("seconds per image", "0.012"),
        ("judge's own accuracy", "99.12 % of MNIST's test set"),
    ]


def test_the_rows_of_a_likelihood():
    rows = Likelihood(images=50, prior=0.001, steps=1.2, decoder=0.3, bound=1.501, bound_error=0.02, flow_images=5,
                      flow_density=0.9, flow_decoder=0.4, flow=1.3, flow_error=0.05, terms=10, flow_steps=40,
                      sigma=0.01234, source="30 tests", seed=3, seconds=61.4).rows()
    assert rows == [
        ("bits/dim, bound", "1.501 +- 0.020  (an estimate, +- one standard error)"), ("  L_T", "0.001"),
        ("  sum of L_{t-1}", "1.200"), ("  decoder", "0.300"), ("bits/dim, flow", "1.300 +- 0.050"),
        ("  density at t = 0", "0.900"), ("  decoder", "0.400"),
        ("images", "50 of 30 tests, 5 of them for the flow; seed 3"),
        ("model of", "all images: no caption (the null caption where it reads captions), no guidance"),
        ("data", "8-bit values as they are; each has a probability, so no offset is owed"),
        ("bound", "10 of the L_{t-1} an image, drawn without bias; variances beta_t; x0_hat clipped to [-1, 1]"),
        ("flow", "Heun, extrapolated from 40 steps and from half as many; Hutchinson's trace, one probe an image; the "
                 "noise of t = 0 as dequantisation"),
        ("decoder", "a Gaussian of sigma 0.01234 over bins of 2/255, the outer ones open"), ("seconds", "61")]


def test_the_rows_of_a_report_on_emoji():
    report = EmojiReport(images=400, r1=0.9, r5=0.5, error=0.1234, held_out_images=100, held_out_r1=0.8,
                         held_out_r5=0.36, held_out_error=0.5678, ceiling=0.987, among=3786, seconds_per_image=0.0456,
                         options={"scale": 2.0, "steps": 20}, seed=3,
                         clip={"r1": 0.1, "r5": 0.2, "held_out_r1": 0.64, "held_out_r5": 1.0, "file": "c"})
    assert report.rows() == [
        ("seen names: R@1", "90.0 % +- 1.5"), ("seen names: R@5", "50.0 % +- 2.5"), ("seen names: error", "0.123"),
        ("held-out: R@1", "80.0 % +- 4.0"), ("held-out: R@5", "36.0 % +- 4.8"), ("held-out: error", "0.568"),
        ("ceiling: R@1 of the true pictures", "98.7 %"),
        ("seen names: R@1, R@5 by CLIP's features", "10.0 % +- 1.5, 20.0 % +- 2.0"),
        ("held-out: R@1, R@5 by CLIP's features", "64.0 % +- 4.8, 100.0 % +- 0.0"),
        ("images", "400 + 100 held-out, among 3786 real; scale 2, steps 20, seed 3"), ("seconds per image", "0.046")]


def test_the_rows_of_a_report_on_pictures():
    report = PicturesReport(images=400, r1=0.9, r5=0.5, real_r1=0.95, real_r5=0.99, captions=120, fid=0.12345,
                            fid_floor=0.01, precision=0.75, recall=0.625, compared=60, judge="c",
                            seconds_per_image=0.0456, options={"scale": 2.0}, seed=3)
    assert report.rows() == [
        ("caption found: R@1", "90.0 % +- 1.5  (real pictures 95.0 %)"),
        ("caption found: R@5", "50.0 % +- 2.5  (real pictures 99.0 %)"),
        ("FID", "0.1235  (floor 0.0100)"), ("precision, recall", "0.750, 0.625"),
        ("images", "400 of 120 captions, compared with 60 real ones, scale 2, seed 3"), ("seconds per image", "0.046")]


def test_standard_errors_are_of_means_with_n_minus_1():
    mean, error = likelihood._mean_error(np.array([1.0, 2.0, 4.0, 9.0]))
    assert mean == 4 and error == pytest.approx(math.sqrt((9 + 4 + 0 + 25) / 3 / 4))
