"""Registries: what users add (a sampler, a schedule, a system, a data set) is entered in one place.

    minidiff.register_sampler("euler", euler, order=1)         by a call, in a program
    [project.entry-points."minidiff.samplers"]                 by an entry point, in a package of one's own
    euler = "my_package:EULER"

The command line, `verify`, the docs' tables and the tests of what all entries must keep read the registry.  Nothing
asks for an entry by name to treat it differently: what differs stands in the entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar

from minidiff.errors import UserError, user_code

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Entry = TypeVar("Entry")


class NoEntry(UserError):
    """There is no entry of this name: it is misspelt, or only another program registers it."""


class Registry(Mapping[str, Entry]):
    """Named entries: those of minidiff, those of installed packages' entry points, and those that a program adds.

    An entry that is named by its place, "module:attribute", is imported when it is first asked for.
    """

    def __init__(self, kind: str, group: str, places: Mapping[str, str] | None = None):
        """kind: what an entry is, for messages ("sampler").  group: of entry points ("minidiff.samplers").

        places: minidiff's own entries that are imported when they are asked for, such as
        {"digits": "minidiff.data.digits:ENTRY"}.
        """
        self.kind, self.group = kind, group
        self._entries: dict[str, Entry] = {}
        self._places = dict(places or {})

    def register(self, name: str, entry: Entry) -> Entry:
        """Adds an entry and returns it; ValueError where the name is taken or is no name."""
        check_name(self.kind, name)
        if name in self._entries or name in self._places:
            raise ValueError(f"there is already a {self.kind} {name!r}: choose another name")
        self._entries[name] = entry
        return entry

    def unregister(self, name: str) -> None:
        """Removes an entry that a program added."""
        del self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        """The entry; NoEntry, which lists the names, where there is none."""
        if name not in self:
            raise NoEntry(f"there is no {self.kind} {str(name)[:40]!r}: it is one of {', '.join(self)}; "
                          f"docs/architecture.md says how to add one")
        if name in self._entries:
            return self._entries[name]
        if name in self._places:
            module, attribute = self._places[name].split(":")
            self._entries[name] = getattr(import_module(module), attribute)
        else:
            self._entries[name] = self._load_outside(name)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._entries or name in self._places or name in self._outside)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._places, *self._entries, *self._outside]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @cached_property
    def _outside(self) -> dict[str, EntryPoint]:
        """The entry points of installed packages."""
        from importlib.metadata import entry_points  # slow to import, and rarely needed
        return {point.name: point for point in entry_points(group=self.group)}

    def _load_outside(self, name: str) -> Entry:
        with user_code(f"the {self.kind} {name!r} of the package entry point {self._outside[name].value!r} cannot be "
                       "loaded"):
            return self._outside[name].load()


# Windows opens a device in place of a file of such a name, whatever its ending
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}


def check_name(kind: str, name: str) -> None:
    """ValueError unless the name can stand on a command line and in a file's name."""
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "+-_." for c in name) \
            or name[0] in "-." or name[-1] == "." or name.split(".")[0].lower() in DEVICES:
        raise ValueError(f"the name of a {kind} takes letters, digits and + - _ . only, and is no device of Windows "
                         f"such as con, not {str(name)[:40]!r}")
