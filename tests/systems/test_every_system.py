"""What every system owes: it trains in stages and goes on from anywhere, its file holds it all, its pictures depend on
their own streams, and what it cannot do it refuses."""

import numpy as np
import pytest
from support import small_systems, tiny

from minidiff import checkpoint, systems
from minidiff.engine.random import SampleStreams
from minidiff.errors import UserError
from minidiff.training import run as stages
from minidiff.training import trainer as fit

NAMES = [name for name in systems.SYSTEMS if name != "text-to-image"]    # tests/training/test_main_job.py trains it
FEW = {"steps": 2, "super_steps": 2}                        # of what takes long
DRAWING = [name for name in systems.SYSTEMS if systems.system_class(name).options() is not None]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_systems.ship(monkeypatch)


def draw(system, captions, **options) -> np.ndarray:
    few = {name: value for name, value in FEW.items() if name in system.options()}
    return system.sample(captions, **few | options)


def captions_for(name: str, count: int = 3) -> list[str]:
    return [""] * count if name == "ddpm" else ["a bold seven leaning left", "3", "a wide zero"][:count]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_killed_in_each_of_its_stages_ends_with_the_same_bits(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fit, "SAVE_EVERY", 0.0)             # a state after every step
    monkeypatch.setattr(stages, "draw", lambda trainer, folder: None)
    kind, config = systems.system_class(name), small_systems.CONFIGS[name]

    def run(folder, resume=False):
        return stages.run(tmp_path / folder, kind, tiny.images(), config=config, effort=0.001, resume=resume,
                          quiet=True).system.state_dict()
    straight = run("a")
    step, killed = stages.StageFit.step, set()

    def killing(self):
        """Once in each stage, before its last step."""
        if self.n == self.config.steps - 1 and self.number not in killed:
            killed.add(self.number)
            raise Killed
        return step(self)
    monkeypatch.setattr(stages.StageFit, "step", killing)
    resume = False
    while True:
        try:
            again = run("b", resume)
            break
        except Killed:
            resume = True
    assert killed and same(straight, again)
    assert same(straight, checkpoint.load(tmp_path / "b" / "model.safetensors").tensors)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_its_file_holds_all_of_it(tmp_path, name):
    system, path = small_systems.small(name), tmp_path / "x.safetensors"
    system.save(path, notes={"seed": 3})
    again = type(system).from_checkpoint(checkpoint.load(path))
    again.load_state_dict(checkpoint.load(path).tensors)
    assert again.config == system.config and again.describe() == system.describe()
    assert same(again.state_dict(), system.state_dict())
    if name in DRAWING:
        np.testing.assert_array_equal(draw(again, captions_for(name), seed=1), draw(system, captions_for(name), seed=1))
    other = "clip" if name != "clip" else "ddpm"
    with pytest.raises(UserError, match=f"holds '{name}', and '{other}' was asked for"):
        systems.system_class(other).from_checkpoint(checkpoint.load(path))


@pytest.mark.parametrize("name", DRAWING)
def test_a_picture_depends_on_its_caption_and_its_own_stream(name):
    system, captions = small_systems.small(name), captions_for(name)
    together = draw(system, captions, seed=5)
    assert together.shape == (3, 28, 28, 1) and together.dtype == np.float32 and np.abs(together).max() <= 1
    alone = np.concatenate([draw(system, [c], streams=SampleStreams(5, 3)[i:i + 1]) for i, c in enumerate(captions)])
    # products of other shapes are rounded otherwise, by 1e-7, which a network magnifies
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert not np.array_equal(together, draw(system, captions, seed=6))


@pytest.mark.parametrize("name", DRAWING)
def test_what_it_cannot_draw_is_refused(name):
    system = small_systems.small(name)
    for wrong in ("a 3", [], [3], None):
        with pytest.raises(TypeError, match="captions must be a list of str"):
            draw(system, wrong)
    with pytest.raises(ValueError, match="streams must be one for each of the 2 captions, not 3"):
        draw(system, captions_for(name, 2), streams=SampleStreams(0, 3))
