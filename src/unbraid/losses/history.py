"""The supervised loss of the history encoders' second heads, added to each task's objective.

A search keeps a few events, and only those learn from a task's own loss.  A second head predicts the task from a softmax over
*all* events (extras ``history.TASK`` of the model), so that its loss gives every event a gradient.  What it has learned is
thrown away with it; the tables keep it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from unbraid.losses.supervised import Bound, Supervised
from unbraid.types import FORBID, Batch, Losses, Output, Schema


@dataclass(frozen=True)
class HistoryLoss:
    """Loss of the second heads of a history encoder with ``auxiliary`` layers.

    Args:
        weight: of this loss beside the task's own.
        by: which objectives it adds to, as in `unbraid.losses.supervised.Supervised`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["history"] = field(default="history", kw_only=True)
    weight: float = 1.0
    by: Literal["task", "domain", "task@domain"] = "task"

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"Parameter `weight` should be positive. Found {self.weight}.")

    def bind(self, schema: Schema) -> BoundHistoryLoss:
        """The term for the tasks of a schema."""
        return BoundHistoryLoss(Supervised(by=self.by).bind(schema), self.weight)


@dataclass(frozen=True)
class BoundHistoryLoss:
    """See `HistoryLoss`."""

    trains: ClassVar[tuple[str, ...]] = ()  # second heads, and no task's own logits
    supervised: Bound
    weight: float

    @property
    def needs(self) -> tuple[str, ...]:
        """The extras that it reads."""
        return tuple(f"history.{task.name}" for task in self.supervised.schema.tasks)

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """objective -> scalar, for the objectives with an observed row."""
        logits = {task.name: output.extras[f"history.{task.name}"] for task in self.supervised.schema.tasks}
        losses = self.supervised(replace(output, logits=logits), batch, step)
        return {objective: loss * self.weight for objective, loss in losses.items()}
