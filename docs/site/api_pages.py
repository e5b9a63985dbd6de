"""The API pages: for each package of minidiff one page, with what its modules offer, from the docstrings."""

import functools
import importlib.util
import posixpath
from pathlib import Path

from annotate import annotated
from prose import to_rst
from source_page import docname


def packages(files: list[str]) -> dict[str, list[str]]:
    """Package -> its modules, dotted; its own first, then in alphabetical order."""
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.startswith("minidiff/") and file.endswith(".py") and not file.endswith("__main__.py"):
            module = file.removesuffix(".py").replace("/", ".")
            package = module.rpartition(".")[0]
            found.setdefault(package, []).append(module.removesuffix(".__init__"))
    return found


def page(package: str, modules: list[str]) -> str:
    """reStructuredText, since autodoc writes that."""
    out = [f"API: {package}", "=" * (5 + len(package)), ""]
    for module in modules:
        file = module.replace(".", "/") + ("/__init__.py" if module == package else ".py")
        if module != package:
            name = module.removeprefix(package + ".")
            out += [name, "-" * len(name), ""]
        link = f'<a href="{posixpath.relpath(docname(file) + ".html", "api")}">{file}</a>'
        out += [".. raw:: html", "", f'   <p class="to-source">Read it: {link}</p>', "",
                f".. automodule:: {module}", ""]
    return "\n".join(out)


# ---- for conf.py -----------------------------------------------------------------------------------------

def docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """autodoc-process-docstring: our docstrings are plain text.  Of a module's we take the first paragraph; the rest
    opens its annotated page."""
    text = "\n".join(lines)
    lines[:] = to_rst(text.split("\n\n")[0] if what == "module" else text)


@functools.cache
def anchors(file: str) -> set[str]:
    return set(annotated(Path(file).read_text(encoding="utf-8"), ".py").names())


def source_address(domain: str, info: dict) -> str | None:
    """linkcode_resolve: the definition on the annotated page."""
    module, name = info["module"], info["fullname"]
    if domain != "py" or not module.startswith("minidiff"):
        return None
    file = importlib.util.find_spec(module).origin          # it may need packages that are not here
    page = posixpath.join("..", docname("minidiff/" + file.replace("\\", "/").rpartition("/minidiff/")[2]) + ".html")
    while name and name not in anchors(file):
        name = name.rpartition(".")[0]                      # a field stands in the row of its class
    return f"{page}#{name}" if name else page
