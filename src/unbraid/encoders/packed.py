"""Softmax over the packed values of each row, without padding.

``torch.segment_reduce`` gives the segments' maxima and sums; the backward pass is written out, since the chain of
autograd steps costs several times more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unbraid.types import Ragged


class _SegmentSoftmax(torch.autograd.Function):
    """w = exp(s - max) / sum, and ds = w * (g - sum(w * g)) within each segment."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
        top = torch.segment_reduce(scores, "max", offsets=offsets, initial=-torch.inf)
        raised = (scores - top.index_select(0, rows)).exp()
        total = torch.segment_reduce(raised, "sum", offsets=offsets, initial=0)
        weights = raised / total.index_select(0, rows)
        ctx.save_for_backward(weights, offsets, rows)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weights, offsets, rows = ctx.saved_tensors
        flow = grads[0] * weights
        return (
            flow - weights * torch.segment_reduce(flow, "sum", offsets=offsets, initial=0).index_select(0, rows),
            None,
            None,
        )


def segment_softmax(scores: Tensor, lists: Ragged) -> Tensor:
    """(N,) softmax of (N,) scores within each row's values; rows without values contribute nothing."""
    if not len(scores):
        return scores
    return _SegmentSoftmax.apply(scores, lists.offsets, lists.rows)
