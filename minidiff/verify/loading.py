"""What a user names by MODULE:NAME on the command line: imported, and whatever goes wrong told in one sentence.

    load_named("my_schedules:betas", "--python")         my_schedules.py of the current folder, or an installed module
"""

import contextlib
import importlib
import os
import sys

from minidiff.errors import UserError


def load_named(what: str, option: str) -> object:
    """What the module calls NAME. The current folder is looked in first, as by `python -m`.

    what: "MODULE:NAME", where MODULE may have dots. option: who asks, such as "--python", for the sentence.
    The module is the caller's own code, and runs. UserError where `what` is written otherwise, where the module is
    not there or raises anything at all, SystemExit too, and where it has no NAME.
    """
    module, _, name = what.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(f"{option} takes MODULE:NAME, such as my_module:make, not {ascii(what)}")
    here, top, nothing = os.getcwd(), module.split(".")[0], object()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()                       # a file written a moment ago is seen, too
        # a module may make its names as they are asked for, and fail there
        found = getattr(importlib.import_module(module), name, nothing)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            why = f"{top} is not installed, and there is no {top}.py here (if it is a library: pip install {top})"
        else:
            why = brief(error)
        raise UserError(f"module {module} cannot be imported: {why}") from error
    finally:
        with contextlib.suppress(ValueError):               # the module may have taken it away itself
            sys.path.remove(here)
    if found is nothing:
        raise UserError(f"module {module} has no {name}")
    return found


def brief(error: BaseException) -> str:
    """The exception's type and message, on one line that a terminal can print."""
    message = ascii(" ".join(str(error).split())[:200])[1:-1]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
