"""Every planted bug still applies, and the runner tells a caught bug from one that only looks caught."""

import ast

import pytest
from mutants import run
from mutants.bug import Bug

ALL = [bug for group in run.GROUPS.values() for bug in group]


def test_every_bug_finds_its_text_once_and_leaves_python_behind():
    """If this fails, the code that a bug changes has itself changed: update the bug's text in tests/mutants."""
    lost = []
    for bug in ALL:
        try:
            text = bug.planted(run.ROOT)
            if bug.file.endswith(".py"):
                ast.parse(text)
        except (ValueError, SyntaxError, OSError) as error:
            lost.append(str(error))
    assert not lost, "\n".join(lost)


def test_bugs_have_different_names_and_change_something():
    assert len({bug.name for bug in ALL}) == len(ALL)
    assert all(bug.before != bug.after for bug in ALL)


def test_there_are_enough():
    """At least 40 in the engine and 60 elsewhere, so that a lost group is noticed."""
    assert len(run.GROUPS["The engine and its derivatives"]) >= 40
    assert len(ALL) - len(run.GROUPS["The engine and its derivatives"]) >= 60


# ---- the map from files to tests ---------------------------------------------------------------------------------

def test_every_path_that_the_map_names_exists():
    named = [f"tests/{path}" for paths in run.OWN.values() for path in paths]
    named += [path for paths in run.FLOORS.values() for path in paths]
    named += [f"minidiff/{file}" for file in run.OWN if not file.startswith("kernels/")]
    named += [f"minidiff/{folder}" for folder in run.FLOORS if folder != "kernels"]
    assert [path for path in named if not (run.ROOT / path).exists()] == []
    families = [file for file in run.OWN if file.startswith("kernels/")]
    assert [family for family in families             # "kernels/group_norm" is a family, "kernels/x.cuh" a header
            if not (run.ROOT / family).exists() and not list(run.ROOT.glob(f"{family}_*.cu"))] == []


@pytest.mark.parametrize("file", sorted({bug.file for bug in ALL if not bug.file.endswith(".cuh")}))
def test_a_file_with_planted_bugs_has_tests_of_its_own(file):
    """They run before those of its folder: without them each bug of the file takes minutes instead of seconds."""
    assert run.own_tests(file, run.ROOT), f"enter the tests of {file} in OWN of tests/mutants/run.py"


@pytest.mark.parametrize("file, own", [
    ("engine/conv.py", ["tests/engine/test_conv.py"]),
    ("engine/cuda/conv.py", ["tests/kernels/test_conv_kernels.py"]),
    ("kernels/conv_2_tiles.cu", ["tests/kernels/test_conv_kernels.py"]),
    ("kernels/attention_forward_3_registers.cu", ["tests/kernels/test_attention_forward_kernels.py"]),
    ("kernels/group_norm_1_naive.cu", ["tests/kernels/test_norm_kernels.py"]),
    ("kernels/last_block.cuh", ["tests/kernels/test_sums_kernels.py"]),
    ("nn/gumbel.py", ["tests/nn/test_gumbel.py"]),
    ("systems/dalle.py", [f"tests/systems/test_{name}.py"
                          for name in ("dalle", "batches", "fresh_streams", "previews")] + [
                              "tests/test_few_systems.py"]),
])
def test_the_map_finds_the_tests_of_a_file(file, own):
    assert run.own_tests(file, run.ROOT) == own


# ---- the runner, on a project of two lines -----------------------------------------------------------------------

PLUS = """
from minidiff.sums import plus

def test_zero():
    assert plus(0, 0) == 0

def test_plus():
    assert plus(1, 2) == 3
"""
MINUS = """
from minidiff.sums import plus

def test_minus():
    assert plus(3, -3) == 0
"""
SETTINGS = """
[tool.pytest.ini_options]
addopts = "-p no:hypothesispytest -m 'not slow'"
markers = ["slow: takes long"]
"""                                                         # these tests do not use it, and it is slow to load


@pytest.fixture
def project(tmp_path):
    """A project of two lines, whose tests take no time."""
    root = tmp_path / "project"
    for path, text in {"minidiff/__init__.py": "", "minidiff/sums.py": "def plus(a, b):\n    return a + b\n",
                       "tests/test_sums.py": PLUS, "tests/test_others.py": MINUS, "pyproject.toml": SETTINGS}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


def judge(project, tmp_path, after, limit=100.0, before="a + b"):
    copy = run.Copy(tmp_path / "copy", project)
    result = copy.judge(Bug("a bug", "sums.py", before, after), limit)
    assert (copy.root / "minidiff/sums.py").read_text() == (project / "minidiff/sums.py").read_text()
    return result


def test_a_bug_is_caught_by_the_first_test_that_fails(project, tmp_path):
    result = judge(project, tmp_path, "a - b")
    assert (result.verdict, result.test) == ("caught", "tests/test_sums.py::test_plus")


def test_another_file_may_catch_what_the_own_tests_miss(project, tmp_path):
    result = judge(project, tmp_path, "abs(a) + abs(b)")
    assert (result.verdict, result.test) == ("caught", "tests/test_others.py::test_minus")


def test_a_slow_test_of_the_files_own_catches_what_the_quick_ones_miss(project, tmp_path):
    slow = "import pytest\n" + PLUS + "\n@pytest.mark.slow\ndef test_large():\n    assert plus(10**9, 1) == 10**9 + 1\n"
    (project / "tests/test_sums.py").write_text(slow, encoding="utf-8")
    result = judge(project, tmp_path, "min(a, 10**6) + b")
    assert (result.verdict, result.test) == ("caught", "tests/test_sums.py::test_large")


def test_the_likeliest_test_runs_first_if_it_exists(project, tmp_path):
    copy, bug = run.Copy(tmp_path / "copy", project), Bug("a bug", "sums.py", "a + b", "2 * a + b")
    assert copy.judge(bug, likeliest="tests/test_others.py::test_minus").test == "tests/test_others.py::test_minus"
    assert copy.judge(bug, likeliest="tests/test_gone.py::test_gone").test == "tests/test_sums.py::test_plus"


def test_a_harmless_change_survives(project, tmp_path):
    (project / "tests/test_others.py").unlink()
    assert judge(project, tmp_path, "b + a").verdict == "survived"


@pytest.mark.parametrize("after", ["a +", "a + no_such_name"])
def test_code_that_does_not_load_is_not_caught(project, tmp_path, after):
    assert judge(project, tmp_path, after).verdict == "broken"


def test_a_signal_that_ends_the_process_is_caught(project, tmp_path):
    result = judge(project, tmp_path, "__import__('os').kill(__import__('os').getpid(), 15)")
    assert (result.verdict, result.test) == ("caught", "tests/test_sums.py (SIGTERM ended the process)")


@pytest.mark.slow
def test_tests_that_do_not_end_catch_nothing(project, tmp_path):
    loop = "def plus(a, b):\n    while True:\n        pass\n"
    assert judge(project, tmp_path, loop, limit=2.0, before="def plus(a, b):\n").verdict == "timed out"


def test_tests_that_fail_without_a_bug_are_refused(project):
    (project / "tests/test_sums.py").write_text("def test_red():\n    assert False\n", encoding="utf-8")
    with pytest.raises(run.NotGreen, match="test_red"):
        run.run([Bug("harmless", "sums.py", "a + b", "b + a")], jobs=1, original=project)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_interrupted(project, tmp_path):
    """A caught bug is not planted again, a survivor is, and so is every bug of a file that has changed."""
    (project / "tests/test_others.py").unlink()
    caught, harmless = Bug("caught", "sums.py", "a + b", "a - b"), Bug("same", "sums.py", "a + b", "b + a")
    planted = []

    def show(results):
        for result in results:
            planted.append(result.bug.name)
            yield result

    def go():
        planted.clear()
        kept = run.Kept(tmp_path / "caught.jsonl", project)
        results = run.run([harmless, caught], 1, show, project, kept=kept)
        assert [(r.bug, r.verdict) for r in results] == [(harmless, "survived"), (caught, "caught")]
        assert results[1].test == "tests/test_sums.py::test_plus"
        return sorted(planted)

    assert go() == ["caught", "same"]
    assert go() == ["same"]
    with (project / "minidiff/sums.py").open("a", encoding="utf-8") as f:
        f.write("# the file has changed\n")
    assert go() == ["caught", "same"]


def test_a_report_says_how_many_bugs_have_no_result():
    bug = ALL[0]
    page = run.report([run.Result(bug, "caught", "tests/test_x.py::test_y", 1.0)], None, 2, not_run=3)
    assert "**1 planted, 1 caught, 0 survived**. 3 more of the list were not planted" in page


@pytest.mark.slow
def test_one_bug_of_the_list(tmp_path):
    bug = next(bug for bug in ALL if bug.name == "attention over 1/d, not 1/sqrt(d)")
    result, = run.run([bug], jobs=1)
    assert result.verdict == "caught" and result.test.startswith("tests/engine/test_attention.py::")
    page = run.report([result], 60.0, 1)
    assert "1 planted, 1 caught, 0 survived" in page
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    assert run.last_report(tmp_path / "page.md") == {bug.name: result.test}


def test_a_text_that_is_not_there_or_there_twice_is_an_error(project):
    for before in ("a * b", "a"):
        with pytest.raises(ValueError, match="must find its text once"):
            Bug("a bug", "sums.py", before, "").planted(project)
