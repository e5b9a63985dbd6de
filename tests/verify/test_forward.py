"""The laws of the forward chain: each planted bug breaks its law, and chance alone breaks none."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.verifying import NOISE, broken, with_factor

from minidiff import verify
from minidiff.diffusion import gaussian, schedules
from minidiff.diffusion.schedules import Schedule
from minidiff.verify import forward, rows, watch


def q_sample_without_root(schedule, x_0, t, eps):
    abar = gaussian.per_sample(schedule.abar(t), x_0)
    return np.sqrt(abar) * x_0 + (1 - abar) * eps           # labml #152


def mean_of_the_time_before(schedule, x_0, t):
    before = np.maximum(np.asarray(t) - 1, 0)
    return gaussian.per_sample(schedule.alpha(before), x_0) * x_0, gaussian.per_sample(1 - schedule.abar(t), x_0)


def variance_of_the_time_before(schedule, x_0, t):
    before = np.maximum(np.asarray(t) - 1, 0)
    return gaussian.per_sample(schedule.alpha(t), x_0) * x_0, gaussian.per_sample(1 - schedule.abar(before), x_0)


PLANTED = {
    "q_sample with 1 - abar for its root": ("1 composition", gaussian, "q_sample", q_sample_without_root),
    "the mean one step late": ("1 composition", gaussian, "q_mean_variance", mean_of_the_time_before),
    "the variance one step late": ("1 simulation", gaussian, "q_mean_variance", variance_of_the_time_before),
    "a mean of the wrong sign": ("1 composition", gaussian, "q_mean_variance",
                                 lambda s, x, t, original=gaussian.q_mean_variance: (-original(s, x, t)[0],
                                                                                     original(s, x, t)[1])),
    "a jump that forgets where it starts": ("2 any two times", gaussian, "q_step",
                                            lambda schedule, s, t: (schedule.alpha(t), 1 - schedule.abar(t))),
    "a log of base 10": ("3 SNR falls", Schedule, "log_snr", with_factor(Schedule, "log_snr", 1 / math.log(10))),
    "an SNR that is squared": ("3 SNR falls", Schedule, "snr",
                               lambda self, t, original=Schedule.snr: original(self, t) ** 2),
    "an SNR that rises": ("3 SNR falls", Schedule, "snr", with_factor(Schedule, "snr", -1)),
    "a prior KL in bits": ("4 prior KL", gaussian, "prior_kl", with_factor(gaussian, "prior_kl", 1 / math.log(2))),
}


@pytest.mark.slow
@pytest.mark.parametrize("law, module, name, bug", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_bug_of_the_forward_chain_breaks_its_law(law, module, name, bug, monkeypatch):
    monkeypatch.setattr(module, name, bug)
    report = verify.report(schedules.cosine(60))
    assert law in broken(report), verify.table(report)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.lists(st.floats(1e-8, 1 - 1e-6), min_size=1, max_size=30), st.booleans())
def test_any_betas_give_the_table_of_their_product(betas, to_the_end):
    all_betas = [*betas, 1.0] if to_the_end else betas
    schedule = schedules.from_betas(all_betas, allow_signal=True)
    assert broken(verify.report(schedule, betas=all_betas)) <= {NOISE}
    # the last alpha_bar above 0, however small, has a relative error of 1e-9
    wrong = schedule.alpha_bar * (1 - 1e-9 * (np.arange(schedule.T) == len(betas) - 1))
    assert "1 given betas" in broken(verify.report(Schedule(wrong), betas=all_betas))
    with pytest.raises(ValueError, match=rf"betas must be \({schedule.T},\) numbers"):
        verify.report(schedule, betas=[*all_betas, 0.5])


def test_an_alpha_bar_that_is_almost_0_is_compared_by_its_own_size():
    betas = np.full(400, 0.1)                               # alpha_bar falls to 0.9^400 = 5e-19
    schedule = schedules.from_betas(betas, allow_signal=True)
    assert "1 given betas" not in broken(verify.report(schedule, betas=betas))
    wrong = schedule.alpha_bar.copy()
    wrong[-1] *= 0.99                                       # less than 1e-20 away
    assert "1 given betas" in broken(verify.report(Schedule(wrong), betas=betas))


def test_eps_accepted_at_snr_0_breaks_law_5(monkeypatch):
    monkeypatch.setattr(gaussian, "_refuse_no_signal", lambda *a: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # of the division by zero that this lets through
        assert "5 zero terminal SNR" in broken(verify.report(schedules.flow_matching(50)))


def test_wrong_betas_break_the_laws_of_single_steps(monkeypatch):
    """A table whose betas are not those of its alpha_bar."""
    monkeypatch.setattr(Schedule, "betas", property(lambda self: np.full(self.T, 0.05)))
    assert {"1 composition", "1 simulation", "2 any two times"} <= broken(verify.report(schedules.cosine(60)))


@pytest.mark.parametrize("n, signal, noise", [(3, 0.0, 1.0), (50, 2.0, 0.5), (2000, 0.0, 0.3), (10_000, 0.7, 1.0)])
def test_the_bound_on_a_variance_holds_and_is_tight(n, signal, noise):
    """Against scipy's noncentral chi squared: at most e^-17.4 on each side, and at most 2.5 times as wide as needed."""
    k, shift = n - 1, (n - 1) * signal / noise
    X = stats.ncx2(k, shift) if shift else stats.chi2(k)
    bound = forward.variance_bound(signal, noise, n)
    above, below = (signal + noise + bound) * k / noise, (signal + noise - bound) * k / noise
    assert X.sf(above) <= math.exp(-17.4) and X.cdf(below) <= math.exp(-17.4)
    needed = X.isf(math.exp(-17.4)) * noise / k - signal - noise
    assert bound < 2.5 * needed
    assert 2 * stats.norm.sf(forward.MEAN_SIGMAS) < 2.2e-8


def test_the_default_seed_draws_no_rare_number(monkeypatch):
    """In the report and the plot of the README, no mean or variance is beyond 3 standard errors."""
    schedule, drawn = schedules.cosine(), []
    def noted(schedule, x_0, count, t, rng, original=forward.simulate):
        mean, variance = original(schedule, x_0, count, t, rng)
        expected, v = gaussian.q_mean_variance(schedule, np.full(len(t), x_0), np.asarray(t))
        drawn.append(np.abs([(mean - expected) / np.sqrt(v / count), (variance / v - 1) / math.sqrt(2 / (count - 1))]))
        return mean, variance
    monkeypatch.setattr(forward, "chains", lambda T: 20_000)
    monkeypatch.setattr(watch, "chains", lambda T: 20_000)
    monkeypatch.setattr(forward, "simulate", noted)
    monkeypatch.setattr(watch, "simulate", noted)
    monkeypatch.setattr(verify, "LAWS", [law if law.name == "1 simulation" else rows.Law(law.name, lambda *_: [])
                                         for law in verify.LAWS])
    assert len(verify.report(schedule)) == 2
    watch.plot(schedule)
    assert [a.shape for a in drawn] == [(2, 8), (2, 25)] and max(a.max() for a in drawn) < 3
