"""Consistency distillation: the boundary, the pairs, what learns and what is held fixed, and its known fixed point on
Gaussian data."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support import small_systems
from support.examples import load
from support.law_tools import alphas_sigmas
from support.small_systems import CONFIGS, small

from minidiff import systems
from minidiff.data.own_pictures import OwnPictures
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.samplers import ddim, sample, times
from minidiff.diffusion.schedules import cosine
from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, gradients, is_recording
from minidiff.errors import UserError
from minidiff.evaluation.judge import load_judge
from minidiff.nn.module import Module
from minidiff.nn.optim import AdamW
from minidiff.nn.precision import as_input
from minidiff.nn.unet import TextStates
from minidiff.systems.consistency import Consistency, ConsistencyConfig, pseudo_huber
from minidiff.systems.stage import Step
from minidiff.systems.text_to_image import TextToImageConfig
from minidiff.training.trainer import TrainConfig, Trainer

CAPTIONS = ["7", "a bold seven leaning left", ""]
B, MU, S = 6, 0.1, 0.15                                     # data whose samples lie well within [-1, 1]
STATES = np.zeros((B, 1, 8), np.float64), np.zeros((B, 8), np.float64), np.ones((B, 1), bool)


def new() -> Consistency:
    return small_systems.new("consistency")


class Velocity(Module):
    """In the place of the network: v = (alpha_t x_t - f(x_t, t)) / sigma_t of a known f; it records what it sees."""

    def __init__(self, schedule, f):
        self.schedule, self.known, self.seen, self.w = schedule, f, [], Tensor(np.zeros(1), requires_grad=True)

    def forward(self, x_t, t, text):
        self.seen.append((x_t.data, t, is_recording()))
        alpha, sigma = alphas_sigmas(self.schedule, t, x_t.data)
        v = (alpha * x_t.data - self.known(x_t.data, t)) / np.where(sigma > 0, sigma, 1)
        # where there is no noise, v is anything
        return Tensor(np.where(sigma > 0, v, 1e3).astype(x_t.dtype)) + 0 * self.w


# in place of the student: the network gives v itself
OF_V = SimpleNamespace(prediction=lambda network, x_t, t, text: network(as_input(network, x_t), t, text))


def gaussian_loss(f, N: int, schedule, variance=S**2, n=None) -> tuple[float, Velocity]:
    """The loss of f when the teacher is exact for N(MU, variance): in all of N intervals, or one row in interval n."""
    system = object.__new__(Consistency)
    system.schedule, system.student, rng = schedule, OF_V, np.random.default_rng(0)
    exact = GaussianDenoiser(schedule, np.full((2, 2, 1), MU), np.full((2, 2, 1), variance))
    path = [*times(schedule, N).tolist(), -1]
    n = rng.integers(0, N, B) if n is None else np.array([n])
    x_0 = MU + math.sqrt(variance) * rng.normal(size=(len(n), 2, 2, 1))
    network, eps = Velocity(schedule, f), rng.normal(size=x_0.shape)
    t, s = np.array(path)[n], np.array(path)[n + 1]
    return system.loss(exact, network, x_0, *(a[:len(n)] for a in STATES), t, s, eps).item(), network


def end_of_flow(schedule, variance=S**2):
    """The consistency function of N(MU, variance): law 41."""
    def f(x_t, t):
        alpha, sigma = alphas_sigmas(schedule, t, x_t)
        return MU + math.sqrt(variance) / np.sqrt(alpha**2 * variance + sigma**2) * (x_t - alpha * MU)
    return f


# ---- the function ------------------------------------------------------------------------------------------

@pytest.mark.law(41, "f(x, -1) = x for every network: alpha = 1 and sigma = 0 there",
                 source="Lu & Song 2025, section 3; of a network with random weights", tolerance="exact")
def test_at_the_clean_image_f_is_the_image_whatever_the_network_says():
    system, rng = new(), np.random.default_rng(0)
    small_systems.moved(system, by=3.0)
    x, t = rng.standard_normal((3, 28, 28, 1), np.float32), np.array([-1, 20, -1])
    tokens, pooled, mask = system.student.encode(CAPTIONS)
    f = system.f(system.student.unet, x, t, TextStates(Tensor(tokens), Tensor(pooled), mask)).data
    np.testing.assert_array_equal(f[[0, 2]], x[[0, 2]])
    assert np.abs(f[1] - x[1]).max() > 1


def test_the_student_starts_as_the_teachers_denoiser_without_guidance():
    system, teacher, rng = new(), small("text-to-image"), np.random.default_rng(0)
    x, t = rng.standard_normal((3, 28, 28, 1), np.float32), np.array([3, 20, 49])
    tokens, pooled, mask = cond = teacher.encode(CAPTIONS)
    f = system.f(system.student.unet, x, t, TextStates(Tensor(tokens), Tensor(pooled), mask)).data
    np.testing.assert_allclose(f, teacher.unguided()(x, t, cond), atol=1e-5)
    np.testing.assert_allclose(system.consistency_function()(x, t, cond), f.clip(-1, 1), atol=1e-5)


# ---- the loss on Gaussian data, where everything is known --------------------------------------------------

@pytest.mark.law(41, "on a list of times the loss is 0 for the f that follows DDIM from each of them to its end, and "
                     "not for E[x_0|x_t]",
                 source="the sampler ddim, run to its end", tolerance="1e-7: the rounding of a root, over c = .001")
@pytest.mark.parametrize("N", [1, 3, 8])
def test_the_loss_is_zero_where_f_is_the_end_of_the_teachers_steps(N):
    schedule = cosine(50)
    exact = GaussianDenoiser(schedule, np.full((2, 2, 1), MU), np.full((2, 2, 1), S**2))
    path = times(schedule, N).tolist()

    def f(x_t, t):
        rest = [[p for p in path if p <= at] for at in t.tolist()]
        return np.concatenate([sample(ddim(exact, x[None], ts)) if ts else x[None]
                               for x, ts in zip(x_t, rest, strict=True)])
    loss, _ = gaussian_loss(f, N, schedule)
    assert abs(loss) < 1e-7
    if N > 1:
        assert gaussian_loss(lambda x_t, t: exact(x_t, t.clip(0)), N, schedule)[0] > 1e-3


@pytest.mark.law(41, "the f of the exact flow has a loss of the square of the intervals' length, and 0 on a point",
                 source="the closed form of f; the local error of DDIM", tolerance=".15 of the order 2")
def test_the_exact_f_has_a_loss_of_the_solvers_error_alone():
    """From half of the time down: the length of the difference, which the loss of one row says."""
    schedule, Ns, c = cosine(4096), np.array([16, 32, 64]), 0.00054 * 2
    losses = np.array([gaussian_loss(end_of_flow(schedule), N, schedule, n=N // 2)[0] for N in Ns])
    assert np.polyfit(np.log(Ns), np.log((losses + c) ** 2 - c * c) / 2, 1)[0] == pytest.approx(-2, abs=0.15)
    assert abs(gaussian_loss(end_of_flow(schedule, 0), 8, schedule, 0.0)[0]) < 1e-9


def test_the_target_is_held_fixed_and_lies_at_the_lower_end_of_the_teachers_step():
    """First f at x_s without a record, then f at x_t with one; x_s is DDIM's, row by row."""
    schedule, N = cosine(50), 5
    _, network = gaussian_loss(end_of_flow(schedule), N, schedule)
    (x_s, s, recorded_s), (x_t, t, recorded_t) = network.seen
    assert (recorded_s, recorded_t) == (False, True)
    exact = GaussianDenoiser(schedule, np.full((2, 2, 1), MU), np.full((2, 2, 1), S**2))
    for i in range(B):
        step = next(ddim(exact, x_t[i:i + 1], [t[i]] if s[i] < 0 else [t[i], s[i]]))
        assert step.t == s[i]
        np.testing.assert_allclose(x_s[i:i + 1], step.x_t, rtol=1e-12, atol=1e-12)


def of_a_batch(seed: int = 0):
    """A system of float64, its teacher, and the arrays of a batch."""
    system = new()
    stage = next(system.stages(small_systems.data()))
    arrays = stage.batch(Step(seed, 1, 0, 10, B))
    system.student.astype(np.float64)
    small_systems.moved(system, by=0.05)
    return system, [a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays]


def test_no_gradient_passes_into_the_target():
    """The derivative along a random direction is that of the distance from a target that does not move with it."""
    system, arrays = of_a_batch()
    x_0, tokens, pooled, mask, t, s, eps = arrays
    s = np.where(s < 0, t // 2, s)                          # at the clean image the target has no weights anyway
    teacher, unet = small("text-to-image").denoiser(2.0), system.student.unet
    leaves = list(unet.parameters().values())
    rng = np.random.default_rng(1)
    along = [rng.normal(size=p.shape) for p in leaves]
    found = sum((g * d).sum() for g, d in zip(gradients(
        system.loss(teacher, unet, x_0, tokens, pooled, mask, t, s, eps), leaves), along, strict=True))
    text = TextStates(Tensor(tokens), Tensor(pooled), mask)
    (alpha, sigma), start = alphas_sigmas(system.schedule, t, x_0), [p.data for p in leaves]
    x_t = alpha * x_0 + sigma * eps
    x_s = np.concatenate([next(ddim(teacher, x_t[i:i + 1], [t[i], s[i]], tuple(a[i:i + 1] for a in (
        tokens, pooled, mask)))).x_t for i in range(B)])
    fixed = system.f(unet, x_s, s, text).data.clip(-1, 1)

    def distance(h: float, moving: bool) -> float:
        for p, w, d in zip(leaves, start, along, strict=True):
            p.data = w + h * d
        target = system.f(unet, x_s, s, text).data.clip(-1, 1) if moving else fixed
        error = system.f(unet, x_t, t, text).data - target
        c = 0.00054 * 28
        for p, w in zip(leaves, start, strict=True):
            p.data = w
        return (np.sqrt((error**2).reshape(B, -1).sum(axis=1) + c * c) - c).mean()
    held, moved = ((distance(1e-6, moving) - distance(-1e-6, moving)) / 2e-6 for moving in (False, True))
    assert found == pytest.approx(held, rel=1e-5)
    assert abs(moved - held) > 0.01 * abs(held)             # so the two can be told apart


def test_guidance_is_in_the_pairs():
    """The stage's teacher takes the step of the guided text-to-image system, at the configured scale, no default."""
    system = small_systems.new("consistency", replace(small_systems.CONFIGS["consistency"], scale=3.5))
    stage = next(system.stages(small_systems.data()))
    arrays = stage.batch(Step(0, 1, 0, 10, B))
    system.student = OF_V
    x_0, tokens, pooled, mask, t, s, eps = arrays
    network = Velocity(system.schedule, lambda x_t, t: x_t)
    network.w.data = np.zeros(1, np.float32)
    stage.loss(network, *arrays)
    (x_s, *_), (x_t, *_) = network.seen
    (alpha, sigma), (alpha_s, sigma_s) = (alphas_sigmas(system.schedule, at, x_0) for at in (t, s))
    teacher = small("text-to-image")
    uncond, cond = (sigma * x_t * 0 + (x_t - alpha * teacher.unguided()(x_t, t, states)) / sigma
                    for states in (tuple(a.repeat(B, axis=0) for a in teacher.encode([""])), (tokens, pooled, mask)))
    eps_hat = uncond + system.config.scale * (cond - uncond)
    x0_hat = ((x_t - sigma * eps_hat) / alpha).clip(-1, 1)
    expected = alpha_s * x0_hat + sigma_s * (x_t - alpha * x0_hat) / sigma
    np.testing.assert_allclose(x_s, expected, atol=2e-3)    # float32, over alpha = .03 at t = 49


def test_pseudo_huber_is_a_length_far_from_0_and_a_square_near_it():
    D = 28 * 28
    c = 0.00054 * 28
    large, small_one = np.zeros((2, D)), np.full((1, D), 1e-6)
    large[0, 0], large[1, 1] = 3.0, 4.0
    assert pseudo_huber(Tensor(large)).item() == pytest.approx(3.5 - c, rel=1e-4)
    assert pseudo_huber(Tensor(small_one)).item() == pytest.approx(D * 1e-12 / (2 * c), rel=1e-4)
    error = Tensor(np.random.default_rng(0).normal(size=(4, 2, 2, 1)), requires_grad=True)
    g, = gradients(pseudo_huber(error), [error])
    np.testing.assert_allclose(4 * np.sqrt((g**2).sum(axis=(1, 2, 3))), 1, rtol=1e-4)


# ---- training and sampling ---------------------------------------------------------------------------------

def test_the_pairs_of_a_batch_are_the_ends_of_all_intervals():
    system, T = new(), CONFIGS["consistency"].teacher.T
    *_, t, s, _ = next(system.stages(small_systems.data())).batch(Step(0, 1, 3, 10, 60))
    path = [*times(cosine(T), 5).tolist(), -1]
    pairs = list(zip(t.tolist(), s.tolist(), strict=True))
    assert {pair: pairs.count(pair) for pair in pairs} == {pair: 12 for pair in zip(path, path[1:], strict=False)}


class Table(Module):
    """A network of two numbers for each time, v = a_t x_t + b_t, which can be exact for Gaussian data."""

    def __init__(self, T: int):
        self.ab = Tensor(np.zeros((T + 1, 2)), requires_grad=True)                      # the last row is of t = -1

    def forward(self, x_t, t, text):
        ab = ops.getitem(self.ab, t)                                                # (B, 2)
        return ab[:, :1].reshape(len(t), 1, 1, 1) * x_t + ab[:, 1:].reshape(len(t), 1, 1, 1)


def test_training_ends_at_the_f_of_the_teachers_steps():
    """On Gaussian data one step then gives what DDIM gives in N, from every time of its list."""
    schedule, N, rng = cosine(50), 4, np.random.default_rng(0)
    exact = GaussianDenoiser(schedule, np.full((1, 1, 1), MU), np.full((1, 1, 1), S**2))
    system, network, path = object.__new__(Consistency), Table(50), [*times(schedule, N).tolist(), -1]
    system.schedule, system.student, count = schedule, OF_V, 64
    optimiser, states = AdamW(network.parameters()), [np.repeat(a[:1], count, axis=0) for a in STATES]
    for k in range(250):
        n = np.arange(count) % N
        x_0, eps = MU + S * rng.normal(size=(count, 1, 1, 1)), rng.normal(size=(count, 1, 1, 1))
        loss = system.loss(exact, network, x_0, *states, np.array(path)[n], np.array(path)[n + 1], eps)
        optimiser.step(gradients(loss, [network.ab]), 0.05 * (1 - k / 250))
    x = np.array([-1.2, 0.3, 1.5]).reshape(3, 1, 1, 1)
    for i in range(N):
        found = system.f(network, x, np.full(3, path[i]), None)
        np.testing.assert_allclose(found.data, sample(ddim(exact, x, path[i:-1])), atol=0.01)
    start = system.f(Table(50), x, np.full(3, path[0]), None).data
    assert np.abs(start - sample(ddim(exact, x, path[:-1]))).max() > 0.1            # it was not there from the first


def test_its_text_encoder_stays_the_teachers_and_the_teacher_stays_as_it_was():
    system, teacher = new(), small("text-to-image")
    before = teacher.state_dict()
    trainer = Trainer(next(system.stages(small_systems.data())), TrainConfig(steps=2, batch=4, warmup=1))
    trainer.step()
    after, own = teacher.state_dict(), system.student.state_dict()
    assert all((after[name] == before[name]).all() for name in before)
    changed = {name.split(".")[0] for name in own if (own[name] != before[name]).any()}
    assert changed == {"unet"}
    assert not any("borrowed" in name for name in system.parameters())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_each_step_calls_the_network_once(steps, monkeypatch):
    system, sizes = small("consistency"), []
    inner = system.student.predict
    monkeypatch.setattr(system.student, "predict", lambda x_t, t, cond: sizes.append((len(x_t), t[0])) or inner(
        x_t, t, cond))
    system.sample(CAPTIONS, steps=steps)
    assert sizes == [(3, t) for t in times(system.schedule, steps)]


def test_a_system_of_a_file_finds_its_teacher_when_it_is_trained_again(monkeypatch):
    small_systems.ship(monkeypatch)
    system = Consistency(CONFIGS["consistency"], small("text-to-image").tokenizer, np.random.default_rng(0))
    assert system.teacher() is small("text-to-image")
    other = replace(CONFIGS["consistency"], teacher=replace(CONFIGS["text-to-image"], drop_caption=0.3))
    with pytest.raises(UserError, match="another configuration than this consistency model"):
        Consistency(other, small("text-to-image").tokenizer, np.random.default_rng(0)).teacher()


@pytest.mark.slow
def test_the_example(monkeypatch, tmp_path, capsys):
    small_systems.ship(monkeypatch)
    shipped = systems.load_model
    monkeypatch.setattr(systems, "load_system", lambda name, *path: shipped(systems.SYSTEMS[name])
                        if name == "digit-classifier" else small(name))             # the judge is the shipped one
    example = load("13_consistency")
    rows = [(label, options["steps"], calls) for label, _, options, calls in example.settings(small("consistency"))]
    assert rows[:2] == [("teacher, 32", 32, 64), ("teacher, 4", 4, 8)] and rows[-1] == ("student, 4", 4, 4)
    monkeypatch.setattr(example, "FEW", (2,))
    monkeypatch.setattr(example, "MANY", 3)
    lines = example.main(count=4, out=str(tmp_path / "c.png"))
    assert [line.split("|")[1:3] for line in lines[2:]] == [[" teacher, 3 ", " 6 "], [" teacher, 2 ", " 4 "],
                                                           [" student, 2 ", " 2 "]]
    assert (tmp_path / "c.png").stat().st_size > 1000 and "student, 2 steps" in capsys.readouterr().out
    monkeypatch.setattr(example, "load_dataset", lambda *a: small_systems.data())
    assert example.main(train=str(tmp_path / "run"), effort=0.5, out=str(tmp_path / "d.png"),
                        config=CONFIGS["consistency"]) == []
    assert (tmp_path / "run" / "model.safetensors").exists()


# ---- refusals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda: ConsistencyConfig(TextToImageConfig(predicts="eps")), "teacher must predict v"),
    (lambda: ConsistencyConfig(intervals=0), "intervals must be a whole number from 1 to 1000, not 0"),
    (lambda: ConsistencyConfig(intervals=1001), "intervals must be a whole number from 1 to 1000, not 1001"),
    (lambda: ConsistencyConfig(scale=math.nan), "scale must be finite"),
    (lambda: ConsistencyConfig(batch=0), "steps and batch at least 1"),
    (lambda: small("consistency").sample(CAPTIONS, steps=0), "steps must be a whole number from 1 to 50"),
    (lambda: small("consistency").sample(CAPTIONS, steps=51), "steps must be a whole number from 1 to 50"),
])
def test_refusals_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_teacher_than_the_configured_one_is_refused():
    other = replace(CONFIGS["consistency"], teacher=replace(CONFIGS["text-to-image"], drop_caption=0.3))
    with pytest.raises(UserError, match="another configuration than this consistency model"):
        small_systems.new("consistency", other)


def test_data_of_another_shape_than_the_teachers_are_refused():
    data = small_systems.data()
    other = OwnPictures(np.zeros((1, 28, 28, 3), np.uint8), [("a",)], "2 pictures of mine")
    with pytest.raises(UserError, match=r"\(28, 28, 1\), and the data set of 2 pictures of mine has \(28, 28, 3\)"):
        next(new().stages(other))
    assert data.shape == (28, 28, 1) and systems.SYSTEMS["consistency"] is Consistency


# ---- the weights that come with minidiff -------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 4])
def test_the_shipped_weights_draw_the_digit_that_is_asked_for(steps):
    """With one fixed seed and the digit alone as the caption: 20 of 20 are right, and 19 are enough.

    99.8 % of a thousand pictures of longer captions are right (docs/systems.md): with this chance fewer than 19 of 20
    are with a chance of 7e-4.  The false-alarm rate of another machine's rounding is smaller, since the seed is fixed.
    """
    asked = np.arange(20) % 10
    x = Consistency.load().sample([str(digit) for digit in asked], steps=steps, seed=0)
    _, read = load_judge().read(x)
    assert (read == asked).mean() >= 0.95
