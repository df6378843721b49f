"""A report as JSON, and back.

What cannot be written is a remedy's run, an object: its run file stands in its place as ``toml``.  So `load` gives the report
without runs, and writing that gives the same text.  Numbers that are not finite become null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from unbraid.diagnosis import plots
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, Proof, Remedy, Report, Spent
from unbraid.report.words import run_file

FORMAT = 1  # raised when an older reader would misread


def dump(report: Report) -> str:
    """The report as JSON, indented, one final newline."""
    plain = {"format": FORMAT, **_plain(report)}
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def load(text: str) -> Report:
    """The report that `dump` wrote, its remedies with ``toml`` and without ``run``.

    Raises:
        ValueError: the text is no JSON, or none of a report of this format.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"A report should be a JSON object with `format` {FORMAT}. Found {kind!r}.")
    found.pop("format")
    try:
        found["diagnoses"] = tuple(_diagnosis(each) for each in found["diagnoses"])
        found["proofs"] = tuple(map(_proof, found["proofs"]))
        found["curve"] = tuple(found["curve"])
        return Report(**found)
    except (TypeError, KeyError) as error:
        raise ValueError(f"This is not the JSON of a report: {error}.") from error


def _diagnosis(found: dict[str, Any]) -> Diagnosis:
    evidence = dict(found["evidence"])
    if "plots" in evidence:
        evidence["plots"] = tuple(map(plots.from_plain, evidence["plots"]))
    return Diagnosis(**{**found, "evidence": evidence, "remedies": tuple(map(_remedy, found["remedies"]))})


def _remedy(found: dict[str, Any]) -> Remedy:
    measure = found["measure"]
    return Remedy(**{**found, "measure": None if measure is None else Measure(**measure)})


def _proof(found: dict[str, Any]) -> Proof:
    spent = {name: Spent(**found[name]) for name in ("spent_before", "spent_after")}
    return Proof(**{**found, **spent, "measure": Measure(**found["measure"])})


def _plain(value: Any) -> Any:
    """Values that JSON has; arrays and tensors as lists."""
    if isinstance(value, plots.Plot):
        return _plain(plots.to_plain(value))
    if isinstance(value, Remedy):
        parts = {part.name: getattr(value, part.name) for part in fields(value) if part.name != "run"}
        return _plain({**parts, "toml": run_file(value)})
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"A report should hold numbers, texts, arrays, lists and mappings. Found {type(value).__name__}.")
