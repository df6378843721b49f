"""Columns of every kind: what a client sends becomes what the run's own rows became."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rankerkit import Memory, untrained
from toylog import make_data, make_log, make_run

from unbraid.bundle import Bundle
from unbraid.data.declaration import Data, Events, Join, Split
from unbraid.data.source import DataError
from unbraid.data.vocabulary import FEW_VALUES, Vocabulary
from unbraid.encoders.dare import DARE
from unbraid.predictor import Predictor
from unbraid.serve.importer import import_events
from unbraid.serve.ranker import Ranker, Request, RequestError
from unbraid.serve.rows import Joined, as_type, each, series
from unbraid.types import Feature, History, Task

HISTORIES = (
    History("seen", fields=("item", "shop", "clicked", "gap", "position"), length=10),
    History("liked", fields=("item",), where="clicked = 1", length=5),
)


def wide(**changes: Any) -> Data:
    """The toy log with a joined table, an expression, a time of a calendar, and tasks of every kind."""
    data = make_data(**changes)
    more = (
        Feature("colour"),
        Feature("weight", kind="number"),
        Feature("cheap", column="price < 0"),
        Feature("site", vocabulary="places"),
    )
    return replace(
        data, features=(*data.features, *more), joins=(Join("items", on="item"),), histories=HISTORIES,
        tasks=(*data.tasks, Task("spend", kind="real"), Task("size", kind="multiclass")),
        events=(Events(columns={"item": "item", "shop": "shop", "clicked": "click", "colour": "colour"}, where="price > -3"),),
    )  # fmt: skip


def items() -> pl.DataFrame:
    """Not all of the log's."""
    draw = np.random.default_rng(0)
    return pl.DataFrame({
        "item": [f"i{i}" for i in range(28)],
        "colour": draw.choice(["red", "blue", "green"], 28),
        "weight": [None if i % 9 == 4 else float(i) for i in range(28)],
        "unread": range(28),
    }).sample(28, shuffle=True, seed=1)  # fmt: skip


def tables(calendar: bool) -> dict[str, pl.DataFrame]:
    log = make_log()
    if calendar:
        log = log.with_columns(time=pl.from_epoch(pl.col("time") // 1000, time_unit="s").dt.cast_time_unit("ms"))
    return {"log": log.with_columns(pl.col("user").cast(pl.Int16), pl.col("price").cast(pl.Float32)), "items": items()}


def bundle_of(data: Data, given: Mapping[str, pl.DataFrame], folder: Path) -> Bundle:
    run = make_run(data=data)
    return untrained(replace(run, model=replace(run.model, history=DARE(keep=4))), folder, given)


@pytest.fixture(scope="module", params=[False, True], ids=["numbers", "calendar"])
def toy(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, dict[str, pl.DataFrame], Ranker]:
    given = tables(request.param)
    split = (
        {"split": Split(kind="time", valid_from="1970-01-07T22:40", test_from="1970-01-10T06:13")}
        if request.param
        else {}
    )
    bundle = bundle_of(wide(**split), given, tmp_path_factory.mktemp("encoded"))
    store = Memory()
    import_events(bundle.run.data, store, tables=given)  # type: ignore[arg-type]
    return bundle, given, Ranker(bundle, store, tables=given)  # type: ignore[arg-type]


def strange(given: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Rows of the log, nulls and values among them that training had not; no labels."""
    rows = given["log"].drop("click", "buy", "spend", "size").sample(300, seed=0, shuffle=True)
    odd = pl.int_range(pl.len()) % 7
    return rows.with_columns(
        pl.when(odd == 1).then(pl.lit("i99")).when(odd == 2).then(None).otherwise("item").alias("item"),
        pl.when(odd == 3).then(pl.lit("nowhere")).otherwise("site").alias("site"),
        pl.when(odd == 4).then(None).otherwise("user").alias("user"),
    )


def test_predictions_are_a_predictors(toy: Any) -> None:
    bundle, given, ranker = toy
    rows = strange(given)
    want = Predictor(bundle).predict(rows, given)
    got = ranker.predict(rows)
    assert got.columns == ["click", "buy", "spend", "size"]
    for name in want.columns:
        np.testing.assert_array_equal(got[name].to_numpy(), want[name].to_numpy())
        assert want[name].to_numpy().std() > 1e-4


def plain(value: Any) -> Any:
    """As JSON has it."""
    return int(value.replace(tzinfo=dt.UTC).timestamp() * 10**6) if isinstance(value, dt.datetime) else value


def test_ranking_reads_json(toy: Any) -> None:
    bundle, given, ranker = toy
    rows = strange(given).with_columns(user=pl.lit(7, pl.Int16), time=pl.lit(given["log"]["time"][590]))
    sent = rows.select(list(ranker.columns)).to_dicts()
    at = plain(rows["time"][0])
    found = ranker.rank(Request(7, sent, time=at, score="spend * click"))
    want = Predictor(bundle).predict(rows, given)
    for name in want.columns:
        np.testing.assert_allclose(found.predictions[name][np.argsort(found.order)], want[name].to_numpy(), atol=1e-6)
    assert found.predictions["size"].shape == (300, 3) and found.events > 3
    with pytest.raises(RequestError, match=r"should be a number. Found Array|should be a number. Found List"):
        ranker.rank(Request(7, sent, time=at, score="size"))


def test_events_are_read_from_json(toy: Any) -> None:
    _, given, ranker = toy
    assert set(ranker.sources["log" if "log" in ranker.sources else "rows"]) == {
        "user",
        "item",
        "shop",
        "time",
        "click",
        "price",
    }
    event = given["log"].select(list(ranker.sources["rows"])).row(17, named=True)
    user, record = ranker.record("rows", {n: plain(v) for n, v in event.items()})
    known = [r for _, r in ranker.store.held[user] if r.time == plain(event["time"])]
    assert record.values == {n: known[0].values[n] for n in record.values} and set(record.values) == {
        "item",
        "shop",
        "click",
        "price",
    }


def test_columns_have_kinds_and_examples(toy: Any) -> None:
    _, _, ranker = toy
    kinds = {name: column.kind for name, column in ranker.columns.items()}
    assert kinds == {
        "item": "str",
        "shop": "int",
        "price": "float",
        "tags": "list[int]",
        "text_vector": "list[float]",
        "site": "str",
    }
    assert ranker.rows["time"].kind == "int" and len(ranker.columns["text_vector"].example) == 3
    asked = Request(ranker.user.example, [{n: c.example for n, c in ranker.columns.items()}])
    assert np.isfinite(ranker.rank(asked).score).all()


@pytest.mark.parametrize(("change", "field", "says"), [
    ({"tags": [1, "two"]}, "tags", r"kind list\[int\] or null. Found \[1, 'two'\]"),
    ({"tags": 3}, "tags", r"kind list\[int\]"),
    ({"price": "dear"}, "price", "kind float"),
    ({"price": float("nan")}, "", "NaN"),
    ({"price": 1e300}, "", "infinity"),
    ({"text_vector": [1.0, 2.0]}, "", "length 3"),
    ({"item": 5}, "item", "kind str"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_values_that_are_refused(toy: Any, change: dict[str, Any], field: str, says: str) -> None:
    ranker = toy[2]
    good = {n: c.example for n, c in ranker.columns.items()}
    with pytest.raises(RequestError, match=says) as caught:
        ranker.rank(Request(1, [good, {**good, **change}], time=10**9))
    assert caught.value.field == (f"candidates.1.{field}" if field else "candidates")


def test_without_the_log_types_are_what_is_declared(tmp_path: Path) -> None:
    """A machine that serves has the joined tables, and not the log."""
    given = tables(False)
    plain_log = given["log"].with_columns(pl.col("price").cast(pl.Float64))
    for folder, names in (("all", ("log", "items")), ("some", ("items",))):
        (tmp_path / folder).mkdir()
        for name in names:
            (plain_log if name == "log" else given[name]).write_parquet(tmp_path / folder / f"{name}.parquet")
    renamed = {"rows": "log.parquet", "joins": (Join("items.parquet", on="item"),), "folder": str(tmp_path / "all")}
    data = replace(wide(), **renamed)  # type: ignore[arg-type]
    plain = (*(f for f in data.features if f.name != "cheap"), Feature("user"))
    events = Events(columns={"item": "item", "shop": "shop", "clicked": "click", "colour": "colour"})
    data = replace(data, features=plain, events=(events,))
    bundle = bundle_of(data, {}, tmp_path / "encoded")
    store = Memory()
    import_events(bundle.run.data, store)  # type: ignore[arg-type]
    rows = strange({"log": plain_log})
    here = Ranker(bundle, store)  # type: ignore[arg-type]
    there = Ranker(bundle, store, folder=tmp_path / "some")  # type: ignore[arg-type]
    for name, values in here.predict(rows).to_dict().items():
        np.testing.assert_array_equal(there.predict(rows)[name].to_numpy(), values.to_numpy())
    assert {n: c.kind for n, c in there.rows.items()} == {n: c.kind for n, c in here.rows.items()}
    assert there.sources == here.sources
    hidden = replace(data, features=(*data.features, Feature("dear", kind="number", column="other > 2")))
    other = replace(bundle, run=replace(bundle.run, data=hidden))
    with pytest.raises(DataError, match=r"type of column `other` is not known.*Give the folder"):
        Ranker(other, store, folder=tmp_path / "some")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- the pieces
def test_joined_tables_find_rows_by_key() -> None:
    table = pl.DataFrame({"key": ["b", None, "a", "c"], "value": [1, 2, None, 4]})
    found = Joined(table, "key").added(pl.DataFrame({"key": ["c", "a", None, "zz", "b", "c"], "n": range(6)}))
    assert found["value"].to_list() == [4, None, None, None, 1, 4] and found["n"].to_list() == list(range(6))
    assert Joined(table.select("key"), "key").added(pl.DataFrame({"key": ["a"]})).columns == ["key"]
    empty = Joined(table, "key").added(pl.DataFrame({"key": []}, schema={"key": pl.String}))
    assert empty.height == 0 and empty.columns == ["key", "value"]


@pytest.mark.parametrize("values", [
    pl.Series([f"v{i:07d}é" for i in range(FEW_VALUES + 10)]),
    pl.Series([f"v{i}" for i in range(500)]).sort(),
    pl.Series(np.arange(FEW_VALUES + 5) / 3),
    pl.Series(np.arange(40) / 3),
    pl.Series([], dtype=pl.String),
], ids=["many texts", "texts", "many numbers", "numbers", "none"])  # fmt: skip
def test_few_rows_get_the_codes_of_many(values: pl.Series) -> None:
    """A short column is looked up in another way than a long one."""
    known = Vocabulary(values)
    strange = pl.Series([None, "no" if values.dtype == pl.String else -1.5], dtype=values.dtype)
    some = pl.concat([values.gather_every(7).sample(fraction=0.02, seed=0, shuffle=True).head(300), strange])
    long = pl.concat([some, pl.Series([None] * 5_000, dtype=values.dtype)])
    assert known.encode(some).tolist() == known.encode(long)[: len(some)].tolist()
    if len(values):
        assert known.encode(values.gather([3, 0])).tolist() == [5, 2]


def test_series_of_json() -> None:
    at = each("rows.", ".when")
    assert series("when", ["2024-02-03", None], pl.Date, at).to_list() == [dt.date(2024, 2, 3), None]
    moment = series("when", ["2024-02-03T04:05:06"], pl.Datetime("ms", "UTC"), at)
    assert moment.dtype == pl.Datetime("ms", "UTC") and moment[0] == dt.datetime(2024, 2, 3, 4, 5, 6, tzinfo=dt.UTC)
    assert series("when", [1_000_000], pl.Datetime("us"), at, "int")[0] == dt.datetime(1970, 1, 1, 0, 0, 1)
    assert series("when", [1, 2.5, None], pl.Float32, at).dtype == pl.Float32
    for values, dtype, field in (
        (["2024-02-03", "yesterday"], pl.Date, "rows.1.when"),
        ([1, 2**64], pl.Int64, "rows.1.when"),
        ([True], pl.Int64, "rows.0.when"),
        ([[1], [[2]]], pl.List(pl.Int64), "rows.1.when"),
    ):
        with pytest.raises(RequestError) as caught:
            series("when", values, dtype, at)
        assert caught.value.field == field
    assert as_type(pl.Series([1, 2]), pl.Int64).to_list() == [1, 2]
