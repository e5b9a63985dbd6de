"""The forward chain: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z, one step after another.

    1  T single steps are one jump            q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)    DDPM eq. 4
       the table is that of the given betas   alpha_bar_t = prod_{i <= t} (1 - beta_i)                        DDPM eq. 4
    2  any two times compose                  x_t = alpha_ts x_s + sqrt(sigma2_ts) z                          VDM app. A
    3  the SNR falls, every table is finite   SNR_t = alpha_bar_t / (1 - alpha_bar_t)                         VDM eq. 2
    4  the end is noise                       KL(q(x_T | x_0) || N(0, I)) is small                            DDPM eq. 5
    5  at SNR 0 eps does not determine x_0    eps-prediction is refused; v determines x_0      Zero SNR section 3.2
"""

import math
from collections.abc import Iterator

import numpy as np

from minidiff.diffusion import gaussian
from minidiff.diffusion.denoiser import NetworkDenoiser
from minidiff.diffusion.schedules import MOST_SIGNAL_AT_THE_END, Schedule
from minidiff.verify.rows import ATOMS, EPS, Law, Row, compare, count, skipped

# False alarms: 8 means at 2.1e-8 each and 8 variances at 5.6e-8 each, in total 6e-7 of all runs
MEAN_SIGMAS = 5.6                                           # P(|z| > 5.6) = 2.1e-8
VARIANCE_LOG = 17.4                                         # P(beyond variance_bound) <= 2 e^-17.4 = 5.6e-8


def single_steps(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The powers of signal and noise after each step of the chain, two arrays (T,), computed from DDPM eq. 2 alone."""
    signal, noise, powers = 1.0, 0.0, []
    for beta in betas.tolist():
        # x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) z, and z is independent of x_{t-1}: powers add
        signal, noise = (1 - beta) * signal, (1 - beta) * noise + beta
        powers.append((signal, noise))
    signal, noise = np.array(powers).T
    return signal, noise


def variance_bound(signal: float, noise: float, n: int) -> float:
    """How far the sample variance (over n - 1) of alpha x_i + sigma z_i may differ from signal + noise by chance.

    signal: alpha^2 var(x_i), which is not random. noise: sigma^2. (n - 1)/noise times the sample variance has a
    noncentral chi-squared distribution. The bound of Birge 2001, lemma 8.1, holds for every n; a normal
    approximation does not.
    """
    k, shift, x = n - 1, (n - 1) * signal / noise, VARIANCE_LOG
    # P(X > k + shift + 2 sqrt((k + 2 shift) x) + 2x) <= e^-x; below the mean X differs by less
    return noise / k * (2 * math.sqrt((k + 2 * shift) * x) + 2 * x)


def simulate(schedule: Schedule, x_0: float, count: int, times, rng) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance at `times`, (len(times),) each, over `count` chains that start at x_0 and take single steps."""
    x = np.full(count, x_0)
    wanted, mean, variance = set(map(int, times)), [], []
    for t, beta in enumerate(schedule.betas.tolist()):
        # x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z                                            DDPM eq. 2
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * rng.standard_normal(count)
        if t in wanted:
            mean.append(x.mean())
            variance.append(x.var(ddof=1))
    return np.array(mean), np.array(variance)


def chains(T: int) -> int:
    """The number of chains to simulate; the simulation then takes about a second."""
    return max(500, min(20_000, 20_000_000 // T))


# ---- the laws ----------------------------------------------------------------------------------------------


def given_betas(schedule: Schedule, betas) -> Iterator[Row]:
    """1 given betas: compares the table with the product of the betas that it was made from. betas: (T,)

    `schedule.betas` cannot replace them: it is computed from alpha_bar, so its product is alpha_bar even if that is
    wrong.
    """
    signal, _ = single_steps(np.asarray(betas, np.float64))
    # each product rounds once, and 1 - beta is the same number on both sides
    tolerance = 4 * EPS * (np.arange(schedule.T) + 2) * signal + np.finfo(np.float64).tiny
    yield compare("1 given betas", "alpha_bar, product of 1 - beta as given", signal, schedule.alpha_bar, tolerance,
                  "alpha_bar_t = prod_{i <= t} (1 - beta_i)", "t = {}".format)


def composition(schedule: Schedule, rng) -> Iterator[Row]:
    """1 composition: compares single steps with the closed form, at every t."""
    T = schedule.T
    t, one, zero = np.arange(T), np.ones(T), np.zeros(T)
    signal, noise = single_steps(schedule.betas)
    mean, variance = gaussian.q_mean_variance(schedule, one, t)
    of_x0 = gaussian.q_sample(schedule, one, t, zero)
    of_eps = gaussian.q_sample(schedule, zero, t, one)
    # beta_t, computed from the table, has an error of eps, and each step of the recursion rounds three times
    tolerance = 4 * EPS * (t + 2)
    at = "t = {}".format
    law = "1 composition"
    # a |a| is a squared with the sign of a
    yield compare(law, "mean of q(x_t | x_0), squared, x_0 = 1", signal, mean * abs(mean), tolerance,
                  "mean_t^2 = prod_{i <= t} (1 - beta_i) = alpha_bar_t", at)
    yield compare(law, "variance of q(x_t | x_0)", noise, variance, tolerance,
                  "var_t = (1 - beta_t) var_{t-1} + beta_t = 1 - alpha_bar_t", at)
    yield compare(law, "q_sample: power of the signal", signal, of_x0 * abs(of_x0), tolerance,
                  "x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps: coefficient of x_0, squared", at)
    yield compare(law, "q_sample: power of the noise", noise, of_eps * abs(of_eps), tolerance,
                  "x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps: coefficient of eps, squared", at)


def simulation(schedule: Schedule, rng) -> Iterator[Row]:
    """1 simulation: compares chains of single steps, with random noise, with the closed form."""
    x_0, n = 0.7, chains(schedule.T)
    t = np.unique(np.linspace(0, schedule.T - 1, 8).round().astype(int))
    mean, variance = gaussian.q_mean_variance(schedule, np.full(len(t), x_0), t)
    measured_mean, measured_variance = simulate(schedule, x_0, n, t, rng)
    law, at = "1 simulation", lambda i: f"t = {t[i]}, x_0 = {x_0}, {n} chains"
    yield compare(law, f"mean of {n:,} chains, x_0 = {x_0}", mean, measured_mean,
                  MEAN_SIGMAS * np.sqrt(variance / n), "E[x_t] = sqrt(alpha_bar_t) x_0", at, random=True)
    yield compare(law, f"variance of {n:,} chains", variance, measured_variance,
                  [variance_bound(0.0, v, n) for v in variance], "Var[x_t] = 1 - alpha_bar_t", at, random=True)


def two_times(schedule: Schedule, rng) -> Iterator[Row]:
    """2 any two times: compares a jump from s to t with the single steps between them."""
    s, t = pairs(rng, schedule.T, 24, first=-1)
    alpha_ts, sigma2_ts = gaussian.q_step(schedule, s, t)
    between = [single_steps(schedule.betas[a + 1 : b + 1]) for a, b in zip(s, t, strict=True)]
    signal, noise = np.array([(p[-1], q[-1]) for p, q in between]).T
    tolerance = 4 * EPS * (t - s + 2)
    law, at = "2 any two times", lambda i: f"s = {s[i]}, t = {t[i]}"
    yield compare(law, "alpha_ts squared, single steps from s to t", signal, alpha_ts * abs(alpha_ts), tolerance,
                  "alpha_ts^2 = prod_{s < i <= t} (1 - beta_i) = alpha_bar_t / alpha_bar_s", at, random=True)
    yield compare(law, "sigma2_ts, single steps from s to t", noise, sigma2_ts, tolerance,
                  "sigma2_ts = sigma_t^2 - alpha_ts^2 sigma_s^2", at, random=True)


def snr_falls(schedule: Schedule, rng) -> Iterator[Row]:
    """3 SNR falls: the SNR falls strictly, and every table is finite."""
    t, law = np.arange(schedule.T), "3 SNR falls"
    snr, log_snr, has_signal = schedule.snr(t), schedule.log_snr(t), schedule.alpha_bar > 0
    if schedule.T >= 2:
        yield count(law, "times at which SNR does not fall", ~(np.diff(snr) < 0), "SNR_t < SNR_{t-1}",
                    lambda i: f"SNR[{i}] = {snr[i]:.17g}, SNR[{i + 1}] = {snr[i + 1]:.17g}")
    else:
        yield skipped(law, "times at which SNR does not fall", "needs T >= 2")
    tables = {"alpha_bar": schedule.alpha_bar, "beta": schedule.betas, "alpha": schedule.alpha(t),
              "sigma": schedule.sigma(t), "SNR": snr, "log-SNR": np.where(has_signal, log_snr, 0.0)}
    yield count(law, "entries of tables that are not finite", ~np.isfinite(list(tables.values())),
                "alpha_bar, beta, alpha, sigma, SNR and log-SNR are finite (log-SNR where alpha_bar > 0)",
                lambda i: f"{list(tables)[i // schedule.T]} at t = {i % schedule.T}")
    signal, noise = single_steps(schedule.betas)
    clear = signal > 1e-9                                   # a smaller signal has lost its digits in the recursion
    if clear.any():
        # the relative errors of both powers
        tolerance = 4 * EPS * (t + 2) * (1 / signal + 1 / noise)
        yield compare(law, "log-SNR against single steps", np.log(signal[clear] / noise[clear]), log_snr[clear],
                      tolerance[clear], "log-SNR_t = log(alpha_bar_t / (1 - alpha_bar_t))",
                      lambda i: f"t = {t[clear][i]}")
        steps = signal[clear] / noise[clear]
        yield compare(law, "SNR against single steps", steps, snr[clear], tolerance[clear] * steps,
                      "SNR_t = alpha_bar_t / (1 - alpha_bar_t)", lambda i: f"t = {t[clear][i]}")


def ends_in_noise(schedule: Schedule, rng) -> Iterator[Row]:
    """4 ends in noise: the KL divergence of starting from N(0, I) is right, and alpha_bar_T is small."""
    last, abar = schedule.T - 1, float(schedule.alpha_bar[-1])
    x_0 = np.array([-1.0, 0.0, 0.5, 1.0])
    # KL = E[log q(x) - log p(x)] under q; Gauss-Hermite quadrature is exact for a quadratic
    z, weight = np.polynomial.hermite_e.hermegauss(4)
    x = math.sqrt(abar) * x_0[:, None] + math.sqrt(1 - abar) * z                      # (4, nodes)
    gap = (-(z**2) - math.log(1 - abar) + x**2) / 2
    yield compare("4 prior KL", f"KL(q(x_{last} | x_0) || N(0, 1)), quadrature", gap @ weight / weight.sum(),
                  gaussian.prior_kl(schedule, x_0), ATOMS * (4 + abs(math.log(1 - abar))),
                  "KL = (abar x_0^2 - abar - log(1 - abar)) / 2, abar = alpha_bar_T", lambda i: f"x_0 = {x_0[i]}")
    excess = max(0.0, abar - MOST_SIGNAL_AT_THE_END)
    remedy = (f"alpha_bar[{last}] = {abar:.4g}: the last step still shows the image, and a sampler that starts from "
              "pure noise starts where no network was trained: let alpha_bar fall closer to 0, by larger betas or more "
              "of them") if excess else ""
    yield Row("4 ends in noise", f"alpha_bar[{last}] <= {MOST_SIGNAL_AT_THE_END}; the error is the excess",
              MOST_SIGNAL_AT_THE_END, abar, excess, 0.0,
              f"alpha_bar_T <= {MOST_SIGNAL_AT_THE_END}, so that x_T is close to N(0, I)", remedy, side="<=")


def zero_snr(schedule: Schedule, rng) -> Iterator[Row]:
    """5 zero terminal SNR: at alpha_bar = 0 eps is refused, and v gives x_0."""
    law, t = "5 zero terminal SNR", schedule.T - 1
    if schedule.alpha_bar[-1] > 0:
        yield skipped(law, "eps-prediction is refused at SNR 0", f"this schedule ends at an SNR of "
                      f"{float(schedule.snr(t)):.3g}, above 0")
        return
    x_0, eps = rng.standard_normal((2, 5))
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    asked = {
        "target": lambda: gaussian.target(schedule, "eps", x_0, eps, t),
        "to_x0": lambda: gaussian.to_x0(schedule, "eps", x_t, t, eps),
        "x0_from_score": lambda: gaussian.x0_from_score(schedule, x_t, t, -eps),
        "NetworkDenoiser": lambda: NetworkDenoiser(schedule, "eps", lambda x_t, t, cond: eps),
    }
    yield count(law, "functions that accept eps at SNR 0", [not _refuses(ask) for ask in asked.values()],
                "x_T = eps: x_0 = (x_T - sigma eps) / alpha is 0/0", lambda i: list(asked)[i])
    v = gaussian.target(schedule, "v", x_0, eps, t)
    yield compare(law, "x_0 from v at SNR 0", x_0, gaussian.to_x0(schedule, "v", x_t, t, v), ATOMS * (1 + abs(x_0)),
                  "x_0 = alpha x_t - sigma v", f"t = {t}", random=True)


FORWARD = (Law("1 composition", composition), Law("1 simulation", simulation), Law("2 any two times", two_times),
           Law("3 SNR falls", snr_falls), Law("4 prior KL", ends_in_noise), Law("5 zero terminal SNR", zero_snr))


# ---- what the laws share -----------------------------------------------------------------------------------


def pairs(rng, T: int, count: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Times s < t, (n,) each, none below `first`: the longest jump, the first and last single step, random pairs."""
    drawn = np.sort(rng.integers(first, T, (count, 2)), axis=1)
    ends = [(first, T - 1), (first, first + 1), (T - 2, T - 1)]
    s, t = np.unique([p for p in [*ends, *drawn.tolist()] if p[0] < p[1]], axis=0).T
    return s, t


def _refuses(call) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False
