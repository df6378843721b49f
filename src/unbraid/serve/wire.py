"""Requests as types: made from the columns that a bundle asks for, so that what is checked and what OpenAPI says are one thing.

Requests are typed dictionaries, not models: names of columns are any text, and a candidate stays the mapping that a ranker
reads.  JSON is read by pydantic's parser, strictly: no text for a number, no NaN, no key that is not known.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Required

from pydantic import ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes that of `typing` from Python 3.12 on only

from unbraid.serve import arrow
from unbraid.serve.errors import ApiError

if TYPE_CHECKING:
    import polars as pl

    from unbraid.serve.shape import Columns, Shape

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
INT64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TYPES: Mapping[str, Any] = {"int": INT64, "float": float, "str": str, "bool": bool}


def type_of(kind: str) -> Any:
    """The type of a kind of column: one of `TYPES`, or ``list[KIND]``."""
    return list[type_of(kind[5:-1])] if kind.startswith("list[") else TYPES[kind]  # type: ignore[misc]


def typed(name: str, fields: Mapping[str, Any]) -> Any:
    """A strict typed dictionary of these fields."""
    make: Any = TypedDict  # names are of the bundle: nothing that a type checker could know
    made = make(name, dict(fields))
    made.__pydantic_config__ = STRICT
    return made


def _list(inner: Any) -> Any:
    return list[inner]


def _fields(columns: Columns, *, whole: bool) -> dict[str, Any]:
    """Fields of columns, which may be null: a missing value is information.  Not ``whole``: each may stand elsewhere."""
    return {
        name: (Required if whole and column.required else NotRequired)[
            Annotated[type_of(column.kind) | None, Field(examples=[column.example])]
        ]
        for name, column in columns.items()
    }


EXPLORE = typed("Explore", {
    "kind": Required[Annotated[Literal["thompson", "ucb"], Field(examples=["ucb"])]],
    "strength": NotRequired[Annotated[float, Field(ge=0, description="Deviations of ucb (2); factor of thompson's (1).")]],
    "seed": NotRequired[Annotated[int, Field(ge=0, lt=2**63, description="Of thompson's draw; none: another each time.")]],
})  # fmt: skip
RELOAD = typed("Reload", {
    "bundle": NotRequired[Annotated[str, Field(description="Its folder on the server; none: the present one again.")]],
})  # fmt: skip


class Wire:
    """The requests of one bundle.

    Args:
        shape: of the bundle; most: candidates, rows or events of one request.
    """

    def __init__(self, shape: Shape, most: int) -> None:
        self.most, self.rows = most, shape.rows
        many: Any = (Field(min_length=1, max_length=most), FailFast())
        asked = _fields(shape.columns, whole=False)  # of each, in the context or in all candidates
        self._known: dict[str, Sequence[str]] = dict.fromkeys(("candidates", "context"), list(asked))
        self._known["rows"] = list(shape.rows)
        self.id_keys = {table: "event_id" if "id" in found else "id" for table, found in shape.sources.items()}
        score = Field(max_length=1_000, description="Arithmetic over tasks; none: the first task.")
        time = Field(description=f"Now, in the unit of {shape.time or 'the run'}; none: the server's clock.")
        user = type_of(shape.user.kind)
        rank = {
            "user": Required[Annotated[user, Field(examples=[shape.user.example])]],
            "candidates": Required[Annotated[_list(typed("Candidate", asked)), *many]],
            "context": NotRequired[Annotated[typed("Context", asked), Field(description="What all candidates share.")]],
            "time": NotRequired[Annotated[INT64 | None, time]],
            "score": NotRequired[Annotated[str, score]],
            "top": NotRequired[Annotated[int, Field(ge=0, lt=2**31, description="So many best alone; 0: all.")]],
            "explore": NotRequired[EXPLORE | None],
        }  # fmt: skip
        row: Any = typed("Row", _fields(shape.rows, whole=True))
        self.rank = TypeAdapter(typed("Rank", rank))
        self.predict = TypeAdapter(typed("Predict", {"rows": Required[Annotated[_list(row), *many]]}))
        self.events = self._events(shape, many)
        self.reload = TypeAdapter(RELOAD)

    def _events(self, shape: Shape, many: Any) -> TypeAdapter[Any] | None:
        """One type per table, told apart by ``table``; None: the bundle reads no events."""
        types = []
        for i, (table, columns) in enumerate(shape.sources.items()):
            fields = _fields(columns, whole=True)
            own = Field(min_length=1, max_length=500, description="The event's own id: sent twice, it is kept once.")
            fields[self.id_keys[table]] = NotRequired[Annotated[str, own]]
            self._known[f"events {table}"] = list(fields)
            events = Required[Annotated[_list(typed(f"Event{i or ''}", fields)), *many]]
            types.append(typed(f"Events{i or ''}", {"table": Required[Literal[table]], "events": events}))  # type: ignore[valid-type]
        if len(types) < 2:
            return TypeAdapter(types[0]) if types else None
        union: Any = types[0]
        for one in types[1:]:
            union |= one
        return TypeAdapter(Annotated[union, Field(discriminator="table")])

    def read(self, kind: str, body: bytes) -> Any:
        """A request's mapping.

        Args:
            kind: ``rank``, ``predict``, ``events`` or ``reload``.

        Raises:
            ApiError: 400 where the body is no JSON; 422 where it is not this request; its field says where.
        """
        adapter = getattr(self, kind)
        if adapter is None:
            raise ApiError(422, "The bundle reads no events: its run has no histories.", "table")
        try:
            return adapter.validate_json(body)
        except ValidationError as error:
            raise self._refusal(error) from None

    def read_arrow(self, body: bytes) -> dict[str, pl.DataFrame]:
        """The request of ``/predict`` whose rows are a stream of Arrow.  Raises ApiError as `read` does."""
        return {"rows": arrow.read(body, self.rows, self.most)}

    def _refusal(self, error: ValidationError) -> ApiError:
        first = error.errors(include_url=False, include_context=False)[0]
        kind, place, said = first["type"], list(first["loc"]), first["msg"]
        if kind == "json_invalid":
            return ApiError(400, f"The body should be JSON. {said}.")
        table = ""
        if self.events is not None and len(self.id_keys) > 1 and place and place[0] in self.id_keys:
            table = str(place.pop(0))  # which type of the union was tried
        field = ".".join(map(str, place)) or ("table" if kind.startswith("union_tag") else "")
        if kind == "extra_forbidden":
            where = str(place[0])
            known = self._known.get(f"events {table or next(iter(self.id_keys), '')}" if where == "events" else where)
            allowed = f" Allowed: {', '.join(known)}." if known and len(place) > 1 else " See /schema."
            return ApiError(422, f"There is no such key.{allowed}", field)
        found = "" if kind in ("missing", "too_long") else f" Found {reprlib.repr(first['input'])}."
        return ApiError(422, f"{said}.{found}", field)

    def schemas(self) -> dict[str, TypeAdapter[Any]]:
        """Name of a request -> its type, for OpenAPI."""
        found = {"rank": self.rank, "predict": self.predict, "events": self.events, "reload": self.reload}
        return {name: adapter for name, adapter in found.items() if adapter is not None}
