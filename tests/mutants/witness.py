"""A pytest plugin that records the first failure and ensures that the tests use the copy of minidiff.

It is copied beside that copy and loaded by its name.  The environment variable MUTANTS_WITNESS names the output file.
"""

import json
import os
import sys
from pathlib import Path

import pytest

import minidiff

HERE = Path(__file__).resolve().parent


def pytest_configure(config):
    found = Path(minidiff.__file__).resolve().parent
    if found != HERE / "minidiff":
        pytest.exit(f"the tests would run on {found}, not on the copy with the bug", returncode=3)
    if "hypothesis" in sys.modules:
        from hypothesis import Phase, settings
        # every run draws the same examples; a counterexample is not shown, so it is not made smaller
        settings.register_profile("mutants", settings(), derandomize=True, database=None,
                                  phases=(Phase.explicit, Phase.generate))
        settings.load_profile("mutants")


def _write(**what):
    path = Path(os.environ["MUTANTS_WITNESS"])
    if not path.exists():
        path.write_text(json.dumps(what), encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        _write(test=item.nodeid, when=report.when, error=[c.__name__ for c in type(call.excinfo.value).__mro__])
    return report


def pytest_collectreport(report):
    if report.failed:
        _write(test=report.nodeid, when="collect", error=[])
