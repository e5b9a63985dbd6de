"""Classifier guidance: both algorithms with an exact model and an exact classifier, and the system around them."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import small_systems
from support.law_tools import Noise, alpha_sigma, alphas_sigmas, fitted_order, quickly, random_mixture
from support.small_systems import CONFIGS, UNET, moved

from minidiff.data import attributes
from minidiff.data import digit_captions as captions
from minidiff.data.attributes import VOCABULARY, Words
from minidiff.data.dataset import DATASETS, DatasetEntry
from minidiff.data.digits import NOT_ASKED, DigitQuestions, classes
from minidiff.data.own_pictures import OwnPictures
from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import static_threshold
from minidiff.diffusion.guidance import ClassifierGuidance
from minidiff.diffusion.samplers import beta, beta_tilde, ddim, ddpm, sample, times
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import UserError
from minidiff.systems.adm import ADM, algorithm_1
from minidiff.systems.stage import Step

CONFIG, ASK = CONFIGS["adm"], DigitQuestions()
seeds = st.integers(0, 2**32)


# ---- the two algorithms, where the model and the classifier are known exactly ----------------------------------------

def exact_gradient(exact):
    """grad log p(y|x_t) = grad log N_y - sum_k r_k grad log N_k, written out."""
    def g(x_t, t, y):
        alpha, sigma = alphas_sigmas(exact.schedule, t, x_t)
        d = x_t[:, None] - alpha[:, None] * exact.means                               # (B, K, D)
        V = alpha[:, None] ** 2 * exact.variances + sigma[:, None] ** 2
        log_p = exact.log_weights - 0.5 * (d**2 / V + np.log(V)).sum(-1)              # (B, K)
        r = np.exp(log_p - log_p.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
        return (-d / V)[np.arange(len(y)), y] + (r[..., None] * d / V).sum(1)
    return g


def is_class(y, K=3):
    return (np.arange(K) == y[:, None],)


def drawn(T, seed, B=8):
    rng = np.random.default_rng(seed)
    exact = random_mixture(schedules.log_snr_linear(T), rng)
    return exact, rng.normal(size=(B, 2)), rng.integers(0, 3, B), rng.normal(size=(B, 2))


def mean_by_hand(schedule, x_t, x0_hat, t, s):
    """DDPM eq. 7 for a jump, from the table."""
    abar_t, abar_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    step = 1 - abar_t / abar_s
    return np.sqrt(abar_s) * step / (1 - abar_t) * x0_hat + np.sqrt(abar_t / abar_s) * (1 - abar_s) / (1 - abar_t) * x_t


@quickly
@given(seeds, st.floats(-3, 8), st.sampled_from([beta, beta_tilde]))
def test_algorithm_1_shifts_the_mean_by_scale_sigma_g_at_x_t(seed, scale, variance):
    exact, x, y, z = drawn(100, seed)
    t, s = 70, 50
    ts, (abar_t, abar_s) = np.full(8, t), exact.schedule.alpha_bar[[t, s]]
    Sigma = 1 - abar_t / abar_s
    Sigma = Sigma if variance is beta else Sigma * (1 - abar_s) / (1 - abar_t)
    g = exact_gradient(exact)
    mu = mean_by_hand(exact.schedule, x, exact(x, ts), t, s)
    expected = mu + scale * Sigma * g(x, ts, y) + np.sqrt(Sigma) * z

    def check(gradient):
        step = next(algorithm_1(exact, gradient, scale, x, [t, s], y, streams=Noise(8, given=z), variance=variance))
        assert step.t == s and step.step == 1
        np.testing.assert_allclose(step.x_t, expected, rtol=1e-9, atol=1e-9)
    check(g)
    if abs(scale) > 0.1:                                    # planted: the gradient at the step's mean is detected
        with pytest.raises(AssertionError):
            check(lambda x_t, t, y: g(mu, t, y))
        with pytest.raises(AssertionError):                 # and at the mean's own time, too
            check(lambda x_t, t, y: g(mu, np.full(8, s), y))


@pytest.mark.parametrize("variance", [beta, beta_tilde])
def test_one_step_of_algorithm_1_equals_the_conditional_step_to_second_order(variance):
    """At scale 1 the error of a step falls with the square of its length; that of the unguided step with its length."""
    exact, x, y, z = drawn(8192, seed=0)
    t, strides, errors, unguided = 4600, [256, 128, 64, 32], [], []
    for stride in strides:
        path = [t, t - stride]

        def first(states):
            return next(states).x_t
        wanted = first(ddpm(exact, x, path, is_class(y), streams=Noise(8, given=z), variance=variance))
        for scale, found in ((1, errors), (0, unguided)):
            x_s = first(algorithm_1(exact, exact_gradient(exact), scale, x, path, y, streams=Noise(8, given=z),
                                    variance=variance))
            found.append(np.abs(x_s - wanted).max())
    assert abs(np.polyfit(np.log(strides), np.log(errors), 1)[0] - 2) < 0.15, errors
    assert abs(np.polyfit(np.log(strides), np.log(unguided), 1)[0] - 1) < 0.15, unguided
    assert errors[0] < unguided[0] / 3


@pytest.mark.parametrize("variance", [beta, beta_tilde])
def test_runs_of_algorithm_1_converge_to_conditional_runs_with_order_1(variance):
    """Whole runs, with noise 0 so that there is no chance in them; at N = 512 the error is below 0.02."""
    exact, x, y, _ = drawn(8192, seed=1)
    Ns, errors, still = [64, 128, 256, 512], [], np.zeros(2)
    for N in Ns:
        path = times(exact.schedule, N, "log_snr")
        wanted = sample(ddpm(exact, x, path, is_class(y), streams=Noise(8, given=still), variance=variance))
        noise = Noise(8, given=still)
        found = sample(algorithm_1(exact, exact_gradient(exact), 1.0, x, path, y, streams=noise, variance=variance))
        errors.append(np.abs(found - wanted).max())
        assert noise.calls == N - 1                         # the last step adds none
    assert abs(fitted_order(errors, Ns) - 1) < 0.15, errors
    assert errors[-1] < 0.02


@quickly
@given(seeds, st.floats(-2, 6), st.integers(1, 12))
def test_algorithm_2_is_classifier_guidance_under_ddim(seed, scale, N):
    """The paper's loop written out, eps_hat in both its places, on a whole run."""
    exact, x, y, _ = drawn(100, seed)
    schedule, g, path = exact.schedule, exact_gradient(exact), times(exact.schedule, N)
    x_t = x
    for t, s in zip(path, [*path[1:], -1], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s), ts = alpha_sigma(schedule, t), alpha_sigma(schedule, s), np.full(8, t)
        eps = (x_t - alpha_t * exact(x_t, ts)) / sigma_t
        eps_hat = eps - scale * sigma_t * g(x_t, ts, y)
        x_t = alpha_s * (x_t - sigma_t * eps_hat) / alpha_t + sigma_s * eps_hat
    guided = sample(ddim(ClassifierGuidance(exact, g, scale), x, path, y))
    np.testing.assert_allclose(guided, x_t, rtol=1e-6, atol=1e-6)      # x_t is divided by an alpha of .0067


@quickly
@given(seeds, st.integers(1, 30))
def test_at_scale_1_algorithm_2_is_the_conditional_sampler_exactly(seed, N):
    exact, x, y, _ = drawn(100, seed)
    path = times(exact.schedule, N)
    conditional = sample(ddim(exact, x, path, is_class(y)))
    guided = sample(ddim(ClassifierGuidance(exact, exact_gradient(exact), 1.0), x, path, y))
    np.testing.assert_allclose(guided, conditional, rtol=1e-6, atol=1e-6)

    # planted: the gradient at the mean of the next step
    def at_mu(x_t, t, y):
        s = max(t[0] - 100 // N, 0)
        return exact_gradient(exact)(mean_by_hand(exact.schedule, x_t, exact(x_t, t), t[0], s), t, y)
    wrong = sample(ddim(ClassifierGuidance(exact, at_mu, 1.0), x, path, y))
    assert np.abs(wrong - conditional).max() > 1e-4


# ---- the system ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model() -> ADM:
    return moved(ADM(CONFIG, None, np.random.default_rng(0)))


PROMPTS = ["3", "a bold seven", "", "a thin, left-leaning, wide 1", "upright"]


def test_what_captions_ask_for():
    assert ASK.classes == (10, 3, 4, 3)
    assert ASK.asked(PROMPTS).tolist() == [[3, -1, -1, -1], [7, 2, -1, -1], [-1] * 4, [1, 1, 1, 2], [-1, -1, 2, -1]]
    rng, words = np.random.default_rng(0), Words("bold", "right", "")
    for digit in range(10):                                 # what a caption asks is what its picture is
        [y] = ASK.asked([captions.caption(rng, digit, words, keep=1.0)])
        assert y.tolist() == [digit, 2, 3, NOT_ASKED] and classes(digit, words, 0) == [digit, 2, 3, 0]
    assert all(classes(0, Words(*w), 0)[1:] == [0 if not a else v.index(a) + 1 for a, v in
                                                 zip(w, VOCABULARY, strict=True)]
               for w in [("thin", "", "wide"), ("", "upright", ""), ("", "left", "narrow")])


@pytest.mark.parametrize("caption_and_scale", [(PROMPTS, 0.0), ([""] * 5, 7.0)])
def test_at_scale_0_or_with_empty_captions_it_is_the_unconditional_sampler(model, caption_and_scale):
    """Bit for bit, by both algorithms."""
    prompts, scale = caption_and_scale
    denoiser = replace(model.ddpm.unguided(), clip=static_threshold)
    x_T, path = SampleStreams(4, 5).normal((28, 28, 1)), times(model.ddpm.schedule, 6)
    found = model.sample(prompts, scale=scale, steps=6, seed=4, algorithm=2)
    np.testing.assert_array_equal(found, sample(ddim(denoiser, x_T, path)))
    streams = SampleStreams(4, 5)
    ancestral = sample(ddpm(denoiser, streams.normal((28, 28, 1)), path, streams=streams))
    np.testing.assert_array_equal(model.sample(prompts, scale=scale, steps=6, seed=4, algorithm=1), ancestral)


@pytest.mark.parametrize("algorithm", [1, 2])
def test_a_picture_depends_on_its_own_seed_and_caption_only(model, algorithm):
    options = {"scale": 5.0, "steps": 4, "algorithm": algorithm}
    together = model.sample(PROMPTS, seed=3, **options)
    assert together.shape == (5, 28, 28, 1) and together.dtype == np.float32 and np.abs(together).max() <= 1
    for i, prompt in enumerate(PROMPTS):
        alone = model.sample([prompt], streams=SampleStreams(3, 5)[i:i + 1], **options)
        np.testing.assert_allclose(alone[0], together[i], atol=2e-3)                # float32, steepened by scale 5
    others = model.sample(PROMPTS[::-1], seed=3, **options)
    assert np.abs(others[0] - together[0]).max() > 2e-2 and np.array_equal(others[2], together[2])


def test_the_classifiers_gradient_is_taken_at_x_t(model, monkeypatch):
    """In both algorithms: at each state and its time, not at the mean of the step."""
    seen, real = [], model.classifier.grad_log_prob
    monkeypatch.setattr(model.classifier, "grad_log_prob", lambda *a: seen.append(a) or real(*a), raising=False)
    for algorithm in (1, 2):
        seen.clear()
        images = model.sample(PROMPTS, scale=2.0, steps=5, seed=8, algorithm=algorithm)
        path = times(model.ddpm.schedule, 5)
        streams = SampleStreams(8, 5)
        x_T, denoiser, y = streams.normal((28, 28, 1)), model.ddpm.unguided(), ASK.asked(PROMPTS)
        states = (algorithm_1(replace(denoiser, clip=static_threshold), real, 2.0, x_T, path, y, streams=streams)
                  if algorithm == 1 else ddim(ClassifierGuidance(denoiser, real, 2.0, static_threshold), x_T, path, y))
        x = [x_T, *(state.x_t for state in states)]
        for (x_t, t, asked_for), wanted, time in zip(seen, x, path, strict=False):
            assert np.array_equal(x_t, wanted) and (t == time).all() and np.array_equal(asked_for, y)
        assert len(seen) == 5 and np.array_equal(images, x[-1])


def test_guidance_moves_pictures_toward_what_is_asked(model):
    """log p(y | x_0) of the samples is larger with guidance than without."""
    y, t = ASK.asked(["3"] * 4), np.zeros(4, int)

    def log_p(scale):
        images = model.sample(["3"] * 4, scale=scale, steps=8)
        with no_grad():
            return model.classifier.log_prob(Tensor(images), t, y).data.mean()
    assert log_p(30.0) > log_p(0.0) > log_p(-30.0)


# ---- training --------------------------------------------------------------------------------------------------------

def test_the_stage_trains_the_classifier_on_noised_images_and_leaves_the_ddpm_alone(data):
    model, trained = small_systems.new("adm", CONFIG), small_systems.small("ddpm").state_dict()
    [stage] = model.stages(data)
    assert stage.module is model.classifier
    assert all(np.array_equal(trained[name], w) for name, w in model.ddpm.state_dict().items())
    x_0, t, eps, y = stage.batch(Step(0, 1, 0, 10, size=50))
    assert sorted(t) == list(range(50))                     # spread evenly over all times
    # the answers are those of the image, and its words are measured from its pixels
    for image, (digit, *heads) in zip(x_0, y, strict=True):
        [i] = np.flatnonzero((data.images(range(len(data))) == image).all(axis=(1, 2, 3)))
        words = Words(*("" if not k else v[k - 1] for k, v in zip(heads, VOCABULARY, strict=True)))
        assert (digit, words) == (data.labels[i], data.words[i])
        assert attributes.name(attributes.measure(image[None, ..., 0]))[0] == words
    # each image has noise of its own: 50 times 784 standard normal numbers, within 6 standard deviations
    assert eps.shape == x_0.shape and eps.dtype == np.float32 and len(np.unique(eps)) > 0.99 * eps.size
    assert abs(eps.mean()) < 6 / np.sqrt(eps.size) and abs(eps.var() - 1) < 6 * np.sqrt(2 / eps.size)


def test_the_loss_is_the_cross_entropy_of_every_question_about_the_noised_image(data):
    model = moved(small_systems.new("adm", CONFIG))
    stage = next(model.stages(data))
    x_0, t, eps, y = stage.batch(Step(1, 1, 0, 10, size=9))
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in (model.ddpm.schedule.alpha(t), model.ddpm.schedule.sigma(t)))
    p = model.classifier.read((alpha * x_0 + sigma * eps).astype(np.float32), t)
    expected = -sum(np.log(head[np.arange(9), a]) for head, a in zip(p, y.T, strict=True)).mean()
    loss = stage.loss(model.classifier, x_0, t, eps, y)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in model.classifier.parameters().values())
    assert all(p.grad is None for p in model.ddpm.parameters().values())


def test_a_new_adm_has_the_configuration_of_its_ddpm(data):
    ddpm_ = small_systems.small("ddpm")
    assert ADM.new(data, needed={"ddpm": ddpm_}).config.ddpm == ddpm_.config


def test_a_new_adm_keeps_the_name_of_its_data_set(data):
    named = copy(data)
    named.name = "other-digits"
    DATASETS.register(named.name, DatasetEntry(lambda folder, split: named, DigitQuestions()))
    try:
        assert ADM.default_config(named, {"ddpm": small_systems.small("ddpm")}).data == "other-digits"
    finally:
        DATASETS.unregister(named.name)


def test_a_ddpm_of_another_configuration_is_refused():
    other = replace(CONFIG, ddpm=replace(CONFIG.ddpm, T=60))
    with pytest.raises(UserError, match="the trained ddpm has another configuration"):
        small_systems.new("adm", other)


def test_without_a_ddpm_there_is_no_adm(data):
    with pytest.raises(ValueError, match="lacks ddpm"):
        ADM.new(data, 0, CONFIG)


def test_a_data_set_without_questions_is_refused():
    DATASETS.register("plain", DatasetEntry(lambda folder, split: None))
    try:
        with pytest.raises(UserError, match="'plain' asks no questions of a classifier"):
            ADM(replace(CONFIG, data="plain"), None, np.random.default_rng(0))
    finally:
        DATASETS.unregister("plain")


@pytest.mark.parametrize("name, words", [("adm", r" has \(4, 4, 3\): train a ddpm on the same data"),
                                         ("dpm", ": leave out --data"), ("digit-classifier", " has no labels")])
def test_a_refusal_of_own_pictures_names_their_folder(name, words):
    """Their data set's name, which files keep, is one that the user never gave."""
    mine = OwnPictures(np.zeros((2, 4, 4, 3), np.uint8), [("a",), ("b",)], "2 pictures of mine/train")
    with pytest.raises(UserError, match=f"the data set of 2 pictures of mine/train{words}"):
        next(small_systems.small(name).stages(mine))


def test_own_pictures_ask_no_questions():
    mine = OwnPictures(np.zeros((2, 28, 28, 1), np.uint8), [("a",), ("b",)], "2 pictures of mine/train")
    with pytest.raises(UserError, match="^the data set of 2 pictures of mine/train asks no questions of a classifier, "
                                        "which adm needs: train it on the digits"):
        ADM.new(mine, needed={"ddpm": small_systems.small("ddpm")})


def test_images_of_another_shape_than_the_ddpms_are_refused(model, data):
    wide = copy(data)
    wide.shape = (28, 32, 1)
    with pytest.raises(UserError, match="train a ddpm on the same data first"):
        next(model.stages(wide))


def test_a_file_gives_the_same_samples(model, tmp_path):
    model.save(tmp_path / "adm.safetensors")
    again = ADM.load(tmp_path / "adm.safetensors")
    assert again.config == CONFIG
    np.testing.assert_array_equal(again.sample(PROMPTS, steps=3), model.sample(PROMPTS, steps=3))


# ---- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, sentence", [
    ({"algorithm": 3}, "algorithm must be a whole number from 1 to 2, not 3"),
    ({"algorithm": True}, "algorithm must be a whole number"), ({"scale": np.nan}, "scale must be a finite number"),
    ({"scale": np.inf, "algorithm": 1}, "scale must be a finite number"), ({"steps": 51}, "steps must be a whole"),
    ({"scale": np.nan, "algorithm": 2}, "scale must be a finite number"),
    ({"streams": SampleStreams(0, 2)}, "streams must be one for each of the 5 captions"),
])
def test_invalid_options_are_refused(model, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        model.sample(PROMPTS, **options)


@pytest.mark.parametrize("changes, sentence", [
    ({"steps": 0}, "steps must be at least 1"), ({"classifier": replace(UNET, channels=3)}, "classifier must read"),
    ({"classifier": replace(UNET, text=8)}, "classifier must read"),
    ({"classifier": replace(UNET, widths=(8, 8, 8, 8), attention=(False,) * 4)}, "H and W multiples of its 16"),
])
def test_invalid_configurations_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(CONFIG, **changes)
