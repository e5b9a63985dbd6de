"""The contracts of loss weights: positive, float64, of the shape of t. Their values are proved in tests/laws."""

import numpy as np
import pytest

from minidiff.diffusion import losses, schedules
from minidiff.diffusion.gaussian import PREDICTIONS


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_simple_weight_is_one_at_every_time(predicts):
    weight = losses.simple_weight(schedules.cosine(10), np.arange(10), predicts)
    np.testing.assert_array_equal(weight, np.ones(10))


@pytest.mark.parametrize("kind", losses.LOSS_WEIGHTS)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_weights_are_positive_float64_of_the_shape_of_t(kind, predicts):
    schedule = schedules.cosine(10)
    for t in (np.array([1, 9, 4]), np.array([2], np.uint8), 3):
        weight = losses.weight(schedule, t, predicts, kind)
        assert np.shape(weight) == np.shape(t) and weight.dtype == np.float64
        assert np.all(weight > 0) and np.all(np.isfinite(weight))


def test_what_has_no_weight_is_refused():
    schedule = schedules.cosine(10)
    with pytest.raises(ValueError, match="t must be at least 1 for a loss of this kind"):
        losses.bound_weight(schedule, np.array([3, 0]), "v")
    for kind in ("simple", "min_snr"):
        with pytest.raises(ValueError, match="t must be at least 0"):
            losses.weight(schedule, -1, "x0", kind)
    with pytest.raises(ValueError, match="kind must be one of simple, bound, min_snr, not 'vlb'"):
        losses.weight(schedule, 3, "x0", "vlb")
    for kind in losses.LOSS_WEIGHTS:
        with pytest.raises(ValueError, match="predicts must be one of eps, x0, v, not 'noise'"):
            losses.weight(schedule, 3, "noise", kind)
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma must be positive"):
            losses.min_snr_weight(schedule, 3, "x0", gamma)


@pytest.mark.parametrize("kind", ["bound", "min_snr"])
def test_at_snr_0_only_eps_is_without_a_weight(kind):
    schedule = schedules.zero_terminal_snr(schedules.cosine(10))
    with pytest.raises(ValueError, match="eps does not determine x_0 at SNR 0"):
        losses.weight(schedule, 9, "eps", kind)
    for predicts in ("x0", "v"):
        assert np.isfinite(losses.weight(schedule, 9, predicts, kind))
