"""Systems that cannot be had here, simulated: Windows, a user without a name or home, outputs of old encodings."""

import ast
import errno
import io
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny
from support.command_line import call

from minidiff.data import mnist
from minidiff.data.dataset import load_dataset
from minidiff.engine import backend, parallel
from minidiff.errors import UserError, run_main
from minidiff.files import cache_folder, user_path, write_whole
from minidiff.registry import check_name
from minidiff.systems.system import as_read

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny.trained_a_little().save(path)
    return path


def sentence(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Windows ------------------------------------------------------------------------------------------------

def test_windows_has_no_library_without_a_name(monkeypatch):
    """ctypes.CDLL(None) raises a TypeError on Windows, which no command may end with."""
    def load(name):
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    monkeypatch.setattr(backend.ctypes, "CDLL", load)
    assert backend.keep_freed_memory() is False


def test_text_is_read_and_written_in_a_named_encoding():
    """Windows and old locales have other encodings than UTF-8 where none is named, and other line ends."""
    unnamed = []
    for path in [*(ROOT / "minidiff").rglob("*.py"), *(ROOT / "examples").glob("*.py"), ROOT / "setup.py"]:
        for call_of in (n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
            name = getattr(call_of.func, "attr", getattr(call_of.func, "id", ""))
            given = {keyword.arg for keyword in call_of.keywords}
            mode = [a.value for a in call_of.args[1:2] if isinstance(a, ast.Constant)] + ["r"]
            text = name in ("read_text", "write_text") or name == "open" and getattr(call_of.func, "id", "") \
                and "b" not in str(mode[0])
            if text and "encoding" not in given and "devnull" not in ast.unparse(call_of):
                unnamed.append(f"{path.relative_to(ROOT)}:{call_of.lineno}")
    assert not unnamed


@pytest.mark.parametrize("name", ["con", "NUL", "aux.v2", "com1", "lpt9", "mine."])
def test_a_name_that_windows_cannot_have_as_a_folder_is_refused(name):
    with pytest.raises(ValueError, match="no device of Windows"):
        check_name("system", name)


def test_names_close_to_windows_devices_are_names():
    for name in ("console", "com10", "nul-1", "a.con"):
        check_name("system", name)


def test_the_cores_where_the_system_does_not_say_which(monkeypatch):
    """macOS and Windows have no sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert parallel.allowed_cores() == set(range(os.cpu_count()))


# --- macOS --------------------------------------------------------------------------------------------------

def test_a_letter_and_its_accent_are_one():
    """macOS writes an accent after its letter: a prompt of it is read like a caption of another system's."""
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    assert as_read(decomposed) == as_read(composed) == " caf\u00e9"


# --- file systems -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync_takes_files(number, monkeypatch, tmp_path):
    def fsync(handle):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "a", b"text")
    assert (tmp_path / "a").read_bytes() == b"text" and len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_fails_at_fsync_is_reported(monkeypatch, tmp_path):
    def fsync(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="could not be written"):
        write_whole(tmp_path / "a", b"text")


# --- terminals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("columns", ["0", "1", "7", "no number"])
def test_help_fits_any_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    for command in ("train", "sample", "evaluate", "verify", "info"):
        assert call(command, "--help") == 0
    assert "\x1b" not in capsys.readouterr().out


# --- a user without a name, a home or a cache ---------------------------------------------------------------

@pytest.fixture
def nobody(monkeypatch):
    """A user id without an entry in the user database, and no HOME, as in many containers."""
    def unknown(*_):
        raise KeyError("getpwuid(): uid not found: 54321")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MINIDIFF_DATA", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def test_without_a_home_the_packed_images_do(nobody, capsys):
    assert len(mnist.load()) == 10_000
    assert "using the 10,000 training images that minidiff contains" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no cache folder.*set XDG_CACHE_HOME"):
        mnist.load(split="test")
    assert load_dataset("digits").test() is None


@pytest.mark.slow
def test_without_a_home_every_command_works(nobody, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("info") == 0
    assert "none (there is no cache folder" in capsys.readouterr().out
    assert call("train", "--steps", 1, "--batch", 2, "--images", 0, "--set", "steps=1", "--system", "dpm") == 0
    assert call("sample", "3", "--model", model, "--count", 1, "--steps", 1) == 0
    assert call("verify", "-T", 20, "--plot", "p.png") == 0


@pytest.mark.parametrize("variable, value", [("XDG_CACHE_HOME", "~nobody-of-this-name"), ("XDG_CACHE_HOME", "/proc/no"),
                                             ("XDG_CACHE_HOME", __file__), ("XDG_CACHE_HOME", "a\udc80b")])
def test_a_cache_folder_that_cannot_be_used(variable, value, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)                             # where a relative one is made
    monkeypatch.setenv(variable, value)
    assert call("info") == 0
    assert len(mnist.load()) == 10_000


@pytest.mark.parametrize("path", ["~nobody-of-this-name", "~nobody-of-this-name/mnist"])
def test_the_home_of_an_unknown_user_is_one_sentence(path, monkeypatch, capsys):
    assert call("train", "--data", path) == 2
    assert "the home folder in" in (said := capsys.readouterr().err) and said.count("\n") == 1
    monkeypatch.setenv("MINIDIFF_DATA", path)
    with pytest.raises(UserError) as error:
        mnist.load()
    assert "write out the path" in sentence(error)


def test_user_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_path("~/a") == tmp_path / "a" and user_path("a/~") == type(tmp_path)("a/~")
    assert cache_folder("minidiff", "mnist") == tmp_path / ".cache" / "minidiff" / "mnist"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert cache_folder("minidiff") == tmp_path / "elsewhere" / "minidiff"


# --- outputs of any encoding --------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"},
                                      {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_no_encoding_of_the_output_ends_a_run(settings, model, tmp_path):
    """The caption was printed after the work, and the trajectory written after that."""
    words = [sys.executable, "-m", "minidiff", "sample", "\u4e03", "--model", model, "--count", "1", "--steps", "1",
             "-o", "s.png", "--trajectory", "way.png"]
    environment = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "LANG", "PYTHONUTF8")}
    done = subprocess.run(words, cwd=tmp_path, env=environment | settings, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert {"s.png", "way.png"} <= {path.name for path in tmp_path.iterdir()}
    assert rb"\u" in done.stdout                           # in the last case the caption is three surrogates


def test_a_script_prints_any_text(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    run_main(lambda: print("\u4e03"))
    out.flush()
    assert out.buffer.getvalue() == b"\\u4e03\n"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_an_output_of_another_kind_is_left_as_it_is(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    run_main(lambda: None)
