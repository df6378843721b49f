"""Selection by the target's own labels: how much a criterion without labels could have gained, and nothing to report as a result.

    the metric, of labelled validation rows of the target's domains

Official code of domain adaptation often keeps the checkpoint that is best on target *test* labels.  Numbers that were
selected so say nothing of what is reached without labels, which is the task.  So this has to be asked for by its name; the
log, ``metrics.json``, ``report.md`` and comparisons say that it was; and it never sees the test split, which stays a fair
test of the selected model.

It needs labels of the target in the validation split that training does not see.  ``data.withhold`` hides those of both, so
withhold the training split's alone, which a split by column can name: ``withhold = "site = 'new' and part = 'train'"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from unbraid.evaluate import evaluate, lower_is_better
from unbraid.selection.rows import Array, OnTarget
from unbraid.slots import Judged
from unbraid.types import FORBID, Schema, Scores, Task


@dataclass(frozen=True)
class Oracle(OnTarget):
    """A metric of labelled validation rows of the target.

    Args:
        domains: names of the target's domains; at least one.
        tasks: see `OnTarget`.
        metric: its mean over the tasks.

    Raises:
        ValueError: there is no domain.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    oracle: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("binary", "multiclass", "real")
    kind: Literal["oracle"] = field(default="oracle", kw_only=True)
    metric: str = "accuracy"

    @property
    def lower_is_better(self) -> bool:  # type: ignore[override]
        """As the metric says."""
        return lower_is_better(self.metric)

    def check(self, scores: Scores, schema: Schema) -> None:
        """See `unbraid.slots.Selection`."""
        if not self.domains:
            raise ValueError("Selection `oracle` reads labels of the target: name its domains (`selection.domains`).")
        for task in self.chosen(schema):
            known = np.asarray(scores.observed[task.name], bool)[self.target(task, scores)]
            if not known.any():
                raise ValueError(
                    f"Selection `oracle` reads validation labels of task `{task.name}` in domains {list(self.domains)}, and "
                    "there are none: `data.withhold` hides those of training and validation. Withhold those of training alone "
                    "(by a split column PART: \"DOMAIN = 'x' and PART = 'train'\"). The test split is not read."
                )

    def __call__(self, scores: Scores, schema: Schema) -> Judged:
        """See `unbraid.slots.Selection`.  Raises ValueError where a task has no such metric."""
        inside: dict[str, Array] = {}
        for task in self.chosen(schema):
            inside[task.name] = np.zeros(len(scores.row), bool)
            inside[task.name][self.target(task, scores)] = True
        few = replace(scores, observed={name: np.asarray(scores.observed[name]) & rows for name, rows in inside.items()},
                      logits={name: scores.logits[name] for name in inside})  # fmt: skip
        found = evaluate(few, schema, replicates=0)

        def judge(task: Task) -> Judged:
            if self.metric not in found[task.name]:
                have = [
                    name for name, value in found[task.name].items() if isinstance(value, dict) and "value" in value
                ]
                raise ValueError(
                    f"`selection.metric` is `{self.metric}`, which task `{task.name}` has not. It has {have}."
                )
            one = found[task.name][self.metric]
            return Judged(one["value"], one.get("why", ""))

        return self.mean(schema, judge)
