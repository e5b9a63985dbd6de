"""Every system trains and draws on a GPU by the same code: on the stand-in for CuPy, whose kernels run on this CPU."""

import numpy as np
import pytest
from support import fake_cupy, small_systems, tiny

from minidiff import systems
from minidiff.engine.backend import device_of
from minidiff.engine.random import SampleStreams
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import Trainer

DRAWING = [name for name in systems.SYSTEMS if systems.system_class(name).options() is not None]
FEW = {"steps": 2, "super_steps": 2}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_systems.ship(monkeypatch)


@pytest.fixture
def cupy(monkeypatch):
    return fake_cupy.install(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_each_stage_makes_a_step_on_the_device(cupy, name):
    """The loss of its first step is that of a CPU with the same batch, and the weights stay on the device."""
    system = small_systems.new(name).to("cuda")
    stages = 0
    for number, stage in enumerate(system.stages(tiny.digits()), start=1):
        trainer = Trainer(stage, TrainOptions(steps=2, batch=2).for_stage(stage), number=number, device="cuda")
        loss = trainer.step()
        trainer.step()
        trainer.fetch()
        assert isinstance(loss, cupy.ndarray) and np.isfinite(trainer.losses).all() and len(trainer.losses) == 2
        assert all(isinstance(p.data, cupy.ndarray) for p in trainer.parameters.values())
        trainer.use_averaged_weights()
        stages += 1
    assert stages and all(isinstance(p.data, cupy.ndarray) for p in system.parameters().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWING)
def test_it_draws_the_pictures_of_a_cpu(cupy, name):
    """From the same streams, to the rounding of other kernels; and from the device's own streams, other pictures."""
    captions = [""] * 2 if not systems.system_class(name).reads_captions else ["a bold seven", "3"]
    few = {option: value for option, value in FEW.items() if option in systems.system_class(name).options()}
    expected = small_systems.small(name).sample(captions, streams=SampleStreams(3, 2), **few)
    system = small_systems.on_gpu(name)
    assert system.device == "cuda"
    drawn = system.sample(captions, streams=SampleStreams(3, 2), **few)
    assert isinstance(drawn, np.ndarray) and drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, expected, atol=2e-3)
    own = system.sample(captions, seed=3, **few)
    assert device_of(own) == "cpu" and own.shape == drawn.shape and not np.array_equal(own, drawn)
