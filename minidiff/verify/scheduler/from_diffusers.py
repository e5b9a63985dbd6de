"""Adapts the schedulers of diffusers to the protocol.

PyTorch is not imported here: new tensors are made by a method of the scheduler's own tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minidiff.errors import UserError

# The schedulers of diffusers whose list of times, table and levels have the names that this adapter reads.
KNOWN = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
         "DPMSolverMultistepScheduler")


class Diffusers:
    """A scheduler of diffusers, unchanged: its own tables, in their own precision.

    make: returns a fresh scheduler. eta: DDIM's eta, from 0 to 1; other schedulers take only 0.
    UserError if eta or prediction_type is not supported.
    """

    def __init__(self, make: Callable[[], Any], eta: float = 0.0):
        self.make, self.eta = make, checked_eta(eta)
        self._renew()
        config = self.inner.config
        predictions = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
        if config["prediction_type"] not in predictions:
            raise UserError(f"prediction_type must be one of {', '.join(predictions)}, "
                            f"not {config['prediction_type']!r}")
        if eta and "eta" not in inspect.signature(self.inner.step).parameters:
            raise UserError(f"{type(self.inner).__name__} takes no eta")
        self.predicts = predictions[config["prediction_type"]]
        self.alpha_bar = _array(self.inner.alphas_cumprod)                            # (T,)
        self.evaluations = self.inner.order                 # 2 for Heun's method
        # a multistep solver of order 3 starts with a step of order 1, so the whole run has order 2
        self.order = min(2, config.get("solver_order", self.inner.order))
        self.extrapolates = (config.get("solver_order"), config.get("algorithm_type"),
                             config.get("solver_type")) == (2, "dpmsolver++", "midpoint")
        self.rounding = 2.0**-24                            # of float32, the precision of its tables

    def set_steps(self, n: int) -> None:
        self._renew()                                       # a scheduler keeps state from its last run
        self.inner.set_timesteps(n)
        self.timesteps = _array(self.inner.timesteps)

    @property
    def levels(self) -> np.ndarray:                                                   # (n, 2)
        if hasattr(self.inner, "sigmas"):                   # their sigma is our sigma / alpha
            ratio = _array(self.inner.sigmas)[:len(self.timesteps)]
            return np.stack([np.ones_like(ratio), ratio], axis=-1) / np.sqrt(1 + ratio**2)[:, None]
        abar = self.alpha_bar[self.timesteps.astype(int)]
        return np.stack([np.sqrt(abar), np.sqrt(1 - abar)], axis=-1)

    def add_noise(self, x_0, eps, t):
        times = self.inner.timesteps.new_tensor(np.ascontiguousarray(t))
        return _array(self.inner.add_noise(self._tensor(x_0), self._tensor(eps), times))

    def scale_input(self, x_t, t):
        return _array(self.inner.scale_model_input(self._tensor(x_t), self._time(t)))

    def step(self, prediction, t, x_t, z):
        time = self._time(t)
        options = {"eta": self.eta} if self.eta else {}
        with self._drawing(z):
            x_s, *_ = self.inner.step(self._tensor(prediction), time, self._tensor(x_t), return_dict=False, **options)
        self.count += 1
        return _array(x_s)

    def _time(self, t):
        """The tensor of time t in the scheduler's list. A run may begin at any index, and a time may occur twice."""
        if self.timesteps[self.count] != t:
            self.count = int(np.flatnonzero(self.timesteps == t)[0])
        return self.inner.timesteps[self.count]

    def _renew(self) -> None:
        self.inner, self.count = self.make(), 0
        self.timesteps = _array(self.inner.timesteps)

    def _tensor(self, array):
        return self.inner.alphas_cumprod.double().new_tensor(np.ascontiguousarray(array))

    @contextlib.contextmanager
    def _drawing(self, z) -> Iterator[None]:
        """During one step, replaces diffusers' randn_tensor, the source of all its noise, by one that returns z."""
        module = sys.modules[type(self.inner).__module__]
        theirs = getattr(module, "randn_tensor", None)      # a deterministic scheduler may have none
        if theirs is None:
            yield
            return
        module.randn_tensor = lambda *args, **options: self._tensor(z)
        try:
            yield
        finally:
            module.randn_tensor = theirs


def _array(tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().copy()


def checked_eta(eta: Any) -> float:
    """eta; UserError if it is not a number from 0 to 1."""
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise UserError(f"eta must be a number from 0 to 1, not {eta!r}")
    return eta
