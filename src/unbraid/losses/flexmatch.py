"""FlexMatch: FixMatch with a threshold per class, lower for the classes that are learnt worse.

Paper: "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling", Zhang, Wang, Hou, Wu, Wang, Okumura,
Shinozaki, NeurIPS 2021, https://arxiv.org/abs/2110.08263.

Idea: how many rows without a label are confidently of a class says how well the class is learnt.  A class that is behind gets
the lower threshold, so that it has rows to learn from.  With tau the threshold::

    sigma_c = number of rows without a label whose latest confident (> tau) answer is c
    beta_c  = sigma_c / max over c' of sigma_c'            warm-up: / max(that, number of rows never answered confidently)
    tau_c   = tau beta_c / (2 - beta_c)

Thresholds are those from before the batch; then the batch's answers above the fixed tau are remembered.  While no row was ever
confident all thresholds are 0.  The rest is `unbraid.losses.fixmatch`.

How this differs:

- Rows "never answered confidently" are all training rows that a batch may hold without this label, as in the official code's
  data set of them; of tables that is counted per task when a training begins.
- The official code also puts the thresholds at 0 where all rows are confidently of one class (a count that equals the number of
  rows is taken for the never-answered one).  Here that class then has the threshold tau.
- The memory is of one training: of a schedule with several, each begins with an empty one.  Outside of a training (probes of
  analyses) there is none, and the threshold is tau for all classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from unbraid.losses.self_training import Believe, SelfTraining, unlabelled
from unbraid.types import Schema, State, Task

BIBTEX = """
@inproceedings{zhang2021flexmatch,
  title     = {FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling},
  author    = {Zhang, Bowen and Wang, Yidong and Hou, Wenxin and Wu, Hao and Wang, Jindong and Okumura, Manabu and
               Shinozaki, Takahiro},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {34},
  year      = {2021},
  note      = {arXiv:2110.08263},
}
"""


@dataclass(frozen=True)
class FlexMatch(SelfTraining):
    """FixMatch with a threshold per class.

    Args:
        threshold: the highest of the thresholds, and what an answer must exceed to be remembered.
        weight, temperature, tasks: as for FixMatch.
        warmup: keep thresholds low while most rows were never answered confidently.
    """

    kind: Literal["flexmatch"] = field(default="flexmatch", kw_only=True)
    warmup: bool = True

    def believe(self, schema: Schema) -> PerClass:
        """What of a model's opinions is believed; remembers nothing yet."""
        classes = {task: max(schema.outputs(task), 2) for task in schema.tasks if task.kind != "real"}
        return PerClass(self.threshold, self.warmup, classes)


class PerClass(Believe):
    """Thresholds per class, by what rows were last answered confidently.

    Args:
        warmup: as in `FlexMatch`; classes: task -> K.
    """

    def __init__(self, threshold: float, warmup: bool, classes: Mapping[Task, int]) -> None:
        super().__init__(threshold)
        self.warmup, self.classes = warmup, dict(classes)
        self.rows: Tensor | None = None  # (n,) ascending row numbers
        self.latest: dict[str, Tensor] = {}  # task -> (n,) int32 class; K: none yet, K + 1: it lacks no label
        self.counts: dict[str, Tensor] = {}  # task -> (K + 2,) of each

    def fresh(self, rows: Any, labels: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> PerClass:
        """See `unbraid.slots.Term`."""
        begun = PerClass(self.threshold, self.warmup, self.classes)
        begun.rows = torch.as_tensor(rows)
        for task, k in self.classes.items():
            begun.latest[task.name] = torch.where(unlabelled(task, labels, observed), k, k + 1).to(torch.int32)
        begun._count()
        return begun

    def _count(self) -> None:
        sizes = {task.name: k + 2 for task, k in self.classes.items()}
        self.counts = {name: torch.bincount(self.latest[name], minlength=size) for name, size in sizes.items()}

    def status(self, task: Task) -> Tensor:
        """(K,) beta of a task's classes, in [0, 1]."""
        k, counts = self.classes[task], self.counts[task.name]
        most = counts[: k + self.warmup].max()
        return counts[:k] / most.clamp(min=1)

    def __call__(self, task: Task, confidence: Tensor, label: Tensor, row: Tensor) -> Tensor:
        """(n,) bool: which opinions count; those above the fixed threshold are remembered afterwards."""
        if self.rows is None:
            return super().__call__(task, confidence, label, row)
        self._move(row.device)
        beta = self.status(task)[label]
        believed = confidence > (self.threshold * beta / (2 - beta)).to(confidence.dtype)
        sure = confidence > self.threshold
        self._remember(task, row[sure], label[sure])
        return believed

    def _move(self, device: torch.device) -> None:
        """The memory to where batches are."""
        assert self.rows is not None
        if self.rows.device != device:
            self.rows = self.rows.to(device)
            self.latest = {name: value.to(device) for name, value in self.latest.items()}
            self._count()

    def _remember(self, task: Task, row: Tensor, label: Tensor) -> None:
        """The class of some rows; of one that is there twice, the last."""
        assert self.rows is not None
        distinct, which = row.unique(return_inverse=True)
        order = torch.arange(len(row), device=row.device)
        last = torch.zeros_like(distinct).scatter_reduce(0, which, order, "amax", include_self=False)
        place, latest, size = torch.searchsorted(self.rows, distinct), self.latest[task.name], self.classes[task] + 2
        now = label[last].to(latest.dtype)
        self.counts[task.name] += torch.bincount(now, minlength=size) - torch.bincount(latest[place], minlength=size)
        latest[place] = now

    def state_dict(self) -> State:
        """The latest confident class of each row, by task."""
        return {"latest": dict(self.latest)}

    def load_state_dict(self, state: State) -> None:
        """Remember that.  Raises ValueError if it is of other rows or tasks."""
        shapes = {name: tuple(value.shape) for name, value in state["latest"].items()}
        if shapes != (own := {name: tuple(value.shape) for name, value in self.latest.items()}):
            raise ValueError(f"The memory should have the shapes {own}. Found {shapes}.")
        for name, value in state["latest"].items():
            self.latest[name].copy_(value)
        self._count()
