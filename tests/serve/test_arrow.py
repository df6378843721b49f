"""Rows and predictions as Arrow: the same numbers as JSON, checked as strictly, and nothing damaged is an accident."""

from __future__ import annotations

import asyncio
import io
import json
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pa = pytest.importorskip("pyarrow")
from httpkit import NOW, rows  # noqa: E402
from test_http import Service  # noqa: E402
from test_http import make as make  # noqa: E402  the fixture
from test_http_fuzz import ask, service  # noqa: E402

from unbraid.serve import arrow  # noqa: E402
from unbraid.serve.errors import ApiError  # noqa: E402
from unbraid.serve.shape import Unread  # noqa: E402

IN, OUT = {"Content-Type": arrow.MEDIA}, {"Accept": arrow.MEDIA}


def stream(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(max_chunksize=2) if isinstance(table, pa.Table) else [table]:
            writer.write_batch(batch)
    return sink.getvalue()


def table(**change: Any) -> Any:
    """Three rows; ``change``: columns instead, None: without."""
    columns = {
        "user": pa.array([42, 42, 42]), "time": pa.array([NOW] * 3), "item": pa.array([5, None, 7]),
        "price": pa.array([1.5, None, 2.5]), "tags": pa.array([["a"], None, ["b", "c"]]), **change,
    }  # fmt: skip
    return pa.table({name: column for name, column in columns.items() if column is not None})


def test_requests_and_answers_are_json_or_arrow(make: Any) -> None:
    service = make(arrow=True)
    body = {"rows": table().to_pylist()}
    want = service.post("/predict", body).json()
    assert len(want["predictions"]["click"]) == 3
    for content, head in ((json.dumps(body), {"Content-Type": "application/json"}), (stream(table()), IN)):
        plain = service.client.post("/predict", content=content, headers=head)
        assert plain.json() == want and plain.headers["content-type"] == "application/json"
        told = service.client.post("/predict", content=content, headers=head | OUT)
        assert told.headers["content-type"] == arrow.MEDIA and told.headers["x-bundle"] == want["bundle"]
        got = pa.ipc.open_stream(told.content).read_all()
        assert got.schema == pa.schema({"click": pa.float64()}) and got.to_pydict() == want["predictions"]
        assert pl.read_ipc_stream(told.content)["click"].to_list() == want["predictions"]["click"]
    refused = service.client.post("/predict", content=b"{", headers={"Content-Type": "application/json", **OUT})
    assert refused.status_code == 400 and refused.json()["error"]["message"]  # errors are JSON


def test_accept() -> None:
    for accept in (arrow.MEDIA, f"text/html, {arrow.MEDIA};q=0.5", arrow.MEDIA.upper()):
        assert arrow.asked(accept)
    for accept in ("", "*/*", "application/json", f"{arrow.MEDIA};q=0", f"{arrow.MEDIA}; q=0"):
        assert not arrow.asked(accept)


def test_libraries_write_what_is_read(make: Any) -> None:
    service = make(arrow=True)
    want = service.post("/predict", rows(5, 6, 7)).json()["predictions"]
    frame = pl.DataFrame({"user": [42] * 3, "time": [NOW] * 3, "item": [5, 6, 7], "tags": [["a"], [], None]})
    polars = io.BytesIO()
    frame.write_ipc_stream(polars, compat_level=pl.CompatLevel.oldest())
    pandas = pytest.importorskip("pandas").DataFrame({"user": [42] * 3, "time": [NOW] * 3, "item": [5, 6, 7]})
    for content in (polars.getvalue(), stream(pa.Table.from_pandas(pandas, preserve_index=False))):
        assert service.client.post("/predict", content=content, headers=IN).json()["predictions"] == want


def test_types_that_hold_the_same_are_read_as_one() -> None:
    from httpkit import SHAPE

    plain = arrow.read(stream(table()), SHAPE.rows, 10)
    assert plain.schema == {
        "user": pl.Int64, "time": pl.Int64, "item": pl.Int64, "price": pl.Float64, "tags": pl.List(pl.String),
    }  # fmt: skip
    assert plain["tags"].to_list() == [["a"], None, ["b", "c"]]
    assert plain["item"].to_list() == [5, None, 7]
    others = table(
        user=pa.array([42] * 3, pa.uint64()), item=pa.array([5, None, 7], pa.int8()),
        price=pa.array([1.5, None, 2.5], pa.float32()),
        tags=pa.array([["a"], None, ["b", "c"]], pa.large_list(pa.large_string())),
    )  # fmt: skip
    assert arrow.read(stream(others), SHAPE.rows, 10).equals(plain)
    whole = table(price=pa.array([1, 2**60, None]), tags=pa.nulls(3), item=pa.nulls(3))
    found = arrow.read(stream(whole), SHAPE.rows, 10)
    assert (
        found["price"].to_list() == [1.0, float(2**60), None]
        and found["tags"].null_count() == found["item"].null_count() == 3
    )
    gone = arrow.read(stream(table(price=None, tags=None)), SHAPE.rows, 10)  # need not be there
    assert gone.columns == plain.columns and gone["tags"].null_count() == 3 and gone["tags"].dtype == pl.List(pl.String)
    nested = {"x": Unread("list[list[float]]", None)}
    values = pa.table({"x": pa.array([[[1.0], []], [], None, [[2.0, 3.0]]])})
    assert arrow.read(stream(values), nested, 10)["x"].to_list() == [[[1.0], []], [], None, [[2.0, 3.0]]]
    with pytest.raises(ApiError) as error:
        arrow.read(stream(pa.table({"x": pa.array([[[1.0]], [], None, [[2.0], [3.0, float("inf")]]])})), nested, 10)
    assert error.value.field == "rows.3.x"


def big(rows: int) -> Any:
    return pa.table({"user": [42] * rows, "time": [NOW] * rows, "item": [5] * rows})


BAD = {
    "unknown column": (stream(table(other=pa.array([1, 2, 3]))), 422, "rows.other"),
    "missing column": (stream(table(item=None)), 422, "rows.item"),
    "text for a number": (stream(table(item=pa.array(["1", "2", "3"]))), 422, "rows.item"),
    "a number with a fraction": (stream(table(item=pa.array([1.0, 2.0, 3.0]))), 422, "rows.item"),
    "a truth for a number": (stream(table(item=pa.array([True, False, True]))), 422, "rows.item"),
    "a date": (stream(table(time=pa.array([0, 0, 0], pa.timestamp("ms")))), 422, "rows.time"),
    "a number of 65 bits": (stream(table(item=pa.array([1, 2**63, 3], pa.uint64()))), 422, "rows.1.item"),
    "no number": (stream(table(price=pa.array([1.0, 2.0, float("nan")]))), 422, "rows.2.price"),
    "infinite": (stream(table(price=pa.array([float("inf"), 2.0, 3.0]))), 422, "rows.0.price"),
    "a null in a list": (stream(table(tags=pa.array([[], None, ["a", None]]))), 422, "rows.2.tags"),
    "no list": (stream(table(tags=pa.array(["a", "b", "c"]))), 422, "rows.tags"),
    "a list of lists": (stream(table(tags=pa.array([[["a"]], [], []]))), 422, "rows.tags"),
    "a dictionary": (stream(table(tags=pa.array([1, 2, 3]).dictionary_encode())), 422, "rows.tags"),
    "a view": (stream(table(tags=pa.array([["a"], [], []], pa.list_(pa.string_view())))), 422, "rows.tags"),
    "a struct": (stream(table(item=pa.array([{"a": 1}] * 3))), 422, "rows.item"),
    "one name twice": (stream(pa.Table.from_arrays([pa.array([1])] * 2, names=["item", "item"])), 422, "rows"),
    "no rows": (stream(big(0)), 422, "rows"),
    "too many rows": (stream(big(5_001)), 422, "rows"),
    "lz4": (stream(table(), compression="lz4"), 415, ""),
    "zstd": (stream(table(), compression="zstd"), 415, ""),
    "empty": (b"", 400, ""),
    "JSON": (b'{"rows": []}', 400, ""),
    "a file of Arrow": (b"ARROW1\0\0" + stream(table()), 400, ""),
    "cut short within a batch": (stream(table())[:-60], 400, ""),
    "cut short after a batch": (stream(table())[:-8], 400, ""),
    "more behind its end": (stream(table()) + b"x", 400, ""),
    "two streams": (stream(table()) * 2, 400, ""),
    "a batch before its schema": (stream(table())[stream(table()).index(b"\xff" * 4, 8) :], 400, ""),
    "a schema twice": (stream(big(0))[:-8] + stream(table()), 400, ""),
    "a user who is none": (stream(table(user=pa.array(["a", "b", "c"]))), 422, "rows.user"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_says_where(make: Any, name: str) -> None:
    content, status, field = BAD[name]
    answer = make(arrow=True).client.post("/predict", content=content, headers=IN)
    error = answer.json()["error"]
    assert (answer.status_code, error["field"]) == (status, field), error
    if name == "a view":
        assert "compat_level" in error["message"]


def test_rows_are_counted_before_they_are_read(make: Any) -> None:
    """A batch that says that it has 2^40 rows of nulls takes no memory."""
    content = bytearray(stream(pa.table({"item": pa.nulls(77)})))
    for at in [i for i in range(0, len(content), 8) if content[i : i + 8] == (77).to_bytes(8, "little")]:
        content[at : at + 8] = (1 << 40).to_bytes(8, "little")
    with pytest.raises(ApiError, match="at most 10 rows"):
        arrow.read(bytes(content), {"item": Unread("int", 1)}, 10)
    body = stream(big(5_000))
    small = make(arrow=True, max_body=len(body) - 1)
    assert small.client.post("/predict", content=body, headers=IN).status_code == 413


def test_other_routes_and_services_without_the_library_take_json_alone(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make(arrow=True)
    for path in ("/rank", "/events"):
        refused = service.client.post(path, content=stream(table()), headers=IN)
        assert refused.status_code == 415 and "application/json`" in refused.json()["error"]["message"]
    monkeypatch.setitem(sys.modules, "pyarrow.ipc", None)
    refused = service.client.post("/predict", content=stream(table()), headers=IN)
    assert refused.status_code == 415 and "unbraid[serve]" in refused.json()["error"]["message"]
    assert service.client.post("/predict", json=rows(1), headers=OUT).status_code == 415
    assert service.post("/predict", rows(1)).status_code == 200


def test_requests_of_both_kinds_are_computed_together(make: Any) -> None:
    service: Service = make(arrow=True, batch_wait_ms=200.0)
    with ThreadPoolExecutor(6) as pool:
        plain = [pool.submit(service.post, "/predict", rows(i, 50 + i)) for i in range(3)]
        more = [pool.submit(service.client.post, "/predict", content=stream(table()), headers=IN) for _ in range(3)]
        for i, one in enumerate(plain):
            assert one.result().json()["predictions"]["click"] == [i / 1000, (50 + i) / 1000]
        assert all(one.result().json()["predictions"]["click"] == [0.005, 0.0, 0.007] for one in more)
    assert min(service.engine.current.ranker.passes) > 3  # rows of several requests in a pass


def test_probabilities_of_classes_are_lists() -> None:
    values = {"a": np.array([0.5, 0.25], dtype=np.float32), "b": np.array([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])}
    got = pa.ipc.open_stream(arrow.write(values)).read_all()
    assert got.to_pydict() == {name: value.tolist() for name, value in values.items()}
    assert got.schema == pa.schema({"a": pa.float32(), "b": pa.list_(pa.float64(), 3)})


def test_it_has_to_be_asked_for(make: Any) -> None:
    service = make()
    told = service.client.post("/predict", content=stream(table()), headers=IN)
    assert told.status_code == 415 and "application/json" in told.json()["error"]["message"]
    body = service.client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]
    assert list(body["content"]) == ["application/json"]


def test_the_description_says_so(make: Any) -> None:
    told = make(arrow=True).client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    assert arrow.MEDIA in told["requestBody"]["content"] and arrow.MEDIA in told["responses"]["200"]["content"]
    assert arrow.MEDIA not in told["responses"]["422"]["content"]


# ----------------------------------------------------------------------------------------------------- damaged streams
def damaged(draw: random.Random, content: bytes) -> bytes:
    """The bytes, a few of them replaced, removed or cut off."""
    found = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, how = draw.randrange(len(found) or 1), draw.randrange(5)
        if how == 0:
            found[at : at + 1] = draw.randbytes(1)
        elif how == 1:
            del found[at : at + draw.choice([1, 4, 8])]
        elif how == 2:
            found[at & ~7 : (at & ~7) + 8] = draw.choice(
                [b"\xff" * 8, bytes(8), (2**62).to_bytes(8, "little"), b"\1" + bytes(7)]
            )
        elif how == 3:
            found[at & ~3 : (at & ~3) + 4] = draw.choice([(2**31 - 1).to_bytes(4, "little"), bytes(4), b"\x80\0\0\0"])
        else:
            del found[at:]
    return bytes(found)


def fuzz(folder: Path, n: int, seed: int) -> Counter[int]:
    draw, found = random.Random(seed), Counter[int]()
    bases = [stream(table()), stream(table(tags=pa.array([["x" * 40], [], None], pa.large_list(pa.large_string())))),
             stream(table(), compression="lz4"), stream(big(50)), stream(table(tags=pa.nulls(3)))]  # fmt: skip

    async def run(app: Any) -> None:
        for _ in range(n):
            content = damaged(draw, draw.choice(bases))
            head = {"content-type": arrow.MEDIA, "accept": draw.choice(["*/*", arrow.MEDIA])}
            status, _, body = await ask(app, "POST", "/predict", head, content)
            found[status] += 1
            assert status in (200, 400, 415, 422), (status, content, body[:300])
            if status != 200:
                error = json.loads(body)["error"]
                assert error["message"] and len(body) < 2_000 and "Traceback" not in error["message"], body

    with service(folder) as app:
        asyncio.run(run(app))
    return found


def test_damaged_streams_are_refused(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 300, 1)
    assert found[400] > 100 and found[200] > 5


@pytest.mark.slow
def test_ten_thousand_damaged_streams_are_refused(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 10_000, 2)
    assert set(found) == {200, 400, 415, 422} and found[400] > 5_000, found
