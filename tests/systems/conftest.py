"""What the tests of all systems share."""

import pytest
from support import small_systems

from minidiff.data.digits import CaptionedDigits


@pytest.fixture(scope="session")
def data() -> CaptionedDigits:
    """A few of MNIST's images."""
    return small_systems.data()
