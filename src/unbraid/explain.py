"""What pydantic says of a run file, in words: the place as it is written there, what was found, what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

SCALARS = {"int": "an integer", "str": "text", "float": "a number", "bool": "true or false"}


def explain(error: ValidationError, root: Any, where: str = "") -> str:
    """One line per mistake, after where: the path, what was found, what is allowed.

    Args:
        error: of pydantic; root: the dataclass that it was to make.
    """
    lines = []
    either: dict[tuple[str, str], list[str]] = {}  # (path, what was found) -> what it may be
    nested: dict[str, list[Any]] = {}  # list of lists -> what stands in the place of its lists
    for mistake in error.errors():
        path = _path(root, mistake["loc"])
        if mistake["type"] == "tuple_type" and mistake["loc"] and isinstance(mistake["loc"][-1], int):
            nested.setdefault(_path(root, mistake["loc"][:-1]), []).append(mistake["input"])
            continue
        if mistake["loc"] and mistake["loc"][-1] in SCALARS:  # of a union, which has a mistake per type
            of_path = either.setdefault((_path(root, mistake["loc"][:-1]), repr(mistake["input"])), [])
            of_path.append(SCALARS[str(mistake["loc"][-1])])
            continue
        if mistake["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            allowed = _allowed(root, mistake["loc"][:-1])
            lines.append(f"unknown key `{path}`.{_meant(mistake['loc'][-1], allowed)} Allowed: {', '.join(allowed)}.")
        elif mistake["type"] == "tuple_type":
            lines.append(f"`{path}` should be a list; of tables it is written `[[{path}]]`.")
        elif isinstance(mistake["input"], str) and mistake["input"] in _kinds(root, mistake["loc"]):
            lines.append(f'`{path}` is a table, whose `kind` says what it is: `{path}.kind = "{mistake["input"]}"`.')
        elif mistake["type"] == "union_tag_not_found":
            lines.append(f"`{path}` has no `kind`. Allowed: {', '.join(_kinds(root, mistake['loc']))}.")
        elif mistake["type"] == "union_tag_invalid":
            found = (mistake.get("ctx") or {}).get("tag")
            allowed = _kinds(root, mistake["loc"])
            lines.append(f"`{path}` has no kind `{found}`.{_meant(found, allowed)} Allowed: {', '.join(allowed)}.")
        else:
            found = f" Found {mistake['input']!r}." if not isinstance(mistake["input"], dict | list) else ""
            text = f"{mistake['msg'].removeprefix('Value error, ')}.{found}".replace("..", ".")
            lines.append(f"`{path}`: {text}" if path else text)
    lines += [f"`{path}` should be {' or '.join(types)}. Found {found}." for (path, found), types in either.items()]
    for path, found in nested.items():
        one = ", ".join(f'"{item}"' if isinstance(item, str) else str(item) for item in found)
        lines.append(f"`{path}` should be a list of lists, such as [[{one}]]. Found [{one}].")
    return (f"{where}: " if where else "") + "\n  ".join(lines)


def _meant(found: Any, allowed: Sequence[str]) -> str:
    """A guess at what a word should have been."""
    near = difflib.get_close_matches(str(found), allowed, 1)
    return f" Did you mean `{near[0]}`?" if near else ""


def _path(root: Any, loc: Sequence[Any]) -> str:
    """A path as it is written: without the kinds that say which member of a slot was read."""
    return ".".join(str(step) for at, step in enumerate(loc) if not _is_kind(step, _at(root, loc[:at])))


def _is_kind(step: Any, at: Any) -> bool:
    members = [] if dataclasses.is_dataclass(at) else _members(at)
    return len(members) > 1 and step in [getattr(member, "kind", None) for member in members]


def _allowed(root: Any, loc: Sequence[Any]) -> list[str]:
    """The keys of the dataclass at a path (union tags and list positions are steps of the path)."""
    at = _at(root, loc)
    return [f.name for f in dataclasses.fields(at)] if dataclasses.is_dataclass(at) else []


def _kinds(root: Any, loc: Sequence[Any]) -> list[str]:
    """The kinds of the slot at a path."""
    return [member.kind for member in _members(_at(root, loc)) if hasattr(member, "kind")]


def _at(root: Any, loc: Sequence[Any]) -> Any:
    at: Any = root
    for step in loc:
        if dataclasses.is_dataclass(at) and isinstance(step, str):
            hints = typing.get_type_hints(at, include_extras=False)
            at = hints.get(step, at)
        members = [m for m in _members(at) if dataclasses.is_dataclass(m)]
        tagged = [m for m in members if step == getattr(m, "kind", None)]
        at = (tagged or members or [at])[0] if tagged or len(members) == 1 else at
    return at


def _members(at: Any) -> list[Any]:
    args = typing.get_args(at)
    return [m for a in args for m in _members(a)] if args else [at]
