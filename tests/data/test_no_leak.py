"""Nothing at or after a time reaches the rows before it, and nothing but the training split is learned from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from unbraid.data.declaration import Data, Events, Join, Negatives, Split
from unbraid.types import Feature, Field, History, Task

N = 400
DATA = Data(
    rows="log",
    user="user",
    time="time",
    time_unit="s",
    domain="site",
    weight="weight",
    joins=(Join("items", on="item"),),
    features=(
        Feature("item", min_count=3, buckets=5),
        Feature("shop"),
        Feature("price", kind="number"),
        Feature("tags", kind="bag"),
        Feature("vector", kind="vector"),
    ),
    fields=(Field("item"), Field("shop"), Field("action")),
    events=(
        Events(columns={"item": "item", "shop": "shop", "action": "'row'", "click": "click"}),
        Events(columns={"item": "item", "shop": "shop", "action": "action"}, table="events"),
    ),
    histories=(
        History("seen", fields=("item", "shop", "action", "gap"), length=20),
        History("clicked", fields=("item", "shop"), where="click = 1"),
    ),
    tasks=(Task("click"), Task("buy", given="click"), Task("size", kind="multiclass"), Task("spend", kind="real")),
    split=Split(kind="time", valid_from=600, test_from=800),
)


def tables(seed: int = 0) -> dict[str, pl.DataFrame]:
    rng = np.random.default_rng(seed)

    def draw(n: int) -> dict:
        return {"user": rng.integers(0, 15, n), "time": rng.integers(0, 1000, n), "item": rng.integers(0, 40, n)}

    log = pl.DataFrame({
        **draw(N),
        "site": rng.choice(["home", "mail"], N),
        "weight": rng.random(N),
        "price": [None if rng.random() < 0.1 else float(x) for x in rng.normal(size=N)],
        "tags": [[int(t) for t in rng.integers(0, 9, rng.integers(0, 4))] for _ in range(N)],
        "vector": [[float(x) for x in v] for v in rng.normal(size=(N, 2))],
        "click": rng.integers(0, 2, N),
        "buy": rng.integers(0, 2, N),
        "size": rng.choice(["S", "M", "L"], N),
        "spend": rng.normal(size=N),
    })  # fmt: skip
    events = pl.DataFrame({**draw(N), "action": rng.choice(["view", "cart"], N)})
    return {
        "log": log,
        "events": events,
        "items": pl.DataFrame({"item": range(60), "shop": [i % 7 for i in range(60)]}),
    }


def garbage(given: dict[str, pl.DataFrame], t: int, seed: int) -> dict[str, pl.DataFrame]:
    """Everything at or after t replaced: ids nobody has seen, huge numbers, flipped labels, other users."""
    rng = np.random.default_rng(seed)
    late = pl.col("time") >= t
    n, m = len(given["log"]), len(given["events"])

    def ids(low: int, high: int, size: int) -> pl.Series:
        return pl.Series(rng.integers(low, high, size))

    new = {
        "item": ids(30, 60, n), "user": ids(0, 20, n), "price": pl.Series(rng.normal(size=n) * 1e6),
        "site": pl.Series(["elsewhere"] * n), "tags": pl.Series([[99, 98, 97]] * n),
        "vector": pl.Series([[1e5, -1e5]] * n),
        "weight": pl.Series(np.full(n, 1e6)), "click": ids(0, 2, n), "buy": ids(0, 2, n),
        "spend": pl.Series(np.full(n, 1e9)),
    }  # fmt: skip
    log = given["log"].with_columns(pl.when(late).then(v).otherwise(pl.col(k)).alias(k) for k, v in new.items())
    events = given["events"].with_columns(
        item=pl.when(late).then(ids(30, 60, m)).otherwise("item"),
        user=pl.when(late).then(ids(0, 20, m)).otherwise("user"),
        action=pl.when(late).then(pl.lit("garbage")).otherwise("action"),
    )
    return {**given, "log": log, "events": events}


def same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert np.array_equal(one[name], two[name], equal_nan=one[name].dtype.kind == "f"), name


@pytest.mark.parametrize("t", [600, 601, 700, 800, 950])
def test_garbage_after_the_training_split(t, opened, arrays):
    """Everything is fitted anew on the changed files, and rows before t do not change by a bit."""
    before = tables()
    rows = np.flatnonzero(before["log"]["time"].to_numpy() < t)
    one, two = opened(DATA, **before), opened(DATA, **garbage(before, t, seed=t))
    assert one.folder != two.folder and one.fitted.digest() == two.fitted.digest()
    same(arrays(one.batch(rows)), arrays(two.batch(rows)))
    after = np.setdiff1d(np.arange(N), rows)
    assert not np.array_equal(one.batch(after).features["item"], two.batch(after).features["item"])


@pytest.mark.parametrize("t", [5, 100, 333, 599])
def test_garbage_inside_the_training_split_with_a_fixed_fit(t, opened, arrays):
    before = tables(1)
    one = opened(DATA, **before)
    two = opened(DATA, {"fitted": one.fitted}, **garbage(before, t, seed=t))
    rows = np.flatnonzero(before["log"]["time"].to_numpy() < t)
    same(arrays(one.batch(rows)), arrays(two.batch(rows)))


@pytest.mark.parametrize("kind", ["column", "user"])
def test_valid_and_test_rows_teach_nothing(kind, opened):
    """Other splits than by time: garbage in every row that is not of the training split."""
    plain = tables(2)
    if kind == "column":
        words = np.random.default_rng(0).choice(["train", "valid", "test"], N)
        plain["log"] = plain["log"].with_columns(part=pl.Series(words))
        data = replace(DATA, split=Split(kind="column", column="part"))
    else:
        data = replace(DATA, split=Split(kind="user", valid=0.3, test=0.3))
    events = (DATA.events[0],)
    data = replace(data, events=events)
    one = opened(data, **plain)
    held = pl.Series(one.columns["split"] > 0)
    assert 0 < held.sum() < N
    changed = {
        "item": 59, "price": 1e9, "site": "elsewhere", "tags": [77], "click": 1, "spend": -1e9,
    }  # fmt: skip
    log = plain["log"].with_columns(
        pl.when(held).then(pl.lit(v)).otherwise(pl.col(k)).alias(k) for k, v in changed.items()
    )
    two = opened(data, **plain | {"log": log})
    assert one.fitted.digest() == two.fitted.digest() and one.folder != two.folder


def test_negatives_are_drawn_from_training_items_alone(opened, arrays):
    plain = tables(3)
    data = replace(
        DATA, negatives=Negatives("item", 3, labels=("click", "buy", "size", "spend")), tasks=(Task("click"),)
    )
    one, two = opened(data, **plain), opened(data, **garbage(plain, 600, seed=3))
    rows = np.flatnonzero(np.repeat(plain["log"]["time"].to_numpy() < 600, 4))
    same(arrays(one.batch(rows)), arrays(two.batch(rows)))


@pytest.mark.parametrize("sql", ["price - AVG(price)", "SUM(price) OVER (PARTITION BY user)", "max (price)"])
def test_an_expression_that_reads_other_rows_is_refused(sql, opened):
    with pytest.raises(ValueError, match="Feature `x`.*its own row alone"):
        opened(replace(DATA, features=(Feature("x", kind="number", column=sql),)), **tables())
