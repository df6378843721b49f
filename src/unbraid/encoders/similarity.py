"""Similarity encoding: two given vectors of one space become the numeral of their cosine.

Paper: Pan, Xue, Wang, Yu, Liu, Quan, Qiu, Liu, Xiao, Jiang: "Ads Recommendation in a Collapsed and Entangled World", KDD 2024,
https://arxiv.org/abs/2403.00793.  Vectors of a language model or a graph live in a space of their own, and a ranking model that
reads them raw has to learn what in that space is near.  The nearness itself is read instead::

    w = <u, v> / (|u| |v|)       bucket = floor((w + 1) / 2 (levels - 1))       e = f(bucket)

with f as in the encoder `numeral`: the sum of the rows of the bucket's digits in several bases.

How this differs.  As described by readers of the paper; its body was not read and no code is public.  The buckets are our design.
A pair in which a vector is zeros (a missing one) has one row of its own.  The vectors get no gradient: they are data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.numbers import table
from unbraid.encoders.numeral import BIBTEX as BIBTEX
from unbraid.encoders.numeral import Numerals, require_bases
from unbraid.types import FORBID


@dataclass(frozen=True)
class Similarity:
    """The cosine of pairs of vectors, in digits.

    Args:
        pairs: vector features whose cosine is read, such as ``(("user_vector", "item_vector"),)``.
        levels: number of buckets of the cosine, -1 the first and 1 alone in the last.
        bases: of the numeral systems; their vectors are added.
        keep: also give the vectors of the pairs as they are.  Vectors in no pair always are.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["similarity"] = field(default="similarity", kw_only=True)
    pairs: tuple[tuple[str, str], ...] = ()
    levels: int = 1000
    bases: tuple[int, ...] = (2, 3)
    keep: bool = False

    def __post_init__(self) -> None:
        require_bases(self.bases)
        if self.levels < 2:
            raise ValueError(f"Parameter `levels` should be at least 2. Found {self.levels}.")
        pairs = [frozenset(pair) for pair in self.pairs]  # the cosine of (a, b) is that of (b, a)
        if wrong := [list(pair) for pair in self.pairs if pair[0] == pair[1] or pairs.count(frozenset(pair)) > 1]:
            raise ValueError(
                f"Parameter `pairs` should hold two different vectors each, and each pair once. Found {wrong}."
            )

    def build(self, widths: Mapping[str, int], width: int, std: float) -> SimilarityVectors:
        """widths: vector feature -> D; width: of the view's tables.

        Raises ValueError if there are no pairs, or one names what is no vector feature or vectors of two lengths.
        """
        if not self.pairs:
            raise ValueError('Vector encoder `similarity` needs `pairs`, such as [["user_vector", "item_vector"]].')
        for pair in self.pairs:
            if not set(pair) <= set(widths) or widths[pair[0]] != widths[pair[1]]:
                raise ValueError(
                    f"Parameter `pairs` should name two vector features of one length. Found {list(pair)} among "
                    f"{dict(widths)}."
                )
        return SimilarityVectors(self, widths, width, std)


class SimilarityVectors(nn.Module):
    """A field ``FIRST.SECOND`` per pair, and the vectors that stay.

    Attributes:
        widths: field -> its width.
    """

    def __init__(self, config: Similarity, widths: Mapping[str, int], width: int, std: float) -> None:
        super().__init__()
        paired = {name for pair in config.pairs for name in pair}
        self.kept = tuple(name for name in widths if config.keep or name not in paired)
        self.pairs = {f"{a}.{b}": (a, b) for a, b in config.pairs}  # no feature's name has a dot
        self.widths = {name: widths[name] for name in self.kept} | dict.fromkeys(self.pairs, width)
        self.encoders = nn.ModuleList(_Cosine(config.levels, config.bases, width, std) for _ in self.pairs)

    def forward(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """feature -> (B, D) becomes field -> (B, w)."""
        fields = {name: vectors[name] for name in self.kept}
        for (name, (a, b)), encoder in zip(self.pairs.items(), self.encoders, strict=True):
            fields[name] = encoder(vectors[a], vectors[b])
        return fields


class _Cosine(nn.Module):
    def __init__(self, levels: int, bases: Sequence[int], width: int, std: float) -> None:
        super().__init__()
        self.levels, self.numerals = levels, Numerals(bases, levels - 1, width, std)
        self.missing = table(1, width, std)

    @torch.no_grad()
    def bucket(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) and (B, D) become (B,) int64 buckets and (B, 1) bool: is there a vector of zeros?"""
        a, b = a.double(), b.double()  # tiny vectors keep their direction, and rounding moves few cosines over an edge
        sizes = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=1)
        empty = (sizes[0] == 0) | (sizes[1] == 0)
        cosine = (a * b).sum(1) / torch.where(empty, 1.0, sizes[0] * sizes[1])
        bucket = ((cosine.clamp(-1, 1) + 1) / 2 * (self.levels - 1)).floor().long()
        return bucket, empty.unsqueeze(1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """(B, width)."""
        bucket, empty = self.bucket(a, b)
        return torch.where(empty, self.missing, self.numerals(bucket))
