"""A model that starts from what an earlier one knows: a bundle's weights, by what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from unbraid import sharding
from unbraid.bundle import Bundle, BundleError
from unbraid.data.dictionary import pieces
from unbraid.data.fitted import Fitted
from unbraid.model import Model
from unbraid.types import FIRST_VALUE, Schema


def warm_start(model: Model, fitted: Fitted, old: Bundle) -> dict[str, int]:
    """Copy what an earlier model knows: table rows by value, heads by domain, everything else by name.

    Returns:
        Counts: table rows copied and new; other tensors copied and new.

    Raises:
        BundleError: a tensor of one name has another shape in the two models, or a task's classes differ; or domains do,
            where they have tables or weights.
    """
    counts = {"rows copied": 0, "rows new": 0, "tensors copied": 0, "tensors new": 0}
    if not isinstance(old.model, Model):
        raise BundleError(
            f"Schedule `{old.run.schedule.kind}` makes several models. A run starts from a bundle of one."
        )
    _check(model, fitted, old)
    theirs, ours = old.model.state_dict(), model.state_dict()
    digits, apart = _growing(model, old.model), sharding.parts(model)
    with torch.no_grad():
        for key, table in ours.items():
            source = _same_place(key, fitted.schema, old.fitted.schema)
            if source not in theirs:
                counts["tensors new"] += 1
            elif key.startswith("embeddings."):
                if table.shape[1] != theirs[source].shape[1]:
                    raise BundleError(
                        f"{key} is {table.shape[1]} wide; in the bundle to start from {theirs[source].shape[1]}."
                    )
                part = apart.get(key)
                size = part.rows if part is not None else len(table)
                counts["rows new"] += size
                for here, there in _matching_rows(fitted, old.fitted, key.split("/")[1], size):
                    counts["rows copied"] += len(here)
                    counts["rows new"] -= len(here)
                    _copy_rows(table, theirs[source], here, there, part)
            elif key in digits and table.shape[1] == theirs[source].shape[1]:
                digits[key].take(theirs[source])
                counts["tensors copied"] += 1
            elif table.shape != theirs[source].shape:
                raise BundleError(
                    f"{key} is {tuple(table.shape)}, in the bundle to start from {tuple(theirs[source].shape)}. "
                    f"A warm start needs the same model."
                )
            else:
                table.copy_(theirs[source])
                counts["tensors copied"] += 1
    return counts


def _check(model: Model, fitted: Fitted, old: Bundle) -> None:
    """Raise BundleError where classes, or domains that have tables or weights, are others."""
    for name, classes in fitted.schema.classes.items():
        if name in old.fitted.schema.classes and old.fitted.schema.classes[name] != classes:
            raise BundleError(
                f"Task `{name}` has classes {classes}; the bundle to start from has {old.fitted.schema.classes[name]}."
            )
    by_code = hasattr(model.tower, "reads_domain") or any(
        getattr(m, "reads_domain", False) for m in model.extra_heads.values()
    )
    if by_code and fitted.schema.domains != old.fitted.schema.domains:
        raise BundleError(
            "Tables or weights per domain can start only from a bundle with the same domains in the same order."
        )


def _copy_rows(
    table: torch.Tensor, old: torch.Tensor, here: torch.Tensor, there: torch.Tensor, part: sharding.Part | None
) -> None:  # fmt: skip
    """Rows ``there`` of the old table to rows ``here`` of the new one, of which this process may have a part alone."""
    if part is not None:
        mine = (here >= part.start) & (here < part.start + len(part))
        here, there = here[mine] - part.start, there[mine]
    table[here] = old[there]


def _growing(model: Model, old: Model) -> dict[str, Any]:
    """Key of a weight whose shape follows the training data, in both models -> the module that can ``take`` the old one."""
    found: dict[str, Any] = {}
    for name, module in model.numbers.items():
        if hasattr(module, "growing") and name in old.numbers:
            parts = cast(Any, module).growing(old.numbers[name])
            found |= {f"numbers.{name}.{key}": part for key, part in parts.items()}
    return found


def _same_place(key: str, new: Schema, old: Schema) -> str:
    """A per-domain head's name in the old model: its domain may have had another code there."""
    if not key.startswith("heads."):
        return key
    parts = next((name for name in (".linears.", ".towers.") if name in key), "")
    if not parts:
        return key
    head, _, rest = key.partition(parts)
    code, _, part = rest.partition(".")
    name = new.domains[int(code)]  # one head for all domains is number 0 in both
    return f"{head}{parts}{old.domains.index(name)}.{part}" if name in old.domains else ""


def _matching_rows(
    new: Fitted, old: Fitted, vocabulary: str, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Rows of the new table and of the old one that mean the same value, some at a time."""
    if vocabulary not in new.vocabularies:  # a fixed table, such as time gaps
        both = torch.arange(min(size, old.schema.sizes.get(vocabulary, 0)))
        yield both, both
        return
    if vocabulary not in old.vocabularies:
        return
    ours, theirs = new.vocabularies[vocabulary], old.vocabularies[vocabulary]
    if ours.values.dtype != theirs.values.dtype:
        raise BundleError(
            f"Vocabulary `{vocabulary}` holds {ours.values.dtype}; in the bundle to start from {theirs.values.dtype}."
        )
    yield torch.arange(FIRST_VALUE), torch.arange(FIRST_VALUE)
    code = FIRST_VALUE
    for piece in pieces(theirs.values):
        codes = torch.from_numpy(ours.encode(piece).astype(np.int64))
        known = codes >= FIRST_VALUE
        yield codes[known], known.nonzero()[:, 0] + code
        code += len(piece)
    if ours.buckets and ours.buckets == theirs.buckets:
        each = torch.arange(ours.buckets)
        yield ours.size - ours.buckets + each, theirs.size - theirs.buckets + each
