"""Work on all cores: the same results in the same order, whatever the number of cores."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    yield request.param


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
    barrier = threading.Barrier(2)
    assert sorted(parallel_map(lambda _: barrier.wait(timeout=20), range(2))) == [0, 1]


def test_an_exception_comes_through(cores):
    def f(i):
        if i == 3:
            raise KeyError("three")
        return i
    with pytest.raises(KeyError, match="three"):
        list(parallel_map(f, range(5)))
    assert list(parallel_map(f, range(3))) == [0, 1, 2], "and it works again afterwards"
    assert list(parallel_map(f, [])) == []


def test_of_several_exceptions_the_first_items_comes_through(cores):
    """As on one core, although another thread fails before."""
    barrier = threading.Barrier(min(cores, 2))

    def f(i):
        if i < 2:
            barrier.wait(timeout=20)
            threading.Event().wait(0.05 * (1 - i))
        raise KeyError(i)
    with pytest.raises(KeyError) as caught:
        parallel_map(f, range(9))
    assert caught.value.args == (0,)


def test_an_exception_ends_the_other_threads_and_is_freed(monkeypatch):
    """Nothing computes any more when the caller goes on, and no traceback keeps the caller's arrays in memory."""
    monkeypatch.setattr(parallel, "cores", lambda: 3)

    def fail():
        running, held = [], np.zeros(3)

        def f(i):
            running.append(i)
            try:
                if i == 1:
                    raise KeyError(held[0])
                threading.Event().wait(0.05)
            finally:
                running.remove(i)
        with pytest.raises(KeyError):
            parallel_map(f, range(100))
        assert not running and not others()
        return weakref.ref(held)
    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_comes_through_before_an_exception(cores, interrupt):
    def f(i):
        raise interrupt if i == 1 or cores == 1 else KeyError
    barrier = threading.Barrier(min(cores, 2))

    def both(i):
        barrier.wait(timeout=20)
        f(i)
    with pytest.raises(interrupt):
        parallel_map(both, range(min(2, cores)) if cores > 1 else [1])
    assert not others()


def threads_of_blas() -> set[int]:
    return {pool["num_threads"] for pool in parallel._blas().info() if pool["user_api"] == "blas"}


def others() -> list[threading.Thread]:
    """Threads of a map that are still there."""
    return [thread for thread in threading.enumerate() if thread.name == "minidiff"]


@pytest.fixture
def two(monkeypatch):
    """Two cores, and a BLAS that uses two threads outside of a map."""
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    with parallel._blas().limit(limits=2, user_api="blas"):
        yield
        assert threads_of_blas() == {2} and not others()


def test_blas_is_held_to_one_thread_meanwhile(two):
    assert set().union(*parallel_map(lambda _: threads_of_blas(), range(4))) == {1}


def test_a_map_may_be_called_while_the_results_of_another_are_read(two):
    found = []
    for a in parallel_map(abs, [-1, -2, -3]):
        found.append(list(parallel_map(lambda b, a=a: a * b, [1, 2])))
        assert threads_of_blas() == {2}, "a map holds BLAS while it computes, not until its results are read"
    assert found == [[1, 2], [2, 4], [3, 6]]


@pytest.mark.parametrize("way", ["read in part", "failed"])
def test_nothing_is_left_of_a_map(two, way):
    if way == "failed":
        with pytest.raises(ZeroDivisionError):
            parallel_map(lambda i: 1 / i, [3, 2, 1, 0])
    else:
        for _ in parallel_map(abs, range(9)):
            break


def test_a_map_inside_anothers_f_runs_in_its_thread(two):
    def inner(_):
        return threading.get_ident(), threads_of_blas()

    def outer(_):
        return threading.get_ident(), parallel_map(inner, range(3))
    for thread, calls in parallel_map(outer, range(4)):
        assert calls == [(thread, {1})] * 3


def test_maps_of_several_threads_run_at_the_same_time(two):
    """Each waits for a call of each other one; then one waits, inside its f, for a thread that calls a map itself."""
    barrier = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        def one(k):
            return parallel_map(lambda i: (barrier.wait(timeout=20) * 0 if i == 0 else 0) + k * i, range(5))
        assert list(pool.map(one, range(3))) == [[k * i for i in range(5)] for k in range(3)]
        assert threads_of_blas() == {2}

        def waits(i):
            return pool.submit(parallel_map, abs, [-i, i]).result(timeout=20)
        assert parallel_map(waits, range(4)) == [[i, i] for i in range(4)]


def test_f_computes_under_the_callers_settings(cores):
    """Whichever thread it is in."""
    def f(_):
        with pytest.raises(FloatingPointError):
            np.ones(1) / 0
        return is_recording()
    with no_grad(), np.errstate(divide="raise"):
        assert parallel_map(f, range(6)) == [False] * 6
    assert is_recording()


# ---- forks, other processes, and threads that do not start -------------------------------------------------

def in_a_fork(f) -> str:
    """repr(f()) in a forked child, or what went wrong there."""
    def child(end):
        try:
            end.send(repr(f()))
        except BaseException as error:
            end.send(f"{type(error).__name__}: {error}")
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    try:
        return here.recv() if here.poll(20) else "it hangs"
    finally:
        process.kill()
        process.join()


forks = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")


def square(i):
    return threads_of_blas(), i * i


@forks
def test_a_forked_process_has_threads_of_its_own(two):
    expected = repr([({1}, 0), ({1}, 1), ({1}, 4)])
    assert repr(parallel_map(square, range(3))) == expected
    assert in_a_fork(lambda: parallel_map(square, range(3))) == expected
    assert in_a_fork(lambda: in_a_fork(lambda: parallel_map(square, range(3)))) == repr(expected)
    assert in_a_fork(threads_of_blas) == "{2}"
    barrier = threading.Barrier(2)
    assert in_a_fork(lambda: sorted(parallel_map(lambda _: barrier.wait(timeout=20), range(2)))) == "[0, 1]"


@forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_may_be_forked_while_a_thread_is_in_a_map(monkeypatch):
    """The child has neither that thread nor its limit of BLAS; nor a lock that another thread held."""
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    started, end = threading.Barrier(3), threading.Event()

    def busy(_):
        started.wait(timeout=20)
        assert end.wait(timeout=60)

    def elsewhere():                                        # only the thread that limited BLAS can change its limit
        with parallel._blas().limit(limits=2, user_api="blas"):
            parallel_map(busy, range(2))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    try:
        started.wait(timeout=20)
        assert threads_of_blas() == {1}
        assert in_a_fork(lambda: (threads_of_blas(), parallel_map(square, range(2)), threads_of_blas())) \
            == repr(({2}, [({1}, 0), ({1}, 1)], {2}))
        assert threads_of_blas() == {1}, "and the parent is as it was"
    finally:
        end.set()
        thread.join()


@forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_f_may_fork(two):
    """In the caller's thread and in the other: the child computes, and leaves BLAS as it was."""
    barrier = threading.Barrier(2)

    def f(i):
        barrier.wait(timeout=20)                            # so that each thread has one
        return in_a_fork(lambda: parallel_map(square, [i]))
    for i, said in enumerate(parallel_map(f, range(2))):
        assert said.endswith(f", {i * i})]")


@pytest.mark.parametrize("starting", [0, 1])
def test_where_no_more_threads_start_fewer_do_the_work(monkeypatch, starting):
    """A limit on processes and threads (ulimit -u, a container's pids.max) is no error."""
    monkeypatch.setattr(parallel, "cores", lambda: 4)
    start, left = threading.Thread.start, [None] * starting

    def limited(thread):
        if not left:
            raise RuntimeError("can't start new thread")
        left.pop()
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", limited)
    assert parallel_map(lambda i: i * i, range(9)) == [i * i for i in range(9)]
    w, x = Tensor(normal(7, 7), requires_grad=True), normal(100, 7)
    loss, (dw,) = parallel_gradients(loss_of(x, w), [w], 100)
    monkeypatch.undo()
    expected, (dw_of_all,) = parallel_gradients(loss_of(x, w), [w], 100)
    assert loss == expected and np.array_equal(dw, dw_of_all)


AT_EXIT = """
import atexit, os, resource, sys
from minidiff.engine import parallel
parallel.cores = lambda: 3
parallel.parallel_map(abs, [-1, -2])                        # imports what it needs
if "limit" in sys.argv:
    if os.getuid() == 0:
        os.setuid(65534)                                    # root has no limit
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
atexit.register(lambda: print(parallel.parallel_map(abs, [-1, -2, -3])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how threads are limited is the system's own")
@pytest.mark.parametrize("limit", [[], ["limit"]])
def test_a_map_works_at_exit_and_under_a_systems_limit(limit):
    """After the main thread has ended, Python starts no threads (since 3.12); under the limit the system does not."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT, *limit], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[1, 2, 3]", "")


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


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_an_overflow_is_reported_unless_a_loss_scale_may_have_caused_it(scale):
    """Who scales the loss tests for infinity; else NumPy warns, as it does everywhere."""
    x, w = np.full((3, 2), 1e30, np.float32), Tensor(np.full(2, 1e30, np.float32), requires_grad=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        parallel_gradients(lambda shard: ops.mean(Tensor(x[shard]) * w), [w], 3, scale)
    assert any("overflow" in str(one.message) for one in said) == (scale == 1)


def test_the_sum_does_not_depend_on_the_number_of_cores(monkeypatch):
    """Bit for bit, in float32, where the order of a sum matters."""
    rng = np.random.default_rng(0)
    w = Tensor(rng.standard_normal((16, 16), dtype=np.float32), requires_grad=True)
    x, results = rng.standard_normal((130, 16), dtype=np.float32), []
    for n in (1, 2, 5):
        monkeypatch.setattr(parallel, "cores", lambda n=n: n)
        loss, grads = parallel_gradients(loss_of(x, w), [w], len(x))
        assert grads[0].dtype == np.float32
        results.append((loss, grads[0].tobytes()))
    assert len(set(results)) == 1


def test_every_sample_is_in_one_shard(monkeypatch):
    """parallel_gradients passes slices that cover the batch once.  A mean alone would not show that."""
    asked, leaf = [], Tensor(np.zeros(3), requires_grad=True)

    def loss(shard):
        asked.append((shard.start, shard.stop))
        return ops.sum(leaf)
    parallel_gradients(loss, [leaf], 70)
    assert sorted(asked) == [(s.start, s.stop) for s in shards(70)]


@pytest.fixture
def no_container(monkeypatch):
    monkeypatch.setattr(parallel, "CPU_MAX", Path("no/such/file"))


@pytest.mark.parametrize("text, cores", [
    ("max 100000\n", 6), ("200000 100000\n", 2), ("150000 100000", 2), ("1000 100000", 1), ("900000 100000", 6),
    ("", 6), ("0 100000", 6), ("1 0", 6), ("-1 100000", 6), ("a b", 6), ("1 2 3", 6)])
def test_a_containers_limit_of_time_limits_the_cores(monkeypatch, tmp_path, text, cores):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(parallel, "allowed_cores", lambda: set(range(6)))
    monkeypatch.setattr(parallel, "CPU_MAX", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(text)
    assert parallel.cores() == cores


def test_cores_are_those_that_this_process_may_use(monkeypatch, no_container):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7} if process == 0 else {1}, raising=False)
    assert parallel.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert parallel.cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert parallel.cores() == 1


@pytest.mark.parametrize("value, cores", [
    ("1", 1), ("2", 2), (" 3 ", 3), ("6", 6), ("7", 6), ("1000", 6), ("2,4", 2), ("4,2,1", 4),
    # what is no number of threads says nothing, as in OpenMP's own libraries
    ("", 6), ("0", 6), ("-1", 6), ("abc", 6), ("1.5", 6), (",2", 6), ("\N{SUPERSCRIPT TWO}", 6), ("9" * 5000, 6)])
def test_omp_num_threads_limits_the_cores(monkeypatch, no_container, value, cores):
    monkeypatch.setattr(parallel, "allowed_cores", lambda: set(range(6)))
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert parallel.cores() == cores
    monkeypatch.setattr(parallel, "_part", 2)
    assert parallel.cores() == min(2, cores), "of ranks, each has as many"


@pytest.mark.parametrize("name", ["OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_limit_of_blas_is_blass_own(monkeypatch, no_container, name):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(parallel, "allowed_cores", lambda: set(range(6)))
    monkeypatch.setenv(name, "1")
    assert parallel.cores() == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", multiprocessing.get_all_start_methods())
def test_a_process_of_any_kind_draws_the_same_pictures(kind):
    """A model that has drawn here draws in a process that is forked, or started anew, with the model as a pickle."""
    from minidiff.systems import load_system
    model = load_system("text-to-image")
    here = model.sample(["7", "8"], steps=1)
    with multiprocessing.get_context(kind).Pool(1) as pool:
        there = pool.apply_async(model.sample, (["7", "8"],), {"steps": 1}).get(timeout=120)
    assert np.array_equal(here, there)


@pytest.mark.parametrize("piece", [1, 5, 12, 1000])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (5, 2, 1)])
def test_map_rows_is_f_of_all_rows(piece, shape, monkeypatch):
    """Each row once, in its place, in every layout; f sees matrices of at most PIECE numbers, or one row."""
    monkeypatch.setattr(parallel, "PIECE", piece)
    x, seen = np.random.default_rng(0).random(shape), []

    def f(rows):
        seen.append(rows.shape)
        return rows / rows.sum(axis=1, keepdims=True)
    for odd in (x, np.asfortranarray(x), np.repeat(x, 2, axis=-1)[..., ::2]):
        assert np.array_equal(parallel.map_rows(f, odd), x / x.sum(axis=-1, keepdims=True))
    assert all(n == 1 or n * C <= piece for n, C in seen)
    assert sum(n for n, _ in seen) == 3 * x.size // x.shape[-1]
