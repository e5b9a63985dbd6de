"""The estimate of a picture's memory: its parts by hand, against measured peaks, and what is refused by it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.original_names import write_single_file
from support.wide_autoencoder import widened

from minidiff.cli.main import main
from minidiff.errors import UserError
from minidiff.pretrained import memory
from minidiff.pretrained.checkpoints import open_checkpoint
from minidiff.pretrained.weights import Weights
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent / "checkpoints"
MEASURE = """
import pathlib, resource, sys
import numpy as np
from minidiff.systems.stable_diffusion import StableDiffusion
folder, n = sys.argv[1], int(sys.argv[2])
model = StableDiffusion.load(folder)
def run(n):
    model.decode(np.zeros((1, n // 8, n // 8, 4), np.float32))
def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():                     # on Linux ru_maxrss starts at the value of the process that started it
        return 1024 * int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
run(64)
before = peak()
run(n)
print(peak() - before)
"""


def estimated(folder: Path, height: int, width: int, rows: int = 2) -> memory.Estimate:
    saved = open_checkpoint(folder)
    parts = {part: saved.weights(part, np.float32) for part in saved.parts if part not in ("tokenizer", "tokenizer_2",
                                                                                         "scheduler")}
    return memory.estimate(parts, 8, height, width, rows)


def test_the_parts_by_hand():
    """eps begins with 8 channels, and its decoder ends with 8; sdxl, too."""
    found = estimated(HERE / "eps", 512, 256)
    assert found.unet == memory.IN_UNET * 2 * 64 * 32 * 8 * 4
    assert found.decoder == memory.IN_DECODER * 512 * 256 * 8 * 4
    assert estimated(HERE / "eps", 512, 256, rows=1).unet == found.unet / 2
    assert found.all == found.weights + max(found.unet, found.decoder)
    assert found.weights == sum(4 * m.parameter_count() for m in vars(StableDiffusion.load(HERE / "eps")).values()
                                if hasattr(m, "parameter_count")) + 4 * parameters_of_text("eps")


def parameters_of_text(kind: str) -> int:
    return sum(encoder.parameter_count() for encoder in StableDiffusion.load(HERE / kind).encoders)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell a process's peak")
def test_a_measured_peak_is_near_the_estimate(tmp_path):
    """Whoever makes the decoder need less memory changes the estimate, too."""
    folder = widened(HERE / "eps", tmp_path / "model", 8)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(folder), "256"], capture_output=True, text=True,
                            check=True)
    assert 0.6 < int(result.stdout) / estimated(folder, 256, 256).decoder < 1.5


@pytest.mark.parametrize("single", [False, True])
def test_what_will_not_fit_is_refused_before_a_weight_is_read(single, tmp_path, monkeypatch, capsys):
    model = HERE / "eps"
    if single:
        write_single_file(model, tmp_path / "m.safetensors", "SD 1")
        model = tmp_path / "m.safetensors"
    monkeypatch.setattr(memory, "available", lambda: 100 << 20)

    def sample(*words):
        return main(["sample", "a", "--model", str(model), "--steps", "1", "-o", str(tmp_path / "a.png"), *words])
    monkeypatch.setattr(Weights, "tensor", None)            # no weight is read
    assert sample("--size", "1024x1024") == 2
    err = capsys.readouterr().err
    assert "1024x1024 takes about" in err and "this machine has 0.1: ask for a smaller --size" in err
    assert err.count("\n") == 1
    monkeypatch.setattr(memory, "available", lambda: 1000)
    assert sample() == 2 and "weights alone take" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available", lambda: None)  # a system that does not tell
    assert single or sample("--size", "48x40") == 0         # a single file has CLIP's tokenizer, which is too large


def test_the_image_s_size_and_the_checkpoint_s_own_count_too(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 2 << 20)
    StableDiffusion.check_memory(HERE / "eps", {"size": "64x64"})
    for options in ({"size": "512x512"}, {"image": np.zeros((512, 512, 3), np.float32)}):
        with pytest.raises(UserError, match="a picture of 512x512 takes about"):
            StableDiffusion.check_memory(HERE / "eps", options)
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    with pytest.raises(UserError, match="a picture of 64x64"):
        StableDiffusion.check_memory(HERE / "eps", {})


@pytest.mark.parametrize("scale, rows", [(1, 1), (1.0, 1), (0, 1), (7.5, 2), (None, 2)])
def test_guidance_doubles_the_rows(scale, rows, monkeypatch):
    """Without guidance the network is asked once for each picture."""
    seen, estimate = [], memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *args: seen.append(args[-1]) or estimate(*args))
    StableDiffusion.check_memory(HERE / "eps", {} if scale is None else {"scale": scale})
    assert seen == [rows]


def test_the_memory_of_this_machine(tmp_path, monkeypatch):
    there = memory.available()
    assert there is None or there > 1 << 28
    if there is not None:
        monkeypatch.setattr(memory, "CGROUP", tmp_path / "memory.max")
        for text, expected in (("max\n", None), ("1000000\n", 10**6), ("", None)):
            (tmp_path / "memory.max").write_text(text)
            assert memory.available() == (expected or memory.available())
            assert expected is None or memory.available() == expected
        monkeypatch.delattr("os.sysconf")
        assert memory.available() is None
