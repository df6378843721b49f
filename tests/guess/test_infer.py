"""What `unbraid init` guesses from columns, and that its run files load and train as they are."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data.source import bundled
from unbraid.guess import look
from unbraid.guess.columns import EACH
from unbraid.guess.infer import infer
from unbraid.guess.leaks import single_auc
from unbraid.types import Feature

N = 1500


def shop(rows: int = N, seed: int = 0) -> pl.DataFrame:
    """Orders with names that no list holds, ids as texts, date-times, an outcome and other traps."""
    rng = np.random.default_rng(seed)
    minutes = np.sort(rng.integers(0, 60 * 24 * 30, rows))
    user, item = rng.integers(0, 150, rows), rng.integers(0, 200, rows)
    bought = (rng.random(rows) < 0.3 + 0.4 * (item % 2)).astype(int)
    return pl.DataFrame(
        {
            "order line": np.arange(rows),
            "customerId": [f"c{x:03}" for x in user],
            "product": [f"p{x}" for x in item],
            "boughtAt": [dt.datetime(2024, 1, 1) + dt.timedelta(minutes=int(m)) for m in minutes],
            "price": rng.lognormal(3, 1.5, rows),
            "colour": rng.choice(["red", "green", "blue"], rows),
            "labels": ["|".join(sorted(set(rng.choice(list("abcdef"), 3)))) for _ in range(rows)],
            "same": ["x"] * rows,
            "refund": bought * (1 + rng.random(rows)),
            "is_gift": rng.integers(0, 2, rows),
            "store.nr": rng.integers(1, 7, rows),
            "bought": bought,
            "kept": [None if not b else bool(rng.random() < 0.6) for b in bought],
            "stars": rng.integers(1, 6, rows),
            "paid": rng.random(rows) * 10,
        }
    )


def write_csv(frame: pl.DataFrame, path: Path) -> Path:
    frame.write_csv(path, datetime_format="%Y-%m-%d %H:%M:%S")
    return path


def guessed(path: Path, *labels: str, **roles: str) -> tuple[config.Run, dict[str, Feature], str]:
    text = infer(path, labels, **roles)
    file = path.parent / "guessed.toml"
    file.write_text(text)
    run = config.load(file)
    return run, {f.name: f for f in run.data.features}, text


def left_out(text: str, column: str) -> str:
    """The reason in a commented-out line."""
    found = re.search(rf'^  # \{{name = "{re.escape(column)}".*# left out: (.*)$', text, re.M)
    assert found, f"{column} is not left out in\n{text}"
    return found[1]


def train(text: str, folder: Path, *options: str) -> Any:
    file = folder / "run.toml"
    file.write_text(text)
    done = CliRunner().invoke(
        app, ["train", str(file), "--steps", "20", "--out", str(folder / "out"), "--json", *options]
    )
    assert done.exit_code == 0, done.output
    return done


# ------------------------------------------------------------------------------------------------ one table of rows
def test_a_csv_with_other_names(tmp_path: Path) -> None:
    run, features, text = guessed(write_csv(shop(), tmp_path / "orders.csv"), "bought", "kept", "stars", "paid")
    data = run.data
    assert data.user == "customerId" and "boughtAt" in data.time
    assert [t.kind for t in data.tasks] == ["binary", "binary", "multiclass", "real"]
    assert features["colour"].kind == "id" and features["customerId"].kind == "id"
    assert (features["price"].kind, features["price"].transform) == ("number", "log1p")
    assert (features["labels"].kind, features["labels"].separator) == ("bag", "|")
    assert features["store_nr"].source == "store.nr"
    assert "one value" in left_out(text, "same")
    assert "its own value" in left_out(text, "order line")
    assert "alone it tells `bought` (AUC 1.000" in left_out(text, "refund")
    assert "named like feedback" in left_out(text, "is_gift")
    assert data.split.kind == "time" and str(data.split.valid_from) < str(data.split.test_from)
    assert data.histories[0].fields == ("product",) and data.histories[0].length == 50
    assert data.histories[0].where == "positive = 1" and data.events[0].columns["positive"] == "bought"


def test_a_rare_label_of_a_log_is_learnt_in_larger_steps(tmp_path: Path) -> None:
    path, rare = tmp_path / "t.parquet", (pl.int_range(pl.len()) % 30 == 0).cast(pl.Int8)
    shop().with_columns(shared=rare).write_parquet(path)
    run, _, text = guessed(path, "bought", "shared")
    assert (run.update.lr, run.model.tower.dropout) == (0.005, 0.2) and "`shared` is rare" in text
    for labels in (["shared"], ["bought", "is_gift"]):  # alone, and none that is rare
        run, _, _ = guessed(path, *labels)
        assert (run.update.lr, run.model.tower.dropout) == (1e-3, 0.0)
    shop().with_columns(shared=rare).drop("boughtAt").write_parquet(path)
    assert guessed(path, "bought", "shared")[0].update.lr == 1e-3, "no log"


def test_a_csv_trains(tmp_path: Path) -> None:
    train(infer(write_csv(shop(), tmp_path / "orders.csv"), ["bought", "kept", "stars", "paid"]), tmp_path)


def test_parquet_with_datetimes_lists_and_vectors_trains(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frame = shop().with_columns(
        wide=pl.Series([[float(x) for x in v] for v in rng.normal(size=(N, 4))]),
        ragged=pl.Series([[1.0] * (i % 3) for i in range(N)]),
        bag=pl.Series([[int(x) for x in rng.integers(0, 9, i % 4)] for i in range(N)]),
        some=pl.when(pl.col("price") > 20).then(float("nan")).otherwise("price"),
    )
    frame.write_parquet(tmp_path / "orders.parquet")
    run, features, text = guessed(tmp_path / "orders.parquet", "bought")
    assert features["wide"].kind == "vector" and features["bag"].kind == "bag" and features["some"].nan == "missing"
    assert "differ in length" in left_out(text, "ragged")
    assert run.data.time == "boughtAt"
    assert isinstance(run.data.split.test_from, str)
    train(text, tmp_path)


def test_whole_numbers_in_floats_are_still_classes(tmp_path: Path) -> None:
    shop().with_columns(pl.col("bought").cast(pl.Float64)).write_parquet(tmp_path / "t.parquet")
    run, _, _ = guessed(tmp_path / "t.parquet", "bought")
    assert run.data.tasks[0].kind == "binary" and run.data.histories[0].where == "positive = 1"


def test_boolean_first_label_and_given_roles(tmp_path: Path) -> None:
    path = tmp_path / "orders.parquet"
    shop().with_columns(bought=pl.col("bought") == 1).rename({"customerId": "who", "boughtAt": "when"}).write_parquet(
        path
    )
    run, _, text = guessed(path, "bought", user="who", time="when", domain="colour")
    assert (run.data.user, run.data.time, run.data.domain) == ("who", "when", "colour")
    train(text, tmp_path)


def test_positives_inside_another_label_hint_at_given(tmp_path: Path) -> None:
    text = infer(write_csv(shop(), tmp_path / "orders.csv"), ["bought", "kept"])
    assert 'given = "bought"' in next(line for line in text.splitlines() if 'name = "kept"' in line)


def test_integer_times_in_every_unit(tmp_path: Path) -> None:
    for unit, factor in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        seconds = pl.col("boughtAt").dt.epoch("s")
        shop(300).with_columns(boughtAt=seconds * factor).write_parquet(tmp_path / "t.parquet")
        run, _, text = guessed(tmp_path / "t.parquet", "bought")
        assert run.data.time_unit == unit and run.data.time == "boughtAt"
        assert isinstance(run.data.split.valid_from, int) and re.search(r"valid_from = \d+  # 2024-01-\d\d", text)


def test_splits_are_a_tenth_each_and_never_empty(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [i % 30 for i in range(100)], "ts": range(100), "a": [i % 3 for i in range(100)],
                          "y": [i % 2 for i in range(100)]})  # fmt: skip
    frame.write_parquet(tmp_path / "t.parquet")
    run, _, _ = guessed(tmp_path / "t.parquet", "y")
    assert (run.data.split.valid_from, run.data.split.test_from) == (79, 89)
    frame.with_columns(ts=pl.col("ts") // 95 + pl.col("ts") // 99).write_parquet(tmp_path / "t.parquet")
    run, _, _ = guessed(tmp_path / "t.parquet", "y")  # three times, nearly all rows at the first
    assert (run.data.split.valid_from, run.data.split.test_from) == (1, 2)


def test_times_that_tell_the_split_are_left_out(tmp_path: Path) -> None:
    time = pl.col("boughtAt")
    shop().with_columns(
        date=time.dt.strftime("%Y%m%d").cast(pl.Int64),
        day_text=time.dt.date().cast(pl.String),
        serial=pl.int_range(pl.len()) // 3,
        shipped=time + pl.duration(days=2),
    ).write_parquet(tmp_path / "t.parquet")
    _, _, text = guessed(tmp_path / "t.parquet", "bought", time="boughtAt")
    assert "a date" in left_out(text, "date") and "a date" in left_out(text, "day_text")
    assert "grows with time" in left_out(text, "serial")
    assert "a point in time" in left_out(text, "shipped")


def test_rows_without_a_time_are_filtered(tmp_path: Path) -> None:
    late = pl.when(pl.int_range(pl.len()) % 50 == 0).then(None).otherwise("boughtAt")
    shop().with_columns(boughtAt=late).write_parquet(tmp_path / "t.parquet")
    run, _, text = guessed(tmp_path / "t.parquet", "bought")
    assert run.data.keep == '"boughtAt" IS NOT NULL'
    train(text, tmp_path)


def test_filled_only_after_the_event(tmp_path: Path) -> None:
    parcel = pl.when(pl.col("bought") == 1).then(pl.col("store.nr"))
    shop().with_columns(parcel=parcel).write_parquet(tmp_path / "t.parquet")
    _, _, text = guessed(tmp_path / "t.parquet", "bought")
    assert "it looks like an outcome" in left_out(text, "parcel")


def test_without_time_users_are_split_and_without_users_rows(tmp_path: Path) -> None:
    no_time = shop().drop("boughtAt")
    no_time.write_parquet(tmp_path / "t.parquet")
    run, features, text = guessed(tmp_path / "t.parquet", "bought")
    assert run.data.split.kind == "user" and run.data.user == "customerId" and not run.data.histories
    assert "not in training" in left_out(text, "customerId")
    train(text, tmp_path)
    bare = no_time.select("colour", "store.nr", "price", "bought")
    bare.write_parquet(tmp_path / "t.parquet")
    run, _, text = guessed(tmp_path / "t.parquet", "bought")
    assert run.data.split.kind == "row" and not run.data.user
    train(text, tmp_path, "--overwrite")


def test_a_column_that_says_the_split(tmp_path: Path) -> None:
    words = pl.Series(["train"] * (N - 400) + ["valid"] * 200 + ["test"] * 200)
    shop().with_columns(part=words).write_parquet(tmp_path / "t.parquet")
    run, _, text = guessed(tmp_path / "t.parquet", "bought")
    assert (run.data.split.kind, run.data.split.column) == ("column", "part")
    assert "which split" in left_out(text, "part")


def test_min_count_of_ids_with_many_values(tmp_path: Path) -> None:
    frame = shop(6000).with_columns(brand_id=pl.int_range(pl.len()) * 7919 % 1501, few_id=pl.int_range(pl.len()) % 900)
    frame.write_parquet(tmp_path / "t.parquet")
    _, features, _ = guessed(tmp_path / "t.parquet", "bought")
    assert features["brand_id"].min_count == 2 and features["few_id"].min_count == 1


def test_duplicates_are_counted(tmp_path: Path) -> None:
    frame = shop()
    pl.concat([frame, frame[:7]]).write_parquet(tmp_path / "t.parquet")
    run, _, text = guessed(tmp_path / "t.parquet", "bought")
    assert run.data.drop_duplicates and "# 7 rows equal an earlier row" in text


def test_domains_are_a_comment_unless_given(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    shop().rename({"colour": "channel"}).write_parquet(path)
    run, _, text = guessed(path, "bought")
    assert not run.data.domain and '# domain = "channel"' in text
    assert guessed(path, "bought", domain="channel")[0].data.domain == "channel"


def test_a_sample_sees_every_part_of_a_large_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "SAMPLE", 300)
    shop(6000).write_parquet(tmp_path / "t.parquet")
    run, features, text = guessed(tmp_path / "t.parquet", "bought")
    assert "one in 20 of 6,000 rows" in text
    assert run.data.user == "customerId" and "product" in features  # 150 users in 300 sampled rows are still no row ids
    assert "its own value" in left_out(text, "order line")
    assert "2024-01-2" in str(run.data.split.valid_from)


# ------------------------------------------------------------------------------------------------ many tables
def test_a_folder_with_joins_and_an_event_table(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    frame = shop()
    frame.write_parquet(folder / "orders.parquet")
    products = frame.select("product").unique().sort("product")
    products.with_columns(maker_id=pl.int_range(pl.len()) % 20).write_parquet(folder / "products.parquet")
    pl.DataFrame({"maker_id": range(20), "land": ["se", "no"] * 10}).write_parquet(folder / "makers.parquet")
    frame.select("customerId", seen="product").write_csv(folder / "views.csv")
    pl.DataFrame({"other": [1, 2]}).write_csv(folder / "unrelated.csv")
    run, features, text = guessed(folder, "bought")
    assert run.data.rows == "orders.parquet"
    assert [(j.table, j.on) for j in run.data.joins] == [
        ("products.parquet", "product"),
        ("makers.parquet", "maker_id"),
    ]
    assert {"maker_id", "land"} <= set(features)
    assert '# {table = "views.csv"' in text and "not used: it has no time" in text
    assert '# {table = "unrelated.csv"' in text and "no column of the rows" in text
    train(text, tmp_path)


def test_files_of_one_schema_are_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    frame = shop()
    for i in range(3):
        frame[i * 500 : (i + 1) * 500].write_parquet(folder / f"part-{i}.parquet")
    run, _, text = guessed(folder, "bought")
    assert run.data.rows == "*.parquet" and "all 1,500 rows" in text
    frame.select("product").unique().with_columns(
        size=pl.lit("M") + (pl.int_range(pl.len()) % 3).cast(pl.String)
    ).write_parquet(folder / "sizes.parquet")
    run, features, _ = guessed(folder, "bought")
    assert run.data.rows == "part-*.parquet" and run.data.joins[0].table == "sizes.parquet" and "size" in features


def test_the_bundled_log_loads_and_trains(tmp_path: Path) -> None:
    folder = bundled("kuairand")
    assert folder is not None
    text = infer(folder, ["is_click", "is_like"])
    data = config.from_dict(tomllib.loads(text)).data
    names = {f.name for f in data.features}
    outcomes = {
        "long_view",
        "play_time_ms",
        "profile_stay_time",
        "comment_stay_time",
        "is_follow",
        "is_comment",
        "date",
    }
    assert not names & (outcomes | {"is_click", "is_like", "is_profile_enter", "is_forward", "is_hate", "time_ms"})
    assert all(left_out(text, name) for name in outcomes)
    assert {"video_id", "author_id", "tab", "tag", "duration_ms", "user_active_degree"} <= names
    assert {(j.table, j.on) for j in data.joins} >= {("users.parquet", "user_id"), ("videos.parquet", "video_id")}
    assert (data.user, data.time, data.time_unit, data.rows) == ("user_id", "time_ms", "ms", "impressions.parquet")
    assert '# domain = "tab"' in text and data.drop_duplicates
    train(text, tmp_path)


# ------------------------------------------------------------------------------------------------ errors
def test_errors_name_the_column_and_what_is_near(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    shop().write_parquet(path)
    with pytest.raises(
        ValueError, match=r"no column `bougth`. Did you mean `bought`\? Columns: order line, customerId"
    ):
        infer(path, ["bougth"])
    with pytest.raises(ValueError, match="--user: there is no column `customer`. Did you mean `customerId`"):
        infer(path, ["bought"], user="customer")
    with pytest.raises(ValueError, match="--time: `colour` should hold integers, dates or ISO texts"):
        infer(path, ["bought"], time="colour")
    with pytest.raises(ValueError, match="Label `same` should have two values"):
        infer(path, ["same"])


def test_errors_about_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no file or folder"):
        infer(tmp_path / "absent", ["y"])
    (tmp_path / "notes.txt").write_text("no table")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="should be a Parquet or CSV file .* or a folder of them"):
            infer(path, ["y"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="broken.parquet cannot be read"):
        infer(tmp_path, ["y"])


def test_labels_in_two_tables(tmp_path: Path) -> None:
    pl.DataFrame({"k": [1, 2], "y": [0, 1]}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({"k": [1, 2], "z": [0, 1]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="columns of one table. Found a.parquet: y; b.parquet: z"):
        infer(tmp_path, ["y", "z"])


def test_labels_with_nan(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1, 2, 3], "y": [0.0, 1.0, float("nan")]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="Label `y`: 1 values are NaN"):
        infer(tmp_path / "t.parquet", ["y"])


# ------------------------------------------------------------------------------------------------ single_auc
def test_single_auc_of_numbers_and_ids() -> None:
    yes = np.array([False, False, True, True] * 50)
    assert single_auc(pl.Series([1.0, 2.0, 3.0, 4.0] * 50), yes, True) == 1.0
    assert single_auc(pl.Series([4.0, 3.0, None, None] * 50), yes, True) == 1.0  # nulls below all, either direction
    assert single_auc(pl.Series([5.0] * 200), yes, True) == 0.5
    assert single_auc(pl.Series(["n", "n", "y", "y"] * 50), yes, False) == 1.0
    # values that occur once cannot tell their own label
    assert single_auc(pl.Series([str(i) for i in range(200)]), yes, False) == 0.5


# ------------------------------------------------------------------------------------------------- what is no user
def test_a_column_of_its_own_in_every_row_is_no_user_and_no_feature(tmp_path: Path) -> None:
    """As Avazu's ``id`` and ``hour``, in text."""
    rng = np.random.default_rng(0)
    n = 480
    frame = pl.DataFrame({
        "id": [str(10**19 + 7 * i) for i in range(n)], "click": rng.integers(0, 2, n),
        "hour": [14102100 + 100 * (i // 48) + i % 24 for i in range(n)], "site": rng.choice(["12e84091", "85f751fd"], n),
        "price": rng.random(n),
    })  # fmt: skip
    run, features, text = guessed(write_csv(frame, tmp_path / "t.csv"), "click")
    assert not run.data.user and EACH in left_out(text, "id") and set(features) == {"site", "price"}
    assert run.data.split.kind == "time" and "hours written as YYMMDDHH" in text
    assert run.data.split.test_from == "2014-10-29T23:00:00"
    run, features, text = guessed(write_csv(frame.drop("hour").rename({"id": "user_id"}), tmp_path / "u.csv"), "click")
    assert not run.data.user and run.data.split.kind == "row"
    assert "`user_id` has another value in every row, which names rows and no users" in text
    assert EACH in left_out(text, "user_id") and set(features) == {"site", "price"}
    train(text, tmp_path)


def test_pictures_and_long_texts_are_left_out_with_what_they_need(tmp_path: Path) -> None:
    rows = 1_200
    frame = pl.DataFrame({
        "user_id": [n % 60 for n in range(rows)], "photo": [f"pics/{n}.JPG" for n in range(rows)],
        "raw": [b"%d" % n for n in range(rows)],
        "title": [f"a long description of product {n}, in many words" for n in range(rows)], "shop": [n % 7 for n in range(rows)],
        "click": [n % 2 for n in range(rows)],
    })  # fmt: skip
    frame.write_parquet(tmp_path / "log.parquet")
    text = infer(tmp_path / "log.parquet", ["click"])
    for name, kind, slot in (("photo", "image", "images"), ("raw", "image", "images"), ("title", "text", "texts")):
        assert f"set `model.{slot}`" in left_out(text, name) and f'{{name = "{name}", kind = "{kind}"}}' in text
