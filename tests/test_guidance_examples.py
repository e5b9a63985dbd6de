"""The two examples of guidance run on a tiny scale, and keep the model that they trained."""

from dataclasses import replace

import numpy as np
from support import tiny
from support.examples import EXAMPLES, load

from minidiff import systems
from minidiff.data import mnist
from minidiff.nn.unet import UNetConfig
from minidiff.systems.adm import ADM, ADMConfig
from minidiff.systems.ddpm import DDPMConfig

UNET = UNetConfig(widths=(8, 16), heads=2, groups=4, embedding=16)


def test_classifier_guidance(tmp_path, monkeypatch, capsys):
    adm = ADM(ADMConfig(DDPMConfig(T=50, unet=replace(UNET, out=2)), UNET), None, np.random.default_rng(0))
    monkeypatch.setattr(systems, "find", lambda name, path: {"adm": adm}[name])
    measured = load("04_classifier_guidance").main((0.0, 2.0), (2, 1), count=6, steps=2, out=str(tmp_path / "g.png"))
    assert list(measured) == [(2, 0.0), (2, 2.0), (1, 0.0), (1, 2.0)]
    assert all(0 <= m.digit <= 1 and 0 <= m.recall <= 1 and m.fid > 0 for m in measured.values())
    assert capsys.readouterr().out.count("\n|") == 13 and (tmp_path / "g.png").stat().st_size > 1000


def test_guidance_tradeoff(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "load", lambda *a: tiny.images())
    example = load("06_guidance_tradeoff")
    options = {"steps": 2, "batch": 4, "count": 6, "sample_steps": 2, "runs": str(tmp_path), "config": tiny.CONFIG,
               "out": str(tmp_path / "t.png")}
    measured = example.main((0.0, 0.5), (0.0, 2.0), **options)
    assert list(measured) == [(0.0, 0.0), (0.0, 2.0), (0.5, 0.0), (0.5, 2.0)]
    assert capsys.readouterr().out.count("\n|") == 6 and (tmp_path / "t.png").stat().st_size > 1000
    # a second time the models are not trained again
    kept = [(p.name, p.stat().st_mtime_ns) for p in sorted(tmp_path.glob("*.safetensors"))]
    assert [name for name, _ in kept] == ["drop-0.safetensors", "drop-50.safetensors"]
    assert example.main((0.0, 0.5), (0.0, 2.0), **options) == measured
    assert kept == [(p.name, p.stat().st_mtime_ns) for p in sorted(tmp_path.glob("*.safetensors"))]


def test_they_are_short_enough_to_read():
    for name in ("04_classifier_guidance", "06_guidance_tradeoff"):
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 110
