"""Who may ask, and how much: the checks that stand before every route.

    Host      must name this machine: a page elsewhere whose name is rebound to 127.0.0.1 still sends its own name
    Origin    must be the page's own: a form or script of another site may not post here
    body      at most 64 KB, in time
    headers   of every answer: no script, style or request from elsewhere, no frame around the page, no cache

It is plain ASGI, so that it also sees what no route takes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import sys
import traceback

MOST_BODY = 64 << 10                                        # bytes
BODY_SECONDS = 10.0
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff"),
           (b"referrer-policy", b"no-referrer"), (b"cross-origin-opener-policy", b"same-origin"),
           (b"cross-origin-resource-policy", b"same-origin"), (b"cache-control", b"no-store")]


class Refused(Exception):
    """A request that is refused: a status and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Guard:
    """The checks around an ASGI application."""

    def __init__(self, app, host: str = "127.0.0.1"):
        """host: the address that the server is bound to."""
        self.app, self.host = app, host

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)            # lifespan; the server has no web sockets
            return
        started = False

        async def guarded(message):
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message = message | {"headers": [*message.get("headers", []), *HEADERS]}
            await send(message)

        try:
            body = await self._checked(scope, receive)
            await self.app(scope, _given(body, receive), guarded)
        except Refused as refusal:
            await _answer(guarded, refusal.status, refusal.sentence)
        except Exception:                                   # a bug of ours: its traceback is for the terminal alone
            traceback.print_exc(file=sys.stderr)
            if not started:
                await _answer(guarded, 500, "minidiff has failed at this: the terminal in which it runs says more")

    async def _checked(self, scope, receive) -> bytes:
        """The body of a request that may be answered; Refused otherwise."""
        headers = _once(scope["headers"])
        host = headers.get("host", "")
        if not names_this_machine(host, self.host):
            raise Refused(403, f"the name {host[:60]!r} is not this machine's: open the address that minidiff play "
                               "printed")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "another site's page asked this, and only minidiff's own page may")
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refused(403, "another site's page asked this, and only minidiff's own page may")
        if scope["method"] in ("GET", "HEAD"):
            return b""
        if scope["method"] != "POST":
            raise Refused(405, "only GET and POST are answered here")
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "a request must be JSON, and its Content-Type application/json")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 18 or int(length) > MOST_BODY:
            raise Refused(413, f"a request may have {MOST_BODY:,} bytes, and this one is larger")
        try:
            return await asyncio.wait_for(_body(receive), BODY_SECONDS)
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds") from None


def _once(pairs: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by name; Refused where one that is checked is given twice."""
    headers: dict[str, str] = {}
    for name, value in pairs:
        key = name.decode("latin-1").lower()
        if key in headers and key in ("host", "origin", "content-type", "content-length", "sec-fetch-site"):
            raise Refused(400, f"the header {key} was given twice")
        headers[key] = value.decode("latin-1")
    return headers


async def _body(receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request was broken off")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MOST_BODY:
            raise Refused(413, f"a request may have {MOST_BODY:,} bytes, and this one is larger")
    return b"".join(parts)


def _given(body: bytes, receive):
    """receive() for the application: the body that was read, and then what happens to the connection."""
    given = False

    async def again():
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        while (message := await receive())["type"] != "http.disconnect":
            pass                                            # of a GET, whose body nobody reads
        return message
    return again


async def _answer(send, status: int, sentence: str) -> None:
    body = json.dumps({"event": "error", "message": sentence}).encode()
    await send({"type": "http.response.start", "status": status,
                "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                            (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})


# ---- names -------------------------------------------------------------------------------------------------

def names_this_machine(host: str, bound: str) -> bool:
    """Whether the Host header of a request names the machine, whatever its port (a tunnel may have another).

    Bound to loopback, only loopback's names do.  Else also every address as numbers, as no other site can have its name
    there, the machine's own name, and the name that the server was bound to.
    """
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.lower().rstrip(".")
    if name in ("localhost", "127.0.0.1", "[::1]"):
        return True
    if is_loopback(bound):
        return False
    if name in (bound.lower(), socket.gethostname().lower()):
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
