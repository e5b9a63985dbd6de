"""Tensor: an array that records how it was computed.  This file is the whole of reverse-mode differentiation.

    y = f(x_1, ..., x_n)                            an op computes y and its pullback
    pullback(dy) = (dy J_1, ..., dy J_n)            J_i = dy/dx_i, the Jacobians

For a loss L, dL/dx is the *cotangent* of x: an array of x's shape, written dx.  The pullback of an op is the linear map
that takes the cotangent of its result to the cotangents of its arguments.

`record` connects y with its parents and its pullback.  `Tensor.backward` walks from y to the leaves in reverse
topological order.  It keeps each cotangent in a local dict until all users of that tensor have added to it, and stores
the result in the `.grad` of the leaves that require it.

A pullback keeps its inputs and, if it needs it, the *array* of its output, never the output Tensor.  So the graph has
no reference cycles and is freed as soon as nobody refers to it.

A pullback reads the data of its inputs when it is called.  So it would be wrong if these were set again after the op,
as an optimiser does.  Each Tensor notes when its data was set, and `backward` refuses if an input is younger than the
result.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from itertools import count
from operator import attrgetter

import numpy as np

from minidiff.engine.backend import plain, to_device, xp_of
from minidiff.engine.cuda import weight_gradients
from minidiff.engine.cuda.cast import cast_all

# each thread and each asynchronous task has its own; parallel_map hands the caller's on
_recording = ContextVar("recording", default=True)
_moments = count()                                          # the order in which the Tensors' data was set


def no_grad() -> AbstractContextManager:
    """Within it, in this thread, ops only compute and record nothing."""
    return recording(False)


@contextmanager
def recording(on: bool = True) -> Iterator[None]:
    """Within it, in this thread, ops record how their results were computed, even inside no_grad()."""
    before = _recording.get()
    _recording.set(on)
    try:
        yield
    finally:
        _recording.set(before)


def is_recording() -> bool:
    return _recording.get()


class Tensor:
    """An array (of NumPy or CuPy) with respect to which gradients can be computed.

    data            the array; lists and numbers become float32, arrays keep their dtype.  It may be set: a new array,
                    or `x.data -= ...` in place.  (`x.data[i] = ...` is not noticed by a graph that has used x.)
    requires_grad   True for a leaf that gets a `.grad`; its dtype must be floating
    grad            None, or an array of data's shape and dtype: the sum over all `backward` calls since it
                    was last set to None
    """

    __slots__ = ("_data", "_moment", "requires_grad", "grad", "_parents", "_pullback", "__weakref__")
    __array_priority__ = 1000                               # so that ndarray * Tensor calls Tensor.__rmul__
    __array_ufunc__ = None

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise TypeError("data is a Tensor already: use it, or its .data, or .detach()")
        data = plain(data) if hasattr(data, "dtype") else plain(data).astype(np.float32)
        if requires_grad:
            if data.dtype.kind != "f":
                raise TypeError(f"requires_grad needs a floating dtype, and data is {data.dtype}")
            data = np.asarray(data) if isinstance(data, np.generic) else data       # which an optimiser can write into
        self._data, self._moment = data, next(_moments)
        self.requires_grad = requires_grad
        self.grad = None
        self._parents: tuple[Tensor, ...] = ()
        self._pullback: Callable | None = None

    def _set_data(self, data) -> None:
        if self._pullback is not None:
            raise TypeError("the data of a computed Tensor is not set: its gradient would be of other numbers")
        self._data, self._moment = plain(data), next(_moments)

    data = property(attrgetter("_data"), _set_data)

    def __reduce__(self) -> tuple:
        """Copies and pickles are leaves; TypeError for a computed Tensor, whose graph cannot be copied."""
        if self._pullback is not None:
            raise TypeError("a computed Tensor is not copied with its history: copy its .detach()")
        return _leaf, (self._data, self.requires_grad, self.grad)

    def backward(self, dy=None, *, keep_graph: bool = False) -> None:
        """Adds d(self . dy)/d(leaf) to the `.grad` of every leaf that self depends on and that requires it.

        dy          cotangent of self, of self's shape; 1 by default, if self has a single element
        keep_graph  False: the graph is freed during the walk, and a second walk raises RuntimeError.
                    True: the graph is kept, and a second walk adds the same gradients again.
        """
        for leaf, dx in _walk(self, dy, keep_graph):
            xp = xp_of(dx)
            leaf.grad = xp.array(dx, leaf.dtype) if leaf.grad is None else xp.asarray(leaf.grad + dx, leaf.dtype)

    def move(self, device: str) -> None:
        """Puts the array on "cpu" or "cuda", and forgets the gradient."""
        self.data, self.grad = to_device(self.data, device), None

    def detach(self) -> Tensor:
        """The same array, without its history."""
        return Tensor(self.data)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)

    def item(self) -> float:
        return self.data.item()

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __bool__(self) -> bool:
        raise TypeError("a Tensor has no truth value: compare its .data")

    def __eq__(self, other) -> bool:
        if other is self:
            return True
        raise TypeError("a Tensor is not compared with ==: compare its .data")

    __hash__ = object.__hash__              # by identity: a Tensor may be a key

    def __array__(self, *_, **__):
        raise TypeError("a Tensor is not converted to an array implicitly, which would lose its history: use .data")


def _leaf(data, requires_grad: bool, grad) -> Tensor:
    x = Tensor(data, requires_grad)
    x.grad = grad
    return x


def record(data, parents: Sequence[Tensor], pullback: Callable) -> Tensor:
    """The Tensor of an op's result.  pullback(dy) returns one cotangent (or None) for each parent.

    A returned cotangent is a new array, or dy, or a view of these; never an array that the op keeps, since the caller
    may write into the gradient that it becomes.
    """
    y = Tensor(data)
    if needs_gradient(*parents):
        y.requires_grad, y._parents, y._pullback = True, tuple(parents), pullback
    return y


def needs_gradient(*parents: Tensor) -> bool:
    """Whether `record` would keep an op of these: if not, the op may compute in a form that keeps nothing."""
    return is_recording() and any(parent.requires_grad for parent in parents)


def gradients(y: Tensor, leaves: Sequence[Tensor], dy=None) -> list:
    """[d(y . dy)/d(leaf) for each leaf], without any change of `.grad`; zeros if y does not depend on the leaf.

    It frees the graph during the walk.  Several threads may call it for graphs that share leaves.
    """
    if any(leaf._pullback is not None for leaf in leaves):
        raise ValueError("gradients: leaves must be Tensors that were not computed by ops")
    found = {id(leaf): dx for leaf, dx in _walk(y, dy, keep_graph=False)}
    halves = [id(leaf) for leaf in leaves if xp_of(leaf.data) is not np and id(leaf) in found
              and found[id(leaf)].dtype != leaf.dtype]
    if halves:                                              # of leaves that were cast together (ops.casts_on_gpu)
        found |= zip(halves, cast_all([found[i] for i in halves], np.float32), strict=True)

    taken: dict[int, list[tuple[int, int]]] = {}            # of each allocation, the bytes that have an owner, in order

    def take(a, whole: bool = False) -> bool:
        """Takes a's memory, or the whole allocation that it lies in, unless a part of it has an owner."""
        if xp_of(a) is not np:
            base, begin, end = a.data.mem.ptr, a.data.ptr, a.data.ptr + a.nbytes
        else:
            while isinstance(a.base, np.ndarray):           # a view
                a = a.base
            base, whole = id(a), True
        if whole:
            begin, end = 0, 2**64
        others = taken.setdefault(base, [])
        i = bisect(others, (begin, end))
        if (i and others[i - 1][1] > begin) or (i < len(others) and others[i][0] < end):
            return False
        insort(others, (begin, end))
        return True
    if hasattr(dy, "dtype"):
        take(dy, whole=True)                                # the caller's: it need not be contiguous

    def own(dx):
        # two leaves may have got the same array, or one the caller's dy itself: only these are copied
        if isinstance(dx, np.number):                       # the leaf has shape ()
            return np.array(dx)
        read_only = xp_of(dx) is np and not dx.flags.writeable                      # CuPy arrays never are
        return dx.copy() if read_only or not dx.flags.c_contiguous or not take(dx) else dx
    return [own(found[id(leaf)]) if id(leaf) in found else xp_of(leaf.data).zeros_like(leaf.data) for leaf in leaves]


def _walk(y: Tensor, dy, keep_graph: bool) -> list[tuple[Tensor, np.ndarray]]:
    """(leaf, cotangent) for each leaf that requires a gradient."""
    if not y.requires_grad:
        raise RuntimeError("backward: y depends on nothing that requires a gradient (or it was computed in no_grad)")
    xp = xp_of(y.data)
    if dy is None:
        if y.size != 1:
            raise ValueError(f"backward: dy is required if y has more than one element; y is {y.shape}")
        dy = xp.ones_like(y.data)
    dy = xp.asarray(plain(dy), dtype=y.dtype)
    if dy.shape != y.shape:
        raise ValueError(f"backward: dy must have y's shape {y.shape}, not {dy.shape}")

    order = _topological_order(y)
    if any(node._pullback is _released for node in order):
        raise RuntimeError("backward: this graph was freed by an earlier backward; pass keep_graph=True to the first")
    if any(x._moment > node._moment for node in order for x in node._parents):
        raise RuntimeError("backward: a Tensor's data was set after it was used, and its gradient would be of other "
                           "numbers: compute y again")
    with weight_gradients.waiting():                        # on a GPU, those of small layers are computed together
        return _walk_back(order, {id(y): dy}, keep_graph)


def _walk_back(order: list[Tensor], cotangents: dict, keep_graph: bool) -> list[tuple[Tensor, np.ndarray]]:
    """cotangents: id(tensor) -> the sum over its users so far."""
    leaves = []
    while order:
        node = order.pop()                                  # every user of node comes before node
        dy = cotangents.pop(id(node), None)
        if dy is None:                                      # all its users returned None
            continue
        if node._pullback is None:
            leaves.append((node, dy))
            continue
        dxs = _pulled_back(node, dy, cotangents)
        for x, dx in zip(node._parents, dxs, strict=True):
            if dx is not None and x.requires_grad:
                cotangents[id(x)] = _sum(cotangents.get(id(x)), dx)
        if not keep_graph:
            node._parents, node._pullback = (), _released
        del node, dy, dxs, x, dx                            # each would keep an array alive during the next pullback
    return leaves


def _sum(held, dx):
    """A cotangent of several users, of those so far (None for none) and one more."""
    if held is None:
        return dx
    weight_gradients.ready(held, dx)
    return held + dx                                        # += might write into a shared array


def _pulled_back(node: Tensor, dy, cotangents: dict) -> Sequence:
    """The cotangents of a node's parents.  A pullback that adds is given what its first parent has so far."""
    if node._pullback is unchanged:
        return node._pullback(dy)
    weight_gradients.ready(dy)
    if not getattr(node._pullback, "adds", False) or id(node._parents[0]) not in cotangents:
        return node._pullback(dy)
    held = cotangents.pop(id(node._parents[0]))
    weight_gradients.ready(held)
    return node._pullback(dy, held)


def adds(pullback: Callable) -> Callable:
    """Marks a pullback(dy, plus) that adds `plus`, None or an array, to the cotangent of its first argument."""
    pullback.adds = True
    return pullback


def unchanged(dy) -> tuple:
    """The pullback of an op whose argument has the cotangent of its result."""
    return dy,


def _topological_order(y: Tensor) -> list[Tensor]:
    """Every tensor on the paths from y to its leaves, parents before children; a loop, so the depth is unlimited."""
    order, seen, stack = [], {id(y)}, [(y, iter(y._parents))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if parent.requires_grad and id(parent) not in seen:
                seen.add(id(parent))
                stack.append((parent, iter(parent._parents)))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def _released(dy):
    """The pullback of a tensor whose graph was freed: a mark that is never called."""
