"""Encoding a log of 1M and 10M events with histories of up to 10,000, and how soon and how fast it trains.

    python benchmarks/data_speed.py            # 1M and 10M events (100,000 users)
    python benchmarks/data_speed.py --quick    # 100,000 and 1M

The log is simulated into a temporary folder (Parquet): one user per 100 events, lognormal numbers of events, one user in
a thousand with 10,000; items and their authors by a Zipf law, four actions, 60 days.  A tenth of the events are rows,
too.  A row sees all events of its user before it, and, through a filter, those of one action.  Each step runs in a
process of its own on one thread, so that its peak memory is its own; files are warm (they were written just before).

Two baselines of the same run.  ``list_bytes``: the bytes of storing each row's histories as lists of the same small
codes, over those of events, positions and slices here (both counted exactly, nothing else of the row in either).
``polars_batch``: the time in which Polars builds the histories of 1,024 rows from the Parquet events (semi-join, join,
filter by time, one list per row, item ids only), over that of opening the encoded table and making a whole batch of them.

Above 1 ours is better.  Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, BATCH, DAYS = 10_000, 1024, 60
ITEMS, AUTHORS = 100_000, 20_000
START = 1_700_000_000_000  # ms
RUN = f"""
name = "data_speed"
[data]
rows = "rows.parquet"
user = "user"
time = "time"
features = [{{ name = "user" }}, {{ name = "item" }}, {{ name = "author" }}]
fields = [{{ name = "item" }}, {{ name = "author" }}, {{ name = "action" }}]
tasks = [{{ name = "click" }}, {{ name = "like" }}]
[[data.events]]
table = "events.parquet"
columns = {{ item = "item", author = "author", action = "action" }}
[[data.histories]]
name = "seen"
fields = ["item", "author", "action", "gap"]
length = {LENGTH}
[[data.histories]]
name = "liked"
fields = ["item"]
where = "action = 'like'"
length = {LENGTH}
[data.split]
kind = "time"
valid_from = {START + 50 * 86_400_000}
test_from = {START + 55 * 86_400_000}
[model.tower]
kind = "shared_bottom"
[model.history]
kind = "mean"
[training]
batch_size = {BATCH}
threads = 1
"""


# ----------------------------------------------------------------------------------- steps, each in a process of its own
def simulate(folder: Path, events: int) -> dict[str, Any]:
    """Write the event log, the rows and the run file."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)
    users = events // 100
    heavy = max(users // 1000, 1)
    weight = rng.lognormal(0, 1.5, users - heavy)
    counts = (weight * (events - heavy * LENGTH) / weight.sum()).clip(1, LENGTH).astype(np.int64)
    counts = np.concatenate([np.full(heavy, LENGTH), counts])
    ids = rng.choice(2**40, users)  # of the users; a rare double is one user with more events
    n = int(counts.sum())
    user = np.repeat(ids, counts)[rng.permutation(n)]
    popularity = np.cumsum(1 / np.arange(1, ITEMS + 1))
    item = np.searchsorted(popularity, rng.random(n) * popularity[-1]) * 7919 % (10 * ITEMS)
    author = rng.integers(0, AUTHORS, 10 * ITEMS)[item]
    action = pl.Series(["view", "like", "share", "follow"]).gather(rng.choice(4, n, p=[0.7, 0.2, 0.06, 0.04]))
    at = START + np.sort(rng.integers(0, DAYS * 86_400_000, n))
    log = pl.DataFrame({"user": user, "time": at, "item": item, "author": author, "action": action})
    log.write_parquet(folder / "events.parquet")
    shown = np.sort(rng.choice(n, n // 10, replace=False))
    rows = log[shown].drop("action").with_columns(
        click=pl.Series(rng.random(len(shown)) < 0.3).cast(pl.Int8),
        like=pl.Series(rng.random(len(shown)) < 0.05).cast(pl.Int8),
    )  # fmt: skip
    rows.write_parquet(folder / "rows.parquet")
    (folder / "run.toml").write_text(RUN)
    return {"events": n, "rows": len(rows), "users": users}


def encoding(folder: Path) -> dict[str, Any]:
    """Encode; seconds by stage and the peak of the process's memory."""
    from unbraid import config
    from unbraid.data.encode import encode

    run = config.load(folder / "run.toml")
    stages: list[tuple[str, float]] = []

    def progress(what: str, done: int, total: int) -> None:
        if not stages or stages[-1][0] != what:
            stages.append((what, time.perf_counter()))

    before, start = peak(), time.perf_counter()
    encode(run.data, folder, progress=progress)
    end = time.perf_counter()
    ends = [at for _, at in stages[1:]] + [end]
    spent = {what: round(stop - at, 3) for (what, at), stop in zip(stages, ends, strict=True)}
    return {"seconds": end - start, "stages": spent, "peak_mib": peak(), "imports_mib": before}


def reading(folder: Path) -> dict[str, Any]:
    """Bytes on disk, seconds to a first batch, speed of the next ones."""
    import numpy as np

    from unbraid import config
    from unbraid.data.encode import encode
    from unbraid.data.table import Encoded

    run = config.load(folder / "run.toml")
    start = time.perf_counter()
    place = encode(run.data, folder)
    found = time.perf_counter()
    table = Encoded(place)
    batches = table.shuffled(table.split("train"), BATCH, seed=0)
    next(batches)
    first = time.perf_counter() - found
    rows = values = 0
    start_next = time.perf_counter()
    for batch, _ in zip(batches, range(20), strict=False):
        rows += len(batch)
        values += sum(len(batch.features[h.name].rows) for h in run.data.histories)
    spent = time.perf_counter() - start_next
    batches.close()  # type: ignore[attr-defined]
    sizes = {name: c.nbytes for name, c in table.columns.items()}
    mine = ("event.", "view.", "start.", "end.")
    widths = {
        h.name: sum(1 if f == "gap" else table.columns[f"event.{f}"].itemsize for f in h.fields)
        for h in run.data.histories
    }
    lists = {h: (table.columns[f"end.{h}"] - table.columns[f"start.{h}"]).astype(np.int64) for h in widths}
    return {
        "find_s": found - start, "first_batch_s": first, "peak_mib": peak(),
        "batch_rows_per_s": rows / spent, "batch_events_per_s": values / spent,
        "column_bytes": sizes, "folder_bytes": sum(p.stat().st_size for p in place.rglob("*") if p.is_file()),
        "history_bytes": sum(size for name, size in sizes.items() if name.startswith(mine)),
        # per row and history one 8-byte offset, and its codes
        "list_bytes": sum(int(n.sum()) * widths[h] + 8 * len(n) for h, n in lists.items()),
        "mean_length": float(lists["seen"].mean()), "max_length": int(lists["seen"].max()),
    }  # fmt: skip


def lists_by_polars(folder: Path) -> dict[str, Any]:
    """Both histories of 1,024 rows as lists of items, from Parquet."""
    import polars as pl

    start = time.perf_counter()
    rows = pl.read_parquet(folder / "rows.parquet", columns=["user", "time"]).sample(BATCH, seed=0)
    rows = rows.with_row_index("row").rename({"time": "at"})
    events = pl.scan_parquet(folder / "events.parquet").select("user", "time", "item", "action")
    mine = events.join(rows.lazy().select("user"), on="user", how="semi").sort("user", "time", maintain_order=True)
    before = mine.join(rows.lazy(), on="user").filter(pl.col("time") < pl.col("at"))
    items = pl.col("item").tail(LENGTH)
    liked = pl.col("item").filter(pl.col("action") == "like").tail(LENGTH)
    lists = before.group_by("row", maintain_order=True).agg(items.alias("seen"), liked.alias("liked")).collect()
    assert len(lists) <= BATCH
    return {"seconds": time.perf_counter() - start}


def start_of_training(folder: Path) -> dict[str, Any]:
    """Seconds from the start of ``unbraid train`` until it says that its first step is done."""
    out = tempfile.mkdtemp(dir=folder)
    command = [
        sys.executable,
        "-m",
        "unbraid",
        "train",
        "run.toml",
        "--steps",
        "1",
        "--no-baseline",
        "--out",
        f"{out}/run",
    ]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "step 1/1" in line:
                seconds = time.perf_counter() - start
                process.kill()  # it would evaluate now
                return {"seconds": seconds}
    raise RuntimeError("".join(said))


STEPS = {f.__name__: f for f in (encoding, reading, lists_by_polars, start_of_training)}


def peak() -> float:
    """Peak memory of this process in MiB."""
    scale = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


# ---------------------------------------------------------------------------------------------------------- the whole
def step(name: str, folder: Path, *more: str) -> dict[str, Any]:
    """Run a step in a process of its own, on one thread."""
    one = {f"{what}_NUM_THREADS": "1" for what in ("OMP", "MKL", "OPENBLAS")}
    environment = {**os.environ, **one, "POLARS_MAX_THREADS": "1", "UNBRAID_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, "--step", name, "--folder", str(folder), *more]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(events: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Ratios and figures at one size."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = step("simulate", folder, "--events", str(events))
        made, read = step("encoding", folder), step("reading", folder)
        polars = step("lists_by_polars", folder)
        started = min(step("start_of_training", folder)["seconds"] for _ in range(3))
    n = size["events"]
    inside = {name: b / n for name, b in read["column_bytes"].items() if name.startswith(("event.", "view."))}
    figures = size | {
        "mean_length": read["mean_length"], "max_length": read["max_length"],
        "encode_s": made["seconds"], "encode_stages_s": made["stages"], "encode_events_per_s": n / made["seconds"],
        "encode_rows_per_s": size["rows"] / made["seconds"],
        "encode_peak_mib": made["peak_mib"], "imports_mib": made["imports_mib"],
        "bytes_per_event": sum(inside.values()), "bytes_per_event_by_column": inside,
        "folder_bytes_per_event": read["folder_bytes"] / n,
        "first_batch_s": read["first_batch_s"], "first_step_s": started,
        "batch_rows_per_s": read["batch_rows_per_s"], "batch_events_per_s": read["batch_events_per_s"],
        "read_peak_mib": read["peak_mib"], "polars_batch_s": polars["seconds"], "list_bytes": read["list_bytes"],
    }  # fmt: skip
    ratios = {
        "list_bytes": read["list_bytes"] / read["history_bytes"],
        "polars_batch": polars["seconds"] / read["first_batch_s"],
    }
    return ratios, figures


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100,000 and 1M events")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--events", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        found = simulate(options.folder, options.events) if options.events else STEPS[options.step](options.folder)
        print(json.dumps(found))
        return
    ratios, figures = {}, {}
    for events in (100_000, 1_000_000) if options.quick else (1_000_000, 10_000_000):
        better, found = measure(events)
        ratios |= {f"{name}.{events}": round(ratio, 2) for name, ratio in better.items()}
        figures[str(events)] = found
        show(found, better)
    print(json.dumps({"benchmark": "data_speed", "ratios": ratios, "figures": figures}))


def show(found: dict[str, Any], ratios: dict[str, float]) -> None:
    """Print one size."""
    lines = {
        "events": f"{found['events']:,} of {found['users']:,} users; {found['rows']:,} rows",
        "history of a row": f"{found['mean_length']:,.0f} events (most {found['max_length']:,})",
        "encode": f"{found['encode_s']:.1f} s, {found['encode_events_per_s']:,.0f} events/s, "
        f"{found['encode_rows_per_s']:,.0f} rows/s",
        "  by stage": ", ".join(f"{what} {s:.1f} s" for what, s in found["encode_stages_s"].items()),
        "  peak memory": f"{found['encode_peak_mib']:,.0f} MiB ({found['imports_mib']:,.0f} of imports)",
        "bytes per event": f"{found['bytes_per_event']:.2f}; whole folder {found['folder_bytes_per_event']:.2f}",
        "  by column": ", ".join(f"{name} {b:.2f}" for name, b in found["bytes_per_event_by_column"].items()),
        "  lists per row instead": f"{found['list_bytes']:,} bytes, {ratios['list_bytes']:.1f} times ours",
        "open to first batch": f"{found['first_batch_s']:.3f} s; by Polars from Parquet {found['polars_batch_s']:.3f} s",
        "process to first step": f"{found['first_step_s']:.2f} s",
        "batches": f"{found['batch_rows_per_s']:,.0f} rows/s, {found['batch_events_per_s']:,.0f} events/s, "
        f"peak memory {found['read_peak_mib']:,.0f} MiB",
    }
    print("\n".join(f"{name:<26}{text}" for name, text in lines.items()) + "\n", flush=True)


if __name__ == "__main__":
    main()
