"""A store that is left alone for a moment after it did not answer.

Who asks a store that is away waits for its timeout, seconds each time: with a few threads, requests would queue until none is
answered.  So after a `StoreDown` all calls fail at once with the same words; after a second one call tries again,
and when it is answered all are asked again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from unbraid.serve.store import Contents, Page, Record, Store, StoreDown

T = TypeVar("T")


class Patient:
    """See the module; as the store otherwise.

    Args:
        rest: seconds that a store which did not answer is left alone.
    """

    def __init__(self, store: Store, rest: float = 1.0) -> None:
        self.store, self.rest = store, rest
        self._lock = threading.Lock()
        self._away, self._again = "", 0.0  # why it is away, and when somebody may try

    def _asked(self, call: Callable[[], T]) -> T:
        if self._away:
            with self._lock:
                if self._away and time.monotonic() < self._again:
                    raise StoreDown(self._away)
                self._again = float("inf")  # this call tries, all others do not wait for it
        try:
            found = call()
        except StoreDown as error:
            self._away, self._again = str(error) or "The store is away.", time.monotonic() + self.rest
            raise
        except BaseException:  # whatever else it says, it answers
            self._away = ""
            raise
        self._away = ""
        return found

    def append(self, events: Sequence[tuple[int, Record]]) -> list[bool]:
        """See `Store`."""
        return self._asked(lambda: self.store.append(events))

    def read(self, user: int, generation: int = 0, after: int = 0) -> Page:
        """See `Store`."""
        return self._asked(lambda: self.store.read(user, generation, after))

    def last(self, user: int, n: int, before: int | None = None) -> list[Record]:
        """See `Store`."""
        return self._asked(lambda: self.store.last(user, n, before))

    def trim(self, user: int, keep: int) -> int:
        """See `Store`."""
        return self._asked(lambda: self.store.trim(user, keep))

    def delete(self, user: int) -> int:
        """See `Store`."""
        return self._asked(lambda: self.store.delete(user))

    def users(self) -> Iterator[int]:
        """See `Store`."""
        return self.store.users()

    def contents(self) -> Iterator[Contents]:
        """See `Store`."""
        return self.store.contents()

    def get(self, name: str) -> str | None:
        """See `Store`."""
        return self._asked(lambda: self.store.get(name))

    def set(self, name: str, text: str) -> None:
        """See `Store`."""
        self._asked(lambda: self.store.set(name, text))

    def stats(self) -> Mapping[str, int]:
        """See `Store`."""
        return self._asked(self.store.stats)

    def ready(self) -> None:
        """See `Store`."""
        self._asked(self.store.ready)

    def close(self) -> None:
        """See `Store`."""
        self.store.close()

    @property
    def durability(self) -> str:
        """What survives a crash, in words."""
        return self.store.durability
