"""Margin metric softmax (MMS): other classes must be further away, the more the less they have to do with the true one.

Paper: "CLIPood: Generalizing CLIP to Out-of-Distributions", Shu, Guo, Wu, Wang, Wang, Long, ICML 2023,
https://arxiv.org/abs/2302.00864.

Idea: fine-tuning with cross-entropy pushes all other classes away alike and so forgets how classes lie to each other, which
open classes depend on.  With unit vectors t_c of the classes, f of the row, logit scale s and strength lambda::

    m(y, c) = 1 - t_y . t_c                                                         0 for c = y, at most 2
    L = -log( exp(s f . t_y) / sum_c exp(s (f . t_c + lambda m(y, c))) )

A far class gets a bigger margin than a near one.  lambda = 0 is the cross-entropy.  Only f learns; the vectors are constants.

How this differs: the authors' code computes ``cross_entropy(s (f - lambda t_y) T^T, y)``.  Its logits are these minus s
lambda in every row, so loss and gradients are the same; this is the paper's form.  Predictions never have the margin.

**A bigger margin can hurt**: where open classes compete with those of training, it pulls rows towards the latter
(docs/methods/clipood.md has figures).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from unbraid.losses.supervised import Bound, require_weight
from unbraid.types import FORBID, Batch, Output, Schema, Task

BIBTEX = """
@inproceedings{shu2023clipood,
  title     = {{CLIPood}: Generalizing {CLIP} to Out-of-Distributions},
  author    = {Shu, Yang and Guo, Xingzhuo and Wu, Jialong and Wang, Ximei and Wang, Jianmin and Long, Mingsheng},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning},
  series    = {Proceedings of Machine Learning Research},
  volume    = {202},
  pages     = {31716--31731},
  year      = {2023},
  eprint    = {2302.00864},
  archiveprefix = {arXiv},
}
"""


@dataclass(frozen=True)
class Margin:
    """Margin metric softmax of multiclass tasks, supervised loss of the others: it stands instead of `Supervised`.

    Needs `unbraid.class_head` for these tasks (``model.classes``).

    Args:
        strength: lambda; 0 is the cross-entropy.
        tasks: the multiclass tasks that have it; empty: all.
        by: objectives, as in `unbraid.losses.supervised.Supervised`.
        weight: of this loss beside others of the same objective.

    Raises:
        ValueError: ``strength`` is negative or not finite, or ``weight`` not positive.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["margin"] = field(default="margin", kw_only=True)
    strength: float = 0.3
    tasks: tuple[str, ...] = ()
    by: Literal["task", "domain", "task@domain"] = "task"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"Parameter `strength` should be finite and not negative. Found {self.strength}.")
        require_weight(self.weight)

    def bind(self, schema: Schema) -> BoundMargin:
        """The term for the tasks of a schema.  Raises ValueError if ``tasks`` names others, or there is no multiclass task."""
        able = [task.name for task in schema.tasks if task.kind == "multiclass"]
        if not able or not set(self.tasks) <= set(able):
            found = f"Found `tasks` {list(self.tasks)}." if able else "Found none."
            raise ValueError(f"Loss `{self.kind}` is of multiclass tasks, among {able}. {found}")
        return BoundMargin(schema, self.by, weight=self.weight, strength=self.strength, among=self.tasks or tuple(able))


@dataclass(frozen=True)
class BoundMargin(Bound):
    """`Margin` with the schema that names its tasks, their kinds and the domains."""

    strength: float = field(default=0.3, kw_only=True)
    among: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """Vectors of classes and the scale of each task."""
        return tuple(f"heads.{part}.{task}" for task in self.among for part in ("vectors", "scale"))

    def row_losses(self, task: Task, output: Output, batch: Batch, rows: Tensor | slice) -> Tensor:
        """(n,) loss of one task on the given rows, all of them known."""
        if task.name not in self.among:
            return super().row_losses(task, output, batch, rows)
        vectors, scale = (output.extras[f"heads.{part}.{task.name}"] for part in ("vectors", "scale"))
        return margin_loss(output.logits[task.name][rows], vectors, batch.labels[task.name][rows], scale, self.strength)


def margin_loss(logits: Tensor, vectors: Tensor, labels: Tensor, scale: Tensor | float, strength: float) -> Tensor:
    """(n,) the loss of each row.

    Args:
        logits: (n, K) s f . t_c; vectors: (K, d) of length 1; labels: (n,) int64; scale: s; strength: lambda.
    """
    if not strength:
        return F.cross_entropy(logits, labels, reduction="none")
    margins = 1 - F.linear(vectors[labels], vectors)
    return F.cross_entropy(logits + scale * strength * margins.to(logits.dtype), labels, reduction="none")
