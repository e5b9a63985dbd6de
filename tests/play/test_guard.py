"""Who may ask, and how much: names, origins, methods, sizes, time limits, and no file but the page's own."""

import json
import socket
import time

import pytest
from support.play import SECONDS, run_of, wait_for

from minidiff.play import app, guard, server

DRAW = {"visitor": "me", "runs": [run_of()]}
POST = b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def sentence(answer: tuple) -> str:
    """The message of a refusal: one sentence, of a few words, with nothing of Python in it."""
    message = json.loads(answer[2])["message"]
    assert 5 < len(message) < 300 and "\n" not in message and "Traceback" not in message
    return message


def raw(client, data: bytes, wait: float = SECONDS) -> bytes:
    """What the server sends back to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=wait) as connection:
        connection.sendall(data)
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
        return b"".join(parts)


# --- names and origins --------------------------------------------------------------------------------------

@pytest.mark.parametrize("host", ["evil.example", "evil.example:8137", "127.0.0.1.evil.example", "10.0.0.1", "[::2]:80",
                                  "localhost.evil.example", "", "127.0.0.1@evil.example", "evil.example#localhost"])
def test_another_name_is_refused(client, host):
    for method, path, body in (("GET", "/", None), ("POST", "/api/draw", DRAW)):
        answer = client.ask(method, path, body, {"Host": host})
        assert answer[0] == 403 and "is not this machine's" in sentence(answer)


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "LOCALHOST", "[::1]:8137"])
def test_this_machine_has_several_names_and_a_tunnel_any_port(client, host):
    assert client.ask("GET", "/", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("host, bound, good", [
    ("192.168.1.7:8137", "0.0.0.0", True), ("[fe80::1]:1", "::", True), ("evil.example", "0.0.0.0", False),
    ("box.lan", "box.lan", True), ("192.168.1.7", "127.0.0.1", False), ("127.0.0.1.evil.example", "0.0.0.0", False),
    (f"{socket.gethostname()}:80", "0.0.0.0", True), ("", "0.0.0.0", False)])
def test_bound_elsewhere_numbers_and_own_names_are_taken(host, bound, good):
    assert guard.names_this_machine(host, bound) is good


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Origin": "null"},
                                     {"Origin": "http://127.0.0.1:1"}, {"Sec-Fetch-Site": "cross-site"},
                                     {"Sec-Fetch-Site": "same-site"}])
def test_another_sites_page_is_refused(client, headers):
    for method, path, body in (("POST", "/api/draw", DRAW), ("GET", "/api/about", None)):
        answer = client.ask(method, path, body, headers)
        assert answer[0] == 403 and "another site's page" in sentence(answer)


def test_the_page_itself_may_ask(client):
    own = {"Origin": client.url.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert client.ask("POST", "/api/draw", DRAW, own)[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_of_another_site_could_send_these_and_they_are_refused(client, kind):
    answer = client.ask("POST", "/api/draw", DRAW, {"Content-Type": kind})
    assert answer[0] == 415 and sentence(answer)


# --- files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", [
    "/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/static/%2e%2e%2fapp.py", "/../../setup.py",
    "/static//etc/passwd", "/static/%2fetc%2fpasswd", "/static/..%5capp.py", "//etc/passwd", "/static/", "/static/.",
    "/static/app.py", "/static/play.css/", "/static/index.html%00", "/static/play.js%00.css", "/app.py", "/.git/config",
    "/static/%ff%fe", "/api/result/x/0.png/../../about"])
def test_no_other_file_is_served(client, path):
    answer = client.ask("GET", path)
    assert answer[0] in (400, 404) and b"import" not in answer[2] and b"root:" not in answer[2] and sentence(answer)


def test_the_files_of_the_page_are_served_and_bind_the_browser(client):
    for path in (app.STATIC).iterdir():
        status, headers, body = client.ask("GET", f"/static/{path.name}")
        assert status == 200 and body == path.read_bytes()
        assert headers["content-type"] == app.KINDS[path.suffix]
    status, headers, body = client.ask("GET", "/")
    assert status == 200 and body == (app.STATIC / "index.html").read_bytes()
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert "server" not in headers


def test_refusals_bind_the_browser_too(client):
    for answer in (client.ask("GET", "/nothing"), client.ask("GET", "/", headers={"Host": "evil.example"})):
        assert "content-security-policy" in answer[1]


def test_the_page_asks_nothing_of_other_machines():
    """No address of another machine stands in its files, but the name of SVG's elements."""
    for path in app.STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text, path
        assert "//" not in text.replace("// ", "").replace(" //", ""), path


# --- methods and bodies -------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, path", [("PUT", "/"), ("DELETE", "/static/play.js"), ("OPTIONS", "/api/draw"),
                                          ("PATCH", "/api/draw"), ("TRACE", "/"), ("GET", "/api/draw")])
def test_other_methods_are_refused(client, method, path):
    answer = client.ask(method, path)
    assert answer[0] == 405 and sentence(answer)


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff\xfe", b"[1, 2", b'"text"', b"null", b"17", b"[]", b"{}", b'{"visitor": "me"}', b"NaN",
    b'{"visitor": "me", "runs": NaN}', b"[" * 20_000, b'{"a":' * 10_000, b'{"visitor": "me", "runs": [1e999]}',
    b'{"visitor": 3, "runs": []}', b'{"visitor": "me", "runs": []}', b'{"visitor": "me", "runs": {}}',
    b'{"visitor": "me", "runs": [7]}', b'{"visitor": "me", "runs": [[]]}', b"9" * 5000,
    b'{"visitor": "me", "runs": [], "more": 1}', json.dumps({"visitor": "../x", "runs": [run_of()]}).encode(),
    json.dumps({"visitor": "v" * 65, "runs": [run_of()]}).encode(),
    json.dumps(DRAW | {"runs": [run_of()] * 3}).encode()],
    ids=lambda body: repr(body[:30]))
def test_a_malformed_body_is_one_sentence(client, body):
    for path in ("draw", "attention", "noise", "judge", "schedule"):
        answer = client.ask("POST", f"/api/{path}", body)
        assert answer[0] == 400 and sentence(answer)


def test_a_number_beyond_float64_is_named_as_it_was_sent(client):
    answer = client.ask("POST", "/api/draw", b'{"visitor": 1e400, "runs": []}')
    assert answer[0] == 400 and sentence(answer) == "the request holds the number 1e400, which is too large"


def test_a_huge_body_is_refused_before_it_is_read(client):
    answer = raw(client, POST + b"Content-Length: 1000000000000\r\n\r\n" + b"[" * 100)
    assert answer.startswith(b"HTTP/1.1 413") and b"65,536 bytes" in answer


def test_a_huge_body_that_hides_its_size_is_refused(client):
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    assert raw(client, head + 5 * chunk).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                                  b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
                                  b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000,
                                  b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
                                  b"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
                                  b"Content-Length: 3\r\n\r\n{}"], ids=range(8))
def test_what_is_no_http_is_answered_and_closed(client, data):
    assert raw(client, data).startswith((b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 505"))
    assert client.ask("GET", "/")[0] == 200


def test_an_origin_that_is_given_twice_is_refused(client):
    own = f"Origin: {client.url.rstrip('/')}\r\n"
    data = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n{own}{own}\r\n"
    assert raw(client, data.encode()).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost: loc"])
def test_headers_that_do_not_come_end_the_connection(client, data, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    assert raw(client, data) == b""


def test_the_second_request_of_a_connection_has_a_time_limit_too(client, monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", client.port), timeout=SECONDS) as connection:
        connection.sendall(f"GET /nothing HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n\r\n".encode())
        answer = connection.recv(1 << 16)
        while b"nothing here" not in answer:
            answer += connection.recv(1 << 16)
        start = time.monotonic()
        connection.sendall(b"GET / HT")
        assert answer.startswith(b"HTTP/1.1 404") and connection.recv(1 << 16) == b""
        assert time.monotonic() - start < 4                 # and not uvicorn's five seconds of an idle connection


def test_a_slow_answer_is_not_cut_off(client, monkeypatch):
    """The limit is of the headers, not of the work."""
    from support.play import Paced
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.1)
    Paced.gate.clear()
    answer, _ = client.start("slow")
    wait_for(lambda: ("slow", 0) in Paced.log)
    time.sleep(0.3)
    Paced.gate.set()
    assert b'"done"' in answer.read()


def test_a_body_that_does_not_come_is_refused(client, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    assert raw(client, POST + b"Content-Length: 9\r\n\r\n{").startswith(b"HTTP/1.1 408")


def test_a_bug_in_a_route_is_one_sentence(client, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("a secret of the server")
    monkeypatch.setattr(app.judging, "named", fails)
    answer = client.ask("POST", "/api/schedule", {"schedule": "cosine", "T": 10})
    assert answer[0] == 500 and "terminal" in sentence(answer) and b"secret" not in answer[2]
    said = []
    wait_for(lambda: said.append(capsys.readouterr().err) or "RuntimeError: a secret of the server" in "".join(said))


# --- sockets ------------------------------------------------------------------------------------------------

def test_a_port_that_is_taken_is_one_sentence_and_without_a_number_another_is_found():
    with server.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} .*--port"):
            server.bind("127.0.0.1", port)
        before, server.PORT = server.PORT, port
        try:
            with server.bind("127.0.0.1", None) as other:
                assert other.getsockname()[1] not in (0, port) and other.getsockname()[0] == "127.0.0.1"
        finally:
            server.PORT = before
    with pytest.raises(ValueError, match="cannot be served at 203.0.113.7"):
        server.bind("203.0.113.7", 0)
