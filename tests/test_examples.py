"""The examples run, tiny."""

from pathlib import Path

import pytest
from support.examples import EXAMPLES, load

from minidiff.diffusion.samplers import SAMPLERS
from minidiff.errors import run_main


@pytest.mark.slow
def test_train_mnist_text(tmp_path, monkeypatch):
    from support import tiny

    from minidiff.data import mnist
    monkeypatch.setattr(mnist, "load", lambda *a: tiny.images())
    load("train_mnist_text").main(steps=2, batch=4, out=str(tmp_path / "s.png"))
    assert (tmp_path / "s.png").stat().st_size > 1000


@pytest.mark.slow
def test_train_emoji_text(tmp_path, capsys):
    load("train_emoji_text").main(steps=2, batch=4, judged=3, out=str(tmp_path / "e.png"))
    assert (tmp_path / "e.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "3 names seen: the true picture is the nearest for" in printed and "3 names never seen" in printed


def test_convergence(tmp_path):
    orders = load("convergence").main(steps=(16, 32, 64, 128), out=str(tmp_path / "c.png"))
    for (_, name), p in orders.items():                     # shorter lists than tests/laws/ has: order .1
        entry = SAMPLERS[name.removesuffix(", inverse")]    # the inverse of ddim has its order
        assert p > entry.order - 0.15 and (entry.history > 1 or p < entry.order + 0.4), name
    assert len(orders) == 2 * 7 + 2
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_compare_systems(tmp_path, monkeypatch, capsys):
    compare = load("compare_systems")
    monkeypatch.setattr(compare, "ROWS", {"DALL-E": ("dalle", {}), "DDPM": ("ddpm", {"steps": 2})})
    for _ in range(2):                                      # the second time from what was kept
        compare.main([], count=4, out=str(tmp_path), cache=str(tmp_path / "cache"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| D")]
    assert [row.split(" | ")[0] for row in rows] == ["| DALL-E", "| DDPM"] * 2
    assert rows[0].split(" | ")[5:] == rows[2].split(" | ")[5:]                     # but for the pace
    assert rows[0].split(" | ")[9] in (tmp_path / "systems.md").read_text()
    assert (tmp_path / "systems.png").stat().st_size > 1000


def test_a_users_mistake_is_one_sentence():
    with pytest.raises(SystemExit, match=r"^The output path 'nowhere/x.png' is in a folder that does not exist"):
        run_main(load("convergence").main, out="nowhere/x.png")
    assert all("run_main(main" in path.read_text() for path in EXAMPLES.glob("*.py"))


def test_every_example_is_run_by_a_test():
    tests = "".join(p.read_text() for p in Path(__file__).parent.rglob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tests or path.name in tests, path.name


def test_it_is_short_enough_to_read():
    for name, most in (("train_mnist_text.py", 150), ("train_emoji_text.py", 120)):
        assert len((EXAMPLES / name).read_text().splitlines()) <= most
