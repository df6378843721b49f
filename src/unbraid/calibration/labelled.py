"""The rows that a calibrator may learn from: labelled ones of the source, features alone of the target."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from unbraid.calibration.density import Support, density_ratio
from unbraid.types import Scores, Task

Array = np.ndarray


class Labelled(NamedTuple):
    """Rows of one task whose label is known: (n,) or (n, K) logits, (n,) labels, (n,) weights, all float64 (classes int64)."""

    logits: Array
    labels: Array
    weight: Array


def labelled(scores: Scores, task: Task) -> Labelled:
    """The observed rows of positive weight; where negatives were sampled, one that was kept weighs 1/rate.

    Raises:
        ValueError: the task is real, or no row is labelled, or (binary) all labels are equal.
    """
    kind_of(task, ("binary", "multiclass"))
    keep = _counted(scores, task)
    if not len(keep):
        raise ValueError(
            f"Task `{task.name}` has no labelled row to calibrate on. Give some that did not train the model (`--held-out`)."
        )
    logits = np.asarray(scores.logits[task.name])[keep].astype(np.float64)
    labels = np.asarray(scores.labels[task.name])[keep]
    weight = np.ones(len(keep)) if scores.weight is None else np.asarray(scores.weight, np.float64)[keep]
    if task.kind == "multiclass":
        return Labelled(logits, labels.astype(np.int64), weight)
    if labels.min() == labels.max():
        raise ValueError(
            f"Task `{task.name}` has {len(keep):,} labelled rows to calibrate on, all labelled {labels[0]:g}. Both labels are "
            "needed."
        )
    rate = scores.meta.get(f"sampling_rate.{task.name}")
    if rate is not None:
        weight = np.where(labels > 0, weight, weight / np.asarray(rate, np.float64)[keep])
    return Labelled(logits, labels.astype(np.float64), weight)


def kind_of(task: Task, allowed: tuple[str, ...], instead: str = "") -> None:
    """Raises ValueError when the task is of another kind; ``instead`` says what to do."""
    if task.kind not in allowed:
        instead = instead or "A real task's output is no probability: there is nothing to calibrate."
        raise ValueError(
            f"Task `{task.name}` is {task.kind}; this calibrator is for {' and '.join(allowed)} tasks. {instead}"
        )


def _counted(scores: Scores, task: Task) -> Array:
    """(n,) rows that are observed and of positive weight."""
    known = np.asarray(scores.observed[task.name], bool)
    return np.flatnonzero(known if scores.weight is None else known & (np.asarray(scores.weight) > 0))


def importance(
    task: Task, held_out: Scores, target: Scores | None, train: Scores | None, balance: Literal["weight", "resample"], seed: int
) -> tuple[Labelled, Array, Support]:  # fmt: skip
    """The held-out labelled rows, (n,) how much likelier each is in the target, and how well they cover it.

    The ratio is fitted on the hidden vectors of the task: those of ``train``'s labelled rows (without ``train``, of
    ``held_out``'s) against those of all ``target`` rows.  Labels of the target are not read.

    Raises:
        ValueError: there is no target, no hidden vectors, a conditional task, or rows of several weights.
    """
    if target is None:
        raise ValueError("This calibrator needs rows of the target (their labels are not read).")
    if task.given:
        raise ValueError(
            f"Task `{task.name}` is observed only where `{task.given}` is 1, and which target rows these are is not known "
            "without labels. Calibrate it on labelled rows (`temperature`)."
        )
    rows, source = labelled(held_out, task), held_out if train is None else train
    if (rows.weight != rows.weight[0]).any():
        raise ValueError(
            f"The held-out rows of task `{task.name}` have several weights (row weights, or sampled negatives), and a density "
            "ratio compares rows as they are. Calibrate on labelled rows (`temperature`), which counts weights."
        )
    for scores in (held_out, target, source):
        if task.name not in scores.hidden:
            raise ValueError(f"There are no hidden vectors of task `{task.name}` to compare source and target by.")
    known = np.asarray(source.hidden[task.name])[_counted(source, task)]
    if not len(known):
        raise ValueError(f"Task `{task.name}` has no labelled training row to compare the target with.")
    ratio = density_ratio(known, target.hidden[task.name], balance=balance, seed=seed)
    weights = ratio(np.asarray(held_out.hidden[task.name])[_counted(held_out, task)])
    return rows, weights, Support.of(weights)
