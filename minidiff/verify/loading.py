"""Imports what a user names by MODULE:NAME on the command line. Every failure is one sentence.

    load_named("my_schedules:betas", "--python")         my_schedules.py of the current folder, or an installed module
"""

import contextlib
import importlib
import os
import sys

from minidiff.errors import UserError


def load_named(what: str, option: str) -> object:
    """The object NAME of the module. The current folder is searched first, as by `python -m`.

    what: "MODULE:NAME", where MODULE may have dots. option: the option that was given, such as "--python".
    The module's code is run. UserError if `what` has another form, if the module is not found, if it raises anything
    (SystemExit included), or if it has no NAME.
    """
    module, _, name = what.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(f"{option} takes MODULE:NAME, such as my_module:make, not {ascii(what)}")
    here, top, nothing = os.getcwd(), module.split(".")[0], object()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()                       # finds a file that was just written
        # a module may define __getattr__, which may raise
        found = getattr(importlib.import_module(module), name, nothing)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            why = f"{top} is not installed, and there is no {top}.py here (if it is a library: pip install {top})"
        else:
            why = brief(error)
        raise UserError(f"module {module} cannot be imported: {why}") from error
    finally:
        with contextlib.suppress(ValueError):               # the module itself may have removed it
            sys.path.remove(here)
    if found is nothing:
        raise UserError(f"module {module} has no {name}")
    return found


def brief(error: BaseException) -> str:
    """The exception's type and message, on one line that a terminal can print."""
    message = ascii(" ".join(str(error).split())[:200])[1:-1]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
