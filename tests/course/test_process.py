"""An answer in a process of its own: loops, memory, prints and ends of the process; and the command."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from course.test_learner import ANSWER, START
from support.command_line import call
from support.exercises import FOLDER, ROOT

from minidiff.course.exercise import NAMES, exercise
from minidiff.course.judge import FAULT, RIGHT
from minidiff.course.learner import late_at
from minidiff.course.process import check

NAME = "ex01_q_sample"


def judged(tmp_path, text: str, seconds: float = 30):
    (tmp_path / f"{NAME}.py").write_text(text, encoding="utf-8")
    verdict, printed = check(NAME, tmp_path / f"{NAME}.py", seconds)
    assert "\n" not in verdict.sentence
    return verdict, printed


def test_a_right_answer_that_prints_and_reads_its_input(tmp_path):
    (tmp_path / "numpy.py").write_text("raise RuntimeError", encoding="utf-8")      # which nothing finds
    (tmp_path / "mine.py").write_text("half = 0.5", encoding="utf-8")
    printing = "import mine, sys\nprint('one', mine.half)\nprint('\\u2713' * 10**6)\n"
    reading = "try:\n    input()\nexcept EOFError:\n    print('no input', file=sys.stderr)\n"
    verdict, printed = judged(tmp_path, printing + ANSWER + reading)
    assert verdict.kind == RIGHT and printed[0] == "one 0.5" and len(printed) < 10


@pytest.mark.parametrize("loop", [
    "while True: print('x' * 1000)", pytest.param("while True: pass", marks=pytest.mark.slow),
    pytest.param("import time; time.sleep(1000)", marks=pytest.mark.slow)])
def test_a_loop_without_end(loop, tmp_path):
    verdict, _ = judged(tmp_path, START + loop, seconds=1)
    assert verdict.kind == FAULT
    assert verdict.sentence == f"{NAME}.py was not done after 1 s, when it was at line 3: does a loop there end?"


def test_a_huge_array(tmp_path):
    verdict, _ = judged(tmp_path, START + "return np.zeros(10**13)")
    assert "line 3 (`return np.zeros(10**13)`) asks for more memory than there is" in verdict.sentence


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process so")
def test_memory_without_end(tmp_path):
    verdict, _ = judged(tmp_path, START + "every = []\n    while True: every.append(np.empty(10**8))")
    assert "line 4" in verdict.sentence and "asks for more memory than there is" in verdict.sentence


@pytest.mark.parametrize("end, said", [("__import__('os')._exit(0)", "ended its process, with the status 0"),
                                       ("__import__('os').abort()", "was ended by the signal 6")])
def test_a_process_that_ends_itself(end, said, tmp_path):
    verdict, _ = judged(tmp_path, START + end)
    assert verdict.kind == FAULT and said in verdict.sentence


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="groups of processes are of POSIX")
def test_what_it_starts_ends_with_it(tmp_path):
    wait = "import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n" \
           "print(p.pid)\n"
    verdict, printed = judged(tmp_path, wait + ANSWER)
    assert verdict.kind == RIGHT
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(printed[0]), 0)
            subprocess.run(["sleep", "0.1"], check=True)


def test_where_a_late_answer_was(tmp_path):
    path = tmp_path / "a.py"
    text = f'Timeout!\n  File "/x/y.py", line 3 in f\n  File "{path}", line 12 in g\n  File "{path}", line 99 in h\n'
    assert late_at(text, path) == "line 12" and late_at("Timeout!", path) == ""


# ---- the command -------------------------------------------------------------------------------------------

def test_the_command_judges_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exercises").mkdir()
    mine = tmp_path / "exercises" / f"{NAME}.py"
    mine.write_text(ANSWER + "print('hello')", encoding="utf-8")
    assert call("check", "1") == 0
    assert capsys.readouterr().out == (f"note: {NAME}.py printed 1 line, the first: hello\n"
                                       "ex01: right: all 4 laws hold\n"
                                       "minidiff's own answer: minidiff/diffusion/gaussian.py q_sample\n")
    mine.write_text(ANSWER.replace("np.sqrt(1 - a)", "(1 - a)"), encoding="utf-8")
    assert call("check", f"exercises/{NAME}.py") == 1
    assert "ex01: the noise is multiplied by its variance" in capsys.readouterr().out


def test_the_command_judges_all(tmp_path, capsys):
    (tmp_path / f"{NAME}.py").write_text(ANSWER, encoding="utf-8")
    assert call("check", "--all", "--folder", tmp_path) == 0
    (tmp_path / f"{NAMES[1]}.py").write_bytes((FOLDER / f"{NAMES[1]}.py").read_bytes())
    assert call("check", "--all", "--folder", tmp_path) == 1
    out = capsys.readouterr().out
    assert "1 of 1 exercise right" in out and "1 of 2 exercises right" in out
    assert f"{NAMES[1][:4]}: not written yet: " in out


@pytest.mark.parametrize("words", [["--all"], ["1"]])
@pytest.mark.parametrize("given, seconds", [(["--seconds", 7], 7), ([], None)])
def test_an_answer_may_take_the_seconds_that_were_given(tmp_path, monkeypatch, words, given, seconds):
    """One answer, and each of all; None is what the exercise allows."""
    (tmp_path / f"{NAME}.py").write_text(ANSWER, encoding="utf-8")
    verdict, asked = SimpleNamespace(right=True, kind=RIGHT, sentence="right"), []
    monkeypatch.setattr("minidiff.course.process.check", lambda *given: asked.append(given) or (verdict, []))
    assert call("check", *words, "--folder", tmp_path, *given) == 0
    assert asked == [(NAME, tmp_path / f"{NAME}.py", seconds)]


def test_a_file_is_named_by_its_path_or_by_its_name_in_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / f"{NAME}.py").write_text(ANSWER, encoding="utf-8")
    for words in ((f"{NAME}.py", "--folder", mine), (mine / f"{NAME}.py",), (f"mine/{NAME}.py",)):
        assert call("check", *words) == 0, words
    capsys.readouterr()
    assert call("check", f"{NAME}.py") == 2
    assert f"there is no file '{NAME}.py' in " in capsys.readouterr().err
    assert call("check", f"other/{NAME}.py", "--folder", mine) == 2
    assert capsys.readouterr().err.endswith(": name it by its path, or by --folder and its name\n")


def test_files_of_other_names_are_found(tmp_path, capsys):
    (tmp_path / "example.py").write_text("", encoding="utf-8")
    for path in (tmp_path / "ex01.py", tmp_path / "ex1_again.py"):
        path.write_text(ANSWER, encoding="utf-8")
        assert call("check", "--all", "--folder", tmp_path) == 0
    assert "ex01 (ex01.py): right" in (out := capsys.readouterr().out) and "2 of 2 exercises right" in out
    assert call("check", "1", "--folder", tmp_path) == 2
    assert "ex01 may be any of " in capsys.readouterr().err
    (tmp_path / "ex1_again.py").unlink()
    assert call("check", "1", "--folder", tmp_path) == 0
    assert "ex01.py'\nex01: right" in capsys.readouterr().out


def test_a_hint_is_offered_where_it_may_help(tmp_path, capsys):
    for text, offered in (("def q_sample(:", False), (START + "return x_0", True), (START + "return 1 / 0", False)):
        (tmp_path / f"{NAME}.py").write_text(text, encoding="utf-8")
        assert call("check", "1", "--folder", tmp_path) == 1
        assert ("for a hint: minidiff check ex01 --hint" in capsys.readouterr().out) == offered


def test_two_exercises_at_once(capsys):
    assert call("check", "ex07", "ex08") == 2
    assert "check takes one exercise at a time, such as minidiff check ex07, or --all" in capsys.readouterr().err


def test_the_command_lists_them_and_gives_hints(capsys):
    assert call("check", "--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)
    assert call("check", "7", "--hint") == 0
    of = exercise(NAMES[6])
    assert capsys.readouterr().out == f"hint for ex07: {of.hint}\nminidiff's own answer: {of.place}\n"


def test_where_the_file_is_is_said_unless_it_is_the_usual_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minidiff.course.process.check", lambda *given: (
        SimpleNamespace(right=True, kind=RIGHT, sentence="right"), []))
    (tmp_path / "exercises").mkdir()
    (tmp_path / "exercises" / f"{NAME}.py").write_text(ANSWER, encoding="utf-8")
    for words, where in ((["1"], None), (["1", "--folder", "exercises"], f"exercises/{NAME}.py"),
                         ([f"{NAME}.py"], f"exercises/{NAME}.py")):
        assert call("check", *words) == 0
        assert capsys.readouterr().out.startswith(f"judged: '{where}'\nex01: right\n" if where else "ex01: right\n")
    (tmp_path / "exercises" / f"{NAME}.py").rename(tmp_path / "exercises" / "ex01_mine.py")
    assert call("check", "1") == 0
    assert capsys.readouterr().out.startswith("judged: 'exercises/ex01_mine.py'\nex01: right\n")


def test_a_long_name_is_cut_where_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for ending, said in ((".py", "there is no file 'a/ex01_{x}'"),
                         (".txt", "'a/ex01_{x}' is not the name of a Python file, which ends with .py")):
        assert call("check", f"a/ex01_{'x' * 300}{ending}") == 2
        assert capsys.readouterr().err == f"minidiff: {said.format(x='x' * 193)}\n"


@pytest.mark.parametrize("words", [[], ["1", "--all"], ["--all", "--list"], ["--hint"], ["ex99"], ["nothing"],
                                   ["1", "--folder", "nowhere"], ["--all", "--folder", "."], ["1", "--seconds", "0"]],
                         ids=" ".join)
def test_a_mistake_is_one_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("check", *words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("minidiff: ") and printed.err.count("\n") == 1 and not printed.out


def test_a_path_means_that_file_and_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exercises").mkdir()
    (tmp_path / "exercises" / f"{NAME}.py").write_text(ANSWER, encoding="utf-8")
    (tmp_path / "01_noise.md").write_text("# 1", encoding="utf-8")
    for text, said in {"nowhere/ex01_mine.py": "there is no file 'nowhere/ex01_mine.py'\n",
                       "ex01_mine.py": "there is no file 'ex01_mine.py' in ",
                       "./01_noise.md": "'./01_noise.md' is not the name of a Python file",
                       "01_noise.md": "'01_noise.md"}.items():
        assert call("check", text) == 2
        printed = capsys.readouterr()
        assert said in printed.err and not printed.out
    for text in (f"exercises/{NAME}.py", f"{NAME}.py"):
        assert call("check", text) == 0
        assert capsys.readouterr().out.startswith(f"judged: 'exercises/{NAME}.py'\nex01: right")


@pytest.mark.slow
def test_ctrl_c_ends_the_answer(tmp_path):
    """The command is interrupted while the answer loops: both end at once."""
    path = tmp_path / f"{NAME}.py"
    path.write_text(f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()) + '\\n')\nwhile 1: pass",
                    encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-m", "minidiff", "check", "1", "--folder", str(tmp_path)], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text(encoding="utf-8").endswith("\n")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text(encoding="utf-8")), 0)


def test_it_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("check", "1") == 2
    assert f"{NAME}.py is not in {ascii(str(tmp_path))}, and there is no folder 'exercises' in it: go to the folder" \
        in capsys.readouterr().err
    (tmp_path / "exercises").mkdir()
    assert call("check", "--all") == 2
    assert f"is in {ascii(str(tmp_path / 'exercises'))}: go to" in capsys.readouterr().err


def test_a_right_answer_of_two_points_reads_its_closed_form(tmp_path, capsys):
    text = "import numpy as np\ndef x0_hat(p, alpha, sigma, x_t):\n" \
           "    return np.tanh(alpha * x_t / sigma**2 + np.log(p / (1 - p)) / 2)"
    (tmp_path / "ex06_two_points.py").write_text(text, encoding="utf-8")
    assert call("check", "6", "--folder", tmp_path) == 0
    assert exercise("ex06_two_points").note in capsys.readouterr().out
    assert call("check", "6", "--hint") == 0
    assert "tanh" not in capsys.readouterr().out
