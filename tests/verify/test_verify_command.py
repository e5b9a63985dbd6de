"""The command minidiff verify: its options and outputs, and wrong input in one sentence with status 2."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image
from support.verifying import NOISE, call

from minidiff import verify
from minidiff.diffusion import schedules
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.verify import forward

BETAS = np.linspace(1e-3, 0.2, 60)


def test_the_default_is_cosine_with_1000_times(monkeypatch, capsys):
    monkeypatch.setattr(forward, "chains", lambda T: 500)
    assert call() == 0
    printed = capsys.readouterr().out
    assert "the cosine schedule; T = 1000" in printed and "0 broken" in printed


def test_help_names_every_option(capsys):
    assert call("--help") == 0
    printed = capsys.readouterr().out
    for option in ("--schedule", "-T", "--betas", "--alpha-bar", "--python", "--seed", "--plot", "--watch", "--json"):
        assert option in printed


def test_a_schedule_that_keeps_signal_has_exit_status_1(capsys):
    assert call("--schedule", "linear", "-T", 50) == 1
    printed = capsys.readouterr().out
    assert "BROKEN  4 ends in noise" in printed and "alpha_bar[49]" in printed


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_shortest_schedules_are_verified_or_refused(name, T, capsys):
    status = call("--schedule", name, "-T", T)
    said = capsys.readouterr()
    if name == "log_snr_linear" and T == 1:
        assert status == 2 and "T must be a whole number of at least 2, not 1" in said.err
    else:
        assert status == (1 if "BROKEN  4 ends in noise" in said.out else 0)
        assert ("needs two times, T >= 2" in said.out) == (T == 1)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def write_files(folder):
    (folder / "empty.csv").write_text("")
    (folder / "blank.json").write_text(" \n")
    (folder / "header.csv").write_text("beta\n")
    (folder / "nothing.json").write_text("[]")
    np.save(folder / "zero.npy", np.zeros(0))
    np.save(folder / "pickle.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    np.save(folder / "square.npy", np.full((3, 3), 0.1))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "complex.npy", np.array([0.1j]))
    whole = (folder / "square.npy").read_bytes()
    (folder / "cut.npy").write_bytes(b"\x93NUMPY" + whole[6:40])
    header = np.lib.format.header_data_from_array_1_0(np.zeros(1)) | {"shape": (10**5,)}
    with open(folder / "promise.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with open(folder / "huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (10**15,)})
    (folder / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(99))
    (folder / "noise.npy").write_bytes(bytes(range(256)))
    for name, value in {"nan": math.nan, "inf": math.inf, "zero": 0.0, "one": 1.0, "minus": -0.1, "more": 1.5,
                        "tiny": 1e-18}.items():
        b = BETAS.copy()
        b[17] = value
        (folder / f"{name}.csv").write_text("\n".join(map(str, b)))
    (folder / "nan.json").write_text("[0.1, NaN]")
    (folder / "word.csv").write_text("0.1\n0.2\nlots\n")
    (folder / "columns.csv").write_text("t,beta\n0,0.1\n1,0.2\n")
    (folder / "comma.csv").write_text("beta\n0,0001\n0,02\n,5\n")
    (folder / "string.json").write_text('"0.1"')
    (folder / "null.json").write_text("null")
    (folder / "digits.json").write_text("[0.1, 1" + "0" * 5000 + "]")
    (folder / "alphas.csv").write_text("0.999\n" * 200)
    (folder / "latin.csv").write_bytes(b"0.1\n\xff\xfe\n")
    (folder / "word.json").write_text('[0.1, "0.2"]')
    (folder / "bool.json").write_text("[0.1, true]")
    (folder / "integer.json").write_text("[0.1, 1" + "0" * 400 + "]")
    (folder / "other.json").write_text('{"beta": [0.1]}')
    (folder / "number.json").write_text("0.1")
    (folder / "broken.json").write_text("[0.1,")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "long.csv").write_text("1e-9\n" * 100_001)
    (folder / "large.csv").write_bytes(b"0" * (9 << 20))
    (folder / "rising.csv").write_text("0.9\n0.5\n0.6\n0.1\n")
    (folder / "betas.mat").write_text("0.1")
    (folder / "folder.csv").mkdir()
    (folder / "own_bad.py").write_text(
        "import sys\nnumber = 3\n"
        "def raises(): raise RuntimeError('no\\nluck')\ndef leaves(): sys.exit(7)\ndef none(): pass\n"
        "def words(): return ['a']\ndef ragged(): return [[1], [1, 2]]\ndef square(): return [[0.1]]\n"
        "def empty(): return []\ndef nan(): return [0.1, float('nan')]\ndef one(x): return x\n")
    (folder / "own_syntax.py").write_text("def f(:\n")
    (folder / "own_raising.py").write_text("1 / 0\n")
    (folder / "own_importing.py").write_text("import own_nowhere\n")
    (folder / "own_leaving.py").write_text("raise SystemExit(3)\n")
    (folder / "own_lazy.py").write_text("def __getattr__(name): raise RuntimeError('not now')\n")


BAD = {
    "T of 0": (["-T", "0"], "takes a whole number from 1 to 100000, not '0'"),
    "T of letters": (["-T", "many"], "takes a whole number"),
    "a negative T": (["-T", "-5"], "takes a whole number"),
    "a T that is too large": (["-T", "1000000000"], "takes a whole number"),
    "T with a table": (["-T", "5", "--betas", "nan.csv"], "-T is read only with --schedule"),
    "an unknown schedule": (["--schedule", "sigmoid"], "there is no schedule 'sigmoid'"),
    "two schedules": (["--schedule", "linear", "--betas", "nan.csv"], "not allowed with"),
    "a negative seed": (["--seed", "-1"], "takes a whole number"),
    "no such file": (["--betas", "nowhere.csv"], "nowhere.csv does not exist"),
    "a folder": (["--betas", "folder.csv"], "is a folder"),
    "an unknown ending": (["--betas", "betas.mat"], "takes one of the endings .npy, .csv, .txt, .json"),
    "an empty file": (["--betas", "empty.csv"], "the file is empty"),
    "a blank file": (["--betas", "blank.json"], "the file is empty"),
    "a header alone": (["--betas", "header.csv"], "holds no number"),
    "an empty list": (["--betas", "nothing.json"], "T = 0 is no schedule"),
    "an empty array": (["--betas", "zero.npy"], "T = 0 is no schedule"),
    "a pickle": (["--betas", "pickle.npy"], "it holds pickled objects"),
    "a square": (["--betas", "square.npy"], "an array of float64, shape (3, 3)"),
    "an array of words": (["--betas", "words.npy"], "numbers of shape (T,) are taken"),
    "complex betas": (["--betas", "complex.npy"], "an array of complex128"),
    "a cut header": (["--betas", "cut.npy"], "no .npy file that numpy.save wrote"),
    "a cut array": (["--betas", "promise.npy"], "ends before the 100000 numbers"),
    "a header of 10^15 numbers": (["--betas", "huge.npy"], "1,000,000,000,000,000 numbers, and at most 100,000"),
    "an archive": (["--betas", "zip.npy"], "no .npy file"),
    "bytes": (["--betas", "noise.npy"], "no .npy file"),
    "NaN": (["--betas", "nan.csv"], "betas[17] = nan"),
    "infinity": (["--betas", "inf.csv"], "betas[17] = inf"),
    "a beta of 0": (["--betas", "zero.csv"], "must lie in (0, 1), where only the last may be 1, got betas[17] = 0.0"),
    "a beta of 1 before the last": (["--betas", "one.csv"], "betas[17] = 1.0"),
    "a negative beta": (["--betas", "minus.csv"], "betas[17] = -0.1"),
    "a beta above 1": (["--betas", "more.csv"], "betas[17] = 1.5"),
    "a beta lost in rounding": (["--betas", "tiny.csv"], "betas[17] = 1e-18 is lost in rounding"),
    "NaN in JSON": (["--betas", "nan.json"], "betas[1] = nan"),
    "a word": (["--betas", "word.csv"], "line 3 holds 'lots', which is no number"),
    "columns": (["--betas", "columns.csv"], "line 2 holds 2 values: one column of betas is taken"),
    "decimal commas": (["--betas", "comma.csv"], "line 2 holds '0,0001': is that a decimal comma? A point is taken"),
    "alphas for betas": (["--betas", "alphas.csv"], "so large that alpha_bar underflows at t = 107 (if they are "
                                                    "alphas, pass 1 - alpha)"),
    "an integer of 5000 digits": (["--betas", "digits.json"], "'digits.json': it holds an integer too large for"),
    "a string in JSON": (["--betas", "string.json"], "it holds a string"),
    "null in JSON": (["--betas", "null.json"], "it holds null: [numbers] is taken"),
    "-T with a scheduler": (["--scheduler", "minidiff:ddim", "-T", "5"],
                            "-T is not read with --scheduler, which brings its own times"),
    "a plot of a scheduler": (["--scheduler", "minidiff:ddim", "--plot", "p.png"],
                              "--plot is not read with --scheduler: it plots the marginals of a schedule"),
    "a picture for a scheduler": (["--scheduler", "minidiff:ddim", "--watch", "p.png"],
                                  "--watch is not read with --scheduler: it adds noise by a schedule"),
    "-o for a scheduler": (["--scheduler", "minidiff:ddim", "-o", "p.png"],
                           "--out is not read with --scheduler: it names the picture of --watch"),
    "no UTF-8": (["--betas", "latin.csv"], "no text in UTF-8"),
    "a word in JSON": (["--betas", "word.json"], "betas[1] is '0.2', which is no number"),
    "true in JSON": (["--betas", "bool.json"], "betas[1] is True, which is no number"),
    "a huge integer in JSON": (["--betas", "integer.json"], "too large for a float"),
    "an object without betas": (["--betas", "other.json"], 'without "betas"'),
    "a number in JSON": (["--betas", "number.json"], "it holds a number"),
    "broken JSON": (["--betas", "broken.json"], "it is no JSON"),
    "deep JSON": (["--betas", "deep.json"], "it is no JSON"),
    "too many numbers": (["--betas", "long.csv"], "more than 100,000 numbers"),
    "too large a file": (["--betas", "large.csv"], "larger than 4 MiB"),
    "an alpha_bar that rises": (["--alpha-bar", "rising.csv"], "got alpha_bar[1] = 0.5 and alpha_bar[2] = 0.6"),
    "no function": (["--python", "own_bad"], "--python takes MODULE:NAME"),
    "an odd name": (["--python", "own_bad:f()"], "--python takes MODULE:NAME"),
    "no such module": (["--python", "own_nowhere:f"], "own_nowhere is not installed, and there is no own_nowhere.py"),
    "no such part of a module": (["--python", "numpy.nothing:f"], "cannot be imported: ModuleNotFoundError"),
    "a module that imports a missing module": (["--python", "own_importing:f"], "No module named 'own_nowhere'"),
    "a module that exits": (["--python", "own_leaving:f"], "module own_leaving cannot be imported: SystemExit: 3"),
    "a name that fails when it is asked for": (["--python", "own_lazy:f"], "own_lazy cannot be imported: RuntimeError"),
    "no such function": (["--python", "own_bad:f"], "module own_bad has no f"),
    "no function but a number": (["--python", "own_bad:number"], "own_bad:number is of the type int"),
    "a syntax error": (["--python", "own_syntax:f"], "cannot be imported: SyntaxError"),
    "a module that raises": (["--python", "own_raising:f"], "cannot be imported: ZeroDivisionError: division by zero"),
    "a function that raises": (["--python", "own_bad:raises"], "own_bad:raises() raised: RuntimeError: no luck"),
    "a function that exits": (["--python", "own_bad:leaves"], "raised: SystemExit: 7"),
    "a function of one argument": (["--python", "own_bad:one"], "raised: TypeError"),
    "a function that returns nothing": (["--python", "own_bad:none"], "returned a NoneType"),
    "a function that returns words": (["--python", "own_bad:words"], "returned an array of <U1"),
    "a ragged list": (["--python", "own_bad:ragged"], "returned a list that is not all numbers"),
    "a function that returns a square": (["--python", "own_bad:square"], "shape (1, 1)"),
    "a function that returns an empty list": (["--python", "own_bad:empty"], "T = 0 is no schedule"),
    "a function that returns NaN": (["--python", "own_bad:nan"], "betas[1] = nan"),
    "a plot that cannot be written": (["--plot", "nowhere/p.png"], "a folder that does not exist"),
    "a plot of unknown kind": (["--plot", "p.svg"], "takes one of the endings"),
    "JSON of unknown kind": (["--json", "r.txt"], "takes one of the endings .json"),
    "-o without --watch": (["-o", "w.png"], "-o is read only with --watch"),
    "one file for two pictures": (["--plot", "watch.png", "--watch", "nan.csv"], "name two files"),
    "a missing picture": (["--watch", "nowhere.png"], "nowhere.png does not exist"),
    "a file that is not a picture": (["--watch", "nan.csv"], "is not a readable picture"),
    "a folder for a picture": (["--watch", "folder.csv"], "is a folder"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_files(folder)
    return folder


@pytest.mark.parametrize("arguments, sentence", BAD.values(), ids=BAD.keys())
def test_wrong_input_gives_one_sentence_and_status_2(arguments, sentence, here, bad_files, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = sorted(bad_files.iterdir())
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("minidiff: ") and said.err.count("\n") == 1, said.err
    assert sentence in said.err and "Traceback" not in said.err
    assert sorted(bad_files.iterdir()) == before


def test_plot_and_watch_write_pictures_and_json(here, image, capsys):
    assert call("--schedule", "cosine", "-T", 40, "--plot", "out.png", "--watch", image, "--json", "r.json",
                "--seed", 5) == 0
    with Image.open("out.png") as plot, Image.open("watch.png") as watched:
        assert plot.width > 1000 and len(plot.getcolors(1 << 20)) > 20
        assert watched.width > 700 and len(watched.getcolors(1 << 20)) > 100
    printed = capsys.readouterr().out
    for word in ("closed form", "watch.png", "out.png", "mean over the pixels", "+-"):
        assert word in printed
    saved = json.loads((here / "r.json").read_text())
    assert saved["schedule"] == "cosine" and saved["T"] == 40
    assert {row["verdict"] for row in saved["rows"]} == {"kept", "skipped"}
    assert sorted(p.name for p in here.iterdir()) == ["out.png", "r.json", "watch.png", "x0.png"]


CLASHES = [
    (["--betas", "b.json", "--json", "b.json"], "--betas and --json are both 'b.json'"),
    (["--betas", "b.json", "--json", "link.json"], "--betas and --json are both 'link.json'"),
    (["--betas", "b.json", "--json", "../{}/b.json"], "--betas and --json are both '../"),
    (["--alpha-bar", "b.json", "--json", "b.json"], "--alpha-bar and --json are both"),
    (["-T", "50", "--watch", "x0.png", "-o", "x0.png"], "--watch and --out are both 'x0.png'"),
    (["-T", "50", "--watch", "watch.png"], "--watch and --out are both 'watch.png'"),
    (["-T", "50", "--watch", "x0.png", "--plot", "x0.png"], "--watch and --plot are both 'x0.png'"),
    (["-T", "50", "--watch", "x0.png", "-o", "p.png", "--plot", "./p.png"], "--plot and --out are both 'p.png'"),
]


@pytest.mark.parametrize("arguments, sentence", CLASHES)
def test_no_output_is_written_over_an_input_or_another_output(arguments, sentence, here, image, capsys):
    (here / "b.json").write_text("[0.5, 0.99]")
    (here / "link.json").symlink_to("b.json")
    (here / "watch.png").write_bytes(image.read_bytes())
    before = {path: path.read_bytes() for path in here.iterdir()}
    assert call(*(a.format(here.name) for a in arguments)) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.endswith(": name two files\n") and said.err.count("\n") == 1
    assert not said.out and {path: path.read_bytes() for path in here.iterdir()} == before


def test_outputs_stay_in_place_if_a_function_changes_the_folder(here, image):
    (here / "away").mkdir()
    (here / "own_mover.py").write_text("import os\ndef f():\n    os.chdir('away')\n    return [0.5, 0.99]\n")
    assert call("--python", "own_mover:f", "--plot", "p.png", "--watch", "x0.png", "--json", "r.json") == 0
    assert not list((here / "away").iterdir()) and all((here / n).is_file() for n in ("p.png", "watch.png", "r.json"))


def test_json_has_the_seed_and_the_source_of_the_numbers(here):
    (here / "b.json").write_text("[0.5, 0.99]")
    for arguments, source in ((["--betas", "b.json"], "betas from 'b.json': a list of 2 numbers"),
                              (["-T", 20], "the cosine schedule")):
        assert call(*arguments, "--seed", 9, "--json", "r.json") == 0
        saved = json.loads((here / "r.json").read_text())
        assert (saved["source"], saved["seed"]) == (source, 9)
        assert {row["side"] for row in saved["rows"] if row["law"] == NOISE} == {"<="}
    assert verify.as_dict(schedules.cosine(5), [])["source"] is None
