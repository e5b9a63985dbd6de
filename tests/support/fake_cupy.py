"""A stand-in for CuPy on machines without a GPU: its arrays reject NumPy's functions, and its functions NumPy's arrays.

It has CuPy's rules for the two memories, and is as strict or stricter:

    an array is not an np.ndarray; .get() copies it to one, and cupy.asarray copies one to the device
    an op does not mix host and device arrays (it accepts Python's numbers and NumPy's scalars, as CuPy does)
    cupy's functions take no host arrays, and NumPy's no device arrays (CuPy accepts some such calls, and waits for the
        device in others; here the code must have asked xp_of)
    a reduction gives an array of shape (), not a number
    a list is no array, for an op or to be assigned; cupy.asarray takes one of numbers, or of device arrays, not of both
    an index out of range in an array of indices is a mistake (`OutOfRange`), where CuPy silently takes another element
    what CuPy 14.2 lacks is missing here, too: geomspace, sum(where=...), x.item(3), x @= y

With MINIDIFF_TEST_DEVICE=cuda in the environment, `install` gives the real CuPy instead.

Kernels, cupy.RawModule, run on the CPU (cuda_on_cpu) and take exact types only: a Python number would be passed as 8
bytes.  An index may be a host array, which CuPy copies to the device, and so may the axes of a transpose.  NumPy
computes everything, so results are NumPy's, bit for bit.  The stand-in does not show a GPU's rounding or speed.
"""

import ast
import operator
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.special
from support import cuda_on_cpu

FUNCTIONS = """
abs absolute add all any append arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort
around array_split atleast_1d atleast_2d atleast_3d average bincount bitwise_and bitwise_not bitwise_or bitwise_xor
broadcast_arrays broadcast_to cbrt ceil clip column_stack compress concatenate conj convolve copy copysign corrcoef cos
cosh count_nonzero cov cross cumprod cumsum deg2rad diag diagonal diff digitize divide divmod dot dstack einsum empty
empty_like equal exp exp2 expand_dims expm1 eye fix flatnonzero flip fliplr flipud float_power floor floor_divide fmax
fmin fmod full full_like greater greater_equal histogram hsplit hstack hypot identity imag indices inner interp invert
isclose isfinite isin isinf isnan kron less less_equal lexsort linspace log log10 log1p log2 logaddexp logaddexp2
logical_and logical_not logical_or logical_xor logspace matmul max maximum mean median meshgrid min minimum mod moveaxis
multiply nan_to_num nanmax nanmean nanmin nansum negative nonzero not_equal ones ones_like outer pad partition
percentile positive power prod ptp quantile rad2deg ravel real reciprocal remainder repeat reshape rint
roll rollaxis rot90 round searchsorted select sign signbit sin sinc sinh sort split sqrt square squeeze stack std
subtract sum swapaxes take take_along_axis tan tanh tensordot tile trace transpose tri tril tril_indices triu
triu_indices true_divide trunc unique unravel_index vander var vdot vsplit vstack where zeros zeros_like
""".split()
SAME_AS_NUMPY = """
bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 generic number
floating integer inexact dtype finfo iinfo inf nan pi e newaxis
""".split()
ATTRIBUTES = "T dtype imag itemsize nbytes ndim real shape size strides".split()
METHODS = """
all any argmax argmin argsort astype clip compress conj copy cumprod cumsum diagonal dot fill flatten max mean min
nonzero prod ravel repeat reshape round searchsorted sort squeeze std sum swapaxes tobytes tolist trace var view
""".split()
FLAGS = "c_contiguous f_contiguous fnc forc owndata".split()
UNKNOWN_TO_CUPY = {"where", "initial", "subok", "like", "device", "correction"}     # keywords


class OutOfRange(AssertionError):
    """An index that CuPy would wrap around, where NumPy raises IndexError; no code may count on either."""


class ndarray:
    """cupy.ndarray; `_a` is its memory, which no test should look at."""

    __array_ufunc__ = None                                  # host array + device array then calls our operator, below
    __array_priority__ = 100
    __hash__ = None

    def __init__(self, memory: np.ndarray):
        self._a = memory

    def get(self) -> np.ndarray:
        return np.array(self._a, order="C")

    @property
    def flags(self):
        return SimpleNamespace(**{name: getattr(self._a.flags, name) for name in FLAGS})

    @property
    def data(self):
        whole = self._a
        while isinstance(whole.base, np.ndarray):           # a view
            whole = whole.base
        return SimpleNamespace(ptr=self._a.ctypes.data, device_id=self.device.id,
                               mem=SimpleNamespace(ptr=whole.ctypes.data))

    @property
    def device(self):
        return SimpleNamespace(id=0)

    def transpose(self, *axes):
        return ndarray(self._a.transpose(*axes))

    def item(self):
        return self._a.item()

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. "
                        "Please use `.get()` to construct a NumPy array explicitly.")

    def __array_function__(self, f, types, args, kwargs):
        raise TypeError(f"numpy.{f.__name__} was given a cupy.ndarray: ask xp_of for the array's own library")

    def __getattr__(self, name: str):
        if name in ATTRIBUTES:
            return _on_device(getattr(self._a, name))
        if name in METHODS:
            return _function(getattr(self._a, name))
        raise AttributeError(f"cupy.ndarray has no attribute {name!r}")

    def __getitem__(self, index):
        return _on_device(self._a[self._checked(index)])

    def take(self, indices, axis=None):
        try:
            return _on_device(self._a.take(_index(indices), axis))
        except IndexError as error:
            raise OutOfRange(f"CuPy would silently take another element: {error}") from None

    def __setitem__(self, index, value):
        if isinstance(value, (np.ndarray, list, tuple)) and np.ndim(value):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self._a[self._checked(index)] = _on_host(value) if isinstance(value, ndarray) else value

    def _checked(self, index):
        """The index as NumPy takes it; OutOfRange where CuPy would not say that it is."""
        parts = index = _index(index)
        if not isinstance(parts, tuple):
            parts = (parts,)
        try:
            self._a[index]
        except IndexError as error:
            if any(isinstance(part, (np.ndarray, list)) for part in parts) and "out of bounds" in str(error):
                raise OutOfRange(f"CuPy would silently take another element: {error}") from None
            raise
        return index

    def __len__(self):
        return len(self._a)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(self._a)

    def __int__(self):
        return int(self._a)

    def __float__(self):
        return float(self._a)

    def __repr__(self):
        return repr(self._a)

    def __format__(self, spec):
        return format(self._a, spec)


def _install_operators() -> None:
    def binary(f):
        def op(x, y):
            if not isinstance(y, ndarray) and getattr(y, "__array_ufunc__", 0) is None:
                return NotImplemented                       # then Python calls Tensor's operator
            return _on_device(f(x._a, _operand(y)))
        return op

    def in_place(f):
        def op(x, y):
            x._a = f(x._a, _operand(y))
            return x
        return op

    def product(x, y):
        return np.asarray(x @ y).astype(np.result_type(x, y), copy=False)   # for two bfloat16 NumPy returns float32

    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
        f = product if name == "matmul" else getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", binary(f))
        setattr(ndarray, f"__r{name}__", binary(lambda x, y, f=f: f(y, x)))
        if name != "matmul":
            setattr(ndarray, f"__i{name}__", in_place(getattr(operator, f"__i{name}__")))
    for name in "lt le eq ne gt ge".split():
        setattr(ndarray, f"__{name}__", binary(getattr(operator, f"__{name}__")))
    for name in "neg pos abs invert".split():
        f = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", lambda x, f=f: _on_device(f(x._a)))


_install_operators()


def _on_host(x):
    """An argument as NumPy takes it; TypeError if it is a host array."""
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(x, (list, tuple)):
        return type(x)(map(_on_host, x))
    return x


def _operand(x):
    """An operand as NumPy takes it; TypeError for a host array or a list."""
    if isinstance(x, (list, tuple)):
        raise TypeError(f"Unsupported type {type(x)}")
    return _on_host(x)


def _on_device(result):
    """A result of NumPy as CuPy returns it: a computed number becomes an array of shape ()."""
    if isinstance(result, (np.ndarray, np.generic)):
        return ndarray(np.asarray(result))
    if isinstance(result, tuple | list) and any(isinstance(r, np.ndarray) for r in result):
        return type(result)(map(_on_device, result))
    return result


def _index(index):
    """An index as NumPy takes it."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return index._a if isinstance(index, ndarray) else index


def _function(f):
    def called(*args, **kwargs):
        unknown = UNKNOWN_TO_CUPY & set(kwargs)
        if unknown:
            raise TypeError(f"cupy's {f.__name__} got an unexpected keyword argument {min(unknown)!r}")
        if f.__name__ == "where" or hasattr(f, "at"):       # a ufunc
            for arg in args[:3]:
                _operand(arg)
        out = kwargs.get("out")
        result = f(*map(_on_host, args), **{name: _on_host(value) for name, value in kwargs.items()})
        return _on_device(result) if out is None else out
    if hasattr(f, "at"):                                    # a ufunc
        called.at = lambda x, index, *values: f.at(_on_host(x), x._checked(index), *map(_on_host, values))
    return called


def _array(a, dtype=None, *, copy: bool = True):
    if isinstance(a, (list, tuple)) and len({isinstance(x, ndarray) for x in a}) == 2:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. "
                        "Please use `.get()` to construct a NumPy array explicitly.")
    if isinstance(a, ndarray):
        same = dtype is None or np.dtype(dtype) is a.dtype  # not ==: float64 equals None
        return a if same and not copy else ndarray(np.array(a._a, dtype))
    return ndarray(np.array(a if isinstance(a, np.ndarray) else _on_host(a), dtype))    # into the device's memory


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class CompileException(Exception):
    def __init__(self, message, source="", name="", options=(), backend="nvrtc"):
        super().__init__(message)


class NVRTCError(Exception):
    pass


class Nvrtc:
    """The part of cupy.cuda.nvrtc that is used: a program is a list, and its binary is the text of that list."""

    NVRTCError = NVRTCError
    getVersion = staticmethod(lambda: (13, 0))
    createProgram = staticmethod(lambda code, name, headers, names: [code])
    getCUBIN = staticmethod(lambda program: repr(tuple(program)).encode())
    getProgramLog = staticmethod(lambda program: program[1])
    destroyProgram = staticmethod(lambda program: None)

    @staticmethod
    def compileProgram(program, options):
        program.append(options)
        try:
            RawModule(code=program[0], options=options).compile()
        except CompileException as error:
            program[1] = str(error)
            raise NVRTCError("NVRTC_ERROR_COMPILATION (6)") from None


class OutOfMemoryError(MemoryError):
    pass


# --- kernels ------------------------------------------------------------------------------------------------

CARD = {"MaxSharedMemoryPerBlockOptin": 227 << 10, "MaxSharedMemoryPerMultiprocessor": 228 << 10,
        "MultiProcessorCount": 132}                         # an H100's


class Device:
    """cupy.cuda.Device: an H100."""

    compute_capability = "90"
    attributes = CARD

    def __init__(self, id: int = 0):
        self.id = id

    def synchronize(self):
        pass


class RawModule:
    def __init__(self, *, code: str | None = None, path: str | None = None, options: tuple[str, ...] = (),
                 backend: str = "nvrtc"):
        if path:
            code, options = ast.literal_eval(Path(path).read_text())
        defines = dict(option[2:].split("=") for option in options if option.startswith("-D"))
        name = code.split('"', 2)[1] if code.startswith("#line") else "kernel.cu"
        self._program = cuda_on_cpu.Program(code, defines, name=name)

    def compile(self):
        if cuda_on_cpu.WHY_NOT:
            raise CompileException(cuda_on_cpu.WHY_NOT)
        try:
            self._program.path  # noqa: B018  (this compiles it)
        except SyntaxError as error:
            raise CompileException(str(error)) from None

    def get_function(self, name: str):
        return RawKernel(self._program, name)


def compile_ahead() -> None:
    """Compiles, in another thread, the kernels that most of the tests use.

    It reads the sources at once, since a test may later replace them.
    """
    from minidiff.engine.cuda import launch as cuda
    if cuda_on_cpu.WHY_NOT or REAL:
        return
    programs = [cuda_on_cpu.Program(source.text, {"ELEMENT": cuda.C_TYPES.get(dtype, "float")} | defines,
                                    name=source.path.name)
                for family in cuda.families() for source in cuda.versions(family).values() for dtype in source.takes
                for defines in ([{"HEAD_DIM": 16}, {"HEAD_DIM": 32}] if family.startswith("attention") else [{}])]
    threading.Thread(target=lambda: [program.path for program in programs], daemon=True).start()


def launch(program: cuda_on_cpu.Program, kernel: str, grid, block, args: list, shared: int) -> None:
    """Runs a kernel; a test may replace this function, to watch launches or to use a sanitizer."""
    program.launch(kernel, grid, block, args, shared)


def watch_launches(monkeypatch) -> list[str]:
    """A list that gets the name of each kernel launched from now on; with the real CuPy it stays empty."""
    names, own = [], launch

    def watched(program, kernel, *args):
        names.append(kernel)
        own(program, kernel, *args)
    monkeypatch.setattr(sys.modules[__name__], "launch", watched)
    return names


class RawKernel:
    def __init__(self, program: cuda_on_cpu.Program, name: str):
        self._program, self._name, self.max_dynamic_shared_size_bytes = program, name, 48 << 10

    def __call__(self, grid, block, args, *, shared_mem: int = 0):
        if shared_mem > self.max_dynamic_shared_size_bytes or len(block) > 3 or np.prod(block) > 1024 or min(grid) < 1:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        for arg in args:
            by_value = isinstance(arg, np.ndarray) and arg.shape == () and arg.dtype.names      # a struct
            if not (by_value or isinstance(arg, (ndarray, np.generic))):
                raise TypeError(f"Unsupported type {type(arg)}, or one whose size C would not know")
        args = [arg._a if isinstance(arg, ndarray) else arg[()] for arg in args]
        launch(self._program, self._name, grid, block, args, shared_mem)


def fake_cupy(gpus: int) -> ModuleType:
    """CuPy on a machine with this number of GPUs."""
    cupy = ModuleType("cupy")
    for name in FUNCTIONS:
        setattr(cupy, name, _function(getattr(np, name)))
    cupy.take = ndarray.take
    for name in SAME_AS_NUMPY:
        setattr(cupy, name, getattr(np, name))
    cupy.ndarray, cupy.array = ndarray, _array
    cupy.asarray = cupy.asanyarray = lambda a, dtype=None: _array(a, dtype, copy=False)
    cupy.ascontiguousarray = lambda a, dtype=None: ndarray(np.ascontiguousarray(_on_host(a), dtype))
    cupy.asnumpy = lambda a: a.get() if isinstance(a, ndarray) else np.asarray(a)
    cupy.result_type = lambda *args: np.result_type(*map(_on_host, args))
    cupy.lib = SimpleNamespace(stride_tricks=SimpleNamespace(
        as_strided=_function(np.lib.stride_tricks.as_strided)))
    cupy.cuda = SimpleNamespace(runtime=SimpleNamespace(
        getDeviceCount=lambda: gpus, CUDARuntimeError=CUDARuntimeError,
        driverGetVersion=lambda: 0, runtimeGetVersion=lambda: 13000),
        driver=SimpleNamespace(CUDADriverError=CUDADriverError),
        compiler=SimpleNamespace(CompileException=CompileException), nvrtc=Nvrtc,
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError), Device=Device,
        get_current_stream=lambda: SimpleNamespace(ptr=0))
    cupy.RawModule = RawModule
    return cupy


REAL = os.environ.get("MINIDIFF_TEST_DEVICE") == "cuda"     # the same tests with CuPy on the GPU of this machine
needs_compiler = pytest.mark.skipif(cuda_on_cpu.WHY_NOT is not None, reason=str(cuda_on_cpu.WHY_NOT))
needs_device = pytest.mark.skipif(cuda_on_cpu.WHY_NOT is not None and not REAL, reason=str(cuda_on_cpu.WHY_NOT))
of_the_stand_in = pytest.mark.skipif(REAL, reason="a test of the stand-in for CuPy, and MINIDIFF_TEST_DEVICE=cuda")


def dtype_of(name: str) -> np.dtype:
    """NumPy's dtype of a kernel's type of element; bfloat16 comes from ml_dtypes, without which a test is skipped."""
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def install(monkeypatch, gpus: int = 1) -> ModuleType:
    """Makes `import cupy` give this module during one test, and returns it."""
    if REAL:
        import cupy
        return cupy
    module = fake_cupy(gpus)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(cuda_on_cpu.BUILD))
    monkeypatch.setitem(sys.modules, "cupy", module)
    for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.special"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["cupyx.scipy.special"].erf = _function(scipy.special.erf)
    return module


# --- assertions --------------------------------------------------------------------------------------------

ROUNDING = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-5}       # of sums of up to 10,000 terms of size 1


def assert_same(found, expected) -> None:
    """found is on the device, with expected's shape, dtype and, to rounding, values.  Or both are tuples of arrays."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
        return
    assert isinstance(found, sys.modules["cupy"].ndarray if REAL else ndarray), f"{type(found)} is not on the device"
    assert isinstance(expected, (np.ndarray, np.generic))   # NumPy's results of shape () are numbers
    assert found.shape == expected.shape and found.dtype == expected.dtype
    bound = ROUNDING.get(expected.dtype, 0) * np.abs(expected).max(initial=1)
    np.testing.assert_allclose(found.get(), expected, rtol=0, atol=bound)


def one_sentence(error) -> None:
    """The message of an error that pytest caught is one line, and not empty."""
    message = str(error.value)
    assert message and "\n" not in message
