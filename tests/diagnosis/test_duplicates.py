"""The check of copies: against a dictionary of rows, silence without any, the planted share within and between splits."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import picturekit
import polars as pl
import pytest
from healthkit import make_case, make_run, make_table

from unbraid import recipes
from unbraid.data.declaration import Split
from unbraid.data.encode import encode
from unbraid.data.source import SPLIT, kept_rows, with_split
from unbraid.data.table import Encoded
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import Diagnosis, NotApplicable
from unbraid.diagnosis.duplicates import Copies, count, drawn, earlier, keys
from unbraid.job import train
from unbraid.types import Feature


def examined(table: pl.DataFrame, **changes: object) -> dict[str, Diagnosis]:
    return {d.where: d for d in Copies()(make_case(table, make_run(steps=1, **changes)))}  # type: ignore[arg-type]


def again(table: pl.DataFrame, split: str, share: float, to: str, **changes: pl.Expr) -> pl.DataFrame:
    """The table, and copies of so large a share of the rows of one split in another; ``changes``: what differs in them."""
    copies = table.filter(split=split).sample(fraction=share, seed=1).with_columns(split=pl.lit(to), **changes)
    return pl.concat([table, copies])


def test_keys_against_rows_in_a_dictionary() -> None:
    """Few values, so that many rows agree: in all columns, or in all but one."""
    rng = np.random.default_rng(0)
    rows = 1500
    table = pl.DataFrame({
        "user": rng.integers(0, 2, rows), "time": rng.integers(0, 2, rows) * 1000, "site": rng.choice(["a", "b"], rows),
        "item": rng.integers(0, 2, rows), "price": [(0.0, -0.0, 1.5, None)[i] for i in rng.integers(0, 4, rows)],
        "tags": [[int(t) for t in rng.integers(0, 3, rng.integers(0, 3))] for _ in range(rows)],
        "vector": [[float(v), 0.5] for v in rng.integers(0, 2, rows)],
        "click": rng.integers(0, 2, rows), "buy": [(0, 1, None)[i] for i in rng.integers(0, 3, rows)],
        "split": rng.choice(["train", "valid", "test"], rows, p=[0.2, 0.4, 0.4]),
    })  # fmt: skip
    features = (
        Feature("item"), Feature("price", kind="number"), Feature("tags", kind="bag"), Feature("vector", kind="vector"),
    )  # fmt: skip
    case = make_case(table, make_run(steps=1, features=features))
    of = {split: case.encoded.split(split) for split in ("train", "valid", "test")}

    def key(row: dict, labels: bool) -> tuple:
        price = None if row["price"] is None else row["price"] + 0.0
        told = (row["click"], row["buy"]) if labels else ()
        return (
            row["user"],
            row["time"],
            row["site"],
            row["item"],
            price,
            tuple(sorted(row["tags"])),
            tuple(row["vector"]),
            told,
        )

    dicts = table.to_dicts()
    for split, labels in (("valid", True), ("test", False)):
        seen = {key(dicts[i], labels) for i in of["train"]}
        wanted = [key(dicts[i], labels) in seen for i in of[split]]
        found = earlier(keys(case, of[split], labels), keys(case, of["train"], labels)) >= 0
        assert found.tolist() == wanted and 0.05 < np.mean(wanted) < 0.95
        assert count(case, of, split).copies == sum(wanted)
    first: dict[tuple, int] = {}
    firsts = [first.setdefault(key(dicts[row], True), i) for i, row in enumerate(of["train"])]
    places = earlier(keys(case, of["train"], True), None)
    assert [i if at < 0 else at for i, at in enumerate(places)] == firsts


def test_interval_against_a_loop_over_users() -> None:
    table = again(make_table(), "train", 0.2, "train")
    case = make_case(table, make_run(steps=1))
    one = count(case, {split: case.encoded.split(split) for split in ("train", "valid", "test")}, "train")
    rows = table.with_row_index().filter(split="train")
    copy = (~rows.select(pl.struct(pl.exclude("index")).is_first_distinct()).to_series()).to_numpy()
    user = rows["user"].to_numpy()
    error = np.sqrt(sum(((copy - copy.mean())[user == u].sum()) ** 2 for u in set(user.tolist()))) / len(copy)
    assert one.value == pytest.approx(copy.mean(), abs=1e-10)
    assert (one.low, one.high) == pytest.approx((one.value - 1.96 * error, one.value + 1.96 * error), abs=1e-10)
    for row, before in one.examples:
        assert rows.filter(index=row).drop("index").equals(rows.filter(index=before).drop("index")) and before < row


def test_a_log_without_copies_is_silent() -> None:
    found = examined(make_table())
    assert {where: (d.value, d.grade, d.remedies) for where, d in found.items()} == {
        where: (0.0, "none", ()) for where in ("training rows", "validation rows", "test rows")
    }


def test_copies_among_training_rows() -> None:
    table, values, grades = make_table(), [], []
    for share in (0.0, 0.03, 0.15, 0.5):
        one = examined(again(table, "train", share, "train"))["training rows"]
        assert one.value == pytest.approx(
            int(share * (n := len(table.filter(split="train")))) / (n + int(share * n)), abs=1e-10
        )
        values.append(one.value)
        grades.append(one.grade)
    assert values == sorted(values) and grades[0] == "none" and grades[1] == "mild" and grades[-1] == "severe"
    run = one.remedies[0].run
    assert run is not None and replace(run, name="toy", data=replace(run.data, drop_duplicates=False)) == make_run(
        steps=1
    )
    mended = Encoded(encode(run.data, tables={"log": again(table, "train", 0.5, "train")}))
    assert mended.rows == len(table)


def test_training_rows_in_other_splits() -> None:
    table = make_table()
    other = {"click": 1 - pl.col("click")}
    for share, grade in ((0.02, "mild"), (0.2, "severe")):
        found = examined(again(again(table, "train", share, "valid"), "train", share, "test", **other))
        assert found["training rows"].grade == "none"
        for where in ("validation rows", "test rows"):  # of test rows labels are not read
            assert found[where].grade == grade and found[where].evidence["copies"] == int(
                share * len(table.filter(split="train"))
            )
    found = examined(again(table, "train", 0.2, "valid", **other))
    assert found["validation rows"].evidence["copies"] == 0  # the same person, another outcome


def test_the_same_at_another_time_is_a_repeat() -> None:
    one = examined(again(make_table(), "train", 0.3, "train", time=pl.col("time") + 1))["training rows"]
    assert one.value == 0 and one.grade == "none"
    assert one.evidence["equal but for their time"] == pytest.approx(0.3 / 1.3, abs=1e-3)


def test_rows_with_unknown_ids_are_no_copies() -> None:
    """Each of these test rows has an item of its own: to the model all are the same one."""
    table = make_table()
    twins = (
        table.filter(split="test")
        .head(200)
        .with_columns(item=pl.int_range(1000, 1200, dtype=pl.Int64), x=pl.lit(0.0), time=pl.lit(0, pl.Int64))
    )
    twins = twins.with_columns(user=pl.lit(1, pl.Int64), site=pl.lit("home"), tags=pl.lit([1], pl.List(pl.Int64)))
    twins = pl.concat([twins, twins.head(1).with_columns(split=pl.lit("train"), item=pl.lit(999, pl.Int64))])
    found = examined(pl.concat([table, twins.select(table.columns)]), features=(
        Feature("item", min_count=2), Feature("x", kind="number"), Feature("tags", kind="bag"),
    ))  # fmt: skip
    assert found["test rows"].value == 0
    assert found["test rows"].evidence["rows"] == len(table.filter(split="test"))
    with pytest.raises(NotApplicable, match="of .* training rows"):
        examined(table, features=(Feature("item", min_count=10_000), Feature("x", kind="number")))


def test_without_a_time_equal_rows_are_judged_mildly() -> None:
    table = again(make_table(), "train", 0.15, "train")
    coarse = examined(table, time="", features=(Feature("item"), Feature("tags", kind="bag")))["training rows"]
    assert coarse.grade == "mild" and (coarse.usual, coarse.severe) == Copies().alike
    assert "two events" in coarse.reading
    exact = examined(table, time="")["training rows"]  # the number tells rows apart
    assert (exact.usual, exact.severe) == Copies().copies and exact.grade == "moderate"


def test_a_split_by_time_has_no_copies_between_splits() -> None:
    split = Split(kind="time", valid_from=2_400_000, test_from=3_200_000)
    assert set(examined(make_table(), split=split)) == {"training rows"}


def test_users_are_drawn_whole() -> None:
    table = again(make_table(9000, 900), "train", 0.3, "valid")
    case = make_case(table, make_run(steps=1), rows=1500)
    rows = drawn(case)
    users = {split: set(table["user"].to_numpy()[own].tolist()) for split, own in rows.items()}
    everyone = set.union(*users.values())
    for split, own in rows.items():
        whole = table.with_row_index().filter(pl.col("split") == split, pl.col("user").is_in(list(everyone)))
        assert own.tolist() == whole["index"].to_list()
    assert 0.7 * 1500 < max(map(len, rows.values())) < 1.3 * 1500
    found = {d.where: d for d in Copies()(case)}["validation rows"]
    truth = 0.3 * 0.6 / (0.2 + 0.3 * 0.6)
    assert found.low < truth < found.high and found.grade == "severe"  # type: ignore[operator]
    for time in ("time", ""):  # by time, and by key
        others = drawn(make_case(table, make_run(steps=1, user="", time=time), rows=1500))
        assert 0.7 * 1500 < max(map(len, others.values())) < 1.3 * 1500
        kept = {split: set(table["x"].to_numpy()[at].tolist()) for split, at in others.items()}
        valid = set(table.filter(split="valid")["x"].to_list())
        assert kept["train"] & valid == kept["train"] & kept["valid"]  # copies are drawn with their originals


def test_no_label_of_the_test_split_is_read() -> None:
    table = again(make_table(), "train", 0.1, "test")
    case = make_case(table, make_run(steps=1))
    other = table.with_columns(click=pl.when(split="test").then(1 - pl.col("click")).otherwise("click"))
    assert Copies()(case) == Copies()(Case.of(case.bundle, tables={"log": other}))


def test_pictures_are_compared_by_their_bytes(tmp_path: Path) -> None:
    """Training pictures under other names in the test split; with a label that is not read."""
    table = picturekit.make_rows(tmp_path, 60)
    source = table.filter(split="train").head(6)
    for n, path in enumerate(source["picture"]):
        shutil.copy(tmp_path / path, tmp_path / "pics" / f"copy{n}.png")
    copies = source.with_columns(
        picture=pl.format("pics/copy{}.png", pl.int_range(pl.len())), split=pl.lit("test"), colour=None
    )
    table = pl.concat([table, copies.select(table.columns)])
    run = picturekit.make_run(tmp_path, training=replace(picturekit.make_run(tmp_path).training, steps=1))
    case = Case.of(train(run, tables={"rows": table}, baseline=False).bundle, tables={"rows": table})
    (one,) = (d for d in Copies(least=10)(case) if d.where == "test rows")
    assert one.evidence["copies"] == 6 and one.evidence["rows"] == 18 and one.grade in ("moderate", "severe")
    assert {row: before for row, before in one.evidence["examples"]} == {
        60 + n: case.encoded.split("train")[n] for n in range(5)
    }
    assert case.valid.logits["colour"].shape == (12, 3)  # a case reads pictures as the model sees them


@pytest.mark.slow
def test_the_bundled_log_as_it_was_published() -> None:
    """Its training rows that equal an earlier one in every column, counted in the table, are those that the check finds."""
    run = recipes.stem()
    run = replace(run, training=replace(run.training, steps=1), data=replace(run.data, drop_duplicates=False))
    bundle = train(run, baseline=False).bundle
    case = Case.of(bundle, rows=200_000)
    (one,) = Copies()(case)
    plan = with_split(kept_rows(run.data, Path(), None), run.data).filter(pl.col(SPLIT) == 0).collect()
    twice = plan.height - plan.drop(SPLIT).unique().height
    assert twice > 1000 and abs(one.evidence["copies"] - twice) < 0.01 * twice  # rows with rare ids are not compared
    (sample,) = Copies()(Case.of(bundle))
    assert sample.low < one.value < sample.high  # type: ignore[operator]
    (mended,) = Copies()(Case.of(replace(bundle, run=replace(run, data=recipes.stem().data)), rows=200_000))
    assert mended.value < 1e-4
