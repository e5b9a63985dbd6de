"""One checked way to launch the kernels of kernels/*.cu.

    source = pick("conv", "float32")                        kernels/conv_3_registers.cu, say
    conv = kernel(source, "conv_forward", "float32")        compiled once for each device and type of element
    conv(grid, block, x, w, None, y, B, H, W, ...)          checked against the kernel's own signature, then launched

A `.cu` file is the only place that knows its kernels: what stands here is read from it.

    // takes   float32, float16          the types of element; tf32: float32 arrays, rounded for the tensor cores
    // needs   sm_80                     the oldest compute capability; sm_90a: that one alone
    constexpr int TILE_M = 128;          a size that the launch depends on
    extern "C" __global__ void conv_forward(const T* x, ..., int B)

CuPy compiles through NVRTC and keeps what it made on disk, by source and options; since headers are pasted into the
source, a change in one is a change of both.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minidiff.errors import UserError
from minidiff.files import write_whole

C_TYPES = {"float32": "float", "float64": "double", "float16": "float16", "bfloat16": "bfloat16"}
SCALARS = {"int": np.int32, "unsigned int": np.uint32, "long long": np.int64, "unsigned long long": np.uint64,
           "float": np.float32, "double": np.float64}
POINTERS = {"float": "float32", "double": "float64", "bool": "bool", "unsigned char": "uint8", "int": "int32",
            "unsigned int": "uint32", "long long": "int64", "unsigned long long": "uint64"}
WITHOUT_ASKING = 48 << 10                                   # bytes of shared memory that every launch may have


class KernelError(UserError):
    """A kernel could not be compiled or launched; one sentence, and the next call may work."""


# --- what a file says -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Parameter:
    type: str                                               # "const T*", "int", ...
    name: str


@dataclass(frozen=True)
class Source:
    """A file of kernels."""

    family: str                                             # "conv"
    number: int                                             # its version
    path: Path
    takes: tuple[str, ...]
    needs: str                                              # "sm_80"
    constants: dict[str, int] = field(hash=False)
    signatures: dict[str, tuple[Parameter, ...]] = field(hash=False)

    @property
    def text(self) -> str:
        """The file with its headers pasted in, each line still known by its own file and number."""
        return _with_headers(self.path, set())

    def takes_dtype(self, dtype: str, *, tf32: bool) -> bool:
        return dtype in self.takes or (dtype == "float32" and tf32 and "tf32" in self.takes)

    def runs_on(self, capability: str) -> bool:
        """capability: "80" or "90", as CuPy says it."""
        needed = self.needs.removeprefix("sm_")
        return needed == capability + "a" if needed.endswith("a") else int(capability) >= int(needed)


def folder() -> Path:
    """The folder of the .cu files.

    In a checkout it is kernels/, beside the package, where readers find it.  A wheel can only bring files that are
    inside a package, so setup.py puts the folder into the wheel as minidiff/kernels.
    """
    package = Path(__file__).parents[2]
    in_wheel, in_checkout = package / "kernels", package.parent / "kernels"
    return in_wheel if in_wheel.exists() else in_checkout


def families() -> list[str]:
    """Every family of kernels."""
    return sorted({re.match(r"(\w+?)_\d+", path.stem)[1] for path in folder().glob("*.cu")})


@functools.cache
def versions(family: str) -> dict[int, Source]:
    """The versions of a family of kernels, the plainest first."""
    named = [(re.fullmatch(rf"{family}_(\d+)(?:_\w+)?", path.stem), path) for path in folder().glob("*.cu")]
    files = {int(match[1]): path for match, path in named if match}
    if not files:
        raise ValueError(f"there is no family of kernels {family!r} in {folder()}")
    return {number: _read(family, number, files[number]) for number in sorted(files)}


def _read(family: str, number: int, path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    takes = re.search(r"^// takes +(\w+(?:, \w+)*)$", text, re.MULTILINE)
    needs = re.search(r"^// needs +(sm_\d+a?)$", text, re.MULTILINE)
    if not takes or not needs:
        raise ValueError(f"{path} does not say what it takes and needs")
    constants = {name: int(value) for name, value in re.findall(r"^constexpr int (\w+) = (\d+);", text, re.MULTILINE)}
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)", code)
    return Source(family, number, path, tuple(re.split(r",\s*", takes[1])), needs[1], constants,
                  {name: tuple(map(_parameter, listed.split(","))) for name, listed in kernels})


def _parameter(text: str) -> Parameter:
    """"const T* __restrict__ x" -> const T*, x."""
    words = re.sub(r"\s*\*", "* ", text.replace("__restrict__", " ")).split()
    return Parameter(" ".join(words[:-1]), words[-1])


def _with_headers(path: Path, seen: set[str]) -> str:
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        header = re.match(r'#include "([\w.]+)"', line)
        if header and header[1] not in seen:
            seen.add(header[1])
            lines += [_with_headers(path.parent / header[1], seen), f'#line {number + 1} "{path.name}"']
        else:
            lines.append("" if header or line.startswith("#pragma once") else line)
    return "\n".join(lines)


# --- which version ----------------------------------------------------------------------------------------

def pick(family: str, dtype: str, version: int | None = None) -> Source:
    """The last version that takes arrays of `dtype` on this card, or the one asked for.

    MINIDIFF_KERNEL_VERSION=N chooses none later than N, for teaching.  Versions that round float32 to TF32 are chosen
    only where CUPY_TF32=1, which does the same to CuPy's matrix products.  ValueError where there is none.
    """
    return _picked(family, dtype, version, _capability(), os.environ.get("CUPY_TF32") == "1",
                   os.environ.get("MINIDIFF_KERNEL_VERSION", ""))


@functools.cache
def _picked(family: str, dtype: str, version: int | None, capability: str, tf32: bool, latest: str) -> Source:
    found = versions(family)
    if version is not None:
        if version not in found:
            raise ValueError(f"{family}: version must be one of {', '.join(map(str, found))}, not {version!r}")
        source = found[version]
        if not source.takes_dtype(dtype, tf32=True):
            raise TypeError(f"{source.path.name} takes {', '.join(source.takes)}, not {dtype}")
        if not source.runs_on(capability):
            raise ValueError(f"{source.path.name} needs {source.needs}, and this card is sm_{capability}")
        return source
    latest = _latest(latest)
    fit = [s for s in found.values() if s.takes_dtype(dtype, tf32=tf32) and s.runs_on(capability)]
    if not fit:
        raise TypeError(f"{family} has no kernel for {dtype} on sm_{capability}: convert to float32")
    return max((s for s in fit if s.number <= latest), key=lambda s: s.number, default=fit[0])


def _latest(asked: str) -> int:
    if not asked:
        return sys.maxsize
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"MINIDIFF_KERNEL_VERSION must be a whole number of at least 1, not {asked!r}")
    return int(asked)


def shared_limit() -> int:
    """Bytes of shared memory that a block may ask for on this card."""
    return _attributes()["MaxSharedMemoryPerBlockOptin"]


def multiprocessors() -> int:
    return _attributes()["MultiProcessorCount"]


def _capability() -> str:
    import cupy
    return _capability_of(cupy.cuda.Device().id)


@functools.cache
def _capability_of(device: int) -> str:
    import cupy
    return cupy.cuda.Device(device).compute_capability


def _attributes() -> dict[str, int]:
    import cupy
    return _attributes_of(cupy.cuda.Device().id)


@functools.cache
def _attributes_of(device: int) -> dict[str, int]:
    import cupy
    return cupy.cuda.Device(device).attributes


# --- compiling and launching ------------------------------------------------------------------------------

@dataclass(frozen=True)
class strided:  # noqa: N801  (a marker, read as a word where it is used)
    """An array of any strides, which the caller passes beside it."""

    array: object


def kernel(source: Source, name: str, dtype: str, **defines: int) -> Kernel:
    """A kernel of the file, compiled for this device, for arrays of dtype and with the macros `defines`.

    KernelError, with the compiler's message and the file's line, where it does not compile.
    """
    import cupy
    return _compiled(cupy.cuda.Device().id, source, name, dtype, tuple(sorted(defines.items())))


@functools.cache
def _compiled(device: int, source: Source, name: str, dtype: str, defines: tuple[tuple[str, int], ...]) -> Kernel:
    if dtype not in C_TYPES:
        raise TypeError(f"{source.path.name}: dtype must be one of {', '.join(C_TYPES)}, not {dtype!r}")
    return Kernel(source, name, dtype, _module(device, source, dtype, defines).get_function(name), device)


@functools.cache
def _module(device: int, source: Source, dtype: str, defines: tuple[tuple[str, int], ...]):
    import cupy
    options = ("-std=c++17", f"-DELEMENT={C_TYPES[dtype]}", *(f"-D{key}={value}" for key, value in defines))
    try:
        module = cupy.RawModule(path=str(_binary(source, options))) if source.needs.endswith("a") \
            else cupy.RawModule(code=source.text, options=options, backend="nvrtc")
        module.compile()
    except cupy.cuda.compiler.CompileException as error:
        said = [line for line in str(error).splitlines() if "error" in line] or str(error).splitlines()
        raise KernelError(f"{source.path.name} does not compile for {dtype}: {'; '.join(said)}") from error
    except RuntimeError as error:                           # of the driver, or of a compiler that cannot be found
        said = " ".join(str(error).split())
        raise KernelError(f"{source.path.name} cannot be made ready on this machine: {said}") from error
    return module


def _binary(source: Source, options: tuple[str, ...]) -> Path:
    """The file's kernels compiled for the one card that they need, where CuPy keeps what it compiles itself.

    CuPy asks its compiler for sm_90 on a Hopper, and the instructions that no other card has are of sm_90a.
    """
    import cupy
    nvrtc = cupy.cuda.nvrtc
    text, options = source.text, (*options, f"-arch={source.needs}")
    key = hashlib.sha256(repr((text, options, nvrtc.getVersion())).encode()).hexdigest()[:20]
    cache = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    binary = cache / f"minidiff-{source.path.stem}-{key}.cubin"
    if not binary.exists():
        program = nvrtc.createProgram(text, source.path.name, (), ())
        try:
            nvrtc.compileProgram(program, options)
            compiled = nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError:
            log = nvrtc.getProgramLog(program)
            raise cupy.cuda.compiler.CompileException(log, text, source.path.name, options) from None
        finally:
            nvrtc.destroyProgram(program)
        cache.mkdir(parents=True, exist_ok=True)
        write_whole(binary, compiled)
    return binary


class Kernel:
    """A compiled kernel: `kernel(grid, block, *args, shared=0)` checks the arguments and launches it."""

    def __init__(self, source: Source, name: str, dtype: str, function, device: int):
        self.name, self._function, self._device, self._shared = name, function, device, WITHOUT_ASKING
        names = {"T": C_TYPES[dtype], "Acc": "double" if dtype == "float64" else "float"}
        self._parameters = [(p.name, _converter(p, names, dtype, f"{source.path.name}, {name}"))
                            for p in source.signatures[name]]

    def __call__(self, grid, block, *args, shared: int = 0) -> None:
        """args in the signature's order: CuPy arrays, contiguous or `strided`; numbers; None for a null pointer.

        TypeError or ValueError for what does not fit the signature, KernelError for what the driver refuses.
        """
        if len(args) != len(self._parameters):
            raise TypeError(f"{self.name} takes {len(self._parameters)} arguments, not {len(args)}")
        exact = tuple(convert(self._device, arg) for (_, convert), arg in zip(self._parameters, args, strict=True))
        grid, block = _three(grid), _three(block)
        if min(grid) < 1:                                   # no work, and the driver would refuse it
            return
        if grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
            raise ValueError(f"{self.name}: a grid of {grid} blocks is more than (2^31 - 1, 65535, 65535)")
        import cupy
        if shared > self._shared and shared > shared_limit():
            raise ValueError(f"{self.name} asks for {shared} bytes of shared memory, and a block of this card has "
                             f"{shared_limit()}")
        try:
            if shared > self._shared:
                self._function.max_dynamic_shared_size_bytes = self._shared = shared
            self._function(grid, block, exact, shared_mem=shared)
        except cupy.cuda.driver.CUDADriverError as error:
            raise KernelError(f"{self.name} with {grid} blocks of {block} threads and {shared} bytes of shared memory "
                              f"could not be launched: {error}") from error


def _three(sizes) -> tuple[int, int, int]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (*sizes, *(1,) * (3 - len(sizes)))


def _converter(parameter: Parameter, names: dict[str, str], dtype: str, where: str) -> Callable:
    """What checks one argument and gives it the exact C type: f(device, argument).

    Both begin with one quick test for what is right; a launch has dozens of arguments, and a step hundreds of launches.
    """
    type_, what = parameter.type.removeprefix("const "), f"{where}: {parameter.name}"
    if type_.endswith("*"):
        pointed = type_[:-1].strip()
        return _pointer(what, dtype if pointed == "T" else POINTERS[names.get(pointed, pointed)])
    return _scalar(what, SCALARS[names.get(type_, type_)])


def _pointer(what: str, expected: str) -> Callable:
    import cupy
    ndarray = cupy.ndarray

    def convert(device: int, array):
        if type(array) is ndarray and array.dtype == expected and array.flags.c_contiguous and array.size < 2**31 \
                and array.device.id == device:
            return array
        if array is None:
            return np.uint64(0)
        any_strides = type(array) is strided
        if any_strides:
            array = array.array
        if not isinstance(array, ndarray):
            raise TypeError(f"{what} must be a cupy.ndarray, not {type(array).__name__}")
        if array.dtype != expected:
            raise TypeError(f"{what} must be {expected}, not {array.dtype}")
        if not (any_strides or array.flags.c_contiguous):
            raise ValueError(f"{what} must be contiguous: make a copy with cupy.ascontiguousarray")
        if array.size >= 2**31:
            raise ValueError(f"{what} has {array.size} elements, and kernels count to 2^31 - 1: work on parts of the "
                             "batch")
        if array.device.id != device:
            raise ValueError(f"{what} is on GPU {array.device.id}, and the kernel was compiled for GPU {device}")
        return array
    return convert


def _scalar(what: str, exact) -> Callable:
    whole = np.dtype(exact).kind in "iu"
    low, high = (int(np.iinfo(exact).min), int(np.iinfo(exact).max)) if whole else (-math.inf, math.inf)
    quick = int if whole else float

    def convert(device: int, number):
        if type(number) is quick and low <= number <= high:
            return exact(number)
        if isinstance(number, (bool, np.bool_)):
            number = int(number)
        if isinstance(number, (float, np.floating)) and whole or not isinstance(number, (int, float, np.number)):
            raise TypeError(f"{what} must be a {'whole ' if whole else ''}number, not {number!r}")
        if whole and not low <= number <= high:
            raise ValueError(f"{what} is {number}, and must be within {low} and {high}")
        return exact(number)
    return convert
