"""Tables of events beside the rows: found, put into the rows' unit of time, and trained on as histories."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.guess.infer import infer

USERS, DAY = 40, dt.datetime(2024, 3, 1)


def moments(count: int, rng: np.random.Generator, days: int = 30) -> list[dt.datetime]:
    return [DAY + dt.timedelta(minutes=int(m)) for m in np.sort(rng.integers(0, 60 * 24 * days, count))]


def visits(seed: int = 0, rows: int = 900, events: int = 1200) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Offers that are taken by those who saw that brand last, and what they saw."""
    rng = np.random.default_rng(seed)
    seen, offers = (
        pl.DataFrame({"user_id": rng.integers(0, USERS, n), "ts": moments(n, rng), what: rng.integers(0, 30, n)})
        for what, n in (("page", events), ("offer_id", rows))
    )
    last = offers.join_asof(seen, on="ts", by="user_id", allow_exact_matches=False, check_sortedness=False)
    even = last["page"].fill_null(0) % 2 == 0
    return offers.with_columns(clicked=(even ^ pl.Series(rng.random(rows) < 0.1)).cast(pl.Int8)), seen


def loaded(text: str, folder: Path) -> config.Run:
    (folder / "run.toml").write_text(text)
    return config.load(folder / "run.toml")


def trained(folder: Path) -> None:
    done = CliRunner().invoke(
        app, ["train", str(folder / "run.toml"), "--steps", "10", "--out", str(folder / "out"), "--json", "--no-report"]
    )
    assert done.exit_code == 0, done.output


def lengths(run: config.Run, name: str) -> list[int]:
    """How long the histories of that name are, row by row."""
    table = Encoded(encode(run.data))
    return (table.columns[f"end.{name}"].astype(int) - table.columns[f"start.{name}"]).tolist()


def before(rows: pl.DataFrame, seen: pl.DataFrame) -> list[int]:
    """How many events of a row's user lie strictly before it, at most 50."""
    there = [(user, time) for user, time in seen.select("user_id", "ts").rows()]
    return [
        min(sum(u == user and t < time for u, t in there), 50) for user, time in rows.select("user_id", "ts").rows()
    ]


def test_a_table_of_events_becomes_a_history(tmp_path: Path) -> None:
    (folder := tmp_path / "shop").mkdir()
    rows, seen = visits()
    rows.write_csv(folder / "offers.csv", datetime_format="%Y-%m-%d %H:%M:%S")
    seen.with_row_index("id").write_csv(folder / "views.csv", datetime_format="%Y-%m-%d %H:%M:%S")
    text = infer(folder)
    run = loaded(text, tmp_path)
    assert run.data.rows == "offers.csv" and not run.data.joins and [t.name for t in run.data.tasks] == ["clicked"]
    assert [e.table for e in run.data.events] == ["rows", "views.csv"]
    mine = {h.name: h for h in run.data.histories}
    assert mine["views"].fields == ("page",) and mine["views"].where == "from_table = 'views'"
    assert "events of the rows' users; time is `ts`: text, read as %Y-%m-%d %H:%M:%S" in text
    assert "100% of its values are values of `offer_id`" in text and 'vocabulary = "offer_id"' in text
    assert lengths(run, "views") == before(rows, seen)
    trained(tmp_path)


@pytest.mark.parametrize("unit", ["s", "ms", "dates to s", "s to dates"])
def test_times_are_put_into_the_unit_of_the_rows(unit: str, tmp_path: Path) -> None:
    (folder := tmp_path / "shop").mkdir()
    rows, seen = visits(1)
    here, there = {"s": ("s", "s"), "ms": ("s", "ms"), "dates to s": ("s", ""), "s to dates": ("", "s")}[unit]
    written = [
        frame.with_columns(pl.col("ts").dt.epoch("s") * {"s": 1, "ms": 1000}[each]) if each else frame
        for frame, each in ((rows, here), (seen, there))
    ]
    written[0].write_parquet(folder / "offers.parquet")
    written[1].rename({"ts": "seen_at"}).write_parquet(folder / "views.parquet")
    run = loaded(infer(folder), tmp_path)
    assert lengths(run, "views") == before(rows, seen)


def test_rows_without_an_item_have_histories_too(tmp_path: Path) -> None:
    (folder := tmp_path / "bank").mkdir()
    rows, seen = visits(2)
    rows.select("user_id", "ts", churned="clicked").write_parquet(folder / "months.parquet")
    actions = pl.Series(np.random.default_rng(0).choice(["open", "pay", "call"], len(seen)))
    seen.select("user_id", "ts", action=actions).write_parquet(folder / "activity.parquet")
    run = loaded(infer(folder), tmp_path)
    assert [h.name for h in run.data.histories] == ["activity"] and run.data.histories[0].fields == ("action",)
    assert lengths(run, "activity") == before(rows, seen)
    trained(tmp_path)


def test_rows_of_a_rating_are_told_from_other_events(tmp_path: Path) -> None:
    (folder := tmp_path / "films").mkdir()
    rows, seen = visits(3)
    rows.rename({"offer_id": "movie_id"}).with_columns(clicked=pl.col("clicked") * 1.5 + 0.25).write_parquet(
        folder / "r.parquet"
    )
    seen.rename({"page": "movie_id"}).write_parquet(folder / "plays.parquet")
    run = loaded(infer(folder, ["clicked"]), tmp_path)
    mine = {h.name: h for h in run.data.histories}
    assert mine["earlier"].where == "from_table = 'rows'" and mine["plays"].fields == ("movie_id",)
    assert lengths(run, "plays") == before(rows, seen) and lengths(run, "earlier") == before(rows, rows)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda seen: seen.drop("ts"), "it has no time"),
        (
            lambda seen: seen.with_columns(pl.format("u{}", "user_id").alias("user_id")),
            "`user_id` is String there and Int64",
        ),
        (lambda seen: seen.with_columns(pl.col("user_id") + 1000), "no value of its `user_id` is one of the rows"),
        (lambda seen: seen.select("user_id", "ts"), "it has users and times, and no id that an event could be of"),
    ],
)
def test_what_is_no_source_of_events_says_why(change, why: str, tmp_path: Path) -> None:
    rows, seen = visits(4, 300, 400)
    rows.write_parquet(tmp_path / "offers.parquet")
    change(seen).write_parquet(tmp_path / "views.parquet")
    text = infer(tmp_path)
    assert f'# {{table = "views.parquet", on = ""}},  # not used: {why}' in text
    assert len(loaded(text, tmp_path).data.events) == 1


def test_rows_to_predict_are_no_events(tmp_path: Path) -> None:
    rows, _ = visits(5, 300, 10)
    rows.write_parquet(tmp_path / "offers.parquet")
    rows.drop("clicked").write_parquet(tmp_path / "new.parquet")
    text = infer(tmp_path)
    assert len(loaded(text, tmp_path).data.events) == 1 and "rows to predict, perhaps" in text
