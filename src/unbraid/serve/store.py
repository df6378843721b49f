"""The history store: what users did, kept between requests and restarts.

A store holds events by user and answers three questions: all events of a user, what arrived since a reader last looked, and
the newest n before a time.  Two keep them on disk behind one protocol: `unbraid.serve.lmdb_store` (files of this machine,
the default) and `unbraid.serve.redis_store` (a server that several machines share).

Order is that of the run's own histories: by time, ties by arrival.  An event has an id of its own, and a user's known id is
never appended again, so that a sender may repeat whatever was not acknowledged.
"""

from __future__ import annotations

import hashlib
import json
import operator
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

FORMAT = "1"  # raise it when keys or values change their meaning
FORMAT_KEY, USER_TYPE = "format", "user_type"  # settings: of the layout; of user ids (Int64, Float64 or String)
REDIS = ("redis", "rediss", "unix")  # schemes of an address
BIAS = 1 << 63


class StoreError(RuntimeError):
    """The store cannot answer."""


class StoreFull(StoreError):
    """There is no room for a write; nothing of it was kept, and reads go on."""


class StoreDown(StoreError):
    """The store cannot be reached now; the same call may work later."""


class StoreCorrupt(StoreError):
    """What is there is damaged, of another version, or not a store."""


class Record(NamedTuple):
    """One event.

    Args:
        id: the event's own id: a second append of a user's known id is no append, whatever its time.
        time: in the unit of ``data.time``, 64 bits, signed; `unbraid.data.events.NO_TIME` for an event without.
        table: which of the run's ``data.events`` sources it belongs to.
        values: that source's raw columns, values of JSON (and NaN).
    """

    id: str
    time: int
    table: str
    values: Mapping[str, Any]


class Page(NamedTuple):
    """Events of a user as one moment had them.

    Args:
        generation: changes when events of the user were removed; 0: the store does not know the user.
        seq: of the newest arrival, 1 for the first.
        records: by (time, arrival).
        whole: False: ``records`` are only those that arrived after the asked seq.
    """

    generation: int
    seq: int
    records: list[Record]
    whole: bool


@dataclass(frozen=True)
class Contents:
    """All that is kept of a user at one moment, as it is kept, for who looks whether it is whole.

    Args:
        user: the number; listed: is it among the users?
        count: of events, as the store counts them (None: it does not); newest: the number of the newest arrival.
        events: time, arrival and payload (a JSON list of id, table and values; None: it is missing) of each.
        index: arrival -> time, of the second tree or set that finds them; ids: digests of known ids.
    """

    user: int
    listed: bool
    count: int | None
    newest: int
    events: list[tuple[int, int, bytes | None]]
    index: dict[int, int]
    ids: set[bytes]


class Store(Protocol):
    """Events by user.  All methods may be called from several threads at once, and raise `StoreError`."""

    def append(self, events: Sequence[tuple[int, Record]]) -> list[bool]:
        """Keep events, all or none; they are durable when it returns.

        Args:
            events: user (the unsigned 64-bit hash of `user_hash`) and record.

        Returns:
            Which were new.

        Raises:
            ValueError: a user, id, time or value is not what it should be.
        """
        ...

    def read(self, user: int, generation: int = 0, after: int = 0) -> Page:
        """All events of a user, or what arrived after ``after`` if ``generation`` is still that of the user."""
        ...

    def last(self, user: int, n: int, before: int | None = None) -> list[Record]:
        """The newest ``n`` events strictly before a time (None: of all), oldest first."""
        ...

    def trim(self, user: int, keep: int) -> int:
        """Remove all but a user's newest ``keep`` events; how many went.  Their ids stay known."""
        ...

    def delete(self, user: int) -> int:
        """Remove everything of a user, ids too; how many events went."""
        ...

    def users(self) -> Iterator[int]:
        """Users with events or known ids, ascending."""
        ...

    def contents(self) -> Iterator[Contents]:
        """All users of whom anything is kept, listed or not.  Raises StoreCorrupt where it cannot even be taken apart."""
        ...

    def get(self, name: str) -> str | None:
        """A setting of the store."""
        ...

    def set(self, name: str, text: str) -> None:
        """Keep a setting."""
        ...

    def stats(self) -> Mapping[str, int]:
        """``users``, ``events``, and ``bytes`` (LMDB: of the file; Redis: all memory of the server)."""
        ...

    def ready(self) -> None:
        """Raises StoreError when the store cannot answer."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...

    @property
    def durability(self) -> str:
        """What survives a crash, in words."""
        ...


def open_store(address: str | Path) -> Store:
    """The store of an address: a folder (or ``lmdb:FOLDER``), or ``redis://``, ``rediss://``, ``unix://`` as redis-py reads them.

    Raises:
        StoreError: it cannot be opened: `StoreCorrupt`, `StoreDown`, `StoreFull`; ImportError: its library is missing;
        ValueError: there is no such kind of address.
    """
    folder = folder_of(address)
    if folder is None:
        from unbraid.serve.redis_store import RedisStore

        return RedisStore(str(address))
    from unbraid.serve.lmdb_store import LmdbStore

    return LmdbStore(folder)


def folder_of(address: str | Path) -> Path | None:
    """The folder that an address means; None: it is one of Redis.  Raises ValueError: there is no such kind of address."""
    text = str(address)
    scheme, colon, rest = text.partition(":")
    if scheme in REDIS and rest.startswith("//"):
        return None
    if "://" in text or not text or (colon and scheme in REDIS):  # `redis:host` is no folder, but a slip
        kinds = "a folder, lmdb:FOLDER, redis://HOST:PORT/N, rediss://... or unix://..."
        raise ValueError(f"A store's address should be {kinds}. Found {scheme + ':...' if colon else text!r}.")
    return Path(text.removeprefix("lmdb:"))


def public(url: str) -> str:
    """An address to be shown: without name, password and options; of a URL that cannot be told apart, its scheme alone."""
    if "://" not in url:
        return url
    hidden = f"{url.partition(':')[0]}://..."
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port is not None else ""
    except ValueError:  # part of a password that was read as a port
        return hidden
    if "@" in parts.path + parts.query + parts.fragment or not (parts.hostname or parts.scheme == "unix"):
        return hidden  # an unwritten `@`, `/`, `?` or `#` in a password: what was read as a host may be part of it
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{parts.path}"


def user_hash(user: object, kind: str) -> int:
    """The user number of a raw id, as the run's encoded rows have it.

    Args:
        user: the id; text is read as ``kind`` says.
        kind: the canonical type of the run's user ids: Int64, Float64 or String.

    Raises:
        ValueError: the id is not of that type.
    """
    import polars as pl

    from unbraid.data.vocabulary import stable_hash

    read = {"Int64": int, "Float64": float, "String": str}[kind]
    try:
        if isinstance(user, float) and kind == "Int64" and user != int(user):
            raise ValueError("it has a fraction")
        return int(stable_hash(pl.Series([read(user)], dtype=getattr(pl, kind)))[0])  # type: ignore[operator]
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"User ids of this store are {kind}. Found {user!r}.") from error


# ------------------------------------------------------------------------------------------------- what both stores write
class Encoded(NamedTuple):
    """A checked event as bytes: 16 of the id's digest, 8 of the time in order, and a JSON list of id, table and values."""

    user: int
    digest: bytes
    time: bytes
    payload: bytes


_to_json = json.JSONEncoder(separators=(",", ":")).encode  # ASCII: lone surrogates survive


def encoded(user: int, record: Record) -> Encoded:
    """Raises ValueError, naming the event, for what no store can keep."""
    where = f"Event {record.id!r}"
    if not isinstance(record.id, str) or not record.id:
        raise ValueError(f"An event's id should be text that is not empty. Found {record.id!r}.")
    if not isinstance(record.table, str):
        raise ValueError(f"{where}: `table` should be text. Found {record.table!r}.")
    if not isinstance(record.values, Mapping) or not all(isinstance(name, str) for name in record.values):
        raise ValueError(f"{where}: `values` should map names of columns to values. Found {record.values!r}.")
    try:
        payload = _to_json([record.id, record.table, dict(record.values)]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        kinds = {name: type(value).__name__ for name, value in record.values.items()}
        raise ValueError(f"{where}: values should be those of JSON ({error}). Found {kinds}.") from error
    return Encoded(check_user(user), digest_of(record.id), time_key(record.time, where), payload)


def digest_of(name: str) -> bytes:
    """An id as it is known: ids of any length take 16 bytes, and two of one user never meet in 128 bits."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def check_user(user: int) -> int:
    """The user; raises ValueError when it is not an unsigned 64-bit integer."""
    return _integer("A user (`user_hash`)", user, 0, 2 * BIAS)


def time_key(time: int, where: str = "A time") -> bytes:
    """8 bytes in the order of times; raises ValueError when it is not a signed 64-bit integer."""
    return struct.pack(">Q", _integer(f"{where}: `time`", time, -BIAS, BIAS) + BIAS)


def check_count(name: str, value: int) -> int:
    """The value; raises ValueError when it is not a count."""
    return _integer(f"Parameter `{name}`", value, 0, BIAS)


def _integer(what: str, value: Any, low: int, end: int) -> int:
    """An int of any integer type (NumPy's, too) in [low, end)."""
    try:
        number = operator.index(value)
    except TypeError:
        number = end
    if not low <= number < end or isinstance(value, bool):
        raise ValueError(f"{what} should be an integer of {low} to {end - 1}. Found {value!r}.")
    return number
