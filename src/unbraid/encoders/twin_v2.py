"""TWIN-V2: a long history becomes clusters of alike events, and attention over clusters counts each as often as it is large.

Paper: "TWIN V2: Scaling Ultra-Long User Behavior Sequence Modeling for Enhanced CTR Prediction at Kuaishou", Si, Guan, Sun,
Zang, Lu, Hui, Cao, Yang, Zheng, Leng, Zheng, Zhang, Niu, Song, Gai, CIKM 2024, arXiv 2407.16357.  Everything said here about
it is from memory of the paper, not checked against it.

Idea: a life of events is too long to search at each request, but many of them are alike.  They are clustered, each cluster is
read as one virtual event, and as softmax over n equal events gives n times the weight of one, a cluster's logit has ln of its
size added.  With x(i) an event's vectors of the fields that the row has, end to end::

    split(C) = {C}                                       if C has at most ``cap`` events
             = split(C1) + split(C2)                     else, C1 and C2 by 2-means on x
    v(C)     = the member of C nearest to the mean of x over C: the virtual event has its ids
    l(C)     = s_v(C) + ln |C|                           s as in `unbraid.encoders.searched`
    S        = the K clusters with the highest l,  w = softmax over S of l,  u = sum_{C in S} w_C r(v(C))

No gradient passes the clustering or the search.  With ``cap`` = 1 every event is a cluster and this is TWIN on one table.

How this differs:

- The paper clusters offline, a user at a time, with embeddings of a trained model.  Here clusters are made at each read of the
  tables as they are, training and serving alike.  That costs some passes over the history instead of saving one: use this to
  compare methods, not to serve long histories faster.
- Clusters are halved by 2-means; the paper chooses how many centres a level has.
- The paper first groups events by how much of an item was played.  ``group`` names an event field whose values are kept
  apart; empty: one group.
- The paper averages numbers over a cluster.  Event fields are ids here, ``gap`` and ``position`` too: the nearest member's.
- There is one head, and s is that of `unbraid.encoders.searched`, without projections or cross features.
- ``cap`` = 20 and K = 100 are defaults of which we are not sure.  A history (or group) of at most ``cap`` events is one cluster.
- Second heads read every event by itself, without clusters.
- Without a field that the row has there is nothing to tell events apart: clusters are stretches of time.

Nothing is random: 2-means starts from the event farthest from the mean and the one farthest from that.  Ties, within rounding
errors, go to the newest event.  Where one side would be empty (all events equal) the cluster is cut in the middle of the order
of scores or else of time, and so is every cluster after ``FREE_LEVELS`` levels.  So depth is bounded by that and log2(N / cap)
whatever the data.  All clusters of all rows are split together, level by level, and a row's do not depend on other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unbraid.encoders.packed import pool, products
from unbraid.encoders.search import Kept, Part, event_scores, top_k
from unbraid.encoders.searched import SearchedHistory, Searching, Sides, Targets, exact_only
from unbraid.layers import require_positive
from unbraid.types import FORBID, Ragged, Rows

BIBTEX = """
@inproceedings{si2024twinv2,
  title     = {{TWIN} {V2}: Scaling Ultra-Long User Behavior Sequence Modeling for Enhanced {CTR} Prediction at {Kuaishou}},
  author    = {Si, Zihua and Guan, Lin and Sun, ZhongXiang and Zang, Xiaoxue and Lu, Jing and Hui, Yiqun and Cao, Xingchao and
               Yang, Zeyu and Zheng, Yichen and Leng, Dewei and Zheng, Kai and Zhang, Chenbin and Niu, Yanan and Song, Yang and
               Gai, Kun},
  booktitle = {Proceedings of the 33rd {ACM} International Conference on Information and Knowledge Management},
  year      = {2024},
}
"""

ROUNDS = 4  # of 2-means in a split
FREE_LEVELS = 32  # levels of splits of any sizes; splits below are into halves
SLACK = 64  # so many rounding errors apart, distances are tied


@dataclass(frozen=True)
class TWINV2(Searching):
    """Target attention over clusters of a row's events.

    Args:
        keep: K, how many clusters of a row the search keeps.
        target_aware, pooled, auxiliary, scale: see `unbraid.encoders.searched.Searching`.
        precision: ``exact``; the clusters that are searched are few.
        cap: the most events of a cluster.
        group: an event field whose different values are never in one cluster; empty: none.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    keep: int = 100
    kind: Literal["twin_v2"] = field(default="twin_v2", kw_only=True)
    cap: int = 20
    group: str = ""

    needs_target: ClassVar[bool] = True  # of at least one history, or there is nothing to be relevant to

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(cap=self.cap)
        exact_only(self)

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int]) -> TWINV2History:
        """widths: event field -> D; targets: the event fields that the row has, too.

        Raises:
            ValueError: ``group`` is no event field of this history.
        """
        if self.group and self.group not in widths:
            raise ValueError(
                f"Parameter `group` should name an event field of every history. Found `{self.group}`, fields {list(widths)}."
            )
        return TWINV2History(self, widths, targets)


@dataclass(frozen=True)
class Virtual(Kept):
    """Virtual events: ``index`` are the events whose ids they have.

    Args:
        sizes: (M,) how many events each stands for.
    """

    sizes: Tensor = torch.empty(0)


class TWINV2History(SearchedHistory):
    """See the module's docstring."""

    no_graph = "clusters are split until they are small, in as many steps as the events ask for"

    def __init__(self, config: TWINV2, widths: Mapping[str, int], targets: Mapping[str, int]) -> None:
        super().__init__(config, widths, targets, Sides())
        self.cap, self.group = config.cap, config.group

    def find(self, parts: Sequence[Part], history: Ragged, target: Targets) -> Virtual:
        """The K clusters with the highest logits."""
        with torch.no_grad():
            common = [part.read for name, part in zip(self.fields, parts, strict=True) if name in self.targets]
            apart = history.values[self.group] if self.group else None
            found = clusters(common, history, self.cap, apart)
            if not len(history) or int(found.lists.lengths.max()) <= self.config.keep:
                return found
            best = top_k(
                self.logits(event_scores(found.parts(parts), found.lists), found), found.lists, self.config.keep
            )
            return Virtual(found.index[best.index], best.lists, sizes=found.sizes[best.index])

    def logits(self, scores: Tensor, kept: Kept) -> Tensor:
        """Scores and ln of the clusters' sizes."""
        assert isinstance(kept, Virtual)
        return scores + kept.sizes.to(scores.dtype).log()


# ------------------------------------------------------------------------------------------------------------ clustering
class _Points(NamedTuple):
    """n events, those of a segment (a cluster to be) side by side and in order of time.

    Args:
        reads: the fields' vectors; norms: (n,) squared lengths; lists: which events are whose segment's.
    """

    reads: Sequence[Rows]
    norms: Tensor
    lists: Ragged

    def take(self, order: Tensor, lengths: Tensor) -> _Points:
        """Some events in new segments."""
        return _Points([read.select(order) for read in self.reads], self.norms[order], segments(lengths))

    def sums(self, weights: Tensor) -> list[Tensor]:
        """(S, D) per field."""
        return [pool(read, weights, self.lists) for read in self.reads]

    def dot(self, centres: Sequence[Tensor]) -> Tensor:
        """(n,) products with one vector of each segment, given as (S, D) per field."""
        total = torch.zeros_like(self.norms)
        for read, centre in zip(self.reads, centres, strict=True):
            total += products(read.vectors, read.index, centre, self.lists)
        return total

    def squares(self, centres: Sequence[Tensor]) -> Tensor:
        """(S,) squared lengths; of no fields 0."""
        return sum((x.square().sum(1) for x in centres), self.norms.new_zeros(len(self.lists)))

    def distances(self, centres: Sequence[Tensor]) -> Tensor:
        """(n,) squared."""
        return self.norms - 2 * self.dot(centres) + self.squares(centres)[self.lists.rows]

    def at(self, places: Tensor) -> list[Tensor]:
        """(S, D) per field of one event of each segment."""
        return [read.vectors[read.index[places]] for read in self.reads]

    def mean(self) -> list[Tensor]:
        """(S, D) per field."""
        return [x / self.lists.lengths.unsqueeze(1) for x in self.sums(torch.ones_like(self.norms))]

    def lowest(self, values: Tensor) -> Tensor:
        """(S,) places of the lowest value of each segment, the newest of those that rounding may have told apart."""
        least = _reduce(values, self.lists, "min")
        slack = SLACK * torch.finfo(values.dtype).eps * _reduce(self.norms, self.lists, "max")
        tied = values <= (least + slack)[self.lists.rows]
        places = torch.where(tied, torch.arange(len(values), device=values.device), -1)
        return self.lists.offsets.new_zeros(len(self.lists)).scatter_reduce(0, self.lists.rows, places, "amax")


def segments(lengths: Tensor) -> Ragged:
    """Lists of the given lengths."""
    return Ragged({}, nn.functional.pad(lengths.cumsum(0), (1, 0)))


def _reduce(values: Tensor, lists: Ragged, how: str) -> Tensor:
    return torch.segment_reduce(values, how, offsets=lists.offsets)


def clusters(reads: Sequence[Rows], history: Ragged, cap: int, apart: Tensor | None = None) -> Virtual:
    """Each row's clusters of at most ``cap`` events, as the events nearest to their means, in order of time.

    Args:
        reads: of the fields that events are compared by, (N,) each; without any, clusters are stretches of time.
        history: which events are whose; apart: (N,) ids, only equal ones share a cluster.
    """
    order, lengths = _groups(history, apart)
    norms = _norms(reads, history)
    done: list[tuple[Tensor, Tensor]] = []
    level = 0
    while len(lengths):
        small = lengths <= cap
        mine = small.repeat_interleave(lengths)
        done.append((order[mine], lengths[small]))
        order, lengths = order[~mine], lengths[~small]
        if len(lengths):
            points = _Points(reads, norms, history).take(order, lengths)
            key = 2 * points.lists.rows + split(points, halves=level >= FREE_LEVELS)
            order, lengths = order[key.argsort(stable=True)], torch.bincount(key, minlength=2 * len(lengths))
        level += 1
    order, lengths = (torch.cat(x) for x in zip(*done, strict=True)) if done else (order, lengths)
    points = _Points(reads, norms, history).take(order, lengths)
    nearest = order[points.lowest(points.distances(points.mean()))]
    index, place = nearest.sort()
    return Virtual(index, Ragged({}, torch.searchsorted(index, history.offsets)), sizes=lengths[place])


def _groups(history: Ragged, apart: Tensor | None) -> tuple[Tensor, Tensor]:
    """All events so that those that may share a cluster lie side by side, and how many do, empty ones left out."""
    if apart is None:
        return torch.arange(len(history.rows), device=history.offsets.device), history.lengths[history.lengths > 0]
    order = apart.argsort(stable=True)  # within equal ids the rows stay in order
    pairs = torch.stack([history.rows[order], apart[order]], 1)
    return order, torch.unique_consecutive(pairs, dim=0, return_counts=True)[1]


def _norms(reads: Sequence[Rows], history: Ragged) -> Tensor:
    total = torch.zeros(len(history.rows), device=history.offsets.device)
    for read in reads:
        total = total + read.vectors.square().sum(1)[read.index]
    return total


def split(points: _Points, halves: bool) -> Tensor:
    """(n,) bool: the second part of each segment; no part is empty.  ``halves``: and both are of one size."""
    first = points.at(points.lowest(-points.distances(points.mean())))
    second = points.at(points.lowest(-points.distances(first)))
    total, length = points.sums(torch.ones_like(points.norms)), points.lists.lengths
    for _ in range(ROUNDS):
        bound = (points.squares(first) - points.squares(second)) / 2
        score = points.dot([a - b for a, b in zip(first, second, strict=True)]) - bound[points.lists.rows]
        side = score > 0
        count = _reduce(side.double(), points.lists, "sum").long().unsqueeze(1)
        sums = points.sums(side.to(score.dtype))
        first = [x / count.clamp(min=1) for x in sums]
        second = [
            (whole - x) / (length.unsqueeze(1) - count).clamp(min=1) for whole, x in zip(total, sums, strict=True)
        ]
    bad = (count.squeeze(1) == 0) | (count.squeeze(1) == length) | halves
    return torch.where(bad[points.lists.rows], _upper_half(score, points.lists), side) if bool(bad.any()) else side


def _upper_half(score: Tensor, lists: Ragged) -> Tensor:
    """(n,) bool: the higher half of each segment's scores; of equal ones the later are higher."""
    order = score.argsort(stable=True)
    order = order[lists.rows[order].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - lists.offsets[lists.rows]
    return rank >= (lists.lengths // 2)[lists.rows]
