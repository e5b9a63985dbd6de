"""The contracts of the Gaussian algebra: dtypes, shapes, refusals. Its formulas are proved in tests/laws."""

import numpy as np
import pytest
from support.law_tools import one

from minidiff.diffusion import gaussian, schedules
from minidiff.diffusion.gaussian import PREDICTIONS

# ---- forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s, t", [(3, 3), (4, 3), (np.array([0, 5]), np.array([1, 4]))])
def test_a_jump_goes_forward(s, t):
    with pytest.raises(ValueError, match="s must be earlier than t"):
        gaussian.q_step(schedules.cosine(10), s, t)


# ---- divergences -----------------------------------------------------------------------------------------


def test_kl_broadcasts_and_keeps_float32():
    means = np.zeros((2, 3), np.float32)
    kl = gaussian.kl_gaussian(means, 1.0, 1.0, 1.0)
    assert kl.shape == (2, 3) and kl.dtype == np.float32
    np.testing.assert_array_equal(kl, 0.5)


@pytest.mark.parametrize("var1, var2", [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (1.0, np.nan)])
def test_kl_refuses_a_point_mass(var1, var2):
    with pytest.raises(ValueError, match="var1 and var2 must be positive"):
        gaussian.kl_gaussian(0.0, var1, 0.0, var2)


# ---- eps, x0, v, score -----------------------------------------------------------------------------------


def test_targets_are_what_they_are_called():
    schedule, x_0, eps = schedules.cosine(10), one(2.0), one(3.0)
    assert gaussian.target(schedule, "eps", x_0, eps, 4) == 3.0
    assert gaussian.target(schedule, "x0", x_0, eps, 4) == 2.0
    half = schedules.Schedule([0.64, 0.36])  # alpha .8, sigma .6, then the reverse
    assert gaussian.target(half, "v", x_0, eps, 0) == pytest.approx(0.8 * 3 - 0.6 * 2)
    with pytest.raises(ValueError, match="predicts must be one of eps, x0, v, not 'epsilon'"):
        gaussian.target(schedule, "epsilon", x_0, eps, 4)
    with pytest.raises(ValueError, match="predicts must be one of eps, x0, v, not 'epsilon'"):
        gaussian.to_x0(schedule, "epsilon", x_0, 4, eps)


@pytest.mark.parametrize("name", ["eps_from_x0", "v_from_x0", "score_from_eps", "score_from_x0"])
def test_the_clean_image_has_no_eps_to_speak_of(name):
    with pytest.raises(ValueError, match="t must be a time with noise, 0 or more, got -1"):
        getattr(gaussian, name)(schedules.cosine(10), one(0.5), -1, one(0.5))




# ---- arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 3, 1)])
def test_results_keep_dtype_and_shape(dtype, shape):
    schedule, t = schedules.cosine(100), np.array([3, 50])
    x, y = np.random.default_rng(0).standard_normal((2, *shape)).astype(dtype)
    results = [
        gaussian.q_sample(schedule, x, t, y),
        *gaussian.q_mean_variance(schedule, x, t),
        *gaussian.q_posterior_mean_variance(schedule, x, y, t),
        gaussian.prior_kl(schedule, x),
        *(gaussian.to_x0(schedule, predicts, x, t, y) for predicts in PREDICTIONS),
        *(gaussian.target(schedule, predicts, x, y, t) for predicts in PREDICTIONS),
        gaussian.score_from_x0(schedule, x, t, y),
        gaussian.eps_from_score(schedule, x, t, y),
    ]
    for result in results:
        assert result.dtype == dtype
        assert result.shape in (shape, (2,) + (1,) * (len(shape) - 1))


def test_each_sample_has_its_own_time():
    """A batch with times (B,) equals its samples one at a time, also where B, H, W and C are all 3."""
    schedule = schedules.linear()
    x_0, x_t = np.random.default_rng(0).standard_normal((2, 3, 3, 3, 3))
    t = np.array([0, 400, 999])
    for function in (
        lambda x_0, x_t, t: gaussian.q_sample(schedule, x_0, t, x_t),
        lambda x_0, x_t, t: gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t)[0],
        lambda x_0, x_t, t: gaussian.to_x0(schedule, "v", x_t, t, x_0),
        lambda x_0, x_t, t: gaussian.eps_from_x0(schedule, x_t, t, x_0),
    ):
        batch = function(x_0, x_t, t)
        for i in range(3):
            np.testing.assert_array_equal(batch[i], function(x_0[i], x_t[i], int(t[i])))


def test_arguments_that_do_not_fit_are_refused():
    schedule, x = schedules.cosine(10), np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"one per sample of x \(4, 2\), got an array \(2,\)"):
        gaussian.q_sample(schedule, x, np.array([1, 2]), x)
    with pytest.raises(ValueError, match=r"eps must be float32 \(4, 2\) like x_0, got float64 \(4, 2\)"):
        gaussian.q_sample(schedule, x, 3, np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"out must be float32 \(4, 2\) like x_t, got float32 \(4, 1\)"):
        gaussian.to_x0(schedule, "x0", x, 3, x[:, :1])
    with pytest.raises(TypeError, match="x must be a floating-point array, got dtype int64"):
        gaussian.q_sample(schedule, np.zeros(3, int), 3, np.zeros(3, int))
