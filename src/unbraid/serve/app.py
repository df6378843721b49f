"""A bundle behind HTTP.

``POST /rank`` orders one user's candidates, ``/predict`` predicts rows of any users, ``/events`` appends to histories; what
``/events`` acknowledged is in the store, and in the next ``/rank`` of the user.  ``POST /reload`` and ``DELETE /users/USER``
need the token.  ``GET /schema``, ``/health``, ``/ready``, ``/metrics`` and ``/openapi.json`` say what is there.

Bodies are read here and not by the framework: their length is bounded while they arrive, their JSON is checked against types
that change with the bundle, and large ones are checked in a thread.  The event loop only waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException as AnyHTTPException

from unbraid.serve import answers, arrow
from unbraid.serve.engine import Engine, Loaded, log
from unbraid.serve.errors import RETRY, ApiError, of_store, refusing
from unbraid.serve.limits import JSON, Bodies, Watch, answer, kind_of, refused
from unbraid.serve.openapi import openapi
from unbraid.serve.store import StoreError


class _Any(StringConvertor):
    """The rest of a path, whatever is in it: Starlette's own stops at a line break."""

    regex = "(?s:.+)"


register_url_convertor("any", _Any())
INLINE = 1 << 15  # bytes of JSON that are checked in the loop: about half a millisecond
READY = 2.0  # seconds that the store has to say that it is there


def create_app(engine: Engine) -> FastAPI:
    """The service of an engine, which it closes when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app, api = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False), Api(engine)
    app.add_middleware(Watch, telemetry=engine.telemetry)
    app.add_exception_handler(ApiError, api.api_error)
    app.add_exception_handler(StoreError, api.store_error)
    app.add_exception_handler(AnyHTTPException, api.http_error)
    for method, path, endpoint in (
        ("POST", "/rank", api.rank), ("POST", "/predict", api.predict), ("POST", "/events", api.events),
        ("POST", "/reload", api.reload), ("DELETE", "/users/{user:any}", api.delete), ("GET", "/schema", api.schema),
        ("GET", "/health", api.health), ("GET", "/ready", api.ready), ("GET", "/metrics", api.metrics),
        ("GET", "/openapi.json", api.openapi),
    ):  # fmt: skip
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    return app


class Api:
    """The endpoints."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.settings = engine, engine.settings
        self.bodies = Bodies(engine.settings)

    # ------------------------------------------------------------------------------------------------------------- data
    async def rank(self, request: Request) -> Response:
        """Order one user's candidates."""

        async def work(loaded: Loaded, data: dict[str, Any]) -> Response:
            telemetry, size = self.engine.telemetry, len(data["candidates"])
            if size > self.settings.joined or data.get("explore"):
                return await self.engine.compute(answers.rank, loaded, data, telemetry)
            with refusing():
                found = await loaded.ranks(answers.request_of(loaded, data), size)
            return answers.ranked(loaded, found, telemetry)

        return await self._posted(request, "rank", work)

    async def predict(self, request: Request) -> Response:
        """Predict rows of any users."""

        async def work(loaded: Loaded, data: dict[str, Any]) -> Response:
            found = await loaded.rows(data["rows"], len(data["rows"]))
            if arrow.asked(request.headers.get("accept", "")):
                stream = await self.engine.compute(arrow.write, found)
                return Response(stream, headers={"X-Bundle": loaded.fingerprint}, media_type=arrow.MEDIA)
            return answer({"bundle": loaded.fingerprint, "predictions": {t: v.tolist() for t, v in found.items()}})

        return await self._posted(request, "predict", work, *((arrow.MEDIA,) if self.settings.arrow else ()))

    async def events(self, request: Request) -> Response:
        """Append events; they are in the store when this is answered."""

        async def work(loaded: Loaded, data: dict[str, Any]) -> Response:
            new = await self.engine.write(answers.append, self.engine, loaded, data)
            known = len(data["events"]) - new
            self.engine.telemetry.events.labels("new").inc(new)
            self.engine.telemetry.events.labels("known").inc(known)
            return answer({"new": new, "known": known})

        return await self._posted(request, "events", work)

    async def delete(self, request: Request, user: str) -> Response:
        """Remove everything of a user."""
        self._authorized(request)
        now = self.engine.current
        with refusing():
            code = now.ranker.user_hash(answers.user_of(user, now.shape.user.kind))
        return answer({"deleted": await self.engine.write(self.engine.store.delete, code)})

    async def _posted(
        self, request: Request, kind: str, work: Callable[[Loaded, dict[str, Any]], Awaitable[Response]], *kinds: str
    ) -> Response:
        """Read a body of JSON, or of one of these kinds, check it, and work on it in the time that there is."""
        seconds, whole = self.engine.telemetry.stage_seconds, False
        try:
            async with asyncio.timeout(self.settings.timeout):
                start = time.perf_counter()
                body = await self.bodies.read(request, *kinds)
                whole = True
                try:
                    seconds.labels("body").observe(time.perf_counter() - start)
                    with self.engine.admitted():
                        start = time.perf_counter()
                        loaded = self.engine.current
                        data = await self._checked(loaded, kind_of(request), kind, body)
                        seconds.labels("check").observe(time.perf_counter() - start)
                        return await work(loaded, data)
                finally:
                    self.bodies.done(body)
        except TimeoutError:
            if not whole:
                raise ApiError(
                    408, f"The body did not arrive within {self.settings.timeout:g} s.", headers={"Connection": "close"}
                ) from None
            raise ApiError(
                503, f"No answer within {self.settings.timeout:g} s. Send it again.", headers=RETRY
            ) from None

    async def _checked(self, loaded: Loaded, media: str, kind: str, body: bytearray) -> dict[str, Any]:
        if media != JSON:  # the first of them loads its library, which takes long
            return await self.engine.compute(loaded.wire.read_arrow, bytes(body))
        if len(body) <= INLINE:
            return loaded.wire.read(kind, bytes(body))
        return await self.engine.compute(loaded.wire.read, kind, bytes(body))

    # ------------------------------------------------------------------------------------------------------------ bundle
    async def reload(self, request: Request) -> Response:
        """Exchange the bundle for another that fits."""
        self._authorized(request)
        body = await self.bodies.read(request)
        self.bodies.done(body)
        folder = self.engine.current.wire.read("reload", bytes(body)).get("bundle")
        try:
            loaded = await asyncio.to_thread(self.engine.reload, Path(folder) if folder else None)
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise ApiError(409, str(error)[:1_000], "bundle") from error
        return answer({"bundle": loaded.fingerprint, "name": loaded.shape.name})

    def _authorized(self, request: Request) -> None:
        """Raises ApiError unless the request has the token."""
        if not self.settings.token:
            raise ApiError(
                403, "The service was started without a token (`--token`, UNBRAID_TOKEN): nobody may do this."
            )
        given = request.headers.get("authorization", "")
        # in constant time, or the time of the answer would tell how much of it is right
        if not hmac.compare_digest(given.encode(), f"Bearer {self.settings.token}".encode()):
            raise ApiError(
                401,
                "`Authorization: Bearer TOKEN` should have the token of the service.",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def schema(self, request: Request) -> Response:
        """What the bundle asks for and predicts."""
        return answer(answers.schema(self.engine.current, self.settings))

    async def openapi(self, request: Request) -> Response:
        """The description of all this."""
        return answer(openapi(self.engine.current, self.settings.arrow))

    # -------------------------------------------------------------------------------------------------------------- state
    async def health(self, request: Request) -> Response:
        """The process answers; why events are not kept, as the last write told."""
        return answer({"alive": True, "writes": self.engine.refuses})

    async def ready(self, request: Request) -> Response:
        """The bundle is loaded and the store answers."""
        try:
            if self.engine.closing:
                raise ApiError(503, "The service is ending.", headers=RETRY)
            async with asyncio.timeout(READY):
                await self.engine.ask(self.engine.store.ready)
        except TimeoutError:
            raise ApiError(503, f"The store did not answer within {READY:g} s.", headers=RETRY) from None
        return answer({"ready": True, "bundle": self.engine.current.fingerprint})

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self.engine.telemetry.text(), media_type="text/plain; version=0.0.4")

    # ------------------------------------------------------------------------------------------------------------- errors
    async def api_error(self, request: Request, error: Any) -> Response:
        """What is refused."""
        return refused(error, request.scope)

    async def store_error(self, request: Request, error: Any) -> Response:
        """What the store cannot do."""
        self.engine.telemetry.store_errors.labels(type(error).__name__).inc()
        log.error("request %s: store: %s", request.scope["request_id"], error)
        return refused(of_store(error), request.scope)

    async def http_error(self, request: Request, error: Any) -> Response:
        """What the framework refuses: unknown routes and methods."""
        message = {
            404: f"There is nothing at {request.url.path[:200]!r}. See /openapi.json.",
            405: f"{request.url.path[:200]!r} does not take {request.method[:20]}.",
        }.get(error.status_code, str(error.detail))
        return refused(ApiError(error.status_code, message, headers=error.headers), request.scope)
