"""The architecture: files import from their own floor or a lower one, never in a circle, and public names only.

No deep-learning framework is imported anywhere but in the parity tests and benchmarks.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minidiff"

# Floor 0, beside the others: the terminal, errors, files and signals.  They may import each other and nothing above.
# Data and pictures stand beside the engine, whose map decodes files on all cores.
FLOOR = {"terminal": 0, "errors": 0, "checks": 0, "locks": 0, "files": 0, "input_files": 0, "signals": 0, "registry": 0,
         "named": 0, "checkpoint": 0,
         "engine": 1, "data": 1, "pictures": 1, "nn": 2, "diffusion": 3, "text": 4, "pretrained": 4, "systems": 5,
         "training": 6, "evaluation": 6, "verify": 6, "course": 6, "registration": 6, "cli": 7, "play": 7,
         "__main__": 8}
FRAMEWORKS = {"torch", "jax", "tensorflow", "keras", "tinygrad", "mlx", "flax", "diffusers", "transformers"}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# --- floors -------------------------------------------------------------------------------------------------

def floor_of(dotted: str) -> int | None:
    parts = dotted.split(".")
    return FLOOR.get(parts[1]) if parts[0] == "minidiff" and len(parts) > 1 else None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_from_its_own_floor_or_a_lower_one(path):
    part = part_of(path)
    if part == "__init__":
        return                                              # the package itself stands above all
    for name in imports(path):
        if (floor := floor_of(name)) is not None:
            assert floor <= FLOOR[part], f"{path.name} (floor {FLOOR[part]}) imports {name} (floor {floor})"


def test_every_part_has_a_floor():
    assert {part_of(path) for path in FILES} - {"__init__"} <= set(FLOOR)


def test_no_framework_outside_parity_and_benchmarks():
    paths = [p for folder in ("minidiff", "examples", "kernels", "tests") for p in (ROOT / folder).rglob("*.py")]
    for path in [ROOT / "setup.py", *paths]:
        if path.relative_to(ROOT).parts[:2] != ("tests", "parity"):
            assert not {name.split(".")[0] for name in imports(path)} & FRAMEWORKS, path


@pytest.mark.parametrize("path", sorted((PACKAGE / "diffusion").glob("*.py")), ids=lambda p: p.stem)
def test_diffusion_is_mathematics_on_plain_arrays(path):
    """No network and no gradient: of the engine it uses the array library and random streams, of nn nothing."""
    for name in imports(path):
        if (floor_of(name) or 0) in (FLOOR["engine"], FLOOR["nn"]):
            assert name.startswith(("minidiff.engine.backend.", "minidiff.engine.random.")), f"{path.name}: {name}"


def test_the_check_finds_an_import_from_a_higher_floor(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from minidiff.systems import text_to_image\n    import torch.nn\n")
    assert {floor_of(n) for n in imports(path)} == {5, None} and "torch.nn" in imports(path)


# --- circles ------------------------------------------------------------------------------------------------

def import_graph(paths: list[Path], root: Path) -> dict[str, set[str]]:
    """For each module the modules among `paths` that it imports, also inside functions and for type checkers."""
    modules = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in modules.items():
        # `from package import name`: name is a module, or else the package itself is what is imported
        found = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = {name for name in found if name in modules} - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that import each other, directly or through others."""
    def reachable(module: str) -> set[str]:
        found, new = set(), {module}
        while new:
            new = set().union(*(graph[name] for name in new)) - found
            found |= new
        return found
    after = {module: reachable(module) for module in graph}
    return [set(group) for group in {frozenset(other for other in after[module] if module in after[other])
                                     for module in graph} if group]


FOUND = circles(import_graph(FILES, ROOT))


@pytest.mark.parametrize("part", FLOOR)
def test_no_modules_import_each_other(part):
    """Not even inside functions: a reader can read the files in some order, each after those that it uses."""
    ours = [sorted(group) for group in FOUND if any(name.split(".")[1:2] == [part] for name in group)]
    assert not ours, f"modules that import each other: {ours}"


def test_the_check_finds_a_circle_inside_functions(tmp_path):
    texts = {"__init__": "", "a": "def f():\n    from p import b\n", "b": "from p.c import x\n",
             "c": "def g():\n    import p.a\n", "d": "from p import a\n"}
    (tmp_path / "p").mkdir()
    for name, text in texts.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    graph = import_graph(sorted(tmp_path.rglob("*.py")), tmp_path)
    assert graph["p.b"] == {"p.c"} and circles(graph) == [{"p.a", "p.b", "p.c"}]


# --- private names ------------------------------------------------------------------------------------------

def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def foreign_private_names(path: Path) -> list[str]:
    """The private names of other files of minidiff that a file imports, or reads from a module that it imports."""
    tree, found, modules = ast.parse(path.read_text()), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minidiff":
            found += [alias.name for alias in node.names if is_private(alias.name)]
            modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] == "minidiff"}
    found += [ast.unparse(node) for node in ast.walk(tree)
              if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in modules]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_uses_no_private_name_of_another_file(path):
    assert not foreign_private_names(path)


def test_the_check_finds_private_names(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("from minidiff.engine import ops as o, conv\nfrom minidiff.engine.norm import _sum\n"
                    "import minidiff.files\nimport numpy as np\n"
                    "o._f(conv.g, conv.__name__, minidiff.files._h, np._x)\n")
    assert sorted(foreign_private_names(path)) == ["_sum", "minidiff.files._h", "o._f"]


# --- what an import brings ----------------------------------------------------------------------------------

def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_tensor_has_its_operators_whatever_else_is_imported():
    """The module of Tensor is the only import."""
    code = ("from minidiff.engine.tensor import Tensor\n"
            "x = Tensor([[1., 2.], [3., 4.]])\n"
            "y = (2 * x + 1 - x / 2) @ -x ** 2\n"
            "print(y[0].reshape(2, 1).transpose(1, 0).sum().mean().item())")
    assert float(in_a_new_process(code)) == -(2.5 * 1 + 4 * 9) - (2.5 * 4 + 4 * 16)


def test_importing_the_package_loads_no_array_library():
    """So `import minidiff` is quick: 0.02 s, where NumPy alone takes 0.1 s."""
    code = "import sys, minidiff; print([name for name in ('numpy', 'scipy', 'PIL', 'cupy') if name in sys.modules])"
    assert in_a_new_process(code).strip() == "[]"


# --- what is tracked ----------------------------------------------------------------------------------------

def test_no_file_that_gitignore_excludes_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    found = subprocess.run(["git", "ls-files", "-ci", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout
    assert not found, f"tracked, though .gitignore excludes them: {found.split()}"
