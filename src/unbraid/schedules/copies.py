"""Several whole models as one module: each row goes to its domain's, or each task is read from its own.

What `unbraid.schedules.individual` and `unbraid.schedules.post_train` return.  It is saved, loaded, evaluated and predicts as
one model does; it needs as much memory as all of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unbraid import sharding
from unbraid.layers import REFUSES, by_domain, task_key
from unbraid.render import markdown
from unbraid.schedules.domains import READING, Domains, falls, judge, number, table, values
from unbraid.slots import Session
from unbraid.types import Batch, Output, Schema

By = Literal["task", "domain"]
Unknown = Literal["mean", "root", "error"]
LOOKS = 10  # at a domain's validation rows
KNOWN = {"binary": ("auc", "gauc", "logloss", "ece", "accuracy"), "multiclass": ("accuracy", "logloss", "ece"),
         "real": ("rmse", "mae")}  # fmt: skip
ROOT = "root"  # key of the model from before there were several


def domain_key(code: int) -> str:
    """Name of a domain's model."""
    return f"domain{code}"


class Copies(nn.Module):
    """Models of one shape, one per task or per domain.

    Args:
        schema: what they read and predict.
        by: what each belongs to.
        models: `task_key` or `domain_key` -> model; ``root``, if it was kept.
        unknown: who predicts rows of a domain without a model: the ``mean`` of all domains' logits, the ``root``, or nobody,
            which is an ``error``.

    Raises:
        ValueError: there is no model, or no root that ``unknown`` asks for.
    """

    def __init__(self, schema: Schema, by: By, models: Mapping[str, nn.Module], unknown: Unknown = "mean") -> None:
        super().__init__()
        self.schema, self.by, self.unknown = schema, by, unknown
        self.models = nn.ModuleDict(dict(models))
        self.gives: frozenset[str] = frozenset()
        self.codes = [code for code in range(len(schema.domains)) if domain_key(code) in models]
        if not set(models) - {ROOT}:
            raise ValueError(f"There is no model of a {by}.")
        if unknown == ROOT and ROOT not in models:
            raise ValueError("`unknown` is `root`, and no model from before there were several was kept.")

    @classmethod
    def of(cls, model: nn.Module, by: By, names: Collection[str], unknown: Unknown) -> Copies:
        """Copies of one model, those whose weights have these names."""
        found = (re.match(r"models\.([^.]+)\.", name) for name in names)
        keys = dict.fromkeys(match[1] for match in found if match)
        return cls(cast(Any, model).schema, by, {key: copy.deepcopy(model) for key in keys}, unknown)

    @property
    def no_graph(self) -> str:
        """Why there is no graph of it (`unbraid.export`)."""
        return REFUSES if self.by == "domain" and self.unknown == "error" else ""

    @property
    def tables(self) -> dict[str, Any]:
        """Every model's embedding tables."""
        each = ((key, cast(Any, model).tables) for key, model in self.models.items())
        return {f"{key}/{name}": table for key, tables in each for name, table in tables.items()}

    def forward(self, batch: Batch) -> Output:
        """Logits and hidden vectors of each row's, or each task's, own model.  There are no extras and no common trunk.

        Raises:
            ValueError: rows of a domain without a model, and ``unknown`` is ``error``.
        """
        return self._of_tasks(batch) if self.by == "task" else self._of_domains(batch)

    def _of_tasks(self, batch: Batch) -> Output:
        logits, hidden = {}, {}
        for task in self.schema.tasks:
            found = self.models[task_key(task.name)](batch)
            logits[task.name], hidden[task.name] = found.logits[task.name], found.hidden[task.name]
        return Output(logits, hidden, _no_trunk)

    def _of_domains(self, batch: Batch) -> Output:
        tasks = [task.name for task in self.schema.tasks]

        def of(code: int, mine: Tensor) -> list[Tensor]:
            whole = mine.shape[0] == batch.row.shape[0]
            found = self._of_domain(code, batch if whole else batch.select(mine))
            return [found[which][name] for which in (0, 1) for name in tasks]

        apart = sharding.divided(self)
        found = by_domain(batch.domain, len(self.schema.domains), of, empty=min(self.codes), together=apart)
        logits, hidden = (dict(zip(tasks, part, strict=True)) for part in (found[: len(tasks)], found[len(tasks) :]))
        return Output(logits, hidden, _no_trunk)

    def _of_domain(self, code: int, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Logits and hidden vectors of rows of one domain."""
        key = domain_key(code)
        if key not in self.models and self.unknown == "error":
            raise ValueError(
                f"{len(batch):,} rows are of domain `{self.schema.domains[code]}`, which has no model, and `unknown` of the "
                "schedule is `error`. Leave these rows out, or train with another `unknown`."
            )
        if key in self.models or self.unknown == ROOT:
            found = self.models[key if key in self.models else ROOT](batch)
            return found.logits, found.hidden
        each = [model(batch) for name, model in self.models.items() if name != ROOT]
        tasks = [task.name for task in self.schema.tasks]
        return ({t: torch.stack([one.logits[t] for one in each]).mean(0) for t in tasks},
                {t: torch.stack([one.hidden[t] for one in each]).mean(0) for t in tasks})  # fmt: skip


def _no_trunk() -> Tensor:
    raise ValueError("Several models have no common trunk.")


# ------------------------------------------------------------------------------------------------------------- training
class Fits:
    """Trainings of one model per domain or task, for a schedule.

    Args:
        model: one of them, as yet untrained.

    Raises:
        ValueError: by domain with heads per domain, or no domain has a label; by task with losses by domain.
    """

    def __init__(self, session: Session, by: By, model: nn.Module) -> None:
        self.session, self.by, self.domains = session, by, Domains.of(session)
        self.tasks = [task.name for task in session.schema.tasks]
        names = set(session.schema.domains)
        if by == "task" and any(objective in names and objective not in self.tasks for objective in session.objectives):
            raise ValueError(
                "A model per task needs losses that tell tasks apart, and those by domain are sums over tasks. Set `by` of the "
                "losses to `task`."
            )
        if by == "domain" and getattr(model, "heads_by", "task") == "domain":
            raise ValueError("A model per domain needs no head per domain. Set `model.heads.by` to `task`.")
        if by == "domain" and not self.domains.codes:
            raise ValueError("No domain has a training row with a label.")
        codes = self.domains.codes
        self.names = self.tasks if by == "task" else [session.schema.domains[code] for code in codes]
        self.keys = [task_key(task) for task in self.tasks] if by == "task" else [domain_key(code) for code in codes]

    def steps(self, steps: int, divided: bool) -> list[int]:
        """Steps of each model: all of them, or its share: by rows among domains, equal among tasks."""
        rows = [1] * len(self.tasks)
        if self.by == "domain":
            rows = [len(self.domains.train[code]) for code in self.domains.codes]
        ends = [round(steps * sum(rows[:i]) / sum(rows)) for i in range(len(rows) + 1)]
        return [ends[i + 1] - ends[i] if divided else steps for i in range(len(rows))]

    def train(self, model: nn.Module, steps: Sequence[int], stage: int) -> dict[str, nn.Module]:
        """Key -> its copy of the model, trained alone: which others there are, and their order, does not matter."""
        trained = {}
        for place, (key, count) in enumerate(zip(self.keys, steps, strict=True)):
            mine, _ = self.session.fork(model, {})
            one = self._task if self.by == "task" else self._domain
            trained[key] = one(place, mine, count, stage) if count else mine
        return trained

    def _task(self, place: int, model: nn.Module, steps: int, stage: int) -> nn.Module:
        weights = {task.name: task.weight if i == place else 0.0 for i, task in enumerate(self.session.schema.tasks)}
        look = replace(self.session.look, metric=self._metric(self.tasks[place]))
        return self.session.fit(model, steps, weights=weights, seed=[stage, place], look=look)[0]

    def _domain(self, place: int, model: nn.Module, steps: int, stage: int) -> nn.Module:
        code = self.domains.codes[place]
        rows, valid = self.domains.train[code], self.domains.valid[code]
        # a domain's epoch may be one step: looks are spread over its steps instead
        look = replace(self.session.look, rows=valid, every=-(-steps // LOOKS) if len(valid) else -1)
        return self.session.fit(model, steps, rows=rows, seed=[stage, code], look=look)[0]

    def _metric(self, task: str) -> str:
        """The run's metric, of one task; its kind's own where the run's is another kind's."""
        kind = self.session.schema.task(task).kind
        name = self.session.metric.rpartition(".")[2]
        return f"{task}.{name if name in KNOWN[kind] else KNOWN[kind][0]}"

    def values(self, module: nn.Module) -> dict[str, float | None]:
        """Name of each domain, or task -> the run's selection metric on its validation rows."""
        if self.by == "domain":
            return values(self.session, module)
        if not len(self.session.rows("valid")):
            return {}
        scores = self.session.score(module)
        return {task: judge(scores, self.session.schema, self._metric(task))[0] for task in self.tasks}

    def record(self, steps: Sequence[int], module: nn.Module) -> dict[str, Any]:
        """What all schedules with such trainings write down."""
        counts = self.domains.counts() if self.by == "domain" else {}
        return {"by": self.by, "steps": dict(zip(self.names, steps, strict=True)), "rows": counts,
                "without": self.domains.without,
                "parameters": sum(p.numel() for p in module.parameters()), "metric": self.session.metric,
                "lower is better": falls(self.session), "validation": self.values(module)}  # fmt: skip


def report(title: str, record: Mapping[str, Any], columns: Mapping[str, Mapping[str, float | None]]) -> str:
    """The record as Markdown: what was trained, and a table of domains or tasks."""
    lines = [
        "",
        f"{title}: {len(record['steps'])} models, one per {record['by']}; {record['parameters']:,} parameters in all.",
    ]
    steps = {name: f"{count:,}" for name, count in record["steps"].items()}
    if record["by"] == "task":
        rows = [[task, *(number(column.get(task)) for column in columns.values()), steps[task]] for task in steps]
        found = markdown(["task", *columns, "steps"], rows, left=1)
        return "\n".join([*lines, "", f"Validation, {record['metric']}.", "", found])
    if none := [f"{name} ({why})" for name, why in record["without"].items()]:
        lines.append(f"Without a model: {', '.join(none)}.")
    found = table(record["rows"], columns, record["lower is better"], {"steps": steps})
    return "\n".join([*lines, "", f"Validation, {record['metric']}. {READING}", "", found])
