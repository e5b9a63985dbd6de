"""Nothing, one, and the last: each public function without samples, pixels, classes, tokens or steps, and with one.

It gives the empty result of the right shape and dtype, or refuses in one sentence; NumPy's own errors and warnings, of
means over nothing and the like, reach nobody.  Here: arrays, networks' layers and the mathematics of diffusion.
"""

import numpy as np
import pytest
from support.few import NO_TIMES, back, check_gives, check_refuses, rng, shapes, streams, tensor, zeros

from minidiff.diffusion import (
    cascade,
    denoiser,
    editing,
    entropy,
    exact,
    gaussian,
    guidance,
    likelihood,
    losses,
    posterior,
    samplers,
    schedules,
    times,
)
from minidiff.engine import attention, conv, norm, ops, parallel
from minidiff.engine.random import SampleStreams
from minidiff.nn import layers

S, ONE = schedules.cosine(10), schedules.cosine(1)          # ten times, and one
NONE, PIXEL = zeros(0, 2, 2, 1), zeros(1, 1, 1, 1)
KNOWN = np.zeros((0, 2, 2, 1), bool)
IMAGES = ((0, 2, 2, 1), "float32")                          # no images, as a result
DECODER = likelihood.DiscretisedGaussian(0.1)


def exact_ones(schedule, *shape):
    """An exact denoiser of each kind, for data of one sample or component."""
    return {"gaussian": exact.GaussianDenoiser(schedule, zeros(*shape), np.ones(shape)),
            "mixture": exact.MixtureDenoiser(schedule, [1.0], zeros(1, *shape), np.ones(1)),
            "dataset": exact.DatasetDenoiser(schedule, zeros(1, *shape))}


EXACT, EXACT_ONE = exact_ones(S, 2, 2, 1), exact_ones(ONE, 1, 1, 1)
GAUSSIAN = EXACT["gaussian"]
NETWORK = denoiser.NetworkDenoiser(S, "v", lambda x, t, cond: x, network_vjp=lambda x, t, dy, cond: (x, dy))


def drawn(name, denoise, x_T, steps=3):
    entry = samplers.SAMPLERS[name]
    noise = {"streams": streams(len(x_T))} if entry.noise else {}
    return samplers.sample(entry(denoise, x_T, samplers.times(denoise.schedule, steps), **noise))


# --- what there is no sample of has an empty result ---------------------------------------------------------

GIVES = {
    **{f"gaussian.{name}": (lambda name=name: getattr(gaussian, name)(S, NONE, NO_TIMES, NONE), IMAGES) for name in (
        "q_sample", "x0_from_eps", "x0_from_v", "x0_from_score", "eps_from_x0", "eps_from_v", "eps_from_score",
        "v_from_x0", "v_from_x0_eps", "score_from_eps", "score_from_x0")},
    "gaussian.q_mean_variance": (lambda: gaussian.q_mean_variance(S, NONE, NO_TIMES),
                                 (IMAGES, ((0, 1, 1, 1), "float32"))),
    "gaussian.q_posterior_mean_variance": (lambda: gaussian.q_posterior_mean_variance(S, NONE, NONE, NO_TIMES),
                                           (IMAGES, ((0, 1, 1, 1), "float32"))),
    "gaussian.kl_gaussian": (lambda: gaussian.kl_gaussian(NONE, NONE, NONE, NONE), IMAGES),
    "gaussian.prior_kl": (lambda: gaussian.prior_kl(S, NONE.astype(float)), ((0, 2, 2, 1), "float64")),
    "gaussian.target": (lambda: gaussian.target(S, "v", NONE, NONE, NO_TIMES), IMAGES),
    "gaussian.to_x0": (lambda: gaussian.to_x0(S, "v", NONE, NO_TIMES, NONE), IMAGES),
    **{f"schedule.{name}": (lambda name=name: getattr(S, name)(NO_TIMES), ((0,), "float64"))
       for name in ("abar", "alpha", "sigma", "snr", "log_snr", "half_log_snr")},
    **{f"losses.{kind}, T = {s.T}": (lambda kind=kind, s=s: losses.weight(s, NO_TIMES, "v", kind), ((0,), "float64"))
       for kind in losses.LOSS_WEIGHTS for s in (S, ONE)},
    "times.training_times": (lambda: times.training_times(rng(), 0, 10), ((0,), "int64")),
    "times.training_times, T = 1": (lambda: times.training_times(rng(), 3, 1), ((3,), "int64")),
    "times.stratified_uniform": (lambda: times.stratified_uniform(rng(), 0), ((0,), "float64")),

    **{f"exact.{name}": (lambda d=d: d(NONE, NO_TIMES), IMAGES) for name, d in EXACT.items()},
    **{f"exact.{name}.vjp": (lambda d=d: d.vjp(NONE, NO_TIMES, NONE), (IMAGES, IMAGES)) for name, d in EXACT.items()},
    "exact.mixture.score": (lambda: EXACT["mixture"].score(NONE, NO_TIMES), IMAGES),
    "exact.mixture.posterior": (lambda: EXACT["mixture"].posterior(NONE, NO_TIMES), ((0, 1), "float64")),
    "exact.mixture.log_prob": (lambda: EXACT["mixture"].log_prob(NONE, NO_TIMES), ((0,), "float64")),
    "exact.gaussian, no numbers": (lambda: exact.GaussianDenoiser(S, zeros(0), zeros(0, 0))(zeros(3, 0), np.arange(3)),
                                   ((3, 0), "float32")),
    **{f"{sampler}, {name}": (lambda sampler=sampler, d=d: drawn(sampler, d, NONE), IMAGES)
       for sampler in samplers.SAMPLERS for name, d in EXACT.items()},
    **{f"{sampler}, one pixel, T = 1": (lambda sampler=sampler: drawn(sampler, EXACT_ONE["gaussian"], PIXEL, 1),
                                        ((1, 1, 1, 1), "float32")) for sampler in samplers.SAMPLERS},
    "ddim, eta": (lambda: samplers.sample(samplers.ddim(GAUSSIAN, NONE, [9, 3], eta=1, streams=streams(0))), IMAGES),
    "ddim_inverse": (lambda: samplers.sample(samplers.ddim_inverse(GAUSSIAN, NONE, [9, 3])), IMAGES),
    **{f"samplers.times, one {spacing}": (lambda spacing=spacing: samplers.times(S, 1, spacing).tolist(), (9,))
       for spacing in samplers.SPACINGS},
    **{f"samplers.times, T = 1, {spacing}": (lambda spacing=spacing: samplers.times(ONE, 1, spacing).tolist(), (0,))
       for spacing in samplers.SPACINGS},

    "denoiser.static_threshold": (lambda: denoiser.static_threshold(NONE), IMAGES),
    "denoiser.dynamic_threshold": (lambda: denoiser.dynamic_threshold(NONE), IMAGES),
    "denoiser.dynamic_threshold, one pixel": (lambda: denoiser.dynamic_threshold(PIXEL), shapes(PIXEL)),
    "denoiser.dynamic_threshold, no pixels": (lambda: denoiser.dynamic_threshold(zeros(2, 0)), ((2, 0), "float32")),
    "denoiser.NetworkDenoiser": (lambda: NETWORK(NONE, NO_TIMES), IMAGES),
    "denoiser.NetworkDenoiser.vjp": (lambda: NETWORK.vjp(NONE, NO_TIMES, NONE), (IMAGES, IMAGES)),
    "guidance.ClassifierFree": (lambda: guidance.ClassifierFree(NETWORK, 2.0, (zeros(1, 3),))(
        NONE, NO_TIMES, (zeros(0, 3),)), IMAGES),
    "guidance.ClassifierGuidance": (lambda: guidance.ClassifierGuidance(NETWORK, lambda x, t, y: x, 2.0)(
        NONE, NO_TIMES, None), IMAGES),
    "guidance.stack_conditions": (lambda: guidance.stack_conditions((zeros(0, 3),), (zeros(0, 3),)),
                                  (((0, 3), "float32"),)),
    "cascade.resized": (lambda: cascade.resized(NONE, 4), ((0, 4, 4, 1), "float32")),
    "cascade.resized, to one pixel": (lambda: cascade.resized(zeros(3, 4, 4, 1), 1), ((3, 1, 1, 1), "float32")),
    "cascade.resized, from one pixel": (lambda: cascade.resized(PIXEL, 3), ((1, 3, 3, 1), "float32")),
    "cascade.resized, odd": (lambda: cascade.resized(zeros(1, 3, 5, 1), 6), ((1, 6, 10, 1), "float32")),
    "cascade.cascade, nothing finer": (lambda: cascade.cascade(GAUSSIAN, [], [(2, 2, 1)], streams=streams(1), s=0,
                                                               steps=[2]), (((1, 2, 2, 1), "float32"),)),
    "editing.shortened": (lambda: editing.shortened([], 0.5), ()),
    "editing.shortened, strength 0": (lambda: editing.shortened([9, 5], 0.0), ()),
    "editing.inpaint": (lambda: samplers.sample(editing.inpaint(GAUSSIAN, NONE, [9, 3], NONE, KNOWN,
                                                                streams=streams(0))), IMAGES),
    "posterior.Observed": (lambda: samplers.sample(posterior.posterior(
        GAUSSIAN, NONE, [9, 3], posterior.Observed(S, NONE, KNOWN), streams=streams(0))), IMAGES),
    "posterior.reconstruction": (lambda: posterior.reconstruction(GAUSSIAN, NONE, KNOWN)(NONE, NONE, 3),
                                 (IMAGES, IMAGES)),

    "entropy.k_bound": (lambda: entropy.k_bound(S, lambda x, t: (x, x + 1), zeros(0, 2), streams=streams(0)).total,
                        ((0,), "float64")),
    "entropy.k_bound, T = 1": (lambda: entropy.k_bound(ONE, lambda x, t: (x, x + 1), zeros(1, 2),
                                                       streams=streams(1)).total, ((1,), "float64")),
    "likelihood.bits_per_dim": (lambda: likelihood.bits_per_dim(np.zeros(0), 2), ((0,), "float64")),
    "likelihood.DiscretisedGaussian": (lambda: DECODER(NONE, NONE), ((0, 2, 2, 1), "float64")),
    "likelihood.DiscretisedGaussian.slope": (lambda: DECODER.slope(NONE, NONE), ((0, 2, 2, 1), "float64")),
    "likelihood.GaussianDensity": (lambda: likelihood.GaussianDensity(1.0)(NONE, NONE), ((0, 2, 2, 1), "float64")),
    "likelihood.variational_bound": (lambda: likelihood.variational_bound(
        GAUSSIAN, NONE, streams=streams(0), decoder=DECODER).total, ((0,), "float64")),
    "likelihood.variational_bound, some terms": (lambda: likelihood.variational_bound(
        GAUSSIAN, NONE, streams=streams(0), decoder=DECODER, terms=2).total, ((0,), "float64")),
    "likelihood.variational_bound, T = 1": (lambda: likelihood.variational_bound(
        EXACT_ONE["gaussian"], PIXEL - 1, streams=streams(1), decoder=DECODER, terms=1).total, ((1,), "float64")),
    "likelihood.reverse_kl": (lambda: likelihood.reverse_kl(GAUSSIAN, NONE, NO_TIMES, NONE), ((0,), "float64")),
    "likelihood.draw_times": (lambda: likelihood.draw_times(S, 1, np.zeros(0)),
                              ((((0,), "int64"), ((0,), "float64")),)),
    "likelihood.exact_trace": (lambda: likelihood.exact_trace(GAUSSIAN, NONE, NO_TIMES), (IMAGES, ((0,), "float64"))),
    "likelihood.Hutchinson": (lambda: likelihood.Hutchinson.draw(streams(0), NONE)(GAUSSIAN, NONE, NO_TIMES),
                              (IMAGES, ((0,), "float64"))),
    "likelihood.log_prob": (lambda: likelihood.log_prob(GAUSSIAN, NONE, [9, 3]), ((0,), "float64")),
    "likelihood.log_prob, one time": (lambda: likelihood.log_prob(GAUSSIAN, zeros(1, 2, 2, 1), [9]),
                                      ((1,), "float64")),
    "likelihood.flow_bound": (lambda: likelihood.flow_bound(GAUSSIAN, NONE, [9, 3], eps=NONE, decoder=DECODER).total,
                              ((0,), "float64")),
    "likelihood.flow_bound, T = 1": (lambda: likelihood.flow_bound(
        EXACT_ONE["gaussian"], PIXEL - 1, [0], eps=PIXEL, decoder=DECODER).total, ((1,), "float64")),

    "streams.normal": (lambda: streams(0).normal((2, 3)), ((0, 2, 3), "float32")),
    "streams.normal, half": (lambda: streams(0).normal((2,), np.float16), ((0, 2), "float16")),
    "streams.normal, no numbers": (lambda: streams(1).normal((0,)), ((1, 0), "float32")),
    "streams.uniform": (lambda: streams(0).uniform(), ((0,), "float64")),
    "streams.uniform, some": (lambda: streams(0).uniform((2, 3)), ((0, 2, 3), "float64")),
    "parallel.parallel_map": (lambda: list(parallel.parallel_map(str, [])), ()),
    "parallel.shards": (lambda: parallel.shards(0), ()),
    "parallel.shards, one": (lambda: parallel.shards(1), (slice(0, 1),)),
    "parallel.map_batch": (lambda: parallel.map_batch(lambda x: x * 2, NONE), IMAGES),
    "parallel.in_parts": (lambda: parallel.in_parts(str, []), ()),

    "ops.sum": (lambda: back(ops.sum, zeros(0, 3)), (((), "float32"), ((0, 3), "float32"))),
    "ops.mean": (lambda: back(lambda x: ops.mean(x, axis=1), zeros(0, 3)), (((0,), "float32"), ((0, 3), "float32"))),
    "ops.maximum_of": (lambda: back(lambda x: ops.maximum_of(x, axis=1), zeros(0, 3)),
                       (((0,), "float32"), ((0, 3), "float32"))),
    "ops.softmax": (lambda: back(ops.softmax, zeros(0, 3)), (((0, 3), "float32"),) * 2),
    "ops.log_softmax": (lambda: back(ops.log_softmax, zeros(0, 3)), (((0, 3), "float32"),) * 2),
    "ops.matmul, no rows": (lambda: back(ops.matmul, zeros(0, 3), zeros(3, 2)),
                            (((0, 2), "float32"), ((0, 3), "float32"), ((3, 2), "float32"))),
    "ops.matmul, no columns": (lambda: back(ops.matmul, zeros(2, 0), zeros(0, 3)),
                               (((2, 3), "float32"), ((2, 0), "float32"), ((0, 3), "float32"))),
    "ops.linear": (lambda: back(ops.linear, zeros(0, 3), zeros(3, 2), zeros(2)),
                   (((0, 2), "float32"), ((0, 3), "float32"), ((3, 2), "float32"), ((2,), "float32"))),
    "ops.embedding": (lambda: back(lambda table: ops.embedding(table, NO_TIMES), zeros(5, 2)),
                      (((0, 2), "float32"), ((5, 2), "float32"))),
    "ops.cross_entropy, one class": (lambda: ops.cross_entropy(tensor(2, 1), np.zeros(2, int)).item(), 0.0),
    "attention, no samples": (lambda: back(attention.scaled_dot_product_attention, *[zeros(0, 2, 3, 4)] * 3),
                              (((0, 2, 3, 4), "float32"),) * 4),
    "attention, no queries": (lambda: attention.scaled_dot_product_attention(
        tensor(1, 2, 0, 4), tensor(1, 2, 3, 4), tensor(1, 2, 3, 4)), ((1, 2, 0, 4), "float32")),
    "conv.conv2d": (lambda: back(lambda x, w: conv.conv2d(x, w, padding=1), zeros(0, 4, 4, 2), zeros(3, 3, 2, 5)),
                    (((0, 4, 4, 5), "float32"), ((0, 4, 4, 2), "float32"), ((3, 3, 2, 5), "float32"))),
    "conv.conv2d, one pixel": (lambda: back(lambda x, w: conv.conv2d(x, w, padding=1), PIXEL, zeros(3, 3, 1, 1)),
                               (shapes(PIXEL),) * 2 + (((3, 3, 1, 1), "float32"),)),
    "conv.conv_transpose2d": (lambda: conv.conv_transpose2d(tensor(0, 4, 4, 2), tensor(3, 3, 5, 2), padding=1),
                              ((0, 4, 4, 5), "float32")),
    "norm.group_norm": (lambda: back(lambda x, g, b: norm.group_norm(x, 2, g, b), zeros(0, 2, 2, 4), *[zeros(4)] * 2),
                        (((0, 2, 2, 4), "float32"),) * 2 + (((4,), "float32"),) * 2),
    "norm.group_norm, no pixels": (lambda: back(lambda x, g, b: norm.group_norm(x, 2, g, b), zeros(1, 0, 4),
                                                *[zeros(4)] * 2),
                                   (((1, 0, 4), "float32"),) * 2 + (((4,), "float32"),) * 2),
    "norm.layer_norm": (lambda: back(norm.layer_norm, zeros(0, 4), *[zeros(4)] * 2),
                        (((0, 4), "float32"),) * 2 + (((4,), "float32"),) * 2),
    "layers.sinusoidal_embedding": (lambda: layers.sinusoidal_embedding(NO_TIMES, 8), ((0, 8), "float32")),
}


@pytest.mark.parametrize("name", GIVES)
def test_the_empty_result(name):
    check_gives(*GIVES[name])


# --- where there is no result, one sentence says so ---------------------------------------------------------

REFUSES = {
    "no state": (lambda: samplers.sample([]), "states must be at least one"),
    "no time": (lambda: list(samplers.ddim(GAUSSIAN, NONE, [])), "times must be"),
    "no step": (lambda: samplers.times(S, 0), "steps must be"),
    "no betas": (lambda: schedules.from_betas([]), "betas must be a non-empty"),
    "no times to keep": (lambda: schedules.respaced(S, []), "times must be a non-empty"),
    **{f"T = 0, {name}": (lambda name=name: schedules.schedule_from(name, 0), "T must be .*at least")
       for name in schedules.SCHEDULES},
    "the bound's weight at T = 1": (lambda: losses.bound_weight(ONE, 0, "v"), "t must be at least 1"),
    "terms of T = 1": (lambda: likelihood.draw_times(ONE, 1, np.zeros(2)), "schedule.T must be at least 2"),
    "no terms": (lambda: likelihood.variational_bound(GAUSSIAN, NONE, streams=streams(0), decoder=DECODER, terms=0),
                 "terms must be"),
    "no dimension": (lambda: likelihood.bits_per_dim(np.zeros(2), 0), "at least one number"),
    "no dimension, trace": (lambda: likelihood.exact_trace(GAUSSIAN, zeros(2, 0), np.arange(2)), "at least one number"),
    "no probe": (lambda: likelihood.Hutchinson.draw(streams(1), PIXEL, 0), "count must be at least 1"),
    "whole numbers for 8-bit values": (lambda: DECODER(NONE.astype(int), NONE), "x_0 must be 8-bit values"),
    "no component": (lambda: exact.MixtureDenoiser(S, [], zeros(0, 2), []), "weights must be"),
    "no data": (lambda: exact.DatasetDenoiser(S, zeros(0, 2)), "data must be samples"),
    "no entropy in 0 dimensions": (lambda: entropy.gaussian_entropy(1.0, 0), "D must be at least 1"),
    "no level": (lambda: cascade.cascade(GAUSSIAN, [], [], streams=streams(1), s=0, steps=[]),
                 "finer, shapes and steps"),
    "no height": (lambda: cascade.resized(PIXEL, 0), "height must be"),
    "no streams": (lambda: SampleStreams(0, 0), "count must be a whole number of at least 1"),
    "no sample to learn from": (lambda: parallel.parallel_gradients(lambda shard: tensor(), [tensor()], 0),
                                "at least one sample"),
    "no parameter": (lambda: parallel.parallel_gradients(lambda shard: tensor(), [], 3),
                     "at least one sample and one leaf"),
    **{f"ops.{op.__name__} of nothing": (lambda op=op: op(tensor(3, 0), axis=1), "takes at least one element")
       for op in (ops.mean, ops.maximum_of, ops.softmax, ops.log_softmax)},
    "ops.mean of no samples": (lambda: ops.mean(tensor(0, 3)), "takes at least one element"),
    "ops.cross_entropy of no samples": (lambda: ops.cross_entropy(tensor(0, 3), NO_TIMES),
                                      "takes at least one element"),
    "ops.concat of nothing": (lambda: ops.concat([]), "takes at least one Tensor"),
    "conv2d without channels": (lambda: conv.conv2d(tensor(1, 4, 4, 0), tensor(3, 3, 0, 2)), "at least one element"),
    "conv2d without pixels": (lambda: conv.conv2d(tensor(1, 0, 0, 1), tensor(3, 3, 1, 2), padding=1), "is larger than"),
    "layer_norm of no channel": (lambda: norm.layer_norm(tensor(2, 0), tensor(0), tensor(0)), "gamma and beta must be"),
    "Linear of no channel": (lambda: layers.Linear(0, 2, rng()), "C must be at least 1"),
    "Conv2d without a kernel": (lambda: layers.Conv2d(1, 2, rng(), kernel=0), "kernel must be at least 1"),
    "GroupNorm without groups": (lambda: layers.GroupNorm(4, 0), "groups must be at least 1"),
    "LayerNorm of no channel": (lambda: layers.LayerNorm(0), "C must be at least 1"),
    "Embedding of nothing": (lambda: layers.Embedding(0, 2, rng()), "count must be at least 1"),
    "sinusoidal_embedding of no channel": (lambda: layers.sinusoidal_embedding(NO_TIMES, 0), "dim must be even"),
}


@pytest.mark.parametrize("name", REFUSES)
def test_the_refusal(name):
    check_refuses(*REFUSES[name])
