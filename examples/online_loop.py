"""A service that goes on learning, by replay of the bundled log: what users do goes to the server's store, the store to Parquet,
each day's rows to the next bundle, and the server takes that up while it answers.  The live bundle beside the first one.

    python examples/online_loop.py --out loop
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import polars as pl
from sklearn.metrics import log_loss, roc_auc_score

from unbraid import config, recipes
from unbraid.data.declaration import Split
from unbraid.data.source import bundled
from unbraid.job import train
from unbraid.schedules.online import Online
from unbraid.serve.exporter import export_events
from unbraid.serve.importer import import_events
from unbraid.serve.ranker import Ranker
from unbraid.serve.store import open_store
from unbraid.train import Training

BATCH = 250  # impressions that are predicted before the outcome of any of them is known
LOCAL = 8 * 3_600_000  # of the log's days, in milliseconds


class Service:
    """The server's process, and a user who never stops asking."""

    def __init__(self, bundle: Path, store: Path, watch: Path, log: Path) -> None:
        command = [sys.executable, "-m", "unbraid", "serve", bundle, "--store", store, "--watch", watch, "--port", "0"]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=file, text=True)
        line = self.process.stdout.readline()
        if not line.startswith("serving"):
            raise SystemExit(log.read_text())
        self.port = int(line.split()[1].rpartition(":")[2])
        self.shape = self.ask("GET", "/schema")
        self.bundle, self.changed = self.shape["bundle"]["fingerprint"], 0.0
        self.asked, self.dropped, self.over = 0, [], threading.Event()

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.process.terminate()
        print(f"the server ended with {self.process.wait(30)}")

    def next_bundle(self, before: str) -> float:
        """Wait until another bundle answers; when it first did."""
        for _ in range(1_200):
            if self.bundle != before:
                return self.changed
            time.sleep(0.05)
        raise SystemExit(
            f"No other bundle answers within a minute; {self.log} says why. Unanswered: {self.dropped[:3]}"
        )

    def ask(self, method: str, path: str, body: object = None) -> dict:
        """The answer to a request; anything but 200 raises."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path} {answer.status}: {content[:300]!r}")
        return json.loads(content)

    def keep_asking(self, rows: list[dict]) -> None:
        """`/rank` again and again, through every exchange of bundles; what is not answered is counted."""
        columns = self.shape["columns"]
        while not self.over.wait(0.1):
            row = rows[self.asked % len(rows)]
            self.asked += 1
            try:
                candidates = [{name: row[name] for name in columns}]
                found = self.ask(
                    "POST", "/rank", {"user": row["user_id"], "time": row["time_ms"], "candidates": candidates}
                )
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                self.dropped.append(str(error))
                continue
            if found["bundle"] != self.bundle:
                self.bundle, self.changed = found["bundle"], time.time()


def run_on(folder: Path, rows: pl.DataFrame, **more: object) -> config.Run:
    """A run on tables in a folder; ``more``: since when rows are new, how they are read, the bundle to start from."""
    split = Split(kind="time", **cuts(rows), train_from=more.pop("train_from", ""))
    data = replace(recipes.kuairand(), folder=str(folder.resolve()), split=split)
    training = Training(batch_size=256, epochs=2, threads=1)
    return replace(recipes.shared_bottom(), name="loop", data=data, training=training, **more)


def cuts(rows: pl.DataFrame) -> dict[str, int]:
    """Where a day's last twentieths begin: one validates, and one tests, which the next day trains on."""
    times = rows["time_ms"]
    return {"valid_from": int(times[len(times) * 18 // 20]), "test_from": int(times[len(times) * 19 // 20])}


def read(rows: int) -> pl.DataFrame:
    """The bundled impressions as the run keeps them, in order of time, with their local day and an id."""
    data = recipes.kuairand()
    log = pl.scan_parquet(bundled("kuairand") / data.rows).filter(pl.sql_expr(data.keep)).unique(maintain_order=True)
    local = pl.from_epoch(pl.col("time_ms") + LOCAL, "ms").dt.date()
    log = log.with_columns(day=local).collect().filter(pl.col("day") >= pl.date(2022, 4, 25))  # 70 rows are earlier
    if rows:
        log = log.filter(pl.int_range(pl.len()).shuffle(0).over("day") < rows)
    return log.sort("time_ms", maintain_order=True).with_columns(id=pl.format("app-{}", pl.int_range(pl.len())))


def join(folder: Path) -> Path:
    """The tables that rows are joined with, beside them."""
    for name in ("users.parquet", "videos.parquet"):
        (folder / name).symlink_to(bundled("kuairand") / name)
    return folder


def serve_day(service: Service, frozen: Ranker, rows: pl.DataFrame) -> pl.DataFrame:
    """Predict impressions, live and frozen, then tell their outcomes, some at a time; predictions of clicks."""
    asked, told, found = list(service.shape["rows"]), list(service.shape["events"]["rows"]["columns"]), []
    for part in rows.iter_slices(BATCH):
        live = service.ask("POST", "/predict", {"rows": part.select(asked).to_dicts()})["predictions"]["click"]
        found.append(pl.DataFrame({"live": live, "frozen": frozen.predict(part)["click"], "click": part["is_click"]}))
        service.ask("POST", "/events", {"table": "rows", "events": part.select("id", *told).to_dicts()})
    return pl.concat(found)


def timed(work: Callable[..., object], *arguments: object, **options: object) -> float:
    """Seconds of a call."""
    began = time.monotonic()
    work(*arguments, **options)
    return time.monotonic() - began


def main(days: int, rows: int, first: int, steps: int, out: Path) -> None:
    log = read(rows)
    everyone = [part for _, part in log.group_by("day", maintain_order=True)]
    begun, coming = pl.concat(everyone[:first]), everyone[first : first + days]
    start, bundles = out / "start", out / "bundles"
    start.mkdir(parents=True)
    begun.drop("id", "day").write_parquet(join(start) / "impressions.parquet")
    (start / "history.parquet").symlink_to(bundled("kuairand") / "history.parquet")
    run = run_on(start, begun)
    if steps:
        run = replace(run, training=replace(run.training, steps=steps))
    seconds = timed(train, run, bundles / "first", baseline=False)
    print(f"first bundle: {first} days, {len(begun):,} rows, {seconds:.0f} s of training")
    print(f"{'day':10} {'rows':>6} {'AUC live':>9} {'frozen':>7} {'loss live':>10} {'frozen':>7} "
          f"{'export':>7} {'train':>6} {'reload':>7} {'asked':>6} {'dropped':>8}")  # fmt: skip
    with closing(open_store(out / "histories")) as store:
        import_events(run.data, store, keep="rows")
        with Service(bundles / "first", out / "histories", bundles, out / "serve.log") as service:
            frozen, last, since = Ranker(bundles / "first", store), bundles / "first", run.data.split.test_from
            asking = threading.Thread(target=service.keep_asking, args=(begun.head(500).to_dicts(),), daemon=True)
            asking.start()
            for today in coming:
                found, name, before = serve_day(service, frozen, today), str(today["day"][0]), service.bundle
                exported = timed(export_events, store, out / "days" / name)
                next_run = run_on(
                    join(out / "days" / name), today, init=str(last.resolve()), train_from=since,
                    schedule=Online(first=0, offset=8.0, frozen=False),
                )  # fmt: skip
                trained = timed(train, next_run, bundles / name, baseline=False)
                last, since = bundles / name, next_run.data.split.test_from
                reload = service.next_bundle(before) - (last / "weights.safetensors").stat().st_mtime
                auc = [roc_auc_score(found["click"], found[who]) for who in ("live", "frozen")]
                loss = [log_loss(found["click"], found[who]) for who in ("live", "frozen")]
                print(f"{name} {len(today):6,} {auc[0]:9.4f} {auc[1]:7.4f} {loss[0]:10.4f} {loss[1]:7.4f} {exported:6.1f}s "
                      f"{trained:5.1f}s {reload:6.1f}s {service.asked:6,} {len(service.dropped):8}", flush=True)  # fmt: skip
            service.over.set()
            asking.join()
    if service.dropped:
        raise SystemExit(f"{len(service.dropped)} requests were not answered: {service.dropped[:3]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=7, help="that are served, after the first ones")
    parser.add_argument("--first", type=int, default=7, help="that the first bundle is trained on")
    parser.add_argument("--rows", type=int, default=0, help="of a day, drawn; 0: all, some 8,000")
    parser.add_argument(
        "--steps", type=int, default=0, help="of the first bundle; 0: two passes. A later day is read once"
    )
    parser.add_argument("--out", type=Path, help="a new folder for everything [default: a temporary one]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(given.days, given.rows, given.first, given.steps, given.out or Path(temporary) / "loop")
