"""The real CuPy on a GPU that does not exist: it shows that CuPy takes each call, and counts what a GPU would do.

    null_gpu.install()                      instead of the first import of CuPy, in a process of its own
    with null_gpu.watching() as seen:
        trainer.step()
    seen["launch"], seen["product"], seen["fill"], seen["upload"], seen["download"], seen["wait"], seen["graph"]

NVRTC really compiles each kernel, and null_gpu.cpp checks each launch against it.  No kernel runs, so what a kernel
would have written is 0, and nothing can be said of values: for these there is fake_cupy.py.

CuPy opens CUDA's driver and cuBLAS by name, and a library of that name that the process already has comes first.  The
runtime is another matter: CuPy's wheel has a copy of it inside its own modules.  But a module keeps its table of
symbols, so in the memory of this process each function of the copy begins with a jump to ours.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from support.cuda_on_cpu import compiler

HERE = Path(__file__).parent
RUNTIME = re.compile(r"cuda[A-Z]|__cuda(Push|Pop|Get|Launch)")          # functions of the runtime that we take over
LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
SECTION = np.dtype([(name, "<u4" if name in ("name", "type", "link", "info") else "<u8") for name in
                    ("name", "type", "flags", "address", "offset", "size", "link", "info", "align", "each")])
SYMBOL = np.dtype([("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"),
                   ("size", "<u8")])
ALL, DYNAMIC = 2, 11                                        # the types of a module's two tables of symbols


def why_not() -> str | None:
    """Why the null GPU cannot run in this environment, a sentence, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the null GPU is written for Linux on x86-64, not for {sys.platform} on {platform.machine()}"
    if compiler() is None:
        return "the null GPU is compiled with g++ (or $CXX), and there is none"
    if importlib.util.find_spec("cupy_backends") is None:
        return "the null GPU runs the real CuPy, which is not installed: pip install -e '.[null-gpu]'"
    from cuda import pathfinder
    try:
        pathfinder.load_nvidia_dynamic_lib("nvrtc")
        headers = pathfinder.find_nvidia_header_directory("cudart")
    except pathfinder.DynamicLibNotFoundError:
        headers = None
    if headers is None:
        return "CuPy has no NVRTC or no headers of CUDA to compile with: pip install -e '.[null-gpu]'"
    return None


def install() -> None:
    """Imports CuPy on the null GPU.  RuntimeError says why it cannot."""
    if reason := why_not():
        raise RuntimeError(reason)
    wheel = Path(importlib.util.find_spec("cupy_backends").submodule_search_locations[0]).parent
    cublas = next(wheel.glob("cupy_backends/cuda/libs/cublas.*.so"))
    number = re.search(rb"libcublas\.so\.(\d+)", cublas.read_bytes())[1].decode()
    with tempfile.TemporaryDirectory() as folder:
        driver = _compiled((HERE / "null_gpu.cpp").read_text(), Path(folder, "libcuda.so.1"))
        _compiled("", Path(folder, f"libcublasLt.so.{number}"))         # CuPy only sees that it is there
        _compiled(_functions_of(cublas), Path(folder, f"libcublas.so.{number}"))
    for module in [*wheel.glob("cupy_backends/**/*.so"), *wheel.glob("cupy/**/*.so")]:
        if b"cudaStreamBeginCapture" in module.read_bytes():            # it has a copy of the runtime
            _redirect(module, driver)
    import cupy
    cupy.cuda.set_allocator(None)                           # without a pool, all memory starts as zeros


def _compiled(source: str, library: Path) -> ctypes.CDLL:
    """The library, which from now on is found by its name, whatever else has that name."""
    version = library.with_suffix(".map")                   # CuPy asks for cuBLAS's functions by the library's version
    version.write_text(f"{library.name} {{ global: *; }};")
    made = subprocess.run([compiler(), "-x", "c++", "-", "-std=c++17", "-O1", "-fPIC", "-shared", "-o", library,
                           f"-Wl,-soname,{library.name}", f"-Wl,--version-script={version}"],
                          input=source, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"the null GPU's {library.name} does not compile: {made.stderr}")
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _functions_of(cublas: Path) -> str:
    """A stand-in for each function that CuPy's module takes from cuBLAS: it reports the call, and computes nothing."""
    names = [name for name, at, _ in _symbols(cublas, DYNAMIC) if name.startswith("cublas") and not at]
    return 'extern "C" {\nint null_gpu_library(const char*);\n' + "".join(
        f'int {name}() {{ return null_gpu_library("{name}"); }}\n' for name in names) + "}\n"


def _symbols(path: Path, table: int) -> Iterator[tuple[str, int, int]]:
    """(name, address, size) of a module's symbols; the address is 0 where it takes it from another module."""
    image = path.read_bytes()
    first, count = int.from_bytes(image[40:48], "little"), int.from_bytes(image[60:62], "little")
    sections = np.frombuffer(image, SECTION, count, first)
    for found in sections[sections["type"] == table]:
        names = int(sections[found["link"]]["offset"])
        symbols = np.frombuffer(image, SYMBOL, int(found["size"]) // SYMBOL.itemsize, int(found["offset"]))
        for name, address, size in symbols[["name", "value", "size"]].tolist():
            yield image[names + name:image.index(b"\0", names + name)].decode(), address, size


def _redirect(module: Path, driver: ctypes.CDLL) -> None:
    """Makes each function of the module's copy of the runtime jump to ours."""
    ctypes.CDLL(str(module))                                # loads it; its import will find it loaded
    maps = Path("/proc/self/maps").read_text().splitlines()
    base = min(int(line.split("-")[0], 16) for line in maps if line.endswith(f" {module}"))
    unsupported = driver.null_gpu_unsupported
    for name, at, size in _symbols(module, ALL):
        if at and size >= len(_jump(0)) and RUNTIME.match(name):
            code = _jump(ctypes.cast(getattr(driver, name, unsupported), ctypes.c_void_p).value)
            _writable(base + at, len(code))
            ctypes.memmove(base + at, code, len(code))


def _jump(to: int) -> bytes:
    return b"\xff\x25\0\0\0\0" + to.to_bytes(8, "little")   # jmp *(the address that follows)


def _writable(address: int, size: int) -> None:
    page = address & ~4095
    READ_WRITE_RUN = 7
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(address + size - page), READ_WRITE_RUN):
        raise RuntimeError("the null GPU may not change the code of CuPy's modules in memory")


@contextmanager
def watching() -> Iterator[Counter]:
    """Within it, counts what CuPy asks of the null GPU, by kind; and each launch and product by its name as well."""
    driver, seen = ctypes.CDLL("libcuda.so.1"), Counter()

    @LISTENER
    def listen(what: bytes) -> None:
        kind, name = what.decode().split(" ", 1)
        seen[kind] += 1
        if kind in ("launch", "product", "library"):
            seen[name] += 1
    driver.null_gpu_listen(listen)
    try:
        yield seen
    finally:
        driver.null_gpu_listen(None)
