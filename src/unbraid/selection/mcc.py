"""Class confusion of all target rows' predictions at once: lower is better.

Paper: "Minimum Class Confusion for Versatile Domain Adaptation", Jin, Wang, Long, Wang, ECCV 2020, where it is a loss
(`unbraid.losses.mcc`); to select by it is ours.

The value is that loss over all target rows as one batch, less its floor: 0 where every class has rows that are sure of it
and no others. A collapse and total doubt are both the worst.  Classes that the target does not have count 1/C each whatever
the model, so values of different targets do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from unbraid.losses.mcc import BIBTEX as BIBTEX
from unbraid.losses.mcc import class_confusion, floor, require_temperature
from unbraid.selection.rows import OnTarget
from unbraid.slots import Judged
from unbraid.types import FORBID, Schema, Scores, Task


@dataclass(frozen=True)
class TargetConfusion(OnTarget):
    """The class confusion of target rows above its floor.

    Args:
        domains, tasks: see `OnTarget`.
        temperature: as in `unbraid.losses.mcc.MCC`.

    Raises:
        ValueError: the temperature is not positive and finite.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["mcc"] = field(default="mcc", kw_only=True)
    temperature: float = 2.5

    def __post_init__(self) -> None:
        require_temperature(self.temperature)

    def __call__(self, scores: Scores, schema: Schema) -> Judged:
        """See `unbraid.slots.Selection`."""

        def judge(task: Task) -> float:
            rows = self.target(task, scores)
            logits = torch.from_numpy(np.asarray(scores.logits[task.name])[rows]).double()
            weight = None if scores.weight is None else torch.from_numpy(np.asarray(scores.weight)[rows])
            found = float(class_confusion(logits, self.temperature, weight))
            return found - floor(len(rows), max(schema.outputs(task), 2))

        return self.mean(schema, judge)
