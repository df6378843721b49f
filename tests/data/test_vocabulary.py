"""Codes, hashes that never change, and what a vocabulary learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from unbraid.data.declaration import Data, Events, Split
from unbraid.data.fitted import Fitted
from unbraid.data.source import DataError
from unbraid.data.spill import Room
from unbraid.data.vocabulary import Vocabulary, fit, stable_hash
from unbraid.types import FIRST_VALUE, MISSING, UNKNOWN, Feature, Field, History, Task

DATA = Data(
    rows="log", features=(Feature("item"),), tasks=(Task("label"),), split=Split(kind="column", column="split"),
)  # fmt: skip


def log(**columns: list) -> pl.DataFrame:
    """Rows of which the first are of the training split, the last but one of validation, the last of test."""
    n = len(next(iter(columns.values())))
    return pl.DataFrame(
        {**columns, "label": [i % 2 for i in range(n)], "split": ["train"] * (n - 2) + ["valid", "test"]}
    )


def codes(table, name: str = "item") -> list[int]:
    return table.batch(np.arange(table.rows)).features[name].tolist()


def test_hashes_never_change():
    """A saved model's buckets and a split by user rest on these numbers."""
    assert stable_hash(pl.Series([0, 1, -1, 2**62])).tolist() == [
        16294208416658607535, 10451216379200822465, 16490336266968443936, 47939714376772075,
    ]  # fmt: skip
    assert stable_hash(pl.Series([0, 1]), seed=1).tolist() == [7960286522194355700, 13757245211066428519]
    assert stable_hash(pl.Series(["", "a", "é", None])).tolist()[3] == 0
    assert stable_hash(pl.Series(["", "a", "é"])).tolist() == [
        6378476286688987887, 1786339900719625571, 12516557540818425216,
    ]  # fmt: skip
    assert stable_hash(pl.Series([0.5, None])).tolist()[1] == 0
    assert len(set(stable_hash(pl.Series(range(10_000))).tolist())) == 10_000


def test_hash_of_a_value_does_not_depend_on_its_neighbours():
    words = pl.Series([f"w{i % 50}" for i in range(500)])
    whole = stable_hash(words)
    assert all(stable_hash(words[i : i + 1])[0] == whole[i] for i in range(0, 500, 37))


@pytest.mark.parametrize(
    "values",
    [[3, 1, 2, 3], [2.5, -1.0, 0.0, 2.5], ["b", "a", "ü", "b"], [True, False, True, True]],
    ids=["int", "float", "text", "bool"],
)
def test_known_unknown_and_missing(values, opened):
    new = {int: 99, float: 99.5, str: "new", bool: None}[type(values[0])]
    table = opened(DATA, log=log(item=[*values, None, new, values[0]]))
    known = sorted(set(values))
    want = [FIRST_VALUE + known.index(v) for v in values]
    assert codes(table) == [*want, MISSING, UNKNOWN if new is not None else MISSING, want[0]]
    assert table.schema.sizes["item"] == FIRST_VALUE + len(known)
    assert table.fitted.vocabularies["item"].names()[:2] == ["(unknown)", "(missing)"]


def test_zero_and_minus_zero_are_one_id():
    table = Vocabulary(pl.Series([0.0]), buckets=0)
    assert table.encode(pl.Series([-0.0, 0.0, None])).tolist() == [2, 2, MISSING]


def test_buckets_take_unknown_values_and_no_others(opened):
    data = replace(DATA, features=(Feature("item", buckets=4, min_count=2),))
    rows = [*["a"] * 2, *["b"] * 2, "rare", None, *(f"new{i}" for i in range(2))]
    table = opened(data, log=log(item=rows))
    found = codes(table)
    assert found[:4] == [2, 2, 3, 3] and found[5] == MISSING and table.schema.sizes["item"] == 8
    assert all(4 <= found[i] < 8 for i in (4, 6, 7))
    many = table.fitted.vocabularies["item"].encode(pl.Series([f"x{i}" for i in range(4000)]))
    assert np.bincount(many, minlength=8)[4:].min() > 850  # 1000 expected, sd 27


@pytest.mark.parametrize("size", [1, 254, 255, 70_000])
def test_large_vocabularies_and_the_smallest_type(size):
    rng = np.random.default_rng(size)
    known = np.sort(rng.choice(10 * size + 5, size, replace=False)) - size
    table = Vocabulary(pl.Series(known))
    asked = rng.integers(-2 * size, 10 * size, 5000)
    place = {int(v): i + FIRST_VALUE for i, v in enumerate(known)}
    assert table.encode(pl.Series(asked)).tolist() == [place.get(int(v), UNKNOWN) for v in asked]
    assert table.dtype == ("uint8" if size <= 254 else "uint16" if size < 2**16 - 2 else "int32")
    assert table.encode(pl.Series([int(known[-1])])).tolist() == [FIRST_VALUE + size - 1]


def test_min_count_is_the_largest_reader_not_the_sum(opened):
    """Rows are events too: an item of two rows would else count four times."""
    data = replace(
        DATA, user="user", time="time", features=(Feature("item", min_count=3),), fields=(Field("item"),),
        events=(Events(columns={"item": "item"}),), histories=(History("seen", ("item",)),),
    )  # fmt: skip
    frame = log(item=[*"aaa", *"bb", "a", "b"], user=[1] * 7, time=list(range(7)))
    table = opened(data, log=frame)
    assert table.fitted.vocabularies["item"].values.to_list() == ["a"]
    assert codes(table) == [2, 2, 2, 0, 0, 2, 0]
    events = pl.DataFrame({"user": [1] * 3, "time": [0] * 3, "item": ["b"] * 3})
    more = replace(data, events=(*data.events, Events(columns={"item": "item"}, table="events")))
    assert opened(more, log=frame, events=events).fitted.vocabularies["item"].values.to_list() == ["a", "b"]


def test_a_constant_column_counts_once_a_row(opened):
    data = replace(DATA, features=(Feature("where", column="'home'", min_count=5), Feature("item")))
    assert codes(opened(data, log=log(item=list("aaaaaab"))), "where") == [2] * 7


def test_features_of_one_vocabulary_share_their_codes(opened):
    features = (Feature("item"), Feature("last", vocabulary="item"), Feature("cart", kind="bag", vocabulary="item"))
    frame = log(item=["a", "b", "c", "a"], last=["x", "a", None, "b"], cart=[["z"], [], ["a", None], ["z", "q"]])
    table = opened(replace(DATA, features=features), log=frame)
    assert table.fitted.vocabularies.keys() == {"item"}
    assert table.fitted.vocabularies["item"].values.to_list() == ["a", "b", "x", "z"]
    assert codes(table, "last") == [4, 2, 1, 3]
    assert table.batch(np.arange(4)).features["cart"].values["cart"].tolist() == [5, 2, 1, 5, 0]


def test_one_vocabulary_of_two_types_is_refused(opened):
    features = (Feature("item"), Feature("last", vocabulary="item"))
    with pytest.raises(DataError, match="Vocabulary `item`.*different types: Int64, String"):
        opened(replace(DATA, features=features), log=log(item=list("abc"), last=[1, 2, 3]))
    table = opened(
        replace(DATA, features=features), log=log(item=list("abcd"), last=[None] * 4)
    )  # no type at all is fine
    assert codes(table, "last") == [1, 1, 1, 1]


def test_nan_is_not_an_id(opened):
    nan = float("nan")
    for rows in ([1.0, nan, 2.0, 3.0], [1.0, 2.0, 1.0, nan]):
        with pytest.raises(DataError, match="`item`.*NaN.*[Ww]rite nulls"):
            opened(DATA, log=log(item=rows))


def test_fit_takes_the_largest_count_and_grow_keeps_old_values(tmp_path):
    one = pl.DataFrame({"value": ["a", "b"], "count": [2, 1]})
    two = pl.DataFrame({"value": ["a", "b", "c"], "count": [2, 1, 3]})
    room = Room(tmp_path, 1 << 20)

    def fitted(*options):
        return fit([[one], [two]], pl.String, 3, *options, room)

    assert fitted(0, None).values.to_list() == ["c"]
    old = Vocabulary(pl.Series(["b", "z"]))
    assert fitted(7, old).values.to_list() == ["b", "c", "z"]
    assert fitted(7, old).size == 2 + 3 + 7
    assert fit([[one]], pl.String, 2, 0, None, room).values.to_list() == ["a"]
    assert fit([], pl.Int64, 1, 5, None, room).size == 2 + 5


def test_a_grown_fit_keeps_values_and_domains(opened):
    data = replace(DATA, domain="site", features=(Feature("item", min_count=2),))
    old = opened(data, log=log(item=[*"aabb", "a", "a"], site=[*"xxyyyy"]))
    new = log(item=[*"ccb", "c", "c"], site=[*"zzzzz"])
    grown = opened(data, {"grow": old.fitted}, log=new)
    assert grown.fitted.vocabularies["item"].values.to_list() == ["a", "b", "c"]
    assert grown.schema.domains == ("(unknown)", "(missing)", "x", "y", "z")
    fixed = opened(data, {"fitted": old.fitted}, log=new)  # not to be mistaken for the grown one
    assert fixed.folder != grown.folder and fixed.schema == old.schema
    assert codes(fixed) == [0, 0, 3, 0, 0] and codes(grown) == [4, 4, 3, 4, 4]
    with pytest.raises(DataError, match="Vocabulary `item`.*earlier model.*Int64, String"):
        opened(data, {"grow": old.fitted}, log=new.with_columns(item=pl.Series(range(5))))


def test_a_fit_survives_its_folder(opened, tmp_path):
    features = (Feature("item", buckets=3), Feature("f"), Feature("n", kind="number"), Feature("v", kind="vector"))
    frame = log(item=["a", "b", None, "c"], f=[0.1, 0.2, 1 / 3, 0.4], n=[1.0, 2.0, 3.0, None], v=[[1.0, 2.0]] * 4,
                size=[1.5, 2.5, 1.5, 2.5], site=list("abca"))  # fmt: skip
    data = replace(DATA, features=features, domain="site", tasks=(Task("label"), Task("size", kind="multiclass")))
    one = opened(data, log=frame).fitted
    one.save(tmp_path)
    two = Fitted.load(tmp_path)
    assert two.schema == one.schema and two.digest() == one.digest()
    assert all(two.vocabularies[k].values.equals(v.values) for k, v in one.vocabularies.items())
    place = next((tmp_path / "vocabularies").iterdir())
    pl.DataFrame({"value": ["only"]}).write_parquet(place)
    with pytest.raises(DataError, match="should hold .* values. Found 1"):
        Fitted.load(tmp_path)
    place.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="does not hold a readable schema and vocabularies"):
        Fitted.load(tmp_path)


def test_a_digest_knows_the_type_of_ids(opened):
    one = opened(DATA, log=log(item=[0, 0, 0, 0])).fitted
    assert one.digest() != Fitted(one.schema, {"item": Vocabulary(pl.Series([0.0]))}).digest()  # the same bits
    assert one.digest() == Fitted(one.schema, dict(one.vocabularies)).digest()


@pytest.mark.parametrize("chunk", [2, 5, 1000])
def test_values_are_counted_over_chunks(chunk, opened, monkeypatch):
    monkeypatch.setattr("unbraid.data.encode.CHUNK", chunk)
    rng = np.random.default_rng(chunk)
    n = 120
    item, tags = rng.integers(0, 30, n), [rng.integers(0, 30, k).tolist() for k in rng.integers(0, 5, n)]
    frame = pl.DataFrame({"item": item, "tags": [t or None for t in tags], "label": [0, 1] * (n // 2)})
    split = ["train"] * (n - 20) + ["valid", "test"] * 10
    data = replace(DATA, features=(Feature("item", min_count=4), Feature("tags", kind="bag", min_count=8)))
    found = opened(data, log=frame.with_columns(split=pl.Series(split))).fitted.vocabularies
    train = {"item": item[:-20], "tags": np.concatenate([np.array(t, dtype=int) for t in tags[:-20]])}
    for name, least in (("item", 4), ("tags", 8)):
        values, counts = np.unique(train[name], return_counts=True)
        assert found[name].values.to_list() == values[counts >= least].tolist()
        assert 0 < (counts >= least).sum() < len(values)


def test_a_column_of_nulls_has_no_type_to_disagree_with(opened):
    data = replace(DATA, features=(Feature("item"), Feature("other", vocabulary="item")))
    table = opened(data, log=log(item=[3, 4, 3, 5], other=[None] * 4))
    assert table.fitted.vocabularies["item"].values.to_list() == [3, 4]
    assert table.batch(np.arange(4)).features["other"].tolist() == [1] * 4
