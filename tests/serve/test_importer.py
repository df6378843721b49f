"""A run's events in a store: the same as histories are cut from, once, with columns and ids that do not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from toylog import make_data, make_log, make_run
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data.declaration import Data, Events, Join
from unbraid.data.events import NO_TIME
from unbraid.data.source import DataError
from unbraid.serve.importer import import_events
from unbraid.serve.store import Store, open_store, user_hash
from unbraid.types import Field

pytest.importorskip("lmdb")


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = open_store(tmp_path / "store")
    yield opened
    opened.close()


def all_of(store: Store) -> dict[str, tuple[int, int, dict[str, Any]]]:
    return {r.id: (user, r.time, dict(r.values)) for user in store.users() for r in store.read(user).records}


def test_every_row_is_an_event_with_the_columns_that_are_read(store: Store) -> None:
    log, told = make_log(), []
    found = import_events(make_data(), store, tables={"log": log}, progress=lambda *now: told.append(now))
    assert found == {"read": 600, "new": 600, "no_user": 0}
    assert told == [("importing rows", 600, 600)]
    events = all_of(store)
    assert len(events) == 600
    for number, row in enumerate(log.iter_rows(named=True)):
        values = {name: row[name] for name in ("item", "shop", "click")}
        assert events[f"rows:{number}"] == (user_hash(row["user"], "Int64"), row["time"], values)
    assert store.get("user_type") == "Int64" and store.get("per_second") == "1000"


def test_an_import_may_be_repeated_and_goes_on_where_it_stopped(store: Store) -> None:
    log = make_log()
    assert import_events(make_data(), store, tables={"log": log.head(200)})["new"] == 200
    assert import_events(make_data(), store, tables={"log": log})["new"] == 400
    assert import_events(make_data(), store, tables={"log": log})["new"] == 0
    assert store.stats()["events"] == 600


def several() -> tuple[Data, dict[str, pl.DataFrame]]:
    """Sources that share a table, have no time, filters, joined columns, and rows without a user."""
    data = make_data(
        joins=(Join("items", on="item"),),
        fields=(Field("item"), Field("shop"), Field("clicked"), Field("colour")),
        events=(
            Events(columns={"item": "seen"}, table="old", time="none"),
            Events(columns={"item": "bought", "clicked": "1"}, table="old", time="none"),
            Events(columns={"item": "item", "colour": "colour"}, table="visits", where="seconds > 3", time="at"),
            Events(columns={"item": "item", "clicked": "CAST(click + 0 AS BIGINT)"}, where="site = 'home'"),
        ),
    )
    visits = {
        "user": [1, None, 2, 1], "item": ["i1", "i2", "i3", "i4"], "seconds": [9, 9, 2, None], "at": [5, 6, 7, 8],
        "noise": [b"", b"", b"", b""],
    }  # fmt: skip
    tables = {
        "log": make_log(),
        "items": pl.DataFrame({"item": [f"i{i}" for i in range(30)], "colour": ["red", "blue"] * 15}),
        "old": pl.DataFrame({"user": [1, 2], "seen": [["i1", "i2"], []], "bought": [["i2"], None], "other": [1, 2]}),
        "visits": pl.DataFrame(visits).with_columns(pl.col("item").cast(pl.Categorical)),
    }
    return data, tables


def test_tables_filters_joins_and_events_without_time_or_user(store: Store) -> None:
    data, tables = several()
    found = import_events(data, store, tables=tables)
    home = tables["log"].with_row_index("n").filter(pl.col("site") == "home")
    events = all_of(store)
    assert found == {"read": 2 + 2 + len(home), "new": 2 + 1 + len(home), "no_user": 1}
    assert events["old:0"] == (user_hash(1, "Int64"), NO_TIME, {"seen": ["i1", "i2"], "bought": ["i2"]})
    assert events["old:1"] == (user_hash(2, "Int64"), NO_TIME, {"seen": [], "bought": None})
    # what is joined is joined again when it is read; the key is kept, and what the filter reads
    assert events["visits:0"] == (user_hash(1, "Int64"), 5, {"item": "i1", "seconds": 9})
    for row in home.iter_rows(named=True):
        values = {name: row[name] for name in ("item", "site", "click")}
        assert events[f"rows:{row['n']}"] == (user_hash(row["user"], "Int64"), row["time"], values)
    assert len(events) == found["new"]


def test_labels_that_are_withheld_stay_hidden(store: Store) -> None:
    log = make_log()
    import_events(make_data(withhold="site = 'mail'"), store, tables={"log": log})
    events = all_of(store)
    for number, site in enumerate(log["site"]):
        assert (events[f"rows:{number}"][2]["click"] is None) == (site == "mail")


def test_what_cannot_be_imported_says_why(store: Store) -> None:
    log = make_log()
    with pytest.raises(DataError, match="no `\\[\\[data.events\\]\\]`"):
        import_events(make_data(events=(), histories=()), store, tables={"log": log})
    dated = log.with_columns(shop=pl.lit("2024-01-01").str.to_date())
    with pytest.raises(DataError, match="`shop` is Date, which JSON has not"):
        import_events(make_data(), store, tables={"log": dated})
    twice = Events(columns={"item": "item"}, time="user")
    with pytest.raises(DataError, match="different times \\(time, user\\)"):
        import_events(make_data(events=(*make_data().events, twice)), store, tables={"log": log})
    gaps = log.with_columns(time=pl.when(pl.col("item") != "i3").then(pl.col("time")))
    with pytest.raises(DataError, match="events have no time"):
        import_events(make_data(), store, tables={"log": gaps})


def test_a_store_of_other_users_or_units_is_refused(store: Store) -> None:
    log = make_log()
    import_events(make_data(), store, tables={"log": log})
    with pytest.raises(ValueError, match="user ids are Int64, and the run's are String"):
        import_events(make_data(), store, tables={"log": log.with_columns(pl.col("user").cast(pl.String))})
    with pytest.raises(ValueError, match="units of time in a second are 1000, and the run's are 1"):
        import_events(make_data(time_unit="s"), store, tables={"log": log})


def test_the_commands_fill_show_and_cut_a_store(tmp_path: Path) -> None:
    log = make_log()
    log.write_parquet(tmp_path / "log.parquet")
    run = make_run(data=make_data(rows="log.parquet", folder=str(tmp_path)))
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "run.toml").write_text(config.dumps(run))
    place = str(tmp_path / "store")

    def command(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["store", *words])
        assert done.exit_code == code, done.output
        return done.output

    assert "There is no history store" in command("stats", place, code=2)
    assert "is not a bundle" in command("import", str(tmp_path), place, code=2)
    assert "nothing was imported" in command("show", place, "1", code=2)
    assert "600 events read, 600 new, 0 without a user" in command("import", str(tmp_path / "bundle"), place)
    again = command("import", str(tmp_path / "bundle"), place, "--json", "--folder", str(tmp_path))
    assert json.loads(again) == {"read": 600, "new": 0, "no_user": 0}
    found = json.loads(command("stats", place, "--json"))
    users = log["user"].n_unique()
    assert (found["users"], found["events"], found["durability"]) == (users, 600, "every event whose append returned")
    mine = log.with_row_index("n").filter(pl.col("user") == 7).sort("time", maintain_order=True)
    shown = [json.loads(line) for line in command("show", place, "7", "--last", "3").splitlines()]
    assert [one["id"] for one in shown] == [f"rows:{n}" for n in mine["n"].tail(3)]
    assert shown[-1]["time"] == mine["time"][-1] and shown[-1]["values"]["item"] == mine["item"][-1]
    assert "User ids of this store are Int64" in command("show", place, "seven", code=2)
    assert f"{len(mine) - 2:,} events of 1 users removed" in command("trim", place, "--newest", "2", "--user", "7")
    assert "2 events of user 7 removed" in command("delete", place, "7")
    assert command("show", place, "7") == ""
    assert "--newest should be at least 0" in command("trim", place, "--newest", "-1", code=2)
    command("trim", place, "--newest", "1")
    assert f"events {users - 1}" in command("stats", place)
    assert "address should be" in command("stats", "http://x", code=2)


def test_a_run_that_reads_more_than_was_kept_is_refused(store: Store) -> None:
    # known ids stay as they are, so that it would see nulls
    log = make_log()
    import_events(make_data(), store, tables={"log": log})
    more = replace(make_data().events[0], columns={**make_data().events[0].columns, "site": "site"})
    with pytest.raises(ValueError, match="events of `rows` without site, which the run reads"):
        import_events(make_data(events=(more,)), store, tables={"log": log})
    less = replace(make_data(), events=(Events(columns={"item": "item"}),), fields=(Field("item"),), histories=())
    assert import_events(less, store, tables={"log": log})["new"] == 0


def test_a_source_of_constants_needs_no_columns(store: Store) -> None:
    constant = make_data(events=(Events(columns={"clicked": "1"}),))
    assert import_events(constant, store, tables={"log": make_log()})["new"] == 600
    assert {str(values) for _, _, values in all_of(store).values()} == {"{}"}
