"""Exact counts on a small table, and what happens to data that the encoder refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from unbraid import config
from unbraid.data.declaration import Data, Events, Join, Split
from unbraid.data.describe import describe
from unbraid.data.describe_table import render
from unbraid.data.source import DataError
from unbraid.job import train
from unbraid.train import Training, Watcher
from unbraid.types import Feature, Field, History, Task

ROWS = pl.DataFrame(
    {
        "user": [1, 1, 2, 2, 3, 3, 4, 4, 4, 1],
        "item": ["a", "b", "a", None, "c", "a", "d", "a", "b", "b"],
        "t": [0, 10, 20, 30, 40, 50, 60, 70, 80, 10],  # seconds; the last row equals the second
        "site": ["x", "x", "y", "y", "x", "y", "x", "y", "x", "x"],
        "click": [1, 0, 1, None, 0, 1, 1, 0, 0, 0],
        "buy": [1, 1, 0, 1, 0, None, 1, 0, 0, 1],
        "price": [1.0, 2.0, 3.0, 4.0, None, 6.0, 7.0, float("nan"), 9.0, 2.0],
        "stars": [1, 2, 2, None, 1, 2, 3, 3, 1, 2],
        "spent": [1.0, 3.0, None, 1.0, 3.0, 1.0, 2.0, 4.0, 0.0, 3.0],
        "tags": [["p"], ["p", "q"], [], None, ["q"], ["p"], ["r"], ["p"], ["s", "p"], ["p", "q"]],
    }
)
ITEMS = pl.DataFrame({"item": ["a", "b"], "maker": ["m", "m"]})
TABLES = {"rows": ROWS, "items": ITEMS}
DATA = Data(
    rows="rows",
    user="user",
    time="t",
    time_unit="s",
    domain="site",
    joins=(Join("items", on="item"),),
    features=(
        Feature("item", min_count=2),
        Feature("maker"),
        Feature("tags", kind="bag"),
        Feature("price", kind="number", nan="missing"),
    ),
    tasks=(
        Task("click"),
        Task("buy", given="click"),
        Task("stars", kind="multiclass"),
        Task("spent", kind="real"),
    ),
    split=Split(kind="time", valid_from=50, test_from=70),
)


@pytest.fixture
def found() -> dict:
    return describe(DATA, tables=TABLES)


def warned(found: dict, *words: str) -> bool:
    return any(all(w in line for w in words) for line in found["warnings"])


def test_rows_duplicates_and_splits(found: dict) -> None:
    rows = found["rows"]
    assert rows == {
        "read": 10, "kept": 10, "duplicates": 1, "duplicates dropped": False, "used": 10, "train": 6, "valid": 2,
        "test": 2, "in no split": 0,
    }  # fmt: skip
    assert warned(found, "1 rows equal an earlier row", "drop_duplicates")
    dropped = describe(replace(DATA, drop_duplicates=True, keep="site = 'x'"), tables=TABLES)
    assert [dropped["rows"][k] for k in ("read", "kept", "duplicates", "used", "test")] == [10, 6, 1, 5, 1]
    assert not warned(dropped, "equal an earlier row")


def test_users_time_and_joins(found: dict) -> None:
    assert found["users"] == {
        "distinct": 4,
        "rows without a user": 0,
        "test unseen": 1.0,
    }  # user 4 is never in training
    assert found["time"]["from"] == "1970-01-01T00:00:00+00:00"
    assert found["time"]["to"] == "1970-01-01T00:01:20+00:00"
    assert "seconds since 1970" in found["time"]["unit"]
    assert warned(found, "time_unit")  # 1970 is not a plausible year of a log
    assert found["joins"] == {"items": {"on": "item", "rows without a match": 3}}  # null, c and d


def test_binary_task_overall_by_split_and_by_domain(found: dict) -> None:
    click = found["tasks"]["click"]
    assert click["all"] == {"observed": 9, "share": 0.9, "positives": 4, "rate": 4 / 9}
    assert click["splits"]["test"] == {"observed": 2, "share": 1.0, "positives": 0, "rate": 0.0}
    assert click["splits"]["train"]["positives"] == 2
    assert click["domains"]["x"] == {"observed": 6, "share": 1.0, "positives": 2, "rate": 2 / 6}
    assert click["domains"]["y"] == {"observed": 3, "share": 0.75, "positives": 2, "rate": 2 / 3}
    assert found["domains"]["y"] == {"rows": 4, "train": 2, "valid": 1, "test": 1}


def test_children_are_counted_where_the_parent_is_positive(found: dict) -> None:
    buy = found["tasks"]["buy"]
    assert buy["all"]["observed"] == 3 and buy["all"]["positives"] == 2  # clicked rows with a known buy: 1, 0, 1
    assert buy["children without parent"] == 3  # two with click 0, one with click unobserved
    assert warned(found, "Task buy", "3 rows are positive although click is 0 or unobserved")


def test_multiclass_and_real_tasks(found: dict) -> None:
    stars, spent = found["tasks"]["stars"], found["tasks"]["spent"]
    assert stars["all"] == {"observed": 9, "share": 0.9, "classes": {"1": 3, "2": 4, "3": 2}}
    assert stars["splits"]["test"]["classes"] == {"1": 1, "3": 1}
    assert stars["domains"]["y"]["classes"] == {"2": 2, "3": 1}
    values = ROWS["spent"].drop_nulls()
    assert spent["all"]["mean"] == pytest.approx(values.mean())
    assert spent["all"]["sd"] == pytest.approx(values.std(ddof=0))


def test_ids(found: dict) -> None:
    # training: a 2, b 2 (the duplicate), c 1, null 1; test: a, b
    assert found["ids"]["item"] == {
        "distinct": 4, "in training": 3, "min_count": 2, "rare": 1, "missing": 1, "test unseen": 0.0,
    }  # fmt: skip
    assert found["ids"]["maker"]["missing"] == 3
    tags = found["ids"]["tags"]  # members: training p 3, q 3; test p, s, p
    assert tags["distinct"] == 4 and tags["in training"] == 2
    assert tags["test unseen"] == pytest.approx(1 / 3)


def test_a_test_row_without_a_value_is_not_unseen() -> None:
    rows = ROWS.with_columns(item=pl.when(pl.col("t") >= 80).then(None).otherwise(pl.lit("z") + pl.col("item")))
    rows = rows.with_columns(item=pl.when(pl.col("t") == 70).then(pl.lit("new")).otherwise("item"))
    found = describe(replace(DATA, joins=(), features=(Feature("item"),)), tables={"rows": rows})
    assert found["ids"]["item"]["test unseen"] == 0.5


def test_numbers_and_missing_values(found: dict) -> None:
    price = found["numbers"]["price"]
    good = [1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 9.0, 2.0]
    assert price["mean"] == pytest.approx(sum(good) / 8) and (price["min"], price["max"]) == (1.0, 9.0)
    assert price["sd"] == pytest.approx(pl.Series(good).std(ddof=0))
    assert found["missing"]["price"] == {"nulls": 1, "nans": 1}
    assert found["missing"]["item"] == {"nulls": 1}
    assert not warned(found, "price", "NaN")  # the feature says what a NaN means
    strict = replace(DATA, features=(Feature("price", kind="number"),))
    assert warned(describe(strict, tables=TABLES), "Feature price: 1 rows hold NaN")


def test_warnings_of_small_and_one_sided_data(found: dict) -> None:
    assert warned(found, "Domain x", "6 rows")
    assert warned(found, "Task click", "0 positives in the test split")
    only = ROWS.with_columns(click=pl.when(pl.col("site") == "y").then(1).otherwise("click"))
    assert warned(describe(DATA, tables={**TABLES, "rows": only}), "Task click, domain y", "only 1s")
    late = replace(DATA, split=Split(kind="time", valid_from=50, test_from=1000))
    assert warned(describe(late, tables=TABLES), "The test split is empty")


def test_history_lengths(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path))
    data = replace(
        DATA,
        tasks=(Task("click"),),
        fields=(Field("item"),),
        events=(Events({"item": "item"}),),
        histories=(History("seen", fields=("item",), length=2),),
        drop_duplicates=True,
    )
    seen = describe(data, tables=TABLES)["histories"]["seen"]
    # users 1: 0 1; 2: 0 1; 3: 0 1; 4: 0 1 2
    assert seen == {
        "mean": 6 / 9,
        "median": 1.0,
        "p95": pytest.approx(1.6),
        "max": 2,
        "empty": 4 / 9,
        "longest kept": 2,
    }


def test_refused_data_become_warnings() -> None:
    rows = ROWS.with_columns(click=pl.col("click") * 2)
    data = replace(
        DATA,
        keep="nothing > 3",
        joins=(Join("twice", on="item"), Join("makers", on="maker")),
        features=(Feature("item"), Feature("absent"), Feature("site", kind="number"), Feature("tags", kind="id")),
    )
    found = describe(data, tables={"rows": rows, "makers": ITEMS[:1], "twice": pl.concat([ITEMS, ITEMS])})
    assert warned(found, "data.keep", "`nothing`")
    assert warned(found, "Join of `twice`", "4 rows, 2 keys")
    assert warned(found, "Join of `makers`", "no column `maker`")
    assert warned(found, "there is no column `absent`")
    assert warned(found, "kind `number` needs numbers")
    assert warned(found, "`tags` holds lists")
    assert warned(found, "Task `click`", "should be 0 or 1", "4 rows")
    assert found["rows"]["used"] == 10 and found["ids"]["item"]["distinct"] == 4
    assert found["joins"]["twice"]["rows without a match"] is None


def test_a_time_of_the_wrong_type_leaves_the_rest() -> None:
    rows = ROWS.with_columns(t=pl.col("t").cast(pl.String))
    found = describe(DATA, tables={**TABLES, "rows": rows})
    assert warned(found, "should be an integer, a date or a date-time")
    assert found["time"] is None and found["rows"]["in no split"] == 10
    assert found["tasks"]["click"]["all"]["positives"] == 4


def test_a_missing_table_is_an_error(tmp_path) -> None:
    with pytest.raises(DataError, match="There is no table `absent.parquet`"):
        describe(replace(DATA, rows="absent.parquet"), tmp_path)


def test_is_json_and_renders_at_100_columns(found: dict, capsys: pytest.CaptureFixture[str]) -> None:
    json.dumps(found, allow_nan=False)
    render(found)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for words in ("10 read", "1 exact duplicates, not dropped", "Label rates by domain", "Classes of stars", "44.44%"):
        assert words in text
    assert all("! " + line[:20] in text for line in found["warnings"])


def test_rows_without_users_and_ids_that_never_return_are_warned_of():
    log = pl.DataFrame({
        "user": [None, *range(99)], "session": range(100), "item": [i % 4 for i in range(100)], "time": range(100),
        "click": [i % 2 for i in range(100)],
    })  # fmt: skip
    data = Data(
        rows="log", user="user", time="time", features=(Feature("session"), Feature("item")), tasks=(Task("click"),),
        split=Split(kind="time", valid_from=60, test_from=80),
    )  # fmt: skip
    warnings = " ".join(describe(data, tables={"log": log})["warnings"])
    assert "1 rows have no user (`user` is null)" in warnings
    assert "Feature session: 100% of the test rows have a value that training never saw" in warnings
    assert "Feature item" not in warnings


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_event_tables_without_events_or_with_a_time_that_is_not_read(tmp_path, suffix) -> None:
    log = pl.DataFrame({"user": [i % 9 for i in range(90)], "item": [i % 4 for i in range(90)], "t": range(1000, 1090),
                        "click": [i % 2 for i in range(90)]})  # fmt: skip
    data = Data(
        rows=f"log.{suffix}", folder=str(tmp_path), user="user", time="t", features=(Feature("item"),),
        fields=(Field("item"),), events=(Events({"item": "item"}, table=f"events.{suffix}"),), tasks=(Task("click"),),
        histories=(History("seen", fields=("item",)),), split=Split(kind="time", valid_from=1050, test_from=1070),
    )  # fmt: skip

    def notes(events: pl.DataFrame, **changes: Any) -> list[str]:
        for name, frame in (("log", log), ("events", events)):
            getattr(frame, f"write_{suffix}")(tmp_path / f"{name}.{suffix}")
        asked = replace(data, events=(replace(data.events[0], **changes),))
        said: list[str] = []
        watcher = type("Notes", (Watcher,), {"note": lambda _, text: said.append(text)})()
        training = Training(batch_size=16, steps=2)
        train(config.Run(asked, training=training), baseline=False, watcher=watcher)
        described = describe(asked)["warnings"]
        both = [line for line in described if "data.events" in line and "equal another" not in line]
        assert [line for line in said if "data.events" in line] == [f"! {line}" for line in both]
        return described

    some = pl.DataFrame({"user": range(9), "item": [1] * 9, "t": range(900, 909)})
    events = f"data.events `events.{suffix}`"
    if suffix == "csv":
        with pytest.raises(DataError, match="Table `events.csv` has a header and no rows"):
            notes(some.clear())
    else:
        assert f"{events} has no events." in notes(some.clear())
        assert any("History seen has no event in any row" in line for line in notes(some.clear()))
    assert f"{events} has no events after where = `item = 7`." in notes(some, where="item = 7")
    assert any(f'{events}: time = "none" although it has a column `t`' in line for line in notes(some, time="none"))
    assert not [line for line in notes(some.rename({"t": "when"}), time="none") if "data.events" in line]
    (line,) = [line for line in notes(pl.concat([some, some[:3]])) if "data.events" in line]
    assert f"{events}: 3 events equal another one in user, time" in line
    assert not [line for line in notes(some) if "data.events" in line]


def test_a_time_of_floats_says_what_to_write() -> None:
    rows = ROWS.with_columns(t=pl.when(pl.col("t") == 10).then(float("nan")).otherwise(pl.col("t").cast(pl.Float64)))
    found = describe(DATA, tables={**TABLES, "rows": rows})
    assert warned(found, "Column `t`", "Found Float64", "`CAST(t AS BIGINT)`. 2 are NaN", "`keep`, such as `t < 1e18`")
    data = replace(DATA, keep="t < 1e18", time="CAST(t AS BIGINT)")
    assert describe(data, tables={**TABLES, "rows": rows})["time"]["from"].startswith("1970-01-01T00:00:00")
