"""ESMM: a conditional task learns over the entire space, through the joint event.

Paper: "Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click Conversion Rate", Ma, Zhao, Huang,
Wang, Hu, Zhu, Gai, SIGIR 2018, https://doi.org/10.1145/3209978.3210104, https://arxiv.org/abs/1804.07931.

Idea: a conversion is known only where there was a click.  A conversion model that trains on clicked rows alone sees few of
them, and is then asked about all rows.  But click *and* conversion is known on every row: 0 wherever there was no click.
So the conversion logit s^v is trained inside the joint event, whose probability is the product over the chain::

    p(click and conversion | x) = sigmoid(s^c) sigmoid(s^v)

    L^c = CE(click, s^c)                 over rows where the click is known
    L^v = CE(click * conversion, j)      over rows where the product is known

j is the joint logit, log p - log(1 - p).  With parent's joint logit j' (a root's is its own logit) and the child's s::

    log p       = log sigmoid(j') + log sigmoid(s)
    log (1 - p) = logaddexp(log sigmoid(-j'), log sigmoid(j') + log sigmoid(-s))

The second line adds two events that exclude each other, "the parent did not happen" and "the parent did and the child did
not": no difference of near-equal numbers is taken, so values and gradients are finite for any finite logits.

The product is known where the root is observed and every link is: a 0 makes it 0 whatever stands behind it, a 1 needs the
next label.  The loss of a child writes its parents too; that is the method.  **The logit of a child stays conditional**:
predictions and metrics of a conversion are p(conversion | click, x), measured where there was a click.

How this differs:

- A term and no network: any tower gives the logits.  The paper's own form is one network per task on a shared embedding,
  ``SharedBottom(bottom=(), tower=(..))``.
- Chains of any depth, labels that are missing anywhere, weights, domains.  A child that is not binary keeps the plain loss
  on rows where its parent is 1.
- `Task.sampling_rate` of a task is the share that the log kept of the rows without *its joint event*.  Its offset is added
  to its joint logit, and so reaches its children.
- In the released code the first tower is the conversion's and the second the click's; here tasks go by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.losses.supervised import Bound, shifted
from unbraid.types import FORBID, Batch, Output, Schema, Task

BIBTEX = """
@inproceedings{ma2018esmm,
  title     = {Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click Conversion Rate},
  author    = {Ma, Xiao and Zhao, Liqin and Huang, Guan and Wang, Zhi and Hu, Zelin and Zhu, Xiaoqiang and Gai, Kun},
  booktitle = {Proceedings of the 41st International ACM SIGIR Conference on Research and Development in Information
               Retrieval},
  pages     = {1137--1140},
  year      = {2018},
  doi       = {10.1145/3209978.3210104},
}
"""


@dataclass(frozen=True)
class ESMM:
    """Supervised losses, where a binary task with ``given`` is trained through the joint event over all rows.

    Args:
        by: objectives, as in `unbraid.losses.supervised.Supervised`; a child's joint loss goes by the child's name.
        orphans: what to do with training rows where a child is 1 although a task that it depends on is 0.  ``refuse``
            does not start; ``negative`` takes the joint event as 0 there.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    needs: ClassVar[tuple[str, ...]] = ()
    kind: Literal["esmm"] = field(default="esmm", kw_only=True)
    by: Literal["task", "domain", "task@domain"] = "task"
    orphans: Literal["refuse", "negative"] = "refuse"

    def bind(self, schema: Schema) -> BoundESMM:
        """The term for the tasks and domains of a schema.  Raises ValueError if no binary task has ``given``."""
        if not any(_conditional(task) for task in schema.tasks):
            raise ValueError(
                "Loss `esmm` needs a binary task with `given`, and there is none. Say which task the later step needs "
                '(`given = "click"`), or use the loss `supervised`, which is the same without one.'
            )
        return BoundESMM(schema, self.by, self.orphans)


@dataclass(frozen=True)
class BoundESMM(Bound):
    """`ESMM` with the schema that names its tasks, their parents and the domains."""

    orphans: Literal["refuse", "negative"] = "refuse"

    def check(self, orphans: Mapping[str, tuple[int, int]]) -> None:
        """Raises ValueError if orphans are refused and there are any.

        Args:
            orphans: task -> (training rows where it is 1 and a task before it is 0, rows where it is 1).
        """
        found = [self._about(task, *counts) for task, counts in orphans.items() if counts[0]]
        if found and self.orphans == "refuse":
            raise ValueError(
                f"Loss `esmm`: {' '.join(found)} Or keep the rows and take the joint event as 0 there: `orphans = "
                '"negative"` in the entry of `[[losses]]` (`--set losses.0.orphans=negative`).'
            )

    def _about(self, name: str, count: int, positives: int) -> str:
        """What is wrong with one task's labels, and the filter that drops them."""
        task = self.schema.task(name)
        parents = _parents(self.schema, task)
        before = " or ".join(f"`{parent.name}`" for parent in parents)
        chain = " and ".join(f"coalesce({parent.source}, 1) = 1" for parent in parents)
        return (
            f"Task `{name}` is 1 in {count:,} training rows where {before} is 0 ({count / positives:.1%} of the rows "
            f"where it is 1), which `given` excludes. Drop them with `data.keep = "
            f'"{f"({chain})" if len(parents) > 1 else chain} or coalesce({task.source}, 0) = 0"`.'
        )

    def known(self, task: Task, batch: Batch) -> Tensor:
        """(B,) bool: the rows where the task's joint event is known; for other tasks, where the label is."""
        return joint_label(self.schema, task, batch)[0] if _conditional(task) else super().known(task, batch)

    def row_losses(self, task: Task, output: Output, batch: Batch, rows: Tensor | slice) -> Tensor:
        """(n,) loss of one task on the given rows, all of them known."""
        if not _conditional(task):
            return super().row_losses(task, output, batch, rows)
        logits = joint_logit(self.schema, task, output, batch, rows)
        labels = joint_label(self.schema, task, batch)[1][rows].to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def joint_logit(schema: Schema, task: Task, output: Output, batch: Batch, rows: Tensor | slice) -> Tensor:
    """(n,) logit that a binary task and all tasks before it happen, in the log as it was kept."""
    logit = output.logits[task.name][rows]
    if task.given:
        parent = joint_logit(schema, schema.task(task.given), output, batch, rows)
        reached = F.logsigmoid(parent)
        happened = reached + F.logsigmoid(logit)
        failed = torch.logaddexp(F.logsigmoid(-parent), reached + F.logsigmoid(-logit))
        logit = happened - failed
    return shifted(task, logit, batch, rows)


def joint_label(schema: Schema, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B,) bool, (B,) bool: is it known whether a binary task and all before it happened, and did they.

    The second holds only where the first is True: a label that is not observed may be anything.
    """
    seen, positive = batch.observed[task.name], batch.labels[task.name] == 1
    if not task.given:
        return seen, positive
    known, before = joint_label(schema, schema.task(task.given), batch)
    return known & (~before | seen), before & positive


def _conditional(task: Task) -> bool:
    return bool(task.given) and task.kind == "binary"


def _parents(schema: Schema, task: Task) -> list[Task]:
    """The tasks that a task depends on, the root first."""
    if not task.given:
        return []
    parent = schema.task(task.given)
    return [*_parents(schema, parent), parent]
