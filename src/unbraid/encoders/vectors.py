"""Given vectors (pre-trained embeddings of texts, images, graphs) as they are, or through a linear layer.

A member of the slot ``vectors`` is built once per view and reads all vector features, so that it may compare two of them.  A
missing vector is zeros in the data, and a vector of zeros is read as missing by the members that tell the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from unbraid.types import FORBID


class VectorEncoder(Protocol):
    """Config of a member: ``build`` gives a module (feature -> (B, D)) -> (field -> (B, w)) with ``widths``: field -> w."""

    def build(self, widths: Mapping[str, int], width: int, std: float) -> nn.Module:
        """For given vectors, feature -> D; ``width``: the view's; ``std``: of the first weights of tables."""


@dataclass(frozen=True)
class Raw:
    """Every vector as it is."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["raw"] = field(default="raw", kw_only=True)

    def build(self, widths: Mapping[str, int], width: int, std: float) -> RawVectors:
        """widths: vector feature -> D; the rest is not read."""
        return RawVectors(widths)


class RawVectors(nn.Module):
    """Gives what it gets."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.widths = dict(widths)

    def forward(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """feature -> (B, D)."""
        return {name: vectors[name] for name in self.widths}


@dataclass(frozen=True)
class Projected:
    """A linear layer from every vector to the width of the view's tables."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["projected"] = field(default="projected", kw_only=True)

    def build(self, widths: Mapping[str, int], width: int, std: float) -> ProjectedVectors:
        """widths: vector feature -> D; width: of the view's tables."""
        return ProjectedVectors(widths, width)


class ProjectedVectors(nn.Module):
    """One linear layer per feature."""

    def __init__(self, widths: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.widths = dict.fromkeys(widths, width)
        self.linears = nn.ModuleDict({f"vector/{name}": nn.Linear(d, width) for name, d in widths.items()})

    def forward(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """feature -> (B, width)."""
        return {name: self.linears[f"vector/{name}"](vectors[name]) for name in self.widths}
