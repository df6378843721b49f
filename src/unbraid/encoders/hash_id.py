"""HashID: a given vector as the bits of its random-hyperplane hash, every bit with two vectors of its own.

Paper: Pan, Xue, Wang, Yu, Liu, Quan, Qiu, Liu, Xiao, Jiang: "Ads Recommendation in a Collapsed and Entangled World", KDD 2024,
https://arxiv.org/abs/2403.00793.  A creative's id says nothing about new creatives; a hash of its image's embedding does, as
similar images share most bits::

    bit_j(x) = [<x, h_j> >= 0]   h_j ~ Normal(0, I), fixed       P(bit_j(x) = bit_j(y)) = 1 - angle(x, y) / pi
    e(x) = sum_j X[2 j + bit_j(x)]                               the digits of one number in base 2, K = m

How this differs.  As described by readers of the paper's first version; its body was not read and no code is public.  Hyperplanes
through the origin, so that only direction counts.  A vector of zeros (a missing one) has one row and no bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.numbers import table
from unbraid.encoders.numeral import BIBTEX as BIBTEX
from unbraid.encoders.numeral import Digits
from unbraid.layers import require_positive
from unbraid.types import FORBID


@dataclass(frozen=True)
class Hashed:
    """Bits of random hyperplanes.

    Args:
        bits: how many; seed: draws the hyperplanes, the same in every view.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["hashed"] = field(default="hashed", kw_only=True)
    bits: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(bits=self.bits)
        if self.seed < 0:
            raise ValueError(f"Parameter `seed` should not be negative. Found {self.seed}.")

    def build(self, widths: Mapping[str, int], width: int, std: float) -> HashedVectors:
        """widths: vector feature -> D; width: of the view's tables."""
        generator = torch.Generator().manual_seed(self.seed)
        planes = {name: torch.randn(d, self.bits, generator=generator) for name, d in widths.items()}
        return HashedVectors(planes, width, std)


class HashedVectors(nn.Module):
    """One table of bits per feature.

    Args:
        planes: feature -> (D, m) hyperplanes, saved with the weights.
        width: of the tables; std: of their first values.
    """

    def __init__(self, planes: Mapping[str, Tensor], width: int, std: float) -> None:
        super().__init__()
        self.widths = dict.fromkeys(planes, width)
        self.hashes = nn.ModuleList(_Hash(plane, width, std) for plane in planes.values())

    def forward(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """feature -> (B, width)."""
        return {name: one(vectors[name]) for name, one in zip(self.widths, self.hashes, strict=True)}


class _Hash(nn.Module):
    planes: Tensor

    def __init__(self, planes: Tensor, width: int, std: float) -> None:
        super().__init__()
        self.register_buffer("planes", planes)
        self.digits = Digits(2, planes.shape[1], width, std)
        self.missing = table(1, width, std)

    def bits(self, vectors: Tensor) -> Tensor:
        """(B, D) becomes (B, m) int64, 0 or 1."""
        return (vectors @ self.planes >= 0).long()

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, D) becomes (B, width)."""
        empty = (vectors == 0).all(1, keepdim=True)
        return torch.where(empty, self.missing, self.digits(self.bits(vectors)))
