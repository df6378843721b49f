"""Shared-Bottom: the baseline that every multi-task tower is measured against.

Paper: "Multitask Learning", Caruana, Machine Learning 28, 1997, https://doi.org/10.1023/A:1007379606734.

Idea: all tasks read one hidden vector, computed once from the shared input, and differ only in a small tower on top of
it.  With one task it is the plain single-task network, so "what did sharing cost?" is answered by the same class.

How this differs: depth, ReLU and dropout are today's habits, not the paper's; the heads (the last Linear to a logit)
are the model's, not the tower's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.layers import mlp, mlp_width, require_dropout, require_positive, task_key
from unbraid.slots import TowerOutput
from unbraid.types import FORBID


def of_tasks(tasks: Sequence[str], views: Sequence[str]) -> bool:
    """Do these views belong to tasks: one per task, or one per task beside a shared one?"""
    return tuple(views) == tuple(tasks) or ("shared" in views and len(views) > 1)


def one_width(tower: str, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> int:
    """Width of the input of a tower that reads the shared view, or several views side by side.

    Raises:
        ValueError: the views are those of tasks.
    """
    if not views or of_tasks(tasks, views):
        raise ValueError(
            f"Tower `{tower}` reads one view, or several that belong to no task. Found views {tuple(views)}. "
            f"Set model.tables.kind to `shared` or `several`."
        )
    return sum(widths)


def side_by_side(hidden: Sequence[Tensor]) -> Tensor:
    """(B, sum of widths) all views."""
    return hidden[0] if len(hidden) == 1 else torch.cat(list(hidden), dim=1)


def task_towers(tasks: Sequence[str], width: int, hidden: Sequence[int], dropout: float) -> nn.ModuleDict:
    """One MLP per task, in the order of ``tasks``."""
    return nn.ModuleDict({task_key(task): mlp(width, hidden, dropout) for task in tasks})


class SharedBottomTower(nn.Module):
    """Module of `SharedBottom`.

    Attributes:
        widths: task -> H.
    """

    def __init__(self, config: SharedBottom, tasks: Sequence[str], width: int) -> None:
        super().__init__()
        shared = mlp_width(width, config.bottom)
        self.bottom = mlp(width, config.bottom, config.dropout)
        self.towers = task_towers(tasks, shared, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(shared, config.tower))

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) view becomes task -> (B, H); the trunk is the bottom's output (B, ``bottom[-1]``)."""
        x = side_by_side(hidden)
        h = self.bottom(x)
        return TowerOutput({task: self.towers[task_key(task)](h) for task in self.widths}, h, {})


@dataclass(frozen=True)
class BottomAndTower:
    """Settings of a tower that is one MLP, or one per task, below and a small MLP per task above.

    Args:
        bottom: widths of the layers below; tower: of the layers above.  Either may be empty.
        dropout: after every ReLU.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: str = field(default="", kw_only=True)
    bottom: tuple[int, ...] = (128, 64)
    tower: tuple[int, ...] = (64,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(bottom=self.bottom, tower=self.tower)
        require_dropout(self.dropout)


@dataclass(frozen=True)
class SharedBottom(BottomAndTower):
    """One MLP for all tasks, then a small one per task.  Keys as in `BottomAndTower`."""

    kind: Literal["shared_bottom"] = field(default="shared_bottom", kw_only=True)

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> SharedBottomTower:
        """The module for these tasks.  Raises ValueError if views belong to tasks."""
        return SharedBottomTower(self, tasks, one_width(self.kind, tasks, views, widths))
