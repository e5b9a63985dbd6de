"""Work on all cores: the same results in the same order, whatever the number of cores."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fake_cupy

from minidiff.engine import ops, parallel
from minidiff.engine.parallel import in_parts, map_batch, parallel_gradients, parallel_map, shards
from minidiff.engine.tensor import Tensor, gradients, is_recording, no_grad


@pytest.fixture(params=[1, 3])
def cores(request, monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: request.param)
    parallel._pool.cache_clear()
    yield request.param
    parallel._pool.cache_clear()


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 40))
def test_shards_cut_everything_once_into_equal_parts(count, size):
    parts = shards(count, size)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) <= size and max(lengths) - min(lengths) <= 1
    assert len(parts) == max(-(-count // size), min(2, count)), "no more than needed, and two where there can be"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.integers(1, 9))
def test_parts_hold_everything_once_and_are_about_equal(sizes, n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "cores", lambda: n)
        parts = in_parts(lambda part: list(range(len(sizes)))[part], sizes)
    assert sum(parts, []) == list(range(len(sizes)))
    assert max(sum(sizes[i] for i in part) for part in parts) <= sum(sizes) / n + max(sizes)


def test_results_come_in_order(cores):
    release = threading.Event()

    def f(i):
        if i == 0 and cores > 1:                            # the first call waits for a later one
            assert release.wait(timeout=20)
        if i == 1:
            release.set()
        return i * i
    assert list(parallel_map(f, range(10))) == [i * i for i in range(10)]


def test_it_is_in_parallel(monkeypatch):
    """Two calls wait for each other at a barrier."""
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    parallel._pool.cache_clear()
    barrier = threading.Barrier(2)
    assert sorted(parallel_map(lambda _: barrier.wait(timeout=20), range(2))) == [0, 1]
    parallel._pool.cache_clear()


def test_an_exception_comes_through(cores):
    def f(i):
        if i == 3:
            raise KeyError("three")
        return i
    with pytest.raises(KeyError, match="three"):
        list(parallel_map(f, range(5)))
    assert list(parallel_map(f, range(3))) == [0, 1, 2], "and it works again afterwards"
    assert list(parallel_map(f, [])) == []


def test_blas_is_held_to_one_thread_meanwhile(monkeypatch):
    monkeypatch.setattr(parallel, "cores", lambda: 2)

    def threads(_):
        return [pool["num_threads"] for pool in parallel._blas().info() if pool["user_api"] == "blas"]
    with parallel._blas().limit(limits=2, user_api="blas"):
        assert set(threads(None)) == {2}
        assert set(sum(parallel_map(threads, range(4)), [])) == {1}
        assert set(threads(None)) == {2}


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 100])
def test_a_map_over_a_batch_is_one_call_on_the_whole(cores, count):
    x, ids = normal(count, 3), np.arange(count)
    w = Tensor(normal(3, 4), requires_grad=True)
    calls = []

    def f(x, ids):
        calls.append(len(x))
        return Tensor(x) @ w, ids * 2                       # a Tensor and an array
    y, doubled = map_batch(f, x, ids, size=8)
    assert isinstance(y, np.ndarray) and y.shape == (count, 4)
    np.testing.assert_allclose(y, x @ w.data, rtol=1e-12)
    assert doubled.tolist() == [2 * i for i in range(count)], "in the order of the rows"
    assert sorted(calls) == sorted(part.stop - part.start for part in shards(count, 8)) if count else calls == [0]
    assert np.array_equal(map_batch(lambda x: x + 1, x), x + 1), "one result and no tuple"


def test_a_map_over_a_batch_records_no_gradients(cores):
    x = Tensor(normal(20, 3), requires_grad=True)
    recorded = []

    def f(x):
        recorded.append(is_recording())
        return x * 2
    assert isinstance(map_batch(f, x), np.ndarray)
    assert set(recorded) == {False} and is_recording()


def test_a_map_over_a_batch_refuses_arrays_of_different_lengths():
    with pytest.raises(ValueError, match=r"same number of rows, not \[3, 2\]"):
        map_batch(lambda x, y: x, normal(3), normal(2))


def test_a_gpu_takes_a_map_over_a_batch_as_one_call(monkeypatch):
    cupy = fake_cupy.install(monkeypatch)
    x, calls = normal(300, 3), []

    def f(x, i):
        calls.append(len(x))
        return Tensor(x) * 2, x[:, 0]
    y, first = map_batch(f, cupy.asarray(x), np.arange(300), device="cuda")
    fake_cupy.assert_same(y, x * 2)
    fake_cupy.assert_same(first, x[:, 0])
    assert calls == [300]


def loss_of(x, w):
    """The losses of the shards of a batch x, with shared weights w, as in training."""
    return lambda part: ops.mean(ops.tanh(ops.tanh(Tensor(x[part]) @ w) @ w))


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 100])
def test_gradients_by_shards_are_the_whole_batchs(cores, count):
    rng = np.random.default_rng(0)
    w, x = Tensor(rng.standard_normal((7, 7)), requires_grad=True), rng.standard_normal((count, 7))
    unused = Tensor(np.ones(2), requires_grad=True)
    loss, grads = parallel_gradients(loss_of(x, w), [w, unused], count)
    whole = loss_of(x, w)(slice(None))
    assert loss == pytest.approx(whole.item(), rel=1e-12)
    np.testing.assert_allclose(grads[0], gradients(whole, [w])[0], rtol=1e-11, atol=1e-14)
    assert grads[1].tolist() == [0, 0] and w.grad is None and not isinstance(loss, np.ndarray)


@pytest.mark.parametrize("count", [1, 2, 100])
def test_a_gradient_is_asked_for_by_name_inside_no_grad_too(cores, count):
    x, w = normal(count, 7), Tensor(normal(7, 7), requires_grad=True)
    with no_grad():
        loss, (dw,) = parallel_gradients(loss_of(x, w), [w], count)
    expected, (dw_outside,) = parallel_gradients(loss_of(x, w), [w], count)
    assert loss == expected and np.array_equal(dw, dw_outside) and dw.any()


def test_the_sum_does_not_depend_on_the_number_of_cores(monkeypatch):
    """Bit for bit, in float32, where the order of a sum matters."""
    rng = np.random.default_rng(0)
    w = Tensor(rng.standard_normal((16, 16), dtype=np.float32), requires_grad=True)
    x, results = rng.standard_normal((130, 16), dtype=np.float32), []
    for n in (1, 2, 5):
        monkeypatch.setattr(parallel, "cores", lambda n=n: n)
        parallel._pool.cache_clear()
        loss, grads = parallel_gradients(loss_of(x, w), [w], len(x))
        assert grads[0].dtype == np.float32
        results.append((loss, grads[0].tobytes()))
    parallel._pool.cache_clear()
    assert len(set(results)) == 1


def test_every_sample_is_in_one_shard(monkeypatch):
    """parallel_gradients passes slices that cover the batch once.  A mean alone would not show that."""
    asked, leaf = [], Tensor(np.zeros(3), requires_grad=True)

    def loss(shard):
        asked.append((shard.start, shard.stop))
        return ops.sum(leaf)
    parallel_gradients(loss, [leaf], 70)
    assert sorted(asked) == [(s.start, s.stop) for s in shards(70)]


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7} if process == 0 else {1}, raising=False)
    assert parallel.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert parallel.cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert parallel.cores() == 1
