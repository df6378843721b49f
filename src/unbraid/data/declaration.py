"""What the user declares about their files: tables, columns and what they mean.  Nothing here reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from unbraid.data.text import DataError, Reads
from unbraid.types import BUILT_IN, FORBID, GAP, POSITION, Feature, Field, History, Task

SPLITS = ("train", "valid", "test")
LEAST_MB = 64  # of `Data.memory_mb`


@dataclass(frozen=True)
class Text:
    """How a table of text is written that is not CSV with a header.

    Args:
        table: its name, as in ``data.rows``, a join or an event source; a file of any suffix, or a glob.
        names: of its columns, in order, where the first line is data; empty: the first line names them.
        separator: one character between columns.

    Raises:
        ValueError: a name is empty or there twice, or ``separator`` is not one character.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    table: str
    names: tuple[str, ...] = ()
    separator: str = ","

    def __post_init__(self) -> None:
        if bad := sorted({n for n in self.names if not n or self.names.count(n) > 1}):
            raise ValueError(f"Text `{self.table}`: `names` should differ and not be empty. Found {bad}.")
        if len(self.separator.encode()) != 1:
            raise ValueError(f"Text `{self.table}`: `separator` should be one character. Found {self.separator!r}.")


@dataclass(frozen=True)
class Join:
    """Columns of another table, joined to the rows (and to event tables that have the key) by its unique key.

    Args:
        table: file, folder or glob under ``data.folder``.
        on: the key column of the rows.
        key: its name in the table; empty means ``on``.
        prefix: put before the names of the table's other columns, so that a table can be joined twice, and its ``name`` stand
            beside that of the rows.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    table: str
    on: str
    key: str = ""
    prefix: str = ""

    def named(self, columns: Iterable[str]) -> dict[str, str]:
        """Column of the table -> its name beside the rows.  Raises DataError when there is no key."""
        key = self.key or self.on
        if key not in (columns := list(columns)):
            raise DataError(f"Join of `{self.table}`: there is no column `{key}`. Columns: {', '.join(columns)}.")
        names = {name: self.on if name == key else self.prefix + name for name in columns}
        if len(set(names.values())) < len(names):
            raise DataError(
                f"Join of `{self.table}`: it has `{self.on}` beside its key `{key}`. Give a `prefix`, so that they differ."
            )
        return names


@dataclass(frozen=True)
class Events:
    """One source of the event table that histories are cut from.

    Args:
        columns: event field (or a name that only ``where`` of a history reads) -> column or SQL expression.  List
            columns are exploded together, oldest first.
        table: a file under ``data.folder``, or ``rows``: the rows themselves are events for later rows.
        where: SQL filter on the table's own columns.
        time: time column, empty for ``data.time``, ``none`` when the events have no time: they then precede every row
            and have an unknown gap.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    columns: Mapping[str, str]
    table: str = "rows"
    where: str = ""
    time: str = ""


@dataclass(frozen=True)
class Split:
    """Which rows train, validate and test.

    Args:
        kind: ``time`` (before ``valid_from``, before ``test_from``, the rest), ``column`` (a column that says train,
            valid or test), ``user`` (whole users by a seeded hash of their id), ``order`` (the last rows test, those before
            them validate: for a log in order of time that has no time; files of a table in order of their names), ``row``
            (rows by a seeded hash of their number) or ``file`` (files that say so by their names).
        valid_from, test_from: ISO dates or date-times (UTC unless they carry an offset), or numbers in the column's
            unit.
        train_from: for kind ``time``: earlier rows are in no split; they are events of later rows, and no more.
        column: for kind ``column``.
        valid, test: shares of users, or of rows for kinds ``order`` and ``row``; seed: of the hash.
        valid_files, test_files: for kind ``file``: a name or glob under ``data.folder``; the other files train.  Without
            ``valid_files`` a share ``valid`` of the training rows validates: whole users where there are users, else rows, by
            the hash.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    kind: Literal["time", "column", "user", "order", "row", "file"] = "user"
    valid_from: str | int = ""
    test_from: str | int = ""
    train_from: str | int = ""
    column: str = ""
    valid: float = 0.1
    test: float = 0.1
    seed: int = 0
    valid_files: str = ""
    test_files: str = ""

    def __post_init__(self) -> None:
        if self.kind == "time" and (self.valid_from == "" or self.test_from == ""):
            raise ValueError("A split by time needs `valid_from` and `test_from`.")
        if self.kind != "time" and self.train_from != "":
            raise ValueError(f"`train_from` is for a split by time. Found kind `{self.kind}`.")
        if self.kind == "column" and not self.column:
            raise ValueError("A split by column needs `column`.")
        if (self.kind == "file") != bool(self.test_files) or (self.valid_files and self.kind != "file"):
            raise ValueError(
                f"`test_files` and `valid_files` are of a split by `file`, which needs `test_files`. Found `{self.kind}`."
            )
        if self.kind in ("user", "order", "row", "file") and not (
            0 < self.valid and 0 < self.test and self.valid + self.test < 1
        ):
            raise ValueError(f"Shares should be positive and leave rows to train on. Found {self.valid}, {self.test}.")


@dataclass(frozen=True)
class Negatives:
    """Sampled negatives for a log that holds positives only.

    Every row is copied ``per_positive`` times with another item of the training split and all labels 0; columns that
    belong to the item should come from a join on it, so that they follow the new item.

    Args:
        item: the item column.
        per_positive: copies per row.
        sampling: ``uniform`` over the items or by ``popularity`` (their count in the training split).
        labels: columns set to 1 on the rows and 0 on the copies (created where missing).
        seed: of the draw.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    item: str
    per_positive: int = 4
    sampling: Literal["uniform", "popularity"] = "uniform"
    labels: tuple[str, ...] = ("label",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_positive < 1:
            raise ValueError(f"Parameter `per_positive` should be at least 1. Found {self.per_positive}.")


@dataclass(frozen=True)
class Data:
    """Everything that a run says about its data.

    Args:
        rows: the table whose rows are predicted: a file, a folder of files or a glob, Parquet or CSV.
        folder: where tables lie, relative to the run file; ``kuairand`` is the bundled log.
        keep: SQL filter on the rows.
        drop_duplicates: drop rows that equal an earlier row in every column.
        user, time, domain, weight, request: columns (or SQL expressions) with these roles; empty means there is none.
        exposure: columns (or SQL expressions) that say what was shown to whom (user and item): rows know how many rows before
            them, in order of time, agree in all of these.
        time_unit: of an integer time column.
        withhold: SQL over the rows' own columns (``site = 'new'``): where it holds, labels of the training and validation splits
            are not read, as if they were null, and none of any split is in a history; the test split still measures.
        text, joins, features, fields, events, histories, tasks, split, negatives: see their classes.
        cache: folder of encoded data; empty for the user's cache folder.
        memory_mb: how much encoding may hold beside the program itself; what is more is sorted on disk.  0:
            $UNBRAID_MEMORY_MB, else 2,048.
        appended: files will be added behind those of the rows and events: an encoded table keeps what the next goes on from.
    """

    __pydantic_config__: ClassVar[dict] = FORBID
    rows: str
    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    folder: str = ""
    keep: str = ""
    drop_duplicates: bool = False
    user: str = ""
    time: str = ""
    time_unit: Literal["s", "ms", "us", "ns"] = "ms"
    domain: str = ""
    weight: str = ""
    request: str = ""
    exposure: tuple[str, ...] = ()
    text: tuple[Text, ...] = ()
    joins: tuple[Join, ...] = ()
    fields: tuple[Field, ...] = ()
    events: tuple[Events, ...] = ()
    histories: tuple[History, ...] = ()
    split: Split = field(default_factory=Split)
    withhold: str = ""
    negatives: Negatives | None = None
    cache: str = ""
    memory_mb: int = 0
    appended: bool = False

    def __post_init__(self) -> None:
        self._require_names()
        self._require_ids()
        self._require_tasks()
        self._require_histories()
        self._require_roles()

    def _require_names(self) -> None:
        names = [f.name for f in self.features] + [h.name for h in self.histories]
        for what, found in (("feature or history", names), ("task", [t.name for t in self.tasks])):
            twice = sorted({n for n in found if found.count(n) > 1})
            if twice:
                raise ValueError(f"Each {what} should have its own name. Found twice: {', '.join(twice)}.")
        spaces = [f.vocab for f in self.features] + [f.vocab for f in self.fields] + [f.name for f in self.fields]
        odd = sorted({n for n in [*names, *(t.name for t in self.tasks), *spaces] if set(n) & set("./") or not n})
        if odd:
            raise ValueError(f"Names should not be empty or hold dots or slashes. Found {odd}.")
        if not self.tasks:
            raise ValueError("There should be at least one task (`[[data.tasks]]`). Found none.")
        if not names:
            raise ValueError("There should be at least one feature (`[[data.features]]`). Found none.")
        fields = {f.name for f in self.fields} | set(BUILT_IN)
        taken = sorted({f.name for f in self.fields} & {"user", "time", *BUILT_IN}) + sorted({GAP} & set(spaces))
        if taken or len(fields) < len(self.fields) + len(BUILT_IN):
            found = [f.name for f in self.fields]
            raise ValueError(
                f"Event fields should have names of their own, not user, time, gap or position. Found {found}."
            )
        if POSITION in spaces and any(POSITION in h.fields for h in self.histories):
            raise ValueError(
                "A history reads `position`, an event's rank, and a feature has a vocabulary of that name. Rename the feature."
            )
        for events in self.events:
            if set(events.columns) & {"user", "time"}:
                found = list(events.columns)
                raise ValueError(
                    f"Events of `{events.table}`: columns should not be called user or time. Found {found}."
                )

    def _require_ids(self) -> None:
        ids: tuple[Feature | Field, ...] = (*self.features, *self.fields)
        least = [(x.name, "min_count", x.min_count, 0) for x in ids] + [(x.name, "buckets", x.buckets, 0) for x in ids]
        for name, option, value, low in [*least, *((h.name, "length", h.length, 1) for h in self.histories)]:
            if value < low:
                raise ValueError(f"`{name}`: `{option}` should be at least {low}. Found {value}.")
        for x in ids:
            if x.min_count == 0 and not x.buckets:
                raise ValueError(f"`{x.name}`: with `min_count` 0 all values are hashed: set `buckets`. Found 0.")

    def _require_tasks(self) -> None:
        for i, task in enumerate(self.tasks):
            if task.given and task.given not in {t.name for t in self.tasks[:i] if t.kind == "binary"}:
                raise ValueError(
                    f"Task `{task.name}`: `given` should name a binary task above it. Found `{task.given}`."
                )
            rate = task.sampling_rate
            if rate != 1.0 and task.kind != "binary" or not isinstance(rate, str) and not 0 < rate <= 1:
                raise ValueError(
                    f"Task `{task.name}`: `sampling_rate` should be in (0, 1], of a binary task. Found {rate}."
                )
            if self.negatives and not task.given and task.source not in self.negatives.labels:
                raise ValueError(
                    f"Task `{task.name}`: sampled negatives would keep its `{task.source}`. Name it in `labels` of "
                    f"`data.negatives` ({', '.join(self.negatives.labels)})."
                )

    def _require_histories(self) -> None:
        fields = {f.name for f in self.fields} | set(BUILT_IN)
        for history in self.histories:
            unknown = set(history.fields) - fields
            if unknown or not history.fields:
                raise ValueError(
                    f"History `{history.name}`: `fields` should be among {sorted(fields)}. Found "
                    f"{list(history.fields)}."
                )
        if self.histories and not (self.user and self.time and self.events):
            raise ValueError("Histories need `data.user`, `data.time` and at least one `[[data.events]]`.")

    def _require_roles(self) -> None:
        alone = {"exposure": self.exposure, "negatives": self.negatives, "drop_duplicates": self.drop_duplicates}
        alone |= {f"split.kind = {self.split.kind}": self.split.kind == "order"}
        alone |= {f"kind = {f.kind} (feature `{f.name}`)": True for f in self.features if f.has_content}
        if self.appended and (found := [name for name, there in alone.items() if there]):
            raise ValueError(
                f"With `appended` each row is encoded by itself, and {', '.join(found)} reads others. Set one."
            )
        if self.memory_mb and self.memory_mb < LEAST_MB:
            raise ValueError(
                f"`memory_mb` should be at least {LEAST_MB}, or 0 for the default. Found {self.memory_mb}."
            )
        if self.exposure and (not self.time or self.negatives):
            raise ValueError("`exposure` needs `data.time`, and no sampled negatives: copies were shown to nobody.")
        if self.withhold and self.negatives:
            raise ValueError("`withhold` hides labels of the log, and sampled negatives make labels of their own.")
        if self.split.kind == "time" and not self.time:
            raise ValueError("A split by time needs `data.time`.")
        if self.split.kind == "user" and not self.user:
            raise ValueError("A split by user needs `data.user`. Use kind `column` for rows without users.")
        texts, named = [text.table for text in self.text], self.tables()
        if wrong := sorted({table for table in texts if table not in named or texts.count(table) > 1}):
            raise ValueError(f"`data.text` should describe tables among {named}, each once. Found {wrong}.")

    def tables(self) -> list[str]:
        """Names of the tables that it reads, sorted."""
        return sorted({self.rows, *(j.table for j in self.joins), *(e.table for e in self.events if e.table != "rows")})

    @property
    def reads(self) -> Reads:
        """How it reads columns of text, by name; columns inside SQL alone are what they seem to be."""
        bags = [f.source for f in self.features if f.kind == "bag"]
        ids = [f.source for f in self.features if f.kind == "id" or f.has_content]
        ids += [t.source for t in self.tasks if t.kind == "multiclass"]
        ids += [self.user, self.domain, self.request, *self.exposure, *(join.on for join in self.joins)]
        fields = {f.name for f in self.fields}
        ids += [source for e in self.events for name, source in e.columns.items() if name in fields]
        numbers = [f.source for f in self.features if f.kind == "number"] + [self.time, self.weight]
        numbers += [t.source for t in self.tasks if t.kind != "multiclass"] + [e.time for e in self.events]
        numbers += [t.sampling_rate for t in self.tasks if isinstance(t.sampling_rate, str)]
        return Reads(frozenset(ids) - {""}, frozenset(bags), frozenset(numbers) - {""})
