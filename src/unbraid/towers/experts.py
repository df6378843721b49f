"""MMoE: multi-gate mixture of experts.

Paper: "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", Ma, Zhao, Yi, Chen,
Hong, Chi, KDD 2018, https://doi.org/10.1145/3219819.3220007.

Idea: several experts read the same input, and each task mixes them with its own softmax gate on that input, so that
tasks which disagree can use different experts.  The experts, and the embedding below them, are written by every task::

    g^k = softmax(G^k(x))        z^k = sum_n g^k_n e_n(x)        hidden^k = tower^k(z^k)

How this differs from the paper: the gate may be an MLP (``gate``, empty for the paper's Linear), and experts may have
several layers, with ReLU after every one, the last included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.layers import mlp, mlp_width, require_dropout, require_positive, task_key
from unbraid.towers.mlp import one_width, side_by_side, task_towers
from unbraid.types import FORBID, TowerOutput

BIBTEX = """
@inproceedings{ma2018mmoe,
  title     = {Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts},
  author    = {Ma, Jiaqi and Zhao, Zhe and Yi, Xinyang and Chen, Jilin and Hong, Lichan and Chi, Ed H.},
  booktitle = {Proceedings of the 24th ACM SIGKDD International Conference on Knowledge Discovery and Data Mining},
  pages     = {1930--1939},
  year      = {2018},
  doi       = {10.1145/3219819.3220007},
}
"""


def gate_logits(width: int, hidden: Sequence[int], pool: int, dropout: float) -> nn.Sequential:
    """The network of a gate before its softmax: (B, width) -> (B, pool)."""
    return nn.Sequential(*mlp(width, hidden, dropout), nn.Linear(mlp_width(width, hidden), pool))


def mix(gate: Tensor, pool: Sequence[Tensor]) -> Tensor:
    """(B, D) the sum of the pool's members (B, D) each, weighted by the columns of ``gate`` (B, n).

    Adding one by one needs no (B, n, D) stack, and is the fastest of the usual ways on a CPU (a batched matmul of one
    row each is the slowest by far).
    """
    mixed = gate[:, :1] * pool[0]
    for n, member in enumerate(pool[1:], start=1):
        mixed = torch.addcmul(mixed, gate[:, n : n + 1], member)
    return mixed


class MMoETower(nn.Module):
    """Module of `MMoE`.

    Attributes:
        widths: task -> H.
        gives: names of its extras.
    """

    def __init__(self, config: MMoE, tasks: Sequence[str], width: int) -> None:
        super().__init__()
        mixed = mlp_width(width, config.expert)
        # Experts stay separate: one wide first layer was no faster on a CPU, and would start from other weights
        # (Xavier's spread depends on the width of a layer).
        self.experts = nn.ModuleList(mlp(width, config.expert, config.dropout) for _ in range(config.experts))
        self.gates = nn.ModuleDict(
            {task_key(task): gate_logits(width, config.gate, config.experts, config.dropout) for task in tasks}
        )
        self.towers = task_towers(tasks, mixed, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(mixed, config.tower))
        self.gives = tuple(f"mmoe.gate.{task}" for task in tasks)

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) view becomes task -> (B, H).

        The trunk is the plain mean of the experts (B, D); extras hold the gates, ``mmoe.gate.TASK`` (B, experts).
        """
        x = side_by_side(hidden)
        pool = [expert(x) for expert in self.experts]
        gates = {task: self.gates[task_key(task)](x).softmax(dim=1) for task in self.widths}
        states = {task: self.towers[task_key(task)](mix(gate, pool)) for task, gate in gates.items()}
        trunk = torch.stack(pool).mean(dim=0)
        return TowerOutput(states, trunk, {f"mmoe.gate.{task}": gate for task, gate in gates.items()})


@dataclass(frozen=True)
class MMoE:
    """A pool of experts and one gate per task.

    Args:
        experts: how many; expert: widths of each one's layers.
        gate: widths of a gate's hidden layers; tower: widths of each task's own layers.  Either may be empty.
        dropout: after every ReLU.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["mmoe"] = field(default="mmoe", kw_only=True)
    experts: int = 8
    expert: tuple[int, ...] = (128, 64)
    gate: tuple[int, ...] = ()
    tower: tuple[int, ...] = (64,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(experts=self.experts, expert=self.expert, gate=self.gate, tower=self.tower)
        require_dropout(self.dropout)

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> MMoETower:
        """The module for these tasks.  Raises ValueError unless there is exactly one view."""
        return MMoETower(self, tasks, one_width(self.kind, views, widths))
