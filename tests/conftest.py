"""What all tests share: hypothesis without a clock, no data, cache or network of the machine's own, and laws that fail
with their formula, their numbers and their seed."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings
from support import fake_cupy
from support.law_table import laws_of
from support.toy import Toy

from minidiff.systems import SYSTEMS


def _heed_signals() -> None:
    """A shell that starts the tests in the background makes them ignore Ctrl-C, and nohup SIGHUP: and with them every
    command that they start, which leaves ignored signals ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
            interrupts = name == "SIGINT"
            signal.signal(getattr(signal, name), signal.default_int_handler if interrupts else signal.SIG_DFL)


_heed_signals()

# "fixed" draws the same examples at every run, so that a test fails only because the code changed; CONTRIBUTING.md says
# when to draw others: pytest --hypothesis-profile=random
everywhere = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("random", derandomize=False, **everywhere)
settings.register_profile("fixed", derandomize=True, database=None, **everywhere)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _a_machine_of_its_own(monkeypatch, tmp_path_factory):
    """Each test has an empty cache folder and no MINIDIFF_DATA."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("MINIDIFF_DATA", raising=False)


@pytest.fixture
def toy():
    """The toy system, among the systems while a test runs."""
    SYSTEMS.register("toy", Toy)
    yield Toy
    SYSTEMS.unregister("toy")


def pytest_collection_modifyitems(items):
    """Tests of the kernels come last: their programs are compiled meanwhile, by one of the workers."""
    items.sort(key=lambda item: "kernels" in item.path.parts or "second_device" in item.path.name)
    if len(items) > 1000 and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        fake_cupy.compile_ahead()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failing law says what it claims and how to see it fail again; the numbers stand in its traceback."""
    report = yield
    if report.failed:
        for law in laws_of(item):
            report.sections.append((f"law {law.number}", "\n".join([
                f"formula    {law.formula}",
                f"source     {law.source}",
                f"tolerance  {law.tolerance}",
                f"again      python -m pytest '{item.nodeid}'{_seed_of(item)}",
            ])))
    return report


def _seed_of(item) -> str:
    """The options that give a hypothesis test its random examples again; fixed ones, and seeds among a test's
    parameters, need none."""
    seed = getattr(item.obj, "_hypothesis_internal_use_generated_seed", None)
    seed = item.config.getoption("--hypothesis-seed", None) if seed is None else seed
    return "" if seed is None else f" --hypothesis-profile=random --hypothesis-seed={seed}"
