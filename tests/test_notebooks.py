"""The notebooks have the cells of their texts and no outputs, and their code runs."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from support.course import CELL, cells, run
from test_glossary import TERMS, anchor

FOLDER = Path(__file__).parents[1] / "notebooks"
PAGES = sorted(FOLDER.glob("[0-9]*.md"))
FRONT = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def of_text(page: Path) -> list[tuple[str, str]]:
    """The cells of a text: ("code", source), and between them ("markdown", source)."""
    text, found, at = FRONT.sub("", page.read_text(encoding="utf-8"), count=1), [], 0
    for match in CELL.finditer(text):
        found += [("markdown", text[at:match.start()].strip()), ("code", match[1].strip())]
        at = match.end()
    return [cell for cell in [*found, ("markdown", text[at:].strip())] if cell[1]]


def of_notebook(notebook: dict) -> list[tuple[str, str]]:
    return [(cell["cell_type"], "".join(cell["source"]).strip()) for cell in notebook["cells"]]


@every_page
def test_a_notebook_has_the_cells_of_its_text(page):
    notebook = json.loads(page.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert of_notebook(notebook) == of_text(page), "run python notebooks/make.py"
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or cell["outputs"] == [] and cell["execution_count"] is None
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_there_are_six_and_the_front_page_names_each():
    front = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(PAGES) >= 6 and sorted(path.stem for path in FOLDER.glob("*.ipynb")) == [page.stem for page in PAGES]
    assert all(f"({page.stem}.ipynb)" in front for page in PAGES)


@every_page
def test_a_notebook_has_pictures_and_something_to_change(page):
    text = page.read_text(encoding="utf-8")
    body = cells(text)[1:]                                  # the first cell imports, and defines how to show pictures
    drawn = [code for code in body if re.search(r"\bshow\(|\.subplots\(", code)]
    assert len(drawn) >= 2 / 3 * len(body) and text.count("**Change**") >= 3
    assert "../docs/course/" in text and text.count("{code-cell}") == len(cells(text)) > 5


@every_page
def test_its_links_to_the_glossary_lead_to_terms(page):
    links = re.findall(r"\]\(\.\./docs/glossary\.md#([\w-]+)\)", page.read_text(encoding="utf-8"))
    assert links and set(links) <= {anchor(term) for term in TERMS}


@pytest.mark.slow
@every_page
def test_the_code_of_a_notebook_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@every_page
def test_the_command_makes_the_same_notebook(page):
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.text_of(make.notebook_of(page)) == page.with_suffix(".ipynb").read_text(encoding="utf-8")


def test_another_cell_is_noticed(tmp_path):
    page = tmp_path / "1.md"
    page.write_text("---\na: b\n---\n# T\n\n```{code-cell}\n:tags: [x]\n\nx = 1\n```\ntext\n```python\nno\n```\n")
    assert of_text(page) == [("markdown", "# T"), ("code", "x = 1"), ("markdown", "text\n```python\nno\n```")]
    notebook = {"cells": [{"cell_type": kind, "source": source.splitlines(True)} for kind, source in of_text(page)]}
    assert of_notebook(notebook) == of_text(page)
    notebook["cells"][1]["source"] = ["x = 2\n"]
    assert of_notebook(notebook) != of_text(page)
