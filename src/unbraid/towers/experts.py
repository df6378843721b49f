"""MMoE: multi-gate mixture of experts, and OMoE, the same with one gate for all tasks.

Paper: "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", Ma, Zhao, Yi, Chen,
Hong, Chi, KDD 2018, https://doi.org/10.1145/3219819.3220007.

Idea: several experts read the same input, and each task mixes them with its own softmax gate on that input, so that
tasks which disagree can use different experts.  The experts, and the embedding below them, are written by every task::

    g^k = softmax(G^k(x))        z^k = sum_n g^k_n e_n(x)        hidden^k = tower^k(z^k)

OMoE is the paper's baseline: one gate G for all tasks, so that every tower reads the same z.

How this differs from the paper: the gate may be an MLP (``gate``, empty for the paper's Linear), and experts may have
several layers, with ReLU after every one, the last included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.layers import average, mlp, mlp_width, require_dropout, require_positive, task_key
from unbraid.slots import TowerOutput
from unbraid.towers.mlp import one_width, side_by_side, task_towers
from unbraid.types import FORBID

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


class MixtureTower(nn.Module):
    """Module of `MMoE` and `OMoE`.

    Attributes:
        widths: task -> H.
        gives: names of its extras, in the order of its gates.
    """

    def __init__(self, config: Mixture, tasks: Sequence[str], width: int) -> None:
        super().__init__()
        mixed = mlp_width(width, config.expert)
        self.reads = {task: "shared" if config.one_gate else task_key(task) for task in tasks}  # task -> its gate
        # Experts stay separate: one wide first layer was no faster on a CPU, and would start from other weights
        # (Xavier's spread depends on the width of a layer).
        self.experts = nn.ModuleList(mlp(width, config.expert, config.dropout) for _ in range(config.experts))
        self.gates = nn.ModuleDict(
            {
                name: gate_logits(width, config.gate, config.experts, config.dropout)
                for name in dict.fromkeys(self.reads.values())
            }
        )
        self.towers = task_towers(tasks, mixed, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(mixed, config.tower))
        readers = ("",) if config.one_gate else [f".{task}" for task in tasks]
        self.gives = tuple(f"{config.kind}.gate{reader}" for reader in readers)

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) view becomes task -> (B, H).

        The trunk is the plain mean of the experts (B, D); extras hold the gates (B, experts): ``mmoe.gate.TASK``, or the
        only one, ``omoe.gate``.
        """
        x = side_by_side(hidden)
        pool = [expert(x) for expert in self.experts]
        gates = {name: gate(x).softmax(dim=1) for name, gate in self.gates.items()}
        mixed = {name: mix(gate, pool) for name, gate in gates.items()}
        states = {task: self.towers[task_key(task)](mixed[gate]) for task, gate in self.reads.items()}
        return TowerOutput(states, partial(average, pool), dict(zip(self.gives, gates.values(), strict=True)))


@dataclass(frozen=True)
class Mixture:
    """What `MMoE` and `OMoE` have in common.

    Args:
        experts: how many; expert: widths of each one's layers.
        gate: widths of a gate's hidden layers; tower: widths of each task's own layers.  Either may be empty.
        dropout: after every ReLU.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    one_gate: ClassVar[bool]
    kind: str = field(default="", kw_only=True)
    experts: int = 8
    expert: tuple[int, ...] = (128, 64)
    gate: tuple[int, ...] = ()
    tower: tuple[int, ...] = (64,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(experts=self.experts, expert=self.expert, gate=self.gate, tower=self.tower)
        require_dropout(self.dropout)

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> MixtureTower:
        """The module for these tasks.  Raises ValueError if views belong to tasks."""
        return MixtureTower(self, tasks, one_width(self.kind, tasks, views, widths))


@dataclass(frozen=True)
class MMoE(Mixture):
    """A pool of experts and one gate per task.  Keys as in `Mixture`."""

    one_gate: ClassVar[bool] = False
    kind: Literal["mmoe"] = field(default="mmoe", kw_only=True)


@dataclass(frozen=True)
class OMoE(Mixture):
    """A pool of experts and one gate for all tasks.  Keys as in `Mixture`."""

    one_gate: ClassVar[bool] = True
    kind: Literal["omoe"] = field(default="omoe", kw_only=True)
