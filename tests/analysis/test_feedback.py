"""STEM's partition of test rows: counts by hand, AUC per bucket by scikit-learn, planted help and harm, the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from unbraid.analysis import feedback
from unbraid.analysis.feedback import Partition
from unbraid.types import Batch, Feature, Schema, Scores, Task

SCHEMA = Schema((Feature("item"), Feature("price", kind="number")), (Task("a"), Task("b"), Task("c", kind="real")))
USERS = 60


def batch_of(rows: dict[str, np.ndarray]) -> Batch:
    n = len(rows["user"])
    return Batch(
        features={"item": torch.from_numpy(rows["item"])},
        labels={t: torch.from_numpy(rows[t]) for t in ("a", "b")},
        observed={t: torch.from_numpy(rows[f"{t}.seen"]) for t in ("a", "b")},
        domain=torch.full((n,), 2), weight=None, row=torch.arange(n), view=torch.from_numpy(rows["view"]),
        pair=torch.full((n,), -1), meta={"user": torch.from_numpy(rows["user"])},
    )  # fmt: skip


def drawn(rows: int, seed: int, users: int = USERS) -> dict[str, np.ndarray]:
    """User u gives ever more positives to a, and fewer to b, the larger u is."""
    rng = np.random.default_rng(seed)
    user = rng.integers(1, users + 1, rows)
    lean = (user - 1) / USERS
    return {
        "user": user, "item": rng.integers(0, 9, rows), "view": np.zeros(rows, np.int8),
        "a": (rng.random(rows) < 0.1 + 0.6 * lean).astype(np.float32),
        "b": (rng.random(rows) < 0.7 - 0.6 * lean).astype(np.float32),
        "a.seen": rng.random(rows) < 0.9, "b.seen": rng.random(rows) < 0.7,
    }  # fmt: skip


TRAIN = drawn(4000, 0)


def pieces(rows: dict[str, np.ndarray], size: int = 700) -> list[Batch]:
    n = len(rows["user"])
    return [batch_of({k: v[at : at + size] for k, v in rows.items()}) for at in range(0, n, size)]


@pytest.mark.parametrize("by", ["user", "item"])
def test_counts_and_buckets_by_a_loop(by: str) -> None:
    rows = {**TRAIN, "view": (np.arange(4000) % 7 == 0).astype(np.int8)}  # strong views count nowhere
    found = Partition("a", "b", by=by, smoothing=2.0).count(SCHEMA, pieces(rows))
    counts: dict[int, list[int]] = {}
    for n, group in enumerate(rows[by]):
        mine = counts.setdefault(int(group), [0, 0])
        for k, task in enumerate("ab"):
            mine[k] += int(rows[f"{task}.seen"][n] and rows[task][n] == 1 and rows["view"][n] == 0)
    known = sorted(group for group in counts if by == "user" or group >= 2)  # unknown and missing are no groups
    assert found.groups.tolist() == known and found.positives.tolist() == [counts[g] for g in known]
    ratio = [np.log((counts[g][0] + 2) / (counts[g][1] + 2)) for g in known]
    assert found.ratio == pytest.approx(ratio, abs=1e-12)
    edges = np.quantile(ratio, [0.2, 0.4, 0.6, 0.8])
    asked = np.array([*known, 999, 0])
    want = [sum(r >= e for e in edges) for r in ratio] + [-1, -1]
    assert found.edges == pytest.approx(edges) and found.buckets(asked).tolist() == want
    assert set(want) == {-1, 0, 1, 2, 3, 4}


def test_own_edges_and_names() -> None:
    probe = Partition("a", "b", edges=(-1.0, 0.5))
    assert probe.count(SCHEMA, pieces(TRAIN)).edges.tolist() == [-1.0, 0.5]
    assert probe.names() == ["1 of 3, from b to a", "2 of 3, from b to a", "3 of 3, from b to a"]
    assert Partition("a", "b").names() == ["b >> a", "b > a", "a ~ b", "a > b", "a >> b"]


def scores_of(rows: dict[str, np.ndarray], quality: Any) -> Scores:
    """Logits that hold (2 y - 1) times ``quality`` (N,) in noise, the same noise for every model."""
    n, rng = len(rows["user"]), np.random.default_rng(5)
    logits = {t: (2 * rows[t] - 1) * quality + rng.normal(size=n) for t in "ab"}
    labels, observed = {t: rows[t] for t in "ab"}, {t: rows[f"{t}.seen"] for t in "ab"}
    return Scores(logits, {}, labels, observed, np.full(n, 2), None, rows["user"], np.arange(n), ("", "", "all"))


TEST = drawn(6000, 1, USERS + 5)  # five users whom training never saw


def test_the_harm_shows_where_it_was_planted() -> None:
    probe = Partition("a", "b")
    found = probe.count(SCHEMA, pieces(TRAIN))
    place = found.buckets(TEST["user"])
    quality = np.select([place == 2, place == 4], [0.2, 1.2], 0.6)
    models = {"alone": scores_of(TEST, 0.6), "shared": scores_of(TEST, quality)}
    values = probe(found, models, SCHEMA, against="alone").values
    assert values["left_out"] == int((TEST["user"] > USERS).sum()) and values["rows"].tolist() == [
        int((place == k).sum()) for k in range(5)
    ]
    for task in "ab":
        of = values["tasks"][task]
        for k in range(5):
            mine = (place == k) & TEST[f"{task}.seen"]
            want = {m: roc_auc_score(TEST[task][mine], s.logits[task][mine]) for m, s in models.items()}
            assert of["positives"][k] == TEST[task][mine].sum()
            assert of["models"]["shared"]["value"][k] == pytest.approx(want["shared"], abs=1e-9)
            assert of["models"]["shared"]["gain"][k] == pytest.approx(want["shared"] - want["alone"], abs=1e-9)
        shared = of["models"]["shared"]
        assert shared["high"][2] < 0 < shared["low"][4], "harm in the middle, help at one end, beyond chance"
        assert (shared["gain"][[0, 1, 3]] == 0).all() and (of["models"]["alone"]["gain"] == 0).all()
    reading = probe(found, models, SCHEMA, against="alone").reading
    assert "bucket `a ~ b`" in reading and "`shared`" in reading


def test_by_an_item_and_its_codes() -> None:
    probe = Partition("a", "b", by="item", quantiles=(0.5,))
    found = probe.count(SCHEMA, pieces(TRAIN))
    models = {"alone": scores_of(TEST, 0.6)}
    values = probe(found, models, SCHEMA, against="alone", groups=TEST["item"]).values
    place = found.buckets(TEST["item"])
    assert values["rows"].tolist() == [int((place == k).sum()) for k in range(2)] and values["left_out"] == int(
        (TEST["item"] < 2).sum()
    )
    with pytest.raises(ValueError, match="With `by` = `item` the rows' groups should be given"):
        probe(found, models, SCHEMA, against="alone")


def test_a_bucket_with_few_positives_has_no_value() -> None:
    probe = Partition("a", "b", replicates=20)
    found = probe.count(SCHEMA, pieces(TRAIN))
    place = found.buckets(TEST["user"])
    rows = {**TEST, "a": np.where(place == 0, 0, TEST["a"]).astype(np.float32)}
    values = probe(found, {"x": scores_of(rows, 0.5), "y": scores_of(rows, 0.4)}, SCHEMA, against="x").values
    assert np.isnan(values["tasks"]["a"]["models"]["y"]["value"]).tolist() == [True, False, False, False, False]
    assert np.isfinite(values["tasks"]["b"]["models"]["y"]["gain"]).all()


def test_mistakes() -> None:
    for change, words in (
        ({"second": "a"}, "should be two tasks. Found `a` twice"),
        ({"smoothing": 0.0}, "`smoothing` should be positive"),
        ({"quantiles": (0.5, 0.2)}, "`quantiles`, between 0 and 1, should ascend"),
        ({"quantiles": (0.0, 0.5)}, "between 0 and 1"),
        ({"quantiles": ()}, "should ascend"),
        ({"edges": (1.0, 1.0)}, "`edges` should ascend"),
        ({"confidence": 0.0}, "`confidence` should lie"),
    ):
        with pytest.raises(ValueError, match=words):
            Partition(**{"first": "a", "second": "b", **change})  # type: ignore[arg-type]
    batches = pieces(TRAIN)
    for probe, words in (
        (Partition("a", "c"), "Task `c` should be binary. Found real"),
        (Partition("a", "z"), "There is no task `z`"),
        (Partition("a", "b", by="price"), "`by` should be `user` or an id feature among .'item'.. Found `price`"),
    ):
        with pytest.raises(ValueError, match=words):
            probe.count(SCHEMA, batches)
    probe = Partition("a", "b")
    with pytest.raises(ValueError, match="There is no training row"):
        probe.count(SCHEMA, [])
    with pytest.raises(ValueError, match="The data declare no user"):
        probe.count(SCHEMA, [replace(batches[0], meta={})])
    with pytest.raises(ValueError, match="No training row has a known `user`"):
        probe.count(SCHEMA, [replace(batches[0], meta={"user": torch.zeros(len(batches[0]), dtype=torch.int64)})])
    found, one = probe.count(SCHEMA, batches), scores_of(TEST, 0.5)
    with pytest.raises(ValueError, match="`against` should be one of x. Found y"):
        probe(found, {"x": one}, SCHEMA, against="y")
    with pytest.raises(ValueError, match="of the same rows"):
        probe(found, {"x": one, "y": replace(one, row=one.row + 1)}, SCHEMA, against="x")
    with pytest.raises(ValueError, match="no metric `rmse` with a better side"):
        Partition("a", "b", metric="rmse")(found, {"x": one}, SCHEMA, against="x")


def test_the_figure(tmp_path: Path) -> None:
    probe = Partition("a", "b", replicates=30)
    found = probe.count(SCHEMA, pieces(TRAIN))
    models = {"alone": scores_of(TEST, 0.6), "shared": scores_of(TEST, 0.5), "own": scores_of(TEST, 0.7)}
    finding = probe(found, models, SCHEMA, against="alone")
    drawn = feedback.plot(finding, tmp_path / "parts.png")
    assert (tmp_path / "parts.png").stat().st_size > 5_000 and [axis.get_title() for axis in drawn.axes] == ["a", "b"]
    heights = [bar.get_height() for bar in drawn.axes[1].patches]
    of = finding.values["tasks"]["b"]["models"]
    assert heights == pytest.approx([*of["shared"]["gain"], *of["own"]["gain"]])
    with pytest.raises(ValueError, match="`alone` is the only model"):
        feedback.plot(probe(found, {"alone": models["alone"]}, SCHEMA, against="alone"))
