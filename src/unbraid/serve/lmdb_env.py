"""A file of LMDB in this process: one environment per file, whoever asks, none open across a fork, a map that grows while nobody
reads, and writers that commit together.

A writer puts its work in a queue, and the first in it commits all that waits, with one flush.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from unbraid.serve.lmdb_files import (
    TREES,
    check_format,
    check_length,
    data_of,
    identity,
    lengthen,
    library,
    reserve_readers,
    sync_names,
    translated,
)
from unbraid.serve.store import StoreError

if TYPE_CHECKING:
    import lmdb

    Transaction = lmdb.Transaction[bytes]  # not of memory views
    Begin: TypeAlias = Callable[[Transaction, Mapping[str, Any]], Any]

READERS = 1024  # open read transactions of all processes
MAP = 1 << 28  # bytes to begin with; doubled whenever they do not suffice


class _Job:
    """A caller's work, and what came of it."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work, self.done, self.told = work, False, threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Environment:
    """A file's only LMDB environment in this process: the map, its trees, who reads and who waits for a commit.

    Args:
        begin: (transaction, trees) -> the writer that the works of one commit share; its ``finish()`` is called after them.

    The map is replaced (grown, reopened after a failed flush, closed for a fork) only while nobody reads.  Readers take no
    lock: one enters itself in ``active`` and then looks at ``changing``; who changes the map sets ``changing`` and then looks
    at ``active``, so that one of the two sees the other.  ``committing`` is held by whoever writes or changes the map.
    ``queueing`` guards who waits for a commit and whether one of them leads.
    """

    def __init__(self, folder: Path, begin: Begin, fsync: bool, map_bytes: int) -> None:
        self.folder, self.begin, self.fsync, self.map_bytes = folder, begin, fsync, map_bytes
        self.active: set[object] = set()
        self.changing = self.closed = False
        self.committing = threading.Lock()
        self.queueing, self.waiting, self.led, self.together = threading.Lock(), deque[_Job](), False, 0
        self.env: lmdb.Environment | None = None
        self.trees: dict[str, Any] = {}
        self.identity: tuple[int, int] | None = None
        self.users = 0
        self.forking: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        self._open()

    # ---------------------------------------------------------------------------------------------------------- the map
    def _open(self) -> None:
        """Open the file and its trees; called by the only thread that uses it."""
        lmdb = library()
        with translated(self.folder):
            new = not data_of(self.folder).exists()
            reserve_readers(self.folder, READERS)
            self.env = lmdb.open(
                str(self.folder), map_size=self.map_bytes, max_dbs=len(TREES), max_readers=READERS, sync=self.fsync,
                metasync=self.fsync, readahead=False,
            )  # fmt: skip
            try:
                self.env.reader_check()  # slots of killed readers keep old pages
                self.map_bytes = max(self.map_bytes, self.env.info()["map_size"])
                check_length(self.env, self.folder)
                check_format(self.env, self.folder)
                if new and self.fsync:
                    sync_names(self.folder)
                self.trees = {name: self.env.open_db(name.encode()) for name in TREES}
                self.identity = identity(self.folder)
            except BaseException:
                self._close()
                raise

    def _close(self) -> None:
        if self.env is not None:
            self.env.close()
        self.env, self.trees = None, {}

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody reads in the block.  Its caller holds ``committing``."""
        self.changing = True
        try:
            while self.active:
                time.sleep(1e-4)  # reads are short, and this is rare
            yield
        finally:
            self.changing = False

    def _replace(self, map_bytes: int = 0) -> None:
        """Take a larger map (0: the one that another process made).  Its caller holds ``committing``."""
        env = self._ready()
        with self.exclusive(), translated(self.folder, map_bytes):
            try:
                env.set_mapsize(map_bytes)
                self.map_bytes = env.info()["map_size"]
            except library().Error:
                self._close()  # the old map may be gone
                raise

    def _ready(self) -> lmdb.Environment:
        """The environment, opened again after a fork or a failure.  Its caller holds ``committing``."""
        if self.closed:
            raise StoreError(f"The store {self.folder} is closed. Open it again.")
        if self.env is None:
            with self.exclusive():
                self._open()
        assert self.env is not None
        return self.env

    # -------------------------------------------------------------------------------------------------------- its users
    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[Transaction, Mapping[str, Any]]]:
        """A moment of the store, and its trees."""
        me = object()
        try:
            with translated(self.folder), self._begin(me) as txn:
                yield txn, self.trees
        finally:
            self.active.discard(me)

    def _begin(self, me: object) -> Transaction:
        """A read transaction, with ``me`` among the active."""
        lmdb = library()
        while True:
            self.active.add(me)
            env, grown = self.env, False
            if env is not None and not self.changing:
                try:
                    return env.begin()
                except lmdb.MapResizedError:
                    grown = True
                except lmdb.ReadersFullError:
                    if not env.reader_check():  # slots of killed readers
                        raise
            self.active.discard(me)
            with self.committing:  # whoever changes the map is done then
                self._replace() if grown else self._ready()

    def write(self, work: Callable[[Any], Any]) -> Any:
        """What ``work`` returned once it, and all that waited with it, is on disk.  It may run twice, in two transactions."""
        job = _Job(work)
        with self.queueing:
            self.waiting.append(job)
            leads, self.led = not self.led, True
        try:
            if not leads:
                job.told.wait()  # that it is done, or that it leads now
            if not job.done:
                self._lead(job)
        except BaseException:
            with self.queueing:  # interrupted: whoever waits needs another leader
                if job in self.waiting:
                    self.waiting.remove(job)
                    if leads or job.told.is_set():
                        self._follow()
            raise
        if job.error is not None:  # of the thread that committed for this one, too
            raise (type(job.error) if isinstance(job.error, StoreError) else StoreError)(str(job.error)) from job.error
        return job.result

    def _lead(self, job: _Job) -> None:
        """Commit a job and all that wait behind it, tell them, and hand on."""
        with self.committing:
            if self.together > 1:
                time.sleep(2e-4)  # those of the last commit are about to write again: a flush takes many times as long
            with self.queueing:
                jobs, self.waiting = list(self.waiting), deque()
            self.together = len(jobs)
            try:
                for one, result in zip(jobs, self._commit(jobs), strict=True):
                    one.result = result
            except BaseException as error:
                for one in jobs:
                    one.error = error
                if not isinstance(error, StoreError):
                    raise
            finally:
                for one in jobs:
                    one.done = True
                    one.told.set()
                with self.queueing:
                    self._follow()

    def _follow(self) -> None:
        """The first that waits leads from now on."""
        self.led = bool(self.waiting)
        if self.waiting:
            self.waiting[0].told.set()

    def _commit(self, jobs: Sequence[_Job]) -> list[Any]:
        """Results of all jobs, done in one transaction."""
        lmdb = library()
        again = True
        while True:
            env, need = self._ready(), 0
            try:
                with translated(self.folder), env.begin(write=True) as txn:
                    lengthen(env, self.folder)
                    write = self.begin(txn, self.trees)
                    results = [job.work(write) for job in jobs]
                    write.finish()
                return results
            except lmdb.MapFullError:
                env.reader_check()
                need = 2 * self.map_bytes
            except lmdb.MapResizedError:
                pass
            except lmdb.PanicError as error:  # an earlier flush failed half-way: the file is whole, this handle is not
                if not again:
                    raise StoreError(f"{self.folder} cannot be written: {error}.") from error
                again = False
                with self.exclusive():
                    self._close()
                continue
            self._replace(need)


# ------------------------------------------------------------------------------------------- one environment per process
_registry = threading.Lock()
_shared: list[Environment] = []


def share(folder: Path, begin: Begin, fsync: bool, map_bytes: int) -> Environment:
    """The environment of a folder's file, which one process must not open twice: closing one would drop both's locks."""
    with _registry:
        there = identity(folder)
        found = next((one for one in _shared if there is not None and one.identity == there), None)
        if found is None:
            found = Environment(folder, begin, fsync, map_bytes)
            _shared.append(found)
        elif found.fsync != fsync:
            raise ValueError(f"The store {folder} is open in this process with fsync={found.fsync}. Found {fsync}.")
        found.users += 1
        return found


def pages(folder: Path) -> list[str]:
    """What is wrong with the pages of a folder's file, which is read as bytes while nobody writes.

    Raises:
        StoreCorrupt: it is no file of LMDB; StoreError: it is open in this process, or cannot be opened.
    """
    from lmdb.verify import VerifyError, verify

    with _registry:
        if (there := identity(folder)) is not None and any(one.identity == there for one in _shared):
            raise StoreError(f"{folder} is open in this process. Look at it from another one, or close it.")
        if not data_of(folder).stat().st_size:  # to LMDB that is a new file
            return [f"{data_of(folder).name}: it is empty"]
        with translated(folder), library().open(str(folder), max_readers=READERS, create=False) as env:
            with env.begin(write=True):  # it reads no page but the first two, and nobody else writes meanwhile
                try:
                    return [f"{data_of(folder).name}: {problem}" for problem in verify(str(folder))]
                except VerifyError as error:
                    return [f"{data_of(folder).name}: {error}"]


def release(environment: Environment) -> None:
    """One user less; the last one's leave closes the environment, its file made as long as its pages need."""
    with _registry:
        environment.users -= 1
        if not environment.users:
            _shared.remove(environment)
            with environment.committing, environment.exclusive():
                environment.closed = True
                if environment.env is not None:
                    # a file that is gone needs no length
                    with contextlib.suppress(library().Error, OSError), environment.env.begin(write=True):
                        lengthen(environment.env, environment.folder)
                environment._close()


def _before_fork() -> None:
    """LMDB's environment must not be open across a fork: the child would release the parent's readers."""
    _registry.acquire()
    for one in _shared:
        one.committing.acquire()
        one.forking = one.exclusive()
        one.forking.__enter__()
        one._close()
        one.queueing.acquire()


def _after_fork(child: bool) -> None:
    for one in _shared:
        if child:  # these were of threads that only the parent has
            one.waiting.clear()
            one.active.clear()
            one.led = False
        one.queueing.release()
        one.forking.__exit__(None, None, None)
        one.committing.release()
    _registry.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork(child=False),
        after_in_child=lambda: _after_fork(child=True),
    )
