"""Writes the sources of the site: a tree like the repository's, in which every file that a reader may open is a page.

    docs/*.md, docs/course/*.md, notebooks/*.md, README.md ...      as they are, but for their links to source files
    minidiff/**/*.py, kernels/*.cu, and other files that are linked     annotated pages (source_page.py)
    api/*.rst                                                       from docstrings (api_pages.py)
    index.md                                                        front.myst, and the table of contents

A link such as ../minidiff/diffusion/gaussian.py works on GitHub as it is, and here leads to the annotated page.
"""

import html
import json
import posixpath
import re
import shutil
from pathlib import Path

import api_pages
from source_page import SourcePages, docname

FENCE = re.compile(r"(?ms)^(`{3,}|~{3,})[^\n]*\n.*?^\1`*[ \t]*$")
LINK = re.compile(r"(?<!!)\[((?:!\[[^\]]*\]\([^)]*\)|`[^`]*`|[^\[\]`])+)\]\(([^)\s]+)\)")
QUOTATION = re.compile(r"(?m)^<!-- source: (\S+) (\S+)(.*?) -->$")
PICTURES = {".png", ".gif", ".svg", ".jpg", ".webp"}
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "benchmarks/README.md",
          "minidiff/weights/README.md", "exercises/README.md", "examples/README.md", "notebooks/README.md")

# caption -> pages, in this order; a page of docs/ that stands nowhere comes last, in the appendix
CONTENTS = {
    "Begin": ["README.md", "docs/architecture.md", "docs/notation.md", "docs/glossary.md", "docs/references.md"],
    "The course": ["docs/course/README.md", "docs/course/*.md", "exercises/README.md"],
    "Try it": ["docs/commands.md", "docs/play.md", "notebooks/README.md", "notebooks/*.md"],
    "The systems": ["docs/systems.md", "docs/pictures.md", "docs/guidance.md", "docs/glide.md", "docs/imagen.md",
                    "docs/latent.md", "docs/stable_diffusion.md", "docs/own_pictures.md"],
    "The source": ["docs/reading_order.md", "api/index.rst", "kernels/README.md", "docs/cuda_on_cpu.md", "docs/gpu.md"],
    "Appendix": ["docs/laws.md", "docs/mutants.md", "docs/mutation.md", "docs/convergence.md", "docs/speed.md",
                 "docs/cost.md", "docs/numbers.md", "docs/scaling.md", "docs/schedulers.md", "docs/reliability.md",
                 "docs/*.md", "benchmarks/README.md", "minidiff/weights/README.md", "CONTRIBUTING.md", "CHANGELOG.md"],
}
TITLES = {"README.md": "minidiff in one page", "kernels/README.md": "The kernels, annotated",
          "docs/reading_order.md": "Every module, annotated", "benchmarks/README.md": "The benchmarks",
          "minidiff/weights/README.md": "The weights"}


class Site:
    def __init__(self, root: Path, out: Path):
        self.root, self.out = root, out
        self.written: set[Path] = set()
        self.pages = [page for page in [*BESIDE, *self.glob("docs/*.md"), *self.glob("docs/course/*.md"),
                                        *self.glob("notebooks/*.md")] if (root / page).exists()]
        kernels = [*self.glob("kernels/*.cu"), *self.glob("kernels/*.cuh")]
        modules = [str(path.relative_to(root).as_posix()) for path in sorted((root / "minidiff").rglob("*.py"))]
        self.sections = self.reading_order(modules) + [("The kernels", sorted(kernels))]
        self.pictures = {f"docs/{name}": slug(part.split("\n")[0])         # -> its anchor on the page of pictures
                         for part in re.split(r"(?m)^## ", self.read("docs/pictures.md"))[1:]
                         for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", part)}
        self.linked: list[str] = []                         # other files that a page links or quotes
        self.folders: dict[str, list[str]] = {}             # folders without a page of their own that a page links
        for page in self.pages:
            for target in [*(target for _, target in self.links(page)),
                           *(match[1] for match in QUOTATION.finditer(self.read(page)))]:
                self.note(target)
        self.source = SourcePages(root, modules + kernels + self.linked, self.pages)

    def glob(self, pattern: str) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern))

    def read(self, page: str) -> str:
        return (self.root / page).read_text(encoding="utf-8")

    def links(self, page: str) -> list[tuple[str, str]]:
        """(the link as it is written, the file that it means) of a page's relative links, outside of code."""
        found = [match[2] for text in outside_code(self.read(page)) for match in LINK.finditer(text)]
        return [(link, self.target(page, link)) for link in found if self.target(page, link)]

    def target(self, page: str, link: str) -> str | None:
        if re.match(r"[a-z]+:|#|/", link):
            return None
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link.split("#")[0]))
        if path.startswith("..") or not (self.root / path).exists():
            raise ValueError(f"{page}: the link {link} leads nowhere")
        text = path.removesuffix(".ipynb") + ".md"
        return text if path.endswith(".ipynb") and (self.root / text).exists() else path

    def note(self, target: str) -> None:
        path = self.root / target
        if path.is_dir() and not (path / "README.md").exists() and not (path / "__init__.py").exists():
            self.folders[target] = [file for file in self.glob(f"{target}/*") if Path(file).suffix in (".py", ".md")]
            for file in self.folders[target]:
                self.note(file)
        if path.is_dir() or target in self.pages or path.suffix in PICTURES or target in self.linked:
            return
        if not (target.startswith("minidiff/") and path.suffix == ".py") and not (
                target.startswith("kernels/") and path.suffix in (".cu", ".cuh")):
            self.linked.append(target)

    def reading_order(self, modules: list[str]) -> list[tuple[str, list[str]]]:
        """The sections of docs/reading_order.md, and last the packages' own files."""
        found, known = [], set()
        for part in re.split(r"(?m)^## ", self.read("docs/reading_order.md"))[1:]:
            files = [f"minidiff/{name}" for name in re.findall(r"(?m)^- \[\S+\]\(\.\./minidiff/(\S+)\)", part)]
            known |= set(files)
            found.append((part.split("\n")[0], files))
        return found + [("Packages", [file for file in modules if file not in known])]

    # ---- writing ---------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | bytes) -> None:
        """Only if it differs from what stands there, so that Sphinx reads again only what changed."""
        path = self.out / name
        data = content.encode() if isinstance(content, str) else content
        self.written.add(path)
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def clean(self) -> None:
        for path in self.out.rglob("*"):
            if path.is_file() and path not in self.written:
                path.unlink()

    def assemble(self) -> None:
        for page in self.pages:
            self.write(page, self.rewritten(page))
        for pattern in ("docs/*", "docs/course/*", "notebooks/*", "exercises/*"):
            for name in self.glob(pattern):
                if Path(name).suffix in PICTURES:
                    self.write(name, (self.root / name).read_bytes())
        floors = {}
        for title, files in self.sections:
            for i, file in enumerate(files):
                self.write(docname(file) + ".md", self.source.markdown(file, short(file), self.head(title, files, i)))
            floors |= {docname(file): title for file in files}
        for file in self.linked:
            self.write(docname(file) + ".md", self.source.markdown(file, file))
        for folder, files in self.folders.items():
            self.write(f"{folder}/folder.md", self.folder_page(folder, files))
        self.write("sections.json", json.dumps({
            "of": floors, "pages": {title: [[file.removeprefix(common(files)), docname(file)] for file in files]
                                    for title, files in self.sections}}))
        self.write_api()
        self.write("index.md", self.index())
        self.clean()

    def rewritten(self, page: str) -> str:
        """A page whose links to files of source lead to their pages, as HTML, since Sphinx knows no anchors there."""
        text, out, end = self.read(page), [], 0
        for fence in FENCE.finditer(text):
            out += [LINK.sub(lambda match: self.link(page, match), text[end:fence.start()]), fence[0]]
            end = fence.end()
        text = "".join([*out, LINK.sub(lambda match: self.link(page, match), text[end:])])
        text = QUOTATION.sub(lambda match: self.quotation(page, match), text)
        if page == "docs/reading_order.md":
            text += self.packages(page)
        return text

    def link(self, page: str, match: re.Match) -> str:
        label, target = match[1], self.target(page, match[2])
        if target and (self.root / target).is_dir():
            target = next((path for path in (f"{target}/README.md", f"{target}/__init__.py")
                           if path in self.pages or path in self.source.files), f"{target}/folder.md")
        if target is None:
            return match[0]
        folder = posixpath.dirname(page) or "."
        if target in self.pictures:
            return f'<a href="{posixpath.relpath("docs/pictures.html", folder)}#{self.pictures[target]}">{label}</a>'
        if Path(target).suffix in PICTURES:
            return match[0]
        if target in self.pages:
            part = "#" + match[2].split("#", 1)[1] if "#" in match[2] else ""
            return f"[{label}]({posixpath.relpath(target, folder)}{part})"
        name = label.strip("`").split("[")[0]
        return f'<a href="{self.source.address(target, page, name)}">{label}</a>'

    def quotation(self, page: str, match: re.Match) -> str:
        file, name, part = match.groups()
        address = self.source.address(file, page, name)
        return f'<p class="quotation"><a href="{address}">{file}: <code>{html.escape(name)}</code></a>' \
               f'{", in part" if part.strip() else ""}</p>\n'

    def folder_page(self, folder: str, files: list[str]) -> str:
        page = f"{folder}/folder.md"
        rows = [f'- <a href="{self.source.address(file, page)}">{posixpath.basename(file)}</a>: '
                f'{self.source.sentence(file)}' for file in files]
        return f"---\norphan: true\n---\n# {folder}/\n\n" + "\n".join(rows) + "\n"

    def packages(self, page: str) -> str:
        """What docs/reading_order.md leaves out: the packages' own files, most of them a sentence."""
        links = [f'<a href="{self.source.address(file, page)}">{short(file)}</a>' for file in self.sections[-2][1]]
        return "\n## Packages\n\nWhat each package says of itself: " + ", ".join(links) + ".\n"

    def head(self, title: str, files: list[str], i: int) -> str:
        """Where a page stands: its section, its neighbours, its API."""
        file = files[i]
        index = "kernels/README.md" if file.startswith("kernels/") else "docs/reading_order.md"
        where = f"{self.source.address(index, file)}#{slug(title)}" if file.startswith("minidiff/") \
            else self.source.address(index, file)
        parts = [f'<a href="{where}">{html.escape(title)}</a>', f"{i + 1} of {len(files)}"]
        if i:
            parts.append(f'before: <a href="{self.source.address(files[i - 1], file)}">{short(files[i - 1])}</a>')
        if i + 1 < len(files):
            parts.append(f'after: <a href="{self.source.address(files[i + 1], file)}">{short(files[i + 1])}</a>')
        if file.startswith("minidiff/") and not file.endswith("__main__.py"):
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
            api = posixpath.relpath(f"api/{package}.html", posixpath.dirname(file))
            parts.append(f'<a href="{api}#module-{module}">API</a>')
        return f'<p class="whereabouts">{" · ".join(parts)}</p>'

    def write_api(self) -> None:
        packages = api_pages.packages(sorted(self.source.files))
        for package, modules in packages.items():
            self.write(f"api/{package}.rst", api_pages.page(package, modules))
        names = "\n".join(f"   {package} <{package}>" for package in packages)
        self.write("api/index.rst", "API\n===\n\nWhat each module offers, from its docstrings: one page for each "
                                    "package.\n*[source]* leads to the definition on its annotated page.\n\n"
                                    f".. toctree::\n   :maxdepth: 2\n\n{names}\n")

    def index(self) -> str:
        """The front page with the table of contents."""
        text, used = (self.root / "docs/site/front.myst").read_text(encoding="utf-8"), set()
        named = {page for pages in CONTENTS.values() for page in pages}
        for caption, patterns in CONTENTS.items():
            rows = []
            for pattern in patterns:
                for page in self.glob(pattern) if "*" in pattern else [pattern]:
                    exists = page in self.pages or page == "api/index.rst"
                    if exists and page not in used and not ("*" in pattern and page in named):
                        used.add(page)
                        name = page.rsplit(".", 1)[0]
                        rows.append(f"{TITLES[page]} <{name}>" if page in TITLES else name)
            if rows:
                depth = 2 if caption == "The source" else 1
                text += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: {depth}\n\n" \
                        + "\n".join(rows) + "\n```\n"
        first = next((page for page in self.glob("docs/course/0*.md")), "docs/architecture.md")
        notebooks = next((page for page in ["notebooks/README.md", *self.glob("notebooks/*.md")] if page in self.pages),
                         first)
        return text.replace("FIRST_CHAPTER", docname(first)).replace("FIRST_NOTEBOOK", docname(notebooks))


def outside_code(text: str) -> list[str]:
    """The parts of a page between its blocks of code."""
    ends = [0, *(end for fence in FENCE.finditer(text) for end in fence.span()), len(text)]
    return [text[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True)]


def short(file: str) -> str:
    return file.removeprefix("minidiff/").removeprefix("kernels/")


def common(files: list[str]) -> str:
    """The folder that all files of a section share: diffusion/ need not be said fifteen times."""
    return (posixpath.commonpath([posixpath.dirname(file) for file in files]) + "/") if files else ""


def slug(title: str) -> str:
    """The anchor of a heading, as on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def assemble(root: Path, out: Path, fresh: bool = False) -> None:
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    Site(root, out).assemble()
