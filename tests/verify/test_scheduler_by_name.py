"""Schedulers by name: registered samplers, the user's own, and --scheduler on the command line."""

import json
import math
import sys

import numpy as np
import pytest

from minidiff.cli.main import main
from minidiff.errors import UserError
from minidiff.verify.scheduler import load, report
from minidiff.verify.scheduler.by_name import ours


@pytest.mark.parametrize("name, config", [
    ("ddim", {}), ("ddim", {"eta": 0.7}), ("ddpm", {}), ("dpm++2m", {"spacing": "linspace"}), ("heun", {}),
    ("ddim", {"schedule": "flow_matching", "predicts": "v"}), ("dpm++2m", {"schedule": "cosine", "predicts": "x0"}),
    ("dpm++2m-sde", {"schedule": "log_snr_linear", "spacing": "log_snr"}), ("ddpm", {"spacing": "log_snr"}),
], ids=str)
@pytest.mark.slow
def test_our_samplers_keep_every_law(name, config):
    """The sde of 50 steps ends where sigma^2 is 10^-4, which divides the rounding of the noise's power."""
    rows = report(load(f"minidiff:{name}", config), steps=[50 if name.endswith("sde") else 7])
    assert not [row for row in rows if row.verdict == "BROKEN"]
    assert sum(row.verdict == "kept" for row in rows) >= 12


def test_our_samplers_refuse_eps_at_snr_0():
    rows = report(load("minidiff:ddim", {"schedule": "flow_matching", "predicts": "eps"}), steps=[7])
    (refused,) = [row for row in rows if row.law == "5 zero terminal SNR"]
    assert refused.verdict == "kept" and "zero SNR" in refused.where
    assert all(row.verdict == "skipped" for row in rows if row.computed.startswith(("its factor", "spread at the end")))


def test_a_schedule_that_ends_in_pure_noise_is_tested_by_predictions_of_v():
    """eps says nothing of x_0 there, so every run would be skipped."""
    scheduler = load("minidiff:ddim", {"schedule": "flow_matching"})
    rows = report(scheduler, steps=[7])
    assert scheduler.predicts == "v" and sum(row.verdict == "skipped" for row in rows) <= 3
    assert load("minidiff:ddim").predicts == "eps"


@pytest.mark.parametrize("name, config, sentence", [
    ("euler", {}, "LIBRARY:NAME, such as diffusers:DDIMScheduler, not 'euler'$"),
    ("ddim", {}, "LIBRARY:NAME.*the registered sampler is minidiff:ddim"),
    ("minidiff:euler", {}, "is one of ddpm, ddim, heun"),
    ("minidiff:ddim", {"schedule": "sine"}, "one of linear"),
    ("minidiff:heun", {"eta": 1.0}, "the sampler heun takes no eta"),
    ("minidiff:ddim", {"size": 3}, "has no option size: its options are schedule, T, spacing, predicts, eta"),
    ("no_such_library:Scheduler", {}, "pip install no_such_library"),
    ("math:Scheduler", {}, "math has no Scheduler"),
    ("numpy.nothing:Scheduler", {}, "numpy.nothing cannot be imported: ModuleNotFoundError"),
    ("my scheduler:make", {}, "--scheduler takes MODULE:NAME"),
    ("diffusers:Scheduler", {}, "DDIMScheduler"),
    ("math:sqrt", {}, "math:sqrt makes no scheduler: TypeError"),
    ("math:sqrt", {"x": 2}, "math:sqrt refuses its configuration: TypeError"),
    ("random:seed", {}, "random:seed returned None, where it must return a scheduler"),
    ("minidiff:ddim", {"eta": "x"}, "eta must be a number from 0 to 1, not 'x'"),
    ("minidiff:ddim", {"eta": -1}, "eta must be a number from 0 to 1, not -1"),
    ("minidiff:ddim", {"eta": math.nan}, "eta must be a number from 0 to 1, not nan"),
    ("minidiff:ddpm", {"eta": 5}, "eta must be a number from 0 to 1, not 5"),
])
def test_a_wrong_name_gives_one_sentence(name, config, sentence):
    with pytest.raises(UserError, match=sentence):
        load(name, config)


def test_a_replayed_sampler_gives_the_same_sample():
    """Step by step, our DDIM returns the same sample as in one run."""
    from minidiff.diffusion.denoiser import NetworkDenoiser
    from minidiff.diffusion.samplers import ddim, sample, times
    from minidiff.diffusion.schedules import linear

    scheduler, schedule, x = ours("ddim"), linear(), np.random.default_rng(0).normal(size=(2, 3))

    def network(x_t, t, cond=None):
        return np.tanh(x_t) + t[:, None] / 1000

    whole = sample(ddim(NetworkDenoiser(schedule, "eps", network), x, times(schedule, 9)))
    scheduler.set_steps(9)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, np.full(2, t)), t, x, np.zeros_like(x))
    np.testing.assert_array_equal(x, whole)


def test_the_command_takes_a_scheduler(capsys, tmp_path):
    out = tmp_path / "rows.json"
    assert main(["verify", "--scheduler", "minidiff:ddim", "--scheduler-config", "eta=0.5", "--scheduler-config",
                 "spacing=linspace", "--steps", "7", "--json", str(out)]) == 0
    assert "0 broken" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["config"] == {"eta": 0.5, "spacing": "linspace", "schedule": "linear"}
    assert [row["expected"] for row in written["rows"] if row["verdict"] == "skipped"] == [None] * 5


def test_the_command_takes_the_users_file(capsys, tmp_path, monkeypatch):
    (tmp_path / "my_scheduler.py").write_text(
        "import sys\nfrom support.toy_schedulers import FixedStride, Toy\n\n\ndef make(stride=False):\n"
        "    return FixedStride() if stride else Toy()\n\n\ndef half():\n    return object()\n")
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--scheduler", "my_scheduler:make", "--steps", "7"]) == 0
    assert main(["verify", "--scheduler", "my_scheduler:make", "--scheduler-config", "stride=true"]) == 1
    assert "BROKEN  23 marginals" in capsys.readouterr().out
    assert main(["verify", "--scheduler", "my_scheduler:half"]) == 2
    assert "has no predicts" in capsys.readouterr().err


@pytest.mark.parametrize("text, sentence", [
    ("raise RuntimeError('no such\\nday')", "module boom cannot be imported: RuntimeError: no such day"),
    ("raise SystemExit(3)", "module boom cannot be imported: SystemExit: 3"),
    ("def make(:", "module boom cannot be imported: SyntaxError"),
    ("def make():\n    return {}['stride']", "boom:make makes no scheduler: KeyError: 'stride'"),
    ("make = 3", "boom:make makes no scheduler: TypeError"),
])
def test_whatever_the_users_file_raises_gives_one_sentence(text, sentence, capsys, tmp_path, monkeypatch):
    (tmp_path / "boom.py").write_text(text + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "boom", raising=False)
    try:
        assert main(["verify", "--scheduler", "boom:make"]) == 2
    finally:
        sys.modules.pop("boom", None)
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said and said.count("\n") == 1


@pytest.mark.parametrize("options", [["--steps", "7"], ["--scheduler", "minidiff:ddim", "-T", "10"],
                                     ["--scheduler", "minidiff:ddim", "--plot", "x.png"]])
def test_options_that_would_be_ignored_are_refused(options, capsys):
    assert main(["verify", *options]) == 2
    assert "--scheduler" in capsys.readouterr().err
