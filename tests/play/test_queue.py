"""Jobs run one at a time, the visitors in turn; a job that is stopped, or whose reader is gone, stops its work."""

import json
import threading
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.play import Paced, last, run_of, wait_for

from minidiff.play import jobs
from minidiff.play.jobs import FairQueue, Job, TooMany


def job(visitor: str, name: str = "", told=None) -> Job:
    told = [] if told is None else told
    made = Job(visitor, lambda: iter(()), told.append)
    made.name = name
    return made


def submitted(queue: FairQueue, *names: str) -> list[Job]:
    """Jobs called a1, a2, b1, ...: the letter is the visitor."""
    made = [job(name[0], name) for name in names]
    for one in made:
        queue.submit(one)
    return made


def taken(queue: FairQueue) -> list[str]:
    names = []
    while queue.order():
        names.append(queue.take().name)
    return names


# --- the queue itself ---------------------------------------------------------------------------------------

def test_visitors_take_turns():
    queue = FairQueue()
    submitted(queue, "a1", "a2", "a3", "b1", "c1", "c2")
    assert [j.name for j in queue.order()] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert taken(queue) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_who_was_served_goes_to_the_end():
    queue = FairQueue()
    submitted(queue, "a1", "a2", "b1")
    assert queue.take().name == "a1"
    submitted(queue, "c1", "a3")
    assert taken(queue) == ["b1", "a2", "c1", "a3"]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40))
def test_nobody_waits_for_two_jobs_of_another_visitor(visitors):
    """While a visitor's job waits, each other visitor is served at most once more than this one."""
    queue, count = FairQueue(), defaultdict(int)
    for visitor in visitors:
        count[visitor] += 1
        queue.submit(job(visitor, f"{visitor}{count[visitor]}"))
    foreseen, order = [j.name for j in queue.order()], taken(queue)
    assert order == foreseen and sorted(order) == sorted(f"{v}{i + 1}" for v in count for i in range(count[v]))
    for visitor in count:
        for other in count:
            served = {visitor: 0, other: 0}
            for name in order:
                served[name[0]] = served.get(name[0], 0) + 1
                if served[visitor] < count[visitor]:
                    assert served[other] <= served[visitor] + 1


def test_places_are_told_when_they_change():
    queue, told = FairQueue(), []
    submitted(queue, "a1", "b1")
    third = job("c", "c1", told)
    queue.submit(third)
    queue.take()
    queue.take()
    assert [event["place"] for event in told] == [2, 1] and queue.take() is third


def test_a_running_job_counts_as_before():
    queue, told = FairQueue(), []
    submitted(queue, "a1")
    queue.take()
    queue.submit(job("b", "b1", told))
    assert told == [{"event": "waiting", "place": 1}]


def test_a_cancelled_job_leaves_its_place():
    queue, told = FairQueue(), []
    first, _ = submitted(queue, "a1", "b1")
    queue.submit(job("c", "c1", told))
    queue.cancel(first)
    assert told[-1]["place"] == 1 and taken(queue) == ["b1", "c1"]


def test_a_visitor_and_all_together_may_not_wait_for_more(monkeypatch):
    monkeypatch.setattr(jobs, "MOST_OF_ONE", 2)
    monkeypatch.setattr(jobs, "MOST_WAITING", 3)
    queue = FairQueue()
    submitted(queue, "a1", "a2", "b1")
    with pytest.raises(TooMany, match="you have 2 requests waiting"):
        queue.submit(job("a"))
    with pytest.raises(TooMany, match="3 requests are waiting"):
        queue.submit(job("c"))


def test_a_closed_queue_ends_its_worker_and_cancels_all():
    queue = FairQueue()
    running, waiting = submitted(queue, "a1", "b1")
    assert queue.take() is running
    queue.close()
    assert running.cancelled.is_set() and waiting.cancelled.is_set() and queue.take() is None
    with pytest.raises(ValueError, match="stopping"):
        queue.submit(job("a"))


def test_a_cancelled_job_ends_at_its_next_event_and_runs_its_finally():
    done = []

    def work():
        try:
            for i in range(100):
                done.append(i)
                if i == 3:
                    queue.cancel(made)
                yield {"event": i}
        finally:
            done.append("closed")
    queue, told = FairQueue(), []
    made = Job("a", work, told.append)
    queue.submit(made)
    thread = threading.Thread(target=jobs.work_off, args=(queue,))
    thread.start()
    wait_for(lambda: told and told[-1] is None)
    queue.close()
    thread.join()
    assert done == [0, 1, 2, 3, "closed"]


# --- through the server --------------------------------------------------------------------------------------

def test_a_drawing_is_waited_for_started_drawn_and_kept(client):
    events = client.draw()
    assert [e["event"] for e in events] == ["waiting", "started", *["state"] * 4, "done"]
    assert [(e["step"], e["t"], e["index"]) for e in events[2:-1]] == [(0, 2, 0), (1, 1, 1), (2, 0, 2), (3, -1, 3)]


def test_another_visitor_is_served_after_one_job_of_the_first(client):
    Paced.gate.clear()
    mine = [client.start("mine 0")]
    wait_for(lambda: ("mine 0", 0) in Paced.log)
    mine += [client.start(f"mine {i}") for i in range(1, 4)]
    other = client.start("other", visitor="other")
    place = json.loads(other[0].readline())
    assert place == {"event": "waiting", "place": 2}        # after the one that runs and one of mine
    Paced.gate.set()
    for answer, _ in [*mine, other]:
        answer.read()
    assert list(dict.fromkeys(name for name, _ in Paced.log)) == ["mine 0", "mine 1", "other", "mine 2", "mine 3"]


def test_a_reader_that_goes_away_stops_its_work(client):
    Paced.gate.clear()
    answer, connection = client.start("gone", options={"steps": 200})
    wait_for(lambda: ("gone", 0) in Paced.log)
    answer.close()
    connection.close()
    # it may have ended already, before it came to the gate
    wait_for(lambda: (running := client.app.queue.running) is None or running.cancelled.is_set())
    Paced.gate.set()
    assert last(client.draw())["event"] == "done"
    assert len([step for name, step in Paced.log if name == "gone"]) <= 2


def test_a_waiting_job_whose_reader_goes_away_never_starts(client):
    Paced.gate.clear()
    first = client.start("first")
    wait_for(lambda: ("first", 0) in Paced.log)
    answer, connection = client.start("never")
    answer.close()
    connection.close()
    wait_for(lambda: not client.app.queue.order())
    Paced.gate.set()
    first[0].read()
    assert last(client.draw())["event"] == "done" and "never" not in dict(Paced.log)


@pytest.mark.parametrize("visitors", [50, 1], ids=["of fifty visitors", "of one visitor"])
def test_fifty_requests_at_once(client, visitors):
    ends = {}

    def ask(i: int) -> None:
        ends[i] = last(client.draw({"prompt": f"picture {i}"}, visitor=f"visitor{i % visitors}"))
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {end["event"] for end in ends.values()} == {"done"} and len({end["result"] for end in ends.values()}) == 50


def test_a_visitor_with_too_many_requests_gets_one_sentence(client, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_OF_ONE", 1)
    Paced.gate.clear()
    running = client.start("first")
    wait_for(lambda: ("first", 0) in Paced.log)
    waiting = client.start("second")
    status, _, answer = client.ask("POST", "/api/draw", {"visitor": "me", "runs": [run_of()]})
    assert status == 429 and json.loads(answer)["message"].startswith("you have 1 requests waiting")
    Paced.gate.set()
    for one, _ in (running, waiting):
        assert b"done" in one.read()


def test_a_bug_is_one_sentence_for_the_visitor_and_a_traceback_for_the_terminal(client, capsys):
    events = client.draw({"prompt": "bug"})
    assert last(events) == {"event": "error", "message": "minidiff has failed at this: the terminal in which it runs "
                                                         "says more"}
    assert "a secret of the server" not in json.dumps(events)
    assert "RuntimeError: a secret of the server" in capsys.readouterr().err
    assert last(client.draw())["event"] == "done"           # the worker is still there


def test_two_runs_advance_in_turn(client):
    events = [e for e in client.draw({"prompt": "first"}, {"prompt": "second"}) if e["event"] == "state"]
    assert [e["run"] for e in events] == [0, 1] * 4
    assert events[0]["x_t"] == events[1]["x_t"]             # the same noise
