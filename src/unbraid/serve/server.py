"""A service as a process: it binds, loads, answers, looks for newer bundles, and ends what it began when it is told to end.

SIGTERM (or ctrl+C): no new connections; what is in flight is answered, in at most the time that a request may take; the
store is closed; the exit code is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from unbraid.serve.app import create_app
from unbraid.serve.engine import Engine, fingerprint, newest
from unbraid.serve.errors import ApiError
from unbraid.serve.patience import Patient
from unbraid.serve.settings import Settings
from unbraid.serve.shape import Shape, shape_of
from unbraid.serve.store import open_store

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("unbraid.serve")
LOOK = 2.0  # seconds between looks at the watched folder
KEEP = 30  # seconds that an idle connection is kept
HEAD = 10.0  # seconds that a new connection has to send its first head


class Protocol(H11Protocol):
    """HTTP/1.1, refusing in the service's own format, and not waiting for ever for a first head."""

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        super().connection_made(transport)
        self.loop.call_later(HEAD, self._no_head)

    def _no_head(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        body = json.dumps(ApiError(400, msg).body("")).encode()
        head = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=head, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._say = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets=sockets)
        self._say()


def build(
    bundle: Path, address: str, settings: Settings, *, folder: Path | None = None, cache_bytes: int = 512 << 20
) -> tuple[FastAPI, Engine]:
    """The service of a bundle and a store.

    Args:
        address: of the store, as `open_store` reads it; folder: where joined tables are read from; cache_bytes: for histories.

    Raises:
        StoreError: the store cannot be opened; ValueError, OSError: the bundle cannot be loaded.
    """
    import torch

    from unbraid.serve.together import JoiningRanker

    torch.set_num_threads(1)  # requests run beside each other; two threads on one of them would fight with those
    store = Patient(open_store(address))

    def load(path: Path) -> tuple[JoiningRanker, Shape]:
        ranker = JoiningRanker(path, store, folder=folder, cache_bytes=cache_bytes)
        return ranker, shape_of(ranker)

    try:
        engine = Engine(load, bundle, store, settings)
    except BaseException:
        store.close()
        raise
    return create_app(engine), engine


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: whoever asks while the bundle is loaded is refused and not kept waiting.

    Raises:
        OSError: the address is taken, or not this machine's.
    """
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    bound = socket.socket(family, kind, proto)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    return bound


def run(app: Any, engine: Engine, bound: socket.socket, *, watch: Path | None = None) -> bool:
    """Serve until a signal; whether everything in flight could be ended.

    Args:
        bound: of `bind`; watch: a folder whose newest bundle is loaded whenever there is another.
    """
    host, port = bound.getsockname()[:2]
    ends = threading.Event()

    def started() -> None:
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serving  {where}   bundle {engine.current.fingerprint} ({engine.current.shape.name})", flush=True)
        if watch is not None:
            threading.Thread(target=look, args=(engine, watch, ends), name="watch", daemon=True).start()

    config = uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=KEEP, timeout_graceful_shutdown=math.ceil(engine.settings.timeout) + 1,
    )  # fmt: skip
    server = Server(config, started)
    try:
        with _quiet_signals():
            asyncio.run(server.serve(sockets=[bound]))
    finally:
        ends.set()
    return not engine.stuck


@contextlib.contextmanager
def _quiet_signals() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when all is done: here that is no error."""
    handlers = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)


def look(engine: Engine, folder: Path, ends: threading.Event, every: float = LOOK) -> None:
    """Load the newest bundle of a folder whenever it is another than at the last look.

    A bundle that was refused, or put back by ``/reload``, is not loaded again until a newer one is there.
    """
    seen: tuple[Path, int] | None = None
    while not ends.wait(every):
        try:
            found = newest(folder)
            if found is None or found == seen:
                continue
            seen = found
            if fingerprint(found[0]) != engine.current.fingerprint:
                engine.reload(found[0])
        except Exception as error:  # whatever it is, the old bundle goes on
            log.warning("watching %s: %s", folder, error)


def end(clean: bool) -> None:
    """Leave the process: at once where a thread hangs, for Python would wait for it."""
    if not clean:
        log.error("a computation did not end; leaving without it")
        logging.shutdown()
        os._exit(1)
