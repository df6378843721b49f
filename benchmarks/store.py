"""The history stores: appends per second, a long history read cold and warm, bytes per event.

Every append is one event, and returns when it is durable: LMDB flushes to disk, Redis (started here when `redis-server` is
installed) writes its append-only file as ``appendfsync`` says.  Cold means that the system's cache does not hold the file.

    python benchmarks/store.py [--folder .] [--quick]

Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unbraid.serve.redis_store import RedisStore
from unbraid.serve.store import Record, Store, open_store

HISTORY = 10_000


def event(name: str, at: int) -> Record:
    values = {"video_id": at % 7000, "is_click": at % 2, "is_like": 0, "long_view": at % 3 == 0, "is_profile_enter": 0}
    return Record(f"rows:{name}", 1_650_000_000_000 + at * 1000, "rows", values)


def appends(store: Store, writers: int, seconds: float) -> float:
    """Events per second of so many threads, one event an append."""
    counts = [0] * writers
    start = time.perf_counter()
    end = start + seconds

    def write(me: int) -> None:
        while time.perf_counter() < end:
            new = store.append([(me * 7919 + counts[me] % 50, event(f"{writers}.{me}.{counts[me]}", counts[me]))])
            counts[me] += sum(new)

    threads = [threading.Thread(target=write, args=(me,)) for me in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def median_ms(call: Callable[[], Any], before: Callable[[], Any] = lambda: None, times: int = 9) -> float:
    """Median milliseconds of a call; ``before`` each, untimed."""
    took = []
    for _ in range(times):
        before()
        start = time.perf_counter()
        call()
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


def forget(path: Path) -> None:
    """Have the system drop a file from its cache, whatever maps it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(open_one: Callable[[], Store], file: Path | None, seconds: float) -> dict[str, float]:
    """All figures of one store."""
    store = open_one()
    found = {f"appends_{writers}": appends(store, writers, seconds) for writers in (1, 8)}
    before = store.stats()
    start = time.perf_counter()
    for at in range(0, 5 * HISTORY, 1000):  # of five users in turn, as events arrive
        store.append([(1 << 40 | n % 5, event(str(n), n)) for n in range(at, at + 1000)])
    found["appends_1000_at_once"] = 5 * HISTORY / (time.perf_counter() - start)
    found["bytes_per_event"] = (store.stats()["bytes"] - before["bytes"]) / (5 * HISTORY)
    user = 1 << 40 | 2
    page = store.read(user)
    assert len(page.records) == HISTORY
    found["read_warm_ms"] = median_ms(lambda: store.read(user))
    found["nothing_new_ms"] = median_ms(lambda: store.read(user, page.generation, page.seq))
    found["last_50_ms"] = median_ms(lambda: store.last(user, 50))
    store.close()
    if file is not None:
        took = []
        for _ in range(5):
            forget(file)
            store = open_one()
            took.append(median_ms(lambda store=store: store.read(user), times=1))  # type: ignore[misc]
            store.close()
        found["read_cold_ms"] = statistics.median(took)
    return found


@contextlib.contextmanager
def redis(folder: Path, policy: str) -> Iterator[str]:
    """The address of a server of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
    server = subprocess.Popen(["redis-server", *options, "--appendfsync", policy], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        for _ in range(200):
            time.sleep(0.05)
            with contextlib.suppress(RuntimeError):
                RedisStore(url).close()
                break
        yield url
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure [default: that of temporary files]")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    seconds = 0.5 if options.quick else 5.0
    found = {}
    with tempfile.TemporaryDirectory(prefix="unbraid-store-", dir=options.folder) as place:
        folder = Path(place)
        found["lmdb"] = measure(lambda: open_store(folder / "lmdb"), folder / "lmdb" / "data.mdb", seconds)
        for policy in ("always", "everysec") if shutil.which("redis-server") else ():
            with redis(folder / policy, policy) as url:
                found[f"redis {policy}"] = measure(lambda url=url: open_store(url), None, seconds)  # type: ignore[misc]
    names = list(found["lmdb"])
    print("| store | " + " | ".join(name.replace("_", " ") for name in names) + " |\n|---|" + "---|" * len(names))
    for store, values in found.items():
        print(f"| {store} | " + " | ".join(f"{values[n]:,.3g}" if n in values else "-" for n in names) + " |")
    print(json.dumps({"benchmark": "store", "cpus": os.cpu_count(), "history": HISTORY, "stores": found}))


if __name__ == "__main__":
    main()
