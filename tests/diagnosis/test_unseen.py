"""The check of unseen ids: against sets of the raw table, silence, drift, and how far the model leans on a column."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from healthkit import make_case, make_run, make_table

from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import Diagnosis, NotApplicable
from unbraid.diagnosis.unseen import LEANS, Unseen, reliance, share
from unbraid.types import Feature


def fresh(table: pl.DataFrame, share: float, *splits: str) -> pl.DataFrame:
    """A share of the rows of some splits get items and tags that no other row has."""
    new = (pl.int_range(pl.len()) % 100 < 100 * share) & pl.col("split").is_in(splits)
    return table.with_columns(
        item=pl.when(new).then(pl.int_range(pl.len()) + 10_000).otherwise("item"),
        tags=pl.when(new).then(pl.concat_list("tags", pl.lit(50) + pl.int_range(pl.len()))).otherwise("tags"),
    )


def examined(case: Case) -> dict[str, Diagnosis]:
    return {d.where: d for d in Unseen()(case)}


def leaning(case: Case, feature: str, scale: float) -> Case:
    """The case, with a model that leans on a feature as if its vectors were ``scale`` times as large."""
    for name, weight in case.model.named_parameters():
        if f"/{feature}/" in name.replace(".", "/"):
            weight.data *= scale
    return case


def test_shares_against_sets() -> None:
    table = fresh(make_table(), 0.3, "valid", "test")
    features = (Feature("item", min_count=12), Feature("x", kind="number"), Feature("tags", kind="bag"))
    case = make_case(table, make_run(steps=1, features=features))
    train = table.filter(split="train")
    counts = train["item"].value_counts()
    items = set(counts.filter(pl.col("count") >= 12)["item"].to_list())
    assert 0 < len(items) < train["item"].n_unique() + 1
    tags = set(train["tags"].explode().drop_nulls().to_list())
    for split in ("train", "valid", "test"):
        rows = table.filter(split=split)
        by_item = np.array([item not in items for item in rows["item"]], float)
        by_tags = np.array([sum(t not in tags for t in own) / max(1, len(own)) for own in rows["tags"]])
        user = rows["user"].to_numpy()
        for feature, parts in ((features[0], by_item), (features[2], by_tags)):
            value, low, high = share(case, feature, split)
            gap = parts - parts.mean()
            error = np.sqrt(sum(gap[user == u].sum() ** 2 for u in set(user.tolist()))) / len(parts)
            assert value == pytest.approx(parts.mean(), abs=1e-10)
            ends = max(0, value - 1.96 * error), min(1, value + 1.96 * error)
            assert (low, high) == pytest.approx(ends, abs=1e-10)


def test_a_log_of_known_ids_is_silent() -> None:
    case = make_case(make_table(), make_run(steps=1))
    (one,) = Unseen()(case)  # nothing at all is unseen: one line says so
    assert one.value == 0 and one.grade == "none" and not one.remedies


def test_the_more_is_unseen_the_louder_and_drift_is_told_from_newness() -> None:
    table = make_table()
    case = make_case(table, make_run(steps=1))
    values = []
    for strength in (0.0, 0.1, 0.4, 0.9):
        found = examined(Case.of(case.bundle, tables={"log": fresh(table, strength, "test")}))
        values.append(found["item"].value)
        if strength:
            assert "values drift" in found["item"].reading
    assert values == pytest.approx([0.0, 0.1, 0.4, 0.9], abs=0.02)
    found = examined(Case.of(case.bundle, tables={"log": fresh(table, 0.4, "valid", "test")}))
    assert "new or rare in every split" in found["item"].reading


def test_severe_needs_a_model_that_leans() -> None:
    table = fresh(make_table(), 0.95, "test")
    aloof = examined(leaning(make_case(table, make_run(steps=1)), "item", 0.0))["item"]
    assert aloof.evidence["reliance"] == pytest.approx(0, abs=1e-6) and aloof.grade == "mild"
    leans = examined(leaning(make_case(table, make_run(steps=1)), "item", 1000.0))["item"]
    assert leans.evidence["reliance"] > LEANS and leans.grade == "severe"
    less = examined(leaning(make_case(fresh(make_table(), 0.7, "test"), make_run(steps=1)), "item", 1000.0))["item"]
    assert less.grade == "moderate"  # not severe below four rows of five


def test_reliance_against_predictions_by_hand() -> None:
    case = leaning(make_case(fresh(make_table(), 0.2, "valid"), make_run(steps=1)), "item", 30.0)
    rows = case.sample("valid")
    codes = case.encoded.columns["feature.item"][rows]
    rows = rows[codes > 0]
    batch = case.encoded.batch(rows)
    case.model.eval()
    with torch.no_grad():
        before = case.model(batch).logits
        hidden = {**batch.features, "item": torch.zeros(len(rows), dtype=torch.int64)}
        after = case.model(replace(batch, features=hidden)).logits
    wanted = max(float((after[t] - before[t]).abs().mean() / before[t].std(correction=0)) for t in ("click", "buy"))
    assert reliance(case, case.schema.features[0]) == pytest.approx(wanted, rel=1e-5)


def test_training_rows_tell_where_no_validation_row_knows_a_value() -> None:
    """An id of the user, when whole users are apart."""
    splits = {0: "train", 1: "train", 2: "valid", 3: "test"}
    table = make_table().with_columns(split=(pl.col("user") % 4).replace_strict(splits, return_dtype=pl.String))
    case = make_case(table, make_run(steps=1, features=(Feature("user"), Feature("x", kind="number"))))
    one = examined(leaning(case, "user", 1000.0))["user"]
    assert one.value == 1 and one.evidence["reliance"] > LEANS and one.grade == "severe"
    assert [remedy.name for remedy in one.remedies] == ["without_user", "buckets_user", "unknown_rate"]
    run = one.remedies[0].run
    assert run is not None and [f.name for f in run.data.features] == ["x"]


def test_buckets_are_unseen_too_and_both_remedies_teach_a_vector() -> None:
    row = pl.int_range(pl.len())
    once = (row % 9 == 0) & (pl.col("split") == "train")
    table = fresh(make_table(), 0.3, "test").with_columns(item=pl.when(once).then(row + 50_000).otherwise("item"))
    case = make_case(table, make_run(steps=1))
    one = examined(case)["item"]
    buckets, unknown = one.remedies
    assert "has learned nothing" in one.reading
    assert unknown.run is not None and unknown.run.model.tables.unknown_rate == 0.05
    run = buckets.run
    assert run is not None
    assert replace(run, name="toy", data=replace(run.data, features=case.run.data.features)) == case.run
    mended = Encoded(encode(run.data, tables={"log": table}))
    known = len(mended.fitted.vocabularies["item"].values)
    codes = mended.columns["feature.item"][mended.split("train")]
    assert (codes >= 2 + known).mean() > 0.08  # rows of rare values train the buckets
    again = examined(make_case(table, run))["item"]
    assert again.value >= one.value and [r.name for r in again.remedies] == ["unknown_rate"] * (
        again.evidence["unseen in training rows"] < 0.001
    )


def test_no_label_of_the_test_split_is_read_and_what_is_not_applicable() -> None:
    table = fresh(make_table(), 0.3, "test")
    case = make_case(table, make_run(steps=1))
    other = table.with_columns(click=pl.when(split="test").then(1 - pl.col("click")).otherwise("click"))
    assert Unseen()(case) == Unseen()(Case.of(case.bundle, tables={"log": other}))
    case = make_case(table, make_run(steps=1, features=(Feature("x", kind="number"),)))
    with pytest.raises(NotApplicable, match="no feature of kind"):
        Unseen()(case)
