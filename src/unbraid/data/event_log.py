"""An event log as rows to predict: targets at fixed places from the end of each user's events, with sampled negatives.

The construction is that of the paper on DARE (Feng et al., "Long-Sequence Recommendation Models Need Decoupled
Embeddings", ICLR 2025, https://arxiv.org/abs/2410.02604), with the numbers of its published code.
Per user with enough events, in order of time: the last event tests, the one before validates, the third, eighth, ...
from the end train.  Each of these rows (label 1) is followed by copies with other items (label 0), drawn from all events,
so in proportion to how often an item occurs, training and test period alike.

Histories are not cut here.  ``rows.parquet`` carries user and time, ``events.parquet`` the events, and a run cuts the
history of a row strictly before its time.  Two things follow.  Events of the very instant of a row are not its history
(``ties="drop"``).  Where the log's clock is coarse (days), ``ties="file_order"`` makes times unique first: the n-th
event of an instant, in the order of the file, happens n nanoseconds later, and is history of the next one.

How this differs: histories strictly before the row by time, not by place; the number of negatives, the places and what is
rejected are parameters; the negatives of one target are different items.

What leaks, by the design of the paper: ``reject="ever"`` never draws an item that the user touched at any time, so an
item's absence among negatives tells of the user's future; item frequencies count events of the test period.
``reject="before"`` knows only what was known at the row's time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from unbraid.data import source as src
from unbraid.data.declaration import Data, Events, Split
from unbraid.data.source import DataError, Tables
from unbraid.data.text import Reads
from unbraid.data.vocabulary import canonical
from unbraid.types import BUILT_IN, Feature, Field, History, Task

RESERVED = ("user", "item", "time", "label", "split", *BUILT_IN)
FILES = ("rows.parquet", "events.parquet", "items.parquet", "run.toml")  # all that `write` ever writes
ROUNDS = 1000  # of redrawing rejected negatives: only users who touched almost everything need more


@dataclass(frozen=True)
class EventLog:
    """A table of events and what its columns mean.

    Args:
        table: file, folder or glob, Parquet or CSV.
        user, item, time: columns or SQL expressions.
        time_unit: of an integer time.
        fields: event field -> column or SQL expression (category, action ...).
        of_item: those fields that belong to the item: a negative carries the value of its own item.
        where: SQL filter on the table's columns.
    """

    table: str
    user: str
    item: str
    time: str
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    fields: Mapping[str, str] = field(default_factory=dict)
    of_item: tuple[str, ...] = ()
    where: str = ""

    def __post_init__(self) -> None:
        taken = sorted(set(self.fields) & set(RESERVED))
        if taken:
            raise ValueError(f"Event fields should have names other than {', '.join(RESERVED)}. Found {taken}.")
        if strange := sorted(set(self.of_item) - set(self.fields)):
            raise ValueError(f"`of_item` should name fields among {list(self.fields)}. Found {strange}.")


@dataclass(frozen=True)
class Targets:
    """Which events become rows, and how negatives are drawn.

    Args:
        least: users with fewer events are dropped (they still count in item frequencies).
        train: places of training targets, counted from the user's last event, which is 1; valid, test: of the others.
        negatives: per target.
        reject: items that are no negative of a row: those the user touches ``ever`` (reads the future: the paper's way),
            touched ``before`` the row or in its instant (so never the row's own item), or ``none``.
        ties: ``drop`` (the rest of a row's instant is not its history) or ``file_order`` (see the module's docstring).
        seed: of the draw.
    """

    least: int = 210
    train: tuple[int, ...] = tuple(range(3, 98, 5))
    valid: int = 2
    test: int = 1
    negatives: int = 2
    reject: Literal["ever", "before", "none"] = "ever"
    ties: Literal["drop", "file_order"] = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        places = [*self.train, self.valid, self.test]
        if not self.train or min(places) < 1 or len(set(places)) < len(places):
            raise ValueError(
                f"Places of targets should be different and at least 1, some for training. Found {places}."
            )
        if self.least < max(places):
            raise ValueError(f"`least` should be at least the farthest place, {max(places)}. Found {self.least}.")
        if self.negatives < 0 or self.seed < 0:
            raise ValueError(f"`negatives` and `seed` should not be negative. Found {self.negatives}, {self.seed}.")
        if self.reject not in ("ever", "before", "none"):
            raise ValueError(f"`reject` should be ever, before or none. Found {self.reject}.")
        if self.ties not in ("drop", "file_order"):
            raise ValueError(f"`ties` should be drop or file_order. Found {self.ties}.")


@dataclass(frozen=True)
class Prepared:
    """Tables to write and how a run reads them.

    Args:
        data: the declaration; its folder is that of the tables.
        tables: file name -> frame.
        lengths: (R,) for each row, how many events of its user are strictly before it; None: rows without users and events.
        notes: what a reader should know; training, model: what the run file says of them (`unbraid.train.Training`,
            `unbraid.config.ModelChoice`).
    """

    data: Data
    tables: Mapping[str, pl.DataFrame]
    lengths: np.ndarray | None
    notes: tuple[str, ...] = ()
    training: Any = None
    model: Any = None

    def facts(self) -> dict[str, Any]:
        """Users, events, rows and positives per split (of several tasks by task; of classes, labels), history lengths; what
        there is of these."""
        rows, tasks = self.tables["rows.parquet"], self.data.tasks
        sums = {t.name: pl.col(t.source).sum() if t.kind == "binary" else pl.col(t.source).count() for t in tasks}
        per_split = rows.group_by("split").agg(pl.len(), **sums)
        found = {row["split"]: row for row in per_split.rows(named=True)}
        counts = {name: found.get(name, {"len": 0, **{task.name: 0 for task in tasks}}) for name in src.SPLITS}
        ones = {name: {task.name: int(each[task.name] or 0) for task in tasks} for name, each in counts.items()}
        facts: dict[str, Any] = {
            "rows": {name: int(each["len"]) for name, each in counts.items()},
            "positives": ones if len(tasks) > 1 else {name: each[tasks[0].name] for name, each in ones.items()},
            "counted": "labelled" if tasks[0].kind == "multiclass" else "positive",
            "notes": list(self.notes),
        }
        if self.lengths is None:
            return facts
        history = {"median": float(np.median(self.lengths)), "max": int(self.lengths.max())}
        events = len(self.tables["events.parquet"])
        return {"users": rows["user"].n_unique(), "events": events, "history": history, **facts}


# --------------------------------------------------------------------------------------------------- events in order
class Ordered:
    """Events sorted by user, time and file order, and where each user's and each instant's events start.

    Args:
        frame: N events with columns ``user`` and ``time`` (no nulls), in file order.
    """

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame.sort("user", "time", maintain_order=True)
        changed = (self.frame["user"] != self.frame["user"].shift()).fill_null(True).to_numpy()
        self.start = np.flatnonzero(changed)  # (U,) first event of each user
        self.count = np.diff(self.start, append=len(frame))  # (U,)
        self.time = self.frame["time"].to_numpy()
        changed[1:] |= self.time[1:] != self.time[:-1]
        self.instant = np.maximum.accumulate(np.where(changed, np.arange(len(frame)), 0))  # (N,) first of its instant

    def kept(self, least: int) -> np.ndarray:
        """(U,) bool: users with so many events.  Raises DataError when there is none."""
        keep = self.count >= least
        if not keep.any():
            most = f"; the most active of {len(self.count):,} users has {self.count.max():,}" if len(self.count) else ""
            raise DataError(f"No user has {least:,} events{most}. Lower `least`.")
        return keep

    def events_of(self, keep: np.ndarray) -> pl.DataFrame:
        """The events of some users ((U,) bool)."""
        return self.frame.filter(pl.Series(np.repeat(keep, self.count)))


def read(log: EventLog, base: Path | None = None, tables: Tables | None = None) -> tuple[pl.DataFrame, float]:
    """The log's events in file order, and how many units of time make a second.

    Returns:
        A frame with user, item, time (int64) and the fields, ids as Int64, Float64 or String.

    Raises:
        DataError: the table or a column is not there, or an event has no user, item or time.
    """
    where = f"Event log `{log.table}`"
    reads = Reads(ids=frozenset({log.user, log.item, *log.fields.values()}), numbers=frozenset({log.time}))
    plan = src.scan("", log.table, base or Path(), tables, reads=reads)
    have = plan.collect_schema()
    if src.is_empty(plan, where):
        raise DataError(f"{where} holds no events.")
    if log.where:
        plan = plan.filter(src.expression(log.where, have, where))
        if src.is_empty(plan, where):
            raise DataError(f"{where}: `where` leaves none of its events. Found `{log.where}`.")
    columns = {}
    for name, source in {"user": log.user, "item": log.item, **log.fields}.items():
        expr, dtype = src.expression(source, have, where), src._dtype(source, have)
        if isinstance(dtype, pl.List | pl.Array | pl.Struct):
            raise DataError(f"{where}: `{source}` should hold one value per event. Found {dtype}.")
        columns[name] = canonical(expr, dtype)
    time, kind = src.expression(log.time, have, where), src._dtype(log.time, have)
    if kind.is_float():
        with src.reading(where):
            nans = plan.select(time.is_nan().sum()).collect(engine="streaming").item()
        src.refuse_float_time(time, kind, f"{where}: time `{log.time}`", nans, "where")
    columns["time"], per_second = src.to_time(time, kind, log.time_unit, f"{where}: time `{log.time}`")
    with src.reading(where):
        frame = plan.select(**columns).collect(engine="streaming")
    for name in ("user", "item", "time"):
        if nulls := frame[name].null_count():
            raise DataError(f"{where}: {nulls:,} events have no {name}. Leave them out with `where`.")
    return frame, per_second


def read_notes(log: EventLog, frame: pl.DataFrame, per_second: float) -> list[str]:
    """What a reader should know of the events of `read`."""
    notes = []
    times = frame["time"].to_numpy()
    reach = [src.iso(int(time), per_second) for time in (times.min(), times.max())]
    if odd := [time for time in reach if not src.plausible(time)]:
        notes.append(f"Times reach to {odd[-1]}. Is `time_unit` right? Found {src.UNIT_OF[per_second]}.")
    if double := len(frame) - frame.n_unique():
        notes.append(
            f"{double:,} of {len(frame):,} events equal another one in user, item, time and fields. They stay: each is a "
            "target or history of its own."
        )
    for name in log.of_item:
        changing = int((frame.group_by("item").agg(pl.col(name).n_unique())[name] > 1).sum())
        if changing:
            notes.append(
                f"Item field `{name}` has several values for {changing:,} items, so a negative carries that of one event. "
                f"If it belongs to the event, declare it with --field {name}={log.fields[name]} and not --item-field."
            )
    return notes


def unique_times(events: Ordered, per_second: float) -> pl.DataFrame:
    """The ordered events with times in nanoseconds that are unique per user: the n-th of an instant is n ns later.

    Raises:
        DataError: times that do not fit, or more events in an instant than nanoseconds until the next.
    """
    factor, time = int(1e9 / per_second), events.time
    if len(time) and max(abs(int(time.min())), abs(int(time.max()))) > 2**62 // factor:
        raise DataError("Times are too far from 1970 for `ties = file_order` (nanoseconds). Check `time_unit`.")
    fine = time * factor + (np.arange(len(time)) - events.instant)
    same_user = np.ones(len(time), dtype=bool)
    same_user[events.start] = False
    if (np.diff(fine, prepend=0)[same_user] <= 0).any():
        raise DataError("`ties = file_order`: an instant has more events than nanoseconds. Use `ties = drop`.")
    return events.frame.with_columns(time=pl.Series(fine))


# ---------------------------------------------------------------------------------------------------------- negatives
class Touched:
    """Which items each user touched, and when first: sorted (user, item) keys that are searched.

    Args:
        user: (N,) user numbers; item: (N,) codes below ``items``; time: (N,), ascending per user.
    """

    def __init__(self, user: np.ndarray, item: np.ndarray, time: np.ndarray, items: int) -> None:
        self.items = items
        self.keys, first = np.unique(user.astype(np.int64) * items + item, return_index=True)
        self.first = time[first]

    def by(self, user: np.ndarray, item: np.ndarray, limit: np.ndarray) -> np.ndarray:
        """(n,) bool: the user touched the item at time ``limit`` or earlier."""
        wanted = user.astype(np.int64) * self.items + item
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return (self.keys[place] == wanted) & (self.first[place] <= limit)


def draw_negatives(
    item: np.ndarray, touched: Touched | None, user: np.ndarray, limit: np.ndarray, copies: int, seed: int
) -> np.ndarray:
    """(n, copies) places of events whose items, different ones, are negatives of n targets.

    A uniform event is an item in proportion to its frequency; drawing the rejected again leaves the proportions among
    the items that are allowed.  So does drawing again what the target already has: each negative is in proportion among the
    items that are allowed and not yet taken.

    Args:
        item: (N,) item codes of the whole log.
        touched, user, limit: reject what the target's user ((n,) numbers) touched by the time ``limit`` ((n,)).

    Raises:
        DataError: after `ROUNDS` draws some target still lacks a negative.
    """
    rng = np.random.default_rng(seed)
    shape = len(user), copies
    drawn = rng.integers(0, len(item), len(user) * copies)
    user, limit = np.repeat(user, copies), np.repeat(limit, copies)
    todo = np.arange(len(drawn))
    for _ in range(ROUNDS):
        bad = _repeated(item[drawn].reshape(shape), todo)
        if touched is not None:
            bad |= touched.by(user[todo], item[drawn[todo]], limit[todo])
        todo = todo[bad]
        if not len(todo):
            return drawn.reshape(shape)
        drawn[todo] = rng.integers(0, len(item), len(todo))
    why = "their users touched almost every item, or there are fewer items than negatives"
    raise DataError(
        f"{len(todo):,} negatives were rejected {ROUNDS:,} times: {why}. Use `reject` before or none, or fewer negatives."
    )


def _repeated(item: np.ndarray, todo: np.ndarray) -> np.ndarray:
    """(t,) bool: which of the flat places ``todo`` (t,), ascending, hold an item that their row of ``item`` (n, copies) has
    elsewhere: at a place that is not to do, or at an earlier one that is."""
    copies = item.shape[1]
    if copies < 2:
        return np.zeros(len(todo), dtype=bool)
    rows, place = np.unique(todo // copies, return_inverse=True)
    new = np.zeros((len(rows), copies), dtype=bool)
    new[place, todo % copies] = True
    # of equal items, the settled ones stand first, then the earlier
    order = np.argsort(2 * item[rows].astype(np.int64) + new, axis=1, kind="stable")
    ranked = np.take_along_axis(item[rows], order, 1)
    twice = np.zeros_like(new)
    np.put_along_axis(twice, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
    return twice[place, todo % copies]


# --------------------------------------------------------------------------------------------------------- rows, events
def prepare_targets(
    log: EventLog, rule: Targets | None = None, *, length: int = 200, base: Path | None = None,
    tables: Tables | None = None,
) -> Prepared:  # fmt: skip
    """Rows and events of a log by the construction of the module's docstring.

    Args:
        length: of the run's history.

    Returns:
        Rows in the order of users and time, each target followed by its negatives: user, time, item, the item's fields,
        label, split.  Events of kept users, sorted: user, time, item, fields.

    Raises:
        DataError: see `read`, `Ordered.kept` and `draw_negatives`.
    """
    rule = rule or Targets()
    frame, per_second = read(log, base, tables)
    about = read_notes(log, frame, per_second)
    events = Ordered(frame)
    del frame
    if rule.ties == "file_order":
        events, per_second = Ordered(unique_times(events, per_second)), 1e9
    keep = events.kept(rule.least)
    places, words = _places(rule)
    at = ((events.start + events.count)[keep][:, None] - places).ravel()
    taken = _with_negatives(events, rule, keep, at, len(places))
    copies = rule.negatives + 1
    own = np.repeat(at, copies)
    rows = pl.concat(
        [events.frame.select("user", "time")[own], events.frame.select("item", *log.of_item)[taken.ravel()]],
        how="horizontal",
    ).with_columns(
        label=pl.Series(np.tile(np.arange(copies) == 0, len(at)).astype(np.int8)),
        split=pl.Series(np.tile(np.repeat(words, copies), int(keep.sum())), dtype=pl.Enum(src.SPLITS)),
    )
    tied = int((events.instant[at] < at).sum())
    user_start = np.repeat(events.start[keep], len(places))
    return Prepared(
        declare(log, per_second, length),
        {"rows.parquet": rows, "events.parquet": events.events_of(keep)},
        np.repeat(events.instant[at] - user_start, copies),
        notes=(*about, *_notes(rule, events, keep, tied, len(at))),
    )


def _places(rule: Targets) -> tuple[np.ndarray, list[str]]:
    """Places from the end, farthest first, and the split of each."""
    named = {**dict.fromkeys(rule.train, "train"), rule.valid: "valid", rule.test: "test"}
    places = sorted(named, reverse=True)
    return np.array(places), [named[place] for place in places]


def _with_negatives(events: Ordered, rule: Targets, keep: np.ndarray, at: np.ndarray, per_user: int) -> np.ndarray:
    """(n, 1 + negatives) places of the events whose items the rows carry; the first column is ``at`` (n,) itself."""
    item = (events.frame["item"].rank("dense") - 1).to_numpy()
    touched = None
    if rule.reject != "none" and rule.negatives:
        mine = np.repeat(keep, events.count)
        number = np.repeat(np.arange(keep.sum()), events.count[keep])
        touched = Touched(number, item[mine], events.time[mine], int(item.max()) + 1)
    user = np.repeat(np.arange(keep.sum()), per_user)
    limit = events.time[at] if rule.reject == "before" else np.full(len(at), np.iinfo(np.int64).max)
    return np.column_stack([at, draw_negatives(item, touched, user, limit, rule.negatives, rule.seed)])


def _notes(rule: Targets, events: Ordered, keep: np.ndarray, tied: int, targets: int) -> tuple[str, ...]:
    notes = []
    if out := int((~keep).sum()):
        notes.append(f"{out:,} of {len(keep):,} users have fewer than {rule.least:,} events and are left out.")
    if rule.negatives and rule.reject == "ever":
        notes.append(
            'Negatives are items that their user never touches, later included: reject = "before" does not look ahead.'
        )
    if tied:
        notes.append(
            f"{tied:,} of {targets:,} targets follow an event of the same instant, which is not in their history."
        )
    return tuple(notes)


def declare(log: EventLog, per_second: float, length: int) -> Data:
    """How a run reads the rows and events of `prepare_targets`."""
    unit: Any = src.UNIT_OF[per_second]
    fields = ("item", *log.fields)
    return Data(
        rows="rows.parquet",
        user="user",
        time="time",
        time_unit=unit,
        features=tuple(Feature(name) for name in ("item", *log.of_item)),
        fields=tuple(Field(name) for name in fields),
        events=(Events(columns={name: name for name in fields}, table="events.parquet"),),
        histories=(History("seen", fields=(*fields, *BUILT_IN), length=length),),
        tasks=(Task("click", column="label"),),
        split=Split(kind="column", column="split"),
    )


# -------------------------------------------------------------------------------------------------------------- writing
def check_folder(out: Path, overwrite: bool) -> None:
    """Raises DataError when the folder holds anything and may not be written to."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file. Name a folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise DataError(f"{out} is not empty. Name another folder, or use --overwrite (replaces {', '.join(FILES)}).")


def write(prepared: Prepared, out: Path, name: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the tables and a run file that trains on them, which comes last: a folder with it is whole.

    ``overwrite`` deletes `FILES` and nothing else.  Returns `Prepared.facts`.  Raises DataError as `check_folder`.
    """
    from unbraid import config
    from unbraid.encoders.attention import TargetAttention
    from unbraid.train import Training

    check_folder(out, overwrite)
    out.mkdir(parents=True, exist_ok=True)
    for file in reversed(FILES):
        (out / file).unlink(missing_ok=True)
    ids = tuple(f.name for f in prepared.data.features if f.kind == "id")
    usual = config.ModelChoice(history=TargetAttention()) if prepared.data.histories else config.ModelChoice()
    run = config.Run(
        name=name,
        data=prepared.data,
        baseline=ids,
        model=prepared.model or usual,
        training=prepared.training or Training(batch_size=2048, epochs=2.0),
    )
    for file, frame in prepared.tables.items():
        frame.write_parquet(out / file)
    (out / "run.toml").write_text(config.dumps(run))
    return prepared.facts()
