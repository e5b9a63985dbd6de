"""Every paper that the tree cites stands in docs/references.md, under one name, and places are written in one form."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "references.md"
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| cited as")]
NAMES = [name for row in ROWS for name in row[0].split("; ")]

SURNAME = r"(?:van den )?[A-Z][\w-]+"
PLACE = r"eq|section|appendix|algorithm|table|figure"
AUTHORS = re.compile(rf"({SURNAME}(?:(?:, {SURNAME})* & {SURNAME}| et al\.)?) (1[89]\d\d|20[0-2]\d)\b(?![.-]\d)")
SHORT = re.compile(rf"\b([A-Z][\w+-]*[A-Z][\w+-]*) (?:{PLACE})\.? [A-Z\d]")      # such as DDPM in DDPM eq. 4
NUMBER = re.compile(r"(?:arXiv |arxiv\.org/abs/)(\d{4}\.\d{4,5})\b")
PAIRS = "|".join(re.escape(name[:-5]).replace("\\ ", "[ ]") for name in NAMES if " & " in name)
ODD = re.compile(rf"""
    (?:{PAIRS}|et[ ]al\.)(?![ ](?:19|20)\d\d)   # no year
  | \b(?:[Ss]ec|[Ff]ig|[Aa]lg)\.[ ]?\d | §      # section, figure, algorithm
  | \b(?:Eq\.|Equation|equation)[ ]\(?\d        # eq. 3
  | \beq\.[ ]\(                                 # eq. 3, not eq. (3)
  | (?<=[\w)])[ ](?:Section|Figure|Table|Algorithm)[ ]\d
""", re.VERBOSE)


FOLDERS = ("minidiff", "kernels", "examples", "exercises", "docs", "notebooks", "tests", "benchmarks")
FILES = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")
                               if path.suffix in (".py", ".md", ".cu", ".cuh") and "_build" not in path.parts)]
TEXTS = {str(path.relative_to(ROOT).as_posix()): re.sub(r"\s*\n[\s/#]*", " ", path.read_text(encoding="utf-8"))
         for path in FILES if path.name not in ("references.md", "test_references.py", "test_law_table.py")}


def unknown(text: str) -> list[str]:
    """What the text cites that is not on the page: authors with a year, short names with a place, numbers of arXiv."""
    authors = [f"{who} {year}" for who, year in AUTHORS.findall(text)]
    short = [name for name in SHORT.findall(text) if not any(known.endswith(name) for known in NAMES)]
    numbers = [number for number in NUMBER.findall(text) if number not in {row[2] for row in ROWS}]
    return [name for name in authors if name not in NAMES] + short + numbers


def test_every_paper_that_is_cited_is_on_the_page():
    missing = {name: unknown(text) for name, text in TEXTS.items() if unknown(text)}
    assert not missing


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_a_paper_on_the_page_is_cited_in_its_file(row):
    names, title, number, file = row
    text = TEXTS[file.strip("`")]
    assert any(name in text for name in names.split("; ")) and title
    assert not number or NUMBER.fullmatch(f"arXiv {number}")


def test_a_name_means_one_paper():
    assert len(NAMES) == len(set(NAMES)) > 50


def test_places_are_written_in_one_form():
    odd = {name: [match[0] for match in ODD.finditer(text)] for name, text in TEXTS.items() if ODD.search(text)}
    assert not odd


def test_a_file_with_an_equation_of_a_paper_names_the_paper():
    named = re.compile(rf"\b(?:{'|'.join(map(re.escape, NAMES))})")
    placed = {name for name, text in TEXTS.items() if re.search(r"\beq\. \d|\bsection \d\.\d", text)}
    assert len(placed) > 50 and not [name for name in placed if not named.search(TEXTS[name])]


@pytest.mark.parametrize("text, found", [
    ("(Ho et al. 2020, eq. 4), DDPM eq. 4, VDM appendix I.1, arXiv 2006.11239, section 3.2 of it", []),
    ("Ho et al. 2019", ["Ho et al. 2019"]), ("Lavin & Grey 2016", ["Lavin & Grey 2016"]), ("VDN eq. 4", ["VDN"]),
    ("arXiv 2006.11238", ["2006.11238"])])
def test_a_name_that_is_not_on_the_page_is_found(text, found):
    assert unknown(text) == found


@pytest.mark.parametrize("text", ["Ho et al. say", "sec. 3", "fig. 3", "eq. (4)", "Eq. 4", "DDPM Section 3"])
def test_another_form_of_a_place_is_found(text):
    assert ODD.search(text)
