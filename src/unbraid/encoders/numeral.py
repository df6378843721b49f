"""Multiple numeral systems: a number as its digits in several bases, every digit at every place with a vector of its own.

Paper: Pan, Xue, Wang, Yu, Liu, Quan, Qiu, Liu, Xiao, Jiang: "Ads Recommendation in a Collapsed and Entangled World", KDD 2024,
https://arxiv.org/abs/2403.00793.  A number becomes a whole number v >= 0; in base b it has the digits d_0, d_1, ...
from the least significant one on, always K_b of them, the smallest K with b^K above the greatest v of training::

    f(v) = sum over bases b, sum over places k < K_b:  X^b[b k + d_k]          (or the bases' sums side by side)

Neighbours share most digits in some base where another carries, numbers far apart share few: order is kept without a scale.

How this differs.  The formula and the place of every digit are as described by readers of the paper; its body was not read, no
code is public, and all that follows is our design.  ``scale`` says how a number becomes whole: itself (``integer``), its bucket
by rank (``quantile``) or by logarithm (``log``).  A negative number adds one row for its sign to those of its absolute value;
more than the greatest training value reads as that; a missing number is one row and has no digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unbraid.encoders.numbers import Rank, Spread, table
from unbraid.types import FORBID

BIBTEX = """
@inproceedings{pan2024ads,
  title     = {Ads Recommendation in a Collapsed and Entangled World},
  author    = {Pan, Junwei and Xue, Wei and Wang, Ximei and Yu, Haibin and Liu, Xun and Quan, Shijie and Qiu, Xueming and
               Liu, Dapeng and Xiao, Lei and Jiang, Jie},
  booktitle = {Proceedings of the 30th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
  year      = {2024},
  eprint    = {2403.00793},
  archiveprefix = {arXiv},
}
"""
EXACT = 2**53  # whole numbers up to here are exact in double precision


def places(base: int, largest: int) -> int:
    """The smallest number of digits, at least one, in which every number up to ``largest`` can be written."""
    count = 1
    while base**count <= largest:
        count += 1
    return count


def require_bases(bases: Sequence[int]) -> None:
    """Raise ValueError unless there are bases, each at least 2 and there once."""
    if not bases or min(bases) < 2 or len(set(bases)) < len(bases):
        raise ValueError(f"Parameter `bases` should hold different bases of at least 2. Found {list(bases)}.")


class Digits(nn.Module):
    """The sum of the rows of given digits of one base.

    Args:
        base: b; places: K; width: D; std: of the first values.
    """

    first: Tensor

    def __init__(self, base: int, places: int, width: int, std: float) -> None:
        super().__init__()
        self.base, self.weight = base, table(base * places, width, std)
        self.register_buffer("first", base * torch.arange(places), persistent=False)

    def rows(self, digits: Tensor) -> Tensor:
        """(B, K) digits become (B, K) rows of the table: ``base * place + digit``."""
        return digits + self.first

    @torch.no_grad()
    def take(self, old: Tensor) -> None:
        """Copy the table (b K', D) of as many places as another model needed: numbers of both keep their vectors."""
        both = min(len(old), len(self.weight))
        self.weight[:both] = old[:both]
        self.weight[both :: self.base] = 0.0  # they have a 0 at every new place ..
        self.weight[: self.base] += old[both :: self.base].sum(0)  # .. and had one at every place that fell away

    def forward(self, digits: Tensor) -> Tensor:
        """(B, K) int64 becomes (B, D)."""
        if torch.compiler.is_exporting():
            return nn.functional.embedding(self.rows(digits), self.weight).sum(1)
        return nn.functional.embedding_bag(self.rows(digits), self.weight, mode="sum")


class Numerals(nn.Module):
    """Whole numbers in several bases.

    Args:
        bases: b of each system; largest: the greatest number that is written; larger ones read as it.
        width: D; std: of the first values.
        combine: add the systems' vectors, or put them side by side.
    """

    def __init__(
        self, bases: Sequence[int], largest: int, width: int, std: float, combine: str = "sum"
    ) -> None:  # fmt: skip
        super().__init__()
        self.largest, self.combine = largest, combine
        self.width = width * len(bases) if combine == "concat" else width
        self.systems = nn.ModuleList(Digits(b, places(b, largest), width, std) for b in bases)
        for base in bases:
            powers = torch.tensor([base**k for k in range(places(base, largest))])
            self.register_buffer(f"powers{base}", powers, persistent=False)

    def digits(self, numbers: Tensor) -> list[Tensor]:
        """(B,) int64, not negative, become (B, K_b) digits per base, the least significant first."""
        bases = [cast(Digits, system).base for system in self.systems]
        return [numbers.unsqueeze(1) // self.get_buffer(f"powers{base}") % base for base in bases]

    def forward(self, numbers: Tensor) -> Tensor:
        """(B,) int64, not negative, becomes (B, width)."""
        digits = self.digits(numbers.clamp(max=self.largest))
        vectors = [system(some) for system, some in zip(self.systems, digits, strict=True)]
        return torch.cat(vectors, 1) if self.combine == "concat" else sum(vectors[1:], vectors[0])


@dataclass(frozen=True)
class Numeral:
    """Digits in several bases.

    Args:
        bases: of the numeral systems.
        scale: how a number becomes whole: as it is, by its rank in training, or by its logarithm.
        levels: number of whole numbers of ``quantile``, and of each sign of ``log``.
        combine: add the systems' vectors, or put them side by side.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["numeral"] = field(default="numeral", kw_only=True)
    bases: tuple[int, ...] = (2, 3)
    scale: Literal["integer", "quantile", "log"] = "quantile"
    levels: int = 1000
    combine: Literal["sum", "concat"] = "sum"

    def __post_init__(self) -> None:
        require_bases(self.bases)
        if self.levels < 2:
            raise ValueError(f"Parameter `levels` should be at least 2. Found {self.levels}.")

    def build(self, spread: Spread, width: int, std: float) -> NumeralNumber:
        """The module of one view and feature.

        Raises ValueError for ``integer`` if training values are not whole, or too large to be exact.
        """
        if self.scale == "integer":
            broken = [f"{x:g}" for x in spread.quantiles if x != int(x) or abs(x) > EXACT]
            if broken or not spread.whole:
                raise ValueError(
                    f'Number encoder `numeral` with scale = "integer" needs whole numbers up to 2^53. Feature `{spread.name}` '
                    f'has {[*broken, "others"][0]}. Use scale = "quantile" or "log"'
                    + (
                        f', or take transform = "{spread.transform}" off the feature, if the column itself holds whole numbers.'
                        if spread.transform != "none"
                        else "."
                    )
                )
        return NumeralNumber(self, spread, width, std)


class NumeralNumber(nn.Module):
    """The numerals of one number, a row for its sign and one for a missing number."""

    span: Tensor

    def __init__(self, config: Numeral, spread: Spread, width: int, std: float) -> None:
        super().__init__()
        self.config = config
        whole = config.scale == "integer"
        self.numerals = Numerals(
            config.bases, int(spread.largest) if whole else config.levels - 1, width, std, config.combine
        )
        self.width = self.numerals.width
        self.sign, self.missing = table(1, self.width, std), table(1, self.width, std)
        if config.scale == "quantile":
            self.rank = Rank(spread)
        if config.scale == "log":
            self.register_buffer("span", torch.tensor(spread.largest or 1.0, dtype=torch.float64))

    def growing(self, old: nn.Module) -> dict[str, Digits]:
        """Key of a weight -> the digits that can `Digits.take` it from ``old``, whose training had another greatest number."""
        if self.config.scale != "integer" or getattr(old, "config", None) != self.config:
            return {}
        systems = cast(Sequence[Digits], self.numerals.systems)
        return {f"numerals.systems.{n}.weight": one for n, one in enumerate(systems)}

    def whole(self, value: Tensor) -> Tensor:
        """(B, 1) becomes (B,) int64: its whole number, negative where it is and not 0."""
        x = value[:, 0].double()
        if self.config.scale == "quantile":
            return self.rank.bucket(value, self.config.levels)
        if self.config.scale == "log":
            x = x.sign() * (x.abs().log1p() / self.span.log1p() * (self.config.levels - 1)).floor()
        return x.clamp(-EXACT, EXACT).long()  # towards 0

    def forward(self, number: Tensor, value: Tensor) -> Tensor:
        """((B, 2), (B, 1)) becomes (B, width)."""
        whole = self.whole(value)
        vectors = self.numerals(whole.abs())
        # a logarithm that is cut to 0 keeps its sign
        negative = value < 0 if self.config.scale == "log" else (whole < 0).unsqueeze(1)
        vectors = torch.where(negative, vectors + self.sign, vectors)
        return torch.where(number[:, 1:] > 0, self.missing, vectors)
