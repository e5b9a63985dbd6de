"""Training on more cores and processes: the time of a step and of its phases, and a model of more ranks.

    python benchmarks/scaling.py                         the default model, batch 128
    python benchmarks/scaling.py --batch 64 --steps 20 --rounds 5
    python benchmarks/scaling.py --bandwidth 1.2 --latency 20        the model for a network of 1.2 GB/s and 20 us

One process on one core, one process with threads on two cores, and two ranks (mpiexec) with one core each train the
same model on the same data. Strong scaling divides one batch among the cores; weak scaling gives each core a whole
batch. Each run is a separate process; the configurations take turns, and the table shows the median over all steps of
each.

Then follows a model of n ranks with one core each, with the numbers measured in the same run:

    T(n) = compute/n + exchange(n) + serial
    exchange(n) = 2 (n-1)/n bytes/bandwidth + 2 (n-1) latency       a ring's

compute: the gradient of the whole batch on one core. serial: the work that every rank does in full, for any n: drawing
the batch, clipping, AdamW, the average, and packing the buffer. bandwidth and latency: of an Allreduce between two
ranks on this machine, which share memory; --bandwidth and --latency replace them by a network's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from side_by_side import positive

from minidiff.data import mnist
from minidiff.data.digits import Digits
from minidiff.engine.backend import keep_freed_memory
from minidiff.engine.parallel import allowed_cores
from minidiff.errors import UserError, run_main
from minidiff.systems.text_to_image import TextToImage
from minidiff.training import trainer as trainers
from minidiff.training.ranks import ranks
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import Trainer

WARM = 3                                                    # first steps, which are not timed
PHASES = ("data", "gradient", "waiting", "packing", "sum", "update")
MODELLED = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Case:
    """A configuration: `ranks` processes on `cores` cores in total, with batches of `batch` samples."""

    ranks: int
    cores: int
    batch: int

    def __str__(self) -> str:
        who = "1 process" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{who} x {self.cores // self.ranks} core{'s' if self.cores > self.ranks else ''}"


# --- one run: a separate process ---------------------------------------------------------------------

class Clock:
    """The seconds spent in each phase since `lap` was last called."""

    def __init__(self):
        self.spent = dict.fromkeys(PHASES, 0.0)

    def timed(self, phase: str, f, inside: str | None = None):
        """f, with its time added to the phase; the time of the phase `inside`, which runs within f, is not added."""
        def call(*args):
            began, within = time.perf_counter(), self.spent.get(inside, 0.0)
            result = f(*args)
            self.spent[phase] += time.perf_counter() - began - (self.spent.get(inside, 0.0) - within)
            return result
        return call

    def lap(self, whole: float) -> dict[str, float]:
        spent, self.spent = self.spent, dict.fromkeys(PHASES, 0.0)
        return spent | {"update": whole - sum(spent.values()), "whole": whole}


def work(batch: int, steps: int, out: Path) -> None:
    """Trains; rank 0 writes the times of each step, the size of the exchange, and the time of an Allreduce."""
    keep_freed_memory()
    own, clock = ranks(), Clock()
    data = Digits.of(mnist.packed())
    stage = next(TextToImage.new(data).stages(data))
    trainer = Trainer(stage, TrainOptions(steps=10_000, batch=batch).for_stage(stage))
    trainer.batch = clock.timed("data", trainer.batch)
    trainers.parallel_gradients = clock.timed("gradient", trainers.parallel_gradients)
    if own.size > 1:
        mean, own._sum = own.mean, clock.timed("sum", own._sum)
        wait = clock.timed("waiting", own.wait)             # for the slower rank: no part of the exchange

        def waited(*args):
            wait()
            return exchange(*args)
        exchange, own.mean = clock.timed("packing", mean, inside="sum"), waited
    laps = []
    for _ in range(WARM + steps):
        began = time.perf_counter()
        trainer.step()
        laps.append(clock.lap(time.perf_counter() - began))
    said = {"laps": laps[WARM:], "bytes": 4 * (2 + sum(p.size for p in trainer.parameters.values()))}
    if own.size > 1:
        said["small"], said["large"] = (allreduce(own, count) for count in (1, said["bytes"] // 4))
    if own.rank == 0:
        out.write_text(json.dumps(said))


def allreduce(own, count: int, times: int = 50) -> float:
    """The median seconds of a sum of `count` floats."""
    from mpi4py import MPI
    flat, taken = np.zeros(count, np.float32), []
    for _ in range(times):
        own.wait()
        began = time.perf_counter()
        own.comm.Allreduce(MPI.IN_PLACE, flat)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[times // 5:])


# --- all runs ---------------------------------------------------------------------------------------------

def run(case: Case, steps: int) -> dict:
    """What `work` measured of this case, on the first of the allowed cores."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if case.ranks > 1 and not mpiexec:
        raise UserError("two ranks need an mpiexec: pip install mpi4py mpich")
    chosen = sorted(allowed_cores())[:case.cores]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "laps.json"
        command = [sys.executable, __file__, "--work", str(out), "--batch", str(case.batch), "--steps", str(steps)]
        if case.ranks > 1:
            command = [mpiexec, "-n", str(case.ranks), *command]
        done = subprocess.run(command, capture_output=True, text=True,
                              preexec_fn=lambda: os.sched_setaffinity(0, chosen))
        if done.returncode:
            raise UserError(f"{case}, batch {case.batch}, failed: {done.stderr.strip()[-500:]}")
        return json.loads(out.read_text())


def measured(cases: list[Case], steps: int, rounds: int) -> dict[Case, dict[str, float]]:
    """The median seconds of each case's phases, and the other numbers that `work` writes."""
    runs: dict[Case, list[dict]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            print(f"round {number + 1} of {rounds}: {case}, batch {case.batch}", file=sys.stderr)
            runs[case].append(run(case, steps))
    found = {}
    for case, tellings in runs.items():
        laps = [lap for one in tellings for lap in one["laps"]]
        found[case] = {name: statistics.median(lap[name] for lap in laps) for name in (*PHASES, "whole")}
        found[case] |= {name: statistics.median(one[name] for one in tellings) for name in ("bytes", "small", "large")
                        if name in tellings[0]}
    return found


def print_measured(found: dict[Case, dict[str, float]], titles: dict[str, tuple[Case, ...]]) -> None:
    print("| | batch | ms a step | images/s | speed-up | data | gradient | waiting | packing | sum | clipping, AdamW, "
          "average | MB summed |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for title, cases in titles.items():
        first = cases[0].batch / found[cases[0]]["whole"]   # images a second of one core
        for case in cases:
            t = found[case]
            rate = case.batch / t["whole"]
            phases = " | ".join(f"{1e3 * t[name]:.1f}" for name in PHASES)
            exchanged = f"{t['bytes'] / 1e6:.1f}" if case.ranks > 1 else "0"
            print(f"| {title}: {case} | {case.batch} | {1e3 * t['whole']:.1f} | {rate:.0f} | {rate / first:.2f} | "
                  f"{phases} | {exchanged} |")


@dataclass(frozen=True)
class Model:
    """T(n) of ranks with one core each: seconds, bytes, and bytes a second."""

    compute: float                                          # the gradient of the whole batch on one core
    serial: float                                           # the work that every rank does in full
    packing: float                                          # added where there is more than one rank
    nbytes: int
    bandwidth: float
    latency: float

    def exchange(self, n: int) -> float:
        # 2 (n-1)/n bytes/bandwidth + 2 (n-1) latency
        return 2 * (n - 1) / n * self.nbytes / self.bandwidth + 2 * (n - 1) * self.latency

    def alike(self, n: int) -> float:
        return self.serial + (self.packing if n > 1 else 0.0)

    def __call__(self, n: int) -> float:
        # T(n) = compute/n + exchange(n) + serial
        return self.compute / n + self.exchange(n) + self.alike(n)


def print_model(T: Model, batch: int, clock: float) -> None:
    """clock: the measured seconds of a step of two ranks."""
    print(f"\nT(n) for n ranks with one core each, batch {batch}: {T.nbytes / 1e6:.1f} MB to sum at "
          f"{T.bandwidth / 1e9:.2f} GB/s and {1e6 * T.latency:.1f} us. Of two ranks the model says "
          f"{1e3 * T(2):.1f} ms, and the clock {1e3 * clock:.1f} ms.\n\n"
          "| ranks | compute/n, ms | exchange, ms | serial, ms | T(n), ms | images/s | speed-up | of n |\n"
          "|--:|--:|--:|--:|--:|--:|--:|--:|")
    for n in MODELLED:
        if n <= batch:
            faster = T(1) / T(n)
            print(f"| {n} | {1e3 * T.compute / n:.1f} | {1e3 * T.exchange(n):.2f} | {1e3 * T.alike(n):.1f} | "
                  f"{1e3 * T(n):.1f} | {batch / T(n):.0f} | {faster:.2f} | {faster / n:.0%} |")


def positive_real(text: str) -> float:
    try:
        if 0 < float(text) < float("inf"):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")


def main(batch: int, steps: int, rounds: int, bandwidth: float | None, latency: float | None) -> None:
    if len(allowed_cores()) < 2:
        raise UserError("benchmarks/scaling.py needs two cores; this process may use one")
    if batch < 16:
        raise UserError(f"--batch must be at least 16, not {batch}: an eighth of it is measured, too")
    one, threads, two = Case(1, 1, batch), Case(1, 2, batch), Case(2, 2, batch)
    titles = {"strong": (one, threads, two),
              "weak": (one, Case(1, 2, 2 * batch), Case(2, 2, 2 * batch)),
              "small part": (one, Case(1, 1, batch // 8))}
    found = measured(list(dict.fromkeys(case for cases in titles.values() for case in cases)), steps, rounds)
    print_measured(found, titles)
    alone, both = found[one], found[two]
    # for two ranks: small = 2 latency, large = bytes/bandwidth + 2 latency
    here = both["bytes"] / max(both["large"] - both["small"], 1e-9), both["small"] / 2
    print_model(Model(alone["gradient"], alone["data"] + alone["update"], both["packing"], both["bytes"],
                      here[0] if bandwidth is None else 1e9 * bandwidth,
                      here[1] if latency is None else 1e-6 * latency),
                batch, both["whole"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, default=128, help="images in a step of strong scaling")
    parser.add_argument("--steps", type=positive, default=15, help="steps that are timed in each run")
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each configuration, in turn")
    parser.add_argument("--bandwidth", type=positive_real, help="GB/s for the model, instead of the measured one")
    parser.add_argument("--latency", type=positive_real, help="microseconds for the model, instead of the measured one")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.batch, args.steps, args.work)
    else:
        run_main(main, batch=args.batch, steps=args.steps, rounds=args.rounds, bandwidth=args.bandwidth,
             latency=args.latency)
