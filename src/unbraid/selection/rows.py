"""What all selections share: tasks, and which validation rows stand for the target and which for the source.

Target rows are those of the given domains, whether they have labels or not, or, without any, those without a label of the
task; source rows are all other rows with a label of the task.  Labels of target rows are not read, except by what says
``oracle``.  A task with ``given`` is left out: without labels nobody knows of which target rows it speaks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy

from unbraid.slots import Judged
from unbraid.types import FIRST_VALUE, FORBID, Schema, Scores, Task

Array = np.ndarray


@dataclass(frozen=True)
class OnTarget:
    """What all selections have.

    Args:
        domains: names of the target's domains; empty: rows without a label of the task are the target.
        tasks: whose predictions are judged, by their mean; empty: all of role ``target`` that fit.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    lower_is_better: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = False
    oracle: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("binary", "multiclass")
    kind: str
    domains: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    def chosen(self, schema: Schema) -> tuple[Task, ...]:
        """The tasks.  Raises ValueError where one does not fit, or none does."""
        able = [task.name for task in schema.tasks if task.kind in self.kinds and not task.given]
        names = self.tasks or [n for n in able if schema.task(n).role == "target"]
        if not names or not set(names) <= set(able):
            raise ValueError(
                f"Selection `{self.kind}` judges {' and '.join(self.kinds)} tasks without `given`: {able or 'there is none'}. "
                f"Found `tasks` {list(self.tasks)}."
            )
        return tuple(schema.task(name) for name in names)

    def target(self, task: Task, scores: Scores) -> Array:
        """(n,) target rows of positive weight.  Raises ValueError where there are fewer than two, or a domain is not known."""
        known = scores.domains[FIRST_VALUE:]
        if not set(self.domains) <= set(known):
            raise ValueError(
                f"Selection `{self.kind}`: `domains` should be among {list(known)}. Found {list(self.domains)}."
            )
        rows = np.flatnonzero(self._inside(task, scores) & _counts(scores))
        if len(rows) < 2:
            where = f"of domains {list(self.domains)}" if self.domains else f"without a label of task `{task.name}`"
            raise ValueError(
                f"Selection `{self.kind}` needs validation rows of the target. Found {len(rows)} {where}. Name its domains "
                "(`selection.domains`), or withhold its labels (`data.withhold`)."
            )
        return rows

    def source(self, task: Task, scores: Scores) -> Array:
        """(n,) labelled rows that are not of the target.  Raises ValueError where there are fewer than two."""
        known = np.asarray(scores.observed[task.name], bool)
        rows = np.flatnonzero(known & ~self._inside(task, scores) & _counts(scores))
        if len(rows) < 2:
            raise ValueError(
                f"Selection `{self.kind}` needs validation rows of the source with labels of task `{task.name}`. Found "
                f"{len(rows)}."
            )
        return rows

    def _inside(self, task: Task, scores: Scores) -> Array:
        if not self.domains:
            return ~np.asarray(scores.observed[task.name], bool)
        return np.isin(scores.domain, [scores.domains.index(name) for name in self.domains])

    def check(self, scores: Scores, schema: Schema) -> None:
        """See `unbraid.slots.Selection`."""
        for task in self.chosen(schema):
            self.target(task, scores)

    def mean(self, schema: Schema, of: Callable[[Task], float | Judged]) -> Judged:
        """The mean of one number per task; where one has none, neither has the mean."""
        found = {task.name: of(task) for task in self.chosen(schema)}
        judged = {name: one if isinstance(one, Judged) else Judged(one) for name, one in found.items()}
        numbers = {f"{name}.{key}": value for name, one in judged.items() for key, value in one.numbers.items()}
        if why := "; ".join(f"{name}: {one.why}" for name, one in judged.items() if one.value is None):
            return Judged(None, why, numbers)
        return Judged(float(np.mean([one.value for one in judged.values()])), "", numbers)


def _counts(scores: Scores) -> Array:
    """(N,) bool: rows of positive weight."""
    return np.ones(len(scores.row), bool) if scores.weight is None else np.asarray(scores.weight) > 0


def log_probabilities(logits: Array) -> Array:
    """(n, C) float64 logarithms of the classes' probabilities, from (n, C) logits or (n,) of a binary task."""
    z = np.asarray(logits, np.float64)
    return scipy.special.log_softmax(np.stack([np.zeros_like(z), z], 1) if z.ndim == 1 else z, axis=1)
