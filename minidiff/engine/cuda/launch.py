"""Reads, compiles and launches the kernels of kernels/*.cu, and checks the arguments of each launch.

    source = pick("conv", "float32")                        for example kernels/conv_3_registers.cu
    conv = kernel(source, "conv_forward", "float32")        compiled once for each device and element type
    conv(grid, block, x, w, None, y, B, H, W, ...)          checked against the kernel's own signature, then launched

All facts about a kernel are in its `.cu` file, and this module reads them there:

    // takes   float32, float16          the element types; tf32: float32 arrays, rounded for the tensor cores
    // needs   sm_80                     the oldest compute capability; sm_90a: only that one
    constexpr int TILE_M = 128;          a size on which the launch depends
    extern "C" __global__ void conv_forward(const T* x, ..., int B)

CuPy compiles with NVRTC and keeps the binaries on disk, under a hash of source and options.  Headers are pasted into
the source, so a change in a header changes the hash as well.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
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
WITHOUT_ASKING = 48 << 10                                   # bytes of shared memory that a launch gets by default
OF_THE_SYSTEM = 1 << 10                                     # bytes of it that each block takes besides, from sm_80 on
OPTIONS = ("-std=c++17",)                                   # of the compiler, for every kernel
CUPYS = ("-ftz=true",)                                      # those that CuPy adds: numbers below 1.2e-38 become 0


class KernelError(UserError):
    """A kernel could not be compiled or launched.  A later call may work."""


# --- reading a .cu file -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Parameter:
    type: str                                               # "const T*", "int", ...
    name: str


@dataclass(frozen=True)
class Source:
    """A file of kernels."""

    family: str                                             # "conv"
    number: int                                             # version
    path: Path
    takes: tuple[str, ...]
    needs: str                                              # "sm_80"
    constants: dict[str, int] = field(hash=False)
    signatures: dict[str, tuple[Parameter, ...]] = field(hash=False)

    @property
    def text(self) -> str:
        """The file with its headers pasted in; #line directives keep each line's own file and number."""
        return _with_headers(self.path, set())

    @property
    def shared(self) -> int:
        """Bytes of shared memory that each of its blocks asks for, where that does not depend on the arrays."""
        return self.constants.get("SHARED", 0)

    def stages(self, multiprocessor: int) -> int:
        """How many of its MOST_STAGES stages a block gets where a multiprocessor has so many bytes of shared memory.

        As many as leave room for two blocks, since one computes while the other waits; at least two.  0: no stages.
        """
        most = self.constants.get("MOST_STAGES", 0)
        room = multiprocessor // 2 - OF_THE_SYSTEM
        return most and max(2, min(most, room * most // self.shared))

    def takes_dtype(self, dtype: str, *, tf32: bool) -> bool:
        return dtype in self.takes or (dtype == "float32" and tf32 and "tf32" in self.takes)

    def runs_on(self, capability: str) -> bool:
        """capability: "80" or "90", as CuPy gives it."""
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
    """The names of all families of kernels."""
    return sorted({re.match(r"(\w+?)_\d+", path.stem)[1] for path in folder().glob("*.cu")})


@functools.cache
def versions(family: str) -> dict[int, Source]:
    """The versions of a family of kernels by number, the simplest first."""
    named = [(re.fullmatch(rf"{family}_(\d+)(?:_\w+)?", path.stem), path) for path in folder().glob("*.cu")]
    files = {int(match[1]): path for match, path in named if match}
    if not files:
        raise ValueError(f"no family of kernels {family!r} in {folder()}")
    return {number: _read(family, number, files[number]) for number in sorted(files)}


def _read(family: str, number: int, path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    takes = re.search(r"^// takes +(\w+(?:, \w+)*)$", text, re.MULTILINE)
    needs = re.search(r"^// needs +(sm_\d+a?)$", text, re.MULTILINE)
    if not takes or not needs:
        raise ValueError(f"{path} has no comment '// takes ...' or '// needs ...'")
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


# --- choosing a version -----------------------------------------------------------------------------------

def pick(family: str, dtype: str, version: int | None = None) -> Source:
    """The latest version that takes arrays of `dtype` on this card and fits its shared memory, or the requested one.

    MINIDIFF_KERNEL_VERSION=N excludes versions later than N, for teaching.  Versions that round float32 to TF32 are
    chosen only if CUPY_TF32=1, which makes CuPy's matrix products do the same.  TypeError if no version takes the
    dtype, ValueError if the requested version does not exist or does not run on this card.
    """
    return _picked(family, dtype, version, _capability(), shared_limit(), os.environ.get("CUPY_TF32") == "1",
                   os.environ.get("MINIDIFF_KERNEL_VERSION", ""))


@functools.cache
def _picked(family: str, dtype: str, version: int | None, capability: str, shared: int, tf32: bool,
            latest: str) -> Source:
    found = versions(family)
    if version is not None:
        if version not in found:
            raise ValueError(f"{family}: version must be one of {', '.join(map(str, found))}, not {version!r}")
        source = found[version]
        if not source.takes_dtype(dtype, tf32=True):
            raise TypeError(f"{source.path.name} takes {', '.join(source.takes)}, not {dtype}")
        if not source.runs_on(capability):
            raise ValueError(f"{source.path.name} needs {source.needs}, and this card is sm_{capability}")
        if source.shared > shared:
            raise ValueError(f"{source.path.name} needs {source.shared} bytes of shared memory for a block, and this "
                             f"card has {shared}")
        return source
    latest = _latest(latest)
    fit = [s for s in found.values()
           if s.takes_dtype(dtype, tf32=tf32) and s.runs_on(capability) and s.shared <= shared]
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
    """The most bytes of shared memory that a block can get on this card."""
    return _attributes()["MaxSharedMemoryPerBlockOptin"]


def shared_of_multiprocessor() -> int:
    """Bytes of shared memory that a multiprocessor has for all its blocks together."""
    return _attributes()["MaxSharedMemoryPerMultiprocessor"]


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
class strided:  # noqa: N801  (lower case, since it is used like a function)
    """Marks an array that need not be contiguous: the caller passes its strides as further arguments."""

    array: object


def table(rows: Sequence, most: int, dtype=np.uint64) -> np.ndarray:
    """The rows, at most `most`, as a struct that a kernel takes by value: no copy to the card precedes the launch.

    dtype: of a row; without it, rows are pointers.
    """
    struct = np.zeros((), [("at", dtype, most)])
    struct["at"][:len(rows)] = rows
    return struct


def kernel(source: Source, name: str, dtype: str, **defines: int) -> Kernel:
    """A kernel of the file, compiled for this device, for arrays of `dtype`, with the macros `defines`.

    KernelError, with the compiler's message and the line, if it does not compile.
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
    options = (*OPTIONS, f"-DELEMENT={C_TYPES[dtype]}", *(f"-D{key}={value}" for key, value in defines))
    try:
        module = cupy.RawModule(path=str(_binary(source, (*options, *CUPYS)))) if source.needs.endswith("a") \
            else cupy.RawModule(code=source.text, options=options, backend="nvrtc")
        module.compile()
    except cupy.cuda.compiler.CompileException as error:
        lines = [line for line in str(error).splitlines() if "error" in line] or str(error).splitlines()
        raise KernelError(f"{source.path.name} does not compile for {dtype}: {'; '.join(lines)}") from error
    except RuntimeError as error:                           # from the driver, or because NVRTC is missing
        message = " ".join(str(error).split())
        raise KernelError(f"{source.path.name} cannot be compiled and loaded on this machine: {message}") from error
    return module


def _binary(source: Source, options: tuple[str, ...]) -> Path:
    """The file's kernels, compiled for the one architecture that they need, in CuPy's own cache folder.

    CuPy compiles for sm_90 on a Hopper card, but the instructions that only Hopper has require sm_90a.
    """
    import cupy
    nvrtc = cupy.cuda.nvrtc
    text, options = source.text, (*options, f"-arch={source.needs}")
    key = hashlib.sha256(repr((text, options, nvrtc.getVersion())).encode()).hexdigest()[:20]
    cache = Path(os.path.expanduser(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache"))
    binary = cache / f"minidiff-{source.path.stem}-{key}.cubin"
    if not os.path.exists(binary):
        program = nvrtc.createProgram(text, source.path.name, (), ())
        try:
            nvrtc.compileProgram(program, options)
            compiled = nvrtc.getCUBIN(program)
        except nvrtc.NVRTCError:
            log = nvrtc.getProgramLog(program)
            raise cupy.cuda.compiler.CompileException(log, text, source.path.name, options) from None
        finally:
            nvrtc.destroyProgram(program)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_whole(binary, compiled)
        except (OSError, UserError):                        # without a cache it compiles once more in each process
            binary = Path(tempfile.mkdtemp(prefix="minidiff-")) / binary.name
            binary.write_bytes(compiled)
    return binary


class Kernel:
    """A compiled kernel: `kernel(grid, block, *args, shared=0)` checks the arguments and launches it."""

    def __init__(self, source: Source, name: str, dtype: str, function, device: int):
        self.name, self._function, self._device, self._shared = name, function, device, WITHOUT_ASKING
        names = {"T": C_TYPES[dtype], "Acc": "double" if dtype == "float64" else "float"}
        self._parameters = [(p.name, _converter(p, names, dtype, f"{source.path.name}, {name}"))
                            for p in source.signatures[name]]

    def __call__(self, grid, block, *args, shared: int = 0) -> None:
        """args in the signature's order: CuPy arrays, contiguous or `strided`; numbers; None for a null pointer; NumPy
        arrays of shape () for a struct.

        TypeError or ValueError if they do not fit the signature, KernelError if the driver refuses the launch.
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
            raise ValueError(f"{self.name} asks for {shared} bytes of shared memory, and a block can get at most "
                             f"{shared_limit()} on this card")
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
    """A function f(device, argument) that checks one argument and converts it to the exact C type.

    It begins with one quick test for the usual case: a launch has dozens of arguments, and a training step hundreds of
    launches.
    """
    type_, what = parameter.type.removeprefix("const "), f"{where}: {parameter.name}"
    if type_.endswith("*"):
        pointed = type_[:-1].strip()
        return _pointer(what, dtype if pointed == "T" else POINTERS[names.get(pointed, pointed)])
    if names.get(type_, type_) not in SCALARS:              # a struct of the file
        return _struct(what)
    return _scalar(what, SCALARS[names.get(type_, type_)])


def _pointer(what: str, expected: str) -> Callable:
    import cupy
    ndarray, exact = cupy.ndarray, _dtype_of(expected)      # a dtype is compared faster than its name

    def convert(device: int, array):
        if type(array) is ndarray and array.dtype == exact and array.flags.c_contiguous and array.size < 2**31 \
                and array.data.device_id == device:
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


def _struct(what: str) -> Callable:
    def convert(device: int, value):
        if not (isinstance(value, np.ndarray) and value.shape == () and value.dtype.names):
            raise TypeError(f"{what} must be a NumPy array of shape () with named fields, not {type(value).__name__}")
        return value
    return convert


def _dtype_of(name: str):
    try:
        return np.dtype(name)
    except TypeError:                                       # bfloat16, where no package adds it to NumPy
        return name


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
