"""The check of small cells: widths against evaluation and DeLong's formula, silence, gaps and cells without labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from healthkit import make_case, make_run, make_table, oracle, with_scores

from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import Diagnosis, NotApplicable
from unbraid.diagnosis.plots import Heat
from unbraid.diagnosis.small import Small, half_width, labels_of
from unbraid.evaluate import evaluate, replicate
from unbraid.types import Task


def examined(case: Case) -> dict[str, Diagnosis]:
    return {d.where: d for d in Small()(case)}


def test_widths_are_those_of_evaluation() -> None:
    case = make_case(make_table(), make_run(steps=1))
    found, told = examined(case), evaluate(case.valid, case.schema, replicates=300)
    for task in ("click", "buy"):
        auc = told[task]["auc"]
        assert found[task].value == pytest.approx((auc["high"] - auc["low"]) / 2, abs=1e-10)
        halves = {
            f"{task}, domain {name}": (own["auc"]["high"] - own["auc"]["low"]) / 2
            for name, own in told[task]["domains"].items()
        }
        one = found[f"{task}, domains"]
        assert one.evidence["half widths"] == pytest.approx(halves, abs=1e-10)
        assert one.value == max(one.evidence["half widths"].values())


def test_widths_against_delong_where_every_user_has_one_row() -> None:
    table = make_table(5000).with_columns(user=pl.int_range(pl.len()))
    case = make_case(table, make_run(steps=1))
    scores = oracle(case, table)
    found = examined(with_scores(case, scores))
    for task in ("click", "buy"):
        z, y = scores.logits[task], scores.labels[task] == 1
        wins = (z[y][:, None] > z[~y][None]) + 0.5 * (z[y][:, None] == z[~y][None])
        up, down = wins.mean(1), wins.mean(0)
        error = np.sqrt(up.var(ddof=1) / len(up) + down.var(ddof=1) / len(down))
        assert found[task].value == pytest.approx(1.96 * error, rel=0.15)


def test_a_sample_is_as_wide_as_its_split() -> None:
    table = make_table(12_000, 2000)
    bundle = make_case(table, make_run(steps=1)).bundle
    whole, part = (examined(Case.of(bundle, tables={"log": table}, rows=rows)) for rows in (20_000, 800))
    for where in ("click", "buy"):
        assert part[where].value == pytest.approx(whole[where].value, rel=0.25)


def test_a_label_too_rare_for_the_sample_and_not_for_the_split() -> None:
    """Scores that say nothing: DeLong's width on the whole split is what the formula says of the sample."""
    table = make_table(12_000).with_columns(user=pl.int_range(pl.len()))
    table = table.with_columns(buy=(pl.int_range(pl.len()) % 40 == 0).cast(pl.Int64))
    bundle = make_case(table, make_run(steps=1, domain="")).bundle
    whole, part = (Case.of(bundle, tables={"log": table}, rows=rows) for rows in (20_000, 240))
    positives = part.valid.labels["buy"].sum()
    assert 2 <= positives < 10
    found = examined(part)["buy"]
    assert found.value == pytest.approx(1.96 / np.sqrt(12 * positives * len(whole.sample("valid")) / 240), abs=1e-10)
    expected = examined(whole)["buy"].value * np.sqrt(
        whole.valid.labels["buy"].mean() / part.valid.labels["buy"].mean()
    )
    assert found.value == pytest.approx(expected, rel=0.2)


def test_other_metrics() -> None:
    table = make_table(1500).with_columns(
        spend=pl.col("x") * 3 + 10, size=pl.when(pl.col("x") > 0).then(pl.lit("L")).otherwise(pl.lit("S"))
    )
    tasks = (Task("size", kind="multiclass"), Task("spend", kind="real"))
    case = make_case(table, make_run(steps=1, tasks=tasks))
    found, told = examined(case), evaluate(case.valid, case.schema, replicates=300)
    accuracy, rmse = told["size"]["accuracy"], told["spend"]["rmse"]
    assert found["size"].value == pytest.approx((accuracy["high"] - accuracy["low"]) / 2, abs=1e-10)
    assert found["spend"].value == pytest.approx((rmse["high"] - rmse["low"]) / 2 / rmse["value"], abs=1e-10)


def test_a_large_log_is_silent() -> None:
    assert {d.grade for d in Small()(make_case(make_table(12_000, 2000), make_run(steps=1)))} == {"none"}


def test_the_smaller_the_louder() -> None:
    table, values, grades = make_table(12_000, 2000), [], []
    for rows in (2400, 600, 120, 60):
        valid = table.filter(split="valid").head(rows)
        case = make_case(pl.concat([table.filter(pl.col("split") != "valid"), valid]), make_run(steps=1, domain=""))
        one = examined(with_scores(case, oracle(case, pl.concat([table.filter(pl.col("split") != "valid"), valid]))))[
            "click"
        ]
        values.append(one.value)
        grades.append(one.grade)
    assert values == sorted(values) and grades[0] == "none" and grades[-1] in ("moderate", "severe")
    assert one.remedies[0].name == "more" and f"{60:,} rows" in one.reading


def test_cells_that_cannot_be_measured_are_named_once() -> None:
    """`attic` has 12 validation rows and `mail` 88, none of them with a buy; training has some of both."""
    table = make_table(6000)
    at = pl.int_range(pl.len())
    site = pl.when(at < 12).then(pl.lit("attic")).when(at < 100).then(pl.lit("mail")).otherwise(pl.lit("home"))
    table = table.with_columns(
        split=pl.when(at < 100).then(pl.lit("valid")).when(at < 200).then(pl.lit("train")).otherwise("split")
    )
    trained = pl.when(at < 150).then(pl.lit("attic")).otherwise(pl.lit("mail"))
    site = pl.when((at >= 100) & (at < 200)).then(trained).otherwise(site)
    buy = pl.when(at < 100).then(0).when(at < 103).then(1).otherwise("buy")
    case = make_case(table.with_columns(site=site, buy=buy), make_run(steps=1))
    found = examined(case)
    attic, buy, click = found["domain attic"], found["buy, domains"], found["click, domains"]
    assert attic.evidence["rows"] == {"attic": 12} and "attic: 12 rows" in attic.reading
    assert set(buy.evidence["half widths"]) == {"buy, domain home", "buy, domain mail"}
    assert "cannot be measured of domain mail (0 positives and 88 negatives)" in buy.reading
    assert attic.value == buy.value == Small().severe and attic.grade == buy.grade == "mild"
    assert set(click.evidence["half widths"]) == {"click, domain home", "click, domain mail"}
    assert None not in click.evidence["half widths"].values()
    (plot,) = next(d.evidence["plots"] for d in found.values() if "plots" in d.evidence)
    assert isinstance(plot, Heat) and plot.rows == ("click", "buy")
    assert [value is None for value in plot.values[1]] == [name in ("attic", "mail") for name in plot.columns]


def test_a_task_without_positives_is_severe() -> None:
    table = make_table(2000).with_columns(buy=pl.when(split="valid").then(0).otherwise("buy"))
    one = examined(make_case(table, make_run(steps=1, domain="")))["buy"]
    assert one.value == one.severe and one.grade == "severe" and "0 positives" in one.reading


def test_cells_without_a_label_are_named_and_never_more_than_mild() -> None:
    case = make_case(make_table(6000), make_run(steps=1, withhold="site = 'mail'"))
    found = examined(case)
    empty = found["cells without a label"]
    assert empty.evidence["cells"] == ["click, domain mail", "buy, domain mail"] and empty.grade == "mild"
    assert not any("mail" in where for where in found if where != "cells without a label")
    labels = labels_of(case)
    assert labels["click", "mail"] == 0 and labels["click", "home"] == labels["click", ""] > 0


def test_labels_against_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unbraid.diagnosis.small.CHUNK", 700)
    table = make_table(3000).with_columns(buy=pl.when(pl.col("x") > 0.3).then("buy"))
    found = labels_of(make_case(table, make_run(steps=1)))
    known = table.filter(pl.col("split") != "test", pl.col("buy").is_not_null())
    assert found["buy", ""] == len(known)
    for site in ("home", "mail"):
        assert found["buy", site] == len(known.filter(site=site))


def test_one_user_has_no_interval() -> None:
    case = make_case(make_table(600), make_run(steps=1))
    one = replace(case.valid, group=np.zeros(len(case.valid.row), int))
    assert half_width(replicate(one, case.schema, replicates=50)["click", ""]) is None
    assert "one user" in examined(with_scores(case, one))["click"].reading


def test_no_label_of_the_test_split_is_read_and_what_is_not_applicable() -> None:
    table = make_table(1500)
    case = make_case(table, make_run(steps=1))
    other = table.with_columns(click=pl.when(split="test").then(1 - pl.col("click")).otherwise("click"))
    assert Small()(case) == Small()(Case.of(case.bundle, tables={"log": other}))
    none = table.filter(pl.col("split") != "valid")
    with pytest.raises(NotApplicable, match="validation split is empty"):
        Small()(Case.of(case.bundle, tables={"log": none}))
