"""Imports what a user names by MODULE:NAME on the command line. Every failure is one sentence.

    load_named("my_schedules:betas", "--python")         my_schedules.py of the current folder, or an installed module
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator

from minidiff.errors import UserError, user_code


def load_named(what: str, option: str) -> object:
    """The object NAME of the module. The current folder is searched first, as by `python -m`.

    what: "MODULE:NAME", where MODULE may have dots. option: the option that was given, such as "--python".
    The module's code is run. UserError if `what` has another form, if the module is not found, if it raises anything
    (SystemExit included), or if it has no NAME.
    """
    module, _, name = what.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise UserError(f"{option} takes MODULE:NAME, such as my_module:make, not {ascii(what)}")
    top, nothing = module.split(".")[0], object()
    with _current_folder_first(), user_code(f"module {module} cannot be imported"):
        importlib.invalidate_caches()                       # finds a file that was just written
        try:
            # a module may define __getattr__, which may raise
            found = getattr(importlib.import_module(module), name, nothing)
        except ModuleNotFoundError as error:
            if error.name != top:
                raise
            raise UserError(f"module {module} cannot be imported: {top} is not installed, and there is no {top}.py "
                            f"here (if it is a library: pip install {top})") from error
    if found is nothing:
        raise UserError(f"module {module} has no {name}")
    return found


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    try:
        here = os.getcwd()
    except OSError:                                         # it was deleted: only installed modules are found
        here = ""
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):               # the module itself may have removed it
            sys.path.remove(here)
