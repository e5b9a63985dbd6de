"""CUDA kernels on a CPU: `.cu` files, compiled unchanged by the host's C++ compiler, run on NumPy arrays.

    kernel = Program(source, {"ELEMENT": "float"})["conv_forward"]
    kernel(grid, block, [x, w, None, y, np.int32(3), ...], shared=0)

cuda_on_cpu.h explains how.  `order` runs a block's threads forward (0), in reverse (1) or shuffled (2, 3, ...); a
kernel without races gives the same bits each time.  `sanitize` runs the launch in a separate program with GCC's
AddressSanitizer and UBSan ("address": out-of-bounds accesses by line) or ThreadSanitizer ("thread": races by line).
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "kernels"
BUILD = HERE / ".build"                                     # compiled programs, named by a hash of their source
STACK = 128 << 10                                           # bytes; as in cuda_on_cpu.h
FLAGS = ("-std=c++17", "-g", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable",
         "-Wno-unused-but-set-variable", "-Wno-sign-compare", "-Wno-tautological-compare", f"-I{HERE}", f"-I{KERNELS}")
WATCHED = {
    None: ("-O1", "-fPIC", "-shared", "-fno-extern-tls-init"),
    "debug": ("-O0", "-DSANITIZED"),
    "address": ("-O1", "-DSANITIZED", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
                "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-DSANITIZED", "-fsanitize=thread"),
}


_one_at_a_time = threading.Lock()


class LaunchError(RuntimeError):
    """A kernel has an error: a deadlock, a barrier that not all threads reach, or one that a sanitizer found."""


@cache
def compiler() -> str | None:
    """The host's C++ compiler, $CXX or g++, or None.  It must be GCC or accept GCC's options."""
    return shutil.which(os.environ.get("CXX", "g++"))


WHY_NOT = None if compiler() else "no C++ compiler (g++, or $CXX): the kernels cannot run on this CPU"


class Program:
    """A .cu file's source compiled with the macros `defines`, for this CPU."""

    def __init__(self, source: str, defines: dict[str, object] | None = None, *, name: str = "kernel.cu",
                 sanitize: str | None = None):
        self.source, self.name, self.sanitize = source, name, sanitize
        self._macros = defines
        self.defines = tuple(f"-D{key}={value}" for key, value in (defines or {}).items())
        self.kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", source)

    def __getitem__(self, kernel: str):
        if kernel not in self.kernels:
            raise KeyError(f"{self.name} has no kernel {kernel!r}, only {', '.join(self.kernels)}")
        return lambda grid, block, args, shared=0, order=0: self.launch(kernel, grid, block, args, shared, order)

    def watched(self, sanitize: str | None) -> Program:
        """The same with another sanitizer."""
        return Program(self.source, self._macros, name=self.name, sanitize=sanitize)

    def of(self, source: str) -> Program:
        """Another source with the same macros."""
        return Program(source, self._macros, name=self.name, sanitize=self.sanitize)

    @property
    def path(self) -> Path:
        """The compiled library; with a sanitizer, the program."""
        text = self._text()
        options = (*FLAGS, *WATCHED[self.sanitize], *self.defines)
        headers = sorted([*HERE.glob("*.h"), *HERE.glob("*.cuh"), *KERNELS.glob("*.cuh")])
        # copies of the project may share their programs: a header counts by its text, wherever it is
        made_from = [part.replace(str(HERE), "").replace(str(KERNELS), "") for part in (text, *options)]
        made_from += [compiler(), *(header.read_text() for header in headers)]
        key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:20]
        path = BUILD / f"{Path(self.name).stem}-{key}{'' if self.sanitize else '.so'}"
        if not path.exists():
            self._compile(text, options, path)
        return path

    def _text(self) -> str:
        source = self.source
        if self.sanitize:                                   # there __shared__ means static
            source = source.replace("extern __shared__", "extern")
        runs = "\n".join(f"KERNEL({kernel})" for kernel in self.kernels)
        named = ", ".join(f'{{"{kernel}", cuda_on_cpu_run_{kernel}}}' for kernel in self.kernels)
        main = f"PROGRAM({named})" if self.sanitize else ""
        return (f'#include "cuda_on_cpu.h"\n#include "{HERE}/ptx.cuh"\n#line 1 "{self.name}"\n{source}\n'
                f'#line 1 "launch"\n#include "program.h"\n{runs}\n{main}\n')

    def _compile(self, text: str, options: tuple[str, ...], path: Path) -> None:
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / path.name
            # env: this may be a thread, and without it the new process reads the environment while another thread,
            # such as pytest's before each test, changes it (OSError: Bad address)
            done = subprocess.run([compiler(), "-x", "c++", "-", *options, "-o", str(made)], input=text, text=True,
                                  env=dict(os.environ), capture_output=True)
            if done.returncode:
                raise SyntaxError(f"{self.name} does not compile:\n{done.stderr}")
            made.replace(path)                              # atomic, since other processes may compile the same

    def launch(self, kernel: str, grid, block, args, shared: int = 0, order: int = 0) -> None:
        """Runs a kernel.  args: NumPy arrays (written to in place), NumPy scalars of the exact C type, None (null)."""
        head = np.zeros(8, np.int32)
        head[:3], head[3:6], head[6], head[7] = _three(grid), _three(block), shared, order
        if self.sanitize:
            return self._launch_apart(kernel, head, args)
        held = [_as_argument(a) for a in args]
        pointers = (ctypes.c_void_p * len(held))(*(a.ctypes.data for a in held))
        run = getattr(_library(str(self.path)), f"cuda_on_cpu_run_{kernel}")
        run.restype = ctypes.c_char_p
        with _one_at_a_time:                                # there is one set of stacks for the threads
            error = run(ctypes.c_void_p(head.ctypes.data), pointers, ctypes.c_void_p(_stacks().ctypes.data))
        if error:
            raise LaunchError(f"{self.name}, {kernel}: {error.decode()}")

    def _launch_apart(self, kernel: str, head: np.ndarray, args) -> None:
        with tempfile.TemporaryDirectory() as folder:
            case = Path(folder) / "launch"
            self.write_launch(case, kernel, head[:3], head[3:6], args, int(head[6]), int(head[7]))
            options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
            done = subprocess.run([str(self.path), str(case)], capture_output=True, text=True, env=os.environ | options)
            if done.returncode:
                raise LaunchError(f"{self.name}, {kernel}: {done.stderr}")
            read, at = case.read_bytes(), 256 + head.nbytes + 4
            for a in args:
                size = int(np.frombuffer(read, np.int64, 2, at)[1])
                if isinstance(a, np.ndarray) and a.size:    # only its own elements: another array may lie in its gaps
                    a[...] = np.ndarray(a.shape, a.dtype, read, at + 16, a.strides)
                at += 16 + size

    def write_launch(self, path: Path, kernel: str, grid, block, args, shared: int = 0, order: int = 0) -> None:
        """Writes a file that the sanitized or debug program runs: `gdb --args PROGRAM FILE`."""
        head = np.array([*_three(grid), *_three(block), shared, order], np.int32)
        parts = [kernel.encode().ljust(256, b"\0"), head.tobytes(), np.int32(len(args)).tobytes()]
        for a in args:
            array = isinstance(a, np.ndarray)
            data = _memory(a).tobytes() if array else _as_argument(a).tobytes()
            parts += [np.array([array, len(data)], np.int64).tobytes(), data]
        path.write_bytes(b"".join(parts))


def _three(sizes) -> tuple[int, int, int]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (*sizes, *(1,) * (3 - len(sizes)))


def _as_argument(a) -> np.ndarray:
    """The bytes of an argument: an array's address, or a scalar itself."""
    if a is None:
        return np.zeros(1, np.uint64)
    if isinstance(a, np.ndarray):
        return np.array([a.ctypes.data], np.uint64)
    if isinstance(a, np.generic):
        return np.array([a])
    raise TypeError(f"an argument is a NumPy array, a NumPy scalar or None, not {type(a).__name__}")


def _memory(a: np.ndarray) -> np.ndarray:
    """The bytes from an array's first element to its last, gaps of strides included."""
    if any(stride < 0 for stride in a.strides):
        raise ValueError("strides must not be negative here")
    if a.size == 0:
        return np.zeros(0, np.uint8)
    size = sum(stride * (n - 1) for stride, n in zip(a.strides, a.shape, strict=True)) + a.itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(a.ctypes.data), np.uint8)


@cache
def _stacks() -> np.ndarray:
    """Memory for the stacks of a block's 1024 threads; the system allocates a page only when it is used."""
    return np.frombuffer(mmap.mmap(-1, 1024 * STACK), np.uint8)


@cache
def _library(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)
