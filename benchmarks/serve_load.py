"""A service under load: a real server in a process of its own, and clients that ask over HTTP.

    python benchmarks/serve_load.py [--quick] [--seconds 20] [--soak MINUTES] [--formats]

``/rank`` of 500 candidates for users with 10,000 events each (DARE, width 16, the 20 best events of each candidate) by 1, 8 and
32 clients at once: p50, p99 and requests a second, the server's memory, and where the time of a request goes.  Clients are
threads of this process and share the machine's cores with the server.  ``--soak`` mixes ``/rank`` (70 %), ``/predict`` (10 %) and
``/events`` (20 %) of 8 clients for so many minutes: errors, memory and p99 by tenths of the time.  ``--formats`` measures
something else instead: ``/predict`` of 10,000 rows in JSON and in Arrow, by one client, of a bundle with 12 numbers and histories
of 50 events, so that the model's time does not hide the difference.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.bundle import Bundle, build
from unbraid.config import ModelChoice, Run
from unbraid.data.declaration import Data, Events, Split
from unbraid.data.encode import encode
from unbraid.data.fitted import Fitted
from unbraid.encoders.dare import DARE
from unbraid.encoders.table import Views
from unbraid.render import markdown
from unbraid.serve.arrow import MEDIA
from unbraid.serve.importer import import_events
from unbraid.serve.store import open_store
from unbraid.towers.mlp import SharedBottom
from unbraid.types import Feature, Field, History, Task

ITEMS, WIDTH, KEEP, CLIENTS = 20_000, 16, 20, (1, 8, 32)
ROWS, NUMBERS, JSON = 10_000, 12, "application/json"  # of --formats
Answer = tuple[str, int, float]  # route, status, seconds


def prepare(folder: Path, users: int, events: int, numbers: int = 0) -> Path:
    """A bundle with random weights, and a store with its users' events.  Times are milliseconds of 2001."""
    draw, count = np.random.default_rng(0), users * events
    names = [f"x{i}" for i in range(numbers)]
    log = pl.DataFrame({
        "user": np.arange(count) % users, "item": draw.integers(0, ITEMS, count), "time": 10**12 + np.arange(count) * 100,
        "click": draw.integers(0, 2, count), **{name: draw.normal(size=count) for name in names},
    })  # fmt: skip
    log.write_parquet(folder / "log.parquet")
    data = Data(
        rows="log.parquet", folder=str(folder), user="user", time="time", fields=(Field("item"),),
        features=(Feature("item"), *(Feature(name, kind="number") for name in names)), cache=str(folder / "cache"),
        events=(Events(columns={"item": "item"}),), tasks=(Task("click"),),
        histories=(History("past", fields=("item", "position"), length=events),),
        split=Split(kind="time", valid_from=10**12 + count * 80, test_from=10**12 + count * 90),
    )  # fmt: skip
    model = ModelChoice(
        tower=SharedBottom(bottom=(64, 32), tower=(16,)), tables=Views(width=WIDTH, std=0.3), history=DARE(keep=KEEP)
    )
    run = Run(data=data, name="load", model=model)
    fitted = Fitted.load(encode(data))
    Bundle(run, fitted, build(run, fitted.schema).eval(), {}).save(folder / "bundle")
    store = open_store(folder / "store")
    import_events(data, store)
    store.close()
    return folder / "bundle"


class Server:
    """`unbraid serve` in a process of its own."""

    def __init__(self, bundle: Path, store: Path, log: Path, *options: str) -> None:
        self.refused = ""  # the first answer that was not 200
        command = [
            sys.executable,
            "-m",
            "unbraid",
            "serve",
            str(bundle),
            "--store",
            str(store),
            "--port",
            "0",
            *options,
        ]
        with log.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("serving"):
            raise RuntimeError(log.read_text())
        self.port = int(line.split()[1].rpartition(":")[2])

    def ask(self, connection: http.client.HTTPConnection, route: str, body: bytes, kind: str = JSON) -> Answer:
        """One request on a kept connection, answered in its own format."""
        begin = time.perf_counter()
        connection.request("POST", route, body, {"Content-Type": kind, "Accept": kind})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200 and not self.refused:
            self.refused = f"{route} {answer.status}: {text[:300].decode(errors='replace')}"
        return route, answer.status, time.perf_counter() - begin

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def memory(self) -> float:
        """MiB that are resident."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stages(self) -> dict[str, tuple[float, float]]:
        """stage -> (seconds, how often) so far."""
        connection = self.connect()
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        found = {
            part: dict(re.findall(rf'unbraid_stage_seconds_{part}{{stage="(\w+)"}} ([\d.e+-]+)', text))
            for part in ("sum", "count")
        }
        return {name: (float(value), float(found["count"][name])) for name, value in found["sum"].items()}

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def drive(
    server: Server, clients: int, seconds: float, make: Callable[[random.Random], tuple[str, bytes]]
) -> list[tuple[float, Answer]]:
    """What so many clients saw, each asking again as soon as it is answered: (when, answer)."""
    found: list[tuple[float, Answer]] = []
    begin = time.perf_counter()

    def client(number: int) -> None:
        draw, connection = random.Random(number), server.connect()
        while (now := time.perf_counter() - begin) < seconds:
            found.append((now, server.ask(connection, *make(draw))))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found


def percentiles(answers: list[Answer]) -> tuple[float, float]:
    """p50 and p99 in milliseconds; NaN without answers."""
    if not answers:
        return float("nan"), float("nan")
    p50, p99 = np.percentile([seconds for *_, seconds in answers], (50, 99)) * 1e3
    return float(p50), float(p99)


def requests(users: int, candidates: int) -> dict[str, Callable[[random.Random], bytes]]:
    """route -> what makes a body."""
    now = 2 * 10**12

    def items(draw: random.Random, count: int) -> list[dict[str, int]]:
        return [{"item": draw.randrange(ITEMS)} for _ in range(count)]

    def rank(draw: random.Random) -> bytes:
        content = {"user": draw.randrange(users), "candidates": items(draw, candidates), "time": now, "top": 20}
        return json.dumps(content).encode()

    def predict(draw: random.Random) -> bytes:
        rows = [{"user": draw.randrange(users), "time": now, **item} for item in items(draw, 2)]
        return json.dumps({"rows": rows}).encode()

    def events(draw: random.Random) -> bytes:
        made = {"user": draw.randrange(users), "time": 10**12 + draw.randrange(10**9), **items(draw, 1)[0]}
        return json.dumps({"table": "rows", "events": [{"id": f"{draw.getrandbits(64):x}", **made}]}).encode()

    return {"/rank": rank, "/predict": predict, "/events": events}


def load(server: Server, users: int, candidates: int, seconds: float) -> dict[str, Any]:
    """The table of clients."""
    bodies, found, lines = requests(users, candidates), dict[str, Any](), []
    drive(server, 1, seconds / 4, lambda draw: ("/rank", bodies["/rank"](draw)))  # every user is in the cache
    for clients in CLIENTS:
        before = server.stages()
        answers = [a for _, a in drive(server, clients, seconds, lambda draw: ("/rank", bodies["/rank"](draw)))]
        after = server.stages()
        spent = {n: (after[n][0] - before.get(n, (0, 0))[0]) / len(answers) * 1e3 for n in after}
        p50, p99 = percentiles(answers)
        wrong = sum(status != 200 for _, status, _ in answers)
        each = {
            "p50": p50,
            "p99": p99,
            "per_second": len(answers) / seconds,
            "errors": wrong,
            "MiB": server.memory(),
            "stages": spent,
        }
        found[str(clients)] = each
        said = ", ".join(f"{n} {ms:.1f}" for n, ms in spent.items() if ms >= 0.05)
        lines.append(
            [
                str(clients),
                f"{p50:.1f}",
                f"{p99:.1f}",
                f"{each['per_second']:.1f}",
                str(wrong),
                f"{each['MiB']:.0f}",
                said,
            ]
        )
    print(markdown(["clients", "p50 ms", "p99 ms", "requests/s", "errors", "MiB", "ms by stage"], lines, left=1))
    return found


def soak(server: Server, users: int, candidates: int, seconds: float) -> dict[str, Any]:
    """Mixed load: errors, and memory and p99 by tenths."""
    bodies = requests(users, candidates)

    def make(draw: random.Random) -> tuple[str, bytes]:
        route = draw.choices(("/rank", "/predict", "/events"), (0.7, 0.1, 0.2))[0]
        return route, bodies[route](draw)

    memory: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(seconds / 100):
            memory.append(server.memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    answers = drive(server, 8, seconds, make)
    stop.set()
    watcher.join()
    tenths = []
    for tenth in range(10):
        part = [a for when, a in answers if tenth <= when / seconds * 10 < tenth + 1 and a[0] == "/rank"]
        rows = memory[len(memory) * tenth // 10 : len(memory) * (tenth + 1) // 10]
        tenths.append((percentiles(part)[1], max(rows, default=0.0)))
    errors = sum(status != 200 for _, (_, status, _) in answers)
    first = f" (the first: {server.refused})" if errors else ""
    print(f"\nSoak of {seconds / 60:g} minutes, 8 clients: {len(answers):,} requests, {errors} errors{first}\n")
    print(
        markdown(
            ["tenth", "p99 of /rank, ms", "MiB"],
            [[str(i + 1), f"{p:.1f}", f"{m:.0f}"] for i, (p, m) in enumerate(tenths)],
            left=1,
        )
    )
    return {"requests": len(answers), "errors": errors, "p99": [p for p, _ in tenths], "MiB": [m for _, m in tenths]}


def formats(folder: Path, times: int) -> dict[str, Any]:
    """The table of JSON and Arrow; what a client does, making the body and reading the answer, counts, too."""
    bundle = prepare(folder, 50, 50, NUMBERS)
    server = Server(
        bundle, folder / "store", folder / "log", "--max-candidates", str(ROWS), "--max-body", str(16 << 20), "--arrow"
    )
    draw = np.random.default_rng(1)
    frame = pl.DataFrame({
        "user": draw.integers(0, 50, ROWS), "time": np.full(ROWS, 2 * 10**12), "item": draw.integers(0, ITEMS, ROWS),
        **{f"x{i}": draw.normal(size=ROWS) for i in range(NUMBERS)},
    })  # fmt: skip
    rows = frame.to_dicts()  # as a client of JSON has them

    def stream() -> bytes:
        sink = io.BytesIO()
        frame.write_ipc_stream(sink, compat_level=pl.CompatLevel.oldest())
        return sink.getvalue()

    made = {"JSON": (JSON, lambda: json.dumps({"rows": rows}).encode()), "Arrow": (MEDIA, stream)}
    found, lines = dict[str, Any](), []
    try:
        for name in ("JSON", "Arrow", "JSON", "Arrow"):  # the first round warms caches
            kind, make = made[name]
            connection, before, seconds = server.connect(), server.stages(), []
            for _ in range(times):
                begin = time.perf_counter()
                body = make()
                _, status, _ = server.ask(connection, "/predict", body, kind)
                seconds.append(time.perf_counter() - begin)
                assert status == 200
            after = server.stages()
            check = (after["check"][0] - before.get("check", (0, 0))[0]) / times
            found[name] = {"ms": float(np.median(seconds)) * 1e3, "check_ms": check * 1e3, "bytes": len(body)}
    finally:
        server.end()
    for name, one in found.items():
        lines.append([name, f"{one['bytes']:,}", f"{one['check_ms']:.1f}", f"{one['ms']:.0f}"])
    print(markdown(["10,000 rows", "bytes sent", "checking, ms", "request, ms"], lines, left=1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short histories, two seconds: does it run")
    parser.add_argument("--seconds", type=float, default=20, help="of each number of clients")
    parser.add_argument("--soak", type=float, default=0, metavar="MINUTES")
    parser.add_argument("--formats", action="store_true", help="JSON and Arrow instead")
    asked = parser.parse_args()
    if asked.formats:
        with tempfile.TemporaryDirectory() as place:
            told = formats(Path(place), 3 if asked.quick else 30)
        print(json.dumps({"benchmark": "serve_load", "quick": asked.quick, "formats": told}))
        return
    users, events, candidates = (5, 500, 50) if asked.quick else (50, 10_000, 500)
    seconds, minutes = (2.0, asked.soak or 0.1) if asked.quick else (asked.seconds, asked.soak)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        server = Server(prepare(folder, users, events), folder / "store", folder / "log")
        try:
            found: dict[str, Any] = {"load": load(server, users, candidates, seconds)}
            if minutes:
                found["soak"] = soak(server, users, candidates, minutes * 60)
        finally:
            server.end()
    print(json.dumps({"benchmark": "serve_load", "quick": asked.quick, **found}))


if __name__ == "__main__":
    main()
