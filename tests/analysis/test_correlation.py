"""Counts and mutual information against a plain loop; the learned grid; the plot."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_fakes import FIELDS, Scorer, batch_of, random_batches, schema_of

from unbraid.analysis import correlation
from unbraid.analysis.correlation import Correlation, Truth, information, most_frequent, plot, score_grid
from unbraid.analysis.plots import shortened
from unbraid.encoders.pooling import MeanHistory
from unbraid.encoders.table import Views
from unbraid.model import Model
from unbraid.towers.mlp import SharedBottom
from unbraid.types import FIRST_VALUE, Batch

PROBE = Correlation("click", "seen", "category", behaviours=4, newest=3, least=1)


def slow_counts(batches: list[Batch], positions: int) -> tuple[dict, dict]:
    """(a, label) -> rows and (a, b, p, label) -> rows, event by event."""
    rows: dict[Any, int] = {}
    cells: dict[Any, int] = {}
    for batch in batches:
        history = batch.features["seen"]
        for i in range(len(batch)):
            a, y = int(batch.features["item"][i]), int(batch.labels["click"][i])
            if not batch.observed["click"][i] or a < FIRST_VALUE:
                continue
            rows[a, y] = rows.get((a, y), 0) + 1
            own = history.values["category"][history.offsets[i] : history.offsets[i + 1]].tolist()
            for p, b in enumerate(reversed(own), 1):
                if b >= FIRST_VALUE and p <= positions:
                    cells[a, b, p, y] = cells.get((a, b, p, y), 0) + 1
    return rows, cells


def slow_bits(t_p: float, t_n: float, x_p: float, x_n: float) -> float:
    """Four cells, written out."""
    s, x = t_p + t_n, x_p + x_n
    total = 0.0
    for n, across, down in ((x_p, x, t_p), (x_n, x, t_n), (t_p - x_p, s - x, t_p), (t_n - x_n, s - x, t_n)):
        if n > 0:
            total += n / s * math.log2(n * s / (across * down))
    return total


def truth_of(t_p: int, t_n: int, x_p: int, x_n: int, zero: Any = "exact") -> Truth:
    """One cell: target 2, behaviour 3, position 1."""
    totals = np.zeros((5, 2), np.int64)
    totals[2] = t_n, t_p
    cells = np.array([(2 * 5 + 3) * 4 + 0])
    return Truth("click", "seen", "category", "item", 4, totals, cells, np.array([[x_n, x_p]]), zero)


# ----------------------------------------------------------------------------------------------------------------- bits
def test_the_papers_example() -> None:
    assert truth_of(100, 200, 50, 20).bits(2, 3, 1) == pytest.approx(0.1378, abs=5e-5)


@pytest.mark.parametrize(
    ("rows", "shares"), [((300, 700), (0.2, 0.8)), ((12, 24), (0.25, 0.75)), ((10**9, 10**9), (0.1, 0.9))]
)
def test_independent_counts_tell_nothing(rows: tuple, shares: tuple) -> None:
    t_p, t_n = rows
    assert truth_of(t_p, t_n, int(t_p * shares[0]), int(t_n * shares[0])).bits(2, 3, 1) < 1e-9


def test_a_copy_of_a_balanced_label_tells_one_bit() -> None:
    assert truth_of(64, 64, 64, 0).bits(2, 3, 1) == 1.0
    assert truth_of(64, 64, 0, 64).bits(2, 3, 1) == 1.0


def test_many_values_of_both() -> None:
    assert information(np.eye(8) * 5) == pytest.approx(3)
    assert information(np.ones((4, 3))) == 0
    assert np.array_equal(information(np.zeros((2, 3, 2))), np.zeros(2))
    assert np.allclose(information(np.stack([np.eye(2), np.ones((2, 2))])), [1, 0])


@pytest.mark.parametrize(("x_p", "x_n"), [(0, 12), (9, 0), (0, 0)])
def test_zero_counts(x_p: int, x_n: int) -> None:
    exact, paper = (truth_of(100, 200, x_p, x_n, zero).bits(2, 3, 1) for zero in ("exact", "paper"))
    assert exact == pytest.approx(slow_bits(100, 200, x_p, x_n), abs=1e-14)
    assert paper == pytest.approx(slow_bits(100, 200, x_p or 1e-5, x_n or 1e-5), abs=1e-14)
    assert exact != paper and abs(exact - paper) < 1e-5


def test_zero_counts_of_a_label_that_never_comes() -> None:
    assert truth_of(0, 200, 0, 20, "paper").bits(2, 3, 1) == 0


# --------------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize("positions", [None, 3])
@pytest.mark.parametrize("pending", [1, 2**20])
def test_counts_are_those_of_a_loop(positions: int | None, pending: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlation, "PENDING", pending)
    batches = random_batches(1)
    truth = replace(PROBE, positions=positions).count(schema_of(), iter(batches))
    rows, cells = slow_counts(batches, positions or 6)
    a, b, p = np.meshgrid(np.arange(8), np.arange(8), np.arange(1, 7), indexing="ij")
    (t_p, t_n), (x_p, x_n), bits = truth.rows(a), truth.support(a, b, p), truth.bits(a, b, p)
    seen = 0
    for at in np.ndindex(a.shape):
        i, j, k = int(a[at]), int(b[at]), int(p[at])
        want = rows.get((i, 1), 0), rows.get((i, 0), 0), cells.get((i, j, k, 1), 0), cells.get((i, j, k, 0), 0)
        assert (t_p[at], t_n[at], x_p[at], x_n[at]) == want
        assert bits[at] == pytest.approx(slow_bits(*want) if want[0] + want[1] else 0, abs=1e-12)
        seen += want[2] + want[3]
    assert seen == truth.counts.sum() == sum(cells.values()) > 100
    assert np.array_equal(truth.grid(4, [5, 3], [2, 1]), bits[4][[5, 3]][:, [1, 0]])
    assert (np.diff(truth.cells) > 0).all()


def test_lookups_broadcast_and_nothing_outside_is_found() -> None:
    truth = PROBE.count(schema_of(), random_batches(1))
    assert truth.bits(4, np.arange(2, 8)[:, None], np.arange(1, 4)[None]).shape == (6, 3)
    for a, b, p in ((-1, 3, 1), (8, 3, 1), (4, 8, 1), (4, -1, 1), (4, 3, 0), (4, 3, 7), (4, 2, -5)):
        assert truth.support(a, b, p) == (0, 0)
    for b in (-1, 10):  # its cell would be that of another target
        assert not np.any(truth.support(np.arange(8)[:, None], b, np.arange(1, 7)))
    assert truth.rows(8) == (0, 0) and truth.rows(-1) == (0, 0)
    empty = PROBE.count(schema_of(), [])
    assert empty.bits(4, 3, 1) == 0 and not len(empty.targets) and not len(empty.behaviours(4)[0])


def test_what_is_not_counted() -> None:
    batch = batch_of([4] * 4, [1, 0, 1, 1], [[3], [3], [3], [3]], observed=[True, True, False, True], view=[0, 0, 0, 1])
    truth = PROBE.count(schema_of(), [batch])
    assert truth.rows(4) == (1, 1) and truth.support(4, 3, 1) == (1, 1)


def test_position_one_is_the_newest() -> None:
    truth = PROBE.count(schema_of(), [batch_of([4, 4], [1, 0], [[3, 5, 6], []])])
    assert [int(truth.support(4, b, p)[0]) for b, p in ((6, 1), (5, 2), (3, 3), (3, 1))] == [1, 1, 1, 0]


def test_only_the_wanted_targets() -> None:
    batches = random_batches(2)
    full = PROBE.count(schema_of(), batches)
    targets = most_frequent(iter(batches), "click", "item", 2)
    assert targets == tuple(full.targets[:2]) and min(targets) >= FIRST_VALUE
    few = replace(PROBE, targets=targets).count(schema_of(), batches)
    assert sorted(few.targets) == sorted(targets) and len(few.cells) < len(full.cells)
    for a in targets:
        assert np.array_equal(few.grid(a, range(8), range(1, 7)), full.grid(a, range(8), range(1, 7)))


def test_behaviours_come_by_frequency() -> None:
    batch = batch_of([4, 4, 2], [1, 0, 1], [[5, 3, 3], [6, 3, 3], [7, 7, 7]])
    truth = PROBE.count(schema_of(), [batch])
    ids, often = truth.behaviours(4)
    assert ids.tolist() == [3, 5, 6] and often.tolist() == [4, 1, 1]
    assert truth.behaviours(4, 2)[0].tolist() == [3] and truth.behaviours(2)[1].tolist() == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "spend"}, "binary"),
        ({"history": "sene"}, "no event field `category` in a history `sene`. Found seen: category, position"),
        ({"field": "city"}, "no event field `city`"),
        ({"field": "position"}, "vocabulary `position`"),
        ({"feature": "user"}, "Found `user`; fitting are: item"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PROBE, **changes).count(schema_of(), [])


@pytest.mark.parametrize("changes", [{"newest": 0}, {"behaviours": 0}, {"least": 0}, {"positions": 0}])
def test_sizes_are_positive(changes: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(PROBE, **changes)


def test_more_cells_than_numbers() -> None:
    schema = replace(schema_of(), sizes={"kind": 2**31})
    with pytest.raises(ValueError, match="64 bits"):
        PROBE.count(schema, [])


# -------------------------------------------------------------------------------------------------------------- finding
def test_a_model_that_knows_the_truth_has_correlation_one() -> None:
    batches = random_batches(3, batches=8)
    truth = PROBE.count(schema_of(), batches)
    model = Scorer(lambda a, b, p: 3 * truth.bits(a, b, p)).train()
    found = PROBE(model, schema_of(), iter(batches))
    assert model.training and model.asked == [("seen", {"category", "position"}, {"user", "item"}, None, FIELDS)]
    values = found.values
    target = int(truth.targets[0])
    assert values["target"] == target and values["rows"] == truth.totals[target].sum()
    assert values["positives"] == truth.totals[target, 1]
    assert values["behaviours"].tolist() == truth.behaviours(target, 3)[0][:4].tolist()
    assert values["positions"].tolist() == [1, 2, 3]
    assert np.array_equal(values["truth"], truth.grid(target, values["behaviours"], [1, 2, 3]))
    assert np.allclose(values["scores"], 3 * values["truth"]) and values["spearman"] == pytest.approx(1)
    raised = np.exp(values["scores"])
    assert np.allclose(values["learned"], (raised - raised.min()) / (raised.max() - raised.min()))
    assert "1.00" in found.reading and f"target {target}" in found.reading
    opposite = PROBE(Scorer(lambda a, b, p: -truth.bits(a, b, p)), schema_of(), batches)
    assert opposite.values["spearman"] == pytest.approx(-1)


def test_only_supported_cells_are_compared() -> None:
    batches = random_batches(3, batches=40)
    probe = replace(PROBE, least=8, target=4, newest=6, behaviours=6, view="of_click", fields=("category",))
    truth = probe.count(schema_of(), batches)
    full = np.minimum(*truth.support(4, np.arange(2, 8)[:, None], np.arange(1, 7)[None])) >= 8
    assert 3 <= full.sum() < full.size
    model = Scorer(lambda a, b, p: np.where(np.minimum(*truth.support(a, b, p)) >= 8, truth.bits(a, b, p), 9 * p))
    found = probe(model, schema_of(), batches)
    assert found.values["cells"] == full.sum() == found.values["supported"].sum()
    assert found.values["spearman"] == pytest.approx(1) and model.asked[0][3:] == ("of_click", ("category",))


def test_where_there_is_no_correlation() -> None:
    batches = random_batches(3)
    for probe, score, why in (
        (replace(PROBE, least=500), lambda a, b, p: b, "0 cells"),
        (PROBE, lambda a, b, p: 0 * b, "attention scores of all cells are equal"),
    ):
        found = probe(Scorer(score), schema_of(), batches)
        assert found.values["spearman"] is None and why in found.values["why"] and why in found.reading
    assert (found.values["learned"] == 0).all()
    with pytest.raises(ValueError, match="target 99"):
        replace(PROBE, target=99)(Scorer(lambda a, b, p: b), schema_of(), batches)
    with pytest.raises(ValueError, match="target None"):
        PROBE(Scorer(lambda a, b, p: b), schema_of(), [])


def test_the_position_is_read_where_the_history_has_it() -> None:
    model = Scorer(lambda a, b, p: b)
    PROBE(model, schema_of(fields=("category",)), random_batches(3))
    assert model.asked[0][4] == ("category",)


class Product:
    """The plainest encoder that scores events by single fields; its `Model` is the real one."""

    kind = "product"

    def build(self, widths: dict, targets: dict) -> Any:
        module = MeanHistory(widths, count=False)
        module.scores = lambda read, events, query, fields: sum(
            (read["value"][n].gather() * query["value"][n][events.rows]).sum(1)
            if n in query["value"]
            else read["value"][n].gather()[:, 0]
            for n in fields
        )
        return module


def test_a_real_model_is_asked_for_events_that_exist_nowhere() -> None:
    schema = schema_of(fields=("city", "category", "position"))
    torch.manual_seed(0)
    model = Model(schema, SharedBottom(), Views(width=4, std=1.0), history=Product())
    truth = PROBE.count(schema_of(), random_batches(3))
    (kind,) = [t.weight for name, t in model.tables.items() if "kind" in name]
    (position,) = [t.weight for name, t in model.tables.items() if "position" in name]
    got = score_grid(model, schema, truth, 4, np.array([5, 3]), np.array([1, 6]), ("category", "position"))
    want = (kind[[5, 3]] @ kind[4])[:, None] + position[[2, 7], 0]
    assert np.allclose(got, want.detach().numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="MeanHistory"):
        PROBE(Model(schema, SharedBottom()), schema, random_batches(3))


# ----------------------------------------------------------------------------------------------------------------- plot
def test_the_plot_is_written(tmp_path: Path) -> None:
    found = replace(PROBE, least=5)(Scorer(lambda a, b, p: b - p), schema_of(), random_batches(3, batches=20))
    drawn = plot(found, tmp_path / "grid.png", names=lambda code: f"kind {code}")
    assert (tmp_path / "grid.png").stat().st_size > 5000
    texts = [axis.get_xlabel() + axis.get_ylabel() + axis.get_title() for axis in drawn.axes]
    assert any("bits" in text for text in texts) and any("newest" in text for text in texts)
    assert f"{found.values['spearman']:.2f}" in drawn.get_suptitle()
    assert [t.get_text() for t in drawn.axes[0].get_yticklabels()][0].startswith("kind ")
    none = PROBE(Scorer(lambda a, b, p: 0), schema_of(), random_batches(3))
    assert "no rank correlation" in plot(none).get_suptitle()


def test_long_names_are_shortened_and_stay_in_the_figure() -> None:
    found = replace(PROBE, least=5)(Scorer(lambda a, b, p: b - p), schema_of(), random_batches(3, batches=20))
    drawn = plot(found, names=lambda code: f"a name as long as those of categories > tools > others {code}")
    drawn.canvas.draw()
    first, second = drawn.axes[:2]
    labels = first.get_yticklabels()
    assert all("…" in text.get_text() and text.get_window_extent().x0 >= 0 for text in labels)
    assert sorted(text.get_text()[27] for text in labels) == sorted(str(b) for b in found.values["behaviours"])
    assert not any(text.get_text() for text in second.get_yticklabels())
    title = drawn._suptitle.get_window_extent()  # type: ignore[attr-defined]
    assert title.x0 >= 0 and title.x1 <= drawn.bbox.x1
    assert shortened("x" * 28) == "x" * 28 and len(shortened("x" * 29)) == 28


def test_without_matplotlib_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = PROBE(Scorer(lambda a, b, p: b), schema_of(), random_batches(3))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "unbraid\[plots\]"'):
        plot(found)


def test_a_model_that_fails_keeps_its_mode() -> None:
    def broken(a: Any, b: Any, p: Any) -> Any:
        raise RuntimeError("no")

    model = Scorer(broken).train()
    with pytest.raises(RuntimeError, match="no"):
        PROBE(model, schema_of(), random_batches(3))
    assert model.training and torch.is_grad_enabled()
