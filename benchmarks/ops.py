"""Each op of the default UNet, forward and backward, minidiff beside PyTorch in its better layout.

    python benchmarks/ops.py                             all ops, batch 128
    python benchmarks/ops.py --only conv --batch 32      the cases whose name holds a word
    python benchmarks/ops.py --forms                     the forms of convolution beside one another

minidiff's ops run as in a training step: the batch cut into shards, one shard a thread.  "both" is forward
and backward together, with gradients for every input.  Speed is counted from the op's own arithmetic

    conv, linear, attention     GFLOP/s of the plain sum (Winograd's saving counts as speed); backward twice the forward
    norm, silu                  GB/s, each array once: forward reads x, writes y; backward reads x, dy, writes dx

whatever an implementation does beside it, so speeds compare as times do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minidiff.engine import conv, conv_shift, conv_winograd, norm, ops
from minidiff.engine.attention import scaled_dot_product_attention
from minidiff.engine.backend import keep_freed_memory
from minidiff.engine.parallel import cores, parallel_map, shards
from minidiff.engine.tensor import Tensor, gradients, no_grad

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One op at one shape, in both libraries."""

    name: str
    batched: tuple[Shape, ...]              # shapes of the inputs that have a batch axis first, without it
    shared: tuple[Shape, ...]               # shapes of the weights
    ours: Callable                          # (*batched, *shared) Tensors -> Tensor
    theirs: Callable                        # the same for torch tensors, channels first
    work: float                             # of one sample's forward: flop, or bytes
    unit: str                               # GFLOP/s or GB/s
    backward: float = 2.0                   # work of backward, in forwards


def conv_case(H: int, C: int, D: int) -> Case:
    import torch.nn.functional as F
    return Case(f"conv 3x3 {H}x{H} {C}->{D}", ((H, H, C),), ((3, 3, C, D), (D,)),
                lambda x, w, b: conv.conv2d(x, w, b, padding=1),
                lambda x, w, b: F.conv2d(x, w, b, padding=1), 2 * H * H * 9 * C * D, "GFLOP/s")


def cases() -> list[Case]:
    import torch.nn.functional as F
    tokens, heads, d = 49, 4, 32
    found = [conv_case(14, 64, 64), conv_case(14, 128, 64), conv_case(7, 128, 128), conv_case(7, 256, 128)]
    for H, C in ((14, 64), (7, 128)):
        floats = 4.0 * H * H * C
        found.append(Case(f"group norm {H}x{H}x{C}", ((H, H, C),), ((C,), (C,)),
                          lambda x, g, b: norm.group_norm(x, 8, g, b),
                          lambda x, g, b: F.group_norm(x, 8, g, b), 2 * floats, "GB/s", 1.5))
        found.append(Case(f"silu {H}x{H}x{C}", ((H, H, C),), (), ops.silu, F.silu, 2 * floats, "GB/s", 1.5))
    found.append(Case(f"attention {tokens} tokens, {heads} heads of {d}", ((heads, tokens, d),) * 3, (),
                      scaled_dot_product_attention, F.scaled_dot_product_attention,
                      4 * heads * tokens * tokens * d, "GFLOP/s"))
    C, D = 128, 256
    found.append(Case(f"linear {tokens} tokens {C}->{D}", ((tokens, C),), ((C, D), (D,)), lambda x, w, b: x @ w + b,
                      lambda x, w, b: F.linear(x, w, b), 2 * tokens * C * D, "GFLOP/s"))
    return found


def arrays_of(case: Case, batch: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return ([rng.standard_normal((batch, *shape), dtype=np.float32) for shape in case.batched],
            [rng.standard_normal(shape, dtype=np.float32) for shape in case.shared])


# --- the contestants: each case as functions without arguments -------------------------------------------

def minidiff_runs(case: Case, batch: int) -> tuple[Callable, Callable]:
    batched, shared = arrays_of(case, batch)
    weights = [Tensor(a, requires_grad=True) for a in shared]

    def forward_of(part: slice):
        with no_grad():
            return case.ours(*(Tensor(a[part]) for a in batched), *weights).data

    def both_of(part: slice):
        inputs = [Tensor(a[part], requires_grad=True) for a in batched] + weights
        y = case.ours(*inputs)
        return y.data, gradients(y, inputs, dy[part])

    def forward():
        return list(parallel_map(forward_of, shards(batch)))

    dy = np.random.default_rng(1).standard_normal((batch, *forward()[0].shape[1:]), dtype=np.float32)
    return forward, lambda: list(parallel_map(both_of, shards(batch)))


def torch_runs(case: Case, batch: int, layout) -> tuple[Callable, Callable]:
    """PyTorch's images are (B, C, H, W) and its weights (D, C, kh, kw) or (D, C)."""
    import torch
    torch.set_num_threads(cores())
    images = len(case.batched[0]) == 3 and len(case.batched) == 1

    def laid_out(a: np.ndarray, axes: tuple[int, ...]):
        x = torch.from_numpy(a)
        if len(axes) == a.ndim:
            x = x.permute(axes)
        return (x.contiguous(memory_format=layout) if x.ndim == 4 and images else x.contiguous()).requires_grad_()

    batched, shared = arrays_of(case, batch)
    inputs = [laid_out(a, (0, 3, 1, 2) if images else ()) for a in batched]
    inputs += [laid_out(a, (3, 2, 0, 1) if a.ndim == 4 else (1, 0)) for a in shared]

    def forward():
        with torch.no_grad():
            return case.theirs(*inputs)

    def both():
        y = case.theirs(*inputs)
        return torch.autograd.grad(y, inputs, dy)

    dy = torch.randn_like(forward())                        # in y's own memory layout
    return forward, both


def check_equal(case: Case, ours: Callable, theirs: Callable) -> None:
    """Same weights, same inputs: the forwards must agree before any clock runs."""
    y, y_torch = np.concatenate(ours()), theirs().detach()
    y_torch = (y_torch.permute(0, 2, 3, 1) if y.shape != tuple(y_torch.shape) else y_torch).numpy()
    np.testing.assert_allclose(y, y_torch, rtol=1e-3, atol=1e-4 * np.abs(y).max(), err_msg=case.name)


# --- the clock --------------------------------------------------------------------------------------------

def take_turns(runs: dict[str, Callable], rounds: int, turn: int = 3) -> dict[str, float]:
    """Median seconds of each, in turns within one run; the first call of a turn is not timed."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            for _ in range(turn):
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def compare_ops(word: str, batch: int, rounds: int) -> None:
    import torch
    layouts = {"first": torch.contiguous_format, "last": torch.channels_last}
    print(f"medians, batch {batch}, {cores()} cores; NumPy {np.__version__}, PyTorch {torch.__version__}\n")
    print(f"{'':47}{'minidiff':^20}{'PyTorch':^20}\n"
          f"{'':47}{'ms':>8}{'speed':>8}    {'ms':>8}{'speed':>8}    {'ratio':>6}  layout")
    for case in cases():
        if word not in case.name:
            continue
        contestants = {"minidiff": minidiff_runs(case, batch)}
        contestants |= {name: torch_runs(case, batch, layout) for name, layout in layouts.items()}
        for name in layouts:
            check_equal(case, contestants["minidiff"][0], contestants[name][0])
        for i, (what, forwards) in enumerate((("forward", 1.0), ("both", 1.0 + case.backward))):
            taken = take_turns({name: runs[i] for name, runs in contestants.items()}, rounds)
            best, work = min(layouts, key=taken.get), case.work * batch * forwards / 1e9
            us, them = taken["minidiff"], taken[best]
            print(f"{case.name:38}{what:9}{1e3 * us:8.2f}{work / us:8.1f}    {1e3 * them:8.2f}{work / them:8.1f}"
                  f"    {us / them:6.2f}  {best}, {case.unit}", flush=True)


def compare_forms(batch: int, rounds: int) -> None:
    """The three forms of a 3x3 convolution: what conv._fastest chooses by.  dx is a correlation like y."""
    print(f"median ms of a 3x3 convolution, batch {batch} in shards, {cores()} cores; NumPy {np.__version__}\n")
    titles = [f"{what} {form}" for what in ("y", "dw") for form in ("patches", "shift", "winograd")]
    print(f"{'':20}" + "".join(f"{title:>14}" for title in titles) + "   chosen")
    shapes = (28, 64, 64), (14, 4, 64), (14, 64, 64), (14, 128, 64), (10, 64, 64), (7, 128, 128), (7, 256, 128)
    for H, C, D in shapes:
        seconds = [s for runs in forms_of(H, C, D, batch) for s in take_turns(runs, rounds).values()]
        chosen = conv._fastest((batch, H, H, C), (3, 3, C, D), 1, 1)
        print(f"{f'{H}x{H} {C}->{D}':20}" + "".join(f"{1e3 * s:14.2f}" for s in seconds)
              + f"   {chosen.__name__.rpartition('_')[2] if chosen else 'patches'}", flush=True)


def forms_of(H: int, C: int, D: int, batch: int) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """y and dw by each form, as functions without arguments whose results agree."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, H, H, C), dtype=np.float32)
    dy = rng.standard_normal((batch, H, H, D), dtype=np.float32)
    w = rng.standard_normal((3, 3, C, D), dtype=np.float32)
    y_by = {"patches": lambda part: conv.plain_correlate(x[part], w, 1, 1),
            "shift": lambda part: conv_shift.correlate(x[part], w, 1),
            "winograd": lambda part: conv_winograd.correlate(x[part], w, 1)}
    dw_by = {"patches": lambda part: conv.plain_correlate_dw(x[part], dy[part], w.shape, 1, 1),
             "shift": lambda part: conv_shift.correlate_dw(x[part], dy[part], w.shape, 1),
             "winograd": lambda part: conv_winograd.correlate_dw(x[part], dy[part], w.shape, 1)}
    runs_y, runs_dw = ({name: (lambda f=f: list(parallel_map(f, shards(batch)))) for name, f in by.items()}
                       for by in (y_by, dw_by))
    for runs in (runs_y, runs_dw):
        plain, *others = (run() for run in runs.values())
        for other in others:
            for a, b in zip(plain, other, strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max())
    return runs_y, runs_dw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="samples (128)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (5)")
    parser.add_argument("--only", default="", metavar="WORD", help="the cases whose name holds this word")
    parser.add_argument("--forms", action="store_true", help="compare the forms of convolution; no PyTorch")
    args = parser.parse_args()
    keep_freed_memory()
    if args.forms:
        compare_forms(args.batch, args.rounds)
    else:
        compare_ops(args.only, args.batch, args.rounds)


if __name__ == "__main__":
    main()
