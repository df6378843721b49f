"""What number encoders share: what training taught about a number, its rank there, and the plain encoder.

An encoder of the slot ``numbers`` turns one number feature into one field of a view.  It is built once per view and feature, so
that every view has its own tables, and reads two forms of the number: standardised in single precision with a missing flag,
(B, 2), and the value itself in double precision, (B, 1).  Both are needed: a whole number cannot be got back from its
standardised value once it has more digits than single precision holds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from unbraid.types import FORBID, Feature, Schema


@dataclass(frozen=True)
class Spread:
    """What the training split taught about a number, after its transform.

    Args:
        name: the feature, for messages.
        mean, std: as it is standardised.
        quantiles: its values at evenly spaced ranks, the least first and the greatest last.
        whole: all its values are whole and exact in double precision, as far as is known.
    """

    name: str = ""
    mean: float = 0.0
    std: float = 1.0
    quantiles: tuple[float, ...] = (0.0, 1.0)
    whole: bool = True
    transform: str = "none"

    @classmethod
    def of(cls, schema: Schema, name: str) -> Spread:
        """Of a feature.  A schema that knows nothing of it (written by hand, or older) gives the defaults."""
        mean, std = schema.numbers.get(name, (0.0, 1.0))
        quantiles = tuple(schema.quantiles.get(name, ())) or (0.0, 1.0)
        transform = next((f.transform for f in schema.features if f.name == name), "none")
        return cls(name, mean, std, quantiles, schema.whole.get(name, True), transform)

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(abs(self.quantiles[0]), abs(self.quantiles[-1]))


class NumberEncoder(Protocol):
    """Config of a member: ``build`` gives a module ((B, 2), (B, 1)) -> (B, w) with an attribute ``width``: w."""

    def build(self, spread: Spread, width: int, std: float) -> nn.Module:
        """For a number with this spread; ``width``: the view's; ``std``: of the first weights of tables."""


@dataclass(frozen=True)
class Standardise:
    """The standardised value and whether it is missing: two inputs without parameters."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["standardise"] = field(default="standardise", kw_only=True)

    def build(self, spread: Spread, width: int, std: float) -> StandardisedNumber:
        """The module; it needs none of the arguments."""
        return StandardisedNumber()


class StandardisedNumber(nn.Module):
    """Gives what it gets."""

    width = 2

    def forward(self, number: Tensor, value: Tensor) -> Tensor:
        """(B, 2)."""
        return number


class Rank(nn.Module):
    """A value's rank in training, in [0, 1]: linear between the quantiles, the upper end of ties.

    What is less than the least of training reads as the least, what is more than the greatest as the greatest.

    The quantiles are saved with the model, so that a warm start keeps the ranks that its tables were trained on.
    """

    quantiles: Tensor

    def __init__(self, spread: Spread) -> None:
        super().__init__()
        self.register_buffer("quantiles", torch.tensor(spread.quantiles, dtype=torch.float64))

    def forward(self, value: Tensor) -> Tensor:
        """(B, 1) float64 becomes (B,) float64."""
        known = self.quantiles
        x = value[:, 0].double().clamp(known[0], known[-1])
        last = len(known) - 1
        above = count_below(known, x)  # known[above - 1] <= x < known[above]
        low, high = known[(above - 1).clamp(0, last)], known[above.clamp(0, last)]
        between = (x - low) / torch.where(high > low, high - low, 1.0)
        rank = (above - 1 + between) / max(last, 1)
        return torch.where(above > last, 1.0, rank)

    def bucket(self, value: Tensor, count: int) -> Tensor:
        """(B,) int64 in [0, count): buckets of equal shares of the training rows, up to ties."""
        return (self(value) * count).floor().long().clamp(max=count - 1)


def count_below(known: Tensor, x: Tensor) -> Tensor:
    """(B,) how many of the ascending ``known`` (K,) are not above each of x (B,)."""
    if torch.compiler.is_exporting():  # graphs have no binary search
        return (known <= x.unsqueeze(1)).sum(1)
    return torch.searchsorted(known, x, right=True)


def table(rows: int, width: int, std: float) -> nn.Parameter:
    """(rows, width) drawn as every embedding table is."""
    return nn.Parameter(torch.empty(rows, width).normal_(0.0, std))


def require_features(features: Sequence[Feature], kind: str, named: Collection[str], where: str) -> None:
    """Raise ValueError if ``named`` holds what is not a feature of that kind."""
    known = [f.name for f in features if f.kind == kind]
    wrong = sorted(set(named) - set(known))
    if wrong:
        raise ValueError(f"`{where}` should name features of kind `{kind}`, among {known}. Found {wrong}.")
