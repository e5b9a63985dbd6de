"""Any system trains stage by stage, and a run that is interrupted anywhere resumes to the same bits."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.toy import Toy, ToyConfig

from minidiff import checkpoint, systems
from minidiff.diffusion.schedules import SCHEDULES
from minidiff.errors import UserError
from minidiff.nn.layers import Linear
from minidiff.systems.stage import Stage
from minidiff.systems.system import System
from minidiff.systems.text_to_image import TextToImage
from minidiff.training import loop
from minidiff.training import run as runs
from minidiff.training.run import TrainOptions
from minidiff.training.trainer import TrainConfig, Trainer


def equal(a: System, b: System) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


RUN = ("config", "resume", "keep", "needed")


def run(folder, data=None, **options):
    more = {name: options.pop(name) for name in RUN if name in options}
    return runs.run(folder, Toy, data or tiny.digits(50), TrainOptions(**options), quiet=True, **more)


def test_the_hash_of_a_needed_system_is_that_of_its_weights():
    """A run refuses to go on beside another CLIP, whose weights have the same names and shapes."""
    a, b, c = (Toy.new(tiny.digits(50), seed) for seed in (0, 0, 1))
    assert runs._hash(a) == runs._hash(b) != runs._hash(c)
    w = next(iter(b.parameters().values()))
    w.data = w.data.copy()
    w.data.flat[-1] += 1e-3
    assert runs._hash(a) != runs._hash(b)


def test_a_run_refuses_to_go_on_beside_another_of_what_it_is_built_on(tmp_path, monkeypatch):
    """The sentence names the one that has changed, and no step is made."""
    class Built(Toy):
        name, needs = "built", ("first", "second")

        @classmethod
        def default_config(cls, data, needed):
            return needed["first"].config
    needed = {name: Toy.new(tiny.digits(50), seed, ToyConfig(4)) for seed, name in enumerate(Built.needs)}
    monkeypatch.setattr(runs, "load_needed", lambda kind, paths: needed)

    def go(**options):
        return runs.run(tmp_path / "a", Built, tiny.digits(50), quiet=True, **options)
    assert go(options=TrainOptions(steps=1), changes={"width": 2}).system.config.width == 2
    assert runs.run(tmp_path / "b", Built, tiny.digits(50), TrainOptions(steps=1), quiet=True).system.config.width == 4
    go(resume=True)
    for name, seed in (("second", 5), ("first", 6)):
        needed[name] = Toy.new(tiny.digits(50), seed)
        says = f"a was started with another {name}, on which built is built: name its file with --needs {name}=FILE, or"
        with pytest.raises(UserError, match=says):
            go(resume=True)


def test_the_seconds_are_those_of_all_sittings(tmp_path, monkeypatch):
    """Of a finished run that is resumed, which makes no more steps, and of one that was stopped half way."""
    whole = run(tmp_path / "not there yet" / "a", steps=3).seconds
    assert run(tmp_path / "not there yet" / "a", resume=True).seconds == whole

    step = Trainer.step

    def stop(self):
        if self.n == 2:
            raise KeyboardInterrupt
        step(self)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", steps=3)
    monkeypatch.setattr(Trainer, "step", step)
    (state,) = sorted((tmp_path / "b" / "1-first").glob("step-000002*"))
    before = checkpoint.read_header(state).meta["seconds"]
    assert 0 < before < run(tmp_path / "b", resume=True).seconds["first"]


class Killed(BaseException):
    pass


@pytest.mark.slow
@settings(max_examples=4)
@given(data=st.data())
def test_a_run_killed_anywhere_goes_on_to_the_same_bits(tmp_path_factory, data):
    """Within a stage, between two, and more than once."""
    kills = sorted(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=3)))
    folder, straight = tmp_path_factory.mktemp("runs"), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SAVE_EVERY", 0.0)               # a state after every step
        straight = run(folder / "a").system
        step, made = Trainer.step, [0]

        def killed(self):
            if kills and made[0] == kills[0]:
                kills.pop(0)
                raise Killed
            made[0] += 1
            return step(self)
        patch.setattr(Trainer, "step", killed)
        resume = False
        while True:
            try:
                again = run(folder / "b", resume=resume).system
                break
            except Killed:
                resume = True
    assert equal(straight, again)
    assert equal(straight, Toy.load(folder / "b" / "model.safetensors"))


def test_the_next_stage_stands_on_the_averaged_weights_of_the_last(tmp_path):
    trained = run(tmp_path / "a").system
    saved = checkpoint.CheckpointFolder(tmp_path / "a" / "1-first").latest()
    for name, w in trained.seen[0].items():
        assert w.tobytes() == saved.tensors[f"ema.{name}"].tobytes() == trained.a.state_dict()[name].tobytes()
        assert (w != saved.tensors[f"model.{name}"]).any()  # which are not the last step's


def test_a_run_writes_what_it_promises(tmp_path):
    trained = run(tmp_path / "a", seed=3)
    assert {str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*")} == {
        "run.json", "model.safetensors", "1-first/step-000004.safetensors", "1-first/loss.png",
        "2-second/step-000005.safetensors", "2-second/loss.png"}
    assert trained.seconds.keys() == {"first", "second"} and min(trained.seconds.values()) > 0
    notes = Toy.load(tmp_path / "a" / "model.safetensors").notes
    assert notes["options"]["seed"] == 3 and notes["options"]["effort"] == 1 and notes["dataset"] == "digits"
    assert notes["seconds"].keys() == {"first", "second"} and trained.losses.keys() == {"first", "second"}


def test_what_a_system_notes_of_itself_stands_in_its_file(tmp_path, monkeypatch):
    """As the judge notes its accuracy, on which its answers are refused or taken."""
    stages = Toy.stages

    def noting(self, data):
        yield from stages(self, data)
        self.notes |= {"accuracy": 0.75}
    monkeypatch.setattr(Toy, "stages", noting)
    run(tmp_path / "a")
    notes = Toy.load(tmp_path / "a" / "model.safetensors").notes
    assert notes["accuracy"] == 0.75 and notes["dataset"] == "digits"


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_the_newest_states_are_kept_as_many_as_asked(keep, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)            # a state after every step
    run(tmp_path / "a", keep=keep)
    for stage, steps in (("1-first", 4), ("2-second", 5)):
        assert sorted(p.stem for p in (tmp_path / "a" / stage).glob("step-*")) == [
            f"step-{n:06}" for n in range(max(1, steps + 1 - keep), steps + 1)]


def test_a_run_is_resumed_with_the_options_that_it_was_started_with(tmp_path, monkeypatch):
    """Without naming them again: its seed and its share of the steps."""
    straight = run(tmp_path / "a", seed=5, effort=2.0).system
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    step = Trainer.step

    def killed(self):
        if self.n == 3:
            raise Killed
        return step(self)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step", killed)
        run(tmp_path / "b", seed=5, effort=2.0)
    assert equal(straight, run(tmp_path / "b", resume=True).system)


@pytest.mark.parametrize("name, first, other", [("seed", 5, 0), ("seed", 0, 5), ("effort", 1.0, 0.5)])
def test_an_option_that_a_resumed_run_cannot_change_is_refused_at_any_value(name, first, other, tmp_path):
    """0 is a value like any other."""
    run(tmp_path / "a", **{name: first})
    with pytest.raises(UserError, match=f"{name}.*{first}"):
        run(tmp_path / "a", resume=True, **{name: other})
    run(tmp_path / "a", resume=True, **{name: first})


def test_changes_are_made_to_the_configuration_that_is_given():
    """And to the default one where none is given; the fields that are not named stay."""
    class Built(Exception):
        pass

    class Wide(Toy):
        @classmethod
        def new(cls, data, seed, config=None, systems=None):
            raise Built(config)

    def config_of(**given):
        with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
            patch.setattr(runs, "refusals", lambda words: nullcontext())
            with pytest.raises(Built) as built:
                runs.run(Path(folder) / "a", Wide, tiny.digits(50), TrainOptions(), quiet=True, **given)
        return built.value.args[0]
    config = tiny.CONFIG
    assert config_of(config=config, changes={"T": 40}) == replace(config, T=40)
    assert config_of(config=config) == config
    assert config_of(changes={"width": 2}) == ToyConfig(width=2)


def test_effort_is_a_share_of_the_steps_and_seeds_differ(tmp_path):
    run(tmp_path / "a", effort=0.5)
    assert (tmp_path / "a" / "1-first" / "step-000002.safetensors").exists()
    assert (tmp_path / "a" / "2-second" / "step-000002.safetensors").exists()
    assert not equal(run(tmp_path / "b").system, run(tmp_path / "c", seed=1).system)


def test_stages_and_steps_draw_numbers_of_their_own(tmp_path):
    drawn = set()
    for number in (1, 2):
        stage = Stage("s", Linear(1, 1, np.random.default_rng(0)), lambda step: (step.rng.random(step.size),), None, 9)
        trainer = Trainer(stage, TrainConfig(steps=9, batch=3), number=number)
        for trainer.n in range(3):
            drawn.add(trainer.batch()[0].tobytes())
    assert len(drawn) == 6


def test_what_cannot_be_gone_on_with_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        run(tmp_path / "a", resume=True)
    run(tmp_path / "a", config=ToyConfig(2))
    with pytest.raises(UserError, match="holds a run of toy: add --resume"):
        run(tmp_path / "a")
    with pytest.raises(UserError, match="was started with --seed 0, not --seed 1, which resuming cannot change"):
        run(tmp_path / "a", seed=1, resume=True)
    with pytest.raises(UserError, match="was started with --effort 1.0, not --effort 2.0, which"):
        run(tmp_path / "a", effort=2.0, resume=True)
    with pytest.raises(UserError, match="was started without --steps 7, which resuming cannot change"):
        run(tmp_path / "a", steps=7, resume=True)
    with pytest.raises(UserError, match="was started with other data: name them with --data"):
        run(tmp_path / "a", data=tiny.digits(49), resume=True)
    for effort in (0.0, 101.0, float("nan")):
        with pytest.raises(UserError, match="effort must be above 0 and at most 100"):
            run(tmp_path / "b", effort=effort)
    assert run(tmp_path / "a", resume=True).system.config.width == 2        # the run's own configuration

    class Other(Toy):
        name = "other"
    with pytest.raises(UserError, match="holds a run of 'toy', not of 'other'"):
        runs.run(tmp_path / "a", Other, tiny.digits(50), quiet=True, resume=True)
    start = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps(start | {"config": {"width": 3}}))
    with pytest.raises(UserError, match="of a run with another configuration"):
        run(tmp_path / "a", resume=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "config_from", lambda *a: SCHEDULES["steep"])      # which another program has
        says = "run.json needs an entry that this program does not have .there is no schedule 'steep': .* resume"
        with pytest.raises(UserError, match=says):
            run(tmp_path / "a", resume=True)
    for damaged in ("{", "[]", "[" * 100_000, json.dumps(start | {"config": 3})):
        (tmp_path / "a" / "run.json").write_text(damaged)
        with pytest.raises(UserError, match="run.json does not say how this run was started"):
            run(tmp_path / "a", resume=True)
    (tmp_path / "a" / "run.json").unlink()
    with pytest.raises(UserError, match="holds a model or a run of another kind"):
        run(tmp_path / "a")


@pytest.mark.parametrize("method", ["default_config", "tokenizer_for", "stages"])
def test_what_a_system_refuses_leaves_no_folder(tmp_path, monkeypatch, method):
    """A data set that it cannot take, for example: one sentence, and the next try with the same --out works."""
    def refuse(*args, **options):
        raise ValueError("images must be square")
        yield                                               # stages is a generator
    with monkeypatch.context() as patch:
        patch.setattr(Toy, method, refuse if method == "stages" else classmethod(lambda *args: next(refuse())))
        with pytest.raises(UserError, match="^toy cannot be trained so: images must be square$"):
            run(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    run(tmp_path / "a")


def test_a_run_killed_before_its_first_state_resumes_with_its_own_data(tmp_path, monkeypatch):
    def killed(self):
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        with pytest.raises(Killed):
            run(tmp_path / "a")
    with pytest.raises(UserError, match="was started with other data"):
        run(tmp_path / "a", data=tiny.digits(49), resume=True)
    run(tmp_path / "a", resume=True)


def test_a_preview_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    stages = Toy.stages

    def with_pictures(self, data):
        for stage in stages(self, data):
            yield replace(stage, picture=lambda: 1 / 0)
    monkeypatch.setattr(Toy, "stages", with_pictures)
    with pytest.warns(UserWarning, match="No preview was drawn .ZeroDivisionError: division by zero.. Training cont"):
        run(tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").exists() and (tmp_path / "a" / "1-first" / "loss.png").exists()


def test_the_state_of_a_stage_is_no_model(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(UserError, match="is the state of one stage: name the run's model.safetensors"):
        Toy.load(tmp_path / "a" / "1-first" / "step-000004.safetensors")


def test_a_file_of_one_system_is_refused_by_another(tmp_path):
    system = Toy.new(tiny.digits())
    system.save(tmp_path / "toy.safetensors")
    with pytest.raises(UserError, match="holds 'toy', and 'text-to-image' was asked for"):
        TextToImage.load(tmp_path / "toy.safetensors")
    with pytest.raises(UserError, match="holds 'text-to-image', and 'toy' was asked for"):
        Toy.load(TextToImage.shipped())


@pytest.mark.parametrize("config, says", [
    ({"width": -1}, "width must be a whole number from 0"), ({"width": 5000}, "from 0 to 4096, not 5000"),
    ({"width": "3"}, "width takes a value like 3, not '3'"), ({"depth": 1}, "has no 'depth'"),
    (7, "must be a dict"), ({"width": 9}, "more weights than the file holds"),
])
def test_a_strangers_configuration_is_refused(tmp_path, config, says):
    system = Toy.new(tiny.digits())
    checkpoint.save(tmp_path / "x.safetensors", system.state_dict(), system.describe() | {"config": config})
    with pytest.raises(UserError, match=says):
        Toy.load(tmp_path / "x.safetensors")


def test_a_field_that_an_older_file_does_not_know_takes_its_default(tmp_path):
    system = Toy.new(tiny.digits())
    checkpoint.save(tmp_path / "x.safetensors", system.state_dict(), system.describe() | {"config": {}})
    assert Toy.load(tmp_path / "x.safetensors").config == ToyConfig()


def test_systems_are_found_by_name(tmp_path, monkeypatch, toy):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Toy, "shipped", classmethod(lambda cls: tmp_path / "nothing"))
    with pytest.raises(UserError, match="no weights of toy yet: train it with minidiff train --system toy"):
        systems.load_system("toy")
    system = Toy.new(tiny.digits())
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    system.save(tmp_path / "runs" / "toy" / "model.safetensors")
    assert equal(system, systems.load_system("toy"))
    system.save(tmp_path / "named.safetensors")
    assert equal(system, systems.load_system("toy", tmp_path / "named.safetensors"))


def test_every_name_is_a_system():
    for name in systems.SYSTEMS:
        assert systems.system_class(name).name == name
    with pytest.raises(UserError, match="no system 'dall-e'.*text-to-image"):
        systems.system_class("dall-e")


def test_describe_is_json():
    assert json.loads(json.dumps(Toy.new(tiny.digits()).describe())) == {"system": "toy", "config": {"width": 3}}
