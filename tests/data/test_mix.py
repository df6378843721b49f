"""Batches of labelled and unlabelled rows in fixed numbers, their views, and labels that are withheld."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid.augmentations.tabular import Change, Tabular
from unbraid.bundle import build
from unbraid.config import Run
from unbraid.data.declaration import Data
from unbraid.data.encode import encode
from unbraid.data.mix import Mix, batches, walk, with_views
from unbraid.data.source import DataError
from unbraid.data.table import Encoded
from unbraid.job import JobError, train
from unbraid.preflight import bound_terms
from unbraid.train import Local, Watcher
from unbraid.types import Batch, Losses, Output, State, Task


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def open_table(data: Data, log: pl.DataFrame | None = None) -> Encoded:
    return Encoded(encode(data, tables={"log": make_log() if log is None else log}))


# ------------------------------------------------------------------------------------------------------------------ walk
@pytest.mark.parametrize(("n", "size"), [(7, 3), (7, 7), (3, 8), (1, 4), (12, 4)])
def test_a_walk_reads_every_row_as_often_and_can_begin_anywhere(n: int, size: int) -> None:
    rows = np.arange(100, 100 + n)
    steps = list(itertools.islice(walk(rows, size, 5), 6 * n))  # 6 * size whole passes
    assert all(len(part) == size for part in steps)
    flat = np.concatenate(steps)
    for at in range(0, len(flat), n):
        assert sorted(flat[at : at + n]) == list(rows), "each pass reads each row once"
    if n > 3:
        assert list(flat[:n]) != list(flat[n : 2 * n]), "in another order each time"
    for start in (1, 4, 3 * n - 1):
        assert np.array_equal(next(walk(rows, size, 5, start)), steps[start])


def test_the_parts_of_a_batch() -> None:
    rows = np.arange(20)
    labelled = rows % 4 == 0  # 0, 4, ..., 16
    domain = np.where(rows < 10, 2, 3)
    plain = Mix(unlabelled=6).parts(rows, labelled, None, 3)
    assert plain.rows == 5
    for known, hidden in itertools.islice(plain.order(1), 30):
        assert len(known) == 3 and len(hidden) == 6 and labelled[known].all() and not labelled[hidden].any()
    again = list(itertools.islice(plain.order(1, 17), 2))
    want = list(itertools.islice(plain.order(1), 17, 19))
    assert all(
        np.array_equal(a, b) for one, two in zip(again, want, strict=True) for a, b in zip(one, two, strict=True)
    )
    seen = np.concatenate([hidden for _, hidden in itertools.islice(Mix(unlabelled=6, pool="all").parts(
        rows, labelled, None, 3).order(1), 10)])  # fmt: skip
    assert set(seen) == set(rows), "labelled rows are in the pool, too"
    even = Mix(balance="domain").parts(rows, labelled, domain, 5)
    counts = [np.bincount(domain[known] - 2, minlength=2) for known, _ in itertools.islice(even.order(1), 6)]
    assert all(sorted(each) == [2, 3] for each in counts), "as many of each domain, as far as a batch divides"
    assert even.unlabelled == 0 and all(not len(hidden) for _, hidden in itertools.islice(even.order(1), 3))


def test_errors_of_the_mix() -> None:
    rows, all_known = np.arange(6), np.ones(6, bool)
    with pytest.raises(ValueError, match="Parameter `unlabelled` should not be negative. Found -1."):
        Mix(unlabelled=-1)
    with pytest.raises(
        ValueError, match="asks for 4 rows without labels in every batch, and every training row has one"
    ):
        Mix(unlabelled=4).parts(rows, all_known, None, 2)
    with pytest.raises(ValueError, match="No training row has a label"):
        Mix(unlabelled=4).parts(rows, ~all_known, None, 2)
    with pytest.raises(ValueError, match="needs domains: set `data.domain`"):
        Mix(balance="domain").parts(rows, all_known, None, 2)
    with pytest.raises(ValueError, match="`training.batch_size` 2 has no place for each of the 3 domains with labels"):
        Mix(balance="domain").parts(rows, all_known, np.array([2, 2, 3, 3, 4, 4]), 2)


# ------------------------------------------------------------------------------------------------- joining and the views
def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if hasattr(a, "offsets"):
        return torch.equal(a.offsets, b.offsets) and equal(a.values, b.values)
    return (a is None and b is None) or torch.equal(a, b)


def same(a: Batch, b: Batch) -> bool:
    return all(equal(getattr(a, name), getattr(b, name)) for name in vars(a))


def test_joined_batches_are_the_batch_of_joined_rows(cache: str) -> None:
    table = open_table(make_data(cache=cache))
    rows = np.array([5, 3, 300, 7, 41])
    assert same(Batch.join([table.batch(rows[:2]), table.batch(rows[2:])]), table.batch(rows))
    assert same(Batch.join([table.batch(rows), table.batch(rows[:0])]), table.batch(rows))


@pytest.mark.parametrize("of", ["unlabelled", "all"])
def test_strong_views_stand_behind_the_weak_ones_and_are_joined_by_pair(cache: str, of: Any) -> None:
    table = open_table(make_data(cache=cache, tasks=(Task("buy"),)))
    batch = table.batch(np.arange(30))
    hidden = ~batch.observed["buy"]
    assert 0 < hidden.sum() < 30
    both = with_views(batch, Tabular(strong=Change(features=0.5)).bind(table), of, (7, 3))
    n = 30 if of == "all" else int(hidden.sum())
    assert len(both) == 30 + n and both.view.tolist() == [0] * 30 + [1] * n
    assert not both.observed["buy"][30:].any() and torch.equal(both.observed["buy"][:30], batch.observed["buy"])
    with pytest.raises(ValueError, match="one view of a row and drop the other"):
        both.select(torch.arange(30))
    for i, other in enumerate(both.pair.tolist()):
        if other >= 0:
            assert both.row[other] == both.row[i] and both.pair[other] == i and both.view[other] != both.view[i]
        else:
            assert of == "unlabelled" and not hidden[i]
    assert equal({k: v[:30] for k, v in both.features.items() if not hasattr(v, "offsets")},
                 {k: v for k, v in batch.features.items() if not hasattr(v, "offsets")})  # fmt: skip
    view = Tabular().bind(table)
    assert same(with_views(batch, view, of, (7, 3)), with_views(batch, view, of, (7, 3)))
    assert not same(with_views(batch, view, of, (7, 3)), with_views(batch, view, of, (7, 4))), (
        "another step, other views"
    )


def test_labels_of_the_pool_are_not_read(cache: str) -> None:
    table = open_table(make_data(cache=cache))
    parts = Mix(unlabelled=9, pool="all").parts(np.arange(100), np.ones(100, bool), None, 4)
    for batch in itertools.islice(batches(parts.order(2), table.batch, 2, 0), 5):
        assert len(batch) == 13
        for known in batch.observed.values():
            assert not known[4:].any()
        assert batch.observed["click"][:4].all()


# ---------------------------------------------------------------------------------------------------------------- training
class Remembers:
    """A term with a memory: how often each row was seen; its loss is the supervised one plus that of the memory's sum."""

    needs: tuple[str, ...] = ()

    def __init__(self, seen: dict[int, int] | None = None) -> None:
        self.seen = dict(seen or {})

    def bind(self, schema: Any) -> Remembers:
        return self

    def fresh(self, rows: np.ndarray, labels: Any, observed: Any) -> Remembers:
        assert np.array_equal(rows, np.sort(rows)) and len(labels["click"]) == len(observed["click"]) == len(rows)
        return Remembers({int(row): 0 for row in rows})

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        for row in batch.row.tolist():
            self.seen[row] += 1
        most = max(self.seen.values())
        return {"click": output.logits["click"].square().mean() * (1 + 0.1 * most)}

    def state_dict(self) -> State:
        return {"rows": np.array(list(self.seen)), "seen": np.array(list(self.seen.values()))}

    def load_state_dict(self, state: State) -> None:
        self.seen = dict(zip(state["rows"].tolist(), state["seen"].tolist(), strict=True))


class Dies(Watcher):
    def __init__(self, at: int) -> None:
        self.at = at

    def evaluated(self, step: int, *rest: Any) -> None:
        if step == self.at:
            raise RuntimeError("killed")


def withheld_run(**changes: Any) -> Run:
    run = make_run(data=make_data(withhold="site = 'mail'"), augment=Tabular())
    training = replace(run.training, batch_size=16, mix=Mix(unlabelled=8), checkpoint_steps=3, evaluate_every=5)
    return replace(run, training=training, **changes)


def test_resumes_bit_equal_with_a_mix_views_and_a_memory(tmp_path: Path) -> None:
    run = withheld_run()
    data = open_table(replace(run.data, cache=str(tmp_path / "cache")))

    def go(folder: Path | None, resume: bool, at: int) -> tuple[dict[str, torch.Tensor], dict[int, int]]:
        model = build(run, data.schema)
        terms = [*bound_terms(run, data.schema, model), Remembers()]
        session = Local(
            data, terms, run.update, run.training, {}, 0, folder, resume, watcher=Dies(at), augment=run.augment
        )
        kept: list[Remembers] = []
        plain = Remembers.fresh

        def fresh(self: Remembers, *known: Any) -> Remembers:
            kept.append(plain(self, *known))
            return kept[-1]

        Remembers.fresh = fresh  # type: ignore[method-assign]
        try:
            session.fit(model, 11)
        finally:
            Remembers.fresh = plain  # type: ignore[method-assign]
        return {k: v.clone() for k, v in model.state_dict().items()}, kept[-1].seen

    want, seen = go(None, False, 0)
    assert sum(seen.values()) == 11 * (16 + 8 + 8)  # labelled, unlabelled, and their strong views
    with pytest.raises(RuntimeError, match="killed"):
        go(tmp_path, False, 5)
    got, again = go(tmp_path, True, 0)
    assert again == seen and equal(got, want)


def test_an_epoch_is_one_pass_over_the_rows_with_a_label(tmp_path: Path) -> None:
    run = withheld_run()
    data = open_table(replace(run.data, cache=str(tmp_path)))
    training = replace(run.training, steps=0, epochs=2.0)
    session = Local(data, [], run.update, training, {}, 0)
    rows = data.split("train")
    labelled = int(torch.stack(list(data.labels(rows)[1].values())).any(0).sum())
    assert 0 < labelled < len(rows)
    assert session.total_steps() == round(2 * (labelled // 16))
    session.training = replace(training, mix=None)
    assert session.total_steps() == round(2 * (len(rows) // 16))


def test_schedules_with_batches_of_their_own_refuse_a_mix(tmp_path: Path) -> None:
    run = withheld_run()
    data = open_table(replace(run.data, cache=str(tmp_path)))
    model = build(run, data.schema)
    session = Local(data, bound_terms(run, data.schema, model), run.update, run.training, {}, 0)
    for argument in ({"stream": True}, {"sample": {"click": 1.0}}):
        with pytest.raises(ValueError, match="`training.mix` makes batches of its own"):
            session.fit(model, 2, **argument)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- withheld
def hidden_changed(log: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The log with other labels of every kind wherever they are withheld: on the site `mail`, test rows apart."""
    rng = np.random.default_rng(seed)
    mail = (log["site"] == "mail") & (log["time"] < 800 * 10**6)
    n = len(log)
    return log.with_columns(
        click=pl.when(mail).then(pl.Series(rng.integers(0, 2, n))).otherwise(log["click"]),
        buy=pl.when(mail).then(pl.Series(rng.integers(0, 2, n))).otherwise(log["buy"]),
        spend=pl.when(mail).then(pl.Series(rng.normal(size=n))).otherwise(log["spend"]),
        size=pl.when(mail).then(pl.lit("XXL")).otherwise(log["size"]),
    )


TASKS = (Task("click"), Task("buy"), Task("spend", kind="real"), Task("size", kind="multiclass"))


def test_withheld_labels_are_read_in_the_test_split_alone_and_never_in_a_history(cache: str) -> None:
    log = make_log()
    data = make_data(cache=cache, tasks=TASKS, withhold="site = 'mail'")
    table, open_ = open_table(data, log), open_table(make_data(cache=cache, tasks=TASKS), log)
    mail = table.columns["domain"] == table.schema.domains.index("mail")
    for split, shown in (("train", False), ("valid", False), ("test", True)):
        rows = table.split(split)
        (labels, known), (want, all_known) = table.labels(rows), open_.labels(rows)
        for task in known:
            seen = all_known[task] & (torch.from_numpy(~mail[rows]) | shown)
            assert torch.equal(known[task], seen) and (split != "train" or (seen != all_known[task]).any())
            assert torch.equal(labels[task][seen], want[task][seen])
    name = "clicked"
    rows = np.arange(table.rows)
    packed, plain = (t.batch(rows).features["seen"] for t in (table, open_))
    shops = [f.values["shop"] for f in (packed, plain)]  # type: ignore[union-attr]
    assert torch.equal(*shops), "what happened is still known"
    codes = [f.values[name] for f in (packed, plain)]  # type: ignore[union-attr]
    assert (codes[0] == 1).any() and not (codes[1] == 1).any(), "its label is missing"
    agree = codes[0] != 1
    assert torch.equal(codes[0][agree], codes[1][agree])


def test_training_is_blind_to_withheld_labels(cache: str, tmp_path: Path) -> None:
    data = make_data(cache=cache, tasks=TASKS, withhold="site = 'mail'")
    run = withheld_run(data=data)
    run = replace(run, training=replace(run.training, patience=3, evaluate_every=2))
    states = []
    for n, log in enumerate((make_log(), hidden_changed(make_log(), 1))):
        bundle = train(run, tmp_path / str(n), tables={"log": log}, baseline=False, keep_scores=True).bundle
        states.append({k: v for k, v in bundle.model.state_dict().items()})
        assert bundle.fitted.schema.classes["size"] == ("L", "M", "S")
    assert equal(*states)
    logs = [(tmp_path / str(n) / "log.jsonl").read_text() for n in range(2)]
    assert logs[0] == logs[1]


def test_errors_of_withhold(cache: str) -> None:
    with pytest.raises(DataError, match="data.withhold: there is no column `place`"):
        open_table(make_data(cache=cache, withhold="place = 'x'"))
    with pytest.raises((DataError, JobError), match="click"):  # a task of which no label is left
        open_table(make_data(cache=cache, withhold="site in ('mail', 'home', 'search')"))
