"""The history store in files of this machine: LMDB, a memory-mapped B-tree (https://www.symas.com/mdb).

Reads are pointer walks in pages that the system caches.  Writes are copy-on-write and end with a flush to disk and the swap
of one page, so that a crash leaves the old state or the new one.  Several processes may open one folder; one writes at a
time.

Five trees, all integers big-endian, so that the order of bytes is that of numbers:

    events    user, time + 2^63, arrival -> payload     the last n are a walk backwards
    arrivals  user, arrival -> time + 2^63              what came after an arrival, although its time may be early
    ids       user, digest of the id -> nothing         an id that is there is no news
    users     user -> generation, newest arrival, count
    settings  name -> text; the newest generation given

Generations are microseconds since 1970, or one more than the last: a folder put back from a backup never repeats one.

What the library leaves to its callers is done in `unbraid.serve.lmdb_env`, and its files are checked in
`unbraid.serve.lmdb_files`.
"""

from __future__ import annotations

import json
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.serve.lmdb_env import MAP, Environment, release, share
from unbraid.serve.lmdb_files import RESTORE, data_of, identity
from unbraid.serve.store import (
    BIAS,
    FORMAT_KEY,
    Contents,
    Page,
    Record,
    StoreCorrupt,
    StoreDown,
    StoreError,
    check_count,
    check_user,
    encoded,
    time_key,
)

if TYPE_CHECKING:
    from unbraid.serve.lmdb_env import Transaction

_USER, _KEY, _META = struct.Struct(">Q"), struct.Struct(">QQQ"), struct.Struct(">QQQ")
USERS = ("events", "arrivals", "ids", "users")  # trees whose keys begin with a user
_EPOCH = b"\0epoch"  # no setting of a caller's


class LmdbStore:
    """A history store in a folder.

    Args:
        folder: made if it is not there.
        fsync: flush every commit to disk.  Without, a crash of the machine (not of a process) may lose or damage the store.
        map_bytes: of the map to begin with.

    Raises:
        StoreCorrupt: the folder holds something else, another version or a damaged store; StoreFull: there is no room;
        StoreError: it cannot be opened; ImportError: LMDB is missing.
    """

    def __init__(self, folder: str | Path, *, fsync: bool = True, map_bytes: int = MAP) -> None:
        self.folder = Path(folder)
        self._environment: Environment | None = share(self.folder, Writer, fsync, map_bytes)

    @property
    def _env(self) -> Environment:
        if self._environment is None:
            raise StoreError(f"The store {self.folder} is closed. Open it again.")
        return self._environment

    @property
    def durability(self) -> str:
        """What survives a crash, in words."""
        return "every event whose append returned" if self._env.fsync else "a crash of the machine may damage the store"

    def append(self, events: Sequence[tuple[int, Record]]) -> list[bool]:
        """See `Store`."""
        checked = [encoded(user, record) for user, record in events]
        if not checked:
            return []

        def work(write: Writer) -> list[bool]:
            new = []
            for user, digest, time_, payload in checked:
                key = _USER.pack(user)
                new.append(write.put("ids", key + digest, b"", overwrite=False))
                if new[-1]:
                    arrival = _USER.pack(write.arrive(user))
                    write.put("events", key + time_ + arrival, payload)
                    write.put("arrivals", key + arrival, time_)
            return new

        return self._env.write(work)

    def read(self, user: int, generation: int = 0, after: int = 0) -> Page:
        """See `Store`."""
        key, after = _USER.pack(check_user(user)), check_count("after", after)
        with self._env.reading() as (txn, trees):
            held = txn.get(key, db=trees["users"])
            if held is None:
                return Page(0, 0, [], True)
            now, seq, _ = _META.unpack(held)
            if now == generation and 0 < after <= seq:
                found = _walk(txn, trees["arrivals"], key, _USER.pack(after + 1)) if after < seq else ()
                keys = sorted(key + time_ + arrival[8:] for arrival, time_ in found)
                pairs = [(k, txn.get(k, db=trees["events"])) for k in keys]
            else:
                after, pairs = 0, list(_walk(txn, trees["events"], key))
        return Page(now, seq, self._records(pairs), not after)

    def last(self, user: int, n: int, before: int | None = None) -> list[Record]:
        """See `Store`."""
        key, n = _USER.pack(check_user(user)), check_count("n", n)
        end = key + (
            b"\xff" * 17 if before is None else time_key(before)
        )  # longer than any key: behind all of the user
        with self._env.reading() as (txn, trees):
            cursor = txn.cursor(db=trees["events"])
            there = cursor.prev() if cursor.set_range(end) else cursor.last()
            mine = takewhile(lambda pair: pair[0][:8] == key, cursor.iterprev()) if there else ()
            pairs = list(islice(mine, n))
        return self._records(pairs[::-1])

    def trim(self, user: int, keep: int) -> int:
        """See `Store`."""
        key, keep = _USER.pack(check_user(user)), check_count("keep", keep)

        def work(write: Writer) -> int:
            held = write.meta(user)
            if held is None or (extra := held[2] - keep) <= 0:
                return 0
            for event in write.clear("events", key, extra):
                write.remove("arrivals", key + event[16:])
            write.metas[user] = [write.new_epoch(), held[1], keep]
            return extra

        return self._env.write(work)

    def delete(self, user: int) -> int:
        """See `Store`."""
        key = _USER.pack(check_user(user))

        def work(write: Writer) -> int:
            held = write.meta(user)
            if held is None:
                return 0
            for name in USERS:
                deque(write.clear(name, key), 0)
            write.metas[user] = None
            write.new_epoch()  # whoever comes back starts with a generation of their own
            return held[2]

        return self._env.write(work)

    def users(self) -> Iterator[int]:
        """See `Store`.  A chunk at a time: an open transaction would keep old pages alive."""
        start: int | None = 0
        while start is not None:
            with self._env.reading() as (txn, trees):
                cursor = txn.cursor(db=trees["users"])
                found = islice(cursor.iternext(values=False), 1000) if cursor.set_range(_USER.pack(start)) else ()
                users = [_USER.unpack(key)[0] for key in found]
            yield from users
            start = users[-1] + 1 if users and users[-1] < 2 * BIAS - 1 else None

    def contents(self) -> Iterator[Contents]:
        """See `Store`."""
        start = 0
        try:
            while start < 2 * BIAS:
                with self._env.reading() as (txn, trees):  # each user at one moment
                    users = [u for name in USERS if (u := _user(txn, trees[name], start)) is not None]
                    found = [_contents(txn, trees, min(users))] if users else []
                yield from found
                start = min(users) + 1 if users else 2 * BIAS
        except struct.error as error:
            raise StoreCorrupt(f"{self.folder}: a key after user {start} is damaged ({error}). {RESTORE}") from error

    def get(self, name: str) -> str | None:
        """See `Store`."""
        with self._env.reading() as (txn, trees):
            found = txn.get(_setting(name), db=trees["settings"])
        return None if found is None else found.decode()

    def set(self, name: str, text: str) -> None:
        """See `Store`."""
        self._env.write(lambda write: write.put("settings", _setting(name), text.encode()))

    def stats(self) -> Mapping[str, int]:
        """See `Store`."""
        with self._env.reading() as (txn, trees):
            users, events = (txn.stat(trees[name])["entries"] for name in ("users", "events"))
        return {"users": users, "events": events, "bytes": data_of(self.folder).stat().st_size}

    def ready(self) -> None:
        """See `Store`."""
        if identity(self.folder) != self._env.identity:
            raise StoreDown(f"The files in {self.folder} were removed or replaced. Open the store again.")
        self.get(FORMAT_KEY)

    def close(self) -> None:
        """See `Store`."""
        if self._environment is not None:
            release(self._environment)
            self._environment = None

    def _records(self, pairs: Sequence[tuple[bytes, bytes | None]]) -> list[Record]:
        """Records of events' keys and payloads, read as one list of JSON."""
        try:
            read = json.loads(b"[" + b",".join([payload for _, payload in pairs]) + b"]")  # type: ignore[misc]
            keys = _KEY.iter_unpack(b"".join([key for key, _ in pairs]))
            return [Record(i, time_ - BIAS, t, v) for (_, time_, _), (i, t, v) in zip(keys, read, strict=True)]
        except (ValueError, TypeError, struct.error) as error:
            raise StoreCorrupt(f"An event in {self.folder} is damaged ({error}). {RESTORE}") from error


def _setting(name: str) -> bytes:
    if not 0 < len(name.encode()) <= 480:  # LMDB's keys end at 511
        raise ValueError(f"A setting's name should be text of 1 to 480 bytes. Found {name!r}.")
    return name.encode()


def _user(txn: Transaction, tree: Any, start: int) -> int | None:
    """The first user of a tree from ``start`` on."""
    cursor = txn.cursor(db=tree)
    return int(_USER.unpack_from(cursor.key())[0]) if cursor.set_range(_USER.pack(start)) else None


def _contents(txn: Transaction, trees: Mapping[str, Any], user: int) -> Contents:
    key = _USER.pack(user)
    held = txn.get(key, db=trees["users"])
    _, newest, count = (0, 0, 0) if held is None else _META.unpack(held)
    keyed = [(*_KEY.unpack(k)[1:], payload) for k, payload in _walk(txn, trees["events"], key)]
    arrived = [_KEY.unpack(k + time_) for k, time_ in _walk(txn, trees["arrivals"], key)]
    return Contents(
        user, held is not None, count, newest, events=[(t - BIAS, n, payload) for t, n, payload in keyed],
        index={n: t - BIAS for _, n, t in arrived}, ids={k[8:] for k, _ in _walk(txn, trees["ids"], key)},
    )  # fmt: skip


def _walk(txn: Transaction, tree: Any, key: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Entries of a user in order, from ``key + start`` on."""
    cursor = txn.cursor(db=tree)
    return takewhile(lambda pair: pair[0][:8] == key, cursor) if cursor.set_range(key + start) else iter(())


# -------------------------------------------------------------------------------------------------------------- writing
class Writer:
    """One write transaction, and what is known of its users until it ends."""

    def __init__(self, txn: Transaction, trees: Mapping[str, Any]) -> None:
        self.txn, self.trees = txn, trees
        self.metas: dict[int, list[int] | None] = {}  # generation, newest arrival, count

    def put(self, tree: str, key: bytes, value: bytes, overwrite: bool = True) -> bool:
        """Set a key's value; False: it was there, and ``overwrite`` is off."""
        return self.txn.put(key, value, overwrite=overwrite, db=self.trees[tree])

    def remove(self, tree: str, key: bytes) -> None:
        """Remove a key, if it is there."""
        self.txn.delete(key, db=self.trees[tree])

    def clear(self, tree: str, key: bytes, most: int = 2 * BIAS) -> Iterator[bytes]:
        """Remove a user's first entries, at most so many; yields their keys."""
        cursor = self.txn.cursor(db=self.trees[tree])
        there = cursor.set_range(key)
        while there and most and (found := cursor.key())[:8] == key:
            there, most = cursor.delete() and cursor.key() != b"", most - 1
            yield found

    def meta(self, user: int) -> list[int] | None:
        """Generation, newest arrival and number of a user's events, as this transaction sees them; None: no such user."""
        if user not in self.metas:
            held = self.txn.get(_USER.pack(user), db=self.trees["users"])
            self.metas[user] = None if held is None else list(_META.unpack(held))
        return self.metas[user]

    def arrive(self, user: int) -> int:
        """The number of a user's new arrival."""
        meta = self.meta(user)
        if meta is None:
            meta = self.metas[user] = [self.epoch(), 0, 0]
        meta[1] += 1
        meta[2] += 1
        return meta[1]

    def epoch(self) -> int:
        """The newest generation given."""
        return int(self.txn.get(_EPOCH, b"0", db=self.trees["settings"])) or self.new_epoch()

    def new_epoch(self) -> int:
        """A generation that was never given."""
        held = int(self.txn.get(_EPOCH, b"0", db=self.trees["settings"]))
        epoch = max(held + 1, time.time_ns() // 1000)
        self.put("settings", _EPOCH, str(epoch).encode())
        return epoch

    def finish(self) -> None:
        """Write what was learned of the users."""
        for user, meta in self.metas.items():
            if meta is not None:
                self.put("users", _USER.pack(user), _META.pack(*meta))
