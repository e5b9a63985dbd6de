"""`minidiff play` as a command: what it says, where it listens, and how it ends."""

import builtins
import os
import signal
import subprocess
import sys
import urllib.request
import webbrowser
from pathlib import Path

import pytest
from support.command_line import call

from minidiff.engine import backend
from minidiff.play import server
from minidiff.play.guard import is_loopback

ROOT = Path(__file__).parents[2]


def test_the_command_serves_until_ctrl_c(tmp_path):
    words = [sys.executable, "-m", "minidiff", "play", "--port", "0", "--no-browser"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                          env=environment) as process:
        line = process.stdout.readline()
        url = line.split()[4]
        assert url.startswith("http://127.0.0.1:") and "Ctrl-C" in line, process.stderr.read()
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert b"minidiff" in answer.read()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "minidiff: stopped\n"


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "h11"])
def test_without_the_packages_it_says_what_to_install(missing, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)
    asks = {missing, "uvicorn"}                             # the last imports h11
    for name in [name for name in sys.modules if name.startswith("minidiff.play") or name.split(".")[0] in asks]:
        monkeypatch.delitem(sys.modules, name)
    import minidiff
    monkeypatch.delattr(minidiff, "play", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert call("play") == 2
    said = capsys.readouterr().err
    assert missing in said and "pip install 'minidiff[play]'" in said and said.count("\n") == 1


@pytest.fixture
def served(monkeypatch):
    """What `serve` is called with, which then ends at once; and the addresses that a browser was sent to."""
    seen, opened = [], []

    def serve(offer, host, sock, started):
        seen.append((offer, host, sock.getsockname()))
        started()
    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr(server, "open_browser", opened.append)
    return seen, opened


def test_it_opens_the_page_and_listens_to_this_machine_alone(served, capsys):
    seen, opened = served
    assert call("play", "--port", 0) == 0
    (_, host, (address, port)), = seen
    assert host == address == "127.0.0.1" and opened == [f"http://127.0.0.1:{port}/"]
    printed = capsys.readouterr()
    assert opened[0] in printed.out and not printed.err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_draws_on_the_device_that_is_asked_for(device, served, monkeypatch):
    monkeypatch.setattr(backend, "check_device", lambda device: None)
    assert call("play", "--port", 0, "--device", device) == 0
    (offer, *_), = served[0]
    assert offer.device == device


def test_listening_elsewhere_is_said(served, capsys):
    seen, opened = served
    assert call("play", "--host", "0.0.0.0", "--port", 0, "--no-browser") == 0
    assert seen[0][2][0] == "0.0.0.0" and not opened
    printed = capsys.readouterr()
    assert "other machines that reach 0.0.0.0 can use this page" in printed.err and "http://127.0.0.1:" in printed.out


@pytest.mark.parametrize("words, said", [(("--port", "70000"), "from 0 to 65535"),
                                         (("--host", "no such host"), "cannot"),
                                         (("--model", "gone.safetensors"), "gone.safetensors"),
                                         (("--device", "tpu"), "tpu")])
def test_wrong_arguments_are_one_sentence(words, said, served, capsys):
    assert call("play", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not served[0]


def test_a_browser_in_the_terminal_is_not_opened(monkeypatch):
    opened = []

    class Windows(webbrowser.BackgroundBrowser):
        def open(self, url):
            opened.append(url)
    monkeypatch.setattr(webbrowser, "get", lambda: webbrowser.GenericBrowser("lynx"))
    server.open_browser("http://127.0.0.1:1/")
    assert not opened
    monkeypatch.setattr(webbrowser, "get", lambda: Windows("firefox"))
    server.open_browser("http://127.0.0.1:2/")
    from support.play import wait_for
    wait_for(lambda: opened == ["http://127.0.0.1:2/"])

    def none():
        raise webbrowser.Error("no browser")
    monkeypatch.setattr(webbrowser, "get", none)
    server.open_browser("http://127.0.0.1:3/")


@pytest.mark.parametrize("host, inside", [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
                                          ("0.0.0.0", False), ("::", False), ("192.168.1.7", False),
                                          ("box.lan", False)])
def test_loopback(host, inside):
    assert is_loopback(host) is inside


def test_addresses_for_a_browser():
    class Sock:
        def __init__(self, *name):
            self.getsockname = lambda: name
    assert server.address(Sock("0.0.0.0", 1)) == "http://127.0.0.1:1/"
    assert server.address(Sock("::", 2, 0, 0)) == "http://[::1]:2/" == server.address(Sock("::1", 2, 0, 0))
