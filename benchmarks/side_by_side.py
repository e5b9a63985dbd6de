"""Shared by train_step.py, sample.py and ops.py: networks, an equal start, turns, tables, and peak memory.

Contestants do the same work in one process and take turns, so other work on the machine slows all of them.  Before any
timing, their results are compared with minidiff's; a different result ends the run.  The ratio is minidiff's median to
the best of PyTorch's medians.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minidiff.engine.backend import keep_freed_memory
from minidiff.engine.parallel import cores
from minidiff.nn.optim import EMA, AdamW, AdamWConfig, clip_by_norm
from minidiff.nn.unet import UNetConfig
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.text.tokenizer import Tokenizer

NETWORKS = {
    "mnist": TextToImageConfig(),
    "large": TextToImageConfig(shape=(32, 32, 3),
                               unet=UNetConfig(channels=3, widths=(128, 256), embedding=512, text=64)),
}
MINIDIFF, FIRST, LAST = "minidiff", "PyTorch, channels first", "PyTorch, channels last"
COMPILED, COMPILED_LAST = "PyTorch, compiled", "PyTorch, compiled, last"
NAMES = (MINIDIFF, FIRST, LAST, COMPILED, COMPILED_LAST)
LR, MAX_NORM, EMA_DECAY = 1e-3, 1.0, 0.999

Run = Callable[[], np.ndarray | float]                      # does the work once -> the result to compare


# --- an equal start ---------------------------------------------------------------------------------------

def same_weights(network: str = "mnist") -> dict[str, np.ndarray]:
    """A minidiff state_dict of the network, the same in every process; no layer is 0."""
    rng = np.random.default_rng(0)
    state = TextToImage(NETWORKS[network], Tokenizer(), rng).state_dict()
    return {name: w + 0.02 * rng.standard_normal(w.shape, dtype=np.float32) for name, w in state.items()}


def same_batch(batch: int, network: str = "mnist") -> tuple[np.ndarray, ...]:
    """(x_0, ids, mask, t, eps), the same in every process; captions have 2 to 16 tokens."""
    rng, config = np.random.default_rng(1), NETWORKS[network]
    shape = batch, *config.shape                            # (B, H, W, C)
    x_0 = rng.uniform(-1, 1, shape).astype(np.float32)
    mask = ragged_mask(batch, 16)
    ids = np.where(mask, rng.integers(0, config.text.vocab, mask.shape), 0)
    return x_0, ids, mask, rng.integers(0, config.T, batch), rng.standard_normal(shape, dtype=np.float32)


def ragged_mask(batch: int, longest: int) -> np.ndarray:
    """(B, longest) bool: captions of 2 to `longest` tokens; at least one has the full length."""
    ends = np.append(np.random.default_rng(2).integers(2, longest + 1, batch - 1), longest)
    return np.arange(longest) < ends[:, None]


def same_start(batch: int, network: str = "mnist") -> tuple[dict, tuple]:
    """Weights and a batch."""
    return same_weights(network), same_batch(batch, network)


def minidiff_network(network: str, tokenizer: Tokenizer | None = None) -> TextToImage:
    keep_freed_memory()
    model = TextToImage(NETWORKS[network], tokenizer or Tokenizer(), np.random.default_rng(0))
    model.load_state_dict(same_weights(network))
    return model


def torch_network(network: str, channels_last: bool) -> tuple:
    """The same network with the same weights, and the memory format of its images."""
    import torch
    import torch_model
    torch.set_num_threads(cores())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = torch_model.TextToImage(NETWORKS[network])
    torch_model.load(model, same_weights(network))
    return model.to(memory_format=layout), layout


def compiled(function):
    """torch.compile for the present shapes; forgets what it compiled for others."""
    import torch
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def minidiff_update(parameters: dict) -> Callable:
    """(gradients in the parameters' order, largest norm): clipping, AdamW and the average of the weights."""
    adamw, ema = AdamW(parameters), EMA(parameters, EMA_DECAY)

    def update(grads: Sequence, max_norm: float = MAX_NORM) -> None:
        clip_by_norm(grads, max_norm)
        adamw.step(grads, LR)
        ema.step()
    return update


def torch_update(parameters: Sequence) -> Callable:
    """(largest norm): the same from the parameters' own .grad, each step in PyTorch's fused or foreach form."""
    import torch
    c = AdamWConfig()
    adamw = torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": c.decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ], lr=LR, betas=(c.b1, c.b2), eps=c.eps, fused=True)
    average, n = [p.detach().clone() for p in parameters], 0

    def update(max_norm: float = MAX_NORM) -> None:
        nonlocal n
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
        adamw.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(EMA_DECAY, (1 + n) / (10 + n)))
        n += 1
    return update


# --- turns ------------------------------------------------------------------------------------------------

def take_turns(runs: Mapping[str, Callable], rounds: int, turn: int) -> dict[str, list[float]]:
    """Seconds of each call; the first of each turn finds cold caches and is not timed."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            for _ in range(turn):
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    return seconds


@dataclass(frozen=True)
class Work:
    """The work that is compared, and the contestants: name -> (network, batch) -> Run."""

    what: str                               # for people
    contestants: Mapping[str, Callable[[str, int], Run]]
    batches: tuple[int, ...]                # the batch sizes of --all
    checked: int                            # number of runs whose results must agree
    rtol: float                             # to this relative error
    atol: float                             # or this absolute one


@dataclass
class Outcome:
    """One row of the table: median seconds and peak MiB of each contestant."""

    network: str
    batch: int
    medians: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)


def compare_times(work: Work, network: str, batch: int, names: Sequence[str], rounds: int, turn: int) -> Outcome:
    """Starts the contestants, compares their results with minidiff's, lets them take turns, and prints."""
    runs, results = {}, {}
    for name in names:
        began = time.perf_counter()
        try:
            runs[name] = work.contestants[name](network, batch)
            results[name] = np.array([runs[name]() for _ in range(work.checked)])
        except Exception as error:  # noqa: BLE001  (a compiler can fail in any way; the others continue)
            if "compiled" not in name:
                raise
            runs.pop(name, None)
            print(f"{name}: left out, {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        print(f"{name}: {_shown(results[name])} ({time.perf_counter() - began:.1f} s to start)", flush=True)
    first = MINIDIFF if MINIDIFF in runs else next(iter(runs), "")
    for name in runs:
        if not np.allclose(results[name], results[first], rtol=work.rtol, atol=work.atol):
            raise SystemExit(f"{name} does not compute the same as {first}: no times are compared")

    seconds = take_turns(runs, rounds, turn)
    print(f"\nms a {work.what}, {network}, batch {batch}, {rounds} rounds of {turn}, {cores()} cores; {versions()}\n"
          f"{'':26}{'min':>9}{'median':>9}{'max':>9}")
    for name, taken in seconds.items():
        low, middle, high = min(taken), statistics.median(taken), max(taken)
        print(f"{name:26}{1e3 * low:9.1f}{1e3 * middle:9.1f}{1e3 * high:9.1f}")
    for what, statistic in (("medians", statistics.median), ("mins", min)):
        found = {name: statistic(taken) for name, taken in seconds.items()}
        if MINIDIFF in found and len(found) > 1:
            print(f"minidiff / PyTorch's best, of {what}: {ratio(found):.2f}  ({best_rival(found)})", flush=True)
    return Outcome(network, batch, {name: statistics.median(taken) for name, taken in seconds.items()})


def _shown(results: np.ndarray) -> str:
    return (", ".join(f"{r:.6f}" for r in results) if results.ndim == 1
            else f"mean {results.mean():.6f}, mean square {np.square(results).mean():.6f}")


def best_rival(found: Mapping[str, float]) -> str | None:
    return min((name for name in found if name != MINIDIFF), key=found.get, default=None)


def ratio(found: Mapping[str, float]) -> float:
    """minidiff's number divided by the least of PyTorch's."""
    return found[MINIDIFF] / found[best_rival(found)]


def versions() -> str:
    torch = sys.modules.get("torch")
    return f"NumPy {np.__version__}" + (f", PyTorch {torch.__version__}" if torch else "")


# --- memory -----------------------------------------------------------------------------------------------

def compare_memory(network: str, batch: int, names: Sequence[str], count: int) -> dict[str, float]:
    """Each contestant's peak resident memory in MiB; prints the part of the interpreter and the imports beside it."""
    print(f"\nMiB resident after {count} runs, {network}, batch {batch}\n"
          f"{'':26}{'imports':>9}{'peak':>9}{'peak - imports':>16}")
    peaks = {}
    for name in names:
        run = subprocess.run([sys.executable, sys.argv[0], "--network", network, "--batch", str(batch),
                              "--measure-memory-of", name, "--turn", str(count)], capture_output=True, text=True)
        if run.returncode:
            print(f"{name:26} left out: {run.stderr.strip().splitlines()[-1]}")
            continue
        before, peaks[name] = (float(word) for word in run.stdout.split()[-2:])
        print(f"{name:26}{before:9.0f}{peaks[name]:9.0f}{peaks[name] - before:16.0f}", flush=True)
    return peaks


def measure_memory(work: Work, network: str, batch: int, name: str, count: int) -> None:
    """In a separate process: prints the peak after the imports, and after `count` runs."""
    if name != MINIDIFF:
        import torch_model  # noqa: F401
    before = peak_mib()
    run = work.contestants[name](network, batch)
    for _ in range(count):
        run()
    print(before, peak_mib())


def peak_mib() -> float:
    """This process's largest resident memory so far."""
    status = Path("/proc/self/status")
    if status.exists():                                     # on Linux ru_maxrss starts at the parent's value
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss                       # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --- the command ------------------------------------------------------------------------------------------

def positive(text: str) -> int:
    """An option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def parser_of(doc: str, batch: int, rounds: int, turn: int) -> argparse.ArgumentParser:
    """The options that train_step.py and sample.py have in common."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="mnist", help="which network (mnist)")
    parser.add_argument("--batch", type=positive, default=batch, help=f"images at a time ({batch})")
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"turns of each contestant ({rounds})")
    parser.add_argument("--turn", type=positive, default=turn, help=f"runs that are timed in a turn ({turn})")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", default=list(NAMES),
                        help=f"contestants to run: {', '.join(map(repr, NAMES))}")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--all", action="store_true", help="both networks, every batch, time and memory: one table")
    parser.add_argument("--measure-memory-of", choices=NAMES, help=argparse.SUPPRESS)
    return parser


def run(work: Work, args: argparse.Namespace) -> None:
    if args.measure_memory_of:
        measure_memory(work, args.network, args.batch, args.measure_memory_of, args.turn)
        return
    if not args.all:
        print(describe(args.network))
        if args.memory:
            compare_memory(args.network, args.batch, args.only, max(args.turn, 5))
        else:
            compare_times(work, args.network, args.batch, args.only, args.rounds, args.turn)
        return
    outcomes = []
    for network in NETWORKS:
        print(f"\n{describe(network)}")
        for batch in work.batches:
            outcome = compare_times(work, network, batch, args.only, args.rounds, args.turn)
            # a compiled contestant's memory includes its compiler: the eager ones are compared
            eager = [name for name in args.only if "compiled" not in name]
            outcome.peaks |= compare_memory(network, batch, eager, max(args.turn, 5))
            outcomes.append(outcome)
    print(f"\nmedian ms a {work.what}, {cores()} cores; {versions()}\n\n{markdown(outcomes, args.only)}")


def describe(network: str) -> str:
    """The network in one line: its images, widths and parameters."""
    def count(name: str, part: str = "") -> int:
        return sum(w.size for path, w in same_weights(name).items() if path.startswith(part))
    config, unet = NETWORKS[network], count(network, "unet.")
    images = "x".join(map(str, config.shape))
    return (f"{network}: images {images}, widths {config.unet.widths}, {unet:,} parameters of the UNet "
            f"({unet / count('mnist', 'unet.'):.2f} times the default's), {count(network):,} in all")


def markdown(outcomes: Sequence[Outcome], names: Sequence[str]) -> str:
    """One row for each outcome: medians, the ratio to PyTorch's best, and peak MiB beside PyTorch's least."""
    columns = ["network", "batch", *names, "ratio to PyTorch's best", "peak MiB, minidiff / PyTorch's least", "ratio"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for o in outcomes:
        times = [f"{1e3 * o.medians[name]:.1f}" if name in o.medians else "left out" for name in names]
        against = f"**{ratio(o.medians):.2f}**" if MINIDIFF in o.medians and best_rival(o.medians) else ""
        peaks, of_peaks = "", ""
        if MINIDIFF in o.peaks and best_rival(o.peaks):
            peaks, of_peaks = f"{o.peaks[MINIDIFF]:.0f} / {o.peaks[best_rival(o.peaks)]:.0f}", f"{ratio(o.peaks):.2f}"
        lines.append("| " + " | ".join([o.network, str(o.batch), *times, against, peaks, of_peaks]) + " |")
    return "\n".join(lines)
