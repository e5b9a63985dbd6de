"""Whatever a user's own code raises, wherever it is called, is one sentence and exit status 2."""

import numpy as np
import pytest
from support.command_line import call

from minidiff import register_dataset
from minidiff.data.dataset import DATASETS, Dataset
from minidiff.errors import UserError, brief, user_code

RAISED = '''
class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")
class Base(BaseException):
    pass
class Deep(Base):
    def __str__(self):
        raise self
Forged = type("x\\\\nminidiff: all is well", (Exception,), {})
'''
HOW = {"no words": "raise Mute", "no Exception": "raise Base('x')", "neither": "raise Deep",
       "exit": "raise SystemExit(0)", "generator exit": "raise GeneratorExit", "forged": "raise Forged('a\\x1b[2J')"}
SCHEDULER = """
import numpy as np
class make:
    predicts = "eps"
    alpha_bar = np.array([.9, .5, .1])
    def set_steps(self, n):
        self.timesteps = np.array([2, 1, 0])
    def add_noise(self, x_0, eps, t):
        return x_0
    def step(self, prediction, t, x_t, z):
        return x_t
"""
SCHEDULE = """
from minidiff.diffusion import schedules
class S(schedules.Schedule):
    @property
    def betas(self):
        {how}
def make():
    return S([.5, .1, .01])
"""
PLACES = {
    "the module": ("{how}\n", "--python"),
    "the function": ("def make():\n    {how}\n", "--python"),
    "the result": ("class A:\n    def __array__(self, *a, **k):\n        {how}\nmake = A\n", "--python"),
    "the schedule": (SCHEDULE, "--python"),
    "the factory": ("def make():\n    {how}\n", "--scheduler"),
    "an attribute": ("class make:\n    def __getattr__(self, name):\n        {how}\n", "--scheduler"),
    "a property": (SCHEDULER + "    @property\n    def alpha_bar(self):\n        {how}\n", "--scheduler"),
    "set_steps": (SCHEDULER + "    def set_steps(self, n):\n        {how}\n", "--scheduler"),
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_verify(how, place, tmp_path, monkeypatch, capsys):
    code, option = place
    name = f"code_{abs(hash((how, place)))}"
    (tmp_path / f"{name}.py").write_text(RAISED + code.format(how=how))
    monkeypatch.chdir(tmp_path)
    assert call("verify", option, f"{name}:make") == 2
    said = capsys.readouterr().err
    assert said.startswith("minidiff: ") and said.count("\n") == 1 and "\x1b" not in said, said


@pytest.mark.parametrize("change", ["['alpha_bar'] = s.alpha_bar[:2]", "['alpha_bar'] = None",
                                    "['alpha_bar'] = s.alpha_bar[::-1]", "['_from_clean'] = 1 - s._from_clean",
                                    ".pop('_from_clean')", "['name'] = object()"])
def test_an_inconsistent_schedule_is_refused(change, tmp_path, monkeypatch, capsys):
    name = f"schedule_{abs(hash(change))}"
    (tmp_path / f"{name}.py").write_text("from minidiff.diffusion.schedules import Schedule\ndef make():\n"
                                         f"    s = Schedule([.9, .5, .01])\n    s.__dict__{change}\n    return s\n")
    monkeypatch.chdir(tmp_path)
    status, said = call("verify", "--python", f"{name}:make"), capsys.readouterr().err
    assert "Traceback" not in said
    assert status == (0 if "'name'" in change else 2)
    assert status == 0 or said.startswith(f"minidiff: {name}:make() returned a Schedule ") and said.count("\n") == 1


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Base(BaseException):
    pass


class Odd(Dataset):
    """A data set of noise that raises in one of its methods."""

    name, shape, source, fingerprint = "odd", (8, 8, 1), "noise", "odd"
    error, where = None, ""

    def __init__(self):
        self.calls = 0

    def fail(self, where):
        if where == self.where:
            raise self.error

    def __len__(self):
        self.fail("len")
        return 20

    def images(self, indices):
        self.fail("images")
        self.calls += 1
        if self.calls > 3:
            self.fail("images while it trains")
        return np.zeros((len(indices), *self.shape), np.float32) + np.float32(1 / 127.5 - 1)

    def caption(self, i, rng):
        self.fail("caption")
        return "seven"


@pytest.fixture
def odd(monkeypatch):
    kept = {}

    def load(folder, split):
        kept["data"] = Odd()
        kept["data"].fail("load")
        return kept["data"]
    register_dataset("odd", load)
    yield
    DATASETS.unregister("odd")


@pytest.mark.parametrize("error", [Mute(), Base("x"), SystemExit(0), KeyError("a\nb")], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["load", "len", "images", "images while it trains", "caption"])
def test_a_data_set_that_raises(where, error, odd, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Odd, "where", where)
    monkeypatch.setattr(Odd, "error", error)
    assert call("train", "--system", "ddpm" if where != "caption" else "text-to-image", "--data", "odd", "--steps", 3,
                "--batch", 2, "--images", 0, "--out", tmp_path / "run") == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [line.startswith("minidiff: ") for line in lines if line and "step/s" not in line] == [True]


# --- the pieces ---------------------------------------------------------------------------------------------

def test_brief():
    assert brief(ValueError("a\n b\x1b")) == "ValueError: a b\\x1b" and brief(Mute()) == "Mute"
    assert brief(UserError("a sentence")) == "a sentence" and brief(KeyError()) == "KeyError"
    assert brief(ValueError("x" * 1000)) == "ValueError: " + 200 * "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), UserError("mine")])
def test_what_user_code_lets_pass(error):
    with pytest.raises(type(error)) as caught, user_code("f"):
        raise error
    assert caught.value is error


def test_user_code_names_what_was_run():
    with pytest.raises(UserError, match="^f.. raised: Base: x$"), user_code("f() raised"):
        raise Base("x")
