"""The chapters of the course, docs/course/*.md: what they quote from the source, and the code that stands on them.

    python -m tests.support.course              writes every quotation again, from the source as it is
    python -m tests.support.course 03_denoiser.md     runs the code of one chapter

A quotation is a block of Python below a line that says what it is of: a function, a class, a method or a constant of a
module, and where a part is enough, that part's first and last line:

    <!-- source: minidiff/diffusion/gaussian.py q_sample -->
    <!-- source: minidiff/diffusion/samplers.py ddim from "for t, s in" to "yield" -->

Code that runs stands in ```{code-cell} blocks.  The cells of a page run in order, in one namespace.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "course"
CHAPTERS = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
QUOTATION = re.compile(r'(?m)^<!-- source: (\S+) (\S+?)(?: from "(.+?)" to "(.+?)")? -->\n```python\n(.*?)^```$',
                       re.DOTALL)
CELL = re.compile(r"(?m)^```\{code-cell\}[^\n]*\n(?:---\n.*?^---\n|(?::[^\n]*\n)*)(.*?)^```$", re.DOTALL)


def node_of(tree: ast.Module, name: str) -> ast.AST:
    """The definition of a name such as q_sample, UNet.forward or LARGEST; LookupError where there is none."""
    node = tree
    for part in name.split("."):
        for child in node.body:
            targets = getattr(child, "targets", [getattr(child, "target", None)])
            if part in [getattr(child, "name", None), *[getattr(target, "id", None) for target in targets]]:
                node = child
                break
        else:
            raise LookupError(f"no {name}")
    return node


def quoted(file: str, name: str, first: str | None = None, last: str | None = None) -> str:
    """The lines of a definition, or those from the first that holds `first` to the next one that holds `last`."""
    text = (ROOT / file).read_text(encoding="utf-8")
    node = node_of(ast.parse(text), name)
    start = min([node.lineno, *[d.lineno for d in getattr(node, "decorator_list", [])]])
    lines = text.splitlines()[start - 1:node.end_lineno]
    if first:
        begin = next(i for i, line in enumerate(lines) if first in line)
        end = next(i for i, line in enumerate(lines) if i >= begin and last in line)
        lines = lines[begin:end + 1]
    return textwrap.dedent("\n".join(lines)) + "\n"


def with_quotations(text: str) -> str:
    """A page whose quotations are as the source is."""
    def again(match: re.Match) -> str:
        head = match[0].split("\n", 1)[0]
        return f"{head}\n```python\n{quoted(*match.groups()[:4])}```"
    return QUOTATION.sub(again, text)


def cells(text: str) -> list[str]:
    """The code of a page that runs."""
    return CELL.findall(text)


def run(page: Path) -> dict:
    """Runs the cells of a page; returns their namespace."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = {"__name__": "page"}
    for number, cell in enumerate(cells(page.read_text(encoding="utf-8")), 1):
        exec(compile(cell, f"{page.name}, cell {number}", "exec"), names)
        plt.close("all")
    return names


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(FOLDER / name)
    for page in CHAPTERS if not sys.argv[1:] else ():
        text = page.read_text(encoding="utf-8")
        if with_quotations(text) != text:
            page.write_text(with_quotations(text), encoding="utf-8")
            print(page.name)
