"""Texts that mean numbers and moments, and files that are not plain CSV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data.encode import encode
from unbraid.data.source import DataError, rows_plan
from unbraid.data.table import Encoded
from unbraid.guess.columns import Column, number_in
from unbraid.guess.infer import infer
from unbraid.guess.roles import item_of
from unbraid.guess.tables import find_tables, separator_of
from unbraid.guess.times import FORMATS, format_of

rng = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("texts", "numbers"),
    [
        (["$1,234.50", "$3"] * 10 + ["N/A"], [1234.5, 3.0] * 10 + [None]),
        (["(12.50)", "1,000.00"], [-12.5, 1000.0]),
        (["3,50 €", "1.234,00 €"], [3.5, 1234.0]),
        (["12 %", "7.5 %"], [12.0, 7.5]),
        (["USD 5.10", "USD 6"], [5.1, 6.0]),
        (["1", "2.5", "NA", "7", "8", "9", "10", "11", "12", "13", "14"], [1, 2.5, None, 7, 8, 9, 10, 11, 12, 13, 14]),
    ],
)
def test_amounts(texts: list[str], numbers: list[float | None]) -> None:
    sql, note, values = number_in(pl.Series("x", texts))
    assert values.to_list() == numbers and note
    assert pl.DataFrame({"x": texts}).select(pl.sql_expr(sql)).to_series().to_list() == numbers, (
        "what the run file reads"
    )


@pytest.mark.parametrize(
    "texts",
    [
        ["007", "012"],
        ["2024-01-02", "2024-02-03"],
        ["10.0.0.1", "10.0.0.2"],
        ["red", "3"],
        ["12.03.2024", "13.03.2024"],
        ["555 1234"],
    ],
)
def test_what_is_no_amount(texts: list[str]) -> None:
    assert number_in(pl.Series("x", texts))[0] == ""


def test_moments_of_many_forms() -> None:
    for text in (
        "2013-01-01T10:00:00Z",
        "03/14/2014 5:07 PM",
        "14.03.2014",
        "Mar 14, 2014",
        "2014/03/14 07:08",
        "14-Mar-14",
    ):
        form = format_of(pl.Series("t", [text]))
        assert form in FORMATS, text
        found = pl.DataFrame({"t": [text]}).select(pl.sql_expr(f"STRPTIME(t, '{form}')")).item()
        assert found.year in (2013, 2014) and found.month in (1, 3)
    assert format_of(pl.Series("t", ["01/02/2014", "14/02/2014"])) == "%d/%m/%Y", "the first form that fits all"
    assert format_of(pl.Series("t", ["Springfield 12", "x"])) == ""


def test_days_since_a_date_that_lies_before_the_row(tmp_path: Path) -> None:
    rows = 300
    frame = pl.DataFrame({
        "joined": [f"{1 + n % 12:02}/{13 + n % 15}/2019" for n in range(rows)],
        "seen_at": [f"2021-{1 + n // 30:02}-{1 + n % 28:02}" for n in range(rows)],
        "paid": rng.integers(0, 2, rows),
    })  # fmt: skip
    frame.write_csv(tmp_path / "t.csv")
    (tmp_path / "run.toml").write_text(infer(tmp_path / "t.csv"))
    run = config.load(tmp_path / "run.toml")
    age = next(f for f in run.data.features if f.name == "joined_age")
    got = rows_plan(run.data, tmp_path, None).select(pl.sql_expr(age.column)).collect().to_series()
    want = frame["seen_at"].str.to_date() - frame["joined"].str.to_date("%m/%d/%Y")
    assert got.to_list() == want.dt.total_days().cast(pl.Float64).to_list()


def test_year_month_and_day_are_a_time(tmp_path: Path) -> None:
    frame = pl.DataFrame({"year": 2020, "month": [1 + n // 28 for n in range(280)], "day": [1 + n % 28 for n in range(280)],
                          "y": [n % 3 % 2 for n in range(280)], "a": rng.normal(size=280)})  # fmt: skip
    frame.write_csv(tmp_path / "t.csv")
    text = infer(tmp_path / "t.csv")
    (tmp_path / "run.toml").write_text(text)
    run = config.load(tmp_path / "run.toml")
    assert run.data.split.kind == "time" and run.data.split.test_from == "2020-09-28"
    assert {f.name for f in run.data.features} == {"a"} and "a part of the time" in text


# ----------------------------------------------------------------------------------------------------------- the tables
def test_other_separators_train(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(
        "id;price;won\n" + "".join(f"{n};{n % 9},50;{'ja' if n % 3 else 'nein'}\n" for n in range(400))
    )
    assert separator_of(tmp_path / "d.csv") == ";"
    (tmp_path / "run.toml").write_text(infer(tmp_path / "d.csv"))
    run = config.load(tmp_path / "run.toml")
    assert run.data.text[0].separator == ";"
    assert Encoded(encode(run.data, tmp_path)).rows == 400


@pytest.mark.parametrize("suffix", [".csv.gz", ".tsv.gz", ".csv.zst", ".tsv"])
def test_compressed_tables_train_as_they_are(suffix: str, tmp_path: Path) -> None:
    (folder := tmp_path / "log").mkdir()
    user = rng.integers(0, 60, 400)
    frame = pl.DataFrame({"user_id": user, "a": rng.normal(size=400), "bought": (user + rng.integers(0, 3, 400)) % 2})
    users = pl.DataFrame({"id": range(60), "land": [f"l{n % 5}" for n in range(60)]})
    usual, how = "\t" if ".tsv" in suffix else ",", "gzip" if ".gz" in suffix else "zstd" if ".zst" in suffix else None
    for name, table, mark in (("rows", frame, usual), ("users", users, ";")):  # one as its name says, one otherwise
        table.lazy().sink_csv(folder / f"{name}{suffix}", compression=how or "uncompressed", separator=mark)
    text = infer(folder)
    assert f'rows = "rows{suffix}"' in text and f'{{table = "users{suffix}", on = "user_id", key = "id"}}' in text
    assert f'text = [{{table = "users{suffix}", separator = ";"}}]' in text
    assert 'name = "log"' in text and 'name = "rows"' in infer(folder / f"rows{suffix}")
    (tmp_path / "run.toml").write_text(text)
    done = CliRunner().invoke(
        app, ["train", str(tmp_path / "run.toml"), "--steps", "5", "--out", str(tmp_path / "out"), "--json"]
    )
    assert done.exit_code == 0, done.output


def test_files_called_train_and_test(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    frame = pl.DataFrame({"a": rng.normal(size=300), "b": rng.integers(0, 5, 300), "target": rng.integers(0, 2, 300)})
    frame[:240].write_csv(folder / "train.csv")
    frame[240:].write_csv(folder / "test.csv")
    frame.drop("target").with_row_index("row").write_csv(folder / "new.csv")
    tables = find_tables(folder)
    assert tables.splits == {"t*.csv": {"test_files": "test.csv"}}
    (tmp_path / "run.toml").write_text(infer(folder))
    run = config.load(tmp_path / "run.toml")
    split = dict(rows_plan(run.data, tmp_path, None).collect()["__split"].value_counts().rows())
    assert split[2] == 60 and split[0] + split[1] == 240 and 10 < split[1] < 40


def test_test_rows_without_labels_are_rows_to_predict(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {"Id": range(300), "a": rng.normal(size=300), "b": rng.integers(0, 5, 300), "target": rng.integers(0, 2, 300)}
    )
    frame.write_csv(tmp_path / "train.csv")
    frame.drop("target").with_columns(pl.col("Id") + 1000).write_csv(tmp_path / "test.csv")
    frame.select(pl.col("Id") + 1000, "target").write_csv(tmp_path / "sample_submission.csv")
    text = infer(tmp_path)
    assert 'rows = "train.csv"' in text and "it has no target: rows to predict" in text
    assert '# {table = "sample_submission.csv"' in text


def test_keys_of_other_names_and_a_table_that_is_joined_twice(tmp_path: Path) -> None:
    ports = pl.DataFrame(
        {"code": [f"P{n}" for n in range(12)], "name": [f"port {n}" for n in range(12)], "lat": rng.normal(size=12)}
    )
    ports.write_csv(tmp_path / "ports.csv")
    pl.DataFrame({"id": range(40), "name": [f"ship {n}" for n in range(40)], "tons": rng.normal(size=40)}).write_csv(
        tmp_path / "ships.csv"
    )
    rows = 400
    ends = [[f"P{n}" for n in rng.integers(0, 12, rows)] for _ in range(2)]
    log = pl.DataFrame({"ship_id": rng.integers(0, 40, rows), "start": ends[0], "stop": ends[1], "load": rng.normal(size=rows),
                        "late": rng.integers(0, 2, rows)})  # fmt: skip
    log.write_csv(tmp_path / "trips.csv")
    (tmp_path / "run.toml").write_text(infer(tmp_path))
    run = config.load(tmp_path / "run.toml")
    joins = {(j.table, j.on, j.key) for j in run.data.joins}
    assert joins == {("ports.csv", "start", "code"), ("ports.csv", "stop", "code"), ("ships.csv", "ship_id", "id")}
    got = rows_plan(run.data, tmp_path, None).collect()
    assert got["start_name"].to_list() == ["port " + p[1:] for p in log["start"]]
    assert got["stop_lat"].null_count() == 0 and got["tons"].null_count() == 0
    assert Encoded(encode(run.data, tmp_path)).rows == rows


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Found an empty folder"):
        infer(tmp_path)
    (tmp_path / "book.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"Found files of other kinds: \.xlsx"):
        infer(tmp_path)
    (tmp_path / "head.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="a header and no rows"):
        infer(tmp_path)


def test_the_item_is_the_named_column_with_the_most_values() -> None:
    def column(name: str, distinct: int) -> Column:
        return Column(pl.Series(name, [i % distinct for i in range(400)]), True, distinct, 400)

    found = item_of(
        [column("music_id", 300), column("item_id", 40), column("video_id", 200), column("product_name", 350)]
    )
    assert found is not None and found.name == "video_id", "an id before a name, and the most of them"
    assert item_of([column("item_id", 20), column("colour", 300)]) is None
