"""A store as tables: the rows that were imported and sent, whole, in order, in bounded memory, or nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from rankerkit import untrained
from storekit import Server
from toylog import make_data, make_log, make_run
from typer.testing import CliRunner

from unbraid.cli.main import app
from unbraid.data.declaration import Events, Join
from unbraid.data.encode import encode
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.serve import exporter
from unbraid.serve.exporter import ExportError, export_events
from unbraid.serve.importer import import_events
from unbraid.serve.kept import note, noted
from unbraid.serve.ranker import Ranker, RequestError
from unbraid.serve.store import Record, Store, open_store
from unbraid.types import Feature, Field, Task

pytest.importorskip("lmdb")
redis = pytest.importorskip("redis")
READ = [
    "user",
    "item",
    "shop",
    "site",
    "time",
    "price",
    "tags",
    "text_vector",
    "click",
    "buy",
]  # of the toy log's columns


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("redis"))
    yield running
    running.stop()


@pytest.fixture(params=["lmdb", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    address = str(tmp_path / "store")
    if request.param == "redis":
        address = request.getfixturevalue("server").url
        with redis.Redis.from_url(address) as client:
            client.flushall()
    opened = open_store(address)
    yield opened
    opened.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "store")
    yield opened
    opened.close()


def table(folder: Path, name: str = "log") -> pl.DataFrame:
    return pl.read_parquet(folder / name / "*.parquet")


def same_rows(found: pl.DataFrame, wanted: pl.DataFrame) -> None:
    """Equal, types too, when both are sorted by everything that sorts."""
    keys = [name for name in wanted.columns if not isinstance(wanted.schema[name], pl.List)]
    assert_frame_equal(found.sort(keys), wanted.sort(keys))


# ------------------------------------------------------------------------------------------------------------ round trip
@pytest.mark.parametrize("chunk", [30, 200_000])
def test_what_was_imported_comes_back_whole_in_order_of_time(store: Store, tmp_path: Path, chunk: int) -> None:
    log = make_log().with_columns(
        pl.col("shop").cast(pl.Int8), pl.col("click").cast(pl.Boolean), user=pl.col("user").cast(pl.Int32)
    )
    log = log.with_columns(time=pl.col("time") // 20_000_000 * 20_000_000)  # many at the same time
    import_events(make_data(), store, tables={"log": log}, keep="rows")
    told: list[tuple[str, int, int]] = []
    found = export_events(store, tmp_path / "out", chunk=chunk, progress=lambda *now: told.append(now))
    assert found == {"rows": 600} and told[0][0] == "reading users" and told[-1][0] == "writing rows"
    got = table(tmp_path / "out")
    same_rows(got, log.select(READ))
    assert got["time"].is_sorted()
    # of one user and time: as they arrived
    mine = [frame.filter(pl.col("user") == 3).sort("time", maintain_order=True) for frame in (got, log.select(READ))]
    assert_frame_equal(*mine)
    parts = [len(pl.read_parquet(path)) for path in (tmp_path / "out" / "log").iterdir()]
    assert max(parts) <= max(2 * chunk, 16 + len(mine[0])) and sum(parts) == 600
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about == {"since": None, "until": None, "tables": {"rows": {"name": "log", "rows": 600}}}
    export_events(store, tmp_path / "again", chunk=chunk)
    assert_frame_equal(table(tmp_path / "again"), got)


def test_a_run_reads_an_export_as_it_reads_its_own_tables(files: Store, tmp_path: Path) -> None:
    log = make_log().with_row_index("n").sample(fraction=1, shuffle=True, seed=1).drop("n")
    (tmp_path / "own").mkdir()
    log.write_parquet(tmp_path / "own" / "log.parquet")
    data = make_data(rows="log.parquet", folder=str(tmp_path / "own"))
    import_events(data, files, keep="rows")
    export_events(files, tmp_path / "out", chunk=100)
    mine, theirs = (Encoded(encode(d)) for d in (data, replace(data, folder=str(tmp_path / "out"))))
    assert mine.schema == theirs.schema and mine.rows == theirs.rows == 600
    order = [
        np.lexsort((one.columns["feature.item"], one.columns["user"], one.columns["time"])) for one in (mine, theirs)
    ]
    a, b = (one.batch(rows) for one, rows in zip((mine, theirs), order, strict=True))
    for part in ("features", "labels", "observed"):
        for name, values in getattr(a, part).items():
            assert plain(values) == plain(getattr(b, part)[name]), name
    assert a.domain.tolist() == b.domain.tolist() and plain(a.features["seen"])["item"]


def plain(values: Any) -> Any:
    """A column, or lists with their ends, as Python has them."""
    if hasattr(values, "offsets"):
        return {name: found.tolist() for name, found in values.values.items()} | {"/ends": values.offsets.tolist()}
    return values.tolist()


def test_all_that_training_reads_is_kept_and_nothing_else(files: Store, tmp_path: Path) -> None:
    """Roles, SQL, joins, filters, a glob, categories, dates as times, an event table without time, rows that no event reads."""
    log = make_log()
    first, n = datetime(2024, 1, 1, tzinfo=UTC), pl.int_range(pl.len())
    log = log.with_columns(
        at=pl.lit(first) + pl.duration(minutes=n * 20), site=pl.col("site").cast(pl.Categorical), quality=pl.col("price"),
        w=pl.lit(1.5, dtype=pl.Float32), visit=n // 3, rate=pl.lit(0.5), noise=pl.lit(b"no JSON"),
    ).drop("time")  # fmt: skip
    data = make_data(
        rows="logs/*.parquet", folder=str(tmp_path), keep="quality is null or quality < 2", weight="w", request="visit",
        time="at", joins=(Join("items", on="item"),), exposure=("user", "CAST(shop AS INT)"),
        features=(Feature("item"), Feature("colour"), Feature("cheap", column="CASE WHEN price < 0 THEN 1 ELSE 0 END")),
        tasks=(Task("click", sampling_rate="rate"), Task("buy")), fields=(Field("item"), Field("clicked")), histories=(),
        events=(
            Events(columns={"item": "seen"}, table="old", time="none"),
            Events(columns={"item": "item", "clicked": "click"}, where="click = 1"),
        ),
    )  # fmt: skip
    old = pl.DataFrame({"user": [1, 2, None], "seen": [["i1"], None, ["i2"]], "other": [1, 2, 3]})
    tables = {"items": pl.DataFrame({"item": [f"i{i}" for i in range(30)], "colour": ["red", "blue"] * 15}), "old": old}
    import_events(data, files, tables={**tables, data.rows: log}, keep="rows")
    assert export_events(files, tmp_path / "out", chunk=90) == {
        "old": 2,
        "rows": len(kept := log.filter(pl.sql_expr(data.keep))),
    }
    read = ["user", "item", "shop", "site", "price", "click", "buy", "at", "quality", "w", "visit", "rate"]
    same_rows(
        table(tmp_path / "out", "logs"), kept.select(sorted(read, key=log.columns.index)).cast({"site": pl.String})
    )
    same_rows(table(tmp_path / "out", "old"), old.head(2).drop("other"))
    assert export_events(files, tmp_path / "some", tables=["old"]) == {"old": 2}
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["export.json", "old"]


def test_values_that_the_type_of_the_table_cannot_hold_widen_it(files: Store, tmp_path: Path) -> None:
    log = make_log().with_columns(pl.col("shop", "click").cast(pl.Int8), pl.col("tags").cast(pl.List(pl.Int8)))
    import_events(make_data(), files, tables={"log": log}, keep="rows")
    values = {**log.row(0, named=True), "shop": 300, "tags": [1, 2_000]}
    files.append([(5, Record("new", 1, "rows", {name: values[name] for name in READ}))])
    export_events(files, tmp_path / "out", chunk=100)
    got = table(tmp_path / "out")
    assert {n: got.schema[n] for n in ("shop", "tags", "click")} == {
        "shop": pl.Int64,
        "tags": pl.List(pl.Int64),
        "click": pl.Int8,
    }
    assert got["shop"].max() == 300 and got["tags"].list.max().max() == 2_000


# ------------------------------------------------------------------------------------------------- what a service appends
def ranker(store: Store, log: pl.DataFrame, tmp_path: Path, **changes: Any) -> Ranker:
    bundle = untrained(make_run(data=make_data(**changes)), tmp_path / "cache", {"log": log})
    return Ranker(bundle, store, tables={"log": log})


def sent(ranker: Ranker, rows: pl.DataFrame, *ids: str) -> list[bool]:
    """Rows as a client's events."""
    events = ranker.records("rows", rows.select(list(ranker.sources["rows"])).to_dicts())
    return ranker.store.append([(user, record._replace(id=i)) for (user, record), i in zip(events, ids, strict=True)])


def test_events_that_come_late_or_twice_or_with_outcomes_unknown(store: Store, tmp_path: Path) -> None:
    log = make_log()
    import_events(make_data(), store, tables={"log": log.head(500)}, keep="rows")
    serving = ranker(store, log, tmp_path)
    assert set(serving.sources["rows"]) == set(READ)
    late = log.tail(100).with_columns(pl.when(pl.col("shop") == 1).then(None).otherwise(pl.col("buy")).alias("buy"))
    names = [f"app-{i}" for i in range(100)]
    assert all(sent(serving, late.head(60), *names[:60])), "new"
    assert not any(sent(serving, late.head(60).with_columns(click=1 - pl.col("click")), *names[:60])), (
        "the first one stays"
    )
    early = late.tail(40).with_columns(time=pl.col("time") - 900_000_000)  # outcomes that were waited for
    assert all(sent(serving, early[::-1], *names[:59:-1]))
    export_events(store, tmp_path / "out", chunk=64)
    got = table(tmp_path / "out")
    same_rows(got, pl.concat([log.head(500), late.head(60), early]).select(READ))
    assert got["time"].is_sorted()


def test_an_event_needs_every_column_that_training_reads(files: Store, tmp_path: Path) -> None:
    log = make_log()
    import_events(make_data(), files, tables={"log": log.head(10)}, keep="rows")
    serving = ranker(files, log, tmp_path)
    whole = log.select(READ).row(0, named=True)
    with pytest.raises(RequestError, match="Column `buy` is missing") as error:
        serving.records("rows", [{n: v for n, v in whole.items() if n != "buy"}])
    assert error.value.field == "events.0.buy"
    (_, record), = serving.records("rows", [whole])  # fmt: skip
    assert dict(record.values) == whole
    # histories read what they did
    assert serving.tables["rows"].reads == ["item", "shop", "click"]


def test_types_are_known_without_the_table(files: Store, tmp_path: Path) -> None:
    log = make_log()
    import_events(make_data(), files, tables={"log": log}, keep="rows")
    known = (*make_data().features, Feature("user"))  # its type is that of a vocabulary
    bundle = untrained(make_run(data=make_data(features=known)), tmp_path / "cache", {"log": log})
    serving = Ranker(bundle, files, folder=tmp_path)  # where there is no table `log`
    kinds = {"buy": "int", "price": "float", "tags": "list[int]", "user": "int"}
    assert {name: serving.sources["rows"][name].kind for name in kinds} == kinds
    assert noted(files)["rows"].types == {n: kind for n, kind in log.schema.items() if n in READ}


def test_what_a_later_bundle_reads_more_is_noted_and_null_before(files: Store, tmp_path: Path) -> None:
    log = make_log()
    import_events(make_data(), files, tables={"log": log.head(500)}, keep="rows")
    more = ranker(files, log, tmp_path, features=(*make_data().features, Feature("size")))
    assert sent(more, log.tail(1), "new") == [True]
    export_events(files, tmp_path / "out")
    got = table(tmp_path / "out").sort("time", maintain_order=True)
    assert got.columns == [*READ, "size"] and got["size"].null_count() == 500 and got["size"][-1] == log["size"][-1]
    with pytest.raises(ValueError, match="keeps `shop` of `rows` as Int64, and the run's is String"):
        note(files, "rows", "log", {"shop": pl.String})


# --------------------------------------------------------------------------------------------------------------- bounds
def test_since_and_until_are_of_events_with_a_time(store: Store, tmp_path: Path) -> None:
    log = make_log()
    old = pl.DataFrame({"user": [1, 2], "seen": ["i1", "i2"]})
    events = (Events(columns={"item": "seen"}, table="old", time="none"), *make_data().events)
    import_events(make_data(events=events), store, tables={"log": log, "old": old}, keep="rows")
    low, high = int(log["time"][100]), int(log["time"][400])
    inside = log.filter(pl.col("time").is_between(low, high, closed="left")).select(READ)
    assert export_events(store, tmp_path / "out", since=low, until=high) == {"old": 2, "rows": len(inside)}
    same_rows(table(tmp_path / "out"), inside)
    assert export_events(store, tmp_path / "none", until=-1) == {"old": 2, "rows": 0}
    assert table(tmp_path / "none").schema == inside.schema, "a table without rows is still read"


def test_memory_does_not_grow_with_the_store(files: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, pending = [0], [0]
    add, windows = exporter._Runs.add, exporter._Runs.windows

    def watched(self: Any, *event: Any) -> None:
        add(self, *event)
        pending[0] = max(pending[0], len(self.waiting))

    def frames(self: Any) -> Iterator[pl.DataFrame]:
        for frame in windows(self):
            most[0] = max(most[0], len(frame))
            yield frame

    monkeypatch.setattr(exporter._Runs, "add", watched)
    monkeypatch.setattr(exporter._Runs, "windows", frames)
    log = make_log(2_400, users=300)  # each user of a few events
    import_events(make_data(), files, tables={"log": log}, keep="rows")
    export_events(files, tmp_path / "out", chunk=150)
    assert pending[0] < 150 and most[0] <= 300
    same_rows(table(tmp_path / "out"), log.select(READ))


# --------------------------------------------------------------------------------------------------------------- refusals
def test_a_choice_comes_before_the_events(files: Store, tmp_path: Path) -> None:
    log = make_log()
    with pytest.raises(ValueError, match="keeps one of events, rows. Found 'all'"):
        import_events(make_data(), files, tables={"log": log}, keep="all")
    import_events(make_data(), files, tables={"log": log})
    with pytest.raises(ValueError, match="holds 600 events, kept as `events`"):
        import_events(make_data(), files, tables={"log": log}, keep="rows")
    with pytest.raises(ExportError, match="less than a row to train on.*--keep rows"):
        export_events(files, tmp_path / "out")
    with closing(open_store(tmp_path / "other")) as other:
        assert import_events(make_data(), other, tables={"log": log}, keep="rows")["new"] == 600
        assert import_events(make_data(), other, tables={"log": log})["new"] == 0, "a store goes on as it began"
        with pytest.raises(ValueError, match="kept as `rows`"):
            import_events(make_data(), other, tables={"log": log}, keep="events")
        more = make_data(features=(*make_data().features, Feature("size")))
        with pytest.raises(ValueError, match="events of `rows` without size, which the run reads"):
            import_events(more, other, tables={"log": log})


def test_what_cannot_be_exported_says_why_and_leaves_nothing(files: Store, tmp_path: Path) -> None:
    log = make_log()
    with pytest.raises(DataError, match="`noise` is Binary, which JSON has not"):
        bad = make_data(features=(*make_data().features, Feature("noise")))
        import_events(bad, files, tables={"log": log.with_columns(noise=pl.lit(b""))}, keep="rows")
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="The store holds no events"):
        export_events(files, out)
    import_events(make_data(), files, tables={"log": log})
    with pytest.raises(ExportError, match="no table clicks. It has rows"):
        export_events(files, out, tables=["clicks"])
    with pytest.raises(ExportError, match="600 events, and none of rows from 5,000,000,000"):
        export_events(files, out, since=5_000_000_000)
    with pytest.raises(ExportError, match="`since` should be before `until`. Found 7 and 7"):
        export_events(files, out, since=7, until=7)
    assert not out.exists() and not [path for path in tmp_path.iterdir() if "unbraid-" in path.name]
    note(files, "rows", "log", {})
    export_events(files, out)
    with pytest.raises(FileExistsError, match="exists. Delete it, or choose another folder"):
        export_events(files, out)
    export_events(files, out, until=int(log["time"][300]), overwrite=True)
    assert len(table(out)) == (log["time"] < log["time"][300]).sum()
    with pytest.raises(ExportError, match="none of rows"):
        export_events(files, out, until=-1, overwrite=True)
    assert len(table(out)), "what was there stays"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="something else than an export; it is not deleted"):
        export_events(files, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("/tables/log.parquet", "outside of `data.folder`"), ("../log", "outside"), ("x/day-*.csv", "no file called")],
)
def test_a_table_that_is_no_name_for_a_folder(files: Store, tmp_path: Path, name: str, message: str) -> None:
    import_events(make_data(rows=name), files, tables={name: make_log()}, keep="rows")
    with pytest.raises(ExportError, match=message):
        export_events(files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from unbraid.serve import exporter
from unbraid.serve.store import open_store
write = exporter._write
def slow(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(60)
exporter._write = slow
exporter.export_events(open_store(sys.argv[1]), sys.argv[2], chunk=100, overwrite=True)
"""


def test_a_killed_export_leaves_what_was_there(files: Store, tmp_path: Path) -> None:
    import_events(make_data(), files, tables={"log": make_log()}, keep="rows")
    out = tmp_path / "out"
    export_events(files, out, until=int(make_log()["time"][50]))
    before = table(out)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert_frame_equal(table(out), before)
    assert [path for path in tmp_path.iterdir() if "unbraid-" in path.name], "half of it is hidden"
    export_events(files, out, overwrite=True)
    assert len(table(out)) == 600 and not [path for path in tmp_path.iterdir() if "unbraid-" in path.name]


# --------------------------------------------------------------------------------------------------------------- command
def test_the_command(tmp_path: Path) -> None:
    from unbraid import config

    make_log().write_parquet(tmp_path / "log.parquet")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "run.toml").write_text(
        config.dumps(make_run(data=make_data(rows="log.parquet", folder=str(tmp_path))))
    )
    place, out = str(tmp_path / "store"), str(tmp_path / "out")

    def command(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["store", *words])
        assert done.exit_code == code, done.output
        return done.output

    assert "There is no history store" in command("export", place, out, code=2)
    command("import", str(tmp_path / "bundle"), place, "--keep", "rows")
    assert f"{out}: 600 of rows" in command("export", place, out)
    assert "Delete it" in command("export", place, out, code=2)
    at = make_log()["time"][300]
    iso = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=at)).isoformat()
    found = json.loads(command("export", place, out, "--overwrite", "--since", str(at), "--table", "rows", "--json"))
    assert found == {"rows": (make_log()["time"] >= at).sum()}
    assert json.loads(command("export", place, out, "--overwrite", "--since", iso, "--json")) == found
    assert table(Path(out), "log.parquet")["time"].min() == at
    assert "not an ISO date" in command("export", place, str(tmp_path / "x"), "--since", "yesterday", code=2)
