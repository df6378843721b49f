"""Piecewise linear encoding of numbers.

Paper: Gorishniy, Rubachev, Babenko: "On Embeddings for Numerical Features in Tabular Deep Learning", NeurIPS 2022,
https://arxiv.org/abs/2203.05556.  Buckets b_0 <= b_1 <= ... <= b_T at training quantiles become T inputs, which a number fills
one after the other::

    e_t(x) = (x - b_(t-1)) / (b_t - b_(t-1))     cut below 0 unless t = 1, and above 1 unless t = T
    vector = W [e_1(x), ..., e_T(x), missing] + c

so that a linear layer above is any function that is linear within buckets.  The first and the last bucket go on as lines.

How this differs.  Written from memory of the paper; its code was not compared.  Buckets that ties make empty are steps (0 below,
1 from there on), and the first and the last of them do not go on as lines.  A missing number has zeros and a flag.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.numbers import Spread
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{gorishniy2022embeddings,
  title     = {On Embeddings for Numerical Features in Tabular Deep Learning},
  author    = {Gorishniy, Yury and Rubachev, Ivan and Babenko, Artem},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {35},
  year      = {2022}
}
"""


@dataclass(frozen=True)
class Piecewise:
    """Linear within buckets.

    Args:
        bins: number of buckets T.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["piecewise"] = field(default="piecewise", kw_only=True)
    bins: int = 32

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"Parameter `bins` should be positive. Found {self.bins}.")

    def build(self, spread: Spread, width: int, std: float) -> PiecewiseNumber:
        """The module of one view and feature."""
        return PiecewiseNumber(spread, self.bins, width)


class PiecewiseNumber(nn.Module):
    """The encoding and a linear layer."""

    edges: Tensor

    def __init__(self, spread: Spread, bins: int, width: int) -> None:
        super().__init__()
        self.width = width
        known = torch.tensor(spread.quantiles, dtype=torch.float64)
        at = torch.arange(bins + 1) * (len(known) - 1) / bins
        self.register_buffer("edges", known[at.round().long()])
        self.linear = nn.Linear(bins + 1, width)

    def pieces(self, value: Tensor) -> Tensor:
        """(B, 1) becomes (B, T) float64."""
        x, low, high = value.double(), self.edges[:-1], self.edges[1:]
        filled = (x - low) / torch.where(high > low, high - low, 1.0)
        first, last = torch.zeros_like(low), torch.ones_like(low)
        first[0], last[-1] = -torch.inf, torch.inf
        steps = (x >= low).double()
        return torch.where(high > low, filled.clamp(first, last), steps)

    def forward(self, number: Tensor, value: Tensor) -> Tensor:
        """((B, 2), (B, 1)) becomes (B, width)."""
        missing = number[:, 1:]
        pieces = self.pieces(value).to(number.dtype) * (1 - missing)
        return self.linear(torch.cat([pieces, missing], 1))
