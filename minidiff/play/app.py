"""The routes of `minidiff play`.

    GET  /, /static/NAME            the page and its files, and no others
    GET  /api/about                 systems, options, schedules, data sets
    GET  /api/result/KEY/RUN.png    a finished run as `minidiff sample` writes it; .gif is the way there
    POST /api/schedule              {schedule, T}: alpha_bar and SNR of a named schedule
    POST /api/draw                  {visitor, runs: [{system, prompt, count, seed, options}]}: one run, or two
    POST /api/attention             {visitor, result, run, picture, index}: index null is the mean over the steps
    POST /api/noise                 {visitor, schedule, T, data, index, seed}: data a name, or "drawn:KEY:RUN"
    POST /api/judge                 {visitor, points, T}: the laws of a schedule drawn by hand

The last four wait in the queue.  They are answered by JSON lines, an event each: waiting (and the place), started, then
their own, remark and error, whose message is one sentence.  When the connection closes, the job stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from minidiff.errors import UserError
from minidiff.input_files import read_file
from minidiff.play import attention, drawing, judging, noise
from minidiff.play.guard import Guard
from minidiff.play.jobs import FairQueue, Job, TooMany, failure, work_off
from minidiff.play.offer import MOST_SEED, Offer, fields, within

STATIC = Path(__file__).parent / "static"
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
         ".js": "text/javascript; charset=utf-8"}
LARGEST_STATIC = 1 << 20                                    # bytes of a file of the page
SEND_SECONDS = 30.0                                         # a reader that takes nothing for so long is gone
STOP_SECONDS = 5.0                                          # for the step that is being computed when the server stops


def make(offer: Offer, host: str = "127.0.0.1") -> Guard:
    """The ASGI application; `.queue` is its queue.  host: the address that the server is bound to."""
    page = Page(offer)
    routes = [Route("/", page.static), Route("/static/{name}", page.static), Route("/api/about", page.about),
              Route("/api/result/{key}/{file}", page.result),
              Route("/api/schedule", page.schedule, methods=["POST"])]
    routes += [Route(f"/api/{name}", page.job(events), methods=["POST"]) for name, events in
               {"draw": page.draw, "attention": page.attention, "noise": page.noise, "judge": page.judge}.items()]
    refusals = {UserError: _refuse, 404: _missing, 405: _missing, Exception: _failed}
    starlette = Starlette(routes=routes, lifespan=page.lifespan, exception_handlers=refusals)
    starlette.router.redirect_slashes = False
    app = Guard(starlette, host)
    app.queue = page.queue
    return app


class Page:
    """What the routes share: the files, the systems, the queue and the finished runs."""

    def __init__(self, offer: Offer):
        self.offer, self.queue, self.results = offer, FairQueue(), drawing.Results()
        # read once: a path in a request is only ever a key of this dict
        self.files = {path.name: read_file(path, LARGEST_STATIC) for path in STATIC.iterdir() if path.suffix in KINDS}

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        worker = threading.Thread(target=work_off, args=(self.queue,), name="minidiff play", daemon=True)
        worker.start()
        yield
        self.queue.close()
        await run_in_threadpool(worker.join, STOP_SECONDS)

    # --- routes that answer at once -----------------------------------------------------------------------

    async def static(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in self.files:
            return _missing(request)
        return Response(self.files[name], media_type=KINDS[Path(name).suffix])

    async def about(self, request: Request) -> Response:
        return JSONResponse(self.offer.about())

    async def result(self, request: Request) -> Response:
        match = re.fullmatch(r"([0-9])\.(png|gif)", request.path_params["file"])
        if not match:
            return _missing(request)
        drawn = self.results.get(request.path_params["key"], int(match[1]))
        make, kind = (drawing.as_png, "image/png") if match[2] == "png" else (drawing.as_gif, "image/gif")
        data = await run_in_threadpool(make, drawn)
        return Response(data, media_type=kind,
                        headers={"Content-Disposition": f'attachment; filename="picture.{match[2]}"'})

    async def schedule(self, request: Request) -> Response:
        asked = fields(await _json(request), "the request", schedule=str, T=int)
        return JSONResponse(judging.table(judging.named(asked["schedule"], asked["T"])))

    # --- routes that wait in the queue: a checked request -> the work -------------------------------------------

    def draw(self, asked: dict) -> Callable[[], Iterator[dict]]:
        asked = fields(asked, "the request", visitor=str, runs=list)
        if not 1 <= len(asked["runs"]) <= 2:
            raise UserError("one run is drawn at a time, or two side by side")
        runs = [self.offer.run(run) for run in asked["runs"]]
        return lambda: drawing.draw(self.offer, self.results, runs)

    def attention(self, asked: dict) -> Callable[[], Iterator[dict]]:
        every = isinstance(asked, dict) and asked.get("index", 0) is None
        asked = fields(asked | {"index": 0} if every else asked, "the request", visitor=str, result=str, run=int,
                       picture=int, index=int)
        drawn = self.results.get(asked["result"], asked["run"])
        return lambda: attention.maps(self.offer, drawn, asked["picture"], None if every else asked["index"])

    def noise(self, asked: dict) -> Callable[[], Iterator[dict]]:
        asked = fields(asked, "the request", visitor=str, schedule=str, T=int, data=str, index=int, seed=int)
        schedule = judging.named(asked["schedule"], asked["T"])
        index, seed = (within(name, asked[name], 0, MOST_SEED) for name in ("index", "seed"))
        if drawn := re.fullmatch(r"drawn:([\w-]+):([01])", asked["data"]):
            images = self.results.get(drawn[1], int(drawn[2]))
            pictures = images.x_t[-1]
            return lambda: noise.noised(schedule, lambda: (pictures[index % len(pictures)], images.run.prompt), seed)
        return lambda: noise.noised(schedule, lambda: noise.image_of(asked["data"], index), seed)

    def judge(self, asked: dict) -> Callable[[], Iterator[dict]]:
        asked = fields(asked, "the request", visitor=str, points=list, T=int)
        schedule = judging.by_hand(asked["points"], asked["T"])
        return lambda: judging.judged(schedule)

    def job(self, work_of: Callable[[dict], Callable[[], Iterator[dict]]]):
        """The route that checks a request by `work_of`, and answers with the events of a job."""
        async def route(request: Request) -> Response:
            asked = await _json(request)
            work = await run_in_threadpool(work_of, asked)
            if not re.fullmatch(r"[\w-]{1,64}", asked["visitor"]):
                raise UserError("visitor must be 1 to 64 letters, digits, _ and -")
            loop, events = asyncio.get_running_loop(), asyncio.Queue()

            def tell(event: dict | None) -> None:           # from the worker's thread
                with contextlib.suppress(RuntimeError):     # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(events.put_nowait, event)
            job = Job(asked["visitor"], work, tell)
            self.queue.submit(job)
            return Events(self.queue, job, events)
        return route


class Events(Response):
    """The events of a job as JSON lines.  The job is cancelled when the reader goes away."""

    def __init__(self, queue: FairQueue, job: Job, events: asyncio.Queue):
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]                  # it is not known
        self.queue, self.job, self.events = queue, job, events

    async def __call__(self, scope, receive, send) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.queue.cancel(self.job)
            await self.events.put(None)

        watch = asyncio.create_task(gone())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while (event := await self.events.get()) is not None:
                line = json.dumps(event, allow_nan=False).encode() + b"\n"
                await asyncio.wait_for(send({"type": "http.response.body", "body": line, "more_body": True}),
                                       SEND_SECONDS)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            pass                                            # the server closes the connection
        finally:
            self.queue.cancel(self.job)
            watch.cancel()


async def _json(request: Request) -> object:
    def no_constant(text: str):
        raise UserError(f"the request holds {text}, which is no number in JSON")

    def finite(text: str) -> float:
        if math.isinf(number := float(text)):
            raise UserError(f"the request holds the number {text[:40]}, which is too large")
        return number
    try:
        return json.loads(await request.body(), parse_constant=no_constant, parse_float=finite)
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError("the request is no JSON") from None


def _refuse(request: Request, error: Exception) -> Response:
    return JSONResponse(failure(str(error)), status_code=429 if isinstance(error, TooMany) else 400)


def _missing(request: Request, error: Exception | None = None) -> Response:
    status = getattr(error, "status_code", 404)
    return JSONResponse(failure("there is nothing here" if status == 404 else "this address takes another method"),
                        status_code=status)


def _failed(request: Request, error: Exception) -> Response:
    """A bug of ours; Starlette raises it again, and guard.py prints it."""
    return JSONResponse(failure("minidiff has failed at this: the terminal in which it runs says more"),
                        status_code=500)
