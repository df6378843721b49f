"""The two ends of a table of calibrators: the model as it is, and the best that the target's own labels allow.

`Oracle` reads the labels of the target.  It measures how much a calibrator could have gained and is no member of the slot: no
run file, command or bundle can choose it.

    multiclass   T = argmin ECE (15 bins of equal width, closed on the right, of the largest probability) on the target
    binary       slope and intercept of greatest likelihood on the target, whose mean prediction is then the mean label

How this differs: TransCal's code searches T by Nelder-Mead from 2; the ECE has many small valleys in T, so a grid over its
logarithm comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy

from unbraid.calibration.labelled import Labelled, kind_of, labelled
from unbraid.calibration.maps import Affine, Calibration, confidence
from unbraid.calibration.scaling import logistic_fit
from unbraid.types import Scores, Task

Array = np.ndarray
BINS = 15


@dataclass(frozen=True)
class Vanilla:
    """The model's own probabilities."""

    kind: ClassVar[str] = "vanilla"
    keeps_argmax: ClassVar[bool] = True
    needs_target: ClassVar[bool] = False

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        """See `unbraid.slots.Calibrator`; reads nothing."""
        kind_of(task, ("binary", "multiclass"))
        return Calibration(Affine(1.0))


@dataclass(frozen=True)
class Oracle:
    """The best scaling by the target's own labels: for evaluation only."""

    kind: ClassVar[str] = "oracle"
    keeps_argmax: ClassVar[bool] = True
    needs_target: ClassVar[bool] = True

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        """See `unbraid.slots.Calibrator`; reads ``target`` alone, its labels too.  Raises ValueError without labels."""
        if target is None:
            raise ValueError("The oracle needs labelled rows of the target.")
        rows = labelled(target, task)
        if task.kind == "binary":
            slope, intercept = logistic_fit(rows)
            return Calibration(Affine(slope, intercept), {"slope": slope, "intercept": intercept})
        temperature = min(_valleys(rows), key=lambda t: top_ece(rows.logits / t, rows.labels))
        return Calibration(Affine(1 / temperature), {"temperature": temperature})


def _valleys(rows: Labelled) -> list[float]:
    """Temperatures of locally least ECE: from 2, and from the five best of a grid."""

    def ece(t: float) -> float:
        return top_ece(rows.logits / t, rows.labels)

    starts = [2.0, *sorted(np.geomspace(0.05, 50, 200), key=ece)[:5]]
    return [float(scipy.optimize.minimize(lambda t: ece(t[0]), [start], method="Nelder-Mead").x[0]) for start in starts]


def top_ece(logits: Array, labels: Array) -> float:
    """Expected calibration error of the largest probability: sum over bins of (share of rows) |accuracy - mean confidence|.

    Args:
        logits: (N, K); labels: (N,) classes.  Bins are ``(lo, hi]`` of equal width.
    """
    top = confidence(logits)
    bin_of = np.clip(np.ceil(top * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gap = np.bincount(bin_of, (np.argmax(logits, 1) == labels) - top, BINS)
    return float(np.abs(gap).sum() / len(top))
