"""A run on disk: it loses nothing when it is interrupted, when it diverges, or while the disk is full."""

import os
import signal
import subprocess
import sys

import pytest
from support import tiny

from minidiff import checkpoint
from minidiff.errors import UserError
from minidiff.systems.text_to_image import TextToImage
from minidiff.training import loop, run
from minidiff.training.trainer import Trainer


def equal(a, b) -> bool:
    """Bit for bit, NaN included."""
    return a.keys() == b.keys() and all(x.dtype == b[k].dtype and x.tobytes() == b[k].tobytes() for k, x in a.items())


def train(folder, steps: int = 6, batch: int = 4, count: int = 200, **options):
    return run.run(folder, TextToImage, tiny.digits(count), run.TrainOptions(steps=steps, batch=batch),
                   config=tiny.CONFIG, quiet=True, **options)


def test_a_run_that_diverges_says_where_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    step = Trainer.step

    def diverge(self):
        if self.n == 3:
            raise FloatingPointError("the loss of step 3 is nan and its gradient's norm nan")
        return step(self)
    monkeypatch.setattr(Trainer, "step", diverge)
    with pytest.raises(UserError, match=r"step 3 is nan.*step-000003\.safetensors.*lower --lr"):
        train(tmp_path / "run", steps=5)
    assert checkpoint.CheckpointFolder(tmp_path / "run" / "1-diffusion").latest().meta["step"] == 3
    monkeypatch.setattr(loop, "SAVE_EVERY", 1e9)
    with pytest.raises(UserError, match="^training stopped: the loss of step 3 is nan and its gradient's norm nan; no "
                                        "state was saved before it; start a new run in another --out with a lower"):
        train(tmp_path / "again", steps=5)
    # a resumed run goes back to the state that it resumed from
    with pytest.raises(UserError, match=r"the last good state is .*/run/1-diffusion/step-000003\.safetensors;"):
        train(tmp_path / "run", steps=5, resume=True)


def test_the_bar_shows_the_mean_of_the_last_50_losses(tmp_path, monkeypatch):
    shown = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def set_postfix_str(self, text, refresh):
            shown.append(text)

        def update(self):
            pass

    def step(self):
        self.losses.append(float(self.n))
        self.n += 1
    monkeypatch.setattr(loop, "progress", lambda **options: Bar())
    monkeypatch.setattr(Trainer, "step", step)
    train(tmp_path / "run", steps=80)
    assert [float(text.split()[1].rstrip(",")) for text in shown] == [
        pytest.approx(sum(range(max(0, n - 50), n)) / min(n, 50), abs=1e-4) for n in range(1, 81)]


def test_a_run_writes_what_it_promises_and_can_be_resumed(tmp_path, monkeypatch):
    straight = train(tmp_path / "a").system.state_dict()
    names = {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*")}
    assert names == {"run.json", "model.safetensors", "1-diffusion/step-000006.safetensors",
                     "1-diffusion/samples.png", "1-diffusion/loss.png"}

    # the state of a stage that trains the whole system is a model, too: with the averaged weights
    state = tmp_path / "a" / "1-diffusion" / "step-000006.safetensors"
    assert equal(TextToImage.load(state).state_dict(), straight)
    raw = checkpoint.load(state).tensors
    assert any((raw[f"model.{name}"] != w).any() for name, w in straight.items() if f"model.{name}" in raw)

    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)            # a state after every step
    step = Trainer.step

    def killed(self):
        if self.n == 4:
            raise KeyboardInterrupt
        return step(self)
    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b")
    monkeypatch.setattr(Trainer, "step", step)
    states = sorted(p.name for p in (tmp_path / "b" / "1-diffusion").glob("step-*"))
    assert states == [f"step-00000{i}.safetensors" for i in (2, 3, 4)]
    resumed = train(tmp_path / "b", resume=True).system.state_dict()
    assert equal(straight, resumed)
    a, b = (TextToImage.load(tmp_path / x / "model.safetensors").state_dict() for x in "ab")
    assert equal(a, b) and equal(a, straight)
    last = [checkpoint.CheckpointFolder(tmp_path / x / "1-diffusion").latest().tensors for x in "ab"]
    assert equal(*last)                                     # the optimiser and the losses, too


def test_a_full_disk_does_not_stop_the_training(tmp_path, monkeypatch):
    """While the disk is full, saving warns; once there is room again, all is saved."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    save, calls = checkpoint.CheckpointFolder.save, []

    def full_at_first(self, step, *state):
        calls.append(step)
        if step < 3:
            raise UserError("runs/x could not be written (No space left on device).")
        return save(self, step, *state)
    monkeypatch.setattr(checkpoint.CheckpointFolder, "save", full_at_first)
    with pytest.warns(UserWarning, match="No space left.*Training continues"):
        train(tmp_path / "run", steps=4, batch=2)
    assert calls == [1, 2, 3, 4, 4]
    assert checkpoint.CheckpointFolder(tmp_path / "run" / "1-diffusion").latest().meta["step"] == 4


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    """The real command, a real SIGINT."""
    command = [sys.executable, "-m", "minidiff", "train", "--out", "run", "--images", "0"]
    data = tmp_path / "data"
    data.mkdir()
    from minidiff.data import mnist
    for file in mnist.PACKED.glob("*.gz"):
        (data / file.name).write_bytes(file.read_bytes())
    command += ["--data", str(data)]
    process = subprocess.Popen([*command, "--batch", "4", "--steps", "100000"], cwd=tmp_path, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONUNBUFFERED": "1"})
    output = b""
    while b"loss" not in output:                            # the progress bar shows one after the first steps
        part = process.stderr.read1()
        assert part, f"it ended by itself: {output.decode()}"
        output += part
    process.send_signal(signal.SIGINT)
    output = (output + process.communicate(timeout=300)[1]).decode()
    assert process.returncode == 1
    assert "minidiff train --system text-to-image --resume --out run" in output
    saved = checkpoint.CheckpointFolder(tmp_path / "run" / "1-diffusion").latest()
    assert saved.meta["step"] > 0
    # shorten the saved run, so that it ends; then resume it as the message says
    steps = saved.meta["step"] + run.WARMUP                 # not fewer than WARMUP, so that only `steps` changes
    checkpoint.save(saved.path, saved.tensors, saved.meta | {"train": saved.meta["train"] | {"steps": steps}})
    start = tmp_path / "run" / "run.json"
    start.write_text(start.read_text().replace('"steps": 100000', f'"steps": {steps}'))
    done = subprocess.run([*command, "--resume"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
