"""Every number that a picture is drawn with comes from the streams that were given, and is used once."""

import numpy as np
import pytest
from support import small_systems, tiny

from minidiff import systems
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.engine.random import SampleStreams
from minidiff.evaluation.likelihood import likelihood

CAPTIONS = ["a bold 7", "3"]
STEPS = 4
NOISY = [name for name, sampler in SAMPLERS.items() if sampler.noise]


def images() -> np.ndarray:
    return tiny.digits().images([0, 1])


def samples(name: str, captions=tuple(CAPTIONS), **options):
    return lambda system, **seed: system.sample(list(captions), **options, **seed)


def embeddings(system) -> np.ndarray:
    return system.clip.embed_images(images())


def in_half(x) -> np.ndarray:
    return np.broadcast_to(np.arange(28)[:, None, None] < 14, x.shape)


# name -> (system, how it draws two pictures, how often each stream is asked for normal numbers)
WAYS = {
    **{f"{name}, {sampler}": (name, samples(name, sampler=sampler, steps=STEPS), STEPS)
       for name in ("text-to-image", "glide", "latent", "dit") for sampler in NOISY},
    **{f"{name}, without noise in its steps": (name, samples(name, sampler="ddim", steps=STEPS), 1)
       for name in ("text-to-image", "glide", "latent", "dit")},
    **{f"ddpm, {variance}": ("ddpm", samples("ddpm", ("", ""), variance=variance, steps=STEPS), STEPS)
       for variance in ("learned", "beta", "beta_tilde")},
    **{f"vdm, {sampler}": ("vdm", samples("vdm", ("", ""), sampler=sampler, steps=STEPS), STEPS) for sampler in NOISY},
    "vdm, without noise in its steps": ("vdm", samples("vdm", ("", ""), sampler="ddim", steps=STEPS), 1),
    "consistency": ("consistency", samples("consistency", steps=STEPS), STEPS),
    "consistency, one step": ("consistency", samples("consistency", steps=1), 1),
    "adm, algorithm 1": ("adm", samples("adm", algorithm=1, steps=STEPS), STEPS),
    "adm, algorithm 2": ("adm", samples("adm", algorithm=2, steps=STEPS), 1),
    "dalle, reranked": ("dalle", samples("dalle", rerank=3), 0),
    "dalle2": ("dalle2", samples("dalle2", steps=STEPS, prior_steps=2, candidates=3), 2),
    "dalle2, by codes": ("dalle2", samples("dalle2", steps=STEPS, prior="autoregressive"), 1),
    "dalle2, decoded with eta": ("dalle2", lambda system, **seed: system.decode(
        embeddings(system), CAPTIONS, steps=STEPS, eta=1.0, **seed), STEPS),
    "dalle2, variations": ("dalle2", lambda system, **seed: system.variations(
        images(), steps=STEPS, **seed), STEPS - 1),
    "imagen": ("imagen", samples("imagen", steps=2, super_steps=2, aug_level=0.5), 5),
    "latent, varied": ("latent", lambda system, **seed: system.vary(
        images(), CAPTIONS, strength=1.0, steps=STEPS, sampler="ddpm", **seed), STEPS),
    "latent, in-painted": ("latent", lambda system, **seed: system.inpaint(
        images(), in_half(images()), CAPTIONS, steps=STEPS, **seed), None),
    "latent, in-painted twice over": ("latent", lambda system, **seed: system.inpaint(
        images(), in_half(images()), CAPTIONS, steps=STEPS, repeats=2, **seed), None),
    "dpm": ("dpm", lambda system, **seed: system.sample(2, **seed), small_systems.CONFIGS["dpm"].T + 1),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_systems.ship(monkeypatch)


def test_every_system_that_draws_is_among_them():
    drawing = {name for name in systems.SYSTEMS if systems.system_class(name).options() is not None}
    assert drawing <= {name for name, *_ in WAYS.values()}


@pytest.fixture
def draws(monkeypatch) -> dict[str, list[np.ndarray]]:
    """What streams on the host give, in order: "normal" and "uniform", each (B, ...)."""
    given = {"normal": [], "uniform": []}
    for kind in given:
        inner = getattr(SampleStreams, kind)

        def recording(self, *args, _inner=inner, _kind=kind, **options):
            given[_kind].append(_inner(self, *args, **options))
            return given[_kind][-1].copy()
        monkeypatch.setattr(SampleStreams, kind, recording)
    return given


@pytest.fixture
def made(monkeypatch) -> list[SampleStreams]:
    """The streams that are made from a seed."""
    made, straight = [], SampleStreams.__init__

    def recording(self, *args, **options):
        straight(self, *args, **options)
        made.append(self)
    monkeypatch.setattr(SampleStreams, "__init__", recording)
    return made


def assert_all_different(arrays) -> None:
    """No two rows of draws begin with the same numbers: not two draws of a stream, nor two streams."""
    beginnings = [row.ravel()[:8].astype(np.float64).round(6).tobytes() for a in arrays for row in a if row.size >= 2]
    assert len(set(beginnings)) == len(beginnings)


@pytest.mark.parametrize("way", WAYS)
def test_streams_that_are_given_are_all_that_is_drawn_from_and_nothing_is_drawn_twice(way, draws, made):
    """Streams (5, i) give with any seed what seed 5 gives, and no others are made; each noise of a run is new."""
    name, draw, count = WAYS[way]
    system = small_systems.small(name)
    by_seed = draw(system, seed=5)
    assert len(made) == 1
    assert_all_different(draws["normal"])
    assert_all_different(draws["uniform"])
    if count is not None:
        assert len([a for a in draws["normal"] if len(a) == 2]) == count
    np.testing.assert_array_equal(draw(system, seed=0, streams=SampleStreams(5, 2)), by_seed)
    assert len(made) == 2                                   # the one given
    assert not np.array_equal(draw(system, seed=6), by_seed)


def test_the_bound_of_ddpm_has_new_noise_at_each_time(draws, made):
    x_0 = images()
    small_systems.small("ddpm").bits_per_dim(x_0, terms=4, seed=3)
    assert len(made) == 1
    assert len(draws["normal"]) == 4
    assert_all_different(draws["normal"])
    assert len({u.tobytes() for u in draws["uniform"]}) == 4


def test_the_bound_of_vdm_has_new_noise_at_each_time(draws, made):
    """One noise for each time, and one for the decoder; the table by noise levels draws from streams of its own."""
    model, x_0 = small_systems.small("vdm"), images()
    model.bits_per_dim(x_0, terms=4, seed=3)
    assert len(made) == 1 and len(draws["normal"]) == 5
    model.bits_by_noise(x_0, terms=4, seed=3)
    assert len(made) == 2 and len(draws["normal"]) == 9
    assert_all_different(draws["normal"])
    assert len({u.tobytes() for u in draws["uniform"]}) == 8


def test_an_interpolation_has_a_noise_for_each_end_and_the_same_steps_for_all(draws):
    """The two ends' noises differ; all pictures on the way have the same noise in each step, new at each step."""
    a, b = images()
    small_systems.small("ddpm").interpolate(a, b, [0, 0.5, 1], t=20, steps=STEPS)
    ends, *steps = draws["normal"]
    assert ends.shape == (2, 28, 28, 1) and len(steps) == STEPS - 1 and all((z == z[:1]).all() for z in steps)
    assert_all_different([ends, *(z[:1] for z in steps)])


def test_the_likelihood_never_uses_a_noise_twice(draws, made, monkeypatch):
    """Neither from one batch to the next, nor from the bound to the flow, nor for the flow's probe of its own noise."""
    monkeypatch.setattr("minidiff.evaluation.likelihood.BATCH", 2)
    monkeypatch.setattr("minidiff.evaluation.likelihood.TERMS", 2)
    monkeypatch.setattr("minidiff.evaluation.likelihood.FLOW_STEPS", 2)
    likelihood(small_systems.small("ddpm"), tiny.digits(30), count=4)
    assert len(made) == 1
    assert_all_different(draws["normal"])
    # of each image: the bound's terms and decoder, the flow's noise and probe
    assert sum(len(a) for a in draws["normal"] if a[0].size == 784) == 4 * 3 + 2 * 2
