"""Each op of the two networks, forward and backward: minidiff beside PyTorch in its better layout.

    python benchmarks/ops.py                             all ops of both networks, batch 128
    python benchmarks/ops.py --network large             those of one network
    python benchmarks/ops.py --only conv --batch 32      the cases whose name contains a word
    python benchmarks/ops.py --forms                     compares the forms of convolution

minidiff's ops run as in a training step: the batch is cut into shards, each thread computes one, and the gradients of
the weights are summed over the shards. "both" is forward and backward, with gradients for every input. Speed counts the
op's own arithmetic, whatever else an implementation does, so speeds compare as times do:

    conv, linear, attention     GFLOP/s of the plain sum (Winograd's saving counts as speed); backward twice the forward
    norm, silu, ...             GB/s, each array once: forward reads x, writes y; backward reads x, dy, writes dx
    update                      GB/s: the gradient is read twice, w, m, v and the average are read and written

The floor is the time of that arithmetic at the machine's best speed, measured in the same run: a large matrix product
on all cores, by NumPy's BLAS or PyTorch's, whichever is faster, and a copy of large arrays. An op that saves
multiplications, or finds its arrays in the cache, may be faster than the floor.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from side_by_side import (
    NETWORKS,
    minidiff_network,
    minidiff_update,
    positive,
    ragged_mask,
    take_turns,
    torch_network,
    torch_update,
    versions,
)

from minidiff.engine import conv, conv_shift, conv_winograd, norm, ops
from minidiff.engine.attention import scaled_dot_product_attention
from minidiff.engine.backend import keep_freed_memory
from minidiff.engine.parallel import cores, parallel_map, shards
from minidiff.engine.tensor import Tensor, gradients, no_grad, record
from minidiff.nn.layers import Linear

Shape = tuple[int, ...]
TURN, TOO_SLOW = 3, 1.3
CALL = 0.01                                                 # the least seconds that a timed call should take
FLOP, BYTE = "GFLOP/s", "GB/s"


# --- the cases --------------------------------------------------------------------------------------------

def torch_weights(a: np.ndarray) -> np.ndarray:
    """Weights of convolutions (kh, kw, C, D) -> (D, C, kh, kw), of linear layers (C, D) -> (D, C)."""
    return {4: lambda: a.transpose(3, 2, 0, 1), 2: lambda: a.T}.get(a.ndim, lambda: a)()


@dataclass(frozen=True)
class Case:
    """One op at one shape, in both libraries."""

    name: str
    batched: tuple[Shape, ...]              # shapes of the inputs with a batch axis, without it; 3 axes: images
    shared: tuple[Shape, ...]               # of the weights
    ours: Callable                          # (*batched, *shared) Tensors, and the mask if there is one -> Tensor
    theirs: Callable                        # the same for torch tensors, images channels first
    work: float                             # of one sample's forward pass: flop, or bytes
    unit: str
    backward: float = 2.0                   # work of the backward pass, as a multiple of the forward
    mask: int = 0                           # M of the mask (B, 1, 1, M); 0 for no mask
    door: Callable = torch_weights          # a weight in PyTorch's layout


def cases(network: str) -> Iterator[Case]:
    """Every op of a network at each of its shapes; those of the text encoder come with the first network."""
    c, text = NETWORKS[network].unet, NETWORKS[network].text
    (C, D), E, size = c.widths, c.embedding, NETWORKS[network].shape[0]
    S, folded = size // c.patch, c.channels * c.patch**2
    s, tokens = S // 2, (S // 2)**2
    for side, wide, out in ((S, folded, C), (S, C, C), (S, 2 * C, C), (S, C, folded), (s, D, D), (s, 2 * D, D)):
        yield conv_case(side, wide, out)
    yield down(s, C, D)
    yield up(s, D, C)
    yield skip(S, 2 * C, C)
    yield skip(s, 2 * D, D)
    for what, n, wide, out in (("q, out", tokens, D, D), ("k, v", tokens, D, 2 * D), ("k, v of 16 tokens", 16,
                               text.width, 2 * D), ("time", 1, E, E), ("modulation", 1, E, 2 * D)):
        yield linear(what, n, wide, out)
    for side, wide in ((S, C), (S, 2 * C), (s, D), (s, 2 * D)):
        yield group_norm(side, wide, c.groups, silu=True)
    yield group_norm(s, D, c.groups, silu=False)
    yield modulated(S, C, c.groups)
    yield modulated(s, D, c.groups)
    yield attention("self-attention", tokens, tokens, D, c.heads, masked=False)
    yield attention("cross-attention", tokens, 16, D, c.heads, masked=True)
    yield from elementwise(S, C)
    if c.channels == 1:                                     # with more channels PyTorch folds squares in another order
        yield from folds(size, c.patch)
    if network == next(iter(NETWORKS)):
        W = text.width
        for wide, out in ((W, W), (W, 2 * W), (W, 4 * W), (4 * W, W)):
            yield linear("text", 16, wide, out)
        yield attention("attention of text", 16, 16, W, text.heads, masked=True)
        yield layer_norm(16, W)
        yield gelu(16, 4 * W)


def conv_case(S: int, C: int, D: int) -> Case:
    import torch.nn.functional as F
    return Case(f"conv 3x3 {S}x{S} {C}->{D}", ((S, S, C),), ((3, 3, C, D), (D,)),
                lambda x, w, b: conv.conv2d(x, w, b, padding=1),
                lambda x, w, b: F.conv2d(x, w, b, padding=1), 2 * S * S * 9 * C * D, FLOP)


def as_layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """layers.Linear with these weights."""
    layer = Linear.__new__(Linear)
    layer.w, layer.b = w, b
    return layer(x)


def linear(what: str, N: int, C: int, D: int) -> Case:
    import torch.nn.functional as F
    return Case(f"linear, {what}, {N} x {C}->{D}", ((N, C) if N > 1 else (C,),), ((C, D), (D,)), as_layer, F.linear,
                2 * N * C * D, FLOP)


def skip(S: int, C: int, D: int) -> Case:
    import torch.nn.functional as F
    return Case(f"linear, skip, {S}x{S} {C}->{D}", ((S, S, C),), ((C, D), (D,)), as_layer, F.conv2d,
                2 * S * S * C * D, FLOP, door=lambda a: a.T[:, :, None, None] if a.ndim == 2 else a)


def down(S: int, C: int, D: int) -> Case:
    """To half the resolution: PyTorch's form is a convolution of stride 2."""
    import torch.nn.functional as F
    return Case(f"down to {S}x{S} {C}->{D}", ((2 * S, 2 * S, C),), ((4 * C, D), (D,)),
                lambda x, w, b: as_layer(conv.space_to_depth(x), w, b), lambda x, w, b: F.conv2d(x, w, b, stride=2),
                2 * S * S * 4 * C * D, FLOP,
                door=lambda a: a.reshape(2, 2, C, D).transpose(3, 2, 0, 1) if a.ndim == 2 else a)


def up(S: int, C: int, D: int) -> Case:
    """To twice the resolution."""
    import torch.nn.functional as F

    def door(a):                                            # PyTorch unfolds channels as (D, 2, 2), minidiff (2, 2, D)
        a = a.reshape(-1, 2, 2, D).transpose(3, 1, 2, 0)
        return a.reshape(4 * D, -1, 1, 1) if a.shape[3] > 1 else a.reshape(4 * D)
    return Case(f"up from {S}x{S} {C}->{D}", ((S, S, C),), ((C, 4 * D), (4 * D,)),
                lambda x, w, b: conv.depth_to_space(as_layer(x, w, b)),
                lambda x, w, b: F.pixel_shuffle(F.conv2d(x, w, b), 2), 2 * S * S * C * 4 * D, FLOP, door=door)


def group_norm(S: int, C: int, groups: int, silu: bool) -> Case:
    import torch.nn.functional as F

    def theirs(x, g, b):
        y = F.group_norm(x, groups, g, b)
        return F.silu(y) if silu else y
    return Case(f"group norm{', silu' if silu else ''} {S}x{S}x{C}", ((S, S, C),), ((C,), (C,)),
                lambda x, g, b: norm.group_norm(x, groups, g, b, silu=silu), theirs, 8.0 * S * S * C, BYTE, 1.5)


def modulated(S: int, C: int, groups: int) -> Case:
    """The adaptive norm of a residual block."""
    import torch
    import torch.nn.functional as F

    def ours(x, scale_shift):
        return norm.group_norm(x, groups, 1 + scale_shift[:, :C], scale_shift[:, C:], silu=True)

    def theirs(x, scale_shift):
        scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
        return F.silu(torch.addcmul(shift, F.group_norm(x, groups), 1 + scale))
    return Case(f"group norm, modulation, silu {S}x{S}x{C}", ((S, S, C), (2 * C,)), (), ours, theirs, 8.0 * S * S * C,
                BYTE, 1.5)


def attention(what: str, N: int, M: int, C: int, heads: int, masked: bool) -> Case:
    """From the projections q (N, C) and k, v (M, 2 C) to the concatenated outputs of the heads (N, C)."""
    import torch.nn.functional as F
    d = C // heads

    def ours(q, kv, mask=None):
        B = q.shape[0]
        q = q.reshape(B, N, heads, d).transpose(0, 2, 1, 3)
        kv = kv.reshape(B, M, 2, heads, d).transpose(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, kv[0], kv[1], mask).transpose(0, 2, 1, 3).reshape(B, N, C)

    def theirs(q, kv, mask=None):
        q = q.unflatten(2, (heads, d)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, heads, d)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return Case(f"{what}, {N} to {M} tokens, {heads} heads of {d}", ((N, C), (M, 2 * C)), (), ours, theirs,
                4 * N * M * C, FLOP, mask=M if masked else 0)


def layer_norm(N: int, C: int) -> Case:
    import torch.nn.functional as F
    return Case(f"layer norm {N} x {C}", ((N, C),), ((C,), (C,)), norm.layer_norm,
                lambda x, g, b: F.layer_norm(x, (C,), g, b), 8.0 * N * C, BYTE, 1.5)


def gelu(N: int, C: int) -> Case:
    import torch.nn.functional as F
    return Case(f"gelu {N} x {C}", ((N, C),), (), ops.gelu, lambda x: F.gelu(x, approximate="tanh"), 8.0 * N * C, BYTE,
                1.5)


def elementwise(S: int, C: int) -> Iterator[Case]:
    """Ops that only move memory.  The gradients of add and concat are dy itself or views of it: no bytes."""
    import torch
    import torch.nn.functional as F
    x, floats = (S, S, C), 4.0 * S * S * C
    yield Case(f"silu {S}x{S}x{C}", (x,), (), ops.silu, F.silu, 2 * floats, BYTE, 1.5)
    yield Case(f"add {S}x{S}x{C}", (x, x), (), lambda x, h: x + h, lambda x, h: x + h, 3 * floats, BYTE, 0.0)
    yield Case(f"concat {S}x{S} {C}+{C}", (x, x), (), lambda x, h: ops.concat([x, h]),
               lambda x, h: torch.cat([x, h], dim=1), 4 * floats, BYTE, 0.0)


def folds(size: int, f: int) -> Iterator[Case]:
    """Squares of a grey image's pixels into channels, and back."""
    import torch.nn.functional as F
    S, work = size // f, 8.0 * size**2
    yield Case(f"patch {size}x{size}x1", ((size, size, 1),), (), lambda x: conv.space_to_depth(x, f),
               lambda x: F.pixel_unshuffle(x, f), work, BYTE, 1.0)
    yield Case(f"unpatch {S}x{S}x{f * f}", ((S, S, f * f),), (), lambda x: conv.depth_to_space(x, f),
               lambda x: F.pixel_shuffle(x, f), work, BYTE, 1.0)


def arrays_of(case: Case, batch: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray | None]:
    """Batched inputs, weights, and the mask."""
    rng = np.random.default_rng(0)
    # scaled so that outputs have the size of the inputs
    return ([rng.standard_normal((batch, *shape), dtype=np.float32) for shape in case.batched],
            [rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(math.prod(shape[:-1])))
             for shape in case.shared],
            ragged_mask(batch, case.mask)[:, None, None] if case.mask else None)


# --- the contestants: each case as functions of the number of repeats --------------------------------------
# One call gives minidiff's threads all repeats at once, as a training step gives them all their work at once.

def minidiff_runs(case: Case, batch: int) -> tuple[Callable, Callable]:
    """forward -> the shards' y;  both -> (their y, their gradients of batched inputs)."""
    batched, shared, mask = arrays_of(case, batch)
    weights = [Tensor(a, requires_grad=True) for a in shared]
    # inputs are inner nodes of a graph, as in a network, so their gradients are not copied as a leaf's would be
    leaf = Tensor(np.zeros((), np.float32), requires_grad=True)

    def masked(part: slice) -> tuple:
        return () if mask is None else (mask[part],)

    def forward_of(part: slice):
        with no_grad():
            return case.ours(*(Tensor(a[part]) for a in batched), *weights, *masked(part)).data

    def both_of(part: slice):
        dxs = [None] * len(batched)

        def inner(i: int, a) -> Tensor:
            def keep(dx):
                dxs[i] = dx
                return (None,)
            return record(a[part], (leaf,), keep)
        y = case.ours(*(inner(i, a) for i, a in enumerate(batched)), *weights, *masked(part))
        dws = gradients(y, weights, dy[part])
        return y.data, dxs, dws

    def forward(times: int = 1):
        return list(parallel_map(forward_of, shards(batch) * times))[:len(shards(batch))]

    def both(times: int = 1):
        n = len(shards(batch))
        ys, dxs, dws = zip(*parallel_map(both_of, shards(batch) * times), strict=True)
        for first in range(0, len(dws), n):
            for others in dws[first + 1:first + n]:
                for dw, other in zip(dws[first], others, strict=True):
                    dw += other
        return ys[:n], dxs[:n]

    dy = np.random.default_rng(1).standard_normal((batch, *forward()[0].shape[1:]), dtype=np.float32)
    return forward, both


def torch_runs(case: Case, batch: int, layout) -> tuple[Callable, Callable]:
    """forward -> y;  both -> (y, gradients of all inputs).  Images are (B, C, H, W) of that memory layout."""
    import torch
    torch.set_num_threads(cores())

    def there(a: np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(a))
        return (x.contiguous(memory_format=layout) if x.ndim == 4 else x).requires_grad_()
    batched, shared, mask = arrays_of(case, batch)
    inputs = [there(a.transpose(0, 3, 1, 2) if a.ndim == 4 else a) for a in batched]
    inputs += [there(case.door(a)) for a in shared]
    masked = () if mask is None else (torch.from_numpy(mask),)

    def forward(times: int = 1):
        with torch.no_grad():
            for _ in range(times):
                y = case.theirs(*inputs, *masked)
        return y

    def both(times: int = 1):
        for _ in range(times):
            y = case.theirs(*inputs, *masked)
            dxs = torch.autograd.grad(y, inputs, dy)
        return y, dxs

    # the same dy, in y's own memory layout
    shape = forward().shape
    dy = np.random.default_rng(1).standard_normal((batch, *_channels_last(shape)[1:]), dtype=np.float32)
    dy = torch.from_numpy(dy).permute(0, 3, 1, 2) if len(shape) == 4 else torch.from_numpy(dy)
    dy = torch.empty_like(forward()).copy_(dy)
    return forward, both


def _channels_last(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)


def check_equal(case: Case, ours: Callable, theirs: Callable) -> None:
    """Same weights, same inputs, same dy: y and the batched inputs' gradients must agree before any clock runs."""
    (ys, dxs), (y_torch, dxs_torch) = ours(), theirs()
    found = [np.concatenate(ys), *(np.concatenate(parts) for parts in zip(*dxs, strict=True))]
    for a, b in zip(found, [y_torch, *dxs_torch], strict=False):                    # the weights' come last
        b = (b.permute(0, 2, 3, 1) if b.ndim == 4 else b).detach().numpy()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max(), err_msg=case.name)


def update_runs(network: str) -> tuple[int, Callable, Callable]:
    """Clipping, AdamW and the average over all weights: (the number of weights, minidiff's, PyTorch's)."""
    import torch
    model, (rival, _) = minidiff_network(network), torch_network(network, channels_last=False)
    ours, theirs = minidiff_update(model.parameters()), torch_update(list(rival.parameters()))
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(p.shape, dtype=np.float32) for p in model.parameters().values()]
    for p in rival.parameters():
        p.grad = torch.from_numpy(rng.standard_normal(tuple(p.shape), dtype=np.float32))
    norm_of = {run: math.sqrt(sum(g.size for g in grads)) for run in ("ours", "theirs")}

    def clipped(run: str) -> float:                         # it falls with each call, so that clipping acts
        norm_of[run] *= 0.9
        return max(norm_of[run], 1e-12)
    return (sum(g.size for g in grads), lambda: ours(grads, clipped("ours")), lambda: theirs(clipped("theirs")))


# --- the machine ------------------------------------------------------------------------------------------

def ceilings() -> dict[str, float]:
    """GFLOP/s of a large product on all cores, GB/s of a copy (read and written): the best of either library."""
    import torch
    torch.set_num_threads(cores())
    n, size = 3072, 1 << 26                                 # 256 MiB of floats
    x, source, copy = np.ones((n, n), np.float32), np.ones(size, np.float32), np.empty(size, np.float32)
    xt, source_t, copy_t = (torch.from_numpy(a) for a in (x, source, copy))
    parts = [slice(i * size // cores(), (i + 1) * size // cores()) for i in range(cores())]

    def best(run: Callable) -> float:
        return min(take_turns({"": run}, 1, 6)[""])
    return {FLOP: 2 * n**3 / 1e9 / min(best(lambda: x @ x), best(lambda: xt @ xt)),
            BYTE: 8 * size / 1e9 / min(best(lambda: copy_t.copy_(source_t)), best(
                lambda: list(parallel_map(lambda part: np.copyto(copy[part], source[part]), parts))))}


# --- the tables -------------------------------------------------------------------------------------------

def medians(runs: Mapping[str, Callable], rounds: int) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in take_turns(runs, rounds, TURN).items()}


def medians_of_one(runs: Mapping[str, Callable], rounds: int) -> dict[str, float]:
    """The same for functions of `times`: a short op is repeated several times in a call."""
    runs["minidiff"]()
    began = time.perf_counter()
    runs["minidiff"]()
    times = min(max(int(CALL / (time.perf_counter() - began)), 1), 16)
    found = medians({name: partial(run, times) for name, run in runs.items()}, rounds)
    return {name: seconds / times for name, seconds in found.items()}


def compare_ops(networks: list[str], word: str, batch: int, rounds: int) -> None:
    import torch
    layouts = {"first": torch.contiguous_format, "last": torch.channels_last}
    best, slow, measured = ceilings(), [], []
    print(f"medians, batch {batch}, {cores()} cores; {versions()}\nceilings: {best[FLOP]:.0f} GFLOP/s, "
          f"{best[BYTE]:.1f} GB/s\n\n{'':66}{'minidiff':^20}{'PyTorch':^20}\n"
          f"{'':66}{'ms':>8}{'speed':>8}    {'ms':>8}{'speed':>8}    {'ratio':>6}{'floor ms':>10}  layout")

    def line(name: str, what: str, taken: dict[str, float], work: float, unit: str) -> None:
        rival = min((key for key in taken if key != "minidiff"), key=taken.get)
        us, them = taken["minidiff"], taken[rival]
        measured.append(name)
        if us > TOO_SLOW * them:
            slow.append(f"{name}, {what} ({us / them:.2f})")
        print(f"{name:57}{what:9}{1e3 * us:8.2f}{work / us:8.1f}    {1e3 * them:8.2f}{work / them:8.1f}"
              f"    {us / them:6.2f}{1e3 * work / best[unit]:10.2f}  {rival}, {unit}", flush=True)

    for network in networks:
        for case in cases(network):
            name = f"{network}: {case.name}"
            if word not in name:
                continue
            contestants = {"minidiff": minidiff_runs(case, batch)}
            # only an image has two layouts
            for layout in layouts if any(len(shape) == 3 for shape in case.batched) else ("first",):
                contestants[layout] = torch_runs(case, batch, layouts[layout])
                check_equal(case, contestants["minidiff"][1], contestants[layout][1])
            for i, (what, forwards) in enumerate((("forward", 1.0), ("both", 1.0 + case.backward))):
                line(name, what, medians_of_one({key: runs[i] for key, runs in contestants.items()}, rounds),
                     case.work * batch * forwards / 1e9, case.unit)
        name = f"{network}: update"
        if word in name:
            count, ours, theirs = update_runs(network)
            line(f"{name} of {count / 1e6:.2f} million weights", "step",
                 medians({"minidiff": ours, "fused": theirs}, rounds), 4.0 * count * 10 / 1e9, BYTE)
    if not measured:
        raise SystemExit(f"--only {word}: no op has this word in its name")
    print(f"\nabove {TOO_SLOW} times PyTorch's: {'; '.join(slow) or 'none'}")


def compare_forms(batch: int, rounds: int) -> None:
    """The times of the forms of convolution, on which conv._fastest is based.  dx is a correlation like y."""
    print(f"median ms of a convolution, batch {batch} in shards, {cores()} cores; NumPy {np.__version__}\n")
    forms = "patches", "shift", "winograd"
    titles = [f"{what} {form}" for what in ("y", "dw") for form in forms]
    print(f"{'':24}" + "".join(f"{title:>14}" for title in titles) + "   chosen")
    shapes = [(3, H, C, D) for H, C, D in ((56, 32, 32), (48, 32, 32), (40, 32, 32), (32, 32, 32), (28, 64, 64),
                                           (14, 4, 64), (14, 64, 64), (14, 128, 64), (7, 128, 128), (7, 256, 128))]
    for k, H, C, D in [*shapes, *((5, H, 64, 64) for H in (14, 12, 10, 9, 7))]:
        taken = [medians(runs, rounds) for runs in forms_of(k, H, C, D, batch)]
        cells = [f"{1e3 * seconds[form]:14.2f}" if form in seconds else f"{'-':>14}"
                 for seconds in taken for form in forms]
        chosen = conv._fastest((batch, H, H, C), (k, k, C, D), 1, k // 2)
        print(f"{f'{k}x{k} on {H}x{H} {C}->{D}':24}" + "".join(cells)
              + f"   {chosen.__name__.rpartition('_')[2] if chosen else 'patches'}", flush=True)


def forms_of(k: int, H: int, C: int, D: int, batch: int) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """y and dw by each form that takes k x k, as functions without arguments whose results agree."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, H, H, C), dtype=np.float32)
    dy = rng.standard_normal((batch, H, H, D), dtype=np.float32)
    w, p = rng.standard_normal((k, k, C, D), dtype=np.float32), k // 2
    y_by = {"patches": lambda part: conv.plain_correlate(x[part], w, 1, p),
            "shift": lambda part: conv_shift.correlate(x[part], w, p),
            "winograd": lambda part: conv_winograd.correlate(x[part], w, p)}
    dw_by = {"patches": lambda part: conv.plain_correlate_dw(x[part], dy[part], w.shape, 1, p),
             "shift": lambda part: conv_shift.correlate_dw(x[part], dy[part], w.shape, p),
             "winograd": lambda part: conv_winograd.correlate_dw(x[part], dy[part], w.shape, p)}
    if k != 3:                                              # Winograd's form takes 3 x 3 only
        del y_by["winograd"], dw_by["winograd"]
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
    parser.add_argument("--network", choices=NETWORKS, help="one network's ops (both networks')")
    parser.add_argument("--batch", type=positive, default=128, help="samples (128)")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each contestant (5)")
    parser.add_argument("--only", default="", metavar="WORD", help="the cases whose name contains this word")
    parser.add_argument("--forms", action="store_true", help="compare the forms of convolution; no PyTorch")
    args = parser.parse_args()
    keep_freed_memory()
    if args.forms:
        compare_forms(args.batch, args.rounds)
    else:
        compare_ops([args.network] if args.network else list(NETWORKS), args.only, args.batch, args.rounds)


if __name__ == "__main__":
    main()
