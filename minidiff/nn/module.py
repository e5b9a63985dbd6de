"""Module: a function with named parameters.

A module's attributes that are Tensors are its parameters, and those that are Modules (or lists of Modules) are its
parts.  A parameter's name is the path to it, such as "down_blocks.0.block.conv1.w".  Nothing is registered:
`parameters()` looks at the attributes when it is called.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minidiff.engine.backend import check_device, device_of, is_floating, plain, to_device, to_numpy
from minidiff.engine.tensor import Tensor


class Module:
    """A network or a part of one.  Subclasses set attributes in __init__ and compute in `forward`."""

    training = False                                        # only dropout reads it

    def __call__(self, *args):
        return self.forward(*args)

    def forward(self, *args):
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(name, module) of this module and of all its parts, in the order of definition."""
        yield prefix, self
        for name, value in vars(self).items():
            parts = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
            for i, part in parts:
                if isinstance(part, Module):
                    yield from part.modules(f"{prefix}{name}." if i is None else f"{prefix}{name}.{i}.")

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by its name, in the order of definition; one that is in two places by its first name."""
        named, seen = {}, set()
        for prefix, module in self.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and id(value) not in seen:
                    seen.add(id(value))
                    named[prefix + name] = value
        return named

    def parameter_count(self) -> int:
        return sum(p.size for p in self.parameters().values())

    @property
    def device(self) -> str:
        """"cpu" or "cuda", where its parameters are.  AttributeError if it has none."""
        return device_of(self._first_parameter("device").data)

    @property
    def dtype(self) -> np.dtype:
        """The dtype that it computes in, of its first trained parameter.  AttributeError if it has no parameters."""
        return self._first_parameter("dtype").dtype

    def _first_parameter(self, asked: str) -> Tensor:
        measured = None
        for _, module in self.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor):
                    if value.requires_grad:
                        return value
                    measured = value if measured is None else measured
        if measured is not None:
            return measured
        raise AttributeError(f"{type(self).__name__} has no parameters, and so no {asked}")

    def train(self, mode: bool = True) -> Module:
        for _, module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        return self.train(False)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters, on the CPU."""
        return {name: to_numpy(p.data).copy() for name, p in self.parameters().items()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Sets all parameters, converted to this module's dtypes.

        Raises ValueError, and sets none, if names or shapes do not match.
        """
        parameters, new = self.parameters(), {}
        for name in [*parameters, *state]:
            if name not in state or name not in parameters:
                where = "is missing from" if name in parameters else "is unknown, and in"
                raise ValueError(f"state: parameter {name!r} {where} the state given to {type(self).__name__}")
            if np.shape(state[name]) != parameters[name].shape:
                raise ValueError(f"state: {name!r} has shape {np.shape(state[name])}, and "
                                 f"{type(self).__name__} takes {parameters[name].shape}")
        for name, p in parameters.items():
            new[name] = to_device(np.array(plain(state[name]), dtype=p.dtype), device_of(p.data))
        for name, p in parameters.items():                  # all of them, now that none can fail
            p.data = new[name]

    def astype(self, dtype) -> Module:
        """Converts what is trained in place, for instance to float64 for gradient checks; measured numbers stay."""
        dtype = np.dtype(dtype)
        if not is_floating(dtype):
            raise TypeError(f"dtype must be a floating dtype, such as float16, not {dtype}")
        for p in self.parameters().values():
            if p.requires_grad:
                p.data, p.grad = p.data.astype(dtype), None
        return self

    def to(self, device: str) -> Module:
        """Moves all parameters to "cpu" or "cuda" in place."""
        check_device(device)
        for p in self.parameters().values():
            p.move(device)
        return self
