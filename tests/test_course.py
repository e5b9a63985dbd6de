"""The chapters quote the source as it is, their code runs, and they hang together."""

import re

import pytest
from support.course import CELL, CHAPTERS, QUOTATION, ROOT, cells, quoted, run, with_quotations

GLOSSARY = re.compile(r"\]\(\.\./glossary\.md#([\w-]+)\)")
TERMS = re.findall(r"(?m)^### (.*)$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))
NOT_PROSE = re.compile(r"""(?msx) \A---.*?^---$ | ^```.*?^```$ | <!--.*?--> | \$\$.*?\$\$ | ^\#[^\n]*$ | `[^`]*`
                           | \$[^$]*\$ | \[\d+\.[ ][^\]]*\]\([^)]*\) | \]\([^)]*\)
                           | \bScore[ ]SDE\b""")
PLAIN = {"condition", "law", "mask", "patch", "rank", "stage", "system"}                # plain English as well
OTHER_SENSE = {("06_text", "score"), ("09_likelihood", "tile")}


def unlinked(stem: str, text: str) -> list[str]:
    """The terms of the glossary that the prose of a chapter uses and never links to it."""
    prose, missing = NOT_PROSE.sub("\0", text), []
    for term in sorted(TERMS, key=len, reverse=True):           # "latent variable" before "latent"
        word = re.escape(term).replace("\\ ", r"\s+")
        if term[0].islower():
            word = f"[{term[0]}{term[0].upper()}]{word[1:]}"    # CLIP is not clip
        prose, uses = re.subn(rf"(?<![\w-]){word}s?(?![\w-])", "\0", prose)
        anchor = re.sub(r"[^\w\- ]", "", term.lower()).replace(" ", "-")
        if uses and anchor not in GLOSSARY.findall(text) and term not in PLAIN and (stem, term) not in OTHER_SENSE:
            missing.append(term)
    return missing


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


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_a_chapter_links_the_terms_that_it_uses(page):
    assert not unlinked(page.stem, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("text, missing", [
    ("two samplers", ["sampler"]), ("A sampler, a [sampler](../glossary.md#sampler)", []), ("[law 3](laws.md)", []),
    ("clip it", []), ("CLIP", ["CLIP"]), ("latent\nvariables", ["latent variable"]), ("`sampler`, $sampler$", []),
    ("```python\nsampler\n```\n", []), ("## Samplers\nThe [loss](04_bound.md)", ["loss"])])
def test_a_term_without_a_link_is_found(text, missing):
    assert unlinked("01_noise", text) == missing


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
