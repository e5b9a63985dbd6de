"""What the tests of all systems share."""

import pytest
import small_systems

from minidiff.data.captioned import CaptionedDigits


@pytest.fixture(scope="session")
def data() -> CaptionedDigits:
    """A few of MNIST's images."""
    return small_systems.data()
