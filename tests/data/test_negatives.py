"""Sampled negatives of a log that holds positives only."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from unbraid.data import encode as encoding
from unbraid.data.declaration import Data, Events, Join, Negatives, Split
from unbraid.data.encode import encode
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.types import Feature, Field, History, Task

N = 3000
DATA = Data(
    rows="log", user="user", time="time", weight="weight", joins=(Join("items", on="item"),),
    features=(Feature("item"), Feature("shop"), Feature("place")), tasks=(Task("label"),),
    split=Split("time", valid_from=800, test_from=900), negatives=Negatives("item", per_positive=3),
)  # fmt: skip


def tables(n: int = N, items: int = 20, seed: int = 0) -> dict[str, pl.DataFrame]:
    """Item i is drawn with odds 1 / (i + 1); the last five items are only in the test period."""
    rng = np.random.default_rng(seed)
    odds = 1 / (np.arange(items) + 1.0)
    item = rng.choice(items, n, p=odds / odds.sum())
    time = rng.integers(0, 1000, n)
    item = np.where(time >= 900, rng.integers(items, items + 5, n), item)
    log = pl.DataFrame({"user": rng.integers(0, 50, n), "time": time, "item": item, "place": rng.integers(0, 4, n),
                        "weight": rng.random(n)})  # fmt: skip
    return {
        "log": log,
        "items": pl.DataFrame({"item": range(items + 5), "shop": [i * i % 7 for i in range(items + 5)]}),
    }


def values(table: Encoded, name: str) -> np.ndarray:
    """A feature's values; -1 for unknown ones."""
    codes = table.batch(np.arange(table.rows)).features[name].numpy()
    known = table.fitted.vocabularies[name].values.to_numpy()
    return np.where(codes >= 2, known[np.maximum(codes - 2, 0)], -1)


@pytest.fixture
def table(opened):
    return opened(DATA, **tables())


def test_counts_labels_and_what_a_copy_keeps(table):
    log, batch = tables()["log"], table.batch(np.arange(table.rows))
    assert table.rows == 4 * N
    label = batch.labels["label"].numpy().reshape(N, 4)
    assert (label == [1, 0, 0, 0]).all() and bool(batch.observed["label"].all())
    item = values(table, "item").reshape(N, 4)
    train = log["time"].to_numpy() < 900
    assert (item[train, 0] == log["item"].to_numpy()[train]).all()
    assert (values(table, "place").reshape(N, 4) == log["place"].to_numpy()[:, None]).all()
    assert (batch.meta["time"].numpy().reshape(N, 4) == log["time"].to_numpy()[:, None]).all()
    assert (batch.weight.numpy().reshape(N, 4) == log["weight"].to_numpy().astype(np.float32)[:, None]).all()
    assert len(table.split("train")) == 4 * int((log["time"] < 800).sum())


def test_joined_columns_follow_the_new_item(table):
    item, shop = values(table, "item"), values(table, "shop")
    known = item >= 0
    assert (shop[known] == item[known] ** 2 % 7).all()


def test_items_come_from_the_training_split_alone(table):
    item = values(table, "item").reshape(N, 4)
    assert item[:, 1:].min() >= 0 and item[:, 1:].max() < 20  # also beside test rows, whose own items are unknown
    assert (item[tables()["log"]["time"].to_numpy() >= 900, 0] == -1).all()


def frequencies(item: np.ndarray, own: np.ndarray, weight: np.ndarray) -> float:
    """Largest deviation of the drawn items from what they should be, in standard deviations.

    A draw equal to the row's own item is drawn again once: p_j + p_own p_j for others, p_own^2 for the own.
    """
    p = weight / weight.sum()
    expected, variance = np.zeros(len(p)), np.zeros(len(p))
    for i, n in Counter(own.tolist()).items():
        q = p * (1 + p[i])
        q[i] = p[i] ** 2
        assert q.sum() == pytest.approx(1)
        expected += n * q
        variance += n * q * (1 - q)
    found = np.bincount(item, minlength=len(p))
    return float(np.abs((found - expected) / np.sqrt(variance)).max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_draws_have_the_declared_frequencies(sampling, seed, opened):
    given = tables(20_000, seed=seed)
    data = replace(DATA, negatives=Negatives("item", 3, sampling=sampling, seed=seed))
    item = values(opened(data, **given), "item").reshape(-1, 4)
    time, own = given["log"]["time"].to_numpy(), given["log"]["item"].to_numpy()
    counts = np.bincount(own[time < 800], minlength=20).astype(float)
    rows = time < 900
    for copy in range(1, 4):
        z = frequencies(item[rows, copy], own[rows], counts if sampling == "popularity" else np.ones(20))
        assert z < 4.2  # the largest of 20 x 18 standard normals passes this in 99 of 100 seeds
    agree = (item[:, 1] == item[:, 2]).mean()  # two copies of one row are drawn apart
    p = (counts if sampling == "popularity" else np.ones(20)) / (counts.sum() if sampling == "popularity" else 20)
    assert agree < 1.6 * (p**2).sum() + 0.02


def test_draws_do_not_depend_on_chunks_and_do_on_the_seed(tmp_path, monkeypatch):
    given, found = tables(500), []
    for chunk in (7, 64, 200_000):
        monkeypatch.setattr(encoding, "CHUNK", chunk)
        data = replace(DATA, cache=str(tmp_path / str(chunk)))
        found.append(values(Encoded(encode(data, tables=given)), "item"))
    for i in range(10):  # pieces of other sizes reach the draw
        (tmp_path / "parts").mkdir(exist_ok=True)
        given["log"][50 * i : 50 * i + 50].write_parquet(tmp_path / "parts" / f"{i}.parquet")
    parts = replace(DATA, rows="parts")
    found.append(values(Encoded(encode(parts, tmp_path, tables={"items": given["items"]})), "item"))
    assert np.array_equal(found[0], found[3])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    other = replace(DATA, negatives=replace(DATA.negatives, seed=1))
    assert not np.array_equal(values(Encoded(encode(other, tables=given)), "item"), found[0])


def test_two_items_are_drawn_apart_unless_drawn_twice(opened):
    given = tables(2000, items=2)
    item = values(opened(DATA, **given), "item").reshape(-1, 4)
    own = given["log"]["item"].to_numpy()
    rows = given["log"]["time"].to_numpy() < 900
    same = (item[rows, 1:] == own[rows, None]).mean()
    assert same == pytest.approx(0.25, abs=0.03)  # half, and half again; 5400 draws: sd 0.006


def test_labels_that_exist_are_overwritten_and_several_set(opened):
    given = tables(300)
    given["log"] = given["log"].with_columns(label=pl.lit("old"), other=pl.lit(1.0))
    data = replace(
        DATA, tasks=(Task("label"), Task("other")), negatives=Negatives("item", 1, labels=("label", "other"))
    )
    batch = opened(data, **given).batch(np.arange(600))
    assert batch.labels["label"].tolist() == [1, 0] * 300 == batch.labels["other"].tolist()


def test_copies_share_the_history_of_their_row_and_are_no_events(opened):
    data = replace(DATA, fields=(Field("item"),), events=(Events(columns={"item": "item"}),),
                   histories=(History("seen", ("item",), length=5),))  # fmt: skip
    given = tables(400)
    table = opened(data, **given)
    seen = table.batch(np.arange(table.rows)).features["seen"]
    assert len(table.columns["event.item"]) == 400
    assert (seen.lengths.reshape(400, 4) == seen.lengths[::4, None]).all()


def test_null_items_and_bad_item_columns(opened):
    given = tables(300)
    log = given["log"].with_columns(item=pl.when(pl.col("user") > 45).then(None).otherwise("item"))
    codes = opened(DATA, **given | {"log": log}).batch(np.arange(1200)).features["item"].numpy().reshape(-1, 4)
    assert (codes[:, 1:] >= 2).all() and (codes[log["item"].is_null().to_numpy(), 0] == 1).all()
    with pytest.raises(DataError, match="data.negatives.*no column `video`.*Columns: user"):
        opened(replace(DATA, negatives=Negatives("video")), **given)
    one = given | {"log": given["log"].with_columns(item=pl.lit(3))}
    with pytest.raises(DataError, match="`item` has 1 values in the training split; two are needed"):
        opened(DATA, **one)
    with pytest.raises(ValueError, match="`per_positive` should be at least 1. Found 0"):
        Negatives("item", 0)


def test_progress_counts_copies_and_a_bad_split_does_not():
    said = []
    encode(DATA, tables=tables(300), progress=lambda what, done, total: said.append((what, done, total)))
    assert said[:2] == [("fitting vocabularies", 0, 0), ("encoding rows", 0, 1200)]
    assert said[-1] == ("encoding rows", 1200, 1200)
    late = tables(300)
    late["log"] = late["log"].filter(pl.col("time") < 900)
    with pytest.raises(DataError, match=r"test split is empty \(train .*test 0 rows\)") as error:
        encode(DATA, tables=late)
    assert f"valid {len(late['log'].filter(pl.col('time') >= 800))}, " in str(error.value)
