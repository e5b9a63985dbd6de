"""Every exercise: its hole is open, minidiff's own answer is right, and every known wrong answer is told apart."""

import ast
import inspect
import re
from itertools import combinations

import numpy as np
import pytest
from support import fake_cupy
from support.course import CHAPTERS
from support.exercises import FOLDER, PAGE, ROOT, page

from minidiff.course import ex24_diffusion_in_2d as ex24
from minidiff.course.exercise import NAMES, claim, exercise
from minidiff.course.judge import BUG, OPEN, guarded, judge
from minidiff.course.learner import verdict_on

NEEDS = {"ex23_tiled_matmul": fake_cupy.needs_compiler}
every = pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS.get(name, ())) for name in NAMES])
# the wrong answers of exercise 23 are a dozen compilations, which are kept for the next run only
every_wrong = pytest.mark.parametrize("name", [
    pytest.param(name, marks=[NEEDS[name], pytest.mark.slow] if name in NEEDS else ()) for name in NAMES])


@pytest.fixture(autouse=True)
def _quiet():
    """Some wrong answers divide by 0."""
    with np.errstate(all="ignore"):
        yield


@every
def test_the_hole_is_open(name):
    """The file of exercises/ has the hole, and says so in a plain sentence."""
    verdict = verdict_on(FOLDER / f"{name}.py", exercise(name))
    assert verdict.kind == OPEN and not verdict.right
    assert verdict.sentence.startswith("not written yet: the hole is at line ")


def right(of):
    """The right answer that tests take: the ideal one, where there is one."""
    return of.ideal or of.solution


@every
def test_a_right_answer_is_right(name):
    verdict = judge(exercise(name), right(exercise(name)))
    assert verdict.right, verdict.sentence


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if exercise(name).ideal])
def test_minidiff_s_own_answer_is_right_where_it_takes_long(name):
    verdict = judge(exercise(name), exercise(name).solution)
    assert verdict.right, verdict.sentence


@every_wrong
def test_every_known_wrong_answer_gets_its_own_name(name):
    of = exercise(name)
    assert len(of.wrong) >= 3
    for wrong in of.wrong:
        verdict = judge(of, wrong.answer)
        assert verdict.kind == BUG and verdict.sentence.startswith(wrong.bug), (wrong.answer.__name__, verdict)
        assert "\n" not in verdict.sentence
        fact = r'\((it breaks the law "|.* should (have shape|be an array|be \d+ values))'
        said = verdict.sentence.removeprefix(wrong.bug)
        assert re.search(fact, said) and re.search(r"\d", said.split('": ', 1)[-1]), verdict


@every_wrong
def test_all_answers_are_distinct(name):
    """No two wrong answers give the same results, and none those of the right one."""
    of = exercise(name)
    results = {answer.__name__: of.probe(answer) for answer in [right(of), *(w.answer for w in of.wrong)]}
    assert len(results) == len(of.wrong) + 1
    assert not [(a, b) for a, b in combinations(results, 2) if of.same(results[a], results[b])]
    assert all(of.same(result, of.probe(answer)) for result, answer in
               zip(results.values(), [right(of), *(w.answer for w in of.wrong)], strict=True))
    assert len({w.bug for w in of.wrong}) == len(of.wrong)


@every
def test_every_law_can_be_broken(name):
    """Each is broken by a known wrong answer, or by minidiff's own when its results are changed a little."""
    of = exercise(name)
    spoiled = [lambda *args, _spoil=spoil, **named: _spoil(right(of)(*args, **named)) for spoil in SPOILED]
    for law in of.laws:
        assert claim(law), law.__name__
        assert any(_breaks(law, answer) for answer in [*(w.answer for w in of.wrong), *spoiled]), law.__name__


def _breaks(law, answer) -> bool:
    return law(guarded(answer, "answer", None)) is not None


def _everywhere(change):
    """A change of every array, number and list of whole numbers in a result, and in what its functions return."""
    def changed(result):
        if isinstance(result, tuple):
            return tuple(map(changed, result))
        if callable(result) and not isinstance(result, np.ndarray):
            return lambda *args, **named: changed(result(*args, **named))
        if isinstance(result, list) and not (result and isinstance(result[0], np.ndarray)):
            return result[:-1]
        return change(result) if isinstance(result, (np.ndarray, np.floating, float)) else result
    return changed


SPOILED = [_everywhere(change) for change in (
    lambda a: a * 1.001, lambda a: a + 0.001, lambda a: np.asarray(a).astype(np.float64), lambda a: -a,
    lambda a: np.asarray(a)[None])]


@every
def test_the_file_and_its_judge_agree(name):
    """Names, minutes, chapter, and the arguments of the hole and of minidiff's own answer."""
    of, text = exercise(name), (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    number, about = int(name[2:4]), ast.get_docstring(tree)
    assert about.startswith(f"Exercise {number}: ")
    assert f" {of.minutes} minutes, chapter docs/course/{of.chapter}.md." in " ".join(about.split())
    assert f"minidiff check ex{number:02d}" in about
    holes = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    assert holes and all(ast.unparse(hole) == "raise NotImplementedError('your code here')" for hole in holes)
    hole = next(node for node in tree.body if getattr(node, "name", None) == of.answer)
    assert ast.get_docstring(hole)
    if isinstance(hole, ast.FunctionDef):
        assert [a.arg for a in hole.args.args] == list(inspect.signature(of.solution).parameters)
    file, word = of.place.split()
    assert word.split(".")[-1] in (ROOT / file).read_text(encoding="utf-8")
    assert of.hint and "\n" not in of.hint


@every
def test_the_chapter_is_there(name):
    assert exercise(name).chapter in {path.stem for path in CHAPTERS}


def test_the_losses_that_the_hint_of_the_last_one_names():
    rng = np.random.default_rng(0)
    x_t, t, exact = ex24._noised(rng, 20_000)
    least = 1 - (exact**2).mean()                           # E (eps - E[eps | x_t])^2, since E eps^2 = 1
    linear = least + ((ex24._linear_eps(x_t, t) - exact) ** 2).mean()
    assert abs(least - 0.21) < 0.005 and abs(linear - 0.26) < 0.005
    assert "about 0.21" in ex24.EXERCISE.hint and "reach 0.26" in ex24.EXERCISE.hint


def test_every_file_has_a_judge():
    assert [path.stem for path in sorted(FOLDER.glob("*.py"))] == list(NAMES)


def test_the_page_lists_them():
    assert page() == PAGE.read_text(encoding="utf-8"), "run python -m tests.support.exercises"
