"""What tests of stores share: a Redis server of their own, and a plain model of a store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from unbraid.serve.store import Record


def executable() -> str:
    """Redis' server; skips where there is none and none may be installed."""
    found = shutil.which("redis-server")
    if found is None and os.environ.get("CI") == "true" and shutil.which("apt-get"):
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        with Path(tempfile.gettempdir(), "unbraid-tests-apt.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
            if shutil.which("redis-server") is None:
                for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "redis-server"]):
                    subprocess.run([*root, "apt-get", *command], check=True, capture_output=True, timeout=600)
        found = shutil.which("redis-server")
    if found is None:
        pytest.skip(
            "there is no redis-server; apt-get install redis-server brings it (with CI=true this test does that)"
        )
    return found


class Server:
    """A Redis server on a free port of the loopback, in a folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "",
                        *options]  # fmt: skip
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        for _ in range(500):
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.connect(("127.0.0.1", self.port))
                probe.sendall(b"PING\r\n")
                if probe.recv(64).startswith((b"+PONG", b"-NOAUTH")):  # not while it loads
                    return
            time.sleep(0.01)
        raise RuntimeError("Redis did not start")

    def stop(self, hard: bool = False) -> None:
        self.process.kill() if hard else self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own that is soon full; skips where none may be mounted."""
    place = folder / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@dataclass
class Model:
    """A store in plain lists: what the real ones must do."""

    known: dict[int, set[str]] = field(default_factory=dict)
    held: dict[int, list[tuple[int, Record]]] = field(default_factory=dict)  # arrival and record, in order of arrival
    arrived: dict[int, int] = field(default_factory=dict)

    def append(self, events: Sequence[tuple[int, Record]]) -> list[bool]:
        new = []
        for user, record in events:
            new.append(record.id not in self.known.setdefault(user, set()))
            if new[-1]:
                self.known[user].add(record.id)
                self.arrived[user] = self.arrived.get(user, 0) + 1
                self.held.setdefault(user, []).append((self.arrived[user], record))
        return new

    def records(self, user: int) -> list[Record]:
        return [r for _, r in sorted(self.held.get(user, []), key=lambda pair: (pair[1].time, pair[0]))]

    def last(self, user: int, n: int, before: int | None) -> list[Record]:
        found = [r for r in self.records(user) if before is None or r.time < before]
        return found[len(found) - min(n, len(found)) :]

    def trim(self, user: int, keep: int) -> int:
        gone = self.records(user)[: max(0, len(self.held.get(user, [])) - keep)]
        ids = {r.id for r in gone}
        if ids:
            self.held[user] = [pair for pair in self.held[user] if pair[1].id not in ids]
        return len(gone)

    def delete(self, user: int) -> int:
        self.known.pop(user, None)
        self.arrived.pop(user, None)
        return len(self.held.pop(user, []))


def event(name: str, time: int = 0, table: str = "rows", values: Mapping[str, object] | None = None) -> Record:
    return Record(name, time, table, {"item": name} if values is None else values)
