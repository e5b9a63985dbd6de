"""Where arrays live: NumPy's on the CPU, CuPy's on the GPU.

Every op asks `xp_of(x)` for the library that owns x, so the same line of code runs on either device.
"""

from __future__ import annotations

import ctypes
import sys
from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from minidiff.checks import one_of
from minidiff.errors import UserError

DEVICES = ("cpu", "cuda")


def xp_of(*arrays) -> ModuleType:
    """The library (numpy or cupy) that owns the arrays; TypeError if they live on two devices.

    Numbers, Python's and NumPy's, belong to no device.
    """
    cupy = sys.modules.get("cupy")                          # a CuPy array exists only if CuPy was imported
    if cupy is None:
        return np
    on_gpu = [isinstance(a, cupy.ndarray) for a in arrays if hasattr(a, "dtype") and not isinstance(a, np.generic)]
    if any(on_gpu) and not all(on_gpu):
        raise TypeError("arrays on two devices in one op: move them to one with backend.to_device")
    return cupy if any(on_gpu) else np


def plain(a):
    """The data as a plain array: of NumPy or CuPy, in the machine's byte order; NumPy's own numbers stay as they are.

    A np.matrix becomes an array, and so do lists, numbers and what other libraries let NumPy read.  TypeError for a
    masked array, whose mask would be lost, and for what holds other things than real numbers or bools.
    """
    if type(a) is np.ndarray and a.dtype.kind in "fiub" and a.dtype.isnative:       # almost always
        return a
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError("a masked array would lose its mask here: fill it first, with .filled(value)")
    cupy = sys.modules.get("cupy")
    if not isinstance(a, np.generic) and not (cupy and isinstance(a, cupy.ndarray)):
        a = np.asarray(a)
    if a.dtype.kind not in "fiub" and not is_floating(a.dtype):
        raise TypeError(f"an array must hold real numbers or bools, not {a.dtype}")
    return a if a.dtype.isnative else a.astype(a.dtype.newbyteorder("="))


def to_numpy(a) -> np.ndarray:
    """The array on the CPU (a copy only if it was on a GPU)."""
    return a if isinstance(a, np.ndarray) else a.get() if hasattr(a, "get") else np.asarray(a)


def device_of(a) -> str:
    """The device of the array, "cpu" or "cuda"."""
    return "cpu" if isinstance(a, (np.ndarray, np.generic)) else "cuda"


def to_device(a, device: str):
    """The array on "cpu" or "cuda".  UserError if that device is unavailable."""
    if device == "cpu":
        return to_numpy(a)
    check_device(device)
    import cupy
    return cupy.asarray(a)


# --- from the host to a GPU in few copies -----------------------------------------------------------------
# Each copy takes some 10 microseconds, however small it is.  So several arrays go in one copy, and small ones that were
# moved lately are not moved again: a training step needs the same alpha_t three times.

SMALL, REMEMBERED, ALIGNED = 2**16, 256, 256                # bytes of an array; arrays; bytes: where each may begin
_remembered: OrderedDict[tuple, object] = OrderedDict()     # the small arrays moved last, by device, dtype and content


def moved(a, like):
    """The array a on the device of `like`.  Nothing may write into the result, which others may get as well."""
    return moved_together([a], device_of(like))[0]


def moved_together(arrays: Sequence, device: str) -> list:
    """The arrays on a device.

    The small ones on the host go to a GPU in one copy, but for those that `moved` would find there, and the large ones
    in another: a small one that is remembered must not keep a batch of images in memory.  Nothing may write into the
    results.  TypeError for an array of a GPU where the device is the host.
    """
    if device == "cpu":
        return [np.asarray(a) for a in arrays]
    there = list(arrays)
    on_host = [i for i, a in enumerate(arrays) if isinstance(a, np.ndarray)]
    keys = {i: _content(arrays[i]) for i in on_host if arrays[i].nbytes <= SMALL}
    found = {i: _remembered.get(key) for i, key in keys.items()}
    for copied in ([i for i in keys if found[i] is None], [i for i in on_host if i not in keys]):
        found.update(zip(copied, _in_one_copy([arrays[i] for i in copied]), strict=True))
    for i in on_host:
        there[i] = found[i].reshape(arrays[i].shape)
        if i in keys:
            _remembered[keys[i]] = found[i]
            _remembered.move_to_end(keys[i])
    while len(_remembered) > REMEMBERED:
        _remembered.popitem(last=False)
    return there


def _content(a: np.ndarray) -> tuple:
    import cupy
    return cupy.cuda.Device().id, a.dtype, a.tobytes()


def _in_one_copy(arrays: Sequence[np.ndarray]) -> list:
    """NumPy arrays on the GPU, as parts of one buffer."""
    import cupy
    if len(arrays) < 2:
        return [cupy.asarray(np.ascontiguousarray(a)) for a in arrays]
    starts = np.cumsum([0, *(-(-a.nbytes // ALIGNED) * ALIGNED for a in arrays)])
    buffer = np.zeros(starts[-1], np.uint8)
    for a, start in zip(arrays, starts, strict=False):
        buffer[start:start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    buffer = cupy.asarray(buffer)
    return [buffer[start:start + a.nbytes].view(a.dtype) for a, start in zip(arrays, starts, strict=False)]


def check_device(device: str) -> None:
    """UserError, which says what is missing, if `device` is unavailable."""
    one_of("device", device, DEVICES, UserError)
    if device == "cpu":
        return
    try:
        import cupy
        runtime = cupy.cuda.runtime                         # a CuPy that was removed in part has no cuda
    except Exception as error:                              # a damaged package may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise UserError("device 'cuda' needs CuPy, which is not installed: "
                            "pip install 'cupy-cuda13x[ctk]', or cupy-cuda12x, or use --device cpu") from None
        reason = " ".join(str(error).split())[:200]         # CuPy's own explanations have many lines
        raise UserError(f"device 'cuda' needs CuPy, which is installed and cannot be loaded ({reason}): use --device "
                        "cpu") from None
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        has, needs = runtime.driverGetVersion(), runtime.runtimeGetVersion()        # 0 without a driver; 12040 is 12.4
        if 0 < has < needs:
            raise UserError(f"device 'cuda' needs an NVIDIA driver for CUDA {_release(needs)}, for which CuPy was "
                            f"built, and this one is for CUDA {_release(has)}: update the driver, or use "
                            "--device cpu") from None
        raise UserError(f"device 'cuda' needs an NVIDIA GPU and its driver ({error}): use --device cpu") from None
    if count == 0:
        raise UserError("device 'cuda' needs an NVIDIA GPU, and none was found: use --device cpu")
    capability = cupy.cuda.Device().compute_capability
    if int(capability) < OLDEST:
        raise UserError(f"device 'cuda' needs a GPU of compute capability sm_{OLDEST} or later, and this one is "
                        f"sm_{capability}: use --device cpu")


OLDEST = 75                                                 # of the cards that kernels/ are compiled for: Turing


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def erf(a):
    """The error function 2/sqrt(pi) int_0^a exp(-u^2) du of each element, which NumPy and CuPy have in SciPy's part."""
    if xp_of(a) is np:
        from scipy.special import erf as erf_of
    else:
        from cupyx.scipy.special import erf as erf_of
    return erf_of(a)


# --- half precision: a storage format ---------------------------------------------------------------------

def is_floating(dtype) -> bool:
    """Whether a dtype holds real numbers.  ml_dtypes adds bfloat16 to NumPy, whose own test says that it does not."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def is_half(dtype) -> bool:
    return dtype.itemsize == 2 and is_floating(dtype)


def wide(a):
    """A half-precision array in float32, for computing; any other array unchanged."""
    return a.astype(np.float32) if is_half(a.dtype) else a


def narrow(a, dtype):
    """The array rounded to a dtype.  A number too large for float16 becomes inf, and loss scaling tests for that."""
    if a.dtype == dtype:
        return a
    with np.errstate(over="ignore"):
        return a.astype(dtype)


# --- memory -----------------------------------------------------------------------------------------------

def keep_freed_memory() -> bool:
    """Asks the C library to keep freed memory for reuse, and returns whether it does (glibc only).

    A new large array costs one page fault for each 4 KiB that is written.  Each training step frees and allocates the
    same sizes, so with this setting it reuses the same pages.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX, FOREVER = -1, -3, -8, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):            # not glibc; TypeError on Windows, which has no CDLL(None)
        return False
    # one arena for all threads: each thread's own arena would return empty pages, whatever the threshold
    kept = mallopt(M_TRIM_THRESHOLD, FOREVER) and mallopt(M_ARENA_MAX, 1)
    OLD_MOST = 32 << 20                                     # the largest threshold that glibc accepts before 2.35
    return bool(kept and (mallopt(M_MMAP_THRESHOLD, FOREVER) or mallopt(M_MMAP_THRESHOLD, OLD_MOST)))
