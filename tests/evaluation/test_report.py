"""The judge and the report: law 34 for FID, and a generator that cheats must be seen through."""

import math

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from support import tiny

from minidiff import checkpoint
from minidiff.data import attributes, mnist
from minidiff.data import digit_captions as captions
from minidiff.data.pixels import to_float
from minidiff.evaluation.judge import Judge, evaluate, frechet_distance, gaussian_pixels, train_classifier


@pytest.mark.law(
    34, "FID in one dimension is (m1 - m2)^2 + (s1 - s2)^2",
    source="Heusel et al. 2017, eq. 6; commuting roots",
    tolerance="1e-7: the square root of s1^2 s2^2, rounded at 1e-16, where s is 0")
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 4), st.floats(0, 4))
def test_in_one_dimension_the_distance_is_that_of_means_and_deviations(m1, m2, s1, s2):
    """Law 34: (m1 - m2)^2 + (s1 - s2)^2."""
    found = frechet_distance(np.array([m1]), np.array([[s1**2]]), np.array([m2]), np.array([[s2**2]]))
    assert found == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, abs=1e-7)


@pytest.mark.law(
    34, "FID between Gaussians is ||mu1 - mu2||^2 + Tr(S1 + S2 - 2 (S1 S2)^{1/2}); it is 0 between equals, and "
        "symmetric",
    source="Heusel et al. 2017, eq. 6; scipy's matrix square root",
    tolerance="1e-7: a root of a matrix that is not symmetric, of condition up to 1e4")
@given(st.integers(1, 6), st.integers(0, 10_000))
def test_against_a_general_matrix_square_root(D, seed):
    rng = np.random.default_rng(seed)
    (m1, m2), (a, b) = rng.standard_normal((2, D)), rng.standard_normal((2, D, D))
    S1, S2 = a @ a.T + 0.01 * np.eye(D), b @ b.T + 0.01 * np.eye(D)
    root = scipy.linalg.sqrtm(S1 @ S2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(S1 + S2 - 2 * root)
    assert frechet_distance(m1, S1, m2, S2) == pytest.approx(expected, rel=1e-7, abs=1e-7)
    assert frechet_distance(m1, S1, m1, S1) == pytest.approx(0, abs=1e-9 * np.trace(S1))
    assert frechet_distance(m2, S2, m1, S1) == pytest.approx(frechet_distance(m1, S1, m2, S2), rel=1e-7, abs=1e-7)


def test_the_gaussian_of_the_pixels_has_their_mean():
    """Mean of 2,000 draws against that of the images: 6 sigmas a pixel (false alarm 784 x 2e-9), and 0.1 for the
    clipping to [-1, 1], which moves the mean of a pixel that is black or white often."""
    images = mnist.packed().images[:500]
    x = to_float(images)
    draws = gaussian_pixels(images, 2000, np.random.default_rng(0))
    assert draws.shape == (2000, 28, 28, 1) and np.abs(draws).max() <= 1
    inner = np.abs(x.mean(axis=0)) < 0.2                    # where clipping to [-1, 1] hardly matters
    sigma = x.std(axis=0, ddof=1)[inner] / math.sqrt(2000)
    difference = np.abs(draws[..., 0].mean(axis=0) - x.mean(axis=0))[inner]
    assert (difference < 6 * sigma + 0.1).all()


class Cheat:
    """Answers a caption with a real image that it holds of."""

    def __init__(self, start: int):
        real = mnist.packed()
        self.images, self.labels = real.images[start:start + 3000], real.labels[start:start + 3000]
        self.words = attributes.name(attributes.measure(self.images))

    def sample(self, prompts, *, scale, steps, streams):
        rng, chosen = np.random.default_rng(len(prompts)), []
        for prompt in prompts:
            digit, wanted = captions.parse(prompt)
            fits = [i for i in range(len(self.labels)) if self.labels[i] == digit
                    and all(a in ("", f) for a, f in zip(wanted, self.words[i], strict=True))]
            chosen.append(rng.choice(fits))
        return to_float(self.images[chosen])[..., None]


class Blind(Cheat):
    """Answers every caption with any real image."""

    def sample(self, prompts, *, scale, steps, streams):
        chosen = np.random.default_rng(len(prompts)).integers(0, len(self.labels), len(prompts))
        return to_float(self.images[chosen])[..., None]


def test_real_images_that_fit_their_captions_get_full_marks():
    report = evaluate(Cheat(0), count=200)
    assert report.digit_accuracy > 0.97 and report.held_out_digit_accuracy > 0.9      # the judge errs, too
    assert report.agreement == report.agreement_slant == report.held_out_agreement == 1
    assert report.fid < 3 * report.fid_floor < report.fid_ceiling


def test_real_images_that_do_not_fit_get_the_marks_of_chance():
    report = evaluate(Blind(0), count=200)
    # one in ten digits is right by chance; 200 draws, 5 sigmas: false alarm 1e-6
    assert report.digit_accuracy < 0.1 + 5 * math.sqrt(0.1 * 0.9 / 200)
    assert report.agreement < 0.7 and report.held_out_all_right < 0.2
    assert report.fid < 3 * report.fid_floor


def test_noise_gets_an_fid_beyond_the_ceiling():
    class Noise:
        def sample(self, prompts, **options):
            return np.random.default_rng(0).uniform(-1, 1, (len(prompts), 28, 28, 1)).astype(np.float32)
    report = evaluate(Noise(), count=50)
    assert report.fid > report.fid_ceiling and report.digit_accuracy < 0.4


def test_the_report_is_reproducible():
    a, b = evaluate(Blind(0), count=20, seed=3), evaluate(Blind(0), count=20, seed=3)
    different = {k for k, v in a.as_dict().items() if v != b.as_dict()[k]}
    assert different <= {"seconds_per_image"}


def test_the_shipped_judge_reads_what_it_was_not_trained_for():
    judge = Judge.load()
    assert judge.accuracy >= 0.99                           # as its maker measured it: see the README for the command
    assert np.allclose(judge.cov, judge.cov.T) and np.linalg.eigvalsh(judge.cov).min() > -1e-9
    _, digits = judge.classifier.read(to_float(tiny.images(500).images)[..., None])
    assert (digits == tiny.images(500).labels).mean() > 0.985


def test_judge_save_and_load(tmp_path):
    images = tiny.images(128)
    judge = Judge.train(images, images, epochs=1)
    judge.save(tmp_path / "judge.safetensors")
    loaded = Judge.load(tmp_path / "judge.safetensors")
    assert loaded.accuracy == judge.accuracy and np.array_equal(loaded.cov, judge.cov)
    x = to_float(images.images)[..., None]
    assert np.array_equal(judge.classifier.read(x)[0], loaded.classifier.read(x)[0])


def test_a_file_that_is_no_judge_is_refused(tmp_path):
    checkpoint.save(tmp_path / "x.safetensors", {"a": np.zeros(3)}, {"system": "text-to-image"})
    with pytest.raises(ValueError, match="x.safetensors.*judge"):
        Judge.load(tmp_path / "x.safetensors")


def test_the_classifier_learns():
    images = mnist.packed()
    model = train_classifier(images.images[:2000], images.labels[:2000], epochs=2, batch=64)
    _, digits = model.read(to_float(images.images[2000:2500])[..., None])
    assert (digits == images.labels[2000:2500]).mean() > 0.85
