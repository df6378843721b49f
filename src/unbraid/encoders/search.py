"""Search: the K events of each row's history that score highest, exact, over its whole length.

The score of an event is a sum over its fields of ``scale <vector of the event's value, query of the row>``.  Training and
serving call the same `search`.  Nothing is padded and no vector is copied per event; besides the tables there is one number
per event of a piece, so that memory is linear in the number of events, whatever their longest history.

A field's products are found in one of two ways, whichever the sizes say is cheaper:

- ``pairs``: one product per event, from the vectors where they lie (`unbraid.encoders.packed.products`).  Costs width times
  events.  On a device that has no sampled product the vectors are gathered in chunks.
- ``product``: all U vectors times the queries of a few rows, then one number per event is picked.  Costs width times U
  times rows, and far less per event: better when histories are long beside the vocabulary.
- ``screen``: as ``product``, of 8-bit integers (`unbraid.encoders.screen`), on processors that are much faster with them.
  Events that by the bound on the rounding may be among the K highest, some tens per row, are scored again exactly.

The K highest of a row are found among the members of its K highest groups (of some tens of events each): an event that is
among the K highest lies in a group whose largest is.  Ties at the K-th place go to the newest events.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unbraid.encoders.packed import Listed, dots, pieces
from unbraid.encoders.scratch import scratch
from unbraid.encoders.screen import Screen, has_integers
from unbraid.types import Ragged, Rows

Way = Literal["pairs", "product", "screen"]
Precision = Literal["exact", "bfloat16"]
PIECE_EVENTS = 2**22  # events that are scored before their K best are taken
PRODUCT_ROWS = 64  # rows of one product; its result stays below BUFFER numbers
BUFFER = 2**24
PAD = 2**21  # numbers of one padded matrix
SHARED = 2**23  # scores of events that all rows share, which are there at a time
GROUP = 32  # of those, events per group: PyTorch's maxima need so many
FEW = 2**18  # of those, for which groups do not pay


class Part(NamedTuple):
    """One field's share of a score.

    Args:
        read: the events' vectors; query: (B, D) of the rows, or (D,) the same for all; scale: a factor.
    """

    read: Rows
    query: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Kept:
    """The events that a search kept.

    Args:
        index: (M,) int64 places among the N events, in order; lists: which row owns which of the M.
        everything: are they all N events?
    """

    index: Tensor
    lists: Ragged
    everything: bool = False

    @classmethod
    def marked(cls, marked: Tensor, lists: Ragged) -> Kept:
        """The marked ((N,) bool) events.  In a graph all N stay, and the others belong to no row."""
        if isinstance(lists, Listed):
            return cls(torch.arange(marked.shape[0], device=marked.device), lists.keep(marked), everything=True)
        index = marked.nonzero().squeeze(1)
        return cls(index, Ragged({}, torch.searchsorted(index, lists.offsets)), everything=len(index) == len(marked))

    def of(self, read: Rows) -> Rows:
        """The kept events' reads."""
        return read if self.everything else read.select(self.index)

    def pick(self, values: Tensor) -> Tensor:
        """(M, ...) the kept events' values of (N, ...)."""
        return values if self.everything else values.index_select(0, self.index)

    def parts(self, parts: Sequence[Part]) -> list[Part]:
        """The kept events' parts of a score."""
        return [part._replace(read=self.of(part.read)) for part in parts]


def event_scores(parts: Sequence[Part], lists: Ragged) -> Tensor:
    """(N,) scores of all events, with gradients to vectors and queries; ``parts`` should not be empty."""
    total = None
    for part in parts:
        score = dots(part.read, part.query * part.scale, lists)
        total = score if total is None else total + score
    assert total is not None
    return total


# ---------------------------------------------------------------------------------------------------------- the K highest
def top_k(scores: Tensor, lists: Ragged, k: int) -> Kept:
    """The k highest of each row's scores (N,); all events of a row that has fewer.  Ties go to the newest."""
    if isinstance(lists, Listed):
        return Kept.marked(_listed_ranks(scores, lists) < k, lists)
    if not len(scores) or int(lists.lengths.max()) <= k:
        return Kept(torch.arange(len(scores), device=scores.device), lists, everything=True)
    size = _group_size(int(lists.lengths.max()), k)
    return _padded_top_k(scores, lists, k) if size == 1 else _grouped_top_k(scores, lists, k, size)


def _listed_ranks(scores: Tensor, lists: Listed) -> Tensor:
    """(N,) how many of its row's scores are higher than a score, or as high and newer."""
    order = scores.shape[0] - 1 - scores.flip(0).sort(stable=True, descending=True)[1]
    order = order.index_select(0, lists.rows.index_select(0, order).sort(stable=True)[1])  # by row, the highest first
    rank = torch.arange(order.shape[0], device=order.device)
    rank = rank - lists.offsets.index_select(0, lists.rows.index_select(0, order))
    return torch.zeros_like(rank).scatter(0, order, rank)


def _grouped_top_k(scores: Tensor, lists: Ragged, k: int, size: int) -> Kept:
    """As `top_k`, among the `_candidates`."""
    some = _candidates(scores, lists, k, size)
    found = _padded_top_k(scores.take(some.index), some.lists, k)
    return Kept(some.index.index_select(0, found.index), found.lists)


def _candidates(scores: Tensor, lists: Ragged, k: int, size: int, slack: Tensor | None = None) -> Kept:
    """Events that may be among the k highest of their row, few more than k.

    Each of a row's k best groups of ``size`` events has an event as high as the lowest of their maxima, so that none below
    that can be among the k highest; these are the members of the k best groups, and the events at the row's ends, that are
    not.  Among tied groups the newest are taken, and there are enough of them to hold the newest of the tied events.

    Groups are cut from all events end to end, since a maximum over equal groups is several times faster than over any; a
    group that holds events of two rows counts for none, and those events are looked at one by one.

    Args:
        slack: (B,) if given, all events that are not lower than that by more than this are taken.
    """
    whole = len(scores) // size
    maxima = scores[: whole * size].view(whole, size).amax(1)
    start, end = lists.offsets[:-1], lists.offsets[1:]
    first, last = (start + size - 1) // size, end // size  # a row's own groups
    count = (last - first).clamp(min=0)
    groups = Ragged({}, _offsets(count))
    own = torch.arange(int(groups.offsets[-1]), device=scores.device) + (first - groups.offsets[:-1])[groups.rows]
    maxima = maxima.index_select(0, own)
    if not maxima.is_floating_point():
        maxima = maxima.float()
    best = top_k(maxima, groups, k)
    highest = maxima.index_select(0, best.index)
    least = torch.segment_reduce(highest, "min", offsets=best.lists.offsets, initial=torch.inf)
    least.masked_fill_(best.lists.lengths < k, -torch.inf)
    if slack is not None:
        least -= slack
        index = (maxima >= least.index_select(0, groups.rows)).nonzero().squeeze(1)
        best = Kept(index, Ragged({}, torch.searchsorted(index, groups.offsets)))
    chosen = own.index_select(0, best.index)
    # a row without a group of its own is all ends, together shorter than two groups
    left = torch.where(count == 0, torch.minimum(start + size, end), first * size)
    right = torch.where(count == 0, left, last * size)
    segments = Ragged({}, _offsets(best.lists.lengths + 2))  # in order of time: left end, best groups, right end
    is_end = torch.zeros(int(segments.offsets[-1]), dtype=torch.bool, device=scores.device)
    is_end[segments.offsets[:-1]] = is_end[segments.offsets[1:] - 1] = True
    begin = torch.empty_like(segments.rows)
    begin[~is_end], begin[is_end] = chosen * size, torch.stack([start, right], 1).view(-1)
    begin.clamp_(max=len(scores) - size)  # an end may begin late enough to reach beyond the scores: it is cut below
    values = scores.unfold(0, size, 1).index_select(0, begin)
    if not values.is_floating_point():  # integers are compared much faster with their like
        least = least.ceil_().clamp_(min=torch.iinfo(values.dtype).min).to(values.dtype)
    open_ = (values < least[segments.rows].unsqueeze(1)).logical_not_()
    at = begin[is_end].unsqueeze(1) + torch.arange(size, device=scores.device)
    since, until = torch.stack([start, right], 1).view(-1, 1), torch.stack([left, end], 1).view(-1, 1)
    open_[is_end] &= (at >= since) & (at < until)
    flat = open_.view(-1).nonzero().squeeze(1)
    offsets = torch.searchsorted(flat, segments.offsets * size)
    return Kept(begin.index_select(0, flat // size) + flat % size, Ragged({}, offsets))


def _group_size(longest: int, k: int) -> int:
    """Events per group, about as many as there are groups per kept one; 1: not worth it.  PyTorch's maxima need 32."""
    size = max(32, 2 ** round(math.log2(max(1.0, longest / k)) / 2))
    return size if longest >= 4 * k * size else 1


def _offsets(lengths: Tensor) -> Tensor:
    """(B + 1,) where lists of these lengths begin and end."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _padded_top_k(scores: Tensor, lists: Ragged, k: int) -> Kept:
    """As `top_k`, over rows padded to the longest of their like."""
    lengths = lists.lengths
    kept = lengths.clamp(max=k)
    offsets = _offsets(kept)
    longest = int(lengths.max())
    if k < longest and longest * len(lengths) == len(scores) <= PAD:  # all rows alike
        columns = _highest_columns(scores.view(-1, longest), k)
        return Kept((columns + lists.offsets[:-1].unsqueeze(1)).view(-1), Ragged({}, offsets))
    index = torch.empty(int(offsets[-1]), dtype=torch.int64, device=scores.device)
    lowest = torch.finfo(scores.dtype).min
    order, at = lengths.argsort(stable=True), 0
    while at < len(order):  # rows of like length together: the next at most twice as long as the first
        least = int(lengths[order[at]])
        end = at + int(torch.searchsorted(lengths[order[at:]], max(2 * least, k), right=True))
        longest = int(lengths[order[end - 1]])
        rows = order[at : min(end, at + max(1, PAD // max(1, longest)))]
        at += len(rows)
        place = torch.arange(longest, device=scores.device)
        real = place < lengths[rows].unsqueeze(1)
        places = lists.offsets[rows].unsqueeze(1) + place
        if longest > k:
            values = scores.take(places.clamp_(max=len(scores) - 1)).clamp_(min=lowest).masked_fill_(~real, -torch.inf)
            chosen = _highest_columns(values, k)
            places, real = places.gather(1, chosen), real.gather(1, chosen)
        index[(offsets[rows].unsqueeze(1) + place[: places.shape[1]])[real]] = places[real]
    return Kept(index, Ragged({}, offsets))


def _highest_columns(values: Tensor, k: int) -> Tensor:
    """(b, k) ascending columns of each row's k highest; of those tied at the k-th place the last ones."""
    top = values.topk(min(k + 1, values.shape[1]), dim=1, sorted=True)
    columns, least = top.indices[:, :k].sort(1).values, top.values[:, k - 1 : k]
    tied = (top.values[:, k:] == least).any(1).nonzero().squeeze(1)
    if len(tied):
        above, equal = values[tied] > least[tied], values[tied] == least[tied]
        need = k - above.sum(1, keepdim=True)
        from_end = equal.flip(1).cumsum(1).flip(1)
        columns[tied] = (above | (equal & (from_end <= need))).nonzero()[:, 1].view(-1, k)
    return columns


@torch.no_grad()
def highest_shared(query: Tensor, keys: Tensor, own: Tensor | None, k: int) -> Tensor:
    """(B, k) ascending places of the k events that score highest for each row, where all rows have the same n > k events.

    The scores ``query @ keys' + own`` are one product, of as many rows at a time as fit the buffer.  The k-th highest of the
    maxima over any groups of a row's events is a bound that its k highest do not fall below, and few others reach it.

    Args:
        query: (B, D); keys: (n, D); own: (n,) what every row adds, or None.
    """
    count = len(keys)
    wide = -(-count // GROUP) * GROUP  # a product of a width that is no multiple of 16 takes several times as long
    if own is not None or wide > count:  # a further entry of the vectors adds what is the same for all rows
        alike = keys.new_full((wide, 1), -torch.inf)
        alike[:count, 0] = 0 if own is None else own
        keys = torch.cat([torch.cat([keys, keys.new_zeros(wide - count, keys.shape[1])]), alike], 1)
        query = torch.cat([query, query.new_ones(len(query), 1)], 1)
    size = max(1, min(len(query), SHARED // wide))
    buffer = scratch("product", (size, wide), query.dtype, query.device)
    found = torch.empty(len(query), k, dtype=torch.int64, device=query.device)
    for at in range(0, len(query), size):
        some = query[at : at + size]
        scores = torch.mm(some, keys.T, out=buffer[: len(some)])
        few = scores.numel() < FEW or 2 * wide < 3 * k * GROUP
        found[at : at + size] = _highest_columns(scores, k) if few else _grouped_columns(scores, k)
    return found.clamp_(max=count - 1)  # where scores are NaN, so is what makes the width even


def _grouped_columns(scores: Tensor, k: int) -> Tensor:
    """As `_highest_columns`, of contiguous scores (b, W), W a multiple of `GROUP`."""
    rows, groups = len(scores), scores.shape[1] // GROUP
    blocks = scores.view(-1, GROUP)
    maxima = blocks.amax(1).view(rows, groups)
    fold = groups // (4 * k)  # the highest of so few are found several times faster, and bound nearly as well
    coarse = maxima if fold < 2 else maxima[:, : groups // fold * fold].unflatten(1, (fold, groups // fold)).amax(1)
    least = coarse.topk(k, dim=1, sorted=False).values.amin(1)
    if bool(least.isnan().any()):  # NaN is not above a bound
        return _highest_columns(scores, k)
    chosen = (maxima >= least.unsqueeze(1)).view(-1).nonzero().squeeze(1)
    members = blocks.index_select(0, chosen)
    open_ = (members >= least.index_select(0, chosen // groups).unsqueeze(1)).view(-1).nonzero().squeeze(1)
    place = chosen.index_select(0, open_ // GROUP) * GROUP + open_ % GROUP
    starts = torch.arange(rows + 1, device=scores.device) * scores.shape[1]
    lists = Ragged({}, torch.searchsorted(place, starts))
    kept = _padded_top_k(members.view(-1).index_select(0, open_), lists, k)
    return place.index_select(0, kept.index).view(rows, k) - starts[:-1].unsqueeze(1)


# --------------------------------------------------------------------------------------------------------------- the search
def way_of(rows: int, events: int, vectors: int, width: int, *, integers: bool = False) -> Way:
    """The cheapest way for one field: ``events`` events of ``rows`` rows, ``vectors`` vectors of ``width``.

    The constants are nanoseconds per operation on one core of a server's CPU (`benchmarks/long_history.py`); what matters
    is where the costs cross.

    Args:
        integers: may ``screen`` be used?
    """
    size = 4 * vectors * width  # bytes: does the table stay in the cache?
    line = 2.8 if size < 2**25 else 9.0
    pick = events * (3.3 if vectors < 2**19 else 6.0)
    cost: dict[Way, float] = {
        "pairs": events * (2.5 + line * width / 16),
        "product": rows * vectors * (0.05 + 0.0153 * width) + pick,
    }
    if integers:
        cost["screen"] = rows * vectors * (0.18 + 0.0023 * width) + 0.8 * vectors * width + pick + 1.5 * events
    return min(cost, key=cost.__getitem__)


def search(
    parts: Sequence[Part], lists: Ragged, k: int, *, precision: Precision = "exact", way: Way | None = None
) -> Kept:  # fmt: skip
    """The k events of each row that score highest.  No gradients: score what is kept again where they are needed.

    Args:
        parts: of the score, at least one; lists: which events are whose.
        k: how many; a row with fewer keeps all, an empty one none.
        precision: ``bfloat16`` rounds vectors and queries to 8 bits of significand, and multiplies them as they were stored: it
            finds what a device that multiplies such numbers would, a few wrong events included (`recall` says how many), and
            saves nothing.  On a CPU the rounding costs time.
        way: of all parts, instead of the cheapest one.
    """
    if k < 1:
        raise ValueError(f"Parameter `k` should be positive. Found {k}.")
    with torch.no_grad():
        if isinstance(lists, Listed):
            some = [_rounded(part) for part in parts] if precision == "bfloat16" else parts
            return top_k(event_scores(some, lists), lists, k)
        if not len(lists) or int(lists.lengths.max()) <= k:
            return top_k(lists.offsets.new_zeros(int(lists.offsets[-1])), lists, k)
        if precision == "bfloat16":
            parts = [_rounded(part) for part in parts]
        found: list[Kept] = []
        means = [_Means.of(part, lists, k, way, number) for number, part in enumerate(parts)]
        for at, rows, own in pieces(lists, PIECE_EVENTS):
            some = [_piece(part, at, rows) for part in parts]
            kept = _best(some, [each.rows(rows) for each in means], own, k)
            found.append(Kept(kept.index + at.start, kept.lists))
        sizes = torch.cat([kept.lists.lengths for kept in found])
        return Kept(torch.cat([kept.index for kept in found]), Ragged({}, _offsets(sizes)))


def recall(parts: Sequence[Part], lists: Ragged, k: int, precision: Precision = "bfloat16") -> float:
    """Share of the events that an exact search keeps that a search in ``precision`` keeps, too."""
    exact, other = search(parts, lists, k).index, search(parts, lists, k, precision=precision).index
    return torch.isin(exact, other).double().mean().item() if len(exact) else 1.0


def _rounded(part: Part) -> Part:
    # To save memory traffic on CUDA, keep the vectors in bfloat16 instead of widening them again here, multiply them by
    # ``torch.mm(..., out_dtype=torch.float32)`` and widen what `packed.products` gathers, piece by piece.
    vectors = part.read.vectors.bfloat16().to(part.read.vectors.dtype)
    return part._replace(read=Rows(vectors, part.read.index), query=part.query.bfloat16().to(part.query.dtype))


def _piece(part: Part, at: slice, rows: slice) -> Part:
    """Some rows' share of a part, with its scale in the query."""
    query = part.query if part.query.dim() == 1 else part.query[rows]
    return Part(Rows(part.read.vectors, part.read.index[at]), query * part.scale)


class _Means(NamedTuple):
    """What a part is scored with.

    Args:
        buffer: (rows of one product, U); None for ``pairs``.
        screen: integers instead of vectors and queries, for ``screen``.
    """

    buffer: Tensor | None = None
    screen: Screen | None = None

    @classmethod
    def of(cls, part: Part, lists: Ragged, k: int, way: Way | None, number: int) -> _Means:
        """Those of the cheapest way, or of the one that is asked for, for the part of some number."""
        vectors, query = part.read.vectors, part.query
        if query.dim() == 1:
            return cls()
        plain = vectors.device.type == "cpu" and vectors.dtype == torch.float32
        long = _group_size(int(lists.lengths.max()), k) > 1
        integers = plain and long and has_integers()
        way = way or way_of(len(lists), len(part.read.index), *vectors.shape, integers=integers)
        if way == "pairs":
            return cls()
        screen = Screen.of(vectors, query * part.scale, number) if way == "screen" and plain and long else None
        rows = max(1, min(len(lists), PRODUCT_ROWS, BUFFER // len(vectors)))
        dtype = torch.int32 if screen else vectors.dtype
        return cls(scratch("product", (rows, len(vectors)), dtype, vectors.device), screen)

    def rows(self, rows: slice) -> _Means:
        """Of some rows."""
        return self._replace(screen=self.screen.rows(rows)) if self.screen else self


def _best(parts: Sequence[Part], means: Sequence[_Means], lists: Ragged, k: int) -> Kept:
    """The k best events of one piece."""
    screens = [each.screen for each in means if each.screen]
    size = _group_size(int(lists.lengths.max()), k)
    if screens and size == 1:  # short rows among long ones
        return top_k(event_scores(parts, lists), lists, k)
    total: Tensor | None = None
    for part, each in zip(parts, means, strict=True):
        score = dots(*part[:2], lists) if each.buffer is None else _by_product(part, each, lists)
        if len(parts) > 1:
            score = score * each.screen.step.index_select(0, lists.rows) if each.screen else score.clone()
        total = score if total is None else total.add_(score)
    assert total is not None
    if not screens:
        return top_k(total, lists, k)
    slack = 2 * torch.stack([screen.bound for screen in screens]).sum(0)
    some = _candidates(total, lists, k, size, slack if len(parts) > 1 else slack / screens[0].step)
    kept = top_k(event_scores(some.parts(parts), some.lists), some.lists, k)
    return Kept(some.index.index_select(0, kept.index), kept.lists)


def _by_product(part: Part, means: _Means, lists: Ragged) -> Tensor:
    """(n,) as `unbraid.encoders.packed.products`: all vectors times some queries, then one number per event.

    With a screen int32 products of the integers.  The result is scratch, valid until the next part is scored.
    """
    (vectors, index), query, buffer = (part.read.vectors, part.read.index), part.query, means.buffer
    assert buffer is not None
    bounds = lists.offsets.tolist()
    scores = scratch("scores", (len(index),), buffer.dtype, buffer.device)
    for first in range(0, len(query), len(buffer)):
        last = min(first + len(buffer), len(query))
        some, table = slice(first, last), buffer[: last - first]
        if means.screen:
            means.screen.products(some, table)
        else:
            torch.mm(query[some], vectors.T, out=table)
        if index.device.type == "cpu":  # a row's products stay in the cache while its events are picked
            for row, (a, b) in enumerate(zip(bounds[first:last], bounds[first + 1 : last + 1], strict=True)):
                torch.index_select(table[row], 0, index[a:b], out=scores[a:b])
        else:
            a, b = bounds[first], bounds[last]
            scores[a:b] = table.view(-1)[(lists.rows[a:b] - first) * len(vectors) + index[a:b]]
    return scores
