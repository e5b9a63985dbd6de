"""Steps through a CUDA kernel without a GPU:  python -m tests.support.step_through conv 2

Runs a small example of a kernel on the CPU, writes each of its launches to a file, and prints how to run them in gdb.
With --sanitize address or thread it runs them with a sanitizer instead, which reports out-of-bounds accesses or races
by line.  docs/cuda_on_cpu.md has more.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from support import cuda_on_cpu, fake_cupy  # noqa: E402
from support.kernel_examples import EXAMPLES  # noqa: E402

from minidiff.engine.cuda import launch as cuda  # noqa: E402


def main(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.step_through", description=__doc__.split("\n\n")[1])
    parser.add_argument("family", choices=EXAMPLES)
    parser.add_argument("version", type=int, help="the number in the file's name")
    parser.add_argument("--dtype", default="float32", choices=cuda.C_TYPES)
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"), help="folder for the launches (%(default)s)")
    parser.add_argument("--sanitize", choices=["address", "thread"])
    args = parser.parse_args(arguments or None)
    if cuda_on_cpu.WHY_NOT:
        return _fail(cuda_on_cpu.WHY_NOT)
    sys.modules["cupy"] = cupy = fake_cupy.fake_cupy(gpus=1)
    written: list[tuple[str, Path, Path]] = []
    try:
        watched = cuda.pick(args.family, args.dtype, args.version).path.name
    except (TypeError, ValueError) as error:
        return _fail(str(error))

    def launch(program, kernel, grid, block, args_, shared):
        if program.name == watched and args.sanitize:
            program.watched(args.sanitize).launch(kernel, grid, block, args_, shared)
            print(f"{kernel}: {args.sanitize} sanitizer found nothing")
        elif program.name == watched:
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / f"{kernel}-{len(written) + 1}"
            debug = program.watched("debug")
            debug.write_launch(path, kernel, grid, block, args_, shared)
            written.append((kernel, path, debug.path))
        program.launch(kernel, grid, block, args_, shared)

    fake_cupy.launch = launch
    try:
        EXAMPLES[args.family](cupy, args.dtype, args.version)
    except (cuda_on_cpu.LaunchError, cuda.KernelError) as error:
        return _fail(str(error))
    for kernel, path, program in written:
        print(f"gdb -d kernels -ex 'tbreak {kernel}' -ex run --args {program} {path}")
    return 0


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
