"""A service without a model: a ranker whose answers are plain arithmetic, so that what is tested is the service."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from unbraid.serve.shape import Shape
from unbraid.serve.store import Page, Record

NOW = 1_700_000_000_000  # of examples, in milliseconds


class Column(NamedTuple):
    kind: str
    required: bool
    example: Any


class Refused(ValueError):
    """As `unbraid.serve.ranker.RequestError`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Found(NamedTuple):
    """As `unbraid.serve.ranker.Ranked`."""

    order: np.ndarray
    score: np.ndarray
    predictions: Mapping[str, np.ndarray]
    events: int
    degraded: str
    seconds: Mapping[str, float]


class MemoryStore:
    """Enough of a store; `fault` is raised by whatever is asked."""

    def __init__(self) -> None:
        self.held: dict[int, dict[str, Record]] = {}
        self.lock, self.fault, self.closed = threading.Lock(), None, False
        self.wait = 0.0

    def _asked(self) -> None:
        time.sleep(self.wait)
        if self.fault is not None:
            raise self.fault

    def append(self, events: Sequence[tuple[int, Record]]) -> list[bool]:
        self._asked()
        new = []
        with self.lock:
            for user, record in events:
                known = self.held.setdefault(user, {})
                new.append(record.id not in known)
                known.setdefault(record.id, record)
        return new

    def read(self, user: int, generation: int = 0, after: int = 0) -> Page:
        self._asked()
        return Page(1, 1, sorted(self.held.get(user, {}).values(), key=lambda r: r.time), True)

    def delete(self, user: int) -> int:
        self._asked()
        return len(self.held.pop(user, {}))

    def ready(self) -> None:
        self._asked()

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeRanker:
    """Prediction of a row: ``(item % 97 + events of the user) / 1000 + shift``."""

    store: Any
    shift: float = 0.0
    wait: float = 0.0
    fault: Exception | None = None

    def __post_init__(self) -> None:
        self.passes: list[int] = []  # rows of each call of predict
        self.joined: list[int] = []  # requests of each call of rank_together

    def user_hash(self, user: Any) -> int:  # the real one imports torch, which takes seconds
        return int(user) % 2**64

    def _value(self, item: int | None, events: int) -> float:
        return ((item or 0) % 97 + events) / 1000 + self.shift

    def rank(self, request: Any) -> Found:
        from unbraid.serve.store import StoreError

        time.sleep(self.wait)
        if self.fault is not None:
            raise self.fault
        try:
            events, degraded = len(self.store.read(self.user_hash(request.user)).records), ""
        except StoreError as error:
            events, degraded = 0, str(error)
        rows = [{**request.context, **row} for row in request.candidates]
        for i, row in enumerate(rows):
            if "item" not in row:
                raise Refused(f"candidates.{i}.item", "Column `item` is missing.")
        values = np.array([self._value(row["item"], events) for row in rows])
        order = np.argsort(-values, kind="stable")[: request.top or None]
        return Found(order, values[order], {"click": values[order]}, events, degraded, {"model": 0.001})

    def rank_together(self, requests: Sequence[Any]) -> list[Any]:
        self.joined.append(len(requests))
        found: list[Any] = []
        for request in requests:
            try:
                found.append(self.rank(request))
            except ValueError as error:
                found.append(error)
        return found

    def predict(self, frame: pl.DataFrame) -> pl.DataFrame:
        time.sleep(self.wait)
        self.passes.append(len(frame))
        if self.fault is not None:
            raise self.fault
        for i, item in enumerate(frame["item"]):
            if item == 666:
                raise Refused(f"rows.{i}.item", "No such item.")
        events = [len(self.store.read(self.user_hash(user)).records) for user in frame["user"].fill_null(0)]
        return pl.DataFrame({"click": [self._value(i, n) for i, n in zip(frame["item"], events, strict=True)]})

    def records(self, table: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, Record]]:
        for i, row in enumerate(rows):
            for name in ("user", "time"):
                if row[name] is None:
                    raise Refused(f"events.{i}.{name}", f"The {name} is missing.")
        return [(self.user_hash(row["user"]), Record("", row["time"], table, {"item": row["item"]})) for row in rows]


COLUMNS = {
    "item": Column("int", True, 7),
    "price": Column("float", False, 9.5),
    "tags": Column("list[str]", False, ["a", "b"]),
}
WHO = {"user": Column("int", True, 42), "time": Column("int", True, NOW)}
SHAPE = Shape(
    name="shop", tasks={"click": "binary"}, user=Column("int", True, 42), time="ms", columns=COLUMNS, rows={**WHO, **COLUMNS},
    sources={"views": {**WHO, "item": COLUMNS["item"]}},
)  # fmt: skip


def bundle(folder: Path, shift: float = 0.0) -> Path:
    """A folder that looks like a bundle; its ranker adds the shift."""
    (folder / "vocabularies").mkdir(parents=True, exist_ok=True)
    (folder / "schema.json").write_text("{}")
    (folder / "run.toml").write_text(f"{shift}")
    (folder / "weights.safetensors").write_text(f"{shift}")
    return folder


def loading(store: Any, shapes: Mapping[str, Shape] | None = None, **options: Any) -> Any:
    """A loader of such folders; shapes: name of a folder -> its shape."""

    def load(folder: Path) -> tuple[FakeRanker, Shape]:
        return FakeRanker(store, float((folder / "run.toml").read_text()), **options), (shapes or {}).get(
            folder.name, SHAPE
        )

    return load


def rank(*items: int, user: int = 42, **more: Any) -> dict[str, Any]:
    return {"user": user, "candidates": [{"item": item} for item in items], **more}


def rows(*items: int, user: int = 42) -> dict[str, Any]:
    return {"rows": [{"user": user, "time": NOW, "item": item} for item in items]}


def events(*ids: str, user: int = 42, time: int = NOW, item: int = 7) -> dict[str, Any]:
    return {"table": "views", "events": [{"id": i, "user": user, "time": time, "item": item} for i in ids]}
