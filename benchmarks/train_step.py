"""One training step of the default model, minidiff beside PyTorch, in one run.

    python benchmarks/train_step.py                      batch 128: time, and the ratio to PyTorch's best
    python benchmarks/train_step.py --batch 32
    python benchmarks/train_step.py --memory             peak memory, each contestant in a process of its own
    python benchmarks/train_step.py --device cuda        the whole Trainer.step on a GPU: train_step_cuda.py

A step is noising, forward, backward, clipping, AdamW and the moving average of the weights.  All contestants
start from the same weights and repeat the same batch; before any clock runs, the losses of their first steps
are held against minidiff's.  Then they take turns, so that a busy minute of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from minidiff.engine.backend import check_device, keep_freed_memory
from minidiff.engine.parallel import cores, parallel_gradients
from minidiff.errors import UserError
from minidiff.nn.optim import EMA, AdamW, AdamWConfig, clip_by_norm
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.text.tokenizer import Tokenizer

MODES = ("float32", "tf32", "float16", "bfloat16")          # of a GPU
LR, MAX_NORM, EMA_DECAY = 1e-3, 1.0, 0.999
CHECKED_STEPS, AGREEMENT = 3, 1e-4                          # relative, between losses in float32
Step = Callable[[], float]                                  # one training step -> its loss


# --- the contestants --------------------------------------------------------------------------------------

def minidiff_step(state: dict, batch: tuple) -> Step:
    keep_freed_memory()
    config = TextToImageConfig()
    model = TextToImage(config, Tokenizer(), np.random.default_rng(0))
    model.load_state_dict(state)
    parameters = model.parameters()
    leaves, adamw, ema = list(parameters.values()), AdamW(parameters), EMA(parameters, EMA_DECAY)
    count = len(batch[0])

    def step() -> float:
        loss, grads = parallel_gradients(lambda part: model.loss(*(a[part] for a in batch)), leaves, count)
        clip_by_norm(grads, MAX_NORM)
        adamw.step(grads, LR)
        ema.step()
        return loss
    return step


def torch_step(state: dict, batch: tuple, *, channels_last: bool = False, compiled: bool = False) -> Step:
    import torch
    import torch_model
    torch.set_num_threads(cores())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = torch_model.TextToImage(TextToImageConfig())
    torch_model.load(model, state)
    model = model.to(memory_format=layout)
    x_0, ids, mask, t, eps = (torch.from_numpy(a) for a in batch)
    x_0, eps = (a.permute(0, 3, 1, 2).contiguous(memory_format=layout) for a in (x_0, eps))

    parameters, c = list(model.parameters()), AdamWConfig()
    adamw = torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": c.decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ], lr=LR, betas=(c.b1, c.b2), eps=c.eps, fused=True)
    average, n = [p.detach().clone() for p in parameters], 0
    loss_of = torch.compile(model) if compiled else model

    def step() -> float:
        nonlocal n
        loss = loss_of(x_0, ids, mask, t, eps)
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
        adamw.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(EMA_DECAY, (1 + n) / (10 + n)))
        n += 1
        return loss.item()
    return step


MINIDIFF = "minidiff"
CONTESTANTS: dict[str, Callable[[dict, tuple], Step]] = {
    MINIDIFF: minidiff_step,
    "PyTorch, channels first": torch_step,
    "PyTorch, channels last": partial(torch_step, channels_last=True),
    "PyTorch, compiled": partial(torch_step, compiled=True),
    "PyTorch, compiled, last": partial(torch_step, compiled=True, channels_last=True),
}


def same_start(batch_size: int) -> tuple[dict, tuple]:
    """Weights (a minidiff state_dict) and a batch (x_0, ids, mask, t, eps), the same wherever they are made."""
    rng, config, B = np.random.default_rng(0), TextToImageConfig(), batch_size
    state = TextToImage(config, Tokenizer(), rng).state_dict()
    for name, w in state.items():                           # no layer at 0: every branch counts in the losses
        state[name] = w + 0.02 * rng.standard_normal(w.shape, dtype=np.float32)
    shape = B, config.image_size, config.image_size, config.unet.channels
    x_0 = rng.uniform(-1, 1, shape).astype(np.float32)
    mask = np.arange(16) < np.append(rng.integers(2, 17, B - 1), 16)[:, None]       # captions of 2..16 tokens
    ids = np.where(mask, rng.integers(0, config.text.vocab, mask.shape), 0)
    t = rng.integers(0, config.T, B)
    return state, (x_0, ids, mask, t, rng.standard_normal(shape, dtype=np.float32))


# --- time -------------------------------------------------------------------------------------------------

def compare_times(names: list[str], batch: int, rounds: int, turn: int) -> None:
    start, steps, losses = same_start(batch), {}, {}
    for name in names:
        began = time.perf_counter()
        try:
            steps[name] = CONTESTANTS[name](*start)
            losses[name] = [steps[name]() for _ in range(CHECKED_STEPS)]
        except Exception as error:  # noqa: BLE001  (a compiler can fail in any way, and the others go on)
            if "compiled" not in name:
                raise
            steps.pop(name, None)
            print(f"{name}: left out, {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        print(f"{name}: first losses {', '.join(f'{loss:.6f}' for loss in losses[name])} "
              f"({time.perf_counter() - began:.1f} s to start)", flush=True)
    for name in steps:
        if not np.allclose(losses[name], losses[names[0]], rtol=AGREEMENT, atol=0):
            raise SystemExit(f"{name} does not compute what {names[0]} does: no times are compared")

    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()                                          # the first step of a turn finds cold caches: not timed
            for _ in range(turn):
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)

    print(f"\nms a step, batch {batch}, {rounds} rounds of {turn} steps, {cores()} cores; {versions()}")
    print(f"{'':26}{'min':>9}{'median':>9}{'max':>9}")
    for name, taken in seconds.items():
        low, middle, high = min(taken), statistics.median(taken), max(taken)
        print(f"{name:26}{1e3 * low:9.1f}{1e3 * middle:9.1f}{1e3 * high:9.1f}")
    rivals = [name for name in seconds if name != MINIDIFF]
    if MINIDIFF in seconds and rivals:
        for what, statistic in (("medians", statistics.median), ("mins", min)):
            best = min(rivals, key=lambda name: statistic(seconds[name]))
            print(f"minidiff / PyTorch's best, of {what}: "
                  f"{statistic(seconds[MINIDIFF]) / statistic(seconds[best]):.2f}  ({best})")


def versions() -> str:
    torch = sys.modules.get("torch")
    return f"NumPy {np.__version__}" + (f", PyTorch {torch.__version__}" if torch else "")


# --- memory -----------------------------------------------------------------------------------------------

def compare_memory(names: list[str], batch: int, count: int) -> None:
    """The peak of each contestant's resident memory, and how much of it the interpreter and imports are."""
    print(f"MiB resident after {count} steps, batch {batch}")
    print(f"{'':26}{'imports':>9}{'peak':>9}{'peak - imports':>16}")
    for name in names:
        run = subprocess.run([sys.executable, __file__, "--batch", str(batch), "--measure-memory-of", name,
                              "--turn", str(count)], capture_output=True, text=True)
        if run.returncode:
            print(f"{name:26} left out: {run.stderr.strip().splitlines()[-1]}")
            continue
        before, peak = (float(word) for word in run.stdout.split()[-2:])
        print(f"{name:26}{before:9.0f}{peak:9.0f}{peak - before:16.0f}", flush=True)


def measure_memory(name: str, batch: int, count: int) -> None:
    if name != MINIDIFF:
        import torch_model  # noqa: F401
    before = peak_mib()
    step = CONTESTANTS[name](*same_start(batch))
    for _ in range(count):
        step()
    print(before, peak_mib())


def peak_mib() -> float:
    """This process's largest resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                       # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("--batch", type=int, default=128, help="images a step (128)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contestant (10)")
    parser.add_argument("--turn", type=int, default=3, help="steps that are timed in a turn (3)")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", default=list(CONTESTANTS),
                        help=f"contestants to run: {', '.join(map(repr, CONTESTANTS))}")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (cpu)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="precisions on a GPU (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to leave the numbers of a GPU")
    parser.add_argument("--measure-memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda":
        try:
            check_device("cuda")
        except UserError as error:
            print(f"benchmarks/train_step.py: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        import train_step_cuda
        raise SystemExit(train_step_cuda.compare(same_start(args.batch), args.modes, args.rounds, args.json))
    if args.measure_memory_of:
        measure_memory(args.measure_memory_of, args.batch, args.turn)
    elif args.memory:
        compare_memory(args.only, args.batch, max(args.turn, 5))
    else:
        compare_times(args.only, args.batch, args.rounds, args.turn)


if __name__ == "__main__":
    main()
