"""The page of one source file: its introduction, its contents, and rows of prose and code side by side."""

import ast
import html
import posixpath
from pathlib import Path

from annotate import Annotated, Row, annotated
from highlight import coloured
from prose import inline, to_html


def docname(path: str) -> str:
    """The page of a file: minidiff/diffusion/gaussian.py and kernels/conv_1_naive.cu lose their endings."""
    stem, dot, suffix = path.rpartition(".")
    if not dot:                                             # LICENSE
        return path + "-page"
    return stem if suffix in ("py", "cu", "cuh", "md") else path.replace(".", "-")


class SourcePages:
    """All source files that have a page, so that each can link to the others."""

    def __init__(self, root: Path, files: list[str], pages: list[str]):
        self.root, self.files, self.pages = root, set(files), set(pages)
        self.parsed: dict[str, Annotated] = {}

    def text(self, file: str) -> str:
        return (self.root / file).read_text(encoding="utf-8")

    def annotated(self, file: str) -> Annotated:
        if file not in self.parsed:
            self.parsed[file] = annotated(self.text(file), Path(file).suffix)
        return self.parsed[file]

    def sentence(self, file: str) -> str:
        """What a file is about: the first paragraph of its introduction, as HTML."""
        text = self.annotated(file).intro if file in self.files else self.text(file).split("\n# ", 1)[-1]
        return inline(" ".join(text.split("\n\n")[0].split()))

    def address(self, target: str, here: str, name: str = "") -> str:
        """The relative address of a file's page, as seen from `here`; of a name in it, where it defines that."""
        anchor = f"#{name}" if name and target in self.files and name in self.annotated(target).names() else ""
        return posixpath.relpath(docname(target) + ".html", posixpath.dirname(here) or ".") + anchor

    def find(self, name: str, here: str) -> str | None:
        """The file that a text in `here` means by a name such as gaussian.py, diffusion/gaussian.py, docs/gpu.md."""
        folder = posixpath.dirname(here)
        for base in (folder, posixpath.dirname(folder), "minidiff", "", "docs"):
            path = posixpath.normpath(posixpath.join(base, name))
            if path in self.files or path in self.pages:
                return path
        return None

    # ---- the names that a module imports ---------------------------------------------------------------------

    def file_of(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((path for path in (f"{base}.py", f"{base}/__init__.py") if path in self.files), None)

    def names_in(self, file: str) -> dict[str, str]:
        """name -> address, of all that a file's code may link: the modules, what is imported, what it defines."""
        links = {name: f"#{name}" for name in self.annotated(file).names() if "." not in name}
        if not file.endswith(".py"):
            return links | self.headers(file)
        for node in ast.walk(ast.parse(self.text(file))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                target = self.file_of(node.module)
                if target:
                    links[node.module] = self.address(target, file)
                for alias in node.names:
                    below = self.file_of(f"{node.module}.{alias.name}")
                    if below:
                        links[alias.asname or alias.name] = self.address(below, file)
                    elif target:
                        links[alias.name] = links[alias.asname or alias.name] = self.address(target, file, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if self.file_of(alias.name):
                        links[alias.name] = self.address(self.file_of(alias.name), file)
        return links

    def headers(self, file: str) -> dict[str, str]:
        """The names of the headers beside a kernel."""
        return {name: self.address(header, file, name) for header in sorted(self.files)
                if header.endswith(".cuh") and header != file and f'"{posixpath.basename(header)}"' in self.text(file)
                for name in self.annotated(header).names()}

    # ---- the page --------------------------------------------------------------------------------------------

    def markdown(self, file: str, title: str, head: str = "") -> str:
        """The page, as Markdown with one block of HTML."""
        body = "\n".join([head, self.body(file)])
        return f"---\norphan: true\n---\n# {title}\n\n``````````{{raw}} html\n{body}\n``````````\n"

    def body(self, file: str) -> str:
        found, suffix = self.annotated(file), Path(file).suffix
        def links(name: str) -> str | None:
            target = self.find(name, file) if "." in name else None
            return self.address(target, file) if target and target != file else None
        lines = coloured(self.text(file), suffix, self.names_in(file))
        if not found.sections:
            if found.intro:
                return f'<div class="annotated"><div class="intro">{to_html(found.intro, links)}</div></div>'
            code = "\n".join(lines).rstrip("\n")
            return f'<div class="annotated"><div class="highlight plain"><pre tabindex="0">{code}</pre></div></div>'
        out = ['<div class="annotated">']
        if found.intro:
            out.append(f'<div class="intro">{to_html(found.intro, links)}</div>')
        out.append(contents(found, links))
        for i, section in enumerate(found.sections):
            if section.title:
                out.append(f'<h2 id="section-{i}">{inline(section.title, links)}'
                           f'<a class="headerlink" href="#section-{i}" title="Link to this heading">¶</a></h2>')
            out += [row_html(row, lines, links) for row in section.rows]
        return "\n".join([*out, "</div>"])


def row_html(row: Row, lines: list[str], links) -> str:
    anchors = "".join(f'<span class="anchor" id="{html.escape(name)}"></span>' for name in row.names)
    pilcrow = f'<a class="headerlink" href="#{row.names[-1]}" title="Link to this">¶</a>' if row.names else ""
    prose = to_html(row.prose, links) if row.prose else ""
    code = "\n".join(lines[number - 1] for number in row.lines)
    if row.imports:
        return f'<details class="imports"><summary>imports</summary><div class="highlight"><pre tabindex="0">{code}' \
               '</pre></div></details>'
    kind = "row" + ("" if row.names and not row.deep else " inner") + ("" if row.prose else " bare")
    code = f'<div class="highlight"><pre tabindex="0">{code}</pre></div>' if row.lines else ""
    return (f'<div class="{kind}">{anchors}<div class="prose">{prose}</div>'
            f'<div class="code">{pilcrow}{code}</div></div>')


def contents(found: Annotated, links) -> str:
    """What the file defines, in its sections, as links."""
    out, count = [], 0
    for i, section in enumerate(found.sections):
        names = [name for row in section.rows for name in row.names if "." not in name and not name.startswith("_")]
        count += len(names)
        title = f'<a href="#section-{i}">{inline(section.title)}</a> ' if section.title else ""
        if names or title:
            words = " ".join(f'<a href="#{name}"><code>{name}</code></a>' for name in names)
            out.append(f"<li>{title}{words}</li>")
    if count < 2:
        return ""
    return f'<nav class="on-this-page" aria-label="What this file defines"><ul>{"".join(out)}</ul></nav>'
