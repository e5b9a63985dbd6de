"""A registry: entries by name, by place and by entry point, and one sentence where a name is wrong."""

import pytest

from minidiff.errors import UserError
from minidiff.registry import Registry


@pytest.fixture
def registry() -> Registry:
    return Registry("colour", "minidiff.no_such_group", {"pi": "math:pi"})


def test_an_entry_is_found_by_its_name_and_a_place_is_imported_when_asked_for(registry):
    registry.register("red", 1)
    assert registry["red"] == 1 and registry["pi"] == pytest.approx(3.14159, abs=1e-5)
    assert list(registry) == ["pi", "red"] and len(registry) == 2 and "red" in registry and "blue" not in registry
    registry.unregister("red")
    assert list(registry) == ["pi"]


def test_an_unknown_name_is_refused_with_the_names_that_there_are(registry):
    with pytest.raises(UserError, match="^there is no colour 'blue': it is one of pi; docs/architecture.md says how"):
        registry["blue"]
    with pytest.raises(UserError, match="there is no colour 'None'"):
        registry[None]


def test_a_name_is_given_once_and_can_stand_on_a_command_line(registry):
    for taken in ("pi",):
        with pytest.raises(ValueError, match="already a colour 'pi'"):
            registry.register(taken, 2)
    for wrong in ("", "two words", "a:b", "-x", "a/b", "a,b", 3):
        with pytest.raises(ValueError, match="takes letters, digits"):
            registry.register(wrong, 2)
    registry.register("dpm++2m", 2)


def test_entry_points_of_installed_packages_are_entries(monkeypatch):
    from importlib import metadata
    points = [metadata.EntryPoint("tau", "math:tau", "g"), metadata.EntryPoint("lost", "no_such_module:x", "g"),
              metadata.EntryPoint("own", "math:e", "g")]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "g" else [])
    registry = Registry("number", "g")
    registry.register("own", 1)
    assert set(registry) == {"tau", "lost", "own"} and registry["own"] == 1
    assert registry["tau"] == pytest.approx(6.28318, abs=1e-5)
    with pytest.raises(UserError, match="'lost' of the package entry point 'no_such_module:x' cannot be loaded"):
        registry["lost"]
