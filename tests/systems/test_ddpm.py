"""DDPM: its sampling loop against diffusion/samplers.py, learned variances, the value of L_vlb and its gradients."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support import small_systems, tiny
from support.examples import load
from support.gradcheck import check_gradients

from minidiff.data.pixels import to_float
from minidiff.diffusion import schedules
from minidiff.diffusion.denoiser import NetworkDenoiser, static_threshold
from minidiff.diffusion.gaussian import q_sample
from minidiff.diffusion.likelihood import DiscretisedGaussian, reverse_kl
from minidiff.diffusion.samplers import beta, beta_tilde, ddpm, times
from minidiff.engine import ops
from minidiff.engine.random import SampleStreams
from minidiff.engine.tensor import Tensor, gradients, no_grad
from minidiff.errors import UserError
from minidiff.nn.module import Module
from minidiff.nn.unet import UNetConfig
from minidiff.systems.ddpm import DDPM, DDPMConfig, log_probability, step_weights
from minidiff.systems.stage import Step

CONFIG = DDPMConfig(shape=(8, 8, 1), T=50, steps=3,
                    unet=UNetConfig(widths=(8, 16), heads=2, groups=4, embedding=16, out=2))


def made(seed: int = 0) -> DDPM:
    """A model whose outputs are no longer zero."""
    model, rng = DDPM(CONFIG, None, np.random.default_rng(seed)), np.random.default_rng(seed)
    for p in model.parameters().values():
        p.data = p.data + 0.1 * rng.standard_normal(p.shape, dtype=np.float32)
    return model


@pytest.fixture(scope="module")
def model() -> DDPM:
    return made()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return tiny.digits().images(np.arange(4))               # (4, 28, 28, 1)


class Formula(Module):
    """A network that computes a formula."""

    def __init__(self, f):
        self.f, self.unused = f, Tensor(np.zeros((), np.float32))      # a module's dtype is that of its parameters

    def forward(self, x, t):
        return self.f(x, t)


def with_mix(model: DDPM, mix: float) -> DDPM:
    """The model with a network whose second channel is mix."""
    other, unet = made(), model.unet
    other.unet = Formula(lambda x, t: ops.concat([unet(x, t)[..., :1], Tensor(np.full_like(x.data, mix))]))
    return other


# --- algorithm 2 --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, variance, steps", [("beta", beta, 7), ("beta_tilde", beta_tilde, 50)])
def test_the_loop_is_the_sampler_of_the_diffusion_folder(model, name, variance, steps):
    mine = list(model.trajectory([""] * 2, seed=3, steps=steps, variance=name))
    streams = SampleStreams(3, 2)
    x_T = streams.normal((8, 8, 1))
    denoiser = NetworkDenoiser(model.schedule, "eps", model.predict, clip=static_threshold)
    theirs = list(ddpm(denoiser, x_T, times(model.schedule, steps), streams=streams, variance=variance))
    np.testing.assert_array_equal(mine[0].x_t, x_T)         # the first state is the noise
    assert (mine[0].step, mine[0].t, mine[0].x0_hat) == (0, 49, None)
    assert [state.t for state in mine[1:]] == [state.t for state in theirs] and mine[-1].t == -1
    for a, b in zip(mine[1:], theirs, strict=True):             # float32, rounded in another order, through a UNet each
        np.testing.assert_allclose(a.x_t, b.x_t, atol=2e-3)
    assert np.abs(mine[-1].x_t).max() <= 1


@pytest.mark.parametrize("mix, name, steps", [(0.0, "beta_tilde", 6), (1.0, "beta", 6), (1.0, "beta", 50)])
def test_mixes_of_0_and_1_are_beta_tilde_and_beta(model, mix, name, steps):
    """Of the step as long as it is, not of a step of the full chain (the bug of diffusers #3006)."""
    other = with_mix(model, mix)
    np.testing.assert_array_equal(other.sample(["", ""], seed=1, steps=steps),
                                  other.sample(["", ""], seed=1, steps=steps, variance=name))


def test_between_them_the_logarithms_are_mixed(model):
    """In one step from x_t to s, the added noise has the deviation beta~^((1-mix)/2) beta^(mix/2)."""
    x_t, schedule = np.random.default_rng(0).standard_normal((2, 8, 8, 1), dtype=np.float32), model.schedule
    z = SampleStreams(4, 2).normal((8, 8, 1))
    states = {mix: next(with_mix(model, mix).reverse(x_t, [40, 12], streams=SampleStreams(4, 2))).x_t
              for mix in (0.0, 0.3)}
    more = beta_tilde(schedule, 40, 12) ** 0.35 * beta(schedule, 40, 12) ** 0.15 - beta_tilde(schedule, 40, 12) ** 0.5
    np.testing.assert_allclose(states[0.3] - states[0.0], more * z, atol=1e-5)


def test_an_exact_eps_leads_to_the_only_image_of_the_data(model):
    """eps = (x_t - alpha x_0) / sigma, and any number of steps ends at x_0."""
    x_0, schedule = np.random.default_rng(0).uniform(-0.9, 0.9, (8, 8, 1)).astype(np.float32), model.schedule
    other = made()

    def unet(x, t):
        # eps = sigma x_t + alpha F  gives  F = (alpha x_t - x_0) / sigma
        a, b = (f(t).reshape(-1, 1, 1, 1).astype(np.float32) for f in (schedule.alpha, schedule.sigma))
        return ops.concat([Tensor((a * x.data - x_0) / b), Tensor(np.full_like(x.data, 0.5))])
    other.unet = Formula(unet)
    for steps in (50, 5, 1):                                # x_T / alpha_T in float32
        np.testing.assert_allclose(other.sample([""] * 2, steps=steps), np.stack([x_0] * 2), atol=1e-3)


@given(st.sampled_from([schedules.linear(1000), schedules.cosine(1000)]), st.integers(2, 60))
def test_the_removed_and_the_added_noise_leave_noise_of_size_sigma_s(schedule, steps):
    path = [int(t) for t in times(schedule, steps)]
    factor, removed, _, added = step_weights(schedule, path).T
    sigma = schedule.sigma(np.array([*path, -1]))
    np.testing.assert_allclose((sigma[:-1] * factor - removed) ** 2 + added**2, sigma[1:] ** 2, atol=1e-10)
    np.testing.assert_allclose(factor * schedule.alpha(np.array(path)), schedule.alpha(np.array([*path[1:], -1])))
    assert added[-1] == 0


# --- the bound ----------------------------------------------------------------------------------------------

def eight_bit(rng, *shape):
    return to_float(rng.integers(0, 256, shape).astype(np.uint8))


@given(st.floats(-0.5, 1.5), st.integers(0, 100))
def test_the_bound_of_an_exact_mean_is_the_divergence_of_two_variances(mix, seed):
    """eps_theta = eps: KL = (r - 1 - log r) / 2 with r = beta~ / variance = (beta~ / beta)^mix, 0 at mix = 0."""
    model, rng = BARE, np.random.default_rng(seed)
    x_0, t = eight_bit(rng, 3, 8, 8, 1), rng.integers(1, 50, 3)
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    got = model.vlb(x_0, q_sample(model.schedule, x_0, t, eps), t, eps, Tensor(np.full_like(x_0, mix))).data
    r = np.array([(beta_tilde(model.schedule, i, i - 1) / beta(model.schedule, i, i - 1)) ** mix for i in t.tolist()])
    expected = 50 / math.log(2) * (r - 1 - np.log(r)) / 2
    np.testing.assert_allclose(got, np.broadcast_to(expected[:, None, None, None], got.shape), rtol=1e-3, atol=2e-3)


BARE = DDPM(CONFIG, None, np.random.default_rng(0))


def test_the_bound_is_that_of_the_diffusion_folder_where_mix_is_0(model):
    rng = np.random.default_rng(0)
    x_0, t = eight_bit(rng, 6, 8, 8, 1), np.array([0, 1, 2, 17, 30, 49])
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    x_t = q_sample(model.schedule, x_0, t, eps)
    eps_theta = model.predict(x_t, t)
    got = model.vlb(x_0, x_t, t, eps_theta, Tensor(np.zeros_like(x_0))).data.reshape(6, -1).sum(1)
    denoiser = NetworkDenoiser(model.schedule, "eps", model.predict, clip=static_threshold)
    np.testing.assert_allclose(got[1:], 50 / math.log(2) * reverse_kl(denoiser, x_0[1:], t[1:], eps[1:]), rtol=1e-3)
    decoder = DiscretisedGaussian(math.sqrt(beta_tilde(model.schedule, 1, 0)))
    log_p = decoder(x_0[:1], denoiser(x_t[:1], t[:1])).sum()
    assert got[0] == pytest.approx(-50 / math.log(2) * log_p, rel=1e-4)


def test_bits_per_dim_is_the_mean_over_all_times_plus_the_prior_term():
    other, x_0 = made(), eight_bit(np.random.default_rng(0), 3, 8, 8, 1)
    other.predict_both, seen = lambda x_t, t: (x_t, x_t), []

    def vlb(x_0, x_t, t, eps_theta, mix):
        seen.append(t)
        return Tensor(x_0 * 0 + t.reshape(-1, 1, 1, 1) ** 2)
    other.vlb = vlb
    got = other.bits_per_dim(x_0, terms=50)
    abar = other.schedule.alpha_bar[-1]                     # KL(N(sqrt(abar) x_0, 1 - abar) || N(0, 1))
    prior = (0.5 * (abar * x_0**2 - abar - math.log(1 - abar))).mean((1, 2, 3)) / math.log(2)
    np.testing.assert_allclose(got, (np.arange(50) ** 2).mean() + prior, rtol=1e-6)
    seen.clear()
    other.bits_per_dim(x_0, terms=5)
    assert [(t // 10).tolist() for t in seen] == [[k] * 3 for k in range(5)]            # one in each fifth of the times


@pytest.mark.parametrize("last", [1e-4, 0.3, 0.9])
def test_the_priors_term_of_the_bound(last):
    """KL(q(x_T | x_0) || N(0, I)) alone, in bits a pixel, also where x_T keeps much of the image."""
    other, x_0 = made(), eight_bit(np.random.default_rng(0), 3, 8, 8, 1)
    other.schedule = schedules.Schedule(np.linspace(0.99, last, 50))
    other.vlb = lambda x_0, *_: Tensor(0 * x_0)
    kl = 0.5 * (last * x_0.astype(np.float64) ** 2 - last - math.log(1 - last))
    np.testing.assert_allclose(other.bits_per_dim(x_0, terms=2), kl.mean((1, 2, 3)) / math.log(2), rtol=1e-5)


@pytest.mark.parametrize("variance, mix", [("beta", 1.0), ("beta_tilde", 0.0), ("learned", 0.25)])
def test_a_part_of_the_bounds_terms_estimates_all_of_them(variance, mix):
    """200 images at one term each: their times are uniform (Kolmogorov and Smirnov, false alarm 1e-8), each with its
    own image and noise, and the variance is the one asked for.  A bound of 1 at all times stays 1."""
    other, seen = made(), []
    x_0 = eight_bit(np.random.default_rng(0), 200, 2, 2, 1)
    other.predict_both = lambda x_t, t: (x_t, np.full_like(x_t, 0.25))
    other.schedule = schedules.Schedule(np.linspace(0.99, 1e-9, 50))
    other.vlb = lambda *a: seen.append(a) or Tensor(np.ones_like(x_0))
    for terms in (1, 4):
        np.testing.assert_allclose(other.bits_per_dim(x_0, terms=terms, variance=variance), 1, rtol=1e-6)
    image, x_t, t, eps_theta, mixes = seen[0]
    assert len(seen) == 5 and (mixes.data == mix).all() and np.array_equal(image, x_0) and eps_theta is x_t
    assert stats.kstest((t + 0.5) / 50, "uniform").pvalue > 1e-8
    eps = (x_t - other.schedule.alpha(t).reshape(-1, 1, 1, 1) * x_0) / other.schedule.sigma(t).reshape(-1, 1, 1, 1)
    assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-8


def test_L_vlb_does_not_move_the_mean(model):
    """The gradient of L_hybrid by eps_theta is that of L_simple; by mix it is that of L_vlb."""
    rng, other = np.random.default_rng(0), made()
    x_0, t = eight_bit(rng, 4, 8, 8, 1), np.array([0, 3, 20, 45])
    eps = rng.standard_normal(x_0.shape, dtype=np.float32)
    out = Tensor(0.3 * rng.standard_normal((4, 8, 8, 2), dtype=np.float32), requires_grad=True)
    dout, = gradients(other.loss(Formula(lambda x, t: out), x_0, t, eps), [out])
    alpha, sigma = (f(t).astype(np.float32).reshape(-1, 1, 1, 1) for f in (other.schedule.alpha, other.schedule.sigma))
    x_t = q_sample(other.schedule, x_0, t, eps)
    eps_theta = sigma * x_t + alpha * out.data[..., :1]
    np.testing.assert_allclose(dout[..., :1], 2 * alpha * (eps_theta - eps) / eps.size, rtol=1e-5, atol=1e-9)

    mix = Tensor(out.data[..., 1:], requires_grad=True)
    dmix, = gradients(ops.mean(other.vlb(x_0, x_t, t, eps_theta, mix)), [mix])
    np.testing.assert_allclose(dout[..., 1:], 0.001 * dmix, rtol=1e-4, atol=1e-12)
    assert np.abs(dmix).max() > 0


def test_the_gradients_of_the_bound_by_mix(model):
    rng = np.random.default_rng(1)
    x_0, t = eight_bit(rng, 3, 4, 4, 1).astype(np.float64), np.array([0, 2, 40])
    x_0[0, 0, :2, 0] = -1, 1                                # the outer bins
    eps = rng.standard_normal(x_0.shape)
    x_t = q_sample(model.schedule, x_0, t, eps)
    check_gradients(lambda mix: model.vlb(x_0, x_t, t, 0.9 * eps, mix), rng.uniform(0, 1, x_0.shape))


@pytest.mark.parametrize("mean", [0.0, 0.9, -3.0])
def test_the_probability_of_a_bin_and_its_gradient_also_in_the_tails(mean):
    x_0 = np.array([-1, -1 + 2 / 255, 0.2 - 0.2 % (2 / 255) + 1 / 255, 1])
    x_0 = (np.rint((x_0 + 1) * 127.5) / 127.5 - 1).reshape(1, 4, 1, 1)
    check_gradients(lambda log_variance: log_probability(x_0, np.full_like(x_0, mean), log_variance),
                    np.array([-3.0, -1.0, 0.0, -2.0]).reshape(1, 4, 1, 1))
    sigma = 0.3
    log_p = DiscretisedGaussian(sigma)(x_0, np.full_like(x_0, 0.1)).reshape(-1)
    edges = (np.rint((x_0.reshape(-1) + 1) * 127.5)[:, None] + [-0.5, 0.5]) / 127.5 - 1
    edges[0, 0], edges[-1, 1] = -np.inf, np.inf
    np.testing.assert_allclose(np.exp(log_p), np.diff(stats.norm.cdf(edges, 0.1, sigma))[:, 0], rtol=1e-9)


# --- interpolation, and the rest ----------------------------------------------------------------------------

def test_interpolation_ends_at_what_each_image_alone_becomes(model, images):
    a, b, *others = images
    both = model.interpolate(a, b, [0, 0.5, 1], t=20, steps=5)
    np.testing.assert_allclose(both[:1], model.interpolate(a, others[0], [0], t=20, steps=5), atol=1e-5)
    np.testing.assert_allclose(both[2:], model.interpolate(others[1], b, [1], t=20, steps=5), atol=1e-5)
    assert both.shape == (3, 28, 28, 1) and np.abs(both[0] - both[2]).max() > 0.1
    middle, = model.interpolate(a, b, [0.5], t=20, steps=5)
    np.testing.assert_allclose(both[1], middle, atol=1e-5)  # the noise is the same for all


@pytest.mark.parametrize("steps, expected", [(1, [20]), (2, [20, 0]), (5, [20, 15, 10, 5, 0]),
                                             (21, list(range(20, -1, -1)))])
def test_an_interpolation_is_drawn_from_t_down_to_time_0_evenly(images, monkeypatch, steps, expected):
    """Also from one time of the middle: the last of its steps removes the noise of time 0, and no more."""
    model, seen = made(), []
    predict = model.predict_both
    monkeypatch.setattr(model, "predict_both", lambda x_t, t: seen.append(t.tolist()) or predict(x_t, t))
    model.interpolate(*images[:2], [0.25, 0.5], t=20, steps=steps)
    assert seen == [[t, t] for t in expected]


def test_a_sample_depends_on_its_own_seed_only(model):
    together = model.sample([""] * 3, steps=4, seed=5)
    alone = model.sample([""], steps=4, streams=SampleStreams(5, 3)[1:2])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-3)


def test_the_derivative_of_the_denoiser(model):
    rng, t = np.random.default_rng(0), np.array([5, 30])
    other = made().astype(np.float64)
    x, dy, u = rng.standard_normal((3, 2, 8, 8, 1))
    denoiser, h = other.unguided(), 1e-5
    x0_hat, dx = denoiser.vjp(x, t, dy)
    np.testing.assert_allclose(x0_hat, denoiser(x, t))
    numeric = ((denoiser(x + h * u, t) - denoiser(x - h * u, t)) * dy).sum() / (2 * h)
    assert (dx * u).sum() == pytest.approx(numeric, rel=1e-6)
    with no_grad():                                         # one sample stays in this thread: it asks for a gradient
        _, alone = denoiser.vjp(x[:1], t[:1], dy[:1])
    np.testing.assert_allclose(alone, dx[:1], rtol=1e-9, atol=1e-12)


def test_its_stage_and_its_file(tmp_path, data):
    model = small_systems.new("ddpm")
    stage, = model.stages(data)
    assert stage.module is model.unet
    x_0, t, eps = stage.batch(Step(0, 1, 0, 3, 50))
    assert sorted(t) == list(range(50))                     # uniform, and spread evenly
    known = {image.tobytes() for image in data.images(np.arange(len(data)))}
    assert x_0.shape == eps.shape == (50, 28, 28, 1) and all(image.tobytes() in known for image in x_0)
    # an untrained network gives F = mix = 0: L_simple is that of eps_theta = sigma x_t
    x_t = q_sample(model.schedule, x_0, t, eps)
    eps_theta = model.schedule.sigma(t).reshape(-1, 1, 1, 1).astype(np.float32) * x_t
    simple, bound = ((eps_theta - eps) ** 2).mean(), model.vlb(x_0, x_t, t, eps_theta, Tensor(0 * x_0)).data.mean()
    assert stage.loss(stage.module, x_0, t, eps).item() == pytest.approx(simple + 0.001 * bound, rel=1e-4)
    assert stage.picture().size[0] > 100
    model.save(tmp_path / "m.safetensors")
    again = DDPM.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.sample([""], steps=2), model.sample([""], steps=2))


def test_the_example(tmp_path, capsys, monkeypatch):
    small_systems.ship(monkeypatch)
    load("02_ddpm").main(steps=2, count=1, out=str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"ddpm_progressive.png", "ddpm_interpolation.png",
                                                          "inpainting.png"}
    assert "removed" in capsys.readouterr().out


def test_refusals(model, images):
    with pytest.raises(UserError, match=r"a classifier guide it .*\(the system adm\)"):
        model.sample(["", "a seven"])
    with pytest.raises(ValueError, match="variance must be one of learned, beta, beta_tilde, not 'small'"):
        model.sample([""], steps=5, variance="small")
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 50"):
        model.sample([""], steps=51)
    with pytest.raises(ValueError, match="streams must be one for each of the 2 captions"):
        model.sample(["", ""], steps=5, streams=SampleStreams(0, 3))
    with pytest.raises(ValueError, match="lambdas must be numbers of 0..1"):
        model.interpolate(*images[:2], [2.0], t=20)
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 21"):
        model.interpolate(*images[:2], [0.5], t=20, steps=30)
    with pytest.raises(ValueError, match="terms must be a whole number from 1 to 50"):
        model.bits_per_dim(images[:1], terms=0)
    with pytest.raises(ValueError, match="unet must have channels = 1, out = 2"):
        DDPMConfig(unet=UNetConfig())
    with pytest.raises(ValueError, match="there is no schedule .*: it is one of"):
        DDPMConfig(schedule="steep")
    with pytest.raises(ValueError, match=r"shape must be \(H, W, C\), with sides that are multiples of 4"):
        DDPMConfig(shape=(30, 30, 1))
    with pytest.raises(ValueError, match="T must be at least 2"):
        DDPMConfig(T=1)
