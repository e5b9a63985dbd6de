"""Signals that ask to stop: training saves and says how to resume, all else ends at once, and all is put back."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import processes, tiny
from support.command_line import call

from minidiff import checkpoint, files
from minidiff.data import mnist
from minidiff.signals import STOPS, Stopped, on_stop, stop_at_once
from minidiff.training import loop
from minidiff.training.trainer import Trainer

PIPE = subprocess.PIPE
TRAIN = ("train", "--system", "toy", "--batch", 4, "--images", 0, "--out")


@pytest.fixture
def toy_training(toy, tmp_path, monkeypatch):
    """minidiff train --system toy, in an empty folder, on a few digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images(50))


def at_step(number: int, act, monkeypatch) -> None:
    """act() happens during step `number` of the run."""
    step, made = Trainer.step, []

    def acting(self):
        made.append(1)
        if len(made) == number:
            act()
        return step(self)
    monkeypatch.setattr(Trainer, "step", acting)


def handlers() -> list:
    return [signal.getsignal(number) for number in STOPS]


@pytest.mark.slow
@pytest.mark.parametrize("number, step", [*((number, 2) for number in STOPS), (signal.SIGTERM, 4)])
def test_training_saves_and_its_words_resume_it(number, step, toy_training, monkeypatch, capsys):
    """SIGTERM and SIGHUP saved nothing; a signal in a stage's last step, the fourth, was forgotten by the next."""
    before = handlers()
    assert call(*TRAIN, "straight") == 0
    with monkeypatch.context() as patch:
        at_step(step, lambda: signal.raise_signal(number), patch)
        assert call(*TRAIN, "run one") == 1
    assert handlers() == before
    said = capsys.readouterr().err
    assert f"stopped after step {step} of 4, saved as run one/1-first/step-00000{step}.safetensors; continue" in said
    assert checkpoint.CheckpointFolder("run one/1-first").latest().meta["step"] == step
    command = shlex.split(said.rpartition("continue with: ")[2])
    assert command[0] == "minidiff" and call(*command[1:]) == 0
    a, b = (checkpoint.load(f"{name}/model.safetensors").tensors for name in ("straight", "run one"))
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_signal_while_the_last_state_is_saved_is_not_forgotten(toy_training, monkeypatch, capsys):
    save = checkpoint.CheckpointFolder.save

    def signalled(self, *state):
        signal.raise_signal(signal.SIGTERM)
        return save(self, *state)
    monkeypatch.setattr(checkpoint.CheckpointFolder, "save", signalled)
    assert call(*TRAIN, "run") == 1
    assert [p.name for p in Path("run").glob("[0-9]-*")] == ["1-first"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_batch_systems_signal_may_come_twice(number, toy_training, monkeypatch):
    at_step(2, lambda: [signal.raise_signal(number), signal.raise_signal(number)], monkeypatch)
    assert call(*TRAIN, "run") == 1


@pytest.mark.parametrize("first", STOPS, ids=lambda n: n.name)
def test_ctrl_c_after_a_signal_stops_at_once_and_keeps_what_was_saved(first, toy_training, monkeypatch, capsys):
    """The second Ctrl-C, and the first one too where another signal has asked before it."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    before = handlers()
    at_step(3, lambda: [signal.raise_signal(first), signal.raise_signal(signal.SIGINT)], monkeypatch)
    assert call(*TRAIN, "run") == 130
    assert "minidiff: stopped; continue from the last saved state with: minidiff train" in capsys.readouterr().err
    assert checkpoint.CheckpointFolder("run/1-first").latest().meta["step"] == 2 and handlers() == before


def test_ctrl_c_while_a_state_is_written_leaves_no_half_file(toy_training, monkeypatch, capsys):
    """The first asks, the second comes amid the write; a third, while the temporary file is removed."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    fsync, unlink, n = os.fsync, files.Path.unlink, []

    def interrupted(handle):
        n.append(1)
        if len(n) > 8:
            signal.raise_signal(signal.SIGINT)
        return fsync(handle)

    def interrupted_again(path, **options):
        if path.suffix == ".tmp" and len(n) > 9:
            signal.raise_signal(signal.SIGINT)
        return unlink(path, **options)
    monkeypatch.setattr(os, "fsync", interrupted)
    monkeypatch.setattr(files.Path, "unlink", interrupted_again)
    assert call(*TRAIN, "run") in (1, 130)
    assert "Traceback" not in capsys.readouterr().err
    assert checkpoint.CheckpointFolder("run/1-first").latest() is not None
    monkeypatch.undo()


def test_every_other_command_ends_at_once_with_128_and_the_signal(monkeypatch, capsys, tmp_path):
    from minidiff.cli import info
    wanted = {"SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU", "SIGBREAK"} & set(dir(signal))
    assert {number.name for number in STOPS} == wanted
    before = handlers()
    for number in STOPS:
        monkeypatch.setattr(info, "print_table", lambda rows, number=number: signal.raise_signal(number))
        assert call("info") == 128 + number
        assert capsys.readouterr().err == "minidiff: stopped\n"
    assert handlers() == before


@pytest.mark.parametrize("given, said", [((), "stopped"), (("enough",), "enough")])
def test_an_interrupt_that_is_no_signal_ends_with_130(given, said, monkeypatch, capsys):
    """A library may raise KeyboardInterrupt of itself."""
    from minidiff.cli import info

    def raising(rows):
        raise KeyboardInterrupt(*given)
    monkeypatch.setattr(info, "print_table", raising)
    assert call("info") == 130
    assert capsys.readouterr().err == f"minidiff: {said}\n"


def test_between_stages_training_says_how_to_resume(toy_training, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "use_averaged_weights", lambda self: signal.raise_signal(signal.SIGTERM))
    assert call(*TRAIN, "run") == 128 + signal.SIGTERM
    assert "continue from the last saved state with: minidiff train --system toy --resume" in capsys.readouterr().err


# --- the handlers of others ---------------------------------------------------------------------------------

@pytest.mark.parametrize("number", STOPS, ids=lambda n: n.name)
def test_an_ignored_signal_stays_ignored(number, toy_training, monkeypatch):
    """As after nohup, or in the background of a shell."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        at_step(2, lambda: signal.raise_signal(number), monkeypatch)
        assert call(*TRAIN, "run") == 0 and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch):
    """signal.signal cannot put it back, and raised TypeError."""
    given = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: given.append(arguments))
    with on_stop(stop_at_once):
        pass
    assert not given


def test_in_a_thread_no_handler_is_set(toy_training):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call, *TRAIN, "run").result() == 0


def test_on_stop_puts_back_what_was_there_after_an_error():
    before = handlers()
    with pytest.raises(Stopped), on_stop(stop_at_once):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), on_stop(stop_at_once):
        1 / 0  # noqa: B018
    assert handlers() == before


# --- a process of its own -----------------------------------------------------------------------------------

INTERRUPTED = """
import importlib.abc, signal
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
for name in [name for name in sys.modules if name.startswith("minidiff.cli")]:
    del sys.modules[name]
"""


def test_ctrl_c_during_the_imports_is_quiet(tmp_path):
    process = processes.start(tmp_path, "info", before=INTERRUPTED.format(name="minidiff.cli.info"),
                              stdout=PIPE, stderr=PIPE)
    assert processes.ended(process) == (-signal.SIGINT, "", "")


FOREVER = "Toy.steps = (10**9, 1)"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
                                    pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_real_signal_saves(number, tmp_path):
    process = processes.start(tmp_path, *processes.TRAIN, before=FOREVER, stdout=PIPE, stderr=PIPE)
    said = b""
    while b"loss" not in said:
        part = process.stderr.read1()
        assert part, said.decode()
        said += part
    process.send_signal(number)
    status, _, more = processes.ended(process)
    assert status == 1 and "continue with: minidiff train --system toy --resume --out run" in more
    assert checkpoint.CheckpointFolder(tmp_path / "run" / "1-first").latest().meta["step"] > 0
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_ctrl_c_at_any_time_is_never_a_traceback(tmp_path):
    """From the first import to the end, one to three of them."""
    import time
    rng = np.random.default_rng(0)
    for i in range(30):
        process = processes.start(tmp_path, *processes.TRAIN, "--out", f"run{i}", before="Toy.steps = (300, 1)",
                                  stdout=PIPE, stderr=PIPE)
        time.sleep(0.15 + 3 * rng.random())                 # Python's own start has no handler yet
        for _ in range(1 + i % 3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05 * rng.random())
        status, _, said = processes.ended(process)
        assert status in (0, 1, 130, -signal.SIGINT), said
        # PROGRAM imports the toy before `program` runs, where Python still has its own handler
        assert "Traceback" not in said or "program()" not in said, said
        folder = checkpoint.CheckpointFolder(tmp_path / f"run{i}" / "1-first")
        assert status != 1 or folder.latest() is not None
