"""Does one column alone say the label?  Then it is probably the label, or was written after it.

Every feature by itself predicts every binary target by the label rates of its values, counted on other rows (cross-fitted over
folds of users): ids by value, numbers by bins of equal frequency, a missing value being one of its own, bags and histories are
not looked at.  With AUC_j the result on training and validation rows (no label of the test split is read)::

    value = max over targets of max(AUC_j, 1 - AUC_j)

Honest columns seldom pass .8 alone; a column that was filled after the outcome is near 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from unbraid.diagnosis.case import Case, without_feature
from unbraid.diagnosis.diagnosis import Diagnosis, Measure, NotApplicable, Remedy
from unbraid.diagnosis.plots import Bars
from unbraid.evaluate import auc
from unbraid.types import Feature

BINS, FOLDS, PRIOR = 64, 2, 20.0  # rows that the overall rate counts for in a value's rate
PAGE = "diagnosis.md#does-one-column-say-the-label"


@dataclass(frozen=True)
class Leak:
    """See the module's docstring.  ``usual``, ``severe``: AUC of one column alone."""

    name: ClassVar[str] = "leak"
    title: ClassVar[str] = "Does one column alone say the label?"
    page: ClassVar[str] = PAGE
    usual: float = 0.8
    severe: float = 0.9

    def __call__(self, case: Case) -> list[Diagnosis]:
        """A diagnosis per feature, worst first.  Raises NotApplicable without a binary target or a feature to look at."""
        rows = np.concatenate([case.sample("train"), case.sample("valid")])
        labels, observed = case.encoded.labels(rows)
        users = np.asarray(case.encoded.columns["user"][rows]) if "user" in case.encoded.columns else rows
        tasks = [task.name for task in case.targets if task.kind == "binary"]
        features = [f for f in case.schema.features if f.kind in ("id", "number")]
        if not tasks or not features:
            raise NotApplicable("there is no binary target, or no id and no number")
        found = []
        for feature in features:
            codes = coded(feature, np.asarray(case.encoded.columns[f"feature.{feature.name}"][rows]))
            judged = []
            for task in tasks:
                known = observed[task].numpy()
                one = alone(codes[known], labels[task].numpy()[known].astype(float), users[known])
                if one is not None:
                    judged.append((*one, task))
            if judged:
                found.append((feature, *max(judged)))
        found.sort(key=lambda each: -each[1])
        shown = found[:20]
        bars = Bars(
            "How well one column alone predicts a target", "AUC", tuple(f.name for f, *_ in shown),
            tuple(value for _, value, *_ in shown), tuple(low for _, _, low, *_ in shown),
            tuple(high for _, _, _, high, _ in shown), reference=0.5, x="column",
        )  # fmt: skip
        return [self._of(case, *each, bars) for each in shown[:5]]

    def _of(
        self, case: Case, feature: Feature, value: float, low: float, high: float, task: str, bars: Bars
    ) -> Diagnosis:  # fmt: skip
        remedy = Remedy(
            f"without_{feature.name}",
            f"Leave `{feature.name}` out of the features, unless it is known before the prediction is made.",
            "data.features",
            without_feature(case.run, feature.name),
            measure=Measure(task, "auc"),
        )  # fmt: skip
        return Diagnosis(
            "leak", feature.name, value, self.usual, self.severe,
            f"`{feature.name}` alone predicts `{task}` with an AUC of {value:.3f}" + (
                ": it may be the outcome, or written after it" if low > self.usual else ", which is within what honest columns do"
            ),
            "AUC of one column", low, high, remedies=(remedy,), page=PAGE, evidence={"plots": (bars,)},
        )  # fmt: skip


def coded(feature: Feature, values: np.ndarray) -> np.ndarray:
    """(n,) int64 codes of an encoded column: those of an id; bins of equal frequency of a number, 0 where it is missing."""
    if feature.kind == "id":
        return np.asarray(values, np.int64)
    value = values if values.ndim == 1 else values[:, 0]
    known = np.isfinite(value)
    codes = np.zeros(len(value), np.int64)
    if known.any():
        cuts = np.unique(np.quantile(value[known], np.linspace(0, 1, BINS + 1)[1:-1]))
        codes[known] = 1 + np.searchsorted(cuts, value[known], side="right")
    return codes


def alone(codes: np.ndarray, label: np.ndarray, users: np.ndarray) -> tuple[float, float, float] | None:
    """AUC, its side above 1/2, of label rates by code counted on the other half of the users; with a 95 % interval.

    The interval is Hanley and McNeil's, which takes rows as independent.  None with fewer than 10 positives or negatives.
    """
    positives = int(label.sum())
    if min(positives, len(label) - positives) < 10:
        return None
    fold = np.unique(users, return_inverse=True)[1] % FOLDS
    size, scores = int(codes.max()) + 1, np.zeros(len(codes))
    for part in range(FOLDS):
        here, there = fold == part, fold != part
        if not here.any() or not there.any():
            return None
        rate = label[there].mean()
        count = np.bincount(codes[there], minlength=size)
        total = np.bincount(codes[there], label[there], minlength=size)
        scores[here] = ((total + PRIOR * rate) / (count + PRIOR))[codes[here]]
    value = auc(scores, label.astype(bool))
    value = max(value, 1 - value)
    error = hanley(value, positives, len(label) - positives)
    return value, max(0.5, value - 1.96 * error), min(1.0, value + 1.96 * error)


def hanley(value: float, positives: int, negatives: int) -> float:
    """Standard error of an AUC (Hanley and McNeil, Radiology 1982)."""
    one, two = value / (2 - value), 2 * value**2 / (1 + value)
    spread = value * (1 - value) + (positives - 1) * (one - value**2) + (negatives - 1) * (two - value**2)
    return float(np.sqrt(spread / (positives * negatives)))
