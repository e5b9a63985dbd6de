"""One whole training step on a GPU, minidiff's Trainer.step beside PyTorch eager: `train_step.py --device cuda`.

Each contestant is a network, an optimiser and a way to get batches. Before any timing all of them repeat one batch from
the same weights, and their losses must agree. Then each draws its own batches with the same code: captions and tokens
on the host, noise and images on the GPU. The time is the host's time of a turn of steps, which ends when the GPU is
done, as a user waits for it. Within a turn nothing waits for a loss.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np

from minidiff.data import mnist
from minidiff.data.digits import Digits
from minidiff.engine.backend import to_device
from minidiff.nn.optim import AdamWConfig
from minidiff.systems.stage import Step
from minidiff.systems.text_to_image import TextToImage, TextToImageConfig
from minidiff.training.trainer import TrainConfig, Trainer

MODES = ("float32", "tf32", "float16", "bfloat16")
AGREEMENT = {"float32": 1e-4, "tf32": 2e-3, "float16": 1e-2, "bfloat16": 3e-2}      # relative, between losses
CHECKED_STEPS, TURN = 3, 20
MINIDIFF, FIRST, LAST = "minidiff", "PyTorch, channels first", "PyTorch, channels last"


def config_of(batch: int, mode: str) -> TrainConfig:
    """A rate that does not change, and the default's other settings as train_step.py has them."""
    return TrainConfig(batch=batch, steps=10**9, lr=1e-3, warmup=0, ema=0.999,
                       precision="float32" if mode == "tf32" else mode)


# --- the contestants: step() returns a loss without waiting for it --------------------------------------

class Minidiff:
    """The Trainer itself."""

    def __init__(self, state: dict, data: Digits, tokenizer, batch: int, mode: str, device: str = "cuda"):
        model = TextToImage(TextToImageConfig(), tokenizer, np.random.default_rng(0))
        model.load_state_dict(state)
        stage = next(model.to(device).stages(data))
        self.trainer, self.device = Trainer(stage, config_of(batch, mode), device=device), device
        self._draw = self.trainer.batch

    def repeat(self, batch: tuple | None) -> None:
        """Every step takes this batch; with None each step draws its own."""
        if batch is not None:
            x_0, ids, mask, t, eps = batch
            batch = to_device(x_0, self.device), ids, mask, t, to_device(eps, self.device)
        self.trainer.batch = self._draw if batch is None else lambda: batch

    def step(self):
        return self.trainer.step()


class PyTorch:
    """The same network with batches from the same code, and PyTorch's own mixed precision."""

    def __init__(self, state: dict, data: Digits, tokenizer, batch: int, mode: str, device: str = "cuda",
                 channels_last: bool = False):
        import torch
        import torch_model
        self.torch, self.device = torch, torch.device(device)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        model = torch_model.TextToImage(TextToImageConfig())
        torch_model.load(model, state)
        self.model = model.to(self.device, memory_format=self.layout)
        self.config, c = config_of(batch, mode), AdamWConfig()
        self.parameters, self.n = list(model.parameters()), 0
        self.adamw = torch.optim.AdamW([
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": c.decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ], lr=self.config.lr, betas=(c.b1, c.b2), eps=c.eps, fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self.half = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(mode)
        self.scaler = torch.amp.GradScaler(device, enabled=mode == "float16")
        # batches from the stage's own code, with noise that PyTorch draws on the card
        host = TextToImage(TextToImageConfig(), tokenizer, np.random.default_rng(0))
        self.feeder = next(host.stages(data))
        self.repeat(None)

    def repeat(self, batch: tuple | None) -> None:
        fixed = None if batch is None else tuple(self._there(a) for a in batch)
        self._batch = self._draw if batch is None else lambda: fixed

    def _draw(self) -> tuple:
        return tuple(map(self._there, self.feeder.batch(_Step(self))))

    def _there(self, a):
        return (self.torch.from_numpy(a) if isinstance(a, np.ndarray) else a).to(self.device, non_blocking=True)

    def step(self):
        torch, config = self.torch, self.config
        x_0, ids, mask, t, eps = self._batch()
        x_0, eps = (a.permute(0, 3, 1, 2).contiguous(memory_format=self.layout) for a in (x_0, eps))
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            loss = self.model(x_0, ids, mask, t, eps)
        self.adamw.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.adamw)
        torch.nn.utils.clip_grad_norm_(self.parameters, config.clip, foreach=True)
        self.scaler.step(self.adamw)
        self.scaler.update()
        with torch.no_grad():
            d = min(config.ema, (1 + self.n) / (10 + self.n))
            torch._foreach_lerp_(self.average, self.parameters, 1 - d)
        self.n += 1
        return loss.detach()


class _Step(Step):
    """A step whose noise PyTorch draws on the card."""

    def __init__(self, contestant: PyTorch):
        c = contestant.config
        super().__init__(c.seed, 1, contestant.n, c.steps, c.batch)
        self._contestant = contestant

    def normal(self, shape: tuple[int, ...]):
        return self._contestant.torch.randn(*shape, device=self._contestant.device)


# --- the comparison ---------------------------------------------------------------------------------------

def contestants(state: dict, data: Digits, tokenizer, batch: int, torch) -> Iterator[tuple[str, Callable]]:
    """(name, mode -> contestant), minidiff first."""
    yield MINIDIFF, lambda mode: Minidiff(state, data, tokenizer, batch, mode)
    if torch:
        yield FIRST, lambda mode: PyTorch(state, data, tokenizer, batch, mode)
        yield LAST, lambda mode: PyTorch(state, data, tokenizer, batch, mode, channels_last=True)


def use_tf32(on: bool, torch) -> None:
    """Switches TF32 in CuPy's matrix products, in the choice of our kernels, and in PyTorch."""
    import cupy
    from cupy._core import _routines_linalg, set_compute_type
    os.environ["CUPY_TF32"] = "1" if on else "0"
    set_compute_type(cupy.float32, _routines_linalg.COMPUTE_TYPE_TF32 if on else _routines_linalg.COMPUTE_TYPE_DEFAULT)
    if torch:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = on


def launches_of(step: Callable, torch, synchronize: Callable) -> int | None:
    """The number of kernels in a step, by PyTorch's profiler, which counts CuPy's too; None if it counts none."""
    if torch is None:
        return None
    from torch.profiler import ProfilerActivity, profile
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        synchronize()
    kernels = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA
               and not event.name.startswith(("Memcpy", "Memset"))]
    return len(kernels) or None


def compare(start: tuple[dict, tuple], modes: tuple[str, ...], rounds: int, json_path: Path | None) -> int:
    """Prints the table and writes the numbers to a file; returns 1 if a contestant computes something else."""
    import cupy

    from kernels import machine, sentence_of, torch_or_none
    state, fixed = start
    batch, torch, synchronize = len(fixed[0]), torch_or_none(), cupy.cuda.Device().synchronize
    data, tokenizer = Digits.of(mnist.load(download=False, quiet=True)), TextToImage.load().tokenizer
    found, failed = [], False
    for mode in modes:
        use_tf32(mode == "tf32", torch)
        ready, losses, rows = {}, {}, {}
        for name, make in contestants(state, data, tokenizer, batch, torch):
            rows[name] = {"who": name, "mode": mode, "ms": None}
            try:
                one = make(mode)
                one.repeat(fixed)
                losses[name] = [float(one.step()) for _ in range(CHECKED_STEPS)]
                # in float16 the loss scales skip different first steps, so only the first loss is compared
                many = 1 if mode == "float16" else CHECKED_STEPS
                if MINIDIFF in losses and not np.allclose(losses[name][:many], losses[MINIDIFF][:many],
                                                          rtol=AGREEMENT[mode], atol=0):
                    raise ArithmeticError(f"its losses {losses[name]} are not minidiff's {losses[MINIDIFF]}")
                one.repeat(None)
                one.step()
                rows[name]["launches"] = launches_of(one.step, torch, synchronize)
                ready[name] = one
            except Exception as error:  # noqa: BLE001  (the others continue)
                rows[name]["note"], failed = sentence_of(error), True
        for name, taken in take_turns({name: one.step for name, one in ready.items()}, rounds, synchronize).items():
            rows[name] |= {"ms": statistics.median(taken), "min": min(taken), "max": max(taken)}
        rivals = [row["ms"] for name, row in rows.items() if name != MINIDIFF and row["ms"]]
        if rivals and rows[MINIDIFF]["ms"]:
            rows[MINIDIFF]["of_rival"] = min(rivals) / rows[MINIDIFF]["ms"]
        found += rows.values()
        for row in rows.values():
            print(f"{row['who']:26}{mode:10}" + (f"{row['ms']:8.2f} ms  ({row['min']:.2f} to {row['max']:.2f}), "
                  f"{row['launches'] or 'uncounted'} launches" if row["ms"] else row["note"]), flush=True)
        report = {"machine": machine(torch), "date": date.today().isoformat(), "batch": batch, "steps": found}
        if json_path:                                       # after each mode, since a time limit may end the run
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return int(failed)


def take_turns(steps: dict[str, Callable], rounds: int, synchronize: Callable) -> dict[str, list[float]]:
    """Milliseconds per step for each contestant and turn; the first step of a turn is not timed."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            synchronize()
            began = time.perf_counter()
            for _ in range(TURN):
                step()
            synchronize()
            taken[name].append(1e3 * (time.perf_counter() - began) / TURN)
    return taken
