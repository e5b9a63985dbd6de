"""The plain text of docstrings and comments, as blocks: paragraphs, lists, and lines whose spacing matters.

minidiff writes these texts to be read in an editor: paragraphs, lists with "- ", words of code in backticks, and
equations that are indented, or aligned by three spaces and more, with their source at the right margin.  Here they
become HTML (annotated pages) or reStructuredText (API pages).
"""

import html
import re
from collections.abc import Callable
from textwrap import dedent

ALIGNED = re.compile(r"\S {3,}\S")
ITEM = re.compile(r"(?:- |\d+[.)]  ?)")
CITATION = re.compile(r"(\s*\S.*\S)\s{2,}(\S.{,44})")      # an equation, and what stands at the right margin
PAPER = re.compile(r"eq\.|section|appendix|algorithm|table|figure|\b(19|20)\d\d\b|\bDDPM\b|\bDDIM\b|\bVDM\b", re.I)
CODE = re.compile(r"``(.+?)``|`([^`]+)`")
FILE = re.compile(r"(?<![\w/.*-])(?:[\w-]+/)*[\w-]+\.(?:py|md|cuh?)\b(?!\w)")
ARXIV = re.compile(r"\barXiv (\d{4}\.\d{4,5})\b")

Links = Callable[[str], str | None]                         # the address of a file that a text names, if it has a page


def blocks(text: str) -> list[tuple[str, str]]:
    """(kind, text) with kind "paragraph", "list" or "verbatim"; the texts are dedented."""
    found: list[tuple[str, list[str]]] = []
    for part in re.split(r"\n\s*\n", text.strip("\n")):
        lines = part.splitlines()
        while lines:
            kind = kind_of(lines[0])
            taken = 1
            while taken < len(lines) and continues(kind, lines[taken]):
                taken += 1
            if kind == "verbatim" and found and found[-1][0] == "verbatim" and taken and lines[0][:3] == "   ":
                found[-1][1].extend(["", *lines[:taken]])
            else:
                found.append((kind, lines[:taken]))
            lines = lines[taken:]
    merged: list[tuple[str, str]] = []
    for kind, lines in found:
        body = dedent("\n".join(lines))
        if kind == "verbatim" and ITEM.match(body):
            kind = "list"
        if kind == "list" and merged and merged[-1][0] == "list":
            merged[-1] = ("list", merged[-1][1] + "\n" + body)
        else:
            merged.append((kind, body))
    return merged


def kind_of(line: str) -> str:
    if line.startswith("   ") or (ALIGNED.search(line) and not ITEM.match(line)):
        return "verbatim"
    return "list" if ITEM.match(line) else "paragraph"


def continues(kind: str, line: str) -> bool:
    """Whether a line belongs to the block of this kind that the line before it is in."""
    if kind == "list":
        return ITEM.match(line) is not None or line.startswith("  ")
    return kind_of(line) == kind


def items(text: str) -> list[str]:
    """The items of a list, each on one line."""
    found: list[str] = []
    for line in text.splitlines():
        if ITEM.match(line):
            found.append(ITEM.sub("", line, count=1))
        elif found:
            found[-1] += " " + line.strip()
    return found


# ---- HTML ------------------------------------------------------------------------------------------------

def no_links(name: str) -> None:
    return None


def inline(text: str, links: Links = no_links) -> str:
    """A sentence: words of code, names of files that have a page, and arXiv's numbers."""
    out, end = [], 0
    for match in CODE.finditer(text):
        out += [plain(text[end:match.start()], links), code(match[1] or match[2], links)]
        end = match.end()
    return "".join([*out, plain(text[end:], links)])


def code(name: str, links: Links) -> str:
    address = links(name)
    word = f'<code class="literal">{html.escape(name)}</code>'
    return f'<a href="{address}">{word}</a>' if address else word


def plain(text: str, links: Links) -> str:
    def file(match: re.Match) -> str:
        address = links(match[0])
        return f'<a href="{address}">{match[0]}</a>' if address else match[0]
    text = FILE.sub(file, html.escape(text, quote=False))
    return ARXIV.sub(r'<a class="external" href="https://arxiv.org/abs/\1">arXiv \1</a>', text)


def equation(line: str) -> str:
    """One line that keeps its spaces, with the paper that it cites set apart."""
    match = CITATION.fullmatch(line)
    if match and PAPER.search(match[2]) and not PAPER.search(match[1]):
        return f'<span class="eq">{html.escape(match[1], quote=False)}</span>' \
               f'<span class="cite">{html.escape(match[2], quote=False)}</span>'
    return f'<span class="eq">{html.escape(line, quote=False)}</span>'


def to_html(text: str, links: Links = no_links) -> str:
    out = []
    for kind, body in blocks(text):
        if kind == "paragraph" and is_equation(body):
            kind = "verbatim"
        if kind == "paragraph":
            out.append(f"<p>{inline(' '.join(body.split()), links)}</p>")
        elif kind == "list":
            out.append("<ul>" + "".join(f"<li>{inline(item, links)}</li>" for item in items(body)) + "</ul>")
        else:
            lines = "".join(f'<span class="line">{equation(line)}</span>\n' for line in body.splitlines())
            out.append(f'<pre class="math-text" tabindex="0">{lines}</pre>')
    return "\n".join(out)


def is_equation(text: str) -> bool:
    """Whether a short comment is a formula and not a sentence."""
    words = re.findall(r"\b[a-z]{4,}\b", text)
    return "\n" not in text and " = " in text and not text.rstrip().endswith((".", ":")) and len(words) <= 4 \
        and "`" not in text


# ---- reStructuredText ------------------------------------------------------------------------------------

def escape_rst(text: str) -> str:
    out, end = [], 0
    for match in CODE.finditer(text):
        out += [re.sub(r"([\\*_|<>:`\[\]])", r"\\\1", text[end:match.start()]), f"\\ ``{match[1] or match[2]}``\\ "]
        end = match.end()
    return "".join([*out, re.sub(r"([\\*_|<>:`\[\]])", r"\\\1", text[end:])])


def to_rst(text: str) -> list[str]:
    lines: list[str] = []
    for kind, body in blocks(text):
        if kind == "paragraph":
            lines += [escape_rst(" ".join(body.split())).lstrip("- "), ""]
        elif kind == "list":
            lines += [f"- {escape_rst(item)}" for item in items(body)] + [""]
        else:
            lines += [".. code-block:: text", "", *["   " + line for line in body.splitlines()], ""]
    return lines
