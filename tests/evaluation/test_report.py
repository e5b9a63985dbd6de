"""The report: a generator that cheats gets what it deserves; and each data set is evaluated by its own judge."""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import small_systems

import minidiff
from minidiff.data import attributes, mnist
from minidiff.data import digit_captions as captions
from minidiff.data.pixels import to_float
from minidiff.engine.random import SampleStreams
from minidiff.errors import UserError
from minidiff.evaluation import JUDGES, check_count, check_draws, evaluate, report
from minidiff.evaluation.pictures import evaluate_pictures
from minidiff.evaluation.report import evaluate_digits, gaussian_pixels, prompts_like
from minidiff.systems.stable_diffusion import StableDiffusion


class Cheat:
    """Answers a caption with a stored real image that fits it."""

    def __init__(self, start: int = 0):
        real = mnist.packed()
        self.images, self.labels = real.images[start:start + 3000], real.labels[start:start + 3000]
        self.words = attributes.name(attributes.measure(self.images))

    def options(self):
        return {}

    def sample(self, prompts, *, streams):
        rng, chosen = np.random.default_rng(len(prompts)), []
        for prompt in prompts:
            digit, wanted = captions.parse(prompt)
            fits = [i for i in range(len(self.labels)) if self.labels[i] == digit
                    and all(a in ("", f) for a, f in zip(wanted, self.words[i], strict=True))]
            chosen.append(rng.choice(fits))
        return to_float(self.images[chosen])[..., None]


class Blind(Cheat):
    """Answers every caption with a random real image."""

    def sample(self, prompts, *, streams):
        chosen = np.random.default_rng(len(prompts)).integers(0, len(self.labels), len(prompts))
        return to_float(self.images[chosen])[..., None]


def test_real_images_that_fit_their_captions_get_full_marks():
    r = evaluate_digits(Cheat(), count=200)
    assert r.digit_accuracy > 0.97 and r.held_out_digit_accuracy > 0.9              # the judge errs, too
    assert r.agreement == r.agreement_slant == r.held_out_agreement == 1
    assert r.held_out_all_right == r.held_out_digit_accuracy
    assert r.fid < 3 * r.fid_floor < r.fid_ceiling and r.precision > 0.8


def test_real_images_that_do_not_fit_get_the_marks_of_chance():
    r = evaluate_digits(Blind(), count=200)
    # one in ten digits is right by chance; 200 draws, 5 sigmas: false alarm 1e-6
    assert r.digit_accuracy < 0.1 + 5 * math.sqrt(0.1 * 0.9 / 200)
    assert r.agreement < 0.7 and r.held_out_all_right < 0.2
    assert r.fid < 3 * r.fid_floor


def test_noise_gets_an_fid_beyond_the_ceiling():
    class Noise(Blind):
        def sample(self, prompts, **options):
            return np.random.default_rng(0).uniform(-1, 1, (len(prompts), 28, 28, 1)).astype(np.float32)
    r = evaluate_digits(Noise(), count=50)
    assert r.fid > r.fid_ceiling and r.digit_accuracy < 0.4 and r.recall == 0


def test_each_rate_is_over_its_own_pictures():
    """A model that draws a real 3 that leans left, whatever it is asked: each rate is the share of such prompts."""
    class Stubborn(Cheat):
        def sample(self, prompts, *, streams):
            fits = [i for i in range(len(self.labels)) if self.labels[i] == 3 and self.words[i] == ("thin", "left", "")]
            return to_float(self.images[[fits[k % len(fits)] for k in range(len(prompts))]])[..., None]
    r = evaluate_digits(Stubborn(), count=100, seed=1)
    prompts = prompts_like(mnist.packed(), 100, report.generator(1, "captions of an evaluation"))
    usual, held_out = ([captions.parse(p) for p in part] for part in (prompts[:100], prompts[100:]))
    # the judge may misread a real image
    assert r.digit_accuracy == pytest.approx(np.mean([digit == 3 for digit, _ in usual]), abs=0.03)
    for k, (name, drawn) in enumerate([("thickness", "thin"), ("slant", "left"), ("width", "")]):
        wanted = [words[k] for _, words in usual if words[k]]
        assert getattr(r, f"agreement_{name}") == pytest.approx(np.mean([word == drawn for word in wanted]))
    wanted = [(word, drawn) for _, words in usual for word, drawn in zip(words, ("thin", "left", ""), strict=True)
              if word]
    assert r.agreement == pytest.approx(np.mean([word == drawn for word, drawn in wanted]))
    assert r.held_out_images == len(held_out) == 20
    assert r.held_out_digit_accuracy == pytest.approx(np.mean([digit == 3 for digit, _ in held_out]), abs=0.06)
    assert r.held_out_all_right == pytest.approx(np.mean([a == (3, ("thin", "left", "")) for a in held_out]), abs=0.06)
    assert 0 < r.held_out_all_right < r.held_out_agreement < 1


def test_prompts_are_of_the_data_and_then_of_each_held_out_combination():
    real = mnist.packed()
    prompts = prompts_like(real, 2000, np.random.default_rng(0))
    asked = [captions.parse(p) for p in prompts]
    assert len(prompts) == 2400 and all(digit is not None for digit, _ in asked)
    shares = np.bincount([digit for digit, _ in asked[:2000]], minlength=10) / 2000
    expected = np.bincount(real.labels, minlength=10) / len(real)
    assert (abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / 2000)).all()   # false alarm 6e-6
    unseen = {(digit, words.thickness, words.slant) for digit, words in asked[2000:]}
    assert unseen == attributes.HELD_OUT
    assert len(prompts_like(real, 2, np.random.default_rng(0))) == 2 + len(attributes.HELD_OUT)
    assert len(prompts_like(real, 1, np.random.default_rng(0))) == 1 + len(attributes.HELD_OUT)
    for count in (0, len(real) + 1):
        with pytest.raises(UserError, match=f"from 1 to 10000, .* not {count}"):
            prompts_like(real, count, np.random.default_rng(0))


def test_the_gaussian_of_the_pixels_has_their_mean():
    """Mean of 2,000 draws against that of the images: 6 sigmas a pixel (false alarm 784 x 2e-9), and 0.1 for the
    clipping to [-1, 1], which moves the mean of a pixel that is often black or white."""
    images = mnist.packed().images[:500]
    x = to_float(images)
    draws = gaussian_pixels(images, 2000, np.random.default_rng(0))
    assert draws.shape == (2000, 28, 28, 1) and np.abs(draws).max() <= 1
    inner = np.abs(x.mean(axis=0)) < 0.2                    # where clipping hardly matters
    sigma = x.std(axis=0, ddof=1)[inner] / math.sqrt(2000)
    difference = np.abs(draws[..., 0].mean(axis=0) - x.mean(axis=0))[inner]
    assert (difference < 6 * sigma + 0.1).all()


@pytest.mark.slow
def test_the_report_is_reproducible_and_does_not_depend_on_the_batches(monkeypatch):
    model = small_systems.small("text-to-image")
    first, other = (evaluate(model, count=20, seed=seed, options={"steps": 2}).as_dict() for seed in (3, 4))
    monkeypatch.setattr(report, "BATCH", 7)
    again = evaluate(model, count=20, seed=3, options={"steps": 2}).as_dict()
    for r in (first, again):
        del r["seconds_per_image"], r["options"]
    assert again.pop("dark_pixels") == pytest.approx(first.pop("dark_pixels"), rel=1e-4)
    assert again.pop("dark_pixels_real") == first.pop("dark_pixels_real")
    assert again == pytest.approx(first, rel=1e-4) and other["fid_ceiling"] != first["fid_ceiling"]


def test_options_are_those_of_sample_with_its_defaults(monkeypatch):
    """The picture of prompt i is drawn from stream (seed, i), with the options that were given and no others."""
    seen = []

    class Asked(Blind):
        def options(self):
            return {"scale": 2.0, "steps": 20}

        def sample(self, prompts, *, streams, **options):
            seen.append((streams.normal((2,)), options))
            return super().sample(prompts, streams=streams)
    monkeypatch.setattr(report, "BATCH", 30)
    found = evaluate_digits(Asked(), count=40, options={"steps": 5}, seed=7)
    assert [options for _, options in seen] == [{"scale": 2.0, "steps": 5}] * 2 and found.options == seen[0][1]
    np.testing.assert_array_equal(np.concatenate([normal for normal, _ in seen]), SampleStreams(7, 48).normal((2,)))
    rows = dict(found.rows())
    assert rows["images"] == "40 + 8 held-out, scale 2, steps 5, seed 7"
    assert rows["judge's own accuracy"].startswith("99.")


def test_an_option_that_is_not_set_is_not_told():
    told = report.options_text({"scale": 2.0, "interval_low": 0.5, "interval_high": None, "sampler": "ddim"})
    assert told == "scale 2, interval_low 0.5, sampler ddim, "


def test_the_progress_bar_gets_the_batches(monkeypatch):
    seen = []

    def progress(batches):
        seen.append(len(batches))
        for batch in batches:
            seen.append(len(range(*batch.indices(1000))))
            yield batch
    monkeypatch.setattr(report, "BATCH", 30)
    evaluate_digits(Blind(), count=40, progress=progress)
    assert seen == [2, 30, 18]


# --- the judge of a data set ------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_models_data_set_chooses_its_judge():
    def evaluate_stripes(model, *, count, options, seed, progress):
        return model, count, options, seed, progress([1])
    model = Blind()
    model.notes = {"dataset": "stripes"}
    with pytest.raises(UserError, match="was trained on pictures that minidiff does not have: name them with --data$"):
        evaluate(model, count=20)
    minidiff.register_judge("stripes", evaluate_stripes)
    try:
        assert evaluate(model, count=3, options={"a": 1}, seed=4) == (model, 3, {"a": 1}, 4, [1])
        with pytest.raises(UserError, match="the judge of stripes brings all that it needs: leave out --judge"):
            evaluate(model, judge="file", count=20)
        old = Old()
        assert evaluate(old, data="stripes")[0] is old      # `data` overrides what the file says
    finally:
        JUDGES.unregister("stripes")
    assert JUDGES["digits"] is evaluate_digits and evaluate(Old(), count=20).images == 20


class Old(Blind):
    notes = {}                                              # its file does not say the data set's name


@pytest.mark.parametrize("judge", [None, "a.safetensors", Path("b.safetensors")])
def test_the_judge_of_digits_is_the_one_that_is_named(judge, monkeypatch):
    class Loaded(Exception):
        pass

    def load(path):
        raise Loaded(path)
    monkeypatch.setattr("minidiff.evaluation.report.load_judge", load)
    with pytest.raises(Loaded) as found:
        evaluate_digits(minidiff.TextToImage.load(), judge=judge, count=20)
    assert found.value.args == (judge,)


def test_all_judges_have_the_same_defaults():
    """So that a number does not depend on which of them was asked directly."""
    for function in (evaluate, *(JUDGES[name] for name in JUDGES), evaluate_pictures):
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
        assert (defaults["seed"], defaults["count"], defaults["options"]) == (0, 1000, None), function
        assert defaults["progress"]([1, 2]) == [1, 2]


def test_a_judge_must_be_a_function():
    with pytest.raises(TypeError, match="function must be a function of a model, like evaluate_digits, not str"):
        minidiff.register_judge("stripes", "evaluate_stripes")
    with pytest.raises(ValueError, match="there is already a judge 'digits'"):
        minidiff.register_judge("digits", evaluate_digits)


def test_a_system_that_draws_no_pictures_of_captions_is_not_evaluated():
    with pytest.raises(UserError, match="^clip draws no pictures of captions: examples/03_clip.py shows what it does$"):
        evaluate(small_systems.small("clip"))
    with pytest.raises(UserError, match="^swirl draws no pictures of captions$"):
        check_draws(SimpleNamespace(name="swirl", example="", options=lambda: None))
    with pytest.raises(UserError, match="^stable-diffusion has no judge: it was trained on pictures that are not"):
        check_draws(StableDiffusion)
    for count in (3, 10_001):
        with pytest.raises(UserError, match=f"^--images must be from 4, for .*recall, to 10000, not {count}$"):
            check_count(count)
