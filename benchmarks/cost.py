"""How the UNet's cost grows: milliseconds, bytes and operations over pixels, channels, batch, tokens and cores.

    python benchmarks/cost.py                           prints a table for each axis, in a few minutes
    python benchmarks/cost.py --write docs/cost.md      and writes them into that page, with a picture beside it
    python benchmarks/cost.py --picture cost.png        and draws the picture
    python benchmarks/cost.py --quick                   tiny sizes, in seconds: whether it works

One number changes at a time, from the text-to-image system's default network and a batch of 8.  Two works are measured:

    evaluation      the UNet's output for a batch
    training step   output, mean squared error, gradients, clipping, AdamW and the average of the weights

Time is the median over several rounds, in which the sizes of an axis take turns; the first call of each turn is not
timed.  Memory is the most that the arrays made during one call take at the same time (tracemalloc).  So it includes
neither the weights and what the optimiser keeps for them, nor the interpreter and its libraries.  Operations are
counted while the network runs (operations.py).  Each number of cores is measured in processes of its own, since BLAS
reads it only when it starts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from cost_tables import ALT, EVALUATION, STEP, WORKS, Cost, Line, cost_table, draw, kind_table
from operations import by_kind, counting
from side_by_side import minidiff_update, positive, ragged_mask, take_turns, versions
from tables import write_table
from tqdm import tqdm

from minidiff import pictures
from minidiff.engine import ops
from minidiff.engine.backend import keep_freed_memory
from minidiff.engine.parallel import SHARD, cores, map_batch, parallel_gradients
from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError, run_main
from minidiff.nn.unet import TextStates, UNet
from minidiff.systems.text_to_image import TextToImageConfig

TABLE = "cost"                                              # its place on a page: <!-- table: cost -->
MOST_CALLS, MOST_CORES = 20, 8                              # of a turn; that are measured


@dataclass(frozen=True)
class Size:
    """The work of a call: a UNet of widths (width, 2 width), and a batch of images of side x side pixels."""

    side: int = 28
    width: int = 64
    batch: int = 8
    tokens: int = 16                                        # of each caption
    cores: int = 0                                          # 0: all that this process may use

    def network(self) -> UNet:
        config = replace(TextToImageConfig().network, widths=(self.width, 2 * self.width))
        return UNet(config, np.random.default_rng(0))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """(x_t, t, tokens, pooled, mask) of a batch."""
        rng, B, config = np.random.default_rng(1), self.batch, TextToImageConfig()

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal((B, *shape), dtype=np.float32)
        return (normal(self.side, self.side, config.unet.channels), rng.integers(0, config.T, B),
                normal(self.tokens, config.unet.text), normal(config.unet.text), ragged_mask(B, self.tokens))


BASE, QUICK = Size(), Size(side=8, width=16, batch=2, tokens=4)
# title -> the field of Size that grows, its values, and those of --quick
AXES = {"pixels": ("side", (16, 32, 64, 128), (4, 8)),
        "channels": ("width", (32, 64, 128, 256), (8, 16)),
        "batch": ("batch", (1, 2, 8, 32, 128, 256), (1, 2)),
        "tokens": ("tokens", (16, 64, 256, 1024, 4096), (4, 16))}


# --- the works --------------------------------------------------------------------------------------------

def evaluation(unet: UNet, size: Size) -> Callable[[], object]:
    """In shards on all cores, without a record for the backward pass.

    It includes the keys and values of the text's tokens, which a sampler computes once for all its steps.
    """
    def network(x_t, t, tokens, pooled, mask):
        return unet(Tensor(x_t), t, TextStates(Tensor(tokens), Tensor(pooled), mask))
    arrays = size.arrays()
    return lambda: map_batch(network, *arrays)


def training_step(unet: UNet, size: Size) -> Callable[[], None]:
    parameters, arrays = unet.parameters(), size.arrays()
    leaves, update, shape = list(parameters.values()), minidiff_update(parameters), arrays[0].shape[:3]
    target = np.random.default_rng(2).standard_normal((*shape, unet.config.out), dtype=np.float32)

    def loss(part: slice) -> Tensor:
        x_t, t, tokens, pooled, mask = (a[part] for a in arrays)
        # a text encoder would get the gradients of its states
        text = TextStates(Tensor(tokens, requires_grad=True), Tensor(pooled, requires_grad=True), mask)
        error = unet(Tensor(x_t), t, text) - Tensor(target[part])
        # L = mean (y - target)^2
        return ops.mean(error * error)

    def step() -> None:
        update(parallel_gradients(loss, leaves, size.batch)[1])
    return step


# --- measuring --------------------------------------------------------------------------------------------

class Run:
    """One work of one size."""

    def __init__(self, size: Size, work: str):
        unet = size.network()
        self.call = {EVALUATION: evaluation, STEP: training_step}[work](unet, size)
        with counting(unet) as products:
            self.call()
        self.operations, self.mb = dict(by_kind(products)), peak_bytes(self.call) / 1e6
        self.seconds: list[float] = []

    def turn(self, least: int, seconds: float) -> None:
        """At least so many timed calls, and more of short ones, until about so many seconds have passed."""
        began = time.perf_counter()
        self.call()
        calls = max(least, int(seconds / (time.perf_counter() - began)))
        self.seconds += take_turns({"": self.call}, 1, min(calls, MOST_CALLS))[""]


def peak_bytes(call: Callable) -> int:
    """The most bytes that the arrays and objects made during the call take at the same time."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@dataclass(frozen=True)
class Plan:
    """How often each size is measured."""

    rounds: int
    least: int                              # timed calls of a turn
    seconds: float                          # of a turn, where the calls are short


def measure(sizes: Sequence[Size], plan: Plan, tick: Callable[[], object]) -> list[Cost]:
    """tick: called after each turn of a size, 1 + plan.rounds times for each."""
    runs = []
    for size in sizes:
        runs.append({work: Run(size, work) for work in WORKS})
        tick()
    for _ in range(plan.rounds):
        for works in runs:
            for run in works.values():
                run.turn(plan.least, plan.seconds)
            tick()
    return [Cost({work: 1e3 * statistics.median(run.seconds) for work, run in works.items()},
                 {work: run.mb for work, run in works.items()},
                 {work: run.operations for work, run in works.items()}) for works in runs]


def measure_cores(sizes: Sequence[Size], plan: Plan, tick: Callable[[], object]) -> list[Cost]:
    """The same, each round of each size in a process of its own that uses size.cores cores.

    The operations are those of one core.
    """
    found: list[list[Cost]] = [[] for _ in sizes]
    for _ in range(plan.rounds):
        for costs, size in zip(found, sizes, strict=True):
            done = subprocess.run(
                [sys.executable, __file__, "--alone", json.dumps([asdict(size), asdict(replace(plan, rounds=1))])],
                env=os.environ | {"OMP_NUM_THREADS": str(size.cores)}, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"the process with {size.cores} cores failed: {done.stderr.strip()[-500:]}")
            costs.append(Cost(**json.loads(done.stdout)))
            tick()
    return [Cost({work: statistics.median(cost.ms[work] for cost in costs) for work in WORKS}, costs[0].mb,
                 {work: {kind: n / size.cores for kind, n in costs[0].operations[work].items()} for work in WORKS})
            for costs, size in zip(found, sizes, strict=True)]


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ..., and `most` itself."""
    return sorted({most, *(2**i for i in range(most.bit_length()))})


def measure_all(base: Size, plan: Plan) -> list[Line]:
    quick, lines = base is QUICK, []
    along = {title: [replace(base, **{field: n}) for n in (few if quick else values)]
             for title, (field, values, few) in AXES.items()}
    many = powers_of_two(min(cores(), MOST_CORES))
    # a core takes whole shards of a batch: one for each
    batch = max(2, many[-1]) * (2 if quick else SHARD)
    of_cores = [replace(base, batch=batch, cores=n) for n in many]
    turns = (1 + plan.rounds) * sum(map(len, along.values())) + plan.rounds * len(many)
    with tqdm(total=turns, unit="turn") as bar:
        for title, sizes in along.items():
            bar.set_description(title)
            lines.append(line_of(title, AXES[title][0], sizes, measure(sizes, plan, bar.update)))
        bar.set_description("cores")
        title = f"cores, for a batch of {batch} (GFLOP of one core)"
        return [*lines, line_of(title, "cores", of_cores, measure_cores(of_cores, plan, bar.update))]


def line_of(title: str, field: str, sizes: Sequence[Size], costs: Sequence[Cost]) -> Line:
    values = [getattr(size, field) for size in sizes]
    if field == "side":
        return Line(title, [f"{n} x {n}" for n in values], [n * n for n in values], costs)
    return Line(title, [f"{n}, {2 * n}" if field == "width" else f"{n}" for n in values], values, costs)


# --- the report -------------------------------------------------------------------------------------------

def report(lines: Sequence[Line], base: Size, command: str, picture: str | None = None) -> str:
    """All tables, in Markdown.  picture: its path from the page."""
    with counting(unet := base.network()) as products:
        evaluation(unet, base)()
    said = (f"On {machine()}, {versions()}, {datetime.date.today()}: `{command}`\n\nUnless a table says otherwise: "
            f"{base.side} x {base.side} pixels, {base.width} and {2 * base.width} channels, a batch of {base.batch}, "
            f"{base.tokens} tokens, all cores.")
    shown = [f"![{ALT}]({picture})"] if picture else []
    return "\n\n".join([said, *shown, kind_table(lines[:-1], by_kind(products)), *map(cost_table, lines)])


def machine() -> str:
    """The number of cores and the processor's name."""
    name = platform.processor() or platform.machine()
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":")[1].strip() for line in said if line.startswith("model name"))
    except (OSError, StopIteration):                        # not Linux, or not a PC
        pass
    return f"{cores()} core{'s' * (cores() > 1)} of {name}"


def check_page(page: Path) -> None:
    """UserError, before anything is measured, unless the page has a place for the tables."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--write: {page} cannot be read: {error}") from None
    for line in (f"<!-- table: {TABLE} -->", "<!-- end -->"):
        if line not in text[text.find("<!-- table: "):]:
            raise UserError(f"--write: {page} must have the lines <!-- table: {TABLE} --> and <!-- end -->, and lacks "
                            f"{line}")


def main(quick: bool = False, rounds: int = 3, write: Path | None = None, picture: Path | None = None) -> None:
    keep_freed_memory()
    base, plan = (QUICK, Plan(1, 1, 0.0)) if quick else (BASE, Plan(rounds, 2, 0.2))
    command = " ".join(["python benchmarks/cost.py", *(["--quick"] if quick else [f"--rounds {rounds}"]),
                        *([f"--write {write}"] if write else [])])
    if write:
        check_page(write)
        picture = picture or write.with_suffix(".png")
    if picture:
        pictures.check_writable(picture)
    lines = measure_all(base, plan)
    if picture:
        draw(lines, picture)
    text = report(lines, base, command, Path(os.path.relpath(picture, write.parent)).as_posix() if write else None)
    print(text)
    if write:
        write_table(write, TABLE, text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round: numbers that mean nothing")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each size (3)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables into this page, draw beside it")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the picture here")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    if job := args.pop("alone"):                            # a process of measure_cores
        keep_freed_memory()
        size, plan = json.loads(job)
        print(json.dumps(asdict(measure([Size(**size)], Plan(**plan), lambda: None)[0])))
    else:
        run_main(main, **args)
