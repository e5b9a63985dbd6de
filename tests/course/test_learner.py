"""Whatever a learner's file does is one sentence: here what needs no process of its own."""

import pytest

from minidiff.course.exercise import exercise, name_of
from minidiff.course.judge import BROKEN, FAULT, KEPT, OPEN
from minidiff.course.learner import verdict_on
from minidiff.errors import UserError

RIGHT = """
import numpy as np

def q_sample(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, *[1] * (x_0.ndim - 1))
    return (np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps).astype(x_0.dtype)
"""
START = "import sys, numpy as np\ndef q_sample(alpha_bar, x_0, t, eps):\n    "


def verdict(tmp_path, text: str | bytes):
    path = tmp_path / "ex01_q_sample.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = verdict_on(path, exercise("ex01_q_sample"))
    assert "\n" not in found.sentence
    return found


def test_a_right_answer_is_kept(tmp_path):
    assert verdict(tmp_path, RIGHT).kind == KEPT


# what the file holds; the verdict's kind; what its sentence says
CASES = {
    "a hole": (START + "raise NotImplementedError('your code here')", OPEN, "has its hole still, at line 3"),
    "an exception": (START + "return x_0 / [][0]", FAULT,
                     "ex01_q_sample.py, line 3 (`return x_0 / [][0]`) raises IndexError: list index out of range, in "
                     "q_sample(float64 ("),
    "an exception in a function of its own": ("def f():\n    return {}['a']\n" + START + "return f()", FAULT,
                                              "line 2 (`return {}['a']`) raises KeyError: 'a'"),
    "an exception when it is loaded": ("import numpy\n1 / 0\n", FAULT, "line 2 (`1 / 0`) raises ZeroDivisionError"),
    "a module that is not there": ("import nowhere_at_all\n", FAULT, "line 1 (`import nowhere_at_all`) raises Module"),
    "a recursion without end": (START + "return q_sample(alpha_bar, x_0, t, eps)", FAULT, "raises RecursionError"),
    "sys.exit": (START + "sys.exit()", FAULT, "line 3 (`sys.exit()`) ends the program, in q_sample("),
    "sys.exit when it is loaded": ("import sys\nsys.exit(0)\n", FAULT, "line 2 (`sys.exit(0)`) ends the program"),
    "nothing returned": (START + "pass", BROKEN, "x_t should be an array of shape (3, 4, 4, 3) and is None"),
    "a list": (START + "return [1.5, 2]", BROKEN, "and is [1.5, 2]"),
    "a function": (START + "return q_sample", BROKEN, "and is a function"),
    "a wrong shape": (START + "return x_0[:1]", BROKEN, "has shape (1, 4, 4, 3) and should have shape (3, 4, 4, 3)"),
    "texts": (START + "return np.full(x_0.shape, 'x')", BROKEN, "should hold real numbers and has dtype <U1"),
    "complex numbers": (START + "return x_0 + 0j", BROKEN, "should hold real numbers and has dtype complex128"),
    "an array of objects": (START + "return x_0.astype(object)", BROKEN, "and has dtype object"),
    "NaN": (START + "return x_0 * np.nan", BROKEN, "is nan and should be"),
    "a wrong dtype": (RIGHT.replace(".astype(x_0.dtype)", ""), BROKEN, "has dtype float64 and should have float32"),
    "a changed argument": (START + "x_0 *= 0.5\n    return x_0", FAULT, "changed its argument 2: compute with a copy"),
    "random numbers of its own": (START + "return np.random.standard_normal(x_0.shape)", BROKEN,
                                  "gives other results when it is called again"),
    "another signature": ("def q_sample(x_0, t):\n    return x_0", FAULT, "TypeError: q_sample() takes 2 positional"),
    "no such function": ("def sample():\n    pass", FAULT, "has no q_sample: keep the name"),
    "a number of that name": ("q_sample = 3", FAULT, "should be a function or a class, and is 3"),
    "no Python": ("def q_sample(:\n", FAULT, "ex01_q_sample.py, line 1, is not Python: "),
    "a wrong indentation": ("def q_sample(a):\nreturn 1\n", FAULT, "line 2, is not Python: expected an indented"),
    "an empty file": ("", FAULT, "has no q_sample"),
    "bytes": (b"\x00\x01\xff\xfe", FAULT, "is not Python"),
    "another encoding": ("x = 'caf\xe9'\n".encode("latin-1"), FAULT, "is not Python"),
    "a huge file": (b"#" * (2 << 20), FAULT, "larger than 1 MiB"),
    "nested too deeply": ("(" * 10_000, FAULT, "is not Python"),
    "a warning": ("import warnings\nwarnings.warn('oh')\n" + RIGHT, KEPT, "kept: all 4 laws hold"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_may_go_wrong(case, tmp_path):
    text, kind, said = CASES[case]
    found = verdict(tmp_path, text)
    assert (found.kind, said in found.sentence) == (kind, True), found


def test_a_file_that_is_not_there_or_a_folder(tmp_path):
    for path in (tmp_path / "ex01_none.py", tmp_path):
        assert verdict_on(path, exercise("ex01_q_sample")).kind == FAULT


@pytest.mark.parametrize("text", ["1", "01", "ex01", "ex1", "EX01", "ex01_q_sample", "ex01_q_sample.py",
                                  "exercises/ex01_q_sample.py", "a\\b\\ex01_mine.py"])
def test_names_of_an_exercise(text):
    assert name_of(text) == "ex01_q_sample"


@pytest.mark.parametrize("text", ["", "99", "0", "-1", "q_sample", "ex", "1.5", "1" * 5000, "\u0661", "ex01x"])
def test_what_is_no_exercise(text):
    with pytest.raises(UserError, match="there is no exercise"):
        name_of(text)
