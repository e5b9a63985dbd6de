"""Random schedules, times, shapes and seeds for the property tests of floor III."""

import numpy as np
from hypothesis import strategies as st

from minidiff.diffusion import schedules
from minidiff.diffusion.schedules import Schedule

seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)        # of one sample: a number, a row, ... an image


@st.composite
def any_schedule(draw, min_T: int = 1, max_T: int = 40, ends_at_zero: bool | None = False) -> Schedule:
    """One of minidiff's with random T and parameters, a subset of its times, or an arbitrary falling alpha_bar.

    The last alpha_bar is 0 if ends_at_zero is True, positive if False, and either if None. If positive it is at least
    1e-7, and the first is at most 1 - 6e-6: a test that divides by alpha_bar or 1 - alpha_bar keeps 9 digits.
    """
    if ends_at_zero is None:
        ends_at_zero = draw(st.booleans())
    least = 2 if ends_at_zero else 1
    T = draw(st.integers(max(min_T, least), max_T))
    factories = [linear_like(T), cosine_like(T), arbitrary(T), flow_matching_like(T), part_of_one(T)]
    if T >= 2:
        factories.append(log_snr_like(T))
    if ends_at_zero and draw(st.integers(0, 4)) == 0:
        return schedules.flow_matching(T)
    schedule = draw(st.one_of(factories))
    return schedules.zero_terminal_snr(schedule) if ends_at_zero else schedule


def linear_like(T: int, steepest: float = 0.5) -> st.SearchStrategy[Schedule]:
    """linear, scaled_linear or vp_sde, with a random range of betas."""

    def make(factory, beta_min, beta_max):
        scale = T if factory is schedules.vp_sde else 1  # betas per unit of time, not per step
        return factory(T, beta_min * scale, beta_max * scale, allow_signal=True)

    return st.builds(
        make,
        st.sampled_from([schedules.linear, schedules.scaled_linear, schedules.vp_sde]),
        st.floats(1e-4, 1e-2),
        st.floats(1.1e-2, steepest),
    )


def cosine_like(T: int) -> st.SearchStrategy[Schedule]:
    return st.builds(lambda offset: schedules.cosine(T, offset, allow_signal=True), st.floats(1e-3, 0.1))


def log_snr_like(T: int) -> st.SearchStrategy[Schedule]:
    return st.builds(
        lambda most, least: schedules.log_snr_linear(T, most, least, allow_signal=True),
        st.floats(-2.0, 12.0),
        st.floats(-12.0, -3.0),
    )


def flow_matching_like(T: int) -> st.SearchStrategy[Schedule]:
    """flow_matching without its last time, where alpha_bar is 0."""
    return st.just(schedules.respaced(schedules.flow_matching(T + 1), np.arange(T)))


@st.composite
def part_of_one(draw, T: int) -> Schedule:
    """T times with irregular strides, of a schedule with up to twice as many."""
    strides = draw(st.lists(st.integers(1, 2), min_size=T, max_size=T))
    long = sum(strides)
    factories = [linear_like(long, steepest=0.25), cosine_like(long), arbitrary(long)]
    if long >= 2:
        factories.append(log_snr_like(long))
    return schedules.respaced(draw(st.one_of(factories)), np.cumsum(strides) - 1)


def arbitrary(T: int) -> st.SearchStrategy[Schedule]:
    """log alpha_bar falls to a random end in T random steps, whose sizes differ by up to a factor of 20.

    The end is at alpha > 0.002, so that a test that divides by alpha keeps 12 digits.
    """

    def make(end, steps):
        return Schedule(np.exp(end * np.cumsum(steps) / np.sum(steps)), "arbitrary")

    return st.builds(make, st.floats(-12.0, -0.5), st.lists(st.floats(0.05, 1.0), min_size=T, max_size=T))


@st.composite
def schedule_and_times(
    draw, ends_at_zero: bool | None = False, first: int = -1, max_T: int = 40
) -> tuple[Schedule, int, int]:
    """A schedule and two of its times, first <= s < t <= T-1."""
    schedule = draw(any_schedule(min_T=1 if first < 0 else first + 2, max_T=max_T, ends_at_zero=ends_at_zero))
    t = draw(st.integers(first + 1, schedule.T - 1))
    return schedule, draw(st.integers(first, t - 1)), t
