"""A source file as rows: a comment or a docstring on the left, and on the right the code that it explains.

    section comment     # ---- forward ----        begins a section
    comment             on lines of its own        begins a row
    def, class          with its docstring         begins a row

Comments at the right margin of code stay where they are.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from inspect import cleandoc

RULE = re.compile(r"(?:#|//) ?-{2,} (.+?) -{2,}\s*$")
C_NAME = re.compile(r"\b(\w+)\(")
C_WORDS = {"__launch_bounds__", "if", "for", "while", "switch", "return", "sizeof", "__align__", "__attribute__", "asm",
           "defined", "requires"}


@dataclass
class Row:
    prose: str = ""
    lines: list[int] = field(default_factory=list)          # 1, 2, ...: the lines of code
    names: list[str] = field(default_factory=list)          # what is defined here: anchors
    deep: bool = False                                      # within a class
    imports: bool = False                                   # nothing but imports


@dataclass
class Section:
    title: str
    rows: list[Row]


@dataclass
class Annotated:
    intro: str                                              # the module's docstring, or a kernel's first comment
    sections: list[Section]

    def names(self) -> list[str]:
        return [name for section in self.sections for row in section.rows for name in row.names]


def annotated(text: str, suffix: str) -> Annotated:
    if suffix == ".py":
        return of_python(text)
    return of_c(text) if suffix in (".cu", ".cuh") else Annotated("", [])


class Writer:
    """Collects rows, in the order of the lines."""

    def __init__(self):
        self.sections = [Section("", [])]
        self.row: Row | None = None

    def begin(self, names=(), deep: bool = False) -> None:
        """A new row, unless the last has nothing but a comment, which is then about what follows."""
        if self.row is None or self.row.lines:
            self.row = Row()
            self.sections[-1].rows.append(self.row)
        self.row.names += names
        self.row.deep = deep

    def section(self, title: str) -> None:
        self.sections.append(Section(title, []))
        self.row = None

    def prose(self, text: str) -> None:
        self.row.prose = f"{self.row.prose}\n\n{text}".strip("\n")

    def code(self, number: int, line: str) -> None:
        if self.row is None:
            if not line.strip():
                return
            self.begin()
        if line.strip() or self.row.lines:
            self.row.lines.append(number)

    def done(self, lines: list[str]) -> list[Section]:
        for section in self.sections:
            for row in section.rows:
                while row.lines and not lines[row.lines[-1] - 1].strip():
                    row.lines.pop()
            section.rows = [row for row in section.rows if row.lines or row.prose]
        return [section for section in self.sections if section.rows]


def comment_text(lines: list[str], mark: str) -> str:
    return "\n".join(line.strip()[len(mark):].removeprefix(" ") for line in lines)


def of_python(text: str) -> Annotated:
    lines, tree = text.splitlines(), ast.parse(text)
    own = {token.start[0] for token in tokenize.generate_tokens(io.StringIO(text).readline)
           if token.type == tokenize.COMMENT and token.line.strip().startswith("#")}
    imports = {number for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
               for number in range(node.lineno, node.end_lineno + 1)}
    starts, docs = {}, {}
    for node, inside, deep in definitions(tree):
        first = min([node.lineno, *[d.lineno for d in node.decorator_list]])
        starts[first] = ([inside + node.name], deep)
        if ast.get_docstring(node) is not None:
            docs[node.body[0].lineno] = node.body[0]
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (t.id for t in targets if isinstance(t, ast.Name)):
                starts.setdefault(node.lineno, ([], None))[0].append(name)
    intro, number, out = "", 1, Writer()
    if ast.get_docstring(tree) is not None:
        intro, number = ast.get_docstring(tree), tree.body[0].end_lineno + 1
    while number <= len(lines):
        line = lines[number - 1]
        rule = RULE.match(line)
        if number in own and rule:
            out.section(rule[1])
        elif number in own:
            last = number
            while last + 1 in own and not RULE.match(lines[last]):
                last += 1
            out.begin()
            out.prose(comment_text(lines[number - 1:last], "#"))
            number = last
        elif number in docs and out.row is not None:
            node = docs[number]
            out.prose(cleandoc(node.value.value))
            number = node.end_lineno
        else:
            if number in starts:
                names, deep = starts[number]
                if deep is None:                            # a constant: an anchor, and no row of its own
                    if out.row is None or out.row.imports:
                        out.begin()
                    out.row.names += names
                else:
                    out.begin(names, deep)
            if number in imports and (out.row is None or not out.row.imports) and not (out.row and out.row.prose):
                out.row = None
                out.begin()
                out.row.imports = True
            elif number not in imports and line.strip() and out.row is not None and out.row.imports:
                out.begin()
            out.code(number, line)
        number += 1
    return Annotated(intro, out.done(lines))


def definitions(tree: ast.AST, inside: str = "", deep: bool = False):
    """(node, prefix of its name, whether within a class) of functions, classes, methods; of others with a docstring."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield node, inside, deep
            yield from definitions(node, inside + node.name + ".", True)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, inside, deep
        elif isinstance(node, (ast.If, ast.Try)):
            yield from definitions(node, inside, deep)


def of_c(text: str) -> Annotated:
    lines, out, intro = text.splitlines(), Writer(), []
    number = 1
    while number <= len(lines) and lines[number - 1].startswith("//"):
        intro.append(lines[number - 1])
        number += 1
    while number <= len(lines):
        line = lines[number - 1]
        if RULE.match(line):
            out.section(RULE.match(line)[1])
        elif line.strip().startswith("//"):
            last = number
            while last < len(lines) and lines[last].strip().startswith("//") and not RULE.match(lines[last]):
                last += 1
            out.begin()
            out.prose(comment_text(lines[number - 1:last], "//"))
            number = last
        else:
            if line[:1].strip() and line[0] not in "}#)" and (number == 1 or not lines[number - 2].strip()
                                                             or (out.row and not out.row.lines)):
                out.begin(c_names(line))
            out.code(number, line)
        number += 1
    return Annotated(comment_text(intro, "//"), out.done(lines))


def c_names(line: str) -> list[str]:
    """The function that a line at the margin begins to define, if it does."""
    if "static_assert" in line:
        return []
    found = [name for name in C_NAME.findall(line) if name not in C_WORDS]
    return found[:1]
