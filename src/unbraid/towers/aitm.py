"""AITM: adaptive information transfer along a sequence of tasks.

Paper: "Modeling the Sequential Dependence among Audience Multi-step Conversions with Multi-task Learning in Targeted
Display Advertising", Xi, Chen, Yan, Zhang, Zhu, Zhuang, Chen, KDD 2021, https://doi.org/10.1145/3447548.3467071,
https://arxiv.org/abs/2105.08489.

Idea: conversions come in steps (shown, clicked, applied, approved), and later ones are rare.  Each task has a network of
its own on the shared input, and task i also receives what task i - 1 has found out.  An attention over the two, row by
row, decides how much of it to take.  For tasks in the order of the schema::

    q^i = bottom^i(x)        h^0 = q^0        p^i = Linear^i(h^(i-1))                        for i >= 1
    a^i = softmax over u in (p^i, q^i) of <K u, Q u> / sqrt(D)
    h^i = a^i_p V p^i + a^i_q V q^i                     hidden^i = tower^i(h^i)

h^(i-1) is the fused state, so task i hears of every task before it and of none behind it: its loss writes the bottoms
0 .. i.  K, Q and V are linear maps with bias, one of each for all steps.

How this differs:

- The paper's loss has a second part, a *calibrator* that penalises a later step's probability above an earlier one's.
  It is no part of this tower (nor of the AITM released with STEM, which the sizes and the sharing of K, Q, V follow).
- A tower per task on h^i (``tower``); empty for a head on h^i itself.
- With one task there is nothing to transfer and no K, Q, V: a plain MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.layers import average, mlp_width, task_key
from unbraid.slots import TowerOutput
from unbraid.towers.mlp import BottomAndTower, one_width, side_by_side, task_towers

BIBTEX = """
@inproceedings{xi2021aitm,
  title     = {Modeling the Sequential Dependence among Audience Multi-step Conversions with Multi-task Learning in
               Targeted Display Advertising},
  author    = {Xi, Dongbo and Chen, Zhen and Yan, Peng and Zhang, Yinger and Zhu, Yongchun and Zhuang, Fuzhen and
               Chen, Yu},
  booktitle = {Proceedings of the 27th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  pages     = {3745--3755},
  year      = {2021},
  doi       = {10.1145/3447548.3467071},
}
"""


class Transfer(nn.Module):
    """Attention of a task over what came before and what it found itself: K, Q and V of all steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, before: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Two (B, D) become their fusion (B, D) and the weight of ``before`` in it (B,)."""
        pair = torch.stack([before, own], dim=1)
        scores = (self.key(pair) * self.query(pair)).sum(dim=2) / pair.shape[2] ** 0.5
        weights = scores.softmax(dim=1)
        return (weights.unsqueeze(2) * self.value(pair)).sum(dim=1), weights[:, 0]


class AITMTower(nn.Module):
    """Module of `AITM`.

    Attributes:
        widths: task -> H, in the order of the steps.
        gives: names of its extras.
    """

    def __init__(self, config: AITM, tasks: Sequence[str], width: int) -> None:
        super().__init__()
        found = mlp_width(width, config.bottom)
        self.bottoms = task_towers(tasks, width, config.bottom, config.dropout)
        self.links = nn.ModuleDict({task_key(task): nn.Linear(found, found) for task in tasks[1:]})
        self.transfer = Transfer(found) if len(tasks) > 1 else None
        self.towers = task_towers(tasks, found, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(found, config.tower))
        self.gives = tuple(f"aitm.transfer.{task}" for task in tasks[1:])

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) view becomes task -> (B, H).

        The trunk is the mean of the bottoms' outputs (B, D); extras hold how much each task takes from the one before
        it, ``aitm.transfer.TASK`` (B,), for all but the first.
        """
        x = side_by_side(hidden)
        found = [bottom(x) for bottom in self.bottoms.values()]
        fused, weights = found[:1], []
        for link, own in zip(self.links.values(), found[1:], strict=True):
            assert self.transfer is not None
            h, weight = self.transfer(link(fused[-1]), own)
            fused.append(h)
            weights.append(weight)
        states = {task: self.towers[task_key(task)](h) for task, h in zip(self.widths, fused, strict=True)}
        return TowerOutput(states, partial(average, found), dict(zip(self.gives, weights, strict=True)))


@dataclass(frozen=True)
class AITM(BottomAndTower):
    """One MLP per task; each task but the first also takes from the task before it, in the order of the schema.

    Keys as in `BottomAndTower`, the transfer between the two.
    """

    kind: Literal["aitm"] = field(default="aitm", kw_only=True)

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> AITMTower:
        """The module for these tasks.  Raises ValueError if views belong to tasks."""
        return AITMTower(self, tasks, one_width(self.kind, tasks, views, widths))
