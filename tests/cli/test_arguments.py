"""The converters of arguments at their limits, the tables, and what `info` says of a model."""

import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy
from support import small_systems, tiny
from support.command_line import call
from support.toy import Toy

import minidiff
from minidiff import systems
from minidiff.cli import arguments
from minidiff.cli.main import _parser
from minidiff.data import mnist
from minidiff.data.dataset import DATASETS
from minidiff.diffusion.densities import DENSITIES
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.engine.parallel import cores
from minidiff.errors import UserError
from minidiff.systems.stable_diffusion import StableDiffusion


@pytest.mark.parametrize("convert, taken, refused", [
    (arguments.number, {"-1000": -1000, "1000": 1000, "0": 0, "2.5": 2.5, "1e-3": 0.001},
     ["1000.1", "-1001", "nan", "inf", "", "x"]),
    (arguments.effort, {"100": 100, "0.001": 0.001}, ["0", "-1", "100.5", "nan"]),
    (arguments.natural, {"0": 0, str(2**31): 2**31}, ["-1", str(2**31 + 1), "1.0", "x"]),
    (arguments.count, {"1": 1, "1000000": 10**6}, ["0", "1000001"]),
    (arguments.steps, {"1": 1, "1000": 1000}, ["0", "1001"]),
    (arguments.lora, {"a.safetensors": (Path("a.safetensors"), 1.0),
                      "d/a.b.safetensors:-.5": (Path("d/a.b.safetensors"), -0.5),
                      r"C:\x\a.safetensors:2": (Path(r"C:\x\a.safetensors"), 2.0),
                      r"C:\x\a.safetensors": (Path(r"C:\x\a.safetensors"), 1.0)},
     ["a.safetensors:x", "a.safetensors:nan", "a.safetensors:1e9"]),
    (arguments.embedding, {"d/toy.safetensors": ("toy", Path("d/toy.safetensors")),
                           "toy.pt:<cat-toy>": ("<cat-toy>", Path("toy.pt"))}, []),
    (arguments.setting, {"a=1": ("a", 1), "a=0.5": ("a", 0.5), "a=true": ("a", True), "a=True": ("a", True),
                         "a=False": ("a", False), "a=null": ("a", None),
                         "a=x=y": ("a", "x=y"), "a=": ("a", ""), "a=[1, 2]": ("a", [1, 2]), "a=tRue": ("a", "tRue")},
     ["a", "=1", ""]),
    (lambda text: tuple(map(str, arguments.named_file(text))), {"clip=a/b.c": ("clip", "a/b.c"), "a=b=c": ("a", "b=c")},
     ["clip", "clip=", "=b"]),
], ids=["number", "effort", "natural", "count", "steps", "lora", "embedding", "setting",
        "named file"])
def test_a_converter_takes_its_limits_and_nothing_beyond(convert, taken, refused):
    for text, value in taken.items():
        found = convert(text)
        assert found == value and type(found) is type(value) or isinstance(found, float) and found == value
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="^takes "):
            convert(text)


@pytest.mark.parametrize("text, value", [("-1", -1), ("-1e0", -1), ("-2.5E-1", -0.25), ("-.5", -0.5)])
def test_a_negative_number_is_a_value_however_it_is_written(text, value):
    parser = arguments.Parser(prog="minidiff")
    parser.add_argument("--scale", type=arguments.number)
    assert parser.parse_args(["--scale", text]).scale == value


@pytest.mark.parametrize("words, unknown, helped", [
    (("verify", "--sampler", "x"), "--sampler x", " verify"), (("sample", "7", "-q"), "-q", " sample"),
    (("verify", "verify"), "verify", " verify"), (("-q", "sample", "7"), "-q", ""),
    (("-q", "sample", "7", "-q"), "-q -q", "")])
def test_an_unknown_option_leads_to_the_help_of_its_command(words, unknown, helped, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minidiff", *words])
    for given in (list(words), None):                       # as a function, and as a program
        with pytest.raises(SystemExit) as stop:
            _parser().parse_args(given)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"minidiff: unrecognized arguments: {unknown} (see minidiff{helped} --help)\n"


def test_a_key_is_given_once():
    assert arguments.distinct("--set", [("a", 1), ("b", 2)]) == {"a": 1, "b": 2}
    assert arguments.distinct("--set", None) == {}
    for pairs, taken in (([("a", 1), ("a", 1)], ()), ([("a", 1)], ("a",))):
        with pytest.raises(UserError, match="^--set: a was given twice$"):
            arguments.distinct("--set", pairs, taken)


def test_a_table_has_its_values_in_one_column_and_times_have_units(capsys):
    arguments.print_table([("a", "1"), ("long name", "2")])
    assert capsys.readouterr().out == "a          1\nlong name  2\n"
    assert [arguments.minutes(s) for s in (0.4, 119.4, 120, 150, 3600)] == ["0 s", "119 s", "2.0 min", "2.5 min",
                                                                            "60.0 min"]


def test_info_names_the_parts_their_sizes_the_fields_and_the_notes(tmp_path, capsys):
    model = small_systems.small("text-to-image")
    model.save(tmp_path / "m.safetensors", notes={"by": "a test", "seed": 3})
    assert call("info", "--model", tmp_path / "m.safetensors") == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    size = {part: sum(p.data.size for p in getattr(model, part).parameters().values()) for part in ("text", "unet")}
    assert rows["parameters"] == f"{size['text']:,} text, {size['unet']:,} unet"
    assert rows["model"] == f"text-to-image, {tmp_path / 'm.safetensors'}" and rows["T"] == "50"
    assert rows["sampling"] == ("scale 2.0, interval_low (no end), interval_high (no end), steps 20, "
                                "sampler dpm++2m")
    assert rows["trained"] == "by a test, seed 3"
    assert rows["tokenizer"] == f"{model.tokenizer.vocab_size} tokens" and rows["drop_caption"] == "0.1"
    assert rows["systems"].startswith("dpm (not trained), ") or "text-to-image" in rows["systems"]


def test_info_says_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert call("info") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:lines[0].index(minidiff.__version__)].strip(): line for line in lines}
    package = Path(minidiff.__file__).parent
    files = [re.fullmatch(r"([a-z_]+)_(\d+)(_\w+)?", p.stem) for p in (package.parent / "kernels").glob("*.cu")]
    versions = {family: max(int(m[2]) for m in files if m and m[1] == family)
                for family in sorted({m[1] for m in files if m})}
    said = {"minidiff": f"{minidiff.__version__} in {package}",
            "numpy, scipy": f"{np.__version__}, {scipy.__version__}",
            "cores, GPU": f"{cores()}, ", "kernels": ", ".join(f"{family} {n}" for family, n in versions.items()),
            "data cache": str(mnist.cache_dir()), "data sets": ", ".join(DATASETS), "schedules": ", ".join(SCHEDULES),
            "densities of times": ", ".join(DENSITIES), "samplers": ", ".join(SAMPLERS), "systems": ""}
    assert list(rows) == list(said) and len(versions) > 3
    for name, value in said.items():
        shown = rows[name][lines[0].index(minidiff.__version__):]
        assert shown == value or name in ("cores, GPU", "systems") and shown.startswith(value)
    for name in systems.SYSTEMS:
        assert name in rows["systems"]


def test_info_says_what_an_option_without_a_default_depends_on(tmp_path, capsys):
    small_systems.small("dalle").save(tmp_path / "m.safetensors")
    assert call("info", "--model", tmp_path / "m.safetensors") == 0
    out = capsys.readouterr().out
    assert "scale (the configuration's), temperature 0.9, top_k 0" in out and "None" not in out
    assert call("sample", "3", "--model", tmp_path / "m.safetensors", "--steps", 3) == 2
    assert "its options are scale (the configuration's), temperature 0.9, " in capsys.readouterr().err


@pytest.mark.parametrize("name", [*systems.SYSTEMS, StableDiffusion.name])
def test_each_option_without_a_default_is_in_words(name):
    kind = StableDiffusion if name == StableDiffusion.name else systems.system_class(name)
    assert {option for option, default in (kind.options() or {}).items() if default is None} == kind.when_none.keys()


def test_a_users_own_run_comes_before_the_weights_of_the_package(tmp_path, monkeypatch, toy, capsys):
    monkeypatch.chdir(tmp_path)
    shipped, own = tmp_path / "shipped.safetensors", systems.RUNS / "toy" / "model.safetensors"
    monkeypatch.setattr(Toy, "shipped", classmethod(lambda cls: shipped))
    assert systems.weights_of("toy") is None

    def listed() -> str:
        assert call("info") == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("systems"))
        return line.rpartition(", ")[2]
    assert listed() == "toy (not trained)"
    first, second = Toy.new(tiny.digits(50), 0), Toy.new(tiny.digits(50), 1)
    first.save(shipped)
    assert systems.weights_of("toy") == shipped and listed() == "toy"
    own.parent.mkdir(parents=True)
    second.save(own)
    assert systems.weights_of("toy") == own and listed() == f"toy ({own})"
    assert np.array_equal(systems.load_system("toy").a.w.data, second.a.w.data)
    assert np.array_equal(systems.load_system("toy", shipped).a.w.data, first.a.w.data)
    assert systems.load_system("toy").file == own


@pytest.mark.skipif(os.name == "nt", reason="Windows has no colon in names")
def test_a_file_that_is_there_keeps_the_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.safetensors:2").touch()
    assert arguments.lora("a.safetensors:2") == (Path("a.safetensors:2"), 1.0)
    assert arguments.embedding("a.safetensors:2") == ("a", Path("a.safetensors:2"))
    assert arguments.lora("b.safetensors:2") == (Path("b.safetensors"), 2.0)
