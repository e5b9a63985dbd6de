"""Guidance: wrapping, conditions, refusals. What guided denoisers answer is proved in tests/laws."""

import math

import numpy as np
import pytest

from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.exact import MixtureDenoiser
from minidiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, GuidanceInterval, stack_conditions

K = 3


def mixture(schedule, rng):
    return MixtureDenoiser(schedule, rng.dirichlet(np.full(K, 3.0)), rng.normal(size=(K, 2)),
                           rng.uniform(0.1, 1, size=(K, 2)))


def is_class(y):
    """The condition "the component is y", y: (B,)."""
    return (np.arange(K) == y[:, None],)


ANY_CLASS = (np.ones((1, K), bool),)


def test_a_wrapper_is_a_denoiser():
    schedule = schedules.linear()
    inner = NetworkDenoiser(schedule, "v", lambda x_t, t, cond: x_t)
    free = ClassifierFree(inner, 2.0, ANY_CLASS)
    for guided in (free, GuidanceInterval(free, 0.1, 2.0), ClassifierGuidance(inner, lambda x_t, t, y: x_t)):
        assert guided.schedule is schedule and guided.predicts == "v"
    x = np.ones((2, 3), np.float32)
    t = np.zeros(2, int)
    three = np.float64(3)
    assert ClassifierFree(inner, three, (np.zeros((1, 1)),))(x, t, (np.zeros((2, 1)),)).dtype == np.float32
    assert ClassifierGuidance(inner, lambda x_t, t, y: x_t, three)(x, t).dtype == np.float32


# ---- conditions --------------------------------------------------------------------------------------------

def test_stacked_conditions_keep_their_order():
    first, second = (np.zeros((2, 3)), np.zeros(2)), (np.ones((1, 3)), np.ones(1))
    tokens, mask = stack_conditions(first, second)
    np.testing.assert_array_equal(tokens, [[0] * 3, [0] * 3, [1] * 3])
    np.testing.assert_array_equal(mask, [0, 0, 1])


def test_a_condition_is_doubled_once_for_all_steps_and_never_kept_for_another():
    seen = []

    def network(x_t, t, cond):
        seen.append(cond)
        return x_t + cond[0]
    guided = ClassifierFree(NetworkDenoiser(schedules.linear(), "x0", network), 3.0, (np.zeros((1, 2)),))
    x_t, t = np.zeros((2, 2)), np.zeros(2, int)
    first, second, one = (np.ones((2, 2)),), (np.full((2, 2), 5.0),), (np.full((1, 2), 7.0),)
    for cond, value in ((first, 3), (first, 3), (second, 15), (first, 3)):
        np.testing.assert_array_equal(guided(x_t, t, cond), np.full((2, 2), value))
    np.testing.assert_array_equal(guided(x_t[:1], t[:1], one), [[21, 21]])
    assert seen[0] is seen[1] and seen[0] is not seen[3]


CLASS_0 = is_class(np.zeros(2, int))


def classifier_free(scale=2.0, uncond=ANY_CLASS, cond=CLASS_0):
    exact = mixture(schedules.linear(), np.random.default_rng(0))
    return ClassifierFree(exact, scale, uncond)(np.zeros((2, 2)), np.zeros(2, int), cond)


@pytest.mark.parametrize("make, sentence", [
    (lambda: classifier_free(scale=math.nan), "scale must be a finite number"),
    (lambda: classifier_free(scale=math.inf), "scale must be a finite number"),
    (lambda: classifier_free(cond=None), "cond must be a tuple of arrays"),
    (lambda: classifier_free(uncond=(np.ones((3, K), bool),)), "uncond must have 1 row or 2"),
    (lambda: classifier_free(uncond=(np.ones((1, K), bool),) * 2), "conditions must be tuples"),
    *((lambda low=low, high=high: GuidanceInterval(None, low, high), "low and high must be noise levels")
      for low, high in ((-1, 2), (2, 1), (math.nan, 1), (0, math.nan))),
    (lambda: stack_conditions((np.ones((1, 3)),), (np.ones((1, 4)),)), "conditions must be tuples"),
    (lambda: ClassifierGuidance(mixture(schedules.flow_matching(), np.random.default_rng(0)), lambda x_t, t, y: x_t),
     "zero terminal SNR"),
])
def test_refusals_name_the_argument(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
