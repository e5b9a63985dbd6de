"""The denoisers' contracts: what they take and refuse. What they answer is proved in tests/laws."""

import numpy as np
import pytest

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser, Remembering, dynamic_threshold, static_threshold
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser

# ---- the network wrapper -----------------------------------------------------------------------------------

def test_the_network_sees_x_t_t_and_cond_and_is_clipped_last():
    schedule = schedules.linear(10, beta_max=0.9)
    seen = []
    x_t, t, cond = np.full((2, 3), 5.0), np.array([3, 4]), (np.arange(2),)
    denoiser = NetworkDenoiser(schedule, "x0", lambda *a: seen.append(a) or 3 * a[0], clip=static_threshold)
    np.testing.assert_array_equal(denoiser(x_t, t, cond), np.ones((2, 3)))
    assert seen[0][0] is x_t and seen[0][1] is t and seen[0][2] is cond


def test_what_is_remembered_is_of_the_very_same_arguments():
    calls = []
    f = Remembering(lambda cond, B: calls.append(B) or (cond, B))
    one, equal = (np.arange(2),), (np.arange(2),)
    assert f(one, 1000) is f(one, 10**3) and calls == [1000]
    for cond, B in ((one, 2), (equal, 2), (one, 2), (one, True)):
        found = f(cond, B)
        assert found[0] is cond and found[1] is B
    assert len(calls) == 5


def test_eps_prediction_at_zero_snr_is_refused_before_it_makes_infinities():
    schedule = schedules.zero_terminal_snr(schedules.linear())
    with pytest.raises(ValueError, match="predicts='eps'.*use 'v' or 'x0'"):
        NetworkDenoiser(schedule, "eps", lambda x_t, t, cond: x_t)
    with pytest.raises(ValueError, match="predicts must be one of"):
        NetworkDenoiser(schedule, "epsilon", lambda x_t, t, cond: x_t)


# ---- what is refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, sentence", [
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.zeros(3)), "cov must have mean's shape"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.array([[1.0, 2], [0, 1]])), "symmetric"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.array([1.0, -1])), "no negative variance"),
    (lambda s: MixtureDenoiser(s, [0.5, 0.4], np.zeros((2, 1)), np.ones(2)), "weights must be 2 positive"),
    (lambda s: MixtureDenoiser(s, [0.5, 0.5], np.zeros((2, 1)), np.ones(3)), "variances must be"),
    (lambda s: DatasetDenoiser(s, np.zeros((0, 2))), "data must be"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.ones(2))(np.zeros((1, 3)), np.array([0])), "x_t must be"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.ones(2))(np.zeros((2, 2)), np.array([0])), "t must be 2"),
    (lambda s: GaussianDenoiser(s, np.zeros(2), np.ones(2))(np.zeros((1, 2)), np.array([-1])), "t must be"),
    (lambda s: MixtureDenoiser(s, [1.0], np.zeros((1, 1)), np.ones(1))(
        np.zeros((1, 1)), np.array([0]), (np.array([[False]]),)), "cond must be"),
    (lambda s: dynamic_threshold(np.zeros((1, 1)), 99.5), "percentile must be a fraction"),
])
def test_refusals_name_the_argument(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(schedules.linear())
