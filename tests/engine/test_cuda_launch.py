"""Reading, choosing, compiling and launching kernels: what is read from a .cu file, and what is refused."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from support import fake_cupy
from support.fake_cupy import one_sentence

from minidiff.engine.cuda import launch as cuda
from minidiff.errors import UserError

pytestmark = fake_cupy.of_the_stand_in
compiles = fake_cupy.needs_compiler

PLAIN = """\
// The plainest sum.
// takes   float32, float64, float16
// needs   sm_75
#include "element.cuh"
constexpr int THREADS = 32;
constexpr int TWICE = 2 * THREADS;

// y = scale x + shift, of n numbers; a mask says which.
extern "C" __global__ void __launch_bounds__(32)
scale(const T* __restrict__ x, T *y, const bool* mask, int n, Acc factor,   // the sizes (and more)
      long long shift /* added */) {
    extern __shared__ float4 dynamic_shared[];
    Acc* tile = reinterpret_cast<Acc*>(dynamic_shared);
    const int i = blockIdx.x * THREADS + threadIdx.x;
    tile[threadIdx.x] = i < n ? wide(x[i]) : Acc(0);
    if (i < n) y[i] = mask && !mask[i] ? narrow(Acc(0)) : narrow(factor * tile[threadIdx.x] + Acc(shift));
}
"""
FILES = {
    "scale_1_plain.cu": PLAIN,
    "scale_2_tensor.cu": PLAIN.replace("float32, float64, float16", "tf32, float16").replace("sm_75", "sm_80"),
    "scale_3_hopper.cu": PLAIN.replace("float32, float64, float16", "float16").replace("sm_75", "sm_90a"),
    "scale_4_blackwell.cu": PLAIN.replace("sm_75", "sm_100"),
    "broken_2_hopper.cu": PLAIN.replace("sm_75", "sm_90a").replace("const int i = ", "const int i = oops + "),
    "broken_1_plain.cu": PLAIN.replace("const int i = ", "const int i = oops + "),
}


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    """The stand-in for CuPy on an H100, and a folder with these kernels."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for header in cuda.folder().glob("*.cuh"):
        shutil.copy(header, tmp_path)
    monkeypatch.setattr(cuda, "folder", lambda: tmp_path)
    monkeypatch.delenv("MINIDIFF_KERNEL_VERSION", raising=False)
    monkeypatch.delenv("CUPY_TF32", raising=False)
    caches = (cuda.versions, cuda._picked, cuda._capability_of, cuda._attributes_of, cuda._compiled, cuda._module)
    for cached in caches:
        cached.cache_clear()
    yield fake_cupy.install(monkeypatch)
    for cached in caches:
        cached.cache_clear()


# --- reading a .cu file -------------------------------------------------------------------------------------

@pytest.mark.parametrize("module, kernels", [("minidiff/engine/cuda/launch.py", "kernels"),
                                             ("lib/minidiff/engine/cuda/launch.py", "lib/minidiff/kernels")])
def test_the_folder_of_a_checkout_and_of_a_wheel(monkeypatch, tmp_path, module, kernels):
    (tmp_path / kernels).mkdir(parents=True)
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / module))
    assert cuda.folder() == tmp_path / kernels


def test_a_file_is_read(cupy):
    source = cuda.versions("scale")[1]
    assert (source.family, source.number, source.takes, source.needs) \
        == ("scale", 1, ("float32", "float64", "float16"), "sm_75")
    assert source.constants == {"THREADS": 32}              # no expressions
    assert [(p.type, p.name) for p in source.signatures["scale"]] \
        == [("const T*", "x"), ("T*", "y"), ("const bool*", "mask"), ("int", "n"), ("Acc", "factor"),
            ("long long", "shift")]


def test_headers_are_pasted_in_once_with_their_lines(cupy):
    text = cuda.versions("scale")[1].text
    assert "#include" not in text and text.count("struct float16") == 1
    lines = text.splitlines()
    here = lines.index("constexpr int THREADS = 32;")
    last_mark = max(i for i in range(here) if lines[i].startswith("#line"))
    assert lines[last_mark] == '#line 5 "scale_1_plain.cu"' and here == last_mark + 1


def test_a_header_of_two_headers_is_pasted_in_once(cupy):
    """As #pragma once does for a compiler."""
    folder = cuda.folder()
    (folder / "inner.cuh").write_text("#pragma once\nstruct inner {};\n")
    for name in ("left", "right"):
        (folder / f"{name}.cuh").write_text(f'#pragma once\n#include "inner.cuh"\nstruct {name} {{}};\n')
    (folder / "twice_1_plain.cu").write_text('#include "left.cuh"\n#include "right.cuh"\n#include "left.cuh"\n' + PLAIN)
    text = cuda.versions("twice")[1].text
    assert [text.count(f"struct {name} {{}};") for name in ("inner", "left", "right")] == [1, 1, 1]
    assert text.index("struct inner") < text.index("struct left") < text.index("struct right")


def test_unknown_families_and_files_that_say_nothing(cupy):
    with pytest.raises(ValueError, match="no family of kernels 'scales'"):
        cuda.versions("scales")
    (cuda.folder() / "silent_1_plain.cu").write_text("// takes what comes\n")
    with pytest.raises(ValueError, match="has no comment"):
        cuda.versions("silent")


def test_every_kernel_of_ours_can_be_read(monkeypatch):
    """Each has comments 'takes' and 'needs', and signatures by which launches are checked."""
    fake_cupy.install(monkeypatch)
    sources = [source for family in cuda.families() for source in cuda.versions(family).values()]
    assert sorted(source.path for source in sources) == sorted(cuda.folder().glob("*.cu"))
    for source in sources:
        assert list(cuda.versions(source.family)) == list(range(1, len(cuda.versions(source.family)) + 1))
        assert set(source.takes) <= {"float32", "float64", "float16", "bfloat16", "tf32"} and source.signatures
        for signature in source.signatures.values():
            for parameter in signature:
                cuda._converter(parameter, {"T": "float", "Acc": "float"}, "float32", source.path.name)


# --- choosing a version -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, capability, environment, number", [
    ("float32", "90", {}, 1),                               # version 2 would round it to TF32
    ("float32", "90", {"CUPY_TF32": "1"}, 2),
    ("float32", "75", {"CUPY_TF32": "1"}, 1),
    ("float64", "90", {}, 1),
    ("float16", "80", {}, 2),
    ("float16", "90", {}, 3),
    ("float16", "100", {}, 4),                              # only sm_90 has the instructions of sm_90a
    ("float16", "90", {"MINIDIFF_KERNEL_VERSION": "2"}, 2),
    ("float16", "100", {"MINIDIFF_KERNEL_VERSION": "3"}, 2),
    ("float16", "90", {"MINIDIFF_KERNEL_VERSION": "9"}, 3),
])
def test_the_version(cupy, monkeypatch, dtype, capability, environment, number):
    monkeypatch.setattr(fake_cupy.Device, "compute_capability", capability)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cuda.pick("scale", dtype).number == number


def test_a_version_that_the_cards_shared_memory_does_not_hold_is_left_out(monkeypatch):
    fake_cupy.install(monkeypatch)
    monkeypatch.setattr(fake_cupy.Device, "compute_capability", "80")
    fits, too_much = cuda.versions("conv")[4], cuda.versions("conv")[5]
    monkeypatch.setattr(cuda, "shared_limit", lambda: too_much.shared)
    assert cuda.pick("conv", "float16").number == 5 and fits.shared == 0
    monkeypatch.setattr(cuda, "shared_limit", lambda: too_much.shared - 1)
    assert cuda.pick("conv", "float16").number == 4
    with pytest.raises(ValueError, match=r"conv_5_async\.cu needs 61440 bytes of shared memory for a block, and this "
                                         "card has 61439") as error:
        cuda.pick("conv", "float16", 5)
    one_sentence(error)


def test_a_version_that_is_asked_for_is_the_one_or_an_error(cupy, monkeypatch):
    assert cuda.pick("scale", "float32", 2).number == 2     # a request by number includes TF32
    with pytest.raises(ValueError, match="version must be one of 1, 2, 3, 4, not 5") as error:
        cuda.pick("scale", "float32", 5)
    one_sentence(error)
    with pytest.raises(TypeError, match=r"scale_2_tensor\.cu takes tf32, float16, not float64") as error:
        cuda.pick("scale", "float64", 2)
    one_sentence(error)
    with pytest.raises(ValueError, match=r"scale_4_blackwell\.cu needs sm_100, and this card is sm_90") as error:
        cuda.pick("scale", "float16", 4)
    one_sentence(error)
    with pytest.raises(TypeError, match="no kernel for bfloat16 on sm_90: convert to float32"):
        cuda.pick("scale", "bfloat16")
    monkeypatch.setenv("MINIDIFF_KERNEL_VERSION", "fastest")
    with pytest.raises(UserError, match="MINIDIFF_KERNEL_VERSION must be a whole number of at least 1, not 'fastest'"):
        cuda.pick("scale", "float32")


# --- launching ----------------------------------------------------------------------------------------------

def scale(cupy, x, y, n=None, factor=2.0, shift=1, mask=None, grid=None, shared=32 * 8, dtype="float32"):
    kernel = cuda.kernel(cuda.versions("scale")[1], "scale", dtype)
    kernel(-(-x.size // 32) if grid is None else grid, 32, x, y, mask, x.size if n is None else n, factor, shift,
           shared=shared)


@compiles
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_a_launch(cupy, dtype):
    x = np.random.default_rng(0).integers(-9, 9, 45).astype(dtype)
    mask = np.arange(45) % 3 > 0
    y = cupy.zeros(45, dtype)
    scale(cupy, cupy.asarray(x), y, dtype=dtype)
    np.testing.assert_array_equal(y.get(), 2 * x + 1)
    scale(cupy, cupy.asarray(x), y, factor=np.float64(3), shift=np.int64(-1), mask=cupy.asarray(mask), dtype=dtype)
    np.testing.assert_array_equal(y.get(), np.where(mask, 3 * x - 1, 0))


@compiles
def test_a_file_for_one_card_is_compiled_for_it_and_kept(cupy, monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    asked = []
    compile_program = fake_cupy.Nvrtc.compileProgram
    monkeypatch.setattr(fake_cupy.Nvrtc, "compileProgram",
                        staticmethod(lambda *a: (asked.append(a[1]), compile_program(*a))))
    x, y = cupy.asarray(np.ones(4, np.float16)), cupy.zeros(4, "float16")
    for _ in range(2):
        cuda.kernel(cuda.pick("scale", "float16"), "scale", "float16")(1, 32, x, y, None, 4, 3, 0, shared=256)
        assert (y.get() == 3).all()
        cuda._compiled.cache_clear()                        # another process, later
        cuda._module.cache_clear()
    assert len(asked) == 1 and {"-arch=sm_90a", "-DELEMENT=float16", "-ftz=true"} <= set(asked[0])
    says = r"broken_2_hopper\.cu does not compile for float16: .*:14.*oops"
    with pytest.raises(cuda.KernelError, match=says) as error:
        cuda.kernel(cuda.versions("broken")[2], "scale", "float16")
    one_sentence(error)


@compiles
def test_it_compiles_once_for_each_type_and_macro(cupy):
    source = cuda.versions("scale")[1]
    assert cuda.kernel(source, "scale", "float32") is cuda.kernel(source, "scale", "float32")
    assert cuda.kernel(source, "scale", "float32") is not cuda.kernel(source, "scale", "float64")
    assert cuda.kernel(source, "scale", "float32", SIZE=1) is not cuda.kernel(source, "scale", "float32", SIZE=2)


@compiles
def test_a_grid_without_blocks_is_no_work(cupy, monkeypatch):
    """The driver would refuse it, so it is not asked."""
    x, asked = cupy.zeros(0, "float32"), []
    monkeypatch.setattr(fake_cupy.RawKernel, "__call__", lambda self, grid, *a, **k: asked.append(grid))
    for grid in (0, (3, 0)):
        scale(cupy, x, x, grid=grid)
    assert not asked
    scale(cupy, x, x, grid=1)
    assert asked == [(1, 1, 1)]


@compiles
@pytest.mark.parametrize("change, error, says", [
    ({"x": "float64"}, TypeError, "x must be float32, not float64"),
    ({"y": "host"}, TypeError, "y must be a cupy.ndarray, not ndarray"),
    ({"x": "strided"}, ValueError, "x must be contiguous: make a copy with cupy.ascontiguousarray"),
    ({"mask": "int8"}, TypeError, "mask must be bool, not int8"),
    ({"x": "too many"}, ValueError, r"x has 2147483648 elements, and kernels count to 2\^31 - 1"),
    ({"x": "elsewhere"}, ValueError, "x is on GPU 1, and the kernel was compiled for GPU 0"),
    ({"n": 2.5}, TypeError, "n must be a whole number, not 2.5"),
    ({"n": "3"}, TypeError, "n must be a whole number, not '3'"),
    ({"n": 2**31}, ValueError, "n is 2147483648, and must be within -2147483648 and 2147483647"),
    ({"factor": None}, TypeError, "factor must be a number, not None"),
    ({"grid": (1, 2**16)}, ValueError, r"a grid of \(1, 65536, 1\) blocks is more than"),
    ({"shared": 228 << 10}, ValueError, "asks for 233472 bytes of shared memory, and a block can get at most 232448"),
])
def test_what_does_not_fit_is_refused_and_the_next_call_works(cupy, monkeypatch, change, error, says):
    x = np.arange(32, dtype=np.float32)
    arguments = {"x": cupy.asarray(x), "y": cupy.zeros(32, "float32"), "n": 32, "grid": 1}
    for name, value in change.items():
        if value == "host":
            value = x
        elif value == "strided":
            value = cupy.asarray(np.zeros((32, 2), np.float32))[:, 0]
        elif value == "too many":
            value = cupy.broadcast_to(cupy.zeros(1, "float32"), (2**31,))
            monkeypatch.setattr(fake_cupy.ndarray, "flags", SimpleNamespace(c_contiguous=True))
        elif value == "elsewhere":
            value = cupy.asarray(x)
            monkeypatch.setattr(fake_cupy.ndarray, "device",
                                property(lambda a, there=value: SimpleNamespace(id=int(a is there))))
        elif isinstance(value, str) and name in ("x", "mask"):
            value = cupy.zeros(32, value)
        arguments[name] = value
    with pytest.raises(error, match=says) as refused:
        scale(cupy, **arguments)
    one_sentence(refused)
    y = cupy.zeros(32, "float32")
    scale(cupy, cupy.asarray(x), y)
    np.testing.assert_array_equal(y.get(), 2 * x + 1)


@compiles
def test_strides_that_are_passed_beside_an_array(cupy):
    x = cupy.asarray(np.arange(64, dtype=np.float32).reshape(32, 2))[:, 0]
    y = cupy.zeros(32, "float32")
    cuda.kernel(cuda.versions("scale")[1], "scale", "float32")(1, 32, cuda.strided(x), y, None, 32, 1.0, 0, shared=256)
    np.testing.assert_array_equal(y.get(), np.arange(32))   # this kernel ignores the strides


@compiles
def test_more_shared_memory_than_a_launch_has_unasked(cupy):
    x = np.arange(32, dtype=np.float32)
    y = cupy.zeros(32, "float32")
    for shared in (100 << 10, 60 << 10, 0x100):
        scale(cupy, cupy.asarray(x), y, shared=shared)
    np.testing.assert_array_equal(y.get(), 2 * x + 1)


@compiles
def test_a_number_of_arguments(cupy):
    with pytest.raises(TypeError, match="scale takes 6 arguments, not 1"):
        cuda.kernel(cuda.versions("scale")[1], "scale", "float32")(1, 32, cupy.zeros(3, "float32"))


@compiles
def test_what_the_driver_refuses_is_said(cupy):
    x = cupy.zeros(4, "float32")
    says = (r"scale with \(1, 1, 1\) blocks of \(2048, 1, 1\) threads and 0 bytes of shared memory could not be "
            "launched: CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(cuda.KernelError, match=says) as error:
        cuda.kernel(cuda.versions("scale")[1], "scale", "float32")(1, 2048, x, x, None, 4, 1, 0)
    one_sentence(error)


@compiles
def test_what_does_not_compile_is_said_with_the_line(cupy):
    with pytest.raises(cuda.KernelError, match=r"broken_1_plain\.cu does not compile for float32: .*"
                                               r"broken_1_plain\.cu:14.*oops") as error:
        cuda.kernel(cuda.versions("broken")[1], "scale", "float32")
    one_sentence(error)
    x = np.ones(32, np.float32)
    y = cupy.zeros(32, "float32")
    scale(cupy, cupy.asarray(x), y)                         # the next call works
    assert (y.get() == 3).all()


@compiles
def test_a_module_that_the_driver_does_not_load_is_said(cupy, monkeypatch):
    def refuse(module):
        raise fake_cupy.CUDADriverError("CUDA_ERROR_NO_BINARY_FOR_GPU:\n no kernel image is available")
    with monkeypatch.context() as broken:
        broken.setattr(fake_cupy.RawModule, "compile", refuse)
        with pytest.raises(cuda.KernelError, match="cannot be compiled and loaded on this machine: CUDA_") as error:
            cuda.kernel(cuda.versions("scale")[1], "scale", "float32")
        one_sentence(error)
    x = cupy.zeros(3, "float32")
    scale(cupy, x, x)                                       # the next call works


@compiles
def test_out_of_memory_passes_and_the_next_call_works(cupy, monkeypatch):
    """It is a MemoryError, which the command line turns into a message (test_cli.py)."""
    from minidiff.engine.cuda import norm as norm_cuda
    monkeypatch.undo()                                      # back to our own kernels
    cupy = fake_cupy.install(monkeypatch)
    cuda.versions.cache_clear(), cuda._picked.cache_clear()
    x, ones = cupy.asarray(np.arange(24, dtype=np.float32).reshape(1, 6, 4)), cupy.ones(4, "float32")

    def no_memory(*_, **__):
        raise fake_cupy.OutOfMemoryError("Out of memory allocating 512 bytes")
    with monkeypatch.context() as full:
        full.setattr(cupy, "empty_like", no_memory)
        with pytest.raises(MemoryError, match="Out of memory"):
            norm_cuda.group_norm(x, 2, ones, ones, 1e-5)
    y, _, _ = norm_cuda.group_norm(x, 2, ones, ones, 1e-5)
    assert np.isfinite(y.get()).all()


def test_an_element_that_no_kernel_knows(cupy):
    with pytest.raises(TypeError, match="dtype must be one of float32, float64, float16, bfloat16, not 'int8'"):
        cuda.kernel(cuda.versions("scale")[1], "scale", "int8")
