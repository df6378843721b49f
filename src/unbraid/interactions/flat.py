"""The plain interaction: the fields of a view, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.types import FORBID


class FlatModule(nn.Module):
    """Concatenates the fields of a view, always in the order in which it was built.

    Args:
        widths: field -> D of its vector.

    Attributes:
        width: width of the result, the sum of all D.
        widths: field -> D, in the order of the result.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.fields, self.width, self.widths = tuple(widths), sum(widths.values()), dict(widths)

    def forward(self, view: Mapping[str, Tensor]) -> Tensor:
        """field -> (B, D) becomes (B, width).  Fields it was not built with are ignored; a missing one: KeyError."""
        return torch.cat([view[name] for name in self.fields], dim=1)


@dataclass(frozen=True)
class Flat:
    """Concatenation of all fields, without parameters."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["flat"] = field(default="flat", kw_only=True)

    def build(self, widths: Mapping[str, int]) -> FlatModule:
        """The module for fields of the given widths.  Raises ValueError if there is none."""
        if not widths:
            raise ValueError("Interaction `flat` needs at least one field. Found none.")
        return FlatModule(widths)
