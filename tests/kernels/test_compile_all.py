"""compile_all's report on kernels that are right, wrong or too large for the registers."""

import re

import pytest

from tests.kernels import compile_all
from tests.kernels.compile_all import Cost, Job, NoCompiler, Result

HEADER = "// takes   float32\n// needs   sm_75\n"
COPY = HEADER + """
extern "C" __global__ void __launch_bounds__(64) copy(const float* x, float* y, int n) {
    __shared__ float row[64];
    const int i = blockIdx.x * 64 + threadIdx.x;
    row[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
    if (i < n) y[i] = row[63 - threadIdx.x];
}
"""
# an index known only at run time: the array cannot be in registers
SPILL = HEADER + """
extern "C" __global__ void __launch_bounds__(64) look_up(const float* x, const int* at, float* y, int n) {
    float held[256];
    for (int i = 0; i < 256; ++i) held[i] = x[i * n];
    for (int i = 0; i < n; ++i) y[i] = held[at[i] & 255];
}
"""
# 200 sums that are live at once, in a block with 64 registers for each thread
SQUEEZED = HEADER + """
extern "C" __global__ void __launch_bounds__(1024) sums(const float* x, float* y, int n) {
    float sum[200];
    #pragma unroll
    for (int i = 0; i < 200; ++i) sum[i] = 0.0f;
    for (int k = 0; k < n; ++k) {
        #pragma unroll
        for (int i = 0; i < 200; ++i) sum[i] += x[k * 200 + i] * x[k + 3 * i];
    }
    #pragma unroll
    for (int i = 0; i < 200; ++i) y[i * 1024 + threadIdx.x] = sum[i];
}
"""


@pytest.fixture
def nvrtc():
    try:
        return compile_all.nvrtc()
    except NoCompiler as error:
        pytest.skip(str(error))


def written(tmp_path, name: str, source: str):
    path = tmp_path / name
    path.write_text(source)
    return path


def compiled(path, arch="sm_90") -> Result:
    job, = compile_all.jobs_of(path, [arch])
    return compile_all.compile_one(job)


# --- with the compiler ------------------------------------------------------------------------------------

def test_a_kernel_compiles_for_every_card(nvrtc, tmp_path):
    path = written(tmp_path, "copy_3_fast.cu", COPY)
    results = list(compile_all.compile_all(compile_all.jobs_of(path), workers=1))
    assert [r.job.arch for r in results] == ["sm_75", "sm_80", "sm_90", "sm_100"]
    for r in results:
        cost, = r.costs
        assert cost.kernel == "copy" and cost.shared == 256 and 0 < cost.registers <= 32
        assert not compile_all.spills(r)


def test_one_of_ours_compiles(nvrtc):
    path = min(compile_all.KERNELS.glob("*.cu"), key=lambda p: p.stat().st_size)
    for r in compile_all.compile_all(compile_all.jobs_of(path, ["sm_75", "sm_90"]), workers=1):
        assert r.costs, r.log


def test_it_compiles_with_cupys_own_options(nvrtc, tmp_path):
    """-ftz=true changes the machine code, and with it the registers."""
    asks = COPY.replace('extern "C"', "#ifndef __CUDA_FTZ\n#error CuPy flushes denormal numbers\n#endif\nextern \"C\"")
    result = compiled(written(tmp_path, "copy_1_naive.cu", asks))
    assert result.costs, result.log


def test_nvrtcs_builtins_are_loaded_before_it(tmp_path, monkeypatch):
    """CUDA 13.0's NVRTC opens them by name, and does not look into its own folder."""
    class File:
        def __init__(self, name):
            self.name = name

        def locate(self):
            return tmp_path / self.name
    loaded, names = [], ["libnvrtc.so.13", "libnvrtc-builtins.alt.so.13.0", "libnvrtc-builtins.so.13.0"]
    monkeypatch.setattr(compile_all.metadata, "files", lambda name: list(map(File, names)))
    monkeypatch.setattr(compile_all.ctypes, "CDLL", lambda path: loaded.append(path.removeprefix(f"{tmp_path}/")))
    compile_all.nvrtc.__wrapped__()
    assert loaded == ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"]


def test_an_error_is_shown_with_its_file_and_line(nvrtc, tmp_path, monkeypatch, capsys):
    written(tmp_path, "copy_1_naive.cu", COPY.replace("const int i =", "const int j ="))
    monkeypatch.setattr(compile_all, "KERNELS", tmp_path)
    assert compile_all.main(["--arch", "sm_80", "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert "copy_1_naive.cu for float32 on sm_80: does not compile" in said and "1 failed" in said
    line = next(n for n, text in enumerate(COPY.splitlines(), 1) if "i < n ?" in text)
    assert re.search(rf"copy_1_naive\.cu\({line}\): error: identifier \"i\" is undefined", said)


@pytest.mark.parametrize("source, kernel", [(SPILL, "look_up"), (SQUEEZED, "sums")])
def test_local_memory_is_found(nvrtc, tmp_path, source, kernel):
    result = compiled(written(tmp_path, "planted_3_fast.cu", source))
    cost, = compile_all.spills(result)
    assert cost.kernel == kernel and cost.local >= 4 * 130
    assert (cost.stores > 0) == (kernel == "sums")          # look_up's is an array, and nothing that ran over
    assert not compile_all.spills(compiled(written(tmp_path, "planted_2_tiles.cu", source)))    # slow ones may


def test_a_spill_fails_unless_it_is_argued_for(nvrtc, tmp_path, monkeypatch, capsys):
    written(tmp_path, "planted_3_fast.cu", SPILL)
    monkeypatch.setattr(compile_all, "KERNELS", tmp_path)
    command = ["--arch", "sm_90", "--workers", "1"]
    assert compile_all.main(command) == 1
    assert "look_up has 1024 bytes of local memory" in capsys.readouterr().out
    monkeypatch.setitem(compile_all.MAY_SPILL, ("planted_3_fast", "float32", None), "a table, read once")
    assert compile_all.main(command) == 0
    assert "it may: a table, read once" in capsys.readouterr().out


def test_what_only_a_hopper_has_is_compiled_for_a_hopper(nvrtc, tmp_path):
    fence = COPY.replace("__syncthreads();", '__syncthreads(); asm volatile("wgmma.fence.sync.aligned;");')
    path = written(tmp_path, "copy_6_wgmma.cu", fence.replace("sm_75", "sm_90a"))
    result, = compile_all.compile_all(compile_all.jobs_of(path), workers=1)
    assert result.job.arch == "sm_90" and result.costs, result.log
    path.write_text(fence.replace("sm_75", "sm_90"))
    assert not compiled(path).costs


# --- without it -------------------------------------------------------------------------------------------

LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'second' for 'sm_75'
ptxas info    : Function properties for second
ptxas         .     16 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 1.430 ms
ptxas info    : Compiling entry function 'first' for 'sm_75'
ptxas info    : Function properties for first
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, used 0 barriers, 372 bytes cmem[0]
"""


def test_the_assemblers_report_is_read():
    assert compile_all.read_costs(LOG) == [Cost("first", 4, 0, 0, 0, 0), Cost("second", 255, 512, 24, 24, 40)]


def test_the_head_of_a_file_says_what_is_compiled(tmp_path):
    path = written(tmp_path, "conv_4_tensor_cores.cu", "// takes a while\n// takes   tf32, float16\n// needs   sm_80\n")
    jobs = compile_all.jobs_of(path)
    assert [(j.element, j.arch) for j in jobs] == [(e, a) for e in ("tf32", "float16")
                                                   for a in ("sm_80", "sm_90", "sm_100")]
    assert {j.version for j in jobs} == {4} and {j.head_dim for j in jobs} == {None}
    path.write_text("// takes   float64\n// needs   sm_90a\nconstexpr int D = HEAD_DIM;\n")
    assert [(j.arch, j.head_dim) for j in compile_all.jobs_of(path)] == [("sm_90", d) for d in compile_all.HEAD_DIMS]
    path.write_text("// takes   float64\n// needs   sm_80\nconstexpr int D = HEAD_DIM;\n")
    assert {j.head_dim for j in compile_all.jobs_of(path, ["sm_80"])} == set(compile_all.FEWER)
    assert len(compile_all.jobs_of(path, ["sm_80", "sm_90"], every=True)) == 2 * len(compile_all.HEAD_DIMS)


def test_the_fewer_stages_of_smaller_cards_are_compiled_too():
    path = compile_all.KERNELS / "conv_5_async.cu"
    assert [str(job) for job in compile_all.jobs_of(path) if job.stages] == [
        f"conv_5_async.cu for {element}, 3 stages on sm_80" for element in ("tf32", "float16", "bfloat16")]
    assert not any(job.stages for job in compile_all.jobs_of(path, ["sm_90"]))


@pytest.mark.parametrize("head, word", [
    ("// needs   sm_75\n", "has no comment"), ("// takes   float32\n", "has no comment"),
    ("// takes   float8\n// needs   sm_75\n", "float8"), ("// takes   float32\n// needs   sm_70\n", "sm_70")])
def test_a_head_that_is_missing_or_wrong_is_refused(tmp_path, head, word):
    with pytest.raises(ValueError, match=word):
        compile_all.jobs_of(written(tmp_path, "conv_1_naive.cu", head))


def test_the_table_has_a_row_for_each_kernel_and_type(tmp_path):
    def result(arch, registers, local):
        job = Job(tmp_path / "conv_3_registers.cu", 3, "float32", arch)
        return Result(job, (Cost("conv_forward", registers, 1024, local, 0, 0),), "")
    rows = compile_all.table([result("sm_75", 64, 0), result("sm_90", 60, 8)])
    assert rows == [["file", "kernel", "type", "head dim", "shared", "sm_75", "sm_90"],
                    ["conv_3_registers", "conv_forward", "float32", "", "1024", "64", "60 +8"]]
    assert compile_all.as_markdown(rows).splitlines()[1] == "| --- | --- | --- | ---: | ---: | ---: | ---: |"
    assert compile_all.as_text(rows).splitlines()[0].split() == "file kernel type head dim shared sm_75 sm_90".split()


def test_without_nvrtc_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    written(tmp_path, "copy_1_naive.cu", COPY)
    monkeypatch.setattr(compile_all, "KERNELS", tmp_path)

    def none():
        raise NoCompiler("NVRTC is not installed: pip install '.[kernels]'")
    monkeypatch.setattr(compile_all, "nvrtc", none)
    assert compile_all.main([]) == 2
    assert "pip install '.[kernels]'" in capsys.readouterr().err


def test_a_name_that_no_file_has_is_said(capsys):
    assert compile_all.main(["conv_99"]) == 2
    assert "no file named like conv_99" in capsys.readouterr().err
