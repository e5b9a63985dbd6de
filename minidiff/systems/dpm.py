"""Diffusion probabilistic models (Sohl-Dickstein et al. 2015, arXiv 1503.03585).

The first paper on diffusion models, on its first example: the Swiss roll in two dimensions.

    forward    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                             table App.1
    reverse    p(x_T) = N(0, I),   p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_Sigma(x_t, t))              eq. 4, table App.1
    bound      K = - sum_{t=2}^T E_q KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) )
                   + H_q(X_T | X_0) - H_q(X_1 | X_0) - H_p(X_T)                                     eq. 14
    training   the reverse steps maximise K; then they and beta_2 ... beta_T do, together           section 2.4

Mean and variance are both learned: a layer of 64 normalised radial basis functions, which all times share, and a linear
readout for each time (appendix D.1.1).  The schedule is learned with frozen noise: eps is drawn first and kept,

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   so that K has a derivative by beta_t;

beta_1 stays at a small constant, because otherwise the model would put everything into the first step (section 2.4.1).
The schedule begins at beta_t = 1/(T - t + 1), which removes the same 1/T of the signal's power at each step
(`schedules.even_loss`).

K is reported as in the paper's table 1: in bits, and in bits above L_null, the data's log likelihood under N(0, I).
The paper does not give the noise of its roll, so its numbers and ours cannot be compared.  But the density of our roll
can be computed (data/swiss_roll.py), and `report` gives it beside K.

Measured with examples/01_swiss_roll.py (2026-11-23, 1 core of an AMD EPYC (Zen 4)): K is -2.65 bits with the given
schedule and -2.24 with the learned one, standard error 0.04, where the truth is -1.38.

Different from the paper, or left out:
    - 64 hidden units; the paper has 16, which here reached -3.20 and -3.02 bits and drew a blurred roll (4000 and 8000
      steps of 512 points, lr 0.02 and 0.01).
    - f_mu is the mean of q(x_{t-1} | x_t, x_0) at x_0 = z_mu(x_t, t), where the network gives z_mu; in the paper the
      network gives the mean itself.  z_mu has the size of the data at every t, and one learning rate fits all readouts.
    - f_Sigma = sigmoid(z_Sigma + sigmoid^-1(beta_t)) is that of the paper's image model (eq. 64); for the roll the
      paper has sigmoid(z_Sigma).  The former is q's own beta_t where z_Sigma is 0.
    - beta_t = 1/(T - t + 1) is the paper's schedule for binary data (for Gaussian data its footnote 2 finds it, fixed,
      as good as a learned one); it does not say where its learned one begins.
    - AdamW's decay of matrices also acts on the readouts, the units' centres and the learned schedule, and pulls the
      betas toward 1/2: with T = 10, beta_6 becomes .158, and without decay .137.
    - Its other data: binary sequences with a binomial kernel, bark, dead leaves, CIFAR-10, MNIST.
    - Multiplying the model with another density (section 2.5) is in diffusion/posterior.py.

Points have no captions: `sample(count)` stands in the place of `sample(captions)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minidiff.checks import whole
from minidiff.data import swiss_roll
from minidiff.data.dataset import DEFAULT, Dataset
from minidiff.diffusion.entropy import KBound, bits, k_bound, log_likelihood_of_noise
from minidiff.diffusion.gaussian import q_posterior_mean_variance, q_sample
from minidiff.diffusion.samplers import State
from minidiff.diffusion.schedules import Schedule, even_loss, from_betas
from minidiff.diffusion.times import training_times
from minidiff.engine import ops
from minidiff.engine.backend import to_numpy, xp_of
from minidiff.engine.random import SampleStreams, generator
from minidiff.engine.tensor import Tensor, no_grad
from minidiff.errors import UserError
from minidiff.nn.kl import kl
from minidiff.nn.layers import parameter
from minidiff.nn.module import Module
from minidiff.nn.precision import as_float32, as_input
from minidiff.pictures import plots
from minidiff.systems.stage import Stage, Step
from minidiff.systems.system import System, check_finite

if TYPE_CHECKING:
    from PIL.Image import Image

D = 2                                                       # coordinates of a point


@dataclass(frozen=True)
class DPMConfig:
    """Everything that makes one model; it is saved in the model's file."""

    T: int = 40
    hidden: int = 64                        # radial basis functions
    beta_first: float = 0.001               # beta_1, which is not learned
    noise: float = 0.05                     # of the data, around the roll
    steps: int = 3000                       # of the reverse process alone
    schedule_steps: int = 4000              # of it and the schedule together

    def __post_init__(self):
        if self.T < 2 or min(self.hidden, self.steps, self.schedule_steps) < 1:
            raise ValueError(f"T must be at least 2, and hidden, steps and schedule_steps at least 1, not {self.T}, "
                             f"{self.hidden}, {self.steps} and {self.schedule_steps}")
        if not (0 < self.beta_first < 1 and 0 < self.noise < 1):
            raise ValueError(f"beta_first and noise must lie between 0 and 1, not {self.beta_first} and {self.noise}")


class RadialBasis(Module):
    """(x_t (B, 2), t (B,)) -> z_mu, z_Sigma (B, 2): a hidden layer for all times, a readout for each."""

    def __init__(self, T: int, K: int, rng: np.random.Generator):
        self.centres, self.log_width = parameter((K, D), 1.0, rng), parameter((K,), 0, rng)
        self.readout = parameter((T, K * 2 * D), 0, rng)

    def forward(self, x_t: Tensor, t) -> tuple[Tensor, Tensor]:
        B, K = len(x_t), len(self.centres)
        # h_k = exp(-||x_t - c_k||^2 / 2 w_k^2) / sum_j exp(-||x_t - c_j||^2 / 2 w_j^2)
        d = as_float32(x_t).reshape(B, 1, D) - as_float32(self.centres)             # (B, K, D)
        precision = 0.5 * K * ops.exp(-2 * as_float32(self.log_width))              # w^2 = 2/K at first
        h = ops.cast(ops.softmax(-0.5 * precision * ops.sum(d * d, axis=2)), x_t.dtype)     # (B, K)
        w = ops.embedding(self.readout, t).reshape(B, K, 2 * D)
        z = ops.sum(h.reshape(B, K, 1) * w, axis=1)                                 # (B, 2 D)
        return z[:, :D], z[:, D:]


class DPM(System):
    """A reverse process and the schedule that it reverses."""

    name, Config, example = "dpm", DPMConfig, "01_swiss_roll.py"
    no_trajectory = "it draws points, not pictures"

    def __init__(self, config: DPMConfig, tokenizer: None, rng: np.random.Generator):
        super().__init__(config, None, rng)
        # beta_t = 1/(T - t + 1); the last of them, 1, as near to it as a sigmoid may come
        betas = np.minimum(even_loss(config.T).betas[1:, None], 0.999)              # (T-1, 1)
        self.logit_beta = Tensor(np.log(betas / (1 - betas)).astype(np.float32), requires_grad=True)
        self.reverse = RadialBasis(config.T, config.hidden, rng)

    @property
    def schedule(self) -> Schedule:
        """The schedule as learned so far."""
        learned = 1 / (1 + np.exp(-to_numpy(self.logit_beta.data)[:, 0].astype(np.float64)))
        return from_betas(np.concatenate([[self.config.beta_first], learned]), "learned", allow_signal=True)

    # --- training -----------------------------------------------------------------------------------------

    def loss(self, x_0, t, eps) -> Tensor:
        """-K in nats, without the terms that depend on no parameter: a Tensor of shape ().

        x_0, eps (B, 2) float32; t (B,) int of 1..T-1, all equally likely.  It has gradients for the schedule.
        """
        return self.loss_of(self.reverse, x_0, t, eps)

    def loss_of(self, reverse: RadialBasis, x_0, t, eps) -> Tensor:
        """The same with a given reverse process, such as its half-precision twin."""
        T = self.config.T
        logit_beta, log_abar = self.tables()                                        # (T, 1) twice
        logit_t, log_abar_t, log_abar_s = (ops.embedding(a, i) for a, i in (
            (logit_beta, t), (log_abar, t), (log_abar, t - 1)))
        log_beta_t, log_keep_t = ops.log_sigmoid(logit_t), ops.log_sigmoid(-logit_t)        # of beta_t and 1 - beta_t
        noise_t, noise_s = -ops.expm1(log_abar_t), -ops.expm1(log_abar_s)           # 1 - alpha_bar
        # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, the noise frozen
        x_t = ops.exp(0.5 * log_abar_t) * x_0 + ops.sqrt(noise_t) * eps             # (B, 2)
        z_mu, z_sigma = (as_float32(z) for z in reverse(as_input(reverse, x_t), t))
        # q(x_{t-1} | x_t, x_0) = N(c_t x_t + c_0 x_0, beta~_t):   diffusion/gaussian.py, with a derivative by beta
        c_t = ops.exp(0.5 * log_keep_t) * noise_s / noise_t
        c_0 = ops.exp(0.5 * log_abar_s + log_beta_t) / noise_t
        log_beta_tilde = log_beta_t + ops.log(noise_s) - ops.log(noise_t)
        # f_mu = c_t x_t + c_0 z_mu,   f_Sigma = sigmoid(z_Sigma + sigmoid^-1(beta_t))
        log_f_sigma = ops.log_sigmoid(z_sigma + logit_t)
        steps = kl(c_t * x_t + c_0 * x_0, log_beta_tilde, c_t * x_t + c_0 * z_mu, log_f_sigma)      # (B, 2)
        # -K = sum_t E KL - H_q(X_T | X_0) + ...,   H_q(X_T | X_0) = D/2 log(1 - alpha_bar_T) + ...
        return (T - 1) * D * ops.mean(steps) - 0.5 * D * ops.log(-ops.expm1(log_abar[T - 1, 0]))

    def tables(self) -> tuple[Tensor, Tensor]:
        """sigmoid^-1(beta) and log alpha_bar (T, 1), with gradients: what `schedule` is as plain numbers.

        Logarithms, since in float32 beta near 1 leaves no digits of 1 - beta, nor alpha_bar near 1 of 1 - alpha_bar.
        """
        logit_beta = as_float32(self.logit_beta)            # half precision has too few digits for it
        xp = xp_of(logit_beta.data)
        b = self.config.beta_first
        first = Tensor(xp.full((1, 1), math.log(b) - math.log1p(-b), logit_beta.dtype))
        logit_beta = ops.concat([first, logit_beta], axis=0)
        # log alpha_bar_t = sum_{i <= t} log(1 - beta_i)
        upto = Tensor(xp.asarray(np.tri(self.config.T, dtype=logit_beta.dtype)))
        return logit_beta, upto @ ops.log_sigmoid(-logit_beta)

    def stages(self, data: Dataset) -> Iterator[Stage]:
        """The reverse process on the given schedule, then both.  The points are its own; `data` must be the default."""
        if data is not None and data.name != DEFAULT:
            raise UserError(f"dpm learns from points of its own, the Swiss roll, not from {data.title}: leave out "
                            "--data")

        def batch(step: Step) -> tuple:
            points = swiss_roll.points(step.rng, step.size, self.config.noise)
            # t is uniform on 1..T-1, and stratified over the batch
            t = 1 + training_times(step.rng, step.size, self.config.T - 1, power=1)
            return points, t, step.normal((step.size, D))

        yield Stage("reverse", self.reverse, batch, self.loss_of, self.config.steps, batch_size=128, lr=3e-2,
                    picture=self.picture)
        yield Stage("schedule", self, batch, DPM.loss, self.config.schedule_steps, batch_size=128, lr=1e-2,
                    picture=self.picture)

    # --- the reverse process, and what it is worth ----------------------------------------------------------

    def reverse_step(self, x_t: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """f_mu and f_Sigma, the mean and variance (B, 2) of p(x_{t-1} | x_t), float64."""
        schedule = self.schedule
        with no_grad():
            x = as_input(self.reverse, x_t.astype(np.float32))
            z_mu, z_sigma = (to_numpy(z.data).astype(np.float64) for z in self.reverse(x, t))
        f_mu, _ = q_posterior_mean_variance(schedule, z_mu, x_t.astype(np.float64), t)
        beta_t = schedule.betas[t][:, None]
        # sigmoid(z_Sigma + sigmoid^-1(beta_t)) = beta_t / (beta_t + (1 - beta_t) exp(-z_Sigma))
        with np.errstate(over="ignore"):                    # then f_Sigma is 0
            return f_mu, beta_t / (beta_t + (1 - beta_t) * np.exp(-z_sigma))

    def bound(self, x_0: np.ndarray, *, seed: int = 0) -> KBound:
        """The parts of K for each of the points x_0 (B, 2), in nats."""
        return k_bound(self.schedule, self.reverse_step, x_0, streams=SampleStreams(seed, len(x_0), "noise of K"))

    def report(self, count: int = 4000, *, seed: int = 0) -> dict[str, float]:
        """K in bits on `count` new points, its standard error, K - L_null, and the truth, which K bounds from below."""
        x_0 = swiss_roll.points(generator(seed, "points of a report"), count, self.config.noise)
        K = bits(self.bound(x_0, seed=seed).total)
        return {"K": float(K.mean()), "standard error": float(K.std() / count**0.5),
                "K - L_null": float(K.mean() - bits(log_likelihood_of_noise(D))),
                "truth": float(bits(swiss_roll.log_prob(x_0, self.config.noise).mean()))}

    def trajectory(self, count: int, *, seed: int = 0, streams: SampleStreams | None = None) -> Iterator[State]:
        """Every state of the reverse chain for `count` points, from p(x_T); point i from its own stream (seed, i)."""
        streams = SampleStreams(seed, count) if streams is None else streams
        if len(streams) != count:
            raise ValueError(f"streams must be one for each of the {count} points, not {len(streams)}")
        T, x_t = self.config.T, streams.normal((D,), np.float64)
        yield State(0, T - 1, x_t, None)
        for t in reversed(range(T)):
            if t > 0:
                mean, variance = self.reverse_step(x_t, np.full(count, t))
            else:                                           # appendix B.2: q(x_1 | x_0) reversed under N(0, I)
                mean, variance = np.sqrt(1 - self.config.beta_first) * x_t, self.config.beta_first
            x_t = mean + np.sqrt(variance) * streams.normal((D,), np.float64)
            yield State(T - t, t - 1, x_t, mean)

    def sample(self, count: int = 1000, *, seed: int = 0, streams: SampleStreams | None = None) -> np.ndarray:
        """Points (count, 2) float32."""
        count = whole("count, of points and not captions,", count, 1)
        *_, last = self.trajectory(count, seed=seed, streams=streams)
        return check_finite(last.x_t.astype(np.float32))

    def picture(self, count: int = 1500, *, seed: int = 0) -> Image:
        """The paper's figure 1: the forward process in blue, and below it the reverse one in red; clean at the left."""
        s, shown = self.schedule, [-1, self.config.T // 4 - 1, self.config.T // 2 - 1, self.config.T - 1]
        x_0 = swiss_roll.points(generator(seed, "points of a picture"), count, self.config.noise)
        eps = generator(seed, "noise of a picture").standard_normal(x_0.shape, dtype=np.float32)
        forward = [q_sample(s, x_0, t, eps) for t in shown]
        states = {state.t: state.x_t for state in self.trajectory(count, seed=seed)}
        return plots.scatter([("q, forward", forward), ("p, reverse", [states[t] for t in shown])],
                             [f"t = {t + 1}" for t in shown])
