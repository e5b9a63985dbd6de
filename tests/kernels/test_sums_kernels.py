"""The sum of a matrix's rows, and the way back of an embedding: values, order of additions, repeated launches."""

import numpy as np
import pytest
from support import cuda_on_cpu, fake_cupy

from minidiff.engine import ops
from minidiff.engine.cuda import embedding, reduce
from minidiff.engine.cuda import launch as cuda
from minidiff.engine.tensor import Tensor, gradients

pytestmark = fake_cupy.needs_device
DTYPES = cuda.versions("sum_rows")[1].takes
ROUNDING = {"float64": 1e-13, "float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


# --- the sum of the rows ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, C", [(1, 1), (7, 33), (31, 32), (33, 64), (300, 5)])
def test_the_sum_of_rows(cupy, dtype, M, C):
    """Shapes around a tile, one part and several; twice, since a launch must leave its counters as zeros."""
    x = np.random.default_rng(0).standard_normal((M, C)).astype(fake_cupy.dtype_of(dtype))
    for _ in range(2):
        y = reduce.sum_rows(cupy.asarray(x))
        assert y.dtype == x.dtype and y.shape == (C,)
        np.testing.assert_allclose(y.get().astype(np.float64), x.astype(np.float64).sum(axis=0), rtol=ROUNDING[dtype],
                                   atol=ROUNDING[dtype] * M ** 0.5)
    assert not reduce.counters(1).get().any()


def test_more_columns_than_counters_and_rows_that_are_not_contiguous(cupy):
    x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    np.testing.assert_allclose(reduce.sum_rows(cupy.asarray(x).T).get(), x.sum(axis=1), rtol=1e-4, atol=1e-5)
    assert len(reduce.counters(5000)) >= 5000
    assert reduce.sum_rows(cupy.zeros((0, 3), "float32")).get().tolist() == [0, 0, 0]


@fake_cupy.needs_compiler
def test_any_block_may_be_the_last(cupy):
    """The parts are added from the first to the last, in whatever order the blocks finish: here they run backwards."""
    source = cuda.pick("sum_rows", "float32")
    backwards = source.text.replace("blockIdx.y * rows", "(gridDim.y - 1 - blockIdx.y) * rows").replace(
        "found[blockIdx.y * C + c] = sum", "found[(gridDim.y - 1 - blockIdx.y) * C + c] = sum")
    x, results = np.random.default_rng(0).standard_normal((100, 40)).astype(np.float32), []
    for text in (source.text, backwards):
        for order in range(3):
            y, found, done = np.zeros(40, np.float32), np.zeros((4, 40), np.float32), np.zeros(2, np.uint32)
            cuda_on_cpu.Program(text, {"ELEMENT": "float"})["sum_rows"](
                (2, 4), 256, [x, found, done, y, np.int32(100), np.int32(40), np.int32(25)], order=order)
            results.append(y.tobytes())
            assert not done.any()
    assert backwards != source.text and len(set(results)) == 1


# --- the way back of an embedding -----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V, shape, C", [(1, (3,), 1), (9, (2, 17), 33), (20, (40,), 64), (5, (0,), 4), (4, (), 3)])
def test_the_way_back_of_an_embedding(cupy, dtype, V, shape, C):
    """Ids that occur often, once and never."""
    rng = np.random.default_rng(0)
    ids, dy = rng.integers(0, max(1, V - 2), shape), rng.standard_normal((*shape, C)).astype(fake_cupy.dtype_of(dtype))
    expected = np.zeros((V, C))
    np.add.at(expected, ids.ravel(), dy.reshape(-1, C).astype(np.float64))
    found = embedding.embedding_backward(cupy.asarray(ids), cupy.asarray(dy), V)
    assert found.dtype == dy.dtype
    np.testing.assert_allclose(found.get().astype(np.float64), expected, rtol=ROUNDING[dtype], atol=8 * ROUNDING[dtype])


def test_an_embedding_adds_in_the_order_of_its_ids(cupy):
    """Bit for bit what the CPU adds, one after the other."""
    rng = np.random.default_rng(0)
    ids, table, dy = rng.integers(0, 3, 200), np.zeros((3, 5), np.float32), rng.standard_normal((200, 5), np.float32)
    host, there = (Tensor(place(table), requires_grad=True) for place in (np.asarray, cupy.asarray))
    expected, = gradients(ops.embedding(host, ids), [host], dy)
    found, = gradients(ops.embedding(there, ids), [there], cupy.asarray(dy))
    assert found.get().tobytes() == expected.tobytes()


def test_a_cotangent_of_another_shape_is_refused(cupy):
    with pytest.raises(ValueError, match="dy must be") as error:
        embedding.embedding_backward(cupy.asarray(np.zeros((2, 3), int)), cupy.zeros((3, 2, 4), "float32"), 5)
    fake_cupy.one_sentence(error)
