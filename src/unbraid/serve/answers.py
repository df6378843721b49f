"""What endpoints compute, in threads: from checked requests to answers."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import polars as pl

from unbraid.serve.errors import ApiError, refusing
from unbraid.serve.limits import answer
from unbraid.serve.shape import dtype_of
from unbraid.serve.store import StoreError

if TYPE_CHECKING:
    from starlette.responses import Response

    from unbraid.serve.engine import Engine, Loaded
    from unbraid.serve.ranker import Ranked, Request
    from unbraid.serve.settings import Settings
    from unbraid.serve.shape import Columns
    from unbraid.serve.telemetry import Telemetry

Rows: TypeAlias = "Sequence[Mapping[str, Any]] | pl.DataFrame"
log = logging.getLogger("unbraid.serve")
DEGRADED = "The history store cannot be read: histories are empty."  # where it is, is in the log
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def request_of(loaded: Loaded, data: Mapping[str, Any]) -> Request:
    """What a ranker is asked.  Raises ApiError for an exploration that is none."""
    from unbraid.serve.ranker import Request

    known = loaded.own.columns
    return Request(
        user=data["user"], candidates=[_of(row, known) for row in data["candidates"]],
        context=_of(data.get("context", {}), known), time=data.get("time"), score=data.get("score", ""),
        top=data.get("top", 0), explore=_exploration(data.get("explore")),
    )  # fmt: skip


def rank(loaded: Loaded, data: Mapping[str, Any], telemetry: Telemetry) -> Response:
    """The answer of ``/rank`` to one request."""
    with refusing():
        found = loaded.ranker.rank(request_of(loaded, data))
    telemetry.stages(found.seconds)
    return ranked(loaded, found, telemetry)


def rank_together(ranker: Any, telemetry: Telemetry, requests: Sequence[Request]) -> list[Any]:
    """What the ranker finds for each request, or its error."""
    telemetry.batch_requests.observe(len(requests))
    telemetry.batch_rows.observe(sum(len(one.candidates) for one in requests))
    found = ranker.rank_together(requests)
    for one in found[:1]:
        telemetry.stages(getattr(one, "seconds", {}))
    return found


def ranked(loaded: Loaded, found: Ranked, telemetry: Telemetry) -> Response:
    """The answer that says what was found."""
    if found.degraded:
        telemetry.degraded.inc()
        log.warning("ranked without histories: %s", found.degraded)
    return answer({
        "bundle": loaded.fingerprint, "order": found.order.tolist(), "score": finite("score", found.score).tolist(),
        "predictions": {t: finite(t, values).tolist() for t, values in found.predictions.items()},
        "events": found.events, "degraded": DEGRADED if found.degraded else "",
    })  # fmt: skip


def predictions(ranker: Any, columns: Columns, telemetry: Telemetry, items: Sequence[Rows]) -> list[Any]:
    """Task -> (N,) or (N, K) predictions of each item's rows, all in one pass; an error in the place of what cannot be predicted.

    Raises:
        StoreError: histories cannot be read.
    """
    telemetry.batch_requests.observe(len(items))
    telemetry.batch_rows.observe(sum(map(len, items)))
    try:
        with refusing():
            found = ranker.predict(frame(items, columns))
            values = {task: finite(task, found[task].to_numpy()) for task in found.columns}
    except StoreError:
        raise
    except Exception as error:
        if len(items) == 1:
            return [error]
        # the fault of one is not that of the others, and its place is told in its own rows
        return [predictions(ranker, columns, telemetry, [rows])[0] for rows in items]
    ends = np.cumsum([len(rows) for rows in items]).tolist()
    return [{t: v[end - len(rows) : end] for t, v in values.items()} for rows, end in zip(items, ends, strict=True)]


def frame(items: Sequence[Rows], columns: Columns) -> pl.DataFrame:
    """Checked rows of all items as one frame of these columns; what is not there is null."""
    if any(isinstance(rows, pl.DataFrame) for rows in items):  # of Arrow, which have all columns
        parts = [rows if isinstance(rows, pl.DataFrame) else frame([rows], columns) for rows in items]
        return pl.concat([part.select(list(columns)) for part in parts])
    rows: list[Any] = [row for item in items for row in item]
    return pl.DataFrame([pl.Series(n, [row.get(n) for row in rows], dtype_of(c.kind)) for n, c in columns.items()])


def finite(name: str, values: np.ndarray) -> np.ndarray:
    """The values.  Raises ArithmeticError where one is NaN or infinite: no client should sort by that."""
    if values.dtype == object:  # probabilities of classes, a list per row
        values = np.stack(list(values)) if len(values) else values.reshape(0, 0)
    if not np.isfinite(values).all():
        raise ArithmeticError(f"`{name}` is not finite in {(~np.isfinite(values)).sum()} of {values.size} values.")
    return values


def _of(row: Mapping[str, Any], known: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns that this bundle reads, of those that clients send."""
    return row if row.keys() <= known.keys() else {name: value for name, value in row.items() if name in known}


def _exploration(given: Mapping[str, Any] | None) -> Any:
    if not given:
        return None
    from unbraid.uncertainty.explore import UCB, Thompson

    if given["kind"] == "thompson":
        return Thompson(given.get("seed"), given.get("strength", 1.0))
    if "seed" in given:
        raise ApiError(422, "ucb draws nothing: leave the seed out, or take thompson.", "explore.seed")
    return UCB(given.get("strength", 2.0))


# --------------------------------------------------------------------------------------------------------------- events
def append(engine: Engine, loaded: Loaded, data: Mapping[str, Any]) -> int:
    """Check all events, keep all of them or none; how many were new."""
    table, events = data["table"], data["events"]
    key, known = loaded.wire.id_keys[table], loaded.own.sources[table]
    with refusing():
        found = loaded.ranker.records(
            table, [{name: event[name] for name in event if name in known} for event in events]
        )
    unit, now = PER_SECOND.get(loaded.shape.time, 0), time.time()
    for i, (_, record) in enumerate(found):
        if unit and record.time > (now + engine.settings.max_skew) * unit:
            raise ApiError(422, f"The event's time is {record.time / unit - now:,.0f} s ahead of the server's clock; at most "
                           f"{engine.settings.max_skew:g} s are allowed. Times are in {loaded.shape.time} since 1970, UTC.",
                           f"events.{i}")  # fmt: skip
    ids = [event.get(key) or own_id(table, event) for event in events]
    return sum(engine.store.append([(u, r._replace(id=i)) for i, (u, r) in zip(ids, found, strict=True)]))


def own_id(table: str, event: Mapping[str, Any]) -> str:
    """The id of an event that came without: equal where all that was sent is equal, so that it may be sent again."""
    text = json.dumps([table, event], sort_keys=True, separators=(",", ":"))
    return "~" + hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def user_of(text: str, kind: str) -> Any:
    """A user id that stands in a path.  Raises ApiError where it is not of the run's type."""
    try:
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError:
        raise ApiError(422, f"User ids are of type {kind}. Found {text[:80]!r}.", "user") from None


# --------------------------------------------------------------------------------------------------------------- schema
def schema(loaded: Loaded, settings: Settings) -> dict[str, Any]:
    """The answer of ``/schema``."""
    shape = loaded.shape
    return {
        "bundle": {"name": shape.name, "fingerprint": loaded.fingerprint},
        "tasks": [{"name": name, "kind": kind} for name, kind in shape.tasks.items()],
        "user": {"type": shape.user.kind, "example": shape.user.example},
        "time": shape.time or None,
        "columns": _told(shape.columns),
        "rows": _told(shape.rows),
        "events": {t: {"id": loaded.wire.id_keys[t], "columns": _told(found)} for t, found in shape.sources.items()},
        "limits": {"candidates": settings.max_candidates, "bytes": settings.max_body, "seconds": settings.timeout,
                   "requests": settings.concurrency, "seconds_ahead": settings.max_skew},
    }  # fmt: skip


def _told(columns: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {"type": c.kind, "required": c.required, "example": c.example} for name, c in columns.items()}
