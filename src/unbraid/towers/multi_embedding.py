"""Multi-embedding: several sets of tables, and a non-linear expert on each before they are put together.

Paper: "On the Embedding Collapse when Scaling up Recommendation Models", Guo, Pan, Wang, Chen, Jiang, Long, ICML 2024,
https://arxiv.org/abs/2310.04400.

Idea: a wide table of a field is used in a few directions only, since its gradient is made of the vectors that it is
multiplied with, and some fields have few values.  Instead of one table of width M d, take M tables of width d
(`unbraid.encoders.table.Views`, kind ``several``), each with an interaction of its own, so that table m meets no vector
of another table.  With h_m the hidden vector of expert m (`unbraid.model.Model`, ``experts``)::

    e_m      = dropout(relu(norm(W_m h_m + b_m)))                    the expert, and so on for each layer of ``expert``
    z        = 1/M sum_m e_m                                         combine = "mean"
    z^k      = sum_m softmax(G^k(h_1, .., h_M))_m e_m                combine = "gate"
    z^k      = sum_m a^k_m e_m                                       combine = "scalar"
    hidden^k = tower^k(z or z^k)

The non-linearity stands *before* the sum for a reason.  Without it, the next layer's F z + c is a linear map of
(h_1, .., h_M), as it is in one model whose table is M d wide and whose interaction is block-diagonal: a wide model with
products taken away, and nothing else.

What replicates are tables and interactions, not whole models: this is no ensemble.

How this differs:

- The paper has one task and a mean.  Its code is DCN V2 with 4 cross layers, a layer of 400 with batch normalisation, ReLU
  and dropout 0.2, the mean, and a layer of 400.  Defaults here are the same but for dropout 0 and the tower, the library's.
- ``gate`` is the gate of "Ads Recommendation in a Collapsed and Entangled World" (Pan et al., KDD 2024), whose body was not
  read; that it reads the experts' *inputs* side by side is our design.  ``scalar`` is ours: per task, without a softmax, and
  1/M at first, so that it starts as the mean.
- A training batch of one row has no variance: batch normalisation then uses its running statistics.
- First weights are the library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unbraid.layers import average, mlp_width, require_dropout, require_positive, task_key
from unbraid.slots import TowerOutput
from unbraid.towers.experts import gate_logits, mix
from unbraid.towers.mlp import one_width, side_by_side, task_towers
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{guo2024collapse,
  title     = {On the Embedding Collapse when Scaling up Recommendation Models},
  author    = {Guo, Xingzhuo and Pan, Junwei and Wang, Ximei and Chen, Baixu and Jiang, Jie and Long, Mingsheng},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning},
  year      = {2024},
  eprint    = {2310.04400},
  archiveprefix = {arXiv},
}
"""


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of (B, D) that takes a training batch of one row by its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) to (B, D)."""
        if self.training and len(x) < 2:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x)


def expert(width: int, config: ManyTables) -> nn.Sequential:
    """Linear, norm, ReLU, dropout for each layer: (B, width) -> (B, ``config.expert[-1]``)."""
    norms: dict[str, type[nn.Module] | None] = {"batch": BatchNorm, "layer": nn.LayerNorm, "none": None}
    norm, layers = norms[config.norm], cast(list[nn.Module], [])
    for before, after in pairwise((width, *config.expert)):
        layers += [nn.Linear(before, after), *([norm(after)] if norm else []), nn.ReLU(inplace=True)]
        if config.dropout > 0:
            layers.append(nn.Dropout(config.dropout))
    return nn.Sequential(*layers)


class ManyTablesTower(nn.Module):
    """Module of `MultiEmbedding` and `unbraid.towers.ame.AME`.

    Args:
        config: sizes; tasks: their names; widths: of each expert's input.
        combine: ``mean``, ``gate`` or ``scalar``.

    Attributes:
        widths: task -> H.
        gives: names of its extras.
    """

    def __init__(self, config: ManyTables, tasks: Sequence[str], widths: Sequence[int], combine: str) -> None:
        super().__init__()
        many, mixed = len(widths), config.expert[-1]
        gated, weighed = (tasks if combine == how else () for how in ("gate", "scalar"))
        self.experts = nn.ModuleList(expert(width, config) for width in widths)
        self.gates = nn.ModuleDict(
            {task_key(task): gate_logits(sum(widths), config.gate, many, config.dropout) for task in gated}
        )
        self.scalars = nn.ParameterDict({task_key(task): torch.full((1, many), 1 / many) for task in weighed})
        self.towers = task_towers(tasks, mixed, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(mixed, config.tower))
        self.gives = tuple(f"{config.kind}.gate.{task}" for task in gated)

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) per expert becomes task -> (B, H).

        The trunk is the plain mean of the experts (B, D); extras hold the gates, ``KIND.gate.TASK`` (B, M), if there are any.
        """
        pool = [expert(x) for expert, x in zip(self.experts, hidden, strict=True)]
        weights: dict[str, Tensor] = dict(self.scalars.items())
        if len(self.gates):
            x = side_by_side(hidden)
            weights = {task: gate(x).softmax(dim=1) for task, gate in self.gates.items()}
        gates = dict(zip(self.gives, weights.values(), strict=False))  # scalars are parameters and no extras
        keys = {task: task_key(task) for task in self.widths}
        if not weights:
            mean = average(pool)
            return TowerOutput({task: self.towers[key](mean) for task, key in keys.items()}, mean, {})
        states = {task: self.towers[key](mix(weights[key], pool)) for task, key in keys.items()}
        return TowerOutput(states, partial(average, pool), gates)


@dataclass(frozen=True)
class ManyTables:
    """What `MultiEmbedding` and `unbraid.towers.ame.AME` have in common.

    Args:
        expert: widths of each expert's layers, the last one that of all; at least one.
        norm: between a layer and its ReLU.  With ``batch``, rows of a training batch see each other through its statistics;
            evaluation reads running ones.
        gate: widths of a gate's hidden layers; tower: widths of each task's own layers.  Either may be empty.
        dropout: after every ReLU.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: str = field(default="", kw_only=True)
    expert: tuple[int, ...] = (400,)
    norm: Literal["batch", "layer", "none"] = "batch"
    gate: tuple[int, ...] = ()
    tower: tuple[int, ...] = (64,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.expert:
            raise ValueError("Parameter `expert` should have at least one layer, which maps all experts to one width.")
        require_positive(expert=self.expert, gate=self.gate, tower=self.tower)
        require_dropout(self.dropout)
        if self.norm not in ("batch", "layer", "none"):
            raise ValueError(f"Parameter `norm` should be `batch`, `layer` or `none`. Found `{self.norm}`.")


@dataclass(frozen=True)
class MultiEmbedding(ManyTables):
    """One non-linear expert per set of tables, put together by a mean, a gate per task or learned weights per task.

    Args:
        combine: ``mean``; ``gate``, a softmax over the experts per task and row; ``scalar``, learned weights per task.

    The other keys are those of `ManyTables`.
    """

    kind: Literal["multi_embedding"] = field(default="multi_embedding", kw_only=True)
    combine: Literal["mean", "gate", "scalar"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.combine not in ("mean", "gate", "scalar"):
            raise ValueError(f"Parameter `combine` should be `mean`, `gate` or `scalar`. Found `{self.combine}`.")
        if self.gate and self.combine != "gate":
            raise ValueError(f"Parameter `gate` belongs to combine `gate`. Found {self.gate} with `{self.combine}`.")

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> ManyTablesTower:
        """The module for these tasks.  Raises ValueError if views belong to tasks."""
        one_width(self.kind, tasks, views, widths)
        return ManyTablesTower(self, tasks, widths, self.combine)
