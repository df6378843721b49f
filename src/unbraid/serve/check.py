"""A whole store looked at: are its pages, its records and its counters what they should be?

Two steps.  The pages of LMDB's file are walked as bytes, before LMDB itself follows any of their pointers: a damaged one could
end the process.  Then every user's events, the index that finds them, the known ids and the counters are compared with each
other, of LMDB and Redis alike, each user at one moment, so that a store in use may be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from unbraid.serve.store import Contents, Store, StoreCorrupt, digest_of, folder_of, open_store

MOST = 100  # problems that are told; a damaged page can make thousands


@dataclass
class Found:
    """What a look at a store found.

    Args:
        users, events: that were looked at.
        problems: what is wrong, at most `MOST`; more: how many others.
    """

    users: int = 0
    events: int = 0
    problems: list[str] = field(default_factory=list)
    more: int = 0

    def add(self, problems: Iterator[str]) -> None:
        """Keep the first of them."""
        for problem in problems:
            if len(self.problems) < MOST:
                self.problems.append(problem)
            else:
                self.more += 1


def check(address: str | Path) -> Found:
    """Look at the whole of a store.

    Args:
        address: as `unbraid.serve.store.open_store` reads it.  A folder may be open in other processes, not in this one.

    Raises:
        StoreError: it cannot be looked at; StoreCorrupt is among what is found instead.
    """
    found = Found()
    folder = folder_of(address)
    try:
        if folder is not None:
            from unbraid.serve.lmdb_env import pages

            found.add(iter(pages(folder)))
        if not found.problems:  # else LMDB may not come back
            with closing(open_store(address)) as store:
                _look(store, found)
    except StoreCorrupt as error:
        found.add(iter([str(error)]))
    return found


def _look(store: Store, found: Found) -> None:
    before = store.stats()
    for user in store.contents():
        found.users += 1
        found.events += len(user.events)
        found.add(wrong(user))
    after = store.stats()
    for name in ("users", "events"):  # of a store in use these may change meanwhile
        if before[name] == after[name] != (counted := getattr(found, name)):
            found.add(iter([f"the store counts {after[name]:,} {name}; there are {counted:,}"]))


def wrong(user: Contents) -> Iterator[str]:
    """What is wrong with a user."""
    who = f"user {user.user}"
    if not user.listed:
        yield f"{who}: has {len(user.events):,} events and {len(user.ids):,} ids, and is not among the users"
    if user.count is not None and user.listed and user.count != len(user.events):
        yield f"{who}: the store counts {user.count:,} events; there are {len(user.events):,}"
    times = {arrival: time for time, arrival, _ in user.events}
    if len(times) != len(user.events):
        yield f"{who}: {len(user.events) - len(times):,} events share an arrival with another"
    if user.listed and max(times, default=0) > user.newest:
        yield f"{who}: arrival {max(times)} is later than the newest, {user.newest}"
    for arrival in sorted(times.keys() | user.index.keys()):
        if times.get(arrival) != user.index.get(arrival):
            yield f"{who}: arrival {arrival} has time {times.get(arrival)}, and {user.index.get(arrival)} in the index"
    for _, arrival, payload in user.events:
        if said := _unreadable(payload, user.ids):
            yield f"{who}: the event of arrival {arrival} {said}"


def _unreadable(payload: bytes | None, ids: set[bytes]) -> str:
    """Why an event is none; empty: it is one."""
    try:
        read = json.loads(payload or b"")
    except ValueError as error:
        return f"is no JSON ({error})"
    if not isinstance(read, list) or [type(part) for part in read] != [str, str, dict]:
        return "is no list of id, table and values"
    return "" if digest_of(read[0]) in ids else f"has an id that is not among the known: {read[0]!r}"
