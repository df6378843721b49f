"""The supervised loss: each task's labels against its logits, over the rows where that label is known.

For a row with logit s and label y: binary, ``softplus(s) - y s`` (cross-entropy with logits); multiclass, cross-entropy
over all classes; real, ``(s - y)^2``.  An objective is the mean over observed rows, weighted: ``sum w l / sum w``.

**Logs that kept only a share of the negatives.**  Let the full log have P positives and N negatives at some x.  If all
positives but only a share r of the negatives were kept, the kept log has odds ``P / (r N)``, 1/r times the true: so
``kept logit = true logit - log r``.  A model that should speak about the full log is therefore compared with the kept
labels at ``logit - log r``: the shift is in the loss and nowhere else, and the logit itself stays calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.losses.exposure import Exposure
from unbraid.types import FORBID, Batch, Losses, Output, Schema, Task


def sampling_offset(task: Task, batch: Batch, rows: Tensor | slice) -> Tensor | float:
    """What to add to the logits of the given rows, ``-log(rate)``: (n,) if the batch knows a rate per row, else 0."""
    rate = batch.meta.get(f"sampling_rate.{task.name}")
    return 0.0 if rate is None else -rate[rows].log()


def shifted(task: Task, logits: Tensor, batch: Batch, rows: Tensor | slice) -> Tensor:
    """(n,) logits of the given rows as the kept log has them, in their own precision."""
    offset = sampling_offset(task, batch, rows)
    return logits + (offset.to(logits.dtype) if isinstance(offset, Tensor) else offset)


def row_losses(task: Task, output: Output, batch: Batch, rows: Tensor | slice) -> Tensor:
    """(n,) loss of one task on the given rows ((n,) int64, or a slice), all of them observed."""
    logits, labels = output.logits[task.name][rows], batch.labels[task.name][rows]
    if task.kind == "multiclass":
        return F.cross_entropy(logits, labels, reduction="none")
    labels = labels.to(logits.dtype)
    if task.kind == "real":
        return F.mse_loss(logits, labels, reduction="none")
    return F.binary_cross_entropy_with_logits(shifted(task, logits, batch, rows), labels, reduction="none")


def counted(mask: Tensor) -> Tensor | slice | None:
    """The rows (n,) of a mask (B,); None if there are none.  All rows are a slice, which neither copies nor scatters back."""
    rows = mask.nonzero().squeeze(1)
    return None if len(rows) == 0 else slice(None) if len(rows) == len(mask) else rows


def require_weight(weight: float) -> None:
    """Raises ValueError unless a loss's weight is positive and finite."""
    if not 0 < weight < math.inf:
        raise ValueError(f"Parameter `weight` should be positive. Found {weight}.")


def domain_means(losses: Tensor, weights: Tensor, domain: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """(code, weighted mean) of each domain that occurs, of ``count``; losses, weights and domain codes are (n,)."""
    totals = losses.new_zeros(count).index_add(0, domain, losses * weights)
    mass = weights.new_zeros(count).index_add(0, domain, weights)
    present = mass.nonzero().squeeze(1)
    return zip(present.tolist(), (totals[present] / mass[present]).unbind(), strict=True)


@dataclass(frozen=True)
class Supervised:
    """Supervised loss of all tasks.  It is data: `bind` makes the term.

    Args:
        by: which objectives there are.  ``task``: one per task.  ``domain``: one per domain, the *weighted sum over
            tasks* of the task's mean within that domain, so that a task counts there however many labels it has.
            ``task@domain``: one per pair, named ``TASK@DOMAIN``.
        weight: of this loss beside others of the same objective (``ranking``).
        exposure: rows count less the more often their user had been shown their item; needs ``data.exposure``.

    Tasks' weights are applied here only where objectives are domains; else what makes one step of several losses does.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    needs: ClassVar[tuple[str, ...]] = ()
    kind: Literal["supervised"] = field(default="supervised", kw_only=True)
    by: Literal["task", "domain", "task@domain"] = "task"
    weight: float = 1.0
    exposure: Exposure | None = None

    def __post_init__(self) -> None:
        require_weight(self.weight)

    def bind(self, schema: Schema) -> Bound:
        """The term for the tasks and domains of a schema."""
        return Bound(schema, self.by, weight=self.weight, exposure=self.exposure)


@dataclass(frozen=True)
class Bound:
    """`Supervised` with the schema that names its tasks, their kinds and the domains."""

    needs: ClassVar[tuple[str, ...]] = ()
    schema: Schema
    by: Literal["task", "domain", "task@domain"] = "task"
    weight: float = field(default=1.0, kw_only=True)
    exposure: Exposure | None = field(default=None, kw_only=True)

    @property
    def reads(self) -> tuple[str, ...]:
        """What the data must declare of each row."""
        return () if self.exposure is None else ("exposure",)

    def known(self, task: Task, batch: Batch) -> Tensor:
        """(B,) bool: the rows that the task's loss counts."""
        return batch.observed[task.name]

    def row_losses(self, task: Task, output: Output, batch: Batch, rows: Tensor | slice) -> Tensor:
        """(n,) loss of one task on the given rows, all of them known."""
        if self.exposure is not None and task.kind == "binary":
            logits = output.logits[task.name]
            moved = logits + self.exposure.shift(batch.meta["exposure"]).to(logits.dtype)
            output = replace(output, logits={**output.logits, task.name: moved})
        return row_losses(task, output, batch, rows)

    def row_weights(self, task: Task, batch: Batch, rows: Tensor | slice) -> Tensor | float:
        """(n,) weights of the given rows beside `Batch.weight`."""
        if self.exposure is None:
            return 1.0
        positive = (batch.labels[task.name][rows] == 1) & (task.kind == "binary")
        return self.exposure.weights(batch.meta["exposure"][rows], positive)

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """objective -> scalar.  One without an observed row of positive weight is absent."""
        losses: dict[str, Tensor] = {}
        counts = torch.ones_like(batch.row, dtype=torch.float32) if batch.weight is None else batch.weight
        for task in self.schema.tasks:
            rows = counted(self.known(task, batch) & (counts > 0))
            if rows is None:
                continue
            loss = self.row_losses(task, output, batch, rows)
            weights = (counts[rows] * self.row_weights(task, batch, rows)).to(loss.dtype)
            if self.by == "task":
                losses[task.name] = (loss * weights).sum() / weights.sum()
                continue
            for code, mean in domain_means(loss, weights, batch.domain[rows], len(self.schema.domains)):
                name = self.schema.domains[code]
                if self.by == "domain":
                    mean = mean * task.weight  # the update knows only the sum
                key = name if self.by == "domain" else f"{task.name}@{name}"
                losses[key] = losses[key] + mean if key in losses else mean
        return {objective: loss * self.weight for objective, loss in losses.items()}
