"""minidiff play: a local web page to draw pictures, and to try noise and schedules."""

from __future__ import annotations

import argparse

from minidiff.cli.arguments import add_command, add_device, whole
from minidiff.errors import UserError
from minidiff.terminal import say, show


def add(commands) -> None:
    """Adds the command and its arguments. commands: what `add_subparsers` returned."""
    p = add_command(commands, "play", play, help="Open a local web page: draw pictures, try noise and schedules.",
                    epilog="Everything is computed and served on this machine; nothing is sent elsewhere, and nothing "
                           "is downloaded. Ctrl-C ends it. docs/play.md shows the page.")
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                   help="the address to serve at; any other than this machine's own, such as 0.0.0.0, lets other "
                        "machines use the page")
    p.add_argument("--port", type=whole(0, 65535), metavar="N",
                   help="the port (else 8137, or any that is free where that is taken; 0 for any that is free)")
    p.add_argument("--no-browser", action="store_true", help="print the address, and open no browser")
    p.add_argument("--model", action="append", metavar="FILE",
                   help="offer this model, too: a model.safetensors, or a checkpoint of Stable Diffusion, as for "
                        "minidiff sample; repeat it for each model")
    add_device(p)


def play(args: argparse.Namespace) -> int:
    try:
        from minidiff.play import server
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("starlette", "uvicorn", "h11"):
            raise
        raise UserError(f"minidiff play needs the package {error.name}: pip install 'minidiff[play]'") from error
    from minidiff.play.guard import is_loopback
    from minidiff.play.offer import Offer

    offer = Offer(args.model or [], args.device)
    sock = server.bind(args.host, args.port)
    if not is_loopback(args.host):
        say(f"other machines that reach {args.host} can use this page, without a password; --host 127.0.0.1 keeps it "
            "to this one")
    url = server.address(sock)

    def started() -> None:
        show(f"the page is at {url} (Ctrl-C ends it)")
        if not args.no_browser:
            server.open_browser(url)
    with sock:
        server.serve(offer, args.host, sock, started)
    return 0
