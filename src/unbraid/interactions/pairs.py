"""What interactions of field pairs share: all fields of a view as vectors of one width, and the fields themselves behind.

A product of two fields needs vectors of one width d.  Numbers are 2 wide (value and missing) and given vectors any width, so
a field that is not d wide passes a linear map without bias.  For a number that is what a factorization machine does: its
value times a learned vector, and another vector where it is missing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from unbraid.interactions.flat import FlatModule
from unbraid.types import FORBID

NUMBER = 2  # the width of a number field: its value, and is it missing?  A history's length is 1 wide


def common_width(widths: Mapping[str, int]) -> int:
    """The most frequent width above that of a number, the smallest of equally frequent ones; numbers alone: theirs.

    A log with more numbers than ids should not squeeze its tables into vectors of two.
    """
    counts = Counter(width for width in widths.values() if width > NUMBER) or Counter(widths.values())
    return min(counts, key=lambda width: (-counts[width], width))


@dataclass(frozen=True)
class Pairwise:
    """Settings of every interaction of field pairs.

    Args:
        width: the width d that all fields are brought to; 0: the most frequent one of the view (`common_width`).
        flat: put the fields themselves, as `flat` has them, behind the interaction.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    width: int = 0
    flat: bool = True

    def __post_init__(self) -> None:
        if self.width < 0:
            raise ValueError(f"Parameter `width` should not be negative. Found {self.width}.")


class PairwiseModule(FlatModule, ABC):
    """Base of the interactions of field pairs; a member says what becomes of the stacked fields (`interact`).

    Args:
        config: the member's settings; widths: field -> D.
        kind: the member's name, for messages.

    Attributes:
        common: d.  width: width of the result; a member adds what `interact` gives.

    Raises:
        ValueError: fewer than two fields.
    """

    compiles = True  # `unbraid.train.dense`

    def __init__(self, config: Pairwise, widths: Mapping[str, int], kind: str) -> None:
        super().__init__(widths)
        if len(widths) < 2:
            raise ValueError(f"Interaction `{kind}` needs at least two fields. Found {len(widths)}.")
        self.flat, self.common = config.flat, config.width or common_width(widths)
        self.width = self.width if config.flat else 0
        other = [name for name, width in widths.items() if width != self.common]
        self.place = {name: n for n, name in enumerate(other)}
        self.maps = nn.ModuleList(nn.Linear(widths[name], self.common, bias=False) for name in other)

    def stacked(self, view: Mapping[str, Tensor]) -> Tensor:
        """(B, F, d)."""
        return torch.stack([self._brought(name, view[name]) for name in self.fields], 1)

    def _brought(self, name: str, x: Tensor) -> Tensor:
        """(B, D) becomes (B, d)."""
        if name not in self.place:
            return x
        linear = cast(nn.Linear, self.maps[self.place[name]])
        return linear(x.to(linear.weight.dtype))  # lengths of histories are single precision in any model

    @abstractmethod
    def interact(self, e: Tensor) -> Tensor:
        """(B, F, d) becomes (B, what the member adds to ``width``)."""

    def forward(self, view: Mapping[str, Tensor]) -> Tensor:
        """field -> (B, D) becomes (B, width).  Fields it was not built with are ignored; a missing one: KeyError."""
        pairs = self.interact(self.stacked(view))
        return torch.cat([pairs, super().forward(view)], 1) if self.flat else pairs
