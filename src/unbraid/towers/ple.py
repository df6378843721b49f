"""PLE: progressive layered extraction, and CGC, its single layer.

Paper: "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for Personalized Recommendations",
Tang, Liu, Zhao, Gong, RecSys 2020, https://doi.org/10.1145/3383313.3412236.

Idea: in MMoE every task may write every expert.  Here each task has experts that nobody else reads, beside shared ones,
and a gate over these two groups: *customized gate control*.  Layers of it are stacked: a task's state is the next
layer's input of its own experts, and a shared state that of the shared ones.  One layer, for the states x^0 .. x^(T-1)
of the tasks and x^S::

    z^k = sum_n softmax(G^k(x^k))_n [e^k(x^k), e^S(x^S)]_n        own experts first, then the shared
    z^S = sum_n softmax(G^S(x^S))_n [e^S(x^S)]_n                  not in the last layer: nobody would read it
    hidden^k = tower^k(z^k)                                       after the last layer

With the shared view alone, all states of the first layer are the same x.  With one view per task and a shared one
(``model.tables.kind = "per_task"``), task k's experts and gate read x^k and shared experts x^S.

How this differs:

- The paper's shared gate pools all experts, tasks' included, so that from two layers on a task's loss writes the
  experts of others below the last layer (``shared_reads = "all"``).  The default, ``"shared"``, pools the shared experts
  only, as the PLE released with STEM does: what belongs to a task is then written by that task alone, at any depth.
- A gate may be an MLP (``gate``; empty for the paper's Linear).
- The form on one view per task is STEM's baseline ME-PLE.  Its class was never released officially; this is the natural
  definition: STEM's tables without reading other tasks' experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from torch import Tensor, nn

from unbraid.layers import average, mlp, mlp_width, task_key
from unbraid.slots import TowerOutput
from unbraid.towers.experts import gate_logits, mix
from unbraid.towers.mlp import of_tasks, side_by_side, task_towers
from unbraid.towers.stem import LayeredExperts, LayerOutput

BIBTEX = """
@inproceedings{tang2020ple,
  title     = {Progressive Layered Extraction ({PLE}): A Novel Multi-Task Learning ({MTL}) Model for Personalized
               Recommendations},
  author    = {Tang, Hongyan and Liu, Junning and Zhao, Ming and Gong, Xudong},
  booktitle = {Proceedings of the 14th ACM Conference on Recommender Systems},
  pages     = {269--278},
  year      = {2020},
  doi       = {10.1145/3383313.3412236},
}
"""


class PLELayer(nn.Module):
    """Experts and gates of one layer: CGC, with a shared gate unless it is the last.

    Args:
        config: sizes.
        tasks: their order is that of the states.
        width: width of every state that it reads.
        last: is there no layer above?
    """

    def __init__(self, config: PLE, tasks: Sequence[str], width: int, last: bool) -> None:
        super().__init__()
        self.reads_all = config.shared_reads == "all"

        def experts(count: int) -> nn.ModuleList:
            return nn.ModuleList(mlp(width, config.expert, config.dropout) for _ in range(count))

        def gate(owners: int) -> nn.Sequential:
            pool = owners * config.task_experts + config.shared_experts
            return gate_logits(width, config.gate, pool, config.dropout)

        self.task_experts = nn.ModuleDict({task_key(task): experts(config.task_experts) for task in tasks})
        self.shared_experts = experts(config.shared_experts)
        self.gates = nn.ModuleDict({task_key(task): gate(owners=1) for task in tasks})
        self.shared_gate = None if last else gate(owners=len(tasks) if self.reads_all else 0)

    def forward(self, own: Sequence[Tensor], shared: Tensor) -> LayerOutput:
        """The tasks' states (B, width) each, and the shared one; the last layer's shared state is a plain mean."""
        groups: Any = self.task_experts.values()
        written = [[expert(x) for expert in group] for group, x in zip(groups, own, strict=True)]
        common = [expert(shared) for expert in self.shared_experts]
        gates = [gate(x).softmax(dim=1) for gate, x in zip(self.gates.values(), own, strict=True)]
        states = [mix(gate, [*group, *common]) for gate, group in zip(gates, written, strict=True)]
        if self.shared_gate is None:
            return LayerOutput(states, gates, average(common))
        pool = [*chain(*written), *common] if self.reads_all else common
        return LayerOutput(states, gates, mix(self.shared_gate(shared).softmax(dim=1), pool))


class PLETower(nn.Module):
    """Module of `PLE`.

    Args:
        config: sizes; tasks: in the order of their views, if they have any; width: of the input, or of each view.
        own: does each task have a view?

    Attributes:
        widths: task -> H.
        gives: names of its extras.
    """

    def __init__(self, config: PLE, tasks: Sequence[str], width: int, own: bool) -> None:
        super().__init__()
        depth, mixed = config.layers, mlp_width(width, config.expert)
        self.own = own
        self.layers = nn.ModuleList(
            PLELayer(config, tasks, mixed if i else width, last=i == depth - 1) for i in range(depth)
        )
        self.towers = task_towers(tasks, mixed, config.tower, config.dropout)
        self.widths = dict.fromkeys(tasks, mlp_width(mixed, config.tower))
        self.gives = tuple(f"ple.gate.{task}" for task in tasks)

    def forward(self, hidden: Sequence[Tensor]) -> TowerOutput:
        """One (B, width) per view becomes task -> (B, H).

        The trunk is the mean of the last layer's shared experts (B, D); extras hold the gates of the last layer,
        ``ple.gate.TASK`` (B, task_experts + shared_experts), whose first columns are the task's own experts.
        """
        shared = hidden[-1] if self.own else side_by_side(hidden)
        out = LayerOutput(list(hidden[:-1]) if self.own else [shared] * len(self.widths), [], shared)
        for layer in self.layers:
            out = layer(out.states, out.shared)
        states = {task: self.towers[task_key(task)](z) for task, z in zip(self.widths, out.states, strict=True)}
        return TowerOutput(states, out.shared, dict(zip(self.gives, out.gates, strict=True)))


@dataclass(frozen=True)
class PLE(LayeredExperts):
    """Layers of experts of each task and shared ones (one layer is CGC); a task reads its own and the shared.

    Args:
        shared_reads: what the shared gate between layers pools: ``shared`` experts only, or ``all``, as in the paper.
            Matters from two layers on.

    The other keys are those of `LayeredExperts`.
    """

    kind: Literal["ple"] = field(default="ple", kw_only=True)
    shared_reads: Literal["shared", "all"] = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared_reads not in ("shared", "all"):
            raise ValueError(f"Parameter `shared_reads` should be `shared` or `all`. Found `{self.shared_reads}`.")

    def build(self, tasks: Sequence[str], views: Sequence[str], widths: Sequence[int]) -> PLETower:
        """The module for these tasks.

        Raises:
            ValueError: views are neither one per task and ``shared`` last, nor views that belong to no task; or those of
                tasks differ in width.
        """
        own = tuple(views) == (*tasks, "shared")
        if not views or (of_tasks(tasks, views) and not own):
            raise ValueError(
                f"Tower `ple` reads one view per task and a shared one, {(*tasks, 'shared')}, or views that belong to no "
                f"task. Found views {tuple(views)}. Set model.tables.kind to `per_task`, `shared` or `several`."
            )
        if own and len(set(widths)) > 1:
            raise ValueError(
                "Tower `ple` has experts of one size, so all views need one width. "
                f"Found {dict(zip(views, widths, strict=True))}. Set model.tables.kind to `per_task`."
            )
        return PLETower(self, tasks, widths[0] if own else sum(widths), own)
