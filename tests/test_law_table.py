"""docs/laws.md is what the tests say, no law is missing, and a law that fails says what it claims."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from law_table import LAWS, PAGE, ROOT, Law, Row, laws_of, page, unproved


def run(*command, **more):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, **more)


def test_the_page_is_what_the_tests_say():
    done = run("-m", "tests.law_table", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_law_is_proved_by_some_test():
    """Where one is not, the page must say so under "Not yet", and has no such heading if none is missing."""
    text = PAGE.read_text(encoding="utf-8")
    proved = {int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    missing = [number for number in LAWS if number not in proved]
    assert ("## Not yet" in text) == bool(missing)
    assert all(re.search(rf"No code to prove these of:.*\b{number}\b", text) for number in missing)


BROKEN = """
import numpy as np
import pytest
from hypothesis import given, strategies as st

@pytest.mark.law(12, "a = b", source="Nobody 2026, eq. 7", tolerance="1e-7: rounding")
@given(st.integers(0, 100))
def test_of_examples(n):
    np.testing.assert_allclose(n, 0.0, atol=50)

@pytest.mark.law("12a", "a = c", source="derived", tolerance="exact")
@pytest.mark.law("12b", "a = d", source="derived", tolerance="exact")
@pytest.mark.parametrize("seed", [7])
def test_of_a_seed(seed):
    assert seed == 8

@pytest.mark.law(13, "passes", source="derived", tolerance="exact")
def test_that_passes():
    pass
"""


def test_a_failing_law_prints_its_formula_its_numbers_and_its_seed(tmp_path):
    (tmp_path / "test_broken_laws.py").write_text(BROKEN)
    pytest_of_ours = ["-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path),
                      "-p", "conftest", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)}
    said = run(*pytest_of_ours, str(tmp_path), env=environment).stdout
    assert "2 failed, 1 passed" in said
    for line in ("formula    a = b", "source     Nobody 2026, eq. 7", "tolerance  1e-7: rounding",
                 "n=51,", "formula    a = c", "formula    a = d"):
        assert line in said
    assert re.search(r"-+ law 12 -+", said) and re.search(r"-+ law 12a -+", said) and re.search(r"-+ law 12b -+", said)
    assert "again      python -m pytest 'test_broken_laws.py::test_of_a_seed[7]'" in said
    assert "formula    passes" not in said
    # the line that it prints does bring the failure back
    seed = re.search(r"again      python -m pytest '.*::test_of_examples' --hypothesis-seed=(\d+)", said).group(1)
    again = run(*pytest_of_ours, f"{tmp_path}/test_broken_laws.py::test_of_examples", f"--hypothesis-seed={seed}",
                env=environment).stdout
    assert "1 failed" in again and f"--hypothesis-seed={seed}" in again


@pytest.mark.parametrize("number, formula, message", [
    (0, "a = b", "a law's number"), ("a2", "a = b", "a law's number"), (1.5, "a = b", "a law's number"),
    (12, " ", "law 12 must state its formula"),
])
def test_a_marker_that_says_too_little_is_refused(number, formula, message):
    with pytest.raises(ValueError, match=message):
        Law(number, formula, source="derived", tolerance="exact")


def test_markers_are_read_in_the_order_of_their_numbers():
    marks = [SimpleNamespace(args=(number, "a = b"), kwargs={"source": "derived", "tolerance": "exact"})
             for number in ("12a", 3, 12, "2b")]
    item = SimpleNamespace(iter_markers=lambda name: marks)
    assert [law.number for law in laws_of(item)] == ["2b", 3, 12, "12a"]


def test_the_page_names_what_is_missing_and_escapes_its_tables():
    law = Law(9, "q(x_s|x_t) = 1", source="beta~ < beta", tolerance="exact")
    rows = [Row(law, "tests/laws/test_posterior.py", "test_that", slow=True)]
    text = page(rows)
    assert "## The posterior" in text and "## Samplers" not in text
    assert (r"| 9 | `q(x_s\|x_t) = 1` | beta\~ \< beta | "
            "[`test_that`](../tests/laws/test_posterior.py) (slow) | exact |") in text
    assert unproved(rows) == [number for number in LAWS if number != 9]
    assert text.endswith("37, 38, 39.\n")
