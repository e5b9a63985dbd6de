"""Whatever a learner's file does is one sentence: here what needs no process of its own."""

import numpy as np
import pytest

from minidiff.course.exercise import exercise, name_of
from minidiff.course.judge import BROKEN, BUG, FAULT, OPEN, RIGHT
from minidiff.course.learner import verdict_on
from minidiff.errors import UserError

ANSWER = """
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


def test_a_right_answer_is_right(tmp_path):
    assert verdict(tmp_path, ANSWER).kind == RIGHT


# what the file holds; the verdict's kind; what its sentence says
CASES = {
    "a hole": (START + "raise NotImplementedError('your code here')", OPEN,
               "not written yet: the hole is at line 3 of ex01_q_sample.py"),
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
    "nothing returned": (START + "pass", BROKEN, ") returned None: is a `return` missing, or inside an `if`?"),
    "a list": (START + "return [1.5, 2]", BROKEN,
               "x_t should be an array of shape (3, 4, 4, 3) and is [1.5, 2]: wrap it in np.array(...), for x_0"),
    "a function": (START + "return q_sample", BROKEN, "and is a function"),
    "a wrong shape": (START + "return x_0[:1]", BROKEN, "has shape (1, 4, 4, 3) and should have shape (3, 4, 4, 3)"),
    "texts": (START + "return np.full(x_0.shape, 'x')", BROKEN, "should hold real numbers and has dtype <U1"),
    "complex numbers": (START + "return x_0 + 0j", BROKEN, "should hold real numbers and has dtype complex128"),
    "an array of objects": (START + "return x_0.astype(object)", BROKEN, "and has dtype object"),
    "NaN": (START + "return x_0 * np.nan", BROKEN,
            "(nan comes from the square root or the logarithm of a negative number, or from 0/0), from x_0 = "),
    "a wrong dtype": (ANSWER.replace(".astype(x_0.dtype)", ""), BROKEN,
                      "x_t has dtype float64 and should have float32: end with .astype(x_0.dtype), for x_0"),
    "a changed argument": (START + "x_0 *= 0.5\n    return x_0", FAULT,
                           "changed its argument x_0: compute with a copy"),
    "random numbers of its own": (START + "return np.random.standard_normal(x_0.shape)", BROKEN,
                                  "gives other results when it is called again"),
    "another signature": ("def q_sample(x_0, t):\n    return x_0", FAULT,
                          "q_sample is called with (alpha_bar, x_0, t, eps): keep these parameters"),
    "no such function": ("def sample():\n    pass", FAULT, "has no q_sample: keep the name"),
    "a number of that name": ("q_sample = 3", FAULT, "should be a function or a class, and is 3"),
    "no Python": ("def q_sample(:\n", FAULT, "ex01_q_sample.py, line 1, is not Python: "),
    "a wrong indentation": ("def q_sample(a):\nreturn 1\n", FAULT, "line 2, is not Python: expected an indented"),
    "an empty file": ("", FAULT, "ex01_q_sample.py is empty: was it saved?"),
    "blank lines": ("\n \n", FAULT, "ex01_q_sample.py is empty: was it saved?"),
    "only a comment": ("# later", FAULT, "has no q_sample"),
    "bytes": (b"\x00\x01\xff\xfe", FAULT, "is not Python"),
    "another encoding": ("x = 'caf\xe9'\n".encode("latin-1"), FAULT, "is not Python"),
    "a huge file": (b"#" * (2 << 20), FAULT, "larger than 1 MiB"),
    "nested too deeply": ("(" * 10_000, FAULT, "is not Python"),
    "a warning": ("import warnings\nwarnings.warn('oh')\n" + ANSWER, RIGHT, "right: all 4 laws hold"),
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


DDPM = "import math\nimport numpy as np\ndef ddpm_step(alpha_bar, x_t, t, eps_hat, z):\n" \
       "    a, b = alpha_bar[t], alpha_bar[t - 1]\n    beta = 1 - a / b\n" \
       "    mean = (x_t - beta / np.sqrt(1 - a) * eps_hat) / np.sqrt(1 - beta)\n"
BETAS = "import numpy as np\ndef alpha_bar(betas):\n    return "
SOFTMAX = "import numpy as np\ndef softmax(x):\n    e = np.exp(x - x.max(-1, keepdims=True))\n" \
          "    y = e / e.sum(-1, keepdims=True)\n"
PULLBACK = "    return y, lambda dy: y * (dy - (y * dy).sum(-1, keepdims=True))"
EMA = "def ema_step(average, weights, n, decay):\n    d = min(decay, (1 + n) / (10 + n))\n" \
      "    return d * average + (1 - d) * weights\n"
# a file of another exercise; what its verdict says
OTHERS = {
    "the last entry, by NumPy": ("ex07_ddpm_step", DDPM + "    return mean + np.sqrt((1 - b) / (1 - a) * beta) * z",
                                 BUG, "nan at t = 0, the square root of a negative number: alpha_bar[t - 1] is "),
    "the last entry, by math": ("ex07_ddpm_step", DDPM + "    return mean + math.sqrt((1 - b) / (1 - a) * beta) * z",
                                FAULT, ": it is the square root or the logarithm of a negative number; in the step to "
                                       "the clean image alpha_bar[-1] is Python's last entry"),
    "the last entry, and another bug": ("ex07_ddpm_step", DDPM.replace("eps_hat) /", "eps_hat[::-1]) /")
                                        + "    return mean + np.sqrt((1 - b) / (1 - a) * beta) * z", BROKEN,
                                        "; in the step to the clean image alpha_bar[-1] is Python's last entry"),
    "one result in place of two": ("ex04_posterior", "def posterior(alpha_bar, x_0, x_t, t):\n    return x_0", BROKEN,
                                   "the result should be 2 values, (mean, variance), and is float64 (2, 3), at t = "),
    "nothing, where a law computes with it": (
        "ex13_bits_per_dim", "def bits_per_dim(x_0, x0_hat, sigma):\n    pass", BROKEN,
        "bits_per_dim(float64 (1,), float64 (1,), 0.02) returned None: is a `return` missing, or inside an `if`?"),
    "a text, where a law computes with it": (
        "ex16_clip_loss", "def clip_loss(image, text, log_scale):\n    return 'seven'", BROKEN,
        "clip_loss(float64 (1, 1), float64 (1, 1), 0) returned 'seven' where a number is expected"),
    "an array of texts, where a law computes with it": (
        "ex16_clip_loss", "import numpy as np\ndef clip_loss(image, text, log_scale):\n    return np.array('a')", FAULT,
        "clip_loss returned <U1 (): a law cannot compute with it: "),
    "yield": ("ex02_alpha_bar", BETAS.replace("return", "yield") + "betas", FAULT,
              ") returned a generator: use `return` in place of `yield`"),
    "an upside-down ratio": (
        "ex07_ddpm_step", DDPM.replace("1 - a / b", "1 - b / a") + "    return mean + np.sqrt((1 - b) / (1 - a) * "
        "beta) * z", BROKEN, "; is a ratio of alpha_bars upside down?"),
    "an upside-down ratio, by math": (
        "ex07_ddpm_step", DDPM.replace("1 - a / b", "1 - b / a") + "    return mean + math.sqrt((1 - b) / (1 - a) * "
        "beta) * z", FAULT, "; is a ratio of alpha_bars upside down?"),
    "float32 work": ("ex02_alpha_bar", BETAS + "np.cumprod(1 - betas).astype(np.float32)", BROKEN,
                     "alpha_bar has dtype float32 and should have float64"),
    "float32 inside": ("ex02_alpha_bar", BETAS + "np.cumprod(1 - betas.astype(np.float32)).astype(float)", BROKEN,
                       "7 digits: is something float32?"),
    "a float32 y in the pullback": (
        "ex19_softmax", SOFTMAX + "    z = y.astype(np.float32)\n" + PULLBACK.replace("y", "z").replace("dz", "dy")
        .replace("return z", "return y"), BROKEN, "7 digits: is something float32?"),
    "a pullback that changes y": (
        "ex19_softmax", SOFTMAX + "    def pullback(dy):\n        dx = y * (dy - (y * dy).sum(-1, keepdims=True))\n"
        "        y[...] = 0\n        return dx\n    return y, pullback", BROKEN,
        "the pullback changed the y that was returned"),
    "a pullback that works once": (
        "ex19_softmax", SOFTMAX + "    kept = y.copy()\n    def pullback(dy):\n        dx = kept * (dy - (kept * dy)"
        ".sum(-1, keepdims=True))\n        kept[...] = 0\n        return dx\n    return y, pullback", BROKEN,
        "another result when it is called twice"),
    "one y for all calls": (
        "ex19_softmax", SOFTMAX + "    global Y\n    Y = y\n    return y, lambda dy: Y * (dy - (Y * dy).sum(-1, "
        "keepdims=True))", BROKEN, "another result after another call with other numbers"),
    "the weights themselves": (
        "ex18_ema", EMA.replace("    return", "    if d == 0:\n        return weights\n    return"), BROKEN,
        "is not a new array, and shares its numbers with the argument weights"),
    "the average itself": (
        "ex18_ema", EMA.replace("    return", "    if (average == weights).all():\n        return average\n    return"),
        BROKEN, "shares its numbers with the argument average"),
    "a return only sometimes": (
        "ex18_ema", EMA.replace("    return", "    if n < 2:\n        return"), BROKEN,
        "ema_step(float64 (2, 3), float64 (2, 3), 2, 0) returned None: is a `return` missing, or inside an `if`?"),
    "a further parameter": ("ex11_guidance", "def guided(a, b, scale, w):\n    return a + scale * (b - a)", FAULT,
                            "guided is called with (eps_uncond, eps_cond, scale): keep these parameters"),
    "a further parameter with a default": ("ex11_guidance", "def guided(a, b, scale, w=1):\n    return a + scale * "
                                           "(b - a)", RIGHT, "right: all 4 laws hold"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_may_go_wrong_elsewhere(case, tmp_path):
    name, text, kind, said = OTHERS[case]
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    with np.errstate(all="ignore"):
        found = verdict_on(tmp_path / f"{name}.py", exercise(name))
    assert (found.kind, said in found.sentence) == (kind, True), found
