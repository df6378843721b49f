"""What a model says of rows whether they have labels or not: class confusion above its floor, and predicted rates.

Paper: "Minimum Class Confusion for Versatile Domain Adaptation", Jin, Wang, Long, Wang, ECCV 2020, for the confusion
(`unbraid.losses.mcc`).

Losses without labels move predictions towards certainty, and on a rare binary task that can mean positives that are not there:
classes count alike in them, however rare one is.  So look at what is predicted before and after.  No label is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from unbraid.losses.mcc import class_confusion, floor
from unbraid.selection.rows import log_probabilities
from unbraid.types import Finding, Schema, Scores, Task

ALL = "all domains"


def confusion(scores: Scores, schema: Schema, temperature: float = 2.5) -> Finding:
    """Class confusion of each binary and multiclass task, in each domain and in all.

    Args:
        scores: predictions of N rows; their labels are not read.
        temperature: as in `unbraid.losses.mcc.MCC`.

    Returns:
        task -> domain -> ``rows``, ``confusion`` (of these rows as one batch), ``floor`` (the least that so many rows allow) and
        ``above_floor``, their difference.
    """
    values: dict[str, dict[str, Any]] = {}
    for task, name, rows in _slices(scores, schema):
        logits = torch.from_numpy(np.asarray(scores.logits[task.name])[rows]).double()
        found, least = float(class_confusion(logits, temperature)), floor(len(rows), max(schema.outputs(task), 2))
        cell = {"rows": len(rows), "confusion": found, "floor": least, "above_floor": found - least}
        values.setdefault(task.name, {})[name] = cell
    above = {task: round(parts[ALL]["above_floor"], 4) for task, parts in values.items()}
    return Finding(
        "class confusion", values, "share of a class's predicted mass that lies on other classes, mean over classes",
        f"Above the floor, in all domains: {above}. Total doubt and one class for all rows are both the most there can be.",
        "0 above the floor: every class has rows that are sure of it and no others; 1 - 1/C is the most.",
        "The loss `mcc` on rows without labels.",
    )  # fmt: skip


def rates(before: Scores, after: Scores, schema: Schema) -> Finding:
    """Predicted rates of binary tasks by two models on the same rows, in each domain and in all.

    Args:
        before, after: predictions of the same N rows, by a model without and by one with a loss on rows without labels.

    Returns:
        task -> domain -> ``rows``, mean probabilities ``before`` and ``after``, their ``ratio``, and the shares of rows that
        are called positive (p of at least .5), ``called_before`` and ``called_after``.

    Raises:
        ValueError: the rows are not the same.
    """
    if not np.array_equal(before.row, after.row):
        raise ValueError("Predicted rates are compared on the same rows in the same order. Found others.")
    values: dict[str, dict[str, Any]] = {}
    for task, name, rows in _slices(before, schema):
        if task.kind != "binary":
            continue
        p, q = (np.exp(log_probabilities(np.asarray(s.logits[task.name])[rows])[:, 1]) for s in (before, after))
        cell = {"before": float(p.mean()), "after": float(q.mean()), "ratio": float(q.mean() / p.mean())}
        called = {"called_before": float((p >= 0.5).mean()), "called_after": float((q >= 0.5).mean())}
        values.setdefault(task.name, {})[name] = {"rows": len(rows), **cell, **called}
    ratios = {task: round(parts[ALL]["ratio"], 3) for task, parts in values.items()}
    return Finding(
        "predicted rates", values, "mean predicted probability",
        f"Rates after over rates before, in all domains: {ratios}.",
        "1 where the rate of the target is that of the source; what it truly is, only labels say.",
        "If a rare task's rate rose, leave it out of the loss (`tasks`), lower the loss's weight, or calibrate on labelled rows.",
    )  # fmt: skip


def _slices(scores: Scores, schema: Schema) -> Iterator[tuple[Task, str, np.ndarray]]:
    """Binary and multiclass tasks, domains (all first), and their rows (n,)."""
    for task in schema.tasks:
        if task.kind == "real" or task.name not in scores.logits:
            continue
        yield task, ALL, np.arange(len(scores.row))
        for code in np.unique(scores.domain):
            yield task, scores.domains[code], np.flatnonzero(scores.domain == code)
