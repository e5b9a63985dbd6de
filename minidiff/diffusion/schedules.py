"""Noise schedules: one table, alpha_bar, says how much of the image is left at each time; all else follows from it.

    alpha_bar_t = prod_{i <= t} (1 - beta_i)            signal power left at time t       DDPM eq. 4
    alpha_t     = sqrt(alpha_bar_t)                     x_t = alpha_t x_0 + sigma_t eps
    sigma_t     = sqrt(1 - alpha_bar_t)                 variance preserving: alpha^2 + sigma^2 = 1
    SNR_t       = alpha_t^2 / sigma_t^2                 strictly falling in t              VDM eq. 2
    beta_t      = 1 - alpha_bar_t / alpha_bar_{t-1}     noise power added by step t        DDPM eq. 2

Time t counts 0 .. T-1, and t = -1 is the clean image, with alpha_bar_{-1} = 1. (The papers count 1 .. T, and 0 is
the clean image.) alpha_t is sqrt(alpha_bar_t), as in VDM; DDPM writes alpha_t for 1 - beta_t, which has no name here.
Tables are float64, in host memory, and read-only.

    DPM            Sohl-Dickstein et al. 2015, arXiv 1503.03585    even_loss (there for binary data)
    DDPM           Ho et al. 2020, arXiv 2006.11239                linear
    LDM            Rombach et al. 2022, arXiv 2112.10752           scaled_linear (its program's, Stable Diffusion's)
    Improved DDPM  Nichol & Dhariwal 2021, arXiv 2102.09672        cosine, respaced
    VDM            Kingma et al. 2021, arXiv 2107.00630            from_log_snr, log_snr_linear
    Score SDE      arXiv 2011.13456                                vp_sde
    Flow matching  Lipman et al. 2023, arXiv 2210.02747            flow_matching
    Zero SNR       Lin et al. 2024, arXiv 2305.08891               zero_terminal_snr
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minidiff import named
from minidiff.checks import whole
from minidiff.engine.backend import to_numpy
from minidiff.errors import UserError
from minidiff.registry import Registry

# Sampling starts from N(0, I). If the last alpha_bar is at most 0.02, x_{T-1} is so close to it that the difference
# costs at most 0.0102 nats a pixel for images in [-1, 1] (gaussian.prior_kl). If it is larger, the sampler starts from
# images that the network never saw in training.
MOST_SIGNAL_AT_THE_END = 0.02
LEAST_STEP = 1e-13                      # of log-SNR, between two times; in float64, less than that is rounding


@dataclass(frozen=True, eq=False)
class Schedule:
    """The table alpha_bar, checked once, copied and made read-only.

    alpha_bar: (T,) strictly decreasing in [0, 1), and log-SNR by at least 1e-13; only the last may be 0 (zero terminal
    SNR).
    Every method takes t as an integer or an integer array, -1 <= t <= T-1, and returns float64 of t's shape;
    other values raise IndexError, other dtypes TypeError. A table that breaks its contract raises ValueError.
    """

    alpha_bar: np.ndarray  # (T,)
    name: str = "custom"

    def __post_init__(self) -> None:
        alpha_bar = np.array(self.alpha_bar, dtype=np.float64)  # a copy, so that the caller's array stays writable
        _check_table(alpha_bar)
        from_clean = np.concatenate(([1.0], alpha_bar))  # entry t + 1 is time t, so that t = -1 reads 1
        from_clean.setflags(write=False)
        object.__setattr__(self, "_from_clean", from_clean)
        object.__setattr__(self, "alpha_bar", from_clean[1:])

    def __reduce__(self) -> tuple:
        """Copies and pickles are built, and so checked and read-only, as the first was."""
        return type(self), (self.alpha_bar, self.name)

    @property
    def T(self) -> int:
        """The number of times: t = 0 .. T-1."""
        return len(self.alpha_bar)

    @property
    def betas(self) -> np.ndarray:  # (T,)
        # beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}
        return 1.0 - self.alpha_bar / self._from_clean[:-1]

    @property
    def reaches_noise(self) -> bool:
        """Whether x_{T-1} is close enough to N(0, I) to start sampling from it: the last alpha_bar is at most 0.02."""
        return bool(self.alpha_bar[-1] <= MOST_SIGNAL_AT_THE_END)

    def abar(self, t: int | np.ndarray) -> np.ndarray:
        return self._from_clean[_checked_times(t, -1, self.T - 1) + 1]

    def alpha(self, t: int | np.ndarray) -> np.ndarray:
        return np.sqrt(self.abar(t))

    def sigma(self, t: int | np.ndarray) -> np.ndarray:
        return np.sqrt(1.0 - self.abar(t))

    def snr(self, t: int | np.ndarray) -> np.ndarray:
        """alpha^2 / sigma^2: inf at t = -1, 0 where alpha_bar is 0."""
        abar = self.abar(t)
        with np.errstate(divide="ignore"):
            return abar / (1.0 - abar)

    def log_snr(self, t: int | np.ndarray) -> np.ndarray:
        """log(alpha^2 / sigma^2): inf at t = -1, -inf where alpha_bar is 0."""
        return _log_snr(self.abar(t))

    def half_log_snr(self, t: int | np.ndarray) -> np.ndarray:
        """lambda = log(alpha / sigma), the clock of DPM-Solver (arXiv 2206.00927)."""
        return 0.5 * self.log_snr(t)


# ---- from betas ------------------------------------------------------------------------------------------


def from_betas(betas: np.ndarray, name: str = "custom", *, allow_signal: bool = False) -> Schedule:
    """The schedule whose step t adds noise of power betas[t].

    betas: (T,) in (0, 1], and 1 at the last step only; otherwise ValueError. ValueError too if the last alpha_bar is
    above 0.02, unless allow_signal is True.
    """
    betas = np.asarray(betas, dtype=np.float64)
    _check_betas(betas)
    # alpha_bar_t = prod_{i <= t} (1 - beta_i)                                                     DDPM eq. 4
    alpha_bar = np.cumprod(1.0 - betas)
    stuck = np.flatnonzero(alpha_bar[1:] >= alpha_bar[:-1])  # by underflow: each beta is large enough to matter
    if stuck.size:
        raise ValueError(f"betas must leave signal until the last time, but are so large that alpha_bar underflows at "
                         f"t = {stuck[0]} (if they are alphas, pass 1 - alpha)")
    near = _stuck(alpha_bar) + 1
    if near.size:
        raise ValueError(f"betas must change alpha_bar by more than rounding, got betas[{near[0]}] = {betas[near[0]]}")
    return _reaching_noise(Schedule(alpha_bar, name), allow_signal)


def linear(
    T: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02, *, allow_signal: bool = False
) -> Schedule:
    """beta rises linearly (DDPM section 4). The defaults are for T = 1000; fewer steps need larger betas."""
    T = whole("T", T, 1)
    return from_betas(np.linspace(beta_min, beta_max, T), "linear", allow_signal=allow_signal)


def scaled_linear(
    T: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012, *, allow_signal: bool = False
) -> Schedule:
    """sqrt(beta) rises linearly (LDM's program, Zero SNR table 1; the defaults are those of Stable Diffusion)."""
    T = whole("T", T, 1)
    _check_not_negative(beta_min=beta_min, beta_max=beta_max)
    # beta_t = (sqrt(beta_min) + t/(T-1) (sqrt(beta_max) - sqrt(beta_min)))^2
    betas = np.linspace(beta_min**0.5, beta_max**0.5, T) ** 2
    return from_betas(betas, "scaled_linear", allow_signal=allow_signal)


def cosine(
    T: int = 1000, offset: float = 0.008, beta_max: float = 0.999, *, allow_signal: bool = False
) -> Schedule:
    """alpha_bar falls as a squared cosine (Improved DDPM eq. 17).

    The offset (s in the paper) keeps the first betas from vanishing; beta is at most beta_max, so that alpha_bar_T
    stays above 0.
    """
    T = whole("T", T, 1)
    u = np.arange(T + 1) / T  # u = 0 is the clean image, so time t stands at u = (t + 1) / T
    # f(u) = cos((u + offset)/(1 + offset) pi/2)^2,   alpha_bar = f(u) / f(0)
    f = np.cos((u + offset) / (1.0 + offset) * np.pi / 2) ** 2
    # beta_t = min(1 - alpha_bar_t / alpha_bar_{t-1}, beta_max)
    betas = np.minimum(1.0 - f[1:] / f[:-1], beta_max)
    return from_betas(betas, "cosine", allow_signal=allow_signal)


def even_loss(T: int = 1000) -> Schedule:
    """beta_t = 1/(T - t): each step takes the same 1/T of the signal's power (DPM section 2.4.1).

    alpha_bar_t = 1 - (t + 1)/T ends at 0, where only x0- and v-prediction are possible.
    """
    T = whole("T", T, 1)
    # beta_t = (T - t + 1)^-1 where t counts 1..T
    return from_betas(1.0 / (T - np.arange(T)), "even_loss")


# ---- from a continuous log-SNR ---------------------------------------------------------------------------


def from_log_snr(
    log_snr: Callable[[np.ndarray], np.ndarray], T: int, name: str = "log_snr", *, allow_signal: bool = False
) -> Schedule:
    """The table of a continuous-time schedule, read at u = (t + 1)/T.

    log_snr maps an array of u in (0, 1] to log(alpha^2/sigma^2), strictly falling. It is not evaluated at u = 0, the
    clean image, where it may be infinite; -inf at u = 1 is zero terminal SNR.
    """
    T = whole("T", T, 1)
    table = np.asarray(log_snr((np.arange(T) + 1) / T), dtype=np.float64)
    if table.shape != (T,):
        raise ValueError(f"log_snr must map an array ({T},) to an array ({T},), got shape {table.shape}")
    return _reaching_noise(Schedule(_sigmoid(table), name), allow_signal)


def log_snr_linear(
    T: int = 1000, log_snr_max: float = 10.0, log_snr_min: float = -10.0, *, allow_signal: bool = False
) -> Schedule:
    """log-SNR falls linearly, from log_snr_max at t = 0 to log_snr_min at t = T-1 (VDM, a linear gamma)."""
    T = whole("T", T, 2)
    # alpha_bar = sigmoid(log-SNR),   sigma^2 = sigmoid(-log-SNR)                               VDM eq. 3, 4
    table = _sigmoid(np.linspace(log_snr_max, log_snr_min, T))
    return _reaching_noise(Schedule(table, "log_snr_linear"), allow_signal)


def vp_sde(
    T: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0, *, allow_signal: bool = False
) -> Schedule:
    """The limit of `linear` for many small steps (Score SDE eq. 33); beta is a rate, per unit of u."""

    def log_snr(u: np.ndarray) -> np.ndarray:
        # log alpha^2 = -u^2 (beta_max - beta_min)/2 - u beta_min,   sigma^2 = 1 - alpha^2
        log_abar = -(u**2) * (beta_max - beta_min) / 2 - u * beta_min
        return log_abar - np.log(-np.expm1(log_abar))

    return from_log_snr(log_snr, T, "vp_sde", allow_signal=allow_signal)


def flow_matching(T: int = 1000, shift: float = 1.0) -> Schedule:
    """The straight path (1-u) x_0 + u eps, divided by sqrt((1-u)^2 + u^2) (Flow matching eq. 20, reversed).

    Scaling x_t does not change its SNR, so the path is this schedule: 1 - u = alpha/(alpha + sigma). It ends at
    SNR 0, where only x0- and v-prediction are possible. shift > 0: divides alpha/sigma at every time, for pictures with
    shift^2 times as many pixels (rectified_flow.py).
    """
    if not 0.0 < shift < math.inf:
        raise ValueError(f"shift must be a positive number, got {shift}")

    def log_snr(u: np.ndarray) -> np.ndarray:
        # SNR = (1 - u)^2 / (shift u)^2
        with np.errstate(divide="ignore"):
            return 2.0 * (np.log(1.0 - u) - np.log(u) - math.log(shift))

    return from_log_snr(log_snr, T, "flow_matching")


# ---- schedules from schedules ----------------------------------------------------------------------------


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """Shifts and scales alpha_t so that the last is 0 and the first is unchanged (Zero SNR, algorithm 1).

    The last time is then pure noise, where eps does not determine x_0: predict v or x0. T must be at least 2.
    """
    whole("schedule.T", schedule.T, 2)
    alpha = np.sqrt(schedule.alpha_bar)  # (T,)
    # alpha_t <- (alpha_t - alpha_{T-1}) alpha_0 / (alpha_0 - alpha_{T-1})
    alpha_bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    alpha_bar[0] = schedule.alpha_bar[0]  # to the last bit
    return Schedule(alpha_bar, f"{schedule.name}, zero terminal SNR")


def respaced(schedule: Schedule, times: np.ndarray) -> Schedule:
    """The same process at fewer times; its betas are those of the longer steps (Improved DDPM eq. 19).

    times: distinct integers in 0..T-1, in any order; row i of the new table is the i-th smallest. A network that was
    trained on `schedule` still takes the old times, times[i], not i.
    """
    times = np.sort(np.atleast_1d(_checked_times(times, 0, schedule.T - 1)))
    if times.ndim != 1 or times.size == 0 or np.any(np.diff(times) == 0):
        raise ValueError(f"times must be a non-empty list of distinct integers, got {_brief(times)}")
    return Schedule(schedule.abar(times), f"{schedule.name}, {len(times)} of {schedule.T} times")


# ---- schedules by name -----------------------------------------------------------------------------------
# An entry is a function (T=1000, parameter=default, ...) -> Schedule, where each parameter is a number. A command line
# and a model's configuration name a schedule by one text: "cosine", or "cosine:offset=0.01,beta_max=0.99".

SCHEDULES: Registry[Callable[..., Schedule]] = Registry("schedule", "minidiff.schedules")
for _entry in (linear, scaled_linear, cosine, log_snr_linear, vp_sde, flow_matching, even_loss):
    SCHEDULES.register(_entry.__name__, _entry)


def schedule_from(text: str, T: int | None = None, *, allow_signal: bool = False) -> Schedule:
    """The schedule that NAME[:key=value,...] names, with T times, else as many as its function has by default.

    UserError, in one sentence, if the text is wrong, the schedule cannot be made, or it ends above an alpha_bar of
    0.02 without allow_signal.
    """
    name, parameters = parse_schedule(text)
    function = SCHEDULES[name]
    if allow_signal and "allow_signal" in inspect.signature(function).parameters:
        parameters["allow_signal"] = True
    try:
        with np.errstate(all="ignore"):  # overflow leaves a table that is refused
            schedule = function(**parameters) if T is None else function(T, **parameters)
        if not isinstance(schedule, Schedule):
            raise TypeError(f"its function must return a Schedule, got {type(schedule).__name__}")
        return _reaching_noise(Schedule(schedule.alpha_bar, text), allow_signal)
    except (ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise UserError(f"schedule {text!r}: {error}") from error


def parse_schedule(text: str) -> tuple[str, dict[str, float]]:
    """The name and the parameters in NAME[:key=value,...]; UserError, in one sentence, if they are wrong."""
    return named.parse(SCHEDULES, text)


def check_schedule(text: str) -> None:
    """UserError unless the text names a registered schedule with parameters that it takes; it is not made."""
    parse_schedule(text)


def schedule_parameters(name: str) -> dict[str, float]:
    """The parameters of a registered schedule and their defaults, from its function's signature."""
    return named.parameters(SCHEDULES, name)


# ---- checks ----------------------------------------------------------------------------------------------


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))  # 1 / (1 + e^-x), without overflow


def _check_betas(betas: np.ndarray) -> None:
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a non-empty (T,) array, got shape {betas.shape}")
    inside = (0.0 < betas) & (betas < 1.0)  # NaN is outside, too
    inside[-1] |= betas[-1] == 1.0  # zero terminal SNR
    if not inside.all():
        t = np.flatnonzero(~inside)[0]
        raise ValueError(f"betas must lie in (0, 1), where only the last may be 1, got betas[{t}] = {betas[t]}")
    lost = np.flatnonzero(np.abs((1.0 - (1.0 - betas)) - betas) > 0.01 * betas)
    if lost.size:
        t = lost[0]
        raise ValueError(f"betas must change alpha_bar: betas[{t}] = {betas[t]} is lost in rounding, since "
                         f"1 - beta is {1.0 - betas[t]:.17g}")


def _check_table(alpha_bar: np.ndarray) -> None:
    if alpha_bar.ndim != 1 or alpha_bar.size == 0:
        raise ValueError(f"alpha_bar must be a non-empty (T,) array, got shape {alpha_bar.shape}")
    outside = np.flatnonzero(~((alpha_bar >= 0.0) & (alpha_bar < 1.0)))  # NaN is outside, too
    if outside.size:
        t = outside[0]
        raise ValueError(f"alpha_bar must lie in [0, 1), got alpha_bar[{t}] = {alpha_bar[t]}")
    rising = np.flatnonzero(np.diff(alpha_bar) >= 0.0)
    if rising.size:
        t = rising[0]
        raise ValueError(
            f"alpha_bar must strictly decrease, got alpha_bar[{t}] = {alpha_bar[t]} "
            f"and alpha_bar[{t + 1}] = {alpha_bar[t + 1]}"
        )
    near = _stuck(alpha_bar)
    if near.size:
        t = near[0]
        raise ValueError(f"alpha_bar must decrease by more than rounding, got alpha_bar[{t}] = {alpha_bar[t]} and "
                         f"alpha_bar[{t + 1}] = {alpha_bar[t + 1]}")


def _stuck(alpha_bar: np.ndarray) -> np.ndarray:
    """The times at which log-SNR does not fall by more than rounding."""
    return np.flatnonzero(np.diff(_log_snr(alpha_bar)) > -LEAST_STEP)


def _log_snr(abar: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(abar) - np.log1p(-abar)


def _reaching_noise(schedule: Schedule, allow_signal: bool) -> Schedule:
    if not (schedule.reaches_noise or allow_signal):
        raise ValueError(
            f"the {schedule.name} schedule with T = {schedule.T} must end in noise, at an alpha_bar of at "
            f"most {MOST_SIGNAL_AT_THE_END}, but ends at {schedule.alpha_bar[-1]:.3g}: use more steps, or larger "
            f"betas (in proportion to 1000/T), or allow_signal=True"
        )
    return schedule


def _checked_times(t: int | np.ndarray, first: int, last: int) -> int | np.ndarray:
    """t as it is or as int64 on the host; TypeError or IndexError for anything else."""
    if type(t) is int and first <= t <= last:               # as a sampler's are: ten times faster
        return t
    t = np.asarray(to_numpy(t))
    if t.size and not np.issubdtype(t.dtype, np.integer):
        raise TypeError(f"t must be an integer or an integer array, got dtype {t.dtype}")
    t = t.astype(np.int64)  # a small dtype would overflow in t + 1
    if t.size and not (first <= t.min() and t.max() <= last):
        wrong = t[(t < first) | (t > last)].flat[0]
        raise IndexError(f"t must lie in {first}..{last}, got {wrong}")
    return t


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _brief(a: np.ndarray) -> str:
    return np.array2string(a, threshold=8)
