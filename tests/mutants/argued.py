"""Changes that are none: each says in one sentence why no test should, or could, see it.

A rule is a pattern that must be found in "file function" and one that must be found in the changed lines, "- before"
and "+ after", one line each.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    where: str                              # in "minidiff/engine/ops.py div"
    change: str                             # in "- line before\n+ line after"
    why: str


RULES: list[Rule] = []


def reason(file: str, function: str, diff: str) -> str:
    """Why this change makes no difference; "" if nothing is argued about it."""
    for rule in RULES:
        if re.search(rule.where, f"{file} {function}") and re.search(rule.change, diff):
            return rule.why
    return ""
