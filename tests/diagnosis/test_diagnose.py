"""Planted illnesses: is the right one named, and is a healthy log left in peace?"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from unbraid import config, recipes
from unbraid.data.planted import ILLNESSES, sick_log
from unbraid.diagnosis.case import Case, interval, unlabelled, without_feature
from unbraid.diagnosis.diagnose import CHECKS, chosen_of, diagnose, ranked
from unbraid.diagnosis.diagnosis import Diagnosis, Measure
from unbraid.diagnosis.drift import with_column
from unbraid.diagnosis.interference import Interference
from unbraid.diagnosis.leak import alone, hanley
from unbraid.diagnosis.transfer import NegativeTransfer
from unbraid.diagnosis.units import against_others, rescaled, spread
from unbraid.job import train


def examined(seed, ill):
    tables, data = sick_log(seed, **ill)
    bundle = train(recipes.planted(data), tables=tables, baseline=False).bundle
    return diagnose(bundle, rows=8000, tables=tables)


def kinds(report):
    return list(dict.fromkeys(d.name for d in report.found if not d.because))


# ------------------------------------------------------------------------------------------------------------ the logs
def test_strength_0_is_the_healthy_log_and_an_illness_changes_only_its_own():
    healthy, data = sick_log(3)
    for ill in ILLNESSES:
        same, as_read = sick_log(3, **{ill: 0.0})
        assert same["rows"].equals(healthy["rows"]) and as_read == data
    leaked, _ = sick_log(3, leak=1.0)
    changed = [name for name in healthy["rows"].columns if not leaked["rows"][name].equals(healthy["rows"][name])]
    assert changed == ["late"]
    test = pl.col("split") == "test"
    assert leaked["rows"].filter(test)["late"].equals(healthy["rows"].filter(test)["late"])
    drifted, _ = sick_log(3, drift=1.0)
    moved = drifted["rows"]["x"] - healthy["rows"]["x"]
    assert np.allclose(moved, np.where(healthy["rows"]["split"] == "test", 3.0, 0.0))
    scaled, _ = sick_log(3, dominance=1.0)
    assert np.allclose(scaled["rows"]["stay"], 10 * healthy["rows"]["stay"])


def test_base_rates_are_within_their_ranges_and_wrong_strengths_are_refused():
    for seed in range(3):
        rows = sick_log(seed)[0]["rows"]
        assert 0.18 < rows["click"].mean() < 0.52 and 0.07 < rows["buy"].mean() < 0.32
        assert 40_000 <= len(rows) <= 60_000
    with pytest.raises(ValueError, match="Illnesses are collapse.*Found flu"):
        sick_log(0, flu=1.0)
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        sick_log(0, leak=1.5)


# ------------------------------------------------------------------------------------------------------------ the parts
def test_an_interval_of_a_mean_counts_users_and_not_rows():
    random = np.random.default_rng(0)
    per_user = random.standard_normal(200)
    values = np.repeat(per_user, 50)
    low, high = interval(values.mean(), values, np.repeat(np.arange(200), 50))
    assert (high - low) / 2 == pytest.approx(1.96 * per_user.std() / np.sqrt(200), rel=1e-9)


def test_one_column_that_is_the_label_has_an_auc_of_1_and_noise_has_none():
    random = np.random.default_rng(1)
    label, users = random.integers(0, 2, 4000).astype(float), random.integers(0, 200, 4000)
    value, low, high = alone(label.astype(np.int64), label, users)
    assert value == 1 and low <= 1 <= high
    value, low, _ = alone(random.integers(0, 50, 4000), label, users)
    assert abs(value - 0.5) < 0.03 and low <= 0.53
    assert alone(np.zeros(9, np.int64), np.ones(9), np.arange(9)) is None


def test_hanley_and_mcneil_s_error_is_that_of_drawn_samples():
    random = np.random.default_rng(2)
    drawn = []
    for _ in range(300):
        a, b = random.standard_normal(80) + 1, random.standard_normal(120)
        drawn.append((a[:, None] > b).mean())
    assert hanley(float(np.mean(drawn)), 80, 120) == pytest.approx(np.std(drawn), rel=0.15)


def test_units_are_ratios_of_quartile_ranges_and_the_sql_undoes_them():
    values = np.random.default_rng(3).standard_normal(1000)
    assert spread(100 * values) == pytest.approx(100 * spread(values))
    assert against_others(np.array([1.0, 1.0, 100.0])) == pytest.approx([-np.log10(50.5), -np.log10(50.5), 2.0])
    table = pl.DataFrame({"x": [1.0, 50.0], "site": ["a", "it's"]})
    assert table.select(pl.sql_expr(rescaled("x", "site", "it's", 50.0)).alias("x"))["x"].to_list() == [1.0, 1.0]


def test_what_a_leak_explains_stands_behind_and_worst_is_first():
    def one(name, where, value):
        return Diagnosis(name, where, value, 0.0, 1.0, "")

    found = ranked(
        [one("drift", "late", 3.0), one("leak", "late", 2.0), one("drift", "x", 1.0), one("small", "a", 0.0)]
    )
    assert [(d.name, d.where) for d in found] == [("leak", "late"), ("drift", "x"), ("drift", "late"), ("small", "a")]
    assert found[2].because == "leak: late"


def test_a_cause_is_found_by_its_subject_and_the_worst_one_is_named():
    def one(name, where, value, subject=""):
        return Diagnosis(name, where, value, 0.0, 1.0, "", subject=subject)

    found = ranked([
        one("negative_transfer", "buy in home", 9.0, "buy"), one("negative_transfer", "click", 2.0, "click"),
        one("conflict", "buy and click", 0.5, "buy"), one("auxiliary", "hint on buy", 0.7, "buy"),
        one("dominance", "stay over click", 0.0, "click"), one("units", "x in mail", 3.0, "x"), one("leak", "x", 0.1),
        one("leak", "buy", 0.1),
    ])  # fmt: skip
    assert {d.where: d.because for d in found if d.because} == {
        "buy in home": "auxiliary: hint on buy",
        "x in mail": "leak: x",
    }
    assert [d.where for d in found[:2]] == ["click", "hint on buy"], "a cause that finds nothing explains nothing"


def test_checks_that_train_a_whole_model_are_asked_for():
    plain = [check.name for check in CHECKS]
    assert [check.name for check in chosen_of(CHECKS, (), False)] == plain
    assert [check.name for check in chosen_of(CHECKS, (), True)] == [*plain, "negative_transfer"]
    (found,) = chosen_of(CHECKS, ("negative_transfer",), False)
    assert found.steps == 400
    mine = NegativeTransfer(usual=0.1, severe=0.2)
    assert chosen_of((mine,), (), True) == [mine]
    assert [check.name for check in chosen_of(CHECKS, ("units", "leak"), True)] == ["leak", "units"]


def test_the_metric_that_a_task_is_judged_by(small):
    bundle, tables = small
    schema = Case.of(bundle, rows=500, tables=tables).schema
    kinds = [
        replace(task, kind=kind) for task, kind in zip(schema.tasks, ("binary", "multiclass", "real"), strict=False)
    ]
    found = [Measure.of(replace(schema, tasks=tuple(kinds)), task.name) for task in kinds]
    assert [(each.task, each.metric, each.domain) for each in found] == [
        (task.name, metric, "") for task, metric in zip(kinds, ("auc", "accuracy", "rmse"), strict=True)
    ]
    assert Measure.of(bundle.run.data, "click") == Measure("click", "auc")


def test_negative_transfer_is_reached_by_its_name(small):
    bundle, tables = small
    report = diagnose(bundle, rows=3000, steps=3, only=["negative_transfer"], tables=tables)
    assert not report.failed and {d.name for d in report.diagnoses} == {"negative_transfer"}
    assert {d.subject for d in report.diagnoses} == {"click", "buy", "stay"}


# ------------------------------------------------------------------------------------------------------ a small bundle
@pytest.fixture(scope="module")
def small():
    tables, data = sick_log(5, leak=1.0)
    rows = tables["rows"].sample(6000, seed=0).sort("time")
    run = recipes.planted(data)
    run = replace(run, training=replace(run.training, steps=30, evaluate_every=0, patience=0))
    tables = {**tables, "rows": rows}
    return train(run, tables=tables, baseline=False).bundle, tables


def test_the_report_names_the_leak_its_run_trains_without_it_and_the_model_stays(small):
    bundle, tables = small
    before = copy.deepcopy(bundle.model.state_dict())
    report = diagnose(bundle, rows=3000, steps=3, tables=tables)
    assert not report.failed
    assert kinds(report)[0] == "leak" and report.found[0].where == "late" and report.found[0].grade == "severe"
    remedy = report.found[0].remedies[0].run
    assert remedy is not None and "late" not in {f.name for f in remedy.data.features}
    assert replace(remedy, name=bundle.run.name, data=bundle.run.data) == bundle.run
    assert config.dumps(remedy)
    assert all(torch.equal(before[name], value) for name, value in bundle.model.state_dict().items())


def test_labels_of_the_test_split_change_nothing(small):
    bundle, tables = small
    rows = tables["rows"]
    hidden = rows.with_columns(
        *(
            pl.when(pl.col("split") == "test").then(1 - pl.col(name)).otherwise(pl.col(name)).alias(name)
            for name in ("click", "buy", "hint", "lure")
        )
    )
    one, other = (diagnose(bundle, rows=3000, steps=3, tables={**tables, "rows": each}) for each in (rows, hidden))
    assert [(d.name, d.where, d.value, d.low, d.high) for d in one.diagnoses] == [
        (d.name, d.where, d.value, d.low, d.high) for d in other.diagnoses
    ]


def test_batches_of_the_test_split_carry_no_label(small):
    bundle, tables = small
    case = Case.of(bundle, rows=500, tables=tables)
    for batch in case.batches("test"):
        assert not any(bool(known.any()) for known in batch.observed.values())
        assert not any(bool(label.any()) for label in batch.labels.values())
    batch = next(case.batches("valid"))
    assert bool(batch.observed["click"].all()) and not bool(unlabelled(batch).observed["click"].any())


def test_a_column_of_other_rows_is_swapped_whole(small):
    bundle, tables = small
    case = Case.of(bundle, rows=500, tables=tables)
    here, there = (case.encoded.batch(case.sample(split)[:200]) for split in ("test", "train"))
    mixed = with_column(here, there, "x")
    changed = [name for name in here.features if mixed.features[name] is not here.features[name]]
    assert sorted(changed) == ["x", "x.exact"] or all(name.startswith("x") for name in changed)
    assert len(changed) == 2
    assert with_column(here, there, "seen").features["seen"] is there.features["seen"]


def test_no_gain_without_a_task_that_does_nothing_and_alone_of_two_is_without_the_other(small):
    bundle, tables = small
    case = Case.of(bundle, rows=2000, steps=3, tables=tables)
    drop, alone_ = Interference().gains(case)
    assert set(alone_) == {"click", "buy", "stay"}
    assert set(drop) == {(k, t) for k in ("click", "buy", "stay", "hint", "lure") for t in alone_ if k != t}
    assert all(low <= value <= high for value, low, high in [*drop.values(), *alone_.values()])


def test_a_feature_leaves_the_baseline_too_and_unknown_checks_are_named(small):
    bundle, tables = small
    run = replace(bundle.run, baseline=("user", "item"))
    left = without_feature(run, "item")
    assert left is not None and left.baseline == ("user",)
    assert without_feature(run, "seen") is None
    with pytest.raises(ValueError, match="Checks are leak.*Found luck"):
        diagnose(bundle, only=["luck"], tables=tables)


# ----------------------------------------------------------------------------------------------------------- the claim
@pytest.mark.slow
@pytest.mark.parametrize("ill", [i for i in ILLNESSES if i != "collapse"])
def test_the_planted_illness_ranks_first_and_is_severe(ill):
    report = examined(0, {ill: 1.0})
    assert not report.failed
    assert kinds(report)[0] == ill
    assert report.found[0].grade == "severe"


@pytest.mark.slow
def test_a_healthy_log_has_no_severe_finding():
    report = examined(0, {})
    assert not report.failed
    assert not [d for d in report.diagnoses if d.grade == "severe"]
