"""One text names an entry of a registry and its parameters: NAME[:key=value,...].

    "cosine"        "cosine:offset=0.01,beta_max=0.99"

An entry is a function (first, parameter=default, ...), where each parameter is a number: a command line and a model's
configuration can say it in one word, and a file can keep it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from minidiff.errors import UserError
from minidiff.registry import Registry


def parse(registry: Registry[Callable], text: str) -> tuple[str, dict[str, float]]:
    """The name and the parameters in NAME[:key=value,...]; UserError, in one sentence, if they are wrong."""
    kind = registry.kind
    if not isinstance(text, str) or len(text) > 200:
        raise UserError(f"{kind} must be a short text, such as {next(iter(registry))!r}, got {_brief(text)}")
    name, colon, rest = text.partition(":")
    defaults, found = parameters(registry, name), {}
    for pair in rest.split(",") if colon else []:
        key, _, value = pair.partition("=")
        if key not in defaults or key in found:
            takes = ", ".join(f"{k}={v!r}" for k, v in defaults.items()) or "none"
            what = "is given twice" if key in found else "is not a parameter"
            raise UserError(f"{kind} {text!r}: {key!r} {what}; the parameters of {name} are: {takes}")
        found[key] = _number(f"{kind} {text!r}: {key}", value, defaults[key])
    return name, found


def parameters(registry: Registry[Callable], name: str) -> dict[str, float]:
    """The parameters of an entry and their defaults, from its function's signature: all but the first, and but
    allow_signal, which is a switch of Python only."""
    _, *rest = inspect.signature(registry[name]).parameters.values()
    defaults = {p.name: p.default for p in rest if p.name != "allow_signal"}
    for key, default in defaults.items():
        if type(default) not in (int, float):
            raise UserError(f"the {registry.kind} {name!r} must be a function (first, parameter=number, ...), and its "
                            f"parameter {key} has no number as default")
    return defaults


def _number(what: str, value: str, default: float) -> float:
    """The value as a finite number: an integer if the default is one."""
    try:
        number = int(value) if type(default) is int else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        kind = "an integer" if type(default) is int else "a finite number"
        raise UserError(f"{what} must be {kind}, such as {default!r}, got {value!r}")
    return number


def _brief(value: object) -> str:
    return f"{len(value)} characters" if isinstance(value, str) else repr(value)[:40]
