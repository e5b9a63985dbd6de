"""Compiles every kernel for every card that it supports, without a card, and prints its registers and memory.

    python -m tests.kernels.compile_all                      all of kernels/
    python -m tests.kernels.compile_all conv_3 norm          the files whose name contains a word
    python -m tests.kernels.compile_all --arch sm_90         for one card only
    python -m tests.kernels.compile_all --markdown

The compiler is NVRTC, which CuPy also calls, from the wheel nvidia-cuda-nvrtc; it compiles to the card's machine code.
A row of the table is a kernel and its element type:

    shared              bytes of shared memory that it declares, without those that the host requests at the launch
    sm_75 ...           registers of a thread on that card, and after a + the bytes of its local memory, if any

Local memory holds what does not fit in registers (a spill), and arrays whose indices the compiler does not know; it is
in the card's main memory.  From version 3 on, kernels must not use it; MAY_SPILL lists the exceptions and the reasons.
The exit status is 1 if a kernel does not compile or spills, and 2 without NVRTC.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

from minidiff.engine.cuda import launch as cuda

KERNELS = cuda.folder()
ARCHS = ("sm_75", "sm_80", "sm_90", "sm_100")               # Turing, Ampere, Hopper, Blackwell
ELEMENT = cuda.C_TYPES | {"tf32": "float"}
HEAD_DIMS = (16, 32, 48, 64, 80, 128, 160)                  # of attention, whose kernels are compiled for each,
FEWER = (16, 64, 160)                                       # or, but for a Hopper, for these: it is half of all work
SMALLER = 100 << 10                                         # bytes of a multiprocessor on sm_86, sm_89 and sm_120
FAST = 3                                                    # versions from this one on may not spill

# (file, type, head dim or None) -> why it may
MAY_SPILL: dict[tuple[str, str, int | None], str] = {
    ("attention_forward_3_registers", "float64", 160): "float64 is for checks of gradients, and 160 columns of it want "
                                                       "more than a thread's 255 registers",
}


@dataclass(frozen=True)
class Job:
    """One call of the compiler."""

    path: Path
    version: int
    element: str                            # as in the file's `takes` line
    arch: str
    head_dim: int | None = None
    stages: int | None = None               # of a ring in shared memory, where they are fewer than the file's most

    def __str__(self) -> str:
        of = f"{self.element}, head dim {self.head_dim}" if self.head_dim else self.element
        return f"{self.path.name} for {of}{self.fewer} on {self.arch}"

    @property
    def fewer(self) -> str:
        return f", {self.stages} stages" if self.stages else ""


@dataclass(frozen=True)
class Cost:
    """What one kernel of a file takes."""

    kernel: str
    registers: int                          # of a thread
    shared: int                             # bytes of a block, declared ones
    local: int                              # bytes of a thread: arrays and spills
    stores: int                             # bytes that its code stores because registers ran out,
    loads: int                              # and loads again


@dataclass(frozen=True)
class Result:
    job: Job
    costs: tuple[Cost, ...]                 # empty where it did not compile
    log: str                                # what the compiler said


class NoCompiler(Exception):
    """NVRTC is not installed."""


# --- what there is to compile -----------------------------------------------------------------------------

def source_of(path: Path) -> cuda.Source:
    """The facts in a file.  ValueError if launch.py cannot read its name or its first comment."""
    named = re.fullmatch(r"(\w+?)_(\d+)(_\w+)?", path.stem)
    if not named:
        raise ValueError(f"{path.name} is not named family_NUMBER_idea.cu")
    source = cuda._read(named[1], int(named[2]), path)
    if unknown := set(source.takes) - set(ELEMENT):
        raise ValueError(f"{path.name} takes {', '.join(sorted(unknown))}, which is not one of {', '.join(ELEMENT)}")
    if source.needs.removesuffix("a") not in ARCHS:
        raise ValueError(f"{path.name} needs {source.needs}, which is not one of {', '.join(ARCHS)}")
    return source


def jobs_of(path: Path, archs: Iterable[str] = ARCHS, every: bool = False) -> list[Job]:
    """The jobs of a file: its dtypes, for each card on which it runs.  every: all head dimensions on all cards."""
    source = source_of(path)
    attends = "HEAD_DIM" in source.text
    jobs = [Job(path, source.number, element, arch, head_dim) for element in source.takes
            for head_dim in (HEAD_DIMS if attends else (None,)) for arch in archs
            if source.runs_on(arch.removeprefix("sm_")) and (every or arch == "sm_90" or head_dim in (None, *FEWER))]
    # the launch takes fewer stages on smaller cards of sm_80's kind, whose code is the same
    return jobs + [replace(job, stages=source.stages(SMALLER)) for job in jobs
                   if job.arch == "sm_80" and "MOST_STAGES" in source.constants]


# --- the compiler -----------------------------------------------------------------------------------------

@cache
def nvrtc() -> ctypes.CDLL:
    try:
        files = metadata.files("nvidia-cuda-nvrtc") or []
    except metadata.PackageNotFoundError:
        raise NoCompiler("NVRTC is not installed: pip install '.[kernels]'") from None
    def find(name: str) -> Path | None:
        return next((Path(f.locate()) for f in files if re.match(name, f.name)), None)
    library = find(r"(lib)?nvrtc(\.so|64_\d+_\d+\.dll)")
    if library is None:
        raise NoCompiler("the package nvidia-cuda-nvrtc holds no NVRTC: install it again")
    # NVRTC opens its builtins by name.  CUDA 13.0's does not search its own folder, so they are loaded first.
    if (builtins := find(r"(lib)?nvrtc-builtins(\.so|64_\d+\.dll)")) is not None:
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(library))


def compile_one(job: Job) -> Result:
    """Compiles a file to a cubin, with the same text, options and macros as the engine."""
    lib, program, source = nvrtc(), ctypes.c_void_p(), source_of(job.path)
    # an `a` asks for what only this one card has: wgmma on a Hopper
    arch = source.needs if source.needs.endswith("a") else job.arch
    options = [f"--gpu-architecture={arch}", *cuda.OPTIONS, *cuda.CUPYS, f"-DELEMENT={ELEMENT[job.element]}",
               "--ptxas-options=-v"]
    if job.head_dim:
        options.append(f"-DHEAD_DIM={job.head_dim}")
    if job.stages:
        options.append(f"-DSTAGES={job.stages}")
    lib.nvrtcCreateProgram(ctypes.byref(program), source.text.encode(), job.path.name.encode(), 0, None, None)
    try:
        failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(
            *(option.encode() for option in options)))
        size = ctypes.c_size_t()
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))
    log = log.value.decode(errors="replace")
    return Result(job, () if failed else tuple(read_costs(log)), log)


def read_costs(log: str) -> list[Cost]:
    """The costs that the assembler reports for each kernel, sorted by name."""
    def of(part: str) -> Cost:
        def number(pattern: str) -> int:
            found = re.search(pattern, part)
            return int(found[1]) if found else 0
        local = max(number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes cumulative stack size"))
        return Cost(re.match(r"\w+", part)[0], number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), local,
                    number(r"(\d+) bytes spill stores"), number(r"(\d+) bytes spill loads"))
    return sorted(map(of, log.split("Compiling entry function '")[1:]), key=lambda cost: cost.kernel)


def compile_all(jobs: list[Job], workers: int = 2) -> Iterator[Result]:
    """The results in the order of the jobs, each as soon as it is complete."""
    if workers == 1 or len(jobs) == 1:
        yield from map(compile_one, jobs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(compile_one, jobs, chunksize=4)


# --- what is said of it -----------------------------------------------------------------------------------

def spills(result: Result) -> list[Cost]:
    """The kernels of a fast version that use local memory."""
    return [cost for cost in result.costs if result.job.version >= FAST and max(cost.local, cost.stores, cost.loads)]


def excuse(job: Job) -> str | None:
    return MAY_SPILL.get((job.path.stem, job.element, job.head_dim))


def table(results: list[Result]) -> list[list[str]]:
    """A table of rows of words; the first row is the titles."""
    archs = [arch for arch in ARCHS if any(r.job.arch == arch for r in results)]
    rows: dict[tuple, dict[str, Cost]] = {}
    for r in results:
        for cost in r.costs:
            key = r.job.path.stem, cost.kernel, r.job.element + r.job.fewer, r.job.head_dim
            rows.setdefault(key, {})[r.job.arch] = cost
    titles = ["file", "kernel", "type", "head dim", "shared", *archs]
    return [titles] + [
        [stem, kernel, element, str(head_dim or ""), "/".join(map(str, sorted({c.shared for c in costs.values()}))),
         *(_cell(costs.get(arch)) for arch in archs)]
        for (stem, kernel, element, head_dim), costs in rows.items()]


def _cell(cost: Cost | None) -> str:
    if cost is None:
        return "-"
    local = max(cost.local, cost.stores, cost.loads)
    return f"{cost.registers} +{local}" if local else f"{cost.registers}"


def as_text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{word:{'<' if i < 3 else '>'}{width}}"
                               for i, (word, width) in enumerate(zip(row, widths, strict=True))) for row in rows)


def as_markdown(rows: list[list[str]]) -> str:
    ruler = ["---" if i < 3 else "---:" for i in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ruler, *rows[1:]])


def main(argv: list[str] | None = None) -> int:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.kernels.compile_all", description=__doc__, formatter_class=as_is)
    parser.add_argument("names", nargs="*", help="words: the files whose name holds one (all)")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS, help="cards (all)")
    parser.add_argument("--every-head-dim", action="store_true", help="compile attention for all of them on all cards")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    args = parser.parse_args(argv)

    began = time.monotonic()
    paths = sorted(p for p in KERNELS.glob("*.cu") if not args.names or any(name in p.name for name in args.names))
    if not paths:
        print(f"kernels/ has no file named like {', '.join(args.names) or '*.cu'}", file=sys.stderr)
        return 2
    results, failed, excused, unexcused = [], 0, 0, 0
    try:
        nvrtc()                                             # is it there?
        jobs = [job for path in paths for job in jobs_of(path, args.arch, args.every_head_dim)]
        for result in compile_all(jobs, args.workers):
            results.append(result)
            if not result.costs:
                failed += 1
                print(f"{result.job}: does not compile\n{result.log.strip()}\n", flush=True)
            for cost in spills(result):
                why = excuse(result.job)
                excused, unexcused = excused + bool(why), unexcused + (not why)
                print(f"{result.job}: {cost.kernel} has {cost.local} bytes of local memory ({cost.stores} stored and "
                      f"{cost.loads} loaded for want of registers){f'; it may: {why}' if why else ''}", flush=True)
    except (NoCompiler, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print((as_markdown if args.markdown else as_text)(table(results)))
    print(f"\n{len(results)} compilations of {len(paths)} files in {time.monotonic() - began:.0f} s: {failed} failed, "
          f"{unexcused} kernels of fast versions spill, {excused} more may")
    return 1 if failed or unexcused else 0


if __name__ == "__main__":
    sys.exit(main())
