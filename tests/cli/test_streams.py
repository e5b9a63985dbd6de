"""What is printed is never worth a run, and what could not be printed is said, with an exit status that is not 0."""

import errno
import io
import os
import subprocess
import sys

import pytest
from support import processes, tiny
from support.command_line import call
from support.toy import Toy

from minidiff import terminal
from minidiff.cli import check, train
from minidiff.data import mnist
from minidiff.systems.text_to_image import TextToImage
from minidiff.training.run import TrainOptions, run

PIPE = subprocess.PIPE
full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


class Broken(io.StringIO):
    """A stream that fails at its write number `after`, as a pipe does whose reader has gone."""

    def __init__(self, after: int = 0, error: Exception | None = None):
        super().__init__()
        self.after, self.error = after, error or BrokenPipeError(errno.EPIPE, "Broken pipe")

    def write(self, text):
        self.after -= 1
        if self.after < 0:
            raise self.error
        return super().write(text)


LOST = {"a reader that left": Broken, "no stream": lambda: None,
        "a full disk": lambda: Broken(error=OSError(errno.ENOSPC, "No space left on device")),
        "a closed file": lambda: Broken(error=ValueError("I/O operation on closed file")),
        "a terminal that closed": lambda: Broken(error=OSError(errno.EIO, "Input/output error"))}


@pytest.fixture
def tiny_training(monkeypatch):
    monkeypatch.setattr(TextToImage, "config_for", classmethod(lambda cls, shape: tiny.CONFIG))
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images())


@pytest.mark.slow
@pytest.mark.parametrize("name, lost", [("stderr", Broken), ("stderr", lambda: Broken(after=3)),
                                        ("stderr", lambda: None), ("stdout", Broken)])
def test_training_goes_on_when_a_stream_goes(name, lost, tiny_training, tmp_path, monkeypatch, capsys):
    """It ended unsaved with status 120 or 1, which is documented as "interrupted and saved"."""
    monkeypatch.setattr(sys, name, lost())
    assert call("train", "--out", tmp_path / "run", "--steps", 2, "--batch", 4, "--images", 0) == 0
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "results.json").exists()


def test_a_run_of_a_program_goes_on_without_its_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken())
    run(tmp_path / "run", TextToImage, tiny.digits(50), TrainOptions(steps=2, batch=4), config=tiny.CONFIG)
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("settings, said", [
    ({"TQDM_BAR_FORMAT": "{bogus}"}, ""), ({"TQDM_ASCII": "a"}, ""),
    ({"TQDM_MININTERVAL": "a"}, "minidiff: there is no progress bar, since tqdm cannot take TQDM_MININTERVAL (Value")])
def test_a_setting_of_the_bar_that_tqdm_cannot_take_ends_no_work(settings, said):
    """tqdm reads the variables TQDM_... when it is imported, and a format when it draws: both raised amid the work."""
    program = """if True:
        from minidiff.terminal import progress
        print(list(progress([1, 2], "work")), end=" ")
        with progress(title="work", total=3) as bar:
            bar.set_postfix_str("loss 1")
            bar.update()
        bar.refresh()
        print(bar.total)"""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | settings, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("] ")[0]) == (0, "[1, 2")
    assert done.stderr.startswith(said) and "Traceback" not in done.stderr
    assert ("minidiff: " in done.stderr) == bool(said)      # a format that cannot be drawn is passed over


def test_a_bar_that_fails_for_another_reason_is_a_bug():
    with pytest.raises(Exception, match="(?i)unknown argument|bogus"):
        terminal.progress(bogus=1)


@pytest.mark.parametrize("lost, words", [
    *((lost, ("--version",)) for lost in LOST), ("a reader that left", ("info",)), ("a full disk", ("--help",)),
    ("no stream", ("sample", "--help")), ("a full disk", ("verify", "-T", "5")),
    ("a reader that left", ("verify", "--scheduler", "minidiff:ddim", "--steps", "3"))])
def test_lost_output_is_one_sentence_and_status_2(lost, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", LOST[lost]())
    assert call(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("minidiff: the output could not be printed (") and said.count("\n") == 1


@pytest.mark.parametrize("command, own, status", [
    (train, 0, 0), (train, 1, 1), (train, 130, 130), (check, 0, 2), (check, 1, 1), (check, 130, 130)],
    ids=lambda v: getattr(v, "__name__", v))
def test_lost_output_leaves_a_status_that_says_more(command, own, status, monkeypatch, capsys):
    """train's output is in its files, too; a script would take an interrupted run with status 0 for a finished one."""
    name = command.__name__.rpartition(".")[2]
    monkeypatch.setattr(command, name, lambda args: print("done") or own)
    monkeypatch.setattr(sys, "stdout", Broken())
    assert call(name) == status
    assert "the output could not be printed" in capsys.readouterr().err


def test_the_picture_is_drawn_though_nobody_reads_where(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Broken())
    assert call("sample", "3", "--count", 1, "--steps", 1, "-o", tmp_path / "s.png",
                "--trajectory", tmp_path / "t.png") == 2
    assert (tmp_path / "s.png").exists() and (tmp_path / "t.png").exists()


# --- a process of its own -----------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [("info",), pytest.param(("--help",), marks=pytest.mark.slow),
                                   pytest.param(("verify", "-T", "20"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
@full
def test_a_full_disk_or_a_reader_that_left(words, unbuffered, tmp_path):
    """Status 0 and nothing printed, or status 120 and "Exception ignored"."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "wb") as no_room, open(write, "wb") as no_reader:
        for stdout, says in ((no_room, "No space left on device"), (no_reader, "Broken pipe")):
            done = subprocess.run([sys.executable, "-m", "minidiff", *words], stdout=stdout, stderr=PIPE, cwd=tmp_path,
                                  env=environment | {"PYTHONPATH": str(processes.TESTS.parent)}, timeout=100)
            assert done.returncode == 2
            assert done.stderr.decode() == f"minidiff: the output could not be printed ({says})\n"


@pytest.mark.slow
def test_training_into_head(tmp_path):
    """minidiff train 2>&1 | head -c 100"""
    process = processes.start(tmp_path, *processes.TRAIN, stdout=PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.wait(200) == 0
    assert (tmp_path / "run" / "model.safetensors").exists() and (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
@full
@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", "1>&-", ">&- 2>&-", "</dev/null >/dev/full 2>/dev/full",
                                        "<&- >&- 2>&-"])
def test_training_without_streams(redirected, tmp_path):
    """A closed stream's number is given to no file: what is printed on it would be written into that file."""
    program = processes.PROGRAM.format(before="")
    processes.start(tmp_path, "--version", stdout=PIPE).communicate()               # makes the data
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(processes.TESTS.parent), str(processes.TESTS)])}
    done = subprocess.run(["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-c", program,
                           *processes.TRAIN], cwd=tmp_path, env=env, timeout=200)
    assert done.returncode == 0
    assert (tmp_path / "run" / "results.json").exists()
    Toy.load(tmp_path / "run" / "model.safetensors")


def test_closed_streams_are_opened(tmp_path):
    code = ("from minidiff import terminal; import os; terminal.open_missing(); f = open('x', 'w'); "
            "os.write(1, b'lost'); f.write(str(f.fileno() > 2)); f.close()")
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code], cwd=tmp_path, check=True,
                   env=os.environ | {"PYTHONPATH": str(processes.TESTS.parent)}, timeout=60)
    assert (tmp_path / "x").read_text() == "True"


# --- what a terminal would obey -----------------------------------------------------------------------------

def test_one_line():
    assert terminal.one_line("七 a\tb\nc\r\x1b[2K\x07\u202e\x85\ud800\x9b") == \
        "七 a b c \\x1b[2K\\x07\\u202e \\ud800\\x9b"


@pytest.mark.slow
def test_no_file_forges_a_line(tmp_path, capsys, monkeypatch):
    """A note in a model, and a file's name, cannot end the line or move the cursor."""
    model = tiny.trained_a_little()
    evil = "x\nminidiff: all is well\x1b[2J\r"
    path = tmp_path / f"{evil}.safetensors"
    model.save(path, notes={"data": evil, evil: "seven"})
    assert call("info", "--model", path) == 0
    assert call("sample", evil, "--model", path, "--count", 1, "--steps", 1, "-o", tmp_path / f"{evil}.png") == 0
    for words in (("info", "--model", tmp_path / evil), ("sample", "3", "--model", tmp_path / evil),
                  ("verify", "--betas", tmp_path / f"{evil}.csv"), ("verify", "--python", evil), ("verify", evil),
                  ("train", "--data", tmp_path / evil), ("train", "--system", evil),
                  ("sample", "3", "--set", f"{evil}=1"),
                  ("train", "--needs", f"{evil}=x"), ("verify", "--schedule", evil), ("verify", "--scheduler", evil),
                  ("sample", "3", "--sampler", evil), ("sample", "3", "-o", tmp_path / evil / "s.png"), (evil,)):
        assert call(*words) == 2, words
    said = capsys.readouterr()
    for text in (said.out, said.err.replace("\r", "")):     # the bar's own
        assert "\x1b" not in text.replace("\x1b[A", "") and "\r" not in text
        assert not any(line.startswith("minidiff: all is well") for line in text.splitlines())
    assert said.err.count("\nminidiff: ") >= 12
