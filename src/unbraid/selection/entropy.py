"""Mean entropy of the target rows' predictions: lower is better.

Paper: "Semi-supervised Learning by Entropy Minimization", Grandvalet, Bengio, NIPS 2004, where it is a loss
(`unbraid.losses.entropy`).

    R = mean_i H(p_i)

**A collapse scores best**: a model that calls every row the same class is sure of it.  It is here for comparison;
`unbraid.selection.mcc` counts a collapse as the worst.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from unbraid.losses.entropy import BIBTEX as BIBTEX
from unbraid.selection.rows import OnTarget, log_probabilities
from unbraid.slots import Judged
from unbraid.types import FORBID, Schema, Scores, Task


@dataclass(frozen=True)
class TargetEntropy(OnTarget):
    """The mean entropy of target rows' predictions, weighted by rows' weights.

    Args:
        domains, tasks: see `OnTarget`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["entropy"] = field(default="entropy", kw_only=True)

    def __call__(self, scores: Scores, schema: Schema) -> Judged:
        """See `unbraid.slots.Selection`."""

        def judge(task: Task) -> float:
            rows = self.target(task, scores)
            log_p = log_probabilities(np.asarray(scores.logits[task.name])[rows])
            weight = None if scores.weight is None else np.asarray(scores.weight)[rows]
            return float(np.average(-(np.exp(log_p) * log_p).sum(1), weights=weight))

        return self.mean(schema, judge)
