"""The endpoints of the service, without a model: what is answered, what is refused and how, what is counted."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from httpkit import COLUMNS, NOW, SHAPE, Column, MemoryStore, bundle, events, loading, rank, rows  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from unbraid.serve.app import create_app  # noqa: E402
from unbraid.serve.engine import Engine  # noqa: E402
from unbraid.serve.settings import Settings  # noqa: E402
from unbraid.serve.store import StoreDown, StoreFull  # noqa: E402

TOKEN = {"Authorization": "Bearer secret"}


class Service:
    """A service in this process, its engine and its store."""

    def __init__(self, folder: Path, shapes: Any = None, options: Any = None, **settings: Any) -> None:
        self.store = MemoryStore()
        self.folder = bundle(folder / "first")
        chosen = Settings(**{"token": "secret", "batch_wait_ms": 1.0, **settings})
        self.engine = Engine(loading(self.store, shapes, **options or {}), self.folder, self.store, chosen)
        self.client = TestClient(create_app(self.engine), raise_server_exceptions=False)

    def post(self, path: str, content: Any, **more: Any) -> Any:
        return self.client.post(path, json=content, **more)

    def metric(self, name: str, **labels: str) -> float:
        return self.engine.telemetry.registry.get_sample_value(f"unbraid_{name}", labels) or 0.0


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def one(**options: Any) -> Service:
        made.append(Service(tmp_path / str(len(made)), **options))
        made[-1].client.__enter__()
        return made[-1]

    yield one
    for service in made:
        service.client.__exit__(None, None, None)
        assert service.store.closed


def refused(response: Any, status: int, field: str = "") -> str:
    """The message of a refusal, which has the one format."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"field", "message", "request"} and error["field"] == field
    assert error["request"] == response.headers["x-request-id"]
    return error["message"]


# ------------------------------------------------------------------------------------------------------------- answers
def test_rank_orders_and_cuts(make: Callable[..., Service]) -> None:
    service = make()
    found = service.post("/rank", rank(5, 9, 7)).json()
    assert found["order"] == [1, 2, 0] and found["score"] == [0.009, 0.007, 0.005]
    assert found["predictions"] == {"click": found["score"]} and found["events"] == 0 and found["degraded"] == ""
    assert found["bundle"] == service.engine.current.fingerprint
    assert service.post("/rank", rank(5, 9, 7, top=1)).json()["order"] == [1]


def test_context_and_candidates_are_one_row(make: Callable[..., Service]) -> None:
    service = make()
    body = {"user": 1, "candidates": [{}, {"item": 9}], "context": {"item": 3, "tags": ["x"], "price": None}}
    assert service.post("/rank", body).json()["score"] == [0.009, 0.003]
    assert "missing" in refused(
        service.post("/rank", {"user": 1, "candidates": [{"item": 1}, {}]}), 422, "candidates.1.item"
    )


def test_predict(make: Callable[..., Service]) -> None:
    service = make()
    service.post("/events", events("a", user=2))
    found = service.post("/predict", {"rows": [{"user": u, "time": NOW, "item": 5} for u in (1, 2)]}).json()
    assert found["predictions"] == {"click": [0.005, 0.006]}


def test_events_are_in_the_next_rank_and_kept_once(make: Callable[..., Service]) -> None:
    service = make()
    assert service.post("/events", events("a", "b")).json() == {"new": 2, "known": 0}
    assert service.post("/events", events("b", "c")).json() == {"new": 1, "known": 1}
    assert service.post("/rank", rank(0)).json()["events"] == 3
    assert service.metric("events_total", result="new") == 3 and service.metric("events_total", result="known") == 1


def test_events_without_ids_are_known_by_what_they_say(make: Callable[..., Service]) -> None:
    service = make()
    one = {"user": 42, "time": NOW, "item": 7}
    body = {"table": "views", "events": [one, {**one, "item": 8}, {**one, "time": NOW + 1}, {**one, "user": 43}]}
    assert service.post("/events", body).json() == {"new": 4, "known": 0}
    assert service.post("/events", body).json() == {"new": 0, "known": 4}


def test_delete_removes_a_user(make: Callable[..., Service]) -> None:
    service = make()
    service.post("/events", events("a", "b"))
    refused(service.client.delete("/users/42"), 401)
    assert service.client.delete("/users/42", headers=TOKEN).json() == {"deleted": 2}
    assert service.post("/rank", rank(0)).json()["events"] == 0
    service.store.held[7] = {"a": None}
    assert service.client.delete("/users/%0A7%0A", headers=TOKEN).json() == {"deleted": 1}  # whatever is in the path
    assert "int" in refused(service.client.delete("/users/bob", headers=TOKEN), 422, "user")


def test_schema_and_openapi_have_the_columns(make: Callable[..., Service]) -> None:
    service = make()
    found = service.client.get("/schema").json()
    assert found["columns"]["item"] == {"type": "int", "required": True, "example": 7}
    assert found["events"]["views"]["id"] == "id" and found["tasks"] == [{"name": "click", "kind": "binary"}]
    document = service.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert schemas["Candidate"]["properties"]["item"]["examples"] == [7]
    assert schemas["Candidate"]["additionalProperties"] is False
    assert set(document["paths"]) == {"/rank", "/predict", "/events", "/reload", "/users/{user}", "/schema", "/health",
                                      "/ready", "/metrics"}  # fmt: skip


def test_the_examples_of_the_description_are_answered(make: Callable[..., Service]) -> None:
    service = make()
    paths = service.client.get("/openapi.json").json()["paths"]
    for path in ("/rank", "/predict", "/events"):
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert service.post(path, example).status_code == 200, path


def test_an_event_table_with_a_column_id(make: Callable[..., Service], tmp_path: Path) -> None:
    """Its values are no ids of events: two events of one item would be one."""
    sources = {"views": {**SHAPE.sources["views"], "id": Column("int", True, 3)}}
    service = make(shapes={"first": dataclasses.replace(SHAPE, sources=sources)})
    one = {"user": 42, "time": NOW, "item": 7, "id": 3}
    body = {"table": "views", "events": [one, {**one, "time": NOW + 1}]}
    assert service.post("/events", body).json() == {"new": 2, "known": 0}
    body["events"] = [{**one, "event_id": "a"}, {**one, "event_id": "a", "time": NOW + 2}]
    assert service.post("/events", body).json() == {"new": 1, "known": 1}


def test_several_event_tables(make: Callable[..., Service]) -> None:
    sources = {**SHAPE.sources, "buys": {**SHAPE.sources["views"], "price": COLUMNS["price"]}}
    service = make(shapes={"first": dataclasses.replace(SHAPE, sources=sources)})
    body = {"table": "buys", "events": [{"user": 42, "time": NOW, "item": 7, "price": 1.5}]}
    assert service.post("/events", body).json()["new"] == 1
    body["table"] = "views"
    assert "Allowed: user, time, item, id" in refused(service.post("/events", body), 422, "events.0.price")
    body["table"] = "sales"
    assert "'views', 'buys'" in refused(service.post("/events", body), 422, "table")


def test_a_bundle_without_histories(make: Callable[..., Service]) -> None:
    service = make(shapes={"first": dataclasses.replace(SHAPE, sources={})})
    assert "no events" in refused(service.post("/events", events("a")), 422, "table")
    assert "/events" not in service.client.get("/openapi.json").json()["paths"]


# ------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("path", "body", "status", "field", "said"),
    [
        ("/rank", b"{", 400, "", "JSON"),
        ("/rank", b"", 400, "", "JSON"),
        ("/rank", b"\xff\xfe", 400, "", "JSON"),
        ("/rank", b"[" * 100_000, 400, "", "recursion"),
        ("/rank", b'{"user": 1, "candidates": [{"item": ' + b"9" * 5_000 + b"}]}", 400, "", "number"),
        ("/rank", b'{"user": "\\ud800", "candidates": [{"item": 1}]}', 400, "", "JSON"),
        ("/rank", b"[]", 422, "", "object"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1, "price": NaN}]}', 422, "candidates.0.price", "finite"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1, "price": -Infinity}]}', 422, "candidates.0.price", "finite"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1, "price": 1e999}]}', 422, "candidates.0.price", "finite"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1}, {"item": "2"}]}', 422, "candidates.1.item", "Found '2'"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1.5}]}', 422, "candidates.0.item", "integer"),
        ("/rank", b'{"user": 1, "candidates": [{"item": true}]}', 422, "candidates.0.item", "integer"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 9223372036854775808}]}', 422, "candidates.0.item", "less than"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1, "tags": [1]}]}', 422, "candidates.0.tags.0", "string"),
        ("/rank", b'{"user": 1, "candidates": [{"itme": 1}]}', 422, "candidates.0.itme", "Allowed: item, price, tags"),
        ("/rank", b'{"user": 1, "candidates": []}', 422, "candidates", "at least 1"),
        ("/rank", b'{"candidates": [{"item": 1}]}', 422, "user", "required"),
        ("/rank", b'{"user": null, "candidates": [{"item": 1}]}', 422, "user", "integer"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1}], "topp": 3}', 422, "topp", "/schema"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1}], "top": -1}', 422, "top", "greater"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1}], "explore": {"kind": "luck"}}', 422, "explore.kind", "thompson"),
        ("/rank", b'{"user": 1, "candidates": [{"item": 1}], "explore": {"kind": "ucb", "seed": 1}}', 422, "explore.seed",
         "seed"),
        ("/predict", b'{"rows": [{"item": 1, "time": 0}]}', 422, "rows.0.user", "required"),
        ("/predict", b'{"rows": [{"item": 1, "time": 0, "user": 1}, {"item": 666, "time": 0, "user": 1}]}', 422, "rows.1.item",
         "No such"),
        ("/events", b'{"table": "sales", "events": []}', 422, "table", "'views'"),
        ("/events", b'{"table": "views", "events": [{"user": 1, "time": 0, "item": 1}, {"user": 1, "time": null, "item": 1}]}',
         422, "events.1.time", "missing"),
        ("/events", b'{"table": "views", "events": [{"user": 1, "time": 0, "item": 1, "id": ""}]}', 422, "events.0.id",
         "at least 1"),
    ],
)  # fmt: skip
def test_bad_requests_say_where(
    make: Callable[..., Service], path: str, body: bytes, status: int, field: str, said: str
) -> None:
    service = make()
    response = service.client.post(path, content=body, headers={"content-type": "application/json"})
    assert said in refused(response, status, field)
    assert len(response.content) < 1_000  # what was found is shortened
    assert not service.store.held  # all or nothing


def test_unknown_routes_methods_and_types(make: Callable[..., Service]) -> None:
    service = make()
    assert "/openapi.json" in refused(service.client.get("/nothing"), 404)
    response = service.client.get("/rank")
    assert "GET" in refused(response, 405) and response.headers["allow"] == "POST"
    for head in ({}, {"content-type": "text/plain"}, {"content-type": "application/jsonx"}):
        assert "Content-Type" in refused(service.client.post("/rank", content=b"{}", headers=head), 415)
    head = {"content-type": "application/json; charset=utf-8", "content-encoding": "gzip"}
    assert "compressed" in refused(service.client.post("/rank", content=b"{}", headers=head), 415)
    del head["content-encoding"]
    assert service.client.post("/rank", content=json.dumps(rank(1)), headers=head).status_code == 200


def test_bodies_are_bounded_with_and_without_a_length(make: Callable[..., Service]) -> None:
    service = make(max_body=1_000)
    head = {"content-type": "application/json"}

    def parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    for content in (b" " * 1_001, parts()):
        response = service.client.post("/rank", content=content, headers=head)
        assert "1,000 bytes" in refused(response, 413)
    assert service.post("/rank", rank(1)).status_code == 200
    assert service.engine.active == 0


def test_too_many_candidates(make: Callable[..., Service]) -> None:
    service = make(max_candidates=3)
    assert service.post("/rank", rank(1, 2, 3)).status_code == 200
    assert "at most 3" in refused(service.post("/rank", rank(1, 2, 3, 4)), 422, "candidates")
    assert "at most 3" in refused(service.post("/events", events(*"abcd")), 422, "events")


def test_events_from_the_future_are_refused_whole(make: Callable[..., Service]) -> None:
    service = make(max_skew=60)
    soon, late = (int((time.time() + s) * 1000) for s in (30, 90))
    assert service.post("/events", events("a", time=soon)).status_code == 200
    body = events("b", "c")
    body["events"][1]["time"] = late
    assert "ahead" in refused(service.post("/events", body), 422, "events.1")
    assert service.post("/rank", rank(0)).json()["events"] == 1


def test_ids_of_requests(make: Callable[..., Service]) -> None:
    service = make()
    ask = lambda own: service.client.get("/health", headers={"x-request-id": own}).headers["x-request-id"]  # noqa: E731
    assert ask("abc-1.2:3") == "abc-1.2:3"
    assert ask("a b") != "a b" and ask("x" * 65) != "x" * 65


# --------------------------------------------------------------------------------------------------------------- failures
def test_a_store_that_is_away(make: Callable[..., Service]) -> None:
    service = make()
    service.store.fault = StoreDown("redis://10.0.0.1 refused")
    response = service.post("/events", events("a"))
    assert "10.0.0.1" not in refused(response, 503) and response.headers["retry-after"] == "1"
    refused(service.client.get("/ready"), 503)
    refused(service.post("/predict", rows(1)), 503)
    found = service.post("/rank", rank(5, 9))
    assert found.status_code == 200 and found.json()["order"] == [1, 0] and found.json()["degraded"]
    assert service.client.get("/health").status_code == 200
    assert service.metric("store_errors_total", kind="StoreDown") == 3 and service.metric("degraded_total") == 1
    service.store.fault = None
    assert service.client.get("/ready").status_code == 200
    assert service.post("/events", events("a")).json() == {"new": 1, "known": 0}


def test_a_full_store(make: Callable[..., Service]) -> None:
    service = make()
    service.store.fault = StoreFull("no room")
    assert service.client.get("/health").json() == {"alive": True, "writes": ""}
    assert "full" in refused(service.post("/events", events("a")), 507)
    assert "full" in service.client.get("/health").json()["writes"]
    service.store.fault = None
    service.post("/rank", rank(1))  # that reads go on says nothing of writes
    assert "full" in service.client.get("/health").json()["writes"]
    assert service.post("/events", events("a")).status_code == 200
    assert service.client.get("/health").json() == {"alive": True, "writes": ""}


def test_what_fails_within_is_a_500_without_its_trace(
    make: Callable[..., Service], caplog: pytest.LogCaptureFixture
) -> None:
    service = make(options={"fault": RuntimeError("weights at 0xdead")})
    for path, body in (("/rank", rank(1)), ("/predict", rows(1))):
        response = service.post(path, body, headers={"x-request-id": "mine"})
        assert "0xdead" not in refused(response, 500) and "Traceback" not in response.text
    assert "request mine failed" in caplog.text and "0xdead" in caplog.text
    assert service.metric("requests_total", route="/rank", status="500") == 1


def test_predictions_that_are_not_finite_are_not_sent(make: Callable[..., Service]) -> None:
    service = make()
    service.engine.current.ranker.shift = float("nan")
    refused(service.post("/rank", rank(1)), 500)
    refused(service.post("/predict", rows(1)), 500)


def test_timeouts_are_503_and_give_their_place_back(make: Callable[..., Service]) -> None:
    service = make(options={"wait": 0.3}, timeout=0.05, threads=1)
    for path, body in (("/rank", rank(1)), ("/predict", rows(1))):
        response = service.post(path, body)
        assert "0.05 s" in refused(response, 503) and response.headers["retry-after"] == "1"
    assert service.engine.active == 0
    time.sleep(0.6)  # threads cannot be stopped


def test_more_requests_than_allowed_are_503_at_once(make: Callable[..., Service]) -> None:
    service = make(options={"wait": 1.0}, concurrency=2, threads=2)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: service.post("/rank", rank(i)).status_code, range(6)))
    assert sorted(found) == [200, 200, 503, 503, 503, 503]
    assert service.client.get("/health").status_code == 200  # not counted
    assert service.post("/rank", rank(1)).status_code == 200


def test_the_loop_answers_while_the_store_and_the_model_work(make: Callable[..., Service]) -> None:
    service = make(options={"wait": 1.5}, threads=1)
    service.store.wait = 1.5
    with ThreadPoolExecutor(2) as pool:
        slow = [pool.submit(service.post, "/rank", rank(1)), pool.submit(service.post, "/events", events("a"))]
        time.sleep(0.1)
        assert service.client.get("/health").status_code == 200
        assert not any(one.done() for one in slow)
        assert [one.result().status_code for one in slow] == [200, 200]


# ---------------------------------------------------------------------------------------------------------------- batches
def test_requests_are_computed_together_and_answered_apart(make: Callable[..., Service]) -> None:
    service = make(batch_wait_ms=150.0)
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda i: service.post("/predict", rows(i, i + 1)).json()["predictions"]["click"], range(8))
        )
    assert found == [[i / 1000, (i + 1) / 1000] for i in range(8)]
    passes = service.engine.current.ranker.passes
    assert sum(passes) == 16 and len(passes) <= 3
    assert service.metric("batch_requests_sum") == 8 and service.metric("batch_rows_sum") == 16


def test_a_lone_request_waits_no_longer_than_the_bound(make: Callable[..., Service]) -> None:
    service = make(batch_wait_ms=100.0)
    times = []
    for i in range(10):
        start = time.perf_counter()
        service.post("/predict", rows(i))
        times.append(time.perf_counter() - start)
        if times[-1] < 0.2:  # the machine may be busy
            break
    assert 0.095 < min(times) < 0.2


def test_full_batches_do_not_wait(make: Callable[..., Service]) -> None:
    service = make(batch_wait_ms=5_000.0, batch_rows=4)
    start = time.perf_counter()
    assert service.post("/predict", rows(1, 2, 3, 4)).status_code == 200
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: service.post("/predict", rows(i, i + 1)), range(2)))
    assert time.perf_counter() - start < 5
    assert service.engine.current.ranker.passes == [4, 4]


def test_batches_fill_while_all_threads_are_busy(make: Callable[..., Service]) -> None:
    service = make(options={"wait": 0.5}, batch_wait_ms=0.0, threads=1)
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(service.post, "/predict", rows(0))
        time.sleep(0.05)
        rest = [pool.submit(service.post, "/predict", rows(i)) for i in range(1, 9)]
        assert all(one.result().status_code == 200 for one in [first, *rest])
    assert service.engine.current.ranker.passes == [1, 8]


def test_small_rankings_are_computed_together_and_large_ones_alone(make: Callable[..., Service]) -> None:
    service = make(batch_wait_ms=150.0, batch_rows=16)
    bodies = [rank(1, 2), rank(9), {"user": 1, "candidates": [{}]}, rank(3, 4, 5, 6, 7)]
    with ThreadPoolExecutor(4) as pool:
        first, second, bad, large = pool.map(lambda body: service.post("/rank", body), bodies)
    assert first.json()["score"] == [0.002, 0.001] and second.json()["score"] == [0.009]
    assert "missing" in refused(bad, 422, "candidates.0.item")
    assert large.json()["order"] == [4, 3, 2, 1, 0]
    assert service.engine.current.ranker.joined == [3]
    assert service.metric("batch_requests_sum") == 3


def test_the_fault_of_one_request_is_not_that_of_its_batch(make: Callable[..., Service]) -> None:
    service = make(batch_wait_ms=150.0)
    with ThreadPoolExecutor(3) as pool:
        good, bad, other = pool.map(lambda items: service.post("/predict", rows(*items)), [(1, 2), (3, 666), (4,)])
    assert good.json()["predictions"]["click"] == [0.001, 0.002] and other.json()["predictions"]["click"] == [0.004]
    assert "No such item" in refused(bad, 422, "rows.1.item")


# ----------------------------------------------------------------------------------------------------------------- token
def test_the_token(make: Callable[..., Service]) -> None:
    service = make()
    for head in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Bearer sécret".encode()},
    ):
        response = service.post("/reload", {}, headers=head)
        assert "Bearer" in refused(response, 401) and response.headers["www-authenticate"] == "Bearer"
    assert service.post("/reload", {}, headers=TOKEN).status_code == 200
    assert "--token" in refused(make(token="").post("/reload", {}, headers=TOKEN), 403)


# ---------------------------------------------------------------------------------------------------------------- bundles
def changed(**parts: Any) -> Any:
    return dataclasses.replace(SHAPE, **parts)


def test_reload_exchanges_the_bundle(make: Callable[..., Service], tmp_path: Path) -> None:
    service = make()
    old = service.post("/rank", rank(5)).json()
    second = bundle(tmp_path / "second", 0.5)
    told = service.post("/reload", {"bundle": str(second)}, headers=TOKEN).json()
    new = service.post("/rank", rank(5)).json()
    assert told == {"bundle": new["bundle"], "name": "shop"} and new["bundle"] != old["bundle"]
    assert new["score"] == [0.505]
    bundle(second, 0.75)
    assert service.post("/reload", {}, headers=TOKEN).status_code == 200  # the same folder, read again
    assert service.post("/predict", rows(5)).json()["predictions"]["click"] == [0.755]
    assert service.metric("reloads_total", result="done") == 2


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (changed(tasks={"like": "binary"}), "task `click` is missing"),
        (changed(tasks={"click": "real"}), "task `click` is real, not binary"),
        (changed(user=Column("str", True, "a")), "user ids are str, not int"),
        (changed(time="s"), "times are in s, not ms"),
        (changed(columns={**COLUMNS, "shop": Column("int", False, 1)}), "column `shop` is asked for"),
        (changed(columns={**COLUMNS, "price": Column("int", False, 1)}), "column `price` is int, not float"),
        (changed(columns={**COLUMNS, "price": Column("float", True, 1.0)}), "column `price` is required"),
        (changed(sources={}), "events of `views` are not read"),
        (changed(sources={**SHAPE.sources, "buys": {}}), "events of `buys` are read"),
        (changed(sources={"views": {**SHAPE.sources["views"], "shop": Column("int", True, 1)}}),
         "events of `views`: column `shop`"),
    ],
)  # fmt: skip
def test_a_bundle_that_does_not_fit_is_refused(
    make: Callable[..., Service], tmp_path: Path, shape: Any, reason: str
) -> None:
    service = make(shapes={"second": shape})
    second = bundle(tmp_path / "second", 0.5)
    response = service.post("/reload", {"bundle": str(second)}, headers=TOKEN)
    assert reason in refused(response, 409, "bundle")
    assert service.post("/rank", rank(5)).json()["score"] == [0.005]
    assert service.metric("reloads_total", result="refused") == 1


def test_what_a_later_bundle_reads_no_more_may_still_be_sent(make: Callable[..., Service], tmp_path: Path) -> None:
    views = {name: column for name, column in SHAPE.sources["views"].items()}
    start = changed(sources={"views": {**views, "shop": Column("str", True, "x")}})
    less = changed(columns={"item": COLUMNS["item"]}, rows={k: v for k, v in SHAPE.rows.items() if k != "price"},
                   tasks={"click": "binary", "like": "binary"})  # fmt: skip
    service = make(shapes={"first": start, "second": less})
    for name in ("second", "third"):  # and a bundle after that may read it again
        folder = bundle(tmp_path / name, 0.5)
        assert service.post("/reload", {"bundle": str(folder)}, headers=TOKEN).status_code == (
            200 if name == "second" else 409
        )
    body = {"user": 1, "candidates": [{"item": 1, "price": 2.0, "tags": ["a"]}]}
    assert service.post("/rank", body).json()["score"] == [0.501]
    sent = {"table": "views", "events": [{"user": 1, "time": NOW, "item": 1, "shop": "y"}]}
    assert service.post("/events", sent).json()["new"] == 1
    row = {"user": 1, "time": NOW, "item": 1, "price": 3.0}
    assert service.post("/predict", {"rows": [row]}).json()["predictions"]["click"] == [0.502]


@pytest.mark.parametrize("missing", ["run.toml", "weights.safetensors", ""])
def test_what_is_no_bundle_is_refused(make: Callable[..., Service], tmp_path: Path, missing: str) -> None:
    service = make()
    second = bundle(tmp_path / "second", 0.5)
    (second / missing).unlink() if missing else (second / "run.toml").write_text("no number")
    assert refused(service.post("/reload", {"bundle": str(second)}, headers=TOKEN), 409, "bundle")
    assert service.post("/rank", rank(5)).json()["score"] == [0.005]


def test_requests_in_flight_end_on_the_bundle_they_began_with(make: Callable[..., Service], tmp_path: Path) -> None:
    service = make(options={"wait": 0.3}, threads=2)
    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(service.post, "/rank", rank(5)), pool.submit(service.post, "/predict", rows(5))]
        time.sleep(0.1)
        service.post("/reload", {"bundle": str(bundle(tmp_path / "second", 0.5))}, headers=TOKEN)
        after = service.post("/rank", rank(5)).json()
        first, second = (one.result().json() for one in begun)
    assert first["score"] == [0.005] and second["predictions"]["click"] == [0.005]
    assert first["bundle"] == second["bundle"] != after["bundle"] and after["score"] == [0.505]


def test_the_watched_folder(make: Callable[..., Service], tmp_path: Path) -> None:
    from unbraid.serve.server import look

    service, folder, ends = make(), tmp_path / "bundles", threading.Event()
    folder.mkdir()
    thread = threading.Thread(target=look, args=(service.engine, folder, ends, 0.02))
    thread.start()

    def until(score: float) -> None:
        for _ in range(200):
            if service.post("/rank", rank(0)).json()["score"] == [score]:
                return
            time.sleep(0.01)
        raise AssertionError(service.post("/rank", rank(0)).text)

    try:
        until(0.0)
        bundle(folder / "b", 0.25)
        until(0.25)
        half = folder / "c"  # without weights: not whole
        half.mkdir()
        (half / "run.toml").write_text("9")
        bundle(folder / "a", 0.5)
        until(0.5)
        bundle(folder / "d").joinpath("run.toml").write_text("no number")  # refused, once
        time.sleep(0.1)
        assert service.metric("reloads_total", result="refused") == 1
        service.post("/reload", {"bundle": str(folder / "b")}, headers=TOKEN)
        time.sleep(0.1)
        until(0.25)  # put back by hand, and left there
        bundle(folder / "e", 0.75)
        until(0.75)
    finally:
        ends.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------- metrics
def test_metrics(make: Callable[..., Service]) -> None:
    service = make()
    service.post("/rank", rank(1))
    service.client.get("/nothing/at/all")
    service.client.get("/other")
    service.client.delete("/users/5")
    text = service.client.get("/metrics").text
    assert 'unbraid_requests_total{route="/rank",status="200"} 1.0' in text
    assert 'unbraid_requests_total{route="/users/{user}",status="401"} 1.0' in text
    assert 'unbraid_requests_total{route="unknown",status="404"} 2.0' in text  # paths of strangers make no series
    assert f'unbraid_bundle{{fingerprint="{service.engine.current.fingerprint}",name="shop"}} 1.0' in text
    for stage in ("body", "check", "queue", "model"):
        assert service.metric("stage_seconds_count", stage=stage) == 1
    for name in ("in_flight", "queue", "cache_hits", "cache_misses", "cache_bytes"):
        assert f"\nunbraid_{name} " in text


@pytest.mark.parametrize(
    "change",
    [
        {"timeout": 0},
        {"concurrency": 0},
        {"max_body": float("nan")},
        {"batch_wait_ms": -1},
        {"token": "é"},
        {"token": " a"},
    ],
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Settings(**change)
