"""Malformed requests, by the thousand: every answer is a success or a refusal in the one format, none is an accident."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from httpkit import MemoryStore, bundle, events, loading, rank, rows  # noqa: E402

from unbraid.serve.app import create_app  # noqa: E402
from unbraid.serve.engine import Engine  # noqa: E402
from unbraid.serve.settings import Settings  # noqa: E402

BASES = [
    (
        "POST",
        "/rank",
        {**rank(1, 2, 3), "context": {"price": 1.5}, "score": "click", "top": 2, "explore": None, "time": 5},
    ),
    ("POST", "/predict", rows(1, 2)),
    ("POST", "/events", events("a", "b")),
    ("POST", "/reload", {"bundle": "nowhere"}),
    ("DELETE", "/users/42", {}),
    ("GET", "/schema", {}),
]
ODD: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 5e-324, "", "1", "\0", "\ud800",
    "é" * 500, "x" * 50_000, [], [[]], {}, {"": {}}, [None] * 100, {"$ref": "#"}, float("nan"), float("inf"), "candidates",
    "; drop table", "../../etc/passwd", "__import__('os')",
]  # fmt: skip
BYTES = [
    b"\0",
    b"\xff",
    b"}",
    b"]",
    b'"',
    b",",
    b"\\",
    b"NaN",
    b"1e9999",
    b"[" * 500,
    b'{"a":' * 300,
    b"//",
    b"\xef\xbb\xbf",
    b"'",
]
HEADS = [
    ("content-type", "text/plain"), ("content-type", ""), ("content-type", "application/json;charset=utf-16"),
    ("content-length", "-1"), ("content-length", "x"), ("content-length", "9" * 40), ("authorization", "Bearer"),
    ("authorization", "Basic \xff"), ("content-encoding", "gzip"), ("x-request-id", "\r\n"), ("expect", "100-continue"),
    ("transfer-encoding", "chunked"),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(one for key, child in inner for one in places(child, (*path, key)))]


def changed(draw: random.Random, body: Any) -> Any:
    """The body with one value replaced, removed, added or copied."""
    body = copy.deepcopy(body)
    path = draw.choice(places(body))
    if not path:
        return draw.choice(ODD) if draw.random() < 0.1 else body
    parent = body
    for key in path[:-1]:
        parent = parent[key]
    how = draw.randrange(4)
    if how == 0:
        parent[path[-1]] = draw.choice(ODD)
    elif how == 1:
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.extend([parent[path[-1]]] * draw.choice([1, 30]))
    else:
        parent[str(draw.choice(ODD))[:100]] = draw.choice([parent[path[-1]], *ODD])
    return body


def malformed(draw: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body of a request that is probably wrong."""
    method, path, body = draw.choice(BASES)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 5])):
        body = changed(draw, body)
    content = json.dumps(body).encode()
    if draw.random() < 0.3:
        at = draw.randrange(len(content) + 1)
        content = content[:at] + draw.choice([b"", *BYTES]) + content[at + draw.randrange(4) :]
    if draw.random() < 0.03:
        content *= 5_000
    head = {"content-type": "application/json", "authorization": draw.choice(["Bearer secret", "Bearer no"])}
    head |= dict(draw.sample(HEADS, draw.choice([0, 0, 0, 1, 2])))
    if draw.random() < 0.05:
        method = draw.choice(["GET", "PUT", "PATCH", "OPTIONS", "HEAD", "TRACE", "NONSENSE"])
    if draw.random() < 0.05:
        path = draw.choice(
            ["/", "//rank", "/rank/", "/users/", "/users/a/b", "/users/%00", "/users/" + "9" * 300, "/\ud7ff", "/docs"]
        )
    return method, path, head, content


async def ask(
    app: Any, method: str, path: str, head: dict[str, str], content: bytes
) -> tuple[int, dict[str, str], bytes]:
    """The answer of an application, asked without a network: status, head and body."""
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path, "root_path": "",
        "raw_path": path.encode(), "query_string": b"", "scheme": "http", "client": ("test", 1), "server": ("test", 80),
        "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in head.items()],
    }  # fmt: skip
    parts = [content[i : i + 60_000] for i in range(0, len(content), 60_000)] or [b""]
    told: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        told.append(message)

    await app(scope, receive, send)
    answer = {name.decode().lower(): value.decode() for name, value in told[0]["headers"]}
    return told[0]["status"], answer, b"".join(message.get("body", b"") for message in told[1:])


@contextmanager
def service(folder: Path) -> Iterator[Any]:
    """An application, closed at the end; nobody is left in it."""
    store = MemoryStore()
    settings = Settings(token="secret", batch_wait_ms=0.0, max_body=300_000, timeout=30.0, arrow=True)
    engine = Engine(loading(store), bundle(folder / "b"), store, settings)
    try:
        yield create_app(engine)
        assert engine.active == 0
    finally:
        engine.close()


def fuzz(folder: Path, n: int, seed: int) -> Counter[int]:
    """How often which status came; every refusal is checked."""
    draw, found = random.Random(seed), Counter[int]()

    async def run(app: Any) -> None:
        for _ in range(n):
            request = malformed(draw)
            status, head, body = await ask(app, *request)
            found[status] += 1
            said = (status, request[:3], request[3][:300], body[:300])
            assert status < 500, said
            if request[0] != "HEAD" and status >= 400:
                error = json.loads(body)["error"]
                assert set(error) == {"field", "message", "request"} and error["message"], said
                assert len(body) < 2_000 and "Traceback" not in error["message"], said
            assert head["x-request-id"], said

    with service(folder) as app:
        asyncio.run(run(app))
    return found


def test_malformed_requests_are_refused(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 300, 1)
    assert found[200] > 20 and found[422] > 40 and found[400] > 10


@pytest.mark.slow
def test_ten_thousand_malformed_requests_are_refused(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 10_000, 2)
    assert set(found) == {200, 400, 401, 404, 405, 409, 413, 415, 422}, found
    assert found[422] > 1_500


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of a library's libraries
def test_answers_are_as_the_description_says(tmp_path: Path) -> None:
    """Schemathesis makes right and wrong requests of each operation from /openapi.json, and compares the answers with it."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    # two things that JSON Schema cannot say: 2.0 is no integer here, and a column stands in the context or in all candidates
    but = [CHECKS.get_one("positive_data_acceptance")]
    found = Counter[tuple[str, int]]()
    with service(tmp_path) as app:
        described = schemathesis.openapi.from_asgi("/openapi.json", app)
        for one in described.get_all_operations():
            operation = one.ok()
            for mode in (
                schemathesis.GenerationMode if operation.method != "get" else [schemathesis.GenerationMode.POSITIVE]
            ):

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(
                    max_examples=40,
                    database=None,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                    phases=[Phase.generate],
                )
                def check(case: Any) -> None:
                    answer = case.call(headers={"Authorization": "Bearer secret"})
                    found[case.operation.label, answer.status_code] += 1
                    case.validate_response(answer, excluded_checks=but)

                check()
    assert {label for label, status in found if status == 200} == {
        "POST /rank", "POST /predict", "POST /events", "POST /reload", "DELETE /users/{user}", "GET /schema", "GET /health",
        "GET /ready", "GET /metrics",
    }  # fmt: skip
    assert sum(found.values()) > 300
