"""OL-AUX: an auxiliary task's weight grows while its gradient agrees with the target's, and shrinks while it does not.

Paper: Xingyu Lin, Harjatin Singh Baweja, George Kantor, David Held: *Adaptive Auxiliary Task Weighting for Reinforcement
Learning*.  NeurIPS 2019.

Idea.  Move the weights in the direction that lowers the target's loss some steps ahead.  As the code released with ForkMerge
(Jiang et al., NeurIPS 2023) approximates it::

    every N batches:   w_k <- w_k + beta sum of cos(g_k, g_tgt) over them         w starts at 1, the target's stays 1
    d = g_tgt + sum_k w_k g_k

How this differs.  The original, from memory, has inner products of the target's gradient with the auxiliary's *of the step
before*, and is not offered.  That code knows three tasks; here are any number, each with a count of the batches that had it and
a target.  Weights stay at or above `OLAUX.floor`.  They multiply the auxiliary task's own parameters' gradient, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unbraid.optim.aggregated import Rule, View
from unbraid.optim.weighted import Setting
from unbraid.types import FORBID, State

BIBTEX = """
@inproceedings{lin2019adaptive,
  title     = {Adaptive Auxiliary Task Weighting for Reinforcement Learning},
  author    = {Lin, Xingyu and Baweja, Harjatin Singh and Kantor, George and Held, David},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2019},
}
"""


@dataclass(frozen=True)
class OLAUX:
    """OL-AUX, in the form with cosines.

    Args:
        targets: objectives or tasks; empty means the tasks of role ``target``.
        beta: step size of the weights; every: batches between two changes of a weight (N).
        floor: no weight falls below it.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["ol_aux"] = field(default="ol_aux", kw_only=True)
    targets: tuple[str, ...] = ()
    beta: float = 1e-4
    every: int = 5
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"Parameter `beta` should be positive. Found {self.beta}.")
        if self.every < 1:
            raise ValueError(f"Parameter `every` should be at least 1. Found {self.every}.")
        if not self.floor <= 1:
            raise ValueError(f"Parameter `floor` should be at most 1, where weights begin. Found {self.floor}.")

    def bind(self, setting: Setting) -> BoundOLAUX:
        """The rule of one training.  Raises ValueError if no objective is a target."""
        setting.require_targets(self.targets)
        return BoundOLAUX(self, setting)


@dataclass
class BoundOLAUX(Rule):
    """See `OLAUX`.

    Attributes:
        kept: objective -> its weight; sums: objective -> sum of its cosines since the last change, and of how many batches.
    """

    weighs_own: ClassVar[bool] = True
    config: OLAUX
    setting: Setting
    kept: dict[str, float] = field(default_factory=dict)
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)

    def weights(self, view: View) -> Tensor:
        """1 for targets, w for others, before w moves."""
        target = self.setting.mark(self.config.targets, view.names)
        used = torch.tensor([self.kept.setdefault(name, 1.0) for name in view.names], dtype=torch.float64)
        if target.any():
            cosines = view.cosines(target)
            for at, name in enumerate(view.names):
                if not target[at]:
                    self._add(name, float(cosines[at]))
        return used

    def _add(self, name: str, cosine: float) -> None:
        total, count = self.sums.get(name, (0.0, 0))
        total, count = total + cosine, count + 1
        if count == self.config.every:
            self.kept[name] = max(self.kept[name] + self.config.beta * total, self.config.floor)
            total, count = 0.0, 0
        self.sums[name] = total, count

    def told(self) -> Mapping[str, float]:
        """objective -> its weight."""
        return dict(self.kept)

    def state_dict(self) -> State:
        """Weights, and the sums since their last change."""
        return {"kept": dict(self.kept), "sums": dict(self.sums)}

    def load_state_dict(self, state: State) -> None:
        """Continue from `state_dict`."""
        self.kept = dict(state["kept"])
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
