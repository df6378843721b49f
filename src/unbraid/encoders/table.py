"""Embedding tables, read through the distinct ids of a batch.

A *view* is one set of tables over all vocabularies.  One view is the ordinary shared embedding; one view per task plus a
shared one gives every task its own geometry; several views of any widths are multi-embedding.  All views of a vocabulary
read the same ids, so the distinct ids of a batch are found once per vocabulary and every view gathers only those rows.

While gradients are on, the gathered rows are what later steps differentiate at (`unbraid.types.Lookup`):
a *lazy* table hands out a detached leaf and its optimiser writes back those rows alone, so that a row that no batch
reads never moves; a *dense* table hands out a differentiable gather and its parameter trains as any other.
Lazy pays only when a table is large (`benchmarks/table_crossover.py` measures where on a given machine).

A large lazy table may be *divided* by rows over the processes that train together (`unbraid.sharding`): what a batch reads of it
comes from its owners, as such a leaf, in evaluation too.

A dense table that one id column alone reads is gathered straight from its weight, which saves finding the distinct ids
and a second gather, unless an update says that it reads the lookups of dense tables, too (``Table.wanted``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from unbraid import parallel, sharding
from unbraid.types import FORBID, UNKNOWN, Lookup, Rows

_drawn = True  # do new tables get random numbers?


@contextmanager
def undrawn() -> Iterator[None]:
    """Until the block ends, new tables are left as they are allocated, for other weights to be put in their place.

    Nothing is written to them, so that they take no memory.  Whatever is drawn after them is drawn differently.
    """
    global _drawn
    before, _drawn = _drawn, False
    try:
        yield
    finally:
        _drawn = before


class Table(nn.Module):
    """One embedding table.

    Args:
        size: number of rows; width: D.
        std: standard deviation of the normal initialiser.
        lazy: is it updated only at the rows that a batch read?
        divided: has each of the processes that train together a part of its rows, if there are several?

    Attributes:
        size: its rows, of all processes; weight: (V, D), or this process's part of it.
        wanted: set by an update: must its lookups be in the output although it is dense?
    """

    before_read: Callable[[Tensor], None] | None = (
        None  # set by an update that brings rows up to date when they are read
    )

    def __init__(self, size: int, width: int, std: float, lazy: bool, divided: bool = False) -> None:
        super().__init__()
        self.size, self.lazy, self.divided, self.wanted = size, lazy, divided, False
        self.weight: nn.Parameter = (
            sharding.draw(size, width, std) if divided and parallel.world() > 1
            else nn.Parameter(torch.empty(size, width).normal_(0.0, std) if _drawn else torch.empty(size, width))
        )  # fmt: skip

    @property
    def apart(self) -> bool:
        """Are some of its rows on other processes?"""
        return isinstance(self.weight, sharding.Part)

    def read(self, ids: Tensor) -> Tensor:
        """(U, D) the given distinct rows, ascending where they come from other processes; differentiable."""
        if self.apart:
            return sharding.fetch([self], ids)[0]
        if not self.lazy:
            return nn.functional.embedding(ids, self.weight)
        if self.before_read is not None and self.training:  # an evaluation changes nothing; settle() comes before it
            self.before_read(ids)
        return self.weight.detach().index_select(0, ids).requires_grad_(self.weight.requires_grad)


def distinct(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The sorted distinct ids (U,) and, for each id, its place among them (N,).

    Marking a vector as long as the vocabulary is several times faster than sorting while it is not much longer than
    the batch; beyond that ``torch.unique`` wins.
    """
    if size > 16 * len(ids) + 65_536:
        unique, place = torch.unique(ids, return_inverse=True)
        return unique, place
    seen = torch.zeros(size, dtype=torch.bool, device=ids.device)
    seen[ids] = True
    unique = seen.nonzero().squeeze(1)
    place = torch.empty(size, dtype=torch.int64, device=ids.device)
    place[unique] = torch.arange(len(unique), device=ids.device)
    return unique, place[ids]


class Role(NamedTuple):
    """Tables for one purpose of a history encoder, beside those of the role ``value`` that all features read.

    Args:
        reads: who reads them: the history's ``events``, the row's own features of the same vocabularies (``target``) or
            ``both``.  The row's features read the role ``value`` in any case.
        width: D, 0 for the view's.
        shared: one table for all views, unless every task has tables alone (views of kind ``separate``).
    """

    reads: Literal["both", "events", "target"] = "both"
    width: int = 0
    shared: bool = False


EVERY = "every"  # stands for the view in the name of a table that all views share
VALUE: Mapping[str, Role] = {"value": Role()}


@dataclass(frozen=True)
class Views:
    """Which tables there are.

    Args:
        kind: ``shared`` (one view), ``per_task`` (one per task and a shared one, in that order), ``separate`` (one per
            task and no other) or ``several``.
        by: ``domain``: ``per_task`` and ``separate`` views belong to domains instead of tasks, and over ``several`` each domain
            has its own gate (`unbraid.towers.domains`).
        width: D of every table; widths: D of each view, only for ``several``.
        std: standard deviation of the tables' normal initialiser.
        lazy_rows: tables with at least this many rows are updated lazily, smaller ones densely (0: all lazy, -1: none).
            Measured: equally fast near 30,000 rows, lazy 1.5 times faster at 100,000, 10 times at 1M.
        shard_mb: a lazy table of at least so many MB of weights (4 bytes each) is divided by rows over the processes that train
            together (docs/distributed.md); 0: none.  In one process it changes nothing.
        unknown_rate: while training, this share of ids is read as *unknown*, so that row 0 learns what a new id is like.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["shared", "per_task", "separate", "several"] = "shared"
    by: Literal["task", "domain"] = "task"
    width: int = 16
    widths: tuple[int, ...] = ()
    std: float = 1e-2
    lazy_rows: int = 50_000
    shard_mb: float = 0.0
    unknown_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.width <= 0 or any(w <= 0 for w in self.widths):
            raise ValueError(f"Parameter `width` should be positive. Found {self.widths or self.width}.")
        if not 0 <= self.shard_mb < math.inf:
            raise ValueError(f"Parameter `shard_mb` should be finite and not negative. Found {self.shard_mb}.")
        if not 0 <= self.unknown_rate < 1:
            raise ValueError(f"Parameter `unknown_rate` should be in [0, 1). Found {self.unknown_rate}.")
        if self.by not in ("task", "domain") or (self.by == "domain" and self.kind == "shared"):
            raise ValueError(
                f"Parameter `by` should be `task`, or `domain` with kind `per_task`, `separate` or `several`. "
                f"Found `{self.by}` with kind `{self.kind}`."
            )
        if (self.kind == "several") != bool(self.widths):
            raise ValueError(
                "Tables of kind `several` need `widths`, one for each set, such as `model.tables.widths = [8, 16]`. Found none."
                if self.kind == "several"
                else f"Parameter `widths` belongs to tables of kind `several` and to no other. Found kind `{self.kind}`, widths "
                f"{list(self.widths)}. Set `model.tables.widths` to [], and `model.experts`, too, if views belong to tasks."
            )

    def names(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Names of the views in order; ``tasks``: the names of the domains where views belong to them."""
        if self.kind == "several":
            return tuple(f"view{i}" for i in range(len(self.widths)))
        own = tuple(tasks) if self.kind in ("per_task", "separate") else ()
        return own if self.kind == "separate" else (*own, "shared")

    def build(
        self, tasks: Sequence[str], sizes: Mapping[str, int], roles: Mapping[str, Role] = VALUE,
        vocabularies: Mapping[str, Collection[str]] | None = None,
    ) -> Tables:  # fmt: skip
        """The tables of all views, vocabularies and roles; ``vocabularies``: role -> its own, all if it is not named."""
        names = self.names(tasks)
        widths = dict(zip(names, self.widths or (self.width,) * len(names), strict=True))
        return Tables(widths, sizes, self, roles, vocabularies or {})


class Tables(nn.Module):
    """All tables of a model, keyed ``view/vocabulary/role``.

    Args:
        widths: view -> D; sizes: vocabulary -> rows.
        config: initialiser, laziness, unknown rate.
        roles, vocabularies: as in `Views.build`.
    """

    def __init__(
        self, widths: Mapping[str, int], sizes: Mapping[str, int], config: Views, roles: Mapping[str, Role],
        vocabularies: Mapping[str, Collection[str]],
    ) -> None:  # fmt: skip
        super().__init__()
        self.widths, self.sizes = dict(widths), dict(sizes)
        alone = config.kind == "separate"
        self.roles = {name: role._replace(shared=role.shared and not alone) for name, role in roles.items()}
        self.unknown_rate = config.unknown_rate
        self.vocabularies = {role: frozenset(vocabularies.get(role, sizes)) for role in roles}
        self.tables = nn.ModuleDict()
        for view in widths:
            for vocabulary, size in sizes.items():
                lazy = config.lazy_rows >= 0 and size >= config.lazy_rows
                for role in roles:
                    key = self.key(view, vocabulary, role)
                    if vocabulary in self.vocabularies[role] and key not in self.tables:
                        width = self.width(view, role)
                        divided = lazy and 0 < config.shard_mb * 1e6 <= 4 * size * width
                        self.tables[key] = Table(size, width, config.std, lazy, divided)

    def width(self, view: str, role: str) -> int:
        """D of a role's tables; one table for all views is as wide as the widest view unless the role says otherwise."""
        widest = max(self.widths.values()) if self.roles[role].shared else self.widths[view]
        return self.roles[role].width or widest

    def key(self, view: str, vocabulary: str, role: str) -> str:
        """Name of a table."""
        return f"{EVERY if self.roles[role].shared else view}/{vocabulary}/{role}"

    def forward(
        self, ids: Mapping[str, Sequence[Tensor]], direct: Collection[str] = (),
        readers: Mapping[str, Sequence[Collection[str]]] | None = None,
    ) -> tuple[dict[tuple[str, str, str], list[Rows]], tuple[Lookup, ...]]:  # fmt: skip
        """Read all ids of a batch.

        Args:
            ids: vocabulary -> list of (n,) int64 ids, one per reader.
            direct: vocabularies whose reader has no use for distinct rows.  Their dense tables come whole, without a
                lookup, unless they are ``wanted``.
            readers: vocabulary -> the roles that each of its readers reads; all read all if None.

        Returns:
            (view, vocabulary, role) -> one `Rows` per reader of that role, in order; and the lookups (empty while
            gradients are off).
        """
        read: dict[tuple[str, str, str], list[Rows]] = {}
        lookups: dict[str, Lookup] = {}
        for vocabulary, parts in ids.items():
            parts = [self._as_unknown(part) for part in parts]
            found: dict[tuple[int, ...], tuple[Tensor, list[Tensor]]] = {}  # which readers -> their distinct ids
            first: dict[tuple[int, ...], list[Rows]] = {}  # which readers -> their first reads
            for role in (role for role in self.roles if vocabulary in self.vocabularies[role]):
                mine = tuple(i for i in range(len(parts)) if readers is None or role in readers[vocabulary][i])
                tables = {view: self.key(view, vocabulary, role) for view in self.widths}
                by_row = self._by_row(vocabulary in direct, tables.values())
                if by_row and mine not in found:
                    found[mine] = self._distinct([parts[i] for i in mine], self.sizes[vocabulary])
                if by_row:
                    self._fetch(tables.values(), found[mine][0], lookups)
                for view, key in tables.items():
                    table = cast(Table, self.tables[key])
                    if by_row and key not in lookups:
                        lookups[key] = Lookup(key, found[mine][0], table.read(found[mine][0]))
                    vectors = lookups[key].vectors if by_row else table.weight
                    index = found[mine][1] if by_row else [parts[i] for i in mine]
                    like = first.get(mine, [None] * len(mine))  # type: ignore[list-item]
                    own = [Rows(vectors, part, other) for part, other in zip(index, like, strict=True)]
                    read[view, vocabulary, role] = first.setdefault(mine, own) and own
        return read, tuple(lookups.values()) if torch.is_grad_enabled() else ()

    def _fetch(self, keys: Collection[str], ids: Tensor, lookups: dict[str, Lookup]) -> None:
        """Read those of the tables whose rows are on other processes, in one exchange."""
        apart = [key for key in dict.fromkeys(keys) if key not in lookups and cast(Table, self.tables[key]).apart]
        if apart:
            vectors = sharding.fetch([cast(Table, self.tables[key]) for key in apart], ids)
            lookups |= {key: Lookup(key, ids, each) for key, each in zip(apart, vectors, strict=True)}

    def _as_unknown(self, ids: Tensor) -> Tensor:
        if not (self.training and self.unknown_rate > 0):
            return ids
        return torch.where(torch.rand(len(ids), device=ids.device) < self.unknown_rate, UNKNOWN, ids)

    def _by_row(self, direct: bool, keys: Collection[str]) -> bool:
        """Are only the distinct rows read, as a lookup?"""
        tables = [cast(Table, self.tables[key]) for key in keys]
        if not torch.is_grad_enabled():
            return any(t.apart for t in tables)
        return not (direct and all(not (t.lazy or t.wanted) for t in tables))

    @staticmethod
    def _distinct(parts: Sequence[Tensor], size: int) -> tuple[Tensor, list[Tensor]]:
        if not parts:
            return torch.zeros(0, dtype=torch.int64), []
        unique, place = distinct(torch.cat(list(parts)), size)
        return unique, list(place.split([len(part) for part in parts]))
