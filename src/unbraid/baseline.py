"""The floor that every model should beat: a logistic regression on target encodings of a few id columns.

An id is replaced by the mean label of its training rows, shrunk toward the task's mean (Micci-Barreca, "A preprocessing
scheme for high-cardinality categorical attributes", SIGKDD Explorations 2001).  Training rows are encoded
*leave-one-out*: with their own label in the mean, an id of one row would tell the label, and the regression would trust
rare ids most.
It has one number per id and task and no interactions, trains in seconds, and is hard to beat on sparse tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from unbraid.types import Schema, Task

Array = np.ndarray


class TargetEncoding:
    """Per task a linear model on smoothed target encodings of id columns, fitted by scikit-learn.

    Binary tasks get a logistic regression, multiclass tasks a multinomial one on the encodings of all K classes, real
    tasks a ridge regression on the ids' mean labels.  With S and C the sums of w*y and w over an id's training rows and
    m the task's mean, the id encodes to ``(S + smoothing * m) / (C + smoothing)``; a training row leaves out its own
    w*y and w.  An id without a training row of the task thus encodes to m.  Codes 0 (unknown) and 1 (missing) are ids
    like others: if they occur in training, they have a mean of their own.

    Args:
        schema: its tasks and their classes.
        smoothing: how many rows of weight 1 the task's mean counts like.
        feature: ``logit`` or ``rate``: what the classifiers read.  Logits add up the way logistic regression adds; on
            the validation days of KuaiRand-Pure they were better in all four tasks, most for the rarest.
        regularization: scikit-learn's ``1 / C`` (and ridge's alpha), on standardised features.
    """

    def __init__(
        self, schema: Schema, *, smoothing: float = 20.0, feature: Literal["logit", "rate"] = "logit",
        regularization: float = 1.0,
    ) -> None:  # fmt: skip
        for name, value in (("smoothing", smoothing), ("regularization", regularization)):
            if value <= 0:
                raise ValueError(f"Parameter `{name}` should be positive. Found {value}.")
        if feature not in ("logit", "rate"):
            raise ValueError(f"Parameter `feature` should be 'logit' or 'rate'. Found {feature!r}.")
        self.schema, self.smoothing, self.feature, self.regularization = schema, smoothing, feature, regularization
        self.columns: tuple[str, ...] = ()
        self.models: dict[str, _Model] = {}

    def fit(
        self, ids: Mapping[str, Array], labels: Mapping[str, Array], observed: Mapping[str, Array],
        weight: Array | None = None,
    ) -> TargetEncoding:  # fmt: skip
        """Fit all tasks on N training rows.

        Args:
            ids: column -> (N,) non-negative codes.
            labels: task -> (N,), 0 or 1, a class code, or a number; anything where unobserved.
            observed: task -> (N,) bool.
            weight: (N,) or None.  Where negatives were sampled, multiply theirs by 1/rate.

        Raises:
            ValueError: no id column, a negative code, or a task without an observed row.
        """
        if not ids:
            raise ValueError("Target encoding needs at least one id column. Found none.")
        self.columns = tuple(ids)
        for name, codes in ids.items():
            if len(codes) and codes.min() < 0:
                raise ValueError(f"Codes of column `{name}` should be 0 or more. Found {codes.min()}.")
        for task in self.schema.tasks:
            rows = np.flatnonzero(observed[task.name])
            if not len(rows):
                raise ValueError(f"Task `{task.name}` has no observed training row.")
            w = np.ones(len(rows)) if weight is None else np.asarray(weight, float)[rows]
            target = self._target(task, np.asarray(labels[task.name])[rows])
            mine = {name: np.asarray(ids[name])[rows] for name in self.columns}
            self.models[task.name] = _Model(task, self.smoothing, self.feature == "logit", self.regularization)
            self.models[task.name].fit(mine, target, w)
        return self

    def predict(self, ids: Mapping[str, Array]) -> dict[str, Array]:
        """Task -> (N,) or (N, K) logits, for a real task (N,) predictions, of rows outside the training rows.

        Raises:
            RuntimeError: before `fit`.
            KeyError: an id column is missing.
        """
        if not self.models:
            raise RuntimeError("TargetEncoding is not fitted. Call fit() first.")
        mine = {name: np.asarray(ids[name]) for name in self.columns}
        return {name: model.predict(mine) for name, model in self.models.items()}

    def _target(self, task: Task, y: Array) -> Array:
        """(n, K) columns whose means are encoded: the label itself, or one indicator per class."""
        if task.kind != "multiclass":
            return y.astype(float)[:, None]
        return (y[:, None] == np.arange(self.schema.outputs(task))).astype(float)


class _Model:
    """Encodings and regression of one task.

    Attributes:
        mean: (K,) of the target columns in training.
        tables: column -> (codes, K) encodings of rows outside training.
        coefficients, intercept: (D, K) and (K,) of the standardised features; binary and real: K = 1.
    """

    def __init__(self, task: Task, smoothing: float, logit: bool, regularization: float) -> None:
        self.task, self.smoothing, self.regularization = task, smoothing, regularization
        self.logit = logit and task.kind != "real"

    def fit(self, ids: Mapping[str, Array], target: Array, w: Array) -> None:
        """From (n,) codes per column, (n, K) target columns and (n,) weights."""
        self.mean = w @ target / w.sum()
        self.tables, own = {}, []
        for name, codes in ids.items():
            self.tables[name], encoded = _encode(codes, target, w, self.mean, self.smoothing)
            own.append(self._feature(encoded))
        x = np.hstack(own)
        self.center = np.average(x, axis=0, weights=w)
        spread = np.sqrt(np.average((x - self.center) ** 2, axis=0, weights=w))
        self.scale = np.where(spread > 1e-12, spread, 1)  # a column that never varies, up to rounding, stays 0
        self.coefficients, self.intercept = self._regress((x - self.center) / self.scale, target, w)

    def predict(self, ids: Mapping[str, Array]) -> Array:
        """(n,) or (n, K) logits or, for a real task, predictions."""
        parts = []
        for name, table in self.tables.items():
            known = ids[name] < len(table)
            encoded = table[np.where(known, ids[name], 0)]
            parts.append(self._feature(np.where(known[:, None], encoded, self.mean)))
        z = (np.hstack(parts) - self.center) / self.scale @ self.coefficients + self.intercept
        return z if self.task.kind == "multiclass" else z[:, 0]

    def _feature(self, rate: Array) -> Array:
        """Logits of rates; a class that training never (or always) shows has no logit and is kept 1e-6 away from it."""
        if not self.logit:
            return rate
        inside = np.clip(rate, 1e-6, 1 - 1e-6)
        return np.log(inside) - np.log1p(-inside)

    def _regress(self, x: Array, target: Array, w: Array) -> tuple[Array, Array]:
        """Coefficients (D, K) and intercept (K,) of standardised features x (n, D)."""
        from sklearn.linear_model import LogisticRegression, Ridge  # type: ignore[import-untyped]

        if self.task.kind == "real":
            ridge = Ridge(alpha=self.regularization).fit(x, target[:, 0], sample_weight=w)
            return ridge.coef_[:, None], np.array([ridge.intercept_])
        y = target.argmax(1) if target.shape[1] > 1 else target[:, 0].astype(int)
        seen = np.unique(y[w > 0])
        if len(seen) < 2:
            return np.zeros((x.shape[1], target.shape[1])), self._prior(w)
        model: Any = LogisticRegression(C=1 / self.regularization, max_iter=1000).fit(x, y, sample_weight=w)
        if target.shape[1] == 1:
            return model.coef_.T, model.intercept_
        return _spread(model, seen, x.shape[1], self._prior(w))

    def _prior(self, w: Array) -> Array:
        """(K,) logits of the training rates with half a row of each class added, which keeps them finite."""
        total = w.sum()
        return np.log(self.mean * total + 0.5) - (np.log((1 - self.mean) * total + 0.5) if len(self.mean) == 1 else 0)


def _encode(codes: Array, target: Array, w: Array, mean: Array, smoothing: float) -> tuple[Array, Array]:
    """Encodings of one column: (codes, K) of rows outside training, and (n, K) leave-one-out of the training rows."""
    count = np.bincount(codes, w)
    own = w[:, None] * target
    sums = np.column_stack([np.bincount(codes, each) for each in own.T])
    table = (sums + smoothing * mean) / (count[:, None] + smoothing)
    left_out = (sums[codes] - own + smoothing * mean) / ((count[codes] - w)[:, None] + smoothing)
    return table, left_out


def _spread(model: Any, seen: Array, width: int, prior: Array) -> tuple[Array, Array]:
    """Coefficients over all K classes of a multinomial model that saw some; the others keep their prior logit.

    scikit-learn gives one row for two classes: the second's logit minus the first's, here half to each.
    """
    coefficients, intercept = np.zeros((width, len(prior))), prior - prior[seen].mean()
    pair = len(seen) == 2
    coefficients[:, seen] = np.vstack([-model.coef_, model.coef_]).T / 2 if pair else model.coef_.T
    intercept[seen] = np.append(-model.intercept_, model.intercept_) / 2 if pair else model.intercept_
    return coefficients, intercept
