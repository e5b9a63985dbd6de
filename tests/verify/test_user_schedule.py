"""The user's own schedule, from a file or a function."""

import json
import sys

import numpy as np
import pytest
from support.verifying import call

from minidiff.diffusion import schedules
from minidiff.diffusion.schedules import Schedule
from minidiff.verify import user_schedule as own
from minidiff.verify.loading import load_named

BETAS = np.linspace(1e-3, 0.2, 60)


def test_a_table_is_compared_with_its_betas(here, monkeypatch, capsys):
    """The betas computed from a wrong table have it as their product, so every other law is kept."""
    right, betas = own.from_betas, np.linspace(1e-3, 0.3, 60)
    np.save("b.npy", betas)
    (here / "own_betas.py").write_text("import numpy as np\ndef f(): return np.linspace(1e-3, 0.3, 60)\n")
    for arguments in (["--betas", "b.npy"], ["--python", "own_betas:f"]):
        assert call(*arguments) == 0
        assert "1 given betas" in capsys.readouterr().out
    monkeypatch.setattr(own, "from_betas", lambda *a, **k: Schedule(right(*a, **k).alpha_bar**2))
    for arguments in (["--betas", "b.npy"], ["--python", "own_betas:f"]):
        assert call(*arguments) == 1
        printed = capsys.readouterr().out
        assert "BROKEN  1 given betas: alpha_bar, product of 1 - beta as given" in printed and "1 broken" in printed


def test_betas_from_every_kind_of_file_are_the_same(here, capsys):
    np.save("b.npy", BETAS)
    (here / "lines.csv").write_text("beta\n" + "\n".join(map(repr, BETAS.tolist())) + "\n")
    (here / "row.csv").write_text(", ".join(map(repr, BETAS.tolist())))
    (here / "bom.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(repr, BETAS.tolist())).encode())
    (here / "list.json").write_text(json.dumps(BETAS.tolist()))
    (here / "object.json").write_text(json.dumps({"T": 60, "betas": BETAS.tolist()}))
    expected = schedules.from_betas(BETAS).alpha_bar
    for name, how in [("b.npy", "60 numbers of dtype float64"),
                      ("lines.csv", "60 numbers, one a line, after the header 'beta'"),
                      ("row.csv", "60 numbers, in one line"), ("bom.txt", "60 numbers, one a line"),
                      ("list.json", "a list of 60 numbers"), ("object.json", 'the list "betas" of 60 numbers')]:
        schedule, said, betas = own.from_file(here / name, "betas")
        np.testing.assert_array_equal(schedule.alpha_bar, expected)
        np.testing.assert_array_equal(betas, BETAS)
        assert said.endswith(how)
    assert call("--betas", "lines.csv") == 0
    assert "one a line, after the header" in capsys.readouterr().out
    np.save("a.npy", expected.astype(np.float32))
    assert call("--alpha-bar", "a.npy") == 0
    assert own.from_file("a.npy", "alpha_bar").betas is None


def test_a_function_may_return_betas_or_a_schedule(here, capsys):
    (here / "own_good.py").write_text(
        "import numpy as np\nfrom minidiff.diffusion import schedules\n"
        "def listed(): return [0.1, 0.3, 0.99]\ndef array(): return np.linspace(.01, .3, 40)\n"
        "def schedule(): return schedules.zero_terminal_snr(schedules.cosine(30))\n")
    before = list(sys.path)
    for name in ("listed", "array", "schedule"):
        assert call("--python", f"own_good:{name}") == 0, name
    assert "the schedule 'cosine, zero terminal SNR' from own_good:schedule()" in capsys.readouterr().out
    assert sys.path == before


@pytest.mark.parametrize("option", ["--betas", "--alpha-bar", "--python"])
def test_a_users_table_that_keeps_signal_breaks_only_that_law(here, option, capsys):
    (here / "b.csv").write_text("0.3\n0.2\n")
    (here / "own_signal.py").write_text("def f(): return [0.3, 0.2]\n")
    assert call(option, "own_signal:f" if option == "--python" else "b.csv") == 1
    printed = capsys.readouterr().out
    assert printed.count("\nBROKEN  ") == 1 and "BROKEN  4 ends in noise: alpha_bar[1]" in printed


def test_falling_betas_give_a_note_and_no_failure(here, capsys):
    (here / "b.json").write_text(json.dumps([0.5, 0.4, 0.9, 0.8]))
    assert call("--betas", "b.json") == 0
    assert "note: betas fall at t = 1, from 0.5 to 0.4, and at 1 more times" in capsys.readouterr().out
    assert own.notes(schedules.linear()) == [] and own.notes(schedules.flow_matching()) == []


def test_modules_are_loaded_from_the_current_folder_first_and_sys_path_is_unchanged(here, monkeypatch):
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(sys, "path", [str(elsewhere), *sys.path])
    before = list(sys.path)
    for folder, said in ((elsewhere, "there"), (here, "here")):
        (folder / "own_twice.py").write_text(f"where = {said!r}\n")
    (here / "own_package").mkdir()
    (here / "own_package" / "inner.py").write_text("value = 5\n")
    (here / "own_tidy.py").write_text("import os, sys\nsys.path.remove(os.getcwd())\nvalue = 6\n")
    assert load_named("own_twice:where", "--x") == "here"
    assert load_named("own_package.inner:value", "--x") == 5 and load_named("own_tidy:value", "--x") == 6
    assert load_named("numpy.random:default_rng", "--x") is np.random.default_rng
    assert sys.path == before


def test_a_schedule_whose_table_asks_to_exit_has_status_2(here, capsys):
    (here / "own_exit.py").write_text(
        "from minidiff.diffusion.schedules import Schedule\n"
        "class S(Schedule):\n    betas = property(lambda self: (_ for _ in ()).throw(SystemExit(0)))\n"
        "def f(): return S([0.5, 0.01])\n")
    assert call("--python", "own_exit:f") == 2
    said = capsys.readouterr().err
    assert said == "minidiff: own_exit:f() returned a Schedule that is inconsistent: SystemExit: 0\n"
