"""The end of a command on several ranks: who reports, who waits, and who ends the others.  MPI is a stand-in here.

tests/training/test_ranks.py runs real ranks where mpiexec is installed.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from minidiff.cli import ranks


class Comm:
    """An mpi4py communicator of a rank; the others come after `late` questions, and failed as `everyones` says."""

    def __init__(self, everyones, late):
        self.everyones, self.late, self.aborted, self.mine = everyones, late, [], None

    def Iallgather(self, mine, everyones):
        self.mine, questions = bool(mine[0]), iter(range(self.late))

        def Test():
            if next(questions, None) is None:
                everyones[:] = self.everyones
                return True
            return False
        return SimpleNamespace(Test=Test)

    def Abort(self, status):
        self.aborted.append(status)
        raise SystemExit(f"MPI ended all ranks with {status}")


@pytest.fixture
def leave(monkeypatch, capsys):
    """leave(rank, status, words, ...) -> (the communicator, standard error), with a clock of 2 seconds a question."""
    def call(rank, status, words="no disk", said="", *, everyones=(False, False, False), late=0):
        comm, clock, closed = Comm(everyones, late), iter(np.arange(0.0, 1e4, 2)), []
        monkeypatch.setattr(ranks, "ranks", lambda: SimpleNamespace(rank=rank, size=len(everyones), comm=comm))
        monkeypatch.setattr(ranks.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(ranks.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(ranks.os, "dup2", lambda new, old: closed.append(old))
        try:
            ranks._leave(status, words, said)
        except SystemExit:
            assert closed == [2]                            # MPI's own words about an abort are not shown
        return comm, capsys.readouterr().err
    return call


@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_rank_that_fails_alone_reports_it_and_ends_the_others_with_its_status(leave, status):
    comm, said = leave(1, status, late=100)
    assert comm.aborted == [status] and comm.mine
    assert said.count("minidiff: rank 1 failed (no disk), and the 3 were stopped: if it had saved a state, resume") == 1


def test_the_first_rank_has_printed_its_reason_already(leave):
    comm, said = leave(0, 2, late=100)
    assert comm.aborted == [2] and "rank 0 failed in this way, and the 3 were stopped" in said and "no disk" not in said


def test_a_rank_that_succeeds_waits_for_the_others_however_long(leave):
    comm, said = leave(1, 0, late=1000)
    assert comm.aborted == [] and said == "" and comm.mine is False


def test_a_failed_rank_gives_the_others_three_seconds_to_fail_too(leave):
    """The clock goes on by 2 seconds a question: the deadline, 3 after the first look, passes with the third."""
    assert leave(1, 2, late=1, everyones=(False, True, False))[0].aborted == []
    assert leave(1, 2, late=2, everyones=(False, True, False))[0].aborted == [2]


@pytest.mark.parametrize("rank, everyones, reports", [
    (1, (False, True, False), True), (2, (False, True, True), False), (2, (True, True, True), False),
    (1, (False, True, True), True)])
def test_of_the_ranks_that_failed_the_first_reports(leave, rank, everyones, reports):
    comm, said = leave(rank, 2, everyones=everyones)
    assert comm.aborted == [] and ("rank" in said) == reports


def test_the_words_of_a_rank_that_printed_its_reason_are_the_last_sentence_that_it_printed(leave):
    _, said = leave(1, 2, words="", said="step 3\nminidiff: the disk\n is full\n", everyones=(False, True, False))
    assert "minidiff: rank 1 failed (the disk is full)\n" in said


def test_a_traceback_of_another_rank_is_shown(leave):
    said = leave(1, 2, "KeyError: 3", "40% done\nTraceback (most recent call last):\n  line\n",
                 everyones=(False, True, False))[1]
    assert said == "\nTraceback (most recent call last):\n  line\nminidiff: rank 1 failed (KeyError: 3)\n"


@pytest.mark.parametrize("said, begins", [
    ("minidiff: no disk\n", "\nminidiff: rank 1 failed"), ("", "\nminidiff: rank 1 failed"),
    ("50%|###Traceback (most recent call last):\n", "\nTraceback (most recent call last):\nminidiff: rank 1 failed")])
def test_a_rank_prints_its_traceback_alone_on_a_line_of_its_own(leave, said, begins):
    assert leave(1, 2, said=said, everyones=(False, True, False))[1].startswith(begins)
