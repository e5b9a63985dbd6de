"""The mathematics of diffusion at the ends of its numbers: right, or refused in one sentence."""

import math

import numpy as np
import pytest

from minidiff.diffusion.denoiser import dynamic_threshold, static_threshold
from minidiff.diffusion.entropy import gaussian_entropy
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser
from minidiff.diffusion.gaussian import kl_gaussian, q_posterior_mean_variance, q_sample
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.likelihood import DiscretisedGaussian
from minidiff.diffusion.losses import LOSS_WEIGHTS
from minidiff.diffusion.posterior import Observed
from minidiff.diffusion.schedules import (
    Schedule,
    cosine,
    even_loss,
    from_betas,
    from_log_snr,
    linear,
    zero_terminal_snr,
)


@pytest.mark.parametrize("m1, v1, m2, v2", [
    (0, 1e-300, 0, 1e300), (0, 1e300, 0, 1e300), (1e200, 1, 0, 1e300), (0, 5e-324, 0, 5e-324), (0, 1, 0, 1 + 1e-9)])
@pytest.mark.filterwarnings("error")
def test_the_divergence_of_extreme_variances(m1, v1, m2, v2):
    L = np.longdouble
    exact = (L(v1) / L(v2) - 1 - np.log(L(v1) / L(v2)) + (L(m1) - L(m2)) ** 2 / L(v2)) / 2
    found = kl_gaussian(*(np.float64(x) for x in (m1, v1, m2, v2)))
    assert float(found) == pytest.approx(float(exact), rel=1e-11, abs=1e-18)


@pytest.mark.parametrize("bad", [0, -1, math.nan])
def test_a_variance_that_is_none_is_refused(bad):
    with pytest.raises(ValueError, match="var1 and var2 must be positive"):
        kl_gaussian(0.0, np.array([1.0, bad]), 0.0, 1.0)
    with pytest.raises(ValueError, match="variance positive"):
        gaussian_entropy(bad, 1)
    with pytest.raises(ValueError, match="positive"):
        DiscretisedGaussian(bad)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_infinite_estimate_is_no_bright_picture(dtype):
    """It becomes NaN, which the systems report; a finite one is clipped, however large."""
    x = np.array([[0, np.inf, 2], [0, -np.inf, 1], [np.nan, 0, 0], [0, np.finfo(dtype).max, -3]], dtype)
    for threshold in (static_threshold, lambda x: dynamic_threshold(x, 0.5)):
        with np.errstate(invalid="ignore"):
            y = threshold(x)
        assert y.dtype == dtype and np.isnan(y[:3]).any(axis=1).all() and (np.abs(y[3]) <= 1).all()
    assert static_threshold(x)[3].tolist() == [0, 1, -1]


def test_the_percentile_of_a_large_float16_picture():
    """float16 counts to 65,504 pixels, and to 2048 exactly."""
    x = np.linspace(0, 4, 70_000, dtype=np.float32)[None]
    found = dynamic_threshold(x.astype(np.float16), 0.9)
    np.testing.assert_allclose(found, dynamic_threshold(x, 0.9), atol=2e-3)
    assert (dynamic_threshold(x, 1.0) == x / 4).all()


def test_what_is_not_observed_may_be_nan():
    schedule, known = cosine(10), np.array([[True, False]])
    mean, variance = np.array([[0.5, 0.25]]), np.full((1, 2), 0.1)
    for s in (-1, 3):
        expected = Observed(schedule, np.array([[1.0, 7.0]]), known)(mean, variance, s)
        found = Observed(schedule, np.array([[1.0, np.nan]]), known)(mean, variance, s)
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("shift", [0, 1e6, -1e9])
def test_a_data_set_far_from_0(shift):
    """The estimate moves with the data: the logits are 10^12 and more, and differ by 1."""
    rng, schedule = np.random.default_rng(0), linear()
    data, eps = rng.standard_normal((6, 3)), rng.standard_normal((4, 3))
    t = np.full(4, 300)
    alpha = schedule.alpha(300)
    x_t = alpha * data[:4] + schedule.sigma(300) * eps
    expected = DatasetDenoiser(schedule, data)(x_t, t)
    found = DatasetDenoiser(schedule, data + shift)(x_t + alpha * shift, t)
    np.testing.assert_allclose(found - shift, expected, atol=1e-14 * abs(shift) * 100 + 1e-12)


def test_exact_denoisers_refuse_a_covariance_that_is_not_finite():
    for bad in (np.inf, np.nan, -1):
        with pytest.raises(ValueError, match="cov must"):
            GaussianDenoiser(cosine(), np.zeros(2), np.array([1.0, bad]))


@pytest.mark.parametrize("schedule", [cosine(), linear(), even_loss(), zero_terminal_snr(linear())])
@pytest.mark.filterwarnings("error")
def test_schedules_at_both_ends(schedule):
    last = schedule.T - 1
    assert schedule.abar(-1) == 1 and schedule.sigma(-1) == 0
    assert schedule.snr(-1) == schedule.log_snr(-1) == schedule.half_log_snr(-1) == np.inf
    if schedule.alpha_bar[-1] == 0:
        assert schedule.snr(last) == 0 and schedule.log_snr(last) == -np.inf
    t = np.arange(schedule.T)
    assert np.isfinite(schedule.snr(t)).all() and (np.diff(schedule.log_snr(t)) < 0).all()
    for weight in (LOSS_WEIGHTS["simple"], LOSS_WEIGHTS["min_snr"]):
        for predicts in ("x0", "v"):
            assert np.isfinite(weight(schedule, t, predicts)).all()
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    for when in (0, last):
        x_t = q_sample(schedule, x, when, x)
        mean, variance = q_posterior_mean_variance(schedule, x, x_t, when)
        assert np.isfinite(x_t).all() and np.isfinite(mean).all() and np.isfinite(variance).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_log_snr_out_of_range_is_refused():
    for log_snr in (lambda u: 1e4 * (1 - u), lambda u: np.full_like(u, np.nan), lambda u: -np.inf * u):
        with pytest.raises(ValueError, match="alpha_bar must"):
            from_log_snr(log_snr, 10)


@pytest.mark.parametrize("beta", [1e-17, 3e-16])
def test_a_beta_that_the_table_cannot_hold_is_refused(beta):
    """1 - 3e-16 keeps 3.3e-16 of it, 11 % too much."""
    with pytest.raises(ValueError, match=r"betas\[0\] = .* is lost in rounding, since 1 - beta is"):
        from_betas(np.array([beta, 0.99]))
    assert from_betas(np.array([1e-12, 0.99])).betas[0] == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.filterwarnings("error")
def test_the_weight_of_eps_where_almost_no_signal_is_left():
    """1 / SNR of 1e-310 is infinite, as at 0."""
    schedule = Schedule(np.array([0.5, 1e-300, 1e-310]))
    assert LOSS_WEIGHTS["min_snr"](schedule, 1, "eps") == pytest.approx(1)
    for kind in ("min_snr", "bound"):
        with pytest.raises(ValueError, match="eps does not determine x_0"):
            LOSS_WEIGHTS[kind](schedule, 2, "eps")


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_guidance_of_a_scale_that_is_no_number_is_refused(scale):
    denoiser = GaussianDenoiser(cosine(), np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="scale must be a finite number"):
        ClassifierFree(denoiser, scale, (np.zeros((1, 1)),))


@pytest.mark.filterwarnings("error")
def test_a_decoder_far_from_its_pixel():
    """Phi(-10^6) underflows, and its logarithm does not."""
    x_0 = np.array([0.0]) + 1 / 255
    found = DiscretisedGaussian(1e-6)(x_0, np.array([-0.9]))
    a = (127.5 / 127.5 - 1 - -0.9) / 1e-6
    assert found.item() == pytest.approx(-a * a / 2, rel=1e-4)
