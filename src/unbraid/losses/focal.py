"""Focal loss: the cross-entropy of binary tasks, where rows that are already right count less.

Paper: "Focal Loss for Dense Object Detection", Lin, Goyal, Girshick, He, Dollar, ICCV 2017, https://arxiv.org/abs/1708.02002.

Idea: when one class is rare, the many easy rows of the other outweigh the few hard ones.  With p the probability that the
model gives to the label that the row has::

    L = -a (1 - p)^gamma log p          a = alpha for positives and 1 - alpha for negatives; 1 without alpha

**It is not calibrated.**  At a place where a share r of the rows is positive, the mean loss is smallest not at p = r but
nearer to 1/2: with gamma = 2 and no alpha a rate of .01 is predicted as .154 and one of .10 as .306, with alpha = .25 as .108
and .227.  Rank by such a model, or calibrate its predictions afterwards.

How this differs:

- Tasks that are not binary keep the supervised loss.
- Where a log kept a share of the negatives, p is that of the kept log, as in `unbraid.losses.supervised`.
- Computed from logits: values and gradients are finite for any finite logit.
- The paper divides by the number of positives; this is the weighted mean over rows, as for all losses here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, where
from torch.nn import functional as F

from unbraid.losses.supervised import Bound, require_weight, shifted
from unbraid.types import FORBID, Batch, Output, Schema, Task

BIBTEX = """
@inproceedings{lin2017focal,
  title     = {Focal Loss for Dense Object Detection},
  author    = {Lin, Tsung-Yi and Goyal, Priya and Girshick, Ross and He, Kaiming and Doll{\\'a}r, Piotr},
  booktitle = {Proceedings of the IEEE International Conference on Computer Vision},
  pages     = {2980--2988},
  year      = {2017},
  note      = {arXiv:1708.02002},
}
"""


@dataclass(frozen=True)
class Focal:
    """Focal loss of binary tasks, supervised loss of the others: it stands instead of `Supervised`.

    Args:
        gamma: how much less rows that are right count; 0 is the cross-entropy.
        alpha: weight of positives, 1 - alpha of negatives; None: both 1.
        by: objectives, as in `unbraid.losses.supervised.Supervised`.
        weight: of this loss beside others of the same objective.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    needs: ClassVar[tuple[str, ...]] = ()
    kind: Literal["focal"] = field(default="focal", kw_only=True)
    gamma: float = 2.0
    alpha: float | None = None
    by: Literal["task", "domain", "task@domain"] = "task"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"Parameter `gamma` should be finite and not negative. Found {self.gamma}.")
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise ValueError(f"Parameter `alpha` should be between 0 and 1. Found {self.alpha}.")
        require_weight(self.weight)

    def bind(self, schema: Schema) -> BoundFocal:
        """The term for the tasks and domains of a schema."""
        return BoundFocal(schema, self.by, weight=self.weight, gamma=self.gamma, alpha=self.alpha)


@dataclass(frozen=True)
class BoundFocal(Bound):
    """`Focal` with the schema that names its tasks, their kinds and the domains."""

    gamma: float = field(default=2.0, kw_only=True)
    alpha: float | None = field(default=None, kw_only=True)

    def row_losses(self, task: Task, output: Output, batch: Batch, rows: Tensor | slice) -> Tensor:
        """(n,) loss of one task on the given rows, all of them known."""
        if task.kind != "binary":
            return super().row_losses(task, output, batch, rows)
        logits = shifted(task, output.logits[task.name][rows], batch, rows)
        positive = batch.labels[task.name][rows] == 1
        right = where(positive, logits, -logits)  # logit of the label that the row has
        losses = F.softplus(-right) * (self.gamma * F.logsigmoid(-right)).exp()
        return losses if self.alpha is None else losses * where(positive, self.alpha, 1 - self.alpha).to(losses.dtype)
