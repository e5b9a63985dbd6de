"""The house stands: a file imports from its own floor or a lower one, and no framework gets in."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minidiff"

# Beside the floors: what says errors, writes files, holds data and draws pictures.  It needs no floor but the first.
FLOOR = {"errors": 0, "files": 0, "registry": 0, "checkpoint": 0, "data": 0, "pictures": 0,
         "engine": 1, "nn": 2, "diffusion": 3, "text": 4, "systems": 5, "training": 6, "evaluation": 6, "verify": 6,
         "cli": 7, "__main__": 8}
FRAMEWORKS = {"torch", "jax", "tensorflow", "keras", "tinygrad", "mlx", "flax", "diffusers", "transformers"}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def floor_of(dotted: str) -> int | None:
    parts = dotted.split(".")
    return FLOOR.get(parts[1]) if parts[0] == "minidiff" and len(parts) > 1 else None


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_from_its_own_floor_or_a_lower_one(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return                                              # the package itself stands above all
    for name in imports(path):
        if (floor := floor_of(name)) is not None:
            assert floor <= FLOOR[part], f"{path.name} (floor {FLOOR[part]}) imports {name} (floor {floor})"


def test_every_part_has_a_floor():
    parts = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts <= set(FLOOR)


def test_no_framework_outside_parity_and_benchmarks():
    paths = [p for folder in ("minidiff", "examples", "kernels", "tests") for p in (ROOT / folder).rglob("*.py")]
    for path in [ROOT / "setup.py", *paths]:
        if path.relative_to(ROOT).parts[:2] != ("tests", "parity"):
            assert not {name.split(".")[0] for name in imports(path)} & FRAMEWORKS, path


def test_the_check_sees_an_upward_import(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from minidiff.systems import text_to_image\n    import torch.nn\n")
    assert {floor_of(n) for n in imports(path)} == {5, None} and "torch.nn" in imports(path)
