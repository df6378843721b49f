"""Pseudo-labels, FixMatch and FlexMatch: values and gradients, which rows, thresholds per class, what is remembered."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from few_labels_kit import (
    HIDDEN,
    KNOWN,
    ROWS,
    SCHEMA,
    Dies,
    few_labels_run,
    make_batch,
    make_logits,
    same,
    say,
    weights_of,
)
from toylog import make_log, make_run

from unbraid import config
from unbraid.data.mix import Mix
from unbraid.job import JobError, train
from unbraid.losses.fixmatch import FixMatch
from unbraid.losses.flexmatch import FlexMatch, PerClass
from unbraid.losses.pseudo_label import PseudoLabel
from unbraid.losses.supervised import Supervised
from unbraid.types import Batch, Schema, Task

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
KINDS = {"pseudo_label": PseudoLabel, "fixmatch": FixMatch, "flexmatch": FlexMatch}


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def classes(value: torch.Tensor) -> list[float]:
    """Logits of a row over classes."""
    return [0.0, float(value)] if value.dim() == 0 else value.tolist()


def reference(
    logits: Any, batch: Batch, tau: float, temperature: float, strong: bool, rate: float = 1.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """Value and gradient, written out row by row: no `unlabelled`, no softmax of torch, no autograd."""
    total, grads = 0.0, {name: torch.zeros_like(value) for name, value in logits.items()}
    for name, weight in (("click", 0.5), ("buy", 1.0), ("size", 2.0)):
        mass, kept = 0.0, []
        for i in range(len(batch)):
            w = 1.0 if batch.weight is None else float(batch.weight[i])
            if batch.view[i] or batch.observed[name][i] or w == 0 or (strong and batch.pair[i] < 0):
                continue
            if name == "buy" and not (batch.observed["click"][i] and batch.labels["click"][i] == 1):
                continue
            mass += w
            shift = -math.log(rate) if name != "size" else 0.0
            z = classes(logits[name][i].detach())
            q = softmax([v / temperature for v in [z[0], *[x + shift for x in z[1:]]]])
            if max(q) > tau:
                kept.append((int(batch.pair[i]) if strong else i, q.index(max(q)), w, shift))
        for at, label, w, shift in kept:
            z = classes(logits[name][at].detach())
            p = softmax([z[0], *[x + shift for x in z[1:]]])
            total += weight * w / mass * -math.log(p[label])
            slope = [weight * w / mass * (p[k] - (k == label)) for k in range(len(p))]
            grads[name][at] += torch.tensor(slope if name == "size" else slope[1], dtype=torch.float64)
    return total, grads


# --------------------------------------------------------------------------------------------------- values and gradients
@pytest.mark.parametrize("kind", ["pseudo_label", "fixmatch", "flexmatch"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("tau", "temperature", "mu"), [(0.0, 1.0, 1.0), (0.8, 1.0, 0.3), (0.9, 0.5, 2.0)])
def test_value_and_gradient(kind: str, weighted: bool, tau: float, temperature: float, mu: float) -> None:
    """FlexMatch outside of a training has no memory, and one threshold."""
    batch = make_batch(weighted=weighted)
    batch.observed["buy"][1], batch.observed["click"][1], batch.labels["click"][1] = (
        False,
        True,
        1.0,
    )  # a label that is late
    batch.pair[1], batch.pair[ROWS - 1] = ROWS - 1, 1  # with a strong view
    batch.pair[KNOWN + HIDDEN - 1] = -1
    logits = make_logits(batch)
    term = KINDS[kind](threshold=tau, temperature=temperature, weight=mu).bind(SCHEMA)
    (loss,) = term(say(logits), batch, 0).values()
    value, grads = reference(logits, batch, tau, temperature, kind != "pseudo_label")
    assert value > 0
    torch.testing.assert_close(loss, torch.tensor(mu * value, dtype=torch.float64), **EXACT)
    found = torch.autograd.grad(loss, list(logits.values()), allow_unused=True)
    for (name, want), got in zip(grads.items(), found, strict=True):
        if got is None:
            assert not want.any(), name
        else:
            torch.testing.assert_close(got, mu * want, **EXACT, msg=name)
    assert grads["buy"].any() or tau, "a missing label of a conditional task counts where its parent is known to be 1"


def test_a_log_that_kept_some_negatives_is_believed_as_it_is() -> None:
    batch = make_batch()
    rates = {f"sampling_rate.{name}": torch.full((ROWS,), 0.2) for name in ("click", "buy")}
    batch, logits = replace(batch, meta=rates), make_logits(batch)
    (loss,) = FixMatch(threshold=0.8).bind(SCHEMA)(say(logits), batch, 0).values()
    rate = float(torch.tensor(0.2))
    torch.testing.assert_close(
        float(loss.detach()), reference(logits, batch, 0.8, 1.0, True, rate)[0], rtol=1e-6, atol=1e-7
    )


def test_the_weak_view_teaches_and_does_not_learn() -> None:
    batch = make_batch()
    logits = make_logits(batch)
    (loss,) = FixMatch(threshold=0.5, tasks=("size",)).bind(SCHEMA)(say(logits), batch, 0).values()
    (grad,) = torch.autograd.grad(loss, logits["size"])
    assert not grad[: KNOWN + HIDDEN].any() and grad[KNOWN + HIDDEN :].any(1).sum() > 3
    (loss,) = PseudoLabel(threshold=0.5, tasks=("size",)).bind(SCHEMA)(say(logits), batch, 0).values()
    (grad,) = torch.autograd.grad(loss, logits["size"])
    assert not grad[:KNOWN].any() and not grad[KNOWN + HIDDEN :].any() and grad[KNOWN : KNOWN + HIDDEN].any(1).sum() > 3


def test_thresholds_at_their_ends() -> None:
    batch = make_batch()
    logits = make_logits(batch)
    assert FixMatch(threshold=1.0).bind(SCHEMA)(say(logits), batch, 0) == {}
    term = FixMatch(threshold=0.33, tasks=("size",)).bind(SCHEMA)
    lesson = term.lesson(term.tasks[0], say(logits), batch)
    assert lesson is not None and len(lesson.at) == HIDDEN, "below 1 / C everything is believed"
    assert float(lesson.share.sum()) == pytest.approx(1)


def test_it_is_divided_by_all_unlabelled_rows() -> None:
    batch = make_batch()
    logits = {name: torch.zeros_like(value) for name, value in make_logits(batch).items()}
    logits["click"][KNOWN] = 9.0  # one believed row of nine; its strong view is at 0
    (loss,) = FixMatch(threshold=0.9, tasks=("click",)).bind(SCHEMA)(say(logits), batch, 0).values()
    assert float(loss) == pytest.approx(0.5 * math.log(2) / HIDDEN)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_where_nothing_is_taught(kind: str) -> None:
    term, batch = KINDS[kind](threshold=0.9).bind(SCHEMA), make_batch()
    level = {name: torch.zeros_like(value) for name, value in make_logits(batch).items()}
    assert term(say(level), batch, 0) == {}, "nothing is believed"
    all_known = batch.select(torch.arange(KNOWN))
    all_known = replace(all_known, observed=dict.fromkeys(all_known.observed, torch.ones(KNOWN, dtype=torch.bool)))
    assert term(say(make_logits(all_known)), all_known, 0) == {}, "no row is without a label"
    assert term.objectives == (kind,) and term.trains == () and term.needs == ()
    if kind != "pseudo_label":
        bare = make_batch(strong=False)
        assert term(say(make_logits(bare)), bare, 0) == {}, "no strong view"


def test_labels_of_hidden_rows_are_not_read() -> None:
    one, other = make_batch(), make_batch(seed=5)
    labels = {name: torch.where(one.observed[name], value, other.labels[name]) for name, value in one.labels.items()}
    logits = make_logits(one)
    for kind in KINDS.values():
        (a,) = kind(threshold=0.6).bind(SCHEMA)(say(logits), one, 0).values()
        (b,) = kind(threshold=0.6).bind(SCHEMA)(say(logits), replace(one, labels=labels), 0).values()
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------------------------- FlexMatch
SIZE = Task("size", kind="multiclass")


def per_class(n: int, warmup: bool, tau: float = 0.8, known: Any = ()) -> PerClass:
    believe = FlexMatch(threshold=tau, warmup=warmup).believe(Schema((), (SIZE,), classes=SCHEMA.classes))
    observed = torch.zeros(n, dtype=torch.bool)
    observed[list(known)] = True
    return believe.fresh(np.arange(n) * 3, {"size": torch.zeros(n)}, {"size": observed})


def ask(believe: PerClass, rows: Any, labels: Any, confidence: Any) -> list[bool]:
    return believe(SIZE, torch.tensor(confidence), torch.tensor(labels), torch.tensor(rows) * 3).tolist()


@pytest.mark.parametrize("warmup", [False, True])
def test_thresholds_follow_a_count_by_hand(warmup: bool) -> None:
    """Against a plain counter over a dictionary of rows, over 60 random batches; rows twice in a batch keep the last answer."""
    n, tau, rng = 40, 0.8, np.random.default_rng(3)
    known = set(range(30, 40))
    believe, latest = per_class(n, warmup, tau, known), dict.fromkeys(range(30), -1)
    for _ in range(60):
        rows, labels = rng.choice(30, 12), rng.choice(3, 12, p=[0.6, 0.3, 0.1])
        confidence = np.round(rng.random(12).astype(np.float32), 3)
        counts = Counter(latest.values())
        most = max([counts[c] for c in range(3)] + ([counts[-1]] if warmup else []))
        beta = [counts[c] / most if any(counts[k] for k in range(3)) else 0.0 for c in range(3)]
        assert all(0 <= b <= 1 for b in beta)
        torch.testing.assert_close(believe.status(SIZE), torch.tensor(beta), rtol=1e-6, atol=0)
        if not warmup and max(beta):
            assert max(beta) == 1, "the class that is learnt best has the threshold tau itself"
        want = [c > tau * beta[k] / (2 - beta[k]) for c, k in zip(confidence, labels, strict=True)]
        assert ask(believe, rows, labels, confidence) == want
        for row, label, c in zip(rows, labels, confidence, strict=True):
            if c > tau:
                latest[row] = label
    assert believe.latest["size"].tolist() == [
        4 if row in known else (3 if latest[row] < 0 else latest[row]) for row in range(n)
    ]


def test_while_nothing_was_confident_everything_is_believed() -> None:
    believe = per_class(4, False)
    assert believe.status(SIZE).tolist() == [0, 0, 0]
    assert ask(believe, [0, 1], [2, 0], [0.4, 0.35]) == [True, True]
    assert believe.status(SIZE).tolist() == [0, 0, 0], "it was not confident"
    assert ask(believe, [0, 1], [2, 0], [0.9, 0.35]) == [True, True], "thresholds are those from before the batch"
    assert believe.status(SIZE).tolist() == [0, 0, 1]
    assert ask(believe, [2, 3], [2, 0], [0.79, 0.35]) == [False, True]


def test_all_rows_of_one_class_have_its_threshold() -> None:
    believe = per_class(3, True)
    ask(believe, [0, 1, 2], [1, 1, 1], [0.9, 0.9, 0.9])
    assert believe.status(SIZE).tolist() == [0, 1, 0]
    assert ask(believe, [0], [1], [0.79]) == [False]


def test_the_mapping_keeps_its_ends() -> None:
    believe = per_class(8, False, tau=0.9)
    ask(believe, [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 1], [0.95] * 6)  # beta 1, 1/2, 0
    assert ask(believe, [0, 6], [0, 0], [0.901, 0.899]) == [True, False]
    assert ask(believe, [6, 6], [1, 1], [0.301, 0.299]) == [True, False]  # .9 * .5 / 1.5
    assert ask(believe, [7], [2], [0.34]) == [True]


def test_the_memory_comes_back(tmp_path: Path) -> None:
    believe = per_class(6, True, known=[5])
    ask(believe, [0, 1, 4], [1, 1, 2], [0.9, 0.95, 0.99])
    again = per_class(6, True, known=[5])
    again.load_state_dict(believe.state_dict())
    assert torch.equal(again.status(SIZE), believe.status(SIZE)) and again.status(SIZE).tolist() == [0, 1, 0.5]
    ask(again, [0], [0], [0.9])
    assert believe.latest["size"][0] == 1, "it is a copy"
    with pytest.raises(ValueError, match=r"should have the shapes \{'size': \(7,\)\}. Found \{'size': \(6,\)\}"):
        per_class(7, True).load_state_dict(believe.state_dict())


# ----------------------------------------------------------------------------------------------------------------- errors
def test_wrong_parameters() -> None:
    for kind in KINDS.values():
        for bad in ({"threshold": 1.1}, {"threshold": -0.1}, {"weight": 0.0}, {"temperature": 0.0}):
            with pytest.raises(ValueError, match=f"`{next(iter(bad))}` should be"):
                kind(**bad)
    with pytest.raises(ValueError, match="of binary and multiclass tasks. Real-valued: spend"):
        FixMatch(tasks=("click", "spend")).bind(SCHEMA)
    with pytest.raises(ValueError, match="There is no task `clik`"):
        FixMatch(tasks=("clik",)).bind(SCHEMA)
    with pytest.raises(ValueError, match="needs a binary or multiclass task. Found \\['spend'\\]"):
        PseudoLabel().bind(Schema((), (Task("spend", kind="real"),)))
    with pytest.raises(ValueError, match="`flexmatch` is the objective of a loss. Rename"):
        FlexMatch().bind(Schema((), (Task("flexmatch"),)))


def test_a_run_without_views_or_without_hidden_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="Loss `fixmatch` compares two views of a row: set `augment`"):
        few_labels_run(FixMatch(), augment=None)
    assert few_labels_run(PseudoLabel(), augment=None).augment is None
    run = few_labels_run(FixMatch())
    open_log = replace(run, data=replace(run.data, withhold=""), training=replace(run.training, mix=None))
    with pytest.raises(JobError, match="without a label of click, size, and no training row lacks one"):
        train(open_log, tables={"log": make_log()}, baseline=False)
    bare = replace(run, training=replace(run.training, mix=Mix(unlabelled=0)))
    with pytest.raises(JobError, match="`training.mix.unlabelled` is 0"):
        train(bare, tables={"log": make_log()}, baseline=False)
    everything = replace(open_log, training=replace(run.training, steps=2, mix=Mix(unlabelled=8, pool="all")))
    assert train(everything, tables={"log": make_log()}, baseline=False).metrics["steps"] == 2


# ------------------------------------------------------------------------------------------------------------- a training
@pytest.mark.parametrize("loss", [PseudoLabel(threshold=0.5), FixMatch(threshold=0.5), FlexMatch(threshold=0.6)])
def test_it_moves_the_model(loss: Any) -> None:
    assert not same(weights_of(few_labels_run(loss)), weights_of(few_labels_run()))


def test_flexmatch_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    run = few_labels_run(FlexMatch(threshold=0.55))
    run = replace(run, training=replace(run.training, checkpoint_steps=5))
    want = weights_of(run)
    with pytest.raises(KeyboardInterrupt):
        weights_of(run, tmp_path / "run", watcher=Dies())
    assert (tmp_path / "run" / "fit-0.safetensors").exists()
    plain, kept = PerClass.load_state_dict, []

    def watched(self: PerClass, state: Any) -> None:
        plain(self, state)
        kept.append(int((self.latest["size"] < 3).sum()))

    PerClass.load_state_dict = watched  # type: ignore[method-assign]
    try:
        got = weights_of(run, tmp_path / "run", resume=True)
    finally:
        PerClass.load_state_dict = plain  # type: ignore[method-assign]
    assert kept and kept[0] > 20, "there was something to remember"
    assert same(got, want)


def test_its_memory_knows_which_rows_lack_a_label() -> None:
    seen: list[PerClass] = []
    plain = PerClass.fresh

    def watched(self: PerClass, *known: Any) -> PerClass:
        seen.append(plain(self, *known))
        return seen[-1]

    PerClass.fresh = watched  # type: ignore[method-assign]
    try:
        run = few_labels_run(FlexMatch())
        weights_of(replace(run, training=replace(run.training, steps=1)))
        pool = replace(run.training, steps=1, mix=Mix(unlabelled=8, pool="all"))
        weights_of(replace(run, training=pool))
    finally:
        PerClass.fresh = plain  # type: ignore[method-assign]
    log = make_log()
    train_rows = log.filter(pl.col("time") < 600 * 10**6)
    hidden = int((train_rows["site"] != "home").sum())
    begun, of_all = (seen[n].latest["click"] for n in (0, 1))
    assert len(begun) == len(of_all) == len(train_rows)
    assert 0 < int((begun == 3).sum()) == len(train_rows) - hidden, "labelled rows are none that were never answered"
    assert bool((of_all == 2).all())


def test_run_files_and_citations() -> None:
    from unbraid.citations import citations

    for kind, key in (("pseudo_label", "lee2013"), ("fixmatch", "sohn2020"), ("flexmatch", "zhang2021")):
        text = citations(make_run(losses=(Supervised(), KINDS[kind]()), augment=few_labels_run().augment))
        assert key in text and sum(k in text for k in ("lee2013", "sohn2020", "zhang2021")) == 1
    run = few_labels_run(FlexMatch(warmup=False))
    assert config.from_dict(config.to_dict(run)) == run
    with pytest.raises(config.RunError, match="unknown key .*warmpu.* Did you mean `warmup`"):
        config.from_dict(config.to_dict(run) | {"losses": [{"kind": "flexmatch", "warmpu": True}]})
