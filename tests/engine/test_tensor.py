"""Reverse-mode differentiation: gradients of whole graphs, what is accumulated and freed, and error messages."""

import gc
import re
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_cupy import install, of_the_stand_in
from support.gradcheck import check_gradients
from support.refusals import check_message, zeros

from minidiff.engine import ops
from minidiff.engine.tensor import Tensor, adds, gradients, no_grad, record, recording


def leaf(*values, dtype=np.float64) -> Tensor:
    return Tensor(np.array(values, dtype=dtype), requires_grad=True)


# ---- the checker itself ----------------------------------------------------------------------------------


def faulty(name: str):
    """An op whose result is right and whose pullback is wrong."""
    def wrong_sign(x):
        return record(np.sin(x.data), (x,), lambda dy: (-dy * np.cos(x.data),))

    def a_little_off(x):
        return record(np.sin(x.data), (x,), lambda dy: (dy * np.cos(x.data) * (1 + 1e-4),))

    def softmax_of_zero(x):                                 # right for a cotangent of ones, and for no other
        return record(ops.softmax(x).data, (x,), lambda dy: (0 * dy,))

    def not_summed(x):                                      # broadcasts, and does not sum the repeats
        return record(np.repeat(x.data, 2, axis=0), (x,), lambda dy: (dy[::2],))

    def overwrites(x):                                      # a repeated index keeps its last cotangent only
        def pullback(dy):
            dx = np.zeros_like(x.data)
            dx[[0, 1, 0]] = dy
            return (dx,)
        return record(x.data[[0, 1, 0]], (x,), pullback)

    def transposed(x):
        return record(x.data @ np.arange(9.0).reshape(3, 3), (x,), lambda dy: (dy @ np.arange(9.0).reshape(3, 3),))

    def one_element(x):                                     # a single element of many is wrong
        def pullback(dy):
            dx = 2 * x.data * dy
            dx[-1, -1] *= 1.001
            return (dx,)
        return record(x.data**2, (x,), pullback)
    return locals()[name]


@pytest.mark.parametrize("directions", [0, 3])
@pytest.mark.parametrize("name", ["wrong_sign", "a_little_off", "softmax_of_zero", "not_summed", "overwrites",
                                  "transposed", "one_element"])
def test_the_checker_sees_a_planted_error(name, directions):
    x = np.random.default_rng(0).standard_normal((2, 3))
    with pytest.raises(AssertionError, match="gradient of input 0"):
        check_gradients(faulty(name), x, directions=directions)


def test_the_checker_sees_an_op_that_writes_where_it_must_not():
    def writes_into_dy(x):
        def pullback(dy):
            dy *= 2
            return (dy / 2,)
        return record(x.data.copy(), (x,), pullback)

    def writes_into_x(x):
        def pullback(dy):
            x.data *= 0.5
            return (dy,)
        return record(x.data.copy(), (x,), pullback)

    with pytest.raises(AssertionError, match="cotangent"):
        check_gradients(writes_into_dy, np.ones((2, 3)))
    with pytest.raises(AssertionError, match="input 0 was written into"):
        check_gradients(writes_into_x, np.ones((2, 3)))


# ---- gradients of graphs ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_gradient_of_any_graph(steps):
    """Each step applies an op to two earlier results, so tensors are shared in every way, or not used at all."""
    table = [ops.add, ops.mul, ops.sub, lambda x, y: ops.tanh(x @ y)]

    def f(x, w):
        made = [x, w]
        for op, i, j in steps:
            made.append(ops.tanh(table[op](made[i % len(made)], made[j % len(made)])))
        return made[-1]
    check_gradients(f, *np.random.default_rng(0).standard_normal((2, 2, 2)))


def test_a_pullback_may_add_what_another_use_gave():
    """It gets the cotangent that its first argument has so far, and None where it has none."""
    given = []

    def halve(x: Tensor) -> Tensor:
        @adds
        def pullback(dy, plus=None):
            given.append(plus)
            return (dy / 2 if plus is None else dy / 2 + plus,)
        return record(x.data / 2, (x,), pullback)
    x = Tensor(np.array([3.0, 5.0]), requires_grad=True)
    dx, = gradients(x + halve(x) + halve(ops.exp(x)), [x], np.array([1.0, 10.0]))
    np.testing.assert_allclose(dx, np.array([1.0, 10.0]) * (1.5 + np.exp(x.data) / 2), rtol=1e-14)
    assert [plus is None for plus in given].count(True) == 1


def test_a_shared_result_is_walked_once_and_every_use_counted():
    x, calls = leaf(3.0), []

    def square(x):
        def pullback(dy):
            calls.append(dy)
            return (2 * x.data * dy,)
        return record(x.data**2, (x,), pullback)
    y = square(x)
    (y * y + y).sum().backward()                            # d(x^4 + x^2)/dx = 4 x^3 + 2 x
    assert len(calls) == 1
    assert x.grad.item() == 4 * 27 + 6


def test_backward_accumulates_until_grad_is_cleared():
    x = leaf(1.0, 2.0)
    for _ in range(3):
        (x * x).sum().backward()
    assert x.grad.tolist() == [6.0, 12.0]
    x.grad = None
    (x * x).sum().backward()
    assert x.grad.tolist() == [2.0, 4.0]


def test_grad_is_its_own_array():
    """Changing it changes neither the caller's cotangent nor another leaf's gradient."""
    x, w, dy = leaf(1.0, 2.0), leaf(3.0, 4.0), np.ones(2)
    (x + w).backward(dy)
    x.grad *= 5
    assert w.grad.tolist() == [1.0, 1.0] and dy.tolist() == [1.0, 1.0]


def test_only_leaves_that_ask_get_grad():
    x, w = leaf(1.0), Tensor(np.array([2.0]))
    y = x * w
    (y * 3).backward()
    assert x.grad is not None and w.grad is None and y.grad is None


def test_a_leaf_may_be_the_result_itself():
    x = leaf(1.0, 2.0)
    x.backward(np.array([3.0, 4.0]))
    assert x.grad.tolist() == [3.0, 4.0]


def test_detach_cuts_the_history():
    x = leaf(2.0)
    y = x * x
    (y.detach() * x).sum().backward()
    assert x.grad.item() == 4.0 and y.detach().data is y.data


def test_dy_may_be_left_out_for_one_element_only():
    x = leaf(1.0, 2.0)
    with pytest.raises(ValueError, match=r"dy is required.*\(2,\)"):
        (x * x).backward()
    with pytest.raises(ValueError, match=r"dy must have y's shape \(2,\), not \(3,\)"):
        (x * x).backward(np.ones(3))
    with pytest.raises(RuntimeError, match="requires a gradient"):
        Tensor(np.ones(1)).backward()
    with no_grad():
        y = (x * x).sum()
    with pytest.raises(RuntimeError, match="no_grad"):
        y.backward()


# ---- walking twice ---------------------------------------------------------------------------------------


def test_keep_graph_lets_backward_be_called_again():
    x = leaf(3.0)
    y = (x * x).sum()
    y.backward(keep_graph=True)
    y.backward(keep_graph=True)
    y.backward()
    assert x.grad.item() == 3 * 6.0
    with pytest.raises(RuntimeError, match="keep_graph=True"):
        y.backward()


def test_a_graph_that_was_freed_in_part_is_refused_whole():
    """The second result shares a freed part with the first: backward raises, and adds nothing to any leaf."""
    x, w = leaf(3.0), leaf(5.0)
    shared = x * x
    first, second = shared * 2, (shared + w) * w
    first.backward()
    x.grad = None
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        second.backward()
    assert x.grad is None and w.grad is None


# ---- gradients() -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_are_arrays_of_their_own(device, monkeypatch):
    """Of two leaves that a pullback gives one array, of a leaf given twice, of a broadcast, and where dy is the
    gradient; of leaves of shape (), where NumPy computes with numbers, they are arrays too."""
    cupy = install(monkeypatch)
    xp = np if device == "cpu" else cupy
    for shape in ((), (2, 3)):
        x, w, b = (Tensor(xp.ones(shape), requires_grad=True) for _ in range(3))
        dy = xp.ones(shape)
        grads = gradients(x + w, [x, w, x], dy)
        if shape:
            grads += gradients(ops.sum(b), [b])
        for i, g in enumerate(grads):
            assert isinstance(g, xp.ndarray) and g.shape == shape and g.flags.c_contiguous
            g *= 2 + i                                      # an array that shares its memory changes, too
        assert [g.sum().item() for g in grads] == [(2 + i) * x.size for i in range(len(grads))]
        assert dy.sum().item() == x.size


def test_a_gradient_can_be_written_where_a_pullback_gives_an_array_that_cannot():
    frozen = np.array([3.0, 4.0])
    frozen.flags.writeable = False
    x = leaf(1.0, 2.0)
    (dx,) = gradients(record(x.data * frozen, (x,), lambda dy: (frozen,)), [x], np.ones(2))
    dx *= 2
    assert dx.tolist() == [6, 8] and frozen.tolist() == [3, 4]


def test_gradients_that_are_views_of_one_array_share_none_of_it():
    """The pullback of reshape returns a view; a gradient is not a view of the caller's array either."""
    x, w, dy = leaf(1.0, 2.0, 3.0), leaf(4.0, 5.0, 6.0), np.ones((1, 3))
    for y in ((x + w.reshape(1, 3).reshape(3)).reshape(1, 3) * 2.0, (x + w).reshape(1, 3)):
        dx, dw = gradients(y, [x, w], dy)
        assert not (np.shares_memory(dx, dw) or np.shares_memory(dx, dy) or np.shares_memory(dw, dy))


@of_the_stand_in
def test_gradients_on_a_gpu_are_copied_only_where_they_must_be(monkeypatch):
    """Each copy is a launch.  If two leaves get the same array, one is copied; of a product's gradients, none is."""
    cupy, copies = install(monkeypatch), []
    own = cupy.ndarray.__getattr__
    monkeypatch.setattr(cupy.ndarray, "__getattr__", lambda a, name: (
        copies.append(name) if name == "copy" else None, own(a, name))[1])
    x, w = (Tensor(cupy.ones((2, 3)), requires_grad=True) for _ in range(2))
    gradients(x * w, [x, w], cupy.ones((2, 3)))
    assert copies == []
    gradients((x + w) * 2, [x, w], cupy.ones((2, 3)))
    assert copies == ["copy"]


@of_the_stand_in
def test_gradients_on_a_gpu_share_no_memory(monkeypatch):
    """Nor do two halves of one array, the second of which begins at an address of its own."""
    cupy = install(monkeypatch)
    a, b, c = (Tensor(cupy.ones(shape), requires_grad=True) for shape in ((4, 2), (2, 2), (2, 2)))
    da, db, dc = gradients(((ops.concat([b, c], axis=0) + a) * 2).sum(), [a, b, c])
    da *= 10
    db *= 100
    for dx, value in ((da, 20), (db, 200), (dc, 2)):
        assert (dx.get() == value).all()


@of_the_stand_in
@pytest.mark.parametrize("part", [(slice(None), slice(0, 3)), (slice(None, None, -1), slice(0, 3))])
def test_gradients_on_a_gpu_share_no_memory_with_a_part_of_the_caller_s_array(monkeypatch, part):
    """dy need not be contiguous, and may begin at the end of its memory."""
    cupy = install(monkeypatch)
    whole = cupy.ones((4, 8), "float32")
    dy = whole[part]
    a, b = (Tensor(cupy.ones(shape, "float32"), requires_grad=True) for shape in ((3, 3), (1, 3)))
    for dx in gradients(ops.concat([a, b], axis=0), [a, b], dy):
        dx[...] = 99
    assert (whole.get() == 1).all()


def test_gradients_touches_no_grad():
    x, w, unused = leaf(2.0), leaf(3.0), leaf(1.0, 1.0)
    w.grad = np.array([7.0])
    dx, dw, none = gradients((x * x * w).sum(), [x, w, unused])
    assert (dx.item(), dw.item()) == (12.0, 4.0) and none.tolist() == [0.0, 0.0]
    assert x.grad is None and w.grad.item() == 7.0 and unused.grad is None


def test_threads_may_share_leaves():
    rng = np.random.default_rng(0)
    w, xs = Tensor(rng.standard_normal((8, 8)), requires_grad=True), rng.standard_normal((40, 5, 8))

    def gradient(x):
        return gradients(ops.tanh(ops.tanh(Tensor(x) @ w) @ w).sum(), [w])[0]
    one_by_one = [gradient(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, xs))
    assert all(np.array_equal(a, b) for a, b in zip(one_by_one, together, strict=True))
    assert w.grad is None


def test_no_grad_is_for_this_thread_only():
    x, seen = leaf(1.0), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * x).requires_grad))
        thread.start()
        thread.join()
        assert not (x * x).requires_grad
        with no_grad():
            pass
        assert not (x * x).requires_grad, "leaving an inner no_grad must not end the outer one"
    assert seen == [True] and (x * x).requires_grad
    with no_grad():
        with recording():
            assert (x * x).requires_grad, "who asks for a gradient records even there"
        assert not (x * x).requires_grad
    with pytest.raises(KeyError), no_grad():
        raise KeyError
    assert (x * x).requires_grad, "an exception within must not leave it off"


# ---- depth and memory ------------------------------------------------------------------------------------


def test_a_graph_of_10_000_ops():
    """Ten times deeper than Python's limit of recursion; one graph is walked, and a second one is dropped unwalked."""
    depth = 10_000
    assert depth > 5 * sys.getrecursionlimit()
    x = leaf(1.0)
    for _ in range(2):
        y = x
        for _ in range(depth):
            y = y * 0.9999 + 0.0
    y.backward()
    assert x.grad.item() == pytest.approx(0.9999**depth)


def test_backward_frees_the_graph_as_it_goes():
    """When the walk reaches the first of 30 ops, the arrays of the 29 later ones are freed."""
    x, results, alive_at_the_end = leaf(1.0, 2.0), [], []

    def first(x):
        def pullback(dy):
            alive_at_the_end.append(sum(ref() is not None for ref in results))
            return (dy,)
        return record(x.data.copy(), (x,), pullback)

    def graph():
        y = first(x)
        for _ in range(30):
            y = ops.exp(y * 0.1)                            # exp's pullback holds the array of its result
            results.append(weakref.ref(y.data))
        return y.sum()
    y = graph()
    assert sum(ref() is not None for ref in results) == 30
    y.backward()
    results.clear()
    graph().backward(keep_graph=True)
    assert alive_at_the_end[0] <= 1 and alive_at_the_end[1] == 30


def test_peak_memory_of_backward_is_a_few_arrays():
    """A chain of 40 ops keeps 40 arrays; backward must need only a few more, not 40 cotangents."""
    n, size = 40, 100_000
    x = Tensor(np.ones(size, np.float32), requires_grad=True)
    y = x
    for _ in range(n):
        y = ops.tanh(y)
    y = y.sum()
    tracemalloc.start()
    try:
        y.backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 4 * size


def test_no_garbage_is_left_without_the_collector():
    """50 graphs are walked and 50 are dropped, without the garbage collector: the memory of arrays does not grow."""
    rng = np.random.default_rng(0)
    w = Tensor(rng.standard_normal((64, 64), dtype=np.float32), requires_grad=True)
    x = Tensor(rng.standard_normal((256, 64), dtype=np.float32))

    def graph():
        h = ops.softmax(ops.gelu(x @ w) @ w)
        return ops.concat([h[:, :32], ops.silu(h)[:, 32:]]).mean()

    def one_round():
        gradients(graph(), [w])
        graph()

    def bytes_of_arrays() -> int:                           # not what other threads of the test runner allocate
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
    gc.disable()
    tracemalloc.start()
    try:
        one_round()
        before = bytes_of_arrays()
        for _ in range(50):
            one_round()
        grown = bytes_of_arrays() - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert grown < x.data.nbytes, f"{grown} bytes after 50 rounds"


# ---- what a Tensor is, and what it refuses ---------------------------------------------------------------


def test_lists_become_float32_and_arrays_keep_their_dtype():
    assert Tensor([1, 2]).dtype == np.float32
    assert Tensor(1.5).shape == ()
    for dtype in (np.float16, np.float64, np.int64, bool):
        assert Tensor(np.zeros(2, dtype)).dtype == dtype
    a = np.zeros(3)
    assert Tensor(a).data is a


@pytest.mark.parametrize("refused, message", [
    (lambda: Tensor(Tensor([1.0])), "Tensor already"),
    (lambda: Tensor(np.arange(3), requires_grad=True), "floating dtype, and data is int64"),
    (lambda: np.asarray(Tensor([1.0])), r"use \.data"),
    (lambda: float(np.array(Tensor([1.0]))), r"use \.data"),
    (lambda: bool(Tensor([1.0])), "truth value"),
    (lambda: Tensor([1.0]) == np.ones(1), "not compared with =="),
    (lambda: np.ones(1) == Tensor([1.0]), "not compared with =="),
    (lambda: Tensor([1.0]) != Tensor([1.0]), "not compared with =="),
    (lambda: np.exp(Tensor([1.0])), "ufunc"),
])
def test_what_would_lose_the_history_is_refused(refused, message):
    with pytest.raises(TypeError, match=message):
        refused()


def test_shape_and_item():
    x = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    assert (x.shape, x.ndim, x.size, len(x), x.dtype) == ((2, 3), 2, 6, 2, np.float64)
    assert x[1, 2].item() == 5.0 and "requires_grad=True" in repr(x)


def test_a_tensor_shows_what_it_is():
    assert repr(Tensor([1.0])) == "Tensor(array([1.], dtype=float32))"
    assert repr(Tensor([1.0], requires_grad=True)) == "Tensor(array([1.], dtype=float32), requires_grad=True)"
    assert len(zeros(3, 2)) == 3 and zeros(3, 2).ndim == 2 and zeros(3, 2).size == 6


def test_no_grad_ends_with_its_block():
    x = zeros(1)
    with no_grad():
        with no_grad():
            pass
        assert not ops.exp(x).requires_grad
    assert ops.exp(x).requires_grad


def test_a_graph_is_walked_once_unless_it_is_kept():
    y = ops.exp(zeros(1))
    y.backward()
    with pytest.raises(RuntimeError, match=re.escape("backward: this graph was freed by an earlier backward; pass "
                                                     "keep_graph=True to the first") + "$"):
        y.backward()


@pytest.mark.parametrize("error, message, call", [
    (TypeError, "data is a Tensor already: use it, or its .data, or .detach()", lambda: Tensor(zeros(2))),
    (TypeError, "requires_grad needs a floating dtype, and data is int64",
     lambda: Tensor(np.zeros(2, np.int64), requires_grad=True)),
    (TypeError, "a Tensor has no truth value: compare its .data", lambda: bool(zeros(1))),
    (TypeError, "a Tensor is not converted to an array implicitly, which would lose its history: use .data",
     lambda: np.asarray(zeros(1))),
    (RuntimeError, "backward: y depends on nothing that requires a gradient (or it was computed in no_grad)",
     lambda: Tensor(np.zeros(1, np.float32)).backward()),
    (ValueError, "backward: dy is required if y has more than one element; y is (2,)",
     lambda: ops.exp(zeros(2)).backward()),
    (ValueError, "backward: dy must have y's shape (2,), not (3,)",
     lambda: ops.exp(zeros(2)).backward(np.zeros(3, np.float32))),
])
def test_messages_of_refusals(error, message, call):
    check_message(error, message, call)
