"""Histories against a reference that looks at every event of every row, one by one."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import polars as pl
import pytest

from unbraid.data import encode as encoding
from unbraid.data.declaration import Data, Events, Split
from unbraid.data.events import NO_TIME, gap_codes
from unbraid.data.source import DataError
from unbraid.data.vocabulary import stable_hash
from unbraid.types import Feature, Field, History, Task

HISTORIES = (
    History("seen", fields=("item", "click", "kind", "gap", "position"), length=4),
    History("clicked", fields=("item",), where="click = 1", length=3),
    History("more", fields=("item", "gap"), where="kind = 'more' AND item <> 'i3'", length=2),
    History("unmarked", fields=("kind",), where="click IS NULL", length=50),
    History("everything", fields=("position", "item"), where="1 = 1", length=1000),
)
DATA = Data(
    rows="log",
    user="user",
    time="time",
    time_unit="s",
    features=(Feature("item", min_count=2),),
    fields=(Field("item"), Field("click"), Field("kind")),
    events=(
        Events(columns={"item": "items", "click": "marks", "kind": "'old'"}, table="old", time="none"),
        Events(columns={"item": "item", "click": "click", "kind": "'row'"}, where="shown = 1"),
        Events(columns={"item": "items", "kind": "'more'"}, table="more", time="at"),
    ),
    histories=HISTORIES,
    tasks=(Task("label"),),
    split=Split(kind="column", column="split"),
)


def make(seed: int) -> dict[str, pl.DataFrame]:
    """Random tables with ties in time, null users, null items, empty and null lists, users without events."""
    draw = random.Random(seed)
    users, items = [None, "a", "b", "c", "d"], [None, *(f"i{i}" for i in range(6))]
    span = draw.choice([3, 20, 10**5, 10**9])

    def lists(n: int) -> list[list | None]:
        return [
            None if draw.random() < 0.1 else [draw.choice(items) for _ in range(draw.randrange(4))] for _ in range(n)
        ]

    n = 30
    log = pl.DataFrame({
        "user": [draw.choice([*users, "no events"]) for _ in range(n)],
        "time": [draw.randrange(span) for _ in range(n)],
        "item": [draw.choice(items) for _ in range(n)],
        "click": [draw.choice([0, 1, None]) for _ in range(n)],
        "shown": [int(draw.random() < 0.8) for _ in range(n)],
        "label": [0, 1] * (n // 2),
        "split": [["train", "valid", "test"][i % 3 if i > 1 else 0] for i in range(n)],
    }).with_columns(shown=pl.when(pl.col("user") == "no events").then(0).otherwise("shown"))  # fmt: skip
    old = [(draw.choice(users), found) for found in lists(8)]
    more = [(draw.choice(users), draw.randrange(span), found) for found in lists(12)]
    return {
        "log": log,
        "old": pl.DataFrame(
            [(u, f, None if f is None else [draw.choice([0, 1, None]) for _ in f]) for u, f in old],
            schema={"user": pl.String, "items": pl.List(pl.String), "marks": pl.List(pl.Int64)},
            orient="row",
        ),
        "more": pl.DataFrame(
            more, schema={"user": pl.String, "at": pl.Int64, "items": pl.List(pl.String)}, orient="row"
        ),
    }


def events_of(tables: dict[str, pl.DataFrame]) -> list[list[dict]]:
    """Per source, its exploded events in file order."""
    old = [
        {"user": r["user"], "time": None, "item": item, "click": mark, "kind": "old"}
        for r in tables["old"].to_dicts()
        for item, mark in zip(r["items"] or [], r["marks"] or [], strict=True)
    ]
    rows = [
        {
            "user": r["user"],
            "time": r["time"],
            "item": r["item"],
            "click": r["click"],
            "kind": "row",
            "split": r["split"],
        }
        for r in tables["log"].to_dicts()
        if r["shown"] == 1
    ]
    more = [
        {"user": r["user"], "time": r["at"], "item": item, "click": None, "kind": "more"}
        for r in tables["more"].to_dicts()
        for item in r["items"] or []
    ]
    return [old, rows, more]


def vocabularies(tables: dict[str, pl.DataFrame]) -> dict[str, list]:
    """Known values: of the training rows, and of the events of their users."""
    train = [r for r in tables["log"].to_dicts() if r["split"] == "train"]
    users = {r["user"] for r in train} - {None}
    counts = {name: [] for name in ("item", "click", "kind")}
    counts["item"].append(Counter(r["item"] for r in train))
    for i, source in enumerate(events_of(tables)):
        kept = [e for e in source if (e["split"] == "train" if i == 1 else e["user"] in users)]
        for name in counts:
            counts[name].append(Counter(e[name] for e in kept))
    known = {}
    for name, readers in counts.items():
        least = 2 if name == "item" else 1
        known[name] = sorted({v for c in readers for v, n in c.items() if v is not None and n >= least})
    return known


def reference(tables: dict[str, pl.DataFrame], history: History) -> list[dict[str, list[int]]]:
    """The history of every row, by looking at every event."""
    keep = {
        "seen": lambda e: True,
        "clicked": lambda e: e["click"] == 1,
        "more": lambda e: e["kind"] == "more" and e["item"] is not None and e["item"] != "i3",
        "unmarked": lambda e: e["click"] is None,
        "everything": lambda e: True,
    }[history.name]
    known = vocabularies(tables)

    def code(name: str, event: dict, row: dict) -> int:
        if name == "gap":
            return 1 if event["time"] is None else 2 + min(31, (row["time"] - event["time"] + 1).bit_length() - 1)
        value = event[name]
        return 1 if value is None else 2 + known[name].index(value) if value in known[name] else 0

    out = []
    for row in tables["log"].to_dicts():
        mine = [e for source in events_of(tables) for e in source if e["user"] is not None and e["user"] == row["user"]]
        untimed = [e for e in mine if e["time"] is None]
        before = sorted((e for e in mine if e["time"] is not None and e["time"] < row["time"]), key=lambda e: e["time"])
        found = [e for e in untimed + before if keep(e)][-history.length :]
        codes = {name: [code(name, e, row) for e in found] for name in history.fields if name != "position"}
        out.append({**codes, "position": [1 + len(found) - i for i in range(len(found))]})
    return out


@pytest.mark.parametrize("seed", range(20))
def test_histories_equal_the_reference(seed, opened, monkeypatch):
    if seed % 2:
        monkeypatch.setattr(encoding, "CHUNK", 7)
    tables = make(seed)
    table = opened(DATA, **tables)
    rows = np.random.default_rng(seed).permutation(table.rows)
    features = table.batch(rows).features
    for history in HISTORIES:
        want = reference(tables, history)
        ragged = features[history.name]
        for i, row in enumerate(rows):
            at = slice(ragged.offsets[i], ragged.offsets[i + 1])
            for name in history.fields:
                assert ragged.values[name][at].tolist() == want[row][name], (history.name, name, row)


def test_events_of_the_same_instant_are_not_history(opened):
    log = pl.DataFrame({"user": [1] * 6, "time": [1, 1, 1, 2, 2, 3], "item": list("abcdef"), "click": [0, 1] * 3,
                        "split": ["train"] * 4 + ["valid", "test"], "label": [0, 1] * 3})  # fmt: skip
    data = Data(
        rows="log", user="user", time="time", features=(Feature("item"),), fields=(Field("item"),),
        events=(Events(columns={"item": "item"}),), histories=(History("seen", ("item",)),), tasks=(Task("label"),),
        split=Split(kind="column", column="split"),
    )  # fmt: skip
    seen = opened(data, log=log).batch(np.arange(6)).features["seen"]
    assert seen.lengths.tolist() == [0, 0, 0, 3, 3, 5]
    assert seen.values["item"][-5:].tolist() == [2, 3, 4, 5, 0]  # e is not in the training split


def test_no_events_at_all(opened):
    tables = make(0)
    empty = {name: tables[name].clear() for name in ("old", "more")}
    log = tables["log"].with_columns(shown=pl.lit(0))
    table = opened(DATA, log=log, **empty)
    for history in HISTORIES:
        assert table.batch(np.arange(table.rows)).features[history.name].lengths.sum() == 0


def test_list_and_array_columns_explode_alike(opened):
    tables = make(3)
    wide = pl.DataFrame({"user": ["a", "b", None], "items": [["i1", "i2"], ["i2", None], ["i3", "i3"]]})
    marks = pl.Series("marks", [[0, 1], [1, None], [1, 1]])
    lists = opened(DATA, **tables | {"old": wide.with_columns(marks)}).batch(np.arange(30)).features["seen"]
    cast = wide.with_columns(marks).cast({"items": pl.Array(pl.String, 2), "marks": pl.Array(pl.Int64, 2)})
    array = opened(DATA, **tables | {"old": cast}).batch(np.arange(30)).features["seen"]
    assert all(lists.values[k].equal(array.values[k]) for k in lists.values) and lists.offsets.equal(array.offsets)


def test_gap_codes():
    seconds = np.array([0, 1, 2, 3, 6, 7, 8, 2**31, 2**40])
    row = seconds + 1_650_000_000
    times = row - seconds
    want = [2 + min(31, int(s + 1).bit_length() - 1) for s in seconds]
    assert gap_codes(times, row, 1.0).tolist() == want
    assert gap_codes(times * 1000, row * 1000, 1000.0).tolist() == want
    assert gap_codes(np.array([NO_TIME, 999]), np.array([5, 1000]), 1e3).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"more": lambda t: t.with_columns(user=pl.Series(range(len(t))))}, ["more", "`user`", "Int64", "String"]),
        ({"more": lambda t: t.with_columns(at=pl.lit(None, dtype=pl.Int64))}, ["more", "no time", 'time = "none"']),
        ({"more": lambda t: t.drop("at")}, ["more", "no column `at`", "items"]),
        ({"more": lambda t: t.with_columns(at=pl.col("at").cast(pl.Datetime("us")))}, ["more", "different units"]),
        ({"more": lambda t: t.with_columns(at=pl.col("at").cast(pl.Float64))}, ["more", "integer", "Float64"]),
        ({"old": lambda t: t.with_columns(marks=pl.lit([1, 0, 1]))}, ["data.events `old`", "element counts"]),
        ({"old": lambda t: t.drop("items")}, ["old", "no column `items`", "marks"]),
        ({"more": lambda t: t.with_columns(items=pl.lit([1]))}, ["`item`", "String", "Int64"]),
    ],
)
def test_bad_event_tables(change, words, opened):
    tables = make(1)
    for name, edit in change.items():
        tables[name] = edit(tables[name])
    with pytest.raises(DataError) as error:
        opened(DATA, **tables)
    assert all(word in str(error.value) for word in words), error.value


def test_a_filter_on_an_unknown_name(opened):
    from dataclasses import replace

    with pytest.raises(DataError, match="History `x`.*no column `action`.*click"):
        opened(replace(DATA, histories=(History("x", ("item",), where="action = 'like'"),)), **make(1))


def test_only_events_that_a_row_can_see_are_kept(opened):
    tables = make(2)
    table = opened(DATA, **tables)
    users = set(tables["log"]["user"]) - {None}
    assert len(table.columns["event.item"]) == sum(e["user"] in users for part in events_of(tables) for e in part)
    strangers = {name: make(5)[name].with_columns(user=pl.col("user") + "?") for name in ("old", "more")}
    both = {name: pl.concat([strangers[name], tables[name], strangers[name]]) for name in strangers}
    again = opened(DATA, **tables | both)
    assert all(np.array_equal(again.columns[name], column) for name, column in table.columns.items())


def test_times_are_kept_for_gaps_alone(opened):
    from dataclasses import replace

    assert opened(DATA, **make(0)).columns["event.time"].dtype == np.int64
    plain = tuple(replace(h, fields=("item",)) for h in HISTORIES)
    assert "event.time" not in opened(replace(DATA, histories=plain), **make(0)).columns


def test_rows_without_a_user_see_nobody_even_if_an_id_hashes_to_0(opened):
    from dataclasses import replace

    zero = 2**64 - 0x9E3779B97F4A7C15  # the seed's constant cancels it
    assert stable_hash(pl.Series([zero, None], dtype=pl.Int64)).tolist() == [0, 0]
    log = pl.DataFrame({"user": [zero, None, 1, 1] * 2, "time": range(8), "item": [1] * 8, "label": [0, 1] * 4,
                        "split": ["train"] * 6 + ["valid", "test"]}, schema_overrides={"user": pl.Int64})  # fmt: skip
    data = replace(
        DATA, features=(Feature("item"),), fields=(Field("item"),), events=(Events(columns={"item": "item"}),),
        histories=(History("seen", ("item",)),),
    )  # fmt: skip
    lengths = opened(data, log=log).batch(np.arange(8)).features["seen"].lengths.tolist()
    assert lengths == [0, 0, 0, 1, 0, 0, 2, 3]
