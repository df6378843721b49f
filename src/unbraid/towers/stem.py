"""STEM: shared and task-specific embeddings.

Paper: "STEM: Unleashing the Power of Embeddings for Multi-task Recommendation", Su, Pan, Wang, Xiao, Quan, Chen, Jiang,
AAAI 2024, https://arxiv.org/abs/2308.13537.

Idea: one vector per id cannot say that a user likes an item for one task and dislikes it for another.  So every task
has its own tables (`unbraid.encoders.table.Views`, kind ``per_task``) and its own experts on them, beside a shared set.
*All forward, task-specific backward*: a task reads the experts of all tasks, but its loss writes only its own and the
shared ones.  One layer, for the views x^0 .. x^(T-1) of the tasks and x^S::

    pool^k = [stopgrad(e^0), .., e^k, .., stopgrad(e^(T-1)), e^S]      own and shared experts keep their gradient
    z^k    = sum_n softmax(G^k(x^k + x^S))_n pool^k_n
    z^S    = sum_n softmax(G^S(x^S))_n [stopgrad(e^0), .., stopgrad(e^(T-1)), e^S]_n
    hidden^k = tower^k(z^k)                                            after the last layer

The stop is on the experts' outputs and not on the gate, so that a task still learns *how much* to listen to the others.
A task whose loss is not in a backward pass leaves its tables, experts, gates and tower without any gradient (None).

How this differs from the official code:

- There, z^S mixes the tasks' experts without a stop, so from the second layer on a task's loss reaches the tables of
  all others through the shared state.  Here it is stopped (``strict``) and the promise holds at any depth: the shared
  state reads every task and learns through shared experts only.  ``strict=False`` brings the official leak back.
- There, the last layer has a gate for a shared state that nobody reads; here it is not built.
- There, all tables of a column are slices of one wide table, where dense Adam keeps moving a slice by momentum while
  its gradient is zero; here they are separate.
- With the shared view alone (``model.tables.kind = "shared"``) there are no task experts: the tasks gate the shared
  experts of the last layer.  With one shared expert that is Shared-Bottom.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from unbraid.layers import average, mlp, mlp_width, require_dropout, require_positive, task_key
from unbraid.slots import TowerOutput
from unbraid.towers.experts import gate_logits, mix
from unbraid.towers.mlp import task_towers
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{su2024stem,
  title     = {{STEM}: Unleashing the Power of Embeddings for Multi-task Recommendation},
  author    = {Su, Liangcai and Pan, Junwei and Wang, Ximei and Xiao, Xi and Quan, Shijie and Chen, Xihua and
               Jiang, Jie},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume    = {38},
  number    = {8},
  year      = {2024},
  eprint    = {2308.13537},
  archiveprefix = {arXiv},
}
"""


class LayerOutput(NamedTuple):
    """What a layer gives: a state (B, D) and a gate (B, pool) per task, and the shared state (B, D).

    Before the last layer a task without a view of its own has neither.  The last layer's shared state is the plain mean
    of its shared experts.
    """

    states: list[Tensor]
    gates: list[Tensor]
    shared: Tensor


class STEMLayer(nn.Module):
    """Experts and gates of one layer.

    Args:
        config: sizes.
        tasks: their order is the order of the pool, shared experts last.
        width: width of every state that it reads.
        own: does each task have a view?
        last: is there no layer above?
    """

    def __init__(self, config: STEM, tasks: Sequence[str], width: int, own: bool, last: bool) -> None:
        super().__init__()
        owners = tasks if own else ()
        readers = tasks if last else owners  # a gate whose state nobody reads would never train
        pool = len(owners) * config.task_experts + config.shared_experts
        self.strict = config.strict

        def experts(count: int) -> nn.ModuleList:
            return nn.ModuleList(mlp(width, config.expert, config.dropout) for _ in range(count))

        def gate() -> nn.Sequential:
            return gate_logits(width, config.gate, pool, config.dropout)

        self.task_experts = nn.ModuleDict({task_key(task): experts(config.task_experts) for task in owners})
        self.shared_experts = experts(config.shared_experts)
        self.gates = nn.ModuleDict({task_key(task): gate() for task in readers})
        self.shared_gate = None if last else gate()

    def forward(self, own: Sequence[Tensor], shared: Tensor) -> LayerOutput:
        """The tasks' views or states (B, width) each (none without views of their own), and the shared one."""
        groups: Iterable[Any] = self.task_experts.values()
        written = [[expert(x) for expert in group] for group, x in zip(groups, own, strict=True)]
        stopped = [[member.detach() for member in group] for group in written]
        common = [expert(shared) for expert in self.shared_experts]
        states, gates = [], []
        for k, gate in enumerate(self.gates.values()):
            weights = gate(own[k] + shared if own else shared).softmax(dim=1)
            pool = [*stopped[:k], *written[k : k + 1], *stopped[k + 1 :], common]
            states.append(mix(weights, list(chain(*pool))))
            gates.append(weights)
        if self.shared_gate is None:
            return LayerOutput(states, gates, average(common))
        pool = [*(stopped if self.strict else written), common]
        return LayerOutput(states, gates, mix(self.shared_gate(shared).softmax(dim=1), list(chain(*pool))))


class STEMTower(nn.Module):
    """Module of `STEM`.

    Attributes:
        widths: task -> H.
        gives: names of its extras.
    """

    def __init__(self, config: STEM, tasks: Sequence[str], width: int, own: bool) -> None:
        super().__init__()
        depth, mixed = config.layers, mlp_width(width, config.expert)
        self.layers = nn.ModuleList(
            STEMLayer(config, tasks, mixed if i else width, own, last=i == depth - 1) for i in range(depth)
        )
        self.towers = task_towers(tasks, mixed, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(mixed, config.tower))
        self.gives = tuple(f"stem.gate.{task}" for task in tasks)

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) per view, the shared one last, becomes task -> (B, H).

        The trunk is the mean of the last layer's shared experts (B, D); extras hold the gates of the last layer,
        ``stem.gate.TASK`` (B, pool), whose columns are the experts of the first task, of the second, .., the shared.
        """
        out = LayerOutput(list(hidden[:-1]), [], hidden[-1])
        for layer in self.layers:
            out = layer(out.states, out.shared)
        states = {task: self.towers[task_key(task)](z) for task, z in zip(self.widths, out.states, strict=True)}
        gates = {f"stem.gate.{task}": gate for task, gate in zip(self.widths, out.gates, strict=True)}
        return TowerOutput(states, out.shared, gates)


@dataclass(frozen=True)
class LayeredExperts:
    """Settings of a tower of layers of experts, some of each task and some shared.

    Args:
        layers: how many layers of experts.
        shared_experts, task_experts: per layer, and of the latter per task.
        expert: widths of an expert's layers.
        gate: widths of a gate's hidden layers; tower: widths of each task's own layers.  Either may be empty.
        dropout: after every ReLU.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: str = field(default="", kw_only=True)
    layers: int = 1
    shared_experts: int = 2
    task_experts: int = 1
    expert: tuple[int, ...] = (128, 64)
    gate: tuple[int, ...] = ()
    tower: tuple[int, ...] = (64,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_positive(layers=self.layers, shared_experts=self.shared_experts, task_experts=self.task_experts)
        require_positive(expert=self.expert, gate=self.gate, tower=self.tower)
        require_dropout(self.dropout)


@dataclass(frozen=True)
class STEM(LayeredExperts):
    """Experts on each task's tables and on shared ones; a task reads all of them and writes its own and the shared.

    Args:
        strict: stop gradients to tasks' experts in the shared gate too; matters from two layers on.

    The other keys are those of `LayeredExperts`.
    """

    kind: Literal["stem"] = field(default="stem", kw_only=True)
    strict: bool = True

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> STEMTower:
        """The module for these tasks.

        Raises:
            ValueError: views are neither one per task and ``shared`` last, nor ``shared`` alone; or differ in width.
        """
        if tuple(views) not in ((*tasks, "shared"), ("shared",)):
            raise ValueError(
                f"Tower `stem` reads one view per task and a shared one, {(*tasks, 'shared')}. "
                f"Found views {tuple(views)}. Set model.tables.kind to `per_task`, and model.tables.widths and model.experts to "
                "[], which go with other views."
            )
        if len(set(widths)) > 1:
            raise ValueError(
                "Tower `stem` adds a task's view to the shared one, so all views need one width. "
                f"Found {dict(zip(views, widths, strict=True))}. Set model.tables.kind to `per_task`."
            )
        return STEMTower(self, tasks, widths[0], own=len(views) > 1)
