"""Search: the K events of each row's history that score highest, exact, over its whole length.

The score of an event is a sum over its fields of ``scale <vector of the event's value, query of the row>``.  Training and
serving call the same `search`.  Nothing is padded and no vector is copied per event; besides the tables there is one number
per event of a piece, so that memory is linear in the number of events, whatever their longest history.

A field's products are found in one of two ways, whichever the sizes say is cheaper:

- ``pairs``: one product per event, from the vectors where they lie (`unbraid.encoders.packed.products`).  Costs width times
  events.  On a device that has no sampled product the vectors are gathered in chunks.
- ``product``: all U vectors times the queries of a few rows, then one number per event is picked.  Costs width times U
  times rows, and far less per event: better when histories are long beside the vocabulary.

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

from unbraid.encoders.packed import dots, pieces, products
from unbraid.types import Ragged, Rows

Way = Literal["pairs", "product"]
Precision = Literal["exact", "bfloat16"]
PIECE_EVENTS = 2**22  # events that are scored before their K best are taken
PRODUCT_ROWS = 64  # rows of one product; its result stays below BUFFER numbers
BUFFER = 2**24
PAD = 2**21  # numbers of one padded matrix


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
    if not len(scores) or int(lists.lengths.max()) <= k:
        return Kept(torch.arange(len(scores), device=scores.device), lists, everything=True)
    size = _group_size(int(lists.lengths.max()), k)
    return _padded_top_k(scores, lists, k) if size == 1 else _grouped_top_k(scores, lists, k, size)


def _grouped_top_k(scores: Tensor, lists: Ragged, k: int, size: int) -> Kept:
    """As `top_k`, among the members of each row's k best groups of ``size`` events and the events at its ends.

    Groups are cut from all events end to end, since a maximum over equal groups is several times faster than over any; a
    group that holds events of two rows counts for none, and those events are looked at one by one.  Among tied groups the
    newest are kept, and there are enough of them to hold the newest of the tied events.

    Each of the k best groups has an event as high as the lowest of their maxima, so that none below that can be among the k
    highest.  Few others are left for the second choice.
    """
    whole = len(scores) // size
    maxima = scores[: whole * size].view(whole, size).amax(1)
    start, end = lists.offsets[:-1], lists.offsets[1:]
    first, last = (start + size - 1) // size, end // size  # a row's own groups
    count = (last - first).clamp(min=0)
    groups = Ragged({}, _offsets(count))
    own = torch.arange(int(groups.offsets[-1]), device=scores.device) + (first - groups.offsets[:-1])[groups.rows]
    best = top_k(maxima.index_select(0, own), groups, k)
    chosen = own.index_select(0, best.index)
    least = torch.segment_reduce(maxima.index_select(0, chosen), "min", offsets=best.lists.offsets, initial=torch.inf)
    least.masked_fill_(best.lists.lengths < k, -torch.inf)
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
    open_ = (values < least[segments.rows].unsqueeze(1)).logical_not_()
    at = begin[is_end].unsqueeze(1) + torch.arange(size, device=scores.device)
    since, until = torch.stack([start, right], 1).view(-1, 1), torch.stack([left, end], 1).view(-1, 1)
    open_[is_end] &= (at >= since) & (at < until)
    flat = open_.view(-1).nonzero().squeeze(1)
    found = _padded_top_k(values.take(flat), Ragged({}, torch.searchsorted(flat, segments.offsets * size)), k)
    flat = flat.index_select(0, found.index)
    return Kept(begin.index_select(0, flat // size) + flat % size, found.lists)


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


# --------------------------------------------------------------------------------------------------------------- the search
def way_of(rows: int, events: int, vectors: int, width: int) -> Way:
    """The cheaper way for one field: ``events`` events of ``rows`` rows, ``vectors`` vectors of ``width``.

    The constants are nanoseconds per operation on one core of a server's CPU (`benchmarks/long_history.py`); what matters
    is where the two costs cross.
    """
    size = 4 * vectors * width  # bytes: does the table stay in the cache?
    line = 2.8 if size < 2**25 else 9.0
    pairs = events * (2.5 + line * width / 16)
    product = rows * vectors * (0.05 + 0.0153 * width) + events * (3.3 if vectors < 2**19 else 6.0)
    return "product" if product < pairs else "pairs"


def search(
    parts: Sequence[Part], lists: Ragged, k: int, *, precision: Precision = "exact", way: Way | None = None
) -> Kept:  # fmt: skip
    """The k events of each row that score highest.  No gradients: score what is kept again where they are needed.

    Args:
        parts: of the score, at least one; lists: which events are whose.
        k: how many; a row with fewer keeps all, an empty one none.
        precision: ``bfloat16`` rounds vectors and queries to 8 bits of mantissa before they are multiplied: half the memory
            traffic on devices with such units, a few wrong events (`recall` says how many).
        way: of all parts, instead of the cheaper one.
    """
    if k < 1:
        raise ValueError(f"Parameter `k` should be positive. Found {k}.")
    with torch.no_grad():
        if not len(lists) or int(lists.lengths.max()) <= k:
            return top_k(lists.offsets.new_zeros(int(lists.offsets[-1])), lists, k)
        ways = [way or way_of(len(lists), len(p.read.index), *p.read.vectors.shape) for p in parts]
        if precision == "bfloat16":
            parts = [_rounded(part) for part in parts]
        found: list[Kept] = []
        buffers = [_buffer(part, way, len(lists)) for part, way in zip(parts, ways, strict=True)]
        for at, rows, own in pieces(lists, PIECE_EVENTS):
            scores = _scores(parts, buffers, at, rows, own)
            kept = top_k(scores, own, k)
            found.append(Kept(kept.index + at.start, kept.lists))
        sizes = torch.cat([kept.lists.lengths for kept in found])
        return Kept(torch.cat([kept.index for kept in found]), Ragged({}, _offsets(sizes)))


def recall(parts: Sequence[Part], lists: Ragged, k: int, precision: Precision = "bfloat16") -> float:
    """Share of the events that an exact search keeps that a search in ``precision`` keeps, too."""
    exact, other = search(parts, lists, k).index, search(parts, lists, k, precision=precision).index
    return torch.isin(exact, other).double().mean().item() if len(exact) else 1.0


def _rounded(part: Part) -> Part:
    vectors = part.read.vectors.bfloat16().to(part.read.vectors.dtype)
    return part._replace(read=Rows(vectors, part.read.index), query=part.query.bfloat16().to(part.query.dtype))


def _buffer(part: Part, way: Way, rows: int) -> Tensor | None:
    """(rows of one product, U), or None for a part that is scored by pairs."""
    vectors = part.read.vectors
    return (
        vectors.new_empty(max(1, min(rows, PRODUCT_ROWS, BUFFER // len(vectors))), len(vectors))
        if way == "product"
        else None
    )


def _scores(parts: Sequence[Part], buffers: Sequence[Tensor | None], at: slice, rows: slice, own: Ragged) -> Tensor:
    """(n,) scores of one piece."""
    total: Tensor | None = None
    for part, buffer in zip(parts, buffers, strict=True):
        vectors, index = part.read.vectors, part.read.index[at]
        if part.query.dim() == 1:
            score = (vectors @ (part.query * part.scale)).index_select(0, index)
        elif buffer is None:
            score = products(vectors, index, part.query[rows] * part.scale, own)
        else:
            score = _by_product(vectors, index, part.query[rows] * part.scale, own, buffer)
        total = score if total is None else total.add_(score)
    assert total is not None
    return total


def _by_product(vectors: Tensor, index: Tensor, query: Tensor, lists: Ragged, buffer: Tensor) -> Tensor:
    """(n,) as `unbraid.encoders.packed.products`: all vectors times some queries, then one number per event."""
    scores, bounds = vectors.new_empty(len(index)), lists.offsets.tolist()
    for first in range(0, len(query), len(buffer)):
        some = query[first : first + len(buffer)]
        table = torch.mm(some, vectors.T, out=buffer[: len(some)])
        last = first + len(some)
        if index.device.type == "cpu":  # a row's products stay in the cache while its events are picked
            for row, (a, b) in enumerate(zip(bounds[first:last], bounds[first + 1 : last + 1], strict=True)):
                torch.index_select(table[row], 0, index[a:b], out=scores[a:b])
        else:
            a, b = bounds[first], bounds[last]
            scores[a:b] = table.view(-1)[(lists.rows[a:b] - first) * len(vectors) + index[a:b]]
    return scores
