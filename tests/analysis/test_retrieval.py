"""NDCG of an order of the history against counted bits: by hand, against a plain loop, and its intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_fakes import FIELDS, Scorer, batch_of, random_batches, schema_of

from unbraid.analysis.correlation import Correlation, Truth
from unbraid.analysis.retrieval import ORDERS, Retrieval, plot
from unbraid.types import Batch

COUNT = Correlation("click", "seen", "category")


@pytest.fixture(scope="module")
def truth() -> Truth:
    return COUNT.count(schema_of(), random_batches(0, batches=8))


def probe_of(truth: Truth, **changes: Any) -> Retrieval:
    return replace(Retrieval(truth, rows=1, support=1, unsupported=6, at=4, replicates=50), **changes)


def slow(truth: Truth, score: Callable, batches: list[Batch], at: int) -> tuple[list, list]:
    """Curves and hits of every row with two events and a positive ideal, ranked in Python; scores must differ."""
    curves, hits = [], []
    for batch in batches:
        history = batch.features["seen"]
        for i in range(len(batch)):
            a = int(batch.features["item"][i])
            own = history.values["category"][history.offsets[i] : history.offsets[i + 1]].tolist()
            events = [(b, p) for p, b in enumerate(reversed(own), 1)]
            bits = {p: float(truth.bits(a, b, p)) for b, p in events}
            ideal = sorted(bits.values(), reverse=True)[:at]
            if len(events) < 2 or not sum(ideal) or not sum(truth.rows(a)):
                continue
            ranked = [bits[p] for b, p in sorted(events, key=lambda e: -score(a, *e))][:at]
            best = sum(x / log2(r + 1) for r, x in enumerate(ideal, 1))
            gains = [x / log2(r + 1) / best for r, x in enumerate(ranked, 1)] + [0.0] * (at - len(ranked))
            curves.append(np.cumsum(gains))
            hits.append(sum(x >= ideal[-1] for x in ranked))
    return curves, hits


# -------------------------------------------------------------------------------------------------------------- by hand
def by_hand() -> tuple[Truth, Batch]:
    """Bits of target 4 and behaviours 5, 6, 7 wherever they stand: as three different counts; a history of all three."""
    totals = np.zeros((8, 2), np.int64)
    totals[4] = 500, 500
    cells = np.array([(4 * 8 + b) * 6 + p for b in (5, 6, 7) for p in range(3)])
    counts = np.repeat([[100, 400], [100, 300], [100, 200]], 3, 0)
    return Truth("click", "seen", "category", "item", 6, totals, cells, counts), batch_of([4], [1], [[7, 5, 6]])


def test_by_hand() -> None:
    truth, batch = by_hand()
    x, y, z = (float(truth.bits(4, b, 1)) for b in (5, 6, 7))
    assert x > y > z > 0
    found = Retrieval(truth, at=2, replicates=0)(
        Scorer(lambda a, b, p: (b == 6) * 2 + (b == 7)), schema_of(), [batch]
    ).values
    ideal = x + y / log2(3)
    assert np.allclose(found["learned"], [y / ideal, (y + z / log2(3)) / ideal])
    assert np.allclose(found["newest"], [y / ideal, (y + x / log2(3)) / ideal])  # oldest first: 7, 5, 6
    mean = (x + y + z) / 3
    assert np.allclose(found["random"], [mean / ideal, (mean + mean / log2(3)) / ideal])
    assert [found[f"{name}_hits"][0] for name in ORDERS] == pytest.approx([1, 2, 4 / 3])
    assert found["learned_minus_newest"][0] == pytest.approx(found["learned"][1] - found["newest"][1])
    assert found["learned_minus_random"][0] == pytest.approx(found["learned"][1] - found["random"][1])
    assert found["learned_ndcg"] == [pytest.approx(found["learned"][1]), None, None]
    assert (found["rows"], found["users"], found["seen"]) == (1, 1, 1)


def test_equal_scores_give_the_mean_over_orders() -> None:
    truth, batch = by_hand()
    x, y, z = (float(truth.bits(4, b, 1)) for b in (5, 6, 7))
    found = Retrieval(truth, at=2, replicates=0)(Scorer(lambda a, b, p: b == 5), schema_of(), [batch]).values
    assert np.allclose(found["learned"] * (x + y / log2(3)), [x, x + (y + z) / 2 / log2(3)])
    assert found["learned_hits"][0] == pytest.approx(1.5)


# ------------------------------------------------------------------------------------------------------------ many rows
def test_the_order_of_the_truth_is_ideal(truth: Truth) -> None:
    found = probe_of(truth)(Scorer(truth.bits), schema_of(), random_batches(5)).values
    assert found["rows"] > 50 and found["learned_ndcg"][0] == pytest.approx(1, abs=1e-12)
    assert found["learned_ndcg"][1:] == pytest.approx([1, 1]) and found["learned"][0] < 1
    assert found["learned_minus_newest"][0] > 0.05
    worst = probe_of(truth)(Scorer(lambda *e: -truth.bits(*e)), schema_of(), random_batches(5)).values
    assert worst["learned_ndcg"][0] < worst["random_ndcg"][0] < 1


@pytest.mark.parametrize("at", [1, 4, 9])
def test_curves_are_those_of_a_loop(truth: Truth, at: int) -> None:
    def score(a: Any, b: Any, p: Any) -> Any:
        return np.sin(3.0 * a + 5.0 * b + 7.3 * p)

    batches = random_batches(5)
    model = Scorer(score).train()
    found = probe_of(truth, at=at, unsupported=99)(model, schema_of(), iter(batches)).values
    curves, hits = slow(truth, score, batches, at)
    assert found["rows"] == len(curves) > 50 and found["seen"] == 240
    assert np.allclose(found["learned"], np.mean(curves, 0), atol=1e-12)
    assert found["learned_hits"][0] == pytest.approx(np.mean(hits))
    newest, hits = slow(truth, lambda a, b, p: -p, batches, at)
    assert np.allclose(found["newest"], np.mean(newest, 0), atol=1e-12)
    assert found["newest_hits"][0] == pytest.approx(np.mean(hits))
    assert model.training and model.asked[0] == ("seen", {"category", "position"}, {"user", "item"}, None, FIELDS)


def test_a_random_order_is_the_mean_over_draws(truth: Truth) -> None:
    batches, rng = random_batches(5), np.random.default_rng(0)
    found = probe_of(truth)(Scorer(lambda a, b, p: rng.random(len(a))), schema_of(), batches).values
    draws = [
        probe_of(truth, replicates=0)(Scorer(lambda a, b, p: rng.random(len(a))), schema_of(), batches).values
        for _ in range(60)
    ]
    near = 4 * np.std([d["learned_ndcg"][0] for d in draws]) / np.sqrt(60)
    assert abs(np.mean([d["learned_ndcg"][0] for d in draws]) - found["random_ndcg"][0]) < near < 0.05
    assert np.mean([d["learned_hits"][0] for d in draws]) == pytest.approx(found["random_hits"][0], abs=0.05)


def test_batches_may_be_cut_anywhere(truth: Truth) -> None:
    whole = random_batches(5, batches=1, rows=50)
    parts = [whole[0].select(torch.tensor(part)) for part in (range(20), range(20, 21), range(21, 50))]
    model = Scorer(lambda a, b, p: np.cos(b * p))
    one, several = (probe_of(truth)(model, schema_of(), b).values for b in (whole, parts))
    assert one["learned_ndcg"] == pytest.approx(several["learned_ndcg"]) and one["left_out"] == several["left_out"]


# ------------------------------------------------------------------------------------------------------- rows that count
def test_rows_that_the_truth_cannot_judge_are_left_out() -> None:
    truth, _ = by_hand()
    rows = batch_of(
        [4, 3, 4, 4, 4, 4], [1] * 6,
        [[7, 5, 6], [7, 5, 6], [5], [2, 7, 6], [2, 2, 5, 6], [0, 2]], view=[0, 0, 0, 0, 0, 0],
    )  # fmt: skip
    model = Scorer(lambda a, b, p: -p)
    found = Retrieval(truth, unsupported=1, at=2, replicates=0)(model, schema_of(), [rows]).values
    assert found["rows"] == 2
    want = {"target is rare": 1, "few events": 1, "events are unsupported": 2, "no event is informative": 0}
    assert found["left_out"] == want
    loose = Retrieval(truth, unsupported=2, events=1, at=2, replicates=0)(model, schema_of(), [rows]).values
    assert loose["rows"] == 4 and loose["left_out"]["no event is informative"] == 1
    strong = batch_of([4, 4], [1, 1], [[7, 5, 6], [7, 5, 6]], view=[0, 1])
    assert Retrieval(truth, at=2, replicates=0)(model, schema_of(), [strong]).values["rows"] == 1
    for changes, reason in (
        ({"rows": 1001}, "target is rare"),
        ({"support": 101, "unsupported": 0}, "events are unsupported"),
    ):
        none = replace(Retrieval(truth), **changes)(model, schema_of(), [strong])
        assert none.values["rows"] == 0 and none.values["left_out"][reason] == 1 and reason in none.reading
    enough = replace(Retrieval(truth), rows=1000, support=100, unsupported=0, at=2)(model, schema_of(), [strong])
    assert enough.values["rows"] == 1
    with pytest.raises(ValueError, match="target is rare"):
        plot(replace(Retrieval(truth), rows=1001)(model, schema_of(), [strong]))


def test_support_is_asked_of_both_labels() -> None:
    truth, batch = by_hand()
    flipped = replace(truth, totals=truth.totals[:, ::-1], counts=truth.counts[:, ::-1])
    for each in (truth, flipped):
        found = Retrieval(each, support=150, unsupported=0, replicates=0)(
            Scorer(lambda a, b, p: p), schema_of(), [batch]
        )
        assert found.values["rows"] == 0


@pytest.mark.parametrize("name", ["rows", "at", "events", "support", "unsupported", "confidence"])
def test_settings_are_checked(name: str) -> None:
    for value in (-1, 1.0 if name == "confidence" else -2):
        with pytest.raises(ValueError, match=name):
            Retrieval(by_hand()[0], **{name: value})


# ------------------------------------------------------------------------------------------------------------ intervals
def test_intervals_are_over_users(truth: Truth) -> None:
    batches, model = random_batches(5, batches=8), Scorer(lambda a, b, p: np.cos(3 * b + p))
    found = probe_of(truth, replicates=400)(model, schema_of(), batches).values
    assert found["users"] == 9
    value, low, high = found["learned_ndcg"]
    assert low < value < high and found["learned_low"][-1] == low and found["learned_high"][-1] == high
    half = probe_of(truth, replicates=400, confidence=0.5)(model, schema_of(), batches).values["learned_ndcg"]
    assert half[0] == value and half[2] - half[1] < 0.6 * (high - low)
    alone = [replace(b, meta={}) for b in batches]
    rows = probe_of(truth, replicates=400)(model, schema_of(), alone).values
    assert rows["users"] == rows["rows"] and rows["learned_ndcg"][0] == pytest.approx(value)
    same = probe_of(truth, replicates=400)(model, schema_of(), batches).values
    assert same["learned_ndcg"] == found["learned_ndcg"]
    doubled = [replace(b, meta={"user": torch.zeros(len(b), dtype=torch.int64)}) for b in batches]
    one = probe_of(truth)(model, schema_of(), doubled)
    assert one.values["learned_ndcg"][1:] == [None, None] and "[none, none]" in one.reading


def test_differences_are_paired(truth: Truth) -> None:
    found = probe_of(truth)(Scorer(lambda a, b, p: -p), schema_of(), random_batches(5)).values
    assert found["learned_minus_newest"] == [0, 0, 0]
    assert found["learned_ndcg"] == found["newest_ndcg"]


# ----------------------------------------------------------------------------------------------------------------- plot
def test_the_plot_is_written(truth: Truth, tmp_path: Path) -> None:
    found = probe_of(truth)(Scorer(truth.bits), schema_of(), random_batches(5))
    drawn = plot(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    (axis,) = drawn.axes
    assert "1.000" in axis.get_title() and "NDCG@4" in axis.get_title() and axis.get_xlabel() and axis.get_ylabel()
    assert [line.get_ydata()[-1] for line in axis.lines[:3]] == [found.values[name][-1] for name in ORDERS]
    assert "1.000 [1.000, 1.000]" in found.reading and "newest first" in found.reading
    rows, seen = found.values["rows"], found.values["seen"]
    assert rows < seen and f"Over {rows} rows ({rows / seen:.0%} of {seen})" in found.reading
    legend = axis.get_legend()
    assert "shaded: 95% intervals" in legend.get_title().get_text()
    assert [text.get_text() for text in legend.get_texts()][-1] == "ideal order: 1"
    ideal = axis.lines[-1]
    assert (ideal.get_xdata()[-1], ideal.get_ydata()[-1]) == (4, 1) and ideal.get_linestyle() == "None"
    drawn.canvas.draw()
    inside, beside = axis.get_window_extent(), legend.get_window_extent()
    assert beside.x0 > inside.x1, "the legend covers no curve"
