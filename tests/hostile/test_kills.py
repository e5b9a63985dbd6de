"""Training that is killed at random moments ends with the same bits.

Within one process, and for every system, training/test_run.py and systems/test_every_system.py test the same; a process
that does nothing but save is killed by test_checkpoint.py.
"""

import random
import signal
import subprocess
import sys
import time

import pytest

from minidiff import checkpoint
from minidiff.data import mnist

TRAIN = """
import sys
from minidiff.cli.main import main
from minidiff.training import loop
loop.SAVE_EVERY = 0.0                                       # a state after every step
sys.exit(main(sys.argv[1:]))
"""


def start(folder, *more) -> subprocess.Popen:
    options = ["--system", "dpm", "--data", mnist.PACKED, "--out", folder, *more]
    return subprocess.Popen([sys.executable, "-c", TRAIN, "train", *map(str, options)], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def finished(folder, *more) -> dict:
    assert start(folder, *more).wait(timeout=300) == 0
    return checkpoint.load(folder / "model.safetensors").tensors


@pytest.mark.skipif(sys.platform == "win32", reason="needs kill -9")
@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, kills=20):
    small = ("--set", "T=6", "--set", "hidden=5", "--steps", 10 * kills)
    straight = finished(tmp_path / "a", *small)
    rng, made = random.Random(), 0                          # without a seed on purpose: it must hold at every moment
    while made < kills:
        run, resume = tmp_path / "b", ("--resume",) if (tmp_path / "b" / "run.json").exists() else small
        process = start(run, *resume)
        states, before = lambda run=run: sorted(run.glob("*/step-*")), None
        before, end = states(), time.monotonic() + 60
        while states() == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)                                # until it trains
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        made += 1
        if process.wait(timeout=60) == 0:                   # it was done before
            break
    again = finished(tmp_path / "b", "--resume")
    assert straight.keys() == again.keys()
    assert all(straight[name].tobytes() == again[name].tobytes() for name in straight)
