"""`minidiff evaluate --likelihood`: its numbers where they are known, its statement, and its refusals."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from support import tiny

from minidiff.cli import main as cli
from minidiff.data import idx, mnist
from minidiff.data.pixels import to_float
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.errors import UserError
from minidiff.evaluation.likelihood import Likelihood, likelihood


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny.trained_a_little().save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with 30 "test" images under MNIST's names."""
    images = tiny.images(30)
    for name, array in zip(mnist.FILES["test"], (images.images, images.labels), strict=True):
        (tmp_path / name).write_bytes(idx.encode(array))
    return tmp_path


def call(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def test_it_prints_the_parts_their_sum_and_the_protocol(model, folder, capsys):
    out = folder / "bits.json"
    assert call("evaluate", "--likelihood", "--model", model, "--data", folder, "--images", 12, "--json", out) == 0
    printed, r = capsys.readouterr().out, json.loads(out.read_text())
    for words in (f"{r['bound']:.3f} +- {r['bound_error']:.3f}", f"{r['flow']:.3f} +- {r['flow_error']:.3f}", "L_T",
                  "sum of L_{t-1}", "decoder", "8-bit", "dequantisation", "null caption", "12 of the 30 test images"):
        assert words in printed
    assert r["images"] == 12 and r["flow_images"] == 2 and r["terms"] == 10 and r["flow_steps"] == 40
    assert "prompt accuracy" not in printed
    assert r["bound"] == pytest.approx(r["prior"] + r["steps"] + r["decoder"], rel=1e-12)
    assert r["flow"] == pytest.approx(r["flow_density"] + r["flow_decoder"], rel=1e-12)
    assert 0 < r["bound_error"] < r["bound"] and 0 < r["flow_error"]


def oracle(picture: np.ndarray, abar: list[float], error: float = 0.0):
    """A "model" that answers `picture`, every pixel wrong by `error`, whatever it is shown."""
    x_0 = to_float(picture)[..., None] + np.float32(error)
    schedule = Schedule(np.array(abar))

    def unguided():
        def network(x_t, t, cond):
            return np.broadcast_to(x_0, x_t.shape)
        return NetworkDenoiser(schedule, "x0", network, network_vjp=lambda x_t, t, dy, cond: (
            network(x_t, t, cond), np.zeros_like(dy)))
    return SimpleNamespace(config=SimpleNamespace(image_size=28, unet=SimpleNamespace(channels=1)), device="cpu",
                           schedule=schedule, encode=lambda captions: (np.zeros((1, 2)),), unguided=unguided)


def test_the_numbers_of_a_model_that_knows_the_picture():
    """Two times, one L_{t-1}, all images alike: each part has a closed form, and there is no spread."""
    picture = np.random.default_rng(0).integers(1, 255, (28, 28), dtype=np.uint8)
    test = mnist.Images(np.stack([picture] * 25), np.zeros(25, np.uint8), "a test")
    a0, a1, D = 0.9999, 0.0001, 784
    r = likelihood(oracle(picture, [a0, a1]), test, count=20)
    # q has the variance beta~ = beta (1 - a0) / (1 - a1) and the model beta, at equal means: no images are needed
    ratio = (1 - a0) / (1 - a1)
    assert r.steps == pytest.approx((ratio - 1 - math.log(ratio)) / 2 / math.log(2), rel=1e-6)
    x_0 = picture / 127.5 - 1
    assert r.prior == pytest.approx(((a1 * x_0**2 - a1 - math.log(1 - a1)) / 2).sum() / D / math.log(2), rel=1e-4)
    inside = stats.norm.cdf(1 / 255, scale=math.sqrt(1 - a0)) - stats.norm.cdf(-1 / 255, scale=math.sqrt(1 - a0))
    assert r.decoder == pytest.approx(-math.log2(inside), rel=1e-4) == r.flow_decoder
    assert r.bound_error == pytest.approx(0, abs=1e-6) and r.images == 20 and r.flow_images == 2
    assert r.sigma == pytest.approx(math.sqrt(1 - a0), rel=1e-9) and r.flow_steps == 1
    # x0_hat beyond white is clipped in the bound and not in the flow
    white = np.full((28, 28), 255, np.uint8)
    test = mnist.Images(np.stack([white] * 4), np.zeros(4, np.uint8), "a test")
    r, exact = (likelihood(oracle(white, [a0, a1], error), test, count=4) for error in (0.5, 0.0))
    assert (r.steps, r.decoder) == (exact.steps, exact.decoder) and r.flow_decoder < exact.flow_decoder / 2


def test_the_standard_error_is_that_of_the_mean_over_images():
    """Two pictures, one of which the model expects: the error of the mean is sd / sqrt(n)."""
    dark, light = np.full((28, 28), 100, np.uint8), np.full((28, 28), 150, np.uint8)
    test = mnist.Images(np.stack([dark, light] * 10), np.zeros(20, np.uint8), "a test")
    r = likelihood(oracle(dark, [0.9999, 0.0001]), test, count=20)
    # half the images cost a, half b: their sd with n - 1 is |a - b| / 2 sqrt(20 / 19), and 2 (mean - a) = b - a
    alike = mnist.Images(np.stack([dark] * 20), np.zeros(20, np.uint8), "a test")
    best = likelihood(oracle(dark, [0.9999, 0.0001]), alike, count=20).bound
    assert r.bound_error == pytest.approx((r.bound - best) * math.sqrt(20 / 19) / math.sqrt(20), rel=1e-4)
    # a part of the images is a random part: the first ten of these would cost the same
    test = mnist.Images(np.stack([dark] * 10 + [light] * 10), np.zeros(20, np.uint8), "a test")
    assert likelihood(oracle(dark, [0.9999, 0.0001]), test, count=10).bound_error > r.bound_error / 2


def test_images_are_drawn_by_the_seed_and_do_not_depend_on_the_batch(model, monkeypatch):
    from minidiff.evaluation import likelihood as bits
    from minidiff.systems.text_to_image import TextToImage
    loaded, test = TextToImage.load(model), tiny.images(30)

    def run(**options) -> Likelihood:
        return likelihood(loaded, test, count=6, **options)
    monkeypatch.setattr(bits, "TERMS", 2)
    monkeypatch.setattr(bits, "FLOW_STEPS", 4)
    first = run(seed=1)
    assert run(seed=2).bound != first.bound
    monkeypatch.setattr(bits, "BATCH", 4)
    again = run(seed=1)
    assert again.bound == pytest.approx(first.bound, rel=1e-5) and again.flow == pytest.approx(first.flow, rel=1e-4)


@pytest.mark.parametrize("option, value", [("--scale", "2"), ("--scale", "0"), ("--sample-steps", "15")])
def test_what_it_does_not_read_it_refuses(model, option, value, capsys):
    assert call("evaluate", "--likelihood", "--model", model, option, value) == 2
    assert capsys.readouterr().err == f"minidiff: --likelihood draws no pictures: leave out {option}\n"


def test_what_it_refuses(model, folder, capsys, monkeypatch):
    def refused(*arguments) -> str:
        assert call("evaluate", "--likelihood", "--model", model, *arguments) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("minidiff: ") and "\n" not in said
        return said

    def no_network(*_, **__):
        raise UserError("no mirror answered")
    monkeypatch.setattr(mnist, "fetch", no_network)
    assert "no test images" in refused() and "--data" in refused()
    assert "t10k-images" in refused("--data", folder / "nowhere")
    assert "--train-judge" in refused("--train-judge")
    assert "from 2 to 30" in refused("--data", folder, "--images", 31)
    for wrong in (SimpleNamespace(image_size=32, unet=SimpleNamespace(channels=1)),
                  SimpleNamespace(image_size=28, unet=SimpleNamespace(channels=3))):
        with pytest.raises(UserError, match="MNIST's 28 x 28 grey images"):
            likelihood(SimpleNamespace(config=wrong), tiny.images(30), count=4)
    picture = tiny.images(4).images
    broken = oracle(picture[0], [0.9, 0.1], math.nan)
    with pytest.raises(UserError, match="weights are damaged"):
        likelihood(broken, tiny.images(4), count=4)
