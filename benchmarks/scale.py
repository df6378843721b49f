"""How time and memory grow with the log: 1M, 10M and 100M events, a fifth as many rows, encoded and trained one epoch.

    python benchmarks/scale.py                        # 1M, 10M, 100M events; 100M takes 8 GB of disk
    python benchmarks/scale.py --quick                # 100,000 and 400,000
    python benchmarks/scale.py --sizes 1e7 --memory 512 --folder /mnt/scratch
    python benchmarks/scale.py --sizes 1e7 --threads 1 2 --no-train  # what more cores give encoding

The log is written by day, a file of events and one of rows each, so that no size needs more memory than a day's file: a user
per 50 events, an item per 100, authors, contexts, a number, two labels.  Items follow a power law; what is clicked depends on
item and user.  A row sees the last 20 events of its user before it, pooled (MMoE, width 8, batches of 4,096, one epoch; no
baseline, no report).

Encoding and training are the commands of a user, each in a process of its own on one thread (of encoding: ``--threads``).  Peak
memory is that of the process and its children, looked at every 50 ms: *resident* is all of it, *own* without the pages of
mapped files, which the system takes back when it needs room.

Prints a line per size and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

START, DAYS = 1_700_000_000_000, 20  # ms
DAY = 86_400_000
PER_FILE = 5_000_000  # events in one draw
RUN = f"""
name = "scale"
[data]
folder = "log"
rows = "rows"
user = "user"
time = "time"
cache = "cache"
features = [{{ name = "user" }}, {{ name = "item" }}, {{ name = "author" }}, {{ name = "tab" }},
            {{ name = "age", kind = "number" }}]
fields = [{{ name = "item" }}, {{ name = "author" }}]
tasks = [{{ name = "click" }}, {{ name = "like" }}]
[[data.events]]
table = "events"
columns = {{ item = "item", author = "author" }}
[[data.histories]]
name = "seen"
fields = ["item", "author"]
length = 20
[data.split]
kind = "time"
valid_from = {START + (DAYS - 2) * DAY}
test_from = {START + (DAYS - 1) * DAY}
[model.tower]
kind = "mmoe"
[model.tables]
width = 8
[model.history]
kind = "mean"
[training]
batch_size = 4096
epochs = 1
threads = 1
"""


def generate(folder: Path, events: int) -> dict[str, Any]:
    """Write a day's files after the other; the same for every call."""
    import numpy as np
    import polars as pl

    users, items = max(events // 50, 20), max(events // 100, 20)
    for table in ("events", "rows"):
        (folder / "log" / table).mkdir(parents=True)
    rows = written = 0
    for day in range(DAYS):
        last = events * (day + 1) // DAYS
        for part, start in enumerate(range(written, last, PER_FILE)):
            n = min(PER_FILE, last - start)
            rng = np.random.default_rng([day, part])
            user = (rng.random(n) ** 2 * users).astype(np.int64)
            item = (rng.random(n) ** 3 * items).astype(np.int64)
            slot = DAY * np.array([part, part + 1]) // -(-(last - written) // PER_FILE)
            at = START + day * DAY + np.sort(rng.integers(slot[0], slot[1], n))
            log = pl.DataFrame({"user": user * 7919 % (1 << 40), "time": at, "item": item * 104729 % (1 << 40)})
            log = log.with_columns(author=pl.Series(item // 10))
            log.write_parquet(folder / "log" / "events" / f"{day:02d}-{part:03d}.parquet")
            shown = np.flatnonzero(rng.random(n) < 0.2)
            taste = ((item * 31) % 17 - 8 + (user * 13) % 11 - 5)[shown] / 6
            chance = 1 / (1 + np.exp(1.5 - taste))
            click = rng.random(len(shown)) < chance
            shown_log = log[shown].with_columns(
                tab=pl.Series(rng.integers(0, 12, len(shown)).astype(np.int8)),
                age=pl.Series(rng.integers(18, 90, len(shown)).astype(np.float32)),
                click=pl.Series(click.astype(np.int8)),
                like=pl.Series((click & (rng.random(len(shown)) < 0.2)).astype(np.int8)),
            )
            shown_log.write_parquet(folder / "log" / "rows" / f"{day:02d}-{part:03d}.parquet")
            rows += len(shown)
        written = last
    (folder / "run.toml").write_text(RUN)
    return {"events": events, "rows": rows, "users": users, "items": items}


# ----------------------------------------------------------------------------------------------------------- measuring
def memory_of(pid: int) -> tuple[int, int]:
    """Resident and own KiB of a process and its children; 0 of those that have ended."""
    resident = own = 0
    pids = [pid]
    while pids:
        one = pids.pop()
        try:
            status = Path(f"/proc/{one}/status").read_text()
            for task in Path(f"/proc/{one}/task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        found = {
            line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith(("VmRSS", "RssAnon"))
        }
        resident += int(found.get("VmRSS", 0))
        own += int(found.get("RssAnon", 0))
    return resident, own


def measured(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run a command: seconds, peak MiB resident and own.  Raises CalledProcessError with what it said."""
    start, peaks, done = time.perf_counter(), [0, 0], threading.Event()
    with (folder / "said.txt").open("w+") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)

        def watch() -> None:
            while not done.wait(0.05):
                peaks[:] = map(max, peaks, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        said.seek(0)
        if code:
            raise RuntimeError(f"{command} ended with {code}: {said.read()[-3000:]}")
    return {"seconds": round(seconds, 2), "peak_mib": peaks[0] // 1024, "own_mib": peaks[1] // 1024}


ENCODE = """
import sys, time
from unbraid import config
from unbraid.data.encode import encode
run = config.load("run.toml")
stages = []
def progress(what, done, total):
    if not stages or stages[-1][0] != what:
        stages.append((what, time.perf_counter()))
encode(run.data, progress=progress)
stages.append(("", time.perf_counter()))
for (what, at), (_, end) in zip(stages, stages[1:]):
    print(f"{what}: {end - at:.1f} s")
"""


def measure(events: int, memory: int, place: Path | None, train: bool, threads: list[int]) -> dict[str, Any]:
    """Generate, encode with each number of threads, and train at one size."""
    one = {f"{what}_NUM_THREADS": "1" for what in ("OMP", "MKL", "OPENBLAS")}
    environment = {**os.environ, **one, "POLARS_MAX_THREADS": "1", "UNBRAID_MEMORY_MB": str(memory)}
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        folder = Path(temporary)
        found = generate(folder, events)
        found["log_mib"] = size_of(folder / "log")
        found["threads"] = {}
        for number in threads:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            with_threads = environment | {"POLARS_MAX_THREADS": str(number)}
            found["encode"] = measured([sys.executable, "-c", ENCODE], folder, with_threads)
            found["threads"][number] = found["encode"]["seconds"]
        found["stages"] = (folder / "said.txt").read_text().strip().splitlines()
        found["encoded_mib"] = size_of(folder / "cache")
        if train:
            command = [
                sys.executable,
                "-m",
                "unbraid",
                "train",
                "run.toml",
                "--no-baseline",
                "--no-report",
                "--out",
                "out",
            ]
            found["train"] = measured(command, folder, environment)
            found["auc"] = json.loads((folder / "out" / "metrics.json").read_text())["test"]["click"]["auc"]
        shutil.rmtree(folder / "cache")
    return found


def size_of(folder: Path) -> int:
    """MiB of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) >> 20


def main() -> None:
    """Measure, print lines, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 and 400,000 events")
    parser.add_argument("--sizes", type=float, nargs="+", help="numbers of events")
    parser.add_argument("--memory", type=int, default=512, help="MB that encoding may use ($UNBRAID_MEMORY_MB)")
    parser.add_argument("--folder", type=Path, help="where the log is written; a temporary folder")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="of an encode; several: one after the other"
    )
    parser.add_argument("--no-train", action="store_true", help="encode alone")
    options = parser.parse_args()
    sizes = options.sizes or ((1e5, 4e5) if options.quick else (1e6, 1e7, 1e8))
    figures = []
    for events in map(int, sizes):
        found = measure(events, options.memory, options.folder, not options.no_train, options.threads)
        figures.append(found)
        print(line(found), flush=True)
    print(json.dumps({"benchmark": "scale", "memory_mb": options.memory, "figures": figures}))


def line(found: dict[str, Any]) -> str:
    """One size in words."""
    parts = [f"{found['events']:,} events, {found['rows']:,} rows ({found['log_mib']:,} MiB)"]
    if len(found["threads"]) > 1:
        parts.append("encode with threads " + ", ".join(f"{n}: {s:.1f} s" for n, s in found["threads"].items()))
    for name in ("encode", "train"):
        if name in found:
            one = found[name]
            parts.append(f"{name} {one['seconds']:.0f} s, {one['peak_mib']:,} MiB ({one['own_mib']:,} own)")
    return "; ".join([*parts, f"encoded {found['encoded_mib']:,} MiB"])


if __name__ == "__main__":
    main()
