"""Whatever asks a denoiser passes the condition on, at every call: samplers, editing, guidance, likelihood."""

import importlib
import inspect
import pkgutil
from functools import partial

import numpy as np
import pytest

from minidiff import diffusion
from minidiff.diffusion import consistency, editing, exact, guidance, likelihood, multistep, posterior, samplers
from minidiff.diffusion.schedules import cosine
from minidiff.engine.random import SampleStreams

SCHEDULE = cosine(20)
X, TIMES, KNOWN = np.full((2, 3), 0.3), [15, 8, 2], np.array([True, False, False])
CONDITION = (np.array([7, 9]),)                             # one row for each sample
DECODER = likelihood.GaussianDensity(0.1)


class Recorder:
    """The denoiser of a Gaussian, which records the conditions that it is given."""

    schedule, predicts, inner = SCHEDULE, "x0", exact.GaussianDenoiser(SCHEDULE, np.zeros(3), np.ones(3))

    def __init__(self):
        self.seen = []

    def __call__(self, x_t, t, cond=None):
        self.seen.append(cond)
        return self.inner(x_t, t)

    def vjp(self, x_t, t, dy, cond=None):
        self.seen.append(cond)
        return self.inner.vjp(x_t, t, dy)


def streams() -> SampleStreams:
    return SampleStreams(0, 2)


def at(time: int) -> np.ndarray:
    return np.full(2, time)


def drawn(sampler, denoiser, condition):
    return sampler(denoiser, X, TIMES, condition)


# what asks a denoiser of itself: name -> (denoiser, condition) -> anything; states are drawn to their end
ASKS = {
    "samplers.denoise": lambda d, c: samplers.denoise(d, X, 8, c),
    "samplers.ddpm": lambda d, c: samplers.ddpm(d, X, TIMES, c, streams=streams()),
    "multistep.dpm_solver_pp_2m_sde": lambda d, c: multistep.dpm_solver_pp_2m_sde(d, X, TIMES, c, streams=streams()),
    "consistency.lcm": lambda d, c: consistency.lcm(d, X, TIMES, c, streams=streams()),
    **{f"samplers.{f.__name__}": partial(drawn, f) for f in (samplers.ddim, samplers.heun, samplers.dpm_solver_pp_2m)},
    **{f"multistep.{f.__name__}": partial(drawn, f) for f in (multistep.edm_heun, multistep.lms, multistep.plms,
                                                              multistep.unipc)},
    "samplers.ddim_inverse": lambda d, c: samplers.ddim_inverse(d, X, TIMES, c),
    "consistency.ddim_step": lambda d, c: consistency.ddim_step(d, X, at(8), at(2), c),
    "consistency.BoundaryCondition": lambda d, c: consistency.BoundaryCondition(d, np.arange(20))(X, at(8), c),
    "editing.inpaint": lambda d, c: editing.inpaint(d, X, TIMES, X, KNOWN, c, streams=streams(), repeats=2),
    "editing.KnownPart": lambda d, c: editing.KnownPart(d, X, KNOWN, X)(X, at(8), c),
    "guidance.ClassifierFree": lambda d, c: guidance.ClassifierFree(d, 1.0, CONDITION)(X, at(8), c),
    "guidance.GuidanceInterval": lambda d, c: guidance.GuidanceInterval(
        guidance.ClassifierFree(d, 3.0, CONDITION), 0.0, 1e-9)(X, at(8), c),
    "likelihood.variational_bound": lambda d, c: likelihood.variational_bound(d, X, c, streams=streams(),
                                                                              decoder=DECODER),
    "likelihood.reverse_kl": lambda d, c: likelihood.reverse_kl(d, X, at(8), X, c),
    "likelihood.exact_trace": lambda d, c: likelihood.exact_trace(d, X, at(8), c),
    "likelihood.Hutchinson": lambda d, c: likelihood.Hutchinson(np.ones((1, 2, 3)))(d, X, at(8), c),
    "likelihood.log_prob": lambda d, c: likelihood.log_prob(d, X, [19, 8, 2], c),
    "likelihood.flow_bound": lambda d, c: likelihood.flow_bound(d, X, [19, 8, 2], c, eps=X, decoder=DECODER),
    "posterior.posterior": lambda d, c: posterior.posterior(d, X, TIMES, lambda mean, variance, s: (mean, variance), c,
                                                            streams=streams()),
    "posterior.reconstruction": lambda d, c: posterior.reconstruction(d, X, KNOWN, 0.1, c).grad_log_r(X, 8),
}
# networks and densities are asked; Conditioned has a condition of its own; test_contracts.py tests the classifier
ASKED = {"NetworkDenoiser", "GaussianDenoiser", "MixtureDenoiser", "DatasetDenoiser", "FlowDenoiser", "Denoiser",
         "Differentiable", "Conditioned", "ClassifierGuidance", "Sampler"}


def test_nothing_that_takes_a_condition_is_left_out():
    found = set()
    for module in pkgutil.iter_modules(diffusion.__path__):
        for name, member in vars(importlib.import_module(f"minidiff.diffusion.{module.name}")).items():
            function = vars(member).get("__call__") if inspect.isclass(member) else member
            if (inspect.isfunction(function) and member.__module__.endswith(f".{module.name}") and name[0] != "_"
                    and "cond" in inspect.signature(function).parameters and name not in ASKED):
                found.add(f"{module.name}.{name}")
    assert found == set(ASKS)


@pytest.mark.parametrize("condition", [CONDITION, None], ids=["a condition", "none"])
@pytest.mark.parametrize("name", ASKS)
def test_the_condition_is_passed_on_at_every_call(name, condition):
    if name.startswith("guidance") and condition is None:
        condition = (np.array([1, 2]),)                     # there is nothing to guide toward without one
    denoiser = Recorder()
    result = ASKS[name](denoiser, condition)
    if inspect.isgenerator(result):
        list(result)
    assert denoiser.seen and all(seen is condition for seen in denoiser.seen)
