"""The rows of a report: when a row passes, and the table that shows them."""

import math

import pytest

from minidiff import verify
from minidiff.diffusion import gaussian, schedules
from minidiff.verify import rows


@pytest.mark.parametrize("expected, measured, tolerance, passed", [
    (1.0, 1.0, 0.0, True), (1.0, 1.0 + 1e-15, 1e-14, True), (1.0, 1.1, 0.09, False), (0.0, 1e-300, 0.0, False),
    (1.0, math.nan, 1.0, False), (1.0, math.inf, math.inf, False), (-math.inf, -math.inf, 0.0, True),
    (math.nan, math.nan, 1.0, False), (1.0, 2.0, math.nan, False),
])
def test_a_row_passes_only_within_its_tolerance(expected, measured, tolerance, passed):
    assert rows.compare("law", "it", expected, measured, tolerance, "").passed is passed
    many = rows.compare("law", "it", [1.0, expected], [1.0, measured], tolerance, "", "case {}".format)
    assert many.passed is (passed and not math.isnan(tolerance))
    assert passed or many.where in ("case 1", "case 0" if math.isnan(tolerance) else "")


def test_a_law_that_raises_keeps_its_earlier_rows():
    def rows_of():
        yield rows.compare("law", "first", 1.0, 1.0, 0.0, "")
        raise ZeroDivisionError
    assert [row.verdict for row in rows.computed(rows.Law("law", rows_of))] == ["kept", "BROKEN"]


def test_the_table_is_aligned_and_no_wider_than_a_terminal():
    report = verify.report(schedules.linear(7, allow_signal=True))
    report += [verify.Row("a law with a long name " * 4, "words " * 40, -1.23456789e-200, 1.5, 1.5, 1e-300,
                          "x = y " * 60, "somewhere " * 30)]
    lines = verify.table(report).splitlines()
    assert max(map(len, lines)) <= 120
    words = ("kept", "BROKEN", "skipped")
    ends = {line.rindex(word) for line in lines for word in words if line.endswith("  " + word)}
    assert len(ends) == 1                                   # one column of verdicts
    assert sum(line.endswith("  kept") for line in lines) == sum(row.passed for row in report)
    assert lines[-1] == f"{sum(row.passed for row in report)} kept, 2 broken, 1 skipped"


def test_a_broken_row_shows_its_formula_numbers_and_seed(monkeypatch):
    monkeypatch.setattr(gaussian, "q_step", lambda schedule, s, t: (schedule.alpha(t), 1 - schedule.abar(t)))
    text = verify.table(verify.report(schedules.cosine(50), seed=17))
    section = text[text.index("BROKEN  2 any two times: sigma2_ts"):]
    section = section[: section.index("\n\n")]
    for word in ("sigma2_ts = sigma_t^2 - alpha_ts^2 sigma_s^2", "expected 0.", "measured 0.", "allowed", "s = ",
                 "seed 17"):
        assert word in section
