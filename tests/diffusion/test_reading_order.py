"""The reading order in diffusion/__init__.py: it lists every file, each after those that it imports."""

import ast
import re
from pathlib import Path

from minidiff import diffusion

FOLDER = Path(diffusion.__file__).parent


def test_every_file_is_listed_after_those_that_it_imports():
    listed = re.findall(r"^    (\w+)\.py  ", diffusion.__doc__, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    for i, name in enumerate(listed):
        for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("minidiff.diffusion."):
                assert node.module.split(".")[2] in listed[:i], f"{name}.py comes before {node.module}"
