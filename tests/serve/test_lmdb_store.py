"""The store in files: the map grows, full disks, damaged and foreign files, one environment per process, one flush for many."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from storekit import event, small_disk

from unbraid.serve import lmdb_env, lmdb_files, lmdb_store
from unbraid.serve.lmdb_store import LmdbStore
from unbraid.serve.store import Record, StoreCorrupt, StoreDown, StoreError, open_store

lmdb = pytest.importorskip("lmdb")


def run(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fill(folder: Path, users: int = 5, events: int = 300) -> int:
    """A store of some size; returns the bytes of its file."""
    store = LmdbStore(folder, fsync=False)
    for user in range(users):
        store.append([(user, event(str(i), i * 7 % 100, values={"pad": "x" * 60})) for i in range(events)])
    store.close()
    return (folder / "data.mdb").stat().st_size


# -------------------------------------------------------------------------------------------------------------- the map
def test_the_map_grows_while_threads_read(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, fsync=False, map_bytes=1 << 17)
    store.append([(1, event("first"))])
    failed: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            while not stop.is_set():
                assert store.read(1).records[0].id == "first"
                time.sleep(1e-3)  # threads that never rest would keep the interpreter to themselves
        except BaseException as error:
            failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for n in range(40):
        store.append([(2, event(f"{n}.{k}", n, values={"pad": "x" * 3000})) for k in range(10)])
    stop.set()
    for reader in readers:
        reader.join()
    assert not failed
    assert len(store.read(2).records) == 400 and store._env.map_bytes > 1 << 20
    store.close()
    again = LmdbStore(tmp_path, map_bytes=1 << 17)  # a map that is too small for the file
    assert len(again.read(2).records) == 400
    again.close()


def test_a_map_that_another_process_grew_is_taken_over(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path, map_bytes=1 << 17)
    store.append([(1, event("mine"))])
    code = """
import sys
from unbraid.serve.store import Record, open_store
store = open_store(sys.argv[1])
store.append([(1, Record(str(n), n, "rows", {"pad": "x" * 3000})) for n in range(200)])
store.close()
"""
    run(code, tmp_path)
    assert len(store.read(1).records) == 201
    run(code.replace("range(200)", "range(200, 900)"), tmp_path)
    assert store.append([(1, event("later", 10**6))]) == [True]
    assert len(store.read(1).records) == 902
    store.close()


# ---------------------------------------------------------------------------------------------------------- no more room
FULL = """
import resource, sys
from unbraid.serve.store import Record, StoreFull, open_store
store = open_store(sys.argv[1])
store.append([(1, Record("before", 0, "rows", {}))])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
kept, n = 1, 0
while True:
    batch = [(1, Record(f"{n}.{k}", n, "rows", {"pad": "x" * 5000})) for k in range(7)]
    try:
        assert store.append(batch) == [True] * 7
        kept += 7
    except StoreFull as error:
        assert "no room" in str(error) and sys.argv[1] in str(error), error
        break
    n += 1
assert n > 5
for _ in range(3):
    try:
        store.append(batch)
        raise SystemExit("there should be no room")
    except StoreFull:
        pass
    assert len(store.read(1).records) == kept == store.stats()["events"]
    store.ready()
assert store.trim(1, kept - 70) == 70  # removing needs few pages, and gives some back
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
assert store.append(batch) == [True] * 7
assert len(store.read(1).records) == kept - 63
store.close()
print(kept)
"""


def test_a_full_disk_keeps_nothing_of_a_write_and_reads_go_on(tmp_path: Path) -> None:
    kept = int(run(FULL, tmp_path))
    store = open_store(tmp_path)
    assert len(store.read(1).records) == kept - 63
    assert problems(tmp_path) == []
    store.close()


MANY = """
import sys
from unbraid.serve.store import open_store
store = open_store(sys.argv[1])
try:
    with open(sys.argv[1] + "/pad", "wb", buffering=0) as pad:
        while pad.write(b"x" * 4096):
            pass
except OSError:
    pass
env = store._env.env
print(len([env.begin() for _ in range(300)]))
"""


def test_a_full_disk_does_not_kill_who_reads(tmp_path: Path) -> None:
    # a slot of the table of readers that has no room on the disk would be a SIGBUS; some 60 fit into its first page
    with small_disk(tmp_path, "1m") as folder:
        assert run(MANY, folder) == "300\n"  # a new store
        (folder / "pad").unlink()
        assert run(MANY, folder) == "300\n"


def problems(folder: Path) -> list[str]:
    from lmdb.verify import verify

    return verify(str(folder))


# ------------------------------------------------------------------------------------------------ what is not our store
def test_files_of_others_and_of_other_versions_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "data.mdb").write_bytes(os.urandom(1 << 16))
    with pytest.raises(StoreCorrupt, match=r"noise is damaged, or not a history store .*not an LMDB file"):
        open_store(tmp_path / "noise")
    with lmdb.open(str(tmp_path / "other")) as env, env.begin(write=True) as txn:
        txn.put(b"settings", b"of another program")
    with pytest.raises(StoreCorrupt, match="other is (damaged, or not a history store|an LMDB file of something else)"):
        open_store(tmp_path / "other")
    with lmdb.open(str(tmp_path / "named"), max_dbs=1) as env:
        env.open_db(b"theirs")
    with pytest.raises(StoreCorrupt, match="named is an LMDB file of something else"):
        open_store(tmp_path / "named")
    store = open_store(tmp_path / "next")
    store.set("format", "2")
    store.close()
    with pytest.raises(StoreCorrupt, match="next is a store of format 2; this version reads 1"):
        open_store(tmp_path / "next")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="file"):
        open_store(tmp_path / "file")


OPEN = """
import sys
from unbraid.serve.store import StoreCorrupt, open_store
try:
    store = open_store(sys.argv[1])
    print([len(store.read(user).records) for user in store.users()])
    store.close()
except StoreCorrupt as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    size = fill(tmp_path)
    os.truncate(tmp_path / "data.mdb", int(size * share))
    assert "StoreCorrupt" in (text := run(OPEN, tmp_path)) and "cut short" in text and str(tmp_path) in text


def test_a_whole_file_that_is_shorter_than_its_pages_is_opened(tmp_path: Path) -> None:
    # LMDB does not write pages that a transaction took and gave back, even at the end of the file
    store = LmdbStore(tmp_path, fsync=False)
    store.append([(1, event("kept"))])

    def work(write: Any) -> None:
        keys = [bytes([255, n]) + bytes(22) for n in range(200)]
        for key in keys:
            write.put("events", key, b"x" * 9000)
        for key in reversed(keys):
            write.remove("events", key)

    store._env.write(work)
    env = store._env.env
    assert env is not None and lmdb_files.missing(env, tmp_path) > 0
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "data.mdb").write_bytes((tmp_path / "data.mdb").read_bytes())  # as a crash leaves it
    assert run(OPEN, copy) == "[1]\n"
    store.append([(1, event("more"))])
    store.close()
    assert run(OPEN, tmp_path) == "[2]\n"


def test_a_damaged_event_names_the_folder(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path)
    store.append([(1, event("a"))])
    store._env.write(lambda write: write.put("events", (1).to_bytes(8, "big") + b"\x80" + b"\x00" * 15, b"[half"))
    with pytest.raises(StoreCorrupt, match=str(tmp_path)):
        store.read(1)
    store.close()


def test_files_that_were_removed_are_noticed(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "s")
    (tmp_path / "s" / "data.mdb").unlink()
    (tmp_path / "s" / "lock.mdb").unlink()
    with pytest.raises(StoreDown, match="removed or replaced"):
        store.ready()
    fresh = LmdbStore(tmp_path / "s")  # another file at the same place: another environment
    assert fresh.append([(1, event("a"))]) == [True] and store.read(1).records == []
    fresh.ready()
    fresh.close()
    store.close()


def test_a_store_whose_folder_was_removed_closes(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "s")
    store.append([(1, event("a"))])
    shutil.rmtree(tmp_path / "s")
    store.close()
    assert all(one.folder != tmp_path / "s" for one in lmdb_env._shared)


# ----------------------------------------------------------------------------------------------- one environment, forks
def test_a_file_has_one_environment_whatever_its_path(tmp_path: Path) -> None:
    first = LmdbStore(tmp_path / "s")
    (tmp_path / "link").symlink_to(tmp_path / "s")
    second = LmdbStore(tmp_path / "link")
    assert second._env is first._env
    with pytest.raises(ValueError, match="fsync=True. Found False"):
        LmdbStore(tmp_path / "s", fsync=False)
    first.close()
    assert second.append([(1, event("a"))]) == [True]
    second.close()
    assert all(one.folder != tmp_path / "s" for one in lmdb_env._shared)
    assert "crash of the machine" in (third := LmdbStore(tmp_path / "s", fsync=False)).durability
    third.close()


def test_a_fork_waits_for_readers_and_writers_of_other_threads(tmp_path: Path) -> None:
    code = """
import os, sys, threading
from unbraid.serve.store import Record, open_store
store = open_store(sys.argv[1])
stop = threading.Event()
counts = [0] * 4
def write(thread):
    while not stop.is_set():
        store.append([(thread, Record(str(counts[thread]), counts[thread], "rows", {}))])
        counts[thread] += 1
        assert len(store.read(thread).records) == counts[thread]
threads = [threading.Thread(target=write, args=(t,)) for t in range(4)]
for thread in threads: thread.start()
for n in range(10):
    child = os.fork()
    if child == 0:
        assert store.append([(9, Record(str(n), n, "rows", {}))]) == [True]
        assert len(store.read(9).records) == n + 1
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads: thread.join()
assert [len(store.read(t).records) for t in range(4)] == counts and min(counts) > 0
store.close()
"""
    run(code, tmp_path)


# ---------------------------------------------------------------------------------------------------------- group commit
def test_writers_that_wait_are_committed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LmdbStore(tmp_path)
    sizes: list[int] = []
    commit = store._env._commit

    def slow(jobs: Any) -> list[Any]:
        sizes.append(len(jobs))
        time.sleep(0.2)  # the others have come by then, on a busy machine, too
        return commit(jobs)

    monkeypatch.setattr(store._env, "_commit", slow)
    new: list[bool] = []
    threads = [
        threading.Thread(target=lambda t=t: new.extend(store.append([(1, event(f"{t // 2}"))]))) for t in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sizes) == 16 and len(sizes) <= 4
    assert sum(new) == 8 == len(store.read(1).records)
    store.close()


def test_an_error_of_a_commit_reaches_every_caller_that_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LmdbStore(tmp_path)
    entered, go = threading.Event(), threading.Event()
    commit = store._env._commit

    def failing(jobs: Any) -> list[Any]:
        if len(jobs) == 1 and not entered.is_set():  # the first alone; the others queue up behind it
            entered.set()
            go.wait(10)
            return commit(jobs)
        raise StoreDown("the disk went away")

    monkeypatch.setattr(store._env, "_commit", failing)
    found: dict[str, Any] = {}

    def write(name: str) -> None:
        try:
            found[name] = store.append([(1, event(name))])
        except StoreError as error:
            found[name] = error

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    threads[0].start()
    assert entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    while len(store._env.waiting) < 3:
        time.sleep(0.001)
    go.set()
    for thread in threads:
        thread.join()
    assert found["a"] == [True]
    assert all(type(found[name]) is StoreDown and "went away" in str(found[name]) for name in "bcd")
    monkeypatch.undo()
    assert store.append([(1, event("b"))]) == [True] and len(store.read(1).records) == 2
    store.close()


def test_an_interrupted_writer_hands_on_to_those_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LmdbStore(tmp_path)
    entered, go = threading.Event(), threading.Event()
    commit = store._env._commit

    def first_waits(jobs: Any) -> list[Any]:
        if not entered.is_set():
            entered.set()
            go.wait(10)
        return commit(jobs)

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            super().wait(timeout)
            if threading.current_thread().name == "b":  # as Ctrl-C does, when it has just been told to lead
                raise KeyboardInterrupt
            return True

    monkeypatch.setattr(store._env, "_commit", first_waits)
    found: dict[str, Any] = {}

    def write() -> None:
        name = threading.current_thread().name
        try:
            found[name] = store.append([(1, event(name))])
        except KeyboardInterrupt:
            found[name] = "interrupted"

    threads = [threading.Thread(target=write, name=name) for name in "abcd"]
    threads[0].start()
    assert entered.wait(10)
    monkeypatch.setattr(lmdb_env.threading, "Event", Interrupted)
    for n, thread in enumerate(threads[1:], 1):
        thread.start()
        while len(store._env.waiting) < n:
            time.sleep(0.001)
    monkeypatch.undo()
    monkeypatch.setattr(store._env, "_commit", first_waits)
    go.set()
    for thread in threads:
        thread.join(10)
    assert found == {"a": [True], "b": "interrupted", "c": [True], "d": [True]}
    assert [record.id for record in store.read(1).records] == ["a", "c", "d"]
    store.close()


def test_a_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ImportError, match=r'pip install "unbraid\[serve\]"'):
        open_store(tmp_path)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=r'pip install "unbraid\[serve\]"'):
        open_store("redis://127.0.0.1:1")


def test_removals_leave_nothing_behind(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path)
    store.append([(user, event(str(n), -n)) for user in (1, 2) for n in range(10)])
    store.trim(1, 3)
    with store._env.reading() as (txn, trees):
        assert [txn.stat(trees[name])["entries"] for name in ("events", "arrivals", "ids", "users")] == [13, 13, 20, 2]
    store.delete(1)
    store.delete(2)
    with store._env.reading() as (txn, trees):
        assert [txn.stat(trees[name])["entries"] for name in ("events", "arrivals", "ids", "users")] == [0] * 4
    store.close()


def test_generations_of_a_copy_put_back_are_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_store.time, "time_ns", lambda: 5000)  # a clock that stands still
    store = LmdbStore(tmp_path)
    store.append([(1, Record("a", 0, "rows", {})), (1, Record("b", 0, "rows", {}))])
    seen = [store.read(1).generation]
    store.trim(1, 1)
    seen.append(store.read(1).generation)
    store.delete(1)
    store.append([(1, Record("a", 0, "rows", {}))])
    seen.append(store.read(1).generation)
    assert seen == [5, 6, 7]
    store.close()
