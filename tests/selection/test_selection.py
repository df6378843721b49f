"""Selections: values against plain arithmetic, planted shifts, what training does with them; no hidden label counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from toylog import make_data, make_log, make_run

from unbraid import config, render
from unbraid.compare import budget_of
from unbraid.compare import compare as compare_runs
from unbraid.config import DEV, IWV, SND, Oracle, TargetConfusion, TargetEntropy
from unbraid.data.declaration import Split
from unbraid.data.mix import Mix
from unbraid.evaluate import evaluate
from unbraid.job import JobError, train
from unbraid.losses.mcc import MCC
from unbraid.losses.supervised import Supervised
from unbraid.schedules.d_train import DTrain
from unbraid.selection import snd
from unbraid.selection.iwv import cross_fitted, row_losses
from unbraid.train import Watcher
from unbraid.types import Schema, Scores, Task

SCHEMA = Schema(
    (), (Task("click"), Task("buy", given="click"), Task("size", kind="multiclass"),
         Task("spend", kind="real", role="auxiliary")),
    domains=("(unknown)", "(missing)", "old", "new"), classes={"size": ("L", "M", "S")},
)  # fmt: skip
BLIND = (IWV(), DEV(), SND(), TargetEntropy(), TargetConfusion())


def some_scores(rows: int = 60, seed: int = 0, **changes: Any) -> Scores:
    """Rows of two domains; those of ``new`` have no labels."""
    rng = np.random.default_rng(seed)
    old = np.arange(rows) % 3 > 0
    logits = {
        task.name: rng.normal(size=(rows, 3) if task.kind == "multiclass" else rows).astype(np.float32)
        for task in SCHEMA.tasks
    }
    labels = {
        "click": rng.integers(0, 2, rows),
        "buy": rng.integers(0, 2, rows),
        "size": rng.integers(0, 3, rows),
        "spend": rng.normal(size=rows),
    }
    hidden = {name: rng.normal(size=(rows, 4)) - 0.7 * old[:, None] for name in logits}
    scores = Scores(logits, hidden, labels, {name: old for name in logits}, np.where(old, 2, 3), None, np.arange(rows),
                    np.arange(rows), SCHEMA.domains)  # fmt: skip
    return replace(scores, **changes)


# ---------------------------------------------------------------------------------------------------------------- values
def test_losses_of_rows() -> None:
    scores, rows = some_scores(), np.array([1, 2, 4, 5])
    z, y = scores.logits["click"][rows].astype(float), scores.labels["click"][rows]
    p = 1 / (1 + np.exp(-z))
    np.testing.assert_allclose(
        row_losses(SCHEMA.task("click"), scores, rows, "logloss"), -np.log(np.where(y == 1, p, 1 - p)), rtol=1e-10
    )
    np.testing.assert_array_equal(row_losses(SCHEMA.task("click"), scores, rows, "error"), (z > 0) != (y == 1))
    z, y = scores.logits["size"][rows].astype(float), scores.labels["size"][rows]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(
        row_losses(SCHEMA.task("size"), scores, rows, "logloss"), -np.log(p[np.arange(4), y]), rtol=1e-10
    )
    np.testing.assert_array_equal(row_losses(SCHEMA.task("size"), scores, rows, "error"), z.argmax(1) != y)
    gap = scores.logits["spend"][rows] - scores.labels["spend"][rows]
    np.testing.assert_allclose(row_losses(SCHEMA.task("spend"), scores, rows, "logloss"), gap**2, rtol=1e-10)


def test_no_row_is_weighted_by_a_ratio_that_saw_it() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(51, 3)) * [1, 5, 0.1], rng.normal(0.4, 1, size=(40, 3)) * [1, 5, 0.1]
    source, target = (
        np.column_stack([side, np.full(len(side), 7.0)]) for side in (source, target)
    )  # a unit that never moves
    found = cross_fitted(source, target)
    both = np.concatenate([source, target])[:, :3]
    x, t = ((side[:, :3] - both.mean(0)) / both.std(0) for side in (source, target))
    for fold in (0, 1):
        other, mine = x[np.arange(51) % 2 != fold], x[np.arange(51) % 2 == fold]
        model = LogisticRegression(C=1.0, tol=1e-12, max_iter=10_000)
        larger = max(len(other), len(t))
        weight = np.repeat([larger / len(other), larger / len(t)], [len(other), len(t)])
        model.fit(np.concatenate([other, t]), np.repeat([1, 0], [len(other), len(t)]), sample_weight=weight)
        p = model.predict_proba(mine)
        np.testing.assert_allclose(found[np.arange(51) % 2 == fold], p[:, 0] / p[:, 1], rtol=1e-4)
    assert np.array_equal(cross_fitted(np.ones((4, 2)), np.ones((3, 2))), np.ones(4)), "nothing tells the sides apart"


def test_iwv_and_dev_from_their_equations() -> None:
    scores = some_scores()
    rows = np.flatnonzero(scores.observed["click"])
    risks: dict[type, list[float]] = {IWV: [], DEV: []}
    for name in ("click", "size"):
        hidden = scores.hidden[name]
        w = cross_fitted(hidden[rows], hidden[np.flatnonzero(scores.domain == 3)])
        losses = row_losses(SCHEMA.task(name), scores, rows, "logloss")
        weighted = [a * b for a, b in zip(w, losses, strict=True)]
        mean = sum(weighted) / len(rows)
        covariance = sum((a - mean) * (b - w.mean()) for a, b in zip(weighted, w, strict=True))
        eta = -covariance / sum((b - w.mean()) ** 2 for b in w)
        risks[IWV].append(mean)
        risks[DEV].append(mean + eta * w.mean() - eta)
    for kind, each in risks.items():
        judged = kind()(scores, SCHEMA)
        assert judged.value == pytest.approx(np.mean(each), rel=1e-10) and not judged.why
        assert set(judged.numbers) == {f"{t}.{n}" for t in ("click", "size") for n in ("mean_weight", "effective_rows")}
        alone = kind(tasks=("click",))(scores, SCHEMA)
        assert alone.value == pytest.approx(each[0], rel=1e-10)
    assert DEV().risk(np.ones(4), np.arange(4.0)) == 1.5, "equal weights: the plain mean"


def test_the_control_variate_takes_variance_away() -> None:
    rng = np.random.default_rng(0)
    plain, controlled = [], []
    for _ in range(300):
        x = rng.normal(size=200)
        w = norm.pdf(x, 0.8) / norm.pdf(x)
        losses = 1.0 + 0.3 * x**2  # its mean in the target N(.8, 1): 1 + .3 (1 + .64)
        plain.append(IWV().risk(w, losses))
        controlled.append(DEV().risk(w, losses))
    assert np.mean(plain) == pytest.approx(1.492, abs=0.05) and np.mean(controlled) == pytest.approx(1.492, abs=0.05)
    assert np.std(controlled) < 0.7 * np.std(plain)


def test_snd_from_its_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = some_scores(30)
    rows = np.flatnonzero(scores.domain == 3)
    each = []
    for name in ("click", "size"):
        z = scores.logits[name][rows].astype(float)
        z = np.stack([0 * z, z], 1) if z.ndim == 1 else z
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        p = p / np.sqrt((p**2).sum(1, keepdims=True))
        total = 0.0
        for i in range(len(p)):
            s = np.array([np.exp(p[i] @ p[j] / 0.05) for j in range(len(p)) if j != i])
            s = s / s.sum()
            total -= (s * np.log(s)).sum()
        each.append(total / len(p))
    found = SND()(scores, SCHEMA).value
    assert found == pytest.approx(np.mean(each), rel=1e-10)
    monkeypatch.setattr(snd, "BLOCK", 4)
    assert SND()(scores, SCHEMA).value == pytest.approx(found, rel=1e-12), "in blocks of rows"
    few = SND(rows=5)(scores, SCHEMA).value
    assert few is not None and few < np.log(4) and few == SND(rows=5)(scores, SCHEMA).value


def test_what_a_collapse_is_worth() -> None:
    """Entropy and density take one class for all rows as the best there is, class confusion as the worst."""
    n = 60
    clustered = 12.0 * np.eye(3)[np.arange(n) % 3] + 0.1 * np.random.default_rng(0).normal(size=(n, 3))
    shapes = {"collapse": 30.0 * np.eye(3)[np.zeros(n, int)], "clusters": clustered, "doubt": 0.05 * clustered}
    values = {}
    for name, logits in shapes.items():
        scores = some_scores(n, logits={**some_scores(n).logits, "size": logits})
        scores = replace(scores, observed={k: np.zeros(n, bool) for k in scores.logits})
        for kind in (TargetEntropy, SND, TargetConfusion):
            values[kind, name] = kind(tasks=("size",))(scores, SCHEMA).value
    assert values[TargetEntropy, "collapse"] < values[TargetEntropy, "clusters"] < values[TargetEntropy, "doubt"]
    assert values[SND, "collapse"] == pytest.approx(np.log(n - 1)) and values[SND, "collapse"] > values[SND, "clusters"]
    assert values[TargetConfusion, "clusters"] < 0.2 < values[TargetConfusion, "doubt"]
    assert values[TargetConfusion, "collapse"] == pytest.approx(2 / 3, abs=1e-4)


def test_entropy_and_confusion_from_their_equations() -> None:
    weight = np.random.default_rng(1).random(60)
    scores = some_scores(weight=weight)
    rows = np.flatnonzero(scores.domain == 3)
    z = scores.logits["size"][rows].astype(float)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    h = -(p * np.log(p)).sum(1)
    found = TargetEntropy(tasks=("size",))(scores, SCHEMA).value
    assert found == pytest.approx((h * weight[rows]).sum() / weight[rows].sum(), rel=1e-10)
    q = np.exp(z / 1.5) / np.exp(z / 1.5).sum(1, keepdims=True)
    w = (1 + np.exp((q * np.log(q)).sum(1))) * weight[rows]
    m = q.T @ np.diag(w) @ q
    want = 1 - np.mean(np.diag(m) / m.sum(1))
    assert TargetConfusion(tasks=("size",), temperature=1.5)(scores, SCHEMA).value == pytest.approx(want, rel=1e-10)


# ------------------------------------------------------------------------------------------------------------------ rows
def test_which_rows_are_the_target() -> None:
    scores, click = some_scores(), SCHEMA.task("click")
    new, old = np.flatnonzero(scores.domain == 3), np.flatnonzero(scores.domain == 2)
    assert np.array_equal(SND().target(click, scores), new) and np.array_equal(SND().source(click, scores), old)
    every = replace(scores, observed={k: np.ones(60, bool) for k in scores.logits})
    named = SND(domains=("new",))
    assert np.array_equal(named.target(click, every), new) and np.array_equal(named.source(click, every), old)
    for selection in BLIND:
        labels = {k: np.where(scores.domain == 3, 1 - v if k != "spend" else v + 9, v) for k, v in every.labels.items()}
        one = replace(selection, domains=("new",))(every, SCHEMA)
        assert one == replace(selection, domains=("new",))(replace(every, labels=labels), SCHEMA), selection.kind
        assert one == selection(scores, SCHEMA)
    weight = np.ones(60)
    weight[new[:3]] = 0
    assert np.array_equal(SND().target(click, replace(scores, weight=weight)), new[3:])


def test_a_ratio_that_cannot_be_fitted_is_no_value() -> None:
    scores = some_scores()
    scores.hidden["click"][0, 0] = np.nan
    judged = IWV()(scores, SCHEMA)
    assert judged.value is None and "click: " in judged.why and "finite" in judged.why


def test_errors() -> None:
    scores = some_scores()
    full = replace(scores, observed={k: np.ones(60, bool) for k in scores.logits})
    for selection, rows, match in (
        (SND(tasks=("buy",)), scores,
         r"judges binary and multiclass tasks without `given`: \['click', 'size'\]. Found `tasks` \['buy'\]"),
        (IWV(tasks=("spend",), loss="error"), scores, r"tasks \['spend'\] are real and have no `error`"),
        (SND(), full, "needs validation rows of the target. Found 0 without a label of task `click`. Name its domains"),
        (SND(domains=("other",)), scores, r"`domains` should be among \['old', 'new'\]. Found \['other'\]"),
        (IWV(domains=("old",)), scores, "needs validation rows of the source with labels of task `click`. Found 0"),
        (IWV(), replace(scores, weight=np.arange(60) % 3 + 0.5), "have several weights, or sampled negatives"),
        (DEV(), replace(scores, meta={"sampling_rate.size": np.ones(60)}), "task `size` have several weights, or sampled"),
        (Oracle(), scores, "name its domains"),
        (Oracle(domains=("new",)), scores, "are none: `data.withhold` hides those of training and validation"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            selection.check(rows, SCHEMA)
    with pytest.raises(ValueError, match="`selection.metric` is `auc`, which task `size` has not. It has"):
        Oracle(domains=("new",), metric="auc")(full, SCHEMA)
    for make, match in (
        (lambda: SND(temperature=0.0), "`temperature` should be positive and finite. Found 0.0"),
        (lambda: SND(rows=2), "`rows` should be at least 3. Found 2"),
        (lambda: TargetConfusion(temperature=-1.0), "`temperature` should be positive and finite. Found -1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_the_oracle_is_the_metric_of_the_targets_rows() -> None:
    full = replace(
        some_scores(), observed={k: np.ones(60, bool) for k in SCHEMA.classes | {"click": 0, "buy": 0, "spend": 0}}
    )
    inside = {k: v & (full.domain == 3) for k, v in full.observed.items()}
    want = evaluate(replace(full, observed=inside), SCHEMA, replicates=0)
    found = Oracle(domains=("new",))(full, SCHEMA)
    each = [want[t]["accuracy"]["value"] for t in ("click", "size")]
    assert None in each or found.value == pytest.approx(np.mean(each))
    alone = Oracle(domains=("new",), tasks=("size",))(full, SCHEMA)
    assert alone.value == want["size"]["accuracy"]["value"]
    assert Oracle().oracle and not any(selection.oracle for selection in BLIND)
    assert Oracle(metric="logloss").lower_is_better and not Oracle().lower_is_better


# --------------------------------------------------------------------------------------------------------- planted shift
def test_importance_weighting_finds_what_is_better_in_the_target() -> None:
    """One model is right where the source is, another where the target is; the source's own loss takes the first."""
    rng = np.random.default_rng(0)
    n = 3000
    x = np.concatenate([rng.normal(0, 1, n), rng.normal(1.6, 0.7, n)])
    y = (rng.random(2 * n) < 1 / (1 + np.exp(-3 * np.sin(2 * x)))).astype(float)
    known = np.arange(2 * n) < n
    logits = {"here": np.where(x < 0.7, 3 * np.sin(2 * x), 0.0), "there": np.where(x > 0.7, 3 * np.sin(2 * x), 0.0)}
    schema = Schema((), (Task("click"),), domains=SCHEMA.domains)
    values: dict[str, dict[str, float]] = {}
    for name, z in logits.items():
        scores = Scores({"click": z}, {"click": np.stack([x, x**2], 1)}, {"click": y}, {"click": known},
                        np.where(known, 2, 3), None, np.arange(2 * n), np.arange(2 * n), schema.domains)  # fmt: skip
        every = row_losses(schema.task("click"), scores, np.arange(2 * n), "logloss")
        values[name] = {"source": every[:n].mean(), "target": every[n:].mean()}
        for kind in (IWV, DEV):
            judged = kind()(scores, schema)
            assert judged.value is not None
            values[name][kind.__name__] = judged.value
            assert judged.numbers["click.mean_weight"] == pytest.approx(1, abs=0.1)
    assert values["here"]["source"] < values["there"]["source"] and values["there"]["target"] < values["here"]["target"]
    for name in ("IWV", "DEV"):
        assert values["there"][name] < values["here"][name]
        assert all(abs(values[m][name] - values[m]["target"]) < 0.1 for m in values), values


# ------------------------------------------------------------------------------------------------------------ in training
def a_run(**changes: Any) -> config.Run:
    run = make_run(data=make_data(withhold="site = 'mail'"), losses=(Supervised(), MCC(weight=0.5)), selection=SND())
    training = replace(run.training, steps=12, evaluate_every=3, mix=Mix(unlabelled=16))
    return replace(run, training=training, **changes)


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("selection", [SND(), IWV()], ids=["higher", "lower"])
def test_the_kept_weights_are_those_of_the_best_look(selection: Any, tmp_path: Path) -> None:
    log = {"log": make_log()}
    whole = train(a_run(selection=selection), tmp_path / "whole", tables=log, baseline=False)
    looks = {each["step"]: each["selection"]["value"] for each in told(tmp_path / "whole")}
    best = (min if selection.lower_is_better else max)(looks, key=lambda step: looks[step])
    assert whole.metrics["selection"] == {"kind": selection.kind, "oracle": False, "value": looks[best], "step": best}
    run = a_run(selection=None)
    short = train(replace(run, training=replace(run.training, steps=best)), tables=log, baseline=False)
    for name, value in short.bundle.model.state_dict().items():
        assert torch.equal(value, whole.bundle.model.state_dict()[name])
    assert (
        f"Selected by `{selection.kind}` on the validation split: step {best}, "
        in (tmp_path / "whole" / "report.md").read_text()
    )


def test_patience_goes_by_it() -> None:
    run = a_run(selection=TargetEntropy())
    run = replace(run, training=replace(run.training, steps=60, patience=1))

    class Note(Watcher):
        looks: list[tuple[str, Any]] = []

        def evaluated(self, step: int, metric: str, value: Any, best: bool, values: Any) -> None:
            self.looks.append((metric, value, best))

    note = Note()
    train(run, tables={"log": make_log()}, baseline=False, watcher=note)
    assert {metric for metric, _, _ in note.looks} == {"entropy"}
    assert [best for _, _, best in note.looks[:-1]] == [True] * (len(note.looks) - 1)
    assert len(note.looks) == 20 or not note.looks[-1][2], "it ended at the first look that was not better"


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    log = {"log": make_log()}
    run = a_run()
    run = replace(run, training=replace(run.training, checkpoint_steps=7))
    whole = train(run, tables=log, baseline=False)
    plain, count = MCC.bind, iter(range(100))

    class Stop(Exception):
        pass

    def dies(self: MCC, schema: Schema) -> Any:
        term = plain(self, schema)

        class Dying(type(term)):  # type: ignore[misc]
            def __call__(self, *args: Any) -> Any:
                if next(count) == 9:
                    raise Stop
                return super().__call__(*args)

        return Dying(term.config, term.chosen)

    MCC.bind = dies  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            train(run, tmp_path / "run", tables=log, baseline=False)
    finally:
        MCC.bind = plain  # type: ignore[method-assign]
    again = train(run, tmp_path / "run", tables=log, baseline=False, resume=True)
    assert again.metrics["selection"] == whole.metrics["selection"]
    for name, value in whole.bundle.model.state_dict().items():
        assert torch.equal(value, again.bundle.model.state_dict()[name])


def oracle_run() -> config.Run:
    """The target's labels are withheld from training and known in validation."""
    data = make_data(split=Split(kind="column", column="part"), withhold="site = 'mail' and part = 'train'")
    return a_run(data=data, selection=Oracle(domains=("mail",), tasks=("click",)), name="hindsight")


def oracle_log() -> dict[str, pl.DataFrame]:
    log = make_log(rows=1600)
    return {"log": log.with_columns(part=pl.Series(["train", "train", "valid", "test"] * 400))}


def test_the_oracle_says_what_it_is(tmp_path: Path) -> None:
    class Note(Watcher):
        notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    note = Note()
    result = train(oracle_run(), tmp_path / "run", tables=oracle_log(), baseline=False, watcher=note)
    assert any("selection `oracle` reads labels of the target" in text for text in note.notes)
    assert result.metrics["selection"]["oracle"] is True and result.metrics["selection"]["value"] is not None
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["selection"]["kind"] == "oracle"
    assert "**Oracle**: it reads labels of the target" in (tmp_path / "run" / "report.md").read_text()


def test_comparisons_print_the_oracle(tmp_path: Path) -> None:
    plain = replace(oracle_run(), selection=None, name="plain")
    assert budget_of(oracle_run())["selection"] == "oracle" and "selection" not in budget_of(plain)
    with pytest.raises(JobError, match="other training budgets: selection: "):
        compare_runs([plain, oracle_run()], tmp_path / "c", seeds=1, tables=oracle_log(), replicates=20)
    found = compare_runs(
        [plain, oracle_run()],
        tmp_path / "c",
        seeds=1,
        tables=oracle_log(),
        replicates=20,
        any_budget=True,
        overwrite=True,
    )
    page = render.render_comparison(found)
    assert "hindsight (oracle)" in page and "Oracle: hindsight: selected by labels of the target" in page
    assert "plain (oracle)" not in page


def test_what_is_refused_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="Selection `oracle` reads validation labels of task `click`"):
        train(a_run(selection=Oracle(domains=("mail",))), tables={"log": make_log()}, baseline=False)
    with pytest.raises(
        JobError, match="Selection `snd` needs validation rows of the target. Found 0 without a label of task `click`"
    ):
        train(a_run(data=make_data(), losses=(Supervised(),)), tables={"log": make_log()}, baseline=False)
    with pytest.raises(ValueError, match="schedule `d_train` has several, which it judges by `training.metric`"):
        a_run(schedule=DTrain())
    assert config.from_dict(config.to_dict(a_run())) == a_run()
    assert config.override(a_run(), ["selection.kind=iwv"]).selection == IWV()
