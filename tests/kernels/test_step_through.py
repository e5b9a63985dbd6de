"""`python -m tests.support.step_through`, and its description in docs/cuda_on_cpu.md."""

import re
import subprocess
import sys
from pathlib import Path

from support import fake_cupy

from minidiff.engine.cuda import launch as cuda

ROOT = Path(__file__).parents[2]
pytestmark = fake_cupy.needs_compiler


def step_through(*arguments):
    return subprocess.run([sys.executable, "-m", "tests.support.step_through", *arguments], capture_output=True,
                          text=True, cwd=ROOT)


def test_it_says_how_to_debug_each_launch(tmp_path):
    done = step_through("conv", "2", "--out", str(tmp_path))
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        form = r"gdb -d kernels -ex 'tbreak (\w+)' -ex run --args (\S+) (\S+)"
        kernel, program, launch = re.fullmatch(form, line).groups()
        assert kernel in cuda.versions("conv")[2].signatures
        assert subprocess.run([program, launch]).returncode == 0


def test_what_it_cannot_do_is_a_sentence(tmp_path):
    for arguments, says in ((("conv", "99"), "version must be one of"),
                            (("conv", "6"), "takes float16, bfloat16, not float32")):
        done = step_through(*arguments, "--out", str(tmp_path))
        assert done.returncode == 1 and done.stderr.startswith("error: ") and says in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_pages_line_numbers_are_the_files():
    """If this fails, conv_2_tiles.cu has changed: update the line numbers on the page."""
    page = (ROOT / "docs" / "cuda_on_cpu.md").read_text(encoding="utf-8")
    source = (ROOT / "kernels" / "conv_2_tiles.cu").read_text(encoding="utf-8").splitlines()
    shown = re.findall(r"^(\d+)\t(.+)$", page, re.MULTILINE)
    assert len(shown) == 2
    for number, line in shown:
        assert source[int(number) - 1] == line
    stop, barrier = map(int, re.findall(r"break conv_2_tiles.cu:(\d+)", page))
    assert stop == int(shown[0][0])
    assert "__syncthreads();" in source[barrier - 1]
