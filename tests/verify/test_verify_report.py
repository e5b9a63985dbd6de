"""verify.report: correct schedules keep every law, and a law that raises does not hide the others."""

import numpy as np
import pytest
from hypothesis import given, settings
from support.diffusion_strategies import any_schedule
from support.verifying import NOISE, broken

from minidiff import verify
from minidiff.diffusion import losses, schedules
from minidiff.diffusion.schedules import SCHEDULES, Schedule
from minidiff.verify import forward, rows


@pytest.mark.parametrize("name", SCHEDULES)
def test_our_schedules_keep_every_law(name):
    """Each fails by chance in 6e-7 of all runs, because of the simulated chains. Other laws draw only their inputs."""
    schedule = schedules.schedule_from(name, 200, allow_signal=True)
    assert broken(verify.report(schedule)) == (set() if schedule.reaches_noise else {NOISE})
    assert broken(verify.report(schedules.zero_terminal_snr(schedule))) == set()


@pytest.mark.slow
@settings(max_examples=25)
@given(any_schedule(ends_at_zero=None))
def test_any_schedule_keeps_every_law(schedule):
    """The tolerances allow the rounding of any table, not only of minidiff's."""
    report = verify.report(schedule)
    assert broken(report) == (set() if schedule.reaches_noise else {NOISE})
    assert all(not row.passed for row in report if row.reason)


def test_tables_of_extreme_steps_keep_every_law():
    tables = [[1 - 1e-12, 1e-12], [1 - 1e-15, 0.5, 1e-300], [0.5, 1e-320], [0.019999]]
    for table in tables:
        assert broken(verify.report(Schedule(table))) == set(), table


def test_tolerances_allow_only_rounding():
    """No tolerance hides an error in the ninth digit, except in the simulation."""
    schedule = schedules.cosine(60)
    for row in verify.report(schedule, betas=schedule.betas):
        # an order is a bound, and the first time of a list an integer
        if row.law not in ("1 simulation", "26 starts at T-1") and not row.reason and row.side != ">=":
            assert row.tolerance < 1e-9 * (1 + abs(row.expected)), row


def test_the_full_length_takes_seconds_and_keeps_every_law(monkeypatch):
    monkeypatch.setattr(forward, "chains", lambda T: 1000)
    report = verify.report(schedules.cosine())
    assert broken(report) == set() and sum(row.passed for row in report) >= 35


def test_a_schedule_of_one_time_skips_laws_that_need_two():
    report = verify.report(Schedule([0.01]))
    skipped = {row.law for row in report if row.reason}
    assert {"3 SNR falls", "8 Bayes pointwise", "16 reverse variance", "18 bound weights", "24 one step",
            "25 second order"} <= skipped
    assert broken(report) == set()
    text = verify.table(report)
    assert "skipped   8 Bayes pointwise: needs two times, T >= 2" in text
    assert text.endswith(f"0 broken, {sum(row.verdict == verify.SKIPPED for row in report)} skipped")


def test_the_report_depends_on_the_seed():
    a, b, c = (verify.report(schedules.cosine(20), seed=seed) for seed in (1, 1, 2))
    numbers = [[(r.expected, r.measured) for r in report if not r.reason] for report in (a, b, c)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert any("seed 2" in row.where for row in c)


def test_a_schedule_that_keeps_signal_breaks_the_noise_law_alone():
    report = verify.report(schedules.linear(200, allow_signal=True))
    assert broken(report) == {NOISE}
    row = next(row for row in report if row.law == NOISE)
    assert (row.side, row.expected) == ("<=", 0.02) and row.measured == pytest.approx(0.132, abs=1e-3)
    text = verify.table(report)
    assert "alpha_bar[199] <= 0.02;" in text and "  <= 0.02  " in text and "numbers   expected <= 0.02" in text
    assert "alpha_bar[199] = 0.132" in text and "let alpha_bar fall closer to 0, by larger betas" in text


def test_every_law_has_the_name_of_its_first_row():
    """The row of a law that raises has this name."""
    rng = np.random.default_rng(0)
    for law in verify.LAWS:
        assert next(iter(law.rows(schedules.cosine(20), rng))).law == law.name


def test_a_law_that_raises_is_broken_and_hides_no_other(monkeypatch):
    def raises(*a, **k):
        raise ZeroDivisionError("float division by zero")
    monkeypatch.setattr(losses, "bound_weight", raises)
    report = verify.report(schedules.cosine(20))
    assert broken(report) == {"18 bound weights"}
    assert "ZeroDivisionError: float division by zero" in verify.table(report)


@pytest.mark.parametrize("status", [0, None, 3])
def test_code_that_exits_breaks_its_law_and_the_report_goes_on(status, monkeypatch):
    def leaves(*a, **k):
        raise SystemExit(status)
    monkeypatch.setattr(losses, "bound_weight", leaves)
    assert broken(verify.report(schedules.cosine(20))) == {"18 bound weights"}
    row, = rows.computed(rows.Law("law", lambda: (leaves() for _ in range(1))))
    assert not row.passed and row.where == f"SystemExit: {status}"


@pytest.mark.parametrize("wrong", [[0.1, 0.9], None, schedules.cosine, np.array([0.5])])
def test_only_a_schedule_gets_a_report(wrong):
    with pytest.raises(TypeError, match=r"^schedule must be a Schedule, such as schedules.from_betas\(\[...\]\), got "
                                        rf"{type(wrong).__name__}$"):
        verify.report(wrong)


def test_the_report_does_not_depend_on_docstrings(monkeypatch):
    """`python -OO` removes them."""
    for law in verify.LAWS:
        monkeypatch.setattr(law.rows, "__doc__", None)
    monkeypatch.setattr(losses, "bound_weight", None)
    assert broken(verify.report(schedules.cosine(20))) == {"18 bound weights"}
