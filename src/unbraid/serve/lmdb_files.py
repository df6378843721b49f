"""The files of an LMDB store: is it one, is it whole, is there room; and the library's errors as those of a store."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.serve.store import FORMAT, FORMAT_KEY, StoreCorrupt, StoreDown, StoreError, StoreFull

if TYPE_CHECKING:
    import lmdb

TREES = ("events", "arrivals", "ids", "users", "settings")
RESTORE = "Put the folder back from a copy, or delete it and import the events again."
_CORRUPT = ("CorruptedError", "PageNotFoundError", "InvalidError", "VersionMismatchError", "IncompatibleError")


def library() -> Any:
    """The package; raises ImportError with a hint."""
    try:
        import lmdb
    except ImportError as error:
        raise ImportError('A history store in a folder needs LMDB: pip install "unbraid[serve]".') from error
    return lmdb


def data_of(folder: Path) -> Path:
    """The file that holds everything."""
    return folder / "data.mdb"


def identity(folder: Path) -> tuple[int, int] | None:
    """Which file it is, whatever its path."""
    try:
        found = data_of(folder).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def sync_names(folder: Path) -> None:
    """Wait until the new files' names would survive a power cut."""
    for place in (folder, folder.resolve().parent):
        with contextlib.suppress(OSError):  # some file systems refuse to sync a folder
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


@contextlib.contextmanager
def translated(folder: Path, map_bytes: int = 0) -> Iterator[None]:
    """LMDB's errors as those of a store; what `unbraid.serve.lmdb_env` handles itself passes."""
    lmdb = library()
    try:
        yield
    except (lmdb.MapFullError, lmdb.MapResizedError, lmdb.PanicError):
        raise
    except lmdb.Error as error:
        code = getattr(error, "code", 0)
        if type(error).__name__ in _CORRUPT:
            raise StoreCorrupt(f"{folder} is damaged, or not a history store ({error}). {RESTORE}") from error
        if isinstance(error, lmdb.ReadersFullError):
            raise StoreDown(f"{folder}: too many readers at once.") from error
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
    if limit != resource.RLIM_INFINITY and data_of(folder).stat().st_size + need > limit:
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


def check_format(env: lmdb.Environment, folder: Path) -> None:
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


def check_length(env: lmdb.Environment, folder: Path) -> None:
    """Raises StoreCorrupt for a file that was cut short: touching a page behind its end would kill the process.

    A whole file may be short, too, by pages that its last transaction took and gave back; all of a short one is looked at.
    """
    if missing(env, folder) <= 0:
        return
    from lmdb.verify import VerifyError, verify  # reads the file as a file

    with env.begin(write=True):  # nobody else writes meanwhile
        try:
            problems = verify(str(folder))
        except VerifyError as error:
            problems = [str(error)]
        if problems:
            raise StoreCorrupt(f"{data_of(folder)} is cut short: {problems[0]}. {RESTORE}")
        lengthen(env, folder)


def missing(env: lmdb.Environment, folder: Path) -> int:
    """How many bytes the file is shorter than its pages."""
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"] - data_of(folder).stat().st_size


def lengthen(env: lmdb.Environment, folder: Path) -> None:
    """Make a file as long as its pages, so that the next opening need not look at it.  Called in a write transaction."""
    if missing(env, folder) > 0:
        with contextlib.suppress(OSError):
            os.truncate(data_of(folder), (env.info()["last_pgno"] + 1) * env.stat()["psize"])


def reserve_readers(folder: Path, readers: int) -> None:
    """Give the table of readers its room on the disk: a full disk would kill the process at a new reader's first write there.

    Called before the file is opened: closing the table afterwards would drop the locks that this process holds on it.
    """
    table = folder / "lock.mdb"
    if not table.exists():
        library().open(str(folder), max_readers=readers).close()
    with contextlib.suppress(OSError):  # there is no room now, or the file system cannot
        handle = os.open(table, os.O_RDWR)
        try:
            os.posix_fallocate(handle, 0, os.fstat(handle).st_size)
        finally:
            os.close(handle)
