"""Files that are added to a log are read alone, and the table is the one that all files give."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_encode import same

from unbraid.data import dictionary, events
from unbraid.data import encode as encoding
from unbraid.data.declaration import Data, Events, Join, Split
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.types import Feature, Field, History, Task

DATA = Data(
    rows="rows", user="user", time="time", time_unit="s", memory_mb=64, appended=True, joins=(Join("items.parquet", on="item"),),
    features=(Feature("item"), Feature("shop"), Feature("price", kind="number"), Feature("tags", kind="bag")),
    fields=(Field("item"), Field("shop")), tasks=(Task("click"),),
    events=(Events(columns={"item": "item", "shop": "shop"}, table="events"), Events(columns={"item": "item"}),),
    histories=(History("seen", ("item", "shop", "gap"), length=6), History("shops", ("item",), where="shop = 's1'", length=4)),
    split=Split(kind="time", valid_from=300, test_from=400),
)  # fmt: skip


def day(folder: Path, number: int, n: int = 80, late: int | None = None) -> None:
    """Rows and events of a hundred seconds, with ties in time; users of later days had events before, and no rows."""
    rng = np.random.default_rng(number)
    start = 100 * number if late is None else late
    for table, users in (("events", 12), ("rows", min(4 + 2 * number, 12))):
        frame = pl.DataFrame({
            "user": rng.integers(0, users, n), "time": np.sort(rng.integers(start, start + 100, n)) // 5 * 5,
            "item": rng.integers(0, 10, n), "price": rng.normal(size=n), "click": rng.integers(0, 2, n),
            "tags": [[int(t) for t in rng.integers(0, 5, rng.integers(0, 4))] for _ in range(n)],
        })  # fmt: skip
        (folder / table).mkdir(exist_ok=True)
        frame.write_parquet(folder / table / f"{number:02d}.parquet")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(encoding, "CHUNK", 50)
    pl.DataFrame({"item": range(10), "shop": [f"s{i % 3}" for i in range(10)]}).write_parquet(
        tmp_path / "items.parquet"
    )
    for number in range(5):
        day(tmp_path, number)
    return tmp_path


def made(log: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Encoded, int, int]:
    """The table, and how many rows and events were encoded for it."""
    read = {"write_rows": 0, "encode_events": 0}

    def counted(module: Any, name: str, place: int) -> None:
        real = getattr(module, name)

        def run(*args: Any) -> Any:
            read[name] += len(args[place])
            return real(*args)

        patch.setattr(module, name, run)

    with monkeypatch.context() as patch:
        counted(encoding, "write_rows", 0)
        counted(events, "encode_events", 2)
        data = replace(DATA, cache=str(log / "cache"), folder=str(log), **options.pop("declared", {}))
        table = Encoded(encode(data, **options))
    return table, read["write_rows"], read["encode_events"]


def whole(log: Path) -> Encoded:
    return Encoded(encode(replace(DATA, appended=False, cache=str(log / "other"), folder=str(log))))


@pytest.mark.parametrize(
    ("share", "large"), [pytest.param(30, 1 << 20, marks=pytest.mark.slow), (1 << 20, 1 << 20), (1 << 20, 2)]
)
def test_two_days_more_are_read_alone(share: int, large: int, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one bound everything is in runs, with the other in memory until it is kept; vocabularies in memory, or on disk."""
    monkeypatch.setattr(encoding, "SHARE", share)
    monkeypatch.setattr(dictionary, "LARGE", large)
    first, rows, found = made(log, monkeypatch)
    same(first.columns, whole(log).columns)
    assert rows == 400 and found == 800
    for number in (5, 6):
        day(log, number)
        table, rows, found = made(log, monkeypatch)
        assert rows == 80 and found == 160, "one day"
        all_of_it = whole(log)
        same(table.columns, all_of_it.columns)
        assert table.fitted.digest() == all_of_it.fitted.digest()
        assert table.about["rows"] == 80 * (number + 1)
    assert made(log, monkeypatch)[1:] == (0, 0), "found, not made"
    for place in (first.folder, table.folder):
        same(Encoded(place).columns, first.columns if place == first.folder else table.columns)


def test_a_bundle_reads_new_days_alone_whatever_is_in_them(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = made(log, monkeypatch)[0].fitted
    _, rows, _ = made(log, monkeypatch, fitted=fitted)
    assert rows == 0, "the codes are the same"
    day(log, 7, late=0)  # of the training split
    table, rows, found = made(log, monkeypatch, fitted=fitted)
    assert (rows, found) == (80, 160)
    again = encode(replace(DATA, appended=False, cache=str(log / "other"), folder=str(log)), fitted=fitted)
    same(table.columns, Encoded(again).columns)


@pytest.mark.parametrize("change", ["values", "order", "joined", "declared", "written again", "broken"])
def test_what_makes_the_whole_table_anew(change: str, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(log, monkeypatch)[0]
    declared: dict[str, Any] = {}
    day(log, 5)
    if change == "values":  # an item that the training split did not know
        log_of = pl.read_parquet(log / "rows" / "05.parquet").with_columns(
            item=pl.lit(99, pl.Int64), time=pl.col("time") * 0
        )
        log_of.write_parquet(log / "rows" / "05.parquet")
    elif change == "order":
        (log / "rows" / "05.parquet").rename(log / "rows" / "00a.parquet")
    elif change == "joined":
        items = pl.read_parquet(log / "items.parquet")
        items.with_columns(shop=pl.col("shop").str.replace("s2", "s1")).write_parquet(log / "items.parquet")
    elif change == "declared":
        declared = {"keep": "price > 0"}
    elif change == "written again":
        os.utime(log / "events" / "03.parquet", (1, 1))
    else:
        kept = json.loads((first.folder / "kept.json").read_text())
        (first.folder / "kept.json").write_text(json.dumps(kept)[:-9])
    table, rows, _ = made(log, monkeypatch, declared=declared)
    assert rows == table.rows, "all of them"
    data = replace(DATA, appended=False, cache=str(log / "other"), folder=str(log), **declared)
    same(table.columns, Encoded(encode(data)).columns)


def test_what_reads_other_rows_is_refused() -> None:
    for declared, words in (
        ({"exposure": ("user",)}, "`appended` each row is encoded by itself, and exposure reads others"),
        ({"drop_duplicates": True}, "drop_duplicates"),
        ({"split": Split(kind="order")}, "split.kind = order"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(DATA, **declared)
