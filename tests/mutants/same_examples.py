"""A pytest plugin for the mutation tester: hypothesis draws the same few examples in every run, without shrinking.

It is copied beside the copy of minidiff and loaded by its name.
"""

from hypothesis import Phase, settings


def pytest_collection(session):
    settings.register_profile("mutants", settings(), derandomize=True, database=None, max_examples=30,
                              phases=(Phase.explicit, Phase.generate))
    settings.load_profile("mutants")
