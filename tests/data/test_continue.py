"""A run that goes on from a bundle: newer rows alone are trained on, with the histories of all; what the bundle knows stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from toylog import make_data, make_log, make_run

from unbraid.bundle import Bundle, BundleError, build
from unbraid.data.declaration import Data, Split
from unbraid.data.encode import encode
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.job import train
from unbraid.predictor import Predictor
from unbraid.types import Task
from unbraid.warm_start import warm_start

FROM, VALID, TEST = 500 * 10**6, 700 * 10**6, 850 * 10**6


def since(**changes: Any) -> Data:
    return make_data(split=Split(kind="time", train_from=FROM, valid_from=VALID, test_from=TEST), **changes)


# ------------------------------------------------------------------------------------------------------------ train_from
def test_earlier_rows_are_events_and_in_no_split() -> None:
    log = make_log()
    late = Encoded(encode(since(), tables={"log": log}))
    time = log["time"].to_numpy()
    assert late.rows == (time >= FROM).sum() and late.columns["time"].min() >= FROM
    counts = [((time >= FROM) & (time < VALID)).sum(), ((time >= VALID) & (time < TEST)).sum(), (time >= TEST).sum()]
    assert [len(late.split(name)) for name in ("train", "valid", "test")] == counts
    # histories: what the same rows have where all rows are in a split, in raw values, since codes are the split's own
    whole = Encoded(encode(make_data(), tables={"log": log}))
    rows = np.flatnonzero(whole.columns["time"] >= FROM)
    for name in ("seen", "liked"):
        a, b = (one.batch(at).features[name] for one, at in ((late, np.arange(late.rows)), (whole, rows)))
        assert a.lengths.tolist() == b.lengths.tolist()
        known, every = (list(one.fitted.vocabularies["item"].values) for one in (late, whole))
        wanted = [known.index(every[c - 2]) + 2 if every[c - 2] in known else 0 for c in b.values["item"].tolist()]
        assert a.values["item"].tolist() == wanted
    first = late.batch(np.array([0])).features["seen"]
    assert first.lengths[0] > 0, "its events are all before `train_from`"


def test_vocabularies_are_those_of_rows_that_train() -> None:
    log = make_log().with_columns(item=pl.when(pl.col("time") < FROM).then(pl.lit("old")).otherwise(pl.col("item")))
    found = Encoded(encode(since(), tables={"log": log})).fitted.vocabularies["item"].values
    assert "old" not in found and len(found)


def test_bounds_that_cannot_be() -> None:
    log = {"log": make_log()}
    with pytest.raises(ValueError, match="`train_from` is for a split by time. Found kind `user`"):
        Split(kind="user", train_from=1)
    with pytest.raises(DataError, match="`train_from` should be before `valid_from`. Found 700000000, 700000000"):
        encode(make_data(split=replace(since().split, train_from=VALID)), tables=log)
    with pytest.raises(DataError, match="The train split is empty"):
        encode(make_data(split=replace(since().split, train_from=VALID - 1)), tables=log)
    gaps = log["log"].with_columns(time=pl.when(pl.col("item") != "i3").then(pl.col("time")))
    with pytest.raises(DataError, match="rows belong to no split: check `time` for nulls"):
        encode(since(), tables={"log": gaps})


# ----------------------------------------------------------------------------------------------------- what a bundle knows
def started(log: pl.DataFrame, later: pl.DataFrame, data: Data) -> tuple[Bundle, Bundle]:
    """A trained bundle, and one that starts from it on a later log, before its first step."""
    run = make_run(data=data)
    old = train(run, tables={"log": log}, baseline=False).bundle
    newer = Encoded(encode(replace(data, split=since().split), tables={"log": later}, grow=old.fitted))
    model = build(replace(run, seed=3), newer.schema)
    warm_start(model, newer.fitted, old)
    return old, Bundle(run, newer.fitted, model.eval(), {})


def test_it_begins_with_the_predictions_of_the_bundle() -> None:
    """Numbers of another level, new items and one more site: what the bundle knows is predicted as before, bit for bit."""
    log = make_log()
    moved = pl.when(pl.col("time") >= FROM).then(pl.col("price") * 7 + 100).otherwise(pl.col("price"))
    item = pl.when(pl.col("time") % 7_000 == 0).then(pl.lit("new")).otherwise(pl.col("item"))
    site = pl.when(pl.col("time") % 11_000 == 0).then(pl.lit("watch")).otherwise(pl.col("site"))
    later = log.with_columns(price=moved, item=item, site=site)
    old, new = started(log, later, make_data())
    assert {"new"} == set(new.fitted.vocabularies["item"].values) - set(old.fitted.vocabularies["item"].values)
    assert new.fitted.schema.numbers == old.fitted.schema.numbers
    rows = log.tail(200).drop("click", "buy")
    wanted, found = (Predictor(one).predict(rows, {"log": log}) for one in (old, new))
    assert found.equals(wanted) and found["click"].std() > 0
    alone = Encoded(encode(replace(make_data(), split=since().split), tables={"log": later})).schema.numbers["price"]
    assert alone[0] > 90 and abs(old.fitted.schema.numbers["price"][0]) < 1, "fitted alone, the scale would be another"


def test_a_scale_that_rests_on_nothing_is_no_scale() -> None:
    log = make_log()
    empty = log.with_columns(price=pl.lit(None, dtype=pl.Float64))
    old, new = started(empty, log, make_data())
    assert old.fitted.schema.numbers["price"] == (0.0, 1.0) != new.fitted.schema.numbers["price"]


def test_a_number_that_is_declared_otherwise_is_fitted_again() -> None:
    log, data = make_log(), make_data()
    fitted = Encoded(encode(data, tables={"log": log})).fitted
    features = tuple(replace(f, transform="log1p") if f.name == "price" else f for f in data.features)
    found = Encoded(encode(replace(data, features=features), tables={"log": log}, grow=fitted)).schema.numbers["price"]
    price = log.filter(pl.col("time") < 600 * 10**6)["price"].drop_nulls().to_numpy()
    np.testing.assert_allclose(
        found,
        [(np.sign(price) * np.log1p(abs(price))).mean(), (np.sign(price) * np.log1p(abs(price))).std()],
        rtol=1e-5,
    )


def test_a_task_that_is_known_may_show_one_class(tmp_path: Path) -> None:
    log = make_log()
    quiet = log.with_columns(buy=pl.when(pl.col("time") < FROM).then(pl.col("buy")).otherwise(0))
    with pytest.raises(DataError, match="`buy`: all .* are 0; both classes are needed"):
        encode(since(), tables={"log": quiet})
    train(make_run(), tmp_path / "old", tables={"log": log}, baseline=False)
    found = train(replace(make_run(data=since()), init=str(tmp_path / "old")), tables={"log": quiet}, baseline=False)
    assert found.bundle.fitted.schema.sizes["item"] > 2


def test_classes_that_are_known_stay() -> None:
    data = make_data(tasks=(Task("click"), Task("size", kind="multiclass")))
    log = make_log()
    fitted = Encoded(encode(data, tables={"log": log})).fitted
    late = replace(data, split=since().split)
    few = log.filter((pl.col("size") != "L") | (pl.col("time") < FROM))
    assert Encoded(encode(late, tables={"log": few})).schema.classes == {"size": ("M", "S")}
    assert Encoded(encode(late, tables={"log": few}, grow=fitted)).schema.classes == {"size": ("L", "M", "S")}
    more = log.with_columns(size=pl.when(pl.col("shop") == 1).then(pl.lit("XL")).otherwise(pl.col("size")))
    run = make_run(data=data)
    grown = Encoded(encode(late, tables={"log": more}, grow=fitted))
    with pytest.raises(BundleError, match="Task `size` has classes .*XL"):
        warm_start(build(run, grown.schema), grown.fitted, Bundle(run, fitted, build(run, fitted.schema), {}))
