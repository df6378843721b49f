"""The run against its single-task counterpart: values against scikit-learn, routing, budgets, planted harm, remedies."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score

from unbraid import config
from unbraid.bundle import build
from unbraid.config import ModelChoice, Run, Weighted
from unbraid.data.declaration import Data, Split
from unbraid.diagnosis import transfer
from unbraid.diagnosis.case import Case
from unbraid.diagnosis.diagnosis import Measure, NotApplicable
from unbraid.diagnosis.plots import Histogram, to_plain
from unbraid.diagnosis.transfer import (
    NegativeTransfer,
    budget,
    own_losses,
    remedies,
    require_shared,
    single_task,
    widened,
)
from unbraid.encoders.table import Views
from unbraid.job import train
from unbraid.losses.domain_adversary import DomainAdversary, DomainClassifier
from unbraid.losses.esmm import ESMM
from unbraid.losses.supervised import Supervised
from unbraid.optim.adatask import AdaTask
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.schedules.individual import Individual
from unbraid.schedules.one_stage import OneStage
from unbraid.schedules.online import Online
from unbraid.towers.ame import AME
from unbraid.towers.experts import MMoE
from unbraid.towers.mlp import SharedBottom
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.train import Training, losses_of, predict
from unbraid.types import Feature, Schema, Scores, Task

ROWS = 3000


def make_table(seed: int = 0) -> pl.DataFrame:
    """Users of two tastes, so that some give more to ``a`` and some to ``b``; two sites; 60 : 30 : 10."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 60, ROWS), rng.integers(0, 30, ROWS)
    lean = np.linspace(-1.5, 1.5, 60)[user]
    taste = rng.normal(size=30)[item]
    return pl.DataFrame({
        "user": user, "item": item, "site": rng.choice(["home", "mail"], ROWS, p=[0.6, 0.4]),
        "a": (rng.random(ROWS) < 1 / (1 + np.exp(-taste - lean))).astype(int),
        "b": (rng.random(ROWS) < 1 / (1 + np.exp(taste + lean + 0.5))).astype(int),
        "split": rng.choice(["train", "valid", "test"], ROWS, p=[0.6, 0.3, 0.1]),
    })  # fmt: skip


def make_run(**changes: Any) -> Run:
    data = Data(
        rows="log", user="user", domain="site", split=Split(kind="column", column="split"),
        features=(Feature("user"), Feature("item")), tasks=(Task("a"), Task("b")),
    )  # fmt: skip
    run = Run(
        name="toy", data=data, update=Joint(lr=0.01),
        model=ModelChoice(tower=SharedBottom(bottom=(8,), tower=(4,), dropout=0.1), tables=Views(width=4)),
        training=Training(batch_size=128, steps=30, checkpoint_seconds=0),
    )  # fmt: skip
    return replace(run, **changes)


TABLE = make_table()


def written(text: str) -> Run:
    return config.from_dict(tomllib.loads(text))


def case_of(run: Run, table: pl.DataFrame = TABLE, **more: Any) -> Case:
    bundle = train(run, tables={"log": table}, baseline=False).bundle
    return Case.of(bundle, tables={"log": table}, **more)


@pytest.fixture
def case() -> Case:
    return case_of(make_run())


def counterpart(case: Case) -> tuple[torch.nn.Module, Scores]:
    """The single-task model and its predictions of the validation sample."""
    model, _ = transfer.train_alone(case, single_task(case.run, case.schema), case.steps)
    return model, predict(model, case.batches("valid"), case.schema)


def auc(scores: Scores, task: str, rows: Any = slice(None)) -> float:
    return float(roc_auc_score(np.asarray(scores.labels[task])[rows], np.asarray(scores.logits[task])[rows]))


# --------------------------------------------------------------------------------------------------------------- the value
def test_losses_against_scikit_learn(case: Case) -> None:
    _, alone = counterpart(case)
    found = NegativeTransfer(usual=-9.0, severe=9.0)(case)  # every part has a grade
    by_place: dict[str, Any] = {each.where: each for each in found}
    domain = case.column("domain", "valid")
    assert domain is not None
    names = case.schema.domains
    for task in "ab":
        assert by_place[task].value == pytest.approx(auc(alone, task) - auc(case.valid, task), abs=1e-10)
        for code in (2, 3):
            mine = domain == code
            want = auc(alone, task, mine) - auc(case.valid, task, mine)
            assert by_place[f"{task} in {names[code]}"].value == pytest.approx(want, abs=1e-10)
    assert by_place["a"].low < by_place["a"].value < by_place["a"].high and by_place["a"].unit == "AUC"
    assert sum(name.startswith("a of users") for name in by_place) >= 3
    assert [each.severity for each in found] == sorted((each.severity for each in found), reverse=True)


def test_groups_of_users_by_a_loop(case: Case) -> None:
    _, alone = counterpart(case)
    found = transfer.by_feedback(case, "a", "b", alone)
    labels, _ = case.encoded.labels(case.sample("train"))
    users, counts = case.column("user", "train"), dict[int, list[int]]()
    for n, user in enumerate(np.asarray(users).tolist()):
        mine = counts.setdefault(user, [0, 0])
        mine[0] += int(labels["a"][n])
        mine[1] += int(labels["b"][n])
    ratio = {user: np.log((a + 1) / (b + 1)) for user, (a, b) in counts.items()}
    edges = np.quantile(list(ratio.values()), [0.2, 0.4, 0.6, 0.8])
    place = np.array([sum(ratio[user] >= e for e in edges) for user in np.asarray(case.valid.group).tolist()])
    names = ["b >> a", "b > a", "a ~ b", "a > b", "a >> b"]
    for k, name in enumerate(names):
        want = auc(alone, "a", place == k) - auc(case.valid, "a", place == k)
        assert found[f"of users {name}"][0] == pytest.approx(want, abs=1e-10)


def test_the_interval_of_one_part_of_many() -> None:
    assert widened((0.1, 0.0, 0.3), 1) == pytest.approx((0.1, 0.0, 0.3))
    value, low, high = widened((0.0, -1.959964, 1.959964), 10)
    assert (value, low, high) == pytest.approx((0.0, -2.807034, 2.807034), abs=1e-5)  # 1 - .025 / 10 of the normal law


# ---------------------------------------------------------------------------------------------------------- the counterpart
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"update": Weighted(lr=0.01)},
        {"update": AdaTask(lr=0.01)},
        {"model": ModelChoice(AME(expert=(8,), tower=(4,)), Views("several", widths=(2, 4)))},
        {"model": ModelChoice(STEM(expert=(8,), tower=(4,)), Views("per_task", width=4))},
    ],
)
def test_a_task_of_the_counterpart_writes_its_own_alone(case: Case, change: dict[str, Any]) -> None:
    alone = single_task(make_run(**change), case.schema)
    assert written(config.dumps(alone)) == alone, "it is a run like any other"
    model = build(alone, case.schema)
    width = 6 if "several" in str(change) else 4
    assert dict(model.embeddings.widths) == {"a": width, "b": width} and alone.model.tower.bottom == (8,)  # type: ignore[union-attr]
    losses, _ = losses_of(model.train(), next(case.batches("train")), bound_terms(alone, case.schema, model), 0)
    for task, other in (("a", "b"), ("b", "a")):
        model.zero_grad()
        losses[task].backward(retain_graph=True)
        moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        mine = {name for name, _ in model.named_parameters() if f"{task}/item" in name or f"/{task}." in name}
        assert (
            len(mine) > 3
            and mine <= moved
            and not [name for name in moved if f"/{other}." in name or f".{other}/" in name]
        )


def test_what_the_counterpart_keeps(case: Case) -> None:
    run = make_run(update=Weighted(lr=0.02, clip_norm=3.0))
    alone = single_task(run, case.schema)
    assert alone.update == Joint(lr=0.02, clip_norm=3.0) and single_task(make_run(), case.schema).update == Joint(
        lr=0.01
    )
    assert alone.model.tower == SingleTask(bottom=(8,), tower=(4,), dropout=0.1)
    assert (alone.data, alone.training, alone.seed) == (run.data, run.training, run.seed)
    assert isinstance(single_task(make_run(update=AdaTask(lr=0.1)), case.schema).update, AdaTask)
    mmoe = make_run(model=ModelChoice(MMoE(expert=(6, 5), gate=(3,), tower=())))
    assert single_task(mmoe, case.schema).model.tower == SingleTask(bottom=(6, 5), tower=())


def test_losses_that_join_tasks_are_left_out(case: Case) -> None:
    heads = ModelChoice(extra_heads=(DomainClassifier(),))
    run = make_run(model=heads, losses=(Supervised(by="task"), DomainAdversary()))
    assert own_losses(run, case.schema) == (Supervised(),) and single_task(run, case.schema).model.extra_heads == ()
    given = replace(case.schema, tasks=(Task("a"), Task("b", given="a")))
    assert own_losses(make_run(losses=(ESMM(orphans="negative"),)), given) == (Supervised(),)


def test_it_reads_the_same_batches_and_is_drawn_apart(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[str, list[int]] = {"run": [], "alone": []}
    first, original = dict[str, torch.Tensor](), transfer.Local.fit

    def spy(self: Any, model: Any, steps: int, **more: Any) -> Any:
        first.update((key, table.weight.detach().clone()) for key, table in model.tables.items())
        batch = self.data.batch

        def reads(rows: Any, features: Any = None) -> Any:
            read["alone" if "a/user/value" in model.tables else "run"].extend(rows.tolist())
            return batch(rows, features)

        monkeypatch.setattr(self.data, "batch", reads)
        found = original(self, model, steps, **more)
        monkeypatch.setattr(self.data, "batch", batch)
        return found

    monkeypatch.setattr(transfer.Local, "fit", spy)
    run = replace(make_run(), training=replace(case.run.training, evaluate_every=1000))
    again = case_of(run)
    model, _ = counterpart(again)
    steps = 30 * 128
    valid = set(case.encoded.split("valid").tolist())
    mine, other = ([row for row in read[name] if row not in valid][:steps] for name in ("run", "alone"))
    assert len(mine) == steps and mine == other
    assert first["a/user/value"].shape == first["shared/user/value"].shape
    alike = build(single_task(run, case.schema), case.schema).tables["a/user/value"].weight
    assert torch.equal(alike, first["shared/user/value"]), "of one seed both would begin alike, and agree by themselves"
    assert (first["a/user/value"] != alike).all()
    assert not model.training


def test_unequal_budgets_are_printed() -> None:
    long = make_run(training=Training(batch_size=128, steps=90, checkpoint_seconds=0))
    case = case_of(long, steps=20)
    (first, *_) = NegativeTransfer()(case)
    assert "Budgets are unequal: the single-task training had 20 steps and the run up to 90" in first.reading
    assert first.evidence["budget"] in first.reading
    (first, *_) = NegativeTransfer(steps=90)(case)
    assert "unequal" not in first.reading and "beginnings" not in first.reading
    (first, *_) = NegativeTransfer()(
        case_of(make_run(training=Training(batch_size=128, steps=5, checkpoint_seconds=0)))
    )
    assert "unequal" not in first.reading and "Less than one pass over the training rows" in first.reading
    stage = SimpleNamespace(
        run=replace(long, schedule=Online(), init="old"), bundle=SimpleNamespace(metrics={"steps": 70})
    )
    said = budget(stage, 90, 90, stopped=False)  # type: ignore[arg-type]
    assert "schedule `online` of the run took 70 steps" in said and "an older model's weights" in said
    same = SimpleNamespace(run=long, bundle=stage.bundle)
    assert budget(same, 90, 60, stopped=True) == "" and OneStage() == long.schedule  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ what it says
def with_scores(case: Case, scores: Scores) -> Case:
    case.__dict__["valid"] = scores
    return case


def spoilt(scores: Scores, strength: float, rows: Any = slice(None)) -> Scores:
    """Noise on the logits of ``a`` in some rows."""
    logits = np.array(scores.logits["a"], float)
    noise = np.random.default_rng(3).normal(size=len(logits))
    logits[rows] = logits[rows] + strength * logits.std() * noise[rows]
    return replace(scores, logits={**scores.logits, "a": logits})


def test_silent_where_nothing_is_lost_and_monotone_in_harm(case: Case) -> None:
    _, alone = counterpart(case)
    values = []
    for strength in (0.0, 0.5, 1.0, 3.0):
        found = {each.where: each for each in NegativeTransfer()(with_scores(case, spoilt(alone, strength)))}
        assert found["b"].value == 0 and found["b"].grade == "none"
        values.append(found["a"].value)
    assert values[0] == 0 and values == sorted(values) and values[-1] > 0.05
    assert found["a"].grade == "severe" and "`a` loses 0." in found["a"].reading and set(found) > {"a", "b"}
    quiet = NegativeTransfer()(with_scores(case, alone))
    assert [each.where for each in quiet] == ["a", "b"], "without harm there is one diagnosis per target"


def test_harm_in_one_domain_is_named(case: Case) -> None:
    _, alone = counterpart(case)
    mail = case.schema.domains.index("mail")
    found = NegativeTransfer()(with_scores(case, spoilt(alone, 5.0, np.asarray(case.valid.domain) == mail)))
    places = [each.where for each in found if each.grade != "none"]
    assert "a in mail" in places and "a in home" not in places
    (mail_one,) = (each for each in found if each.where == "a in mail")
    assert mail_one.remedies[0].measure == Measure("a", "auc", "mail") and "parts" in mail_one.reading


def test_labels_of_the_test_split_change_nothing() -> None:
    turned = (pl.when(pl.col("split") == "test").then(1 - pl.col(t)).otherwise(pl.col(t)).alias(t) for t in "ab")
    other = TABLE.with_columns(turned)
    said = [NegativeTransfer()(case_of(make_run(), table)) for table in (TABLE, other)]
    assert [(d.where, d.value, d.low, d.high) for d in said[0]] == [(d.where, d.value, d.low, d.high) for d in said[1]]
    assert (TABLE["a"] != other["a"]).sum() > 100


def test_evidence(case: Case) -> None:
    found: dict[str, Any] = {each.where: each for each in NegativeTransfer()(case)}
    for task in "ab":
        plots = found[task].evidence["plots"]
        assert all(to_plain(plot) for plot in plots)
        assert plots[0].names == ("all", "home", "mail")
        assert plots[0].values[0] == pytest.approx(-found[task].value)
        assert plots[0].low[0] == pytest.approx(-found[task].high)
        histograms = [plot for plot in plots if isinstance(plot, Histogram)]
        titles = [plot.title.removeprefix("Users and items in ") for plot in histograms]
        own, other = task, {"a": "b", "b": "a"}[task]
        assert titles == [f"single task/{own}", f"single task/{other}", "run/shared"]
        assert all(len(plot.edges) == 40 for plot in histograms)
        scalars = found[task].evidence["entanglement"]
        assert (
            scalars["models"]["run"]["entanglement"] == 1
            and 0.1 < scalars["models"]["single task"]["entanglement"] < 0.7
        )
    assert written(found["a"].evidence["single-task run"]).model.tables.kind == "separate"
    data = replace(case.run.data, features=(Feature("item"),))
    without = NegativeTransfer()(case_of(replace(case.run, data=data)))
    assert "no id feature that is the user" in without[0].evidence["entanglement"]


def test_remedies_are_runs_that_can_be_built(case: Case) -> None:
    found = remedies(case.run, Measure("a", "auc"))
    assert [each.name for each in found] == ["stem", "mmoe"]
    for each in found:
        assert each.run is not None and written(config.dumps(each.run)) == each.run
        assert replace(each.run, model=case.run.model, name="toy") == case.run, "one slot differs"
        build(each.run, case.schema)
    assert found[0].run is not None and found[0].run.model.tables == Views("per_task", width=4)
    several = make_run(model=ModelChoice(AME(expert=(8,), tower=(4,)), Views("several", widths=(2, 4))))
    (only,) = remedies(several, Measure("a", "auc"))
    assert only.run is not None and only.run.model.tables.width == 4
    build(only.run, case.schema)
    assert remedies(only.run, Measure("a", "auc")) == (), "it has them already"


def test_a_rare_target_has_no_remedy(case: Case) -> None:
    found = {each.where: each for each in NegativeTransfer(rare=10_000)(case)}
    positives = int(np.asarray(case.valid.labels["a"]).sum())
    assert found["a"].remedies == () and f"on {positives} positives, too few to try a remedy" in found["a"].reading
    found = {each.where: each for each in NegativeTransfer(rare=10)(case)}
    assert len(found["a"].remedies) == 2 and "too few" not in found["a"].reading


def test_a_real_task_beside_a_binary_one() -> None:
    rng = np.random.default_rng(5)
    table = TABLE.with_columns(pl.Series("spend", TABLE["a"] + rng.normal(size=ROWS)))
    run = make_run()
    case = case_of(replace(run, data=replace(run.data, tasks=(Task("a"), Task("spend", kind="real")))), table)
    found = {each.where: each for each in NegativeTransfer()(case)}
    _, alone = counterpart(case)
    rmse = [
        float(np.sqrt(np.mean((np.asarray(s.labels["spend"]) - s.logits["spend"]) ** 2))) for s in (alone, case.valid)
    ]
    assert found["spend"].value == pytest.approx((rmse[1] - rmse[0]) / rmse[0], abs=1e-6)
    assert found["spend"].unit == "RMSE, relative" and len(found["spend"].evidence["plots"]) == 1
    assert found["a"].evidence["entanglement"] == "There is no other binary task."


def test_where_it_has_nothing_to_say(case: Case) -> None:
    def stub(run: Run, schema: Schema = case.schema) -> Any:
        return SimpleNamespace(run=run, schema=schema)

    alone = single_task(case.run, case.schema)
    pictures = replace(case.schema, features=(*case.schema.features, Feature("photo", kind="image")))
    for asked, words in (
        (stub(case.run, replace(case.schema, tasks=(Task("a"),))), "one task"),
        (stub(alone), "share nothing"),
        (stub(make_run(schedule=Individual(by="task"))), "share nothing"),
        (stub(case.run, pictures), "`photo` is read by a backbone"),
    ):
        with pytest.raises(NotApplicable, match=words):
            require_shared(asked)
    require_shared(stub(make_run(schedule=Individual(by="domain"))))
    blind = with_scores(case, replace(case.valid, observed={t: np.zeros(len(case.valid.row), bool) for t in "ab"}))
    with pytest.raises(NotApplicable, match="no target has a metric"):
        NegativeTransfer()(blind)
