"""The laws of the reverse chain: each planted bug breaks its law."""

import pytest
from support.verifying import broken, with_factor

from minidiff import verify
from minidiff.diffusion import gaussian, losses, schedules
from minidiff.diffusion.exact import GaussianDenoiser


def posterior_with_beta(original):
    def wrong(schedule, x_0, x_t, t, s=None):               # beta in place of beta~: noise even at the first step
        mean, _ = original(schedule, x_0, x_t, t, s)
        return mean, gaussian.per_sample(schedule.betas[t], x_t)
    return wrong


def posterior_with_swapped_coefficients(original):
    return lambda schedule, x_0, x_t, t, s=None: (original(schedule, x_t, x_0, t, s)[0],
                                                  original(schedule, x_0, x_t, t, s)[1])


PLANTED = {
    "a posterior of variance beta": ("9 first step", gaussian, "q_posterior_mean_variance", posterior_with_beta),
    "beta for beta~, seen by its precision": ("9 posterior", gaussian, "q_posterior_mean_variance",
                                              posterior_with_beta),
    "beta for beta~, seen by Bayes": ("8 Bayes pointwise", gaussian, "q_posterior_mean_variance",
                                      posterior_with_swapped_coefficients),
    "beta for beta~, seen by the reverse variance": ("16 reverse variance", gaussian, "q_posterior_mean_variance",
                                                     posterior_with_swapped_coefficients),
    "x0_from_eps that forgets alpha": ("10 round trips", gaussian, "x0_from_eps",
                                       lambda s, x_t, t, eps: x_t - gaussian.per_sample(s.sigma(t), x_t) * eps),
    "v with its sign reversed": ("10 round trips", gaussian, "v_from_x0_eps",
                                 with_factor(gaussian, "v_from_x0_eps", -1)),
    "a score without its minus": ("11 Tweedie", gaussian, "x0_from_score",
                                  lambda s, x, t, score, original=gaussian.x0_from_score: original(s, x, t, -score)),
    "a denoiser that shrinks too much": ("12 best denoiser", GaussianDenoiser, "__call__",
                                         with_factor(GaussianDenoiser, "__call__", 0.999)),
    "a v-target without alpha": ("15 loss floors", gaussian, "target",
                                 lambda s, predicts, x_0, eps, t, original=gaussian.target:
                                 eps - x_0 if predicts == "v" else original(s, predicts, x_0, eps, t)),
    "a bound without its half": ("18 bound weights", losses, "bound_weight", with_factor(losses, "bound_weight", 2)),
    "a KL the wrong way round": ("19 tight bound", gaussian, "kl_gaussian",
                                 lambda m1, v1, m2, v2, original=gaussian.kl_gaussian: original(m2, v2, m1, v1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("law, module, name, bug", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_bug_of_the_reverse_chain_breaks_its_law(law, module, name, bug, monkeypatch):
    if bug in (posterior_with_beta, posterior_with_swapped_coefficients):
        bug = bug(getattr(module, name))
    monkeypatch.setattr(module, name, bug)
    report = verify.report(schedules.cosine(60))
    assert law in broken(report), verify.table(report)
