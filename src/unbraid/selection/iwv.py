"""Importance-weighted validation (IWV): the loss of labelled source rows, weighted to look like the target's.

Paper: "Covariate Shift Adaptation by Importance Weighted Cross Validation", Sugiyama, Krauledat, Mueller, JMLR 8, 2007.

Idea: where only the inputs' distribution differs, p(y | x) being the same, the mean over source rows of w(x) = q(x) / p(x) times
their loss is the mean loss of the target::

    R = mean_i w_i l_i                                  lower is better

w is estimated by telling source and target rows apart (`unbraid.calibration.density`) from the task's hidden vectors, which
change at every look.

How this differs: the paper weights in the input space and validates in several folds of the training rows; here in the
model's own space, as in "Towards Accurate Model Selection in Deep Unsupervised Domain Adaptation"
(`unbraid.selection.dev`), on the validation split.  Weights are cross-fitted: each half of the source rows gets those of a
ratio that was fitted on the other half. Vectors are standardised first.

**What it cannot do.**  Where the source has no row like the target's, no weighting helps; it shows in the numbers that are logged
beside it: the weights' mean (near 1) and how many rows they are worth.  Where p(y | x) shifts, R is of another target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from unbraid.calibration.density import Support, density_ratio
from unbraid.selection.rows import Array, OnTarget, log_probabilities
from unbraid.slots import Judged
from unbraid.types import FORBID, Schema, Scores, Task

BIBTEX = """
@article{sugiyama2007iwcv,
  title   = {Covariate Shift Adaptation by Importance Weighted Cross Validation},
  author  = {Sugiyama, Masashi and Krauledat, Matthias and M{\\"u}ller, Klaus-Robert},
  journal = {Journal of Machine Learning Research},
  volume  = {8},
  pages   = {985--1005},
  year    = {2007},
}
"""


@dataclass(frozen=True)
class IWV(OnTarget):
    """The weighted mean loss of labelled validation rows.

    Args:
        domains, tasks: see `OnTarget`.
        loss: ``logloss``, the cross-entropy (of real tasks the squared error), or ``error``, the share of wrong predictions.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    reads_hidden: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("binary", "multiclass", "real")
    kind: Literal["iwv"] = field(default="iwv", kw_only=True)
    loss: Literal["logloss", "error"] = "logloss"

    def chosen(self, schema: Schema) -> tuple[Task, ...]:
        """See `OnTarget`.  Raises ValueError for the error of a real task."""
        tasks = super().chosen(schema)
        if self.loss == "error" and (real := [task.name for task in tasks if task.kind == "real"]):
            raise ValueError(
                f"Selection `{self.kind}`: tasks {real} are real and have no `error`. Set `loss` to logloss."
            )
        return tasks

    def check(self, scores: Scores, schema: Schema) -> None:
        """See `unbraid.slots.Selection`."""
        super().check(scores, schema)
        for task in self.chosen(schema):
            rows = self.source(task, scores)
            uneven = scores.weight is not None and len(np.unique(np.asarray(scores.weight)[rows])) > 1
            if uneven or f"sampling_rate.{task.name}" in scores.meta:
                raise ValueError(
                    f"Selection `{self.kind}` compares rows as they are, and those of task `{task.name}` have several weights, "
                    "or sampled negatives. Select by another criterion."
                )

    def __call__(self, scores: Scores, schema: Schema) -> Judged:
        """See `unbraid.slots.Selection`."""
        return self.mean(schema, lambda task: self._judge(task, scores))

    def _judge(self, task: Task, scores: Scores) -> Judged:
        rows = self.source(task, scores)
        hidden = np.asarray(scores.hidden[task.name])
        try:
            w = cross_fitted(hidden[rows], hidden[self.target(task, scores)])
        except ValueError as error:  # the two sides cannot be told apart by a regression that converges
            return Judged(None, str(error))
        support = Support.of(w)
        numbers = {"mean_weight": support.mean, "effective_rows": support.effective}
        return Judged(self.risk(w, row_losses(task, scores, rows, self.loss)), "", numbers)

    def risk(self, w: Array, losses: Array) -> float:
        """The estimate, from (n,) weights and losses."""
        return float((w * losses).mean())


def cross_fitted(source: Array, target: Array) -> Array:
    """(n,) weights of the (n, H) source rows, each from a ratio that was fitted without it (on every other row)."""
    both = np.concatenate([source, target]).astype(np.float64)
    scale = both.std(0)
    keep = ~(scale <= 1e-12 * np.abs(both).max(initial=1.0))  # units that never fire say nothing
    if not keep.any():
        return np.ones(len(source))
    x, t = ((side[:, keep] - both[:, keep].mean(0)) / scale[keep] for side in (source, target))
    weights, half = np.empty(len(x)), np.arange(len(x)) % 2 == 0
    for mine in (half, ~half):
        weights[mine] = density_ratio(x[~mine], t)(x[mine])
    return weights


def row_losses(task: Task, scores: Scores, rows: Array, loss: str) -> Array:
    """(n,) loss of the given rows, all labelled."""
    logits, labels = np.asarray(scores.logits[task.name])[rows], np.asarray(scores.labels[task.name])[rows]
    if task.kind == "real":
        return (logits.astype(np.float64) - labels) ** 2
    log_p, labels = log_probabilities(logits), labels.astype(np.int64)
    if loss == "error":
        return (log_p.argmax(1) != labels).astype(np.float64)
    return -log_p[np.arange(len(rows)), labels]
