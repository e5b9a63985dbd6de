"""What the engine promises of a Tensor's data: what it may be, that it may be set, copies of it; and whole numbers."""

import copy
import pickle

import numpy as np
import pytest

from minidiff.checks import whole
from minidiff.engine import conv, norm, ops
from minidiff.engine.tensor import Tensor, gradients
from minidiff.nn.layers import Linear
from minidiff.nn.optim import EMA, AdamW, AdamWConfig, clip_by_norm


def leaf(data, dtype=np.float64) -> Tensor:
    return Tensor(np.asarray(data, dtype), requires_grad=True)


# --- what the data may be -----------------------------------------------------------------------------------

class Series:
    """Like a column of pandas: it has a dtype, and NumPy can read it."""

    dtype, ndim = np.dtype(np.float32), 1

    def __array__(self, dtype=None, copy=None):
        return np.array([1, 2], np.float32)


A = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)


@pytest.mark.parametrize("data, same", [
    (A.view(np.matrix), A), (A.astype(">f4"), A), (A.astype(">i4"), A.astype(np.int32)), (A.view(np.recarray), A),
    (Series(), np.array([1, 2], np.float32)), (A.tolist(), A), (memoryview(A), A), (2, np.float32(2)),
], ids=["matrix", "big-endian", "big-endian integers", "recarray", "series", "list", "memoryview", "number"])
def test_what_numpy_can_read_becomes_a_plain_array(data, same):
    for got in (Tensor(data).data, _set(data)):
        assert type(got) is np.ndarray and got.dtype.isnative and np.array_equal(got, same)
        assert got.dtype == same.dtype or not hasattr(data, "dtype")


def _set(data):
    x = Tensor(np.zeros(1))
    x.data = data
    return x.data


@pytest.mark.parametrize("data", [
    np.ma.array(A, mask=A > 2), A.astype(complex), A.astype(object), A.astype(str), "3", ["1", "2"], 1j, None,
    np.array("2026-01-01", "M8[D]"), np.zeros(2, [("a", float)]),
], ids=lambda data: f"{type(data).__name__} {getattr(data, 'dtype', '')}")
def test_other_data_is_refused(data):
    uses = (lambda: Tensor(data), lambda: _set(data), lambda: Tensor(A) + data, lambda: Tensor(A) * data,
            lambda: ops.where(A > 2, Tensor(A), data), lambda: ops.sum(leaf(A)).backward(data))
    for use in uses if data is not None else uses[:-1]:     # dy=None is the default
        with pytest.raises(TypeError, match="masked array|real numbers or bools|float"):
            use()


def test_a_product_with_a_matrix_is_elementwise_and_one_with_a_big_endian_array_is_right():
    x = leaf(A, np.float32)
    assert np.array_equal((x * A.view(np.matrix)).data, A * A)
    w = np.random.default_rng(0).standard_normal((3, 3, 2, 2)).astype(np.float32)
    image = np.random.default_rng(1).standard_normal((1, 6, 6, 2)).astype(np.float32)
    for padding in (0, 1, 2):
        for kernel in (w, w[:1, :1]):
            assert np.array_equal(conv.conv2d(Tensor(image.astype(">f4")), Tensor(kernel.astype(">f4")), None, 1,
                                              padding).data,
                                  conv.conv2d(Tensor(image), Tensor(kernel), None, 1, padding).data)


@pytest.mark.parametrize("ids", [np.array([[0, 1]]).view(np.matrix), np.array([0, 1], ">i4"), np.arange(2, dtype="B")])
def test_ids_of_any_integers(ids):
    table = leaf(A)
    ops.sum(ops.embedding(table, ids)).backward()
    assert np.array_equal(table.grad, np.ones((2, 2)))
    labels = np.asarray(ids).ravel()
    assert ops.cross_entropy(leaf(A), labels).data == ops.cross_entropy(leaf(A), np.array([0, 1])).data


def test_a_condition_is_of_bools():
    with pytest.raises(TypeError, match="where takes a condition of bools, not int64"):
        ops.where(np.array([0, 1]), leaf([1, 2]), 0)


# --- numbers of shape () ------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", [np.float32(2), np.array(2, np.float32), 2.0], ids=["NumPy's", "array", "Python's"])
def test_a_number_can_be_a_parameter(data):
    w = Tensor(data, requires_grad=True)
    optimiser, ema = AdamW({"w": w}, AdamWConfig(decay=0)), EMA({"w": w}, 0.5)
    assert isinstance(w.data, np.ndarray)                   # which any optimiser can write into
    before = w.data.copy()
    (w * w).backward()
    assert isinstance(w.grad, np.ndarray)
    (w * w).backward()                                      # a sum of numbers is an array again
    assert isinstance(w.grad, np.ndarray) and w.grad == 8
    assert clip_by_norm([w.grad], 1.0) == 8 and w.grad == 1
    optimiser.step([w.grad], 0.5)
    ema.step()
    assert w.data == pytest.approx(before - 0.5) and w.dtype == np.float32
    assert ema.average["w"] == pytest.approx(2 + (1 - 1 / 10) * -0.5)
    w.data = w.data - np.float32(1)                         # a NumPy number now
    optimiser.step([np.ones((), np.float32)], 0.5)
    assert w.data < 1 and ema.average["w"] != w.data
    with pytest.raises(TypeError, match="grads must be arrays"):
        clip_by_norm([np.float32(8)], 1.0)


@pytest.mark.parametrize("order", ["C", "F", "view"])
def test_a_parameter_of_any_layout_is_updated(order):
    def made(array):
        w = Tensor(array, requires_grad=True)
        optimiser, ema = AdamW({"w": w}), EMA({"w": w})
        for _ in range(3):
            optimiser.step([np.ascontiguousarray(w.data) * 2], 0.1)
            ema.step()
        return w.data, ema.average["w"]
    start = np.random.default_rng(0).standard_normal((4, 3))
    held = {"C": start.copy(), "F": np.asfortranarray(start), "view": np.repeat(start, 2, axis=1)[:, ::2]}[order]
    for got, right in zip(made(held), made(start.copy()), strict=True):
        np.testing.assert_array_equal(got, right)
    np.testing.assert_array_equal(held, made(start.copy())[0])     # in place


def test_a_shared_parameter_is_updated_once():
    first, second = Linear(2, 2, np.random.default_rng(0)), Linear(2, 2, np.random.default_rng(0))
    second.w = first.w
    first.part = second
    assert list(first.parameters()) == ["w", "b", "part.b"]


def test_a_step_that_is_refused_changes_nothing():
    w = Tensor(np.ones((2, 2)), requires_grad=True)
    optimiser = AdamW({"w": w, "b": Tensor(np.ones(2), requires_grad=True)})
    good = [np.ones((2, 2)), np.ones(2)]

    def state():
        return [optimiser.n, w.data.copy(), *(a.copy() for a in optimiser.state_dict().values())]
    before = state()
    for grads in (good[:1], [*good, good[0]], [np.ones(2), np.ones(2)], [np.ones((1, 1)), np.ones(2)]):
        with pytest.raises(ValueError, match="grads must be one array|its gradient float64"):
            optimiser.step(grads, 0.1)
    w.data.setflags(write=False)
    with pytest.raises(ValueError, match="parameter 'w' is a read-only array: train a copy"):
        optimiser.step(good, 0.1)
    w.data = w.data.astype(np.float32)
    with pytest.raises(ValueError, match="parameter 'w' is float32 .* create the optimiser after"):
        optimiser.step(good, 0.1)
    assert all(np.array_equal(a, b) for a, b in zip(state(), before, strict=True))


# --- data that is set after it was used ---------------------------------------------------------------------

def used():
    """A Tensor w, and what was computed from it: w^3 at 3, whose gradient is 27."""
    w = Tensor(np.array(3.0), requires_grad=True)
    return w, w * w * w


def test_the_gradient_of_weights_that_changed_is_refused():
    w, y = used()
    assert gradients(y, [w])[0] == 27

    def by_optimiser(w):
        AdamW({"w": w}).step([np.ones(())], 1.0)

    def in_place(w):
        w.data -= 1

    def by_setting(w):
        w.data = np.array(2.0)
    for change in (by_optimiser, in_place, by_setting):
        w, y = used()
        change(w)
        for walk in (y.backward, lambda y=y: gradients(y, [])):
            with pytest.raises(RuntimeError, match="data was set after it was used"):
                walk()
        assert w.grad is None
        (w * w).backward()                                  # what is computed now is right
        assert w.grad == 2 * w.data


@pytest.mark.parametrize("op, index", [
    (lambda x, i: x[i], np.array([0, 1])), (lambda x, i: x[i, 0], np.array([0, 1])), (lambda x, i: x[i], [0, 1]),
    (lambda x, i: x[i], np.array([True, True, False])), (ops.embedding, np.array([0, 1])),
    (lambda x, c: ops.where(c, x, 0.0), np.array([[True, False]] * 3)),
    (lambda x, i: ops.cross_entropy(x, i), np.array([0, 1, 0]))])
def test_an_index_or_a_condition_may_change_before_the_way_back(op, index):
    """The gradient is that of the op as it was computed."""
    x = Tensor(np.arange(1.0, 7.0).reshape(3, 2), requires_grad=True)
    expected, = gradients(ops.sum(op(x, index) * 2), [x])
    y = ops.sum(op(x, index) * 2)
    if isinstance(index, list):
        index[:] = [1] * len(index)
    else:
        index[...] = index.dtype != bool
    assert np.array_equal(gradients(y, [x])[0], expected)


def test_the_gradient_is_refused_whatever_sets_the_weights():
    def load(layer):
        layer.load_state_dict(layer.state_dict())
    for change in (load, lambda layer: layer.astype(np.float64), lambda layer: layer.to("cpu")):
        layer = Linear(2, 2, np.random.default_rng(0))
        y = ops.sum(layer(Tensor(np.ones((1, 2), np.float32))))
        change(layer)
        with pytest.raises(RuntimeError, match="data was set after it was used"):
            y.backward()


def test_the_data_of_a_computed_tensor_is_not_set():
    w, y = used()
    with pytest.raises(TypeError, match="the data of a computed Tensor is not set"):
        y.data = np.array(1.0)


def test_a_second_walk_and_leaves_that_are_none_are_refused():
    w, y = used()
    middle = w * 2
    with pytest.raises(ValueError, match="leaves must be Tensors that were not computed by ops"):
        gradients(middle * middle, [middle])
    y.backward()
    for walk in (y.backward, lambda: gradients(y, [w]), lambda: (y * 2).backward()):
        with pytest.raises(RuntimeError, match="freed by an earlier backward"):
            walk()
    assert w.grad == 27
    (zero,) = gradients(w * 2, [Tensor(np.ones(3), requires_grad=True)])
    assert np.array_equal(zero, np.zeros(3))                # y does not depend on it


# --- copies -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_leaf_of_its_own(copied):
    w = leaf(A)
    ops.sum(w * w).backward()
    twin = copied(w)
    assert twin.requires_grad and np.array_equal(twin.data, A) and np.array_equal(twin.grad, w.grad)
    assert not np.shares_memory(twin.data, w.data) and not np.shares_memory(twin.grad, w.grad)
    ops.sum(twin * w).backward()
    assert np.array_equal(twin.grad, 3 * A) and np.array_equal(w.grad, 3 * A)
    with pytest.raises(TypeError, match="a computed Tensor is not copied with its history"):
        copied(w * w)


def test_copies_of_a_module_and_its_optimiser_belong_together():
    layer = Linear(2, 2, np.random.default_rng(0))
    optimiser, ema = AdamW(layer.parameters()), EMA(layer.parameters())
    for twin, steps, average in (copy.deepcopy((layer, optimiser, ema)),
                                 pickle.loads(pickle.dumps((layer, optimiser, ema)))):
        before = layer.w.data.copy()
        steps.step([np.ones((2, 2), np.float32), np.ones(2, np.float32)], 0.1)
        average.step()
        assert np.array_equal(layer.w.data, before) and not np.array_equal(twin.w.data, before)
        assert not np.array_equal(average.average["w"], before) and np.array_equal(ema.average["w"], before)


# --- whole numbers ------------------------------------------------------------------------------------------

WHOLE = (np.int64, np.int8, np.uint8, np.array)


@pytest.mark.parametrize("kind", WHOLE)
def test_ops_take_any_integers(kind):
    x = leaf(np.random.default_rng(0).standard_normal((1, 4, 4, 4)))
    gamma, beta = leaf(np.ones(4)), leaf(np.zeros(4))
    w = leaf(np.random.default_rng(1).standard_normal((3, 3, 4, 2)))
    calls = [lambda i: ops.sum(x, i(1)), lambda i: ops.mean(x, (i(1), i(2))), lambda i: ops.sum(x, i(-1), True),
             lambda i: ops.maximum_of(x, i(3)), lambda i: ops.softmax(x, i(1)), lambda i: ops.log_softmax(x, i(1)),
             lambda i: ops.concat([x, x], i(1)), lambda i: ops.reshape(x, (i(4), i(16))),
             lambda i: x.reshape(i(4), i(16)), lambda i: x.transpose(i(0), i(2), i(1), i(3)), lambda i: x[i(0), i(2)],
             lambda i: conv.conv2d(x, w, None, i(1), i(1)), lambda i: conv.conv2d(x, w, None, i(2), i(0)),
             lambda i: conv.space_to_depth(x, i(2)), lambda i: conv.depth_to_space(x, i(2)),
             lambda i: conv.average_pool(x, i(2)), lambda i: conv.upsample_nearest(x, i(2)),
             lambda i: norm.group_norm(x, i(2), gamma, beta)]
    for call in calls:
        if kind is np.uint8 and call is calls[2]:
            continue                                        # has no -1
        got, right = call(kind), call(int)
        assert np.array_equal(got.data, right.data)
        for a, b in zip(gradients(ops.sum(got * got), [x]), gradients(ops.sum(right * right), [x]), strict=True):
            assert np.array_equal(a, b)


def test_a_small_integer_type_does_not_overflow():
    x, w = Tensor(np.ones((1, 1, 150, 1), np.float32)), Tensor(np.ones((1, 3, 1, 1), np.float32))
    assert np.array_equal(conv.conv2d(x, w, None, np.int8(1), np.int8(1)).data, conv.conv2d(x, w, None, 1, 1).data)


def test_what_is_whole():
    for number in (3, np.int8(3), np.uint64(3), np.array(3)):
        assert whole("n", number) == 3 and type(whole("n", number, 3, 3)) is int
    for other in (3.0, True, np.True_, np.float64(3), np.array(3.0), np.array([3]), "3", None, 3j, np.array(True)):
        with pytest.raises(ValueError, match="n must be a whole number, not "):
            whole("n", other)
    with pytest.raises(ValueError, match="n must be a whole number of at least 4, not 3"):
        whole("n", 3, 4)
    with pytest.raises(ValueError, match="n must be a whole number from 0 to 2, not 3"):
        whole("n", 3, 0, 2)
