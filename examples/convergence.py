"""How fast the samplers converge: the error of each against the exact flow, over the number of steps.

    python examples/convergence.py                 takes seconds, prints the orders, draws docs/convergence.png

It measures every registered sampler (SAMPLERS in diffusion/samplers.py), your own too.

A sampler without noise approximates an ordinary differential equation, the probability flow. In the angle phi with
alpha = cos(phi), sigma = sin(phi) it is

    dx/dphi = v(x, phi) = (alpha x - x0_hat) / sigma                       Karras et al. 2022, eq. 4

and its error after N steps falls as N^-p, where p is the sampler's order. p is measured on two kinds of data:

    a Gaussian N(mu, S^2)    in closed form:  x_0 - mu = S / sqrt(V_T) (x_T - alpha_T mu),  V = alpha^2 S^2 + sigma^2
    a mixture of three       the flow is curved; scipy's DOP853 computes it to twelve digits

A sampler with noise has another measure: the variance of its samples. On a Gaussian a run is linear in x_T and in each
step's noise, x_0 = A x_T + sum_i b_i z_i, and so the variance A^2 V_T + sum_i b_i^2 needs no random number.

`tests/laws/test_convergence.py` asserts the orders, for every schedule, spacing and parametrisation.
"""

import argparse
import math

import numpy as np
from scipy.integrate import solve_ivp

from minidiff import pictures
from minidiff.diffusion.exact import GaussianDenoiser, MixtureDenoiser
from minidiff.diffusion.samplers import SAMPLERS, Sampler, ddim_inverse, sample, times
from minidiff.diffusion.schedules import Schedule, log_snr_linear
from minidiff.errors import run_main
from minidiff.pictures import plots

METHODS = {name: entry for name, entry in SAMPLERS.items() if not entry.noise} | {"ddim, inverse": ddim_inverse}
# a consistency sampler asks for the end of the flow, and with that is exact in any number of steps
WITH_NOISE = {name: entry for name, entry in SAMPLERS.items() if entry.noise and not entry.consistency}

MEAN, VARIANCE = np.array([0.3, -0.4]), np.array([0.25, 4.0])
MIXTURE_WEIGHTS, MEANS = np.array([0.3, 0.5, 0.2]), np.array([[-1.2, 0.4], [0.9, 0.8], [0.3, -1.1]])
VARIANCES = np.array([[0.15, 0.4], [0.3, 0.2], [0.25, 0.1]])
X_T = np.array([[-1.5, 0.3], [-0.3, -1.0], [0.4, 1.1], [1.7, -0.2]])                # (B, 2), the noise to start from


def flow_of_gaussian(alpha: float, sigma: float) -> np.ndarray:
    """Where the exact flow takes X_T from a time with this alpha and sigma: (B, 2)."""
    return MEAN + np.sqrt(VARIANCE / (alpha**2 * VARIANCE + sigma**2)) * (X_T - alpha * MEAN)


def flow_of_mixture(alpha: float, sigma: float) -> np.ndarray:
    """The same for the mixture, by a Runge-Kutta method of order 8: (B, 2)."""

    def v(phi: float, x: np.ndarray) -> np.ndarray:
        alpha, sigma = math.cos(phi), math.sin(phi)
        x = x.reshape(-1, 1, 2)                                                     # (B, 1, 2)
        V = alpha**2 * VARIANCES + sigma**2                                         # (K, 2)
        # r_k = p(k | x) ~ w_k N(x; alpha mu_k, V_k)
        r = MIXTURE_WEIGHTS * np.exp(-((x - alpha * MEANS) ** 2 / V).sum(-1) / 2) / np.sqrt(V.prod(-1))
        r /= r.sum(1, keepdims=True)                                                # (B, K)
        # v = -sigma sum_k r_k (mu_k + alpha (S_k^2 - 1) x) / V_k: eq. 4, simplified
        return -sigma * (r[..., None] * (MEANS + alpha * (VARIANCES - 1) * x) / V).sum(1).ravel()

    phi_T = math.atan2(sigma, alpha)
    return solve_ivp(v, (phi_T, 0), X_T.ravel(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1].reshape(-1, 2)


def order(steps: list[int], errors: list[float]) -> float:
    """p of log error = log C - p log N + c / N, by least squares; c / N is the correction for few steps."""
    N = np.array(steps, float)
    terms = np.stack([np.ones(len(N)), -np.log(N), 1 / N], axis=1)
    return np.linalg.lstsq(terms, np.log(errors), rcond=None)[0][1]


class UnitNoise:
    """In place of random streams: draw number i is 1 for sample i, and 0 for all others."""

    def __init__(self, count: int):
        self.count, self.drawn = count, 0

    def __len__(self) -> int:
        return self.count

    def normal(self, shape: tuple[int, ...], dtype=np.float64) -> np.ndarray:
        self.drawn += 1
        z = np.zeros((self.count, *shape), dtype)
        z[self.drawn] = 1
        return z


def error_of_variance(sampler: Sampler, schedule: Schedule, N: int) -> float:
    """The largest relative error of the variance of samples of the Gaussian, from x_T of the right variance."""
    denoiser = GaussianDenoiser(schedule, np.zeros(2), VARIANCE)
    abar = float(schedule.alpha_bar[-1])
    x_T = np.zeros((N + 1, 2))
    x_T[0] = np.sqrt(abar * VARIANCE + 1 - abar)            # sample 0 ends at A sqrt(V_T), sample i at b_i
    x_0 = sample(sampler(denoiser, x_T, times(schedule, N), streams=UnitNoise(N + 1)))
    return float(abs((x_0**2).sum(0) / VARIANCE - 1).max())


def main(steps: tuple[int, ...] = (8, 16, 32, 64, 128, 256), out: str = "docs/convergence.png") -> dict:
    """Returns the measured orders, by data and sampler."""
    pictures.check_writable(out)                            # before the work, not after
    # many times, so that rounding them hardly changes the strides; down to sigma = 1e-4, so that the last step is exact
    schedule = log_snr_linear(T=2**14, log_snr_max=18.0, log_snr_min=-9.0)
    noisiest = schedule.T - 1
    alpha, sigma = float(schedule.alpha(noisiest)), float(schedule.sigma(noisiest))
    data = {
        "a Gaussian, against the closed form":
            (GaussianDenoiser(schedule, MEAN, VARIANCE), flow_of_gaussian(alpha, sigma)),
        "a mixture, against DOP853":
            (MixtureDenoiser(schedule, MIXTURE_WEIGHTS, MEANS, VARIANCES), flow_of_mixture(alpha, sigma)),
    }
    panels, orders = [], {}
    for what, (denoiser, x_0) in data.items():
        print(f"\n{what}: error of x_0 (of x_T, for the inverse) after N steps\n{'N':>20}",
              *(f"{N:>9}" for N in steps), "    order")
        measured = []
        for name, sampler in METHODS.items():
            start, end = (x_0, X_T) if sampler is ddim_inverse else (X_T, x_0)
            errors = [np.linalg.norm(sample(sampler(denoiser, start, times(schedule, N))) - end) for N in steps]
            p = orders[what, name] = order(steps[-4:], errors[-4:])
            measured.append((name, steps, errors, "s:" if sampler is ddim_inverse else "o-"))
            print(f"{name:>20}", *(f"{e:9.1e}" for e in errors), f"{p:9.2f}")
        # in grey: what orders 1 and 2 look like, just below the lines that they are to be compared with
        guides = [("", steps, [0.6 * errors[-1] * (steps[-1] / N) ** p for N in steps], "--")
                  for p, like in ((1, "ddim"), (2, "heun")) for name, _, errors, _ in measured if name == like]
        panels.append(plots.Panel(f"{what} (dashed: orders 1 and 2)", "steps N", "error", [*measured, *guides],
                                  log_x=True, log_y=True))
    what = "a Gaussian, with noise"
    print(f"\n{what}: relative error of the variance of x_0 after N steps")
    for name, sampler in WITH_NOISE.items():
        errors = [error_of_variance(sampler, schedule, N) for N in steps]
        p = orders[what, name] = order(steps[-4:], errors[-4:])
        print(f"{name:>20}", *(f"{e:9.1e}" for e in errors), f"{p:9.2f}")
    pictures.save(plots.panels(panels, width=5.2, height=4.2), out)
    print(f"\ndrawn in {out}")
    return orders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/convergence.png")
    run_main(main, **vars(parser.parse_args()))
