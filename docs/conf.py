"""Sphinx's settings for the site.  docs/build.py calls Sphinx on the tree that docs/site/assemble.py writes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "site"), str(DOCS.parent)]

import alt_texts  # noqa: E402
import api_pages  # noqa: E402

import minidiff  # noqa: E402

project, author, release = "minidiff", "the authors of minidiff", minidiff.__version__
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode", "sphinx.ext.mathjax", "sphinx_copybutton"]
templates_path = ["site/templates"]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext"}
show_warning_types = True
smartquotes = False                                         # "1 ... T" stays as it is in the code

# ---- pages -------------------------------------------------------------------------------------------------
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
myst_links_external_new_tab = False
suppress_warnings = ["myst.header",                         # a page may skip a level, as on GitHub
                     "misc.highlighting_failure",           # a console session is not quite Python
                     "mystnb.mime_priority"]

# ---- code on the pages runs when they are built --------------------------------------------------------------
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_excludepatterns = ["README.md"]
nb_merge_streams = True

# ---- API ---------------------------------------------------------------------------------------------------
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
autodoc_mock_imports = ["starlette", "uvicorn"]             # minidiff play's, which the site does not need
autodoc_use_type_comments = False
toc_object_entries = False                                  # each page would copy all of them for its sidebar
linkcode_resolve = api_pages.source_address

# ---- looks -------------------------------------------------------------------------------------------------
html_theme = "furo"
html_title = "minidiff"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_favicon = "site/static/icon.svg"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#1d5fa8", "color-brand-content": "#1d5fa8",
                            "color-brand-visited": "#5a4b9c"},
    "dark_css_variables": {"color-brand-primary": "#7fb5f0", "color-brand-content": "#7fb5f0",
                           "color-brand-visited": "#b3a6ee"},
}
html_sidebars = {"**": ["sidebar/brand.html", "sidebar/search.html", "sidebar/scroll-start.html",
                        "sidebar/section.html", "sidebar/navigation.html", "sidebar/scroll-end.html"]}
pygments_style, pygments_dark_style = "friendly", "github-dark"
copybutton_selector = "div.highlight:not(.annotated *) pre"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# ---- formulas: MathJax, from this site itself ----------------------------------------------------------------
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}


def copy_mathjax(app, failed) -> None:
    """The two parts of MathJax that the pages need: the program, and its fonts."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    here, there = Path(package.origin).parent / "static/mathjax", Path(app.outdir) / "_static/mathjax"
    if failed is None and app.builder.format == "html":
        there.mkdir(parents=True, exist_ok=True)
        shutil.copy(here / "tex-chtml.js", there)
        shutil.copytree(here / "output/chtml/fonts", there / "output/chtml/fonts", dirs_exist_ok=True)


def section_of(app, page: str, template: str, context: dict, doctree) -> None:
    """For the sidebar of an annotated page: the files of its section."""
    sections = json.loads((Path(app.srcdir) / "sections.json").read_text(encoding="utf-8"))
    title = sections["of"].get(page)
    if title:
        context["section_title"], context["section_files"] = title, sections["pages"][title]


def setup(app):
    app.connect("build-finished", copy_mathjax)
    app.connect("doctree-read", alt_texts.add_alt_texts)
    app.connect("html-page-context", section_of)
    app.connect("autodoc-process-docstring", api_pages.docstring)
