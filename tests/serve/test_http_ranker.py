"""The service with a model and LMDB, on the bundled log: its numbers are a predictor's, and its command serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("lmdb")
from httpserver import Process  # noqa: E402
from rankerkit import Memory, kuairand_rows, untrained  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from unbraid import recipes  # noqa: E402
from unbraid.cli.main import app  # noqa: E402
from unbraid.data.source import bundled  # noqa: E402
from unbraid.predictor import Predictor  # noqa: E402
from unbraid.serve import together  # noqa: E402
from unbraid.serve.ranker import Ranked, Request  # noqa: E402
from unbraid.serve.server import build  # noqa: E402
from unbraid.serve.settings import Settings  # noqa: E402
from unbraid.serve.store import StoreDown  # noqa: E402
from unbraid.serve.together import JoiningRanker  # noqa: E402

TOKEN = {"Authorization": "Bearer secret"}
TASKS = ["click", "long_view", "like", "profile_enter"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of two recipes."""
    folder = tmp_path_factory.mktemp("serve")
    for name in ("shared_bottom", "mmoe"):
        untrained(getattr(recipes, name)(), folder / "cache").save(folder / name)
    return folder


def kuairand_events() -> dict[str, pl.DataFrame]:
    """Event table -> its events, as the run keeps them."""
    folder = bundled("kuairand")
    assert folder is not None
    log = pl.scan_parquet(folder / "impressions.parquet").filter(pl.sql_expr(recipes.kuairand().keep))
    return {
        "rows": log.unique(maintain_order=True).collect(),
        "history.parquet": pl.read_parquet(folder / "history.parquet"),
    }


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[TestClient]:
    service, _ = build(place / "shared_bottom", str(place / "store"), Settings(token="secret"))
    with TestClient(service, raise_server_exceptions=False) as found:
        yield found


def test_the_examples_of_the_description_are_answered(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/rank", "/predict", "/events"):
        example = paths[path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert client.post(path, json=example).status_code == 200, path


def test_predictions_are_those_of_a_predictor_once_events_were_sent(client: TestClient, place: Path) -> None:
    schema = client.get("/schema").json()
    tables = kuairand_events()
    often = tables["rows"]["user_id"].value_counts(sort=True)["user_id"][:5]
    assert set(schema["events"]) == set(tables)
    for name, told in schema["events"].items():
        events = tables[name].filter(pl.col("user_id").is_in(often.implode())).select(*told["columns"]).to_dicts()
        body = {"table": name, "events": [{"id": f"{name} {i}", **event} for i, event in enumerate(events)]}
        for known in (0, len(events)):  # the second time all are known
            answer = client.post("/events", json=body)
            assert answer.json() == {"new": len(events) - known, "known": known}, answer.text
    rows = kuairand_rows(2_000).filter(pl.col("user_id").is_in(often.implode()))
    got = client.post("/predict", json={"rows": rows.select(*schema["rows"]).to_dicts()}).json()["predictions"]
    want = Predictor(place / "shared_bottom").predict(rows)
    without = client.post(
        "/predict", json={"rows": rows.with_columns(user_id=1).select(*schema["rows"]).to_dicts()}
    ).json()
    for task in TASKS:
        np.testing.assert_allclose(got[task], want[task], rtol=0, atol=1e-6)
        assert not np.allclose(got[task], without["predictions"][task], atol=1e-3)  # histories matter


def test_a_ranking_is_the_order_of_these_and_grows_with_events(client: TestClient) -> None:
    schema = client.get("/schema").json()
    rows = kuairand_rows(400, 1).select(*schema["rows"]).to_dicts()
    user, when = 77, rows[0]["time_ms"]
    candidates = [{name: row[name] for name in schema["columns"]} for row in rows]
    body = {"user": user, "time": when, "candidates": candidates, "score": "0.7 * click + like", "top": 50}
    columns = schema["events"]["rows"]["columns"]
    event = (
        {column: one["example"] for column, one in columns.items()}
        | {"tab": 1}
        | {"user_id": user, "time_ms": when - 1}
    )
    for known in range(2):
        answer = client.post("/events", json={"table": "rows", "events": [event, {**event, "time_ms": when}]})
        assert answer.json() == {"new": 2 * (1 - known), "known": 2 * known}
    got = client.post("/rank", json=body).json()
    assert got["events"] == 1  # that of the same instant is no history
    table = [{**row, "user_id": user, "time_ms": when} for row in rows]
    want = client.post("/predict", json={"rows": table}).json()["predictions"]
    score = 0.7 * np.array(want["click"]) + np.array(want["like"])
    np.testing.assert_allclose(got["score"], np.sort(score)[::-1][:50], rtol=0, atol=1e-6)
    np.testing.assert_allclose(score[got["order"]], got["score"], rtol=0, atol=1e-6)
    assert client.delete(f"/users/{user}", headers=TOKEN).json() == {"deleted": 2}
    assert client.post("/rank", json=body).json()["events"] == 0


def test_rankings_together_are_those_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With requests that are wrong among them, a user twice, times that differ, and histories too long to be copied."""
    store = Memory()
    ranker = JoiningRanker(place / "shared_bottom", store)  # type: ignore[arg-type]
    events = kuairand_events()["rows"].head(3_000).with_columns(pl.col("user_id") % 4).select(*ranker.sources["rows"])
    found = ranker.records("rows", events.to_dicts())
    store.append([(user, record._replace(id=f"{i}")) for i, (user, record) in enumerate(found)])
    rows = kuairand_rows(60, 3).select(*ranker.columns).to_dicts()
    times = [max(record.time for _, record in found) + 1, found[1_500][1].time]
    requests = [Request(user=i % 5, candidates=rows[i : i + 1 + i], time=times[i % 2], top=i % 3) for i in range(8)]
    alone: list[Request] = []
    monkeypatch.setattr(ranker, "rank", lambda request: alone.append(request) or JoiningRanker.rank(ranker, request))
    requests += [Request(user=1, candidates=[{}]), Request(user=1, candidates=rows[:2], score="nothing")]
    for copies in (20_000, 5):
        monkeypatch.setattr(together, "COPIES", copies)
        alone.clear()
        got = ranker.rank_together(requests)
        assert bool(alone) == (copies == 5)
        for one, request in zip(got[:8], requests, strict=False):
            want = JoiningRanker.rank(ranker, request)
            assert isinstance(one, Ranked) and one.events == want.events and one.order.tolist() == want.order.tolist()
            np.testing.assert_allclose(one.score, want.score, rtol=0, atol=1e-6)
            for task in TASKS:
                np.testing.assert_allclose(one.predictions[task], want.predictions[task], rtol=0, atol=1e-6)
        assert [one.field for one in got[8:]] == [f"candidates.0.{next(iter(ranker.reader.types))}", "score"]  # type: ignore[union-attr]
        assert {one.events for one in got[:8]} > {0}  # type: ignore[union-attr]
    store.fault = StoreDown("gone")
    down = ranker.rank_together(requests[:2])
    assert all(isinstance(one, Ranked) and one.events == 0 and one.degraded == "gone" for one in down)


def test_refusals_name_the_field(client: TestClient) -> None:
    schema = client.get("/schema").json()
    row = {name: one["example"] for name, one in schema["columns"].items()}
    some = next(iter(row))
    short = {name: value for name, value in row.items() if name != some}
    for body, field in (
        ({"user": 1, "candidates": [row, short]}, f"candidates.1.{some}"),
        ({"user": 1, "candidates": [row], "score": "click +"}, "score"),
        ({"user": 1, "candidates": [row], "score": "nothing"}, "score"),
        ({"user": 1, "candidates": [row], "explore": {"kind": "ucb"}}, "explore"),
    ):
        response = client.post("/rank", json=body)
        assert response.status_code == 422 and response.json()["error"]["field"] == field, response.text


def test_another_model_of_the_same_data_follows(client: TestClient, place: Path) -> None:
    row = {name: one["example"] for name, one in client.get("/schema").json()["columns"].items()}
    body = {"user": 1, "time": 0, "candidates": [row]}
    before = client.post("/rank", json=body).json()
    assert client.post("/reload", json={"bundle": str(place / "mmoe")}, headers=TOKEN).status_code == 200
    after = client.post("/rank", json=body).json()
    assert before["bundle"] != after["bundle"] and before["score"] != after["score"]
    assert client.post("/reload", json={"bundle": str(place)}, headers=TOKEN).status_code == 409
    assert client.post("/reload", json={"bundle": str(place / "shared_bottom")}, headers=TOKEN).status_code == 200
    assert client.post("/rank", json=body).json() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nowhere", "--store", "s"], "nowhere"), (["nowhere", "--store", "ftp://x"], "ftp"),
        (["nowhere", "--store", "s", "--timeout", "0"], "timeout"), (["nowhere", "--store", "s", "--watch", "no"], "--watch"),
    ],
)  # fmt: skip
def test_what_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["serve", *options, "--port", "0"])
    assert found.exit_code == 2 and says in found.output and "Traceback" not in found.output


def test_the_command_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "unbraid.serve.server", raising=False)
    monkeypatch.delattr("unbraid.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    found = CliRunner().invoke(app, ["serve", "bundle", "--store", "s"])
    assert found.exit_code == 2 and "unbraid[serve]" in found.output


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(place: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "unbraid",
        "serve",
        str(place / "mmoe"),
        "--store",
        str(tmp_path / "new"),
        "--port",
        "0",
    ]
    with Process(command, tmp_path / "log") as service:
        assert service.get("/ready").json()["ready"] is True
        document = service.get("/openapi.json").json()
        example = document["paths"]["/rank"]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert service.post("/rank", example).status == 200
        assert service.end() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
