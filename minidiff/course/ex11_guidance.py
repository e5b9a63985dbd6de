"""Exercise 11: classifier-free guidance, judged by the density that it samples from.

A score is -eps / sigma.  So the guided one is that of p(x)^(1 - scale) p(x | y)^scale, whose slope is measured here.
"""

import numpy as np

from minidiff.course.compare import differs, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.diffusion.guidance import ClassifierFree
from minidiff.diffusion.schedules import Schedule


class _Given:
    """A denoiser that gives both predictions, for the doubled batch or for one half of it."""

    predicts, schedule = "x0", Schedule([0.5])

    def __init__(self, uncond, cond):
        self.answers = {False: uncond, True: cond}

    def __call__(self, x_t, t, cond=None):
        has = cond[0]
        return np.concatenate([self.answers[False], self.answers[True]]) if len(set(has)) == 2 else self.answers[has[0]]


def solution(eps_uncond, eps_cond, scale):
    shape, one = eps_uncond.shape, np.zeros((1, 1))
    if not eps_uncond.size:
        return eps_uncond
    denoiser = _Given(eps_uncond[None], eps_cond[None])
    guidance = ClassifierFree(denoiser, scale, (np.array([False]),))
    return guidance(one, np.zeros(1, int), (np.array([True]),)).reshape(shape)


# ---- laws --------------------------------------------------------------------------------------------------

def slope_of_the_density(guided):
    """it is the slope of -sigma log(p(x)^(1 - scale) p(x | y)^scale): here of two Gaussians, by central differences"""
    rng = stream(11, 1)
    for scale in (0.5, 1.0, 3.0, 7.5, -1.0):
        m, n, V, W, sigma = rng.standard_normal(), rng.standard_normal(), *rng.uniform(0.5, 2, 3)
        x, h = rng.standard_normal((2, 3)), 1e-4

        def log_density(x, m=m, n=n, V=V, W=W, scale=scale):
            return (1 - scale) * -(x - m) ** 2 / (2 * V) + scale * -(x - n) ** 2 / (2 * W)
        expected = -sigma * (log_density(x + h) - log_density(x - h)) / (2 * h)
        got = guided(sigma * (x - m) / V, sigma * (x - n) / W, scale)
        where = f"for scale = {scale}, p = N({m:.3g}, {V:.3g}) and p(.|y) = N({n:.3g}, {W:.3g})"
        if (said := differs("eps", got, expected, where, tolerance=1e-6)):
            return said


def ends(guided):
    """scale 0 gives the prediction without the caption, and scale 1 the one with it"""
    rng = stream(11, 2)
    for shape in ((2, 3, 3, 1), (4,)):
        uncond, cond = rng.standard_normal((2, *shape))
        for scale, expected in ((0.0, uncond), (1.0, cond)):
            if (said := differs("eps", guided(uncond, cond, scale), expected, f"for scale = {scale}")):
                return said


def agreement(guided):
    """where both predictions agree, no scale changes them"""
    eps = stream(11, 3).standard_normal((3, 2))
    for scale in (0.0, 0.3, 2.0, 100.0):
        if (said := differs("eps", guided(eps, eps.copy(), scale), eps, f"for equal predictions and scale = {scale}")):
            return said


def keeps_the_dtype(guided):
    """the result has the dtype of the predictions"""
    uncond, cond = stream(11, 4).standard_normal((2, 3, 2)).astype(np.float32)
    return differs("eps", guided(uncond, cond, 2.0), 2 * cond.astype(float) - uncond, "for scale = 2", dtype=np.float32)


# ---- known wrong answers -----------------------------------------------------------------------------------

def _one_plus_w(eps_uncond, eps_cond, scale):
    return (1 + scale) * eps_cond - scale * eps_uncond


def _from_the_caption(eps_uncond, eps_cond, scale):
    return eps_cond + scale * (eps_uncond - eps_cond)


def _away_from_the_caption(eps_uncond, eps_cond, scale):
    return eps_uncond + scale * (eps_uncond - eps_cond)


def _no_difference(eps_uncond, eps_cond, scale):
    return eps_uncond + scale * eps_cond


def _only_scaled(eps_uncond, eps_cond, scale):
    return scale * eps_cond


def _only_the_difference(eps_uncond, eps_cond, scale):
    return scale * (eps_cond - eps_uncond)


def _mean(eps_uncond, eps_cond, scale):
    return eps_uncond + (eps_cond - eps_uncond) * scale / (1 + scale)


def probe(guided):
    uncond, cond = stream(11).standard_normal((2, 4))
    return [guided(uncond, cond, scale) for scale in (0.0, 0.25, 1.0, 4.0)]


EXERCISE = Exercise(
    title="Classifier-free guidance", answer="guided", minutes=5, chapter="07_guidance",
    hint="Put 0 and 1 in place of scale, and see that you get the two predictions.",
    solution=solution, place="minidiff/diffusion/guidance.py ClassifierFree",
    laws=(slope_of_the_density, ends, agreement, keeps_the_dtype), probe=probe,
    wrong=(
        Wrong(_one_plus_w, "it counts by w, where 0 already follows the caption: (1 + w) eps_cond - w eps_uncond is "
                           "the same rule with scale = 1 + w"),
        Wrong(_from_the_caption, "the two predictions have changed places: scale 0 must give eps_uncond, and 1 "
                                 "eps_cond"),
        Wrong(_away_from_the_caption, "the sign of the difference is wrong: it goes away from the caption"),
        Wrong(_no_difference, "it adds scale eps_cond in place of scale (eps_cond - eps_uncond)"),
        Wrong(_only_scaled, "eps_uncond is not used"),
        Wrong(_only_the_difference, "it returns the scaled difference alone: add it to eps_uncond"),
        Wrong(_mean, "it takes a weighted mean of both, which never goes further than the caption"),
    ))
