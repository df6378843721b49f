"""SIM: a search finds the events of a long history that concern the predicted item, and target attention reads those alone.

Paper: "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate Prediction", Pi, Zhou,
Zhang, Wang, Ren, Fan, Zhu, Gai, CIKM 2020, arXiv 2006.05639.  All that is said of the paper here is from memory of it, not
checked against it.

Idea: attention over a life-long history costs too much and drowns in what has nothing to do with the item.  A cheap *general
search unit* keeps K events; an *exact search unit*, multi-head target attention, reads those::

    hard    S = the K newest events with the row's category                     no parameters
    soft    r_i = <e_i, e_row>, e of *search* tables;  S = the K highest r
            second heads (while training): [sum_i softmax(r)_i e_i over all events, e_row] -> the tasks' labels
    then    s_h(i) = <W_h k(i), V_h q + b_h> / sqrt(width of a head)            k: all of an event's fields, q: the row's
            head_h = sum_{i in S} softmax over S of s_h(i)  k(i)
    loss    = that of the tasks + weight * that of the second heads             the second is the loss ``history``; none for hard

Search tables learn from the second heads alone and the tables of the attention from the tasks alone: the choice of S carries
no gradient.  Time enters as an event field, ``gap`` or ``position``, which keys and values then have.

How it is computed: ``<W k, V q + b> = <k, W'(V q + b)>``, so that a head has one query of the width of the events per row, and no
event is projected.

How this differs (from the paper as remembered):

- Soft search's relevance is a plain inner product of search vectors, without maps of either side; its second head pools with a
  softmax, where the paper sums r_i e_i, which grows with the length of a history.
- Without second heads (``auxiliary = []``) nothing would train search tables: there are none then, and soft search compares
  the vectors of the attention's own tables.
- Attention's scores are divided by the root of a head's width, and the row's side has a bias.
- Only real events are kept; a row with fewer than K has fewer, and one without any has zeros.  An unknown or missing category
  equals none: two values that training did not see are two values.
- There is no further model of a short history here: declare a short history of its own.
- A history without a field that the row has, too, has nothing to search for: soft search then keeps the newest K, and the
  attention's queries are its biases.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unbraid.encoders.packed import pool, segment_softmax
from unbraid.encoders.search import Kept, Part, Precision, event_scores, search
from unbraid.encoders.searched import Reads, Targets, need_category, newest, require_category
from unbraid.encoders.table import VALUE, Role
from unbraid.layers import require_positive
from unbraid.types import FIRST_VALUE, FORBID, Ragged

BIBTEX = """
@inproceedings{pi2020sim,
  title     = {Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate Prediction},
  author    = {Pi, Qi and Zhou, Guorui and Zhang, Yujing and Wang, Zhe and Ren, Lejian and Fan, Ying and Zhu, Xiaoqiang and
               Gai, Kun},
  booktitle = {Proceedings of the 29th {ACM} International Conference on Information and Knowledge Management},
  year      = {2020},
  eprint    = {2006.05639},
  archivePrefix = {arXiv},
}
"""


@dataclass(frozen=True)
class SIM:
    """Multi-head target attention to the K events that a search kept.

    Args:
        search: ``soft``: the events nearest to the row's item by search vectors; ``hard``: the newest of the row's category.
        category: for ``hard``: the event field that says the category; every history needs it, and the row, too.
        keep: K, how many events of a row the search keeps.
        heads, head_width: of the attention.
        target_aware: also give each head's ``u * v`` of the fields that the row has.
        auxiliary: widths of the second heads' hidden layers, which train the search tables and need a loss of kind
            ``history``; empty: neither (see the module's docstring).  Only for ``soft``.
        search_width: D of the search tables; 0: that of the value tables.
        precision: of the soft search (`unbraid.encoders.search.search`).
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID
    kind: Literal["sim"] = field(default="sim", kw_only=True)
    search: Literal["soft", "hard"] = "soft"
    category: str = ""
    keep: int = 20
    heads: int = 2
    head_width: int = 16
    target_aware: bool = False
    auxiliary: tuple[int, ...] = ()
    search_width: int = 0
    precision: Precision = "exact"

    needs_target: ClassVar[bool] = True  # of at least one history, or there is nothing to search for

    def __post_init__(self) -> None:
        require_positive(keep=self.keep, heads=self.heads, head_width=self.head_width, auxiliary=self.auxiliary)
        for name, allowed in (("search", ("soft", "hard")), ("precision", ("exact", "bfloat16"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Parameter `{name}` should be one of {allowed}. Found `{getattr(self, name)}`.")
        require_category(self.search, self.category)
        if self.search == "hard" and self.auxiliary:
            raise ValueError(
                f"Parameter `auxiliary` should be empty for search `hard`, which has nothing to train. Found {self.auxiliary}."
            )
        if self.search_width < 0 or (self.search_width and not self.auxiliary):
            raise ValueError(
                f"Parameter `search_width` is the width of the tables that `auxiliary` heads train: 0 without them, never "
                f"negative. Found {self.search_width}, `auxiliary` {self.auxiliary}."
            )

    @property
    def roles(self) -> Mapping[str, Role]:
        """The tables that it reads: search tables, one for all views, if there are second heads to train them."""
        return {**VALUE, "search": Role(width=self.search_width, shared=True)} if self.auxiliary else VALUE

    def build(self, widths: Mapping[str, int], targets: Mapping[str, int], roles: Mapping[str, int]) -> SIMHistory:
        """widths: event field -> D; targets: the event fields that the row has, too; roles: role -> D of its tables.

        Raises ValueError for a category that is no field of the history and the row.
        """
        if self.search == "hard":
            need_category(self.kind, self.category, widths, targets)
        return SIMHistory(self, widths, targets, roles.get("search", 0))


class SIMHistory(nn.Module):
    """See the module's docstring.

    Attributes:
        widths: output field -> D, the heads of a field side by side; second: what only second heads read -> D.
        keys, queries: linear maps (heads * head_width, D of the fields side by side) of events and of the row; without targets
            there is no ``queries``; bias: (heads * head_width,) of the row's side.
    """

    def __init__(self, config: SIM, widths: Mapping[str, int], targets: Mapping[str, int], search_width: int) -> None:
        super().__init__()
        self.config, self.fields, self.targets = config, dict(widths), tuple(targets)
        self.role = "search" if config.auxiliary else "value"
        both = {**widths, **({f"{n}.product": widths[n] for n in targets} if config.target_aware else {})}
        self.widths = {name: config.heads * width for name, width in both.items()}
        seconds = targets if config.auxiliary else {}
        self.second = {f"{what}.{name}": search_width for what in ("all", "own") for name in seconds}
        inner = config.heads * config.head_width
        self.keys = nn.Linear(sum(widths.values()), inner, bias=False)
        self.queries = nn.Linear(sum(targets.values()), inner, bias=False) if targets else None
        self.bias = nn.Parameter(torch.zeros(inner))

    def parts(self, events: Reads, target: Targets, fields: Collection[str] | None = None) -> list[Part]:
        """What soft search compares."""
        reads, asked = events[self.role], target[self.role]
        return [Part(reads[name], asked[name]) for name in self.targets if fields is None or name in fields]

    def scores(
        self, events: Reads, history: Ragged, target: Targets, fields: Collection[str] | None = None
    ) -> Tensor:  # fmt: skip
        """(N,) relevance in soft search of all events, from some of the row's fields or all; 0 without a field."""
        parts = self.parts(events, target, fields)
        like = next(iter(events["value"].values())).vectors
        return event_scores(parts, history) if parts else like.new_zeros(history.rows.shape[0])

    def find(self, events: Reads, history: Ragged, target: Targets) -> Kept:
        """The events to attend to."""
        if self.config.search == "hard":
            asked = target["id"][self.config.category].index_select(0, history.rows)
            same = (history.values[self.config.category] == asked) & (asked >= FIRST_VALUE)
            return newest(same, history, self.config.keep)
        if not self.targets:
            return newest(history.rows >= 0, history, self.config.keep)
        return search(self.parts(events, target), history, self.config.keep, precision=self.config.precision)

    def asked(self, target: Targets, rows: int) -> list[dict[str, Tensor]]:
        """Of each head: event field -> (B, D) what its vectors are multiplied with."""
        bias = self.bias / math.sqrt(self.config.head_width)
        query = bias.expand(rows, -1)
        if self.queries is not None:
            own = torch.cat([target["value"][name] for name in self.targets], 1)
            query = query + self.queries(own) / math.sqrt(self.config.head_width)
        maps = self.keys.weight.split(self.config.head_width)
        heads = [q @ w for q, w in zip(query.split(self.config.head_width, 1), maps, strict=True)]
        widths = list(self.fields.values())
        return [dict(zip(self.fields, head.split(widths, 1), strict=True)) for head in heads]

    def forward(self, events: Reads, history: Ragged, target: Targets) -> dict[str, Tensor]:
        """As `unbraid.encoders.searched.SearchedHistory.forward`."""
        kept = self.find(events, history, target)
        values = {name: kept.of(events["value"][name]) for name in self.fields}
        found: dict[str, list[Tensor]] = {name: [] for name in self.widths}
        for asked in self.asked(target, history.lengths.shape[0]):
            scores = event_scores([Part(values[name], asked[name]) for name in self.fields], kept.lists)
            weights = segment_softmax(scores, kept.lists)
            for name in self.fields:
                pooled = pool(values[name], weights, kept.lists)
                found[name].append(pooled)
                if f"{name}.product" in found:
                    found[f"{name}.product"].append(pooled * target["value"][name])
        out = {name: torch.cat(heads, 1) for name, heads in found.items()}
        return out | (self._spread(events, history, target) if self.second and self.training else {})

    def _spread(self, events: Reads, history: Ragged, target: Targets) -> dict[str, Tensor]:
        """What second heads read: a softmax of the search's relevance over all events."""
        weights = segment_softmax(self.scores(events, history, target), history)
        out = {f"all.{name}": pool(events["search"][name], weights, history) for name in self.targets}
        return out | {f"own.{name}": target["search"][name] for name in self.targets}
