"""The check of calibration: its numbers against loops, silence on true probabilities, and every planted error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from healthkit import make_case, make_run, make_table, oracle, with_scores
from scipy.special import expit

from unbraid.calibrate import calibrate
from unbraid.calibration.density import Support
from unbraid.calibration.scaling import Temperature
from unbraid.diagnosis.calibration import (
    Calibrated,
    Cell,
    away_from_0,
    cells_of,
    log_ratio,
    log_slope,
    lost,
    reliability,
    widened,
)
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import Diagnosis, NotApplicable
from unbraid.evaluate import evaluate
from unbraid.schedules.online import Online
from unbraid.types import Task

CLICK = Task("click")


def cell(rows: int = 900, users: int = 120, seed: int = 0, slope: float = 1.0, weight: bool = True) -> Cell:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, users, rows)
    z = rng.normal(size=rows) + rng.normal(size=users)[group] - 1
    y = (rng.random(rows) < expit(slope * z)) + 0.0
    w = rng.choice([0.5, 1.0, 2.0], rows) if weight else np.ones(rows)
    return Cell(CLICK, "", expit(z), y, w, group, z)


# ------------------------------------------------------------------------------------------------------------- the numbers
def test_ratio_against_a_loop_over_users() -> None:
    c = cell()
    value, low, high = log_ratio(c)
    over, under = sum(c.w * c.p), sum(c.w * c.y)
    scores = []
    for user in set(c.group.tolist()):
        mine = c.group == user
        scores.append((sum((c.w * c.p)[mine]) / over - sum((c.w * c.y)[mine]) / under) / np.log(2))
    error = np.sqrt(np.sum(np.square(scores)))
    assert value == pytest.approx(np.log2(over / under), abs=1e-10)
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=1e-10)


def test_slope_against_newton_and_a_sandwich_by_hand() -> None:
    c = cell(rows=400, slope=2.0)
    beta, x = np.zeros(2), np.stack([c.z, np.ones(len(c.z))], 1)
    for _ in range(12):
        p = expit(x @ beta)
        hessian = sum(w * q * (1 - q) * np.outer(row, row) for w, q, row in zip(c.w, p, x, strict=True))
        beta = beta + np.linalg.solve(hessian, x.T @ (c.w * (c.y - p)))
    meat = np.zeros((2, 2))
    for user in set(c.group.tolist()):
        score = (x * (c.w * (c.y - p))[:, None])[c.group == user].sum(0)
        meat += np.outer(score, score)
    bread = np.linalg.inv(hessian)
    error = np.sqrt((bread @ meat @ bread)[0, 0]) / beta[0] / np.log(2)
    value, low, high = log_slope(c)  # type: ignore[misc]
    assert value == pytest.approx(np.log2(beta[0]), abs=1e-10)
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=1e-8)
    assert abs(2**value - 2) < 0.7


def test_a_slope_that_is_no_number() -> None:
    c = cell()
    assert log_slope(c._replace(z=-c.z * 3 + 10 * (c.y - 0.5) * -1)) is None  # upside down
    assert log_slope(c._replace(z=np.where(c.y > 0, 1.0, -1.0))) is None  # separated


def test_lost_rows_against_the_effective_sample_and_a_jackknife() -> None:
    rng = np.random.default_rng(0)
    users = rng.integers(0, 300, 2000)
    weights = np.exp(0.7 * rng.normal(size=300)[users] + 0.3 * rng.normal(size=2000))
    value, low, high = lost(weights, users)
    assert value == pytest.approx(1 - Support.of(weights).effective / 2000, abs=1e-10)
    left = np.array([(kept := weights[users != u]).mean() ** 2 / (kept**2).mean() for u in range(300)])
    error = np.sqrt(299 / 300 * ((left - left.mean()) ** 2).sum())
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_intervals_that_hold_together() -> None:
    assert widened((1.0, 0.5, 1.5), 1) == pytest.approx((1.0, 0.5, 1.5))
    assert widened((1.0, 0.0, 2.0), 5)[2] - 1 == pytest.approx(2.5758 / 1.95996, abs=1e-4)  # z of .005 over z of .025
    assert away_from_0((-0.5, -0.9, -0.1)) == (0.5, 0.1, 0.9)
    assert away_from_0((-0.1, -0.4, 0.2)) == (0.1, 0.0, 0.4)


def test_intervals_cover() -> None:
    """400 logs whose users differ: the ratio of the expectations, 1, lies in 95 % of the intervals."""
    hits = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        group = rng.integers(0, 150, 600)
        z = rng.normal(size=600) - 1.5 + rng.normal(size=150)[group]
        of_user = expit(z + rng.normal(size=150)[group])  # a taste that the prediction does not know
        y = (rng.random(600) < of_user) + 0.0
        p = expit(z / np.sqrt(1 + np.pi / 8))  # its mean over tastes, within 1 %
        _, low, high = log_ratio(Cell(CLICK, "", p, y, np.ones(600), group, z))
        hits += low <= 0 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_ten_healthy_domains_seldom_speak() -> None:
    """Of 300 calibrated tasks in ten domains of 60 rows, at most 5 % have a domain whose interval leaves the usual."""
    alarms, usual = 0, Calibrated().ratio[0]
    for seed in range(300):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=600)
        y, domain = (rng.random(600) < expit(z)) + 0.0, np.arange(600) % 10
        cells = [
            Cell(CLICK, str(d), expit(z[o]), y[o], np.ones(60), np.arange(60), z[o])
            for d in range(10)
            for o in [domain == d]
        ]
        alarms += any(away_from_0(widened(log_ratio(c), 10))[1] > usual for c in cells)
    assert alarms / 300 <= 0.05


def test_reliability_against_a_loop() -> None:
    c = cell()
    plot, cuts = reliability(c, 5), np.quantile(c.p, [0.2, 0.4, 0.6, 0.8])
    for place in range(5):
        rows = [i for i, p in enumerate(c.p) if sum(p >= cut for cut in cuts) == place]
        total = sum(c.w[rows])
        assert plot.predicted["click"][place] == pytest.approx(sum((c.w * c.p)[rows]) / total, abs=1e-10)
        assert plot.happened["click"][place] == pytest.approx(sum((c.w * c.y)[rows]) / total, abs=1e-10)
        assert plot.counts["click"][place] == len(rows)
        share = plot.happened["click"][place]
        assert plot.low["click"][place] < share < plot.high["click"][place]  # type: ignore[operator]


# ----------------------------------------------------------------------------------------------------------- on whole logs
@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, pl.DataFrame]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNBRAID_CACHE", str(tmp_path_factory.mktemp("cache")))
        table = make_table(12_000, 1500)
        return make_case(table), table


def planted(healthy: tuple[Case, pl.DataFrame], change: Any) -> dict[str, Diagnosis]:
    """Diagnoses by place, with the true logits of clicks changed: (logits, domain) -> logits."""
    case, table = healthy
    true = oracle(case, table)
    changed = replace(true, logits={**true.logits, "click": change(true.logits["click"], true.domain)})
    return {d.where: d for d in Calibrated()(with_scores(case, changed))}


def test_true_probabilities_are_silent(healthy: tuple[Case, pl.DataFrame]) -> None:
    found = planted(healthy, lambda z, domain: z)
    assert {"click", "buy", "click, domain home", "buy, domain mail", "click, slope", "buy, test rows"} <= set(found)
    assert [d.grade for d in found.values()] == ["none"] * len(found)


def test_a_shift_speaks_the_louder_the_larger_it_is(healthy: tuple[Case, pl.DataFrame]) -> None:
    values, grades = [], []
    for strength in (0.0, 0.4, 0.8, 1.6, 3.0):
        found = planted(healthy, lambda z, domain, s=strength: z - s)
        values.append(found["click"].value)
        grades.append(found["click"].grade)
        assert found["buy"].grade == "none"
    assert values == sorted(values) and grades[0] == "none" and grades[-1] == "severe" and len(set(grades)) >= 3
    assert "too low" in found["click"].reading
    assert found["click"].remedies[0].command == (
        "unbraid calibrate BUNDLE --method temperature --set intercept=true --task click"
    )
    assert found["click, domain home"].because == found["click, domain mail"].because == "calibration: click"


def test_predictions_that_are_too_sure_have_a_ratio_of_1_and_a_slope(healthy: tuple[Case, pl.DataFrame]) -> None:
    values = [planted(healthy, lambda z, domain, s=s: z * s)["click, slope"].value for s in (1.0, 1.5, 2.0, 3.0)]
    assert values == sorted(values)
    found = planted(healthy, lambda z, domain: 3 * z)
    assert found["click"].grade == "none" and found["click, slope"].grade == "severe"
    assert found["click, slope"].value == pytest.approx(np.log2(3), abs=0.15)
    assert "too sure" in found["click, slope"].reading
    assert "too timid" in planted(healthy, lambda z, domain: z / 3)["click, slope"].reading


def test_a_domain_of_its_own_speaks_alone(healthy: tuple[Case, pl.DataFrame]) -> None:
    mail = healthy[0].schema.domains.index("mail")
    found = planted(healthy, lambda z, domain: z - 2.0 * (domain == mail))
    assert found["click, domain mail"].grade in ("moderate", "severe") and found["click, domain home"].grade == "none"
    assert found["click, domain mail"].because == ""  # far from the ratio of all rows
    assert found["click, domain mail"].remedies[0].command.endswith("--task click --domain mail")


def test_evidence_is_what_evaluation_says(healthy: tuple[Case, pl.DataFrame]) -> None:
    found = planted(healthy, lambda z, domain: z - 1)
    case, _ = healthy
    told = evaluate(case.valid, case.schema, replicates=300)["click"]
    for where, own in (("click", told), ("click, domain mail", told["domains"]["mail"])):
        assert found[where].evidence["ratio"] == pytest.approx(own["calibration"]["value"], abs=1e-10)
        assert found[where].evidence["ece"] == pytest.approx(own["ece"]["value"], abs=1e-10)
        assert found[where].evidence["ece_mass"] == pytest.approx(own["ece_mass"]["value"], abs=1e-10)
        assert found[where].evidence["rows"] == own["rows"]
    bootstrap = np.log2([told["calibration"]["high"], told["calibration"]["low"]])
    ours = found["click"].high - found["click"].low  # type: ignore[operator]
    assert ours == pytest.approx(bootstrap[0] - bootstrap[1], rel=0.15)


def test_a_calibrated_bundle_is_judged_as_it_predicts(healthy: tuple[Case, pl.DataFrame]) -> None:
    case, table = healthy
    before = {d.where: d for d in Calibrated()(Case.of(case.bundle, tables={"log": table}))}
    bundle, _, _ = calibrate(case.bundle, Temperature(intercept=True), tables={"log": table})
    after = {d.where: d for d in Calibrated()(Case.of(bundle, tables={"log": table}))}
    assert before["click, slope"].value > 0.5  # four steps of training
    assert after["click"].value < 1e-6 and after["click, slope"].value < 1e-6


def test_rows_that_moved(healthy: tuple[Case, pl.DataFrame]) -> None:
    """Test rows move in x, the model stays: the validation rows count for less and less."""
    case, table = healthy
    values, grades = [], []
    for strength in (0.0, 1.0, 2.0, 4.0):
        moved = table.with_columns(x=pl.when(split="test").then(pl.col("x") + strength).otherwise("x"))
        found = {d.where: d for d in Calibrated()(Case.of(case.bundle, tables={"log": moved}))}
        values.append(found["click, test rows"].value)
        grades.append(found["click, test rows"].grade)
    assert values == sorted(values) and values[0] < 0.05
    assert grades[0] == "none" and grades[-1] in ("moderate", "severe")
    one = found["click, test rows"]
    assert one.evidence["effective rows"] == pytest.approx((1 - one.value) * one.evidence["rows"], abs=1e-6)


def test_a_domain_whose_labels_are_withheld_is_compared_with_the_others() -> None:
    table = make_table(6000)
    found = {d.where: d for d in Calibrated()(make_case(table, make_run(withhold="site = 'mail'")))}
    assert "click, domain mail" not in found and "click, test rows of domain mail" in found
    assert "click, test rows of domain home" not in found
    assert found["click, test rows of domain mail"].remedies[0].command.endswith("--task click --domain mail")


def test_classes() -> None:
    table = make_table(3000).with_columns(
        size=pl.when(pl.col("x") > 0.5)
        .then(pl.lit("L"))
        .when(pl.col("x") > -0.5)
        .then(pl.lit("M"))
        .otherwise(pl.lit("S"))
    )
    case = make_case(table, make_run(tasks=(Task("size", kind="multiclass"),)))
    (whole, *_) = cells_of(case.valid, case.schema.task("size"))
    z = case.valid.logits["size"].astype(float)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert whole.p == pytest.approx(p.max(1), abs=1e-6)
    assert whole.y.tolist() == (z.argmax(1) == case.valid.labels["size"]).astype(float).tolist()
    found = {d.where: d for d in Calibrated()(case)}
    assert found["size"].value == pytest.approx(abs(np.log2(whole.p.sum() / whole.y.sum())), abs=1e-10)
    assert "size, slope" not in found


def test_what_has_no_calibration() -> None:
    case = make_case(make_table(600), make_run(metric="rmse", tasks=(Task("x", kind="real"),)))
    with pytest.raises(NotApplicable, match="a number has no probability"):
        Calibrated()(case)
    case = make_case(make_table(600))
    seen = replace(case.bundle, run=replace(case.run, schedule=Online()))
    with pytest.raises(NotApplicable, match="trains on the validation rows"):
        Calibrated()(replace(case, bundle=seen))
