"""Named parameters, and state dicts that are loaded completely or not at all."""

import numpy as np
import pytest

from minidiff.engine.tensor import Tensor
from minidiff.nn.layers import Dropout, GroupNorm, Linear, parameter
from minidiff.nn.module import Module


class Inner(Module):
    def __init__(self, rng):
        self.linear = Linear(2, 3, rng)
        self.scale = parameter((3,), 1, rng)
        self.dropout = Dropout(0.5)
        self.width = 3                                      # neither a parameter nor a part


class Outer(Module):
    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.first = Inner(rng)
        self.blocks = [Inner(rng), GroupNorm(4, 2)]
        self.missing = None
        self.shift = parameter((2, 2), 1, rng)

    def forward(self, x):
        return x


NAMES = ["shift", "first.scale", "first.linear.w", "first.linear.b", "blocks.0.scale", "blocks.0.linear.w",
         "blocks.0.linear.b", "blocks.1.gamma", "blocks.1.beta"]


def test_parameters_are_named_by_their_path():
    net = Outer()
    assert list(net.parameters()) == NAMES
    assert net.parameters()["blocks.0.linear.w"] is net.blocks[0].linear.w
    assert net.parameter_count() == 4 + 2 * (3 + 6 + 3) + 8
    assert [name for name, _ in net.modules()] == ["", "first.", "first.linear.", "first.dropout.", "blocks.0.",
                                                   "blocks.0.linear.", "blocks.0.dropout.", "blocks.1."]


def test_a_module_is_called_like_a_function():
    x = Tensor([1.0])
    assert Outer()(x) is x
    with pytest.raises(NotImplementedError, match="Inner has no forward"):
        Inner(np.random.default_rng(0))(x)


def test_train_and_eval_reach_every_part():
    net = Outer()
    assert not any(module.training for _, module in net.modules())
    assert net.train() is net and all(module.training for _, module in net.modules())
    assert net.eval() is net and not any(module.training for _, module in net.modules())


def test_state_dict_round_trip():
    a, b = Outer(1), Outer(2)
    state = a.state_dict()
    b.load_state_dict(state)
    for name, p in b.parameters().items():
        assert np.array_equal(p.data, a.parameters()[name].data) and p.requires_grad
        assert p.data is not state[name] and not np.shares_memory(p.data, a.parameters()[name].data)
    state["shift"][:] = 7                                   # a copy: it reaches neither module
    assert not (a.shift.data == 7).any() and not (b.shift.data == 7).any()


def test_loading_keeps_the_modules_own_dtype():
    net, state = Outer(1).astype(np.float64), Outer(2).state_dict()
    net.load_state_dict(state)
    assert all(p.dtype == np.float64 for p in net.parameters().values())
    assert np.array_equal(net.shift.data, state["shift"])


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("blocks.1.beta"), "parameter 'blocks.1.beta' is missing from the state given to Outer"),
    (lambda state: state.update(extra=np.ones(2)), "parameter 'extra' is unknown, and in the state given to Outer"),
    (lambda state: state.update({"blocks.0.linear.w": np.ones((3, 2))}),
     r"'blocks.0.linear.w' has shape \(3, 2\), and Outer takes \(2, 3\)"),
])
def test_a_state_that_does_not_match_sets_nothing(change, message):
    net, state = Outer(1), Outer(2).state_dict()
    before = net.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        net.load_state_dict(state)
    assert all(np.array_equal(p.data, before[name]) for name, p in net.parameters().items())


@pytest.mark.parametrize("wrong", [np.ma.masked_all, lambda shape: np.full(shape, "1"),
                                   lambda shape: np.full(shape, 1j), lambda shape: np.full(shape, None)],
                         ids=["masked", "text", "complex", "object"])
def test_a_state_of_other_things_than_numbers_sets_nothing(wrong):
    net, state = Outer(1), Outer(2).state_dict()
    before = net.state_dict()
    for name, w in state.items():
        with pytest.raises(TypeError, match="masked array|real numbers or bools"):
            net.load_state_dict(state | {name: wrong(w.shape)})
        assert all(np.array_equal(p.data, before[name]) for name, p in net.parameters().items())


def test_a_device_or_dtype_that_is_none_changes_nothing():
    net = Outer(1)
    for change in (lambda: net.to("gpu"), lambda: net.astype(np.int32), lambda: net.astype(complex)):
        with pytest.raises((ValueError, TypeError), match="device must be one of|dtype must be a floating dtype"):
            change()
    assert net.dtype == np.float32


def test_astype_and_to_keep_the_same_tensors():
    """An optimiser holds the Tensors; they must stay the module's."""
    net = Outer()
    held = net.parameters()
    net.shift.grad = np.ones((2, 2), np.float32)
    assert net.astype(np.float64) is net and net.to("cpu") is net
    assert all(p is held[name] and p.dtype == np.float64 and p.grad is None for name, p in net.parameters().items())


def test_device_and_dtype_are_those_of_the_first_parameter():
    net = Linear(2, 3, np.random.default_rng(0))
    assert (net.device, net.dtype) == ("cpu", np.float32)
    assert net.astype(np.float16).dtype == np.float16

    class Around(Module):
        def __init__(self, part):
            self.parts = [part]
    assert Around(net).dtype == np.float16 and Around(net).device == "cpu"
    with pytest.raises(AttributeError, match="Module has no parameters, and so no dtype"):
        Module().dtype  # noqa: B018
