"""A server of `minidiff play` in a thread, and a system whose steps a test lets through one by one."""

import contextlib
import http.client
import json
import threading
import time

import numpy as np
from support.toy import Toy, ToyConfig

from minidiff.diffusion.samplers import State
from minidiff.play import server
from minidiff.play.offer import Offer

SECONDS = 60                                                # more than any wait here should take


class Paced(Toy):
    """Its trajectory waits at each step while the gate is closed, and writes down what it did."""

    name, reads_captions = "paced", True
    gate, log = threading.Event(), []                       # log: (caption, step)
    gate.set()

    def trajectory(self, captions, *, steps=3, scale=1.0, best=1, seed=0, streams=None):
        noise = self.streams_for(captions, seed, streams).normal((28, 28, 1))
        if captions[0] == "bug":
            raise RuntimeError("a secret of the server")
        for step in range(steps + 1):
            self.log.append((captions[0], step))
            yield State(step, steps - step - 1, np.tanh(scale * noise), np.zeros_like(noise) if step else None)
            self.gate.wait(SECONDS)

    def sample(self, captions, *, steps=3, scale=1.0, best=1, seed=0, streams=None):
        *_, state = self.trajectory(captions, steps=steps, scale=scale, best=best, seed=seed, streams=streams)
        return state.x_t


def save_paced(folder) -> str:
    """The file of such a system; SYSTEMS must know it."""
    path = folder / "paced.safetensors"
    Paced(ToyConfig(), None, np.random.default_rng(0)).save(path)
    return str(path)


OPEN = []                                                   # answers and connections, for a test's end to close

PACED = "paced (paced.safetensors)"                         # its name on the page
TINY = "text-to-image (tiny.safetensors)"


@contextlib.contextmanager
def serving(offer: Offer, host: str = "127.0.0.1"):
    """The server of this offer at a free port."""
    sock = server.bind(host, 0)
    running = server.server_of(offer, host)
    thread = threading.Thread(target=running.run, args=([sock],), daemon=True)
    thread.start()
    try:
        wait_for(lambda: running.started)
        yield Client(sock.getsockname()[1], running.config.app)
    finally:
        Paced.gate.set()
        running.should_exit = True
        thread.join(SECONDS)
        sock.close()
        assert not thread.is_alive()


class Client:
    """Asks a server."""

    def __init__(self, port: int, app):
        self.port, self.app = port, app

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, method: str, path: str, body=None, headers=None) -> tuple[int, dict, bytes]:
        """(status, headers, body).  body: bytes, or a value to send as JSON."""
        answer, connection = self.open(method, path, body, headers)
        with contextlib.closing(connection):
            return answer.status, dict(answer.getheaders()), answer.read()

    def open(self, method: str, path: str, body=None, headers=None):
        """An answer that is not read yet, and its connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = ({"Content-Type": "application/json"} if body is not None else {}) | (headers or {})
        connection.request(method, path, body, headers)
        OPEN.extend([answer := connection.getresponse(), connection])
        return answer, connection

    def events(self, path: str, body) -> list[dict]:
        """The events of a job, to its end."""
        status, _, answer = self.ask("POST", f"/api/{path}", {"visitor": "me"} | body)
        assert status == 200, answer
        return [json.loads(line) for line in answer.splitlines()]

    def draw(self, *runs, **more) -> list[dict]:
        return self.events("draw", {"runs": [run_of(**run) for run in runs or ({},)]} | more)

    def start(self, prompt: str, visitor: str = "me", **run):
        """A drawing of the paced system that is not read yet: (answer, connection)."""
        body = {"visitor": visitor, "runs": [run_of(prompt=prompt, **run)]}
        answer, connection = self.open("POST", "/api/draw", body)
        assert answer.status == 200
        return answer, connection


def run_of(**changes) -> dict:
    return {"system": PACED, "prompt": "three", "count": 1, "seed": 1, "options": {}} | changes


def wait_for(happened, what: str = "") -> None:
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end, what or "it did not happen"
        time.sleep(0.01)


def last(events: list[dict]) -> dict:
    return events[-1]
