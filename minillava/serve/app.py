"""The HTTP side: routes, who may ask, and answers as they are made.

Every mistake in a request is found before its status is sent. A later failure ends a stream with an
error event and a complete body, since clients would retry a cut connection.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from minillava.generate.engine import Failed, Token
from minillava.serve import completions, responses
from minillava.serve.metrics import Metrics
from minillava.serve.patience import Countdown
from minillava.serve.protocol import (
    SAFE_ID,
    ApiError,
    ChatRequest,
    TokenizeRequest,
    encode,
    error_body,
    read_request,
)
from minillava.serve.responses import ResponsesRequest
from minillava.serve.schema import TAKEN, TOLD, openapi
from minillava.serve.service import Chat, Service
from minillava.serve.static import is_page, page_routes

LOG = logging.getLogger("minillava.serve")

LARGE = 65_536
"""Bytes of a body, above which few are read at a time."""

HEADERS = 32_768
"""Bytes of all headers."""

COUNTED = "minillava.chat"
"""Where a request's scope has what was computed for it, if anything was, for the log."""

OPEN = ("/health", "/livez")
"""What needs no key: it tells nothing private. Nor do the files of the page, which asks for one."""


def build(service: Service) -> Starlette:
    """The application."""
    settings, metrics = service.settings, Metrics(service.engine)
    api, cors = Api(service, metrics), settings.cors
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/responses", api.responses, methods=["POST"]),
        Route("/v1/models", api.models, methods=["GET"]),
        Route("/v1/models/{name:path}", api.model, methods=["GET"]),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/health", api.health, methods=["GET"]),
        Route("/livez", api.livez, methods=["GET"]),
        Route("/metrics", api.metrics, methods=["GET"]),
        Route("/openapi.json", api.schema, methods=["GET"]),
        *(page_routes() if settings.page else ()),
    ]
    # pages of these other sites may ask, but their browsers send no cookie or key by themselves
    shared = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"]}
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: _http_error, ApiError: _api_error},
        middleware=[
            *([Middleware(CORSMiddleware, allow_origins=[*cors], **shared)] if cors else []),
            Middleware(Guard, keys=settings.keys, metrics=metrics, cors=cors),
            Middleware(KnownHost, hosts=settings.hosts),
        ],
    )
    app.router.redirect_slashes = False
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"cache-control": "no-store", **error.headers}
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the request is not read
    return Response(error.body(), error.status, headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself, as an error of ours."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        told = f"{request.method} is not taken here"
        found = ApiError(405, "method_not_allowed", told, headers=dict(error.headers or {}))
    else:
        told = "no such address; there is POST /v1/chat/completions, POST /v1/responses, "
        told += "GET /v1/models, POST /tokenize; GET /openapi.json has what they take"
        found = ApiError(404, "unknown_url", told)
    return await _api_error(request, found)


class KnownHost:
    """Starlette's check of the Host header, whose refusal is plain text, with an error of ours."""

    def __init__(self, app: Any, hosts: Sequence[str]):
        self.app, self.hosts = app, [*hosts]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        known = False

        async def passed(*_: Any) -> None:
            nonlocal known
            known = True

        async def dropped(message: Any) -> None:
            """Starlette's refusal."""

        check = TrustedHostMiddleware(passed, self.hosts, www_redirect=False)
        await check(scope, receive, dropped)
        if known:
            await self.app(scope, receive, send)
            return
        told = "the Host header names another machine (--allowed-host names further ones)"
        refused = await _api_error(Request(scope), ApiError(400, "host_not_allowed", told))
        await refused(scope, receive, send)


class Guard:
    """The outermost layer: gives the request an id, checks who may ask, and writes a line of the
    log. It is plain ASGI, since Starlette's base class hides that a client went away."""

    def __init__(self, app: Any, keys: Sequence[bytes], metrics: Metrics, cors: Sequence[str]):
        self.app, self.keys, self.metrics = app, keys, metrics
        self.cors = [origin.encode() for origin in cors]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        name = headers.get(b"x-request-id", b"").decode("latin-1")
        name = name if SAFE_ID.fullmatch(name) else f"req_{secrets.token_hex(12)}"
        started, status = time.monotonic(), 499  # of a client that went away

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", name.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            if refused := self._refused(scope["path"], headers, scope["headers"]):
                await (await _api_error(Request(scope), refused))(scope, receive, noting)
            else:
                await self.app(scope, receive, noting)
        except ClientDisconnect:
            status = 499
        except Exception:
            LOG.exception("%s failed", name)
            if status == 499:  # nothing is sent yet
                told = "something went wrong in the server; its log has the request's id"
                body = encode(error_body(500, "internal_error", told))
                await Response(body, 500, media_type="application/json")(scope, receive, noting)
        finally:
            seconds, route = time.monotonic() - started, route_of(scope["path"])
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            method = repr(scope["method"])[1:20].rstrip("'")
            chat: Chat | None = scope.get(COUNTED)
            tokens = "" if chat is None else chat.counts()
            LOG.info("%s %s %s %d %.0f ms%s", name, method, route, status, 1e3 * seconds, tokens)

    def _refused(self, path: str, headers: dict, given: Sequence) -> ApiError | None:
        """The error of a request that may not pass; None if it may."""
        if sum(len(name) + len(value) for name, value in given) > HEADERS:
            told = f"the headers have more than {HEADERS} bytes"
            return ApiError(431, "headers_too_large", told)
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if is_page(path):  # which others may link to
            return None
        foreign = origin is not None and place_of(origin) != host
        if (foreign or site == b"cross-site") and origin not in self.cors:
            told = "pages of other sites may not ask this server (--cors names those that may)"
            return ApiError(403, "origin_not_allowed", told)
        if not self.keys or path in OPEN:
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        right = [hmac.compare_digest(key.strip(), each) for each in self.keys]  # all, in equal time
        if scheme.lower() == b"bearer" and any(right):
            return None
        told = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        return ApiError(401, "invalid_api_key", told, headers={"www-authenticate": "Bearer"})


def place_of(origin: bytes) -> str | None:
    """The name and port in an Origin, as Host has them; None of what is no address."""
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower()
    except ValueError:  # such as http://[
        return None


def route_of(path: str) -> str:
    """The name of a route, for the log; always one of ours, whatever path was asked for."""
    if path.startswith("/v1/models"):
        return "/v1/models"
    if is_page(path):
        return "/"
    known = (*TAKEN, *TOLD, "/metrics", "/openapi.json")
    return path if path in known else "other"


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status, {"cache-control": "no-store"}, "application/json")


class Format(NamedTuple):
    """A format of requests and answers. prepare: f(service, asked, put) -> Chat; whole and stream:
    f(asked, chat, events), the answer."""

    kind: type
    prepare: Callable[..., Chat]
    whole: Callable[..., Awaitable[dict]]
    stream: Callable[..., AsyncIterator[bytes]]


CHAT = Format(ChatRequest, Service.prepare, completions.whole, completions.stream)
RESPONSES = Format(ResponsesRequest, responses.prepare, responses.whole, responses.stream)


class Mail:
    """Events on their way from the engine's thread to the event loop, which is woken once for all
    that come together: to wake it costs as much as the event."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.woken = loop, False
        self.left: deque[tuple[asyncio.Queue, tuple[int, Token | Failed]]] = deque()

    def send(self, events: asyncio.Queue, number: int, event: Token | Failed) -> None:
        """In the engine's thread."""
        self.left.append((events, (number, event)))
        if not self.woken and not self.loop.is_closed():
            self.woken = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self.woken = False  # first, so that what comes from now on wakes the loop again
        while self.left:
            events, found = self.left.popleft()
            events.put_nowait(found)


class Api:
    """The function of each route."""

    def __init__(self, service: Service, metrics: Metrics):
        self.service, self.counted = service, metrics
        self.max_body = service.settings.max_body
        self.body_timeout = service.settings.body_timeout
        # large bodies at once; small ones whose length is told never wait
        self.large = anyio.CapacityLimiter(8)
        self.mail: Mail | None = None  # of the loop that runs it

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": self.service.models()})

    async def model(self, request: Request) -> Response:
        name = self.service.model(request.path_params["name"])
        return _json(next(model for model in self.service.models() if model["id"] == name))

    async def health(self, request: Request) -> Response:
        status, body = self.service.health()
        return _json(body, status)

    async def livez(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.counted.text(), media_type="text/plain; version=0.0.4")

    async def tokenize(self, request: Request) -> Response:
        asked = await self._read(request, TokenizeRequest)
        return _json(await run_in_threadpool(self.service.tokenize, asked))

    async def schema(self, request: Request) -> Response:
        return _json(openapi())

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, CHAT)

    async def responses(self, request: Request) -> Response:
        return await self._answer(request, RESPONSES)

    async def _answer(self, request: Request, form: Format) -> Response:
        """Ask the engine, and answer in one of OpenAI's two formats."""
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()
        if self.mail is None or self.mail.loop is not loop:  # a test may serve the app once more
            self.mail = Mail(loop)
        put = partial(self.mail.send, events)
        self.service.check_room()  # before a body is read that would be refused
        asked = await self._read(request, form.kind)
        chat = await run_in_threadpool(form.prepare, self.service, asked, put)
        self.service.submit(chat)
        request.scope[COUNTED] = chat
        if asked.stream:
            return StreamingResponse(
                self._ended(chat, form.stream(asked, chat, events)),
                media_type="text/event-stream",
                headers={"cache-control": "no-store", "x-accel-buffering": "no"},
            )
        body = await self._unless_gone(request, chat, form.whole(asked, chat, events))
        return _json(body)

    async def _ended(self, chat: Chat, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A stream, at whose end, however it comes, nobody computes for it any more."""
        done = False
        try:
            async for part in parts:
                yield part
            done = True
        finally:
            self._leave(chat, done)

    async def _unless_gone(self, request: Request, chat: Chat, answer: Awaitable[dict]) -> dict:
        """The answer, unless the client goes away before. Raises ClientDisconnect then."""
        making = asyncio.ensure_future(answer)
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({making, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                raise ClientDisconnect
            return making.result()
        finally:
            self._leave(chat, making.done())
            making.cancel()
            leaving.cancel()

    def _leave(self, chat: Chat, done: bool) -> None:
        if not done:
            self.service.engine.cancel(chat.request)
            self.counted.cancelled.inc()
        self.counted.note(chat)

    async def _read(self, request: Request, kind: type) -> Any:
        """The body, as it must be. Raises ApiError."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            told = f"Content-Type is {media[:60] or 'missing'}, expected application/json"
            raise ApiError(415, "unsupported_media_type", told)
        length = int(request.headers.get("content-length", 0))  # h11 has seen that it is a number
        if length > self.max_body:
            raise self._too_large(length)
        # a body in chunks says no length, and may be a large one
        if length <= LARGE and "transfer-encoding" not in request.headers:
            return read_request(await self._body(request), kind)
        async with self.large:
            return await run_in_threadpool(read_request, await self._body(request), kind)

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        with anyio.CancelScope() as scope:
            limit = Countdown(self.body_timeout, scope.cancel)
            try:
                async for part in request.stream():
                    size += len(part)
                    parts.append(part)
                    if size > self.max_body:
                        raise self._too_large(size)
            finally:
                limit.cancel()
        if scope.cancelled_caught:
            told = f"the body did not arrive within {self.body_timeout:g} s"
            raise ApiError(408, "request_timeout", told)
        return b"".join(parts)

    def _too_large(self, size: int) -> ApiError:
        told = f"the body has {size} bytes or more, at most {self.max_body} are taken (--max-body)"
        return ApiError(413, "request_too_large", told)


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
