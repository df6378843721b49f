"""What every request passes: an id, a count, a bound on its body; and nothing that fails unseen."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from unbraid.serve.errors import RETRY, ApiError

if TYPE_CHECKING:
    from unbraid.serve.settings import Settings
    from unbraid.serve.telemetry import Telemetry

log = logging.getLogger("unbraid.serve")
OWN_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
JSON = "application/json"
BODIES = 64  # of the largest size, that are held at once: a bound on memory, whoever sends slowly
DRAIN = 16, 2.0  # of a body that is too long: so many times the limit, and seconds, are read before it is refused
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]


def answer(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(to_json(content), status, headers, JSON)


def refused(error: ApiError, scope: Scope) -> Response:
    """The response of an error."""
    return answer(error.body(scope.get("request_id", "")), error.status, error.headers)


def kind_of(request: Request) -> str:
    """What a request says that its body is."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


class Watch:
    """Around the whole service: gives each request an id, counts and times it, turns what nobody caught into a 500.

    The id is the client's ``X-Request-ID`` where it is a short word; it stands in the answer's head, in the answer of an error
    and in the log.
    """

    def __init__(self, app: Any, telemetry: Telemetry) -> None:
        self.app, self.telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what is not HTTP passes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        own = given if OWN_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"], status, start = own, 0, time.perf_counter()

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", own.encode())]
            await send(message)

        try:
            await self.app(scope, receive, told)
        except ClientDisconnect:
            status = 499
        except Exception:
            log.exception("request %s failed", own)
            if status:  # the answer has begun: nothing better can be said
                raise
            error = ApiError(500, "The service failed. Its log has the reason beside the id of this request.")
            await refused(error, scope)(scope, receive, told)
        finally:
            route = getattr(scope.get("route"), "path", "unknown").replace(":any", "")
            self.telemetry.requests.labels(route, status).inc()
            self.telemetry.request_seconds.labels(route).observe(time.perf_counter() - start)


class Bodies:
    """Reads bodies, and bounds them one by one and together."""

    def __init__(self, settings: Settings) -> None:
        self.most, self.held = settings.max_body, 0

    async def read(self, request: Request, *kinds: str) -> bytearray:
        """The request's body of JSON, or of one of these kinds; its caller gives it back to `done`.

        Raises:
            ApiError: 415: it is of another kind by its head; 413: it is too long, by its head or as it arrives; 503: too much is
                held.
        """
        head = request.headers
        if kind_of(request) not in (JSON, *kinds):
            found = head.get("content-type", "none")[:80]
            raise ApiError(
                415, f"The body should be of `Content-Type: {' or '.join((JSON, *kinds))}`. Found {found!r}."
            )
        if head.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "The body should not be compressed (`Content-Encoding`).")
        length = head.get("content-length", "")
        body = bytearray()
        try:
            if length.isdecimal() and int(length[:20]) > self.most:
                await self._too_long(request)
            async for chunk in request.stream():
                body += chunk
                self.held += len(chunk)
                if len(body) > self.most:
                    await self._too_long(request)
                if self.held > BODIES * self.most:
                    raise ApiError(503, "Too many bodies arrive at once. Send it again.", headers=RETRY)
        except BaseException:
            self.done(body)
            raise
        return body

    def done(self, body: bytearray) -> None:
        """The body is no longer held."""
        self.held -= len(body)

    async def _too_long(self, request: Request) -> None:
        """Raises ApiError after some of the rest was read: a client that still sends would not see the answer."""
        (times, seconds), rest = DRAIN, 0
        try:
            if "expect" in request.headers:  # it waits for leave to send
                times = -1
            async with asyncio.timeout(seconds):
                stream = request.stream()
                while rest <= times * self.most and (chunk := await anext(stream, b"")):
                    rest += len(chunk)
        except (TimeoutError, RuntimeError):  # the stream was read to its end
            pass
        raise ApiError(
            413, f"The body should be at most {self.most:,} bytes. Send fewer candidates, rows or events at once.",
            headers={"Connection": "close"},
        )  # fmt: skip
