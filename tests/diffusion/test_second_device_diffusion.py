"""Floor III on a second device: the same inputs on a fake GPU give the same results, and give them there.

The mathematics is one line for both libraries, and NumPy computes beneath both, so that results agree to the last
bit, but where a sum may be taken in another order; and no function takes arrays of two devices.
"""

import inspect

import numpy as np
import pytest
from support.fake_cupy import assert_same, install, one_sentence

from minidiff.diffusion import gaussian, likelihood, losses, samplers, schedules
from minidiff.diffusion.denoiser import NetworkDenoiser, dynamic_threshold, static_threshold
from minidiff.diffusion.exact import DatasetDenoiser, GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.guidance import ClassifierFree, ClassifierGuidance, stack_conditions
from minidiff.engine.random import SampleStreams

SCHEDULE = schedules.cosine(10, allow_signal=True)
B, SHAPE = 3, (2, 2)
TIMES = {"an integer": 5, "a NumPy integer": np.int64(5), "an array": np.array([0, 5, 9]), "small": np.uint8([1, 5, 9])}


@pytest.fixture
def cupy(monkeypatch):
    return install(monkeypatch)


def draw(count: int, dtype=np.float32, seed: int = 0) -> np.ndarray:
    """`count` arrays of samples, (count, B, 2, 2)."""
    return np.random.default_rng(seed).standard_normal((count, B, *SHAPE)).astype(dtype)


def on_the_host(found, expected) -> None:
    """Numbers about samples are NumPy's on either device."""
    assert isinstance(found, np.ndarray) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)     # float32 samples, float64 sums


def refuses(f) -> None:
    with pytest.raises(TypeError) as error:
        f()
    one_sentence(error)


# --- gaussian.py --------------------------------------------------------------------------------------------
# Each function as one of (schedule s, time t, samples x and y).

ONE_ARRAY = {
    "per_sample": lambda s, t, x: gaussian.per_sample(s.alpha(t), x),
    "q_mean_variance": lambda s, t, x: gaussian.q_mean_variance(s, x, t),
    "prior_kl": lambda s, t, x: gaussian.prior_kl(s, x),
}
TWO_ARRAYS = {
    "q_sample": lambda s, t, x, y: gaussian.q_sample(s, x, t, y),
    "q_posterior_mean_variance": lambda s, t, x, y: gaussian.q_posterior_mean_variance(s, x, y, t),
    "v_from_x0_eps": lambda s, t, x, y: gaussian.v_from_x0_eps(s, x, t, y),
} | {
    f.__name__: lambda s, t, x, y, f=f: f(s, x, t, y)
    for f in (gaussian.x0_from_eps, gaussian.x0_from_v, gaussian.x0_from_score, gaussian.eps_from_x0,
              gaussian.eps_from_v, gaussian.eps_from_score, gaussian.v_from_x0, gaussian.score_from_eps,
              gaussian.score_from_x0)
} | {
    f"{name} {p}": f for p in gaussian.PREDICTIONS for name, f in {
        "target": lambda s, t, x, y, p=p: gaussian.target(s, p, x, y, t),
        "to_x0": lambda s, t, x, y, p=p: gaussian.to_x0(s, p, x, t, y)}.items()
}


def test_the_tables_are_complete():
    """Every public function of gaussian.py that takes a sample is here; kl_gaussian has a test of its own."""
    named = {key.split()[0] for key in (*ONE_ARRAY, *TWO_ARRAYS)} | {"kl_gaussian"}
    for name, f in inspect.getmembers(gaussian, inspect.isfunction):
        if f.__module__ == gaussian.__name__ and not name.startswith("_"):
            takes = gaussian.Array in [p.annotation for p in inspect.signature(f).parameters.values()]
            assert not takes or name in named, name


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("name", [*ONE_ARRAY, *TWO_ARRAYS])
def test_gaussian_algebra(cupy, name, t, dtype):
    f = (ONE_ARRAY | TWO_ARRAYS)[name]
    arrays = draw(1 if name in ONE_ARRAY else 2, dtype)
    expected = f(SCHEDULE, t, *arrays)
    found = f(SCHEDULE, t, *map(cupy.asarray, arrays))
    assert_same(found, expected)
    if isinstance(t, np.ndarray):                           # the times may be on the device, too
        assert_same(f(SCHEDULE, cupy.asarray(t), *map(cupy.asarray, arrays)), expected)


@pytest.mark.parametrize("name", TWO_ARRAYS)
def test_gaussian_algebra_refuses_two_devices(cupy, name):
    x, y = draw(2)
    for pair, where in (((cupy.asarray(x), y), "on 'cuda' like .*, got one on 'cpu'"),
                        ((x, cupy.asarray(y)), "on 'cpu' like .*, got one on 'cuda'")):
        if name == "q_posterior_mean_variance":
            where = "must be on"
        with pytest.raises(TypeError, match=where) as error:
            TWO_ARRAYS[name](SCHEDULE, 5, *pair)
        one_sentence(error)


@pytest.mark.parametrize("number", [float, np.float64, np.float32])
def test_kl_gaussian_with_an_array_in_any_one_place(cupy, number):
    """The device is that of the one array among numbers, wherever it stands."""
    numbers = [number(a) for a in (0.5, 2.0, -1.0, 1.5)]
    array = np.exp(draw(1)[0])                              # positive, for a variance
    for i in range(4):
        args = [array if i == j else a for j, a in enumerate(numbers)]
        found = gaussian.kl_gaussian(*(cupy.asarray(a) if a is array else a for a in args))
        assert_same(found, gaussian.kl_gaussian(*args))
        for j in range(4):
            if i != j:
                mixed = [cupy.asarray(array) if k == i else array if k == j else a for k, a in enumerate(numbers)]
                with pytest.raises(TypeError, match="arrays on two devices"):
                    gaussian.kl_gaussian(*mixed)
    assert_same(gaussian.kl_gaussian(*[cupy.asarray(array)] * 4), np.zeros_like(array))
    with pytest.raises(ValueError, match="must be positive"):
        gaussian.kl_gaussian(0.0, cupy.asarray(array) - 5, 0.0, 1.0)


def test_tables_take_times_of_the_device(cupy):
    t = np.array([1, 5, 9])
    s, other = SCHEDULE, cupy.asarray(t)
    for f in (s.abar, s.alpha, s.sigma, s.snr, s.log_snr, s.half_log_snr):
        assert isinstance(f(other), np.ndarray) and np.array_equal(f(other), f(t))
    assert all(map(np.array_equal, gaussian.q_step(s, cupy.asarray(t - 1), other), gaussian.q_step(s, t - 1, t)))
    for kind in losses.LOSS_WEIGHTS:
        for predicts in gaussian.PREDICTIONS:
            found = losses.weight(s, other, predicts, kind)
            assert isinstance(found, np.ndarray) and np.array_equal(found, losses.weight(s, t, predicts, kind))
    with pytest.raises(IndexError, match="got 10"):
        s.abar(other + 1)
    with pytest.raises(ValueError, match="at least 1"):
        losses.bound_weight(s, other - 1, "v")


# --- denoisers and guidance ---------------------------------------------------------------------------------

RNG = np.random.default_rng(7)
ROOT = RNG.standard_normal((4, 4))
EXACT = {
    "Gaussian, diagonal": GaussianDenoiser(SCHEDULE, RNG.standard_normal(SHAPE), RNG.uniform(0.1, 2, SHAPE)),
    "Gaussian": GaussianDenoiser(SCHEDULE, RNG.standard_normal(SHAPE), ROOT @ ROOT.T),
    "mixture": MixtureDenoiser(SCHEDULE, [0.2, 0.5, 0.3], RNG.standard_normal((3, *SHAPE)), [0.1, 0.5, 0.2]),
    "data set": DatasetDenoiser(SCHEDULE, RNG.standard_normal((5, *SHAPE))),
}
MIXTURE, T_B = EXACT["mixture"], np.array([0, 5, 9])
ALLOWED = np.array([[True, False, True], [False, True, False], [True, True, True]])


@pytest.mark.parametrize("f, high", [(static_threshold, 1), (dynamic_threshold, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thresholds(cupy, f, high, dtype):
    x = 3 * draw(1, dtype)[0]
    found = f(cupy.asarray(x))
    assert_same(found, f(x))
    assert float(cupy.abs(found).max()) <= high


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", EXACT)
def test_exact_denoisers(cupy, name, dtype):
    denoiser, (x, dy) = EXACT[name], draw(2, dtype)
    for t in (T_B, cupy.asarray(T_B)):
        assert_same(denoiser(cupy.asarray(x), t), denoiser(x, T_B))
        assert_same(denoiser.vjp(cupy.asarray(x), t, cupy.asarray(dy)), denoiser.vjp(x, T_B, dy))
    refuses(lambda: denoiser.vjp(cupy.asarray(x), T_B, dy))
    refuses(lambda: denoiser.vjp(x, T_B, cupy.asarray(dy)))
    for t in (5, cupy.asarray(T_B)[:2], cupy.asarray(T_B) - 1):
        with pytest.raises(ValueError, match="t must be 3 times in 0..T-1"):
            denoiser(cupy.asarray(x), t)


@pytest.mark.parametrize("cond", [None, (ALLOWED,)], ids=["no condition", "condition"])
def test_what_a_mixture_knows(cupy, cond):
    x = draw(1)[0]
    there = cond and (cupy.asarray(ALLOWED),)
    for f in (MIXTURE, MIXTURE.score, MIXTURE.posterior, MIXTURE.log_prob):
        assert_same(f(cupy.asarray(x), T_B, there), f(x, T_B, cond))
        if cond:
            refuses(lambda f=f: f(cupy.asarray(x), T_B, cond))
            refuses(lambda f=f: f(x, T_B, there))
    if cond:
        with pytest.raises(ValueError, match="a True in every row"):
            MIXTURE(cupy.asarray(x), T_B, (cupy.zeros((3, 3), dtype=bool),))


def network(x_t, t, cond):
    return 0.5 * x_t


def network_vjp(x_t, t, dy, cond):
    return 0.5 * x_t, 0.5 * dy


@pytest.mark.parametrize("predicts", gaussian.PREDICTIONS)
def test_a_networks_denoiser(cupy, predicts):
    x, dy = draw(2)
    for clip in (None, static_threshold, dynamic_threshold):
        denoiser = NetworkDenoiser(SCHEDULE, predicts, network, clip)
        assert_same(denoiser(cupy.asarray(x), T_B), denoiser(x, T_B))
    denoiser = NetworkDenoiser(SCHEDULE, predicts, network, network_vjp=network_vjp)
    assert_same(denoiser.vjp(cupy.asarray(x), T_B, cupy.asarray(dy)), denoiser.vjp(x, T_B, dy))
    refuses(lambda: NetworkDenoiser(SCHEDULE, predicts, lambda x_t, t, cond: x)(cupy.asarray(x), T_B))
    refuses(lambda: denoiser.vjp(cupy.asarray(x), T_B, dy))


@pytest.mark.parametrize("clip", [None, static_threshold])
@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_classifier_free_guidance(cupy, scale, rows, clip):
    x, uncond, cond = draw(1)[0], np.ones((rows, 3), bool), (ALLOWED,)
    here = ClassifierFree(MIXTURE, scale, (uncond,), clip)
    there = ClassifierFree(MIXTURE, scale, (cupy.asarray(uncond),), clip)
    assert_same(there(cupy.asarray(x), T_B, (cupy.asarray(ALLOWED),)), here(x, T_B, cond))
    if scale > 1:
        refuses(lambda: there(cupy.asarray(x), T_B, cond))
        refuses(lambda: here(cupy.asarray(x), T_B, (cupy.asarray(ALLOWED),)))
        refuses(lambda: here(cupy.asarray(x), T_B, cond))


def test_classifier_guidance_and_stacked_conditions(cupy):
    x, y = draw(1)[0], (ALLOWED,)

    def grad_log_prob(x_t, t, y):
        return MIXTURE.score(x_t, t, y) - MIXTURE.score(x_t, t)
    guided = ClassifierGuidance(MIXTURE, grad_log_prob, 1.5, static_threshold)
    assert_same(guided(cupy.asarray(x), T_B, (cupy.asarray(ALLOWED),)), guided(x, T_B, y))
    refuses(lambda: ClassifierGuidance(MIXTURE, lambda x_t, t, y: x)(cupy.asarray(x), T_B))

    a, b = draw(2)
    assert_same(stack_conditions((cupy.asarray(a),), (cupy.asarray(b),)), stack_conditions((a,), (b,)))
    for first, second in ((cupy.asarray(a), b), (a, cupy.asarray(b))):
        with pytest.raises(TypeError, match="two devices"):
            stack_conditions((first,), (second,))


# --- samplers and likelihood --------------------------------------------------------------------------------

PATH = [9, 6, 3, 0]
SAMPLERS = {name: lambda d, x, path, cond, f=f: f(d, x, path, cond, streams=SampleStreams(3, B))
            for name, f in samplers.SAMPLERS.items()} | {
    "ddim_inverse": samplers.ddim_inverse,
    "ddim, eta": lambda d, x, path, cond: samplers.ddim(d, x, path, cond, eta=0.7, streams=SampleStreams(3, B)),
    "ddpm, beta": lambda d, x, path, cond: samplers.ddpm(d, x, path, cond, streams=SampleStreams(3, B),
                                                         variance=samplers.beta),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(cupy, name, dtype):
    x = draw(1, dtype)[0]
    expected = list(SAMPLERS[name](MIXTURE, x, PATH, (ALLOWED,)))
    found = list(SAMPLERS[name](MIXTURE, cupy.asarray(x), PATH, (cupy.asarray(ALLOWED),)))
    for a, b in zip(found, expected, strict=True):
        assert (a.step, a.t) == (b.step, b.t)
        assert_same(a.x_t, b.x_t)
        assert_same(a.x0_hat, b.x0_hat)
    refuses(lambda: list(SAMPLERS[name](NetworkDenoiser(SCHEDULE, "v", lambda x_t, t, cond: x),
                                        cupy.asarray(x), PATH, None)))


LEVELS = np.random.default_rng(0).integers(0, 256, (B, *SHAPE)).astype(np.float64) / 127.5 - 1
NATS = {
    "discretised Gaussian": lambda d, x: likelihood.DiscretisedGaussian(0.1)(x, 0.9 * x),
    "Gaussian density": lambda d, x: likelihood.GaussianDensity(0.1)(x, 0.9 * x),
    "bound": lambda d, x: likelihood.variational_bound(
        d, x, streams=SampleStreams(0, B), decoder=likelihood.GaussianDensity(0.1)).total,
    "bound, some terms": lambda d, x: likelihood.variational_bound(
        d, x, streams=SampleStreams(0, B), decoder=likelihood.DiscretisedGaussian(0.1), terms=2).total,
    "flow": lambda d, x: likelihood.log_prob(d, x, PATH),
    "flow, Hutchinson": lambda d, x: likelihood.log_prob(
        d, x, PATH, divergence=likelihood.Hutchinson.draw(SampleStreams(1, B), x, 2)),
    "flow bound": lambda d, x: likelihood.flow_bound(
        d, x, PATH, eps=x * 0.5, decoder=likelihood.GaussianDensity(0.1)).total,
}


@pytest.mark.parametrize("name", NATS)
def test_likelihood(cupy, name):
    on_the_host(NATS[name](MIXTURE, cupy.asarray(LEVELS)), NATS[name](MIXTURE, LEVELS))


def test_reverse_kl_and_probes(cupy):
    x, eps = draw(2, np.float64)
    t = np.array([1, 5, 9])
    on_the_host(likelihood.reverse_kl(MIXTURE, cupy.asarray(x), t, cupy.asarray(eps)),
                likelihood.reverse_kl(MIXTURE, x, t, eps))
    refuses(lambda: likelihood.reverse_kl(MIXTURE, cupy.asarray(x), t, eps))
    refuses(lambda: likelihood.flow_bound(MIXTURE, cupy.asarray(x), PATH, eps=eps,
                                          decoder=likelihood.GaussianDensity(0.1)))
    probes = likelihood.Hutchinson.draw(SampleStreams(1, B), cupy.asarray(x), 2).probes
    assert_same(probes, likelihood.Hutchinson.draw(SampleStreams(1, B), x, 2).probes)
    for found, expected in zip(likelihood.exact_trace(MIXTURE, cupy.asarray(x), t),
                               likelihood.exact_trace(MIXTURE, x, t), strict=True):
        (on_the_host if isinstance(found, np.ndarray) else assert_same)(found, expected)
