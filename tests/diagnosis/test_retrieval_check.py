"""Attention's order of events against counts: maps by hand, orders whose answer is known, what cannot be judged."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from healthkit import make_run
from scipy.stats import spearmanr
from sklearn.metrics import mutual_info_score

from unbraid import config
from unbraid.data.declaration import Events
from unbraid.diagnosis.attention import Attention
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import NotApplicable
from unbraid.diagnosis.retrieval import LEAST, OTHERS, Retrieval, counted, grids, matches, scored, unlike
from unbraid.encoders.dare import DARE
from unbraid.encoders.twin import TWIN
from unbraid.job import train
from unbraid.types import FIRST_VALUE, Feature, Field, History, Task

KINDS, LENGTH, MATCH = 5, 6, ("seen", "kind", "kind")


def make_tables(rows: int = 4000, users: int = 150, seed: int = 0) -> dict[str, pl.DataFrame]:
    """A click is likelier, much, where the third newest event is of the row's own kind; nothing else counts."""
    rng = np.random.default_rng(seed)
    events = {"user": np.repeat(np.arange(users), 60), "kind": rng.integers(0, KINDS, 60 * users)}
    events["time"] = rng.integers(0, 10**6, 60 * users)
    user, kind, time = rng.integers(0, users, rows), rng.integers(0, KINDS, rows), rng.integers(3 * 10**5, 10**6, rows)
    histories = histories_of(events, user, time)
    third = np.array([len(seen) > 2 and seen[-3] == own for seen, own in zip(histories, kind, strict=True)])
    log = {
        "user": user, "kind": [f"k{k}" for k in kind], "time": time, "click": (rng.random(rows) < 0.2 + 0.6 * third).astype(int),
        "split": rng.choice(["train", "valid", "test"], rows, p=[0.6, 0.3, 0.1]),
    }  # fmt: skip
    return {
        "log": pl.DataFrame(log),
        "events": pl.DataFrame({**events, "kind": [f"k{k}" for k in events["kind"]]}),
    }


def histories_of(events: dict[str, Any], user: Any, time: Any) -> list[list[Any]]:
    """Kinds of the events strictly before each row, oldest first, in plain Python."""
    own = defaultdict(list)
    for who, when, kind in sorted(zip(events["user"], events["time"], events["kind"], strict=True), key=lambda e: e[1]):
        own[who].append((when, kind))
    return [[kind for when, kind in own[u] if when < t] for u, t in zip(user, time, strict=True)]


def run_of(**history: Any) -> config.Run:
    """A short run on `make_tables`, with attention of DARE."""
    run = make_run(
        features=(Feature("kind"),), fields=(Field("kind"),), domain="", tasks=(Task("click"),),
        events=(Events(table="events", columns={"kind": "kind"}),),
        histories=(History("seen", **{"fields": ("kind", "position"), "length": LENGTH} | history),),
    )  # fmt: skip
    return replace(run, model=replace(run.model, history=DARE(keep=LENGTH)))


class Scorer(torch.nn.Module):
    """Scores of (own kind, event's kind, position) by a function; also that the encoder has some."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score, self.histories = score, {"shared/seen": SimpleNamespace(scores=None)}

    def event_scores(self, history: str, events: Any, target: Any, *, view: Any = None, fields: Any = None) -> Any:
        """See `unbraid.model.Model.event_scores`."""
        assert history == "seen" and set(fields) == {"kind", "position"}
        a, position = target["kind"][events.rows], events.values["position"] - FIRST_VALUE + 1
        return self.score(a.double(), events.values["kind"].double(), position.double())


def scoring(case: Case, score: Any) -> Case:
    """The case, with a model that scores like this."""
    return replace(case, bundle=replace(case.bundle, model=Scorer(score)))


@pytest.fixture(scope="module")
def tables() -> dict[str, pl.DataFrame]:
    return make_tables()


@pytest.fixture(scope="module")
def case(tables: dict[str, pl.DataFrame]) -> Case:
    return Case.of(train(run_of(), tables=tables, baseline=False).bundle, tables=tables)


# -------------------------------------------------------------------------------------------------------------- the maps
def test_maps_are_those_of_rows_counted_one_by_one(case: Case, tables: dict[str, pl.DataFrame]) -> None:
    def score(a: Any, b: Any, p: Any) -> Any:
        return 0.3 * a - 0.7 * ((b - a) % KINDS) + 0.2 * p

    scored_ = scoring(case, score)
    truth = counted(scored_, MATCH, "click", list(case.batches("train")))
    found = grids(scored_, truth)
    assert found is not None and list(found.positions) == list(range(1, LENGTH + 1))
    log, events = tables["log"].filter(pl.col("split") == "train"), tables["events"]
    seen = histories_of(
        events.to_dict(as_series=False), *(log[name].to_list() for name in ("user", "time"))
    )  # fmt: skip
    kind, click = log["kind"].to_numpy(), log["click"].to_numpy()
    at = np.array([[h[-p] if len(h) >= p else "" for p in range(1, LENGTH + 1)] for h in seen])
    names = [f"k{i}" for i in range(KINDS)]  # in the order of their codes, for `score`
    order = sorted(names, key=lambda name: -(kind == name).sum())
    assert found.rows[:-1] == tuple(order) and found.rows[-1] == "(others)"
    alike, rest_bits, rest_learned, cells = [], [], [], 0
    for i, own in enumerate(order):
        mine, a = kind == own, names.index(own) + FIRST_VALUE
        bits = np.array(
            [[mutual_info_score(click[mine], at[mine, p] == b) / np.log(2) for p in range(LENGTH)] for b in names]
        )
        there = np.array(
            [
                [min((click[mine][at[mine, p] == b] == y).sum() for y in (0, 1)) >= LEAST for p in range(LENGTH)]
                for b in names
            ]
        )
        code = np.arange(KINDS)[:, None] + FIRST_VALUE
        learned = np.exp(0.3 * a - 0.7 * ((code - a) % KINDS) + 0.2 * np.arange(1, LENGTH + 1))
        learned /= learned.mean()
        alike.append(spearmanr(bits[there], learned[there]).statistic)
        cells += there.sum()
        bits, learned = np.where(there, bits, np.nan), np.where(there, learned, np.nan)
        assert np.allclose(found.bits[i], bits[names.index(own)], atol=1e-12, equal_nan=True)
        assert np.allclose(found.learned[i], learned[names.index(own)], rtol=1e-10, equal_nan=True)
        other = [b for b in range(KINDS) if names[b] != own]
        rest_bits.append(bits[other])
        rest_learned.append(learned[other])
    assert np.allclose(found.bits[-1], np.nanmean(rest_bits, (0, 1)))
    assert np.allclose(found.learned[-1], np.nanmean(rest_learned, (0, 1)))
    assert found.spearman == pytest.approx(np.mean(alike))
    assert found.cells == cells and 0 < cells < KINDS * KINDS * LENGTH
    assert OTHERS >= KINDS - 1 and found.bits[:-1].argmax(1).tolist() == [2] * KINDS  # the planted position


def test_the_attention_check_shows_both_maps_and_their_rank_correlation(case: Case) -> None:
    (found,) = Attention()(case)
    counted_, learned = (plot for plot in found.evidence["plots"] if plot.kind == "heat")
    assert counted_.title == "Counted: seen.kind on click" and learned.title == "Learned: seen.kind on click"
    assert counted_.rows == learned.rows and len(counted_.rows) == KINDS + 1
    assert -1 <= found.evidence["rank_correlation"] <= 1
    assert f"{found.evidence['rank_correlation']:.2f}" in counted_.note


def test_cells_of_few_rows_are_gaps_and_without_any_there_is_no_map(case: Case) -> None:
    truth = counted(case, MATCH, "click", list(case.batches("train")))
    assert grids(case, truth, least=10**6) is None
    cells = truth.counts.min(1)
    found = grids(case, truth, least=int(np.median(cells)))
    assert found is not None and 0 < np.isnan(found.bits).sum() < found.bits.size
    assert (np.isnan(found.bits) == np.isnan(found.learned)).all()


def test_positions_end_with_the_last_that_has_enough_rows(case: Case) -> None:
    truth = counted(case, MATCH, "click", list(case.batches("train")))
    late = truth.cells % truth.positions >= 4  # positions 5 and 6
    thin = replace(truth, cells=truth.cells[~late], counts=truth.counts[~late])
    found = grids(case, thin)
    assert found is not None and list(found.positions) == [1, 2, 3, 4]
    assert found.bits.shape == found.learned.shape == (KINDS + 1, 4)


def test_names_cut_to_the_same_are_told_apart() -> None:
    assert unlike(["a", "b", "a"]) == ["a (1)", "b", "a (2)"]


# ---------------------------------------------------------------------------------------------------------- the finding
def test_an_order_that_knows_is_better_and_one_that_turns_it_round_is_severe(case: Case) -> None:
    def knows(a: Any, b: Any, p: Any) -> Any:
        return 10.0 * (p == 3) + (a == b)

    (good,) = Retrieval()(scoring(case, knows))
    (bad,) = Retrieval()(scoring(case, lambda *cell: -knows(*cell)))
    assert good.grade == "none" and good.value < -0.1 and good.high < 0
    assert bad.grade == "severe" and "an order that needs no model is better" in bad.reading
    for found in (good, bad):
        (bars,) = found.evidence["plots"]
        attention, newest, random = bars.values
        assert found.value == pytest.approx(max(newest, random) - attention)
        assert found.low <= found.value <= found.high
        assert all(low <= value <= high for low, value, high in zip(bars.low, bars.values, bars.high, strict=True))


def test_the_trivial_orders_themselves_are_never_worse_than_both(case: Case) -> None:
    (newest,) = Retrieval()(scoring(case, lambda a, b, p: -p))
    (random,) = Retrieval()(scoring(case, lambda a, b, p: 0 * p))
    for place, found in enumerate((newest, random), 1):
        values = found.evidence["plots"][0].values
        assert values[0] == pytest.approx(values[place])
    assert min(newest.value, random.value) == pytest.approx(0, abs=1e-12)
    assert max(newest.value, random.value) == pytest.approx(abs(np.subtract(*newest.evidence["plots"][0].values[1:])))


def test_no_row_of_the_test_split_is_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read = Case.batches

    def batches(self: Case, split: str, size: int = 4096) -> Any:
        asked.append(split)
        return read(self, split, size)

    monkeypatch.setattr(Case, "batches", batches)
    Retrieval()(case)
    assert sorted(asked) == ["train", "valid"]


def test_thin_counts_and_encoders_without_scores_are_said(case: Case, tables: dict[str, pl.DataFrame]) -> None:
    with pytest.raises(
        NotApplicable, match=r"too thin: 100 validation rows .* 10,000 training rows.* Found 0 by `seen.kind`"
    ):
        Retrieval(rows=10_000)(case)
    with pytest.raises(NotApplicable, match="too thin"):
        Retrieval(support=10_000)(case)
    mean = replace(run_of(), model=make_run().model)
    plain = Case.of(train(mean, tables=tables, baseline=False).bundle, tables=tables)
    assert matches(plain) == [MATCH] and scored(plain) == []
    with pytest.raises(NotApplicable, match="no history whose encoder scores events"):
        Retrieval()(plain)
    (found,) = Attention()(plain)
    assert not [plot for plot in found.evidence["plots"] if plot.kind == "heat"] and "cells" not in found.evidence


def test_remedies_differ_in_one_slot_and_can_be_written(tables: dict[str, pl.DataFrame]) -> None:
    run = run_of(fields=("kind",))
    run = replace(run, model=replace(run.model, history=TWIN(keep=LENGTH)))
    case = Case.of(train(run, tables=tables, baseline=False).bundle, tables=tables)
    (found,) = Retrieval(rows=50, support=1)(case)
    dare, position = found.remedies
    assert replace(dare.run, name=run.name, model=run.model) == run and dare.run.model.history.kind == "dare"
    assert replace(position.run, name=run.name, data=run.data) == run
    assert position.run.data.histories[0].fields == ("kind", "position")
    assert all(config.from_dict(tomllib.loads(config.dumps(remedy.run))) == remedy.run for remedy in found.remedies)
