"""What a store holds as Parquet: the tables that a run reads, so that the next bundle is trained on what a service has seen.

Each table is a folder of Parquet files under its name in the run, in order of time, then user, then arrival: the order of ties
that the service's own histories have.  Memory is bounded whatever the store holds: users are read one by one into sorted runs
on the disk, and the runs are merged window by window.  A window begins at one (time, user) and ends at another; samples of the
runs' keys say where, so that each holds about as many events as a run.
"""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import polars as pl

from unbraid.data.events import NO_TIME
from unbraid.serve.kept import Kept, keeps_rows, noted
from unbraid.serve.rows import Types, each, series, widest
from unbraid.serve.store import Record, Store
from unbraid.store import atomic_folder, scratch

ABOUT = "export.json"  # what an export is; by this file it is known as one
CHUNK = 200_000  # events in memory
KEYS = ["__time", "__user", "__seq"]
Progress = Callable[[str, int, int], None]  # what, done, total


class ExportError(ValueError):
    """The store cannot be written as tables; the message says what to do."""


def export_events(
    store: Store, folder: str | Path, *, since: int | None = None, until: int | None = None, tables: Sequence[str] = (),
    overwrite: bool = False, chunk: int = CHUNK, progress: Progress = lambda what, done, total: None,
) -> dict[str, int]:  # fmt: skip
    """Write what a store holds into a new folder, which appears whole or not at all.

    Args:
        store: one that keeps whole rows (`unbraid.serve.kept`).
        since, until: from this time on, and before that one, in the run's unit; events without a time are always in it.
        tables: of the run's event tables; ``rows`` are its rows.  Empty: all.
        overwrite: an earlier export that is there goes; chunk: events in memory at once; progress: told of every user.

    Returns:
        Table -> events.

    Raises:
        ExportError: the store keeps less than rows, or has no such table or events.
        FileExistsError: the folder is there, and is no export that ``overwrite`` allows to go.
        StoreError: the store cannot be read.
    """
    folder = Path(folder)
    kept = _tables(store, tables)
    if since is not None and until is not None and since >= until:
        raise ExportError(f"`since` should be before `until`. Found {since:,} and {until:,}.")
    if overwrite and folder.exists() and any(folder.iterdir()) and not (folder / ABOUT).exists():
        raise FileExistsError(
            f"{folder} holds something else than an export; it is not deleted. Choose another folder."
        )
    with atomic_folder(folder, replace=overwrite) as place, scratch(place) as runs:
        written = {name: _Runs(runs / str(i), one.types, chunk) for i, (name, one) in enumerate(kept.items())}
        total = store.stats()["users"]
        for done, user in enumerate(store.users()):
            _sort_in(store.read(user).records, user, written, since, until)
            progress("reading users", done + 1, total)
        found = {name: one.finish() for name, one in written.items()}
        if not sum(found.values()):
            raise ExportError(_nothing(store, kept, since, until))
        for name, one in written.items():
            progress(f"writing {name}", 0, 0)
            _write(one, place, kept[name].name)
        about = {"since": since, "until": until, "tables": {n: {"name": kept[n].name, "rows": found[n]} for n in found}}
        (place / ABOUT).write_text(json.dumps(about, indent=1))
    return found


def _tables(store: Store, tables: Sequence[str]) -> dict[str, Kept]:
    """The tables that are asked for.  Raises ExportError."""
    if not keeps_rows(store):
        raise ExportError(
            "The store keeps what histories read, which is less than a row to train on. Fill a new one with "
            "`unbraid store import BUNDLE ADDRESS --keep rows`, and serve from that."
        )
    found = noted(store)
    if unknown := [name for name in tables if name not in found]:
        raise ExportError(f"The store has no table {', '.join(unknown)}. It has {', '.join(found) or 'none'}.")
    return {name: found[name] for name in tables or found}


def _sort_in(
    records: Sequence[Record], user: int, runs: Mapping[str, _Runs], since: int | None, until: int | None
) -> None:  # fmt: skip
    """A user's events, in order of time and arrival, to the runs of their tables."""
    for seq, record in enumerate(records):
        late = until is not None and record.time >= until
        early = since is not None and record.time < since
        if record.table in runs and (record.time == NO_TIME or not (late or early)):
            runs[record.table].add(user, seq, record)


def _nothing(store: Store, kept: Mapping[str, Kept], since: int | None, until: int | None) -> str:
    if not (events := store.stats()["events"]):
        return "The store holds no events."
    bounds = "".join(f" {word} {at:,}" for word, at in (("from", since), ("until", until)) if at is not None)
    return (
        f"The store holds {events:,} events, and none of {', '.join(kept)}{bounds}. Times are in the unit of the run."
    )


class _Runs:
    """Sorted runs of one table's events in a folder.

    Args:
        folder: for the runs; types: of the table; size: events of a run.
    """

    def __init__(self, folder: Path, types: Types, size: int) -> None:
        self.folder, self.types, self.size = folder, types, size
        self.fits = {
            name: True for name in types
        }  # whether all values are of the run's own type, and not only of a wider one
        self.waiting: list[tuple[int, int, Record]] = []
        self.rows: list[int] = []  # of each run
        folder.mkdir()

    def add(self, user: int, seq: int, record: Record) -> None:
        """One event; ``seq`` orders those of a user and time."""
        self.waiting.append((user, seq, record))
        if len(self.waiting) >= self.size:
            self._flush()

    def finish(self) -> int:
        """How many events there are."""
        self._flush()
        return sum(self.rows)

    def _flush(self) -> None:
        if not self.waiting:
            return
        users, seqs, records = zip(*self.waiting, strict=True)
        keys = {"__time": [r.time for r in records], "__user": users, "__seq": seqs}
        columns = [pl.Series(n, v, pl.UInt64 if n == "__user" else pl.Int64) for n, v in keys.items()]
        for name, kind in self.types.items():
            found = _column(name, [r.values.get(name) for r in records], kind)
            self.fits[name] = self.fits[name] and _fits(found, kind)
            columns.append(found)
        frame = pl.DataFrame(columns).sort(KEYS)
        frame.write_parquet(self.folder / f"{len(self.rows):06d}.parquet", row_group_size=max(1, self.size // 16))
        self.rows.append(len(frame))
        self.waiting.clear()

    def windows(self) -> Iterator[pl.DataFrame]:
        """All events in order, in frames of at most about twice a run; one without rows where there are none."""
        kinds = {n: kind if self.fits[n] else widest(kind) for n, kind in self.types.items()}
        if not self.rows:
            yield pl.DataFrame(schema=kinds)
            return
        plan, cuts = pl.scan_parquet(self.folder / "*.parquet"), self._cuts()
        for low, high in zip([None, *cuts], [*cuts, None], strict=True):
            inside = ([_from(low)] if low else []) + ([_before(high)] if high else [])
            frame = plan.filter(*inside).collect(engine="streaming").sort(KEYS)
            yield frame.select(pl.col(n).cast(kind) for n, kind in kinds.items())

    def _cuts(self) -> list[tuple[int, int]]:
        """Where windows end, as (time, user): a sample of every run's keys stands for as many events each."""
        stride = max(1, self.size // max(16, len(self.rows)))
        files = [self.folder / f"{i:06d}.parquet" for i in range(len(self.rows))]
        sample = pl.concat(
            pl.scan_parquet(f).select(KEYS[:2]).gather_every(stride).collect(engine="streaming") for f in files
        )
        ends = sample.sort(KEYS[:2]).gather_every(max(1, self.size // stride))[1:]
        return list(dict.fromkeys(ends.iter_rows()))


# the first part of each lets whole groups of rows be passed over
def _from(key: tuple[int, int]) -> pl.Expr:
    time, user = pl.col("__time"), pl.col("__user") >= pl.lit(key[1], dtype=pl.UInt64)
    return (time >= key[0]) & ((time > key[0]) | user)


def _before(key: tuple[int, int]) -> pl.Expr:
    time, user = pl.col("__time"), pl.col("__user") < pl.lit(key[1], dtype=pl.UInt64)
    return (time <= key[0]) & ((time < key[0]) | user)


def _column(name: str, values: list[Any], kind: Any) -> pl.Series:
    """Values of JSON in the widest type of their kind."""
    counted = kind in (pl.Date, pl.Datetime) and any(isinstance(value, int) for value in values)
    return series(name, values, widest(kind), each("event ", ""), "int" if counted else "")


def _fits(column: pl.Series, kind: Any) -> bool:
    with contextlib.suppress(pl.exceptions.PolarsError):
        column.cast(kind)
        return True
    return False


def _write(runs: _Runs, folder: Path, name: str) -> None:
    """A table's files under its name, which may be that of a file, a folder or a glob."""
    parts = PurePath(name).parts
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    if PurePath(name).is_absolute() or ".." in parts:
        raise ExportError(
            f"The run's table is `{name}`, outside of `data.folder`. Name it relative to that, and import again."
        )
    place = folder.joinpath(*parts[:plain])
    place.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(runs.windows()):
        frame.write_parquet(place / f"part-{i:06d}.parquet")
    if plain < len(parts) and not glob.glob(str(folder / name), recursive=True):
        raise ExportError(
            f"The run's table is `{name}`, which no file called part-000000.parquet matches. Use a folder's name."
        )
