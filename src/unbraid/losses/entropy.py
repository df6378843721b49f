"""Entropy minimisation: rows without labels should be predicted with certainty.

Paper: "Semi-supervised Learning by Entropy Minimization", Grandvalet, Bengio, NIPS 2004.

Idea: where classes are apart, boundaries lie where few rows are.  With p_i the predicted probabilities of row i::

    L = mean_i H(p_i)         H(p) = -sum_j p_j log p_j

**It collapses.**  One class for every row has L = 0, and nothing in the loss is against it: on planted shifts it ends below the
model that was not adapted (docs/methods/entropy.md).  It is here as the baseline that `unbraid.losses.mcc`, whose maximum
that is, has to beat.

How this differs: the paper's weight grows along the training; here it is constant.  Rows and tasks as in
`unbraid.losses.unlabelled`; a binary task's entropy is that of its two classes; means are weighted by rows' weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from unbraid.losses.supervised import require_weight
from unbraid.losses.unlabelled import Of, OfPredictions, Reads, class_logits, row_entropy
from unbraid.types import FORBID, Batch, Losses, Output, Schema

BIBTEX = """
@inproceedings{grandvalet2004entropy,
  title     = {Semi-supervised Learning by Entropy Minimization},
  author    = {Grandvalet, Yves and Bengio, Yoshua},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {17},
  year      = {2004},
}
"""


@dataclass(frozen=True)
class Entropy:
    """Mean entropy of rows without labels, beside a loss of those with labels.  Its objective is its own, ``entropy``.

    Args:
        weight: of this loss.
        tasks: which ones; empty: all binary and multiclass ones.
        of: rows without a label of the task, or ``all`` rows.
        domains: only rows of these; empty: of all.

    Raises:
        ValueError: the weight is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["entropy"] = field(default="entropy", kw_only=True)
    weight: float = 1.0
    tasks: tuple[str, ...] = ()
    of: Of = "unlabelled"
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_weight(self.weight)

    @property
    def reads_domains(self) -> bool:
        """Does it need domains?"""
        return bool(self.domains)

    def bind(self, schema: Schema) -> BoundEntropy:
        """The term for the tasks and domains of a schema.  Raises ValueError as `Reads.bind`."""
        return BoundEntropy(self, Reads.bind(self.kind, schema, self.tasks, self.of, self.domains))


@dataclass(frozen=True)
class BoundEntropy(OfPredictions):
    """`Entropy` for the tasks and domains of a schema."""

    config: Entropy

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """The objective's scalar; none where no task has such a row."""
        parts = []
        for task in self.chosen.tasks:
            rows, weight = self.chosen.rows(task, batch)
            if len(rows):
                found = row_entropy(class_logits(output.logits[task.name][rows]).log_softmax(1))
                parts.append(task.weight * (found * weight).sum() / weight.sum())
        return {self.config.kind: self.config.weight * torch.stack(parts).sum()} if parts else {}
