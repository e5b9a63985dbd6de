"""One server for the tests of a file, with a system whose steps a test lets through."""

from pathlib import Path

import pytest
from support import tiny
from support.play import OPEN, Paced, save_paced, serving

from minidiff.data.dataset import DATASETS, DatasetEntry
from minidiff.play import noise
from minidiff.play.offer import Offer
from minidiff.systems import SYSTEMS

CHECKPOINT = Path(__file__).parents[1] / "pretrained" / "checkpoints" / "eps"


@pytest.fixture(scope="module")                             # other tests list the systems that are registered
def offer(tmp_path_factory):
    SYSTEMS.register("paced", Paced)
    folder = tmp_path_factory.mktemp("models")
    tiny.trained_a_little().save(folder / "tiny.safetensors")
    yield Offer([save_paced(folder), str(folder / "tiny.safetensors"), str(CHECKPOINT)])
    SYSTEMS.unregister("paced")


@pytest.fixture(scope="module")
def client(offer):
    with serving(offer) as client:
        yield client


@pytest.fixture(autouse=True)
def _gate_open():
    Paced.gate.set()
    Paced.log.clear()
    yield
    Paced.gate.set()
    while OPEN:
        OPEN.pop().close()


@pytest.fixture
def few():
    """Two hundred digits, as a registered data set."""
    DATASETS.register("few", DatasetEntry(lambda folder, split: tiny.digits()))
    yield
    DATASETS.unregister("few")
    noise._data.cache_clear()
