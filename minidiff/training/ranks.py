"""One training run on several processes, called ranks: each learns from its shard of the batch, and all step alike.

    rank r of R     has the samples  B r/R ... B (r+1)/R - 1  of the batch, a share s_r of its B
    g = sum_r s_r g_r,   L = sum_r s_r L_r                  g_r, L_r: means over rank r's samples

The sums are one Allreduce over one buffer, [g_1 ... g_P, L, how many ranks want to stop].  Every rank draws the same
batch and makes the same step with the same sum.  Nothing else is exchanged: the weights of all ranks are the same bits,
and equal those of one process with the whole batch up to rounding.

mpiexec starts the ranks, and mpi4py computes the sums; without mpiexec it is never imported.  Only the main thread
calls MPI (MPI_THREAD_FUNNELED); the threads of parallel.py have finished by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from minidiff.engine import parallel
from minidiff.engine.backend import xp_of
from minidiff.errors import UserError

# the variables by which an mpiexec tells a process its number, and how many there are
_PLACES = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))


def rank_and_size() -> tuple[int, int]:
    """(rank, number of ranks) as mpiexec set them for this process; (0, 1) without mpiexec."""
    for rank, size in _PLACES:
        if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


class SingleProcess:
    """A run of one process: the whole batch is its shard, and the means are its own."""

    rank, size = 0, 1

    def shard(self, count: int) -> slice:
        """The samples of a batch of `count` that this rank learns from; UserError if a rank would have none."""
        return slice(0, count)

    def mean(self, loss, grads: Sequence, share: float, stop: bool) -> tuple[Any, Sequence, bool]:
        """(loss, gradients, whether any rank wants to stop) of the whole batch, from those of each rank's shard.

        loss: a number, or on a GPU an array of shape ().  share: this rank's share of the batch.  The next call may
        overwrite the gradients that this one returns.
        """
        return loss, grads, stop

    def check_alike(self, fingerprint: Callable[[], str]) -> None:
        """UserError unless fingerprint() is the same on all ranks."""

    def in_turn(self, load: Callable) -> Any:
        """load(), on rank 0 first and then on the others, which find on the disk what rank 0 has put there."""
        return load()

    def by_first(self, act: Callable[[], object]) -> None:
        """act() on the first rank; UserError on all ranks if it raises one.  As with every method that waits for the
        others, all ranks must call it, whatever each of them finds on the disk."""
        act()

    def wait(self) -> None:
        """Waits until all ranks have come here."""

    def agree(self, stop: bool) -> bool:
        """Whether any rank wants to stop; waits until all have come here."""
        return stop

    def command(self) -> list[str]:
        """The words in front of a command that start it on as many ranks."""
        return []


class Ranks:
    """The ranks that mpiexec started, of which this process is one.  SingleProcess documents the methods."""

    def __init__(self, comm, here: int = 0):
        """comm: mpi4py's communicator.  here: this rank's number among the ranks of its machine."""
        self.comm, self.here = comm, here
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._buffer = None

    def shard(self, count: int) -> slice:
        if count < self.size:
            raise UserError(f"a batch of {count} cannot be divided among {self.size} ranks: start {count} of them at "
                            "most, or choose a larger batch")
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def mean(self, loss, grads: Sequence, share: float, stop: bool) -> tuple[Any, Sequence, bool]:
        flat, at = self._flat(grads), 0
        for g in grads:
            flat[at:at + g.size] = g.reshape(-1)
            at += g.size
        flat[-2] = loss
        with np.errstate(over="ignore", invalid="ignore"):  # whoever clips checks whether gradients are finite
            flat *= share
        flat[-1] = stop
        self._sum(flat)
        means, at = [], 0
        for g in grads:
            means.append(flat[at:at + g.size].reshape(g.shape))
            at += g.size
        return self._loss(flat[-2, ...]), means, self._stops(flat[-1], stop)

    def _flat(self, grads: Sequence):
        """The buffer of the exchange: all gradients, the loss, and a count of the ranks that want to stop."""
        count, dtype = sum(g.size for g in grads) + 2, np.result_type(*{g.dtype for g in grads})
        if self._buffer is None or (self._buffer.size, self._buffer.dtype) != (count, dtype):
            self._buffer = xp_of(*grads).empty(count, dtype)
        return self._buffer

    def _sum(self, flat) -> None:
        from mpi4py import MPI
        self.comm.Allreduce(MPI.IN_PLACE, flat)

    def _loss(self, total):
        return float(total)

    def _stops(self, total, stop: bool) -> bool:
        return bool(total > 0)

    def check_alike(self, fingerprint: Callable[[], str]) -> None:
        if len(set(self.comm.allgather(fingerprint()))) > 1:
            raise UserError("the ranks do not start alike: every machine must see the same --out and the same --data, "
                            "and have the same version of minidiff")

    def in_turn(self, load: Callable) -> Any:
        mine = 0 if self.rank == 0 else 1 if self.here == 0 else 2        # a machine's first may have its own disk
        result = error = None
        for turn in range(3):
            if turn == mine:
                try:
                    result = load()
                except Exception as e:                      # the others fail in their turn, in the same way
                    error = e
            self.wait()
        if error:
            raise error
        return result

    def by_first(self, act: Callable[[], object]) -> None:
        said = None
        if self.rank == 0:
            try:
                act()
            except UserError as error:
                said = str(error)
        said = self.comm.bcast(said)
        if said:
            raise UserError(said)

    def wait(self) -> None:
        self.comm.Barrier()

    def agree(self, stop: bool) -> bool:
        return self.comm.allreduce(int(stop)) > 0

    def command(self) -> list[str]:
        return ["mpiexec", "-n", str(self.size)]


class RanksOnGPUs(Ranks):
    """Ranks with a GPU each: the buffer lies on the GPU, and NCCL sums it, in the order of the stream.

    Nothing waits for the GPU: the hosts exchange by MPI which ranks want to stop.

    This has not run on GPUs yet: the tests check what the host does, with a stand-in for
    `cupyx.distributed.NCCLBackend`.
    """

    def __init__(self, comm, here: int, backend):
        """backend: cupyx.distributed's NCCLBackend, or an object with its all_reduce(in, out)."""
        super().__init__(comm, here)
        self.backend = backend

    def _sum(self, flat) -> None:
        self.backend.all_reduce(flat, flat)

    def _loss(self, total):
        return total.copy()                                 # it is read later, when the buffer holds another step's

    def _stops(self, total, stop: bool) -> bool:
        return self.agree(stop)


def ranks(device: str = "cpu") -> SingleProcess | Ranks:
    """The ranks of this run, which exchange arrays of this device.

    The first call joins MPI if mpiexec started more than one process, and divides each machine's cores among its ranks.
    With "cuda" the first call also gives each rank a GPU.  UserError if mpi4py is missing, or does not see the ranks
    that mpiexec started.
    """
    if rank_and_size()[1] == 1:
        return SingleProcess()
    return _on_cpus() if device == "cpu" else _on_gpus()


@cache
def _on_cpus() -> Ranks:
    size = rank_and_size()[1]
    try:
        import mpi4py
        mpi4py.rc(thread_level="funneled")
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:            # RuntimeError: it finds no MPI to load
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({' '.join(str(error).split())})"
        raise UserError(f"mpiexec started {size} ranks, and they need mpi4py to exchange gradients{reason}: "
                        "pip install mpi4py mpich") from error
    comm = MPI.COMM_WORLD
    if comm.Get_size() != size:
        raise UserError(f"mpiexec started {size} ranks, and mpi4py sees {comm.Get_size()} of them: start them with the "
                        "mpiexec of the MPI that mpi4py loads; pip install mpi4py mpich brings one with the other")
    machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
    parallel.divide_cores(machine.allgather(sorted(parallel.allowed_cores())))
    here = machine.Get_rank()
    machine.Free()
    return Ranks(comm, here)


def check_one_kind(capabilities: Sequence[str]) -> None:
    """UserError unless the ranks' GPUs are of one kind: others round differently, and the ranks' weights would part."""
    if len(set(capabilities)) > 1:
        kinds = ", ".join(f"sm_{kind}" for kind in capabilities)
        raise UserError(f"the ranks must have GPUs of one kind, and theirs are {kinds}: choose equal ones with "
                        "CUDA_VISIBLE_DEVICES")


@cache
def _on_gpus() -> RanksOnGPUs:
    import cupy
    from cupyx.distributed import NCCLBackend
    hosts, count = _on_cpus(), cupy.cuda.runtime.getDeviceCount()
    if hosts.here >= count:
        raise UserError(f"mpiexec started more ranks on this machine than the {count} GPUs that it has: give it -n "
                        f"{count} for each such machine")
    cupy.cuda.Device(hosts.here).use()
    check_one_kind(hosts.comm.allgather(cupy.cuda.Device().compute_capability))
    return RanksOnGPUs(hosts.comm, hosts.here, NCCLBackend(hosts.size, hosts.rank, use_mpi=True))
