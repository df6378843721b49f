"""Encode a log once: vocabularies and scales from the training split, then one pass that writes integer columns.

The result is a folder of plain binary columns that `unbraid.data.table` maps into memory, named by a fingerprint of the
declaration, the files and the fitted state, so that a second run reuses it.  Everything is written beside its final
name and renamed at the end: an interrupted encode leaves nothing that a later run could take for whole, and the next one goes on
with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from unbraid.adapters.frames import in_polars, lazy
from unbraid.data import appended, vocabulary
from unbraid.data.ahead import ahead
from unbraid.data.columns import Columns, InMemory
from unbraid.data.contents import Writer
from unbraid.data.counting import refuse_bad_numbers
from unbraid.data.declaration import LEAST_MB, Data
from unbraid.data.events import write_events
from unbraid.data.exposure import earlier, keys_of
from unbraid.data.fit import (
    Progress,
    content_expression,
    fit,
    id_values,
    ids_of,
    no_progress,
    number_expression,
)
from unbraid.data.fitted import Fitted
from unbraid.data.labels import LabelChecks
from unbraid.data.source import (
    SPLIT,
    DataError,
    Tables,
    _dtype,
    check_joins,
    expression,
    files_of,
    kept_rows,
    label_expression,
    reading,
    root_of,
    rows_plan,
    to_time,
    with_split,
)
from unbraid.data.spill import AHEAD, Room, pieces
from unbraid.data.text import holds_whole_numbers, whole_numbers
from unbraid.data.vocabulary import canonical, canonical_type
from unbraid.store import Journal, resumable_folder, sync
from unbraid.types import Feature

MEMORY_MB = 2048
SHARE = (1 << 20) // 5  # bytes per MB that one sorter holds: sorting and merging take some five times that
FORMAT = 6  # raise it when the folder's layout, the meaning of a column or a default of the declaration changes
CHUNK, WIDTH = 200_000, 8  # rows that are read at once, fewer of more columns
KEYS = "keys"  # a column that is there while a table is written


def cache_folder(data: Data) -> Path:
    """Where encoded data lie: ``data.cache``, else $UNBRAID_CACHE, else the user's cache folder."""
    if data.cache:
        return Path(data.cache)
    users = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("UNBRAID_CACHE") or users / "unbraid")


def fingerprint(
    data: Data, base: Path, tables: Tables | None, fitted: Fitted | None = None, grow: Fitted | None = None
) -> str:
    """Names the encoded folder: declaration, files (name, size, time of change), in-memory tables, fitted state."""
    declared = declared_of(_anywhere(data))
    sources: list[Any] = []
    for name in data.tables():
        if tables and name in tables:
            frame = lazy(tables[name], f"Table `{name}`").collect()
            rows = hashlib.sha256(frame.hash_rows(0).to_numpy().tobytes()).hexdigest()
            sources.append((name, frame.shape, str(frame.schema), rows))
        else:
            stats = [(str(p.resolve()), p.stat()) for p in files_of(data.folder, name, base)]
            sources.append((name, [(p, s.st_size, s.st_mtime_ns) for p, s in stats]))
    if any(f.has_content for f in data.features):
        sources.append(str(root_of(data, base)))  # of paths in tables in memory, too
    state = [f.digest() if f else "" for f in (fitted, grow)]
    text = json.dumps([FORMAT, declared, sources, *state], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _anywhere(data: Data) -> Data:
    """Without what changes nothing of a table."""
    return dataclasses.replace(data, cache="", memory_mb=0)


def declared_of(part: Any) -> Any:
    """A declaration without what is as by default, so that a key that is new in unbraid makes no table anew."""
    if isinstance(part, list | tuple):
        return [declared_of(one) for one in part]
    if isinstance(part, Mapping):
        return {str(name): declared_of(one) for name, one in part.items()}
    if not dataclasses.is_dataclass(part):
        return part
    said = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value != made or type(value) is not type(made):
            said[field.name] = declared_of(value)
    return said


def encode(
    data: Data, base: Path = Path(), *, tables: Tables | None = None, fitted: Fitted | None = None,
    grow: Fitted | None = None, progress: Progress = no_progress,
) -> Path:  # fmt: skip
    """Encode the rows, or find them encoded.

    Args:
        data: the declaration; base: the folder it is relative to; tables: in-memory tables by name.
        fitted: use a trained model's vocabularies and scales instead of fitting.
        grow: a model to start from: its vocabulary values stay.

    Returns:
        The folder, for `unbraid.data.table.Encoded`.

    Raises:
        DataError: for anything in the data that contradicts the declaration.
        OSError: the disk is full; nothing half-written remains.
    """
    tables = in_polars(tables)
    final = cache_folder(data) / fingerprint(data, base, tables, fitted, grow)
    if (final / "columns.json").exists():
        return final
    try:
        with reading(f"The rows `{data.rows}`"), resumable_folder(final) as (folder, journal):
            with room_of(data, folder, journal) as room:
                if "written" not in journal.noted:
                    check_joins(data, base, tables)
                    _make(data, base, tables, fitted, grow, folder, room, progress)
                    if journal.worth():
                        journal.note(written=True)
    except OSError as error:
        if (final / "columns.json").exists():  # another process was faster
            return final
        free = shutil.disk_usage(next(f for f in final.absolute().parents if f.is_dir())).free
        why = f"Cannot write the encoded table {final}: {error.strerror or error}. {free:,} bytes are free there"
        cure = "Free some, or set `data.cache` or $UNBRAID_CACHE to another disk."
        raise OSError(error.errno, f"{why}. {cure}") from error
    return final


def _make(
    data: Data, base: Path, tables: Tables | None, fitted: Fitted | None, grow: Fitted | None, folder: Path, room: Room,
    progress: Progress,
) -> None:  # fmt: skip
    """Fit and write a table, from where the journal says that an earlier process was."""
    journal = room.journal
    if "fitted" in journal.noted:
        state = Fitted.load(folder)
    else:
        (fitted or fit(data, base, tables, grow, progress, room)).save(folder)
        if journal.worth():
            for path in (folder / "vocabularies").iterdir():
                sync(path)
            journal.note(fitted=True)
        state = Fitted.load(folder)  # a dictionary of many values lay among what was counted
        shutil.rmtree(room.folder, ignore_errors=True)  # what was counted
    grows = data.appended and not tables
    if grows:
        said = json.dumps([FORMAT, declared_of(_anywhere(data))], sort_keys=True, default=str)
        name = appended.family(data, base, tables, state, said)
        files = appended.files_read(data, base, joined=False)
        if "rows" not in journal.noted:
            appended.go_on(folder.parent, folder, name, files, journal)
    write(data, base, tables, state, folder, room, teach=not (fitted or grow), progress=progress)
    if grows:
        appended.keep(folder, name, files, journal)


@contextlib.contextmanager
def room_of(data: Data, folder: Path, journal: Journal | None = None) -> Iterator[Room]:
    """Where an encode may spill, below its folder, and how much it holds: ``data.memory_mb``, else $UNBRAID_MEMORY_MB.

    Raises DataError when that is no number.
    """
    given = os.environ.get("UNBRAID_MEMORY_MB", "")
    if not data.memory_mb and given and not (given.isdecimal() and int(given) >= LEAST_MB):
        raise DataError(f"$UNBRAID_MEMORY_MB should be a number of MB, at least {LEAST_MB}. Found {given!r}.")
    memory = data.memory_mb or int(given or MEMORY_MB)
    yield Room(folder / "spill", int(memory * SHARE), journal or Journal())
    for part in (folder / "spill").glob("*"):  # not after an interruption
        if not (data.appended and part.name == appended.EVENTS):
            shutil.rmtree(part)
    with contextlib.suppress(OSError):  # there is none, or what is kept is in it
        (folder / "spill").rmdir()


def encode_query(
    data: Data, query: pl.LazyFrame, fitted: Fitted, folder: Path, base: Path = Path(), *,
    tables: Tables | None = None, progress: Progress = no_progress,
) -> None:  # fmt: skip
    """Encode other rows for a trained model into an empty folder: every row, no split, labels where there are any.

    What the model knows is not written: `unbraid.data.table.Encoded` takes it beside the folder.  Histories come from the
    declared event sources; the query's own rows are no events.
    """
    with reading("The rows to predict"):
        check_joins(data, base, tables)
        with room_of(data, folder) as room:
            write(data, base, tables, fitted, folder, room, query=query, progress=progress)


# ------------------------------------------------------------------------------------------------------- write (pass 2)
def write(
    data: Data, base: Path, tables: Tables | None, fitted: Fitted, folder: Path, room: Room, *,
    query: pl.LazyFrame | None = None, teach: bool = False, progress: Progress = no_progress,
) -> None:  # fmt: skip
    """One pass over the rows, one over each event source, into ``folder``.

    Args:
        query: rows to predict instead of the declared ones.
        teach: raise when the training split cannot teach a task; one that is known already may have one class alone.
    """
    plan = rows_plan(data, base, tables, query)
    schema, labels = plan.collect_schema(), query is None
    total = _number_of_rows(data, base, tables, query)
    per_second, checks = 1.0, LabelChecks(data, fitted.schema)
    exprs = row_expressions(data, schema, labels)
    if "time" in exprs:
        _, per_second = to_time(pl.lit(0), _dtype(data.time, schema), data.time_unit, f"Column `{data.time}`")
    shown = [f"exposure.{i}" for i in range(len(data.exposure)) if labels]
    root = root_of(data, base)
    journal, before = room.journal, room.journal.noted.get("rows", {"done": 0, "columns": {}, "seen": []})
    done, whole = before["done"], before.get("whole", False)
    contents = [] if whole else [(place, f) for place, f in enumerate(data.features) if f.has_content]
    writers = {f.name: Writer(folder, place, f, root) for place, f in contents}
    checks.restore(before["seen"])

    def note(**more: Any) -> None:
        rows = {"done": done, "columns": columns.state(), "seen": checks.state(), **more}
        journal.note(fitted=True, rows=rows)  # `fitted` may have been too quick to be noted

    with contextlib.closing(Columns(folder, before["columns"])) as columns:
        progress("encoding rows", done, total)
        # pictures and texts are numbered as they come
        several = partial(ahead, limit=room.limit // AHEAD) if not writers else map
        encoded = partial(
            _encoded, data=data, fitted=fitted, checks=checks, labels=labels, writers=writers, shown=shown
        )
        for frame, arrays in () if whole else several(encoded, chunks(plan.select(**exprs), done)):
            for name, values in arrays.arrays.items():
                columns.append(name, values)
            if labels:
                checks.count(frame)
            done += len(frame)
            progress("encoding rows", done, total)
            if journal.due() and not writers:  # what is known of pictures and texts is in memory
                note()
        if not whole:
            if shown:
                _count_exposures(columns, room)
            for writer in writers.values():
                writer.finish(progress)
            if teach:
                checks.finish()
            if journal.worth() or (data.appended and journal.path):
                note(whole=True)
        if data.histories:
            users = canonical_type(_dtype(data.user, schema))
            write_events(
                data, base, tables, fitted, columns, users, per_second, progress, room, partial(note, whole=True)
            )
        if shown:
            columns.drop(KEYS)
        columns.describe(rows=total, per_second=per_second, root=str(root))


def _encoded(
    frame: pl.DataFrame, data: Data, fitted: Fitted, checks: LabelChecks, labels: bool, writers: Mapping[str, Writer],
    shown: Sequence[str],
) -> tuple[pl.DataFrame, InMemory]:  # fmt: skip
    """A chunk of rows, and its columns."""
    arrays = InMemory()
    write_rows(frame, data, fitted, arrays, checks, labels, writers)
    if shown:
        arrays.append(KEYS, keys_of([frame[name] for name in shown]))
    return frame, arrays


def _count_exposures(columns: Columns, room: Room) -> None:
    """Once all keys are written: rows of one key are in any order and any chunk."""
    keys_and_times = zip(pieces(columns.read(KEYS)), pieces(columns.read("time")), strict=True)
    for counts in earlier(keys_and_times, room):
        columns.append("exposure", counts)


def _number_of_rows(data: Data, base: Path, tables: Tables | None, query: pl.LazyFrame | None) -> int:
    """Of `rows_plan`, without joining and without drawing negatives.  Raises DataError when there are none."""
    plan = kept_rows(data, base, tables) if query is None else query
    if query is None and data.split.train_from != "":
        plan = with_split(plan, data)
    copies = 1 + data.negatives.per_positive if data.negatives and query is None else 1
    total = copies * plan.select(pl.len()).collect(engine="streaming").item()
    if not total:
        raise DataError("There are no rows" + (" to predict." if query is not None else f" in `{data.rows}`."))
    return total


def chunks(plan: pl.LazyFrame, start: int = 0) -> Iterator[pl.DataFrame]:
    """The plan's rows from a number on, in order, a chunk at a time."""
    size = CHUNK * WIDTH // max(WIDTH, len(plan.collect_schema()))
    plan = plan.slice(start) if start else plan
    for frame in plan.collect_batches(chunk_size=max(size, 1), maintain_order=True, engine="streaming"):
        if len(frame):
            yield frame


def row_expressions(data: Data, schema: Mapping[str, Any], labels: bool) -> dict[str, pl.Expr]:
    """Everything that is read from a row, by encoded name."""
    exprs: dict[str, pl.Expr] = {}
    needed = ("domain", "user", "time") if data.histories else ("domain",)  # of rows to predict
    for f in data.features:
        if f.kind == "id":
            exprs[f"feature.{f.name}"] = id_values(f, schema)
        elif f.kind == "number":
            exprs[f"feature.{f.name}"] = number_expression(f, schema)
        elif f.kind == "vector":
            exprs[f"feature.{f.name}"] = expression(f.source, schema, f"Feature `{f.name}`").cast(pl.List(pl.Float32))
        elif f.has_content:
            exprs[f"feature.{f.name}"] = content_expression(f, schema)
        else:
            lists, kind = ids_of(f, schema)
            exprs[f"feature.{f.name}"] = lists.cast(pl.List(canonical_type(kind.inner)))
    for role, source in (("domain", data.domain), ("request", data.request), ("user", data.user)):
        if source and (labels or role in needed or _available(source, schema)):
            exprs[role] = canonical(expression(source, schema, f"data.{role}"), _dtype(source, schema))
    if data.time and (labels or "time" in needed or _available(data.time, schema)):
        exprs["time"], _ = to_time(
            expression(data.time, schema, "data.time"),
            _dtype(data.time, schema),
            data.time_unit,
            f"Column `{data.time}`",
        )
    if data.weight and (labels or _available(data.weight, schema)):
        exprs["weight"] = expression(data.weight, schema, "data.weight").cast(pl.Float32)
    for task in data.tasks:
        if not labels and not _available(task.source, schema):
            continue
        expr = label_expression(data, task, schema)
        kind = _dtype(task.source, schema)
        if task.kind != "multiclass" and not (kind.is_numeric() or kind in (pl.Boolean, pl.Null)):
            what = "0 or 1 (null where not known)" if task.kind == "binary" else "numbers"
            raise DataError(
                f"Task `{task.name}`: labels of `{task.source}` should be {what}. Found {kind}. Use kind `multiclass`, "
                "or an SQL expression."
            )
        exprs[f"label.{task.name}"] = canonical(expr, kind) if task.kind == "multiclass" else expr.cast(pl.Float64)
        if isinstance(task.sampling_rate, str):
            rate = expression(task.sampling_rate, schema, f"Sampling rate of task `{task.name}`")
            exprs[f"rate.{task.name}"] = rate.cast(pl.Float32)
    for i, source in enumerate(data.exposure if labels else ()):
        exprs[f"exposure.{i}"] = canonical(expression(source, schema, "data.exposure"), _dtype(source, schema))
    if labels:
        exprs["split"] = pl.col(SPLIT).cast(pl.Int8)
    return exprs


def _available(source: str, schema: Mapping[str, Any]) -> bool:
    if source in schema:
        return True
    try:
        return set(pl.sql_expr(source).meta.root_names()) <= set(schema)
    except Exception:
        return False


def write_rows(
    frame: pl.DataFrame, data: Data, fitted: Fitted, columns: Columns | InMemory, checks: LabelChecks, labels: bool,
    writers: Mapping[str, Writer],
) -> None:  # fmt: skip
    """Encode and append one chunk of rows; ``writers``: of pictures and texts, by feature."""
    for f in data.features:
        column = frame[f"feature.{f.name}"]
        if f.kind == "id":
            columns.append(f"feature.{f.name}", codes_of(fitted, f.vocab, column, f"Feature `{f.name}`"))
        elif f.kind == "number":
            values = column.to_numpy()  # a null becomes NaN
            with np.errstate(over="ignore"):
                single = values.astype(np.float32)
            refuse_bad_numbers(f, int(np.isnan(single).sum()) - column.null_count(), int(np.isinf(single).sum()))
            columns.append(f"feature.{f.name}", values)
        elif f.kind == "vector":
            columns.append(f"feature.{f.name}", _vectors(f, column, fitted.schema.widths[f.name]))
        elif f.has_content:
            columns.append(f"feature.{f.name}", writers[f.name].codes(column))
        else:
            inner = column.explode(empty_as_null=False, keep_nulls=False)
            columns.append(f"feature.{f.name}", codes_of(fitted, f.vocab, inner, f"Feature `{f.name}`"))
            columns.append(f"length.{f.name}", column.list.len().fill_null(0).to_numpy().astype(np.int32))
    if data.domain:
        columns.append("domain", codes_of(fitted, "domain ", frame["domain"], "data.domain"))
    for role in ("user", "request"):
        if role in frame.columns:
            hashes = vocabulary.stable_hash(frame[role])  # a user of 0 is none
            if role == "request":  # below 0 is none
                hashes = np.where(frame[role].is_null().to_numpy(), ~np.uint64(0), hashes >> np.uint64(1))
            columns.append(role, hashes.view(np.int64))
    if "time" in frame.columns:
        if frame["time"].null_count():
            raise DataError(f"Column `{data.time}`: {frame['time'].null_count():,} rows have no time.")
        columns.append("time", frame["time"].to_numpy())
    if "weight" in frame:
        weight = frame["weight"]
        if weight.null_count() or not bool((weight.is_finite() & (weight >= 0)).all()):
            raise DataError(f"Column `{data.weight}`: weights should be finite and not negative, without nulls.")
        columns.append("weight", weight.to_numpy())
    for task in data.tasks:
        if f"label.{task.name}" in frame:
            columns.append(f"label.{task.name}", checks.encode(task, frame[f"label.{task.name}"]))
        if f"rate.{task.name}" in frame:
            columns.append(f"rate.{task.name}", checks.rate(task, frame[f"rate.{task.name}"]))
    if labels:
        columns.append("split", frame["split"].to_numpy())


def codes_of(fitted: Fitted, name: str, values: pl.Series, where: str) -> np.ndarray:
    """Codes of a column.  Raises DataError when its type is not that of the vocabulary: nothing would match."""
    known = fitted.vocabularies[name]
    if values.null_count() == len(values):
        values = values.cast(known.values.dtype)
    words = known.values.dtype == pl.String and known.buckets and not len(known.values)  # any text is hashed
    if values.dtype == pl.Int64 and (words or holds_whole_numbers(known.values)):  # numbers are what they are as text
        values = values.cast(pl.String)
    if values.dtype == pl.String and known.values.dtype == pl.Int64 and (len(known.values) or known.buckets):
        values = whole_numbers(values)  # of a file that has words among them now: they are unknown
    if values.dtype != known.values.dtype and (len(known.values) or known.buckets):
        raise DataError(
            f"{where}: its values are {values.dtype}; those of the training split are {known.values.dtype}."
        )
    if values.dtype == pl.Float64 and values.is_nan().any():
        raise DataError(f"{where}: {int(values.is_nan().sum()):,} ids are NaN. Write nulls for missing ids.")
    return known.encode(values)


def _vectors(feature: Feature, column: pl.Series, width: int) -> np.ndarray:
    lengths = column.list.len()
    wrong = int((lengths.drop_nulls() != width).sum())
    if wrong:
        raise DataError(
            f"Feature `{feature.name}`: vectors should have length {width}. Found others in {wrong:,} rows."
        )
    out = np.zeros((len(column), width), dtype=np.float32)  # a null vector is zeros
    flat = column.drop_nulls().explode()
    if flat.null_count() or not np.isfinite(flat.to_numpy()).all():
        finite = np.isfinite(flat.fill_null(float("nan")).to_numpy()).reshape(-1, width).all(1)
        raise DataError(
            f"Feature `{feature.name}`: vectors should hold finite numbers. Found nulls, NaN or infinity in "
            f"{int((~finite).sum()):,} rows. Write null for the whole vector where there is none, which reads as zeros, or leave "
            "those rows out with `data.keep`."
        )
    out[~column.is_null().to_numpy()] = flat.to_numpy().reshape(-1, width)
    return out
