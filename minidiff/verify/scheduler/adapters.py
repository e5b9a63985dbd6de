"""Adapters: schedulers of diffusers, our own samplers, and anybody's object that follows the protocol.

    diffusers:DDIMScheduler     a class of diffusers, with its configuration
    minidiff:ddim               a sampler of ours
    MODULE:FACTORY              whatever FACTORY(**configuration) of a module on the path, or here, returns

No framework is imported by name. `diffusers` is imported only where the user names it, and a tensor is made from one
of the scheduler's own. That is why this adapter may stand in the package, where the command needs it, and not among the
parity tests, which use it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from minidiff.diffusion import samplers, schedules
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.errors import UserError
from minidiff.verify.loading import brief, load_named
from minidiff.verify.scheduler.protocol import Scheduler, check

# Of diffusers' schedulers those whose list, table and levels stand where the adapter looks for them.
KNOWN = ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
         "DPMSolverMultistepScheduler")


def load(name: str, config: Mapping[str, Any] | None = None) -> Scheduler:
    """The scheduler of a name such as "diffusers:DDIMScheduler", made with this configuration.

    UserError where the library, the class or the configuration is not there, raises anything at all, or makes what
    breaks the protocol.
    """
    library, _, part = name.partition(":")
    config = dict(config or {})
    if not library or not part:
        raise UserError(f"a scheduler is named LIBRARY:NAME, such as diffusers:DDIMScheduler, not {name!r}")
    if library == "minidiff":
        return _made(name, lambda **options: ours(part, **options), config)
    if library == "diffusers":
        return _diffusers(part, config)
    return _made(name, load_named(name, "--scheduler"), config)


def _diffusers(part: str, config: dict[str, Any]) -> Diffusers:
    if part not in KNOWN:
        raise UserError(f"diffusers:{part} is not one of the schedulers that can be read here: {', '.join(KNOWN)}")
    cls = load_named(f"diffusers:{part}", "--scheduler")
    eta = config.pop("eta", 0.0)
    unknown = config.keys() - inspect.signature(cls.__init__).parameters.keys()
    if unknown:
        raise UserError(f"diffusers:{part} has no option {', '.join(sorted(unknown))}")
    return _made(f"diffusers:{part}", lambda **options: Diffusers(lambda: cls(**options), eta), config)


def _made(name: str, factory: Callable[..., Any], config: Mapping[str, Any]) -> Any:
    """What the factory returns, checked."""
    try:
        made = factory(**config)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        how = "refuses its configuration" if config else "makes no scheduler"
        raise UserError(f"{name} {how}: {brief(error)}") from error
    if made is None:
        raise UserError(f"{name} returned None, where it must return a scheduler")
    check(made)
    return made


def _checked_eta(eta: Any) -> float:
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise UserError(f"eta must be a number from 0 to 1, not {eta!r}")
    return eta


# ---- diffusers ---------------------------------------------------------------------------------------------

class Diffusers:
    """A scheduler of diffusers as it comes: its own tables, in their own precision. Imports no framework.

    make: returns a fresh scheduler. eta: DDIM's, 0 to 1, for a class whose `step` takes one.
    """

    def __init__(self, make: Callable[[], Any], eta: float = 0.0):
        self.make, self.eta = make, _checked_eta(eta)
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
        # a multistep solver of order 3 starts with a step of order 1, which leaves order 2 to the whole run
        self.order = min(2, config.get("solver_order", self.inner.order))
        self.extrapolates = (config.get("solver_order"), config.get("algorithm_type"),
                             config.get("solver_type")) == (2, "dpmsolver++", "midpoint")
        self.rounding = 2.0**-24                            # of float32, in which its tables are

    def set_steps(self, n: int) -> None:
        self._renew()                                       # for a scheduler remembers its last run
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
        """t, as the tensor that it came from. A run may begin anywhere in its list, where a time may stand twice."""
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
        """diffusers' schedulers all draw by one function, randn_tensor. For the length of a step it returns z."""
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


# ---- whole samplers ----------------------------------------------------------------------------------------

class Replayed:
    """A whole sampler as a scheduler: a function that runs from noise to image and calls the network itself.

    It is run from the start again and again, with the answers given so far, until it asks for one more: N^2 / 2 steps
    in place of N, and not a line of the sampler is written anew.

    run(network, x_T, times, draw) -> x_0: network(x_t, t) gives a prediction, draw() the next noise.
    list_of(n): the times of a run of n steps. In those of training, 0 .. T-1, x_t is alpha x_0 + sigma eps.
    order, evaluations, extrapolates: as the protocol says.
    """

    def __init__(self, run: Callable[..., Any], alpha_bar, predicts: str, list_of: Callable[[int], Any],
                 order: int = 1, evaluations: int = 1, extrapolates: bool = False):
        self.run, self.alpha_bar, self.predicts, self.list_of = run, alpha_bar, predicts, list_of
        self.order, self.evaluations, self.extrapolates = order, evaluations, extrapolates
        self.timesteps = np.arange(len(alpha_bar))[::-1]

    def set_steps(self, n: int) -> None:
        self.times = np.asarray(self.list_of(n))
        self.timesteps = np.concatenate([self.times[:1], np.repeat(self.times[1:], self.evaluations)])
        self.answers, self.draws = [], []

    def add_noise(self, x_0, eps, t):
        abar = self.alpha_bar[np.asarray(t)].reshape(-1, *[1] * (np.ndim(x_0) - 1))
        return np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps

    def step(self, prediction, t, x_t, z):
        if not self.answers:
            # a run may begin anywhere in its list
            self.x_T, self.times = x_t, self.times[self.times <= t]
        self.answers.append(prediction)
        self.draws.append(z)
        asked = 0

        def network(x_t, t):
            nonlocal asked
            asked += 1
            if asked > len(self.answers):
                raise _Asked(x_t)
            return self.answers[asked - 1]

        try:
            return self.run(network, self.x_T, self.times, lambda: self.draws[asked - 1])
        except _Asked as question:
            return question.x_t


class _Asked(Exception):
    def __init__(self, x_t):
        self.x_t = x_t


class Draws:
    """Stands in for SampleStreams: its noise is given."""

    def __init__(self, count: int, draw: Callable[[], Any]):
        self.count, self.draw = count, draw

    def __len__(self) -> int:
        return self.count

    def normal(self, shape, dtype):
        return self.draw().astype(dtype)


def ours(name: str = "ddim", schedule: str | Schedule = "linear", T: int = 1000, spacing: str = "trailing",
         predicts: str = "eps", eta: float = 0.0) -> Replayed:
    """A sampler of ours as a scheduler. eta is DDIM's, 0 to 1."""
    _checked_eta(eta)
    if isinstance(schedule, str):
        schedule = schedules.schedule_from(schedule, T)
    sampler = samplers.SAMPLERS[name]
    if eta and name != "ddim":
        raise UserError(f"eta is an option of ddim, not of {name}")

    def run(network, x_T, times, draw):
        # a schedule whose end has no signal is refused to eps, and so it ends where the run begins
        known = Schedule(schedule.alpha_bar[:times[0] + 1], schedule.name)
        denoiser = NetworkDenoiser(known, predicts, lambda x_t, t, cond: network(x_t, t))
        streams = Draws(len(x_T), draw)
        if eta:
            return samplers.sample(sampler.function(denoiser, x_T, times, eta=eta, streams=streams))
        return samplers.sample(sampler(denoiser, x_T, times, streams=streams))

    return Replayed(run, schedule.alpha_bar, predicts, lambda n: samplers.times(schedule, n, spacing),
                    order=sampler.order, evaluations=sampler.calls, extrapolates=sampler.extrapolates)
