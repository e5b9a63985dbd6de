"""Every op of the engine on small inputs, for tests that apply to all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minidiff.engine import attention, conv, norm, ops


@dataclass(frozen=True)
class Op:
    f: Callable                             # Tensors -> Tensor
    shapes: tuple[tuple[int, ...], ...]     # of its differentiable inputs
    positive: bool = False                  # whether it is defined, or smooth, only for positive numbers

    def inputs(self, dtype=np.float64, seed: int = 0) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        draw = (lambda shape: rng.uniform(0.5, 2, shape)) if self.positive else rng.standard_normal
        return [draw(shape).astype(dtype) for shape in self.shapes]


SOME = np.array([[True, False, True], [False, True, True]])
LABELS = np.array([2, 0, 2])
IDS = np.array([[1, 4, 1], [0, 1, 3]])
LOOK = np.random.default_rng(0).random((2, 1, 3, 5)) < 0.6

EVERY_OP = {
    "cast": Op(lambda x: 1 * ops.cast(ops.cast(x, np.float64), x.dtype), ((2, 3),)),
    "add": Op(ops.add, ((2, 3), (3,))),
    "sub": Op(ops.sub, ((2, 3), (2, 1))),
    "mul": Op(ops.mul, ((2, 3), (1, 3))),
    "div": Op(ops.div, ((3,), (2, 3)), positive=True),
    "power": Op(lambda x: ops.power(x, 2.5), ((2, 3),), positive=True),
    "matmul": Op(ops.matmul, ((2, 3, 4), (4, 2))),
    "linear": Op(ops.linear, ((2, 3, 4), (4, 2), (2,))),
    "plus_linear": Op(ops.plus_linear, ((2, 3, 2), (2, 3, 4), (4, 2), (2,))),
    "matmul, batches": Op(ops.matmul, ((2, 1, 3, 4), (3, 4, 2))),
    "exp": Op(ops.exp, ((2, 3),)),
    "log": Op(ops.log, ((2, 3),), positive=True),
    "expm1": Op(ops.expm1, ((2, 3),)),
    "sqrt": Op(ops.sqrt, ((2, 3),), positive=True),
    "tanh": Op(ops.tanh, ((2, 3),)),
    "sigmoid": Op(ops.sigmoid, ((2, 3),)),
    "log_sigmoid": Op(ops.log_sigmoid, ((2, 3),)),
    "relu": Op(ops.relu, ((2, 3),)),
    "silu": Op(ops.silu, ((2, 3),)),
    "gelu": Op(ops.gelu, ((2, 3),)),
    "gelu_exact": Op(ops.gelu_exact, ((2, 3),)),
    "absolute": Op(ops.absolute, ((2, 3),)),
    "clip": Op(lambda x: ops.clip(x, -0.5, 0.5), ((3, 4),)),
    "where": Op(lambda x, y: ops.where(SOME, x, y), ((2, 3), (3,))),
    "sum": Op(lambda x: ops.sum(x, axis=1), ((2, 3, 2),)),
    "mean": Op(lambda x: ops.mean(x, axis=(0, 2)), ((2, 3, 2),)),
    "maximum_of": Op(lambda x: ops.maximum_of(x, axis=1), ((2, 3, 2),)),
    "reshape": Op(lambda x: ops.reshape(x, (3, 4)), ((2, 3, 2),)),
    "transpose": Op(lambda x: ops.transpose(x, (2, 0, 1)), ((2, 3, 4),)),
    "concat": Op(lambda x, y: ops.concat([x, y], axis=1), ((2, 3), (2, 1))),
    "getitem": Op(lambda x: ops.getitem(x, (slice(None), slice(None, None, -1), 1)), ((2, 3, 4),)),
    "getitem, repeated": Op(lambda x: ops.getitem(x, IDS), ((5, 2),)),
    "embedding": Op(lambda table: ops.embedding(table, IDS), ((5, 2),)),
    "softmax": Op(ops.softmax, ((2, 3),)),
    "log_softmax": Op(ops.log_softmax, ((2, 3),)),
    "cross_entropy": Op(lambda logits: ops.cross_entropy(logits, LABELS), ((3, 4),)),
    "cross_entropy, weighted": Op(
        lambda logits: ops.cross_entropy(logits, IDS, np.array([[1, 0, 3], [0.5, 0, 2]])), ((2, 3, 5),)),
    "dropout": Op(lambda x: ops.dropout(x, 0.3, np.random.default_rng(0)), ((2, 5),)),
    "conv2d": Op(lambda x, w, b: conv.conv2d(x, w, b, padding=1), ((2, 4, 5, 3), (3, 3, 3, 2), (2,))),
    "conv2d, strided": Op(lambda x, w: conv.conv2d(x, w, stride=2), ((1, 5, 4, 2), (2, 3, 2, 3))),
    "conv2d, 1x1": Op(conv.conv2d, ((2, 3, 2, 3), (1, 1, 3, 2))),
    "conv2d, large": Op(lambda x, w, b: conv.conv2d(x, w, b, padding=1), ((1, 10, 10, 1), (3, 3, 1, 2), (2,))),
    "conv_transpose2d": Op(lambda x, w, b: conv.conv_transpose2d(x, w, b, 2, 1), ((2, 3, 2, 3), (4, 4, 2, 3), (2,))),
    "upsampled_conv2d": Op(conv.upsampled_conv2d, ((2, 3, 2, 3), (3, 3, 3, 2), (2,))),
    "upsample_nearest": Op(conv.upsample_nearest, ((2, 2, 3, 2),)),
    "average_pool": Op(conv.average_pool, ((1, 4, 6, 2),)),
    "space_to_depth": Op(conv.space_to_depth, ((1, 4, 6, 2),)),
    "depth_to_space": Op(conv.depth_to_space, ((1, 2, 3, 8),)),
    "group_norm": Op(lambda x, g, b: norm.group_norm(x, 2, g, b), ((2, 3, 3, 4), (4,), (4,))),
    "group_norm, adaptive": Op(lambda x, g, b: norm.group_norm(x, 2, g, b), ((2, 3, 4), (2, 4), (2, 4))),
    "group_norm, a large eps": Op(lambda x, g, b: norm.group_norm(x, 2, g, b, 0.1), ((2, 3, 3, 4), (4,), (4,))),
    "modulated_group_norm": Op(lambda x, m: norm.modulated_group_norm(x, 2, m), ((2, 3, 3, 4), (2, 8))),
    "modulated_group_norm, silu": Op(lambda x, m: norm.modulated_group_norm(x, 2, m, silu=True), ((2, 3, 4), (2, 8))),
    "layer_norm": Op(norm.layer_norm, ((2, 3, 4), (4,), (4,))),
    "scaled_dot_product_attention": Op(attention.scaled_dot_product_attention,
                                       ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3))),
    "scaled_dot_product_attention, masked": Op(
        lambda q, k, v: attention.scaled_dot_product_attention(q, k, v, LOOK),
        ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3))),
    "scaled_dot_product_attention, causal": Op(
        lambda q, k, v: attention.scaled_dot_product_attention(q, k, v, causal=True),
        ((2, 2, 4, 4), (2, 2, 3, 4), (2, 2, 3, 3))),
    "scaled_dot_product_attention, causal and masked": Op(
        lambda q, k, v: attention.scaled_dot_product_attention(q, k, v, LOOK, causal=True),
        ((2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3))),
    "attention_of_pairs": Op(lambda q, kv: attention.attention_of_pairs(q, kv, LOOK), ((2, 2, 3, 4), (2, 2, 2, 5, 4))),
    "attention_of_pairs, causal": Op(lambda q, kv: attention.attention_of_pairs(q, kv, causal=True),
                                     ((2, 2, 4, 4), (2, 2, 2, 3, 4))),
}
