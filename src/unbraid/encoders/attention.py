"""Plain target attention over a history: a scaled product and a softmax.

For each event, score = <k(event), q(row)> / sqrt(D), where q and k are the vectors of the event fields that the row itself
has (the target item, its author); weights are the softmax over the row's events; the output is the weighted mean of every
event field, the same weights for all.  Shared tables, no projections: the plainest form of what long-history models refine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from unbraid.encoders.packed import dots, pool, segment_softmax
from unbraid.types import FORBID, Ragged, Rows


@dataclass(frozen=True)
class TargetAttention:
    """Softmax of scaled products between the row's item and each event."""

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["target_attention"] = field(default="target_attention", kw_only=True)

    needs_target: ClassVar[bool] = True  # of at least one history, or it is a mean by a longer way

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int]) -> TargetAttentionHistory:
        """widths: event field -> D; targets: the event fields that the row has, too.

        A history without such a field has nothing to compare: all its scores are 0, its weights equal, its output the mean.
        """
        return TargetAttentionHistory(widths, targets)


class TargetAttentionHistory(nn.Module):
    """See the module's docstring."""

    def __init__(self, widths: Mapping[str, int], targets: Mapping[str, int]) -> None:
        super().__init__()
        self.widths, self.targets = dict(widths), tuple(targets)
        self.scale = 1.0 / math.sqrt(max(1, sum(targets.values())))

    def forward(
        self, events: Mapping[str, Mapping[str, Rows]], history: Ragged, target: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """As `unbraid.encoders.pooling.MeanHistory.forward`."""
        values = events["value"]
        first = next(iter(values.values()))
        scores = first.vectors.new_zeros(first.index.shape[0])
        for name in self.targets:
            scores = scores + dots(values[name], target["value"][name] * self.scale, history)
        weights = segment_softmax(scores, history)
        return {name: pool(values[name], weights, history) for name in self.widths}
