"""Exercise 16: CLIP's loss, judged by cases with a closed form, by a sum over pairs, and by extreme scales."""

import math

import numpy as np

from minidiff.course.compare import differs, stream
from minidiff.course.exercise import Exercise, Wrong
from minidiff.engine.tensor import Tensor
from minidiff.text import clip


def solution(image, text, log_scale):
    return clip.clip_loss(Tensor(image), Tensor(text), Tensor(np.array(log_scale))).item()


# ---- laws --------------------------------------------------------------------------------------------------

def orthonormal_pairs(clip_loss):
    """N orthonormal pairs that agree give log(1 + (N - 1) e^-scale)"""
    rng = stream(16, 1)
    for N in (1, 2, 5, 16):
        axes, _ = np.linalg.qr(rng.standard_normal((N, N)))
        for log_scale in (0.0, 1.0, 2.5):
            expected = math.log1p((N - 1) * math.exp(-math.exp(log_scale)))
            said = differs("the loss + 1", 1 + clip_loss(axes, axes.copy(), log_scale), 1 + expected,
                           f"for N = {N} and log_scale = {log_scale}")
            if said:
                return said


def no_information(clip_loss):
    """embeddings that are all equal give log N, whatever the scale is"""
    for N, D in ((2, 3), (7, 4)):
        row = stream(16, 2).standard_normal(D)
        for log_scale in (0.0, 3.0):
            got = clip_loss(np.tile(row, (N, 1)), np.tile(row, (N, 1)), log_scale)
            if (said := differs("the loss", got, math.log(N), f"for {N} equal rows and log_scale = {log_scale}")):
                return said


def pair_by_pair(clip_loss):
    """it is the mean over all 2N questions of log(sum over candidates of e^(scale (cos - cos of the right one)))"""
    rng = stream(16, 3)
    for N, D in ((2, 2), (3, 5), (6, 4)):
        image, text = 3 * rng.standard_normal((N, D)), 0.2 * rng.standard_normal((N, D))
        log_scale = float(rng.uniform(0, 2))

        def cosine(i, j, image=image, text=text):
            return math.fsum(image[i] * text[j]) / math.sqrt(math.fsum(image[i] ** 2) * math.fsum(text[j] ** 2))
        scale, total = math.exp(log_scale), 0.0
        for i in range(N):
            total += math.log(math.fsum(math.exp(scale * (cosine(i, j) - cosine(i, i))) for j in range(N)))
            total += math.log(math.fsum(math.exp(scale * (cosine(j, i) - cosine(i, i))) for j in range(N)))
        if (said := differs("the loss", clip_loss(image, text, log_scale), total / (2 * N),
                            f"for random embeddings ({N}, {D}) and log_scale = {log_scale:.4g}")):
            return said


def both_ways(clip_loss):
    """pictures and captions may change places, and so may the pairs"""
    image, text = stream(16, 4).standard_normal((2, 5, 3))
    one = clip_loss(image, text, 1.0)
    return differs("the loss of (text, image)", clip_loss(text, image, 1.0), one, "against that of (image, text)") \
        or differs("the loss of the reversed batch", clip_loss(image[::-1].copy(), text[::-1].copy(), 1.0), one,
                   "against that of the batch")


def extreme_scales(clip_loss):
    """it is finite at any scale: two pairs that point away from their partners cost 2 scale"""
    image = np.array([[1.0, 0.0], [-1.0, 0.0]])
    for log_scale in (math.log(100), math.log(1000), math.log(1e5)):
        if (said := differs("the loss", clip_loss(image, -image, log_scale), 2 * math.exp(log_scale),
                            f"for log_scale = {log_scale:.4g}", tolerance=1e-6)):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _unit(x):
    return x / np.sqrt((x**2).sum(axis=1, keepdims=True))


def _cross_entropy(logits):
    logits = logits - logits.max(axis=1, keepdims=True)
    return -(np.diagonal(logits) - np.log(np.exp(logits).sum(axis=1)))


def _loss(logits, reduce=np.mean):
    return float((reduce(_cross_entropy(logits)) + reduce(_cross_entropy(logits.T))) / 2)


def _not_normalised(image, text, log_scale):
    return _loss(math.exp(log_scale) * image @ text.T)


def _one_way(image, text, log_scale):
    return float(_cross_entropy(math.exp(log_scale) * _unit(image) @ _unit(text).T).mean())


def _other_way(image, text, log_scale):
    return float(_cross_entropy(math.exp(log_scale) * _unit(text) @ _unit(image).T).mean())


def _scale_of_the_logarithm(image, text, log_scale):
    return _loss(log_scale * _unit(image) @ _unit(text).T)


def _temperature(image, text, log_scale):
    return _loss(math.exp(-log_scale) * _unit(image) @ _unit(text).T)


def _sum_of_rows(image, text, log_scale):
    return _loss(math.exp(log_scale) * _unit(image) @ _unit(text).T, np.sum)


def _not_halved(image, text, log_scale):
    return 2 * solution(image, text, log_scale)


def _sign(image, text, log_scale):
    return -solution(image, text, log_scale)


def _without_the_right_one(image, text, log_scale):
    logits = math.exp(log_scale) * _unit(image) @ _unit(text).T
    others = np.where(np.eye(len(logits), dtype=bool), -np.inf, logits)

    def part(z, others):
        return np.log(np.exp(others).sum(axis=1)) - np.diagonal(z)
    return float((part(logits, others).mean() + part(logits.T, others.T).mean()) / 2)


def _overflows(image, text, log_scale):
    logits = math.exp(log_scale) * _unit(image) @ _unit(text).T
    e = np.exp(logits)
    return float(-(np.log(np.diagonal(e) / e.sum(1)).mean() + np.log(np.diagonal(e) / e.sum(0)).mean()) / 2)


def _columns_normalised(image, text, log_scale):
    image, text = (x / np.sqrt((x**2).sum(axis=0, keepdims=True)) for x in (image, text))
    return _loss(math.exp(log_scale) * image @ text.T)


def probe(clip_loss):
    image, text = stream(16).standard_normal((2, 4, 3))
    far = np.array([[1.0, 0.0], [-1.0, 0.0]])
    return [clip_loss(image, 2 * text, log_scale) for log_scale in (0.5, 2.0)] + [clip_loss(far, -far, math.log(1000))]


EXERCISE = Exercise(
    title="CLIP's loss", answer="clip_loss", minutes=20, chapter="06_text",
    hint="-log(e^{z_ii} / sum_j e^{z_ij}) = log(sum_j e^{z_ij}) - z_ii. Write a function of logits for one "
         "direction, and call it with logits and with logits.T.",
    solution=solution, place="minidiff/text/clip.py clip_loss",
    laws=(orthonormal_pairs, no_information, pair_by_pair, both_ways, extreme_scales), probe=probe,
    wrong=(
        Wrong(_not_normalised, "the rows are not divided by their lengths: a cosine needs unit vectors"),
        Wrong(_columns_normalised, "the columns are divided by their lengths: each row is one embedding"),
        Wrong(_one_way, "only pictures are asked for their captions: captions must be asked for their pictures, too"),
        Wrong(_other_way, "only captions are asked for their pictures: pictures must be asked for their captions, "
                          "too"),
        Wrong(_scale_of_the_logarithm, "the cosines are multiplied by log_scale: the factor is exp(log_scale)"),
        Wrong(_temperature, "the cosines are divided by exp(log_scale): it is the factor, one over the temperature"),
        Wrong(_sum_of_rows, "it sums over the rows: the loss is the mean"),
        Wrong(_not_halved, "it adds the two directions: the loss is half of their sum"),
        Wrong(_sign, "the sign is wrong: a cross-entropy is -log of the right one's share, and is at least 0"),
        Wrong(_without_the_right_one, "the sum below leaves out the right one: it goes over all N candidates"),
        Wrong(_overflows, "exp overflows at large scales: subtract the largest logit of each row first"),
    ))
