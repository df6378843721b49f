"""Single task: networks that share nothing, trained in one run.

Paper: none.  It is the reference of the question "did sharing hurt?".

Idea: every task has tables, a bottom and a tower of its own, and reads nothing else (`unbraid.encoders.table.Views`, kind
``separate``)::

    hidden^k = tower^k(bottom^k(x^k))

Under the joint update this *is* T Shared-Bottom models of one task each: no parameter has gradients of two losses, and
Adam treats every parameter alone.  One run reads the data once, sees the same batches for all tasks, and ends in one
bundle and one table of metrics.

How it differs from T runs: early stopping goes by one number and so keeps one step for all tasks; clipping by a global
norm (``update.clip_norm``) scales all tasks by one factor; dropout and unknown ids are drawn from one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import Tensor, nn

from unbraid.layers import average, mlp_width, task_key
from unbraid.slots import TowerOutput
from unbraid.towers.mlp import BottomAndTower, task_towers


class SingleTaskTower(nn.Module):
    """Module of `SingleTask`.

    Attributes:
        widths: task -> H, in the order of the views.
    """

    def __init__(self, config: SingleTask, tasks: Sequence[str], width: int) -> None:
        super().__init__()
        found = mlp_width(width, config.bottom)
        self.bottoms = task_towers(tasks, width, config.bottom, config.dropout)
        self.towers = task_towers(tasks, found, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(found, config.tower))

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) view per task becomes task -> (B, H).

        Nothing is shared, so the trunk is the mean of the bottoms' outputs (B, D): a term that trains on it would write
        all tasks.
        """
        found = [bottom(x) for bottom, x in zip(self.bottoms.values(), hidden, strict=True)]
        states = {task: self.towers[task_key(task)](h) for task, h in zip(self.widths, found, strict=True)}
        return TowerOutput(states, partial(average, found), {})


@dataclass(frozen=True)
class SingleTask(BottomAndTower):
    """One network per task, on tables of its own.  Keys as in `BottomAndTower`; both parts are the task's own."""

    kind: Literal["single_task"] = field(default="single_task", kw_only=True)

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> SingleTaskTower:
        """The module for these tasks.

        Raises:
            ValueError: views are not one per task, in the order of the tasks, all of one width.
        """
        if tuple(views) != tuple(tasks) or len(set(widths)) != 1:
            raise ValueError(
                f"Tower `single_task` reads one view per task, {tuple(tasks)}, all of one width, and no shared one. "
                f"Found {dict(zip(views, widths, strict=True))}. Set model.tables.kind to `separate`."
            )
        return SingleTaskTower(self, tasks, widths[0])
