"""One job at a time, and the visitors in turn: a fair queue, the thread that works it off, and cancellation.

    visitors  A B C       each has a queue of its own
    order     A1 B1 C1 A2 B2 ...       whoever was served goes to the end of the ring

One picture already uses all cores, so jobs run one after another.  A visitor with fifty jobs delays another visitor's
first job by one of them, not by fifty.

A job is an iterator of events (dicts).  The thread advances it event by event, and closes it at the next event after
`cancel`: a run of a sampler ends within a step.
"""

from __future__ import annotations

import sys
import threading
import traceback
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from minidiff.errors import UserError, is_of_gpu

MOST_WAITING = 256                                          # jobs, of all visitors
MOST_OF_ONE = 64                                            # jobs that one visitor has waiting


class TooMany(UserError):
    """The queue is full."""


class Job:
    """Work that was asked for.  `tell` receives its events, in the worker's thread or in that of a submit or cancel."""

    def __init__(self, visitor: str, work: Callable[[], Iterator[dict]], tell: Callable[[dict | None], None]):
        """work: called when its turn comes.  tell: of each event, and of None at the end."""
        self.visitor, self.work, self.tell = visitor, work, tell
        self.cancelled = threading.Event()


class FairQueue:
    """The jobs of all visitors.  Its methods may be called from any thread."""

    def __init__(self):
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()     # the next visitor first
        self._changed = threading.Condition()
        self._closed = False
        self.running: Job | None = None

    def submit(self, job: Job) -> None:
        """Adds a job and tells it its place; TooMany where there are too many already."""
        with self._changed:
            if self._closed:
                raise UserError("minidiff play is stopping")
            of_visitor = self._waiting.get(job.visitor, ())
            if len(of_visitor) >= MOST_OF_ONE:
                raise TooMany(f"you have {len(of_visitor)} requests waiting: wait until some are done")
            if sum(map(len, self._waiting.values())) >= MOST_WAITING:
                raise TooMany(f"{MOST_WAITING} requests are waiting: try again in a while")
            self._waiting.setdefault(job.visitor, deque()).append(job)
            self._tell_places()
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Takes the job out of the queue, or stops it at its next event if it is running."""
        with self._changed:
            job.cancelled.set()
            of_visitor = self._waiting.get(job.visitor)
            if of_visitor and job in of_visitor:
                of_visitor.remove(job)
                if not of_visitor:
                    del self._waiting[job.visitor]
                self._tell_places()

    def order(self) -> list[Job]:
        """The waiting jobs in the order in which they will run: the first of every visitor, the second, ..."""
        with self._changed:
            rounds = max(map(len, self._waiting.values()), default=0)
            return [jobs[i] for i in range(rounds) for jobs in self._waiting.values() if i < len(jobs)]

    def take(self) -> Job | None:
        """Waits for the next job; None once the queue is closed."""
        with self._changed:
            self.running = None
            self._tell_places()
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            visitor, jobs = self._waiting.popitem(last=False)
            self.running = jobs.popleft()
            if jobs:
                self._waiting[visitor] = jobs               # at the end of the ring
            self._tell_places()
            return self.running

    def close(self) -> None:
        """Cancels all jobs; `take` gives None from now on."""
        with self._changed:
            self._closed = True
            for job in [*self.order(), *([self.running] if self.running else [])]:
                job.cancelled.set()
            self._waiting.clear()
            self._changed.notify_all()

    def _tell_places(self) -> None:
        """Tells each waiting job how many will be done before it, the running one included, where that has changed."""
        ahead = 1 if self.running else 0
        for place, job in enumerate(self.order(), start=ahead):
            if getattr(job, "place", None) != place:
                job.place = place
                job.tell({"event": "waiting", "place": place})


def work_off(queue: FairQueue) -> None:
    """Runs the jobs until the queue is closed; the target of a thread."""
    while (job := queue.take()) is not None:
        for event in _events(job):
            job.tell(event)
        job.tell(None)


def _events(job: Job) -> Iterator[dict]:
    """The job's events until it ends or is cancelled; an exception becomes its last event, one sentence."""
    try:
        yield {"event": "started"}
        events = job.work()
        try:
            while not job.cancelled.is_set():
                event, remarks = _next(events)
                yield from remarks
                if event is None:
                    break
                yield event
        finally:
            events.close()                                  # runs its `finally`, and frees its arrays
    except UserError as error:
        yield failure(str(error))
    except MemoryError:
        yield failure("there is not enough memory for this: ask for fewer or smaller pictures")
    except Exception as error:
        if is_of_gpu(error):
            yield failure("the GPU failed: start minidiff play again")
        else:                                               # a bug of ours
            traceback.print_exc(file=sys.stderr)
            yield failure("minidiff has failed at this: the terminal in which it runs says more")


def _next(events: Iterator[dict]) -> tuple[dict | None, list[dict]]:
    """The next event, and the remarks on the way to it, such as that a caption is too long to be read whole."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        event = next(events, None)
    return event, [{"event": "remark", "message": str(w.message)} for w in said if issubclass(w.category, UserWarning)]


def failure(sentence: str) -> dict:
    return {"event": "error", "message": sentence}
