"""Which tasks and rows a loss reads that looks at predictions alone, and the entropy of predictions.

Rows without a label of a task are those of `unbraid.losses.self_training`: of a conditional task only rows whose parent is known
to be 1 and whose own label is not known yet.  Where all labels of a domain are withheld that is no row: a conditional task
is not adapted there.  Predictions are those for the full log, also where negatives were sampled: rows without labels were not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unbraid.losses.self_training import over_classes, tasks_of, unlabelled
from unbraid.types import FIRST_VALUE, Batch, Schema, Task

Of = Literal["unlabelled", "all"]


@dataclass(frozen=True)
class Reads:
    """The tasks and rows that a loss without labels reads.

    Args:
        tasks: each binary or multiclass; of: rows without a label of the task, or all rows.
        codes: of the domains whose rows count; None: all rows.
    """

    tasks: tuple[Task, ...]
    of: Of
    codes: tuple[int, ...] | None

    @classmethod
    def bind(cls, kind: str, schema: Schema, tasks: Sequence[str], of: Of, domains: Sequence[str]) -> Reads:
        """From names in a run file, for the loss ``kind``.  Raises ValueError as `tasks_of`, and for an unknown domain."""
        known = schema.domains[FIRST_VALUE:]
        if not set(domains) <= set(known):
            raise ValueError(f"Loss `{kind}`: `domains` should be among {list(known)}. Found {list(domains)}.")
        codes = tuple(schema.domains.index(name) for name in domains) if domains else None
        return cls(tasks_of(schema, tasks, kind), of, codes)

    @property
    def unlabelled(self) -> tuple[Task, ...]:
        """The tasks that it needs rows without a label of; see `unbraid.slots.Term`."""
        return self.tasks if self.of == "unlabelled" else ()

    def rows(self, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
        """(n,) int64 rows of the task, none of them a strong view, and (n,) their weights, all positive."""
        mask = batch.view == 0
        if self.of == "unlabelled":
            mask = mask & unlabelled(task, batch.labels, batch.observed)
        elif task.given:  # rows of which it speaks, as far as is known
            mask = mask & batch.observed[task.given] & (batch.labels[task.given] == 1)
        if self.codes is not None:
            mask = mask & torch.isin(batch.domain, torch.tensor(self.codes, device=batch.domain.device))
        if batch.weight is None:
            rows = mask.nonzero().squeeze(1)
            return rows, torch.ones(len(rows), device=rows.device)
        rows = (mask & (batch.weight > 0)).nonzero().squeeze(1)
        return rows, batch.weight[rows]


@dataclass(frozen=True)
class OfPredictions:
    """What bound terms have in common that look at predictions alone: one objective, named by the config's ``kind``."""

    needs: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[tuple[str, ...]] = ()  # without labels nothing says which class is which
    config: Any
    chosen: Reads

    @property
    def unlabelled(self) -> tuple[Task, ...]:
        """See `unbraid.slots.Term`."""
        return self.chosen.unlabelled

    @property
    def objectives(self) -> tuple[str, ...]:
        """All that its losses may be called."""
        return (self.config.kind,)


def class_logits(logits: Tensor) -> Tensor:
    """(n, C) logits over classes, in float32 or better, from those of a multiclass task or (n,) of a binary one."""
    return over_classes(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def row_entropy(log_p: Tensor) -> Tensor:
    """(n,) entropy in nats of (n, C) logarithms of probabilities; exact where a probability underflows."""
    return -(log_p.exp() * log_p).sum(1)
