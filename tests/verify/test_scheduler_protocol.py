"""A scheduler that breaks the protocol is refused in one sentence."""

import numpy as np
import pytest
from support.toy_schedulers import EpsAtSnrZero, TableReversed, Toy, broken

from minidiff.errors import UserError
from minidiff.verify.scheduler import report
from minidiff.verify.scheduler.protocol import NEEDED


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_method_gives_one_sentence(name):
    class Lacks:
        def __getattribute__(self, wanted):
            if wanted == name:
                raise AttributeError(wanted)
            return getattr(toy, wanted) if wanted in NEEDED else object.__getattribute__(self, wanted)

    toy = Toy()
    with pytest.raises(UserError, match=f"the scheduler Lacks has no {name}, which (is|takes) "):
        report(Lacks())


@pytest.mark.parametrize("wrong, sentence", [
    ({"predicts": "noise"}, "predicts must be one of eps, x0, v"),
    ({"predicts": ["eps"]}, "predicts must be one of eps, x0, v"),
    ({"alpha_bar": np.zeros(1)}, r"alpha_bar must be an array \(T,\).*not float64 \(1,\)"),
    ({"alpha_bar": np.array(0.5)}, r"alpha_bar must be an array \(T,\)"),
    ({"alpha_bar": [[0.9], [0.8, 0.7]]}, r"alpha_bar must be an array \(T,\).*lists of several lengths"),
    ({"step": None}, "step must be a method, not NoneType"),
    ({"step": lambda prediction, t, x_t: x_t}, "step does not take the 4 arguments of the protocol: too many"),
    ({"scale_input": 3}, "scale_input must be a method, not int"),
    ({"step": lambda *args: 3}, r"step must return an array of its sample's shape \(2, 1, 1, 1\), not int"),
    ({"step": lambda prediction, t, x_t, z: x_t[0]}, r"step must return .*not float64 \(1, 1, 1\)"),
    ({"add_noise": lambda x_0, eps, t: None}, r"add_noise must return an array"),
    ({"timesteps": None, "set_steps": lambda n: None}, "set_steps.3. must set timesteps to an array .*not None"),
    ({"timesteps": np.zeros(0), "set_steps": lambda n: None}, r"must set timesteps .*not float64 \(0,\)"),
    ({"timesteps": np.zeros((2, 2)), "set_steps": lambda n: None}, r"must set timesteps .*not float64 \(2, 2\)"),
    ({"timesteps": np.full(3, np.nan), "set_steps": lambda n: None}, "must set timesteps .*with NaN or inf"),
    ({"levels": np.zeros((5, 3))}, r"levels must be an array \(3, 2\)"),
    ({"order": "two"}, "order must be a number of at least 1, not 'two'"),
    ({"evaluations": 0}, "evaluations must be a number of at least 1, not 0"),
])
def test_wrong_values_give_one_sentence(wrong, sentence):
    toy = Toy()
    vars(toy).update(wrong)
    with pytest.raises(UserError, match=sentence):
        report(toy)


def test_timesteps_that_are_never_set_give_one_sentence():
    class NeverSet(Toy):
        def __init__(self):
            super().__init__()
            del self.timesteps

        def set_steps(self, n):
            pass

    with pytest.raises(UserError, match=r"set_steps\(3\) must set timesteps to an array"):
        report(NeverSet())


@pytest.mark.parametrize("raised", [RuntimeError("not yet"), SystemExit(0)], ids=repr)
def test_whatever_a_scheduler_raises_gives_one_sentence(raised):
    def fails(self, *n):
        raise raised

    for name, method, said in [("alpha_bar", property(fails, lambda self, a: None), "alpha_bar cannot be read: "),
                               ("set_steps", fails, r"set_steps\(3\) raises: "),
                               ("levels", property(fails), "levels cannot be read: ")]:
        with pytest.raises(UserError, match=f"the scheduler's {said}{type(raised).__name__}"):
            report(type("Fails", (Toy,), {name: method, "__init__": Toy.__init__})())


def test_a_step_that_exits_is_broken():
    """sys.exit(0) does not end the report, and the law does not pass."""
    class Exits(EpsAtSnrZero):
        def step(self, *args):
            raise SystemExit(0)

    rows = report(Exits(), steps=[7])
    assert sum("SystemExit: 0" in row.where for row in rows if row.verdict == "BROKEN") == 9


def test_the_dry_run_comes_after_the_laws_before_any_run():
    """Otherwise set_steps would mend this table before its law sees it."""
    assert "1 q(x_t | x_0)" in broken(TableReversed())


def test_runs_must_fit_in_the_table():
    with pytest.raises(UserError, match="no run of 1, 1001 steps fits .* T = 1000 times, which has runs of 2 to 1000"):
        report(Toy(), steps=[1, 1001])
    toy = Toy()
    toy.alpha_bar = np.array([0.9, 0.1])
    with pytest.raises(UserError, match="no run of 3, 7, 10, 20, 50 steps fits .* T = 2 times, which has runs of 2 st"):
        report(toy)
