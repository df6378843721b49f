"""A service in a process of its own: ``python httpserver.py BUNDLE STORE [JSON of options]``; prints its address."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from httpkit import MemoryStore, loading


def main(folder: str, address: str, text: str = "{}") -> None:
    # without torch, whose import takes seconds
    sys.modules["unbraid.serve.ranker"] = SimpleNamespace(Request=SimpleNamespace)  # type: ignore[assignment]
    from unbraid.serve import server
    from unbraid.serve.app import create_app
    from unbraid.serve.engine import Engine
    from unbraid.serve.patience import Patient
    from unbraid.serve.settings import Settings
    from unbraid.serve.store import open_store

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    options = json.loads(text)
    ranker = options.pop("ranker", {})
    store = Patient(open_store(address)) if address else MemoryStore()
    settings = Settings(**{"token": "secret", **options})
    bound = server.bind("127.0.0.1", 0)
    engine = Engine(loading(store, **ranker), Path(folder), store, settings)
    server.end(server.run(create_app(engine), engine, bound))


class Answer(NamedTuple):
    status: int
    content: bytes

    def json(self) -> Any:
        return json.loads(self.content)


class Process:
    """Such a process; ``url``: where it answers."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving"), log.read_text()
        self.url = line.split()[1]
        self.port = int(self.url.rpartition(":")[2])

    @classmethod
    def fake(cls, folder: Path, address: str, log: Path, **options: Any) -> Process:
        return cls([sys.executable, __file__, str(folder), address, json.dumps(options)], log)

    def post(self, path: str, content: Any, head: Mapping[str, str] | None = None) -> Answer:
        """The answer to JSON; or to bytes, given whole or in parts of a body without a length."""
        body = (
            content
            if isinstance(content, bytes | Iterable) and not isinstance(content, dict)
            else json.dumps(content).encode()
        )
        return self._ask("POST", path, body, {"content-type": "application/json", **(head or {})})

    def get(self, path: str) -> Answer:
        return self._ask("GET", path, None, {})

    def _ask(self, method: str, path: str, body: Any, head: Mapping[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
                connection.request(method, path, body, dict(head), encode_chunked=True)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read())

    def in_flight(self, n: int) -> None:
        """Wait until so many requests are worked on."""
        for _ in range(2_000):
            if f"\nunbraid_in_flight {n}.0\n" in self.get("/metrics").content.decode():
                return
            time.sleep(0.01)
        raise AssertionError(self.get("/metrics").content.decode())

    def end(self, seconds: float = 20) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.process.poll() is None:
            self.kill()
        self.process.stdout.close()  # type: ignore[union-attr]


if __name__ == "__main__":
    main(*sys.argv[1:])
