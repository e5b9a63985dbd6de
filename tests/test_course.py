"""The chapters quote the source as it is, their code runs, and they hang together."""

import re

import pytest
from support.course import CELL, CHAPTERS, QUOTATION, cells, quoted, run, with_quotations

GLOSSARY = re.compile(r"\]\(\.\./glossary\.md#[\w-]+\)")


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_quotations_are_as_the_source_is(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- source:") == len(QUOTATION.findall(text)) > 0
    assert with_quotations(text) == text, "run python -m tests.support.course"


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_a_chapter_has_code_that_runs_and_explains_its_terms(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("{code-cell}") == len(CELL.findall(text)) > 1
    assert len(GLOSSARY.findall(text)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_the_code_of_a_chapter_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def test_a_quotation_is_found_and_a_change_of_it_is_mended():
    head = '<!-- source: tests/support/course.py cells -->\n'
    whole = head + "```python\n" + quoted("tests/support/course.py", "cells") + "```\n"
    assert with_quotations(whole) == whole and "CELL.findall" in whole
    assert with_quotations(whole.replace("findall", "finditer")) == whole
    part = quoted("tests/support/course.py", "run", "for number", "plt.close")
    assert part.startswith("for number") and part.endswith('plt.close("all")\n')
    with pytest.raises(LookupError):
        quoted("tests/support/course.py", "not_there")


def test_cells_are_found_with_and_without_options():
    page = ("a\n```{code-cell} ipython3\n:tags: [hide-input]\n\nx = 1\n```\n```python\nno\n```\n"
            "```{code-cell}\ny = 2\n```\n")
    assert cells(page) == ["\nx = 1\n", "y = 2\n"]
