"""The exercises, for tests, and the table of exercises/README.md: `python -m tests.support.exercises` writes it."""

import re
from pathlib import Path

from minidiff.course.exercise import NAMES, exercise

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "exercises"
PAGE = FOLDER / "README.md"
TABLE = re.compile(r"(?s)(<!-- table -->\n).*?(?=<!-- end of table -->)")


def table() -> str:
    rows = [(name, exercise(name)) for name in NAMES]
    chapters = {e.chapter: f"[{e.chapter}](../docs/course/{e.chapter}.md)" for _, e in rows}
    return "\n".join(["| exercise | what you write | minutes | chapter |", "|---|---|---|---|",
                      *(f"| [{name}]({name}.py) | {e.title} | {e.minutes} | {chapters[e.chapter]} |"
                        for name, e in rows)]) + "\n"


def page() -> str:
    """The page with the table as the exercises are."""
    return TABLE.sub(lambda match: match[1] + table(), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
