"""The two examples of guidance run, tiny, and keep the models that they trained."""

import pytest
from support import small_systems, tiny
from support.examples import EXAMPLES, load

from minidiff import systems


@pytest.mark.slow
def test_classifier_guidance(tmp_path, monkeypatch, capsys):
    load_system, small = systems.load_system, {"adm": small_systems.small("adm")}
    monkeypatch.setattr(systems, "load_system", lambda name, path=None: small.get(name) or load_system(name, path))
    measured = load("04_classifier_guidance").main((0.0, 2.0), (2, 1), count=6, steps=2, out=str(tmp_path / "g.png"))
    assert list(measured) == [(2, 0.0), (2, 2.0), (1, 0.0), (1, 2.0)]
    assert all(0 <= m.digit <= 1 and 0 <= m.recall <= 1 and m.fid > 0 for m in measured.values())
    assert capsys.readouterr().out.count("\n|") == 13 and (tmp_path / "g.png").stat().st_size > 1000


@pytest.mark.slow
def test_guidance_tradeoff(tmp_path, monkeypatch, capsys):
    example = load("06_guidance_tradeoff")
    monkeypatch.setattr(example, "load_dataset", lambda folder: tiny.digits())
    options = {"steps": 2, "batch": 4, "count": 6, "sample_steps": 2, "runs": str(tmp_path / "runs"),
               "config": tiny.CONFIG, "out": str(tmp_path / "t.png")}
    measured = example.main((0.0, 0.5), (0.0, 2.0), **options)
    assert list(measured) == [(0.0, 0.0), (0.0, 2.0), (0.5, 0.0), (0.5, 2.0)]
    assert capsys.readouterr().out.count("\n|") == 6 and (tmp_path / "t.png").stat().st_size > 1000
    models = sorted((tmp_path / "runs").glob("*/model.safetensors"))
    assert [path.parent.name for path in models] == ["drop-0", "drop-50"]
    assert [example.TextToImage.load(path).config.drop_caption for path in models] == [0.0, 0.5]
    # the second time the models are loaded, not trained again
    written = [path.stat().st_mtime_ns for path in models]
    assert example.main((0.0, 0.5), (0.0, 2.0), **options) == measured
    assert written == [path.stat().st_mtime_ns for path in models]


def test_the_examples_are_short():
    for name in ("04_classifier_guidance", "06_guidance_tradeoff"):
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 110
