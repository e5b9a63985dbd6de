"""docs/laws.md is up to date and complete, and a law that fails prints its statement."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.law_table import LAWS, NOT_YET, PAGE, ROOT, Law, Row, laws_of, page, unproved


def run(*command, **more):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, **more)


@pytest.mark.slow
def test_the_page_is_up_to_date():
    done = run("-m", "tests.support.law_table", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_law_has_a_test():
    """The page must list exactly the laws that have none, or only in part, under "Not yet"."""
    laws, _, missing = PAGE.read_text(encoding="utf-8").partition("## Not yet")
    proved = {int(number) for number in re.findall(r"^\| (\d+) \|", laws, re.MULTILINE)}
    said = {int(number) for number in re.findall(r"^- law (\d+): ", missing, re.MULTILINE)}
    assert said == set(LAWS) - proved | set(NOT_YET)
    assert NOT_YET.keys() <= proved


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


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["fixed", "random"])
def test_a_failing_law_prints_its_formula_its_numbers_and_its_seed(tmp_path, profile):
    """Fixed examples follow from the test's text, so there is no seed to print."""
    (tmp_path / "test_broken_laws.py").write_text(BROKEN)
    pytest_of_ours = ["-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path),
                      "-p", "conftest", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)}
    chosen = [] if profile == "fixed" else ["--hypothesis-profile=random"]
    said = run(*pytest_of_ours, *chosen, str(tmp_path), env=environment).stdout
    assert "2 failed, 1 passed" in said
    for line in ("formula    a = b", "source     Nobody 2026, eq. 7", "tolerance  1e-7: rounding",
                 "n=51,", "formula    a = c", "formula    a = d"):
        assert line in said
    assert re.search(r"-+ law 12 -+", said) and re.search(r"-+ law 12a -+", said) and re.search(r"-+ law 12b -+", said)
    assert "again      python -m pytest 'test_broken_laws.py::test_of_a_seed[7]'" in said
    assert "formula    passes" not in said
    # the printed command reproduces the failure
    line = re.search(r"again      python -m pytest '.*::test_of_examples'(.*)", said).group(1)
    assert re.fullmatch("" if profile == "fixed" else r" --hypothesis-profile=random --hypothesis-seed=\d+", line)
    again = run(*pytest_of_ours, f"{tmp_path}/test_broken_laws.py::test_of_examples", *line.split(),
                env=environment).stdout
    assert "1 failed" in again and f"test_of_examples'{line}\n" in again


# ---- what a test allows, and what its law states -----------------------------------------------------------------

SAID = re.compile(r"(?:^|; |, and |, but |\bwithin )(\.?\d[\d.]*(?:e-?\d+)?)(?![\d.]* ?%)|(\.?\d[\d.]*) ?%")


def said(tolerance: str) -> float:
    """The largest number that a tolerance allows: numbers at the start of the text or of a part of it, and percentages.

    Other numbers belong to reasons, such as rounding or sizes; a number above 1 is not a tolerance.
    """
    numbers = [float(number) if number else float(percent) / 100 for number, percent in SAID.findall(tolerance)]
    return max((number for number in numbers if number < 1), default=0.0)


def used(function: ast.FunctionDef) -> float:
    """The largest rtol, atol, rel or abs in a function's body, or the default of NumPy or pytest if it has none."""
    numbers = [0.0]
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        given = {word.arg: word.value for word in call.keywords if word.arg in ("rtol", "atol", "rel", "abs")}
        numbers += [leaf.value for value in given.values() for leaf in ast.walk(value)
                    if isinstance(leaf, ast.Constant) and isinstance(leaf.value, float)]
        name = ast.unparse(call.func)
        if name.endswith("assert_allclose") and "rtol" not in given and ast.unparse(call.args[1]) != "0":
            numbers.append(1e-7)
        if name.endswith("approx") and not given:
            numbers.append(1e-6)
    return max(numbers)


def laxer(text: str) -> list[str]:
    """The test functions of a file that allow more than the tolerances of all their laws. Helpers are not examined."""
    tree = ast.parse(text)
    named = {node.targets[0].id: node.value for node in tree.body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}        # in_the_middle = ...
    found = []
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        marks = [named.get(mark.id, mark) if isinstance(mark, ast.Name) else mark for mark in function.decorator_list]
        allowed = [said(ast.literal_eval(word.value)) for mark in marks
                   if ast.unparse(mark).startswith("pytest.mark.law(")
                   for word in mark.keywords if word.arg == "tolerance"]
        if allowed and used(function) > max(allowed):
            found.append(f"{function.name} allows {used(function):g} and says {max(allowed):g}")
    return found


@pytest.mark.slow
def test_no_test_allows_more_than_its_law_states():
    assert not [f"{path.name}: {line}" for path in sorted((ROOT / "tests").rglob("test_*.py"))
                for line in laxer(path.read_text(encoding="utf-8"))]


LAX = """
mark = pytest.mark.law(1, "a = b", source="derived", tolerance="1e-9: rounded at 1e-16 over 6e-6")

@mark
def test_a():
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-8 * size)

@mark
@pytest.mark.law(2, "a = b", source="derived", tolerance="2 % for one, and .001 for the other")
def test_b():
    assert a == pytest.approx(b, rel=0.02)

@mark
def test_c():
    np.testing.assert_allclose(a, 0, atol=1e-9)
    assert a == pytest.approx(b, abs=1e-9)

@mark
def test_d():
    np.testing.assert_allclose(a, b, atol=1e-12)

@mark
def test_e():
    assert a == pytest.approx(b)
"""


def test_a_test_that_allows_more_than_its_law_states_is_found():
    assert laxer(LAX) == ["test_a allows 1e-08 and says 1e-09", "test_d allows 1e-07 and says 1e-09",
                          "test_e allows 1e-06 and says 1e-09"]


# ---- the markers ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, formula, message", [
    (0, "a = b", "a law's number"), ("a2", "a = b", "a law's number"), (1.5, "a = b", "a law's number"),
    (12, " ", "law 12 must state its formula"),
])
def test_an_incomplete_marker_is_refused(number, formula, message):
    with pytest.raises(ValueError, match=message):
        Law(number, formula, source="derived", tolerance="exact")


def test_laws_are_sorted_by_their_numbers():
    marks = [SimpleNamespace(args=(number, "a = b"), kwargs={"source": "derived", "tolerance": "exact"})
             for number in ("12a", 3, 12, "2b")]
    item = SimpleNamespace(iter_markers=lambda name: marks)
    assert [law.number for law in laws_of(item)] == ["2b", 3, 12, "12a"]


def test_the_page_lists_untested_laws_and_escapes_its_tables():
    law = Law(9, "q(x_s|x_t) = 1", source="beta~ < beta", tolerance="exact")
    rows = [Row(law, "tests/laws/test_posterior.py", "test_that", slow=True)]
    text = page(rows)
    assert "## The posterior" in text and "## Samplers" not in text
    assert (r"| 9 | `q(x_s\|x_t) = 1` | beta\~ \< beta | "
            "[`test_that`](../tests/laws/test_posterior.py) (slow) | exact |") in text
    assert unproved(rows) == [number for number in LAWS if number != 9]
    assert "\n- law 8: all of it\n" in text and "\n- law 9:" not in text
    assert "\n- law 33: all of it\n" in text
    assert f"\n- law 25: {NOT_YET[25]}\n" in page([*rows, Row(replace(law, number=25), "test_b.py", "test_b", False)])
    assert text.endswith("- law 39: all of it\n")
