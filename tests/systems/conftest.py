"""What the tests of all systems share."""

import pytest
from support import small_systems

from minidiff.data.digits import Digits


@pytest.fixture(scope="session")
def data() -> Digits:
    """A few of MNIST's images."""
    return small_systems.data()
