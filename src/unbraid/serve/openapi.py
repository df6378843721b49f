"""The service as OpenAPI 3.1, with the columns and examples of the bundle that answers now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, Required

from pydantic import Field, TypeAdapter

from unbraid.serve import arrow
from unbraid.serve.wire import typed

if TYPE_CHECKING:
    from unbraid.serve.engine import Loaded
    from unbraid.serve.shape import Columns

PLACE = "#/components/schemas/{model}"
Values = dict[str, list[float] | list[list[float]]]
BUNDLE = Annotated[str, Field(description="Fingerprint of the bundle that answered.", examples=["0123456789abcdef"])]
ERROR = typed("Error", {"error": Required[typed("Refused", {
    "field": Required[Annotated[str, Field(description="Where in the request; empty: it is not about one place.")]],
    "message": Required[str],
    "request": Required[Annotated[str, Field(description="The request's id, as in the log.")]],
})]})  # fmt: skip
ANSWERS: Mapping[str, Any] = {
    "rank": typed("Ranked", {
        "bundle": Required[BUNDLE],
        "order": Required[Annotated[list[int], Field(description="Places among the candidates, best first.")]],
        "score": Required[Annotated[list[float], Field(description="Of these, in this order.")]],
        "predictions": Required[Annotated[Values, Field(description="Task -> of these, in this order.")]],
        "events": Required[Annotated[int, Field(description="Events of the user that were read.")]],
        "degraded": Required[Annotated[str, Field(description="Why histories were empty; empty: they were not.")]],
    }),
    "predict": typed("Predicted", {"bundle": Required[BUNDLE], "predictions": Required[Values]}),
    "events": typed("Kept", {"new": Required[int], "known": Required[Annotated[int, Field(description="Sent before.")]]}),
    "reload": typed("Reloaded", {"bundle": Required[BUNDLE], "name": NotRequired[str]}),
}  # fmt: skip
DELETED = typed("Deleted", {"deleted": Required[Annotated[int, Field(description="Events that were removed.")]]})
SAID = {
    400: "The body is not JSON.", 401: "The token is missing or wrong.", 403: "The service has no token.",
    408: "The body came too slowly.", 409: "The bundle does not fit; the old one goes on.", 413: "The body is too long.",
    415: "The body is not JSON by its head.", 422: "The request is not as it should be; `field` says where.",
    500: "The service failed.", 503: "Too busy, too slow, or the store is away: try again.", 507: "The store is full.",
}  # fmt: skip
BODY = (400, 408, 413, 415, 422, 500, 503)
FAILS = {"rank": BODY, "predict": BODY, "events": (*BODY, 507), "reload": (*BODY, 401, 403, 409)}
SUMMARY = {
    "rank": "Order one user's candidates", "predict": "Predict rows of any users",
    "events": "Append events; they are in the store when this is answered", "reload": "Exchange the bundle",
}  # fmt: skip
ARROW = {arrow.MEDIA: {"schema": {
    "type": "string", "format": "binary", "description": "A stream of Arrow, not compressed: the rows' columns, flat or lists.",
}}}  # fmt: skip
ARROW_ANSWER = {arrow.MEDIA: {"schema": {
    "type": "string", "format": "binary", "description": "Where `Accept` names it: a column per task; `X-Bundle` has the bundle.",
}}}  # fmt: skip
SECURITY: list[dict[str, list[str]]] = [{"token": []}]


def openapi(loaded: Loaded, arrow_rows: bool) -> dict[str, Any]:
    """The document; ``arrow_rows``: whether rows may come as Arrow."""
    types = [(name, "validation", one) for name, one in loaded.wire.schemas().items()]
    types += [
        (name, "serialization", TypeAdapter(one))
        for name, one in (*ANSWERS.items(), ("delete", DELETED), ("error", ERROR))
    ]  # type: ignore[arg-type]
    schemas, shared = TypeAdapter.json_schemas(types, ref_template=PLACE)  # type: ignore[arg-type]
    error = schemas["error", "serialization"]

    def route(name: str, fails: tuple[int, ...]) -> dict[str, Any]:
        found = {str(status): {"description": SAID[status], "content": _json(error)} for status in sorted(fails)}
        content = _json(schemas[name, "serialization"]) | (ARROW_ANSWER if name == "predict" else {})
        return {"200": {"description": "Done.", "content": content}} | found

    paths: dict[str, Any] = {}
    for name in loaded.wire.schemas():
        content = _json(schemas[name, "validation"], example(name, loaded)) | (
            ARROW if arrow_rows and name == "predict" else {}
        )
        paths[f"/{name}"] = {"post": {
            "operationId": name, "summary": SUMMARY[name], "responses": route(name, FAILS[name]),
            "requestBody": {"required": True, "content": content}, **({"security": SECURITY} if name == "reload" else {}),
        }}  # fmt: skip
    parameter = {"name": "user", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    paths["/users/{user}"] = {"delete": {
        "operationId": "delete", "summary": "Remove everything of a user", "parameters": [parameter], "security": SECURITY,
        "responses": route("delete", (401, 403, 422, 500, 503, 507)),
    }}  # fmt: skip
    for name, text in (("schema", "What the bundle asks for"), ("health", "The process answers"),
                       ("ready", "Bundle and store answer"), ("metrics", "For Prometheus")):  # fmt: skip
        away = {"503": {"description": SAID[503], "content": _json(error)}} if name == "ready" else {}
        paths[f"/{name}"] = {
            "get": {"operationId": name, "summary": text, "responses": {"200": {"description": text}, **away}}
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"unbraid: {loaded.shape.name}", "version": loaded.fingerprint},
        "paths": paths,
        "components": {"schemas": shared.get("$defs", {}), "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip


def _json(schema: Any, example: Any = None) -> dict[str, Any]:
    return {"application/json": {"schema": schema, **({} if example is None else {"example": example})}}


def example(kind: str, loaded: Loaded) -> dict[str, Any]:
    """A request of a kind that the bundle answers."""
    shape = loaded.shape
    if kind == "rank":
        return {"user": shape.user.example, "candidates": [_values(shape.columns)], "top": 10}
    if kind == "predict":
        return {"rows": [_values(shape.rows)]}
    if kind == "events":
        table = next(iter(shape.sources))
        return {"table": table, "events": [{loaded.wire.id_keys[table]: "one", **_values(shape.sources[table])}]}
    return {}


def _values(columns: Columns) -> dict[str, Any]:
    return {name: column.example for name, column in columns.items()}
