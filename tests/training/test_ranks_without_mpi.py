"""What ranks exchange, and who of them writes, with stand-ins for MPI: quick.

tests/training/test_ranks.py has real ones.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
from support import tiny

from minidiff.errors import UserError
from minidiff.systems.text_to_image import TextToImage
from minidiff.training import loop, run, trainer
from minidiff.training.ranks import Ranks
from minidiff.training.run import TrainOptions


@pytest.fixture(autouse=True)
def without_mpi(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(IN_PLACE="in place")))


class OfThreads:
    """A communicator of ranks that are threads of this process."""

    def __init__(self, rank: int, there: Barrier, held: list):
        self.rank, self.there, self.held = rank, there, held
        self.Get_rank, self.Get_size = lambda: rank, lambda: there.parties

    def Allreduce(self, given, flat):
        assert given == "in place"
        self.held[self.rank] = flat.copy()
        self.there.wait(60)
        flat[...] = sum(self.held)
        self.there.wait(60)                                 # else a fast one would come with its next


@pytest.mark.parametrize("size, count", [(2, 6), (2, 5), (3, 7), (4, 4)])
@pytest.mark.parametrize("asks", [None, 0, 1])
def test_the_exchange_gives_all_ranks_the_means_of_the_batch(size, count, asks):
    """Whatever their parts' sizes; and the wish to stop, whoever has it."""
    x = np.random.default_rng(0).standard_normal((count, 2, 3))
    per_sample = [x, x[:, 0] ** 2, x[:, :, 0] ** 3]         # three gradients of each sample

    def steps(comm):
        own = Ranks(comm)
        part, results = own.shard(count), []
        share = (part.stop - part.start) / count
        for factor in (1, 10):                              # what the first step leaves behind does not matter
            loss, means, stop = own.mean(factor * x[part].mean(), [factor * g[part].mean(axis=0) for g in per_sample],
                                         share, factor == 10 and own.rank == asks)
            results.append((loss, [np.array(g) for g in means], stop))
        return results
    there, held = Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        ranks = list(pool.map(steps, [OfThreads(rank, there, held) for rank in range(size)]))
    for results in ranks:
        for factor, (loss, means, stop), (_, of_first, _) in zip((1, 10), results, ranks[0], strict=True):
            assert loss == pytest.approx(factor * x.mean(), rel=1e-12)
            for mean, g, first in zip(means, per_sample, of_first, strict=True):
                np.testing.assert_allclose(mean, factor * g.mean(axis=0), rtol=1e-12, atol=1e-14)
                assert np.array_equal(mean, first)
            assert stop == (factor == 10 and asks is not None)


def test_the_first_rank_of_each_machine_loads_before_the_others_there():
    """Four ranks on two machines, each with a disk of its own: what one loads, the others find on its disk.  The first
    of a machine is slow, and no other may come before it."""
    there, disks, began = Barrier(4), {"a": set(), "b": set()}, []
    machines, here = "aabb", (0, 1, 0, 1)

    def start(rank):
        comm = SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: 4, Barrier=lambda: there.wait(60))
        disk = disks[machines[rank]]

        def load():
            began.append(rank)
            found = "data" in disk
            if not found:
                time.sleep(0.05)
                disk.add("data")
            return found
        return Ranks(comm, here[rank]).in_turn(load)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(start, range(4))) == [False, True, False, True]
    assert began[0] == 0                                    # before all others, whose disk may be the same


@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_loaded_is_raised_after_all_have_waited(rank):
    """Else the other ranks would wait for ever."""
    waited = []
    comm = SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: 2, Barrier=lambda: waited.append(rank))

    def load():
        raise UserError("no data")
    with pytest.raises(UserError, match="no data"):
        Ranks(comm, rank).in_turn(load)
    assert len(waited) == 3


class OfTheSame:
    """A communicator of two ranks that hold the same."""

    def __init__(self, rank: int):
        self.Get_rank, self.Get_size, self.Barrier = lambda: rank, lambda: 2, lambda: None

    def Allreduce(self, given, flat):
        flat *= 2

    def allgather(self, value):
        return [value, value]

    def bcast(self, value):
        return value

    def allreduce(self, value):
        return 2 * value


@pytest.mark.slow
@pytest.mark.parametrize("rank, written", [
    (0, {"run.json", "step-000001.safetensors", "step-000002.safetensors", "model.safetensors", "samples.png",
         "loss.png"}),
    (1, set())])
def test_the_first_rank_writes_a_run_and_the_others_not_a_file(monkeypatch, tmp_path, rank, written):
    for module in (trainer, run):
        monkeypatch.setattr(module, "ranks", lambda *_: Ranks(OfTheSame(rank)))
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)            # after every step
    monkeypatch.setattr(loop, "DRAW_EVERY", 0.0)
    run.run(tmp_path / "run", TextToImage, tiny.digits(50), TrainOptions(steps=2, batch=4), config=tiny.CONFIG,
            quiet=True)
    assert {p.name for p in tmp_path.rglob("run/**/*.*")} == written


@pytest.mark.parametrize("others, own, wanted", [(0, False, False), (0, True, True), (1, False, True), (2, True, True)])
def test_all_stop_where_any_rank_wants_to(others, own, wanted):
    """Of three ranks, `others` of the two others want to."""
    comm = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 3, allreduce=lambda mine: mine + others)
    assert Ranks(comm).agree(own) is wanted
