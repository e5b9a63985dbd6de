"""docs/glossary.md: its terms are in order, and every link within it leads to a term."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "glossary.md").read_text()
TERMS = re.findall(r"(?m)^### (.*)$", TEXT)


def anchor(term: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", term.lower()).replace(" ", "-")


def test_terms_are_in_alphabetical_order_and_each_stands_once():
    letters = [re.sub("[^a-z0-9]", "", term.lower()) for term in TERMS]
    assert letters == sorted(set(letters)) and len(letters) > 50


def test_links_lead_to_terms():
    links = re.findall(r"\]\(#([^)]*)\)", TEXT)
    assert links and set(links) <= set(map(anchor, TERMS))


def test_files_that_it_names_are_there():
    for name in re.findall(r"`([a-z_/]+\.py)`", TEXT):
        assert (ROOT / "minidiff" / name).exists(), name
    for name in re.findall(r"`(docs/[a-z_/]+\.md)`", TEXT):
        assert (ROOT / name).exists(), name


def test_every_term_is_explained():
    for entry in re.split(r"(?m)^### ", TEXT)[1:]:
        assert len(entry.split("\n", 1)[1].split()) >= 5, entry
