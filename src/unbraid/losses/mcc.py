"""Minimum class confusion (MCC): rows without labels should not waver between two classes.

Paper: "Minimum Class Confusion for Versatile Domain Adaptation", Jin, Wang, Long, Wang, ECCV 2020,
https://arxiv.org/abs/1912.03699.

Idea: a classifier that moves to rows of another domain begins to confuse classes.  How much of class j's predicted mass
lies on rows that also predict j' is a matrix that needs no label, no domain and no second network, and whether classes are
missing there, or rows come from several domains, changes nothing.  With logits Z (B, C) of the rows, temperature T and P =
softmax(Z / T)::

    H_i = -sum_j P_ij log P_ij        w_i = 1 + exp(-H_i), a constant to the gradient: rows that are sure count more
    M = P^T diag(w) P                 confusion of pairs of classes (C, C)
    L = 1/C sum_j sum_{j' != j} M_jj' / sum_j'' M_jj''        each class's share that lies on others

**Closed form.**  Rows of P sum to 1, so the row sums of M are ``sum_i w_i P_ij`` and M itself is never needed::

    L = 1 - 1/C sum_j (sum_i w_i P_ij^2) / (sum_i w_i P_ij)                      O(BC) time and memory

Any factor of all w cancels, and 0 <= L <= 1 - 1/C.  The maximum is reached by rows that are unsure *and* by a model that
predicts one class everywhere, which is what the plain entropy (`unbraid.losses.entropy`) has as its minimum.

*The floor.*  B rows cannot be sure of more than B classes: L >= 1 - min(B, C)/C.  Read ``L - floor`` (`floor`,
`unbraid.analysis.confusion`), and give tasks with many classes large batches of rows without labels.

*Consistency* (``consistency``, the extension in the authors' library): on pairs of views whose weak one is sure (largest
P at least ``threshold``), with each view's normalised matrix N, ``|N(weak) - N(strong)|^2 / C`` times the share of such rows.
The weak view is a constant.  Squared differences of matrices are sums over pairs of rows, so N is formed only where C <= 2n.

How this differs:

- The authors' code builds M and divides its columns where the equation divides rows; M is symmetric, so the loss is the
  same.  It guards the logarithm by 1e-5; here the entropy is computed from logarithms of probabilities and needs no guard.
- A class without any mass (underflow) counts 0, the limit; the code gives NaN.  Half precision is raised to float32, under
  autocast too.
- A binary task's logit z is read as the two classes' (0, z).  With several tasks the loss is the sum over them by their weights.
- Rows with weights count by them, as if repeated.  A task with a single row in a batch says nothing of it (L would be 1 - 1/C
  whatever the logits): it is left out.
- All rows of a batch are in one forward pass; the authors' first code has one for labelled rows and one for the others,
  which differs where layers normalise over the batch.
- Confidence of ``consistency`` is at temperature T, as in the code.

**Rare tasks.**  Classes count alike.  Where few rows are positive, half of the loss is the positive class, and the model
can lower it by calling more rows positive: measure predicted rates before and after (`unbraid.analysis.confusion.rates`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unbraid.losses.supervised import require_weight
from unbraid.losses.unlabelled import Of, OfPredictions, Reads, class_logits, row_entropy
from unbraid.types import FORBID, Batch, Losses, Output, Schema

BIBTEX = """
@inproceedings{jin2020mcc,
  title     = {Minimum Class Confusion for Versatile Domain Adaptation},
  author    = {Jin, Ying and Wang, Ximei and Long, Mingsheng and Wang, Jianmin},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages     = {464--480},
  year      = {2020},
  eprint    = {1912.03699},
  archiveprefix = {arXiv},
}
"""


def class_confusion(logits: Tensor, temperature: float = 2.5, weight: Tensor | None = None) -> Tensor:
    """L of the module docstring.

    Args:
        logits: (B, C), or (B,) of a binary task; weight: (B,) of the rows, each positive; None: all alike.

    Returns:
        A scalar in [0, 1 - 1/C], in float32, or float64 for logits in float64.
    """
    with torch.autocast(logits.device.type, enabled=False):
        p, w = probabilities(logits, temperature, weight)
        own, mass = w @ p.square(), w @ p
        return 1 - (own / mass.clamp_min(torch.finfo(p.dtype).tiny)).mean()


def floor(rows: int, classes: int) -> float:
    """The least L that so many rows allow."""
    return 1 - min(rows, classes) / classes


def probabilities(logits: Tensor, temperature: float, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """P (B, C), and (B,) what each row counts: 1 + exp(-H) times its weight, without a gradient."""
    log_p = (class_logits(logits) / temperature).log_softmax(1)
    sure = 1 + torch.exp(-row_entropy(log_p.detach()))
    return log_p.exp(), sure if weight is None else sure * weight.to(sure.dtype)


def confusion_gap(
    weak: Tensor, strong: Tensor, temperature: float = 2.5, threshold: float = 0.95, weight: Tensor | None = None
) -> Tensor | None:
    """The consistency of the module docstring.

    Args:
        weak, strong: logits (B, C), or (B,), of the two views of the same rows; weight: (B,) of the rows.

    Returns:
        A scalar; None where the weak view is sure of no row.
    """
    with torch.autocast(weak.device.type, enabled=False):
        weight = torch.ones(len(weak), device=weak.device) if weight is None else weight
        kept = (class_logits(weak.detach()) / temperature).softmax(1).amax(1) >= threshold
        if not kept.any():
            return None
        p, w = probabilities(weak.detach()[kept], temperature, weight[kept])
        q, v = probabilities(strong[kept], temperature, weight[kept])
        tiny = torch.finfo(p.dtype).tiny
        left = torch.cat(
            [p / (w @ p).clamp_min(tiny), -q / (v @ q).clamp_min(tiny)]
        )  # N(weak) - N(strong) = left^T right
        right = torch.cat([w[:, None] * p, v[:, None] * q])
        if left.shape[1] <= len(left):
            square = (left.T @ right).square().sum()
        else:
            square = ((left @ left.T) * (right @ right.T)).sum()
        return square / p.shape[1] * (weight[kept].sum() / weight.sum()).to(square.dtype)


@dataclass(frozen=True)
class MCC:
    """Class confusion of rows without labels, beside a loss of those with labels.  Its objective is its own, ``mcc``.

    Args:
        temperature: T, that the logits are divided by in this loss alone.
        weight: of this loss (mu).
        tasks: which ones; empty: all binary and multiclass ones.
        of: rows without a label of the task, or ``all`` rows: a regulariser of labelled ones, too.
        domains: only rows of these; empty: of all.
        consistency: weight of the consistency of two views beside the confusion; needs views of rows (``augment``).
        threshold: how sure the weak view of a row must be there, at temperature T.

    Raises:
        ValueError: a temperature or weight that is not positive, a negative consistency, a threshold outside (0, 1).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["mcc"] = field(default="mcc", kw_only=True)
    temperature: float = 2.5
    weight: float = 1.0
    tasks: tuple[str, ...] = ()
    of: Of = "unlabelled"
    domains: tuple[str, ...] = ()
    consistency: float = 0.0
    threshold: float = 0.95

    def __post_init__(self) -> None:
        require_temperature(self.temperature)
        require_weight(self.weight)
        if not 0 <= self.consistency < math.inf:
            raise ValueError(f"Parameter `consistency` should be finite and not negative. Found {self.consistency}.")
        if not 0 < self.threshold < 1:
            raise ValueError(f"Parameter `threshold` should be between 0 and 1. Found {self.threshold}.")

    @property
    def reads_domains(self) -> bool:
        """Does it need domains?"""
        return bool(self.domains)

    @property
    def views(self) -> Literal["none", "unlabelled", "all"]:
        """Which rows need two views."""
        return self.of if self.consistency else "none"

    def bind(self, schema: Schema) -> BoundMCC:
        """The term for the tasks and domains of a schema.  Raises ValueError as `Reads.bind`."""
        return BoundMCC(self, Reads.bind(self.kind, schema, self.tasks, self.of, self.domains))


def require_temperature(temperature: float) -> None:
    """Raises ValueError unless a temperature is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"Parameter `temperature` should be positive and finite. Found {temperature}.")


@dataclass(frozen=True)
class BoundMCC(OfPredictions):
    """`MCC` for the tasks and domains of a schema."""

    config: MCC

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """The objective's scalar; none where no task has two such rows."""
        parts = []
        for task in self.chosen.tasks:
            rows, weight = self.chosen.rows(task, batch)
            if len(rows) < 2:
                continue
            logits = output.logits[task.name]
            parts.append(task.weight * class_confusion(logits[rows], self.config.temperature, weight))
            if self.config.consistency and (gap := self._gap(logits, batch, rows, weight)) is not None:
                parts.append(task.weight * self.config.consistency * gap)
        return {self.config.kind: self.config.weight * torch.stack(parts).sum()} if parts else {}

    def _gap(self, logits: Tensor, batch: Batch, rows: Tensor, weight: Tensor) -> Tensor | None:
        """`confusion_gap` of those of the rows that have a strong view."""
        two = batch.pair[rows] >= 0
        weak = rows[two]
        if not len(weak):
            return None
        strong = logits[batch.pair[weak]]
        return confusion_gap(logits[weak], strong, self.config.temperature, self.config.threshold, weight[two])
