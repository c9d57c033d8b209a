"""`bitbell serve`: the scheduler behind an HTTP interface in OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from importlib import resources
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from bitbell.serving.asking import Asked, Asker, Refused
from bitbell.serving.connections import connections
from bitbell.serving.metrics import Metrics
from bitbell.serving.scheduler import Busy, Event, Job, Scheduler

logger = logging.getLogger(__name__)
Read = Callable[[bytes], Asked]


@dataclass(frozen=True)
class Limits:
    """body_bytes: of a request. timeout: its seconds, waiting included; body_timeout: those until its body is there."""

    body_bytes: int = 1 << 20
    timeout: float = 300.0
    body_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("body_bytes", "timeout", "body_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


def build_app(scheduler: Scheduler, asker: Asker, metrics: Metrics, limits: Limits) -> FastAPI:
    """The application. It starts the scheduler and stops it; the scheduler must not run yet."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await run_in_threadpool(scheduler.stop)

    app = FastAPI(title="bitbell", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    service = _Service(scheduler, asker, metrics, limits)
    page = (resources.files("bitbell.serving") / "chat.html").read_text(encoding="utf-8")

    @app.get("/")
    async def home() -> Response:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> Response:
        state = {"running": scheduler.running, "waiting": scheduler.waiting, "slots": scheduler.engine.slots}
        status = "ok" if scheduler.alive else "stopped"
        return JSONResponse({"status": status, **state}, 200 if scheduler.alive else 503)

    @app.get("/metrics")
    async def counts() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.card()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != asker.name:
            raise Refused(
                f"model must be {asker.name!r}, got {name!r:.80}", param="model", status=404, code="model_not_found"
            )
        return JSONResponse(service.card())

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, "completions", asker.completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.answer(request, "chat", asker.chat)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def wrong_path(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path:.80}: {error.detail}"
        return JSONResponse(Refused(message, status=error.status_code).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse(Refused("the server failed; its log says why", status=500).body(), 500)

    return app


class _Answer:
    """The jobs of one request, and their events as they come."""

    def __init__(self, asked: Asked, timeout: float) -> None:
        self.asked = asked
        self.id, self.created = uuid.uuid4().hex, int(time.time())
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop, end = asyncio.get_running_loop(), time.monotonic() + timeout

        def listener(index: int) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody is there any more
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

            return tell

        seed = asked.sampling.seed
        self.jobs = [
            Job(
                prompt,
                asked.max_tokens,
                replace(asked.sampling, seed=seed + i % asked.n),
                listener(i),
                asked.stops,
                end,
            )
            for i, prompt in enumerate(prompt for prompt in asked.prompts for _ in range(asked.n))
        ]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Events until the last of the last job. Raises Refused where a job has failed."""
        left = len(self.jobs)
        while left:
            index, event = await self.events.get()
            if event.finish == "timeout":
                raise Refused("the request took longer than the server allows", status=504, code="timeout")
            if event.finish == "error":
                raise Refused(event.error or "the model failed", status=500, code="model_failed")
            if event.finish == "cancelled":  # by our end, or by the client's going, which nobody reads but the counts
                status = 503 if event.error else 499
                raise Refused(event.error or "the client has gone", status=status, code="cancelled")
            left -= event.finish is not None
            yield index, event

    def usage(self, made: list[int]) -> dict[str, int]:
        """Each prompt counts once, however many texts follow it."""
        before, new = sum(map(len, self.asked.prompts)), sum(made)
        return {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}


class _Service:
    def __init__(self, scheduler: Scheduler, asker: Asker, metrics: Metrics, limits: Limits) -> None:
        self.scheduler, self.asker, self.metrics, self.limits = scheduler, asker, metrics, limits
        self.created = int(time.time())

    def card(self) -> dict[str, Any]:
        """The model, as /v1/models shows it."""
        more = {"max_model_len": self.asker.positions, "chat": self.asker.template is not None}
        card = {"id": self.asker.name, "object": "model", "created": self.created, "owned_by": "bitbell", **more}
        return card | {"engine": self.scheduler.engine.name}

    async def answer(self, request: Request, endpoint: str, read: Read) -> Response:
        """One request from body to answer."""
        try:
            body = await self._body(request)
            answer = _Answer(await run_in_threadpool(read, body), self.limits.timeout)
            self._submit(answer)
            watch = asyncio.create_task(self._cancel_when_gone(request, answer))
            if answer.asked.stream:
                events = self._stream(answer, endpoint, watch)
                self.metrics.answered(endpoint, 200)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            try:
                result = await self._whole(answer, endpoint)
            finally:
                self._let_go(answer, watch)
        except Refused as error:
            self.metrics.answered(endpoint, error.status)
            raise
        self.metrics.answered(endpoint, 200)
        return JSONResponse(result)

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which other sites' pages cannot send unasked
            raise Refused(f"Content-Type must be application/json, got {kind!r:.80}", status=415)
        body, limit = bytearray(), self.limits.body_bytes
        too_large = Refused(f"the body must have at most {limit} bytes", status=413, code="body_too_large")
        if int(request.headers.get("content-length", 0)) > limit:  # h11 lets only digits through
            raise too_large
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise Refused(f"the body did not come within {self.limits.body_timeout:g} s", status=408) from None
        except ClientDisconnect:
            raise Refused("the client has gone", status=499, code="cancelled") from None
        return bytes(body)

    def _submit(self, answer: _Answer) -> None:
        try:
            self.scheduler.submit(answer.jobs)
        except Busy as error:
            refused = Refused(str(error), status=429, code="server_busy")
            refused.headers["Retry-After"] = str(error.retry_after)
            raise refused from None
        except RuntimeError as error:
            raise Refused(str(error), status=503) from None

    async def _cancel_when_gone(self, request: Request, answer: _Answer) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        for job in answer.jobs:
            self.scheduler.cancel(job)

    def _let_go(self, answer: _Answer, watch: asyncio.Task[None]) -> None:
        """However it ended: nobody listens any more."""
        watch.cancel()
        for job in answer.jobs:
            self.scheduler.cancel(job)

    async def _whole(self, answer: _Answer, endpoint: str) -> dict[str, Any]:
        texts, made, finish = [""] * len(answer.jobs), [0] * len(answer.jobs), [""] * len(answer.jobs)
        async for index, event in answer:
            texts[index] += event.text
            made[index], finish[index] = event.tokens, event.finish or ""
        choices = []
        for index, text in enumerate(texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if endpoint == "chat" else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish[index]})
        return self._frame(answer, endpoint, choices) | {"usage": answer.usage(made)}

    async def _stream(self, answer: _Answer, endpoint: str, watch: asyncio.Task[None]) -> AsyncIterator[str]:
        """Server-sent events: a chunk for every piece of text, [DONE] at the end."""
        made = [0] * len(answer.jobs)
        try:
            if endpoint == "chat":
                for index in range(len(answer.jobs)):
                    first = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield _sse(self._frame(answer, endpoint, [first], chunk=True))
            async for index, event in answer:
                made[index] = event.tokens
                delta = {"content": event.text} if event.text else {}
                said = {"delta": delta} if endpoint == "chat" else {"text": event.text}
                choice = {"index": index, **said, "logprobs": None, "finish_reason": event.finish}
                yield _sse(self._frame(answer, endpoint, [choice], chunk=True))
            if answer.asked.include_usage:
                yield _sse(self._frame(answer, endpoint, [], chunk=True) | {"usage": answer.usage(made)})
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield _sse(error.body())
        finally:
            self._let_go(answer, watch)

    def _frame(self, answer: _Answer, endpoint: str, choices: list[Any], chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion" if endpoint == "completions" else f"chat.completion{'.chunk' * chunk}"
        name = f"{'cmpl' if endpoint == 'completions' else 'chatcmpl'}-{answer.id}"
        return {"id": name, "object": kind, "created": answer.created, "model": self.asker.name, "choices": choices}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises OSError where the address cannot be had, ValueError for a port that is
    none."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be 0 (any free one) to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


class Server(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C; then takes no more, and gives what runs `grace` seconds to end.

    What runs after that is told so (503, or an error event), by way of the scheduler's end; uvicorn, which would break
    its connections off, waits a little longer. head_timeout, most_connections: see `connections`.
    """

    def __init__(
        self,
        app: FastAPI,
        scheduler: Scheduler,
        *,
        grace: float,
        head_timeout: float = 30.0,
        most_connections: int | None = None,
    ) -> None:
        http = connections(head_timeout=head_timeout, most=most_connections)
        config = uvicorn.Config(app, http=http, ws="none", log_level="warning", access_log=False)
        config.timeout_graceful_shutdown = math.ceil(grace + 10)
        super().__init__(config)
        self._scheduler, self._grace = scheduler, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn calls this at a signal."""
        super().handle_exit(sig, frame)
        timer = threading.Timer(self._grace, self._scheduler.stop)
        timer.daemon = True
        timer.start()


def run(server: Server, sock: socket.socket) -> None:
    """Serve on a socket, in the main thread, until a signal ends it."""
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[sock])  # raises the signal again at its end, which then does nothing
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
