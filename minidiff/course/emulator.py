"""Runs a CUDA kernel on the CPU and counts what it reads from global memory.

    done = launch(source, "matmul", grid, block, inputs=(a, b), shape=(M, N), sizes=(M, K, N))
    done.result, done.reads, done.outside

The kernel is that of a lesson: its inputs have the type `In`, its result `Out`, and then come whole numbers.  On a GPU
In is const float* and Out is float*.  Here they also count the reads, and an index outside of an array does no harm:
it is counted, a read there gives NaN, and a write goes nowhere.

The emulator is that of minidiff's tests (tests/support/cuda_on_cpu, docs/cuda_on_cpu.md): it needs a checkout and a C++
compiler.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

from minidiff.course.judge import Fault

FILE = Path(__file__).parents[2] / "tests" / "support" / "cuda_on_cpu" / "__init__.py"

PRELUDE = """\
struct Counts { long long reads, outside; };
struct In {
    const float* at; long long size; Counts* counts;
    float operator[](long long i) const {
        if (i < 0 || i >= size) { ++counts->outside; return NAN; }
        ++counts->reads;
        return at[i];
    }
};
static float nowhere;
struct Out {
    float* at; long long size; Counts* counts;
    float& operator[](long long i) const {
        if (i < 0 || i >= size) { ++counts->outside; return nowhere; }
        return at[i];
    }
};
#line 1 "kernel"
"""
ARRAY = np.dtype([("at", np.uint64), ("size", np.int64), ("counts", np.uint64)])     # In and Out, as C++ lays them out


@dataclass(frozen=True)
class Launched:
    """result: what the kernel wrote, NaN where it wrote nothing.  reads: of its inputs.  outside: indices beyond."""

    result: np.ndarray
    reads: int
    outside: int


def launch(source: str, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], inputs: Sequence[np.ndarray],
           shape: tuple[int, ...], sizes: Sequence[int], *, order: int = 0) -> Launched:
    """Compiles a kernel, and runs it on float32 arrays.

    grid, block: as in CUDA, x first.  shape: of the result.  order: in which a block's threads run: 0 forward, 1 in
    reverse, 2, 3, ... shuffled; a kernel with all the barriers that it needs gives the same result.  Fault, in one
    sentence, if it cannot be compiled or does not come to its end, or there is no emulator.
    """
    cuda = _cuda_on_cpu()
    counts, result = np.zeros(2, np.int64), np.full(shape, np.nan, np.float32)
    inputs = [np.ascontiguousarray(a, np.float32) for a in inputs]
    args = [np.array((a.ctypes.data, a.size, counts.ctypes.data), ARRAY)[()] for a in (*inputs, result)]
    try:
        program = cuda.Program(PRELUDE + source, name="kernel.cu")
        program[kernel](grid, block, [*args, *map(np.int32, sizes)], order=order)
    except KeyError as error:
        raise Fault(f'the source has no kernel {kernel}: it takes extern "C" __global__ void {kernel}(...)') from error
    except SyntaxError as error:
        raise Fault(f"the kernel does not compile: {_first_error(str(error))}") from error
    except cuda.LaunchError as error:
        raise Fault(f"the kernel does not come to its end: {' '.join(str(error).split())[:300]}") from error
    return Launched(result, int(counts[0]), int(counts[1]))


@cache
def _cuda_on_cpu() -> ModuleType:
    """The emulator of the tests, found by its place in the checkout."""
    if not FILE.exists():
        raise Fault("a kernel runs on the CPU only in a checkout of minidiff, with its tests (docs/cuda_on_cpu.md)")
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.WHY_NOT:
        raise Fault(module.WHY_NOT)
    return module


def _first_error(text: str) -> str:
    """"line 3: expected ';' before '}' token", of what the compiler said."""
    found = re.search(r'kernel:(\d+):(?:\d+:)? (?:fatal )?error: (.*)', text)
    return f"line {found[1]}: {found[2]}" if found else " ".join(text.split())[:300]
