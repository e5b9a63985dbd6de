"""Tools that the law tests share. They call the code under test only to wrap it or to build its arguments."""

import math

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from scipy import stats
from support.diffusion_strategies import any_schedule

from minidiff.diffusion.exact import MixtureDenoiser
from minidiff.diffusion.schedules import Schedule, cosine

few = settings(deadline=None, max_examples=40)
quickly = settings(deadline=None, max_examples=25)
LEVELS = np.arange(256) / 127.5 - 1                         # of 8-bit values


# ---- numbers and arrays --------------------------------------------------------------------------------------

def one(x: float) -> np.ndarray:
    return np.array([x])


def coefficient(function) -> float:
    """The slope of an affine function of one number."""
    return float((function(one(1.0)) - function(one(0.0)))[0])


def matrix_of(function, D: int) -> np.ndarray:
    """The matrix of an affine function of rows (B, D) -> (B, D): column j is the image of unit vector j."""
    return (function(np.eye(D)) - function(np.zeros((D, D)))).T


def rotation(rng, D: int) -> np.ndarray:
    """An orthogonal (D, D), uniformly distributed."""
    Q, R = np.linalg.qr(rng.normal(size=(D, D)))
    return Q * np.sign(np.diag(R))


def covariance(rng, D: int) -> np.ndarray:
    """A full covariance (D, D), with variances of 0 to about 3 D."""
    A = rng.normal(size=(D, D))
    return A @ A.T


def column(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(B,) -> (B, 1, ..., 1), to multiply x."""
    return a.reshape(-1, *[1] * (x.ndim - 1))


def gradient(f, x, h=1e-4):
    """Central differences of fourth order: f maps (B, D) to (B, ...); the result is (B, ..., D)."""
    def shifted(i, k):
        step = np.zeros(x.shape[1])
        step[i] = k * h
        return f(x + step)
    return np.stack([(8 * (shifted(i, 1) - shifted(i, -1)) - (shifted(i, 2) - shifted(i, -2))) / (12 * h)
                     for i in range(x.shape[1])], axis=-1)


# ---- schedules and data --------------------------------------------------------------------------------------

def alpha_sigma(schedule: Schedule, t: int) -> tuple[float, float]:
    """From the table itself."""
    abar = 1.0 if t == -1 else schedule.alpha_bar[t]
    return math.sqrt(abar), math.sqrt(1 - abar)


def alphas_sigmas(schedule: Schedule, t: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the table itself, each of shape (B, 1, ..., 1)."""
    abar = column(np.concatenate([schedule.alpha_bar, [1.0]])[t], x)
    return np.sqrt(abar), np.sqrt(1 - abar)


@st.composite
def schedule_and_list(draw, ends_at_zero=False, fewest=1):
    """A schedule and any strictly falling list of its times, of no regular stride, from T-1 down."""
    schedule = draw(any_schedule(min_T=fewest, ends_at_zero=ends_at_zero))
    earlier = st.sampled_from(range(schedule.T - 1)) if schedule.T > 1 else st.nothing()
    rest = draw(st.sets(earlier, min_size=fewest - 1))
    return schedule, sorted(rest | {schedule.T - 1}, reverse=True)


def random_mixture(schedule, rng, K=3, shape=(2,)):
    weights = rng.dirichlet(np.full(K, 3.0))
    return MixtureDenoiser(schedule, weights, rng.normal(size=(K, *shape)), rng.uniform(0.05, 1.5, size=(K, *shape)))


# ---- samplers ------------------------------------------------------------------------------------------------

class Noise:
    """A substitute for SampleStreams: returns given arrays, or fast draws from one generator; counts the draws.

    given: one array for all draws, or a function of the number of the draw, 1 for the first.
    """

    def __init__(self, count, rng=None, given=None):
        self.count, self.rng, self.given, self.calls = count, rng, given, 0

    def __len__(self):
        return self.count

    def normal(self, shape, dtype):
        self.calls += 1
        if self.given is not None:
            given = self.given(self.calls) if callable(self.given) else self.given
            return np.broadcast_to(given, (self.count, *shape)).astype(dtype)
        return self.rng.standard_normal((self.count, *shape)).astype(dtype)


def fitted_order(errors, Ns):
    """p of log error = log C - p log N + c / N, by least squares.

    The third term is the leading correction. Without it, p from N = 32 to 256 is off by c / 77. With it, the remainder
    is about (c / N)^2 / 2. c is at most 13, if the first stride is log 2 in lambda: the remainder is .08 at N = 32, .02
    at 64, ... and changes p by .03. The rounding of times, 1 % of a stride at N = 256, changes it by another .03.
    """
    N = np.array(Ns, float)
    terms = np.stack([np.ones(len(N)), -np.log(N), 1 / N], axis=1)
    return np.linalg.lstsq(terms, np.log(errors), rcond=None)[0][1]


def start(sampler, denoiser, x_T, ts, noise=None):
    """Runs an entry of SAMPLERS, with noise if it needs some."""
    return sampler(denoiser, x_T, ts, streams=noise or Noise(len(x_T), np.random.default_rng(0)))


# ---- training times ------------------------------------------------------------------------------------------

def normal_share(T: int) -> np.ndarray:
    """P(t < k), k = 0 .. T, of text-to-image's training times: log-SNR ~ N(-1, 2^2), falling in the cosine schedule."""
    alpha, sigma = cosine(T).alpha(np.arange(T)), cosine(T).sigma(np.arange(T))
    return nearest_share(-2 * np.log(alpha / sigma), 1, 2)


def nearest_share(place: np.ndarray, mean: float, std: float) -> np.ndarray:
    """P(t < k), k = 0 .. T, of N(mean, std^2), where each time stands for what is nearest to its place, rising (T,)."""
    middle = (place[1:] + place[:-1]) / 2
    F = stats.norm.cdf(np.concatenate([[2 * place[0] - middle[0]], middle, [2 * place[-1] - middle[-1]]]), mean, std)
    return (F - F[0]) / (F[-1] - F[0])
