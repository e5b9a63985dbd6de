"""Nothing, one, and the last, above the mathematics: data, networks, text, systems, evaluation, pictures, training."""

import json
from functools import partial

import numpy as np
import pytest
from support import small_systems, tiny
from support.command_line import call
from support.few import NO_TIMES, check_gives, check_refuses, rng, streams, tensor, zeros

from minidiff import evaluation, systems
from minidiff.data import attributes, digit_captions, digits, idx, mnist, pixels, swiss_roll
from minidiff.data.dataset import Dataset, check_dataset
from minidiff.data.digits import DigitQuestions, Digits
from minidiff.diffusion import schedules
from minidiff.errors import UserError
from minidiff.evaluation import fidelity, metrics, reconstruction, report
from minidiff.nn import adversary, decoding, embedding_codes, gumbel, image_classifier, kl, optim, quantise
from minidiff.pictures import plots, sheets
from minidiff.systems import clip as clip_system
from minidiff.systems import training_batches
from minidiff.text import clip, span_corruption
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.tokenizer import Tokenizer
from minidiff.training.run import TrainOptions, run
from minidiff.verify import BROKEN, watch
from minidiff.verify import report as verify_report

NOBODY = zeros(0, 28, 28, dtype=np.uint8)                   # no images, as MNIST has them
NONE = zeros(0, 28, 28, 1)                                  # and as the systems have them
FEW = {"steps": 2, "super_steps": 2}                        # of what takes long
T1 = schedules.cosine(1)


def of(count: int) -> Digits:
    return tiny.digits(count)


def nothing() -> Digits:
    return Digits.of(mnist.Images(NOBODY, np.zeros(0, np.uint8), "nothing"))


def small(name):
    return small_systems.small(name)


def tokenizer():
    return Tokenizer.train(["a seven"], 300)


def encoder():
    return TextEncoder(TextEncoderConfig(vocab=300, length=8, width=8, layers=1, heads=1), rng())


def codebook():
    return quantise.Codebook(4, 2, rng())


GIVES = {
    "attributes.measure": (lambda: attributes.measure(NOBODY).thickness, ((0,), "float64")),
    "attributes.name": (lambda: attributes.name(attributes.measure(NONE)), ()),
    "attributes.held_out": (lambda: attributes.held_out([], []), ((0,), "bool")),
    "attributes.agreement": (lambda: attributes.agreement(attributes.Words(), attributes.Words()), (0, 0)),
    "digit_captions.parse": (lambda: digit_captions.parse(""), (None, ("", "", ""))),
    "Digits.images": (lambda: of(3).images([]), ((0, 28, 28, 1), "float32")),
    "Digits.images, no data": (lambda: nothing().images(NO_TIMES), ((0, 28, 28, 1), "float32")),
    "DigitQuestions.labels": (lambda: DigitQuestions().labels(of(3), NO_TIMES), ((0, 4), "int64")),
    "DigitQuestions.asked": (lambda: DigitQuestions().asked([]), ((0, 4), "int64")),
    "pixels.to_float": (lambda: pixels.to_float(NOBODY), ((0, 28, 28), "float32")),
    "pixels.to_uint8": (lambda: pixels.to_uint8(NONE), ((0, 28, 28, 1), "uint8")),
    "swiss_roll.points": (lambda: swiss_roll.points(rng(), 0), ((0, 2), "float32")),
    "swiss_roll.log_prob": (lambda: swiss_roll.log_prob(zeros(0, 2)), ((0,), "float64")),
    "training_batches.random_indices": (lambda: training_batches.random_indices(of(3), rng(), 0), ((0,), "int64")),
    "training_batches.random_captions": (lambda: training_batches.random_captions(of(3), [], rng()), ()),

    "metrics.digits_right": (lambda: metrics.digits_right([], NO_TIMES), ((0,), "bool")),
    "metrics.attribute_matches": (lambda: metrics.attribute_matches([], NONE), (((0, 3), "bool"),) * 2),
    "metrics.share": (lambda: metrics.share(zeros(0, dtype=bool)), 1.0),
    "metrics.mean_cov, one feature": (lambda: metrics.mean_cov(zeros(5, 1)), (((1,), "float64"), ((1, 1), "float64"))),
    "metrics.frechet_distance, one feature": (lambda: metrics.frechet_distance(
        *metrics.mean_cov(zeros(5, 1)), *metrics.mean_cov(zeros(2, 1))), 0.0),
    "report.gaussian_pixels": (lambda: report.gaussian_pixels(tiny.images(3).images, 0, rng()),
                               ((0, 28, 28, 1), "float32")),
    "report.options_text": (lambda: report.options_text({}), ""),

    "adversary": (lambda: adversary.PatchDiscriminator(1, 4, rng())(tensor(0, 8, 8, 1)), ((0, 2, 2, 1), "float32")),
    "next_tokens": (lambda: decoding.next_tokens(zeros(0, 5), np.zeros(0)), ((0,), "int64")),
    "next_tokens, one token": (lambda: decoding.next_tokens(zeros(2, 1), np.zeros(2)).tolist(), (0, 0)),
    "gumbel": (lambda: gumbel.gumbel(rng(), (0, 3)), ((0, 3), "float32")),
    "gumbel_max": (lambda: gumbel.gumbel_max(zeros(0, 3), zeros(0, 3)), ((0,), "int64")),
    "gumbel_softmax": (lambda: gumbel.gumbel_softmax(tensor(0, 3), zeros(0, 3), 1.0), ((0, 3), "float32")),
    "kl_to_uniform": (lambda: gumbel.kl_to_uniform(tensor(0, 3)), ((0,), "float32")),
    "kl_to_uniform, one class": (lambda: gumbel.kl_to_uniform(tensor(2, 1)).data.tolist(), (0.0, 0.0)),
    "kl.kl": (lambda: kl.kl(*[tensor(0, 2)] * 4), ((0, 2), "float32")),
    "Codebook.nearest": (lambda: codebook().nearest(zeros(0, 2)), ((0,), "int64")),
    "Codebook.look_up": (lambda: codebook().look_up(NO_TIMES), ((0, 2), "float32")),
    "Codebook.revive": (lambda: codebook().revive(zeros(0, 2), rng()), 0),
    "Codebook, one code": (lambda: quantise.Codebook(1, 2, rng()).nearest(zeros(3, 2)).tolist(), (0, 0, 0)),
    "usage, one code": (lambda: quantise.usage(np.zeros(3, int), 1), (1.0, 1.0)),
    "slerp": (lambda: embedding_codes.slerp(zeros(0, 3), zeros(0, 3), 0.5), ((0, 3), "float32")),
    "PCA.reduce": (lambda: embedding_codes.PCA(3, 2).reduce(zeros(0, 3)), ((0, 2), "float32")),
    "Buckets.quantise": (lambda: embedding_codes.Buckets(4, 2).quantise(zeros(0, 4)), ((0, 4), "int64")),
    "Quantiles.quantise": (lambda: embedding_codes.Quantiles(4).quantise(zeros(0)), ((0,), "int64")),
    "ImageClassifier.read, one": (lambda: image_classifier.ImageClassifier(
        small_systems.CONFIGS["digit-classifier"].network, rng()).read(zeros(1, 28, 28, 1)),
        (((1, 6), "float32"), ((1,), "int64"))),
    "ImageClassifier.read": (lambda: small("digit-classifier").read(NONE), (((0, 6), "float32"), ((0,), "int64"))),
    "NoisyClassifier.read": (lambda: small("adm").classifier.grad_log_prob(NONE, NO_TIMES, zeros(0, 4, dtype=int)),
                             ((0, 28, 28, 1), "float32")),
    "WarmupCosine, one step": (lambda: [optim.WarmupCosine(1.0, 1, warmup)(0) for warmup in (0, 1)], (0.5, 1.0)),
    "AdamW of nothing": (lambda: optim.AdamW({}).step([], 1e-3), None),
    "clip_by_norm": (lambda: optim.clip_by_norm([zeros(0)], 1.0), 0.0),

    "Tokenizer.train": (lambda: Tokenizer.train([], 300).vocab_size, 259),
    "Tokenizer.encode": (lambda: tokenizer().encode(""), ()),
    "Tokenizer.decode": (lambda: tokenizer().decode([]), ""),
    "Tokenizer.batch": (lambda: tokenizer().batch([], 8), (((0, 8), "int32"), ((0, 8), "bool"))),
    "Tokenizer.batch, an empty caption": (lambda: tokenizer().batch([""], 2), (((1, 2), "int32"), ((1, 2), "bool"))),
    "TextEncoder": (lambda: encoder()(zeros(0, 8, dtype=int), zeros(0, 8, dtype=bool)).tokens,
                    ((0, 8, 8), "float32")),
    "TextEncoder, one token": (lambda: encoder()(zeros(2, 1, dtype=int), np.ones((2, 1), bool)).pooled,
                               ((2, 8), "float32")),
    "clip_loss, one pair": (lambda: clip.clip_loss(tensor(1, 3) + 1, tensor(1, 3) + 1, clip.first_log_scale()).item(),
                            0.0),
    "unit": (lambda: clip.unit("captions", tensor(0, 3)), ((0, 3), "float32")),
    "recall_at, one": (lambda: clip.recall_at(1, zeros(1, 1)), 1.0),
    "corrupt": (lambda: span_corruption.corrupt([], np.zeros(0, bool), [9]), ((), (9,))),
    "restore": (lambda: span_corruption.restore([], [], [9]), ()),
    "without_padding": (lambda: clip_system.without_padding(zeros(0, 5, dtype=int), zeros(0, 5, dtype=bool)),
                        (((0, 0), "int64"), ((0, 0), "bool"))),

    "CLIP.embed_images": (lambda: small("clip").embed_images(NONE), ((0, 8), "float32")),
    "CLIP.embed_captions, an empty one": (lambda: small("clip").embed_captions([""]), ((1, 8), "float32")),
    "CLIP.zero_shot": (lambda: small("clip").zero_shot(NONE, digit_captions.phrasings()), ((0,), "int64")),
    "CLIP.zero_shot, one class": (lambda: small("clip").zero_shot(zeros(2, 28, 28, 1), [["one"]]).tolist(), (0, 0)),
    "VQAutoencoder.reconstruct": (lambda: small("autoencoder-vq").reconstruct(NONE), ((0, 28, 28, 1), "float32")),
    "KLAutoencoder.reconstruct": (lambda: small("autoencoder-kl").reconstruct(NONE), ((0, 28, 28, 1), "float32")),
    "KLAutoencoder.posterior_of": (lambda: small("autoencoder-kl").posterior_of(nothing()),
                                   (((0, 7, 7, 2), "float32"),) * 2),
    "DPM.reverse_step": (lambda: small("dpm").reverse_step(zeros(0, 2), NO_TIMES), (((0, 2), "float64"),) * 2),
    "DPM.sample, one": (lambda: small("dpm").sample(1), ((1, 2), "float32")),

    "sheet, one pixel": (lambda: sheets.sheet(zeros(1, 1, 1, 1), [""]).mode, "RGB"),
    "strip, one": (lambda: sheets.strip(zeros(1, 1, 1, 1, 1), [""], labels=[""]).mode, "RGB"),
    "scatter, no points": (lambda: plots.scatter([("a", [zeros(0, 2)])], ["t"]).mode, "RGB"),
    "panels, one point": (lambda: plots.panels([plots.Panel("a", "x", "y", [("s", [1], [1], "o")], log_x=True,
                                                            log_y=True)]).mode, "RGB"),
    "running_mean": (lambda: plots.running_mean(np.zeros(0))[1], ((0,), "float64")),
    "verify.report, T = 1": (lambda: [row for row in verify_report(T1) if row.verdict == BROKEN], ()),
    "watch.plot, T = 1": (lambda: watch.plot(T1).mode, "RGB"),
    "watch.watch, T = 1": (lambda: [state.t for state in watch.watch(T1, zeros(2, 1, 1), 10)], (-1, 0)),
}


@pytest.mark.parametrize("name", GIVES)
def test_the_empty_result(name):
    check_gives(*GIVES[name])


REFUSES = {
    "measure, one pixel": (lambda: attributes.measure(zeros(1, 1, 1)), "sides of 2 pixels or more"),
    "phrasings": (lambda: digit_captions.phrasings([]), "patterns must"),
    "no data": (lambda: check_dataset(nothing()), "has no images"),
    "random_indices": (lambda: training_batches.random_indices(nothing(), rng(), 3), "has no images"),
    "points": (lambda: swiss_roll.points(rng(), -1), "count must be at least 0"),
    "idx.encode": (lambda: idx.encode(NOBODY), "none empty"),
    "idx.encode, a number": (lambda: idx.encode(np.uint8(3)[...]), "1 to 4 axes"),
    "idx.parse": (lambda: idx.parse(b"", "a file"), "is not an IDX file"),
    "mean_cov": (lambda: metrics.mean_cov(zeros(0, 3)), "N of at least 2"),
    "mean_cov, one": (lambda: metrics.mean_cov(zeros(1, 3)), "N of at least 2"),
    "precision_recall": (lambda: metrics.precision_recall(zeros(0, 3), zeros(0, 3)), "real must be features"),
    "gaussian_pixels": (lambda: report.gaussian_pixels(NOBODY, 3, rng()), "N of at least 2"),
    "gaussian_pixels, one": (lambda: report.gaussian_pixels(NOBODY[:1], 3, rng()), "N of at least 2"),
    "prompts_like": (lambda: report.prompts_like(tiny.images(3), 0, rng()), "from 1 to 3"),
    "draw": (lambda: report.draw(None, [], {}, 0), "count must be a whole number of at least 1"),
    **{f"check_count, {n}": (lambda n=n: evaluation.check_count(n), "must be from 4, .* to 10000, not")
       for n in (0, 3, 10_001)},
    "fidelity.measure": (lambda: fidelity.measure(NONE, [], zeros(4, 6), small("digit-classifier")), "at least 2"),
    "fidelity.measure, one": (lambda: fidelity.measure(zeros(1, 28, 28, 1), ["3"], zeros(4, 6),
                                                       small("digit-classifier")), "at least 2"),
    **{f"reconstruction.measure, {name}": (lambda name=name: reconstruction.measure(
        small(name), NONE, NO_TIMES, small("digit-classifier")), "at least one image")
       for name in ("autoencoder-kl", "autoencoder-vq")},
    **{f"rate, {name}": (lambda name=name: small(name).rate(NONE), "at least one image")
       for name in ("autoencoder-kl", "autoencoder-vq")},
    "next_tokens": (lambda: decoding.next_tokens(zeros(2, 0), np.zeros(2)), "K at least 1"),
    **{f.__name__: (lambda f=f: f(tensor(2, 0), zeros(2, 0), *([1.0] if f is gumbel.gumbel_softmax else [])),
                    "K at least 1") for f in (gumbel.gumbel_max, gumbel.gumbel_softmax)},
    "kl_to_uniform": (lambda: gumbel.kl_to_uniform(tensor(2, 0)), "at least one element"),
    "Codebook": (lambda: quantise.Codebook(0, 2, rng()), "K and D must be at least 1"),
    "usage": (lambda: quantise.usage(NO_TIMES, 4), "ids must be some of"),
    "PCA.fit": (lambda: embedding_codes.PCA(3, 2).fit(zeros(0, 3)), "not empty"),
    "Buckets.fit": (lambda: embedding_codes.Buckets(4, 2).fit(zeros(0, 4)), "not empty"),
    "Quantiles.fit": (lambda: embedding_codes.Quantiles(4).fit(zeros(0)), "at least one number"),
    "WarmupCosine": (lambda: optim.WarmupCosine(1.0, 0, 0), "steps must be at least 1"),
    "Tokenizer.batch": (lambda: tokenizer().batch(["a"], 1), "it takes at least 2"),
    "TextEncoder": (lambda: encoder()(zeros(2, 0, dtype=int), zeros(2, 0, dtype=bool)), "at least one token"),
    "clip_loss": (lambda: clip.clip_loss(tensor(0, 3), tensor(0, 3), clip.first_log_scale()), "not empty"),
    "recall_at": (lambda: clip.recall_at(1, zeros(0, 0)), "not empty"),
    "random_spans": (lambda: span_corruption.random_spans(1, rng()), "count must be at least 2"),
    "embed_classes": (lambda: small("clip").embed_classes([[], []]), "at least one"),
    "embed_captions": (lambda: small("clip").embed_captions([]), "at least one"),
    "interpolate": (lambda: small("ddpm").interpolate(NONE[0:0].sum(0), NONE.sum(0), []), "lambdas must be"),
    **{f"DPM.{name}": (lambda name=name: list(getattr(small("dpm"), name)(0)), "count.* must be")
       for name in ("sample", "trajectory", "report", "picture")},
    "sheet": (lambda: sheets.sheet(NONE), "with at least one image"),
    "strip": (lambda: sheets.strip(zeros(0, 1, 4, 4, 1)), "S of at least 1"),
    "strip of no samples": (lambda: sheets.strip(zeros(2, 0, 4, 4, 1)), "with at least one image"),
    "gif": (lambda: sheets.gif(zeros(0, 1, 4, 4, 1), "never.gif"), "S of at least 1"),
    "panels": (lambda: plots.panels([]), "row has no panels"),
    "panels without values": (lambda: plots.panels([plots.Panel("a", "x", "y", [])]), "series has no value"),
    "scatter": (lambda: plots.scatter([], ["t"]), "each takes at least one"),
    "scatter without titles": (lambda: plots.scatter([("a", [])], []), "each takes at least one"),
    "watch, one pixel": (lambda: watch.watch(T1, zeros(1, 1, 1)), "at least two numbers"),
    "watch, one time": (lambda: watch.watch(T1, zeros(2, 1, 1), 1), "at least two numbers"),
}


@pytest.mark.parametrize("name", REFUSES)
def test_the_refusal(name):
    check_refuses(*REFUSES[name])


# --- systems ------------------------------------------------------------------------------------------------

DRAWING = [name for name in systems.SYSTEMS if systems.system_class(name).options() is not None]


@pytest.mark.parametrize("name", DRAWING)
def test_no_caption_is_refused_and_an_empty_one_is_drawn(name, monkeypatch):
    small_systems.ship(monkeypatch)
    model = small(name)
    few = {option: value for option, value in FEW.items() if option in model.options()}
    for captions in ([], np.array(["3", "4"]), {"3", "4"}, iter("34")):
        check_refuses(partial(model.sample, captions),
                      "captions must be a list of str, one for each picture and at least one")
    check_gives(lambda: model.sample([""], **few), ((1, 28, 28, 1), "float32"))
    if "steps" in few:
        check_refuses(lambda: model.sample([""], **few | {"steps": 0}), "steps must be")
        check_gives(lambda: model.sample([""], **few | {"steps": 1}), ((1, 28, 28, 1), "float32"))


@pytest.mark.filterwarnings("ignore:.*is too long")
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_one_step_on_one_image(name, tmp_path, monkeypatch):
    """It trains, or says before the first step why not: the classifier's statistics need two images."""
    small_systems.ship(monkeypatch)
    monkeypatch.setattr("minidiff.training.run.draw_preview", lambda trainer, folder: None)

    def train(count):
        return run(tmp_path, systems.system_class(name), of(count), TrainOptions(steps=1, batch=1),
                   config=small_systems.CONFIGS[name], quiet=True)
    if name == "digit-classifier":
        check_refuses(lambda: train(1), "measured on at least two labelled images")
        assert not any(tmp_path.iterdir())
    trained = train(2 if name == "digit-classifier" else 1).system
    assert all(np.isfinite(w).all() for w in trained.state_dict().values())


def test_an_empty_data_set_is_refused_before_a_folder_is_made(tmp_path):
    check_refuses(lambda: run(tmp_path / "run", systems.system_class("ddpm"), nothing()), "has no images")
    assert not (tmp_path / "run").exists()


def test_digits_of_one_kind_train_the_classifier(tmp_path):
    packed = mnist.packed()
    sevens = np.flatnonzero(packed.labels[:200] == 7)[:3]
    data = Digits.of(mnist.Images(packed.images[sevens], packed.labels[sevens], "sevens"))
    trained = run(tmp_path, systems.system_class("digit-classifier"), data, TrainOptions(steps=1, batch=1),
                  config=small_systems.CONFIGS["digit-classifier"], quiet=True).system
    assert np.isfinite(trained.cov.data).all() and trained.notes["measured on"] == "sevens"


# --- commands -----------------------------------------------------------------------------------------------

def test_only_held_out_digits_are_refused_before_the_work(tmp_path, capsys):
    packed = mnist.packed()
    images = packed.images[:2000]
    held = np.flatnonzero(attributes.held_out(packed.labels[:2000], attributes.name(attributes.measure(images))))[:3]
    for name, array in zip(mnist.FILES["train"], (images[held], packed.labels[held]), strict=True):
        (tmp_path / name).write_bytes(idx.encode(array))
    assert call("train", "--data", tmp_path, "--steps", 1, "--out", tmp_path / "run") == 2
    assert "all 3 images of MNIST in" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A training of the small text-to-image system, as arguments of the command line, and its folder."""
    kind = systems.system_class("text-to-image")
    monkeypatch.setattr(kind, "config_for", classmethod(lambda cls, shape: tiny.CONFIG))
    monkeypatch.setattr(mnist, "load", lambda *a, **k: tiny.images())
    return ("train", "--out", tmp_path / "run", "--steps", 1, "--batch", 1), tmp_path / "run"


@pytest.mark.parametrize("images", [1, 2, 3, 10_001])
def test_too_few_pictures_to_judge_are_refused_before_the_work(images, small_run, capsys):
    arguments, folder = small_run
    assert call(*arguments, "--images", images) == 2
    assert call("evaluate", "--images", images) == 2
    assert capsys.readouterr().err.count("--images must be from 4, for precision and recall, to 10000") == 2
    assert not folder.exists()


@pytest.mark.slow
def test_the_fewest_pictures_are_judged(small_run, capsys):
    arguments, folder = small_run
    assert call(*arguments, "--images", 4) == 0
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["evaluation"]["images"] == 4 and len(results["loss"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("failure", [UserError("the judge is damaged."), ZeroDivisionError()])
def test_a_failing_evaluation_takes_no_result(failure, small_run, monkeypatch, capsys):
    def fail(*_, **__):
        raise failure
    monkeypatch.setattr(evaluation, "evaluate", fail)
    arguments, folder = small_run
    assert call(*arguments) != 0
    if isinstance(failure, UserError):
        assert f"damaged; the training is done, and its weights are in {folder}" in capsys.readouterr().err
    assert {"model.safetensors", "results.json", "sheet.png"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["loss"].keys() == {"diffusion"}


def test_a_data_set_without_prompts_is_drawn_without_a_sheet(small_run, monkeypatch, capsys):
    monkeypatch.setattr(digits.Digits, "prompts", ())
    arguments, folder = small_run
    assert call(*arguments, "--images", 0) == 0
    assert (folder / "results.json").exists() and not (folder / "sheet.png").exists()
    assert 'minidiff sample ""' in capsys.readouterr().out


def test_the_prompts_of_a_data_set_of_one_image():
    class One(Dataset):
        def __len__(self):
            return 1

        def caption(self, i, rng):
            return f"caption {i}"
    assert One().prompts == ("caption 0", "") and One().text(rng()).count("caption 0") == 5


@pytest.mark.parametrize("T", [1, 2])
def test_verify_of_the_shortest_schedules(T, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sheets.save(sheets.sheet(zeros(1, 2, 2, 1)), "image.png")
    assert call("verify", "-T", T, "--plot", "plot.png", "--watch", "image.png", "--json", "rows.json") == 0
    assert {"plot.png", "watch.png", "rows.json"} <= {path.name for path in tmp_path.iterdir()}


def test_one_stream_and_none():
    assert len(streams(1)) == 1 and len(streams(0)) == 0
