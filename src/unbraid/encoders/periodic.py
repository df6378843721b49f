"""Numbers through sines and cosines of learned frequencies.

Paper: Gorishniy, Rubachev, Babenko: "On Embeddings for Numerical Features in Tabular Deep Learning", NeurIPS 2022,
https://arxiv.org/abs/2203.05556, there "PLR": periodic, linear, ReLU.  x is the standardised value::

    v_j    = 2 pi c_j x            c_j ~ Normal(0, sigma^2), trained
    vector = relu(W [sin v, cos v, missing] + b)

How this differs.  Written from memory of the paper; its code was not compared.  A missing number has zeros and a flag.  The
defaults are ours: sigma is the hyper-parameter that counts, and the paper searches it over four orders of magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.numbers import Spread
from unbraid.encoders.piecewise import BIBTEX as BIBTEX
from unbraid.layers import require_positive
from unbraid.types import FORBID


@dataclass(frozen=True)
class Periodic:
    """Sines and cosines, a linear layer, ReLU.

    Args:
        frequencies: how many.
        sigma: standard deviation of their first values, in periods per standard deviation of the number.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["periodic"] = field(default="periodic", kw_only=True)
    frequencies: int = 16
    sigma: float = 1.0

    def __post_init__(self) -> None:
        require_positive(frequencies=self.frequencies)
        if not self.sigma > 0:
            raise ValueError(f"Parameter `sigma` should be positive. Found {self.sigma}.")

    def build(self, spread: Spread, width: int, std: float) -> PeriodicNumber:
        """The module of one view and feature."""
        return PeriodicNumber(self.frequencies, self.sigma, width)


class PeriodicNumber(nn.Module):
    """The waves and a linear layer with ReLU."""

    def __init__(self, frequencies: int, sigma: float, width: int) -> None:
        super().__init__()
        self.width = width
        self.frequencies = nn.Parameter(torch.randn(frequencies) * sigma)
        self.linear = nn.Linear(2 * frequencies + 1, width)

    def forward(self, number: Tensor, value: Tensor) -> Tensor:
        """((B, 2), (B, 1)) becomes (B, width)."""
        x, missing = number[:, :1], number[:, 1:]
        angles = 2 * math.pi * x * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], 1) * (1 - missing)
        return self.linear(torch.cat([waves, missing], 1)).relu()
