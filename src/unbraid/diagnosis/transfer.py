"""Would a task do better alone?  The run against its single-task counterpart: negative transfer, measured and not guessed.

Papers: Liangcai Su et al.: *STEM*, AAAI 2024, https://arxiv.org/abs/2308.13537 (the question, and users by relative positive
feedback: `unbraid.analysis.feedback`; tables by distances: `unbraid.analysis.entanglement`).

Idea.  The counterpart is the same run with tables, network and loss of its own for every task, so that nothing is shared.  It is
trained once, on the same batches, for as many steps.  With P the leading metric on the validation sample::

    loss = P(counterpart) - P(run)          > 0: sharing costs the task something; paired interval over users

for every target, in every domain, and among users by the positives that they give to the target and to the densest other task.

How this differs.  The counterpart has the run's widths; one that reads several sets of tables gets one as wide as all of them
together.  Losses that join tasks or read a head of none are left out, and an update that weighs tasks against each other becomes
the joint one: alone there is nothing to weigh.  Its first weights are drawn from another seed.  If it had another budget than
the run, the reading says so.  Levels are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from scipy.stats import norm
from torch import nn

from unbraid import config
from unbraid.analysis.entanglement import Entanglement
from unbraid.analysis.feedback import Partition
from unbraid.bootstrap import Drawn
from unbraid.bundle import EVALUATION_ROWS, build
from unbraid.config import Aggregated, Run, Weighted
from unbraid.diagnosis.case import REPLICATES, Case, paired
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.interference import apart
from unbraid.diagnosis.plots import Bars, Histogram
from unbraid.evaluate import Slice, lead_metric, replicate
from unbraid.layers import device_of
from unbraid.losses.esmm import ESMM
from unbraid.losses.focal import Focal
from unbraid.losses.margin import Margin
from unbraid.losses.supervised import Supervised
from unbraid.optim.joint import Joint
from unbraid.preflight import bound_terms
from unbraid.schedules.individual import Individual
from unbraid.schedules.one_stage import OneStage
from unbraid.towers.single_task import SingleTask
from unbraid.towers.stem import STEM
from unbraid.train import Local, predict
from unbraid.types import Finding, Schema, Scores

PAGE = "diagnosis.md#would-a-task-do-better-alone"
PAPER = "https://arxiv.org/abs/2308.13537"
UNITS = {"auc": "AUC", "accuracy": "accuracy", "rmse": "RMSE, relative"}

Loss = tuple[float, float, float]  # value and the ends of its interval


@dataclass(frozen=True)
class NegativeTransfer:
    """See the module's docstring.

    Args:
        usual, severe: losses of a leading metric (AUC, accuracy; of RMSE the relative increase).
        steps: the counterpart trains for no more steps than this or `Case.steps`, whichever is more.
        rare: a target with fewer positives in the validation sample has no remedy: what helps it cannot be told from chance.
    """

    name: ClassVar[str] = "negative_transfer"
    title: ClassVar[str] = "Would a task do better alone?"
    page: ClassVar[str] = PAGE
    usual: float = 0.005
    severe: float = 0.02
    steps: int = 0
    rare: int = 100

    def __call__(self, case: Case) -> list[Diagnosis]:
        """A diagnosis per target, and one for every domain or group of users that loses beyond what many looks find by chance.

        Raises:
            NotApplicable: nothing is shared, a backbone of pictures or texts would be trained again, or no metric can be had.
        """
        require_shared(case)
        alone = single_task(case.run, case.schema)
        case.watcher.stage("single-task training", 0, 0)
        model, note = train_alone(case, alone, max(self.steps, case.steps))
        scores = predict(model, case.batches("valid", EVALUATION_ROWS), case.schema)
        pair = [replicate(each, case.schema, replicates=REPLICATES, seed=case.seed) for each in (scores, case.valid)]
        others = densest_other(case)
        found: list[Diagnosis] = []
        for task in case.targets:
            found += self._of(case, task.name, pair, scores, model, alone, note, others.get(task.name, ""))
        if not found:
            raise NotApplicable("no target has a metric on the sample of validation rows")
        return sorted(found, key=lambda each: (-each.severity, -each.value))[:20]

    def _of(
        self, case: Case, task: str, pair: list[dict[tuple[str, str], Slice]], scores: Scores, model: nn.Module, alone: Run,
        note: str, other: str,
    ) -> list[Diagnosis]:  # fmt: skip
        """What to say of one target."""
        whole = loss(pair, task, "")
        if whole is None:
            return []
        parts = {f"in {domain}": each for domain in domains_of(pair, task) if (each := loss(pair, task, domain))}
        users = by_feedback(case, task, other, scores)
        few = (pair[1][task, ""].positives or self.rare) < self.rare
        metric = lead_metric(pair[1][task, ""].metrics)
        common: dict[str, Any] = {
            "usual": self.usual, "severe": self.severe, "unit": UNITS[metric], "paper": PAPER, "page": PAGE,
        }  # fmt: skip
        evidence: dict[str, Any] = {"single-task run": config.dumps(alone), "budget": note}
        evidence["plots"] = bars(task, metric, whole, parts, users)
        finding = entangled(case, task, other, model)
        if isinstance(finding, Finding):
            evidence["plots"] += histograms(finding)
            evidence["entanglement"] = plain(finding)
        else:
            evidence["entanglement"] = finding
        positives = f" on {pair[1][task, ''].positives} positives, too few to try a remedy" if few else ""

        def said(where: str, value: Loss, shown: Mapping[str, Any], domain: str = "", aside: str = "") -> Diagnosis:
            name = f"{task} {where}".rstrip()
            reading = f"`{task}` {where}".rstrip() + sentence(value, UNITS[metric]) + aside + note
            tried = () if few else remedies(case.run, Measure(task, metric, domain))
            return Diagnosis(self.name, name, value[0], low=value[1], high=value[2], reading=reading, subject=task,
                             remedies=tried, evidence=shown, **common)  # fmt: skip

        every = {**parts, **users}
        diagnoses = [said("", whole, evidence, aside=positives)]
        for where, value in every.items():
            aside = f" (the interval allows for {len(every)} parts)"
            part = said(where, widened(value, len(every)), {}, where[3:] if where in parts else "", aside)
            diagnoses += [part] if part.grade != "none" else []
        return diagnoses


# ---------------------------------------------------------------------------------------------------------- the counterpart
def require_shared(case: Case) -> None:
    """Raises NotApplicable where there is nothing to compare."""
    run = case.run
    if len(case.schema.tasks) < 2:
        raise NotApplicable("there is one task, which is alone already")
    if isinstance(run.model.tower, SingleTask) or (isinstance(run.schedule, Individual) and run.schedule.by == "task"):
        raise NotApplicable("the tasks share nothing: the run is its own single-task counterpart")
    if content := [f.name for f in case.schema.features if f.has_content]:
        raise NotApplicable(
            f"feature `{content[0]}` is read by a backbone, which a single-task training would train again"
        )


def sizes(run: Run) -> dict[str, Any]:
    """Widths of the run's networks, whatever its tower calls them: ``bottom``, ``tower``, ``dropout``."""
    tower = run.model.tower
    bottom = getattr(tower, "bottom", None)
    return {
        "bottom": tuple(getattr(tower, "expert", (64, 32)) if bottom is None else bottom),
        "tower": tuple(getattr(tower, "tower", ())), "dropout": getattr(tower, "dropout", 0.0),
    }  # fmt: skip


def single_task(run: Run, schema: Schema) -> Run:
    """The run with nothing shared between tasks."""
    model, tables = run.model, run.model.tables
    separate = replace(tables, kind="separate", by="task", width=sum(tables.widths) or tables.width, widths=())
    heads = replace(model.heads, unknown="mean") if model.heads.unknown == "root" else model.heads
    model = replace(model, tower=SingleTask(**sizes(run)), tables=separate, experts=(), extra_heads=(), heads=heads)
    update = run.update
    if isinstance(update, Weighted | Aggregated):
        update = Joint(**{f.name: getattr(update, f.name) for f in fields(Joint) if f.name != "kind"})
    return replace(
        run, name=f"{run.name}_single_task", model=model, losses=own_losses(run, schema), update=update,
        schedule=OneStage(), init="",
    )  # fmt: skip


def own_losses(run: Run, schema: Schema) -> tuple[Any, ...]:
    """The run's losses but for those that join tasks or read a head of no task."""
    kept = [loss for loss in run.losses if not isinstance(loss, ESMM) and not reads_extra_head(loss.bind(schema))]
    taught = any(isinstance(loss, Supervised | Focal | Margin) for loss in kept)
    return (*kept,) if taught else (Supervised(), *kept)


def reads_extra_head(term: Any) -> bool:
    """Does a bound loss read what `ModelChoice.extra_heads` give?"""
    return any(name.startswith("extra_heads.") for name in term.needs)


def train_alone(case: Case, alone: Run, most: int) -> tuple[nn.Module, str]:
    """The counterpart, and what is to be said of the budgets: they differ, or are small; else ""."""
    schema = case.schema
    device = device_of(case.model)
    model = build(replace(alone, seed=alone.seed + 1), schema).to(device)
    session = Local(
        case.encoded, bound_terms(alone, schema, model), alone.update, alone.training, {t.name: 1.0 for t in schema.tasks},
        alone.seed, device=str(device), augment=alone.augment, average=alone.average, selection=alone.selection,
    )  # fmt: skip
    total = session.total_steps()
    chooses = session.look.keep_best or alone.average is not None
    steps = min(total, most)
    session.fit(model, steps, look=None if chooses else replace(session.look, every=-1))
    few = steps * alone.training.batch_size < len(session.rows("train"))
    note = ". Less than one pass over the training rows: this compares beginnings" if few else ""
    return model.eval(), budget(case, total, steps, stopped=session.steps < steps) + note


def budget(case: Case, total: int, steps: int, stopped: bool) -> str:
    """In words, how the counterpart's budget differs from the run's; "" if it does not."""
    run, differs = case.run, []
    if steps < total and not stopped:
        differs.append(f"the single-task training had {steps:,} steps and the run up to {total:,}")
    if not isinstance(run.schedule, OneStage):
        spent = case.bundle.metrics.get("steps")
        differs.append(
            f"schedule `{run.schedule.kind}` of the run took {spent or 'other'} steps, the single-task training up to {steps:,}"
        )
    if run.init:
        differs.append("the run began with an older model's weights")
    return f". Budgets are unequal: {'; '.join(differs)}" if differs else ""


# ----------------------------------------------------------------------------------------------------------------- measures
def loss(pair: list[dict[tuple[str, str], Slice]], task: str, domain: str) -> Loss | None:
    """Loss of the run against the counterpart, from (counterpart, run); None where the metric is undefined."""
    lead: list[tuple[str, Drawn] | None] = []
    for found in pair:
        metrics = found[task, domain].metrics if (task, domain) in found else {}
        lead.append((lead_metric(metrics), metrics[lead_metric(metrics)]) if metrics else None)
    gain = paired(*lead)
    return None if gain is None else (-gain[0], -gain[2], -gain[1])


def domains_of(pair: list[dict[tuple[str, str], Slice]], task: str) -> list[str]:
    """Domains with rows of a task, if there are several."""
    names = [domain for name, domain in pair[0] if name == task and domain]
    return names if len(names) > 1 else []


def densest_other(case: Case) -> dict[str, str]:
    """Binary target -> the other binary task with the most positives in the training sample."""
    labels, observed = case.encoded.labels(case.sample("train"))
    binary = [task.name for task in case.schema.tasks if task.kind == "binary"]
    counts = {name: int((observed[name] & (labels[name] == 1)).sum()) for name in binary}
    others = {task.name: [name for name in binary if name != task.name] for task in case.targets}
    return {name: max(rest, key=lambda n: counts[n]) for name, rest in others.items() if name in binary and rest}


def by_feedback(case: Case, task: str, other: str, alone: Scores) -> dict[str, Loss]:
    """Group of users -> loss there; empty without users or another task of the kind."""
    if not other or "user" not in case.encoded.columns:
        return {}
    probe = Partition(task, other, replicates=REPLICATES, seed=case.seed)
    try:
        counted = probe.count(case.schema, case.batches("train"))
    except ValueError:  # no training row has a user
        return {}
    values = probe(counted, {"alone": alone, "run": case.valid}, case.schema, against="alone").values
    of = values["tasks"][task]["models"]["run"]
    found = zip(values["buckets"], of["gain"], of["low"], of["high"], strict=True)
    return {
        f"of users {name}": (-gain, -high, -low) for name, gain, low, high in found if np.isfinite([gain, low, high]).all()
    }  # fmt: skip


def widened(value: Loss, parts: int) -> Loss:
    """The interval of one of several parts that are looked at together (Bonferroni, by the normal law)."""
    factor = norm.ppf(1 - 0.025 / parts) / norm.ppf(0.975)
    middle, low, high = value
    return middle, middle - factor * (middle - low), middle + factor * (high - middle)


def entangled(case: Case, task: str, other: str, alone: nn.Module) -> Finding | str:
    """Distances of users and items in conflict, or why there are none."""
    ids = {f.name: f for f in case.schema.features if f.kind == "id"}
    user = next((name for name, f in ids.items() if f.source == case.run.data.user), "")
    items = [name for name in ids if name != user]
    if not other or not user or not items:
        what = "no other binary task" if not other else "no id feature that is the user, or none beside it"
        return f"There is {what}."
    item = max(items, key=lambda name: case.schema.sizes[ids[name].vocab])
    probe = Entanglement(task, other, user=user, item=item, replicates=REPLICATES, seed=case.seed)
    try:
        frequent = probe.count(case.schema, case.batches("train"))
        models = {"single task": alone, "run": case.model}
        return probe(frequent, models, case.schema, case.batches("valid"), against="single task")
    except ValueError as why:
        return str(why)


# ------------------------------------------------------------------------------------------------------ what is said of them
def sentence(value: Loss, unit: str) -> str:
    """The loss in words."""
    sign = 1 if value[0] > 0 else -1
    low, high = sorted(sign * end for end in value[1:])
    what = "loses" if sign > 0 else "gains"
    return f" {what} {abs(value[0]):.4f} [{low:+.4f}, {high:+.4f}] {unit} by sharing, against single-task training"


def bars(
    task: str, metric: str, whole: Loss, parts: Mapping[str, Loss], users: Mapping[str, Loss]
) -> tuple[Bars | Histogram, ...]:
    """Gains (losses turned round) of a task: all rows and domains; groups of users."""
    y, found = f"gain over single-task training ({UNITS[metric]})", list[Bars | Histogram]()
    shown = (
        (f"What sharing did to {task}", "rows", {"all": whole, **{n.removeprefix("in "): v for n, v in parts.items()}}),
        (f"What sharing did to {task}, by users' feedback", "positives of the user",
         {name.removeprefix("of users "): each for name, each in users.items()}),
    )  # fmt: skip
    for title, x, values in shown:
        if values:
            gain, low, high = (tuple(-each[place] for each in values.values()) for place in (0, 2, 1))
            found.append(Bars(title, y, tuple(values), gain, low, high, x=x, note="Below 0: negative transfer."))
    return tuple(found)


def histograms(finding: Finding) -> tuple[Histogram, ...]:
    """Distances in the tables that the run's and the counterpart's tasks read."""
    values, found = finding.values, list[Histogram]()
    for name in dict.fromkeys(f"{m}/{view}" for m, of in values["models"].items() for view in of["views"]):
        table = values["tables"][name]
        counts = {"all pairs": table["counts"], **dict(zip(values["sets"], table["conflict"], strict=True))}
        shares = {label: tuple(each / each.sum()) for label, each in counts.items() if each.sum()}
        if table["edges"][0] < table["edges"][-1]:
            found.append(Histogram(f"Users and items in {name}", "distance", tuple(table["edges"]), shares, y="share of pairs",
                                   note="A table that keeps both tastes has its pairs in conflict at the sides."))  # fmt: skip
    return tuple(found)


def plain(finding: Finding) -> dict[str, Any]:
    """The scalars of an entanglement as plain values."""
    models = finding.values["models"]
    kept = {name: {part: float(of[part]) for part in ("entanglement", "low", "high")} for name, of in models.items()}
    agreement = {name: tuple(map(float, of["agreement"])) for name, of in models.items()}
    return {"reading": finding.reading, "models": kept, "agreement": agreement}


# ------------------------------------------------------------------------------------------------------------------ remedies
def remedies(run: Run, measure: Measure) -> tuple[Remedy, ...]:
    """Tables and experts per task; experts that tasks mix."""
    shared = run.model.tables.kind == "shared"
    mixed = tuple(each for each in apart(run, measure.task) if shared and each.name == "mmoe")
    found = tuple(replace(each, measure=measure) for each in mixed)
    if isinstance(run.model.tower, STEM) and run.model.tables.kind == "per_task":
        return found
    made = sizes(run)
    tower = STEM(shared_experts=1, task_experts=1, expert=made["bottom"] or (64, 32), gate=(32,), tower=made["tower"],
                 dropout=made["dropout"])  # fmt: skip
    old = run.model.tables
    tables = replace(old, kind="per_task", by="task", widths=(), width=max(old.widths, default=old.width))
    model = replace(run.model, tower=tower, tables=tables, experts=())
    text = "Tables and experts of each task beside shared ones: a task reads all of them and writes its own."
    named = replace(run, name=f"{run.name}_stem", model=model)
    return (Remedy("stem", text, "model", named, measure=measure, page="methods/stem.md"), *found)
