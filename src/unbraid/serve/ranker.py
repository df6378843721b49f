"""From a user and candidates to an order: a bundle, the user's events as they are now, and a score.

Candidates of one request share their user and its time, and so their histories: these are read, cut and searched once
(`unbraid.types.Shared`).  `Ranker.predict` takes rows of any users and times.  Both give the numbers of
`unbraid.predictor.Predictor.predict` on the same rows and events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from unbraid.bundle import Bundle
from unbraid.data import features, vocabulary
from unbraid.data import source as src
from unbraid.data.events import gather
from unbraid.data.table import Encoded
from unbraid.predictor import as_frame, explained
from unbraid.serve.events import Table
from unbraid.serve.history import Histories, Past
from unbraid.serve.importer import PER_SECOND, claim
from unbraid.serve.kept import keeps_rows, note
from unbraid.serve.rows import (
    UNREADABLE,
    Column,
    Joins,
    RequestError,
    RowReader,
    as_type,
    each,
    example,
    here,
    kind_of,
    series,
)
from unbraid.serve.store import USER_TYPE, Record, Store, StoreError
from unbraid.train.scoring import scores_of
from unbraid.types import Batch, Shared
from unbraid.uncertainty.explore import Exploration
from unbraid.uncertainty.last_layer import UncertaintyError

__all__ = ["Column", "Ranked", "Ranker", "Request", "RequestError"]

LONGEST = 2_000  # characters of a score
CACHE = 512 << 20


@dataclass(frozen=True)
class Request:
    """Whose candidates are ranked, and how.

    Args:
        user: the raw id; candidates: raw columns of each; context: those that all share, which a candidate may override.
        time: in the unit of ``data.time`` (microseconds where that is a date); None: now.
        score: SQL arithmetic over predictions (``0.7 * click + like``); empty: the first target.
        top: how many; 0: all.
        explore: score tasks by the logits that it chooses (`unbraid.uncertainty.explore`) instead of the model's own.
    """

    user: Any
    candidates: Sequence[Mapping[str, Any]]
    context: Mapping[str, Any] = field(default_factory=dict)
    time: int | None = None
    score: str = ""
    top: int = 0
    explore: Exploration | None = None


@dataclass(frozen=True)
class Ranked:
    """An order of candidates.

    Args:
        order: (k,) their places in the request, best first, equal scores in the request's order; score: (k,) in that order.
        predictions: task -> (k,) or (k, K) in that order; with exploration also ``TASK_sd`` and ``TASK_explore``.
        events: of the user before the request's time; degraded: why histories are empty although they should not be, or "".
        seconds: stage -> seconds: ``rows``, ``history``, ``model``, ``score``.
    """

    order: np.ndarray
    score: np.ndarray
    predictions: Mapping[str, np.ndarray]
    events: int
    degraded: str
    seconds: Mapping[str, float]


class Ranker:
    """See the module.  Its methods may be called from several threads at once.

    Args:
        bundle: a loaded bundle or its folder.
        store: of the users' events; a bundle that reads histories needs one.
        folder: where the run's tables are read from now (joined ones whole, of others the types of columns); the run's own by
            default.  tables: tables in memory instead, by name.
        cache_bytes: memory for users' encoded events; device: of the model.

    Attributes:
        columns: what a candidate, or the context, brings; rows: what a row of `predict` brings: also its user and time.
        sources: event table -> its raw columns; user: the raw user id.

    Raises:
        ValueError: there is no store, or one whose users or times are of another type; DataError: a table is missing.
    """

    def __init__(
        self, bundle: Bundle | str | Path, store: Store | None = None, *, folder: str | Path | None = None,
        cache_bytes: int = CACHE, device: str = "cpu", tables: src.Tables | None = None,
    ) -> None:  # fmt: skip
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        data, fitted = self.bundle.run.data, self.bundle.fitted
        self.data = data if folder is None else replace(data, folder=str(Path(folder).resolve()))
        self.schema, self.device, self.store = fitted.schema, device, store
        self.model = self.bundle.model.to(device).eval()
        joins = Joins(self.data, tables)
        self.reader = RowReader(self.data, fitted, joins, tables)
        names = dict.fromkeys(one.table for one in self.data.events) if data.histories else {}
        self.tables = {name: Table(name, self.data, fitted, joins, self.reader, tables, store) for name in names}
        self.histories: Histories | None = None
        if data.histories:
            if store is None:
                raise ValueError("The bundle's model reads histories. Give a store: `unbraid.serve.store.open_store`.")
            claim(store, USER_TYPE, str(self.reader.users), "user ids")
            claim(store, PER_SECOND, f"{self.reader.per_second:g}", "units of time in a second")
            for name, table in self.tables.items() if keeps_rows(store) else ():
                note(store, name, data.rows if name == "rows" else name, {n: table.types[n] for n in table.values})
            self.histories = Histories(self.data, self.tables, store, cache_bytes)
        self.rows = self._columns()
        self.columns = {n: c for n, c in self.rows.items() if n not in (self.reader.user, self.reader.time)}
        self.sources = {name: table.columns() for name, table in self.tables.items()}
        kind = self.reader.have.get(self.reader.user, pl.String)
        self.user = Column(kind_of(kind), True, example(self.reader.user, kind, self.data, fitted))
        self._attach: Callable[[Encoded], None] = partial(features.attach, model=self.model, keep=False, device=device)

    def _columns(self) -> dict[str, Column]:
        types = self.reader.types
        kinds = {
            n: "int" if n == self.reader.time and kind in (pl.Date, pl.Datetime) else kind_of(kind)
            for n, kind in types.items()
        }
        return {n: Column(kinds[n], True, example(n, types[n], self.data, self.bundle.fitted)) for n in types}

    # --------------------------------------------------------------------------------------------------------- one user
    def rank(self, request: Request) -> Ranked:
        """The candidates in order.

        Raises:
            RequestError: names the field that is missing, unknown or of another type; a score that is none.
        """
        watch, past, degraded = Watch(), None, ""
        with self.encoded(self.given(request), "candidates") as encoded:
            watch("rows")
            if self.histories is not None:
                user = int(encoded.columns["user"][:1].view(np.uint64)[0])
                (past,), degraded = self.pasts([user])
            lists, events = self._shared(encoded, past)
            watch("history")
            batches = [encoded.batch(part, {**encoded.inputs(part), **_for(part, lists)}) for part in parts(encoded)]
            found = self.predictions(batches, request.explore)
        if self.histories is not None and past is not None and len(past):
            self.histories.settle(user, past)  # encoders may know more of it now
        watch("model")
        return self.ordered(request, found, events, degraded, watch)

    # --------------------------------------------- the stages of a request, which `unbraid.serve.together` runs for several
    def given(self, request: Request) -> dict[str, pl.Series]:
        """The raw columns of a request's candidates, of the run's types.  Raises RequestError."""
        rows, context = request.candidates, request.context
        if not rows:
            raise RequestError("candidates", "There should be at least one candidate. Found none.")
        if request.top < 0:
            raise RequestError("top", f"`top` should not be negative. Found {request.top}.")
        self._refuse_others("context.", context)
        brought = set(context).union(*rows)
        for i, row in enumerate(rows if brought - self.columns.keys() else ()):
            self._refuse_others(f"candidates.{i}.", row)
        found = {}
        for name, kind in self.reader.types.items():
            if name in (self.reader.user, self.reader.time):
                role = "user" if name == self.reader.user else "time"
                value = request.user if role == "user" else self._time(request)
                if value is None:
                    raise RequestError(role, f"A request needs a {role}. Found None.")
                one = series(name, [value], kind, here(role), self.rows[name].kind)
                found[name] = one.new_from_index(0, len(rows))
            elif not any(name in row for row in rows):
                if name not in context:
                    raise RequestError(
                        f"candidates.0.{name}", f"Column `{name}` is missing, of all candidates and the context."
                    )
                one = series(name, [context[name]], kind, here(f"context.{name}"))
                found[name] = one.new_from_index(0, len(rows))
            else:
                found[name] = series(name, self._values(name, rows, context), kind, each("candidates.", f".{name}"))
        return found

    def _score(self, request: Request, found: pl.DataFrame) -> np.ndarray:
        """(N,) what the request sorts by."""
        tasks = {
            t.name: f"{t.name}_explore" if f"{t.name}_explore" in found.columns else t.name for t in self.schema.tasks
        }
        score = request.score or next(t.name for t in self.schema.tasks if t.role == "target")
        chosen = pl.DataFrame([found[column].alias(name) for name, column in tasks.items()])
        expr = formula(score, tuple(chosen.schema.items()))
        value = (
            chosen[score] if expr is None else chosen.with_columns(expr.alias("/score"))["/score"]
        )  # no task has a slash
        values = value.to_numpy()  # a null becomes NaN
        if not np.isfinite(values).all():
            raise RequestError("score", f"The score `{score}` is not a finite number for every candidate.")
        return values

    def _refuse_others(self, place: str, row: Mapping[str, Any]) -> None:
        for name in row:
            if name not in self.columns:
                known = ", ".join(self.columns)
                raise RequestError(
                    f"{place}{name}", f"Column `{name}` is not read. Columns of candidates and context: {known}."
                )

    @staticmethod
    def _values(name: str, rows: Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> list[Any]:
        try:
            return [row[name] if name in row else context[name] for row in rows]
        except KeyError:
            i = next(i for i, row in enumerate(rows) if name not in row)
            raise RequestError(
                f"candidates.{i}.{name}", f"Column `{name}` is missing, here and in the context."
            ) from None

    def _time(self, request: Request) -> Any:
        """In the unit of ``data.time``; None where that is not a number that the clock gives."""
        if request.time is None and self.rows[self.reader.time].kind == "int":
            return int(time.time() * self.reader.per_second)
        return request.time

    @contextmanager
    def encoded(self, columns: Mapping[str, pl.Series], field: str) -> Iterator[Encoded]:
        """Raw columns as the run's rows are encoded, without events.  Raises RequestError, about ``field``."""
        with ExitStack() as stack:
            try:
                encoded = stack.enter_context(self.reader.encoded(columns, self._attach))
            except src.DataError as error:
                raise RequestError(field, str(error)) from error
            yield encoded

    def pasts(self, users: Sequence[int]) -> tuple[list[Past], str]:
        """Events of distinct users; where the store cannot be read none, and why.  The run has histories."""
        assert self.histories is not None
        try:
            return self.histories.of(users), ""
        except StoreError as error:
            return self.histories.of([0] * len(users)), f"{error}"

    def predictions(self, batches: Sequence[Batch], explore: Exploration | None = None) -> pl.DataFrame:
        """One column per task, and those of exploration.  Raises RequestError where the bundle cannot explore."""
        unsure, calibrators = self.bundle.uncertainty, self.bundle.calibrators
        if explore is not None and unsure is None:
            raise RequestError("explore", "The bundle holds no uncertainty: `unbraid uncertainty` makes it.")
        own = scores_of(self.model, batches, self.schema, hidden=explore is not None, device=self.device)
        scores = own if calibrators is None else calibrators.apply(own)
        if explore is None or unsure is None:
            return as_frame(scores, self.schema)
        try:
            unsure.check(self.bundle.model)
            return explained(scores, unsure.beliefs(own), self.schema, explore, calibrators)
        except UncertaintyError as error:
            raise RequestError("explore", str(error)) from error

    def ordered(self, request: Request, found: pl.DataFrame, events: int, degraded: str, watch: Watch) -> Ranked:
        """The answer to a request whose candidates have these predictions.  Raises RequestError for a score that is none."""
        value = self._score(request, found)
        order = np.argsort(-value, kind="stable")[: request.top or None]
        shown = {name: found[name].to_numpy()[order] for name in found.columns}
        watch("score")
        return Ranked(order, value[order], shown, events, degraded, dict(watch.seconds))

    def _shared(self, encoded: Encoded, past: Past | None) -> tuple[dict[str, Shared], int]:
        """Histories that all rows share, and how many events of the user there are before their time."""
        if self.histories is None or past is None:
            return {}, 0
        cut = self.histories.cut([past], np.zeros(1, np.int64), encoded.columns["time"][:1])
        lists = {}
        for history in self.schema.histories:
            values, _ = gather(cut, history.name, history.fields, np.zeros(1, np.int64), self.reader.per_second)
            memo = past.memo(history.name, int(cut[f"start.{history.name}"][0]), int(cut[f"end.{history.name}"][0]))
            lists[history.name] = Shared({n: torch.from_numpy(v) for n, v in values.items()}, encoded.rows, memo)
        return lists, int(np.searchsorted(past.events["time"], encoded.columns["time"][0]))

    # ------------------------------------------------------------------------------------------------------- many users
    def predict(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Predictions of rows of any users and times, as `unbraid.predictor.Predictor.predict` gives them.

        Args:
            rows: raw columns, of which those of ``rows`` are read; histories are what the store holds from before each time.

        Raises:
            RequestError: a column is missing or of another type; StoreError: histories cannot be read.
        """
        if not len(rows):
            raise RequestError("rows", "There should be at least one row. Found none.")
        with self.encoded(self._read(rows), "rows") as encoded:
            if self.histories is not None:
                users, whose = np.unique(encoded.columns["user"].view(np.uint64), return_inverse=True)
                pasts = self.histories.of(users.tolist())
                encoded.columns |= self.histories.cut(pasts, whose.reshape(-1), encoded.columns["time"])
            return self.predictions([encoded.batch(part) for part in parts(encoded)])

    def _read(self, rows: pl.DataFrame) -> dict[str, pl.Series]:
        """The columns that are read, of the run's types."""
        found = {}
        for name, kind in self.reader.types.items():
            if name not in rows.columns:
                raise RequestError(name, f"Column `{name}` is missing. Rows have {', '.join(self.rows)}.")
            column, wanted = rows[name], self.rows[name].kind
            if column.dtype not in (kind, pl.Null) and kind_of(column.dtype) not in (wanted, *_FROM.get(wanted, ())):
                raise RequestError(name, f"Column `{name}` should be {kind}. Found {column.dtype}.")
            try:
                found[name] = as_type(column, kind)
            except UNREADABLE as error:
                raise RequestError(name, f"Column `{name}` should be {kind}: {error}") from error
            if name == self.reader.time and column.null_count():
                raise RequestError(f"rows.{column.is_null().arg_max()}.{name}", "A row needs a time. Found null.")
        return found

    # ----------------------------------------------------------------------------------------------------------- events
    def user_hash(self, user: Any) -> int:
        """The number by which stores know a user.  Raises RequestError for an id of another type."""
        name = self.reader.user
        if self.reader.users is None:
            raise RequestError("user", "The run has no users.")
        kind = self.reader.have[name]
        if user is None:
            raise RequestError("user", "A user's id should not be null.")
        frame = pl.DataFrame([series(name, [user], kind, here("user"))])
        ids = frame.select(src.users_of_events(self.data, frame.schema, self.reader.users, "The user").alias("user"))
        return int(vocabulary.stable_hash(ids["user"])[0])

    def record(self, table: str, row: Mapping[str, Any]) -> tuple[int, Record]:
        """A raw event as `unbraid.serve.store.Store.append` takes it, with an id that is empty.  Raises RequestError."""
        return self._table(table).records([row])[0]

    def records(self, table: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, Record]]:
        """As `record`, of many events at once, which takes much less time.  Fields of errors begin with ``events.I.``."""
        return self._table(table).records(rows, "events.")

    def _table(self, name: str) -> Table:
        if name not in self.tables:
            raise RequestError("table", f"`table` should be one of {', '.join(self.tables)}. Found {name!r}.")
        return self.tables[name]

    def cache_stats(self) -> dict[str, int]:
        """``hits``, ``misses``, ``users`` and ``bytes`` of what is known of users."""
        return self.histories.stats() if self.histories else {}


_FROM = {"float": ("int",), "int": ("bool",)}  # kinds of columns that become another as they are


@lru_cache(maxsize=256)
def formula(score: str, tasks: tuple[tuple[str, Any], ...]) -> pl.Expr | None:
    """A score over predictions; None: it is one of them.

    Args:
        tasks: (name, type) of each.

    Raises:
        RequestError: it is no arithmetic over tasks.
    """
    have = dict(tasks)
    try:
        if len(score) > LONGEST:
            raise src.DataError(f"A score should have at most {LONGEST:,} characters. Found {len(score):,}.")
        expr = pl.col(score) if score in have else src.expression(score, have, "The score")
        kind = pl.DataFrame(schema=have).select(expr.alias("/score")).schema["/score"]
        if not kind.is_numeric():
            raise src.DataError(f"A score should be a number. Found {kind} of `{score}`.")
    except (src.DataError, pl.exceptions.PolarsError) as error:
        raise RequestError("score", str(error)) from error
    return None if score in have else expr.cast(pl.Float64)


def parts(encoded: Encoded) -> Iterator[np.ndarray]:
    """Rows of one pass through the model."""
    rows = np.arange(encoded.rows)
    return (rows[at : at + encoded.most] for at in range(0, len(rows), encoded.most))


def _for(rows: np.ndarray, lists: Mapping[str, Shared]) -> dict[str, Shared]:
    """The same lists, of some rows."""
    return {name: Shared(one.values, len(rows), one.memo) for name, one in lists.items()}


class Watch:
    """How long stages take: called at the end of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self.last = now - self.last, now
