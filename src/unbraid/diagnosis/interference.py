"""Do tasks take from each other?  Copies of the trained model train on for a few steps without some of the losses.

Idea.  A correlation of gradients says little about harm (see `unbraid.analysis.conflict`).  This asks for the harm itself: from
the trained weights, a copy trains on with all losses, another without those of task k, another with those of t alone, all on
the same batches.  With P_t the leading metric on validation rows, of the same rows and paired over users::

    drop(k, t)  = P_t(without k) - P_t(all)         > 0: k costs t something
    alone(t)    = P_t(t alone)   - P_t(all)         > 0: the others together do

Sharing that does no harm gives values at or below 0: a task that loses its companions begins to overfit.  Who does it is then
told apart: an auxiliary task that costs a target something is harmful whatever it moves; a target whose gradients make up most
of what moves the shared parameters (`unbraid.analysis.dominance`) drowns the others; else the tasks want different things of the
same parameters.

Shares of updates by layer and cosines of gradients by layer stand beside as evidence.  Neither is a finding: a layer may be one
task's, and two gradients may point apart, without anybody losing by it.

Steps are few, so a gain is a lower bound of what a whole training without the culprit would show.  ours; no paper has this test.
It is the first round of the ForkMerge schedule with every subset's branch, and without the merge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar

import numpy as np

from unbraid.analysis.conflict import Conflict
from unbraid.analysis.dominance import Dominance
from unbraid.config import Run
from unbraid.diagnosis.case import Case, names_of, paired
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Heat
from unbraid.optim.adatask import AdaTask
from unbraid.schedules.fork_merge import ForkMerge
from unbraid.towers.experts import MMoE
from unbraid.types import Batch, Finding

Gain = tuple[float, float, float]
PAGE = "diagnosis.md#do-tasks-take-from-each-other"
PAPER = "https://arxiv.org/abs/2301.12618"
MOST_SITES, MOST_PAIRS = 16, 15  # tables, layers and pairs of tasks in a map that can be read
PROBED = 8  # batches of gradients


@dataclass(frozen=True)
class Interference:
    """See the module's docstring.

    Args:
        usual, severe: gains of a leading metric (AUC; of RMSE the relative decrease) without one task, the best of several.
        usual_alone, severe_alone: gains of training alone, which loses all companions and is below 0 where sharing does no harm.
        explains: a culprit's share of what being alone would gain, from which it is named.
        drowns: its share of all updates of shared parameters from which a target counts as drowning the others.
    """

    name: ClassVar[str] = "interference"
    title: ClassVar[str] = "Do tasks take from each other?"
    page: ClassVar[str] = PAGE
    usual: float = 0.006
    severe: float = 0.012
    usual_alone: float = 0.002
    severe_alone: float = 0.008
    explains: float = 0.5
    drowns: float = 0.8

    def __call__(self, case: Case) -> list[Diagnosis]:
        """A diagnosis per target that would gain, and one for all if none would.  Raises NotApplicable for one task."""
        if len(case.schema.tasks) < 2:
            raise NotApplicable("there is one task, which shares with nobody")
        if case.run.training.mix is not None:
            raise NotApplicable("the batches of the run are mixed (`training.mix`), and a short training here is not")
        drop, alone = self.gains(case)
        updates = moved(case)
        shares = shares_of(updates)
        shown = (gains_of(case, drop, alone, shares), *by_depth(updates), *apart_by_depth(case))
        evidence = {"plots": shown, "share": shares}
        found = [
            self._of(case, task.name, drop, alone, shares, evidence) for task in case.targets if task.name in alone
        ]
        return sorted(found, key=lambda each: -each.severity)

    def gains(self, case: Case) -> tuple[dict[tuple[str, str], Gain], dict[str, Gain]]:
        """(k, t) -> what t gains without k; t -> what it gains alone.  Both with paired intervals on validation rows."""
        tasks = [task.name for task in case.schema.tasks]
        weights = {task.name: task.weight for task in case.schema.tasks}
        left_out = tasks if len(tasks) > 2 else []
        lone = [task.name for task in case.targets]
        branches = [
            weights,
            *({**weights, k: 0.0} for k in left_out),
            *({name: weight if name == t else 0.0 for name, weight in weights.items()} for t in lone),
        ]
        names = ["all tasks", *(f"without {k}" for k in left_out), *(f"{t} alone" for t in lone)]
        found = dict(zip(names, case.branches(branches, names), strict=True))

        def gain(branch: str, task: str) -> Gain | None:
            return paired(found["all tasks"].get(task), found[branch].get(task))

        drop: dict[tuple[str, str], Gain] = {}
        alone: dict[str, Gain] = {}
        for k in left_out:
            for task in lone:
                if task != k and (more := gain(f"without {k}", task)) is not None:
                    drop[k, task] = more
        for task in lone:
            if (more := gain(f"{task} alone", task)) is not None:
                alone[task] = more
        if len(tasks) == 2:  # without the other one is alone
            drop = {(k, t): each for t, each in alone.items() for k in tasks if k != t}
        return drop, alone

    def _of(
        self, case: Case, task: str, drop: Mapping[tuple[str, str], Gain], alone: Mapping[str, Gain],
        shares: Mapping[str, float], evidence: Mapping[str, Any],
    ) -> Diagnosis:  # fmt: skip
        """What to say of one target."""
        by = {k: gain for (k, t), gain in drop.items() if t == task}
        culprit = max(by, key=lambda k: by[k][1]) if by else ""
        most = max(alone[task][0], *(gain[0] for gain in by.values())) if by else alone[task][0]
        named = bool(culprit) and by[culprit][1] > self.usual and by[culprit][0] >= self.explains * most
        roles = {each.name: each.role for each in case.schema.tasks}
        value, low, high = by[culprit] if named else alone[task]
        usual, severe = (self.usual, self.severe) if named else (self.usual_alone, self.severe_alone)
        common: dict[str, Any] = {
            "value": value, "low": low, "high": high, "usual": usual, "severe": severe,
            "unit": "gain on validation rows", "paper": PAPER, "page": PAGE, "subject": task, "evidence": evidence,
        }  # fmt: skip
        steps = f"{case.steps} further steps"
        if named and roles[culprit] == "auxiliary":
            reading = f"{steps} without the auxiliary task `{culprit}` leave `{task}` {value:+.4f} better than with it"
            return Diagnosis(
                "auxiliary", f"{culprit} on {task}", reading=reading,
                remedies=without(case.run, culprit, task), **common,
            )  # fmt: skip
        if named and shares.get(culprit, 0.0) >= self.drowns:
            reading = (
                f"`{culprit}` makes up {shares[culprit]:.0%} of what moves the shared parameters, and {steps} without it leave "
                f"`{task}` {value:+.4f} better than with it"
            )
            return Diagnosis(
                "dominance", f"{culprit} over {task}", reading=reading, remedies=balanced(case.run, task), **common
            )
        what = f"without `{culprit}`" if named else "alone"
        where = f"{task} and {culprit}" if named else f"{task} and the others"
        reading = (
            f"{steps} of `{task}` {what} leave it {value:+.4f} better than with all tasks: they want different things"
        )
        if low <= usual:
            reading = (
                f"{steps} of `{task}` alone leave it {value:+.4f} [{low:+.4f}, {high:+.4f}] against all tasks together"
            )
        return Diagnosis("conflict", where, reading=reading, remedies=apart(case.run, task), **common)


# ------------------------------------------------------------------------------------------------------------- evidence
def moved(case: Case) -> Finding | None:
    """Who moves what is shared (`Dominance`); None where nothing is.

    A fresh model trains, because what a trained one still moves says little of what moved it.
    """
    try:
        return Dominance(case.run, steps=min(case.steps, 30))(None, case.schema, drawn(case))
    except ValueError:  # no parameter is shared, or the update cannot be watched
        return None


def drawn(case: Case) -> Iterator[Batch]:
    """Batches of training rows."""
    return case.encoded.shuffled(case.sample("train"), min(case.run.training.batch_size, 2048), seed=case.seed)


def shares_of(updates: Finding | None) -> dict[str, float]:
    """Task -> its share of accumulated updates, mean over what is shared; empty where nothing is."""
    if updates is None:
        return {}
    found: Mapping[str, Any] = updates.values
    return {name: float(share) for name, share in zip(found["objectives"], found["all"]["mean"], strict=True)}


def gains_of(
    case: Case, drop: Mapping[tuple[str, str], Gain], alone: Mapping[str, Gain], shares: Mapping[str, float]
) -> Heat:
    """The map of gains."""
    targets, tasks = list(alone), [task.name for task in case.schema.tasks]
    values = [[drop[k, t][0] if (k, t) in drop else None for t in targets] for k in tasks]
    return Heat(
        "What a target gains when a task's loss is left out", "target", "left out", "gain (AUC, or relative RMSE)",
        (*(f"{k} ({shares[k]:.0%} of updates)" if k in shares else k for k in tasks), "all others"), tuple(targets),
        (*map(tuple, values), tuple(alone[t][0] for t in targets)), scale="diverging", centre=0.0,
        note=f"{case.steps} steps from the trained weights, validation rows. Above 0: harm.",
    )  # fmt: skip


def by_depth(updates: Finding | None) -> tuple[Heat, ...]:
    """The map of shares of updates, layers by tasks."""
    if updates is None:
        return ()
    found: Mapping[str, Any] = updates.values
    names, sites = list(found["sites"]), list(found["sites"].values())
    kept, said = largest(names, [site["parameters"] for site in sites])
    return (
        Heat(
            "Who moves which layer", "task", "layer or table, the model's bottom first", "share of accumulated updates",
            tuple(names[n] for n in kept), tuple(found["objectives"]), tuple(tuple(sites[n]["mean"]) for n in kept), centre=0.0,
            note=f"{found['steps']} steps of a fresh model; even shares are {1 / len(found['objectives']):.2f}.{said}",
        ),
    )  # fmt: skip


def apart_by_depth(case: Case) -> tuple[Heat, ...]:
    """The map of cosines of gradients, layers by pairs of tasks; none where no pair shares a layer."""
    try:
        found = Conflict(case.run, min(case.steps, PROBED), case.seed)(case.model, case.schema, drawn(case)).values
    except ValueError:  # fewer than two objectives
        return ()
    if not found["leaves"]:
        return ()
    kept, said = largest(found["leaves"], found["parameters"])
    steps, names = len(found["cosine"]), found["objectives"]
    pairs = list(combinations(range(len(names)), 2))
    if len(pairs) > MOST_PAIRS:
        said += f" The {MOST_PAIRS} of {len(pairs)} pairs with the lowest cosine over all layers."
        lowest = sorted(pairs, key=lambda pair: np.nan_to_num(found["mean"][pair], nan=np.inf))[:MOST_PAIRS]
        pairs = sorted(lowest)
    return (
        Heat(
            "Where gradients point apart", "pair of tasks", "layer or table, the model's bottom first", "cosine of gradients",
            tuple(found["leaves"][n] for n in kept), tuple(f"{names[i]}, {names[j]}" for i, j in pairs),
            tuple(tuple(found["by_leaf"][n, i, j] for i, j in pairs) for n in kept), scale="diverging", centre=0.0,
            note=f"Mean of {steps} batches of training rows, trained weights. Below 0: apart, which need not harm.{said}",
        ),
    )  # fmt: skip


def largest(names: Sequence[str], parameters: Sequence[int]) -> tuple[list[int], str]:
    """Places of the `MOST_SITES` tables and as many layers with the most parameters, in order; what is left out, in words."""
    kept: list[int] = []
    for table in (True, False):
        places = [n for n, name in enumerate(names) if ("/" in name) == table]  # view/vocabulary/role
        kept += sorted(places, key=lambda n: -parameters[n])[:MOST_SITES]
    said = f" The {len(kept)} of {len(names)} tables and layers with the most parameters."
    return sorted(kept), said if len(kept) < len(names) else ""


# ------------------------------------------------------------------------------------------------------------- remedies
def without(run: Run, culprit: str, task: str) -> tuple[Remedy, ...]:
    """Leave an auxiliary task out, or let validation rows decide its weight; the latter alone where something needs the task."""
    measure, needing = Measure.of(run.data, task), needing_task(run, culprit)
    text = "Branches with and without each auxiliary task, merged by their validation score."
    if needing:
        text += f" {names_of([culprit])} itself stays: {names_of(needing)} would lose what it depends on."
    merged = Remedy(
        "fork_merge", text, "schedule", replace(run, name=f"{run.name}_fork_merge", schedule=ForkMerge()), measure=measure,
        page="methods/fork_merge.md",
    )  # fmt: skip
    if needing:
        return (merged,)
    kept = tuple(each for each in run.data.tasks if each.name != culprit)
    left = replace(run, name=f"{run.name}_without_{culprit}", data=replace(run.data, tasks=kept))
    text = f"Leave the task {names_of([culprit])} out: nothing else depends on it."
    return Remedy(f"without_{culprit}", text, "data.tasks", left, measure=measure), merged


def needing_task(run: Run, name: str) -> list[str]:
    """What cannot do without a task: tasks that are `given` it, losses and keys of the model that name it."""
    found = [task.name for task in run.data.tasks if task.given == name]
    named = {loss.kind: (*getattr(loss, "tasks", ()), getattr(loss, "task", "")) for loss in run.losses}
    found += [f"losses.{kind}" for kind, tasks in named.items() if name in tasks]
    return found + (["model.classes"] if name in run.model.classes else [])


def balanced(run: Run, task: str) -> tuple[Remedy, ...]:
    """Accumulators per task, so that one task's size moves no other's step."""
    if isinstance(run.update, AdaTask):
        return ()
    measure = Measure.of(run.data, task)
    settings = {
        name: getattr(run.update, name)
        for name in ("lr", "betas", "eps", "weight_decay", "table_lr", "table_weight_decay")
    }
    return (
        Remedy(
            "adatask", "One optimiser state per task: the size of one task's gradients no longer sets the others' step.",
            "update", replace(run, name=f"{run.name}_adatask", update=AdaTask(**settings)), measure=measure,
            page="methods/adatask.md",
        ),
    )  # fmt: skip


def roomier(tower: Any) -> Any:
    """A tower's configuration with twice the width, and at least one layer of each task's own; itself if it has no widths."""
    changed: dict[str, tuple[int, ...]] = {}
    for name in ("bottom", "expert"):
        if widths := tuple(getattr(tower, name, ())):
            changed = {name: tuple(2 * width for width in widths)}
            if hasattr(tower, "tower"):
                changed["tower"] = tuple(2 * width for width in tower.tower) or (widths[-1],)
            break
    return replace(tower, **changed) if changed else tower


def apart(run: Run, task: str) -> tuple[Remedy, ...]:
    """More room; experts that tasks mix for themselves."""
    tower = run.model.tower
    widths = tuple(getattr(tower, "bottom", ()) or getattr(tower, "expert", ()) or (64, 32))
    tables, measure = run.model.tables, Measure.of(run.data, task)
    if tables.kind != "shared":
        return ()
    wide = replace(tables, width=4 * tables.width)
    room = replace(run.model, tables=wide, tower=roomier(tower))
    text = f"Tables {wide.width} wide, and a network of twice the width with layers of each task's own: room for both."
    found = [Remedy("roomier", text, "model", replace(run, name=f"{run.name}_roomier", model=room), measure=measure)]
    if not isinstance(tower, MMoE):
        experts = MMoE(
            experts=5, expert=widths, gate=(), tower=getattr(tower, "tower", ()), dropout=getattr(tower, "dropout", 0.0)
        )
        found.append(
            Remedy(
                "mmoe", "Experts that every task mixes by a gate of its own.", "model.tower",
                replace(run, name=f"{run.name}_mmoe", model=replace(run.model, tower=experts)), measure=measure,
                page="methods/mmoe.md",
            )
        )  # fmt: skip
    return tuple(found)
