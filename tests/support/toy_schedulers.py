"""Schedulers that follow the papers and the protocol, and copies of them with one planted bug each."""

import math

import numpy as np

from minidiff.verify.scheduler import report


class Toy:
    """DDIM eq. 12, written from the paper, with only what the protocol requires."""

    predicts = "eps"
    eta = 0.0

    def __init__(self, T=1000):
        self.alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
        self.timesteps = np.arange(T)[::-1]

    def set_steps(self, n):
        T = len(self.alpha_bar)
        self.n, self.timesteps = n, np.array([T * (n - i) // n - 1 for i in range(n)])

    def add_noise(self, x_0, eps, t):
        abar = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        return abar**0.5 * x_0 + (1 - abar) ** 0.5 * eps

    def abar(self, t):
        return 1.0 if t < 0 else self.alpha_bar[t]

    def previous(self, t):
        later = self.timesteps[self.timesteps < t]
        return later[0] if len(later) else -1

    def x0_hat(self, eps, abar, x_t):
        return (x_t - (1 - abar) ** 0.5 * eps) / abar**0.5

    def noise_deviation(self, t, s):
        abar_t, abar_s = self.abar(t), self.abar(s)
        return self.eta * math.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))

    def direction(self, abar_s, sigma):
        return math.sqrt(1 - abar_s - sigma**2)

    def step(self, prediction, t, x_t, z):
        s = self.previous(t)
        abar_t, abar_s, sigma = self.abar(t), self.abar(s), self.noise_deviation(t, s)
        x0_hat = self.x0_hat(prediction, abar_t, x_t)
        return abar_s**0.5 * x0_hat + self.direction(abar_s, sigma) * prediction + sigma * z


class Ancestral(Toy):
    eta = 1.0


class TwoM(Toy):
    """DPM-Solver++ algorithm 2, on any list of times."""

    order = 2
    extrapolates = True

    def set_steps(self, n):
        super().set_steps(n)
        self.last = None

    def half_log_snr(self, t):
        return 0.5 * math.log(self.abar(t) / (1 - self.abar(t))) if t >= 0 else math.inf

    def r(self, h_before, h):
        return h_before / h

    def extrapolated(self, x_0, x_0_before, r):
        return (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * x_0_before

    def step(self, prediction, t, x_t, z):
        s = self.previous(t)
        a, b, h = self.abar(t), self.abar(s), self.half_log_snr(s) - self.half_log_snr(t)
        D = x_0 = self.x0_hat(prediction, a, x_t)
        if self.last and s >= 0:
            x_0_before, h_before = self.last
            D = self.extrapolated(x_0, x_0_before, self.r(h_before, h))
        self.last = x_0, h
        return ((1 - b) / (1 - a)) ** 0.5 * x_t - b**0.5 * math.expm1(-h) * D


class Velocity(Toy):
    """In the scale x_0 + (sigma / alpha) eps, where the network predicts v."""

    predicts = "v"

    def scale_input(self, x_t, t):
        return self.abar(t) ** 0.5 * x_t

    def add_noise(self, x_0, eps, t):
        return x_0 + (1 / self.alpha_bar[t].reshape(-1, 1, 1, 1) - 1) ** 0.5 * eps

    def step(self, prediction, t, x_t, z):
        a, u, s = self.abar(t), self.scale_input(x_t, t), self.previous(t)
        eps = a**0.5 * prediction + (1 - a) ** 0.5 * u
        return x_t + ((1 / self.abar(s) - 1) ** 0.5 - (1 / a - 1) ** 0.5) * eps


def broken(scheduler, **options):
    return {row.law for row in report(scheduler, **options) if row.verdict == "BROKEN"}


class FixedStride(Toy):
    def previous(self, t):
        return t - len(self.alpha_bar) // self.n


class StartsAt980(Toy):
    def set_steps(self, n):
        self.n, self.timesteps = n, len(self.alpha_bar) // n * np.arange(n)[::-1]


class StepsBeyondTheTable(Toy):
    """A float stride: for N = 61 and T = 1000 the list has one time too many, -1."""

    def set_steps(self, n):
        T = len(self.alpha_bar)
        self.n, self.timesteps = n, np.round(np.arange(T, 0, -T / n)).astype(int) - 1


class EndsAtTheFirstTime(Toy):
    def abar(self, t):
        return self.alpha_bar[max(t, 0)]


class NoiseAtTheLastStep(Ancestral):
    def noise_deviation(self, t, s):
        return super().noise_deviation(t, s) if s >= 0 else 0.0

    def step(self, prediction, t, x_t, z):
        return super().step(prediction, t, x_t, z) + (0.01 * z if self.previous(t) < 0 else 0)


class NoRoot(Toy):
    def add_noise(self, x_0, eps, t):
        abar = self.alpha_bar[t].reshape(-1, 1, 1, 1)
        return abar**0.5 * x_0 + (1 - abar) * eps


class SignalOfTheOtherSign(Toy):
    def add_noise(self, x_0, eps, t):
        return super().add_noise(-x_0, eps, t)


class ThreeTimesTooLarge(Toy):
    def add_noise(self, x_0, eps, t):
        return 3 * super().add_noise(x_0, eps, t)


class ThreeTimesTooLargeAsShown(Velocity):
    """It has a scale of its own, and its noisy samples have another."""

    def add_noise(self, x_0, eps, t):
        return 3 * super().add_noise(x_0, eps, t)


class TableReversed(Toy):
    def __init__(self):
        super().__init__()
        self.of_training = True

    def set_steps(self, n):
        super().set_steps(n)
        self.of_training = False

    def add_noise(self, x_0, eps, t):
        return super().add_noise(x_0, eps, len(self.alpha_bar) - 1 - t if self.of_training else t)


class NoisePowerForgotten(Ancestral):
    def direction(self, abar_s, sigma):
        return math.sqrt(1 - abar_s)


class SignReversed(Toy):
    def direction(self, abar_s, sigma):
        return -super().direction(abar_s, sigma)


class BetaOfTheFullChain(Ancestral):
    """The noise has the variance of a single training step, and the direction term that of the jump."""

    def step(self, prediction, t, x_t, z):
        beta = 1 - self.abar(t) / self.abar(t - 1)
        return super().step(prediction, t, x_t, 0 * z) + (math.sqrt(beta) * z if self.previous(t) >= 0 else 0)


class SignalInTheEnd(Toy):
    def __init__(self):
        super().__init__(200)


class SnrRises(Toy):
    def __init__(self):
        super().__init__()
        self.alpha_bar[500] = self.alpha_bar[498]


class EpsAtSnrZero(Toy):
    def __init__(self):
        super().__init__()
        self.alpha_bar[-1] = 0.0


class NeverRuns(EpsAtSnrZero):
    """It raises the same error at SNR 0 as everywhere, so that is no refusal of SNR 0."""

    def step(self, *args):
        raise ValueError("operands could not be broadcast")


class RInverted(TwoM):
    def r(self, h_before, h):
        return h / h_before


class DoesNotExtrapolate(TwoM):
    def extrapolated(self, x_0, x_0_before, r):
        return x_0


class ExtrapolatesTooFar(TwoM):
    def extrapolated(self, x_0, x_0_before, r):
        return (1 + 1 / r) * x_0 - 1 / r * x_0_before


class ClaimsOrderTwo(Toy):
    order = 2


class GetsAnotherTime(Toy):
    """The network gets an earlier time than its input has, so a time of less noise."""

    def set_steps(self, n):
        super().set_steps(n)
        self.true = self.timesteps
        abar = self.alpha_bar[self.true]
        self.levels = np.stack([abar**0.5, (1 - abar) ** 0.5], axis=-1)
        self.timesteps = np.maximum(self.true - 3, np.arange(n)[::-1])

    def add_noise(self, x_0, eps, t):
        in_a_run = len(t) < len(self.alpha_bar)
        return super().add_noise(x_0, eps, self.true[[list(self.timesteps).index(a) for a in t]] if in_a_run else t)

    def step(self, prediction, t, x_t, z):
        i = int(np.flatnonzero(self.timesteps == t)[0])
        a, b = self.abar(self.true[i]), self.abar([*self.true, -1][i + 1])
        return b**0.5 * self.x0_hat(prediction, a, x_t) + (1 - b) ** 0.5 * prediction


class BatchMean(Toy):
    def x0_hat(self, eps, abar, x_t):
        x_0 = super().x0_hat(eps, abar, x_t)
        return x_0 - 1e-3 * x_0.mean() + 1e-3 * x_0.mean((1, 2, 3), keepdims=True)


class Stretches(Toy):
    """Dynamic thresholding whose threshold may fall below 1."""

    def x0_hat(self, eps, abar, x_t):
        x_0 = super().x0_hat(eps, abar, x_t)
        s = np.quantile(abs(x_0), 0.5, axis=(1, 2, 3), keepdims=True)
        return np.clip(x_0, -s, s) / np.maximum(s, 1e-9)


class ClipsTooFarOut(Toy):
    def x0_hat(self, eps, abar, x_t):
        return np.clip(super().x0_hat(eps, abar, x_t), -1.5, 1.5)
