"""Arrays and Tensors of zeros for tests of error messages, and the comparison of a whole message."""

import re

import numpy as np
import pytest

from minidiff.engine.tensor import Tensor


def zeros(*shape, dtype=np.float32) -> Tensor:
    return Tensor(np.zeros(shape, dtype), requires_grad=True)


def check_message(error: type, message: str, call) -> None:
    """call() raises `error` with this message, from the first letter to the last."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
