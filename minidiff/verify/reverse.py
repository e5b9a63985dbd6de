"""The reverse chain: what x_t says about the earlier x_s and about x_0, by Bayes' rule.

     8  Bayes, pointwise             q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0)
     9  the posterior                precisions add: 1/var = alpha_ts^2/sigma2_ts + 1/sigma_s^2          DDPM eq. 6, 7
    10  four forms of a prediction   eps, x_0, v and score convert into one another           Salimans & Ho 2022
    11  Tweedie's formula            E[x_0 | x_t] = (x_t + sigma^2 score) / alpha
    12  the best denoiser            E[x_0 | x_t] = mu + Cov(x_0, x_t) Cov(x_t)^-1 (x_t - alpha mu)
    15  loss floors                  the smallest possible loss of eps-, x_0- and v-prediction
    16  the true reverse variance    Var(x_s | x_t) = beta~ + c_0^2 Var(x_0 | x_t)                    DDPM section 3.2
    18  the bound's weights          KL of two posteriors = (SNR_s - SNR_t)/2 (x_0 - x0_hat)^2           VDM eq. 13
    19  the bound is tight           NELBO = H(x_0) + KL(q(x_T) || N(0, 1)) on Gaussian data

Laws that need data take x_0 ~ N(mu, s^2), for which every conditional distribution is known. Words such as Tweedie,
nats and variational bound (NELBO) are explained in docs/glossary.md.
"""

import math
from collections.abc import Iterator

import numpy as np

from minidiff.diffusion import gaussian, losses
from minidiff.diffusion.exact import GaussianDenoiser
from minidiff.diffusion.schedules import Schedule
from minidiff.verify.forward import pairs
from minidiff.verify.rows import ATOMS, Law, Row, compare, skipped

TWO_TIMES = "needs two times, T >= 2"
NO_SIGNAL = "needs a time with alpha_bar > 0"
POWERS = (0.25, 1.0, 4.0)                                   # s^2, the variance of the data


def bayes(schedule: Schedule, rng) -> Iterator[Row]:
    """8 Bayes: compares both factorizations of q(x_s, x_t | x_0) at random points."""
    law, computed = "8 Bayes pointwise", "log q(x_s | x_t, x_0) + log q(x_t | x_0)"
    if schedule.T < 2:
        yield skipped(law, computed, TWO_TIMES)
        return
    s, t = pairs(rng, schedule.T, 200, first=0)
    x_0, z_s, z_t = rng.standard_normal((3, len(s)))
    # the right-hand side, computed from the table alone
    abar_s, abar_t = schedule.alpha_bar[s], schedule.alpha_bar[t]
    x_s = np.sqrt(abar_s) * x_0 + np.sqrt(1 - abar_s) * z_s
    x_t = np.sqrt(abar_t / abar_s) * x_s + np.sqrt(1 - abar_t / abar_s) * z_t
    right = [_log_normal(x_t, np.sqrt(abar_t / abar_s) * x_s, 1 - abar_t / abar_s),
             _log_normal(x_s, np.sqrt(abar_s) * x_0, 1 - abar_s)]
    left = [_log_normal(x_s, *gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t, s)),
            _log_normal(x_t, *gaussian.q_mean_variance(schedule, x_0, t))]
    # 1 - alpha_bar and x - mean have errors of eps, which the division by a small variance magnifies
    magnified = 1 / (1 - abar_t / abar_s) + 1 / (1 - abar_s)
    tolerance = ATOMS * magnified * (1 + sum(map(abs, left + right))) * (1 + abs(x_0))
    yield compare(law, computed, sum(right), sum(left), tolerance,
                  "q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0)",
                  lambda i: f"s = {s[i]}, t = {t[i]}, x_0 = {x_0[i]:.4g}, x_s = {x_s[i]:.4g}, x_t = {x_t[i]:.4g}",
                  random=True)


def posterior(schedule: Schedule, rng) -> Iterator[Row]:
    """9 posterior: mean and variance of q(x_{t-1} | x_t, x_0); the variance of the clean image is 0."""
    law, T = "9 posterior", schedule.T
    if T >= 2:
        t = np.arange(1, T)
        x_0, x_t = rng.standard_normal((2, T - 1))
        mean, variance = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t)
        # the product of two Gaussians in x_s: precisions add, and they weight the mean
        abar_s, ratio = schedule.alpha_bar[:-1], schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
        exact = 1 / (ratio / (1 - ratio) + 1 / (1 - abar_s))
        center = exact * (np.sqrt(ratio) * x_t / (1 - ratio) + np.sqrt(abar_s) * x_0 / (1 - abar_s))
        # 1 - alpha_bar has an error of eps, which the division magnifies
        magnified = ATOMS * (1 / (1 - ratio) + 1 / (1 - abar_s))

        def at(i):
            return f"t = {t[i]}, s = {t[i] - 1}"

        yield compare(law, "variance of q(x_{t-1} | x_t, x_0)", exact, variance, magnified * exact,
                      "1/var = alpha_ts^2 / sigma2_ts + 1 / sigma_s^2", at)
        yield compare(law, "mean of q(x_{t-1} | x_t, x_0)", center, mean, magnified * (abs(x_0) + abs(x_t)),
                      "mean = var (alpha_ts x_t / sigma2_ts + alpha_s x_0 / sigma_s^2)", at, random=True)
    else:
        yield skipped(law, "mean and variance of q(x_{t-1} | x_t, x_0)", TWO_TIMES)
    t = np.arange(T)
    x_0, x_t = rng.standard_normal((2, T))
    mean, variance = gaussian.q_posterior_mean_variance(schedule, x_0, x_t, t, np.full(T, -1))
    yield compare("9 first step", "variance of q(x_{-1} | x_t, x_0)", 0.0, variance, 0.0,
                  "the clean image is known: var = 0, exactly", "t = {}, s = -1".format)
    yield compare("9 first step", "mean of q(x_{-1} | x_t, x_0) is x_0", x_0, mean, 0.0,
                  "the clean image is known: mean = x_0, exactly", "t = {}, s = -1".format, random=True)


def round_trips(schedule: Schedule, rng) -> Iterator[Row]:
    """10 round trips: computes eps, x_0, v and score from one another, at every t."""
    law = "10 round trips"
    t = np.flatnonzero(schedule.alpha_bar > 1e-30)          # for less, dividing by alpha leaves no digit of x_0
    if not t.size:
        yield skipped(law, "x_0 from eps, v and score", NO_SIGNAL)
        return
    x_0, eps = rng.standard_normal((2, len(t)))
    alpha, sigma = np.sqrt(schedule.alpha_bar[t]), np.sqrt(1 - schedule.alpha_bar[t])
    # by definition
    x_t, v, score = alpha * x_0 + sigma * eps, alpha * eps - sigma * x_0, -eps / sigma
    size = 1 + abs(x_0) + abs(eps)
    known = {"x0": x_0, "eps": eps, "v": v, "score": score}
    # the rounding of x_t, magnified by the divisor
    tolerance = {"x0": ATOMS * size / alpha, "eps": ATOMS * size / sigma, "v": ATOMS * size / sigma,
                 "score": ATOMS * size / sigma**2}
    routes = {
        "x0": {"eps": gaussian.x0_from_eps, "v": gaussian.x0_from_v, "score": gaussian.x0_from_score},
        "eps": {"x0": gaussian.eps_from_x0, "v": gaussian.eps_from_v, "score": gaussian.eps_from_score},
        "v": {"x0": gaussian.v_from_x0},
        "score": {"eps": gaussian.score_from_eps, "x0": gaussian.score_from_x0},
    }
    formulas = {"x0": "x_0 = (x_t - sigma eps) / alpha = alpha x_t - sigma v = (x_t + sigma^2 score) / alpha",
                "eps": "eps = (x_t - alpha x_0) / sigma = sigma x_t + alpha v = -sigma score",
                "v": "v = alpha eps - sigma x_0 = (alpha x_t - x_0) / sigma",
                "score": "score = -eps / sigma = (alpha x_0 - x_t) / sigma^2"}
    for name, ways in routes.items():
        got = np.stack([way(schedule, x_t, t, known[given]) for given, way in ways.items()])      # (ways, n)
        yield compare(law, f"{name} from {', '.join(ways)}", known[name], got, tolerance[name], formulas[name],
                      lambda i, ways=ways: f"from {list(ways)[i // len(t)]} at t = {t[i % len(t)]}", random=True)
    got = gaussian.v_from_x0_eps(schedule, x_0, t, eps)
    yield compare(law, "v from x_0 and eps", v, got, ATOMS * size, "v = alpha eps - sigma x_0",
                  lambda i: f"t = {t[i]}", random=True)


def best_denoiser(schedule: Schedule, rng) -> Iterator[Row]:
    """11, 12 best denoiser: compares E[x_0 | x_t] with conditioning of the joint Gaussian, for x_0 ~ N(mu, S)."""
    D = 3
    mu, A = rng.standard_normal(D), rng.standard_normal((D, D))
    S = A @ A.T / D + 0.1 * np.eye(D)
    denoiser = GaussianDenoiser(schedule, mu, S)
    t = np.unique(np.linspace(0, schedule.T - 1, 50).round().astype(int))
    t = t[schedule.alpha_bar[t] > 1e-30]
    if not t.size:
        yield skipped("11 Tweedie", "x_0 from the score", NO_SIGNAL)
        return
    x_t = rng.standard_normal((len(t), D))
    expected, score = np.empty((2, len(t), D))
    for i, abar in enumerate(schedule.alpha_bar[t]):
        # Cov(x_0, x_t) = alpha S,  Cov(x_t) = alpha^2 S + sigma^2 I
        V = abar * S + (1 - abar) * np.eye(D)
        gap = np.linalg.solve(V, x_t[i] - math.sqrt(abar) * mu)
        expected[i], score[i] = mu + math.sqrt(abar) * S @ gap, -gap
    # the solution's error is proportional to the condition number of the matrix
    condition = np.linalg.cond(S)
    size = 1 + abs(x_t).max() + abs(mu).max() + abs(S).max()
    tolerance, alpha = ATOMS * D * condition * size**2, np.sqrt(schedule.alpha_bar[t])[:, None]

    def at(i):
        return f"t = {t[i // D]}"

    measured = gaussian.x0_from_score(schedule, x_t, t, score)
    yield compare("11 Tweedie", "x_0 from the score of q(x_t)", expected, measured, tolerance / alpha,
                  "E[x_0|x_t] = (x_t + sigma^2 grad log q(x_t)) / alpha", at, random=True)
    yield compare("12 best denoiser", "E[x_0 | x_t] of correlated Gaussian data", expected, denoiser(x_t, t), tolerance,
                  "E[x_0|x_t] = mu + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha mu)", at, random=True)


def loss_floors(schedule: Schedule, rng) -> Iterator[Row]:
    """15 loss floors: each target's variance that linear regression on x_t leaves unexplained, x_0 ~ N(0, s^2)."""
    t = np.flatnonzero(schedule.alpha_bar > 0)
    abar = schedule.alpha_bar[t]
    one, zero = np.ones(len(t)), np.zeros(len(t))
    floors = {"x0": ("s^2 sigma^2 / V", lambda s2, V: s2 * (1 - abar) / V),
              "eps": ("alpha^2 s^2 / V", lambda s2, V: abar * s2 / V),
              "v": ("s^2 / V", lambda s2, V: s2 / V)}
    if not t.size:
        yield skipped("15 loss floors", "unexplained variance of x0, eps and v", NO_SIGNAL)
        return
    # x_t = a x_0 + b eps and target = c x_0 + d eps: unit inputs give the coefficients
    a, b = gaussian.q_sample(schedule, one, t, zero), gaussian.q_sample(schedule, zero, t, one)
    for predicts, (formula, floor) in floors.items():
        c, d = (gaussian.target(schedule, predicts, *pair, t) for pair in ((one, zero), (zero, one)))
        expected, measured, tolerance = [], [], []
        for s2 in POWERS:
            # Var(y) - Cov(y, x_t)^2 / Var(x_t)
            measured.append(c**2 * s2 + d**2 - (c * a * s2 + d * b) ** 2 / (a**2 * s2 + b**2))
            expected.append(floor(s2, abar * s2 + 1 - abar))
            tolerance.append(ATOMS * (1 + s2) * one)        # both terms are at most about 1 + s^2, and cancel
        yield compare("15 loss floors", f"unexplained variance of {predicts}", expected, measured, tolerance,
                      f"min E (target - out(x_t))^2 = {formula},  V = alpha^2 s^2 + sigma^2",
                      lambda i: f"t = {t[i % len(t)]}, s^2 = {POWERS[i // len(t)]}")


def reverse_variance(schedule: Schedule, rng) -> Iterator[Row]:
    """16 reverse variance: Var(x_{t-1} | x_t) of Gaussian data, compared with the joint covariance's."""
    law, computed = "16 reverse variance", "Var(x_{t-1} | x_t), data of variance s^2"
    if schedule.T < 2:
        yield skipped(law, computed, TWO_TIMES)
        return
    t = np.arange(1, schedule.T)
    abar_s, beta = schedule.alpha_bar[:-1], schedule.betas[1:]
    beta_tilde, c_0 = _posterior_terms(schedule, t)
    expected, measured, tolerance = [], [], []
    for s2 in POWERS:
        # x_t = sqrt(1 - beta) x_s + sqrt(beta) z:  Var(x_s | x_t) = Var(x_s) beta / Var(x_t)
        V_s = abar_s * s2 + 1 - abar_s
        V_t = (1 - beta) * V_s + beta
        expected.append(V_s * beta / V_t)
        # law of total variance over x_0, with minidiff's posterior
        abar_t = schedule.alpha_bar[1:]
        measured.append(beta_tilde + c_0**2 * s2 * (1 - abar_t) / (abar_t * s2 + 1 - abar_t))
        tolerance.append(ATOMS * (1 + s2) * np.ones(len(t)))
    yield compare(law, computed, expected, measured, tolerance, "Var(x_s | x_t) = beta~ + c_0^2 Var(x_0 | x_t)",
                  lambda i: f"t = {t[i % len(t)]}, s^2 = {POWERS[i // len(t)]}")


def bound_weights(schedule: Schedule, rng) -> Iterator[Row]:
    """18 bound weights: compares them with the KL between the posteriors of x_0 and x_0 + 1, at every t."""
    law, computed = "18 bound weights", "KL of the posteriors of x_0 = 0 and 1"
    if schedule.T < 2:
        yield skipped(law, computed, TWO_TIMES)
        return
    t = np.arange(1, schedule.T)
    beta_tilde, c_0 = _posterior_terms(schedule, t)
    weight = losses.bound_weight(schedule, t, "x0")
    # two Gaussians of equal variance:  KL = (distance of the means)^2 / (2 variance)
    kl = c_0**2 / (2 * beta_tilde)
    # SNR_s - SNR_t cancels; each SNR has a relative error of eps / sigma_s^2, and beta~ the error of law 9
    snr_s, sigma2_s = schedule.alpha_bar[:-1] / (1 - schedule.alpha_bar[:-1]), 1 - schedule.alpha_bar[:-1]
    tolerance = ATOMS * (snr_s / sigma2_s + kl * (1 / schedule.betas[1:] + 1 / sigma2_s))
    yield compare(law, computed, kl, weight, tolerance,
                  "KL(q(x_s|x_t,x_0) || q(x_s|x_t,x0_hat)) = (SNR_s - SNR_t)/2 (x_0 - x0_hat)^2",
                  lambda i: f"t = {t[i]}")


def tight_bound(schedule: Schedule, rng) -> Iterator[Row]:
    """19 tight bound: with the best denoiser, the KL terms sum to the entropy of Gaussian data plus the prior KL."""
    expected, measured = [], []
    T, abar = schedule.T, schedule.alpha_bar
    t = np.arange(1, T)
    beta_tilde, c_0 = _posterior_terms(schedule, t)
    zero = np.zeros(1)
    for s2 in POWERS:
        # H(x_0) + KL(q(x_T) || N(0, 1)),  q(x_T) = N(0, V_T)
        V = abar * s2 + 1 - abar                                                      # (T,)
        expected.append(0.5 * math.log(2 * math.pi * math.e * s2) + 0.5 * (V[-1] - 1 - math.log(V[-1])))
        # L_T is quadratic in x_0: its average over x_0
        at_0, at_1 = (float(gaussian.prior_kl(schedule, zero + x)[0]) for x in (0.0, 1.0))
        nelbo = at_0 + s2 * (at_1 - at_0)
        # L_{t-1} = KL(N(mu~(x_0), beta~) || N(mu~(x0_hat), true variance)), averaged over x_0 given x_t
        mmse = s2 * (1 - abar) / V                                                    # Var(x_0 | x_t)
        between = c_0**2 * mmse[1:]
        true = beta_tilde + between
        nelbo += np.sum(gaussian.kl_gaussian(np.zeros(T - 1), beta_tilde, 0.0, true) + between / (2 * true))
        # the average of L_0 = -log p(x_0 | x_{t=0})
        nelbo += 0.5 * math.log(2 * math.pi * math.e * mmse[0])
        measured.append(nelbo)
    # each term has an error of eps over its variances; in the worst case all errors have the same sign
    tolerance = ATOMS * (10 + np.sum(1 / schedule.betas[1:] + 1 / (1 - abar[:-1])) + 1 / (1 - abar[0]))
    yield compare("19 tight bound", "NELBO in nats, data of variance s^2", expected, measured, tolerance,
                  "sum_t L_t = H(x_0) + KL(q(x_T) || N(0, 1)), with the best denoiser and the true reverse variance",
                  lambda i: f"s^2 = {POWERS[i]}")


REVERSE = (Law("8 Bayes pointwise", bayes), Law("9 posterior", posterior), Law("10 round trips", round_trips),
           Law("11 Tweedie", best_denoiser), Law("15 loss floors", loss_floors),
           Law("16 reverse variance", reverse_variance), Law("18 bound weights", bound_weights),
           Law("19 tight bound", tight_bound))


# ---- what the laws share -----------------------------------------------------------------------------------


def _log_normal(x, mean, variance):
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * math.pi * variance))


def _posterior_terms(schedule: Schedule, t) -> tuple[np.ndarray, np.ndarray]:
    """beta~_t, and c_0, the coefficient of x_0 in the posterior mean, (n,) each, from gaussian's function."""
    one, zero = np.ones(len(t)), np.zeros(len(t))
    c_0, beta_tilde = gaussian.q_posterior_mean_variance(schedule, one, zero, t)
    return beta_tilde, c_0
