"""STEM-AL: main tasks listen to auxiliary ones, and no loss writes another task's tables.

Paper: "Ads Recommendation in a Collapsed and Entangled World", Pan, Xue, Wang, Yu, Liu, Quan, Qiu, Liu, Xiao, Jiang,
KDD 2024, https://arxiv.org/abs/2403.00793.

Idea: some tasks are there only to help others.  Every task has tables of its own and none are shared
(`unbraid.encoders.table.Views`, kind ``separate``).  An auxiliary task reads its own expert alone.  A main task mixes its
own expert with those of all auxiliary tasks, and its loss stops at theirs::

    e^k      = expert^k(x^k)
    z^k      = e^k                                                                  k auxiliary
    z^k      = sum_n softmax(G^k(x^k))_n [e^k, stopgrad(e^j) for j auxiliary]_n     k main
    hidden^k = tower^k(z^k)

So a main task cannot spoil what an auxiliary task knows, nor the other way round.  Main tasks do not read each other.
Without an auxiliary task it is `unbraid.towers.single_task`.

How this differs: the paper's body was not read.  The form above follows a third party's description, **unverified**; the
gate's input (the task's own view, so that no gradient leaves through it), one expert per task, and all sizes are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from unbraid.layers import average, mlp_width, require_dropout, require_positive, task_key
from unbraid.slots import TowerOutput
from unbraid.towers import ame
from unbraid.towers.experts import gate_logits, mix
from unbraid.towers.mlp import task_towers
from unbraid.types import FORBID

BIBTEX = ame.BIBTEX


class STEMALTower(nn.Module):
    """Module of `STEMAL`.

    Args:
        config: sizes; tasks: in the order of the views; width: of each view.
        main: the main tasks.

    Attributes:
        widths: task -> H, in the order of the views.
        auxiliary: the other tasks.
        gives: names of its extras.
    """

    def __init__(self, config: STEMAL, tasks: Sequence[str], width: int, main: Sequence[str]) -> None:
        super().__init__()
        mixed = mlp_width(width, config.expert)
        self.auxiliary = tuple(task for task in tasks if task not in main)
        listening = [t for t in tasks if t in main] if self.auxiliary else []  # a gate over one would never train
        pool = 1 + len(self.auxiliary)
        self.experts = task_towers(tasks, width, config.expert, config.dropout)
        self.gates = nn.ModuleDict(
            {task_key(task): gate_logits(width, config.gate, pool, config.dropout) for task in listening}
        )
        self.towers = task_towers(tasks, mixed, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(mixed, config.tower))
        self.gives = tuple(f"stem_al.gate.{task}" for task in listening)

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) view per task becomes task -> (B, H).

        Nothing is shared, so the trunk is the mean of the experts (B, D): a term that trains on it would write all tasks.
        Extras hold the gates of main tasks, ``stem_al.gate.TASK`` (B, 1 + auxiliary tasks): the own expert comes first.
        """
        views = dict(zip(self.widths, hidden, strict=True))
        found = {task: self.experts[task_key(task)](x) for task, x in views.items()}
        heard = [found[task].detach() for task in self.auxiliary]
        states, gates = {}, {}
        for task, own in found.items():
            key = task_key(task)
            if key in self.gates:
                gates[f"stem_al.gate.{task}"] = weights = self.gates[key](views[task]).softmax(dim=1)
                own = mix(weights, [own, *heard])
            states[task] = self.towers[key](own)
        return TowerOutput(states, partial(average, list(found.values())), gates)


@dataclass(frozen=True)
class STEMAL:
    """One expert per task on tables of its own; main tasks also read those of auxiliary tasks, without writing them.

    Args:
        main: names of the main tasks; empty: those of role ``target`` (all, if views belong to domains).
        expert: widths of each task's expert.
        gate: widths of a gate's hidden layers; tower: widths of each task's own layers.  Any may be empty.
        dropout: after every ReLU.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    reads_roles: ClassVar[bool] = True
    kind: Literal["stem_al"] = field(default="stem_al", kw_only=True)
    main: tuple[str, ...] = ()
    expert: tuple[int, ...] = (128, 64)
    gate: tuple[int, ...] = ()
    tower: tuple[int, ...] = (64,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(expert=self.expert, gate=self.gate, tower=self.tower)
        require_dropout(self.dropout)

    def build(
        self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int], targets: Sequence[str] | None = None
    ) -> STEMALTower:
        """The module for these tasks.

        Args:
            tasks, views, widths: as for every tower.
            targets: tasks of role ``target``; None: all of them.

        Raises:
            ValueError: views are not one per task, in the order of the tasks, all of one width; or ``main`` names others.
        """
        if tuple(views) != tuple(tasks) or len(set(widths)) != 1:
            raise ValueError(
                f"Tower `stem_al` reads one view per task, {tuple(tasks)}, all of one width, and no shared one. "
                f"Found {dict(zip(views, widths, strict=True))}. Set model.tables.kind to `separate`, and "
                "model.tables.widths and model.experts to [], which go with other views."
            )
        if unknown := [name for name in self.main if name not in tasks]:
            raise ValueError(f"Parameter `main` should name some of {tuple(tasks)}. Found {unknown}.")
        return STEMALTower(self, tasks, widths[0], self.main or (tasks if targets is None else targets))
