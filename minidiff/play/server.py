"""The sockets and the time limits of a connection: uvicorn, set up for a page on this machine.

uvicorn limits how long a connection may be idle between two requests, and not how long a request's headers may take: a
client that sends a letter a minute would hold a connection for ever.  `Timed` closes it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import webbrowser
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from minidiff.errors import UserError
from minidiff.play.app import make
from minidiff.play.offer import Offer

PORT = 8137                                                 # where it is free
HEADER_SECONDS = 10.0
MOST_HEADERS = 16 << 10                                     # bytes
MOST_CONNECTIONS = 200


class Timed(H11Protocol):
    """Closes a connection whose request's headers are not complete in time."""

    late = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and (self.conn.trailing_data[0] or self.cycle is None):
            self._wait()                                    # a part of the headers
        elif self.late is not None:
            self.late.cancel()
            self.late = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.late is not None:
            self.late.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self.late is None:
            self.late = self.loop.call_later(HEADER_SECONDS, self.transport.close)


def bind(host: str, port: int | None) -> socket.socket:
    """A socket that listens.  port: None for PORT, or any free one where that is taken; UserError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in (port,) if port is not None else (PORT, 0):
        try:
            return socket.create_server((host, number), family=family)
        except OSError as error:
            reason = error.strerror or error
        except OverflowError:
            reason = "no such port"
    raise UserError(f"the page cannot be served at {host}, port {number} ({reason}): name another --port, or 0 for any "
                    "that is free")


def address(sock: socket.socket) -> str:
    """What a browser on this machine opens."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def server_of(offer: Offer, host: str) -> uvicorn.Server:
    """The server of the page, not started yet; its `config.app` is the application."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)       # guard.py prints what is a bug of ours
    config = uvicorn.Config(make(offer, host), http=Timed, ws="none", loop="asyncio", lifespan="on", log_config=None,
                            access_log=False, proxy_headers=False, server_header=False,
                            limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=5, timeout_graceful_shutdown=1,
                            h11_max_incomplete_event_size=MOST_HEADERS)
    return uvicorn.Server(config)


def serve(offer: Offer, host: str, sock: socket.socket, started: Callable[[], None]) -> None:
    """Serves the page until a signal stops it.  started: called when it can be opened."""
    server = server_of(offer, host)

    async def run() -> None:
        async def tell() -> None:
            while not server.started:
                await asyncio.sleep(0.02)
            started()
        telling = asyncio.create_task(tell())
        try:
            await server.serve(sockets=[sock])
        finally:
            telling.cancel()
    asyncio.run(run())


def open_browser(url: str) -> None:
    """Opens the page in a browser with windows; one in the terminal would take the terminal away."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if type(browser) is not webbrowser.GenericBrowser:
        threading.Thread(target=browser.open, args=(url,), daemon=True).start()
