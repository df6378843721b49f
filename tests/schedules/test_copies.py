"""Individual and Post-train: who trains on what, one module that routes rows, bundles, resumption, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from toylog import make_data, make_log, make_run

from unbraid import config
from unbraid.bundle import Bundle, BundleError, build
from unbraid.compare import budget_of, check
from unbraid.config import ModelChoice
from unbraid.data.encode import encode
from unbraid.data.table import Encoded
from unbraid.encoders.table import Views
from unbraid.heads import Heads
from unbraid.job import JobError, train
from unbraid.losses.supervised import Supervised
from unbraid.model import Model
from unbraid.optim.joint import Joint
from unbraid.predictor import Predictor, with_uncertainty
from unbraid.preflight import bound_terms
from unbraid.schedules.copies import Copies, Fits
from unbraid.schedules.individual import Individual
from unbraid.schedules.one_stage import OneStage
from unbraid.schedules.post_train import PostTrain
from unbraid.towers.mlp import SharedBottom
from unbraid.train import Local, Training
from unbraid.types import Task
from unbraid.uncertainty.last_layer import UncertaintyError

LOG = make_log(rows=500)
TABLES = {"log": LOG}
TRAINING = Training(
    batch_size=64, steps=12, checkpoint_steps=1, checkpoint_seconds=0, metric="logloss", evaluate_every=6
)
CHOICE = ModelChoice(tower=SharedBottom((16,), (8,), dropout=0.2), tables=Views(width=4, lazy_rows=0))
DECAY = Joint(lr=0.01, weight_decay=0.05, table_weight_decay=0.05)
Weights = dict[str, torch.Tensor]


def toy(schedule: Any, **changes: Any) -> config.Run:
    return make_run(**{"training": TRAINING, "update": DECAY, "model": CHOICE, "schedule": schedule, **changes})


def encoded(log: pl.DataFrame = LOG, **changes: Any) -> Encoded:
    return Encoded(encode(make_data(**changes), tables={"log": log}))


class Death(RuntimeError):
    """What a test kills a training with."""


class Trial:
    """A run's session; it can die at a training step, and writes down which rows and tasks each call trained on."""

    def __init__(
        self, data: Encoded, run: config.Run, folder: Path | None = None, resume: bool = False, die: int = -1
    ) -> None:
        self.run, self.model, self.die, self.steps = run, build(run, data.schema), die, 0
        (self.term,) = bound_terms(run, data.schema, self.model)
        self.by = self.term.by  # type: ignore[attr-defined]
        self.seen: list[set[int]] = []
        weights = {task.name: task.weight for task in data.schema.tasks}
        self.local = Local(data, [self], run.update, run.training, weights, run.seed, folder, resume)
        self.fits: list[dict[str, Any]] = []
        fit = self.local.fit

        def spied(model: Any, steps: int, **rest: Any) -> Any:
            self.seen.append(set())
            self.fits.append({"steps": steps, **rest})
            return fit(model, steps, **rest)

        self.local.fit = spied  # type: ignore[method-assign]

    needs: tuple[str, ...] = ()

    def __call__(self, output: Any, batch: Any, step: int) -> Any:
        if self.steps == self.die:
            raise Death
        self.steps += 1
        self.seen[-1].update(batch.domain.tolist())
        return self.term(output, batch, step)

    def go(self) -> Copies:
        whole = self.run.schedule(self.local, self.model, self.run.training.steps)
        assert isinstance(whole, Copies)
        return whole


def copies(model: torch.nn.Module) -> Weights:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def logits(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return dict(model(batch).logits)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return encoded(cache=str(tmp_path_factory.mktemp("cache")))


# ------------------------------------------------------------------------------------------------------ who trains on what
def test_a_domains_model_sees_its_rows_alone_and_is_what_a_session_of_its_own_makes(data: Encoded) -> None:
    trial = Trial(data, toy(Individual()))
    whole = trial.go()
    assert list(whole.models) == ["domain2", "domain3", "domain4"] and trial.seen == [{2}, {3}, {4}]
    rows = trial.local.rows("train")
    for code in (2, 3, 4):
        alone = Trial(data, toy(OneStage()))
        mine = rows[data.columns["domain"][rows] == code]
        alone.local.fit(alone.model, 12, rows=mine, seed=[4, code], look=trial.fits[code - 2]["look"])
        assert same(copies(alone.model), copies(whole.models[f"domain{code}"]))
    one = sum(p.numel() for p in trial.model.parameters())
    assert sum(p.numel() for p in whole.parameters()) == 3 * one == trial.local.record["parameters"]  # type: ignore[index]


def test_a_tasks_model_trains_that_task_alone(data: Encoded) -> None:
    trial = Trial(data, toy(Individual(by="task")))
    start, whole = copies(trial.model), trial.go()
    assert [f["weights"] for f in trial.fits] == [{"click": 1.0, "buy": 0.0}, {"click": 0.0, "buy": 1.0}]
    assert [f["look"].metric for f in trial.fits] == ["click.logloss", "buy.logloss"]
    for task, other in (("click", "buy"), ("buy", "click")):
        found = copies(whole.models[f"task/{task}"])
        for part in ("heads.task", "tower.towers.task"):
            for name in (n for n in start if n.startswith(part)):
                assert torch.equal(found[name], start[name]) == (f"/{other}" in name)
    one = sum(p.numel() for p in trial.model.parameters())
    assert sum(p.numel() for p in whole.parameters()) == 2 * one


def test_post_train_begins_all_copies_with_the_joint_model(data: Encoded) -> None:
    joint = Trial(data, toy(OneStage()))
    joint.local.fit(joint.model, 9)
    trial = Trial(data, toy(PostTrain(share=0.75, length="each")))
    whole = trial.go()
    assert [f["steps"] for f in trial.fits] == [9, 3, 3, 3] and trial.seen == [{2, 3, 4}, {2}, {3}, {4}]
    assert same(copies(whole.models["root"]), copies(joint.model))
    for code in (2, 3, 4):
        alone, _ = joint.local.fork(joint.model, {})
        rows = joint.local.rows("train")
        mine = rows[data.columns["domain"][rows] == code]
        joint.local.fit(alone, 3, rows=mine, seed=[5, code], look=trial.fits[code - 1]["look"])
        assert same(copies(alone), copies(whole.models[f"domain{code}"]))
        assert not same(copies(alone), copies(joint.model))
    tasks = Trial(data, toy(PostTrain(by="task", share=0.5)))
    assert list(tasks.go().models) == ["task/click", "task/buy"] and [f["steps"] for f in tasks.fits] == [6, 3, 3]


def test_without_one_of_the_parts_it_is_joint_or_individual(data: Encoded) -> None:
    joint, post = Trial(data, toy(OneStage())), Trial(data, toy(PostTrain(share=1.0)))
    joint.local.fit(joint.model, 12)
    whole, batch = post.go(), data.batch(np.arange(80))
    for task, found in logits(joint.model, batch).items():
        torch.testing.assert_close(logits(whole, batch)[task], found, rtol=1e-6, atol=1e-6)
    none = Trial(data, toy(PostTrain(share=0.0, length="each")))
    none.go()
    assert [f["steps"] for f in none.fits] == [12, 12, 12]


def test_other_domains_and_their_rows_change_nothing(data: Encoded) -> None:
    other = encoded(
        LOG.with_columns(buy=pl.when(pl.col("site") == "home").then(1 - pl.col("buy")).otherwise(pl.col("buy")))
    )
    ends = [copies(Trial(each, toy(Individual())).go()) for each in (data, other)]
    moved = {name.split(".")[1] for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])}
    assert moved == {"domain2"}
    fits = Fits(Trial(data, toy(OneStage())).local, "domain", build(toy(OneStage()), data.schema))
    fits.keys, fits.domains = fits.keys[::-1], dataclasses.replace(fits.domains, codes=fits.domains.codes[::-1])
    model = build(toy(OneStage()), data.schema)
    turned = fits.train(model, [12, 12, 12], 4)
    assert all(torch.equal(v, ends[0][f"models.{key}.{n}"]) for key, m in turned.items() for n, v in copies(m).items())


@pytest.mark.parametrize("by", ["domain", "task"])
@pytest.mark.parametrize("steps", [1, 7, 100, 1001])
def test_divided_steps_sum_to_the_runs(by: Any, steps: int, data: Encoded) -> None:
    trial = Trial(data, toy(OneStage()))
    fits = Fits(trial.local, by, trial.model)
    found = fits.steps(steps, divided=True)
    counts = [len(fits.domains.train[c]) for c in fits.domains.codes] if by == "domain" else [1, 1]
    assert sum(found) == steps and fits.steps(steps, divided=False) == [steps] * len(counts)
    assert all(abs(n - steps * c / sum(counts)) <= 1 for n, c in zip(found, counts, strict=True))


def test_early_stopping_looks_at_the_domains_own_rows(data: Encoded) -> None:
    run = toy(Individual(), training=dataclasses.replace(TRAINING, patience=1, steps=40), update=Joint(lr=0.3))
    trial = Trial(data, run)
    trial.go()
    for asked, code in zip(trial.fits, (2, 3, 4), strict=True):
        look = asked["look"]
        assert look.patience == 1 and look.keep_best and look.every == 4
        assert set(data.columns["domain"][look.rows]) == {code} and set(look.rows) <= set(data.split("valid"))
    assert trial.local.steps < 3 * 40


# ------------------------------------------------------------------------------------------------------------- the module
@pytest.mark.parametrize("unknown", ["mean", "root", "error"])
def test_rows_go_to_their_domains_model_in_any_order(unknown: Any, data: Encoded) -> None:
    trial = Trial(data, toy(PostTrain(unknown=unknown)))
    whole = trial.go()
    whole.eval()
    batch = data.batch(np.arange(60))
    batch = dataclasses.replace(batch, domain=torch.arange(60) % 5 if unknown != "error" else 2 + torch.arange(60) % 3)
    with torch.no_grad():
        out = whole(batch)
        each = {code: whole.models[f"domain{code}"](batch) for code in (2, 3, 4)}
        root = whole.models["root"](batch) if unknown == "root" else None
    for task in ("click", "buy"):
        for kind in ("logits", "hidden"):
            parts = {code: getattr(one, kind)[task] for code, one in each.items()}
            mean = torch.stack(list(parts.values())).mean(0)
            for row, code in enumerate(batch.domain.tolist()):
                want = parts[code] if code in parts else getattr(root, kind)[task] if root is not None else mean
                torch.testing.assert_close(getattr(out, kind)[task][row], want[row], rtol=1e-5, atol=1e-6)
    assert out.extras == {} and out.lookups == () and whole.gives == frozenset()
    with pytest.raises(ValueError, match="no common trunk"):
        _ = out.trunk
    strange = dataclasses.replace(batch, domain=torch.zeros_like(batch.domain))
    if unknown == "error":
        with pytest.raises(ValueError, match=r"60 rows are of domain `\(unknown\)`, which has no model"):
            whole(strange)
    else:
        assert torch.isfinite(whole(strange).logits["click"]).all()
    assert len(whole(batch.select(torch.zeros(0, dtype=torch.int64))).logits["click"]) == 0


def test_multiclass_and_real_tasks(data: Encoded) -> None:
    tasks = (Task("click"), Task("spend", kind="real"), Task("size", kind="multiclass"))
    each = encoded(tasks=tasks)
    for schedule in (Individual(), Individual(by="task"), PostTrain(by="task", share=0.5)):
        trial = Trial(
            each, toy(schedule, data=make_data(tasks=tasks), training=dataclasses.replace(TRAINING, metric="auc"))
        )
        found = logits(trial.go(), each.batch(np.arange(30)))
        assert {name: found[name].shape for name in found} == {"click": (30,), "spend": (30,), "size": (30, 3)}
        if trial.run.schedule.by == "task":  # type: ignore[union-attr]
            assert [f["look"].metric for f in trial.fits[-3:]] == ["click.auc", "spend.rmse", "size.accuracy"]


# ----------------------------------------------------------------------------------------------------- bundles and resume
BUNDLES = [Individual(), Individual(by="task", length="divided"), PostTrain(), PostTrain(by="task", share=0.5)]


@pytest.mark.parametrize("schedule", BUNDLES)
def test_a_bundle_is_saved_loaded_and_predicts_like_any(schedule: Any, tmp_path: Path) -> None:
    run = toy(schedule)
    made = train(run, tmp_path / "out", tables=TABLES, baseline=False)
    loaded = Bundle.load(tmp_path / "out")
    assert isinstance(loaded.model, Copies) and same(copies(loaded.model), copies(made.bundle.model))
    np.testing.assert_array_equal(
        Predictor(loaded).predict(LOG.head(40), tables=TABLES),
        Predictor(made.bundle).predict(LOG.head(40), tables=TABLES),
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["parameters"]["tables"] + metrics["parameters"]["dense"] == metrics["schedule"]["parameters"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "models, one per " in text and f"{metrics['schedule']['parameters']:,} parameters in all" in text
    with pytest.raises(UncertaintyError, match="several models"):
        with_uncertainty(loaded, tables=TABLES)
    with pytest.raises(BundleError, match="several models"):
        train(dataclasses.replace(run, init=str(tmp_path / "out")), tables=TABLES, baseline=False)
    weights = tmp_path / "out" / "weights.safetensors"
    plain = train(toy(OneStage()), tmp_path / "plain", tables=TABLES, baseline=False)
    weights.write_bytes((tmp_path / "plain" / "weights.safetensors").read_bytes())
    with pytest.raises(BundleError, match="does not fit"):
        Bundle.load(tmp_path / "out")
    assert isinstance(plain.bundle.model, Model)


def test_it_can_start_from_a_bundle_of_one_model(tmp_path: Path) -> None:
    train(toy(OneStage()), tmp_path / "one", tables=TABLES, baseline=False)
    found = train(toy(PostTrain(share=0.0, length="each"), init=str(tmp_path / "one")), tables=TABLES, baseline=False)
    assert same(copies(found.bundle.model.models["root"]), copies(Bundle.load(tmp_path / "one").model))  # type: ignore[index, union-attr]


@pytest.mark.parametrize("schedule", BUNDLES)
def test_resumed_anywhere_it_is_the_same_bit_for_bit(schedule: Any, data: Encoded, tmp_path: Path) -> None:
    whole = Trial(data, toy(schedule))
    want = copies(whole.go())
    for die in sorted({2, whole.steps // 2, whole.steps - 1}):
        folder = tmp_path / str(die)
        folder.mkdir()
        with pytest.raises(Death):
            Trial(data, toy(schedule), folder, die=die).go()
        again = Trial(data, toy(schedule), folder, resume=True)
        assert same(copies(again.go()), want) and again.local.record == whole.local.record
        assert again.steps <= whole.steps - die + 1


# --------------------------------------------------------------------------------------------------------------- refusals
def test_domains_without_labels_have_no_model(data: Encoded) -> None:
    log = LOG.with_columns(click=pl.when(pl.col("site") == "mail").then(None).otherwise(pl.col("click")),
                           buy=pl.when(pl.col("site") == "mail").then(None).otherwise(pl.col("buy")))  # fmt: skip
    each = encoded(log)
    trial = Trial(each, toy(Individual()))
    whole = trial.go()
    assert list(whole.models) == ["domain2", "domain4"] and trial.local.record is not None
    assert trial.local.record["without"] == {"mail": "no label"}
    assert "Without a model: mail (no label)." in trial.run.schedule.report(trial.local.record)  # type: ignore[union-attr]
    assert torch.isfinite(logits(whole, each.batch(np.arange(50)))["click"]).all()


def test_what_cannot_be_is_refused(data: Encoded) -> None:
    for schedule in (Individual(), PostTrain()):
        with pytest.raises(ValueError, match="Set `model.heads.by` to `task`"):
            Trial(data, toy(schedule, model=dataclasses.replace(CHOICE, heads=Heads(by="domain")))).go()
    for schedule in (Individual(by="task"), PostTrain(by="task")):
        with pytest.raises(ValueError, match="Set `by` of the losses to `task`"):
            Trial(data, toy(schedule, losses=(Supervised(by="domain"),))).go()
        Trial(data, toy(schedule, losses=(Supervised(by="task@domain"),))).go()
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="share"):
            PostTrain(share=share)
    for setting in ("schedule.unknown=root", "schedule.length=all", "schedule.by=user"):
        with pytest.raises(config.RunError):
            config.override(toy(Individual()), [setting])
    with pytest.raises(ValueError, match="no model"):
        Copies(data.schema, "domain", {})


def test_the_run_file_holds_them_and_a_comparison_knows_their_length(tmp_path: Path) -> None:
    plain = dataclasses.replace(toy(OneStage()), name="plain")
    for schedule in (
        Individual(by="task", length="divided", unknown="error"),
        PostTrain(share=0.3, length="each", unknown="mean"),
    ):
        (tmp_path / "run.toml").write_text(config.dumps(toy(schedule)))
        assert config.load(tmp_path / "run.toml").schedule == schedule
    for schedule in (Individual(length="divided"), PostTrain()):
        check([plain, dataclasses.replace(toy(schedule), name="d")], 1, "", "", False)
        assert budget_of(toy(schedule)) == budget_of(plain)
    for schedule in (Individual(), PostTrain(length="each")):
        with pytest.raises(JobError, match="schedule.length: not read / each"):
            check([plain, dataclasses.replace(toy(schedule), name="d")], 1, "", "", False)
