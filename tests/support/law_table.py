"""Writes docs/laws.md, the laws and the tests that check them, from the `law` markers of the tests.

    @pytest.mark.law(12, "E[x_0|x_t] = mu + alpha S V^-1 (x_t - alpha mu)", source="Bayes", tolerance="1e-7: ...")

number: an integer, or one with a letter ("2a") for a related law. formula: the statement, in the symbols of
docs/notation.md. source: the paper and equation or the derivation, and what the test computes independently. tolerance:
how far the two sides may differ, and the reason.

    python -m tests.support.law_table               writes docs/laws.md, from the root of the repository
    python -m tests.support.law_table --check       checks that docs/laws.md is up to date
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE, INI = ROOT / "docs" / "laws.md", ROOT / "pyproject.toml"
LAWS = range(1, 40)                                         # the whole numbers; some test must check each

CHAPTERS = {                                                # in reading order; other files come last
    "test_forward_process.py": "The forward process",
    "test_posterior.py": "The posterior",
    "test_parametrisations.py": "Parametrisations",
    "test_exact_denoisers.py": "Exact denoisers",
    "test_loss_weights.py": "Loss weights",
    "test_densities.py": "The density of training times",
    "test_bound.py": "The variational bound",
    "test_decoder.py": "The decoder, and bits",
    "test_continuous_bound.py": "The bound in continuous time",
    "test_flow_likelihood.py": "The density of the flow",
    "test_sampler_laws.py": "Samplers",
    "test_convergence.py": "The order at which samplers converge",
    "test_consistency.py": "Consistency models",
    "test_distillation.py": "The distillation of consistency models",
    "test_guidance_laws.py": "Guidance",
    "test_rectified_flow.py": "Rectified flow",
    "test_text_and_latents.py": "Text and latents",
    "test_stable_diffusion_law.py": "Stable Diffusion, from prompt to pixel",
}
ELSEWHERE = "Networks, training and the whole system"

NOT_YET = {                                                 # the parts of laws for which minidiff has no code
    25: "the order of DPM-Solver-2: it is not among the samplers",
}

HEAD = """# The laws

Each row is a statement that a test checks, over random schedules, times, shapes and data unless the row says otherwise.
Most tests compute one side with minidiff and the other side independently, as *source* describes. Some compare two
parts of minidiff, which shows that they agree, not that they are right; their *source* says so. *Tolerance* says how
far the two sides may differ, and why; no test allows more. A failing law prints its formula, its numbers and the seed
that reproduces the failure. The end of the page lists what is not tested because minidiff has no code for it. Symbols
are explained in [notation.md](notation.md); a number with a letter is a law related to that number.

`python -m tests.support.law_table` writes this page, and a test checks that it is up to date.
"""


@dataclass(frozen=True)
class Law:
    """One marker. Raises TypeError or ValueError if the marker is incomplete or malformed."""

    number: int | str
    formula: str
    source: str
    tolerance: str

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*[a-z]?", str(self.number)):
            raise ValueError(f"a law's number must be an integer such as 12, or one with a letter, got {self.number!r}")
        for name in ("formula", "source", "tolerance"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"law {self.number} must state its {name}, got {getattr(self, name)!r}")

    @property
    def order(self) -> tuple[int, str]:
        """12 before 12a before 13."""
        digits = re.match(r"\d+", str(self.number)).group()
        return int(digits), str(self.number)[len(digits):]


def laws_of(item) -> list[Law]:
    """The laws that a collected test checks: one for most tests, two for some."""
    return sorted((Law(*mark.args, **mark.kwargs) for mark in item.iter_markers("law")), key=lambda law: law.order)


@dataclass(frozen=True)
class Row:
    law: Law
    file: str                                               # tests/laws/test_posterior.py
    test: str
    slow: bool

    def __str__(self) -> str:
        cells = [str(self.law.number), f"`{_cell(self.law.formula)}`", _text(self.law.source),
                 f"[`{self.test}`](../{self.file})" + (" (slow)" if self.slow else ""), _text(self.law.tolerance)]
        return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _text(text: str) -> str:
    """Markdown in which * and ~ and < are literal."""
    return re.sub(r"([*~<])", r"\\\1", _cell(text))


def collect() -> list[Row]:
    """One row for each law of each test function, collected by pytest but not run."""
    rows: dict[tuple, Row] = {}

    class Collector:
        def pytest_collection_finish(self, session):
            for item in session.items:
                file = item.path.relative_to(ROOT).as_posix()
                for law in laws_of(item):
                    row = Row(law, file, item.originalname, item.get_closest_marker("slow") is not None)
                    rows.setdefault((file, item.originalname, law), row)

    with_laws = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.law(" in path.read_text("utf-8")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = pytest.main(["--collect-only", "-m", "law", "-p", "no:cacheprovider", "-c", str(INI),
                              *map(str, sorted(with_laws))], plugins=[Collector()])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest could not collect the tests:\n{said.getvalue()}")
    return list(rows.values())


def page(rows: list[Row]) -> str:
    """docs/laws.md: by chapters, in each by number and then in the order of the file."""
    chapters: dict[str, list[Row]] = {title: [] for title in [*CHAPTERS.values(), ELSEWHERE]}
    for row in rows:
        chapters[CHAPTERS.get(Path(row.file).name, ELSEWHERE)].append(row)
    parts = [HEAD]
    for title, chapter in chapters.items():
        if chapter:
            chapter.sort(key=lambda row: row.law.order)
            parts.append("\n".join([f"## {title}", "", "| law | statement | source | test | tolerance |",
                                    "|---|---|---|---|---|", *map(str, chapter), ""]))
    missing = NOT_YET | {number: "all of it" for number in unproved(rows)}
    if missing:
        parts.append("\n".join(["## Not yet", "", "minidiff has no code to test for these:", "",
                                *(f"- law {number}: {_text(missing[number])}" for number in sorted(missing)), ""]))
    return "\n".join(parts)


def unproved(rows: list[Row]) -> list[int]:
    proved = {row.law.order[0] for row in rows if not row.law.order[1]}
    return [number for number in LAWS if number not in proved]


if __name__ == "__main__":
    written = page(collect())
    if sys.argv[1:] == ["--check"]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != written:
            sys.exit("docs/laws.md is out of date: run `python -m tests.support.law_table`")
    else:
        PAGE.write_text(written, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
