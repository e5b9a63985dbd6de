"""docs/site/annotate.py and prose.py: source files as rows, texts as HTML."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.site
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))

from annotate import annotated  # noqa: E402
from prose import escape_rst, to_html  # noqa: E402

SOURCES = [*sorted((ROOT / "minidiff").rglob("*.py")), *sorted((ROOT / "kernels").glob("*.cu*"))]
MODULE = '''"""What it is."""

import math

# ---- first part ----


# why LIMIT
LIMIT = 3


def half(x):
    """x / 2, for x up to LIMIT."""
    # y = x / 2                          DDPM eq. 4
    return x / 2                         # a number
'''


def test_rows_of_a_module():
    found = annotated(MODULE, ".py")
    assert found.intro == "What it is." and [section.title for section in found.sections] == ["", "first part"]
    (imports,), (limit, half, equation) = (section.rows for section in found.sections)
    assert imports.imports and imports.lines == [3]
    assert (limit.prose, limit.names, limit.lines) == ("why LIMIT", ["LIMIT"], [9])
    assert (half.prose, half.names, half.lines) == ("x / 2, for x up to LIMIT.", ["half"], [12])
    assert equation.prose.startswith("y = x / 2") and equation.lines == [15]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_line_of_code_stands_in_one_row_in_order(path):
    text = path.read_text(encoding="utf-8")
    found = annotated(text, path.suffix)
    numbers = [number for section in found.sections for row in section.rows for number in row.lines]
    assert numbers == sorted(set(numbers)) and len(found.names()) == len(set(found.names()))
    shown = "\n".join(text.splitlines()[number - 1] for number in numbers)
    prose = "\n".join([found.intro, *(section.title for section in found.sections),
                       *(row.prose for section in found.sections for row in section.rows)])
    words = {word for line in text.splitlines() for word in line.split() if word.isalnum()}
    assert words <= set((shown + "\n" + prose).replace("`", " ").replace('"""', " ").split()) | {"r"}


def test_an_equation_keeps_its_spaces_and_its_source_stands_apart():
    found = to_html("An equation:\n\n    x_t   = alpha_t x_0 < 1                DDPM eq. 4\n")
    assert '<span class="eq">x_t   = alpha_t x_0 &lt; 1</span><span class="cite">DDPM eq. 4</span>' in found


def test_a_sentence_is_a_sentence():
    assert to_html("The sum `a < b` is = 3, which is\nwhat we want.") == \
        '<p>The sum <code class="literal">a &lt; b</code> is = 3, which is what we want.</p>'


def test_what_restructured_text_would_read_as_markup_is_escaped():
    assert escape_rst("a * b_ | `c_`") == "a \\* b\\_ \\| \\ ``c_``\\ "
