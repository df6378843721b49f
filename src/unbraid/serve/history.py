"""What users did, encoded and kept in memory: a store is asked only for what arrived since.

A user's events are encoded once, in the order that the run's own histories have: by time, then by the place of their source in
the run, then by arrival.  What arrives later, however late it happened, is encoded alone and put in its place.  A history is cut
at each request, strictly before the request's time, as `unbraid.data.events` cuts those of rows; so are its gaps and positions.

The least recently used users go when the cache is full.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from unbraid.data.declaration import Data
from unbraid.serve.events import Table
from unbraid.serve.store import Page, Store
from unbraid.types import History

Arrays = dict[str, np.ndarray]
OVERHEAD = 1_000  # bytes of a user's entry beside its arrays, about


@dataclass(frozen=True)
class Past:
    """A user's encoded events, by time, place of their source and arrival.

    Args:
        generation, seq: of the store, up to which events are here.
        events: ``time``, ``place``, event field -> codes, and ``where.I``: does history I keep an event?  (n,) each.
        views: history with a filter -> places of its events.
        memos: history -> which of its events, and what encoders know of them.
    """

    generation: int
    seq: int
    events: Arrays
    views: Arrays
    memos: dict[str, tuple[tuple[int, int], dict[Any, Any]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.events["time"])

    def memo(self, history: str, first: int, last: int) -> dict[Any, Any]:
        """What encoders know of the history's events from ``first`` to before ``last``; only the latest such stretch is kept."""
        held = self.memos.get(history)
        if held is None or held[0] != (first, last):
            held = self.memos[history] = ((first, last), {})
        return held[1]

    @property
    def bytes(self) -> int:
        """Of memory."""
        arrays = sum(array.nbytes for part in (self.events, self.views) for array in part.values())
        known = [x for _, memo in list(self.memos.values()) for parts in list(memo.values()) for x in parts]
        return OVERHEAD + arrays + sum(x.numel() * x.element_size() for x in known if isinstance(x, Tensor))


class Histories:
    """See the module.

    Args:
        data: of the run; tables: its event tables by name; store: where events come from.
        cache_bytes: at most so much memory.
    """

    def __init__(self, data: Data, tables: Mapping[str, Table], store: Store, cache_bytes: int) -> None:
        self.data, self.tables, self.store, self.cache_bytes = data, tables, store, cache_bytes
        self._held: OrderedDict[int, tuple[Past, int]] = OrderedDict()  # user -> what is known, and its bytes
        self._lock = threading.Lock()
        self._bytes = self._hits = self._misses = 0
        self._nothing = self._built(0, 0, self._encoded([Page(0, 0, [], True)]))

    def stats(self) -> dict[str, int]:
        """``hits`` and ``misses`` (a user of whom nothing was known) so far; ``users`` and ``bytes`` now."""
        with self._lock:
            return {"hits": self._hits, "misses": self._misses, "users": len(self._held), "bytes": self._bytes}

    def of(self, users: Sequence[int]) -> list[Past]:
        """All events of distinct users (0: nobody).  Raises StoreError."""
        found: dict[int, Past] = {0: self._nothing}
        late: dict[int, tuple[Past, Page]] = {}  # what is known, and what comes to it
        for user in (user for user in users if user):
            with self._lock:
                held = self._held[user][0] if user in self._held else None
                self._hits, self._misses = self._hits + (held is not None), self._misses + (held is None)
            page = self.store.read(user, held.generation, held.seq) if held else self.store.read(user)
            if held is not None and not page.whole:
                found[user] = held
            if page.records:
                late[user] = (self._nothing if page.whole or held is None else held, page)
        for (user, (before, page)), more in zip(
            late.items(), self._encoded([p for _, p in late.values()]), strict=True
        ):
            found[user] = self._built(page.generation, page.seq, [before.events, more])
        for user in found.keys() - {0}:
            self.settle(user, found[user])
        return [found.get(user, self._nothing) for user in users]

    def settle(self, user: int, past: Past) -> None:
        """Remember a user as the latest, with the memory that it takes now; forget the earliest where that is too much."""
        size = past.bytes
        with self._lock:
            held = self._held.pop(user, None)
            if held is not None and (held[0].generation, held[0].seq) > (past.generation, past.seq):
                past, size = held  # another thread knows more
            self._bytes += size - (held[1] if held is not None else 0)
            self._held[user] = (past, size)
            while self._bytes > self.cache_bytes and self._held:
                _, (_, size) = self._held.popitem(last=False)
                self._bytes -= size

    def _encoded(self, pages: Sequence[Page]) -> list[Arrays]:
        """The events of each page's records: those of all pages are encoded together."""
        parts, nobody = [], not any(page.records for page in pages)
        for name, table in self.tables.items():
            found = [(i, record) for i, page in enumerate(pages) for record in page.records if record.table == name]
            owners = np.array([i for i, _ in found], dtype=np.int64)
            for part in table.encode([record for _, record in found]) if found or nobody else ():
                part["owner"] = owners[part.pop("record")]
                parts.append(part)
        if not parts:  # of tables that the run does not read
            return [self._nothing.events for _ in pages]
        whole = _joined(parts)
        owner = whole.pop("owner")
        order = np.argsort(owner, kind="stable")
        ends = np.searchsorted(owner[order], np.arange(len(pages) + 1))
        whole = {name: values[order] for name, values in whole.items()}
        return [{name: v[a:b] for name, v in whole.items()} for a, b in zip(ends[:-1], ends[1:], strict=True)]

    def _built(self, generation: int, seq: int, parts: Sequence[Arrays]) -> Past:
        events = _joined(parts)
        order = np.lexsort((events["place"], events["time"]))  # stable: ties stay as they arrived
        events = {name: values[order] for name, values in events.items()}
        views = {
            h.name: np.flatnonzero(events[f"where.{i}"]) for i, h in enumerate(self.data.histories) if h.where
        }  # fmt: skip
        return Past(generation, seq, events, views)

    # ----------------------------------------------------------------------------------------------------- cut at a time
    def cut(self, pasts: Sequence[Past], whose: np.ndarray, times: np.ndarray) -> Arrays:
        """Columns as `unbraid.data.events.gather` reads them, of rows with these histories.

        Args:
            pasts: of the distinct users; whose: (n,) the user of each row, by number; times: (n,) of the rows.
        """
        columns = {f"event.{f.name}": _end_to_end([p.events[f.name] for p in pasts]) for f in self.data.fields}
        columns |= {"event.time": _end_to_end([p.events["time"] for p in pasts]), "time": times}
        ends = np.empty(len(times), np.int64)
        mine = (
            [np.flatnonzero(whose == number) for number in range(len(pasts))]
            if len(pasts) > 1
            else [np.arange(len(times))]
        )
        for past, rows in zip(pasts, mine, strict=True):
            ends[rows] = np.searchsorted(past.events["time"], times[rows])  # strictly before
        base = np.concatenate([[0], np.cumsum([len(p) for p in pasts])])
        for history in self.data.histories:
            columns |= self._cut(history, pasts, mine, ends, base)
        return columns

    def _cut(
        self, history: History, pasts: Sequence[Past], mine: Sequence[np.ndarray], ends: np.ndarray, base: np.ndarray
    ) -> Arrays:  # fmt: skip
        """Where each row's slice of one history begins and ends, and which events the history has."""
        last, first, found, shown = ends.copy(), np.zeros_like(ends), {}, base
        if history.where:
            views = [p.views[history.name] for p in pasts]
            shown = np.concatenate([[0], np.cumsum([len(v) for v in views])])
            found[f"view.{history.name}"] = _end_to_end([v + b for v, b in zip(views, base[:-1], strict=True)])
            for view, rows in zip(views, mine, strict=True):
                last[rows] = np.searchsorted(view, ends[rows])
        for start, rows in zip(shown[:-1], mine, strict=True):
            first[rows] = start + np.maximum(last[rows] - history.length, 0)
            last[rows] += start
        return {**found, f"start.{history.name}": first, f"end.{history.name}": last}


def _joined(parts: Sequence[Arrays]) -> Arrays:
    """Parts with the same columns end to end."""
    return {name: _end_to_end([part[name] for part in parts]) for name in parts[0]}


def _end_to_end(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
