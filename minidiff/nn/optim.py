"""AdamW, clipping, the learning rate's course, and the moving average of the weights.

    m <- b1 m + (1 - b1) g              v <- b2 v + (1 - b2) g^2
    w <- w - lr ( m^ / (sqrt(v^) + eps) + decay w ),   m^ = m / (1 - b1^n),  v^ = v / (1 - b2^n)

(Kingma & Ba 2015, algorithm 1; decoupled decay: Loshchilov & Hutter 2019, algorithm 2.)  What stands here is NumPy's;
`UpdateOnDevice` does the same for a GPU, where nobody may wait for a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minidiff.engine.backend import device_of, to_device, to_numpy, xp_of
from minidiff.engine.parallel import in_parts
from minidiff.engine.tensor import Tensor


@dataclass(frozen=True)
class AdamWConfig:
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    decay: float = 0.01                     # of matrices and kernels; vectors (biases, norms) do not decay


class AdamW:
    """Updates parameters (name -> Tensor) in place from a list of gradients in the same order."""

    def __init__(self, parameters: dict[str, Tensor], config: AdamWConfig = AdamWConfig()):  # noqa: B008 (frozen)
        self.parameters, self.config, self.n = parameters, config, 0
        self.m = {name: xp_of(p.data).zeros_like(p.data) for name, p in parameters.items()}
        self.v = {name: xp_of(p.data).zeros_like(p.data) for name, p in parameters.items()}

    def step(self, grads: Sequence, lr: float) -> None:
        c = self.config
        self.n += 1
        m_scale = 1 / (1 - c.b1**self.n)
        v_scale = 1 / (1 - c.b2**self.n)

        def update(part: list) -> None:
            for (name, p), g in part:
                m, v, w = self.m[name], self.v[name], p.data
                # m <- b1 m + (1 - b1) g
                m *= c.b1
                m += (1 - c.b1) * g
                # v <- b2 v + (1 - b2) g^2
                v *= c.b2
                v += (1 - c.b2) * (g * g)
                # w <- w - lr ( m^ / (sqrt(v^) + eps) + decay w )
                change = xp_of(w).asarray(v * v_scale)      # of a parameter of shape () NumPy makes a number
                xp_of(w).sqrt(change, out=change)
                change += c.eps
                xp_of(w).divide(m, change, out=change)
                change *= lr * m_scale
                if w.ndim > 1:
                    w *= 1 - lr * c.decay
                w -= change
        _on_all_cores(update, list(zip(self.parameters.items(), grads, strict=True)), grads)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {f"{kind}.{name}": to_numpy(a).copy() for kind, held in (("m", self.m), ("v", self.v))
                for name, a in held.items()} | {"n": np.array(self.n, dtype=np.int64)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.n = int(state["n"])
        for kind, held in (("m", self.m), ("v", self.v)):
            for name, a in held.items():
                held[name] = to_device(np.array(state[f"{kind}.{name}"]), device_of(a))


def clip_by_norm(grads: Sequence, max_norm: float, scale: float = 1.0) -> float:
    """Scales all gradients in place by one factor so that their common 2-norm is at most max_norm.

    scale: of the loss that they are gradients of, by which they are divided first, whatever they are.  Returns the
    norm of these quotients; where it is not finite they are not clipped.
    """
    def squares(part: Sequence) -> list[float]:
        for g in part:
            if scale != 1:
                g /= scale
        return [float(xp_of(g).vdot(g, g)) for g in part]
    norm = math.sqrt(sum(sum(_on_all_cores(squares, grads, grads), [])))

    def clip(part: Sequence) -> None:
        for g in part:
            g *= max_norm / norm
    if math.isfinite(norm) and norm > max_norm:
        _on_all_cores(clip, grads, grads)
    return norm


def _on_all_cores(f: Callable[[Sequence], object], items: Sequence, arrays: Sequence) -> list:
    """f of parts of the items, which are each about an array; a GPU's in one part, for it has cores of its own.

    AdamW of 10 million weights takes 22 ms on two cores and 30 on one; of 2 million, 6 to 7 on either.
    """
    if not items or xp_of(arrays[0]) is not np:
        return [f(items)]
    return in_parts(lambda part: f(items[part]), [a.size for a in arrays])


class UpdateOnDevice:
    """Clipping, AdamW, the average and the loss scale of parameters on a GPU, decided and done there.

    It works on the optimiser's and the average's own arrays.  Their counts, and what the loss scale became, are the
    device's until `fetch` brings them; `push` takes them there.
    """

    def __init__(self, optimiser: AdamW, ema: EMA, scaling, clip: float):
        """scaling: a precision.LossScale."""
        from minidiff.engine.cuda.adamw import FusedAdamW
        self.optimiser, self.ema, self.scaling, self.clip = optimiser, ema, scaling, clip
        self._update = FusedAdamW([p.shape for p in optimiser.parameters.values()],
                                  patience=0 if scaling.fixed else scaling.patience)
        self.push()

    @property
    def scale(self):
        """The loss scale, an array of shape () on the device."""
        return self._update.scale

    def step(self, grads: Sequence, loss, lr: float, number: int) -> None:
        """The run's step `number`, counted from 1.  A gradient or loss that is not finite changes no weight."""
        optimiser, ema, c = self.optimiser, self.ema, self.optimiser.config
        self._update([p.data for p in optimiser.parameters.values()], grads, list(optimiser.m.values()),
                     list(optimiser.v.values()), list(ema.average.values()), loss, number=number, lr=lr,
                     clip=self.clip, b1=c.b1, b2=c.b2, eps=c.eps, decay=c.decay, ema=ema.decay)

    def fetch(self, steps: int) -> tuple[int, float] | None:
        """Waits for the device.  Where one of the run's `steps` steps failed, and none was made since: which, and the
        norm of its gradient; the next step may follow it."""
        scale, good, skipped, failed, norm = self._update.state.get().tolist()
        self.scaling.scale, self.scaling.good, self.scaling.skipped = scale, int(good), int(skipped)
        self.optimiser.n = self.ema.n = (int(failed) - 1 if failed else steps) - int(skipped)
        if not failed:
            return None
        self.push()
        return int(failed), norm

    def push(self) -> None:
        """Takes the loss scale's state to the device."""
        s = self.scaling
        self._update.set_state(s.scale, s.good, s.skipped)


@dataclass(frozen=True)
class WarmupCosine:
    """lr rises in a straight line over `warmup` steps to `peak`, then falls along half a cosine to 0 at `steps`."""

    peak: float
    steps: int
    warmup: int = 50

    def __call__(self, step: int) -> float:
        """The rate of step 0, 1, ..., steps - 1; beyond the last it stays at the last step's."""
        step = min(step, self.steps - 1)
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup + 1) / (self.steps - self.warmup + 1)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


class EMA:
    """The exponential moving average of the weights: what is sampled from.

        ema <- d_n ema + (1 - d_n) w,    d_n = min(decay, (1 + n) / (10 + n))

    The warm-up of d_n lets it forget the first, random weights.  It holds parameters only: no table or
    schedule is ever averaged.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.parameters, self.decay, self.n = parameters, decay, 0
        self.average = {name: p.data.copy() for name, p in parameters.items()}

    def step(self) -> None:
        d = self.decay_at(self.n)
        self.n += 1

        def follow(part: list) -> None:
            for average, p in part:
                # ema <- ema + (1 - d)(w - ema)
                average += (1 - d) * (p.data - average)
        averages = list(self.average.values())
        _on_all_cores(follow, list(zip(averages, self.parameters.values(), strict=True)), averages)

    def decay_at(self, n: int) -> float:
        return min(self.decay, (1 + n) / (10 + n))

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: to_numpy(a).copy() for name, a in self.average.items()} | {"n": np.array(self.n, dtype=np.int64)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.n = int(state["n"])
        for name, a in self.average.items():
            self.average[name] = to_device(np.array(state[name]), device_of(a))
