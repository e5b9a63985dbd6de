"""What all tests share: hypothesis without a clock, and no data, cache or network of the machine's own."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("minidiff", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("minidiff")


@pytest.fixture(autouse=True)
def _a_machine_of_its_own(monkeypatch, tmp_path_factory):
    """Each test has an empty cache folder and no MINIDIFF_DATA."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("MINIDIFF_DATA", raising=False)
