"""Every kernel but those of BY_ADDRESS, on small examples: no race, no access out of bounds, in any order of threads.

In the default run, threads go forward and in reverse, and must give the same bits.  The slow tests use GCC's sanitizers
for addresses, undefined behaviour and races.  Bugs planted here show that these tests can fail.
"""

import numpy as np
import pytest
from support import fake_cupy
from support.cuda_on_cpu import LaunchError
from support.kernel_examples import BY_ADDRESS, EXAMPLES, every_version

from minidiff.engine.cuda import launch as cuda

pytestmark = [fake_cupy.needs_compiler,
              fake_cupy.of_the_stand_in]
slow = pytest.mark.slow
every = pytest.mark.parametrize("family, version, dtype", [*every_version()])


def watch(monkeypatch, family: str, version: int, dtype: str, how, plant=lambda source: source) -> int:
    """Runs a family's example; how(program, kernel, grid, block, args, shared) runs the launches of this version.

    plant changes the source.  Returns the number of its launches.
    """
    cupy, watched, launches = fake_cupy.install(monkeypatch), cuda.versions(family)[version].path.name, []

    def launch(program, *launched):
        if program.name == watched:
            launches.append(launched[0])
            changed = plant(program.source)
            how(program if changed == program.source else program.of(changed), *launched)
        else:
            program.launch(*launched)
    monkeypatch.setattr(fake_cupy, "launch", launch)
    EXAMPLES[family](cupy, dtype, version)
    return len(launches)


def in_both_orders(program, kernel, grid, block, args, shared):
    """Runs a launch three times from the same memory, and compares all resulting bits."""
    before = [a.copy() if isinstance(a, np.ndarray) else None for a in args]
    left = []
    for order in (1, 5, 0):                                 # reverse, shuffled, forward
        for a, was in zip(args, before, strict=True):
            if was is not None and a.size:
                a[...] = was
        program.launch(kernel, grid, block, args, shared, order)
        left.append([np.ascontiguousarray(a).tobytes() for a in args if isinstance(a, np.ndarray)])
    assert left[0] == left[1] == left[2], f"{program.name}, {kernel}: its result depends on which thread is first"


def test_the_examples_are_of_every_family():
    assert set(EXAMPLES) == set(cuda.families()) - BY_ADDRESS


@pytest.mark.slow
@every
def test_the_order_of_threads_and_blocks_does_not_matter(monkeypatch, family, version, dtype):
    assert watch(monkeypatch, family, version, dtype, in_both_orders)


def sanitized(sanitize: str):
    def run(program, kernel, grid, block, args, shared):
        program.watched(sanitize).launch(kernel, grid, block, args, shared)
        program.launch(kernel, grid, block, args, shared)
    return run


@slow
@every
@pytest.mark.parametrize("sanitize", ["address", "thread"])
def test_sanitizers_find_nothing(monkeypatch, family, version, dtype, sanitize):
    assert watch(monkeypatch, family, version, dtype, sanitized(sanitize))


# --- these tests can fail -----------------------------------------------------------------------------------

def without(text: str, nth: int = 0):
    """A planted bug: the nth occurrence of `text` in the source's own file is removed, and its line is kept."""
    def plant(source: str) -> str:
        begin = source.rindex("#line")                      # after the headers
        parts = source[begin:].split(text)
        assert len(parts) > nth + 1, f"the kernel has no {text!r}"
        return source[:begin] + text.join(parts[:nth + 1]) + text.join(["", *parts[nth + 1:]])[len(text):]
    return plant


BARRIERS = [("conv", 2, 0), ("conv", 3, 0), ("group_norm", 2, 0), ("attention_forward", 2, 0),
            ("attention_backward", 2, 1)]                   # the nth barrier of the file


@pytest.mark.parametrize("family, version, nth", [BARRIERS[0], *(pytest.param(*b, marks=slow) for b in BARRIERS[1:])])
def test_a_missing_barrier_shows_in_another_order(monkeypatch, family, version, nth):
    with pytest.raises(AssertionError, match="depends on which thread is first"):
        watch(monkeypatch, family, version, "float32", in_both_orders, without("__syncthreads();", nth))


@slow
@pytest.mark.parametrize("family, version, nth", BARRIERS)
def test_a_missing_barrier_is_named_by_the_thread_sanitizer(monkeypatch, family, version, nth):
    name = cuda.versions(family)[version].path.name
    with pytest.raises(LaunchError, match=rf"(?s)data race.*{name}:\d+"):
        watch(monkeypatch, family, version, "float32", sanitized("thread"), without("__syncthreads();", nth))
