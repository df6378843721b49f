"""The evidence beside the harm, and what a remedy must not take away from other tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from healthkit import make_case, make_run, make_table

from unbraid import report
from unbraid.analysis.conflict import Conflict
from unbraid.analysis.dominance import Dominance
from unbraid.bootstrap import Drawn
from unbraid.config import Run
from unbraid.diagnosis.case import Case, paired
from unbraid.diagnosis.diagnosis import Diagnosis, Report
from unbraid.diagnosis.interference import MOST_SITES, Interference, apart_by_depth, largest, needing_task, without
from unbraid.diagnosis.plots import Heat
from unbraid.encoders.table import Views
from unbraid.losses.mcc import MCC
from unbraid.losses.supervised import Supervised
from unbraid.towers.single_task import SingleTask
from unbraid.train import Local
from unbraid.types import Task

STEPS = 4


def case_of(**model: Any) -> Case:
    run = make_run()
    return make_case(
        make_table(), replace(run, model=replace(run.model, **model)) if model else run, steps=STEPS, rows=2000
    )


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of()


def drawn(case: Case) -> Any:
    return case.encoded.shuffled(case.sample("train"), 256, seed=case.seed)


@pytest.fixture(scope="module")
def found(case: Case) -> list[Diagnosis]:
    return Interference()(case)


def test_every_target_is_the_subject_of_its_own(found: list[Diagnosis]) -> None:
    assert sorted(each.subject for each in found) == ["buy", "click"]
    assert all(each.subject in each.where for each in found)


def test_a_gain_is_what_is_better_without_the_others_and_alone_of_two_is_without_one(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = np.linspace(-0.01, 0.01, 101)
    values = iter([0.6, 0.75, 0.55])  # together, click alone, buy alone

    def leads(self: Case, scores: Any) -> dict[str, tuple[str, Drawn]]:
        value = next(values)
        return {name: ("auc", Drawn(value, value + draws)) for name in ("click", "buy")}

    monkeypatch.setattr(Case, "leads", leads)
    drop, alone = Interference().gains(case)
    assert alone["click"] == pytest.approx((0.15, 0.15, 0.15)) and alone["buy"] == pytest.approx((-0.05,) * 3)
    assert drop == {("buy", "click"): alone["click"], ("click", "buy"): alone["buy"]}


def test_every_branch_trains_with_its_own_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, told = Local.fit, []

    def noted(self: Local, model: Any, steps: int, **more: Any) -> Any:
        told.append((dict(more["weights"]), more["seed"], next(model.parameters()).detach().clone()))
        return fit(self, model, steps, **more)

    monkeypatch.setattr(Local, "fit", noted)
    Interference().gains(case)
    weights, seeds, starts = zip(*told, strict=True)
    assert weights == ({"click": 1, "buy": 1}, {"click": 1, "buy": 0}, {"click": 0, "buy": 1})
    assert set(seeds) == {(case.seed,)}, "all see the same batches"
    assert all(torch.equal(start, next(case.model.parameters())) for start in starts), (
        "all begin with the trained weights"
    )


@pytest.mark.slow
def test_processes_find_the_same_gains(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Interference().gains(case)
    monkeypatch.setattr("unbraid.diagnosis.case.WORTH_PROCESSES", 0.0)
    asked = []
    fit_apart = Local.fit_apart

    def noted(self: Local, *given: Any, jobs: int = 1, **more: Any) -> Any:
        asked.append(jobs)
        return fit_apart(self, *given, jobs=jobs, **more)

    monkeypatch.setattr(Local, "fit_apart", noted)
    assert Interference().gains(replace(case, jobs=2)) == one
    assert asked == [1, 2]


def test_an_error_that_falls_is_a_gain() -> None:
    before, after = (("rmse", Drawn(value, np.full(10, value))) for value in (2.0, 1.5))
    assert paired(before, after) == pytest.approx((0.25, 0.25, 0.25))


def test_the_maps_of_layers_are_those_of_the_probes(case: Case, found: list[Diagnosis]) -> None:
    _, moved, apart = found[0].evidence["plots"]
    assert all(each.evidence is found[0].evidence for each in found), "computed once"
    sites: Any = Dominance(case.run, steps=STEPS)(None, case.schema, drawn(case)).values["sites"]
    assert moved.rows == tuple(sites) and moved.columns == ("click", "buy")
    assert np.array(moved.values) == pytest.approx(np.array([site["mean"] for site in sites.values()]))
    assert np.array(moved.values).sum(1) == pytest.approx(1)
    want: Any = Conflict(case.run, STEPS, case.seed)(case.model, case.schema, drawn(case)).values
    assert apart.rows == tuple(want["leaves"]) and apart.columns == ("click, buy",)
    assert np.array(apart.values)[:, 0] == pytest.approx(want["by_leaf"][:, 0, 1])
    assert set(apart.rows) == set(moved.rows), "both maps speak of what two tasks reach"
    assert all(isinstance(each, Heat) for each in found[0].evidence["plots"])


def test_a_report_keeps_them(found: list[Diagnosis]) -> None:
    whole = Report("toy", {}, {"click": "binary, target"}, {}, {}, diagnoses=(found[0],))
    read = report.load(report.dump(whole)).diagnoses[0]
    assert read.evidence["plots"] == found[0].evidence["plots"] and read.subject == found[0].subject


def test_where_nothing_is_shared_there_is_no_map_of_layers() -> None:
    case = case_of(tower=SingleTask(bottom=(8,), tower=(4,)), tables=Views(kind="separate", width=4))
    for each in Interference()(case):
        assert len(each.evidence["plots"]) == 1 and each.evidence["share"] == {}


def test_a_map_keeps_the_largest_layers_in_their_order() -> None:
    assert largest(["shared/item/value", "a", "b"], [5, 1, 3]) == ([0, 1, 2], "")
    sizes = np.random.default_rng(0).permutation(MOST_SITES + 5)
    names = [*(f"shared/{n}/value" for n in range(len(sizes))), "bottom.weight"]
    kept, said = largest(names, [*sizes + 100, 1])
    assert kept == [*(n for n, size in enumerate(sizes) if size >= 5), len(sizes)], "tables do not crowd layers out"
    assert said == f" The {MOST_SITES + 1} of {len(names)} tables and layers with the most parameters."


def test_of_many_pairs_those_that_lie_farthest_apart_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tuple(Task(f"t{n}", column="click") for n in range(3))
    made = make_case(make_table(), make_run(tasks=tasks), steps=STEPS, rows=2000)
    monkeypatch.setattr("unbraid.diagnosis.interference.MOST_PAIRS", 2)
    (shown,) = apart_by_depth(made)
    mean: Any = Conflict(made.run, STEPS, made.seed)(made.model, made.schema, drawn(made)).values["mean"]
    order = sorted(((0, 1), (0, 2), (1, 2)), key=lambda pair: mean[pair])
    assert shown.columns == tuple(f"t{i}, t{j}" for i, j in sorted(order[:2]))
    assert shown.note.endswith("The 2 of 3 pairs with the lowest cosine over all layers.")


# -------------------------------------------------------------------------------------------------------------- remedies
def run_of(*more: Task, **changes: Any) -> Run:
    return replace(make_run(tasks=(Task("click"), Task("hint", column="click", role="auxiliary"), *more)), **changes)


def test_a_task_that_nothing_needs_can_be_left_out() -> None:
    left, merged = without(run_of(Task("buy")), "hint", "click")
    assert left.run is not None and [task.name for task in left.run.data.tasks] == ["click", "buy"]
    assert left.name == "without_hint" and left.measure is not None and left.measure.metric == "auc"
    assert merged.name == "fork_merge" and "stays" not in merged.text


@pytest.mark.parametrize(
    ("run", "needing"),
    [
        (run_of(Task("buy", given="hint")), "buy"),
        (run_of(Task("buy"), losses=(Supervised(), MCC(tasks=("hint",)))), "losses.mcc"),
    ],
)
def test_a_task_that_something_needs_stays_and_the_text_says_so(run: Run, needing: str) -> None:
    (merged,) = without(run, "hint", "click")
    assert merged.name == "fork_merge" and merged.run is not None and merged.run.data == run.data
    assert f"`hint` itself stays: `{needing}` would lose" in merged.text
    assert needing_task(run, "buy") == [] and needing_task(run, "hint") == [needing]
