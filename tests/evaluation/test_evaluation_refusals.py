"""What is not evaluated is refused, to the last letter, before anything is drawn."""

from types import SimpleNamespace

import pytest
from support.refusals import check_message

from minidiff.errors import UserError
from minidiff.evaluation import check_count, check_draws


def model(**changes) -> SimpleNamespace:
    right = {"name": "spy", "options": dict, "example": "03_clip.py", "reads_captions": True, "no_judge": ""}
    return SimpleNamespace(**right | changes)


@pytest.mark.parametrize("count", [3, 0, -1, 10_001])
def test_a_count_out_of_range(count):
    check_message(UserError, f"--images must be from 4, for precision and recall, to 10000, not {count}",
                  lambda: check_count(count))


@pytest.mark.parametrize("changes, sentence", [
    ({"options": lambda: None}, "spy draws no pictures of captions: examples/03_clip.py shows what it does"),
    ({"options": lambda: None, "example": None}, "spy draws no pictures of captions"),
    ({"reads_captions": False}, "spy draws without captions, so no judge can read whether they are followed"),
    ({"no_judge": "nobody knows"}, "spy has no judge: nobody knows")])
def test_a_system_that_no_judge_reads(changes, sentence):
    check_message(UserError, sentence, lambda: check_draws(model(**changes)))


def test_what_is_evaluated():
    check_draws(model())
    check_draws(SimpleNamespace(name="of a user", options=dict, example=None))      # it says nothing of a judge
    for count in (4, 10_000):
        check_count(count)
