"""The reading order lists every file, each after those that it imports; the page is as it was written."""

import ast
import re

from support import reading_order


def test_every_file_stands_in_it_once():
    order = reading_order.order()
    assert len(order) == len(set(order))
    assert set(order) == reading_order.modules()


def test_every_file_comes_after_those_that_it_imports():
    assert reading_order.forward_imports() == []


def test_a_file_before_what_it_imports_is_found(monkeypatch):
    monkeypatch.setattr(reading_order, "SECTIONS", [("x", "y", ["engine/ops", "engine/tensor"])])
    assert reading_order.forward_imports() == [("engine/ops", "engine/tensor")]


def test_the_page_is_as_it_was_written():
    assert reading_order.PAGE.read_text(encoding="utf-8") == reading_order.page(), \
        "run python -m tests.support.reading_order"


def test_the_packages_own_lists_agree_with_it():
    """What a package's docstring lists is in the order of the page."""
    place = {module: i for i, module in enumerate(reading_order.order())}
    for path in reading_order.PACKAGE.rglob("__init__.py"):
        package = str(path.parent.relative_to(reading_order.PACKAGE))
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        listed = [place[f"{package}/{name}"] for name in re.findall(r"^    (\w+)(?:\.py)?  ", text, re.MULTILINE)
                  if f"{package}/{name}" in place]
        assert listed == sorted(listed), f"{package}/__init__.py lists its files in another order"
        if package == "diffusion":
            assert set(listed) == {place[module] for module in place if module.rpartition("/")[0] == package}
