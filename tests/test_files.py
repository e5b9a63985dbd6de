"""Files: no output replaces an input, permissions stay, no half-written file stays, one process trains in a folder."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny
from support.command_line import call
from support.toy import Toy

from minidiff import checkpoint, locks
from minidiff.data import mnist
from minidiff.errors import UserError
from minidiff.files import check_distinct, check_writable, remove_abandoned, write_whole
from minidiff.locks import locked
from minidiff.training import loop
from minidiff.training import run as runs
from minidiff.training.run import TrainOptions
from minidiff.verify.loading import load_named

ROOT = Path(__file__).parents[1]


# --- what is read is not written over -----------------------------------------------------------------------

def link(path: Path, to: Path) -> Path:
    path.symlink_to(to)
    return path


def hard_link(path: Path, to: Path) -> Path:
    os.link(to, path)
    return path


OTHER_NAMES = {
    "itself": lambda f, file: file,
    "relative": lambda f, file: Path(os.path.relpath(file)),
    "through ..": lambda f, file: f / "deep" / ".." / file.name,
    "a link": lambda f, file: link(f / f"a{file.suffix}", file),
    "a hard link": lambda f, file: hard_link(f / f"b{file.suffix}", file),
    "a link to a link": lambda f, file: link(f / f"c{file.suffix}", link(f / f"d{file.suffix}", file)),
    "a linked folder": lambda f, file: link(f / "g", f) / file.name,
}


@pytest.mark.parametrize("other", OTHER_NAMES.values(), ids=OTHER_NAMES.keys())
def test_one_file_under_two_names(other, tmp_path):
    (tmp_path / "deep").mkdir()
    file = tmp_path / "x.png"
    file.write_bytes(b"weights")
    there = other(tmp_path, file)
    with pytest.raises(UserError, match="--model and --out are both .*: name two files"):
        check_distinct({"--out": there}, {"--model": file})
    with pytest.raises(UserError, match="--out and --trajectory are both .*: name two files"):
        check_distinct({"--out": file, "--trajectory": there}, {})


def test_two_new_files_may_not_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for a, b in (("x.png", "./x.png"), ("x.png", tmp_path / "x.png"), ("x.png", "X.PNG"), ("\u00e9.png", "e\u0301.png"),
                 ("x.png", link(tmp_path / "dangling", tmp_path / "x.png"))):
        with pytest.raises(UserError, match="--out and --trajectory are both"):
            check_distinct({"--out": Path(a), "--trajectory": Path(b)}, {})
    check_distinct({"--out": Path("x.png"), "--trajectory": Path("y.png"), "--json": None}, {"--model": None})
    Path("m.png").touch()
    Path("M.png").touch()                                   # where these are two files, they are two
    if len(list(tmp_path.glob("[mM].png"))) == 2:
        check_distinct({"--out": Path("m.png")}, {"--model": Path("M.png")})


def test_a_link_into_a_folder_that_is_read(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "t10k-labels-idx1-ubyte").touch()
    (data / "old.json").touch()
    with pytest.raises(UserError):
        check_distinct({"--json": link(tmp_path / "r.json", data / "t10k-labels-idx1-ubyte")}, {"--data": data})
    check_distinct({"--json": data / "old.json"}, {"--data": data})
    with pytest.raises(UserError):
        check_distinct({"--out": data}, {"--data": link(tmp_path / "d", data)})


def commands(model: Path, other: Path):
    sample = ("sample", "7", "--model", model, "--count", 1, "--steps", 1)
    yield (*sample, "-o", other)
    yield (*sample, "-o", model.parent / "s.png", "--trajectory", other)
    yield (*sample, "-o", model.parent / "s.png", "--trajectory", model.parent / "deep" / ".." / "s.png")
    if other.suffix == ".json":
        yield "evaluate", "--model", model, "--json", other, "--images", 5, "--steps", 1


@pytest.mark.parametrize("suffix", [".png", ".json"])
def test_no_command_writes_over_its_model(suffix, tmp_path, monkeypatch, capsys):
    """Status 0, and the weights gone."""
    (tmp_path / "deep").mkdir()
    model = tmp_path / f"m{suffix}"
    tiny.trained_a_little().save(model)
    before = model.read_bytes()
    for other in (model, hard_link(tmp_path / f"h{suffix}", model), link(tmp_path / f"l{suffix}", model)):
        for words in commands(model, other):
            assert call(*words) == 2, words
    assert "Traceback" not in capsys.readouterr().err and model.read_bytes() == before
    assert not (tmp_path / "s.png").exists()


def test_training_writes_over_nothing_that_it_reads(tmp_path, monkeypatch, capsys, toy):
    monkeypatch.chdir(tmp_path)
    mnist.pack(tiny.images(), tmp_path)
    needed = tmp_path / "clip.safetensors"
    needed.touch()
    Path("run").mkdir()
    link(tmp_path / "run" / "results.json", needed)
    for words in (("--system", "toy", "--data", tmp_path, "--out", "."),
                  ("--system", "toy", "--data", ".", "--out", tmp_path),
                  ("--system", "latent", "--needs", f"clip={needed}", "--out", "run")):
        assert call("train", *words) == 2, words
        assert "name two files" in capsys.readouterr().err
    monkeypatch.setenv("MINIDIFF_DATA", ".")
    assert call("train", "--system", "toy", "--out", tmp_path) == 2


# --- permissions --------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o777, 0o666])
def test_a_file_that_is_replaced_keeps_its_mode(mode, tmp_path):
    file = tmp_path / "x.json"
    file.touch()
    file.chmod(mode)
    write_whole(file, b"new")
    assert stat.S_IMODE(file.stat().st_mode) == mode and file.read_bytes() == b"new"


@posix
def test_a_new_files_mode_is_the_umasks_and_a_half_file_is_not_more_open(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "new", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o600)
    modes = []
    monkeypatch.setattr(os, "fsync", lambda handle: modes.append(stat.S_IMODE(os.fstat(handle).st_mode)))
    write_whole(tmp_path / "new", b"secret")
    assert modes[0] == 0o600


def test_a_read_only_file_is_refused_before_the_work(tmp_path, capsys, monkeypatch, toy):
    file = tmp_path / "s.png"
    file.write_bytes(b"kept")
    file.chmod(0o444)
    with pytest.raises(UserError, match="s.png' cannot be written .it is read-only.: choose another"):
        check_writable(file)
    with pytest.raises(UserError, match="could not be written .it is read-only.; nothing was changed"):
        write_whole(file, b"")
    assert call("sample", "7", "-o", file) == 2 and file.read_bytes() == b"kept"
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images(50))
    for name in ("results.json", "sheet.png"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        (tmp_path / name / name).chmod(0o444)
        assert call("train", "--system", "toy", "--out", tmp_path / name) == 2
        assert "read-only" in capsys.readouterr().err
    runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True)
    (tmp_path / "run" / "model.safetensors").chmod(0o444)
    with pytest.raises(UserError, match="read-only"):       # not after the training
        runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True, resume=True)


def test_a_long_name_is_written(tmp_path):
    file = tmp_path / ("\u4e03" * 80 + ".png")
    check_writable(file)
    write_whole(file, b"x")
    assert file.read_bytes() == b"x" and list(tmp_path.iterdir()) == [file]


# --- what a killed writer leaves ----------------------------------------------------------------------------

def test_leftovers_go_at_the_next_start_but_not_those_of_a_writer_that_lives(tmp_path):
    left, others, alive = (tmp_path / f".{name}.tmp" for name in ("s.png.0123abcd", "mine", "s.png.89abcdef"))
    for file in (left, others, alive):
        file.touch()
    with open(alive, "r+b") as file:
        assert locks.take(file)
        check_writable(tmp_path / "s.png")
        assert not left.exists() and alive.exists() and others.exists()
        remove_abandoned(tmp_path)
        assert alive.exists() and others.exists()
    remove_abandoned(tmp_path)
    assert not alive.exists() and others.exists()


def test_a_run_that_was_killed_is_cleaned_when_it_resumes(tmp_path):
    runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True)
    for name in (".run.json", ".results.json", "1-first/.loss.png", "2-second/.samples.png"):
        (tmp_path / "run" / f"{name}.01234567.tmp").touch()
    runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True, resume=True)
    assert not list(tmp_path.rglob("*.tmp"))


# --- one process trains in a folder -------------------------------------------------------------------------

def test_a_second_run_in_the_folder_is_refused(tmp_path, capsys, monkeypatch, toy):
    """Each overwrote the other's files, with status 0."""
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images(50))
    runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True)
    with locked(tmp_path / "run"):
        for more in ((), ("--resume",)):
            assert call("train", "--system", "toy", "--out", tmp_path / "run", *more) == 2
            assert "another process is training in" in capsys.readouterr().err
        with pytest.raises(UserError, match="another process is training in"):
            runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True, resume=True)
    runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True, resume=True)
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_is_locked_to_its_end_and_unlocked_after_an_error(tmp_path, monkeypatch):
    def refused(*arguments):
        with pytest.raises(UserError, match="another process"), locked(tmp_path / "run"):
            pass
    monkeypatch.setattr(loop, "draw_preview", refused)
    monkeypatch.setattr(runs, "draw_preview", refused)
    runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True)
    monkeypatch.setattr(runs, "draw_preview", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runs.run(tmp_path / "b", Toy, tiny.digits(50), TrainOptions(steps=1), quiet=True)
    with locked(tmp_path / "b"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = ("import os, sys; from minidiff.locks import locked\n"
            "with locked(sys.argv[1]): print('in', flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == b"in\n"
    with pytest.raises(UserError, match="another process"), locked(tmp_path / "run"):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """Else one process would hold the lock of a file that has gone, and the next that of a new one."""
    (tmp_path / ".lock").touch()
    take, n = locks.take, []

    def removed_first(file):
        n.append(1)
        if len(n) == 1:
            (tmp_path / ".lock").unlink()
        return take(file)
    monkeypatch.setattr(locks, "take", removed_first)
    with locked(tmp_path), pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass


@pytest.mark.skipif(locks.fcntl is None, reason="POSIX's locks")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_gives_a_warning(number, tmp_path, monkeypatch):
    def none(*arguments):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(locks.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="without locks: start no second run"), locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()                  # nothing was put into it


def test_windows_locks(tmp_path, monkeypatch):
    """msvcrt raises PermissionError for a lock that another has."""
    import types
    held = []

    def locking(handle, mode, count):
        if held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.append(handle)
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    with locked(tmp_path), pytest.raises(UserError, match="another process"), locked(tmp_path):
        pass


# --- a full disk, a folder that goes ------------------------------------------------------------------------

@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_last_state_on_a_full_disk(number, tmp_path, monkeypatch):
    """Or beyond a quota.  The steps since the state before it were lost without a hint.  Older states make room; the
    newest stays."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    save, room = checkpoint.save, [1]

    def full(path, *state):
        if path.name == "step-000004.safetensors" and len(list(path.parent.glob("step-*"))) > room[0]:
            raise UserError(f"{path} could not be written (No space left on device); nothing was changed there."
                            ) from OSError(number, "No space left on device")
        return save(path, *state)
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        runs.run(tmp_path / "a", Toy, tiny.digits(50), TrainOptions(steps=4), quiet=True)
    assert (tmp_path / "a" / "model.safetensors").exists()
    room[0] = 0
    says = "step 4 of 4 could not be saved: .*No space left on device.*; resuming continues from .*step-000003"
    with pytest.warns(UserWarning), pytest.raises(loop.NotSaved, match=says):
        runs.run(tmp_path / "b", Toy, tiny.digits(50), TrainOptions(steps=4), quiet=True)
    assert [p.name for p in (tmp_path / "b" / "1-first").glob("step-*")] == ["step-000003.safetensors"]


def test_another_failure_removes_no_state(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    save = checkpoint.save

    def refused(path, *state):
        if path.name == "step-000004.safetensors":
            raise UserError("the file is called X.")
        return save(path, *state)
    monkeypatch.setattr(checkpoint, "save", refused)
    with pytest.warns(UserWarning), pytest.raises(loop.NotSaved, match="is called X; resuming"):
        runs.run(tmp_path / "b", Toy, tiny.digits(50), TrainOptions(steps=4), quiet=True)
    assert len(list((tmp_path / "b" / "1-first").glob("step-*"))) == 3


def test_a_full_disk_at_the_end_says_how_to_go_on(tmp_path, monkeypatch, capsys, toy):
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images(50))
    monkeypatch.chdir(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    for name in ("model.safetensors", "step-000004.safetensors"):
        write = checkpoint.write_whole
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_whole", lambda path, data, name=name, write=write: (
                patch.setattr(os, "fsync", full) if path.name == name else None, write(path, data)))
            assert call("train", "--system", "toy", "--out", name[:4], "--images", 0) == 2
        said = capsys.readouterr().err
        assert "No space left on device" in said
        assert f"continue with: minidiff train --system toy --resume --out {name[:4]}" in said
        assert call("train", "--system", "toy", "--out", name[:4], "--images", 0, "--resume") == 0


def test_a_run_whose_folder_was_removed_can_be_resumed(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    step = loop.Trainer.step

    def removed(self):
        if self.n == 2:
            shutil.rmtree(tmp_path / "run")
        if self.n == 3:
            raise KeyboardInterrupt
        return step(self)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", removed)
        with pytest.raises(KeyboardInterrupt):
            runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=4), quiet=True)
    runs.run(tmp_path / "run", Toy, tiny.digits(50), TrainOptions(steps=4), quiet=True, resume=True)


# --- a working folder that was deleted ----------------------------------------------------------------------

def test_a_deleted_working_folder_is_refused_where_it_is_needed_only(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    try:
        assert call("info") == 0
        assert call("verify", "-T", 5, "--json", tmp_path / "r.json") == 0
        assert load_named("json:loads", "--python") is json.loads
        assert call("sample", "3", "--count", 1, "--steps", 1, "-o", tmp_path / "s.png") == 0
        capsys.readouterr()
        for words in (("sample", "3"), ("sample", "3", "-o", "s.png"), ("verify", "--json", "r.json"), ("train",),
                      ("evaluate", "--json", "r.json"), ("verify", "--python", "mine:betas")):
            assert call(*words) == 2, words
            said = capsys.readouterr().err
            assert said.startswith("minidiff: ") and said.count("\n") == 1, said
    finally:
        monkeypatch.undo()
