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

Writers of one process commit together: a caller puts its work in a queue, and the first in it commits all that waits, with one
flush.  What the library leaves to its callers is done in `_Environment`: one environment per file and process,
none open across a fork, a map that grows while nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.serve.store import (
    BIAS,
    FORMAT,
    FORMAT_KEY,
    Page,
    Record,
    StoreCorrupt,
    StoreDown,
    StoreError,
    StoreFull,
    check_count,
    check_user,
    encoded,
    time_key,
)

if TYPE_CHECKING:
    import lmdb

    Transaction = lmdb.Transaction[bytes]  # not of memory views

TREES = ("events", "arrivals", "ids", "users", "settings")
READERS = 1024  # open read transactions of all processes
MAP = 1 << 28  # bytes to begin with; doubled whenever they do not suffice
_USER, _KEY, _META = struct.Struct(">Q"), struct.Struct(">QQQ"), struct.Struct(">QQQ")
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
        self._environment: _Environment | None = _share(self.folder, fsync, map_bytes)

    @property
    def _env(self) -> _Environment:
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

        def work(write: _Writer) -> list[bool]:
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

        def work(write: _Writer) -> int:
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

        def work(write: _Writer) -> int:
            held = write.meta(user)
            if held is None:
                return 0
            for name in ("events", "arrivals", "ids", "users"):
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
        return {"users": users, "events": events, "bytes": _data(self.folder).stat().st_size}

    def ready(self) -> None:
        """See `Store`."""
        if _identity(self.folder) != self._env.identity:
            raise StoreDown(f"The files in {self.folder} were removed or replaced. Open the store again.")
        self.get(FORMAT_KEY)

    def close(self) -> None:
        """See `Store`."""
        if self._environment is not None:
            _release(self._environment)
            self._environment = None

    def _records(self, pairs: Sequence[tuple[bytes, bytes | None]]) -> list[Record]:
        """Records of events' keys and payloads, read as one list of JSON."""
        try:
            read = json.loads(b"[" + b",".join([payload for _, payload in pairs]) + b"]")  # type: ignore[misc]
            keys = _KEY.iter_unpack(b"".join([key for key, _ in pairs]))
            return [Record(i, time_ - BIAS, t, v) for (_, time_, _), (i, t, v) in zip(keys, read, strict=True)]
        except (ValueError, TypeError, struct.error) as error:
            raise StoreCorrupt(f"An event in {self.folder} is damaged ({error}). {_RESTORE}") from error


def _setting(name: str) -> bytes:
    if not 0 < len(name.encode()) <= 480:  # LMDB's keys end at 511
        raise ValueError(f"A setting's name should be text of 1 to 480 bytes. Found {name!r}.")
    return name.encode()


def _walk(txn: Transaction, tree: Any, key: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Entries of a user in order, from ``key + start`` on."""
    cursor = txn.cursor(db=tree)
    return takewhile(lambda pair: pair[0][:8] == key, cursor) if cursor.set_range(key + start) else iter(())


# -------------------------------------------------------------------------------------------------------------- writing
class _Writer:
    """One write transaction, and what is known of its users until it ends."""

    def __init__(self, txn: Transaction, trees: Mapping[str, Any]) -> None:
        self.txn, self.trees = txn, trees
        self.metas: dict[int, list[int] | None] = {}  # generation, newest arrival, count

    def put(self, tree: str, key: bytes, value: bytes, overwrite: bool = True) -> bool:
        return self.txn.put(key, value, overwrite=overwrite, db=self.trees[tree])

    def remove(self, tree: str, key: bytes) -> None:
        self.txn.delete(key, db=self.trees[tree])

    def clear(self, tree: str, key: bytes, most: int = 2 * BIAS) -> Iterator[bytes]:
        """Remove a user's first entries, at most so many; yields their keys."""
        cursor = self.txn.cursor(db=self.trees[tree])
        there = cursor.set_range(key)
        while there and most and (found := cursor.key())[:8] == key:
            there, most = cursor.delete() and cursor.key() != b"", most - 1
            yield found

    def meta(self, user: int) -> list[int] | None:
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
        for user, meta in self.metas.items():
            if meta is not None:
                self.put("users", _USER.pack(user), _META.pack(*meta))


class _Job:
    """A caller's work, and what came of it."""

    def __init__(self, work: Callable[[_Writer], Any]) -> None:
        self.work, self.done, self.told = work, False, threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class _Environment:
    """A file's only LMDB environment in this process: the map, its trees, who reads and who waits for a commit.

    The map is replaced (grown, reopened after a failed flush, closed for a fork) only while nobody reads.  Readers take no
    lock: one enters itself in ``active`` and then looks at ``changing``; who changes the map sets ``changing`` and then looks
    at ``active``, so that one of the two sees the other.  ``committing`` is held by whoever writes or changes the map.
    ``queueing`` guards who waits for a commit and whether one of them leads.
    """

    def __init__(self, folder: Path, fsync: bool, map_bytes: int) -> None:
        self.folder, self.fsync, self.map_bytes = folder, fsync, map_bytes
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
        with _translated(self.folder):
            new = not _data(self.folder).exists()
            self.env = lmdb.open(
                str(self.folder), map_size=self.map_bytes, max_dbs=len(TREES), max_readers=READERS, sync=self.fsync,
                metasync=self.fsync, readahead=False,
            )  # fmt: skip
            try:
                self.env.reader_check()  # slots of killed readers keep old pages
                self.map_bytes = max(self.map_bytes, self.env.info()["map_size"])
                _check_length(self.env, self.folder)
                _check_format(self.env, self.folder)
                if new and self.fsync:
                    _sync_names(self.folder)
                self.trees = {name: self.env.open_db(name.encode()) for name in TREES}
                self.identity = _identity(self.folder)
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
        with self.exclusive(), _translated(self.folder, map_bytes):
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
            with _translated(self.folder), self._begin(me) as txn:
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

    def write(self, work: Callable[[_Writer], Any]) -> Any:
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
                with _translated(self.folder), env.begin(write=True) as txn:
                    _lengthen(env, self.folder)
                    write = _Writer(txn, self.trees)
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
_shared: list[_Environment] = []


def _share(folder: Path, fsync: bool, map_bytes: int) -> _Environment:
    """The environment of a folder's file, which one process must not open twice: closing one would drop both's locks."""
    with _registry:
        there = _identity(folder)
        found = next((one for one in _shared if there is not None and one.identity == there), None)
        if found is None:
            found = _Environment(folder, fsync, map_bytes)
            _shared.append(found)
        elif found.fsync != fsync:
            raise ValueError(f"The store {folder} is open in this process with fsync={found.fsync}. Found {fsync}.")
        found.users += 1
        return found


def _release(environment: _Environment) -> None:
    with _registry:
        environment.users -= 1
        if not environment.users:
            _shared.remove(environment)
            with environment.committing, environment.exclusive():
                environment.closed = True
                if environment.env is not None:
                    with contextlib.suppress(library().Error), environment.env.begin(write=True):
                        _lengthen(environment.env, environment.folder)
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


# ---------------------------------------------------------------------------------------------------------------- files
_RESTORE = "Put the folder back from a copy, or delete it and import the events again."
_CORRUPT = ("CorruptedError", "PageNotFoundError", "InvalidError", "VersionMismatchError", "IncompatibleError")


def library() -> Any:
    """The package; raises ImportError with a hint."""
    try:
        import lmdb
    except ImportError as error:
        raise ImportError("A history store in a folder needs LMDB: pip install 'unbraid[serve]'.") from error
    return lmdb


def _data(folder: Path) -> Path:
    return folder / "data.mdb"


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which file it is, whatever its path."""
    try:
        found = _data(folder).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _sync_names(folder: Path) -> None:
    """Wait until the new files' names would survive a power cut."""
    for place in (folder, folder.resolve().parent):
        with contextlib.suppress(OSError):  # some file systems refuse to sync a folder
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


@contextlib.contextmanager
def _translated(folder: Path, map_bytes: int = 0) -> Iterator[None]:
    """LMDB's errors as those of a store; what `_Environment` handles itself passes."""
    lmdb = library()
    try:
        yield
    except (lmdb.MapFullError, lmdb.MapResizedError, lmdb.PanicError):
        raise
    except lmdb.Error as error:
        code = getattr(error, "code", 0)
        if type(error).__name__ in _CORRUPT:
            raise StoreCorrupt(f"{folder} is damaged, or not a history store ({error}). {_RESTORE}") from error
        if isinstance(error, lmdb.ReadersFullError):
            raise StoreDown(f"{folder}: more than {READERS} readers at once.") from error
        if map_bytes and code == errno.ENOMEM:
            raise StoreFull(f"{folder}: no map of {map_bytes:,} bytes. Raise the limit of address space.") from error
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or (code == errno.EIO and _cramped(folder)):
            free = shutil.disk_usage(folder).free
            raise StoreFull(
                f"{folder}: no room for a write, {free:,} bytes are free on its disk. Make room."
            ) from error
        raise StoreError(f"{folder}: {error}.") from error
    except OSError as error:
        raise StoreError(f"{folder}: {error}.") from error


def _cramped(folder: Path, need: int = 1 << 24) -> bool:
    """Whether the disk, a quota or a limit leaves no room: LMDB calls a write that was cut short an input/output error."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and _data(folder).stat().st_size + need > limit:
        return True
    probe = folder / f".probe-{os.getpid()}-{threading.get_ident()}"
    try:
        with probe.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, need)
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    finally:
        probe.unlink(missing_ok=True)
    return False


def _check_format(env: lmdb.Environment, folder: Path) -> None:
    """Mark a new file as a store of this version; raises StoreCorrupt for any other."""
    with env.begin() as txn:
        empty = not txn.stat()["entries"]
    if not empty:
        found = None
        with contextlib.suppress(
            library().NotFoundError
        ):  # `create=False` raises where another's file has no such tree
            tree = env.open_db(b"settings", create=False)
            with env.begin(db=tree) as txn:
                found = txn.get(FORMAT_KEY.encode())
        if found is None:
            raise StoreCorrupt(f"{folder} is an LMDB file of something else. Choose another folder.")
        if found.decode() != FORMAT:
            raise StoreCorrupt(
                f"{folder} is a store of format {found.decode()}; this version reads {FORMAT}. Use the version that wrote it, "
                "or import the events again into another folder."
            )
        return
    # in one transaction: another process may be doing the same, and a crash leaves it empty
    with env.begin(write=True) as txn:
        tree = env.open_db(b"settings", txn=txn)
        txn.put(FORMAT_KEY.encode(), FORMAT.encode(), overwrite=False, db=tree)


def _check_length(env: lmdb.Environment, folder: Path) -> None:
    """Raises StoreCorrupt for a file that was cut short: touching a page behind its end would kill the process.

    A whole file may be short, too, by pages that its last transaction took and gave back; all of a short one is looked at.
    """
    if _missing(env, folder) <= 0:
        return
    from lmdb.verify import VerifyError, verify  # reads the file as a file

    with env.begin(write=True):  # nobody else writes meanwhile
        try:
            problems = verify(str(folder))
        except VerifyError as error:
            problems = [str(error)]
        if problems:
            raise StoreCorrupt(f"{_data(folder)} is cut short: {problems[0]}. {_RESTORE}")
        _lengthen(env, folder)


def _missing(env: lmdb.Environment, folder: Path) -> int:
    """How many bytes the file is shorter than its pages."""
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"] - _data(folder).stat().st_size


def _lengthen(env: lmdb.Environment, folder: Path) -> None:
    """Make a file as long as its pages, so that the next opening need not look at it.  Called in a write transaction."""
    if _missing(env, folder) > 0:
        with contextlib.suppress(OSError):
            os.truncate(_data(folder), (env.info()["last_pgno"] + 1) * env.stat()["psize"])
