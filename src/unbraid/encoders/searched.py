"""What long-history encoders share: score every event, keep the K best of each row, attend to those.

The score of event i is a sum over event fields f (vectors k of the events, queries q of the row)::

    s_i = sum_{f the row has, too} <k_f(i), q_f> / sqrt(D of these)  +  sum_{other f} <k_f(i), q_f> / sqrt(D of those)
    S   = the K highest,   w_i = softmax over i in S of s_i,   u_f = sum_{i in S} w_i r_f(i)

with r the events' representation vectors.  A field that the row has not (its rank, what the user did) has a learned query, the
same for all rows.  *Target-aware* outputs are ``u_f * v_f``, v the row's own vectors; of fields that the row has not they
would be a learned factor that the layer above has already, so there are none.

Which tables keys, queries, values and the row's own vectors come from is all that tells the members apart; an encoder says so
by the names of roles (`unbraid.encoders.table.Role`).

Where all rows have one list (`unbraid.types.Shared`: a user's candidates), the scores of B rows and n events are one product
of queries and keys, and what the fields that the row has not add is the same for every row.  The keys, and of the latter all
but ``gap`` and ``position``, may be read again for the next batch of the same list.

The search is not differentiable: its choice carries no gradient, and an event that is not kept gets none.  With second heads
(``auxiliary``) the same scores also weigh *all* events while training, and the second heads read what that gives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.packed import pool, segment_softmax
from unbraid.encoders.search import Kept, Part, Precision, event_scores, highest_shared, search, top_k
from unbraid.layers import require_positive
from unbraid.types import BUILT_IN, Ragged, Rows, Shared

Reads = Mapping[str, Mapping[str, Rows]]  # role -> event field -> reads of the packed events
Targets = Mapping[str, Mapping[str, Tensor]]  # role -> event field -> (B, D) of the row; role "id" -> (B,) ids


def newest(marked: Tensor, lists: Ragged, keep: int, *, fill: bool = False) -> Kept:
    """The newest ``keep`` marked events of each row; with ``fill`` the newest others make up for missing ones.

    Args:
        marked: (N,) bool; lists: which events are whose, the newest of a row last.
    """
    start, end = lists.offsets[:-1], lists.offsets[1:]

    def rank(mask: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) how many of its row's marked events are not before an event, and (B,) how many a row has."""
        before = nn.functional.pad(mask.cumsum(0), (1, 0))
        return before[end].index_select(0, lists.rows) - before[:-1], before[end] - before[start]

    place, count = rank(marked)
    kept = marked & (place <= keep)
    if fill:
        missing = (keep - count).clamp(min=0)
        kept = kept | ~marked & (rank(~marked)[0] <= missing.index_select(0, lists.rows))
    return Kept.marked(kept, lists)


@dataclass(frozen=True)
class Sides:
    """Roles of the tables that events' keys and values and the row's queries and own vectors come from."""

    key: str = "value"
    query: str = "value"
    value: str = "value"
    own: str = "value"


@dataclass(frozen=True)
class Searching:
    """Settings that all searching encoders have.  A base class of their configurations.

    Args:
        keep: K, how many events of a row the search keeps.
        target_aware: give ``u * v`` of the fields that the row has.
        pooled: give ``u``.
        auxiliary: widths of the second heads' hidden layers; empty: no second heads.  They need a loss of kind ``history``.
        scale: ``parts`` divides the product of the fields that the row has by the root of their width, and the other fields'
            by that of theirs; ``whole`` divides all by the root of the width of all.
        precision: of the search alone (`unbraid.encoders.search.search`).
    """

    keep: int = 20
    target_aware: bool = True
    pooled: bool = True
    auxiliary: tuple[int, ...] = ()
    scale: Literal["parts", "whole"] = "parts"
    precision: Precision = "exact"

    def __post_init__(self) -> None:
        require_positive(keep=self.keep, auxiliary=self.auxiliary)
        if not (self.pooled or self.target_aware):
            raise ValueError("One of `pooled` and `target_aware` should be true. Found neither.")
        for name, allowed in (("scale", ("parts", "whole")), ("precision", ("exact", "bfloat16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Parameter `{name}` should be one of {allowed}. Found `{getattr(self, name)}`.")


def exact_only(config: Searching) -> None:
    """Refuse another precision, for members whose search multiplies nothing that could be rounded."""
    if config.precision != "exact":
        raise ValueError(f"Parameter `precision` of `{config.kind}` should be `exact`. Found `{config.precision}`.")  # type: ignore[attr-defined]


def require_category(search: str, category: str) -> None:
    """Raise ValueError unless there is a category exactly where the search is hard."""
    if search == "hard" and not category:
        raise ValueError("Search `hard` needs `category`, an event field.")
    if search != "hard" and category:
        raise ValueError(
            f"Parameter `category` belongs to search `hard`. Found search `{search}`, category `{category}`."
        )


def need_category(kind: str, category: str, widths: Mapping[str, int], targets: Collection[str]) -> None:
    """Raise ValueError unless a hard search's category is a field of the history and of the row."""
    if category not in targets:
        raise ValueError(
            f"Parameter `category` of history encoder `{kind}` should be a field of every history whose vocabulary is also an "
            f"id feature of the row. Found `{category}`; a history with fields {list(widths)} has {list(targets)}."
        )


class SearchedHistory(nn.Module):
    """See the module's docstring.

    Args:
        config: `Searching` settings; sides: which roles.
        widths: event field -> D of its values; targets: the event fields that the row has, too, -> D of its own vectors.
        key_width: D of the keys of every field; None: that of its values.

    Attributes:
        widths: output field -> D; second: what only second heads read -> D.
    """

    def __init__(
        self, config: Searching, widths: Mapping[str, int], targets: Mapping[str, int], sides: Sides,
        key_width: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.sides, self.fields, self.targets = config, sides, dict(widths), tuple(targets)
        both = {**{n: w for n, w in widths.items() if config.pooled},
                **{f"{n}.product": widths[n] for n in targets if config.target_aware}}  # fmt: skip
        self.widths = both or dict(widths)  # without a field to multiply with, there is nothing but u
        self.second = {**self._named("all", self.widths), **self._named("own", {n: widths[n] for n in targets})}
        self.second = self.second if config.auxiliary else {}
        width_of = {name: key_width or width for name, width in widths.items()}
        self.queries = nn.ParameterDict(
            {  # with a slash, since a field may be called as an attribute of the dictionary is, such as `type`
                f"field/{name}": nn.Parameter(torch.empty(width_of[name]).normal_(0.0, 1e-2))
                for name in widths
                if name not in targets
            }
        )
        self.scales = self._scales(width_of)

    @staticmethod
    def _named(what: str, values: Mapping[str, int]) -> dict[str, int]:
        return {f"{what}.{name}": value for name, value in values.items()}

    def _scales(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Event field -> the factor of its products."""
        groups = [set(self.targets), set(widths) - set(self.targets)]
        groups = groups if self.config.scale == "parts" else [set(widths)]
        return {name: 1 / math.sqrt(sum(widths[n] for n in group)) for group in groups for name in group}

    @property
    def shared(self) -> bool:
        """Does it read a list that all rows share as it is?  Not where a member finds or weighs events in its own way."""
        plain = SearchedHistory
        return type(self).find is plain.find and type(self).logits is plain.logits

    # ---------------------------------------------------------------------------------------- what a member may override
    def keys(self, events: Reads) -> Mapping[str, Rows]:
        """Event field -> what scores read of the events."""
        return events[self.sides.key]

    def asked(self, target: Targets) -> Mapping[str, Tensor]:
        """Event field -> (B, D) queries of the fields that the row has."""
        return target[self.sides.query]

    def values(self, events: Reads) -> Mapping[str, Rows]:
        """Event field -> what is summed."""
        return events[self.sides.value]

    def own(self, target: Targets) -> Mapping[str, Tensor]:
        """Event field -> (B, D) of the row, for target-aware outputs."""
        return target[self.sides.own]

    def find(self, parts: Sequence[Part], history: Ragged, target: Targets) -> Kept:
        """The events to attend to."""
        return search(parts, history, self.config.keep, precision=self.config.precision)

    def logits(self, scores: Tensor, kept: Kept) -> Tensor:
        """(M,) what is weighed, of the kept events' scores."""
        return scores

    # ------------------------------------------------------------------------------------------------------------ forward
    def parts(self, events: Reads, target: Targets, fields: Collection[str] | None = None) -> list[Part]:
        """The score's parts, of some event fields or of all."""
        keys, asked = self.keys(events), self.asked(target)
        return [
            Part(keys[name], asked[name] if name in self.targets else self.queries[f"field/{name}"], self.scales[name])
            for name in self.fields
            if fields is None or name in fields
        ]

    def scores(
        self, events: Reads, history: Ragged, target: Targets, fields: Collection[str] | None = None
    ) -> Tensor:  # fmt: skip
        """(N,) scores of all events from some of their fields; 0 without a field."""
        parts = self.parts(events, target, fields)
        return event_scores(parts, history) if parts else history.rows.new_zeros(history.rows.shape[0]).float()

    def forward(self, events: Reads, history: Ragged | Shared, target: Targets) -> dict[str, Tensor]:
        """events: role -> event field -> N reads, or n of a list that all rows share; target: role -> event field -> (B, D) of
        the row itself.

        Returns:
            what ``widths`` and, while training, ``second`` name -> (B, D).  A row without a kept event has zeros.
        """
        if isinstance(history, Shared):
            return self._of_shared(events, history, target)
        parts, values, own = self.parts(events, target), self.values(events), self.own(target)
        whole = event_scores(parts, history) if self.second and self.training else None
        kept = self._kept(parts, history, target, whole)
        scores = event_scores(kept.parts(parts), kept.lists) if whole is None else kept.pick(whole)
        scores = self.logits(scores, kept)
        out = self._attend({name: kept.of(values[name]) for name in self.fields}, scores, kept.lists, own)
        if whole is not None:
            spread = self._attend(values, whole, history, own)
            out |= {f"all.{name}": vector for name, vector in spread.items()}
            out |= {f"own.{name}": own[name] for name in self.targets}
        return out

    def _kept(self, parts: Sequence[Part], history: Ragged, target: Targets, whole: Tensor | None) -> Kept:
        """The kept events; scores that are there already are not computed again by the plain search."""
        plain = type(self).find is SearchedHistory.find and self.config.precision == "exact"
        return (
            top_k(whole.detach(), history, self.config.keep)
            if plain and whole is not None
            else self.find(parts, history, target)
        )

    @torch.no_grad()
    def _of_shared(self, events: Reads, history: Shared, target: Targets) -> dict[str, Tensor]:
        """As `forward`, of one list for all rows."""
        if self.training:
            raise ValueError(
                "A list that all rows share is for serving. Call `eval()` on the model, or give `repeated()` lists."
            )
        keys, alike = self._ready(events, history)
        asked = self.asked(target)
        query = torch.cat([asked[name] * self.scales[name] for name in self.targets], 1) if self.targets else None
        query = keys.new_zeros(len(history), 0) if query is None else query
        kept = self._kept_of_shared(query, keys, alike)
        scores = event_scores([Part(Rows(keys, kept.index), query)], kept.lists)
        scores = scores if alike is None else scores + alike.index_select(0, kept.index)
        values = self.values(events)
        return self._attend({n: kept.of(values[n]) for n in self.fields}, scores, kept.lists, self.own(target))

    def _kept_of_shared(self, query: Tensor, keys: Tensor, alike: Tensor | None) -> Kept:
        """The K best of n events for each row."""
        rows, count, keep = len(query), len(keys), self.config.keep
        if count <= keep:
            every = torch.arange(count, device=keys.device).repeat(rows)
            return Kept(every, Ragged({}, torch.arange(rows + 1, device=keys.device) * count))
        if self.config.precision == "bfloat16":
            query, keys = (x.bfloat16().to(x.dtype) for x in (query, keys))
        best = highest_shared(query, keys, alike, keep)
        return Kept(best.view(-1), Ragged({}, torch.arange(rows + 1, device=keys.device) * keep))

    def _ready(self, events: Reads, history: Shared) -> tuple[Tensor, Tensor | None]:
        """(n, D) keys of the fields that the row has, side by side, and (n,) what the others add for every row, if any."""
        if self not in history.memo:
            names = [name for name in self.fields if name in self.targets or name not in BUILT_IN]
            keys = self._keys_of(events, names)
            vectors = [keys[name].gather() for name in self.targets]
            like = next(iter(events[self.sides.key].values())).vectors
            side = torch.cat(vectors, 1) if vectors else like.new_zeros(history.length, 0)
            history.memo[self] = side, self._alike(keys)
        side, alike = history.memo[self]
        other = self._alike(self._keys_of(events, [name for name in self.fields if name in BUILT_IN]))
        found = [part for part in (alike, other) if part is not None]
        return side, sum(found[1:], found[0]) if found else None

    def _keys_of(self, events: Reads, names: Collection[str]) -> Mapping[str, Rows]:
        return self.keys({self.sides.key: {name: events[self.sides.key][name] for name in names}})

    def _alike(self, keys: Mapping[str, Rows]) -> Tensor | None:
        """(n,) scores of the fields that the row has not; None without any."""
        total: Tensor | None = None
        for name, read in keys.items():
            if name not in self.targets:
                query = self.queries[f"field/{name}"] * self.scales[name]
                many = len(read.vectors) > len(read.index)
                score = read.gather() @ query if many else (read.vectors @ query).index_select(0, read.index)
                total = score if total is None else total + score
        return total

    def _attend(
        self, values: Mapping[str, Rows], scores: Tensor, lists: Ragged, own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Output fields of some events."""
        weights = segment_softmax(scores, lists)
        pooled = {name: pool(values[name], weights, lists) for name in self.fields}
        products = {f"{name}.product": pooled[name] * own[name] for name in self.targets}
        found = {**pooled, **products}
        return {name: found[name] for name in self.widths}
