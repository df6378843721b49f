"""Work on the packed values of each row, without padding: softmax, products, sums, and any function piece by piece.

A read of N events from U vectors is a sparse (B, U) pattern, and all that attention needs are two products on it: the scores
``<query of the row, vector of the event>`` (`dots`) and the weighted sums ``sum_i w_i v_i`` of each row (`pool`).  Each one's
backward pass is the other and a sum over the events of each vector.  No (N, D) values exist in either direction:
PyTorch's sampled product reads both vectors of a pair where they lie, and an embedding bag does so for sums.

``torch.segment_reduce`` gives the segments' maxima and sums; the backward passes are written out, since the chain of
autograd steps costs several times more.  A segment's values lie side by side, so an embedding bag that reads them in order
sums vectors of segments several times faster than ``segment_reduce`` or ``index_add``.

`in_pieces` is for functions with wide intermediate values, such as a network on every event.  It applies them to some whole
rows at a time and keeps nothing for the backward pass, which computes the piece again.  All values of a piece stay in the
processor's cache; that, not the arithmetic, is what a network on hundreds of thousands of events waits for.

Each function has a second form for `Listed` values: the same numbers by gathers and sums by index alone, without a step that
depends on the values, for the graphs that `unbraid.export` writes.  It has no backward pass of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unbraid.types import Ragged, Rows

PIECE_VALUES = {"cpu": 8192}  # a piece of 64 float32 values per event is then as large as a usual L2 cache
OTHER_PIECE_VALUES = 2**20  # elsewhere launching costs more than memory


class Listed(Ragged):
    """Packed lists as a graph of fixed steps reads them: each value says which row it belongs to, and may belong to none.

    How many of N values a search keeps depends on their numbers, and no shape in a graph does.  So all N stay, and what is not
    kept belongs to row B, which is not there.

    Args:
        values: name -> (N,); rows: (N,) int64 in [0, B].
        lengths: (B,) int64, how many values each row has.
    """

    def __init__(self, values: Mapping[str, Tensor], rows: Tensor, lengths: Tensor) -> None:
        super().__init__(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
        self.rows, self.lengths = rows, lengths

    @classmethod
    def end_to_end(cls, values: Mapping[str, Tensor], lengths: Tensor) -> Listed:
        """All rows' values one after the other, as in any `Ragged`."""
        count = next(iter(values.values())).shape[0]
        # one step up wherever a row ends; beyond the last row there is nothing
        ends = lengths.new_zeros(count + 1).scatter_add(0, lengths.cumsum(0), torch.ones_like(lengths))
        return cls(values, ends.cumsum(0)[:-1], lengths)

    def keep(self, marked: Tensor) -> Listed:
        """Only the marked values ((N,) bool) belong to their rows."""
        rows = torch.where(marked, self.rows, self.lengths.shape[0])
        kept = Listed(self.values, rows, self.lengths)
        return Listed(self.values, rows, kept.sum(torch.ones_like(rows)))

    def spread(self, x: Tensor) -> Tensor:
        """(N, ...) each value's row of (B, ...); zeros for those of none."""
        return torch.cat([x, torch.zeros_like(x[:1])]).index_select(0, self.rows)

    def sum(self, x: Tensor) -> Tensor:
        """(B, ...) of (N, ...).  Not by ``index_add``: ONNX Runtime's threads lose summands of the step that it becomes."""
        rows = self.rows.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
        return x.new_zeros(self.lengths.shape[0] + 1, *x.shape[1:]).scatter_add(0, rows, x)[:-1]

    def softmax(self, scores: Tensor) -> Tensor:
        """(N,) within each row; 0 for values of none."""
        top = scores.new_full((self.lengths.shape[0] + 1,), -torch.inf).scatter_reduce(0, self.rows, scores, "amax")
        raised = (scores - top.index_select(0, self.rows)).exp()
        mine = self.rows < self.lengths.shape[0]
        return torch.where(mine, raised / torch.where(mine, self.spread(self.sum(raised)), 1.0), 0.0)


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
    if isinstance(lists, Listed):
        return lists.softmax(scores)
    if not len(scores):
        return scores
    return _SegmentSoftmax.apply(scores, lists.offsets, lists.rows)


# ------------------------------------------------------------------------------------------------- sums and their adjoints
def _bag(index: Tensor, vectors: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the (weighted) indexed vectors of each segment."""
    return nn.functional.embedding_bag(
        index, vectors, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _in_order(vectors: Tensor) -> Tensor:
    return torch.arange(len(vectors), device=vectors.device)


class _Compare(torch.autograd.Function):
    """[v, q * v', q] of each value v and its row's q, v' the first entries of v; all sums of the backward pass are bags."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, query: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, query, rows, offsets)
        asked = query.index_select(0, rows)
        return torch.cat([vectors, asked * vectors[:, : query.shape[1]], asked], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        vectors, query, rows, offsets = ctx.saved_tensors
        own, common = vectors.shape[1], query.shape[1]
        of_vectors, of_product, of_query = grad.split([own, common, common], 1)
        of_vectors = of_vectors.clone()
        of_vectors[:, :common].addcmul_(of_product, query.index_select(0, rows))
        of_rows = torch.addcmul(of_query, of_product, vectors[:, :common])
        return of_vectors, _bag(_in_order(of_rows), of_rows.contiguous(), offsets), None, None


def compare(vectors: Tensor, query: Tensor, lists: Ragged) -> Tensor:
    """(N, E + 2Q): [v, q * v', q] of each packed v (N, E), q (B, Q) of its row, v' the first Q entries of v."""
    if isinstance(lists, Listed):
        asked = lists.spread(query)
        return torch.cat([vectors, asked * vectors[:, : query.shape[1]], asked], 1)
    return _Compare.apply(vectors, query, lists.rows, lists.offsets)


class _WeightedSum(torch.autograd.Function):
    """sum_i w_i v_i of each row; dw_i = <v_i, g_row>, dv_i = w_i g_row."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, weights: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, weights, rows)
        return _bag(_in_order(vectors), vectors, offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        vectors, weights, rows = ctx.saved_tensors
        flow = grad.index_select(0, rows)
        of_weights = (vectors * flow) @ flow.new_ones(flow.shape[1])  # faster than a sum of so few
        return flow.mul_(weights.unsqueeze(1)), of_weights, None, None


def weighted_sum(vectors: Tensor, weights: Tensor, lists: Ragged) -> Tensor:
    """(B, D): sum of each row's packed vectors (N, D) times their weights (N,); 0 for a row without values."""
    if isinstance(lists, Listed):
        return lists.sum(vectors * weights.unsqueeze(1))
    return _WeightedSum.apply(vectors, weights, lists.rows, lists.offsets)


class _Gather(torch.autograd.Function):
    """vectors[index]; the backward pass sorts the index and sums each distinct row's gradients with one bag."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(vectors)
        return vectors.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        order = torch.sort(index.int(), stable=True)[1]  # a radix sort, twice as fast as that of int64
        counts = torch.bincount(index, minlength=ctx.size)
        return _bag(order, grad.contiguous(), nn.functional.pad(counts.cumsum(0), (1, 0))), None


def gather(rows: Rows) -> Tensor:
    """(N, D) as `Rows.gather`, with a backward pass nearly three times as fast on a CPU where N is much above U."""
    return _Gather.apply(rows.vectors, rows.index) if torch.is_grad_enabled() else rows.gather()


# -------------------------------------------------------------------------------------------- products on a sparse pattern
@cache
def _samples() -> bool:
    """Does this build of PyTorch have the sampled product on the CPU?  (Asking also gets its one warning out of the way.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            one = torch.ones(1, 1)
            pattern = torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
            return bool(torch.sparse.sampled_addmm(pattern, one, one, beta=0).values()[0] == 1)
        except RuntimeError:
            return False


def _is_small(query: Tensor, vectors: Tensor, index: Tensor) -> bool:
    """Is a (B, U) matrix cheap beside N?  So it is for fields of few values, such as ranks.

    The sampled product needs at least as many places as there are values (PyTorch cuts the pattern short otherwise), and a
    vector that many events of a row read is no case for it.
    """
    return len(query) * len(vectors) <= 4 * len(index)


def products(vectors: Tensor, index: Tensor, query: Tensor, lists: Ragged) -> Tensor:
    """(N,) ``<vectors[index_i], query[row of i]>`` without gradients; vectors (U, D), query (B, D)."""
    if not len(index) or not vectors.shape[1]:
        return vectors.new_zeros(len(index))
    if _is_small(query, vectors, index):
        return (query @ vectors.T).view(-1).index_select(0, lists.rows * len(vectors) + index)
    if vectors.device.type == "cpu" and vectors.dtype in (torch.float32, torch.float64) and _samples():
        values = torch.zeros(len(index), dtype=vectors.dtype)  # a NaN in it would stay, whatever beta is
        shape = (len(query), len(vectors))
        pattern = torch.sparse_csr_tensor(lists.offsets, index, values, shape, check_invariants=False)
        # without ``out`` it copies the index
        torch.sparse.sampled_addmm(pattern, query.contiguous(), vectors.T, beta=0, out=pattern)
        return values
    found = []
    for at in torch.arange(len(index), device=index.device).split(OTHER_PIECE_VALUES):
        found.append((vectors.index_select(0, index[at]) * query.index_select(0, lists.rows[at])).sum(1))
    return torch.cat(found)


def _spread(x: Tensor, amounts: Tensor, read: Rows, lists: Ragged) -> Tensor:
    """(U, D): for each vector, ``sum_i amounts_i x[row of i]`` over the events i that read it; x (B, D)."""
    size = len(read.vectors)
    if _is_small(x, read.vectors, amounts):
        flat = amounts.new_zeros(len(x) * size).index_add_(0, lists.rows * size + read.index, amounts)
        return flat.view(len(x), size).T @ x
    order, offsets = read.by_vector
    return _bag(lists.rows.index_select(0, order), x, offsets, amounts.index_select(0, order))


class _Dots(torch.autograd.Function):
    """See `dots`."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, query: Tensor, read: Rows, lists: Ragged) -> Tensor:
        ctx.save_for_backward(vectors, query)
        ctx.read, ctx.lists = read, lists
        return products(vectors, read.index, query, lists)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (vectors, query), read, lists = ctx.saved_tensors, ctx.read, ctx.lists
        of_vectors = _spread(query, grad, read, lists) if ctx.needs_input_grad[0] else None
        of_query = _bag(read.index, vectors, lists.offsets, grad) if ctx.needs_input_grad[1] else None
        return of_vectors, of_query, None, None


def dots(read: Rows, query: Tensor, lists: Ragged) -> Tensor:
    """(N,) the product of each event's vector with its row's query (B, D), or with one (D,) for all rows."""
    if query.dim() == 1:
        return (read.vectors @ query).index_select(0, read.index)
    if isinstance(lists, Listed):
        return (read.gather() * lists.spread(query)).sum(1)
    return _Dots.apply(read.vectors, query, read, lists)


class _Pool(torch.autograd.Function):
    """See `pool`."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, weights: Tensor, read: Rows, lists: Ragged) -> Tensor:
        ctx.save_for_backward(vectors, weights)
        ctx.read, ctx.lists = read, lists
        return _bag(read.index, vectors, lists.offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (vectors, weights), read, lists = ctx.saved_tensors, ctx.read, ctx.lists
        grad = grad.contiguous()
        of_vectors = _spread(grad, weights, read, lists) if ctx.needs_input_grad[0] else None
        of_weights = products(vectors, read.index, grad, lists) if ctx.needs_input_grad[1] else None
        return of_vectors, of_weights, None, None


def pool(read: Rows, weights: Tensor, lists: Ragged) -> Tensor:
    """(B, D) sum of each row's vectors times their weights (N,); 0 for a row without events."""
    if isinstance(lists, Listed):
        return weighted_sum(read.gather(), weights, lists)
    return _Pool.apply(read.vectors, weights, read, lists)


def pool_all(read: Rows, lists: Ragged, mode: str = "mean") -> Tensor:
    """(B, D) mean or sum of each row's vectors; 0 for a row without events."""
    if not isinstance(lists, Listed):
        return read.pool(lists.offsets, mode)
    total = lists.sum(read.gather())
    return total / lists.lengths.clamp(min=1).unsqueeze(1) if mode == "mean" else total


# -------------------------------------------------------------------------------------------------------- piece by piece
Function = Callable[..., Tensor]  # (lists, values (n, E), per_row (b, Q), *shared) -> (any, width)


def pieces(lists: Ragged, size: int) -> Iterator[tuple[slice, slice, Ragged]]:
    """Whole rows with at least ``size`` values together: (their values, the rows, their own lists); the last has fewer.

    No piece is without values unless all are.
    """
    total = int(lists.offsets[-1])
    cuts = torch.searchsorted(lists.offsets, torch.arange(size, max(total, size), size, device=lists.offsets.device))
    ends = [(row, at) for row, at in zip(cuts.tolist(), lists.offsets[cuts].tolist(), strict=True) if at < total]
    row, at = 0, 0
    for last, end in [*dict.fromkeys(ends), (len(lists), total)]:
        yield slice(at, end), slice(row, last), Ragged({}, lists.offsets[row : last + 1] - at)
        row, at = last, end


class _InPieces(torch.autograd.Function):
    """See `in_pieces`."""

    @staticmethod
    def forward(
        ctx: Any, function: Function, lists: Ragged, size: int, values: Tensor, per_row: Tensor, *shared: Tensor
    ) -> Tensor:
        ctx.function, ctx.parts = function, list(pieces(lists, size))
        ctx.save_for_backward(values, per_row, *shared)
        out = [function(own, values[at], per_row[rows], *shared) for at, rows, own in ctx.parts]
        ctx.lengths = [len(part) for part in out]
        return torch.cat(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, per_row, *shared = ctx.saved_tensors
        need = ctx.needs_input_grad[3:]
        leaves = [x.detach().requires_grad_(on) for x, on in zip(shared, need[2:], strict=True)]
        totals = [torch.empty_like(values), torch.empty_like(per_row), *map(torch.zeros_like, shared)]
        for (at, rows, own), flow in zip(ctx.parts, grad.split(ctx.lengths), strict=True):
            inputs = [
                values[at].detach().requires_grad_(need[0]),
                per_row[rows].detach().requires_grad_(need[1]),
                *leaves,
            ]
            with torch.enable_grad():
                out = ctx.function(own, *inputs)
            found = _gradients(out, inputs, flow)
            totals[0][at], totals[1][rows] = found[:2]
            for total, part in zip(totals[2:], found[2:], strict=True):
                total += part
        return None, None, None, *totals  # autograd drops those that nobody needs


def _gradients(out: Tensor, inputs: Sequence[Tensor], flow: Tensor) -> list[Tensor | float]:
    """One per input, 0 for those that need none or that ``out`` does not depend on."""
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, flow, allow_unused=True))
    each = [next(found) if x.requires_grad else None for x in inputs]
    return [0.0 if x is None else x for x in each]


def in_pieces(
    function: Function, lists: Ragged, values: Tensor, per_row: Tensor, shared: Sequence[Tensor], size: int = 0
) -> Tensor:
    """``function(lists, values, per_row, *shared)`` of some rows at a time, its results end to end.

    Args:
        function: (`Ragged` of b rows, (n, E), (b, Q), shared tensors) -> (any, width); it must not be random, since the
            backward pass calls it again.
        values: (N, E) of all rows; per_row: (B, Q); shared: whatever all pieces read.  Gradients reach all of these and
            nothing else that ``function`` reads.
        size: values per piece, at least (a row is never cut); 0 for a size that suits the device.
    """
    if isinstance(lists, Listed):
        return function(lists, values, per_row, *shared)
    size = size or PIECE_VALUES.get(values.device.type, OTHER_PIECE_VALUES)
    return _InPieces.apply(function, lists, size, values, per_row, *shared)
