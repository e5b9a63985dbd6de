"""All versions of every kernel beside their rivals and the GPU's ceilings, in one run.

    python benchmarks/kernels.py                                         everything
    python benchmarks/kernels.py --only conv --seconds 60 --json conv.json
    python benchmarks/kernels.py --plan                                  what is measured; needs no GPU
    python benchmarks/kernels.py --tables *.json                         writes the tables into their pages

First each result is checked: its relative error |y - y64| / |y64| at the shape that is timed, against a float64
calculation that shares no code with the kernels, in memory that was filled with NaN. A wrong result, ours or a rival's,
gets no time. Then the time: the median of CUDA events between calls that wait in the GPU's queue, so that it excludes
the host's time, over copies of the inputs that together are larger than the GPU's cache.

    speed       conv, attention     TFLOP/s of the plain sums: attention's forward counts 2 products, its backward 5
                the norms           GB/s, each array once
    ceiling     the speed of cuBLAS in that precision, or of a copy, on the same GPU in the same run
    rivals      through PyTorch: cuDNN's convolutions, each backend of scaled_dot_product_attention, its two norms

In mode tf32 the arrays are float32, and the tensor cores read 19 bits of each number; rivals may do the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path

from cases import MODES, Case, cases, copies, versions_for
from clock import Card, ceilings, take_time
from tables import is_ours, machine_line, write_tables

from minidiff.engine.backend import check_device
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.parallel import cores
from minidiff.errors import UserError

TOP = Path(__file__).resolve().parent.parent
PAGES = TOP / "kernels" / "README.md", TOP / "docs" / "gpu.md"
TOLERANCE = {"float32": 3e-5, "tf32": 3e-3, "float16": 4e-3, "bfloat16": 3e-2}
LENIENT = 3                                                 # a rival may keep its sums or weights in half precision


class Lost(Exception):
    """The GPU accepts no more work: a kernel left it in an error state that only a new process ends."""


# --- one case ---------------------------------------------------------------------------------------------

def measure(case: Case, mode: str, card: Card, ceiling: dict[str, float], torch) -> list[dict]:
    """A row for each version and each rival: its error, time and speed, or a note with the reason why there is none."""
    inputs = case.inputs(mode)
    expected = case.expected(*inputs)
    sets = copies(inputs, card.cache_bytes)
    rows = []
    for who in (*(f"v{n}" for n in versions_for(case, mode, cuda._capability())), *case.rivals):
        row = {"family": case.family, "op": case.op, "shape": case.shape, "of": case.of, "mode": mode, "who": who,
               "unit": case.unit, "ms": None}
        rows.append(row)
        if not is_ours(who) and torch is None:
            row["note"] = "no torch"
            continue
        calls = []
        try:
            if torch:                                       # allowed TF32 where ours uses it
                torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
            calls += [case.ours(int(who[1:]), *arrays) if is_ours(who) else case.theirs(who, *arrays)
                      for arrays in sets]
            row["error"] = relative_error(result_of(case, who, calls[0], expected, card), expected)
            if not row["error"] <= TOLERANCE[mode] * (1 if is_ours(who) else LENIENT):
                row["note"] = f"wrong: error {row['error']:.1e}"
                continue
            taken = take_time(calls, card)
        except Exception as error:  # noqa: BLE001  (backends fail in many ways; the others continue)
            row["note"] = sentence_of(error)
            try:
                card.synchronize()
            except Exception:
                raise Lost(f"{case.family} {case.op}, {case.shape}, {mode}, {who}: {row['note']}") from error
            continue
        finally:
            calls.clear()                                   # frees their memory before the next contestant's is made
        counts = case.unit == "TFLOP/s"
        speed = case.work / taken.ms / 1e9 if counts else case.work * inputs[0].itemsize / taken.ms / 1e6
        row |= {"ms": taken.ms, "host_us": taken.host_us, "waits": taken.waits, "speed": speed,
                "share": speed / ceiling[mode if counts else "copy"]}
    return rows


def result_of(case: Case, who: str, call: Callable, expected: tuple, card: Card) -> tuple:
    """The result of a call, as CuPy arrays in our layout."""
    card.poison(2 * sum(a.nbytes for a in expected))
    found = call()
    if not is_ours(who):
        import cupy
        found = tuple(cupy.from_dlpack(a.detach().double().contiguous()) for a in case.in_our_layout(found))
    found = found if isinstance(found, tuple) else (found,)
    return tuple(map(case.seen, found)) if hasattr(case, "seen") else found


def relative_error(found: tuple, expected: tuple) -> float:
    """|y - y64| / |y64|, the largest of several outputs; inf where a shape is wrong or a number is NaN."""
    if [y.shape for y in found] != [y.shape for y in expected]:
        return math.inf
    errors = []
    for y, y64 in zip(found, expected, strict=True):
        difference = y.astype("float64") - y64
        errors.append(math.sqrt(float((difference * difference).sum()) / float((y64 * y64).sum())))
    return max(error if math.isfinite(error) else math.inf for error in errors)


def sentence_of(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


# --- compiling --------------------------------------------------------------------------------------------

SMALL = {"conv": {"B": 1, "H": 4, "C": 4, "D": 4}, "attention": {"B": 1, "h": 1, "N": 4, "M": 4},
         "group_norm": {"B": 1, "N": 4, "C": 8, "groups": 2}, "layer_norm": {"M": 4, "C": 8}}


def compile_ahead(wanted: list[Case], modes: Sequence[str], capability: str) -> None:
    """Compiles every kernel that will run, on all cores, into CuPy's cache on disk."""
    jobs = {}
    for case in wanted:
        for mode in (mode for mode in modes if mode in case.modes):
            for version in versions_for(case, mode, capability):
                # attention's backward compiles the forward version that it starts from
                jobs.setdefault((case.kernels, case.compiled_for, mode, version), (case, mode, version))
    if jobs:
        with ProcessPoolExecutor(min(cores(), 12, len(jobs)), get_context("spawn")) as pool:
            list(pool.map(compile_one, jobs.values()))


def compile_one(job: tuple[Case, str, int]) -> None:
    """Runs a version once, on very small arrays.  An error here is reported when the version is measured."""
    case, mode, version = job
    try:
        case = replace(case, **SMALL[case.family])
        case.ours(version, *case.inputs(mode))()
    except Exception:  # noqa: BLE001
        pass


# --- one run ----------------------------------------------------------------------------------------------

def run(wanted: list[Case], modes: Sequence[str], seconds: float, keep: Callable) -> tuple[dict, str | None]:
    """The report of everything that was measured, and a sentence if the GPU was lost during the run.

    `keep` receives the report each time that it has grown.
    """
    began, card, torch, lost = time.monotonic(), Card(), torch_or_none(), None
    report = {"machine": machine(torch), "date": date.today().isoformat(), "ceilings": ceilings(card), "rows": [],
              "left_out": []}
    print(machine_line(report), *(f"{name}: {value:.0f} {'GB/s' if name == 'copy' else 'TFLOP/s'}"
                                  for name, value in report["ceilings"].items()), sep="\n")
    compile_ahead(wanted, modes, cuda._capability())
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    for case in wanted:
        for mode in (mode for mode in modes if mode in case.modes):
            where = f"{case.family} {case.op}, {case.shape}, {mode}"
            if lost or time.monotonic() - began > seconds:
                report["left_out"].append(f"{where}: {'the GPU was lost' if lost else 'the time was over'}")
                continue
            try:
                rows = measure(case, mode, card, report["ceilings"], torch)
            except Lost as error:
                lost = str(error)
            except Exception as error:  # noqa: BLE001  (such as no memory for the inputs)
                report["left_out"].append(f"{where}: {sentence_of(error)}")
            else:
                report["rows"] += rows
                keep(report)
                print(f"{where}: " + ", ".join(f"{row['who']} {row['ms']:.3g} ms" if row["ms"] else
                                               f"{row['who']} ({row['note']})" for row in rows), flush=True)
    keep(report)
    print(*(f"left out: {line}" for line in report["left_out"]), sep="\n")
    return report, lost


def torch_or_none():
    """PyTorch, if it finds the GPU."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    torch.backends.cudnn.benchmark = True                   # cuDNN tries its algorithms, and keeps the fastest
    return torch


def machine(torch) -> dict[str, str]:
    """The hardware and software of the measurement."""
    import cupy

    def version(number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}"
    runtime = cupy.cuda.runtime
    return {"card": runtime.getDeviceProperties(0)["name"].decode(),
            "driver of CUDA": version(runtime.driverGetVersion()),
            "CUDA": version(runtime.runtimeGetVersion()), "CuPy": cupy.__version__,
            "PyTorch": torch.__version__ if torch else "none"}


def main(argv: list[str] | None = None) -> int:
    families = list(dict.fromkeys(case.family for case in cases()))
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("--only", nargs="+", choices=families, default=families, help="families (all)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="precisions (all)")
    parser.add_argument("--seconds", type=float, default=220, help="start no new case after this time (220)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    parser.add_argument("--plan", action="store_true", help="print what would be measured, and stop")
    parser.add_argument("--tables", nargs="+", type=Path, metavar="FILE", help="write these files' tables, and stop")
    parser.add_argument("--pages", nargs="+", type=Path, default=PAGES, metavar="PAGE", help="pages to write into")
    args = parser.parse_args(argv)
    wanted = [case for case in cases() if case.family in args.only]
    try:
        if args.tables:
            write_tables(args.tables, args.pages)
            return 0
        if args.plan:
            for case in wanted:
                print(f"{case.family:10}  {case.op:8}  {case.shape:46} {case.work / 1e9:8.3f} "
                      f"{'GFLOP    ' if case.unit == 'TFLOP/s' else 'G numbers'}  {', '.join(case.modes)}")
            return 0
        check_device("cuda")
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"benchmarks/kernels.py: {error}", file=sys.stderr)
        return 2

    def keep(report: dict) -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    report, lost = run(wanted, args.modes, args.seconds, keep)
    wrong = [row for row in report["rows"] if is_ours(row["who"]) and str(row.get("note")).startswith("wrong")]
    print(f"{sum(row['ms'] is not None for row in report['rows'])} times measured, {len(wrong)} of our results wrong")
    if lost:
        print(f"benchmarks/kernels.py: the GPU was lost at {lost}", file=sys.stderr)
    return 1 if lost or wrong or not report["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
