"""Histories as the mean of their events, and bags as mean, sum or attention: the plain baselines.

Mean pooling never forms the (N, D) event vectors: one embedding bag per event field.  An empty history gives zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from unbraid.encoders.packed import pool, pool_all, segment_softmax
from unbraid.types import FORBID, Ragged, Rows, Shared


@dataclass(frozen=True)
class Mean:
    """Mean of the events' vectors, one output per event field.

    ``count``: add log(1 + number of events) as a field of its own, which a mean cannot tell.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["mean"] = field(default="mean", kw_only=True)
    count: bool = True

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int]) -> MeanHistory:
        """widths: event field -> D; targets: the event fields that the row itself has, too."""
        return MeanHistory(widths, self.count)


class MeanHistory(nn.Module):
    """Mean of each event field over the history, and its log count."""

    shared = True  # a list that all rows have is pooled once

    def __init__(self, widths: Mapping[str, int], count: bool) -> None:
        super().__init__()
        self.fields, self.count = tuple(widths), count
        self.widths = {**widths, **({"count": 1} if count else {})}

    def forward(
        self, events: Mapping[str, Mapping[str, Rows]], history: Ragged | Shared,
        target: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:  # fmt: skip
        """events: role -> event field -> N reads; target: role -> event field -> (B, D) of the row itself.

        Returns:
            event field -> (B, D), and ``count`` -> (B, 1).
        """
        if isinstance(history, Shared):
            found = self(events, history.one(), target)
            return {name: vector.expand(len(history), -1) for name, vector in found.items()}
        pooled = {name: pool_all(events["value"][name], history) for name in self.fields}
        return {**pooled, "count": history.lengths.float().log1p().unsqueeze(1)} if self.count else pooled


class BagAttention(nn.Module):
    """A bag's members weighted by a softmax of one learned score each: ``softmax(<w, v>) . v``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, members: Rows, bag: Ragged) -> Tensor:
        """(B, D); an empty bag gives 0."""
        scores = nn.functional.embedding(members.index, self.score(members.vectors)).squeeze(1)
        return pool(members, segment_softmax(scores, bag), bag)


def pool_bag(members: Rows, bag: Ragged, pooling: str, attention: BagAttention | None) -> Tensor:
    """(B, D) one vector per bag."""
    if pooling == "attention":
        assert attention is not None
        return attention(members, bag)
    return pool_all(members, bag, pooling)
