"""The README's own lines run, and what it registers is what docs/architecture.md builds."""

import re
from pathlib import Path

import numpy as np
import pytest

from minidiff.data.dataset import DATASETS
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.systems import SYSTEMS

ROOT = Path(__file__).parents[1]


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return [block.split("```")[0] for block in page.read_text(encoding="utf-8").split("```python\n")[1:]]


@pytest.fixture
def registries():
    """Puts the registries back as they were."""
    before = [(registry, set(registry)) for registry in (SAMPLERS, SCHEDULES, DATASETS, SYSTEMS)]
    yield
    for registry, names in before:
        for name in set(registry) - names:
            registry.unregister(name)


def test_the_loop_of_the_readme_draws_sevens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks(ROOT / "README.md")[0], names)
    x = names["x"]
    assert x.shape == (8, 28, 28, 1) and x.dtype == np.float32 and np.abs(x).max() <= 1
    from minidiff import load_system
    _, digits = load_system("digit-classifier").read(x)
    assert (digits == 7).mean() >= 0.75
    assert (tmp_path / "seven.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_recipes_of_the_architecture_page_run(tmp_path, monkeypatch, registries):
    """Each block of docs/architecture.md, in order, and then the names that the README registers are there."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / "docs" / "architecture.md"):
        exec(block, {"__name__": "page"})
    registered = re.findall(r'minidiff\.register_(\w+)\("([\w-]+)"', blocks(ROOT / "README.md")[1])
    assert len(registered) == 4
    there = {"sampler": SAMPLERS, "schedule": SCHEDULES, "dataset": DATASETS, "system": SYSTEMS}
    for kind, name in registered:
        assert name in there[kind], f"{kind} {name}"


def test_the_readme_marks_its_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, line in (("run", ".venv/bin/minidiff train"), ("test", ".venv/bin/python -m pytest -n auto")):
        assert re.search(rf"<!-- command: {name} -->\n```bash\n(?:[^`]*\n)?{re.escape(line)}\n```", text), name
