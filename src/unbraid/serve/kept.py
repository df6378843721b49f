"""What a store keeps of the run's tables: what histories read, or whole rows, which a later run can be trained on.

The choice is the store's, so that an import and every server that writes into it agree.  With whole rows the store also notes
each table's name in the run and the types of its columns: JSON has fewer.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

from unbraid.data import source as src
from unbraid.serve.rows import Types, roots, widest
from unbraid.serve.store import Store

KEEP, TABLES = "keep", "tables"  # settings: what is kept; name and columns of each table
CHOICES = ("events", "rows")


class Kept(NamedTuple):
    """A table in the store: what the run calls it, and its columns."""

    name: str
    types: Types


def keeps_rows(store: Store) -> bool:
    """Whether records hold all that a run reads of a row."""
    return store.get(KEEP) == "rows"


def choose(store: Store, keep: str) -> None:
    """Let an empty store keep ``events`` or ``rows``; empty: as it does.

    Raises:
        ValueError: there is no such choice, or it comes too late: events are there that were kept otherwise.
    """
    if keep not in ("", *CHOICES):
        raise ValueError(f"A store keeps one of {', '.join(CHOICES)}. Found {keep!r}.")
    now = store.get(KEEP) or "events"
    if keep in ("", now):
        return
    if events := store.stats()["events"]:
        raise ValueError(
            f"The store holds {events:,} events, kept as `{now}`; known ids stay as they are. Use another store to keep `{keep}`."
        )
    store.set(KEEP, keep)


def trained_columns(data: src.Data, table: str, have: Mapping[str, Any]) -> set[str]:
    """All columns of a table (``rows``, or one of events) that training reads, those of joined tables among them."""
    joins = [join.on for join in data.joins]
    if table != "rows":
        times = {one.time or data.time for one in data.events if one.table == table} - {"none"}
        return {n for text in (data.user, *times) for n in roots(text, have)} | {on for on in joins if on in have}
    texts = [f.source for f in data.features] + [task.source for task in data.tasks]
    texts += [task.sampling_rate for task in data.tasks if isinstance(task.sampling_rate, str)]
    texts += [data.user, data.time, data.domain, data.weight, data.request, *data.exposure, data.keep, data.withhold]
    texts += [data.split.column, *joins]
    if data.negatives is not None:
        texts += [data.negatives.item, *(label for label in data.negatives.labels if label in have)]
    return {name for text in texts for name in roots(text, have)}


# ------------------------------------------------------------------------------------------------------ names and types
def note(store: Store, table: str, name: str, types: Mapping[str, Any]) -> None:
    """Note a table and columns that its records have from now on.  Raises ValueError for one of another type than so far."""
    found = noted(store)
    old = found.get(table, Kept(name, {}))
    for column, kind in types.items():
        held = old.types.get(column, pl.Null)
        if held != pl.Null and kind != pl.Null and widest(held) != widest(kind):
            raise ValueError(
                f"The store keeps `{column}` of `{table}` as {held}, and the run's is {kind}. Use another store."
            )
    known = {n: kind for n, kind in old.types.items() if kind != pl.Null}
    merged = {n: known.get(n, kind) for n, kind in (old.types | dict(types) | known).items()}
    if table not in found or merged != old.types:
        found[table] = Kept(old.name, merged)
        store.set(TABLES, json.dumps({t: [kept.name, _written(kept.types)] for t, kept in found.items()}))


def noted(store: Store) -> dict[str, Kept]:
    """Table -> what was noted of it."""
    found = json.loads(store.get(TABLES) or "{}")
    return {table: Kept(name, _read(text)) for table, (name, text) in found.items()}


def _written(types: Types) -> str:
    """Types as text: those of an Arrow file without rows."""
    file = io.BytesIO()
    pl.DataFrame(schema=types).write_ipc(file)
    return base64.b64encode(file.getvalue()).decode()


def _read(text: str) -> Types:
    return dict(pl.read_ipc(io.BytesIO(base64.b64decode(text))).schema)
