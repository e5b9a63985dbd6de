"""What every system must keep: its training resumes from anywhere, on a CPU in every precision and on a GPU's stand-in;
its file holds all of it; its pictures depend on their own streams; and it refuses what it cannot do."""

import inspect

import numpy as np
import pytest
from support import small_systems, tiny

from minidiff import checkpoint, systems
from minidiff.engine.random import SampleStreams
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.training import loop
from minidiff.training.run import TrainOptions, run
from minidiff.training.trainer import Trainer

FEW = {"steps": 2, "super_steps": 2}                        # of what takes long
SHORT = TrainOptions(steps=2, batch=4)
DRAWING = [name for name in systems.SYSTEMS if systems.system_class(name).options() is not None]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_systems.ship(monkeypatch)


def draw(system, captions, **options) -> np.ndarray:
    few = {name: value for name, value in FEW.items() if name in system.options()}
    return system.sample(captions, **few | options)


def captions_for(name: str, count: int = 3) -> list[str]:
    read = systems.system_class(name).reads_captions
    return ["a bold seven leaning left", "3", "a wide zero"][:count] if read else [""] * count


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def trained(folder, name: str, options: TrainOptions = SHORT, **more) -> dict:
    """The weights after a short run."""
    return run(folder, systems.system_class(name), tiny.digits(), options, config=small_systems.CONFIGS[name],
               quiet=True, **more).system.state_dict()


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_it_trains_in_half_precision(tmp_path, monkeypatch, name, precision):
    monkeypatch.setattr("minidiff.training.run.draw_preview", lambda trainer, folder: None)
    before = small_systems.new(name).state_dict()
    after = trained(tmp_path, name, TrainOptions(steps=2, batch=4, precision=precision))
    assert all(w.dtype == before[k].dtype and np.isfinite(w).all() for k, w in after.items())
    assert any((after[k] != before[k]).any() for k in before)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_its_stages_can_be_trained_as_they_say(name):
    """Steps, batch, learning rate and average within what a trainer takes; the small runs here ask for other steps."""
    for stage in small_systems.new(name).stages(tiny.digits()):
        config = TrainOptions().for_stage(stage)
        assert (config.steps, config.batch) == (stage.steps, stage.batch_size)
        assert (config.lr, config.ema) == (stage.lr, stage.ema)
        assert stage.name.replace("-", "_").isidentifier() and stage.module.parameters()


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_a_system_that_it_is_not_built_on_is_refused(name):
    kind = systems.system_class(name)
    needs = ", ".join(kind.needs) or "no other system"
    with pytest.raises(UserError, match=f"^{name} is not built on 'dpm': it needs {needs}$"):
        systems.load_needed(kind, {"dpm": "dpm.safetensors"})


# one of them in the default run, whose weights' names begin with all sorts of letters
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "digit-classifier" else pytest.mark.slow)
                                  for name in systems.SYSTEMS])
def test_a_run_killed_in_each_of_its_stages_ends_with_the_same_bits(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)            # a state after every step
    monkeypatch.setattr("minidiff.training.run.draw_preview", lambda trainer, folder: None)
    straight = trained(tmp_path / "a", name)
    step, killed = Trainer.step, set()

    def killing(self):
        """Once in each stage, before its last step."""
        if self.n == self.config.steps - 1 and self.number not in killed:
            killed.add(self.number)
            raise Killed
        return step(self)
    monkeypatch.setattr(Trainer, "step", killing)
    resume = False
    while True:
        try:
            again = trained(tmp_path / "b", name, resume=resume)
            break
        except Killed:
            resume = True
    assert killed and same(straight, again)
    assert same(straight, checkpoint.load(tmp_path / "b" / "model.safetensors").tensors)


@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_its_file_holds_all_of_it(tmp_path, name):
    system, path = small_systems.small(name), tmp_path / "x.safetensors"
    system.save(path, notes={"seed": 3})
    again = type(system).from_header(checkpoint.read_header(path))
    again.load_state_dict(checkpoint.load(path).tensors)
    assert again.config == system.config and again.describe() == system.describe()
    assert same(again.state_dict(), system.state_dict())
    if name in DRAWING:
        np.testing.assert_array_equal(draw(again, captions_for(name), seed=1), draw(system, captions_for(name), seed=1))
    other = "clip" if name != "clip" else "ddpm"
    with pytest.raises(UserError, match=f"holds '{name}', and '{other}' was asked for"):
        systems.system_class(other).from_header(checkpoint.read_header(path))


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


OTHER = {"scale": 0.4, "steps": 4, "sampler": "ddpm", "variance": "beta", "algorithm": 2, "temperature": 0.3,
         "top_k": 1, "rerank": 3, "prior": "text", "prior_scale": 0.2, "prior_steps": 4, "candidates": 5,
         "interval_low": 2.0, "interval_high": 2.0, "super_scale": 0.3, "super_steps": 3, "threshold": "dynamic",
         "aug_level": 0.6}
OTHERS = {("vdm", "sampler"): "ddim"}                      # where that is the default
WITH = {"temperature": {"prior": "autoregressive"}, "threshold": {"scale": 40.0}}           # where an option has effect
CHOICES = [(name, option) for name in DRAWING for option in systems.system_class(name).options()]


@pytest.mark.parametrize("name, option", CHOICES, ids=lambda value: str(value))
def test_each_option_has_its_effect_and_is_that_of_the_trajectory(name, option):
    """Another value gives other pictures; and where there is a trajectory, its last state is what `sample` gives."""
    system, captions = small_systems.small(name), captions_for(name, 2)
    about = WITH.get(option, {}) if set(WITH.get(option, {})) <= set(system.options()) else {}
    value = OTHERS.get((name, option), OTHER[option])
    plain, other = (draw(system, captions, seed=3, **about | more) for more in ({}, {option: value}))
    assert not np.array_equal(plain, other)
    if hasattr(system, "trajectory"):
        few = {name: value for name, value in FEW.items() if name in system.options()}
        *_, last = system.trajectory(captions, seed=3, **few | about | {option: value})
        np.testing.assert_allclose(last.x_t.clip(-1, 1), other, atol=1e-5)


IMAGES = tiny.digits().images(np.arange(2))
LEFT = np.tile(np.arange(28) < 16, (2, 28, 1))[..., None]   # what is known of them
TWO = ["a bold seven leaning left", "3"]
# what a system does beside `sample`: a call with few steps, and another value of each of its options
BESIDE = {
    ("ddpm", "interpolate"): (lambda s, **o: s.interpolate(*IMAGES, [0.0, 0.6], **{"t": 30, "steps": 2} | o),
                              {"t": 20, "steps": 3, "seed": 1, "variance": "beta"}),
    ("ddpm", "bits_per_dim"): (lambda s, **o: s.bits_per_dim(IMAGES, **{"terms": 2} | o),
                               {"seed": 1, "terms": 3, "variance": "beta"}),
    ("vdm", "bits_per_dim"): (lambda s, **o: s.bits_per_dim(IMAGES, **{"terms": 2} | o), {"seed": 1, "terms": 3}),
    ("vdm", "bits_by_noise"): (lambda s, **o: [row.bits for row in s.bits_by_noise(
        IMAGES, **{"rows": 2, "terms": 2} | o)], {"rows": 3, "seed": 1, "terms": 3}),
    ("latent", "vary"): (lambda s, **o: s.vary(IMAGES, TWO, **{"steps": 3} | o),
                         {"strength": 0.9, "scale": 0.4, "steps": 4, "seed": 1, "sampler": "ddpm"}),
    ("latent", "inpaint"): (lambda s, **o: s.inpaint(IMAGES, LEFT, TWO, **{"steps": 2} | o),
                            {"repeats": 2, "scale": 0.4, "steps": 3, "seed": 1}),
    ("dalle2", "embed"): (lambda s, **o: s.embed(TWO, **{"steps": 2} | o),
                          {"prior": "text", "scale": 0.2, "steps": 3, "candidates": 5, "seed": 1}),
    ("dalle2", "decode"): (lambda s, **o: s.decode(s.clip.embed_images(IMAGES), TWO, **{"steps": 2} | o),
                           {"scale": 0.4, "steps": 3, "eta": 1.0, "seed": 1}),
    ("dalle2", "variations"): (lambda s, **o: s.variations(IMAGES, **{"steps": 2} | o),
                               {"eta": 0.5, "scale": 0.4, "steps": 3, "seed": 1}),
    ("dalle2", "interpolations"): (lambda s, **o: s.interpolations(*IMAGES, [0.3], **{"steps": 2} | o),
                                   {"scale": 0.4, "steps": 3}),
    ("dalle2", "text_diff"): (lambda s, **o: s.text_diff(IMAGES[0], "7", "a bold 3", [0.3], **{"steps": 2} | o),
                              {"scale": 0.4, "steps": 3}),
    ("dpm", "bound"): (lambda s, **o: s.bound(np.ones((2, 2)), **o).total, {"seed": 1}),
}


# these are parts of what is called with the same options, and a report and a picture of points (test_dpm.py)
PARTS = {("ddpm", "reverse"), ("dalle", "draw_tokens"), ("dalle2", "decode_states"), ("dalle2", "invert"),
         ("imagen", "cascade"), ("dpm", "picture"), ("dpm", "report")}


def test_nothing_that_takes_options_is_left_out():
    taking = {(name, what) for name in systems.SYSTEMS
              for what, f in inspect.getmembers(systems.system_class(name), inspect.isfunction)
              if what.lstrip("_") == what and what not in ("sample", "trajectory", "save")
              and any(p.kind is p.KEYWORD_ONLY for p in inspect.signature(f).parameters.values())}
    assert taking == BESIDE.keys() | PARTS


@pytest.mark.parametrize("name, what", BESIDE, ids=str)
def test_each_option_of_what_it_does_beside_sample_has_its_effect(name, what):
    system, (act, others) = small_systems.small(name), BESIDE[name, what]
    plain = act(system)
    assert np.array_equal(plain, act(system))
    for option, value in others.items():
        assert not np.array_equal(plain, act(system, **{option: value})), option


OTHER_WAYS = {"dalle2": [{"prior": "autoregressive"}], "dalle": [{"temperature": 0.0}],
              "imagen": [{"threshold": "dynamic"}]}


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_part_whose_weights_are_nan_draws_no_picture(name):
    """Neither as a token, an index or a clipped pixel does NaN become a picture; a part that is not used has none."""
    system, captions, refused = small_systems.new(name), captions_for(name, 2), 0
    small_systems.moved(system)
    parts = [part for part in vars(system).values() if isinstance(part, Module)]
    for options in ({}, *OTHER_WAYS.get(name, [])):
        before = draw(system, captions, **options)
        for part in parts:
            own = {p: p.data for p in part.parameters().values()}
            for p in own:
                p.data = np.full_like(p.data, np.nan)
            try:
                assert np.array_equal(draw(system, captions, **options), before)
            except ValueError:                              # a UserError is one
                refused += 1
            for p, data in own.items():
                p.data = data
    assert refused
