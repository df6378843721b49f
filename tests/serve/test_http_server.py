"""The service as a process: shutdown, reload under load, slow clients, what is no HTTP, and ``kill -9``."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("lmdb")
from httpkit import bundle, events, rank, rows  # noqa: E402
from httpserver import Process  # noqa: E402

from unbraid.serve.store import open_store  # noqa: E402

TOKEN = {"Authorization": "Bearer secret"}


def raw(port: int, data: bytes) -> bytes:
    """All that is answered to these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        found = b""
        while chunk := connection.recv(65536):
            found += chunk
    return found


def test_shutdown_answers_what_is_in_flight_and_closes_the_store(tmp_path: Path) -> None:
    address = str(tmp_path / "store")
    with Process.fake(bundle(tmp_path / "b"), address, tmp_path / "log", ranker={"wait": 2.0}) as service:
        assert service.post("/events", events("a")).json() == {"new": 1, "known": 0}
        with ThreadPoolExecutor(2) as pool:
            slow = [pool.submit(service.post, path, body) for path, body in (("/rank", rank(5)), ("/predict", rows(5)))]
            service.in_flight(2)
            start = time.monotonic()
            service.process.terminate()
            until = time.monotonic() + 10
            with pytest.raises(ConnectionError):  # no new connections, after at most 0.1 s
                while time.monotonic() < until:
                    service.get("/health")
            assert [one.result().status for one in slow] == [200, 200]
        assert service.process.wait(10) == 0 and time.monotonic() - start < 15
    assert "Traceback" not in (tmp_path / "log").read_text()
    with closing(open_store(address)) as store:
        assert [r.id for r in store.read(42).records] == ["a"]


@pytest.mark.slow
def test_shutdown_is_bounded(tmp_path: Path) -> None:
    """Neither a hanging computation nor a client that never ends its body keeps the process."""
    options = {"ranker": {"wait": 3600}, "timeout": 1.0, "threads": 1}
    with Process.fake(bundle(tmp_path / "b"), "", tmp_path / "log", **options) as service:
        assert service.post("/rank", rank(5)).status == 503
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(
                b"POST /rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
            start = time.monotonic()
            assert service.end() == 1  # it says that something was left
            assert time.monotonic() - start < 6


def test_slow_clients_are_given_up_and_hold_nobody(tmp_path: Path) -> None:
    with Process.fake(bundle(tmp_path / "b"), "", tmp_path / "log", timeout=1.0, concurrency=2) as service:
        head = b"POST /rank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        slow = [socket.create_connection(("127.0.0.1", service.port), timeout=10) for _ in range(8)]
        try:
            for connection in slow:
                connection.sendall(head + b'{"user"')
            time.sleep(0.2)
            answer = service.post("/rank", rank(1))
            assert answer.status == 200, answer.content  # who sends slowly takes no place
            for connection in slow:
                said = b"".join(iter(lambda one=connection: one.recv(65536), b""))  # until it is closed
                assert said.startswith(b"HTTP/1.1 408") and b'"error"' in said
        finally:
            for connection in slow:
                connection.close()
        assert service.end() == 0


def test_what_is_no_http_and_bodies_without_end(tmp_path: Path) -> None:
    with Process.fake(bundle(tmp_path / "b"), "", tmp_path / "log", max_body=100_000) as service:
        answer = raw(service.port, b"\x16\x03\x01 nonsense\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400") and set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}

        def endless(size: int) -> Iterator[bytes]:
            for _ in range(size // 10_000):
                yield b" " * 10_000

        for content in (b" " * 1_000_000, endless(1_000_000)):
            response = service.post("/rank", content)
            assert response.status == 413 and "100,000 bytes" in response.json()["error"]["message"]
        assert service.post("/rank", rank(1)).status == 200
        assert service.end() == 0


def test_a_taken_port_is_said_before_anything_is_loaded() -> None:
    from unbraid.serve.server import bind

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="Cannot listen on 127.0.0.1"):
            bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.slow
def test_reload_under_load_loses_nothing(tmp_path: Path) -> None:
    """500 requests at once while two bundles follow each other: all are answered, each by one of them and rightly."""
    bundles = [bundle(tmp_path / name, shift) for name, shift in (("a", 0.0), ("b", 0.5))]
    options = {"ranker": {"wait": 0.002}, "concurrency": 1000, "timeout": 30.0}
    with Process.fake(bundles[0], "", tmp_path / "log", **options) as service:
        prints = {}
        for folder, shift in zip(bundles[::-1], (0.5, 0.0), strict=True):
            told = service.post("/reload", {"bundle": str(folder)}, TOKEN).json()
            prints[told["bundle"]] = shift

        async def ask(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: dict
        ) -> tuple[int, dict]:
            content = json.dumps(body).encode()
            writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
                         f"Content-Length: {len(content)}\r\n\r\n".encode() + content)  # fmt: skip
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            told = await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
            return int(head.split()[1]), json.loads(told)

        async def load() -> tuple[list[tuple[int, dict]], int]:
            connections = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(501)]
            n, done, seen = 0, asyncio.Event(), set[str]()

            async def exchange() -> None:
                nonlocal n
                while not done.is_set():
                    assert (await ask(*connections[-1], "/reload", {"bundle": str(bundles[n % 2])}))[0] == 200
                    n += 1

            async def client(i: int) -> list[tuple[int, dict]]:
                one = ("/rank", rank(i)) if i % 2 else ("/predict", rows(i))
                answers: list[tuple[int, dict]] = []
                # on a busy machine all have an answer before the bundle is another: then the first client goes on
                while len(answers) < 2 or (i == 0 and len(answers) < 5_000 and (n <= 3 or seen != set(prints))):
                    answers.append(await ask(*connections[i], *one))
                    seen.add(answers[-1][1]["bundle"])
                return answers

            exchanging = asyncio.create_task(exchange())
            found = await asyncio.gather(*map(client, range(500)))
            done.set()
            await exchanging
            for _, writer in connections:
                writer.close()
            return found, n

        found, exchanges = asyncio.run(load())
        assert exchanges > 3 and {told["bundle"] for both in found for _, told in both} == set(prints)
        for i, (status, told) in ((i, one) for i, both in enumerate(found) for one in both):
            assert status == 200
            value = told["score"][0] if i % 2 else told["predictions"]["click"][0]
            assert value == pytest.approx(i % 97 / 1000 + prints[told["bundle"]], abs=1e-12)
        assert service.end() == 0


@pytest.mark.slow
def test_kill_9_during_events_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """20 times: clients send events and send again whatever was not acknowledged; each is in the store exactly once."""
    folder, address, log = bundle(tmp_path / "b"), str(tmp_path / "store"), tmp_path / "log"
    lock, acknowledged, sent = threading.Lock(), set(), [0]

    def client(service: Process, pending: list[str]) -> None:
        """Send until the service is gone; what is not acknowledged stays in ``pending``."""
        while True:
            with lock:
                while len(pending) < 5:
                    sent[0] += 1
                    pending.append(f"e{sent[0]}")
            try:
                answer = service.post("/events", events(*pending, time=int(pending[-1][1:])))
            except (OSError, http.client.HTTPException):
                return
            assert answer.status == 200 and sum(answer.json().values()) == len(pending)
            with lock:
                acknowledged.update(pending)
            pending.clear()

    waiting: list[list[str]] = [[] for _ in range(3)]
    repeated = 0
    for _ in range(20):
        with Process.fake(folder, address, log) as service, ThreadPoolExecutor(3) as pool:
            repeated += sum(map(len, waiting))
            clients = [pool.submit(client, service, pending) for pending in waiting]
            time.sleep(random.uniform(0.1, 0.4))
            service.kill()
            for one in clients:
                one.result()
    assert len(acknowledged) > 500 and repeated > 20
    with closing(open_store(address)) as store:
        kept = [record.id for record in store.read(42).records]
    assert len(kept) == len(set(kept)) and acknowledged <= set(kept) <= acknowledged | {
        e for one in waiting for e in one
    }
