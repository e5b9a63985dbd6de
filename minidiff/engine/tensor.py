"""Tensor: an array that remembers how it was made.  The whole of reverse-mode differentiation.

    y = f(x_1, ..., x_n)            an op computes y and, beside it, its pullback
    pullback(dy) = (dy J_1, ..., dy J_n),  J_i = dy/dx_i

`record` ties y to its parents and its pullback.  `Tensor.backward` walks from y to the leaves in reverse
topological order, keeping each cotangent in a local dict until the last user of that tensor has added to
it, and gives the leaves that asked for it their `.grad`.

A pullback captures its inputs and, where it needs it, the *array* of its output, never the output Tensor:
a graph without reference cycles is freed the moment its last reader lets go.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import numpy as np

from minidiff.engine.backend import xp_of

_mode = threading.local()                                   # each thread records, or not, for itself


def no_grad() -> AbstractContextManager:
    """Within it, in this thread, ops compute and remember nothing."""
    return recording(False)


@contextmanager
def recording(on: bool = True) -> Iterator[None]:
    """Within it, in this thread, ops remember how their results were made, even inside no_grad()."""
    before, _mode.off = is_recording(), not on
    try:
        yield
    finally:
        _mode.off = not before


def is_recording() -> bool:
    return not getattr(_mode, "off", False)


class Tensor:
    """An array (numpy or cupy) that a gradient can be taken to.

    data            the array; lists and numbers become float32, arrays keep their dtype
    requires_grad   True for a leaf that wants `.grad`; only floating dtypes may
    grad            None, or an array of data's shape and dtype: the sum over all `backward` calls since it
                    was last set to None
    """

    __slots__ = ("data", "requires_grad", "grad", "_parents", "_pullback", "__weakref__")
    __array_priority__ = 1000                               # so that ndarray * Tensor comes to Tensor.__rmul__
    __array_ufunc__ = None

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise TypeError("data is a Tensor already: use it, or its .data, or .detach()")
        if not hasattr(data, "dtype"):
            data = np.asarray(data, dtype=np.float32)
        if requires_grad and data.dtype.kind != "f":
            raise TypeError(f"requires_grad needs a floating dtype, and data is {data.dtype}")
        self.data = data
        self.requires_grad = requires_grad
        self.grad = None
        self._parents: tuple[Tensor, ...] = ()
        self._pullback: Callable | None = None

    def backward(self, dy=None, *, keep_graph: bool = False) -> None:
        """Adds d(self . dy)/d(leaf) to `.grad` of every leaf below self that requires it.

        dy          cotangent, of self's shape; may be left out (meaning 1) where self has one element
        keep_graph  False: what the graph holds is freed on the way down, and a second walk raises.
                    True: the graph stays, and a second walk adds the same gradients again.
        """
        for leaf, dx in _walk(self, dy, keep_graph):
            leaf.grad = dx.copy() if leaf.grad is None else leaf.grad + dx

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

    def __array__(self, *_, **__):
        raise TypeError("a Tensor does not turn into an array by itself, which would lose its history: use .data")


def record(data, parents: Sequence[Tensor], pullback: Callable) -> Tensor:
    """The Tensor of an op's result.  pullback(dy) returns one cotangent (or None) for each parent.

    A cotangent is an array of its own, or dy, or a view of these; never one that the op keeps, for it becomes a
    gradient, which whoever asked for it may write to.
    """
    y = Tensor(data)
    if is_recording() and any(parent.requires_grad for parent in parents):
        y.requires_grad, y._parents, y._pullback = True, tuple(parents), pullback
    return y


def gradients(y: Tensor, leaves: Sequence[Tensor], dy=None) -> list:
    """[d(y . dy)/d(leaf) for each leaf], touching no `.grad`; zeros where y does not depend on the leaf.

    It frees the graph on its way.  Several threads may call it for graphs that share leaves.
    """
    found = {id(leaf): dx for leaf, dx in _walk(y, dy, keep_graph=False)}

    def memory(a):
        if xp_of(a) is not np:
            return a.data.mem.ptr                           # where the view's whole piece of memory begins
        while isinstance(a.base, np.ndarray):               # a view
            a = a.base
        return id(a)
    taken = {memory(dy)} if hasattr(dy, "dtype") else set()

    def own(dx):
        # a pullback may give one array to two leaves, or the caller's dy itself: only then, for a copy costs a pass
        if isinstance(dx, np.number):                       # of a leaf of shape ()
            return np.array(dx)
        read_only = xp_of(dx) is np and not dx.flags.writeable                      # CuPy's arrays never are
        if read_only or not dx.flags.c_contiguous or memory(dx) in taken:
            dx = dx.copy()
        taken.add(memory(dx))
        return dx
    return [own(found[id(leaf)]) if id(leaf) in found else xp_of(leaf.data).zeros_like(leaf.data) for leaf in leaves]


def _walk(y: Tensor, dy, keep_graph: bool) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yields (leaf, cotangent) for each leaf that requires a gradient."""
    if not y.requires_grad:
        raise RuntimeError("backward: nothing that y was made from requires a gradient (or it was made in no_grad)")
    xp = xp_of(y.data)
    if dy is None:
        if y.size != 1:
            raise ValueError(f"backward: dy must be given where y has more than one element; y is {y.shape}")
        dy = xp.ones_like(y.data)
    dy = xp.asarray(dy, dtype=y.dtype)
    if dy.shape != y.shape:
        raise ValueError(f"backward: dy must have y's shape {y.shape}, not {dy.shape}")

    order = _topological_order(y)
    if any(node._pullback is _released for node in order):
        raise RuntimeError("backward: this graph was freed by an earlier backward; pass keep_graph=True to the first")
    cotangents = {id(y): dy}                                # dL/d(tensor), for those whose users are all done
    while order:
        node = order.pop()                                  # every user of node comes before node
        dy = cotangents.pop(id(node), None)
        if dy is None:                                      # all its users passed None
            continue
        if node._pullback is None:
            yield node, dy
            continue
        dxs, x, dx, held = node._pullback(dy), None, None, None
        for x, dx in zip(node._parents, dxs, strict=True):
            if dx is not None and x.requires_grad:
                held = cotangents.get(id(x))
                cotangents[id(x)] = dx if held is None else held + dx     # += would write into a shared array
        if not keep_graph:
            node._parents, node._pullback = (), _released
        del node, dy, dxs, x, dx, held                      # each would keep an array alive through the next pullback


def _topological_order(y: Tensor) -> list[Tensor]:
    """Every tensor that y needs a gradient through, parents before children; a loop, so that depth is no limit."""
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
    """The pullback of a tensor whose graph was freed."""
