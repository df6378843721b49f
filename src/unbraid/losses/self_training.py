"""What self-training losses share: which rows are without a label, what the model says of them, what of it is believed.

Of one task, with z the logits over its classes (a binary task with logit s has z = [0, s]), T a temperature and B_u the rows of
a batch without a label::

    q_i = softmax(z(a(x_i)) / T), no gradient        y_i = argmax q_i        believed: max q_i > tau(y_i)
    L   = (1 / B_u) sum over believed i of CE(z'(A(x_i)), y_i)                  with weights w: sum w_i .. / sum w_i

a is the weak view (or the row itself), A the view that learns.  The sum is over believed rows, the division by all.

Which rows are without a label.  A null of a task without ``given``.  Of a conditional task (conversion *after a click*), only a
row whose parent is known to be 1: where the parent is 0 there is no label that could be missing, and where the parent is itself
unknown, nobody knows whether there is one.  Rows of weight 0 take no part.

Where a log kept a share of the negatives, q is that of the kept log, as in `unbraid.losses.supervised`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.losses.supervised import require_weight, shifted
from unbraid.types import FORBID, Batch, Losses, Output, Schema, State, Task

Views = Literal["none", "unlabelled", "all"]


@dataclass(frozen=True)
class SelfTraining:
    """What `PseudoLabel`, `FixMatch` and `FlexMatch` are set by.

    Args:
        threshold: what the largest probability must exceed.
        weight: of this loss (lambda_u, mu) beside the others.
        temperature: of the probabilities that are compared with the threshold.
        tasks: which tasks; empty: all binary and multiclass ones.

    Attributes:
        views: which rows must have a strong view beside the weak one (`unbraid.slots.Augmentation.of`).

    Raises:
        ValueError: ``threshold`` is not in [0, 1], or ``weight`` or ``temperature`` is not positive.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    views: ClassVar[Views] = "unlabelled"
    threshold: float = 0.95
    weight: float = 1.0
    temperature: float = 1.0
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"Parameter `threshold` should be in [0, 1]. Found {self.threshold}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"Parameter `temperature` should be positive. Found {self.temperature}.")
        require_weight(self.weight)

    def believe(self, schema: Schema) -> Believe:
        """What of a model's opinions is believed; remembers nothing yet."""
        return Believe(self.threshold)

    def bind(self, schema: Schema) -> BoundSelfTraining:
        """The term for a schema.  Raises ValueError as `tasks_of`."""
        kind: str = self.kind  # type: ignore[attr-defined]
        return BoundSelfTraining(kind, tasks_of(schema, self.tasks, kind), self, self.believe(schema))


class Believe:
    """One threshold for all.  A member with more to remember makes another of this class."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, task: Task, confidence: Tensor, label: Tensor, row: Tensor) -> Tensor:
        """(n,) bool: which opinions count.  Confidence, class and number of each row are (n,)."""
        return confidence > self.threshold

    def fresh(self, rows: Any, labels: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Believe:
        """As `unbraid.slots.Term` has it."""
        return self

    def state_dict(self) -> State:
        """What it remembers."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Remember that."""


class Lesson(NamedTuple):
    """Believed rows of a batch: where they are learnt (k,), as which class (k,), and their shares of all B_u rows (k,)."""

    at: Tensor
    label: Tensor
    share: Tensor

    def loss(self, logits: Tensor) -> Tensor:
        """The loss, a scalar, of (B, K) logits that learn."""
        losses = F.cross_entropy(logits[self.at], self.label, reduction="none")
        return (losses * self.share).sum()


class BoundSelfTraining:
    """A self-training loss of some tasks with one objective, ``kind``: the sum over tasks of weight times loss.

    Args:
        kind: its objective; config: says the temperature, and which view learns; believe: what is believed.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[tuple[str, ...]] = ()  # no task without labels of its own

    def __init__(self, kind: str, tasks: Sequence[Task], config: SelfTraining, believe: Believe) -> None:
        self.kind, self.tasks, self.config, self.believe = kind, tuple(tasks), config, believe

    @property
    def objectives(self) -> tuple[str, ...]:
        """All that its losses may be called."""
        return (self.kind,)

    @property
    def unlabelled(self) -> tuple[Task, ...]:
        """The tasks that it wants rows without a label of."""
        return self.tasks

    def fresh(
        self, rows: Any, labels: Mapping[str, Tensor], observed: Mapping[str, Tensor]
    ) -> BoundSelfTraining:  # fmt: skip
        """See `unbraid.slots.Term`."""
        return type(self)(self.kind, self.tasks, self.config, self.believe.fresh(rows, labels, observed))

    def state_dict(self) -> State:
        """See `unbraid.slots.Term`."""
        return self.believe.state_dict()

    def load_state_dict(self, state: State) -> None:
        """See `unbraid.slots.Term`."""
        self.believe.load_state_dict(state)

    def lesson(self, task: Task, output: Output, batch: Batch) -> Lesson | None:
        """What a task's head teaches of a batch; None where no row is without a label, or no opinion is believed."""
        strong = self.config.views != "none"
        rows = hidden_rows(task, batch)
        rows = rows[batch.pair[rows] >= 0] if strong else rows
        if not len(rows):
            return None
        logits = class_logits(task, output, batch).detach()[rows]
        confidence, label = (logits / self.config.temperature).softmax(1).max(1)
        kept = self.believe(task, confidence, label, batch.row[rows]).nonzero().squeeze(1)
        if not len(kept):
            return None
        weight = torch.ones_like(confidence) if batch.weight is None else batch.weight[rows].to(confidence.dtype)
        at = batch.pair[rows] if strong else rows
        return Lesson(at[kept], label[kept], weight[kept] / weight.sum())

    def __call__(self, output: Output, batch: Batch, step: int) -> Losses:
        """The objective's scalar; none where nothing is believed."""
        parts = []
        for task in self.tasks:
            if (lesson := self.lesson(task, output, batch)) is not None:
                parts.append(task.weight * lesson.loss(class_logits(task, output, batch)))
        return {self.kind: self.config.weight * torch.stack(parts).sum()} if parts else {}


# ---------------------------------------------------------------------------------------------------------- rows and logits
def tasks_of(schema: Schema, names: Sequence[str], kind: str) -> tuple[Task, ...]:
    """The tasks that a loss is of.

    Raises:
        ValueError: a name is no task, or one of a real-valued task; there is no other; or a task or domain is called ``kind``.
    """
    tasks = [schema.task(name) for name in names] or [task for task in schema.tasks if task.kind != "real"]
    if real := [task.name for task in tasks if task.kind == "real"]:
        raise ValueError(f"Loss `{kind}` is of binary and multiclass tasks. Real-valued: {', '.join(real)}.")
    if not tasks:
        raise ValueError(f"Loss `{kind}` needs a binary or multiclass task. Found {[t.name for t in schema.tasks]}.")
    if kind in {*(task.name for task in schema.tasks), *schema.domains}:
        raise ValueError(f"`{kind}` is the objective of a loss. Rename the task or domain of this name.")
    return tuple(tasks)


def unlabelled(task: Task, labels: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """(B,) bool: is there a label of the task, and unknown?"""
    missing = ~observed[task.name]
    return missing & observed[task.given] & (labels[task.given] == 1) if task.given else missing


def _plain(batch: Batch) -> Tensor:
    """(B,) bool: weak or plain views that count."""
    plain = batch.view == 0
    return plain if batch.weight is None else plain & (batch.weight > 0)


def hidden_rows(task: Task, batch: Batch) -> Tensor:
    """(n,) rows without a label of the task, as their weak view shows them."""
    return (_plain(batch) & unlabelled(task, batch.labels, batch.observed)).nonzero().squeeze(1)


def known_rows(task: Task, batch: Batch) -> Tensor:
    """(n,) rows with a label of the task, as their weak view shows them."""
    return (_plain(batch) & batch.observed[task.name]).nonzero().squeeze(1)


def over_classes(logits: Tensor) -> Tensor:
    """(B, K) logits over classes; those of a binary task, (B,), as [0, s]."""
    return logits if logits.dim() == 2 else torch.stack([torch.zeros_like(logits), logits], 1)


def class_logits(task: Task, output: Output, batch: Batch) -> Tensor:
    """(B, K) logits of a task over its classes, in the log as it was kept."""
    logits = output.logits[task.name]
    return over_classes(shifted(task, logits, batch, slice(None)) if task.kind == "binary" else logits)
