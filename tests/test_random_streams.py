"""No two uses of random numbers share a stream: of all places in the tree that make one, and of all seeds.

NumPy pads seeds with zeros and cuts large numbers into words of 32 bits, so that seeds which look different may be one.
Here every generator that a use makes is recorded by its first numbers, whatever its seed was.
"""

import ast
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from support.tiny import CONFIG, digits

from minidiff import verify
from minidiff.diffusion import schedules
from minidiff.engine import random
from minidiff.engine.cuda.random import CALL, PLACE, SEED, DeviceSampleStreams
from minidiff.engine.random import SampleStreams, generator
from minidiff.systems.ddpm import DDPM
from minidiff.systems.dpm import DPM, DPMConfig
from minidiff.systems.stage import DRAWS, FIRST_PLACE, Step
from minidiff.systems.text_to_image import TextToImage
from minidiff.verify import watch

ROOT = Path(__file__).parents[1]
FILES = [p for folder in ("minidiff", "examples") for p in sorted((ROOT / folder).rglob("*.py"))]
# makes generators; or makes its own, with a seed that no other use has
MAKERS = {
    "minidiff/engine/random.py": "the place for it",
    "minidiff/engine/cuda/random.py": "Philox with the seed and place of a sample as its key, see below",
    "minidiff/files.py": "the names of temporary files",
    "minidiff/data/dataset.py": "data/ imports nothing of the engine; a seed of 160 bits",
    "minidiff/play/drawing.py": "the names of drawings, which nobody may guess",
    "examples/00_diffusion_in_2d.py": "default_rng(seed), and nothing else is drawn: the first lesson",
    "examples/03_clip.py": "default_rng(0), and nothing else is drawn: its table was measured with it",
    "examples/04_classifier_guidance.py": "default_rng(0); its pictures have the seeds 1 and 2: the same",
    "examples/06_guidance_tradeoff.py": "default_rng(0); its pictures have the seed 1: the same",
}
# a use that is in two places because both must have the same numbers
SHARED = {"what an evaluation compares with"}


# --- what the source says -----------------------------------------------------------------------------------

def made_in(path: Path) -> list[str]:
    """What a file imports or calls that makes random numbers, other than engine/random.py."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in ("random", "secrets", "uuid")]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if node.module in ("random", "secrets", "numpy.random", "uuid") else []
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith((".random", "os")):
            name = ast.unparse(node)
            made = name.startswith(("np.random.", "numpy.random.", "cupy.random.", "xp.random.", "os.urandom"))
            found += [name] if made and not name.endswith(".Generator") else []
    return found


def test_generators_are_made_in_one_place():
    found = {str(path.relative_to(ROOT)): made for path in FILES if (made := made_in(path))}
    assert set(found) == set(MAKERS), {name: made for name, made in found.items() if name not in MAKERS}
    assert found["minidiff/data/dataset.py"] == ["np.random.default_rng"]


def uses_in(path: Path) -> list[str]:
    """The name of each use in a file's calls of `generator` and `SampleStreams`; pictures have none."""
    uses = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).split(".")
        at = 2 if called[-1] == "SampleStreams" else 1 if "SampleStreams" in called or called[-1] == "generator" else 9
        uses += [ast.unparse(arg).strip("f'\"") for arg in node.args[at:at + 1]
                 if isinstance(arg, ast.JoinedStr) or isinstance(getattr(arg, "value", None), str)]
    return uses


def test_each_use_has_a_name_of_its_own():
    """One name in two places would give both the same numbers for the same seed."""
    places = defaultdict(list)
    for path in FILES:
        if path.name != "random.py":
            for use in uses_in(path):
                places[use].append(path.name)
    assert len(places) > 15 and "batch" in places and "noise of a likelihood" in places
    assert {use for use, where in places.items() if len(where) > 1} == SHARED
    assert random.PICTURES not in places and not any(":" in use for use in places)


# --- what is drawn ------------------------------------------------------------------------------------------

def first_weights(seed):
    TextToImage.new(digits(), seed, CONFIG)


def two_steps(seed):
    for number in (0, 1, 2):
        for stage in (1, 2):
            Step(seed, stage, number, 10, 4)


def a_plot(seed):
    with pytest.raises(Drawn):
        watch.plot(SCHEDULE, seed=seed)


class Drawn(Exception):
    """What comes after the stream is made is not needed."""


MODEL, POINTS = TextToImage.new(digits(), 7, CONFIG), DPM.new(None, 7, DPMConfig())
SCHEDULE = schedules.cosine(12)
# each draws for one purpose
USES = {
    "first weights": first_weights,
    "training": two_steps,
    "pictures": lambda seed: MODEL.sample(["a seven"] * 5, steps=1, seed=seed),
    "noise of K": lambda seed: POINTS.bound(np.zeros((3, 2), np.float32), seed=seed),
    "bits per dim": lambda seed: SampleStreams(seed, 3, "noise of bits per dim"),
    "likelihood": lambda seed: SampleStreams(seed, 3, "noise of a likelihood"),
    "images of a likelihood": lambda seed: generator(seed, "images of a likelihood"),
    "captions": lambda seed: generator(seed, "captions of an evaluation"),
    "a verification": lambda seed: verify.report(SCHEDULE, seed=seed),
    "a plot": a_plot,
    "a watched image": lambda seed: watch.watch(SCHEDULE, np.linspace(-1, 1, 16).reshape(4, 4, 1), seed=seed),
    "the user's own": lambda seed: np.random.default_rng([seed, 1, 0, 9]),
}
# a low and a high word, alone and together; the pairs that NumPy makes equal: (2^32 a + b, 0) and (b, a)
SEEDS = [0, 1, 2**32, 2**32 + 1, 2**64 + 5]


def test_no_two_uses_share_a_stream(monkeypatch):
    make, made = np.random.default_rng, []

    def recording(seed=None):
        assert seed is not None, "drawn from the system's entropy: it cannot be repeated"
        made.append(make(seed).integers(0, 2**63, 3).tobytes())
        return make(seed)

    def drawn(*_):
        raise Drawn
    monkeypatch.setattr(np.random, "default_rng", recording)
    monkeypatch.setattr(verify, "computed", lambda law, schedule, rng: [])
    monkeypatch.setattr(watch, "simulate", drawn)
    owner, count = {}, 0
    for seed in SEEDS:
        for name, use in USES.items():
            made.clear()
            use(seed)
            assert made, name
            count += len(set(made))
            for numbers in set(made):
                assert owner.setdefault(numbers, (name, seed)) == (name, seed), f"{name}, seed {seed}: {owner[numbers]}"
    assert len(owner) == count > len(SEEDS) * 50


def test_an_interpolations_noise_is_no_pictures(monkeypatch):
    """Two ends and the steps between: three streams, none of which begins a picture of this seed or the next."""
    made, of_sample = [], random._of_sample
    monkeypatch.setattr(random, "_of_sample", lambda *key: made.append(of_sample(*key).random()) or of_sample(*key))
    model, x_0 = DDPM.__new__(DDPM), np.zeros((2, 2, 1), np.float32)
    model.schedule, model.config, model.reverse = SCHEDULE, CONFIG, None
    with pytest.raises((TypeError, AttributeError)):        # the reverse process is not needed
        model.interpolate(x_0, x_0, [0.0, 1.0], t=5, steps=2, seed=3)
    ends_and_steps, made[:] = list(made), []
    SampleStreams(3, 4), SampleStreams(4, 4)
    assert len(ends_and_steps) == 4 and len(set(ends_and_steps)) == 3 and not set(ends_and_steps) & set(made)


@pytest.mark.parametrize("seed", SEEDS)
def test_pictures_of_ordinary_seeds_are_numpys_own_streams(seed):
    """The shipped pictures were drawn with them.  From 2^32 on they would meet: [2^32 + 1, 5] is [1, 1, 5]."""
    rows = SampleStreams(seed, 3).normal((4,))
    numpys = np.stack([np.random.default_rng([seed, i]).standard_normal(4, np.float32) for i in range(3)])
    assert np.array_equal(rows, numpys) == (seed < 2**32)
    assert np.array_equal(SampleStreams.from_seeds([seed]).normal((4,)), rows[:1])
    other = SampleStreams(seed, 3, "another use").normal((4,))
    assert len({row.tobytes() for row in [*rows, *other]}) == 6
    assert np.array_equal(SampleStreams.from_seeds([seed], "another use").normal((4,)), other[:1])


@pytest.mark.parametrize("seed, use, message", [
    (-1, "batch", "seed must be a whole number of at least 0, not -1"), (1.0, "batch", "seed must be .* not 1.0"),
    ("1", "batch", "seed must be"), (1, "batch:1", "use must be a text without a colon, not 'batch:1'")])
def test_seeds_and_names_that_could_meet_are_refused(seed, use, message):
    """1.0 would be rounded, and "batch:1" with seed 1 would be the use "batch" of seed 1, number 1."""
    with pytest.raises(ValueError, match=message):
        generator(seed, use)


# --- on a GPU: a stream is (seed, place), and a draw of it (seed, place, call) --------------------------------

def test_on_a_gpu_training_and_pictures_have_places_of_their_own(monkeypatch):
    """A cipher of (seed, place, call) gives each its own numbers: no two draws may have the same three."""
    drawn = []
    monkeypatch.setattr(DeviceSampleStreams, "normal", lambda self, shape, *_: drawn.extend(
        map(tuple, self._table[:, [SEED, PLACE, CALL]].tolist())) or np.zeros((len(self), *shape)))
    for seed in (0, 1, 2**32, 2**64 - 1):
        for stage in (1, 2):
            for number in range(3):
                step = Step(seed, stage, number, 10, 2, "cuda")
                for _ in range(DRAWS):
                    step.normal((1,))
                with pytest.raises(RuntimeError, match=f"may ask for noise {DRAWS} times"):
                    step.normal((1,))
        streams = DeviceSampleStreams(seed, 300)
        for _ in range(2 * DRAWS):
            streams.normal((1,))
            streams._table[:, CALL] += np.uint64(1)
    assert len(set(drawn)) == len(drawn) == 4 * (2 * 3 * DRAWS + 300 * 2 * DRAWS)
    assert max(place for _, place, _ in drawn) == FIRST_PLACE + 2
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to"):
        DeviceSampleStreams(2**64, 1)                       # 2^64 would be the seed 0
