"""The benchmarks' rivals: they compute, and learn, what minidiff does, so that the times compare the same work."""

from dataclasses import replace

import numpy as np
import pytest
from support.small_cases import SMALL, host_inputs, name_of
from support.tiny import digits, images, trained_a_little

torch = pytest.importorskip("torch", reason="the rivals are PyTorch's: pip install torch")

import ops  # noqa: E402
import public_recipe  # noqa: E402
import side_by_side  # noqa: E402
import time_to_quality  # noqa: E402
import torch_model  # noqa: E402
import train_step  # noqa: E402
import train_step_cuda as step  # noqa: E402

import kernels  # noqa: E402
from minidiff import checkpoint  # noqa: E402
from minidiff.data import mnist  # noqa: E402
from minidiff.data.pixels import to_float  # noqa: E402
from minidiff.diffusion import samplers  # noqa: E402
from minidiff.diffusion.schedules import Schedule  # noqa: E402
from minidiff.evaluation.judge import load_judge  # noqa: E402
from minidiff.systems.text_to_image import TextToImage  # noqa: E402


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_rivals_compute_the_same(case, monkeypatch):
    inputs = host_inputs(case, monkeypatch)
    for who in case.rivals if case.family != "attention" else ("math",):    # the others' need a GPU
        found = case.in_our_layout(case.theirs(who, *inputs)())
        assert all(isinstance(a, torch.Tensor) for a in found)
        found = tuple(a.detach().numpy() for a in found)
        found = tuple(map(case.seen, found)) if hasattr(case, "seen") else found
        assert kernels.relative_error(found, case.expected(*inputs)) < 1e-12


@pytest.mark.slow
def test_the_contestants_learn_the_same():
    """On the CPU: the same losses of one batch, and batches of their own from the same images and captions."""
    state, fixed = train_step.same_start(4)
    shared = state, digits(200), TextToImage.load().tokenizer, 4
    us = step.Minidiff(*shared, "float32", "cpu")
    us.repeat(fixed)
    losses = [us.step() for _ in range(3)]
    us.repeat(None)
    for mode, last, many in (("float32", False, 3), ("float32", True, 3), ("float16", True, 1)):
        them = step.PyTorch(*shared, mode, "cpu", channels_last=last)
        them.repeat(fixed)
        np.testing.assert_allclose([float(them.step()) for _ in range(many)], losses[:many], rtol=step.AGREEMENT[mode])
        them.repeat(None)
        us.trainer.n = them.n                               # the next batch of the other contestant
        ours, theirs = us.trainer.batch(), them._draw()
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            assert np.array_equal(a, b.numpy())
        assert ours[4].shape == tuple(theirs[4].shape)      # each draws its own noise
        assert np.isfinite(float(them.step()))


def test_the_rival_samples_the_same():
    """Guidance, clipping and DPM-Solver++(2M), in float64."""
    model = trained_a_little().astype(np.float64)
    rival = torch_model.TextToImage(model.config).double()
    torch_model.load(rival, model.state_dict())
    prompts, steps, scale = ["a bold seven", "3"], 5, 2.5
    x_T = np.random.default_rng(0).standard_normal((2, 28, 28, 1))
    path = samplers.times(model.schedule, steps)
    x_0 = samplers.sample(samplers.dpm_solver_pp_2m(model.denoiser(scale), x_T, path, model.encode(prompts)))
    tokens = [torch.from_numpy(a) for texts in (prompts, [""]) for a in model.tokens(texts)]
    found = torch_model.sample(rival, torch.from_numpy(x_T).permute(0, 3, 1, 2), *tokens, scale=scale, steps=steps)
    assert 0.01 < (np.abs(x_0) < 1).mean()                  # not all pixels are clipped
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), x_0, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("network", side_by_side.NETWORKS)
def test_ops_compute_the_same_at_every_shape(network):
    """Forward, and the gradients of what has a batch; each case has a name of its own."""
    found = list(ops.cases(network))
    assert len({case.name for case in found}) == len(found)
    for case in found:
        ours = ops.minidiff_runs(case, 3)
        for layout in (torch.contiguous_format, torch.channels_last):
            ops.check_equal(case, ours[1], ops.torch_runs(case, 3, layout)[1])


def test_a_wrong_rival_of_an_op_is_detected():
    case = next(case for case in ops.cases("mnist") if case.name.startswith("concat"))
    wrong = replace(case, theirs=lambda x, h: case.theirs(h, x))
    with pytest.raises(AssertionError, match="concat"):
        ops.check_equal(case, ops.minidiff_runs(case, 2)[1], ops.torch_runs(wrong, 2, torch.contiguous_format)[1])


def test_the_table_of_a_comparison():
    full = side_by_side.Outcome("mnist", 32, {"minidiff": 0.1, "PyTorch, channels first": 0.2,
                                              "PyTorch, channels last": 0.08},
                                {"minidiff": 300.0, "PyTorch, channels first": 600.0, "PyTorch, channels last": 400.0})
    alone = side_by_side.Outcome("large", 128, {"minidiff": 1.5})
    names = ["minidiff", "PyTorch, channels first", "PyTorch, channels last"]
    head, rule, *rows = side_by_side.markdown([full, alone], names).splitlines()
    assert rows == ["| mnist | 32 | 100.0 | 200.0 | 80.0 | **1.25** | 300 / 400 | 0.75 |",
                    "| large | 128 | 1500.0 | left out | left out |  |  |  |"]
    assert head.count("|") == rule.count("|") == rows[0].count("|")


# --- the public recipe ------------------------------------------------------------------------------------

def small_recipe(seed: int = 0, channels_last: bool = False) -> public_recipe.Recipe:
    return public_recipe.Recipe(images(40), seed=seed, batch=8, features=8, channels_last=channels_last)


def test_the_recipes_schedule_is_linear():
    alpha_bar = public_recipe.alpha_bars()
    betas = Schedule(alpha_bar[1:]).betas
    assert len(betas) == 400 and alpha_bar[0] == 1
    np.testing.assert_allclose(np.diff(betas), (0.02 - 1e-4) / 400, rtol=1e-6)      # one slope
    assert betas[-1] == pytest.approx(0.02) and betas[0] == pytest.approx(1e-4 + (0.02 - 1e-4) / 400)


def test_the_recipe_learns_and_resumes_bit_for_bit(tmp_path):
    recipe = small_recipe()
    fixed = recipe.batch()
    before = recipe.loss(*fixed).item()
    for _ in range(3):
        recipe.step()
    assert recipe.loss(*fixed).item() < before
    tensors, meta = recipe.state()
    checkpoint.save(tmp_path / "a.safetensors", tensors, meta | {"step": recipe.n})
    losses = [recipe.step() for _ in range(3)]
    other = small_recipe(seed=0)
    other.net.load_state_dict(public_recipe.UNet(8).state_dict())                   # other first weights
    other.restore(checkpoint.load(tmp_path / "a.safetensors"))
    assert other.n == 3 and [other.step() for _ in range(3)] == losses


class Points(torch.nn.Module):
    """The exact eps of data with a single image: x = c if a class is given, and x = u if not."""

    def __init__(self, c: float, u: float):
        super().__init__()
        self.c, self.u, self.alpha_bar = c, u, torch.from_numpy(public_recipe.alpha_bars())

    def forward(self, x, t, classes):
        abar = self.alpha_bar[(t * public_recipe.T).round().long()][:, None, None, None]
        x_0 = torch.where(classes.sum(dim=1) > 0, self.c, self.u)[:, None, None, None]
        # eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)
        return ((x - abar.sqrt() * x_0) / (1 - abar).sqrt()).float()


@pytest.mark.parametrize("draw", [
    lambda recipe, scale: recipe.sample(np.arange(3), scale=scale),
    lambda recipe, scale: recipe.sample(np.arange(3), scale=scale, eta=1.0, steps=20),
    lambda recipe, scale: recipe.ancestral(np.arange(3), scale=scale)], ids=["ddim", "ddim, eta 1", "ancestral"])
def test_the_recipes_samplers_end_at_the_guided_point(draw):
    recipe = small_recipe()
    recipe.net = Points(c=0.5, u=0.3)
    # x_u + scale (x_c - x_u), and [0, 1] becomes [-1, 1]
    for scale, x_0 in ((1.0, 0.5), (2.0, 0.7), (0.0, 0.3), (20.0, 1.0)):
        np.testing.assert_allclose(draw(recipe, scale), 2 * x_0 - 1, atol=2e-3)


# --- the clock of time_to_quality ---------------------------------------------------------------------------

def log_of(name: str, accuracies: dict[int, float]) -> time_to_quality.Log:
    log = time_to_quality.Log(name, {"cores": 2})
    log.preparing, log.wall, log.cpu = 3.0, [2.0] * 5 + [9.0] * 15, [3.0] * 20
    log.evaluations = [{"step": step, "accuracy": p} for step, p in accuracies.items()]
    return log


def test_a_shared_machine_does_not_slow_the_clock():
    us, them = (log_of(name, {}) for name in ("minidiff", "recipe"))
    assert us.pace() == 2.0 and us.seconds(10) == 23.0      # wall time, 10th percentile of the steps
    assert them.pace() == 1.5 and them.seconds() == 33.0    # processor time, over the cores
    assert us.plain(6) == 3.0 + 5 * 2.0 + 9.0


def test_arrival_lies_between_two_evaluations():
    arrived = time_to_quality.Arrival.of(log_of("minidiff", {5: 0.5, 10: 0.94, 15: 0.95, 20: 0.93}), 0.95)
    assert (arrived.before, arrived.step) == (10, 15)
    missed = time_to_quality.Arrival.of(log_of("minidiff", {5: 0.5, 10: 0.9}), 0.95)
    assert (missed.before, missed.step, missed.best) == (10, None, 0.9)


def test_accuracy_is_the_share_of_images_read_as_the_requested_digit():
    """Real digits: all are right in the better way of sampling. A bad first part ends the evaluation early."""
    data = mnist.packed()

    class Copier:
        ways = {"wrong": 1, "right": 0}

        def draw(self, prompts, way, seed):
            asked = (time_to_quality.digits_of(prompts) + self.ways[way]) % 10
            pictures = np.stack([data.images[np.flatnonzero(data.labels == digit)[0]] for digit in asked])
            return to_float(pictures)[..., None]
    prompts, judge = [str(i % 10) for i in range(100)], load_judge()
    found, shown = time_to_quality.accuracy(Copier(), prompts, judge, 0.95, whole=False)
    assert found == {"accuracy": 1.0, "error": 0.0, "count": 100, "way": "right"} and shown.shape == (10, 28, 28, 1)
    Copier.ways = {"wrong": 1}
    assert time_to_quality.accuracy(Copier(), prompts, judge, 0.95, whole=False)[0]["count"] == time_to_quality.PILOT
    found, _ = time_to_quality.accuracy(Copier(), prompts, judge, 0.95, whole=True)
    assert found["count"] == 100 and found["accuracy"] < 0.2
