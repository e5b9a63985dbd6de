"""AdamW, gradient clipping, the learning-rate schedule, and the moving average of the weights.

    m <- b1 m + (1 - b1) g              v <- b2 v + (1 - b2) g^2
    w <- w - lr ( m^ / (sqrt(v^) + eps) + decay w ),   m^ = m / (1 - b1^n),  v^ = v / (1 - b2^n)

(Kingma & Ba 2015, algorithm 1; decoupled weight decay: Loshchilov & Hutter 2019, algorithm 2, where lr does not scale
the decay.)  In this file v is Adam's second moment, not a velocity.  AdamW, clip_by_norm and EMA run on either device;
a training step on a GPU uses `UpdateOnDevice` instead, which computes the same in a few kernels and reads nothing back
to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minidiff.checks import finite
from minidiff.engine.backend import device_of, is_half, to_device, to_numpy, wide, xp_of
from minidiff.engine.parallel import in_parts
from minidiff.engine.tensor import Tensor


@dataclass(frozen=True)
class AdamWConfig:
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    decay: float = 0.01                     # of matrices and kernels; vectors (biases, norms) do not decay

    def __post_init__(self):
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0 and self.decay >= 0):
            raise ValueError("AdamWConfig: b1 and b2 must be in [0, 1), eps above 0 and decay at least 0, not "
                             f"{self.b1}, {self.b2}, {self.eps} and {self.decay}")


class AdamW:
    """Updates parameters (name -> Tensor) in place, from gradients in the same order."""

    def __init__(self, parameters: dict[str, Tensor], config: AdamWConfig = AdamWConfig()):  # noqa: B008 (frozen)
        _check_wide("AdamW", parameters)
        self.parameters, self.config, self.n = parameters, config, 0
        self.m = {name: xp_of(p.data).zeros_like(p.data) for name, p in parameters.items()}
        self.v = {name: xp_of(p.data).zeros_like(p.data) for name, p in parameters.items()}

    def step(self, grads: Sequence, lr: float) -> None:
        """One update.

        FloatingPointError, with nothing changed, if a gradient or its square is not finite.
        """
        c, lr = self.config, finite("lr", lr, 0)
        _check_step(self.parameters, self.m, grads)
        _check_squares(self.parameters, grads)
        self.n += 1
        m_scale = 1 / (1 - c.b1**self.n)
        v_scale = 1 / (1 - c.b2**self.n)

        def update(part: list) -> None:
            for (name, p), g in part:
                m, v, w, g = self.m[name], self.v[name], p.data, wide(g)
                # m <- b1 m + (1 - b1) g
                m *= c.b1
                m += (1 - c.b1) * g
                # v <- b2 v + (1 - b2) g^2
                v *= c.b2
                v += (1 - c.b2) * (g * g)
                # w <- w - lr ( m^ / (sqrt(v^) + eps) + decay w )
                change = xp_of(v).asarray(v * v_scale)      # for a parameter of shape (), NumPy gives a number
                xp_of(w).sqrt(change, out=change)
                change += c.eps
                xp_of(w).divide(m, change, out=change)
                change *= lr * m_scale
                if w.ndim > 1:
                    w *= 1 - lr * c.decay
                w -= change
                p.data = w                                  # set, so that a graph of the old weights is refused
        _on_all_cores(update, list(zip(self.parameters.items(), grads, strict=True)), grads)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {f"{kind}.{name}": to_numpy(a).copy() for kind, held in (("m", self.m), ("v", self.v))
                for name, a in held.items()} | {"n": np.array(self.n, dtype=np.int64)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Takes what `state_dict` gave.  ValueError, with nothing changed, for the state of other parameters."""
        _check_state(state, {f"{kind}.{name}": a for kind, held in (("m", self.m), ("v", self.v))
                             for name, a in held.items()})
        self.n = int(state["n"])
        for kind, held in (("m", self.m), ("v", self.v)):
            for name, a in held.items():
                held[name] = to_device(np.array(state[f"{kind}.{name}"], a.dtype), device_of(a))


def clip_by_norm(grads: Sequence, max_norm: float, scale: float = 1.0) -> float:
    """Scales all gradients in place by one factor, so that their common 2-norm is at most max_norm.

    scale: the loss scale (precision.py).  The gradients are first divided by it.  Returns the norm before clipping, of
    the divided gradients; if it is not finite, they are not clipped.  Source: Pascanu et al. 2013, algorithm 1.
    """
    if not (max_norm >= 0 and scale > 0):                   # NaN would clip nothing
        raise ValueError(f"max_norm must be at least 0, and scale above 0, not {max_norm} and {scale}")
    if any(isinstance(g, np.generic) for g in grads):
        raise TypeError("grads must be arrays, which can be scaled in place, not NumPy's numbers")

    def squares(part: Sequence) -> list[float]:
        for g in part:
            if scale != 1:
                g /= scale
        return [float(xp_of(g).vdot(wide(g), wide(g))) for g in part]
    with np.errstate(over="ignore"):
        total = sum(sum(_on_all_cores(squares, grads, grads), []))
    norm = math.sqrt(total) if TINY < total < math.inf else _norm_at_any_scale(grads)

    def clip(part: Sequence) -> None:
        factor = max_norm / norm
        for g in part:
            if factor < TINY:                               # float32 could not hold it
                g *= math.sqrt(factor)
                g *= math.sqrt(factor)
            else:
                g *= factor
    if math.isfinite(norm) and norm > max_norm:
        _on_all_cores(clip, grads, grads)
    return norm


TINY = 1e-30                                                # squares that add up to less have lost digits


def _norm_at_any_scale(grads: Sequence) -> float:
    """The common 2-norm where the sum of the squares overflows or underflows."""
    # || g || = a || g / a ||,  a = max |g|
    largest = float(np.max([float(abs(g).max()) for g in grads if g.size], initial=0))       # NaN if one is
    if not 0 < largest < math.inf:                          # all zeros, or a number that is not finite
        return largest
    return largest * math.sqrt(sum(float(((g.astype(np.float64) / largest) ** 2).sum()) for g in grads))


def _on_all_cores(f: Callable[[Sequence], object], items: Sequence, arrays: Sequence) -> list:
    """f of parts of the items, each of which belongs to one of the arrays, on all cores; on a GPU, f of all items.

    AdamW of 10 million weights takes 22 ms on two cores and 30 ms on one; of 2 million, 6 to 7 ms on either.
    """
    if not items or xp_of(arrays[0]) is not np:
        return [f(items)]
    return in_parts(lambda part: f(items[part]), [a.size for a in arrays])


def _check_wide(what: str, parameters: dict[str, Tensor]) -> None:
    for name, p in parameters.items():
        if is_half(p.dtype):
            raise TypeError(f"{what} takes parameters of float32 or float64, since half precision would round small "
                            f"updates away, not {name!r} of {p.dtype}: compute with a copy (precision.in_precision)")


class UpdateOnDevice:
    """Clipping, AdamW, the average and the loss scale for parameters on a GPU, without waiting for the GPU.

    It updates the arrays of the optimiser and of the average.  Their step counts and the loss scale are kept on the
    device; `fetch` copies them to the host, and `push` copies them back to the device.
    """

    def __init__(self, optimiser: AdamW, ema: EMA, scaling, clip: float):
        """scaling: a precision.LossScale."""
        from minidiff.engine.cuda.adamw import FusedAdamW
        self.optimiser, self.ema, self.scaling, self.clip = optimiser, ema, scaling, clip
        self._update = FusedAdamW([p.shape for p in optimiser.parameters.values()],
                                  patience=0 if scaling.fixed else scaling.patience, most=scaling.MOST)
        self.push()

    @property
    def scale(self):
        """The loss scale, an array of shape () on the device."""
        return self._update.scale

    def step(self, grads: Sequence, loss, lr: float, number: int) -> None:
        """Step `number` of the run, counted from 1.  If the gradient or the loss is not finite, no weight changes."""
        optimiser, ema, c = self.optimiser, self.ema, self.optimiser.config
        self._update([p.data for p in optimiser.parameters.values()], grads, list(optimiser.m.values()),
                     list(optimiser.v.values()), list(ema.average.values()), loss, number=number, lr=lr,
                     clip=self.clip, b1=c.b1, b2=c.b2, eps=c.eps, decay=c.decay, ema=ema.decay)
        for p in optimiser.parameters.values():
            p.data = p.data                                 # a graph of the old weights is then refused

    def fetch(self, steps: int) -> tuple[int, float] | None:
        """Waits for the device and copies its counts and loss scale to the host, after the run's `steps` steps.

        Returns None, or (number, gradient norm) of a step that failed.  The device then ignored all steps after it, and
        the next step may follow.
        """
        scale, good, skipped, failed, norm = self._update.state.get().tolist()
        self.scaling.scale, self.scaling.good, self.scaling.skipped = scale, int(good), int(skipped)
        self.optimiser.n = self.ema.n = (int(failed) - 1 if failed else steps) - int(skipped)
        if not failed:
            return None
        self.push()
        return int(failed), norm

    def push(self) -> None:
        """Copies the state of the loss scale to the device."""
        scaling = self.scaling
        self._update.set_state(scaling.scale, scaling.good, scaling.skipped)


@dataclass(frozen=True)
class WarmupCosine:
    """The learning rate rises linearly to `peak` over `warmup` steps, then falls as half a cosine to 0 at `steps`.

    The cosine is eq. 5 of Loshchilov & Hutter 2017, without restarts.
    """

    peak: float
    steps: int
    warmup: int = 50

    def __post_init__(self):
        if self.steps < 1 or self.warmup < 0:
            raise ValueError(f"steps must be at least 1 and warmup at least 0, not {self.steps} and {self.warmup}")
        if not 0 <= self.peak < math.inf:
            raise ValueError(f"peak, the highest learning rate, must be a number of at least 0, not {self.peak}")

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1; later steps have that of the last one."""
        step = min(step, self.steps - 1)
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup + 1) / (self.steps - self.warmup + 1)
        return self.peak * 0.5 * (1 + math.cos(math.pi * progress))


class EMA:
    """The exponential moving average of the weights.  Samples are made with it.

        ema <- d_n ema + (1 - d_n) w,    d_n = min(decay, (1 + n) / (10 + n))

    d_n is small at first (a warm-up, as in TensorFlow), so that the average forgets the random initial weights.  Only
    parameters are averaged, and no table or schedule.
    """

    def __init__(self, parameters: dict[str, Tensor], decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        _check_wide("EMA", parameters)
        self.parameters, self.decay, self.n = parameters, decay, 0
        self.average = {name: xp_of(p.data).array(p.data) for name, p in parameters.items()}

    def step(self) -> None:
        d = self.decay_at(self.n)
        self.n += 1

        def follow(part: list) -> None:
            for average, p in part:
                # ema <- ema + (1 - d)(w - ema), which is w to the last bit if d is 0
                if d:
                    average += (1 - d) * (p.data - average)
                else:
                    average[...] = p.data
        averages = list(self.average.values())
        _on_all_cores(follow, list(zip(averages, self.parameters.values(), strict=True)), averages)

    def decay_at(self, n: int) -> float:
        return min(self.decay, (1 + n) / (10 + n))

    def state_dict(self) -> dict[str, np.ndarray]:
        return {name: to_numpy(a).copy() for name, a in self.average.items()} | {"n": np.array(self.n, dtype=np.int64)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Takes what `state_dict` gave.  ValueError, with nothing changed, for the state of other parameters."""
        _check_state(state, self.average)
        self.n = int(state["n"])
        for name, a in self.average.items():
            self.average[name] = to_device(np.array(state[name], a.dtype), device_of(a))


# --- checks, before anything is changed ---------------------------------------------------------------------

def _check_step(parameters: dict[str, Tensor], moments: dict, grads: Sequence) -> None:
    if len(grads) != len(parameters):
        raise ValueError(f"grads must be one array for each of the {len(parameters)} parameters, not {len(grads)}")
    for (name, p), g in zip(parameters.items(), grads, strict=True):
        w, m = p.data, moments[name]
        if not w.shape == m.shape == g.shape or w.dtype != m.dtype:
            raise ValueError(f"parameter {name!r} is {w.dtype} {w.shape}, its gradient {g.dtype} {g.shape} and its "
                             f"moments {m.dtype} {m.shape}: create the optimiser after the parameters have their dtype")
        if isinstance(w, np.ndarray) and not w.flags.writeable:
            raise ValueError(f"parameter {name!r} is a read-only array: train a copy")


def _check_squares(parameters: dict[str, Tensor], grads: Sequence) -> None:
    """FloatingPointError unless each g^2 is finite: v would stay infinite, and w would not change again."""
    def check(part: list) -> None:
        # one sum of all squares: it reads each gradient once, and waits for a GPU once
        with np.errstate(over="ignore", invalid="ignore"):
            if math.isfinite(float(sum(xp_of(g).vdot(wide(g), wide(g)) for _, g in part))):
                return
        for name, g in part:
            largest = float(abs(wide(g)).max()) if g.size else 0.0
            if not math.isfinite(largest):
                raise FloatingPointError(f"the gradient of parameter {name!r} is not finite: take a smaller learning "
                                         "rate")
            if largest > math.sqrt(np.finfo(wide(g).dtype).max):
                raise FloatingPointError(f"the square of the gradient of parameter {name!r} overflows: clip the "
                                         "gradients first (clip_by_norm)")
    _on_all_cores(check, list(zip(parameters, grads, strict=True)), grads)


def _check_state(state: dict[str, np.ndarray], expected: dict) -> None:
    """expected: name -> array, beside the count n."""
    if state.keys() != {*expected, "n"} or int(state["n"]) < 0:
        raise ValueError(f"state must hold {len(expected)} arrays, as state_dict gives them, and n, the count of steps")
    for name, a in expected.items():
        if np.shape(state[name]) != a.shape:
            raise ValueError(f"state: {name!r} has shape {np.shape(state[name])}, not {a.shape}")
