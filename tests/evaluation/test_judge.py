"""The judge: the one that comes with minidiff, one that is trained here, and files that cannot judge."""

import numpy as np
import pytest
from support import small_systems, tiny

from minidiff import checkpoint
from minidiff.data import mnist
from minidiff.data.digits import Digits
from minidiff.errors import UserError
from minidiff.evaluation.judge import fid, load_judge
from minidiff.evaluation.metrics import frechet_distance, mean_cov
from minidiff.systems.digit_classifier import DigitClassifier
from minidiff.training.run import TrainOptions, run


def packed_images(first: int, last: int) -> mnist.Images:
    packed = mnist.packed()
    return mnist.Images(packed.images[first:last], packed.labels[first:last], "a part of MNIST's images")


def test_the_shipped_judge_reads_digits():
    judge = load_judge()
    assert judge.notes["accuracy"] >= 0.99                  # on the test images: weights/README.md has the command
    cov = judge.cov.data
    assert cov.dtype == np.float64 and np.allclose(cov, cov.T) and np.linalg.eigvalsh(cov).min() > -1e-9
    _, digits = judge.read(tiny.digits(500).images(range(400)))
    assert (digits == tiny.digits(500).labels[:400]).mean() > 0.985


@pytest.mark.slow
def test_a_judge_is_trained_measured_on_test_images_saved_and_loaded(tmp_path):
    test = Digits.of(packed_images(2000, 2500), held_out=True)
    data = Digits.of(packed_images(0, 2000), load_test=lambda: test)
    trained = run(tmp_path, DigitClassifier, data, TrainOptions(steps=60, batch=64, seed=0), quiet=True).system
    judge = load_judge(tmp_path / "model.safetensors")
    x = test.images(range(len(test)))
    features, digits = judge.read(x)
    assert judge.notes["accuracy"] == (digits == test.labels).mean() > 0.85
    np.testing.assert_array_equal(features, trained.read(x)[0])
    mean, cov = mean_cov(features)                          # not rounded to float32 in the file
    np.testing.assert_allclose(judge.mean.data, mean, rtol=1e-12)
    np.testing.assert_allclose(judge.cov.data, cov, rtol=1e-9, atol=1e-12)
    assert fid(judge, features) == pytest.approx(0, abs=1e-6)
    half, _ = judge.read(x[:250])
    assert fid(judge, half) == frechet_distance(*mean_cov(half), judge.mean.data, judge.cov.data) > 0.1


def test_a_classifier_that_was_never_measured_cannot_judge(tmp_path):
    path = tmp_path / "half.safetensors"
    new = small_systems.new("digit-classifier")
    new.save(path, notes={"accuracy": 0.99})
    with pytest.raises(UserError, match="half.safetensors cannot judge pictures: .* never measured on real images"):
        load_judge(path)
    new.measure(tiny.digits())
    new.save(path)                                          # without its accuracy
    with pytest.raises(UserError, match="never measured"):
        load_judge(path)
    new.save(path, notes=new.notes)
    assert load_judge(path).notes == new.notes


def test_a_file_of_another_system_is_refused(tmp_path):
    checkpoint.save(tmp_path / "x.safetensors", {"a": np.zeros(3)}, {"system": "text-to-image"})
    with pytest.raises(UserError, match="x.safetensors holds 'text-to-image', and 'digit-classifier' was asked for"):
        load_judge(tmp_path / "x.safetensors")
