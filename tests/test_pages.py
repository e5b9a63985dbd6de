"""The links of the pages lead to existing files, and the code in docs/architecture.md runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
                *(ROOT / "notebooks").glob("*.md"), ROOT / "benchmarks/README.md", ROOT / "exercises/README.md",
                ROOT / "kernels/README.md", ROOT / "minidiff/weights/README.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)                    # in which [i](x) is no link


def broken_links(page: Path) -> list[str]:
    """The relative links of a page whose file does not exist."""
    links = [link.split("#")[0] for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8")))]
    return [link for link in links if link and "://" not in link and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_existing_files(page):
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](page.md#there) [b](gone.md) ![c](https://example.org/x.png) [d](#here)\n"
                    "```python\nf[0](x)\n```\n")
    assert broken_links(page) == ["gone.md"]


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.DOTALL)
TITLES = ("from a prompt to a pixel", "a sampler", "a schedule", "a density of times", "a data set", "a system")


@pytest.mark.parametrize("code", BLOCKS, ids=TITLES)
def test_the_code_of_the_architecture_page_runs(code, tmp_path):
    """Each block runs in a new process, since registries keep what is registered."""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
