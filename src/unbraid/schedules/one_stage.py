"""One training stage: all parameters, all rows, the run's weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import nn

from unbraid.slots import Session
from unbraid.types import FORBID


@dataclass(frozen=True)
class OneStage:
    """Train once."""

    __pydantic_config__: ClassVar[dict] = FORBID
    selects: ClassVar[bool] = True  # what it returns is chosen by the looks of its one call of `fit`
    kind: Literal["one_stage"] = field(default="one_stage", kw_only=True)

    def __call__(self, session: Session, model: nn.Module, steps: int) -> nn.Module:
        """Train for ``steps`` and return the model."""
        return session.fit(model, steps)[0]
