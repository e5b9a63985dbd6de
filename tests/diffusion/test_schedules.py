"""The contracts of schedules: times, and tables that are refused. Their numbers are proved in tests/laws."""

import copy
import pickle

import numpy as np
import pytest

from minidiff.diffusion import schedules
from minidiff.diffusion.schedules import SCHEDULES, Schedule

# ---- schedules from other things -------------------------------------------------------------------------


def test_from_log_snr_reads_one_number_for_every_time():
    with pytest.raises(ValueError, match=r"log_snr must map an array \(5,\)"):
        schedules.from_log_snr(lambda u: 3.0, 5)


# ---- reaching noise --------------------------------------------------------------------------------------


def test_zero_terminal_snr_needs_two_times():
    with pytest.raises(ValueError, match="schedule.T must be a whole number of at least 2, not 1"):
        schedules.zero_terminal_snr(Schedule([0.01]))


# ---- respacing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "times, error, message",
    [
        ([3, 5, 3], ValueError, "distinct"),
        ([], ValueError, "non-empty"),
        ([10], IndexError, r"t must lie in 0\.\.9, got 10"),
        ([-1, 4], IndexError, r"t must lie in 0\.\.9, got -1"),
        ([0.5], TypeError, "dtype float64"),
    ],
)
def test_respaced_refuses(times, error, message):
    with pytest.raises(error, match=message):
        schedules.respaced(schedules.cosine(10), times)


# ---- the contract ----------------------------------------------------------------------------------------


def test_t_minus_one_is_the_clean_image():
    schedule = schedules.cosine(10)
    assert schedule.abar(-1) == schedule.alpha(-1) == 1
    assert schedule.sigma(-1) == 0
    assert schedule.snr(-1) == np.inf
    assert schedule.abar(0) == schedule.alpha_bar[0]
    assert schedule.abar(9) == schedule.alpha_bar[9]


def test_times_of_any_shape_and_any_integer_dtype():
    schedule = schedules.linear()
    t = np.array([[0, 5], [127, 99]])
    expected = schedule.alpha_bar[t]
    for dtype in (np.int8, np.uint8, np.int32, np.uint64):  # 127 + 1 overflows an int8
        np.testing.assert_array_equal(schedule.abar(t.astype(dtype)), expected)
    assert schedule.abar(np.arange(0)).shape == (0,)


@pytest.mark.parametrize("t", [10, -2, [3, 10], [-2, 0]])
def test_a_time_outside_the_table_is_an_index_error(t):
    with pytest.raises(IndexError, match=r"t must lie in -1\.\.9, got (10|-2)"):
        schedules.cosine(10).alpha(np.array(t))


def test_a_time_that_is_no_integer_is_a_type_error():
    with pytest.raises(TypeError, match="t must be an integer or an integer array, got dtype float64"):
        schedules.cosine(10).alpha(0.5)


@pytest.mark.parametrize(
    "table, message",
    [
        ([], r"non-empty \(T,\) array, got shape \(0,\)"),
        ([[0.5]], r"got shape \(1, 1\)"),
        ([1.0, 0.5], r"in \[0, 1\), got alpha_bar\[0\] = 1.0"),
        ([0.5, -0.1], r"got alpha_bar\[1\] = -0.1"),
        ([0.5, np.nan], r"got alpha_bar\[1\] = nan"),
        ([0.9, 0.5, 0.5], r"strictly decrease, got alpha_bar\[1\] = 0.5 and alpha_bar\[2\] = 0.5"),
        ([0.5, 0.0, 0.0], r"alpha_bar\[1\] = 0.0 and alpha_bar\[2\] = 0.0"),
    ],
)
def test_a_broken_table_is_refused(table, message):
    with pytest.raises(ValueError, match=message):
        Schedule(table)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.1], [np.nan], [[0.1]]])
def test_broken_betas_are_refused(betas):
    with pytest.raises(ValueError, match=r"betas must (be a non-empty|lie in .0, 1.).*(shape|betas.\d. =)"):
        schedules.from_betas(betas)


@pytest.mark.parametrize("factory", SCHEDULES.values())
@pytest.mark.parametrize("T", [0, -3, 2.5, True])
def test_broken_T_is_refused(factory, T):
    with pytest.raises(ValueError, match="T must be a whole number of at least"):
        factory(T)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))],
                         ids=["copy", "deepcopy", "pickle"])
def test_a_copy_is_read_only_and_one_table(copied):
    """A writable copy, apart from the table that abar() reads, would give two answers."""
    for schedule in (schedules.cosine(20), schedules.even_loss(5), Schedule(np.array([0.9, 0.01]), "mine")):
        twin = copied(schedule)
        assert twin.name == schedule.name and np.array_equal(twin.alpha_bar, schedule.alpha_bar)
        assert np.array_equal(twin.abar(np.arange(-1, twin.T)), schedule.abar(np.arange(-1, twin.T)))
        with pytest.raises(ValueError, match="read-only"):
            twin.alpha_bar[0] = 0.5
        assert np.shares_memory(twin.alpha_bar, twin._from_clean)


def test_T_may_be_any_integer():
    for text in SCHEDULES:
        for T in (np.int8(127), np.uint8(255), np.int64(127), np.array(127)):      # T + 1 is beyond an int8, a uint8
            made, right = (schedules.schedule_from(text, times, allow_signal=True) for times in (T, int(T)))
            assert np.array_equal(made.alpha_bar, right.alpha_bar)
