"""Bits/dim of test images: closed forms for a model that knows the picture, its errors, and its refusals."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from support import small_systems, tiny

from minidiff.data.dataset import Dataset
from minidiff.data.pixels import to_float
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.errors import UserError
from minidiff.evaluation import likelihood as bits
from minidiff.evaluation.likelihood import Likelihood, likelihood


class Pictures(Dataset):
    """A data set of these pictures, (N, H, W, C) uint8."""

    name, source = "pictures", "a test"

    def __init__(self, pictures: np.ndarray):
        self.pictures, self.shape = pictures, pictures.shape[1:]

    def __len__(self):
        return len(self.pictures)

    def images(self, indices):
        return to_float(self.pictures[indices])


def oracle(picture: np.ndarray, abar: list[float], error: float = 0.0, condition: tuple = ()):
    """A "model" that predicts `picture` (H, W, C) whatever it is given, every pixel wrong by `error`."""
    x_0 = to_float(picture) + np.float32(error)

    def network(x_t, t, cond):
        assert [len(a) for a in cond] == [len(x_t)] * len(condition)                # one row for each image
        return np.broadcast_to(x_0, x_t.shape)

    denoiser = NetworkDenoiser(Schedule(np.array(abar)), "x0", network, network_vjp=lambda x_t, t, dy, cond: (
        network(x_t, t, cond), np.zeros_like(dy)))
    return SimpleNamespace(config=SimpleNamespace(shape=picture.shape), device="cpu",
                           likelihood_denoiser=lambda: (denoiser, condition))


@pytest.mark.parametrize("shape, condition", [((28, 28, 1), (np.zeros((1, 2)),)), ((6, 10, 3), ())],
                         ids=["with the null caption", "colour images, unconditional"])
def test_the_numbers_of_a_model_that_knows_the_picture(shape, condition):
    """Two times, one L_{t-1}, all images alike: each part has a closed form, and all images cost the same."""
    picture = np.random.default_rng(0).integers(1, 255, shape, dtype=np.uint8)
    test = Pictures(np.stack([picture] * 35))
    a0, a1, D = 0.9999, 0.0001, math.prod(shape)
    r = likelihood(oracle(picture, [a0, a1], condition=condition), test, count=30)
    # q has the variance beta~ = beta (1 - a0) / (1 - a1) and the model beta, at equal means: the images do not matter
    ratio = (1 - a0) / (1 - a1)
    assert r.steps == pytest.approx((ratio - 1 - math.log(ratio)) / 2 / math.log(2), rel=1e-6)
    x_0 = picture / 127.5 - 1
    assert r.prior == pytest.approx(((a1 * x_0**2 - a1 - math.log(1 - a1)) / 2).sum() / D / math.log(2), rel=1e-4)
    inside = stats.norm.cdf(1 / 255, scale=math.sqrt(1 - a0)) - stats.norm.cdf(-1 / 255, scale=math.sqrt(1 - a0))
    assert r.decoder == pytest.approx(-math.log2(inside), rel=1e-4) == r.flow_decoder
    assert r.bound_error == pytest.approx(0, abs=1e-6) and r.images == 30 and r.flow_images == 3
    assert r.sigma == pytest.approx(math.sqrt(1 - a0), rel=1e-9) and r.flow_steps == 1
    # x0_hat beyond white is clipped in the bound and not in the flow
    white = np.full(shape, 255, np.uint8)
    test = Pictures(np.stack([white] * 4))
    r, exact = (likelihood(oracle(white, [a0, a1], error, condition), test, count=4) for error in (0.5, 0.0))
    assert (r.steps, r.decoder) == (exact.steps, exact.decoder) and r.flow_decoder < exact.flow_decoder / 2


def test_the_standard_error_is_that_of_the_mean_over_images():
    """Two pictures, one of which the model predicts: the error of the mean is sd / sqrt(n)."""
    dark, light = np.full((28, 28, 1), 100, np.uint8), np.full((28, 28, 1), 150, np.uint8)
    model = oracle(dark, [0.9999, 0.0001])
    r = likelihood(model, Pictures(np.stack([dark, light] * 10)), count=20)
    assert r.bound == pytest.approx(r.prior + r.steps + r.decoder, rel=1e-12) and r.decoder > 1
    assert r.flow == pytest.approx(r.flow_density + r.flow_decoder, rel=1e-12) and r.flow_decoder > 1
    # half of the images cost a, half b: their sd with n - 1 is |a - b| / 2 sqrt(20 / 19), and 2 (mean - a) = b - a
    best = likelihood(model, Pictures(np.stack([dark] * 20)), count=20).bound
    assert r.bound_error == pytest.approx((r.bound - best) * math.sqrt(20 / 19) / math.sqrt(20), rel=1e-4)
    # fewer images than the data set has are a random part of it: the first ten of these would all cost the same
    test = Pictures(np.stack([dark] * 10 + [light] * 10))
    assert likelihood(model, test, count=10).bound_error > r.bound_error / 2


@pytest.mark.parametrize("name", ["text-to-image", "ddpm", "vdm"])
def test_images_are_drawn_by_the_seed_and_do_not_depend_on_the_batch(name, monkeypatch):
    model, test = small_systems.small(name), tiny.digits(30)

    def run(**options) -> Likelihood:
        return likelihood(model, test, count=6, **options)
    monkeypatch.setattr(bits, "TERMS", 2)
    monkeypatch.setattr(bits, "FLOW_STEPS", 4)
    first = run(seed=1)
    assert first.seed == 1 and run(seed=2).bound != first.bound
    for size in (4, 1):                                     # of 6 images, and of 2 for the flow
        monkeypatch.setattr(bits, "BATCH", size)
        again = run(seed=1)
        assert again.bound == pytest.approx(first.bound, rel=1e-5)
        assert again.flow == pytest.approx(first.flow, rel=1e-4)


def test_the_progress_bar_gets_the_parts_of_both(monkeypatch):
    picture, seen = tiny.images(1).images[0][..., None], []

    def progress(items, what):
        seen.append((what, len(items)))
        return items
    monkeypatch.setattr(bits, "BATCH", 8)
    likelihood(oracle(picture, [0.9, 0.1]), Pictures(np.stack([picture] * 30)), count=20, progress=progress)
    assert seen == [("bound", 3), ("flow", 1)]


def test_other_shapes_too_many_images_and_damaged_weights_are_refused():
    picture = tiny.images(1).images[0][..., None]                                   # (28, 28, 1)
    test = Pictures(np.stack([picture] * 4))
    for shape in ((32, 32, 1), (28, 28, 3)):
        with pytest.raises(UserError, match=r"the test images of a test have the shape \(28, 28, 1\), and the model "
                                            f"makes images of the shape \\{str(shape)[:-1]}\\)"):
            likelihood(oracle(np.zeros(shape, np.uint8), [0.9, 0.1]), test, count=4)
    for count in (1, 5):
        with pytest.raises(UserError, match=f"from 2 to 4, the test images of a test, not {count}"):
            likelihood(oracle(picture, [0.9, 0.1]), test, count=count)
    with pytest.raises(UserError, match="the likelihood is not finite: the model's weights are damaged"):
        likelihood(oracle(picture, [0.9, 0.1], math.nan), test, count=4)
    with pytest.raises(UserError, match="clip has no likelihood"):
        likelihood(small_systems.small("clip"), test, count=4)


def test_the_flow_goes_to_the_time_0_in_equal_steps_of_log_snr(monkeypatch):
    """There alone the decoder's noise is what is left: a path that ends before leaves some of it uncounted."""
    seen, flow_bound = [], bits.flow_bound
    monkeypatch.setattr(bits, "flow_bound", lambda network, x_0, path, *args, **kwargs: (
        seen.append((network.schedule, path)) or flow_bound(network, x_0, path, *args, **kwargs)))
    T, picture = 1601, np.full((2, 2, 1), 100, np.uint8)
    abar = 1 / (1 + np.exp(np.linspace(-9, 9, T)))
    r = likelihood(oracle(picture, abar.tolist()), Pictures(np.stack([picture] * 5)), count=4)
    assert [len(path) - 1 for _, path in seen] == [r.flow_steps, r.flow_steps // 2]
    for schedule, path in seen:
        assert path[0] == T - 1 and path[-1] == 0
        steps = np.diff([np.log(schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])) for t in path])
        np.testing.assert_allclose(steps, 18 / (len(path) - 1), rtol=0.1)


@pytest.mark.parametrize("T, steps", [(2, 1), (3, 2), (4, 2), (5, 4)])
def test_a_short_schedule_has_an_even_number_of_steps_at_most_its_own(T, steps):
    picture = np.full((2, 2, 1), 100, np.uint8)
    r = likelihood(oracle(picture, np.linspace(0.999, 0.001, T).tolist()), Pictures(np.stack([picture] * 5)), count=4)
    assert r.flow_steps == steps and math.isfinite(r.flow)


def test_the_flow_is_extrapolated_from_two_numbers_of_steps(monkeypatch):
    """Data N(mean, s^2) for each pixel: the density along the flow is a Gaussian's; the extrapolation is near it."""
    mean, s, T, shape = 0.3, 0.1, 1601, (2, 2, 1)            # T: all strides are of one length
    schedule = Schedule(1 / (1 + np.exp(np.linspace(-10, 10, T))))

    def gain(t):                                            # of the posterior mean, E[x_0 | x_t]
        a, sigma = schedule.alpha(t), schedule.sigma(t)
        return (a * s**2 / (a**2 * s**2 + sigma**2))[:, None, None, None]

    def network(x_t, t, cond):
        alpha = schedule.alpha(t)[:, None, None, None]
        return (mean + gain(t) * (x_t - alpha * mean)).astype(x_t.dtype)

    denoiser = NetworkDenoiser(schedule, "x0", network, network_vjp=lambda x_t, t, dy, cond: (
        network(x_t, t, cond), (gain(t) * dy).astype(dy.dtype)))
    model = SimpleNamespace(config=SimpleNamespace(shape=shape), device="cpu",
                            likelihood_denoiser=lambda: (denoiser, ()))
    exact, plain, flow_bound = [], [], bits.flow_bound

    def watched(network, x_0, path, *args, eps, **kwargs):
        bound = flow_bound(network, x_0, path, *args, eps=eps, **kwargs)
        a, sigma = schedule.alpha(0), schedule.sigma(0)
        x = a * x_0 + sigma * eps
        log_q = stats.norm.logpdf(eps) - math.log(sigma)
        log_p = stats.norm.logpdf(x, a * mean, math.sqrt(a**2 * s**2 + sigma**2))
        exact.append((log_q - log_p).sum(axis=(1, 2, 3)))
        plain.append(bound.flow)
        return bound
    monkeypatch.setattr(bits, "flow_bound", watched)
    pictures = np.random.default_rng(0).integers(100, 230, (10, *shape), dtype=np.uint8)
    r = likelihood(model, Pictures(pictures), count=10)
    truth, fine, coarse = (x.mean() / 4 / math.log(2) for x in (exact[0], *plain))
    # Heun's error in N steps is a quarter of that in N/2; what remains is of a higher order
    assert (coarse - truth) / (fine - truth) == pytest.approx(4, rel=0.1)
    assert abs(r.flow_density - truth) < abs(fine - truth) / 10
