"""Histogram binning and isotonic regression: the probability of a score is what was observed at scores like it.

Papers: Zadrozny and Elkan, "Obtaining calibrated probability estimates from decision trees and naive Bayesian classifiers",
ICML 2001 (bins), and "Transforming classifier scores into accurate multiclass probability estimates", KDD 2002 (isotonic;
several classes each against all others, then divided by their sum).

    histogram   bins of equally many held-out rows; p = the weighted mean label of the bin
    isotonic    the non-decreasing curve of least squared error (pool adjacent violators, scikit-learn), straight lines between

How this differs: values are kept inside [1/(n + 2), 1 - 1/(n + 2)] for n rows, since a probability of 0 or 1 has an infinite
log-loss at the first exception; rows of one score are never in two bins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from unbraid.calibration.labelled import Labelled, labelled
from unbraid.calibration.maps import Calibration, Curves, against_others
from unbraid.types import FORBID, Scores, Task

Array = np.ndarray
Points = tuple[Array, Array]  # (M,) ascending scores and (M,) probabilities

_ELKAN_2001 = """@inproceedings{zadrozny2001obtaining,
  title = {Obtaining Calibrated Probability Estimates from Decision Trees and Naive {B}ayesian Classifiers},
  author = {Zadrozny, Bianca and Elkan, Charles},
  booktitle = {Proceedings of the 18th International Conference on Machine Learning},
  year = {2001}
}
"""
_ELKAN_2002 = """@inproceedings{zadrozny2002transforming,
  title = {Transforming Classifier Scores into Accurate Multiclass Probability Estimates},
  author = {Zadrozny, Bianca and Elkan, Charles},
  booktitle = {Proceedings of the 8th ACM SIGKDD International Conference on Knowledge Discovery and Data Mining},
  year = {2002}
}
"""


def _curves(rows: Labelled, fit: Callable[[Array, Array, Array], Points], smooth: bool) -> Calibration:
    """One curve, or one per class against all others."""
    z, y, w = rows
    columns = [(z, y)] if z.ndim == 1 else [(s, (y == k) + 0.0) for k, s in enumerate(against_others(z).T)]
    points = [fit(score, label, w) for score, label in columns]
    edge = 1 / (len(y) + 2)
    values = tuple(np.clip(p, edge, 1 - edge) for _, p in points)
    return Calibration(Curves(tuple(s for s, _ in points), values, smooth), {"rows": float(len(y))})


@dataclass(frozen=True)
class Histogram:
    """Mean label in bins of equally many rows."""

    __pydantic_config__: ClassVar[dict] = FORBID
    BIBTEX: ClassVar[str] = _ELKAN_2001
    kind: Literal["histogram"] = field(default="histogram", kw_only=True)
    keeps_argmax: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False
    bins: int = 15

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"Parameter `bins` should be at least 1. Found {self.bins}.")

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        """See `unbraid.slots.Calibrator`; reads ``held_out`` alone.  Raises ValueError for fewer rows than bins."""
        rows = labelled(held_out, task)
        if len(rows.labels) < self.bins:
            raise ValueError(f"{self.bins} bins need as many labelled rows. Found {len(rows.labels)}: lower `bins`.")
        return _curves(rows, self._bins, smooth=False)

    def _bins(self, score: Array, label: Array, weight: Array) -> Points:
        ranked = np.sort(score)
        starts = np.unique(ranked[np.arange(self.bins) * len(score) // self.bins])  # of tied scores one bin is left
        bin_of = np.searchsorted(starts, score, side="right") - 1
        total = np.bincount(bin_of, weight, len(starts))
        return starts, np.bincount(bin_of, weight * label, len(starts)) / total


@dataclass(frozen=True)
class Isotonic:
    """The best non-decreasing curve."""

    __pydantic_config__: ClassVar[dict] = FORBID
    BIBTEX: ClassVar[str] = _ELKAN_2002
    kind: Literal["isotonic"] = field(default="isotonic", kw_only=True)
    keeps_argmax: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def fit(
        self, task: Task, held_out: Scores, target: Scores | None = None, train: Scores | None = None
    ) -> Calibration:
        """See `unbraid.slots.Calibrator`; reads ``held_out`` alone."""
        return _curves(labelled(held_out, task), _isotonic, smooth=True)


def _isotonic(score: Array, label: Array, weight: Array) -> Points:
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression().fit(score, label, sample_weight=weight)
    return fitted.X_thresholds_.astype(np.float64), fitted.y_thresholds_.astype(np.float64)
