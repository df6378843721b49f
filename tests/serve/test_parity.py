"""Six ways to one number: 1,000 rows of the bundled log, with calibrators and a history whose events are searched and weighed by
the row's own target, predicted by Python, by the command, by the ranker, over HTTP in JSON and Arrow, and by the exported graph.

Equal bits where the same batches are computed; at most 1e-6 apart where sums are taken in another order: histories that a
request's candidates share, requests joined in one pass, another runtime.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("lmdb")
pytest.importorskip("pyarrow")
from rankerkit import kuairand_rows, untrained  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from unbraid import recipes  # noqa: E402
from unbraid.calibration.kept import Calibrators, Kept  # noqa: E402
from unbraid.calibration.maps import Affine, Calibration  # noqa: E402
from unbraid.cli.main import app  # noqa: E402
from unbraid.predictor import Predictor  # noqa: E402
from unbraid.serve import arrow  # noqa: E402
from unbraid.serve.importer import import_events  # noqa: E402
from unbraid.serve.ranker import Ranked, Ranker, Request  # noqa: E402
from unbraid.serve.server import build  # noqa: E402
from unbraid.serve.settings import Settings  # noqa: E402
from unbraid.serve.store import open_store  # noqa: E402
from unbraid.serve.together import JoiningRanker  # noqa: E402
from unbraid.uncertainty.last_layer import digest_of  # noqa: E402

pytestmark = pytest.mark.slow
TASKS = ["click", "long_view", "like", "profile_enter"]
CLOSE = 1e-6  # single precision, in another order of sums


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundle, a store with its run's events, and the rows."""
    folder = tmp_path_factory.mktemp("parity")
    plain = untrained(recipes.dare(), folder / "cache")
    parts = [*((task, "", 0.5 + i) for i, task in enumerate(TASKS)), ("click", "1", 3.0)]  # and one of a tab alone
    kept = tuple(Kept(task, domain, {}, "", "", Calibration(Affine(factor))) for task, domain, factor in parts)
    calibrated = dataclasses.replace(plain, calibrators=Calibrators(digest_of(plain.model), kept))
    calibrated.save(folder / "bundle")
    store = open_store(folder / "store")
    import_events(calibrated.run.data, store)
    store.close()
    kuairand_rows(1_000).write_parquet(folder / "rows.parquet")
    return folder


@pytest.fixture(scope="module")
def rows(place: Path) -> pl.DataFrame:
    return pl.read_parquet(place / "rows.parquet")


@pytest.fixture(scope="module")
def want(place: Path, rows: pl.DataFrame) -> pl.DataFrame:
    found = Predictor(place / "bundle").predict(rows)
    raw = Predictor(place / "bundle", raw=True).predict(rows)
    assert found.columns == TASKS and len(found) == 1_000
    assert all(float(np.abs(found[task] - raw[task]).max()) > 1e-3 for task in TASKS)  # calibrators do something
    assert min(found[task].std() for task in TASKS) > 1e-3  # type: ignore[type-var]
    return found


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[TestClient]:
    service, _ = build(place / "bundle", str(place / "store"), Settings(arrow=True))
    with TestClient(service) as found:
        yield found


@pytest.fixture(scope="module")
def ranker(place: Path) -> Iterator[JoiningRanker]:
    with closing(open_store(place / "store")) as store:
        yield JoiningRanker(place / "bundle", store)


def apart(got: pl.DataFrame, want: pl.DataFrame) -> float:
    """The largest difference of all tasks and rows."""
    return max(float(np.abs(got[t].to_numpy().astype(float) - want[t].to_numpy()).max()) for t in TASKS)


def test_the_command(place: Path, want: pl.DataFrame) -> None:
    out = place / "predictions.parquet"
    done = CliRunner().invoke(app, ["predict", str(place / "bundle"), str(place / "rows.parquet"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    got = pl.read_parquet(out).select(pl.col(f"predicted_{task}").alias(task) for task in TASKS)
    assert apart(got, want) == 0


def test_the_ranker_and_http(rows: pl.DataFrame, want: pl.DataFrame, ranker: Ranker, client: TestClient) -> None:
    schema = client.get("/schema").json()
    sent = rows.select(*schema["rows"])
    plain = pl.DataFrame(client.post("/predict", json={"rows": sent.to_dicts()}).json()["predictions"])
    body = io.BytesIO()
    sent.write_ipc_stream(body, compat_level=pl.CompatLevel.oldest())
    head = {"Content-Type": arrow.MEDIA, "Accept": arrow.MEDIA}
    told = pl.read_ipc_stream(client.post("/predict", content=body.getvalue(), headers=head).content)
    mine = ranker.predict(sent)
    assert apart(mine, want) == apart(plain, want) == apart(told, want) == 0
    without = client.post("/predict", json={"rows": sent.with_columns(user_id=1).to_dicts()}).json()["predictions"]
    assert apart(pl.DataFrame(without), want) > 1e-2  # histories matter


def test_rankings_alone_and_together(
    rows: pl.DataFrame, want: pl.DataFrame, ranker: JoiningRanker, client: TestClient
) -> None:
    """Each row as a request with one candidate, at the row's time: joined with others, over HTTP by eight clients, some alone."""
    columns = client.get("/schema").json()["columns"]
    bodies = [
        {"user": row["user_id"], "time": row["time_ms"], "candidates": [{name: row[name] for name in columns}]}
        for row in rows.to_dicts()
    ]
    requests = [Request(**body) for body in bodies]
    alone = [ranker.rank(request) for request in requests[:200]]
    joined = [one for at in range(0, 1_000, 50) for one in ranker.rank_together(requests[at : at + 50])]
    assert all(isinstance(one, Ranked) and not one.degraded for one in (*alone, *joined))
    with ThreadPoolExecutor(8) as pool:
        told = [one.json() for one in pool.map(lambda body: client.post("/rank", json=body), bodies)]
    events = [one.events for one in joined]  # type: ignore[union-attr]
    assert (
        [one["events"] for one in told] == events
        and [one.events for one in alone] == events[:200]
        and max(events) > 100
    )
    for found in (
        [one.predictions for one in alone], [one.predictions for one in joined], [one["predictions"] for one in told],  # type: ignore[union-attr]
    ):  # fmt: skip
        got = pl.DataFrame({task: [float(one[task][0]) for one in found] for task in TASKS})
        assert apart(got, want.head(len(got))) <= CLOSE
    assert all(one["score"] == one["predictions"]["click"] for one in told)


def test_the_exported_graph(place: Path, rows: pl.DataFrame, want: pl.DataFrame) -> None:
    pytest.importorskip("onnxruntime")
    from unbraid.export import Exported, export

    export(place / "bundle", place / "graph", "onnx")
    assert apart(Exported(place / "graph").predict(rows), want) <= CLOSE
