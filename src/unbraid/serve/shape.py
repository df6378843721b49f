"""What clients of a bundle must know: its tasks, its users, the columns that they send.  A bundle that follows must fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import polars as pl

Columns = Mapping[str, Any]  # name -> `unbraid.serve.ranker.Column`: its kind, whether it is required, an example


class Unread(NamedTuple):
    """A column that an earlier bundle asked for: clients go on sending it, and it is not read."""

    kind: str
    example: Any
    required: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a bundle is to its clients.

    Args:
        name: of its run; tasks: name -> kind; user: column of user ids.
        time: unit of times; empty where rows have no time.
        columns: of a candidate or the context of ``/rank``; rows: of a row of ``/predict``.
        sources: event table -> its columns.
    """

    name: str
    tasks: Mapping[str, str]
    user: Any
    time: str
    columns: Columns
    rows: Columns
    sources: Mapping[str, Columns]

    def after(self, old: Shape) -> Shape:
        """This shape for the clients of an earlier one: what they send more is allowed, and not read."""
        return dataclasses.replace(
            self,
            columns=_with(self.columns, old.columns),
            rows=_with(self.rows, old.rows),
            sources={table: _with(found, old.sources.get(table, {})) for table, found in self.sources.items()},
        )


def _with(new: Columns, old: Columns) -> Columns:
    return {**new, **{name: Unread(c.kind, c.example) for name, c in old.items() if name not in new}}


def misfits(new: Shape, old: Shape) -> list[str]:
    """Why clients of ``old`` would break on ``new``; empty: they do not."""
    found = []
    if new.user.kind != old.user.kind:
        found.append(f"user ids are {new.user.kind}, not {old.user.kind}: stored histories would not be found")
    if new.time != old.time:
        found.append(f"times are in {new.time or 'no unit'}, not {old.time or 'none'}: stored times would be misread")
    found += [
        f"task `{task}` is missing" if task not in new.tasks else f"task `{task}` is {new.tasks[task]}, not {kind}"
        for task, kind in old.tasks.items()
        if new.tasks.get(task) != kind
    ]
    found += _asked(new.columns, old.columns, "column") + _asked(new.rows, old.rows, "column")
    for table in (*new.sources, *(t for t in old.sources if t not in new.sources)):
        if table not in old.sources:
            found.append(f"events of `{table}` are read, which clients do not send")
        elif table not in new.sources:
            found.append(f"events of `{table}` are not read: what clients send would be lost")
        else:
            found += _asked(new.sources[table], old.sources[table], f"events of `{table}`: column")
    return list(dict.fromkeys(found))


def _asked(new: Columns, old: Columns, what: str) -> list[str]:
    """Columns that clients do not send, may leave out, or send with another type."""
    found = []
    for name, column in new.items():
        if name not in old:
            found.append(f"{what} `{name}` is asked for, which clients do not send")
        elif column.kind != old[name].kind:
            found.append(f"{what} `{name}` is {column.kind}, not {old[name].kind}")
        elif column.required and not old[name].required:
            found.append(f"{what} `{name}` is required, which clients may leave out")
    return found


def dtype_of(kind: str) -> Any:
    """The type of Polars that values of a kind (``int``, ``list[str]``) are first read as."""
    if kind.startswith("list["):
        return pl.List(dtype_of(kind[5:-1]))
    return {"int": pl.Int64, "float": pl.Float64, "str": pl.String, "bool": pl.Boolean}[kind]


def shape_of(ranker: Any) -> Shape:
    """The shape of a `unbraid.serve.ranker.Ranker`."""
    from unbraid.data.source import UNIT_OF

    run, reader = ranker.bundle.run, ranker.reader
    return Shape(
        name=run.name, tasks={task.name: task.kind for task in ranker.schema.tasks}, user=ranker.user,
        time=UNIT_OF[reader.per_second] if reader.time else "", columns=ranker.columns, rows=ranker.rows, sources=ranker.sources,
    )  # fmt: skip
