"""Writes docs/commands.md, each command of minidiff with its arguments, from the parsers.

    python -m tests.support.commands                writes docs/commands.md, from the root of the repository

`tests/cli/test_commands_page.py` checks that the page is up to date.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from minidiff.cli.main import _parser

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"

HEAD = """# The commands

{description} `minidiff COMMAND --help` prints the same in a terminal, and `minidiff --version` the version.
`python -m tests.support.commands` writes this page, and a test checks that it is up to date.
"""
# minidiff NAME with its options and their values in capitals or as NAME=VALUE, or an option alone
COMMAND = r"minidiff [a-z]+(?: --?[a-z-]+(?: [\w=-]+)?)+|(?<![\w-])--?[A-Za-z][\w-]*(?: [a-z_]+=[A-Z]+)?"
TITLES = {"positional arguments": "argument", "options": "option"}


def page() -> str:
    parser = _parser()
    (commands,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    index = [f"- [`minidiff {name}`](#minidiff-{name}): {_text(command.description)}"
             for name, command in commands.items()]
    parts = [HEAD.format(description=parser.description), "\n".join(index) + "\n"]
    return "\n".join(parts + [_section(name, command) for name, command in commands.items()])


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## minidiff {name}", "", _text(parser.description), ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        if actions:
            lines += [f"| {TITLES.get(group.title, group.title)} | what it does |", "|---|---|",
                      *(_row(parser, action) for action in actions), ""]
    for group in parser._mutually_exclusive_groups:
        names = [f"`{action.option_strings[0]}`" for action in group._group_actions]
        lines += [f"At most one of {', '.join(names[:-1])} and {names[-1]} may be given.", ""]
    return "\n".join([*lines, _text(parser.epilog), ""])


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The names of an argument, each with the word for its value, and its help with its default."""
    word = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper())
    names = [name if action.nargs == 0 else f"{name} {word}" for name in action.option_strings] or [word]
    said = _text(parser._get_formatter()._expand_help(action))
    return f"| {' or '.join(f'`{name}`' for name in names)} | {said} |"


def _text(text: str) -> str:
    """A text of the help on a page: options and the example stand as code."""
    text, example, command = text.partition("Example: ")
    text = re.sub(COMMAND, r"`\g<0>`", text).replace("|", r"\|").replace("$", r"\$")
    return text + (f"{example}`{command}`" if command else "")


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
