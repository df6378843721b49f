"""Transfer measures: published numbers, definitions against loops, planted help and harm, the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from unbraid.analysis import transfer
from unbraid.analysis.transfer import (
    Transfer,
    confidence_discrepancy,
    delta_m,
    negative_transfer,
    transfer_gain,
)  # fmt: skip
from unbraid.types import Schema, Scores, Task

SCHEMA = Schema(
    (), (Task("click"), Task("spend", kind="real"), Task("size", kind="multiclass")), domains=("", "", "all")
)


# ------------------------------------------------------------------------------------------------------------ the numbers
NAMES = {"seg": ("miou", "pixels"), "depth": ("abs", "rel"), "normal": ("mean", "median", "a11", "a22", "a30")}
LOWER = ("abs", "rel", "mean", "median")


def tasks_of(*values: tuple[float, ...]) -> dict[str, dict[str, float]]:
    return {task: dict(zip(names, row, strict=True)) for (task, names), row in zip(NAMES.items(), values, strict=True)}


ALONE = tasks_of((51.42, 74.14), (41.74, 17.37), (22.82, 16.23, 36.58, 62.75, 73.52))


@pytest.mark.parametrize(
    ("values", "published"),  # of NYUv2, in per cent
    [
        (((53.67, 75.64), (38.91, 16.47), (22.18, 15.60, 37.93, 64.29, 74.81)), 4.03),
        (((52.13, 74.51), (39.03, 16.43), (24.14, 17.62, 33.98, 59.63, 70.93)), 0.30),
    ],
)
def test_delta_m_is_the_published_one(values: Any, published: float) -> None:
    assert 100 * delta_m(tasks_of(*values), ALONE, LOWER) == pytest.approx(published, abs=0.005)
    flat = [(m - b) / b * (-1 if n in LOWER else 1) for row, (task, names) in zip(values, NAMES.items(), strict=True)
            for m, n, b in zip(row, names, ALONE[task].values(), strict=True)]  # fmt: skip
    assert abs(100 * np.mean(flat) - published) > 0.05, "metrics are averaged inside a task first"


def test_delta_m_knows_which_metrics_fall() -> None:
    alone = {"click": {"auc": 0.8, "logloss": 0.5}, "spend": {"rmse": 2.0}}
    better = {"click": {"auc": 0.88, "logloss": 0.4}, "spend": {"rmse": 1.0}}
    assert delta_m(better, alone) == pytest.approx(((0.1 + 0.2) / 2 + 0.5) / 2)
    assert delta_m(alone, alone) == 0
    named = delta_m(better, alone, ("spend.rmse",))
    assert named == pytest.approx(((0.1 - 0.2) / 2 + 0.5) / 2), "only the one that was named falls"
    for method, base, lower, words in (
        ({"click": {"auc": 1.0}}, alone, None, "Both sides should have the same tasks and metrics"),
        ({}, {}, None, "at least one"),
        ({"a": {"x": 1.0}}, {"a": {"x": 0.0}}, None, "`x` of `a` should be finite, and not 0 alone"),
        ({"a": {"x": np.nan}}, {"a": {"x": 1.0}}, None, "should be finite"),
        ({"a": {"x": 1.0}}, {"a": {"x": 1.0}}, ("y",), "`lower` should name metrics among .'x'.. Found .'y'"),
    ):
        with pytest.raises(ValueError, match=words):
            delta_m(method, base, lower)


def test_gains_and_what_a_grid_says() -> None:
    assert transfer_gain(0.7, 0.6) == pytest.approx(0.1) and transfer_gain(0.7, 0.6, lower=True) == pytest.approx(-0.1)
    mixed = negative_transfer({0.0: 0.0, 0.5: 0.02, 1.0: 0.02, 2.0: -0.1, 4.0: -0.2})
    assert (mixed.best, mixed.gain, mixed.weak, mixed.strong) == (0.5, 0.02, (2.0, 4.0), False)
    harm = negative_transfer({0.0: 5.0, 1.0: -0.2, 0.5: -0.1})
    assert (harm.best, harm.gain, harm.weak, harm.strong) == (0.5, -0.1, (0.5, 1.0), True), "weight 0 does not count"
    assert negative_transfer({1.0: 0.0}).weak == () and not negative_transfer({1.0: 0.0}).strong
    for gains, words in (
        ({0.0: 1.0}, "one above 0"),
        ({-1.0: 1.0, 1.0: 1.0}, "not be negative"),
        ({1.0: np.nan}, "finite.*1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            negative_transfer(gains)


@pytest.mark.parametrize("classes", [1, 2, 3, 7])
def test_confidence_discrepancy(classes: int) -> None:
    z = np.random.default_rng(0).normal(size=(50, classes)) * 3
    total = 0.0
    for row in z:
        p = [1 / (1 + np.exp(-row[0])), 1 / (1 + np.exp(row[0]))] if classes == 1 else np.exp(row) / np.exp(row).sum()
        total += max(p)
    logits = z[:, 0] if classes == 1 else z
    assert confidence_discrepancy(logits) == pytest.approx(1 - total / 50, abs=1e-12)
    most = 1 - 1 / max(classes, 2)
    assert confidence_discrepancy(0 * logits) == pytest.approx(most) and confidence_discrepancy(1e4 * logits) < 0.01
    with pytest.raises(ValueError, match="Logits should be finite, of at least one row"):
        confidence_discrepancy(logits[:0])
    with pytest.raises(ValueError, match="should be finite"):
        confidence_discrepancy(np.full(3, np.inf))


# ----------------------------------------------------------------------------------------------------- trained on a grid
def planted(noise: float, seed: int, rows: int = 2000, users: int = 200) -> Scores:
    """Predictions that know the label's logit up to noise; rows and labels are the same for every noise and seed."""
    rng = np.random.default_rng(7)
    truth, user = rng.normal(size=rows), rng.integers(0, users, rows)
    click = (rng.random(rows) < 1 / (1 + np.exp(-2 * truth))).astype(np.float32)
    own = np.random.default_rng(seed).normal(size=(rows, 3))
    labels = {"click": click, "spend": truth, "size": rng.integers(0, 3, rows)}
    logits = {"click": 2 * truth + noise * own[:, 0], "spend": truth + noise * own[:, 1], "size": own}
    observed = {"click": rng.random(rows) < 0.9, "spend": np.ones(rows, bool), "size": np.ones(rows, bool)}
    return Scores(logits, {}, labels, observed, np.full(rows, 2), None, user, np.arange(rows), ("", "", "all"))


def grid(*noises: float) -> dict[float, Scores]:
    return {2.0**n: planted(noise, 10 + n) for n, noise in enumerate(noises)}


def test_gain_and_discrepancy_are_those_of_the_predictions() -> None:
    alone, together = planted(1.0, 0), grid(0.3, 0.5, 4.0)
    values = Transfer("click")(together, alone, SCHEMA).values
    known = alone.observed["click"]

    def auc(scores: Scores) -> float:
        return float(roc_auc_score(scores.labels["click"][known], scores.logits["click"][known]))

    assert values["metric"] == "auc" and values["weights"].tolist() == [1.0, 2.0, 4.0]
    want = [auc(scores) - auc(alone) for scores in together.values()]
    assert values["gain"] == pytest.approx(want, abs=1e-9) and values["alone"] == pytest.approx(auc(alone), abs=1e-9)
    assert values["csd"] == pytest.approx([confidence_discrepancy(s.logits["click"]) for s in together.values()])
    assert values["best"] == 1.0 and values["weak"] == (4.0,) and not values["strong"]
    assert ((values["low"] < values["gain"]) & (values["gain"] < values["high"])).all()
    assert values["low"][0] > 0 > values["high"][2], "help and harm are beyond chance"

    falls = Transfer("click", metric="logloss")(together, alone, SCHEMA).values

    def loss(s: Scores) -> float:
        return float(log_loss(s.labels["click"][known], 1 / (1 + np.exp(-s.logits["click"][known]))))

    assert falls["gain"] == pytest.approx([loss(alone) - loss(s) for s in together.values()], abs=1e-6)
    assert falls["score"] == pytest.approx([loss(s) for s in together.values()], abs=1e-6), "as it is, not negated"


def test_strong_negative_transfer_is_said_of_the_grid() -> None:
    found = Transfer("spend")(grid(2.0, 3.0), planted(0.5, 0), SCHEMA)
    assert (
        found.values["strong"]
        and found.values["weak"] == (1.0, 2.0)
        and "strong negative transfer on this grid" in found.reading
    )
    assert found.values["csd"] is None and found.values["metric"] == "rmse"
    weak = Transfer("spend")(grid(0.1, 3.0), planted(0.5, 0), SCHEMA)
    assert "1 of 2 weights harm" in weak.reading
    none = Transfer("spend")(grid(0.1), planted(0.5, 0), SCHEMA)
    assert "no weight of 1 harms" in none.reading


def test_equal_predictions_have_no_gain_and_no_interval() -> None:
    values = Transfer("click")({1.0: planted(1.0, 0)}, planted(1.0, 0), SCHEMA).values
    assert values["gain"] == values["low"] == values["high"] == 0


def test_mistakes() -> None:
    alone, other = planted(1.0, 0), planted(0.5, 1)
    moved = replace(other, row=other.row[::-1].copy())
    relabelled = replace(other, labels={**other.labels, "click": 1 - other.labels["click"]})
    for probe, scores, words in (
        (Transfer("click"), moved, "of the same rows"),
        (Transfer("click"), relabelled, "Labels of task `click` differ"),
        (Transfer("click", metric="rmse"), other, "no metric `rmse` with a better side. Metrics: auc"),
        (Transfer("click", metric="calibration"), other, "no metric `calibration`"),
        (Transfer("buy"), other, "There is no task `buy`"),
    ):
        with pytest.raises(ValueError, match=words):
            probe({1.0: scores}, alone, SCHEMA)
    for change, words in (
        ({"confidence": 1.0}, "`confidence` should lie"),
        ({"replicates": -1}, "`replicates` should not"),
    ):
        with pytest.raises(ValueError, match=words):
            Transfer("click", **change)
    few = replace(alone, observed={**alone.observed, "click": np.arange(2000) < 5})
    with pytest.raises(ValueError, match="`auc` of `click` is withheld"):
        Transfer("click")({1.0: few}, few, SCHEMA)


def test_the_figure(tmp_path: Path) -> None:
    found = Transfer("click", replicates=50)(grid(0.3, 0.5, 4.0), planted(1.0, 0), SCHEMA)
    drawn = transfer.plot(found, tmp_path / "grid.png")
    gain, csd = drawn.axes
    assert (tmp_path / "grid.png").stat().st_size > 5_000
    assert gain.lines[0].get_ydata() == pytest.approx(found.values["gain"])
    assert csd.lines[0].get_ydata() == pytest.approx(found.values["csd"]) and "never alone" in csd.get_title()
    real = Transfer("spend", replicates=0)(grid(2.0), planted(0.5, 0), SCHEMA)
    (only,) = transfer.plot(real).axes
    assert "strong on this grid" in only.get_title()
