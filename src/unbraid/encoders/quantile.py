"""Numbers as ids: buckets of equal shares of the training rows, each with a vector of its own.

Paper: none.  The usual way to let an embedding model read a number, and a baseline for the other encoders::

    bucket = min(floor(rank(x) * bins), bins - 1)        e(x) = E[bucket]        e(missing) = m

rank(x) in [0, 1] is interpolated between 256 values of the training split at evenly spaced ranks; tied values have one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.numbers import Rank, Spread, table
from unbraid.types import FORBID


@dataclass(frozen=True)
class Quantile:
    """One vector per bucket.

    Args:
        bins: number of buckets.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["quantile"] = field(default="quantile", kw_only=True)
    bins: int = 32

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"Parameter `bins` should be at least 2. Found {self.bins}.")

    def build(self, spread: Spread, width: int, std: float) -> QuantileNumber:
        """The module of one view and feature."""
        return QuantileNumber(spread, self.bins, width, std)


class QuantileNumber(nn.Module):
    """A table with one row per bucket and a last one for a missing number."""

    def __init__(self, spread: Spread, bins: int, width: int, std: float) -> None:
        super().__init__()
        self.width, self.bins, self.rank = width, bins, Rank(spread)
        self.weight = table(bins + 1, width, std)

    def forward(self, number: Tensor, value: Tensor) -> Tensor:
        """((B, 2), (B, 1)) becomes (B, width)."""
        bucket = self.rank.bucket(value, self.bins)
        return nn.functional.embedding(torch.where(number[:, 1] > 0, self.bins, bucket), self.weight)
