"""`minidiff evaluate --likelihood`: what it prints, and what it refuses."""

import json

import pytest
from support import tiny

from minidiff.cli import main as cli
from minidiff.data import idx, mnist
from minidiff.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tiny.trained_a_little().save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder with 30 "test" images under MNIST's names."""
    images = tiny.images(30)
    for name, array in zip(mnist.FILES["test"], (images.images, images.labels), strict=True):
        (tmp_path / name).write_bytes(idx.encode(array))
    return tmp_path


def call(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.mark.slow
def test_it_prints_the_parts_their_sum_and_the_protocol(model, folder, capsys):
    out = folder / "bits.json"
    assert call("evaluate", "--likelihood", "--model", model, "--data", folder, "--images", 12, "--json", out) == 0
    printed, r = capsys.readouterr().out, json.loads(out.read_text())
    for words in (f"{r['bound']:.3f} +- {r['bound_error']:.3f}", f"{r['flow']:.3f} +- {r['flow_error']:.3f}", "L_T",
                  "sum of L_{t-1}", "decoder", "8-bit", "dequantisation", "null caption", "12 of the 30 test images"):
        assert words in printed
    assert r["images"] == 12 and r["flow_images"] == 2 and r["terms"] == 10
    assert r["flow_steps"] == 48                            # the model has 50 times
    assert "prompt accuracy" not in printed
    assert r["bound"] == pytest.approx(r["prior"] + r["steps"] + r["decoder"], rel=1e-12)
    assert r["flow"] == pytest.approx(r["flow_density"] + r["flow_decoder"], rel=1e-12)
    assert 0 < r["bound_error"] < r["bound"] and 0 < r["flow_error"]


@pytest.mark.parametrize("option, value", [("--scale", "2"), ("--scale", "0"), ("--steps", "15"),
                                           ("--sampler", "ddim")])
def test_options_of_sampling_are_refused(model, option, value, capsys):
    assert call("evaluate", "--likelihood", "--model", model, option, value) == 2
    assert capsys.readouterr().err == f"minidiff: --likelihood draws no pictures: leave out {option}\n"


def test_missing_test_images_and_too_few_of_them_are_refused(model, folder, capsys, monkeypatch):
    def refused(*arguments) -> str:
        assert call("evaluate", "--likelihood", "--model", model, *arguments) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("minidiff: ") and "\n" not in said
        return said

    def no_network(*_, **__):
        raise UserError("no mirror answered")
    monkeypatch.setattr(mnist, "fetch", no_network)
    assert "no test images" in refused() and "--data" in refused()
    assert "neither a folder or file, nor a data set" in refused("--data", folder / "nowhere")
    (folder / "empty").mkdir()
    assert "has no test pictures" in refused("--data", folder / "empty")
    (folder / "empty" / "train-images-idx3-ubyte").write_bytes(b"")                 # a folder of MNIST's files
    assert "t10k-images" in refused("--data", folder / "empty")
    assert "from 2 to 30" in refused("--data", folder, "--images", 31)
