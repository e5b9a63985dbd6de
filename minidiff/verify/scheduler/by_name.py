"""A scheduler by its name on the command line.

    diffusers:DDIMScheduler     a class of diffusers, with its configuration
    minidiff:ddim               a registered sampler
    MODULE:FACTORY              the result of FACTORY(**configuration); the module is on sys.path or in this folder

diffusers is imported only if the user names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from minidiff.diffusion.samplers import SAMPLERS
from minidiff.diffusion.schedules import Schedule, schedule_from
from minidiff.errors import UserError, user_code
from minidiff.verify.loading import load_named
from minidiff.verify.scheduler.from_diffusers import KNOWN, Diffusers, checked_eta
from minidiff.verify.scheduler.protocol import Scheduler, check
from minidiff.verify.scheduler.replay import Replayed, of_sampler

LIBRARIES = ("minidiff", "diffusers")                       # whose configurations are known
MOST = 100_000                                              # no number of a known configuration is larger


def load(name: str, config: Mapping[str, Any] | None = None) -> Scheduler:
    """The scheduler with a name such as "diffusers:DDIMScheduler", made with this configuration.

    UserError if the library or the class is not found, if the configuration is refused, if the user's code raises, or
    if the result breaks the protocol.
    """
    library, _, part = name.partition(":")
    config = dict(config or {})
    if library in LIBRARIES:
        _check_numbers(name, config)
    if not library or not part:
        ours_too = f"; the registered sampler is minidiff:{name}" if name in SAMPLERS else ""
        raise UserError(f"a scheduler is named LIBRARY:NAME, such as diffusers:DDIMScheduler, not {name!r}{ours_too}")
    if library == "minidiff":
        options = list(inspect.signature(ours).parameters)[1:]
        unknown = config.keys() - set(options)
        if unknown:
            raise UserError(f"{name} has no option {', '.join(sorted(unknown))}: its options are {', '.join(options)}")
        return _made(name, lambda **options: ours(part, **options), config)
    if library == "diffusers":
        return _diffusers(part, config)
    return _made(name, load_named(name, "--scheduler"), config)


def ours(name: str = "ddim", schedule: str | Schedule = "linear", T: int = 1000, spacing: str = "trailing",
         predicts: str | None = None, eta: float = 0.0) -> Replayed:
    """A registered sampler as a scheduler.

    predicts: what the runs' network predicts: eps, x0 or v (else eps, or v where alpha_{T-1} = 0 and x_T shows no x_0).
    eta: 0 to 1, if the sampler's function takes one.
    """
    checked_eta(eta)
    sampler = SAMPLERS[name]
    if isinstance(schedule, str):
        schedule = schedule_from(schedule, T)
    predicts = predicts or ("eps" if schedule.alpha_bar[-1] > 0 else "v")
    if eta and "eta" not in inspect.signature(sampler.function).parameters:
        raise UserError(f"the sampler {name} takes no eta")
    return of_sampler(sampler, schedule, predicts, spacing, **({"eta": eta} if eta else {}))


def _diffusers(part: str, config: dict[str, Any]) -> Diffusers:
    if part not in KNOWN:
        raise UserError(f"diffusers:{part} is not supported: it must be one of {', '.join(KNOWN)}")
    cls = load_named(f"diffusers:{part}", "--scheduler")
    eta = config.pop("eta", 0.0)
    unknown = config.keys() - inspect.signature(cls.__init__).parameters.keys()
    if unknown:
        raise UserError(f"diffusers:{part} has no option {', '.join(sorted(unknown))}")
    return _made(f"diffusers:{part}", lambda **options: Diffusers(lambda: cls(**options), eta), config)


def _check_numbers(name: str, config: Mapping[str, Any]) -> None:
    """UserError where a number of the configuration would take more memory and time than any schedule needs."""
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and abs(number) > MOST:
                raise UserError(f"{name}: {key} takes numbers from -{MOST:,} to {MOST:,}, not {str(number)[:40]}")


def _made(name: str, factory: Callable[..., Any], config: Mapping[str, Any]) -> Any:
    """Calls the factory and checks that its result follows the protocol."""
    with user_code(f"{name} {'refuses its configuration' if config else 'makes no scheduler'}"):
        made = factory(**config)
    if made is None:
        raise UserError(f"{name} returned None, where it must return a scheduler")
    check(made)
    return made
