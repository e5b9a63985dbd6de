"""docs/commands.md says what the parsers say, so no option changes its words, its default or its place unseen."""

from support import commands


def test_the_page_is_up_to_date():
    assert commands.PAGE.read_text(encoding="utf-8") == commands.page(), "run python -m tests.support.commands"
